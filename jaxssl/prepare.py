"""Writes data sets to disk.

`python -m jaxssl.prepare streets --out=DIR` makes a Cityscapes tree of street scenes.
`python -m jaxssl.prepare pack --config=FILE --out=DIR` packs the data of a config into a few large
files, for `--config.data.name=tfds --config.data.root=DIR`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from jaxssl import config as configs
from jaxssl.contracts import Source, UserError
from jaxssl.data import cityscapes, streets
from jaxssl.logs import create_console


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        prog="python -m jaxssl.prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    _add_streets(commands)
    _add_pack(commands)
    args, rest = parser.parse_known_args(argv)
    try:
        args.run(args, rest)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {args.out} cannot be written: {error}", file=sys.stderr)
        return 2
    return 0


def _add_streets(commands: argparse._SubParsersAction) -> None:
    text = "rendered street scenes, in the layout of Cityscapes"
    command = commands.add_parser("streets", allow_abbrev=False, help=text, description=text)
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
    command.set_defaults(run=_streets)


def _add_pack(commands: argparse._SubParsersAction) -> None:
    text = "any data set, in a few large files"
    command = commands.add_parser(
        "pack",
        allow_abbrev=False,
        help=text,
        description=text,
        epilog="--config=FILE:VARIANT and --config.KEY=VALUE say which data, as for training. The "
        "same command goes on with a packing that was interrupted.",
    )
    command.add_argument("--out", required=True, type=Path, help="a new folder for the set")
    command.add_argument("--size", help="height,width to resize all images to")
    command.add_argument(
        "--short_side", type=int, help="pixels to shrink the short side of larger images to"
    )
    command.set_defaults(run=_pack)


def _streets(args: argparse.Namespace, rest: Sequence[str]) -> None:
    if rest:
        raise UserError(f"Unexpected argument {rest[0]!r}. See --help.")
    for split, count in (("train", args.train), ("val", args.val)):
        source = streets.Streets(split, count, _size(args.size), args.seed)
        write_cityscapes(source, args.out, split)
        print(f"{split}: {count} images and labels in {args.out}")


def _pack(args: argparse.Namespace, rest: Sequence[str]) -> None:
    from jaxssl.data import packing  # TensorFlow Datasets takes a second to import

    size = packing.Size(_size(args.size) if args.size else None, args.short_side)
    parts = packing.parts_of(configs.from_arguments(rest).data)
    total = sum(map(len, parts.values()))
    with create_console() as console:
        console.phase("packed", total, unit="images")
        packing.pack(parts, args.out, size, console.step)
        for name, part in parts.items():
            labels = len(part) - len(part.unlabeled)
            console.message(f"{name}: {len(part)} images, {labels} labels")
        console.message(
            f"Train with --config.data.name=tfds --config.data.root={args.out} and the same config."
        )


def _size(text: str) -> tuple[int, int]:
    try:
        height, width = (int(side) for side in text.split(","))
    except ValueError as error:
        raise UserError(f"--size={text} is no size. Give HEIGHT,WIDTH: 512,1024.") from error
    return height, width


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
