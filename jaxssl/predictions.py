"""Images of the user's, and the files that predictions for them are written to."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from jaxssl.contracts import DataInfo, UnreadableError, UserError
from jaxssl.data import cityscapes, folder
from jaxssl.data.files import whole, write_json
from jaxssl.data.layouts import SUFFIXES

_SETTINGS = "predictions.json"


class Prediction(NamedTuple):
    """What a network says of an image.

    Attributes:
      labels: uint8 `[h,w]`.
      confidence: uint16 `[h,w]`, the largest probability, 65535 being 1; where asked for.
      probabilities: float16 `[h,w,C]`; where asked for.
      levels: uint16 `[h,w]`, levels of confidence (see `selection`); where asked for.
      tiles: pieces that the image was cut into.
    """

    labels: np.ndarray
    confidence: np.ndarray | None = None
    probabilities: np.ndarray | None = None
    levels: np.ndarray | None = None
    tiles: int = 1


def read_image(path: Path) -> np.ndarray:
    """Reads an image as uint8 `[h,w,3]`, as training on a folder does.

    Raises:
      UnreadableError: it cannot be read, whatever the reason.
    """
    try:
        return folder.read_image(path)
    except (UserError, Image.DecompressionBombError) as error:
        raise UnreadableError(str(error)) from error


def find_images(root: Path, *, leave_out: Path) -> list[Path]:
    """Paths of the images in a folder and its subfolders, relative to it and sorted.

    Args:
      root: folder to search, but for what is hidden.
      leave_out: a folder whose files do not count.
    """
    found = []
    for parent, folders, files in os.walk(root, followlinks=True):
        folders[:] = [
            name
            for name in folders
            if not name.startswith(".") and Path(parent, name).resolve() != leave_out.resolve()
        ]
        paths = [Path(parent, name) for name in files if not name.startswith(".")]
        found += [path.relative_to(root) for path in paths if path.suffix.lower() in SUFFIXES]
    return sorted(found)


@dataclasses.dataclass(frozen=True)
class Outputs:
    """The files that an image's prediction is written to.

    Attributes:
      folder: of all outputs.
      info: classes and palette.
      overlay: whether there are overlays, of pixels' labels.
      probabilities: whether there are probabilities and confidences.
      label_ids: whether there are label ids of Cityscapes.
    """

    folder: Path
    info: DataInfo
    overlay: bool = True
    probabilities: bool = False
    label_ids: bool = False

    def __post_init__(self) -> None:
        flags = {"--nooverlay": not self.overlay, "--label_ids": self.label_ids}
        if self.info.task == "classification" and any(flags.values()):
            given = next(flag for flag, is_given in flags.items() if is_given)
            raise UserError(
                f"{given} is for labels of pixels, and this run classifies whole images. Leave it "
                "out: predictions.csv has what there is to say."
            )
        if self.label_ids and self.info.classes != cityscapes.INFO.classes:
            raise UserError(
                "--label_ids are those of Cityscapes, but this run has other classes: "
                f"{', '.join(self.info.classes[:5])}, ..."
            )

    def check_folder(self, settings: Mapping[str, Any]) -> None:
        """UserError unless the output folder is a new one, or what it holds was predicted likewise;
        nothing is written.
        """
        try:
            stored = json.loads((self.folder / _SETTINGS).read_text())
        except (OSError, ValueError):
            stored = None
        if stored is None and (self.folder.is_file() or any(self.folder.glob("*"))):
            raise UserError(
                f"{self.folder} has files that this command did not make; they stay as they are. "
                "Choose a new folder for --output."
            )
        if stored not in (None, settings):
            raise UserError(
                f"{self.folder} belongs to another input, network or mode: {json.dumps(stored)}, "
                f"and this is {json.dumps(settings)}. Choose a new folder for --output."
            )

    def claim(self, settings: Mapping[str, Any]) -> None:
        """Makes the output folder, once `check_folder` has nothing against it."""
        self.check_folder(settings)
        write_json(self.folder / _SETTINGS, settings)
        if self.info.task == "segmentation":
            self.write_legend()

    def paths(self, name: Path) -> dict[str, Path]:
        """Kind -> file, for the image of that relative path; none where it has one class alone."""
        if self.info.task == "classification":
            return {}
        paths = {"labels": self.folder / "labels" / name.with_suffix(".png")}
        if self.overlay:
            paths["overlays"] = self.folder / "overlays" / name.with_suffix(".jpg")
        if self.probabilities:
            paths["confidence"] = self.folder / "confidence" / name.with_suffix(".png")
            paths["probabilities"] = self.folder / "probabilities" / name.with_suffix(".npz")
        if self.label_ids:
            # The server matches <city>_<sequence>_<frame>*.png.
            stem = name.stem.removesuffix("_leftImg8bit")
            paths["label_ids"] = self.folder / "label_ids" / f"{stem}_labelIds.png"
        return paths

    def check(self, names: Sequence[Path]) -> None:
        """UserError where two images would be written to one file."""
        owners: dict[str, Path] = {}
        for name in names:
            for path in self.paths(name).values():
                # Some file systems take upper and lower case for the same.
                other = owners.setdefault(str(path).casefold(), name)
                if other != name:
                    raise UserError(
                        f"{other} and {name} would both be written to {path}. Rename one, or "
                        "predict them into different folders."
                    )

    def due(self, name: Path, source: Path, *, overwrite: bool = False) -> dict[str, Path]:
        """Those of an image's `paths` that do not exist, or are older than `source`, its file; all
        of them if `overwrite`.
        """
        paths = self.paths(name).items()
        return {kind: path for kind, path in paths if overwrite or outdated(path, source)}

    def write(self, paths: Mapping[str, Path], image: np.ndarray, found: Prediction) -> None:
        """Writes these files of an image, each whole or not at all."""
        for kind, path in paths.items():
            with whole(path) as file:
                self._save(kind, image, found, file)

    def write_legend(self) -> None:
        """Writes `legend.png`: the classes' colors, numbers and names."""
        font, line = ImageFont.load_default(16), 26
        names = [f"{i}  {name}" for i, name in enumerate(self.info.classes)]
        width = 56 + math.ceil(max(font.getlength(name) for name in names))
        legend = Image.new("RGB", (width, line * len(names) + 12), "white")
        pen = ImageDraw.Draw(legend)
        for i, (name, color) in enumerate(zip(names, self.info.palette, strict=True)):
            y = 6 + line * i
            pen.rectangle((8, y + 4, 34, y + line - 4), fill=color, outline="gray")
            pen.text((44, y + line // 2), name, fill="black", font=font, anchor="lm")
        with whole(self.folder / "legend.png") as file:
            legend.save(file, "PNG")

    def _save(self, kind: str, image: np.ndarray, found: Prediction, file: IO[bytes]) -> None:
        if kind == "labels":
            # Fewer bits would do for few classes, but not every reader unpacks them.
            self._colored(found.labels).save(file, "PNG", bits=8)
        elif kind == "overlays":
            colors = self._colored(found.labels).convert("RGB")
            Image.blend(Image.fromarray(image), colors, 0.5).save(file, "JPEG", quality=90)
        elif kind == "confidence":
            Image.fromarray(np.asarray(found.confidence)).save(file, "PNG")
        elif kind == "probabilities":
            np.savez_compressed(file, probabilities=np.asarray(found.probabilities))
        else:
            Image.fromarray(cityscapes.LABEL_IDS[found.labels]).save(file, "PNG")

    def _colored(self, labels: np.ndarray) -> Image.Image:
        height, width = labels.shape
        picture = Image.frombytes("P", (width, height), labels.tobytes())
        picture.putpalette(np.array(self.info.palette, np.uint8).tobytes())
        return picture


def outdated(path: Path, source: Path) -> bool:
    """Whether a file is missing, or older than the one that it is made from."""
    if not path.exists():
        return True
    # An image may have gone since it was listed, or be a link to nowhere: it is named when read.
    return source.exists() and path.stat().st_mtime_ns < source.stat().st_mtime_ns
