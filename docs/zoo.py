"""Try swap and fold on models of timm and transformers: `python docs/zoo.py run`, or `make zoo`.

    python docs/zoo.py run          # models that docs/results/zoo.json lacks; an hour on two cores
    python docs/zoo.py              # write docs/zoo.md from it

Models have random weights and are built from their code alone. What is a norm is counted without
normkit: a leaf whose class is called a norm, or whose forward calls one or divides by a root of a
mean square. What the tools found or listed as unknown is held against that.
"""

import contextlib
import copy
import inspect
import json
import re
import signal
import sys
import time
from itertools import chain, zip_longest
from pathlib import Path

import torch
from torch.utils._pytree import tree_leaves, tree_map

HERE = Path(__file__).parent
RESULTS, PAGE = HERE / "results" / "zoo.json", HERE / "zoo.md"
sys.path.insert(0, str(HERE.parent / "tests" / "tools"))

import torchvision_on_cpu  # noqa: E402, F401

import normkit  # noqa: E402

SECONDS, PARAMETERS = 60, 30_000_000
"""Of one model, at most."""

NAMED = re.compile(r"norm|BN$|BN\d|GRN$", re.IGNORECASE)
COMPUTES = re.compile(r"(batch|layer|group|instance|rms)_norm\(|rsqrt\(|\.var\(|var_mean\(")

SMALL = "test_ atto femto pico nano zepto tiny xxs xs mini small 050 035 0_5 18 002 _s_ _s b0 a0 d0"

TEXT = {"input_ids": torch.arange(1, 9)[None]}
SIZES = {
    "hidden_size": 32,
    "d_model": 32,
    "n_embd": 32,
    "dim": 32,
    "embed_dim": 32,
    "hidden_dim": 32,
    "embedding_size": 32,
    "intermediate_size": 48,
    "ffn_dim": 48,
    "d_ff": 48,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "n_layer": 2,
    "n_layers": 2,
    "num_layers": 2,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "num_decoder_layers": 2,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "d_kv": 8,
    "vocab_size": 60,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "max_position_embeddings": 64,
    "n_positions": 64,
    "image_size": 32,
    "patch_size": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def counted(model):
    """The names of a model's norms by class names and by source, not by normkit."""
    found = set()
    for name, module in model.named_modules():
        own = [*module._parameters.values(), *module._buffers.values()]
        own = [t for t in own if t is not None and t.dim()]
        inside = [c for c in module.modules() if c is not module]
        deep = any(p is not None for c in inside for p in c._parameters.values())
        if deep or type(module).__module__.startswith(("torch.nn.utils", "normkit")):
            continue
        if any(t.numel() != max(t.shape, default=0) for t in own):
            continue
        if (NAMED.search(type(module).__name__) and (own or not any(module.children()))) or (
            own and COMPUTES.search(source_of(type(module)))
        ):
            found.add(name)
    return found


def source_of(layer):
    try:
        return inspect.getsource(layer.forward)
    except (OSError, TypeError):
        return ""


def shaken(model):
    """Parameters of norms away from where they start, which hides what they do."""
    generator = torch.Generator().manual_seed(0)
    names = counted(model)
    with torch.no_grad():
        for name, module in model.named_modules():
            if name in names:
                for tensor in (*module.parameters(), *module.buffers()):
                    if tensor.is_floating_point():
                        tensor.add_(torch.rand(tensor.shape, generator=generator) * 0.2)
    return model


def tensors(output):
    return [t for t in tree_leaves(output) if isinstance(t, torch.Tensor) and t.is_floating_point()]


def tried(model, x, run):
    """One model's row: how many norms, what became of them, what changed."""
    model = shaken(model).eval()
    names = counted(model)
    row = {"norms": len(names)}
    with torch.no_grad():
        torch.manual_seed(0)
        before = None if x is None else tensors(run(model, x))
    new = copy.deepcopy(model)
    start = time.perf_counter()
    report = normkit.swap(new)
    row["seconds"] = round(time.perf_counter() - start, 2)
    listed = {each.layer for each in report.rows}
    missing = names - listed
    row |= {"swapped": report.facts["swapped"], "left": report.facts["left"]}
    row["unknown"] = report.facts.get("unknown norms", 0)
    row["missing"] = sorted(f"{n} ({type(model.get_submodule(n)).__name__})" for n in missing)
    reasons = {each.note for each in report.rows if each.note.startswith("left")}
    row["reasons"] = sorted(reason.removeprefix("left: ") for reason in reasons)
    row["keys"] = set(model.state_dict()) <= set(new.state_dict())
    if before:
        with torch.no_grad():
            torch.manual_seed(0)
            after = tensors(run(new, x))
        row["change"] = change(before, after)
        row["strides"] = list(map(strides, before)) == list(map(strides, after))
        row["dtypes"] = [y.dtype for y in before] == [z.dtype for z in after]
        del new
        wide = tree_map(lambda t: t.double() if t.is_floating_point() else t, x)
        folded = normkit.fold(model.double(), wide, run, tolerance=1e-6).facts
        row |= {"folded": folded["folded"], "not folded": folded["left"]}
        row["fold's change"] = folded["largest change of the output"] / (
            folded["largest output"] or 1.0
        )
    return row


def strides(y):
    """Of axes that have more than one place: those of others mean nothing."""
    return [step for step, size in zip(y.stride(), y.shape, strict=True) if size > 1]


def change(before, after):
    """The largest change over the largest output."""
    most = max(float(y.abs().max()) for y in before) or 1.0
    pairs = zip(before, after, strict=True)
    return max(float((y.double() - z.double()).abs().max()) for y, z in pairs) / most


@contextlib.contextmanager
def limited(seconds):
    def stop(*_):
        raise TimeoutError(f"more than {seconds} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def of_timm():
    """One small model of every family: of every first word of timm's names."""
    import timm

    families = {}
    for name in timm.list_models():
        family = re.match(r"[a-z]+[a-z\d]*", name.removeprefix("test_")).group()
        family = re.sub(r"\d+[a-z]*$", "", family) or family
        families.setdefault(family, []).append(name)
    for family, names in sorted(families.items()):
        rank = [next((i for i, w in enumerate(SMALL.split()) if w in n), 99) for n in names]
        _, _, name = min(zip(rank, map(len, names), names, strict=True))
        yield f"timm/{family}", lambda name=name: timm_model(name)


def timm_model(name):
    import timm

    with torch.device("meta"):
        size = sum(p.numel() for p in timm.create_model(name).parameters())
    if size > PARAMETERS:
        raise MemoryError(f"{name} has {size:,} parameters")
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    channels, *default = model.pretrained_cfg["input_size"]
    error = None
    for side in (64, 96, 128, 224, default[-1]):
        x = torch.randn(2, channels, side, side)
        try:
            with torch.no_grad():
                copy.deepcopy(model)(x)
        except Exception as caught:
            error = caught
            continue
        return name, model, x, lambda m, x: m(x)
    raise error


def of_transformers():
    """Every architecture of transformers that a small configuration makes."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    for kind in sorted(CONFIG_MAPPING_NAMES):
        yield f"transformers/{kind}", lambda kind=kind: transformers_model(kind)


def shrink(config):
    for key, value in SIZES.items():
        if isinstance(getattr(config, key, None), int):
            with contextlib.suppress(Exception):
                setattr(config, key, value)
    with contextlib.suppress(Exception):
        if isinstance(getattr(config, "layer_types", None), list):
            config.layer_types = config.layer_types[: config.num_hidden_layers]
    for value in list(vars(config).values()):
        if hasattr(value, "model_type"):
            shrink(value)
    return config


def transformers_model(kind):
    import transformers

    transformers.logging.set_verbosity_error()
    config = shrink(transformers.AutoConfig.for_model(kind))
    with torch.device("meta"):
        size = sum(p.numel() for p in transformers.AutoModel.from_config(config).parameters())
    if size > PARAMETERS:
        raise MemoryError(f"{size:,} parameters")
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(config).eval()
    pixels = {"pixel_values": torch.randn(1, 3, 32, 32)}
    for given in (TEXT, TEXT | {"decoder_input_ids": TEXT["input_ids"]}, pixels, TEXT | pixels):

        def run(m, given):
            return m(**given, return_dict=True).to_tuple()

        try:
            with torch.no_grad():
                run(copy.deepcopy(model), given)
        except Exception:
            continue
        return kind, model, given, run
    return kind, model, None, None


def run():
    rows = json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else {}
    turns = zip_longest(of_timm(), of_transformers())
    for title, make in filter(None, chain.from_iterable(turns)):
        if title in rows:
            continue
        try:
            with limited(SECONDS):
                name, model, x, forward = make()
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            rows[title] = {"not built": f"{type(error).__name__}: {error}".split("\n")[0][:150]}
        else:
            try:
                with limited(SECONDS):
                    rows[title] = {"model": name} | tried(model, x, forward)
            except TimeoutError as error:
                rows[title] = {"model": name, "not finished": str(error)}
            except Exception as error:
                said = f"{type(error).__name__}: {error}".split("\n")[0][:300]
                rows[title] = {"model": name, "raised": said}
        print(title, {k: v for k, v in rows[title].items() if k != "reasons"}, flush=True)
        RESULTS.write_text(json.dumps(rows, indent=1) + "\n", "utf-8")


HEAD = ("package", "tried", "norms", "found or listed", "swapped", "left", "unknown")
HEAD += ("largest change", "same strides", "folded", "fold's largest change", "raised")


def write():
    """The page, from the results."""
    rows = json.loads(RESULTS.read_text("utf-8"))
    lines = [HEAD, ["---"] * len(HEAD)]
    for package in ("timm", "transformers"):
        own = {name: row for name, row in rows.items() if name.startswith(package)}
        done = [row for row in own.values() if "norms" in row]
        ran = [row for row in done if "change" in row]
        norms = sum(row["norms"] for row in done)
        found = norms - sum(len(row["missing"]) for row in done)
        lines.append(
            [
                package,
                f"{len(done)} ({len(ran)} run)",
                f"{norms:,}",
                f"{found / max(norms, 1):.2%}",
                *(f"{sum(row[key] for row in done):,}" for key in ("swapped", "left", "unknown")),
                f"{max((row['change'] for row in ran), default=0):.1g}",
                f"{sum(row['strides'] for row in ran)} of {len(ran)}",
                f"{sum(row['folded'] for row in ran):,}",
                f"{max((row[FOLD] for row in ran), default=0):.1g}",
                str(sum("raised" in row for row in own.values())),
            ]
        )
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    lists = [
        (
            "Not found and not listed",
            [f"{name}: {', '.join(r['missing'])}" for name, r in rows.items() if r.get("missing")],
        ),
        ("Raised", [f"{name}: {r['raised']}" for name, r in rows.items() if "raised" in r]),
        (
            "Other strides",
            [name for name, row in rows.items() if not row.get("strides", True)],
        ),
        (
            "Why norms are left",
            sorted({reason for row in rows.values() for reason in row.get("reasons", ())}),
        ),
        (
            "Not built, or not finished in time",
            [name for name, row in rows.items() if "norms" not in row and "raised" not in row],
        ),
    ]
    text = [
        f"## {title}\n\n" + ("\n".join(f"- {i}" for i in items) or "None.")
        for title, items in lists
    ]
    PAGE.write_text(PAGE_TEXT.format(table=table) + "\n\n".join(text) + "\n", "utf-8")


FOLD = "fold's change"
PAGE_TEXT = """\
# The zoo

Written by `python docs/zoo.py` from `docs/results/zoo.json`, which `make zoo` measures: one small
model of every family of timm (of every first word of its names), and every architecture of
transformers that a small configuration makes, with random weights. Norms are counted without
normkit, by class names and by source. Changes are over the largest output, of swap in float32 and
of fold in float64, since some of these nets with random weights turn float32's rounding itself into
a fifth of their output (the first seventy models were folded in float32); a model that takes other
inputs than images or tokens is swapped, not run.

{table}

"""


if __name__ == "__main__":
    run() if sys.argv[1:] == ["run"] else write()
