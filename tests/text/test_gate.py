"""Truth: the rules as the papers print them, each with a text that breaks it; real corpora (NANOCPT_DATA).
Law: every document that goes in is accounted for.
"""

import json
import re
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from documents import CODE, NOTE, STATUTE, command, read, records, scores_of, some_documents, write_jsonl

from clean import Settings, clean_corpus
from core.cli import Reading
from text.corpus import read_input
from text.gate import PRESETS, SAMPLES, WEIGHTS, compute_quality, find_broken

BASE = " ".join([NOTE, STATUTE.replace("\n", " ")])


BAD = {     # preset, score: a text that breaks it
    ("web", "words"): "a good sentence of words. " * 1, ("web", "mean_word_length"): "a b c d e f g of the be. " * 30,
    ("web", "hash_ratio"): BASE + " #tag" * 40, ("web", "ellipsis_ratio"): BASE + " well..." * 40,
    ("web", "bullet_lines"): "\n".join("- " + s for s in BASE.split(". ")),
    ("web", "ellipsis_lines"): "\n".join(s + "..." for s in BASE.split(". ")),
    ("web", "alpha_words"): BASE + " 12 34 56" * 40,
    ("web", "stop_words"): "Is it for London? Lorry driver sought. " * 20,
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


def test_a_limit_itself_is_within_the_limits():
    rules = {"words": (50, 100), "quality": (0.5, None), "pii": (None, 5)}
    for words, quality, pii, broken in ((50, 0.5, 5, []), (100, 1.0, 0, []), (49, 0.4999, 6, list(rules)),
                                        (101, 0.5, 5, ["words"])):
        assert find_broken({"words": words, "quality": quality, "pii": pii}, rules) == broken


def test_quality_is_the_weighted_mean_of_what_was_computed():
    parts = {"format": 0.8, "content": 0.5}
    assert compute_quality(parts) == pytest.approx((0.2 * 0.8 + 0.3 * 0.5) / 0.5, abs=1e-4)
    parts |= {"perplexity_score": 0.4, "relevance": 1.0}
    assert compute_quality(parts) == pytest.approx(0.3 * 0.4 + 0.2 * 0.8 + 0.3 * 0.5 + 0.2 * 1.0, abs=1e-4)
    assert compute_quality(parts, {**WEIGHTS, "perplexity_score": 0, "content": 0}) == pytest.approx(0.9, abs=1e-4)
    assert compute_quality({}) == 0


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
    texts = [t["text"] for t in read_input([str(data_dir / "corpora/legal_en_dc/dc_code_title16.txt")], Reading())]
    assert kept_share(tmp_path, texts, "legal") >= 0.95 > 0.5 > kept_share(tmp_path, texts, "web")


def sections(path, mark: str) -> list[str]:
    """The parts of a file that begin with a mark and have 300 characters or more."""
    parts = re.split(rf"\n+(?={mark})", path.read_text(encoding="utf-8"))
    return [part.strip() for part in parts if len(part.strip()) >= 300]


def test_legal_keeps_95_percent_of_german_law_in_markdown(tmp_path):
    # Sections of the Civil and the Criminal Code and of an ordinance, which as official works are nobody's (§ 5 UrhG).
    texts = sections(Path(__file__).parent / "german_law.md", "#+ § ")
    assert len(texts) > 10
    assert kept_share(tmp_path, texts, "legal") >= 0.95
    assert kept_share(tmp_path, texts, "medical") >= 0.95
    # The marks of the headings change no score that counts words.
    for text in texts:
        bare = re.sub(r"(?m)^#+ ", "", text)
        assert [scores_of(text, "legal")[n] for n in COUNTED] == [scores_of(bare, "legal")[n] for n in COUNTED]


def test_chinese_law_is_not_too_short_at_a_third_of_the_length_of_english(tmp_path, data_dir):
    texts = [record["text"] for name in ("civil_code", "criminal_law")
             for record in read_input([str(data_dir / f"corpora/legal_zh/{name}.txt")], Reading())]
    report = clean_corpus(records(texts), Settings("legal"), tmp_path)
    short = sum(len(text) < 34 for text in texts)
    assert abs(report["reasons"]["chars"]["dropped"] - short) < 0.01 * len(texts) < 0.2 * short
    assert report["kept"] >= 0.95 * (len(texts) - short)
    # 100 letters of English, and of Korean, which has spaces.
    for text, least in (("the law of the land " * 9, 100), ("법원은 판결을 " * 20, 100), ("法院作出判决。" * 20, 34)):
        rules, text = {"chars": PRESETS["legal"]["chars"]}, text[:least - 3] + text[:3]
        assert find_broken(scores_of(text[1:]), rules) == ["chars"]
        assert find_broken(scores_of(text), rules) == []


COUNTED = ("words", "hash_ratio", "mean_word_length", "alpha_words", "unique_words", "stop_words")


@pytest.mark.parametrize("mark", ["第[^条]+条 ", "##+ "])
def test_legal_keeps_95_percent_of_chinese_law(tmp_path, data_dir, mark):
    texts = [text for name in ("civil_code", "criminal_law")
             for text in sections(data_dir / f"corpora/legal_zh/{name}.txt", mark)]
    assert len(texts) > 40
    assert kept_share(tmp_path, texts, "legal") >= 0.95


def test_tables_in_markdown_are_counted_by_their_words():
    rows = [("metformin", "500 mg"), ("lisinopril", "10 mg"), ("atorvastatin", "20 mg"), ("amlodipine", "5 mg")]
    table = "| drug | dose |\n|:---|---:|\n" + "\n".join(f"| {drug} | {dose} |" for drug, dose in rows)
    found = scores_of(f"## Drugs\n\n{table}", "medical")
    assert found["words"] == 1 + 2 + 3 * len(rows)
    assert found["alpha_words"] == pytest.approx((3 + 2 * len(rows)) / found["words"], abs=1e-4)
    assert "alpha_words" not in find_broken(found, PRESETS["medical"])


def test_rules_without_meaning_for_a_language_are_named_and_not_applied(tmp_path, monkeypatch, capsys):
    chinese = "第六百零七条 出卖人按照约定将标的物运送至买受人指定地点并交付给承运人后，风险由买受人承担。" * 3
    lithuanian = "Visi žmonės gimsta laisvi ir lygūs savo orumu ir teisėmis. Jiems suteiktas protas ir sąžinė. " * 3
    source = write_jsonl(tmp_path / "in.jsonl", records([chinese, lithuanian, BASE]))
    assert command(monkeypatch, source, "--preset", "web", "--out", tmp_path / "out") == 0
    off = read(tmp_path / "out")[2]["not_applied"]
    assert set(off["zh"]) == {"mean_word_length", "alpha_words", "stop_words", "top_2gram", "top_3gram", "top_4gram",
                              *(f"dup_{n}gram" for n in range(5, 10))}
    assert off["unknown"] == {"stop_words": 1}
    assert "en" not in off
    assert "not applied in unknown (1 parts), for want of such scores: stop_words" in capsys.readouterr().out


def test_domain_presets_keep_95_percent_of_abstracts(tmp_path, data_dir):
    table = json.loads((data_dir / "corpora/medical_pubmedqa/ori_pqal.json").read_text())
    texts = ["\n".join([r["QUESTION"], *r["CONTEXTS"], r["LONG_ANSWER"]]) for r in list(table.values())[:400]]
    assert kept_share(tmp_path, texts, "medical") >= 0.95


def test_domain_presets_keep_95_percent_of_the_standard_library(tmp_path):
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[::3]
    texts = [f.read_text(encoding="utf-8") for f in files]
    texts = [t for t in texts if len(t) >= 100]
    assert kept_share(tmp_path, texts, "code") >= 0.95 > 0.1 > kept_share(tmp_path, texts, "web")


# ---- the report

def test_the_report_adds_up(tmp_path):
    rows = [{**r, "metadata": {"source": f"s{i % 3}", "domain": "law" if i % 2 else ""}} for i, r in enumerate(
        records([*some_documents(), "\n\n".join([STATUTE] * 10)]))]
    report = clean_corpus(rows, Settings("legal", max_chars=2000), tmp_path)
    kept, dropped, on_disk = read(tmp_path)
    assert on_disk == {key: value for key, value in json.loads(json.dumps(report)).items() if key in on_disk}
    assert report["documents"] == len(rows)
    assert report["parts"] == len(kept) + len(dropped) > len(rows)
    assert (report["kept"], report["dropped"]) == (len(kept), len(dropped))
    for table in report["statistics"].values():
        for key, total in (("parts", report["parts"]), ("kept", len(kept)), ("documents", len(rows)),
                           ("bytes_kept", sum(len(r["text"].encode()) for r in kept))):
            assert sum(row[key] for row in table.values()) == total, key
    assert set(report["statistics"]["source"]) == {"s0", "s1", "s2"}
    assert set(report["statistics"]["domain"]) == {"law", "legal"}
    for name, row in report["reasons"].items():
        assert row["dropped"] == sum(name in r["metadata"]["dropped"] for r in dropped)
        assert row["only_reason"] == sum(r["metadata"]["dropped"] == [name] for r in dropped)
        assert len(report["samples"].get(name, [])) == min(SAMPLES, row["dropped"])
    assert len(report["samples"]["kept"]) == SAMPLES
    assert report["pii"]["email"] == sum(r["text"].count("<EMAIL>") for r in kept + dropped) > 0
    assert all("dropped" not in r["metadata"] for r in kept)


def test_half_a_surrogate_pair_in_id_source_or_domain_stops_no_report(tmp_path):
    row = {"text": STATUTE, "id": "\ud800", "metadata": {"source": "a\udfff", "domain": "\ud800"}}
    clean_corpus([row], Settings("legal"), tmp_path)
    kept, _, report = read(tmp_path)
    assert kept[0]["id"] == "\ufffd"
    assert list(report["statistics"]["source"]) == ["a\ufffd"]
