"""Is it right on this GPU, and how fast? One run of under eight minutes: one JSON, one table for the ledger.

    python -m performance.gpu --output runs/gpu [--device cpu --size tiny] [--minutes 7.5]

Needs a checkout, a GPU (H100, H200: written for them), torch 2.11 and transformers 5.17 or newer, and of the package
index `pip install accelerate datasets jinja2 matplotlib opencv-python-headless pandas pydicom pyyaml scikit-learn scipy
tqdm`; no network, no data: the corpus is simulated. The exit code is 0 where every check ran and passed.

Each section is a process of its own with a limit of time: one that fails, hangs or is killed is reported and the next
begins, and the files are written after each. Checks come before speed, what is compiled last, for it is slow. Speed is
by CUDA's events, after a warm-up, medians; MFU is useful FLOP/s over the data sheet's dense bf16 peak and over the best
matmul measured here.
"""

import argparse
import contextlib
import datetime
import itertools
import multiprocessing
import os
import shutil
import signal
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import datasets
import torch
from transformers import Dinov2WithRegistersModel
from transformers.utils import logging as transformers_logging

from modeling_mammodino import MammoDinoImageProcessor, MammoDinoModel
from modeling_mammodino.tools.command import user_path
from modeling_mammodino.tools.environment import describe_environment
from modeling_mammodino.tools.files import write_json, write_text
from training.evaluation.reports import markdown_table
from training.pretraining.compute import block_flops, matmul_peak
from training.pretraining.recipe import load_recipe

from .encoder import encode_masked, make_ours, make_theirs, stopwatch, take_turns
from .images import example_images, write_corpus
from .step import TimedRun

# dense bf16 FLOP/s by torch's name of the device, the first that fits; NVIDIA's data sheets state twice that, sparse
DATA_SHEET = {"H200 NVL": 835.5e12, "H200": 989.5e12, "H100 NVL": 835.5e12, "H100 PCIe": 756.5e12, "H100": 989.5e12,
              "A100": 312e12}  # fmt: skip
# of relative distances |a - b| / |b|. Rounding lands far below; TF32, some 3e-4, does not pass for float32
SAME_FLOAT32, SAME_BFLOAT16 = 1e-4, 3e-2
# of the first loss, and at any of 20 steps; on one CPU bf16 was within 0.0001 and 0.008 of float32, whose products
# training computes in TF32 on a GPU
SAME_LOSS = {"float32": (1e-3, 1e-2), "bf16": (2e-3, 2.5e-2)}


class Size(NamedTuple):
    volumes: int
    images: int  # that are encoded, repeated for larger batches
    fit_px: tuple[int, int]
    encoders: tuple[str, ...]  # of performance.encoder.MODELS; the first is checked, too
    canvases_px: tuple[int, ...]
    batches: tuple[int, ...]
    repeats: int
    recipes: dict[str, tuple[str, ...]]  # of the speed of pretraining
    steps: tuple[int, int, int]  # that warm up; timed, of the loader and on a batch that stands on the device
    check: tuple[str, ...]  # of the runs whose losses are compared
    compiler: str  # torch.compile's backend


QUIET = ("--report_to", "none", "--visualization_steps", "0", "--preflight", "false", "--logging_steps", "1")
# visreg draws its directions on the device, which no CPU draws again
CHECK = ("study_small", "--view_regularizer", "coding_rate", "--max_steps", "20", *QUIET)
SMALL = ("--hidden_size", "32", "--num_hidden_layers", "2", "--num_prototypes", "64", "--num_local_crops", "2",
         "--per_device_train_batch_size", "8", "--image_height", "64", "--image_width", "48", "--canvas_tokens", "12",
         "--dense_components", "8", "--head_hidden_size", "32", "--max_steps", "5")  # fmt: skip
SIZES = {
    "full": Size(
        volumes=32,
        images=8,
        fit_px=(1024, 1024),
        encoders=("vits14", "vitb14"),
        canvases_px=(518, 1036),
        batches=(1, 8, 32),
        repeats=7,
        recipes={"ViT-S/14": ("mammodino",), "ViT-B/14": ("paper", "--gradient_accumulation_steps", "1")},
        steps=(8, 24, 16),
        check=CHECK,
        compiler="inductor",
    ),
    "tiny": Size(
        volumes=8,
        images=2,
        fit_px=(128, 104),
        encoders=("tiny14",),
        canvases_px=(112,),
        batches=(1, 2),
        repeats=1,
        recipes={"small": (*CHECK, *SMALL)},
        steps=(2, 2, 2),
        check=(*CHECK, *SMALL),
        compiler="eager",
    ),
}


class Setup(NamedTuple):
    device: str
    size: Size
    folder: Path  # that is removed at the end
    start: str  # of processes

    @property
    def corpus(self) -> Path:
        return self.folder / "corpus"


Found = dict[str, Any]  # of a section, as it stands in the JSON; "checks": of `check`, "rows": of a table


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m performance.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=user_path, required=True, help="folder of gpu.json and gpu.md")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--size", choices=SIZES, default="full", help="tiny: to see that it starts, on a CPU")
    parser.add_argument("--minutes", type=float, default=7.5, help="after which no section goes on (default 7.5)")
    parser.add_argument("--sections", nargs="+", help="as they are named in the JSON (default: all)")
    options = parser.parse_args()
    started = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="mammodino-gpu-"))
    # forked from a process that has imported all and not touched the device, which only NVML leaves untouched
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    setup = Setup(options.device, SIZES[options.size], folder, "forkserver")
    chosen = sections(setup.size)
    if unknown := set(options.sections or ()) - chosen.keys():
        parser.error(f"--sections {', '.join(sorted(unknown))}: give some of {', '.join(chosen)}")
    wanted = {"machine", "corpus", *(options.sections or chosen)}  # and what others compare with
    wanted |= {"losses_cpu"} if any(name.startswith("losses") for name in wanted) else set()
    report: Found = {"date": datetime.date.today().isoformat(), "size": options.size, "correct": None, "sections": {}}
    try:
        for name, section in chosen.items():
            if name not in wanted:
                continue
            left = started + 60 * options.minutes - time.monotonic()
            found = run_apart(section, setup, report["sections"], min(section.seconds, left))
            if name == "machine" and found["status"] != "passed":  # an import has touched it
                setup = setup._replace(start="spawn")
                found = run_apart(section, setup, report["sections"], section.seconds)
            report["sections"][name] = {"check": section.is_check, **found}
            report["seconds"] = time.monotonic() - started
            write(report, options.output)
            print(f"{name}: {found['status']}, {found['seconds']:.0f} s", flush=True)
            if name == "machine" and found["status"] != "passed":
                reason = found.get("traceback", found["status"]).strip().splitlines()[-1]
                sys.exit(f"gpu: --device {options.device}: {reason}; --device cpu --size tiny tries the script alone")
        of_checks = [each["status"] for each in report["sections"].values() if each["check"]]
        report["correct"] = set(of_checks) == {"passed"}
        write(report, options.output)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"{options.output / 'gpu.md'}, {options.output / 'gpu.json'}")
    sys.exit(0 if report["correct"] else "gpu: not every check passed; the JSON says which, with tracebacks")


def write(report: Found, folder: Path) -> None:
    write_json(folder / "gpu.json", report)
    write_text(folder / "gpu.md", as_markdown(report))


# a section as a process


class Section(NamedTuple):
    run: Callable[..., Found]  # (setup, what earlier sections found, *arguments)
    seconds: float  # at most
    arguments: tuple = ()
    is_check: bool = False
    on_cpu: bool = False


def sections(size: Size) -> dict[str, Section]:
    """Every section by its name, in order."""
    pretrain = {f"pretrain {name}": Section(pretraining_speed, 50, (name, False)) for name in size.recipes}
    slow = {"losses compiled": Section(check_losses, 80, ("float32", "--torch_compile", "true"), is_check=True)}
    slow |= {f"pretrain {name}, compiled": Section(pretraining_speed, 80, (name, True)) for name in size.recipes}
    return {
        "machine": Section(machine, 60, is_check=True),  # the first to load the driver
        "corpus": Section(make_corpus, 60, is_check=True),
        "encoder": Section(check_encoder, 40, is_check=True),
        "packed": Section(check_packed, 40, is_check=True),
        "losses_cpu": Section(run_losses, 60, ("--bf16", "false"), is_check=True, on_cpu=True),
        **{f"losses {name}": Section(check_losses, 40, (name,), is_check=True) for name in SAME_LOSS},
        **pretrain,
        **{f"encode {name}": Section(encoding_speed, 50, (name,)) for name in size.encoders},
        "compiled": Section(check_compiled, 80, is_check=True),
        **(slow if size.compiler == "inductor" else {}),
    }


def run_apart(section: Section, setup: Setup, done: Found, limit: float) -> Found:
    """Run a section in a process of its own, at most `limit` seconds: what it found, "status" and "seconds"."""
    started = time.monotonic()
    if limit < 1:
        return {"status": "no time left", "seconds": 0.0}
    context = multiprocessing.get_context(setup.start)
    context.set_forkserver_preload(["performance.step"])  # which imports what this file does
    ours, theirs = context.Pipe()
    process = context.Process(target=work, args=(theirs, section, setup, done))
    process.start()
    theirs.close()
    found: Found = {"status": f"stopped after its {limit:.0f} s"}
    if ours.poll(limit):
        try:
            found = ours.recv()
            process.join(5)
        except EOFError:
            process.join()
            found = {"status": f"died with exit code {process.exitcode}"}
    process.kill()  # where it has not come to lead a group
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid or 0, signal.SIGKILL)  # the workers of its loader
    process.join()
    return {**found, "seconds": time.monotonic() - started}


def work(connection: Connection, section: Section, setup: Setup, done: Found) -> None:
    """Run a section, and send what it found."""
    os.setsid()
    if section.on_cpu or setup.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    datasets.disable_progress_bars()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    cv2.setNumThreads(1)
    try:
        found = section.run(setup, done, *section.arguments)
        passed = all(map(is_within, found.get("checks", ())))
        connection.send({"status": "passed" if passed else "failed", **found})
    except BaseException:
        connection.send({"status": "failed", "traceback": traceback.format_exc()})


def check(what: str, found: float, limit: float) -> Found:
    return {"what": what, "found": found, "limit": limit}


def is_within(one: Found) -> bool:
    return one["found"] <= one["limit"]  # NaN is not


# what is checked


def machine(setup: Setup, done: Found) -> Found:
    """Versions, device and its peaks."""
    torch.set_float32_matmul_precision("highest")
    device = torch.device(setup.device)
    found: Found = {"environment": describe_environment()}
    found["matmul"] = {name: matmul_peak(device, getattr(torch, name)) for name in ("float32", "bfloat16")}
    if device.type == "cuda":
        name = torch.cuda.get_device_name()
        found["data_sheet"] = next((peak for part, peak in DATA_SHEET.items() if part in name), None)
        source = torch.empty(2**30, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        seconds = min(stopwatch(target.copy_, source) for _ in range(5))
        found["copied_bytes_per_second"] = 2 * len(source) / seconds  # read and written
    return found


def make_corpus(setup: Setup, done: Found) -> Found:
    return {"images": write_corpus(setup.corpus, setup.size.volumes, setup.size.fit_px)}


def check_encoder(setup: Setup, done: Found) -> Found:
    """Our encoder beside transformers' own on the same weights, at the size of the position embeddings and another."""
    pair, halves = make_pair(setup), make_pair(setup, torch.bfloat16)
    side, checks = setup.size.canvases_px[0], []
    for size in (side, side // 28 * 14):
        pixels = torch.randn(2, 1, size, size, device=setup.device)
        (found, gradient), (expected, expected_gradient) = (forward_and_gradient(model, pixels) for model in pair)
        checks.append(check(f"{size} px, float32", distance(found, expected), SAME_FLOAT32))
        checks.append(check(f"{size} px, float32, gradient", distance(gradient, expected_gradient), SAME_FLOAT32))
        ours, theirs = (distance(model(pixels.bfloat16()).last_hidden_state, expected) for model in halves)
        checks.append(check(f"{size} px, bf16, beside float32", ours, SAME_BFLOAT16))
        checks.append(check(f"{size} px, bf16, that error over theirs", ours / theirs, 1.2))
    return {"checks": checks}


def check_packed(setup: Setup, done: Found) -> Found:
    """The breast's tokens, packed, beside every token with the background's keys masked, which exported graphs do."""
    checks = []
    for dtype, limit in ((torch.float32, SAME_FLOAT32), (torch.bfloat16, SAME_BFLOAT16)):
        ours, _ = make_pair(setup, dtype)
        pixels, tissue = canvases(setup, setup.size.canvases_px[0], dtype)
        expected, expected_gradient = forward_and_gradient(partial(encode_masked, ours), pixels, tissue=tissue)
        found, gradient = forward_and_gradient(ours, pixels, tissue_mask=tissue)
        name = str(dtype)[6:]
        share = (tissue > 0).float().mean().item()
        checks.append(check(f"{name}, {share:.0%} of the patches", distance(found, expected), limit))
        checks.append(check(f"{name}, gradient", distance(gradient, expected_gradient), 2 * limit))
    return {"checks": checks}


def run_losses(setup: Setup, done: Found, *arguments: str) -> Found:
    """The loss at each step of a small run with every idea on, on the device that this process sees."""
    output = Path(tempfile.mkdtemp(dir=setup.folder))
    recipe = load_recipe([*setup.size.check, "--corpus", str(setup.corpus), "--output_dir", str(output), *arguments])
    return {"losses": TimedRun(recipe, from_loader=recipe.run.max_steps).losses}


def check_losses(setup: Setup, done: Found, name: str, *arguments: str) -> Found:
    expected = done["losses_cpu"]["losses"]
    found = run_losses(setup, done, "--bf16", "true" if name == "bf16" else "false", *arguments)
    beside = " ".join(["beside the CPU's float32", *arguments])
    first, any_step = SAME_LOSS[name]
    checks = [
        check(f"first step {beside}", largest(found["losses"][:1], expected[:1]), first),
        check(f"{len(expected)} steps {beside}", largest(found["losses"], expected), any_step),
    ]
    return {"checks": checks, **found}


def check_compiled(setup: Setup, done: Found) -> Found:
    """Two blocks in one graph: the whole model, where every token stays, and the blocks alone, on packed tokens."""
    checks = []
    pixels, tissue = canvases(setup, setup.size.canvases_px[0])
    less = tissue.clone()
    less[:, ::2] = 0
    for what, dtype, limit in (("model", torch.float32, SAME_FLOAT32), ("encoder", torch.bfloat16, SAME_BFLOAT16)):
        plain, compiled = (make_pair(setup, dtype, num_hidden_layers=2)[0] for _ in range(2))
        (compiled if what == "model" else compiled.encoder).compile(fullgraph=True, backend=setup.size.compiler)
        with torch.no_grad():
            for seen, mask in (("every token", None), ("tissue", tissue), ("less tissue", less)):
                found, expected = (each(pixels, tissue_mask=mask).last_hidden_state for each in (compiled, plain))
                checks.append(check(f"{what}, {str(dtype)[6:]}, {seen}", distance(found, expected), limit))
    return {"checks": checks, "graphs": dict(torch._dynamo.utils.counters["stats"])}


# what is timed


def pretraining_speed(setup: Setup, done: Found, name: str, compiled: bool) -> Found:
    """A recipe as it is, by its own loader and then on a batch that stands on the device."""
    warm, of_loader, standing = setup.size.steps
    arguments = list(setup.size.recipes[name])
    last = warm + of_loader + standing + 1
    arguments += ["--corpus", str(setup.corpus), "--output_dir", tempfile.mkdtemp(dir=setup.folder), *QUIET]
    arguments += ["--max_steps", str(last), "--save_steps", str(last), "--logging_steps", str(last)]
    recipe = load_recipe([*arguments, *(["--torch_compile", "true"] if compiled else [])])
    timed = TimedRun(recipe, from_loader=warm + of_loader)
    seconds, waits = timed.seconds, timed.waits
    parts = {"loader": slice(warm, warm + of_loader), "standing": slice(warm + of_loader, None)}
    step = {part: statistics.median(seconds[steps]) for part, steps in parts.items()}
    batch = recipe.run.per_device_train_batch_size
    rate = timed.flops / step["standing"]
    peaks = {"data_sheet": done["machine"].get("data_sheet"), "matmul": done["machine"]["matmul"]["bfloat16"]}
    row = {
        "model": f"{name}, {arguments[0]}{', compiled' if compiled else ''}",
        "batch": batch,
        "step_seconds": {part: spread(seconds[steps]) for part, steps in parts.items()},
        "images_per_second": {part: batch / median for part, median in step.items()},
        "flops_per_image": timed.flops / batch,
        "mfu": {name: rate / peak for name, peak in peaks.items() if peak},
        "data_wait_fraction": sum(waits[parts["loader"]]) / sum(seconds[parts["loader"]]),
        "peak_memory_bytes": timed.memory,
    }
    return {"rows": [row]}


def encoding_speed(setup: Setup, done: Found, name: str) -> Found:
    """Packed beside every token, ours and transformers', in bf16."""
    dtype = torch.bfloat16 if setup.device == "cuda" else torch.float32
    ours, theirs = (make(name).to(setup.device, dtype) for make in (make_ours, make_theirs))
    ways: dict[str, Callable] = {
        "transformers": lambda pixels, tissue: theirs(pixels),
        "dense": lambda pixels, tissue: ours(pixels),
        "packed": lambda pixels, tissue: ours(pixels, tissue_mask=tissue),
    }
    rows = []
    for side, batch in itertools.product(setup.size.canvases_px, setup.size.batches):
        images = [each.repeat(-(-batch // len(each)), *[1] * (each.ndim - 1))[:batch]
                  for each in canvases(setup, side, dtype)]  # fmt: skip
        times = take_turns(ways, [tuple(images)], setup.size.repeats)
        medians = {way: statistics.median(each) for way, each in times.items()}
        tokens = (images[1] > 0).flatten(1).sum(dim=1) + 1 + ours.config.num_register_tokens
        useful = sum(block_flops(ours.config, int(length)) for length in tokens)
        rows.append(
            {
                "model": name,
                "px": side,
                "batch": batch,
                "tissue": float((images[1] > 0).float().mean()),
                "images_per_second": {way: batch / median for way, median in medians.items()},
                "seconds": {way: spread(each) for way, each in times.items()},
                "peak_memory_bytes": {way: forward_memory(encode, *images) for way, encode in ways.items()},
                "packed_share_of_matmul": useful / medians["packed"] / done["machine"]["matmul"]["bfloat16"],
            }
        )
    return {"rows": rows}


# what sections share


def make_pair(
    setup: Setup, dtype: torch.dtype = torch.float32, **changes: Any
) -> tuple[MammoDinoModel, Dinov2WithRegistersModel]:
    """Ours and transformers', by way of a file, of random weights in which every parameter matters."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    side = setup.size.canvases_px[0]
    ours = make_ours(setup.size.encoders[0], image_size=side, layerscale_value=1.0, **changes)
    for parameter in ours.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    with tempfile.TemporaryDirectory(dir=setup.folder) as folder:
        ours.save_pretrained(folder)
        theirs = Dinov2WithRegistersModel.from_pretrained(folder).eval()
    return ours.to(setup.device, dtype), theirs.to(setup.device, dtype)


def canvases(setup: Setup, side: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (n, 1, side, side) as the image processor makes them, and their tissue (n, h, w), left on the host."""
    _, planes = example_images(setup.size.images)
    inputs = MammoDinoImageProcessor(size={"height": side, "width": side})(planes, return_tensors="pt")
    return inputs["pixel_values"].to(setup.device, dtype), inputs["tissue_mask"]


def forward_and_gradient(encode: Callable, pixels: torch.Tensor, **inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The last hidden state, and the gradient of a fixed mixture of it with respect to the pixels."""
    pixels = pixels.clone().requires_grad_()
    outputs = encode(pixels, **inputs)
    states = outputs if isinstance(outputs, torch.Tensor) else outputs.last_hidden_state
    mixture = torch.randn(states.shape, generator=torch.Generator().manual_seed(0)).to(states)
    (states * mixture).sum().backward()
    return states.detach(), pixels.grad


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """|found - expected| / |expected|."""
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())


def largest(found: list[float], expected: list[float]) -> float:
    """The largest relative difference of two courses of losses."""
    pairs = zip(found, expected, strict=True)
    differences = torch.tensor([(one - other) / other for one, other in pairs], dtype=torch.float64)
    return float(differences.abs().max())


def forward_memory(encode: Callable, *inputs: torch.Tensor) -> int | None:
    """Bytes that one forward adds at its peak; None on a CPU, where performance.encoder measures it."""
    if inputs[0].device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.inference_mode():
        encode(*inputs)
    return torch.cuda.max_memory_allocated() - before


def spread(seconds: list[float]) -> Found:
    return {"median": statistics.median(seconds), "least": min(seconds), "most": max(seconds), "count": len(seconds)}


# the tables


def as_markdown(report: Found) -> str:
    """A section of performance/README.md's ledger."""
    done = report["sections"]
    found = done.get("machine", {})
    environment = {"GPU": "no device", **found.get("environment", {})}
    names = ("mammodino", "torch", "CUDA", "transformers", "processor cores")
    versions = ", ".join(f"{name} {environment[name]}" for name in names if name in environment)
    peaks = [f"{name} {peak / 1e12:.3g}" for name, peak in found.get("matmul", {}).items()]
    if found.get("data_sheet"):
        peaks.append(f"bf16 by the data sheet {found['data_sheet'] / 1e12:.4g}")
    lines = [f"### {report['date']}, one GPU", ""]
    lines += [f"`python -m performance.gpu` ({report['size']}): {environment['GPU']}; {versions}."]
    lines += [f"Matmul peaks in TFLOP/s: {', '.join(peaks)}. {report['seconds']:.0f} s in all.", ""]
    checks = [(name, one) for name, each in done.items() for one in each.get("checks", ())]
    rows = [
        (f"{name}: {one['what']}", f"{one['found']:.1e}", f"{one['limit']:.2g}", "within" if is_within(one) else "OVER")
        for name, one in checks
    ]
    for name, each in done.items():
        if each["status"] != "passed" and not each.get("checks"):
            reason = each.get("traceback", "").strip().splitlines()[-1:]
            rows.append((name, "", "", ": ".join([each["status"], *reason])))
    lines += markdown_table(("check", "found", "limit", ""), rows)
    for kind, columns, cells in (
        ("pretrain", PRETRAINING, pretraining_cells),
        ("encode", ENCODING, encoding_cells),
    ):
        found_rows = [row for name, each in done.items() if name.startswith(kind) for row in each.get("rows", ())]
        if found_rows:
            lines += ["", *markdown_table(columns, map(cells, found_rows))]
    return "\n".join(lines) + "\n"


PRETRAINING = (
    *("pretraining", "batch", "ms a step, standing batch", "images/s", "MFU, data sheet", "MFU, matmul"),
    *("images/s with the loader", "data wait", "GFLOP an image", "memory, GiB"),
)
ENCODING = (
    *("encoding", "px", "batch", "tissue", "transformers, images/s", "every token", "packed", "packed: times as fast"),
    *("ms, packed", "share of matmul", "memory of every token's"),
)


def pretraining_cells(row: Found) -> tuple:
    rate, mfu = row["images_per_second"], row["mfu"]
    return (
        *(row["model"], row["batch"], in_ms(row["step_seconds"]["standing"]), f"{rate['standing']:.4g}"),
        *(f"{mfu[name]:.2f}" if name in mfu else "" for name in ("data_sheet", "matmul")),
        *(f"{rate['loader']:.4g}", f"{row['data_wait_fraction']:.2f}", f"{row['flops_per_image'] / 1e9:.0f}"),
        f"{row['peak_memory_bytes'] / 2**30:.1f}",
    )


def encoding_cells(row: Found) -> tuple:
    rate, memory = row["images_per_second"], row["peak_memory_bytes"]
    return (
        *(row["model"], row["px"], row["batch"], f"{row['tissue']:.2f}"),
        *(f"{rate[way]:.4g}" for way in ("transformers", "dense", "packed")),
        *(f"{rate['packed'] / rate['dense']:.2f}", in_ms(row["seconds"]["packed"])),
        f"{row['packed_share_of_matmul']:.2f}",
        f"{memory['packed'] / memory['dense']:.2f}" if memory["dense"] else "",
    )


def in_ms(times: Found) -> str:
    return f"{times['median'] * 1e3:.4g} ({times['least'] * 1e3:.4g}, {times['most'] * 1e3:.4g})"


if __name__ == "__main__":
    main()
