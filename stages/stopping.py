"""When a run ends before its last step: where the domain gains too little for its tokens, or too much is forgotten.

    gain per million tokens = (gain now - gain `stop_patience` evaluations ago) / millions of tokens between

with gain = the domain's relative fall of bits per byte since step 0. General text often gets worse after the learning
rate has risen, and recovers (the stability gap, arXiv 2406.14833), and so may the domain: no evaluation before
`stop_after` counts, and one alone never ends a run.
"""

from measure import verdict


def judge_evaluations(c, evaluations: list[dict], roles: dict[str, str], steps: int, tokens_per_step: int
                      ) -> dict | None:
    """Why a run is to end after the last of its evaluations, {"setting", "value", "limit", "reason"}, or None.

    c: settings eval.*. evaluations: [{"step", "texts": {source: scores}}] from step 0 on. roles: {source: its role}.
    A function of the evaluations alone: a resumed run ends where one that nothing interrupted does.
    """
    after = steps // 5 if c.stop_after is None else c.stop_after
    counted = [each for each in evaluations if each["step"] >= after]
    first, n = evaluations[0], c.stop_patience
    if first["step"] or not (c.stop_gain or c.stop_forgetting):
        return None
    changes = {each["step"]: compare(first["texts"], each["texts"], roles) for each in counted[-n - 1:]}
    if c.stop_gain and len(changes) > n:
        (begin, was), *_, (end, now) = changes.items()
        gain = per_million(was["domain_gain"], now["domain_gain"], (end - begin) * tokens_per_step)
        if gain is not None and gain < c.stop_gain:
            return {"setting": "eval.stop_gain", "value": gain, "limit": c.stop_gain, "reason": (
                f"from step {begin} to {end} the domain gained {100 * gain:.3g} % of bits per byte per million tokens, "
                f"less than eval.stop_gain {100 * c.stop_gain:.3g} %")}
    lost = [change["forgetting"] for change in changes.values()][-n:]
    if c.stop_forgetting and len(lost) == n and all(value is not None and value > c.stop_forgetting for value in lost):
        return {"setting": "eval.stop_forgetting", "value": lost[-1], "limit": c.stop_forgetting, "reason": (
            f"general text has lost {100 * lost[-1]:.3g} % of bits per byte, at {n} evaluations one after another more "
            f"than eval.stop_forgetting {100 * c.stop_forgetting:.3g} %")}
    return None


def compare(before: dict, now: dict, roles: dict[str, str]) -> dict:
    """verdict.py's {"domain_gain", "forgetting"}, by bits per byte or, of a masked model, by the loss."""
    metric = next(unit for unit in verdict.UNITS if all(unit in scores for scores in now.values()))
    change = {name: now[name][metric] / before[name][metric] - 1 for name in now
              if verdict.finite(now[name][metric]) is not None and verdict.finite(before.get(name, {}).get(metric))}
    names = {role: [name for name in change if roles[name] == role] for role in ("domain", "general")}
    return verdict.summarise(change, names["general"], names["domain"])


def per_million(was: float | None, now: float | None, tokens: int) -> float | None:
    return None if was is None or now is None else (now - was) / (tokens / 1e6)
