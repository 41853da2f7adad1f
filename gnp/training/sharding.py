"""How arrays lie on the devices: a batch over all of them, large parameters over some.

The mesh has two axes. A batch is cut along both, so every device has rows of its own. Parameters,
and what the optimizer keeps of them, are the same along "data" and are cut along "fsdp" (fully
sharded data parallelism: each device keeps a part, and gets the others when they are wanted).
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from gnp.errors import UserError

AXES = ("data", "fsdp")


def make_mesh(data: int, fsdp: int = 1, *, batch_size: int) -> Mesh:
    """A mesh of `data` × `fsdp` devices, the first ones; `data` -1: as many as there are.

    Raises:
      UserError: if there are fewer devices, or they do not divide the batch, or a process would
        have none of them.
    """
    devices = jax.devices()
    if data == -1:
        if len(devices) % fsdp:
            raise UserError(
                f"config.mesh.fsdp is {fsdp}, which does not divide the {len(devices)} devices "
                f"({devices[0].platform}); set config.mesh.data too, or another config.mesh.fsdp"
            )
        data = len(devices) // fsdp
    count = data * fsdp
    if count > len(devices):
        asked = f"config.mesh.data is {data}"
        if fsdp > 1:
            asked += f" and config.mesh.fsdp {fsdp}"
        raise UserError(
            f"{asked}, but there are {len(devices)} devices ({devices[0].platform}); use at most "
            "that many, or config.mesh.data=-1 for all"
        )
    if len({device.process_index for device in devices[:count]}) < jax.process_count():
        raise UserError(
            f"config.mesh has {count} of the {len(devices)} devices, which leaves some of the "
            f"{jax.process_count()} processes without any; set config.mesh.data=-1"
        )
    if batch_size % count:
        raise UserError(
            f"config.data.batch_size is {batch_size}, which {count} devices do not divide; "
            f"use a multiple of {count}, or set config.mesh.data"
        )
    return jax.make_mesh((data, fsdp), AXES, (AxisType.Auto,) * 2, devices=devices[:count])


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, PartitionSpec())


def over_batch(mesh: Mesh) -> NamedSharding:
    """The first axis, that of the examples, cut over the devices."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def over_microbatches(mesh: Mesh) -> NamedSharding:
    """The second axis cut over the devices, the first one gone through in time."""
    return NamedSharding(mesh, PartitionSpec(None, AXES))


def of_state(state: Any, mesh: Mesh, *, min_size: int, rules: Sequence[str] = ()) -> Any:
    """How each array of a state lies on the mesh.

    An array of at least `min_size` elements is cut over "fsdp" along its largest axis that the
    devices divide (the last one of equals); others are on every device. A moment in the optimizer's
    state has its parameter's shape, so it lies like it.

    Args:
      state: arrays, or their shapes.
      mesh: of `make_mesh`.
      min_size: elements.
      rules: "PATTERN=AXIS" or "PATTERN=none", the first of which whose regular expression is found
        in an array's path ("params/blocks/attn/qkv/kernel") decides in place of the size.

    Returns:
      A tree of the state's structure of `NamedSharding`.

    Raises:
      UserError: if a rule is none, matches nothing, or names an axis that cannot be cut.
    """
    parts = mesh.shape["fsdp"]
    parsed = [_parse(rule) for rule in rules]
    used = set()

    def sharding(path: Any, x: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        axis = _largest_axis(x.shape, parts) if math.prod(x.shape) >= min_size else None
        for i, (pattern, given) in enumerate(parsed):
            if pattern.search(name):
                used.add(i)
                axis = given
                if axis is not None and (axis >= len(x.shape) or x.shape[axis] % parts):
                    raise UserError(
                        f"config.mesh.rules: {rules[i]!r} matches {name}, whose shape {x.shape} "
                        f"has no axis {axis} that {parts} devices divide"
                    )
                break
        if axis is None or parts == 1:
            return replicated(mesh)
        return NamedSharding(mesh, PartitionSpec(*(None,) * axis, "fsdp"))

    shardings = jax.tree_util.tree_map_with_path(sharding, state)
    for i, rule in enumerate(rules):
        if i not in used:
            raise UserError(
                f"config.mesh.rules: {rule!r} decides nothing; it is looked for in paths such as "
                "params/blocks/attn/qkv/kernel, and the first rule that is found decides"
            )
    return shardings


def _largest_axis(shape: tuple[int, ...], parts: int) -> int | None:
    """The largest axis that the parts divide, the last of equals; None if there is none."""
    divisible = [axis for axis, size in enumerate(shape) if size and size % parts == 0]
    return max(divisible, key=lambda axis: (shape[axis], axis), default=None)


def _parse(rule: str) -> tuple[re.Pattern[str], int | None]:
    """A rule's pattern and axis."""
    pattern, equals, axis = str(rule).rpartition("=")
    try:
        if not equals or not (axis == "none" or axis.isdecimal()):
            raise ValueError
        return re.compile(pattern), None if axis == "none" else int(axis)
    except (ValueError, re.error):
        raise UserError(
            f"config.mesh.rules: {rule!r} is no rule; write PATTERN=AXIS or PATTERN=none, as "
            "head/kernel=0"
        ) from None
