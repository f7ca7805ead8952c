"""The seam under every transform of torch: func, compile, export, ONNX, fx, trace."""

import copy

import onnxruntime
import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import normkit
from cases import CASES
from normkit import functional as F
from normkit.parametrizations import spectral_norm, weight_norm, weight_standardization
from test_drop_in import pair

CHOSEN = [CASES[i] for i in (0, 2, 6, 9, 11, 14, 17)]


@pytest.mark.parametrize("case", CHOSEN, ids=str)
def test_func_transforms_agree_with_torchs_layers(case, each_backend):
    ours, theirs = (layer.double() for layer in pair(case))
    # torch forbids a transform to move a captured buffer; evaluation moves none.
    ours.eval()
    theirs.eval()
    parameters = dict(ours.named_parameters())
    x, v = torch.randn(2, *case.shape, dtype=torch.float64)

    def loss(layer):
        return lambda x, p: functional_call(layer, p, (x,)).pow(3).sum()

    for got, want in zip(
        grad(loss(ours), argnums=(0, 1))(x, parameters)[1].values(),
        grad(loss(theirs), argnums=(0, 1))(x, parameters)[1].values(),
        strict=True,
    ):
        torch.testing.assert_close(got, want)
    got, want = (jvp(lambda x, f=f: f(x), (x,), (v,))[1] for f in (ours, theirs))
    torch.testing.assert_close(got, want)


def test_higher_derivatives_of_batch_statistics(each_backend):
    def f(norm):
        return lambda x: norm(x).pow(3).sum()

    x = torch.randn(3, 4, dtype=torch.float64)

    def ours(x):
        return F.batch_norm(x, training=True, act="silu")

    def plain(x):
        return torch.nn.functional.silu((x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt())

    torch.testing.assert_close(jacrev(ours)(x), jacrev(plain)(x))
    torch.testing.assert_close(jacfwd(ours)(x), jacfwd(plain)(x))
    torch.testing.assert_close(hessian(f(ours))(x), hessian(f(plain))(x))
    torch.testing.assert_close(jacrev(jacfwd(f(ours)))(x), hessian(f(plain))(x))
    many = torch.randn(5, 3, 4, dtype=torch.float64)
    torch.testing.assert_close(vmap(ours)(many), vmap(plain)(many))
    torch.testing.assert_close(vmap(grad(f(ours)))(many), vmap(grad(f(plain)))(many))
    torch.testing.assert_close(
        grad(lambda m: vmap(ours)(m).pow(3).sum())(many), vmap(grad(f(plain)))(many)
    )


def test_forward_over_forward_is_right_where_a_function_would_lose_the_outer_tangent():
    x, v = torch.randn(2, 5, dtype=torch.float64)
    layer, h = normkit.LayerNorm(5, dtype=torch.float64), 1e-4
    second = jvp(lambda z: jvp(layer, (z,), (v,))[1], (x,), (v,))[1]
    differences = (layer(x + h * v) - 2 * layer(x) + layer(x - h * v)) / h**2
    torch.testing.assert_close(second, differences, atol=1e-5, rtol=1e-5)


def test_compiling_holds_for_several_eps_and_dynamic_shapes():
    torch._dynamo.reset()
    for eps in (1e-5, 1e-3, 1e-2):
        layer, x = normkit.GroupNorm(2, 4, eps=eps), torch.randn(2, 4, 3)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), layer(x))
    layer = normkit.BatchNorm2d(4)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (2, 5, 7):
        x = torch.randn(n, 4, n, 3)
        torch.testing.assert_close(compiled(x), normkit.BatchNorm2d(4)(x))
    assert layer.num_batches_tracked == 3


@pytest.mark.parametrize("case", CHOSEN, ids=str)
def test_compiled_whole_equals_eager_in_training(case, each_backend):
    eager, _ = pair(case)
    compiled = copy.deepcopy(eager)
    call = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        x = torch.randn(case.shape)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        ya, yb = call(a), eager(b)
        torch.testing.assert_close(ya, yb)
        ya.square().sum().backward()
        yb.square().sum().backward()
        torch.testing.assert_close(a.grad, b.grad, atol=1e-4, rtol=1e-4)
    for p, q in zip(compiled.buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_inductor_compiles_a_training_step():
    eager = normkit.BatchNorm(4, act="relu")
    compiled = copy.deepcopy(eager)
    call = torch.compile(compiled, fullgraph=True)
    for _ in range(2):
        x, r = torch.randn(2, 8, 4, 3)
        torch.testing.assert_close(call(x, residual=r), eager(x, residual=r))
        call(x, residual=r).sum().backward()
        eager(x, residual=r)
    torch.testing.assert_close(compiled.running_var, eager.running_var)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("case", CHOSEN, ids=str)
def test_export_emits_one_aten_operator_a_norm(case):
    ours, _ = pair(case)
    ours.eval()
    x = torch.randn(case.shape)
    program = torch.export.export(ours, (x,))
    torch.testing.assert_close(program.module()(x), ours(x), atol=1e-5, rtol=1e-5)
    targets = [n.target for n in program.graph.nodes if n.op == "call_function"]
    assert {t.namespace for t in targets} == {"aten"}
    assert sum("norm" in t.name() for t in targets) == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["BatchNorm2d", "InstanceNorm2d"])
def test_a_layer_exported_in_training_goes_on_tracking(name):
    layer = getattr(normkit, name)(3, track_running_stats=True)
    x = torch.randn(4, 3, 5, 5) + 1
    with pytest.warns(UserWarning, match=rf"{name}\(3, .* is exported in training mode.*eval"):
        module = torch.export.export(layer, (x,)).module()
    y = module(x)
    torch.testing.assert_close(y, layer(x))
    torch.testing.assert_close(module.running_mean, layer.running_mean)
    assert layer.running_mean.abs().min() > 0


def test_an_fx_graph_keeps_the_checks():
    traced = torch.fx.symbolic_trace(normkit.BatchNorm2d(4))
    with pytest.raises(ValueError, match=r"expected 4D input \(got 2D input\) of shape \(2, 4\)"):
        traced(torch.randn(2, 4))
    with pytest.raises(ValueError, match="expected 4 channels, got 7"):
        torch.fx.symbolic_trace(normkit.InstanceNorm2d(4))(torch.randn(2, 7, 3, 3))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("case", CHOSEN, ids=str)
def test_onnx_runs_the_same(case, tmp_path):
    ours, _ = pair(case)
    ours.eval()
    x = torch.randn(case.shape)
    path = tmp_path / "layer.onnx"
    torch.onnx.export(ours, (x,), path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path)
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), ours(x).detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_fx_traces_each_norm_to_one_call_and_moves_no_state(case, training):
    ours, _ = pair(case)
    ours.train(training)
    before = copy.deepcopy(ours)
    traced = torch.fx.symbolic_trace(ours)
    for p, q in zip(ours.buffers(), before.buffers(), strict=True):
        assert torch.equal(p, q)
    assert (
        sum(hasattr(F, str(n.target.__name__)) for n in traced.graph.nodes if callable(n.target))
        == 1
    )
    x = torch.randn(case.shape)
    torch.testing.assert_close(traced(x), before(x))
    buffers = dict(before.named_buffers())
    for name, buffer in traced.named_buffers():
        torch.testing.assert_close(buffer, buffers[name])


@pytest.mark.filterwarnings("ignore")  # torch deprecates TorchScript
def test_torchscript_traces_and_refuses_to_script():
    layer = normkit.BatchNorm2d(3).eval()
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(torch.jit.trace(layer, x)(x), layer(x))
    with pytest.raises(RuntimeError, match=r"BatchNorm2d.*TorchScript is not supported; use torch"):
        torch.jit.script(torch.nn.Sequential(layer))


@pytest.mark.parametrize("name", ["weight", "bias", "residual"])
def test_vmap_over_what_the_statistics_do_not_depend_on(name):
    x, layer = torch.randn(5, 4, 3), normkit.BatchNorm(4)
    alone = copy.deepcopy(layer)
    values = torch.randn(2, *(x.shape if name == "residual" else (4,)))
    y = vmap(lambda value: layer(x, **{name: value}))(values)
    torch.testing.assert_close(y, torch.stack([alone(x, **{name: v}) for v in values]))
    alone.reset_running_stats()
    alone(x)
    for p, q in zip(layer.buffers(), alone.buffers(), strict=True):
        torch.testing.assert_close(p, q)


def test_vmap_over_the_weight_of_a_batch_renorm():
    x, weights = torch.randn(5, 4, 3), torch.randn(2, 4)
    layer = normkit.BatchRenorm(4)
    y = vmap(lambda weight: layer(x, weight=weight))(weights)
    want = torch.stack([normkit.BatchRenorm(4)(x, weight=weight) for weight in weights])
    torch.testing.assert_close(y, want)
    assert layer.num_batches_tracked == 1


LAYERS = {
    "batch, evaluated": lambda: normkit.BatchNorm(4, act="silu").eval(),
    "batch, untracked": lambda: normkit.BatchNorm(4, track_running_stats=False),
    "frozen": lambda: normkit.FrozenBatchNorm(4),
    "instance": lambda: normkit.InstanceNorm1d(4, affine=True),
    "group": lambda: normkit.GroupNorm(2, 4, act="silu"),
    "layer": lambda: normkit.LayerNorm(3),
    "layer over channels": lambda: normkit.LayerNorm(4, channels_first=True),
    "rms": lambda: normkit.RMSNorm(3, zero_centered_weight=True),
    "dyt": lambda: normkit.DyT(3),
    "filter response": lambda: normkit.FilterResponseNorm(4),
    "global response": lambda: normkit.GlobalResponseNorm(4),
    "standardize": lambda: normkit.Standardize(4).fit(torch.randn(9, 4)),
    "weight norm": lambda: weight_norm(nn.Linear(3, 2)),
    "spectral norm": lambda: spectral_norm(nn.Linear(3, 2)).eval(),
    "weight standardization": lambda: weight_standardization(nn.Linear(3, 2)),
}


@pytest.fixture(params=LAYERS)
def layer(request):
    return LAYERS[request.param]().double()


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node")  # torch's linearize
def test_every_transform_of_torch_func(layer):
    x, v = torch.randn(2, 4, 4, 3, dtype=torch.float64)
    y = layer(x)
    by_x = torch.autograd.functional.jacobian(layer, x)
    along_v = (by_x * v).flatten(y.dim()).sum(-1)
    torch.testing.assert_close(jacrev(layer, chunk_size=5)(x), by_x)
    torch.testing.assert_close(jacfwd(layer, randomness="same")(x), by_x)
    back = torch.func.vjp(layer, x)[1]
    torch.testing.assert_close(back(y)[0], (by_x * y[(..., *(None,) * 3)]).sum((0, 1, 2)))
    torch.testing.assert_close(jvp(layer, (x,), (v,))[1], along_v)
    linear = torch.func.linearize(layer, x)[1]
    torch.testing.assert_close(vmap(linear)(torch.stack([v, -v])), torch.stack([along_v, -along_v]))
    many = vmap(layer, in_dims=2, out_dims=1, chunk_size=1)(torch.stack([x, v], 2))
    torch.testing.assert_close(many, torch.stack([y, layer(v)], 1))


def test_functionalized(layer):
    x, dy = torch.randn(4, 4, 3, dtype=torch.float64), torch.randn(())

    def loss(layer):
        return lambda x: layer(x).pow(3).sum() * dy

    for remove in ("mutations", "mutations_and_views"):
        functional = torch.func.functionalize(layer, remove=remove)
        torch.testing.assert_close(functional(x), layer(x))
        torch.testing.assert_close(make_fx(functional)(x)(x), layer(x))
        torch.testing.assert_close(grad(loss(functional))(x), grad(loss(layer))(x))
    inner = torch.func.functionalize(grad(loss(layer)))
    torch.testing.assert_close(inner(x), grad(loss(layer))(x))


def test_tensors_that_torch_knows_to_be_zero_or_negative(layer):
    x = torch.randn(4, 4, 3, dtype=torch.float64)
    zero = torch._efficientzerotensor(x.shape, dtype=torch.float64)
    negative = torch._neg_view(x)
    # The derivative of torch's vector_norm takes nothing that is known to be zero.
    first = 1 if isinstance(layer, normkit.GlobalResponseNorm) else 0
    for lazy, plain in ((zero, torch.zeros_like(x)), (negative, -x))[first:]:
        with torch.no_grad():
            torch.testing.assert_close(layer(lazy), layer(plain))
        a, b = lazy.detach().requires_grad_(), plain.requires_grad_()
        y, y_plain = layer(a), layer(b)
        torch.testing.assert_close(y, y_plain)
        dys = torch._efficientzerotensor(y.shape, dtype=y.dtype), torch._neg_view(y.detach())
        for dy in dys[first:]:
            (got,) = torch.autograd.grad(y, a, dy, retain_graph=True)
            (want,) = torch.autograd.grad(y_plain, b, dy.clone(), retain_graph=True)
            torch.testing.assert_close(got.clone(), want.clone())
        with forward_ad.dual_level():
            tangent = forward_ad.unpack_dual(layer(forward_ad.make_dual(plain, zero))).tangent
            assert tangent is None or not tangent.any()


def test_a_sum_whose_own_gradient_is_zero_or_none():
    x, add = torch.randn(2, 4, 3, requires_grad=True)
    y, total = F.rms_norm(x, 3, add=add)
    zero = torch._efficientzerotensor(total.shape)
    (want,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    (got,) = torch.autograd.grad((y, total), x, (torch.ones_like(y), zero), retain_graph=True)
    torch.testing.assert_close(got, want)
    (alone,) = torch.autograd.grad(total.sum(), x)
    torch.testing.assert_close(alone, torch.ones_like(x))
