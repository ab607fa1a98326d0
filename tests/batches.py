"""Batches by hand, and the logits of one: what the tests of objectives are made of."""

import numpy as np
import torch

from core.hashing import mix_keys
from data import Batch, RowRandom
from kernels.cross_entropy import IGNORE


def batch_of(tokens, starts=(), padding=(), seed=0, step=0, lo=0) -> Batch:
    """tokens [B, T + 1]; starts: (row, position) where a document begins; padding: (row, position) where it begins."""
    tokens = torch.as_tensor(tokens, dtype=torch.int32)
    labels, doc_start = tokens.clone(), torch.zeros_like(tokens)
    for row, position in (*starts, *padding):
        doc_start[row, position:] = position
    for row, position in padding:
        labels[row, position:] = IGNORE
    positions = torch.arange(tokens.shape[1], dtype=torch.int32) - doc_start
    rows = np.arange(lo, lo + len(tokens))
    return Batch(tokens, labels, positions, doc_start, np.zeros(len(tokens), np.int64),
                 RowRandom(mix_keys(seed, "rows", step, rows)))


def random_tokens(rows, columns, vocab_size=97, seed=0):
    return torch.randint(0, vocab_size, (rows, columns), generator=torch.Generator().manual_seed(seed))


def logits_of(model, batch, causal, documents):
    hidden = model(batch.tokens, batch.position_ids, batch.doc_start if documents else None, causal)
    return model.head(hidden).float()
