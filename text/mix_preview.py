"""What a recipe's mix draws over a run: `python data.py mix RECIPE --preview` prints a table and draws a picture."""

import dataclasses
import itertools
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from core import cli
from core.config import merge, read_toml
from core.errors import UserError
from text.mixture import (
    DataConfig,
    LengthConfig,
    SourceConfig,
    describe_mix,
    judge_epochs,
    make_plan,
    progress_of,
    replay_strata,
    weights_at,
)
from text.packing import pack_sources
from text.parts import open_buckets
from text.shards import Shards


@dataclass
class MixSettings:
    """What of a recipe decides the mix."""

    data: DataConfig = field(default_factory=DataConfig)
    train: LengthConfig = field(default_factory=LengthConfig)


def preview_mix(recipe: str, words: list[str], picture: Path) -> dict:
    """Print and draw what a recipe's plan draws; sources that are not packed yet are allowed where the length is given
    in steps or tokens."""
    values, lengths = read_toml(recipe), {f.name for f in dataclasses.fields(LengthConfig)}
    length = {key: value for key, value in values.get("train", {}).items() if key in lengths}
    settings = merge(MixSettings(), {"data": values.get("data", {}), "train": length})
    settings = cli.parse(MixSettings, words, recipe=True, default=settings)
    config, T = settings.data, settings.data.context
    if not config.sources:
        raise UserError(f"{recipe} names no source; add one, e.g. --data.sources.domain.path shards/legal")
    missing = [name for name, source in config.sources.items() if not (source.path and Path(source.path).is_dir())]
    if missing and not (settings.train.steps or settings.train.tokens):
        raise UserError(f"data.sources.{missing[0]}.path is no folder, so an epoch has no length; make it with data.py "
                        f"pack, or give --train.steps")
    sources = open_buckets(config.sources)
    shards = {name: Shards(s.path) for name, s in sources.items() if s.path and Path(s.path).is_dir()}
    rows_per_epoch = pack_sources(shards, config).rows_per_epoch
    plan = make_plan(config, settings.train, sources, rows_per_epoch)
    drawn = dict(zip(sources, plan[-1].tolist()))
    epochs = {name: drawn[name] / rows for name, rows in rows_per_epoch.items()}
    spans = measure_shares(config, sources, plan, 10)
    title = f"{config.schedule}, {len(plan) - 1:,} steps of {settings.train.batch_size} sequences"
    print(f"{title} of {T} tokens\n\n{'steps':>17} {'wanted':>8} {'domain':>8}   "
          + " ".join(f"{name[-12:]:>12}" for name in sources))
    for span in spans:
        print(f"{span['first_step']:>8}-{span['last_step']:<8} {span['wanted']:>8.3f} {span['domain']:>8.3f}   "
              + " ".join(f"{share:>12.3f}" for share in span["sources"].values()))
    print()
    for name, source in sources.items():
        read = f", read {epochs[name]:.2f} times" if name in epochs else ""
        print(f"{name} ({source.role}{', ' + source.stratum if source.stratum else ''}): {drawn[name]:,} sequences, "
              f"{drawn[name] * T:,} positions{read}")
    refusals, warnings = judge_epochs(epochs, sources)
    lines = describe_mix(config, sources) + warnings
    lines += [f"warning: train.py refuses this plan: {refusal}" for refusal in refusals]
    print("".join(line + "\n" for line in lines), end="")
    picture.parent.mkdir(parents=True, exist_ok=True)
    draw_shares(picture, title, sources, measure_shares(config, sources, plan, 200))
    print(f"picture: {picture}")
    shares, empty = replay_strata(sources, config.strata)
    return {"steps": len(plan) - 1, "batch_size": settings.train.batch_size, "context": T, "rows": spans,
            "schedule": config.schedule, "sequences": drawn, "epochs": epochs, "strata": shares, "empty_strata": empty,
            "notes": lines, "picture": str(picture)}


def measure_shares(config: DataConfig, sources: dict[str, SourceConfig], plan: np.ndarray, spans: int) -> list[dict]:
    """Over up to `spans` equal spans of the run: the steps, the domain share wanted and drawn, each source's share."""
    steps = len(plan) - 1
    domain = np.array([s.role == "domain" for s in sources.values()])
    wanted = weights_at(config, sources, progress_of(steps), steps)[:, domain].sum(1)
    edges = np.linspace(0, steps, min(steps, spans) + 1).round().astype(int).tolist()
    rows = []
    for first, last in itertools.pairwise(edges):
        shares = (plan[last] - plan[first]) / (plan[last] - plan[first]).sum()
        rows.append({"first_step": first, "last_step": last - 1, "wanted": float(wanted[first:last].mean()),
                     "domain": float(shares[domain].sum()), "sources": dict(zip(sources, shares.tolist()))})
    return rows


def draw_shares(path, title: str, sources: dict[str, SourceConfig], rows: list[dict]):
    """Draw the share of each source over the run as a PNG: domain sources at the bottom in warm colours, general text
    above them in cold ones, and a line for the domain share that was wanted."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    sides = {role: [name for name in sources if sources[name].role == role] for role in ("domain", "general")}
    names = sides["domain"] + sides["general"]
    colours = [colormaps["YlOrRd" if role == "domain" else "GnBu"](0.75 - 0.5 * i / len(side))
               for role, side in sides.items() for i in range(len(side))]
    figure = Figure(figsize=(9, 4.2), layout="constrained", dpi=120)
    axes = figure.subplots()
    # A step plot ends where its last value begins, so the last row stands twice.
    steps = [*(row["first_step"] for row in rows), rows[-1]["last_step"] + 1]
    rows = [*rows, rows[-1]]
    axes.stackplot(steps, [[row["sources"][name] for row in rows] for name in names], colors=colours, labels=names,
                   step="post", linewidth=0)
    axes.step(steps, [row["wanted"] for row in rows], where="post", color="black", linestyle="--", linewidth=1,
              label="domain, wanted")
    axes.set(xlim=(0, steps[-1]), ylim=(0, 1), xlabel="step", ylabel="share of the sequences drawn", title=title)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    figure.savefig(path)
