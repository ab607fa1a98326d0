"""The operations worth a hand-written kernel, one file each: maths, reference, Triton, autograd, public op.

The references are plain PyTorch that computes in at least fp32 and is tuned for the CPU, where it is the product; on
CUDA the Triton kernels run (backend.py). `python bench.py kernels --only rmsnorm` compiles and times one of them.
"""

from kernels.adamw import adamw_
from kernels.attention import attention
from kernels.cross_entropy import linear_cross_entropy
from kernels.grouped_mm import grouped_mm
from kernels.linear_kl import linear_kl
from kernels.lora import lora_linear
from kernels.nf4 import NF4, dequantise, quantise
from kernels.rmsnorm import add_rmsnorm, rmsnorm
from kernels.rope import qk_norm_rope, rope
from kernels.swiglu import swiglu

# transformers looks for a package named `kernels`, finds this folder first, and parses its version.
__version__ = "0.0.0"
__all__ = ["NF4", "adamw_", "add_rmsnorm", "attention", "dequantise", "grouped_mm", "linear_cross_entropy",
           "linear_kl", "lora_linear", "qk_norm_rope", "quantise", "rmsnorm", "rope", "swiglu"]
