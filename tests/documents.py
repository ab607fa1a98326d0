"""What the tests of cleaning are made of: a statute, a clinical note, a source file; records, and their scores."""

import gzip
import json
import random
import sys
from pathlib import Path

import pytest

import clean
from clean import Settings, clean_document
from text.scores import compile_keywords

pytest.importorskip("ftfy", reason="the extra `clean` is not installed")

STATUTE = """16-302 Persons who may adopt.
Any person may petition the court for a decree of adoption. A petition may not be considered by the court unless the \
petitioner's spouse, if he has one, joins in the petition:
(1) the consent of the parents has been obtained;
(2) the child is in the care of the Mayor; or
(3) the court finds that the consent is withheld contrary to the best interest of the child."""
NOTE = """The patient is a 54-year-old man with a history of hypertension and type 2 diabetes. He was given metformin \
500 mg and lisinopril 10 mg. Blood pressure fell from 162/95 to 134/82 mmHg (p < 0.001; 95% CI 1.2-3.4). No adverse \
events were seen, and the dose was kept for 12 weeks. He has felt well since then, and was sent home."""
CODE = '''import os


def walk(path, depth=0):
    """Yield the files below a folder."""
    for name in os.listdir(path):
        full = os.path.join(path, name)
        if os.path.isdir(full):
            yield from walk(full, depth + 1)
        else:
            yield {"path": full, "depth": depth}
'''


def scores_of(text: str, preset: str = "web", keywords=(), log_odds=None, **options) -> dict:
    settings = Settings(preset, **options)
    settings.keywords, settings.log_odds = compile_keywords(keywords), log_odds
    (part,) = clean_document({"text": text, "id": "x", "metadata": {}}, settings)
    return part["metadata"]["scores"]


def records(texts) -> list[dict]:
    return [{"text": text, "id": str(i), "metadata": {}} for i, text in enumerate(texts)]


def write_jsonl(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(folder: Path) -> tuple[list, list, dict]:
    kept = [json.loads(line) for line in (folder / "kept.jsonl").read_text(encoding="utf-8").splitlines()]
    with gzip.open(folder / "dropped.jsonl.gz", "rt", encoding="utf-8") as file:
        dropped = [json.loads(line) for line in file]
    return kept, dropped, json.loads((folder / "drops.json").read_text(encoding="utf-8"))


def command(monkeypatch, *argv) -> int:
    monkeypatch.setattr(sys, "argv", ["clean.py", *map(str, argv)])
    try:
        return clean.main()
    except SystemExit as stop:
        return stop.code


def some_documents(n: int = 60) -> list[str]:
    rng = random.Random(1)
    pool = [*STATUTE.split("\n"), *NOTE.split(". "), "write to a@b.org", "12 34", "", "Home | About us | Contact"]
    return [". ".join(rng.choice(pool) for _ in range(rng.randint(0, 30))) for _ in range(n)] + [STATUTE, NOTE]
