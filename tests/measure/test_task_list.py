"""The declared benchmarks. Truth: records as they stand in the authors' files, and the prompts written out by hand."""

import ast
import re
from pathlib import Path

import jinja2.meta
import lm_harness
import pytest

from measure.task_list import TASKS, cut_pages, detokenise

# {task: (record, context or contexts, choices, the right one)}, from the files' first lines.
RECORDS = {
    "arc_easy": ({"id": "M_1", "question": "What is a kitten's fur?", "answerKey": "2",
                  "choices": {"text": ["gray", "soft"], "label": ["1", "2"]}},
                 "Question: What is a kitten's fur?\nAnswer:", ("gray", "soft"), 1),
    "arc_challenge": ({"query": "Question: What is fur?", "choices": ["gray", "soft"], "gold": 1},
                      "Question: What is fur?\nAnswer:", ("gray", "soft"), 1),
    "hellaswag": ({"activity_label": "Baking [x] cookies", "ctx_a": "A man  sits [title] He bakes.",
                   "ctx_b": "then he", "endings": ["[step] eats.", " smiles. "], "label": "1"},
                  "Baking cookies: A man sits. He bakes. Then he", (" eats.", "smiles."), 1),
    "winogrande": ({"sentence": "Ian ate Dennis's menudo after _ had it.", "option1": "Ian", "option2": "Dennis",
                    "answer": "2"},
                   ("Ian ate Dennis's menudo after Ian", "Ian ate Dennis's menudo after Dennis"), ("had it.",) * 2, 1),
    "piqa": ({"query": "Question: dresser\n", "choices": ["a", "b"], "gold": 0}, "Question: dresser\nAnswer:",
             ("a", "b"), 0),
    "boolq": ({"query": "Passage: All {biomass}.\nQuestion: is it?", "choices": ["no", "yes"], "gold": 0},
              "All {biomass}.\nQuestion: is it?\nAnswer:", ("no", "yes"), 0),
    "mmlu": ({"question": " Which? ", "choices": ["a", "b", "c", "d"], "answer": 2, "subject": "anatomy"},
             "Which?\nA. a\nB. b\nC. c\nD. d\nAnswer:", ("A", "B", "C", "D"), 2),
    "triviaqa": ({"question": "Who wrote it?", "answer": {"value": "Lewis", "aliases": ["Lewis", "S. Lewis"]}},
                 "Question: Who wrote it??\nAnswer:", ("Lewis", "S. Lewis"), 0),
    "gsm8k": ({"question": "How many?", "answer": "1 + 1\n#### 2"}, "Question: How many?\nAnswer:",
              ("1 + 1\n#### 2",), 0),
    "math": ({"problem": "What is $1+1$?", "solution": "$\\boxed{2}$", "type": "Algebra"},
             "Problem:\nWhat is $1+1$?\n\nSolution:", ("$\\boxed{2}$",), 0),
    "humaneval": ({"task_id": "HumanEval/0", "prompt": "def f():\n", "test": "", "entry_point": "f"},
                  "def f():\n", (), 0),
    "mbpp": ({"task_id": 11, "text": "Write f.", "code": "", "test_list": ["assert 1", "assert 2", "assert 3", "x"]},
             "You are an expert Python programmer, and here is your task: Write f. Your code should pass these "
             "tests:\n\nassert 1\nassert 2\nassert 3\n[BEGIN]\n", (), 0),
    "lambada": ({"text": "He gripped her arm, said Shane"}, "He gripped her arm, said", ("Shane",), 0),
    "wikitext": ({"page": " = Bo = \n He ( 1 @.@ 5 m ) ran , N .\n"}, "", (" = Bo =\nHe (1.5 m) ran, 1 .\n",), 0),
    "pubmedqa": ({"CONTEXTS": ["One.", "Two."], "QUESTION": "Does it?", "final_decision": "maybe"},
                 "Abstract: One.\nTwo.\nQuestion: Does it?\nAnswer:", ("yes", "no", "maybe"), 2),
    "casehold": ({"citing_prompt": "See A v. B (<HOLDING>); C v. D", "holding_0": "holding that a", "holding_1": "b",
                  "holding_2": "c", "holding_3": "d", "holding_4": "e", "label": "3"},
                 "See A v. B (", ("holding that a", "b", "c", "d", "e"), 3),
}


def make_item(name, record):
    return next(form for form in TASKS[name].forms if set(form.columns.split()) <= record.keys()).make_item(record)


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_becomes_an_item(name):
    record, context, choices, gold = RECORDS[name]
    item = make_item(name, record)
    assert (item.contexts or item.context, item.choices, item.gold) == (context, choices, gold)


def test_the_hub_and_the_file_make_one_item():
    """A record of the Hub's and one of llm-foundry's of the same question."""
    pairs = {
        "boolq": ({"passage": "P.", "question": "is it", "label": 1},
                  {"query": "Passage: P.\nQuestion: is it?", "choices": ["no", "yes"], "gold": 1}),
        "piqa": ({"goal": "dresser", "sol1": "a", "sol2": "b", "label": 1},
                 {"query": "Question: dresser\n", "choices": ["a", "b"], "gold": 1}),
        "winogrande": ({"sentence": "So _ always won.", "option1": "Sarah", "option2": "Maria", "answer": "1"},
                       {"context_options": ["So Sarah", "So Maria"], "continuation": "always won.", "gold": 0})}
    for name, records in pairs.items():
        items = [make_item(name, record) for record in records]
        assert [(item.context, item.contexts, item.choices, item.gold) for item in items[:1]] == \
            [(item.context, item.contexts, item.choices, item.gold) for item in items[1:]]


def read_examples(name: str) -> list[dict]:
    """The examples in a file of lm-evaluation-harness' tasks, which cannot be imported without packages of its own."""
    lm_eval = pytest.importorskip("lm_eval", reason="the truth is lm-evaluation-harness")
    tree = ast.parse((Path(lm_eval.__file__).parent / "tasks" / name).read_text())
    function = next(node for node in tree.body if getattr(node, "name", "") == "list_fewshot_samples")
    return ast.literal_eval(function.body[-1].value)


def test_the_examples_are_those_of_the_papers():
    """Word for word, with what stands before and behind them in lm-evaluation-harness' tasks."""
    math = [(f"Problem:\n{r['problem']}\n\nSolution:", r["solution"]) for r in read_examples("minerva_math/utils.py")]
    assert [(item.context, item.answer) for item in TASKS["math"].fixed] == math
    mbpp = read_examples("mbpp/utils.py")
    assert [item.answer for item in TASKS["mbpp"].fixed] == [f"{r['code']}\n[DONE]" for r in mbpp]
    assert [item.context for item in TASKS["mbpp"].fixed] == [make_item("mbpp", r).context for r in mbpp]


def read_columns(name: str) -> set[str]:
    """The columns of a dataset that lm-evaluation-harness' own file of a task reads, in its templates or its functions.
    """
    settings, found = lm_harness.read_task(name, resolve=False), set()
    for key in ("doc_to_text", "doc_to_target", "doc_to_choice", "process_docs", "process_results"):
        value = str(settings.get(key))
        if (module := Path(value.rpartition(".")[0] + ".py")).is_file():
            found |= set(re.findall(r"""\bdoc\[["'](\w+)["']\]""", module.read_text()))
        else:
            found |= jinja2.meta.find_undeclared_variables(jinja2.Environment().parse(value)) | {value}
    return found


@pytest.mark.parametrize("name", lm_harness.FILES)
def test_the_source_on_the_hub_is_that_of_the_harness(name):
    """Dataset, configuration, split, the split of the examples, and the columns that one of the forms asks for."""
    theirs, task = lm_harness.read_task(name, resolve=False), TASKS[name]
    dataset, configs, split = task.hub
    config = theirs.get("dataset_name")
    assert (dataset, split) == (theirs["dataset_path"], theirs.get("test_split") or theirs["validation_split"])
    # Its tasks of subjects, which are configurations of one dataset, are one task here.
    assert configs == "all" if name == "mmlu" else config in (configs or "").split() or config == configs
    if task.examples:
        assert task.examples == theirs.get("fewshot_split", theirs.get("training_split"))
    columns, ours = read_columns(name), [set(form.columns.split()) for form in task.forms]
    assert any(own - {"task_id", "subject"} <= columns for own in ours), (columns, ours)


def test_tasks_of_the_harness_are_checked():
    """But for CaseHOLD, which it has not."""
    assert {name for name in TASKS if name not in ("mmlu_medicine", "mmlu_law")} - {*lm_harness.FILES} == {"casehold"}


@pytest.mark.slow
def test_wikitext_is_restored_as_in_the_harness(data_dir):
    pytest.importorskip("lm_eval", reason="the truth is lm-evaluation-harness")
    from lm_eval.tasks.wikitext.preprocess_wikitext import wikitext_detokenizer
    pages = cut_pages((data_dir / "corpora/wikitext2/wiki.test.raw").read_text(encoding="utf-8"))
    # EleutherAI/wikitext_document_level has so many in its test split of wikitext-2-raw-v1.
    assert len(pages) == 62
    assert all(detokenise(page) == wikitext_detokenizer({"page": page}) for page in pages)
