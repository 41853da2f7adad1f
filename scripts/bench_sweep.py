"""What it gains to train many seeds in one compiled program, `gnp.training.vmapped`.

    python scripts/bench_sweep.py

Two comparisons of seeds that are vmapped with the same seeds one by one. Of the train steps alone:
a step of all seeds against as many steps of one, timed in turn; the figure is the median of the
pairs. And of whole runs from nothing, in new processes with an empty cache of compiled programs:
starting, compiling, training, evaluating, saving; one by one in a process each, and all in one.
"""

import os
import subprocess
import sys
import tempfile
import time

import benchmark
import jax
from benchmark import Row
from ml_collections import ConfigDict

from gnp import config as gnp_config
from gnp.command_line import Parser, run
from gnp.errors import unknown
from gnp.memory import keep_freed_memory
from gnp.training import vmapped
from gnp.training.compilation import compiled
from gnp.training.experiment import Experiment, make_experiment
from gnp.training.trial import Program

PARTS = ("steps", "runs")
STEPS = 16  # of a call of the compiled program

# The runs of a process: how, which configuration, where to, seeds, epochs.
RUNS = """
import sys
from gnp.environment import set_up
set_up()
from gnp import config
from gnp.training import train, vmapped
how, path, out, epochs, *seeds = sys.argv[1:]
overrides = [("epochs", epochs), ("mesh.data", "1")]
configs = [config.load(path, [*overrides, ("seed", seed)]) for seed in seeds]
workdirs = [f"{out}/{seed}" for seed in seeds]
if how == "vmapped":
    vmapped.train(configs, workdirs)
else:
    for one, workdir in zip(configs, workdirs, strict=True):
        train(one, workdir)
"""


class Steps:
    """The train steps of runs, by one program or, `times` over, those of one run."""

    def __init__(self, program: Program, experiments: list[Experiment], times: int):
        data = experiments[0].load_data()
        self._state = program.state([_Nothing()] * len(experiments), None)
        self._inputs = data.train_input(), STEPS, *program.arguments
        call = program.train_call(data, log_every=10**6, max_steps=STEPS)
        self._call, self._times = compiled(call.lower(self._state, *self._inputs)), times

    def seconds(self, steps: int) -> float:
        """The wall time of a call for all runs, over this many."""
        began = time.perf_counter()
        for _ in range(steps * self._times):
            self._state, report = self._call(self._state, *self._inputs)
            jax.block_until_ready(report)
        return (time.perf_counter() - began) / steps


class _Nothing:
    """The checkpoints of a run that has none."""

    def steps(self) -> list[int]:
        return []


def measure_steps(configs: list[ConfigDict], rounds: int, seconds: float) -> list[Row]:
    """Ratios of the times of steps; below 1 it gains."""
    first = make_experiment(configs[0])
    experiments = [first, *(first.with_config(config) for config in configs[1:])]
    cases = (
        Steps(vmapped.Stack(experiments), experiments, 1),
        Steps(Program(first), [first], len(configs)),
    )
    times = benchmark.pairs(*cases, rounds, seconds)
    name = f"steps of {len(configs)} seeds, vmapped / one by one"
    return [benchmark.row(name, [a / b for a, b in times], "")]


def wall_time(how: str, path: str, seeds: list[int], epochs: float) -> float:
    """Seconds of the processes that train the seeds, from nothing."""
    groups = [[seed] for seed in seeds] if how == "processes" else [seeds]
    with tempfile.TemporaryDirectory() as home:
        environment = os.environ | {"XDG_CACHE_HOME": home}
        environment.pop("JAX_COMPILATION_CACHE_DIR", None)
        began = time.perf_counter()
        for group in groups:
            arguments = [how, path, f"{home}/runs", str(epochs), *map(str, group)]
            subprocess.run(
                [sys.executable, "-c", RUNS, *arguments],
                env=environment,
                check=True,
                stderr=subprocess.DEVNULL,
            )
        return time.perf_counter() - began


def measure_runs(path: str, seeds: int, epochs: float, rounds: int) -> list[Row]:
    """Ratios of the times of whole runs; below 1 it gains."""
    ways = "vmapped", "processes", "one process"
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way in ways:
            times[way].append(wall_time(way, path, list(range(seeds)), epochs))
    rows = [benchmark.row(f"{seeds} runs, vmapped", times["vmapped"], "s")]
    for way in ways[1:]:
        ratios = [a / b for a, b in zip(times["vmapped"], times[way], strict=True)]
        name = way if way == "one process" else "a process each"
        rows.append(benchmark.row(f"{seeds} runs, vmapped / one by one in {name}", ratios, ""))
    return rows


def main() -> int:
    """Measures, prints, writes."""
    parser = Parser("scripts/bench_sweep.py", __doc__ or "")
    parser.prog = "python scripts/bench_sweep.py"
    benchmark.add_flags(parser, rounds=(5, 1))
    parser.add_argument("--config", default="configs/digits.py", help="the runs' configuration")
    parser.add_argument("--seeds", type=int, help="runs (8)")
    parser.add_argument("--epochs", type=float, help="of whole runs (8; quick: 2)")
    parser.add_argument("--parts", default=",".join(PARTS), help="steps, runs (both)")
    flags = parser.parse_args()
    sizes = benchmark.sizes(
        flags,
        {"rounds": 5, "seconds": 1.0, "seeds": 8, "epochs": 8.0},
        {"rounds": 1, "seconds": 0.3, "epochs": 2.0},
    )
    parts = flags.parts.split(",")
    for part in parts:
        if part not in PARTS:
            raise unknown("--parts", part, PARTS)
    keep_freed_memory()
    path, seeds = flags.config, sizes["seeds"]
    configs = [
        gnp_config.load(path, [("mesh.data", "1"), ("seed", str(seed))]) for seed in range(seeds)
    ]
    rows: list[Row] = []
    with benchmark.opened(flags.json) as file:
        if "steps" in parts:
            rows += measure_steps(configs, sizes["rounds"], sizes["seconds"])
        if "runs" in parts:
            rows += measure_runs(path, seeds, sizes["epochs"], sizes["rounds"])
        benchmark.report(rows, file)
    return 0


if __name__ == "__main__":
    run(main)
