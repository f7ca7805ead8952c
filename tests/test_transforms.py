"""The seam under every transform of torch: func, compile, export, ONNX, fx, trace."""

import copy

import onnxruntime
import pytest
import torch
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

import normkit
from cases import CASES
from normkit import functional as F
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
