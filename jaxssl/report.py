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
import dataclasses
import functools
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxssl import (
    calibration,
    labeling,
    logs,
    metrics,
    phases,
    selection,
    sharding,
    startup,
    sweep,
    watch,
)
from jaxssl.calibration import Calibration, Sample, Temperature
from jaxssl.contracts import IGNORE_LABEL, DataInfo, Labeling, Source, UserError
from jaxssl.data import cityscapes, files, loading, pipeline
from jaxssl.data.pseudo_labels import Store
from jaxssl.data.splits import Split
from jaxssl.evaluate import Evaluator
from jaxssl.inference import Presentation
from jaxssl.selection import LEVELS, Aligned, TopShare
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
                calibrate(
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
    console.table(
        f"mIoU % on validation images, of all classes and of {len(tail)} tail classes",
        ("phase", "network", "last", "tail", "best", "tail", "at step", "mode"),
        [_score_row(one) for one in scores],
    )
    console.message(f"Tail classes: {', '.join(tail) or 'none'}")
    folder = run.workdir / "report"
    found = {"tail": list(tail), "scores": scores, "labelings": labelings}
    _write_json(folder / "report.json", found)
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
      `best` with `step`, `miou`, `tail` (mean over the tail classes that occur, or None) and `iou`
      by class; all in [0,1].
    """
    lines = [line for line in _lines(run.workdir / "metrics.jsonl") if "val/miou" in line]
    found = []
    for phase, _ in run.phases:
        mine = [line for line in lines if line["phase"] == phase]
        mine = [line for line in mine if line.get("eval/mode") == mine[-1].get("eval/mode")]
        names = [re.fullmatch("val/([^/]+)/miou", key) for line in mine[::-1] for key in line]
        for name in dict.fromkeys(match[1] for match in names if match):
            scored = [_score(line, name, tail) for line in mine if f"val/{name}/miou" in line]
            best = max(scored, key=lambda one: one["miou"] or 0.0)
            head = {"phase": phase, "network": name, "mode": mine[-1].get("eval/mode")}
            found.append({**head, "last": scored[-1], "best": best})
    return found


def read_labelings(run: Trained) -> list[dict[str, Any]]:
    """What the labeling before each phase came to (`labeling.summarize`), in order."""
    stores = (_store(run, phase) for phase, _ in run.phases)
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


def calibrate(
    run: Trained,
    console: logs.Console,
    *,
    network: str | None = None,
    step: str | int | None = None,
    ratio: float | None = None,
    pixels: int = 200_000,
    images: int | None = None,
) -> dict[str, Any]:
    """Compares rules and calibrations by the classes that they keep, and writes calibration.json.

    What is drawn at random among pseudo-labels counts as its mean. Cross entropies and calibration
    errors are those of the validation pixels that were fitted on.

    Args:
      run: whose config says where the data are.
      console: shows the tables.
      network: that labels; None takes the first round's.
      step: "best", "last" or a number; None takes the one that it labeled at, where it is kept.
      ratio: share of the pixels to keep; None takes the first round's, or .2.
      pixels: of validation images to fit on, at most.
      images: unlabeled images to label, at most.

    Returns:
      What calibration.json holds.

    Raises:
      UserError: there is no such network or step, or the data do not fit the run.
    """
    for name, value in (("pixels", pixels), ("images", images)):
        if value is not None and value < 1:
            raise UserError(f"--{name}={value} is too small. Give 1 or more.")
    sources = _open_sources(run)
    phase, first = _first_labeling(run, sources) or (None, None)
    how = _presentation(run) if first is None else first.shown
    rule = None if first is None else first.rule
    if ratio is None:
        ratio = rule.ratio if isinstance(rule, (Aligned, TopShare)) else 0.2
    precision = rule.precision if isinstance(rule, Aligned) else "float16"
    rules = calibration.make_rules(ratio, precision)
    network, number = _labeler(run, phase, network, step, console)
    look = _Look(run, network, number, how, sources["val"], console)
    unlabeled = _evenly_spaced(sources["unlabeled"], images)
    console.message(
        f"Calibration: {network} at step {number}, {how}; up to {pixels} pixels of "
        f"{len(sources['val'])} validation images, then {len(unlabeled)} unlabeled images."
    )
    sample = look.sample(sources["val"], pixels)
    fitted = calibration.fit_all(sample.logits, sample.labels)
    counts, left_out = look.count(unlabeled, fitted)
    prior = watch.class_counts(sources["labeled"])
    kept = {
        name: calibration.expected_counts(counts[by], choose(counts[by], prior))
        for name, (by, choose) in rules.items()
    }
    predicted = counts["none"].sum()
    found = {
        "network": network,
        "step": number,
        "shown": str(how),
        "images": len(unlabeled) - len(left_out),
        "left_out": left_out,
        "pixels": len(sample.keys),
        "ratio": ratio,
        "precision": precision,
        "temperature": cast(Temperature, fitted["temperature scaling"]).value,
        "calibrations": {name: _fit_json(one, sample) for name, one in fitted.items()},
        "rules": {name: _kept_json(run.info, x, predicted, prior) for name, x in kept.items()},
    }
    path = run.workdir / "report" / "calibration.json"
    _write_json(path, found)
    console.close()  # the last bar stays above the result
    _show_calibration(found, console)
    console.message(f"Written to {path}")
    return found


class _Look:
    """One network of a run, to be shown images."""

    def __init__(
        self,
        run: Trained,
        network: str,
        step: int,
        how: Presentation,
        source: Source,
        console: logs.Console,
    ):
        variables = run.variables(network, step)
        startup.keep_compiled(run.config)
        self._run = Evaluator(
            run.nets, source, sharding.make_mesh(), run.config, say=console.message
        )
        self._seed, self._console = run.config.seed, console
        self._predict = functools.partial(
            self._run.predict, network, how, self._run.local(variables)
        )

    def sample(self, source: Source, size: int) -> Sample:
        """Logits and labels of pixels drawn from all those of a source that have a label."""
        C = source.info.num_classes
        drawn = Sample(np.zeros(0, np.uint32), np.zeros((0, C), np.float32), np.zeros(0, np.uint8))

        def batches() -> Iterator[dict[str, np.ndarray]]:
            for batch in self._batches(source):
                if "label" not in batch:
                    raise UserError(_NO_LABELS)
                ids = (source.ids[i] if i >= 0 else "" for i in batch["index"])
                rngs = [labeling.image_rng(self._seed, image_id) for image_id in ids]
                positions, keys = calibration.draw(batch["label"], rngs, size)
                yield {**batch, "positions": positions, "keys": keys}

        @jax.jit
        def read(logits: jax.Array, positions: jax.Array) -> jax.Array:
            return jnp.take_along_axis(logits.reshape(len(logits), -1, C), positions[..., None], 1)

        def add(batch: Mapping[str, np.ndarray], logits: np.ndarray) -> None:
            nonlocal drawn
            flat = batch["label"].reshape(len(logits), -1)
            labels = np.take_along_axis(flat, batch["positions"], 1)
            known = labels != IGNORE_LABEL
            found = Sample(batch["keys"][known], logits[known], labels[known])
            drawn = drawn.merged(found, size)

        self._each(
            "validation",
            len(source),
            lambda batch: read(self._predict(batch), batch["positions"]),
            batches(),
            add,
        )
        if not len(drawn.keys):
            raise UserError(_NO_LABELS)
        return drawn

    def count(
        self, source: Source, calibrations: Mapping[str, Calibration]
    ) -> tuple[dict[str, np.ndarray], list[str]]:
        """By calibration, int64 `[C,levels]`: pixels by predicted class and level of confidence;
        and which images could not be read.
        """
        C, left_out = source.info.num_classes, list[str]()
        counts = {name: np.zeros((C, LEVELS), np.int64) for name in calibrations}

        @jax.jit
        def read(calibrations: Mapping[str, Calibration], logits: jax.Array) -> Any:
            return {name: labeling.most_probable(x(logits)) for name, x in calibrations.items()}

        def add(batch: Mapping[str, np.ndarray], found: Mapping[str, Any]) -> None:
            valid = batch["valid"]
            for name, (labels, levels) in found.items():
                counts[name] += selection.count(labels[valid], levels[valid], C)

        batches = self._batches(source, lambda i, _: left_out.append(source.ids[i]))
        self._each(
            "unlabeled",
            len(source),
            lambda batch: read(calibrations, self._predict(batch)),
            batches,
            add,
        )
        return counts, left_out

    def _batches(
        self, source: Source, on_damage: Callable[[int, str], None] | None = None
    ) -> Iterator[dict[str, np.ndarray]]:
        batch, bucket = self._run.batch, self._run.bucket
        return pipeline.in_order(source, batch, bucket=bucket, on_damage=on_damage)

    def _each(
        self,
        name: str,
        total: int,
        update: sweep.Update,
        batches: Iterable[Mapping[str, np.ndarray]],
        sink: sweep.Sink,
    ) -> None:
        """As `sweep.each`, over `total` images, and says how far it is."""
        done = 0

        def counting(batch: Mapping[str, np.ndarray], found: Any) -> None:
            nonlocal done
            sink(batch, found)
            done += int((batch["index"] >= 0).sum())
            self._console.step(done)

        self._console.phase(name, total, unit="images")
        with self._run.telling_compilations("Calibration"):
            sweep.each(update, batches, self._run.mesh, counting)


def _open_sources(run: Trained) -> dict[str, Source]:
    """The data that a run learned from; UserError where they changed since."""
    split, sources = phases.open_sources(run.config.data)
    stored = run.workdir / "splits.json"
    if stored.exists() and Split.from_json(stored.read_text()) != split:
        raise UserError(
            f"The images differ from those in {stored}: the data changed since the run, or are "
            "elsewhere. Say where with --config.data.root=DIR."
        )
    if (classes := sources["val"].info.classes) != run.info.classes:
        raise UserError(
            f"The data have the classes {', '.join(classes)}, but {run.workdir} was trained on "
            f"{', '.join(run.info.classes)}."
        )
    if not len(sources["unlabeled"]):
        raise UserError(f"{run.workdir} has no unlabeled images: there is nothing to label.")
    return sources


def _first_labeling(run: Trained, sources: Mapping[str, Source]) -> tuple[str, Labeling] | None:
    """The first phase that learns from stored pseudo-labels, and how they are made; if any does."""
    for phase in run.method.phases(phases.make_plan(run.config, sources)):
        stream = phase.pseudo_labeled
        if stream is not None and isinstance(stream.labels, Labeling):
            return phase.name, stream.labels
    return None


def _presentation(run: Trained) -> Presentation:
    """How images are shown in a run that labels none: as it evaluates, but whole images."""
    how = Presentation.of(run.config.eval, run.config.crop)
    return dataclasses.replace(how, mode="whole") if how.mode == "center_crop" else how


def _labeler(
    run: Trained,
    phase: str | None,
    network: str | None,
    step: str | int | None,
    console: logs.Console,
) -> tuple[str, int]:
    """Name and step of the network to label with; see `calibrate`."""
    if network is None and step is None and phase is not None and _store(run, phase).complete:
        first = _store(run, phase).read_summary()["labeler"]
        if first["step"] in run.kept:
            return first["network"], first["step"]
        console.message(
            f"The checkpoint that labeled before {phase} (step {first['step']}) is not kept any "
            "more: the run's best one takes its place."
        )
    return network or run.headline, run.step("best" if step is None else step)


def _evenly_spaced(source: Source, most: int | None) -> Source:
    if most is None or most >= len(source):
        return source
    return loading.Subset(source, [source.ids[i * len(source) // most] for i in range(most)])


def _fit_json(fitted: Calibration, sample: Sample) -> dict[str, float]:
    logits = np.asarray(fitted(jnp.asarray(sample.logits)))
    return {
        "cross_entropy": calibration.cross_entropy(logits, sample.labels),
        "calibration_error": calibration.calibration_error(logits, sample.labels),
    }


def _kept_json(
    info: DataInfo, kept: np.ndarray, predicted: int, prior: np.ndarray
) -> dict[str, Any]:
    shares = kept / max(kept.sum(), 1)
    divergence = metrics.kl_divergence(prior, kept)
    return {
        "kl": divergence if np.isfinite(divergence) else None,
        "kept": float(kept.sum() / predicted),
        "classes": dict(zip(info.classes, map(float, shares), strict=True)),
    }


def _show_calibration(found: Mapping[str, Any], console: logs.Console) -> None:
    console.table(
        f"Fitted on {found['pixels']} validation pixels, T = {found['temperature']:.3f}",
        ("calibration", "cross entropy", "calibration error %"),
        [
            (name, f"{one['cross_entropy']:.4f}", f"{100 * one['calibration_error']:.2f}")
            for name, one in found["calibrations"].items()
        ],
    )
    console.table(
        f"Pseudo-labels of {found['images']} images at a ratio of {found['ratio']:g}",
        ("rule", "KL(labels || pseudo-labels)", "kept %"),
        [
            (name, "-" if one["kl"] is None else f"{one['kl']:.4f}", f"{100 * one['kept']:.1f}")
            for name, one in found["rules"].items()
        ],
    )


def _score(line: Mapping[str, Any], network: str, tail: Sequence[str]) -> dict[str, Any]:
    """One network's score of a line of metrics.jsonl; see `read_scores`."""
    start = f"val/{network}/iou/"
    iou = {key.removeprefix(start): x for key, x in line.items() if key.startswith(start)}
    known = [iou[name] for name in tail if iou.get(name) is not None]
    return {
        "step": line["step"],
        "miou": line[f"val/{network}/miou"],
        "tail": float(np.mean(known)) if known else None,
        "iou": iou,
    }


def _lines(path: Path) -> list[dict[str, Any]]:
    """What is logged, but for a line that is being written."""
    found = []
    for text in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            found.append(json.loads(text))
    return found


def _store(run: Trained, phase: str) -> Store:
    return Store(run.workdir / "pseudo_labels" / phase, run.info)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f}"


def _score_row(one: Mapping[str, Any]) -> tuple[object, ...]:
    shares = (one[which][what] for which in ("last", "best") for what in ("miou", "tail"))
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


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    with files.whole(path) as file:
        file.write((json.dumps(values, indent=1, allow_nan=False) + "\n").encode())


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


_NO_LABELS = (
    "The validation images have no labeled pixel, and calibrations are fitted on these. Give them "
    "labels."
)


if __name__ == "__main__":
    sys.exit(main())
