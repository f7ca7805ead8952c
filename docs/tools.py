"""Write the tables of docs/tools.md from measured results.

    python docs/tools.py measure              # measure again: docs/results/tools.json, minutes
    python docs/tools.py measure catalogue    # only some of it
    python docs/tools.py                      # write the tables

Times are ratios of medians, the two sides taken in turn in one process on one thread.
"""

import copy
import importlib
import json
import re
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import normkit
from normkit.common.files import write
from normkit.tools.rules import RULES

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "tools.json"
sys.path.insert(0, str(HERE.parent / "tests" / "tools"))


def ratio(first, second, rounds=9):
    """The median time of the second over that of the first."""
    times = [[], []]
    for _ in range(rounds):
        for call, taken in zip((first, second), times, strict=True):
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
    return statistics.median(times[1][2:]) / statistics.median(times[0][2:])


def step_of(model, x):
    """One training step without the optimizer."""

    def step():
        model.zero_grad()
        model(x).square().mean().backward()

    return step


def swaps():
    """swap(model) on timm's models: outputs, gradients, training step."""
    from zoo import NAMES, create, images

    rows = []
    for name in NAMES:
        x = images(8, side=64)
        theirs = create(name, side=64)
        ours = copy.deepcopy(theirs)
        report = normkit.swap(ours, example=x)
        fused = normkit.swap(theirs, fuse=True, example=x, copy=True)
        facts = report.facts
        rows.append(
            {
                "model": name,
                "to": "None",
                "swapped": facts["swapped"],
                "left": facts["left"],
                "change": facts["largest change of the output"] / facts["largest output"],
                "fused": fused.facts["fused"],
                "step": ratio(step_of(theirs.train(), x), step_of(ours.train(), x)),
            }
        )
        for to in ("group", "sync", "none"):
            report = normkit.swap(create(name), to)
            rows.append(
                {
                    "model": name,
                    "to": to,
                    "swapped": report.facts["swapped"],
                    "left": report.facts["left"],
                    "why": sorted({r.note[6:] for r in report.rows if r.note[:4] == "left"}),
                }
            )
    return rows


def folds():
    """fold on timm's models: error, ONNX, speed-up."""
    import onnxruntime
    from zoo import NAMES, create, images

    rows = []
    for name in NAMES:
        x = images(8, side=64)
        model = create(name, side=64)
        folded = copy.deepcopy(model)
        facts = normkit.fold(folded, x).facts
        row = {
            "model": name,
            "folded": facts["folded"],
            "left": facts["left"],
            "error": facts["largest change of the output"] / facts["largest output"],
        }
        with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            torch.onnx.export(folded, (x,), dynamo=True, verbose=False).save(path)
            session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
            (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
            expected = model(x)
            row["onnx"] = float(
                (torch.from_numpy(got) - expected).abs().max() / expected.abs().max()
            )
            row["time"] = ratio(partial(model, x), partial(folded, x)) if facts["folded"] else None
        rows.append(row)
    return rows


def recalibrations():
    """Accuracy on handwritten digits with stale statistics, and after."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    x = (torch.tensor(x, dtype=torch.float32) - 5) / 6
    y = torch.tensor(y)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[:1200], order[1200:]

    def accuracy(model, inputs=x):
        model = copy.deepcopy(model).eval()
        with torch.no_grad():
            return float((model(inputs[test]).argmax(1) == y[test]).float().mean())

    def network(seed, momentum=0.1):
        torch.manual_seed(seed)
        layers = []
        for width in (64, 128, 128):
            norm = nn.BatchNorm1d(128, momentum=momentum)
            layers += [nn.Linear(width, 128), norm, nn.ReLU(), nn.Dropout(0.5)]
        return nn.Sequential(*layers, nn.Linear(128, 10))

    def fit(model):
        optimizer = torch.optim.SGD(model.parameters(), 0.2)
        for _ in range(300):
            batch = train[torch.randint(len(train), (60,))]
            optimizer.zero_grad()
            F.cross_entropy(model.train()(x[batch]), y[batch]).backward()
            optimizer.step()

    def lost(model):
        for norm in model[1::4]:
            norm.reset_running_stats()

    # (what is wrong, momentum, what spoils the model, the inputs of use)
    cases = [
        ("statistics reset", 0.1, lost, x),
        ("averages that lag (momentum 0.001)", 0.001, lambda model: None, x),
        ("inputs prepared differently (2x + 1)", 0.1, lambda model: None, 2 * x + 1),
    ]
    rows = []
    for case, momentum, spoil, inputs in cases:
        got: dict[str, list[float]] = {}
        for seed in range(5):
            model = network(seed, momentum)
            fit(model)
            spoil(model)
            got.setdefault("before", []).append(accuracy(model, inputs))
            loader = list(inputs[train].split(64))
            torchs = copy.deepcopy(model)
            torch.optim.swa_utils.update_bn(loader, torchs)
            got.setdefault("update_bn", []).append(accuracy(torchs, inputs))
            for name, sequential in (("one pass", False), ("sequential", True)):
                ours = normkit.recalibrate(model, loader, sequential=sequential, copy=True).model
                got.setdefault(name, []).append(accuracy(ours, inputs))
        rows.append({"case": case, **{k: statistics.mean(v) for k, v in got.items()}})
    return rows


def exactness():
    """Distance from the population's statistics with uneven batches at mean 1000."""
    torch.manual_seed(0)
    data = [torch.randn(n, 4) * 0.01 + 1000 + 0.01 * i for i, n in enumerate((64, 64, 64, 3))]
    every = torch.cat(data).double()
    rows = []
    for name in ("update_bn", "recalibrate"):
        model = nn.Sequential(nn.BatchNorm1d(4))
        if name == "update_bn":
            torch.optim.swa_utils.update_bn(data, model)
        else:
            normkit.recalibrate(model, data)
        deviation = every.std(0)
        rows.append(
            {
                "by": name,
                "mean": float(((model[0].running_mean - every.mean(0)) / deviation).abs().max()),
                "variance": float((model[0].running_var / every.var(0) - 1).abs().max()),
            }
        )
    return rows


def catalogue():
    """Planted faults: what inspect finds, the costliest first."""
    from digits import NETWORKS
    from planted import CATALOGUE

    rows = []
    for fault in CATALOGUE:
        for name in NETWORKS:
            case = fault.plant(name)
            found = [finding.name for finding in case.inspect().rows]
            rows.append({"fault": fault.name, "rule": fault.rule, "network": name, "found": found})
    return rows


def false_alarms():
    """Findings in healthy models, and notes."""
    from healthy import HEALTHY

    rows = []
    for name, make in HEALTHY.items():
        report = make().inspect()
        found, notes = ([f.name for f in each] for each in (report.rows, report.notes))
        rows.append({"model": name, "norms": report.facts["norms"], "found": found, "notes": notes})
    return rows


def table(columns, rows):
    """A table in Markdown."""
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in rows]
    lines = [columns, ["---"] * len(columns), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def tables(results):
    """Every table of the page, by name."""
    swapped = [
        [
            r["model"],
            r["to"],
            r["swapped"],
            r["left"],
            f"{r['change']:.1g}" if "change" in r else "",
            r.get("fused", ""),
            f"{r['step']:.2f}" if "step" in r else "",
            "; ".join(r.get("why", [])),
        ]
        for r in results["swap"]
    ]
    folded = [
        [
            r["model"],
            r["folded"],
            r["left"],
            f"{r['error']:.1g}",
            f"{r['onnx']:.1g}",
            f"{1 / r['time']:.2f}" if r["time"] else "",
        ]
        for r in results["fold"]
    ]
    sides = ("before", "update_bn", "one pass", "sequential")
    recalibrated = [[r["case"], *(f"{r[s]:.3f}" for s in sides)] for r in results["recalibrate"]]
    exact = [[r["by"], f"{r['mean']:.1g}", f"{r['variance']:.1g}"] for r in results["exactness"]]
    by_fault = {}
    for r in results["catalogue"]:
        verdict = "missed" if r["rule"] not in r["found"] else "found"
        others = [name for name in r["found"] if name != r["rule"]]
        if r["found"][:1] == [r["rule"]]:
            verdict = "first" + (f", then {', '.join(others)}" if others else "")
        by_fault.setdefault((r["fault"], r["rule"]), []).append(verdict)
    alarms = [
        [r["model"], r["norms"], ", ".join(r["found"]) or "none", ", ".join(r["notes"])]
        for r in results["false alarms"]
    ]
    rules = [[r.code, r.name, f"{r.threshold:g}", r.of, r.why] for r in RULES]
    return {
        "swap": table(
            [
                "model",
                "to",
                "swapped",
                "left",
                "largest change / largest output",
                "fused",
                "training step, time / torch's",
                "why left",
            ],
            swapped,
        ),
        "fold": table(
            [
                "model",
                "folded",
                "left",
                "largest error / largest output",
                "in onnxruntime",
                "speed-up of inference",
            ],
            folded,
        ),
        "recalibrate": table(
            [
                "test accuracy, mean of 5 seeds",
                "stale",
                "after update_bn",
                "after recalibrate",
                "sequential",
            ],
            recalibrated,
        )
        + "\n\nUneven batches (64, 64, 64, 3) at mean 1000 and standard deviation 0.01, against "
        "all values in float64:\n\n"
        + table(["", "error of the mean / standard deviation", "error of the variance"], exact),
        "rules": table(["code", "rule", "threshold", "of", "why it matters"], rules),
        "catalogue": table(
            ["fault", "rule", "in the convnet", "in the MLP"],
            [[*fault, *verdicts] for fault, verdicts in by_fault.items()],
        ),
        "false alarms": table(["healthy model", "norms", "false alarms", "notes"], alarms),
    }


def written(text, results):
    """The page with its tables."""
    for name, lines in tables(results).items():
        mark = f"<!-- table: {name} -->"
        text = re.sub(
            f"{mark}\n(\n(?!#).*?(?=<!-- end -->)<!-- end -->\n)?",
            lambda _, lines=lines, mark=mark: f"{mark}\n\n{lines}\n\n<!-- end -->\n",
            text,
            flags=re.S,
        )
    return text


def main():
    """Measure, or write."""
    if sys.argv[1:2] == ["measure"]:
        importlib.import_module("torchvision_on_cpu")
        torch.set_num_threads(1)
        parts = {
            "swap": swaps,
            "fold": folds,
            "recalibrate": recalibrations,
            "exactness": exactness,
            "catalogue": catalogue,
            "false alarms": false_alarms,
        }
        results = json.loads(RESULTS.read_text("utf-8")) | {"torch": torch.__version__}
        results |= {name: parts[name]() for name in sys.argv[2:] or parts}
        write(RESULTS, json.dumps(results, indent=1) + "\n")
    page = HERE / "tools.md"
    results = json.loads(RESULTS.read_text("utf-8"))
    write(page, written(page.read_text("utf-8"), results))


if __name__ == "__main__":
    main()
