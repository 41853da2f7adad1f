"""The training loop."""

import contextlib
import dataclasses
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from gnp.config import parse_duration
from gnp.data.loading import device_memory
from gnp.errors import UserError
from gnp.files import is_remote, lock, write_atomically
from gnp.training import nonfinite, provenance, workdir
from gnp.training.checkpoint import Checkpoints
from gnp.training.compilation import Compilations, compiled
from gnp.training.evaluation import make_evaluate
from gnp.training.experiment import Experiment, make_experiment, nonfinite_limit
from gnp.training.flops import matmul_rate
from gnp.training.memory_plan import out_of_memory, plan
from gnp.training.metrics import MetricsWriter, Progress, Row
from gnp.training.processes import (
    Agreement,
    errors_shared,
    is_main,
    refuse_differences,
    wait_for_all,
)
from gnp.training.profile import Profiler
from gnp.training.saving import Saving
from gnp.training.state import Report, TrainState, num_params, params_sha256
from gnp.training.step import make_train_call, make_train_step
from gnp.training.stopping import Interrupted, stop_requests
from gnp.training.watchdog import Watchdog

_log = logging.getLogger(__name__)

# A call of the compiled program lasts about so long at most: the time between two movements of the
# progress bar, and half of what Ctrl-C waits for.
CALL_SECONDS = 2.0


def train(
    config: ConfigDict,
    directory: epath.PathLike,
    *,
    command: str | None = None,
    profile_steps: int = 0,
    measure_device: bool = False,
    on_row: Callable[[Row], None] | None = None,
) -> dict[str, Any]:
    """Trains a model, or continues or completes the run in a work directory.

    Every one of several processes (`jax.distributed`) calls it with the same arguments; the work
    directory is one that all of them see, and the first process writes it.

    The work directory then holds `config.json`, `environment.json` (versions and devices),
    `metrics.jsonl`, TensorBoard events, `checkpoints/` and, when the run has ended, `result.json`.
    A run that was interrupted anywhere and is started again ends with the parameters of one that
    was not, bit for bit (on the same machine and number of devices).

    Args:
      config: made from `gnp.config.default()`.
      directory: the run's directory, local or as gs://…; made if it is not there.
      command: the command line, to be noted in `result.json`.
      profile_steps: how many steps to trace, into `profile/` in the work directory.
      measure_device: whether to measure in the end what a matrix product reaches on the devices,
        to compare the run with; it takes a second.
      on_row: called in the first process with each row of `metrics.jsonl` that is written.

    Returns:
      What `result.json` holds: "train", "test" and what other splits there are (the last values of
      the metrics), "unit" ("image" or "word"), "steps", "skipped" (steps that were left out),
      "epochs", "wall_time" (seconds), "num_params", "params_sha256", "devices", "command",
      "compilations" (of the train step, since the run was last started), and "speed", since then:
      what was learned in a second ("images_per_second"), the FLOPs of the model's arithmetic
      ("flops_per_second", and of a matrix product "device_flops_per_second" if it was measured),
      and the share of the time spent waiting for data ("data_wait"), evaluation and saving left
      out.

    Raises:
      UserError: for a configuration that is wrong, or another one than the directory's run has; if
        another process is training in the directory; if the training came to a loss that is not
        finite (`config.on_nonfinite`); if its end cannot be saved.
      Interrupted: on the first Ctrl-C or SIGTERM, when the state is saved. A second one ends the
        process at once.
    """
    directory = epath.Path(directory)
    if profile_steps and is_remote(directory):
        raise UserError(f"a trace cannot be written to {directory}; profile in a local directory")
    with errors_shared():
        experiment = make_experiment(config)
        # Before anything is written; what has a checkpoint does not begin from these weights again.
        begun = workdir.has_checkpoint(directory)
        pretrained = None if begun else experiment.load_pretrained()
    made_of = provenance.describe()
    same = {name: made_of[name] for name in ("packages", "source_sha256", "xla_flags")}
    refuse_differences({"config": config.to_dict(), **same})
    with contextlib.ExitStack() as stack:
        with errors_shared():
            if is_main():
                workdir.make(directory)
                stack.enter_context(lock(directory))
                workdir.claim(directory, config)
                workdir.check_data(directory, experiment.source)
        with errors_shared():
            if not (directory / "config.json").exists():
                raise UserError(
                    f"{directory} is not what the first process sees there; --workdir must be on "
                    "storage that all processes share"
                )
        result = workdir.result(directory)
        if result is None:
            try:
                with _Run(experiment, directory, pretrained, command, on_row) as run:
                    run.train(profile_steps)
                    result = run.result(measure_device=measure_device)
            except jax.errors.JaxRuntimeError as error:
                told = out_of_memory(error, config, num_devices=experiment.mesh.size)
                if told is None:
                    raise
                raise told from error
        wait_for_all("the end of the run")
        return result


@dataclasses.dataclass(frozen=True)
class _Call:
    """What was asked of the device and not yet waited for."""

    step: int  # that it comes to
    num_steps: int
    report: Report


@dataclasses.dataclass
class _Clock:
    """Time that the devices spent on training: evaluation and saving are left out."""

    seconds: float = 0.0
    steps: int = 0
    waited: float = 0.0  # of the seconds, for data

    def add(self, seconds: float, steps: int, waited: float) -> None:
        self.seconds += seconds
        self.steps += steps
        self.waited += waited


class _Run:
    """A run in a work directory that is its own, from the newest checkpoint on."""

    def __init__(
        self,
        experiment: Experiment,
        directory: epath.Path,
        pretrained: Any,
        command: str | None,
        on_row: Callable[[Row], None] | None,
    ):
        self._began = time.monotonic()
        self._experiment, self._config = experiment, experiment.config
        self._directory, self._command = directory, command
        self._on_row = on_row or (lambda row: None)
        config = self._config
        if is_main():
            print(f"preparing {experiment.source.name}, compiling …", file=sys.stderr, flush=True)

        self._checkpoints = Checkpoints(
            directory, config=workdir.essential(config), keep=config.checkpoint.keep
        )
        self._first_state = lambda: experiment.init(pretrained)
        self._state = self._restored()
        self._step = self._first_step = int(self._state.step)
        self._data = experiment.load_data()
        self._writer = MetricsWriter(directory, step=self._step, writes=is_main())
        self._wall_time_before = self._writer.wall_time
        if is_main():
            mesh = experiment.mesh
            for line in provenance.record(directory, step=self._step, command=command, mesh=mesh):
                _log.warning("the run is continued with %s: it may round otherwise", line)

        self._log_every, self._eval_every = (
            experiment.steps(duration) for duration in (config.log.every, config.eval.every)
        )
        every = parse_duration(config.checkpoint.every, minutes=True)
        minutes = every.unit == "min"
        self._save_every = None if minutes else experiment.steps(config.checkpoint.every)
        self._saving = Saving(
            self._checkpoints,
            self._writer,
            seconds=60 * every.value if minutes else None,
            best=config.checkpoint.best,
        )
        self._saving.update_best(self._step)

        with Compilations() as self._compilations:
            self._compile()
        self._clock, self._since_log = _Clock(), _Clock()
        self._device_free = time.monotonic()
        # Of a step, here and as agreed; not known before the first call, which is of one step. How
        # many steps a call has must be the same in every process.
        self._seconds_here = self._seconds_per_step = CALL_SECONDS
        self._agreement = Agreement(experiment.mesh, (0, 0, self._seconds_per_step))
        self._skipped, self._rollbacks, self._furthest = int(self._state.nonfinite.total), 0, 0
        self._progress = Progress(
            total_steps=experiment.total_steps,
            steps_per_epoch=experiment.steps_per_epoch,
            step=self._step,
            shown=is_main(),
        )
        self._progress.say(self._summary())

    def _restored(self) -> TrainState:
        if not self._checkpoints.steps():
            return self._first_state()
        return self._checkpoints.restore(self._experiment.abstract_state)

    def _compile(self) -> None:
        """Compiles all programs ahead, so that the loop's first step is like any other."""
        experiment, config, data = self._experiment, self._config, self._data
        train_step = make_train_step(
            experiment.model,
            experiment.optimizer,
            seed=config.seed,
            log_every=self._log_every,
            mesh=experiment.mesh,
            accumulate=config.accumulate,
            num_groups=config.gr.num_groups,
            ema_decay=config.ema.decay,
            nonfinite_limit=nonfinite_limit(config),
        )
        total_steps = experiment.total_steps
        self._max_steps = min(
            config.steps_per_call, total_steps, data.max_steps_per_call or total_steps
        )
        traced = make_train_call(
            train_step,
            data.train_batches,
            max_steps=self._max_steps,
            mesh=experiment.mesh,
            state_sharding=experiment.state_sharding,
        ).trace(self._state, data.train_input(), self._max_steps)
        if is_main():
            memory = plan(
                traced.jaxpr,
                self._state,
                num_devices=experiment.mesh.size,
                data=data.bytes_per_device,
                device=device_memory(experiment.mesh),
            )
            print(memory, file=sys.stderr, flush=True)
        self._train_call = compiled(traced.lower())
        self._evaluations = {
            split: make_evaluate(experiment.model, data, split, experiment.mesh, self._state)
            for split in data.eval_batches
            if split != "train"
        }

    def train(self, profile_steps: int) -> None:
        """Goes on to the last step."""
        profiler = Profiler(self._directory / "profile", first=1, num_steps=profile_steps)
        with (
            contextlib.closing(profiler),
            stop_requests() as self._stop,
            Watchdog(self._config.watchdog) as self._watchdog,
            self._compilations,
        ):
            self._profiler = profiler
            while True:
                try:
                    with self._feed():
                        self._train()
                        self._saving.finish(self._step, self._state)
                    return
                except nonfinite.NonFiniteError as error:
                    self._go_back(error)

    @contextlib.contextmanager
    def _feed(self) -> Iterator[None]:
        """The training batches that the state has not yet seen."""
        first = int(self._state.data_step)
        last = first + self._experiment.total_steps - self._step
        self._waited = 0.0
        with contextlib.closing(self._data.train_feed(first, last)) as self._batches:
            yield

    def _train(self) -> None:
        """Calls the compiled program until the last step; evaluates and saves in between."""
        total_steps = self._experiment.total_steps
        # The device always has the next call to do while the host writes what the last one did.
        waiting: _Call | None = None
        try:
            self._between_calls([])  # what was left to do when the run was interrupted
            while self._step < total_steps:
                call = self._dispatch(waiting)
                if waiting is not None:
                    self._progress.show(waiting.step, self._finish(waiting))
                waiting = call
                # Asked once: what is then raised must have been saved.
                stopping, wanted, self._seconds_per_step = self._agreement.exchange(
                    self._stop.exit_code, self._saving.wanted(), self._seconds_here
                )
                if stopping or wanted or self._is_due(self._eval_every, self._save_every):
                    rows, waiting = self._finish(waiting), None
                    self._between_calls(rows, stopping=int(stopping), save=bool(wanted))
        except UserError:  # of the data; what has been learned is kept
            if jax.process_count() == 1:  # others would not save with it
                if waiting is not None:
                    self._progress.show(waiting.step, self._finish(waiting))
                self._save()
            raise

    def _dispatch(self, waiting: _Call | None) -> _Call:
        """Begins the next call of the compiled program."""
        longest = min(self._max_steps, max(int(CALL_SECONDS / self._seconds_per_step), 1))
        everies = (self._log_every, self._eval_every, self._save_every)
        until = min(
            self._step + longest,
            self._experiment.total_steps,
            *((self._step // every + 1) * every for every in everies if every),
        )
        self._watchdog.alive(f"waiting for the data of step {self._step + 1}")
        inputs = self._batches.get(waiting and waiting.report)
        self._watchdog.alive(f"training to step {until}")
        self._profiler.at(self._step - self._first_step, waiting and waiting.report)
        num_steps, self._step = until - self._step, until
        self._state, report = self._train_call(self._state, inputs, num_steps)
        return _Call(until, num_steps, report)

    def _finish(self, call: _Call) -> list[Row]:
        """Waits for a call, and writes and gives what it has to say.

        Raises:
          NonFiniteError: if a step failed after which none may be left out any more.
        """
        jax.block_until_ready(call.report)
        now = time.monotonic()
        seconds, self._device_free = now - self._device_free, now
        self._seconds_here = seconds / call.num_steps
        waited, self._waited = self._batches.waited - self._waited, self._batches.waited
        for clock in (self._clock, self._since_log):
            clock.add(seconds, call.num_steps, waited)
        in_a_row, skipped = (int(x) for x in call.report.nonfinite)
        if in_a_row >= nonfinite_limit(self._config):
            raise nonfinite.NonFiniteError
        if skipped > self._skipped:
            _log.warning(
                "up to step %d: %d not finite, left out (%d so far)",
                *(call.step, skipped - self._skipped, skipped),
            )
            self._skipped = skipped
        rows = []
        if call.step % self._log_every == 0 or call.step == self._experiment.total_steps:
            values = self._experiment.mean_metrics(call.report.metrics)
            if self._config.on_nonfinite != "skip":
                del values["skipped"]
            unit, clock = self._experiment.source.unit, self._since_log
            examples = clock.steps * self._experiment.examples_per_step
            values[f"{unit}s_per_second"] = examples / clock.seconds
            if self._data.max_steps_per_call is not None:
                values["data_wait"] = clock.waited / clock.seconds
            rows.append(self._write("train", call.step, values))
            self._since_log = _Clock()
        return rows

    def _is_due(self, *everies: int | None) -> bool:
        last = self._step == self._experiment.total_steps
        return last or any(every and self._step % every == 0 for every in everies)

    def _between_calls(self, rows: list[Row], *, stopping: int = 0, save: bool = False) -> None:
        """Evaluates, saves and stops, whatever of it is due; `rows` are those of the last call."""
        if not stopping:
            stopping, more = self._evaluate()
            better = bool(more) and self._saving.update_best(self._step)
            save, rows = save or better, rows + more
        self._progress.show(self._step, rows)
        if stopping or save or (self._step and self._is_due(self._save_every)):
            self._save()
        if stopping and (self._step < self._experiment.total_steps or self._not_evaluated()):
            with contextlib.suppress(OSError):
                self._checkpoints.wait()
            raise Interrupted(
                self._step,
                self._experiment.total_steps,
                saved_step=max(self._checkpoints.steps(), default=None),
                exit_code=stopping,
            )
        self._device_free = time.monotonic()

    def _not_evaluated(self) -> list[str]:
        """The splits that should have a row of this step, and have none."""
        if not self._step or not self._is_due(self._eval_every):
            return []
        last = self._writer.last
        return [x for x in self._evaluations if last.get(x, {}).get("step") != self._step]

    def _evaluate(self) -> tuple[int, list[Row]]:
        """Evaluates where that is due, and writes and gives the rows.

        The first number is not 0 if the run is to stop; then not all splits have been evaluated.
        """
        exit_code = 0
        rows: list[Row] = []

        def stopping() -> bool:
            nonlocal exit_code
            self._watchdog.alive(f"evaluating at step {self._step}")
            votes = self._agreement.exchange(self._stop.exit_code, 0, self._seconds_here)
            exit_code = int(votes[0])
            return bool(exit_code)

        for split in self._not_evaluated():
            sums = self._evaluations[split](self._state, stopping)
            if sums is None:
                return exit_code, rows
            rows.append(self._write(split, self._step, self._experiment.mean_metrics(sums)))
        return 0, rows

    def _save(self) -> None:
        self._watchdog.alive(f"saving step {self._step}")
        self._saving.save(self._step, self._state)

    def _go_back(self, error: nonfinite.NonFiniteError) -> None:
        """Goes back to the newest checkpoint, with other batches, or tells why not."""
        config = self._config
        # The state has stayed where it was before the step that failed.
        state, failed = self._state, int(self._state.step) + 1
        batch = int(state.data_step)
        self._rollbacks = 0 if failed > self._furthest else self._rollbacks
        self._furthest = max(failed, self._furthest)
        if config.on_nonfinite == "rollback" and self._rollbacks < config.max_nonfinite:
            self._rollbacks += 1
            with contextlib.suppress(OSError):
                self._checkpoints.wait()
            # As PaLM's training did: other batches follow, beginning after the one that failed.
            state = self._restored()
            self._state = nonfinite.with_batches_from(state, batch + 1)
            self._step = int(state.step)
            self._writer.rewind(self._step)
            self._skipped = int(state.nonfinite.total)
            self._since_log = _Clock()
            _log.warning(
                "step %d: the loss or a gradient is not finite; back to step %d, and on with the "
                "batches after number %d",
                *(failed, self._step, batch),
            )
            return
        self._step, self._state = failed - 1, nonfinite.ready_to_go_on(state)
        path = nonfinite.save(self._directory, self._data, state)
        self._save()
        with contextlib.suppress(OSError):
            self._checkpoints.wait()
        tried = ""
        if config.on_nonfinite == "skip":
            tried = f" ({config.max_nonfinite} steps in a row)"
        elif self._rollbacks:
            tried = f" (after {self._rollbacks} rollbacks)"
        raise UserError(
            f"step {failed}: the loss or a gradient is not finite{tried}; the state before it is "
            f"the checkpoint of step {self._step}, its batch is {path} "
            "(gnp.training.nonfinite.load reads both). A lower config.lr.base or config.clip_norm "
            "may help, or continue with --config.on_nonfinite=skip or rollback"
        ) from error

    def _write(self, split: str, step: int, values: dict[str, float | None]) -> Row:
        row = {
            "step": step,
            "epoch": step / self._experiment.steps_per_epoch,
            "wall_time": self._wall_time,
            "split": split,
            **values,
        }
        self._writer.write(row)
        if is_main():
            self._on_row(row)
        return row

    @property
    def _wall_time(self) -> float:
        return self._wall_time_before + time.monotonic() - self._began

    def result(self, *, measure_device: bool) -> dict[str, Any]:
        """What the finished run has come to; also written to `result.json`."""
        experiment, clock = self._experiment, self._clock
        unit, params = experiment.source.unit, self._state.params
        found: dict[str, Any] = {
            "steps": experiment.total_steps,
            "skipped": self._skipped,
            "epochs": experiment.total_steps / experiment.steps_per_epoch,
            "wall_time": self._wall_time,
            "unit": unit,
            **self._writer.last,
            "num_params": num_params(params),
            "params_sha256": params_sha256(params),
            "devices": _devices(experiment),
            "command": self._command,
            "compilations": self._compilations.of("train_call"),
            "speed": None,
        }
        if clock.steps:
            flops = experiment.flops(self._first_step, experiment.total_steps)
            found["speed"] = {
                f"{unit}s_per_second": clock.steps * experiment.examples_per_step / clock.seconds,
                "flops_per_second": flops / clock.seconds,
                "data_wait": clock.waited / clock.seconds,
            }
            if measure_device:
                # The devices that a CPU is said to have share its cores.
                cpu = jax.default_backend() == "cpu"
                count = jax.process_count() if cpu else experiment.mesh.size
                rate = count * matmul_rate(self._config.dtype, seconds=0.1)
                found["speed"]["device_flops_per_second"] = rate
        if is_main():
            path = self._directory / "result.json"
            try:
                write_atomically(path, json.dumps(found, indent=2) + "\n")
            except OSError as error:
                raise UserError(
                    f"cannot write {path} ({error.strerror or error}); all else is there: make "
                    "room and start the same command again"
                ) from None
        return found

    def _summary(self) -> str:
        experiment, source = self._experiment, self._experiment.source
        counts = ", ".join(f"{count:,} {split}" for split, count in source.num_examples.items())
        begin = f"continues at step {self._step}" if self._step else "begins at step 0"
        return (
            f"{experiment.config.model.name} ({num_params(self._state.params):,} parameters) on "
            f"{source.name} ({counts} {source.unit}s), {self._data.about}, {_devices(experiment)}; "
            f"ready in {time.monotonic() - self._began:.1f} s; {begin} of {experiment.total_steps}"
        )

    def __enter__(self) -> "_Run":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        self._progress.close()
        self._writer.close()
        # A second Ctrl-C does not wait for a save that is under way.
        if kind is None or issubclass(kind, Exception | Interrupted):
            self._checkpoints.close()


def _devices(experiment: Experiment) -> str:
    devices = experiment.mesh.devices.flat
    return f"{devices[0].device_kind} × {experiment.mesh.devices.size}"
