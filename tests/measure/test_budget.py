"""What a run costs. Truth: hand-worked examples."""

import pytest

from core.errors import UserError
from measure import budget


def test_a_gpu_is_found_by_its_name():
    assert budget.find_gpu("h100") is budget.GPUS["H100"]
    assert budget.find_gpu("cpu").kind == "cpu"
    with pytest.raises(UserError, match="known are B200"):
        budget.find_gpu("H1000x")
