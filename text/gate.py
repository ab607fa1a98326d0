"""Which scores a document must have to be kept: published rules as tables, presets of them, the gate and its report.

A rule is {score: (lowest, highest)}; None is no limit, and "p5" is the 5th percentile of the score in the corpus. The
rule on the language lists the languages that are kept. A document is dropped by any rule that it breaks.
"""

import hashlib
import re
from collections import Counter

import numpy as np

from core.errors import UserError, nearest
from text.corpus import to_line

# The report shows so many records of each reason, and of those that were kept, with the beginning of their text.
SAMPLES = 5

# Rae et al. 2021 (arXiv:2112.11446), table A1.
GOPHER_QUALITY = {
    "words": (50, 100_000), "mean_word_length": (3, 10), "hash_ratio": (None, 0.1), "ellipsis_ratio": (None, 0.1),
    "bullet_lines": (None, 0.9), "ellipsis_lines": (None, 0.3), "alpha_words": (0.8, None), "stop_words": (2, None)}
# The same table; n-grams are counted as in datatrove: every occurrence after the first.
GOPHER_REPETITION = {
    "dup_lines": (None, 0.30), "dup_paragraphs": (None, 0.30), "dup_line_chars": (None, 0.20),
    "dup_paragraph_chars": (None, 0.20), "top_2gram": (None, 0.20), "top_3gram": (None, 0.18),
    "top_4gram": (None, 0.16), "dup_5gram": (None, 0.15), "dup_6gram": (None, 0.14), "dup_7gram": (None, 0.13),
    "dup_8gram": (None, 0.12), "dup_9gram": (None, 0.11), "dup_10gram": (None, 0.10)}
# Raffel et al. 2020 (arXiv:1910.10683), section 2.2. Its rules on single lines are repair.passes_c4.
C4 = {"sentences": (5, None), "lorem_ipsum": (None, 0), "curly_brackets": (None, 0)}
# Penedo et al. 2024 (arXiv:2406.17557). The 0.01 is their code's; the paper prints 0.1.
FINEWEB = {
    "terminal_lines": (0.12, None), "short_lines": (None, 0.67), "dup_line_chars": (None, 0.01),
    "newlines_per_word": (None, 0.3)}
# StarCoder (arXiv:2305.06161) for the lengths of lines and the share of letters and digits; NeMo Curator for lines.
CODE = {"max_line": (None, 1000), "mean_line": (None, 100), "alnum": (0.25, None), "lines": (None, 20_000)}
# Personal data: Dolma 1.6. Compression: ours, against a text that is nothing but repetition.
COMMON = {"chars": (100, None), "quality": (0.5, None), "pii": (None, 5), "compression": (0.05, None)}
# Ours: Gopher's rules, widened until statutes, tables, lists of drugs and templates pass.
DOMAIN = {
    "words": (15, None), "mean_word_length": (2.5, 14), "hash_ratio": (None, 0.1), "ellipsis_lines": (None, 0.5),
    "alpha_words": (0.5, None), "dup_lines": (None, 0.6), "dup_paragraphs": (None, 0.6), "top_2gram": (None, 0.4),
    "dup_10gram": (None, 0.6), "lorem_ipsum": (None, 0), "code_ratio": (None, 0.5)}
PRESETS = {
    # RefinedWeb (arXiv:2306.01116) drops a document that loses more than 5 % of its words with its lines.
    "web": {**COMMON, **GOPHER_REPETITION, **GOPHER_QUALITY, **C4, **FINEWEB, "boilerplate": (None, 0.05)},
    "legal": {**COMMON, **DOMAIN}, "medical": {**COMMON, **DOMAIN},
    "code": {**COMMON, **CODE},
    "books": {**COMMON, **GOPHER_REPETITION, **GOPHER_QUALITY, "words": (50, None), "lorem_ipsum": (None, 0),
              "bullet_lines": (None, 0.95), "code_ratio": (None, 0.5)}}
# The scores that make up the composite quality.
WEIGHTS = {"perplexity_score": 0.3, "format": 0.2, "content": 0.3, "relevance": 0.2}
# Every score that can have a rule; a score of any other name is somebody else's and is left alone.
NAMES = {"perplexity", "perplexity_score", "log_odds", "keyword_density", "relevance", "comment_ratio",
         "language_score", "alpha", "unique_words", "format", "content"}.union(*PRESETS.values())


def find_broken(scores: dict, rules: dict) -> list[str]:
    """The names of the rules that these scores break; a rule on a score that was not computed does not apply."""
    def breaks(name, limits):
        value = scores.get(name)
        if name == "language":
            return value not in limits
        low, high = limits
        return value is not None and ((low is not None and value < low) or (high is not None and value > high))
    return [name for name, limits in rules.items() if breaks(name, limits)]


def resolve_percentiles(rules: dict, records) -> dict:
    """Rules with numbers for the limits that are percentiles, taken over the `records` that have text.

    Such a limit is None where no record has the score. `records` is read only if there is a percentile.
    """
    values = {name: [] for name, limits in rules.items()
              if name != "language" and any(isinstance(limit, str) for limit in limits)}
    for record in records if values else ():
        scores = record["metadata"]["scores"] if record["text"] else {}
        for name in values.keys() & scores.keys():
            values[name].append(scores[name])

    def resolve(limit, values):
        if not isinstance(limit, str):
            return limit
        return float(np.percentile(values, float(limit[1:]))) if values else None
    return rules | {name: tuple(resolve(limit, values[name]) for limit in rules[name]) for name in values}


def parse_rules(preset: str, changes: list[str]) -> dict:
    """The preset's rules with NAME=LOW:HIGH laid over them; NAME=off takes a rule away.

    Either side may be empty, or a percentile: "dup_lines=:0.5", "words=20:", "perplexity=p5:p95".
    """
    rules, limit = dict(PRESETS[preset]), r"(-?\d+(?:\.\d+)?|p\d\d?(?:\.\d+)?|p100)?"
    for change in changes:
        match = re.fullmatch(f"(.*)=(?:off|{limit}:{limit})", change)
        if not match:
            raise UserError(f"--rule {change}: write NAME=LOW:HIGH, such as words=50:100000, quality=0.5: or "
                            f"chars=p5:p95 (percentiles, p0 to p100), or NAME=off")
        name, *limits = match.groups()
        if name not in NAMES:
            raise UserError(f"--rule {change}: unknown score {name}{nearest(name, NAMES)}")
        if change.endswith("off"):
            rules.pop(name, None)
        else:
            rules[name] = tuple(x if x is None or x.startswith("p") else float(x) for x in limits)
    return rules


def compute_quality(scores: dict, weights: dict = WEIGHTS) -> float:
    """The weighted mean of those of `weights` that were computed, 0 to 1."""
    parts = {name: scores[name] for name in weights if name in scores}
    total = sum(weights[name] for name in parts)
    return round(sum(weights[name] * value for name, value in parts.items()) / total, 4) if total else 0.0


def parse_weights(text: str) -> dict:
    """WEIGHTS with NAME=WEIGHT,... laid over them; perplexity stands for perplexity_score."""
    form = rf"({'|'.join(WEIGHTS)})=(\d+\.?\d*|\.\d+)"
    changes = [re.fullmatch(form, change.replace("perplexity=", "perplexity_score="))
               for change in text.split(",") if change]
    weights = WEIGHTS | {change[1]: float(change[2]) for change in changes if change}
    if None in changes or not sum(weights.values()):
        raise UserError(f"--weights {text}: write perplexity=0.3,format=0.2,content=0.3,relevance=0.2; none below 0, "
                        f"and not all of them 0")
    return weights


# ---- the gate and its report

def gate_records(records, rules: dict, kept, dropped) -> dict:
    """Write each scored record to the file `kept` or `dropped`, by the rules that it breaks; returns the report.

    The report says why documents were dropped, what was kept by source and domain, and shows samples to look at.
    """
    reasons = {name: {"limits": list(limits), "dropped": 0, "only_reason": 0} for name, limits in rules.items()}
    totals, pii, cleaned_by, samples = Counter(), Counter(), Counter(), {}
    kept_by_preset = Counter(dict.fromkeys(PRESETS, 0))
    statistics, not_applied = {"source": {}, "domain": {}}, {}
    for record in records:
        metadata, scores = record["metadata"], record["metadata"]["scores"]
        broken = find_broken(scores, rules)
        metadata.pop("dropped", None)
        if broken:
            metadata["dropped"] = broken
        (dropped if broken else kept).write(to_line(record))
        for name in broken:
            reasons[name]["dropped"] += 1
            reasons[name]["only_reason"] += len(broken) == 1
        if missing := rules.keys() - scores.keys():
            not_applied.setdefault(scores["language"], Counter()).update(missing)
        # The records with the lowest hashes are a fair sample, whatever the order of the records.
        order = hashlib.blake2b(f"{record['id']} {metadata['content_hash']}".encode(), digest_size=8).hexdigest()
        for name in broken or ["kept"]:
            row = {"id": str(record["id"]), "score": scores.get(name if broken else "quality"),
                   "text": record["text"][:300]}
            samples[name] = sorted([*samples.get(name, []), (order, row)], key=lambda pair: pair[0])[:SAMPLES]
        kept_by_preset.update(name for name in PRESETS if not find_broken(scores, PRESETS[name]))
        pii.update({name[4:]: n for name, n in scores.items() if name.startswith("pii_")})
        cleaned_by[metadata["cleaned"]["preset"]] += 1
        # A token has about four bytes, in English and by most tokenizers.
        size, stays = len(record["text"].encode()), not broken
        row = {"documents": int(metadata.get("part", 1) == 1), "parts": 1, "bytes": size, "kept": int(stays),
               "dropped": int(not stays), "bytes_kept": size * stays, "estimated_tokens": size // 4,
               "estimated_tokens_kept": size // 4 * stays}
        totals.update(row)
        for key, table in statistics.items():
            table.setdefault(str(metadata.get(key) or "unknown"), Counter()).update(row)
    if not totals:
        raise UserError("nothing to clean: the input holds no document")
    return {**totals, "reasons": reasons, "pii": dict(sorted(pii.items())), "kept_by_preset": kept_by_preset,
            "cleaned_by": cleaned_by,
            "not_applied": {code: dict(sorted(table.items())) for code, table in sorted(not_applied.items())},
            "statistics": {key: dict(sorted(table.items())) for key, table in statistics.items()},
            "samples": {name: [row for _, row in rows] for name, rows in sorted(samples.items())}}


def print_report(report: dict, out):
    print(f"{report['documents']:,} documents in {report['parts']:,} parts: {report['kept']:,} kept "
          f"({report['kept'] / report['parts']:.1%}), {report['dropped']:,} dropped; about "
          f"{report['estimated_tokens_kept']:,} tokens in {out}/kept.jsonl")
    print(f"  {report['megabytes_per_second']:.2f} MB/s, {report['workers']} workers; on these scores the presets keep "
          + ", ".join(f"{name} {n / report['parts']:.1%}" for name, n in report["kept_by_preset"].items()))
    if set(report["cleaned_by"]) != {report["preset"]}:
        print(f"  texts cleaned before, by {', '.join(report['cleaned_by'])}: only the gate is {report['preset']}'s")
    for name, row in sorted(report["reasons"].items(), key=lambda item: -item[1]["dropped"]):
        if row["dropped"]:
            limits = ",".join(row["limits"]) if name == "language" else " to ".join(
                "any" if x is None else f"{x:g}" for x in row["limits"])
            print(f"  {name:20} {limits:>18}   dropped {row['dropped']:>9,}   as only reason {row['only_reason']:>9,}")
    for language, table in report["not_applied"].items():
        print(f"  not applied in {language} ({max(table.values()):,} parts), for want of such scores: "
              + ", ".join(table))
    if not report["kept"]:
        print("  NOTHING WAS KEPT; look at the samples in drops.json, and try other limits with --rule")
    if report["pii"]:
        print("  personal data replaced: " + ", ".join(f"{name} {n:,}" for name, n in report["pii"].items()))
    for key, table in report["statistics"].items():
        for name, row in list(table.items())[:20]:
            print(f"  {key} {name}: {row['parts']:,} parts, {row['kept']:,} kept, {row['bytes_kept']:,} bytes, "
                  f"about {row['estimated_tokens_kept']:,} tokens")
