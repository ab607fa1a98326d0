"""ELECTRA: a small generator fills in masked tokens, and the model says which tokens were replaced (arXiv 2003.10555).

    x        the    judge  read   the    file           a text
    masked   the    [MASK] read   the    [MASK]         15 % of the positions
    corrupt  the    court  read   the    file           at these, tokens sampled from the generator
    target   0      1      0      0      0              a sampled token that is the original counts as original

    loss = mean over the masked of -log p_G(x_t | masked) + 50 mean over all positions of -log p_D(target_t | corrupt)

The generator learns as a masked language model alone: no gradient goes through the sampling. It shares the token
embeddings with the model, its input and output both projected to their width, so that these learn from either loss.
All that a user keeps is the model, which reads in both directions here; the generator and the discriminator's head
stand in `model.objective` (hf.OF_OBJECTIVE) while it trains, so that the optimizer, DDP and checkpoints hold them.

Both means are one sum over positions divided by one number, as accumulation and ranks ask for: each position is masked
with the probability mask_ratio, so the generator's loss is summed over the masked positions and divided by mask_ratio,
which on average makes it a mean over them once the sum is divided by the number of all positions.

Shapes: B sequences, T tokens, D model width, G the generator's width, V vocabulary, M masked positions.
"""

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from core.errors import UserError
from kernels.cross_entropy import CHUNK_BYTES, IGNORE
from learn.objectives import Masked
from model import Model

# Of the random values of a sequence, those that sample from the generator; Masked has the first three.
SAMPLES = 3


class Projected(nn.Module):
    """The embeddings of another model, projected to G."""

    def __init__(self, embedding: nn.Embedding, width: int):
        super().__init__()
        # In a tuple it is no module of this one: its weight is the model's alone.
        self.shared = (embedding,)
        self.in_proj = nn.Linear(embedding.embedding_dim, width, bias=False)

    def forward(self, tokens):
        return self.in_proj(self.shared[0](tokens))


class Generator(nn.Module):
    """model.Model of `ratio` times a model's width; its hidden states [B, T, D] are those of the model's embeddings,
    which are its head."""

    def __init__(self, model: Model, ratio: float, seed: int):
        super().__init__()
        c, embedding = model.config, model.embed_tokens
        heads = max(1, round(ratio * c.num_attention_heads))
        config = replace(c, hidden_size=round_up(ratio * c.hidden_size), num_attention_heads=heads,
                         intermediate_size=round_up(ratio * c.intermediate_size), tie_word_embeddings=False,
                         num_key_value_heads=math.gcd(heads, c.num_key_value_heads), vocab_size=1)
        self.shared, self.trunk = (embedding,), Model(config)
        self.trunk.embed_tokens = Projected(embedding, config.hidden_size)
        self.trunk.head = nn.Linear(config.hidden_size, c.hidden_size, bias=False)
        self.trunk.checkpoint_blocks = model.checkpoint_blocks
        self.trunk.initialise(seed)
        self.to(embedding.weight.device, embedding.weight.dtype)

    @property
    def head(self) -> nn.Embedding:
        return self.shared[0]

    def forward(self, tokens, position_ids=None, doc_start=None, causal: bool = False):
        return self.trunk.head(self.trunk(tokens, position_ids, doc_start, causal))


def round_up(width: float) -> int:
    """The next multiple of 8."""
    return -(-int(width) // 8) * 8


def modules_of(model) -> nn.ModuleDict:
    """The generator and the discriminator's head of a model in training, perhaps inside DDP's wrapper."""
    found = getattr(getattr(model, "module", model), "objective", None)
    if found is None:
        raise UserError("objective electra scores with a generator and a head that a run's checkpoints hold, and no "
                        "model folder; what they reached stands in the run's eval.json")
    return found


class OfGenerator(Masked):
    """Masked language modelling, of the generator that stands in a model."""

    def loss(self, model, batch, want_hits=False):
        return super().loss(modules_of(model).generator, batch, want_hits)


class Electra(Masked):
    measures = ("generator_loss", "generator_accuracy", "discriminator_loss", "discriminator_accuracy",
                "replaced_share", "precision", "recall")
    is_likelihood = False

    def __init__(self, *masking, generator_ratio: float, weight: float):
        """masking: the arguments of Masked."""
        super().__init__(*masking)
        self.generator_ratio, self.weight, self.of_generator = generator_ratio, weight, OfGenerator(*masking)

    @property
    def text_objective(self):
        """Text is scored under the generator: the model itself predicts no tokens."""
        return self.of_generator

    def part_documents(self):
        parted = super().part_documents()
        parted.of_generator = self.of_generator.part_documents()
        return parted

    def model_built(self, model, learning):
        generator = Generator(model, self.generator_ratio, learning.seed)
        head = nn.Linear(model.config.hidden_size, 1)
        nn.init.zeros_(head.bias)
        nn.init.normal_(head.weight, std=model.config.initializer_range,
                        generator=torch.Generator().manual_seed(learning.seed))
        weight = model.embed_tokens.weight
        model.objective = nn.ModuleDict({"generator": generator, "head": head.to(weight.device, weight.dtype)})
        size = sum(p.numel() for p in generator.parameters())
        self.notes = [f"electra: a generator of {size:,} parameters beside the embeddings trains with the model"]
        if not model.config.tie_word_embeddings:
            # The model predicts no tokens here, and DDP waits for the gradient of whatever trains.
            model.head.requires_grad_(False)

    def corrupt(self, batch, rng):
        """Labels are the text at each position that is judged; those of them that are masked have the mask token."""
        masked = super().corrupt(batch, rng)
        T = masked.tokens.shape[1]
        tokens, labels = batch.tokens[:, :T], batch.labels[:, :T]
        return replace(masked, tokens=torch.where(masked.labels != IGNORE, self.mask_id, tokens),
                       labels=torch.where(torch.isin(tokens, self.special), IGNORE, labels), rng=rng)

    def loss(self, model, batch, want_hits=False):
        head, embedding = modules_of(model).head, getattr(model, "module", model).embed_tokens
        judged = batch.labels != IGNORE
        is_masked = judged & (batch.tokens == self.mask_id)
        masked = replace(batch, labels=torch.where(is_masked, batch.labels, IGNORE))
        nats, n_masked, of_generator = self.of_generator.loss(model, masked, want_hits=True)

        # [B, T]: the text, with what the generator would write at the masked positions.
        uniform = batch.rng.uniform(SAMPLES, batch.tokens.shape[1]).to(batch.tokens.device)
        sampled = sample(of_generator.pop("hidden").detach()[is_masked], embedding.weight, uniform[is_masked])
        written = batch.tokens.masked_scatter(is_masked, sampled.to(batch.tokens.dtype))
        replaced = judged & (written != batch.labels)
        hidden = self.hidden_states(model, replace(batch, tokens=written))
        logits = head(hidden).squeeze(-1).float()
        wrong = F.binary_cross_entropy_with_logits(logits, replaced.float(), reduction="none")
        wrong = torch.where(judged, wrong, 0.0)

        n, said = judged.sum(), judged & (logits > 0)
        found = (said & replaced).sum()
        token_loss = of_generator["token_loss"] / self.mask_ratio + self.weight * wrong.detach()
        measures = {
            "generator_loss": (nats.detach(), n_masked), "generator_accuracy": (of_generator["hits"], n_masked),
            "discriminator_loss": (wrong.detach().sum(), n),
            "discriminator_accuracy": ((judged & (said == replaced)).sum(), n), "replaced_share": (replaced.sum(), n),
            "precision": (found, said.sum()), "recall": (found, replaced.sum())}
        return nats / self.mask_ratio + self.weight * wrong.sum(), n, {
            "token_loss": token_loss, "sequence_loss": token_loss.sum(1), "sequence_targets": judged.sum(1),
            "hidden": hidden, "measures": measures}


@torch.no_grad()
def sample(hidden, weight, uniform) -> torch.Tensor:
    """int64 [M]: a token for each hidden state [M, D], drawn from softmax(hidden weight^T) by a value in [0, 1).

    It is the first whose cumulative probability is above that value: the same in any batch. The logits of a chunk of
    the M tokens exist at a time.
    """
    rows = max(1, CHUNK_BYTES // (4 * len(weight)))
    drawn = [hidden.new_empty(0, dtype=torch.int64)]
    for x, u in zip(hidden.split(rows), uniform.split(rows)):
        below = torch.softmax((x @ weight.to(x.dtype).T).float(), -1).cumsum(-1)
        drawn.append(torch.searchsorted(below, u[:, None] * below[:, -1:], right=True)[:, 0].clamp(max=len(weight) - 1))
    return torch.cat(drawn)
