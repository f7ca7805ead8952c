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
    if kind == "ghost":  # `groups` of them
        ghosts = np.array_split(np.arange(n), groups)
        return [(slice(g[0], g[-1] + 1), i, *rest) for g in ghosts for i in range(c)]
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
    if parameter is None or kind == "last" or np.ndim(parameter) == len(shape):
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


def renorm(x, running_mean, running_var, eps, r_max, d_max, weight, bias):
    """Batch renormalization of (N, C): y, and each channel's mean and biased variance."""
    x = np.asarray(x, np.float64)
    y, means, variances = np.zeros_like(x), [], []
    for c in range(x.shape[1]):
        column = x[:, c]
        mean, variance = column.sum() / len(column), np.var(column)
        sigma, running_sigma = np.sqrt(variance + eps), np.sqrt(running_var[c] + eps)
        r = min(max(sigma / running_sigma, 1 / r_max), r_max)
        d = min(max((mean - running_mean[c]) / running_sigma, -d_max), d_max)
        y[:, c] = ((column - mean) / sigma * r + d) * weight[c] + bias[c]
        means.append(mean)
        variances.append(variance)
    return y, np.array(means), np.array(variances)
