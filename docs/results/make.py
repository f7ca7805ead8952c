"""Write docs/results/ from finished study folders: a table in Markdown, numbers as JSON, a picture.

    normkit study speed --out runs/a
    python docs/results/make.py speed runs/a runs/b ...

The picture is the first folder's main figure as the report draws it; it needs chromium.
"""

import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

from playwright.sync_api import sync_playwright

from normkit.lab.arms import GRID_SEED
from normkit.lab.config import Config
from normkit.lab.engine import engine_for
from normkit.lab.progress import progress_for
from normkit.lab.run import done
from normkit.lab.store import Store
from normkit.lab.studies import all_studies
from normkit.lab.study import Findings, Study

HERE = Path(__file__).parent


def findings_of(study: Study, folder: Path) -> tuple[Config, Findings]:
    """Return what a folder's runs say, judged anew."""
    store = Store.reopen(folder)
    try:
        identity = store.identity()
        seeds = {run.seed for run in store.runs() if run.seed != GRID_SEED}
    finally:
        store.close()
    options = {key: identity[key] for key in Config.__dataclass_fields__ if key in identity}
    given = Config(**options, seeds=len(seeds), out=str(folder))
    config = given.resolved(study.name, study.length)
    section = done(study, given, progress_for(as_json=False), engine_for(config))
    # The folder is wherever the runs happen to lie; a command names none.
    return replace(section.config, out=None), section.findings


def section(study: Study, config: Config, findings: Findings) -> str:
    """Return one folder's part of the page."""
    table = [findings.columns, ["---"] * len(findings.columns), *findings.rows]
    lines = "\n".join("| " + " | ".join(row) + " |" for row in table)
    verdicts = "\n".join(f"- **{v.claim}: {v.word}.** {v.because}" for v in findings.verdicts)
    command = " ".join(config.command(study.name))
    title = f"{config.data}, {config.model} ({config.activation})"
    return f"## {title}\n\n    {command}\n\n{verdicts}\n\n{lines}\n"


def picture(report: Path, target: Path, scheme: str) -> None:
    """Save the report's main figure as a PNG."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_page(
            viewport={"width": 1064, "height": 900}, color_scheme=scheme, device_scale_factor=1.5
        )
        page.goto(report.resolve().as_uri())
        page.wait_for_selector("body[data-drawn]")
        page.locator(".plot").first.screenshot(path=target)
        browser.close()


def main() -> None:
    """Write the page, the numbers and the picture of the folders on the command line."""
    name, *folders = sys.argv[1:]
    study = all_studies()[name]
    parts, numbers = [f"# {study.claim}\n\n{study.source}\n"], []
    notes: list[str] = []
    for folder in map(Path, folders):
        config, findings = findings_of(study, folder)
        parts.append(section(study, config, findings))
        notes = findings.notes[1:]
        numbers.append(
            {
                "command": config.command(name),
                "verdicts": [vars(verdict) for verdict in findings.verdicts],
                "columns": findings.columns,
                "rows": findings.rows,
            }
        )
    parts.append("".join(f"- {note}\n" for note in notes))
    text = "\n".join(parts)
    (HERE / f"{name}.md").write_text(re.sub(r"\n{3,}", "\n\n", text), "utf-8")
    data = json.dumps(numbers, indent=1, ensure_ascii=False)
    (HERE / f"{name}.json").write_text(data + "\n", "utf-8")
    for scheme, suffix in (("light", ""), ("dark", "-dark")):
        picture(Path(folders[0]) / "report.html", HERE / f"{name}{suffix}.png", scheme)


main()
