"""What the tests of deduplication are made of: texts with copies, and brute force over sets of word tuples."""

import json
import random
import re
from collections import Counter
from pathlib import Path

import dedup as module
from core.cli import Output


def dedup(files, out, *, overwrite: bool = False, workers: int = 1, **options) -> dict:
    """dedup.py's dedup, its options written out; one worker unless more are asked for."""
    output = Output(out=str(out), overwrite=overwrite)
    return module.dedup(module.Dedup(files=files, output=output, workers=workers, **options))


def found_share(s: float) -> float:
    """The banding's chance to propose a pair of similarity s."""
    return 1 - (1 - s**8) ** 14


def spoken(text: str) -> list[str]:
    return re.sub("[\u3040-\u30ff\u4e00-\u9fff]", r" \g<0> ", text.casefold()).split()      # WikiText quotes kana


def shingle_set(text: str, n: int = 5) -> set:
    listed = spoken(text)
    return {tuple(listed[i:i + n]) for i in range(max(len(listed) - n + 1, 1))}


def all_similar(texts: list[str], least: float) -> dict:
    """{(i, j): Jaccard similarity} of every pair i < j that shares a shingle and has at least this similarity."""
    sets, where, common = [shingle_set(t) for t in texts], {}, Counter()
    for i, shingles in enumerate(sets):
        for shingle in shingles:
            for j in where.setdefault(shingle, []):
                common[j, i] += 1
            where[shingle].append(i)
    pairs = {(i, j): n / (len(sets[i]) + len(sets[j]) - n) for (i, j), n in common.items()}
    return {pair: s for pair, s in pairs.items() if s >= least}


def write_jsonl(path, records) -> str:
    Path(path).write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return str(path)


def read_jsonl(path) -> list:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def random_texts(n: int, seed: int = 0, copies: float = 0.3) -> list[str]:
    """Texts of 20 to 120 words, a share of them copies with up to two changed words."""
    rng, texts = random.Random(seed), []
    for _ in range(n):
        if texts and rng.random() < copies:
            listed = rng.choice(texts).split()
            for _ in range(rng.randrange(3)):
                listed[rng.randrange(len(listed))] = f"new{rng.randrange(99)}"
        else:
            listed = [f"w{int(rng.paretovariate(0.6)) % 5000}" for _ in range(rng.randrange(20, 120))]
        texts.append(" ".join(listed))
    return texts


def records_of(texts) -> list[dict]:
    return [{"text": t, "id": f"d{i}", "metadata": {"source": "test", "n": i}} for i, t in enumerate(texts)]


def edited(text: str, share: float, rng) -> str:
    listed = text.split(" ")
    for i in rng.sample(range(len(listed)), max(round(share * len(listed)), 1)):
        listed[i] = "".join(rng.choice("aeioubcdfg") for _ in range(7))
    return " ".join(listed)
