"""measure/probes.py. Truth: documents worked by hand; the answers of generated items, found anew from their text. Laws:
a wrong choice never stands in the document; who knows how common things are, and no more, is at chance; items are a
function of the seed."""

import re
import subprocess
import sys
from collections import Counter

import pytest
from runs import ENV, ROOT
from synthetic import Bytes, make_documents

import hf
from measure import probes
from measure.probes import Fact, find_facts, make_context_items, make_fact_items, open_probes, score_probes
from measure.tasks import hash_items
from model import Model, ModelConfig

LAW = """Appeals are heard by the Superior Court in Washington. An appeal under § 16-901(a) must be filed within 30 days
(2) or, by Section 12, within 1,250.5 hours; § 16-901(a) and 30 days count from May 4, 1987 on. Clerk Smith told the old
and new Court of Appeals so [7], and Clerk Smith the parties."""
CIVIL = "第六百一十七条 出卖人交付的标的物不符合质量要求的，买受人可以依据本法第五百八十二条，应当提前六十日通知。"


def test_the_facts_of_a_document_by_hand():
    """No first word of a sentence, no mark of a list or note, and each where it stands first."""
    assert {(fact.kind, fact.text) for fact in find_facts([LAW])} == {
        ("section", "16-901(a)"), ("section", "12"), ("name", "Superior Court"), ("name", "Court of Appeals"),
        ("number", "30"), ("number", "1,250.5"), ("number", "4"), ("number", "1987")}
    assert all(LAW.find(fact.text) == fact.start for fact in find_facts([LAW]))
    assert [(fact.kind, fact.text) for fact in find_facts([CIVIL])] == [
        ("section", "第六百一十七条"), ("section", "第五百八十二条"), ("number", "六十")]


@pytest.mark.parametrize(("kind", "text", "form"), [
    ("section", "16-901", "16-###"), ("section", "16-901(a)", "16-###(a)"), ("number", "1,250.5", "1,250.#"),
    ("number", "1987", "####"), ("name", "Court of Appeals", "3 words"), ("section", "第五百八十二条", "第#####条")])
def test_what_a_wrong_choice_has_in_common(kind, text, form):
    assert Fact(kind, text, 0, 0).form == form


def test_no_wrong_choice_stands_in_the_document_and_the_right_one_does_not_stand_before():
    documents = make_documents(80)
    items = make_fact_items(documents, Bytes(), 0, 10**4)
    assert {item.part for item in items} == {"number", "section", "name"}
    assert len({(item.context, item.part) for item in items}) == len(items) > 100
    for item in items:
        right, (document,) = item.choices[item.gold], [text for text in documents if item.context in text]
        assert document.startswith(item.context + right, document.find(item.context))
        assert right not in item.context
        assert len(set(item.choices)) == 4
        for wrong in set(item.choices) - {right}:
            assert wrong not in document
            assert len(wrong) == len(right) or item.part == "name"
            assert any(wrong in other for other in documents)


def test_the_context_of_a_long_text_begins_with_a_word():
    documents = [f"{'wordy ' * 100}{i} it costs {31 + i} euros" for i in range(10)]
    items = [item for item in make_fact_items(documents, Bytes(), 0, 100) if item.context.endswith("costs ")]
    assert len(items) == 10
    assert all(item.context.startswith("wordy ") and 240 < len(item.context) <= probes.MOST for item in items)


@pytest.mark.parametrize("choose", ["the most common", "the shortest", "the least", "the greatest"])
def test_who_knows_how_common_things_are_and_no_more_is_at_chance(choose):
    """Documents of many seeds; the common value would win most items where wrong choices were drawn from all."""
    hits = n = 0
    for seed in range(12):
        documents = make_documents(120, seed)
        counts = Counter(fact.text for fact in find_facts(documents))
        key = {"the most common": lambda text, counts=counts: -counts[text], "the shortest": len, "the least": str,
               "the greatest": lambda text: [-ord(letter) for letter in text]}[choose]
        for item in make_fact_items(documents, Bytes(), seed, 10**4):
            hits += min(item.choices, key=key) == item.choices[item.gold]
            n += 1
    assert n > 1000
    # 0.25, and four standard deviations; within a class one thing may be up to twice as common as another.
    assert hits / n == pytest.approx(0.25, abs=0.06)


def hashes(seed: int) -> list[str]:
    return [hash_items(items) for items in (make_fact_items(make_documents(40), Bytes(), seed, 50),
                                            *make_context_items(seed, 4).values())]


@pytest.mark.slow
def test_items_are_a_function_of_the_seed_in_any_process():
    script = "import sys; sys.path += ['tests', 'tests/measure']; import test_probes; print(test_probes.hashes(3))"
    said = subprocess.run([sys.executable, "-c", script], env={**ENV, "PYTHONHASHSEED": "1"}, cwd=ROOT, check=True,
                          capture_output=True, text=True).stdout
    assert said == f"{hashes(3)}\n"
    assert not set(hashes(3)) & set(hashes(4))


def test_too_few_facts_are_fewer_items_and_not_other_ones():
    assert make_fact_items([LAW, LAW], Bytes(), 0, 10) == []
    assert make_fact_items([], Bytes(), 0, 10) == []
    assert len(make_fact_items(make_documents(80), Bytes(), 0, 7)) == 7


def solve(kind: str, question: str) -> str:
    words = question.split()
    return {"minimum": lambda: str(min(map(int, words))), "maximum": lambda: str(max(map(int, words))),
            "copy": lambda: question, "parity": lambda: ["even", "odd"][int(words[0]) % 2],
            "alphabet": lambda: chr(ord(words[-1]) + 1)}[kind]()


def test_generated_items_have_the_answer_that_their_text_has():
    found = make_context_items(0, 60)
    assert list(found) == [f"in_context.{kind}" for kind in ("minimum", "maximum", "copy", "parity", "alphabet")]
    for name, items in found.items():
        kind = name.partition(".")[2]
        for item in items:
            *examples, last = item.context.split("\n")
            asked = [re.fullmatch(r"(.+) -> (.+)", line).groups() for line in examples]
            question = last.removesuffix(" ->")
            assert len(asked) == 5
            assert all(solve(kind, text) == answer for text, answer in asked)
            assert solve(kind, question) == item.choices[item.gold]
            assert question not in dict(asked)
            assert len(set(item.choices)) == len(item.choices) == {"parity": 2, "copy": 4, "alphabet": 4}.get(kind, 3)
        # Neither a place nor an answer is right much more often than others.
        places = Counter(item.gold for item in items)
        assert max(places.values()) < 60 * 1.7 / len(items[0].choices)


def test_the_mean_of_the_kinds_has_the_shape_of_a_task():
    model = Model(ModelConfig(vocab_size=259, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                              num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=128))
    model.initialise(0)
    settings = probes.ProbeSettings(facts=12, in_context=8)
    asked = open_probes(settings, Bytes(), make_documents(40), make_documents(40, 1), seed=5)
    found = score_probes(model, Bytes(), asked)
    assert list(found) == ["facts_trained", "facts_heldout", *make_context_items(0, 0), "in_context"]
    kinds = [found[name] for name in found if name.startswith("in_context.")]
    whole = found["in_context"]
    assert whole.keys() == kinds[0].keys()
    assert whole["hits"] == "".join(each["hits"] for each in kinds)
    assert (whole["n"], whole["value"]) == (40, pytest.approx(sum(each["value"] for each in kinds) / 5))
    assert whole["chance"] == pytest.approx((1 / 3 + 1 / 3 + 1 / 4 + 1 / 2 + 1 / 4) / 5)
    assert whole["interval"][0] < whole["value"] < whole["interval"][1]
    assert whole["items_hash"] not in [each["items_hash"] for each in kinds]
    assert found["facts_trained"]["metric"] == "acc_norm"
    assert found["facts_trained"]["items_hash"] != found["facts_heldout"]["items_hash"]
    assert found["facts_trained"]["chance"] == 0.25


def test_a_model_that_stories_trained_sees_whole_items(data_dir):
    """Vocabulary 512, context 512: an item is not cut, and choices of one kind are as many tokens."""
    import tokenizer
    tok = tokenizer.load(data_dir / "models/stories260K")
    longest = hf.open_base(data_dir / "models/stories260K").config.max_position_embeddings
    for name, items in make_context_items(0, 50).items():
        for item in items:
            assert max(len(tok.encode(f"{item.context} {choice}")) for choice in item.choices) < longest / 4
            if name != "in_context.parity":
                assert len({len(tok.encode(f"-> {choice}")) for choice in item.choices}) == 1
