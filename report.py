"""After a run: a run folder in, one self-contained HTML page out. It reads files only and needs no network.

    python report.py out/legal                                  writes out/legal/report.html
    python report.py out/replay out/lora --out compare.html     several runs on one page

Read from each folder: metrics.jsonl (required), eval.json, eval_step_N.json, config.toml. A run that is still going,
was killed or was resumed is shown as far as it got. measure/read_run.py reads, measure/report_tables.py and
measure/charts.py say and draw what report.html.j2 puts in its place.
"""

import json
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jinja2

from core import cli
from core.config import setting
from core.errors import UserError
from core.files import file_holds, write_text
from core.output import escape
from measure import charts, report_tables, verdict
from measure.charts import decimal, percent, short, span
from measure.places import place_of
from measure.read_run import read_run
from measure.report_tables import cite, name
from measure.verdict import finite

# ---- the page

def render(runs: list) -> str:
    """The page for one or several runs, which loads nothing from anywhere."""
    # Autoescape: whatever stands in a run's files reaches the page as text, never as markup.
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True,
                                     trim_blocks=True, lstrip_blocks=True)
    filters = (finite, percent, span, decimal, short, verdict.grade_gain, verdict.grade_forgetting, cite, name)
    environment.filters |= {function.__name__: function for function in filters}
    environment.filters["json"] = partial(json.dumps, ensure_ascii=False)
    for number, run in enumerate(runs, 1):
        run.number = number
    ranked = len({run.origin for run in runs}) == len({str(run.texts) for run in runs}) == 1
    return environment.get_template("report.html.j2").render(
        runs=runs, ranked=ranked, best=find_best(runs) if ranked else [], tables=report_tables, charts=charts,
        place_of=place_of, across=charts.draw_comparison(runs, ranked) if len(runs) > 1 else [])


def find_best(runs: list) -> list:
    """The run with the best overall score, and those whose score cannot be told from it: the documents are drawn in the
    same way for all, and the middle 95 % of the differences hold 0. Empty where no score is known."""
    best = max((run for run in runs if run.overall is not None), key=lambda run: run.overall, default=None)
    if best is None:
        return []
    others = [run for run in runs if run is not best and run.score_draws is not None and best.score_draws is not None]
    return [best, *(run for run in others
                    if verdict.is_unclear(verdict.middle(best.score_draws - run.score_draws)))]


@dataclass(kw_only=True)
class Report:
    """Make one HTML page of one or several run folders."""
    runs: cli.Positional[list[str]]
    """Run folders, such as out/demo."""
    out: str | None = None
    """The file to write (default: report.html in the first run folder)."""
    watts: float | None = setting(None, above=0, at_most=1e5)
    """Power of a device: the page then says the energy."""
    price: float | None = setting(None, at_least=0, at_most=1e5)
    """Dollars per device-hour: the page then says the price."""


def write_report(options: Report) -> dict:
    """Write the page and print each run's headline; returns the file and the comparison of each run."""
    out = Path(options.out or Path(options.runs[0]) / "report.html")
    if out.is_file() and out.stat().st_size and not file_holds(out, b"nanoCPT report</title>"):
        raise UserError(f"{out} is no report of ours, so it is not replaced; choose another --out, or move it away")
    runs = [read_run(folder) for folder in options.runs]
    for run in runs:
        run.watts, run.price = options.watts, options.price
    page = render(runs)
    write_text(out, page)
    for run in runs:
        print(f"{escape(run.name, line=True)}: {report_tables.headline(run).striptags()}")
        for line in run.accidents:
            print(line)
        if run.failure:
            print(f"{run.failure}; what helps: {'; '.join(run.advice)}")
    print(f"wrote {out} ({len(page) / 1e6:.2f} MB)")
    return {"out": str(out), "runs": [{"run": run.name, **run.comparison, "failure": run.failure,
                                         "advice": run.advice} for run in runs]}


def main() -> int:
    return cli.run("report.py", __doc__, (Report, write_report))


if __name__ == "__main__":
    sys.exit(main())
