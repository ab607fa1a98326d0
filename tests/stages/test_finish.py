"""stages/finish.py: what a run leaves is what it trained, also where it died on the way."""


import pytest
import torch
from runs import one, run_of

import hf
import lora
import train
from core import checkpoint
from learn.peft_files import load_adapter

pytestmark = pytest.mark.usefixtures("quick")


METHODS = {
    "lora": ["--lora.rank", 4, "--lora.dropout", 0.1],
    "dora": ["--lora.rank", 4, "--lora.dora", "--lora.rslora", "--lora.b-lr-ratio", 4],
    "lora_rows": ["--lora.rank", 4, "--lora.embeddings", "rows", "--lora.embedding-rows", "290:"],
    "lora_full": ["--lora.rank", 4, "--lora.embeddings", "full", "--model.activation-checkpointing"],
    "qlora": ["--lora.rank", 4, "--lora.base", "nf4", "--optim.name", "adamw_8bit"],
    "int8": ["--lora.rank", 4, "--lora.base", "int8", "--train.precision", "bf16"],
    "merge": ["--forget.merge.method", "linear", "--forget.merge.alphas", 0.0, 0.5, 1.0],
}


def merged_with(base, out) -> dict:
    """The adapter that a run left, on its base, as one state."""
    model = hf.load(base)
    load_adapter(model, out / "adapter")
    lora.merge(model)
    return dict(model.named_parameters())


@pytest.mark.parametrize("name", [name for name in METHODS if name != "merge"])
def test_the_adapter_on_its_base_is_the_exported_model(base, tmp_path, name):
    out = tmp_path / "run"
    train.train(run_of(base, out, *METHODS[name]), one())
    exported, merged, plain = hf.load(out / "final"), merged_with(base[1], out), hf.load(base[1])
    moved = 0
    for key, weight in exported.named_parameters():
        assert torch.allclose(weight, merged[key].float(), rtol=0, atol=1e-2 if name == "int8" else 1e-6), key
        moved += not torch.equal(weight, plain.get_parameter(key))
    assert moved >= 14                                     # seven matrices in each of two blocks
    tensors = checkpoint.load(checkpoint.path_of(out / "checkpoints", 8))[0]
    assert tensors
    assert all(".adapters." in key for key in tensors)     # the base is where it was


def test_a_run_that_died_between_its_export_and_its_last_file_is_finished(base, tmp_path):
    out, words = tmp_path / "run", METHODS["merge"]
    train.train(run_of(base, out, *words), one())
    whole = (out / "eval.json").read_bytes(), (out / "final/model.safetensors").read_bytes()
    (out / "eval.json").unlink()
    assert train.train(run_of(base, out, *words), one()) == 0
    assert whole == ((out / "eval.json").read_bytes(), (out / "final/model.safetensors").read_bytes())
    with pytest.raises(ValueError, match="holds a finished run"):
        train.train(run_of(base, out, *words), one())
