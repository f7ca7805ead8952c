"""The arms of a study: networks that differ in one thing, and are trained alike in all others."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from normkit.lab.training.config import Config

GRID = (0.1, 0.3, 1.0, 3.0, 10.0)
"""The factors of its rate among which the best one of an arm is chosen."""
GRID_SEED = 2_000_000
"""The one seed that the choice is made with; no run of a study has it."""


@dataclass(frozen=True)
class Arm:
    """One of the networks that a study compares; all else is the same.

    `rate` multiplies the configuration's learning rate. `other_seeds` trains from seeds that no
    other arm uses. `norm` is a name of `normkit.create`, "group" for at most eight groups, or one
    of `normkit.lab.training.models.REPARAMETRIZATIONS`; `arguments` go to the norm's constructor.
    `fixed` names parameters of the norms ("weight", "bias") that stay at their first values.
    `options` are fields of the configuration that differ in this arm; an arm with another batch
    size sees as many samples as the others, in more or fewer steps.
    """

    name: str
    label: str
    norm: str = "none"
    rate: float = 1.0
    other_seeds: bool = False
    arguments: Mapping[str, Any] = field(default_factory=dict)
    fixed: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    def applied(self, given: Config, study: str, length: float) -> Config:
        """Return the configuration of this arm's runs; `given` is the study's, not yet resolved.

        Options that the arm doesn't set, but that depend on those it does, follow them: the rate
        of a tanh network is the tanh network's, unless the user gave one.
        """
        whole = given.resolved(study, length)
        config = dataclasses.replace(given, **self.options).resolved(study, length)
        assert whole.steps is not None
        assert whole.eval_every is not None
        share = whole.batch_size / config.batch_size
        return dataclasses.replace(
            config,
            steps=max(1, round(whole.steps * share)),
            eval_every=max(1, round(whole.eval_every * share)),
        )

    def at(self, factor: float) -> "Arm":
        """Return this arm at `factor` times its rate, under a name of its own."""
        return dataclasses.replace(self, name=f"{self.name}@{factor:g}", rate=self.rate * factor)


def renorm_schedule(steps: int | None) -> dict[str, Any]:
    """Return batch renorm's arguments for a training of `steps` steps.

    The limits open over the same shares of the training as in Ioffe 2017 (5, 25 and 40 of 130
    thousand steps). The momentum is 0.01, as there, or in a short training 20 / steps, at most 0.1.
    """
    assert steps is not None
    return {
        "r_steps": (round(steps / 26), round(steps * 8 / 26)),
        "d_steps": (round(steps / 26), round(steps * 5 / 26)),
        "momentum": min(0.1, max(0.01, 20 / steps)),
    }
