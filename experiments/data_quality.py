"""What noise and copies in a corpus cost, and how much clean.py and dedup.py bring back.

    python experiments/data_quality.py --text tinystories.txt --separator '<|endoftext|>' \\
        --probe law=law_title16.txt courts=law_title28.txt plays=shakespeare.txt wiki=wiki.valid.raw --out out/quality

The same small model is trained from scratch on versions of one corpus, on the same number of tokens:

    clean                 the documents as they are
    noisy                 a --share of the documents spoilt: a quarter of their letters garbled, or boilerplate between
                          their sentences, or the words in another order
    noisy, cleaned        that after `clean.py --preset web`
    duplicated            a --share of the documents replaced by copies of 1 % of them, half with changed words
    duplicated, deduped   that after `dedup.py`

A version with less text is read more often. All are scored in bits per byte on the same clean held-out documents. The
probe is logistic regression on the frozen mean states: which --probe file is a passage of --passage tokens from?
Full size: --recipe recipes/scratch_full.toml --size 100M --steps 10000 --vocab-size 32000 --jobs 1.
"""

import json
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Literal

from matplotlib.figure import Figure

sys.path.append(str(Path(__file__).resolve().parent))

import probe
import scratch
from forgetting import save_study
from scratch import HELDOUT, SIZES, Scratch, choose_results

import hf
import tokenizer as tokenizers
from core import cli
from core.config import setting
from core.errors import UserError
from core.files import read_json, write_text
from model import Model
from text.corpus import utf8
from text.heldout import is_held_out, normalise

GARBAGE = "#$%&*@~^|<>{}[]=+_0123456789\ufffdÃ©â€"
BOILERPLATE = (
    "Accept all cookies to continue.", "Share on Facebook | Tweet | Pin it", "Click here to subscribe to our news!",
    "Copyright 2019. All rights reserved.", "Home | About us | Contact | Privacy policy", "Read more...",
    "Log in or sign up to leave a comment", "Please enable JavaScript to view this page.", "Advertisement")
PASSAGES = 600


# ---- the versions

def garble(text: str, rng: random.Random) -> str:
    """A quarter of the characters that are no white space, each another sign."""
    return "".join(rng.choice(GARBAGE) if not c.isspace() and rng.random() < 0.25 else c for c in text)


def add_boilerplate(text: str, rng: random.Random) -> str:
    """A line of boilerplate after every other sentence, in the mean."""
    parts = text.split(". ")
    return "".join(part + ("" if i == len(parts) - 1 else
                           ".\n" + rng.choice(BOILERPLATE) + "\n" if rng.random() < 0.5 else ". ")
                   for i, part in enumerate(parts))


def shuffle_words(text: str, rng: random.Random) -> str:
    words = text.split()
    rng.shuffle(words)
    return " ".join(words)


NOISE: tuple[Callable[[str, random.Random], str], ...] = (garble, add_boilerplate, shuffle_words)


def add_noise(texts: list[str], share: float, seed: int) -> list[str]:
    """The texts, each spoilt with probability `share` in one of three ways; a function of (seed, place)."""
    out = []
    for place, text in enumerate(texts):
        rng = random.Random(f"noise {seed} {place}")
        out.append(rng.choice(NOISE)(text, rng) if rng.random() < share else text)
    return out


def change_words(text: str, rng: random.Random, share: float = 0.01) -> str:
    """A near-copy: a share of the words, at least one, each replaced by another word of the text."""
    words = text.split(" ")
    for place in rng.sample(range(len(words)), max(1, round(share * len(words)))):
        words[place] = rng.choice(words)
    return " ".join(words)


def duplicate(texts: list[str], share: float, seed: int) -> list[str]:
    """As many bytes as in `texts`, to within a document; a `share` of them are copies of 1 % of the documents (one at
    least), half exact and half with changed words, the rest the first documents once each. In an order of the seed."""
    rng = random.Random(f"copies {seed}")
    total = sum(len(utf8(text)) for text in texts)
    out, size = [], 0
    for text in texts:
        if size + len(utf8(text)) > (1 - share) * total:
            break
        out.append(text)
        size += len(utf8(text))
    if share and out:
        sources = rng.sample(out, max(1, len(texts) // 100))
        while size < total:
            text = rng.choice(sources)
            out.append(change_words(text, rng) if rng.random() < 0.5 else text)
            size += len(utf8(text))
    rng.shuffle(out)
    return out


# ---- the study

VERSIONS = ("clean", "noisy", "noisy, cleaned", "duplicated", "duplicated, deduped")


@dataclass(kw_only=True)
class Quality(Scratch):
    probe: list[str] = setting([])
    """NAME=FILE ...: a class each; without them there is no probe."""
    passage: int = setting(16, above=0)
    """Tokens of a passage of the probe."""
    share: float = setting(0.6, above=0, below=1)
    """Share of the documents that are spoilt, or are copies."""
    size: Literal[*SIZES] = "83K"
    """Parameters without the embedding."""
    steps: int | None = setting(300, above=0)
    """Length of each run."""
    out: str = "out/quality"


def write_records(file: Path, texts: list[str]) -> Path:
    write_text(file, "".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file


def pack_versions(c: Quality, texts: list[str], out: Path) -> dict[str, int]:
    """{version: tokens} of the versions of what is not held out, and beside them the clean text, which is scored. The
    corpus is spoilt in the same way for all seeds of the training."""
    scratch.pack_text(texts, out / "shards/all", out / "tokenizer")
    texts = [text for text in texts if not is_held_out(utf8(normalise(text)), HELDOUT)]
    files = {"clean": write_records(out / "clean.jsonl", texts),
             "noisy": write_records(out / "noisy.jsonl", add_noise(texts, c.share, 0)),
             "duplicated": write_records(out / "duplicated.jsonl", duplicate(texts, c.share, 0))}
    cli.run_command("clean.py", files["noisy"], "--preset", "web", "--no-pii", "--out", out / "cleaned", threads=1)
    cli.run_command("dedup.py", files["duplicated"], "--out", out / "deduped", "--workers", 1, threads=1)
    files |= {"noisy, cleaned": out / "cleaned/kept.jsonl", "duplicated, deduped": out / "deduped/kept.jsonl"}
    return {version: scratch.pack_text(scratch.read_text([str(file)], None), out / "shards" / version,
                                       out / "tokenizer", heldout=0) for version, file in files.items()}


def measure(version: str, seed: int, c: Quality, steps: int, passages: tuple | None, out: Path) -> dict:
    began, folder = time.perf_counter(), out / f"runs/{version.replace(', ', '_')}_{seed}"
    shards = out / "shards" / version
    scores, lines = scratch.train_model(c, folder, out / "tokenizer", [
        *scratch.size_words(c.size), "--data.sources.text.path", shards, "--data.sources.text.max-epochs", 1000,
        "--data.sources.clean.path", out / "shards/all", "--data.sources.clean.role", "general",
        "--data.sources.clean.weight", 0, "--train.steps", steps, *scratch.batch_words(c)], seed)
    packed = read_json(shards / "manifest.json")["splits"]["train"]
    row = {"version": version, "seed": seed, "bits_per_byte": scores["clean"]["bits_per_byte"],
           "perplexity": scores["clean"]["perplexity"], "documents": packed["documents"], "tokens": packed["tokens"],
           "epochs": [line for line in lines if line["kind"] == "train"][-1]["sources"]["text"]["epochs"],
           "steps": steps, "accuracy": probe_model(hf.load(folder / "final"), passages),
           "seconds": time.perf_counter() - began}
    probed = "" if row["accuracy"] is None else f", probe {row['accuracy']:.1%}"
    print(f"{version:20} seed {seed}: {row['bits_per_byte']:.4f} bits per byte{probed}, {row['seconds']:.0f} s",
          flush=True)
    return row


def probe_model(model: Model, passages: tuple | None, causal: bool = True) -> float | None:
    if passages is None:
        return None
    tokens, labels, is_test = passages
    return probe.fit_probe(probe.mean_states(model, tokens, causal), labels, is_test)["accuracy"]


def summarise(rows: list[dict]) -> list[dict]:
    """A row per version: means and spreads over the seeds, and the cost in bits per byte relative to clean text."""
    clean = mean(row["bits_per_byte"] for row in rows if row["version"] == "clean")
    table = []
    for version in dict.fromkeys(row["version"] for row in rows):
        same = [row for row in rows if row["version"] == version]
        bits = [row["bits_per_byte"] for row in same]
        right = [row["accuracy"] for row in same if row["accuracy"] is not None]
        table.append({key: mean(row[key] for row in same) for key in
                      ("bits_per_byte", "perplexity", "documents", "tokens", "epochs", "seconds")} |
                     {"version": version, "spread": max(bits) - min(bits), "cost": mean(bits) / clean - 1,
                      "accuracy": mean(right) if right else None,
                      "accuracy_spread": max(right) - min(right) if right else None})
    return table


def describe(table: list[dict], untrained: float | None, classes: int, share: float) -> str:
    """A paragraph that is true of any result. A difference counts where the seeds of both versions spread less."""
    rows = {row["version"]: row for row in table}
    words = [f"{share:.0%} of the documents were spoilt, or of the bytes were copies; all versions were read for the "
             f"same tokens."]
    for spoilt, mended, command in (("noisy", "noisy, cleaned", "clean.py"),
                                    ("duplicated", "duplicated, deduped", "dedup.py")):
        cost = rows[spoilt]["bits_per_byte"] - rows["clean"]["bits_per_byte"]
        noise = max(rows[name]["spread"] for name in ("clean", spoilt, mended))
        if cost <= noise:
            words.append(f"The {spoilt} version cost {cost:+.4f} bits per byte, no more than the seeds spread "
                         f"({noise:.4f}).")
            continue
        back = 1 - (rows[mended]["bits_per_byte"] - rows["clean"]["bits_per_byte"]) / cost
        read = rows[mended]["epochs"]
        words.append(f"The {spoilt} version cost {rows[spoilt]['cost']:.1%} in bits per byte on clean text; {command} "
                     f"kept {rows[mended]['documents'] / rows[spoilt]['documents']:.0%} of its documents and brought "
                     f"back {back:.0%} of that, the rest read {read:.1f} times.")
    if untrained is not None:
        best, worst = (choose(table, key=lambda row: row["accuracy"]) for choose in (max, min))
        spread = max(row["accuracy_spread"] for row in table)
        differs = best["accuracy"] - worst["accuracy"] > spread
        words.append(f"The probe tells {classes} texts apart in {worst['accuracy']:.1%} ({worst['version']}) to "
                     f"{best['accuracy']:.1%} ({best['version']}) of the passages, an untrained model in "
                     f"{untrained:.1%}, chance is {1 / classes:.1%}; the seeds spread by up to {spread:.1%}, so the "
                     f"versions {'differ' if differs else 'do not differ'} in what it finds.")
    return " ".join(words)


def draw_chart(table: list[dict], rows: list[dict]) -> Figure:
    """Bits per byte of each version, and the probe's accuracy where there is one; a dot per seed."""
    probed = table[0]["accuracy"] is not None
    figure = Figure(figsize=(10 if probed else 6, 4), layout="constrained", dpi=120)
    keys = ("bits_per_byte", "accuracy") if probed else ("bits_per_byte",)
    for axes, key in zip(figure.subplots(1, len(keys), squeeze=False)[0], keys):
        places = {row["version"]: i for i, row in enumerate(table)}
        axes.barh(range(len(table)), [row[key] for row in table], color=[f"C{i}" for i in range(len(table))], alpha=0.5)
        values = [row[key] for row in rows]
        axes.scatter(values, [places[row["version"]] for row in rows], s=12, color="black", zorder=3)
        margin = 0.3 * (max(values) - min(values)) + 1e-3
        axes.set(yticks=range(len(table)), yticklabels=places, xlim=(min(values) - margin, max(values) + margin),
                 xlabel={"bits_per_byte": "bits per byte on clean held-out text", "accuracy": "probe accuracy"}[key])
        axes.invert_yaxis()
    figure.suptitle("the same model on the same number of tokens; axes do not begin at 0", fontsize=10)
    return figure


COLUMNS = {"version": ("version", ""), "bits per byte": ("bits_per_byte", ".4f"), "between seeds": ("spread", ".4f"),
           "cost": ("cost", "+.1%"), "perplexity": ("perplexity", ".2f"), "documents": ("documents", ",.0f"),
           "epochs": ("epochs", ".2f"), "probe": ("accuracy", ".1%"), "seconds": ("seconds", ".0f")}


def read_probe(words: list[str]) -> dict[str, str]:
    files = dict(word.partition("=")[::2] for word in words)
    for name, file in files.items():
        if not Path(file).is_file():
            raise UserError(f"--probe {name}={file} names no file; give NAME=FILE")
    if len(files) == 1:
        raise UserError("--probe has one class, and needs two or more")
    return files


def run_study(c: Quality) -> dict:
    classes = read_probe(c.probe)
    began, out = time.perf_counter(), scratch.make_folder(c)
    texts, passages, untrained = scratch.read_text(c.text, c.separator), None, None
    tokenizer = tokenizers.train(texts, "bpe", c.vocab_size, out / "tokenizer")
    if classes:
        passages = probe.cut_passages(tokenizer, classes, c.passage, PASSAGES, c.separator)
    steps = scratch.count_steps(c, pack_versions(c, texts, out)["clean"])
    rows = scratch.run_all(c.jobs, measure, [(version, seed, c, steps, passages, out) for version in VERSIONS
                                             for seed in c.seeds])
    if classes:
        model = Model(hf.open_base(out / f"runs/clean_{c.seeds[0]}/final").config)
        model.initialise(c.seeds[0])
        untrained = probe_model(model, passages)
    table = summarise(rows)
    shows = describe(table, untrained, len(classes), c.share)
    print(f"\n{scratch.format_table(table, COLUMNS)}\n\n{shows}")
    folder = choose_results(c, out, "out", "jobs", "separator", "probe")
    save_study("data_quality", c.seeds, folder, rows, draw_chart(table, rows), began, table=table, untrained=untrained,
               classes=list(classes), shows=shows)
    return {"table": table, "untrained": untrained, "rows": rows}


if __name__ == "__main__":
    sys.exit(cli.run("experiments/data_quality.py", __doc__, (Quality, run_study)))
