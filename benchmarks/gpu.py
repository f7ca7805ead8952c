"""Conformance, then ResNet-50, then the table of cases, on one NVIDIA GPU; JSON with its facts.

    make bench-gpu
    python benchmarks/gpu.py --out benchmarks/results/gpu.json --stages table --seconds 540
    python benchmarks/render.py --no-picture

Contestants take turns, as on the CPU; times are medians of CUDA events. A large case finds the L2
cold, a small one is called many times in a row, so that its time is that of its launches where they
are slower than the GPU. What is done is written after each case: a run that is cut short, or that a
failing kernel ends, keeps its rows, and the same command goes on behind them. Failures are kept in
full and stop nothing.
"""

import argparse
import concurrent.futures
import importlib.metadata
import importlib.util
import itertools
import json
import math
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import timeit
import traceback
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._functorch import config as functorch

import normkit
from normkit.backend import triton_plan
from normkit.bench import harness
from normkit.bench.cases import MODES, Case, cases
from normkit.bench.models import resnet50
from normkit.common.files import write

ROOT = Path(__file__).parent.parent
STAGES = ("conformance", "resnet50", "table")
FILES = ("triton", "oracle", "masks", "gradients", "drop_in", "batch_variants", "errors")
"""The tests that are conformance: of these, the ones that run on a backend by name, and errors."""
LARGE = 1 << 28
"""Elements of a large case, at least: half a gigabyte of bfloat16, well past any L2."""
FLUSH = 1 << 28
"""Bytes written before a large case's call."""


# ---- cases


def table(dry: bool) -> list[Case]:
    """The CPU table's cases at GPU sizes and as they are, with the backward alone; what tells most
    first."""
    own = [c for c in cases() if c.mode in MODES]
    own += [replace(c, mode="backward") for c in own if c.mode == "forward+backward"]
    if dry:
        kept = {(60, 100): (6, 10), (64, 512, 7, 7): (2, 64, 3, 3)}
        return [replace(c, shape=kept[c.shape]) for c in own if c.shape in kept]
    order = ("backward", "training", "forward+backward", "evaluation")
    dtypes = (torch.bfloat16, torch.float32)
    own.sort(key=lambda c: (dtypes.index(c.dtype), order.index(c.mode)))
    return [large(c) for c in own] + own


def large(case: Case) -> Case:
    """The case with its first axis so many times longer."""
    times = 1 << max(0, math.ceil(math.log2(LARGE / math.prod(case.shape))))
    return replace(case, shape=(case.shape[0] * times, *case.shape[1:]))


def is_large(case: Case) -> bool:
    return math.prod(case.shape) >= LARGE


def moved(case: Case) -> tuple[int, int]:
    """The bytes of a case, each counted once; and with what batch norm must read a second time.

    A forward reads x and writes y, in training of batch norm it reads x twice (its statistics need
    all of it). A backward reads x and dy and writes dx; a residual or `add` adds its own.
    """
    batch = case.norm.name.startswith("BN")
    fused = 0 if not case.norm.second else 2 if case.norm.name == "add+RMS" else 1
    forward = 2 + fused + (batch and case.mode != "evaluation")
    once = 3 + (0 if not case.norm.second else 1 if case.norm.name == "add+RMS" else 2)
    twice = once + (2 + (case.norm.second and batch) if batch else 0)
    tensors = {
        "backward": (once, twice),
        "forward+backward": (forward + once, forward + twice),
    }.get(case.mode, (forward, forward))
    return tensors[0] * case.bytes, tensors[1] * case.bytes


# ---- contestants


def liger(case: Case) -> tuple[nn.Module, Callable[..., Any]] | None:
    """Liger-Kernel's layer for this case, if it has one."""
    from liger_kernel import transformers

    entries, name = case.shape[-1], case.norm.name
    if name == "LN":
        return transformers.LigerLayerNorm(entries, eps=1e-5), case.norm.torch_call
    if name == "RMS":
        return transformers.LigerRMSNorm(entries, in_place=False), case.norm.torch_call
    if name == "add+RMS":
        made = transformers.LigerFusedAddRMSNorm(entries, in_place=False)
        return made, lambda layer, x, z: layer(x, z)
    if name.startswith("GN") and case.layout == "contiguous":
        from liger_kernel.transformers.group_norm import LigerGroupNorm

        theirs = case.norm.torch_layer(case.shape)
        return LigerGroupNorm(theirs.num_channels, theirs.num_groups, 1e-5), case.norm.torch_call
    return None


def quack(case: Case) -> tuple[nn.Module, Callable[..., Any]] | None:
    """quack's function for this case, if it has one; its layer norm has no autograd."""
    name = case.norm.name
    if name not in ("LN", "RMS", "add+RMS"):
        return None
    from quack.rmsnorm import layernorm_fwd, rmsnorm

    theirs = case.norm.torch_layer(case.shape)
    if name == "RMS":
        return theirs, lambda layer, x: rmsnorm(x, layer.weight, eps=1e-6)
    if name == "add+RMS":
        return theirs, lambda layer, x, z: rmsnorm(
            x, layer.weight, residual=z, eps=1e-6, prenorm=True
        )
    if "backward" in case.mode:
        return None
    return theirs, lambda layer, x: layernorm_fwd(
        x, layer.weight.float(), layer.bias.float(), eps=1e-5
    )


PEERS = {"liger": ("liger_kernel", liger), "quack": ("quack", quack)}


def contestants(
    case: Case, device: str, compiled: bool
) -> tuple[dict[str, harness.Step], dict[str, str]]:
    """A step of each: torch twice, normkit, torch.compile, peers; and why some have none.

    Each has run once, and given what torch gave.
    """
    x, dy, second = harness.tensors(case, device)
    norm = case.norm
    call = norm.torch_call

    def compile() -> harness.Step:
        torch._dynamo.reset()
        made = torch.compile(call, fullgraph=True, dynamic=False)
        return harness.step(case, norm.torch_layer(case.shape), made, x, second, dy)

    def peer(make: Callable[[Case], tuple[nn.Module, Callable[..., Any]] | None]) -> Any:
        made = make(case)
        return None if made is None else harness.step(case, *made, x, second, dy)

    makers: dict[str, Callable[[], harness.Step | None]] = {
        "torch": lambda: harness.step(case, norm.torch_layer(case.shape), call, x, second, dy),
        "normkit": lambda: harness.step(
            case, norm.normkit_layer(case.shape), norm.normkit_call, x, second, dy
        ),
    }
    if compiled:
        makers["compile"] = compile
    for name, (package, make) in PEERS.items():
        if importlib.util.find_spec(package) is not None:
            makers[name] = lambda make=make: peer(make)  # type: ignore[misc]
    found: dict[str, harness.Step] = {}
    failed: dict[str, str] = {}
    wanted: list[Tensor] | None = None
    for name, make_step in makers.items():
        try:
            step = make_step()
            if step is None:
                continue
            got = flat(step())
            if wanted is None:
                wanted = got
            elif (off := apart(got, wanted)) > 0.2:
                failed[name] = f"off from torch's by {off:.3g} of its norm"
            found[name] = step
            if name == "torch":
                found["torch again"] = step
        except Exception as error:
            if fatal(error):
                raise
            failed[name] = last_lines(error, 4000 if name == "normkit" else 800)
    return found, failed


def flat(result: object) -> list[Tensor]:
    return list(result) if isinstance(result, tuple) else [result]  # type: ignore[list-item]


def apart(got: list[Tensor], wanted: list[Tensor]) -> float:
    """The largest ‖a - b‖ / ‖b‖ of all tensors; NaN counts as infinite.

    Not the largest difference of an element: behind a sum that torch rounds to bfloat16 and we do
    not, relu's derivative is another in one element of a few hundred.
    """
    worst = 0.0
    for a, b in zip(got, wanted, strict=True):
        off = float(torch.linalg.vector_norm(a - b, dtype=torch.float32))
        off /= max(1e-6, float(torch.linalg.vector_norm(b, dtype=torch.float32)))
        worst = max(worst, math.inf if math.isnan(off) else off)
    return worst


def fatal(error: BaseException) -> bool:
    """Whether the CUDA context is lost: every later call would fail the same way."""
    return "CUDA error" in str(error) and "out of memory" not in str(error)


def last_lines(error: BaseException, most: int = 4000) -> str:
    return "".join(traceback.format_exception(error))[-most:]


# ---- times


def timer(device: str, cold: bool) -> Callable[[harness.Step, int], float]:
    """Seconds of one of `repeats` calls by CUDA events; a single cold one behind a flushed L2."""
    if device == "cpu":
        return lambda step, _: timeit.timeit(step, number=1)
    flush = torch.empty(FLUSH, dtype=torch.int8, device=device) if cold else None

    def timed(step: harness.Step, repeats: int) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        total = 0.0
        for count in itertools.repeat(1, repeats) if cold else (repeats,):
            if flush is not None:
                flush.zero_()
            begin.record()
            for _ in range(count):
                step()
            end.record()
            end.synchronize()
            total += begin.elapsed_time(end)
        return total / repeats / 1e3

    return timed


def copied(device: str) -> float:
    """The GB/s of a copy, read and write counted."""
    source = torch.randn(1 << 12 if device == "cpu" else 1 << 30, device=device)
    target = torch.empty_like(source)
    times = harness.measure(
        {"copy": lambda: target.copy_(source)}, least=21, most=21, timed=timer(device, True)
    )
    return 2 * source.nbytes / statistics.median(times["copy"]) / 1e9


def row(case: Case, times: dict[str, list[float]], copy: float) -> dict[str, Any]:
    """What is kept of a case: of each contestant its time, rate, share of the copy, and ratio."""
    once, twice = moved(case)
    kept: dict[str, Any] = {
        **harness.described(case),
        "size": "large" if is_large(case) else "small",
        "bytes": once,
        "bytes with second reads": twice,
        "rounds": len(next(iter(times.values()), [])),
    }
    for name, seconds in times.items():
        median = statistics.median(seconds)
        rate = once / median / 1e9
        kept[name] = {
            "ms": significant(median * 1e3),
            "GB/s": significant(rate),
            "of copy": significant(rate / copy),
            "of copy with second reads": significant(rate / copy * twice / once),
        }
        if "torch" in times:
            kept[name]["/torch"] = significant(harness.ratio(times, name, "torch"))
    return kept


def significant(value: float) -> float:
    return float(f"{value:.4g}")


# ---- stages


class Run:
    """What was measured so far, and where it is kept."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.out: Path = options.out
        self.ends = time.monotonic() + options.seconds
        self.device = "cpu" if options.dry else "cuda"
        self.options = options
        self.result: dict[str, Any] = {}
        if self.out.exists():
            self.result = json.loads(self.out.read_text())
        machine = facts(self.device) | ({"plan": options.plan} if options.plan else {})
        if self.result.setdefault("machine", machine) != machine:
            sys.exit(f"bench-gpu: {self.out} was measured on another machine; give another --out")
        self.result.setdefault("copy GB/s", [])
        self.result.setdefault("rows", [])

    def left(self) -> float:
        return self.ends - time.monotonic()

    def save(self) -> None:
        self.out.parent.mkdir(parents=True, exist_ok=True)
        write(self.out, json.dumps(self.result, indent=1) + "\n")


def facts(device: str) -> dict[str, Any]:
    """The facts without which the figures mean nothing."""
    found: dict[str, Any] = {"torch": torch.__version__, "python": sys.version.split()[0]}
    for name in ("triton", "liger_kernel", "quack-kernels"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    if device == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        found |= {"gpu": gpu.name, "capability": f"{gpu.major}.{gpu.minor}"}
        found |= {"multiprocessors": gpu.multi_processor_count, "memory": gpu.total_memory}
        found |= {"L2": getattr(gpu, "L2_cache_size", None), "cuda": torch.version.cuda}
        found["cudnn"] = torch.backends.cudnn.version()
        shown = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
        )
        found["driver"] = shown.stdout.strip().splitlines()[0] if shown.returncode == 0 else None
    return found


def conformance(run: Run) -> None:
    """The tests that every backend passes, on the GPU: how many pass, and failures in full."""
    dry = run.device == "cpu"
    files = [str(ROOT / f"tests/test_{name}.py") for name in (FILES[1:2] if dry else FILES)]
    chosen = "reference and formula and silu" if dry else "triton or errors"
    workers = min(12, os.cpu_count() or 1)
    parallel = ["-n", str(workers)] if not dry and importlib.util.find_spec("xdist") else []
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        # Warnings of another torch are no failures here; the ordinary run makes errors of them.
        command = [sys.executable, "-m", "pytest", *files, "-k", chosen, "--device", run.device]
        command += [*parallel, "-p", "no:cacheprovider", "--junitxml", str(report)]
        command += ["-o", "filterwarnings=default", "-o", "junit_logging=no"]
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                cwd=ROOT,
                timeout=max(60, min(run.left(), run.options.conformance_seconds)),
            )
            ended, output = (
                f"exit code {done.returncode}",
                done.stdout[-4000:] + done.stderr[-4000:],
            )
        except subprocess.TimeoutExpired as error:
            ended, output = f"stopped after {error.timeout:.0f} s", str(error.stdout)[-4000:]
        found = outcomes(report)
    if not found["passed"]:
        found["output"] = output
    found |= {"ended": ended, "seconds": round(time.monotonic() - begun, 1)}
    run.result["conformance"] = found
    run.save()
    counts = {key: value for key, value in found.items() if isinstance(value, (int, float, str))}
    print("conformance:", counts, *(f["test"] for f in found["failures"]), sep="\n  ", flush=True)


def outcomes(report: Path) -> dict[str, Any]:
    """What a JUnit report holds."""
    found: dict[str, Any] = {"passed": 0, "skipped": 0, "failures": []}
    if not report.exists():
        return found
    for test in ElementTree.parse(report).getroot().iter("testcase"):
        wrong = [child for child in test if child.tag in ("failure", "error")]
        if wrong:
            name = f"{test.get('classname')}::{test.get('name')}"
            found["failures"].append({"test": name, "text": wrong[0].text})
        elif test.find("skipped") is not None:
            found["skipped"] += 1
        else:
            found["passed"] += 1
    return found


def training(run: Run) -> None:
    """Images/s and peak memory of a training step of ResNet-50, bfloat16 and channels_last."""
    batch, size, depths = (256, 224, (3, 4, 6, 3))
    if run.device == "cpu":
        batch, size, depths = 2, 32, (1, 1, 1, 1)
    x = torch.randn(batch, 3, size, size, device=run.device)
    x = x.contiguous(memory_format=torch.channels_last)
    torch.backends.cudnn.benchmark = True

    def step(change: Callable[[nn.Module], nn.Module]) -> harness.Step:
        torch.manual_seed(0)
        net = change(resnet50(depths=depths).to(run.device, memory_format=torch.channels_last))
        optimizer = torch.optim.SGD(net.parameters(), 1e-3, momentum=0.9)

        def train() -> None:
            optimizer.zero_grad()
            with torch.autocast(run.device, torch.bfloat16):
                loss = net(x).float().logsumexp(1).mean()
            loss.backward()
            optimizer.step()

        return train

    found, peaks, kept = {}, {}, {}
    for name, change in {
        "torch": lambda net: net,
        "normkit": lambda net: normkit.swap(net).model,
        "normkit fused": lambda net: normkit.swap(net, fuse=True, example=x[:2]).model,
    }.items():
        try:
            found[name] = step(change)
            found[name]()
            if run.device == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
                held = torch.cuda.memory_allocated()
                found[name]()
                torch.cuda.synchronize()
                peaks[name] = torch.cuda.max_memory_allocated() - held
        except Exception as error:
            found.pop(name, None)
            kept[name] = {"failed": last_lines(error)}
            if fatal(error):
                break
    if "torch" in found:
        found["torch again"] = found["torch"]
        times = harness.measure(
            found,
            *(20, 1, 1 if run.device == "cpu" else 21),
            timed=timer(run.device, True),
        )
        for name, seconds in times.items():
            kept[name] = {
                "images/s": significant(batch / statistics.median(seconds)),
                "/torch": significant(harness.ratio(times, name, "torch")),
                "peak bytes of a step": peaks.get(name),
            }
    run.result["resnet50"] = {"batch": batch, "size": size, **kept}
    run.save()
    print("resnet50:", {k: v.get("images/s") for k, v in kept.items()}, flush=True)


def measured(run: Run) -> None:
    """The rows of the table that are not there yet."""
    done = {identity(r) for r in run.result["rows"]}
    wanted = re.compile(run.options.only)
    todo = [c for c in table(run.options.dry) if wanted.search(str(c))]
    todo = [c for c in todo if identity(row(c, {}, 1.0)) not in done]
    if not run.options.no_warm:
        warm(todo[:2] if run.options.dry else todo, run)
    functorch.donated_buffer = False  # a backward alone is repeated
    copy = copied(run.device)
    run.result["copy GB/s"].append(significant(copy))
    for case in todo:
        if run.left() < 5:
            print(f"bench-gpu: out of time before {case}; the same command goes on from here")
            break
        found: dict[str, harness.Step] = {}
        failed: dict[str, str] = {}
        times: dict[str, list[float]] = {}
        lost: BaseException | None = None
        try:
            found, failed = contestants(case, run.device, compiles(case, run.options))
            most = 3 if run.options.dry else 21
            times = harness.measure(found, 0.4, 3, most, timer(run.device, is_large(case)))
        except Exception as error:
            failed["case"] = last_lines(error)
            lost = error if fatal(error) else None
        kept = row(case, times, copy) | ({"failed": failed} if failed else {})
        run.result["rows"].append(kept)
        run.save()
        shares = {name: kept[name].get("/torch") for name in times}
        print(
            f"{case!s:<64} {shares} {'FAILED: ' + ', '.join(failed) if failed else ''}", flush=True
        )
        if lost is not None:
            print("bench-gpu: the CUDA context is lost; going on in a new process", flush=True)
            again = [*sys.argv, "--seconds", str(run.left()), "--stages", "table"]
            os.execv(sys.executable, [sys.executable, *again])
        found.clear()
        if run.device == "cuda":
            torch.cuda.empty_cache()


def identity(row: dict[str, Any]) -> tuple[Any, ...]:
    return (row["norm"], *row["shape"], row["layout"], row["dtype"], row["mode"])


def compiles(case: Case, options: argparse.Namespace) -> bool:
    """Whether torch.compile takes part: seconds of compilation each, so not in every row."""
    match options.compile:
        case "all":
            return True
        case "none":
            return False
        case _:
            return is_large(case) and case.dtype == torch.bfloat16 and case.mode != "evaluation"


def warm(todo: list[Case], run: Run) -> None:
    """Compile what the cases need in parallel processes, into the caches on disk."""
    workers = 1
    if run.device == "cuda" and todo:
        free, _ = torch.cuda.mem_get_info()
        largest = max(c.bytes for c in todo)
        workers = max(1, min(14, (os.cpu_count() or 2) - 1, int(free // (14 * largest))))
    begun = time.monotonic()
    budget = min(run.left() / 3, 240)
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(workers, mp_context=context)
    futures = [pool.submit(warmed, str(c), run.device, run.options) for c in todo]
    done, _ = concurrent.futures.wait(futures, timeout=budget)
    processes = list(pool._processes.values())
    pool.shutdown(wait=False, cancel_futures=True)
    for process in processes:
        process.terminate()
    seconds = time.monotonic() - begun
    wrong = [e for f in done if not f.cancelled() and (e := f.exception()) is not None]
    if wrong:
        run.result["warming failed"] = {"cases": len(wrong), "first": last_lines(wrong[0])}
    print(
        f"warmed {len(done) - len(wrong)} of {len(todo)} cases in {seconds:.0f} s by {workers} "
        "processes",
        flush=True,
    )


def warmed(name: str, device: str, options: argparse.Namespace) -> None:
    """Run every contestant of a case once; what fails is said where it is measured."""
    plan(options.plan)
    case = next(c for c in table(options.dry) if str(c) == name)
    functorch.donated_buffer = False
    contestants(case, device, compiles(case, options))
    if device == "cuda":
        torch.cuda.empty_cache()


def plan(changes: list[str]) -> None:
    """Set numbers of the launch table: NAME=VALUE, or NAME.forward=VALUE."""
    for change in changes:
        name, value = change.split("=")
        name, _, way = name.partition(".")
        if way:
            getattr(triton_plan, name)[way] = int(value)
        else:
            assert isinstance(getattr(triton_plan, name), int), change
            setattr(triton_plan, name, int(value))


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/gpu.json")
    parser.add_argument("--stages", default=",".join(STAGES), help="some of them, by commas")
    parser.add_argument("--only", default="", help="cases whose name this pattern matches")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no case after")
    parser.add_argument("--conformance-seconds", type=float, default=300)
    parser.add_argument("--compile", choices=("none", "some", "all"), default="some")
    parser.add_argument("--plan", nargs="*", default=[], help="such as STAGES.forward=1")
    parser.add_argument("--no-warm", action="store_true", help="compile where it is measured")
    parser.add_argument("--dry", action="store_true", help="tiny sizes on the CPU: a self-check")
    options = parser.parse_args()
    stages = options.stages.split(",")
    if unknown := set(stages) - set(STAGES):
        parser.error(f"unknown stages {sorted(unknown)}; known: {', '.join(STAGES)}")
    if not options.dry and (missing := normkit.backends()["triton"]) is not None:
        sys.exit(f"bench-gpu: the triton backend can't be used: {missing}")
    if options.dry:
        torch.set_num_threads(1)
    plan(options.plan)
    run = Run(options)
    run.save()
    for name, stage in zip(STAGES, (conformance, training, measured), strict=True):
        if name in stages:
            try:
                stage(run)
            except Exception as error:
                run.result.setdefault("stages failed", {})[name] = last_lines(error)
                run.save()
                traceback.print_exc()


if __name__ == "__main__":
    main()
