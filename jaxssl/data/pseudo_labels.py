"""Pseudo-labels on disk: for each image a label and its confidence, as PNG files to look at.

  labels/ID.png       class of each pixel as a palette PNG, 255 where no label is kept
  confidence/ID.png   16 bits, the brighter the surer: levels of confidence (see `selection`)
  selection.json      by class, from which level on labels are kept, and how many of those
  summary.json        what came of it; it is written last, so the rest is complete

A file gets its name when it is whole, so what a process that was killed has written holds.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jaxssl import selection
from jaxssl.contracts import DataInfo, Record, Selection, Source, UnreadableError, UserError
from jaxssl.data.files import open_image, whole, write_json


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
        """Where a run has what a phase of that name learns from."""
        return cls(workdir / "pseudo_labels" / phase, info)

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

    def write_selection(self, chosen: Selection, predicted: np.ndarray, prior: np.ndarray) -> None:
        """Writes what is kept, and from which counts `[C]` that was decided: labels are dropped
        only after it, so these could not be counted again.
        """
        values = {**chosen._asdict(), "predicted": predicted, "prior": prior}
        path = self.folder / "selection.json"
        write_json(path, {name: x.tolist() for name, x in values.items()})

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


class PseudoLabeled:
    """The images of a source with the labels of a store, and their confidence.

    A record has `label` uint8 `[h,w]` and, if asked for, `confidence` float32 `[h,w]` in [0,1]. An
    image without a label is an UnreadableError.
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
        if labels.shape != record["image"].shape[:2]:
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
