"""Benchmarks under a model. Truth: lm-evaluation-harness over transformers on the same files; a planted answer key;
chance; intervals of published tables."""

import csv
import json
import math
import random
from dataclasses import replace
from statistics import NormalDist

import lm_harness
import pytest
import torch
from synthetic import Bytes

import eval as evaluation
import hf
import tokenizer as tokenizers
from measure import retention, tasks
from measure.task_list import MMLU, OWN, TASKS, Item, cut_pages
from measure.tasks import TaskSettings, load_items, open_tasks, score_tasks

pytestmark = pytest.mark.usefixtures("one_thread")
BENCH = {"arc_easy": "jsonl/arc_easy.jsonl", "arc_challenge": "jsonl/arc_challenge.jsonl", "piqa": "jsonl/piqa.jsonl",
         "boolq": "jsonl/boolq.jsonl", "winogrande": "jsonl/winogrande.jsonl",
         "hellaswag": "hellaswag/hellaswag_val_1000.jsonl"}
FILES = BENCH | {"lambada": "jsonl/lambada_openai.jsonl", "triviaqa": "jsonl/triviaqa_sm_sub.jsonl",
                 "gsm8k": "gsm8k/test.jsonl"}
ASK = {"doc_to_text": "{{query}}\nAnswer:", "doc_to_choice": "{{choices}}", "doc_to_target": "{{gold}}"}


def make_questions(n: int, choices: int = 4, seed: int = 0) -> list[dict]:
    rng = random.Random(seed)
    words = ["lien", "court", "the", "a", "story", "plaintiff", "who", "ran", "home", "again"]
    return [{"query": " ".join(rng.choices(words, k=rng.randint(2, 9))) + rng.choice(["?", " is ", ""]),
             "choices": [" ".join(rng.choices(words, k=rng.randint(1, 4))) + "é" * rng.randint(0, 2)
                         for _ in range(choices)], "gold": rng.randrange(choices)} for _ in range(n)]


def assert_equal(found: dict, truth: dict):
    """Each metric that lm-evaluation-harness has."""
    metrics = {key: value for key, value in truth.items() if not key.endswith("_stderr") and key in found}
    assert metrics
    assert {key: found[key] for key in metrics} == pytest.approx(metrics, rel=1e-6, abs=1e-9)


# What lm-evaluation-harness' own tasks say of how they are asked; the files are llm-foundry's and the authors'.
def harness_tasks() -> dict[str, dict]:
    from lm_eval.tasks.hellaswag import utils as hellaswag
    from lm_eval.tasks.wikitext import preprocess_wikitext as wikitext
    acc = {"metric_list": [{"metric": "acc"}]}
    choice = lm_harness.CHOICE | ASK
    exact = {"output_type": "generate_until", "metric_list": [
        {"metric": "exact_match", "ignore_case": True, "ignore_punctuation": True}]}
    return {
        "own": choice | {"doc_to_text": "{{query}}"}, "arc_easy": choice, "arc_challenge": choice,
        "piqa": choice | {"doc_to_text": "{{query}}Answer:"},
        "boolq": choice | acc | {"doc_to_text": "{{query[9:]}}\nAnswer:"},
        "hellaswag": choice | {"process_docs": hellaswag.process_docs, "doc_to_text": "{{query}}"},
        "winogrande": choice | acc | {"doc_to_text": lambda r: r["gold"], "doc_to_choice": lambda r: r[
            "context_options"], "doc_to_target": lambda r: r["continuation"]},
        "mmlu_anatomy": choice | acc | {
            "description": "The following are multiple choice questions (with answers) about anatomy.\n\n",
            "doc_to_text": "{{question.strip()}}\nA. {{A}}\nB. {{B}}\nC. {{C}}\nD. {{D}}\nAnswer:",
            "doc_to_choice": list("ABCD"), "doc_to_target": "{{'ABCD'.index(answer)}}"},
        "lambada": {"output_type": "loglikelihood", "doc_to_text": "{{context}}",
                    "doc_to_target": "{{' '+continuation}}", "metric_list": [
                        {"metric": "perplexity"}, {"metric": "acc"}]},
        "wikitext": {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target":
                     wikitext.wikitext_detokenizer, "process_results": wikitext.process_results, "metric_list": [
                         {"metric": metric} for metric in ("word_perplexity", "byte_perplexity", "bits_per_byte")]},
        "pubmedqa": choice | acc | {
            "doc_to_text": lambda r: "Abstract: {}\nQuestion: {}\nAnswer:".format("\n".join(r["CONTEXTS"]),
                                                                                 r["QUESTION"]),
            "doc_to_choice": ["yes", "no", "maybe"], "doc_to_target": "final_decision"},
        "triviaqa": exact | {
            "doc_to_text": "{{context}}", "doc_to_target": lambda r: [r["answer"], *r["aliases"]],
            "generation_kwargs": {"until": ["\n", ".", ","], "do_sample": False, "max_gen_toks": 32}, "filter_list": [
                    {"name": "none", "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]}]},
        "gsm8k": {
            "output_type": "generate_until", "doc_to_text": "Question: {{question}}\nAnswer:",
            "doc_to_target": "{{answer}}", "generation_kwargs": {
                "until": ["Question:", "</s>", "<|im_end|>"], "do_sample": False},
            "metric_list": [{"metric": "exact_match", "ignore_case": True, "ignore_punctuation": False,
                             "regexes_to_ignore": [",", "\\$", "(?s).*#### ", "\\.$"]}],
            "filter_list": [{"name": "none", "filter": [
                {"function": "regex", "group_select": -1, "regex_pattern": "(-?[$0-9.,]{2,})|(-?[0-9]+)"},
                {"function": "take_first"}]}]}}


def test_scores_are_those_of_the_harness(hf_model, tmp_path):
    """A small random Llama: choices, one continuation, whole texts."""
    theirs, folder = hf_model("llama", vocab_size=259, max_position_embeddings=60)
    questions = make_questions(16)
    files = {name: lm_harness.write_lines(tmp_path / f"{name}.jsonl", records) for name, records in (
        ("own", questions),
        ("lambada", [{"context": q["query"], "continuation": q["choices"][0][:3]} for q in questions]),
        ("wikitext", [{"page": f" = {q['query']} = \n A ( {' , '.join(q['choices'])} ) 's @-@ N \n"}
                      for q in questions]))}
    tok = Bytes(add_bos=True)
    lm = lm_harness.make_lm(theirs, lambda text: list(text.encode()), tok.decode, tok.bos_id, 60)
    wanted = {name: harness_tasks()[name] | {"file": file} for name, file in files.items()}
    # Of a whole text the harness scores BOS too, behind another BOS, where its tokenizer writes one.
    rolling = wanted.pop("wikitext")
    truth, answers = lm_harness.score(lm, wanted)
    lm.add_bos = False
    truth |= lm_harness.score(lm, {"wikitext": rolling})[0]
    model, opened = hf.load(folder), open_tasks({name: TaskSettings(str(file)) for name, file in files.items()})
    for batch_size in (1, 32):
        found = score_tasks(model, tok, opened, batch_size=batch_size)
        for name in files:
            assert_equal(found[name], truth[name])
    # Some were longer than the context.
    assert found["own"]["cut"] > 0
    ours = tasks.log_likelihoods(model, tasks.make_requests(tok, "own", *opened["own"]))[0]
    assert [nats for own in ours for nats, _ in own] == pytest.approx(
        [nats for own in answers["own"] for nats, _ in own], rel=1e-5)


def test_a_planted_answer_key_scores_one(tiny_model, monkeypatch):
    """The right choice is the likeliest of every item, then the least likely; a model of equal logits is at chance."""
    items = [Item(q["query"] + ":", tuple(q["choices"]), q["gold"]) for q in make_questions(30)]
    model, tok = tiny_model(vocab_size=259, max_position_embeddings=256), Bytes()
    answers = tasks.log_likelihoods(model, tasks.make_requests(tok, "own", OWN, items))[0]
    for choose, value in ((max, 1.0), (min, 0.0)):
        planted = [replace(item, gold=own.index(choose(own))) for item, own in zip(items, answers)]
        found = score_tasks(model, tok, {"own": (OWN, planted)})["own"]
        assert (found["acc"], found["hits"]) == (value, str(int(value)) * 30)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    items = [replace(item, choices=tuple(f"{i}{choice[:3]:3}" for i, choice in enumerate("abcd")), gold=k % 4)
             for k, item in enumerate(items)]
    found = score_tasks(model, tok, {"own": (OWN, items)})["own"]
    # Equal choices: the first is taken, which is right in a quarter of the items.
    assert found["acc"] == pytest.approx(0.25, abs=0.05) == found["chance"] == 0.25


def test_chance_scores_chance(tiny_model):
    """Random items: within what the binomial distribution gives in all but one of 10,000 cases."""
    items = [Item(q["query"], tuple(q["choices"]), q["gold"]) for q in make_questions(150, 3, seed=5)]
    found = score_tasks(tiny_model(vocab_size=259, max_position_embeddings=128), Bytes(), {"own": (OWN, items)})["own"]
    spread = NormalDist().inv_cdf(1 - 5e-5) * (1 / 3 * 2 / 3 / 150) ** 0.5
    assert abs(found["acc"] - 1 / 3) < spread
    assert found["chance"] == pytest.approx(1 / 3)


def test_the_interval_is_wilsons():
    """Brown, Cai and DasGupta (2001); R's prop.test(81, 263, correct = FALSE) gives 0.2553 to 0.3662 (Newcombe 1998,
    table I)."""
    assert tasks.wilson(81, 263) == pytest.approx([0.2553, 0.3662], abs=5e-5)
    assert tasks.wilson(0, 20) == pytest.approx([0, 0.1611], abs=5e-5)
    assert tasks.wilson(29, 29)[1] == 1


def test_few_shot_examples_stand_before_each_item(tmp_path):
    records = make_questions(12)
    file = lm_harness.write_lines(tmp_path / "own_test.jsonl", records)
    task = replace(OWN, shots=2)
    items = load_items("own", task, str(file))
    # They are of the file itself, which then has two items fewer, and the same before each.
    assert len(items) == 10
    asked = [item.context.split("\n\n") for item in items]
    assert {tuple(parts[:2]) for parts in asked} == {tuple(asked[0][:2])}
    shown = {f"{r['query']} {r['choices'][r['gold']]}" for r in records}
    assert set(asked[0][:2]) <= shown
    assert not {parts[2] for parts in asked} & {part.rpartition(" ")[0] for part in asked[0][:2]}
    assert load_items("own", task, str(file)) == items != load_items("own", task, str(file), seed=1)
    # Or of the file beside it, and then all items are scored.
    lm_harness.write_lines(tmp_path / "own_train.jsonl", [{"query": "Q", "choices": ["x", "y"], "gold": 1}] * 2)
    items = load_items("own", task, str(file))
    assert (len(items), items[3].context) == (12, f"Q y\n\nQ y\n\n{records[3]['query']}")


def test_a_limit_is_spread_over_the_file(tmp_path):
    file = lm_harness.write_lines(tmp_path / "own.jsonl", [
        {"query": str(i), "choices": ["x", "y"], "gold": 1} for i in range(10)])
    assert [item.context for item in load_items("own", OWN, str(file), limit=4)] == ["0", "2", "5", "7"]


FAULTS = {
    "missing": (None, "own.jsonl does not exist"),
    "empty": ("", "holds no items"),
    "no JSON": ("{", "own.jsonl line 1 is not JSON"),
    "wrong columns": ('{"text": "a", "id": 3}', "has the columns text, id, but needs context_options"),
    "no record": ("[1, 2]", "has the columns a list"),
    "gold outside": ('{"query": "a", "choices": ["b", "c"], "gold": 2}', "the right choice is number 2"),
    "gold no number": ('{"query": "a", "choices": ["b", "c"], "gold": "both"}', "line 1 makes no item"),
    "one choice": ('{"query": "a", "choices": ["b"], "gold": 0}', "it has 1 choices"),
    "an empty choice": ('{"query": "a", "choices": ["b", ""], "gold": 0}', "a choice is empty"),
    "no text": ('{"query": "a", "choices": ["b", 3], "gold": 0}', "a text is 3"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_file_is_one_clear_line(tmp_path, fault, monkeypatch, capsys, pair):
    text, message = FAULTS[fault]
    if text is not None:
        (tmp_path / "own.jsonl").write_text(text)
    monkeypatch.setattr("sys.argv", ["eval.py", "--model", str(pair[0]), "--tasks", f"own={tmp_path}/own.jsonl"])
    assert evaluation.main() == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_an_unknown_task_is_one_clear_line():
    with pytest.raises(ValueError, match="unknown task arc_eas; did you mean arc_easy"):
        open_tasks({"arc_eas": TaskSettings()})
    with pytest.raises(ValueError, match="2 examples are wanted, but there are 1"):
        tasks.choose_examples("own", replace(OWN, shots=2), [Item("", ("a",))], 0)


def test_the_command_scores_a_model_and_the_one_before(tmp_path, monkeypatch, capsys, pair):
    file = lm_harness.write_lines(tmp_path / "own.jsonl", make_questions(9))
    monkeypatch.setattr("sys.argv", ["eval.py", "--model", str(pair[1]), "--baseline", str(pair[0]), "--tasks",
                                     f"own={file}", "--limit", "8", "--shots", "1", "--device", "cpu", "--json",
                                     str(tmp_path / "e.json")])
    assert evaluation.main() == 0
    written = json.loads((tmp_path / "e.json").read_text())
    now, was = written["tasks"]["own"], written["baseline"]["tasks"]["own"]
    assert {"acc", "acc_norm", "acc_bytes"} <= now.keys()
    expected = {"metric": "acc", "value": now["acc"], "direction": "up", "chance": 0.25, "n": 8, "shots": 1,
                "capability": "domain", "version": 1, "items_hash": was["items_hash"]}
    assert {key: now[key] for key in expected} == expected
    assert now["hits"].count("1") == 8 * now["acc"]
    assert now["interval"] == tasks.wilson(now["hits"].count("1"), 8)
    tok = tokenizers.load(pair[0])
    assert now["protocol"]["first_ids"][0] == tok.bos_id
    assert f"| own | acc | {was['value']:.4f} | {now['value']:.4f} |" in capsys.readouterr().out


@pytest.fixture(scope="module")
def stories(data_dir):
    """(our model, our tokenizer, lm-evaluation-harness over transformers) of stories260K."""
    transformers = pytest.importorskip("transformers")
    import sentencepiece
    folder = data_dir / "models/stories260K"
    sp = sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model"))
    lm = lm_harness.make_lm(transformers.AutoModelForCausalLM.from_pretrained(folder), sp.encode, sp.decode, 1, 512)
    return hf.load(folder), tokenizers.load(folder), lm


def open_bench(data_dir, tmp_path, names, n) -> dict:
    """{name: a file of the first n items}."""
    files = {}
    for name in names:
        if name == "wikitext":
            pages = cut_pages((data_dir / "corpora/wikitext2/wiki.test.raw").read_text(encoding="utf-8"))
            records = [{"page": page[:3000]} for page in pages[:3]]
        elif name == "pubmedqa":
            whole = json.loads((data_dir / "corpora/medical_pubmedqa/ori_pqal.json").read_text())
            records = [{key: record[key] for key in ("CONTEXTS", "QUESTION", "final_decision")} for record in
                       whole.values()][:n]
        elif name == "mmlu_anatomy":
            rows = csv.reader((data_dir / "bench/mmlu/test/anatomy_test.csv").open(newline=""))
            records = [{"subject": "anatomy", **dict(zip(MMLU.cells, row))} for row in rows][:n]
        else:
            records = [json.loads(line) for line in (data_dir / "bench" / FILES[name]).open(encoding="utf-8")][:n]
        files[name] = lm_harness.write_lines(tmp_path / f"{name}.jsonl", records)
    return files


@pytest.mark.slow
def test_each_benchmark_scores_as_in_the_harness(data_dir, tmp_path, stories):
    """stories260K on the first items of each file, with the prompts of lm-evaluation-harness' own tasks."""
    model, tok, lm = stories
    names = [*BENCH, "lambada", "pubmedqa", "mmlu_anatomy", "triviaqa"]
    files = open_bench(data_dir, tmp_path, [*names, "wikitext"], 10)
    settings = harness_tasks()
    truth, answers = lm_harness.score(lm, {name: settings[name] | {"file": files[name]} for name in names})
    lm.add_bos = False
    truth |= lm_harness.score(lm, {"wikitext": settings["wikitext"] | {"file": files["wikitext"]}})[0]
    lm.add_bos = True
    opened = open_tasks({name: TaskSettings(str(file)) for name, file in files.items()})
    found = score_tasks(model, tok, opened)
    for name in files:
        assert_equal(found[name], truth[name])
    for name, theirs in answers.items():
        ours = tasks.log_likelihoods(model, tasks.make_requests(tok, name, *opened[name]))[0]
        assert [nats for own in ours for nats, _ in own] == pytest.approx(
            [nats for own in theirs for nats, _ in own], rel=1e-5), name
    alone = score_tasks(model, tok, opened, batch_size=1)
    assert {name: result["hits"] for name, result in alone.items()} == {
        name: result["hits"] for name, result in found.items()}


@pytest.mark.slow
def test_examples_are_asked_as_in_the_harness(data_dir, tmp_path, stories):
    """Two examples before each item: of MMLU the first ones, of others those that were drawn."""
    model, tok, lm = stories
    names = ["arc_easy", "winogrande", "mmlu_anatomy", "gsm8k"]
    files, wanted, opened, settings = open_bench(data_dir, tmp_path, names, 14), {}, {}, harness_tasks()
    for name, file in files.items():
        # The files have no others beside them, so two of the items become examples.
        [(task, items)] = open_tasks({name: TaskSettings(str(file), shots=2)}).values()
        opened[name] = task, items[:6]
        used = [item.record for item in tasks.choose_examples(name, task, tasks.read_items(name, task, str(file)), 0)]
        rest = lm_harness.write_lines(tmp_path / f"{name}_rest.jsonl", [item.record for item in items[:6]])
        wanted[name] = settings[name] | {"file": rest, "fewshot_config": {"sampler": "first_n", "samples": used}}
    truth, answers = lm_harness.score(lm, wanted, shots=2)
    found = score_tasks(model, tok, opened)
    for name in names:
        expected = truth[name] if name != "gsm8k" else {"flexible_match": truth[name]["exact_match"]}
        assert_equal(found[name], expected)
    for name, theirs in answers.items():
        ours = tasks.log_likelihoods(model, tasks.make_requests(tok, name, *opened[name]))[0]
        assert [nats for own in ours for nats, _ in own] == pytest.approx(
            [nats for own in theirs for nats, _ in own], rel=1e-5), name


def test_mmlu_by_subject(tmp_path):
    """Folders of .csv files without headers, the examples of each subject in dev/."""
    for split, n in (("test", 3), ("dev", 6)):
        (tmp_path / split).mkdir()
        for subject in ("anatomy", "jurisprudence", "astronomy"):
            rows = "".join(f'"{subject} {split} {i}?",1,2,3,"4, or 5",{"ABCD"[i % 4]}\n' for i in range(n))
            (tmp_path / split / f"{subject}_{split}.csv").write_text(rows)
    for name, subjects in (("mmlu", ["anatomy", "astronomy", "jurisprudence"]), ("mmlu_medicine", ["anatomy"]),
                           ("mmlu_law", ["jurisprudence"]), ("mmlu_astronomy", ["astronomy"])):
        [(task, items)] = open_tasks({name: TaskSettings(str(tmp_path), shots=1)}).values()
        assert [item.part for item in items] == [subject for subject in subjects for _ in range(3)]
        assert task.capability == "knowledge"
    assert items[1].context == (
        "The following are multiple choice questions (with answers) about astronomy.\n\nastronomy dev 0?\nA. 1\nB. 2\n"
        "C. 3\nD. 4, or 5\nAnswer: A\n\nastronomy test 1?\nA. 1\nB. 2\nC. 3\nD. 4, or 5\nAnswer:")
    assert items[1].gold == 1
    with pytest.raises(ValueError, match="holds no items of alchemy"):
        open_tasks({"mmlu_alchemy": TaskSettings(str(tmp_path))})
    # One file of one subject, whose examples stand in the folder beside.
    file = tmp_path / "test/jurisprudence_test.csv"
    [(_, items)] = open_tasks({"mmlu_law": TaskSettings(str(file), shots=2)}).values()
    assert items[0].context.count("jurisprudence dev") == 2


def test_subjects_are_told_apart(tiny_model):
    items = [Item(q["query"], tuple(q["choices"]), q["gold"], part="ab"[i % 2])
             for i, q in enumerate(make_questions(20))]
    found = score_tasks(tiny_model(vocab_size=259, max_position_embeddings=128), Bytes(), {"own": (OWN, items)})["own"]
    assert {part: own["n"] for part, own in found["parts"].items()} == {"a": 10, "b": 10}
    assert found["parts"]["a"]["value"] == found["hits"][::2].count("1") / 10


def test_programs_are_judged_by_the_caller(tiny_model):
    """The seam: without a judge no program of a model's is run."""
    tok = Bytes()
    tok.missing_ids = lambda rows: []
    tok.encode = lambda text, bos: list(text.encode())
    record = {"task_id": "HumanEval/0", "prompt": "def f():\n", "test": "", "entry_point": "f"}
    task = TASKS["humaneval"]
    items = [replace(task.forms[0].make_item(record | {"task_id": str(i)})) for i in range(3)]
    model = tiny_model(vocab_size=259, max_position_embeddings=64)
    with pytest.raises(ValueError, match="runs programs that the model writes"):
        score_tasks(model, tok, {"humaneval": (task, items)})
    found = score_tasks(model, tok, {"humaneval": (task, items)},
                        judge=lambda records, texts: [record["task_id"] == "1" for record in records])
    assert (found["humaneval"]["pass_at_1"], found["humaneval"]["hits"]) == (1 / 3, "010")


def sample_program(n: int, k: list[int], passed: list[str], tiny_model) -> tuple[dict, list]:
    """(the result of three problems, what was written) where the samples of each problem pass as "0110" says."""
    tok, written = Bytes(), []
    tok.missing_ids, tok.encode = lambda rows: [], lambda text, bos: list(text.encode())
    record = {"prompt": "def f():\n", "test": "", "entry_point": "f"}
    items = [TASKS["humaneval"].forms[0].make_item(record | {"task_id": str(i)}) for i in range(3)]
    asked = tasks.Sampling(n, k, temperature=0.8).apply({"humaneval": (replace(TASKS["humaneval"], max_new_tokens=4),
                                                                       items)})

    def judge(records, texts):
        written.extend(zip([record["task_id"] for record in records], texts))
        return [own == "1" for one in passed for own in one]
    model = tiny_model(vocab_size=259, max_position_embeddings=64)
    return score_tasks(model, tok, asked, judge=judge)["humaneval"], written


def test_several_samples_of_a_program(tiny_model):
    """By hand: of 4 samples 1, 0 and 3 pass. pass@1 = (1/4 + 0 + 3/4) / 3; pass@2 = 1 - C(4 - c, 2) / C(4, 2), which is
    1 - 3/6, 0 and 1; pass@4 is whether any does."""
    found, written = sample_program(4, [2, 1, 4], ["0100", "0000", "1011"], tiny_model)
    assert {key: found[key] for key in ("pass_at_1", "pass_at_2", "pass_at_4")} == pytest.approx(
        {"pass_at_1": 1 / 3, "pass_at_2": (0.5 + 0 + 1) / 3, "pass_at_4": 2 / 3})
    assert (found["metric"], found["value"], found["n"], found["direction"]) == ("pass_at_2", 0.5, 3, "up")
    assert (found["passed"], found["hits"]) == ([1, 0, 3], "")
    assert found["sampling"] == {"samples": 4, "k": [2, 1, 4], "temperature": 0.8, "top_p": 1.0}
    shown = tasks.format_tasks({"humaneval": {"value": 0.25, "pass_at_4": 0.5}}, {"humaneval": found}).splitlines()[2:]
    assert shown == ["| humaneval | pass at 2 | 0.2500 | 0.5000 |  | 0 | 3 |",
                     "| humaneval | pass at 1 |  | 0.3333 |  | 0 | 3 |",
                     "| humaneval | pass at 4 | 0.5000 | 0.6667 |  | 0 | 3 |"]
    # Four samples of each problem, one behind the other, and not alike; the same ones in another run.
    assert [task_id for task_id, _ in written] == [*"000011112222"]
    assert len({text for _, text in written}) > 6
    assert sample_program(4, [2, 1, 4], ["0100", "0000", "1011"], tiny_model)[1] == written
    # Drawn once, they are hits as greedy ones are.
    once, _ = sample_program(1, [1], [*"010"], tiny_model)
    assert (once["pass_at_1"], once["hits"], once["interval"]) == (1 / 3, "010", tasks.wilson(1, 3))


@pytest.mark.parametrize(("options", "message"), [
    ({"samples": 4, "k": [5], "temperature": 1.0}, "--k 5 is not between 1 and the 4 --samples"),
    ({"samples": 4}, "are all the same at temperature 0"),
    ({"samples": 4, "k": [1, 1], "temperature": 1.0}, "names one twice")])
def test_samples_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        tasks.Sampling(**options)


def test_sampling_is_of_programs(tmp_path):
    opened = open_tasks({"own": TaskSettings(str(lm_harness.write_lines(tmp_path / "own.jsonl", make_questions(3))))})
    assert tasks.Sampling().apply(opened) == opened
    with pytest.raises(ValueError, match="name humaneval or mbpp"):
        tasks.Sampling(2, temperature=1.0).apply(opened)


def test_perplexities_have_intervals_over_texts():
    """Of equal texts none is left; of others it holds the value."""
    assert tasks.redraw([2.0] * 8, [4] * 8) == [0.5, 0.5]
    low, high = tasks.redraw([1.0, 2, 3, 4, 5, 6, 7, 8], [4] * 8)
    assert 0.25 < low < 4.5 / 4 < high < 2
    assert tasks.redraw([1.0] * 3, [4] * 3) is None


def test_the_interval_of_a_perplexity_is_one():
    """Of equal texts it is the value itself, exp(2) of 2 nats."""
    items = [Item("a", (" b",)) for _ in range(8)]
    task = replace(TASKS["lambada"], metrics=("perplexity", "acc"))
    found = tasks.summarise(task, items, {"acc": [0] * 8, "nats": [2.0] * 8, "sizes": {"perplexity": [1] * 8}})
    assert (found["value"], found["interval"]) == (pytest.approx(7.38905609893), [pytest.approx(7.38905609893)] * 2)
    assert (found["nats_by_item"], found["sizes_by_item"], found["hits"]) == ([2.0] * 8, [1] * 8, "")
    # From 2 nats to 3 each item is worse by a factor of e. Where hits are the headline, the change is drawn of them.
    worse = tasks.summarise(task, items, {"acc": [0] * 8, "nats": [3.0] * 8, "sizes": {"perplexity": [1] * 8}})
    assert retention.compare_task("own", found, worse)["interval"] == pytest.approx([math.e - 1] * 2)
    found = tasks.summarise(TASKS["lambada"], items, {"acc": [1] * 8, "nats": [2.0] * 8,
                                                      "sizes": {"perplexity": [1] * 8}})
    assert "sizes_by_item" not in found
