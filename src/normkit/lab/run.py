"""Run a study: load, resume, train, record, judge, report."""

from pathlib import Path
from typing import Any

from normkit.lab import engine
from normkit.lab.config import Config
from normkit.lab.data import load_data
from normkit.lab.models import check
from normkit.lab.progress import Progress
from normkit.lab.report import page
from normkit.lab.store import Store, write_file
from normkit.lab.studies import Findings, Study
from normkit.lab.train import Task
from normkit.lab.user import fingerprint


def run_study(study: Study, config: Config, progress: Progress) -> Findings:
    """Train what is missing of `study` in the folder `config.out`, judge it, write the report.

    `config` must be resolved. Raises LabError for input that can't be used; what was trained up to
    then is kept, and the same call goes on from there.
    """
    arms = study.chosen(config.arms)
    data = load_data(config)
    check(config, data, sorted({arm.norm for arm in arms}))
    identity: dict[str, Any] = {
        "study": study.name,
        **config.identity(),
        "data_sha256": data.fingerprint(),
    }
    if ":" in config.model:
        identity["model_sha256"] = fingerprint(config.model, "model")
    folder = Path(str(config.out))
    store = Store(folder, identity)
    try:
        tasks = []
        numbers = []
        for seed in range(config.seeds):
            for arm in arms:
                run, checkpoint = store.add(arm, seed, config.identity())
                numbers.append(run.id)
                if run.status == "running":
                    tasks.append(Task(run.id, arm, seed, config, checkpoint))
        by_run = {task.run: task for task in tasks}
        if tasks:
            progress.begin(tasks, len(numbers) - len(tasks))
            reports = engine.run(tasks, data, int(config.jobs or 1))
            try:
                for report in reports:
                    store.write(report)
                    progress.update(by_run[report.run], report)
            finally:
                # Ends the workers, also when the store or the display raised.
                reports.close()
                progress.end()
        wanted = set(numbers)
        runs = [run for run in store.runs() if run.id in wanted]
        by_arm = {arm.name: [run for run in runs if run.arm == arm.name] for arm in arms}
        findings = study.judge(config, by_arm)
        path = folder / "report.html"
        write_file(path, page(study, config, data, arms, runs, findings, store.versions()))
    finally:
        store.close()
    progress.result(findings, str(path))
    return findings
