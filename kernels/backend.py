"""How an op reaches its kernel: which backend runs, how a kernel is launched, what torch.compile sees.

    NANOCPT_KERNELS=            Triton on CUDA, the plain-PyTorch reference elsewhere
    NANOCPT_KERNELS=reference   the reference everywhere
    NANOCPT_KERNELS=triton      Triton everywhere; on a CPU that needs TRITON_INTERPRET=1 as well: Triton's interpreter
                                runs the kernels in numpy, slowly, but by the same lines
"""

import functools
import os
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import torch

from core.errors import UserError

try:
    import triton
    import triton.language as tl
except ImportError:
    # There are no wheels for macOS and Windows: the references are the product there.
    triton, tl = None, SimpleNamespace(constexpr=object)

jit = triton.jit if triton else lambda kernel: kernel
interpreting = triton is not None and triton.knobs.runtime.interpret      # TRITON_INTERPRET=1
choice = os.environ.get("NANOCPT_KERNELS", "")
# Takes launches instead of a device: for torch.compile's fake tensors, and for the static check.
receiver = None
get_properties = functools.cache(torch.cuda.get_device_properties)


@contextmanager
def using(name: str | None = None, send_to=None):
    """Inside, force a backend, `reference` or `triton`; give launches to send_to(kernel, grid, args, options)."""
    global choice, receiver
    before = choice, receiver
    choice = choice if name is None else name
    receiver = receiver if send_to is None else send_to
    try:
        yield
    finally:
        choice, receiver = before


def use_triton(x: torch.Tensor) -> bool:
    """Whether an op on x runs its Triton kernel. float64 never does: the kernels compute in fp32."""
    if choice == "reference" or x.dtype == torch.float64:
        return False
    if choice not in ("", "reference", "triton"):
        raise UserError(f"NANOCPT_KERNELS is {choice!r}; it may be reference, triton or empty")
    if choice == "" or x.device.type == "cuda":
        return x.device.type == "cuda" and triton is not None
    if triton is None:
        raise UserError("NANOCPT_KERNELS=triton, but Triton is not installed; it comes for Linux only")
    if x.device.type == "cpu" and not interpreting and receiver is None:
        raise UserError("NANOCPT_KERNELS=triton on a CPU needs TRITON_INTERPRET=1 (Triton's interpreter, slow)")
    return True


def launch(kernel, grid: tuple, *args, **options):
    """kernel[grid](*args, **options) on the device of its first argument; an empty grid launches nothing."""
    if receiver is not None and 0 not in grid:
        receiver(kernel, grid, args, options)
    elif 0 not in grid:
        with torch.cuda.device_of(args[0]):
            kernel[grid](*args, **options)


def op(function):
    """What the autograd functions call: the Python function in eager mode, a registered op under torch.compile.

    Calling through torch's dispatcher costs several microseconds, as much as a small kernel. Only the compiler needs
    it: it then sees one opaque node and learns the shapes of its outputs by running `function` without its launches.
    function's annotations are its schema (torch.library.custom_op); it writes to no input and returns no view of one.
    A file that is loaded once more under another name (a test's copy) stays plain: registering the name again would
    free the op behind those who hold it.
    """
    if not function.__module__.startswith("kernels."):
        return function
    registered = torch.library.custom_op(f"nanocpt::{function.__name__}", function, mutates_args=())

    @registered.register_fake
    def _(*args):
        with using(send_to=lambda *launched: None):
            return function(*args)

    @functools.wraps(function)
    def call(*args):
        return registered(*args) if torch.compiler.is_compiling() else function(*args)
    return call


def architecture(device: torch.device) -> int:
    """A CUDA device's compute capability, as 80, 90, 100, ...; in the static check that of the card it compiles for."""
    if device.type == "cuda":
        return 10 * get_properties(device).major + get_properties(device).minor
    return getattr(receiver, "architecture", 90)


def multiprocessors(device: torch.device) -> int:
    """How many the device has; few in the interpreter, so that small inputs give every program several turns."""
    if device.type == "cuda":
        return get_properties(device).multi_processor_count
    return 132 if receiver else 2


def table(by_architecture: dict, device: torch.device):
    """The entry for the newest architecture that is not newer than the device's, else for the oldest one."""
    mine = architecture(device)
    return by_architecture[max((a for a in by_architecture if a <= mine), default=min(by_architecture))]


def autocast_dtype(x: torch.Tensor) -> torch.dtype | None:
    """Autocast's dtype where it is on for x, else None. It leaves float64 alone and does not know meta tensors."""
    kind = x.device.type
    on = kind != "meta" and x.dtype != torch.float64 and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if on else None


def without_autocast(x: torch.Tensor):
    """A context in which operations on x keep its dtype."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def power_of_two(n: int) -> int:
    """The smallest power of two that is not below n."""
    return 1 << max(0, n - 1).bit_length()


def contiguous_heads(x: torch.Tensor) -> torch.Tensor:
    """x [B, T, H, d] itself where the elements of each head lie side by side, else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()
