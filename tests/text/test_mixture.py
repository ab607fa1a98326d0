"""Truth: the schedules' figures as SPEC.md gives them, written out by hand; plain sums; the old shapes' own numbers.
Laws: weights sum to one; counts keep within one sequence of the wanted mix at every prefix under every schedule;
a bucket is only a source; strata hold whatever is in them.
"""

import dataclasses
import typing

import numpy as np
import pytest
from growth import assert_linear

from core.config import check_limits
from text import mixture
from text.mixture import (
    DataConfig,
    LengthConfig,
    SourceConfig,
    Strata,
    _due_first,
    describe_mix,
    draw_shares,
    judge_epochs,
    make_plan,
    measure_shares,
    plan_counts,
    replan,
    replay_strata,
    schedule_at,
    source_weights,
    weights_at,
)

SCHEDULES = typing.get_args(typing.get_type_hints(DataConfig)["schedule"])


def share_at(config, progress, steps) -> float:
    return schedule_at(config, progress, steps)[0]


def bucketed(K: int = 10, tokens=None, **more) -> dict:
    """A domain source of K buckets, of one document in K each, and one general source."""
    buckets = {f"law/{k}": SourceConfig(**more) for k in range(K)}
    for k, bucket in enumerate(buckets.values()):
        bucket.of, bucket.low, bucket.high, bucket.tokens = "law", k / K, (k + 1) / K, (tokens or [100] * K)[k]
    return {**buckets, "wiki": SourceConfig(role="general")}


# ---- the plan

def over_run(weights, steps) -> np.ndarray:
    """[steps, S] of a function of the progress."""
    return np.array([weights(p) for p in np.linspace(0, 1, steps)])


def deviation(weights, batch_size) -> float:
    counts = plan_counts(weights, batch_size)
    taken = np.diff(counts, axis=0)
    assert counts.dtype == np.int64
    assert not counts[0].any()
    assert (taken >= 0).all()
    assert (taken.sum(1) == batch_size).all()
    wanted = np.cumsum(batch_size * weights, 0)
    return float(np.abs(counts[1:] - wanted).max()) - 1e-6             # the plan knows weights to 2^-32


@pytest.mark.parametrize("batch_size", [1, 2, 7, 64])
def test_counts_keep_within_one_sequence_of_the_mix(batch_size):
    configs = {"a": SourceConfig(weight=1.0), "b": SourceConfig(weight=3.0), "c": SourceConfig(weight=0.0),
               "d": SourceConfig(role="general", weight=2.0), "e": SourceConfig(role="general", weight=0.01)}
    for schedule in ("static", "warmup_cooldown"):
        weights = over_run(lambda p, s=schedule: source_weights(
            configs, share_at(DataConfig(schedule=s), p, 700)), 700)
        assert deviation(weights, batch_size) < 1
    for sources in (1, 2, 3, 6):
        jumps = np.random.default_rng(sources).dirichlet(np.full(sources, 0.5), 700)
        assert deviation(jumps, batch_size) < 1
    assert not plan_counts(np.tile([0.5, 0.0, 0.5], (100, 1)), batch_size)[:, 1].any()
    assert plan_counts(np.ones((5, 1)), batch_size)[:, 0].tolist() == [batch_size * i for i in range(6)]


def test_the_plan_of_what_is_due_first():
    """Eleven alike at one sequence a step, and weights that jump: where largest remainder strays by one and more."""
    rng = np.random.default_rng(0)
    for trial in range(60):
        D, steps, batch_size = int(rng.integers(1, 13)), int(rng.integers(1, 300)), int(rng.integers(1, 40))
        jumps = rng.dirichlet(np.full(D, rng.choice([0.05, 1.0])), steps)
        if trial % 2:
            jumps = jumps[rng.integers(0, steps, 4)][np.sort(rng.integers(0, 4, steps))]
        whole = np.floor(jumps * 2**32).astype(np.int64)
        whole[np.arange(steps), whole.argmax(1)] += 2**32 - whole.sum(1)
        counts, wanted = _due_first(whole, batch_size), [0] * D
        assert (np.diff(counts, axis=0) >= 0).all()
        assert (np.diff(counts, axis=0).sum(1) == batch_size).all()
        for row, weights in zip(counts[1:].tolist(), whole.tolist()):      # exact, in Python's integers
            wanted = [have + batch_size * more for have, more in zip(wanted, weights)]
            assert all(abs(n * 2**32 - want) < 2**32 for n, want in zip(row, wanted))
        assert deviation(jumps, batch_size) < 1


def test_plans_as_their_docstrings_say():
    assert np.diff(plan_counts(np.tile([0.7, 0.3], (5, 1)), 2), axis=0).tolist()[:2] == [[1, 1], [2, 0]]
    weights = (np.array([0.55, 0.35, 0.1]) * 2**32).astype(np.int64)
    weights[0] += 2**32 - weights.sum()
    assert np.diff(_due_first(np.tile(weights, (10, 1)), 1), axis=0).argmax(1).tolist()[:3] == [0, 1, 0]


def test_the_schedule_of_the_domain_share():
    def share(p, schedule="warmup_cooldown", target=0.7):
        return share_at(DataConfig(schedule=schedule, domain_share=target), p, 1001)
    assert [round(share(p), 12) for p in (0, 0.05, 0.1, 0.5, 0.9, 0.95, 1)] == [0.3, 0.5, 0.7, 0.7, 0.7, 0.6, 0.5]
    assert {share(p, "static") for p in (0, 0.05, 0.5, 1)} == {0.7}
    assert [share(p, target=0.2) for p in (0, 0.5, 1)] == [0.2] * 3                         # never above the target
    counts = plan_counts(over_run(lambda p: [share(p), 1 - share(p)], 1001), 10)
    assert abs(counts[100, 0] - 10 * sum(0.3 + 0.4 * s / 100 for s in range(100))) < 1
    assert abs(counts[900, 0] - counts[100, 0] - 0.7 * 8000) < 2


def test_weights_of_sources():
    one = SourceConfig(weight=3.0)
    two, general = SourceConfig(weight=1.0), SourceConfig(role="general", weight=5.0)
    assert source_weights({"a": one, "b": two, "c": general}, 0.6).round(9).tolist() == [0.45, 0.15, 0.4]
    assert source_weights({"a": one, "b": two}, 0.6).tolist() == [0.75, 0.25]
    assert source_weights({"c": general}, 0.6).tolist() == [1.0]
    silent = SourceConfig(role="general", weight=0.0)
    assert source_weights({"a": one, "c": silent}, 0.6).tolist() == [1.0, 0.0]
    for weight in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="weight"):
            check_limits(SourceConfig(weight=weight))
    for wrong in ({"context": 0}, {"domain_share": 1.5}, {"domain_share": -0.1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            check_limits(DataConfig(**wrong))


# ---- schedules

@pytest.mark.parametrize(("schedule", "wanted"), [
    ("static", {0: 0.8, 0.5: 0.8, 1: 0.8}), ("immediate", {0: 0.8, 0.5: 0.8, 1: 0.8}),
    ("gradual", {0: 0, 0.05: 0.2, 0.1: 0.4, 0.2: 0.8, 0.6: 0.8, 1: 0.8}),
    ("staged", {0: 0.24, 0.099: 0.24, 0.1: 0.48, 0.299: 0.48, 0.3: 0.8, 1: 0.8}),
    ("quality_first", {0: 0.8, 1: 0.8}), ("curriculum", {0: 0.8, 0.5: 0.8, 1: 0.8}),
    ("two_stage", {0: 1, 0.5: 1, 1: 1}), ("domain_only", {0: 1, 0.5: 1, 1: 1}),
    ("warmup_cooldown", {0: 0.3, 0.1: 0.8, 0.9: 0.8, 1: 0.5})])
def test_domain_shares_by_hand(schedule, wanted):
    config = DataConfig(schedule=schedule, domain_share=0.8)
    assert {p: round(share_at(config, p, 1000), 12) for p in wanted} == wanted
    assert {p: round(weights_at(config, bucketed(), 1000, np.array([p]))[0, :-1].sum(), 12) for p in wanted} == wanted


def test_gradual_over_a_number_of_steps():
    config = DataConfig(schedule="gradual", gradual_steps=50)
    assert [round(share_at(config, step / 999, 1000), 12) for step in (0, 25, 50, 51, 999)] == [0, 0.35, 0.7, 0.7, 0.7]
    # an epoch of 100 windows at batch 1: 50 steps of 0.35 on average, and 82.5 / 0.7 more
    counts = make_plan(dataclasses.replace(config, context=8), LengthConfig(batch_size=1),
                       {"a": SourceConfig(), "g": SourceConfig(role="general")}, {"a": 100, "g": 100})
    assert counts[-1, 0] == pytest.approx(100, abs=2)
    assert len(counts) == pytest.approx(50 + 82.5 / 0.7, abs=3)


@pytest.mark.parametrize(("schedule", "wanted"), [
    ("static", {0: (0, 1, 1), 1: (0, 1, 1)}), ("warmup_cooldown", {0: (0, 1, 1)}), ("two_stage", {0: (0, 1, 1)}),
    ("gradual", {0: (0, 0.3, 1), 0.1: (0, 0.65, 1), 0.2: (0, 1, 1), 1: (0, 1, 1)}),
    ("staged", {0: (0, 0.3, 1), 0.1: (0, 0.6, 1), 0.29: (0, 0.6, 1), 0.3: (0, 1, 1)}),
    ("quality_first", {0: (0, 0.3, 1), 0.5: (0, 0.65, 1), 1: (0, 1, 1)}),
    ("curriculum", {0: (0, 0.3, 1), 0.15: (0, 0.45, 1), 0.3: (0.2, 0.6, 1), 0.5: (0.2, 0.7, 1), 0.7: (0, 1, 3),
                    1: (0, 1, 3)})])
def test_open_documents_by_hand(schedule, wanted):
    config = DataConfig(schedule=schedule)
    assert {p: tuple(round(x, 12) for x in schedule_at(config, p, 1000)[1]) for p in wanted} == wanted


def test_buckets_share_their_sources_weight_by_what_is_open_of_them():
    def law(opened, **more):
        return source_weights(bucketed(4, **more), 0.8, opened)[:4].round(9).tolist()
    assert law((0, 1, 1)) == [0.2] * 4
    assert law((0, 1, 1), tokens=[30, 10, 20, 20]) == [0.3, 0.1, 0.2, 0.2]                   # every token as often
    assert law((0, 0.5, 1)) == [0.4, 0.4, 0, 0]
    assert law((0, 0.3, 1)) == [round(0.8 * 5 / 6, 9), round(0.8 / 6, 9), 0, 0]              # a fifth of the second
    assert law((0.25, 0.75, 1)) == [0, 0.4, 0.4, 0]
    hard = np.array([1.25, 1.75, 2.25, 2.75])                                                # 1 to 3, at the middles
    assert law((0, 1, 3)) == (0.8 * hard / hard.sum()).round(9).tolist()
    # beside another domain source, and as replay, where nothing opens
    sources = bucketed(2, weight=3.0) | {"code": SourceConfig(weight=1.0)}
    assert source_weights(sources, 0.8, (0, 0.5, 1)).round(9).tolist() == [0.6, 0, 0.2, 0.2]
    sources = bucketed(2, role="general") | {"a": SourceConfig()}
    assert source_weights(sources, 0.5, (0, 0.5, 1)).round(9).tolist() == [0.125, 0.125, 0.25, 0.5]


def test_a_source_called_as_a_bucket_is_refused(monkeypatch):
    monkeypatch.setattr(mixture, "read_buckets", lambda path: {"buckets": [{"name": "b", "tokens": 1}] * 2}
                        if path == "scored" else None)
    named = {"law/1": SourceConfig("plain"), "law": SourceConfig("scored")}
    with pytest.raises(ValueError, match="a source is called law/1, as a score bucket of source law; rename one"):
        mixture.open_buckets(named)


def test_one_bucket_of_all_documents_is_the_source():
    config = DataConfig(schedule="curriculum")
    whole = {"law": SourceConfig(), "wiki": SourceConfig(role="general")}
    progress = np.linspace(0, 1, 101)
    np.testing.assert_allclose(weights_at(config, bucketed(1), 100, progress), weights_at(config, whole, 100, progress))


def test_anneal_bends_the_end_of_any_schedule():
    for schedule in SCHEDULES:
        plain, config = DataConfig(schedule=schedule), DataConfig(schedule=schedule, anneal_share=0.95)
        for p in (0, 0.3, 0.84, 0.85):
            assert share_at(config, p, 100) == pytest.approx(share_at(plain, p, 100), abs=1e-12)
        assert share_at(config, 0.925, 100) == pytest.approx((share_at(plain, 0.925, 100) + 0.95) / 2)
        assert share_at(config, 1, 100) == pytest.approx(0.95)
    assert share_at(DataConfig(schedule="static", anneal_share=0.1, anneal_ratio=0.5), 0.75, 9) == pytest.approx(0.4)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_every_schedule_keeps_within_one_sequence_at_every_prefix(schedule, batch_size):
    strata = {"math": SourceConfig(role="general", stratum="math", weight=0.3),
              "talk": SourceConfig(role="general", stratum="language"),
              "more": SourceConfig(role="general", stratum="language", weight=2.0)}
    for steps in (1, 2, 50, 201):
        for anneal in (None, 1.0, 0.0):
            for K in (2, 10):
                config = DataConfig(schedule=schedule, anneal_share=anneal)
                tokens = np.random.default_rng(K).integers(1, 1000, K).tolist()
                sources = {**bucketed(K, tokens), "code": SourceConfig(weight=0.2)}
                assert deviation(weights_at(config, sources, steps), batch_size) < 1
                sources = {name: s for name, s in bucketed(K).items() if name != "wiki"} | strata
                assert deviation(weights_at(config, sources, steps), batch_size) < 1


def test_domain_alone_leaves_general_text_out_and_wants_a_domain():
    sources = {"law": SourceConfig(), "wiki": SourceConfig(role="general")}
    counts = {name: make_plan(DataConfig(schedule=name), LengthConfig(steps=20, batch_size=4), sources, {})
              for name in ("two_stage", "domain_only")}
    assert all(c[-1].tolist() == [80, 0] for c in counts.values())
    for name in counts:
        with pytest.raises(ValueError, match=f"{name} trains on the domain alone"):
            make_plan(DataConfig(schedule=name), LengthConfig(steps=2), {"wiki": sources["wiki"]}, {})


def test_quality_first_reads_the_best_first_and_all_of_it_by_the_end():
    counts = make_plan(DataConfig(schedule="quality_first", domain_share=1.0), LengthConfig(steps=1000, batch_size=8),
                       bucketed(10), {})[:, :10]
    assert not counts[300, 6:].any()                                       # open up to 0.3 + 0.7 * 0.3 = 0.51
    assert (counts[-1] > 0).all()
    assert (np.diff(counts[-1]) <= 0).all()


def test_curriculum_ends_with_emphasis_on_the_hard():
    counts = make_plan(DataConfig(schedule="curriculum", domain_share=1.0), LengthConfig(steps=1001, batch_size=8),
                       bucketed(10), {})[:, :10]
    easy, middle, rest = counts[300], counts[700] - counts[300], counts[-1] - counts[700]
    assert not easy[6:].any()
    assert not middle[:2].any()
    assert not middle[8:].any()
    assert rest[9] / rest[0] == pytest.approx(2.9 / 1.1, rel=0.03)         # 3 : 1 between the ends, 2.9 : 1.1 in tenths


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_schedule_that_finds_no_buckets_to_order_says_so(schedule):
    plain = {"law": SourceConfig(), "wiki": SourceConfig(role="general")}
    said = describe_mix(DataConfig(schedule=schedule), plain)
    assert bool(said) == (schedule in ("quality_first", "curriculum")) == ("data.py pack --buckets" in "".join(said))
    assert describe_mix(DataConfig(schedule=schedule), bucketed()) == []


def test_a_changed_share_leaves_the_schedule_where_it_is():
    """101 steps of 8, staged: of ten buckets the last four open at progress 0.3. What was drawn stays drawn."""
    config, sources = DataConfig(schedule="staged", domain_share=0.5), bucketed(10)
    plan = make_plan(config, LengthConfig(steps=101, batch_size=8), sources, {})
    for step in (5, 20, 50):
        changed = replan(plan, step, config, sources, 0.75)
        assert (changed[:step + 1] == plan[:step + 1]).all()
        assert (np.diff(changed, axis=0).sum(1) == 8).all()
        assert changed[-1, -1] - changed[step, -1] == pytest.approx(8 * 0.25 * (101 - step), abs=1)
        opens = max(step, 30)
        assert not (changed[opens] - changed[step])[6:10].any()                       # closed as long as they were
        each = (changed[-1] - changed[opens])[:10]                                    # and all alike from then on
        assert each == pytest.approx(8 * 0.75 / 10 * (101 - opens), abs=2)
    for step in (101, 102):
        assert replan(plan, step, config, sources, 0.75) is plan


# ---- length

def test_length_of_a_run():
    sources, rows = {"a": SourceConfig(), "g": SourceConfig(role="general")}, {"a": 100, "g": 10**5}
    config = DataConfig(context=10, schedule="static", domain_share=0.5)
    for length, steps in ((LengthConfig(steps=7, tokens=9, epochs=3), 7), (LengthConfig(epochs=2, batch_size=4), 100),
                          (LengthConfig(tokens=6401, batch_size=4), 161)):
        assert len(make_plan(config, length, sources, rows)) == steps + 1
    general = {"g": sources["g"]}
    assert len(make_plan(config, LengthConfig(batch_size=100), general, rows)) == 1001
    with pytest.raises(ValueError, match="never draws a domain sequence"):
        make_plan(DataConfig(schedule="static", domain_share=0), LengthConfig(), sources, rows)


def test_the_time_of_a_plan_is_linear_in_its_steps():
    sources = bucketed(18) | {"code": SourceConfig(role="general")}
    assert_linear(lambda steps: make_plan(DataConfig(), LengthConfig(steps=steps), sources, {}), 20_000)


# ---- replay

def test_strata_hold_whatever_is_in_them():
    sources = {"law": SourceConfig(),
               "a": SourceConfig(role="general", stratum="math", weight=5.0),
               "b": SourceConfig(role="general", stratum="math", weight=15.0),
               "c": SourceConfig(role="general", stratum="coding", weight=0.1)}
    strata = Strata(math=1.0, coding=3.0, **dict.fromkeys(("reasoning", "knowledge", "language", "safety"), 0.0),
                    instruction_following=2.0)
    shares, empty = replay_strata(sources, strata)
    assert shares == {"coding": 0.75, "math": 0.25}
    assert empty == ["instruction_following"]
    assert describe_mix(DataConfig(strata=strata), sources) == [
        "replay strata: coding 0.750, math 0.250; no source for instruction_following: the others share it"]
    assert source_weights(sources, 0.6, strata=strata).round(12).tolist() == [0.6, 0.025, 0.075, 0.3]
    sources["c"].weight = 0.0                                              # a stratum without weight is empty too
    assert replay_strata(sources, strata) == ({"math": 1.0}, ["coding", "instruction_following"])
    assert source_weights(sources, 0.6, strata=strata).round(12).tolist() == [0.6, 0.1, 0.3, 0]
    strata.math = 0.0
    with pytest.raises(ValueError, match=r"math.* weight 0 in data\.strata"):
        replay_strata(sources, strata)
    assert source_weights(sources, 0.6).round(12).tolist() == [0.6, 0.1, 0.3, 0]           # all alike by default


def test_the_strata_of_the_settings_weigh_every_step():
    sources = {"law": SourceConfig(), "a": SourceConfig(role="general", stratum="math"),
               "b": SourceConfig(role="general", stratum="coding")}
    config = DataConfig(schedule="static", domain_share=0.6, strata=Strata(math=3.0))
    assert weights_at(config, sources, 2).round(12).tolist() == [[0.6, 0.3, 0.1]] * 2
    assert weights_at(config, sources, 2, share=0.2).round(12).tolist() == [[0.2, 0.6, 0.2]] * 2


def test_a_stratum_without_weight_is_not_drawn():
    sources = {"a": SourceConfig(role="general", stratum="math"), "b": SourceConfig(role="general", stratum="coding")}
    assert source_weights(sources, 0.5, strata=Strata(math=0.0)).tolist() == [0, 1]


def test_strata_are_named_by_all_general_sources_or_none():
    sources = {"law": SourceConfig(), "a": SourceConfig(role="general"), "b": SourceConfig(role="general")}
    assert replay_strata(sources, Strata(math=9.0)) == ({}, [])
    sources["b"].stratum = "safety"
    with pytest.raises(ValueError, match=r"sources\.a\.stratum is not set"):
        weights_at(DataConfig(), sources, 10)
    with pytest.raises(ValueError, match=r"data\.strata\.coding"):
        check_limits(Strata(coding=-1.0), "data.strata.")


# ---- repetition

def test_repeats_are_warned_of_above_4_and_refused_above_the_cap():
    sources = bucketed(2) | {"wiki": SourceConfig(role="general", max_epochs=30.0)}
    assert judge_epochs({"law/0": 4.0, "law/1": 0.0, "wiki": 1.0}, sources) == ([], [])
    refusals, said = judge_epochs({"law/0": 4.1, "wiki": 29.9}, sources)
    assert refusals == []
    assert [line.partition(" times")[0] for line in said] == ["warning: source law/0 is read 4.1",
                                                              "warning: source wiki is read 29.9"]
    assert judge_epochs({"law/0": 16.0}, sources)[0] == []
    (refusal,), _ = judge_epochs({"law/0": 16.5}, sources)
    assert refusal.startswith("source law/0 would be read 16.5 ")
    assert refusal.endswith(" --data.sources.law.max-epochs 17")
    with pytest.raises(ValueError, match="max_epochs"):
        check_limits(SourceConfig(max_epochs=0.0))


@pytest.mark.parametrize("wrong", [{"anneal_share": 1.2}, {"anneal_ratio": 0.0}, {"gradual_steps": 0}])
def test_settings_out_of_range_are_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        check_limits(DataConfig(**wrong))


# ---- the preview

def test_measured_shares_are_the_counts(tmp_path):
    config, sources = DataConfig(schedule="staged"), bucketed(4)
    counts = make_plan(config, LengthConfig(steps=100, batch_size=10), sources, {})
    rows = measure_shares(config, sources, counts, 10)
    assert [(r["first_step"], r["last_step"]) for r in rows] == [(10 * i, 10 * i + 9) for i in range(10)]
    for row in rows:
        taken = counts[row["last_step"] + 1] - counts[row["first_step"]]
        assert [row["sources"][name] for name in sources] == (taken / 100).tolist()
        assert row["domain"] == pytest.approx(1 - taken[-1] / 100)
        assert abs(row["wanted"] - row["domain"]) < 0.02
    assert [round(rows[i]["wanted"], 3) for i in (0, 1, 2, 3, 9)] == [0.21, 0.42, 0.42, 0.7, 0.7]
    assert [len(measure_shares(config, sources, counts[:n + 1], 10)) for n in (1, 3, 10)] == [1, 3, 10]
    # Names are the user's: this one is no formula.
    for row in rows:
        row["sources"]["$\\foo{$"] = row["sources"].pop("wiki")
    sources["$\\foo{$"] = sources.pop("wiki")
    draw_shares(tmp_path / "mix.png", "title", sources, rows)
    assert (tmp_path / "mix.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
