"""The command: lists, options it doesn't know, what is missing."""

import re
import subprocess
import sys

import pytest

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


def test_without_the_extra_the_error_names_it():
    program = (
        "import sys, importlib.util as u\n"
        "find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name in ('scipy', 'rich') else find(name, *a)\n"
        "from normkit.cli.main import main\n"
        "sys.exit(main(['study', 'speed']))\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.returncode == 1
    assert "studies need scipy, rich, not installed here" in ended.stderr
    assert "pip install 'normkit[lab]'" in ended.stderr


def test_the_command_line_imports_nothing_of_the_lab():
    program = "import sys, normkit.cli.main; print([m for m in sys.modules if 'normkit.lab' in m])"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.stdout.strip() == "[]"
