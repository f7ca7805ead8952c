"""Write docs/results/ from finished studies: a page for each, its numbers, pictures, and a table.

    normkit study all --data digits --out runs/digits
    normkit study all --data fashion-mnist --out runs/fashion
    python docs/results/make.py runs/digits runs/fashion ...

Each folder holds study folders. What they say takes the place of what <study>.json says of the same
data and network; the rest of it stays, and the pages are made from it: <study>.md with all tables,
README.md with every claim's verdict beside what was published. Pictures are the main figure of the
first folder's report, and `all.png` the report of the first folder; they need chromium.
"""

import json
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

from normkit.common.files import write
from normkit.lab.engine import engine_for
from normkit.lab.report.page import Section, page
from normkit.lab.report.progress import progress_for
from normkit.lab.results.measures import duration
from normkit.lab.results.store import Store
from normkit.lab.run import done
from normkit.lab.studies import all_studies
from normkit.lab.study import Study
from normkit.lab.training.arms import GRID_SEED
from normkit.lab.training.config import Config
from normkit.lab.training.data import load_data

HERE = Path(__file__).parent
# The data and networks that the table of all studies has a column for.
COLUMNS = {
    "digits, mlp (sigmoid)": "digits, mlp",
    "fashion-mnist, mlp (sigmoid)": "Fashion-MNIST, mlp",
    "fashion-mnist, cnn (relu)": "Fashion-MNIST, cnn",
}


def judged(study: Study, folder: Path) -> Section:
    """Return what a folder's runs say, judged anew; training that is missing is done."""
    store = Store.reopen(folder)
    try:
        identity = store.identity()
        runs = [run for run in store.runs() if run.seed != GRID_SEED]
    finally:
        store.close()
    options = {key: identity[key] for key in Config.__dataclass_fields__ if key in identity}
    given = Config(**options, seeds=len({run.seed for run in runs}), out=str(folder))
    had = {run.arm for run in runs}
    every = study.arms(given.resolved(study.name, study.length), load_data(given))
    if len(had) < len(every):
        given = replace(given, arms=",".join(arm.name for arm in every if arm.name in had))
    with closing(engine_for(given.resolved(study.name, study.length))) as engine:
        section = done(study, given, progress_for(as_json=False), engine)
    # The folder is wherever the runs happen to lie; a command names none.
    return replace(section, config=replace(section.config, out=None))


def record(section: Section) -> dict[str, Any]:
    """Return what <study>.json keeps of a section."""
    config, findings = section.config, section.findings
    return {
        "title": f"{config.data}, {config.model} ({config.activation})",
        "command": config.command(section.study.name),
        "seconds": round(section.seconds),
        "verdicts": [vars(verdict) for verdict in findings.verdicts],
        "columns": findings.columns,
        "rows": findings.rows,
        "notes": findings.notes,
    }


def merged(held: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Return the records, new ones in the place of those of the same data and network."""
    named = {_title(each): each for each in held} | {_title(each): each for each in new}
    first = [title for title in COLUMNS if title in named]
    return [named[title] for title in [*first, *(t for t in named if t not in first)]]


def _title(each: Mapping[str, Any]) -> str:
    words = each["command"]
    data, model, activation = (
        words[words.index(flag) + 1] for flag in ("--data", "--model", "--activation")
    )
    return f"{data}, {model} ({activation})"


def study_page(study: Study, records: Sequence[Mapping[str, Any]]) -> str:
    """Return a study's page."""
    parts = [f"# {study.claim}\n\n{study.source}\n"]
    if study.published:
        parts.append(f"Published: {study.published}\n")
    for each in records:
        table = [each["columns"], ["---"] * len(each["columns"]), *each["rows"]]
        lines = "\n".join("| " + " | ".join(row) + " |" for row in table)
        verdicts = "\n".join(
            f"- **{v['claim']}: {v['word']}.** {v['because']}" for v in each["verdicts"]
        )
        time = f"Took {duration(each['seconds'])}.\n\n" if each.get("seconds") else ""
        command = " ".join(each["command"])
        parts.append(f"## {_title(each)}\n\n    {command}\n\n{time}{verdicts}\n\n{lines}\n")
    notes = next((each["notes"] for each in records if "notes" in each), [])
    parts.append("".join(f"- {note}\n" for note in notes))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(parts))


def table(studies: Mapping[str, Study]) -> str:
    """Return the table of every study's claims and verdicts, beside what was published."""
    head = ["Study", "Claim", *COLUMNS.values(), "Published"]
    rows, times = [head, ["---"] * len(head)], []
    for name, study in studies.items():
        path = HERE / f"{name}.json"
        if not path.is_file():
            continue
        by_title = {_title(each): each for each in json.loads(path.read_text("utf-8"))}
        words = {
            title: {v["claim"]: v["word"] for v in each["verdicts"]}
            for title, each in by_title.items()
            if title in COLUMNS
        }
        claims = list(dict.fromkeys(claim for found in words.values() for claim in found))
        for place, claim in enumerate(claims):
            first = place == 0
            cells = [words.get(title, {}).get(claim, "") for title in COLUMNS]
            link = f"[{name}]({name}.md)" if first else ""
            rows.append([link, claim, *cells, study.published if first else ""])
        took = [
            duration(by_title[title]["seconds"]) if by_title.get(title, {}).get("seconds") else ""
            for title in COLUMNS
        ]
        times.append([f"[{name}]({name}.md)", *took])
    timed = [["Study", *COLUMNS.values()], ["---"] * (1 + len(COLUMNS)), *times]
    return "\n\n".join("\n".join("| " + " | ".join(row) + " |" for row in t) for t in (rows, timed))


def picture(report: Path, target: Path, scheme: str, selector: str = ".plot") -> None:
    """Save a part of a report as a PNG."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        tab = browser.new_page(
            viewport={"width": 1064, "height": 900}, color_scheme=scheme, device_scale_factor=1.5
        )
        tab.goto(report.resolve().as_uri())
        tab.wait_for_selector("body[data-drawn]")
        tab.locator(selector).first.screenshot(path=target)
        browser.close()


def main() -> None:
    """Write the pages, the numbers and the pictures of the folders on the command line.

    Without folders the pages are written again from the committed numbers.
    """
    folders = list(map(Path, sys.argv[1:]))
    studies = all_studies()
    sections: list[list[Section]] = []
    for folder in folders:
        names = [name for name in studies if (folder / name / Store.FILE).is_file()]
        sections.append([judged(studies[name], folder / name) for name in names])
        write(folder / "report.html", page(sections[-1]))
    for name, study in studies.items():
        path = HERE / f"{name}.json"
        held = json.loads(path.read_text("utf-8")) if path.is_file() else []
        new = [record(s) for found in sections for s in found if s.study.name == name]
        records = merged(held, new)
        if records:
            text = json.dumps(records, indent=1, ensure_ascii=False)
            write(path, text + "\n")
            write(HERE / f"{name}.md", study_page(study, records))
    text = (HERE / "README.md").read_text("utf-8")
    start, end = "<!-- made by make.py -->", "<!-- until here -->"
    before, _, rest = text.partition(start)
    after = rest.partition(end)[2]
    made = f"{before}{start}\n\n{table(studies)}\n\n{end}{after}"
    write(HERE / "README.md", made)
    if not folders:
        return
    for scheme, suffix in (("light", ""), ("dark", "-dark")):
        for section in sections[0]:
            plot = f"#figure-{section.study.name}-{section.findings.figures[0].name} .plot"
            target = HERE / f"{section.study.name}{suffix}.png"
            picture(folders[0] / "report.html", target, scheme, plot)
        picture(folders[0] / "report.html", HERE / f"all{suffix}.png", scheme, "nav.overview")


if __name__ == "__main__":
    main()
