"""Did the facts go in, and is in-context learning alive? Both probes beside bits per byte, in a run without replay.

    python experiments/probes.py --model models/stories260K --domain law_title16.txt law_title28.txt \\
        --general tinystories.txt --separator '<|endoftext|>' --out out/probes
    python experiments/probes.py --model SMOLLM2 --domain law_title16.txt law_title28.txt --general wiki.txt \\
        --facts 0 --in-context 20 --steps 16 --every 4 --lr 5e-4 --batch-size 2 --out out/probes_smollm2

A base reads half of some short documents again and again, and no other text. The fact probe asks for facts of those
documents and of the other half; the in-context probe is generated (measure/probes.py). What was learned by heart is
how the first rises where the second does not; bits per byte of held-out text, which get worse meanwhile, tell neither.
The second command takes a base whose in-context learning is above chance to begin with.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

sys.path.append(str(Path(__file__).resolve().parent))

import scratch
from forgetting import save_study
from scratch import choose_results

from core import cli
from core.config import setting
from core.errors import UserError
from measure.probes import find_facts
from text.corpus import read_documents

# Characters of a document that is read, and of the text before the fact that it holds at least.
SHORTEST, LONGEST, BEFORE = 250, 1200, 60
GENERAL_DOCUMENTS = 200
RUN = ("--data.sources.domain.max-epochs", 10**4, "--data.sources.general.role", "general", "--data.schedule",
       "static", "--data.domain-share", 1, "--train.precision", "fp32", "--forget.lwf.alpha", 0,
       "--optim.warmup-ratio", 0.03, "--eval.tokens", 30_000, "--eval.sample-tokens", 0)
SHOWN = {"facts_trained": "facts of trained documents", "facts_heldout": "facts of held-out ones",
         "in_context": "in context"}


@dataclass(kw_only=True)
class Probes:
    """Train a base on few documents without replay, and ask what went in and what is still alive."""
    model: str
    """The base: a Hugging Face folder."""
    domain: list[str]
    """Text files of the domain."""
    general: list[str]
    """Text files of what the base was trained on; they are scored alone."""
    separator: str | None = None
    """The string that stands between the documents of the general files."""
    documents: int = setting(140, at_least=8)
    """Documents of the domain that hold a fact; half of them are trained on."""
    facts: int = setting(100, at_least=0)
    """Items of facts of either half at most; 0: none."""
    in_context: int = setting(30, at_least=0)
    """Generated items of each kind; 0: none."""
    steps: int = setting(240, above=0)
    """Length of the run."""
    every: int = setting(60, above=0)
    """Steps between evaluations."""
    batch_size: int = setting(8, above=0)
    """Sequences of 256 tokens a step."""
    lr: float = setting(4e-3, above=0)
    """Learning rate at its highest."""
    seed: int = setting(0, at_least=0)
    """Draws the items and the order of the text."""
    out: str = "out/probes"
    """The folder to make."""


def choose_documents(texts: list[str], n: int) -> list[str]:
    """The first n short documents with a fact that has some text before it."""
    texts = [text for text in texts if SHORTEST < len(text) < LONGEST]
    good = sorted({fact.document for fact in find_facts(texts) if fact.start > BEFORE})
    if len(good) < n:
        raise UserError(f"--domain has {len(good)} documents of {SHORTEST} to {LONGEST} characters that hold a fact, "
                        f"and --documents asks for {n}; name more files, or lower it")
    return [texts[i] for i in good[:n]]


def pack_sources(c: Probes, out: Path) -> None:
    domain = choose_documents(list(read_documents(c.domain, cli.Reading())), c.documents)
    general = scratch.read_text(c.general, c.separator)[:GENERAL_DOCUMENTS]
    for name, texts, heldout in (("domain", domain, 0.5), ("general", general, 0.05)):
        scratch.pack_text(texts, out / "shards" / name, Path(c.model), heldout)


def words_of(c: Probes, out: Path) -> list:
    """Words of train.py."""
    return ["--model.path", c.model, "--data.sources.domain.path", out / "shards/domain",
            "--data.sources.general.path", out / "shards/general", *RUN, "--data.context", 256, "--train.batch-size",
            c.batch_size, "--train.micro-batch-size", c.batch_size, "--train.steps", c.steps, "--train.save-every",
            c.steps, "--log.every", c.every, "--optim.lr", c.lr, "--optim.min-lr", c.lr / 10, "--eval.every", c.every,
            "--eval.probes.facts", c.facts, "--eval.probes.in-context", c.in_context, "--seed", c.seed, "--out",
            out / "run"]


def read_rows(lines: list[dict]) -> list[dict]:
    """A row an evaluation: the step, bits per byte of both texts, each probe with its interval, and the distance of the
    weights from the base at the last step that was logged (none at step 0)."""
    rows, distance = [], 0.0
    for line in lines:
        if line["kind"] == "train":
            distance = line["distance"]["all"]
        elif line["kind"] == "eval":
            row = {"step": line["step"], "distance": distance}
            row |= {f"{name}_bits_per_byte": scores["bits_per_byte"] for name, scores in line["sources"].items()}
            for name in (name for name in SHOWN if name in line["probes"]):
                found = line["probes"][name]
                row |= {name: found["value"], f"{name}_interval": found["interval"], f"{name}_chance": found["chance"],
                        f"{name}_items": found["n"]}
            rows.append(row)
    return rows


def describe(rows: list[dict]) -> str:
    """A paragraph that is true of any result; above chance is where the 95 % interval lies above it."""
    first, last, said = rows[0], rows[-1], []
    for name, shown in SHOWN.items():
        if name in last:
            low, chance = last[f"{name}_interval"][0], last[f"{name}_chance"]
            said.append(f"{shown[0].upper()}{shown[1:]}: {first[name]:.2f} before and {last[name]:.2f} after "
                        f"{last['step']} steps, {'above' if low > chance else 'not above'} chance ({chance:.2f}).")
    if "in_context" in first and first["in_context_interval"][0] <= first["in_context_chance"]:
        said.append("In-context learning cannot fall: this base is not above chance from the start.")
    elif "in_context" in first:
        falls = [row["step"] for row in rows if row["in_context_interval"][1] < first["in_context"]]
        worse = [row["step"] for row in rows if row["general_bits_per_byte"] > 1.05 * first["general_bits_per_byte"]]
        said.append(f"In-context learning is below where it was, with its interval, {when(falls)}; general text is 5 % "
                    f"worse {when(worse)}.")
    best = min(rows, key=lambda row: row["domain_bits_per_byte"])
    said.append(f"Held-out text of the domain is best at step {best['step']} ({best['domain_bits_per_byte']:.3f} bits "
                f"per byte) and ends at {last['domain_bits_per_byte']:.3f}; general text goes from "
                f"{first['general_bits_per_byte']:.3f} to {last['general_bits_per_byte']:.3f}.")
    return " ".join(said)


def when(steps: list[int]) -> str:
    return f"from step {steps[0]} on" if steps else "at no step"


def draw(rows: list[dict]) -> Figure:
    """The probes with their intervals, and below them bits per byte, over the steps."""
    figure = Figure(figsize=(8, 7), layout="constrained", dpi=120)
    above, below = figure.subplots(2, 1, sharex=True)
    steps = [row["step"] for row in rows]
    for i, (name, shown) in enumerate(SHOWN.items()):
        if name in rows[0]:
            above.plot(steps, [row[name] for row in rows], f"C{i}o-", label=shown)
            above.fill_between(steps, *zip(*(row[f"{name}_interval"] for row in rows)), color=f"C{i}", alpha=0.15)
            above.axhline(rows[0][f"{name}_chance"], color=f"C{i}", linestyle=":", linewidth=1)
    for i, name in enumerate(("domain", "general")):
        below.plot(steps, [row[f"{name}_bits_per_byte"] for row in rows], f"C{i + 3}o-", label=f"held-out {name}")
    above.set(ylabel="share right (dotted: chance)", ylim=(0, 1))
    below.set(xlabel="step", ylabel="bits per byte")
    for axes in (above, below):
        axes.legend(frameon=False, fontsize=8)
    return figure


COLUMNS = {"step": ("step", "d"), "facts of trained documents": ("facts_trained", ".2f"),
           "facts of held-out ones": ("facts_heldout", ".2f"), "in context": ("in_context", ".3f"),
           "domain, bits per byte": ("domain_bits_per_byte", ".3f"), "general": ("general_bits_per_byte", ".3f"),
           "distance from the base": ("distance", ".1f")}


def run_study(c: Probes) -> dict:
    if not (c.facts or c.in_context):
        raise UserError("--facts 0 and --in-context 0 leave nothing to ask")
    began, out = time.perf_counter(), scratch.make_folder(c)
    pack_sources(c, out)
    cli.run_command("train.py", cli.ROOT / "recipes/cpt.toml", *words_of(c, out), threads=1)
    rows = read_rows(scratch.read_lines(out / "run/metrics.jsonl"))
    shows = describe(rows)
    print(f"\n{scratch.format_table(rows, COLUMNS)}\n\n{shows}")
    save_study("probes", [c.seed], choose_results(c, out, "out", "separator"), rows, draw(rows), began, shows=shows)
    return {"rows": rows, "shows": shows}


if __name__ == "__main__":
    sys.exit(cli.run("experiments/probes.py", __doc__, (Probes, run_study)))
