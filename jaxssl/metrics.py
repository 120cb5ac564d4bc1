"""Scores from an integer confusion matrix, and how much confidences are worth.

`confusion_matrix` and `reliability` run on the device for each batch. Their sums over batches, in
64 bits on the host, are what the scores are computed from in NumPy. Scores are shares in [0,1].
`total_variation`, how far two networks are apart, needs no truth.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxssl.contracts import IGNORE_LABEL


def confusion_matrix(labels: jax.Array, predictions: jax.Array, num_classes: int) -> jax.Array:
    """Count the pairs of true and predicted class; int32 `[C,C]`, rows truth, columns prediction.

    Args:
      labels: integer `[...]`, below C or 255.
      predictions: integer `[...]`, below C or 255. Where either is 255 nothing is counted.
      num_classes: C.
    """
    counted = (labels != IGNORE_LABEL) & (predictions != IGNORE_LABEL)
    pair = num_classes * labels.astype(jnp.int32) + predictions.astype(jnp.int32)
    pair = jnp.where(counted, pair, num_classes**2)
    counts = jnp.bincount(pair.ravel(), length=num_classes**2 + 1)[:-1]
    return counts.reshape(num_classes, num_classes).astype(jnp.int32)


def total_variation(a: jax.Array, b: jax.Array) -> jax.Array:
    """Half the L1 distance of two softmaxes, in [0,1]; logits `[...,C]` -> `[...]`."""
    difference = jax.nn.softmax(a) - jax.nn.softmax(b)
    return jnp.abs(difference).sum(-1) / 2


def iou(confusion: np.ndarray) -> np.ndarray:
    """Intersection over union per class; float64 `[C]`, nan if neither true nor predicted."""
    intersection = np.diagonal(confusion)
    return _divide(intersection, confusion.sum(0) + confusion.sum(1) - intersection)


def mean_iou(confusion: np.ndarray) -> float:
    """Mean of `iou` over the classes that are true or predicted somewhere; nan without any.

    As in the scripts of the Cityscapes benchmark: a class that is predicted but never true enters
    as 0, a class that does not occur at all is left out.
    """
    scores = iou(confusion)
    present = scores[~np.isnan(scores)]
    return float(present.mean()) if present.size else float("nan")


def accuracy(confusion: np.ndarray) -> float:
    """Share of the counted positions with the right class; nan without any."""
    return float(_divide(np.trace(confusion), confusion.sum()))


def class_accuracy(confusion: np.ndarray) -> np.ndarray:
    """Recall: share of each class's true positions found; float64 `[C]`, nan without any."""
    return _divide(np.diagonal(confusion), confusion.sum(1))


class Measure(NamedTuple):
    """What networks are compared by in a task.

    Attributes:
      name: of the score in files.
      title: of it, for people.
      score: confusion matrix `[C,C]` -> the score, in [0,1].
      of_class: name of the score of a class in files.
      class_title: of it, for people.
      per_class: confusion matrix -> float64 `[C]`, nan for a class that is absent.
    """

    name: str
    title: str
    score: Callable[[np.ndarray], float]
    of_class: str
    class_title: str
    per_class: Callable[[np.ndarray], np.ndarray]


MEASURES: Mapping[str, Measure] = {
    "segmentation": Measure("miou", "mIoU", mean_iou, "iou", "IoU", iou),
    "classification": Measure(
        "accuracy", "accuracy", accuracy, "class_accuracy", "accuracy", class_accuracy
    ),
}
"""By task."""


class Reliability(NamedTuple):
    """Confidences beside the truth, in bins of equal width over [0,1]; sums, arrays `[bins]`.

    Attributes:
      all: positions whose most probable class has a probability in the bin.
      right: of these, those of which that class is true.
      confidence: sum of these probabilities.
      true: sum of the probabilities of the true class, wherever its position's bin is.
    """

    all: Any
    right: Any
    confidence: Any
    true: Any


def reliability(labels: jax.Array, logits: jax.Array, *, bins: int = 15) -> Reliability:
    """Adds up the confidences of a batch.

    Args:
      labels: integer `[...]`, below C, or 255 where nothing is counted.
      logits: float `[...,C]`.
      bins: how many.
    """
    p = jax.nn.softmax(logits).reshape(-1, logits.shape[-1])
    truth = labels.reshape(-1).astype(jnp.int32)
    known, best = truth != IGNORE_LABEL, p.max(-1)
    true = jnp.take_along_axis(p, jnp.where(known, truth, 0)[:, None], -1)[:, 0]
    place = jnp.minimum((best * bins).astype(jnp.int32), bins - 1)

    def add(values: jax.Array) -> jax.Array:
        return jnp.zeros(bins).at[place].add(jnp.where(known, values, 0))

    right = p.argmax(-1) == truth
    return Reliability(*(add(x) for x in (jnp.ones_like(best), right, best, true)))


def calibration_error(found: Reliability) -> float:
    """Expected calibration error: the mean distance of a bin's confidence and accuracy, weighted by
    its positions (Guo et al., On calibration of modern neural networks, ICML 2017, eq. 3); nan
    without any position.
    """
    return float(_divide(np.abs(found.right - found.confidence).sum(), found.all.sum()))


def true_probability(found: Reliability) -> float:
    """Mean probability of the true class, what DMT calls fine-grained testing; nan without any."""
    return float(_divide(np.sum(found.true), found.all.sum()))


def kl_divergence(prior: np.ndarray, counts: np.ndarray) -> float:
    """KL(prior || pseudo-labels) of two class distributions given as counts `[C]`, in nats.

    A class without a pixel in the prior adds nothing to the sum. A class of the prior that is never
    taught counts as half a pixel, else the divergence were infinite. nan where either is empty.
    """
    if not prior.sum() or not counts.sum():
        return float("nan")
    known = prior > 0
    floored = np.where(known, np.maximum(counts, 0.5), counts)
    p, q = prior[known] / prior.sum(), floored[known] / floored.sum()
    return float(np.sum(p * np.log(p / q)))


def _divide(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    result = np.full(np.shape(numerator), np.nan)
    return np.divide(numerator, denominator, out=result, where=np.greater(denominator, 0))
