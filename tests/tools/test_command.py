"""The tools as commands: what they print, write and return."""

import json

import pytest
import torch

from normkit.cli.main import main


@pytest.fixture
def setup(tmp_path, monkeypatch):
    """Write a module of the user's; return `name:function` for one of its functions."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    made = []

    def write(body, function="setup"):
        name = f"theirs{len(made)}_{tmp_path.name.replace('-', '_')}"
        made.append(name)
        head = "import torch\nfrom torch import nn\nimport normkit\n"
        (tmp_path / f"{name}.py").write_text(f"{head}def {function}():\n{body}")
        return f"{name}:{function}"

    return write


WITH_DATA = """
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    return {"model": net, "loader": [torch.randn(8, 3) for _ in range(3)]}
"""


def test_recalibrate_prints_the_table_and_writes_the_weights(setup, tmp_path, capsys):
    out = tmp_path / "new.pt"
    assert main(["recalibrate", setup(WITH_DATA), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "batches: 3" in said
    assert torch.load(out)["1.num_batches_tracked"] == 3


def test_json_is_one_object(setup, capsys):
    assert main(["recalibrate", setup(WITH_DATA), "--json", "--only", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"][0]["values"] == 24


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("    return nn.Linear(2, 2)\n", "needs loader too; let"),
        (
            "    return {'model': nn.Linear(2, 2), 'loder': []}\n",
            "'loder'. Did you mean 'loader'?",
        ),
        ("    return {'model': nn.BatchNorm1d(2), 'loader': []}\n", "the loader is empty"),
        ("    return 3\n", "returned a int, neither a torch.nn.Module nor a dictionary"),
        ("    raise OSError('no disk')\n", "    raise OSError('no disk')\nOSError: no disk"),
    ],
)
def test_unusable_input_is_said_and_ends_with_2(setup, body, said, capsys):
    assert main(["recalibrate", setup(body)]) == 2
    assert said in capsys.readouterr().err


def test_a_module_that_fails_to_import_shows_its_own_traceback(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fails_here.py").write_text("def f():\n    return 1 / 0\nf()\n")
    assert main(["recalibrate", "fails_here:setup"]) == 2
    said = capsys.readouterr().err
    assert 'fails_here.py", line 3' in said
    assert "ZeroDivisionError" in said
    assert "normkit/" not in said


def test_a_model_without_norms_says_so_and_ends_with_0(setup, capsys):
    body = "    return {'model': nn.Linear(2, 2), 'loader': [torch.ones(2, 2)]}\n"
    assert main(["recalibrate", setup(body)]) == 0
    assert "no layer keeps running statistics" in capsys.readouterr().out


def test_swap_takes_its_options(setup, capsys):
    net = "nn.Sequential(nn.BatchNorm2d(8))"
    body = f"    return {{'model': {net}, 'example': torch.ones(2, 8, 2, 2)}}\n"
    assert main(["swap", setup(body), "--to", "group", "--groups", "2"]) == 0
    said = capsys.readouterr().out
    assert "GroupNorm(2 groups)" in said
    assert "largest change of the output: " in said
    assert main(["swap", setup(body), "--to", "grouped"]) == 2
    assert "unknown to='grouped'" in capsys.readouterr().err


def test_fold_refuses_by_name(setup, capsys):
    net = "nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).eval()"
    body = f"    return {{'model': {net}, 'example': torch.randn(4, 2)}}\n"
    assert main(["fold", setup(body), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["folded"] == 1
    assert main(["fold", setup(body), "--tolerance", "0"]) == 2
    assert "folding 0 -> 1" in capsys.readouterr().err


HEALTHY = """
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4))
    data = [torch.randn(32, 3) for _ in range(8)]
    normkit.recalibrate(net, data)
    return {"model": net, "loader": data}
"""
BIASED = HEALTHY.replace(", bias=False", "")


def test_inspects_exit_status_tells_findings_from_trouble(setup, capsys):
    assert main(["inspect", setup(HEALTHY)]) == 0
    assert capsys.readouterr().out == "no findings (1 norms, 8 batches)\n"
    assert main(["inspect", setup(BIASED)]) == 1
    assert "'0' (Linear): NK01 redundant-bias: " in capsys.readouterr().out
    assert main(["inspect", setup(BIASED), "--ignore", "NK01", "--batches", "4"]) == 0
    assert main(["inspect", setup(HEALTHY.replace("range(8)", "range(0)"))]) == 2
    assert main(["inspect", setup("    return nn.Linear(2, 2)\n")]) == 2
    assert main(["inspect", setup(BIASED), "--json"]) == 1
    out = capsys.readouterr().out.splitlines()[-1]
    assert json.loads(out)["rows"][0]["code"] == "NK01"


def test_inspect_fixes_and_writes_a_page(setup, tmp_path, capsys):
    body = HEALTHY.replace("    normkit.recalibrate(net, data)\n", "")
    page = tmp_path / "page.html"
    assert main(["inspect", setup(body), "--fix", "--html", str(page)]) == 0
    assert "mended '1' (BatchNorm1d): NK03 never-updated" in capsys.readouterr().out
    assert "<h1>No findings in 1 norms</h1>" in page.read_text()


@pytest.mark.parametrize("command", ["inspect", "recalibrate", "swap"])
@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("    raise ValueError('theirs')\n", "ValueError: theirs"),
        ("    import sys; sys.exit(1)\n", "the code that was run ended the program with 1"),
        (
            "    class Net(nn.Module):\n"
            "        def forward(self, x):\n            return x + 1 / 0\n"
            "    return {'model': nn.Sequential(nn.BatchNorm1d(3), Net())} | DATA\n",
            "ZeroDivisionError",
        ),
    ],
    ids=["the function raises", "it exits with 1", "the model raises"],
)
def test_a_failure_never_ends_with_the_status_of_findings(setup, command, body, said, capsys):
    data = (
        "{'example': torch.ones(2, 3)}" if command == "swap" else "{'loader': [torch.ones(2, 3)]}"
    )
    assert main([command, setup(body.replace("DATA", data))]) == 2
    assert said in capsys.readouterr().err


def test_an_interrupt_ends_with_130(setup, capsys):
    assert main(["inspect", setup("    raise KeyboardInterrupt\n")]) == 130
    assert "stopped" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--out", "--html"])
def test_where_a_result_goes_is_proven_before_the_work(setup, flag, tmp_path, capsys):
    body = f"    open({str(tmp_path / 'ran')!r}, 'w')\n{HEALTHY}"
    (tmp_path / "file").write_text("old")
    (tmp_path / "folder").mkdir()
    for target, said in (
        ("folder", "it is a folder"),
        ("none/file", "there is no folder"),
        ("file/below", "there is no folder"),
        ("x" * 300, "File name too long"),
    ):
        assert main(["inspect", setup(body), flag, str(tmp_path / target)]) == 2
        assert capsys.readouterr().err.count("\n") == 1, said
    same = str(tmp_path / "same")
    assert main(["inspect", setup(body), "--out", same, "--html", same]) == 2
    assert not (tmp_path / "ran").exists()


def test_a_full_disk_leaves_the_old_file_and_is_one_line(setup, tmp_path, capsys, full_disk):
    out, page = tmp_path / "out.pt", tmp_path / "page.html"
    for command, option, target in (("recalibrate", "--out", out), ("inspect", "--html", page)):
        target.write_text("old")
        theirs = setup(HEALTHY)
        with full_disk():
            assert main([command, theirs, option, str(target)]) == 2
        said = capsys.readouterr().err
        assert f"can't write {target}: File too large" in said
        assert said.count("\n") == 1
        assert target.read_text() == "old"
    assert not list(tmp_path.glob(".normkit-*"))
