"""How arrays lie on the devices: the batch over the mesh's `data` axis, all else on each."""

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from gnp.errors import UserError


def make_mesh(num_devices: int, *, batch_size: int) -> Mesh:
    """A mesh of the first `num_devices` devices (-1: all), of which one is a mesh of one.

    Raises:
      UserError: if there are fewer devices, or they do not divide the batch.
    """
    devices = jax.devices()
    count = len(devices) if num_devices == -1 else num_devices
    if count > len(devices):
        raise UserError(
            f"config.mesh.data is {count}, but there are {len(devices)} devices "
            f"({devices[0].platform}); use at most that many, or -1 for all"
        )
    if batch_size % count:
        raise UserError(
            f"config.data.batch_size is {batch_size}, which {count} devices do not divide; "
            f"use a multiple of {count}, or set config.mesh.data"
        )
    return jax.make_mesh((count,), ("data",), (AxisType.Auto,), devices=devices[:count])


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, PartitionSpec())


def over_batch(mesh: Mesh) -> NamedSharding:
    """The first axis, that of the examples, cut over the devices."""
    return NamedSharding(mesh, PartitionSpec("data"))
