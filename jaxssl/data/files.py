"""Image files, opened in one way everywhere."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

from jaxssl.contracts import UnreadableError


def open_image(path: str | Path, content: bytes | None = None) -> Image.Image:
    """Reads and decodes a file, in whatever mode its pixels are.

    Args:
      path: of the file.
      content: the file's bytes, where it stands in an archive; `path` then only names it.

    Raises:
      UnreadableError: the file is missing, truncated, or not an image.
    """
    try:
        with Image.open(path if content is None else io.BytesIO(content)) as image:
            image.load()
            return image
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise UnreadableError(
            f"The file {path} cannot be read as an image: {error}. Unpack or copy it again; if "
            "other programs show it, convert it to 8-bit RGB."
        ) from error
