"""Evaluation: one confusion matrix over a set of labeled images."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxssl import metrics, sharding
from jaxssl.contracts import Network, Source, UserError, Variables
from jaxssl.data import pipeline
from jaxssl.state import TEACHER
from jaxssl.step import make_predict_step
from jaxssl.sweep import fold

MODES = ("whole",)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What one network scores.

    Attributes:
      confusion: int64 `[C,C]`, rows are the truth.
      mode: how images were presented.
    """

    confusion: np.ndarray
    mode: str

    @property
    def iou(self) -> np.ndarray:
        """Intersection over union per class, 0 to 1, nan for a class without a pixel."""
        return metrics.iou(self.confusion)

    @property
    def miou(self) -> float:
        """Mean over the classes that occur, 0 to 1."""
        return metrics.mean_iou(self.confusion)

    @property
    def present(self) -> np.ndarray:
        """Bool `[C]`: classes with a pixel in the truth."""
        return self.confusion.sum(1) > 0


class Evaluator:
    """Evaluates networks on one source; compiles once per architecture and image size."""

    def __init__(
        self, nets: Mapping[str, Network], source: Source, mesh: Mesh, config: Mapping[str, Any]
    ):
        """Prepares evaluation.

        Args:
          nets: by student.
          source: with labels.
          mesh: devices that share a batch.
          config: `mode` ("whole": the image as it is) and `batch`, images at a time.
        """
        if config["mode"] not in MODES:
            raise UserError(f"Unknown eval.mode {config['mode']!r}. There are: {', '.join(MODES)}.")
        self._source, self._mesh, self._config = source, mesh, config
        everywhere, rows = sharding.replicated(mesh), sharding.batched(mesh)
        # Networks of one architecture share a program.
        programs = {
            net: jax.jit(
                make_predict_step(net), in_shardings=(everywhere, rows, rows), out_shardings=rows
            )
            for net in set(nets.values())
        }
        self._predict = {name: programs[net] for name, net in nets.items()}
        self._count = jax.jit(self._confusion, out_shardings=everywhere)

    def __call__(self, name: str, variables: Variables) -> Evaluation:
        """Evaluates a student, or a teacher ("teacher_a")."""
        C = self._source.info.num_classes
        confusion = np.zeros((C, C), np.int64)

        def update(carry: None, batch: Mapping[str, jax.Array]) -> tuple[None, jax.Array]:
            return carry, self._count(batch["label"], self._run(name, variables, batch))

        def add(_: Any, counts: np.ndarray) -> None:
            np.add(
                confusion, counts, out=confusion
            )  # a device's int32 would overflow over a data set

        fold(update, None, self._batches(self._source), self._mesh, sink=add)
        return Evaluation(confusion, self._config["mode"])

    def logits(self, name: str, variables: Variables, source: Source) -> list[np.ndarray]:
        """Logits `[h,w,C]` of every image of a small source, in order; in one process only."""
        found: list[np.ndarray] = []

        def update(carry: None, batch: Mapping[str, jax.Array]) -> tuple[None, jax.Array]:
            return carry, self._run(name, variables, batch)

        def collect(batch: Mapping[str, np.ndarray], logits: np.ndarray) -> None:
            found.extend(logits[batch["index"] >= 0])

        fold(update, None, self._batches(source), self._mesh, sink=collect)
        return found

    def _run(self, name: str, variables: Variables, batch: Mapping[str, jax.Array]) -> jax.Array:
        return self._predict[name.removeprefix(TEACHER)](variables, batch["image"], batch["valid"])

    def _batches(self, source: Source) -> Iterator[dict[str, np.ndarray]]:
        return pipeline.in_order(
            source,
            self._config["batch"],
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

    def _confusion(self, labels: jax.Array, logits: jax.Array) -> jax.Array:
        return metrics.confusion_matrix(labels, logits.argmax(-1), self._source.info.num_classes)
