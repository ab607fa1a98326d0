"""What a model kept of what it could do, by benchmarks before and after: per capability, and item by item.

    degradation = relative loss: 1 - current / baseline where more is better, current / baseline - 1 where less is
    retention   = current / baseline where more is better, baseline / current where less is
    above chance: (current - chance) / (baseline - chance), as a model that guesses keeps all of what it never had

From 5 % of degradation on there is a warning, from 10 % on it is bad. Values of different kinds (accuracy, exact match,
pass@1, perplexity) are never averaged: a capability that is measured in two kinds has a row for each.

Item by item: an item that was right and is wrong now is lost, one that was wrong and is right now is won. An average
hides both, and a fact that was lost does not return with another that was won. By guessing alone a model that knows
nothing loses and wins items all the time, so what guessing is expected to flip is taken off (Harmon 2026, arXiv
2510.17776): (1 - accuracy before) (1 - accuracy after) chance / (1 - chance) of the items each way, not below zero.

Example: of 100 items with 4 choices 60 were right before and 50 after; 20 were lost, 10 won. Guessing flips
0.4 x 0.5 / 3 = 6.7 of 100 each way: 13.3 % are lost and 3.3 % won. McNemar's exact test: 20 or more of 30 flips in one
direction come by chance with p = 0.099.

All functions take and return plain values. What cannot be known is None, never zero.
"""

import zlib

import numpy as np

from core.errors import UserError
from measure import verdict

# A baseline compares where these are equal: the same questions, asked and judged in the same way.
SAME = {"n": "number of items", "shots": "number of examples", "version": "version", "metric": "metric",
        "items_hash": "hash of the items", "sampling": "way that programs are drawn"}
# What a user's own tasks measure, whose loss is no forgetting.
DOMAIN = "domain"


def compare(before: dict | None, after: dict) -> dict:
    """{"change": {task: row}, "capabilities": {name: row}, "forgetting"} of results {task: result} before and after.

    A row: "baseline", "current", "metric", "direction", "degradation" with its "interval" at 95 %, "retention",
    "retention_above_chance", "sign" ("", "warning" or "bad"); a task's also has "flips", a capability's its "tasks".
    forgetting: the mean degradation of the capabilities but the domain's. UserError where the results do not compare.
    """
    before = before or {}
    check_baseline(before, after)
    rows = {name: compare_task(name, before[name], after[name]) for name in after if name in before}
    capabilities = {}
    for capability, kinds in group(after).items():
        for kind, names in kinds.items():
            name = capability if len(kinds) == 1 else f"{capability} ({kind.replace('_', ' ')})"
            capabilities[name] = compare_group(kind, names, before, after)
    lost = [row["degradation"] for name, row in capabilities.items() if name.partition(" ")[0] != DOMAIN]
    return {"change": rows, "capabilities": capabilities, "forgetting": verdict.mean(lost)}


def check_baseline(before: dict, after: dict) -> None:
    """UserError where the results before are of other items, or were scored in another way."""
    for name in after:
        for key, words in SAME.items() if name in before else ():
            was, now = before[name].get(key), after[name].get(key)
            if was != now:
                raise UserError(f"task {name}: the {words} is {was} in the baseline, but {now} here; score the "
                                f"baseline anew, on the same items and with the same options")


def group(results: dict) -> dict[str, dict[str, list[str]]]:
    """{capability: {kind: [tasks]}}, each in its first place."""
    found = {}
    for name, result in results.items():
        kind = "accuracy" if result["metric"].startswith("acc") else result["metric"]
        found.setdefault(result["capability"], {}).setdefault(kind, []).append(name)
    return found


# ---- one task, one capability

def compare_task(name: str, was: dict, now: dict) -> dict:
    values = [verdict.finite(side.get("value")) for side in (was, now)]
    draws = draw_values(name, was, now)
    return {"metric": now["metric"], **relate(values, now["direction"], now["chance"], draws),
            "flips": count_flips(was, now)}


def compare_group(kind: str, names: list[str], before: dict, after: dict) -> dict:
    """A capability's row, by the means over its tasks of one kind; unknown where one of them has no baseline."""
    results = [[side.get(name) for name in names] for side in (before, after)]
    values = [verdict.mean([result and verdict.finite(result.get("value")) for result in side]) for side in results]
    known = None not in results[0]
    draws = [draw_values(name, before[name], after[name]) for name in names] if known else [None]
    # [2, DRAWS]: means of what was drawn before and after
    draws = verdict.mean(draws)
    chance = verdict.mean([result["chance"] for result in results[1]])
    return {"metric": kind, **relate(values, results[1][0]["direction"], chance, draws), "tasks": names}


def relate(values: list, direction: str, chance: float, draws) -> dict:
    """The part of a row that the values before and after, and what was drawn of them [2, DRAWS], make."""
    was, now = values
    lost = degrade(was, now, direction)
    above = None
    if None not in values and direction == "up" and was > chance:
        above = (now - chance) / (was - chance)
    interval = verdict.middle(None if draws is None else degrade(*draws, direction))
    return {"baseline": was, "current": now, "direction": direction, "degradation": lost, "interval": interval,
            "retention": None if lost is None else 1 - lost if direction == "up" else 1 / (1 + lost) if now else None,
            "retention_above_chance": above, "sign": sign(lost)}


def degrade(was, now, direction: str):
    """The relative loss of numbers or arrays; None where it is unknown."""
    if was is None or now is None or not np.all(was):
        return None
    return 1 - now / was if direction == "up" else now / was - 1


def sign(degradation: float | None) -> str:
    # From 0.50 to 0.45 is 10 %, whatever the last bits of the quotient are.
    lost = 0 if degradation is None else round(degradation, 9)
    return "" if lost < verdict.GOOD else "warning" if lost < verdict.WARNING else "bad"


# ---- item by item

def count_pairs(was: dict, now: dict) -> list[int] | None:
    """[right both times, lost, won, wrong both times]; None where the items' hits are not known."""
    hits = [side.get("hits") for side in (was, now)]
    if not all(isinstance(side, str) and side for side in hits) or len(hits[0]) != len(hits[1]):
        return None
    pairs = ["".join(pair) for pair in zip(*hits)]
    counts = [pairs.count(pair) for pair in ("11", "10", "01", "00")]
    return counts if sum(counts) == len(pairs) else None


def draw_values(name: str, was: dict, now: dict) -> np.ndarray | None:
    """[2, DRAWS] shares of right items before and after, or perplexities, the items drawn anew with replacement, the
    same ones on both sides; None where what each item scored is not known, or they are too few. The draws are a
    function of the task's name and the number of its items alone."""
    if now["direction"] == "down":
        return draw_perplexities(name, was, now)
    counts = count_pairs(was, now)
    if counts is None or sum(counts) < verdict.FEWEST:
        return None
    generator = np.random.default_rng(zlib.crc32(name.encode()))
    both, lost, won, _ = generator.multinomial(sum(counts), np.array(counts) / sum(counts), verdict.DRAWS).T
    return np.stack([both + lost, both + won]) / sum(counts)


def draw_perplexities(name: str, was: dict, now: dict) -> np.ndarray | None:
    """The same of a metric of log-likelihoods, of the nats of each item and of what they are divided by."""
    sides = [side.get(key) for side in (was, now) for key in ("nats_by_item", "sizes_by_item")]
    if not all(isinstance(side, list) and all(verdict.finite(value) is not None for value in side) for side in sides):
        return None
    n = len(sides[0])
    if any(len(side) != n for side in sides) or n < verdict.FEWEST or sides[1] != sides[3] or min(sides[1]) <= 0:
        return None
    values, generator = np.array(sides[:3], float), np.random.default_rng(zlib.crc32(name.encode()))
    # [DRAWS, 3] sums over the items that were drawn: nats before, sizes, nats after.
    sums = np.array([values[:, generator.integers(n, size=n)].sum(1) for _ in range(verdict.DRAWS)])
    per_unit = (sums[:, [0, 2]] / sums[:, [1]]).T
    return per_unit if now["metric"] == "bits_per_byte" else np.exp(np.minimum(per_unit, 700))


def count_flips(was: dict, now: dict) -> dict | None:
    """{"lost", "won": items, "lost_above_chance", "won_above_chance": shares of all items, "p": McNemar's}."""
    counts = count_pairs(was, now)
    if counts is None:
        return None
    both, lost, won, _ = counts
    n, chance = sum(counts), now["chance"]
    guessed = (1 - (both + lost) / n) * (1 - (both + won) / n) * chance / (1 - chance) if chance < 1 else 0.0
    return {"lost": lost, "won": won, "lost_above_chance": max(0.0, lost / n - guessed),
            "won_above_chance": max(0.0, won / n - guessed), "p": mcnemar(lost, won)}


def mcnemar(lost: int, won: int) -> float:
    """The chance of flips as one-sided as these, where both directions are equally likely: exact, two-sided."""
    n, fewer, term, total = lost + won, min(lost, won), 1, 0
    # term is C(n, i), in integers of any size.
    for i in range(fewer + 1):
        total += term
        term = term * (n - i) // (i + 1)
    return min(1.0, 2 * total / 2 ** n)


# ---- with the texts, and over checkpoints

def judge(texts: dict, compared: dict) -> dict:
    """{"forgetting", "forgetting_of", "score"} of what `verdict.compare` returned of texts, and `compare` of tasks.

    Where general texts were scored forgetting is theirs, which is the surer one; else that of the capabilities."""
    of = "texts" if texts["forgetting"] is not None else "tasks" if compared["forgetting"] is not None else None
    forgetting = {"texts": texts, "tasks": compared, None: texts}[of]["forgetting"]
    return {"forgetting": forgetting, "forgetting_of": of,
            "score": verdict.overall_score(texts["domain_gain"], forgetting)}


def find_front(points: list[tuple]) -> list[bool]:
    """Of each (domain gain, forgetting) whether no other point gains more at the same or less forgetting (Pareto)."""
    return [None not in point and not any(
        None not in other and other != point and other[0] >= point[0] and other[1] <= point[1] for other in points)
        for point in points]


# ---- words

def format_capabilities(capabilities: dict, change: dict) -> str:
    """Two Markdown tables: the rows of capabilities, and of each task's change the items that were lost and won."""
    lines = ["| capability | by | before | after | kept | above chance | change for the worse (95 %) |",
             "|---|---|---|---|---|---|---|"]
    for name, row in capabilities.items():
        lines.append("| " + " | ".join([
            name, row["metric"].replace("_", " "), show(row["baseline"], ".4f"), show(row["current"], ".4f"),
            show(row["retention"], ".1%"), show(row["retention_above_chance"], ".1%"), show_loss(row)]) + " |")
    flips = {name: row["flips"] for name, row in change.items() if row["flips"]}
    if flips:
        lines += ["", "| task | lost (1->0) | won (0->1) | lost above chance | won above chance | McNemar's p |",
                  "|---|---|---|---|---|---|"]
    for name, row in flips.items():
        shown = " ".join(name.split()).replace("|", "\\|")
        lines.append(f"| {shown} | {row['lost']} | {row['won']} | {row['lost_above_chance']:.1%} | "
                     f"{row['won_above_chance']:.1%} | {row['p']:.3g} |")
    return "\n".join(lines)


def format_course(checkpoints: list[dict]) -> str:
    """Markdown table of a run's checkpoints: gain, forgetting, overall score, and whether no other gains more at the
    same or less forgetting."""
    front = find_front([(row["domain_gain"], row["forgetting"]) for row in checkpoints])
    lines = ["| step | domain gain | forgetting | overall score | not beaten in both |", "|---|---|---|---|---|"]
    for row, is_best in zip(checkpoints, front):
        shown = [show(row[key], "+z.1%") for key in ("domain_gain", "forgetting", "score")]
        lines.append(f"| {row['step']} | {' | '.join(shown)} | {'yes' * is_best} |")
    return "\n".join(lines)


def show(value: float | None, form: str) -> str:
    return "unknown" if value is None else f"{value:{form}}"


def show_loss(row: dict) -> str:
    """The degradation of a capability with its interval and sign."""
    if row["degradation"] is None:
        return "unknown"
    interval = row["interval"]
    sure = "" if interval is None else " ({:+z.1f} to {:+z.1f} %)".format(*(100 * end for end in interval))
    unclear = ", not distinguishable from no change" if verdict.is_unclear(interval) else ""
    marks = {"": "", "warning": "! ", "bad": "!! "}
    return f"{marks[row['sign']]}{100 * row['degradation']:+z.1f} %{sure}{unclear}"
