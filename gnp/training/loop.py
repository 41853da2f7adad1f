"""The training loop."""

import contextlib
import dataclasses
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from gnp.config import parse_duration
from gnp.data.loading import device_memory
from gnp.errors import UserError
from gnp.files import is_remote, lock, write_atomically
from gnp.training import nonfinite, provenance, workdir
from gnp.training.compilation import Compilations, compiled
from gnp.training.evaluation import make_evaluate
from gnp.training.experiment import Experiment, make_experiment, nonfinite_limit
from gnp.training.flops import matmul_rate
from gnp.training.memory_plan import out_of_memory, plan
from gnp.training.metrics import Progress, Row
from gnp.training.processes import (
    Agreement,
    errors_shared,
    is_main,
    refuse_differences,
    wait_for_all,
)
from gnp.training.profile import Profiler
from gnp.training.recovery import recover
from gnp.training.state import Report, TrainState, num_params, params_sha256
from gnp.training.stopping import Interrupted, stop_requests
from gnp.training.trial import Program, Trial
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
      "epochs", "wall_time" (seconds), "trained_together" (the runs that shared them),
      "num_params", "params_sha256", "devices", "command",
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
                stack.enter_context(opened(directory, experiment))
        with errors_shared():
            if not (directory / "config.json").exists():
                raise UserError(
                    f"{directory} is not what the first process sees there; --workdir must be on "
                    "storage that all processes share"
                )
        result = workdir.result(directory)
        if result is None:
            trial = Trial(experiment, directory, command=command, on_row=on_row)
            with memory_told(experiment), Run(Program(experiment), [trial], pretrained) as run:
                run.train(profile_steps)
                (result,) = run.results(measure_device=measure_device)
        wait_for_all("the end of the run")
        return result


@contextlib.contextmanager
def opened(directory: epath.Path, experiment: Experiment) -> Iterator[None]:
    """Makes the directory the experiment's, as long as it is entered for this process alone.

    Raises:
      UserError: if it is that of another run or process, or cannot be written.
    """
    workdir.make(directory)
    with lock(directory):
        recover(directory, held=True)
        workdir.claim(directory, experiment.config)
        workdir.check_data(directory, experiment.source)
        yield


@contextlib.contextmanager
def memory_told(experiment: Experiment) -> Iterator[None]:
    """Where the devices' memory runs out, the error says what would save some."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        told = out_of_memory(error, experiment.config, num_devices=experiment.mesh.size)
        if told is None:
            raise
        raise told from error


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


class Run:
    """The training of one run, or of several that one program trains, from a checkpoint on.

    Each has a work directory of its own. They are at the same step, and what the configurations say
    of the loop (when to log, to evaluate, to save) is the same for all.

    Args:
      program: that trains them.
      trials: the runs.
      pretrained: the first variables of one that has no checkpoint; None for random ones.
    """

    def __init__(self, program: Program, trials: Sequence[Trial], pretrained: Any = None):
        self._began = time.monotonic()
        self._program, self._trials = program, trials
        self._experiment = experiment = trials[0].experiment
        self._config = config = experiment.config
        if is_main():
            print(f"preparing {experiment.source.name}, compiling …", file=sys.stderr, flush=True)

        checkpoints = [trial.checkpoints for trial in trials]
        self._restored = lambda: program.state(checkpoints, pretrained)
        self._state = self._restored()
        states = program.each(self._state)
        self._step = self._first_step = int(states[0].step)
        self._data = experiment.load_data()
        for trial, state in zip(trials, states, strict=True):
            trial.begin(self._step)
            trial.skipped = int(state.nonfinite.total)

        self._log_every, self._eval_every = (
            experiment.steps(duration) for duration in (config.log.every, config.eval.every)
        )
        every = parse_duration(config.checkpoint.every, minutes=True)
        self._save_every = (
            None if every.unit == "min" else experiment.steps(config.checkpoint.every)
        )
        with Compilations() as self._compilations:
            self._compile(states[0])
        self._clock, self._since_log = _Clock(), _Clock()
        self._device_free = time.monotonic()
        # Of a step, here and as agreed; not known before the first call, which is of one step. How
        # many steps a call has must be the same in every process.
        self._seconds_here = self._seconds_per_step = CALL_SECONDS
        self._agreement = Agreement(experiment.mesh, (0, 0, self._seconds_per_step))
        self._rollbacks, self._furthest = 0, 0
        self._progress = Progress(
            total_steps=experiment.total_steps,
            steps_per_epoch=experiment.steps_per_epoch,
            step=self._step,
            shown=is_main(),
        )
        self._progress.say(self._summary())

    @property
    def _active(self) -> list[int]:
        """The numbers of the trials that have not failed."""
        return [i for i, trial in enumerate(self._trials) if trial.failure is None]

    def _compile(self, state: TrainState) -> None:
        """Compiles all programs ahead, so that the loop's first step is like any other."""
        experiment, config, data = self._experiment, self._config, self._data
        total_steps = experiment.total_steps
        self._max_steps = min(
            config.steps_per_call, total_steps, data.max_steps_per_call or total_steps
        )
        train_call = self._program.train_call(
            data, log_every=self._log_every, max_steps=self._max_steps
        )
        traced = train_call.trace(
            self._state, data.train_input(), self._max_steps, *self._program.arguments
        )
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
            split: make_evaluate(experiment.model, data, split, experiment.mesh, state)
            for split in data.eval_batches
            if split != "train"
        }

    def train(self, profile_steps: int = 0) -> None:
        """Goes on to the last step."""
        profiler = Profiler(self._trials[0].directory / "profile", first=1, num_steps=profile_steps)
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
                        self._finish_saving()
                    return
                except nonfinite.NonFiniteError as error:
                    self._go_back(error)

    @contextlib.contextmanager
    def _feed(self) -> Iterator[None]:
        """The training batches that the state has not yet seen."""
        first = int(self._program.each(self._state)[0].data_step)
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
            while self._step < total_steps and self._active:
                call = self._dispatch(waiting)
                if waiting is not None:
                    self._progress.show(waiting.step, self._finish(waiting))
                waiting = call
                # Asked once: what is then raised must have been saved.
                stopping, wanted, self._seconds_per_step = self._agreement.exchange(
                    self._stop.exit_code, self._save_is_wanted(), self._seconds_here
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
        self._state, report = self._train_call(
            self._state, inputs, num_steps, *self._program.arguments
        )
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
        reports = self._program.each(call.report)
        for i in self._active:
            in_a_row, skipped = (int(x) for x in reports[i].nonfinite)
            if in_a_row >= nonfinite_limit(self._config):
                if len(self._trials) == 1:
                    raise nonfinite.NonFiniteError
                self._give_up(i)
            else:
                self._trials[i].left_out(call.step, skipped)
        rows = []
        if call.step % self._log_every == 0 or call.step == self._experiment.total_steps:
            unit, clock = self._experiment.source.unit, self._since_log
            examples = clock.steps * self._experiment.examples_per_step
            for i in self._active:
                values = self._experiment.mean_metrics(reports[i].metrics)
                if self._config.on_nonfinite != "skip":
                    del values["skipped"]
                values[f"{unit}s_per_second"] = examples / clock.seconds
                if self._data.max_steps_per_call is not None:
                    values["data_wait"] = clock.waited / clock.seconds
                rows.append(self._trials[i].write("train", call.step, values))
            self._since_log = _Clock()
        return rows

    def _is_due(self, *everies: int | None) -> bool:
        last = self._step == self._experiment.total_steps
        return last or any(every and self._step % every == 0 for every in everies)

    def _between_calls(self, rows: list[Row], *, stopping: int = 0, save: bool = False) -> None:
        """Evaluates, saves and stops, whatever of it is due; `rows` are those of the last call."""
        if not stopping:
            stopping, more = self._evaluate()
            better = bool(more) and self._update_best()
            save, rows = save or better, rows + more
        self._progress.show(self._step, rows)
        if stopping or save or (self._step and self._is_due(self._save_every)):
            self._save()
        if stopping and (self._step < self._experiment.total_steps or self._not_evaluated()):
            saved = []
            for i in self._active:
                checkpoints = self._trials[i].checkpoints
                with contextlib.suppress(OSError):
                    checkpoints.wait()
                saved.append(max(checkpoints.steps(), default=-1))
            least = min(saved, default=-1)
            raise Interrupted(
                self._step,
                self._experiment.total_steps,
                saved_step=None if least < 0 else least,
                exit_code=stopping,
            )
        self._device_free = time.monotonic()

    def _not_evaluated(self) -> list[tuple[str, int]]:
        """The splits and the trials that should have a row of this step, and have none."""
        if not self._step or not self._is_due(self._eval_every):
            return []
        return [
            (split, i)
            for split in self._evaluations
            for i in self._active
            if not self._trials[i].has_row(split, self._step)
        ]

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

        wanted = self._not_evaluated()
        states = self._program.each(self._state) if wanted else []
        for split, i in wanted:
            sums = self._evaluations[split](states[i], stopping)
            if sums is None:
                return exit_code, rows
            values = self._experiment.mean_metrics(sums)
            rows.append(self._trials[i].write(split, self._step, values))
        return 0, rows

    def _update_best(self) -> bool:
        """Has the best checkpoints kept; whether this step's is one of them."""
        better = [self._trials[i].saving.update_best(self._step) for i in self._active]
        return any(better)

    def _save_is_wanted(self) -> bool:
        wanted = [self._trials[i].saving.wanted() for i in self._active]
        return any(wanted)

    def _save(self) -> None:
        self._watchdog.alive(f"saving step {self._step}")
        states = self._program.each(self._state)
        for i in self._active:
            self._trials[i].saving.save(self._step, states[i])

    def _finish_saving(self) -> None:
        states = self._program.each(self._state)
        for i in self._active:
            self._trials[i].saving.finish(self._step, states[i])

    def _go_back(self, error: nonfinite.NonFiniteError) -> None:
        """Goes back to the one trial's newest checkpoint, with other batches, or tells why not."""
        (trial,), config = self._trials, self._config
        # The state has stayed where it was before the step that failed.
        state, failed = self._state, int(self._state.step) + 1
        batch = int(state.data_step)
        self._rollbacks = 0 if failed > self._furthest else self._rollbacks
        self._furthest = max(failed, self._furthest)
        if config.on_nonfinite == "rollback" and self._rollbacks < config.max_nonfinite:
            self._rollbacks += 1
            with contextlib.suppress(OSError):
                trial.checkpoints.wait()
            # As PaLM's training did: other batches follow, beginning after the one that failed.
            state = self._restored()
            self._state = nonfinite.with_batches_from(state, batch + 1)
            self._step = int(state.step)
            trial.writer.rewind(self._step)
            trial.skipped = int(state.nonfinite.total)
            self._since_log = _Clock()
            _log.warning(
                "step %d: the loss or a gradient is not finite; back to step %d, and on with the "
                "batches after number %d",
                *(failed, self._step, batch),
            )
            return
        raise self._give_up(0) from error

    def _give_up(self, i: int) -> UserError:
        """Ends a trial at the step that is not finite; it gets no more rows and checkpoints."""
        trial, config = self._trials[i], self._config
        tried = ""
        if config.on_nonfinite == "skip":
            tried = f" ({config.max_nonfinite} steps in a row)"
        elif self._rollbacks:
            tried = f" (after {self._rollbacks} rollbacks)"
        # The state has stayed where it was before the step that failed.
        state = self._program.each(self._state)[i]
        self._watchdog.alive(f"saving step {int(state.step)}")
        trial.failure = trial.failed(self._program.data(self._data, i), state, tried=tried)
        return trial.failure

    def results(self, *, measure_device: bool = False) -> list[dict[str, Any]]:
        """What the finished runs have come to, also written to `result.json`.

        Of one that has failed it is {"failed": why}, and nothing is written.
        """
        states = self._program.each(self._state)
        return [
            self._result(trial, state, measure_device=measure_device)
            if trial.failure is None
            else {"failed": str(trial.failure)}
            for trial, state in zip(self._trials, states, strict=True)
        ]

    def _result(self, trial: Trial, state: TrainState, *, measure_device: bool) -> dict[str, Any]:
        experiment, clock = trial.experiment, self._clock
        unit, params = experiment.source.unit, state.params
        found: dict[str, Any] = {
            "steps": experiment.total_steps,
            "skipped": trial.skipped,
            "epochs": experiment.total_steps / experiment.steps_per_epoch,
            "wall_time": trial.wall_time,
            "trained_together": len(self._trials),
            "unit": unit,
            **trial.writer.last,
            "num_params": num_params(params),
            "params_sha256": params_sha256(params),
            "devices": _devices(experiment),
            "command": trial.command,
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
            path = trial.directory / "result.json"
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
        count = len(self._trials)
        trials = f"{count} × " if count > 1 else ""
        params = num_params(experiment.abstract_state.params)
        return (
            f"{trials}{experiment.config.model.name} ({params:,} parameters) on "
            f"{source.name} ({counts} {source.unit}s), {self._data.about}, {_devices(experiment)}; "
            f"ready in {time.monotonic() - self._began:.1f} s; {begin} of {experiment.total_steps}"
        )

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        self._progress.close()
        # A second Ctrl-C does not wait for a save that is under way.
        whole = kind is None or issubclass(kind, Exception | Interrupted)
        for trial in self._trials:
            trial.close(whole=whole)


def _devices(experiment: Experiment) -> str:
    devices = experiment.mesh.devices.flat
    return f"{devices[0].device_kind} × {experiment.mesh.devices.size}"
