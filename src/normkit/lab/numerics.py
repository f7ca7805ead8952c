"""Curvature of a loss, and how unevenly inputs are scaled: numbers of linear algebra alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

_LANCZOS_STEPS = 30
_LANCZOS_STARTS = 4
POWER_ITERATIONS = 12


def flattened(tensors: Iterable[Tensor]) -> Tensor:
    """Return all values of the tensors in one vector."""
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def hessian_product(loss: Tensor, weights: Sequence[Tensor]) -> Callable[[Tensor], Tensor]:
    """Return the product of a loss's Hessian in all `weights` with a vector, v -> H v.

    Source: Pearlmutter 1994, Fast Exact Multiplication by the Hessian.
    """
    gradient = torch.autograd.grad(loss, weights, create_graph=True)
    slope = torch.cat([part.flatten() for part in gradient])

    def product(vector: Tensor) -> Tensor:
        return flattened(torch.autograd.grad(slope, weights, vector, retain_graph=True))

    return product


def curvature(loss: Tensor, weights: Sequence[Tensor]) -> float:
    """Return the largest absolute eigenvalue of the loss's Hessian, by twelve power iterations.

    That is the length of H v, v the normalized vector of the step before, from a random start; it
    is never above the eigenvalue.
    """
    product = hessian_product(loss, weights)
    size = sum(weight.numel() for weight in weights)
    vector = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(weights[0])
    length = vector.norm()
    for _ in range(POWER_ITERATIONS):
        vector = product(vector.div_(length))
        length = vector.norm()
        if not length > 0:
            return 0.0
    return float(length)


def unevenness(model: nn.Module, x: Tensor, y: Tensor, seed: int) -> float:
    """Return the Hessian's largest over its mean absolute eigenvalue.

    max |λ| / ((1 / n) Σ |λ|), of the mean cross entropy over (x, y) and all n weights: 1 where all
    directions are curved alike, n where one alone is. By stochastic Lanczos quadrature: 30 steps
    from each of 4 vectors of random signs, without reorthogonalization, which repeats eigenvalues
    but changes neither the largest nor the mean. Holds three vectors besides the gradient. 1 for a
    Hessian of zeros.

    Source: Ghorbani, Krishnan & Xiao 2019 (arXiv 1901.10159) for the quadrature. The inverse over
    n is the intrinsic dimension of |H| (Tropp 2015, arXiv 1501.01571).
    """
    weights = [p for p in model.parameters() if p.requires_grad]
    product = hessian_product(nn.functional.cross_entropy(model(x), y), weights)
    size = sum(weight.numel() for weight in weights)
    generator = torch.Generator().manual_seed(seed)
    largest, means = 0.0, []
    for _ in range(_LANCZOS_STARTS):
        signs = 2.0 * torch.randint(0, 2, (size,), generator=generator) - 1.0
        values, shares = lanczos(product, signs.to(weights[0]), _LANCZOS_STEPS)
        largest = max(largest, float(np.abs(values).max()))
        means.append(float(np.abs(values) @ shares))
    mean = float(np.mean(means))
    return largest / mean if mean > 0 else 1.0


def lanczos(
    product: Callable[[Tensor], Tensor], start: Tensor, steps: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return nodes and weights of the quadrature of v'f(A)v / v'v, v = `start`, A symmetric.

    The nodes are the eigenvalues of the tridiagonal matrix after at most `steps` products with A,
    the weights, of sum 1, the squared first entries of its eigenvectors (Golub & Welsch 1969).
    """
    vector = start / start.norm()
    before = torch.zeros_like(vector)
    diagonal: list[float] = []
    beside: list[float] = []
    link = 0.0
    for _ in range(min(steps, len(start))):
        image = product(vector).sub_(before, alpha=link)
        diagonal.append(float(image @ vector))
        image.sub_(vector, alpha=diagonal[-1])
        link = float(image.norm())
        # An invariant subspace has been found: what is left is rounding.
        if link <= 1e-6 * max(map(abs, diagonal)):
            break
        beside.append(link)
        before, vector = vector, image.div_(link)
    n = len(diagonal)
    matrix = np.diag(diagonal) + np.diag(beside[: n - 1], 1) + np.diag(beside[: n - 1], -1)
    values, vectors = np.linalg.eigh(matrix)
    return values, vectors[0] ** 2


def deviation_ratio(x: Tensor) -> float:
    """Return the largest over the smallest deviation of the features (an image's channels).

    x: (N, C, *). Features that don't vary are left out.
    """
    deviation = x.double().std([0, *range(2, x.ndim)], correction=0)
    varying = deviation[deviation > 1e-6 * deviation.max()]
    return float(varying.max() / varying.min()) if len(varying) else 1.0


def condition_number(x: Tensor) -> float:
    """Return the condition number of the inputs: that of E[(x, 1) (x, 1)'].

    It is the Hessian of a linear unit with a bias under squared error (LeCun, Kanter & Solla 1991).
    Largest over smallest eigenvalue, without those that are 0 to rounding. x: (N, ...).
    """
    flat = x.double().flatten(1)
    flat = torch.cat([flat, flat.new_ones(len(flat), 1)], 1)
    values = torch.linalg.eigvalsh(flat.T @ flat / len(flat))
    kept = values[values > len(values) * torch.finfo(values.dtype).eps * values.max()]
    return float(kept.max() / kept.min())
