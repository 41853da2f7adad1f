"""Trains under every warmup policy with several seeds, in one process: the GR paper's Table 2.

    python scripts/cifar_record.py --out=runs/record --data_dir=~/tensorflow_datasets

The recipe is that of configs/cifar_vit.py. One compiled program trains all runs on one device:
policy and seed are among its inputs, and seeds may run side by side (jax.vmap). What is under way
is saved in OUT every minute, and what is finished is a line of OUT/results.jsonl: after Ctrl-C or
a time limit the same command goes on, and later more --seeds or --policies may be asked for.

Any field of the configuration can be set, as --config.lr.base=5e-4 or
--config.optimizer.name=rmsprop. With dropout, seeds side by side have other masks than one by one.
"""

import argparse
import dataclasses
import itertools
import json
import math
import os
import pathlib
import shlex
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from gnp import config as gnp_config
from gnp import transforms
from gnp.command_line import Parser, run
from gnp.errors import UserError, unknown
from gnp.files import lock, write_atomically
from gnp.training import flops
from gnp.training.evaluation import make_evaluate
from gnp.training.experiment import Experiment, make_experiment
from gnp.training.optimizer import Optimizer
from gnp.training.sharding import replicated
from gnp.training.state import TrainState, mean_metrics, params_sha256
from gnp.training.step import init_state, make_train_step

ROOT = pathlib.Path(__file__).parents[1]
POLICIES = gnp_config.GR_POLICIES
MAX_STEPS = 256  # of a call of the compiled program
CALL_SECONDS = 2.0  # a call lasts about so long at most, and Ctrl-C waits for its end
SAVE_SECONDS = 60.0

# Test error and its standard deviation over 5 seeds, in percent, for each of POLICIES: Zhao et al.,
# "When Will Gradient Regularization Be Harmful?", ICML 2024 (arXiv:2406.09723), Table 2. It has no
# training without GR ("off"): those are of Table 1, with learning-rate warmup as all of Table 2.
PAPER = {
    ("vit_ti", "cifar10", "adam"): "14.82 0.64 13.92 0.19 13.80 0.17 13.86 0.35 13.61 0.20",
    ("vit_ti", "cifar100", "adam"): "39.25 0.41 39.38 0.50 39.24 0.37 39.12 0.37 38.53 0.38",
    ("vit_ti", "cifar10", "rmsprop"): "16.47 0.39 15.79 0.25 15.32 0.21 15.47 0.27 15.06 0.40",
    ("vit_ti", "cifar100", "rmsprop"): "40.31 0.50 40.02 0.22 39.80 0.22 39.55 0.19 39.25 0.21",
    ("vit_s", "cifar10", "adam"): "12.07 0.53 12.40 0.17 11.72 0.38 11.47 0.04 10.68 0.49",
    ("vit_s", "cifar100", "adam"): "37.17 0.24 36.65 0.23 36.53 0.18 36.48 0.23 35.41 0.25",
    ("vit_s", "cifar10", "rmsprop"): "15.47 0.15 14.77 0.35 14.73 0.18 14.65 0.39 14.02 0.29",
    ("vit_s", "cifar100", "rmsprop"): "38.55 0.22 37.90 0.19 37.65 0.30 37.74 0.27 37.37 0.31",
    ("vit_b", "cifar10", "adam"): "10.83 0.28 12.36 0.33 10.22 0.26 9.98 0.23 9.42 0.15",
    ("vit_b", "cifar100", "adam"): "36.70 0.17 36.65 0.26 36.18 0.37 36.03 0.30 35.75 0.20",
    ("vit_b", "cifar10", "rmsprop"): "15.76 0.25 14.97 0.25 14.42 0.11 14.55 0.39 14.34 0.24",
    ("vit_b", "cifar100", "rmsprop"): "39.03 0.34 39.04 0.35 38.36 0.22 38.50 0.15 38.24 0.21",
}


# --- The compiled program -----------------------------------------------------------------------


def schedules_at(experiment: Experiment, policy: Any, t: Any) -> tuple[jax.Array, jax.Array]:
    """The radius and the ratio of update t. `policy`, an index of POLICIES, and t may be traced."""
    gr = experiment.config.gr
    warmup_steps = experiment.steps(gr.warmup or experiment.config.lr.warmup)
    sizes = {"radius": gr.radius, "ratio": gr.ratio, "warmup_steps": warmup_steps}
    pairs = [transforms.warmup(name, **sizes) for name in POLICIES]
    values = [[x(t) if callable(x) else x for x in pair] for pair in pairs]
    radius, ratio = jnp.array(values, jnp.float32)[policy]
    return radius, ratio


def regularized(experiment: Experiment, policy: Any, t: Any) -> Optimizer:
    """The optimizer of update t under a policy, as `gnp.training.optimizer.build` chains it.

    t is given, not the transform's own count, of which each seed has its own: what decides whether
    there is a second gradient must be shared by the seeds, or `jax.vmap` would always compute it.
    """
    radius, ratio = schedules_at(experiment, policy, t)
    estimator = experiment.config.gr.estimator
    first = transforms.gradient_regularization(radius, ratio, estimator=estimator)
    tx = optax.chain(first, experiment.optimizer.tx)
    return dataclasses.replace(experiment.optimizer, tx=tx)


def over_seeds(function: Callable[..., Any], count: int) -> Callable[..., Any]:
    """`jax.vmap`; of a single seed the function as it is."""
    if count > 1:
        return jax.vmap(function)

    def alone(*args: Any) -> Any:
        result = function(*jax.tree.map(lambda x: x[0], args))
        return jax.tree.map(lambda x: x[None], result)

    return alone


class Program:
    """Initialises, trains and evaluates. `states` have the seeds along their leaves' first axis."""

    def __init__(self, experiment: Experiment):
        self.experiment, self.data = experiment, experiment.load_data()
        self.replicated = replicated(experiment.mesh)
        self._pretrained = experiment.load_pretrained()
        self._evaluate: Callable[[TrainState], Any] | None = None

        def compiled(function: Callable[..., Any], **options: Any) -> Any:
            return jax.jit(function, out_shardings=self.replicated, **options)

        self._init_one = compiled(self._make_state)
        self._stack = compiled(lambda *states: jax.tree.map(lambda *x: jnp.stack(x), *states))
        self._pick = compiled(lambda states, i: jax.tree.map(lambda x: x[i], states))
        self.train_call = compiled(self._train, donate_argnums=0)

    def init(self, seeds: Sequence[int]) -> TrainState:
        """The states before the first step. Under vmap the weights' generator would draw others."""
        return self._stack(*(self._init_one(np.uint32(seed), self._pretrained) for seed in seeds))

    def train(
        self, states: TrainState, seeds: Sequence[int], policy: str, step: int, num_steps: int
    ) -> TrainState:
        """Makes `num_steps` updates after `step`, and waits for them; the states are donated."""
        numbers = (np.int32(x) for x in (POLICIES.index(policy), step, num_steps))
        data = self.data.train_input()
        states = self.train_call(states, np.array(seeds, np.uint32), *numbers, data)
        return jax.block_until_ready(states)

    def each(self, states: TrainState) -> Iterator[TrainState]:
        """The states of single seeds, one after another to save memory."""
        return (self._pick(states, i) for i in range(len(states.step)))

    def evaluate(self, state: TrainState) -> dict[str, float | None]:
        """Loss and error of a single seed's state over all test examples."""
        if self._evaluate is None:
            arguments = self.experiment.model, self.data, "test", self.experiment.mesh, state
            self._evaluate = make_evaluate(*arguments)
        return mean_metrics(self._evaluate(state))

    def _make_state(self, seed: jax.Array, pretrained: Any) -> TrainState:
        optimizer = regularized(self.experiment, 0, 1)  # states are alike under all policies
        model, example = self.experiment.model, self.experiment.example
        ema = self.experiment.config.ema.decay is not None
        return init_state(model, optimizer, example, seed, pretrained, ema=ema)

    def _train(
        self, states: TrainState, seeds: Any, policy: Any, step: Any, num_steps: Any, data: Any
    ) -> TrainState:
        experiment, config = self.experiment, self.experiment.config

        def batches(seed: jax.Array) -> Any:
            own: Any = self.data.train_batches
            preprocessing = dataclasses.replace(own.preprocessing, seed=seed)
            return dataclasses.replace(own, seed=seed, preprocessing=preprocessing)

        def update(i: jax.Array, states: TrainState) -> TrainState:
            optimizer = regularized(experiment, policy, step + i + 1)

            def of_seed(state: TrainState, seed: jax.Array, order: jax.Array) -> TrainState:
                train_step = make_train_step(
                    experiment.model,
                    optimizer,
                    seed=seed,
                    log_every=experiment.steps(config.log.every),
                    accumulate=config.accumulate,
                    ema_decay=config.ema.decay,
                    nonfinite_limit=None,  # a seed that diverges is shown as it is
                )
                return train_step(state, batches(seed).batch(data, order[i], step + i))

            return over_seeds(of_seed, len(seeds))(states, seeds, orders)

        max_steps = min(MAX_STEPS, experiment.total_steps)
        orders = jax.vmap(lambda seed: batches(seed).order(step, max_steps))(seeds)
        return jax.lax.fori_loop(0, num_steps, update, states)


def flops_of_run(experiment: Experiment, policy: str) -> float:
    """The FLOPs of training: three times those of a forward pass for each gradient."""
    state = experiment.abstract_state
    variables = {"params": state.params, **state.model_state}
    of_image = flops.forward_flops(experiment.model, variables, experiment.example)
    updates, number = jnp.arange(1, experiment.total_steps + 1), POLICIES.index(policy)
    ratios = jax.vmap(lambda t: schedules_at(experiment, number, t)[1])(updates)
    gradients = len(updates) + int((ratios != 0).sum())
    return flops.step_flops(of_image * experiment.examples_per_step, gradients)


def seconds_of_step(program: Program, seeds: Sequence[int]) -> float:
    """The time of a step with two gradients, for each of the seeds; infinite if out of memory."""
    try:
        states = program.train(program.init(seeds), seeds, "none", 0, 1)  # compiles; is slow
        for num_steps in (2, 8, 32, 128):
            began = time.perf_counter()
            states = program.train(states, seeds, "none", 0, num_steps)
            seconds = time.perf_counter() - began
            if seconds > CALL_SECONDS / 2:
                break
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return math.inf
    return seconds / num_steps / len(seeds)


def faster(program: Program, seeds: int) -> int:
    """How many seeds to train side by side: all of them or one, whatever takes less time here."""
    times = [1000 * seconds_of_step(program, range(count)) for count in (seeds, 1, seeds, 1)]
    together, alone = min(times[::2]), min(times[1::2])
    print(
        f"a step of a seed takes {together:.2f} ms with {seeds} seeds side by side, "
        f"{alone:.2f} ms one by one",
        flush=True,
    )
    return seeds if together < alone else 1


# --- The runs -----------------------------------------------------------------------------------


class Stop:
    """Called, says whether to stop: after so many minutes, or the first Ctrl-C or SIGTERM."""

    def __init__(self, minutes: float):
        self.interrupted = False
        self._end = time.monotonic() + 60 * minutes
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def __call__(self) -> bool:
        """Whether to stop."""
        return self.interrupted or time.monotonic() > self._end

    def _handle(self, number: int, frame: Any) -> None:
        self.interrupted = True
        os.write(2, b"\nstopping after the steps under way; again to stop at once\n")
        signal.signal(number, signal.SIG_DFL)


@dataclasses.dataclass
class Group:
    """Some seeds of a policy, trained side by side.

    `seconds` are of training, for all of them; `curves` has a list of evaluations for each.
    """

    policy: str
    seeds: list[int]
    curves: list[list[dict[str, Any]]]
    step: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        return f"{self.policy}, seed{'s' * (len(self.seeds) > 1)} {str(self.seeds)[1:-1]}"


def save(path: pathlib.Path, group: Group, states: TrainState) -> None:
    """Writes a group in one step: an interruption leaves the old file or the new one."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        np.savez(file, group=json.dumps(dataclasses.asdict(group)), **_by_name(states))
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def restore(path: pathlib.Path, program: Program, group: Group) -> TrainState:
    """The states of the group that was saved."""
    like = jax.eval_shape(lambda: program.init(group.seeds))
    with np.load(path) as arrays:
        # Copies, since their buffers are donated to the train call.
        leaves = [jnp.array(arrays[name]) for name in _by_name(like)]
    return jax.device_put(jax.tree.unflatten(jax.tree.structure(like), leaves), program.replicated)


def _by_name(tree: Any) -> dict[str, Any]:
    return {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def train(
    program: Program, group: Group, path: pathlib.Path, stop: Callable[[], bool]
) -> list[dict[str, Any]]:
    """Trains a group, from where it was saved in `path` if it was; returns its results.

    When `stop`, which is asked after each call, says so, it is saved and there are no results.
    """
    total, eval_every = program.experiment.total_steps, program.experiment.steps("10%")
    states = restore(path, program, group) if group.step else program.init(group.seeds)
    states = program.train(states, group.seeds, group.policy, 0, 0)  # compiles
    longest, saved = 1, time.monotonic()
    while group.step < total:
        until = min(group.step + longest, total, (group.step // eval_every + 1) * eval_every)
        num_steps, began = until - group.step, time.perf_counter()
        states = program.train(states, group.seeds, group.policy, group.step, num_steps)
        seconds = time.perf_counter() - began
        longest = min(max(int(num_steps * CALL_SECONDS / seconds), 1), MAX_STEPS)
        group.step, group.seconds = until, group.seconds + seconds
        if until == total or until % eval_every == 0:
            for curve, state in zip(group.curves, program.each(states), strict=True):
                of_training = {"train_loss": mean_metrics(state.metrics)["loss"]}
                curve.append({"step": until} | program.evaluate(state) | of_training)
            errors = " ".join(f"{100 * curve[-1]['error']:.2f}" for curve in group.curves)
            print(f"{group}: step {until} of {total}, test error {errors} %", flush=True)
        stopping = stop()
        if until < total and (stopping or time.monotonic() - saved > SAVE_SECONDS):
            save(path, group, states)
            saved = time.monotonic()
            if stopping:
                return []
    return _results(program, group, states)


def _results(program: Program, group: Group, states: TrainState) -> list[dict[str, Any]]:
    """A row for each seed; one of several side by side has its share of their seconds."""
    experiment, seconds = program.experiment, group.seconds / len(group.seeds)
    shared = {
        "steps": group.step,
        "seconds": seconds,
        "images_per_second": group.step * experiment.examples_per_step / seconds,
        "flops": flops_of_run(experiment, group.policy),
        "side_by_side": len(group.seeds),
        "dtype": experiment.config.dtype,
        "device": experiment.mesh.devices.flat[0].device_kind,
    }
    rows = []
    for seed, curve, state in zip(group.seeds, group.curves, program.each(states), strict=True):
        last = {name: curve[-1][name] for name in ("error", "loss", "train_loss")}
        ends = {"params_sha256": params_sha256(state.params), "curve": curve}
        rows.append({"policy": group.policy, "seed": seed} | last | shared | ends)
    return rows


def record(
    experiment: Experiment,
    out: pathlib.Path,
    policies: Sequence[str],
    seeds: int,
    side_by_side: int | None,
    stop: Callable[[], bool],
) -> list[dict[str, Any]]:
    """Trains what `out` has no results of, until `stop`; returns all results that are there.

    Args:
      experiment: without gradient regularization.
      out: the folder of the results, and of what is under way.
      policies: some of POLICIES.
      seeds: how many runs of each.
      side_by_side: how many seeds at once; None for as many as before, or for what is faster.
      stop: whether to stop, asked after each call.
    """
    path, under_way = out / "results.jsonl", out / "under_way.npz"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    taken, groups = {(row["policy"], row["seed"]) for row in rows}, []
    if under_way.exists():
        with np.load(under_way) as arrays:
            saved = Group(**json.loads(str(arrays["group"])))
        if (saved.policy, saved.seeds[0]) not in taken:
            groups.append(saved)
            taken |= {(saved.policy, seed) for seed in saved.seeds}
    if not groups and taken.issuperset(itertools.product(policies, range(seeds))):
        return rows

    print(f"preparing {experiment.source.name}, compiling …", file=sys.stderr, flush=True)
    program = Program(experiment)
    if side_by_side is None:
        earlier = len(groups[0].seeds) if groups else rows[-1]["side_by_side"] if rows else None
        side_by_side = earlier or (faster(program, seeds) if seeds > 1 else 1)
    for first in range(0, seeds, side_by_side):
        together = range(first, min(first + side_by_side, seeds))
        for policy in policies:
            left = [seed for seed in together if (policy, seed) not in taken]
            if left:
                groups.append(Group(policy, left, [[] for _ in left]))
    for group in groups:
        new = [] if stop() else train(program, group, under_way, stop)
        if not new:
            break
        rows += new
        write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))
        under_way.unlink(missing_ok=True)
    return rows


# --- The command line ---------------------------------------------------------------------------


def main() -> int:
    """Trains what is not yet trained, then prints the table."""
    flags, config = parse(sys.argv[1:])
    experiment = make_experiment(config)
    claim(flags.out, config)
    stop = Stop(flags.minutes)
    with lock(flags.out):
        rows = record(experiment, flags.out, flags.policies, flags.seeds, flags.vmap, stop)
    asked = set(itertools.product(flags.policies, range(flags.seeds)))
    rows = [row for row in rows if (row["policy"], row["seed"]) in asked]
    if rows:
        report(config, flags.policies, rows, flags.json)
    if left := len(asked) - len(rows):
        print(f"\nstopped and saved; {left} of {len(asked)} runs are left. To go on:")
        print(f"  {shlex.join(sys.orig_argv)}")
    return 130 if left and stop.interrupted else 0


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, ConfigDict]:
    """The flags, and the configuration of all runs, without gradient regularization.

    Raises:
      UserError: for what is wrong in them.
    """
    parser = Parser("scripts/cifar_record.py", __doc__)
    parser.prog = "python scripts/cifar_record.py"
    add = parser.add_argument
    add("--out", required=True, type=pathlib.Path, help="folder of the record")
    add("--data_dir", help="folder of the TensorFlow Datasets")
    add("--data", default="cifar10", help="cifar10 or cifar100")
    add("--model", default="vit_ti", help="vit_ti, vit_s or vit_b")
    add("--scale", default="paper", help="paper or small, as of configs/cifar_vit.py")
    add("--policies", default=",".join(POLICIES), help="some of off,none,r,lambda,zero")
    add("--seeds", type=int, default=5, help="runs of each policy (5)")
    add("--epochs", type=float, help="of a run (300); the warmup keeps its share")
    add("--dtype", default="float32", help="of the model's arithmetic: float32 or bfloat16")
    add("--vmap", default="auto", help="seeds side by side; auto: all or one, what is faster")
    add("--minutes", type=float, default=math.inf, help="stop after so many, saved")
    add("--json", type=pathlib.Path, help="file for the table, an object a line")
    flags, changes = parser.parse_with_fields(arguments)

    flags.policies = list(dict.fromkeys(flags.policies.split(",")))
    if flags.vmap != "auto" and not flags.vmap.isdecimal():
        raise UserError(f"--vmap is {flags.vmap!r}; write auto, or how many seeds side by side")
    flags.vmap = None if flags.vmap == "auto" else int(flags.vmap)
    for name in ("seeds", "epochs", "vmap", "minutes"):
        value = getattr(flags, name)
        if value is not None and not value > 0:
            raise UserError(f"--{name} must be above 0, got {value:g}")
    for policy in flags.policies:
        if policy not in POLICIES:
            raise unknown("policy", policy, POLICIES)

    recipe = f"data={flags.data},model={flags.model},scale={flags.scale}"
    config = gnp_config.load(f"{ROOT}/configs/cifar_vit.py:{recipe}")
    if flags.epochs is not None:
        warmup = gnp_config.parse_duration(config.lr.warmup).value * flags.epochs / config.epochs
        config.epochs, config.lr.warmup = flags.epochs, f"{warmup:.6f}ep"
    config.dtype, config.data.data_dir = flags.dtype, flags.data_dir
    for field, text in changes:
        if field in ("seed", "gr.policy"):
            raise UserError(f"--config.{field} differs from run to run; set --seeds and --policies")
        gnp_config.override(config, field, text)
    config.data.resident = "true"
    config.mesh.update({"data": 1, "fsdp": 1})
    for policy in (*flags.policies, "off"):
        config.gr.policy = policy
        gnp_config.validate(config)
    return flags, config


def claim(out: pathlib.Path, config: ConfigDict) -> None:
    """Makes the folder this configuration's, or says why it cannot be."""
    path, config = out / "config.json", config.copy_and_resolve_references()
    config.data.data_dir = None  # the data may move
    try:
        out.mkdir(parents=True, exist_ok=True)
        if path.exists():
            there = gnp_config.from_json(path.read_text(), where=str(path))
            if changed := gnp_config.difference(there.to_dict(), config.to_dict()):
                raise UserError(
                    f"{out} holds a record with another configuration ({'; '.join(changed)}); "
                    "choose another --out, or the same configuration to go on"
                )
        write_atomically(path, json.dumps(config.to_dict(), indent=2) + "\n")
    except OSError as error:
        raise UserError(f"cannot write the folder {out}: {error.strerror}") from None


def report(
    config: ConfigDict,
    policies: Sequence[str],
    rows: Sequence[dict[str, Any]],
    file: pathlib.Path | None,
) -> None:
    """Prints the paper's figures beside ours and what these cost; also writes them to a file."""
    key = (config.model.name, config.data.name, config.optimizer.name)
    figures = iter(PAPER.get(key, "").split())
    paper = dict(zip(POLICIES, zip(figures, figures, strict=True), strict=False))
    print(
        f"\n{', '.join(key)}, {config.dtype}, batch {config.data.batch_size}, {config.epochs:g} "
        "epochs. The paper's are of Table 2 (off: of Table 1), batch 256, 300 epochs, 5 seeds.\n\n"
        "| policy | paper, test error, % | ours, % | seeds | test loss | training loss "
        "| FLOPs a run | minutes a run | images/s |\n" + 9 * "|---" + "|"
    )
    lines = []
    for policy in policies:
        some = [row for row in rows if row["policy"] == policy]
        if not some:
            continue
        names = ("error", "loss", "train_loss", "flops", "seconds", "images_per_second")
        values = ([math.nan if row[name] is None else row[name] for row in some] for name in names)
        error, loss, train_loss, cost, seconds, rate = map(statistics.mean, values)
        std = statistics.stdev(100 * row["error"] for row in some) if len(some) > 1 else None
        theirs = paper.get(policy)
        print(
            f"| `{policy}` | {' ± '.join(theirs) if theirs else '–'} "
            f"| {100 * error:.2f}{'' if std is None else f' ± {std:.2f}'} | {len(some)} "
            f"| {loss:.3f} | {train_loss:.3f} | {cost:.2e} | {seconds / 60:.1f} | {rate:,.0f} |"
        )
        line = {"name": f"{policy}: test error", "value": 100 * error, "unit": "%", "std": std}
        lines.append(line | {"seeds": len(some), "paper": theirs and float(theirs[0])})
    seconds, cost = (sum(row[name] for row in rows) for name in ("seconds", "flops"))
    devices = ", ".join(dict.fromkeys(row["device"] for row in rows))
    print(
        f"\n{len(rows)} runs: {cost:.2e} FLOPs in {seconds / 60:.1f} minutes of training, "
        f"{cost / seconds / 1e12:.3g} TFLOP/s, on {devices}",
        flush=True,
    )
    if file is not None:
        try:
            file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        except OSError as error:
            raise UserError(f"--json: cannot write {file}: {error.strerror}") from None


if __name__ == "__main__":
    run(main)
