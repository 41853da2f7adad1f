"""How a step is divided over devices: its time, what they exchange, and a pod on paper.

The parts "scaling" and "pod" of `scripts/bench_train.py`, which says what they measure. Run by
itself this file is one of the processes that "scaling" starts, with its number of devices.
"""

import contextlib
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import benchmark
import jax
from benchmark import Row
from train_steps import Case, OurSteps, Task, make_config

from gnp import models
from gnp.errors import UserError

DEVICES = (1, 2, 4, 8)
KINDS = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")
# Bytes of the gradients that a step is to exchange, over those of the parameters. A model with
# BatchNorm exchanges its statistics too.
TARGETS = {"plain": 1.0, "GR": 2.0, "GR, a group a device": 1.0}

_OPERATION = re.compile(rf"\s*(?:ROOT )?%?\S+ = (.*?) ({'|'.join(KINDS)})(-done)?\(")
_SHAPE = re.compile(r"\b[a-z]+(\d*)\w*\[([\d,]*)\]")  # "pred" has no number of bits


# --- Forced devices of the host -----------------------------------------------------------------


class Collective(NamedTuple):
    """An exchange between devices in a compiled program.

    Attributes:
      kind: one of `KINDS`.
      array_bytes: of the results that are arrays: gradients, in a train step.
      scalar_bytes: of those that are scalars: metrics, norms.
    """

    kind: str
    array_bytes: int
    scalar_bytes: int


def collectives(text: str) -> list[Collective]:
    """Those of an optimised program's text.

    Bytes are those of the results, all of a tuple together. An asynchronous pair is counted once,
    by its end, whose result is the result alone. What is in a branch or a loop stands there once.
    """
    found = []
    for line in text.splitlines():
        if match := _OPERATION.match(line):
            sizes = [0, 0]
            for bits, shape in _SHAPE.findall(match[1]):
                lengths = [int(length) for length in shape.split(",") if length]
                sizes[not lengths] += int(bits or 8) // 8 * math.prod(lengths)
            found.append(Collective(match[2], *sizes))
    return found


class Worker:
    """A process whose host has so many devices, and which makes train steps when it is told to."""

    def __init__(self, devices: int, arguments: dict[str, Any]):
        flags = os.environ.get("XLA_FLAGS", "").split()
        flags = [flag for flag in flags if "host_platform_device_count" not in flag]
        flags.append(f"--xla_force_host_platform_device_count={devices}")
        self._process = subprocess.Popen(
            [sys.executable, __file__, json.dumps(arguments | {"devices": devices})],
            env=os.environ | {"XLA_FLAGS": " ".join(flags), "JAX_PLATFORMS": "cpu"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.programs = json.loads(self._answer())

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            # Killed, that is by the system, which has no memory left.
            raise MemoryError("process was killed") if code == -9 else RuntimeError("process ended")
        return line

    def seconds(self, steps: int) -> float:
        """The wall time of a step, over this many."""
        assert self._process.stdin is not None
        print(steps, file=self._process.stdin, flush=True)
        return float(self._answer())

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def work(arguments: dict[str, Any]) -> None:
    """What a worker does: answers with what its programs exchange, then with times of steps."""
    case, sizes = Case(*arguments["case"]), arguments["overrides"]
    task = case.task(arguments["batch_size"], sizes)
    steps = steps_over(task, "plain", arguments["devices"])
    programs = {}
    for method in arguments["methods"]:
        ours = steps if method == "plain" else steps_over(task, method, arguments["devices"])
        params = sum(x.nbytes for x in jax.tree.leaves(ours.state.params))
        only_gradients = not ours.state.model_state
        programs[method] = params, only_gradients, collectives(ours.program.as_text())
    print(json.dumps(programs), flush=True)
    for line in sys.stdin:
        print(steps.seconds(int(line)), flush=True)


def steps_over(task: Task, method: str, devices: int) -> OurSteps:
    """The train steps over so many devices; a call is one step, so that there is no loop."""
    config = make_config("off" if method == "plain" else "none")
    if method == "GR, a group a device":
        config.gr.num_groups = devices
    return OurSteps(task, config, devices=devices, steps_per_call=1)


def check_batch_size(batch_size: int) -> None:
    """Raises a `UserError` for one that cannot be divided."""
    if batch_size % max(DEVICES):
        raise UserError(
            f"--batch_size is {batch_size}, which {max(DEVICES)} devices do not divide; use a "
            f"multiple of {max(DEVICES)}, or leave out the part scaling"
        )


def measure_scaling(task: Task, sizes: Any) -> Iterator[list[Row]]:
    """The rows of "scaling"."""
    arguments = {"case": task.case, "overrides": task.overrides, "batch_size": task.batch_size}
    with contextlib.ExitStack() as stack:
        workers = {}
        for devices in DEVICES:  # one after another: compiling takes all cores
            methods = list(TARGETS) if devices == max(DEVICES) else []
            worker = Worker(devices, arguments | {"methods": methods})
            workers[devices] = stack.enter_context(contextlib.closing(worker))
        for devices in DEVICES[1:]:
            both = workers[devices], workers[DEVICES[0]]
            times = benchmark.pairs(*both, sizes["rounds"], sizes["seconds"])
            name = f"{task.label}: a step on {devices} forced devices / on 1"
            yield [benchmark.row(name, [x / y for x, y in times], "ratio")]
        programs = workers[max(DEVICES)].programs
    for method, (params, only_gradients, found) in programs.items():
        target = TARGETS[method] if only_gradients else None
        found = [Collective(*c) for c in found]
        yield rows_of_program(f"{task.label}: {method}", params, found, target)


def rows_of_program(
    name: str, params: int, found: Sequence[Collective], target: float | None
) -> list[Row]:
    """What the devices exchange in a step; `params` is in bytes."""
    rows = []
    for what, some in (
        ("of arrays", [c for c in found if c.array_bytes]),
        ("of scalars alone", [c for c in found if not c.array_bytes]),
    ):
        kinds = [f"{sum(c.kind == kind for c in some)} {kind}" for kind in KINDS]
        kinds = [text for text in kinds if not text.startswith("0 ")]
        unit = f"operations ({', '.join(kinds)})" if kinds else "operations"
        rows.append(Row(f"{name}: exchanges {what}", len(some), unit))
    # Rounded, since it is to be met exactly: less would be a gradient that is not exchanged.
    over = round(sum(c.array_bytes for c in found) / params, 4)
    rows.append(Row(f"{name}: arrays exchanged", over, "sizes of the parameters", target=target))
    scalars = sum(c.scalar_bytes for c in found)
    return [*rows, Row(f"{name}: scalars exchanged", scalars, "bytes")]


# --- A pod on paper -----------------------------------------------------------------------------


class Chip(NamedTuple):
    """What a chip can do.

    Attributes:
      name: of the chip, and of the way between chips that the bandwidth is of.
      flops: FLOP/s of dense matrix products in bfloat16.
      bandwidth: bytes/s that a chip sends in a ring, while it receives as many.
    """

    name: str
    flops: float
    bandwidth: float


CHIPS = (
    # Google Cloud's documentation, "TPU v5e": 197 TFLOP/s in bf16, and 1600 Gbit/s between chips:
    # four links of 400 Gbit/s. All four at once, as in rings along both axes of the torus.
    Chip("TPU v5e", 197e12, 4 * 400e9 / 8),
    # NVIDIA's data sheet of the H100 SXM: 989 TFLOP/s in bf16 without sparsity, NVLink 900 GB/s
    # in both directions together. A ring of NCCL over nodes of 8 GPUs with a network card each
    # comes near it at best, since its rings share the cards; at worst it has one card alone.
    Chip("H100, NVLink", 989e12, 450e9),
    Chip("H100, 400 Gbit/s", 989e12, 400e9 / 8),
)
UTILIZATION = 0.5
SMALL_SHARE = 0.05
PAPERS_BATCH = 256


def measure_pod(names: Sequence[str], sizes: Any) -> Iterator[list[Row]]:
    """The rows of "pod", which are computed; `sizes` are the flags, of which it has its own."""
    chips: Sequence[Chip] = CHIPS
    given = sizes.get("chip_flops"), sizes.get("bandwidth")
    if any(given):
        flops, bandwidth = given
        default = CHIPS[0]
        chips = [Chip("given chip", flops or default.flops, bandwidth or default.bandwidth)]
    for chip in chips:
        print(
            f"{chip.name}: {chip.flops / 1e12:.0f} TFLOP/s, used at {UTILIZATION:.0%}; "
            f"{chip.bandwidth / 1e9:.0f} GB/s; nothing hides behind arithmetic"
        )
        for name in names:
            for image_size in (32, 224):
                yield rows_on_paper(chip, sizes["chips"], name, image_size)


def rows_on_paper(chip: Chip, number: int, name: str, image_size: int) -> list[Row]:
    """When the second reduction of a GR step matters, if no reduction hides behind arithmetic.

    A reduction in a ring of n chips takes 2 (n − 1)/n · bytes / bandwidth. A step of GR has two
    of them and two gradients; with a group a chip (`gr.num_groups`) one reduction.
    """
    info = models.list_models()[name]
    count, gflops = info.large if image_size == 224 else info.small
    reduction = 2 * (number - 1) / number * 4 * count / chip.bandwidth
    of_an_image = 3 * 2e9 * gflops / (UTILIZATION * chip.flops)  # its gradient
    step = 2 * (PAPERS_BATCH / number * of_an_image + reduction)
    images = reduction * (1 / SMALL_SHARE - 2) / 2 / of_an_image
    label = f"{number} x {chip.name}, {name} at {image_size}"
    return [
        Row(f"{label}: a reduction", 1e3 * reduction, "ms"),
        Row(f"{label}: 2nd reduction, batch {PAPERS_BATCH}", 100 * reduction / step, "% of a step"),
        Row(f"{label}: it is {SMALL_SHARE:.0%} of a step with", images, "images a chip"),
    ]


if __name__ == "__main__":
    work(json.loads(sys.argv[1]))
