"""Files, opened and written in one way everywhere, and named in one way where some are wrong."""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image

from jaxssl.contracts import IGNORE_LABEL, Record, UnreadableError, UserError


def listed(messages: Sequence[object], most: int = 10) -> str:
    """A line for each message, each begun by a line break, and how many more there are."""
    more = [f"and {len(messages) - most} more"] if len(messages) > most else []
    return "".join(f"\n  {message}" for message in [*messages[:most], *more])


def stamp(path: Path) -> tuple[Path, int, int]:
    """A path with the time of its last change and its size, 0 where there is nothing: what was read
    from a file holds as long as its stamp does.
    """
    try:
        status = path.stat()
    except OSError:  # a link to nothing; reading it says so
        return path, 0, 0
    return path, status.st_mtime_ns, status.st_size


def open_image(path: str | Path, content: bytes | None = None) -> Image.Image:
    """Reads and decodes a file, in whatever mode its pixels are.

    Args:
      path: of the file.
      content: the file's bytes, where it stands in an archive; `path` then only names it.

    Raises:
      UnreadableError: the file is missing, truncated, or not an image.
      UserError: it is larger than Pillow decodes, 179 megapixels.
    """
    with opened(path, content) as image:
        image.load()
        return image


def read_record(
    image_id: str,
    path: Path,
    label_path: Path | None,
    read_label: Callable[[Path], np.ndarray],
) -> Record:
    """Reads an image, 8-bit RGB or grayscale, and its label if there is a path of one.

    Raises:
      UnreadableError: a file is missing or damaged.
      UserError: the image has another mode, or the label another size; and what `read_label`
        raises, which gives uint8 `[h,w]`.
    """
    image = open_image(path)
    if image.mode not in ("RGB", "L"):
        raise UserError(
            f"The image {path} has mode {image.mode}. Convert it to 8-bit RGB or grayscale, "
            "without transparency."
        )
    record = Record(image=np.asarray(image.convert("RGB")), id=image_id, file=str(path))
    if label_path is None:
        return record
    label = record["label"] = read_label(label_path)
    if label.shape != record["image"].shape[:2]:
        raise UserError(
            f"The label {label_path} is {label.shape[1]}x{label.shape[0]} pixels, its image "
            f"{path} is {image.width}x{image.height}. Give both the same size."
        )
    return record


def read_ids(path: Path) -> np.ndarray:
    """Reads a label whose pixels are numbers, uint8 `[h,w]`.

    Raises:
      UnreadableError: the file is missing or damaged.
      UserError: it holds colors, or more than 8 bits.
    """
    image = open_image(path)
    if image.mode not in ("L", "P"):
        raise UserError(
            f"The label {path} has mode {image.mode}. Give a PNG with a palette or with one 8-bit "
            "channel that holds class ids, not colors."
        )
    return np.asarray(image)


def check_ids(ids: np.ndarray, num_classes: int, path: Path) -> None:
    """UserError where the numbers of a label are none of its data set's."""
    wrong = ids[(ids >= num_classes) & (ids != IGNORE_LABEL)]
    if wrong.size:
        raise UserError(
            f"The label {path} holds the class id {wrong[0]}. Known are 0 to {num_classes - 1}, "
            f"and {IGNORE_LABEL} for pixels to ignore."
        )


@contextlib.contextmanager
def opened(path: str | Path, content: bytes | None = None) -> Iterator[Image.Image]:
    """As `open_image`, but nothing is decoded unless the block does."""
    try:
        with Image.open(path if content is None else io.BytesIO(content)) as image:
            yield image
    except Image.DecompressionBombError as error:
        raise UserError(
            f"The file {path} is larger than images that are decoded at once, "
            f"{round(2e-6 * (Image.MAX_IMAGE_PIXELS or 0))} megapixels. Cut it into tiles, of "
            "2048x2048 pixels say, and a mask of it likewise."
        ) from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise UnreadableError(
            f"The file {path} cannot be read as an image: {error}. Unpack or copy it again; if "
            "other programs show it, convert it to 8-bit RGB."
        ) from error


@contextlib.contextmanager
def whole(path: Path) -> Iterator[IO[bytes]]:
    """A file to write, which gets its name when it is complete; its folder is made.

    Raises:
      UserError: it cannot be written.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with part.open("wb") as file:
                yield file
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {error}. Free space, or choose another folder."
        ) from error


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Writes what JSON can hold, which a number that is not finite is not, as `whole` does."""
    with whole(path) as file:
        file.write((json.dumps(values, indent=1, allow_nan=False) + "\n").encode())
