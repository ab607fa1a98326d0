"""measure/retention.py. Truth: examples worked by hand, scipy's binomial test, the normal approximation of a paired
difference, and models that guess, which forget nothing."""

import math

import numpy as np
import pytest

from core.errors import UserError
from measure import retention, verdict


def result(hits: str | None = None, capability="reasoning", metric="acc", chance=0.25, value=None, **more) -> dict:
    """The result of a task, in the shape of measure/tasks.py."""
    value = hits.count("1") / len(hits) if value is None else value
    return {metric: value, "metric": metric, "value": value, "direction": "up", "chance": chance,
            "n": len(hits) if hits else 100, "capability": capability, "version": 1, "shots": 0, "items_hash": "ab12",
            **({"hits": hits} if hits else {}), **more}


def tables(found: dict) -> str:
    return retention.format_capabilities(found["capabilities"], found["change"])


def pair(both: int, lost: int, won: int, wrong: int, **more) -> tuple[dict, dict]:
    return (result("1" * (both + lost) + "0" * (won + wrong), **more),
            result("1" * both + "0" * lost + "1" * won + "0" * wrong, **more))


def test_the_example_of_the_docstring():
    was, now = pair(40, 20, 10, 30)
    row = retention.compare({"arc": was}, {"arc": now})["change"]["arc"]
    assert (row["baseline"], row["current"]) == (0.6, 0.5)
    assert row["degradation"] == pytest.approx(1 / 6)
    assert row["retention"] == pytest.approx(5 / 6)
    # (0.50 - 0.25) / (0.60 - 0.25)
    assert row["retention_above_chance"] == pytest.approx(5 / 7)
    assert row["sign"] == "bad"
    flips = row["flips"]
    assert (flips["lost"], flips["won"]) == (20, 10)
    assert (flips["lost_above_chance"], flips["won_above_chance"]) == pytest.approx((2 / 15, 1 / 30))
    assert flips["p"] == pytest.approx(2 * sum(math.comb(30, i) for i in range(11)) / 2**30)
    assert round(flips["p"], 3) == 0.099


@pytest.mark.parametrize(("value", "sign"), [(0.60, ""), (0.571, ""), (0.5699, "warning"), (0.541, "warning"),
                                             (0.5399, "bad"), (0.7, "")])
def test_the_sign_comes_at_five_and_at_ten_per_cent(value, sign):
    row = retention.compare_task("t", result(value=0.6), result(value=value))
    assert row["sign"] == sign
    assert row["interval"] is row["flips"] is None


def test_less_is_better_for_perplexity():
    """From 10 to 11 is 10 % worse, and 10 / 11 are kept; from 10 to 8 is 20 % better."""
    def of(value):
        return result(value=value, metric="perplexity", capability="language", chance=0.0, direction="down")
    row = retention.compare_task("wikitext", of(10.0), of(11.0))
    assert (row["degradation"], row["retention"], row["sign"]) == pytest.approx((0.1, 10 / 11, "bad"))
    row = retention.compare_task("wikitext", of(10.0), of(8.0))
    assert (row["degradation"], row["retention"], row["sign"]) == pytest.approx((-0.2, 1.25, ""))
    assert row["retention_above_chance"] is None


def test_kinds_are_never_averaged():
    """knowledge: MMLU's accuracy and TriviaQA's exact match are two rows; reasoning: the mean of two accuracies."""
    before = {"arc": result(value=0.5), "piqa": result(value=0.8, chance=0.5, metric="acc_norm"),
              "mmlu": result(value=0.4, capability="knowledge"),
              "triviaqa": result(value=0.2, capability="knowledge", metric="exact_match", chance=0.0),
              "wikitext": result(value=20.0, capability="language", metric="perplexity", direction="down", chance=0.0)}
    values = {"arc": 0.45, "piqa": 0.8, "mmlu": 0.4, "triviaqa": 0.1, "wikitext": 25.0}
    after = {name: before[name] | {"value": value} for name, value in values.items()}
    found = retention.compare(before, after)
    rows = {name: (row["baseline"], row["current"]) for name, row in found["capabilities"].items()}
    assert rows == {"reasoning": (pytest.approx(0.65), pytest.approx(0.625)), "knowledge (accuracy)": (0.4, 0.4),
                    "knowledge (exact match)": (0.2, 0.1), "language": (20.0, 25.0)}
    # Above chance 0.375: 0.25 of 0.275.
    assert found["capabilities"]["reasoning"]["retention_above_chance"] == pytest.approx(0.25 / 0.275)
    assert found["capabilities"]["reasoning"]["tasks"] == ["arc", "piqa"]
    # 0.025 / 0.65, 0, 0.5 and 0.25
    assert found["forgetting"] == pytest.approx((0.025 / 0.65 + 0 + 0.5 + 0.25) / 4)


def test_without_a_baseline_nothing_is_known():
    found = retention.compare(None, {"arc": result("0110")})
    row = found["capabilities"]["reasoning"]
    assert (found["change"], found["forgetting"]) == ({}, None)
    assert (row["current"], row["sign"]) == (0.5, "")
    assert {row[key] for key in ("baseline", "degradation", "retention", "retention_above_chance")} == {None}
    assert "| reasoning | accuracy | unknown | 0.5000 | unknown |" in tables(found)
    half = retention.compare({"arc": result("0110")}, {"arc": result("0110"), "piqa": result("11")})
    assert half["capabilities"]["reasoning"]["baseline"] is None
    assert half["change"].keys() == {"arc"}


def test_a_baseline_of_zero_or_at_chance():
    row = retention.compare_task("t", result(value=0.0), result(value=0.1))
    assert (row["degradation"], row["retention"], row["retention_above_chance"]) == (None, None, None)
    assert retention.compare_task("t", result(value=0.25), result(value=0.3))["retention_above_chance"] is None
    assert retention.compare_task("t", result(value=math.nan), result(value=0.3))["degradation"] is None


def test_what_a_domain_loses_is_no_forgetting():
    before = {"law": result(value=0.5, capability="domain"), "arc": result(value=0.5)}
    after = {"law": result(value=0.1, capability="domain"), "arc": result(value=0.5)}
    found = retention.compare(before, after)
    assert found["forgetting"] == 0
    assert found["capabilities"]["domain"]["sign"] == "bad"


@pytest.mark.parametrize(("change", "match"), [
    ({"items_hash": "ff"}, "task arc: the hash of the items is ab12 in the baseline, but ff here; score the baseline"),
    ({"n": 3}, "number of items is 4"), ({"shots": 5}, "number of examples is 0 in the baseline, but 5"),
    ({"version": 2}, "version is 1"), ({"metric": "acc_norm"}, "metric is acc in")])
def test_a_baseline_of_other_items_is_refused(change, match):
    with pytest.raises(UserError, match=match) as refused:
        retention.compare({"arc": result("0110")}, {"arc": result("0110") | change})
    assert "\n" not in str(refused.value)


# ---- item by item

@pytest.mark.parametrize(("lost", "won"), [(0, 0), (1, 0), (5, 5), (9, 1), (3, 14), (400, 350)])
def test_mcnemar_is_scipys_exact_test(lost, won):
    stats = pytest.importorskip("scipy.stats")
    wanted = stats.binomtest(lost, lost + won).pvalue if lost + won else 1.0
    assert retention.mcnemar(lost, won) == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("choices", [2, 4, 5])
def test_models_that_guess_forget_nothing(choices):
    """Know-or-guess, as the correction assumes: 30 % are known to both, 10 % are forgotten, 5 % learned."""
    generator, n = np.random.default_rng(0), 100_000
    kind = generator.random(n)
    knows = [(kind < 0.4), (kind < 0.3) | (kind > 0.95)]
    right = [known | (generator.random(n) < 1 / choices) for known in knows]
    sides = [result("".join("01"[int(hit)] for hit in hits), chance=1 / choices) for hits in right]
    found = retention.count_flips(*sides)
    # The correction takes both sides for independent, which those are not that know the same: it is not exact.
    for way, truth in (("lost", 0.1), ("won", 0.05)):
        assert found[f"{way}_above_chance"] == pytest.approx(truth, abs=0.02)
        assert abs(found[f"{way}_above_chance"] - truth) < abs(found[way] / n - truth)
    nothing = [result("".join("01"[int(hit)] for hit in generator.random(n) < 1 / choices), chance=1 / choices)
               for _ in range(2)]
    found = retention.count_flips(*nothing)
    assert found["lost_above_chance"] < 0.006
    assert found["won_above_chance"] < 0.006
    assert found["lost"] > n / choices / 3


def test_the_interval_is_that_of_a_paired_difference():
    """Of 1,000 items 30 were lost and 50 won: the difference has a variance of (80 - 400 / 1,000) / 1,000 squared."""
    was, now = pair(570, 30, 50, 350)
    row = retention.compare_task("arc", was, now)
    half = 1.96 * math.sqrt(80 - 0.4) / 1000 / 0.6
    assert row["degradation"] == pytest.approx(-20 / 600)
    low, high = row["interval"]
    assert (high - low) / 2 == pytest.approx(half, rel=0.1)
    assert (low + high) / 2 == pytest.approx(row["degradation"], abs=0.2 * half)
    assert retention.compare_task("arc", was, now) == row
    # Twice the same answers: no change, and that is sure. Five items say nothing.
    assert retention.compare_task("arc", was, was)["interval"] == [0, 0]
    assert retention.compare_task("arc", *pair(2, 1, 1, 1))["interval"] is None


def of_nats(nats, sizes=None, metric="perplexity", **more) -> dict:
    """The result of a task of log-likelihoods of items, in the shape of measure/tasks.py."""
    sizes, nats = [1] * len(nats) if sizes is None else list(sizes), list(map(float, nats))
    value = sum(nats) / sum(sizes)
    return result(value=value if metric == "bits_per_byte" else math.exp(value), metric=metric, direction="down",
                  chance=0.0, capability="language", hits=None, nats_by_item=nats, sizes_by_item=sizes, **more)


def test_the_interval_of_a_perplexity_is_that_of_a_paired_difference_of_its_logarithm():
    """Of 1,000 items that differ from each other by far more, each took 0.1 nats more, give or take 0.2: the logarithm
    of the ratio of perplexities is normal, with a deviation of 0.2 / sqrt(1,000)."""
    generator = np.random.default_rng(0)
    was = generator.normal(5, 2, 1000)
    more = generator.normal(0, 1, 1000)
    more = 0.1 + 0.2 * (more - more.mean()) / more.std()
    row = retention.compare_task("lambada", of_nats(was), of_nats(was + more))
    assert row["degradation"] == pytest.approx(math.exp(0.1) - 1)
    half = 1.96 * 0.2 / math.sqrt(1000)
    low, high = np.log1p(row["interval"])
    assert (high - low) / 2 == pytest.approx(half, rel=0.1)
    assert (low + high) / 2 == pytest.approx(0.1, abs=0.2 * half)
    assert row == retention.compare_task("lambada", of_nats(was), of_nats(was + more))
    assert row["flips"] is None
    # Alone in its capability it has the same interval there, and the table says it.
    found = retention.compare({"lambada": of_nats(was)}, {"lambada": of_nats(was + more)})
    assert found["capabilities"]["language"]["interval"] == row["interval"]
    assert "| !! +10.5 % (+{:.1f} to +{:.1f} %) |".format(*(100 * end for end in row["interval"])) in tables(found)


def test_the_interval_of_items_of_several_sizes_is_exact_where_each_lost_as_much():
    """Each word took 2 nats and takes 2.5: whatever is drawn, the perplexity rises by exp(0.5), the bits by 25 %."""
    sizes = np.arange(1, 9)
    for metric, rise in (("word_perplexity", math.exp(0.5) - 1), ("bits_per_byte", 0.25)):
        sides = [of_nats(sizes * nats, sizes.tolist(), metric) for nats in (2, 2.5)]
        row = retention.compare_task("wikitext", *sides)
        assert [row["degradation"], *row["interval"]] == pytest.approx([rise] * 3)
    # An item that weighs three quarters of all words is the change: without it there is none.
    heavy, light = [90, 5, 5, 5, 5, 5, 5], [1.0, 0, 0, 0, 0, 0, 0]
    sides = [of_nats(np.array(heavy) * (2 + more * np.array(light)), heavy, "word_perplexity") for more in (0, 1)]
    row = retention.compare_task("wikitext", *sides)
    assert row["degradation"] == pytest.approx(math.exp(0.75) - 1)
    assert row["interval"][0] == 0
    # Seven times this one: exp(1) - 1 is the most that there is, and three of it are drawn often enough.
    assert row["interval"][1] == pytest.approx(math.exp(270 / 290) - 1, rel=0.02)


@pytest.mark.parametrize("odd", [
    {"nats_by_item": None}, {"sizes_by_item": None}, {"nats_by_item": [1.0] * 7}, {"nats_by_item": [1.0] * 7 + ["x"]},
    {"sizes_by_item": [1] * 7 + [2]}, {"sizes_by_item": [0] * 8}, {"nats_by_item": [math.nan] * 8}])
def test_nats_that_do_not_match_have_no_interval(odd):
    was, now = of_nats([1.0] * 8), of_nats([2.0] * 8)
    assert retention.compare_task("t", was, now)["interval"] == pytest.approx([math.e - 1] * 2)
    for sides in ((was, now | odd), (was | odd, now)):
        assert retention.compare_task("t", *sides)["interval"] is None
    few = [of_nats([nats] * 5) for nats in (1.0, 2.0)]
    assert retention.compare_task("t", *few)["interval"] is None


def test_hits_that_do_not_match_are_not_counted():
    was = result("0110")
    for hits in ("011", "", "01x0", None):
        now = {**was, "hits": hits}
        assert retention.count_flips(was, now) is None


# ---- with the texts

def test_the_overall_score_is_the_gain_less_forgetting_beyond_five_per_cent():
    gained = {"domain_gain": 0.25, "forgetting": 0.10}
    assert retention.judge(gained, {"forgetting": 0.5}) == {"forgetting": 0.10, "forgetting_of": "texts",
                                                            "score": pytest.approx(0.20)}
    alone = retention.judge(gained | {"forgetting": None}, {"forgetting": 0.08})
    assert alone == {"forgetting": 0.08, "forgetting_of": "tasks", "score": pytest.approx(0.22)}
    assert retention.judge(gained | {"forgetting": None}, {"forgetting": None})["score"] is None
    assert retention.judge({"domain_gain": None, "forgetting": 0.1}, {"forgetting": 0.1})["score"] is None


def test_the_front_holds_what_nothing_beats():
    points = [(0.10, 0.02), (0.20, 0.05), (0.15, 0.06), (0.20, 0.08), (0.05, -0.01), (None, 0.0), (0.10, 0.02)]
    assert retention.find_front(points) == [True, True, False, False, True, False, True]
    assert retention.find_front([]) == []


def test_the_tables_say_what_is_known():
    was, now = pair(400, 100, 50, 450, capability="reasoning")
    said = tables(retention.compare({"a|b\n": was}, {"a|b\n": now})).splitlines()
    assert said[2].startswith("| reasoning | accuracy | 0.5000 | 0.4500 | 90.0% | 80.0% | !! +10.0 % (")
    assert said[-1] == "| a\\|b | 100 | 50 | 0.8% | 0.0% | 5.45e-05 |"
    was, now = pair(40, 2, 3, 55)
    assert "not distinguishable from no change" in tables(retention.compare({"t": was}, {"t": now}))
    assert verdict.GOOD == 0.05
    rows = [{"step": 10, "domain_gain": 0.1, "forgetting": 0.02, "score": 0.1},
            {"step": 20, "domain_gain": 0.05, "forgetting": 0.02, "score": 0.05},
            {"step": 30, "domain_gain": 0.2, "forgetting": None, "score": None}]
    assert retention.format_course(rows).splitlines()[2:] == [
        "| 10 | +10.0% | +2.0% | +10.0% | yes |", "| 20 | +5.0% | +2.0% | +5.0% |  |",
        "| 30 | +20.0% | unknown | unknown |  |"]
