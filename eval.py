"""Perplexity, bits per byte and forgetting, by one protocol that stands in every result.

    python eval.py --model out/legal/final --baseline DIR --text law=shards/domain tales=tales.txt --general tales
    python eval.py --run out/legal --text law=shards/domain

A document is scored in windows of T tokens, each of its tokens once. The first window sees the token that stands
before a document (BOS, or EOS where there is no BOS), a later window the last token of the one before. BOS and EOS
themselves are not scored. With T = 2, the document a b c is scored as (BOS -> a, a -> b) and (b -> c).

Bits per byte divide by the UTF-8 bytes of the text, so they stay comparable when the tokenizer changes; perplexity does
not. Windows of several documents share a sequence and cannot see each other. Shapes: B sequences, T tokens.
"""

import core.threads

import math
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

import data
import hf
import lora
import tokenizer as tokenizers
from core import checkpoint, cli
from core.config import setting
from core.devices import pick_device, pick_dtype
from core.errors import UserError
from core.hashing import mix_keys
from generate import Settings, first_ids, generate
from learn import objectives
from measure import verdict
from model import Model, ModelConfig
from text.corpus import read_documents, utf8
from text.packing import pack_in_order
from text.shards import Shards, check_tokenizer
from text.vocabulary import token_before_document

# ---- documents under an objective

def cut_windows(objective, documents: list, prefix: int, context: int):
    """Yield (inputs [n], targets [n]), n <= context, of each window of each document [its tokens].

    Inputs stand one token before their targets. A masked objective gets the tokens as both, and masks them later.
    """
    for ids in documents:
        ids = ids.astype(np.int32)
        inputs = np.concatenate([np.array([prefix], np.int32), ids[:-1]]) if objective.causal else ids
        for start in range(0, len(ids), context):
            yield inputs[start:start + context], ids[start:start + context]


def make_batches(objective, documents: list, prefix: int, context: int, B: int) -> list[data.Batch]:
    """Batches [B, T] (the last may have fewer sequences) that are ready for `objective.loss`."""
    windows = cut_windows(objective, documents, prefix, context)
    batches = [data.Batch(**sequences.finish()) for sequences in pack_in_order(windows, context, B)]
    for i, batch in enumerate(batches):
        if objective.causal:
            # The targets are apart already, so the last of the T + 1 positions, which is padding, goes.
            for name in ("tokens", "labels", "position_ids", "doc_start"):
                setattr(batch, name, getattr(batch, name)[:, :-1])
        else:
            # The masks are a function of the batch's place, so that every evaluation masks the same positions.
            keys = mix_keys("eval", i, np.arange(len(batch.tokens)))
            batches[i] = objective.corrupt(batch, data.RowRandom(keys))
    return batches


@torch.no_grad()
def score(model, objective, documents: list, prefix: int, context: int, world=None, B: int = 4, autocast=None) -> dict:
    """Score documents [(token ids of the text [n], its bytes)]: nats_per_token, perplexity, tokens, bytes, and
    bits_per_byte (causal) or accuracy (masked).

    prefix: the token before a document. B: sequences per forward pass. autocast: () -> the context of a forward pass;
    without it, the model computes in its own type. With a world, the ranks share the batches and all return the same.
    """
    device = next(model.parameters()).device
    batches = make_batches(objective, [ids for ids, _ in documents], prefix, context, B)
    rank, size = (world.rank, world.size) if world else (0, 1)
    nats = tokens = hits = 0.0
    mode = model.training
    model.eval()
    # Every rank runs the same number of forward passes, because FSDP gathers in each. A rank that has no batch left
    # runs the last one again, without targets.
    for i in range(-(-len(batches) // size)):
        own = i * size + rank
        batch = batches[min(own, len(batches) - 1)].to(device)
        if own >= len(batches):
            batch.labels = torch.full_like(batch.labels, objectives.IGNORE)
        with autocast() if autocast else torch.autocast(device.type, enabled=False):
            loss, n_valid, metrics = objective.loss(model, batch, want_hits=not objective.causal)
        nats += loss.double().item()
        tokens += n_valid.item()
        if not objective.causal:
            hits += metrics["hits"].item()
    model.train(mode)
    if world:
        nats, tokens, hits = world.sum([nats, tokens, hits])
    per_token = nats / tokens if tokens else math.nan
    # exp overflows above 709.
    result = {"nats_per_token": per_token, "perplexity": math.exp(min(per_token, 700)), "tokens": int(tokens),
              "bytes": int(sum(nbytes for _, nbytes in documents))}
    if objective.causal:
        result["bits_per_byte"] = nats / math.log(2) / max(1, result["bytes"])
    else:
        result["accuracy"] = hits / tokens if tokens else math.nan
    return result


def heldout_documents(shards: Shards, max_tokens: int) -> list:
    """The first documents of held-out shards, complete, up to about `max_tokens` tokens (at least one document):
    [(token ids of the text [n], its bytes)]."""
    documents, total = [], 0
    for i in range(shards.documents):
        ids, nbytes = shards.text_document(i)
        if documents and total + len(ids) > max_tokens:
            break
        documents.append((ids, nbytes))
        total += len(ids)
    return documents


def protocol(prefix: int, context: int, dtype) -> dict:
    """How a result was measured; results compare where their protocols are equal."""
    return {"prefix_token_id": prefix, "context": context, "stride": context, "bos_eos_scored": False,
            "dtype": str(dtype).removeprefix("torch."), "documents_see_each_other": False}


def format_table(before: dict | None, after: dict) -> str:
    """Markdown table of scores {text: {...}}: bits per byte (masked LM: accuracy) and perplexity, before and after."""
    unit = "accuracy" if any("accuracy" in scores for scores in after.values()) else "bits_per_byte"
    lines = [f"| text | {unit.replace('_', ' ')} before | after | change | perplexity before | after |",
             "|" + "---|" * 6]
    for name, now in after.items():
        was = (before or {}).get(name, {})
        change = f"{100 * (now[unit] / was[unit] - 1):+.1f} %" if was.get(unit) else ""
        cells = [name, f"{was[unit]:.4f}" if was else "", f"{now[unit]:.4f}", change,
                 f"{was['perplexity']:.2f}" if was else "", f"{now['perplexity']:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def continue_prompts(model, tokenizer, prompts: list[str], max_new_tokens: int, seed: int) -> list[dict]:
    """[{"prompt", "text"}]: a continuation of each prompt at temperature 0.7, sampled with the same seed every time."""
    settings = Settings(max_new_tokens=max_new_tokens, temperature=0.7, top_p=0.95, seed=seed)
    stop = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    out = []
    for prompt in prompts:
        new = generate(model, first_ids(tokenizer, prompt), settings, eos_ids=stop)
        out.append({"prompt": prompt, "text": tokenizer.decode([i for i in new if i not in stop])})
    return out


# ---- files

def score_files(model, tokenizer, texts: dict[str, str], reading: cli.Reading, context: int | None = None) -> tuple:
    """({name: scores}, protocol) of {name: text file or packed folder}; of a packed folder, the held-out documents.

    context: tokens per window; by default the model's, at most 2,048.
    """
    context = context or min(model.config.max_position_embeddings, 2048)
    prefix, objective = token_before_document(tokenizer), objectives.Causal(mask_documents=True)
    results = {}
    for name, file in texts.items():
        if (Path(file) / "manifest.json").is_file():
            shards = Shards(file, "heldout")
            check_tokenizer(name, shards, tokenizer, model.config.vocab_size)
            documents = heldout_documents(shards, max_tokens=2**62)
        else:
            raw = [text for text in read_documents([file], reading) if text]
            documents = [(ids, len(utf8(text))) for text, ids in zip(raw, tokenizer.encode_batch(raw)) if len(ids)]
        if not documents:
            raise UserError(f"text {name} ({file}) is empty")
        results[name] = score(model, objective, documents, prefix, context)
    return results, protocol(prefix, context, next(model.parameters()).dtype)


def checkpoints_of(run: Path):
    """Yield (step, model, tokenizer) of every checkpoint of a run folder, by rising step."""
    for step in checkpoint.steps(run / "checkpoints"):
        path = checkpoint.path_of(run / "checkpoints", step)
        checkpoint.verify(path)
        tensors, _, state = checkpoint.load(path)
        adapters = lora.LoraConfig(**state["identity"]["lora"])
        # A run with adapters saves these alone; all else is the base's.
        model = hf.load(state["base"]) if adapters.rank else Model(ModelConfig(**state["identity"]["model"]))
        if adapters.rank:
            lora.attach(model, adapters, seed=0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in tensors or not adapters.rank:
                    parameter.copy_(tensors[name])
        yield step, model, tokenizers.load(hf.open_base(state["tokenizer"]).folder)


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
    """NAME=FILE ...: texts to score; of a packed folder, its held-out documents."""
    general: list[str] = field(default_factory=list)
    """Names of the texts that are general: their rise is forgetting, the fall of the others the domain gain."""
    context: int | None = setting(None, at_least=1)
    """Tokens per window (default: the model's, at most 2048)."""
    reading: cli.Reading = field(default_factory=cli.Reading)
    device: cli.Device = field(default_factory=cli.Device)


def run_eval(options: Eval) -> dict:
    """Check the options, print the tables, and return what `--json` writes."""
    if bool(options.model) == bool(options.run):
        raise UserError("name one of --model and --run")
    if options.run and (options.baseline or options.general):
        raise UserError("--baseline and --general go with --model; --run scores each checkpoint alone")
    texts = {}
    for text in options.text:
        name, equals, file = text.partition("=")
        if not equals or not name:
            raise UserError(f"--text is {text!r}, but must be NAME=FILE")
        texts[name] = file
    if unknown := [name for name in options.general if name not in texts]:
        raise UserError(f"--general names {unknown[0]!r}, which no --text has; there are {', '.join(texts)}")
    return score_run(options, texts) if options.run else score_model(options, texts)


def score_run(options: Eval, texts: dict) -> dict:
    """Every checkpoint of a run, each with its table."""
    result = {"run": options.run, "checkpoints": []}
    device = pick_device(options.device.device)
    for step, model, tokenizer in checkpoints_of(Path(options.run)):
        model = model.to(device)
        scores, result["protocol"] = score_files(model, tokenizer, texts, options.reading, options.context)
        result["checkpoints"].append({"step": step, "texts": scores})
        print(f"step {step}\n{format_table(None, scores)}")
    if not result["checkpoints"]:
        raise UserError(f"{options.run} holds no checkpoints")
    return result


def score_model(options: Eval, texts: dict) -> dict:
    """A model, beside its baseline where one is named."""
    device, dtype = pick_device(options.device.device), pick_dtype(options.device.dtype)

    def score_folder(path):
        base = hf.open_base(path)
        model = hf.load(base, dtype, device)
        return score_files(model, tokenizers.load(base.folder), texts, options.reading, options.context)

    scores, used = score_folder(options.model)
    result = {"model": options.model, "texts": scores, "protocol": used}
    before = None
    if options.baseline:
        before, baseline_protocol = score_folder(options.baseline)
        result["baseline"] = {"model": options.baseline, "texts": before, "protocol": baseline_protocol}
        result |= verdict.compare(before, scores, options.general)
    print(format_table(before, scores))
    print(f"windows of {used['context']} tokens, prefix token {used['prefix_token_id']}, {used['dtype']}")
    if before:
        print(verdict.describe(result))
    return result


def main() -> int:
    return cli.run("eval.py", __doc__, (Eval, run_eval))


if __name__ == "__main__":
    sys.exit(main())
