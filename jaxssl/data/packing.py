"""Packs any source into a set of TensorFlow Datasets: ArrayRecord files, without TensorFlow.

Such a set has the features `image`, `label` and `id`, so that everybody's tools read it. Its
metadata, `metadata.json`, hold what `data.name=tfds` needs beyond that: classes, colors, and the
ids of each split in the order of its records.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import itertools
import json
import os
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any

import grain
import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from jaxssl.contracts import IGNORE_LABEL, DataInfo, Record, Source, UserError
from jaxssl.data import loading
from jaxssl.data.tfds import MANIFEST_VERSION, read_image

SHARD = 256
"""Images in a file, which is what an interrupted packing has to do again at most."""

_NAME = "packed"
_METADATA = {"dataset_info.json", "features.json", "metadata.json"}
_READ = grain.ReadOptions(num_threads=4, prefetch_buffer_size=16)


@dataclasses.dataclass(frozen=True)
class Size:
    """The size that images are packed in; with neither field, that of the source.

    Attributes:
      exact: (height, width) of all.
      short_side: of the larger images, which keep their shape; smaller ones stay as they are.

    Raises:
      UserError: a number is not positive, or both fields are set.
    """

    exact: tuple[int, int] | None = None
    short_side: int | None = None

    def __post_init__(self) -> None:
        given = [*(self.exact or ()), *([] if self.short_side is None else [self.short_side])]
        if any(side < 1 for side in given) or len(given) > 2:
            raise UserError(
                f"Images cannot have the size {self.exact or self.short_side}. Give positive "
                "numbers, --size=HEIGHT,WIDTH or --short_side=PIXELS, not both."
            )

    def of(self, height: int, width: int) -> tuple[int, int]:
        """What (height, width) becomes."""
        if self.exact is not None:
            return self.exact
        short = min(height, width)
        if self.short_side is None or short <= self.short_side:
            return height, width
        return round(height * self.short_side / short), round(width * self.short_side / short)


@dataclasses.dataclass(frozen=True)
class Part:
    """A split to pack: its images, and those of them that have a label, as labels are read."""

    images: Source
    labeled: Source | None = None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Record:
        position = self._labeled.get(self.images.ids[index])
        if position is None or self.labeled is None:
            return self.images[index]
        return self.labeled[position]

    @property
    def unlabeled(self) -> tuple[str, ...]:
        """Ids of the images without a label."""
        return tuple(image_id for image_id in self.images.ids if image_id not in self._labeled)

    @functools.cached_property
    def _labeled(self) -> Mapping[str, int]:
        ids = () if self.labeled is None else self.labeled.ids
        return {image_id: i for i, image_id in enumerate(ids)}


def parts_of(config_data: Mapping[str, Any]) -> dict[str, Part]:
    """Opens "train", "val" and, with `extra`, "train_extra", which nobody needs labels of.

    Where some training images have no label, labels are those of the images that the config chooses
    as labeled.

    Raises:
      UserError: as `loading.load` and `loading.training_sets`.
    """
    train = loading.load(config_data, "train", labels=False)
    try:
        labeled = loading.load(config_data, "train", labels=True)
    except UserError:
        labeled = loading.training_sets(config_data)[1]["labeled"]
    val = loading.load(config_data, "val", labels=True)
    parts = {"train": Part(train, labeled), "val": Part(val, val)}
    if config_data.get("extra"):
        parts["train_extra"] = Part(loading.load(config_data, "train_extra", labels=False))
    return parts


def pack(
    parts: Mapping[str, Part],
    folder: Path,
    size: Size = Size(),
    progress: Callable[[int], object] = lambda done: None,
) -> None:
    """Writes a set; goes on where it was interrupted.

    Until it is complete, the set stands in `<folder>.incomplete`. Images keep their bytes where
    they come from a file that holds exactly these pixels; else they become PNG, resized bilinearly
    with antialiasing. Labels are PNG with our ids, resized to the nearest pixel; images without one
    get a label of 255 alone (of -1 in classification).

    Args:
      parts: by name of the split.
      folder: to make; it may be there if it is empty.
      size: of the packed images.
      progress: called with the number of images packed so far, of all splits.

    Raises:
      UserError: the folder holds something, or an unfinished set of other images, classes or size;
        or what a source raises.
    """
    _refuse_used(folder)
    unfinished = folder.with_name(f"{folder.name}.incomplete")
    manifest = _manifest(parts, size)
    _refuse_other(unfinished, manifest)
    unfinished.mkdir(parents=True, exist_ok=True)
    description = _description(unfinished, _info(parts), manifest)
    writer = _writer(description)
    # TFDS knows no empty split; the manifest does.
    full = {name: part for name, part in parts.items() if len(part)}
    writer.initialize_splits(list(full), fail_if_exists=False)
    before = 0
    for name, part in full.items():
        done = description.splits[name].num_examples
        examples = _examples(part, done, size, lambda i, before=before: progress(before + i))
        with contextlib.closing(examples):
            for _ in range(done, len(part), SHARD):
                # A call writes the metadata, after which a complete file is not made again.
                writer.add_examples({name: itertools.islice(examples, SHARD)})
        writer.close_splits([name])
        before += len(part)
    unfinished.replace(folder)


def _refuse_used(folder: Path) -> None:
    if (folder / "dataset_info.json").exists():
        raise UserError(
            f"{folder} holds a finished set. Use it, --config.data.name=tfds "
            f"--config.data.root={folder}, or choose another --out."
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is not empty. Choose a new folder for --out.")


def _refuse_other(unfinished: Path, manifest: Mapping[str, Any]) -> None:
    """Makes sure that what an earlier packing left is the beginning of this one."""
    names = {path.name for path in unfinished.iterdir()} if unfinished.exists() else set()
    if any(not name.startswith((f"{_NAME}-", "label.")) for name in names - _METADATA):
        raise UserError(f"{unfinished} holds other files. Move them, or choose another --out.")
    if "dataset_info.json" not in names:
        return  # no image is counted as packed yet
    try:
        begun = {name: json.loads((unfinished / name).read_text()) for name in _METADATA}
    except (OSError, ValueError) as error:
        raise UserError(
            f"{unfinished} was interrupted while it was described: {error}. Remove this folder and "
            "start again."
        ) from error
    if begun["metadata.json"] != manifest:
        raise UserError(
            f"{unfinished} is the beginning of another set: images, classes or size differ. Remove "
            "this folder, or choose another --out."
        )


def _info(parts: Mapping[str, Part]) -> DataInfo:
    return next(iter(parts.values())).images.info


def _manifest(parts: Mapping[str, Part], size: Size) -> Mapping[str, Any]:
    info = _info(parts)
    manifest = {
        "jaxssl": MANIFEST_VERSION,
        "task": info.task,
        "classes": info.classes,
        "palette": info.palette,
        "size": dataclasses.asdict(size),
        "ids": {name: part.images.ids for name, part in parts.items()},
        "unlabeled": {name: part.unlabeled for name, part in parts.items()},
    }
    return json.loads(json.dumps(manifest))  # tuples become lists, as they do on disk


def _description(folder: Path, info: DataInfo, manifest: Mapping[str, Any]) -> Any:
    label = (
        tfds.features.ClassLabel(names=list(info.classes))
        if info.task == "classification"
        else tfds.features.Image(shape=(None, None, 1), encoding_format="png")
    )
    features = {"image": tfds.features.Image(), "label": label, "id": tfds.features.Text()}
    identity = tfds.core.DatasetIdentity(
        name=_NAME,
        version=tfds.core.Version("1.0.0"),
        data_dir=os.fspath(folder),
        module_name=__name__,
    )
    return tfds.core.DatasetInfo(
        builder=identity,
        description="Images and labels, packed by jaxssl. In labels, 255 counts nowhere.",
        features=tfds.features.FeaturesDict(features),
        metadata=tfds.core.MetadataDict(manifest),
        disable_shuffling=True,
    )


def _writer(description: Any) -> Any:
    # TFDS's other way to write, a builder, keeps all records aside before it writes the first file.
    return tfds.core.SequentialWriter(
        description, SHARD, overwrite=False, file_format=tfds.core.FileFormat.ARRAY_RECORD.value
    )


def _examples(
    part: Part, start: int, size: Size, progress: Callable[[int], object]
) -> Generator[dict[str, Any], None, None]:
    """The images from `start` on, in order, encoded by several threads."""
    encode = _Encode(part, size)
    dataset = grain.MapDataset.range(start, len(part)).map(encode).to_iter_dataset(_READ)
    with contextlib.closing(iter(dataset)) as examples:
        for done, example in enumerate(examples, start + 1):
            yield example
            progress(done)


@dataclasses.dataclass(frozen=True)
class _Encode:
    part: Part
    size: Size

    def __call__(self, index: int) -> dict[str, Any]:
        record = self.part[index]
        height, width = record["image"].shape[:2]
        size = self.size.of(height, width)
        content = _file_content(record) if size == (height, width) else None
        image = content or _png(_bilinear(record["image"], size))
        return {"image": image, "label": self._label(record, size), "id": record["id"]}

    def _label(self, record: Record, size: tuple[int, int]) -> bytes | int:
        if self.part.images.info.task == "classification":
            return int(record["label"]) if "label" in record else -1
        if "label" not in record:
            return _png(np.full(size, IGNORE_LABEL, np.uint8))
        return _png(_nearest(record["label"], size))


def _file_content(record: Record) -> bytes | None:
    """The bytes of the image's own file, if that is a PNG or JPEG that reads as these pixels."""
    if "file" not in record:
        return None
    content = Path(record["file"]).read_bytes()
    # Others' tools decode with what TFDS decodes with: nothing but these two, in RGB.
    with Image.open(io.BytesIO(content)) as image:
        plain = image.format in ("PNG", "JPEG") and image.mode == "RGB"
    same = plain and np.array_equal(read_image(content, record["id"]), record["image"])
    return content if same else None


def _bilinear(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    height, width = size
    resized = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(resized)


def _nearest(label: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The pixel under each center, in integers: Pillow rounds where two are as near."""
    places = (
        (2 * np.arange(n) + 1) * old // (2 * n) for n, old in zip(size, label.shape, strict=True)
    )
    return label[np.ix_(*places)]


def _png(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, format="png")
    return stream.getvalue()
