"""Files of strangers and settings that nobody can mean, by the hundred: one line and exit status 2, within 10 s and
2 GB, and nothing runs. The cases are data, in hostile_models.py, hostile_texts.py and bad_settings.py; each has a
process of its own, which tells what it opened."""

import os
import shutil
import sys
from pathlib import Path

import torch.distributed

from core.files import write_text
from core.output import CONTROL

from . import bad_settings, hostile_models, hostile_runs, hostile_texts
from .commands import content
from .damages import broken_off
from .harness import Lab, Outcome, Row, command, run, start, timed
from .hostile_models import BYTES, SECONDS
from .kills import ONE, uninterrupted, words_of
from .results import differences

ADAPTIVE = ONE[3]
OPENED = "OPENED WHAT STANDS OUTSIDE"


def tools(lab: Lab) -> Path:
    """A folder with a tokenizer, tok, a packed source, legal, and a model, base."""
    folder = lab.folder / "tools"
    if not folder.exists():
        folder.mkdir()
        for name, target in (("tok", lab.sources / "tok"), ("legal", lab.sources / "legal"), ("base", lab.base)):
            (folder / name).symlink_to(target)
    return folder


def watched(module: str, words, secret: Path) -> Outcome:
    """A command that says so when it opens the secret, and starts no process group."""
    def work():
        real = os.path.realpath(secret)

        def hear(event, arguments):
            if event == "open" and isinstance(arguments[0], (str, bytes)) and os.path.realpath(arguments[0]) == real:
                print(OPENED, file=sys.__stdout__, flush=True)

        def refuse(*_, **__):
            raise AssertionError("a process group was started")
        torch.distributed.init_process_group = refuse
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        sys.addaudithook(hear)
        return command(module, words)
    return start(work).wait(2 * SECONDS, BYTES)


def faults_of(outcome: Outcome, names: str, canaries, out: Path, harmless: bool = False) -> str:
    """What is wrong with the end of a case, or an empty string."""
    said = outcome.out + outcome.err
    found = [
        (not (outcome.status == 0 if harmless else outcome.is_one_line), str(outcome)),
        (names and names.replace("_", "-") not in outcome.err.replace("_", "-"), f"does not name {names!r}: {outcome}"),
        (CONTROL.search(said), "a control character reaches the terminal"),
        (outcome.seconds > SECONDS, f"took {outcome.seconds:.0f} s"),
        (outcome.peak_bytes > BYTES, f"took {outcome.peak_bytes / 1e9:.1f} GB"),
        (any(canary.exists() for canary in canaries), "something of it ran"),
        (OPENED in said or hostile_models.SECRET in said, "what stands outside was read"),
        (not harmless and content(out), "something was left at --out")]
    return "; ".join(text for holds, text in found if holds)


def some(lab: Lab, cases: list) -> list:
    """All cases, or about 8 of them, evenly: tests/faults/test_hostile.py and test_bad_settings.py take more."""
    return cases[::max(1, len(cases) // 8)] if lab.short else cases


def corpora(lab: Lab) -> Row:
    row = Row("strangers", "corpora")
    with timed(row):
        for case in some(lab, hostile_texts.corpora()):
            here = lab.room("stranger")
            here.mkdir()
            assert run(lambda case=case, here=here: case.make(here) and 0).status == 0, case.name
            outcome = watched(case.module, case.line(here, tools(lab)), here / "secret.txt")
            wrong = faults_of(outcome, case.names.replace("{here}", str(here)), [here / "owned", Path("owned")],
                              here / "out", harmless=not case.names)
            row.check(not wrong, f"{case.name}: {wrong}")
            lab.clear(here)
    return row


def settings(lab: Lab) -> Row:
    row, here = Row("strangers", "bad settings"), lab.room("here")
    here.mkdir()
    with timed(row):
        for case in some(lab, bad_settings.cases(lab.room("recipes"))):
            outcome = watched(case.module, case.line(here, tools(lab)), here / "secret.txt")
            wrong = faults_of(outcome, case.names.replace("{here}", str(here)), [Path("owned")], here / "run")
            row.check(not wrong, f"{case.module} {' '.join(case.words[-3:])[:200]}: {wrong}")
    return row


def runs(lab: Lab) -> Row:
    """train.py goes on with a run of a stranger's as if nothing had happened to it, or refuses it."""
    row, begun = Row("strangers", "run folders that are gone on with"), broken_off(lab, ADAPTIVE)
    reference, _ = uninterrupted(lab, ADAPTIVE)
    with timed(row):
        for case in some(lab, hostile_runs.CASES):
            here = lab.room("stranger")
            shutil.copytree(begun, here / "run")
            for name in ("secret.txt", "thesis/thesis.txt", "thesis/.notes.partial"):
                write_text(here / "outside" / name, hostile_models.SECRET)
            shutil.copytree(lab.base, here / "outside/model")
            case.spoil(here / "run", here / "outside")
            before = content(here / "outside")
            outcome = watched("train", words_of(lab, ADAPTIVE, here / "run"), here / "outside/secret.txt")
            wrong = [faults_of(outcome, case.names, [], here / "none", harmless=not case.names)]
            wrong += differences(reference, here / "run") if outcome.status == 0 else []
            wrong += ["what stands outside was changed"] if content(here / "outside") != before else []
            wrong += [f"left beside it: {path.name}" for path in here.iterdir() if path.name not in ("run", "outside")]
            row.check(not any(wrong), f"{case.name}: {'; '.join(filter(None, wrong))}")
            lab.clear(here)
    return row


STRANGERS = [hostile_models.hostile_models, corpora, settings, runs]
