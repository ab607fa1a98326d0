"""Truth: the rules as the papers print them, each with a text that breaks it; real corpora (NANOCPT_DATA)."""

import json
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from documents import CODE, NOTE, STATUTE, read, records, scores_of

from clean import Settings, clean_corpus
from core.cli import Reading
from text.records import read_input
from text.rules import PRESETS, find_broken
from text.scores import compute_quality

BASE = " ".join([NOTE, STATUTE.replace("\n", " ")])


BAD = {     # preset, score: a text that breaks it
    ("web", "words"): "a good sentence of words. " * 1, ("web", "mean_word_length"): "a b c d e f g of the be. " * 30,
    ("web", "hash_ratio"): BASE + " #tag" * 40, ("web", "ellipsis_ratio"): BASE + " well..." * 40,
    ("web", "bullet_lines"): "\n".join("- " + s for s in BASE.split(". ")),
    ("web", "ellipsis_lines"): "\n".join(s + "..." for s in BASE.split(". ")),
    ("web", "alpha_words"): BASE + " 12 34 56" * 40, ("web", "stop_words"): "Lorry driver sought London. " * 20,
    ("web", "dup_lines"): "\n".join([NOTE] * 3), ("web", "dup_paragraphs"): "\n\n".join([NOTE] * 3),
    ("web", "dup_line_chars"): "\n".join([NOTE] * 2), ("web", "dup_paragraph_chars"): "\n\n".join([NOTE] * 2),
    ("web", "top_2gram"): "the court " * 60, ("web", "top_3gram"): "the court of " * 60,
    ("web", "top_4gram"): "the court of law " * 60,
    **{("web", f"dup_{n}gram"): " ".join([NOTE] * 2) for n in range(5, 11)},
    ("web", "sentences"): BASE.replace(".", ","), ("web", "lorem_ipsum"): BASE + " Lorem ipsum dolor.",
    ("web", "curly_brackets"): BASE + " a set { of the things }.", ("web", "terminal_lines"): BASE.replace(".", "\n"),
    ("web", "short_lines"): "\n".join(" ".join(BASE.split()[i:i + 3]) for i in range(0, 150, 3)),
    ("web", "newlines_per_word"): "\n".join(" ".join(BASE.split()[i:i + 3]) for i in range(0, 150, 3)),
    ("web", "boilerplate"): "\n".join([BASE, *["Sign up for our newsletter and get all the latest news today"] * 9]),
    ("legal", "chars"): "§ 16-301.", ("legal", "pii"): BASE + " a@b.org c@d.org e@f.org g@h.org i@j.org k@l.org",
    ("legal", "compression"): "the same words again " * 2000, ("legal", "quality"): "12 12 12 " * 100,
    ("legal", "code_ratio"): CODE * 3, ("medical", "code_ratio"): CODE * 3, ("books", "code_ratio"): CODE * 3,
    ("medical", "alpha_words"): "12 34 56 78 " * 40 + "mg", ("medical", "hash_ratio"): NOTE + " # # #" * 30,
    ("code", "max_line"): CODE + "x = '" + "a" * 1001 + "'\n",
    ("code", "mean_line"): ("x = " + "1 + " * 40 + "1\n") * 9,
    ("code", "alnum"): "x = [\n" + "    (-+*/, [], {}),\n" * 30 + "]\n", ("code", "lines"): "x\n" * 20_001,
    ("books", "words"): NOTE[:200], ("books", "top_2gram"): "the court " * 60,
}


@pytest.mark.parametrize(("preset", "name"), BAD)
def test_each_filter_drops_what_it_should_and_keeps_clean_text(preset, name):
    scores = scores_of(BAD[preset, name], preset)
    scores["quality"] = compute_quality(scores)
    assert name in find_broken(scores, PRESETS[preset]), (name, scores.get(name))
    for text in {"code": [CODE], "web": [NOTE, BASE], "books": [BASE]}.get(preset, [STATUTE, NOTE]):
        good = scores_of(text, preset)
        good["quality"] = compute_quality(good)
        assert name not in find_broken(good, PRESETS[preset]), (name, good.get(name))


def test_every_rule_of_the_web_and_code_presets_has_a_negative_case():
    assert {name for preset, name in BAD} >= set(PRESETS["web"]) | set(PRESETS["code"]) | {"code_ratio"}


def test_web_rules_destroy_domain_text_and_the_domain_presets_do_not():
    drug_list = "\n".join(f"{name} {dose} mg" for dose in (5, 10, 20) for name in
                          ("metformin", "lisinopril", "atorvastatin", "amlodipine", "omeprazole", "ramipril"))
    for text, preset in ((STATUTE, "legal"), (drug_list, "medical"), (CODE, "code")):
        scores = scores_of(text, preset)
        scores["quality"] = compute_quality(scores)
        assert find_broken(scores, PRESETS["web"])
        assert not find_broken(scores, PRESETS[preset]), find_broken(scores, PRESETS[preset])


def test_percentile_limits_cut_their_share_on_both_sides(tmp_path):
    texts = [NOTE + " word" * i for i in range(100)]
    clean_corpus(records(texts), Settings("legal"), tmp_path, rules={"words": ("p5", "p90")})
    kept, dropped, report = read(tmp_path)
    words = [len(t.split()) for t in texts]
    low, high = np.percentile(words, 5), np.percentile(words, 90)
    assert [r["id"] for r in kept] == [str(i) for i, w in enumerate(words) if low <= w <= high]
    assert len(dropped) == 15
    assert report["reasons"]["words"] == {"limits": [low, high], "dropped": 15, "only_reason": 15}


def kept_share(folder, texts, preset) -> float:
    report = clean_corpus(records(texts), Settings(preset), folder / preset)
    return report["kept"] / report["parts"]


def test_domain_presets_keep_95_percent_of_statutes(tmp_path, data_dir):
    texts = [t["text"] for t in read_input(str(data_dir / "corpora/legal_en_dc/dc_code_title16.txt"), Reading())]
    assert kept_share(tmp_path, texts, "legal") >= 0.95 > 0.5 > kept_share(tmp_path, texts, "web")


def test_domain_presets_keep_95_percent_of_abstracts(tmp_path, data_dir):
    table = json.loads((data_dir / "corpora/medical_pubmedqa/ori_pqal.json").read_text())
    texts = ["\n".join([r["QUESTION"], *r["CONTEXTS"], r["LONG_ANSWER"]]) for r in list(table.values())[:400]]
    assert kept_share(tmp_path, texts, "medical") >= 0.95


def test_domain_presets_keep_95_percent_of_the_standard_library(tmp_path):
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[::3]
    texts = [f.read_text(encoding="utf-8") for f in files]
    texts = [t for t in texts if len(t) >= 100]
    assert kept_share(tmp_path, texts, "code") >= 0.95 > 0.1 > kept_share(tmp_path, texts, "web")
