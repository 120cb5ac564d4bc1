"""Training batches whose content is a function of the step, and whole images in order."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import multiprocessing.process
import os
import signal
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grain
import numpy as np
from absl import flags
from grain.experimental import DatasetOptions, WithOptionsIterDataset, ZipMapDataset

from jaxssl.contracts import IGNORE_LABEL, Source, Stream, UnreadableError, UserError
from jaxssl.data import files, quarantine
from jaxssl.data.splits import seeded_order
from jaxssl.data.transforms import Augment, augment, augment_whole, fit


@dataclasses.dataclass(frozen=True)
class Feed:
    """A stream with what it reads.

    Attributes:
      stream: name, batch size, labels and share of the images.
      source: where the images are; its labels are dropped where `stream.labels` is None.
      augment: geometry; the fields in `stream.augment` replace these.
      max_damaged: images that may be unreadable; others stand in for them.
      without: ids of images that are not used.
    """

    stream: Stream
    source: Source
    augment: Augment
    max_damaged: int = 0
    without: Collection[str] = ()


class Batches:
    """Iterates over batches and owns threads and worker processes: close it.

    A batch maps stream names to arrays: `image` uint8 `[b,h,w,3]`, `valid` bool `[b,h,w]`,
    `label` uint8 and `confidence` float32 `[b,h,w]` where there are any, and `index` int32 `[b]`,
    the image's position in its source; b is this process's share of the stream's batch. Where
    labels are classes of whole images, they and `confidence` are `[b]`, and there is no `valid`.
    Never write into the arrays: devices may alias them.
    """

    def __init__(
        self,
        dataset: grain.IterDataset,
        feeds: Sequence[Feed],
        start: int = 0,
        on_damage: Callable[[int, quarantine.Damage], None] | None = None,
    ):
        self._iterator: grain.DatasetIterator | None = iter(dataset)
        self._ids = {feed.stream.name: feed.source.ids for feed in feeds}
        self._next = start
        self._on_damage = on_damage

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> dict[str, dict[str, np.ndarray]]:
        if self._iterator is None:
            raise StopIteration
        try:
            batch = next(self._iterator)
        except UserError as error:
            raise error.with_traceback(None) from None
        except RuntimeError as error:
            if "terminated unexpectedly" not in str(error):
                raise
            code = str(error).partition("exit code ")[2].partition(".")[0]
            raise UserError(
                f"A data worker process died with exit code {code}, often because memory ran out. "
                "Use fewer, --config.data.workers=N, or smaller crops and batches."
            ) from error.with_traceback(None)
        self._tell_damage(batch)
        self._next += 1
        return batch

    def _tell_damage(self, batch: dict[str, dict[str, np.ndarray]]) -> None:
        """Takes what was damaged out of a batch: it is for the host, not for devices."""
        for stream, arrays in batch.items():
            for row in arrays.pop("damaged").tolist():
                for position, message in json.loads(row):
                    damage = quarantine.Damage(stream, self._ids[stream][position], message)
                    if self._on_damage is not None:
                        self._on_damage(self._next, damage)

    def close(self) -> None:
        """Ends threads and worker processes, and the iteration; may be called again."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def batches(
    feeds: Sequence[Feed],
    *,
    seed: int,
    phase_index: int,
    start: int,
    steps: int,
    process_index: int = 0,
    process_count: int = 1,
    workers: int = 0,
    threads: int = 2,
    on_damage: Callable[[int, quarantine.Damage], None] | None = None,
) -> Batches:
    """Makes the batches `start` to `steps` - 1 of a phase.

    Global batch k depends on (seed, phase_index, k) and the feeds alone: not on `start`, workers,
    threads or the number of processes, which take contiguous blocks of its rows in their order.
    Where an image or its label cannot be read, another image of the stream stands, which depends
    on (seed, phase_index, place) alone too; all others stay where they are.

    Args:
      feeds: one per stream; their order matters to the randomness.
      seed: of the run.
      phase_index: of the phase in the run.
      start: first batch.
      steps: batches of the whole phase.
      process_index: which share of every batch to make.
      process_count: hosts that share a batch.
      workers: processes that decode; 0 leaves it to threads.
      threads: that decode, in each worker.
      on_damage: is called with the batch's number and what could not be read, before the batch is
        given; every time that the image's turn comes, in the process that reads it.

    Raises:
      UserError: a batch cannot be shared equally or exceeds its images; while iterating, what a
        source raises (but an UnreadableError only where more images in a row are damaged than
        their feed allows), or a worker died.
    """
    mine = slice(start * process_count + process_index, steps * process_count, process_count)
    streams = [
        _stream(feed, (seed, phase_index, number), steps, process_count)[mine]
        for number, feed in enumerate(feeds)
    ]
    names = tuple(feed.stream.name for feed in feeds)
    dataset = ZipMapDataset(streams).map(_Named(names)).to_iter_dataset(_read_options(threads))
    if workers:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # grain reads absl flags before it starts a worker.
        # Batches come through a pipe, not through shared memory: containers give that 64 MB by
        # default, and a thread of grain's that frees it can be cut short by the interpreter's exit.
        dataset = WithOptionsIterDataset(dataset, DatasetOptions(min_shm_size=sys.maxsize))
        dataset = dataset.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=workers), worker_init_fn=_follow_parent
        )
    return Batches(dataset, feeds, start, on_damage)


def in_order(
    source: Source,
    batch_size: int,
    *,
    bucket: int = 1,
    center: tuple[int, int] | None = None,
    process_index: int = 0,
    process_count: int = 1,
    threads: int = 2,
    on_damage: Callable[[int, str], None] | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Gives every image once, for evaluation and sweeps.

    Images of one size come in order. Others wait for more of their size, so at most
    `batch_size` - 1 images of each size are held; `index` says which image a row is. Images stand
    at the top left; what is not image has `valid` False and `label` 255. Where fewer are left than
    a batch takes, it is filled with such rows of `index` -1. Several processes take contiguous
    blocks of every global batch, and all get the same number of batches.

    Where labels are classes of whole images, `label` and `valid` are `[b]`, and no image is padded:
    then `center` is what makes sizes alike.

    Args:
      source: of images `[h,w,3]`.
      batch_size: images in the global batch.
      bucket: height and width are padded to multiples of this, so that sizes become fewer.
      center: (height, width) of the central window to give instead of the image; all become that
        size. An image with a class as a whole is resized before, to just cover it.
      process_index: which share of every batch to give.
      process_count: hosts that share a batch.
      threads: that decode.
      on_damage: is called, by any of them, with the position of an image that cannot be read and
        the reason, and the image is left out; None raises what the source raises.

    Yields:
      `image` uint8 `[b,h,w,3]`, `valid` bool `[b,h,w]`, `label` uint8 `[b,h,w]` if the source
      has labels, and `index` int32 `[b]`; see above for classification.

    Raises:
      UserError: a batch cannot be shared equally, several processes meet images that differ in
        size, or what the source raises.
    """
    rows = _share("The evaluation batch", batch_size, process_count)
    firsts = range(process_index * rows, len(source), batch_size)
    mine = [i for first in firsts for i in range(first, min(first + rows, len(source)))]
    read = _Whole(source, center)
    multiple = 1 if _is_whole(source) else bucket

    def padded(record: Mapping[str, np.ndarray]) -> tuple[int, ...]:
        sides = record["image"].shape[:2]
        return center or tuple(-(-side // multiple) * multiple for side in sides)

    # What every process knows tells each of them that sizes differ or that its share is empty.
    template = read(0) if process_count > 1 and len(source) else None
    reader = read if on_damage is None else _Telling(read, on_damage)
    images: Any = grain.MapDataset.source(mine).map(reader)
    dataset = images.to_iter_dataset(_read_options(threads))
    waiting: dict[tuple[int, ...], list[dict[str, np.ndarray]]] = {}
    with contextlib.closing(iter(dataset)) as records:
        for record in records:
            size = padded(record)
            if template is not None and size != padded(template):
                raise UserError(
                    f"Images differ in size: {template['image'].shape[:2]} and "
                    f"{record['image'].shape[:2]}. Several processes need images of one size; use "
                    "a single process."
                )
            waiting.setdefault(size, []).append(record)
            if len(waiting[size]) == rows:
                yield _collate(record, waiting.pop(size), rows, size)
    for size, group in waiting.items():
        yield _collate(group[0], group, rows, size)
    if template is not None and len(firsts) * batch_size < len(source):
        yield _collate(template, [], rows, padded(template))


def filled(valid: np.ndarray) -> tuple[slice, ...]:
    """Which part of a row of `in_order` is image, from its `valid`: of `[h,w]` two slices, of a
    scalar none, so that either takes labels and all that is shaped like them.
    """
    return tuple(slice(int(valid.any(1 - axis).sum())) for axis in range(valid.ndim))


def check_all(source: Source, name: str) -> None:
    """Opens every image and label of a source once, several at a time.

    Evaluation needs all of its images, as scores on others would not compare, so it ends at the
    first that cannot be read; this finds all of them before a training.

    Args:
      source: with or without labels.
      name: of the source, for the message.

    Raises:
      UserError: says which cannot be read, and why.
    """

    def reason(position: int) -> str | None:
        try:
            source[position]
        except UserError as error:
            return str(error)
        return None

    with ThreadPoolExecutor() as pool:
        reasons = [why for why in pool.map(reason, range(len(source))) if why is not None]
    if reasons:
        raise UserError(
            f"{len(reasons)} of {len(source)} image(s) of {name!r} or their labels cannot be read. "
            "Scores need all of them: mend them, or take them out with their labels, and start the "
            f"same command again.{files.listed(reasons)}"
        )


@dataclasses.dataclass(frozen=True)
class _Augmented:
    """Place in the endless stream -> augmented arrays of the image there."""

    feed: Feed
    positions: np.ndarray
    augment: Augment
    seed: int

    def __call__(self, place: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        position, record, damaged = self._read(place)
        if self.feed.stream.labels is None:
            record.pop("label", None)
        # What a worker process notes comes back with the batch alone; text, as rows must stack.
        note = np.array(json.dumps(damaged))
        change = augment_whole if _is_whole(self.feed.source) else augment
        arrays = change(record, self.augment, rng)
        return arrays | {"index": np.int32(position), "damaged": note}

    def _read(self, place: int) -> tuple[int, dict[str, Any], list[tuple[int, str]]]:
        """The first candidate that can be read, and (position, message) of those before it."""
        damaged: dict[int, str] = {}
        for position in self._candidates(place):
            if position in damaged:
                continue
            try:
                return position, dict(self.feed.source[position]), list(damaged.items())
            except UnreadableError as error:
                damaged[position] = str(error)
            if len(damaged) > self.feed.max_damaged:
                break
        name, limit = self.feed.stream.name, self.feed.max_damaged
        raise quarantine.too_many(name, limit, [*damaged.values()])

    def _candidates(self, place: int) -> Iterator[int]:
        """The position whose turn it is, then all of them in an order of this place's own."""
        count = len(self.positions)
        epoch, turn = divmod(place, count)
        yield int(self.positions[_order(count, self.seed, epoch)[turn]])
        # Three numbers, because the order of an epoch comes from two.
        rng = np.random.default_rng([self.seed, place, count])
        yield from rng.permutation(self.positions).tolist()


@functools.lru_cache(maxsize=8)
def _order(count: int, seed: int, epoch: int) -> np.ndarray:
    # grain's own shuffle takes milliseconds an image where there are only tens of them.
    return np.random.default_rng([seed, epoch]).permutation(count)


@dataclasses.dataclass(frozen=True)
class _Whole:
    """Position -> arrays of the whole image there, or of its central window."""

    source: Source
    center: tuple[int, int] | None = None

    def __call__(self, position: int) -> dict[str, np.ndarray]:
        record: dict[str, Any] = dict(self.source[int(position)])
        arrays = {name: record[name] for name in ("image", "label") if name in record}
        if _is_whole(self.source):
            arrays["valid"] = np.array(True)
            if self.center is not None:
                arrays["image"] = fit(arrays["image"], self.center)
        else:
            arrays["valid"] = np.ones(arrays["image"].shape[:2], bool)
            if self.center is not None:
                window = tuple(map(_middle, arrays["valid"].shape, self.center))
                arrays = {name: array[window] for name, array in arrays.items()}
        return arrays | {"index": np.array(position, np.int32)}


@dataclasses.dataclass(frozen=True)
class _Telling:
    """As `_Whole`, but an image that cannot be read is told, and left out: grain skips None."""

    read: _Whole
    on_damage: Callable[[int, str], None]

    def __call__(self, position: int) -> dict[str, np.ndarray] | None:
        try:
            return self.read(position)
        except UnreadableError as error:
            self.on_damage(int(position), str(error))
            return None


@dataclasses.dataclass(frozen=True)
class _Named:
    """A tuple of streams -> a dict of them."""

    names: tuple[str, ...]

    def __call__(self, streams: Sequence[Any]) -> dict[str, Any]:
        return dict(zip(self.names, streams, strict=True))


def check(feed: Feed, seed: int, process_count: int = 1) -> None:
    """Raises the UserError that `batches` would raise for this feed."""
    _share(f"The batch of the stream {feed.stream.name!r}", feed.stream.batch, process_count)
    _positions(feed, seed)


def _stream(
    feed: Feed, entropy: tuple[int, int, int], steps: int, process_count: int
) -> grain.MapDataset:
    """One stream's local batches, those of all processes in turn."""
    stream = feed.stream
    rows = _share(f"The batch of the stream {stream.name!r}", stream.batch, process_count)
    order_seed, augment_seed = np.random.SeedSequence(entropy).generate_state(2).tolist()
    read = _Augmented(
        feed,
        _positions(feed, seed=entropy[0]),
        dataclasses.replace(feed.augment, **stream.augment),
        seed=order_seed,
    )
    # The seed is explicit because one that grain derives changes with the number of operations;
    # the random map stands before batching and slicing because its numbers follow the place.
    return (
        grain.MapDataset.range(steps * stream.batch).random_map(read, seed=augment_seed).batch(rows)
    )


def _positions(feed: Feed, seed: int) -> np.ndarray:
    """Where the images that are used stand in the source."""
    stream, ids, without = feed.stream, feed.source.ids, set(feed.without)
    if not ids:
        raise UserError(
            f"There are no images for the stream {stream.name!r}. Add some; or set "
            "--config.data.split to the number of labels to keep, fewer than there are; "
            "configs/supervised_*.py need no unlabeled images."
        )
    begin, end = (round(share * len(ids)) for share in stream.part)
    chosen = set(seeded_order(ids, seed)[begin:end]) - without
    positions = np.flatnonzero([image_id in chosen for image_id in ids]).astype(np.int32)
    if stream.batch > len(positions):
        raise UserError(
            f"The batch of the stream {stream.name!r} takes {stream.batch} images, but there are "
            f"only {len(positions)}. Set --config.batch.{stream.name}=N to that many or fewer, or "
            "choose another --config.data.split."
        )
    return positions


def _is_whole(source: Source) -> bool:
    """Whether a label is a class of the whole image."""
    return source.info.task == "classification"


def _share(what: str, batch: int, process_count: int) -> int:
    if batch < 1 or batch % process_count:
        raise UserError(
            f"{what} has {batch} images, which {process_count} process(es) cannot share equally. "
            f"Choose a multiple of {process_count}."
        )
    return batch // process_count


def _read_options(threads: int) -> grain.ReadOptions:
    return grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(threads, 1))


def _middle(size: int, window: int) -> slice:
    """The central `window` of `size` pixels, or all where there are fewer."""
    start = max(0, size - window) // 2
    return slice(start, start + window)


def _collate(
    like: Mapping[str, np.ndarray],
    records: Sequence[Mapping[str, np.ndarray]],
    rows: int,
    size: tuple[int, ...],
) -> dict[str, np.ndarray]:
    """Stacks records such as `like`, filled up to `rows` and to `size` with padding."""
    padding = {"image": 0, "valid": False, "label": IGNORE_LABEL, "index": -1}
    batch = {}
    for name, array in like.items():
        shape = (*size, *array.shape[2:]) if array.ndim else ()
        batch[name] = np.full((rows, *shape), padding[name], array.dtype)
        for row, record in enumerate(records):
            place = tuple(map(slice, record[name].shape))[:2]
            batch[name][(row, *place)] = record[name]
    return batch


def _follow_parent(worker: int, count: int) -> None:
    """Lets a worker process end with its parent, and not by the terminal's signals."""
    del worker, count
    # Ctrl-C and a scheduler's SIGTERM reach the whole process group; the parent decides when to
    # stop, and needs its batches until then.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    parent = multiprocessing.process.parent_process()
    if parent is not None:
        threading.Thread(target=_exit_after, args=(parent,), daemon=True).start()


def _exit_after(process: multiprocessing.process.BaseProcess) -> None:
    # grain does not watch its parent: without this, a killed trainer leaves its workers behind.
    process.join()
    os._exit(1)
