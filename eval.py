"""Perplexity, bits per byte and forgetting, by one protocol that stands in every result.

    python eval.py --model out/legal/final --baseline path/to/base --text law=shards/domain --text tales=tales.txt \\
                   --general tales --json eval.json

A document is scored in windows of T tokens, each token once: the first window sees the prefix token (BOS, or EOS where
there is none), later ones the last token of the window before. BOS and EOS are not scored. Bits per byte divide by the
UTF-8 bytes of the text and so stay comparable when the tokenizer changes; perplexity does not.
Windows of several documents share a row and cannot see each other.
"""

import core.threads

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import data
import hf
import lora
import tokenizer as tokenizers
from core import checkpoint
from core.cli import Reading
from core.config import ArgumentParser, main_guard, write_json
from core.devices import pick_device
from core.hashing import mix_keys
from generate import Settings, generate
from learn import objectives
from measure import verdict
from model import Model, ModelConfig
from text.corpus import read_documents, utf8
from text.packing import pack_in_order
from text.shards import Shards, check_tokenizer
from text.vocabulary import token_before_document


def causal_segments(documents, prefix: int, context: int):
    """(inputs, targets) of each window of each document's tokens."""
    for ids in documents:
        ids = np.concatenate([np.array([prefix], np.int32), ids.astype(np.int32)])
        for i in range(0, len(ids) - 1, context):
            yield ids[i:i + context][:len(ids) - 1 - i], ids[i + 1:i + context + 1]


def masked_segments(documents, context: int):
    """(tokens, tokens) of each window; the objective masks them."""
    for ids in documents:
        for i in range(0, len(ids), context):
            yield (ids[i:i + context].astype(np.int32),) * 2


@torch.no_grad()
def score(model, objective, documents: list, prefix: int, context: int, world=None, rows: int = 4, autocast=None):
    """Loss of `objective` on documents [(token ids of the text, bytes)]: the numbers of one source of a result.

    With a world, the ranks share the batches and all return the same numbers.
    """
    device = next(model.parameters()).device
    texts = [ids for ids, _ in documents]
    segments = causal_segments(texts, prefix, context) if objective.causal else masked_segments(texts, context)
    batches = [data.Batch.of(sequences) for sequences in pack_in_order(segments, context, rows)]
    rank, size = (world.rank, world.size) if world else (0, 1)
    nats = tokens = hits = 0.0
    mode = model.training
    model.eval()
    for i in range(-(-len(batches) // size)):          # every rank runs the same number of forwards, as FSDP needs
        own = i * size + rank
        batch = batches[min(own, len(batches) - 1)]
        batch = _mask_again(objective, batch, own) if not objective.causal else _trim(batch)
        if own >= len(batches):
            batch.labels = torch.full_like(batch.labels, objectives.IGNORE)
        with autocast() if autocast else torch.autocast(device.type, enabled=False):
            loss, n, metrics = objective.loss(model, batch.to(device), want_hits=not objective.causal)
        nats, tokens = nats + loss.double().item(), tokens + n.item()
        hits += metrics["hits"].item() if not objective.causal else 0
    model.train(mode)
    nats, tokens, hits = world.sum([nats, tokens, hits]) if world else (nats, tokens, hits)
    per_token = nats / tokens if tokens else float("nan")
    result = {"nats_per_token": per_token, "perplexity": math.exp(min(per_token, 700)), "tokens": int(tokens),
              "bytes": int(sum(nbytes for _, nbytes in documents))}
    if objective.causal:
        result["bits_per_byte"] = nats / math.log(2) / max(1, result["bytes"])
    else:
        result["accuracy"] = hits / tokens if tokens else float("nan")
    return result


def _trim(batch):
    for name in ("tokens", "labels", "position_ids", "doc_start"):
        setattr(batch, name, getattr(batch, name)[:, :-1])
    return batch


def _mask_again(objective, batch, index):
    """The same masks at every evaluation: they are a function of the batch's number."""
    keys = mix_keys("eval", index, np.arange(len(batch.source)))
    return objective.corrupt(batch, data.RowRandom(keys))


def heldout_documents(shards: Shards, max_tokens: int) -> list:
    """The first held-out documents of a source, whole, up to about `max_tokens` tokens (at least one)."""
    documents, total = [], 0
    for i in range(shards.documents):
        ids, nbytes = shards.text_document(i)
        if documents and total + len(ids) > max_tokens:
            break
        documents.append((ids, nbytes))
        total += len(ids)
    return documents


def protocol(prefix: int, context: int, dtype) -> dict:
    return {"prefix_token_id": prefix, "context": context, "stride": context, "bos_eos_scored": False,
            "dtype": str(dtype).removeprefix("torch."), "documents_see_each_other": False}


@dataclass
class HeldOut:
    """What the evaluations of a run score, and how."""

    documents: dict[str, list]      # {source: [(token ids of the text, bytes)]}
    roles: dict[str, str]           # {source: "domain" or "general"}
    objective: object
    prefix: int                     # the token before each document
    context: int                    # tokens a window
    rows: int                       # windows a forward pass
    autocast: Callable              # () -> context of a forward pass in the run's precision
    dtype: torch.dtype              # what that precision is

    def score(self, model, world) -> dict:
        """{source: {"role", "bits_per_byte", ...}}; the ranks of `world` share the windows."""
        return {name: {"role": self.roles[name],
                       **score(model, self.objective, documents, self.prefix, self.context, world, self.rows,
                               self.autocast)}
                for name, documents in self.documents.items()}

    def protocol(self) -> dict:
        return protocol(self.prefix, self.context, self.dtype)


def table(before: dict | None, after: dict) -> str:
    """Markdown table of bits per byte (masked LM: accuracy) and perplexity, before and after."""
    unit = "accuracy" if any("accuracy" in now for now in after.values()) else "bits_per_byte"
    lines = [f"| text | {unit.replace('_', ' ')} before | after | change | perplexity before | after |",
             "|" + "---|" * 6]
    for name, now in after.items():
        was = (before or {}).get(name, {})
        first, second = (f"{x[unit]:.4f}" if x else "" for x in (was, now))
        change = f"{100 * (now[unit] / was[unit] - 1):+.1f} %" if was.get(unit) else ""
        perplexity = [f"{x['perplexity']:.2f}" if x else "" for x in (was, now)]
        lines.append(f"| {name} | {first} | {second} | {change} | {perplexity[0]} | {perplexity[1]} |")
    return "\n".join(lines)


def samples(model, tokenizer, prompts: list[str], max_new_tokens: int, seed: int) -> list[dict]:
    """What the model makes of each prompt, drawn at temperature 0.7 from the same seed every time."""
    out = []
    for prompt in prompts:
        ids = tokenizer.encode(prompt)
        if tokenizer.add_bos or not ids:
            ids = [token_before_document(tokenizer), *ids]
        settings = Settings(max_new_tokens=max_new_tokens, temperature=0.7, top_p=0.95, seed=seed)
        stop = [tokenizer.eos_id] if tokenizer.eos_id is not None else []
        new = generate(model, ids, settings, eos_ids=stop)
        out.append({"prompt": prompt, "text": tokenizer.decode([i for i in new if i not in stop])})
    return out


def score_files(model, tokenizer, texts: dict[str, str], args) -> tuple[dict, dict]:
    """({name: numbers}, protocol) of text files under a model."""
    context = args.context or min(model.config.max_position_embeddings, 2048)
    prefix, objective, results = token_before_document(tokenizer), objectives.Causal(mask_documents=True), {}
    reading = Reading(args.documents, args.separator, args.column)
    for name, file in texts.items():
        if (Path(file) / "manifest.json").is_file():           # a packed source: its held-out documents
            shards = Shards(file, "heldout")
            check_tokenizer(name, shards, tokenizer, model.config.vocab_size)
            documents = heldout_documents(shards, max_tokens=2**62)
        else:
            raw = [text for text in read_documents([file], reading) if text]
            documents = [(ids, len(utf8(text))) for text, ids in zip(raw, tokenizer.encode_batch(raw)) if len(ids)]
        if not documents:
            raise ValueError(f"text {name} ({file}) is empty")
        results[name] = score(model, objective, documents, prefix, context)
    return results, protocol(prefix, context, next(model.parameters()).dtype)


def checkpoints_of(run: Path):
    """(step, model, tokenizer) of every checkpoint of a run, by number."""
    for step in checkpoint.steps(run / "checkpoints"):
        path = checkpoint.path_of(run / "checkpoints", step)
        checkpoint.verify(path)
        tensors, _, state = checkpoint.load(path)
        adapters = lora.LoraConfig(**state["identity"]["lora"])
        model = hf.load(state["base"]) if adapters.rank else Model(ModelConfig(**state["identity"]["model"]))
        if adapters.rank:
            lora.attach(model, adapters, seed=0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in tensors or not adapters.rank:
                    parameter.copy_(tensors[name])
        yield step, model, tokenizers.load(hf.resolve(state["tokenizer"]))


def main():
    parser = ArgumentParser(prog="eval.py", description=__doc__)
    parser.add_argument("--model", help="Hugging Face folder or hf:// id")
    parser.add_argument("--run", help="a run folder: score each of its checkpoints instead")
    parser.add_argument("--baseline", help="the model before: adds changes and forgetting")
    parser.add_argument("--text", action="append", required=True, metavar="NAME=FILE",
                        help="text to score, or a packed folder, whose held-out documents are scored; repeatable")
    parser.add_argument("--general", action="append", default=[], metavar="NAME",
                        help="a text that is general and whose loss is forgetting; repeatable")
    parser.add_argument("--documents", choices=("line", "blank", "file"), default="file",
                        help="a document of each text file is a line, a block between blank lines, or the file "
                             "(default)")
    parser.add_argument("--separator", help="documents of each text file stand between this string")
    parser.add_argument("--column", default="text", help="where a record keeps its text (default: text)")
    parser.add_argument("--context", type=int, help="tokens a window (default: the model's, at most 2048)")
    parser.add_argument("--dtype", choices=tuple(hf.DTYPES), default="float32")
    parser.add_argument("--device", default="auto", help="default: cuda where there is one, else cpu")
    parser.add_argument("--json", metavar="FILE", help="write the result there")
    args = parser.parse_args()
    if bool(args.model) == bool(args.run):
        raise ValueError("name one of --model and --run")
    if args.context is not None and args.context < 1:
        raise ValueError(f"--context is {args.context}, but a window needs at least 1 token")
    if args.run and (args.baseline or args.general):
        raise ValueError("--baseline and --general go with --model; --run scores each checkpoint alone")
    args.device, texts = pick_device(args.device), {}
    for text in args.text:
        name, equals, file = text.partition("=")
        if not equals or not name:
            raise ValueError(f"--text is {text!r}, but must be NAME=FILE")
        texts[name] = file
    if unknown := [name for name in args.general if name not in texts]:
        raise ValueError(f"--general names {unknown[0]!r}, which no --text has; there are {', '.join(texts)}")

    if args.run:
        result = {"run": args.run, "checkpoints": []}
        for step, model, tokenizer in checkpoints_of(Path(args.run)):
            scores, result["protocol"] = score_files(model.to(args.device), tokenizer, texts, args)
            result["checkpoints"].append({"step": step, "texts": scores})
            print(f"step {step}\n{table(None, scores)}")
        if not result["checkpoints"]:
            raise ValueError(f"{args.run} holds no checkpoints")
    else:
        def score_model(path):
            model = hf.load(path, hf.DTYPES[args.dtype], args.device)
            return score_files(model, tokenizers.load(hf.resolve(path)), texts, args)

        scores, used = score_model(args.model)
        result = {"model": args.model, "texts": scores, "protocol": used}
        before = None
        if args.baseline:
            before, baseline_protocol = score_model(args.baseline)
            result["baseline"] = {"model": args.baseline, "texts": before, "protocol": baseline_protocol}
            result |= verdict.compare(before, scores, args.general)
        print(table(before, scores))
        print(f"windows of {used['context']} tokens, prefix token {used['prefix_token_id']}, {used['dtype']}")
        if before:
            print(verdict.describe(result))
    if args.json:
        write_json(args.json, result)
    return 0


if __name__ == "__main__":
    sys.exit(main_guard(main))
