"""generate.py against transformers' logits processors and its generate(), and against laws.

Laws: the cache and the device change nothing; a seed repeats itself and its draws have the stated probabilities
(chi-square).
"""

import functools
import itertools
import json
import shutil
import types

import pytest
import tokenizers
import torch
from synthetic import MIXED, ByteTokenizer
from torch import nn

import generate as module
import hf
import tokenizer
from core.config import check_limits
from core.output import escape
from generate import Settings, complete, end_ids, generate, penalised, probabilities, sample_logits

pytestmark = pytest.mark.usefixtures("one_thread")
BASE = {"max_new_tokens": 30, "temperature": 0.0}


# ---- one token

def their_probabilities(logits, s: Settings, seen):
    """What transformers' processors make of logits [V], in the dtype of logits."""
    from transformers.generation import logits_process as lp

    scores, ids = logits[None].clone(), torch.tensor([list(seen)], dtype=torch.long)
    steps = [lp.RepetitionPenaltyLogitsProcessor(float(s.repetition_penalty)),
             lp.TemperatureLogitsWarper(float(s.temperature))]
    steps += [lp.TopKLogitsWarper(s.top_k)] if s.top_k else []
    steps += [lp.TopPLogitsWarper(s.top_p)] if s.top_p < 1 else []
    for step in [*steps, lp.MinPLogitsWarper(s.min_p)]:
        scores = step(ids, scores)
    return scores.softmax(-1)[0]


def next_id(logits, settings, seen=(), generator=None) -> int:
    """The next id of one sequence with logits [V]."""
    return sample_logits(logits[None], settings, [seen], [generator])[0]


def some_logits():
    generator = torch.Generator().manual_seed(5)
    normal = torch.randn(50, generator=generator, dtype=torch.float64) * 3
    yield "normal", normal
    yield "ties", normal.round()
    yield "all equal", torch.zeros(50, dtype=torch.float64)
    yield "one token", torch.tensor([-3.0], dtype=torch.float64)
    yield "extreme", torch.tensor([-1e30, 88.0, 1e30, 1e30, 0.0, -0.0, 1e-300, -1e4], dtype=torch.float64)
    yield "forbidden", normal.masked_fill(torch.arange(50) % 3 != 1, -torch.inf)


@pytest.mark.parametrize(("name", "logits"), some_logits(), ids=[name for name, _ in some_logits()])
def test_same_tokens_kept_with_the_same_probabilities_as_transformers(monkeypatch, name, logits):
    monkeypatch.setattr(torch, "sort", functools.partial(torch.sort, stable=True))   # which of equals is left to chance
    seen = [1, 0, 3, 3, 7, 20, 49] if len(logits) == 50 else [0]
    grid = itertools.product((1.0, 0.1, 2.5), (0, 1, 4, 1000), (1.0, 0.999, 0.6, 0.5, 1e-17), (0.0, 0.05, 0.6, 1.0),
                             (1.0, 1.4, 0.6))
    for temperature, top_k, top_p, min_p, penalty in grid:
        s = Settings(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=penalty)
        ours, theirs = probabilities(penalised(logits, s, seen), s), their_probabilities(logits, s, seen)
        assert torch.equal(ours > 0, theirs > 0), s
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)


def test_float32_logits_and_the_order_of_steps_as_in_transformers_generate(hf_model):
    model, _ = hf_model("llama")
    prompt = torch.randint(97, (1, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model(prompt).logits[0, -1]
    for seed, (k, p, m) in enumerate(((0, 1.0, 0.0), (12, 1.0, 0.0), (0, 0.7, 0.0), (0, 1.0, 0.2), (40, 0.9, 0.02))):
        s = Settings(temperature=0.6, top_k=k, top_p=p, min_p=m, repetition_penalty=1.2, seed=seed)
        scores = model.generate(prompt, do_sample=True, max_new_tokens=1, temperature=0.6, top_k=k, top_p=p, min_p=m,
                                repetition_penalty=1.2, output_scores=True, return_dict_in_generate=True).scores[0]
        ours, theirs = probabilities(penalised(logits, s, prompt[0].tolist()), s), scores.softmax(-1)[0]
        assert torch.equal(ours > 0, theirs > 0)
        torch.testing.assert_close(ours.float(), theirs, rtol=1e-5, atol=0)


def test_draws_have_the_stated_probabilities():
    """Chi-square over 5,000 draws; 26.1 is exceeded once in a thousand at 8 degrees of freedom."""
    logits, n = torch.tensor([2.0, 1.0, 1.0, 0.5, 0.0, -0.5, -1.0, 1.5, 0.2, -9.0, -torch.inf, -8.0]), 5_000
    s, generator = Settings(temperature=1.3, min_p=0.01, repetition_penalty=1.1), torch.Generator().manual_seed(0)
    counts = torch.zeros(len(logits), dtype=torch.float64)
    for _ in range(n):
        counts[sample_logits(logits[None], s, [[0, 4, 6]], [generator])] += 1
    expected = their_probabilities(logits.double(), s, [0, 4, 6]) * n
    kept = expected > 0
    assert kept.sum() == 9
    assert counts[~kept].sum() == 0
    assert ((counts - expected)[kept] ** 2 / expected[kept]).sum() < 26.1


@pytest.mark.parametrize("draw", [0.0, 1 - 2**-53])
def test_a_draw_at_either_end_meets_a_possible_token(monkeypatch, draw):
    monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.tensor(draw, dtype=torch.float64))
    logits = torch.full((1000,), -torch.inf)
    logits[3:990] = torch.linspace(-5, 5, 987)
    assert next_id(logits, Settings()) == (3 if draw == 0 else 989)
    assert next_id(logits, Settings(top_k=1)) == 989


def test_sampling_is_pure_and_greedy_takes_the_first_of_equals():
    logits = torch.tensor([0.5, 2.0, 2.0, -1.0], dtype=torch.float64)
    before = logits.clone()
    assert next_id(logits, Settings(temperature=0, repetition_penalty=1.0)) == 1
    assert next_id(logits, Settings(temperature=0, repetition_penalty=2.0), [1, 1]) == 2
    assert next_id(logits.bfloat16(), Settings(temperature=1e-6), [], torch.Generator()) in (1, 2)
    assert torch.equal(logits, before)
    for bad in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match=r"not finite.*float32"):
            next_id(torch.tensor([0.0, bad]), Settings(temperature=0))


@pytest.mark.parametrize(("name", "values"), {
    "max_new_tokens": [-1], "temperature": [-0.1, float("nan"), float("inf")], "top_k": [-1],
    "top_p": [0.0, -0.5, 1.01, float("nan")], "min_p": [-0.1, 1.1, float("nan")],
    "repetition_penalty": [0.0, -1.0, float("inf")], "seed": [-1, 2**63]}.items())
def test_settings_out_of_range_are_named(name, values):
    for value in values:
        with pytest.raises(ValueError, match=f"{name} is .*must be"):
            check_limits(Settings(**{name: value}))


# ---- many tokens

@pytest.mark.parametrize("penalty", [1.0, 1.3])
@pytest.mark.parametrize(("family", "changes"), [("llama", {}), ("qwen3", {"head_dim": 16}),
                                                 ("mistral", {"sliding_window": 7})])
def test_greedy_tokens_equal_transformers(hf_model, family, changes, penalty):
    theirs, folder = hf_model(family, num_hidden_layers=2, **changes)
    theirs.generation_config.eos_token_id = None
    ours, prompt = hf.load(folder), [1, 50, 7, 7, 96, 3, 22, 41, 8, 60, 12]

    def expected(**more):
        ids = theirs.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=40, repetition_penalty=penalty,
                              pad_token_id=0, **more)
        return ids[0, len(prompt):].tolist()
    settings = Settings(max_new_tokens=40, temperature=0, repetition_penalty=penalty)
    new = generate(ours, prompt, settings)
    assert len(new) == 40
    assert new == expected()
    assert len(set(new)) > 3                       # a model that says one thing would prove little
    end = [96, new[9]] if 96 not in new else [new[9]]
    assert generate(ours, prompt, settings, eos_ids=end) == expected(eos_token_id=end)
    assert generate(ours, prompt, settings, eos_ids=end)[-1] == new[9]


@pytest.mark.parametrize("penalty", [1.0, 1.15])
def test_a_real_model_tells_what_it_tells_in_transformers(data_dir, penalty):
    transformers, folder = pytest.importorskip("transformers"), data_dir / "models" / "stories260K"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).generate(
        torch.tensor([[1]]), do_sample=False, max_new_tokens=120, repetition_penalty=penalty)[0].tolist()
    told = complete(hf.load(folder), tokenizer.load(folder), "", Settings(120, 0.0, repetition_penalty=penalty), (2,))
    assert told["prompt_ids"] + told["new_ids"] == theirs
    assert told["text"].startswith("Once upon a time, there was a little girl named Lily." if penalty == 1 else "Once")


@pytest.mark.parametrize("changes", [{}, {"windows": [3, None, 5]}, {"rope_scaling": {"rope_type": "linear",
                                                                                       "factor": 2.0}}])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_cached_equals_uncached(tiny_model, changes, temperature):
    model, prompt = tiny_model(**changes), [5, 90, 3, 3, 17]
    new = [generate(model, prompt, Settings(40, temperature, top_p=0.9, cache=cache)) for cache in (True, False)]
    assert new[0] == new[1]
    assert len(new[0]) == 40


def test_a_seed_repeats_itself_and_leaves_torch_alone(tiny_model):
    model = tiny_model()
    before = torch.get_rng_state()
    runs = [generate(model, [1, 2], Settings(20, seed=seed)) for seed in (4, 4, 5)]
    assert runs[0] == runs[1] != runs[2]
    assert torch.equal(torch.get_rng_state(), before)


def test_modes_are_restored_and_training_goes_on(tiny_model):
    model, seen = tiny_model().train(), []
    model.layers[1].eval()                         # a frozen block
    before = [part.training for part in model.modules()]
    model.layers[0].register_forward_pre_hook(lambda part, _: seen.append((part.training, torch.is_grad_enabled(),
                                                                           torch.is_inference_mode_enabled())))
    generate(model, [1, 2], Settings(3))
    with pytest.raises(KeyError):
        generate(model, [1], Settings(3), on_token=lambda token: {}[token])
    assert set(seen) == {(False, False, False)}
    assert [part.training for part in model.modules()] == before
    model.head(model(torch.tensor([[1, 2, 3, 4, 5, 6]]))).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_on_token_sees_all_but_the_end_and_can_stop(tiny_model):
    model, seen = tiny_model(), []
    new = generate(model, [1, 2], Settings(**BASE), on_token=seen.append)
    assert new == seen
    assert len(new) == 30
    first = next(i for i, token in enumerate(new) if token not in new[:i] and i > 1)
    seen.clear()
    assert generate(model, [1, 2], Settings(**BASE), (new[first],), seen.append) == new[:first + 1]
    assert seen == new[:first]
    assert generate(model, [1, 2], Settings(**BASE), on_token=lambda token: token == new[first]) == new[:first + 1]
    assert generate(model, [1, 2], Settings(max_new_tokens=0)) == []
    for ids, message in (([], "no tokens"), ([1, 97], "id 97.*97 rows")):
        with pytest.raises(ValueError, match=message):
            generate(model, ids, Settings())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_and_cpu_tell_the_same(tiny_model):
    for settings in (Settings(40, 0.0), Settings(40, 0.9, top_k=20, top_p=0.9, repetition_penalty=1.1)):
        runs = [generate(tiny_model().to(device), [1, 2, 3], settings) for device in ("cpu", "cuda")]
        assert runs[0] == runs[1]


# ---- text

class Scripted(nn.Module):
    """A model that says `script` after a prompt, whatever the prompt."""

    def __init__(self, script, vocab_size, prompt):
        super().__init__()
        self.script, self.prompt, self.at = script, prompt, nn.Parameter(torch.zeros(1))
        self.config = types.SimpleNamespace(vocab_size=vocab_size, max_position_embeddings=10_000)
        self.head, self.angles = nn.Identity(), lambda length, device: None

    def forward(self, tokens, cache):
        cache.length += tokens.shape[1]
        script = self.script[cache.length - self.prompt]
        return nn.functional.one_hot(torch.tensor([[script]]), self.config.vocab_size).float()


def test_a_stop_string_ends_generation_and_the_prompt_may_hold_it():
    said = ByteTokenizer().encode("lo END. never END said") + [257]
    model = Scripted(said, 258, prompt=8)
    out = complete(model, ByteTokenizer(), "END hel", Settings(50, 0.0), (257,), ["ND.", "END"])
    assert out["text"] == "END hello "
    assert out["prompt_ids"] == [256, *b"END hel"]
    assert out["new_ids"] == said[:6]
    out = complete(model, ByteTokenizer(), "END hel", Settings(50, 0.0), (257,), ["said."])
    assert out["text"] == "END hello END. never END said"           # what was held back comes at the end
    assert out["new_ids"] == said


def test_prompts_begin_with_bos_where_the_model_was_trained_so():
    tok, settings = ByteTokenizer(), Settings(2, 0.0)
    assert complete(Scripted([65, 66], 258, 1), tok, "", settings) == {"prompt_ids": [256], "new_ids": [65, 66],
                                                                      "text": "AB"}
    tok.add_bos = False
    assert complete(Scripted([65, 66], 258, 1), tok, "", settings)["prompt_ids"] == [256]
    assert complete(Scripted([65, 66], 258, 1), tok, "x", settings) == {"prompt_ids": [120], "new_ids": [65, 66],
                                                                       "text": "xAB"}
    tok.encode = lambda text, bos=False: list(text.strip().encode())     # SentencePiece gives " " no ids
    assert complete(Scripted([65, 66], 258, 1), tok, " ", settings) == {"prompt_ids": [256], "new_ids": [65, 66],
                                                                        "text": "AB"}
    tok.bos_id = None
    assert complete(Scripted([65, 66], 258, 1), tok, "", settings)["prompt_ids"] == [257]
    tok.eos_id = None
    with pytest.raises(ValueError, match=r"neither BOS nor EOS.*give generate.py a prompt"):
        complete(Scripted([65, 66], 258, 1), tok, "", settings)


def test_a_prompt_is_read_in_parts_where_each_length_would_cost_memory(tiny_model, monkeypatch):
    tokens = torch.arange(100).view(2, 50)
    for dtype, cache, lengths in ((torch.bfloat16, True, [32, 16, 2]), (torch.float16, True, [32, 16, 2]),
                                  (torch.float32, True, [50]), (torch.bfloat16, None, [50])):
        parts = module.cut_prompt(tokens, dtype, cache)
        assert [part.shape[1] for part in parts] == lengths
        assert torch.equal(torch.cat(parts, 1), tokens)
    model, prompt, settings = tiny_model(), [*range(50)], Settings(10, 0.0)
    whole = generate(model, prompt, settings)
    monkeypatch.setattr(module, "cut_prompt", lambda tokens, *_: tokens.split(7, dim=1))
    assert generate(model, prompt, settings) == whole


@pytest.mark.parametrize("temperature", [0.0, 3.0])
def test_no_id_is_chosen_that_the_tokenizer_lacks(tiny_model, tiny_bpe, temperature):
    """Rows that pad the embedding, and a hole; the truth is a model whose head cannot choose them."""
    tok, model, settings = tokenizer.load(tiny_bpe), tiny_model(vocab_size=900), Settings(60, temperature, seed=3)
    tok.tokens[50] = None
    lacking = [50, *range(tok.vocab_size, 900)]
    assert tok.missing_ids(900) == lacking
    assert tok.missing_ids(40) == []
    assert set(generate(model, [1, 2], settings)) & set(lacking)
    result = complete(model, tok, "a", settings)
    assert not set(result["new_ids"]) & set(lacking)
    assert result["text"] == tok.decode([*tok.encode("a"), *result["new_ids"]])
    barred = torch.isin(torch.arange(900), torch.tensor(lacking))
    model.head.register_forward_hook(lambda module, inputs, logits: logits.masked_fill(barred, -1e30))
    assert generate(model, result["prompt_ids"], settings) == result["new_ids"]


def test_an_end_token_that_the_tokenizer_lacks_still_ends(tiny_model, tiny_bpe):
    tok, model = tokenizer.load(tiny_bpe), tiny_model(vocab_size=900)
    free = generate(model, [1, 2], Settings(60, 3.0, seed=3))
    end = next(i for i in free if i >= tok.vocab_size)
    result = complete(model, tok, "", Settings(4000, 3.0, seed=3, cache=False), (end,))
    assert result["new_ids"][-1] == end


def test_end_ids_from_the_files(tmp_path):
    assert end_ids(tmp_path, types.SimpleNamespace(eos_id=None)) == ()
    assert end_ids(tmp_path, types.SimpleNamespace(eos_id=0)) == (0,)
    (tmp_path / "config.json").write_text('{"eos_token_id": 7}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": null}')
    assert end_ids(tmp_path, types.SimpleNamespace(eos_id=0)) == (7,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [8, 9]}')
    assert end_ids(tmp_path, types.SimpleNamespace(eos_id=0)) == (8, 9)


# ---- the command

@pytest.fixture
def byte_folder(hf_model):
    """A model of 258 tokens with a byte-level tokenizer.json: "<s>" 256 (BOS), "</s>" 257."""
    _, folder = hf_model("llama", vocab_size=258, bos_token_id=256, eos_token_id=257, max_position_embeddings=64)
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    lib = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(letters)}, []))
    lib.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    lib.decoder = tokenizers.decoders.ByteLevel()
    lib.add_special_tokens(["<s>", "</s>"])
    lib.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": true}')
    return folder


def command(*words):
    return module.main([str(word) for word in words])


def test_command_writes_what_it_prints(byte_folder, tmp_path, capsys, monkeypatch):
    file, tok = tmp_path / "out.json", tokenizer.load(byte_folder)
    model = hf.load(byte_folder)
    for words, settings in ((["--temperature", 0], {"temperature": 0}),
                            (["--top-k", 9, "--seed", 3, "--no-cache"], {"top_k": 9, "seed": 3}),
                            (["--temperature", 0.9, "--top-p", 0.8, "--min-p", 0.01, "--repetition-penalty", 1.2],
                             {"temperature": 0.9, "top_p": 0.8, "min_p": 0.01, "repetition_penalty": 1.2})):
        assert command("--model", byte_folder, "--prompt", "é 中", "--max-new-tokens", 40, "--json", file, *words) == 0
        printed, result = capsys.readouterr(), json.loads(file.read_text(encoding="utf-8"))
        assert list(result) == ["prompt_ids", "new_ids", "text"]
        assert result["prompt_ids"] == [256, *tok.encode("é 中")]
        assert result["new_ids"] == generate(model, result["prompt_ids"], Settings(40, **settings), (257,))
        kept = result["new_ids"][:-1] if result["new_ids"][-1] == 257 else result["new_ids"]
        assert result["text"] == tok.decode(result["prompt_ids"][1:] + kept)
        assert printed.out == escape(result["text"]) + "\n"
        assert printed.err == ""
        assert "é 中" in file.read_text(encoding="utf-8")
    monkeypatch.setattr(module, "KVCache", None)            # calling it would be an error
    assert command("--model", byte_folder, "--max-new-tokens", 3, "--no-cache") == 0


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
@pytest.mark.parametrize("prompt", ["", "Hi", "Grüße 中"])
def test_command_streams_exactly_the_text(byte_folder, request, monkeypatch, tmp_path, capsys, kind, prompt):
    if kind == "sentencepiece":
        (byte_folder / "tokenizer.json").unlink()
        (byte_folder / "tokenizer_config.json").unlink()
        (byte_folder / "config.json").write_text('{"bos_token_id": 1, "eos_token_id": 2}')
        (byte_folder / "generation_config.json").write_text("{}")
        shutil.copyfile(request.getfixturevalue("data_dir") / "tokenizers" / "llama2_spm" / "tokenizer.model",
                        byte_folder / "tokenizer.model")
    tok, text = tokenizer.load(byte_folder), f"{prompt} {MIXED}".strip()
    whole, first = tok.encode(text), tok.encode(prompt)
    assert whole[:len(first)] == first
    script = [*whole[len(first):], tok.eos_id]
    monkeypatch.setattr(hf, "load", lambda *_: Scripted(script, tok.vocab_size, len(first) + 1))
    (tmp_path / "prompt.txt").write_bytes(prompt.encode())
    for words in (["--prompt", prompt], ["--prompt-file", tmp_path / "prompt.txt"]):
        assert command("--model", byte_folder, *words, "--temperature", 0, "--max-new-tokens", 200) == 0
        assert capsys.readouterr().out == text + "\n"
    assert command("--model", byte_folder, "--prompt", prompt, "--temperature", 0, "--max-new-tokens", 200, "--stop",
                   "語 🙂", "--stop", "never") == 0
    assert capsys.readouterr().out == text[:text.index("語")] + "\n"


def test_command_on_a_real_model(data_dir, tmp_path, capsys):
    file = tmp_path / "out.json"
    assert command("--model", data_dir / "models" / "stories260K", "--max-new-tokens", 60, "--temperature", 0, "--json",
                   file, "--stop", " named") == 0
    assert capsys.readouterr().out == "Once upon a time, there was a little girl\n"
    assert json.loads(file.read_text())["prompt_ids"] == [1]


def test_past_the_trained_length_it_warns_in_one_line_and_goes_on(byte_folder, tmp_path, capsys):
    file = tmp_path / "out.json"
    assert command("--model", byte_folder, "--max-new-tokens", 90, "--seed", 1, "--json", file) == 0
    error = capsys.readouterr().err
    assert error.startswith("warning: ")
    assert error.count("\n") == 1
    assert "91" in error
    assert "64" in error
    assert command("--model", byte_folder, "--max-new-tokens", 63, "--seed", 1) == 0
    assert capsys.readouterr().err == ""
    assert command("--model", byte_folder, "--prompt", "abc", "--max-new-tokens", 0, "--json", file) == 0
    assert capsys.readouterr() == ("abc\n", "")
    assert json.loads(file.read_text())["new_ids"] == []


@pytest.mark.parametrize(("words", "message"), [
    (["--max-new-tokens", "-1"], "--max-new-tokens is -1"),
    (["--max-new-tokens", "many"], "--max-new-tokens"),
    (["--top-p", "1.5"], "--top-p is 1.5"),
    (["--top-p", "0"], "--top-p is 0.0"),
    (["--temperature", "-1"], "--temperature is -1.0"),
    (["--min-p", "nan"], "--min-p is nan"),
    (["--repetition-penalty", "0"], "--repetition-penalty is 0.0"),
    (["--top-q", "1"], "did you mean"),
    (["--dtype", "float8"], "--dtype"),
    (["--device", "abacus"], "device is 'abacus'"),
    (["--prompt", "a", "--prompt-file", "b"], "not both"),
    (["--prompt-file", "no/such/file"], "no/such/file"),
    (["--prompt-file", "{latin1}"], "not UTF-8"),
    (["--prompt", "\udcff"], "not UTF-8"),
    (["--stop", ""], "stop string is empty"),
    (["--model", "no/such/folder"], "no/such/folder"),
])
def test_mistakes_end_in_one_line(byte_folder, tmp_path, capsys, words, message):
    (tmp_path / "latin1").write_bytes(b"Gr\xfc\xdfe")
    words = [str(tmp_path / "latin1") if word == "{latin1}" else word for word in words]
    with pytest.raises(SystemExit) as stop:
        raise SystemExit(command("--model", byte_folder, "--max-new-tokens", 2, *words))
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error


def test_help_lists_every_option(capsys):
    with pytest.raises(SystemExit) as stop:
        module.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(f"--{name.replace('_', '-')}" in text for name in vars(Settings()) if name != "cache")


@pytest.mark.parametrize("temperature", [1e-310, 9e-7])
def test_a_temperature_that_no_logit_survives_is_refused(temperature):
    with pytest.raises(ValueError, match="must be 0 \\(greedy\\) or at least 1e-6"):
        Settings(temperature=temperature)
