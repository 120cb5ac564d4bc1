r"""Writes a folder of labeled, unlabeled and validation images: scanned digits over photographs.

  python benchmarks/digits_tree.py --out=/tmp/digits
  python -m jaxssl.main --config=configs/mkd_folder.py:small --config.data.root=/tmp/digits \
      --config.augment.flip=False --workdir=W

Everything comes with scikit-learn: 1797 handwritten digits of 8x8 gray values, pasted in random
sizes, turns and light colors over darkened parts of its two photographs. The label is a digit's
ink; classes are the background and the ten digits. Digits and parts of the photographs in the
validation images occur in no training image. Nothing in the library was made for these pictures.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images

CLASSES = ("background", *(f"digit {i}" for i in range(10)))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True, type=Path, help="a new folder")
    parser.add_argument("--labeled", type=int, default=24)
    parser.add_argument("--unlabeled", type=int, default=376)
    parser.add_argument("--val", type=int, default=100)
    parser.add_argument("--size", type=int, default=96, help="pixels along each side")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write_tree(args.out, args.labeled, args.unlabeled, args.val, args.size, args.seed)


def write_tree(
    out: Path, labeled: int, unlabeled: int, val: int, size: int = 96, seed: int = 0
) -> None:
    """Writes the folder; it must not exist."""
    out.mkdir(parents=True)
    (out / "classes.txt").write_text("".join(f"{name}\n" for name in CLASSES))
    folders = [("images", "labels"), ("unlabeled", None), ("val/images", "val/labels")]
    for part, ((images, labels), count) in enumerate(
        zip(folders, (labeled, unlabeled, val), strict=True)
    ):
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
    digits, _ = _sources()
    place = np.arange(len(digits.images)) % 4 == 0
    mine = np.flatnonzero(place == validation)
    image = _background(rng, size, validation)
    label = np.zeros((size, size), np.uint8)
    for _ in range(rng.integers(2, 5)):
        chosen = rng.choice(mine)
        ink = _turned(rng, digits.images[chosen] / 16, size)
        top, left = rng.integers(0, size - ink.shape[0] // 2, 2)
        part = np.s_[top : top + ink.shape[0], left : left + ink.shape[1]]
        ink = ink[: size - top, : size - left]
        color = rng.uniform(160, 255, 3)
        image[part] += ink[..., None] * (color - image[part])
        label[part] = np.where(ink > 0.5, digits.target[chosen] + 1, label[part])
    image += rng.normal(0, rng.uniform(2, 12), image.shape)
    return image.clip(0, 255).astype(np.uint8), label


@functools.cache
def _sources() -> tuple[Any, list[np.ndarray]]:
    """The digits and the photographs."""
    return load_digits(), load_sample_images().images


def _background(rng: np.random.Generator, size: int, validation: bool) -> np.ndarray:
    """Part of a photograph: the left two thirds for training, the rest for validation."""
    photograph = _sources()[1][rng.integers(2)]
    third = photograph.shape[1] // 3
    photograph = photograph[:, 2 * third :] if validation else photograph[:, : 2 * third]
    side = rng.integers(size // 2, min(2 * size, *photograph.shape[:2]))
    top = rng.integers(photograph.shape[0] - side)
    left = rng.integers(photograph.shape[1] - side)
    part = Image.fromarray(photograph[top : top + side, left : left + side])
    return 0.6 * np.asarray(part.resize((size, size), Image.Resampling.BILINEAR), np.float64)


def _turned(rng: np.random.Generator, digit: np.ndarray, size: int) -> np.ndarray:
    """A digit's ink in [0,1], enlarged and turned."""
    side = int(rng.integers(size // 3, size // 2))
    picture = Image.fromarray((255 * digit).astype(np.uint8))
    picture = picture.resize((side, side), Image.Resampling.BICUBIC)
    turned = picture.rotate(rng.uniform(-15, 15), Image.Resampling.BILINEAR)
    return (np.asarray(turned) / 128).clip(0, 1)  # as of a thicker pen


if __name__ == "__main__":
    main()
