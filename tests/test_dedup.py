"""Truth: brute force over all pairs with Python sets of word tuples, on real text with planted copies; a plain loop
over the ranking; hand-made cases. Laws: what is removed is similar enough to something kept; neither order, nor
workers, nor a kill changes the result.
"""

import gzip
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from hashlib import blake2b
from pathlib import Path

import pytest
from kill_points import run_and_kill, trace
from similar_texts import (
    all_similar,
    dedup,
    edited,
    found_share,
    random_texts,
    read_jsonl,
    records_of,
    spoken,
    write_jsonl,
)

import dedup as module
from core.cli import Reading
from text.duplicates import compute_band_keys, fold_words, hash_ngrams

ROOT = Path(__file__).parent.parent


def results(out) -> tuple[list, list]:
    """The lines of kept.jsonl and removed.jsonl, sorted."""
    return tuple(sorted(Path(out, name).read_bytes().splitlines()) for name in ("kept.jsonl", "removed.jsonl"))


@pytest.fixture(scope="module")
def planted(data_dir) -> list[str]:
    """2,000 documents of four real corpora, 900 of them planted copies in nine ways."""
    corpora, rng = data_dir / "corpora", random.Random(0)
    wiki = (corpora / "wikitext2" / "wiki.test.raw").read_text(encoding="utf-8").splitlines()
    law = re.split(r"\n\s*\n", (corpora / "legal_en_dc" / "dc_code_title16.txt").read_text(encoding="utf-8"))
    stories = (corpora / "tinystories" / "tinystories_sample_2MiB.txt").read_text(encoding="utf-8")
    medicine = json.loads((corpora / "medical_pubmedqa" / "ori_pqal.json").read_text(encoding="utf-8"))
    sources = [wiki, law, stories.split("<|endoftext|>"), ["\n".join(m["CONTEXTS"]) for m in medicine.values()]]
    base = []
    for source in sources:
        long = [text.strip() for text in source if 60 <= len(text.split()) <= 600]
        base += rng.sample(long, 275)
    ways = [lambda t: t, lambda t: "\n".join(t.split()), str.upper,
            lambda t: f"Updated on {rng.randrange(28)} May {rng.randrange(1990, 2030)} by the editor\n\n{t}",
            *(lambda t, share=share: edited(t, share, rng) for share in (0.005, 0.01, 0.015, 0.02, 0.03))]
    copies = [ways[i % 9](text) for i, text in enumerate(rng.sample(base, 900))]
    texts = base + copies
    rng.shuffle(texts)
    assert len(texts) == 2000
    return texts


@pytest.fixture(scope="module")
def truth(planted) -> dict:
    return all_similar(planted, 0.5)


def test_planted_copies_in_real_text_against_brute_force(planted, truth, tmp_path):
    report = dedup([write_jsonl(tmp_path / "all.jsonl", records_of(planted))], tmp_path / "out")
    kept = {int(r["id"][1:]) for r in read_jsonl(tmp_path / "out" / "kept.jsonl")}
    removed = {int(r["id"][1:]): r for r in read_jsonl(tmp_path / "out" / "removed.jsonl")}
    assert kept | removed.keys() == set(range(2000))
    assert not kept & removed.keys()
    assert report["kept"] == len(kept)
    assert report["exact"] + report["near"] == len(removed)

    for number, row in removed.items():                                  # nothing removed below the threshold
        other = int(row["duplicate_of"][1:])
        assert other in kept
        s = truth[min(number, other), max(number, other)]
        assert s >= 0.8
        assert row["similarity"] == pytest.approx(s, abs=1e-6)
        assert (row["reason"] == "exact") == (spoken(planted[number]) == spoken(planted[other]))

    same = {}
    for number, text in enumerate(planted):                              # every exact copy found
        same.setdefault(tuple(spoken(text)), []).append(number)
    assert sum(len(group) - 1 for group in same.values()) >= 250
    assert all(len(kept.intersection(group)) <= 1 for group in same.values())

    close = [pair for pair, s in truth.items() if s >= 0.9]
    missed = [pair for pair in close if kept.issuperset(pair)]
    assert len(close) > 500
    assert len(missed) <= 0.01 * len(close)

    near = {pair: s for pair, s in truth.items() if 0.8 <= s < 0.9}
    wanted = sum(map(found_share, near.values()))
    sigma = sum(found_share(s) * (1 - found_share(s)) for s in near.values()) ** 0.5
    assert len(near) > 100
    assert sum(not kept.issuperset(pair) for pair in near) >= wanted - 3 * sigma


@pytest.mark.parametrize("threshold", [0.6, 0.8])
def test_what_is_kept_is_what_a_plain_loop_over_the_ranking_keeps(threshold, tmp_path):
    texts = random_texts(600, seed=1, copies=0.6)
    similar = all_similar(texts, threshold)
    keys = compute_band_keys(hash_ngrams([fold_words(t) for t in texts], 5))
    ties = [int.from_bytes(blake2b(t.encode(), digest_size=8).digest(), "little") for t in texts]
    ranking = sorted(range(600), key=lambda i: (-len(texts[i]), ties[i], i))
    kept, target = [], {}
    for i in ranking:
        close = (j for j in kept if (min(i, j), max(i, j)) in similar and (keys[i] == keys[j]).any())
        target[i] = next(close, i)
        if target[i] == i:
            kept.append(i)
    dedup([write_jsonl(tmp_path / "a.jsonl", records_of(texts))], tmp_path / "out", threshold=threshold)
    assert {r["text"] for r in read_jsonl(tmp_path / "out" / "kept.jsonl")} == {texts[i] for i in kept}
    rows = read_jsonl(tmp_path / "out" / "removed.jsonl")
    assert all(texts[int(r["duplicate_of"][1:])] == texts[target[int(r["id"][1:])]] for r in rows)
    assert 150 < len(rows) == 600 - len(kept)


def test_no_chain_removes_what_is_unlike_the_kept_one(tmp_path):
    """a-b and b-c are similar, a-c is not: the longest goes first, c is no duplicate of a and stays."""
    listed = [f"w{i}" for i in range(100)]
    a, b, c = [f"x{i}" for i in range(10)] + listed, listed[:97] + ["end"], listed[12:97] + ["end"]
    dedup([write_jsonl(tmp_path / "a.jsonl", records_of(" ".join(t) for t in (a, b, c)))], tmp_path / "out")
    similarity = all_similar([" ".join(t) for t in (a, b, c)], 0)
    assert similarity[0, 1] >= 0.8
    assert similarity[1, 2] >= 0.8
    assert similarity[0, 2] < 0.8
    assert [r["id"] for r in read_jsonl(tmp_path / "out" / "kept.jsonl")] == ["d0", "d2"]
    assert read_jsonl(tmp_path / "out" / "removed.jsonl")[0]["duplicate_of"] == "d0"


def test_a_corpus_of_which_nothing_is_left_to_compare(tmp_path):
    bench = write_jsonl(tmp_path / "bench.jsonl", records_of(random_texts(20, seed=5)))
    corpus = write_jsonl(tmp_path / "corpus.jsonl", records_of(random_texts(20, seed=5)))
    report = dedup([corpus], tmp_path / "out", against=[bench])
    assert (report["kept"], report["contaminated"]) == (0, 20)


def test_order_files_and_workers_change_nothing(tmp_path):
    records = records_of(random_texts(1500, seed=2))
    for record in records[::7]:
        record["text"] = records[0]["text"]                              # many exact copies, told apart by their ids
    rng, seen = random.Random(3), []
    for n_files, workers in ((1, 1), (1, 2), (3, 1), (4, 3)):
        rng.shuffle(records)
        folder = tmp_path / f"{n_files}{workers}"
        folder.mkdir()
        files = [write_jsonl(folder / f"{i}.jsonl", records[i::n_files]) for i in range(n_files)]
        rng.shuffle(files)
        dedup(files, folder / "out", workers=workers)
        seen.append(results(folder / "out"))
    assert all(s == seen[0] for s in seen)
    folder = tmp_path / "31"                                             # the same files: the same bytes
    before = [(folder / "out" / n).read_bytes() for n in ("kept.jsonl", "removed.jsonl", "dedup.json")]
    dedup([str(folder / f"{i}.jsonl") for i in (2, 0, 1)], folder / "out", workers=2, overwrite=True)
    assert before == [(folder / "out" / n).read_bytes() for n in ("kept.jsonl", "removed.jsonl", "dedup.json")]


def test_everything_of_a_record_is_kept(tmp_path):
    records = [{"text": "one two three", "id": 7, "metadata": {"scores": {"a": 0.5}}, "url": "x", "n": None},
               {"text": "Straße é 漢字 🙂 \u0000 tab\t", "metadata": {}}, {"text": ""}]
    path = write_jsonl(tmp_path / "a.jsonl", records)
    dedup([path], tmp_path / "out")
    assert read_jsonl(tmp_path / "out" / "kept.jsonl") == [records[0], {**records[1], "id": f"{path}:2"},
                                                          {"text": "", "id": f"{path}:3"}]


def test_scripts_without_spaces_are_compared_by_characters(tmp_path):
    rng = random.Random(5)
    text = "".join(chr(rng.randrange(0x4E00, 0x9000)) for _ in range(200))
    texts = [text, text[:100] + "\n" + text[100:], text[:50] + "一" + text[51:], text[::-1]]
    dedup([write_jsonl(tmp_path / "a.jsonl", records_of(texts))], tmp_path / "out")
    rows = read_jsonl(tmp_path / "out" / "removed.jsonl")
    assert sorted(r["reason"] for r in rows) == ["exact", "near"]
    assert sum(r["id"] == "d3" for r in rows) == 0


def test_paragraphs(tmp_path):
    notice = "This notice stands at the end of each and every page of the manual, word for word, as it always did."
    records = records_of([f"Intro\n\nThe first text says one thing and then another.\n\n{notice}",
                          f"Intro\n\n{notice.upper()}\n  \n\n    indented code stays as it is written here\n",
                          f"{notice}", "Intro"])
    report = dedup([write_jsonl(tmp_path / "a.jsonl", records)], tmp_path / "out", paragraphs=True)
    kept = {r["id"]: r for r in read_jsonl(tmp_path / "out" / "kept.jsonl")}
    rows = read_jsonl(tmp_path / "out" / "removed.jsonl")
    holder = rows[0]["duplicate_of"]
    assert {r["id"] for r in rows} | {holder} == {"d0#2", "d1#1", "d2#0"}
    assert all(r["reason"] == "paragraph" and r["similarity"] == 1 and r["duplicate_of"] == holder for r in rows)
    assert sum(notice.lower() in r["text"].lower() for r in kept.values()) == 1
    assert kept["d3"] == records[3]                                      # a short paragraph is left alone
    if holder != "d1#1":
        assert kept["d1"]["text"] == "Intro\n\n    indented code stays as it is written here\n"
    assert all(kept[i]["metadata"] == records[int(i[1:])]["metadata"] for i in kept)
    assert (report["documents"], report["paragraph"], report["kept"]) == (4, 2, len(kept))


def test_stopped_at_any_commit_and_run_again_gives_the_same_bytes(tmp_path, monkeypatch):
    texts = random_texts(40, seed=6)
    files = [write_jsonl(tmp_path / f"{i}.jsonl", records_of(texts)[i::2]) for i in range(2)]
    bench = tmp_path / "bench.txt"
    bench.write_text(" ".join(texts[0].split()[:15]))
    names = ("kept.jsonl", "removed.jsonl", "dedup.json")
    dedup(files, tmp_path / "out", against=[bench])
    wanted = [(tmp_path / "out" / name).read_bytes() for name in names]
    replace, fsync, calls = os.replace, os.fsync, [0]

    def counted(real):
        def call(*arguments):
            calls[0] -= 1
            if calls[0] == 0:
                raise KeyboardInterrupt
            return real(*arguments)
        return call
    monkeypatch.setattr(os, "replace", counted(replace))
    monkeypatch.setattr(os, "fsync", counted(fsync))
    # A commit is three calls (the file, its name, its folder), so every fourth one is of another kind.
    for stop in range(1, 200, 4):
        out, calls[0] = tmp_path / f"out{stop}", stop
        try:
            dedup(files, out, against=[bench])
            break
        except KeyboardInterrupt:
            if (out / "dedup.json").exists():
                assert [(out / name).read_bytes() for name in names] == wanted
                break
        for done in list((out / ".dedup").glob("*"))[:stop % 2]:            # as a kill leaves a folder
            done.rename(done.with_name(f".{done.name}.partial"))
        calls[0] = 0
        dedup(files, out, against=[bench])
        assert [(out / name).read_bytes() for name in names] == wanted
        assert sorted(p.name for p in out.iterdir()) == sorted(names)
    assert stop > 24, "2 folders of 5 files, 3 results"


def test_an_input_that_changed_after_the_kill_is_read_again(tmp_path):
    texts = random_texts(60, seed=7)
    files = [write_jsonl(tmp_path / f"{i}.jsonl", records_of(texts)[i::2]) for i in range(2)]
    (tmp_path / "2.jsonl").write_text('{"text": "a"}\n{')
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        dedup([*files, tmp_path / "2.jsonl"], tmp_path / "out")
    assert len(list((tmp_path / "out" / ".dedup").glob("*/units"))) == 2, "the wrong file leaves nothing"
    write_jsonl(tmp_path / "2.jsonl", records_of(texts[:5]))
    write_jsonl(files[1], records_of(texts)[:1])
    dedup([*files, tmp_path / "2.jsonl"], tmp_path / "out")
    dedup([*files, tmp_path / "2.jsonl"], tmp_path / "new")
    assert results(tmp_path / "out") == results(tmp_path / "new")


@pytest.mark.slow
def test_a_kill_at_any_point_of_an_overwrite_loses_no_file(tmp_path, fast_disk):
    out, names, texts = tmp_path / "out", ("kept.jsonl", "removed.jsonl", "dedup.json"), random_texts(20, seed=3)
    some, more = (write_jsonl(tmp_path / f"{n}.jsonl", records_of(texts[:n])) for n in (9, 20))

    def make(file, overwrite=False):
        dedup([file], out, overwrite=overwrite)
        return {name: (out / name).read_bytes() for name in names}

    def reset():
        shutil.rmtree(out, ignore_errors=True)
        return make(some)
    old, new = reset(), make(more, True)
    reset()
    for k, operation in enumerate(trace(lambda: make(more, True), out)):
        reset()
        assert run_and_kill(lambda: make(more, True), k, out).status == -9
        for name in names:
            found = (out / name).read_bytes() if (out / name).exists() else None
            assert found in (old[name], new[name]) or (found is None and name == "dedup.json"), (operation, name)
        assert make(more, True) == new, operation
        assert sorted(path.name for path in out.iterdir()) == sorted(names)


def processes_with(word: str) -> list[str]:
    return [p for p in os.listdir("/proc") if p.isdigit() and word.encode() in _command(p)]


def _command(pid: str) -> bytes:
    try:
        return Path("/proc", pid, "cmdline").read_bytes()
    except OSError:
        return b""


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="looks for processes in /proc")
def test_a_killed_run_leaves_no_process_and_is_completed_by_the_same_command(tmp_path):
    files = [write_jsonl(tmp_path / f"{i}.jsonl", records_of(random_texts(1500, seed=i))) for i in range(3)]
    command = [sys.executable, str(ROOT / "dedup.py"), *files, "--workers", "2", "--out", str(tmp_path / "out")]
    run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list((tmp_path / "out").glob(".dedup/[!.]*")):
        assert run.poll() is None
        time.sleep(0.005)
    run.send_signal(signal.SIGKILL)
    run.wait()
    for _ in range(100):
        if not processes_with(str(tmp_path)):
            break
        time.sleep(0.05)
    assert not processes_with(str(tmp_path))
    assert not (tmp_path / "out" / "dedup.json").exists()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "4,500 documents" in done.stdout
    dedup(files, tmp_path / "straight")
    for name in ("kept.jsonl", "removed.jsonl", "dedup.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()


def refused(capsys, monkeypatch, *arguments) -> str:
    """The one line that the command ends with."""
    monkeypatch.setattr(sys, "argv", ["dedup.py", *map(str, arguments)])
    try:
        status = module.main()
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def test_mistakes_are_one_line(tmp_path, capsys, monkeypatch):
    def no(*arguments):
        return refused(capsys, monkeypatch, *arguments)
    good = write_jsonl(tmp_path / "good.jsonl", [{"text": "a b c"}])
    (tmp_path / "folder").mkdir()
    for name, data, word in (("no.jsonl", b'{"text": \n', "line 1 is not JSON"),
                             ("column.jsonl", b'{"body": "x"}\n', "'text'"),
                             ("list.jsonl", b"[1]\n", "list"), ("latin.jsonl", b'{"text": "\xe9"}\n', "utf-8"),
                             ("deep.jsonl", b"[" * 200_000 + b"\n", "recursion"),
                             ("big.jsonl", b'{"text": "a", "n": ' + b"9" * 5000 + b"}\n", "big.jsonl"),
                             ("bad.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 1000)[:-30], "bad.jsonl.gz"),
                             ("no.jsonl.gz", b"plain", "no.jsonl.gz"), ("no.jsonl.zst", b"plain", "no.jsonl.zst"),
                             ("no.parquet", b"PAR1", "no.parquet"), ("empty.jsonl", b"", "no document"),
                             ("a.csv", b"x,y\n", "no plain text"), ("a.json", b"3", "a.json"),
                             ("a.pdf", b"x", "no plain text")):
        (tmp_path / name).write_bytes(data)
        assert word in no(tmp_path / name, "--out", tmp_path / "out"), name
        assert not (tmp_path / "out" / "kept.jsonl").exists()
        if name not in ("column.jsonl", "list.jsonl", "a.csv"):
            assert name in no(good, "--out", tmp_path / "o", "--against", tmp_path / name)
    assert "no file to read" in no(tmp_path / "folder", "--out", tmp_path / "out")
    assert "does not exist" in no(tmp_path / "nothing", "--out", tmp_path / "out")
    assert "no file to read" in no(good, "--out", tmp_path / "out", "--against", tmp_path / "folder", "--overwrite")
    assert "--threshold is 1.5" in no(good, "--out", tmp_path / "out", "--threshold", 1.5)
    assert "--workers is 0, but must be at least 1" in no(good, "--out", tmp_path / "out", "--workers", 0)
    assert "--against" in no(good, "--out", tmp_path / "out", "--againts", good)
    assert "--out" in no(good)
    dedup([good], tmp_path / "done")
    assert "exists already" in no(good, "--out", tmp_path / "done")
    (tmp_path / "mine").mkdir()
    kept = write_jsonl(tmp_path / "mine" / "kept.jsonl", [{"text": "from clean.py"}])
    assert "exists already" in no(good, "--out", tmp_path / "mine")
    assert "would be overwritten" in no(kept, "--out", tmp_path / "mine", "--overwrite")
    assert Path(kept).exists()


def test_hostile_text_is_handled(tmp_path):
    texts = ["\ud800 half a pair", "half \udc00", "nul \u0000 inside", "^" * 1_000_000, "", " \n\t ", "\u3000",
             "a" * 3_000_000, "word " * 300_000, "漢" * 200_000, "\n" * 100_000 + "x", "한국어 텍스트"]
    path = write_jsonl(tmp_path / "a.jsonl", records_of(texts))
    for paragraphs in (False, True):
        out = tmp_path / f"out{paragraphs}"
        report = dedup([path], out, paragraphs=paragraphs)
        rows = read_jsonl(out / "removed.jsonl")
        assert report["documents"] == len(texts)
        assert {r["id"] for r in rows} == (set() if paragraphs else {"d5", "d6", "d4"} - {
            r["id"] for r in read_jsonl(out / "kept.jsonl")})
        assert len(rows) == (0 if paragraphs else 2)                     # the three empty ones are one document


def test_a_record_that_is_not_json_inside_a_later_batch_stops_the_run(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", records_of(random_texts(2000)))
    with open(path, "a") as file:
        file.write("{\n")
    for workers in (1, 2):
        with pytest.raises(ValueError, match="line 2001 is not JSON"):
            dedup([path], tmp_path / "out", workers=workers)


def test_a_record_too_deep_for_a_worker_is_one_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a b c", "deep": ' + "[" * 900 + "]" * 900 + "}\n")
    try:                                                                 # how deep is too deep, Python decides
        dedup([path], tmp_path / "two", workers=2)
    except ValueError as error:
        assert "nested too deeply" in str(error)                         # noqa: PT017
    assert dedup([path], tmp_path / "one")["kept"] == 1


def test_a_full_disk_is_one_line_and_the_same_command_completes_it(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", records_of(random_texts(300, seed=8)))
    words = [sys.executable, str(ROOT / "dedup.py"), path, "--workers", "2", "--out", str(tmp_path / "out")]
    bare = {name: value for name, value in os.environ.items() if not name.startswith("COV")}      # it writes files, too
    full = subprocess.run(["bash", "-c", 'ulimit -f 60; exec "$@"', "-", *words], capture_output=True, text=True,
                          env=bare)
    assert full.returncode == 2
    assert full.stderr.startswith("error: ")
    assert full.stderr.count("\n") == 1
    assert not (tmp_path / "out" / "kept.jsonl").exists()
    subprocess.run(words, check=True, capture_output=True)
    dedup([path], tmp_path / "straight")
    for name in ("kept.jsonl", "removed.jsonl", "dedup.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()


def test_parquet_text_and_other_columns(tmp_path):
    import datetime

    import pyarrow
    import pyarrow.parquet as parquet
    now = datetime.datetime(2024, 5, 1)
    parquet.write_table(pyarrow.table({"body": ["a b c", "A  b c", "d"], "id": [1, 2, 3], "at": [now] * 3}),
                        tmp_path / "a.parquet")
    dedup([tmp_path / "a.parquet"], tmp_path / "out", reading=Reading(column="body"))
    kept = read_jsonl(tmp_path / "out" / "kept.jsonl")
    assert [r["body"] for r in kept][-1:] == ["d"]
    assert len(kept) == 2
    assert kept[0]["at"] == str(now)
    (tmp_path / "a.txt").write_text("one block\n\nanother block\n\none  BLOCK\n")
    assert dedup([tmp_path / "a.txt"], tmp_path / "text")["exact"] == 1
    assert dedup([tmp_path / "a.txt"], tmp_path / "file", reading=Reading(documents="file"))["kept"] == 1


def test_command_line_prints_and_writes_the_report(tmp_path, capsys, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", records_of(["one two", "One two", "three"]))
    monkeypatch.setattr(sys, "argv", ["dedup.py", path, "--out", str(tmp_path / "out"), "--workers", "1", "--against",
                                      path, "--json", str(tmp_path / "report.json")])
    assert module.main() == 0
    printed = capsys.readouterr().out
    assert "2 kept" in printed
    assert "1 exact" in printed
    assert "3 have no field of 13 words" in printed
    assert (tmp_path / "report.json").read_bytes() == (tmp_path / "out" / "dedup.json").read_bytes()
