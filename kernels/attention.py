"""Attention over one contiguous interval of keys per query.

A causal mask, a sliding window and packed documents all leave each query one interval [first, last] of keys:
    last  = its own position i when causal, else the end of its document (or row), with a window at most i + w - 1
    first = the start of its document (or row), with a window of w tokens at least i - w + 1

On the CPU packed rows are split into their documents and each document attends alone, so that the cost follows the
documents' lengths; no T x T mask of a packed row is ever made there.
"""

import torch
import torch.nn.functional as F


def interval_mask(queries: int, keys: int, causal: bool, window: int | None, doc_start=None, device=None):
    """Boolean [queries, keys], or [B, 1, T, T] with doc_start [B, T]; True where the query sees the key.

    The last query is aligned with the last key, as when decoding with a cache.
    """
    key = torch.arange(keys, device=device)
    query = torch.arange(keys - queries, keys, device=device)[:, None]
    mask = key <= query if causal else torch.ones(queries, keys, dtype=torch.bool, device=device)
    if window is not None:
        mask &= key > query - window
        mask &= causal | (key < query + window)
    if doc_start is not None:
        mask = mask & (doc_start[:, None, :, None] == doc_start[:, None, None, :])
    return mask


def _sdpa(q, k, v, causal, window):
    """q [B, T, H, d], k and v [B, S, K, d] without documents -> [B, T, H, d]."""
    queries, keys = q.shape[1], k.shape[1]
    window = None if window is None or window >= keys else window
    mask = None
    if window is not None or (causal and 1 < queries < keys):
        mask = interval_mask(queries, keys, causal, window, device=q.device)
    y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask,
                                       is_causal=causal and mask is None and queries > 1,
                                       enable_gqa=q.shape[2] != k.shape[2])
    return y.transpose(1, 2)


def attention(q, k, v, causal: bool = True, window: int | None = None, doc_start=None) -> torch.Tensor:
    """Scaled dot-product attention with grouped heads.

    q [B, T, H, d], k and v [B, S, K, d] with H a multiple of K -> [B, T, H, d].
    doc_start [B, T] (S == T): for each position, where in its row its document begins; None: a row is one document.
    """
    if doc_start is None:
        return _sdpa(q, k, v, causal, window)
    if q.device.type == "cpu":
        position = torch.arange(q.shape[1], dtype=doc_start.dtype)
        starts = (doc_start == position).flatten().nonzero().flatten()
        ends = torch.cat([starts[1:], starts.new_tensor([doc_start.numel()])])
        lengths = (ends - starts).tolist()
        parts = zip(*(x.flatten(0, 1).unsqueeze(0).split(lengths, dim=1) for x in (q, k, v)))
        return torch.cat([_sdpa(a, b, c, causal, window) for a, b, c in parts], dim=1).view(q.shape)
    mask = interval_mask(q.shape[1], k.shape[1], causal, window, doc_start, q.device)
    y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask,
                                       enable_gqa=q.shape[2] != k.shape[2])
    return y.transpose(1, 2)
