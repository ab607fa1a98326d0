"""A quantised layer against the plain layer of its dequantised weights, brute force over the levels, and arithmetic."""

import pytest
import torch
import torch.nn.functional as F
from adapter_models import EXACT, adapted, close, logits, loss_of, stir, tokens, trained

import lora
from learn.adapters import Linear, adapted_layers
from lora import LoraConfig

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("base", ["nf4", "int4", "int8"])
def test_a_quantised_layer_is_the_layer_of_its_dequantised_weights(tiny_model, base, dora):
    """Logits and the gradients of adapters and embeddings; with and without an adapter."""
    config = LoraConfig(rank=4, base=base, dora=dora, embeddings="full", targets=["q_proj", "up_proj", "o_proj"])
    biases = {"attention_bias": True, "mlp_bias": True}
    model, x = adapted(lambda: tiny_model(**biases), config), tokens()
    plain = tiny_model(**biases)
    with torch.no_grad():
        for path, layer in adapted_layers(model):
            if layer.quantised is not None:
                plain.get_parameter(f"{path}.weight").copy_(layer.base_weight())
    assert sum(layer.quantised is not None for _, layer in adapted_layers(model)) == 21
    base_logits = logits(plain, x).detach()
    config.base = "plain"
    lora.attach(plain, config, 0)
    with lora.disabled(model):
        assert close(logits(model, x), base_logits)
    for each in (model, plain):
        stir(each.parameters())
        loss_of(logits(each, x), x).backward()
    assert close(logits(model, x), logits(plain, x))
    assert trained(model).keys() == trained(plain).keys()
    for name, p in trained(model).items():
        assert close(p.grad, plain.get_parameter(name).grad, 3 * EXACT), name
    with pytest.raises(ValueError, match=r"python lora\.py merge --base"):
        lora.merge(model)


@pytest.mark.parametrize(("base", "double", "bits"), [
    ("nf4", True, 4 + 8 / 64 + 32 / (64 * 256)), ("int4", True, 4 + 8 / 64 + 32 / (64 * 256)),
    ("nf4", False, 4 + 32 / 64), ("int4", False, 4 + 32 / 64), ("int8", True, 8 + 32 / 512)])
def test_the_memory_of_a_quantised_base_is_what_arithmetic_says(base, double, bits):
    model = torch.nn.ModuleList(torch.nn.Linear(512, 1024, bias=False) for _ in range(2))
    lora.attach(model, LoraConfig(rank=1, base=base, double_quant=double), 0)
    size = sum(buffer.nbytes for buffer in model.buffers())
    tables = 0 if base == "int8" else 2 * (64 + double * (1024 + 4))
    assert size == 2 * 512 * 1024 * bits / 8 + tables
    assert sum(p.numel() for p in model.parameters()) == 2 * (512 + 1024)
    assert "3,072 of 1,048,576 parameters trained (0.29 %)" in lora.trainable_share(model)


def test_rounding_is_to_the_nearest_of_the_levels():
    """Half a step of the grid at most, by brute force over the levels, and zeros stay zero."""
    weight = torch.randn(7, 100, generator=torch.Generator().manual_seed(0))
    weight[2] = 0
    layer = torch.nn.Linear(100, 7)
    layer.weight.data = weight
    kept = {}
    for how in ("int8", "int4"):
        new = Linear(layer)
        new.compress(how, False)
        kept[how] = new.base_weight()
    rows = weight.abs().amax(1, keepdim=True)
    grid = torch.arange(-127, 128) / 127
    nearest = (weight[..., None] - rows[..., None] * grid).abs().amin(-1)
    assert ((kept["int8"] - weight).abs() - nearest).abs().max() < 1e-6
    flat = F.pad(weight.flatten(), (0, -700 % 64)).view(-1, 64)
    grid = flat.abs().amax(1)[:, None] * torch.arange(-7, 8) / 7
    nearest = (flat[..., None] - grid[:, None]).abs().amin(-1).flatten()[:700].view(7, 100)
    assert ((kept["int4"] - weight).abs() - nearest).abs().max() < 1e-6
    assert not kept["int8"][2].any()
    assert not any(kept[how].isnan().any() for how in kept)
