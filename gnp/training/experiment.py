"""From a configuration to the objects that a run is made of, before anything is written."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from gnp import config as gnp_config
from gnp import data, models
from gnp.data.pipeline import Batch, EvalBatches, TrainBatches, channel_statistics
from gnp.errors import UserError
from gnp.training import optimizer as optimizers
from gnp.training.sharding import make_mesh, replicated
from gnp.training.state import TrainState
from gnp.training.step import init_state


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A configuration's data set (not yet decoded), model, optimizer and mesh."""

    config: ConfigDict
    source: data.Source
    model: nn.Module
    optimizer: optimizers.Optimizer
    mesh: Mesh
    total_steps: int

    @property
    def steps_per_epoch(self) -> float:
        """Training examples over the batch size; not a whole number in general."""
        return self.source.num_examples["train"] / self.config.data.batch_size

    def steps(self, duration: str) -> int:
        """A duration, as "10ep", in steps of this run."""
        parsed = gnp_config.parse_duration(duration)
        return parsed.steps(self.steps_per_epoch, self.total_steps)

    def init(self) -> TrainState:
        """The state before the first step, on every device."""
        return jax.jit(self._init, out_shardings=replicated(self.mesh))()

    def abstract_state(self) -> TrainState:
        """The state's shapes, dtypes and shardings, for restoring."""
        sharding = replicated(self.mesh)
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            jax.eval_shape(self._init),
        )

    def load_data(self) -> "Data":
        """Decodes the data set, or reads it from the cache, and puts it onto the devices."""
        splits = self.source.load()
        config = self.config.data
        mean, std = channel_statistics(splits["train"].images)
        devices = self.mesh.devices.size
        eval_batch_size = -(-self.config.eval.batch_size // devices) * devices
        return Data(
            arrays={
                name: jax.device_put(
                    {"image": split.images, "label": split.labels}, replicated(self.mesh)
                )
                for name, split in splits.items()
            },
            train_batches=TrainBatches(
                num_examples=self.source.num_examples["train"],
                batch_size=config.batch_size,
                seed=self.config.seed,
                operations=data.parse_augment(config.augment),
                padding=config.padding,
                mean=mean,
                std=std,
            ),
            eval_batches={
                name: EvalBatches(
                    count, min(eval_batch_size, -(-count // devices) * devices), mean, std
                )
                for name, count in self.source.num_examples.items()
            },
        )

    def _init(self) -> TrainState:
        return init_state(self.model, self.optimizer, self.source.image_shape, self.config.seed)


@dataclasses.dataclass(frozen=True)
class Data:
    """A data set's arrays on the devices, "train" and "test", and how batches are made of them."""

    arrays: dict[str, Batch]
    train_batches: TrainBatches
    eval_batches: dict[str, EvalBatches]


def make_experiment(config: ConfigDict) -> Experiment:
    """Validates a configuration and makes its objects; decodes and writes nothing.

    Raises:
      UserError: for anything in the configuration that is wrong or does not fit the data or the
        devices.
    """
    gnp_config.validate(config)
    mesh = make_mesh(config.mesh.data, batch_size=config.data.batch_size)
    source = data.open_source(config.data.name, config.data.data_dir)
    num_examples, batch_size = source.num_examples["train"], config.data.batch_size
    if batch_size > num_examples:
        raise UserError(
            f"config.data.batch_size is {batch_size}, but {source.name} has only "
            f"{num_examples} training examples"
        )
    height, width, _ = source.image_shape
    if height != width:
        raise UserError(f"{source.name} has images of {height} × {width} pixels; square ones fit")
    total_steps = max(round(config.epochs * num_examples / batch_size), 1)
    if total_steps * batch_size >= 2**31:
        raise UserError(
            f"config.epochs is {config.epochs:g}: the run would see more than 2**31 examples"
        )
    for field in ("lr", "gr"):
        if config[field].warmup is not None:
            duration = gnp_config.parse_duration(config[field].warmup)
            steps = duration.steps(num_examples / batch_size, total_steps)
            if steps > total_steps:
                raise UserError(
                    f"config.{field}.warmup is {config[field].warmup!r}, {steps} steps, but the "
                    f"run has only {total_steps}"
                )
    overrides: dict[str, Any] = {
        field: value
        for field, value in config.model.items()
        if field != "name" and value is not None
    }
    model = models.create(
        config.model.name,
        source.num_classes,
        image_size=height,
        dtype=jnp.dtype(config.dtype),
        **overrides,
    )
    optimizer = optimizers.build(
        config, steps_per_epoch=num_examples / batch_size, total_steps=total_steps
    )
    return Experiment(config, source, model, optimizer, mesh, total_steps)
