"""A GPU that is not there: each tensor has a device, a shape and no values, and an operation that mixes devices fails
as on a real one. The process that runs this file is rank 0 of two that nobody sees, trains and scores models whose
weights are kept in the host's memory, and prints where everything lies, as JSON.

torch.utils.backend_registration makes the device, FakeTensorMode the tensors, and the backend `fake` the ranks.
"""

import contextlib
import dataclasses
import json
import sys
import types
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from runs import settings
from torch._subclasses.fake_impls import op_implementations_dict
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils import backend_registration

import hf
import train
from core import checkpoint, mesh, parallel, sharding
from learn import distance
from measure import likelihoods, scoring
from stages.build import build
from stages.resume import make_moments, state_tensors

aten = torch.ops.aten


class Nothing:
    """A stream, or an event."""

    def __init__(self, *args, **options):
        pass

    def __getattr__(self, name):
        return lambda *args, **options: Nothing()


class Backend(backend_registration._DummyBackendModule):
    Stream = Event = Nothing
    is_available = is_initialized = lambda self: True
    device_count, current_device = lambda self: 1, lambda self: 0
    current_stream = default_stream = lambda self, *args: Nothing()
    set_device = synchronize = lambda self, *args: None

    def stream(self, stream):
        return contextlib.nullcontext()

    def get_amp_supported_dtype(self):
        return [torch.bfloat16]


def make_zeros(shape):
    return [make_zeros(shape[1:]) for _ in range(shape[0])] if shape else 0.0


@contextlib.contextmanager
def pretending():
    """A context in which the host reads 1 from each tensor, or a list of zeros, and what it makes holds nothing."""
    def make_tensor(values, dtype=None, device=None):
        kind = torch.from_numpy(np.zeros(0, np.asarray(values).dtype)).dtype
        return torch.zeros(np.shape(values), dtype=dtype or kind, device=device)

    def make_batches(*args, real=scoring.make_batches, tensor=torch.tensor):
        with unset_fake_temporarily() as mode, mock.patch.object(torch, "tensor", tensor):
            made = real(*args)
        return [(dataclasses.replace(batch, **{name: mode.from_tensor(x) for name, x in vars(batch).items()
                                               if isinstance(x, torch.Tensor)}), mode.from_tensor(owner))
                for batch, owner in made]

    def shard(*args, real=parallel.shard):
        # Modules cannot be made of such tensors; before they are sharded they are on the meta device.
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        return real(*args)
    with contextlib.ExitStack() as stack:
        for patch in (
                mock.patch.dict(op_implementations_dict, {
                    aten._local_scalar_dense.default: lambda mode, op, x: 1.0 if x.is_floating_point() else 1,
                    aten.nonzero.default: lambda mode, op, x: x.new_zeros(1, x.ndim, dtype=torch.int64)}),
                mock.patch.object(FakeTensor, "tolist", lambda x: make_zeros(x.shape)),
                mock.patch.object(parallel.World, "sum", lambda world, values: [0.0 for _ in values]),
                mock.patch.object(hf, "read_tensor", lambda name, file, shape, dtype: torch.zeros(shape, dtype=dtype)),
                mock.patch.object(torch, "tensor", make_tensor), mock.patch.object(parallel, "shard", shard),
                mock.patch.object(scoring, "make_batches", make_batches)):
            stack.enter_context(patch)
        yield


def use(c, world) -> dict[str, list[str]]:
    """{what: on which devices it lies} of a run that makes a step, saves, scores and answers."""
    run = build(c, world)
    model = run.inner
    train.train_step(run, 0, train.micro_batches(run, 0))
    # A step leaves no gradients behind.
    loss, _ = train.score(run, train.micro_batches(run, 1)[0].to(world.device))
    loss.backward()
    moments = sharding.optimizer_state(model, run.optimizer, torch.Tensor.detach)
    tensors, gradients = state_tensors(run) | moments, [p.grad for p in model.parameters() if p.requires_grad]
    stored = types.SimpleNamespace(known={f"state/{name}": (x.shape, x.dtype) for name, x in moments.items()})
    checkpoint.Shards(tensors, world)
    found = {"weights": model.parameters(), "gradients": gradients, "state": tensors.values(),
             "read": make_moments(run, stored, None).values(), "exported": sharding.model_state(model).values(),
             "buffers": model.buffers(), "loss": [loss]}
    found = {name: sorted({tensor.device.type for tensor in some}) for name, some in found.items()}
    scoring.score(model, run.objective, [(np.arange(40, dtype=np.int32), 100)], 1, 32, world, autocast=run.autocast)
    scorer = likelihoods.Scorer(model, 1)
    found["logits"] = [scorer.logits(scorer.compute([[1, 2, 3]])).device.type]
    if run.base:
        distance.measure_distance(model, run.base, world)
    return found


def as_rank(lab: Path, cases: dict[str, list]) -> dict:
    backend_registration._setup_privateuseone_for_python_backend("gpu", backend_module=Backend())
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    world, found = parallel.World(0, 2, torch.device("gpu", 0)), {}
    for name, words in cases.items():
        c = settings(lab, "unused", *words)
        world.share_sequences(c.parallel)
        mesh.lay_ranks("gpu", 2, c.parallel)
        with pretending():
            found[name] = use(c, world)
    return found


if __name__ == "__main__":
    print(json.dumps(as_rank(Path(sys.argv[1]), json.loads(sys.argv[2]))))
