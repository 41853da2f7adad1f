"""Train steps as the benchmarks of training run them: ours, and bare ones beside them."""

import contextlib
import functools
import gc
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import benchmark
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import lax
from ml_collections import ConfigDict

from gnp import config as gnp_config
from gnp import models
from gnp.errors import UserError
from gnp.training import optimizer as optimizers
from gnp.training.sharding import make_mesh, over_batch, replicated
from gnp.training.step import init_state, make_train_call, make_train_step

RATE, DECAY, RADIUS = 1e-3, 0.03, 0.1
WARMUP_STEPS = 10**6  # of zero-warmup: no measurement comes to its end
STEPS_PER_CALL = 16  # `config.steps_per_call`
CONVOLUTIONAL = ("resnet", "vgg", "densenet", "googlenet")


class Case(NamedTuple):
    """A model, the size of its images and the dtype of its arithmetic."""

    name: str
    image_size: int
    dtype: str

    def model(self, sizes: Any) -> nn.Module:
        """The module; `sizes` may have a ViT's width, depth and num_heads.

        Raises:
          UserError: if there is no such model, or it takes no images, or none of this size.
        """
        models.fields(self.name)  # raises an error for a name that is unknown
        if models.list_models()[self.name].takes != "images":
            raise UserError(f"{self.name} takes no images, which are all that this benchmark has")
        return models.create(
            self.name,
            num_classes_at(self.image_size),
            image_size=self.image_size,
            dtype=jnp.dtype(self.dtype),
            **self.overrides(sizes),
        )

    def overrides(self, sizes: Any) -> dict[str, Any]:
        """Those of `sizes` that are of this model."""
        names = ("width", "depth", "num_heads") if self.name.startswith("vit") else ()
        return {field: sizes[field] for field in names if field in sizes}

    def task(self, batch_size: int, sizes: Any) -> "Task":
        """What is learned: a batch of random images."""
        shape = (batch_size, self.image_size, self.image_size, 3)
        key = jax.random.key(0)
        batch = {
            "input": jax.random.normal(key, shape),
            "label": jax.random.randint(key, (batch_size,), 0, num_classes_at(self.image_size)),
        }
        return Task(self, self.overrides(sizes), self.model(sizes), batch)


class Task(NamedTuple):
    """A model and the batch that it learns, which stays on the device.

    Attributes:
      case: what the model is.
      overrides: its fields that are not the registered ones.
      model: the module.
      batch: "input" and "label".
    """

    case: Case
    overrides: dict[str, Any]
    model: nn.Module
    batch: Any

    @property
    def label(self) -> str:
        """What rows are called."""
        name, image_size, dtype = self.case
        return f"{name} at {image_size}, {dtype}, batch {self.batch_size}"

    @property
    def batch_size(self) -> int:
        """The images of a batch."""
        return self.batch["label"].size

    @property
    def example(self) -> jax.Array:
        """An input that the model can be initialised with."""
        return jnp.zeros((1, *self.batch["input"].shape[1:]))

    @property
    def steps_per_call(self) -> int:
        """As in the configurations: on CPUs convolutions are slow in a loop."""
        slow = jax.default_backend() == "cpu" and self.case.name.startswith(CONVOLUTIONAL)
        return 1 if slow else STEPS_PER_CALL


def num_classes_at(image_size: int) -> int:
    """Those of ImageNet or of CIFAR-10, by the size of the images."""
    return 1000 if image_size >= 128 else 10


def make_config(policy: str = "off", decay: str = "decoupled") -> ConfigDict:
    """AdamW or, with a "scheduled" decay, AdamS; with gradient regularization of α = 1."""
    config = gnp_config.default()
    config.lr.base = RATE
    config.weight_decay.update(kind=decay, value=DECAY)
    config.gr.update(policy=policy, radius=RADIUS, ratio=1.0)
    if policy == "zero":
        config.gr.warmup = f"{WARMUP_STEPS}st"
    return config


class Ready:
    """Batches that are no work: each is all that the call is given."""

    def order(self, first_step: jax.Array, num_steps: int) -> jax.Array:
        """Nothing to be known of a batch."""
        return jnp.zeros(num_steps, jnp.int32)

    def batch(self, data: Any, indices: jax.Array, step: jax.Array) -> Any:
        """All of `data`."""
        # Without a barrier what the model does with it alone would be done once for all steps.
        return lax.optimization_barrier((data, step))[0]


class OurSteps:
    """The training loop's compiled call on a batch that is ready, and the state it has come to.

    Args:
      task: what is learned.
      config: as of `make_config`; its `gr.num_groups` too is looked at.
      devices: how many the batch is laid over.
      metrics: whether the step's metrics are computed; without, XLA leaves out all they need.
      checked: whether a step that is not finite is left out.
      steps_per_call: at most; the task's by default.
    """

    def __init__(
        self,
        task: Task,
        config: ConfigDict,
        *,
        devices: int = 1,
        metrics: bool = True,
        checked: bool = True,
        steps_per_call: int | None = None,
    ):
        model, mesh = task.model, make_mesh(devices, batch_size=task.batch_size)
        optimizer = optimizers.build(
            config,
            steps_per_epoch=100,
            total_steps=10**9,
            params=lambda: jax.eval_shape(model.init, jax.random.key(0), task.example)["params"],
        )
        step = make_train_step(
            *(model, optimizer),
            **{"seed": 0, "log_every": 100, "mesh": mesh, "num_groups": config.gr.num_groups},
            nonfinite_limit=1 if checked else None,
        )
        silent = lambda state, batch: step(state, batch).replace(metrics=state.metrics)  # noqa: E731
        self.size = steps_per_call or task.steps_per_call
        call = make_train_call(step if metrics else silent, Ready(), max_steps=self.size, mesh=mesh)
        make_state = functools.partial(init_state, model, optimizer, task.example, 0)
        self.state = jax.jit(make_state, out_shardings=replicated(mesh))()
        self.data = jax.device_put(task.batch, over_batch(mesh))
        self.program = compiled(call.lower(self.state, self.data, self.size))

    def seconds(self, steps: int) -> float:
        """The wall time of a step, over this many."""
        jax.block_until_ready(self.state)
        start, waiting = time.perf_counter(), None
        for done in range(0, steps, self.size):
            num_steps = min(self.size, steps - done)
            self.state, sums = self.program(self.state, self.data, num_steps)
            jax.block_until_ready(waiting)  # as the loop: the device always has the next call to do
            waiting = sums
        jax.block_until_ready((self.state, waiting))
        return (time.perf_counter() - start) / steps

    def end_warmup(self) -> None:
        """Sets the count of zero-warmup behind its end; the program stays as it is."""
        gr_state, *rest = self.state.opt_state
        count = jnp.full_like(gr_state.count, WARMUP_STEPS)
        gr_state = gr_state._replace(count=jax.device_put(count, gr_state.count.sharding))
        self.state = self.state.replace(opt_state=(gr_state, *rest))


class BareSteps:
    """A training step as one would write it, jitted and donated; nothing of it is gnp's.

    Args:
      task: what is learned.
      tx: the optimizer.
      steps_per_call: 1 for a loop in Python, else one on the device of up to so many steps.
    """

    def __init__(self, task: Task, tx: optax.GradientTransformation, steps_per_call: int = 1):
        tx, apply = optax.with_extra_args_support(tx), task.model.apply

        def loss_fn(params: Any, stats: Any, batch: Any) -> tuple[jax.Array, Any]:
            logits, stats = apply(
                {"params": params, **stats}, batch["input"], train=True, mutable=list(stats)
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
            return losses.mean(), stats

        def step(state: Any, batch: Any) -> Any:
            params, stats, opt_state, _ = state

            def grad_fn(params: Any, _: Any) -> Any:  # as `optax.contrib.sam` calls it
                return jax.grad(loss_fn, has_aux=True)(params, stats, batch)[0]

            (loss, after), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, stats, batch)
            updates, opt_state = tx.update(grads, opt_state, params, grad_fn=grad_fn)
            return optax.apply_updates(params, updates), after, opt_state, loss

        def loop(state: Any, batch: Any, num_steps: jax.Array) -> Any:
            def body(_: jax.Array, state: Any) -> Any:
                return step(state, Ready().batch(batch, None, state[-1]))

            return lax.fori_loop(0, num_steps, body, state)

        def init(key: jax.Array) -> Any:
            stats = task.model.init(key, task.example)
            params = stats.pop("params")
            return params, stats, tx.init(params), jnp.zeros(())

        self.size, self.data = steps_per_call, task.batch
        self.state = jax.jit(init)(jax.random.key(0, impl="rbg"))
        call = jax.jit(step if self.size == 1 else loop, donate_argnums=0)
        self.program = compiled(call.lower(self.state, self.data, *self._count(self.size)))

    def _count(self, steps: int) -> tuple[int, ...]:
        return () if self.size == 1 else (steps,)

    def seconds(self, steps: int) -> float:
        """The wall time of a step, over this many."""
        jax.block_until_ready(self.state)
        start = time.perf_counter()
        for done in range(0, steps, self.size):
            count = self._count(min(self.size, steps - done))
            self.state = self.program(self.state, self.data, *count)
        jax.block_until_ready(self.state)
        return (time.perf_counter() - start) / steps


def adamw() -> optax.GradientTransformation:
    """What `make_config` stands for by default, as Optax has it."""
    return optax.adamw(RATE, weight_decay=DECAY)


def compiled(lowered: Any) -> jax.stages.Compiled:
    """The program.

    Raises:
      MemoryError: on a CPU, if it wants more memory than there is: the system would not refuse it,
        but end the process.
    """
    program = lowered.compile()
    if jax.default_backend() == "cpu":
        wanted = benchmark.temporary_bytes(program)
        with contextlib.suppress(OSError), open("/proc/meminfo") as file:
            fields = dict(line.split(":") for line in file)
            free = 1024 * int(fields["MemAvailable"].split()[0])
            if wanted > 0.9 * free:
                raise MemoryError(f"{wanted / 2**30:.1f} GiB wanted, {free / 2**30:.1f} free")
    return program


def is_out_of_memory(error: BaseException) -> bool:
    """Whether JAX, PyTorch or Python has found too little memory."""
    words = ("RESOURCE_EXHAUSTED", "out of memory", "Out of memory")
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


@contextlib.contextmanager
def skipped_if_too_large(name: str) -> Iterator[None]:
    """Leaves out what does not fit into memory, with a line that says so."""
    try:
        yield
    except (RuntimeError, MemoryError, UserError) as error:  # the last: of `gnp.training.train`
        if not is_out_of_memory(error):
            raise
        reason = str(error).splitlines()[0][:120] if str(error) else "no reason given"
        print(f"{name}: skipped, out of memory ({reason})", flush=True)
    gc.collect()  # arrays in cycles
