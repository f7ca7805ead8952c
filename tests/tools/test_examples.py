"""docs/tools.md: its programs run, its tables are those of the committed results."""

import importlib.util
import json
import re
from pathlib import Path

import lightning
import pytest
import torch
import transformers
from torch import nn

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "tools.md").read_text("utf-8")


def program(containing):
    """The one Python block of the page that holds these words, run; what it defines."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    (block,) = [block for block in blocks if containing in block]
    scope = {"__name__": "documented"}
    exec(compile(block, containing, "exec"), scope)
    return scope


def test_the_tables_are_those_of_the_results():
    spec = importlib.util.spec_from_file_location("tools", DOCS / "tools.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    results = json.loads((DOCS / "results" / "tools.json").read_text("utf-8"))
    assert module.written(PAGE, results) == PAGE, "run python docs/tools.py"


def test_the_commands_function_gives_arguments():
    given = program("def setup")["setup"]()
    assert set(given) == {"model", "loader"}


def test_the_plain_loop(capsys):
    scope = program("for x, y in loader")
    assert type(scope["model"][1]) is nn.Identity
    said = capsys.readouterr().out
    assert "'0' (Linear): NK01 redundant-bias" in said
    assert "batches: 12" in said
    assert "folded: 1" in said


@pytest.mark.filterwarnings("ignore")
def test_lightning(tmp_path):
    scope = program("lightning.Callback")
    trainer = lightning.Trainer(
        max_epochs=1,
        callbacks=[scope["Recalibrate"]()],
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
    )
    model = scope["train"](trainer)
    norm = model.net[1]
    x = torch.cat([batch[0] for batch in trainer.train_dataloader])
    torch.testing.assert_close(norm.running_mean, model.net[0](x).mean(0), rtol=1e-4, atol=1e-5)
    assert norm.num_batches_tracked == 12


@pytest.mark.filterwarnings("ignore")
def test_the_trainer_of_transformers(tmp_path):
    scope = program("transformers.TrainerCallback")
    arguments = transformers.TrainingArguments(
        tmp_path,
        num_train_epochs=1,
        per_device_train_batch_size=50,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
    )
    model = scope["train"](arguments)
    assert model.net[1].num_batches_tracked == 12
    report = scope["normkit"].inspect(
        model,
        [{"x": torch.randn(50, 64), "labels": torch.zeros(50, dtype=torch.long)}] * 2,
        forward=lambda model, batch: model(**batch),
        ignore=["NK01"],
    )
    assert report.rows == []
