"""Sets that TensorFlow Datasets (TFDS) prepared as ArrayRecord, read without TensorFlow."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from jaxssl.contracts import IGNORE_LABEL, Record, UnreadableError, UserError
from jaxssl.data.files import open_image
from jaxssl.data.masks import MOST_CLASSES, ClassTable, ForeignValuesError, parse
from jaxssl.data.splits import known_ids

DEFAULTS: Mapping[str, Any] = {
    "tfds_name": "",
    "splits": {},
    "image_key": "image",
    "label_key": "label",
    "id_key": "",
    "classes": (),
    "ignore": (IGNORE_LABEL,),
}
"""Keys of the config's `data` section beside `root`, which is the folder of one set, with its
dataset_info.json, or the one that TFDS keeps its sets in ("" is ~/tensorflow_datasets). A set that
`packing` wrote needs and heeds none of them.

tfds_name: name, config and version, such as "oxford_iiit_pet:4.*.*".
splits: our split -> theirs, such as {"val": "test"} or {"val": "train[90%:]"}.
image_key, label_key: features; the label is an image with one channel, or a class id.
id_key: a feature that names an image, such as its file name; "" takes the place in the split.
classes: the class table, a line an item (see `masks`); () takes the set's own names.
ignore: stored values that count nowhere.
"""

MANIFEST_VERSION = 1
"""Of what `packing` adds to the metadata of a set."""

_FOREIGN = 254


def load(
    config_data: Mapping[str, Any], split: str, labels: bool, ids: Iterable[str] | None = None
) -> Prepared:
    """Opens a split of a prepared set; `DEFAULTS` has the keys of `config_data`."""
    return Prepared(config_data, split, labels, ids)


class Prepared:
    """A split of a prepared set, in random access.

    Args:
      config_data: `root` and the keys of `DEFAULTS`.
      split: our name of it; several are joined by "+".
      labels: False never decodes a label.
      ids: images to keep; None keeps all. Only these need labels.

    Raises:
      UserError: the set, a split, a feature, an id or a label is missing, or nothing says what the
        classes are; on reading, a record is damaged, holds a value that is no class, or an image
        and its label differ in size.
    """

    def __init__(
        self,
        config_data: Mapping[str, Any],
        split: str,
        labels: bool = True,
        ids: Iterable[str] | None = None,
    ):
        settings = {**DEFAULTS, **config_data}
        self._folder = _find(settings["root"], settings["tfds_name"])
        builder = _builder(self._folder)
        if manifest := _manifest(builder):
            settings = dict(DEFAULTS)
        parts = _parts(builder, split, settings["splits"], manifest)
        position = _positions(builder, parts, manifest, settings["id_key"])
        self.ids = tuple(sorted(position)) if ids is None else known_ids(ids, position)
        label = dict(builder.info.features.items()).get(settings["label_key"])
        # A class id may be none; that images have one is asked for by naming them.
        if labels and (ids is not None or _task(label) == "segmentation"):
            self._refuse_unlabeled(parts, manifest)
        self._keys = (settings["image_key"], settings["label_key"])[: 1 + labels]
        self._features = _features(builder, self._keys)
        _refuse_no_image(builder, self._keys[0])
        self._records = _records(builder, "+".join(parts.values()))
        self._positions = tuple(position[image_id] for image_id in self.ids)
        table = _class_table(settings, manifest, label, self._folder)
        self.info = dataclasses.replace(table.info, task=_task(label))
        self._classes, self._lookup = table.names, _lookup(table)

    @property
    def class_ids(self) -> np.ndarray | None:
        """Class of each image, uint8 `[len(self)]`, 255 where it has none or its record is damaged;
        None where images have no class as a whole, or without labels. No image is decoded.
        """
        if self.info.task == "segmentation" or len(self._keys) < 2:
            return None
        found = np.full(len(self), IGNORE_LABEL, np.uint8)
        for i, image_id in enumerate(self.ids):
            where = f"{image_id} in {self._folder}"
            with contextlib.suppress(UnreadableError):
                found[i] = self._to_labels(_values(self._read(i, where)[1], where), where)
        return found

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Record:
        where = f"{self.ids[index]} in {self._folder}"
        image, *label = self._read(index, where)
        record = Record(image=read_image(image, where), id=self.ids[index])
        if label:
            record["label"] = self._to_labels(_values(label[0], where), where)
            if record["label"].ndim and record["label"].shape != record["image"].shape[:2]:
                raise UserError(
                    f"{where}: the label has shape {record['label'].shape}, the image "
                    f"{record['image'].shape[:2]}. Prepare the set anew with both of one size."
                )
        return record

    def _read(self, index: int, where: str) -> list[Any]:
        """The stored values of the wanted features; images are encoded still."""
        serialized = _record(self._records, self._positions[index], where)
        # The features hold what is wanted alone, so nothing else is looked at. Images stay encoded,
        # because TFDS would take OpenCV where that is installed, and other pixels with it.
        images = {k: tfds.decode.SkipDecoding() for k in self._keys if _is_image(self._features[k])}
        fields = self._features.deserialize_example_np(serialized, decoders=images)
        return [fields[key] for key in self._keys]

    def _to_labels(self, stored: np.ndarray, where: str) -> np.ndarray:
        label = self._lookup.take(stored, mode="clip")
        if (foreign := label == _FOREIGN).any():
            values, counts = np.unique(stored[foreign], return_counts=True)
            raise ForeignValuesError(
                f"{where}: the label holds the value {values[0]}, which is none of the "
                f"{len(self._classes)} classes. Give it a line in data.classes, or add it to "
                "data.ignore.",
                dict(zip(values.tolist(), counts.tolist(), strict=True)),
            )
        return label

    def _refuse_unlabeled(self, parts: Mapping[str, str], manifest: Mapping[str, Any]) -> None:
        stored = manifest.get("unlabeled", {})
        unlabeled = {image_id for theirs in parts.values() for image_id in stored.get(theirs, ())}
        if missing := [image_id for image_id in self.ids if image_id in unlabeled]:
            raise UserError(
                f"{len(missing)} of {len(self.ids)} images have no label in {self._folder}, such "
                f"as {', '.join(missing[:3])}. Leave these images unlabeled, or pack them anew "
                "with their labels."
            )


def read_image(content: bytes, where: str) -> np.ndarray:
    """Decodes an image file's bytes as uint8 `[h,w,3]`, by Pillow; transparency is dropped.

    Args:
      content: of the file.
      where: what they are, for messages.

    Raises:
      UnreadableError: they are no image.
      UserError: there are more than 8 bits a channel.
    """
    image = open_image(where, content)
    if image.mode.startswith(("I", "F")):
        raise UserError(f"{where} has mode {image.mode}, more than 8 bits. Convert it to 8 bits.")
    if image.mode == "RGBA":
        return np.asarray(image)[..., :3]
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def _find(root: str, name: str) -> Path:
    """The folder of a set."""
    folder = Path(root or ".").expanduser()
    reason = "it has no dataset_info.json"
    if name and not (root and (folder / "dataset_info.json").is_file()):
        try:
            data_dir = os.fspath(folder) if root else None
            folder = Path(tfds.builder(name, data_dir=data_dir).data_dir)
        except Exception as error:  # whatever the set's own code raises, here it is not prepared
            reason = " ".join(str(error).split(". Available")[0].split())[:200]
    if not (folder / "dataset_info.json").is_file():
        option = f" --data_dir={root}" if root else ""
        prepare = f"tfds build {name.partition(':')[0] or 'NAME'} --file_format=array_record"
        raise UserError(
            f"There is no prepared set {name}{' ' if name else ''}in {folder}: {reason}. Prepare "
            f"one of TensorFlow Datasets once, pip install 'jaxssl[tfds-prepare]' && {prepare}"
            f"{option}, or pack a data set of your own, python -m jaxssl.prepare pack "
            "--config=CONFIG --out=DIR, and set --config.data.root=DIR."
        )
    return folder


def _builder(folder: Path) -> Any:
    try:
        return tfds.builder_from_directory(os.fspath(folder))
    except Exception as error:  # TFDS has no error of its own for damaged descriptions
        raise UserError(
            f"The set in {folder} cannot be opened: {error}. Copy or prepare it again."
        ) from error


def _manifest(builder: Any) -> Mapping[str, Any]:
    """What `packing` wrote; empty for other sets."""
    metadata = builder.info.metadata
    manifest = {} if metadata is None else {key: metadata[key] for key in metadata.keys()}  # noqa: SIM118
    version = manifest.get("jaxssl")
    if version is None:
        return {}
    if version != MANIFEST_VERSION:
        raise UserError(
            f"{builder.data_dir} was packed in version {version}; this jaxssl reads version "
            f"{MANIFEST_VERSION}. Pack it again, or take another jaxssl."
        )
    return manifest


def _parts(
    builder: Any, split: str, names: Mapping[str, str], manifest: Mapping[str, Any]
) -> dict[str, str]:
    """Our name of each split -> theirs; without those that were packed empty."""
    parts = {part: names.get(part, part) for part in split.split("+")}
    packed = manifest.get("ids", {})
    parts = {ours: theirs for ours, theirs in parts.items() if packed.get(theirs) != []}
    for ours, theirs in parts.items():
        try:
            builder.info.splits[theirs]
        except (LookupError, ValueError) as error:
            raise UserError(
                f"The set in {builder.data_dir} has no split {theirs!r}; it has "
                f"{', '.join(builder.info.splits)}. Set --config.data.splits.{ours}=SPLIT."
            ) from error
    return parts


def _positions(
    builder: Any, parts: Mapping[str, str], manifest: Mapping[str, Any], id_key: str
) -> dict[str, int]:
    """Id -> place among the records of all parts."""
    ids: list[str] = []
    for ours, theirs in parts.items():
        if theirs in manifest.get("ids", {}):
            ids += manifest["ids"][theirs]
        elif id_key:
            _features(builder, (id_key,))
            ids += _stored_ids(os.fspath(builder.data_dir), theirs, id_key)
        else:
            count = builder.info.splits[theirs].num_examples
            ids += (f"{ours}_{i:06d}" for i in range(count))
    position = {image_id: i for i, image_id in enumerate(ids)}
    if len(position) < len(ids):
        raise UserError(
            f"{len(ids) - len(position)} images in {builder.data_dir} have the "
            f"{id_key or 'id'} of another one. Set --config.data.id_key='' to number them."
        )
    return position


@functools.lru_cache(maxsize=8)
def _stored_ids(folder: str, split: str, key: str) -> tuple[str, ...]:
    """The ids that a feature holds; every record is read, once in a process."""
    builder = _builder(Path(folder))
    features, records = _features(builder, (key,)), _records(builder, split)
    ids = []
    for i in range(len(records)):
        serialized = _record(records, i, f"The record {i} of {split} in {folder}")
        ids.append(_id(features.deserialize_example_np(serialized)[key]))
    return tuple(ids)


def _id(stored: Any) -> str:
    if not isinstance(stored, bytes):
        return str(stored)
    # As in list files, a file's name counts without its suffix.
    path = PurePosixPath(stored.decode())
    return str(path.with_suffix("") if path.suffix.lower() in (".jpg", ".jpeg", ".png") else path)


def _features(builder: Any, keys: Sequence[str]) -> Any:
    """The features of a set, restricted."""
    present = builder.info.features
    for key in keys:
        if key not in present:
            raise UserError(
                f"The set in {builder.data_dir} has no feature {key!r}; it has "
                f"{', '.join(present)}. Set --config.data.image_key, label_key or id_key."
            )
    return tfds.features.FeaturesDict({key: present[key] for key in keys})


def _refuse_no_image(builder: Any, key: str) -> None:
    feature = builder.info.features[key]
    if not _is_image(feature):
        raise UserError(
            f"The feature {key!r} in {builder.data_dir} is {type(feature).__name__}, no image. Set "
            "--config.data.image_key."
        )


def _is_image(feature: Any) -> bool:
    return isinstance(feature, tfds.features.Image)


def _records(builder: Any, split: str) -> Sequence[bytes]:
    if not split:
        return ()
    try:
        raw = tfds.decode.DeserializeMethod.RAW_BYTES
        return builder.as_data_source(split, deserialize_method=raw)
    except NotImplementedError as error:
        raise UserError(
            f"The set in {builder.data_dir} is stored as {builder.info.file_format.value}, which "
            "has no random access. Prepare it anew with --file_format=array_record, in another "
            "--data_dir."
        ) from error


def _record(records: Sequence[bytes], position: int, where: str) -> bytes:
    try:
        return records[position]
    except (RuntimeError, OSError) as error:
        raise UnreadableError(
            f"{where} cannot be read: {error}. Copy or prepare the set again."
        ) from error


def _class_table(
    settings: Mapping[str, Any], manifest: Mapping[str, Any], label: Any, folder: Path
) -> ClassTable:
    ignore = tuple(settings["ignore"])
    if settings["classes"]:
        return parse(settings["classes"], ignore, "data.classes")
    names = tuple(manifest.get("classes") or getattr(label, "names", None) or ())
    if not 2 <= len(names) <= MOST_CLASSES:
        raise UserError(
            f"{folder} names {len(names)} classes; 2 to {MOST_CLASSES} are possible. Say what the "
            "stored values are, a line each: --config.data.classes=\"('0 background', '1 cat')\"."
        )
    colors = tuple(tuple(color) for color in manifest.get("palette", ())) or (None,) * len(names)
    return ClassTable(names, tuple(range(len(names))), colors, ignore)


def _task(label: Any) -> Any:
    scalar = label is not None and not _is_image(label) and label.shape == ()
    return "classification" if scalar else "segmentation"


def _lookup(table: ClassTable) -> np.ndarray:
    """Stored value -> label; what is beyond the table falls on its end, which no value owns."""
    known = table.labels_of_values()
    lookup = np.full(max(known) + 2, _FOREIGN, np.uint8)
    lookup[list(known)] = list(known.values())
    return lookup


def _values(stored: Any, where: str) -> np.ndarray:
    """Stored values of a label, `[h,w]` or a scalar, none below 0."""
    array = np.asarray(open_image(where, stored) if isinstance(stored, bytes) else stored)
    array = array[..., 0] if array.ndim == 3 and array.shape[-1] == 1 else array
    if array.ndim not in (0, 2) or array.dtype.kind not in "biu":
        raise UserError(
            f"{where}: the label has shape {array.shape} and type {array.dtype}, not one whole "
            "number a pixel. Set --config.data.label_key."
        )
    # TFDS gives the class -1 to images without one.
    return np.where(array < 0, IGNORE_LABEL, array) if array.dtype.kind == "i" else array
