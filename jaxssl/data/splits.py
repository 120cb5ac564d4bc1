"""Which training images are labeled: seeded shares, published list files, fingerprints."""

from __future__ import annotations

import collections
import csv
import dataclasses
import functools
import hashlib
import importlib.resources
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from jaxssl.contracts import UserError

SEEDED_FAMILY = "jaxssl"
"""Family of the splits that `make` draws."""


@dataclasses.dataclass(frozen=True)
class Split:
    """Labeled and unlabeled training images, as a run stores them in `splits.json`.

    Attributes:
      labeled: sorted ids.
      unlabeled: sorted ids.
      family: where the split comes from, such as "u2pl 186 labeled (...)" or "jaxssl 1_16".
      seed: of a seeded split; None where a list file decided.
      note: what the reader says of the labels, such as "662 labels: 133 fine, 529 coarse".
      holdout: sorted ids of training images that nothing learns from: they choose the best
        checkpoint where the validation images are to be a test set.
    """

    labeled: tuple[str, ...]
    unlabeled: tuple[str, ...]
    family: str
    seed: int | None = None
    note: str = ""
    holdout: tuple[str, ...] = ()

    @property
    def hash(self) -> dict[str, str]:
        """Fingerprints of the id sets; an empty holdout has none."""
        sets = {"labeled": self.labeled, "unlabeled": self.unlabeled, "holdout": self.holdout}
        return {name: fingerprint(ids) for name, ids in sets.items() if ids or name != "holdout"}

    def to_json(self) -> str:
        """The text of `splits.json`."""
        values = dataclasses.asdict(self) | {"hash": self.hash}
        if not self.holdout:
            del values["holdout"]
        return json.dumps(values, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Split:
        """Reads `to_json`'s text.

        Raises:
          UserError: it is damaged, or the ids do not have the stored hash.
        """
        advice = "Restore the file, or start in a new workdir."
        try:
            stored = {"holdout": (), **json.loads(text)}
            expected = stored.pop("hash")
            sets = ("labeled", "unlabeled", "holdout")
            ids = {name: tuple(stored.pop(name)) for name in sets}
            split = cls(**ids, **stored)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"splits.json is damaged ({error!r}). {advice}") from error
        if split.hash != expected:
            raise UserError(f"splits.json: its ids do not have the hash beside them. {advice}")
        return split


def choose(
    config_data: Mapping[str, Any],
    ids: Sequence[str],
    extra: Sequence[str] = (),
    classes: Mapping[str, int] | None = None,
) -> Split:
    """Splits training images as the config says.

    Args:
      config_data: `split` and `seed` draw the labeled images, unless the file `labeled_list`
        names them; the unlabeled images are the others, unless the file `unlabeled_list` names
        them. `overlap` True leaves the labeled images among the unlabeled ones. `validation` is how
        many images are held out; they are neither.
      ids: all training images.
      extra: further images that only the unlabeled set gets.
      classes: class of each training image, where images have one as a whole; as many of each are
        drawn then. One that is missing is never drawn.

    Raises:
      UserError: a list cannot be read or names unknown images, or a set is empty, or the sets
        overlap.
    """
    share, seed = str(config_data["split"]), config_data["seed"]
    labeled_list, unlabeled_list = (
        config_data.get("labeled_list"),
        config_data.get("unlabeled_list"),
    )
    overlap = bool(config_data.get("overlap"))
    listed = read_list(labeled_list, ids) if labeled_list else ()
    count = config_data.get("validation") or 0
    held = hold_out(set(ids) - set(listed), count, seed, classes)
    if labeled_list:
        labeled = listed
        family = recognize(labeled) or f"list {labeled_list}"
    else:
        labeled, _ = make(ids, share, seed, overlap=overlap, classes=classes, holdout=held)
        family = f"{SEEDED_FAMILY} {share}" + (" by class" if classes is not None else "")
    if unlabeled_list:
        unlabeled = read_list(unlabeled_list, [*ids, *extra])
    else:
        unlabeled = tuple(sorted({*ids, *extra} - (set() if overlap else set(labeled))))
    unlabeled = tuple(sorted(set(unlabeled) - set(held)))
    if not overlap:
        _refuse_overlap(labeled, unlabeled)
    return Split(labeled, unlabeled, family, None if labeled_list else seed, holdout=held)


def make(
    ids: Iterable[str],
    split: str,
    seed: int,
    *,
    overlap: bool = False,
    classes: Mapping[str, int] | None = None,
    holdout: Collection[str] = (),
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Draws the labeled images by id, so that the order of the files plays no part.

    Splits of one seed are nested: the images of 1_16 are among those of 1_8. What is held out does
    not change which images are labeled, unless it takes them.

    Args:
      ids: all training images.
      split: a share of them such as "1_16", rounded half up; a count such as "100"; or "all".
      seed: another seed gives other images.
      overlap: whether the labeled images are unlabeled ones as well.
      classes: of the images that may be labeled: as many of each class are, but for a remainder
        and for classes that have no more. None draws without heed to classes.
      holdout: images that are neither labeled nor unlabeled.

    Returns:
      Sorted labeled and unlabeled ids. "all" leaves no unlabeled ones, without overlap.

    Raises:
      UserError: the split cannot be understood, or leaves no labeled or no unlabeled image.
    """
    everything, held = seeded_order(ids, seed), set(holdout)
    order = [i for i in everything if i not in held and (classes is None or i in classes)]
    count = _labeled_count(split, len(everything), len(order))
    labeled = set(_by_turns(order, classes)[:count])
    unlabeled = set(everything) - held - (set() if overlap else labeled)
    if not labeled or not (unlabeled or split == "all"):
        raise UserError(
            f"data.split={split} leaves {len(labeled)} labeled and {len(unlabeled)} unlabeled of "
            f"{len(everything)} images. Choose another share or count, or all for supervised "
            "training."
        )
    return tuple(sorted(labeled)), tuple(sorted(unlabeled))


def hold_out(
    ids: Iterable[str], count: int, seed: int, classes: Mapping[str, int] | None = None
) -> tuple[str, ...]:
    """Draws images that nothing is to learn from: of each class those that `make` takes last.

    Args:
      ids: of the images.
      count: how many.
      seed: another seed gives other images.
      classes: as for `make`.

    Raises:
      UserError: nothing would be left, or nothing of a class.
    """
    if not count:
        return ()
    order = [i for i in seeded_order(ids, seed) if classes is None or i in classes]
    if not 0 < count < len(order):
        raise UserError(
            f"data.validation={count} cannot be held out of {len(order)} training images with "
            "labels. Choose fewer, or 0 for none."
        )
    held = set(_by_turns(order[::-1], classes)[:count])
    if classes is not None:
        left = {classes[image_id] for image_id in order if image_id not in held}
        if gone := sorted({classes[image_id] for image_id in held} - left):
            raise UserError(
                f"data.validation={count} takes all images of {len(gone)} class(es), such as "
                f"number {gone[0]}, counted from 0. Choose fewer, or 0 for none."
            )
    return tuple(sorted(held))


def _by_turns(ids: Iterable[str], classes: Mapping[str, int] | None) -> list[str]:
    """The first of each class, then the second of each, and so on; else in the order given."""
    if classes is None:
        return list(ids)
    seen = collections.Counter()
    turns: dict[str, int] = {}
    for image_id in ids:
        turns[image_id] = seen[classes[image_id]]
        seen[classes[image_id]] += 1
    return sorted(turns, key=turns.__getitem__)


def seeded_order(ids: Iterable[str], seed: int) -> tuple[str, ...]:
    """Ids without duplicates in the order of the SHA-256 of "<seed>/<id>"."""
    return tuple(sorted(set(ids), key=lambda i: hashlib.sha256(f"{seed}/{i}".encode()).digest()))


def read_list(path: str | Path, known: Iterable[str]) -> tuple[str, ...]:
    """Reads the ids of a list file, sorted and without duplicates.

    A line holds an id, an image path, or an image path and a label path. Of a path, the extension,
    `_leftImg8bit` and the folders that it begins with do not count where the id has none.

    Args:
      path: of the file.
      known: ids of the data set.

    Raises:
      UserError: the file cannot be read, or names no image or unknown ones.
    """
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"The list {path} cannot be read as text: {error}. Check its path."
        ) from error
    known = frozenset(known)
    ids = {_image_id(line.strip(), known) for line in lines if line.strip()}
    if not ids:
        raise UserError(f"The list {path} names no image. Give a file with one image a line.")
    return known_ids(ids, known, str(path))


def known_ids(ids: Iterable[str], known: Iterable[str], where: str = "The data") -> tuple[str, ...]:
    """Sorts ids after making sure that all are known.

    Args:
      ids: to look up.
      known: ids of a source.
      where: what named `ids`, for the message.

    Raises:
      UserError: some are unknown.
    """
    wanted, known = tuple(sorted(set(ids))), frozenset(known)
    unknown = sorted(set(wanted) - known)
    if unknown:
        raise UserError(
            f"{where}: {len(unknown)} of {len(wanted)} image ids are not in the data set, such as "
            f"{', '.join(unknown[:3])}. Its ids are such as {', '.join(sorted(known)[:3])}."
        )
    return wanted


def fingerprint(ids: Iterable[str]) -> str:
    """The first 16 hex digits of the SHA-256 of the sorted distinct ids, joined by newlines."""
    return hashlib.sha256("\n".join(sorted(set(ids))).encode()).hexdigest()[:16]


def recognize(ids: Iterable[str]) -> str | None:
    """Names the published lists with these ids, such as "cps 1-16 labeled (<file>)", or None."""
    return _published().get(fingerprint(ids))


@functools.cache
def _published() -> dict[str, str]:
    table = importlib.resources.files("jaxssl.data").joinpath("published_splits.csv")
    names: dict[str, list[str]] = {}
    for row in csv.DictReader(table.read_text(encoding="utf-8").splitlines()):
        names.setdefault(row["fingerprint"], []).append(
            f"{row['family']} {row['name']} ({row['file']})"
        )
    return {key: "; ".join(lists) for key, lists in names.items()}


def _image_id(line: str, known: Collection[str]) -> str:
    """The id that a line of a list means; where none is known, the name in its first column."""
    ends = [match.end() for match in re.finditer(r"\.\w+(?=[\s,])", line)]  # of paths with spaces
    first = re.split(r"[\s,]", line)[0]
    for column in (line, *(line[:end] for end in ends), first):
        for name in (column, _without_ends(column)):
            if found := next((tail for tail in _tails(name) if tail in known), None):
                return found
    return _without_ends(first).rpartition("/")[2]


def _without_ends(path: str) -> str:
    return path.removesuffix(PurePosixPath(path).suffix).removesuffix("_leftImg8bit")


def _tails(path: str) -> Iterator[str]:
    """A path, and what is left of it without the folders that it begins with."""
    yield path
    while folder := re.match(r"[^\s,/]*/", path):  # beyond a space, another column may begin
        path = path[folder.end() :]
        yield path


def _labeled_count(split: str, total: int, most: int) -> int:
    """How many of `total` images a split means, of which `most` may be labeled."""
    if split == "all":
        return most
    if share := re.fullmatch(r"(\d+)_([1-9]\d*)", split):
        part, whole = int(share[1]), int(share[2])
        count = (2 * total * part + whole) // (2 * whole)
    elif split.isdecimal():
        count = int(split)
    else:
        raise UserError(
            f"data.split={split!r} is not understood. Use a share such as 1_16, a count such as "
            "100, or all."
        )
    if count > most:
        raise UserError(f"data.split={split} asks for {count} labeled images; there are {most}.")
    return count


def _refuse_overlap(labeled: Sequence[str], unlabeled: Sequence[str]) -> None:
    both = sorted(set(labeled) & set(unlabeled))
    if both:
        raise UserError(
            f"{len(both)} images are labeled and unlabeled at once, such as {both[0]}. Mend "
            "data.labeled_list and data.unlabeled_list, or allow it with --config.data.overlap."
        )
