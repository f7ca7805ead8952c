import resource
import sys
from contextlib import contextmanager

import pytest
import torch

from normkit import backend


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="where tensors are made: cpu or cuda")


def pytest_configure(config):
    device = config.getoption("--device")
    if device != "cpu":
        torch.set_default_device(device)
        # NumPy reads host memory, and the oracle is NumPy.
        numpy = torch.Tensor.numpy
        torch.Tensor.numpy = lambda self, **options: numpy(self.cpu(), **options)
    elif backend.triton.interpreting():
        backend.triton.DEVICE = "cpu"


def pytest_generate_tests(metafunc):
    if "each_backend" in metafunc.fixturenames:
        on_triton = metafunc.config.getoption("--device") == backend.triton.DEVICE
        names = [n for n in backend.BACKENDS if (n == "triton") == on_triton]
        metafunc.parametrize("each_backend", names, indirect=True)


@pytest.fixture
def each_backend(request, monkeypatch):
    """The test once a backend: that one is preferred, reference takes what it declines.

    Triton's kernels are tested by `--device cuda` or, interpreted, in a process of their own, which
    test_triton starts: Triton asks once whether to interpret.
    """
    module = backend.BACKENDS[request.param]
    if module.available() is not None:
        pytest.skip(f"{request.param}: {module.available()}")
    preferred = {request.param: module, "reference": backend.BACKENDS["reference"]}
    monkeypatch.setattr(backend, "BACKENDS", preferred)
    return request.param


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def compiled_code_is_forgotten():
    """Dynamo counts compilations of a function, whoever asks, and refuses the ninth."""
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture
def full_disk():
    """`with full_disk():` no file of this process can grow beyond some bytes."""

    @contextmanager
    def limited(size=100):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limited
