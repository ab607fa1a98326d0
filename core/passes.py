"""Both passes of all micro-batches of a step: one after the other, or by the schedule of a pipeline."""

import contextlib
from collections.abc import Callable

from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from core.parallel import World
from core.pipeline import Pipeline
from core.tensor_parallel import sum_over_tokens


def both_passes(model, world: World, batches: list, score: Callable, factor: float) -> list[tuple]:
    """[(batch.source, metrics)] of each micro-batch; gradients are of their losses times `factor`.

    model: the model, DDP around it, or a pipeline. score(batch) -> (loss, metrics); a pipeline has the hidden states
    already and calls score(batch, hidden).
    """
    batches, scored = [batch.to(world.device) for batch in batches], []
    if isinstance(model, Pipeline):
        with world.sharing():
            scored = model.run(batches, score, factor)
        sum_shared(model.model, world)
        return scored
    for i, batch in enumerate(batches):
        with accumulate(model, world, last=i == len(batches) - 1):
            loss, metrics = score(batch)
            scored.append((batch.source, metrics))
            (loss * factor).backward()
    return scored


@contextlib.contextmanager
def accumulate(model, world: World, last: bool):
    """The context of a micro-batch's two passes: gradients go between ranks only for the `last` one of a step, unless
    world.reduces_each. Until they do, FSDP has those of all weights on the device, which has no room for them where
    they are to be offloaded. (The schedules of a pipeline always wait for the last one.)"""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last or world.reduces_each or world.offload)
    waits = isinstance(model, DistributedDataParallel) and not last
    with model.no_sync() if waits else contextlib.nullcontext(), world.sharing():
        yield
    if last:
        sum_shared(model, world)


def sum_shared(model, world: World):
    """Complete the gradients of which ranks that share matmuls have a part each."""
    if world.matmuls:
        sum_over_tokens(model, world.matmuls)
