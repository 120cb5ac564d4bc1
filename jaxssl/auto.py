"""Settings that follow from the data, where a config leaves them open."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from jaxssl import config as configs
from jaxssl.config import Config
from jaxssl.contracts import Source, UnreadableError, UserError
from jaxssl.data import folder, layouts, loading, masks
from jaxssl.data.folder import Facts
from jaxssl.data.masks import ClassTable

PASSES = 100
"""Times that training shows an image, within the limits of steps."""

EVAL_LOGITS = 2**26
"""Logits of an evaluation batch at most: 256 MB of float32."""

SAMPLE = 50
"""Images of a split that are opened for their sizes, where that takes reading all of them."""


@dataclasses.dataclass(frozen=True)
class Given(Facts):
    """What settings follow from.

    Attributes:
      devices: that share a batch, those of all processes.
    """

    devices: int = 1


def resolve(
    config: Config, workdir: str | Path | None, say: Callable[[str], None], devices: int = 1
) -> Config:
    """Decides what a config with `limits` leaves open: by the data; in a workdir as its run did, so
    that it goes on as it began.

    Args:
      config: is not changed. What it says itself stays.
      workdir: of the run to go on with; None looks at the data alone.
      say: prints a line.
      devices: that share a batch, those of all processes.

    Raises:
      UserError: as `config.check`; the data are missing or wrong, or the classes were edited.
    """
    configs.check(config)
    if "limits" not in config:
        return config
    stored = None if workdir is None else Path(workdir).expanduser() / "config.json"
    if stored is not None and stored.exists():
        before = _decided(stored)
        _refuse_other_classes(config.data, before["data.classes"], stored)
        return _filled(config, before)
    facts = folder.look(config.data) if config.data.name == "folder" else _look(config.data)
    result, lines = choose(config, facts, devices)
    for line in (*facts.notes, *lines):
        say(line)
    return result


def _decided(stored: Path) -> dict[str, Any]:
    """What the run of a workdir decided."""
    try:
        before = json.loads(stored.read_text())
        return {key: _get(before, key) for key in RULES}
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{stored} is not of a run with such a config, or damaged. Choose another --workdir."
        ) from error


def _refuse_other_classes(data: Config, before: list[str], stored: Path) -> None:
    """Refuses a class table that was edited since, as it would not be heeded."""
    path = Path(data.root or "").expanduser() / folder.CLASSES_FILE
    if data.name != "folder" or data.classes or not path.exists():
        return
    table, _ = folder.class_table(data, layouts.find(data.root))
    for now, then in itertools.zip_longest(table.lines, before):
        if now != then:
            raise UserError(
                f"{path} now says {now or 'nothing'} where the run in {stored.parent} began with "
                f"{then or 'nothing'}. Set the file (or data.ignore) back to go on, or choose "
                "another --workdir."
            )


def _look(data: Config) -> Facts:
    """Looks at a set of any reader, by opening some of its images."""
    _, sources = loading.training_sets(data)
    labeled, unlabeled = sources["labeled"], sources["unlabeled"]
    train, val = (loading.load(data, split, labels=False) for split in ("train", "val"))
    sizes = tuple(size for source in (train, unlabeled, val) for size in _sizes(source))
    if not sizes:
        raise UserError(f"No image in {data.root} can be read. Copy or prepare them again.")
    info = labeled.info
    table = ClassTable(info.classes, tuple(range(info.num_classes)), info.palette)
    return Facts(len(labeled), len(unlabeled), sizes, table.lines, ())


def _sizes(source: Source) -> list[tuple[int, int]]:
    """Sizes of up to `SAMPLE` images, evenly spaced; damaged ones are left out."""

    def size(index: int) -> tuple[int, int] | None:
        try:
            height, width, _ = source[index]["image"].shape
        except UnreadableError:
            return None
        return height, width

    every = max(1, -(-len(source) // SAMPLE))
    with ThreadPoolExecutor(4) as pool:
        return [found for found in pool.map(size, range(0, len(source), every)) if found]


def choose(config: Config, facts: Facts, devices: int = 1) -> tuple[Config, list[str]]:
    """Decides what a config leaves open by what the data are; pure.

    Args:
      config: its `limits` bound the sides of the `crop`, the `batch` and the `steps`.
      facts: of the data.
      devices: that share a batch.

    Returns:
      The config, and what was chosen and why, a line each.
    """
    given, lines = Given(**vars(facts), devices=devices), []
    for key, rule in RULES.items():
        if _is_open(_get(config, key)):
            value, why = rule(config, given)
            config = _filled(config, {key: value})
            if value is not None:
                lines.append(f"chosen from the data: {key} {_words(value)} ({why})")
    return config, lines


def size_range(sizes: Iterable[tuple[int, int]]) -> str:
    """Such as "240x320 to 480x640", each side for itself; "-" where there is no size."""
    sides = [f"{min(side)} {max(side)}".split() for side in zip(*sizes, strict=True)]
    ends = ["x".join(side) for side in zip(*sides, strict=True)]
    return " to ".join(dict.fromkeys(ends)) or "-"


def _crop(config: Config, facts: Facts) -> tuple[tuple[int, int], str]:
    """Sides that nine of ten images have, in steps of 32 as the networks halve them five times."""
    sizes, limit = np.array(facts.sizes), config.limits.crop
    low = np.quantile(sizes, 0.1, axis=0, method="lower")
    height, width = (min(limit, int(side) // 32 * 32 or int(side)) for side in low)
    return (height, width), f"images are {size_range(facts.sizes)}"


def _batch(config: Config, given: Given) -> tuple[int, str]:
    """For all methods alike: what learns from the labels alone stays comparable."""
    batch, note = _shared(config, given, given.labeled, config.limits.batch)
    return batch, f"there are {given.labeled} labeled images{note}"


def _unlabeled_batch(config: Config, given: Given) -> tuple[int, str]:
    if not 0 < given.unlabeled < config.batch.labeled:
        return config.batch.labeled, "as many as labeled ones"
    batch, note = _shared(config, given, given.unlabeled, config.batch.labeled)
    return batch, f"there are {given.unlabeled} unlabeled images{note}"


def _shared(config: Config, given: Given, images: int, limit: int) -> tuple[int, str]:
    """A power of two within the limit, or what the devices can share instead, and a note on that:
    the next such number, even beyond the limit, or the last one that there are images for.

    Where images do not go round the devices, `sharding.check_batch` has to say so.
    """
    wanted = 1 << min(images, limit).bit_length() - 1
    part = config.batch.accumulate * given.devices
    fitting = min(-(-wanted // part), images // part) * part
    if fitting in (0, wanted):
        return wanted, ""
    return fitting, f", and multiples of {part} split evenly"


def _steps(config: Config, facts: Facts) -> tuple[int | None, str]:
    if config.epochs is not None:
        return None, "epochs decide"
    most = config.limits.steps
    wanted = PASSES * max(facts.labeled, facts.unlabeled) // config.batch.labeled
    return min(max(wanted, most // 4), most), f"{PASSES} passes, from {most // 4} to {most} steps"


def _warmup(config: Config, facts: Facts) -> tuple[int, str]:
    """Networks without any features have nothing to teach each other.

    Those with ImageNet features do without a warm-up, as the papers of CPS and MKD do.
    """
    del facts
    if any(section.get("pretrained") for section in (config.model, config.model_a)):
        return 0, "the networks begin with pretrained features"
    return config.steps or config.limits.steps // 4, "the networks begin with random weights"


def _eval_mode(config: Config, facts: Facts) -> tuple[str, str]:
    if (np.array(facts.sizes) <= 2 * np.array(config.crop)).all():
        return "whole", "no image is more than twice as large as the crop"
    return "slide", "images are more than twice as large as the crop"


def _eval_batch(config: Config, facts: Facts) -> tuple[int, str]:
    shown = np.array(facts.sizes).prod(1).max()
    count = _class_count(facts)
    batch = max(1, min(16, EVAL_LOGITS // (int(shown) * count)))
    return batch, f"images of up to {shown / 1e6:.2g} megapixels, {count} classes"


def _eval_every(config: Config, facts: Facts) -> tuple[int, str]:
    del facts
    steps = config.warmup + (config.steps or config.limits.steps)
    return max(1, steps // 20), "twenty times in warm-up and one phase"


def _classes(config: Config, facts: Facts) -> tuple[tuple[str, ...], str]:
    del config
    return facts.classes, f"{_class_count(facts)} classes"


def _class_count(facts: Facts) -> int:
    """Lines of the class table may also say what to ignore."""
    return len(masks.parse(facts.classes, (), "classes").names)


RULES: Mapping[str, Callable[[Config, Given], tuple[Any, str]]] = {
    "crop": _crop,
    "batch.labeled": _batch,
    "batch.unlabeled": _unlabeled_batch,
    "steps": _steps,
    "warmup": _warmup,
    "eval.mode": _eval_mode,
    "eval.batch": _eval_batch,
    "eval.every": _eval_every,
    "data.classes": _classes,
}
"""How each key that may be open is decided; later rules see what earlier ones decided."""


def _filled(config: Config, values: Mapping[str, Any]) -> Config:
    """A copy in which keys that are open have these values."""
    result = copy.deepcopy(config)
    for key, value in values.items():
        if _is_open(_get(config, key)) and value is not None:
            value = tuple(value) if isinstance(value, list) else value  # as JSON gives tuples back
            result.update_from_flattened_dict({key: value})
    return result


def _get(config: Mapping[str, Any], key: str) -> Any:
    section, _, name = key.rpartition(".")
    return (config[section] if section else config)[name]


def _is_open(value: Any) -> bool:
    return value is None or value == ()


def _words(value: Any) -> str:
    if isinstance(value, tuple) and all(isinstance(side, int) for side in value):
        return "x".join(map(str, value))
    if isinstance(value, tuple):
        return ", ".join(value[:6]) + (f", ... {value[-1]}" if len(value) > 6 else "")
    return str(value)
