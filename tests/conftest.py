import pytest
import torch

from normkit import backend


def pytest_generate_tests(metafunc):
    if "each_backend" in metafunc.fixturenames:
        names = [n for n in backend.BACKENDS if (n == "triton") == backend.triton.interpreting()]
        metafunc.parametrize("each_backend", names, indirect=True)


@pytest.fixture
def each_backend(request, monkeypatch):
    """The test once a backend: that one is preferred, reference takes what it declines.

    Triton asks once whether to interpret, so its kernels are tested in a process of their own,
    which test_triton starts.
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
