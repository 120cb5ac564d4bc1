"""Configs: their defaults, the words that vary them, and what a run may be resumed with."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from absl import flags
from ml_collections import ConfigDict, config_dict, config_flags

from jaxssl.contracts import UserError

Config: TypeAlias = Any
"""A ConfigDict. Its attributes are known at run time alone, so type checkers see nothing in it."""

MAY_CHANGE = frozenset(
    {
        "checkpoint",
        "compilation_cache",
        "data.max_damaged",
        "data.root",
        "data.threads",
        "data.workers",
        "distributed",
        "eval",
        "log",
        "max_skipped",
        "next",
    }
)
"""Keys (or sections) that do not change what is computed: a run may be resumed with others."""

LEAST: Mapping[str, int] = {
    "steps": 1,
    "epochs": 0,
    "warmup": 0,
    "batch.labeled": 1,
    "batch.unlabeled": 1,
    "batch.accumulate": 1,
    "data.workers": 0,
    "data.threads": 0,
    "limits.crop": 1,
    "limits.batch": 1,
    "limits.steps": 1,
    "optimizer.warmup_steps": 0,
    "eval.bucket": 1,
    "eval.batch": 1,
    "eval.watch": 0,
    "eval.panels": 0,
    "max_skipped": 0,
}
"""The least that numbers may be."""


def default() -> Config:
    """Every key there is; a config file changes some and adds `method`."""
    model = ConfigDict(
        {
            "name": "deeplab_v3plus",
            "backbone": "resnet50",
            "pretrained": "",
            "width": 64,
            "stem": "deep",
            "output_stride": 16,
            "multi_grid": (1, 1, 1),
            "separable": True,
            "aspp_rates": (6, 12, 18),
            "channels": 256,
            "low_level_channels": 48,
            "auxiliary": False,
            "dropout": 0.0,
            "align_corners": False,
            "batch_norm_momentum": 0.1,
            "stochastic_depth": 1.0,
            "dtype": "float32",
            "remat": False,
        }
    )
    return ConfigDict(
        {
            "seed": 0,
            "steps": config_dict.placeholder(int),
            "epochs": config_dict.placeholder(float),
            "warmup": 0,
            "crop": (512, 1024),
            "batch": {"labeled": 16, "unlabeled": 16, "accumulate": 1},
            "augment": {"scale": (0.5, 2.0), "flip": True},
            "data": {
                "name": "cityscapes",
                "root": "data/cityscapes",
                "split": "1_16",
                "seed": 0,
                "labeled_list": "",
                "unlabeled_list": "",
                "overlap": False,
                "extra": False,
                "workers": 0,
                "threads": 4,
                "max_damaged": config_dict.placeholder(int),
            },
            "model": model,
            "model_a": _overrides(model),
            "model_b": _overrides(model),
            "method": {"name": ""},
            "optimizer": {
                "name": "sgd",
                "learning_rate": 0.01,
                "momentum": 0.9,
                "nesterov": False,
                "weight_decay": 5e-4,
                "decay_norm_and_bias": True,
                "head_factor": 1.0,
                "clip_norm": 0.0,
                "schedule": "poly",
                "power": 0.9,
                "warmup_steps": 0,
            },
            "eval": {
                "every": 2000,
                "mode": "whole",
                "window": (),
                "stride": (),
                "flip": False,
                "scales": (1.0,),
                "bucket": 32,
                "batch": 4,
                "watch": 50,
                "panels": 4,
            },
            "checkpoint": {"every": 1000},
            "log": {"every": 50, "tensorboard": True},
            "max_skipped": 20,
            "next": ("the same with --config.seed=1 and another --workdir, to see the spread",),
            "distributed": "auto",
            "compilation_cache": "auto",
        }
    )


def _overrides(model: Config) -> Config:
    """The keys of `model`, all unset: a student takes the model's value."""
    return ConfigDict({key: config_dict.placeholder(type(value)) for key, value in model.items()})


def model_of(config: Config, student: str) -> dict[str, Any]:
    """The model section as one student has it: `model`, and what `model_<student>` sets."""
    own = config.get(f"model_{student}", ConfigDict())
    return {**config.model, **{key: value for key, value in own.items() if value is not None}}


def cityscapes(variant: Mapping[str, str | None]) -> Config:
    """What a variant of a Cityscapes config says, but for the method: the default config with what
    MKD's paper says of Cityscapes, where the number of steps is ours; or the street scenes.

    Args:
      variant: from `choose`: "split", 1_16 if None; "backbone" "r50" (if None), "r101" or
        "pretrained"; "data" "streets" or None; "budget" "long" or None.

    Raises:
      UserError: a long budget of other data than the street scenes.
    """
    config = default()
    config.steps = 80_000
    config.data.split = variant["split"] or "1_16"
    config.model.backbone = "resnet101" if variant["backbone"] == "r101" else "resnet50"
    config.model.batch_norm_momentum = 0.001
    config.optimizer.learning_rate = 0.01
    if variant["data"] == "streets":
        use_streets(config, variant["split"], variant["budget"])
    elif variant["budget"]:
        raise UserError("The variant 'long' is a budget of the street scenes: write streets,long.")
    if variant["backbone"] == "pretrained":
        use_pretrained(config)
    return config


def mkd(**changes: Any) -> Config:
    """The `method` section for MKD, with the paper's values.

    Of BatchNorm in teachers the paper says nothing. As in its released code they normalize with
    the batch, like the students that they teach; with running statistics they taught worse on the
    street scenes (benchmarks/results/streets_tuning.md).

    Args:
      **changes: fields of `methods.mkd.Method` with other values.
    """
    section = ConfigDict(
        {
            "name": "mkd",
            "alpha": 1.5,
            "beta": 1.0,
            "teacher": "mutual",
            "strong": True,
            "feature_augmentation": True,
            "threshold": config_dict.placeholder(float),
            "consistency_on": "unlabeled",
            "augment": "students",
            "covariance": "diagonal",
            "classifier_gradient": False,
            "strength": 1.5,
            "ramp": "cosine",
            "ema_decay_max": 0.4,
            "consistency_stride": 4,
            "weak_photometric": False,
            "teacher_stats": "own",
        }
    )
    section.update(changes)
    return section


def use_streets(config: Config, split: str | None, budget: str | None = None) -> None:
    """Swaps in the embedded street scenes, and a network that trains on them in minutes on a
    laptop.

    Args:
      config: is changed.
      split: share of labeled images; None takes 8.
      budget: "long" gives the method most of the updates, to compare methods; supervised training
        gains nothing from more.
    """
    with config.unlocked():
        config.data.update(
            name="streets",
            root="",
            split=split or "8",
            size=(64, 128),
            train_count=400,
            val_count=100,
            scene_seed=0,
        )
    use_small(config)
    warmup, steps = (600, 1400) if budget == "long" else (1400, 300)
    config.update(crop=(64, 128), warmup=warmup, steps=steps)
    config.batch.update(labeled=4, unlabeled=4)
    config.augment.scale = (0.75, 1.5)
    config.eval.update(every=500, batch=20)
    config.checkpoint.every = 250
    config.log.every = 20


def folder(network: str | None = None) -> Config:
    """The default config for a folder of one's own images; what it leaves open, `auto` decides.

    Args:
      network: "r50" (if None), "r101", or "small", for CPUs.
    """
    config = default()
    with config.unlocked():
        config.data.update(
            name="folder", root="", split="all", extra=True, classes=(), ignore=(255,)
        )
        config.limits = ConfigDict({"crop": 512, "batch": 8, "steps": 40_000})
    config.crop = config_dict.placeholder(tuple)
    config.warmup = config_dict.placeholder(int)
    # A placeholder each: one that stands in two places has one value for both.
    config.batch.update(
        labeled=config_dict.placeholder(int), unlabeled=config_dict.placeholder(int)
    )
    config.eval.update(
        every=config_dict.placeholder(int),
        mode=config_dict.placeholder(str),
        batch=config_dict.placeholder(int),
    )
    if network == "small":
        use_small(config)
        config.limits.update(crop=256, batch=4, steps=1000)
        config.augment.scale = (0.75, 1.5)
        config.checkpoint.every = 250
        config.log.every = 20
    elif network == "r101":
        config.model.backbone = "resnet101"
    return config


def use_small(config: Config) -> None:
    """Swaps in a network of half a million parameters, for CPUs, and an optimizer that trains it in
    few updates: AdamW.

    Args:
      config: is changed.
    """
    config.model.update(
        backbone="resnet10",
        width=16,
        aspp_rates=(1, 2, 3),
        channels=48,
        low_level_channels=16,
        batch_norm_momentum=0.1,
    )
    config.optimizer.update(name="adamw", learning_rate=0.01, weight_decay=0.1)


def use_pretrained(config: Config) -> None:
    """Swaps in a backbone with ImageNet weights, and for it a learning rate that leaves them their
    worth; the head stays as it is and keeps its rate.

    EfficientNet-Lite0 at stride 16, whatever the crop: at 64x128 a stride of 32 would leave 2x4
    features, and one of 8 costs three times as much.

    Args:
      config: is changed.
    """
    config.model.update(backbone="efficientnet_lite0", pretrained="imagenet", output_stride=16)
    rate = {"sgd": 0.01, "adamw": 0.001}[config.optimizer.name]
    config.optimizer.head_factor = config.optimizer.learning_rate / rate
    config.optimizer.learning_rate = rate


def choose(arg: str | None, **groups: tuple[str, ...]) -> dict[str, str | None]:
    """Sorts the words of a config's variant, as in `mkd_cityscapes.py:r101,1_8`, into groups.

    Args:
      arg: words separated by commas, or nothing.
      **groups: the words of each group, of which a variant holds one at most. A word that is in
        several groups takes them all.

    Returns:
      The word of each group, or None.

    Raises:
      UserError: an unknown word, or two of one group.
    """
    chosen: dict[str, str | None] = dict.fromkeys(groups)
    for word in filter(None, (arg or "").split(",")):
        taken = [name for name, words in groups.items() if word in words]
        if not taken:
            known = ", ".join(dict.fromkeys(word for words in groups.values() for word in words))
            raise UserError(f"Unknown variant {word!r}. There are: {known}.")
        for group in taken:
            if chosen[group] is not None:
                raise UserError(
                    f"The variants {chosen[group]!r} and {word!r} exclude each other. Choose one."
                )
            chosen[group] = word
    return chosen


def check(config: Config) -> None:
    """Raises a UserError where a number is below its `LEAST`; keys that are open pass."""
    numbers = _flat(config.to_dict())
    for key, least in LEAST.items():
        if (value := numbers.get(key)) is not None and value < least:
            raise UserError(f"{key}={value} is too small. Set --config.{key} to {least} or more.")


def from_arguments(arguments: Sequence[str]) -> Config:
    """Reads `--config=FILE:VARIANT` and any `--config.KEY=VALUE`, as training does.

    Raises:
      UserError: there is no such file, variant or key, a value does not fit, or there is another
        argument.
    """
    argv, values = ["", *arguments], flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    file = next((a.partition("=")[2] for a in arguments if a.startswith("--config=")), "")
    if not os.path.exists(file.partition(":")[0]):
        raise UserError(f"There is no config file {file.partition(':')[0]!r}. Give --config=FILE.")
    try:
        rest = values(argv)[1:]
    except Exception as error:  # a config file runs any code
        raise UserError(reason(error)) from error
    if rest:
        raise UserError(f"Unexpected argument {rest[0]!r}. Overrides look like --config.steps=100.")
    return values["config"].value


def reason(error: Exception) -> str:
    """What to tell of a mistake in flags; ml_collections wraps what a config file raises."""
    while isinstance(error.__cause__, Exception) and not isinstance(error, AttributeError):
        error = error.__cause__
    if isinstance(error, (AttributeError, KeyError)):
        inner = error.args[0]
        text = str(inner.args[0] if isinstance(inner, KeyError) else inner)
        key, *hint = text.splitlines()
        name = key.strip("\"'")
        return " ".join([f"The config has no key {name!r}.", *hint])
    return " ".join(str(error).split()) or type(error).__name__


def differences(stored: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Lines "key: stored -> current" for all keys that differ, except those that may.

    Args:
      stored: a config as JSON gives it back.
      current: likewise.
    """
    old, new = _flat(stored), _flat(current)
    return [
        f"{key}: {old.get(key, 'absent')} -> {new.get(key, 'absent')}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key, "absent") != new.get(key, "absent")
        and not any(key == free or key.startswith(free + ".") for free in MAY_CHANGE)
    ]


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        flat |= _flat(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return flat
