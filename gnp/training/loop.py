"""The training loop."""

import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
from ml_collections import ConfigDict

from gnp.config import difference, from_json
from gnp.data import Source, TextSource
from gnp.data.loading import device_memory
from gnp.errors import UserError
from gnp.training.checkpoint import Checkpoints
from gnp.training.compilation import compiled
from gnp.training.evaluation import make_evaluate
from gnp.training.experiment import Experiment, make_experiment
from gnp.training.files import lock, write_atomically
from gnp.training.flops import matmul_rate
from gnp.training.memory_plan import out_of_memory, plan
from gnp.training.metrics import MetricsWriter, Progress, Row
from gnp.training.processes import Agreement, errors_shared, is_main, wait_for_all
from gnp.training.profile import Profiler
from gnp.training.state import MetricSums, num_params, params_sha256
from gnp.training.step import make_train_call, make_train_step

# A call of the compiled program lasts about so long at most: the time between two movements of the
# progress bar, and half of what Ctrl-C waits for.
CALL_SECONDS = 2.0


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop; it is saved at `step` and can be continued."""

    def __init__(self, step: int, total_steps: int):
        super().__init__(f"stopped at step {step} of {total_steps}")
        self.step, self.total_steps = step, total_steps


@dataclasses.dataclass(frozen=True)
class _Dispatched:
    """What was asked of the device and not yet waited for."""

    step: int
    num_steps: int
    sums: MetricSums
    log: bool


def train(
    config: ConfigDict,
    workdir: str | pathlib.Path,
    *,
    command: str | None = None,
    profile_steps: int = 0,
    measure_device: bool = False,
) -> dict[str, Any]:
    """Trains a model, or continues or completes the run in a work directory.

    Every one of several processes (`jax.distributed`) calls it with the same arguments; the work
    directory is one that all of them see, and the first process writes it.

    The work directory then holds `config.json`, `metrics.jsonl`, TensorBoard events,
    `checkpoints/` and, when the run has ended, `result.json`. A run that was interrupted anywhere
    and is started again ends with the parameters of one that was not, bit for bit (on the same
    machine and number of devices).

    Args:
      config: made from `gnp.config.default()`.
      workdir: the run's directory; made if it is not there.
      command: the command line, to be noted in `result.json`.
      profile_steps: how many steps to trace, into `profile/` in the work directory.
      measure_device: whether to measure in the end what a matrix product reaches on the devices,
        to compare the run with; it takes a second.

    Returns:
      What `result.json` holds: "train", "test" and what other splits there are (the last values of
      the metrics), "unit" ("image" or "word"), "steps", "epochs", "wall_time" (seconds),
      "num_params", "params_sha256", "devices", "command", and "speed", since the run was last
      started: what was learned in a second ("images_per_second"), the FLOPs of the
      model's arithmetic ("flops_per_second", and of a matrix product "device_flops_per_second" if
      it was measured), and the share of the time spent waiting for data ("data_wait"), evaluation
      and saving left out.

    Raises:
      UserError: for a configuration that is wrong, or another one than the directory's run has, or
        if another process is training in the directory.
      Interrupted: on the first Ctrl-C or SIGTERM, when the state is saved. A second one ends the
        process at once.
    """
    workdir = pathlib.Path(workdir)
    with errors_shared():
        experiment = make_experiment(config)
        # Before anything is written; what has a checkpoint does not begin from these weights again.
        pretrained = None if _has_checkpoint(workdir) else experiment.load_pretrained()
    with contextlib.ExitStack() as stack:
        with errors_shared():
            if is_main():
                _claim(workdir, config)
                stack.enter_context(lock(workdir))
                _check_data(workdir, experiment.source)
        with errors_shared():
            if not (workdir / "config.json").exists():
                raise UserError(
                    f"{workdir} is not what the first process sees there; --workdir must be on "
                    "storage that all processes share"
                )
        profiler = Profiler(workdir / "profile", first=1, num_steps=profile_steps)
        try:
            result = _train(experiment, workdir, pretrained, command, profiler, measure_device)
        except jax.errors.JaxRuntimeError as error:
            told = out_of_memory(error, config, num_devices=experiment.mesh.size)
            if told is None:
                raise
            raise told from error
        wait_for_all("the end of the run")
        return result


def _train(
    experiment: Experiment,
    workdir: pathlib.Path,
    pretrained: Any,
    command: str | None,
    profiler: Profiler,
    measure_device: bool,
) -> dict[str, Any]:
    """Trains in a work directory that is this run's."""
    config = experiment.config
    result_path = workdir / "result.json"
    if result_path.exists():
        return json.loads(result_path.read_text())

    began = time.monotonic()
    if is_main():
        print(f"preparing {experiment.source.name}, compiling …", file=sys.stderr, flush=True)
    checkpoints = Checkpoints(workdir, keep=config.checkpoint.keep)
    step = checkpoints.latest_step() or 0
    state = checkpoints.restore(experiment.abstract_state) if step else experiment.init(pretrained)
    with errors_shared():
        data = experiment.load_data()
    writer = MetricsWriter(workdir, step=step, writes=is_main())
    log_every, eval_every, save_every = (
        experiment.steps(duration)
        for duration in (config.log.every, config.eval.every, config.checkpoint.every)
    )
    total_steps, unit = experiment.total_steps, experiment.source.unit

    train_step = make_train_step(
        experiment.model,
        experiment.optimizer,
        seed=config.seed,
        log_every=log_every,
        mesh=experiment.mesh,
        accumulate=config.accumulate,
        num_groups=config.gr.num_groups,
        ema_decay=config.ema.decay,
    )
    max_steps = min(config.steps_per_call, total_steps, data.max_steps_per_call or total_steps)
    # Compiled ahead, so that the loop's first step is like any other.
    traced = make_train_call(
        train_step,
        data.train_batches,
        max_steps=max_steps,
        mesh=experiment.mesh,
        state_sharding=experiment.state_sharding,
    ).trace(state, data.train_input(), max_steps)
    if is_main():
        memory = plan(
            traced.jaxpr,
            state,
            num_devices=experiment.mesh.size,
            data=data.bytes_per_device,
            device=device_memory(experiment.mesh),
        )
        print(memory, file=sys.stderr, flush=True)
    train_call = compiled(traced.lower())
    evaluations = {
        split: make_evaluate(experiment.model, data, split, experiment.mesh, state)
        for split in data.eval_batches
        if split != "train"
    }

    progress = Progress(
        total_steps=total_steps,
        steps_per_epoch=experiment.steps_per_epoch,
        step=step,
        shown=is_main(),
    )
    progress.say(
        _summary(experiment, data.about, num_params(state.params), time.monotonic() - began, step)
    )
    wall_time_before = writer.wall_time
    training_seconds, training_steps, waited = 0.0, 0, 0.0
    all_seconds, first_step, saved_step = 0.0, step, step
    device_free = time.monotonic()
    seconds_per_step = CALL_SECONDS  # not known before the first call, which is of one step
    agreement = Agreement(experiment.mesh, (False, seconds_per_step))

    def write(split: str, step: int, values: dict[str, float | None]) -> Row:
        row = {
            "step": step,
            "epoch": step / experiment.steps_per_epoch,
            "wall_time": wall_time_before + time.monotonic() - began,
            "split": split,
            **values,
        }
        writer.write(row)
        return row

    def finish(call: _Dispatched) -> list[Row]:
        """Waits for a call and writes what it has to say."""
        nonlocal training_seconds, training_steps, waited, device_free, seconds_per_step
        nonlocal all_seconds
        jax.block_until_ready(call.sums)
        now = time.monotonic()
        training_seconds += now - device_free
        all_seconds += now - device_free
        training_steps += call.num_steps
        seconds_per_step = (now - device_free) / call.num_steps
        device_free = now
        rows = []
        if call.log:
            rate = training_steps * experiment.examples_per_step / training_seconds
            values = experiment.mean_metrics(call.sums) | {f"{unit}s_per_second": rate}
            if data.max_steps_per_call is not None:
                values["data_wait"] = (feed.waited - waited) / training_seconds
            rows.append(write("train", call.step, values))
            training_seconds, training_steps, waited = 0.0, 0, feed.waited
        return rows

    def evaluate() -> list[Row]:
        """Evaluates the state and writes what comes out."""
        nonlocal device_free
        rows = [
            write(split, step, experiment.mean_metrics(over_split(state)))
            for split, over_split in evaluations.items()
        ]
        device_free = time.monotonic()
        return rows

    def save() -> None:
        nonlocal device_free, saved_step
        writer.sync()
        checkpoints.save(step, state)
        saved_step = step
        device_free = time.monotonic()

    with (
        contextlib.closing(progress),
        contextlib.closing(writer),
        contextlib.closing(data.train_feed(step)) as feed,
        contextlib.closing(profiler),
        _stop_requests() as stop,
    ):
        # The device always has the next call to do while the host writes what the last one did.
        waiting: _Dispatched | None = None
        try:
            while step < total_steps:
                longest = min(max_steps, max(int(CALL_SECONDS / seconds_per_step), 1))
                until = min(
                    step + longest,
                    total_steps,
                    *((step // every + 1) * every for every in (log_every, eval_every, save_every)),
                )
                inputs = feed.get(waiting and waiting.sums)
                profiler.at(step - first_step, waiting and waiting.sums)
                num_steps, step = until - step, until
                state, sums = train_call(state, inputs, num_steps)
                if waiting is not None:
                    progress.show(waiting.step, finish(waiting))
                last = step == total_steps
                waiting = _Dispatched(step, num_steps, sums, last or step % log_every == 0)
                # Asked once: what is then raised must have been saved.
                stopping, seconds_per_step = agreement.exchange(stop.is_set(), seconds_per_step)
                evaluating = last or step % eval_every == 0
                saving = last or step % save_every == 0 or stopping
                if evaluating or saving:
                    rows, waiting = finish(waiting), None
                    if evaluating:
                        rows += evaluate()
                    progress.show(step, rows)
                if saving:
                    save()
                if stopping and not last:
                    raise Interrupted(step, total_steps)
        except UserError:  # of the data; what has been learned is kept
            if waiting is not None:
                progress.show(step, finish(waiting))
            if step != saved_step and jax.process_count() == 1:  # others would not save with it
                save()
            raise
        finally:
            checkpoints.close()
        result: dict[str, Any] = {
            "steps": total_steps,
            "epochs": total_steps / experiment.steps_per_epoch,
            "wall_time": wall_time_before + time.monotonic() - began,
            "unit": unit,
            **writer.last,
            "num_params": num_params(state.params),
            "params_sha256": params_sha256(state.params),
            "devices": _devices(experiment),
            "command": command,
            "speed": None,
        }
        if step > first_step:
            steps_per_second = (step - first_step) / all_seconds
            result["speed"] = {
                f"{unit}s_per_second": experiment.examples_per_step * steps_per_second,
                "flops_per_second": experiment.flops(first_step, step) / all_seconds,
                "data_wait": feed.waited / all_seconds,
            }
            if measure_device:
                # The devices that a CPU is said to have share its cores.
                cpu = jax.default_backend() == "cpu"
                count = jax.process_count() if cpu else experiment.mesh.size
                rate = count * matmul_rate(config.dtype, seconds=0.1)
                result["speed"]["device_flops_per_second"] = rate
    if is_main():
        write_atomically(result_path, json.dumps(result, indent=2) + "\n")
    return result


def _claim(workdir: pathlib.Path, config: ConfigDict) -> None:
    """Makes the work directory this configuration's, or says why it cannot be."""
    path = workdir / "config.json"
    text = json.dumps(config.to_dict(), indent=2)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if path.exists():
            # A field that an older version did not have is at its default.
            there = from_json(path.read_text(), where=str(path))
            changed = difference(_essential(there), _essential(config))
            metrics = workdir / "metrics.jsonl"
            logged = metrics.exists() and metrics.stat().st_size
            begun = logged or _has_checkpoint(workdir)  # else it made no step worth keeping
            if changed and begun:
                raise UserError(
                    f"{workdir} holds a run with another configuration ({'; '.join(changed)}); "
                    "choose another --workdir, or the same configuration to continue it"
                )
        write_atomically(path, text + "\n")
    except OSError as error:
        raise UserError(f"cannot write the work directory {workdir}: {error.strerror}") from None


def _essential(config: ConfigDict) -> dict[str, Any]:
    """A configuration without what a run may be continued with another value of."""
    fields = config.to_dict()
    for name in ("workers", "on_damaged"):
        del fields["data"][name]
    del fields["mesh"]  # where it runs; results agree to rounding
    return fields


def _check_data(workdir: pathlib.Path, source: Source | TextSource) -> None:
    """Notes what data the run learns from, or refuses others than it began with."""
    path = workdir / "data.json"
    here = {
        "name": source.name,
        "num_examples": dict(source.num_examples),
        "num_classes": source.num_classes,
    }
    there = json.loads(path.read_text()) if path.exists() else here
    if there != here and _has_checkpoint(workdir):
        raise UserError(
            f"{workdir} holds a run on other data ({json.dumps(there)} there, {json.dumps(here)} "
            "now): bring them back, or choose another --workdir"
        )
    write_atomically(path, json.dumps(here, indent=2) + "\n")


def _has_checkpoint(workdir: pathlib.Path) -> bool:
    """Whether a run has saved a step there."""
    return any(path.name.isdecimal() for path in workdir.glob("checkpoints/*"))


@contextlib.contextmanager
def _stop_requests() -> Iterator[threading.Event]:
    """An event that the first SIGINT or SIGTERM sets; the second acts as if there were none."""
    requested = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield requested  # only the main thread may handle signals
        return
    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in signals]

    def handle(number: int, frame: Any) -> None:
        requested.set()
        # Not by print, which may be what was interrupted.
        os.write(2, b"\nstopping after the steps under way; again to stop at once\n")
        signal.signal(number, before[signals.index(signal.Signals(number))])

    for number in signals:
        signal.signal(number, handle)
    try:
        yield requested
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)


def _summary(experiment: Experiment, about: str, params: int, seconds: float, step: int) -> str:
    source = experiment.source
    counts = ", ".join(f"{count:,} {split}" for split, count in source.num_examples.items())
    begin = f"continues at step {step}" if step else "begins at step 0"
    return (
        f"{experiment.config.model.name} ({params:,} parameters) on {source.name} "
        f"({counts} {source.unit}s), {about}, "
        f"{_devices(experiment)}; ready in {seconds:.1f} s; {begin} of {experiment.total_steps}"
    )


def _devices(experiment: Experiment) -> str:
    devices = experiment.mesh.devices.flat
    return f"{devices[0].device_kind} × {experiment.mesh.devices.size}"
