"""Settings that nobody can mean: data for the suite. `cases(folder)` gives (module, words, what the line must name).

Every field of every section of a recipe gets a wrong type and, where it is a number, NaN, infinity, one below its least
value and values far too large; then come combinations that exclude each other, and the options of the other commands.
In words, {here} stands for a folder to write in, and {lab} for one with a tokenizer, tok, a packed source, legal, and a
model, base.
"""

import dataclasses
import importlib
import typing
from typing import NamedTuple

from train import Config

# What every case of train.py begins with: a run that could begin.
RUN = ["--model.path", "{lab}/base", "--data.sources.legal.path", "{lab}/legal", "--data.context", "32",
       "--train.batch-size", "4", "--train.steps", "2", "--out", "{here}/run", "--device", "cpu"]
SCRATCH = ["--model.init", "scratch", "--model.tokenizer", "{lab}/tok", "--data.sources.legal.path", "{lab}/legal",
           "--out", "{here}/run", "--train.steps", "2", "--device", "cpu"]
HUGE = str(2**70)


class Case(NamedTuple):
    module: str
    words: list[str]
    names: str

    def line(self, here, lab) -> list[str]:
        """The words with the places in them."""
        return [word.replace("{here}", str(here)).replace("{lab}", str(lab)) for word in self.words]


def wrong_values(hint, limits: dict) -> list[str]:
    """Words that a field of this type and these limits must refuse."""
    plain = [kind for kind in typing.get_args(hint) or (hint,) if kind is not type(None)]
    if typing.get_origin(hint) is typing.Literal or typing.get_origin(plain[0]) is typing.Literal:
        return ["no_such_choice", ""] if "" not in plain else ["no_such_choice"]
    if plain[0] is bool:
        return ["maybe", "2"]
    if plain[0] is int:
        below = [str(int(limits["above"]))] if "above" in limits else []
        below += [str(int(limits["at_least"]) - 1)] if "at_least" in limits else []
        return ["words", "1.5", "1e12", "nan", HUGE, "-" + HUGE, *below]
    if plain[0] is float:
        below = [str(limits["above"])] if "above" in limits else []
        below += [str(limits["at_least"] - 1)] if "at_least" in limits else []
        above = [str(limits["below"])] if "below" in limits else []
        above += [str(limits["at_most"] * 1.01)] if "at_most" in limits else []
        return ["words", "nan", "inf", "-inf", "1e300", "1e400", *below, *above]
    return []


def fields(cls, prefix: str = ""):
    """(dotted name, hint, limits) of all settings; {NAME: section} tables have a section called legal."""
    for item in dataclasses.fields(cls):
        hint = typing.get_type_hints(cls)[item.name]
        if typing.get_origin(hint) is dict:
            yield from fields(typing.get_args(hint)[1], f"{prefix}{item.name}.legal.")
        elif dataclasses.is_dataclass(hint):
            yield from fields(hint, f"{prefix}{item.name}.")
        else:
            yield prefix + item.name, hint, item.metadata.get("limits", {})


def of_recipes() -> list[Case]:
    return [Case("train", [*RUN, f"--{name}={word}"], name) for name, hint, limits in fields(Config)
            for word in wrong_values(hint, limits)]


# Words after RUN, or after SCRATCH where they begin with a size of the model -> what the line must name.
COMBINATIONS = {
    "--train.branch-from {here}/nowhere": "train.branch_from", "--log.wandb project": "log.wandb",
    "--device mps": "mps", "--device meta": "meta", "--device cuda:99": "cuda", "--device gpu": "gpu",
    "--device xla:0": "xla", "--train.steps 1000000000000": "train.steps", "--lora.rank 100000": "lora.rank",
    "--train.epochs inf": "train.epochs", "--train.epochs 0": "train.epochs",
    "--eval.sample-tokens -1": "sample_tokens",
    "--optim.lr -1": "optim.lr", "--optim.lr nan": "optim.lr", "--optim.min-lr 1": "optim.min_lr",
    "--optim.cooldown-steps 5": "cooldown_steps", "--optim.constant-lr 1e-6": "constant_lr",
    "--optim.schedule infinite": "warmup_steps",
    "--lora.alpha 5": "lora.alpha", "--lora.dropout 0.5": "lora.dropout", "--lora.base nf4": "lora.base",
    "--lora.rank 4 --optim.name muon": "muon", "--lora.rank 4 --optim.embedding-lr-scale 2": "embedding_lr_scale",
    "--lora.rank 4 --lora.embeddings rows": "embedding_rows",
    "--lora.rank 4 --lora.embedding-rows 5:": "lora.embeddings",
    "--lora.rank 4 --lora.ranks down_proj": "lora.ranks", "--lora.rank 4 --lora.ranks down_proj=0": "lora.ranks",
    "--forget.ewc.fisher true": "forget.ewc", "--forget.lwf.temperature 3": "forget.lwf",
    "--forget.adaptive.policy budget --forget.adaptive.least 0.7": "least",
    "--forget.adaptive.policy budget --forget.adaptive.start 0.9": "start",
    "--forget.freeze.schedule stages": "stages", "--forget.freeze.stages 0": "stages",
    "--forget.freeze.schedule stages --forget.freeze.stages words": "stages",
    "--forget.freeze.schedule stages --forget.freeze.stages 0.5": "stages",
    "--forget.merge.density 0.5": "forget.merge", "--forget.merge.method ties --forget.merge.alphas 2": "alphas",
    "--data.packing document --data.drop-last": "drop_last",
    "--train.batch-size 1000000 --data.context 1000000": "batch_size",
    "--data.sources.legal.path {here}/nowhere": "nowhere", "--data.sources.legal.path {lab}/tok": "tok",
    "--data.sources.other.role general": "data.sources.other.path", "--model.path {here}/nowhere": "nowhere",
    "--model.path {lab}/legal": "legal", "--model.tokenizer {here}/nowhere": "nowhere",
    "--out {lab}/tok/tokenizer.json": "tokenizer.json", "--no.such.key 1": "no.such.key", "--optim.learning 1": "optim",
    "--optim.lr": "optim.lr", "words": "words", "--lora.targets nothing --lora.rank 2": "nothing",
    "--model.rope-scaling linear": "max_positions",
    "--model.rope-scaling linear --model.max-positions 8": "max_positions",
    "--model.hidden-size 1000000": "hidden_size", "--model.num-hidden-layers 100000": "num_hidden_layers",
    "--model.hidden-size 262144 --model.intermediate-size 1048576 --model.num-hidden-layers 1024": "GB",
    "--model.hidden-size 100 --model.num-attention-heads 3": "hidden_size",
    "--model.num-attention-heads 8 --model.num-key-value-heads 3": "num_key_value_heads",
    "--model.num-attention-heads 0": "num_attention_heads", "--model.intermediate-size -1": "intermediate_size",
}


def of_combinations() -> list[Case]:
    sizes = tuple(f"--model.{name}" for name in ("hidden", "num", "intermediate"))
    return [Case("train", [*(SCRATCH if words.startswith(sizes) else RUN), *words.split()], names)
            for words, names in COMBINATIONS.items()]


# A recipe's text -> what the line must name.
RECIPES = {
    "a = " + "[" * 10_000: "TOML", "a = " + "[" * 500 + "]" * 500: "a", "[" + "a." * 20_000 + "a]": "a",
    "seed = 1180591620717411303424": "seed", "seed = " + "9" * 5000: "TOML", "seed = '1'": "seed",
    "seed = true": "seed",
    "seed = 1979-05-27": "seed", "seed = [1]": "seed", "seed = {a = 1}": "seed", "[optim]\nlr = nan": "optim.lr",
    "[optim]\nlr = -inf": "optim.lr", "[optim]\nlr = 'x'": "optim.lr", "optim = 1": "optim", "optim = []": "optim",
    "data = {sources = 1}": "data.sources", "data = {sources = {a = 1}}": "data.sources.a",
    "[data.sources.a]\npath = 1": "data.sources.a.path", "[data.sources.a]\nweight = -1": "data.sources.a.weight",
    "[data.sources.\"a\\u001b[2J\"]\nweight = -1": "u001b[2J", "\"\\u001b[2J\" = 1": "unknown key",
    "seed = 1\nseed = 2": "TOML", "seed 1": "TOML", "\x00": "TOML", "lora = {rank = 1e5}": "lora.rank",
    "lora = {rank = 100000}": "lora.rank", "lora = {targets = 'q_proj'}": "lora.targets",
    "lora = {targets = [1]}": "lora.targets", "[forget.merge]\nalphas = [0.5, nan]": "forget.merge.alphas",
    "out = \"a\\u0000b\"": "null", "device = 'mps'": "mps", "[train]\nprecision = 'fp8'": "train.precision",
    "b = 'x'\n" + "#" * (2 << 20): "too large", "a" * 50_000 + " = 1": "unknown key",
    "[model]\npath = '" + "x" * 50_000 + "'": "x",
}


def of_texts(folder) -> list[Case]:
    """A recipe in `folder` for each of the texts."""
    folder.mkdir(exist_ok=True)
    found = []
    for i, (text, names) in enumerate(RECIPES.items()):
        (folder / f"recipe_{i}.toml").write_text(text)
        # What the recipe itself sets, no word may set again.
        pairs = [pair for pair in zip(RUN[::2], RUN[1::2]) if pair[0][2:].split(".")[0] not in text[:8]]
        found.append(Case("train", [str(folder / f"recipe_{i}.toml"), *sum(pairs, ())], names))
    return found


# ---- the other commands

BAD_WORDS = {int: ["words", "1.5", "nan", HUGE], float: ["words", "nan", "inf", "-inf", "1e400"], bool: []}
# {module: {command: (class of its options, words that would work)}}
COMMANDS = {
    ("data", "pack"): "--tokenizer {lab}/tok --out {here}/out {lab}/tok/tokenizer.json",
    ("clean", ""): "--preset web --out {here}/out {lab}/tok/tokenizer.json",
    ("dedup", ""): "--out {here}/out {lab}/tok/tokenizer.json",
    ("eval", ""): "--model {lab}/base --text t={lab}/legal",
    ("generate", ""): "--model {lab}/base --prompt x",
    ("tokenizer", "train"): "--vocab-size 300 --out {here}/out {lab}/tok/tokenizer.json",
    ("tokenizer", "extend"): "--tokenizer {lab}/tok --out {here}/out {lab}/tok/tokenizer.json",
    ("forget", "merge"): "--base {lab}/base --model {lab}/base --out {here}/out --alpha 0.5",
    ("forget", "replay"): "--model {lab}/base --out {here}/out.jsonl",
    ("lora", "merge"): "--base {lab}/base --adapter {lab}/base --out {here}/out",
}


def numbers(cls):
    """(option, int or float) of the options of a command that are numbers, those of nested dataclasses too."""
    hints = typing.get_type_hints(cls)
    for item in dataclasses.fields(cls):
        hint = hints[item.name]
        kinds = [kind for kind in typing.get_args(hint) or (hint,) if kind is not type(None)]
        if dataclasses.is_dataclass(hint):
            yield from numbers(hint)
        elif kinds[0] in (int, float):
            yield "--" + item.name.replace("_", "-"), kinds[0]


def commands_of(module: str) -> dict:
    """{name: class of its options} of a command line, "" for the only one."""
    found = {}

    def note(program, description, commands, **_):
        found.update({name: pair[0] for name, pair in commands.items()} if isinstance(commands, dict)
                     else {"": commands[0]})
        return 0
    loaded = importlib.import_module(module)
    real, loaded.cli.run = loaded.cli.run, note
    try:
        loaded.main()
    finally:
        loaded.cli.run = real
    return found


def of_commands() -> list[Case]:
    found = []
    for (module, name), words in COMMANDS.items():
        cls = commands_of(module).get(name)
        for option, kind in numbers(cls) if cls else ():
            found += [Case(module, [*name.split(), *words.split(), f"{option}={word}"], option)
                      for word in BAD_WORDS[kind]]
        if cls:
            found.append(Case(module, [*name.split(), *words.split(), "--no-such-option", "1"], "--no-such-option"))
            found.append(Case(module, [*name.split(), *words.split(), "--json", "{here}"], "{here}"))
    return found


def cases(folder) -> list[Case]:
    """All of them; `folder` gets the recipes."""
    return [*of_recipes(), *of_combinations(), *of_texts(folder), *of_commands()]
