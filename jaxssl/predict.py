"""Labels images with a network that was trained.

`python -m jaxssl.predict --workdir=W --input=I --output=O` writes to the folder O, under the path
that each image has in I and at its original size:

  labels/NAME.png         class of each pixel, as a palette PNG: its values are the classes' numbers
  overlays/NAME.jpg       the image blended with the colors of legend.png
  confidence/NAME.png     with --probabilities: the largest probability, 16 bits: 65535 is 1
  probabilities/NAME.npz  with --probabilities: "probabilities", float16 [h,w,C]
  label_ids/NAME.png      with --label_ids: what the server of Cityscapes takes, without subfolders

Images are read as training on a folder reads them: as viewers show them, turned upright by their
orientation tag (and so are the outputs), without transparency. One that cannot be read is named,
and the rest goes on. Nothing outside O is written to, and O must be empty or made by the same
command, which then goes on where it was; an image that is newer than its outputs is labeled again.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import itertools
import math
import queue
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxssl import logs, startup
from jaxssl.contracts import Network, UnreadableError, UserError, Variables
from jaxssl.inference import Predict, Presentation, make_predict
from jaxssl.predictions import Outputs, Prediction, find_images, read_image
from jaxssl.trained import Trained, open_trained

MAX_PIXELS, MAX_LOGITS = 2**22, 2**26
"""Of a piece that is predicted at once: larger images are cut into overlapping tiles."""

_THREADS = 4


class Predictor:
    """Labels images of any size, one at a time on each device; several threads may call it.

    Sizes are rounded up to a multiple of `bucket`, and a program is compiled for each that occurs.
    Logits stay on the device. Where there would be too many, the image is cut into tiles of one
    size, and each pixel is taken from the tile in whose middle it is, or nearest to it (Ronneberger
    et al. 2015, overlap-tile).
    """

    def __init__(
        self,
        net: Network,
        variables: Variables,
        how: Presentation,
        num_classes: int,
        *,
        bucket: int = 32,
        probabilities: bool = False,
        devices: Sequence[Any] | None = None,
        max_pixels: int = MAX_PIXELS,
    ):
        """Copies the network to the devices.

        Args:
          net: architecture.
          variables: its arrays.
          how: an image, or a tile of one, is shown to it.
          num_classes: C.
          bucket: what the sides of images are padded to a multiple of.
          probabilities: whether to give them, and the confidence.
          devices: None takes all of this process.
          max_pixels: of a piece; fewer where there are many classes.
        """
        self._bucket = bucket
        self._max_pixels = min(max_pixels, MAX_LOGITS // num_classes)
        self._classify = jax.jit(
            functools.partial(_classify, make_predict(net, how), probabilities)
        )
        self._free: queue.Queue[tuple[Any, Variables]] = queue.Queue()
        for device in devices or jax.local_devices():
            self._free.put((device, jax.device_put(variables, device)))

    def __call__(self, image: np.ndarray) -> Prediction:
        """Labels an image, uint8 `[h,w,3]`."""
        tiles = tiling(image.shape[:2], self._max_pixels)
        found: dict[str, np.ndarray] = {}
        for tile in tiles:
            for name, piece in self._piece(image[tile.seen]).items():
                if name not in found:
                    found[name] = np.empty((*image.shape[:2], *piece.shape[2:]), piece.dtype)
                found[name][tile.kept] = piece[tile.inner]
        confidence, probabilities = found.get("confidence"), found.get("probabilities")
        return Prediction(found["labels"], confidence, probabilities, len(tiles))

    def _piece(self, image: np.ndarray) -> dict[str, np.ndarray]:
        height, width = image.shape[:2]
        fill = [(0, -side % self._bucket) for side in (height, width)]
        valid = np.pad(np.ones((height, width), bool), fill)
        padded = np.pad(image, (*fill, (0, 0)))
        device, variables = self._free.get()
        try:
            inputs = jax.device_put((padded, valid), device)
            found = jax.device_get(self._classify(variables, *inputs))
        finally:
            self._free.put((device, variables))
        return {name: array[:height, :width] for name, array in found.items()}


def _classify(
    predict: Predict, probabilities: bool, variables: Variables, image: jax.Array, valid: jax.Array
) -> dict[str, jax.Array]:
    logits = predict(variables, image[None], valid[None])[0]
    labels = logits.argmax(-1).astype(jnp.uint8)
    if not probabilities:
        return {"labels": labels}
    shares = jax.nn.softmax(logits)
    confidence = jnp.round(65535 * shares.max(-1)).astype(jnp.uint16)
    return {
        "labels": labels,
        "confidence": confidence,
        "probabilities": shares.astype(jnp.float16),
    }


class Tile(NamedTuple):
    """A part of an image: of the prediction for `image[seen]`, `[inner]` becomes `result[kept]`."""

    seen: tuple[slice, slice]
    kept: tuple[slice, slice]
    inner: tuple[slice, slice]


def tiling(size: tuple[int, ...], max_pixels: int) -> list[Tile]:
    """Covers an image with equal tiles that overlap by a quarter or more.

    Args:
      size: (height, width) of the image.
      max_pixels: of a tile.
    """
    height, width = size
    tile_height = min(height, max(math.isqrt(max_pixels), max_pixels // width))
    tile_width = min(width, max_pixels // tile_height)
    rows, columns = _spans(height, tile_height), _spans(width, tile_width)
    pairs = itertools.product(rows, columns)
    return [Tile(*zip(row, column, strict=True)) for row, column in pairs]


class _Span(NamedTuple):
    """A `Tile` along one axis."""

    seen: slice
    kept: slice
    inner: slice


def _spans(size: int, tile: int) -> list[_Span]:
    if size <= tile:
        return [_Span(slice(0, size), slice(0, size), slice(0, size))]
    overlap = tile // 4
    count = -(-(size - overlap) // (tile - overlap))
    starts = [i * (size - tile) // (count - 1) for i in range(count)]
    middles = [(left + tile + right) // 2 for left, right in itertools.pairwise(starts)]
    kept = itertools.pairwise([0, *middles, size])
    return [
        _Span(slice(start, start + tile), slice(begin, end), slice(begin - start, end - start))
        for start, (begin, end) in zip(starts, kept, strict=True)
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code: 1 where an image failed, 2 for a user's mistake."""
    args = _parser().parse_args(argv)
    shown = {"mode": args.mode, "window": args.window, "stride": args.stride, "flip": args.flip}
    overrides = {f"eval.{key}": value for key, value in shown.items() if value}
    try:
        run = open_trained(args.workdir, overrides)
        outputs = Outputs(
            args.output.expanduser(), run.info, args.overlay, args.probabilities, args.label_ids
        )
        return predict(
            run, args.input, outputs, network=args.network, step=args.step, overwrite=args.overwrite
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Stopped. The same command goes on from here.", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jaxssl.predict",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--workdir", required=True, type=Path, help="of a training run")
    add("--input", required=True, type=Path, help="an image, or a folder of images")
    add("--output", required=True, type=Path, help="a new folder, or one to go on with")
    add("--network", help="one of the run's networks (default: the one that it reports)")
    add("--step", default="best", help="best, last, or a number (default: best)")
    modes = ("whole", "slide", "half_res")
    add("--mode", choices=modes, help="how images are shown (default: as the run was evaluated)")
    add("--window", help="height,width of the windows of --mode=slide (default: the crop)")
    add("--stride", help="height,width from one window to the next (default: 2/3 of a window)")
    add("--flip", action="store_true", help="average with the mirror image")
    add("--nooverlay", dest="overlay", action="store_false", help="write no overlays")
    add("--probabilities", action="store_true", help="write probabilities and confidence, too")
    add("--label_ids", action="store_true", help="write label ids of Cityscapes, too")
    add("--overwrite", action="store_true", help="predict all images again")
    return parser


def predict(
    run: Trained,
    images: Path,
    outputs: Outputs,
    *,
    network: str | None = None,
    step: str | int = "best",
    overwrite: bool = False,
) -> int:
    """Labels images and says on the console how that went.

    Args:
      run: whose network to take, and how to show images to it.
      images: a file or a folder.
      outputs: what to write; images that have everything, and did not change since, are left out.
      network: None takes the headline.
      step: "best", "last" or a number.
      overwrite: predicts all images.

    Returns:
      The exit code: 1 where an image could not be read, else 0.

    Raises:
      UserError: no images, no such network or step, or the output folder is in other use.
    """
    if run.info.task != "segmentation":
        raise UserError(f"{run.workdir} classifies whole images: there are no pixels to label.")
    folder, names = _inputs(images.expanduser(), outputs)
    network, step = network or run.headline, run.step(step)
    net, how = run.net(network), Presentation.of(run.config.eval, run.config.crop)
    if how.mode == "center_crop":  # of interest to scores alone: the whole image is shown
        how = dataclasses.replace(how, mode="whole")
    # Outputs are named by an image's path in its folder, which may be given by one image as well.
    source = {"workdir": str(run.workdir), "input": str(folder.resolve())}
    outputs.claim({**source, "network": network, "step": step, "mode": str(how)})
    startup.keep_compiled(run.config)
    predictor = Predictor(
        net,
        run.variables(network, step),
        how,
        run.info.num_classes,
        bucket=run.config.eval.bucket,
        probabilities=outputs.probabilities,
    )
    due = {name: outputs.due(name, folder / name, overwrite=overwrite) for name in names}
    todo = [name for name in names if due[name]]
    with logs.create_console() as console:
        before = f", {len(names) - len(todo)} of them labeled before" if names != todo else ""
        console.message(
            f"Network {network} of {run.workdir}, step {step}; images are shown: {how}. "
            f"{len(names)} in {folder}{before}."
        )

        def label(name: Path) -> int:
            image = read_image(folder / name)
            found = predictor(image)
            outputs.write(due[name], image, found)
            return found.tiles

        failed, tiled = _label_all(label, todo, console)
        console.close()  # the bar stays above the result
        console.message(_result(len(todo), failed, tiled, outputs))
    return 1 if failed else 0


def _label_all(
    label: Callable[[Path], int], names: Sequence[Path], console: logs.Console
) -> tuple[int, int]:
    """Counts of images that could not be read, and of those that were cut into tiles."""
    failed = tiled = 0
    console.phase("predict", len(names), unit="images")
    # Reading and writing take longer than a small network; the devices take one image at a time.
    pool = concurrent.futures.ThreadPoolExecutor(_THREADS + jax.local_device_count())
    try:
        work = [pool.submit(label, name) for name in names]
        for done, future in enumerate(concurrent.futures.as_completed(work), 1):
            try:
                tiled += future.result() > 1
            except UnreadableError as error:
                failed += 1
                console.message(f"failed: {error}")
            console.step(done)
            if done == len(names) or done % max(1, len(names) // 20) == 0:
                console.report(done, {})
    finally:
        pool.shutdown(cancel_futures=True)
    return failed, tiled


def _inputs(images: Path, outputs: Outputs) -> tuple[Path, list[Path]]:
    """The folder of the images and their paths in it."""
    if images.is_file():
        return images.parent, [Path(images.name)]
    if not images.is_dir():
        raise UserError(f"There is no file or folder {images}. Set --input to one.")
    names = find_images(images, leave_out=outputs.folder)
    if not names:
        raise UserError(
            f"There is no image in {images}: no file with a suffix such as .jpg or .png."
        )
    outputs.check(names)
    return images, names


def _result(total: int, failed: int, tiled: int, outputs: Outputs) -> str:
    folder = outputs.folder
    lines = [
        f"Done: labeled {total - failed} of {total} images. Classes as numbers: {folder / 'labels'}"
    ]
    if outputs.overlay:
        lines.append(f"To look at: {folder / 'overlays'}, colors in {folder / 'legend.png'}")
    if tiled:
        lines.append(f"Too large for one piece, so cut into overlapping tiles: {tiled}.")
    if failed:
        lines.append(f"Failed, for the reasons above: {failed}.")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
