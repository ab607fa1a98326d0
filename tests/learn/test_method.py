"""Laws: a method that overrides nothing changes nothing; sequences taken from a batch are those sequences."""

import torch
from retention import bits, learning, some_batch, step_of, toy

from learn.method import Method, take_sequences, upcast_dtype


def test_a_method_that_overrides_nothing_changes_nothing():
    states = []
    for methods in ([], [Method(None, learning())]):
        model = toy(blocks=2, dtype=torch.float32)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for method in methods:
            method.model_built(model)
        assert [step_of(model, optimizer, methods, step, some_batch(step)) for step in range(2)] == [{}, {}]
        states.append(bits(model))
    assert all(torch.equal(value, states[0][name]) for name, value in states[1].items())
    method, = methods
    assert method.evaluated(0, {}) is None
    assert method.state() == ({}, {})
    with method.exported(model):
        assert all(torch.equal(value, states[1][name]) for name, value in bits(model).items())


def test_taken_sequences():
    batch = some_batch(rows=4)
    for rows in ([2, 0], slice(1, 3)):
        part = take_sequences(batch, rows)
        assert torch.equal(part.tokens, batch.tokens[rows])
        assert torch.equal(part.labels, batch.labels[rows])
        assert part.source.tolist() == batch.source[rows].tolist()


def test_arithmetic_is_in_fp32_or_wider():
    found = [upcast_dtype(torch.zeros(1, dtype=dtype)) for dtype in (torch.bfloat16, torch.float32, torch.float64)]
    assert found == [torch.float32, torch.float32, torch.float64]
