"""What must hold for any input: invariances, and norms that coincide."""

import copy

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import normkit
from normkit import functional as F

CHANNELS, GHOST = 6, 2
ANY = settings(max_examples=30, deadline=None)
INPUTS = {
    "samples": st.integers(2, 7),
    "length": st.integers(2, 5),
    "seed": st.integers(0, 2**31),
}

# name -> (how to call it, the shape of one value a pool for samples n and length l)
EPS = 1e-24  # nothing beside any variance here, which eps would keep from scaling
NORMS = {
    "batch": (lambda x: F.batch_norm(x, training=True, eps=EPS), lambda n, le: (1, 6, 1)),
    "ghost": (
        lambda x: F.batch_norm(x, training=True, eps=EPS, ghost_size=GHOST),
        lambda n, le: (-(-n // GHOST), 6, 1),
    ),
    "instance": (lambda x: F.instance_norm(x, eps=EPS), lambda n, le: (n, 6, 1)),
    "group": (lambda x: F.group_norm(x, 3, eps=EPS), lambda n, le: (n, 3, 1)),
    "channels": (
        lambda x: F.layer_norm(x, (6,), eps=EPS, channels_first=True),
        lambda n, le: (n, 1, le),
    ),
    "last": (lambda x: F.layer_norm(x, x.shape[-1:], eps=EPS), lambda n, le: (n, 6, 1)),
    "rms": (lambda x: F.rms_norm(x, x.shape[-1:], eps=EPS), lambda n, le: (n, 6, 1)),
}


def random(seed, *shape):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def over_pools(values, samples):
    """One value a pool, repeated over the samples and channels of each."""
    if values.shape[0] not in (1, samples):
        ghosts = torch.arange(samples).tensor_split(values.shape[0])
        values = torch.cat([values[i : i + 1].expand(len(g), -1, -1) for i, g in enumerate(ghosts)])
    return values.repeat_interleave(CHANNELS // values.shape[1], 1)


@ANY
@given(name=st.sampled_from(sorted(NORMS)), **INPUTS)
def test_the_affine_change_that_a_norm_removes_changes_nothing(name, samples, length, seed):
    call, shape = NORMS[name]
    x = random(seed, samples, CHANNELS, length)
    scale, shift = random(seed + 1, 2, *shape(samples, length))
    scale = over_pools(scale.exp(), samples)
    shift = over_pools(shift, samples)
    changed = x * scale if name == "rms" else x * scale + shift
    torch.testing.assert_close(call(changed), call(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(call(-changed), -call(x), atol=1e-5, rtol=1e-5)


def outcome(layer, x, dy, **kwargs):
    """Output, gradients and running statistics of a copy of the layer."""
    layer, x = copy.deepcopy(layer), x.clone().requires_grad_()
    y = layer(x, **kwargs)
    y.backward(dy)
    return [y.detach(), x.grad, *(p.grad for p in layer.parameters()), *layer.buffers()]


def assert_same(a, b):
    for got, want in zip(a, b, strict=True):
        torch.testing.assert_close(got, want)


def randomized(layer):
    layer = layer.double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter))
        for name, buffer in layer.named_buffers():
            if name.startswith("running"):
                buffer.copy_(torch.rand_like(buffer) + 0.5)
    return layer


def sharing(layer, other):
    layer.load_state_dict(other.state_dict(), strict=True)
    return layer.double()


@ANY
@given(**INPUTS)
def test_one_ghost_is_batch_norm(samples, length, seed):
    x, dy = random(seed, 2, samples, CHANNELS, length)
    whole = randomized(normkit.BatchNorm(CHANNELS))
    for size in (samples, samples + 3):
        ghost = sharing(normkit.GhostBatchNorm(CHANNELS, size).double(), whole)
        assert_same(outcome(ghost, x, dy), outcome(whole, x, dy))


@ANY
@given(**INPUTS)
def test_renorm_is_batch_norm_until_its_limits_open(samples, length, seed):
    x, dy = random(seed, 2, samples, CHANNELS, length)
    whole = randomized(normkit.BatchNorm(CHANNELS, momentum=0.01))
    steps = {"r_steps": (0, 0), "d_steps": (0, 0)}
    closed = [
        normkit.BatchRenorm(CHANNELS, r_max=1.0, d_max=0.0, **steps),
        normkit.BatchRenorm(CHANNELS),
    ]
    expected = outcome(whole, x, dy)
    for layer in closed:
        got = outcome(sharing(layer.double(), whole), x, dy)
        got[-2] = expected[-2]  # its running variance is biased, BatchNorm's isn't
        assert_same(got, expected)
    opened = outcome(sharing(normkit.BatchRenorm(CHANNELS, **steps).double(), whole), x, dy)
    assert (opened[0] - expected[0]).abs().max() > 1e-3


@ANY
@given(**INPUTS)
def test_one_group_is_layer_norm_and_a_group_a_channel_is_instance_norm(samples, length, seed):
    x = random(seed, samples, CHANNELS, length)
    torch.testing.assert_close(F.group_norm(x, 1), F.layer_norm(x, x.shape[1:]))
    torch.testing.assert_close(F.group_norm(x, CHANNELS), F.instance_norm(x))


LAYERS = {
    "batch": lambda: normkit.BatchNorm(CHANNELS, act="silu"),
    "batch, all alike": lambda: normkit.BatchNorm(CHANNELS, momentum=None),
    "accumulating": lambda: normkit.BatchNorm(CHANNELS).accumulate(2),
    "frozen": lambda: normkit.BatchNorm(CHANNELS).freeze(),
    "ghost": lambda: normkit.GhostBatchNorm(CHANNELS, GHOST, act="gelu"),
    "renorm": lambda: normkit.BatchRenorm(CHANNELS, r_steps=(0, 0), d_steps=(0, 0)),
    "instance": lambda: normkit.InstanceNorm1d(CHANNELS, affine=True, track_running_stats=True),
    "group": lambda: normkit.GroupNorm(3, CHANNELS),
    "layer": lambda: normkit.LayerNorm(CHANNELS, channels_first=True),
    "rms": lambda: normkit.RMSNorm(CHANNELS, channels_first=True, zero_centered_weight=True),
}


@ANY
@given(name=st.sampled_from(sorted(LAYERS)), conditional=st.booleans(), **INPUTS)
def test_a_mask_of_ones_is_no_mask(name, conditional, samples, length, seed):
    x, dy = random(seed, 2, samples, CHANNELS, length)
    layer = randomized(LAYERS[name]())
    given = {"weight": random(seed, samples, CHANNELS)} if conditional else {}
    if conditional:
        layer.weight = None
    ones = torch.ones(1, 1, 1, dtype=torch.bool)
    assert_same(outcome(layer, x, dy, mask=ones, **given), outcome(layer, x, dy, **given))


@ANY
@given(name=st.sampled_from(sorted(LAYERS)), padding=st.integers(1, 4), **INPUTS)
def test_what_is_masked_is_as_if_cut_out(name, padding, samples, length, seed):
    x, dy = random(seed, 2, samples, CHANNELS, length)
    layer = randomized(LAYERS[name]())
    cut = outcome(layer, x, dy)
    nan = torch.full((samples, CHANNELS, padding), torch.nan, dtype=torch.float64)
    mask = (torch.arange(length + padding) < length)[None, None]
    masked = outcome(
        layer, torch.cat([x, nan], -1), torch.cat([dy, torch.ones_like(nan)], -1), mask=mask
    )
    for i in (0, 1):
        assert torch.equal(masked[i][..., length:], torch.zeros_like(nan))
        masked[i] = masked[i][..., :length]
    assert_same(masked, cut)


@ANY
@given(lengths=st.lists(st.integers(0, 5), min_size=2, max_size=6), seed=st.integers(0, 2**31))
def test_masked_sequences_of_any_lengths_are_one_batch_of_their_elements(lengths, seed):
    assume(sum(lengths) > 1)
    valid = torch.arange(5) < torch.tensor(lengths)[:, None]
    x = random(seed, len(lengths), CHANNELS, 5)
    padded = torch.where(valid[:, None], x, torch.nan)
    rows = x.movedim(1, -1)[valid]
    for make in (LAYERS["batch"], LAYERS["renorm"]):
        layer = randomized(make())
        other = copy.deepcopy(layer)
        y = layer(padded, mask=valid[:, None])
        torch.testing.assert_close(y.movedim(1, -1)[valid], other(rows))
        assert_same(list(layer.buffers()), list(other.buffers()))


@ANY
@given(
    samples=st.lists(st.integers(1, 5), min_size=2, max_size=5),
    shift=st.sampled_from([0.0, 1e3]),
    seed=st.integers(0, 2**31),
)
def test_micro_batches_of_any_sizes_are_one_batch(samples, shift, seed):
    parts = [random(seed + i, n, CHANNELS, 3) + shift for i, n in enumerate(samples)]
    layer = randomized(normkit.BatchNorm(CHANNELS).accumulate(len(parts)))
    whole = sharing(normkit.BatchNorm(CHANNELS).double(), layer)
    for part in parts:
        layer(part)
    whole(torch.cat(parts))
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(layer.state_dict()[name], value)
