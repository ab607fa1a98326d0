"""What drops.json says: why documents were dropped, what was kept by source and domain, and samples to look at."""

import hashlib
from collections import Counter

from text.corpus import utf8
from text.rules import PRESETS, find_broken

# So many records of each reason, and of those that were kept, stand there with the beginning of their text.
SAMPLES = 5


class Drops:
    """The counts of a report, taken record by record."""

    def __init__(self, rules: dict):
        self.reasons = {name: {"limits": list(limits), "dropped": 0, "only_reason": 0}
                        for name, limits in rules.items()}
        self.totals, self.pii, self.cleaned_by = Counter(), Counter(), Counter()
        self.kept_by_preset = Counter(dict.fromkeys(PRESETS, 0))
        self.statistics = {"source": {}, "domain": {}}
        self.samples = {}

    def add(self, record: dict, broken: list[str]):
        """Count a scored record that breaks the rules `broken`; none means that it is kept."""
        metadata, scores = record["metadata"], record["metadata"]["scores"]
        for name in broken:
            self.reasons[name]["dropped"] += 1
            self.reasons[name]["only_reason"] += len(broken) == 1
        for name in broken or ["kept"]:
            self._add_sample(record, name)
        self.kept_by_preset.update(name for name in PRESETS if not find_broken(scores, PRESETS[name]))
        self.pii.update({name[4:]: n for name, n in scores.items() if name.startswith("pii_")})
        self.cleaned_by[metadata["cleaned"]["preset"]] += 1
        # A token has about four bytes, in English and by most tokenizers.
        size = len(record["text"].encode())
        row = {"documents": int(metadata.get("part", 1) == 1), "parts": 1, "bytes": size, "kept": int(not broken),
               "dropped": int(bool(broken)), "bytes_kept": 0 if broken else size,
               "estimated_tokens": size // 4, "estimated_tokens_kept": 0 if broken else size // 4}
        self.totals.update(row)
        for key, table in self.statistics.items():
            table.setdefault(_make_printable(metadata.get(key) or "unknown"), Counter()).update(row)

    def _add_sample(self, record, name):
        """Keep the SAMPLES records with the lowest hash: a fair sample that no order of the records changes."""
        metadata, rows = record["metadata"], self.samples.setdefault(name, [])
        key = f"{record['id']} {metadata['content_hash']}".encode(errors="replace")
        order = hashlib.blake2b(key, digest_size=8).hexdigest()
        if len(rows) == SAMPLES and order >= rows[-1][0]:
            return
        score = metadata["scores"].get("quality" if name == "kept" else name)
        rows.append((order, {"id": _make_printable(record["id"]), "score": score, "text": record["text"][:300]}))
        rows.sort(key=lambda pair: pair[0])
        del rows[SAMPLES:]

    def report(self) -> dict:
        """The counts as drops.json has them."""
        return {**self.totals, "reasons": self.reasons, "pii": dict(sorted(self.pii.items())),
                "kept_by_preset": self.kept_by_preset, "cleaned_by": self.cleaned_by,
                "statistics": {key: dict(sorted(table.items())) for key, table in self.statistics.items()},
                "samples": {name: [row for _, row in rows] for name, rows in sorted(self.samples.items())}}


def _make_printable(value):
    """Text without half surrogate pairs, which fit no report."""
    return utf8(str(value)).decode()


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
    if report["pii"]:
        print("  personal data replaced: " + ", ".join(f"{name} {n:,}" for name, n in report["pii"].items()))
    for key, table in report["statistics"].items():
        for name, row in list(table.items())[:20]:
            print(f"  {key} {name}: {row['parts']:,} parts, {row['kept']:,} kept, {row['bytes_kept']:,} bytes, "
                  f"about {row['estimated_tokens_kept']:,} tokens")
