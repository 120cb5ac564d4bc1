"""Writes data sets to disk: `python -m jaxssl.prepare streets --out DIR` makes a Cityscapes tree of
street scenes.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from jaxssl.contracts import Source, UserError
from jaxssl.data import cityscapes, streets


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m jaxssl.prepare", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser(
        "streets", help="rendered street scenes, in the layout of Cityscapes"
    )
    command.add_argument("--out", required=True, type=Path, help="a folder to make the tree in")
    command.add_argument(
        "--size", default="64,128", help="height,width of the images (default: %(default)s)"
    )
    command.add_argument(
        "--train", default=400, type=int, help="training images (default: %(default)s)"
    )
    command.add_argument(
        "--val", default=100, type=int, help="validation images (default: %(default)s)"
    )
    command.add_argument("--seed", default=0, type=int, help="of the scenes (default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        height, width = (int(side) for side in args.size.split(","))
        for split, count in (("train", args.train), ("val", args.val)):
            source = streets.Streets(split, count, (height, width), args.seed)
            write_cityscapes(source, args.out, split)
            print(f"{split}: {count} images and labels in {args.out}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def write_cityscapes(source: Source, root: Path, split: str) -> None:
    """Writes a source with Cityscapes' classes as a Cityscapes tree; goes on where it was
    interrupted.

    Args:
      source: with labels (train ids).
      root: holds `leftImg8bit` and `gtFine` afterwards.
      split: "train", "val" or "test".

    Raises:
      UserError: a file is there with other content; it stays as it is.
    """
    label_ids = np.zeros(256, np.uint8)  # everything that is not evaluated becomes 0, "unlabeled"
    label_ids[: len(cityscapes.LABEL_IDS)] = cityscapes.LABEL_IDS
    for i in range(len(source)):
        record = source[i]
        if "label" not in record:
            raise UserError(f"{record['id']} has no label to write. Open the source with labels.")
        city = record["id"].split("_")[0]
        image = root / "leftImg8bit" / split / city / f"{record['id']}_leftImg8bit.png"
        label = root / "gtFine" / split / city / f"{record['id']}_gtFine_labelIds.png"
        _write_png(image, record["image"])
        _write_png(label, label_ids[record["label"]])


def _write_png(path: Path, array: np.ndarray) -> None:
    if path.exists():
        if not np.array_equal(np.asarray(Image.open(path)), array):
            raise UserError(f"{path} holds another picture. Choose an empty folder for --out.")
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    Image.fromarray(array).save(unfinished, format="png")
    unfinished.replace(path)


if __name__ == "__main__":
    sys.exit(main())
