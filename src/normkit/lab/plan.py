"""Do every study within a budget of time, into one report."""

import dataclasses
import re
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch

from normkit.common.errors import LabError
from normkit.common.files import check_writable, write
from normkit.lab.engine import Engine, engine_for
from normkit.lab.report.page import Section, page
from normkit.lab.report.progress import Progress
from normkit.lab.results.measures import duration
from normkit.lab.results.store import Store, disk_errors
from normkit.lab.run import done
from normkit.lab.study import NotApplicable, Study
from normkit.lab.training import ranks
from normkit.lab.training.arms import GRID_SEED, Arm
from normkit.lab.training.batches import Batches
from normkit.lab.training.config import Config
from normkit.lab.training.data import Data, load_data, scaled
from normkit.lab.training.models import build, check
from normkit.lab.training.probe import Probe, look
from normkit.lab.training.train import advance, make_optimizer, measure

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}
# A process that trains starts within about this long.
_START_SECONDS = 4.0
_TIMED_SECONDS = 0.1


@dataclass(frozen=True)
class Planned:
    """A study that can be done, with the seconds that what is missing of it will take, about."""

    study: Study
    given: Config
    seconds: float


def seconds(text: str) -> float:
    """Return the seconds that "90s", "20m" or "1h30m" stand for; raises LabError for other text."""
    if not re.fullmatch(r"(\d+(\.\d+)?[smh])+", text):
        raise LabError(f"--budget {text!r}: give a time like 90s, 20m or 1h30m")
    return sum(float(n) * _UNITS[unit] for n, unit in re.findall(r"([\d.]+)([smh])", text))


def run_all(
    studies: Mapping[str, Study], given: Config, budget: float | None, progress: Progress
) -> list[Section]:
    """Do all studies that apply, the cheapest first, and write one report of them.

    Args:
        studies: by name.
        given: not yet resolved; each study has a folder of its own in `out`.
        budget: seconds for all of it, or None. What doesn't fit is left out, and the report says
            so.
        progress: where it is told.

    Returns:
        A section for every study that was done.

    Raises:
        LabError: input that can't be used; no study applies; a budget too small for any of them.
    """
    if given.arms is not None:
        raise LabError("--arms names arms of one study; give the study's name instead of all")
    with closing(engine_for(given.resolved("all"))) as engine:
        return _run_all(studies, given, budget, progress, engine)


def _run_all(
    studies: Mapping[str, Study],
    given: Config,
    budget: float | None,
    progress: Progress,
    engine: Engine,
) -> list[Section]:
    started = time.monotonic()
    folder = Path(str(given.resolved("all").out))
    skipped: dict[str, str] = {}
    planned: list[Planned] = []
    for name, study in studies.items():
        own = dataclasses.replace(given, out=str(folder / name))
        try:
            planned.append(Planned(study, own, _needed(study, own, engine)))
        except NotApplicable as error:
            skipped[name] = str(error)
    if not planned:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in skipped.items())
        raise LabError(f"no study can be done with this data and model ({reasons})")
    planned.sort(key=lambda plan: plan.seconds)
    if budget is not None:
        spent = time.monotonic() - started
        first = planned[0]
        if spent + first.seconds > budget:
            raise LabError(
                f"--budget {budget:.0f} s is too small for any study: the shortest, "
                f"{first.study.name}, needs about {duration(first.seconds)} beside "
                f"{duration(spent)} of planning; give more, or fewer --seeds or --steps"
            )
    progress.plan([(plan.study.name, plan.seconds) for plan in planned], budget)
    report = folder / Store.REPORT
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    check_writable(report)
    sections: list[Section] = []
    for plan in planned:
        left = None if budget is None else budget - (time.monotonic() - started)
        if left is not None and plan.seconds > left:
            skipped[plan.study.name] = (
                f"left out: it needs about {duration(plan.seconds)}, and of the budget of "
                f"{duration(budget or 0)} {duration(max(left, 0))} were left"
            )
            continue
        progress.study(plan.study.name)
        sections.append(done(plan.study, plan.given, progress, engine))
        # After each one, so that a run that is stopped leaves a report of what it did.
        ordered = sorted(sections, key=lambda s: list(studies).index(s.study.name))
        write(report, page(ordered, skipped))
    write(report, page(ordered, skipped))
    verdicts = [(s.study.name, v) for s in ordered for v in s.findings.verdicts]
    progress.overview(verdicts, skipped, str(report))
    return ordered


def _needed(study: Study, given: Config, engine: Engine) -> float:
    """Return about how long what is missing of a study will take, from a few timed steps."""
    config = given.resolved(study.name, study.length)
    data = load_data(config)
    arms = study.arms(config, data)
    own = [(arm, arm.applied(given, study.name, study.length)) for arm in arms]
    check(data, own)
    ended = _ended(Path(str(config.out)))
    total = 0.0
    stages = 0
    for arm, settled in own:
        step, evaluation, probe = _pace(study, arm, settled, data)
        assert settled.steps is not None
        assert settled.eval_every is not None
        run = settled.steps * (step + evaluation / settled.eval_every)
        missing = sum((arm.name, seed) not in ended for seed in range(config.seeds))
        total += missing * (run + probe)
        stages = max(stages, int(missing > 0))
        if study.tuned:
            grid = sum((arm.at(factor).name, GRID_SEED) not in ended for factor in study.grid)
            # The arms that will move to another rate aren't known yet: as many again.
            total += grid * run + missing * (run + probe)
            stages = max(stages, 2 * int(grid > 0))
    return total / engine.width + stages * _START_SECONDS if total else 0.0


def _ended(folder: Path) -> set[tuple[str, int]]:
    if not (folder / Store.FILE).is_file():
        return set()
    store = Store.reopen(folder)
    try:
        return {(run.arm, run.seed) for run in store.runs() if run.status != "running"}
    finally:
        store.close()


def _pace(study: Study, arm: Arm, config: Config, data: Data) -> tuple[float, float, float]:
    """Return the seconds of a step, of an evaluation, and of a run's probes together."""
    threads = torch.get_num_threads()
    torch.set_num_threads(config.threads)
    try:
        with torch.random.fork_rng():
            own = scaled(data, config.inputs)
            model = ranks.alone(build(config, own, arm, 0))
            optimizer = make_optimizer(model, config, arm.rate)
            batches = Batches(own.train, config.batch_size, 0)
            advance(model, optimizer, batches, 0, 1)
            measure(model, own.validation)
            step = _timed(lambda: advance(model, optimizer, batches, 1, 2))
            evaluation = _timed(lambda: measure(model, own.validation))
            at = Probe(model, optimizer, batches, 1, own, config, arm, 0)
            looks = 0.0
            for probe, times in ((study.probe, study.probes), (study.finish, 1)):
                if probe is not None:
                    began = time.perf_counter()
                    look(probe, at)
                    looks += times * (time.perf_counter() - began)
        return step, evaluation, looks
    finally:
        torch.set_num_threads(threads)


def _timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    calls, passed = 0, 0.0
    while passed < _TIMED_SECONDS:
        call()
        calls += 1
        passed = time.perf_counter() - began
    return passed / calls
