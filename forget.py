"""Learn the domain and keep the rest: freezing, EWC and L2-SP, LwF, adaptive replay, weight averages, merging.

    python train.py RECIPE.toml --forget.ewc.strength 1 --forget.lwf.alpha 0.5 --forget.adaptive.policy budget
    python forget.py merge --base DIR --model DIR --out DIR --alpha 0.5
    python forget.py merge --base DIR --model DIR --out DIR --domain law.txt --general wiki.txt    finds the coefficient
    python forget.py replay --model DIR --documents 1000 --out replay.jsonl    general text where you have none

| method   | holds back forgetting by                               | costs                                          |
|----------|--------------------------------------------------------|------------------------------------------------|
| freeze   | leaving parameters as they are                         | less than nothing: no gradients, no moments    |
| ewc      | pulling back what general text depends on              | 2 copies of what trains (L2-SP: 1)             |
| lwf      | keeping the predictions close to the base's            | the base's forward pass, and without adapters  |
|          |                                                        | a copy of its weights                          |
| adaptive | more replay when general text is being forgotten       | evaluations                                    |
| ema      | averaging the weights over the run                     | 1 copy of what trains                          |
| merge    | going back part of the way to the base, after the run  | a sweep of evaluations                         |

Each method is one file in learn/: its settings, its arithmetic, and a class with the loop's hooks (learn/method.py).
They act on any module whose output layer is `head` and, to freeze by blocks, whose blocks are `layers`. This file
composes them.
"""

import core.threads

import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

import eval as evaluation
import hf
import tokenizer
from core.cli import Reading
from core.config import ArgumentParser, main_guard, write_json
from core.devices import pick_device
from generate import Settings, decode, end_ids, first_ids
from learn.adaptive import AdaptiveConfig, AdaptiveReplay
from learn.ema import EMA, EMAConfig
from learn.ewc import EWC, EWCConfig
from learn.freeze import Freeze, FreezeConfig
from learn.lwf import LwF, LwFConfig
from learn.merge import MergeConfig, Pair, merge
from learn.method import Learning, Method
from learn.self_replay import sample_documents
from measure import verdict


@dataclass
class ForgetConfig:
    freeze: FreezeConfig = field(default_factory=FreezeConfig)
    ewc: EWCConfig = field(default_factory=EWCConfig)
    lwf: LwFConfig = field(default_factory=LwFConfig)
    adaptive: AdaptiveConfig = field(default_factory=AdaptiveConfig)
    ema: EMAConfig = field(default_factory=EMAConfig)
    merge: MergeConfig = field(default_factory=MergeConfig)


def build(config: ForgetConfig, learning: Learning) -> list[Method]:
    """The methods that are on, in the order in which the loop calls their hooks."""
    methods = []
    if config.freeze.schedule != "none":
        methods.append(Freeze(config.freeze, learning))
    if config.ewc.strength:
        methods.append(EWC(config.ewc, learning))
    if config.lwf.alpha:
        methods.append(LwF(config.lwf, learning))
    if config.adaptive.policy != "none":
        methods.append(AdaptiveReplay(config.adaptive, learning))
    if config.ema.decay:
        methods.append(EMA(config.ema))
    if config.merge.method != "none":
        learning.require_base("forget.merge")
    return methods


# ---- command merge

def sweep(base, result, score, general, alphas, method: str = "linear", density: float = 0.2,
          dtype: torch.dtype = torch.float32, device="cpu") -> list[dict]:
    """Rows {"alpha", "texts", "domain_gain", "forgetting", "score"} of the merged models, by rising alpha.

    score(model, folder) -> {text: {"bits_per_byte", ...}}, `folder` being where the model's tokenizer is; `general`
    names the texts whose rise is forgetting. The score is domain gain - max(0, forgetting - 5 %) (eval.compare).
    """
    before = score(hf.load(base, dtype, device), base)
    pair, model, rows = Pair(base, result), hf.load(result, dtype, device), []
    parameters = dict(model.named_parameters())
    for alpha in sorted(set(alphas)):
        with torch.no_grad():
            for name in pair.names:
                if hf.from_hf_name(name) in parameters:              # a tied head that is stored all the same is not
                    parameters[hf.from_hf_name(name)].copy_(pair.merge_one(name, alpha, method, density))
        texts = score(model, result)
        rows.append({"alpha": alpha, "texts": texts, **verdict.compare(before, texts, general)})
    return rows


def merge_best(base, result, out, score, general, config: MergeConfig, dtype: torch.dtype = torch.float32,
               device="cpu", say=print) -> dict:
    """Sweep the coefficients, say what each is worth, and write the model of the best to `out`."""
    rows = sweep(base, result, score, general, config.alphas, config.method, config.density, dtype, device)
    if rows[0]["score"] is None:
        raise ValueError("a merge is judged on held-out text of the domain and on general text, and one is lacking; "
                         "merge with --alpha instead")
    best = max(rows, key=lambda row: row["score"])                   # of equals the nearest to the base
    text = table(rows, general, best)
    say(text)
    merge(base, result, out, best["alpha"], config.method, config.density, f"\n{text}\n")
    return {"method": config.method, "alpha": best["alpha"], "rows": rows, "out": str(out)}


def table(rows: list[dict], general, best: dict) -> str:
    """Markdown: what each coefficient gains and loses."""
    lines = ["| alpha | domain bits per byte | general | domain gain | forgetting | score |", "|" + "---|" * 6]
    for row in rows:
        parts = {True: [], False: []}
        for name, numbers in row["texts"].items():
            parts[name in general].append(numbers["bits_per_byte"])
        means = [sum(values) / len(values) for values in (parts[False], parts[True])]
        mark = " (best)" if row is best else ""
        lines.append(f"| {row['alpha']:g}{mark} | {means[0]:.4f} | {means[1]:.4f} | {100 * row['domain_gain']:+.1f} % "
                     f"| {100 * row['forgetting']:+.1f} % | {row['score']:+.4f} |")
    return "\n".join(lines)


def merge_command(args) -> dict:
    texts = {file: file for file in (args.domain or []) + (args.general or [])}
    if (args.alpha is not None) == bool(texts) or bool(args.domain) != bool(args.general):
        raise ValueError("name either --alpha, or held-out text with both --domain and --general")
    if args.alpha is not None and args.alphas:
        raise ValueError("--alphas are tried on --domain and --general; with --alpha there is nothing to try")
    if args.density is not None and args.method != "ties":
        raise ValueError(f"--density is the share of the changes that --method ties keeps, and it is {args.method}; "
                         f"leave it out")
    args.density = MergeConfig().density if args.density is None else args.density
    if args.alpha is not None:
        merge(args.base, args.model, args.out, args.alpha, args.method, args.density)
        print(f"{args.out}: {args.method}, {args.alpha:g} of the way from {args.base} to {args.model}")
        return {"method": args.method, "alpha": args.alpha, "rows": [], "out": args.out}
    if both := set(args.domain) & set(args.general):
        raise ValueError(f"{min(both)} is named by --domain and by --general; it can be only one of them")
    if Path(args.out).exists():
        raise ValueError(f"{args.out} exists; name another folder with --out")
    config = MergeConfig(args.method, args.alphas or MergeConfig().alphas, args.density)

    def score(model, folder):
        reading = Reading(args.documents, args.separator, args.column)
        return evaluation.score_files(model, tokenizer.load(hf.resolve(folder)), texts, reading, args.context)[0]

    found = merge_best(args.base, args.model, args.out, score, args.general, config, hf.DTYPES[args.dtype],
                       pick_device(args.device))
    print(f"{args.out}: {args.method}, {found['alpha']:g} of the way from {args.base} to {args.model}")
    return found


def merge_arguments(p: ArgumentParser):
    p.add_argument("--base", required=True, metavar="DIR", help="what the training began from")
    p.add_argument("--model", required=True, metavar="DIR", help="what came of it")
    p.add_argument("--out", required=True, metavar="DIR", help="new folder")
    p.add_argument("--method", choices=("linear", "ties", "slerp"), default="linear", help="default %(default)s")
    p.add_argument("--alpha", type=float, help="0: the base, 1: the result")
    p.add_argument("--domain", nargs="+", metavar="FILE", help="held-out text of the domain: try --alphas, keep the "
                   "best by domain gain - max(0, forgetting - 5 %%), in bits per byte")
    p.add_argument("--general", nargs="+", metavar="FILE", help="held-out general text")
    p.add_argument("--alphas", type=float, nargs="+", metavar="A", help="default: 0 to 1 in steps of 0.1")
    p.add_argument("--density", type=float, help="ties: share of the changes kept (default 0.2)")
    p.add_argument("--documents", choices=("line", "blank", "file"), default="file",
                   help="a document of a text file is a line, a block between blank lines, or the file (default)")
    p.add_argument("--separator", help="documents of a text file stand between this string")
    p.add_argument("--column", default="text", help="where a record keeps its text (default: text)")
    p.add_argument("--context", type=int, help="tokens a window (default: the model's, at most 2048)")


# ---- command replay

def replay_command(args) -> dict:
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

    def decode_side_by_side(prompts, generators):
        return decode(model, prompts, settings, generators, ends)

    out, records, tokens = Path(args.out), 0, 0
    if out.is_dir():
        raise ValueError(f"{out} is a folder; name a file with --out, e.g. {out / 'replay.jsonl'}")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f"{out.name}.tmp{os.getpid()}")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            drawn = sample_documents(decode_side_by_side, tok, first_ids(tok, ""), ends, args.documents, args.seed)
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


def replay_arguments(p: ArgumentParser):
    p.add_argument("--model", required=True, metavar="DIR", help="the base")
    p.add_argument("--out", required=True, metavar="FILE")
    p.add_argument("--documents", type=int, default=1000, help="default %(default)s")
    p.add_argument("--max-new-tokens", type=int, default=512, help="of a document (default %(default)s)")
    p.add_argument("--temperature", type=float, default=1.0, help="default 1, the base's own distribution")
    p.add_argument("--top-p", type=float, default=1.0, help="default 1; less cuts the unlikely tokens off")
    p.add_argument("--seed", type=int, default=0)


def main() -> int:
    commands = {"merge": (merge_arguments, merge_command, "a model between base and result"),
                "replay": (replay_arguments, replay_command, "general text drawn from the base")}
    if sys.argv[1:2] and sys.argv[1] in commands:
        arguments, command, what = commands[sys.argv[1]]
        p = ArgumentParser(prog=f"forget.py {sys.argv[1]}", description=what)
        arguments(p)
        p.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32",
                       help="in which the model computes (default %(default)s)")
        p.add_argument("--device", default="auto", help="default: cuda where there is one, else cpu")
        p.add_argument("--json", metavar="FILE", help="write what is printed as data")
        args = p.parse_args(sys.argv[2:])
        result = command(args)
        if args.json:
            write_json(args.json, result)
        return 0
    parser = ArgumentParser(prog="forget.py", description=__doc__)
    choice = parser.add_subparsers(dest="command", required=True, metavar="|".join(commands))
    for name, (_, _, what) in commands.items():
        choice.add_parser(name, help=what)
    parser.parse_args()
    return 0


if __name__ == "__main__":
    sys.exit(main_guard(main))
