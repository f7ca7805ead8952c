"""The look of a report: its style and its script, which draws the figures in the page's colours."""

STYLE = """
:root {
  --page: #fdfdfc; --ink: #1c1e21; --muted: #5f6670; --line: #dfe2e6; --soft: #f3f4f2;
  --good: #00704f; --bad: #a8410a; --plain: #4b525b;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14171a; --ink: #e9ebed; --muted: #a0a8b1; --line: #32383e; --soft: #1d2125;
    --good: #4cc79a; --bad: #f29058; --plain: #b9c0c8;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 17px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
main { max-width: 1080px; margin: 0 auto; padding: 64px 32px 96px; }
header { max-width: 780px; }
.kicker { margin: 0 0 12px; color: var(--muted); font-size: 14px; overflow-wrap: anywhere; }
h1 { margin: 0 0 12px; font-size: 34px; line-height: 1.2; font-weight: 650;
  letter-spacing: -.015em; }
h2, h3 { margin: 0 0 14px; font-size: 21px; line-height: 1.3; font-weight: 620; }
nav.overview { margin-top: 40px; }
nav.jump { position: sticky; top: 0; z-index: 2; background: var(--page); overflow-x: auto;
  border-bottom: 1px solid var(--line); font-size: 14.5px; white-space: nowrap; }
nav.jump ul { display: flex; gap: 20px; max-width: 1080px; margin: 0 auto; padding: 10px 32px;
  list-style: none; }
nav.jump a { text-decoration: none; color: var(--muted); }
nav.jump a:hover, nav.jump a:focus { color: var(--ink); text-decoration: underline; }
.study, #overview { scroll-margin-top: 48px; }
a { color: inherit; }
.study > header h2 { font-size: 28px; line-height: 1.25; }
.study { margin-top: 96px; padding-top: 40px; border-top: 1px solid var(--line); }
table.overview td:nth-child(2) { min-width: 150px; }
table.overview td:nth-child(4) { min-width: 320px; }
.overview td.holds, .overview td.reversed { border-color: var(--line); }
.overview .word { float: none; font-weight: 600; white-space: nowrap; }
.source { margin: 0; color: var(--muted); font-size: 15px; }
section { margin-top: 60px; }
.verdicts { margin-top: 40px; display: grid; gap: 20px;
  grid-template-columns: repeat(auto-fit, minmax(280px, 1fr)); }
.verdict { padding: 18px 22px 20px; background: var(--soft); border-radius: 6px;
  border-top: 3px solid var(--plain); }
.verdict h2, .verdict h3 { font-size: 17px; margin-bottom: 8px; }
.verdict p { margin: 0; font-size: 15px; line-height: 1.55; }
.verdict h3 { display: flex; justify-content: space-between; gap: 16px; }
.word { float: right; color: var(--plain); }
.verdict h3 .word { white-space: nowrap; }
.holds { border-color: var(--good); } .holds .word { color: var(--good); }
.reversed { border-color: var(--bad); } .reversed .word { color: var(--bad); }
figure { margin: 0; }
.plot { width: 100%; }
figcaption { margin-top: 10px; max-width: 780px; color: var(--muted); font-size: 15px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14.5px; line-height: 1.45;
  font-variant-numeric: tabular-nums; }
th, td { padding: 10px 14px 10px 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line); }
thead th { color: var(--muted); font-weight: 500; font-size: 13.5px; vertical-align: bottom; }
tbody th { font-weight: 600; min-width: 140px; }
td { min-width: 90px; }
.notes { margin: 18px 0 0; padding-left: 20px; max-width: 780px; color: var(--muted);
  font-size: 15px; }
dl { margin: 0; display: grid; grid-template-columns: 110px 1fr; gap: 10px 20px; max-width: 900px;
  font-size: 15px; }
dt { color: var(--muted); } dd { margin: 0; overflow-wrap: anywhere; }
pre { margin: 0 0 20px; padding: 16px 20px; background: var(--soft); border-radius: 6px;
  font: 14px/1.6 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; }
.button { display: inline-block; padding: 9px 16px; border: 1px solid var(--line);
  border-radius: 6px; color: var(--ink); text-decoration: none; font-size: 15px; }
.button:hover { background: var(--soft); }
:focus-visible { outline: 2px solid #3b8fd4; outline-offset: 2px; }
@media (max-width: 640px) {
  body { font-size: 16px; }
  main { padding: 32px 18px 64px; }
  h1 { font-size: 26px; } .study > header h2 { font-size: 23px; }
  section { margin-top: 44px; }
  dl { grid-template-columns: 1fr; gap: 2px; } dd { margin-bottom: 12px; }
  nav.jump ul { padding: 10px 18px; }
  table.overview, table.overview tbody { display: block; }
  table.overview thead { position: absolute; clip-path: inset(50%); }
  table.overview tr { display: grid; grid-template-columns: 1fr auto; gap: 4px 12px;
    padding: 12px 0; border-bottom: 1px solid var(--line); }
  table.overview th, table.overview td { padding: 0; border: 0; min-width: 0; }
  table.overview td:nth-child(2) { grid-area: 2 / 1; }
  table.overview td:nth-child(3) { grid-area: 1 / 2; }
  table.overview td:nth-child(4) { grid-area: 3 / 1 / auto / span 2; min-width: 0; }
}
@media print { .button { display: none; } }
"""

# Colours of Okabe & Ito, which the colour-blind tell apart, moved to 4.5:1 or better on the page.
SCRIPT = r"""
"use strict";
const payload = JSON.parse(document.getElementById("payload").textContent);
const palettes = {
  light: {
    page: "#fdfdfc", ink: "#1c1e21", muted: "#5f6670", line: "#e6e8eb",
    0: "#33383e", 1: "#0068a8", 2: "#00795a", 3: "#9c4a80", 4: "#a06800",
    5: "#b8470b", 6: "#7b838c", 7: "#5a51b8", 8: "#007a87", 9: "#b0304f",
  },
  dark: {
    page: "#14171a", ink: "#e9ebed", muted: "#a0a8b1", line: "#2b3036",
    0: "#e9ebed", 1: "#63b7ee", 2: "#35c497", 3: "#e08fc0", 4: "#e8ab2e",
    5: "#ef8550", 6: "#98a1ab", 7: "#a79ff0", 8: "#4cc4d2", 9: "#f08099",
  },
};
const dark = window.matchMedia("(prefers-color-scheme: dark)");
const narrow = window.matchMedia("(max-width: 640px)");

const strokes = {solid: "—", dash: "--", dot: "··"};

function coloured(value, palette) {
  if (typeof value === "string" && value.startsWith("@")) {
    const name = value.slice(1);
    return name.endsWith("-band") ? palette[name.slice(0, -5)] + "22" : palette[name];
  }
  if (Array.isArray(value)) return value.map((each) => coloured(each, palette));
  if (value && typeof value === "object") {
    return Object.fromEntries(
      Object.entries(value).map(([key, each]) => [key, coloured(each, palette)]));
  }
  return value;
}

// Name each line at its right end; names that would overlap are moved apart.
function endLabels(traces, height, range, place) {
  const lines = traces.filter((trace) => trace.meta === "line" && trace.showlegend !== false);
  const [low, high] = range;
  const gap = 19 / height * (high - low);
  const ends = lines.map((trace) => ({
    text: trace.name, color: trace.line.color, dash: trace.line.dash,
    y: trace.y.filter(Number.isFinite).map(place).pop(),
  })).filter((end) => Number.isFinite(end.y)).sort((a, b) => a.y - b.y);
  if (!ends.length) return [];
  const places = ends.map((end) => end.y);
  for (let i = 1; i < places.length; i++) places[i] = Math.max(places[i], places[i - 1] + gap);
  places[places.length - 1] = Math.min(places[places.length - 1], high);
  for (let i = places.length - 2; i >= 0; i--) places[i] = Math.min(places[i], places[i + 1] - gap);
  const dashed = lines.some((trace) => trace.line.dash !== "solid");
  return ends.map((end, i) => ({
    xref: "paper", x: 1.012, xanchor: "left", y: places[i], yanchor: "middle", showarrow: false,
    text: dashed ? `${strokes[end.dash]} ${end.text}` : end.text,
    font: {color: end.color, size: 13},
  }));
}

// A title too long for a phone goes on in further lines.
function wrapped(text, most) {
  return text.split(" ").reduce((lines, word) => {
    const longer = `${lines.at(-1)} ${word}`.trim();
    const full = lines.at(-1) && longer.length > most;
    return full ? [...lines, word] : [...lines.slice(0, -1), longer];
  }, [""]).join("<br>");
}

// Panels that stand side by side on a wide screen are put one below the other on a narrow one.
function stacked(traces, layout, headings) {
  const panels = Object.keys(layout).filter((key) => key.startsWith("xaxis")).sort(
    (a, b) => (Number(a.slice(5)) || 1) - (Number(b.slice(5)) || 1));
  if (panels.length < 2) return 1;
  const share = 1 / panels.length, y = layout.yaxis, shown = headings ? .82 : .68;
  panels.forEach((key, i) => {
    const suffix = key.slice(5), top = 1 - i * share;
    layout[key] = {...layout[key], domain: [0, 1], anchor: "y" + suffix};
    layout["yaxis" + suffix] = {
      ...(layout["yaxis" + suffix] || {...y, matches: "y"}),
      domain: [top - shown * share, top - .08 * share], showticklabels: true,
    };
    Object.assign(layout.annotations[i], {x: 0, y: top - .07 * share});
    if (headings) {
      layout["yaxis" + suffix].title = {text: ""};
      const last = i === panels.length - 1;
      Object.assign(layout[key], {showticklabels: last, ...(last ? {} : {title: {text: ""}})});
      Object.assign(layout.annotations[i], {text: `<b>${headings[i]}</b>`});
      layout.annotations[i].font.size = 12;
    }
    for (const trace of traces) if (trace.xaxis === "x" + suffix) trace.yaxis = "y" + suffix;
  });
  return panels.length;
}

function draw() {
  const palette = palettes[dark.matches ? "dark" : "light"];
  const font = {
    family: getComputedStyle(document.body).fontFamily, size: narrow.matches ? 12 : 13,
    color: palette.muted,
  };
  return Promise.all(payload.figures.map((figure) => {
    const element = document.getElementById("plot-" + figure.name);
    const traces = coloured(figure.traces, palette);
    const {names, headings, ...layout} = coloured(figure.layout, palette);
    const panels = narrow.matches ? stacked(traces, layout, headings) : 1;
    // Beside the names of intervals a phone has little room.
    const beside = names === "none";
    const ends = names === "ends" && !narrow.matches;
    const legend = names === "below" || (names === "ends" && narrow.matches);
    const axis = {
      gridcolor: palette.line, linecolor: palette.line, zeroline: false, automargin: true,
      tickcolor: palette.line, fixedrange: narrow.matches,
    };
    for (const key of Object.keys(layout)) {
      if (/^[xy]axis/.test(key)) layout[key] = {...axis, ...layout[key]};
      if (/^xaxis/.test(key) && narrow.matches && layout[key].title) {
        layout[key].title = {text: wrapped(layout[key].title.text, beside ? 15 : 34)};
      }
    }
    const entries = traces.filter((t) => t.meta === "line" && t.showlegend !== false).length;
    const rows = legend ? Math.ceil(entries / (narrow.matches ? 2 : 4)) : 0;
    const bottom = (legend ? 68 : 56) + 24 * rows;
    const margin = {l: 56, r: ends ? 205 : 14, t: 30, b: bottom};
    const tall = panels > 1 && (headings ? 150 : 300) * panels;
    const height = (tall || layout.height || 420) + 24 * rows;
    element.style.height = height + "px";
    if (ends) {
      const log = layout.yaxis.type === "log";
      const place = (value) => log ? Math.log10(value) : value;
      const values = traces.filter((t) => t.meta).flatMap((t) => t.y).map(
        (v) => v === null ? NaN : place(v)).filter(Number.isFinite);
      const low = Math.min(...values), high = Math.max(...values), edge = .04 * (high - low) || 1;
      const range = [low - edge, high + edge];
      layout.yaxis.range = range;
      const inner = height - margin.t - margin.b;
      layout.annotations = [...layout.annotations, ...endLabels(traces, inner, range, place)];
    }
    Object.assign(layout, {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font, margin, height,
      hovermode: "closest", showlegend: legend,
      legend: {
        orientation: "h", x: 0, y: -64 / (height - margin.t - bottom), yanchor: "top",
        font: {color: palette.ink},
      },
      hoverlabel: {bgcolor: palette.page, bordercolor: palette.line, font: {color: palette.ink}},
    });
    return Plotly.react(element, traces, layout,
      {responsive: true, displaylogo: false, displayModeBar: false});
  })).then(() => { document.body.dataset.drawn = String(Date.now()); });
}

for (const link of document.querySelectorAll("a[data-file]")) {
  const name = link.dataset.file;
  link.download = name + ".csv";
  link.href = URL.createObjectURL(new Blob([payload.files[name]], {type: "text/csv"}));
}
dark.addEventListener("change", draw);
narrow.addEventListener("change", draw);
draw();
"""
