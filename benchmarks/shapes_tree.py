r"""Writes a folder of labeled, unlabeled and validation images: plane shapes over photographs.

  python benchmarks/shapes_tree.py --out=/tmp/shapes
  python -m jaxssl.main --config=configs/mkd_folder.py:small --config.data.root=/tmp/shapes \
      --config.data.split=40 --workdir=W
  python benchmarks/streets_methods.py --root=/tmp/shapes --config.data.split=40

Disks, squares, triangles, crosses and rings of any size, turn, color and grain lie over parts of
scikit-learn's two photographs, some of them over each other. Colors say nothing of the class, and
all shapes are equally frequent: the opposite of streets. Parts of the photographs in the validation
images occur in no training image. Nothing in the library was made for these pictures.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from sklearn.datasets import load_sample_images

CLASSES = ("background", "disk", "square", "triangle", "cross", "ring")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True, type=Path, help="a new folder")
    parser.add_argument("--labeled", type=int, default=400)
    parser.add_argument("--unlabeled", type=int, default=0)
    parser.add_argument("--val", type=int, default=100)
    parser.add_argument("--size", type=int, default=64, help="pixels along each side")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write_tree(args.out, args.labeled, args.unlabeled, args.val, args.size, args.seed)


def write_tree(
    out: Path, labeled: int, unlabeled: int, val: int, size: int = 64, seed: int = 0
) -> None:
    """Writes the folder; it must not exist."""
    out.mkdir(parents=True)
    (out / "classes.txt").write_text("".join(f"{name}\n" for name in CLASSES))
    folders = [("images", "labels"), ("unlabeled", None), ("val/images", "val/labels")]
    for part, ((images, labels), count) in enumerate(
        zip(folders, (labeled, unlabeled, val), strict=True)
    ):
        if not count:
            continue
        (out / images).mkdir(parents=True)
        if labels:
            (out / labels).mkdir(parents=True)
        for i in range(count):
            rng = np.random.default_rng([seed, part, i])
            image, label = compose(rng, size, validation=part == 2)
            Image.fromarray(image).save(out / images / f"{i:04d}.png")
            if labels:
                Image.fromarray(label).save(out / labels / f"{i:04d}.png")


def compose(
    rng: np.random.Generator, size: int, *, validation: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Draws one picture: uint8 `[size,size,3]` and label `[size,size]`."""
    image = rng.uniform(0.5, 1) * _background(rng, size, validation)
    label = np.zeros((size, size), np.uint8)
    for _ in range(rng.integers(2, 5)):
        chosen = rng.integers(1, len(CLASSES))
        ink = _turned(rng, CLASSES[chosen], rng.integers(size // 4, size // 2))
        top, left = (rng.integers(size - side // 2) for side in ink.shape)
        part = np.s_[top : top + ink.shape[0], left : left + ink.shape[1]]
        ink = ink[: size - top, : size - left]
        color = rng.uniform(0, 255, 3) + rng.normal(0, rng.uniform(0, 25), (*ink.shape, 1))
        image[part] += ink[..., None] * (color - image[part])
        label[part] = np.where(ink > 0.5, chosen, label[part])
    image += rng.normal(0, rng.uniform(2, 10), image.shape)
    return image.clip(0, 255).astype(np.uint8), label


@functools.cache
def _photographs() -> list[np.ndarray]:
    return load_sample_images().images


def _background(rng: np.random.Generator, size: int, validation: bool) -> np.ndarray:
    """Part of a photograph: the left two thirds for training, the rest for validation."""
    photograph = _photographs()[rng.integers(2)]
    third = photograph.shape[1] // 3
    photograph = photograph[:, 2 * third :] if validation else photograph[:, : 2 * third]
    side = rng.integers(size // 2, min(2 * size, *photograph.shape[:2]))
    top = rng.integers(photograph.shape[0] - side)
    left = rng.integers(photograph.shape[1] - side)
    part = Image.fromarray(photograph[top : top + side, left : left + side])
    return np.asarray(part.resize((size, size), Image.Resampling.BILINEAR), np.float64)


def _turned(rng: np.random.Generator, shape: str, side: int) -> np.ndarray:
    """What a shape covers, in [0,1], turned and stretched."""
    large = 4 * side  # drawn large and made smaller, for smooth edges
    picture = Image.new("L", (large, large))
    draw = ImageDraw.Draw(picture)
    low, middle, high = 0.12 * large, 0.5 * large, 0.88 * large
    if shape in ("disk", "ring"):
        draw.ellipse((low, low, high, high), fill=255)
    if shape == "ring":
        draw.ellipse((0.32 * large, 0.32 * large, 0.68 * large, 0.68 * large), fill=0)
    if shape == "square":
        draw.rectangle((0.18 * large, 0.18 * large, 0.82 * large, 0.82 * large), fill=255)
    if shape == "triangle":
        draw.polygon(((middle, low), (high, high), (low, high)), fill=255)
    if shape == "cross":
        draw.rectangle((low, 0.37 * large, high, 0.63 * large), fill=255)
        draw.rectangle((0.37 * large, low, 0.63 * large, high), fill=255)
    turned = picture.rotate(rng.uniform(-20, 20), Image.Resampling.BILINEAR)
    height = int(side * rng.uniform(0.8, 1.25))
    return np.asarray(turned.resize((side, height), Image.Resampling.BOX)) / 255


if __name__ == "__main__":
    main()
