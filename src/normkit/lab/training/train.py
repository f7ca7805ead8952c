"""Train one run, step by step, from nothing or from a checkpoint, and say what happens."""

import io
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from normkit.lab.training import ranks
from normkit.lab.training.arms import Arm
from normkit.lab.training.batches import Batches
from normkit.lab.training.config import Config
from normkit.lab.training.data import Data, Part, scaled
from normkit.lab.training.models import build, last_hidden
from normkit.lab.training.probe import Probe, look

# A run reports at most this often, so that writing the results costs the training nothing.
_REPORT_SECONDS = 0.25
# A checkpoint is due after a second, or later where writing one takes long: at most 2 % of time.
_CHECKPOINT_SECONDS = 1.0
_CHECKPOINT_SHARE = 0.02
_EVALUATION_BATCH = 500


@dataclass(frozen=True)
class Task:
    """One run to do: an arm with a seed, from a checkpoint if there is one.

    `config` is the arm's own; `probe`, `probes` and `finish` are the study's.
    """

    run: int
    arm: Arm
    seed: int
    config: Config
    checkpoint: bytes | None = None
    probe: Callable[[Probe], dict[str, float]] | None = None
    finish: Callable[[Probe], dict[str, Any]] | None = None
    probes: int = 10


@dataclass(frozen=True)
class Report:
    """What a run has to say: measurements by step, perhaps a checkpoint, at the end its outcome.

    `status` is "running", "finished" or "diverged"; `seconds` the training time since the last
    report, evaluations apart; `test_accuracy` and `found` (what the study's `finish` returned) come
    with "finished".
    """

    run: int
    step: int
    rows: dict[int, dict[str, float]] = field(default_factory=dict)
    seconds: float = 0.0
    status: str = "running"
    test_accuracy: float | None = None
    checkpoint: bytes | None = None
    found: dict[str, Any] | None = None


_OTHER_SEEDS = 1_000_000


def train(task: Task, data: Data) -> Iterator[Report]:
    """Train `task` to its end and yield what it measures.

    Measured every `eval_every` steps: mean training loss since the last time, validation loss and
    accuracy (fractions), and the 15/50/85th percentiles of the first unit's input to the last
    activation over the validation samples. The study's probe adds its numbers at `probes` of
    those steps. Sets torch's global seed. The same task gives bitwise the same numbers, whether or
    not it starts from one of its checkpoints. Under torchrun all ranks call it at once, and what
    rank 0's yields counts.
    """
    config, arm = task.config, task.arm
    assert config.steps is not None
    assert config.eval_every is not None
    seed = task.seed + (_OTHER_SEEDS if arm.other_seeds else 0)
    data = scaled(data, config.inputs)
    model = ranks.synced(build(config, data, arm, seed), config.stats)
    optimizer = make_optimizer(model, config, arm.rate)
    trained = ranks.parallel(model)
    ranks.seed(seed)
    step = 0
    if task.checkpoint is not None:
        step = _restore(task.checkpoint, model, optimizer)

    batches = Batches(data.train, config.batch_size, seed)

    def here() -> Probe:
        return Probe(model, optimizer, batches, step, data, config, arm, task.seed)

    if trained is not model:
        # DDP orders the gradients anew after its first backward, and in another order sums over
        # three ranks and more round differently: a resumed run would differ in its first step.
        look(lambda at: ranks.rehearse(trained, *batches[step]), here())

    evaluations = -(-config.steps // config.eval_every)
    probed = {-(-evaluations * part // task.probes) for part in range(1, task.probes + 1)}
    rows: dict[int, dict[str, float]] = {}
    seconds = 0.0
    reported = saved = time.perf_counter()
    saving = 0.0
    while step < config.steps:
        until = min(config.steps, step - step % config.eval_every + config.eval_every)
        started = time.perf_counter()
        losses = advance(trained, optimizer, batches, step, until)
        mean_loss = float(ranks.mean(torch.stack(losses).mean()))
        seconds += time.perf_counter() - started
        step = until
        rows[step] = {"train_loss": mean_loss, **measure(model, data.validation)}
        diverged = not all(
            abs(rows[step][name]) < float("inf") for name in ("train_loss", "validation_loss")
        )
        if ranks.sent(diverged):
            yield Report(task.run, step, rows, seconds, "diverged")
            return
        if task.probe is not None and -(-step // config.eval_every) in probed:
            with ranks.alike():
                rows[step] |= look(task.probe, here())
        now = time.perf_counter()
        checkpoint = None
        due = now - saved > max(_CHECKPOINT_SECONDS, saving / _CHECKPOINT_SHARE)
        if step < config.steps and ranks.sent(due):
            checkpoint = _save(model, optimizer, step)
            saved = time.perf_counter()
            saving = saved - now
        if checkpoint is not None or now - reported > _REPORT_SECONDS:
            yield Report(task.run, step, rows, seconds, checkpoint=checkpoint)
            rows, seconds, reported = {}, 0.0, now
    accuracy = score(model, data.test)[1]
    with ranks.alike():
        found = look(task.finish, here()) if task.finish is not None else None
    yield Report(task.run, step, rows, seconds, "finished", accuracy, found=found)


def advance(
    model: nn.Module, optimizer: torch.optim.Optimizer, batches: "Batches", step: int, until: int
) -> list[Tensor]:
    """Take the steps from `step` to `until`; return their losses, not yet waited for.

    In DDP the model takes its rank's share of each batch.
    """
    model.train()
    losses = []
    for number in range(step, until):
        x, y = batches[number]
        optimizer.zero_grad(set_to_none=True)
        loss = ranks.loss(model, x, y)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def make_optimizer(model: nn.Module, config: Config, rate: float) -> torch.optim.Optimizer:
    """Return the optimizer that `config` names, at `rate` times its learning rate."""
    assert config.lr is not None
    lr = config.lr * rate
    parameters = list(model.parameters())
    match config.optimizer:
        case "sgd":
            return torch.optim.SGD(parameters, lr)
        case "momentum":
            return torch.optim.SGD(parameters, lr, momentum=0.9)
        case "rmsprop":
            return torch.optim.RMSprop(parameters, lr)
        case _:
            return torch.optim.Adam(parameters, lr)


@torch.no_grad()
def score(model: nn.Module, part: Part) -> tuple[float, float]:
    """Return the mean loss and the accuracy (a fraction) on a part, in evaluation mode."""
    x, y = part
    was_training = model.training
    model.eval()
    loss = torch.zeros((), device=x.device, dtype=torch.float64)
    right = torch.zeros((), device=x.device, dtype=torch.int64)
    for inputs, labels in zip(x.split(_EVALUATION_BATCH), y.split(_EVALUATION_BATCH), strict=True):
        scores = model(inputs)
        loss += nn.functional.cross_entropy(scores, labels, reduction="sum")
        right += (scores.argmax(1) == labels).sum()
    model.train(was_training)
    return float(loss) / len(x), float(right) / len(x)


@torch.no_grad()
def measure(model: nn.Module, part: Part) -> dict[str, float]:
    """Return loss, accuracy and the percentiles of one unit's input to the last activation."""
    seen: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        # Unit 0, fixed beforehand: the same unit, with the same initial weights, in every arm.
        seen.append(inputs[0][:, 0].detach().flatten())

    handle = last_hidden(model).register_forward_pre_hook(keep)
    try:
        loss, accuracy = score(model, part)
    finally:
        handle.remove()
    result = {"validation_loss": loss, "validation_accuracy": accuracy}
    values = torch.cat(seen).double().sort().values
    if bool(torch.isfinite(values).all()):
        for percent in (15, 50, 85):
            result[f"p{percent}"] = float(values[round(percent / 100 * (len(values) - 1))])
    return result


def _save(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> bytes:
    state = {
        "step": step,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "rng": ranks.gathered(torch.get_rng_state()),
        "device_rng": ranks.gathered(torch.cuda.get_rng_state())
        if torch.cuda.is_initialized()
        else None,
    }
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def _restore(checkpoint: bytes, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    state = torch.load(io.BytesIO(checkpoint), weights_only=True, map_location="cpu")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(ranks.own(state["rng"]))
    if state["device_rng"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(ranks.own(state["device_rng"]))
    return int(state["step"])
