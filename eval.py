"""Perplexity, bits per byte and forgetting, by one protocol that stands in every result.

    python eval.py --model out/legal/final --baseline DIR --text law=shards/domain tales=tales.txt --general tales
    python eval.py --run out/legal --text law=shards/domain
    python eval.py --model out/spans/final --text law=shards/domain --objective.name span
    python eval.py --model out/masked/final --text law=shards/domain --objective.name masked --pll

A document is scored in windows of T tokens, each of its tokens once. The first window sees the token that stands
before a document (BOS, or EOS where there is no BOS), a later window the last token of the one before. BOS and EOS
themselves are not scored. With T = 2, the document a b c is scored as (BOS -> a, a -> b) and (b -> c).

Bits per byte divide by the UTF-8 bytes of the text, so they stay comparable when the tokenizer changes; perplexity does
not. Windows of several documents share a sequence and cannot see each other. Shapes: B sequences, T tokens.
"""

import core.threads

import contextlib
import functools
import itertools
import math
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

import data
import hf
import lora
import tokenizer as tokenizers
from core import checkpoint, cli, devices, hashing, parallel
from core.config import setting
from core.errors import UserError
from learn import objectives
from learn.choose_objective import CAUSAL, ObjectiveConfig, check_scoring, make_objective, read_settings
from measure import verdict
from model import Model, ModelConfig
from text import corpus, packing, vocabulary
from text.mixture import DataConfig
from text.shards import Shards, check_tokenizer

# ---- documents under an objective

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
    device, mode = next(model.parameters()).device, model.training
    world = world or parallel.World(0, 1, device)
    masks = [learned[0] if learned else None for _, _, *learned in documents]
    batches = make_batches(objective, [ids for ids, *_ in documents], prefix, context, B, masks)
    nats = tokens = hits = 0.0
    by_document = torch.zeros(len(documents), dtype=torch.float64)
    model.eval()
    passes = [(batch, owner, k) for batch, owner in batches for k in range(objective.passes(batch))]
    # FSDP gathers in each forward pass, so a rank that has no batch left runs the last one again, without targets.
    for own in range(world.rank, world.rank + len(passes), world.size):
        world.barrier()
        world.check()
        batch, owner, k = passes[min(own, len(passes) - 1)]
        batch = objective.view(batch, k).to(device)
        if own >= len(passes):
            batch.labels = torch.full_like(batch.labels, objectives.IGNORE)
        with autocast() if autocast else torch.autocast(device.type, enabled=False):
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
    device = next(model.parameters()).device
    world = world or parallel.World(0, 1, device)
    n = min(held.sequences, max(1, most_tokens // held.context))
    totals = torch.zeros(2 + 2 * len(objective.measures), dtype=torch.float64, device=device)
    model.eval()
    starts = range(0, n, B)
    # FSDP gathers in each forward pass, so a rank that has no batch left runs the last one again and does not count it.
    for own in range(world.rank, world.rank + len(starts), world.size):
        batch = data.read_batch(held, np.arange(starts[min(own, len(starts) - 1)], n)[:B], source)
        batch = objective.corrupt(batch, batch.rng).to(device)
        with autocast() if autocast else torch.autocast(device.type, enabled=False):
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


# ---- files

def score_files(model, tokenizer, texts: dict[str, str], reading: cli.Reading, context: int | None = None,
                config: ObjectiveConfig = CAUSAL, pll: bool = False, reference=None) -> tuple:
    """({name: scores}, protocol) of {name: text file or packed folder}; of a packed folder, the held-out documents, and
    under "objective" what an objective measures on sequences of them.

    context: tokens per window; default: the model's, at most 2,048. pll: by pseudo-log-likelihood. reference: a model.
    """
    longest = model.config.max_position_embeddings
    context = context or min(longest, 2048)
    if context > longest:
        print(f"warning: --context {context} is beyond the {longest} positions of the model", file=sys.stderr)
    prefix = vocabulary.token_before_document(tokenizer)
    learned, results = make_objective(config, True, tokenizer, model.config.vocab_size), {}
    objective = objectives.PseudoLikelihood(learned) if pll else learned.text_objective
    if learned.uses_reference and reference is None:
        raise UserError(f"objective {config.name} compares two models; name --model and --baseline, not --run")
    learned.reference = lambda _: contextlib.nullcontext(reference)
    for name, file in texts.items():
        if is_packed := (Path(file) / "manifest.json").is_file():
            shards = Shards(file, "heldout")
            check_tokenizer(name, shards, tokenizer, model.config.vocab_size)
            documents, counted = heldout_documents(shards, max_tokens=2**62), shards.lost
        else:
            texts_of_file = corpus.read_documents([file], reading)
            raw = [text for text in texts_of_file if text]
            counted = {"empty_documents": texts_of_file.empty} if texts_of_file.empty else {}
            if lost := vocabulary.measure_loss(tokenizer, raw[:64]):
                counted["lost_share"] = lost
            encoded = zip(raw, tokenizer.encode_batch(raw))
            documents = [(ids, len(corpus.utf8(text))) for text, ids in encoded if len(ids)]
        if not documents:
            raise UserError(f"text {name} ({file}) is empty")
        results[name] = score(model, objective, documents, prefix, context) | counted
        if is_packed and learned.measures and shards.format in learned.forms:
            held = packing.pack_sources({name: shards}, DataConfig(context=context), learned.shift,
                                        learned.text_length(context))[name]
            results[name]["objective"] = score_objective(model, learned, held, 2**62)
    return results, protocol(objective, prefix, context, next(model.parameters()).dtype)


# ---- command

@dataclass(kw_only=True)
class Eval:
    """Score texts under a model, beside the model it was before, or under each checkpoint of a run."""
    model: str | None = None
    """Model folder or hf:// id."""
    baseline: str | None = None
    """The model before: adds changes, domain gain and forgetting."""
    run: str | None = None
    """A run folder: score each of its checkpoints instead."""
    text: list[str]
    """NAME=FILE ...: texts to score, also a folder, a pattern or @LIST; of a packed folder, its held-out documents."""
    general: list[str] = field(default_factory=list)
    """Names of the texts that are general: their rise is forgetting, the fall of the others the domain gain."""
    context: int | None = setting(None, at_least=1)
    """Tokens per window (default: the model's, at most 2048)."""
    pll: bool = False
    """Of a masked model: mask one token at a time, and tell the pseudo-log-likelihood in bits per byte."""
    reading: cli.Reading = field(default_factory=cli.Reading)
    device: cli.Device = field(default_factory=cli.Device)


def run_eval(options: Eval, settings: list[str] = ()) -> dict:
    config = read_settings(settings)
    if options.pll and config.name != "masked":
        raise UserError("--pll is for a masked model: set --objective.name masked, or leave it out")
    if bool(options.model) == bool(options.run):
        raise UserError("name one of --model and --run")
    if options.run and (options.baseline or options.general):
        raise UserError("--baseline and --general go with --model; --run scores each checkpoint alone")
    if wrong := [text for text in options.text if text.find("=") < 1]:
        raise UserError(f"--text is {wrong[0]!r}, but must be NAME=FILE")
    texts = dict(text.split("=", 1) for text in options.text)
    if len(texts) < len(options.text):
        raise UserError("--text gives one name to two texts; name each once (a folder, a pattern or @LIST joins files)")
    if unknown := [name for name in options.general if name not in texts]:
        raise UserError(f"--general names {unknown[0]!r}, which no --text has; there are {', '.join(texts)}")
    how = options.reading, options.context, config, options.pll
    return (score_run if options.run else score_model)(options, texts, how)


def score_run(options: Eval, texts: dict, how: tuple) -> dict:
    folder, device = Path(options.run, "checkpoints"), devices.pick_device(options.device.device)
    result = {"run": options.run, "checkpoints": []}
    for step in checkpoint.steps(folder):
        checkpoint.verify(path := checkpoint.path_of(folder, step))
        model, state, name = load_checkpoint(path)
        if not result["checkpoints"]:
            check_scoring(options.run, state["identity"], how[2])
        place = state["tokenizer"]
        tokenizer = tokenizers.load(hf.open_base(place).folder if place.startswith("hf://") else place)
        scores, result["protocol"] = score_files(model.to(device), tokenizer, texts, *how)
        result["checkpoints"].append({"step": step, "model": name, "texts": scores})
        print(f"step {step}: {name}\n{format_table(None, scores)}")
    if not result["checkpoints"]:
        raise UserError(f"{options.run} holds no checkpoints")
    if (final := Path(options.run, "final")).is_dir():
        scores, _ = score_files(hf.load(final, device=device), tokenizers.load(final), texts, *how)
        result["final"] = {"model": "final/", "texts": scores}
        print(f"final/\n{format_table(None, scores)}")
    return result


def load_checkpoint(path) -> tuple[Model, dict, str]:
    """(what a run that ended at a checkpoint would export, before a merge; the checkpoint's state; what it is)."""
    state = checkpoint.read_state(path)
    tensors, moments, _ = checkpoint.load(path, ("model/", "state/ema:"))
    identity, name = state["identity"], "weights in training"
    if averaged := {key.removeprefix("ema:"): mean for key, mean in moments.items() if key.startswith("ema:")}:
        tensors, name = tensors | averaged, "moving average of the weights"
    tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith(hf.OF_OBJECTIVE)}
    try:
        adapters, config = lora.LoraConfig(**identity["lora"]), ModelConfig(**identity["model"])
    except (TypeError, KeyError) as error:
        raise UserError(f"{path}/{checkpoint.STATE} describes no model ({error}); it was made by another "
                        f"version") from None
    # A run with adapters saves these alone; all else is the base's, and never in few bits.
    if adapters.rank:
        base, name = hf.open_base(state["base"]), f"base with the adapter ({name})"
        if base.fingerprint != identity["base"]:
            raise UserError(f"{base} is not the base that {path} was trained on; put that one back")
        model = hf.load(replace(base, changed=config))
        lora.attach(model, replace(adapters, base="plain"), seed=0)
    else:
        model = Model(config)
    part = ".adapters." if adapters.rank else ""
    shapes = [{name: tensor.shape for name, tensor in each.items()}
              for each in (parallel.model_state(model, part, torch.Tensor.detach), tensors)]
    if odd := sorted(name for name, _ in shapes[0].items() ^ shapes[1].items()):
        raise UserError(f"{path} does not hold the tensors of its model, among them {odd[0]}; it was made by another "
                        f"version")
    parallel.load_model_state(model, tensors, part)
    if adapters.rank:
        lora.merge(model)
    for weight in model.parameters():
        weight.data = weight.data.to(devices.DTYPES.get(state["dtype"], torch.float32)).float()
    merges = "merge" in identity["forget"]
    return model, state, name + (", before the merge with the base" if merges else "")


def score_model(options: Eval, texts: dict, how: tuple) -> dict:
    device, dtype, found = devices.pick_device(options.device.device), devices.DTYPES[options.device.dtype], []
    bases = {path: hf.open_base(path) for path in (options.model, options.baseline) if path}
    models = {path: hf.load(base, dtype, device) for path, base in bases.items()}
    for path in filter(None, (options.model, options.baseline)):
        scores, used = score_files(models[path], tokenizers.load(bases[path].folder), texts, *how,
                                   reference=models.get(options.baseline))
        found.append({"model": path, "texts": scores, "protocol": used})
    result, before = found[0], None
    if options.baseline:
        result["baseline"], before = found[1], found[1]["texts"]
        result |= verdict.compare(before, result["texts"], options.general)
    print(format_table(before, result["texts"]))
    for name, scores in result["texts"].items():
        if measured := scores.get("objective"):
            print(f"{name}, objective: {', '.join(f'{key} {value:.4g}' for key, value in measured.items())}")
    print("windows of {context} tokens, prefix token {prefix_token_id}, {dtype}".format(**result["protocol"]))
    if before:
        print(verdict.describe(result, result["texts"]))
    return result


def main() -> int:
    words, settings = cli.take_settings(sys.argv[1:], "objective")
    return cli.run("eval.py", __doc__, (Eval, functools.partial(run_eval, settings=settings)), argv=words)


if __name__ == "__main__":
    sys.exit(main())
