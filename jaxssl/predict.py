"""Labels images with a network that was trained.

`python -m jaxssl.predict --workdir=W --input=I --output=O` writes to the folder O, under the path
that each image has in I and at its original size:

  labels/NAME.png         class of each pixel, as a palette PNG: its values are the classes' numbers
  overlays/NAME.jpg       the image blended with the colors of legend.png
  confidence/NAME.png     with --probabilities: the largest probability, 16 bits: 65535 is 1
  probabilities/NAME.npz  with --probabilities: "probabilities", float16 [h,w,C]
  label_ids/NAME.png      with --label_ids: what the server of Cityscapes takes, without subfolders

Where the run classifies whole images, O gets instead predictions.csv, with a row for each image:
its path in I, its class, how sure that is, and with --probabilities that of each class; and
sheet.png, which shows some of each class, the surest first.

Images are read as training on a folder reads them: as viewers show them, turned upright by their
orientation tag (and so are the outputs), without transparency. One that cannot be read is named,
and the rest goes on. Nothing outside O is written to, and O must be empty or made by the same
command, which then goes on where it was; an image that is newer than its outputs is labeled again.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import dataclasses
import functools
import itertools
import math
import queue
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from jaxssl import logs, panels, startup
from jaxssl.classify import Table, fill
from jaxssl.contracts import Network, UnreadableError, UserError, Variables
from jaxssl.data.files import whole
from jaxssl.evaluate import check_mode
from jaxssl.inference import Predict, Presentation, make_predict
from jaxssl.predictions import Outputs, Prediction, find_images, read_image
from jaxssl.trained import Trained, open_trained

Read = Callable[[jax.Array], dict[str, jax.Array]]
"""Logits `[h,w,C]` -> the fields of `Prediction` to find, by name; pure."""

MAX_PIXELS, MAX_LOGITS = 2**22, 2**26
"""Of a piece that is predicted at once: larger images are cut into overlapping tiles."""

_THREADS = 4


def classes(logits: jax.Array) -> dict[str, jax.Array]:
    """Reads labels alone."""
    return {"labels": logits.argmax(-1).astype(jnp.uint8)}


def probabilities(logits: jax.Array) -> dict[str, jax.Array]:
    """Reads labels, confidence and probabilities."""
    shares = jax.nn.softmax(logits)
    confidence = jnp.round(65535 * shares.max(-1)).astype(jnp.uint16)
    found = {"confidence": confidence, "probabilities": shares.astype(jnp.float16)}
    return {**classes(logits), **found}


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
        read: Read = classes,
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
          read: what to find, as `classes`, `probabilities`.
          devices: None takes all of this process.
          max_pixels: of a piece; fewer where there are many classes.
        """
        self._bucket = bucket
        self._max_pixels = min(max_pixels, MAX_LOGITS // num_classes)
        self._read = jax.jit(functools.partial(_read, make_predict(net, how), read))
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
        return Prediction(**found, tiles=len(tiles))

    def _piece(self, image: np.ndarray) -> dict[str, np.ndarray]:
        height, width = image.shape[:2]
        fill = [(0, -side % self._bucket) for side in (height, width)]
        valid = np.pad(np.ones((height, width), bool), fill)
        padded = np.pad(image, (*fill, (0, 0)))
        device, variables = self._free.get()
        try:
            inputs = jax.device_put((padded, valid), device)
            found = jax.device_get(self._read(variables, *inputs))
        finally:
            self._free.put((device, variables))
        return {name: array[:height, :width] for name, array in found.items()}


def _read(
    predict: Predict, read: Read, variables: Variables, image: jax.Array, valid: jax.Array
) -> dict[str, jax.Array]:
    return read(predict(variables, image[None], valid[None])[0])


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


@dataclasses.dataclass(frozen=True)
class Job:
    """Images, and the network of a run that labels them.

    Attributes:
      run: has the network.
      network: its name.
      step: of the run, whose weights it takes.
      how: an image is shown to it.
      folder: of the images.
      names: their paths in it, sorted.
    """

    run: Trained
    network: str
    step: int
    how: Presentation
    folder: Path
    names: tuple[Path, ...]

    @classmethod
    def of(
        cls,
        run: Trained,
        images: Path,
        outputs: Outputs,
        *,
        network: str | None = None,
        step: str | int = "best",
    ) -> Job:
        """Finds the images, and the network.

        Args:
          run: has the network, and says how to show images to it.
          images: a file or a folder.
          outputs: where labels go; what is there is no image.
          network: None takes the headline.
          step: "best", "last" or a number.

        Raises:
          UserError: no images, two that would be written to one file, or no such network or step.
        """
        folder, names = _inputs(images.expanduser(), outputs.folder)
        outputs.check(names)
        network, step = network or run.headline, run.step(step)
        run.net(network)  # is there
        how = Presentation.of(run.config.eval, run.config.crop)
        check_mode(how, run.info)
        if run.info.task == "segmentation":
            how = how.uncropped
        return cls(run, network, step, how, folder, tuple(names))

    @property
    def settings(self) -> dict[str, Any]:
        """What labels depend on, for `Outputs.claim`."""
        # Outputs are named by an image's path in its folder, which may be given by one image too.
        source = {"workdir": str(self.run.workdir), "input": str(self.folder.resolve())}
        return {**source, "network": self.network, "step": self.step, "mode": str(self.how)}

    def predictor(self, read: Read) -> Predictor:
        """Reads the network."""
        config = self.run.config
        startup.keep_compiled(config)
        return Predictor(
            self.run.net(self.network),
            self.run.variables(self.network, self.step),
            self.how,
            self.run.info.num_classes,
            bucket=config.eval.bucket,
            read=read,
        )

    def words(self, todo: int) -> str:
        """What is done, for people; `todo` of the images are still to be labeled."""
        total = len(self.names)
        before = f", {total - todo} of them labeled before" if total > todo else ""
        return (
            f"Network {self.network} of {self.run.workdir}, step {self.step}; images are shown: "
            f"{self.how}. {total} in {self.folder}{before}."
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code: 1 where an image failed, 2 for a user's mistake."""
    parser = make_parser("predict", __doc__)
    add = parser.add_argument
    add("--nooverlay", dest="overlay", action="store_false", help="write no overlays")
    add("--probabilities", action="store_true", help="write probabilities and confidence, too")
    add("--label_ids", action="store_true", help="write label ids of Cityscapes, too")
    args = parser.parse_args(argv)

    def work() -> int:
        run = open_trained(args.workdir, overrides(args))
        outputs = Outputs(
            args.output.expanduser(), run.info, args.overlay, args.probabilities, args.label_ids
        )
        return predict(
            run, args.input, outputs, network=args.network, step=args.step, overwrite=args.overwrite
        )

    return exit_code(work)


def make_parser(command: str, description: str | None) -> argparse.ArgumentParser:
    """A parser with what all commands take that label images."""
    parser = argparse.ArgumentParser(
        prog=f"python -m jaxssl.{command}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--workdir", required=True, type=Path, help="of a training run")
    add("--input", required=True, type=Path, help="an image, or a folder of images")
    add("--output", required=True, type=Path, help="a new folder, or one to go on with")
    add("--network", help="one of the run's networks (default: the one that it reports)")
    add("--step", default="best", help="best, last, or a number (default: best)")

    def show(name: str, **kwargs: Any) -> None:
        add(f"--{name}", f"--config.eval.{name}", **kwargs)

    modes = ("whole", "slide", "half_res", "center_crop")
    show("mode", choices=modes, help="how images are shown (default: as the run was evaluated)")
    show("window", help="height,width of the windows of --mode=slide (default: the crop)")
    show("stride", help="height,width from one window to the next (default: 2/3 of a window)")
    show("flip", action="store_true", help="average with the mirror image")
    add("--overwrite", action="store_true", help="label all images again")
    return parser


def overrides(args: argparse.Namespace) -> dict[str, Any]:
    """The keys of the run's config that arguments of `make_parser` set otherwise."""
    shown = {"mode": args.mode, "window": args.window, "stride": args.stride, "flip": args.flip}
    return {f"eval.{key}": value for key, value in shown.items() if value}


def exit_code(work: Callable[[], int]) -> int:
    """That of a command which does `work`: 2 for a user's mistake, which is one message."""
    try:
        return work()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Stopped. The same command goes on from here.", file=sys.stderr)
        return 130


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
    job = Job.of(run, images, outputs, network=network, step=step)
    outputs.claim(job.settings)
    if run.info.task == "classification":
        return _classify(job, outputs, overwrite=overwrite)
    predictor = job.predictor(probabilities if outputs.probabilities else classes)
    files = {name: job.folder / name for name in job.names}
    due = {name: outputs.due(name, file, overwrite=overwrite) for name, file in files.items()}
    todo = [name for name in job.names if due[name]]
    with logs.create_console() as console:
        console.message(job.words(len(todo)))

        def label(name: Path) -> int:
            image = read_image(files[name])
            found = predictor(image)
            outputs.write(due[name], image, found)
            return found.tiles

        failed, tiled = label_all(label, todo, console)
        console.close()  # the bar stays above the result
        console.message(
            "\n".join([*_result(len(todo) - failed, len(todo), outputs), *remarks(failed, tiled)])
        )
    return 1 if failed else 0


def _classify(job: Job, outputs: Outputs, *, overwrite: bool) -> int:
    """`predict` of whole images."""
    classes = job.run.info.classes
    each = [f"probability/{name}" for name in classes] if outputs.probabilities else []
    table = Table(outputs.folder / "predictions.csv", ("class", "confidence", *each))

    def read(logits: jax.Array) -> dict[str, jax.Array]:
        return {"label": logits.argmax(-1), "shares": jax.nn.softmax(logits)}

    def words(found: Mapping[str, np.ndarray]) -> tuple[str, ...]:
        shares = [f"{share:.6f}" for share in found["shares"]]
        label = int(found["label"])
        return classes[label], shares[label], *(shares if each else ())

    todo = table.due(job.folder, job.names, overwrite=overwrite)
    with logs.create_console() as console:
        console.message(job.words(len(todo)))
        failed = fill(table, job, todo, read, words, console)
        if todo or not (outputs.folder / "sheet.png").exists():
            _write_sheet(job, table, outputs.folder / "sheet.png")
        console.close()  # the bar stays above the result
        done = f"Done: labeled {len(todo) - failed} of {len(todo)} images: {table.path}"
        console.message("\n".join([done, *remarks(failed, 0)]))
    return 1 if failed else 0


def _write_sheet(job: Job, table: Table, path: Path, most: int = 64) -> None:
    """Shows images of a table, evenly spaced in the order of class and confidence."""
    shown = [name for name in job.names if name.as_posix() in table.rows]
    words = {name: table.rows[name.as_posix()] for name in shown}
    shown.sort(key=lambda name: (words[name][0], -float(words[name][1])))
    images, captions = [], []
    for name in shown[:: max(1, -(-len(shown) // most))]:
        with contextlib.suppress(UnreadableError):  # it was read before
            images.append(read_image(job.folder / name))
            captions.append(f"{words[name][0]}  {100 * float(words[name][1]):.0f} %")
    if images:
        with whole(path) as file:
            Image.fromarray(panels.sheet(images, captions)).save(file, "PNG")


def label_all(
    label: Callable[[Path], int], names: Sequence[Path], console: logs.Console
) -> tuple[int, int]:
    """Labels images, several at a time, and shows how far that is.

    Args:
      label: labels the image of that name, and returns the pieces that it was cut into.
      names: of the images.
      console: where one that cannot be read is named.

    Returns:
      Counts of images that could not be read, and of those that were cut into tiles.
    """
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


def remarks(failed: int, tiled: int) -> list[str]:
    """What people should know of the counts that `label_all` returns, a line each."""
    lines = []
    if tiled:
        lines.append(f"Too large for one piece, so cut into overlapping tiles: {tiled}.")
    if failed:
        lines.append(f"Failed, for the reasons above: {failed}.")
    return lines


def _inputs(images: Path, leave_out: Path) -> tuple[Path, list[Path]]:
    """The folder of the images and their paths in it."""
    if images.is_file():
        return images.parent, [Path(images.name)]
    if not images.is_dir():
        raise UserError(f"There is no file or folder {images}. Set --input to one.")
    names = find_images(images, leave_out=leave_out)
    if not names:
        raise UserError(
            f"There is no image in {images}: no file with a suffix such as .jpg or .png."
        )
    return images, names


def _result(labeled: int, total: int, outputs: Outputs) -> list[str]:
    folder = outputs.folder
    lines = [f"Done: labeled {labeled} of {total} images. Classes as numbers: {folder / 'labels'}"]
    if outputs.overlay:
        lines.append(f"To look at: {folder / 'overlays'}, colors in {folder / 'legend.png'}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
