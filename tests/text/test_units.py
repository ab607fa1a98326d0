"""Truth: what minhash gives of each text alone; for benchmarks, cases made by hand in every kind of file, and a set of
13-tuples of words over real ones (NANOCPT_DATA). Law: files are read as one, whatever the batches.
"""

import gzip
import json
import re

import numpy as np
from similar_texts import dedup, random_texts, read_jsonl, records_of, write_jsonl
from tqdm import tqdm

from core.cli import Reading
from core.pool import WorkerPool
from text.minhash import compute_band_keys, fold_words, hash_ngrams
from text.units import Store, find_exact, sign_file, split_paragraphs


def test_units_of_several_files_come_back_as_one(tmp_path):
    texts = [*random_texts(700, seed=9), "", "one\n\ntwo words"]
    stems = [tmp_path / name for name in "ab"]
    with WorkerPool(1, (None, "text", False)) as pool, tqdm(disable=True) as bar:
        for k, stem in enumerate(stems):
            path = write_jsonl(tmp_path / f"{k}.jsonl", records_of(texts)[k::2])
            assert sign_file(path, stem, Reading(), pool, bar) == len(texts[k::2])
            assert sign_file("not read again", stem, Reading(), pool, bar) == len(texts[k::2])
    store, texts = Store(stems), texts[::2] + texts[1::2]
    hashes = hash_ngrams([fold_words(text) for text in texts], 5)
    for unit in (0, 1, 350, 351, 352, len(texts) - 1):
        assert np.array_equal(store.read_shingles(unit), np.unique(hashes[unit]))
    assert {store.read_id(unit) for unit in range(len(texts))} == {f"d{i}" for i in range(len(texts))}
    keys = compute_band_keys(hashes)
    assert all(np.array_equal(store.read_band(band), keys[:, band]) for band in (0, 13))
    first, best = find_exact(store.units)
    folded = [fold_words(text) for text in texts]
    assert [folded[unit] for unit in first] == folded
    assert len(best) == len(set(folded)) < len(texts)
    lengths = [len(folded[unit]) for unit in best]
    assert lengths == sorted(lengths, reverse=True)


def test_paragraphs_are_units_and_short_ones_are_no_candidates(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", records_of(["Intro\n \n\na paragraph of six whole words\n"]))
    with WorkerPool(1, (None, "text", True)) as pool, tqdm(disable=True) as bar:
        sign_file(path, tmp_path / "a", Reading(), pool, bar)
    store = Store([tmp_path / "a"])
    assert store.units["candidate"].tolist() == [False, True]
    assert [store.read_id(unit) for unit in (0, 1)] == ["d0#0", "d0#1"]


def test_paragraphs_and_their_breaks_join_to_the_text():
    for text in ("a\n\nb\n \n\t\nc", "\n\na\n", "", "a\nb"):
        assert "".join(split_paragraphs(text)) == text
    assert split_paragraphs("a\n\nb\n \nc\nd") == ["a", "\n\n", "b", "\n \n", "c\nd"]


# ---- overlaps with benchmarks

def write_benchmarks(folder) -> dict:
    """One long item in every kind of file; {file: its text}."""
    texts = {f"b{i}": " ".join(f"{'abcdefg'[i]}{j}" for j in range(20)) for i in range(6)}
    write_jsonl(folder / "b0.jsonl", [{"question": "short"}, {"choices": {"text": ["x", texts["b0"]]}, "n": 3}])
    (folder / "b1.csv").write_text(f'question,A\n"{texts["b1"]}, ""quoted""",B\n')
    with gzip.open(folder / "b2.jsonl.gz", "wt") as file:
        file.write(json.dumps({"prompt": texts["b2"]}) + "\n")
    (folder / "b3.txt").write_text(f"first block\n\n{texts['b3']}\n")
    (folder / "b4.json").write_text(json.dumps({"17": {"context": [texts["b4"]]}}))
    import pyarrow
    import pyarrow.parquet as parquet
    parquet.write_table(pyarrow.table({"n": [1], "q": [texts["b5"]]}), folder / "b5.parquet")
    return {next(folder.glob(f"{name}.*")): text for name, text in texts.items()}


def test_decontamination_by_file_type_and_edge(tmp_path):
    benchmarks = write_benchmarks(tmp_path)
    texts = []
    for text in benchmarks.values():
        listed = text.split()
        texts += ["before " + " ".join(listed[3:16]).upper().replace(" ", ",\n") + ". after",      # 13 words in a row
                  "before " + " ".join(listed[3:15]) + " other " + " ".join(listed[16:]) + " after"]       # 12
    path = write_jsonl(tmp_path / "in.jsonl", records_of(texts))
    report = dedup([path], tmp_path / "out", against=benchmarks)
    rows = read_jsonl(tmp_path / "out" / "removed.jsonl")
    assert [r["id"] for r in rows] == [f"d{i}" for i in range(0, 12, 2)]
    assert [r["id"] for r in read_jsonl(tmp_path / "out" / "kept.jsonl")] == [f"d{i}" for i in range(1, 12, 2)]
    item = {"b0": 2, "b1": 2, "b2": 1, "b3": 2, "b4": 1, "b5": 1}
    for row, file in zip(rows, benchmarks):
        assert row["reason"] == "contaminated"
        assert row["duplicate_of"] == f"{file}:{item[file.name[:2]]}"
        grams = 9 if file.name == "b1.csv" else 8                        # "quoted" is a word of that field
        assert row["overlaps"] == [{"item": row["duplicate_of"], "ngrams": 1, "share": round(1 / grams, 4)}]
        assert report["against"][str(file)]["found"] == 1
    assert report["against"][str(tmp_path / "b0.jsonl")] == {"items": 2, "too_short": 1, "found": 1}


def test_decontamination_against_real_benchmarks(data_dir, tmp_path):
    """Items planted in stories are found; the truth is a set of 13-tuples. The clean copy of one stays."""
    files = [data_dir / "bench" / "gsm8k" / "test.jsonl", data_dir / "bench" / "humaneval" / "HumanEval.jsonl.gz",
             data_dir / "bench" / "mmlu" / "test" / "jurisprudence_test.csv"]
    questions = [json.loads(line)["question"] for line in files[0].read_text(encoding="utf-8").splitlines()]
    stories = (data_dir / "corpora" / "tinystories" / "tinystories_sample_2MiB.txt").read_text(encoding="utf-8")
    stories = [s.strip() for s in stories.split("<|endoftext|>") if len(s.split()) > 80][:300]
    texts = [f"{story}\n{questions[i]}" if i % 10 == 0 else story for i, story in enumerate(stories)]
    path = write_jsonl(tmp_path / "in.jsonl", records_of([*texts, stories[0]]))

    def tuples(text):
        listed = re.findall(r"\w+", text.lower())
        return {tuple(listed[i:i + 13]) for i in range(len(listed) - 12)}
    grams = set().union(*map(tuples, questions))
    wanted = {f"d{i}" for i, text in enumerate(texts) if tuples(text) & grams}
    assert len(wanted) >= 29
    dedup([path], tmp_path / "out", against=files, workers=2)
    rows = [r for r in read_jsonl(tmp_path / "out" / "removed.jsonl") if r["reason"] == "contaminated"]
    assert {r["id"] for r in rows} == wanted
    numbers = {int(r["duplicate_of"].rpartition(":")[2]) for r in rows if str(files[0]) in r["duplicate_of"]}
    assert len(numbers - {10 * i + 1 for i in range(30)}) <= 1           # item = line of the file
    assert f"d{len(texts)}" in {r["id"] for r in read_jsonl(tmp_path / "out" / "kept.jsonl")}
