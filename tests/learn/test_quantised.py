"""Weights in few bits: quantised layers against plain ones of their dequantised weights, brute force over the levels,
arithmetic, and a base that is read tensor by tensor against one that is quantised when it is there."""

import pytest
import torch
import torch.nn.functional as F
from adapter_models import EXACT, adapted, close, logits, loss_of, stir, tokens, trained

import hf
import lora
from learn import adapters
from lora import LoraConfig
from model import Model

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
        for path, layer in adapters.adapted_layers(model):
            if layer.quantised is not None:
                plain.get_parameter(f"{path}.weight").copy_(layer.base_weight())
    assert sum(layer.quantised is not None for _, layer in adapters.adapted_layers(model)) == 21
    base_logits = logits(plain, x).detach()
    config.base = "plain"
    lora.attach(plain, config, 0)
    with adapters.disabled(model):
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
    size = sum(tensor.nbytes for name, tensor in model.state_dict().items() if ".quantised." in name)
    tables = 0 if base == "int8" else 2 * (64 + double * (1024 + 4))
    assert size == 2 * 512 * 1024 * bits / 8 + tables
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * (512 + 1024)
    assert "3,072 of 1,048,576 parameters trained (0.29 %)" in lora.trainable_share(model)


def test_rounding_is_to_the_nearest_of_the_levels():
    """Half a step of the grid at most, by brute force over the levels, and zeros stay zero."""
    weight = torch.randn(7, 100, generator=torch.Generator().manual_seed(0))
    weight[2] = 0
    layer = torch.nn.Linear(100, 7)
    layer.weight.data = weight
    kept = {}
    for how in ("int8", "int4"):
        new = adapters.Linear(layer)
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


@pytest.mark.parametrize("kind", ["nf4", "int4", "int8"])
def test_a_base_in_few_bits_is_read_tensor_by_tensor(tiny_model, tmp_path, kind):
    """From shapes alone, as a run builds it: the same in every bit as plain weights that are quantised afterwards."""
    hf.save(tiny_model(), tmp_path / "base")
    config = LoraConfig(rank=2, base=kind, dora=True)
    truth = hf.load(tmp_path / "base")
    lora.attach(truth, config, 7)
    with torch.device("meta"):
        model = Model(truth.config)
        lora.attach(model, config, 7)
    model.to_empty(device="cpu").tie()
    hf.fill(model, tmp_path / "base")
    lora.initialise(model, 7)
    assert any(".quantised." in name for name in truth.state_dict())
    assert model.state_dict().keys() == truth.state_dict().keys()
    for name, tensor in truth.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert adapters.count_elements(model) == adapters.count_elements(truth)
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in truth.parameters()]
