"""Bytes that a disk lost: any change to a checkpoint or to a packed source is noticed and named, the checkpoint before
is used, and where there is none the run refuses instead of beginning again."""

import json
import os
import random
import shutil
import time
from pathlib import Path

from core import checkpoint
from core.errors import UserError
from text import shards

from .harness import Lab, Outcome, Row, Team, start, timed
from .kills import ONE, Case, uninterrupted, words_of
from .results import checkpoints, differences, records

# What nobody reads is no damage to a packed source; a checkpoint is exactly its files.
SHARD_KINDS = ("flip", "truncate", "zero", "delete", "grow", "empty", "swap")
KINDS = ("flip", "truncate", "zero", "delete", "extra file", "grow", "empty", "swap", "link")


def damage(folder: Path, kind: str, draw: random.Random, name: str = "") -> str | None:
    """Change something under a folder, in the file of this name; returns what, or None where there was nothing to
    change."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    file = folder / name if name else draw.choice(files)
    data = bytearray(file.read_bytes())
    what = f"{kind} {file.relative_to(folder)}"
    if kind == "extra file":
        (file.parent / draw.choice(["extra.json", "model.safetensors.index.json", "x.safetensors"])).write_bytes(b"{}")
    elif kind == "delete":
        file.unlink()
    elif kind == "grow":
        file.write_bytes(data + draw.randbytes(draw.choice([1, 100])))
    elif not data:
        return None
    elif kind == "flip":
        bit = draw.randrange(8 * len(data))
        data[bit // 8] ^= 1 << bit % 8
        file.write_bytes(data)
        what += f" bit {bit}"
    elif kind == "truncate":
        os.truncate(file, draw.randrange(len(data)))
    elif kind == "zero":
        at = draw.randrange(len(data))
        size = draw.choice([1, 16, 512, 4096])
        if not any(data[at:at + size]):
            return None
        data[at:at + size] = bytes(len(data[at:at + size]))
        file.write_bytes(data)
    elif kind == "empty":
        os.truncate(file, 0)
    elif kind == "swap":
        other = draw.choice(files)
        if other.read_bytes() == bytes(data):
            return None
        file.write_bytes(other.read_bytes())
        other.write_bytes(data)
    elif kind == "link":
        # To the same bytes outside: a checkpoint whose files are elsewhere is not what was written.
        moved = folder.parent / f"moved_{draw.randrange(10**9)}"
        shutil.move(file, moved)
        file.symlink_to(moved)
    return what


def flip_bits(lab: Lab, file: Path, judge) -> tuple[int, list[str]]:
    """(how many bits of a file were flipped, each or in short one in seven, those that judge() did not answer with a
    UserError)."""
    data, missed = file.read_bytes(), []
    bits = range(0, 8 * len(data), lab.count(1, 7))
    for bit in bits:
        broken = bytearray(data)
        broken[bit // 8] ^= 1 << bit % 8
        file.write_bytes(broken)
        if answer := judge():
            missed.append(f"bit {bit} ({chr(data[bit // 8])!r} became {chr(broken[bit // 8])!r}): {answer}")
    file.write_bytes(data)
    return len(bits), missed


def answer_of(function, *arguments) -> str:
    """Empty where a function raises a UserError, as it must; else what it did."""
    try:
        function(*arguments)
    except UserError as error:
        return "" if "\n" not in str(error).strip() else "an error of several lines"
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:100]}"
    return "accepted"


def in_worker(function):
    """What a function returns as JSON values, from a forked process."""
    outcome: Outcome = start(lambda: print("RESULT", json.dumps(function()))).wait(900)
    assert outcome.status == 0, outcome.err
    return json.loads(outcome.out.rpartition("RESULT")[2])


def judged_in_worker(row: Row, function) -> Row:
    """The row, with what function() found wrong with each of its trials, in a forked process; empty: nothing."""
    with timed(row):
        for wrong in in_worker(function):
            row.check(not wrong, wrong)
    return row


# ---- checkpoints

def wait_for_checkpoints(out: Path, count: int):
    """They are written in the background."""
    end = time.monotonic() + 30
    while len(checkpoints(out)) < count and time.monotonic() < end:
        time.sleep(0.01)


def broken_off(lab: Lab, case: Case, *more) -> Path:
    """The folder of a run that died after its third save."""
    key = f"broken off {case.name} {more}"
    if key not in lab.notes:
        out = lab.room("begun")

        def die():
            import train
            real = train.train_step

            def step(run, number, batches):
                if number == 10:
                    wait_for_checkpoints(run.folder, 3)
                    os._exit(9)
                return real(run, number, batches)
            train.train_step = step
        ended = Team(words_of(lab, case, out, *more), case.ranks, die).wait()
        # Another rank may have seen it die before it died itself.
        assert 9 in {outcome.status for outcome in ended}, "\n".join(outcome.err for outcome in ended)
        assert len(checkpoints(out)) == 3, checkpoints(out)
        lab.notes[key] = out
    return lab.notes[key]


def random_damages(lab: Lab) -> Row:
    """F6: what verifies is what was written."""
    row, count, seed = Row("damages", "random, of checkpoints"), lab.count(500, 60), lab.random.random()
    source = broken_off(lab, ONE[0]) / "checkpoints"

    def work():
        draw, found = random.Random(seed), []
        while len(found) < count:
            room = lab.folder / "damaged"
            shutil.rmtree(room, ignore_errors=True)
            shutil.copytree(source, room / "checkpoints")
            *_, before, newest = checkpoints(room)
            kind = KINDS[len(found) % len(KINDS)]
            if (what := damage(newest, kind, draw)) is None:
                continue
            said = []
            wrong = answer_of(checkpoint.verify, newest)
            try:
                used = checkpoint.newest(room / "checkpoints", said.append)
                wrong = wrong or ("" if used == before else f"{used} is used")
                wrong = wrong or ("" if any(newest.name in line for line in said) else "is not named")
            except BaseException as error:
                wrong = f"{type(error).__name__}: {str(error)[:100]}"
            found.append(wrong and f"{what}: {wrong}")
        return found
    return judged_in_worker(row, work)


def manifest_bits(lab: Lab) -> Row:
    row = Row("damages", "each bit of a checkpoint's manifest")
    room = lab.room("bits")
    shutil.copytree(checkpoints(broken_off(lab, ONE[0]))[-1], room)
    file = room / "manifest.json"
    with timed(row):
        row.tried, row.failures = in_worker(lambda: flip_bits(lab, file, lambda: answer_of(checkpoint.verify, room)))
    return row


def resumed_from_the_one_before(lab: Lab) -> Row:
    """The same through the command: the result is that of an undisturbed run, or, with nothing left, a refusal."""
    row = Row("damages", "the command resumes from the one before, or refuses")
    with timed(row):
        resume_damaged(lab, ONE[0], row, lab.count(27, 3), lab.count(9, 2))
    return row


def resume_damaged(lab: Lab, case: Case, row: Row, some: int, all_of_them: int):
    """Damage the newest checkpoint of a run so many times, and all of its checkpoints so many times."""
    reference, seconds = uninterrupted(lab, case)
    for i in range(some):
        out = lab.room("run")
        shutil.copytree(broken_off(lab, case), out)
        found = checkpoints(out)
        what = None
        while what is None:
            what = damage(found[-1], KINDS[i % len(KINDS)], lab.random)
        ended = Team(words_of(lab, case, out), case.ranks).wait(60 + 20 * seconds)
        wrong = [str(outcome) for outcome in ended if outcome.status] or differences(reference, out)
        row.check(not wrong, f"{case.name}, {what}: {'; '.join(wrong)}")
        resumed = [record["step"] for record in records(out, "resume")]
        named = found[-1].name in ended[0].out + ended[0].err
        row.check(resumed == [6] and named, f"{case.name}, {what}: resumed at {resumed}, the damaged one is named: "
                                            f"{named}")
        lab.clear(out)
    for i in range(all_of_them):
        out = lab.room("run")
        shutil.copytree(broken_off(lab, case), out)
        for path in checkpoints(out):
            while damage(path, KINDS[i % len(KINDS)], lab.random) is None:
                pass
        names = [path.name for path in checkpoints(out)]
        ended = Team(words_of(lab, case, out), case.ranks).wait(60 + 20 * seconds)
        kept = [path.name for path in checkpoints(out)] == names
        refused = sum(outcome.is_one_line for outcome in ended) == 1 and {outcome.status for outcome in ended} == {2}
        row.check(refused and kept, f"{case.name}, all are damaged ({KINDS[i % len(KINDS)]}): "
                                    f"{' and '.join(map(str, ended))}")
        lab.clear(out)


def damaged_beside(lab: Lab) -> Row:
    """What stands beside the checkpoints: used as it was written, made again or refused, and never wrong in silence."""
    row = Row("damages", "Fisher, plan, evaluations and settings beside them")
    with timed(row):
        for case in (ONE[2],) if lab.short else (ONE[2], ONE[3]):
            reference, _ = uninterrupted(lab, case)
            begun = broken_off(lab, case)
            beside = [path for path in sorted(begun.rglob("*")) if path.is_file() and "checkpoints" not in path.parts
                      and path.name not in (".lock", "metrics.jsonl")]
            for file in beside if not lab.short else beside[:2]:
                for kind in ("flip",) if lab.short else ("flip", "truncate", "delete"):
                    out = lab.room("run")
                    shutil.copytree(begun, out)
                    target = out / file.relative_to(begun)
                    data = bytearray(target.read_bytes())
                    at = lab.random.randrange(len(data))
                    if kind == "flip":
                        data[at] ^= 1 << lab.random.randrange(8)
                    target.write_bytes(data[:at] if kind == "truncate" else
                                       data[:at] + bytes(len(data) - at) if kind == "zero" else data)
                    if kind == "delete":
                        target.unlink()
                    outcome = start("train", words_of(lab, case, out)).wait()
                    wrong = differences(reference, out) if outcome.status == 0 else \
                        [] if outcome.is_one_line else [str(outcome)]
                    row.check(not wrong, f"{case.name}, {kind} {file.relative_to(begun)} at {at}: {'; '.join(wrong)}")
                    lab.clear(out)
    return row


# ---- packed sources

def damaged_shards(lab: Lab) -> Row:
    row, count, seed = Row("damages", "random, of shards"), lab.count(500, 60), lab.random.random()

    def work():
        draw, found, room = random.Random(seed), [], lab.folder / "damaged_shards" / "legal"
        while len(found) < count:
            shutil.rmtree(room.parent, ignore_errors=True)
            shutil.copytree(lab.sources / "legal", room)
            what = damage(room, SHARD_KINDS[len(found) % len(SHARD_KINDS)], draw)
            if what is not None:
                wrong = answer_of(shards.verify, room)
                found.append(wrong and f"{what}: {wrong}")
        return found
    return judged_in_worker(row, work)


def bits_of_a_shard_manifest(lab: Lab) -> Row:
    bits = Row("damages", "each bit of a shard's manifest")
    room = lab.room("bits") / "legal"
    shutil.copytree(lab.sources / "legal", room)
    with timed(bits):
        bits.tried, bits.failures = in_worker(
            lambda: flip_bits(lab, room / "manifest.json", lambda: answer_of(shards.verify, room)))
    return bits


def trains_on_no_damaged_shard(lab: Lab) -> Row:
    row = Row("damages", "a run refuses a damaged source")
    with timed(row):
        for i in range(lab.count(14, 2)):
            sources, out = lab.room("lab"), lab.room("run")
            shutil.copytree(lab.sources, sources)
            what = None
            while what is None:
                what = damage(sources / "legal", SHARD_KINDS[i % len(SHARD_KINDS)], lab.random)
            words = [str(word).replace(str(lab.sources), str(sources)) for word in words_of(lab, ONE[0], out)]
            outcome = start("train", words).wait()
            row.check(outcome.is_one_line, f"{what}: {outcome}")
            lab.clear(sources)
            lab.clear(out)
    return row


DAMAGES = [random_damages, manifest_bits, resumed_from_the_one_before, damaged_beside,
           damaged_shards, bits_of_a_shard_manifest, trains_on_no_damaged_shard]
