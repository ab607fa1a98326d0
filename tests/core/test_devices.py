"""Names of devices and types. Truth: torch's own objects."""

import pytest
import torch

from core.devices import pick_device, pick_dtype
from core.errors import UserError


def test_both_spellings_of_a_type():
    assert pick_dtype("bf16") is pick_dtype("bfloat16") is torch.bfloat16
    assert pick_dtype("fp32") is pick_dtype("float32") is torch.float32
    assert pick_dtype("fp16") is pick_dtype("float16") is torch.float16
    with pytest.raises(UserError, match="dtype is 'int3', but must be one of float32"):
        pick_dtype("int3")


def test_devices():
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(UserError, match="device is 'gpu'"):
        pick_device("gpu")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="torch sees no CUDA device"):
            pick_device("cuda")
