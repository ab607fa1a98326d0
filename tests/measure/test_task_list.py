"""The declared benchmarks. Truth: records as they stand in the authors' files, and the prompts written out by hand."""

import pytest

from measure.task_list import TASKS

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
