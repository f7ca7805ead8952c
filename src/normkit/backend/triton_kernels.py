"""The kernels: tiles of a matrix in memory, reduced along one axis or along both.

`triton_plan` says what units, tiles and pools are. An argument that is None and a constant that is
False are gone when a kernel is compiled: one kernel is all norms. Nothing is summed by atomics, so
every sum has one order.

A pool's moments are sums about a shift: the mean of the tile where the tile is the whole unit, that
of the first tile where it is not. Σ(x - shift)² then exceeds Σ(x - mean)² by no more than the
number of tiles, whatever the input. Pools whose squares overflow, or vanish where eps doesn't hide
it, are summed again at another scale.
"""

import triton
import triton.language as tl

# ---- where things are


@triton.jit
def _where(period, outer_stride, unit_stride, rows, cols, row_stride, STEP: tl.constexpr):
    """The geometry. Lengths along memory come in multiples of STEP, so that accesses are wide."""
    return (period, outer_stride * STEP, unit_stride * STEP, rows, cols * STEP, row_stride * STEP)


@triton.jit
def _place(where, unit, tile, KEPT: tl.constexpr, A: tl.constexpr, B: tl.constexpr):
    """The rows (A, 1) and columns (1, B) of a tile, its offsets in x, and which of them exist."""
    period, outer_stride, unit_stride, rows, cols, row_stride = where
    tile = tl.cast(tile, tl.int64)
    unit = tl.cast(unit, tl.int64)
    if KEPT == "rows":
        first_row = unit * A
        first_col = tile * B
    elif KEPT == "columns":
        first_row = tile * A
        first_col = unit % period * B
    else:
        across = tl.cdiv(cols, B)
        first_row = tile // across * A
        first_col = tile % across * B
    a = (first_row + tl.arange(0, A))[:, None]
    b = (first_col + tl.arange(0, B))[None, :]
    base = unit // period * outer_stride + unit % period * unit_stride
    return a, b, base + a * row_stride + b, (a < rows) & (b < cols)


@triton.jit
def _pools(where, unit, tile, KEPT: tl.constexpr, A: tl.constexpr, B: tl.constexpr):
    """The indices of the statistics, in the shape that broadcasts against a tile."""
    period, _, _, rows, cols, _ = where
    a, b, _, _ = _place(where, unit, tile, KEPT, A, B)
    if KEPT == "rows":
        return a, a < rows
    elif KEPT == "columns":
        return tl.cast(unit, tl.int64) // period * cols + b, b < cols
    else:
        first = tl.zeros([1, 1], tl.int64)
        return first + unit, first == 0


@triton.jit
def _entries(where, pools, entries, unit, a, b, KEPT: tl.constexpr, AFFINE: tl.constexpr):
    """The indices of weight and bias: one a pool, a row of the tile or a column of it."""
    period, _, _, rows, cols, _ = where
    pool, exists = pools
    of_period = tl.cast(unit, tl.int64) % period
    if AFFINE == "pool":
        return pool % entries, exists
    elif AFFINE == "row":
        if KEPT == "none":
            return of_period * rows + a, a < rows
        else:
            return a, a < rows
    else:
        if KEPT == "none":
            return of_period * cols + b, b < cols
        else:
            return b, b < cols


@triton.jit
def _total(t, KEPT: tl.constexpr):
    """The sum over each pool."""
    if KEPT == "rows":
        return tl.sum(t, 1, keep_dims=True)
    elif KEPT == "columns":
        return tl.sum(t, 0, keep_dims=True)
    else:
        return tl.sum(tl.sum(t, 0, keep_dims=True), 1, keep_dims=True)


@triton.jit
def _collapse(t, AFFINE: tl.constexpr):
    """The sum over what shares an entry of weight and bias."""
    if AFFINE == "row":
        return tl.sum(t, 1, keep_dims=True)
    else:
        return tl.sum(t, 0, keep_dims=True)


# ---- elements


@triton.jit
def _load(tensor, at, exists, T: tl.constexpr):
    return tl.load(tensor + at, mask=exists, other=0).to(T)


@triton.jit
def _read(source, total, at, exists, T: tl.constexpr):
    """x of a tile, 0 where there is none, and which elements count.

    With `add` it is their sum, rounded as x is, which is written to `total` where that is given.
    """
    x, add, mask = source
    v = tl.load(x + at, mask=exists, other=0)
    if add is not None:
        v = (v.to(T) + _load(add, at, exists, T)).to(x.dtype.element_ty)
        if total is not None:
            tl.store(total + at, v, mask=exists)
    v = v.to(T)
    if mask is not None:
        exists = exists & (tl.load(mask + at, mask=exists, other=0) != 0)
        v = tl.where(exists, v, 0)
    return v, exists


@triton.jit
def _standard(v, statistics, CENTER: tl.constexpr):
    hi, lo, rstd = statistics
    if CENTER:
        v = (v - hi) - lo
    return v * rstd


@triton.jit
def _scaled(z, weight, entries, T: tl.constexpr):
    if weight is not None:
        entry, exists = entries
        z = z * _load(weight, entry, exists, T)
    return z


@triton.jit
def _shifted(z, bias, entries, T: tl.constexpr):
    if bias is not None:
        entry, exists = entries
        z = z + _load(bias, entry, exists, T)
    return z


@triton.jit
def _activate(z, ACT: tl.constexpr):
    if ACT == "relu":
        z = tl.where(z <= 0, 0, z)
    elif ACT == "leaky_relu":
        z = tl.where(z <= 0, z * 0.01, z)
    elif ACT == "silu":
        z = z / (1 + tl.exp(-z))
    elif ACT == "gelu":
        z = z * (0.5 * (1 + tl.erf(z * 0.7071067811865476)))
    return z


@triton.jit
def _slope(z, g, ACT: tl.constexpr):
    """g * act'(z); of relu and leaky_relu only the sign of z matters."""
    if ACT == "relu":
        g = tl.where(z <= 0, 0, g)
    elif ACT == "leaky_relu":
        g = tl.where(z <= 0, g * 0.01, g)
    elif ACT == "silu":
        s = 1 / (1 + tl.exp(-z))
        g = g * s * (1 + z * (1 - s))
    elif ACT == "gelu":
        cdf = 0.5 * (1 + tl.erf(z * 0.7071067811865476))
        g = g * (cdf + z * tl.exp(-0.5 * z * z) * 0.3989422804014327)
    return g


# ---- statistics


@triton.jit
def _before(where, tile, KEPT: tl.constexpr, A: tl.constexpr, B: tl.constexpr):
    """How many elements of a pool lie in the tiles before this one."""
    _, _, _, rows, cols, _ = where
    tile = tl.cast(tile, tl.int64)
    if KEPT == "rows":
        return tl.minimum(tile * B, cols)
    elif KEPT == "columns":
        return tl.minimum(tile * A, rows)
    else:
        across = tl.cdiv(cols, B)
        down = tile // across * A
        rest = tl.minimum(tile % across * B, cols) * tl.minimum(A, rows - down)
        return tl.minimum(down, rows) * cols + rest


@triton.jit
def _count(
    mask, where, unit, begin, end,
    KEPT: tl.constexpr, A: tl.constexpr, B: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """How many elements of each pool count in the tiles from begin to end."""
    if mask is not None:
        present = tl.zeros([A, B], tl.int32)
        for tile in range(begin, end):
            a, b, at, exists = _place(where, unit, tile, KEPT, A, B)
            counts = exists & (tl.load(mask + at, mask=exists, other=0) != 0)
            present += counts.to(tl.int32)
        n = _total(present, KEPT)
    else:
        n = _before(where, end, KEPT, A, B) - _before(where, begin, KEPT, A, B)
        n += tl.zeros([1, 1], tl.int64)
    return n.to(T)


@triton.jit
def _sums_of_tile(v, counts, n, scale, CENTER: tl.constexpr, KEPT: tl.constexpr):
    """The shift, and the sums of scale * x - shift and of its square, of a tile in registers."""
    v = v * scale
    shift = tl.zeros_like(scale)
    if CENTER:
        shift = _total(v, KEPT) / n
        v = tl.where(counts, v - shift, 0)
    return shift, _total(v, KEPT), _total(v * v, KEPT)


@triton.jit
def _sums_of_tiles(
    source, where, unit, begin, end, scale,
    CENTER: tl.constexpr, KEPT: tl.constexpr, STAGES: tl.constexpr,
    A: tl.constexpr, B: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """The same of the tiles from begin to end, which are read from memory."""
    x, add, mask = source
    shift = tl.zeros_like(scale)
    if CENTER:
        # A masked first tile may be empty: there the shift is the mean of all tiles.
        last = begin + 1
        if mask is not None:
            last = end
        s = tl.zeros([A, B], T)
        for tile in range(begin, last):
            a, b, at, exists = _place(where, unit, tile, KEPT, A, B)
            v, counts = _read(source, None, at, exists, T)
            s += v * scale
        n = _count(mask, where, unit, begin, last, KEPT, A, B, T)
        shift = _total(s, KEPT) / tl.maximum(n, 1)
    s = tl.zeros([A, B], T)
    q = tl.zeros([A, B], T)
    for tile in tl.range(begin, end, num_stages=STAGES):
        a, b, at, exists = _place(where, unit, tile, KEPT, A, B)
        v, counts = _read(source, None, at, exists, T)
        v = v * scale
        if CENTER:
            v = tl.where(counts, v - shift, 0)
        s += v
        q += v * v
    return shift, _total(s, KEPT), _total(q, KEPT)


@triton.jit
def _mean(shift, s, n, CENTER: tl.constexpr):
    mean = shift.to(tl.float64)
    if CENTER:
        mean += (s / n).to(tl.float64)
    return mean


@triton.jit
def _variance(s, q, n, CENTER: tl.constexpr):
    if CENTER:
        q = q - s / n * s
        q = tl.where(q < 0, 0, q)
    return q / n


@triton.jit
def _moments(
    source, where, unit, begin, end, tile, n, known, eps: tl.constexpr,
    CENTER: tl.constexpr, KEPT: tl.constexpr, WHOLE: tl.constexpr, STAGES: tl.constexpr,
    A: tl.constexpr, B: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Mean and variance in float64, and rstd; `tile` has the values of a unit of one tile."""
    scale = tl.zeros_like(known).to(T) + 1
    if WHOLE:
        v, counts = tile
        shift, s, q = _sums_of_tile(v, counts, n, scale, CENTER, KEPT)
    else:
        shift, s, q = _sums_of_tiles(
            source, where, unit, begin, end, scale, CENTER, KEPT, STAGES, A, B, T
        )
    var = _variance(s, q, n, CENTER)
    if tl.float32 == T:
        vast = (var <= 1e38) == 0
        lost = vast
        if eps < 1e-20:
            lost = vast | (var < 1e-30)
        if tl.max(tl.max(lost.to(tl.int32), 1), 0) > 0:
            # Pools are scaled by 2^-80 or 2^80; the others come out the same, bit for bit.
            down: tl.constexpr = 2.0**-80
            up: tl.constexpr = 2.0**80
            scale = tl.where(lost, tl.where(vast, down, up), 1.0)
            if WHOLE:
                v, counts = tile
                shift, s, q = _sums_of_tile(v, counts, n, scale, CENTER, KEPT)
            else:
                shift, s, q = _sums_of_tiles(
                    source, where, unit, begin, end, scale, CENTER, KEPT, STAGES, A, B, T
                )
    wide = scale.to(tl.float64)
    exact = _variance(s, q, n, CENTER).to(tl.float64) / wide / wide
    return _mean(shift, s, n, CENTER) / wide, exact, (1 / tl.sqrt(exact + eps)).to(T)


@triton.jit
def _two(mean, T: tl.constexpr):
    """A float64 mean as two numbers of T: x - mean keeps what one of them would drop."""
    hi = mean.to(T)
    return hi, (mean - hi.to(tl.float64)).to(T)


@triton.jit
def _merged(
    parts, chunks, indices, group, pool, known, CENTER: tl.constexpr, MERGED: tl.constexpr,
):  # fmt: skip
    """Count, mean and variance of pools (1, B) from (count, mean, M2) of their chunks and `group`
    neighbours, so many chunks at a time. Chan's, in float64:

    M2 = Σ M2_i + Σ n_i (mean_i - mean)²
    """
    plane = tl.cast(chunks, tl.int64) * indices
    n = tl.zeros([MERGED, 1], tl.float64) + tl.zeros_like(pool).to(tl.float64)
    s = n
    q = n
    for first in range(0, chunks, MERGED):
        chunk = first + tl.arange(0, MERGED)[:, None].to(tl.int64)
        exists = known & (chunk < chunks)
        for i in range(group):
            at = chunk * indices + pool * group + i
            k = _load(parts, at, exists, tl.float64)
            n += k
            s += k * _load(parts + plane, at, exists, tl.float64)
    n = tl.sum(n, 0, keep_dims=True)
    size = tl.maximum(n, 1)
    m = tl.sum(s, 0, keep_dims=True) / size
    for first in range(0, chunks, MERGED):
        chunk = first + tl.arange(0, MERGED)[:, None].to(tl.int64)
        exists = known & (chunk < chunks)
        for i in range(group):
            at = chunk * indices + pool * group + i
            q += _load(parts + 2 * plane, at, exists, tl.float64)
            if CENTER:
                d = _load(parts + plane, at, exists, tl.float64) - m
                q += _load(parts, at, exists, tl.float64) * d * d
    return n, m, tl.sum(q, 0, keep_dims=True) / size


# ---- forward


@triton.jit
def _write(
    v, counts, at, exists, statistics, parameters, entries, residual, mask, y,
    CENTER: tl.constexpr, ACT: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    weight, bias = parameters
    z = _scaled(_standard(v, statistics, CENTER), weight, entries, T)
    z = _shifted(z, bias, entries, T)
    if residual is not None:
        z += _load(residual, at, exists, T)
    z = _activate(z, ACT)
    if mask is not None:
        z = tl.where(counts, z, 0)
    tl.store(y + at, z.to(y.dtype.element_ty), mask=exists)


@triton.jit
def forward(
    x, add, residual, mask, weight, bias, given_mean, given_var,
    y, total, mean, rstd, var, parts,
    period, outer_stride, unit_stride, rows, cols, row_stride,
    group, entries, tiles, chunk, chunks, indices,
    eps: tl.constexpr, CENTER: tl.constexpr, ACT: tl.constexpr,
    KEPT: tl.constexpr, AFFINE: tl.constexpr, PHASE: tl.constexpr, WHOLE: tl.constexpr,
    STEP: tl.constexpr, STAGES: tl.constexpr, MERGED: tl.constexpr,
    A: tl.constexpr, B: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """The statistics and the output of a unit, or of a chunk of its tiles one of the two.

    PHASE "moments" writes (count, mean, M2) of a chunk to `parts` (3, chunks, indices); "apply"
    merges them itself, or reads the mean and rstd that `merge` made of them, or those given; "both"
    is one launch.
    """
    where = _where(period, outer_stride, unit_stride, rows, cols, row_stride, STEP)
    unit = tl.program_id(0) // chunks
    part = tl.program_id(0) % chunks
    begin = part * chunk
    end = tl.minimum(begin + chunk, tiles)
    source = (x, add, mask)
    index, known = _pools(where, unit, begin, KEPT, A, B)
    pool = index // group
    if WHOLE:
        a, b, at, exists = _place(where, unit, begin, KEPT, A, B)
        v, counts = _read(source, total, at, exists, T)
        held = (v, counts)
    else:
        held = (None, None)
    if given_mean is not None:
        m = _load(given_mean, pool, known, tl.float64)
        s2 = _load(given_var, pool, known, tl.float64)
        r = (1 / tl.sqrt(s2 + eps)).to(T)
    elif PHASE == "apply" and parts is not None:
        _, m, s2 = _merged(parts, chunks, indices, group, pool, known, CENTER, MERGED)
        r = (1 / tl.sqrt(s2 + eps)).to(T)
    elif PHASE == "apply":
        m = _load(mean, pool, known, tl.float64)
        s2 = m
        r = _load(rstd, pool, known, T)
    else:
        n = _count(mask, where, unit, begin, end, KEPT, A, B, T)
        m, s2, r = _moments(
            source, where, unit, begin, end, held, tl.maximum(n, 1), known,
            eps, CENTER, KEPT, WHOLE, STAGES, A, B, T,
        )  # fmt: skip
    if PHASE == "moments":
        to = parts + tl.cast(part, tl.int64) * indices + index
        plane = tl.cast(chunks, tl.int64) * indices
        count = n.to(tl.float64) + tl.zeros_like(m)
        tl.store(to, count, mask=known)
        tl.store(to + plane, m, mask=known)
        tl.store(to + 2 * plane, s2 * count, mask=known)
    else:
        if PHASE == "both" or parts is not None or given_mean is not None:
            if part == 0:
                tl.store(mean + pool, m, mask=known)
                tl.store(rstd + pool, r, mask=known)
                tl.store(var + pool, s2.to(T), mask=known)
        hi, lo = _two(m, T)
        pools = (pool, known)
        if WHOLE:
            _write(
                v, counts, at, exists, (hi, lo, r), (weight, bias),
                _entries(where, pools, entries, unit, a, b, KEPT, AFFINE),
                residual, mask, y, CENTER, ACT, T,
            )  # fmt: skip
        else:
            for tile in tl.range(begin, end, num_stages=STAGES):
                a, b, at, exists = _place(where, unit, tile, KEPT, A, B)
                v, counts = _read(source, total, at, exists, T)
                _write(
                    v, counts, at, exists, (hi, lo, r), (weight, bias),
                    _entries(where, pools, entries, unit, a, b, KEPT, AFFINE),
                    residual, mask, y, CENTER, ACT, T,
                )  # fmt: skip


@triton.jit
def merge(
    parts, count, mean, rstd, var, chunks, indices, pools, group,
    eps: tl.constexpr, CENTER: tl.constexpr, MERGED: tl.constexpr, B: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """The pools' statistics from parts that are too many for each "apply" to merge, or all it takes."""
    pool = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)[None, :]
    known = pool < pools
    n, m, v = _merged(parts, chunks, indices, group, pool, known, CENTER, MERGED)
    tl.store(mean + pool, m, mask=known)
    tl.store(var + pool, v.to(var.dtype.element_ty), mask=known)
    if count is not None:
        tl.store(count + pool, n, mask=known)
    if rstd is not None:
        tl.store(rstd + pool, (1 / tl.sqrt(v + eps)).to(T), mask=known)


# ---- backward


@triton.jit
def _point(
    source, dy, residual, output, at, exists, statistics, parameters, entries,
    CENTER: tl.constexpr, ACT: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """x̂ and dz = dy * act'(z) of a tile, and which elements count."""
    _, _, mask = source
    weight, bias = parameters
    v, counts = _read(source, None, at, exists, T)
    standard = _standard(v, statistics, CENTER)
    dz = _load(dy, at, exists, T)
    if ACT is not None:
        if output is not None:
            z = _load(output, at, exists, T)
        else:
            z = _shifted(_scaled(standard, weight, entries, T), bias, entries, T)
            if residual is not None:
                z += _load(residual, at, exists, T)
        dz = _slope(z, dz, ACT)
    if mask is not None:
        dz = tl.where(counts, dz, 0)
    return standard, dz, counts


@triton.jit
def _write_gradient(
    standard, dz, counts, at, exists, statistics, means, weight, entries, mask, dtotal, dx, dresidual,
    GIVEN: tl.constexpr, CENTER: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """dx = rstd * (g - <g> - x̂ <g x̂>), g = dz * weight."""
    _, _, rstd = statistics
    flat, steep = means
    g = _scaled(dz, weight, entries, T)
    if not GIVEN:
        if CENTER:
            g -= flat
        g -= standard * steep
    g = g * rstd
    if mask is not None:
        g = tl.where(counts, g, 0)
    if dtotal is not None:
        g += _load(dtotal, at, exists, T)
    tl.store(dx + at, g.to(dx.dtype.element_ty), mask=exists)
    if dresidual is not None:
        tl.store(dresidual + at, dz.to(dresidual.dtype.element_ty), mask=exists)


@triton.jit
def _folded(
    parts, chunks, indices, group, pool, known, T: tl.constexpr, MERGED: tl.constexpr,
):  # fmt: skip
    """The sums of pools (1, B) over the chunks and over `group` neighbours."""
    s = tl.zeros([MERGED, 1], T) + tl.zeros_like(pool).to(T)
    for first in range(0, chunks, MERGED):
        chunk = first + tl.arange(0, MERGED)[:, None].to(tl.int64)
        for i in range(group):
            at = chunk * indices + pool * group + i
            s += _load(parts, at, known & (chunk < chunks), T)
    return tl.sum(s, 0, keep_dims=True)


@triton.jit
def _deposit(to, value, exists):
    """Add to what no other program reads or writes."""
    tl.debug_barrier()
    tl.store(to, tl.load(to, mask=exists, other=0) + value, mask=exists)
    tl.debug_barrier()


@triton.jit
def backward(
    dy, x, residual, output, mask, weight, bias, mean, rstd, dtotal, parts, merged,
    dx, dresidual, sums, affine,
    period, outer_stride, unit_stride, rows, cols, row_stride,
    group, entries, tiles, chunk, chunks, indices, units, pools, programs, affine_rows,
    GIVEN: tl.constexpr, CENTER: tl.constexpr, ACT: tl.constexpr,
    KEPT: tl.constexpr, AFFINE: tl.constexpr, PHASE: tl.constexpr, WHOLE: tl.constexpr,
    COVERS: tl.constexpr, SHARED: tl.constexpr,
    STEP: tl.constexpr, STAGES: tl.constexpr, MERGED: tl.constexpr,
    A: tl.constexpr, B: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """The input gradient of some units, and their share of those of weight and bias.

    A program does the units program, program + programs, ... PHASE "sums" writes Σg, Σg x̂ and,
    with a mask, the count of a chunk to `sums` (2 or 3, chunks, indices); "gradient" folds these
    `parts` itself, or reads them, folded, from `merged` (2 or 3, pools); "both" is one launch. Where weight and bias are one value
    a pool, their gradients are these sums, of g = dz. Elsewhere they are gathered in `affine`
    (2, affine_rows, entries), bias first; a row has one writer: a program where all units have the
    same entries (SHARED), else one chunk of each unit. COVERS: so have all tiles of a unit.
    """
    where = _where(period, outer_stride, unit_stride, rows, cols, row_stride, STEP)
    program = tl.program_id(0) // chunks
    part = tl.program_id(0) % chunks
    begin = part * chunk
    end = tl.minimum(begin + chunk, tiles)
    source = (x, None, mask)
    parameters = (weight, bias)
    of_pools: tl.constexpr = AFFINE == "pool"
    reads: tl.constexpr = PHASE == "gradient" or PHASE == "project"
    gathers: tl.constexpr = affine is not None
    holds: tl.constexpr = gathers and COVERS
    plane = tl.cast(affine_rows, tl.int64) * entries
    db = tl.zeros([A if holds else 1, B if holds else 1], T)
    dw = tl.zeros([A if holds else 1, B if holds else 1], T)
    for unit in range(program, units, programs):
        index, known = _pools(where, unit, begin, KEPT, A, B)
        pool = index // group
        hi, lo = _two(_load(mean, pool, known, tl.float64), T)
        statistics = (hi, lo, _load(rstd, pool, known, T))
        if SHARED:
            row = tl.cast(program, tl.int64)
        else:
            row = tl.cast(part, tl.int64) * (units // period) + unit // period
        if WHOLE:
            a, b, at, exists = _place(where, unit, begin, KEPT, A, B)
            of = _entries(where, (pool, known), entries, unit, a, b, KEPT, AFFINE)
            standard, dz, counts = _point(
                source, dy, residual, output, at, exists, statistics, parameters, of, CENTER, ACT, T
            )
            if holds:
                db += dz
                dw += dz * standard
        chunk_plane = tl.cast(chunks, tl.int64) * indices
        if reads and parts is not None:
            flat = _folded(parts, chunks, indices, group, pool, known, T, MERGED)
            steep = _folded(parts + chunk_plane, chunks, indices, group, pool, known, T, MERGED)
        elif reads:
            if not GIVEN:
                flat = _load(merged, pool, known, T)
                steep = _load(merged + pools, pool, known, T)
        elif WHOLE:
            g = dz
            if not of_pools:
                g = _scaled(dz, weight, of, T)
            flat = _total(g, KEPT)
            steep = _total(g * standard, KEPT)
        else:
            s = tl.zeros([A, B], T)
            q = tl.zeros([A, B], T)
            for tile in tl.range(begin, end, num_stages=STAGES):
                a, b, at, exists = _place(where, unit, tile, KEPT, A, B)
                of = _entries(where, (pool, known), entries, unit, a, b, KEPT, AFFINE)
                standard, dz, counts = _point(
                    source, dy, residual, output, at, exists, statistics, parameters, of,
                    CENTER, ACT, T,
                )  # fmt: skip
                g = dz
                if not of_pools:
                    g = _scaled(dz, weight, of, T)
                s += g
                q += g * standard
                if holds:
                    db += dz
                    dw += dz * standard
                elif gathers:
                    entry, mine = of
                    to = affine + row * entries + entry
                    _deposit(to, _collapse(dz, AFFINE), mine)
                    _deposit(to + plane, _collapse(dz * standard, AFFINE), mine)
            flat = _total(s, KEPT)
            steep = _total(q, KEPT)
        if PHASE == "gradient" and sums is not None:
            if part == 0:
                tl.store(sums + pool, flat, mask=known)
                tl.store(sums + pools + pool, steep, mask=known)
        elif sums is not None:
            to = sums + tl.cast(part, tl.int64) * indices + index
            tl.store(to, flat, mask=known)
            tl.store(to + chunk_plane, steep, mask=known)
            if PHASE == "sums" and mask is not None:
                n = _count(mask, where, unit, begin, end, KEPT, A, B, T)
                tl.store(to + 2 * chunk_plane, n, mask=known)
        if PHASE != "sums":
            means = (None, None)
            if PHASE == "project":
                means = (flat, steep)
            elif not GIVEN:
                if PHASE == "gradient" and mask is not None and parts is not None:
                    n = _folded(
                        parts + 2 * chunk_plane, chunks, indices, group, pool, known, T, MERGED
                    )
                elif PHASE == "gradient" and mask is not None:
                    n = _load(merged + 2 * pools, pool, known, T)
                else:
                    n = _count(mask, where, unit, 0, tiles, KEPT, A, B, T) * group
                n = tl.maximum(n, 1)
                flat = flat / n
                steep = steep / n
                if of_pools:
                    own = _entries(where, (pool, known), entries, unit, 0, 0, KEPT, AFFINE)
                    flat = _scaled(flat, weight, own, T)
                    steep = _scaled(steep, weight, own, T)
                means = (flat, steep)
            if WHOLE:
                _write_gradient(
                    standard, dz, counts, at, exists, statistics, means, weight, of,
                    mask, dtotal, dx, dresidual, GIVEN, CENTER, T,
                )  # fmt: skip
            else:
                for tile in tl.range(begin, end, num_stages=STAGES):
                    a, b, at, exists = _place(where, unit, tile, KEPT, A, B)
                    of = _entries(where, (pool, known), entries, unit, a, b, KEPT, AFFINE)
                    standard, dz, counts = _point(
                        source, dy, residual, output, at, exists, statistics, parameters, of,
                        CENTER, ACT, T,
                    )  # fmt: skip
                    _write_gradient(
                        standard, dz, counts, at, exists, statistics, means, weight, of,
                        mask, dtotal, dx, dresidual, GIVEN, CENTER, T,
                    )  # fmt: skip
    if holds:
        a, b, _, _ = _place(where, program, begin, KEPT, A, B)
        pools_of = _pools(where, program, begin, KEPT, A, B)
        entry, mine = _entries(where, pools_of, entries, program, a, b, KEPT, AFFINE)
        if SHARED:
            row = tl.cast(program, tl.int64)
        else:
            row = tl.cast(part, tl.int64) * (units // period) + program // period
        to = affine + row * entries + entry
        tl.store(to, _collapse(db, AFFINE), mask=mine)
        tl.store(to + plane, _collapse(dw, AFFINE), mask=mine)


@triton.jit
def fold(
    parts, out, rows, indices, entries, group,
    MERGED: tl.constexpr, B: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """The sums of (planes, rows, indices) over the rows and over `group` neighbours."""
    plane = tl.program_id(1).to(tl.int64)
    entry = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)[None, :]
    known = entry < entries
    s = _folded(parts + plane * rows * indices, rows, indices, group, entry, known, T, MERGED)
    tl.store(out + plane * entries + entry, s.to(out.dtype.element_ty), mask=known)
