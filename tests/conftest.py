import pytest
import torch

from normkit import backend


def pytest_generate_tests(metafunc):
    if "each_backend" in metafunc.fixturenames:
        metafunc.parametrize("each_backend", list(backend.BACKENDS), indirect=True)


@pytest.fixture
def each_backend(request, monkeypatch):
    """The test once a backend: that one is preferred, reference takes what it declines."""
    module = backend.BACKENDS[request.param]
    if module.available() is not None:
        pytest.skip(f"{request.param}: {module.available()}")
    preferred = {request.param: module, "reference": backend.BACKENDS["reference"]}
    monkeypatch.setattr(backend, "BACKENDS", preferred)
    return request.param


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
