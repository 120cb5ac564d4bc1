"""One loop over images in order: evaluation, labeling, counting, making prototypes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxssl.sharding import to_devices

Update = Callable[[Any, Mapping[str, jax.Array]], tuple[Any, Any]]
Sink = Callable[[Mapping[str, np.ndarray], Any], None]


def fold(
    update: Update,
    carry: Any,
    batches: Iterable[Mapping[str, np.ndarray]],
    mesh: Mesh,
    *,
    sink: Sink | None = None,
) -> Any:
    """Folds a function over batches.

    Args:
      update: jitted, `(carry, batch) -> (carry, outputs)`.
      carry: what the first call gets.
      batches: this process's rows of each global batch; padding rows have index -1.
      mesh: the devices that share a batch.
      sink: takes each batch and its outputs, fetched to the host, in order.

    Returns:
      The last carry.
    """
    previous = None
    for batch in batches:
        carry, outputs = update(carry, to_devices(batch, mesh))
        # One batch late: the device works on this one while the host takes the one before.
        if sink is not None and previous is not None:
            sink(previous[0], jax.device_get(previous[1]))
        previous = (batch, outputs)
    if sink is not None and previous is not None:
        sink(previous[0], jax.device_get(previous[1]))
    return carry
