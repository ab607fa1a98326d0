"""A ladder: short runs of one recipe that differ in one setting, to choose that setting before the long run.

Each run is train.py with the recipe, the ladder's settings and a folder of its own, named by what it is and by a hash
of all its settings and of the text that it reads. So a run that is done is not done again, one that was stopped goes
on, and a changed recipe begins anew. What a run leaves is its metrics, its scores and its report; its weights are
removed. measure/ratio.py and measure/rate.py choose by what the runs gave.
"""

import dataclasses
import json
import shlex
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from core import cli
from core.config import to_toml
from core.errors import UserError
from core.files import read_json, remove, write_json, write_text
from core.guard import Guard, GuardConfig
from core.hashing import short_digest
from measure import verdict
from stages.evaluate import with_full_paths
from text.shards import read_manifest
from train import Config

# ---- the runs

@dataclass
class Rung:
    """A run to be made: its name, what is varied, and the words that vary it."""
    name: str
    values: dict
    words: list


def read_settings(program: str, recipe: str, settings: list[str], general: bool) -> Config:
    """The recipe's settings. UserError where a ladder cannot judge it; general: it needs general text too."""
    c = cli.parse(Config, [recipe, *settings], program, recipe=True)
    for role in ("domain", "general") if general else ("domain",):
        named = {name: source for name, source in c.data.sources.items() if source.role == role and source.weight > 0}
        if not named:
            raise UserError(f"{recipe} has no {role} source with a weight, so there is nothing to compare; add one, "
                            f"--data.sources.NAME.path DIR --data.sources.NAME.role {role}")
        packed = [Path(source.path) for source in named.values() if Path(source.path, "manifest.json").is_file()]
        if packed == [Path(source.path) for source in named.values()] and not any(
                read_manifest(folder)["splits"].get("heldout", {}).get("documents") for folder in packed):
            raise UserError(f"the {role} source {min(named)} holds out no document that runs could be judged by; pack "
                            f"it with data.py pack --heldout 0.05")
    return c


def climb(program: str, recipe: str, settings: list[str], rungs: list[Rung], options) -> list[dict]:
    """Make the runs that are not done yet; a row for each, as `read_row` returns it. options: those of plan.py."""
    asked, steps, out = [], options.steps, Path(options.out)
    for rung in rungs:
        for seed in options.seeds:
            words = [recipe, *settings, *map(str, rung.words), "--seed", str(seed), "--train.steps", str(steps),
                     "--eval.every", str(steps), "--eval.sample-tokens", "0", "--train.save-every", str(steps)]
            folder = out / f"{rung.name}-seed_{seed}-{fingerprint(program, words)}"
            asked.append((rung, seed, words, folder))
    missing = [row for row in asked if not (row[3] / "eval.json").exists()]
    done = len(asked) - len(missing)
    print(f"{len(asked)} runs of {steps:,} steps, {done} of them done already, in {out}", flush=True)
    if options.dry_run:
        for _, _, words, folder in missing:
            print(f"python train.py {shlex.join([*words, '--out', str(folder)])}")
        return []
    if options.jobs == 1:
        # In this thread, so that a signal reaches the run, which then saves.
        return [make_run(*row) for row in asked]
    with ThreadPoolExecutor(options.jobs) as pool:
        return list(pool.map(lambda row: make_run(*row), asked))


def fingerprint(program: str, words: list[str]) -> str:
    """Of the settings that the words give and of the text of the sources."""
    c = with_full_paths(cli.parse(Config, words, program, recipe=True))
    texts = [file.read_bytes() for source in c.data.sources.values()
             if (file := Path(source.path, "manifest.json")).is_file()]
    return short_digest(b"\0".join([to_toml(dataclasses.replace(c, out="")).encode(), *texts]))[:8]


def make_run(rung: Rung, seed: int, words: list[str], folder: Path) -> dict:
    """Run train.py where its folder has no result yet; the row of the run, also of one that diverged."""
    if not (folder / "eval.json").exists() and not diverged(folder):
        try:
            cli.run_command("train.py", *words, "--out", folder)
        except UserError:
            if not diverged(folder):
                raise
    for part in ("checkpoints", "final", "trained", "adapter"):
        remove(folder / part)
    row = read_row(folder) | rung.values | {"seed": seed}
    print(describe_row(row), flush=True)
    return row


def read_lines(folder: Path) -> list[dict]:
    file = folder / "metrics.jsonl"
    return list(map(json.loads, file.read_text(encoding="utf-8").splitlines())) if file.exists() else []


def diverged(folder: Path) -> str | None:
    """Why the steps of a run ended it, or None."""
    lines = read_lines(folder)
    return lines[-1].get("message") if lines and lines[-1]["kind"] == "stop" else None


def read_row(folder: Path) -> dict:
    """{"domain", "forgetting": None without general text, "score", ..., "trouble": [what went wrong, in words]}"""
    lines = read_lines(folder)
    trained = [line for line in lines if line["kind"] == "train"]
    row = {"folder": str(folder), "steps": trained[-1]["step"] if trained else 0, "trouble": find_spikes(lines),
           "seconds": sum(line["step_ms"] for line in trained) / 1000 * (trained[-1]["step"] / len(trained)) if trained
           else 0.0, "domain": None, "forgetting": None, "score": None, "general": None, "gain": None}
    if why := diverged(folder):
        return row | {"trouble": [f"diverged: {why}", *row["trouble"]]}
    found = read_json(folder / "eval.json", dict)
    sides = {role: [name for name, scores in found["after"].items() if scores["role"] == role]
             for role in ("domain", "general")}
    if not sides["domain"] or "bits_per_byte" not in found["after"][sides["domain"][0]]:
        raise UserError(f"{folder} has no bits per byte of held-out domain text, so a ladder cannot judge it; pack the "
                        f"domain with --heldout 0.05, and use a causal objective")
    changes = verdict.compare(found["before"], found["after"], sides["general"], sides["domain"])
    row |= {role: mean(found["after"][name]["bits_per_byte"] for name in names) if names else None
            for role, names in sides.items()}
    row |= {"forgetting": changes["forgetting"], "gain": changes["domain_gain"], "score": changes["score"]}
    if row["gain"] < 0:
        row["trouble"] = [f"the domain ends {-row['gain']:.1%} above the base", *row["trouble"]]
    return row


def find_spikes(lines: list[dict]) -> list[str]:
    """The steps whose loss or gradient norm is not finite or lies far above the steps before, in words."""
    guard, found = Guard(GuardConfig(spike="skip", window=32, limit=10**9)), []
    for line in lines:
        if line["kind"] == "train":
            values = [float("nan") if line[key] is None else line[key] for key in ("loss", "grad_norm")]
            if why := guard.judge(line["step"] - 1, *values, line["sources"]):
                found.append(why.partition(" (sources")[0])
    return found


def describe_row(row: dict) -> str:
    varied = f"rate {row['rate']:g}" if "rate" in row else f"{row['share']:.1%} of replay"
    if row["domain"] is None:
        return f"{varied}, seed {row['seed']}: {row['trouble'][0]}"
    general = "" if row["forgetting"] is None else f", general {row['general']:.4f} ({row['forgetting']:+.1%})"
    return (f"{varied}, seed {row['seed']}: domain {row['domain']:.4f} ({-row['gain']:+.1%}){general} bits per byte, "
            f"{row['seconds']:.0f} s" + "".join(f"; {trouble}" for trouble in row["trouble"][:1]))


def name_troubles(rows: list[dict]) -> list[str]:
    """Up to three troubles of each run, with the run they belong to."""
    return [f"{describe_row(row).partition(':')[0]}: {trouble}" for row in rows for trouble in row["trouble"][:3]]


# ---- what both leave

def changed_settings(section, default) -> dict:
    """The settings that are not the defaults, in nested sections; of named sections all that were named."""
    kept = {}
    for key, value in vars(section).items():
        was = getattr(default, key)
        if dataclasses.is_dataclass(value):
            value = changed_settings(value, was)
            if value:
                kept[key] = value
        elif isinstance(value, dict) and value:
            kept[key] = {name: changed_settings(each, type(each)()) for name, each in value.items()}
        elif value != was:
            kept[key] = value
    return kept


def write_recipe(path: str, c: Config, notes: list[str]) -> None:
    """A recipe that train.py takes as it is: the settings that are not its defaults, with what the ladder chose."""
    head = "".join(f"# {note}\n" for note in notes)
    write_text(path, f"{head}\n{to_toml(changed_settings(with_full_paths(c), Config()))}")
    print(f"recipe: {path}; python train.py {path} --dry-run tries it")


def leave(found: dict, out: Path, name: str, draw: Callable) -> dict:
    """Write OUT/NAME.json and OUT/NAME.png; returns what was found, with where they are."""
    found |= {"picture": str(out / f"{name}.png")}
    draw(found, out / f"{name}.png")
    write_json(out / f"{name}.json", found)
    print(f"picture: {found['picture']}; figures: {out / name}.json")
    return found
