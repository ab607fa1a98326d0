"""Truth: a loop in float64. Law: what is resumed goes on with its bits."""

import contextlib

import torch
from retention import bits, methods, some_batch, step_of, toy

from learn.ema import EMAConfig


def test_ema_is_a_loop_and_resumes_with_its_bits():
    model = toy(blocks=2, dtype=torch.float32)
    model.embed_tokens.weight.requires_grad_(False)
    ema, = methods(built=model, ema=EMAConfig(0.9))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    mean = {name: p.double() for name, p in bits(model).items()}
    for step in range(6):
        if step == 3:
            stored = {name: value.clone() for name, value in ema.state()[0].items()}
            resumed, = methods(built=toy(1, blocks=2, dtype=torch.float32), ema=EMAConfig(0.9))
            resumed.load_state({name: stored.get(name, torch.zeros(11, 6)) for name in resumed.mean}, {})
        step_of(model, optimizer, [ema], step, some_batch(step))
        if step >= 3:
            resumed.after_step(step, model, optimizer)
        mean = {name: 0.9 * mean[name] + 0.1 * p.double() for name, p in bits(model).items()}
    assert set(ema.mean) == set(mean) - {"embed_tokens.weight"}
    for name, value in ema.mean.items():
        torch.testing.assert_close(value.double(), mean[name], rtol=1e-6, atol=1e-7)
        assert torch.equal(value, resumed.mean[name])
    before = bits(model)
    with contextlib.suppress(KeyError), ema.exported(model) as averaged:
        assert averaged is model
        assert torch.equal(model.head.weight, ema.mean["head.weight"])
        raise KeyError("also after an error")
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
