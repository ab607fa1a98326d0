"""Which layouts of ranks a recipe's training fits in, and which of these to take, by the arithmetic of memory.py.

Layouts are listed from the one whose ranks send least to the one whose ranks send most, as a rule: the first that fits
is advised, and one that offloads where no other does. Which is fastest depends on the network, and only a run says it
(bench.py, metrics.jsonl). How much memory the hosts have nobody asks: what they must hold is said.
"""

from dataclasses import dataclass, replace

from core.architecture import ModelConfig
from core.errors import UserError
from core.parallel import ALONE, ParallelConfig
from measure.memory import count_micro_batches, estimate
from stages.refuse import refuse_batch, refuse_pipeline, refuse_sharing

# GPUs of a node, within which ranks share matmuls.
NODE = 8
# What of a device's memory may be planned with: an allocator cannot use all of it.
USABLE = 0.95


@dataclass(frozen=True)
class Layout:
    parallel: ParallelConfig
    parts: dict[str, float]
    fits: bool
    gpus: int

    @property
    def name(self) -> str:
        return name_layout(self.parallel)

    @property
    def host(self) -> str:
        """What the hosts must hold, where anything is offloaded."""
        size, n = self.parts["host"] / 1e9, min(self.gpus, NODE)
        more = f", {size * n:,.1f} GB for the {n} of a node" if n > 1 else ""
        return f"{size:,.1f} GB of the host's memory for each GPU{more}" if size else ""


def name_layout(parallel: ParallelConfig) -> str:
    """The settings of a layout that are not the default ones, as in "fsdp, tensor 8"."""
    found = [f"{name} {value}" for name in ("replicas", "context", "tensor", "pipeline", "experts")
             if (value := getattr(parallel, name)) > 1]
    found += [parallel.schedule] if parallel.pipeline > 1 else []
    found += [name for name in ("reduce_each", "offload") if getattr(parallel, name)]
    found += [] if parallel.reshard else ["reshard False"]
    return ", ".join([parallel.strategy, *found])


def list_layouts(own: ParallelConfig, config: ModelConfig, gpus: int) -> list[ParallelConfig]:
    """The layouts to try on so many GPUs, the recipe's own first."""
    plain = replace(ALONE, step_timeout=own.step_timeout, timeout=own.timeout)
    nodes, within = gpus // NODE, [n for n in (2, 4, 8) if n <= min(gpus, NODE)]
    fsdp = replace(plain, strategy="fsdp")
    shards = [replace(fsdp, replicas=nodes), fsdp] if nodes > 1 else [fsdp]
    shards += [replace(each, reduce_each=True) for each in shards]
    shards += [replace(fsdp, experts=n, reduce_each=True) for n in within if config.num_experts]
    shards += [replace(fsdp, tensor=t, reduce_each=True) for t in within]
    # Stages are nodes, or parts of one.
    most = max(nodes, min(gpus, NODE))
    pipes = [P for P in (2, 4, 8, 16) if most >= P]
    shards += [replace(fsdp, pipeline=P, tensor=t) for t in (1, *within[-1:]) for P in pipes]
    found = [own, plain, *(shards if gpus > 1 else []), replace(fsdp, offload=True)]
    return list({name_layout(each): each for each in found}.values())


def try_layouts(c, config: ModelConfig, gpus: int, memory: float, overhead: float, kind: str) -> list[Layout]:
    """Those that the settings allow, with the memory of their fullest rank; the first is the recipe's own."""
    found = {}
    for parallel in list_layouts(c.parallel, config, gpus):
        if found and count_micro_batches(replace(c, parallel=parallel), gpus)[1] == 1:
            # It makes no difference when gradients are summed.
            parallel = replace(parallel, reduce_each=False)
        tried = replace(c, parallel=parallel)
        try:
            parallel.refuse_layout(gpus)
            refuse_batch(tried, gpus)
            refuse_sharing(tried, config)
            refuse_pipeline(tried, config, gpus)
        except UserError:
            if not found:
                raise
            continue
        parts = estimate(tried, config, gpus, kind)
        found.setdefault(name_layout(parallel), Layout(parallel, parts, parts["peak"] + overhead <= USABLE * memory,
                                                       gpus))
    return list(found.values())


def describe_layouts(layouts: list[Layout], overhead: float) -> str:
    """A table, and which one is advised."""
    width = max(len(layout.name) for layout in layouts)
    columns = ("weights", "gradients", "optimizer", "gathered", "activations", "peak")
    lines = [" ".join([f"{'GB on each device':{width}}", *(f"{name:>11}" for name in columns), "  fits"])]
    for layout in layouts:
        sizes = [layout.parts[name] + (overhead if name == "peak" else 0) for name in columns]
        lines.append(" ".join([f"{layout.name:{width}}", *(f"{size / 1e9:11.1f}" for size in sizes),
                               ("  yes" if layout.fits else "  no") + (layout.host and f", with {layout.host}")]))
    best = advise(layouts)
    condition = f", if there are {best.host}" if best and best.host else ""
    return "\n".join([*lines, f"advised: {best.name}{condition}" if best else "none of them fits"])


def advise(layouts: list[Layout]) -> Layout | None:
    """The first that fits, the recipe's own if it does; one that offloads only where all that fit do."""
    return min((layout for layout in layouts if layout.fits), key=lambda layout: bool(layout.host), default=None)
