"""measure/harness_tasks.py. Truth: lm-evaluation-harness on the same task files, its prompts and its scores under its
own class for transformers' models; prompts worked out by hand; what a stranger may put into a file."""

import json
import sys
import time
from pathlib import Path

import lm_harness
import pytest

import eval as evaluation
import tokenizer
from core.errors import UserError
from measure import tasks
from measure.harness_tasks import open_task

pytestmark = pytest.mark.usefixtures("one_thread")
QUESTIONS = [{"query": f"The court {i} held", "choices": ["that the lien", "a story", "the girl ran", "é no"],
              "gold": (i * i + i // 3) % 4, "word": f"w{i}", "text": "Once upon a time. " * (1 + i % 3)}
             for i in range(12)]
CHOICE = {"output_type": "multiple_choice", "doc_to_text": "Q: {{query}}\nA:", "doc_to_choice": "{{choices}}",
          "doc_to_target": "gold"}
CLOZE = {"output_type": "loglikelihood", "doc_to_text": "query", "doc_to_target": " {{choices[gold]}}"}
GENERATE = {"output_type": "generate_until", "doc_to_text": "{{query}}", "doc_to_target": "word"}
ROLLING = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}"}


def write_task(folder: Path, name: str = "mine", records=QUESTIONS, **settings) -> str:
    """A task file and its data beside it; JSON is YAML."""
    lm_harness.write_lines(folder / "test.jsonl", records)
    lm_harness.write_lines(folder / "train.jsonl", [q | {"query": q["query"] + "?", "gold": 3 - q["gold"]}
                                                 for q in records])
    config = {"task": name, "dataset_path": "json", "test_split": "test",
              "dataset_kwargs": {"data_files": {"test": "test.jsonl", "train": "train.jsonl"}}, **settings}
    (folder / f"{name}.yaml").write_text(json.dumps(config))
    return str(folder / f"{name}.yaml")


# ---- prompts

def test_prompts_worked_out_by_hand(tmp_path):
    file = write_task(tmp_path, **CHOICE, num_fewshot=2, fewshot_split="train", fewshot_config={"sampler": "first_n"},
                      description="About {{word}}.\n", target_delimiter="=", fewshot_delimiter="\n--\n",
                      metric_list=[{"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True}],
                      metadata={"version": 3})
    task, items = open_task("mine", file)
    assert items[1].context == ("About w1.\nQ: The court 0 held?\nA:=é no\n--\nQ: The court 1 held?\nA:=the girl ran"
                                "\n--\nQ: The court 1 held\nA:")
    assert (items[1].choices, items[1].gold, len(items)) == (tuple(QUESTIONS[1]["choices"]), 1, 12)
    assert (task.kind, task.metrics, task.version, task.shots, task.delimiter) == ("choice", ("acc_norm",), 3, 2, "=")
    # A newline at the end of a template stays, and what is no template is a text.
    file = write_task(tmp_path, **CLOZE | {"doc_to_text": "{% for c in choices %}\n{{c}}\n{% endfor %}\n"})
    task, items = open_task("mine", file, limit=3)
    assert items[0].context == "\nthat the lien\n\na story\n\nthe girl ran\n\né no\n\n"
    # Items 0, 4 and 8.
    assert [item.choices for item in items] == [(" that the lien",), (" a story",), (" the girl ran",)]
    assert (task.kind, task.metrics, task.delimiter) == ("cloze", ("perplexity", "acc"), "")
    file = write_task(tmp_path, **ROLLING)
    assert open_task("mine", file)[1][1].choices == ("Once upon a time. " * 2,)
    file = write_task(tmp_path, **GENERATE | {"doc_to_target": "{{['a', word]}}"}, num_fewshot=1, metric_list=[
        {"metric": "exact_match", "ignore_case": True, "ignore_numbers": True, "ignore_punctuation": False}],
        generation_kwargs={"until": "\n", "max_gen_toks": 5, "do_sample": False})
    task, items = open_task("mine", file, shots=0)
    assert (items[2].context, items[2].choices) == ("The court 2 held", ("a", "w2"))
    assert (task.stop, task.max_new_tokens, task.rule) == (("\n",), 5, "exact case numbers")


TARGETS = {
    "the number of a choice": ("{{gold}}", "{{choices}}", 1),
    "a choice": ("{{choices[gold]}}", "choices", 1),
    "a constant": (2, ["x", "y", "z"], 2),
    "named choices": ("gold", {"no": "x", "yes": "y", "maybe": "z", "other": "w"}, 1),
}


@pytest.mark.parametrize("name", TARGETS)
def test_targets(tmp_path, name):
    target, choices, gold = TARGETS[name]
    _, items = open_task("mine", write_task(tmp_path, **CHOICE | {"doc_to_target": target, "doc_to_choice": choices}))
    assert items[1].gold == gold
    assert len(items[1].choices) == (3 if gold == 2 else 4)


def test_tables(tmp_path):
    """A column of numbers holds numbers, as datasets reads it; empty cells are none."""
    file = write_task(tmp_path, **CHOICE | {"doc_to_text": "{{a}} {{b is none}}", "doc_to_choice": ["x", "y"]},
                      dataset_path="csv", dataset_kwargs={"data_files": {"test": ["t.csv"]}})
    (tmp_path / "t.csv").write_text('a,b,gold\n"x, y",u,0\n"é\nz",,1\n')
    _, items = open_task("mine", file)
    assert [(item.context, item.gold) for item in items] == [("x, y False", 0), ("é\nz True", 1)]


def test_a_file_is_a_task_like_any_other(tmp_path):
    """Through the seam of all tasks, as --tasks and [eval.tasks.NAME] open them."""
    settings = tasks.TaskSettings(write_task(tmp_path, **CHOICE), shots=1, limit=2, capability="reasoning")
    [(task, items)] = tasks.open_tasks({"mine": settings}).values()
    assert (task.capability, task.shots, len(items)) == ("reasoning", 1, 2)
    # Examples are of the items themselves here; none is its own.
    assert all(item.context.count(QUESTIONS[i]["query"]) == 1 for i, item in zip((0, 6), items))


# ---- refusals

REFUSED = {
    "function": ("doc_to_text: !function utils.f\n", "has doc_to_text !function utils.f, which is not run here; "
                                                     "lm-evaluation-harness runs it: python -m measure.lm_eval"),
    "function in a list": ("metric_list: [{metric: !function m.f}]\n", "the metric !function m.f"),
    "aggregation": ("metric_list: [{metric: acc, aggregation: !function m.f}]\n", "aggregation !function m.f of the"),
    "other metric": ("metric_list: [{metric: f1}]\n", "the metric 'f1' for multiple_choice"),
    "metric of another kind": ("metric_list: [{metric: exact_match}]\n", "the metric 'exact_match' for multiple_ch"),
    "process_docs": ("process_docs: x\n", "has the key 'process_docs'"),
    "include": ("include: other.yaml\n", "has the key 'include'"),
    "group": ("group: all\n", "has the key 'group'"),
    "use_prompt": ("use_prompt: x\n", "has the key 'use_prompt'"),
    "filters": ("filter_list: [{name: a, filter: [{function: regex}]}]\n", "has filter_list"),
    "sampling": ("generation_kwargs: {do_sample: true}\n", "has generation_kwargs"),
    "repeats": ("repeats: 4\n", "has repeats 4"),
    "the Hub": ("dataset_path: allenai/ai2_arc\n", "has dataset_path 'allenai/ai2_arc'"),
    "no texts": ("doc_to_choice: [yes, no]\n", "has doc_to_choice"),
    "no choices": ("doc_to_choice: null\n", "has no doc_to_choice; add it"),
    "no data": ("dataset_kwargs: {data_files: {test: away.jsonl}}\n", "away.jsonl, which .*mine.yaml names, does not"),
    "no split": ("test_split: null\n", "has neither test_split nor validation_split"),
    "no files of it": ("test_split: dev\n", "names the split dev, but no files of it"),
    "too few": ("num_fewshot: 12\n", "12 examples are wanted, but there are 11; lower shots"),
    "undefined": ("doc_to_text: '{{nothing}}'\n", "test.jsonl.* does not fit .*doc_to_text: 'nothing' is undefined"),
    "no template": ("doc_to_text: '{{query'\n", "prompts of .* are none: doc_to_text: "),
    "insides": ("doc_to_text: '{{ query.__class__.mro() }}'\n", "doc_to_text: access to attribute '__class__'"),
    "a number": ("doc_to_text: '3'\n", "makes no item of .*a text is 3"),
    "not a choice": ("doc_to_target: '{{query}}'\n", "the right choice is number -1"),
    "beyond": ("doc_to_target: 7\n", "the right choice is number 7, but its 4 choices"),
    "no list": ("doc_to_choice: '{{query}}'\n", "doc_to_choice is 'The court 0 held', no list of texts"),
    "not YAML": ("doc_to_text: [\n", "is not valid YAML: while parsing"),
    "objects": ("task: !!python/object/apply:os.system [ls]\n", "has task tag:yaml.org,.*, which is not run here"),
    "aliases": ("metadata: {a: &a [x], b: [*a, *a]}\n", r"the alias \*a stands in it"),
    "nested": ("metadata: " + "[" * 5000 + "\n", "is not valid YAML: maximum recursion"),
    "a wrong date": ("metadata: {a: 2020-99-99}\n", "is not valid YAML: month must be"),
    "a large file": ("metadata: {a: " + "x" * (1 << 20) + "}\n", "has more than 1 MB"),
    "no mapping": (None, "holds a list, not the settings of a task"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_run_is_one_line(tmp_path, name):
    lines, match = REFUSED[name]
    file = Path(write_task(tmp_path, **CHOICE))
    plain = "".join(f"{key}: {json.dumps(value)}\n" for key, value in json.loads(file.read_text()).items())
    keys = [line.split(":")[0] + ":" for line in (lines or "").splitlines()]
    kept = "".join(line + "\n" for line in plain.splitlines() if line.split(" ")[0] not in keys)
    file.write_text("- a\n" if lines is None else kept + lines)
    with pytest.raises(UserError, match=match) as refused:
        open_task("mine", str(file))
    assert "\n" not in str(refused.value)
    assert str(refused.value).startswith(("task mine: ", str(file)))


@pytest.mark.parametrize("template", ["{% for i in range(99999) %}" * 4 + "{% endfor %}" * 4, "{{ 'a' * 2**40 }}",
                                      "{{ ('a' * 40 + 'b') | regex_replace('(a+)+$', '') }}"])
def test_a_template_that_does_not_end_is_ended(tmp_path, monkeypatch, template):
    monkeypatch.setattr("text.template.START", "import text.sandbox; text.sandbox.SECONDS = 0.3; text.sandbox.serve()")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    start = time.process_time()
    with pytest.raises(UserError, match=r"more than (5 s of computing|512 MB of memory)"):
        open_task("mine", write_task(tmp_path, **CHOICE | {"doc_to_text": template}))
    assert time.process_time() - start < 2


# ---- the harness

FILES = {
    "drawn": CHOICE | {"num_fewshot": 2, "fewshot_split": "train", "description": "About {{word}}.\n"},
    "drawn_of_its_own": CHOICE | {"num_fewshot": 3, "fewshot_split": "test", "doc_to_target": "{{choices[gold]}}",
                                  "metric_list": [{"metric": metric} for metric in ("acc", "acc_norm", "acc_bytes")]},
    "first": CHOICE | {"num_fewshot": 2, "training_split": "train", "fewshot_config": {"sampler": "first_n"},
                       "target_delimiter": "", "fewshot_delimiter": "\n"},
    "validated": CHOICE | {"num_fewshot": 2, "test_split": None, "validation_split": "test", "training_split": "train"},
    "cloze": CLOZE | {"num_fewshot": 1, "fewshot_split": "train"},
    "rolling": ROLLING,
    "written": GENERATE | {"num_fewshot": 1, "training_split": "train", "generation_kwargs": {
        "until": ["q"], "max_gen_toks": 6}, "metric_list": [{"metric": "exact_match", "ignore_case": True}]},
}


@pytest.mark.slow
def test_scores_are_those_of_the_harness(pair, tmp_path, monkeypatch):
    lm_eval = lm_harness.need_lm_eval()
    from lm_eval.tasks import TaskManager

    base, own = pair[0], tokenizer.load(pair[0])
    theirs = lm_harness.open_own_class(base, own)
    # The harness looks for data where it runs.
    monkeypatch.chdir(tmp_path)

    def ask_harness(names):
        manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
        return lm_eval.simple_evaluate(model=theirs, tasks=names, task_manager=manager, bootstrap_iters=0,
                                       log_samples=True)
    for name, settings in FILES.items():
        write_task(tmp_path, name, **settings)
    # Half of the answers are what the model writes, up to their case.
    written = {sample["doc_id"]: sample["resps"][0][0] for sample in ask_harness(["written"])["samples"]["written"]}
    records = [q | {"word": written[i].upper() if i % 2 else "none"} for i, q in enumerate(QUESTIONS)]
    for name, settings in FILES.items():
        write_task(tmp_path, name, records, **settings)
    truth = ask_harness([name for name in FILES if name != "rolling"])
    # There the harness would have BOS predicted behind BOS.
    theirs.add_bos_token = False
    rolling = ask_harness(["rolling"])
    for key in ("samples", "results"):
        truth[key] |= rolling[key]
    monkeypatch.setattr(sys, "argv", ["eval.py", "--model", str(base), "--json", "o.json", "--device", "cpu",
                                      "--tasks", *(f"{name}={name}.yaml" for name in FILES)])
    assert evaluation.main() == 0
    found = json.loads(Path("o.json").read_text())["tasks"]
    for name in FILES:
        samples = sorted(truth["samples"][name], key=lambda sample: sample["doc_id"])
        task, items = open_task(name, f"{name}.yaml")
        if task.kind in ("choice", "cloze"):
            assert [[(item.context, task.delimiter + choice) for choice in item.choices] for item in items] == [
                [tuple(each) for each in sample["arguments"]] for sample in samples], name
        elif task.kind == "generate":
            assert [item.context for item in items] == [sample["arguments"][0][0] for sample in samples]
        if hits := found[name]["hits"]:
            assert hits == "".join(str(int(sample[task.metrics[0]])) for sample in samples), name
        else:
            low, high = found[name]["interval"]
            assert low < found[name]["value"] < high
        metrics = {key.removesuffix(",none"): value for key, value in truth["results"][name].items()
                   if key.endswith(",none") and not key.endswith("_stderr,none")}
        assert metrics
        assert {key: found[name][key] for key in metrics} == pytest.approx(metrics, abs=1e-6, rel=1e-6), name
    assert found["written"]["exact_match"] == 0.5


@pytest.mark.slow
def test_the_harness_own_files_are_read_or_refused():
    lm_harness.need_lm_eval()
    import lm_eval.tasks
    files = sorted(Path(lm_eval.tasks.__file__).parent.rglob("*.yaml"))[::150]
    assert len(files) > 50
    for file in files:
        with pytest.raises(UserError) as refused:
            open_task("theirs", str(file))
        assert "\n" not in str(refused.value)
