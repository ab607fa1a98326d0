"""What each objective makes of one model and one text: how it converges, and what a linear probe reads off its states.

    python experiments/objectives.py --text tinystories.txt --separator '<|endoftext|>' --out out/objectives \\
        --probe law=law_title16.txt courts=law_title28.txt plays=shakespeare.txt wiki=wiki.valid.raw

The same model is trained from scratch by each of --objectives, with the same first weights, rate, number of steps and
tokenizer, whose mask token, sentinels and marks none of the text holds. Losses are of held-out sequences, each
objective's own: nats per target, or of ELECTRA's discriminator nats per judged token; they compare with each other only
where the targets are alike (causal and masked). Where a model predicts the next token at all, bits per byte of the
held-out documents, read from left to right, compare it with any other.

The probe is logistic regression on the frozen mean states under the objective's own attention (masked and electra see
both ways): which --probe file is a passage of --passage tokens from? An untrained model has the same probe. Of the same
states it is counted in how many directions they vary: a model that so far knows the frequencies of its targets and
nothing else has nearly the same states whatever it reads.

Full size, 6 blocks of width 512 on WikiText-103 for 10,000 steps, on one GPU; it prints the guides' figures beside:

    python experiments/objectives.py --recipe recipes/scratch_full.toml --size 19M --steps 10000 --vocab-size 32000 \\
        --text wikitext103/train.txt --seeds 0 --jobs 1 --out out/objectives_full
"""

import sys
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import Literal

import numpy as np
from matplotlib.figure import Figure

sys.path.append(str(Path(__file__).resolve().parent))

import probe
import scratch
from data_quality import PASSAGES, read_probe
from forgetting import save_study
from scratch import SIZES, Scratch, choose_results

import hf
import tokenizer as tokenizers
from core import cli
from core.config import setting
from model import Model
from text.extend_vocabulary import add
from text.shards import Shards

# {objective: words of train.py beside its name}
OBJECTIVES = {"causal": [], "masked": [], "span": [], "ul2": [], "fim": [], "electra": [],
              "mixture": ["--objective.weights.causal", 3, "--objective.weights.masked", 1]}
BOTH_WAYS = ("masked", "electra")
# What is followed of a run: the loss, but the model's own part of it where there is another's in the sum.
OWN_LOSS = {"electra": "discriminator_loss"}
POINTS = 6
CONVERGED = 0.9
# {size: (the guides' name, causal perplexity, masked loss in nats, masked accuracy)} after 10,000 steps. 19M are the
# blocks of their smallest model, which they count with the embedding.
EXPECTED = {"19M": ("25M", 42.3, 3.21, 0.623), "50M": ("50M", 35.7, 2.87, 0.681), "100M": ("100M", 28.1, 2.45, 0.745)}


@dataclass(kw_only=True)
class Objectives(Scratch):
    objectives: list[Literal[*OBJECTIVES]] = setting(list(OBJECTIVES))
    """The objectives to compare; mixture is three parts causal and one masked."""
    probe: list[str] = setting([])
    """NAME=FILE ...: a class each; without them there is no probe."""
    passage: int = setting(16, above=0)
    """Tokens of a passage of the probe."""
    size: Literal[*SIZES] = "83K"
    """Parameters without the embedding."""
    steps: int | None = setting(180, above=0)
    """Length of each run."""
    out: str = "out/objectives"


# ---- a run

def read_curves(lines: list[dict]) -> dict[str, list[tuple]]:
    """{measure: [(step, value)]} of the held-out text, from the lines of metrics.jsonl. Causal has no measures beside
    its loss, and is scored on documents instead of sequences."""
    curves = {}
    for line in lines:
        if line["kind"] == "eval":
            found = line["objective"] if "objective" in line else {"text": {
                "loss": line["sources"]["text"]["nats_per_token"]}}
            for name, value in found["text"].items():
                curves.setdefault(name, []).append((line["step"], value))
    return curves


def find_converged(curve: list[tuple], share: float = CONVERGED) -> float | None:
    """The step by which `share` of the whole fall of a loss is first done, on lines between its points; None where it
    does not fall."""
    start, end = curve[0][1], curve[-1][1]
    goal = start - share * (start - end)
    if end >= start:
        return None
    for (step, loss), (next_step, next_loss) in pairwise(curve):
        if next_loss <= goal:
            return step + (next_step - step) * (loss - goal) / (loss - next_loss)
    raise AssertionError("the last loss is beyond its own goal")


def measure(objective: str, seed: int, c: Objectives, steps: int, passages: tuple | None, out: Path) -> dict:
    began, folder = time.perf_counter(), out / f"runs/{objective}_{seed}"
    scores, lines = scratch.train_model(c, folder, out / "tokenizer", [
        *scratch.size_words(c.size), "--data.sources.text.path", out / "shards", "--data.sources.text.max-epochs", 1000,
        "--train.steps", steps, "--eval.every", max(1, steps // POINTS), "--objective.name", objective,
        *OBJECTIVES[objective], *scratch.batch_words(c)], seed)
    curves = read_curves(lines)
    curve = curves[OWN_LOSS.get(objective, "loss")]
    measured = {name: values[-1][1] for name, values in curves.items()}
    reads = "bits_per_byte" in scores["text"]
    row = {"objective": objective, "seed": seed, "steps": steps, "loss_before": curve[0][1], "loss": curve[-1][1],
           "converged": find_converged(curve), "curve": curve, "measured": measured,
           "accuracy": measured.get("accuracy", measured.get("discriminator_accuracy")),
           # What always to say "original" would reach.
           "constant_accuracy": 1 - measured["replaced_share"] if objective == "electra" else None,
           "bits_per_byte": scores["text"]["bits_per_byte"] if reads else None,
           "perplexity": scores["text"]["perplexity"] if reads else None,
           **look(hf.load(folder / "final"), passages, causal=objective not in BOTH_WAYS),
           "step_ms": median(line["step_ms"] for line in lines if line["kind"] == "train"),
           "seconds": time.perf_counter() - began}
    print(f"{objective:8} seed {seed}: loss {row['loss_before']:.4f} to {row['loss']:.4f}"
          + ("" if row["probe"] is None else f", probe {row['probe']:.1%}") + f", {row['seconds']:.0f} s", flush=True)
    return row


def entropy_of(tokens: np.ndarray) -> float:
    """Nats per token that it costs to know how frequent each token is, and nothing else."""
    counts = np.bincount(tokens)
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())


def look(model, passages: tuple | None, causal: bool) -> dict:
    """{"probe": its accuracy, "directions": in how many the states vary}; None without passages."""
    if passages is None:
        return {"probe": None, "directions": None}
    tokens, labels, is_test = passages
    states = probe.mean_states(model, tokens, causal)
    return {"probe": probe.fit_probe(states, labels, is_test)["accuracy"],
            "directions": probe.count_directions(states)}


def look_untrained(c: Objectives, config, passages: tuple) -> dict[str, dict]:
    """{which way it sees: `look`} of models as the runs begin, means over the seeds."""
    found = {"one way": [], "both ways": []}
    for seed in c.seeds:
        model = Model(config)
        model.initialise(seed)
        for way, values in found.items():
            values.append(look(model, passages, causal=way == "one way"))
    return {way: {key: mean(value[key] for value in values) for key in values[0]} for way, values in found.items()}


# ---- what it shows

MEANS = ("loss_before", "loss", "converged", "accuracy", "constant_accuracy", "bits_per_byte", "perplexity", "probe",
         "directions", "step_ms", "seconds")


def summarise(rows: list[dict]) -> list[dict]:
    """A row per objective: means over the seeds (None where a seed has none), and the spreads of loss and probe."""
    table = []
    for objective in dict.fromkeys(row["objective"] for row in rows):
        same = [row for row in rows if row["objective"] == objective]
        values = {key: [row[key] for row in same] for key in MEANS}
        known = {key: None if None in found else found for key, found in values.items()}
        table.append({"objective": objective} | {key: found and mean(found) for key, found in known.items()} | {
            f"{key}_spread": found and max(found) - min(found)
            for key, found in known.items() if key in ("loss", "bits_per_byte", "probe")})
    return table


def describe(c: Objectives, table: list[dict], rows: list[dict], frequencies: float, untrained: dict | None) -> str:
    """A paragraph that is true of any result. A difference counts where the seeds spread less."""
    found = {row["objective"]: row for row in table}
    return " ".join([*tell_convergence(table, rows), *tell_context(found, frequencies), *tell_reading(found),
                     *(tell_probe(table, untrained, len(c.probe)) if untrained else ()),
                     *tell_expected(c.size, found)])


def tell_convergence(table: list[dict], rows: list[dict]) -> list[str]:
    fell = sorted((row for row in table if row["converged"] is not None), key=lambda row: row["converged"])
    words = [f"Of {rows[0]['steps']:,} steps, {CONVERGED:.0%} of the fall of the held-out loss took "
             + ", ".join(f"{row['converged']:.0f} ({row['objective']})" for row in fell) + "."] if fell else []
    rose = [row["objective"] for row in table if row["converged"] is None]
    return words + [f"The loss of {', '.join(rose)} did not fall with every seed."] * bool(rose)


def tell_context(found: dict, frequencies: float) -> list[str]:
    """Whether the losses that are comparable are below what the frequencies of the tokens alone give; and ELECTRA."""
    words = [f"{name} ends at {found[name]['loss']:.3f} nats per target, {abs(frequencies - found[name]['loss']):.3f} "
             f"{'below' if found[name]['loss'] < frequencies else 'above'} what the frequencies of the tokens alone "
             f"give ({frequencies:.3f})." for name in ("causal", "masked") if name in found]
    if "electra" in found:
        row = found["electra"]
        better = row["accuracy"] - row["constant_accuracy"]
        words.append(f"electra judges {row['accuracy']:.1%} of the tokens rightly, {abs(100 * better):.1f} points "
                     f"{'more' if better > 0 else 'less'} than always to say original.")
    return words


def tell_reading(found: dict) -> list[str]:
    """Of those that predict the next token at all, how much more than causal a byte of text costs."""
    if "causal" not in found:
        return []
    base = found["causal"]["bits_per_byte"]
    others = [f"{row['objective']} {row['bits_per_byte'] / base - 1:+.1%}" for row in found.values()
              if row["bits_per_byte"] is not None and row["objective"] != "causal"]
    return [f"Read from left to right, held-out text costs causal {base:.3f} bits per byte"
            + (f", relative to that {', '.join(others)}." if others else ".")]


def tell_probe(table: list[dict], untrained: dict, classes: int) -> list[str]:
    best, worst = (choose(table, key=lambda row: row["probe"]) for choose in (max, min))
    above = {row["objective"]: row["probe"] - untrained[way_of(row["objective"])]["probe"] for row in table}
    beat = [row["objective"] for row in table if above[row["objective"]] > row["probe_spread"]]
    spread = max(row["probe_spread"] for row in table)
    return [f"The probe tells {classes} texts apart in {worst['probe']:.1%} ({worst['objective']}) to "
            f"{best['probe']:.1%} ({best['objective']}) of the passages; an untrained model in "
            f"{untrained['one way']['probe']:.1%} seeing one way and {untrained['both ways']['probe']:.1%} both ways, "
            f"chance is {1 / classes:.1%}. Above the untrained model by more than their seeds spread (up to "
            f"{spread:.1%}): {', '.join(beat) or 'none'}. The states vary in as many directions as "
            + ", ".join(f"{row['directions']:.1f} ({row['objective']})" for row in
                        sorted(table, key=lambda row: row["directions"]))
            + f"; an untrained model's in {untrained['one way']['directions']:.0f}."]


def tell_expected(size: str, found: dict) -> list[str]:
    """The guides' figures beside the measured ones. They are expectations to check."""
    if size not in EXPECTED:
        return []
    name, perplexity, loss, accuracy = EXPECTED[size]
    said = [f"causal perplexity {perplexity} (here {found['causal']['perplexity']:.1f})"] if "causal" in found else []
    if "masked" in found:
        said += [f"masked loss {loss} (here {found['masked']['loss']:.2f})",
                 f"masked accuracy {accuracy:.1%} (here {found['masked']['accuracy']:.1%})"]
    return [f"The guides expect of {name} after 10,000 steps: {', '.join(said)}."] if said else []


def way_of(objective: str) -> str:
    return "both ways" if objective in BOTH_WAYS else "one way"


def mean_curve(rows: list[dict], objective: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, mean losses over the seeds)"""
    curves = np.array([row["curve"] for row in rows if row["objective"] == objective])
    return curves[0, :, 0], curves[:, :, 1].mean(0)


def draw_chart(table: list[dict], rows: list[dict], frequencies: float, untrained: dict | None,
               classes: int) -> Figure:
    """Losses over the steps; the same as shares of each one's fall; the probe, where there is one, a dot per seed."""
    figure = Figure(figsize=(14 if untrained else 9.5, 4.6), layout="constrained", dpi=120)
    losses, shares, *rest = figure.subplots(1, 3 if untrained else 2)
    for i, row in enumerate(table):
        steps, loss = mean_curve(rows, row["objective"])
        losses.plot(steps, loss, color=f"C{i}", marker=".", label=row["objective"])
        if row["converged"] is not None:
            shares.plot(steps, (loss[0] - loss) / (loss[0] - loss[-1]), color=f"C{i}", marker=".")
    losses.axhline(frequencies, color="grey", linestyle="--", linewidth=0.8, label="frequencies of the tokens alone")
    losses.set(title="held-out loss, each one's own", xlabel="step", ylabel="nats per target", ylim=(0, None))
    shares.axhline(CONVERGED, color="grey", linestyle="--", linewidth=0.8)
    shares.set(title="share of its fall that is done", xlabel="step")
    for axes in rest:
        axes.barh(range(len(table)), [row["probe"] for row in table], alpha=0.5,
                  color=[f"C{i}" for i in range(len(table))])
        places = {row["objective"]: i for i, row in enumerate(table)}
        axes.scatter([row["probe"] for row in rows], [places[row["objective"]] for row in rows], s=12, color="black")
        for value, style, label in ((1 / classes, ":", "chance"),
                                    (untrained["one way"]["probe"], "--", "untrained, one way"),
                                    (untrained["both ways"]["probe"], "-.", "untrained, both ways")):
            axes.axvline(value, color="black", linestyle=style, linewidth=0.9, label=label)
        axes.set(title="accuracy of a linear probe", yticks=range(len(table)), yticklabels=places)
        axes.invert_yaxis()
    # Below the axes, where it covers nothing.
    figure.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=6)
    return figure


COLUMNS = {"objective": ("objective", ""), "loss before": ("loss_before", ".4f"), "after": ("loss", ".4f"),
           "between seeds": ("loss_spread", ".4f"), "90 % of the fall": ("converged", ".0f"),
           "accuracy": ("accuracy", ".1%"), "bits per byte": ("bits_per_byte", ".4f"),
           "perplexity": ("perplexity", ".2f"), "probe": ("probe", ".1%"), "its seeds": ("probe_spread", ".1%"),
           "directions": ("directions", ".1f"),
           "ms a step": ("step_ms", ".0f")}


def prepare(c: Objectives, out: Path) -> int:
    """Train the tokenizer, give it what the objectives put between a text's parts, and pack; returns the tokens."""
    texts = scratch.read_text(c.text, c.separator)
    tokenizers.train(texts, "bpe", c.vocab_size, out / "words")
    (out / "tokenizer").mkdir()
    add(out / "words", [], out / "tokenizer", objectives=["masked", "span", "ul2", "fim"])
    return scratch.pack_text(texts, out / "shards", out / "tokenizer")


def run_study(c: Objectives) -> dict:
    classes, passages, untrained = read_probe(c.probe), None, None
    began, out = time.perf_counter(), scratch.make_folder(c)
    steps = scratch.count_steps(c, prepare(c, out))
    packed = Shards(out / "shards")
    frequencies = entropy_of(packed.read(0, packed.tokens)[0])
    if classes:
        passages = probe.cut_passages(tokenizers.load(out / "tokenizer"), classes, c.passage, PASSAGES, c.separator)
    rows = scratch.run_all(c.jobs, measure, [(objective, seed, c, steps, passages, out) for objective in c.objectives
                                             for seed in c.seeds])
    if classes:
        config = hf.open_base(out / f"runs/{c.objectives[0]}_{c.seeds[0]}/final").config
        untrained = look_untrained(c, config, passages)
    table = summarise(rows)
    shows = describe(c, table, rows, frequencies, untrained)
    print(f"\n{scratch.format_table(table, COLUMNS)}\n\n{shows}")
    folder = choose_results(c, out, "out", "jobs", "separator", "probe")
    save_study("objectives", c.seeds, folder, rows, draw_chart(table, rows, frequencies, untrained, len(classes)),
               began, table=table, untrained=untrained, frequencies=frequencies, classes=list(classes), shows=shows)
    return {"table": table, "untrained": untrained, "rows": rows}


if __name__ == "__main__":
    sys.exit(cli.run("experiments/objectives.py", __doc__, (Objectives, run_study)))
