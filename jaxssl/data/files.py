"""Image files, opened in one way everywhere."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from jaxssl.contracts import UnreadableError


def open_image(path: Path) -> Image.Image:
    """Reads and decodes a file, in whatever mode its pixels are.

    Raises:
      UnreadableError: the file is missing, truncated, or not an image.
    """
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise UnreadableError(
            f"The file {path} cannot be read as an image: {error}. Unpack or copy it again."
        ) from error
