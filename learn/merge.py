"""Merging: a model between the base and what was trained from it gets back some of what was forgotten, and gives up
some of what was gained.

    linear   base + alpha (result - base)                                       WiSE-FT, arXiv 2109.01903
    slerp    along the arc between the two, each tensor as one vector
    ties     linear, but only for the `density` largest changes of a tensor     arXiv 2306.01708

    base (0, 4), result (2, 5), alpha 0.5:   linear (1, 4.5);   ties with density 0.5 (1, 4), without the change of 1

`merge_tensor` is the arithmetic, and `merge` applies it to folders; forget.merge_best finds the best coefficient.
"""

import math
import shutil
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file

import hf
from core.config import setting
from core.errors import UserError
from core.files import new_folder, read_json, write_json, write_text
from core.foreign_files import own_files
from core.parameter_names import from_hf_name
from learn.method import upcast_dtype

ALPHAS = [i / 10 for i in range(11)]


@dataclass
class MergeConfig:
    """How a result is merged with its base."""

    method: Literal["none", "linear", "ties", "slerp"] = "none"
    """linear: straight between the two; ties: that, for the largest changes only; slerp: along an arc. In a recipe it
    is done after the run, and the best coefficient on the held-out text is exported"""
    alphas: list[float] = setting(ALPHAS, at_least=0, at_most=1)
    """coefficients to try: 0 is the base, 1 the result itself"""
    density: float = setting(0.2, above=0, at_most=1)
    """ties: share of each tensor's changes that is kept, the largest"""

    def __post_init__(self):
        if not self.alphas:
            raise UserError("forget.merge.alphas is empty; name at least one coefficient between 0 and 1")


def merge_tensor(base: torch.Tensor, result: torch.Tensor, alpha: float, method: str = "linear",
                 density: float = 0.2) -> torch.Tensor:
    """The tensor between base (alpha 0) and result (alpha 1), in the wider of their dtypes.

    Rows that only the result has, those of a grown vocabulary, are the result's. At alpha 0 and 1 it is the base and
    the result bit for bit (ties at alpha 1 only with density 1). TIES votes on signs and averages several results; with
    one result, only its choice of the largest changes is left.
    """
    dtype = torch.promote_types(base.dtype, result.dtype)
    if len(result) > len(base):
        old = merge_tensor(base, result[:len(base)], alpha, method, density)
        return torch.cat([old, result[len(base):].to(dtype)])
    base, result = base.to(dtype), result.to(dtype)
    if method == "ties" and density < 1:
        change = (result.to(upcast_dtype(result)) - base).abs().flatten()
        kept = max(1, round(density * len(change)))
        smallest = change.kthvalue(len(change) - kept + 1).values
        return torch.where(change.view(base.shape) >= smallest, merge_tensor(base, result, alpha), base)
    if alpha in (0, 1):
        return result if alpha else base
    between = slerp if method == "slerp" else torch.lerp
    return between(base.to(upcast_dtype(base)), result.to(upcast_dtype(result)), alpha).to(dtype)


def slerp(a: torch.Tensor, b: torch.Tensor, alpha: float) -> torch.Tensor:
    """The tensor alpha of the way along the arc from a to b; along the straight line where there is no arc: one of them
    is zero, or they point the same or the opposite way."""
    length_a, length_b = (torch.linalg.vector_norm(x, dtype=torch.float64).item() for x in (a, b))
    if length_a and length_b:
        u, v = a / length_a, b / length_b
        difference, total = (torch.linalg.vector_norm(x, dtype=torch.float64).item() for x in (u - v, u + v))
        # Training leaves the two nearly parallel. The arccos of their cosine would be rounding noise; this is exact.
        angle = 2 * math.atan2(difference, total)
        if math.sin(angle) > 1e-9:
            return (a * (math.sin((1 - alpha) * angle) / math.sin(angle))
                    + b * (math.sin(alpha * angle) / math.sin(angle)))
    return torch.lerp(a, b, alpha)


class Pair:
    """The folders of a base and of its result, and the tensors between them, read one at a time. names: the tensors
    that can be merged, as Hugging Face calls them."""

    def __init__(self, base, result):
        bases = hf.open_base(base), hf.open_base(result)
        self.folders = [each.folder for each in bases]
        in_base, in_result = self.files = [hf.tensor_files(folder) for folder in self.folders]
        for each, files in zip(bases, self.files):
            hf.check_tied_head(each.config, files, each.folder)
        for names, other, folder in ((in_result, in_base, base), (in_base, in_result, result)):
            lacking = [n for n in names if n not in other and from_hf_name(n) and n != "lm_head.weight"]
            if lacking:
                raise UserError(f"{folder} has no tensor {lacking[0]}; base and result must be of one architecture")
        # A tied head may be stored or not, so one of the two folders may lack it.
        self.names = [name for name in in_result if from_hf_name(name) and name in in_base]
        if "lm_head.weight" in in_result and "lm_head.weight" not in self.names:
            raise UserError(f"{result} has a head of its own and {base} has none; untie the base's to merge them")

    def merge_one(self, name: str, alpha: float, config: MergeConfig) -> torch.Tensor:
        """The tensor `name` between the two folders."""
        base, result = (hf.read_tensor(name, files[name], None) for files in self.files)
        is_vocabulary = name.endswith(("embed_tokens.weight", "lm_head.weight"))
        grown = is_vocabulary and base.shape[1:] == result.shape[1:] and len(base) < len(result)
        if base.shape != result.shape and not grown:
            raise UserError(f"{name} is {list(base.shape)} in {self.folders[0]} and {list(result.shape)} in "
                            f"{self.folders[1]}; only a vocabulary may have grown, and only in the result")
        return merge_tensor(base, result, alpha, config.method, config.density).to(result.dtype)


def merge(base, result, out, alpha: float, config: MergeConfig, card: str = "", overwrite: bool = False) -> dict:
    """Writes the merged model as a Hugging Face folder, whole or not at all; everything but the weights is the
    result's. Memory holds the tensors of one file of the result at a time. card: text for the folder's README."""
    pair, weight_map, size = Pair(base, result), {}, 0
    in_result = pair.files[1]
    with new_folder(out, overwrite, hf.FOLDER) as partial:
        for file in dict.fromkeys(in_result.values()):
            name = file.name.replace("pytorch_model", "model").replace(".bin", ".safetensors")
            tensors = {n: pair.merge_one(n, alpha, config) for n in pair.names if in_result[n] == file}
            save_file(tensors, partial / name, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(tensors, name)
            size += sum(t.nbytes for t in tensors.values())
        dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
        for file in own_files(pair.folders[1], hf.FOLDER.files):
            if "safetensors" not in file.name:
                shutil.copyfile(file, partial / file.name)
        if len(set(weight_map.values())) > 1:
            write_json(partial / "model.safetensors.index.json",
                       {"metadata": {"total_size": size}, "weight_map": weight_map})
        write_json(partial / "config.json", read_json(partial / "config.json") | {"torch_dtype": dtype, "dtype": dtype})
        text = f"{describe(config.method, alpha)}\n{card}"
        write_text(partial / "README.md", hf.make_card(hf.open_base(base), Path(out).name, text))
    return {"method": config.method, "alpha": alpha, "rows": [], "out": str(out)}


def describe(method: str, alpha: float) -> str:
    return f"Merged with its base: {method}, coefficient {alpha:g} (0 is the base, 1 the model that was trained)."


def draw_table(rows: list[dict], general, best: dict) -> str:
    """Markdown: what each coefficient gains and loses. general: names of the general texts."""
    lines = ["| alpha | domain bits per byte | general | domain gain | forgetting | score |", "|" + "---|" * 6]
    for row in rows:
        bits = {name: found["bits_per_byte"] for name, found in row["texts"].items()}
        domain, kept = (statistics.fmean(value for name, value in bits.items() if (name in general) == side)
                        for side in (False, True))
        mark = " (best)" if row is best else ""
        lines.append(f"| {row['alpha']:g}{mark} | {domain:.4f} | {kept:.4f} | {100 * row['domain_gain']:+z.1f} % "
                     f"| {100 * row['forgetting']:+z.1f} % | {row['score']:+z.4f} |")
    return "\n".join(lines)
