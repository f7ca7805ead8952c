"""The report: one HTML file that holds all it needs and opens offline."""

import csv
import html
import io
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from plotly.offline import get_plotlyjs  # type: ignore[import-untyped]

from normkit.common.style import SCRIPT, STYLE
from normkit.lab.results.measures import duration
from normkit.lab.results.store import Run
from normkit.lab.study import Figure, Findings, Study
from normkit.lab.training.arms import Arm
from normkit.lab.training.config import Config
from normkit.lab.training.data import Data

# A report stays under 10 MB: 5 of plotly, at most this of raw numbers, and the figures.
_MOST_CSV_BYTES = 2_000_000


@dataclass(frozen=True)
class Section:
    """One study that was done: what a report says of it.

    `seconds` is the wall-clock time that training took, measurements and probes included.
    """

    study: Study
    config: Config
    data: Data
    arms: Sequence[Arm]
    runs: Sequence[Run]
    findings: Findings
    versions: Sequence[Mapping[str, str]]
    seconds: float = 0.0


def page(sections: Sequence[Section], skipped: Mapping[str, str] | None = None) -> str:
    """Return the report as HTML; every string of the user's is escaped.

    `skipped` maps the studies that were not done to the reasons.
    """
    many = len(sections) != 1 or bool(skipped)
    first = sections[0]
    most = _MOST_CSV_BYTES // len(sections)
    payload = {
        "figures": [
            {"name": f"{s.study.name}-{f.name}", "traces": f.traces, "layout": f.layout}
            for s in sections
            for f in s.findings.figures
        ],
        "files": {s.study.name: raw_numbers(s.runs, most) for s in sections},
    }
    what = "all studies" if many else first.study.name
    named = f"{html.escape(first.data.name)} · {html.escape(first.config.model)}"
    kicker = f'<p class="kicker">normkit study {"all" if many else what} · {named}</p>'
    if many:
        articles = "".join(
            f'<article id="{s.study.name}" class="study">{_study(s, "h2")}</article>'
            for s in sections
        )
        names = ["overview", *(s.study.name for s in sections)]
        links = "".join(f'<li><a href="#{name}">{name}</a></li>' for name in names)
        jump = f'<nav class="jump" aria-label="Studies"><ul>{links}</ul></nav>'
        body = f"""<header id="overview">
{kicker}
<h1>What normalization does here</h1>
<p class="source">{len(sections)} published claims, each tested on this data and network.</p>
</header>
{_overview(sections, skipped or {})}
{articles}"""
    else:
        jump = ""
        body = f"{kicker}{_study(first, 'h1')}"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{html.escape(f"{what} on {first.data.name}")} · normkit</title>
<link rel="icon" href="data:,">
<style>{STYLE}</style>
</head>
<body>
{jump}
<main>
{body}
</main>
<script type="application/json" id="payload">{embedded(payload)}</script>
<script>{get_plotlyjs()}</script>
<script>{SCRIPT}</script>
</body>
</html>
"""


def _overview(sections: Sequence[Section], skipped: Mapping[str, str]) -> str:
    """Return the table of all claims and verdicts, which is the way into the page as well."""
    rows = "".join(
        _overview_row(f'<a href="#{s.study.name}">{s.study.name}</a>', v.claim, v.word, v.because)
        for s in sections
        for v in s.findings.verdicts
    )
    rows += "".join(
        _overview_row(html.escape(name), "not done", "skipped", reason)
        for name, reason in skipped.items()
    )
    head = "".join(
        f'<th scope="col" role="columnheader">{name}</th>'
        for name in ("Study", "Claim", "Verdict", "Why")
    )
    return (
        '<nav class="overview" aria-label="Claims and verdicts"><div class="scroll" tabindex="0" '
        'role="region" aria-label="Table of claims and verdicts"><table class="overview" '
        f'role="table"><thead role="rowgroup"><tr role="row">{head}</tr></thead>'
        f'<tbody role="rowgroup">{rows}</tbody></table></div></nav>'
    )


def _overview_row(study: str, claim: str, word: str, because: str) -> str:
    # The roles are spelled out, for a phone's style takes the table apart.
    kind = word.replace(" ", "-")
    return (
        f'<tr role="row"><th scope="row" role="rowheader">{study}</th>'
        f'<td role="cell">{html.escape(claim)}</td>'
        f'<td role="cell" class="{kind}"><span class="word">{html.escape(word)}</span></td>'
        f'<td role="cell">{html.escape(because)}</td></tr>'
    )


def _study(section: Section, heading: str) -> str:
    study, findings = section.study, section.findings
    command = shlex.join(section.config.command(study.name))
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in findings.notes)
    published = (
        f'<p class="source">Published: {html.escape(study.published)}</p>\n'
        if study.published
        else ""
    )
    figures = "".join(_figure(study, figure) for figure in findings.figures)
    return f"""<header>
<{heading}>{html.escape(study.claim)}</{heading}>
<p class="source">{html.escape(study.source)}</p>
{published}</header>
<section class="verdicts" aria-label="Verdicts">{_verdicts(findings)}</section>
{figures}
<section>
<h3>All arms</h3>
{_table(findings)}
<ul class="notes">{notes}</ul>
</section>
<section>
<h3>Method</h3>
<dl>{_method(section)}</dl>
</section>
<section>
<h3>Do it again</h3>
<pre tabindex="0"><code>{html.escape(command)}</code></pre>
<p><a class="button" data-file="{study.name}" href="#">Download the raw numbers (CSV)</a></p>
</section>
"""


def embedded(value: Any) -> str:
    """Return `value` as JSON that can stand inside a script element."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def raw_numbers(runs: Sequence[Run], most: int = _MOST_CSV_BYTES) -> str:
    """Return the curves of all runs as CSV, a line per evaluation, thinned where too long."""
    names = sorted({name for run in runs for name in run.curves})
    rows = []
    for run in runs:
        by_step: dict[int, dict[str, float]] = {}
        for name, (steps, values) in run.curves.items():
            for step, value in zip(steps, values, strict=True):
                by_step.setdefault(step, {})[name] = value
        for step in sorted(by_step):
            shown = [by_step[step].get(name) for name in names]
            rows.append([run.arm, run.seed, step, run.status, run.test_accuracy, *shown])
    text = _csv(names, rows)
    stride = -(-len(text) // most)
    return text if stride <= 1 else _csv(names, rows[::stride])


def _csv(names: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["arm", "seed", "step", "status", "test_accuracy", *names])
    writer.writerows(rows)
    return buffer.getvalue()


def _verdicts(findings: Findings) -> str:
    return "".join(
        f'<div class="verdict {v.word.replace(" ", "-")}"><h3>{html.escape(v.claim)} '
        f'<span class="word">{html.escape(v.word)}</span></h3>'
        f"<p>{html.escape(v.because)}</p></div>"
        for v in findings.verdicts
    )


def _figure(study: Study, figure: Figure) -> str:
    name = html.escape(f"{study.name}-{figure.name}")
    alt = html.escape(figure.alt)
    return f"""<section>
<h3>{html.escape(figure.title)}</h3>
<figure id="figure-{name}">
<div class="plot" id="plot-{name}" role="img" tabindex="0" aria-label="{alt}"></div>
<figcaption>{html.escape(figure.caption)}</figcaption>
</figure>
</section>
"""


def _table(findings: Findings) -> str:
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in findings.columns)
    body = "".join(
        f'<tr><th scope="row">{html.escape(row[0])}</th>'
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in findings.rows
    )
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="Table of all arms">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _method(section: Section) -> str:
    config, data = section.config, section.data
    shape = "×".join(map(str, data.train[0].shape[1:]))
    made = "; ".join(", ".join(f"{k} {v}" for k, v in each.items()) for each in section.versions)
    rates = (
        f"Every arm ran at its own rate and, tuned, at the best of {_factors(section.study)} times "
        "it, chosen by the final validation accuracy of one run from a seed that no other run has."
        if section.study.tuned
        else "Every arm ran at its own rate."
    )
    items = [
        (
            "Data",
            f"{data.name}: {len(data.train[0]):,} training, {len(data.validation[0]):,} validation "
            f"and {len(data.test[0]):,} test samples of shape {shape}, {data.classes} classes. "
            f"{data.rule[0].upper()}{data.rule[1:]}. Accuracy along the way is measured on at most "
            "1,000 validation samples. Inputs are standardized by the training part, where an arm "
            "doesn't say otherwise.",
        ),
        (
            "Network",
            f"{config.model}, {config.activation}, where an arm doesn't say otherwise; every arm "
            "starts from the same weights and sees the same batches, paired by seed.",
        ),
        (
            "Training",
            f"{config.optimizer}, learning rate {config.lr:g} (times the arm's factor), batches of "
            f"{config.batch_size}, {config.steps:,} steps, measured every {config.eval_every}; "
            f"{config.seeds} seeds; {len(section.runs)} runs of {len(section.arms)} arms; on "
            f"{config.device}, {config.threads} thread{'s' * (config.threads > 1)} a run. {rates}",
        ),
        (
            "Time",
            f"{duration(section.seconds)} by the clock, {config.jobs or 'several'} run"
            f"{'s' * (config.jobs != 1)} at a time, measurements and probes included.",
        ),
        ("Versions", made),
    ]
    return "".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in items)


def _factors(study: Study) -> str:
    return ", ".join(f"{factor:g}" for factor in study.grid)
