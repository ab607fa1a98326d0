"""Which source how many sequences come from at which step: shapes of w(p), weights as functions of the run's progress.

schedule           domain share w(p) at progress p            score buckets of domain sources that are open
static, immediate  the target at once                         all
warmup_cooldown    0.3 up to the target over 10 %, 0.5 at     all
                   the end from 90 % on
gradual            0 up to the target over 20 % or N steps    the first 30 % of the documents up to all, beside it
staged             0.3, 0.6, 1.0 of the target from 0, 10     the first 30 %, 60 %, all
                   and 30 % of the run
quality_first      the target                                 the first 30 % up to all at the run's end
curriculum         the target                                 the easier part, the middle, all but mostly the hard
two_stage,         1: the domain alone, general text is       all
domain_only        only evaluated

A final anneal lays itself over any of them. `plan_counts` makes integers of the weights; `python data.py mix RECIPE
--preview` shows what comes out. D sources, a score bucket counting as a source.
"""

import bisect
import functools
import itertools
from dataclasses import dataclass, field, fields
from typing import Literal

import numpy as np

RAMP = 0.2                          # gradual: share of the run over which the domain comes in
OPEN_FIRST = 0.3                    # share of a source's documents that is open at the start
STAGES = ((0.3, 1.0), (0.1, 0.6), (0.0, 0.3))       # staged: (from this progress on, part of the target)
HARD = 3.0                          # curriculum's end: the hardest documents are drawn 3 times as often as the easiest
WARN_EPOCHS = 4                     # up to here repeats are as good as new text (Muennighoff 2023, arXiv:2305.16264)
ALONE = ("two_stage", "domain_only")


@dataclass
class SourceConfig:
    path: str = ""
    """folder made by data.py pack"""
    role: Literal["domain", "general"] = "domain"
    """domain: what is to be learned; general: replay, what is to be kept"""
    weight: float = 1.0
    """share among the sources of the same role (of the same stratum, where replay is stratified)"""
    stratum: Literal["", "reasoning", "knowledge", "language", "coding", "math", "instruction_following",
                     "safety"] = ""
    """capability that a general source keeps; set on all general sources, it makes data.strata hold"""
    max_epochs: float = 16.0
    """a plan that reads the source more often is refused; above 4 it is warned of"""

    def __post_init__(self):
        if not 0 <= self.weight < float("inf"):
            raise ValueError(f"a source's weight is {self.weight}, but must be 0 or more")
        if not self.max_epochs > 0:
            raise ValueError(f"a source's max_epochs is {self.max_epochs}, but must be above 0")


@dataclass
class Bucket(SourceConfig):
    """One score bucket of a source, itself a source with its own share of the weight; made by data.open_buckets."""

    of: str = ""                    # the source it belongs to
    low: float = 0.0                # its documents, from this quantile of the source's order
    high: float = 1.0               # to this one
    tokens: int = 0


@dataclass
class Strata:
    """Weights of the capabilities among the replay; they hold where general sources name their stratum."""

    reasoning: float = 1.0
    knowledge: float = 1.0
    language: float = 1.0
    coding: float = 1.0
    math: float = 1.0
    instruction_following: float = 1.0
    safety: float = 1.0

    def __post_init__(self):
        for stratum in fields(self):
            if not 0 <= getattr(self, stratum.name) < float("inf"):
                raise ValueError(f"data.strata.{stratum.name} is {getattr(self, stratum.name)}, but must be 0 or more")


@dataclass
class DataConfig:
    context: int = 2048
    """tokens a sequence (T)"""
    domain_share: float = 0.7
    """share of domain sequences; the rest is replay of general text"""
    schedule: Literal["warmup_cooldown", "static", "immediate", "gradual", "staged", "quality_first", "curriculum",
                      "two_stage", "domain_only"] = "warmup_cooldown"
    """how the domain share moves: from 0.3 up over the first 10 % of the run and down to 0.5 over the last, never
    (static, immediate), up from 0 (gradual) or in three stages; which score buckets come first (quality_first,
    curriculum); the domain alone (two_stage, domain_only)"""
    gradual_steps: int | None = None
    """gradual: steps until the target is reached; default: 20 % of the run"""
    anneal_share: float | None = None
    """domain share at the run's end, reached along a straight line over its last anneal_ratio; default: no anneal"""
    anneal_ratio: float = 0.15
    """last share of the run in which it anneals; make it that of the learning rate's decay"""
    mask_documents: bool = True
    """attention stays inside a document of a packed sequence"""
    reset_positions: bool = True
    """positions restart with each document"""
    packing: Literal["window", "best_fit", "document"] = "window"
    """window: documents one after the other, cut every T tokens; best_fit: whole documents, put where they leave the
    least room (longer ones in pieces); document: each in a sequence of its own"""
    drop_last: bool = False
    """window: drop the last, short sequence of a source's epoch instead of padding it"""
    strata: Strata = field(default_factory=Strata)
    sources: dict[str, SourceConfig] = field(default_factory=dict)

    def __post_init__(self):
        if self.context < 1:
            raise ValueError(f"data.context is {self.context}, but a sequence needs at least 1 token")
        if self.drop_last and self.packing != "window":
            raise ValueError(f"data.drop_last drops the last, short window, and data.packing is {self.packing}; leave "
                             f"one of them out")
        for name in ("domain_share", "anneal_share"):
            if getattr(self, name) is not None and not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"data.{name} is {getattr(self, name)}, but must be between 0 and 1")
        if not 0 < self.anneal_ratio <= 1:
            raise ValueError(f"data.anneal_ratio is {self.anneal_ratio}, but must be above 0 and at most 1")
        if self.gradual_steps is not None and self.gradual_steps < 1:
            raise ValueError(f"data.gradual_steps is {self.gradual_steps}, but must be above 0")


@dataclass
class LengthConfig:
    steps: int | None = None
    """length of the run; wins over tokens and epochs"""
    tokens: int | None = None
    """length of the run; wins over epochs"""
    epochs: float = 1.0
    """length of the run in passes over the domain sources (over the general ones where there is no domain)"""
    batch_size: int = 32
    """sequences a step, over all devices and micro-batches"""

    def __post_init__(self):
        for name in ("steps", "tokens", "epochs", "batch_size"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"train.{name} is {getattr(self, name)}, but must be above 0")


# ---- shapes

def domain_share(schedule: str, target: float, progress: float, ramp: float = RAMP) -> float:
    """Wanted share of domain sequences at `progress` (0 to 1) of the run; `ramp`: gradual's rise, as a share of it."""
    if schedule in ALONE:
        return 1.0
    if schedule == "gradual":
        return target * min(1.0, progress / ramp)
    if schedule == "staged":
        return target * next(part for start, part in STAGES if progress >= start)
    if schedule != "warmup_cooldown":
        return target
    if progress < 0.1:
        return min(0.3, target) + (target - min(0.3, target)) * progress / 0.1
    if progress <= 0.9:
        return target
    return target + (min(0.5, target) - target) * (progress - 0.9) / 0.1


def open_documents(schedule: str, progress: float, ramp: float = RAMP) -> tuple[float, float, float]:
    """(low, high, emphasis): the quantiles of a source's documents, first ones first, that are open at `progress`,
    and how much oftener the last of them come than the first."""
    if schedule == "gradual":
        return 0.0, OPEN_FIRST + (1 - OPEN_FIRST) * min(1.0, progress / ramp), 1.0
    if schedule == "staged":
        return 0.0, next(part for start, part in STAGES if progress >= start), 1.0
    if schedule == "quality_first":
        return 0.0, OPEN_FIRST + (1 - OPEN_FIRST) * progress, 1.0
    if schedule == "curriculum":
        if progress < 0.3:
            return 0.0, 0.3 + 0.3 * progress / 0.3, 1.0
        if progress < 0.7:
            return 0.2, 0.6 + 0.2 * (progress - 0.3) / 0.4, 1.0
        return 0.0, 1.0, HARD
    return 0.0, 1.0, 1.0


def share_at(config: DataConfig, progress: float, steps: int) -> float:
    """Wanted share of domain sequences at `progress` of a run of `steps` steps, the anneal included."""
    share = domain_share(config.schedule, config.domain_share, progress, _ramp(config, steps))
    if config.anneal_share is None:
        return share
    done = max(0.0, 1 - (1 - progress) / config.anneal_ratio)
    return share * (1 - done) + config.anneal_share * done


def _ramp(config, steps) -> float:
    return RAMP if config.gradual_steps is None else config.gradual_steps / max(1, steps - 1)


# ---- weights

def source_weights(sources: dict[str, SourceConfig], share: float, opened: tuple = (0.0, 1.0, 1.0),
                   strata: Strata | None = None) -> np.ndarray:
    """[D] weights that sum to one: the domain sources share `share`, the general ones the rest.

    `opened` as from open_documents moves a domain source's weight among its buckets; `strata` (default: all alike)
    holds among the general sources if they name theirs.
    """
    weights = _bucket_weights(sources, opened)
    for stratum, part in replay_strata(sources, strata or Strata())[0].items():
        members = [name for name, s in sources.items() if s.role == "general" and s.stratum == stratum]
        total = sum(weights[name] for name in members)
        weights |= {name: part * weights[name] / total for name in members}
    roles = {role: sum(weights[n] for n, s in sources.items() if s.role == role) for role in ("domain", "general")}
    if not roles["general"]:
        share = 1.0
    elif not roles["domain"]:
        share = 0.0
    part = {"domain": share, "general": 1 - share}
    return np.array([part[s.role] * weights[n] / roles[s.role] if roles[s.role] else 0.0 for n, s in sources.items()])


def _bucket_weights(sources, opened) -> dict[str, float]:
    """Each source's own weight; a bucket's is its source's, by the tokens of it that are open and their emphasis."""
    found, weights = {}, {name: s.weight for name, s in sources.items()}
    for name, s in sources.items():
        if isinstance(s, Bucket):
            low, high, emphasis = opened if s.role == "domain" else (0.0, 1.0, 1.0)
            begin, end = max(low, s.low), min(high, s.high)
            middle = ((begin + end) / 2 - low) / (high - low)         # where the density's mean over the bucket lies
            density = 1 + (emphasis - 1) * middle
            found.setdefault(s.of, {})[name] = s.tokens * density * max(0.0, end - begin) / (s.high - s.low)
    for parts in found.values():
        total = sum(parts.values())
        weights |= {name: weights[name] * part / total for name, part in parts.items()}
    return weights


def replay_strata(sources: dict[str, SourceConfig], strata: Strata) -> tuple[dict[str, float], list[str]]:
    """({stratum: its share of the replay}, strata with a weight but no source, whose share went to the others).

    Both are empty where no general source names a stratum.
    """
    general = {name: s for name, s in sources.items() if s.role == "general"}
    if not any(s.stratum for s in general.values()):
        return {}, []
    unnamed = [name for name, s in general.items() if not s.stratum]
    if unnamed:
        raise ValueError(f"data.sources.{unnamed[0]}.stratum is not set, but other general sources name theirs; name "
                         f"it, one of {', '.join(f.name for f in fields(Strata))}")
    weights = {f.name: getattr(strata, f.name) for f in fields(strata) if getattr(strata, f.name)}
    filled = {s.stratum for s in general.values() if s.weight}
    present = {name: weight for name, weight in weights.items() if name in filled}
    if not present:
        raise ValueError(f"the strata of the general sources ({', '.join(sorted(filled)) or 'none with a weight'}) all "
                         f"have weight 0 in data.strata; give one a weight")
    total = sum(present.values())
    shares = {name: weight / total for name, weight in present.items()}
    return shares | dict.fromkeys(sorted(filled - present.keys()), 0.0), [n for n in weights if n not in present]


def notes(config: DataConfig, sources: dict[str, SourceConfig]) -> list[str]:
    """What a user should know of the mix before the run, a line each."""
    lines = []
    shares, empty = replay_strata(sources, config.strata)
    if shares:
        lines.append("replay strata: " + ", ".join(f"{name} {share:.3f}" for name, share in shares.items())
                     + (f"; no source for {', '.join(empty)}: the others share it" if empty else ""))
    if config.schedule in ("quality_first", "curriculum") and not any(
            isinstance(s, Bucket) and s.role == "domain" for s in sources.values()):
        lines.append(f"warning: data.schedule {config.schedule} orders score buckets, and no domain source has any, so "
                     f"it is a static mix; make them with data.py pack --buckets")
    return lines


def weights_at(config: DataConfig, sources: dict[str, SourceConfig], steps: int, share: float | None = None):
    """progress -> [D] weights of a run of `steps` steps; `sources` with their buckets in their places. share: of
    domain sequences throughout, instead of the schedule's."""
    if config.schedule in ALONE and not any(s.role == "domain" and s.weight for s in sources.values()):
        raise ValueError(f"data.schedule {config.schedule} trains on the domain alone, but no source with a weight has "
                         f"the role domain")

    @functools.lru_cache(maxsize=1)            # most steps want what the one before wanted
    def weights(share, opened):
        return source_weights(sources, share, opened, config.strata)

    ramp = _ramp(config, steps)
    return lambda p: weights(share_at(config, p, steps) if share is None else share,
                             open_documents(config.schedule, p, ramp))


# ---- the plan

def make_plan(config: DataConfig, length: LengthConfig, sources: dict[str, SourceConfig],
              sequences: dict[str, int]) -> np.ndarray:
    """int64 [steps + 1, D]: sequences of each source before each step, from the run's length and the mix.

    `sequences` {source: sequences it has} is needed only where the length is given in epochs.
    """
    T, B = config.context, length.batch_size
    steps = length.steps or (-(-length.tokens // (T * B)) if length.tokens else None)
    if steps is None:
        roles = [s.role for s in sources.values()]
        role = "domain" if "domain" in roles else "general"
        windows = sum(sequences[name] for name, s in sources.items() if s.role == role)
        chosen = np.array([r == role for r in roles])

        def mean(steps):
            at = weights_at(config, sources, steps)
            return sum(at(p / 200)[chosen].sum() for p in range(201)) / 201

        if mean(1) <= 0:
            raise ValueError(f"data.domain_share {config.domain_share} never draws a domain sequence, so an epoch of "
                             f"them has no end; give train.steps or train.tokens")
        steps = max(1, round(length.epochs * windows / (B * mean(1))))
        if config.schedule == "gradual" and config.gradual_steps:      # its mean share depends on the steps
            wanted = length.epochs * windows
            longest = steps + config.gradual_steps
            while longest * B * mean(longest) < wanted:
                longest *= 2
            steps = 1 + bisect.bisect_left(range(1, longest), wanted, key=lambda n: n * B * mean(n))
    return plan_counts(weights_at(config, sources, steps), steps, B)


def replan(counts: np.ndarray, step: int, config: DataConfig, sources: dict[str, SourceConfig], share: float
           ) -> np.ndarray:
    """`counts` as they are before `step`, and from there on with `share` of domain sequences."""
    steps, batch_size = len(counts) - 1, int(counts[1].sum())
    if step >= steps:
        return counts
    at, left = weights_at(config, sources, steps, share), steps - step
    rest = plan_counts(lambda p: at((step + p * (left - 1)) / max(1, steps - 1)), left, batch_size)
    return np.concatenate([counts[:step], counts[step] + rest])


def plan_counts(weights_at, steps: int, batch_size: int) -> np.ndarray:
    """int64 [steps + 1, D]: sequences taken from each source before each step.

    Every prefix of the run stays within less than one sequence of the wanted mix, in integers of 2^-32, so that every
    platform agrees. Largest remainder on what each source is owed does it for most plans; where weights move or many
    are alike and it strays by a whole sequence, the sequence that is due first is taken first (`_due_first`).
    """
    unit = 1 << 32
    rows, owed, wanted, worst = [np.zeros(len(weights_at(0.0)), np.int64)], 0, [], 0
    for step in range(steps):
        weights = np.floor(weights_at(step / max(1, steps - 1)) * unit).astype(np.int64)
        weights[weights.argmax()] += unit - weights.sum()
        wanted.append(weights)
        owed = owed + batch_size * weights
        take = np.maximum(owed, 0) >> 32
        rest = int(batch_size - take.sum())
        order = np.argsort(take * unit - owed, kind="stable")          # most owed first
        if rest < 0:
            order = order[take[order] > 0][::-1]
        take[order[:abs(rest)]] += np.sign(rest)
        owed = owed - take * unit
        worst = max(worst, np.abs(owed).max())
        rows.append(rows[-1] + take)
    return np.stack(rows) if worst < unit else _due_first(np.stack(wanted), batch_size)


def _due_first(weights: np.ndarray, batch_size: int) -> np.ndarray:
    """plan_counts of int64 weights [steps, D] in 2^-32, by the earliest due date.

    A source's n-th sequence may be taken from the step in which more than n - 1 are wanted of it and is due by the one
    in which n are. The wanted mix itself is such a plan in fractions, so there is one in whole sequences, and taking
    what is due first finds it (Tijdeman 1980, The chairman assignment problem).
    """
    total = np.cumsum(weights, axis=0)
    rest = batch_size * (total & 0xFFFFFFFF)
    least = batch_size * (total >> 32) + (rest >> 32)                  # [steps, D] sequences that are due by then
    most = least + (rest & 0xFFFFFFFF > 0)
    due = np.stack([column.searchsorted(column + 1) for column in least.T], axis=1)    # when one more will be
    rows = [np.zeros(weights.shape[1], np.int64)]
    for step in range(len(weights)):
        now = np.maximum(rows[-1], least[step])
        order = np.argsort(due[step], kind="stable")
        free = order[now[order] < most[step][order]]                   # each may have one more
        now[free[:(step + 1) * batch_size - now.sum()]] += 1
        rows.append(now)
    return np.stack(rows)


def check_epochs(epochs: dict[str, float], sources: dict[str, SourceConfig],
                 option: str = "--data.sources.{0}.max-epochs {1}") -> list[str]:
    """A warning for each source that is read more than 4 times; ValueError, with the option that allows it, above its
    max_epochs."""
    warnings = []
    for name, times in epochs.items():
        source = sources[name]
        if times > source.max_epochs:
            own = source.of if isinstance(source, Bucket) else name
            raise ValueError(f"source {name} would be read {times:.1f} times, above its max_epochs of "
                             f"{source.max_epochs:g}: repeats teach next to nothing by then; shorten the run, lower "
                             f"its weight, or allow it with {option.format(own, int(times) + 1)}")
        if times > WARN_EPOCHS:
            warnings.append(f"warning: source {name} is read {times:.1f} times; above {WARN_EPOCHS} repeats teach less "
                            f"and less")
    return warnings


def part_of(sources: dict[str, SourceConfig], name: str, n: int) -> int:
    """`n`, or for a score bucket its part of the n that its whole source is meant to have."""
    source = sources[name]
    return n if not isinstance(source, Bucket) else -(-n // round(1 / (source.high - source.low)))


# ---- what a plan looks like

def realised(config: DataConfig, sources: dict[str, SourceConfig], counts: np.ndarray, spans: int) -> list[dict]:
    """Rows over up to `spans` equal spans of the run: steps, the domain share wanted and drawn, each source's share."""
    steps = len(counts) - 1
    at, domain = weights_at(config, sources, steps), np.array([s.role == "domain" for s in sources.values()])
    wanted = np.array([at(step / max(1, steps - 1))[domain].sum() for step in range(steps)])
    edges = np.linspace(0, steps, min(steps, spans) + 1).round().astype(int)
    rows = []
    for first, last in itertools.pairwise(edges):
        taken = counts[last] - counts[first]
        shares = taken / taken.sum()
        rows.append({"first_step": int(first), "last_step": int(last) - 1, "wanted": float(wanted[first:last].mean()),
                     "domain": float(shares[domain].sum()),
                     "sources": dict(zip(sources, map(float, shares)))})
    return rows


def draw(path, title: str, sources: dict[str, SourceConfig], rows: list[dict]):
    """PNG: the share of each source over the run, domain sources warm and at the bottom, and the share wanted."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    names = sorted(sources, key=lambda name: sources[name].role)       # stable: domain, then general
    figure = Figure(figsize=(9, 4.2), layout="constrained", dpi=120)
    axes, colours = figure.subplots(), []
    for role, palette in (("domain", "YlOrRd"), ("general", "GnBu")):
        count = sum(s.role == role for s in sources.values())
        colours += [colormaps[palette](0.75 - 0.5 * i / max(1, count)) for i in range(count)]
    steps = [row["first_step"] for row in rows] + [rows[-1]["last_step"] + 1]
    shares = [[row["sources"][name] for row in rows] for name in names]
    axes.stackplot(steps, [[*values, values[-1]] for values in shares], colors=colours, labels=names, step="post",
                   linewidth=0)
    wanted = [row["wanted"] for row in rows]
    axes.step(steps, [*wanted, wanted[-1]], where="post", color="black", linestyle="--", linewidth=1,
              label="domain, wanted")
    axes.set(xlim=(0, steps[-1]), ylim=(0, 1), xlabel="step", ylabel="share of the sequences drawn", title=title)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    figure.savefig(path)
