"""What a backend is: the verbs that autograd, running statistics and ranks stand on.

A backend is a module whose functions mutate nothing. All verbs take one call of the formula, a
`Spec` and its `Inputs`, in the notation

    x̂ = (x - mean) * rstd,  z = x̂ * weight + bias + residual,  y = act(z)
    dz = dy * act'(z),  g = dz * weight

A statistic has one value a pool, in the shape that `Pool` says.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from normkit.formula.spec import Inputs, Spec


class Normalized(NamedTuple):
    """What a forward gives; the statistics are None where only y was asked for.

    The variance is the biased one (of RMS: the mean square); it is returned beside rstd because
    1 / rstd² - eps loses it where eps dominates. `total` is x + add, where there is an `add`.
    """

    y: Tensor
    mean: Tensor | None = None
    rstd: Tensor | None = None
    var: Tensor | None = None
    total: Tensor | None = None


class Gradients(NamedTuple):
    """The gradients of the first tensors of `Inputs`, in their order."""

    x: Tensor | None
    weight: Tensor | None = None
    bias: Tensor | None = None
    residual: Tensor | None = None


class Sums(NamedTuple):
    """What ranks add up: Σ g and Σ g * x̂ of each pool, stacked, in float64; and this rank's
    gradients of weight and bias."""

    pools: Tensor
    weight: Tensor | None
    bias: Tensor | None


class Backend(Protocol):
    """A module that computes the formula."""

    @property
    def DEVICE(self) -> str | None:
        """The type of device that the backend is for; None for any."""

    def available(self) -> str | None:
        """Why this backend can't be used on this machine, or None."""

    def why_not(self, spec: Spec, inputs: Inputs) -> str | None:
        """Why this backend can't take this call, or None."""

    def dense_inputs(self, spec: Spec, inputs: Inputs) -> Inputs:
        """x, residual and add in a layout that the verbs read without a copy of their own."""

    def output(self, spec: Spec, inputs: Inputs) -> Tensor:
        """y alone."""

    def normalize(self, spec: Spec, inputs: Inputs) -> Normalized:
        """y and the statistics, taken from x or, where `spec.given`, from `inputs`."""

    def normalize_backward(
        self, spec: Spec, inputs: Inputs, dy: Tensor, dtotal: Tensor | None = None
    ) -> Gradients:
        """dx = rstd * (g - <g> - x̂ * <g * x̂>), <.> the mean over a pool, and dx = rstd * g where
        the statistics were given; dweight = Σ dz * x̂, dbias = Σ dz, dresidual = dz.

        `inputs` hold the mean and rstd that `normalize` returned. `dtotal`, the gradient of
        x + add, is added to dx.
        """

    def moments(self, spec: Spec, inputs: Inputs) -> Tensor:
        """Count, mean and biased variance of each pool, stacked, in float64; 0 of an empty one."""

    def sums(self, spec: Spec, inputs: Inputs, dy: Tensor) -> Sums:
        """The sums over this rank's elements that an input gradient of all ranks needs."""

    def gradient(self, spec: Spec, inputs: Inputs, dy: Tensor, means: Tensor) -> Gradients:
        """The gradients of x and residual, given <g> and <g * x̂> of each pool, stacked."""
