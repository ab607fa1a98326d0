"""Text sampled from the base: general text for a user who has none, to be packed as a general source.

The base is given nothing but the token that begins a document, so it writes what it still has of its training text
(self-generated replay, arXiv 2605.26097). Two documents, each at most 3 new tokens, of a model whose end token is 2:

    generated ids   [5, 6, 2]      the text of 5 6, {"ended": True,  "tokens": 3}
                    [7, 8, 9]      the text of 7 8 9, {"ended": False, "tokens": 3}
"""

from collections.abc import Callable, Iterator

import torch


def sample_documents(decode: Callable, tok, start: list[int], ends: set[int], documents: int, seed: int,
                     batch: int = 64) -> Iterator[dict]:
    """Yields records {"text", "id", "metadata"}; a document without text is left out.

    decode(prompts, generators) -> the new ids of each prompt (generate.decode with a model and its settings).
    start: the ids that begin a document; ends: the ids that end one. `batch` documents are decoded side by side, each
    with a random generator of its own, so that a document is a function of the seed and its number alone.
    """
    for first in range(0, documents, batch):
        numbers = range(first, min(first + batch, documents))
        generators = [torch.Generator().manual_seed((seed * 1_000_003 + i) % 2**63) for i in numbers]
        for i, ids in zip(numbers, decode([start] * len(numbers), generators)):
            ended = ids[-1] in ends
            # An id beyond the tokenizer's vocabulary is a row that only pads the model's embedding: it has no text.
            text = tok.decode([t for t in ids[:len(ids) - ended] if t < tok.vocab_size]).strip()
            if text:
                yield {"text": text, "id": f"self-{seed}-{i}",
                       "metadata": {"source": "self-generated", "ended": ended, "tokens": len(ids)}}
