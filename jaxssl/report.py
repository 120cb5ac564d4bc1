"""What came of a run, in tables and pictures: scores by phase, pseudo-labels by round.

`python -m jaxssl.report --workdir=W` reads what training wrote, be it finished or not, and runs no
network. It prints two tables and writes to the folder W/report:

  classes.png        how often each class is in the labels, and among the pseudo-labels of each
                     round (Figure 1 of DARS)
  pseudo_labels.png  which share of the pixels each round labels and, where the run measured it
                     (config.eval.unlabeled_truth), which share of these labels is right
  report.json        all numbers; shares are in [0,1]

With `--calibration` a network labels the unlabeled images once more. Rules that choose among its
pseudo-labels are compared, some of them after a calibration that is fitted on validation labels, by
how far the classes of what they keep are from those of the labels: KL(labels || pseudo-labels) is
printed and written to calibration.json. On 1/8 of Cityscapes, at a ratio of .2 and with T = 1.27,
Table 5 of DARS has

  ST  .0491    ST + temperature scaling  .0357    ST + histogram binning  .4188
  DARS .0005   ST + matrix scaling       .0340    ST + focal loss         .0396

Focal loss is not compared: it takes a network that was trained with it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxssl import comparison, logs, metrics
from jaxssl.contracts import DataInfo, UserError
from jaxssl.data import cityscapes, files
from jaxssl.data.pseudo_labels import Store
from jaxssl.trained import Trained, open_trained

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TAIL_SHARE = 0.1
"""The rarest classes that together hold at most this share of the labeled pixels are the tail."""

CITYSCAPES_TAIL = (
    "wall",
    "fence",
    "pole",
    "traffic light",
    "traffic sign",
    "terrain",
    "person",
    "rider",
    "truck",
    "bus",
    "train",
    "motorcycle",
    "bicycle",
)
"""The 13 tail classes of DARS, which its Table 4 tells by color alone.

No 13 classes have the means that are printed as Tail mIoU in its ten rows, though all 19 have those
printed as mIoU. These come nearest, to .65 points or less (the next choice: .90). DARS is among the
best two of the upper part in 10 of them, as the text says. And they are what `TAIL_SHARE` gives:
they hold 7 % of all labeled pixels, and together with the sky 11 %.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    args = _parser().parse_args(argv)
    try:
        overrides = {} if args.root is None else {"data.root": args.root}
        run = open_trained(args.workdir, overrides)
        with logs.create_console() as console:
            report(run, console)
            if args.calibration:
                comparison.compare(
                    run,
                    console,
                    network=args.network,
                    step=args.step,
                    ratio=args.ratio,
                    pixels=args.pixels,
                    images=args.images,
                )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jaxssl.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--workdir", required=True, type=Path, help="of the run")
    add("--calibration", action="store_true", help="compare calibrations and rules")
    group = parser.add_argument_group("with --calibration")
    add = group.add_argument
    add("--network", help="that labels (default: the one that labeled before the first round)")
    add("--step", help="best, last or a number (default: when it labeled, else best)")
    add("--ratio", type=float, help="share of pixels to keep (default: the first round's, or 0.2)")
    add("--pixels", type=int, default=200_000, help="of validation to fit on (default: 200000)")
    add("--images", type=int, help="unlabeled images to label, evenly spaced (default: all)")
    add("--config.data.root", dest="root", metavar="DIR", help="where the data are now")
    return parser


def report(run: Trained, console: logs.Console) -> dict[str, Any]:
    """Prints what a run wrote of itself, and writes `report/`.

    Returns:
      What report.json holds.
    """
    labelings = read_labelings(run)
    prior = {}
    if labelings:
        classes = labelings[0]["classes"].items()
        prior = {name: values["of_labels"] or 0.0 for name, values in classes}
    tail = tail_classes(run.info, prior)
    scores = read_scores(run, tail)
    measure = metrics.MEASURES[run.info.task]
    console.table(
        f"{measure.title} % on validation images, and the mean over {len(tail)} tail classes",
        ("phase", "network", "last", "tail", "best", "tail", "at step", "mode"),
        [_score_row(one, measure.name) for one in scores],
    )
    console.message(f"Tail classes: {', '.join(tail) or 'none'}")
    folder = run.workdir / "report"
    found = {"tail": list(tail), "scores": scores, "labelings": labelings}
    files.write_json(folder / "report.json", found)
    written = ["report.json"]
    if labelings:
        columns = ("phase", "labeled by", "step", "images", "kept %", "KL", "accuracy %")
        rows = [_labeling_row(one) for one in labelings]
        console.table("Pseudo-labels, and KL(labels || pseudo-labels)", columns, rows)
        pictures = {
            "classes.png": class_figure(run.info, labelings),
            "pseudo_labels.png": quality_figure(labelings),
        }
        for name, figure in pictures.items():
            with files.whole(folder / name) as file:
                figure.savefig(file, format="png", dpi=150)
        written += pictures
    else:
        console.message("No phase of this run has learned from stored pseudo-labels.")
    console.message(f"Written to {folder}: {', '.join(written)}")
    return found


def tail_classes(info: DataInfo, prior: Mapping[str, float]) -> tuple[str, ...]:
    """Names of the classes that a long tail consists of, in the order of their labels.

    Args:
      info: of the run; the classes of Cityscapes have `CITYSCAPES_TAIL`, whatever their shares.
      prior: share of each class among the labeled pixels, by name; where empty, nothing is known.
    """
    if info.classes == cityscapes.INFO.classes:
        return CITYSCAPES_TAIL
    rarest = sorted(prior, key=lambda name: prior[name])
    together = np.cumsum([prior[name] for name in rarest])
    tail = rarest[: int((together <= TAIL_SHARE).sum())]
    return tuple(name for name in info.classes if name in tail)


def read_scores(run: Trained, tail: Sequence[str]) -> list[dict[str, Any]]:
    """The last and the best score of each network in each phase, from metrics.jsonl.

    Those of another mode than the phase's last evaluation are left out, as they do not compare.

    Returns:
      For each phase and network, the headline first: `phase`, `network`, `mode`, and `last` and
      `best` with `step`, the score by its name (`miou` or `accuracy`), `tail` (mean over the tail
      classes that occur, or None) and `iou` or `class_accuracy` by class; all in [0,1].
    """
    measure = metrics.MEASURES[run.info.task]
    name = measure.name
    lines = [line for line in _lines(run.workdir / "metrics.jsonl") if f"val/{name}" in line]
    found = []
    for phase, _ in run.phases:
        mine = [line for line in lines if line["phase"] == phase]
        mine = [line for line in mine if line.get("eval/mode") == mine[-1].get("eval/mode")]
        names = [re.fullmatch(f"val/([^/]+)/{name}", key) for line in mine[::-1] for key in line]
        for network in dict.fromkeys(match[1] for match in names if match):
            those = [line for line in mine if f"val/{network}/{name}" in line]
            scored = [_score(line, network, tail, measure) for line in those]
            best = max(scored, key=lambda one: one[name] or 0.0)
            head = {"phase": phase, "network": network, "mode": mine[-1].get("eval/mode")}
            found.append({**head, "last": scored[-1], "best": best})
    return found


def read_labelings(run: Trained) -> list[dict[str, Any]]:
    """What the labeling before each phase came to (`labeling.summarize`), in order."""
    stores = (Store.of(run.workdir, phase, run.info) for phase, _ in run.phases)
    return [store.read_summary() for store in stores if store.complete]


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
    axes.set_ylabel("share of pixels, %")
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


def quality_figure(labelings: Sequence[Mapping[str, Any]]) -> Figure:
    """Bars for the share of pixels that each labeling keeps, and for how many of these are right
    where that is known.

    Args:
      labelings: of `read_labelings`, at least one.
    """
    values = {"pixels with a pseudo-label": [one["kept"] for one in labelings]}
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


def _score(
    line: Mapping[str, Any], network: str, tail: Sequence[str], measure: metrics.Measure
) -> dict[str, Any]:
    """One network's score of a line of metrics.jsonl; see `read_scores`."""
    start = f"val/{network}/{measure.of_class}/"
    classes = {key.removeprefix(start): x for key, x in line.items() if key.startswith(start)}
    known = [classes[name] for name in tail if classes.get(name) is not None]
    return {
        "step": line["step"],
        measure.name: line[f"val/{network}/{measure.name}"],
        "tail": float(np.mean(known)) if known else None,
        measure.of_class: classes,
    }


def _lines(path: Path) -> list[dict[str, Any]]:
    """What is logged, but for a line that is being written."""
    found = []
    for text in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            found.append(json.loads(text))
    return found


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f}"


def _score_row(one: Mapping[str, Any], score: str) -> tuple[object, ...]:
    shares = (one[which][what] for which in ("last", "best") for what in (score, "tail"))
    return one["phase"], one["network"], *map(_percent, shares), one["best"]["step"], one["mode"]


def _labeling_row(summary: Mapping[str, Any]) -> tuple[object, ...]:
    labeler, kl = summary["labeler"], summary["kl"]
    return (
        summary["phase"],
        f"{labeler['network']} of {labeler['phase']}",
        labeler["step"],
        summary["images"] - summary["left_out"],
        _percent(summary["kept"]),
        "-" if kl is None else f"{kl:.4f}",
        _percent(summary["accuracy"]),
    )


_INK, _RED, _BLUE, _ORANGE = "#1c1e22", "#b3261e", "#2f5d8a", "#d9913a"


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure((min(width, 40), height), layout="constrained")


def _quiet(axes: Axes) -> None:
    """Leaves of the frame what is needed to read values."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=_INK, labelsize=9)
    axes.grid(axis="y", color="0.88", linewidth=0.8)
    axes.set_axisbelow(True)


if __name__ == "__main__":
    sys.exit(main())
