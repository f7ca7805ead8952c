"""The figures of the studies: lines over steps, intervals by arm, maps; all named and described.

A colour is a number from 0 to 9, one of the page's palette, the same in every figure of a study;
0 is ink, for the baseline. Values are drawn as medians over the seeds with a band from the smallest
to the largest, unless the caption says otherwise.
"""

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from normkit.lab.results.store import Run
from normkit.lab.results.verdict import Estimate, smoothed
from normkit.lab.study import Figure

_MOST_POINTS = 400


@dataclass(frozen=True)
class Axis:
    """An axis: its title with the unit, whether it is logarithmic, and d3's format of its ticks."""

    title: str
    log: bool = False
    format: str = ""


STEPS = Axis("training steps", format=",")
ACCURACY = Axis("validation accuracy", format=".0%")


@dataclass(frozen=True)
class Line:
    """One line, with a band from `low` to `high` where they are given."""

    label: str
    colour: int
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    dash: str = "solid"
    markers: bool = False


@dataclass(frozen=True)
class Mark:
    """A dot on a figure of lines, with what it says when pointed at."""

    label: str
    colour: int
    x: float
    y: float
    hover: str


@dataclass(frozen=True)
class Interval:
    """One row of a figure of intervals."""

    label: str
    colour: int
    effect: Estimate


def over_seeds(
    label: str, colour: int, runs: Sequence[Run], curve: str, dash: str = "solid", smooth: int = 0
) -> Line | None:
    """Return the median and the range of a curve over the runs that finished; None without any.

    `smooth=1` smooths each run by the mean of five evaluations first, as the verdicts do.
    """
    found = [run.curves[curve] for run in runs if curve in run.curves and run.status == "finished"]
    found = found or [run.curves[curve] for run in runs if curve in run.curves]
    if not found:
        return None
    length = min(len(steps) for steps, _ in found)
    pick = kept(length)
    rows = [smoothed(values) if smooth else values for _, values in found]
    values = np.array([row[:length] for row in rows])[:, pick]
    return Line(
        label,
        colour,
        [found[0][0][i] for i in pick],
        short(np.median(values, 0)),
        short(values.min(0)),
        short(values.max(0)),
        dash,
    )


def lines(
    name: str,
    title: str,
    caption: str,
    alt: str,
    drawn: Sequence[Line | None],
    x: Axis = STEPS,
    y: Axis = ACCURACY,
    level: tuple[float, str] | None = None,
    marks: Sequence[Mark] = (),
) -> Figure:
    """Return lines in one panel, named at their ends; `level` is a horizontal line and its name."""
    kept_lines = [line for line in drawn if line is not None]
    traces = [trace for line in kept_lines for trace in _traces(line, x, y)]
    traces += [_mark(mark) for mark in marks]
    layout: dict[str, Any] = {
        "xaxis": _axis(x, [v for line in kept_lines for v in line.x]),
        "yaxis": _axis(y),
        "shapes": [],
        "annotations": [],
        "names": "ends",
    }
    if level is not None:
        layout |= _level(*level)
    return Figure(name, title, caption, alt, traces, layout)


def panels(
    name: str,
    title: str,
    caption: str,
    alt: str,
    shown: Sequence[tuple[str, Sequence[Line | None]]],
    x: Axis = STEPS,
    y: Axis = ACCURACY,
) -> Figure:
    """Return panels side by side, their axes alike; equal labels share a legend's entry."""
    traces: list[dict[str, Any]] = []
    layout: dict[str, Any] = {"yaxis": _axis(y), "annotations": [], "names": "below"}
    named: set[str] = set()
    across = [v for _, drawn in shown for line in drawn if line is not None for v in line.x]
    for place, (heading, drawn) in enumerate(shown):
        suffix = "" if place == 0 else str(place + 1)
        present = [line for line in drawn if line is not None]
        for line in present:
            for trace in _traces(line, x, y):
                trace |= {"xaxis": f"x{suffix}", "yaxis": "y"}
                if trace["meta"] == "line":
                    trace["showlegend"] = line.label not in named
                    named.add(line.label)
                traces.append(trace)
        left, right = _domain(place, len(shown))
        layout[f"xaxis{suffix}"] = {
            **_axis(x, across, most=3 if len(shown) > 2 else 6),
            "domain": [left, right],
            "nticks": 5,
        }
        layout["annotations"].append(_heading(heading, left))
    return Figure(name, title, caption, alt, traces, layout)


def grid(
    name: str,
    title: str,
    caption: str,
    alt: str,
    rows: Sequence[str],
    columns: Sequence[str],
    cells: Sequence[Sequence[Sequence[Line]]],
    x: Axis = STEPS,
    y: Axis = ACCURACY,
) -> Figure:
    """Return small multiples: a panel for every row and column, one vertical axis to a row.

    Lines of a cell after the first give their bands alone.
    """
    traces: list[dict[str, Any]] = []
    layout: dict[str, Any] = {"annotations": [], "names": "none", "height": 90 + 180 * len(rows)}
    headings = []
    for r, of_row in enumerate(cells):
        bottom, top = _domain(len(rows) - 1 - r, len(rows), 0.06)
        what, _, side = rows[r].rpartition(", ")
        named = "<br>".join([*textwrap.wrap(what, 22), side])
        for c, drawn in enumerate(of_row):
            place = r * len(columns) + c
            suffix = "" if place == 0 else str(place + 1)
            first = f"y{r * len(columns) + 1}" if r else "y"
            left, right = _domain(c, len(columns), 0.02)
            under = r == len(rows) - 1
            layout[f"xaxis{suffix}"] = {
                **_axis(x),
                "domain": [left, right],
                "anchor": f"y{suffix}",
                "nticks": 4,
                "showticklabels": under,
                "title": {"text": x.title if under else ""},
            }
            layout[f"yaxis{suffix}"] = {
                **_axis(y),
                "domain": [bottom, top],
                "anchor": f"x{suffix}",
                "showticklabels": c == 0,
                "nticks": 5,
                "title": {"text": "" if c else named},
                **({"matches": first} if c else {}),
            }
            layout["annotations"].append(_heading("" if r else columns[c], left, top + 0.01))
            headings.append(f"{columns[c]} · {rows[r]}")
            for line in drawn:
                for trace in _traces(line, x, y):
                    if line is drawn[0] or trace["meta"] == "band":
                        traces.append(trace | {"xaxis": f"x{suffix}", "yaxis": f"y{suffix}"})
    return Figure(name, title, caption, alt, traces, layout | {"headings": headings})


def intervals(
    name: str,
    title: str,
    caption: str,
    alt: str,
    rows: Sequence[Interval],
    x: Axis,
    level: float | Sequence[float] | None = None,
) -> Figure:
    """Return a dot with its interval for each row, one below the other; `level`: vertical lines.

    An infinite end of an interval is drawn at the end of the finite ones.
    """
    finite = [
        v
        for row in rows
        for v in (row.effect.median, row.effect.low, row.effect.high)
        if math.isfinite(v)
    ] or [0.0]
    low, high = min(finite), max(finite)

    def cut(value: float) -> float:
        return min(max(value, low), high)

    traces: list[dict[str, Any]] = []
    for row in rows:
        e = row.effect
        middle = cut(e.median)
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": row.label,
                "x": short([middle]),
                "y": [row.label],
                "error_x": {
                    "type": "data",
                    "symmetric": False,
                    "array": short([cut(e.high) - middle]),
                    "arrayminus": short([middle - cut(e.low)]),
                    "color": f"@{row.colour}",
                    "thickness": 2,
                    "width": 0,
                },
                "marker": {"color": f"@{row.colour}", "size": 11},
                "hovertemplate": f"{_said(e)}<extra>{row.label}</extra>",
                "meta": "dot",
            }
        )
    levels = [] if level is None else [level] if isinstance(level, float) else [*level]
    layout: dict[str, Any] = {
        "xaxis": _axis(x, [*finite, *levels]),
        "yaxis": {
            "autorange": "reversed",
            "type": "category",
            "categoryorder": "array",
            "categoryarray": [row.label for row in rows],
            "ticks": "",
        },
        "names": "none",
        "annotations": [],
        "height": 110 + 34 * len(rows),
    }
    # Room for the dots, and for the levels where all intervals lie on one side.
    if x.log and "range" in layout["xaxis"]:
        layout["xaxis"]["range"] = _wider(*layout["xaxis"]["range"])
    elif levels:
        layout["xaxis"]["range"] = _wider(min(low, *levels), max(high, *levels))
    layout["shapes"] = [
        {
            "type": "line",
            "yref": "paper",
            "y0": 0,
            "y1": 1,
            "x0": place,
            "x1": place,
            "line": {"color": "@muted", "width": 1, "dash": "dot"},
            "layer": "below",
        }
        for place in levels
    ]
    return Figure(name, title, caption, alt, traces, layout)


def maps(
    name: str,
    title: str,
    caption: str,
    alt: str,
    shown: Sequence[tuple[str, Sequence[float], Sequence[float], Sequence[Sequence[float]]]],
    x: Axis,
    y: Axis,
    z: Axis,
) -> Figure:
    """Return contours side by side on one scale of height: (heading, x, y, z by row of y)."""
    heights = [v for _, _, _, rows in shown for row in rows for v in row if math.isfinite(v)]
    traces: list[dict[str, Any]] = []
    layout: dict[str, Any] = {
        "yaxis": _axis(y),
        "annotations": [],
        "names": "none",
    }
    for place, (heading, xs, ys, rows) in enumerate(shown):
        suffix = "" if place == 0 else str(place + 1)
        traces.append(
            {
                "type": "contour",
                "name": heading,
                "x": short(xs),
                "y": short(ys),
                "z": [[v if math.isfinite(v) else None for v in short(row)] for row in rows],
                "xaxis": f"x{suffix}",
                "yaxis": "y",
                "zmin": min(heights, default=0.0),
                "zmax": max(heights, default=1.0),
                "ncontours": 24,
                "colorscale": "Viridis",
                "showscale": place == len(shown) - 1,
                "colorbar": {"title": {"text": z.title, "side": "right"}, "thickness": 12},
                "hovertemplate": "%{z:.4g}<extra>" + heading + "</extra>",
                "meta": "map",
            }
        )
        left, right = _domain(place, len(shown))
        layout[f"xaxis{suffix}"] = {**_axis(x), "domain": [left, right], "nticks": 5}
        layout["annotations"].append(_heading(heading, left))
    return Figure(name, title, caption, alt, traces, layout)


def kept(length: int) -> list[int]:
    """Return which of `length` points to draw: all, or as many as the eye tells apart."""
    return sorted({round(i) for i in np.linspace(0, length - 1, min(length, _MOST_POINTS))})


def short(values: Any) -> list[float]:
    """Return the values at five significant digits, which is what a figure needs."""
    return [float(f"{value:.5g}") for value in values]


def _traces(line: Line, x: Axis, y: Axis) -> list[dict[str, Any]]:
    colour = f"@{line.colour}"
    traces: list[dict[str, Any]] = []
    if line.low is not None and line.high is not None:
        traces.append(
            {
                "type": "scatter",
                "name": f"{line.label}, all seeds",
                "legendgroup": line.label,
                "showlegend": False,
                "hoverinfo": "skip",
                "x": [*line.x, *line.x[::-1]],
                "y": _drawable([*line.high, *line.low[::-1]]),
                "mode": "none",
                "fill": "toself",
                "fillcolor": f"{colour}-band",
                "meta": "band",
            }
        )
    traces.append(
        {
            "type": "scatter",
            "name": line.label,
            "legendgroup": line.label,
            "x": list(line.x),
            "y": _drawable(line.y),
            "mode": "lines+markers" if line.markers else "lines",
            "line": {"color": colour, "width": 2.4, "dash": line.dash},
            "marker": {"color": colour, "size": 7},
            "hovertemplate": f"%{{x:{x.format or '.4g'}}}: %{{y:{y.format or '.4g'}}}"
            f"<extra>{line.label}</extra>",
            "meta": "line",
        }
    )
    return traces


def _drawable(values: Sequence[float]) -> list[float | None]:
    return [v if math.isfinite(v) else None for v in short(values)]


def _mark(mark: Mark) -> dict[str, Any]:
    return {
        "type": "scatter",
        "name": mark.label,
        "legendgroup": mark.label,
        "showlegend": False,
        "x": [mark.x],
        "y": [mark.y],
        "mode": "markers",
        "marker": {
            "color": f"@{mark.colour}",
            "size": 12,
            "line": {"color": "@page", "width": 2},
        },
        "hovertemplate": f"{mark.hover}<extra>{mark.label}</extra>",
        "meta": "dot",
    }


def _axis(axis: Axis, values: Sequence[float] = (), most: int = 12) -> dict[str, Any]:
    made: dict[str, Any] = {"title": {"text": axis.title}}
    if axis.format:
        made["tickformat"] = axis.format
    if axis.log:
        made["type"] = "log"
        positive = [v for v in values if 0 < v < math.inf]
        if positive:
            first, last = min(positive), max(positive)
            edge = 0.02 * max(math.log10(last / first), 0.1)
            made |= {
                "range": [math.log10(first) - edge, math.log10(last) + edge],
                "tickvals": _ticks(first, last, most),
            }
    return made


def _wider(first: float, last: float) -> list[float]:
    edge = 0.04 * ((last - first) or 1.0)
    return [first - edge, last + edge]


def _ticks(first: float, last: float, most: int) -> list[float]:
    exponents = range(math.floor(math.log10(first)), math.ceil(math.log10(last)) + 1)

    def between(*mantissas: float) -> list[float]:
        every = [float(f"{m}e{e}") for e in exponents for m in mantissas]
        return [tick for tick in every if first * 0.999 <= tick <= last * 1.001]

    ticks = between(1, 2, 5)
    if len(ticks) < 3:
        ticks = between(1, 1.5, 2, 3, 5, 7)
    elif len(ticks) > most:
        ticks = between(1)
    return ticks[:: max(1, -(-len(ticks) // most))]


def _level(value: float, text: str) -> dict[str, Any]:
    return {
        "shapes": [
            {
                "type": "line",
                "xref": "paper",
                "x0": 0,
                "x1": 1,
                "y0": value,
                "y1": value,
                "line": {"color": "@muted", "width": 1, "dash": "dot"},
                "layer": "below",
            }
        ],
        "annotations": [
            {
                "xref": "paper",
                "x": 0,
                "y": value,
                "xanchor": "left",
                "yanchor": "bottom",
                "showarrow": False,
                "text": text,
                "font": {"color": "@muted", "size": 12},
            }
        ],
    }


def _domain(place: int, count: int, gap: float = 0.04) -> tuple[float, float]:
    width = (1 - gap * (count - 1)) / count
    left = place * (width + gap)
    return left, left + width


def _heading(text: str, left: float, bottom: float = 1.02) -> dict[str, Any]:
    return {
        "xref": "paper",
        "yref": "paper",
        "x": left,
        "y": bottom,
        "xanchor": "left",
        "yanchor": "bottom",
        "showarrow": False,
        "text": f"<b>{text}</b>",
        "font": {"color": "@ink", "size": 14},
    }


def _said(effect: Estimate) -> str:
    what = "range" if effect.is_range else "95 %"
    return f"{effect.median:.4g} ({what}: {effect.low:.4g} to {effect.high:.4g}), N = {effect.n}"
