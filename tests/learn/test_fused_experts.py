"""Adapters on experts against PEFT, both ways: its names with transformers 5, which fuse gate and up projection, and
those with transformers 4, a layer per expert. Logits, gradients, merging, and what is refused.

Tolerance: fp32 sums in another order, 1e-5 of the largest value.
"""

import pytest
import torch
from adapter_models import EXACT, adapted, close, edit_json, logits, loss_of, stir, tokens, train_some
from safetensors.torch import load_file, save_file

import hf
import lora
from core.errors import UserError
from core.parameter_names import split_experts
from learn.peft_files import load_adapter, peft_names, save_adapter
from lora import LoraConfig

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:.*gradient_checkpointing")]

CASES = {"mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
         "qwen3_moe": {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "head_dim": 16}}
SMALL = {"num_hidden_layers": 2}


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("family", CASES)
def test_what_is_trained_here_is_the_same_in_peft(hf_model, peft, tmp_path, family, rslora):
    """Step 0 is the base; then PEFT's logits, and its gradient of every adapter, from our file."""
    transformers_model, base = hf_model(family, **CASES[family], **SMALL)
    x = tokens()
    model = adapted(lambda: hf.load(base).eval(), LoraConfig(rank=4, alpha=8, rslora=rslora))
    assert "router of the experts is frozen" in lora.trainable_share(model)
    with torch.no_grad():
        start = logits(model, x)
        assert torch.equal(start, logits(hf.load(base), x))
    before = {name: p.clone() for name, p in model.named_parameters()}
    train_some(model, x)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if ".adapters." in name}
    save_adapter(model, tmp_path / "adapter", str(base))
    theirs = peft.PeftModel.from_pretrained(transformers_model, tmp_path / "adapter", is_trainable=True)
    scores, truth = logits(model, x), theirs(x).logits
    assert not close(scores, start, 0.01)
    assert close(scores, truth)
    loss_of(scores, x).backward()
    loss_of(truth, x).backward()
    gradients = split_experts({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    mine = {peft_names(model)[name]: gradient for name, gradient in gradients.items()}
    compared = 0
    for name, p in theirs.named_parameters():
        if p.grad is not None and ".experts." not in name:
            assert close(mine[name.replace(".default", "")], p.grad, 3 * EXACT), name
            compared += 1
    E = model.config.num_experts
    for i, block in enumerate(model.layers):
        outer, own = theirs.base_model.model.model.layers[i].mlp.experts, block.mlp.experts
        for wrapper, layers in ((outer, [own.down_proj]), (outer.base_layer, [own.gate_proj, own.up_proj])):
            a, b = wrapper.lora_A["default"].weight.grad, wrapper.lora_B["default"].weight.grad
            a, b = a.view(E, -1, a.shape[1]), b.view(len(b), -1, E).permute(2, 0, 1)
            n = len(layers)
            for k, layer in enumerate(layers):
                assert close(layer.adapter.A.grad, a.chunk(n, 1)[k], 3 * EXACT)
                # The gradients beside the diagonal are of PEFT's zeros, which training there would fill.
                assert close(layer.adapter.B.grad, b.chunk(n, 1)[k].chunk(n, 2)[k], 3 * EXACT)
                compared += 1
    assert compared == 2 * (4 * 2 + 3)
    with torch.no_grad():
        lora.merge(model)
        assert close(logits(model, x), truth)


@pytest.mark.parametrize(("family", "targets"), [("mixtral", ["gate_up_proj", "down_proj"]), ("mixtral", ["down_proj"]),
                                                 ("qwen3_moe", ["gate_up_proj"])])
def test_what_peft_saves_is_the_same_here(hf_model, peft, tmp_path, family, targets):
    transformers_model, base = hf_model(family, **CASES[family], **SMALL)
    x = tokens()
    theirs = peft.get_peft_model(transformers_model, peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=["q_proj"], target_parameters=targets, task_type="CAUSAL_LM",
        alpha_pattern={"gate_up_proj": 7})).eval()
    stir(theirs.parameters())
    theirs.save_pretrained(tmp_path / "theirs")
    model = hf.load(base).eval()
    load_adapter(model, tmp_path / "theirs")
    with torch.no_grad():
        assert close(logits(model, x), theirs(x).logits)
        save_adapter(model, tmp_path / "ours", str(base))
        again = hf.load(base).eval()
        load_adapter(again, tmp_path / "ours")
        assert torch.equal(logits(again, x), logits(model, x))
        result = lora.merge_folders(base, tmp_path / "theirs", tmp_path / "merged")
        assert result["largest_logit_difference"] < 1e-4
        assert close(logits(hf.load(tmp_path / "merged"), x), theirs.merge_and_unload()(x).logits)


def test_dora_and_dropout_of_experts(hf_model):
    """DoRA begins as the base; merged, it computes the same. Dropout leaves what it does not drop."""
    x, base = tokens(), hf_model("mixtral", **CASES["mixtral"], **SMALL)[1]
    model = adapted(lambda: hf.load(base).eval(), LoraConfig(rank=4, dora=True, targets=["*.experts.*"]))
    with torch.no_grad():
        assert close(logits(model, x), logits(hf.load(base), x))
        stir(model.parameters())
        scores = logits(model, x)
        lora.merge(model)
        assert close(logits(model, x), scores)
        assert not close(scores, logits(hf.load(base), x), 0.01)
    model = adapted(lambda: hf.load(base), LoraConfig(rank=4, dropout=0.5, targets=["up_proj"]))
    stir(model.parameters())
    torch.manual_seed(0)
    mean = torch.stack([logits(model.train(), x).detach() for _ in range(40)]).mean(0)
    with torch.no_grad():
        assert not torch.equal(logits(model, x), logits(model, x))
        assert close(mean, logits(model.eval(), x), 0.3)


def test_files_that_fit_nothing_are_refused(hf_model, peft, tmp_path):
    transformers_model, base = hf_model("mixtral", **CASES["mixtral"], **SMALL)
    theirs = peft.get_peft_model(transformers_model, peft.LoraConfig(
        r=3, target_modules=[], target_parameters=["gate_up_proj", "gate.weight"], task_type="CAUSAL_LM"))
    theirs.save_pretrained(tmp_path / "router")
    with pytest.raises(UserError, match=r"target_parameters 'gate.weight'; of parameters only experts are read"):
        load_adapter(hf.load(base), tmp_path / "router")
    model = adapted(lambda: hf.load(base), LoraConfig(rank=4))
    save_adapter(model, tmp_path / "ours", str(base))
    file = tmp_path / "ours/adapter_model.safetensors"
    tensors = load_file(file)
    key = "base_model.model.model.layers.0.block_sparse_moe.experts.2.w1.lora_A.weight"
    assert list(tensors[key].shape) == [4, 32]
    edit_json(tmp_path / "ours/adapter_config.json", rank_pattern={"experts.2.w1": 2})
    beside = key.replace("_A", "_B")
    smaller = {key: tensors[key][:2].clone(), beside: tensors[beside][:, :2].clone()}
    narrow = {key: tensors[key][:, :7].clone()}
    for changed, says in ((smaller, "other experts of its layer"), (narrow, "another base")):
        save_file({**tensors, **changed}, file)
        with pytest.raises(UserError, match=says):
            load_adapter(hf.load(base), tmp_path / "ours")
    save_file(tensors, file)
    edit_json(tmp_path / "ours/adapter_config.json", alpha_pattern={"experts.2.w1": 99})
    with pytest.raises(UserError, match="different alphas"):
        load_adapter(hf.load(base), tmp_path / "ours")
