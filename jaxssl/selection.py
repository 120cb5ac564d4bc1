"""Which pseudo-labels to keep: rules over histograms of confidence, in NumPy.

A network is surer than 0.99 of most pixels, so confidence is counted and stored by its doubt, on a
logarithmic scale of 16 bits: a position of confidence c has the level round(2048 log2(1 / (1-c))).
A level is 0.034 % of the doubt, from 1 down to 2e-10, which float32 does not resolve near 1. Levels
rank like confidences, and a histogram of them is as exact as the sorted list of all positions:
its size does not depend on how many there are.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from jaxssl.contracts import IGNORE_LABEL, Rule, Selection, UserError

LEVELS = 2**16
"""How many levels there are, from 0 (no confidence) to the last one (no doubt)."""

STEPS = 2048
"""Levels from one doubt to half of it."""

SHARES = (0.2, 0.4, 0.6, 0.8, 1.0)
"""Of the surest labels, those that `error_rates` looks at."""


def confidence(levels: np.ndarray) -> np.ndarray:
    """Confidence in [0,1] that levels stand for, float32."""
    return _confidences()[levels]


def to_level(confidence: np.ndarray | float) -> np.ndarray:
    """The level that is nearest to each confidence, int64; of 1, the last one."""
    with np.errstate(divide="ignore"):
        levels = -STEPS * np.log2(1 - np.asarray(confidence, np.float64))
    return np.minimum(np.round(levels), LEVELS - 1).astype(np.int64)


def count(labels: np.ndarray, levels: np.ndarray, num_classes: int) -> np.ndarray:
    """Counts positions by class and level, int64 `[C,LEVELS]`; labels of 255 are not counted."""
    counted = labels != IGNORE_LABEL
    cells = labels[counted].astype(np.int64) * LEVELS + levels[counted]
    return np.bincount(cells, minlength=num_classes * LEVELS).reshape(num_classes, LEVELS)


def select(
    labels: np.ndarray, levels: np.ndarray, selection: Selection, rng: np.random.Generator
) -> np.ndarray:
    """Labels of an image, 255 where they are not kept.

    To select again from the result, with numbers that were drawn alike, changes nothing.

    Args:
      labels: uint8, below C or 255.
      levels: likewise, of their confidence.
      selection: what is kept of each class.
      rng: gives a number per position, whatever is kept.
    """
    known = labels != IGNORE_LABEL
    classes = np.where(known, labels, 0)
    drawn = rng.random(labels.shape) < selection.share[classes]
    kept = known & (levels >= selection.lowest[classes]) & drawn
    return np.where(kept, labels, np.uint8(IGNORE_LABEL))


def error_rates(
    known: np.ndarray, wrong: np.ndarray, shares: Sequence[float] = SHARES
) -> np.ndarray:
    """Which share of the surest labels is wrong (DMT's Figure 1), float64 `[C,len(shares)]`, nan
    where there are none. Labels as sure as the last one of a share are among it.

    Args:
      known: int64 `[C,LEVELS]`, labels whose truth is known, by class and level.
      wrong: likewise, those of them that are wrong.
      shares: of the labels of a class, each in [0,1].
    """
    rates = np.full((len(known), len(shares)), np.nan)
    for i, share in enumerate(shares):
        reached = np.arange(LEVELS) >= TopShare(share)(known, known).lowest[:, None]
        errors, labels = (np.where(reached, x, 0).sum(1) for x in (wrong, known))
        np.divide(errors, labels, out=rates[:, i], where=labels > 0)
    return rates


@dataclasses.dataclass(frozen=True)
class Threshold:
    """Keeps what is at least this sure, whatever its class (Lee 2013; DMT's eq. 2).

    Attributes:
      confidence: in [0,1].
    """

    confidence: float

    def __post_init__(self) -> None:
        _check_share("threshold", self.confidence)

    def __call__(self, counts: np.ndarray, prior: np.ndarray) -> Selection:
        """See `contracts.Rule`."""
        del prior
        return _all_from(np.full(len(counts), to_level(self.confidence)))


@dataclasses.dataclass(frozen=True)
class TopShare:
    """Keeps the surest share: of each predicted class (CBST and DMT, by direct ranking, as DMT's
    section 4.2.2 describes), or of all positions by one threshold (Curriculum Labeling, ST).

    Positions as sure as the last one that is kept are kept too.

    Attributes:
      ratio: the share, in [0,1]; rounded up to a whole number of positions.
      per_class: whether each class is ranked on its own.
    """

    ratio: float
    per_class: bool = True

    def __post_init__(self) -> None:
        _check_share("share", self.ratio)

    def __call__(self, counts: np.ndarray, prior: np.ndarray) -> Selection:
        """See `contracts.Rule`."""
        del prior
        ranked = counts if self.per_class else counts.sum(0, keepdims=True)
        # 0.6 * 5 is not 3 in binary; a millionth of a position is none.
        wanted = np.ceil(np.round(self.ratio * ranked.sum(1), 6)).astype(np.int64)
        lowest, _ = _thresholds(ranked, wanted)
        return _all_from(np.broadcast_to(lowest, len(counts)))


@dataclasses.dataclass(frozen=True)
class Aligned:
    """Keeps as many of each class as the ground truth of the labeled images lets expect: DARS.

    Of all N positions, `n_j = ratio N r_j` are wanted of class j, whose share of the ground truth
    is r_j (eq. 4). The threshold is the confidence of the n_j-th surest, or of the last one where
    there are fewer. Where many are equally sure, more than n_j reach it, and each of them is kept
    with probability n_j / (how many do) (Algorithm 1).

    Attributes:
      ratio: share of all positions to keep, in [0,1].
      sample: False keeps all that reach the threshold: distribution alignment alone (DA).
      precision: "float16" takes confidences for equal that are the same number in half precision,
        as the released code stores them: 81 % of all road pixels are then as sure as can be, and it
        is the draw that spreads what is kept over the images. "stored" ranks them as finely as
        they are stored.
    """

    ratio: float
    sample: bool = True
    precision: str = "float16"

    def __post_init__(self) -> None:
        _check_share("share", self.ratio)
        if self.precision not in ("float16", "stored"):
            raise UserError(f"precision {self.precision!r} is neither 'float16' nor 'stored'.")

    def __call__(self, counts: np.ndarray, prior: np.ndarray) -> Selection:
        """See `contracts.Rule`."""
        share = prior / max(prior.sum(), 1)
        wanted = np.round(self.ratio * counts.sum() * share).astype(np.int64)
        groups = np.arange(LEVELS)
        if self.precision == "float16":
            values = confidence(np.arange(LEVELS)).astype(np.float16)
            groups = np.flatnonzero(np.diff(values, prepend=np.float16(-1)))
        lowest, reached = _thresholds(np.add.reduceat(counts, groups, axis=1), wanted)
        # A group stands for its lowest level; beyond the last group, nothing is kept.
        lowest = np.append(groups, LEVELS)[lowest]
        if not self.sample:
            return _all_from(lowest)
        return Selection(lowest, np.minimum(1, wanted / np.maximum(reached, 1)))


def parse(text: str) -> Rule:
    """The rule that a command line names, such as "balanced:0.5".

    Raises:
      UserError: there is no such rule, or its number is none from 0 to 1.
    """
    rules = {
        "threshold": Threshold,
        "top": lambda share: TopShare(share, per_class=False),
        "balanced": TopShare,
        "aligned": Aligned,
    }
    name, _, number = text.partition(":")
    if name not in rules:
        raise UserError(
            f"Unknown rule {text!r}. There are threshold:C (at least that sure), top:SHARE (the "
            "surest share of all pixels), balanced:SHARE (of each predicted class) and "
            "aligned:SHARE (classes as often as in the labels of training)."
        )
    try:
        value = float(number)
    except ValueError:
        raise UserError(f"The rule {text!r} needs a number: {name}:0.5, say.") from None
    return rules[name](value)


@functools.cache
def _confidences() -> np.ndarray:
    return (1 - np.exp2(np.arange(LEVELS) / -STEPS)).astype(np.float32)


def _all_from(lowest: np.ndarray) -> Selection:
    return Selection(np.array(lowest, np.int64), np.ones(len(lowest)))


def _thresholds(counts: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """By row: the level of the `wanted`-th of the counts from above, or the lowest that occurs
    where there are fewer, or the number of levels where none is wanted or there is none; and how
    many reach it.
    """
    above = np.cumsum(counts[:, ::-1], 1)[:, ::-1]
    wanted = np.minimum(wanted, above[:, 0])
    # The highest level with enough from it on; `above` falls, so those with enough come first.
    lowest = (above >= np.maximum(wanted, 1)[:, None]).sum(1) - 1
    lowest = np.where(wanted > 0, lowest, counts.shape[1])
    reached = np.append(above, np.zeros((len(counts), 1), above.dtype), 1)
    return lowest, np.take_along_axis(reached, lowest[:, None], 1)[:, 0]


def _check_share(what: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise UserError(f"A {what} of {value} is not from 0 to 1.")
