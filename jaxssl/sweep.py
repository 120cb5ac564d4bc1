"""One loop over images: evaluation, labeling, counting, making prototypes.

Each process takes a share of the images on devices of its own, so images may differ in size, and
what it adds up is summed over the processes in the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from jaxssl.contracts import IGNORE_LABEL, Source
from jaxssl.data import loading, pipeline
from jaxssl.sharding import replicated, to_devices

Update = Callable[[Mapping[str, jax.Array]], Any]
Sink = Callable[[Mapping[str, np.ndarray], Any], None]


def each(
    update: Update, batches: Iterable[Mapping[str, np.ndarray]], mesh: Mesh, sink: Sink
) -> None:
    """Hands what a function makes of each batch to another one.

    Args:
      update: jitted, or a few jitted functions, of a batch on the devices.
      batches: of this process; padding rows have index -1.
      mesh: the devices that share a batch.
      sink: takes each batch and what `update` made of it, fetched to the host, in order.
    """
    previous = None
    for batch in batches:
        outputs = update(to_devices(batch, mesh))
        # One batch late: the device works on this one while the host takes the one before.
        if previous is not None:
            sink(previous[0], jax.device_get(previous[1]))
        previous = (batch, outputs)
    if previous is not None:
        sink(previous[0], jax.device_get(previous[1]))


def add_up(update: Update, batches: Iterable[Mapping[str, np.ndarray]], mesh: Mesh) -> Any:
    """The sum of what a function makes of each batch, over all of this process.

    Returns:
      A tree of NumPy arrays, int64 for integers and float64 for floats: over a data set, int32
      would overflow and float32 round. None without a batch.
    """
    totals: list[Any] = []

    def add(_: object, outputs: Any) -> None:
        outputs = jax.tree.map(_widened, outputs)
        totals[:] = [jax.tree.map(np.add, totals[0], outputs) if totals else outputs]

    each(update, batches, mesh, add)
    return totals[0] if totals else None


def sum_over_processes(tree: Any) -> Any:
    """The sum over all processes of a tree of NumPy arrays of eight bytes a number."""
    return jax.tree.map(_sum_over_processes, tree) if jax.process_count() > 1 else tree


def share(source: Source) -> Source:
    """The images of a source that this process takes."""
    if jax.process_count() == 1:
        return source
    return loading.Subset(source, source.ids[jax.process_index() :: jax.process_count()])


def in_shares(
    source: Source,
    batch_size: int,
    *,
    bucket: int = 1,
    center: tuple[int, int] | None = None,
    on_damage: Callable[[str, str], None] | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """This process's share in batches (`pipeline.in_order`); one of padding where it is empty, so
    that every process has something to add up.

    `on_damage` is called, by any thread, with the id of an image that cannot be read and the
    reason, and the image is left out; None raises what the source raises.
    """
    mine = share(source)
    padding = {"valid": False, "label": IGNORE_LABEL, "index": -1} if not len(mine) else {}
    mine = mine if len(mine) else loading.Subset(source, source.ids[:1])
    note = on_damage and (lambda position, reason: on_damage(mine.ids[position], reason))
    for batch in pipeline.in_order(mine, batch_size, bucket=bucket, center=center, on_damage=note):
        filled = {k: np.full_like(batch[k], v) for k, v in padding.items() if k in batch}
        yield {**batch, **filled}


def local(tree: Any, mesh: Mesh) -> Any:
    """This process's copy of arrays that are on all devices, for programs of its own on `mesh`."""
    if jax.process_count() == 1:
        return tree
    return jax.tree.map(
        lambda x: jax.make_array_from_single_device_arrays(
            x.shape, replicated(mesh), [shard.data for shard in x.addressable_shards]
        ),
        tree,
    )


def _widened(x: np.ndarray) -> np.ndarray:
    return np.asarray(x, np.float64 if np.issubdtype(x.dtype, np.floating) else np.int64)


def _sum_over_processes(x: np.ndarray) -> np.ndarray:
    # Devices take no eight bytes a number, so it travels as bytes.
    sent = np.frombuffer(np.ascontiguousarray(x).tobytes(), np.uint8)
    gathered = np.asarray(multihost_utils.process_allgather(sent[None], tiled=True))
    return gathered.view(x.dtype).sum(0).reshape(x.shape)
