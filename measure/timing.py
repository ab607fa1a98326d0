"""Times a kernel's cases on a GPU: beside the reference, torch.compile of it and PyTorch's own op."""

import torch

from kernels import backend
from measure.compile_check import differentiable, run


def device_limits() -> dict:
    """What this GPU reaches: GB/s of a copy (read and written), TFLOP/s of a bf16 matmul of random values."""
    from triton.testing import do_bench
    a, b = (torch.empty(2**30, dtype=torch.uint8, device="cuda").random_() for _ in range(2))
    copy = 2 * a.numel() / do_bench(lambda: b.copy_(a), return_mode="median")
    m = torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda")
    matmul = 2 * 8192**3 / do_bench(lambda: m @ m, return_mode="median")
    return {"copy_gb_per_second": copy / 1e6, "bf16_tflops": matmul / 1e9}


def providers(case) -> dict:
    """{name: op} of what is timed beside each other."""
    made = {"reference": lambda: case.op, "compiled": lambda: torch.compile(case.op, dynamic=False),
            "compiled torch": lambda: torch.compile(case.torch, dynamic=False)}
    own = {"torch": case.torch} if case.torch else {}
    return {"triton": case.op, **{name: made[name]() for name in case.beside}, **own}


def time_case(case, tokens: int, limits: dict, rounds: int = 3) -> list[dict]:
    """Milliseconds of each provider's passes on the GPU, in turn: medians over `rounds` of do_bench's medians.

    A row per pass. `share` is the time an ideal device needs by case.cost at this device's own limits, divided by
    ours. A provider that fails stands in `failed` with its message.
    """
    from torch._functorch import config as functorch_config
    from triton.testing import do_bench
    functorch_config.donated_buffer = False       # a compiled backward pass is timed more than once
    torch._dynamo.reset()                         # cases share their op, and Dynamo compiles at most 8 shapes of one
    torch.manual_seed(0)
    inputs = case.inputs("cuda", torch.bfloat16, tokens)
    trained = any(isinstance(x, torch.Tensor) and x.requires_grad for x in inputs)
    passes = ["step"] if case.one_shot else ["forward", "backward"] if trained else ["forward"]
    calls, memory, failed = {}, {}, {}
    for name, op in providers(case).items():
        own = [x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x
               for x in inputs]
        try:
            with backend.using("triton" if name == "triton" else "reference"):
                calls[name], memory[name] = prepare(op, own, passes)
        except Exception as error:                # a peer's failure must not cost the others their figures
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    rows = []
    for number, which in enumerate(passes):
        times = {name: [] for name in calls}
        for _ in range(rounds):
            for name, made in calls.items():
                with backend.using("triton" if name == "triton" else "reference"):
                    times[name].append(do_bench(made[which], warmup=10, rep=40, return_mode="median"))
        median = {name: sorted(t)[len(t) // 2] for name, t in times.items()}
        bytes_, flops = case.cost(tokens)[:2], case.cost(tokens)[2:]
        moved, done = (sum(bytes_), sum(flops)) if which == "step" else (bytes_[number], flops[number])
        floor = max(moved / limits["copy_gb_per_second"], done / limits["bf16_tflops"] / 1000) / 1e6
        rows.append({"case": case.name, "tokens": tokens, "pass": which, "ms": median, "floor_ms": floor,
                     "share": floor / median["triton"] if "triton" in median else None, "failed": failed,
                     "spread": {name: (max(t) - min(t)) / median[name] for name, t in times.items()},
                     "peak_bytes": memory})
    return rows


def prepare(op, inputs, passes):
    """-> {pass: call to time}, the most bytes that a forward and backward pass hold beside their inputs."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    _, upstream = run(op, inputs)                 # compiles
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    if passes == ["step"]:
        return {"step": lambda: run(op, inputs, upstream)}, peak
    calls = {"forward": lambda: op(*inputs)}
    if "backward" in passes:
        outputs = differentiable(op(*inputs))
        wanted = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]
        calls["backward"] = lambda: torch.autograd.grad(outputs, wanted, upstream, retain_graph=True)
    return calls, peak


def print_times(rows):
    """A line per pass: the share of the device's limit that ours reaches, and everyone's milliseconds."""
    for row in rows:
        times = "  ".join(f"{name} {ms:.3f}" for name, ms in row["ms"].items())
        share = f"{row['share']:4.0%}" if row["share"] is not None else "fail"
        print(f"{row['case']:34} {row['tokens']:6} {row['pass']:8} {share} of the limit   ms: {times}"
              + "".join(f"  {name}: {text}" for name, text in row["failed"].items()), flush=True)
