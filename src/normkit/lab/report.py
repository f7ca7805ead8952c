"""The report: one HTML file that holds all it needs and opens offline."""

import csv
import html
import io
import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from plotly.offline import get_plotlyjs  # type: ignore[import-untyped]

from normkit.lab.config import Config
from normkit.lab.data import Data
from normkit.lab.page import SCRIPT, STYLE
from normkit.lab.store import Run
from normkit.lab.studies import Figure, Findings, Study
from normkit.lab.train import Arm

# A report stays under 8 MB: 5 of plotly, and at most this of raw numbers.
_MOST_CSV_BYTES = 2_000_000


def page(
    study: Study,
    config: Config,
    data: Data,
    arms: Sequence[Arm],
    runs: Sequence[Run],
    findings: Findings,
    versions: Sequence[Mapping[str, str]],
) -> str:
    """Return the report as HTML; every string of the user's is escaped."""
    labels = {arm.name: arm.label for arm in arms}
    command = shlex.join(config.command(study.name))
    payload = {
        "figures": [
            {"name": f.name, "traces": f.traces, "layout": f.layout} for f in findings.figures
        ],
        "csv": raw_numbers(runs),
        "file": f"{study.name}.csv",
    }
    sections = "".join(_figure(figure) for figure in findings.figures)
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in findings.notes)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{html.escape(f"{study.name} on {data.name}")} · normkit</title>
<link rel="icon" href="data:,">
<style>{STYLE}</style>
</head>
<body>
<main>
<header>
<p class="kicker">normkit study {html.escape(study.name)} · {html.escape(data.name)} ·
{html.escape(config.model)}</p>
<h1>{html.escape(study.claim)}</h1>
<p class="source">{html.escape(study.source)}</p>
</header>
<section class="verdicts" aria-label="Verdicts">{_verdicts(findings)}</section>
{sections}
<section>
<h2>All arms</h2>
{_table(findings)}
<ul class="notes">{notes}</ul>
</section>
<section>
<h2>Method</h2>
<dl>{_method(config, data, labels, runs, versions)}</dl>
</section>
<section>
<h2>Do it again</h2>
<pre tabindex="0"><code>{html.escape(command)}</code></pre>
<p><a id="download" class="button" href="#">Download the raw numbers (CSV)</a></p>
</section>
</main>
<script type="application/json" id="payload">{embedded(payload)}</script>
<script>{get_plotlyjs()}</script>
<script>{SCRIPT}</script>
</body>
</html>
"""


def embedded(value: Any) -> str:
    """Return `value` as JSON that can stand inside a script element."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def raw_numbers(runs: Sequence[Run]) -> str:
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
    stride = -(-len(text) // _MOST_CSV_BYTES)
    return text if stride <= 1 else _csv(names, rows[::stride])


def _csv(names: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["arm", "seed", "step", "status", "test_accuracy", *names])
    writer.writerows(rows)
    return buffer.getvalue()


def _verdicts(findings: Findings) -> str:
    return "".join(
        f'<article class="verdict {v.word.replace(" ", "-")}"><h2>{html.escape(v.claim)} '
        f'<span class="word">{html.escape(v.word)}</span></h2>'
        f"<p>{html.escape(v.because)}</p></article>"
        for v in findings.verdicts
    )


def _figure(figure: Figure) -> str:
    name = html.escape(figure.name)
    return f"""<section>
<h2>{html.escape(figure.title)}</h2>
<figure id="figure-{name}">
<div class="plot" id="plot-{name}" role="img" aria-label="{html.escape(figure.alt)}"></div>
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


def _method(
    config: Config,
    data: Data,
    labels: Mapping[str, str],
    runs: Sequence[Run],
    versions: Sequence[Mapping[str, str]],
) -> str:
    shape = "×".join(map(str, data.train[0].shape[1:]))
    made = "; ".join(", ".join(f"{k} {v}" for k, v in each.items()) for each in versions)
    items = [
        (
            "Data",
            f"{data.name}: {len(data.train[0]):,} training, {len(data.validation[0]):,} validation "
            f"and {len(data.test[0]):,} test samples of shape {shape}, {data.classes} classes. "
            f"{data.rule[0].upper()}{data.rule[1:]}. Accuracy along the way is measured on at most "
            "1,000 validation samples. Inputs are standardized by the training part.",
        ),
        (
            "Network",
            f"{config.model}, {config.activation}; every arm starts from the same weights and sees "
            "the same batches, paired by seed.",
        ),
        (
            "Training",
            f"{config.optimizer}, learning rate {config.lr:g} (times the arm's factor), batches of "
            f"{config.batch_size}, {config.steps:,} steps, measured every {config.eval_every}; "
            f"{config.seeds} seeds; {len(runs)} runs of {len(labels)} arms; on {config.device}, "
            f"{config.threads} thread{'s' * (config.threads > 1)} a run.",
        ),
        ("Versions", made),
    ]
    return "".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in items)
