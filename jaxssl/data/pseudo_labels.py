"""Pseudo-labels on disk: for each image a label and its confidence, as PNG files to look at.

  labels/ID.png       class of each pixel as a palette PNG, 255 where no label is kept
  confidence/ID.png   16 bits, the brighter the surer: levels of confidence (see `selection`)
  selection.json      by class, from which level on labels are kept, and how many of those
  summary.json        what came of it; it is written last, so the rest is complete

A file gets its name when it is whole, so what a process that was killed has written holds.

Where a label is a class of a whole image, all of them are in one file:

  labels.npz          arrays of ids, of labels, 255 where none is kept, and of levels of confidence
"""

from __future__ import annotations

import dataclasses
import io
import json
import threading
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jaxssl import selection
from jaxssl.contracts import (
    IGNORE_LABEL,
    DataInfo,
    Record,
    Selection,
    Source,
    UnreadableError,
    UserError,
)
from jaxssl.data.files import open_image, whole, write_json
from jaxssl.data.splits import fingerprint

PIECE = 10_000
"""So many labels of whole images wait in memory at most before they are on disk."""


@dataclasses.dataclass(frozen=True)
class Store:
    """A folder of pseudo-labels.

    Attributes:
      folder: of the files; made when something is written.
      info: classes and palette.
    """

    folder: Path
    info: DataInfo

    @classmethod
    def of(cls, workdir: Path, phase: str, info: DataInfo) -> Store:
        """Where a run has what a phase of that name learns from, in the form that labels have."""
        kind = ClassStore if info.task == "classification" else cls
        return kind(workdir / "pseudo_labels" / phase, info)

    @property
    def complete(self) -> bool:
        """Whether all images are labeled and their labels selected."""
        return (self.folder / "summary.json").exists()

    def missing(self, ids: Iterable[str]) -> list[str]:
        """Those of some images that have no label yet."""
        # The confidence is written first.
        return [image_id for image_id in ids if not self._label(image_id).exists()]

    def write(self, image_id: str, labels: np.ndarray, levels: np.ndarray) -> None:
        """Writes the label of an image, uint8 `[h,w]`, and its levels of confidence, likewise."""
        with whole(self._confidence(image_id)) as file:
            # Confidences hardly compress: more effort would cost time for little.
            Image.fromarray(levels.astype(np.uint16)).save(file, "PNG", compress_level=1)
        self.write_labels(image_id, labels)

    def write_labels(self, image_id: str, labels: np.ndarray) -> None:
        """Replaces the label of an image."""
        height, width = labels.shape
        picture = Image.frombytes("P", (width, height), np.ascontiguousarray(labels).tobytes())
        # What is not kept is white, or gray where a class is white.
        shade = 128 if (255, 255, 255) in self.info.palette else 255
        palette = np.full((256, 3), shade, np.uint8)
        palette[: self.info.num_classes] = self.info.palette
        picture.putpalette(palette.tobytes())
        with whole(self._label(image_id)) as file:
            picture.save(file, "PNG", bits=8)

    def dropped(self, ids: Iterable[str]) -> set[str]:
        """Those of some images that teach nothing: none of these, which have many labels each."""
        del ids
        return set()

    def flush(self) -> None:
        """Makes sure that all that was written is on disk, as it is here at once."""

    def read(self, image_id: str) -> tuple[np.ndarray, np.ndarray]:
        """The label of an image, uint8 `[h,w]`, and its levels of confidence, uint16 `[h,w]`.

        Raises:
          UnreadableError: the image has no label, or a file of it is damaged.
        """
        labels, levels = self.read_labels(image_id), self._open(self._confidence(image_id), "I")
        if labels.shape != levels.shape:
            raise self._damaged(self._confidence(image_id), "its label has another size")
        return labels, levels.astype(np.uint16)

    def read_labels(self, image_id: str) -> np.ndarray:
        """The label alone, without decoding confidences; otherwise as `read`."""
        return self._open(self._label(image_id), "P")

    def _open(self, path: Path, mode: str) -> np.ndarray:
        try:
            image = open_image(path)
        except UnreadableError as error:
            raise self._damaged(path, str(error.__cause__ or error)) from None
        if not image.mode.startswith(mode):
            raise self._damaged(path, f"it has mode {image.mode}")
        return np.asarray(image)

    def _damaged(self, path: Path, reason: str) -> UnreadableError:
        return UnreadableError(
            f"{path} is not as it was written: {reason}. As long as no training on it has begun, "
            f"delete {self.folder}, and the same command labels again."
        )

    def read_selection(self) -> tuple[Selection, np.ndarray, np.ndarray] | None:
        """What `write_selection` wrote; None before."""
        path = self.folder / "selection.json"
        if not path.exists():
            return None
        stored = _read_json(path)
        lowest, predicted, prior = (
            np.array(stored[name], np.int64) for name in ("lowest", "predicted", "prior")
        )
        return Selection(lowest, np.array(stored["share"])), predicted, prior

    def write_selection(
        self,
        chosen: Selection,
        predicted: np.ndarray,
        prior: np.ndarray,
        errors: dict[str, Any] | None = None,
    ) -> None:
        """Writes what is kept, from which counts `[C]` that was decided, and how often labels are
        wrong, if that is known: labels are dropped only after it, so none of it could be found
        again.
        """
        arrays = {**chosen._asdict(), "predicted": predicted, "prior": prior}
        values = {name: x.tolist() for name, x in arrays.items()}
        write_json(self.folder / "selection.json", {**values, "errors": errors})

    def read_errors(self) -> dict[str, Any] | None:
        """How often labels are wrong, as `write_selection` was told it."""
        return _read_json(self.folder / "selection.json").get("errors")

    def read_summary(self) -> dict[str, Any]:
        """What came of the labeling; UserError where that is not done."""
        return _read_json(self.folder / "summary.json")

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Completes the folder."""
        write_json(self.folder / "summary.json", summary)

    def _label(self, image_id: str) -> Path:
        return self.folder / "labels" / f"{image_id}.png"

    def _confidence(self, image_id: str) -> Path:
        return self.folder / "confidence" / f"{image_id}.png"


class _Rows:
    """Labels of a `ClassStore` in memory; a copy in another process starts with none."""

    def __init__(self):
        self.lock = threading.RLock()
        self.known: dict[str, tuple[np.uint8, np.uint16]] | None = None
        self.unsaved: dict[str, set[str]] = {name: set() for name in _PIECES}

    def __reduce__(self):
        return _Rows, ()


_PIECES = ("labeled", "replaced")
"""Kinds of pieces; of two that hold an image, the label of the later kind counts."""


@dataclasses.dataclass(frozen=True)
class ClassStore(Store):
    """The same for labels of whole images, arrays without dimensions.

    Until the folder is complete, labels stand in pieces as they were written, `labeled.*.npz` and
    `replaced.*.npz`, of any number of processes.
    """

    _rows: _Rows = dataclasses.field(default_factory=_Rows, init=False, repr=False, compare=False)

    def missing(self, ids: Iterable[str]) -> list[str]:
        """As `Store.missing`."""
        with self._rows.lock:
            known = self._load()
            return [image_id for image_id in ids if image_id not in known]

    def dropped(self, ids: Iterable[str]) -> set[str]:
        """Those of some images whose label is not kept, or that have none."""
        with self._rows.lock:
            known = self._load()
            kept = {image_id for image_id, (label, _) in known.items() if label != IGNORE_LABEL}
        return set(ids) - kept

    def write(self, image_id: str, labels: np.ndarray, levels: np.ndarray) -> None:
        """Takes the label of an image, uint8, and its level of confidence, uint16; many together
        are put on disk.
        """
        self._put("labeled", image_id, (np.uint8(labels), np.uint16(levels)))

    def write_labels(self, image_id: str, labels: np.ndarray) -> None:
        """Replaces the label of an image that has one."""
        _, level = self.read(image_id)
        self._put("replaced", image_id, (np.uint8(labels), np.uint16(level)))

    def flush(self) -> None:
        """As `Store.flush`."""
        with self._rows.lock:
            for kind in _PIECES:
                self._save(kind)

    def read(self, image_id: str) -> tuple[np.ndarray, np.ndarray]:
        """As `Store.read`."""
        with self._rows.lock:
            found = self._load().get(image_id)
        if found is None:
            raise self._damaged(self._whole, f"there is no label of {image_id}")
        return np.array(found[0]), np.array(found[1])

    def read_labels(self, image_id: str) -> np.ndarray:
        """As `Store.read_labels`."""
        return self.read(image_id)[0]

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Completes the folder: one file is made of all pieces."""
        self.flush()
        with self._rows.lock:
            self._rows.known = None  # other processes have written, too
            self._write(self._whole, self._load())
            for kind in _PIECES:
                for path in self.folder.glob(f"{kind}.*.npz"):
                    path.unlink()
        super().write_summary(summary)

    @property
    def _whole(self) -> Path:
        return self.folder / "labels.npz"

    def _put(self, kind: str, image_id: str, row: tuple[np.uint8, np.uint16]) -> None:
        with self._rows.lock:
            self._load()[image_id] = row
            self._rows.unsaved[kind].add(image_id)
            if len(self._rows.unsaved[kind]) >= PIECE:
                self._save(kind)

    def _save(self, kind: str) -> None:
        ids = self._rows.unsaved[kind]
        if ids:
            known = self._load()
            path = self.folder / f"{kind}.{fingerprint(ids)}.npz"
            self._write(path, {image_id: known[image_id] for image_id in ids})
            ids.clear()

    def _load(self) -> dict[str, tuple[np.uint8, np.uint16]]:
        if self._rows.known is None:
            known = {}
            pieces = [sorted(self.folder.glob(f"{kind}.*.npz")) for kind in _PIECES]
            for path in (*self.folder.glob(self._whole.name), *pieces[0], *pieces[1]):
                known |= self._read(path)
            self._rows.known = known
        return self._rows.known

    def _write(self, path: Path, rows: dict[str, tuple[np.uint8, np.uint16]]) -> None:
        ids = sorted(rows)
        labels, levels = (
            np.array([rows[image_id][i] for image_id in ids], dtype)
            for i, dtype in enumerate((np.uint8, np.uint16))
        )
        with whole(path) as file:
            np.savez_compressed(file, ids=np.array(ids, np.str_), labels=labels, levels=levels)

    def _read(self, path: Path) -> dict[str, tuple[np.uint8, np.uint16]]:
        try:
            with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as stored:
                ids, labels, levels = (stored[name] for name in ("ids", "labels", "levels"))
            rows = zip(labels.astype(np.uint8), levels.astype(np.uint16), strict=True)
            return dict(zip(ids.tolist(), rows, strict=True))
        except (*_DAMAGE, OSError) as error:
            raise self._damaged(path, str(error)) from None


_DAMAGE = (ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile, zlib.error)
"""What NumPy raises where a file is none of its archives, or cut short, or altered."""


class PseudoLabeled:
    """The images of a source with the labels of a store, and their confidence.

    A record has `label` uint8 `[h,w]` and, if asked for, `confidence` float32 `[h,w]` in [0,1]; of
    whole images neither has places. An image without a label is an UnreadableError.
    """

    def __init__(self, source: Source, store: Store, *, confidence: bool = True):
        self.info, self.ids = source.info, source.ids
        self._source, self._store, self._confidence = source, store, confidence

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Record:
        record = self._source[index]  # first: where it is damaged, it has no label either
        image_id = self.ids[index]
        if self._confidence:
            labels, levels = self._store.read(image_id)
            record["confidence"] = selection.confidence(levels)
        else:
            labels = self._store.read_labels(image_id)
        if labels.shape != record["image"].shape[: labels.ndim]:
            raise UserError(
                f"The image {record.get('file', record['id'])} has changed its size since it was "
                f"labeled in {self._store.folder}. Restore it, or start in another --workdir."
            )
        record["label"] = labels
        return record


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read: {error}. Restore it, or start in another --workdir."
        ) from error
