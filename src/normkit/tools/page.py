"""The page of an inspection, in the look of the lab's reports: one file, no script."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

from torch import nn

from normkit.common.style import STYLE
from normkit.tools.findings import Finding
from normkit.tools.measure import Layer

_WIDTH, _HEIGHT, _BINS = 180, 56, 36

_STYLE = """
.findings { display: grid; gap: 20px; margin-top: 40px; }
.findings pre { margin: 12px 0 0; padding: 10px 14px; background: var(--page); }
.findings p + p { margin-top: 6px; color: var(--muted); }
svg { display: block; overflow: visible; }
svg rect { fill: var(--plain); }
svg circle { fill: var(--plain); fill-opacity: .6; }
svg line { stroke: var(--line); }
svg text { fill: var(--muted); font-size: 11px; font-variant-numeric: tabular-nums; }
#layers td { white-space: nowrap; }
"""


def page(
    model: nn.Module,
    found: Sequence[Finding],
    notes: Sequence[Finding],
    layers: Sequence[Layer],
    batches: int,
) -> str:
    """An inspection of the model on so many batches as HTML; names of the user's are escaped."""
    count, norms = len(found), len(layers)
    title = f"{count or 'No'} finding{'s' * (count != 1)} in {norms} norms"
    findings = "".join(map(_article, (*found, *notes)))
    rows = "".join(map(_row, layers))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title} · normkit</title>
<link rel="icon" href="data:,">
<style>{STYLE}{_STYLE}</style>
</head>
<body>
<main>
<header>
<p class="kicker">normkit inspect · {html.escape(type(model).__name__)} ·
{batches} batches</p>
<h1>{title}</h1>
</header>
<section class="findings" aria-label="Findings">{findings}</section>
<section>
<h2>Every norm</h2>
<div class="scroll" tabindex="0" role="region" aria-label="Table of all norms">
<table id="layers"><thead><tr>
<th scope="col">layer</th><th scope="col">input</th><th scope="col">output</th>
<th scope="col">running mean against the data's</th><th scope="col">values a statistic</th>
<th scope="col">standard error of a batch's mean</th><th scope="col">gradient</th>
</tr></thead><tbody>{rows}</tbody></table></div>
<ul class="notes">
<li>Input and output are values of the first batch, in training; the axis spans their smallest and
largest.</li>
<li>A point is a channel, both means in standard deviations of the data, on the line where they
agree.</li>
<li>The gradient is the norm of the loss's gradient with respect to the output, and to weight and
bias, averaged over the batches; there is none without a loss.</li>
</ul>
</section>
</main>
</body>
</html>
"""


def _article(f: Finding) -> str:
    kind = "note" if f.note else "reversed"
    cost = f"<p>It costs {html.escape(f.price)}.</p>" if f.price else ""
    fix = f'<pre tabindex="0"><code>{html.escape(f.fix)}</code></pre>' if f.fix else ""
    return (
        f'<article class="verdict {kind}"><h2>{html.escape(f.where)} '
        f'<span class="word">{f.code} {html.escape(f.name)}</span></h2>'
        f"<p>{html.escape(f.measured)}</p>{cost}<p>{html.escape(f.why)}</p>{fix}</article>"
    )


def _row(layer: Layer) -> str:
    kind = layer.norm.kind if layer.norm else "its own"
    error = layer.input.errors()[0]
    gradient = " / ".join(
        f"{sum(g) / len(g):.2g}" for g in (layer.gradients, layer.weight_gradients) if g
    )
    frozen = ", frozen" if layer.frozen else ""
    return (
        f'<tr><th scope="row">{html.escape(layer.name)}<br>{kind}{frozen}</th>'
        f"<td>{_histogram(layer.inputs, 'input')}</td>"
        f"<td>{_histogram(layer.outputs, 'output')}</td>"
        f"<td>{_agreement(layer)}</td><td>{layer.values:,}</td>"
        f"<td>{error:.2g}</td><td>{gradient or '–'}</td></tr>"
    )


def _histogram(values: list[float], what: str) -> str:
    if not values:
        return "–"
    low, high = min(values), max(values)
    counts = [0] * _BINS
    for value in values:
        counts[min(_BINS - 1, int((value - low) / ((high - low) or 1) * _BINS))] += 1
    width = _WIDTH / _BINS
    bars = "".join(
        f'<rect x="{i * width:.1f}" y="{_HEIGHT - h:.1f}" width="{width - 0.5:.1f}" '
        f'height="{h:.1f}"/>'
        for i, n in enumerate(counts)
        if (h := n / max(counts) * _HEIGHT)
    )
    ends = (
        f'<text x="0" y="{_HEIGHT + 14}">{low:.2g}</text>'
        f'<text x="{_WIDTH}" y="{_HEIGHT + 14}" text-anchor="end">{high:.2g}</text>'
    )
    label = f"histogram of the {what}, from {low:.2g} to {high:.2g}"
    return _svg(_WIDTH, label, bars + ends)


def _agreement(layer: Layer) -> str:
    if not layer.uses_batch or layer.running is None or layer.input.all is None:
        return "–"
    scale = (layer.input.all.variance + layer.module.eps).sqrt()  # type: ignore[operator]
    data = (layer.input.all.mean / scale).tolist()
    running = (layer.running[0].to(scale) / scale).tolist()
    points = [p for p in zip(data, running, strict=True) if all(map(math.isfinite, p))]
    if not points:
        return "–"
    most = max(max(abs(x), abs(y)) for x, y in points) or 1.0

    def place(value: float) -> float:
        return (value / most + 1) / 2 * _HEIGHT

    dots = "".join(
        f'<circle cx="{place(x):.1f}" cy="{_HEIGHT - place(y):.1f}" r="2"/>'
        for x, y in points[:: max(1, len(points) // 200)]
    )
    line = f'<line x1="0" y1="{_HEIGHT}" x2="{_HEIGHT}" y2="0"/>'
    ends = f'<text x="0" y="{_HEIGHT + 14}">±{most:.2g}</text>'
    return _svg(_HEIGHT, f"running means against the data's, up to {most:.2g}", line + dots + ends)


def _svg(width: int, label: str, body: str) -> str:
    return (
        f'<svg width="{width}" height="{_HEIGHT + 18}" role="img" aria-label="{label}">{body}</svg>'
    )
