"""What `label` does where labels are classes of whole images: a table of them, and links that make
the output a folder to train on.
"""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jaxssl import labeling, logs, selection
from jaxssl.classify import Table, fill
from jaxssl.contracts import IGNORE_LABEL, Rule, UserError
from jaxssl.data.pseudo_labels import Store

if TYPE_CHECKING:
    from jaxssl.predict import Job

COLUMNS = ("label", "class", "confidence", "level")
"""Of labels.csv, beside the image: a label is the class where it is kept, else empty."""

KEPT, OTHERS = "train", "unlabeled"
"""Folders of links, those of `data.class_folders`."""


def label_images(
    job: Job,
    store: Store,
    keep: Rule,
    prior: np.ndarray,
    said: Mapping[str, Any],
    console: logs.Console,
    *,
    overwrite: bool,
) -> tuple[int, Table]:
    """Labels those images that have no label yet, or changed since; selects from all of them.

    Args:
      job: images and network.
      store: whose folder gets all that is written.
      keep: the rule.
      prior: int64 `[C]`, images by class in the labels of training.
      said: `seed`, `temperature` and more, for summary.json.
      console: shows progress.
      overwrite: labels all images again.

    Returns:
      How many images could not be read, and the table.
    """
    classes, folder = store.info.classes, store.folder
    table = Table(folder / "labels.csv", COLUMNS)
    todo = table.due(job.folder, job.names, overwrite=overwrite)
    console.message(job.words(len(todo)))

    def read(logits: jax.Array) -> dict[str, jax.Array]:
        labels, levels = labeling.most_probable(logits, said["temperature"])
        return {"label": labels, "level": levels}

    def words(found: Mapping[str, np.ndarray]) -> tuple[str, ...]:
        level = found["level"]
        return "", classes[found["label"]], f"{selection.confidence(level):.6f}", str(level)

    (folder / "summary.json").unlink(missing_ok=True)  # it says that the rest is complete
    failed = fill(table, job, todo, read, words, console)
    place = {name: label for label, name in enumerate(classes)}
    names = [name for name in job.names if name.as_posix() in table.rows]
    rows = [table.rows[name.as_posix()] for name in names]
    labels = np.array([place[row[1]] for row in rows], np.uint8)
    levels = np.array([int(row[3]) for row in rows], np.int64)

    counts = selection.count(labels, levels, len(classes))
    chosen = keep(counts, prior)
    ids = (name.with_suffix("").as_posix() for name in names)
    rngs = (labeling.image_rng(said["seed"], image_id) for image_id in ids)
    each = zip(labels, levels, rngs, strict=True)
    kept = [selection.select(label, level, chosen, rng) for label, level, rng in each]
    for name, row, label in zip(names, rows, kept, strict=True):
        word = "" if label == IGNORE_LABEL else classes[label]
        table.rows[name.as_posix()] = (word, *row[1:])
    table.write()
    store.write_selection(chosen, counts.sum(1), prior)
    pairs = np.zeros((len(classes) + 1,) * 2, np.int64)  # no truth is known: all in the last row
    np.add.at(pairs[-1], np.minimum(np.array(kept, np.int64), len(classes)), 1)
    summary = labeling.summarize(pairs, chosen, counts.sum(1), prior, store)
    images = {"images": len(job.names), "left_out": len(job.names) - len(names)}
    store.write_summary({**said, **images, **summary})
    return failed, table


def check_names(names: Sequence[Path]) -> None:
    """UserError where two images differ by their suffix alone, which training refuses."""
    owners: dict[str, Path] = {}
    for name in names:
        other = owners.setdefault(name.with_suffix("").as_posix().casefold(), name)
        if other != name:
            raise UserError(
                f"{other} and {name} have the same name, which stands for one image where these "
                "are trained on. Rename one, or label them into different folders."
            )


def link(job: Job, table: Table) -> bool:
    """Makes the folder of a table one to train on: in train/CLASS/ are links to the images that
    have a label, in unlabeled/ to the others. Links of before that do not fit any more are removed,
    and nothing else.

    Returns:
      Whether the file system has links.
    """
    output, source = table.path.parent, job.folder.resolve()
    wanted = {}
    for name, (label, *_) in table.rows.items():
        part = Path(KEPT, label.replace("/", "-")) if label else Path(OTHERS)
        wanted[output / part / name] = source / name
    for part in (KEPT, OTHERS):
        for path in [path for path in (output / part).rglob("*") if path.is_symlink()]:
            target = Path(os.readlink(path))
            if target.is_relative_to(source) and wanted.get(path) != target:
                path.unlink()
    with contextlib.suppress(OSError):  # not every file system has links
        for path, target in wanted.items():
            if not os.path.lexists(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.symlink_to(target)
        return True
    return False


def result(job: Job, table: Table, summary: Mapping[str, Any]) -> list[str]:
    """What to do next, for people; makes the links, where there is something to train on."""
    output, done = table.path.parent, summary["images"] - summary["left_out"]
    kept = {name: found["kept"] for name, found in summary["classes"].items()}
    lines = [
        f"Done: {done} of {len(job.names)} images are in {table.path}, of these "
        f"{sum(kept.values())} with a label.",
        "Another --rule with the same --output selects anew, without labeling again.",
    ]
    none = [name for name, images in kept.items() if not images]
    if none:
        lines.append(f"No label is kept of: {', '.join(none)}.")
    if len(kept) - len(none) < 2:
        return lines
    if not link(job, table):
        return [*lines, f"{output} cannot hold links: to train on the labels, copy the images."]
    return [
        *lines,
        "To train on them, take a config for images and add --config.data.name=class_folders "
        f"--config.data.root={shlex.quote(str(output))} --config.data.split=all "
        "--config.data.extra=True",
        f"It is scored on a tenth of them, held out, unless {output / 'val'} has images in a "
        "folder for each class.",
    ]
