"""Continue a text: a key-value cache, the usual ways of sampling, stop strings, text streamed as it grows.

    python generate.py --model DIR --prompt "Once upon a time" --max-new-tokens 100 --temperature 0 --json out.json

Order as in transformers: repetition penalty (arXiv 1909.05858), temperature, top-k (1805.04833), top-p (1904.09751),
min-p (2407.01082). One text at a time. T tokens, D hidden_size, V vocab_size.
"""

import core.threads

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

import hf
import tokenizer
from core.config import ArgumentParser, main_guard, write_json
from model import KVCache
from text.vocabulary import token_before_document


@dataclass
class Settings:
    max_new_tokens: int = 100
    temperature: float = 1.0         # 0: greedy
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    use_cache: bool = True           # False: the whole text goes through the model for every token

    def __post_init__(self):
        def check(name, fits, remedy):
            if not fits:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be {remedy}")

        check("max_new_tokens", self.max_new_tokens >= 0, "0 or more")
        check("temperature", self.temperature == 0 or 1e-6 <= self.temperature < math.inf,
              "0 (greedy) or at least 1e-6; 1 is the model's own distribution")
        check("top_k", self.top_k >= 0, "a number of tokens, or 0 for all")
        check("top_p", 0 < self.top_p <= 1, "above 0 and at most 1 (all tokens)")
        check("min_p", 0 <= self.min_p <= 1, "between 0 (all tokens) and 1")
        check("repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0; 1 is no penalty")
        check("seed", 0 <= self.seed < 2**63, "between 0 and 2**63 - 1")


def penalised(logits, settings: Settings, seen_ids) -> torch.Tensor:
    """logits [V] -> scores [V]: a float64 copy with the ids already seen pushed down, whatever the sign of theirs."""
    scores = logits.detach().to(torch.float64, copy=True)
    if settings.repetition_penalty != 1 and len(seen_ids):
        seen = torch.tensor(sorted(set(seen_ids)), device=scores.device)
        score, penalty = scores[seen], settings.repetition_penalty
        scores[seen] = torch.where(score < 0, score * penalty, score / penalty)
    return scores


def probabilities(scores, settings: Settings) -> torch.Tensor:
    """scores [..., V] -> what is sampled from, [..., V] with sum 1 and 0 where a filter removed the token.

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
        tail[..., -1] = False                        # rounding must not remove the likeliest
        scores = scores.masked_fill(torch.empty_like(tail).scatter_(-1, order, tail), -math.inf)
    probs = scores.softmax(-1)
    if settings.min_p:
        probs = probs.masked_fill(probs < settings.min_p * probs.amax(-1, keepdim=True), 0)
    return probs / probs.sum(-1, keepdim=True)


def sample_logits(logits, settings: Settings, seen_ids, generators) -> list[int]:
    """logits [B, V] -> the next id of each sequence.

    seen_ids: of each sequence the ids it has, for the repetition penalty. generators: of each sequence its random
    generator, on the CPU, from which one number is drawn, so that all devices agree; None takes torch's own.
    """
    scores = torch.stack([penalised(row, settings, seen) for row, seen in zip(logits, seen_ids)])
    if not scores.amax(-1).isfinite().all():
        raise ValueError("the model's logits are not finite; the checkpoint is damaged, or float16 overflowed: try "
                         "--dtype float32")
    if settings.temperature == 0:
        return scores.argmax(-1).tolist()
    total = probabilities(scores, settings).cumsum(-1)
    draws = torch.stack([torch.rand((), dtype=torch.float64, generator=generator) for generator in generators])
    draws = draws.to(total.device).unsqueeze(1) * total[:, -1:]
    return torch.searchsorted(total, draws, right=True)[:, 0].tolist()       # right: never an id of probability 0


@torch.no_grad()                                     # not inference_mode: training goes on with the same parameters
def decode(model, prompts, settings: Settings, generators, eos_ids=(), on_token=None) -> list[list[int]]:
    """The decode loop: B sequences of one length continued side by side -> the new ids of each.

    prompts: B lists of ids. generators: as in `sample_logits`. A sequence ends with an id of `eos_ids`, which is
    included, or where on_token(sequence, id), called with each other new id, returns True; the loop ends with the last
    sequence. The model is in eval mode meanwhile. With FSDP every rank must call this with the same arguments.
    """
    device, ids = next(model.parameters()).device, [list(prompt) for prompt in prompts]
    capacity = len(ids[0]) + settings.max_new_tokens
    new, running = [[] for _ in ids], set(range(len(ids)))
    cache = KVCache(capacity) if settings.use_cache else None
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        model.angles(capacity, device)               # the table of rotations once, not again for each longer sequence
        while running and len(ids[0]) < capacity:
            past = cache.length if cache else 0
            tokens = torch.tensor([sequence[past:] for sequence in ids], device=device)          # [B, T]
            logits = model.head(model(tokens, cache=cache)[:, -1])                               # [B, V]
            for i, token in enumerate(sample_logits(logits, settings, ids, generators)):
                ids[i].append(token)                 # an ended sequence goes on, unread, so that all have one length
                if i in running:
                    new[i].append(token)
                    if token in eos_ids or (on_token and on_token(i, token)):
                        running.remove(i)
    finally:
        for module, mode in modes:
            module.training = mode
    return new


def generate(model, prompt_ids, settings: Settings, eos_ids=(), on_token=None) -> list[int]:
    """The ids that follow `prompt_ids`; on_token(id) sees each but an ending one, and ends the text with True.

    ValueError where the prompt is empty or holds an id that the model does not have.
    """
    vocab_size = model.config.vocab_size
    if not len(prompt_ids):
        raise ValueError("the prompt has no tokens; begin with the tokenizer's BOS")
    if not 0 <= min(prompt_ids) <= max(prompt_ids) < vocab_size:
        raise ValueError(f"the prompt holds id {max(prompt_ids)}, but the model has {vocab_size} rows; is this its "
                         f"tokenizer?")
    seen = (lambda i, token: on_token(token)) if on_token else None
    return decode(model, [prompt_ids], settings, [torch.Generator().manual_seed(settings.seed)], eos_ids, seen)[0]


class TextStream:
    """Text of a growing row of ids, handed to `write` as soon as no later token can change it.

    All ids are decoded each time, because SentencePiece drops the space before the first of them. Held back are the
    bytes of an unfinished UTF-8 character and what may become one of `stop`. The text ends before the stop string
    that is complete first; the prompt is not searched. After finish(), `text` is what was written.
    """

    def __init__(self, tok, ids, stop=(), write=lambda piece: None):
        if "" in stop:
            raise ValueError("a stop string is empty; leave --stop out to stop at the end token alone")
        self.tok, self.ids, self.stop, self.write = tok, list(ids), tuple(stop), write
        self.text, self.stopped = tok.decode(self.ids), False
        self.prompt = len(self.text)
        write(self.text)

    def push(self, token: int) -> bool:
        """Add one id; True once a stop string is complete."""
        if token < self.tok.vocab_size:              # else a row that pads the model's embedding: no text
            self.ids.append(token)
        text = self.tok.decode(self.ids).rstrip("\ufffd")
        held = [n for s in self.stop for n in range(1, len(s)) if text.endswith(s[:n])]
        self._write(text, len(text) - max(held, default=0))
        return self.stopped

    def finish(self) -> str:
        if not self.stopped:
            text = self.tok.decode(self.ids)
            self._write(text, len(text))
        return self.text

    def _write(self, text, end):
        found = [(at + len(s), at) for s in self.stop if (at := text.find(s, self.prompt)) >= 0]
        self.stopped = bool(found)
        piece = text[len(self.text):min(found)[1] if found else end]
        self.text += piece
        self.write(piece)


def first_ids(tok, prompt: str) -> list[int]:
    """Ids of `prompt`, after BOS where the model was trained so; an empty one is BOS, or EOS where there is no BOS."""
    return tok.encode(prompt, bos=tok.add_bos) or [token_before_document(tok)]


def complete(model, tok, prompt: str, settings: Settings, eos_ids=(), stop=(), write=lambda piece: None) -> dict:
    """{"prompt_ids", "new_ids", "text"}: text is prompt and continuation, without BOS, end token and stop string."""
    prompt_ids = first_ids(tok, prompt)
    stream = TextStream(tok, tok.encode(prompt), stop, write)
    new_ids = generate(model, prompt_ids, settings, eos_ids, stream.push)
    return {"prompt_ids": prompt_ids, "new_ids": new_ids, "text": stream.finish()}


def end_ids(folder: Path, tok) -> tuple[int, ...]:
    """eos_token_id, one or several: generation_config.json's, else config.json's, else the tokenizer's."""
    ids = tok.eos_id
    for name in ("config.json", "generation_config.json"):
        if (folder / name).exists() and (found := hf.read_json(folder / name).get("eos_token_id")) is not None:
            ids = found
    return tuple(ids) if isinstance(ids, list) else () if ids is None else (ids,)


def pick_device(name: str) -> torch.device:
    """"auto" is cuda where there is one, else cpu."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, dtype=torch.float64, device=name).device
    except (RuntimeError, AssertionError, TypeError):    # no such name, not built in, no float64
        raise ValueError(f"device {name!r} does not exist here or not for this build of PyTorch; give auto, cpu, cuda "
                         f"or cuda:1") from None


OPTIONS = {                          # of Settings, on the command line
    "max_new_tokens": "fewer where an end token or a stop string comes",
    "temperature": "0: greedy",
    "top_k": "sample from the k likeliest tokens and what ties with the last; 0: from all",
    "top_p": "sample from the likeliest tokens that together reach this probability; 1: from all",
    "min_p": "sample from tokens at least this fraction as likely as the likeliest; 0: from all",
    "repetition_penalty": "above 1: tokens of the prompt and of the new text become less likely",
    "seed": "same seed, same text",
}


def main(argv=None):
    parser = ArgumentParser(prog="generate.py", description=__doc__)
    parser.add_argument("--model", required=True, help="Hugging Face folder, or hf://org/name")
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", default="", help="text to continue; empty (default): from BOS, else from EOS")
    prompt.add_argument("--prompt-file", help="UTF-8 file to continue, taken whole, a last newline included")
    for name, text in OPTIONS.items():
        default = getattr(Settings, name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default, metavar="N",
                            help=f"{text} (default %(default)s)")
    parser.add_argument("--stop", action="append", default=[], help="end the text before this string; repeatable")
    parser.add_argument("--no-cache", action="store_true", help="the whole text through the model for every token")
    parser.add_argument("--dtype", choices=hf.DTYPES, default="float32", help="of the weights (default %(default)s)")
    parser.add_argument("--device", default="auto", help="auto (default): cuda where there is one; cpu, cuda, cuda:1")
    parser.add_argument("--json", type=Path, help="write {prompt_ids, new_ids, text} there: text is prompt and "
                        "continuation decoded as one, as printed; new_ids keeps the ids of end token and stop string")
    args = parser.parse_args(argv)
    settings = Settings(**{name: getattr(args, name) for name in OPTIONS}, use_cache=not args.no_cache)
    device, text = pick_device(args.device), args.prompt
    try:
        text = Path(args.prompt_file).read_bytes().decode() if args.prompt_file else text.encode().decode()
    except UnicodeError:
        raise ValueError(f"the prompt {args.prompt_file or ''} is not UTF-8; convert it, e.g. with iconv") from None
    folder = hf.resolve(args.model)
    tok = tokenizer.load(folder)
    model = hf.load(folder, hf.DTYPES[args.dtype], device)

    def write(piece):
        print(piece, end="", flush=True)

    length = len(first_ids(tok, text)) + settings.max_new_tokens
    if length > model.config.max_position_embeddings:
        print(f"warning: prompt and new tokens make up to {length}, but the model was trained for "
              f"{model.config.max_position_embeddings}; the text may fall apart beyond", file=sys.stderr)
    sys.stdout.reconfigure(errors="replace")         # a terminal that is not UTF-8
    result = complete(model, tok, text, settings, end_ids(folder, tok), args.stop, write)
    print()
    if args.json:
        write_json(args.json, result)


if __name__ == "__main__":
    sys.exit(main_guard(main))
