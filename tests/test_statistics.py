"""Running statistics stay right in the training code that people write."""

import copy
import pickle
from functools import partial

import onnxruntime
import pytest
import torch
from torch import nn
from torch.func import grad, stack_module_state, vmap
from torch.utils.checkpoint import checkpoint

import normkit
from normkit import functional as F
from normkit import parametrizations as P
from normkit.runtime import state

VARIANTS = {
    "BatchNorm": lambda: normkit.BatchNorm(3),
    "momentum=None": lambda: normkit.BatchNorm(3, momentum=None),
    "GhostBatchNorm": lambda: normkit.GhostBatchNorm(3, 4),
    "BatchRenorm": lambda: normkit.BatchRenorm(
        3, momentum=0.3, r_max=1.5, d_max=0.5, r_steps=(0, 4), d_steps=(0, 3)
    ),
    "frozen": lambda: normkit.BatchNorm(3).freeze(),
    "accumulating": lambda: normkit.BatchNorm(3).accumulate(2),
    "BatchRenorm, accumulating": lambda: normkit.BatchRenorm(
        3, momentum=0.3, r_steps=(0, 0), d_steps=(0, 0)
    ).accumulate(2),
    "InstanceNorm": lambda: normkit.InstanceNorm1d(3, affine=True, track_running_stats=True),
}


def net(name):
    return nn.Sequential(nn.Conv1d(3, 3, 1), VARIANTS[name](), nn.SiLU(), nn.Conv1d(3, 3, 1))


def batches(number, samples=6):
    return [torch.randn(samples, 3, 4) * (i + 1) + i for i in range(number)]


def assert_same_state(a, b):
    for (name, p), (_, q) in zip(a.named_buffers(), b.named_buffers(), strict=True):
        torch.testing.assert_close(p, q, msg=name)
    for (name, p), (_, q) in zip(a.named_parameters(), b.named_parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("name", VARIANTS)
def test_checkpointing_changes_nothing(name, reentrant, each_backend):
    """Three forwards of one net before their backwards, in training and then in evaluation."""
    plain = net(name)
    checkpointed = copy.deepcopy(plain)
    for training in (True, False):
        plain.train(training)
        checkpointed.train(training)
        inputs = batches(3)
        losses = {plain: [], checkpointed: []}
        for x in inputs:
            z = x.clone().requires_grad_()
            losses[plain].append(plain(z).square().sum())
            y = checkpoint(checkpointed, z, use_reentrant=reentrant)
            losses[checkpointed].append(y.square().sum())
            if not training:  # as DistributedDataParallel does, broadcasting buffers
                for model in (plain, checkpointed):
                    for buffer in model[1].buffers():
                        buffer.add_(1)
        for model, order in ((plain, (0, 1, 2)), (checkpointed, (1, 0, 2))):
            for i in order:
                losses[model][i].backward()
        assert_same_state(plain, checkpointed)


@pytest.mark.parametrize("name", VARIANTS)
def test_checkpointing_part_by_part_changes_nothing(name):
    plain = net(name)
    checkpointed = copy.deepcopy(plain)
    for x in batches(3):
        z = x.requires_grad_()
        plain(z).square().sum().backward()
        torch.utils.checkpoint.checkpoint_sequential(
            checkpointed, 2, z, use_reentrant=False
        ).square().sum().backward()
    assert_same_state(plain, checkpointed)


@pytest.mark.parametrize("name", VARIANTS)
def test_two_forwards_before_a_backward_and_buffers_written_between(name, each_backend):
    both, alone = VARIANTS[name](), VARIANTS[name]()
    x, z = batches(2)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    first = both(a)
    both(z)
    for buffer in both.buffers():
        buffer.mul_(2)  # seen by autograd, as an error where it has saved the buffer
        buffer.data.add_(1)  # and not seen, as communication writes
    first.square().sum().backward()
    alone(b).square().sum().backward()
    torch.testing.assert_close(a.grad, b.grad)


# Gradient accumulation.


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("momentum", [0.3, None])
def test_micro_batches_move_the_statistics_as_their_union(momentum, masked, each_backend):
    layer = normkit.BatchNorm(3, momentum=momentum, dtype=torch.float64).accumulate(3)
    whole = normkit.BatchNorm(3, momentum=momentum, dtype=torch.float64)
    for samples in ([5, 1, 7], [2, 9, 3]):
        parts = [torch.randn(n, 3, 4, dtype=torch.float64) * 3 + n for n in samples]
        masks = [torch.rand(n, 1, 4) < 0.7 if masked else None for n in samples]
        before = copy.deepcopy(layer.state_dict())
        for part, mask in zip(parts, masks, strict=True):
            for name, value in layer.state_dict().items():
                assert torch.equal(value, before[name])
            layer(part, mask=mask)
        whole(torch.cat(parts), mask=torch.cat(masks) if masked else None)
        for name, value in whole.state_dict().items():
            torch.testing.assert_close(layer.state_dict()[name], value)
    assert layer.num_batches_tracked == 2


def test_each_micro_batch_is_still_normalized_by_itself():
    layer, plain = normkit.BatchNorm(3).accumulate(2), normkit.BatchNorm(3)
    for x in batches(3):
        assert torch.equal(layer(x), plain(x))


def test_an_empty_micro_batch_counts_as_one_and_adds_nothing():
    layer, plain = normkit.BatchNorm(3).accumulate(2), normkit.BatchNorm(3)
    (x,) = batches(1)
    layer(torch.zeros(6, 3, 4), mask=torch.zeros(6, 1, 1, dtype=torch.bool))
    layer(x)
    plain(x)
    torch.testing.assert_close(layer.running_var, plain.running_var)


def test_pending_sums_are_forgotten_not_saved():
    layer, plain = normkit.BatchNorm(3).accumulate(2), normkit.BatchNorm(3)
    first, second, third = batches(3)
    assert layer.state_dict().keys() == plain.state_dict().keys()
    assert "micro_batches=2" in repr(layer)
    layer(first)
    layer.load_state_dict(plain.state_dict(), strict=True)
    layer.accumulate(2)
    layer(second)
    torch.optim.swa_utils.update_bn([first, second], layer)  # resets, counts each pair as one
    plain.momentum = None
    plain(torch.cat([first, second]))
    torch.testing.assert_close(layer.running_mean, plain.running_mean)
    copied = pickle.loads(pickle.dumps(layer))
    for model in (layer, copied):
        model(third)
        model(first)
    assert_same_state(layer, copied)
    layer.accumulate(1)
    assert layer.state_dict().keys() == dict(layer.named_buffers()).keys() | {"weight", "bias"}
    assert "micro_batches" not in repr(layer)
    before = layer.num_batches_tracked.clone()
    layer(first)
    assert layer.num_batches_tracked == before + 1


def test_an_accumulating_half_layer_counts_exactly():
    layer = normkit.BatchNorm(3).half().accumulate(3)
    plain = normkit.BatchNorm(3)
    parts = [torch.randn(5000, 3) + 1 for _ in range(3)]
    for part in parts:
        layer(part.half())
    plain(torch.cat(parts))
    torch.testing.assert_close(layer.running_mean.float(), plain.running_mean, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(layer.running_var.float(), plain.running_var, atol=1e-3, rtol=1e-3)


# Freezing.

FREEZABLE = {
    "BatchNorm2d": lambda: normkit.BatchNorm2d(3),
    "BatchNorm": lambda: normkit.BatchNorm(3, act="relu"),
    "GhostBatchNorm": lambda: normkit.GhostBatchNorm(3, 2),
    "BatchRenorm": lambda: normkit.BatchRenorm(3),
}


@pytest.mark.parametrize("name", FREEZABLE)
def test_frozen_layers_stay_frozen(name, each_backend):
    layer = FREEZABLE[name]()
    x = torch.randn(4, 3, 5, 5) * 2 + 1
    layer(x)
    evaluated = copy.deepcopy(layer).eval()
    assert "frozen" not in repr(layer)
    assert layer.freeze() is layer
    assert "frozen=True" in repr(layer)
    before = copy.deepcopy(layer.state_dict())
    for copied in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        copied.train()
        assert torch.equal(copied(x), evaluated(x))
    layer.reset_running_stats()
    torch.optim.swa_utils.update_bn([x], layer)
    for key, value in layer.state_dict().items():
        assert torch.equal(value, before[key])
    y = layer(x).sum()
    y.backward()
    assert layer.weight.grad.abs().sum() > 0
    layer.unfreeze().train()(x)
    assert layer.num_batches_tracked == before["num_batches_tracked"] + 1


def test_freezing_is_in_the_state_dicts_metadata():
    model = nn.Sequential(nn.Linear(3, 3), normkit.BatchNorm1d(3), normkit.BatchNorm1d(3))
    model[1].freeze()
    saved = model.state_dict()
    theirs = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    theirs.load_state_dict(saved, strict=True)
    other = nn.Sequential(nn.Linear(3, 3), normkit.BatchNorm1d(3), normkit.BatchNorm1d(3))
    assert other.load_state_dict(saved, strict=True) == ([], [])
    assert [layer.frozen for layer in other[1:]] == [True, False]
    other.load_state_dict(theirs.state_dict())
    assert other[1].frozen  # what torch saved doesn't thaw
    bare = nn.Sequential(nn.Linear(3, 3), normkit.BatchNorm1d(3), normkit.BatchNorm1d(3))
    bare.load_state_dict(dict(saved))  # as safetensors: the tensors alone
    assert not bare[1].frozen


def test_a_frozen_layer_that_is_given_memory_is_initialized():
    layer = normkit.BatchNorm(3, device="meta").freeze()
    layer.to_empty(device="cpu").reset_parameters()
    assert layer.frozen
    x = torch.randn(4, 3)
    torch.testing.assert_close(layer(x), x, atol=1e-4, rtol=1e-4)


# torch.func.


@pytest.mark.parametrize("name", VARIANTS)
def test_gradients_and_moved_buffers_come_out_of_grad(name, each_backend):
    model = net(name)
    plain = copy.deepcopy(model)
    parameters = {k: v.detach() for k, v in model.named_parameters()}
    buffers = dict(model.named_buffers())

    def loss(parameters, buffers, x):
        y, buffers = normkit.functional_call(model, (parameters, buffers), (x,))
        return y.square().sum(), buffers

    for x in batches(3):
        gradients, buffers = grad(loss, has_aux=True)(parameters, buffers, x)
        plain.zero_grad()
        plain(x).square().sum().backward()
        for key, p in plain.named_parameters():
            torch.testing.assert_close(gradients[key], p.grad, msg=key)
        for key, b in plain.named_buffers():
            torch.testing.assert_close(buffers[key], b, msg=key)
    for key, b in net(name).named_buffers():
        assert torch.equal(dict(model.named_buffers())[key], b)


@pytest.mark.parametrize("name", VARIANTS)
def test_an_ensemble_trains_as_its_members_do(name, each_backend):
    members = [net(name) for _ in range(3)]
    parameters, buffers = stack_module_state(members)
    skeleton = copy.deepcopy(members[0]).to("meta")

    def loss(parameters, buffers, x):
        y, buffers = normkit.functional_call(skeleton, (parameters, buffers), (x,))
        return y.square().sum(), buffers

    detached = {k: v.detach() for k, v in parameters.items()}
    for x in batches(2):
        step = vmap(grad(loss, has_aux=True), in_dims=(0, 0, None))
        gradients, buffers = step(detached, buffers, x)
        for i, member in enumerate(members):
            member.zero_grad()
            member(x).square().sum().backward()
            for key, p in member.named_parameters():
                torch.testing.assert_close(gradients[key][i], p.grad, atol=1e-4, rtol=1e-4)
            for key, b in member.named_buffers():
                torch.testing.assert_close(buffers[key][i], b)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_per_sample_gradients(training, each_backend):
    model = net("BatchNorm").train(training)
    parameters = {k: v.detach() for k, v in model.named_parameters()}
    buffers = dict(model.named_buffers())
    (x,) = batches(1)

    def loss(parameters, sample):
        y, moved = normkit.functional_call(model, (parameters, buffers), (sample[None],))
        return y.square().sum(), moved

    gradients, moved = vmap(grad(loss, has_aux=True), in_dims=(None, 0))(parameters, x)
    for i, sample in enumerate(x):
        alone = copy.deepcopy(model)
        alone(sample[None]).square().sum().backward()
        for key, p in alone.named_parameters():
            torch.testing.assert_close(gradients[key][i], p.grad, atol=1e-4, rtol=1e-4)
        for key, b in alone.named_buffers():
            value = moved[key][i] if training else moved[key].expand(len(x), *b.shape)[i]
            torch.testing.assert_close(value, b)


def test_a_layer_called_twice_reads_what_it_wrote():
    model = normkit.BatchNorm(3)
    plain = copy.deepcopy(model)
    x, z = batches(2)

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = model

        def forward(self, x, z):
            return self.norm(x) + self.norm(z)

    y, buffers = normkit.functional_call(Twice(), {}, (x, z))
    assert torch.equal(y, plain(x) + plain(z))
    for key, b in plain.named_buffers():
        assert torch.equal(buffers[f"norm.{key}"], b)
    assert model.num_batches_tracked == 0


def test_after_an_error_writes_are_in_place_again():
    layer = normkit.BatchNorm(3)
    with pytest.raises(ValueError, match="5 channels"):
        normkit.functional_call(layer, {}, (torch.randn(4, 5),))
    layer(torch.randn(4, 3))
    assert layer.num_batches_tracked == 1
    buffer = torch.zeros(2)
    state.write(buffer, torch.ones(2))
    assert torch.equal(buffer, torch.ones(2))


def test_functional_call_says_that_it_cant_be_traced():
    layer = normkit.BatchNorm(3)
    call = torch.compile(
        lambda x: normkit.functional_call(layer, {}, (x,))[0], backend="eager", fullgraph=True
    )
    with pytest.raises(Exception, match=r"can't be traced by torch\.compile"):
        call(torch.randn(4, 3))


# dtypes.

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("parameters", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("BatchNorm1d", (4,)),
        ("InstanceNorm1d", (4, 1e-5, 0.1, True)),
        ("GroupNorm", (2, 4)),
        ("LayerNorm", (5,)),
        ("RMSNorm", (5,)),
    ],
)
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # torch's own
def test_mixed_dtypes_promote_as_torchs_do(name, args, dtype, parameters):
    """Where torch takes the mix; where it raises, the result has the input's dtype."""
    x = (torch.randn(3, 4, 5) * 2 + 1).to(dtype)
    ours, theirs = (getattr(m, name)(*args, dtype=parameters) for m in (normkit, nn))
    y = ours(x)
    wide = getattr(nn, name)(*args, dtype=torch.float64)(x.double())
    step = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    torch.testing.assert_close(y.double(), wide, atol=4 * step, rtol=2 * step)
    try:
        expected = theirs(x).dtype
    except RuntimeError:
        expected = dtype
    assert y.dtype == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", VARIANTS)
def test_autocast_keeps_statistics_and_gradients_right(name, dtype, each_backend):
    model, wide = net(name), net(name)
    wide.load_state_dict(model.state_dict())
    for x in batches(2):
        with torch.autocast("cpu", dtype):
            y = model(x)
        assert y.dtype == dtype
        expected = wide(x)
        torch.testing.assert_close(y.float(), expected, atol=5e-2, rtol=5e-2)
        y.float().sum().backward()
        expected.sum().backward()
    for p, q in zip(model.buffers(), wide.buffers(), strict=True):
        assert p.dtype == q.dtype
        torch.testing.assert_close(p, q, atol=5e-2, rtol=5e-2)
    for p, q in zip(model.parameters(), wide.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, atol=0.3, rtol=5e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", VARIANTS)
def test_half_models_train(name, dtype, each_backend):
    layer, wide = VARIANTS[name]().to(dtype), VARIANTS[name]()
    for x in batches(2):
        y = layer(x.to(dtype))
        assert y.dtype == dtype
        torch.testing.assert_close(y.float(), wide(x), atol=6e-2, rtol=2e-2)
    for p, q in zip(layer.buffers(), wide.buffers(), strict=True):
        torch.testing.assert_close(p.float(), q.float(), atol=4e-2, rtol=2e-2)


# Compilers and export.


@pytest.mark.parametrize("name", VARIANTS)
def test_compiled_steps_move_the_statistics(name, each_backend):
    torch._dynamo.reset()
    eager = net(name)
    compiled = copy.deepcopy(eager)
    call = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for x in batches(5):
        torch.testing.assert_close(call(x), eager(x), atol=1e-4, rtol=1e-4)
        call(x).square().sum().backward()
        eager(x).square().sum().backward()
    for p, q in zip(compiled.buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(p, q)
    for p, q in zip(compiled.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", ["BatchNorm", "GhostBatchNorm", "frozen", "accumulating"])
def test_a_checkpoint_inside_a_compiled_step_changes_nothing(name):
    torch._dynamo.reset()
    plain = net(name)
    compiled = copy.deepcopy(plain)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def call(x):
        return checkpoint(compiled, x, use_reentrant=False)

    for training in (True, False):
        plain.train(training)
        compiled.train(training)
        for x in batches(2):
            plain(x).square().sum().backward()
            call(x).square().sum().backward()
    for p, q in zip(compiled.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(p, q)
    for p, q in zip(compiled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", VARIANTS)
def test_an_fx_graph_moves_the_statistics(name):
    layer = VARIANTS[name]()
    traced = torch.fx.symbolic_trace(copy.deepcopy(layer))
    for x in batches(3):
        torch.testing.assert_close(traced(x), layer(x))
    buffers = dict(layer.named_buffers())
    for key, value in traced.named_buffers():
        torch.testing.assert_close(value, buffers[key])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_inductor_compiles_an_ensemble_of_the_family():
    torch._dynamo.reset()
    eager = nn.Sequential(*(net(name) for name in ("GhostBatchNorm", "BatchRenorm, accumulating")))
    compiled = copy.deepcopy(eager)
    call = torch.compile(compiled, fullgraph=True)
    for x in batches(4):
        call(x).square().sum().backward()
        eager(x).square().sum().backward()
    for p, q in zip(compiled.buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", VARIANTS)
def test_evaluation_exports_to_onnx(name, tmp_path):
    model = net(name)
    model(batches(1)[0])
    model.eval()
    x = torch.randn(4, 3, 5)
    path = tmp_path / "net.onnx"
    torch.onnx.export(model, (x,), path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path)
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), model(x).detach(), atol=1e-5, rtol=1e-5)


def exports(model, x, tmp_path):
    return {
        "torch.export": lambda: torch.export.export(model, (x,)),
        "onnx": lambda: torch.onnx.export(model, (x,), tmp_path / "n.onnx", verbose=False),
        "trace": lambda: torch.jit.trace(model, x, check_trace=False),
    }


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
    "ignore:Exporting a model while it is in training mode",  # torch's own, without the layer
    "ignore::torch.jit.TracerWarning",
)
@pytest.mark.parametrize("how", ["torch.export", "onnx", "trace"])
def test_exporting_a_model_left_in_training_names_the_layer(how, tmp_path):
    model = nn.Sequential(nn.Conv1d(3, 3, 1), normkit.BatchNorm(3, eps=0.25)).train()
    x = torch.randn(4, 3, 5)
    with pytest.warns(UserWarning, match=r"BatchNorm\(3, eps=0.25.* training mode.*\.eval\(\)"):
        exports(model, x, tmp_path)[how]()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_exporting_a_frozen_layer_in_training_is_silent(tmp_path):
    model = nn.Sequential(nn.Conv1d(3, 3, 1), normkit.BatchNorm(3).freeze()).train()
    x = torch.randn(4, 3, 5)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x))


def test_unknown_shapes_of_statistics_are_errors():
    with pytest.raises(ValueError, match=r"5 channels.*running_mean has shape \(3,\)"):
        F.batch_renorm(
            torch.randn(4, 5),
            torch.zeros(3),
            torch.ones(3),
            num_batches_tracked=torch.tensor(0),
        )


BY_RUNNING = {
    "batch": lambda x, m, v, **k: F.batch_norm(x, m, v, **k),
    "batch, acts and adds": lambda x, m, v, **k: F.batch_norm(x, m, v, residual=x, act="silu", **k),
    "instance": lambda x, m, v, **k: F.instance_norm(x, m, v, use_input_stats=False, **k),
    "renorm": lambda x, m, v, **k: F.batch_renorm(
        x, m, v, num_batches_tracked=x.new_zeros(()), **k
    ),
    "frozen": lambda x, m, v, **k: torch.func.functional_call(
        normkit.FrozenBatchNorm(4).double(), {"running_mean": m, "running_var": v}, (x,), k
    ),
}


@pytest.mark.parametrize("name", BY_RUNNING)
def test_evaluation_is_differentiable_by_its_statistics(name, each_backend):
    x = torch.randn(2, 4, 3, dtype=torch.float64)
    mean, var = torch.randn(4, dtype=torch.float64), torch.rand(4, dtype=torch.float64) + 0.5
    norm = partial(BY_RUNNING[name], mask=torch.rand(2, 4, 3) < 0.8)
    for wrt in ((x, mean, var), (mean, var)):
        for t in wrt:
            t.requires_grad_()

        def of(*given, wrt=wrt):
            return norm(*(x, mean, var)[: 3 - len(wrt)], *given)

        assert torch.autograd.gradcheck(of, wrt, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(of, wrt)
    out = norm(x, mean, var).pow(3).sum()
    want = torch.autograd.grad(out, (mean, var))
    own = [t.detach() for t in (x, mean, var)]
    got = torch.func.grad(lambda m, v: norm(own[0], m, v).pow(3).sum(), argnums=(0, 1))(*own[1:])
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_the_gradient_of_a_running_mean_passes_a_checkpoint(reentrant):
    x = torch.randn(2, 4, 3, requires_grad=True)
    mean, var = torch.zeros(4, requires_grad=True), torch.ones(4)
    checkpoint(F.batch_norm, x, mean, var, use_reentrant=reentrant).square().sum().backward()
    (want,) = torch.autograd.grad(F.batch_norm(x, mean, var).square().sum(), mean)
    torch.testing.assert_close(mean.grad, want)


def test_statistics_that_move_are_not_differentiated():
    x, var = torch.randn(2, 4, 3), torch.ones(4)
    wanted = torch.zeros(4, requires_grad=True)
    count = torch.zeros((), dtype=torch.long)
    message = "running_mean is differentiated, but training moves it"
    with pytest.raises(ValueError, match=message):
        F.batch_norm(x, wanted, var, training=True)
    with pytest.raises(ValueError, match=message):
        F.instance_norm(x, wanted, var)
    with pytest.raises(ValueError, match=message):
        F.batch_renorm(x, wanted, var, training=True, num_batches_tracked=count)
    with pytest.raises(ValueError, match="running_var is differentiated"):
        torch.func.jvp(lambda v: F.batch_norm(x, var, v, training=True), (var,), (var,))
    layer = normkit.BatchNorm(4)
    layer.running_mean.requires_grad_()
    with pytest.raises(ValueError, match=r"BatchNorm\(4.*running_mean is differentiated"):
        layer(x)
    with torch.no_grad():
        layer(x)
    torch.testing.assert_close(layer.running_mean, 0.1 * x.mean((0, 2)))


@pytest.mark.parametrize(
    "make",
    [
        lambda: P.spectral_norm(nn.Linear(3, 3)),
        lambda: P.spectral_norm(nn.Conv1d(3, 3, 1)),
        lambda: normkit.BatchNorm(3),
        lambda: normkit.BatchNorm(3).accumulate(2),
        lambda: normkit.BatchRenorm(3),
        lambda: normkit.InstanceNorm1d(3, track_running_stats=True),
    ],
    ids=["spectral", "spectral conv", "batch", "accumulating", "renorm", "instance"],
)
@pytest.mark.parametrize("transform", ["grad", "vmap"])
def test_a_transform_that_may_not_write_is_told_what_to_call(make, transform):
    layer, x = make(), torch.randn(3, 3, 3)
    before = copy.deepcopy(layer.state_dict())
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(parameters, x):
        return torch.func.functional_call(layer, parameters, (x,)).square().sum()

    if transform == "grad":
        transformed, given = grad(loss), (parameters, x)
    else:
        batched = {name: torch.stack([p, p]) for name, p in parameters.items()}
        transformed, given = vmap(loss), (batched, torch.stack([x, 2 * x]))
    with pytest.raises(RuntimeError, match=r"normkit\.functional_call"):
        transformed(*given)
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name])
    layer.eval()
    vmap(grad(loss), (None, 0))(parameters, torch.stack([x, x]))
