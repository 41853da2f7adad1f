"""Many small runs in one compiled program: seeds, and what the optimizer has of numbers.

A step of a small model costs what it costs to start its operations; `jax.vmap` over a leading axis
of runs starts them once for all. Each run keeps the work directory that it would have by itself.
"""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from jax.custom_batching import custom_vmap
from jax.extend.random import define_prng_impl, rbg_prng_impl
from ml_collections import ConfigDict

from gnp import config as gnp_config
from gnp.data.loading import Data, StreamedData
from gnp.data.pipeline import TrainBatches
from gnp.errors import UserError
from gnp.training import loop, workdir
from gnp.training.checkpoint import Checkpoints
from gnp.training.experiment import Experiment, make_experiment
from gnp.training.sharding import replicated
from gnp.training.state import Report, TrainState
from gnp.training.step import init_state, make_uncompiled_call
from gnp.training.trial import Program, Trial, train_step

# What may differ between runs of one program, beside the seed: numbers that the optimizer only
# multiplies, adds and compares, so that float32 ones do what Python's do. b1, b2 and decay are not
# among them: of 1 − β₂ float32 keeps four digits, which Python computes before it rounds.
NUMBERS = (
    *("clip_norm", "ema.decay", "weight_decay.value", "gr.radius", "gr.ratio"),
    *("lr.base", "lr.warmup_factor", "lr.drop_factor"),
    *("optimizer.eps", "optimizer.final_learning_rate", "optimizer.gamma"),
    *("optimizer.partial", "optimizer.momentum"),
)
_NO_MATTER = ("steps_per_call", "watchdog", "data.workers")  # the first run's are taken


def group(configs: Sequence[ConfigDict]) -> list[list[int]]:
    """Which runs one program can train together.

    They differ in the seed and in `NUMBERS` only (and in what changes no result). A run is by
    itself if it goes back to older states (`on_nonfinite=rollback`), begins with pretrained
    weights, has perturbations for parts of a batch (`gr.num_groups`), or if its data are streamed
    or its batch lies on several devices.

    Args:
      configs: valid ones.

    Returns:
      Lists of indices into `configs`, each in order; the lists in the order of their first.
    """
    groups: dict[str, list[int]] = {}
    for i, config in enumerate(configs):
        key = json.dumps(_shared(config), sort_keys=True)
        if _alone(config):
            key += f" alone {i}"
        groups.setdefault(key, []).append(i)
    return list(groups.values())


def train(
    configs: Sequence[ConfigDict],
    workdirs: Sequence[epath.PathLike],
    *,
    command: str | None = None,
) -> list[dict[str, Any]]:
    """Trains runs that are a `group`, all at once, or continues or completes them.

    Each work directory then holds what `gnp.training.train` would have left there, and can be
    evaluated, continued and completed by itself. Order of the data, augmentation and masks are
    those of the run by itself; the numbers agree up to rounding, since products of many matrices
    at once are summed in another order. Runs that were interrupted together go on from the newest
    step that all of them have, and end as if they had not been, bit for bit; those that have come
    to another step go on by themselves.

    Args:
      configs: of the runs; one alone is trained by `gnp.training.train`.
      workdirs: of each its own.
      command: the command line, to be noted in each.

    Returns:
      What each `result.json` holds, as `gnp.training.train` returns it; {"failed": why} of a run
      that came to a loss that is not finite, which stops no other one.

    Raises:
      UserError: as `gnp.training.train`; if the configurations are not a group; if two runs have
        the same directory.
      Interrupted: as `gnp.training.train`, when all runs are saved.
    """
    directories = [epath.Path(directory) for directory in workdirs]
    if len(configs) != len(directories) or len(set(directories)) < len(directories):
        raise UserError(
            f"{len(configs)} configurations, {len(set(directories))} work directories: each run "
            "needs one of its own"
        )
    if len(configs) <= 1:
        pairs = zip(configs, directories, strict=True)
        return [loop.train(config, directory, command=command) for config, directory in pairs]
    _check_group(configs)
    first = make_experiment(configs[0])
    for config in configs[1:]:
        gnp_config.validate(config)
    experiments = [first, *(first.with_config(config) for config in configs[1:])]
    with contextlib.ExitStack() as stack:
        for directory, experiment in zip(directories, experiments, strict=True):
            stack.enter_context(loop.opened(directory, experiment))
        results = [workdir.result(directory) for directory in directories]
        stack.enter_context(loop.memory_told(first))
        for part in _parts(
            {
                i: Checkpoints(directory).steps()
                for i, directory in enumerate(directories)
                if results[i] is None and not _has_failed(directory)
            }
        ):
            trials = [Trial(experiments[i], directories[i], command=command) for i in part]
            program = Stack([experiments[i] for i in part])
            try:
                with loop.Run(program, trials) as run:
                    run.train()
                    for i, result in zip(part, run.results(), strict=True):
                        results[i] = result
            except _StreamedError:
                for trial in trials:
                    trial.close(whole=True)
                break
    return [
        # One by itself, or that had failed before and says so again, or goes on if it now may.
        result or _alone_again(config, directory, command)
        for config, directory, result in zip(configs, directories, results, strict=True)
    ]


def _parts(steps: Mapping[int, Sequence[int]]) -> list[list[int]]:
    """The runs that go on together, from the steps of the checkpoints of each; not one alone.

    Those that have none begin together; the others go on from a step that all have, or, where there
    is none, with those of the same newest one.
    """
    parts: dict[int, list[int]] = {}
    begun = [set(x) for x in steps.values() if x]
    together = bool(begun) and bool(set.intersection(*begun))
    for i, of_run in steps.items():
        newest = max(of_run, default=-1)
        parts.setdefault(0 if together and of_run else newest, []).append(i)
    return [part for part in parts.values() if len(part) > 1]


class _StreamedError(UserError):
    """The data are streamed, each run's in its own order."""


def _has_failed(directory: epath.Path) -> bool:
    return any(directory.glob("nonfinite-*.npz"))


def _alone_again(config: ConfigDict, directory: epath.Path, command: str | None) -> dict[str, Any]:
    try:
        return loop.train(config, directory, command=command)
    except UserError as error:
        return {"failed": str(error)}


class Stack(Program):
    """The program of several runs: their states are one, with a leading axis of runs."""

    def __init__(self, experiments: Sequence[Experiment]):
        super().__init__(experiments[0])
        configs = [experiment.config for experiment in experiments]
        values = {field: [_get(config, field) for config in configs] for field in NUMBERS}
        differing = {field: x for field, x in values.items() if len(set(x)) > 1}
        differing["seed"] = [config.seed for config in configs]
        mesh = self._experiment.mesh
        # Weakly typed, as Python's numbers are, which take the precision of what they meet.
        self._values = jax.device_put(
            {field: jnp.stack([jnp.asarray(x) for x in own]) for field, own in differing.items()},
            replicated(mesh),
        )
        self._seeds, self.arguments = differing["seed"], (self._values,)
        everywhere = replicated(mesh)
        self._together = jax.jit(
            lambda states: jax.tree.map(lambda *x: jnp.stack(x), *states), out_shardings=everywhere
        )
        self._each = jax.jit(
            lambda tree: [_part(tree, i) for i in range(len(configs))], out_shardings=everywhere
        )

    def state(self, checkpoints: Sequence[Checkpoints], pretrained: Any) -> TrainState:
        """The states of the newest step that all have, or the first ones."""
        like = self._experiment.abstract_state
        if any(one.steps() for one in checkpoints):
            states = [one.restore(like) for one in checkpoints]
            common = set.intersection(*(set(one.steps()) for one in checkpoints))
            if not common:
                raise UserError(
                    "the runs have no checkpoint of one step that can be read; train each by itself"
                )
            for i, one in enumerate(checkpoints):
                if int(states[i].step) != max(common):
                    states[i] = one.restore(like, max(common))
                    one.remove_after(max(common))  # whose rows are made again
            return self._together(states)

        def init(values: dict[str, jax.Array]) -> TrainState:
            own, ema = self._at(values), self._experiment.config.ema.decay is not None
            return init_state(own.model, own.optimizer, own.example, own.config.seed, ema=ema)

        compiled = jax.jit(init, out_shardings=self._experiment.state_sharding)
        # One by one: under `vmap` the generator of the first parameters draws other bits.
        return self._together([compiled(_part(self._values, i)) for i in range(len(checkpoints))])

    def each(self, tree: Any) -> list[Any]:
        """The runs' own parts, without the leading axis."""
        return self._each(tree)

    def data(self, data: Data, trial: int) -> Data:
        """The data in the order of a run's seed."""
        return _in_order_of(self._seeds[trial], data)

    def train_call(self, data: Data, *, log_every: int, max_steps: int) -> jax.stages.Wrapped:
        """The program of up to `max_steps` train steps of all runs."""
        if isinstance(data, StreamedData):
            raise _StreamedError(f"{self._experiment.source.name} is streamed")
        mesh = self._experiment.mesh

        def train_call(
            states: TrainState, inputs: Any, num_steps: jax.Array, values: dict[str, jax.Array]
        ) -> tuple[TrainState, Report]:
            def one(state: TrainState, values: dict[str, jax.Array]) -> tuple[TrainState, Report]:
                step = train_step(self._at(values), log_every=log_every, generator=_ONE_BY_ONE)
                batches = _in_order_of(values["seed"], data).train_batches
                call = make_uncompiled_call(step, batches, max_steps=max_steps, mesh=mesh)
                return call(state, inputs, num_steps)

            return jax.vmap(one)(states, values)

        return jax.jit(train_call, donate_argnums=0, out_shardings=replicated(mesh))

    def _at(self, values: dict[str, jax.Array]) -> Experiment:
        """The experiment of a run whose numbers are traced."""
        return self._experiment.with_config(_with_numbers(self._experiment.config, values))


def _part(tree: Any, i: int) -> Any:
    return jax.tree.map(lambda x: x[i], tree)


def _in_order_of(seed: Any, data: Any) -> Any:
    """The data, whose order and augmentation are those of a seed; a text has neither."""
    batches = data.train_batches
    if not isinstance(batches, TrainBatches):
        return data
    preprocessing = dataclasses.replace(batches.preprocessing, seed=seed)
    batches = dataclasses.replace(batches, seed=seed, preprocessing=preprocessing)
    return dataclasses.replace(data, train_batches=batches)


def _random_bits(key: jax.Array, bit_width: int, shape: Sequence[int]) -> jax.Array:
    """Those of "rbg", for which a key under `vmap` is one of many, each with its own bits."""

    @custom_vmap
    def bits(key: jax.Array) -> jax.Array:
        return rbg_prng_impl.random_bits(key, bit_width, shape)

    @bits.def_vmap
    def _one_by_one(
        axis_size: int, in_batched: list[bool], keys: jax.Array
    ) -> tuple[jax.Array, bool]:
        return jax.lax.map(bits, keys), True

    return bits(key)


# The generator "rbg": under `vmap` a key gives the bits that it gives by itself.
_ONE_BY_ONE = define_prng_impl(
    key_shape=rbg_prng_impl.key_shape,
    seed=rbg_prng_impl.seed,
    split=rbg_prng_impl.split,
    random_bits=_random_bits,
    fold_in=rbg_prng_impl.fold_in,
    name="rbg_one_by_one",
)


def _get(config: ConfigDict, field: str) -> Any:
    return functools.reduce(lambda node, name: node[name], field.split("."), config)


def _with_numbers(config: ConfigDict, values: Mapping[str, Any]) -> ConfigDict:
    """The configuration with other numbers, which may be traced."""
    config = ConfigDict(config.to_dict(), type_safe=False)
    config.update_from_flattened_dict(values)
    return config


def _shared(config: ConfigDict) -> dict[str, Any]:
    """What the configurations of a group have in common."""
    fields = json.loads(json.dumps(config.to_dict()))
    for field in ("seed", *NUMBERS, *_NO_MATTER):
        *parents, name = field.split(".")
        node = functools.reduce(lambda node, part: node[part], parents, fields)
        value = node.pop(name)
        # Without a number, or with a ratio of 0, the program is another one.
        if value is None or (field == "gr.ratio" and not value):
            node[name] = "none"
    return fields


def _alone(config: ConfigDict) -> bool:
    """Whether a run is not trained with others."""
    devices = len(jax.devices()) if config.mesh.data == -1 else config.mesh.data * config.mesh.fsdp
    return (
        config.on_nonfinite == "rollback"
        or config.model.pretrained is not None
        or config.gr.num_groups is not None
        or config.data.resident == "false"
        or devices > 1
        or jax.process_count() > 1
    )


def _check_group(configs: Sequence[ConfigDict]) -> None:
    groups = group(configs)
    if len(groups) == 1:
        return
    a, b = groups[0][0], groups[1][0]
    changed = gnp_config.difference(_shared(configs[a]), _shared(configs[b]))
    why = "; ".join(changed) or (
        "it has several devices, streamed data, pretrained weights, config.gr.num_groups or "
        "config.on_nonfinite=rollback"
    )
    raise UserError(f"runs {a} and {b} cannot be trained in one program: {why}")
