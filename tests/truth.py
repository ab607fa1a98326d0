"""Scores of documents by a plain loop over a transformers model: what measure/scoring.py is compared with."""

import math

import pytest
import torch


@torch.no_grad()
def truth(model, documents, prefix: int, context: int) -> dict:
    """Each document alone: windows of `context` targets, the first after the prefix token, no packing."""
    by_document, tokens = [], 0
    for ids, _ in documents:
        nats, ids = 0.0, torch.tensor([prefix, *ids.tolist()])
        for i in range(0, len(ids) - 1, context):
            window = ids[i:i + context + 1]
            log_p = model(window[None, :-1]).logits[0].double().log_softmax(-1)
            nats -= log_p.gather(1, window[1:, None]).sum().item()
            tokens += len(window) - 1
        by_document.append(nats)
    nats, nbytes = sum(by_document), sum(n for _, n in documents)
    return {"nats_per_token": nats / tokens, "perplexity": math.exp(nats / tokens), "tokens": tokens,
            "bytes": nbytes, "bits_per_byte": nats / math.log(2) / nbytes, "documents": len(documents),
            "nats_by_document": by_document}


def same(found: dict, expected: dict, rel: float = 1e-6) -> bool:
    """Whether two results are equal, the nats of each document too, which are written with four decimals."""
    lists = [dict(scores)["nats_by_document"] for scores in (found, expected)]
    rest = [{key: value for key, value in scores.items() if key != "nats_by_document"} for scores in (found, expected)]
    return rest[0] == pytest.approx(rest[1], rel=rel) and lists[0] == pytest.approx(lists[1], rel=1e-5, abs=2e-4)
