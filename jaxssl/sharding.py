"""Where arrays live: one mesh axis, batches split along it, everything else on every device.

A training step sees the global batch, and the compiler splits the work ("mesh"); or it runs on each
device and sees that device's part alone ("pmap"). Either way every device holds the whole state, so
evaluation, sweeps and checkpoints need not know which.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxssl.contracts import Stream, UserError

AXIS = "data"

Parallel = Literal["mesh", "pmap"]


def make_mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over all devices (or the given ones) with the one axis "data".

    Its axis is of type Auto: the compiler decides how an array is split between the annotations.

    Raises:
      UserError: there is no device, or another program holds it.
    """
    devices = _all_devices() if devices is None else devices
    return Mesh(np.array(devices), (AXIS,), axis_types=(AxisType.Auto,))


def _all_devices() -> Sequence[Any]:
    try:
        return jax.devices()
    except RuntimeError as error:
        raise UserError(
            f"jax opens no device here: {error} If another program holds it, wait for that, or "
            "set JAX_PLATFORMS=cpu to do without."
        ) from error


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batched(mesh: Mesh) -> NamedSharding:
    """The first axis split over the devices."""
    return NamedSharding(mesh, PartitionSpec(AXIS))


def to_devices(batch: Any, mesh: Mesh, parallel: Parallel = "mesh") -> Any:
    """Global arrays from each process's contiguous block of rows, a tree of NumPy arrays.

    For "pmap" their shape `[B,...]` becomes `[devices,B/devices,...]`.
    """
    sharding, devices = batched(mesh), mesh.local_mesh.size

    def put(rows: np.ndarray) -> jax.Array:
        rows = rows.reshape(devices, -1, *rows.shape[1:]) if parallel == "pmap" else rows
        return jax.make_array_from_process_local_data(sharding, rows)

    return jax.tree.map(put, batch)


def parallelize(step: Callable[..., Any], mesh: Mesh, parallel: Parallel) -> Any:
    """The jitted `step(state, frozen, batch, clock)`: `state` is donated, `batch` is split over the
    devices as `to_devices` does it, the rest and what is returned are on every device.
    """
    if parallel == "pmap":
        # What devices return is the same on all: no axis of devices has to be added or taken away.
        return jax.pmap(
            step,
            AXIS,
            in_axes=(None, None, 0, None),
            out_axes=None,
            devices=mesh.devices.tolist(),
            donate_argnums=0,
        )
    everywhere = replicated(mesh)
    return jax.jit(
        step,
        in_shardings=(everywhere, everywhere, batched(mesh), everywhere),
        out_shardings=everywhere,
        donate_argnums=0,
    )


def round_up(batch: int, mesh: Mesh) -> int:
    """The next number of images that splits evenly over the devices."""
    return -(-batch // mesh.size) * mesh.size


def check_batch(stream: Stream, accumulate: int, mesh: Mesh) -> None:
    """Refuses a batch that does not split evenly into micro-batches over the devices."""
    if stream.batch % (accumulate * mesh.size):
        raise UserError(
            f"batch.{stream.name}={stream.batch} cannot be split evenly over batch.accumulate="
            f"{accumulate} and {mesh.size} devices. Choose a multiple of {accumulate * mesh.size}; "
            "where there are too few images for that, fewer devices: CUDA_VISIBLE_DEVICES=0, say."
        )


def abstract(tree: Any, sharding: NamedSharding) -> Any:
    """Shapes and dtypes of a tree, each with `sharding`: what a checkpoint is restored into."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
    )
