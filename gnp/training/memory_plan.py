"""What a run needs of a device's memory: before the step is compiled, and where it did not do."""

import math
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, Var, jaxprs_in_params
from ml_collections import ConfigDict

from gnp import models
from gnp.data.archives import in_bytes
from gnp.errors import UserError
from gnp.training.state import TrainState

# Operations that XLA makes no array for: what reads their result reads their operand.
_VIEWS = {
    *("broadcast_in_dim", "expand_dims", "reshape", "sharding_constraint", "squeeze", "transpose"),
}


class MemoryPlan(NamedTuple):
    """Bytes of one device's memory.

    Attributes:
      params: the parameters, and the model's other variables.
      optimizer: the optimizer's state.
      ema: the averages of the parameters.
      gradients: what the fullest moment of a step has beside these in arrays that are shaped like
        parameters: gradients, perturbed parameters.
      activations: what that moment has in other arrays; an estimate.
      data: the data set, or the batches that wait.
      total: the sum.
      device: what the device has; None if that is not known.
    """

    params: int
    optimizer: int
    ema: int
    gradients: int
    activations: int
    data: int
    total: int
    device: int | None

    def __str__(self) -> str:
        """One line, without what there is none of."""
        parts = {
            "parameters": self.params,
            "their average": self.ema,
            "optimizer": self.optimizer,
            "data": self.data,
            "a step's gradients": self.gradients,
            "its activations about": self.activations,
        }
        listed = ", ".join(f"{name} {in_bytes(size)}" for name, size in parts.items() if size)
        return f"memory a device: {listed}; in all {self.summary}"

    @property
    def summary(self) -> str:
        """The total, and of how much."""
        of = "" if self.device is None else f" of {in_bytes(self.device)}"
        return f"about {in_bytes(self.total)}{of}"


def plan(
    program: ClosedJaxpr,
    state: TrainState,
    *,
    num_devices: int = 1,
    data: int = 0,
    device: int | None = None,
) -> MemoryPlan:
    """What a program of train steps needs, from its operations' shapes; compiles nothing.

    Beside its inputs a program keeps each result until the last operation that reads it, in the
    order in which it was traced, where the backward pass comes after the forward pass and what
    `remat` computes again comes just before it is wanted. The fullest moment is what counts. Of
    the estimate, XLA's fusion saves some (the optimizer's passes over the parameters, most of all)
    and its scratch space and another order add some: for the models of `gnp.models` on a CPU its
    own figure is from 0.8 to 1.5 times the estimate. It is 4 times as large, no less than without
    `remat`, where blocks are not scanned: XLA's order for CPUs computes them again too early.

    Results that are shaped like a parameter lie on the devices as it does, all others are cut
    over them evenly. What the program returns lies where the state that it is given lay.

    Args:
      program: `jitted.trace(state, …).jaxpr`, whose first argument is donated.
      state: the state, or its shapes; a sharding says what part of an array a device has.
      num_devices: that a batch is laid over.
      data: bytes of the data on each device.
      device: bytes of memory that each device has, None if that is not known.
    """
    like_params = {(x.shape, x.dtype): bytes_per_device(x) for x in jax.tree.leaves(state.params)}

    def usage(value: Var) -> _Usage:
        aval: Any = value.aval
        if not hasattr(aval, "shape"):  # a token, which orders operations
            return _Usage(0, 0)
        gradient = like_params.get((aval.shape, aval.dtype))
        if gradient is not None:
            return _Usage(gradient, 0)
        return _Usage(0, math.prod(aval.shape) * aval.dtype.itemsize // num_devices)

    fullest = _fullest(program.jaxpr, usage)
    parts = {
        "params": bytes_per_device((state.params, state.model_state)),
        "optimizer": bytes_per_device(state.opt_state),
        "ema": bytes_per_device(state.ema),
        "gradients": fullest.gradients,
        "activations": fullest.activations,
        "data": data,
    }
    return MemoryPlan(**parts, total=sum(parts.values()), device=device)


def bytes_per_device(tree: Any) -> int:
    """Bytes that arrays, or their shapes, take on each device; whole ones without a sharding."""

    def size(x: Any) -> int:
        sharding = getattr(x, "sharding", None)
        shape = x.shape if sharding is None else sharding.shard_shape(x.shape)
        return math.prod(shape) * x.dtype.itemsize

    return sum(map(size, jax.tree.leaves(tree)))


class _Usage(NamedTuple):
    """Bytes on a device of arrays that are shaped like parameters, and of others."""

    gradients: int
    activations: int

    def __add__(self, other: Any) -> "_Usage":
        return _Usage(self.gradients + other.gradients, self.activations + other.activations)

    def __sub__(self, other: Any) -> "_Usage":
        return _Usage(self.gradients - other.gradients, self.activations - other.activations)


def _fullest(jaxpr: Jaxpr, usage: Callable[[Var], _Usage]) -> _Usage:
    """What a program holds at its fullest moment, beside its inputs and its results.

    Goes backwards, so that the first operation that is met and reads a value is its last reader,
    and results that none reads are known not to be computed.
    """
    array = _arrays(jaxpr)

    def arrays(values: Iterable[Var | Literal]) -> set[Var]:
        found = {array[v] for v in values if not isinstance(v, Literal)}
        return {v for v in found if v is not None}

    results, live = arrays(jaxpr.outvars), set[Var]()
    held = fullest = _Usage(0, 0)

    def hold(values: set[Var]) -> None:
        nonlocal held
        for value in values - results - live:
            live.add(value)
            held += usage(value)

    for operation in reversed(jaxpr.eqns):
        written = {v for v in operation.outvars if array[v] is v}
        if not operation.effects and not written & (live | results):
            continue
        hold(written | arrays(operation.invars))
        inner = [_fullest(jaxpr, usage) for jaxpr in jaxprs_in_params(operation.params)]
        fullest = max(fullest, *(held + other for other in [_Usage(0, 0), *inner]), key=sum)
        for value in written & live:
            live.remove(value)
            held -= usage(value)
    return fullest


def _arrays(jaxpr: Jaxpr) -> dict[Var, Var | None]:
    """For each value the one in whose memory it lies: itself, or what it is a view of.

    None for inputs, which are the caller's, and for views of them and of constants.
    """
    array: dict[Var, Var | None] = dict.fromkeys([*jaxpr.invars, *jaxpr.constvars])
    for operation in jaxpr.eqns:
        if operation.primitive.name in _VIEWS:
            source = operation.invars[0]
            array[operation.outvars[0]] = None if isinstance(source, Literal) else array[source]
        else:
            array |= {v: v for v in operation.outvars}
    return array


def out_of_memory(
    error: Exception,
    config: ConfigDict,
    memory: MemoryPlan | None = None,
    *,
    num_devices: int = 1,
) -> UserError | None:
    """What to do about an error of XLA's that says that memory ran out; None for any other error.

    Args:
      error: of a compilation or a call.
      config: the run's; what it has done already is not advised.
      memory: the plan, to be repeated.
      num_devices: that a batch is laid over.
    """
    text = str(error)
    exhausted = "RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower()
    if not isinstance(error, jax.errors.JaxRuntimeError) or not exhausted:
        return None
    # "allocating 4096 bytes", "to allocate 1.5GiB"; of TPUs "Used 21.95G of 15.48G hbm".
    asked = re.search(r"(?:allocat\w+|Used) ([\d.]+) ?([a-zA-Z]+)(?: of ([\d.]+\w+))?", text)
    about = []
    if asked:
        number, unit, there = asked.groups()
        size = in_bytes(int(number)) if unit == "bytes" else number + unit
        about.append(f"{size}{f' of {there}' if there else ''} were asked for")
    if memory:
        about.append(f"the plan was {memory.summary} a device")
    told = f" ({'; '.join(about)})" if about else ""
    return UserError(f"out of memory{told}: {_advice(config, num_devices)}")


def _advice(config: ConfigDict, num_devices: int) -> str:
    """What would save memory, as far as the run has not done it; what changes it least first."""
    model, data, mesh = config.model, config.data, config.mesh
    fields, takes = models.fields(model.name), models.list_models()[model.name].takes
    parts = _more_parts(config, num_devices)
    settings = []
    if parts:
        same = "but for BatchNorm's statistics " if "batch_norm_groups" in fields else ""
        settings.append(f"config.accumulate={parts} ({same}the same result)")
    if "remat" in fields and model.remat != "full":
        settings.append("config.model.remat=full")
    if config.dtype == "float32":
        settings.append("config.dtype=bfloat16")
    if mesh.fsdp < num_devices:
        all_data = "" if mesh.data == -1 else " with config.mesh.data=1"
        settings.append(f"config.mesh.fsdp={num_devices}{all_data}")
    if takes == "images" and data.resident != "false":
        settings.append("config.data.resident=false")
    lower = f"lower config.data.batch_size ({data.batch_size} now)"
    return f"{lower}, or set {', or '.join(settings)}" if settings else lower


def _more_parts(config: ConfigDict, num_devices: int) -> int | None:
    """The next larger `config.accumulate` that divides the batch; None if there is none."""
    batch_size, groups = config.data.batch_size, config.gr.num_groups or 1
    rows = math.lcm(num_devices, groups * (config.model.batch_norm_groups or 1))
    for parts in range(config.accumulate + 1, batch_size // rows + 1):
        if batch_size % (parts * rows) == 0:
            return parts
    return None
