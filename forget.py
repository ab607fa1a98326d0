"""Learn the domain and keep the rest: the retention methods, composed.

    python train.py RECIPE.toml --forget.ewc.strength 1 --forget.lwf.alpha 0.5
    python forget.py merge --base DIR --model DIR --out DIR --alpha 0.5
    python forget.py replay --model DIR --documents 1000 --out replay.jsonl

    method    holds back forgetting by                  costs
    freeze    leaving parameters as they are            less than nothing
    ewc       pulling back what general text depends on 2 copies of what trains
    lwf       predicting what the base predicts         the base's forward pass
    adaptive  more replay when general text gets worse  evaluations
    ema       averaging the weights over the run        1 copy of what trains
    merge     going back part of the way, after the run a sweep of evaluations

A method is one file in learn/: its settings, its arithmetic and a class with
the loop's hooks (learn/method.py). It acts on any module whose output layer is
`head` and, to freeze by blocks, whose blocks are `layers`. Where there is no
general text, `replay` samples it from the base (arXiv 2605.26097).
"""

import core.threads

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from tqdm import tqdm

import eval as evaluation
import hf
import tokenizer
from core import cli
from core.config import is_on, setting
from core.devices import DTYPES, pick_device
from core.errors import UserError
from core.files import claim_folder, new_file
from core.parameter_names import from_hf_name, split_experts
from generate import Settings, decode, end_ids, first_ids
from learn.adaptive import Adaptive, AdaptiveConfig
from learn.ema import EMA, EMAConfig
from learn.ewc import EWC, EWCConfig
from learn.freeze import Freeze, FreezeConfig
from learn.lwf import LwF, LwFConfig
from learn.merge import ALPHAS, MergeConfig, Pair, draw_table, merge
from learn.method import Learning, Method
from measure import verdict


@dataclass
class ForgetConfig:
    """Of each section the first setting turns the method on."""

    freeze: FreezeConfig = field(default_factory=FreezeConfig)
    ewc: EWCConfig = field(default_factory=EWCConfig)
    lwf: LwFConfig = field(default_factory=LwFConfig)
    adaptive: AdaptiveConfig = field(default_factory=AdaptiveConfig)
    ema: EMAConfig = field(default_factory=EMAConfig)
    merge: MergeConfig = field(default_factory=MergeConfig)


# In the order in which the loop calls their hooks; merge has none, it comes after the run.
METHODS = (Freeze, EWC, LwF, Adaptive, EMA)


def build(config: ForgetConfig, learning: Learning) -> list[Method]:
    """The methods that are on. UserError where one of them keeps what a base knows and there is no base."""
    on = [name for name, section in vars(config).items() if is_on(section)]
    if not learning.pretrained and (keeps := [name for name in on if name not in ("freeze", "ema")]):
        raise UserError(f"forget.{keeps[0]} keeps what a base knows, and model.init scratch has none; leave it out, or "
                        f"start from a model with --model.init pretrained")
    return [method(getattr(config, method.name), learning) for method in METHODS if method.name in on]


# ---- commands

def merge_best(base, result, out, score, general, config: MergeConfig, dtype: torch.dtype = torch.float32,
               device="cpu", say=print, overwrite: bool = False) -> dict:
    """Tries the coefficients on a model in memory, says what each is worth, and writes the best to the folder `out`.

    score(model, folder) -> {text: {"bits_per_byte", ...}}, where `folder` has the model's tokenizer. general: names of
    the texts whose rise is forgetting. Returns what merge.json holds: {"method", "alpha", "rows", "out"}.
    """
    before = score(hf.load(base, dtype, device), base)
    pair, model, rows = Pair(base, result), hf.load(result, dtype, device), []
    parameters = split_experts(dict(model.named_parameters()))
    for alpha in sorted(set(config.alphas)):
        for name in pair.names:
            # A tied head may be stored all the same; the model has no parameter for it.
            if (ours := from_hf_name(name)) in parameters:
                parameters[ours].detach().copy_(pair.merge_one(name, alpha, config))
        texts = score(model, result)
        rows.append({"alpha": alpha, "texts": texts, **verdict.compare(before, texts, general)})
    if rows[0]["score"] is None:
        raise UserError("a merge is judged on held-out text of the domain and on general text, and one is lacking; "
                        "merge with --alpha instead")
    # Of equal scores max takes the first, the nearest to the base.
    best = max(rows, key=lambda row: row["score"])
    text = draw_table(rows, general, best)
    say(text)
    return merge(base, result, out, best["alpha"], config, f"\n{text}\n", overwrite) | {"rows": rows}


@dataclass(kw_only=True)
class Merge:
    """A model between a base and what was trained from it."""

    base: str
    """What the training began from: a Hugging Face folder or hf://org/name."""
    model: str
    """The model that was trained from it."""
    alpha: float | None = setting(None, at_least=0, at_most=1)
    """The coefficient, how far to go from the base: 0 is the base, 1 the model."""
    domain: list[str] = field(default_factory=list)
    """Held-out text of the domain, instead of --alpha: tries --alphas and keeps the best."""
    general: list[str] = field(default_factory=list)
    """Held-out general text; the best has the most domain gain - max(0, forgetting - 5 %), in bits per byte."""
    merging: MergeConfig = field(default_factory=lambda: MergeConfig("linear"))
    context: int | None = setting(None, above=0)
    """Tokens that are scored together; default: the model's, at most 2048."""
    reading: cli.Reading = field(default_factory=cli.Reading)
    computing: cli.Device = field(default_factory=cli.Device)
    output: cli.Output


def merge_command(c: Merge) -> dict:
    if (c.alpha is not None) == bool(c.domain or c.general) or bool(c.domain) != bool(c.general):
        raise UserError("name either --alpha, or held-out text with both --domain and --general")
    if c.alpha is not None and c.merging.alphas != ALPHAS:
        raise UserError("--alphas are tried on --domain and --general; with --alpha there is nothing to try")
    if c.merging.density != MergeConfig.density and c.merging.method != "ties":
        raise UserError(f"--density is the share of the changes that --method ties keeps, and it is "
                        f"{c.merging.method}; leave it out")
    if c.merging.method == "none":
        raise UserError("--method none merges nothing; choose linear, ties or slerp")
    if both := set(c.domain) & set(c.general):
        raise UserError(f"{min(both)} is named by --domain and by --general; it can be only one of them")
    out, overwrite, texts = c.output.out, c.output.overwrite, {file: file for file in c.domain + c.general}

    def score(model, folder):
        tok = tokenizer.load(hf.open_base(folder).folder)
        return evaluation.score_files(model, tok, texts, c.reading, c.context)[0]

    with claim_folder(out, overwrite, hf.FOLDER):
        if c.alpha is not None:
            found = merge(c.base, c.model, out, c.alpha, c.merging, overwrite=overwrite)
        else:
            found = merge_best(c.base, c.model, out, score, c.general, c.merging, DTYPES[c.computing.dtype],
                               pick_device(c.computing.device), overwrite=overwrite)
    print(f"{out}: {c.merging.method}, {found['alpha']:g} of the way from {c.base} to {c.model}")
    return found


@dataclass(kw_only=True)
class Replay:
    """General text where you have none: documents sampled from the base."""

    model: str
    """The base: a Hugging Face folder or hf://org/name."""
    out: str
    """The jsonl file to write; pack it as a source with the role general."""
    documents: int = setting(1000, above=0)
    """Number of documents to sample; those that come out empty are left out."""
    sampling: Settings = field(default_factory=lambda: Settings(max_new_tokens=512))
    computing: cli.Device = field(default_factory=cli.Device)


def sample_documents(model, tok, settings: Settings, ends: set[int], documents: int, batch: int = 64) -> Iterator[dict]:
    """Yields records {"text", "id", "metadata"}; a document without text is left out. ends: the ids that end one.

    The base is given nothing but the token that begins a document, so it writes what it still has of its training
    text. `batch` documents are decoded side by side, each with a random generator of its own, so that a document is a
    function of the seed and its number alone. Two documents of at most 3 new tokens, where 2 is the end token:

        new ids [5, 6, 2]    the text of 5 6, {"ended": True, "tokens": 3}
                [7, 8, 9]    the text of 7 8 9, {"ended": False, "tokens": 3}
    """
    for first in range(0, documents, batch):
        numbers = range(first, min(first + batch, documents))
        generators = [torch.Generator().manual_seed((settings.seed * 1_000_003 + i) % 2**63) for i in numbers]
        for i, ids in zip(numbers, decode(model, tok, [first_ids(tok, "")] * len(numbers), settings, generators, ends)):
            ended = ids[-1] in ends
            text = tok.decode(ids[:len(ids) - ended]).strip()
            if text:
                yield {"text": text, "id": f"self-{settings.seed}-{i}",
                       "metadata": {"source": "self-generated", "ended": ended, "tokens": len(ids)}}


def replay_command(c: Replay) -> dict:
    if not c.sampling.max_new_tokens or not c.sampling.temperature:
        raise UserError("--max-new-tokens and --temperature must be above 0: at temperature 0 every document would be "
                        "the same")
    folder, lengths = hf.open_base(c.model).folder, []
    tok = tokenizer.load(folder)
    model = hf.load(folder, DTYPES[c.computing.dtype], pick_device(c.computing.device))
    longest = min(c.sampling.max_new_tokens, model.config.max_position_embeddings - 1)
    settings = replace(c.sampling, max_new_tokens=longest)
    # BOS ends a document too, because it begins the next one.
    ends = {*end_ids(folder, tok), *([] if tok.bos_id is None else [tok.bos_id])}
    sampled = sample_documents(model, tok, settings, ends, c.documents)
    with new_file(c.out) as file:
        for record in tqdm(sampled, total=c.documents, unit="document", disable=None):
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            lengths.append(record["metadata"]["tokens"])
        if not lengths:
            raise UserError(f"{c.model} ended each of {c.documents} documents before its first token; is it a base "
                            f"model?")
    print(f"{c.out}: {len(lengths):,} documents, {sum(lengths):,} tokens sampled from {c.model}; pack it as a general "
          f"source")
    return {"out": c.out, "documents": len(lengths), "tokens": sum(lengths)}


def main() -> int:
    return cli.run("forget.py", __doc__, {"merge": (Merge, merge_command), "replay": (Replay, replay_command)})


if __name__ == "__main__":
    sys.exit(main())
