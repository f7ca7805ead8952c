"""What the package promises as a whole."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import normkit
from normkit import backend


def test_import_needs_torch_alone():
    """In an interpreter where every third-party import but torch's own fails."""
    script = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import normkit\n"
        "new = {m.split('.')[0] for m in set(sys.modules) - before}\n"
        "print(sorted(new - {'normkit', 'torch'} - set(sys.stdlib_module_names)))\n"
    )
    out = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=os.environ
    )
    assert out.stdout.strip() == "[]"


def test_explain_names_the_backend_and_leaves_the_layer_as_it_was():
    layer = normkit.BatchNorm2d(3)
    said = normkit.explain(layer, torch.randn(2, 3, 4, 4))
    assert "runs on: " in said
    assert all(name in said for name in normkit.backends())
    assert layer.num_batches_tracked == 0
    with pytest.raises(TypeError, match="got Linear"):
        normkit.explain(torch.nn.Linear(2, 2), torch.randn(2, 2))


def test_info_lists_versions_and_backends():
    said = normkit.info()
    assert torch.__version__ in said
    assert normkit.__version__ in said
    for name in normkit.backends():
        assert f"backend {name}" in said


def test_the_readmes_python_runs(capsys):
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    code = "\n".join(re.findall(r"```python\n(.*?)```", readme, re.S))
    scope: dict = {}
    exec(code, scope)
    assert scope["y"].shape == (8, 3, 32, 32)
    torch.testing.assert_close(scope["ours"](scope["x"]), scope["theirs"](scope["x"]))
    assert "runs on" in capsys.readouterr().out


def test_the_python_of_the_page_on_statistics_runs():
    page = (Path(__file__).parent.parent / "docs" / "statistics.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.S)
    scope: dict = {}
    exec(code, scope)
    assert scope["buffers"]["1.num_batches_tracked"].tolist() == [1, 1, 1]
    assert scope["model"][1].num_batches_tracked == 0


def test_the_core_uses_the_stable_interface_alone():
    """One binary for every Python from 3.11 and torch from 2.10: no symbol that is either's own."""
    if backend.cpu.available() is not None or not shutil.which("nm"):
        pytest.skip("the core, or nm, isn't there")
    (core,) = Path(normkit.__file__).parent.glob("_cpu*.so")
    assert core.name == "_cpu.abi3.so"
    listed = subprocess.run(
        ["nm", "-D", "--undefined-only", core], capture_output=True, text=True, check=True
    ).stdout
    symbols = [line.split()[-1] for line in listed.splitlines()]
    assert "torch_parallel_for" in symbols
    own = re.compile(r"_Z\w*?(2at|3c10|5torch|5caffe)|_?Py")
    assert [name for name in symbols if own.match(name)] == []
