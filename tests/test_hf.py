"""hf.py against transformers (which must read what we write, with equal logits), huggingface_hub and safetensors.

Byte equality where nothing may change; one named ValueError for each way in which a folder can be wrong; memory and the
Hub's cache in processes of their own. NANOCPT_TRANSFORMERS4=folder made by `pip install --target folder
"transformers==4.57.6"` adds a reader of the older dialect.
"""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import hf
import lora
from core.errors import UserError
from core.parameter_names import from_hf_name, to_hf_name
from learn.peft_files import save_adapter
from model import Model

ROOT = Path(__file__).resolve().parent.parent
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
SMOL3 = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
CASES = {
    "llama3": ("llama", {"rope_parameters": LLAMA3}),
    "yarn": ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
                                           "original_max_position_embeddings": 16, "attention_factor": 0.9}}),
    "tied_biases": ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "head_dim": 16}),
    "mistral": ("mistral", {"sliding_window": 7}),
    "mistral_null": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen2_windows": ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen2_beyond": ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 3}),
    "qwen3": ("qwen3", {"head_dim": 24, "attention_bias": True, "use_sliding_window": True, "sliding_window": 6,
                        "max_window_layers": 2}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": ("qwen3_moe", {"head_dim": 16, "num_experts": 6, "num_experts_per_tok": 3,
                                "moe_intermediate_size": 24, "norm_topk_prob": True, "mlp_only_layers": [1]}),
    "smollm3": ("smollm3", {**SMOL3, "no_rope_layers": [1, 0, 1], "use_sliding_window": True, "sliding_window": 5}),
}


@pytest.fixture
def transformers():
    module = pytest.importorskip("transformers", minversion="5", reason="the truth is transformers 5")
    module.utils.logging.disable_progress_bar()
    return module


@pytest.fixture
def folder(tiny_model, tmp_path):
    """A small llama folder of our own writing, to be spoilt."""
    hf.save(tiny_model(), tmp_path / "base")
    return tmp_path / "base"


def tokens(rows=2, length=40):
    return torch.randint(0, 97, (rows, length), generator=torch.Generator().manual_seed(1))


def logits(model, x):
    with torch.no_grad():
        return model.head(model(x))


def greedy(model, x, count):
    for _ in range(count):
        x = torch.cat([x, logits(model, x)[:, -1:].argmax(-1)], dim=1)
    return x


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def same_bytes(a: dict, b: dict):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert a[name].shape == b[name].shape, name
        assert torch.equal(a[name].contiguous().view(torch.uint8), b[name].contiguous().view(torch.uint8)), name


def all_tensors(folder) -> dict:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def python(code: str, *arguments, environment=None, cwd=ROOT):
    """Run `code` in a fresh interpreter with our folder on its path; its stdout."""
    paths = [str(ROOT), *filter(None, [(environment or {}).get("PYTHONPATH")])]
    run = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], cwd=cwd, capture_output=True, text=True,
                         env={**os.environ, **(environment or {}), "PYTHONPATH": os.pathsep.join(paths)}, timeout=120)
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout


# ---- there and back

@pytest.mark.parametrize("name", CASES)
def test_exports_equal_what_was_loaded(hf_model, transformers, tmp_path, name):
    """load, save, load again: the same bytes and config; transformers gets the same logits and greedy tokens."""
    family, options = CASES[name]
    theirs, original = hf_model(family, **options)
    ours = hf.load(original)
    hf.save(ours, tmp_path / "out", base=original)
    again = hf.load(tmp_path / "out")
    same_bytes(all_tensors(original), all_tensors(tmp_path / "out"))
    assert again.config == ours.config
    x = tokens()
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert type(exported) is type(theirs)
    with torch.no_grad():
        assert (exported(x).logits - theirs(x).logits).abs().max() == 0
        assert (exported(x).logits - logits(ours, x)).abs().max() < 1e-4
    new = exported.generate(x[:1, :6], max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert new.tolist() == greedy(ours, x[:1, :6], 12).tolist()


def test_exports_without_a_base_load_in_transformers(tiny_model, transformers, tmp_path):
    model = tiny_model(rope_scaling={k: v for k, v in LLAMA3.items() if k != "rope_theta"}, rope_theta=5e5)
    hf.save(model, tmp_path / "new" / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "new" / "out").eval()
    with torch.no_grad():
        assert (theirs(tokens()).logits - logits(model, tokens())).abs().max() < 1e-4
    assert hf.load(tmp_path / "new" / "out").config == model.config


def test_shards(tiny_model, transformers, tmp_path):
    model = tiny_model()
    hf.save(model, tmp_path / "one")
    hf.save(model, tmp_path / "many", shard_bytes=20_000)
    one, index = all_tensors(tmp_path / "one"), json.loads((tmp_path / "many/model.safetensors.index.json").read_text())
    shards = sorted(file.name for file in (tmp_path / "many").glob("*.safetensors"))
    assert len(shards) > 3
    assert shards == [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    same_bytes(one, all_tensors(tmp_path / "many"))
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in one.values())
    for shard in shards:
        held = load_file(tmp_path / "many" / shard)
        assert {name for name, file in index["weight_map"].items() if file == shard} == set(held)
        assert sum(t.nbytes for t in held.values()) <= 20_000
    assert index["weight_map"].keys() == one.keys()
    same_bytes(model.state_dict(), hf.load(tmp_path / "many").state_dict())
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "many").eval()
    with torch.no_grad():
        assert (theirs(tokens()).logits - logits(model, tokens())).abs().max() < 1e-4


def test_both_dialects_are_written_and_read(hf_model, tmp_path):
    _, original = hf_model("llama", rope_parameters=LLAMA3)
    model = hf.load(original)
    hf.save(model, tmp_path / "out", base=original)
    config = json.loads((tmp_path / "out/config.json").read_text())
    scaling = {key: value for key, value in LLAMA3.items() if key != "rope_theta"}
    assert config["rope_theta"] == 500000.0
    assert config["rope_scaling"] == scaling
    assert config["rope_parameters"] == LLAMA3
    assert config["torch_dtype"] == config["dtype"] == "float32"
    for dialect in (("rope_parameters", "dtype"), ("rope_theta", "rope_scaling", "torch_dtype")):
        old = {key: value for key, value in config.items() if key not in dialect}
        (tmp_path / "out/config.json").write_text(json.dumps(old))
        assert hf.open_base(tmp_path / "out").config == model.config


def test_oldest_rope_key(folder):
    """`type` was the name before `rope_type`; a plain model writes null and has no scaling."""
    assert json.loads((folder / "config.json").read_text())["rope_scaling"] is None
    edit_json(folder / "config.json", rope_parameters=None, rope_scaling={"type": "linear", "factor": 2.0})
    assert hf.open_base(folder).config.rope_scaling == {"rope_type": "linear", "factor": 2.0}


def test_keys_of_the_base_survive(hf_model, tmp_path):
    _, original = hf_model("llama", bos_token_id=5, eos_token_id=[6, 7])
    edit_json(original / "config.json", something_of_theirs={"a": 1})
    hf.save(hf.load(original), tmp_path / "out", base=original)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["something_of_theirs"] == {"a": 1}
    assert (config["bos_token_id"], config["eos_token_id"]) == (5, [6, 7])


@pytest.mark.slow
def test_transformers_4_reads_the_old_dialect(hf_model, tmp_path):
    """A reader that knows neither `rope_parameters` nor `dtype`, and has a layer per expert, gets the same logits; and
    so does PEFT there from our adapters on experts."""
    older = os.environ.get("NANOCPT_TRANSFORMERS4")
    if not older:
        pytest.skip("NANOCPT_TRANSFORMERS4 is not set; see the top of this file")
    expected = {}
    for name in ("llama3", "yarn", "mistral", "qwen2_windows", "qwen3", "smollm3", "mixtral", "qwen3_moe"):
        family, options = CASES[name]
        _, original = hf_model(family, **options)
        model = hf.load(original)
        hf.save(model, tmp_path / f"out_{name}", base=original)
        expected[name] = logits(model, tokens())
        if model.config.num_experts:
            lora.attach(model, lora.LoraConfig(rank=3, rslora=True), seed=0)
            with torch.no_grad():
                for p in model.parameters():
                    if p.requires_grad:
                        p += 0.1
                expected[f"{name}/adapter"] = logits(model, tokens())
            save_adapter(model, tmp_path / f"out_{name}/adapter", str(original))
    save_file({"x": tokens(), **expected}, tmp_path / "expected.safetensors")
    code = """if True:
        import sys, peft, torch, transformers
        from safetensors.torch import load_file
        assert transformers.__version__.startswith("4."), transformers.__version__
        folder = sys.argv[1]
        truth = load_file(folder + "/expected.safetensors")
        x = truth.pop("x")
        for name, logits in truth.items():
            base, _, adapter = name.partition("/")
            model = transformers.AutoModelForCausalLM.from_pretrained(folder + "/out_" + base).eval()
            assert model.dtype == torch.float32, model.dtype
            if adapter:
                model = peft.PeftModel.from_pretrained(model, folder + "/out_" + name).eval()
            with torch.no_grad():
                print(name, (model(x).logits - logits).abs().max().item())
    """
    rows = python(code, tmp_path, environment={"PYTHONPATH": older}, cwd=tmp_path).split("\n")
    errors = dict(row.split() for row in rows if row)
    assert errors.keys() == expected.keys()
    assert all(float(error) < 1e-4 * max(1, expected[name].abs().max()) for name, error in errors.items()), errors


@pytest.mark.slow
def test_transformers_and_our_kernels_folder_share_a_root():
    """transformers looks for a package named `kernels` and, run from our root, finds ours."""
    code = """if True:
        import torch, kernels, transformers
        assert kernels.rmsnorm and kernels.__version__
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=9, hidden_size=8,
            intermediate_size=8, num_hidden_layers=1, num_attention_heads=2))
        model(torch.tensor([[1, 2]]), labels=torch.tensor([[1, 2]])).loss.backward()
        print(kernels.__file__)
    """
    assert Path(python(code).strip().split("\n")[-1]).parent == ROOT / "kernels"


# ---- dtypes, other files, other formats

@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(folder, tmp_path, stored, wanted):
    tensors = {name: t.to(stored) for name, t in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model = hf.load(folder, dtype=wanted)
    hf.save(model, tmp_path / "out", base=folder)
    same_bytes({name: t.to(wanted) for name, t in tensors.items()}, all_tensors(tmp_path / "out"))
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["torch_dtype"] == config["dtype"] == str(wanted).removeprefix("torch.")
    assert all(p.requires_grad and p.is_leaf and p.dtype == wanted for p in model.parameters())


def test_float32_is_the_default(folder):
    tensors = {name: t.bfloat16() for name, t in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors")
    assert hf.load(folder).embed_tokens.weight.dtype == torch.float32


def test_tokenizer_and_licence_files_are_copied_byte_for_byte(folder, tmp_path):
    files = {"tokenizer.json": b'{"a":\r\n 1}', "tokenizer.model": bytes(range(256)), "tokenizer_config.json": b"{}",
             "special_tokens_map.json": b"{ }", "added_tokens.json": b"[]", "vocab.json": b"{}\n",
             "merges.txt": b"\xc4", "chat_template.jinja": b"{{x}}", "LICENSE": b"\xff", "LICENSE.txt": b"L",
             "NOTICE": b"N", "USE_POLICY.md": b"U"}
    for name, content in files.items():
        (folder / name).write_bytes(content)
    (folder / "training_args.bin").write_bytes(b"not ours to hand on")
    hf.save(hf.load(folder), tmp_path / "out", base=folder)
    for name, content in files.items():
        assert (tmp_path / "out" / name).read_bytes() == content, name
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(
        [*files, "config.json", "generation_config.json", "model.safetensors", "README.md"])


@pytest.mark.parametrize(("given", "written"), [
    ("", {"tokenizer.json": "j", "tokenizer.model": "m", "tokenizer_config.json": "c"}),
    ("tokenizer.model", {"tokenizer.model": "m", "tokenizer_config.json": "c"}),
    ("tokenizer.json", {"tokenizer.json": "j", "tokenizer_config.json": "c"}),
    ("own.model", {"tokenizer.model": "o", "tokenizer_config.json": "c"}),
])
def test_another_tokenizer_takes_the_place_of_the_bases(folder, tmp_path, given, written):
    """Two vocabularies in one folder would be two tokenizers: which one a reader takes is then its own affair."""
    for name in ("tokenizer.json", "added_tokens.json", "merges.txt", "vocab.json", "LICENSE"):
        (folder / name).write_text("of the base")
    (tmp_path / "other").mkdir()
    for name, text in {"tokenizer.json": "j", "tokenizer.model": "m", "own.model": "o", "tokenizer_config.json": "c",
                       "LICENSE": "of the tokenizer"}.items():
        (tmp_path / "other" / name).write_text(text)
    hf.save(hf.load(folder), tmp_path / "out", base=folder, tokenizer=tmp_path / "other" / given)
    found = {file.name: file.read_text() for file in (tmp_path / "out").iterdir() if file.suffix != ".safetensors"}
    for name in ("config.json", "generation_config.json", "README.md"):
        del found[name]
    assert found == {**written, "LICENSE": "of the base"}


def test_a_byte_pair_tokenizer_in_two_files_stays_together(folder, tmp_path):
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_text(name)
    hf.save(hf.load(folder), tmp_path / "out", base=folder, tokenizer=tmp_path / "vocab.json")
    for name in ("vocab.json", "merges.txt"):
        assert (tmp_path / "out" / name).read_text() == name


def test_generation_config_has_no_sampling_values(folder, tmp_path):
    (folder / "generation_config.json").write_text(json.dumps(
        {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "max_length": 4096, "bos_token_id": 1,
         "eos_token_id": [2, 3], "pad_token_id": 0}))
    hf.save(hf.load(folder), tmp_path / "out", base=folder)
    written = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert written == {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": 0}


def test_model_card(folder, tmp_path):
    from huggingface_hub import ModelCard

    (folder / "README.md").write_text("---\nlicense: llama3.1\ntags: [x]\n---\n# Base\n", encoding="utf-8")
    hf.save(hf.load(folder), tmp_path / "out", base=folder, card="| before | after |\n|---|---|\n| 1.5 é | 1.2 |")
    card = ModelCard.load(tmp_path / "out/README.md")                    # huggingface_hub's reader of the front matter
    assert card.data.license == "llama3.1"
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.tags == ["continued-pretraining"]
    assert card.data.base_model is None                                  # a local folder is no id on the Hub
    assert "| 1.5 é | 1.2 |" in card.text
    assert "`base`" in card.text
    hf.save(hf.load(folder), tmp_path / "scratch")
    assert "from scratch" in ModelCard.load(tmp_path / "scratch/README.md").text


def test_the_fingerprint_sees_every_byte_of_a_small_file_and_64_pieces_of_a_large_one(tmp_path):
    """One byte changes, at the same size: in the header, in the data, at the end."""
    size, step = 3_000_000, 1_500_000
    found = set()
    for changed in (None, *range(0, size, step), size - 1):
        weights = torch.zeros(size, dtype=torch.uint8)
        if changed is not None:
            weights[changed] = 1
        save_file({"a": weights}, tmp_path / "model.safetensors")
        found.add(hf.Base("x", tmp_path, None).fingerprint)
    assert len(found) == 4
    # 190 MB, of which most takes no room on the disk. Pieces begin every 3 MB.
    os.truncate(file := tmp_path / "model.safetensors", large := 190 << 20)
    head = {"a": {"dtype": "U8", "shape": [large - 108], "data_offsets": [0, large - 108]}}
    for changed in (None, *(place << 20 for place in (3, 93, 189))):
        with open(file, "r+b") as opened:
            opened.write((100).to_bytes(8, "little") + json.dumps(head).ljust(100).encode())
            opened.seek(changed or 0)
            opened.write(b"\1" * (changed is not None))
        found.add(hf.Base("x", tmp_path, None).fingerprint)
    assert len(found) == 8


def test_only_the_folders_own_files_are_copied(folder, tiny_model, tmp_path):
    """A folder of licences is no licence; a link out of the folder is refused when the base is opened, which is before
    a training, and not hours later by its export."""
    (folder / "LICENSES").mkdir()
    (folder / "LICENSES/MIT.txt").write_text("MIT")
    (folder / "LICENSE").write_text("MIT")
    (folder / "NOTICE.txt").symlink_to("LICENSE")
    assert hf.open_base(folder).facts["license"] == "see LICENSE"
    hf.save(tiny_model(), tmp_path / "out", base=folder)
    assert (tmp_path / "out/NOTICE.txt").read_text() == "MIT"
    assert not (tmp_path / "out/NOTICE.txt").is_symlink()
    assert not (tmp_path / "out/LICENSES").exists()
    (folder / "NOTICE").symlink_to("/etc/passwd")
    with pytest.raises(UserError, match="NOTICE is a link to /etc/passwd, outside of its folder"):
        hf.open_base(folder)


def test_no_key_of_a_config_makes_its_reader_fetch_code(folder, tiny_model, tmp_path):
    edit_json(folder / "config.json", auto_map={"AutoModel": "evil--x.Y"}, _attn_implementation_internal="evil/kernel",
              _experts_implementation="evil/kernel", custom_pipelines={}, theirs=1)
    hf.save(tiny_model(), tmp_path / "out", base=folder)
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert written["theirs"] == 1
    assert not [key for key in written if key.startswith("_") or key in ("auto_map", "custom_pipelines")]


def test_no_memory_is_taken_for_what_the_files_do_not_hold(folder, monkeypatch):
    """A config.json that asks for 10^12 elements and more is refused by the files' headers."""
    monkeypatch.setattr(torch.nn.Module, "to_empty", lambda *_, **__: pytest.fail("memory was taken"))
    edit_json(folder / "config.json", hidden_size=1 << 20, intermediate_size=1 << 20)
    with pytest.raises(UserError, match=r"has shape \[97, 32\], but config.json makes it \[97, 1048576\]"):
        hf.load(folder)


def test_two_names_of_one_tensor_are_refused(folder):
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "norm.weight": weights["model.norm.weight"] + 1}, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"holds one tensor twice, as (model\.)?norm\.weight, (model\.)?norm\.weight"):
        hf.load(folder)


def test_facts(folder):
    assert hf.open_base(folder).facts == {"license": "not stated", "chat_template": False}
    (folder / "LICENSE.txt").write_text("...")
    (folder / "tokenizer_config.json").write_text('{"chat_template": "{{messages}}"}')
    assert hf.open_base(folder).facts == {"license": "see LICENSE.txt", "chat_template": True}
    (folder / "tokenizer_config.json").unlink()
    (folder / "chat_template.jinja").write_text("{{messages}}")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    assert hf.open_base(folder).facts == {"license": "apache-2.0", "chat_template": True}


def test_save_replaces_whole_or_not_at_all(folder, tiny_model, monkeypatch):
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    monkeypatch.setattr(hf, "make_card", lambda *_: 1 / 0)                     # fails after the tensors were written
    with pytest.raises(ZeroDivisionError):
        hf.save(tiny_model(seed=5), folder, base=folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert [file.name for file in folder.parent.iterdir()] == ["base"]           # nothing left beside it
    monkeypatch.undo()
    (folder / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match=r"holds 'thesis\.txt', which is no part of a model folder"):
        hf.save(tiny_model(seed=5), folder, base=folder)
    (folder / "thesis.txt").rename(folder / "model-00001-of-00002.safetensors")
    hf.save(tiny_model(seed=5), folder, base=folder)
    assert not (folder / "model-00001-of-00002.safetensors").exists()
    same_bytes(hf.load(folder).state_dict(), tiny_model(seed=5).state_dict())
    assert [file.name for file in folder.parent.iterdir()] == ["base"]


def test_state_is_written_instead_of_the_parameters(tiny_model, tmp_path):
    model, other = tiny_model(), tiny_model(seed=3)
    hf.save(model, tmp_path / "out", state=other.state_dict())
    same_bytes(hf.load(tmp_path / "out").state_dict(), other.state_dict())


def test_fill_writes_into_parameters_that_are_already_laid_out(folder, tiny_model):
    """With `layout` the parameters stay the same objects; it is given each full tensor and its parameter."""
    model, truth, seen = tiny_model(seed=9), hf.load(folder).state_dict(), []
    before = dict(model.named_parameters())

    def layout(full, parameter):
        seen.append(full.shape == parameter.shape)
        return full

    hf.fill(model, folder, layout=layout)
    same_bytes(model.state_dict(), truth)
    assert seen == [True] * len(before)
    assert all(parameter is before[name] for name, parameter in model.named_parameters())


@pytest.mark.parametrize("sharded", [False, True])
def test_pytorch_bin_loads(folder, sharded):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if sharded:
        names = sorted(tensors)
        parts = {"pytorch_model-00001-of-00002.bin": names[:9], "pytorch_model-00002-of-00002.bin": names[9:]}
        for file, part in parts.items():
            torch.save({name: tensors[name] for name in part}, folder / file)
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(
            {"metadata": {}, "weight_map": {name: file for file, part in parts.items() for name in part}}))
    else:
        torch.save(tensors, folder / "pytorch_model.bin")
    loaded = hf.load(folder)
    same_bytes({to_hf_name(name): p.detach() for name, p in loaded.named_parameters()}, tensors)
    for file in folder.glob("pytorch_model*.bin"):                    # the tensors own their memory, not the file's
        file.write_bytes(b"\0" * file.stat().st_size)
    assert torch.equal(loaded.norm.weight, tensors["model.norm.weight"])


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


@pytest.mark.parametrize("wrapped", ["zip", "bare"])
def test_malicious_pickle_is_refused_unrun(folder, tmp_path, wrapped):
    (folder / "model.safetensors").unlink()
    if wrapped == "zip":
        torch.save({"model.norm.weight": Bomb(str(tmp_path / "boom"))}, folder / "pytorch_model.bin")
    else:
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(str(tmp_path / "boom")), protocol=2))
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is (refused|damaged)"):
        hf.load(folder)
    assert not (tmp_path / "boom").exists()
    pickle.loads(pickle.dumps(Bomb(str(tmp_path / "boom"))))          # the bomb does go off where it is unpickled
    assert (tmp_path / "boom").exists()


def test_old_rotary_tensors_are_ignored(folder):
    tensors = load_file(folder / "model.safetensors")
    for layer in range(3):
        tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, folder / "model.safetensors")
    assert hf.load(folder).count_parameters() == sum(t.numel() for name, t in tensors.items() if "rotary" not in name)


def test_old_angle_buffers_are_ignored(folder):
    truth, tensors = hf.load(folder).state_dict(), load_file(folder / "model.safetensors")
    for name in ("model.layers.0.self_attn.rotary_emb.cos_cached", "model.layers.0.self_attn.rotary_emb.sin_cached",
                 "model.rotary_emb.inv_freq", "model.rotary_emb.original_inv_freq"):
        tensors[name] = torch.ones(4)
    save_file(tensors, folder / "model.safetensors")
    same_bytes(hf.load(folder).state_dict(), truth)


def test_an_index_may_name_a_tied_head_that_no_file_holds(tiny_model, tmp_path):
    model = tiny_model(tie_word_embeddings=True)
    hf.save(model, tmp_path / "out", shard_bytes=20_000)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    index["weight_map"]["lm_head.weight"] = index["weight_map"]["model.norm.weight"]
    (tmp_path / "out/model.safetensors.index.json").write_text(json.dumps(index))
    same_bytes(hf.load(tmp_path / "out").state_dict(), model.state_dict())
    edit_json(tmp_path / "out/config.json", tie_word_embeddings=False)
    with pytest.raises(ValueError, match=r"lacks tensors the model needs, among them lm_head\.weight$"):
        hf.load(tmp_path / "out")


def test_two_models_in_one_folder_are_refused(tiny_model, folder):
    """transformers takes the single file, other readers the index, and neither says so."""
    shutil.copytree(folder, folder.parent / "sharded")
    hf.save(tiny_model(seed=3), folder.parent / "sharded", shard_bytes=20_000)
    for file in (folder.parent / "sharded").glob("model*"):
        shutil.copy(file, folder)
    with pytest.raises(ValueError, match=r"model\.safetensors and model\.safetensors\.index\.json, .* two models"):
        hf.load(folder)
    (folder / "model.safetensors").unlink()
    same_bytes(hf.load(folder).state_dict(), tiny_model(seed=3).state_dict())


def test_a_bin_of_the_oldest_format_loads(folder):
    truth, tensors = hf.load(folder).state_dict(), load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    same_bytes(hf.load(folder).state_dict(), truth)
    assert len(hf.open_base(folder).fingerprint) == 16


@pytest.mark.parametrize("content", [{"state_dict": {"model.norm.weight": torch.ones(32)}}, [torch.ones(2)], {"a": 1}])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_bin_that_is_no_table_of_tensors_is_refused(folder, content, zipped):
    (folder / "model.safetensors").unlink()
    torch.save(content, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is refused, it holds more than tensors"):
        hf.load(folder)


@pytest.mark.parametrize("change", [
    lambda name, tensor: {name: tensor.to(torch.int8), name.replace("weight", "SCB"): torch.ones(1)},
    lambda name, tensor: {name.replace("weight", "qweight"): tensor.int()},
    lambda name, tensor: {name: tensor.to(torch.uint8)},
    lambda name, tensor: {name: tensor.to(torch.float8_e4m3fn), f"{name}_scale_inv": torch.ones(1)},
])
def test_quantised_weights_are_called_so(folder, change):
    edit_json(folder / "config.json", quantization_config={"quant_method": "any"})
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        tensors |= change(name, tensor) if "_proj" in name else {name: tensor}
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"quantised weights.*[;:] take the full-precision model"):
        hf.load(folder)


def test_tied_head_stored_twice_loads(tiny_model, tmp_path):
    """Some exporters store lm_head beside the embedding although they are one; equal numbers are welcome."""
    hf.save(tiny_model(tie_word_embeddings=True), tmp_path / "out")
    tensors = load_file(tmp_path / "out/model.safetensors")
    assert "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "out/model.safetensors")
    model = hf.load(tmp_path / "out")
    assert model.head.weight is model.embed_tokens.weight
    tensors["lm_head.weight"][3, 4] += 1
    save_file(tensors, tmp_path / "out/model.safetensors")
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from .*; set tie_word_embeddings to false"):
        hf.load(tmp_path / "out")


def test_names_are_a_bijection(tiny_model):
    for name, _ in tiny_model(qk_norm=True, attention_bias=True, mlp_bias=True).named_parameters():
        assert from_hf_name(to_hf_name(name)) == name


# ---- what is wrong is said in one line

def drop(folder, tensors):
    del tensors["model.layers.1.mlp.up_proj.weight"]


def add(folder, tensors):
    tensors["model.layers.9.extra.weight"] = torch.ones(2)


def reshape(folder, tensors):
    tensors["model.norm.weight"] = torch.ones(33)


@pytest.mark.parametrize(("spoil", "message"), [
    (drop, r"lacks tensors the model needs, among them model\.layers\.1\.mlp\.up_proj\.weight"),
    (add, r"tensors this model has no place for, among them model\.layers\.9\.extra\.weight"),
    (reshape, r"model\.norm\.weight in .*model\.safetensors has shape \[33\], but config\.json makes it \[32\]"),
])
def test_wrong_tensors_are_named(folder, spoil, message):
    tensors = load_file(folder / "model.safetensors")
    spoil(folder, tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        hf.load(folder)


def test_many_missing_tensors_are_counted(folder):
    save_file({"model.norm.weight": torch.ones(32)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"lacks .*embed_tokens.* and 24 more"):
        hf.load(folder)


@pytest.mark.parametrize("length", [0, 4, 100, -1, -1000])
def test_truncated_files_are_named(folder, length):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged or cut short"):
        hf.load(folder)


@pytest.mark.parametrize("length", [0, 100, -100])
def test_truncated_pickles_are_named(folder, length):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    file = folder / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is"):
        hf.load(folder)


@pytest.mark.parametrize(("changes", "message"), [
    ({"model_type": "falcon"}, "'falcon', which is not supported; .*Falcon3 are llama"),
    ({"model_type": "bert"}, r"'bert', which is not supported; known are llama, mistral, qwen2, qwen3, mixtral"),
    ({"model_type": "mixtral", "num_local_experts": 1 << 20}, "1,048,576 experts in each of 3 layers; at most"),
    ({"model_type": None}, "None, which is not supported"),
    ({"hidden_act": "gelu"}, "hidden_act 'gelu'; only silu"),
    ({"hidden_size": None}, "no usable hidden_size"),
    ({"num_hidden_layers": None, "vocab_size": None}, "no usable vocab_size, num_hidden_layers"),
    ({"num_hidden_layers": 0}, "num_hidden_layers 0, but it must be a whole number at least 1 and at most 1,000"),
    ({"rope_parameters": {"rope_type": "linear", "factor": None}}, "'linear' needs factor"),
    ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0}},
     "low_freq_factor 4.0, but it must be below high_freq_factor 4.0"),
    ({"rope_parameters": {"rope_type": "dynamic", "factor": 8.0}, "head_dim": 2}, "'dynamic' needs a head_dim above 2"),
    ({"rope_parameters": {"rope_type": "longrope"}}, "'longrope' needs short_factor, long_factor"),
    ({"rope_parameters": {"rope_type": "proportional"}}, "rope_type 'proportional' is not known"),
    ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "'llama3' needs low_freq_factor, high_freq_factor"),
    ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "by layer type"),
    ({"num_attention_heads": 5, "head_dim": None}, "hidden_size 32 is not a multiple of num_attention_heads 5"),
])
def test_unusable_configs_say_why(folder, changes, message):
    edit_json(folder / "config.json", **changes)
    with pytest.raises(ValueError, match=message):
        hf.load(folder)


@pytest.mark.parametrize(("content", "message"), [
    (None, "config.json does not exist"), ("{", "is not valid JSON"), ("[]", "holds a list, not an object"),
    ('{"a": "\udcff"}', "is not valid JSON"),
])
def test_broken_config_files_say_why(folder, content, message):
    if content is None:
        (folder / "config.json").unlink()
    else:
        (folder / "config.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=message):
        hf.load(folder)


@pytest.mark.parametrize("outside", ["../secret.safetensors", "..", "/etc/secret.safetensors", "a/b.safetensors"])
def test_an_index_cannot_point_outside_its_folder(folder, outside):
    shutil.copy(folder / "model.safetensors", folder.parent / "secret.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": outside}}))
    with pytest.raises(ValueError, match="points outside its folder: '" + re.escape(outside)):
        hf.load(folder)


@pytest.mark.parametrize(("index", "message"), [
    ({"weight_map": {"model.norm.weight": "gone.safetensors"}}, r"names gone\.safetensors, which is missing"),
    ({"weight_map": {"model.nowhere.weight": "model.safetensors"}}, r"does not hold model\.nowhere\.weight, though"),
    ({"metadata": {}}, "has no weight_map"),
    ({"weight_map": {"model.norm.weight": 3}}, "has no weight_map"),
])
def test_broken_indices_say_why(folder, index, message):
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    if "gone" in message:
        (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=message):
        hf.load(folder)


def test_an_index_that_promises_too_much(folder):
    tensors = load_file(folder / "model.safetensors")
    lost = "model.layers.0.mlp.up_proj.weight"
    save_file({name: t for name, t in tensors.items() if name != lost}, folder / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(
        {"weight_map": dict.fromkeys(tensors, "model.safetensors")}))
    with pytest.raises(ValueError, match=rf"model\.safetensors does not hold {re.escape(lost)}"):
        hf.load(folder)


def test_missing_folders_and_files(folder, tmp_path):
    with pytest.raises(ValueError, match=r"model folder .*nowhere does not exist; give .* hf://org/name"):
        hf.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="does not exist"):
        hf.load(folder / "config.json")                                 # a file is no folder
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"holds no model\.safetensors, no index of one and no pytorch_model\.bin"):
        hf.load(folder)


# ---- the Hub's cache

def test_hub_ids_come_from_the_cache(tiny_model, tmp_path, monkeypatch):
    """A cache as huggingface_hub lays it out: two revisions, a branch, and an id that nobody fetched."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--org--name"
    new, old = "a" * 40, "b" * 40
    for revision, seed in ((new, 0), (old, 7)):
        hf.save(tiny_model(seed=seed), repository / "snapshots" / revision)
        (repository / "snapshots" / revision / "tokenizer.model").write_bytes(revision.encode())
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(new)
    (repository / "refs/v1").write_text(old)
    assert hf.open_base("hf://org/name").folder.name == new
    for name in ("hf://org/name@v1", f"hf://org/name@{old}"):
        assert hf.open_base(name).folder.name == old
    for name in ("hf://org/absent", "hf://org/name@v2", "hf://not an/id/at all"):
        with pytest.raises(ValueError, match=f"^{name} could not be fetched from the Hub and is not in its cache: .+$"):
            hf.load(name)
    hf.save(hf.load("hf://org/name@v1"), tmp_path / "out", base="hf://org/name@v1")
    same_bytes(hf.load(tmp_path / "out").state_dict(), tiny_model(seed=7).state_dict())
    assert (tmp_path / "out/tokenizer.model").read_bytes() == old.encode()
    assert "base_model: org/name\nbase_model_relation: finetune\n" in (tmp_path / "out/README.md").read_text()


def test_a_base_is_one_commit_though_its_branch_moves(tiny_model, tmp_path, monkeypatch):
    """The second question to the Hub, for pytorch_model.bin, is about the commit of the first; ranks share a commit."""
    import huggingface_hub

    commits, asked = ["a" * 40, "b" * 40], []

    def download(name, revision, allow_patterns):
        asked.append((name, revision))
        folder = tmp_path / "snapshots" / (commits[len(asked) - 1] if revision in (None, "main") else revision)
        hf.save(tiny_model(), folder)
        if "*.safetensors" in allow_patterns:
            (folder / "model.safetensors").unlink()
        return str(folder)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    base = hf.open_base("hf://org/name@main")
    assert asked == [("org/name", "main"), ("org/name", "a" * 40)]
    assert (base.folder.name, base.revision, str(base)) == ("a" * 40, "a" * 40, "hf://org/name@main")
    asked.clear()
    assert hf.open_base("hf://org/name@" + "c" * 40).revision == "c" * 40
    assert {revision for _, revision in asked} == {"c" * 40}
    asked.clear()
    hf.load(base)
    hf.save(tiny_model(), tmp_path / "out", base=base)
    assert hf.open_base(base).folder == base.folder
    assert not asked
    assert "base_model: org/name\n" in (tmp_path / "out/README.md").read_text()
    assert hf.open_base(tmp_path / "out").revision is None


# ---- memory

@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads a process's peak memory from /proc")
def test_peak_memory_of_loading(tiny_config, tmp_path):
    """At most 1.2 times the weights that loading leaves behind, in the stored dtype and in half of it.

    A small model is loaded first: what torch imports on the way is no cost of the weights.
    """
    config = tiny_config(vocab_size=4000, hidden_size=512, intermediate_size=1376, num_hidden_layers=16)
    model = Model(config)
    for parameter in model.parameters():
        parameter.data.uniform_(-1, 1)
    hf.save(model, tmp_path / "big", shard_bytes=150 * 10**6)
    hf.save(Model(tiny_config()), tmp_path / "small")
    assert model.count_parameters() * 4 > 200e6
    code = """if True:
        import sys, torch, hf
        def memory(key):
            rows = open("/proc/self/status").read().split("\\n")
            return 1024 * int(next(row for row in rows if row.startswith(key)).split()[1])
        dtype = getattr(torch, sys.argv[2])
        hf.load(sys.argv[1] + "/small", dtype=dtype)
        before = memory("VmRSS")
        model = hf.load(sys.argv[1] + "/big", dtype=dtype)
        print(memory("VmHWM") - before)
    """
    for dtype, size in (("float32", 4), ("bfloat16", 2)):
        ratio = int(python(code, tmp_path, dtype)) / (size * model.count_parameters())
        assert 0.95 < ratio < 1.2, (dtype, ratio)
    shutil.rmtree(tmp_path / "big")
