"""Between a base and what was trained from it: some of what was forgotten comes back, for some of the domain's gain.

    python forget.py merge --base DIR --model DIR --out DIR --alpha 0.5
    python forget.py merge --base DIR --model DIR --out DIR --domain law.txt --general wiki.txt    finds the coefficient

`merge_tensor` is the arithmetic, `merge` applies it to folders a tensor at a time, `sweep` scores coefficients on
held-out text, and `merge_best` writes the best; train.py does that at a run's end with --forget.merge.method.
"""

import math
import re
import shutil
import types
from pathlib import Path

import torch
from safetensors.torch import save_file

import eval as evaluation
import hf
import tokenizer
from core.config import ArgumentParser, write_json
from forget import MergeConfig, check_coefficients, wide
from generate import pick_device
from measure import verdict


def merge_tensor(base: torch.Tensor, result: torch.Tensor, alpha: float, method: str = "linear",
                 density: float = 0.2) -> torch.Tensor:
    """A tensor between base (alpha 0) and result (alpha 1), in the wider of their dtypes; rows that only the result has
    stay its own. Both ends are bit for bit those tensors (the result's of ties where density is 1).

    linear: base + alpha (result - base) (WiSE-FT, arXiv 2109.01903). slerp: along the arc between the two, as one
    vector each. ties: only the `density` largest changes of the tensor (arXiv 2306.01708; the vote on signs and the
    mean need several results, and with one nothing is left of them).
    """
    dtype = torch.promote_types(base.dtype, result.dtype)
    if len(result) > len(base):
        old = merge_tensor(base, result[:len(base)], alpha, method, density)
        return torch.cat([old, result[len(base):].to(dtype)])
    base, result = base.to(dtype), result.to(dtype)
    if method == "ties" and density < 1:
        change = (result.to(wide(result)) - base).abs().flatten()
        kept = max(1, round(density * len(change)))
        least = change.kthvalue(len(change) - kept + 1).values
        return torch.where(change.view(base.shape) >= least, merge_tensor(base, result, alpha), base)
    if alpha in (0, 1):
        return result if alpha else base
    a, b = base.to(wide(base)), result.to(wide(result))
    if method == "slerp":
        lengths = [torch.linalg.vector_norm(x, dtype=torch.float64).item() for x in (a, b)]
        if min(lengths) > 0:
            u, v = a / lengths[0], b / lengths[1]
            apart, along = (torch.linalg.vector_norm(x, dtype=torch.float64).item() for x in (u - v, u + v))
            angle = 2 * math.atan2(apart, along)     # arccos of a cosine near 1, as here, would be noise
            if math.sin(angle) > 1e-9:
                return (a * (math.sin((1 - alpha) * angle) / math.sin(angle))
                        + b * (math.sin(alpha * angle) / math.sin(angle))).to(dtype)
    return torch.lerp(a, b, alpha).to(dtype)


class Pair:
    """The tensors of a base and of what was made of it, read one at a time."""

    def __init__(self, base, result):
        self.folders = [hf.resolve(base), hf.resolve(result)]
        self.files = [hf.tensor_files(folder) for folder in self.folders]
        self.names = [name for name in self.files[1] if hf.from_hf_name(name)]
        for names, other, folder in ((self.names, self.files[0], base), (self.files[0], self.files[1], result)):
            lacking = [n for n in names if n not in other and hf.from_hf_name(n) and n != "lm_head.weight"]
            if lacking:
                raise ValueError(f"{folder} has no tensor {lacking[0]}; base and result must be of one architecture")
        self.names = [name for name in self.names if name in self.files[0]]     # a tied head may be stored or not
        if "lm_head.weight" in self.files[1] and "lm_head.weight" not in self.names:
            raise ValueError(f"{result} has a head of its own and {base} has none; untie the base's to merge them")

    def merged(self, name: str, alpha: float, method: str, density: float) -> torch.Tensor:
        tensors = []
        for files in self.files:
            with hf.open_tensors(files[name]) as opened:
                tensors.append(opened.get_tensor(name))
        base, result = tensors
        rows = name.endswith(("embed_tokens.weight", "lm_head.weight"))
        if base.shape != result.shape and not (rows and base.shape[1:] == result.shape[1:] and len(base) < len(result)):
            raise ValueError(f"{name} is {list(base.shape)} in {self.folders[0]} and {list(result.shape)} in "
                             f"{self.folders[1]}; only a vocabulary may have grown, and only in the result")
        return merge_tensor(base, result, alpha, method, density)


def merge(base, result, out, alpha: float, method: str = "linear", density: float = 0.2, card: str = ""):
    """Write the merged model as a Hugging Face folder, whole or not at all; all but the weights is the result's. In
    memory is one of the result's files at a time."""
    check_coefficients(alpha, density)
    pair, out = Pair(base, result), Path(out)
    if out.exists():
        raise ValueError(f"{out} exists; name another folder with --out")
    with hf.replacing(out) as temporary:
        weight_map, size, dtype = {}, 0, None
        for file in dict.fromkeys(pair.files[1].values()):
            name = file.name.replace("pytorch_model", "model").replace(".bin", ".safetensors")
            tensors = {n: pair.merged(n, alpha, method, density) for n in pair.names if pair.files[1][n] == file}
            save_file(tensors, temporary / name, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(tensors, name)
            size, dtype = size + sum(t.nbytes for t in tensors.values()), next(iter(tensors.values())).dtype
        for file in pair.folders[1].iterdir():
            if file.is_file() and not re.search(r"\.(safetensors|bin)(\.index\.json)?$", file.name):
                shutil.copyfile(file, temporary / file.name)
        if len(set(weight_map.values())) > 1:
            write_json(temporary / "model.safetensors.index.json",
                       {"metadata": {"total_size": size}, "weight_map": weight_map})
        config, name = hf.read_json(temporary / "config.json"), str(dtype).removeprefix("torch.")
        write_json(temporary / "config.json", {**config, "torch_dtype": name, "dtype": name})
        with open(temporary / "README.md", "a", encoding="utf-8") as readme:
            readme.write(f"\n## Merged with its base\n\n{method}, coefficient {alpha:g} (0 is the base, 1 the model "
                         f"that was trained).\n{card}\n")


def sweep(base, result, score, general, alphas, method: str = "linear", density: float = 0.2,
          dtype: torch.dtype = torch.float32, device="cpu") -> list[dict]:
    """Rows {"alpha", "texts", "domain_gain", "forgetting", "score"} of the merged models, by rising alpha.

    score(model, folder) -> {text: {"bits_per_byte", ...}}, `folder` being where the model's tokenizer is; `general`
    names the texts whose rise is forgetting. The score is domain gain - max(0, forgetting - 5 %) (measure/verdict.py).
    """
    before = score(hf.load(base, dtype, device), base)
    pair, model, rows = Pair(base, result), hf.load(result, dtype, device), []
    parameters = dict(model.named_parameters())
    for alpha in sorted(set(alphas)):
        with torch.no_grad():
            for name in pair.names:
                if hf.from_hf_name(name) in parameters:              # a tied head that is stored all the same is not
                    parameters[hf.from_hf_name(name)].copy_(pair.merged(name, alpha, method, density))
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


# ---- command

def command(args) -> dict:
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
        return evaluation.score_files(model, tokenizer.load(hf.resolve(folder)), texts, types.SimpleNamespace(
            context=args.context, documents=args.documents, separator=args.separator, column=args.column))[0]

    found = merge_best(args.base, args.model, args.out, score, args.general, config, hf.DTYPES[args.dtype],
                       pick_device(args.device))
    print(f"{args.out}: {args.method}, {found['alpha']:g} of the way from {args.base} to {args.model}")
    return found


def arguments(p: ArgumentParser):
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
