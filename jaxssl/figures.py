"""What reports draw."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxssl.contracts import DataInfo
from jaxssl.metrics import Reliability, calibration_error

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def class_figure(info: DataInfo, labelings: Sequence[Mapping[str, Any]]) -> Figure:
    """Bars for the share of each class in the labels and in each labeling, on a logarithmic scale,
    the most frequent class first.

    Args:
      info: names and colors.
      labelings: of `read_labelings`, at least one.
    """
    from matplotlib.patches import Patch

    shares = np.array(
        [[labelings[0]["classes"][name]["of_labels"] or 0.0 for name in info.classes]]
        + [[one["classes"][name]["of_kept"] or 0.0 for name in info.classes] for one in labelings]
    )
    order = np.argsort(-shares[0], kind="stable")
    shares, bars = 100 * shares[:, order], len(shares)
    colors = np.array(info.palette)[order] / 255
    figure = _figure(max(7.0, 1.5 + len(order) * (0.3 + min(0.13 * bars, 0.55))), 4.6)
    axes = figure.subplots()
    _quiet(axes)
    floor = 10.0 ** np.floor(np.log10(shares[shares > 0].min(initial=1.0) / 1.5))
    # The labels have the colors of their classes, round after round is paler.
    width, pale = 0.84 / bars, np.concatenate([[0], np.linspace(0.35, 0.75, bars - 1)])
    for i, share in enumerate(shares):
        x = np.arange(len(order)) + (i - (bars - 1) / 2) * width
        face, height = colors + pale[i] * (1 - colors), np.maximum(share, floor) - floor
        axes.bar(x, height, width, floor, color=face, edgecolor=_INK, linewidth=0.6)
        axes.plot(x[share == 0], np.full((share == 0).sum(), 1.25 * floor), "x", color=_RED, ms=4)
    axes.set_yscale("log")
    axes.set_ylim(floor, 130)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_ylabel(f"share of {_unit(info)}, %")
    axes.set_xlim(-0.6, len(order) - 0.4)
    ticks = [info.classes[i] for i in order]
    axes.set_xticks(range(len(order)), ticks, rotation=40, ha="right", rotation_mode="anchor")
    names = ["labels", *(one["phase"] for one in labelings)]
    handles: list[Any] = [
        Patch(facecolor=str(0.4 + 0.6 * pale[i]), edgecolor=_INK, label=name)
        for i, name in enumerate(names)
    ]
    if (shares == 0).any():
        handles += axes.plot([], [], "x", color=_RED, ms=5, label="none")
    figure.legend(handles=handles, loc="outside upper right", ncols=len(handles), frameon=False)
    return figure


def quality_figure(info: DataInfo, labelings: Sequence[Mapping[str, Any]]) -> Figure:
    """Bars for the share of pixels, or images, that each labeling keeps, and for how many of these
    are right where that is known.

    Args:
      info: says what is labeled.
      labelings: of `read_labelings`, at least one.
    """
    values = {f"{_unit(info)} with a pseudo-label": [one["kept"] for one in labelings]}
    if any(one["accuracy"] is not None for one in labelings):
        values["pseudo-labels that are right"] = [one["accuracy"] for one in labelings]
    figure = _figure(max(5.5, 1.5 + 1.3 * len(labelings)), 3.8)
    axes = figure.subplots()
    _quiet(axes)
    width, colors = 0.8 / len(values), (_BLUE, _ORANGE)[: len(values)]
    for i, ((name, shares), color) in enumerate(zip(values.items(), colors, strict=True)):
        x = np.arange(len(labelings)) + (i - (len(values) - 1) / 2) * width
        percent = [np.nan if share is None else 100 * share for share in shares]
        drawn = axes.bar(x, percent, 0.94 * width, color=color, label=name)
        texts = ["" if share is None else f"{100 * share:.1f}" for share in shares]
        axes.bar_label(drawn, texts, padding=2, color=_INK, fontsize=9)
    axes.set_ylim(0, 105)
    axes.set_yticks(range(0, 101, 20))
    axes.set_ylabel("%")
    axes.set_xlim(-0.6, len(labelings) - 0.4)
    axes.set_xticks(range(len(labelings)), [one["phase"] for one in labelings])
    figure.legend(loc="outside upper right", ncols=len(values), frameon=False)
    return figure


def error_figure(labelings: Sequence[Mapping[str, Any]]) -> Figure:
    """Lines for how many of the surest pseudo-labels are wrong, one for each labeling that knows:
    DMT's Figure 1.

    Args:
      labelings: of `read_labelings`, one at least with `errors`.
    """
    figure = _figure(5.5, 3.8)
    axes = figure.subplots()
    _quiet(axes)
    measured = [one for one in labelings if one.get("errors")]
    for i, one in enumerate(measured):
        shares, rates = (
            [np.nan if x is None else 100 * x for x in one["errors"][name]]
            for name in ("shares", "all")
        )
        color = _shade(i, len(measured))
        axes.plot(shares, rates, "o-", color=color, markersize=5, label=one["phase"])
    axes.set_xlim(0, 103)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("surest pseudo-labels, %")
    axes.set_ylabel("wrong, %")
    figure.legend(loc="outside upper right", ncols=min(len(measured), 4), frameon=False)
    return figure


def reliability_figure(found: Reliability) -> Figure:
    """How often predictions of a confidence are right, which is as often as it says on the line
    that is drawn; and how many predictions there are of each.

    Args:
      found: sums by confidence.
    """
    figure = _figure(5.0, 5.2)
    above, below = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    bins, some = len(found.all), found.all > 0
    right, sure = (100 * x[some] / found.all[some] for x in (found.right, found.confidence))
    places, width = ((np.arange(bins) + 0.5) * 100 / bins)[some], 94 / bins
    for axes in (above, below):
        _quiet(axes)
    above.bar(places, right, width, color=_BLUE, label="right")
    # Where the confidence of a bin is, which need not be its middle.
    above.hlines(sure, places - width / 2, places + width / 2, color=_ORANGE, label="confidence")
    above.plot((0, 100), (0, 100), "--", color="0.6", linewidth=1)
    above.set_ylim(0, 103)
    above.set_ylabel("%")
    below.bar(places, 100 * found.all[some] / found.all.sum(), width, color="0.6")
    below.set_ylabel("predictions, %")
    below.set_xlim(0, 100)
    below.set_xlabel("confidence, %")
    error = f"calibration error {100 * calibration_error(found):.2f} %"
    figure.legend(loc="outside upper right", ncols=2, frameon=False, title=error)
    return figure


def coupling_figure(curves: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    """Lines for how far two networks are apart while they learn: RML's Figure 2.

    Args:
      curves: of `read_coupling`, at least one.
    """
    figure = _figure(6.4, 3.8)
    axes = figure.subplots()
    _quiet(axes)
    for (name, curve), color in zip(curves.items(), itertools.cycle(_LINES), strict=False):
        axes.plot(curve["step"], curve["distance"], color=color, linewidth=1.5, label=name)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("step")
    axes.set_ylabel("total variation distance")
    figure.legend(loc="outside upper right", ncols=min(len(curves), 4), frameon=False)
    return figure


_INK, _RED, _BLUE, _ORANGE = "#1c1e22", "#b3261e", "#2f5d8a", "#d9913a"
_LINES = (_BLUE, _ORANGE, "#5b8c5a", "#8a5a9e", "#6b6f76")


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure((min(width, 40), height), layout="constrained")


def _unit(info: DataInfo) -> str:
    return "images" if info.task == "classification" else "pixels"


def _shade(i: int, count: int) -> tuple[float, ...]:
    """The color of line i of some that follow one another, from light to dark."""
    from matplotlib.colors import to_rgb

    dark, share = np.array(to_rgb(_BLUE)), (i + 1) / count
    return tuple(1 - (0.35 + 0.65 * share) * (1 - dark))


def _quiet(axes: Axes) -> None:
    """Leaves of the frame what is needed to read values."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=_INK, labelsize=9)
    axes.grid(axis="y", color="0.88", linewidth=0.8)
    axes.set_axisbelow(True)
