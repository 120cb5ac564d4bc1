"""The class of each of the user's images, in a table: what `predict` and `label` write where labels
are classes of whole images.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import numpy as np

from jaxssl import logs, sharding, startup, sweep
from jaxssl.contracts import DataInfo, Record
from jaxssl.data.files import whole
from jaxssl.evaluate import Evaluator
from jaxssl.predictions import outdated, read_image

if TYPE_CHECKING:
    from jaxssl.predict import Job

PIECE = 10_000
"""So many rows wait in memory at most before they are on disk."""

Read = Callable[[jax.Array], Mapping[str, jax.Array]]
"""Logits `[b,C]` -> what to find, arrays `[b,...]` by name; pure."""


class Table:
    """A CSV file with a row for each image, sorted: its path, then a word for each column.

    Args:
      path: of the file; where its columns are others, it counts as empty.
      columns: names of all but the first.
    """

    def __init__(self, path: Path, columns: Iterable[str]):
        self.path, self.header = path, ("image", *columns)
        self.rows: dict[str, tuple[str, ...]] = {}
        if path.exists():
            text = path.read_bytes().decode("utf-8", "surrogateescape")
            lines = [tuple(row) for row in csv.reader(io.StringIO(text, newline=""))]
            fits = all(len(row) == len(self.header) for row in lines)
            if fits and lines and lines[0] == self.header:
                self.rows = {name: tuple(row) for name, *row in lines[1:]}

    def due(self, folder: Path, names: Sequence[Path], *, overwrite: bool = False) -> list[Path]:
        """Drops the rows of those images in a folder that are newer than the file, or all if
        `overwrite`; which of them have none now.
        """
        for name in names:
            if overwrite or outdated(self.path, folder / name):
                self.rows.pop(name.as_posix(), None)
        return [name for name in names if name.as_posix() not in self.rows]

    def write(self) -> None:
        """Replaces the file."""
        text = io.StringIO()
        lines = csv.writer(text, lineterminator="\n")
        lines.writerow(self.header)
        lines.writerows((name, *self.rows[name]) for name in sorted(self.rows))
        with whole(self.path) as file:
            # As file names are, which need not be text.
            file.write(text.getvalue().encode("utf-8", "surrogateescape"))


class Images:
    """The user's images as a `Source`, by their path in a folder."""

    def __init__(self, info: DataInfo, folder: Path, names: Iterable[Path]):
        self.info, self._folder = info, folder
        self.ids = tuple(name.as_posix() for name in names)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Record:
        path = self._folder / self.ids[index]
        return Record(image=read_image(path), id=self.ids[index], file=str(path))


def fill(
    table: Table,
    job: Job,
    names: Sequence[Path],
    read: Read,
    words: Callable[[Mapping[str, np.ndarray]], tuple[str, ...]],
    console: logs.Console,
) -> int:
    """Classifies images, at the size that they are evaluated at, and writes a row for each. What is
    done when it is stopped is on disk.

    Args:
      table: gets the rows.
      job: says which network to take, and how to show images to it.
      names: of the images.
      read: what of the logits the rows are made of.
      words: the row of an image, from what `read` found for it.
      console: shows how far it is, and names what cannot be read.

    Returns:
      How many images that are.
    """
    if not names:
        return 0
    run, done, failed = job.run, 0, list[str]()
    images = Images(run.info, job.folder, names)
    startup.keep_compiled(run.config)
    evaluator = Evaluator(run.nets, images, sharding.make_mesh(), run.config, say=console.message)
    variables, jitted = evaluator.local(run.variables(job.network, job.step)), jax.jit(read)
    console.phase("classify", len(images), unit="images")

    def update(batch: Mapping[str, jax.Array]) -> Mapping[str, jax.Array]:
        return jitted(evaluator.predict(job.network, job.how, variables, batch))

    def add(batch: Mapping[str, np.ndarray], found: Mapping[str, np.ndarray]) -> None:
        nonlocal done
        before = done
        for row, position in enumerate(batch["index"].tolist()):
            if position >= 0:
                of_image = {name: x[row] for name, x in found.items()}
                table.rows[images.ids[position]] = words(of_image)
                done += 1
        console.step(done)
        if done // PIECE > before // PIECE:
            table.write()

    batches = evaluator.batches(
        images, threads=4, on_damage=lambda position, reason: failed.append(reason)
    )
    try:
        with evaluator.telling_compilations("Classification"):
            sweep.each(update, batches, evaluator.mesh, add)
    finally:
        table.write()
    console.report(done, {})
    for reason in sorted(failed):
        console.message(f"failed: {reason}")
    return len(failed)
