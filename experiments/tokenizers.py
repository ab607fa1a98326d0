"""Tokenizers: what an extension of the vocabulary does to a base model, and which serves a model from scratch.

    python experiments/tokenizers.py --data DIR --out out/tokenizers       some twenty minutes on two cores
    python experiments/tokenizers.py --data DIR --out out/tokenizers --part kinds
    python experiments/tokenizers.py --data DIR --out out/tokenizers --quick         one seed, two methods, no results

DIR holds models/stories260K and corpora/. All results are held-out bits per byte after training on the same bytes of
text, because tokens of two vocabularies stand for different amounts of it.

1. extension: stories260K (512 tokens, children's stories) is continued on the DC Code with recipes/cpt.toml, on the
   domain alone: as it is, and with 500 new tokens learned from the training documents, whose rows are the mean of their
   parts (the default) or random. General text is scored too. A step has 8,192 tokens in all runs, so longer tokens mean
   fewer steps for the same bytes: 26 instead of 45.
2. kinds: BPE, Unigram and WordPiece of --vocab-sizes ids, learned from the same text, and the same blocks trained from
   scratch with each on --megabytes of it. A larger vocabulary has a larger embedding, and fewer updates for the same
   bytes. WordPiece drops white space at no cost, so its result looks better than it is. Full size: --part kinds
   --recipe recipes/scratch_full.toml --size 100M --vocab-sizes 8000 16000 32000 64000 --megabytes 4000 --jobs 1
   --text FILE...
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Literal, get_args

from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent
# The checkout, wherever this file is run from; and this folder last, because `import tokenizers` means the library.
sys.path[:] = [str(HERE.parent), *(path for path in sys.path if Path(path).resolve() != HERE), str(HERE)]

import scratch  # noqa: E402
from forgetting import RESULTS, save_study  # noqa: E402
from scratch import SIZES, choose_results  # noqa: E402

import tokenizer  # noqa: E402
from core import cli  # noqa: E402
from core.config import read_toml, setting  # noqa: E402
from core.errors import UserError  # noqa: E402
from core.files import read_json  # noqa: E402
from text.corpus import read_documents, utf8  # noqa: E402
from text.extend_vocabulary import NewRows, extend  # noqa: E402
from text.heldout import is_held_out, normalise  # noqa: E402
from text.shards import pack  # noqa: E402
from text.train_vocabulary import Kind, measure_kind  # noqa: E402

NAMES = {"bpe": "BPE", "unigram": "Unigram", "wordpiece": "WordPiece"}
LEGAL = ("corpora/legal_en_dc/dc_code_title16.txt", "corpora/legal_en_dc/dc_code_title28.txt")
STORIES, BASE = "corpora/tinystories/tinystories_sample_2MiB.txt", "models/stories260K"
NEW_TOKENS, HELDOUT, STEP_TOKENS = 500, 0.04, 16 * 512
FULL = {"methods": ("unextended", "subtoken", "random"), "seeds": (0, 1), "megabytes": 0.6, "evaluations": 3,
        "eval_tokens": 12_000}
QUICK = {"methods": ("subtoken", "random"), "seeds": (0,), "megabytes": 0.1, "evaluations": 1, "eval_tokens": 6_000}


@dataclass(kw_only=True)
class Study:
    data: str
    """A folder with models/stories260K and corpora/."""
    out: str = "out/tokenizers"
    """The folder to work in."""
    part: Literal["both", "extension", "kinds"] = "both"
    """What is studied."""
    quick: bool = False
    """One seed of two methods of the extension; the results stay in --out."""
    text: list[str] = setting([])
    """kinds: text files; default: the two laws in --data."""
    vocab_sizes: list[int] = setting([500, 1000, 2000], above=256)
    """kinds: ids of the vocabularies."""
    megabytes: float = setting(0.6, above=0)
    """kinds: bytes of text that each model is trained on, in millions."""
    size: Literal[*SIZES] = "83K"
    """kinds: parameters without the embedding."""
    recipe: str = "recipes/scratch.toml"
    """kinds: settings of every run."""
    seeds: list[int] = setting([0, 1], at_least=0)
    """kinds: each model is trained once for each."""
    jobs: int = setting(2, above=0)
    """kinds: runs at a time."""


def prepare(data: Path, out: Path) -> dict:
    """Write the extended tokenizer, learned without held-out documents, and shards for both vocabularies into `out`;
    returns {new id: old ids}."""
    general = read_documents([str(data / STORIES)], cli.Reading(separator="<|endoftext|>"))
    domain = read_documents([str(data / file) for file in LEGAL])
    texts = {"domain": list(domain), "general": list(filter(None, general))}
    learn = [text for text in texts["domain"] if not is_held_out(utf8(text), HELDOUT)]
    parts = extend(data / BASE, learn, NEW_TOKENS, out / "tokenizer")
    for vocabulary, folder in (("base", data / BASE), ("extended", out / "tokenizer")):
        for side, documents in texts.items():
            pack(documents, tokenizer.load(folder), out / f"shards/{vocabulary}/{side}", heldout=HELDOUT)
    return parts


def continue_base(data: Path, out: Path, method: str, size: dict, parts: dict) -> dict:
    """Train part 1's runs of a method: a row of means over the seeds, with the bits per byte and the curve of each."""
    vocabulary, model = "base" if method == "unextended" else "extended", data / BASE
    shards = out / f"shards/{vocabulary}"
    packed = read_json(shards / "domain/manifest.json")["splits"]["train"]
    per_byte = packed["tokens"] / packed["bytes"]
    steps = max(1, round(size["megabytes"] * 1e6 * per_byte / STEP_TOKENS))
    runs, curves = [], []
    for seed in size["seeds"]:
        folder = out / f"runs/{method}_{seed}"
        if method != "unextended":
            model = out / f"models/{method}_{seed}"
            tokenizer.save_model(data / BASE, out / "tokenizer", parts, model, NewRows(method, seed))
        cli.run_command(
            "train.py", cli.ROOT / "recipes/cpt.toml", "--model.path", model, "--data.schedule", "domain_only",
            "--forget.lwf.alpha", 0, "--data.sources.domain.path", shards / "domain", "--data.sources.general.path",
            shards / "general", "--train.steps", steps, "--eval.every", -(-steps // size["evaluations"]),
            "--eval.tokens", size["eval_tokens"], "--eval.sample-tokens", 0, "--optim.lr", 1e-3, "--optim.min-lr", 1e-4,
            "--seed", seed, "--out", folder, show=True)
        found = read_json(folder / "eval.json")
        runs.append({f"{side}_{when}": found[when][side]["bits_per_byte"] for side in ("domain", "general")
                     for when in ("before", "after")})
        # A curve has points (megabytes read, bits per byte of the domain).
        curves.append(sorted((at["step"] * STEP_TOKENS / per_byte / 1e6, at["texts"]["domain"]["bits_per_byte"])
                             for at in map(read_json, folder.glob("eval_step_*.json"))))
    means = {key: mean(run[key] for run in runs) for key in runs[0]}
    return {"method": method, "bits_per_byte": means.pop("domain_after"),
            "by_seed": [run["domain_after"] for run in runs], "steps": steps, "tokens_per_byte": per_byte, **means,
            "curves": curves}


def draw_extension(rows: list[dict]) -> Figure:
    """Bits per byte over the bytes read; bands span the seeds."""
    figure = Figure(figsize=(7, 4.2), layout="constrained", dpi=130)
    axes = figure.subplots()
    axes.set(xlabel="megabytes of legal text read", ylabel="held-out bits per byte", title="stories260K, continued")
    for row in rows:
        x = [point[0] for point in row["curves"][0]]
        points = [[point[1] for point in at] for at in zip(*row["curves"])]
        line, = axes.plot(x, list(map(mean, points)), marker="o", ms=3, label=row["method"])
        axes.fill_between(x, list(map(min, points)), list(map(max, points)), color=line.get_color(), alpha=0.2)
    axes.legend()
    return figure


def study_extension(options: Study, data: Path, out: Path) -> None:
    began, size, results = time.perf_counter(), *((QUICK, out) if options.quick else (FULL, RESULTS))
    parts = prepare(data, out)
    rows = [continue_base(data, out, method, size, parts) for method in size["methods"]]
    print(f"\n{'method':11} {'tokens/byte':>11} {'bits per byte':>13}  (seeds)")
    for r in rows:
        print(f"{r['method']:11} {r['tokens_per_byte']:11.3f} {r['bits_per_byte']:13.4f}  "
              f"({min(r['by_seed']):.4f} to {max(r['by_seed']):.4f})")
    save_study("tokenizers", size["seeds"], results, rows, draw_extension(rows), began, megabytes=size["megabytes"])


# ---- part 2

def measure_vocabulary(kind: str, vocab_size: int, texts: list[str], c: Study, out: Path) -> dict:
    """Train a tokenizer on the documents that are not held out, measure it on the others, and pack all of them."""
    name, sides = f"{kind}_{vocab_size}", ([], [])
    for text in texts:
        sides[is_held_out(utf8(normalise(text)), scratch.HELDOUT)].append(text)
    found = measure_kind(kind, *sides, vocab_size, out / f"tokenizers/{name}")
    scratch.pack_text(texts, out / f"shards/{name}", out / f"tokenizers/{name}")
    packed = read_json(out / f"shards/{name}/manifest.json")["splits"]["train"]
    recipe = read_toml(cli.ROOT / c.recipe)
    per_step = recipe["train"]["batch_size"] * recipe["data"]["context"]
    steps = max(1, round(c.megabytes * 1e6 * packed["tokens"] / packed["bytes"] / per_step))
    keys = ("tokens_per_byte", "exact", "unknown")
    return {"kind": kind, "vocab_size": vocab_size, "ids": found["ids"], "steps": steps, **{k: found[k] for k in keys}}


def train_kind(row: dict, seed: int, c: Study, out: Path) -> float:
    """Held-out bits per byte of a model from scratch; all of the held-out text, the same for every tokenizer."""
    name = f"{row['kind']}_{row['vocab_size']}"
    scores, _ = scratch.train_model(c, out / f"runs/{name}_{seed}", out / f"tokenizers/{name}", [
        *scratch.size_words(c.size), "--data.sources.text.path", out / f"shards/{name}", "--train.steps", row["steps"],
        "--eval.tokens", 10**10], seed)
    bits = scores["text"]["bits_per_byte"]
    print(f"{row['kind']:9} {row['vocab_size']:6} ids, seed {seed}: {bits:.4f} bits per byte", flush=True)
    return bits


def describe_kinds(rows: list[dict], megabytes: float) -> str:
    """A paragraph that is true of any result. A difference counts where it is larger than the seeds' spread."""
    noise = max(max(row["by_seed"]) - min(row["by_seed"]) for row in rows)
    words = [f"All models read {megabytes:g} MB; the seeds of one spread by up to {noise:.4f} bits per byte."]
    for size in sorted({row["vocab_size"] for row in rows}):
        ranked = sorted((row for row in rows if row["vocab_size"] == size), key=lambda row: row["bits_per_byte"])
        lead = ranked[1]["bits_per_byte"] - ranked[0]["bits_per_byte"]
        first, second = (NAMES[row["kind"]] for row in ranked[:2])
        words.append(f"With {size:,} ids {first} is best ({ranked[0]['bits_per_byte']:.3f}), ahead of {second} by "
                     f"{lead:.3f}, {'' if lead > noise else 'no '}more than the seeds spread.")
    for kind in dict.fromkeys(row["kind"] for row in rows):
        same = sorted((row for row in rows if row["kind"] == kind), key=lambda row: row["vocab_size"])
        change = same[-1]["bits_per_byte"] - same[0]["bits_per_byte"]
        judged = "does not change" if abs(change) <= noise else "gets better" if change < 0 else "gets worse"
        words.append(f"{NAMES[kind]} {judged} from {same[0]['vocab_size']:,} to {same[-1]['vocab_size']:,} ids "
                     f"({change:+.3f}), with {same[-1]['steps']} updates instead of {same[0]['steps']}.")
    if lossy := sorted({NAMES[row["kind"]] for row in rows if row["exact"] < 0.5}):
        words.append(f"{' and '.join(lossy)} cannot give most documents back as they were (white space, "
                     f"unknown characters), and pays nothing for what it drops.")
    return " ".join(words)


def draw_kinds(rows: list[dict]) -> Figure:
    """Bits per byte, and tokens per byte, over the size of the vocabulary; bars span the seeds."""
    figure = Figure(figsize=(10, 4.2), layout="constrained", dpi=130)
    left, right = figure.subplots(1, 2)
    for kind in dict.fromkeys(row["kind"] for row in rows):
        same = [row for row in rows if row["kind"] == kind]
        x, bits = [row["vocab_size"] for row in same], [row["bits_per_byte"] for row in same]
        ends = [[b - min(row["by_seed"]) for b, row in zip(bits, same)],
                [max(row["by_seed"]) - b for b, row in zip(bits, same)]]
        label = kind + (" (drops white space)" if min(row["exact"] for row in same) < 0.5 else "")
        left.errorbar(x, bits, ends, marker="o", capsize=4, label=label)
        right.plot(x, [row["tokens_per_byte"] for row in same], marker="o", label=kind)
    left.set(xscale="log", xlabel="ids", ylabel="held-out bits per byte", title="from scratch, the same bytes")
    right.set(xscale="log", xlabel="ids", ylabel="tokens per byte")
    left.legend(frameon=False)
    return figure


COLUMNS = {"kind": ("kind", ""), "ids": ("ids", ",d"), "tokens per byte": ("tokens_per_byte", ".3f"),
           "updates": ("steps", ",d"), "bits per byte": ("bits_per_byte", ".4f"), "exact": ("exact", ".1%"),
           "unknown": ("unknown", ".2%")}


def study_kinds(options: Study, data: Path, out: Path) -> None:
    began = time.perf_counter()
    files = options.text or [str(data / file) for file in LEGAL]
    texts = scratch.read_text(files, None)
    rows = [measure_vocabulary(kind, size, texts, options, out) for size in options.vocab_sizes
            for kind in get_args(Kind)]
    asked = [(row, seed, options, out) for row in rows for seed in options.seeds]
    bits = iter(scratch.run_all(options.jobs, train_kind, asked))
    for row in rows:
        row["by_seed"] = [next(bits) for _ in options.seeds]
        row["bits_per_byte"] = mean(row["by_seed"])
    shows = describe_kinds(rows, options.megabytes)
    print(f"\n{scratch.format_table(rows, COLUMNS)}\n\n{shows}")
    results = choose_results(options, out, "data", "out", "jobs", "part")
    save_study("tokenizer_kinds", options.seeds, results, rows, draw_kinds(rows), began, "tokenizers",
               megabytes=options.megabytes, shows=shows)


def study(options: Study) -> None:
    data = Path(options.data).resolve()
    needed = [] if options.part == "kinds" else [BASE, STORIES, *LEGAL]
    needed += LEGAL if options.part != "extension" and not options.text else []
    for name in needed:
        if not (data / name).exists():
            raise UserError(f"{data / name} does not exist; name a folder that has it as --data")
    out = scratch.make_folder(options)
    if options.part != "kinds" or options.quick:
        study_extension(options, data, out)
    if options.part != "extension" and not options.quick:
        study_kinds(options, data, out)


if __name__ == "__main__":
    sys.exit(cli.run("experiments/tokenizers.py", __doc__, (Study, study)))
