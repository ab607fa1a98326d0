"""Models from scratch for the studies: sizes by name, one tokenizer, text cut into shards, runs side by side, results.

A study gives words of train.py and gets the run's final scores and the lines of its metrics. Every run is train.py with
a recipe: recipes/scratch.toml fits two cores, recipes/scratch_full.toml is the same at full size.
"""

import dataclasses
import json
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
# The checkout, wherever a study is run from; and this folder last, because `import tokenizers` means the library.
sys.path[:] = [str(HERE.parent), *(path for path in sys.path if Path(path).resolve() != HERE), str(HERE)]

import tokenizer as tokenizers  # noqa: E402
from core import cli  # noqa: E402
from core.config import read_toml, setting  # noqa: E402
from core.errors import UserError  # noqa: E402
from core.files import read_json, refuse_existing  # noqa: E402
from text.corpus import read_documents  # noqa: E402
from text.shards import pack  # noqa: E402

RESULTS = cli.ROOT / "experiments/results"
HELDOUT = 0.05
# {name: (D, F, blocks, heads)}; the name says how many parameters the blocks have, without the embedding.
SIZES = {"25K": (32, 88, 2, 2), "83K": (48, 128, 3, 3), "0.2M": (64, 176, 4, 4), "0.55M": (96, 256, 5, 6),
         "1.5M": (144, 384, 6, 9), "19M": (512, 1376, 6, 8), "25M": (512, 1376, 8, 8), "35M": (576, 1536, 9, 9),
         "50M": (640, 1728, 10, 10), "100M": (832, 2240, 12, 13), "200M": (1024, 2752, 16, 16)}


@dataclass(kw_only=True)
class Scratch:
    """The options of the studies of models from scratch."""
    text: list[str]
    """Text files of the corpus."""
    separator: str | None = None
    """The string that stands between the documents of a text file; without it, documents are blocks between blank
    lines."""
    recipe: str = "recipes/scratch.toml"
    """Settings of every run; recipes/scratch_full.toml is the study at full size."""
    vocab_size: int = setting(1024, above=256)
    """Ids of the tokenizer, a byte-level BPE that is trained on the text."""
    seeds: list[int] = setting([0, 1], at_least=0)
    """Everything is trained once for each."""
    steps: int | None = setting(None, above=0)
    """Length of each run; default: the recipe's."""
    batch_size: int | None = setting(None, above=0)
    """Sequences of a step; default: the recipe's."""
    jobs: int = setting(2, above=0)
    """Runs at a time, each on one thread."""
    out: str
    """The folder to make."""


def make_folder(c) -> Path:
    refuse_existing(c.out)
    return Path(c.out).resolve()


def read_text(files: list[str], separator: str | None) -> list[str]:
    return [text for text in read_documents(files, cli.Reading(separator=separator)) if text]


def pack_text(texts: list[str], folder: Path, tokenizer: Path, heldout: float = HELDOUT) -> int:
    """Pack documents; returns how many tokens are trained on."""
    return pack(texts, tokenizers.load(tokenizer), folder, heldout=heldout, workers=1)["splits"]["train"]["tokens"]


def size_words(size: str) -> list:
    D, F, blocks, heads = SIZES[size]
    return ["--model.hidden-size", D, "--model.intermediate-size", F, "--model.num-hidden-layers", blocks,
            "--model.num-attention-heads", heads, "--model.num-key-value-heads", heads]


def count_block_parameters(size: str) -> int:
    """Parameters without the embedding: four square matrices and the MLP's three in each block, and the norms."""
    D, F, blocks, _ = SIZES[size]
    return blocks * (4 * D * D + 3 * D * F + 2 * D) + D


def count_steps(c: Scratch, tokens: int) -> int:
    """The steps of --steps, or else of the recipe: given, or in epochs of a text of so many tokens."""
    recipe = read_toml(cli.ROOT / c.recipe)
    per_step = (c.batch_size or recipe["train"]["batch_size"]) * recipe["data"]["context"]
    return c.steps or recipe["train"].get("steps") or max(1, int(recipe["train"]["epochs"] * tokens / per_step))


def batch_words(c: Scratch) -> list:
    """Words of train.py for --batch-size; none for the recipe's."""
    if not c.batch_size:
        return []
    micro = min(c.batch_size, read_toml(cli.ROOT / c.recipe)["train"]["micro_batch_size"])
    return ["--train.batch-size", c.batch_size, "--train.micro-batch-size", micro]


def train_model(c, folder: Path, tokenizer: Path, words: list, seed: int) -> tuple[dict, list[dict]]:
    """Run train.py once: ({source: scores of its held-out text after the run}, the lines of metrics.jsonl)."""
    cli.run_command("train.py", cli.ROOT / c.recipe, "--model.tokenizer", tokenizer, *words, "--seed", seed,
                    "--out", folder, threads=1)
    scores = read_json(folder / "eval.json")["after"]
    if not scores:
        raise UserError("no document of the text was held out to be scored; give more of it")
    return scores, read_lines(folder / "metrics.jsonl")


def read_lines(file: Path) -> list[dict]:
    return list(map(json.loads, file.read_text(encoding="utf-8").splitlines()))


def run_all(jobs: int, function: Callable, asked: Iterable[tuple]) -> list:
    """[function(*arguments)], `jobs` at a time. After a mistake the runs that have not begun are dropped."""
    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(lambda arguments: function(*arguments), asked))


def choose_results(c, out: Path, *anywhere: str) -> Path:
    """experiments/results for the study as it stands, by its defaults; its own folder where any option is another but
    those named `anywhere`, which say where things are."""
    fields = [item for item in dataclasses.fields(c) if item.name not in anywhere]
    given = [item.name for item in fields if item.default is not dataclasses.MISSING
             and getattr(c, item.name) != item.default]
    given += [item.name for item in fields if item.default_factory is not dataclasses.MISSING
              and getattr(c, item.name) != item.default_factory()]
    return out if given else RESULTS


def format_table(rows: list[dict], columns: dict[str, tuple[str, str]]) -> str:
    """A markdown table; columns: {head: (key, format)}. A value that is None is left empty."""
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" + "---:|" * (len(columns) - 1)]
    for row in rows:
        cells = ["" if row.get(key) is None else format(row[key], look) for key, look in columns.values()]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
