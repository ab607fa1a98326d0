"""measure/lm_eval.py. Truth: lm-evaluation-harness' own class for transformers' models, on the same folder and tasks.
"""

import json
import sys

import lm_harness
import pytest

import tokenizer
from measure import lm_eval as adapter

pytestmark = pytest.mark.usefixtures("one_thread")
QUESTIONS = [{"query": f"The court {i} held", "choices": ["that the lien", "a story", "the girl ran", "é no"],
              "gold": i % 4, "text": "Once upon a time there was a court. " * (1 + 5 * (i % 3))} for i in range(12)]


@pytest.fixture(scope="module")
def folder_of_tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    file = lm_harness.write_lines(folder / "questions.jsonl", QUESTIONS)
    source = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {file}}}}}\ntest_split: test\n"
    for name, lines in {
            "own_choice": "output_type: multiple_choice\ndoc_to_text: '{{query}}'\ndoc_to_choice: '{{choices}}'\n"
                          "doc_to_target: '{{gold}}'\nmetric_list: [{metric: acc}, {metric: acc_norm}]\n",
            "own_rolling": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
                           "metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]\n",
            "own_generate": "output_type: generate_until\ndoc_to_text: '{{query}}'\ndoc_to_target: ' that'\n"
                            "generation_kwargs: {until: ['q'], max_gen_toks: 6, do_sample: false}\n"
                            "metric_list: [{metric: exact_match}]\n"}.items():
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{source}{lines}metadata: {{version: 1.0}}\n")
    return folder


@pytest.mark.slow
def test_scores_are_those_of_the_harness_own_class(pair, folder_of_tasks, monkeypatch, capsys, tmp_path):
    lm_eval = lm_harness.need_lm_eval()
    from lm_eval.tasks import TaskManager

    base, own = pair[0], tokenizer.load(pair[0])
    theirs = lm_harness.open_own_class(base, own)
    names = ["own_choice", "own_rolling", "own_generate"]
    manager = TaskManager(include_path=str(folder_of_tasks), include_defaults=False)
    truth = lm_eval.simple_evaluate(model=theirs, tasks=names, task_manager=manager, bootstrap_iters=0,
                                    log_samples=True)
    ours = lm_eval.simple_evaluate(model=adapter.Adapter(str(base), 5, "cpu"), tasks=names, task_manager=manager,
                                   bootstrap_iters=0, log_samples=True)
    written = [[sample["resps"] for sample in sorted(side["samples"]["own_generate"], key=lambda one: one["doc_id"])]
               for side in (ours, truth)]
    assert written[0] == written[1]
    for name in names:
        assert truth["results"][name].keys() == ours["results"][name].keys()
        for key, value in truth["results"][name].items():
            if isinstance(value, float):
                assert ours["results"][name][key] == pytest.approx(value, abs=1e-6, rel=1e-6), (name, key)
    words = ["lm_eval.py", "--model", str(base), "--include", str(folder_of_tasks), "--device", "cpu", "--tasks"]
    monkeypatch.setattr(sys, "argv", [*words, *names, "--json", str(tmp_path / "o.json")])
    assert adapter.main() == 0
    assert json.loads((tmp_path / "o.json").read_text())["results"]["own_choice"]["acc,none"] == pytest.approx(
        truth["results"]["own_choice"]["acc,none"])
    assert "own_rolling" in capsys.readouterr().out
    for more, says in (["nothing"], "has no task nothing ("), (["own_choice", "--include", "/nowhere"], "is no folder"):
        monkeypatch.setattr(sys, "argv", [*words, *more])
        assert adapter.main() == 2
        assert says in capsys.readouterr().err


def test_without_the_extra_it_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(adapter, "lm_eval", None)
    monkeypatch.setattr(sys, "argv", ["lm_eval.py", "--model", "x", "--tasks", "y"])
    assert adapter.main() == 2
    assert capsys.readouterr().err.startswith("error: lm-evaluation-harness is not installed: pip install")
