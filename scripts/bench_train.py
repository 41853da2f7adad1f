"""What training costs: the loop, the methods, the models, several devices; and beside PyTorch.

    python scripts/bench_train.py
    python scripts/bench_train.py --compare=torch

All data are random and made here. A ratio compares two cases that are timed in turn (A B A B …),
each for about `--seconds`; it is taken pair by pair, and the figure is the median over the pairs.
Beside it stand the quartiles. A step is the whole training step, jitted and donated. On a CPU,
freed memory is kept for the next step; see `scripts/bench_transforms.py`. What does not fit into
memory is left out, with a line that says so. Measured is, by `--parts`:

loop: images/s of `gnp.training.train` on a data set that lives on the device, with its logging (a
line every `--seconds`) and progress, as `metrics.jsonl` reports them without its first line; over
those of a bare step of the same model, on a batch that is ready: plain Flax, `optax.adamw`, a loop
in Python or on the device, whichever is faster here. Then over our own step on a ready batch
without metrics, and what the metrics cost: that step with them and without, where XLA leaves out
all that they alone need; and what it costs to leave out steps that are not finite.

saving: what asynchronous checkpoints cost a training run, of its wall time, at one a minute: runs
with a save after each of `--seconds` and without, the difference a save, over a minute.

methods: times of our steps under gradient regularization (GR) and scheduled weight decay (SWD),
over plain ones with AdamW or over each other, and over a bare step with `optax.contrib.sam`.

flops: model FLOPs utilization. Those that the arithmetic asks for, 3 x forward a gradient
(`gnp/training/flops.py`), over the time, over the rate of matrix products of the same dtype on the
same device: the mean of two rates, measured before and after each model's steps. Plain and under
GR (2 gradients), whose steps are timed in turn. The batch, unless given, is as large as suits the
device; on a GPU it is halved until it fits.

scaling: the host forced to have 1, 2, 4 and 8 devices, each number in a process of its own, with
the same batch in all: times of a step over those on 1 device. The cores are the same, so 1 is
ideal, and what is above it is the price of dividing: the exchange, and the optimizer's arithmetic,
which every device does for all parameters. Then what 8 devices exchange in a step, read from the
compiled programs: operations, and bytes of arrays (gradients, and of a CNN activations and
BatchNorm's statistics) over those of the parameters.

pod: on paper, when the second reduction of GR matters on `--chips` chips; nothing is measured. Of
the chips in `scripts/bench_collectives.py`, or of one with `--chip_flops` and `--bandwidth`.

torch, by `--compare=torch` (and then alone unless `--parts` names others): timm's model in PyTorch,
eager, AdamW and SAM, against ours in the same process; medians, and the least times. It wants a
quiet machine: where other work runs beside it PyTorch's threads wait for each other, and a step of
its takes many times as long.

What is measured of the models that `--model` names; otherwise of vit_ti at 32 pixels in float32,
and in the part flops of a list of models, on accelerators in float32 and bfloat16.
"""

import contextlib
import functools
import gc
import io
import json
import os
import pathlib
import statistics
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import benchmark
import jax
import numpy as np
import optax
from bench_collectives import check_batch_size, measure_pod, measure_scaling
from bench_torch import import_torch, measure_torch
from benchmark import Row
from train_steps import (
    RADIUS,
    BareSteps,
    Case,
    OurSteps,
    Task,
    adamw,
    is_out_of_memory,
    make_config,
    skipped_if_too_large,
)

from gnp import models
from gnp.command_line import Parser, run
from gnp.config import DTYPES
from gnp.errors import unknown
from gnp.memory import keep_freed_memory
from gnp.training import Interrupted, train
from gnp.training.flops import forward_flops, matmul_rate, step_flops

PARTS = ("loop", "saving", "methods", "flops", "scaling", "pod")
LIBRARIES = ("torch",)
# Of the part flops: models, and the sizes of their images.
MODELS = {
    **dict.fromkeys(("vit_ti", "vit_s", "vit_b"), (32, 224)),
    **dict.fromkeys(("swin_t", "cait_s12", "resnet18", "resnet50"), (224,)),
}
LOG_LINES = 4  # of a training run; the first is left out
LARGE_GPUS = ("H100", "H200", "B200")

Measurement = Callable[[], Iterable[list[Row]]]


def cases(sizes: Any, default: dict[str, Sequence[int]], dtypes: Sequence[str]) -> list[Case]:
    """What the flags ask for; `default` models and `dtypes` where they say nothing."""
    names = sizes["model"].split(",") if "model" in sizes else list(default)
    dtypes = sizes["dtype"].split(",") if "dtype" in sizes else dtypes
    if "image_size" in sizes:
        default = dict.fromkeys(names, (sizes["image_size"],))
    fallback = next(iter(default.values()))
    return [
        Case(name, image_size, dtype)
        for name in names
        for image_size in default.get(name, fallback)
        for dtype in dtypes
    ]


# --- The training loop --------------------------------------------------------------------------


class TrainingRuns:
    """Runs of `gnp.training.train` on random images that live on the device.

    Args:
      task: whose model is trained, with batches of its size.
      home: a folder for them.
    """

    def __init__(self, task: Task, home: pathlib.Path):
        self._batch_size, self._home = task.batch_size, home
        shape = task.batch["input"].shape[1:]
        self._count = max(4 * task.batch_size, 30_000_000 // int(np.prod(shape)))
        rng = np.random.default_rng(0)
        images = rng.integers(0, 256, (self._count, *shape), np.uint8)
        labels = np.arange(self._count) % task.model.num_classes
        file = home / "images.npz"
        few = max(16, task.model.num_classes)  # so that no class is missing
        np.savez(
            file,
            train_images=images,
            train_labels=labels,
            test_images=images[:few],
            test_labels=labels[:few],
        )
        self._config = config = make_config()
        config.dtype, config.steps_per_call = task.case.dtype, task.steps_per_call
        config.model.update(name=task.case.name, **task.overrides)
        config.data.update(name="npz", data_dir=str(file), resident="true")
        config.data.batch_size, config.mesh.data = task.batch_size, 1
        config.checkpoint.every = config.eval.every = "100%"

    def images_per_second(self, steps: int) -> float:
        """What a run reports, in log lines of so many steps."""
        rows = self._rows(steps, save_every="100%")
        return statistics.harmonic_mean([row["images_per_second"] for row in rows[1:]])

    def seconds_of_save(self, steps: int) -> float:
        """What a save after each log line of so many steps adds to the wall time, a save."""
        times = []
        for save_every in (f"{steps}st", "100%"):
            rows = self._rows(steps, save_every=save_every)
            times.append(rows[-1]["wall_time"] - rows[0]["wall_time"])
        return (times[0] - times[1]) / (LOG_LINES - 1)

    def _rows(self, steps: int, *, save_every: str) -> list[dict[str, Any]]:
        """The log lines of a run."""
        config = self._config.copy_and_resolve_references()
        config.log.every, config.checkpoint.every = f"{steps}st", save_every
        config.epochs = LOG_LINES * steps * self._batch_size / self._count
        with tempfile.TemporaryDirectory(dir=self._home) as workdir:
            with contextlib.redirect_stderr(io.StringIO()):  # its progress
                try:
                    train(config, workdir)
                except Interrupted:
                    raise KeyboardInterrupt from None
            lines = (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines()
        rows = [row for row in map(json.loads, lines) if row["split"] == "train"]
        assert len(rows) == LOG_LINES
        return rows


def fastest(ways: Sequence[BareSteps], seconds: float) -> BareSteps:
    """The one whose steps take least time."""
    times = []
    for way in ways:
        once = min(way.seconds(1) for _ in range(2))
        times.append(min(way.seconds(max(1, round(seconds / once))) for _ in range(2)))
    return ways[times.index(min(times))]


def measure_loop(task: Task, sizes: Any) -> Iterator[list[Row]]:
    """The rows of "loop"."""
    counts = sorted({1, task.steps_per_call})
    bare = fastest([BareSteps(task, adamw(), count) for count in counts], sizes["seconds"])
    config = make_config()
    ours, silent = (OurSteps(task, config, metrics=metrics) for metrics in (True, False))
    cost = benchmark.pairs(ours, silent, sizes["rounds"], sizes["seconds"])
    unchecked = OurSteps(task, config, checked=False)
    check = benchmark.pairs(ours, unchecked, sizes["rounds"], sizes["seconds"])
    del ours, unchecked

    runs = TrainingRuns(task, sizes["home"])
    steps = 1
    for _ in range(2):  # a single step lasts longer than one of many
        steps = max(1, round(sizes["seconds"] / bare.seconds(steps)))
    rates: dict[str, list[float]] = {"bare": [], "loop": [], "silent": []}
    for _ in range(sizes["rounds"]):
        rates["bare"].append(task.batch_size / bare.seconds(steps))
        rates["loop"].append(runs.images_per_second(steps))
        rates["silent"].append(task.batch_size / silent.seconds(steps))

    def over(other: str) -> list[float]:
        return [a / b for a, b in zip(rates["loop"], rates[other], strict=True)]

    label, where = task.label, "in Python" if bare.size == 1 else "on the device"
    row = functools.partial(benchmark.row, at_least=True)
    yield [
        row(f"{label}: training loop / bare steps", over("bare"), "ratio of images/s", 0.98),
        row(f"{label}: training loop / own steps, no metrics", over("silent"), "ratio of images/s"),
        row(f"{label}: metrics / no metrics", [a / b for a, b in cost], "ratio"),
        row(f"{label}: checked to be finite / not", [a / b for a, b in check], "ratio"),
        row(f"{label}: training loop", rates["loop"], "images/s"),
        row(f"{label}: bare steps, a loop {where}", rates["bare"], "images/s"),
        row(f"{label}: own steps, no metrics", rates["silent"], "images/s"),
    ]


def measure_saving(task: Task, sizes: Any) -> Iterator[list[Row]]:
    """The rows of "saving"."""
    step = OurSteps(task, make_config()).seconds(1)
    runs = TrainingRuns(task, sizes["home"])
    steps = max(1, round(sizes["seconds"] / step))
    costs = [runs.seconds_of_save(steps) for _ in range(sizes["rounds"])]
    yield [
        benchmark.row(f"{task.label}: a save", costs, "s"),
        benchmark.row(
            f"{task.label}: saves at one a minute", [x / 60 for x in costs], "of the time", 0.02
        ),
    ]


# --- The methods --------------------------------------------------------------------------------


def measure_methods(task: Task, sizes: Any) -> Iterator[list[Row]]:
    """The rows of "methods"."""
    ours = functools.partial(OurSteps, task)

    def ratio(a: str, first: Any, b: str, second: Any, target: float | None = None) -> list[Row]:
        times = benchmark.pairs(first, second, sizes["rounds"], sizes["seconds"])
        label = f"{task.label}: {a} / {b}"
        rows = [benchmark.row(label, [x / y for x, y in times], "ratio", target)]
        for name, values in zip((a, b), zip(*times, strict=True), strict=True):
            rows.append(benchmark.row(f"{label}, {name}", [1e3 * x for x in values], "ms"))
        return rows

    plain, gr = ours(make_config()), ours(make_config("none"))
    yield ratio("GR", gr, "plain", plain, 2.05)
    zero = ours(make_config("zero"))
    yield ratio("zero-warmup, in the warmup", zero, "plain", plain, 1.03)
    zero.end_warmup()
    yield ratio("zero-warmup, after it", zero, "GR", gr)
    del zero
    ascent = optax.chain(optax.contrib.normalize(), optax.sgd(RADIUS))
    sam = optax.contrib.sam(adamw(), ascent, opaque_mode=True)
    bare = BareSteps(task, sam, task.steps_per_call)
    yield ratio("GR", gr, "optax.contrib.sam", bare)
    del bare, gr
    yield ratio("SWD", ours(make_config(decay="scheduled")), "AdamW", plain, 1.01)


# --- Utilization --------------------------------------------------------------------------------


def usual_batch_size(case: Case) -> int:
    """As large as suits the device; what does not fit there is halved."""
    if jax.default_backend() != "cpu":
        return 256 if case.image_size >= 128 else 512
    info = models.list_models()[case.name]
    gflops = (info.large if case.image_size >= 128 else info.small)[1]
    return max(size for size in (8, 16, 32, 64) if size == 8 or size * gflops < 130)


class Times(NamedTuple):
    """What was found out of a task: the FLOPs of its forward pass, and pairs of times of a step.

    Those of a pair are under GR, and plain.
    """

    task: Task
    forward: float
    pairs: list[tuple[float, float]]


def times_of(case: Case, batch_size: int, sizes: Any) -> Times:
    """Measures them."""
    task = case.task(batch_size, sizes)
    gr, plain = (OurSteps(task, make_config(policy)) for policy in ("none", "off"))
    # A third, since each of these pairs is long, and there are many.
    pairs = benchmark.pairs(gr, plain, max(1, sizes["rounds"] // 3), sizes["seconds"])
    variables = {"params": plain.state.params, **plain.state.model_state}
    return Times(task, forward_flops(task.model, variables, task.batch["input"]), pairs)


def times_that_fit(case: Case, batch_size: int, sizes: Any) -> Times:
    """Measures with a batch that is halved until it fits, if none is asked for."""
    while True:
        try:
            return times_of(case, batch_size, sizes)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or batch_size == 1 or "batch_size" in sizes:
                raise
        gc.collect()  # what did not fit
        batch_size //= 2
        print(f"{case.name} at {case.image_size}: out of memory, trying {batch_size}", flush=True)


def measure_flops(case: Case, sizes: Any) -> Iterator[list[Row]]:
    """The rows of "flops"."""
    device = jax.devices()[0]
    batch_size = sizes.get("batch_size") or usual_batch_size(case)
    before = matmul_rate(case.dtype)
    task, forward, pairs = times_that_fit(case, batch_size, sizes)
    rates = [before, matmul_rate(case.dtype)]
    rate = statistics.mean(rates)
    rows = []
    for i, (method, gradients) in enumerate((("GR", 2), ("plain", 1))):
        seconds = [pair[i] for pair in pairs]
        shares = [step_flops(forward, gradients) / x / rate for x in seconds]
        label, target = f"{task.label}: {method}", utilization_target(case, method, device)
        rows.append(benchmark.row(label, shares, "utilization", target, at_least=True))
        rows.append(benchmark.row(f"{label}, a step", [1e3 * x for x in seconds], "ms"))
    label = f"{task.label}: matrix products"
    yield [*rows, benchmark.row(label, [1e-12 * x for x in rates], "TFLOP/s")]


def utilization_target(case: Case, method: str, device: jax.Device) -> float | None:
    """What is to be reached, where there is such."""
    if case.name != "vit_b":
        return None
    if device.platform == "cpu":
        return 0.6 if case.dtype == "float32" else None
    large = any(name in device.device_kind for name in LARGE_GPUS)
    is_that = case.image_size == 224 and case.dtype == "bfloat16" and method == "GR"
    return 0.5 if large and is_that else None


# --- All of it ----------------------------------------------------------------------------------


def measurements(parts: Sequence[str], sizes: Any) -> Iterator[tuple[str, Measurement]]:
    """What is asked for: names, and functions that give lists of rows.

    Raises:
      UserError: for what cannot be measured.
    """
    one: dict[str, Sequence[int]] = {"vit_ti": (32,)}
    on_cpu = jax.default_backend() == "cpu"
    usual = dict.fromkeys(("loop", "saving", "methods"), 64 if on_cpu else 256)
    if "scaling" in parts:
        check_batch_size(sizes.get("batch_size", 64))
    if "torch" in parts:
        import_torch()
    for part in parts:
        default, dtypes = one, ["float32"]
        if part == "flops":
            default = one if sizes["quick"] else MODELS
            dtypes = ["float32"] if on_cpu else list(DTYPES)
        for case in cases(sizes, default, dtypes):
            case.model(sizes)
            name = f"{part}, {case.name} at {case.image_size}, {case.dtype}"
            if part == "flops":
                yield name, functools.partial(measure_flops, case, sizes)
            elif part != "pod":
                batch_size = sizes.get("batch_size", usual.get(part, 64))
                yield name, functools.partial(measure_task, part, case, batch_size, sizes)
    if "pod" in parts:
        names = sizes["model"].split(",") if "model" in sizes else ["vit_ti", "vit_s", "vit_b"]
        yield "pod", functools.partial(measure_pod, names, sizes)


def measure_task(part: str, case: Case, batch_size: int, sizes: Any) -> Iterator[list[Row]]:
    """The rows of a part on one task."""
    measure = {
        "loop": measure_loop,
        "saving": measure_saving,
        "methods": measure_methods,
        "scaling": measure_scaling,
        "torch": measure_torch,
    }[part]
    yield from measure(case.task(batch_size, sizes), sizes)


def parser() -> Parser:
    """The flags."""
    parser = Parser("scripts/bench_train.py", __doc__ or "")
    parser.prog = "python scripts/bench_train.py"
    benchmark.add_flags(parser, rounds=(9, 3))
    parser.add_argument("--parts", help=f"only these of {','.join(PARTS)}")
    parser.add_argument("--compare", help=f"with {','.join(LIBRARIES)}")
    parser.add_argument("--model", help="or several, with commas between them (vit_ti)")
    parser.add_argument("--dtype", help=f"or both, of {','.join(DTYPES)} (float32)")
    parser.add_argument("--batch_size", type=int, help="images (64, on GPUs mostly 256; quick: 8)")
    parser.add_argument("--image_size", type=int, help="pixels on a side (32)")
    parser.add_argument("--width", type=int, help="of a ViT (its own; quick: 64)")
    parser.add_argument("--depth", type=int, help="of a ViT (its own; quick: 4)")
    parser.add_argument("--num_heads", type=int, help="of a ViT (its own; quick: 2)")
    parser.add_argument("--chips", type=int, help="of the pod (256)")
    parser.add_argument("--chip_flops", type=float, help="FLOP/s of a chip of the pod")
    parser.add_argument("--bandwidth", type=float, help="bytes/s that a chip of the pod sends")
    return parser


def main() -> int:
    """Measures, prints, writes."""
    flags = parser().parse_args()
    sizes = benchmark.sizes(
        flags,
        {"rounds": 9, "seconds": 1.0, "chips": 256},
        {"rounds": 3, "seconds": 0.3, "batch_size": 8, "width": 64, "depth": 4, "num_heads": 2},
    )
    parts = chosen("part", flags.parts, PARTS)
    if flags.compare is not None:
        libraries = chosen("library", flags.compare, LIBRARIES)
        parts = libraries if flags.parts is None else parts + libraries
        # Both libraries are on the device, so that none may take most of its memory beforehand.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    chosen("dtype", flags.dtype, DTYPES)

    keep_freed_memory()
    with (
        benchmark.opened(flags.json) as file,
        tempfile.TemporaryDirectory(prefix="gnp-bench-") as home,
    ):
        sizes["home"] = pathlib.Path(home)
        if jax.config.jax_compilation_cache_dir is None:
            # Runs of "loop" share their programs, as `gnp.environment` has it for a user's.
            jax.config.update("jax_compilation_cache_dir", f"{home}/cache")
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)
        todo = list(measurements(parts, sizes))
        print(f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores", flush=True)
        for name, measure in todo:
            with skipped_if_too_large(name):
                for rows in measure():
                    benchmark.report(rows, file)
    return 0


def chosen(kind: str, text: str | None, valid: Sequence[str]) -> list[str]:
    """A flag's list, or all that are valid; a `UserError` for what is not."""
    names = list(valid) if text is None else text.split(",")
    for name in names:
        if name not in valid:
            raise unknown(kind, name, valid)
    return names


if __name__ == "__main__":
    run(main)
