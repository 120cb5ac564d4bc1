"""Labels images with a network that was trained, and keeps those labels that a rule selects.

`python -m jaxssl.label --workdir=W --input=I --output=O --rule=balanced:0.5` writes to the folder
O, under the path that each image has in I and at its original size:

  labels/NAME.png      class of each pixel, as a palette PNG: its values are the classes' numbers,
                       and 255, white, where no label is kept
  predicted/NAME.png   likewise, before any was dropped
  confidence/NAME.png  16 bits: the level L is a probability of 1 - 2^(-L/2048)

and of all images together legend.png, summary.json (what is kept of each class, and from which
confidence on) and classes.txt, which makes O, with images, a link to I, a folder to train on.

Where the run classifies whole images, O gets in the place of these folders

  labels.csv       a row for each image: its path in I; its label, empty where none is kept; its
                   class, before any label was dropped; how sure that is, and the level of that
  train/CLASS/...  links to the images with a label
  unlabeled/...    links to the others

which is a folder to train on, with data.name=class_folders.

Rules see the labels of all images at once, and keep of them

  threshold:C     those with at least the confidence C, whatever their class
  top:SHARE       the surest share; mostly of the classes that are frequent and easy
  balanced:SHARE  the surest share of each predicted class
  aligned:SHARE   that share, the classes as often as in the labels of training, if there are so
                  many; those equally sure are drawn

Another rule, in the same folder, selects anew from the labels that are there. Images are read as
python -m jaxssl.predict reads them: one that cannot be read is named, and the rest goes on. Nothing
outside O is written to, and O must be empty or made by the same command, which then goes on where
it was; an image that is newer than its labels is labeled again.
"""

from __future__ import annotations

import collections
import contextlib
import math
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxssl import label_images, labeling, logs, selection
from jaxssl.contracts import IGNORE_LABEL, DataInfo, Rule, UserError
from jaxssl.data import loading
from jaxssl.data.files import whole
from jaxssl.data.masks import ClassTable
from jaxssl.data.pseudo_labels import Store
from jaxssl.predict import Job, Read, exit_code, label_all, make_parser, overrides, remarks
from jaxssl.predictions import Outputs, outdated, read_image
from jaxssl.trained import Trained, open_trained
from jaxssl.watch import class_counts

RULE = "balanced:0.5"
"""Needs no labels of training, and leaves no class out."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code: 1 where an image failed, 2 for a user's mistake."""
    parser = make_parser("label", __doc__)
    add = parser.add_argument
    add("--rule", default=RULE, help=f"which labels to keep, see above (default: {RULE})")
    add("--temperature", type=float, default=1.0, help="divides logits (default: 1)")
    add("--seed", type=int, default=0, help="of what aligned draws (default: 0)")
    add("--config.data.root", dest="root", help="where the run's data are now, for aligned")
    args = parser.parse_args(argv)

    def work() -> int:
        moved = {"data.root": args.root} if args.root else {}
        return label(
            open_trained(args.workdir, overrides(args) | moved),
            args.input,
            args.output.expanduser(),
            rule=args.rule,
            temperature=args.temperature,
            seed=args.seed,
            network=args.network,
            step=args.step,
            overwrite=args.overwrite,
        )

    return exit_code(work)


def label(
    run: Trained,
    images: Path,
    output: Path,
    *,
    rule: str = RULE,
    temperature: float = 1.0,
    seed: int = 0,
    network: str | None = None,
    step: str | int = "best",
    overwrite: bool = False,
) -> int:
    """Labels images, selects from the labels, and says on the console what came of it.

    Args:
      run: whose network to take, and how to show images to it.
      images: a file or a folder.
      output: a new folder, or one to go on with; images that are labeled there, and did not change
        since, are not labeled again.
      rule: as `selection.parse` takes it.
      temperature: divides the logits before the softmax whose maximum is the confidence.
      seed: of the draws among labels that are equally sure.
      network: None takes the headline.
      step: "best", "last" or a number.
      overwrite: labels all images again.

    Returns:
      The exit code: 1 where an image could not be read, else 0.

    Raises:
      UserError: no images, no such network, step or rule, the output folder is in other use, or the
        rule needs labels of training that are gone.
    """
    keep = selection.parse(rule)
    _check(temperature, seed)
    whole = run.info.task == "classification"
    outputs, store = Outputs(output, run.info, overlay=whole), Store(output, run.info)
    job = Job.of(run, images, outputs, network=network, step=step)
    if whole:
        label_images.check_names(job.names)
    settings = {**job.settings, "temperature": temperature}
    outputs.check_folder(settings)
    prior = _prior(run, keep, rule, store)
    outputs.claim(settings)
    said = {
        "rule": rule,
        "seed": seed,
        "labeler": {"workdir": str(run.workdir), "network": job.network, "step": job.step},
        "shown": str(job.how),
        "temperature": temperature,
    }
    with logs.create_console() as console:
        args = job, store, keep, prior, said, console
        if whole:
            failed, table = label_images.label_images(*args, overwrite=overwrite)
            summary = store.read_summary()
            done, tiled = label_images.result(job, table, summary), 0
        else:
            failed, tiled = _label_pixels(*args, overwrite=overwrite)
            summary = store.read_summary()
            done = _result(job, store, summary, images.expanduser())
        console.close()  # the bar stays above the result
        title = f"Pseudo-labels by {rule}: {labeling.line(summary)}"
        console.table(title, *_without_empty(labeling.COLUMNS, labeling.rows(summary)))
        console.message("\n".join([*done, *remarks(failed, tiled)]))
    return 1 if failed else 0


def _label_pixels(
    job: Job,
    store: Store,
    keep: Rule,
    prior: np.ndarray,
    said: Mapping[str, Any],
    console: logs.Console,
    *,
    overwrite: bool,
) -> tuple[int, int]:
    """Labels pixels, and selects from all labels; as `label_all`."""
    output, ids = store.folder, {n: n.with_suffix("").as_posix() for n in job.names}
    todo = [n for n in job.names if overwrite or _due(output, ids[n], job.folder / n)]
    console.message(job.words(len(todo)))
    failed, tiled = _predict(job, todo, ids, store, said["temperature"], console)
    labeled = [i for i in ids.values() if _predicted(output, i).exists()]
    if not _selected(store, labeled, said):
        summary = _select(store, labeled, keep, said["seed"], prior, console)
        counts = {"images": len(ids), "left_out": len(ids) - len(labeled)}
        store.write_summary({**said, **counts, **summary})
    return failed, tiled


def _check(temperature: float, seed: int) -> None:
    if not 0 < temperature < math.inf:
        raise UserError(f"--temperature={temperature:g} does not divide logits. Give a number > 0.")
    if seed < 0:
        raise UserError(f"--seed={seed} is no seed. Give 0, or a number above it.")


def _prior(run: Trained, keep: Rule, rule: str, store: Store) -> np.ndarray:
    """Pixels by class in the labels of training, int64 `[C]`; all 0 where they are not known and
    the rule does not ask for them.

    What labeling counted, in training or here before, is taken over; else the labels are read.
    """
    phases = sorted(path.parent for path in run.workdir.glob("pseudo_labels/*/selection.json"))
    for known in (store, *(Store(folder, run.info) for folder in phases)):
        found = known.read_selection()
        if found is not None and found[2].any():
            return found[2]
    if not isinstance(keep, selection.Aligned):
        return np.zeros(run.info.num_classes, np.int64)
    try:
        return _count_labels(run)
    except UserError as error:
        raise UserError(
            f"--rule={rule} keeps classes as often as the labels of training have them, and these "
            f"cannot be read: {error} Say where they are, --config.data.root=DIR, or take another "
            f"rule, such as --rule={RULE}."
        ) from error


def _count_labels(run: Trained) -> np.ndarray:
    source = loading.training_sets(run.config.data)[1]["labeled"]
    run.check_classes(source.info)
    counts = class_counts(source)
    if not counts.any():
        raise UserError("No pixel of them has a class.")
    return counts


def _predict(
    job: Job,
    todo: Sequence[Path],
    ids: Mapping[Path, str],
    store: Store,
    temperature: float,
    console: logs.Console,
) -> tuple[int, int]:
    """Labels images with all that the network says; as `label_all`."""
    if not todo:
        return 0, 0
    predictor = job.predictor(_reader(temperature))

    def work(name: Path) -> int:
        image = read_image(job.folder / name)
        found = predictor(image)
        assert found.levels is not None
        _reopen(store)
        store.write(ids[name], found.labels, found.levels)
        _copy(_label(store.folder, ids[name]), _predicted(store.folder, ids[name]))
        return found.tiles

    return label_all(work, todo, console)


def _reader(temperature: float) -> Read:
    def read(logits: jax.Array) -> dict[str, jax.Array]:
        labels, levels = labeling.most_probable(logits, temperature)
        return {"labels": labels, "levels": levels}

    return read


def _select(
    store: Store,
    ids: Sequence[str],
    keep: Rule,
    seed: int,
    prior: np.ndarray,
    console: logs.Console,
) -> dict[str, Any]:
    """Makes labels of all predicted ones, whatever was kept of them before; what came of it."""
    _reopen(store)

    def count(some: Sequence[str]) -> np.ndarray:
        for image_id in some:
            _copy(_predicted(store.folder, image_id), _label(store.folder, image_id))
        return labeling.counted(store, some)

    C = store.info.num_classes
    counts = np.zeros((C, selection.LEVELS), np.int64)
    counts += _over("count", count, ids, console)
    chosen = keep(counts, prior)
    store.write_selection(chosen, counts.sum(1), prior)
    pairs = np.zeros((C + 1, C + 1), np.int64)
    pairs += _over("select", lambda i: labeling.selected(store, i, chosen, seed), ids, console)
    return labeling.summarize(pairs, chosen, counts.sum(1), prior, store)


def _over(
    name: str,
    function: Callable[[Sequence[str]], np.ndarray],
    ids: Sequence[str],
    console: logs.Console,
) -> np.ndarray | int:
    """The sum of a function of ids, which gets some at a time, so that the console may say how far
    it is.
    """
    total, some = 0, max(16, -(-len(ids) // 20))
    console.phase(name, len(ids), unit="images")
    for first in range(0, len(ids), some):
        total = total + function(ids[first : first + some])
        done = min(first + some, len(ids))
        console.step(done)
        console.report(done, {})
    return total


def _selected(store: Store, ids: Sequence[str], said: Mapping[str, Any]) -> bool:
    """Whether labels are those that this rule and seed keep of the predicted ones."""
    if not store.complete or store.missing(ids):
        return False
    summary = store.read_summary()
    return said.items() <= summary.items()


def _reopen(store: Store) -> None:
    """Forgets that the labels are complete, before the first one changes."""
    (store.folder / "summary.json").unlink(missing_ok=True)


def _due(output: Path, image_id: str, source: Path) -> bool:
    """Whether an image is to be labeled; `predicted` is written last."""
    paths = _predicted(output, image_id), output / "confidence" / f"{image_id}.png"
    return any(outdated(path, source) for path in paths)


def _label(output: Path, image_id: str) -> Path:
    return output / "labels" / f"{image_id}.png"


def _predicted(output: Path, image_id: str) -> Path:
    return output / "predicted" / f"{image_id}.png"


def _copy(source: Path, target: Path) -> None:
    with whole(target) as file:
        file.write(source.read_bytes())


def _result(job: Job, store: Store, summary: Mapping[str, Any], images: Path) -> list[str]:
    """What to do next, for people."""
    output, labeled = store.folder, summary["images"] - summary["left_out"]
    lines = [
        f"Done: {labeled} of {len(job.names)} images have labels in {output / 'labels'}, the "
        f"classes' numbers, {IGNORE_LABEL} (white) where none is kept; colors in "
        f"{output / 'legend.png'}.",
        "Another --rule with the same --output selects anew, without labeling again.",
    ]
    kept = {name: found["kept"] for name, found in summary["classes"].items()}
    if none := [name for name, pixels in kept.items() if not pixels]:
        lines.append(f"No label is kept of: {', '.join(none)}.")
    if images.is_dir() and labeled > 1 and len(none) < len(kept) - 1:
        lines += _training(job.folder, store)
    return lines


def _training(folder: Path, store: Store) -> list[str]:
    """Makes the output a folder to train on, and says how."""
    output, link = store.folder, store.folder / "images"
    # A link to what it stands in would have no end.
    if not link.exists() and not output.resolve().is_relative_to(folder.resolve()):
        with contextlib.suppress(OSError):  # not every file system has links
            link.symlink_to(folder.resolve(), target_is_directory=True)
    if not link.is_dir():
        return [
            f"To train on them, make a folder of images/, that is {folder}, and labels/, that is "
            f"{output / 'labels'}, which must not lie in images/."
        ]
    with whole(output / "classes.txt") as file:
        file.write("".join(f"{line}\n" for line in class_lines(store.info)).encode())
    return [
        "To train on them: python -m jaxssl.main --config=configs/supervised_folder.py "
        f"--config.data.root={shlex.quote(str(output))} --workdir=NEW",
        f"It is scored on a tenth of them, held out, unless {output / 'val'} has images/ and true "
        "labels/, with numbers or colors as in classes.txt.",
    ]


def class_lines(info: DataInfo) -> tuple[str, ...]:
    """The table of the classes for masks of their numbers, see `masks`; a line each."""
    times = collections.Counter(info.palette)
    colors = tuple(color if times[color] == 1 else None for color in info.palette)
    void = ((IGNORE_LABEL, None),)
    return ClassTable(info.classes, tuple(range(info.num_classes)), colors, void=void).lines


def _without_empty(
    columns: Sequence[str], rows: Sequence[Sequence[str]]
) -> tuple[list[str], list[list[str]]]:
    """A table less the columns that have no value."""
    used = [i for i in range(len(columns)) if any(row[i] for row in rows)]
    return [columns[i] for i in used], [[row[i] for i in used] for row in rows]


if __name__ == "__main__":
    sys.exit(main())
