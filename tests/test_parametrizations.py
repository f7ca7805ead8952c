"""Reparametrized weights: values against NumPy and torch, state of every kind, bad input."""

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations as torchs
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import normkit
from normkit import parametrizations as P

KINDS = {f.__name__: f for f in (P.weight_norm, P.spectral_norm, P.weight_standardization)}
LAYERS = {
    "Linear": (lambda: nn.Linear(6, 4), (3, 6)),
    "Conv1d": (lambda: nn.Conv1d(6, 4, 3), (2, 6, 7)),
    "Conv2d-grouped": (lambda: nn.Conv2d(6, 4, 3, groups=2), (2, 6, 5, 5)),
    "Conv3d": (lambda: nn.Conv3d(2, 4, 2), (2, 2, 3, 3, 3)),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(6, 4, 3), (2, 6, 5)),
    "ConvTranspose2d-grouped": (lambda: nn.ConvTranspose2d(6, 4, 3, groups=2), (2, 6, 4, 4)),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(2, 4, 2), (2, 2, 3, 3, 3)),
}


def rows(layer, weight):
    """The weights of each output channel, channel by channel, in float64 NumPy."""
    w = weight.detach().double().numpy()
    if not isinstance(layer, nn.modules.conv._ConvTransposeNd):
        return [w[o] for o in range(len(w))]
    inputs, outputs = w.shape[0] // layer.groups, w.shape[1]
    return [
        w[g * inputs : (g + 1) * inputs, o] for g in range(layer.groups) for o in range(outputs)
    ]


def make(name, kind=None):
    layer, shape = LAYERS[name][0](), LAYERS[name][1]
    return (layer if kind is None else KINDS[kind](layer)), torch.randn(shape)


@pytest.mark.parametrize("name", LAYERS)
def test_weight_norm_keeps_the_weight_and_then_follows_the_formula(name):
    plain, x = make(name)
    layer = P.weight_norm(copy.deepcopy(plain))
    torch.testing.assert_close(layer.weight, plain.weight)
    torch.testing.assert_close(layer(x), plain(x))
    g, v = layer.parametrizations.weight.original0, layer.parametrizations.weight.original1
    with torch.no_grad():
        g.copy_(torch.linspace(-1, 2, g.numel()).reshape(g.shape))
        v.mul_(3)
    for got, w, length in zip(
        rows(plain, layer.weight), rows(plain, plain.weight), g.flatten().tolist(), strict=True
    ):
        np.testing.assert_allclose(got, length * w / np.sqrt((w**2).sum()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", LAYERS)
def test_weight_standardization_is_the_formula(name):
    plain, x = make(name)
    layer = P.weight_standardization(copy.deepcopy(plain), eps=1e-3)
    for got, w in zip(rows(plain, layer.weight), rows(plain, plain.weight), strict=True):
        np.testing.assert_allclose(
            got, (w - w.mean()) / np.sqrt(w.var() + 1e-3), rtol=2e-4, atol=1e-5
        )
    layer(x).square().sum().backward()
    assert layer.parametrizations.weight.original.grad.abs().sum() > 0


@pytest.mark.parametrize("name", LAYERS)
def test_weight_standardization_is_the_papers_and_has_a_gradient_at_constant_weights(name):
    plain, _ = make(name)
    layer = P.weight_standardization(copy.deepcopy(plain))
    for got, w in zip(rows(plain, layer.weight), rows(plain, plain.weight), strict=True):
        np.testing.assert_allclose(got, (w - w.mean()) / (w.std() + 1e-5), rtol=1e-3, atol=1e-5)
    with torch.no_grad():
        layer.parametrizations.weight.original.fill_(0.5)
    weight = layer.weight
    assert torch.equal(weight, torch.zeros_like(weight))
    weight.square().sum().backward()
    assert layer.parametrizations.weight.original.grad.isfinite().all()


@pytest.mark.parametrize("name", LAYERS)
def test_spectral_norm_is_the_largest_singular_value_of_torchs_matrix(name):
    plain, x = make(name)
    layer = P.spectral_norm(copy.deepcopy(plain))
    for _ in range(200):
        layer(x)
    transposed = isinstance(plain, nn.modules.conv._ConvTransposeNd)
    matrix = plain.weight.detach().double().transpose(0, 1 if transposed else 0).flatten(1)
    sigma = np.linalg.svd(matrix.numpy(), compute_uv=False)[0]
    np.testing.assert_allclose(layer.weight.detach(), plain.weight.detach() / sigma, rtol=1e-4)


def test_one_power_iteration_a_step_and_none_in_evaluation():
    layer = P.spectral_norm(nn.Linear(5, 4))
    entry = layer.parametrizations.weight[0]
    w = layer.parametrizations.weight.original.detach().double().numpy()
    x = torch.randn(2, 5)
    with torch.no_grad():
        entry._u.copy_(nn.functional.normalize(torch.tensor([1.0, 2.0, 3.0, 4.0]), dim=0))
    u = entry._u.double().numpy()
    for _ in range(3):
        v = w.T @ u / np.linalg.norm(w.T @ u)
        u = w @ v / np.linalg.norm(w @ v)
        y = layer(x)
        np.testing.assert_allclose(entry._u.numpy(), u, rtol=1e-5)
        np.testing.assert_allclose(entry._v.numpy(), v, rtol=1e-5)
        expected = x.double().numpy() @ (w / (u @ w @ v)).T + layer.bias.detach().numpy()
        np.testing.assert_allclose(y.detach().numpy(), expected, rtol=1e-5, atol=1e-6)
    layer.eval()
    torch.testing.assert_close(layer(x), y)
    np.testing.assert_allclose(entry._u.numpy(), u, rtol=1e-5)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_a_recomputation_reads_its_forwards_vectors_and_moves_none(reentrant):
    plain = nn.Sequential(P.spectral_norm(nn.Linear(5, 5)), nn.Tanh())
    with torch.no_grad():  # far from converged, so that each iteration is another estimate
        plain[0].parametrizations.weight[0]._u.copy_(torch.eye(5)[0])
    again = copy.deepcopy(plain)
    entry = again[0].parametrizations.weight[0]
    for _ in range(3):
        x = torch.randn(4, 5, requires_grad=True)
        first = checkpoint(again, x, use_reentrant=reentrant)
        vectors = entry._u.clone()
        # A second forward moves u before the first one is computed again.
        (first.sum() + checkpoint(again, 2 * x, use_reentrant=reentrant).sum()).backward()
        got, x.grad = x.grad, None
        (plain(x).sum() + plain(2 * x).sum()).backward()
        torch.testing.assert_close(got, x.grad)
        assert not torch.equal(vectors, entry._u)
        for ours, theirs in zip(again.buffers(), plain.buffers(), strict=True):
            assert torch.equal(ours, theirs)
        for ours, theirs in zip(again.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad)


def test_a_backward_that_repeats_a_forward_by_itself_moves_nothing():
    layer = P.spectral_norm(nn.Linear(5, 5))
    entry = layer.parametrizations.weight[0]

    class Again(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return layer(x)

        @staticmethod
        def backward(ctx, dy):
            with torch.enable_grad():
                x = ctx.saved_tensors[0].detach().requires_grad_()
                return torch.autograd.grad(layer(x), x, dy)

    with torch.no_grad():
        entry._u.copy_(torch.eye(5)[0])
    y = Again.apply(torch.randn(2, 5, requires_grad=True))
    u = entry._u.clone()
    with pytest.warns(UserWarning, match="runs a forward again, and not by"):
        y.sum().backward()
    assert torch.equal(entry._u, u)


def test_spectral_norm_trains_as_torchs_older_one_does():
    ours, theirs = nn.Linear(5, 4), nn.Linear(5, 4)
    theirs.load_state_dict(ours.state_dict())
    theirs = nn.utils.spectral_norm(theirs)
    P.spectral_norm(ours).load_state_dict(theirs.state_dict())
    pairs = [(m, torch.optim.SGD(m.parameters(), lr=0.1)) for m in (ours, theirs)]
    for _ in range(5):
        x = torch.randn(8, 5)
        losses = []
        for layer, optimizer in pairs:
            optimizer.zero_grad()
            losses.append(layer(x).square().mean())
            losses[-1].backward()
            optimizer.step()
        torch.testing.assert_close(*losses)
    torch.testing.assert_close(ours.parametrizations.weight[0]._u, theirs.weight_u)


@pytest.mark.parametrize("evaluating", [False, True])
def test_two_forwards_before_a_backward(evaluating):
    layer = P.spectral_norm(nn.Linear(5, 4)).train(not evaluating)
    entry, w = layer.parametrizations.weight[0], layer.parametrizations.weight.original
    inputs, outputs, vectors = torch.randn(2, 3, 5), [], []
    for x in inputs:
        outputs.append(layer(x).square().sum())
        vectors.append((entry._u.clone(), entry._v.clone()))
        layer.train()
    assert not torch.equal(vectors[0][0], vectors[1][0])
    (outputs[0] - outputs[1]).backward()
    got, w.grad = w.grad, None
    first, second = (
        (x @ (w / (u @ w @ v)).T + layer.bias).square().sum()
        for x, (u, v) in zip(inputs, vectors, strict=True)
    )
    (first - second).backward()
    torch.testing.assert_close(got, w.grad)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LAYERS)
def test_copies_state_and_removal(name, kind):
    layer, x = make(name, kind)
    plain = type(LAYERS[name][0]())
    assert isinstance(layer, plain)
    layer(x).sum().backward()
    layer.eval()
    y = layer(x)
    fresh, _ = make(name, kind)
    fresh.eval().load_state_dict(layer.state_dict())
    copied, pickled = copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))
    for other in (fresh, copied, pickled, copy.deepcopy(pickled)):
        assert torch.equal(other(x), y)
        assert P.remove(other.train()) is other
        assert type(other) is plain
        assert set(other.state_dict()) == {"weight", "bias"}
        assert isinstance(other.weight, nn.Parameter)
        torch.testing.assert_close(other(x), y)
    assert torch.equal(layer(x), y)


@pytest.mark.parametrize("kind", ["spectral_norm", "weight_standardization"])
def test_the_optimizers_parameter_stays_the_same_object(kind):
    layer = nn.Linear(3, 4)
    weight = layer.weight
    KINDS[kind](layer)
    assert layer.parametrizations.weight.original is weight
    assert P.remove(layer).weight is weight


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("theirs", ["hooks", "parametrizations"])
@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm"])
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_torchs_state_dicts_load(kind, theirs, name):
    source, x = make(name)
    source = getattr(nn.utils if theirs == "hooks" else torchs, kind)(source)
    if kind == "weight_norm":
        with torch.no_grad():
            for p in source.parameters():
                p.copy_(torch.rand_like(p) + 0.2)
    else:
        source(x)
    ours, _ = make(name, kind)
    model, state = nn.Sequential(ours), nn.Sequential(source.eval()).state_dict()
    keys = set(state)
    model.eval().load_state_dict(state)
    torch.testing.assert_close(model(x), source(x))
    assert set(state) == keys


@pytest.mark.parametrize("dim", [None, 1])
def test_weight_norm_of_torchs_other_axes_loads_as_the_same_weight(dim):
    source = torchs.weight_norm(nn.Conv1d(3, 4, 2), dim=dim)
    with torch.no_grad():
        source.parametrizations.weight.original0.mul_(3)
    ours = P.weight_norm(nn.Conv1d(3, 4, 2))
    ours.load_state_dict(source.state_dict())
    torch.testing.assert_close(ours.weight, source.weight)


def test_a_state_dict_of_another_size_is_refused():
    with pytest.raises(RuntimeError, match="size mismatch"):
        P.weight_norm(nn.Linear(3, 4)).load_state_dict(
            torchs.weight_norm(nn.Linear(3, 5)).state_dict()
        )
    with pytest.raises(RuntimeError, match="weight_g"):
        P.weight_norm(nn.Linear(3, 4)).load_state_dict({"weight_g": torch.ones(4, 1)})


@pytest.mark.parametrize("kind", KINDS)
def test_the_weight_does_not_depend_on_the_scale(kind):
    @settings(max_examples=15, deadline=None)
    @given(scale=st.floats(0.1, 100))
    def check(scale):
        torch.manual_seed(0)
        layer = nn.Linear(6, 4, dtype=torch.float64)
        scaled = copy.deepcopy(layer)
        with torch.no_grad():
            scaled.weight.mul_(scale)
        extra = {"eps": 0.0} if kind == "weight_standardization" else {}
        torch.manual_seed(1)
        KINDS[kind](layer, **extra)
        torch.manual_seed(1)
        KINDS[kind](scaled, **extra)
        factor = scale if kind == "weight_norm" else 1.0
        torch.testing.assert_close(scaled.weight, factor * layer.weight)

    check()


def test_first_batch_initialization_standardizes_every_layer():
    model = nn.Sequential(
        P.weight_norm(nn.Conv2d(3, 6, 3, groups=3)),
        nn.ReLU(),
        P.weight_norm(nn.ConvTranspose2d(6, 4, 3, groups=2)),
        nn.Dropout(0.5),
        normkit.BatchNorm2d(4),
        nn.Flatten(),
        P.weight_norm(nn.Linear(256, 5, bias=False)),
    )
    x = torch.randn(16, 3, 8, 8) * 3 + 1
    v = model[0].parametrizations.weight.original1.clone()
    random = torch.get_rng_state()
    assert P.initialize_weight_norm(model, x) is None
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(model[0].parametrizations.weight.original1, v)
    assert model[4].num_batches_tracked == 0
    assert torch.equal(model[4].running_mean, torch.zeros(4))
    assert model.training
    t = model[0](x).detach().double().numpy().transpose(1, 0, 2, 3).reshape(6, -1)
    np.testing.assert_allclose(t.mean(1), 0, atol=1e-5)
    np.testing.assert_allclose(t.std(1), 1, rtol=1e-5)
    t = model[2](model[1](model[0](x))).detach().transpose(0, 1).flatten(1)
    torch.testing.assert_close(t.mean(1), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(t.std(1, correction=0), torch.ones(4))
    random = torch.get_rng_state()
    last = model(x)
    torch.set_rng_state(random)
    torch.testing.assert_close(last, model(x))
    assert not model[0]._forward_pre_hooks


def test_first_batch_initialization_is_the_papers():
    layer = nn.Linear(3, 2)
    w = layer.weight.detach().double().numpy()
    P.initialize_weight_norm(P.weight_norm(layer), x := torch.randn(50, 3))
    t = x.double().numpy() @ (w / np.linalg.norm(w, axis=1, keepdims=True)).T
    g = layer.parametrizations.weight.original0.detach().numpy()
    np.testing.assert_allclose(g[:, 0], 1 / t.std(0), rtol=1e-5)
    np.testing.assert_allclose(
        layer.bias.detach().numpy(), -t.mean(0) / t.std(0), rtol=1e-4, atol=1e-6
    )


def test_a_shared_layer_is_initialized_at_its_first_call():
    layer = P.weight_norm(nn.Linear(3, 3))
    x = torch.randn(40, 3)
    P.initialize_weight_norm(nn.Sequential(layer, nn.Tanh(), layer), x)
    torch.testing.assert_close(layer(x).std(0, correction=0), torch.ones(3))


@pytest.mark.parametrize(
    ("model", "x", "says"),
    [
        (nn.Linear(3, 2), torch.randn(4, 3), "no layer of Linear is under weight_norm"),
        (P.weight_norm(nn.Linear(3, 2)), torch.randn(1, 3), "2 of 2 outputs are constant"),
        (
            nn.Sequential(P.weight_norm(nn.Linear(3, 2)), P.weight_norm(nn.Linear(5, 2))),
            torch.randn(4, 3),
            "mat1 and mat2",
        ),
        (
            nn.ModuleDict({"a": P.weight_norm(nn.Linear(3, 2)), "b": nn.Linear(2, 2)}),
            torch.randn(4, 3),
            "forward",
        ),
        (P.weight_norm(nn.Embedding(3, 2)), torch.tensor([1]), "neither Linear nor a convolution"),
    ],
)
def test_a_failed_initialization_leaves_the_model_as_it_was(model, x, says):
    before = {k: t.clone() for k, t in model.state_dict().items()}
    with pytest.raises((ValueError, RuntimeError, NotImplementedError), match=says):
        P.initialize_weight_norm(model, x)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_a_layer_that_the_call_does_not_reach_is_named():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = (P.weight_norm(nn.Linear(3, 3)) for _ in range(2))

        def forward(self, x):
            return self.used(x)

    model = Half()
    g = model.used.parametrizations.weight.original0.clone()
    with pytest.raises(ValueError, match="reached no idle"):
        P.initialize_weight_norm(model, torch.randn(8, 3))
    assert torch.equal(model.used.parametrizations.weight.original0, g)


@pytest.mark.parametrize("kind", KINDS)
def test_func_transforms_and_compile(kind):
    layer = KINDS[kind](nn.Linear(3, 4)).double().eval()
    x = torch.randn(5, 3, dtype=torch.float64)
    parameters = dict(layer.named_parameters())

    def loss(parameters):
        return torch.func.functional_call(layer, parameters, (x,)).square().sum()

    layer(x).square().sum().backward()
    for name, gradient in torch.func.grad(loss)(parameters).items():
        torch.testing.assert_close(gradient, layer.get_parameter(name).grad)
    layer.train().zero_grad()
    if kind == "spectral_norm":
        with torch.no_grad():
            layer.parametrizations.weight[0]._u.copy_(torch.eye(4)[0])
    eager = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        ours, theirs = compiled(x), eager(x)
        torch.testing.assert_close(ours, theirs)
        ours.square().sum().backward()
        theirs.square().sum().backward()
    for p, q in zip(layer.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    for p, q in zip(layer.buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(p, q)


def test_a_functional_call_returns_the_moved_vectors_and_writes_none():
    layer = P.spectral_norm(nn.Linear(5, 4))
    entry = layer.parametrizations.weight[0]
    with torch.no_grad():
        entry._u.copy_(torch.eye(4)[0])
    before, x = entry._u.clone(), torch.randn(3, 2, 5)
    parameters = dict(layer.named_parameters())

    def loss(parameters, x):
        y, buffers = normkit.functional_call(layer, parameters, (x,))
        return y.square().sum(), buffers

    step = torch.func.grad(loss, has_aux=True)
    gradients, moved = torch.vmap(step, in_dims=(None, 0))(parameters, x)
    assert torch.equal(entry._u, before)
    layer(x[1]).square().sum().backward()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient[1], parameters[name].grad)
    torch.testing.assert_close(moved["parametrizations.weight.0._u"], entry._u.expand(3, -1))


@pytest.mark.parametrize("kind", KINDS)
def test_the_cache_of_torch_holds(kind):
    layer = KINDS[kind](nn.Linear(3, 4))
    with parametrize.cached():
        assert layer.weight is layer.weight


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types(kind, dtype):
    layer = KINDS[kind](nn.Linear(16, 8)).eval()
    low = copy.deepcopy(layer).to(dtype)
    assert low.weight.dtype == dtype
    torch.testing.assert_close(low.weight.float(), layer.weight, atol=0.03, rtol=0.03)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_and_export(kind):
    layer = KINDS[kind](nn.Linear(16, 8)).eval()
    x = torch.randn(3, 16)
    with torch.autocast("cpu", torch.bfloat16):
        weight = layer.weight
        assert layer(x).dtype == torch.bfloat16
    torch.testing.assert_close(weight, layer.weight, rtol=1e-6, atol=1e-7)
    exported = torch.export.export(layer, (x,)).module()
    torch.testing.assert_close(exported(x), layer(x))


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize("kind", KINDS)
def test_bad_layers_are_named(kind):
    apply = KINDS[kind]
    layer = apply(nn.Linear(3, 4))
    y = layer.eval()(x := torch.randn(2, 3))
    for again in KINDS.values():
        with pytest.raises(ValueError, match=r"Linear\((.|\n)*weight is parametrized already, by"):
            again(layer)
    assert torch.equal(layer(x), y)
    with pytest.raises(ValueError, match=r"ReLU\(\): no parameter 'weight'.*none"):
        apply(nn.ReLU())
    with pytest.raises(ValueError, match="no parameter 'wieght'; its parameters are weight, bias"):
        apply(nn.Linear(3, 4), "wieght")
    with pytest.raises(ValueError, match=r"bias with an axis of outputs.*\(4,\)"):
        apply(nn.Linear(3, 4), "bias")
    with pytest.raises(ValueError, match=r"a hook of torch\.nn\.utils is on it"):
        apply(nn.utils.weight_norm(nn.Linear(3, 4)))
    with pytest.raises(ValueError, match="under no parametrization of normkit"):
        P.remove(nn.Linear(3, 4))
    with pytest.raises(ValueError, match="under no parametrization of normkit"):
        P.remove(torchs.weight_norm(nn.Linear(3, 4)))


def test_weights_without_direction_length_or_variance_are_refused():
    zero = nn.init.zeros_(nn.Linear(3, 4).weight)
    layer = nn.Linear(3, 4)
    layer.weight = nn.Parameter(zero.detach())
    with pytest.raises(ValueError, match=r"Linear\(.*spectral_norm of a zero weight"):
        P.spectral_norm(layer)
    with torch.no_grad():
        layer.weight[0] = 1
    with pytest.raises(ValueError, match="weight has 3 of zeros"):
        P.weight_norm(layer)
    assert type(layer) is nn.Linear
    with pytest.raises(ValueError, match=r"more than 1 weight.*\(4, 1, 1, 1\)"):
        P.weight_standardization(nn.Conv2d(4, 4, 1, groups=4))
    with pytest.raises(ValueError, match=r"eps.*-1"):
        P.weight_standardization(layer, eps=-1)
    assert type(layer) is nn.Linear


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
@pytest.mark.parametrize(
    "make",
    [lambda d: nn.Linear(5, 3, dtype=d), lambda d: nn.ConvTranspose1d(4, 6, 3, dtype=d)],
    ids=["Linear", "ConvTranspose1d"],
)
def test_complex_weights_have_complex_directions_and_real_lengths(make, dtype):
    plain = make(dtype)
    wide = {"atol": 1e-5, "rtol": 1e-5}
    lengthy = P.weight_norm(copy.deepcopy(plain))
    torch.testing.assert_close(lengthy.weight, plain.weight)
    g = lengthy.parametrizations.weight.original0
    assert not g.is_complex()
    with torch.no_grad():
        g.mul_(2)
    torch.testing.assert_close(lengthy.weight, 2 * plain.weight)
    spectral = P.spectral_norm(copy.deepcopy(plain))
    for _ in range(100):
        weight = spectral.weight
    matrix = weight.detach().movedim(1, 0) if isinstance(plain, nn.ConvTranspose1d) else weight
    largest = np.linalg.svd(matrix.detach().flatten(1).numpy(), compute_uv=False)[0]
    np.testing.assert_allclose(largest, 1, rtol=1e-5)
    torch.testing.assert_close(P.remove(spectral).weight, weight, **wide)
    with pytest.raises(TypeError, match=r"needs a real weight, got torch.complex\d+"):
        P.weight_standardization(plain)
    assert not parametrize.is_parametrized(plain)


@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm"])
def test_gradients_of_complex_weights(kind):
    layer = KINDS[kind](nn.Linear(3, 2, dtype=torch.complex128)).eval()
    originals = tuple(p.detach() for p in layer.parametrizations.weight.parameters())
    parametrization = layer.parametrizations.weight[0]
    inputs = tuple(p.requires_grad_() for p in originals)
    assert torch.autograd.gradcheck(parametrization, inputs)


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
@pytest.mark.parametrize(
    ("layer", "says"),
    [
        (normkit.BatchNorm(3, affine=False), "running_mean must be a floating-point"),
        (normkit.BatchNorm(3, affine=False).eval(), "running_mean must be a floating-point"),
        (normkit.InstanceNorm1d(3, affine=True), "weight must be a floating-point"),
        (normkit.RMSNorm(4, zero_centered_weight=True), "weight must be a floating-point"),
        (normkit.DyT(3, channels_first=True), "alpha must be a floating-point"),
        (normkit.FilterResponseNorm(3), "must be a floating-point.*complex64"),
        (normkit.GlobalResponseNorm(3), "must be a floating-point.*complex64"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_a_feature_norm_made_complex_is_refused(layer, says):
    with pytest.raises(TypeError, match=says):
        layer.to(torch.complex64)(torch.randn(2, 3, 4))


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.LSTM(4, 5, 2, bidirectional=True),
        lambda: nn.LSTM(4, 5, proj_size=3, bias=False),
        lambda: nn.GRU(4, 5, dropout=0.0),
        lambda: nn.RNN(4, 5),
    ],
    ids=["LSTM, bidirectional", "LSTM, projected", "GRU", "RNN"],
)
def test_recurrent_layers_can_be_copied_and_go_on_learning(make, kind):
    layer = KINDS[kind](KINDS[kind](make(), "weight_hh_l0"), "weight_ih_l0").eval()
    x = torch.randn(3, 2, 4)
    layer(x)[0].sum().backward()
    averaged = torch.optim.swa_utils.AveragedModel(layer).module
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), averaged):
        torch.testing.assert_close(copied(x)[0], layer(x)[0])
        before = layer(x)[0].detach()
        with torch.no_grad():
            for parameter in copied.parameters():
                parameter.add_(torch.randn_like(parameter))
        assert not torch.equal(copied(x)[0], before)
        torch.testing.assert_close(layer(x)[0], before)
        copied(x)[0].sum().backward()
        assert copied.parametrizations.weight_hh_l0[0].training == layer.training
        assert all(p.grad.abs().sum() > 0 for p in copied.parametrizations.parameters())
