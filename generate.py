"""Continue a text: a key-value cache, the usual ways of sampling, stop strings, text streamed as it grows.

    python generate.py --model DIR --prompt "Once upon a time" --max-new-tokens 100 --temperature 0 --json out.json

The file gets {"prompt_ids", "new_ids", "text"}: text is prompt and continuation, as printed; new_ids has the ids of end
token and stop string too. Logits are changed in the order of transformers: repetition penalty (arXiv 1909.05858),
temperature, top-k (1805.04833), top-p (1904.09751), min-p (2407.01082).

Shapes: B sequences, T tokens, D model width, V vocabulary.
"""

import core.threads

import math
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch

import hf
import tokenizer
from core import cli, devices
from core.config import setting
from core.errors import UserError
from core.settings_files import read_settings
from core.sharding import device_of
from model import KVCache
from text.vocabulary import TextStream, token_before_document


@dataclass
class Settings:
    """How the next tokens are chosen."""

    max_new_tokens: int = setting(100, at_least=0)
    """The most new tokens; an end token or a stop string ends the text earlier."""
    temperature: float = setting(1.0, at_least=0, below=math.inf)
    """0 takes the likeliest token (greedy); 1 is the model's own distribution."""
    top_k: int = setting(0, at_least=0)
    """Sample from the k likeliest tokens, and those as likely as the last of them; 0: from all."""
    top_p: float = setting(1.0, above=0, at_most=1)
    """Sample from the fewest likeliest tokens that together reach this probability; 1: from all."""
    min_p: float = setting(0.0, at_least=0, at_most=1)
    """Sample from tokens at least this fraction as likely as the likeliest; 0: from all."""
    repetition_penalty: float = setting(1.0, above=0, below=math.inf)
    """Above 1, tokens of the prompt and of the new text become less likely."""
    seed: int = setting(0, at_least=0, below=2**63)
    """The same seed gives the same text."""
    cache: bool = True
    """Keep keys and values; --no-cache puts the whole text through the model for every token."""

    def __post_init__(self):
        # Logits are divided by the temperature, and must stay finite.
        if 0 < self.temperature < 1e-6:
            raise UserError(f"temperature is {self.temperature}, but must be 0 (greedy) or at least 1e-6")


def penalised(logits, settings: Settings, seen_ids) -> torch.Tensor:
    """logits [V] -> scores [V]: a float64 copy, lower for the ids already seen, be their logit above 0 or not."""
    scores = logits.detach().to(torch.float64, copy=True)
    if settings.repetition_penalty != 1 and len(seen_ids):
        seen = torch.tensor(sorted(set(seen_ids)), device=scores.device)
        score, penalty = scores[seen], settings.repetition_penalty
        scores[seen] = torch.where(score < 0, score * penalty, score / penalty)
    return scores


def probabilities(scores, settings: Settings) -> torch.Tensor:
    """scores [..., V] -> the probabilities to sample from, [..., V] with sum 1 and 0 where a filter removed the token.

    Needs temperature > 0. With the probabilities 0.5, 0.3, 0.15, 0.05: top_k 3 keeps the first three, top_p 0.7 the
    fewest that reach 0.7 together (two), min_p 0.2 those of at least 0.2 * 0.5 (three).
    """
    scores = scores / settings.temperature
    if settings.top_k:
        least = scores.topk(min(settings.top_k, scores.shape[-1])).values[..., -1:]
        scores = scores.masked_fill(scores < least, -math.inf)
    if settings.top_p < 1:
        ascending, order = scores.sort(stable=True)
        tail = ascending.softmax(-1).cumsum(-1) <= 1 - settings.top_p
        # The likeliest token stays, whatever rounding makes of the sum.
        tail[..., -1] = False
        scores = scores.masked_fill(torch.empty_like(tail).scatter_(-1, order, tail), -math.inf)
    probs = scores.softmax(-1)
    if settings.min_p:
        probs = probs.masked_fill(probs < settings.min_p * probs.amax(-1, keepdim=True), 0)
    return probs / probs.sum(-1, keepdim=True)


def sample_logits(logits, settings: Settings, seen_ids, generators) -> list[int]:
    """logits [B, V] -> the next id of each sequence.

    seen_ids: for each sequence the ids it has, for the repetition penalty. generators: for each sequence a random
    generator on the CPU, so that all devices draw the same; one value is drawn from each. None: torch's own.
    """
    scores = torch.stack([penalised(row, settings, seen) for row, seen in zip(logits, seen_ids)])
    if not scores.amax(-1).isfinite().all():
        raise UserError("the logits are not finite; the checkpoint is damaged, or float16 overflowed: --dtype float32")
    if settings.temperature == 0:
        return scores.argmax(-1).tolist()
    total = probabilities(scores, settings).cumsum(-1)
    draws = torch.stack([torch.rand((), dtype=torch.float64, generator=generator) for generator in generators])
    draws = draws.to(total.device).unsqueeze(1) * total[:, -1:]
    # right=True never chooses an id of probability 0.
    return torch.searchsorted(total, draws, right=True)[:, 0].tolist()


# Not inference_mode, because training may go on with the same parameters.
@torch.no_grad()
def decode(model, tok, prompts, settings: Settings, generators, eos_ids=(), on_token=None, start=None):
    """The decode loop: B sequences of one length, continued side by side -> [the new ids of each].

    tok: the tokenizer, of whose ids and `eos_ids` alone the new ones are; None: any row of the model's embedding.
    prompts: B lists of ids. generators: as in `sample_logits`. A sequence ends with an id of `eos_ids`, which is
    included, or where on_token(sequence, id), called with each other new id, returns True. The loop ends with the last
    sequence. start: a cache of what the prompts begin with. The model is in eval mode meanwhile. With FSDP every rank
    must call this with the same arguments.
    """
    device, ids = device_of(model), [list(prompt) for prompt in prompts]
    capacity = len(ids[0]) + settings.max_new_tokens
    new, running = [[] for _ in ids], set(range(len(ids)))
    cache = start or (KVCache(capacity) if settings.cache else None)
    missing = [i for i in tok.missing_ids(model.config.vocab_size) if i not in eos_ids] if tok else []
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        # The table of rotations is made once, not again whenever the sequences have grown.
        model.angles(capacity, device)
        while running and len(ids[0]) < capacity:
            past = cache.length if cache else 0
            tokens = torch.tensor([sequence[past:] for sequence in ids], device=device)          # [B, T]
            for part in cut_prompt(tokens, next(model.parameters()).dtype, cache):
                hidden = model(part, cache=cache)
            logits = model.head(hidden[:, -1])                                                   # [B, V]
            logits[:, missing] = -math.inf
            for i, token in enumerate(sample_logits(logits, settings, ids, generators)):
                # A sequence that has ended gets ids too, which nobody reads, so that all keep one length.
                ids[i].append(token)
                if i in running:
                    new[i].append(token)
                    if token in eos_ids or (on_token and on_token(i, token)):
                        running.remove(i)
    finally:
        for module, mode in modes:
            module.training = mode
    return new


def cut_prompt(tokens, dtype: torch.dtype, cache) -> tuple:
    """The prompt tokens [B, T] in one part. In half precision on a CPU oneDNN makes and keeps code for each length, so
    there they come in parts of 2^k tokens (100 = 64 + 32 + 4), for which the cache is needed."""
    T = tokens.shape[1]
    cut = cache and tokens.device.type == "cpu" and dtype.itemsize == 2
    return tokens.split([1 << k for k in reversed(range(T.bit_length())) if T >> k & 1] if cut else T, dim=1)


def generate(model, prompt_ids, settings: Settings, eos_ids=(), on_token=None, tok=None) -> list[int]:
    """The ids that follow `prompt_ids`, with `tok` as in `decode`. on_token(id) gets each but an end token, and
    ends the text by returning True."""
    vocab_size = model.config.vocab_size
    if not len(prompt_ids):
        raise UserError("the prompt has no tokens; begin with the tokenizer's BOS")
    if not 0 <= min(prompt_ids) <= max(prompt_ids) < vocab_size:
        raise UserError(f"the prompt holds id {max(prompt_ids)} of {vocab_size} rows; is this the model's tokenizer?")
    seen = (lambda i, token: on_token(token)) if on_token else None
    generators = [torch.Generator().manual_seed(settings.seed)]
    return decode(model, tok, [prompt_ids], settings, generators, eos_ids, seen)[0]


def first_ids(tok, prompt: str) -> list[int]:
    """Ids of `prompt`, after BOS where the model was trained so; without any, BOS, or EOS where there is no BOS."""
    return tok.encode(prompt, bos=tok.add_bos) or [token_before_document(tok)]


def complete(model, tok, prompt: str, settings: Settings, eos_ids=(), stop=(), write=lambda piece: None) -> dict:
    """{"prompt_ids", "new_ids", "text"}: text is prompt and continuation, without BOS, end token and stop string."""
    prompt_ids = first_ids(tok, prompt)
    stream = TextStream(tok, tok.encode(prompt), stop, write)
    new_ids = generate(model, prompt_ids, settings, eos_ids, stream.push, tok)
    return {"prompt_ids": prompt_ids, "new_ids": new_ids, "text": stream.finish()}


def end_ids(folder: Path, tok) -> tuple[int, ...]:
    """The end tokens: eos_token_id of generation_config.json, else of config.json, else the tokenizer's."""
    ids = tok.eos_id
    for name in ("config.json", "generation_config.json"):
        if (found := read_settings(folder / name).get("eos_token_id")) is not None:
            ids = found
    return tuple(i for i in (ids if isinstance(ids, list) else [ids]) if i is not None)


@dataclass(kw_only=True)
class Generate:
    """Continue a text."""

    model: str
    """Hugging Face folder, or hf://org/name[@revision]."""
    prompt: str = ""
    """Text to continue; empty: from BOS, or from EOS where there is no BOS."""
    prompt_file: str | None = None
    """UTF-8 file to continue, a newline at its end included."""
    stop: list[str] = field(default_factory=list)
    """Strings before which the text ends."""
    settings: Settings = field(default_factory=Settings)
    device: cli.Device = field(default_factory=cli.Device)


def run(options: Generate) -> dict:
    settings, file = options.settings, options.prompt_file
    if options.prompt and file:
        raise UserError("give --prompt or --prompt-file, not both")
    try:
        # encode() refuses the surrogates that stand for bytes of a command line which is not UTF-8.
        prompt = (Path(file).read_bytes() if file else options.prompt.encode()).decode()
    except UnicodeError:
        raise UserError(f"the prompt {file or ''} is not UTF-8; convert it, e.g. with iconv") from None
    device = devices.pick_device(options.device.device)
    base = hf.open_base(options.model)
    tok = tokenizer.load(base.folder)
    model = hf.load(base, devices.DTYPES[options.device.dtype], device)
    length = len(first_ids(tok, prompt)) + settings.max_new_tokens
    if length > model.config.max_position_embeddings:
        print(f"warning: prompt and new tokens make up to {length}, but the model was trained for "
              f"{model.config.max_position_embeddings}; the text may fall apart beyond", file=sys.stderr)
    ends = end_ids(base.folder, tok)
    result = complete(model, tok, prompt, settings, ends, options.stop, lambda piece: print(piece, end="", flush=True))
    print()
    return result


def main(argv: list[str] | None = None) -> int:
    return cli.run("generate.py", __doc__, (Generate, run), argv=argv)


if __name__ == "__main__":
    sys.exit(main())
