"""The command: lists, options it doesn't know, what is missing."""

import importlib.util
import os
import re
import subprocess
import sys

import pytest

import normkit
from normkit.cli.main import main


def test_list_names_each_study_with_claim_and_source(capsys):
    pytest.importorskip("scipy")
    assert main(["study", "--list"]) == 0
    out = capsys.readouterr().out
    assert "speed: Batch normalization reaches the same accuracy in fewer steps" in out
    assert "1502.03167" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["study", "speed", "--seed", "3"], "unknown option '--seed'; did you mean --seeds?"),
        (
            ["study", "speed", "--batchsize=3"],
            "unknown option '--batchsize=3'; did you mean --batch",
        ),
        (["studdy"], "unknown 'studdy'; did you mean 'study'?"),
        (["study", "speed", "--steps", "many"], "invalid int value: 'many'"),
    ],
)
def test_an_unknown_word_gets_the_near_match_and_exit_status_2(words, said, capsys):
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_info_says_what_each_backend_can_do(capsys):
    assert main(["info"]) == 0
    assert re.search(r"^backend reference +available$", capsys.readouterr().out, re.M)


def test_without_a_command_help_is_shown(capsys):
    assert main([]) == 2
    assert "study" in capsys.readouterr().out


def test_without_the_extra_the_error_names_it(monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: None if n in ("scipy", "rich") else find(n, *a)
    )
    assert main(["study", "speed"]) == 2
    said = capsys.readouterr().err
    assert "studies need scipy, rich, not installed here" in said
    assert "pip install 'normkit[lab]'" in said


def test_help_and_version_load_no_torch():
    program = (
        "import sys\nfrom normkit.cli.main import main\n"
        "for words in (['--help'], ['--version'], ['info', '--help'], ['study', '--help']):\n"
        "    try:\n        main(words)\n"
        "    except SystemExit as ended:\n        assert not ended.code\n"
        "print('loaded', [m for m in ('torch', 'numpy', 'normkit.lab') if m in sys.modules])"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.stdout.endswith("loaded []\n"), ended.stderr
    assert f"normkit {normkit.__version__}\n" in ended.stdout
    assert "for each backend, whether it can be used" in ended.stdout
    assert "2 wrong input or a failure" in ended.stdout


def test_the_lazy_package_offers_what_it_says():
    assert set(normkit.__all__) <= set(dir(normkit))
    assert all(getattr(normkit, name) is not None for name in normkit.__all__)
    assert normkit.fold is sys.modules["normkit.tools.fold"].fold
    with pytest.raises(AttributeError, match="module 'normkit' has no attribute 'batch_norm'"):
        _ = normkit.batch_norm


def test_an_unknown_instruction_set_is_said_where_backends_are_listed():
    ended = subprocess.run(
        [sys.executable, "-m", "normkit", "info"],
        capture_output=True,
        text=True,
        env=os.environ | {"NORMKIT_CPU": "wrong"},
    )
    assert ended.returncode == 0, ended.stderr
    assert "backend cpu        NORMKIT_CPU=wrong: this processor and build offer" in ended.stdout


@pytest.mark.parametrize(
    "words",
    [
        ["swap", "m:f", "--groups", "0"],
        ["swap", "m:f", "--groups", "-5"],
        ["swap", "m:f", "--groups", str(10**30)],
        ["inspect", "m:f", "--batches", "9" * 20],
        ["inspect", "m:f", "--batches", "1.5"],
        ["fold", "m:f", "--tolerance", "nan"],
        ["recalibrate", "m:f", "--tolerance", "-1"],
        ["bench", "--seconds", "inf"],
    ],
    ids=" ".join,
)
def test_a_number_out_of_range_is_one_line(words, capsys):
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    first, second = capsys.readouterr().err.splitlines()
    assert words[-1] in first
    assert second.endswith("--help.")


def test_output_that_nobody_takes_is_one_line():
    with open("/dev/full", "w") as full:
        ended = subprocess.run(
            [sys.executable, "-m", "normkit", "info"], stdout=full, stderr=-1, text=True
        )
    assert ended.returncode == 2
    assert ended.stderr == (
        "normkit: error: the output can't be written: No space left on device\n"
    )


def test_bench_refuses_before_it_measures(tmp_path, capsys):
    assert main(["bench", "--only", "no such case"]) == 2
    assert "no case's name holds 'no such case'" in capsys.readouterr().err
    assert main(["bench", "--out", str(tmp_path)]) == 2
    assert (
        capsys.readouterr().err
        == f"normkit: error: can't write {tmp_path}: it is a folder; name a file\n"
    )
