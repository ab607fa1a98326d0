"""The mix: how many sequences of each source a step has. Weights are functions of the run's progress from 0 to 1.

`plan_counts` turns the weights into sequences, the plan; `python data.py mix RECIPE --preview` shows it. S sources; a
score bucket counts as a source.
"""

import bisect
import functools
import itertools
from dataclasses import dataclass, field, make_dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from core import cli
from core.config import merge, quote_key, read_toml, setting
from core.errors import UserError
from core.files import new_file
from text.packing import pack_sources
from text.shards import Shards, read_buckets

# Up to here repeats are as good as new text (Muennighoff 2023, arXiv 2305.16264).
WARN_EPOCHS = 4
# A plan holds a row for each step.
MAX_STEPS = 10**7
# (low, high, emphasis) where all documents are open and come equally often.
ALL = (0.0, 1.0, 1.0)
STRATA = ("reasoning", "knowledge", "language", "coding", "math", "instruction_following", "safety")


@dataclass
class SourceConfig:
    path: str = ""
    """folder made by data.py pack; of conversations also their files, which the run then packs itself"""
    format: Literal["", "text", "chat", "preference"] = ""
    """what the source holds: plain text, conversations and instructions, or pairs of a chosen and a rejected answer;
    default: what the folder was packed as"""
    learn: Literal["responses", "all"] = "responses"
    """chat that the run packs itself: learn the assistant's answers, or all"""
    role: Literal["domain", "general"] = "domain"
    """domain: text to be learned; general: replay, which keeps what the model knows"""
    weight: float = setting(1.0, at_least=0, at_most=1e9)
    """share among the sources of the same role (of the same stratum, where replay is stratified)"""
    stratum: Literal["", *STRATA] = ""
    """capability that a general source keeps; where all general sources name theirs, data.strata weighs them"""
    max_epochs: float = setting(16.0, above=0, at_most=1e6)
    """a plan that reads the source more often is refused; above 4 there is a warning"""
    # No settings. open_buckets makes a source of each score bucket, the `tokens` tokens between the quantiles `low` and
    # `high` of the source named `of`.
    of, low, high, tokens = "", 0.0, 1.0, 0


Strata = make_dataclass(
    "Strata", [(name, float, setting(1.0, at_least=0, at_most=1e9)) for name in STRATA], namespace={
        "__doc__": "Weights of the capabilities within the replay; used where the general sources name their stratum."})


@dataclass
class DataConfig:
    context: int = setting(2048, at_least=1, at_most=2**24)
    """tokens per sequence (T)"""
    domain_share: float = setting(0.7, at_least=0, at_most=1)
    """share of domain sequences; the rest is replay"""
    schedule: Literal["warmup_cooldown", "static", "immediate", "gradual", "staged", "quality_first", "curriculum",
                      "two_stage", "domain_only"] = "warmup_cooldown"
    """how the domain share moves: from 0.3 up over the first 10 % of the run and down to 0.5 over the last, never
    (static, immediate), up from 0 (gradual) or in three stages; which score buckets come first (quality_first,
    curriculum); the domain alone (two_stage, domain_only)"""
    gradual_steps: int | None = setting(None, at_least=1, at_most=MAX_STEPS)
    """gradual: steps until the target is reached; default: 20 % of the run"""
    anneal_share: float | None = setting(None, at_least=0, at_most=1)
    """domain share at the run's end, reached along a straight line over its last anneal_ratio; default: no anneal"""
    anneal_ratio: float = setting(0.15, above=0, at_most=1)
    """the last share of the run, in which it anneals; set it to that of the learning rate's decay"""
    mask_documents: bool = True
    """attention stays inside a document of a packed sequence"""
    reset_positions: bool = True
    """positions restart with each document"""
    packing: Literal["window", "best_fit", "document"] = "window"
    """window: documents one after the other, cut every T tokens; best_fit: whole documents, put where they leave the
    least room (longer ones in pieces), which conversations are under window too; document: each in sequences of its
    own"""
    drop_last: bool = False
    """window: drop the last, short sequence of a source's epoch instead of padding it"""
    strata: Strata = field(default_factory=Strata)
    sources: dict[str, SourceConfig] = field(default_factory=dict)

    def __post_init__(self):
        if self.drop_last and self.packing != "window":
            raise UserError(f"data.drop_last drops the last, short window, and data.packing is {self.packing}; leave "
                            f"one of them out")


@dataclass
class LengthConfig:
    steps: int | None = setting(None, above=0, at_most=MAX_STEPS)
    """length of the run; wins over tokens and epochs"""
    tokens: int | None = setting(None, above=0, at_most=10**15)
    """length of the run; wins over epochs"""
    epochs: float = setting(1.0, above=0, at_most=1e6)
    """length of the run in passes over the domain sources (over the general ones where there is no domain)"""
    batch_size: int = setting(32, above=0, at_most=10**6)
    """sequences per step, over all devices and micro-batches"""


def open_buckets(sources: dict[str, SourceConfig]) -> dict[str, SourceConfig]:
    """The sources, one that holds score buckets replaced by its buckets as sources NAME/0, NAME/1, ..."""
    found = {}
    for name, source in sources.items():
        index = read_buckets(source.path) if source.path else None
        for k, bucket in enumerate(index["buckets"] if index else []):
            if f"{name}/{k}" in sources:
                raise UserError(f"a source is called {name}/{k}, as a score bucket of source {name}; rename one")
            K, part = len(index["buckets"]), replace(source, path=str(Path(source.path, bucket["name"])))
            part.of, part.low, part.high, part.tokens = name, k / K, (k + 1) / K, bucket["tokens"]
            found[f"{name}/{k}"] = part
        if not index:
            found[name] = source
    return found


# ---- schedules

def schedule_at(config: DataConfig, progress: float, steps: int) -> tuple[float, tuple[float, float, float]]:
    """(share of domain sequences, (low, high, emphasis)) at `progress`, from 0 to 1, of a run of `steps` steps.

    A domain source in score buckets is open from its quantile `low` to `high`, and the last of the open documents come
    `emphasis` times as often as the first.
    """
    target = config.domain_share
    # gradual: the share of the run over which the domain comes in.
    ramp = 0.2 if config.gradual_steps is None else config.gradual_steps / max(1, steps - 1)
    stages, alone = [(0.0, 0.3), (0.1, 0.3), (0.1, 0.6), (0.3, 0.6), (0.3, 1.0)], {"share": [(0.0, 1.0)]}
    # Points (progress, value) with straight lines between them; of two at the same progress the second is the value.
    # What a schedule does not name stays as in `constant`.
    schedules = {
        "warmup_cooldown": {"share": [(0.0, min(0.3, target)), (0.1, target), (0.9, target), (1.0, min(0.5, target))]},
        "gradual": {"share": [(0.0, 0.0), (ramp, target)], "high": [(0.0, 0.3), (ramp, 1.0)]},
        "staged": {"share": [(at, target * part) for at, part in stages], "high": stages},
        "quality_first": {"high": [(0.0, 0.3), (1.0, 1.0)]},
        # The easier documents, the middle ones, and at last all, the hardest 3 times as often as the easiest.
        "curriculum": {"low": [(0.3, 0.0), (0.3, 0.2), (0.7, 0.2), (0.7, 0.0)],
                       "high": [(0.0, 0.3), (0.3, 0.6), (0.7, 0.8), (0.7, 1.0)], "emphasis": [(0.7, 1.0), (0.7, 3.0)]},
        "two_stage": alone, "domain_only": alone}
    constant = {"share": [(0.0, target)], "low": [(0.0, 0.0)], "high": [(0.0, 1.0)], "emphasis": [(0.0, 1.0)]}
    curves = constant | schedules.get(config.schedule, {})
    share, *opened = (float(np.interp(progress, *zip(*curves[name]))) for name in constant)
    if config.anneal_share is not None:
        done = max(0.0, 1 - (1 - progress) / config.anneal_ratio)
        share = share * (1 - done) + config.anneal_share * done
    return share, tuple(opened)


# ---- weights

def source_weights(sources: dict[str, SourceConfig], share: float, opened: tuple = ALL,
                   strata: Strata | None = None) -> np.ndarray:
    """float64 [S], with sum one: the domain sources share `share`, the general ones the rest.

    `opened`, (low, high, emphasis) of schedule_at, moves a domain source's weight among its buckets. `strata` (default:
    equal weights) divides the replay if the general sources name theirs.
    """
    weights = {name: _open_tokens(s, opened if s.role == "domain" else ALL) if s.of else s.weight
               for name, s in sources.items()}
    for of, weight in {s.of: s.weight for s in sources.values() if s.of}.items():
        _scale(weights, [name for name, s in sources.items() if s.of == of], weight)
    for stratum, part in replay_strata(sources, strata or Strata())[0].items():
        _scale(weights, [name for name, s in sources.items() if s.role == "general" and s.stratum == stratum], part)
    domain, general = ([name for name, s in sources.items() if s.role == role] for role in ("domain", "general"))
    if not any(weights[name] for name in general):
        share = 1.0
    elif not any(weights[name] for name in domain):
        share = 0.0
    _scale(weights, domain, share)
    _scale(weights, general, 1 - share)
    return np.array(list(weights.values()))


def _open_tokens(bucket: SourceConfig, opened: tuple) -> float:
    """How many of a bucket's tokens are open, times their emphasis."""
    low, high, emphasis = opened
    begin, end = max(low, bucket.low), min(high, bucket.high)
    # The emphasis rises along a straight line from 1 to `emphasis`, so its mean over the bucket is that of its middle.
    middle = ((begin + end) / 2 - low) / (high - low)
    return bucket.tokens * (1 + (emphasis - 1) * middle) * max(0.0, end - begin) / (bucket.high - bucket.low)


def _scale(weights: dict[str, float], names: list[str], total: float):
    """Scale the weights of `names` so that they sum to `total`; where all are 0 they stay 0."""
    before = sum(weights[name] for name in names)
    weights |= {name: total * weights[name] / before if before else 0.0 for name in names}


def replay_strata(sources: dict[str, SourceConfig], strata: Strata) -> tuple[dict[str, float], list[str]]:
    """({stratum: its share of the replay}, strata with a weight but no source, whose share goes to the others).

    Both are empty where no general source names a stratum.
    """
    general = {name: s for name, s in sources.items() if s.role == "general"}
    if not any(s.stratum for s in general.values()):
        return {}, []
    unnamed = [name for name, s in general.items() if not s.stratum]
    if unnamed:
        raise UserError(f"data.sources.{unnamed[0]}.stratum is not set, but other general sources name theirs; name "
                        f"it, one of {', '.join(STRATA)}")
    weights = {name: weight for name, weight in vars(strata).items() if weight}
    filled = {s.stratum for s in general.values() if s.weight}
    drawn = [name for name in weights if name in filled]
    if not drawn:
        raise UserError(f"the strata of the general sources ({', '.join(sorted(filled)) or 'none with a weight'}) all "
                        f"have weight 0 in data.strata; give one a weight")
    total = sum(weights[name] for name in drawn)
    shares = {name: weights.get(name, 0.0) / total for name in [*drawn, *sorted(filled.difference(drawn))]}
    return shares, [name for name in weights if name not in filled]


def describe_mix(config: DataConfig, sources: dict[str, SourceConfig]) -> list[str]:
    """What a user should know of the mix before the run, in lines."""
    lines, (shares, empty) = [], replay_strata(sources, config.strata)
    if shares:
        lines.append("replay strata: " + ", ".join(f"{name} {share:.3f}" for name, share in shares.items())
                     + (f"; no source for {', '.join(empty)}: the others share it" if empty else ""))
    has_buckets = any(s.of and s.role == "domain" for s in sources.values())
    if config.schedule in ("quality_first", "curriculum") and not has_buckets:
        lines.append(f"warning: data.schedule {config.schedule} orders score buckets, and no domain source has any, so "
                     f"it is a static mix; make them with data.py pack --buckets")
    return lines


def weights_at(config: DataConfig, sources: dict[str, SourceConfig], steps: int, progress: np.ndarray | None = None,
               share: float | None = None) -> np.ndarray:
    """float64 [n, S]: the sources' weights at each progress [n], by default of each step, of a run of `steps` steps.
    `share`, where it is given, is the share of domain sequences throughout, instead of the schedule's."""
    has_domain = any(s.role == "domain" and s.weight for s in sources.values())
    if config.schedule in ("two_stage", "domain_only") and not has_domain:
        raise UserError(f"data.schedule {config.schedule} trains on the domain alone, but no source with a weight has "
                        f"the role domain")
    # Most steps want the same as the step before.
    weights = functools.cache(lambda share, opened: source_weights(sources, share, opened, config.strata))
    progress = np.arange(steps) / max(1, steps - 1) if progress is None else progress
    wanted = [schedule_at(config, p, steps) for p in progress.tolist()]
    return np.stack([weights(scheduled if share is None else share, opened) for scheduled, opened in wanted])


# ---- the plan

def make_plan(config: DataConfig, length: LengthConfig, sources: dict[str, SourceConfig],
              rows_per_epoch: dict[str, int]) -> np.ndarray:
    """int64 [steps + 1, S]: how many sequences of each source come before each step, from the run's length and the mix.

    rows_per_epoch {source: sequences of one pass} is needed only where the length is given in epochs.
    """
    of_tokens = length.tokens and -(-length.tokens // (config.context * length.batch_size))
    steps = length.steps or of_tokens or _count_steps_of_epochs(config, length, sources, rows_per_epoch)
    if steps > MAX_STEPS:
        raise UserError(f"train.tokens or train.epochs make {steps:,} steps, and a plan holds {MAX_STEPS:,}; raise "
                        f"train.batch_size, or train for fewer")
    return plan_counts(weights_at(config, sources, steps), length.batch_size)


def _count_steps_of_epochs(config, length, sources, rows_per_epoch) -> int:
    """The steps in which the domain sources (the general ones where there are none) are read length.epochs times."""
    B, roles = length.batch_size, [s.role for s in sources.values()]
    role = "domain" if "domain" in roles else "general"
    chosen = np.array(roles) == role
    wanted = length.epochs * sum(rows_per_epoch[name] for name, s in sources.items() if s.role == role)

    def mean_share(steps: int) -> float:
        return sum(row[chosen].sum() for row in weights_at(config, sources, steps, np.arange(201) / 200)) / 201

    if mean_share(1) <= 0:
        raise UserError(f"data.domain_share {config.domain_share} never draws a domain sequence, so an epoch of them "
                        f"has no end; give train.steps or train.tokens")
    steps = max(1, round(wanted / (B * mean_share(1))))
    if config.schedule == "gradual" and config.gradual_steps:
        # Only here does the mean share depend on the steps: search for the fewest that draw enough.
        longest = steps + config.gradual_steps
        while longest * B * mean_share(longest) < wanted:
            longest *= 2
        steps = 1 + bisect.bisect_left(range(1, longest), wanted, key=lambda n: n * B * mean_share(n))
    return steps


def replan(plan: np.ndarray, step: int, config: DataConfig, sources: dict, share: float) -> np.ndarray:
    """The plan as it is before `step`, and from there on with `share` of domain sequences."""
    steps, batch_size = len(plan) - 1, int(plan[1].sum())
    if step >= steps:
        return plan
    rest = plan_counts(weights_at(config, sources, steps, share=share)[step:], batch_size)
    return np.concatenate([plan[:step], plan[step] + rest])


def plan_counts(weights: np.ndarray, batch_size: int) -> np.ndarray:
    """int64 [steps + 1, S]: how many sequences of each source come before each step, of weights float64 [steps, S].

    Every prefix of the run stays within less than one sequence of the wanted mix. The arithmetic is in integers of
    2^-32, so that every platform agrees.

    Largest remainder does it for most plans: a step takes what is owed, rounded down, and the sources owed most get the
    rest. Weights 0.7 and 0.3, two sequences per step: 1.4 and 0.6 are owed, 1 and 1 taken; then 1.8 and 0.2 are owed, 2
    and 0 taken. Where weights change or many are equal it can be off by a whole sequence; then `_due_first` plans.
    """
    unit = 1 << 32
    whole = np.floor(weights * unit).astype(np.int64)
    whole[np.arange(len(weights)), whole.argmax(1)] += unit - whole.sum(1)
    rows, owed, worst = [np.zeros(weights.shape[1], np.int64)], 0, 0
    for wanted in whole:
        owed = owed + batch_size * wanted
        take = np.maximum(owed, 0) >> 32
        missing = int(batch_size - take.sum())
        most_owed_first = np.argsort(take * unit - owed, kind="stable")
        if missing >= 0:
            take[most_owed_first[:missing]] += 1
        else:
            # More was owed than a step has, because others are ahead: those owed least give up a sequence.
            take[most_owed_first[take[most_owed_first] > 0][::-1][:-missing]] -= 1
        owed = owed - take * unit
        worst = max(worst, np.abs(owed).max())
        rows.append(rows[-1] + take)
    return np.stack(rows) if worst < unit else _due_first(whole, batch_size)


def _due_first(weights: np.ndarray, batch_size: int) -> np.ndarray:
    """plan_counts of int64 weights [steps, S] in 2^-32, by the earliest due date.

    A source's n-th sequence may be taken from the step in which more than n - 1 are wanted of it, and is due by the one
    in which n are. The wanted mix is such a plan in fractions, so there is one in whole sequences, and to take what is
    due first finds it (Tijdeman 1980, The chairman assignment problem).

    Weights 0.55, 0.35 and 0.1 of A, B and C, one sequence per step. Their first ones are due by steps 2, 3 and 10, so
    step 1 takes A. A's second may come from step 2 on and is due by step 4, so step 2 takes B, and step 3 takes A.
    """
    total = np.cumsum(weights, axis=0)
    rest = batch_size * (total & 0xFFFFFFFF)
    # [steps, S]: how many sequences are due by each step, how many may be taken, and by when one more is due.
    least = batch_size * (total >> 32) + (rest >> 32)
    most = least + (rest & 0xFFFFFFFF > 0)
    due = np.stack([column.searchsorted(column + 1) for column in least.T], axis=1)
    rows = [np.zeros(weights.shape[1], np.int64)]
    for step in range(len(weights)):
        now = np.maximum(rows[-1], least[step])
        order = np.argsort(due[step], kind="stable")
        allowed = order[now[order] < most[step][order]]
        now[allowed[:(step + 1) * batch_size - now.sum()]] += 1
        rows.append(now)
    return np.stack(rows)


def judge_epochs(epochs: dict[str, float], sources: dict[str, SourceConfig],
                 option: str = "--data.sources.{0}.max-epochs {1}") -> tuple[list[str], list[str]]:
    """(refusals, warnings) for {source: times that a plan reads it}. Above its max_epochs a source is refused, and the
    line names the option that allows it; above 4 there is a warning."""
    refusals, warnings = [], []
    for name, times in epochs.items():
        source = sources[name]
        if times > source.max_epochs:
            refusals.append(f"source {name} would be read {times:.1f} times, above its max_epochs of "
                            f"{source.max_epochs:g}: repeats teach next to nothing by then; shorten the run, lower its "
                            f"weight, or allow it with {option.format(quote_key(source.of or name), int(times) + 1)}")
        elif times > WARN_EPOCHS:
            warnings.append(f"warning: source {name} is read {times:.1f} times; above {WARN_EPOCHS} repeats teach less "
                            f"and less")
    return refusals, warnings


# ---- the preview of a recipe

@dataclass
class MixSettings:
    """What of a recipe decides the mix."""

    data: DataConfig = field(default_factory=DataConfig)
    train: LengthConfig = field(default_factory=LengthConfig)


def preview_mix(recipe: str, words: list[str], picture: Path) -> dict:
    """Print and draw what a recipe's plan draws under the settings `words`. Sources that are not packed yet are allowed
    where the length is given in steps or tokens."""
    values = read_toml(recipe)
    length = {key: value for key, value in values.get("train", {}).items() if key in vars(LengthConfig())}
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
    shift = int(values.get("objective", {}).get("name") != "masked")
    packings = pack_sources({name: Shards(s.path) for name, s in sources.items() if name not in missing}, config, shift)
    rows_per_epoch = {name: packing.sequences for name, packing in packings.items()}
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
    notes = [*describe_mix(config, sources), *warnings,
             *(f"warning: train.py refuses this plan: {refusal}" for refusal in refusals)]
    draw_shares(picture, title, sources, measure_shares(config, sources, plan, 200))
    print(*notes, f"picture: {picture}", sep="\n")
    shares, empty = replay_strata(sources, config.strata)
    return {"steps": len(plan) - 1, "batch_size": settings.train.batch_size, "context": T, "rows": spans,
            "schedule": config.schedule, "sequences": drawn, "epochs": epochs, "strata": shares, "empty_strata": empty,
            "notes": notes, "picture": str(picture)}


def measure_shares(config: DataConfig, sources: dict[str, SourceConfig], plan: np.ndarray, spans: int) -> list[dict]:
    """Over up to `spans` equal spans of the run: the steps, the domain share wanted and drawn, each source's share."""
    steps = len(plan) - 1
    domain = np.array([s.role == "domain" for s in sources.values()])
    wanted = weights_at(config, sources, steps)[:, domain].sum(1)
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
    from matplotlib import colormaps, rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.2), layout="constrained", dpi=120)
    axes = figure.subplots()
    colours = {}
    for role, colour_map in (("domain", "YlOrRd"), ("general", "GnBu")):
        side = [name for name in sources if sources[name].role == role]
        colours |= {name: colormaps[colour_map](0.75 - 0.5 * i / len(side)) for i, name in enumerate(side)}
    # A step plot ends where its last value begins, so the last row stands twice.
    steps = [*(row["first_step"] for row in rows), rows[-1]["last_step"] + 1]
    rows = [*rows, rows[-1]]
    areas = axes.stackplot(steps, [[row["sources"][name] for row in rows] for name in colours],
                           colors=list(colours.values()), step="post", linewidth=0)
    lines = axes.step(steps, [row["wanted"] for row in rows], "k--", where="post", linewidth=1)
    axes.set(xlim=(0, steps[-1]), ylim=(0, 1), xlabel="step", ylabel="share of the sequences drawn", title=title)
    # Names are the user's: no formulas between dollar signs, and none is left out because it begins with "_".
    with rc_context({"text.parse_math": False}):
        figure.legend([*areas, *lines], [*colours, "domain, wanted"], loc="outside right upper", fontsize=8,
                      frameon=False)
        with new_file(path, "wb") as file:
            figure.savefig(file, format=Path(path).suffix[1:] or "png")
