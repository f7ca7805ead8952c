"""Normalization in float64 NumPy, written from the papers' formulas, independent of normkit.

x is (N, C, *). Everything is computed channel by channel or sample by sample in plain loops.
"""

import numpy as np


def pools(kind, shape, groups=1):
    """The index tuples of the pools of an array of this shape."""
    n, c = shape[:2]
    rest = (slice(None),) * (len(shape) - 2)
    if kind == "batch":
        return [(slice(None), i, *rest) for i in range(c)]
    if kind == "instance":
        return [(j, i, *rest) for j in range(n) for i in range(c)]
    if kind == "group":
        k = c // groups
        return [(j, slice(g * k, g * k + k), *rest) for j in range(n) for g in range(groups)]
    if kind == "channels":
        return [(j, slice(None), *s) for j in range(n) for s in np.ndindex(*shape[2:])]
    if kind == "last":
        return list(np.ndindex(*shape[:-1]))
    raise AssertionError(kind)


def affine(kind, parameter, shape):
    if parameter is None or kind == "last":
        return parameter
    return np.reshape(parameter, (1, -1) + (1,) * (len(shape) - 2))


def act(name, z):
    from math import erf

    if name is None:
        return z
    if name == "relu":
        return np.where(z < 0, 0.0, z)
    if name == "leaky_relu":
        return np.where(z < 0, 0.01 * z, z)
    if name == "silu":
        return z / (1 + np.exp(-z))
    return z * 0.5 * (1 + np.vectorize(erf)(z / np.sqrt(2)))


def normalize(
    x,
    kind,
    eps,
    *,
    groups=1,
    center=True,
    weight=None,
    bias=None,
    residual=None,
    mask=None,
    name=None,
):
    """y, and per pool (in the order of `pools`) the mean and the biased variance."""
    x = np.asarray(x, np.float64)
    y, means, variances = np.zeros_like(x), [], []
    mask = np.ones(x.shape, bool) if mask is None else np.broadcast_to(mask, x.shape)
    for at in pools(kind, x.shape, groups):
        valid = mask[at]
        values = x[at][valid]
        if values.size == 0:
            means.append(0.0)
            variances.append(0.0)
            continue
        mean = values.mean() if center else 0.0
        variance = ((values - mean) ** 2).mean()
        part = np.zeros(valid.shape)
        part[valid] = (values - mean) / np.sqrt(variance + eps)
        y[at] = part
        means.append(mean)
        variances.append(variance)
    if weight is not None:
        y = y * affine(kind, weight, x.shape)
    if bias is not None:
        y = y + affine(kind, bias, x.shape)
    if residual is not None:
        y = y + np.where(mask, residual, 0)
    return np.where(mask, act(name, y), 0.0), np.array(means), np.array(variances)


def input_gradient(x, dy, kind, eps, *, groups=1, center=True, weight=None):
    """dx = rstd (g - <g> - x̂ <g x̂>), g = dy * weight, pool by pool."""
    x, dy = np.asarray(x, np.float64), np.asarray(dy, np.float64)
    g = dy if weight is None else dy * affine(kind, weight, x.shape)
    dx = np.zeros_like(x)
    for at in pools(kind, x.shape, groups):
        mean = x[at].mean() if center else 0.0
        rstd = 1 / np.sqrt(((x[at] - mean) ** 2).mean() + eps)
        standard = (x[at] - mean) * rstd
        inner = g[at] - standard * (g[at] * standard).mean()
        dx[at] = rstd * (inner - g[at].mean() if center else inner)
    return dx
