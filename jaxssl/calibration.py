"""Calibration: to change how sure a network says it is, until that is how often it is right.

The methods and the measure are those of Guo et al., On Calibration of Modern Neural Networks (ICML
2017), the reference of DARS's Table 5. A calibration maps logits to logits, so that what reads
classes and confidences from logits takes either. Its parameters are fitted by cross entropy on
positions whose class is known, in float64 on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxssl.contracts import IGNORE_LABEL, Rule, Selection
from jaxssl.selection import Aligned, TopShare

BINS = 15
"""Of equal width, from 0 to 1: for histogram binning, and to measure by (Guo et al., Table 1)."""

_LEAST = 1e-12


class Temperature(NamedTuple):
    """Temperature scaling: divides logits by `value`, which leaves the predicted classes alone."""

    value: float

    def __call__(self, logits: jax.Array) -> jax.Array:
        """Logits `[...,C]`."""
        return logits / self.value


class Matrix(NamedTuple):
    """Matrix scaling (Platt's, of several classes): `weight` `[C,C]` times logits, plus `bias`
    `[C]`.
    """

    weight: np.ndarray
    bias: np.ndarray

    def __call__(self, logits: jax.Array) -> jax.Array:
        """Logits `[...,C]`."""
        product = jnp.einsum("...j,ij->...i", logits, self.weight, precision="highest")
        return product + self.bias


class Binning(NamedTuple):
    """Histogram binning, each class against the others: `shares` `[C,M]` replaces a probability of
    class j in bin m by the share of positions in that bin whose class is j. What comes out are
    logarithms of these; a softmax makes them sum to 1.
    """

    shares: np.ndarray

    def __call__(self, logits: jax.Array) -> jax.Array:
        """Logits `[...,C]`."""
        C, count = self.shares.shape
        bins = _bins(jax.nn.softmax(logits), count)
        return jnp.log(jnp.maximum(jnp.asarray(self.shares)[np.arange(C), bins], _LEAST))


Calibration: TypeAlias = Temperature | Matrix | Binning


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> Temperature:
    """The temperature of least cross entropy; from e^-5 to e^5, where there is none in between.

    Args:
      logits: `[N,C]`.
      labels: integers `[N]`, below C.
    """
    from scipy.optimize import brentq

    logits = np.asarray(logits, np.float64)
    mean = _of(logits, labels).mean()

    def slope(log_inverse: float) -> float:
        """Of the cross entropy in 1/T, in which it is convex."""
        p = np.exp(_log_softmax(np.exp(log_inverse) * logits))
        return float((p * logits).sum(1).mean() - mean)

    low, high = -5.0, 5.0
    if slope(low) >= 0 or slope(high) <= 0:
        return Temperature(float(np.exp(-low if slope(low) >= 0 else -high)))
    return Temperature(float(np.exp(-cast(float, brentq(slope, low, high, xtol=1e-9)))))


def fit_matrix(logits: np.ndarray, labels: np.ndarray) -> Matrix:
    """The matrix and bias of least cross entropy, searched from the best temperature on (L-BFGS).

    A vector added to all rows of the matrix changes nothing, so there are many; the search does not
    go along that direction.

    Args:
      logits: `[N,C]`.
      labels: integers `[N]`, below C.
    """
    from scipy.optimize import minimize

    logits, labels = np.asarray(logits, np.float64), np.asarray(labels, np.int64)
    (N, C), temperature = logits.shape, fit_temperature(logits, labels).value
    center, spread = logits.mean(0), np.maximum(logits.std(0), 1e-6)
    inputs = np.concatenate([(logits - center) / spread, np.ones((N, 1))], 1)
    # The loss bends the less in the parameters of a class, the rarer that is: scaled so that it
    # bends about alike in all, it takes a quarter of the steps.
    p = np.exp(_log_softmax(logits / temperature))
    scale = 1 / np.sqrt((p * (1 - p)).mean(0) + 1e-4)[:, None]

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        log_p = _log_softmax(inputs @ (scale * flat.reshape(C, C + 1)).T)
        error = np.exp(log_p)
        error[np.arange(N), labels] -= 1
        return float(-_of(log_p, labels).mean()), (scale * (error.T @ inputs) / N).ravel()

    first = np.concatenate([np.diag(spread), center[:, None]], 1) / temperature / scale
    options = {"maxiter": 1000, "maxcor": 20, "ftol": 1e-9, "gtol": 1e-8}
    found = minimize(loss, first.ravel(), jac=True, method="L-BFGS-B", options=options).x
    found = scale * found.reshape(C, C + 1)
    weight = found[:, :C] / spread
    return Matrix(weight, found[:, C] - weight @ center)


def fit_binning(logits: np.ndarray, labels: np.ndarray, count: int = BINS) -> Binning:
    """The share of each class in each bin of its probability: these are what minimizes the cross
    entropy of a class against the others. A bin that nothing is in keeps its middle (ours).

    Args:
      logits: `[N,C]`.
      labels: integers `[N]`, below C.
      count: bins of equal width.
    """
    logits = np.asarray(logits, np.float64)
    C = logits.shape[1]
    cells = (np.arange(C) * count + _bins(np.exp(_log_softmax(logits)), count)).astype(np.int64)
    total = np.bincount(cells.ravel(), minlength=C * count)
    right = np.bincount(_of(cells, labels), minlength=C * count)
    middles = np.tile((np.arange(count) + 0.5) / count, C)
    shares = np.where(total > 0, right / np.maximum(total, 1), middles)
    return Binning(shares.reshape(C, count))


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean of -log softmax, in nats; logits `[N,C]`, labels `[N]`."""
    return float(-_of(_log_softmax(np.asarray(logits, np.float64)), labels).mean())


def calibration_error(logits: np.ndarray, labels: np.ndarray, count: int = BINS) -> float:
    """Expected calibration error (eq. 3), in [0,1]: by how much the mean confidence of a bin and
    the share of right classes in it differ, over bins ]m/M, (m+1)/M] weighted by what is in them.

    Args:
      logits: `[N,C]`.
      labels: integers `[N]`.
      count: M, bins of equal width.
    """
    p = np.exp(_log_softmax(np.asarray(logits, np.float64)))
    confidence, right = p.max(1), p.argmax(1) == labels
    differences = np.bincount(_bins(confidence, count), confidence - right, minlength=count)
    return float(np.abs(differences).sum() / len(p))


FITS: Mapping[str, Callable[[np.ndarray, np.ndarray], Calibration]] = {
    "temperature scaling": fit_temperature,
    "matrix scaling": fit_matrix,
    "histogram binning": fit_binning,
}
"""Those of DARS's Table 5, by name."""


def fit_all(logits: np.ndarray, labels: np.ndarray) -> dict[str, Calibration]:
    """Each of `FITS` by name, and "none", which changes nothing; logits `[N,C]`, labels `[N]`."""
    fitted = {name: fit(logits, labels) for name, fit in FITS.items()}
    return {"none": Temperature(1.0), **fitted}


def make_rules(ratio: float, precision: str = "float16") -> dict[str, tuple[str, Rule]]:
    """What DARS compares, each a calibration and a rule: one threshold for all classes (ST) after
    each calibration, and CBST, DA and DARS without one.

    Args:
      ratio: share of the positions to keep.
      precision: of the confidences that DA and DARS compare (`selection.Aligned`).

    Raises:
      UserError: the ratio is no share.
    """
    single = TopShare(ratio, per_class=False)
    return {
        "ST": ("none", single),
        **{f"ST + {name}": (name, single) for name in FITS},
        "CBST": ("none", TopShare(ratio)),
        "DA": ("none", Aligned(ratio, sample=False, precision=precision)),
        "DARS": ("none", Aligned(ratio, precision=precision)),
    }


def expected_counts(counts: np.ndarray, chosen: Selection) -> np.ndarray:
    """How many positions of each class a selection keeps, in the mean over its draws; float64
    `[C]`.

    Args:
      counts: int64 `[C,levels]`, positions by predicted class and level of confidence.
      chosen: what is kept.
    """
    reached = np.arange(counts.shape[1]) >= chosen.lowest[:, None]
    return chosen.share * np.where(reached, counts, 0).sum(1)


class Sample(NamedTuple):
    """Rows drawn at random from a stream of them, all with the same chance: those of the smallest
    keys, in the order of these, so that neither their order nor their number matters.

    Attributes:
      keys: uint32 `[N]`, random.
      logits: float32 `[N,C]`.
      labels: uint8 `[N]`.
    """

    keys: np.ndarray
    logits: np.ndarray
    labels: np.ndarray

    def merged(self, other: Sample, size: int) -> Sample:
        """The `size` rows of the smallest keys of both."""
        both = [np.concatenate(pair) for pair in zip(self, other, strict=True)]
        order = np.argsort(both[0], kind="stable")[:size]
        return Sample(*(x[order] for x in both))


def draw(
    labels: np.ndarray, rngs: Sequence[np.random.Generator], most: int
) -> tuple[np.ndarray, np.ndarray]:
    """Keys for a `Sample` of the positions of images that have a label.

    Args:
      labels: uint8 `[B,H,W]`, below C or 255.
      rngs: one for each image.
      most: size of the sample.

    Returns:
      Of the `n = min(most, H W)` smallest keys of each image, where in its H W positions they are,
      int32 `[B,n]`, and the keys, uint32 `[B,n]`. Positions without a label have the largest keys.
    """
    flat = labels.reshape(len(labels), -1)
    most, largest = min(most, flat.shape[1]), np.iinfo(np.uint32).max
    keys = np.stack([rng.integers(largest, size=flat.shape[1], dtype=np.uint32) for rng in rngs])
    keys[flat == IGNORE_LABEL] = largest
    positions = np.argpartition(keys, most - 1)[:, :most]
    return positions.astype(np.int32), np.take_along_axis(keys, positions, 1)


def _bins(probabilities: Any, count: int) -> Any:
    """The bin of each probability, an array of NumPy or of jax: m where it is in ]m/M, (m+1)/M], 0
    for 0.
    """
    return (-(-probabilities * count // 1)).clip(1, count).astype("int32") - 1


def _of(values: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The value `[N]` that belongs to the label of each row, of `[N,C]`."""
    return np.take_along_axis(values, np.asarray(labels, np.int64)[:, None], 1)[:, 0]


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
