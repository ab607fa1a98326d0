"""General text for a user who has none: documents that the base itself draws, to be packed as a general source.

    python forget.py replay --model DIR --documents 1000 --out replay.jsonl
"""

import json
import os
from pathlib import Path

import torch
from tqdm import tqdm

import hf
import tokenizer
from core.config import ArgumentParser
from generate import Settings, decode, end_ids, first_ids, pick_device


def self_replay(model, tok, ends, documents: int, settings, seed: int, rows: int = 64):
    """Yield records {"text", "id", "metadata"} of texts that the model draws from nothing but the token that begins a
    document: what it still has of its training text (self-generated replay, arXiv 2605.26097). `rows` at a time, each
    with random numbers of its own, so that a document depends on the seed and its number."""
    start = first_ids(tok, "")
    for first in range(0, documents, rows):
        numbers = range(first, min(first + rows, documents))
        random = [torch.Generator().manual_seed((seed * 1_000_003 + i) % 2**63) for i in numbers]
        new = decode(model, [start] * len(numbers), settings, random, ends)
        for i, ids in zip(numbers, new):
            ended = ids[-1] in ends
            text = tok.decode([t for t in ids[:len(ids) - ended] if t < tok.vocab_size]).strip()
            if text:
                yield {"text": text, "id": f"self-{seed}-{i}",
                       "metadata": {"source": "self-generated", "ended": ended, "tokens": len(ids)}}


def command(args) -> dict:
    folder = hf.resolve(args.model)
    tok, model = tokenizer.load(folder), hf.load(folder, hf.DTYPES[args.dtype], pick_device(args.device))
    for name in ("documents", "max_new_tokens"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}, but must be above 0")
    length = min(args.max_new_tokens, model.config.max_position_embeddings - 1)
    settings = Settings(max_new_tokens=length, temperature=args.temperature, top_p=args.top_p, seed=args.seed)
    if settings.temperature == 0:
        raise ValueError("--temperature is 0, so that every document would be the same; take 1, the base's own")
    ends = {*end_ids(folder, tok), *([tok.bos_id] if tok.bos_id is not None else [])}    # BOS begins another text
    out, records, tokens = Path(args.out), 0, 0
    if out.is_dir():
        raise ValueError(f"{out} is a folder; name a file with --out, e.g. {out / 'replay.jsonl'}")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f"{out.name}.tmp{os.getpid()}")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            drawn = self_replay(model, tok, ends, args.documents, settings, args.seed)
            for record in tqdm(drawn, total=args.documents, unit="document", disable=None):
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
                records, tokens = records + 1, tokens + record["metadata"]["tokens"]
        if not records:
            raise ValueError(f"{args.model} ended each of {args.documents} documents before its first token; is it a "
                             f"base model?")
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)
    print(f"{out}: {records:,} documents, {tokens:,} tokens drawn from {args.model}; pack it as a general source")
    return {"out": str(out), "documents": records, "tokens": tokens}


def arguments(p: ArgumentParser):
    p.add_argument("--model", required=True, metavar="DIR", help="the base")
    p.add_argument("--out", required=True, metavar="FILE")
    p.add_argument("--documents", type=int, default=1000, help="default %(default)s")
    p.add_argument("--max-new-tokens", type=int, default=512, help="of a document (default %(default)s)")
    p.add_argument("--temperature", type=float, default=1.0, help="default 1, the base's own distribution")
    p.add_argument("--top-p", type=float, default=1.0, help="default 1; less cuts the unlikely tokens off")
    p.add_argument("--seed", type=int, default=0)
