"""Which cases of an exhaustive list `make test` runs; `make test-all` runs them all."""

import pytest


def slow_except(quick, cases, arguments: int = 2) -> list:
    """The cases of so many arguments as parameters, those that are not among `quick` marked slow."""
    cases, quick = list(cases), list(quick)
    assert all(case in cases for case in quick), "a quick case is not among the cases"
    return [pytest.param(*(case if arguments > 1 else (case,)), marks=() if case in quick else pytest.mark.slow,
                         id="-".join(str(each) for each in (case if arguments > 1 else (case,)))) for case in cases]
