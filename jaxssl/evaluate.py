"""Evaluation: one confusion matrix over a set of labeled images."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
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

    def __init__(self, nets: Mapping[str, Network], source: Source, mesh: Mesh, config: Mapping[str, Any]):
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
        self._predict = {name: jax.jit(make_predict_step(net)) for name, net in nets.items()}
        self._count = {name: self._counter(net) for name, net in nets.items()}

    def __call__(self, name: str, variables: Variables) -> Evaluation:
        """Evaluates a student, or a teacher ("teacher_a")."""
        count = self._count[name.removeprefix(TEACHER)]
        C = self._source.info.num_classes
        confusion = np.zeros((C, C), np.int64)

        def add(_: Any, counts: np.ndarray) -> None:
            np.add(confusion, counts, out=confusion)  # a device's int32 would overflow over a data set

        batches = pipeline.in_order(
            self._source,
            self._config["batch"],
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        fold(lambda carry, batch: (carry, count(variables, batch)), None, batches, self._mesh, sink=add)
        return Evaluation(confusion, self._config["mode"])

    def logits(self, name: str, variables: Variables, image: np.ndarray) -> np.ndarray:
        """Logits `[h,w,C]` of one image `[h,w,3]`, for pictures."""
        valid = np.ones((1, *image.shape[:2]), bool)
        predict = self._predict[name.removeprefix(TEACHER)]
        return np.asarray(jax.device_get(predict(variables, image[None], valid)))[0]

    def _counter(self, net: Network) -> Any:
        predict, C = make_predict_step(net), self._source.info.num_classes

        def count(variables: Variables, batch: Mapping[str, jax.Array]) -> jax.Array:
            predictions = predict(variables, batch["image"], batch["valid"]).argmax(-1)
            return metrics.confusion_matrix(batch["label"], predictions, C)

        everywhere, rows = sharding.replicated(self._mesh), sharding.batched(self._mesh)
        return jax.jit(count, in_shardings=(everywhere, rows), out_shardings=everywhere)
