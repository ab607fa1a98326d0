"""Truth: one worker and one run; a first run with a gate for a second gate; eval.py for perplexity; datatrove.
Laws: workers, a kill and a second gate change nothing; all keys of a record stay; a user's mistake is one line.
"""

import gzip
import json
import os
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from documents import NOTE, STATUTE, command, read, records, scores_of, some_documents, write_jsonl
from kill_points import run_and_kill, trace

import clean
import dedup
import hf
import tokenizer as tokenizers
from clean import Settings, clean_corpus, clean_document
from core.cli import Output, Reading
from learn import objectives
from measure import scoring
from text.corpus import read_input
from text.foreign import mix_files
from text.gate import PRESETS

ROOT = Path(__file__).parent.parent


# ---- the whole corpus

def test_a_kill_at_any_point_of_an_overwrite_loses_no_file(tmp_path, fast_disk):
    out, texts = tmp_path / "out", records(some_documents())

    def make(some, overwrite=False):
        clean_corpus(some, Settings("legal"), out, overwrite=overwrite)
        return {name: (out / name).read_bytes() for name in ("kept.jsonl", "dropped.jsonl.gz", "drops.json")}

    def reset():
        shutil.rmtree(out, ignore_errors=True)
        return make(texts[:5])
    old, new = reset(), make(texts[:9], True)
    reset()
    operations = trace(lambda: make(texts[:9], True), tmp_path)
    for k, operation in enumerate(operations):
        reset()
        assert run_and_kill(lambda: make(texts[:9], True), k, tmp_path).status == -9
        for name in old:
            found = (out / name).read_bytes() if (out / name).exists() else None
            # Only the report goes a moment before the new one comes: it may not stand beside others' files.
            assert found in (old[name], new[name]) or (found is None and name == "drops.json"), (operation, name)
        assert make(texts[:9], True) == new, operation
        assert sorted(path.name for path in out.iterdir()) == sorted(new)


@pytest.mark.parametrize("name", ["clean", "dedup"])
def test_a_full_disk_leaves_the_old_results_whole(small_disk, tmp_path, name):
    def make(some, overwrite=False):
        if name == "clean":
            return clean_corpus(some, Settings("legal"), small_disk / name, overwrite=overwrite)
        return dedup.dedup(dedup.Dedup(files=[write_jsonl(tmp_path / "in.jsonl", some)], workers=1,
                                       output=Output(out=str(small_disk / name), overwrite=overwrite)))
    texts, ballast = records(some_documents()), small_disk / "ballast"
    many = [{**text, "id": f"{text['id']}{i}", "text": f"{i} {text['text']}"} for text in texts for i in range(99)]
    make(texts[:5])
    old, free = read_files(small_disk / name), os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
    for room in (0, 1 << 12, 1 << 15):
        ballast.write_bytes(bytes(free - room))
        with pytest.raises(OSError, match="No space left on device") as full:
            make(many, overwrite=True)
        assert str(small_disk / name) in full.value.filename
        assert read_files(small_disk / name) == old, room
        ballast.unlink()


def read_files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_results_of_others_are_not_replaced(tmp_path):
    texts = records(some_documents())[:5]
    (tmp_path / "kept.jsonl").write_text("from elsewhere")
    with pytest.raises(ValueError, match=r"kept\.jsonl stands without a drops\.json of clean\.py"):
        clean_corpus(texts, Settings("legal"), tmp_path, overwrite=True)
    with pytest.raises(ValueError, match=r"kept\.jsonl stands without a dedup\.json of dedup\.py"):
        dedup.dedup(dedup.Dedup(files=[write_jsonl(tmp_path / "in.jsonl", texts)], workers=1,
                                output=Output(out=str(tmp_path), overwrite=True)))
    assert (tmp_path / "kept.jsonl").read_text() == "from elsewhere"


def test_result_is_the_same_for_any_worker_count(tmp_path, monkeypatch):
    monkeypatch.setattr(clean, "BATCH_CHARS", 5000)
    for workers in (1, 2, 3):
        clean_corpus(iter(records(some_documents())), Settings("legal"), tmp_path / str(workers), workers=workers)
    for name in ("kept.jsonl", "dropped.jsonl.gz", "drops.json"):
        assert len({(tmp_path / str(w) / name).read_bytes() for w in (1, 2, 3)}) == 1, name


def test_a_second_gate_on_scored_records_equals_a_first_run_with_those_limits(tmp_path, monkeypatch):
    source = write_jsonl(tmp_path / "in.jsonl", records(some_documents()))
    assert command(monkeypatch, source, "--preset", "legal", "--out", tmp_path / "a") == 0
    change = ("--rule", "words=60:", "--rule", "alpha_words=p10:p90", "--rule", "chars=off",
              "--weights", "content=1,format=0")
    assert command(monkeypatch, source, "--preset", "legal", *change, "--out", tmp_path / "b") == 0
    monkeypatch.setattr(clean, "score_text", lambda *_: pytest.fail("a scored record is not scored again"))
    assert command(monkeypatch, tmp_path / "a", "--preset", "legal", *change, "--out", tmp_path / "c") == 0
    b, c = read(tmp_path / "b"), read(tmp_path / "c")
    for wanted, got in zip(b[:2], c[:2]):
        assert len(wanted) > 3
        assert sorted(wanted, key=lambda r: int(r["id"])) == sorted(got, key=lambda r: int(r["id"]))
    assert b[2] == c[2]
    assert read(tmp_path / "a")[0] != b[0]


def test_a_text_that_was_edited_after_it_was_scored_is_scored_anew():
    (scored,) = clean_document(records([STATUTE])[0], Settings("legal"))
    scored["metadata"]["scores"] |= {"perplexity": 9.0, "perplexity_score": 0.91, "edu": 3}
    assert clean_document(scored, Settings("legal")) == [scored]
    edited = {**scored, "text": NOTE}                                      # as dedup.py --paragraphs does
    wanted = scores_of(NOTE, "legal") | {"edu": 3}
    assert clean_document(edited, Settings("legal"))[0]["metadata"]["scores"] == wanted
    scores = scored["metadata"]["scores"]
    for spoilt in ({"scores": 5}, {"cleaned": {"version": 1}}, {"cleaned": True}, {"content_hash": None},
                   {"scores": {**scores, "words": "many"}}):
        row = {**scored, "metadata": {**scored["metadata"], **spoilt}}
        assert clean_document(row, Settings("legal"))[0]["metadata"]["scores"]["words"] == scores["words"]


def test_portuguese_is_a_language_and_no_percentile(tmp_path, monkeypatch):
    source = write_jsonl(tmp_path / "in.jsonl", records([NOTE, "O tribunal não aceita os pedidos que uma parte fez "
                                                               "para as outras, e os autos vão com o juiz. O réu "
                                                               "pediu um prazo, mas a lei não o dá."]))
    assert command(monkeypatch, source, "--preset", "legal", "--language", "PT", "--out", tmp_path / "out") == 0
    assert [row["id"] for row in read(tmp_path / "out")[0]] == ["1"]


def test_every_key_of_a_record_is_kept(tmp_path):
    row = {"text": STATUTE, "id": 7, "timestamp": "2020-01-01", "source": "dc", "domain": "statutes", "odd": "\ud800",
           "metadata": {"scores": {"edu": 3}, "url": "x"}}
    source = write_jsonl(tmp_path / "in.jsonl", [row, {"body": "no text"}][:1])
    clean_corpus(read_input([str(source)], Reading()), Settings("legal"), tmp_path / "out")
    (kept,), _, report = read(tmp_path / "out")
    row["odd"] = "\ufffd"
    assert all(kept[key] == row[key] for key in row.keys() - {"text", "metadata"})
    assert kept["metadata"]["url"] == "x"
    assert kept["metadata"]["scores"]["edu"] == 3, "a score of somebody else's is kept beside ours"
    assert list(report["statistics"]["source"]) == ["dc"]
    assert list(report["statistics"]["domain"]) == ["statutes"]
    assert len(kept["metadata"]["content_hash"]) == 32


def test_every_command_writes_half_a_surrogate_pair_in_the_same_way(tmp_path, monkeypatch):
    row = {"text": STATUTE + " \ud800", "id": "a\udfff", "metadata": {"odd": ["\ud83d\ude00", "\udc00"]}}
    source = write_jsonl(tmp_path / "in.jsonl", [row])
    assert command(monkeypatch, source, "--preset", "legal", "--no-repair", "--out", tmp_path / "clean") == 0
    dedup.dedup(dedup.Dedup(files=[str(source)], workers=1, output=Output(out=str(tmp_path / "dedup"))))
    mix_files([row], [], tmp_path / "mixed.jsonl", ratio=1.0)
    for path in ("clean/kept.jsonl", "dedup/kept.jsonl", "mixed.jsonl"):
        (found,) = map(json.loads, (tmp_path / path).read_bytes().splitlines())
        assert (found["text"], found["id"]) == (STATUTE + " \ufffd", "a\ufffd"), path
        assert found["metadata"]["odd"] == ["\U0001f600", "\ufffd"], path


def test_a_killed_run_is_completed_to_the_same_bytes(tmp_path, monkeypatch):
    texts = records(some_documents())
    clean_corpus(texts, Settings("legal"), tmp_path / "whole")

    def broken_off():
        yield from texts[:20]
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        clean_corpus(broken_off(), Settings("legal"), tmp_path / "again")
    assert not list((tmp_path / "again").iterdir())
    # Killed before the first file takes its name.
    monkeypatch.setattr(clean.gate, "gate_records", lambda *_: os._exit(9))
    if (child := os.fork()) == 0:
        clean_corpus(texts, Settings("legal"), tmp_path / "again")
    os.waitpid(child, 0)
    monkeypatch.undo()
    assert not (tmp_path / "again" / "drops.json").exists()
    clean_corpus(texts, Settings("legal"), tmp_path / "again")
    assert {p.name: p.read_bytes() for p in (tmp_path / "whole").iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "again").iterdir()}
    with pytest.raises(ValueError, match="--overwrite"):
        clean_corpus(texts, Settings("legal"), tmp_path / "again")
    (tmp_path / "others").mkdir()
    (tmp_path / "others/kept.jsonl").write_text("from dedup.py")
    with pytest.raises(ValueError, match=r"others/kept\.jsonl exists already"):
        clean_corpus(texts, Settings("legal"), tmp_path / "others")
    # Killed while the new files take the names of the old ones.
    monkeypatch.setattr(os, "replace", lambda *_: os._exit(9))
    if (child := os.fork()) == 0:
        clean_corpus(texts[:5], Settings("legal"), tmp_path / "again", overwrite=True)
    os.waitpid(child, 0)
    monkeypatch.undo()
    assert not (tmp_path / "again" / "drops.json").exists(), "the record of the old files may not stand beside new ones"
    clean_corpus(texts, Settings("legal"), tmp_path / "again")                      # and needs no --overwrite to go on
    assert (tmp_path / "again" / "drops.json").read_bytes() == (tmp_path / "whole" / "drops.json").read_bytes()


def group_lives(leader: int) -> bool:
    """Whether any process of a group is there."""
    try:
        os.killpg(leader, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_command_leaves_no_worker_and_the_same_command_completes_it(tmp_path, monkeypatch, capfd, blow):
    source = write_jsonl(tmp_path / "in.jsonl", records([" ".join([STATUTE, NOTE] * 40)] * 30))
    out = tmp_path / "out"
    words = [source, "--preset", "legal", "--out", out, "--workers"]
    if (child := os.fork()) == 0:
        os.setsid()
        # A test process may ignore Ctrl-C, which a command of its own process does not.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os._exit(command(monkeypatch, *words, 2))
    while not (out / ".kept.jsonl.partial").exists():
        assert os.waitpid(child, os.WNOHANG) == (0, 0)
        time.sleep(0.01)
    # The workers are at it.
    time.sleep(0.5)
    os.kill(child, blow) if blow == signal.SIGKILL else os.killpg(child, blow)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == (130 if blow == signal.SIGINT else -signal.SIGKILL)
    assert capfd.readouterr().err.split() == (["stopped", "by", "Ctrl-C"] if blow == signal.SIGINT else [])
    deadline = time.monotonic() + 20
    while group_lives(child):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert not (out / "drops.json").exists()
    assert command(monkeypatch, *words, 1) == 0
    clean_corpus(read_input([str(source)], Reading()), Settings("legal"), tmp_path / "straight")
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "straight").iterdir()}


def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(tmp_path, monkeypatch, capfd):
    source = write_jsonl(tmp_path / "in.jsonl", records([STATUTE] * 200))
    for kilobytes in (1, 100):
        # A child process in which no file can grow beyond the limit.
        if (child := os.fork()) == 0:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000 * kilobytes,) * 2)
            os._exit(command(monkeypatch, source, "--preset", "legal", "--out", tmp_path / "out"))
        status, said = os.waitpid(child, 0)[1], capfd.readouterr().err
        assert os.waitstatus_to_exitcode(status) == 2
        assert said.startswith("error: ")
        assert said.count("\n") == 1
        assert not list((tmp_path / "out").iterdir())


def test_perplexity_of_a_model_and_its_percentile_gate(tmp_path, monkeypatch, data_dir, one_thread):
    folder = str(data_dir / "models/stories260K")
    texts = ["Once upon a time, there was a little girl named Lily. She loved to play.", "", STATUTE[:200], NOTE[:300]]
    found = list(map(clean.load_perplexity(folder, context=64), texts))
    model, tokenizer = hf.load(folder).eval(), tokenizers.load(folder)
    for text, value in zip(texts, found):
        ids = tokenizer.encode_batch([text])[0][:64]
        if not len(ids):
            assert value is None
            continue
        wanted = scoring.score(model, objectives.Causal(True), [(ids, 1)], tokenizer.bos_id, 64)["perplexity"]
        assert value == pytest.approx(wanted, rel=1e-4)
    assert found[0] < found[2]
    rows = records([STATUTE, *(texts[0] + " They were happy." * i for i in range(2, 21))])
    source = write_jsonl(tmp_path / "in.jsonl", rows)
    assert command(monkeypatch, source, "--preset", "medical", "--perplexity", folder, "--out", tmp_path / "out",
                   "--rule", "perplexity=p10:p95", "--rule", "quality=off") == 0
    kept, dropped, report = read(tmp_path / "out")
    values = sorted(r["metadata"]["scores"]["perplexity"] for r in kept + dropped)
    assert report["reasons"]["perplexity"]["dropped"] == 3
    assert report["reasons"]["perplexity"]["limits"] == pytest.approx(
        [np.percentile(values, 10), np.percentile(values, 95)])
    assert all("perplexity_score" in r["metadata"]["scores"] for r in kept)


# ---- what a user hands over


@pytest.mark.parametrize(("name", "content", "say"), [
    ("broken.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 999, mtime=0)[:-30], "cannot be read"),
    ("no.jsonl.gz", b"this is no gzip", "cannot be read"), ("wrong.jsonl", b'{"body": "x"}\n', "no text under 'text'"),
    ("number.jsonl", b'{"text": 5}\n', "no text under"), ("list.jsonl", b'["text"]\n', "no text under"),
    ("cut.jsonl", b'{"text": "a\n', "line 1 is not JSON"), ("latin.txt", b"caf\xe9 " * 50, "cannot be read"),
    ("empty.jsonl", b"", "nothing to clean"), ("bad.parquet", b"PAR1 not", "not a readable parquet"),
    ("page.html", b"<p>", "no plain text"), ("folder", None, "holds no file"), ("missing.jsonl", ..., "does not exist"),
])
def test_hostile_files_end_in_one_line(tmp_path, monkeypatch, capsys, name, content, say):
    path = tmp_path / name
    if content is None:
        path.mkdir()
    elif content is not ...:
        path.write_bytes(content)
    assert command(monkeypatch, path, "--preset", "legal", "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert say in error
    assert not (tmp_path / "out" / "drops.json").exists()


@pytest.mark.parametrize(("option", "say"), [
    (("--preset", "lega"), "invalid choice"), (("--rule", "word=5:"), "did you mean words"),
    (("--rule", "words"), "NAME=LOW:HIGH"), (("--rule", "words=5"), "LOW:HIGH"),
    (("--rule", "words=p101:"), "p0 to p100"),
    (("--weights", "beauty=1"), "--weights"), (("--weights", "format=-1"), "none below 0"),
    (("--workers", "0"), "--workers is 0"), (("--max-chars", "50"), "--max-chars 50"),
    (("--language", "german"), "german is no code that can be found; did you mean de?"),
    (("--language", "en,zh-CN"), "did you mean zh?"), (("--language", "klingon"), "finds am, ar, bg,"),
    (("--language", ","), "nothing is no code"), (("--keywords", "nowhere.txt"), "does not exist"),
    (("--perset", "legal"), "did you mean --preset"),
])
def test_wrong_options_end_in_one_line(tmp_path, monkeypatch, capsys, option, say):
    source = write_jsonl(tmp_path / "in.jsonl", records([STATUTE]))
    assert command(monkeypatch, source, "--preset", "legal", "--out", tmp_path / "out", *option) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert say in error


def test_hostile_texts_are_handled(tmp_path):
    texts = ["^" * 10**6, "", None, "\ud800" * 200, "\x00" * 500, " " * 10**5, "a" * 10**6, "\n" * 10**5, "1." * 10**5,
             ("The court said so. " * 5000 + "\n"), STATUTE]
    report = clean_corpus(records(texts), Settings("legal"), tmp_path)
    kept, dropped, _ = read(tmp_path)
    assert report["documents"] == len(texts)
    assert [r["id"] for r in kept if r["id"] == "10"] == ["10"]
    assert {r["id"].split("/")[0] for r in dropped} >= {"0", "1", "2", "4", "5", "6", "7", "8"}


def test_a_record_too_deep_for_a_worker_is_one_line(tmp_path):
    deep = json.loads("[" * 900 + "]" * 900)
    row = {**records([STATUTE])[0], "deep": deep}
    try:                                                                   # how deep is too deep, Python decides
        clean_corpus([row], Settings("legal"), tmp_path / "two", workers=2)
    except ValueError as error:
        assert "nested too deeply" in str(error)                           # noqa: PT017
    assert clean_corpus([row], Settings("legal"), tmp_path / "one")["kept"] == 1


def test_a_line_of_5_megabytes(tmp_path, monkeypatch):
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"text": "x" * 5 * 10**6}) + "\n" + json.dumps({"text": STATUTE}) + "\n")
    assert command(monkeypatch, path, "--preset", "legal", "--out", tmp_path / "out") == 0
    kept, dropped, report = read(tmp_path / "out")
    assert len(kept) == 1
    assert report["documents"] == 2
    assert sum(len(r["text"]) for r in dropped) == 5 * 10**6, "every part is there"


# ---- the command and datatrove


def test_the_command_prints_what_json_holds(tmp_path, monkeypatch, capsys):
    source = write_jsonl(tmp_path / "in.jsonl", records([STATUTE, NOTE, "short"]))
    assert command(monkeypatch, source, "--preset", "legal", "--out", tmp_path / "out", "--language", "en", "--json",
                   tmp_path / "r.json") == 0
    printed, report = capsys.readouterr(), json.loads((tmp_path / "r.json").read_text())
    assert "3 documents in 3 parts: 2 kept (66.7%), 1 dropped" in printed.out
    assert report["megabytes_per_second"] > 0
    assert report["reasons"]["language"]["dropped"] == 1
    drops = json.loads((tmp_path / "out/drops.json").read_text())
    assert drops == {k: v for k, v in report.items() if k in drops}
    assert printed.err == ""


def test_documents_that_blank_lines_cut_too_short_are_warned_of(tmp_path, monkeypatch, capsys):
    """A law's headings and items stand between blank lines, and are no documents."""
    (tmp_path / "law.txt").write_text("\n\n".join(["## Chapter 1", STATUTE, "(a) of a sale;", "(b) of a lease."]))
    warned = "75% of the documents are too short, and text files were cut at each blank line"
    for words, says in (((), True), (("--separator", "##"), False), (("--documents", "file"), False),
                        (("--min-chars", 5, "--rule", "words=1:"), False)):
        assert command(monkeypatch, tmp_path / "law.txt", "--preset", "legal", *words, "--overwrite",
                       "--out", tmp_path / "out") == 0
        assert (warned in capsys.readouterr().err) == says, words
    source = write_jsonl(tmp_path / "in.jsonl", records(["short", "short as well", STATUTE]))
    assert command(monkeypatch, source, "--preset", "legal", "--out", tmp_path / "records") == 0
    assert "warning" not in capsys.readouterr().err


def test_help_names_every_preset(monkeypatch, capsys):
    assert command(monkeypatch, "--help") == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in PRESETS)


def test_a_missing_library_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "ftfy", None)
    with pytest.raises(ValueError, match=r"ftfy is not installed; pip install .*--no-repair"):
        Settings("legal")
    Settings("legal", repair=False)


@pytest.mark.parametrize("tasks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_datatroves_local_executor_keeps_what_the_command_keeps(tmp_path, monkeypatch, tasks):
    pytest.importorskip("datatrove", reason="the extra `datatrove` is not installed")
    pytest.importorskip("orjson", reason="datatrove's JSONL reader needs orjson")
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.writers import JsonlWriter
    folder = tmp_path / "in"
    folder.mkdir()
    long = "\n\n".join([STATUTE] * 9)
    for k, name in enumerate("abc"):
        write_jsonl(folder / f"{name}.jsonl", [
            {"text": text, "id": f"{name}{i}", "url": f"https://a.example/{i}", "metadata": {"scores": {"edu": i}},
             "media": [{"id": "m", "type": 0, "url": "u", "alt": None, "media_bytes": None}]}
            for i, text in enumerate([*some_documents()[k::3], long])])
    monkeypatch.setenv("PYTHONPATH", str(ROOT))               # tasks=2 unpickles the step in processes of its own
    step = clean.datatrove_step("legal", max_chars=2000)
    stats = LocalPipelineExecutor([JsonlReader(str(folder)), step, JsonlWriter(str(tmp_path / "out"))], tasks=tasks,
                                  logging_dir=str(tmp_path / "logs")).run()
    assert command(monkeypatch, folder, "--preset", "legal", "--max-chars", "2000", "--out", tmp_path / "ours") == 0
    wanted, _, report = read(tmp_path / "ours")
    rows = []
    for path in (tmp_path / "out").iterdir():
        with gzip.open(path, "rt", encoding="utf-8") as file:
            rows += map(json.loads, file)
    assert len(list((tmp_path / "out").iterdir())) == tasks
    assert [(r["id"], r["text"], r["metadata"]["scores"]) for r in sorted(rows, key=lambda r: r["id"])] == [
        (r["id"], r["text"], r["metadata"]["scores"]) for r in sorted(wanted, key=lambda r: r["id"])]
    assert len(rows) > 30
    assert any("/" in row["id"] for row in rows), "the long one in parts"
    assert all(row["media"][0]["id"] == "m" and row["metadata"]["url"] for row in rows)
    counted = next(s for s in json.loads(stats.to_json()) if "CLEAN" in s["name"])["stats"]
    total = {name: value["total"] if isinstance(value, dict) else value for name, value in counted.items()}
    assert total["forwarded"] == report["kept"]
    assert total["dropped_dup_lines"] == report["reasons"]["dup_lines"]["dropped"] > 0


def test_a_datatrove_step_is_refused_where_it_is_made(monkeypatch):
    pytest.importorskip("datatrove", reason="the extra `datatrove` is not installed")
    with pytest.raises(ValueError, match="did you mean legal"):
        clean.datatrove_step("legl")
    with pytest.raises(ValueError, match="did you mean de"):
        clean.datatrove_step("legal", {"language": ("german",)})
    with pytest.raises(ValueError, match="percentile"):
        clean.datatrove_step("legal", {"words": ("p5", None)})
    monkeypatch.setitem(sys.modules, "datatrove", None)
    with pytest.raises(ValueError, match=r"datatrove is not installed; pip install -e '.\[datatrove\]'"):
        clean.datatrove_step("legal")
