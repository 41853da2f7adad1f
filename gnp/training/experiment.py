"""From a configuration to the objects that a run is made of, before anything is written."""

import dataclasses
import os
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from gnp import config as gnp_config
from gnp import data, models
from gnp.data.loading import Data, load_images, load_text
from gnp.errors import UserError, unknown
from gnp.training import optimizer as optimizers
from gnp.training.flops import forward_flops, step_flops
from gnp.training.sharding import make_mesh, of_state, over_batch, replicated
from gnp.training.state import MetricSums, TrainState, finite, mean_metrics
from gnp.training.step import init_state


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A configuration's data set (images not yet decoded), model, optimizer and mesh.

    `abstract_state` has the state's shapes, dtypes and shardings.
    """

    config: ConfigDict
    source: data.Source | data.TextSource
    model: nn.Module
    optimizer: optimizers.Optimizer
    mesh: Mesh
    total_steps: int
    abstract_state: TrainState

    @property
    def state_sharding(self) -> Any:
        """How the state lies on the mesh."""
        return jax.tree.map(lambda x: x.sharding, self.abstract_state)

    @property
    def examples_per_step(self) -> int:
        """The images, or the words, that a step learns from."""
        return _examples_per_step(self.config, self.source)

    @property
    def steps_per_epoch(self) -> float:
        """Training examples over those of a step; not a whole number in general."""
        return self.source.num_examples["train"] / self.examples_per_step

    @property
    def example(self) -> jax.Array:
        """An input that the model can be initialised with."""
        return _example(self.config, self.source)

    def steps(self, duration: str) -> int:
        """A duration, as "10ep", in steps of this run."""
        parsed = gnp_config.parse_duration(duration)
        return parsed.steps(self.steps_per_epoch, self.total_steps)

    def with_config(self, config: ConfigDict) -> "Experiment":
        """The experiment of a configuration that differs in the seed and the optimizer's numbers.

        They may be traced, as `optimizer.build` says.
        """
        optimizer = optimizers.build(
            config,
            steps_per_epoch=self.steps_per_epoch,
            total_steps=self.total_steps,
            params=lambda: self.abstract_state.params,
        )
        return dataclasses.replace(self, config=config, optimizer=optimizer)

    def flops(self, first: int, last: int) -> float:
        """FLOPs of the model's arithmetic in the steps from `first` to before `last`.

        See `flops.step_flops`. A step in which gradient regularization acts takes two gradients.
        """
        state = self.abstract_state
        variables = {"params": state.params, **state.model_state}
        words = self.source.unit == "word"
        forward = forward_flops(self.model, variables, self.example)
        forward *= self.examples_per_step / (self.example.size if words else 1)
        gr, second = self.config.gr, 0
        if gr.policy != "off" and gr.ratio:
            begin = self.steps(gr.warmup or self.config.lr.warmup) if gr.policy == "zero" else 0
            second = max(last - max(first, begin), 0)
        return step_flops(forward, last - first + second)

    def load_pretrained(self) -> Any:
        """The variables that `config.model.pretrained` names, None if it names none.

        Raises:
          UserError: if they cannot be read, or are not this model's.
        """
        if self.config.model.pretrained is None:
            return None
        return models.load_pretrained(
            self.config.model.name,
            os.path.expanduser(self.config.model.pretrained),
            channels=self.example.shape[-1],
            seed=self.config.seed,
            **_model_arguments(self.config, self.source),
        )

    def init(self, pretrained: Any = None) -> TrainState:
        """The state before the first step, on the devices, from pretrained variables if any."""
        return jax.jit(self._init, out_shardings=self.state_sharding)(pretrained)

    def load_data(self) -> Data:
        """Puts the data set onto the devices, or makes ready to stream it."""
        devices = self.mesh.devices.size
        # A batch is laid over all devices, each of which has as many rows of it.
        eval_batch_size = -(-self.config.eval.batch_size // devices) * devices
        config = self.config.data
        if isinstance(self.source, data.TextSource):
            return load_text(
                self.source,
                batch_size=config.batch_size,
                sequence_length=config.sequence_length,
                eval_streams=self.config.eval.batch_size,
                eval_batch_size=eval_batch_size,
                replicated=replicated(self.mesh),
            )
        return load_images(
            self.source,
            keep=config.resident,
            batch_size=config.batch_size,
            eval_batch_size=eval_batch_size,
            image_size=_image_size(config, self.source),
            operations=data.parse_augment(config.augment),
            mean=config.mean,
            std=config.std,
            seed=self.config.seed,
            num_steps=self.total_steps,
            num_workers=config.workers,
            skip_damaged=config.on_damaged == "skip",
            replicated=replicated(self.mesh),
            over_batch=over_batch(self.mesh),
        )

    def mean_metrics(self, sums: MetricSums) -> dict[str, float | None]:
        """The metrics' means, on the host; for text also the perplexity, exp(loss)."""
        means = mean_metrics(sums)
        if self.source.unit == "word":
            loss = means["loss"]
            means["perplexity"] = None if loss is None else finite(float(np.exp(loss)))
        return means

    def _init(self, pretrained: Any = None) -> TrainState:
        return _init(self.config, self.model, self.optimizer, self.example, pretrained)


def on_one_device(config: ConfigDict) -> ConfigDict:
    """A run's configuration for a look at its checkpoints, which may be on another machine."""
    config = config.copy_and_resolve_references()
    config.mesh.update({"data": 1, "fsdp": 1, "rules": ()})
    config.accumulate = 1
    return config


def make_experiment(config: ConfigDict) -> Experiment:
    """Validates a configuration and makes its objects; decodes and writes nothing.

    Raises:
      UserError: for anything in the configuration that is wrong or does not fit the data or the
        devices.
    """
    gnp_config.validate(config)
    part = config.data.batch_size // config.accumulate
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, batch_size=part)
    source = _open(config)
    num_examples, batch_size = source.num_examples["train"], config.data.batch_size
    examples_per_step = _examples_per_step(config, source)
    if examples_per_step > num_examples:
        asked = f"config.data.batch_size is {batch_size}"
        if source.unit == "word":
            asked += f" streams of config.data.sequence_length {config.data.sequence_length}"
        raise UserError(
            f"{asked}, but {source.name} has only {num_examples} training {source.unit}s"
        )
    groups = config.model.batch_norm_groups
    part = batch_size // (config.accumulate * (config.gr.num_groups or 1))
    if groups is not None and part % groups:
        parts = "" if part == batch_size else f" in parts of {part}"
        raise UserError(
            f"config.model.batch_norm_groups is {groups}, which does not divide "
            f"config.data.batch_size {batch_size}{parts}"
        )
    steps_per_epoch = num_examples / examples_per_step
    total_steps = max(round(config.epochs * steps_per_epoch), 1)
    if total_steps * examples_per_step >= 2**31:
        raise UserError(
            f"config.epochs is {config.epochs:g}: the run would see more than 2**31 {source.unit}s"
        )
    for field in ("lr", "gr"):
        if config[field].warmup is not None:
            duration = gnp_config.parse_duration(config[field].warmup)
            steps = duration.steps(steps_per_epoch, total_steps)
            if steps > total_steps:
                raise UserError(
                    f"config.{field}.warmup is {config[field].warmup!r}, {steps} steps, but the "
                    f"run has only {total_steps}"
                )
    model = models.create(config.model.name, **_model_arguments(config, source))
    example = _example(config, source)
    optimizer = optimizers.build(
        config,
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
        params=lambda: jax.eval_shape(model.init, jax.random.key(0), example)["params"],
    )
    state = jax.eval_shape(lambda: _init(config, model, optimizer, example))
    shardings = of_state(state, mesh, min_size=config.mesh.min_size, rules=config.mesh.rules)
    state = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        *(state, shardings),
    )
    if config.checkpoint.best is not None:
        known = {"loss", "error", "top5_error"} & {*state.metrics}
        known |= {"perplexity"} if source.unit == "word" else set()
        known |= {f"ema_{name}" for name in known} if config.ema.decay is not None else set()
        splits = [split for split in source.num_examples if split != "train"]
        metrics = [f"{split}/{name}" for split in splits for name in sorted(known)]
        if config.checkpoint.best not in metrics:
            raise unknown("config.checkpoint.best", config.checkpoint.best, metrics)
    return Experiment(config, source, model, optimizer, mesh, total_steps, state)


def _init(
    config: ConfigDict,
    model: nn.Module,
    optimizer: optimizers.Optimizer,
    example: jax.Array,
    pretrained: Any = None,
) -> TrainState:
    ema = config.ema.decay is not None
    return init_state(model, optimizer, example, config.seed, pretrained, ema=ema)


def nonfinite_limit(config: ConfigDict) -> int:
    """How many steps in a row may be not finite before the state stays as it is."""
    return config.max_nonfinite if config.on_nonfinite == "skip" else 1


def _example(config: ConfigDict, source: data.Source | data.TextSource) -> jax.Array:
    if isinstance(source, data.Source):
        size = _image_size(config.data, source)
        return jnp.zeros((1, size, size, source.image_shape[2]))
    # A language model carries a state for each stream.
    return jnp.zeros((config.data.batch_size, 1), jnp.int32)


def _image_size(config: ConfigDict, source: data.Source) -> int:
    return config.image_size or source.image_shape[0]


def _open(config: ConfigDict) -> data.Source | data.TextSource:
    """The data set, with the splits that the configuration names."""
    fields = config.data
    source = data.open_source(
        fields.name, fields.data_dir, image_size=fields.image_size, resize=fields.resize
    )
    if isinstance(source, data.TextSource):
        if (fields.train, fields.validation, fields.test) != ("train", None, None):
            raise UserError(
                f"{source.name} has its own splits ({', '.join(source.num_examples)}): leave "
                "config.data.train, .validation and .test as they are"
            )
        return source
    wanted = {"train": fields.train, "validation": fields.validation, "test": fields.test}
    wanted["test"] = wanted["test"] or source.test_split
    if not wanted["test"]:
        raise UserError(
            f"{source.name} in {source.where} has nothing to test on, only the split "
            f"{', '.join(source.splits)!r}: set apart a part of it, as with "
            "--config.data.train=train[:90%] --config.data.test=train[90%:]"
        )
    return source.select(**{name: part for name, part in wanted.items() if part})


def _model_arguments(config: ConfigDict, source: data.Source | data.TextSource) -> dict[str, Any]:
    """What `models.create` is told beside the name."""
    size = None
    if isinstance(source, data.Source):
        size, width, _ = source.image_shape
        if size != width:
            raise UserError(f"{source.name} has images of {size} × {width} pixels; square ones fit")
        size = config.data.image_size or size
    overrides = {
        field: value
        for field, value in config.model.items()
        if field not in ("name", "pretrained") and value is not None
    }
    known = [field for field in models.fields(config.model.name) if field in config.model]
    foreign = [field for field in overrides if field not in known]
    if foreign:
        raise UserError(
            f"{config.model.name} has no {' and no '.join(f'config.model.{f}' for f in foreign)}; "
            f"unset with {' '.join(f'--config.model.{f}=none' for f in foreign)} "
            f"(it has: {', '.join(known)})"
        )
    return {
        "num_classes": source.num_classes,
        "image_size": size,
        "dtype": jnp.dtype(config.dtype),
        **overrides,
    }


def _examples_per_step(config: ConfigDict, source: data.Source | data.TextSource) -> int:
    per_row = config.data.sequence_length if source.unit == "word" else 1
    return config.data.batch_size * per_row
