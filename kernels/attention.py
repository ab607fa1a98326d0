"""Attention over one contiguous interval of keys per query.

A causal mask, a sliding window and packed documents all leave each query one interval [first, last] of keys:
    last  = its own position i when causal, else the end of its document; with a window at most i + w - 1
    first = the start of its document; with a window of w tokens at least i - w + 1

    Example: documents of 3 and 2 tokens (doc_start 0 0 0 3 3), causal. The queries 0 to 4 see the keys
    0..0, 0..1, 0..2, 3..3, 3..4. With a window of 2: 0..0, 0..1, 1..2, 3..3, 3..4.

On the CPU packed sequences are split into their documents and each document attends alone, so that the cost follows the
documents' lengths; on CUDA the kernels of flash.py visit only the tiles that an interval touches. Neither makes a T x T
mask of a packed sequence. A sequence that is one document goes to PyTorch's own kernels, unless NANOCPT_KERNELS=triton
(backend.py) sends every call to flash.py. Those are deterministic under torch.use_deterministic_algorithms(True),
flash.py always.

B sequences, T queries, S keys, H heads, K key-value heads, d head size. With P pairs of a query and a key that it sees,
4 H d P operations forward (two matmuls), 10 H d P backward (five; flash.py does seven). An ideal device reads q, k, v
and writes o; backward it reads q, k, v, o, do and writes dq, dk, dv.
"""

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels import backend
from kernels.backend import use_triton
from kernels.flash import Flash

# On Hopper cuDNN's kernel is about twice as fast as the FlashAttention-2 that PyTorch would choose
# (github.com/pytorch/pytorch/issues/142132).
HOPPER_FIRST = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION,
                SDPBackend.MATH]
LARGEST_HEAD = 256                # of flash.py


def interval_mask(queries: int, keys: int, causal: bool, window: int | None, doc_start=None, device=None, past=None):
    """Boolean [queries, keys], or [B, 1, queries, keys] with doc_start [B, keys]; True where the query sees the key.

    past: how many keys stand before the first query's own; None: the last query is aligned with the last key, as when
    decoding with a cache.
    """
    past = keys - queries if past is None else past
    key = torch.arange(keys, device=device)
    query = torch.arange(past, past + queries, device=device)[:, None]
    mask = key <= query if causal else torch.ones(queries, keys, dtype=torch.bool, device=device)
    if window is not None:
        mask &= key > query - window
        mask &= causal | (key < query + window)
    if doc_start is not None:
        mask = mask & (doc_start[:, None, past:past + queries, None] == doc_start[:, None, None, :])
    return mask


# ---- PyTorch's scaled_dot_product_attention: the reference, and the fastest for sequences that are one document

def _sdpa(q, k, v, causal, window, doc_start=None, past=None):
    """q [B, T, H, d], k and v [B, S, K, d] -> [B, T, H, d]; a dense mask keeps documents apart."""
    queries, keys = q.shape[1], k.shape[1]
    if q.is_cuda and q.dtype == torch.float32:
        # The only fused kernel for fp32 needs as many key-value heads as heads.
        k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    window = None if window is None or window >= keys else window
    mask = None
    if window is not None or doc_start is not None or (causal and 1 < queries < keys):
        mask = interval_mask(queries, keys, causal, window, doc_start, q.device, past)
    y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask,
                                       is_causal=causal and mask is None and queries > 1,
                                       enable_gqa=q.shape[2] != k.shape[2])
    return y.transpose(1, 2)


def sdpa(q, k, v, causal, window, doc_start, past):
    """`attention` by PyTorch's kernels; its arguments are checked already."""
    if q.device.type == "cpu" and q.dtype in (torch.bfloat16, torch.float16):
        # PyTorch's half precision on CPUs makes and keeps code for each shape, that is for each length of a document,
        # so that memory grows with the steps; in fp32 it does not, and the call is faster (docs/RESULTS.md).
        with backend.without_autocast(q):
            return sdpa(q.float(), k.float(), v.float(), causal, window, doc_start, past).to(q.dtype)
    if doc_start is not None and q.device.type == "cpu" and q.numel():
        T, S = q.shape[1], k.shape[1]
        begin = (doc_start == torch.arange(S, dtype=doc_start.dtype)).flatten().nonzero().flatten()
        lengths = torch.cat([begin[1:], begin.new_tensor([doc_start.numel()])]) - begin
        # In its sequence; of each document the queries that are here, and how many of its keys stand before them.
        begin %= S
        first, end = (place.clamp(past, past + T) for place in (begin, begin + lengths))
        queries, before, lengths = ((end - first).tolist(), (first - begin).tolist(), lengths.tolist())
        documents = zip(*(x.flatten(0, 1).unsqueeze(0).split(sizes, dim=1)                      # [1, length, ., d]
                          for x, sizes in ((q, queries), (k, lengths), (v, lengths))), before)
        return torch.cat([_sdpa(*document, causal, window, None, keys) for *document, keys in documents
                          if document[0].shape[1]], dim=1).view(q.shape)
    # cuDNN takes milliseconds to plan for a new shape, too long for prompts of any length and for a growing cache.
    plain = doc_start is None and window is None and q.shape[1] == k.shape[1] and q.shape[1] % 128 == 0
    if plain and q.is_cuda and backend.architecture(q.device) == 90:
        with sdpa_kernel(HOPPER_FIRST, set_priority=True):
            return _sdpa(q, k, v, causal, window)
    return _sdpa(q, k, v, causal, window, doc_start, past)


# ---- public op

def runs_flash(q, k, causal, window, doc_start) -> bool:
    """Whether flash.py takes the call; options, shapes and dtype decide, never values."""
    if not use_triton(q) or q.shape[-1] > LARGEST_HEAD:
        return False
    plain = doc_start is None and window is None and (q.shape[1] in (1, k.shape[1]) or not causal)
    return not plain or backend.choice == "triton"


def attention(q, k, v, causal: bool = True, window: int | None = None, doc_start=None, past=None) -> torch.Tensor:
    """Scaled dot-product attention with grouped heads.

    q [B, T, H, d], k and v [B, S, K, d] with H a multiple of K -> [B, T, H, d], all in one dtype. past: how many keys
    stand before the first query's own; None: the last query is aligned with the last key. window: a query sees as many
    keys up to its own (causal=False: to both sides). doc_start [B, S]: for each key's position, where in its sequence
    its document begins; None: a sequence is one document. Under autocast q, k and v are cast to its dtype. ValueError
    where shapes or dtypes do not fit.
    """
    (B, T, H, d), (_, S, K, _) = q.shape, k.shape
    past = S - T if past is None else past
    if H % max(1, K) or not 0 <= past <= S - T or k.shape != (B, S, K, d) or v.shape != k.shape:
        raise ValueError(f"attention of q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)}, {past} keys "
                         "before the queries: heads must be a multiple of key-value heads, keys at least as many as "
                         "queries and those before them, all else equal")
    if doc_start is not None and doc_start.shape != (B, S):
        raise ValueError(f"attention of {S} keys to q {tuple(q.shape)} with doc_start {tuple(doc_start.shape)}: it "
                         "says of each key's position where its document begins")
    if window is not None and window < 1:
        raise ValueError(f"attention with a window of {window}: a query sees at least itself, say 1 or more or None")
    if dtype := backend.autocast_dtype(q):
        q, k, v = (x.to(dtype) for x in (q, k, v))
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"attention of q, k, v in {q.dtype}, {k.dtype}, {v.dtype}: give all three one dtype")
    if causal and past + T < S:
        # No query sees what comes after the last one.
        S = past + T
        k, v, doc_start = k[:, :S], v[:, :S], None if doc_start is None else doc_start[:, :S]
    if window is not None and window >= S:
        window = None
    if window is not None and causal and T == 1 and doc_start is None:
        # Decoding: the keys that the one query does not see are cut off.
        k, v, window, past = k[:, -window:], v[:, -window:], None, window - 1
    run = Flash.apply if runs_flash(q, k, causal, window, doc_start) else sdpa
    return run(q, k, v, causal, window, doc_start, past)
