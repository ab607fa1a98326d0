"""core/passes.py: gradients of micro-batches add up, by hand. Under DDP, FSDP, shared matmuls and in a pipeline that is
in test_parallel.py, test_layouts.py and test_pipeline.py."""

from types import SimpleNamespace

import torch
from runs import one
from torch import nn

from core.passes import both_passes


def test_micro_batches_add_up():
    w, seen = nn.Parameter(torch.tensor([2.0, 3.0])), []

    def score(batch):
        # The graph of the micro-batch before is gone by then.
        seen.append(None if w.grad is None else w.grad.tolist())
        return (w * batch.x).sum(), {"x": batch.x}

    batches = [SimpleNamespace(x=torch.tensor([1.0, 10.0 * i]), source=i) for i in (1, 2)]
    for batch in batches:
        batch.to = lambda device, batch=batch: batch
    scored = both_passes(nn.Module(), one(), batches, score, 0.5)
    assert [source for source, _ in scored] == [1, 2]
    assert [metrics["x"].tolist() for _, metrics in scored] == [[1, 10], [1, 20]]
    assert w.grad.tolist() == [0.5 * 2, 0.5 * 30]
    assert seen == [None, [0.5, 5]]
