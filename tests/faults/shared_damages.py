"""Damages to a checkpoint that several ranks have written, which has a file of each: a rank's file is missing, of
another step, another rank's or another layout's, or not what was written; the manifest is cut. All ranks take the
checkpoint before it, or all refuse.

To start ranks takes longer than to resume. So a run is started once, and resumes from one damaged folder after the
other, each time with other weights in it; then it goes on to its end, which is that of a run that nothing happened to.
"""

import itertools
import json
import shutil
from functools import partial
from pathlib import Path

import torch

from core import checkpoint
from core.errors import UserError

from .damages import KINDS, broken_off, damage, in_worker
from .harness import Lab, Row, Team, timed
from .kills import FEW, LAYOUTS, Case, uninterrupted, words_of
from .results import checkpoints, differences, records, tensors

NEWEST, BEFORE = 9, 6


def resume_from_each(folders: list[Path]):
    """In a worker: the run's first resume is preceded by one from each of these folders. Each rank leaves in each what
    it was told and where it is now; all of them save there what they read."""
    import train
    real = train.resume

    def resume_all(run):
        own, apart, rank = run.folder, run.world.apart(), run.world.rank
        # Groups of ranks are made once, and no more of them than in a run.
        run.world.apart = lambda: apart
        for folder in folders:
            said, run.folder = [], folder
            run.log.say, run.log.record = said.append, lambda *_, **__: None
            with torch.no_grad():
                for parameter in run.inner.parameters():
                    parameter.fill_(7)
            try:
                step = real(run)
                run.saver.folder = folder / "again"
                run.saver.save(step)
                run.saver.finish()
            except UserError as error:
                step = str(error)
            run.saver.close()
            (folder / f"rank_{rank}.json").write_text(json.dumps([step, said]))
        run.folder = own
        del run.log.say, run.log.record
        return real(run)
    train.resume = resume_all


def damages_of_one(newest: Path, before: Path, other: Path, draw) -> list[tuple]:
    """[(what, function that does it to a copy of the newest checkpoint)] for each of its files."""
    names = sorted(path.name for path in newest.iterdir())
    every = [(f"{kind} {name}", partial(damage, kind=kind, draw=draw, name=name))
             for kind in KINDS if kind not in ("extra file", "swap") for name in names]
    every += [("an extra file", partial(damage, kind="extra file", draw=draw))]
    every += [(f"{name} of step {BEFORE}", partial(copy_into, before / name)) for name in names]
    every += [(f"{name} of one process", partial(copy_into, other / name)) for name in names if (other / name).exists()]
    return every + [(f"{' and '.join(pair)} exchanged", partial(exchange, pair))
                    for pair in itertools.combinations(names, 2)]


def copy_into(file: Path, folder: Path) -> bool:
    """Whether that changed a byte."""
    changed = (folder / file.name).read_bytes() != file.read_bytes()
    shutil.copyfile(file, folder / file.name)
    return changed


def exchange(names, folder: Path) -> bool:
    one, two = (folder / name for name in names)
    kept = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(kept)
    return kept != one.read_bytes()


def damages_of_all(ranks: int, draw) -> list[tuple]:
    """The same to all checkpoints of a run: none is left to go on from."""
    every = [(f"{kind} in each", partial(damage, kind=kind, draw=draw)) for kind in KINDS]
    every += [(f"{kind} {name} in each", partial(damage, kind=kind, draw=draw, name=name))
              for kind, name in (("truncate", "manifest.json"), ("delete", "manifest.json"), ("flip", "state.json"))]
    return every + [(f"no file of rank {rank} in each", partial(delete_of_rank, rank)) for rank in range(ranks)]


def delete_of_rank(rank: int, folder: Path) -> bool:
    found = [*folder.glob(f"shard-{rank + 1:05d}-*")]
    for file in found:
        file.unlink()
    return bool(found)


def prepare(lab: Lab, case: Case) -> list[tuple]:
    """[(what, folder, the step that it must be resumed at or None where it must be refused)] of damaged copies."""
    begun, alone = broken_off(lab, case), Case(f"{case.name}, one process", alone_words(case))
    newest, other = checkpoints(begun)[-1], checkpoints(broken_off(lab, alone))[-1]
    one = damages_of_one(newest, newest.with_name(f"step_{BEFORE:08d}"), other, lab.random)
    found = [(what, [act], BEFORE) for what, act in one[::lab.count(1, 6)]]
    found += [(what, [act] * 3, None) for what, act in damages_of_all(case.ranks, lab.random)[::lab.count(1, 6)]]
    found += [(f"{what}, and that of the one before", [act, act], 3)
              for what, act in one[:lab.count(len(KINDS), 1)]]
    # It is the same run, so that whole it is none of the damages.
    found += [("all files of one process", [partial(replace_by, other)], NEWEST),
              ("all files of one process but a flipped bit", [partial(replace_by, other, draw=lab.random)], BEFORE)]
    prepared = []
    for what, acts, step in found:
        room = lab.room("damaged")
        shutil.copytree(begun, room, ignore=lambda folder, names: {".lock"} & set(names))
        # Some change nothing: both have the same file.
        if all(act(folder) for act, folder in zip(acts, reversed(checkpoints(room)))):
            prepared.append((what, room, step))
    return prepared


def replace_by(other: Path, folder: Path, draw=None) -> bool:
    shutil.rmtree(folder)
    shutil.copytree(other, folder)
    return draw is None or bool(damage(folder, "flip", draw))


def alone_words(case: Case) -> tuple:
    """A layout's words without those of the layout."""
    pairs = zip(case.words[::2], case.words[1::2])
    return tuple(word for pair in pairs if not pair[0].startswith("--parallel.") for word in pair)


def judge(case: Case, begun: Path, what: str, folder: Path, step: int | None) -> str:
    """Empty, or what was wrong with the answers of the ranks."""
    answers = [json.loads(file.read_text()) for file in sorted(folder.glob("rank_*.json"))]
    if len(answers) != case.ranks:
        return f"{what}: {len(answers)} of {case.ranks} ranks answered"
    steps, told = [answer[0] for answer in answers], " ".join(answers[0][1])
    damaged = [path.name for path in checkpoints(folder) if int(path.name[5:]) > (step or 0)]
    if any(each != steps[0] for each in steps):
        return f"{what}: the ranks do not agree, {steps}"
    if step is None:
        silent = [name for name in damaged if name not in str(steps[0])]
        return "" if type(steps[0]) is str and not silent else f"{what}: {steps[0]}, not named: {silent}"
    if steps[0] != step or (silent := [name for name in damaged if name not in told]):
        return f"{what}: resumed at {steps[0]}, not named: {silent if steps[0] == step else damaged}"
    name = f"step_{step:08d}"
    if step == NEWEST:
        return "" if in_worker(lambda: are_equal(folder / "checkpoints" / name, folder / "again" / name)) else \
            f"{what}: the state is another"
    is_same = tensors(begun / "checkpoints" / name) == tensors(folder / "again" / name) and all(
        (begun / "checkpoints" / name / file).read_bytes() == (folder / "again" / name / file).read_bytes()
        for file in (checkpoint.STATE,))
    return "" if is_same else f"{what}: the state is not that of step {step}"


def are_equal(one: Path, two: Path) -> bool:
    """In a worker: whether two checkpoints of different layouts hold the same full tensors."""
    (mine, my_moments, _), (theirs, their_moments, _) = map(checkpoint.load, (one, two))
    pairs = ((mine, theirs), (my_moments, their_moments))
    return all(a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a) for a, b in pairs)


def damage_layout(case: Case):
    def section(lab: Lab) -> Row:
        row = Row("damages", f"of checkpoints, {case.name}")
        if lab.short and case not in FEW[:1]:
            row.notes = "not tried: it takes too long for this"
            return row
        with timed(row):
            try_damages(lab, case, row)
        return row
    return section


def try_damages(lab: Lab, case: Case, row: Row):
    reference, seconds = uninterrupted(lab, case)
    begun, prepared, out = broken_off(lab, case), prepare(lab, case), lab.room("run")
    shutil.copytree(begun, out)
    damage(checkpoints(out)[-1], "flip", lab.random)
    ended = Team(words_of(lab, case, out, "--parallel.timeout", 60), case.ranks,
                 lambda: resume_from_each([folder for _, folder, _ in prepared])).wait(600)
    wrong = [str(outcome) for outcome in ended if outcome.status] or differences(reference, out)
    row.check(not wrong, f"{case.name}, a flipped bit: {'; '.join(wrong)}")
    resumed = [record["step"] for record in records(out, "resume")]
    row.check(resumed == [BEFORE], f"{case.name}, a flipped bit: resumed at {resumed}")
    for what, folder, step in prepared:
        complaint = judge(case, begun, what, folder, step)
        row.check(not complaint, f"{case.name}, {complaint}")
        lab.clear(folder)
    lab.clear(out)
    # The command itself where nothing is left.
    shutil.copytree(begun, out)
    for path in checkpoints(out):
        delete_of_rank(case.ranks - 1, path) or damage(path, "truncate", lab.random)
    names = [path.name for path in checkpoints(out)]
    ended = Team(words_of(lab, case, out), case.ranks).wait(60 + 20 * seconds)
    refused = sum(outcome.is_one_line for outcome in ended) == 1 and {outcome.status for outcome in ended} == {2}
    kept = [path.name for path in checkpoints(out)] == names
    row.check(refused and kept, f"{case.name}, all are damaged: {' and '.join(map(str, ended))}")
    row.notes = f"{len(prepared)} damaged folders, one start of {case.ranks} ranks for all, one that must refuse"
    lab.clear(out)


SHARED_DAMAGES = [*map(damage_layout, LAYOUTS)]
