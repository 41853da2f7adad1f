"""What the data cost: in a step, around the steps, streamed, and before the first one.

    python scripts/bench_data.py

All data are made here, in a temporary folder. A ratio compares two cases that are timed in turn
(A B A B …), never at once; it is taken pair by pair, and the figure is the median over the pairs.
Beside it stand the quartiles. What is compared, by `--parts`:

step: the small ViT of `configs/cifar_vit.py`, `gr=off`, on 50,000 images that live on the device.
Its compiled call of 16 steps, which shuffles, gathers, crops, flips and normalises, against the
same call on a batch that is ready on the device: 1 − t(ready) / t(full) is the pipeline's share. A
call of no step shows what of that is the order, which is drawn once for a call.

heavy: the same with `augment=heavy`.

calls: the same model on the ready batch, and that of `configs/digits.py`, which is tiny. A call of
no step is Python, dispatch and the runtime alone; over one of 16 steps it is the most that Python
can cost. Steps in calls of 16 or of 1, made as the training loop makes them (a call ahead, waiting
for the one before), against as many of the same program in one call, t(calls) / t(one) − 1, is all
that calls add: on a CPU mostly the pages of a program's memory, which glibc returns to the system
after each call (other benchmarks keep them; a run does not).

jpeg: JPEGs of about 400 × 350 pixels in a folder, streamed by a process for each core as random
resized crops of 224 pixels and put on the device, against a loop in one process that opens, crops
and resizes with Pillow; images a second, from the time on that all workers are under way.

cifar: PNGs of 32 × 32 pixels in ArrayRecord files, as TFDS prepares CIFAR-10. Decoded into memory
(the cache empty), or streamed, against reading `tfds.data_source` one by one. Then the time from a
name to arrays in a fresh process, whose imports of gnp and JAX are over, with the cache empty and
with it filled.
"""

import contextlib
import functools
import io
import math
import multiprocessing
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple
from unittest import mock

import benchmark
import jax
import jax.numpy as jnp
import numpy as np
import tensorflow_datasets as tfds
from benchmark import Row
from jax import lax
from ml_collections import ConfigDict
from PIL import Image

from gnp import config as gnp_config
from gnp import data as gnp_data
from gnp.command_line import Parser, run
from gnp.data import loading, resident
from gnp.errors import unknown
from gnp.training import experiment as experiments
from gnp.training.sharding import make_mesh, over_batch, replicated
from gnp.training.step import make_train_call, make_train_step

ROOT = pathlib.Path(__file__).parents[1]
STEPS_PER_CALL = 16
CROP, MIN_AREA = 224, 0.08
BATCH = 64  # images of a streamed batch
PARTS = ("jpeg", "cifar", "step", "heavy", "calls")


class Ready:
    """Batches that are no work: each is all that the call is given."""

    def order(self, first_step: jax.Array, num_steps: int) -> jax.Array:
        """Nothing to be known of a batch."""
        return jnp.zeros(num_steps, jnp.int32)

    def batch(self, data: Any, indices: jax.Array, step: jax.Array) -> Any:
        """All of `data`."""
        # Without a barrier what the model does with it alone would be done once for all steps.
        return lax.optimization_barrier((data, step))[0]


class Program:
    """The training loop's compiled call, and the state that it has come to.

    Args:
      experiment: whose steps it makes.
      batches: how it makes a batch.
      data: of what.
    """

    def __init__(self, experiment: experiments.Experiment, batches: Any, data: Any):
        self.state, self.data = experiment.init(), data
        step = make_train_step(experiment.model, experiment.optimizer, seed=0, log_every=100)
        call = make_train_call(step, batches, max_steps=STEPS_PER_CALL, mesh=experiment.mesh)
        self.call = call.lower(self.state, data, STEPS_PER_CALL).compile()

    def seconds(self, calls: Sequence[int]) -> float:
        """The wall time of calls of so many steps each, made as the loop makes them."""
        jax.block_until_ready(self.state)
        start, waiting = time.perf_counter(), None
        for num_steps in calls:
            self.state, sums = self.call(self.state, self.data, num_steps)
            jax.block_until_ready(waiting)  # the device always has the next call to do
            waiting = sums
        jax.block_until_ready((self.state, waiting))
        return time.perf_counter() - start


class Calls(NamedTuple):
    """A program's calls of `size` steps each, for `benchmark.pairs`."""

    program: Program
    size: int

    def seconds(self, calls: int) -> float:
        """The wall time of a call, over this many."""
        return self.program.seconds([self.size] * calls) / calls


class Training:
    """A configuration's experiment and data, and the calls that can be made of them."""

    def __init__(self, config: ConfigDict):
        config.mesh.data, config.data.resident = 1, "true"
        self.experiment = experiments.make_experiment(config)
        self.data = self.experiment.load_data()

    def full(self) -> Program:
        """The call on the data set."""
        return Program(self.experiment, self.data.train_batches, self.data.train_input())

    def ready(self) -> Program:
        """The call on a batch of it that is ready."""
        batches = self.data.train_batches

        @jax.jit
        def first(examples: Any) -> Any:
            return batches.batch(examples, jnp.arange(batches.batch_size), 0)

        batch = first(self.data.train_input())
        batch = jax.device_put(batch, over_batch(self.experiment.mesh))
        return Program(self.experiment, Ready(), batch)


def seconds_of_no_step(program: Program, rounds: int) -> list[float]:
    """The wall time of a call that makes no step."""
    program.seconds([0])
    return [program.seconds([0] * 30) / 30 for _ in range(rounds)]


def measure_step(name: str, full: Program, ready: Program, sizes: Any, target: Any) -> list[Row]:
    """The pipeline's share of a step."""
    cases = (Calls(full, STEPS_PER_CALL), Calls(ready, STEPS_PER_CALL))
    times = benchmark.pairs(*cases, sizes["rounds"], sizes["seconds"])
    shares = [100 * (1 - b / a) for a, b in times]
    of_call = statistics.median(a for a, _ in times)
    # What a call does before its first step is to draw the order of the examples.
    order = [100 * x / of_call for x in seconds_of_no_step(full, sizes["rounds"])]
    return [
        benchmark.row(f"{name}: the pipeline's share of a step", shares, "%", target),
        benchmark.row(f"{name}: of that, the order", order, "%"),
        benchmark.row(f"{name}: a step", [1e3 * a / STEPS_PER_CALL for a, _ in times], "ms"),
    ]


def measure_calls(name: str, program: Program, sizes: Any, target: Any) -> list[Row]:
    """What calls add to their steps."""
    size, steps = STEPS_PER_CALL, 2 * STEPS_PER_CALL
    program.seconds([steps])  # the first is slow
    steps *= max(1, round(sizes["seconds"] / program.seconds([steps])))
    ways = {"one": [steps], "some": [size] * (steps // size), "many": [1] * steps}
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(sizes["rounds"]):
        for way, calls in ways.items():
            times[way].append(program.seconds(calls))
    of_call = statistics.median(times["one"]) * size / steps
    empty = seconds_of_no_step(program, sizes["rounds"])
    python = [100 * x / of_call for x in empty]

    def added(way: str) -> list[float]:
        return [100 * (a / b - 1) for a, b in zip(times[way], times["one"], strict=True)]

    return [
        benchmark.row(f"{name}: Python in calls of {size}", python, "%", target),
        benchmark.row(f"{name}: a call of no step", [1e3 * x for x in empty], "ms"),
        benchmark.row(f"{name}: added by calls of {size}", added("some"), "%"),
        benchmark.row(f"{name}: added by calls of 1", added("many"), "%"),
    ]


def measure_training(parts: Sequence[str], sizes: Any, home: pathlib.Path) -> Iterator[list[Row]]:
    """The rows of "step" and "calls"."""
    file, count = home / "images.npz", sizes["images"]
    images = np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), np.uint8)
    np.savez(file, images=images, labels=np.arange(count) % 10)

    def vit(augment: str) -> Training:
        config = gnp_config.load(f"{ROOT}/configs/cifar_vit.py:scale=small,gr=off")
        config.data.update(name="npz", data_dir=str(file), augment=augment, test="train[:10%]")
        config.data.batch_size = sizes.get("batch_size", config.data.batch_size)
        config.model.depth = sizes.get("depth", config.model.depth)
        return Training(config)

    basic = vit("basic")
    ready = basic.ready()
    if "step" in parts:
        yield measure_step("small ViT", basic.full(), ready, sizes, 3.0)
    if "heavy" in parts:
        heavy = vit("heavy")
        name = "small ViT, augment=heavy"
        yield measure_step(name, heavy.full(), heavy.ready(), sizes, None)
    if "calls" in parts:
        yield measure_calls("small ViT", ready, sizes, 1.0)
        digits = Training(gnp_config.load(f"{ROOT}/configs/digits.py:gr=off"))
        yield measure_calls("digits", digits.ready(), sizes, None)


def write_jpegs(folder: pathlib.Path, count: int) -> list[pathlib.Path]:
    """Parts of a picture with structure of every scale, in ten classes."""
    rng = np.random.default_rng(0)
    height, width = 1500, 2000
    picture = rng.normal(128, 8, (height, width, 3))
    for cells, contrast in ((10, 60), (30, 30), (100, 20), (400, 15)):
        for c in range(3):
            coarse = Image.fromarray(rng.normal(0, contrast, (cells, cells)).astype(np.float32))
            picture[..., c] += np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))
    pixels = np.clip(picture, 0, 255).astype(np.uint8)
    paths = []
    for i in range(count):
        h, w = rng.integers((300, 350), (400, 450))
        top, left = rng.integers((0, 0), (height - h, width - w))
        path = folder / "train" / f"class_{i % 10}" / f"{i:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[top : top + h, left : left + w]).save(path, quality=95)
        paths.append(path)
    return paths


def crop_by_pillow(path: pathlib.Path, rng: np.random.Generator, *, draft: bool) -> np.ndarray:
    """The random resized crop of an image in a file, as one would write it."""
    with Image.open(path) as image:
        width, height = image.size
        area = width * height * rng.uniform(MIN_AREA, 1)
        ratio = math.exp(rng.uniform(-1, 1) * math.log(4 / 3))
        across, down = min(math.sqrt(area * ratio), width), min(math.sqrt(area / ratio), height)
        left, top = rng.uniform(0, width - across), rng.uniform(0, height - down)
        if draft:
            image.draft("RGB", (math.ceil(width * CROP / across), math.ceil(height * CROP / down)))
        x, y = image.width / width, image.height / height
        box = (left * x, top * y, (left + across) * x, (top + down) * y)
        rgb = image.convert("RGB")
        return np.asarray(rgb.resize((CROP, CROP), Image.Resampling.BILINEAR, box=box))


def seconds_by_pillow(
    paths: Sequence[pathlib.Path], count: int, seed: int, *, draft: bool
) -> float:
    """The wall time of an image, over this many in a loop."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(paths))
    start = time.perf_counter()
    for i in range(count):
        crop_by_pillow(paths[order[i % len(paths)]], rng, draft=draft)
    return (time.perf_counter() - start) / count


def make_stream(source: gnp_data.Source, augment: str, size: int) -> loading.StreamedData:
    """The data set as a run streams it, with a worker for each core."""
    mesh = make_mesh(1, batch_size=BATCH)
    data = loading.load_images(
        source,
        keep="false",
        batch_size=BATCH,
        eval_batch_size=BATCH,
        image_size=size,
        operations=gnp_data.parse_augment(augment),
        seed=0,
        num_steps=10**6,
        replicated=replicated(mesh),
        over_batch=over_batch(mesh),
    )
    assert isinstance(data, loading.StreamedData)
    return data


def seconds_streamed(data: loading.StreamedData, batches: int) -> tuple[float, float]:
    """The wall time until the first batch, and of an image once all workers are under way."""
    start = time.perf_counter()
    with contextlib.closing(data.train_feed(0, 10**6)) as feed:
        jax.block_until_ready(feed.get())
        first = time.perf_counter() - start
        for _ in range(4 * data.num_workers):  # what was made while the last of them began
            jax.block_until_ready(feed.get())
        start = time.perf_counter()
        for _ in range(batches):
            jax.block_until_ready(feed.get())
        return first, (time.perf_counter() - start) / (batches * BATCH)


def rates(name: str, seconds: Sequence[float]) -> Row:
    """Images a second, from the wall times of an image."""
    return benchmark.row(name, [1 / x for x in seconds], "images/s")


def measure_jpeg(sizes: Any, home: pathlib.Path) -> list[Row]:
    """The rows of "jpeg"."""
    paths = write_jpegs(home / "jpegs", sizes["jpegs"])
    source = gnp_data.open_source("folder", str(home / "jpegs"), image_size=CROP)
    data = make_stream(source, "random_resized_crop,flip", CROP)
    workers, count = data.num_workers, sizes["batches"] * BATCH // 2
    plain = functools.partial(seconds_by_pillow, paths, count, draft=False)
    draft = functools.partial(seconds_by_pillow, paths, count, draft=True)
    times: dict[str, list[float]] = {}

    def timed(name: str, seconds: float) -> None:
        times.setdefault(name, []).append(seconds)

    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        pool.map(plain, range(workers), chunksize=1)  # the first is slow
        for _ in range(sizes["starts"]):
            first, streamed = seconds_streamed(data, sizes["batches"])
            timed("first", first)
            timed("streamed", streamed)
            timed("loop", pool.apply(plain, (0,)))
            timed("loop with draft", pool.apply(draft, (0,)))
            together = pool.map(plain, range(workers), chunksize=1)
            timed(f"{workers} loops at once", statistics.mean(together) / workers)

    def ratio(other: str, scale: float = 1.0) -> list[float]:
        return [scale * b / a for a, b in zip(times["streamed"], times[other], strict=True)]

    rows = []
    for other, target in (("loop", 0.9), ("loop with draft", None)):
        name = f"JPEGs streamed / ({workers} x Pillow in a {other})"
        rows.append(benchmark.row(name, ratio(other, 1 / workers), "ratio", target, at_least=True))
    at_once = f"{workers} loops at once"
    rows.append(benchmark.row(f"JPEGs streamed / Pillow in {at_once}", ratio(at_once), "ratio"))
    rows.append(rates("JPEGs streamed", times["streamed"]))
    for other in ("loop", "loop with draft", at_once):
        rows.append(rates(f"JPEGs by Pillow, {other}", times[other]))
    rows.append(benchmark.row("JPEGs streamed: until the first batch", times["first"], "s"))
    return rows


def write_pngs(folder: pathlib.Path, count: int) -> None:
    """A `cifar10` of noise as TFDS prepares it."""
    rng = np.random.default_rng(0)

    def examples() -> Iterator[tuple[int, dict[str, Any]]]:
        for i in range(count):
            png = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(png, "PNG")
            png.seek(0)
            yield i, {"id": f"train_{i:05d}", "image": png, "label": i % 10}

    builder = tfds.builder_cls("cifar10")(data_dir=str(folder))
    builder._split_generators = lambda _: {"train": examples()}
    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):
        builder.download_and_prepare(file_format="array_record")


def seconds_by_tfds(folder: pathlib.Path) -> float:
    """The wall time of an image of `tfds.data_source`, one by one."""
    source = tfds.data_source("cifar10", split="train", data_dir=str(folder))
    start = time.perf_counter()
    examples = [source[i] for i in range(len(source))]
    return (time.perf_counter() - start) / len(examples)


def seconds_decoded(source: gnp_data.Source, home: pathlib.Path) -> float:
    """The wall time of an image when all are decoded into memory and an empty cache."""
    with (
        tempfile.TemporaryDirectory(dir=home) as cache,
        mock.patch.dict(os.environ, XDG_CACHE_HOME=cache),
    ):
        start = time.perf_counter()
        splits = resident.load(source)
        return (time.perf_counter() - start) / len(splits["train"].labels)


START = """
import sys, time
from gnp import data
from gnp.data import resident
start = time.perf_counter()
resident.load(data.open_source("cifar10", sys.argv[1]))
print(time.perf_counter() - start)
"""


def seconds_of_a_start(folder: pathlib.Path, cache: str) -> float:
    """The wall time from a name to arrays in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", START, folder],
        env=os.environ | {"XDG_CACHE_HOME": cache},
        stdout=subprocess.PIPE,
        check=True,
    )
    return float(done.stdout)


def measure_cifar(sizes: Any, home: pathlib.Path) -> list[Row]:
    """The rows of "cifar"."""
    folder = home / "pngs"
    write_pngs(folder, sizes["pngs"])
    source = gnp_data.open_source("cifar10", str(folder)).select(train="train")
    data = make_stream(source, "basic", 32)
    pairs: dict[str, list[tuple[float, float]]] = {"decoded": [], "streamed": []}
    starts = []
    for _ in range(sizes["starts"]):
        pairs["decoded"].append((seconds_decoded(source, home), seconds_by_tfds(folder)))
        _, streamed = seconds_streamed(data, sizes["batches"])
        pairs["streamed"].append((streamed, seconds_by_tfds(folder)))
        with tempfile.TemporaryDirectory(dir=home) as cache:
            starts.append([seconds_of_a_start(folder, cache) for _ in range(2)])
    rows = []
    for name, seconds in pairs.items():
        ratios = [theirs / ours for ours, theirs in seconds]
        rows.append(benchmark.row(f"PNGs {name}, images/s / tfds.data_source", ratios, "ratio"))
        rows.append(rates(f"PNGs {name}", [ours for ours, _ in seconds]))
    by_tfds = [theirs for seconds in pairs.values() for _, theirs in seconds]
    return [
        *rows,
        rates("PNGs by tfds.data_source", by_tfds),
        benchmark.row("second start / first", [b / a for a, b in starts], "ratio"),
        benchmark.row("first start, the cache empty", [a for a, _ in starts], "s"),
        benchmark.row("second start, the cache filled", [b for _, b in starts], "s", 2.0),
    ]


def main() -> int:
    """Measures, prints, writes."""
    parser = Parser("scripts/bench_data.py", __doc__ or "")
    parser.prog = "python scripts/bench_data.py"
    benchmark.add_flags(parser, rounds=(15, 5))
    parser.add_argument("--parts", help=f"only these of {','.join(PARTS)}")
    parser.add_argument("--starts", type=int, help="rounds that start processes (7; quick: 2)")
    parser.add_argument("--images", type=int, help="on the device (50,000)")
    parser.add_argument("--batch_size", type=int, help="of the ViT (the recipe's, 128)")
    parser.add_argument("--depth", type=int, help="of the ViT (the recipe's, 4)")
    parser.add_argument("--jpegs", type=int, help="files (2,000; quick: 500)")
    parser.add_argument("--pngs", type=int, help="records (10,000; quick: 4,000)")
    parser.add_argument("--batches", type=int, help=f"of {BATCH} streamed a round (48; quick: 16)")
    sizes = benchmark.sizes(
        parser.parse_args(),
        {
            **{"rounds": 15, "seconds": 1.0, "starts": 7, "images": 50_000},
            **{"jpegs": 2000, "pngs": 10_000, "batches": 48, "parts": ",".join(PARTS)},
        },
        {
            **{"rounds": 5, "seconds": 0.3, "starts": 2},
            **{"jpegs": 500, "pngs": 4000, "batches": 16},
        },
    )
    parts = sizes["parts"].split(",")
    for part in parts:
        if part not in PARTS:
            raise unknown("part", part, PARTS)

    with (
        benchmark.opened(sizes.get("json")) as file,
        tempfile.TemporaryDirectory(prefix="gnp-bench-") as name,
    ):
        home = pathlib.Path(name)
        print(f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores", flush=True)
        for part, measure in (("jpeg", measure_jpeg), ("cifar", measure_cifar)):
            if part in parts:
                benchmark.report(measure(sizes, home), file)
        if not {"step", "heavy", "calls"}.isdisjoint(parts):
            for rows in measure_training(parts, sizes, home):
                benchmark.report(rows, file)
    return 0


if __name__ == "__main__":
    run(main)
