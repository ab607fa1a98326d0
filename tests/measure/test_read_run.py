"""measure/read_run.py: what of a stranger's file counts; tests/test_report.py reads whole run folders."""

import pytest

from measure.read_run import results_in


def test_a_result_keeps_what_is_as_it_should_be():
    told = {"value": 0.5, "metric": "acc", "direction": "down", "interval": [0.4, 0.6], "chance": 0.25, "n": 8}
    assert results_in({"arc": told}) == {"arc": {
        "value": 0.5, "metric": "acc", "is_up": False, "interval": [0.4, 0.6], "chance": 0.25, "n": 8.0,
        "capability": "other", "shots": None}}


@pytest.mark.parametrize("odd", [None, 3, "x", [1], {"arc": 3}, {"arc": {"value": "x"}}, {"arc": {"value": True}},
                                 {"arc": {"value": float("nan")}}])
def test_what_is_no_result_is_left_out(odd):
    assert results_in(odd) == {}


@pytest.mark.parametrize("odd", [None, 3, [0.1], [0.1, None], ["a", "b"], {"low": 1}])
def test_an_odd_interval_is_unknown(odd):
    assert results_in({"arc": {"value": 1, "interval": odd}})["arc"]["interval"] is None
