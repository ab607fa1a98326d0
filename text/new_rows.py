"""Rows of the embedding and the head for new ids. V vocabulary, D model width."""

from dataclasses import dataclass
from typing import Literal

import torch

from core.errors import UserError
from text.vocabulary import Tokenizer


@dataclass
class NewRows:
    """How the rows of new ids are made, each matrix from its own old rows."""

    init: Literal["subtoken", "subtoken_norm", "mean", "covariance", "zero", "random"] = "subtoken"
    """subtoken: the mean of the rows of the token's parts. subtoken_norm: the same, stretched to the median norm of the
    old rows. mean: the mean of all old rows. covariance: drawn around that mean with 1e-5 of the old rows' covariance
    (Hewitt 2021, "Initializing new word embeddings"). random: normal with the config's initializer_range."""
    seed: int = 0
    """The seed of --init random and covariance."""


@torch.no_grad()
def resize(model, old: Tokenizer, vocab_size: int, parts: dict[int, list[int]], new_rows: NewRows,
           zero_id: int | None = None) -> None:
    """Grow the embedding and the head, [V, D] each (one parameter if they are tied), to `vocab_size` rows, in place.

    old: the base's tokenizer. Rows of its ids keep their bits; rows that a base has beyond them count as free.
    parts: {new id: the old ids it stands for}. zero_id: an id whose row is zero whatever new_rows.init says (padding).
    """
    config = model.config
    if config.vocab_size < old.vocab_size:
        raise UserError(f"the model has {config.vocab_size} rows, but its tokenizer {old.vocab_size} ids; the two "
                        f"belong to different models")
    known = [i for i, token in enumerate(old.tokens) if token is not None]
    generator = torch.Generator().manual_seed(new_rows.seed)
    for module in [model.embed_tokens] if config.tie_word_embeddings else [model.embed_tokens, model.head]:
        weight = module.weight                                          # [V, D]
        draw = _row_maker(weight[known].float().cpu(), new_rows.init, config.initializer_range, generator)
        grown = weight.new_zeros(max(vocab_size, len(weight)), weight.shape[1])
        grown[:len(weight)] = weight
        for i, of in parts.items():
            if i != zero_id:
                grown[i] = draw(weight[list(of)].float().mean(0).cpu()).to(weight)
        module.weight = torch.nn.Parameter(grown)
    config.vocab_size = len(grown)
    model.tie()


def _row_maker(rows: torch.Tensor, init: str, spread: float, generator: torch.Generator):
    """A function (mean of the parts' rows [D]) -> new row [D], in fp32. rows: the old rows, [V, D]."""
    mean, width = rows.mean(0), rows.shape[1]
    if init == "subtoken":
        return lambda part_mean: part_mean
    if init == "subtoken_norm":
        # A mean is shorter than the rows it is made of. But as a row of the head, a long one is too sure of what it has
        # not learned: stories260K with 200 new tokens reads legal text at 6.0 bits per byte, with "subtoken" at 4.0.
        norm = rows.norm(dim=1).median()
        return lambda part_mean: part_mean * norm / part_mean.norm().clamp(min=1e-12)
    if init == "mean":
        return lambda _: mean
    if init == "zero":
        return lambda _: torch.zeros_like(mean)
    if init == "random":
        return lambda _: torch.randn(width, generator=generator) * spread
    centred = rows - mean
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(rows) * 1e-5)
    root = vectors * values.clamp(min=0).sqrt()                         # root @ root.T is the covariance
    return lambda _: mean + root @ torch.randn(width, generator=generator)
