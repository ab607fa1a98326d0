"""Truth: Python sets of word tuples; datasketch's MinHash; the banding's formula; the verdict's example by hand; what
MinHash gives of each text alone; for benchmarks, cases made by hand in every kind of file, and a set of 13-tuples of
words over real ones (NANOCPT_DATA). Law: files are read as one, whatever the batches.
"""

import gzip
import itertools
import json
import random
import re

import numpy as np
import pytest
from similar_texts import (
    all_similar,
    dedup,
    edited,
    found_share,
    random_texts,
    read_jsonl,
    records_of,
    shingle_set,
    write_jsonl,
)
from tqdm import tqdm

from core.cli import Reading
from core.pool import WorkerPool
from text.duplicates import (
    BANDS,
    ROWS,
    Benchmarks,
    Store,
    compute_band_keys,
    compute_signatures,
    find_exact,
    fold_words,
    hash_ngrams,
    jaccard,
    keep_best,
    link_band,
    sign_file,
    split_paragraphs,
)


def test_band_keys_meet_as_often_as_the_formula_says():
    rng, n, size = np.random.default_rng(0), 3000, 360
    for s in (0.6, 0.8, 0.9):
        common = round(2 * size * s / (1 + s))
        pool = rng.integers(2**64, size=(n, 2 * size - common), dtype=np.uint64)
        a, b = pool[:, :size], pool[:, size - common:]
        exact = common / (2 * size - common)
        ka, kb = (compute_band_keys(list(np.sort(x, axis=1))) for x in (a, b))
        for share, p in (((ka == kb).any(1).mean(), found_share(exact)), ((ka == kb).mean(), exact**8)):
            assert abs(share - p) < 4 * (p * (1 - p) / n) ** 0.5 + 1e-3, (s, share, p)


def test_estimates_agree_with_datasketch_within_sampling_error():
    datasketch = pytest.importorskip("datasketch")
    rng, ours, theirs, exact = random.Random(0), [], [], []
    for _ in range(120):
        listed = [f"w{rng.randrange(5000)}" for _ in range(150)]
        texts = [" ".join(listed), edited(" ".join(listed), rng.choice((0.01, 0.03, 0.06, 0.1)), rng)]
        a, b = compute_signatures(hash_ngrams([fold_words(t) for t in texts], 5))
        sketches = [datasketch.MinHash(num_perm=BANDS * ROWS) for _ in texts]
        for sketch, text in zip(sketches, texts):
            sketch.update_batch([" ".join(shingle).encode() for shingle in shingle_set(text)])
        ours.append(float((a == b).mean()))
        theirs.append(sketches[0].jaccard(sketches[1]))
        exact.append(all_similar(texts, 0)[0, 1])
    ours, theirs, exact = map(np.array, (ours, theirs, exact))
    sigma = (exact * (1 - exact) / (BANDS * ROWS)) ** 0.5
    assert (abs(ours - exact) < 4.5 * sigma).all()
    assert (abs(ours - theirs) < 4.5 * 2**0.5 * sigma).all()
    assert abs((ours - exact).mean()) < 4 * (sigma**2).sum() ** 0.5 / len(sigma)
    assert 0.8 < ((ours - exact) / sigma).std() < 1.2                    # as widely spread as independent rows are


def test_shingle_sets_and_similarity_against_python_sets():
    texts = [*random_texts(60, seed=4), "", "one", "one two", "a a a a a a a a a", "one two three four",
             "one two three four five"]
    sets = hash_ngrams([fold_words(t) for t in texts], 5)
    truths = [shingle_set(t) if t else set() for t in texts]
    unique = [np.unique(s) for s in sets]
    assert [len(s) for s in unique] == [len(t) for t in truths]
    for i, j in itertools.combinations([i for i, t in enumerate(texts) if t], 2):
        assert jaccard(unique[i], unique[j]) == len(truths[i] & truths[j]) / len(truths[i] | truths[j])
    alone = [hash_ngrams([fold_words(t)], 5)[0] for t in texts]              # a batch changes nothing
    assert all(np.array_equal(a, b) for a, b in zip(sets, alone))
    assert np.array_equal(compute_band_keys(sets), np.concatenate([compute_band_keys([s]) for s in alone]))


def test_normalise():
    assert fold_words("The  LAW,\r\n§ 5\t(a)") == "the law, § 5 (a)"
    assert fold_words("Straße Cafe\u0301") == fold_words("STRASSE CAFÉ")
    assert fold_words("漢字とkana is") == "漢 字 と kana is"
    assert fold_words("漢\n字") == fold_words("漢字")
    assert fold_words("กขค") == "ก ข ค"
    assert fold_words("a\ud800b") == "a\ufffdb"


def test_the_verdict_removes_no_chain():
    """The example of keep_best: 0 and 1, 1 and 2 are similar, 0 and 2 are not, and all share bands."""
    sets = [np.arange(100, dtype=np.uint64), np.arange(5, 105, dtype=np.uint64), np.arange(16, 116, dtype=np.uint64)]
    assert jaccard(sets[0], sets[1]) > jaccard(sets[1], sets[2]) >= 0.8 > jaccard(sets[0], sets[2])
    bands = [link_band(np.array(keys, np.uint64)) for keys in ([7, 7, 9], [1, 2, 2], [5, 4, 5], [1, 2, 3])]
    assert [members.tolist() for members, _ in bands] == [[0, 1], [1, 2], [0, 2], []]
    assert [begins.tolist() for _, begins in bands] == [[True, False]] * 3 + [[]]
    assert link_band(np.array([7, 5, 7, 9, 5, 7], np.uint64))[1].tolist() == [True, False, True, False, False]
    stays, similarity, compared = keep_best(bands, 3, sets.__getitem__, 0.8)
    assert stays.tolist() == [0, 0, 2]
    assert similarity.tolist() == [1, jaccard(sets[0], sets[1]), 1]
    assert compared == 2, "2 is not compared with 1, which is gone"


# ---- units on disk

def test_units_of_several_files_come_back_as_one(tmp_path):
    texts = [*random_texts(700, seed=9), "", "one\n\ntwo words"]
    folders = [tmp_path / name for name in "ab"]
    with WorkerPool(1, (None, "text", False)) as pool, tqdm(disable=True) as bar:
        for k, folder in enumerate(folders):
            path = write_jsonl(tmp_path / f"{k}.jsonl", records_of(texts)[k::2])
            assert sign_file(path, folder, Reading(), pool, bar) == len(texts[k::2])
            assert sign_file("not read again", folder, Reading(), pool, bar) == len(texts[k::2])
    store, texts = Store(folders), texts[::2] + texts[1::2]
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


def test_a_paragraph_of_five_words_is_a_candidate(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", records_of(["has just five words here\n\nthis has only four"]))
    with WorkerPool(1, (None, "text", True)) as pool, tqdm(disable=True) as bar:
        sign_file(path, tmp_path / "a", Reading(), pool, bar)
    assert Store([tmp_path / "a"]).units["candidate"].tolist() == [True, False]


def test_a_pair_at_the_threshold_itself_is_a_pair():
    """8 of 10 shingles in common."""
    sets = [np.arange(9, dtype=np.uint64), np.arange(1, 10, dtype=np.uint64)]
    bands = [link_band(np.array([7, 7], np.uint64))]
    assert keep_best(bands, 2, sets.__getitem__, 0.8)[0].tolist() == [0, 0]
    assert keep_best(bands, 2, sets.__getitem__, 0.81)[0].tolist() == [0, 1]


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


def test_the_ten_items_of_which_a_text_holds_most(tmp_path):
    """Item i has 30 words, and the text the first 13 + i of them: i + 1 of its 18 grams."""
    items = [[f"i{i}w{j}" for j in range(30)] for i in range(12)]
    write_jsonl(tmp_path / "b.jsonl", [{"q": " ".join(words)} for words in items])
    text = " - ".join(" ".join([*words[:13 + i], f"end{i}"]) for i, words in enumerate(items))
    found = Benchmarks([str(tmp_path / "b.jsonl")], Reading()).find_overlaps(text)
    assert found == [{"item": f"{tmp_path / 'b.jsonl'}:{i + 1}", "ngrams": i + 1, "share": round((i + 1) / 18, 4)}
                     for i in range(11, 1, -1)]


def test_thirteen_words_are_enough_and_twelve_are_not(tmp_path):
    """The item, the document, or both have just so many words."""
    words = [f"w{i}" for i in range(13)]
    write_jsonl(tmp_path / "thirteen.jsonl", [{"q": " ".join(words)}])
    write_jsonl(tmp_path / "twelve.jsonl", [{"q": " ".join(words[:12])}])
    write_jsonl(tmp_path / "more.jsonl", [{"q": f"before {' '.join(words)} after"}])
    for name, items, found in (("thirteen", 1, True), ("more", 1, True), ("twelve", 0, False)):
        benchmarks = Benchmarks([str(tmp_path / f"{name}.jsonl")], Reading())
        assert benchmarks.files[str(tmp_path / f"{name}.jsonl")] == {"items": 1, "too_short": 1 - items}
        for text in (" ".join(words), f"x {' '.join(words)}", f"x {' '.join(words)} y"):
            assert bool(benchmarks.find_overlaps(text)) == found, (name, text)
        assert not benchmarks.find_overlaps(" ".join(words[:12]))
        assert not benchmarks.find_overlaps(f"x {' '.join(words[1:])}")


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
