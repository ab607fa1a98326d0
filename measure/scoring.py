"""Perplexity and bits per byte of documents under an objective, by one protocol that stands in every result.

A document is scored in windows of T tokens, each of its tokens once. The first window sees the token that stands
before a document (BOS, or EOS where there is no BOS), a later window the last token of the one before. BOS and EOS
themselves are not scored. With T = 2, the document a b c is scored as (BOS -> a, a -> b) and (b -> c).

Bits per byte divide by the UTF-8 bytes of the text, so they stay comparable when the tokenizer changes; perplexity does
not. Windows of several documents share a sequence and cannot see each other. Shapes: B sequences, T tokens.
"""

import itertools
import math

import numpy as np
import torch

import data
from core import hashing, parallel
from core.sharding import device_of
from learn import objectives
from measure import verdict
from text import packing
from text.shards import Shards


def cut_windows(objective, documents: list, prefix: int, context: int, masks=None):
    """Yield (inputs [n], targets [n]), n <= context, of each window of each document [its tokens].

    Inputs stand one token before their targets. A masked objective gets the tokens as both, and masks them later.
    masks: which tokens of each document are learned, and so scored, bool [its tokens]; None: all, in that document or
    in any. A conversation has one, and begins with its first token: nothing but its form stands before it.
    """
    for ids, learned in zip(documents, masks or itertools.repeat(None)):
        ids = ids.astype(np.int32)
        inputs = np.concatenate([np.array([prefix], np.int32), ids[:-1]]) if objective.causal else ids
        if learned is not None:
            ids = np.where(learned, ids, objectives.IGNORE)[objective.shift:]
            inputs = inputs[objective.shift:]
        for start in range(0, len(ids), context):
            yield inputs[start:start + context], ids[start:start + context]


def make_batches(objective, documents: list, prefix: int, context: int, B: int, masks=None) -> list[tuple]:
    """[(batch, owner)] of the documents [its tokens]: a batch [B, T] (the last may have fewer sequences) that is ready
    for `objective.loss`, and the number of the document that each of its tokens belongs to, int64 [B, T]; 0 in padding.
    """
    packed = list(packing.pack_in_order(cut_windows(objective, documents, prefix, context, masks), context, B))
    batches = [data.Batch(**sequences.finish()) for sequences in packed]
    # Windows are packed in order: read row after row, the tokens are those of the documents, one after another.
    lengths = [len(ids) - objective.shift * (masks is not None and masks[i] is not None)
               for i, ids in enumerate(documents)]
    numbers = torch.arange(len(documents)).repeat_interleave(torch.tensor(lengths))
    filled = [torch.arange(context) < torch.from_numpy(sequences.end[:len(batch.tokens), None])
              for sequences, batch in zip(packed, batches)]
    owners = [torch.zeros_like(is_token, dtype=torch.int64).masked_scatter_(is_token, part) for is_token, part in
              zip(filled, numbers.split([int(is_token.sum()) for is_token in filled]))]
    for i, batch in enumerate(batches):
        if objective.causal:
            # The targets are apart already, so the last of the T + 1 positions, which is padding, goes.
            for name in ("tokens", "labels", "position_ids", "doc_start"):
                setattr(batch, name, getattr(batch, name)[:, :-1])
        else:
            # The masks are a function of the sequence's number, so that every evaluation masks the same positions,
            # however many sequences it computes at a time.
            keys = hashing.mix_keys("eval", i * B + np.arange(len(batch.tokens)))
            batches[i] = objective.corrupt(batch, data.RowRandom(keys))
    return list(zip(batches, owners))


@torch.no_grad()
def score(model, objective, documents: list, prefix: int, context: int, world=None, B: int = 4, autocast=None) -> dict:
    """nats_per_token, perplexity, tokens, bytes and bits_per_byte (masked: accuracy) of [(token ids [n], text bytes)];
    also the number of documents, and the nats of each, from which measure/verdict.py finds how sure a change is. Of a
    conversation, (ids, bytes of what is learned, which tokens are learned [n]), these tokens alone are scored.

    prefix: the token before a document. B: sequences per forward pass. autocast: () -> the context of a forward pass;
    without it, the model computes in its own type. With a world, the ranks share the batches and all return the same.
    Documents of one sequence do not see each other, whatever they do in training.
    """
    objective = objective.part_documents()
    device, mode = device_of(model), model.training
    world = world or parallel.World(0, 1, device)
    masks = [learned[0] if learned else None for _, _, *learned in documents]
    batches = make_batches(objective, [ids for ids, *_ in documents], prefix, context, B, masks)
    nats = tokens = hits = 0.0
    by_document = torch.zeros(len(documents), dtype=torch.float64)
    model.eval()
    passes = [(batch, owner, k) for batch, owner in batches for k in range(objective.passes(batch))]
    # FSDP gathers in each forward pass, so a rank that has no batch left runs the last one again, without targets.
    part, parts = world.share
    for own in range(part, part + len(passes), parts):
        world.barrier()
        world.check()
        batch, owner, k = passes[min(own, len(passes) - 1)]
        batch, owner = world.cut(objective.view(batch, k)).to(device), world.cut_tokens(owner)
        if own >= len(passes):
            batch.labels = torch.full_like(batch.labels, objectives.IGNORE)
        with autocast() if autocast else torch.autocast(device.type, enabled=False), world.sharing():
            loss, n_valid, metrics = objective.loss(model, batch, want_hits=objective.unit == "accuracy")
        nats += loss.double().item()
        tokens += n_valid.item()
        hits += float(metrics.get("hits", 0))
        by_document.index_add_(0, owner.flatten(), metrics["token_loss"].double().cpu().flatten())
    model.train(mode)
    nats, tokens, hits, *by_document = world.sum([nats, tokens, hits, *by_document.tolist()])
    per_token, size = nats / tokens if tokens else math.nan, int(sum(nbytes for _, nbytes, *_ in documents))
    found = {"bits_per_byte": nats / math.log(2) / max(1, size), "accuracy": hits / tokens if tokens else math.nan}
    # exp overflows above 709.
    return {"nats_per_token": per_token, "perplexity": math.exp(min(per_token, 700)), "tokens": int(tokens),
            "bytes": size, objective.unit: found[objective.unit], "documents": len(documents),
            "nats_by_document": [round(value, 4) for value in by_document]}


@torch.no_grad()
def score_objective(model, objective, held: packing.Packing, most_tokens: int, world=None, B: int = 4,
                    autocast=None, source: int = 0) -> dict:
    """{"loss", each of the objective's measures} on the held-out sequences of a source, at most about `most_tokens`.

    Unlike `score` it corrupts as the training does, each sequence in the same way in every evaluation, so that the
    curves of a run are of one thing. source: what batch.source is to say. Other arguments as in `score`.
    """
    objective, mode = objective.part_documents(), model.training
    device = device_of(model)
    world = world or parallel.World(0, 1, device)
    n = min(held.sequences, max(1, most_tokens // held.context))
    totals = torch.zeros(2 + 2 * len(objective.measures), dtype=torch.float64, device=device)
    model.eval()
    starts = range(0, n, B)
    # FSDP gathers in each forward pass, so a rank that has no batch left runs the last one again and does not count it.
    part, parts = world.share
    for own in range(part, part + len(starts), parts):
        batch = data.read_batch(held, np.arange(starts[min(own, len(starts) - 1)], n)[:B], source)
        batch = world.cut(objective.corrupt(batch, batch.rng)).to(device)
        with autocast() if autocast else torch.autocast(device.type, enabled=False), world.sharing():
            loss, count, metrics = objective.loss(model, batch)
        values = [loss, count, *(value for name in objective.measures for value in metrics["measures"][name])]
        if own < len(starts):
            totals += torch.stack([torch.as_tensor(value, device=device).double() for value in values])
    model.train(mode)
    sums = world.sum(totals.tolist())
    means = {name: total / number for name, total, number in zip(("loss", *objective.measures), sums[::2], sums[1::2])
             if number}
    return means | {"sequences": n}


def heldout_documents(shards: Shards, max_tokens: int) -> list:
    """[(token ids [n], text bytes)] of the first held-out documents, at most `max_tokens` tokens or one document; of a
    conversation (ids, bytes of what is learned, which tokens are learned [n]), and of a preference the chosen one."""
    documents, total = [], 0
    for i in range(0, shards.documents, 2 if shards.format == "preference" else 1):
        document = shards.text_document(i)
        if documents and total + len(document[0]) > max_tokens:
            break
        documents.append(document if shards.mask_maps is None else (*document, shards.document_mask(i)))
        total += len(document[0])
    return documents


def protocol(objective, prefix: int, context: int, dtype) -> dict:
    """How a result was measured; results compare where their protocols are equal."""
    masked = {} if objective.causal else {"mask_ratio": objective.mask_ratio, "mask_token_id": objective.mask_id}
    if isinstance(objective, objectives.PseudoLikelihood):
        masked["mask_ratio"] = "one token of each document at a time"
    return {"prefix_token_id": prefix, "context": context, "stride": context, "bos_eos_scored": False,
            "dtype": str(dtype).removeprefix("torch."), "documents_see_each_other": False, **masked}


def format_table(before: dict | None, after: dict) -> str:
    """Markdown table of scores {text: {...}}: bits per byte (masked LM: accuracy) and perplexity, before and after, and
    on how much text; where the scores of the documents are known, with the 95 % interval of the change."""
    unit = "accuracy" if any("accuracy" in scores for scores in after.values()) else "bits_per_byte"
    heads = ["text", f"{unit.replace('_', ' ')} before", "after", "change", "perplexity before", "after", "documents",
             "tokens"]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * 8]
    for name, now in after.items():
        was = (before or {}).get(name, {})
        change = f"{100 * (now[unit] / was[unit] - 1):+z.1f} %" if was.get(unit) else ""
        # The interval is that of the loss, which accuracy is not.
        if unit == "bits_per_byte" and (interval := verdict.middle(verdict.draw_changes(name, was, now))):
            change += " (95 %: {:+z.1f} to {:+z.1f})".format(*(100 * end for end in interval))
        # A name is the user's and may hold what ends a cell or a line.
        shown = " ".join(name.split()).replace("|", "\\|")
        perplexities = [f"{side['perplexity']:{'.2f' if side['perplexity'] < 1e6 else '.1e'}}" if side else ""
                        for side in (was, now)]
        cells = [shown, f"{was[unit]:.4f}" if was else "", f"{now[unit]:.4f}", change, *perplexities,
                 f"{now['documents']:,}", f"{now['tokens']:,}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
