"""What came of a run, in tables and pictures: scores by phase, pseudo-labels by round.

`python -m jaxssl.report --workdir=W` reads what training wrote, be it finished or not, and runs no
network. It prints tables and writes to the folder W/report:

  confusion.png      which classes the reported network takes for which, where labels are classes of
                     whole images
  calibration.png    how sure it is, beside how often it is right then, likewise
  classes.png        how often each class is in the labels, and among the pseudo-labels of each
                     round (Figure 1 of DARS)
  pseudo_labels.png  which share of the pixels, or images, each round labels and, where the run
                     measured it (config.eval.unlabeled_truth), which share of these labels is right
  errors.png         where it was measured, which share of the surest labels of each round is wrong
                     (Figure 1 of DMT)
  coupling.png       how far the two networks of a method are apart while they learn (Figure 2 of
                     RML); those of other runs, too, with --compare=W2,W3
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
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from PIL import Image

from jaxssl import comparison, logs, metrics, panels
from jaxssl.contracts import DataInfo, UserError
from jaxssl.data import cityscapes, files
from jaxssl.data.pseudo_labels import Store
from jaxssl.figures import (
    class_figure,
    coupling_figure,
    error_figure,
    quality_figure,
    reliability_figure,
)
from jaxssl.trained import Trained, evaluation_path, open_trained

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Picture: TypeAlias = "Figure | np.ndarray"
"""To be written as a PNG file; an array is uint8 `[H,W,3]`."""

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
            report(run, console, others=args.compare)
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
    add("--compare", type=_paths, default=(), metavar="W2,W3", help="runs to draw beside this one")
    add("--calibration", action="store_true", help="compare calibrations and rules")
    group = parser.add_argument_group("with --calibration")
    add = group.add_argument
    add("--network", help="that labels (default: the one that labeled before the first round)")
    add("--step", help="best, last or a number (default: when it labeled, else best)")
    add("--ratio", type=float, help="share of pixels to keep (default: the first round's, or 0.2)")
    add("--pixels", type=int, default=200_000, help="of validation, or images, to fit on (200000)")
    add("--images", type=int, help="unlabeled images to label, evenly spaced (default: all)")
    add("--config.data.root", dest="root", metavar="DIR", help="where the data are now")
    return parser


def _paths(text: str) -> tuple[Path, ...]:
    return tuple(Path(word).expanduser() for word in text.split(","))


def report(run: Trained, console: logs.Console, *, others: Sequence[Path] = ()) -> dict[str, Any]:
    """Prints what a run wrote of itself, and writes `report/`.

    Args:
      run: to report.
      console: shows the tables.
      others: workdirs whose coupling is drawn beside that of the run.

    Returns:
      What report.json holds.

    Raises:
      UserError: one of the others has none.
    """
    labelings = read_labelings(run)
    prior = {}
    if labelings:
        classes = labelings[0]["classes"].items()
        prior = {name: values["of_labels"] or 0.0 for name, values in classes}
    tail = tail_classes(run.info, prior)
    scores = read_scores(run, tail)
    whole, folder = run.info.task == "classification", run.workdir / "report"
    _show_scores(run.info, scores, tail, console)
    found = {"tail": list(tail), "scores": scores, "labelings": labelings}
    pictures: dict[str, Picture] = {}
    if whole and (result := read_result(run)) is not None:
        found |= {"result": result}
        pictures |= _show_result(run.info, result, console)
    if labelings:
        columns = ("phase", "labeled by", "step", "images", "kept %", "KL", "accuracy %")
        rows = [_labeling_row(one) for one in labelings]
        console.table("Pseudo-labels, and KL(labels || pseudo-labels)", columns, rows)
        pictures["classes.png"] = class_figure(run.info, labelings)
        pictures["pseudo_labels.png"] = quality_figure(run.info, labelings)
        if any(one.get("errors") for one in labelings):
            pictures["errors.png"] = error_figure(labelings)
    else:
        console.message("No phase of this run has learned from stored pseudo-labels.")
    if curves := read_coupling((run.workdir, *others)):
        found |= {"coupling": curves}
        pictures["coupling.png"] = coupling_figure(curves)
        console.table(
            "Total variation distance of the two networks",
            ("run", "at first", "mean", "at last"),
            [_coupling_row(*one) for one in curves.items()],
        )
    files.write_json(folder / "report.json", found)
    for name, picture in pictures.items():
        _write_picture(folder / name, picture)
    console.message(f"Written to {folder}: {', '.join(['report.json', *pictures])}")
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
      classes that occur, or None), `iou` or `class_accuracy` by class, and `calibration_error` of
      whole images; all in [0,1].
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


def read_result(run: Trained) -> dict[str, Any] | None:
    """The reported network's best evaluation of whole images: `network`, `step`, and what
    `Evaluation.to_json` says; None before the first one.
    """
    if run.best is None:
        return None
    path = evaluation_path(run.workdir, run.best["step"])
    try:
        stored = json.loads(path.read_text())[run.headline]
    except FileNotFoundError:  # of a run that is older than these files
        return None
    return {"network": run.headline, "step": run.best["step"], **stored}


def read_labelings(run: Trained) -> list[dict[str, Any]]:
    """What the labeling before each phase came to (`labeling.summarize`), in order."""
    stores = (Store.of(run.workdir, phase, run.info) for phase, _ in run.phases)
    return [store.read_summary() for store in stores if store.complete]


def read_coupling(workdirs: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """How far the two networks of each run are apart, by its folder's name: `measured`, the
    metric's name, and lists `step` and `distance`. Steps of training say it most often; where one
    of the runs does not, it is what evaluations say. Nothing where a single run has no such thing.

    Raises:
      UserError: one of several runs has none.
    """
    lines = {path: _lines(path / "metrics.jsonl") for path in workdirs}

    def has(path: Path, key: str) -> bool:
        return any(line.get(key) is not None for line in lines[path])

    keys = ("train/coupling", "watch/coupling")
    key = next((key for key in keys if all(has(path, key) for path in workdirs)), None)
    if key is None and len(workdirs) == 1:
        return {}
    if key is None:
        silent = next(path for path in workdirs if not has(path, keys[1]))
        raise UserError(
            f"{silent} does not say how far two networks are apart: no line of its metrics.jsonl "
            f"has {keys[1]}. Compare runs of methods with two networks."
        )
    found = {}
    for path in workdirs:
        name = path.name if [one.name for one in workdirs].count(path.name) == 1 else str(path)
        mine = [line for line in lines[path] if line.get(key) is not None]
        steps, distances = ([line[k] for line in mine] for k in ("step", key))
        found[name] = {"measured": key, "step": steps, "distance": distances}
    return found


def _coupling_row(name: str, curve: Mapping[str, Any]) -> tuple[str, ...]:
    distances = curve["distance"]
    values = (distances[0], float(np.mean(distances)), distances[-1])
    return name, *(f"{value:.3f}" for value in values)


def _score(
    line: Mapping[str, Any], network: str, tail: Sequence[str], measure: metrics.Measure
) -> dict[str, Any]:
    """One network's score of a line of metrics.jsonl; see `read_scores`."""
    start = f"val/{network}/{measure.of_class}/"
    classes = {key.removeprefix(start): x for key, x in line.items() if key.startswith(start)}
    known = [classes[name] for name in tail if classes.get(name) is not None]
    error = f"val/{network}/calibration_error"
    return {
        "step": line["step"],
        measure.name: line[f"val/{network}/{measure.name}"],
        **({"calibration_error": line[error]} if error in line else {}),
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


def _show_scores(
    info: DataInfo, scores: Sequence[Mapping[str, Any]], tail: Sequence[str], console: logs.Console
) -> None:
    measure = metrics.MEASURES[info.task]
    words, what, beside = f"the mean over {len(tail)} tail classes", "tail", "tail"
    if info.task == "classification":
        words, what, beside = "the calibration error %", "calibration_error", "error"
    keys = [(which, key) for which in ("last", "best") for key in (measure.name, what)]
    rows = [
        (
            *(one["phase"], one["network"], *(_percent(one[which][key]) for which, key in keys)),
            *(one["best"]["step"], one["mode"]),
        )
        for one in scores
    ]
    columns = ("phase", "network", "last", beside, "best", beside, "at step", "mode")
    console.table(f"{measure.title} % on validation images, and {words}", columns, rows)
    if what == "tail":
        console.message(f"Tail classes: {', '.join(tail) or 'none'}")


def _show_result(
    info: DataInfo, result: Mapping[str, Any], console: logs.Console
) -> dict[str, Picture]:
    """Prints the accuracy of each class; draws what is taken for what, and how sure that is."""
    measure, confusion = metrics.MEASURES[info.task], np.array(result["confusion"])
    scores = metrics.class_accuracy(confusion)
    console.class_table(
        info.classes,
        scores,
        ~np.isnan(scores),
        title=f"Network {result['network']}, step {result['step']}, {result['mode']}, "
        f"{measure.title} {_percent(result[measure.name])} %",
        column=measure.class_title,
    )
    sums = {name: np.array(values) for name, values in result["reliability"].items()}
    return {
        "confusion.png": panels.confusion(confusion, info),
        "calibration.png": reliability_figure(metrics.Reliability(**sums)),
    }


def _write_picture(path: Path, picture: Picture) -> None:
    with files.whole(path) as file:
        if isinstance(picture, np.ndarray):
            Image.fromarray(picture).save(file, "PNG")
        else:
            picture.savefig(file, format="png", dpi=150)


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


if __name__ == "__main__":
    sys.exit(main())
