"""Where pools lie in memory, and how a kernel is launched over them: plain arithmetic on shapes.

x is seen as units, each a matrix in memory that tiles of A rows and B columns cover. What is kept
of a unit says which elements share a mean and a variance:

========  ======================================================  ===============================
kept      a unit, and its pools                                   which norms
========  ======================================================  ===============================
rows      A rows of a matrix; each row is a pool                  layer, RMS; instance of NCHW
columns   B columns of a matrix; each column is a pool            batch and instance of NHWC; layer
                                                                  over the channels of NCHW
none      a matrix; all of it is one pool                         batch of NCHW (n, s); group of
                                                                  NCHW (k, s) and of NHWC (s, k)
========  ======================================================  ===============================

Weight and bias have one value a pool, a row or a column. `group` neighbouring columns make one
pool where runs are too short to be read one by one.
"""

from __future__ import annotations

import functools
import math
from typing import Literal, NamedTuple

from normkit.formula.pool import Pool

LARGEST = {"forward": 16384, "backward": 8192}
"""Elements of a tile that holds a whole unit in registers, read once."""
TILE = 4096
"""Elements of a tile of a unit that is larger."""
PER_THREAD = {"forward": 16, "backward": 16}
"""Elements of a tile that each thread holds, in so many warps as that takes, up to 16; of a row of
TILE or more that a forward holds whole, twice as many."""
LOOPED = 65536
"""Elements of a unit that one program reads twice, the second time from L2."""
CHUNK = 16384
"""Elements of a part of a larger unit; only batch norm's depend on how many units there are."""
PROGRAMS = 1024
"""Programs that batch norm's units are cut into."""
SMALL = 1 << 23
"""Elements of x up to which batch norm's launches cost more than its bytes."""
MERGED = 64
"""Chunks of a unit that whoever needs their sums merges itself, without a launch in between."""
STAGES = {"forward": 2, "backward": 1}
"""Tiles that are read at a time, where a program goes through several: reading ahead costs a
backward the registers that a second program on the multiprocessor needs."""
WARPS_PER_SM = 16
"""Warps that a persistent backward keeps on a multiprocessor."""
SHORT_RUN = 64
"""Positions of NCHW below which batch norm goes down columns; bytes, for groups of NHWC: 32."""


class Geometry(NamedTuple):
    """A call's units; strides are those of memory, in elements."""

    kept: Literal["rows", "columns", "none"]
    affine: Literal["pool", "row", "column"]
    outer: int
    period: int
    outer_stride: int
    unit_stride: int
    rows: int
    cols: int
    row_stride: int
    group: int
    entries: int
    statistics: tuple[int, ...]
    batch: bool

    @property
    def pools(self) -> int:
        return math.prod(self.statistics)

    @property
    def step(self) -> int:
        """What divides all lengths along memory, up to the 16 bytes of the narrowest dtype."""
        return math.gcd(self.outer_stride, self.unit_stride, self.cols, self.row_stride, 8)


class Launch(NamedTuple):
    """Tiles of a rows x b columns; the tiles of a unit in chunks of so many; a program's warps.

    `split`: statistics and output take launches of their own, over chunks. `merged`: the second
    merges what the first made, so many chunks at a time; 0 where that is a third launch.
    """

    a: int
    b: int
    whole: bool
    split: bool
    units: int
    period: int
    tiles: int
    chunk: int
    chunks: int
    warps: int
    stages: int
    merged: int


@functools.lru_cache(maxsize=1024)
def geometry(
    pool: Pool, shape: tuple[int, ...], channels_last: bool, given: bool, itemsize: int
) -> Geometry:
    """The units of a tensor of this shape, contiguous or with its channels last."""
    if pool.trailing:
        at = len(shape) - pool.trailing
        rows, cols = math.prod(shape[:at]), math.prod(shape[at:])
        return Geometry(
            "rows", "column", 1, 1, 0, 0, rows, cols, cols, 1, cols, tuple(shape[:at]), False
        )
    n, c, s = shape[0], shape[1], math.prod(shape[2:])
    last = channels_last or s == 1
    match pool.summed:
        case "ns":
            ghosts = pool.ghosts or 1
            each = n // ghosts
            statistics = (c,) if pool.ghosts is None else (ghosts, c)
            size = each * c * s
            whole = power_of_two(each) * power_of_two(s) <= LARGEST["backward"]
            if last:
                return Geometry(
                    "columns", "pool", ghosts, 1, size, 0, each * s, c, c, 1, c, statistics, True
                )
            if s < SHORT_RUN and (given or not whole):
                return Geometry(
                    *("columns", "pool", ghosts, 1, size, 0, each, c * s, c * s, s, c),
                    *(statistics, True),
                )
            return Geometry(
                "none", "pool", ghosts, c, size, s, each, s, c * s, 1, c, statistics, True
            )
        case "s":
            if last:
                return Geometry("columns", "pool", n, 1, c * s, 0, s, c, c, 1, c, (n, c), False)
            return Geometry("rows", "pool", 1, 1, 0, 0, n * c, s, s, 1, c, (n, c), False)
        case "ks":
            assert pool.groups is not None
            g, k = pool.groups, c // pool.groups
            if last and k * itemsize < 32 and s > 1:
                return Geometry("columns", "column", n, 1, c * s, 0, s, c, c, k, c, (n, g), False)
            if last:
                return Geometry("none", "column", n, g, c * s, k, s, k, c, 1, c, (n, g), False)
            return Geometry("none", "row", n, g, c * s, k * s, k, s, s, 1, c, (n, g), False)
        case _:
            if last:
                return Geometry(
                    "rows", "column", 1, 1, 0, 0, n * s, c, c, 1, c, (n, *shape[2:]), False
                )
            return Geometry("columns", "row", n, 1, c * s, 0, c, s, s, 1, c, (n, *shape[2:]), False)


@functools.lru_cache(maxsize=1024)
def launch(g: Geometry, way: Literal["forward", "backward"], given: bool) -> Launch:
    """The tiles of a geometry.

    For all but batch norm they depend on the size of a unit alone, never on the number of units:
    a sample's result doesn't depend on the rest of its batch.
    """
    a, b, whole = _tile(g, way)
    match g.kept:
        case "rows":
            period, units, tiles = 1, _ceil(g.rows, a), _ceil(g.cols, b)
            size = g.cols
        case "columns":
            period = _ceil(g.cols, b)
            units, tiles = g.outer * period, _ceil(g.rows, a)
            size = g.rows * b
        case _:
            period, units = g.period, g.outer * g.period
            tiles = _ceil(g.rows, a) * _ceil(g.cols, b)
            size = g.rows * g.cols
    chunk = tiles
    split = not whole and (size > LOOPED or g.group > 1 or given)
    if split:
        chunk = _ceil(CHUNK, a * b)
        if g.batch:
            most = max(1, PROGRAMS // units)
            chunk = max(chunk, _ceil(tiles, min(most, MERGED) if _small(g) else most))
    chunk = min(chunk, tiles)
    chunks = _ceil(tiles, chunk)
    most = 8 if g.kept == "columns" else 16
    held = 2 if whole and g.kept == "rows" and way == "forward" and b >= TILE else 1
    warps = min(most, max(1, a * b // (32 * held * PER_THREAD[way])))
    merged = 0
    if split and chunks <= MERGED:
        merged = min(power_of_two(chunks), 2048 // (b if g.kept == "columns" else 1))
    return Launch(
        a, b, whole, split, units, period, tiles, chunk, chunks, warps, STAGES[way], merged
    )


def _small(g: Geometry) -> bool:
    """Whether batch norm of so little is bound by its launches."""
    return g.batch and g.outer * g.period * g.rows * g.cols <= SMALL


def _tile(g: Geometry, way: str) -> tuple[int, int, bool]:
    """Rows and columns of a tile, powers of two; and whether it holds a whole unit."""
    largest = LARGEST[way]
    rows, cols = power_of_two(g.rows), power_of_two(g.cols)
    if g.kept == "rows":
        whole = cols <= largest
        b = cols if whole else 2 * TILE
        short = 2048 if way == "forward" else 1024
        return (max(1, short // b) if whole else 1), b, whole
    if g.kept == "columns":
        # Narrow tiles of little batch norm: more units, so fewer chunks of each to merge.
        b = min(cols, 16 if _small(g) else 64)
        largest = largest if way == "forward" else TILE  # a backward of 8192 spills here
        if g.group == 1 and rows * min(cols, 16) <= largest:
            return rows, min(cols, max(16, TILE // rows)), True
        # Finding the pool of a column among neighbours takes registers: fewer warps.
        tile = TILE // 2 if g.group > 1 and way == "backward" else TILE
        return min(rows, max(1, tile // b)), b, False
    if rows * cols <= largest:
        return rows, cols, True
    if g.affine == "row":
        a = min(rows, 256)
        return a, min(cols, TILE // a), False
    b = min(cols, 1024) if g.affine == "column" else _run(g.cols)
    return min(rows, TILE // b), b, False


def _run(length: int) -> int:
    """The longest power of two, 64 to 4096, that leaves at most an eighth of its tiles idle."""
    fits = [
        b for b in (64, 128, 256, 512, 1024, 2048, TILE) if _ceil(length, b) * b <= length * 9 / 8
    ]
    return max(fits, default=64)


def covers(g: Geometry, at: Launch) -> bool:
    """Whether all tiles of a unit have the same entries of weight and bias."""
    if g.affine == "row":
        return at.whole or (g.kept == "none" and at.a >= g.rows)
    return at.whole or g.kept == "columns" or (g.kept == "none" and at.b >= g.cols)


def shared(g: Geometry) -> bool:
    """Whether all units have the same entries of weight and bias."""
    return (g.kept, g.affine) in (("rows", "column"), ("columns", "row"))


def power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def _ceil(a: int, b: int) -> int:
    return -(-a // b)
