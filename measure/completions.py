"""What a model writes behind prompts, batched: prompts of one length are continued side by side.

What all prompts begin with, as few-shot examples, goes through the model once and is kept as keys and values.
"""

import itertools
from dataclasses import replace

import torch
from tqdm import tqdm

from core import parallel, sharding
from generate import Settings, decode
from measure.likelihoods import FEWEST_SHARED, batched, shared_length, widen
from model import BY_LENGTH, KVCache
from text.vocabulary import TextStream, token_before_document


@torch.no_grad()
def complete_all(model, tokenizer, prompts: list[str], stop, settings: Settings, longest: int, B: int = 32, world=None,
                 eos_ids=None, bar: str | None = None) -> tuple[list[str], int]:
    """([the completion of each prompt, which ends before the first of the `stop` strings or an end token], prompts that
    were cut on the left to leave room for them within the `longest` tokens of the context).

    With a world, the ranks share the prompts and all return the same; where FSDP shards the model, each does all.
    bar: the name of a progress bar on a terminal; None: without.
    """
    world = world or parallel.World(0, 1, sharding.device_of(model))
    eos_ids = ({tokenizer.eos_id} - {None}) if eos_ids is None else eos_ids
    bos = [tokenizer.bos_id] * tokenizer.add_bos
    encoded = [[*bos, *ids.tolist()] or [token_before_document(tokenizer)] for ids in tokenizer.encode_batch(prompts)]
    # A context that is short leaves half of itself to the prompt.
    settings = replace(settings, max_new_tokens=min(settings.max_new_tokens, longest // 2))
    room = longest - settings.max_new_tokens
    cut = sum(len(ids) > room for ids in encoded)
    encoded = [ids[-room:] for ids in encoded]
    head = begin(model, encoded)
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    batches = [some for _, group in itertools.groupby(order, key=lambda i: len(encoded[i])) for some in
               batched(group, B)]
    apart, completions = not sharding.is_sharded(model), {}
    shown = tqdm(total=len(prompts), desc=bar, disable=None if bar and world.main else True)
    for together in batched(batches, world.size if apart else 1):
        world.barrier()
        world.check()
        for some in together[world.rank:world.rank + 1] if apart else together:
            texts = complete(model, tokenizer, [encoded[i] for i in some], stop, settings, eos_ids, head,
                             [torch.Generator().manual_seed(settings.seed + i) for i in some])
            completions.update(zip(some, texts))
        shown.update(sum(map(len, together)))
    shown.close()
    if apart:
        completions = {i: text for part in world.gather(completions) for i, text in part.items()}
    return [completions[i] for i in range(len(prompts))], cut


def begin(model, prompts: list[list[int]]) -> KVCache | None:
    """Keys and values of what all prompts begin with, or None where that is next to nothing."""
    # The last id of a prompt stays, because the first new one is predicted there.
    length = min(shared_length([tuple(ids) for ids in prompts]), *(len(ids) - 1 for ids in prompts))
    if len(prompts) < 2 or length < FEWEST_SHARED or model.config.rope_scaling.get("rope_type") in BY_LENGTH:
        return None
    cache, mode = KVCache(length), model.training
    model.eval()
    model(torch.tensor([prompts[0][:length]], device=sharding.device_of(model)), cache=cache)
    model.train(mode)
    return cache


def complete(model, tokenizer, prompts: list[list[int]], stop, settings: Settings, eos_ids, head: KVCache | None,
             generators) -> list[str]:
    """The completions of prompts of one length, which begin with what `head` holds."""
    bos = int(tokenizer.add_bos and prompts[0][0] == tokenizer.bos_id)
    streams = [TextStream(tokenizer, ids[bos:], stop) for ids in prompts]
    start = widen(head, [0] * len(prompts), len(prompts[0]) + settings.max_new_tokens) if head else None
    decode(model, tokenizer, prompts, settings, generators, eos_ids, lambda i, token: streams[i].push(token), start)
    return [stream.finish()[stream.prompt_length:] for stream in streams]
