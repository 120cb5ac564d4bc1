"""Opens every image and mask of a config once, and says whether training would start.

`python -m jaxssl.check_data --config=configs/mkd_folder.py --config.data.root=DIR` prints what is
there and what is wrong. Exit code 0: training would start; 1: it would fail, with the reasons; 2:
there is no such config or method. Nothing is written. Batches have to fit the devices that are
seen here; JAX_PLATFORMS=cpu leaves GPUs and TPUs alone.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from absl import app, flags, logging

from jaxssl import auto, main, methods, phases, sharding
from jaxssl.config import Config
from jaxssl.contracts import (
    IGNORE_LABEL,
    DataInfo,
    Record,
    Source,
    UnreadableError,
    UserError,
)
from jaxssl.data import files, loading, quarantine
from jaxssl.data.masks import ForeignValuesError
from jaxssl.logs import Console, create_console

SHOWN = 10
"""Files and values that are named of each kind of trouble."""

LARGE = 25_000_000
"""Pixels of an image that take half a second to decode, which training does for each crop."""


def run(argv: Sequence[str]) -> int:
    """Checks the data of the config that the flags name; returns the exit code."""
    logging.set_verbosity(logging.WARNING)
    config = flags.FLAGS["config"].value
    try:
        if len(argv) > 1:
            raise UserError(f"Unexpected argument {argv[1]!r}.")
        if config is None:
            raise UserError("--config is missing: --config=configs/mkd_folder.py, say.")
        with create_console() as console:
            return check(config, console)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Stopped before all was looked at.", file=sys.stderr)
        return 130


def check(config: Config, console: Console) -> int:
    """Prints what the data of a config are; returns 0 if training would start, else 1.

    Raises:
      UserError: the config's method is wrong.
    """
    method = methods.load(config.method)
    images = sources = {}
    reasons = []
    try:
        images = sources = _without_masks(config.data)
        _, sources = phases.open_sources(config.data)
        mesh = sharding.make_mesh()
        config = auto.resolve(config, None, console.message, mesh.size)
        phases.assemble(config, method, sources, mesh)
        phases.find_weights(config, method)
    except UserError as error:
        reasons.append(str(error))
    if sources:
        found = {name: inspect(sources[name], images[name], name, console) for name in sources}
        console.close()
        info, labeled = sources["labeled"].info, sources is not images
        words = WORDS[info.task]
        console.table("Images", *_image_table(found, words))
        if labeled:
            console.table(words.title, *_class_table(found, info, words))
        else:
            console.message(f"Warning: The {words.labels} were not compared with the images.")
        for line in _warnings(found, info, config, words):
            console.message(f"Warning: {line}")
        reasons = [*_fatal(found, config, words, labeled=labeled), *reasons]
    for line in reasons:
        console.message(f"Training would fail: {line}")
    if not reasons:
        console.message("Training would start.")
    return 1 if reasons else 0


def _without_masks(data: Mapping[str, Any]) -> dict[str, Source]:
    """The sets that training reads, without labels, which opens no mask."""
    # Any two classes, but 0 and 1: else masks say what they are, which fails if one is wrong.
    made_up = {**data, "classes": ("1 one", "2 other")}
    if loading.load(made_up, "val", labels=False).info.task == "segmentation":
        data = made_up
    split, sources = loading.training_sets(data)
    labeled = loading.load(data, "train", False, split.labeled)
    if split.holdout:
        sources["holdout"] = loading.load(data, "train", False, split.holdout)
    return {**sources, "labeled": labeled, "val": loading.load(data, "val", labels=False)}


class Words(NamedTuple):
    """How labels are spoken of.

    Attributes:
      labels: what they are called.
      position: what has one class.
      counted: what is counted by class.
      classes: that is told of each set.
      title: of the table of classes.
      advice: what to do about large images.
    """

    labels: str
    position: str
    counted: str
    classes: str
    title: str
    advice: str


WORDS: Mapping[str, Words] = {
    "segmentation": Words(
        labels="masks",
        position="pixel",
        counted="masks",
        classes="classes a mask",
        title="Pixels of masks, in percent",
        advice="cut them and their masks into tiles",
    ),
    "classification": Words(
        labels="labels",
        position="image",
        counted="images",
        classes="classes",
        title="Images of each class, in percent",
        advice="make them smaller before",
    ),
}
"""Task -> its words."""


@dataclasses.dataclass
class Findings:
    """What the images of a set are.

    Attributes:
      ids: of all images.
      sizes: (height, width) -> images.
      gray: images without color.
      classes: in a mask, without the ignored pixels -> masks.
      pixels: int64 `[256]`, pixels of each label.
      images: int64 `[256]`, images that hold each label.
      digests: fingerprint of an image's pixels -> ids.
      unreadable: a message for each file that cannot be read.
      refused: a message for each other mistake.
      foreign: values that are no class -> pixels, for each mask that holds some.
    """

    ids: tuple[str, ...]
    sizes: collections.Counter[tuple[int, int]] = dataclasses.field(
        default_factory=collections.Counter
    )
    gray: int = 0
    classes: collections.Counter[int] = dataclasses.field(default_factory=collections.Counter)
    pixels: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(256, np.int64))
    images: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(256, np.int64))
    digests: dict[bytes, list[str]] = dataclasses.field(default_factory=dict)
    unreadable: list[str] = dataclasses.field(default_factory=list)
    refused: list[str] = dataclasses.field(default_factory=list)
    foreign: list[Mapping[int | str, int]] = dataclasses.field(default_factory=list)


def inspect(source: Source, images: Source, name: str, console: Console) -> Findings:
    """Opens every image and mask of a source, several at a time.

    Args:
      source: with or without labels.
      images: the same without.
      name: of the set, for the progress bar.
      console: shows progress.
    """
    found = Findings(source.ids)
    console.phase(name, len(source), unit="images")
    pool = ThreadPoolExecutor()
    try:
        looks = pool.map(lambda i: _look(source, images, i), range(len(source)))
        for done, (image_id, look) in enumerate(zip(source.ids, looks, strict=True), 1):
            _add(found, image_id, *look)
            console.step(done)
    finally:
        pool.shutdown(cancel_futures=True)  # else Ctrl-C would still read all that is left
    return found


class _Look(NamedTuple):
    """What one image is, and its mask if it was read."""

    size: tuple[int, int]
    gray: bool
    digest: bytes
    pixels: np.ndarray


def _look(source: Source, images: Source, index: int) -> tuple[_Look | None, UserError | None]:
    """What an image is, if it can be read, and what is wrong with it or its mask."""
    try:
        return _measure(source[index]), None
    except UserError as error:
        with contextlib.suppress(UserError):
            return _measure(images[index]), error
        return None, error


def _measure(record: Record) -> _Look:
    image, label = record["image"], record.get("label", np.zeros(0, np.uint8))
    size = (image.shape[0], image.shape[1])
    return _Look(
        size,
        gray=bool((image == image[..., :1]).all()),
        digest=hashlib.blake2b(bytes(str(size), "ascii") + image.tobytes()).digest(),
        pixels=np.bincount(np.ravel(label), minlength=256),
    )


def _add(found: Findings, image_id: str, look: _Look | None, error: UserError | None) -> None:
    if error is not None:
        wrong = found.unreadable if isinstance(error, UnreadableError) else found.refused
        wrong.append(str(error))
    if isinstance(error, ForeignValuesError):
        found.foreign.append(error.counts)
    if look is None:
        return
    found.sizes[look.size] += 1
    found.gray += look.gray
    found.pixels += look.pixels
    found.images += look.pixels > 0
    if look.pixels.any():
        found.classes[int((look.pixels[:IGNORE_LABEL] > 0).sum())] += 1
    found.digests.setdefault(look.digest, []).append(image_id)


_Table = tuple[tuple[str, ...], list[tuple[str, ...]]]


def _image_table(found: Mapping[str, Findings], words: Words) -> _Table:
    rows = []
    for name, one in found.items():
        sizes = auto.size_range(one.sizes) + (f", {len(one.sizes)} sizes" * (len(one.sizes) > 1))
        few, many = min(one.classes, default="-"), max(one.classes, default="-")
        classes = f"{few} to {many}" if few != many else f"{few}"
        if words.position == "image":
            classes = f"{(one.images[:IGNORE_LABEL] > 0).sum() or '-'}"
        counts = (len(one.ids), one.gray, classes, len(one.unreadable), len(one.refused))
        rows.append((name, sizes, *map(str, counts)))
    columns = ("set", "height x width", "images", "gray", words.classes, "unreadable", "refused")
    return columns, rows


def _class_table(found: Mapping[str, Findings], info: DataInfo, words: Words) -> _Table:
    """Share of each class among the labeled pixels (or images); of the ignored ones among all."""
    labeled = {name: one for name, one in found.items() if one.pixels.any()}
    names = {**dict(enumerate(info.classes)), IGNORE_LABEL: "(ignored)"}
    rows = []
    for label, name in names.items():
        row = [name]
        for one in labeled.values():
            known = one.pixels.sum() - (label != IGNORE_LABEL) * one.pixels[IGNORE_LABEL]
            share = f"{100 * one.pixels[label] / max(known, 1):.2f}"
            row += [share if one.pixels[label] else "absent", str(one.images[label])]
        rows.append(tuple(row))
    columns = [word for name in labeled for word in (f"{name} %", words.counted)]
    return ("class", *columns), rows


def _warnings(
    found: Mapping[str, Findings], info: DataInfo, config: Config, words: Words
) -> Iterator[str]:
    """What training would put up with, but its result would not."""
    for name in found:
        absent = [c for label, c in enumerate(info.classes) if not found[name].pixels[label]]
        if absent and found[name].pixels.any():
            yield f"{len(absent)} classes are absent in {name}: {_few(absent)}."
    for name, other in itertools.combinations(found, 2):
        same = sorted(set(found[name].ids) & set(found[other].ids))
        if same and other == "val":  # data.overlap asks for it in the others
            yield f"{len(same)} ids are in {name} and in val: {_few(same)}."
        if pairs := _twins(found[name], found[other]):
            yield f"{len(pairs)} pictures are in {name} and in {other}: {_few(pairs)}."
    for name in ("labeled", "unlabeled"):
        sizes = found[name].sizes.items()
        if large := sum(n for (height, width), n in sizes if height * width > LARGE):
            yield (
                f"{large} images of {name} have more than {LARGE // 10**6} megapixels. Training "
                f"decodes a whole image for each crop: {words.advice}."
            )
    for name, one in found.items():
        if one.unreadable and name != "val" and not _too_many(one, config):
            yield (
                f"{len(one.unreadable)} of {name} cannot be read; training puts other images in "
                f"their place: {files.listed(one.unreadable)}"
            )
    if foreign := [counts for one in found.values() for counts in one.foreign]:
        yield _suggest_ignore(foreign, config)


def _twins(one: Findings, other: Findings) -> list[str]:
    """The same pictures under different ids."""
    pairs = ((one.digests[d][0], other.digests[d]) for d in one.digests.keys() & other.digests)
    return sorted(f"{mine} and {theirs[0]}" for mine, theirs in pairs if mine not in theirs)


def _suggest_ignore(foreign: Sequence[Mapping[int | str, int]], config: Config) -> str:
    pixels = sum(map(collections.Counter, foreign), collections.Counter())
    masks = collections.Counter(value for counts in foreign for value in counts)
    common = pixels.most_common(SHOWN)
    shown = [f"{value} ({count} pixels in {masks[value]} masks)" for value, count in common]
    value, _ = common[0]
    advice = f"a line in classes.txt: ignore {value}"
    if isinstance(value, int):
        ignore = ",".join(map(str, (*config.data.ignore, value)))
        advice = f"--config.data.ignore={ignore}"
    return (
        f"Masks hold values that are no class: {', '.join(shown)}. If {value} marks pixels to "
        f"ignore, add {advice}"
    )


def _fatal(
    found: Mapping[str, Findings], config: Config, words: Words, *, labeled: bool
) -> Iterator[str]:
    """Why training would fail, as far as files are concerned, those of labels among them or not."""
    for name, one in found.items():
        if one.refused:
            yield f"{len(one.refused)} of {len(one.ids)} of {name}: {files.listed(one.refused)}"
        if one.unreadable and (name == "val" or _too_many(one, config)):
            yield f"{len(one.unreadable)} of {name} cannot be read: {files.listed(one.unreadable)}"
        expected = labeled and name != "unlabeled" and not one.refused
        if expected and not one.pixels[:IGNORE_LABEL].any():
            yield f"No {words.position} of {name} has a class."


def _too_many(found: Findings, config: Config) -> bool:
    return len(found.unreadable) > quarantine.allowed(config.data.max_damaged, len(found.ids))


def _few(items: Sequence[str]) -> str:
    more = f" and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return f"{', '.join(items[:SHOWN])}{more}"


if __name__ == "__main__":
    app.run(run, flags_parser=main.parse)
