"""Tokenizers: what an extension of the vocabulary does to a base model, and which kind serves a model from scratch.

    python experiments/tokenizers.py --data DIR --out out/tokenizers       about a quarter of an hour on two cores
    python experiments/tokenizers.py --data DIR --out out/tokenizers --quick         one seed, two methods, no results

DIR holds models/stories260K and corpora/. Everything is measured in held-out bits per byte after the same bytes of
text, since tokens of two vocabularies are not the same amount of it.

1. stories260K (512 tokens, children's stories) is continued on the DC Code with recipes/cpt.toml, on the domain alone:
   as it is, and with 500 new tokens learnt from the training documents, their rows the mean of their parts (the
   default) or drawn at random. General text is scored beside it. The batch is 8,192 tokens for all: longer tokens mean
   fewer updates for the same bytes, 26 against 45.
2. `tokenizer.py compare`: BPE, Unigram and WordPiece of 2,000 ids learnt from the same text, and the same small model
   trained from scratch on each. WordPiece drops white space, which costs it nothing: its number flatters it.

It writes experiments/results/tokenizers.json with one row a method, and tokenizers.png beside it.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# The checkout, wherever this file is run from; and not this folder, where `import tokenizers` would find this file
sys.path[:] = [str(ROOT), *(p for p in sys.path if Path(p).resolve() != ROOT / "experiments")]

import tokenizer  # noqa: E402
from core.cli import Reading  # noqa: E402
from core.config import ArgumentParser, main_guard, write_json  # noqa: E402
from text.corpus import read_documents  # noqa: E402
from text.extend_vocabulary import extend  # noqa: E402
from text.new_rows import NewRows  # noqa: E402
from text.shards import Shards, pack  # noqa: E402

LEGAL = ("corpora/legal_en_dc/dc_code_title16.txt", "corpora/legal_en_dc/dc_code_title28.txt")
STORIES, BASE = "corpora/tinystories/tinystories_sample_2MiB.txt", "models/stories260K"
NEW_TOKENS, HELDOUT = 500, 0.04
FULL = {"methods": ("unextended", "subtoken", "random"), "seeds": (0, 1), "megabytes": 0.6, "evaluations": 3,
        "eval_tokens": 12_000}
QUICK = {"methods": ("subtoken", "random"), "seeds": (0,), "megabytes": 0.1, "evaluations": 1, "eval_tokens": 6_000}
KIND_IDS, KIND_MEGABYTES, KIND_SEEDS = 2000, 0.4, 2  # of part 2


def run(*command) -> None:
    """A project command, shown and run; its failure ends the study with the line it printed."""
    print("\n$ python " + " ".join(map(str, command)), flush=True)
    if subprocess.run([sys.executable, *map(str, command)], cwd=ROOT).returncode:
        raise ValueError(f"this command of the study failed: python {' '.join(map(str, command))}")


def pack_both(tok, texts: dict[str, list[str]], out: Path) -> dict:
    """Shards of domain and general below `out`; {"domain": manifest, "general": manifest}."""
    return {name: pack(iter(documents), tok, out / name, heldout=HELDOUT) for name, documents in texts.items()}


def prepare(data: Path, out: Path) -> tuple[dict, dict]:
    """Shards for both vocabularies and the extended tokenizer, learnt without the held-out documents, all in `out`:
    ({"base": manifests, "extended": manifests}, {new id: old ids})."""
    stories = read_documents([str(data / STORIES)], Reading(separator="<|endoftext|>"))
    texts = {"domain": list(read_documents([str(data / file) for file in LEGAL])),
             "general": [text for text in stories if text]}
    base = tokenizer.load(data / BASE)
    manifests = {"base": pack_both(base, texts, out / "shards/base")}
    shards = Shards(out / "shards/base/domain", "heldout")
    held_out = {tuple(shards.text_document(i)[0].tolist()) for i in range(shards.documents)}
    encoded = zip(texts["domain"], base.encode_batch(texts["domain"]))
    learn = [text for text, ids in encoded if tuple(ids.tolist()) not in held_out]
    parts = extend(data / BASE, learn, NEW_TOKENS, out / "tokenizer")
    manifests["extended"] = pack_both(tokenizer.load(out / "tokenizer"), texts, out / "shards/extended")
    return manifests, parts


def continue_base(data: Path, out: Path, method: str, seed: int, size: dict, manifests: dict, parts: dict) -> dict:
    """One run of part 1: the numbers that it left (numbers_of)."""
    vocabulary = "base" if method == "unextended" else "extended"
    if method == "unextended":
        model = data / BASE
    else:
        model = out / f"models/{method}_{seed}"
        tokenizer.save_model(data / BASE, out / "tokenizer", parts, model, NewRows(method, seed))
    train = manifests[vocabulary]["domain"]["splits"]["train"]
    per_byte = train["tokens"] / train["bytes"]
    steps = max(1, round(size["megabytes"] * 1e6 * per_byte / (16 * 512)))  # the recipe's batch and context
    folder = out / f"runs/{method}_{seed}"
    run("train.py", "recipes/cpt.toml", "--model.path", model, "--data.schedule", "domain_only",
        "--forget.lwf.alpha", 0,
        "--data.sources.domain.path", out / f"shards/{vocabulary}/domain",
        "--data.sources.general.path", out / f"shards/{vocabulary}/general", "--train.steps", steps,
        "--eval.every", -(-steps // size["evaluations"]), "--eval.tokens", size["eval_tokens"],
        "--eval.sample-tokens", 0, "--optim.lr", 1e-3, "--optim.min-lr", 1e-4, "--seed", seed, "--out", folder)
    return numbers_of(folder, steps, per_byte)


def numbers_of(folder: Path, steps: int, per_byte: float) -> dict:
    """{"steps", "tokens_per_byte", "curve" [(megabytes, bits per byte)], "domain_before", "general_after", ...}."""
    scored = [json.loads(file.read_text(encoding="utf-8")) for file in folder.glob("eval_step_*.json")]
    curve = sorted((at["step"] * 16 * 512 / per_byte / 1e6, at["texts"]["domain"]["bits_per_byte"]) for at in scored)
    found = json.loads((folder / "eval.json").read_text(encoding="utf-8"))
    return {"steps": steps, "tokens_per_byte": per_byte, "curve": curve,
            **{f"{side}_{when}": found[when][side]["bits_per_byte"] for side in ("domain", "general")
               for when in ("before", "after")}}


def row_of(method: str, runs: list[dict]) -> dict:
    """A row of the results: means over the seeds, and the bits per byte of each."""
    after = [r["domain_after"] for r in runs]
    mean = {key: sum(r[key] for r in runs) / len(runs) for key in runs[0] if key not in ("curve", "domain_after")}
    return {"study": "extension", "method": method, "bits_per_byte": sum(after) / len(after), "by_seed": after, **mean,
            "curves": [r["curve"] for r in runs]}


def compare_kinds(data: Path, out: Path) -> list[dict]:
    """Part 2, by the command that a user would type."""
    run("tokenizer.py", "compare", "--vocab-size", KIND_IDS, "--bits-per-byte", KIND_MEGABYTES, "--seeds", KIND_SEEDS,
        *(data / file for file in LEGAL), "--json", out / "compare.json")
    rows = json.loads((out / "compare.json").read_text(encoding="utf-8"))
    return [{"study": "kinds", "method": r.pop("kind"), "by_seed": r["bits_per_byte"],
             **(r | {"bits_per_byte": sum(r["bits_per_byte"]) / len(r["bits_per_byte"])})} for r in rows]


def draw(rows: list[dict], file: Path) -> None:
    """Left: bits per byte along the bytes read. Right: the kinds. Bands and bars are the seeds' extremes."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), width_ratios=(3, 2), layout="constrained")
    for row in (r for r in rows if r["study"] == "extension"):
        points = [[point[1] for point in at] for at in zip(*row["curves"])]
        x = [point[0] for point in row["curves"][0]]
        line, = left.plot(x, [sum(p) / len(p) for p in points], marker="o", ms=3, label=row["method"])
        left.fill_between(x, [min(p) for p in points], [max(p) for p in points], color=line.get_color(), alpha=0.2)
    left.set(xlabel="megabytes of legal text read", ylabel="held-out bits per byte", title="stories260K, continued")
    left.legend()
    for row in (r for r in rows if r["study"] == "kinds"):
        mean, low, high = row["bits_per_byte"], min(row["by_seed"]), max(row["by_seed"])
        right.errorbar(row["tokens_per_byte"], mean, [[mean - low], [high - mean]], fmt="o", capsize=4,
                       label=row["method"] + (" (drops white space)" if row["exact"] < 1 else ""))
    right.set(xlabel="tokens per byte", ylabel="held-out bits per byte", title="small model from scratch")
    if any(r["study"] == "kinds" for r in rows):
        right.legend()
    figure.savefig(file, dpi=130)
    plt.close(figure)


def show(rows: list[dict]) -> None:
    print(f"\n{'study':10} {'method':11} {'tokens/byte':>11} {'bits per byte':>13}  (seeds)")
    for r in rows:
        print(f"{r['study']:10} {r['method']:11} {r['tokens_per_byte']:11.3f} {r['bits_per_byte']:13.4f}  "
              f"({min(r['by_seed']):.4f} to {max(r['by_seed']):.4f})")
    after = {r["method"]: r["bits_per_byte"] for r in rows}
    better = "below" if after["subtoken"] < after["random"] else "not below"
    print(f"new rows from their parts: {after['subtoken']:.4f}, {better} random rows' {after['random']:.4f}")
    if (plain := after.get("unextended")) is not None:
        ahead = "the base without new tokens is ahead" if plain < after["subtoken"] else "the extension is ahead"
        print(f"after these bytes {ahead}: {plain:.4f} without, {after['subtoken']:.4f} with new tokens")


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with models/stories260K and corpora/")
    parser.add_argument("--out", type=Path, default=Path("out/tokenizers"), help="folder to work in (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="one seed of two methods; results stay in --out")
    args = parser.parse_args()
    began, data, out = time.perf_counter(), args.data.resolve(), args.out.resolve()
    for name in (BASE, STORIES, *LEGAL):
        if not (data / name).exists():
            raise ValueError(f"{data / name} does not exist; name a folder that has it as --data")
    for name in ("shards", "tokenizer", "models", "runs"):  # of an earlier study
        shutil.rmtree(out / name, ignore_errors=True)
    os.chdir(ROOT)
    size = QUICK if args.quick else FULL
    manifests, parts = prepare(data, out)
    rows = [row_of(method, [continue_base(data, out, method, seed, size, manifests, parts) for seed in size["seeds"]])
            for method in size["methods"]]
    if not args.quick:
        rows += compare_kinds(data, out)
    results = out if args.quick else ROOT / "experiments/results"
    command = "python experiments/tokenizers.py --data DIR" + " --quick" * args.quick
    write_json(results / "tokenizers.json", {
        "command": command, "seeds": list(size["seeds"]), "megabytes": size["megabytes"],
        "seconds": round(time.perf_counter() - began), "rows": rows})
    draw(rows, results / "tokenizers.png")
    show(rows)
    print(f"{time.perf_counter() - began:.0f} s; {results}/tokenizers.json and tokenizers.png")


if __name__ == "__main__":
    sys.exit(main_guard(main))
