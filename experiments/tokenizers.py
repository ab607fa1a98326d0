"""Tokenizers: what an extension of the vocabulary does to a base model, and which kind serves a model from scratch.

    python experiments/tokenizers.py --data DIR --out out/tokenizers       about a quarter of an hour on two cores
    python experiments/tokenizers.py --data DIR --out out/tokenizers --quick         one seed, two methods, no results

DIR holds models/stories260K and corpora/. All results are held-out bits per byte after training on the same bytes of
text, because tokens of two vocabularies stand for different amounts of it.

1. stories260K (512 tokens, children's stories) is continued on the DC Code with recipes/cpt.toml, on the domain alone:
   as it is, and with 500 new tokens learned from the training documents, whose rows are the mean of their parts (the
   default) or random. General text is scored too. A step has 8,192 tokens in all runs, so longer tokens mean fewer
   steps for the same bytes: 26 instead of 45.
2. `tokenizer.py compare`: BPE, Unigram and WordPiece of 2,000 ids learned from the same text, and the same small model
   trained from scratch on each. WordPiece drops white space at no cost, so its result looks better than it is.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent
# The checkout, wherever this file is run from; and this folder last, because `import tokenizers` means the library.
sys.path[:] = [str(HERE.parent), *(path for path in sys.path if Path(path).resolve() != HERE), str(HERE)]

from forgetting import RESULTS, save_study  # noqa: E402

import tokenizer  # noqa: E402
from core import cli  # noqa: E402
from core.errors import UserError  # noqa: E402
from core.files import read_json, refuse_existing  # noqa: E402
from text.corpus import read_documents, utf8  # noqa: E402
from text.extend_vocabulary import NewRows, extend  # noqa: E402
from text.heldout import is_held_out  # noqa: E402
from text.shards import pack  # noqa: E402

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
    quick: bool = False
    """One seed of two methods; the results stay in --out."""


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
    return {"study": "extension", "method": method, "bits_per_byte": means.pop("domain_after"),
            "by_seed": [run["domain_after"] for run in runs], "steps": steps, "tokens_per_byte": per_byte, **means,
            "curves": curves}


def draw_chart(rows: list[dict]) -> Figure:
    """Left: bits per byte over the bytes read. Right: the kinds. Bands and bars span the seeds."""
    figure = Figure(figsize=(11, 4.2), layout="constrained", dpi=130)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    left.set(xlabel="megabytes of legal text read", ylabel="held-out bits per byte", title="stories260K, continued")
    right.set(xlabel="tokens per byte", ylabel="held-out bits per byte", title="small model from scratch")
    for row in rows:
        if row["study"] == "extension":
            x = [point[0] for point in row["curves"][0]]
            points = [[point[1] for point in at] for at in zip(*row["curves"])]
            line, = left.plot(x, list(map(mean, points)), marker="o", ms=3, label=row["method"])
            left.fill_between(x, list(map(min, points)), list(map(max, points)), color=line.get_color(), alpha=0.2)
            left.legend()
        else:
            bits, low, high = row["bits_per_byte"], min(row["by_seed"]), max(row["by_seed"])
            right.errorbar(row["tokens_per_byte"], bits, [[bits - low], [high - bits]], fmt="o", capsize=4,
                           label=row["method"] + (" (drops white space)" if row["exact"] < 1 else ""))
            right.legend()
    return figure


def study(options: Study) -> None:
    began, data, out = time.perf_counter(), Path(options.data).resolve(), Path(options.out).resolve()
    for name in (BASE, STORIES, *LEGAL):
        if not (data / name).exists():
            raise UserError(f"{data / name} does not exist; name a folder that has it as --data")
    refuse_existing(out)
    size, results = (QUICK, out) if options.quick else (FULL, RESULTS)
    parts = prepare(data, out)
    rows = [continue_base(data, out, method, size, parts) for method in size["methods"]]
    if not options.quick:
        # Part 2, by the command that a user would type.
        cli.run_command("tokenizer.py", "compare", "--vocab-size", 2000, "--bits-per-byte", 0.4, "--seeds", 2,
                        *(data / file for file in LEGAL), "--json", out / "compare.json", show=True)
        for kind in read_json(out / "compare.json"):
            by_seed = kind["bits_per_byte"]
            rows.append({"study": "kinds", "method": kind.pop("kind"), **kind, "bits_per_byte": mean(by_seed),
                         "by_seed": by_seed})
    print(f"\n{'study':10} {'method':11} {'tokens/byte':>11} {'bits per byte':>13}  (seeds)")
    for r in rows:
        print(f"{r['study']:10} {r['method']:11} {r['tokens_per_byte']:11.3f} {r['bits_per_byte']:13.4f}  "
              f"({min(r['by_seed']):.4f} to {max(r['by_seed']):.4f})")
    save_study("tokenizers", size["seeds"], results, rows, draw_chart(rows), began, megabytes=size["megabytes"])


if __name__ == "__main__":
    sys.exit(cli.run("experiments/tokenizers.py", __doc__, (Study, study)))
