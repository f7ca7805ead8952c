"""Run a study: load, resume, tune, train, record, judge, report."""

import math
import time
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from normkit.common.files import write
from normkit.common.user_code import fingerprint
from normkit.lab.engine import Engine, engine_for
from normkit.lab.report.page import Section, page
from normkit.lab.report.progress import Progress
from normkit.lab.results.events import Events
from normkit.lab.results.store import Run, Store
from normkit.lab.results.verdict import FEWEST, TOO_FEW, smoothed
from normkit.lab.study import Evidence, Findings, Study
from normkit.lab.training.arms import GRID_SEED, Arm
from normkit.lab.training.config import Config
from normkit.lab.training.data import Data, load_data
from normkit.lab.training.models import check
from normkit.lab.training.train import Task


def run_study(study: Study, given: Config, progress: Progress) -> Findings:
    """Do `study` in the folder `given.out`, write its report there, return what it found.

    `given` is not resolved. Raises LabError for input that can't be used; what was trained up to
    then is kept, and the same call goes on from there.
    """
    with closing(engine_for(given.resolved(study.name, study.length))) as engine:
        section = done(study, given, progress, engine)
    path = Path(str(section.config.out)) / Store.REPORT
    write(path, page([section]))
    progress.result(section.findings, str(path))
    return section.findings


def done(study: Study, given: Config, progress: Progress, engine: Engine) -> Section:
    """Train what is missing of `study` in its folder and judge it: one section of a report.

    Raises NotApplicable where the study can't be done with this data and model.
    """
    config = given.resolved(study.name, study.length)
    data = load_data(config)
    arms = study.chosen(study.arms(config, data), config.arms)
    check(data, [(arm, arm.applied(given, study.name, study.length)) for arm in arms])
    identity: dict[str, Any] = {
        "study": study.name,
        **config.identity(),
        "data_sha256": data.fingerprint(),
    }
    if ":" in config.model:
        identity["model_sha256"] = fingerprint(config.model, "model")
    store = Store(Path(str(config.out)), identity)
    try:
        trainer = _Trainer(study, given, data, store, progress, engine)
        seeds = range(config.seeds)
        factors = {}
        if study.tuned:
            grid = [arm.at(factor) for arm in arms for factor in study.grid]
            tried = trainer.train((arm, GRID_SEED) for arm in grid)
            factors = {arm.name: best_factor(tried, arm, study.grid) for arm in arms}
        moved = [arm.at(factors[arm.name]) for arm in arms if factors.get(arm.name, 1.0) != 1.0]
        every = trainer.train((arm, seed) for seed in seeds for arm in [*arms, *moved])
        runs = {arm.name: every[arm.name] for arm in arms}
        tuned = {
            name: runs[name] if factor == 1.0 else every[f"{name}@{factor:g}"]
            for name, factor in factors.items()
        }
        findings = study.judge(Evidence(config, arms, runs, tuned, factors))
        if config.seeds < FEWEST:
            findings = replace(findings, notes=[TOO_FEW, *findings.notes])
        ended = [run for run in store.runs() if run.id in trainer.numbers]
        return Section(
            study,
            config,
            data,
            arms,
            ended,
            findings,
            store.versions(),
            store.spend(),
        )
    finally:
        store.close()


class _Trainer:
    """Trains runs that the store doesn't hold yet."""

    def __init__(
        self,
        study: Study,
        given: Config,
        data: Data,
        store: Store,
        progress: Progress,
        engine: Engine,
    ) -> None:
        self.study = study
        self.given = given
        self.data = data
        self.store = store
        self.progress = progress
        self.engine = engine
        self.numbers: set[int] = set()
        folder = Path(str(given.resolved(study.name).out)) / "tensorboard"
        self.events = Events(folder) if given.tensorboard else None

    def train(self, wanted: Iterable[tuple[Arm, int]]) -> dict[str, list[Run]]:
        """Return the ended runs of the wanted arms and seeds, by arm name."""
        study, given = self.study, self.given
        tasks = []
        numbers = set()
        for arm, seed in wanted:
            config = arm.applied(given, study.name, study.length)
            run, checkpoint = self.store.add(arm, seed, config.identity())
            if self.events:
                self.events.begin(run)
            numbers.add(run.id)
            if run.status == "running":
                # The runs of the grid only choose a rate: nobody looks into them.
                looks = (None, None) if seed == GRID_SEED else (study.probe, study.finish)
                tasks.append(Task(run.id, arm, seed, config, checkpoint, *looks, study.probes))
        self.numbers |= numbers
        by_run = {task.run: task for task in tasks}
        if tasks:
            self.progress.begin(tasks, len(numbers) - len(tasks))
            started = time.monotonic()
            reports = self.engine.run(tasks, self.data, self._again)
            try:
                for report in reports:
                    self.store.write(report)
                    if self.events:
                        self.events.write(report)
                    self.progress.update(by_run[report.run], report)
            finally:
                # Ends the workers, also when the store or the display raised.
                reports.close()
                self.store.spend(time.monotonic() - started)
                if self.events:
                    self.events.close()
                self.progress.end()
        by_arm: dict[str, list[Run]] = {}
        for run in self.store.runs():
            if run.id in numbers:
                by_arm.setdefault(run.arm, []).append(run)
        return by_arm

    def _again(self, task: Task) -> Task:
        run, checkpoint = self.store.add(task.arm, task.seed, task.config.identity())
        if self.events:
            self.events.again(run)
        return replace(task, checkpoint=checkpoint)


def best_factor(
    tried: dict[str, Sequence[Run]] | dict[str, list[Run]], arm: Arm, grid: Sequence[float]
) -> float:
    """Return the factor of the grid with the best smoothed final validation accuracy.

    Of equals the one nearest to 1, then the smaller. A diverged run has accuracy 0.
    """

    def merit(factor: float) -> tuple[float, float, float]:
        (run,) = tried[arm.at(factor).name]
        curve = run.curves.get("validation_accuracy", ([], []))[1]
        final = smoothed(curve)[-1] if run.status == "finished" and curve else 0.0
        return round(final, 6), -abs(math.log(factor)), -factor

    return max(grid, key=merit)
