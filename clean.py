"""Clean a corpus, document by document: repair, split, scrub and score each one, then keep what passes a gate.

    python clean.py FILE... --preset legal --out clean
    python clean.py clean --preset legal --rule words=20: --rule chars=p5:p95 --out again

FILE is .jsonl[.gz|.zst], .parquet, text, a folder of such files, or hf://org/dataset. The folder --out gets

    kept.jsonl         {"text", "id", "metadata"}; every score under metadata.scores
    dropped.jsonl.gz   the same for what the gate stopped, with metadata.dropped: the rules it broke
    drops.json         written last: reasons, samples of both sides to look at, statistics by source and domain

The second command tries other limits on the same documents: it reads both files of the first, and does not score again.
Personal data are scrubbed by pattern (text/pii.py), which is no de-identification: names stay.
"""

import core.threads

import contextlib
import dataclasses
import gzip
import hashlib
import importlib.util
import json
import math
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tqdm import tqdm

import hf
from core import cli
from core.cli import Output, Positional, Reading, Repeated
from core.config import check_limits, setting
from core.devices import pick_device
from core.errors import UserError, nearest
from core.files import file_holds, lock_folder, make_folder, new_file, refuse_existing, settle
from core.pool import WorkerPool, batches_by_size
from learn import objectives
from measure import scoring
from text import corpus, gate, kinds, pii, repair, vocabulary
from text.scores import SCORES_VERSION, compile_keywords, estimate_log_odds, parse_languages, score_text

# About so many characters are sent to a worker process at a time.
BATCH_CHARS = 1 << 20


# ---- one document

@dataclass
class Settings:
    """What happens to each document before the gate."""

    preset: Literal["web", "legal", "medical", "code", "books"]
    """The rules of the gate, and the normalisation that a domain needs, such as of legal citations."""
    domain: str = ""
    """metadata.domain of records that have none; empty: the preset."""
    max_chars: int = setting(100_000, at_least=1)
    """Longer documents are split."""
    repair: bool = True
    """ftfy repairs mojibake and HTML entities, except in code, unless --no-repair is given."""
    pii: bool = True
    """Personal data are replaced by placeholders unless --no-pii is given."""
    expand_abbreviations: bool = False
    """Write out pt, hx, dx, rx and tx in clinical texts."""
    lingua: bool = False
    """Identify languages with lingua, instead of a light guess by script and stop words."""

    # What was read of the domain, and the weights of the composite quality. Without a type they are no fields, and so
    # no options of the command line.
    keywords = log_odds = None
    weights = gate.WEIGHTS

    def __post_init__(self):
        if self.preset not in gate.PRESETS:
            raise UserError(f"unknown preset {self.preset}{nearest(self.preset, gate.PRESETS)}; there are "
                            f"{', '.join(gate.PRESETS)}")
        if self.repair and self.preset != "code":
            require("ftfy", "clean", "or add --no-repair")
        if self.lingua:
            require("lingua", "clean", "or leave --lingua out: a light guess by script and stop words remains")


def require(module: str, extra: str, otherwise: str):
    """UserError where a library of an extra is not installed; it says how to install it and how to do without."""
    if not importlib.util.find_spec(module):
        raise UserError(f"{module} is not installed; pip install -e '.[{extra}]', {otherwise}")


def clean_document(record: dict, settings: Settings) -> list[dict]:
    """The record's parts, scored and not yet gated; one part unless the text is longer than settings.max_chars.

    A record that carries the scores of this very text is returned as it is. Scores of an older version, or of a text
    that was edited since (dedup.py --paragraphs does so), are replaced. All other keys of the record stay.
    """
    metadata = record["metadata"]
    foreign = metadata["scores"] if isinstance(metadata.get("scores"), dict) else {}
    if metadata.get("cleaned"):
        if _is_scored(record["text"], metadata):
            foreign["quality"] = gate.compute_quality(foreign, settings.weights)
            return [record]
        foreign = {name: value for name, value in foreign.items() if name not in gate.NAMES}
    text, lost = corpus.utf8(record["text"] or "").decode(), 0.0
    if settings.preset == "code":
        text = repair.normalise(text, code=True)
    else:
        text = repair.normalise(repair.repair_unicode(text) if settings.repair else text)
        text, lost = repair.drop_boilerplate(text, c4=settings.preset == "web")
    if settings.preset == "legal":
        text = repair.normalise_citations(text)
    if settings.expand_abbreviations:
        text = repair.expand_abbreviations(text)
    parts, out = repair.split_text(text, settings.max_chars), []
    for number, part in enumerate(parts, 1):
        part, counts = pii.scrub(part.strip("\n")) if settings.pii else (part.strip("\n"), {})
        scores = score_text(part, settings.lingua, settings.keywords, settings.log_odds)
        scores |= {"boilerplate": round(lost, 4), "pii": sum(counts.values())}
        scores |= {f"pii_{name}": n for name, n in counts.items()}
        scores["quality"] = gate.compute_quality(scores, settings.weights)
        place = {"part": number, "parts": len(parts)} if len(parts) > 1 else {}
        out.append({**record, "text": part, "id": f"{record['id']}/{number}" if place else record["id"], "metadata": {
            **metadata, **place, "domain": metadata.get("domain") or settings.domain or settings.preset,
            "content_hash": _hash_text(part), "cleaned": {"version": SCORES_VERSION, "preset": settings.preset},
            "scores": {**foreign, **scores}}})
    return out


def _hash_text(text):
    return hashlib.blake2b(corpus.utf8(text), digest_size=16).hexdigest()


def _is_scored(text, metadata):
    """Whether the record's scores are of this very text, of this version, and all of them numbers."""
    cleaned, scores = metadata["cleaned"], metadata.get("scores")
    return (isinstance(cleaned, dict) and cleaned.get("version") == SCORES_VERSION
            and str(cleaned.get("preset")) in gate.PRESETS and isinstance(text, str)
            and metadata.get("content_hash") == _hash_text(text) and isinstance(scores, dict)
            and all(isinstance(scores[name], (int, float)) for name in gate.NAMES & scores.keys()))


# ---- the whole corpus

def clean_corpus(records, settings: Settings, out, rules: dict | None = None, workers: int = 1, perplexity=None,
                 overwrite: bool = False) -> dict:
    """Clean `records` into the folder `out`; returns what drops.json holds, and the rate.

    rules: {score: (low, high)}, by default the preset's. perplexity: text -> a float or None, called in this process.
    The files depend neither on `workers` nor on a run that was killed before; each appears complete, drops.json last.
    """
    out, start, done = Path(out), time.perf_counter(), 0
    make_folder(out)
    # The files take their names in the opposite order.
    with claim_results(out, overwrite), new_file(out / "drops.json") as report_file, \
            new_file(out / kinds.CLEANED[1], "wb") as compressed, new_file(out / kinds.CLEANED[0], "wb") as kept, \
            tempfile.TemporaryFile(dir=out) as scored:
        with WorkerPool(workers, settings) as pool, tqdm(unit="B", unit_scale=True, disable=None, desc="clean") as bar:
            batches = batches_by_size(records, lambda record: len(record["text"] or "") + 100, BATCH_CHARS)
            for lines, chars in pool.map(_clean_batch, batches):
                if perplexity:
                    lines = [_add_perplexity(line, perplexity, settings.weights) for line in lines]
                scored.writelines(lines)
                done += chars
                bar.update(chars)
        rules = gate.PRESETS[settings.preset] if rules is None else rules
        scored.seek(0)
        rules = gate.resolve_percentiles(rules, map(json.loads, scored))
        scored.seek(0)
        with gzip.GzipFile("", "wb", 1, compressed, mtime=0) as dropped:
            report = gate.gate_records(map(json.loads, scored), rules, kept, dropped)
        report = {"preset": settings.preset, "weights": settings.weights, **report}
        report_file.write(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
        settle(report_file, compressed, kept)
        # The report on the old files may not stand beside new ones.
        (out / "drops.json").unlink(missing_ok=True)
    return report | {"megabytes_per_second": done / 1e6 / (time.perf_counter() - start), "workers": workers}


@contextlib.contextmanager
def claim_results(out: Path, overwrite: bool):
    """The folder `out`, locked; UserError where it holds results that would be lost. A run that was killed at its very
    end leaves the partial report, and results without their drops.json may be its own."""
    with lock_folder(out / ".lock", out):
        was_killed = (out / ".drops.json.partial").exists()
        ours = was_killed or file_holds(out / "drops.json", b'"preset"')
        for name in ("drops.json", *(() if was_killed else kinds.CLEANED)):
            if overwrite and not ours and (out / name).exists():
                raise UserError(f"{out / name} stands without a drops.json of clean.py, so it is not replaced; choose "
                                f"another --out, or move it away")
            refuse_existing(out / name, overwrite)
        yield


def _clean_batch(settings, records):
    """(a line of JSON for each part, characters of the records' texts)."""
    lines = [corpus.to_line(part) for record in records for part in clean_document(record, settings)]
    return lines, sum(len(record["text"] or "") for record in records)


def _add_perplexity(line, perplexity, weights):
    """The line with the perplexity of its text, and the score of that: 1 - perplexity / 100, and 0 above 100."""
    record = json.loads(line)
    value, scores = perplexity(record["text"]), record["metadata"]["scores"]
    if value is not None and math.isfinite(value):
        scores |= {"perplexity": round(value, 4), "perplexity_score": round(max(0.0, 1 - value / 100), 4)}
        scores["quality"] = gate.compute_quality(scores, weights)
    return corpus.to_line(record)


def load_perplexity(folder: str, context: int = 512):
    """text -> perplexity of its first `context` tokens under the model in `folder`; None for a text without tokens."""
    tokenizer = vocabulary.load(folder)
    model = hf.load(folder, device=pick_device())
    prefix, objective = vocabulary.token_before_document(tokenizer), objectives.Causal(mask_documents=True)
    context = min(context, model.config.max_position_embeddings)

    def measure_perplexity(text):
        # A token has seldom more than 16 characters, and a long text would be encoded for nothing.
        ids = tokenizer.encode_batch([text[:16 * context]])[0][:context]
        if not len(ids):
            return None
        return scoring.score(model, objective, [(ids, len(text))], prefix, len(ids))["perplexity"]
    return measure_perplexity


# ---- command line

@dataclass(kw_only=True)
class Clean:
    """Options of clean.py."""

    files: Positional[list[str]]
    """Files, folders, patterns, @LIST or hf://org/dataset: text, .jsonl or .parquet, also .gz and .zst."""
    text: Settings
    rule: Repeated[list[str]] = field(default_factory=list)
    """NAME=LOW:HIGH, another limit for a score, such as dup_lines=:0.5, perplexity=p5:p95 or sentences=off."""
    weights: str = ""
    """NAME=WEIGHT,... of the composite quality: perplexity=0.3,format=0.2,content=0.3,relevance=0.2."""
    min_chars: int = 100
    """Shorter documents are dropped; in a text without spaces (Chinese, Japanese, Thai) a sign counts as three."""
    language: str | None = None
    """CODE,... (ISO 639-1), such as en,de: keep these languages."""
    keywords: str | None = None
    """A file of terms of the domain, one per line; their density gives the relevance, 1 from 0.01 on."""
    general: str | None = None
    """A general corpus: the n-gram log-odds of the domain against it give the relevance."""
    domain_seed: str | None = None
    """The domain's side of the log-odds, instead of the input."""
    perplexity: str | None = None
    """A model folder: measure the perplexity, and drop what lies above the 95th percentile."""
    workers: int = setting(1, at_least=1)
    """Processes; the result is the same."""
    reading: Reading = field(default_factory=Reading)
    output: Output


def clean_command(options: Clean) -> dict:
    """Run the command; returns the report with the rate and the workers."""
    text, reading = options.text, options.reading
    if text.max_chars < options.min_chars:
        raise UserError(f"--max-chars {text.max_chars} is below --min-chars {options.min_chars}, so every document "
                        f"would be dropped; raise the one or lower the other")
    rules, text.weights = gate.parse_rules(text.preset, options.rule), gate.parse_weights(options.weights)
    if rules.get("chars") == gate.COMMON["chars"]:
        rules["chars"] = (options.min_chars, None)
    if options.language:
        rules["language"] = parse_languages(options.language, text.lingua)
    if options.perplexity:
        rules.setdefault("perplexity", (None, "p95"))
    files = kinds.list_files(options.files, dropped=True)
    # The first record of every file is read before any work, so that a wrong file is refused at once.
    for path in files:
        next(corpus.read_input([path], reading), None)

    def read_texts(paths):
        return (record["text"] for record in corpus.read_input(kinds.list_files(paths, dropped=True), reading))

    if options.keywords:
        text.keywords = compile_keywords(corpus.read_documents([options.keywords], Reading(documents="line")))
    if options.general:
        domain = [options.domain_seed] if options.domain_seed else files
        text.log_odds = estimate_log_odds(read_texts(domain), read_texts([options.general]))
    perplexity = load_perplexity(options.perplexity) if options.perplexity else None
    report = clean_corpus(corpus.read_input(files, reading), text, options.output.out, rules, options.workers,
                          perplexity, options.output.overwrite)
    gate.print_report(report, options.output.out)
    short = report["reasons"].get("chars", {"dropped": 0})["dropped"] / report["parts"]
    cut_at_blanks = reading.documents == "blank" and not reading.separator
    if short > 0.2 and cut_at_blanks and any(kinds.identify(path) == "text" for path in files):
        print(f"warning: {short:.0%} of the documents are too short, and text files were cut at each blank line; say "
              f"what a document is with --separator STRING or --documents", file=sys.stderr)
    return report


# ---- beyond one machine

def datatrove_step(preset: str, rules: dict | None = None, weights: dict = gate.WEIGHTS, keywords=(), log_odds=None,
                   **settings):
    """A preset as a step of a datatrove pipeline (Local, Slurm and Ray executors), for any number of tasks: the records
    that `clean_corpus` keeps, with their scores. settings: fields of Settings.

    A worker unpickles the step by importing this file, so its folder must be on PYTHONPATH there. A percentile needs
    the whole corpus, and a task sees its own part: limits must be numbers here.
    """
    require("datatrove", "datatrove", "which brings the executors")
    from datatrove.pipeline.base import PipelineStep
    options, rules = Settings(preset, **settings), gate.PRESETS[preset] if rules is None else rules
    check_limits(options)
    if "language" in rules:
        parse_languages(",".join(rules["language"]), options.lingua)
    options.keywords, options.log_odds, options.weights = compile_keywords(keywords), log_odds, weights
    for name, limits in gate.resolve_percentiles(rules, ()).items():
        if limits != rules[name]:
            raise UserError(f"the limits of {name} are {rules[name]}, but a task sees no percentile of the whole "
                            f"corpus; give the numbers that drops.json of a sample shows")

    class CleanStep(PipelineStep):
        name, type = f"nanoCPT, {preset}", "CLEAN"

        def run(self, documents, rank: int = 0, world_size: int = 1):
            for document in documents:
                self.stat_update("total")
                with self.track_time():
                    parts = clean_document({"text": document.text, "id": document.id, "metadata": document.metadata},
                                           options)
                for part in parts:
                    broken = gate.find_broken(part["metadata"]["scores"], rules)
                    self.stat_update(*([f"dropped_{name}" for name in broken] or ["forwarded"]))
                    if not broken:
                        yield dataclasses.replace(document, **part)
    return CleanStep()


def main() -> int:
    return cli.run("clean.py", __doc__, (Clean, clean_command))


if __name__ == "__main__":
    sys.exit(main())
