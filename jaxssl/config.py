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

_ALL: Mapping[str, Any] = {"preprocessing": "imagenet", "dropout": 0.0, "dtype": "float32"}

_BACKBONE: Mapping[str, Any] = {
    **_ALL,
    "pretrained": "",
    "batch_norm_momentum": 0.1,
    "stochastic_depth": 1.0,
    "remat": False,
}

_CONVOLUTIONAL: Mapping[str, Any] = {
    **_BACKBONE,
    "backbone": "resnet50",
    "width": 64,
    "stem": "deep",
    "stem_width": 0,
    "output_stride": 16,
}

_SEGMENTATION: Mapping[str, Any] = {
    "auxiliary": False,
    "embedding": 0,
    "decoder_dropout": 0.0,
    "align_corners": False,
}

_CONVOLUTIONAL_SEGMENTATION: Mapping[str, Any] = {
    **_CONVOLUTIONAL,
    **_SEGMENTATION,
    "multi_grid": (1, 1, 1),
}

NETWORKS: Mapping[str, Mapping[str, Any]] = {
    "deeplab_v3plus": {
        **_CONVOLUTIONAL_SEGMENTATION,
        "separable": True,
        "aspp_rates": (6, 12, 18),
        "channels": 256,
        "low_level_channels": 48,
    },
    "deeplab_v2": {
        **_CONVOLUTIONAL_SEGMENTATION,
        "backbone": "resnet101",
        "stem": "conv7",
        "output_stride": 8,
        "dilate_first": False,
        "aspp_rates": (6, 12, 18, 24),
        "aspp_branches": 4,
        "auxiliary_channels": 256,
        "align_corners": True,
        "stochastic_depth_schedule": "constant",
    },
    "pspnet": {
        **_CONVOLUTIONAL_SEGMENTATION,
        "stem_width": 64,
        "output_stride": 8,
        "dilate_first": True,
        "pool_bins": (1, 2, 3, 6),
        "channels": 512,
        "auxiliary": True,
        "auxiliary_channels": 256,
        "dropout": 0.1,
        "align_corners": True,
    },
    "setr": {
        **_BACKBONE,
        **_SEGMENTATION,
        "backbone": "vit_large",
        "preprocessing": "inception",
        "patch": 16,
        "tokens": 1,
        "channels": 256,
        "stochastic_depth_schedule": "constant",
    },
    "classifier": {
        **_CONVOLUTIONAL,
        "stem": "conv7",
        "output_stride": 32,
        "stochastic_depth_schedule": "constant",
    },
    "wide_resnet": {
        **_ALL,
        "preprocessing": "cifar10",
        "depth": 28,
        "widen": 2,
        "batch_norm_momentum": 0.1,
    },
    "mlp": {**_ALL, "preprocessing": "mnist", "hidden": (256, 256)},
}
"""`model.name` -> the other keys of `model`, as MKD, DMT, DARS, SETR and RML have these networks.
The last three classify whole images.
"""

_SMALL_BACKBONE: Mapping[str, Any] = {"backbone": "resnet10", "width": 16}

SMALL: Mapping[str, Mapping[str, Any]] = {
    "deeplab_v3plus": {
        **_SMALL_BACKBONE,
        "aspp_rates": (1, 2, 3),
        "channels": 48,
        "low_level_channels": 16,
    },
    "deeplab_v2": {**_SMALL_BACKBONE, "aspp_rates": (1, 2, 3, 4), "auxiliary_channels": 16},
    "pspnet": {**_SMALL_BACKBONE, "stem_width": 8, "channels": 48, "auxiliary_channels": 16},
    "setr": {"backbone": "vit_mini", "patch": 8, "channels": 48},
    "classifier": _SMALL_BACKBONE,
    "wide_resnet": {"depth": 10, "widen": 1},
    "mlp": {"hidden": (128, 128)},
}
"""`model.name` -> what makes a network of it that has half a million parameters or fewer, for small
images.
"""


SMALL_CONTRAST: Mapping[str, Any] = {
    "capacity": 1000,
    "capacity_0": 1000,
    "keys": 64,
    "num_negatives": 64,
}
"""What makes U2PL's contrast cheap beside such a network, whose `embedding` is 32."""


def default() -> Config:
    """Every key there is; a config file changes some and adds `method`."""
    model = model_section("deeplab_v3plus")
    return ConfigDict(
        {
            "seed": 0,
            "steps": config_dict.placeholder(int),
            "epochs": config_dict.placeholder(float),
            "warmup": 0,
            "crop": (512, 1024),
            "batch": {"labeled": 16, "unlabeled": 16, "accumulate": 1},
            "parallel": "mesh",  # or "pmap", as PyTorch's DDP: see `train.compile_step`
            "augment": {
                "scale": (0.5, 2.0),
                "scale_median": config_dict.placeholder(float),
                "flip": True,
                "rotate": 0.0,
                "blur": 0.0,
            },
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
                "unlabeled_truth": False,
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


def model_section(name: str, **changes: Any) -> Config:
    """The `model` section for a network.

    Args:
      name: of the network. One that `NETWORKS` lacks has the keys of `changes` alone.
      **changes: fields of its `Model` with other values, or that `NETWORKS` leaves out.
    """
    return ConfigDict({"name": name, **NETWORKS.get(name, {}), **changes})


def use_network(config: Config, name: str, *, student: str | None = None, **changes: Any) -> None:
    """Swaps in another network, with the keys that it has.

    Args:
      config: is changed; `use_small` and `use_pretrained` come after, for networks in `model`.
      name: as for `model_section`.
      student: who gets it, "a" or "b"; None gives it to all.
      **changes: as for `model_section`.
    """
    section = model_section(name, **changes)
    if student is None:
        config.model = section
        config.model_a, config.model_b = _overrides(section), _overrides(section)
    else:
        config[f"model_{student}"] = section


def _overrides(model: Config) -> Config:
    """The keys of `model`, all unset: a student takes the model's value."""
    return ConfigDict({key: config_dict.placeholder(type(value)) for key, value in model.items()})


def model_of(config: Config, student: str) -> dict[str, Any]:
    """The model section as one student has it: `model`, and what `model_<student>` sets; if that
    names another network, then that one as `NETWORKS` has it in the place of `model`.
    """
    section = config.get(f"model_{student}", ConfigDict())
    own = {key: value for key, value in section.items() if value is not None}
    name = own.get("name", config.model["name"])
    shared = config.model if name == config.model["name"] else model_section(name)
    return {**shared, **own}


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


def voc(variant: Mapping[str, str | None]) -> Config:
    """What a variant of a PASCAL VOC 2012 config says, but for the method: the default config with
    what MKD's paper says of VOC, and the number of steps of its released configuration.

    Args:
      variant: from `choose`: "split", a share such as 1_16 (if None) of the 10582 images of the set
        "blender", or a count of the set "classic", the 1464 fine ones, where the others of the
        10582 are unlabeled; "backbone" "r50" (if None), "r101" or "pretrained".
    """
    config = default()
    split = variant["split"] or "1_16"
    classic = split.isdecimal()
    with config.unlocked():
        config.data.update(
            name="voc",
            root="data/voc",
            set="classic" if classic else "blender",
            split="all" if split == "1464" else split,
            extra=classic,
        )
    config.update(crop=(512, 512), steps=30_000)
    config.model.backbone = "resnet101" if variant["backbone"] == "r101" else "resnet50"
    config.model.batch_norm_momentum = 0.001
    if variant["backbone"] == "pretrained":
        use_pretrained(config)
    config.optimizer.learning_rate = 0.0025  # last: it is low enough for pretrained weights, too
    return config


def cifar10(variant: Mapping[str, str | None]) -> Config:
    """What a variant of a CIFAR-10 config says, but for the method: the default config with what
    DMT's paper says of CIFAR-10; or Fashion-MNIST, or the embedded digits.

    Args:
      variant: from `choose`: "labels", how many images are labeled, or "all", 4000 if None; "data"
        "fashion", for which everything is as for CIFAR-10, "digits", or None; "network" None or
        "small", for CPUs.
    """
    config = default()
    use_network(config, "wide_resnet")
    labels = variant["labels"] or "4000"
    few = labels != "all" and int(labels) <= 1000
    with config.unlocked():
        config.data.update(name="cifar10", root="data/cifar10", split=labels, validation=200)
        config.augment.update(scale=(1.0, 1.0), pad=4, randaugment=1, operations="paper", cutout=16)
    config.update(crop=(32, 32), epochs=750.0)
    config.batch.update(labeled=16 if few else 64, unlabeled=496 if few else 448)
    config.optimizer.update(learning_rate=0.1, schedule="cosine")
    config.eval.update(every=5000, batch=500, unlabeled_truth=True)
    config.log.every = 100
    if variant["data"] == "fashion":
        with config.unlocked():
            config.data.update(name="mnist", set="fashion", root="data/fashion")
        config.crop = (28, 28)
        config.augment.cutout = 14
    if variant["data"] == "digits":
        use_digits(config, variant["labels"])
    elif variant["network"] == "small":
        use_few_updates(config, 3000, 1000)
    return config


def supervised(**changes: Any) -> Config:
    """The `method` section for supervised training.

    Args:
      **changes: fields of `methods.supervised.Method` with other values.
    """
    section = ConfigDict(
        {
            "name": "supervised",
            "strong": False,
            "mixup": 0.0,
            "ema_decay_max": 0.0,
            "auxiliary_weight": 0.4,
        }
    )
    section.update(changes)
    return section


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


def dmt(**changes: Any) -> Config:
    """The `method` section for DMT, with the paper's values of Cityscapes.

    Args:
      **changes: fields of `methods.dmt.Method` with other values.
    """
    section = ConfigDict(
        {
            "name": "dmt",
            "gamma_1": 3.0,
            "gamma_2": 3.0,
            "ratios": (0.2, 0.4, 0.6, 0.8, 1.0),
            "labels": "mutual",
            "weight": "dynamic",
            "threshold": 0.9,
            "start": "weights",
            "alpha": 0.8,
            "oracle_epochs": 60.0,
            "supervised_rate": config_dict.placeholder(float),
            "label_at": "crop",
            "label_scale": 1.0,
            "label_flip": False,
            "auxiliary_weight": 0.4,
        }
    )
    section.update(changes)
    return section


def dmt_images(**changes: Any) -> Config:
    """The `method` section for DMT on images with one label each, with the paper's values of
    CIFAR-10.

    Args:
      **changes: fields of `methods.dmt_images.Method` with other values.
    """
    section = ConfigDict(
        {
            "name": "dmt_images",
            "gamma_1": 4.0,
            "gamma_2": 4.0,
            "ratios": (0.2, 0.4, 0.6, 0.8, 1.0),
            "rule": "top",
            "weight": "dynamic",
            "mixup": 0.75,
            "labeled_by": "best",
            "restart": True,
            "oracle_epochs": 300.0,
            "supervised_rate": 0.2,
            "ema_decay_max": 0.999,
            "teacher_stats": "ema",
        }
    )
    section.update(changes)
    return section


def dars(**changes: Any) -> Config:
    """The `method` section for DARS, with the paper's values of Cityscapes, 1/8, crop 361.

    Args:
      **changes: fields of `methods.dars.Method` with other values.
    """
    section = ConfigDict(
        {
            "name": "dars",
            "ratios": (0.2, 0.5),
            "beta_min": (0.0, 0.2),
            "beta_max": (0.0, 0.5),
            "rule": "dars",
            "precision": "float16",
            "temperature": 1.0,
            "schedule": "restart",
            "label_mode": "slide",
            "label_scale": 1.0,
            "auxiliary_weight": 0.4,
        }
    )
    section.update(changes)
    return section


def rml(**changes: Any) -> Config:
    """The `method` section for RML, with the paper's values.

    Args:
      **changes: fields of `methods.rml.Method` with other values.
    """
    section = ConfigDict(
        {
            "name": "rml",
            "supervision": "both",
            "rectification": True,
            "p0": "stage",
            "stages": 2,
            "momentum": 0.9999,
            "model_noise": True,
            "input_noise": True,
            "weight": 1.0,
            "ema_decay_max": 0.999,
            "prototype_scale": 1.0,
            "teacher_stats": "copy",
            "auxiliary_weight": 0.4,
        }
    )
    section.update(changes)
    return section


def u2pl(**changes: Any) -> Config:
    """The `method` section for U2PL, with the paper's values of PASCAL VOC.

    Args:
      **changes: fields of `methods.u2pl.Method` with other values.
    """
    section = ConfigDict(
        {
            "name": "u2pl",
            "lambda_c": 0.1,
            "eta": 1.0,
            "alpha_0": 20.0,
            "dynamic": True,
            "cutmix": 0.5,
            "teacher_forwards": "two",
            "anchor_threshold": 0.3,
            "num_anchors": 50,
            "num_negatives": 256,
            "temperature": 0.5,
            "positive": "paper",
            "negatives": "intended",
            "negative_pixels": "unreliable",
            "probability_rank": True,
            "rank_low": 3,
            "rank_high": 20,
            "contrast_mean": "all",
            "memory_bank": True,
            "capacity": 30_000,
            "capacity_0": 50_000,
            "keys": 512,
            "bank_dtype": "float32",
            "ema_decay_max": 0.99,
            "ohem": False,
            "ohem_threshold": 0.7,
            "ohem_min_kept": 50_000,
            "auxiliary_weight": 0.4,
            "teacher_stats": "ema",
        }
    )
    section.update(changes)
    return section


def use_dmt(config: Config, backbone: str | None, learning_rate: float) -> None:
    """Swaps in what DMT says of any data: DeepLabv2, all at one learning rate; epochs, crop and
    batch are left to set.

    Args:
      config: is changed.
      backbone: "r50", "r101" (if None) or "pretrained".
      learning_rate: of the rounds.
    """
    use_network(config, "deeplab_v2", backbone="resnet50" if backbone == "r50" else "resnet101")
    if backbone == "pretrained":
        use_pretrained(config)
    config.optimizer.update(learning_rate=learning_rate, head_factor=1.0)
    config.update(steps=None)
    config.eval.every = 500


def use_rml(config: Config, backbone: str | None) -> None:
    """Swaps in what RML says of any data: DeepLabv2 with model noise, all at one learning rate;
    crop, batch and updates of a stage are left to set.

    Args:
      config: is changed.
      backbone: "r50", "r101" (if None) or "pretrained".
    """
    use_network(
        config,
        "deeplab_v2",
        backbone="resnet50" if backbone == "r50" else "resnet101",
        dropout=0.5,
        stochastic_depth=0.8,
    )
    if backbone == "pretrained":
        use_pretrained(config)
    config.optimizer.update(learning_rate=1e-4, head_factor=1.0, weight_decay=2e-4)


def use_dars(config: Config, crop: int, shown: float) -> None:
    """Swaps in what DARS says of any data: PSPNet-50, batch, optimizer, geometry, and evaluation by
    windows and mirror images, as its released code does; epochs are left to set.

    Args:
      config: is changed.
      crop: side of training images and of windows.
      shown: factor of the size at which images are evaluated.
    """
    use_network(config, "pspnet")
    config.update(crop=(crop, crop), steps=None)
    config.batch.update(labeled=8, unlabeled=8)
    config.augment.update(rotate=10.0, blur=0.5)
    config.optimizer.update(learning_rate=0.01, head_factor=10.0, weight_decay=1e-4)
    config.eval.update(every=5000, mode="slide", flip=True, scales=(shown,))


def use_u2pl(config: Config, backbone: str | None, crop: int) -> None:
    """Swaps in what U2PL says of any data: its DeepLabv3+ with a representation head, geometry, and
    a head that learns ten times as fast; learning rate and epochs are left to set.

    Args:
      config: is changed.
      backbone: "r50", "r101" (if None) or "pretrained".
      crop: side of training images and of windows.
    """
    use_network(
        config,
        "deeplab_v3plus",
        backbone="resnet50" if backbone == "r50" else "resnet101",
        separable=False,
        aspp_rates=(12, 24, 36),
        low_level_channels=256,
        output_stride=8,
        multi_grid=(2, 2, 4),
        stem_width=64,
        zero_init=True,
        align_corners=True,
        embedding=256,
        dropout=0.1,
        decoder_dropout=0.1,
    )
    if backbone == "pretrained":
        use_pretrained(config)
    config.update(crop=(crop, crop), steps=None)
    config.augment.update(scale=(0.5, 2.0), scale_median=1.0)
    config.optimizer.head_factor = 10.0


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


def use_digits(config: Config, labels: str | None) -> None:
    """Swaps in the embedded digits, and a network that trains on them in a minute on a laptop.
    Nothing is held out of so few labels.

    Args:
      config: is changed.
      labels: how many images are labeled; None takes 50.
    """
    with config.unlocked():
        config.data.update(name="digits", root="", size=8, split=labels or "50", validation=0)
    use_few_updates(config, 400, 1000)
    config.crop = (8, 8)
    config.augment.update(flip=False, pad=1, cutout=2)
    config.eval.batch = 120


def use_few_updates(config: Config, warmup: int, steps: int) -> None:
    """Swaps in a small network, few images a step and as many steps as a CPU does in minutes. A
    phase is evaluated at its end, and best is what is last.

    Args:
      config: is changed; of `cifar10`.
      warmup: updates on labels alone.
      steps: updates of the method; of the last round, where there are rounds.
    """
    use_small(config)
    config.update(warmup=warmup, steps=steps, epochs=None)
    config.batch.update(labeled=8, unlabeled=24)
    config.eval.every = 0
    config.checkpoint.every = 200
    config.log.every = 20


def use_own_views(config: Config) -> None:
    """Swaps in what methods for whole images that make views of their own get: images that are
    cropped and flipped alone; and as many updates as all phases of dmt_cifar10.py have.

    Args:
      config: is changed; of `cifar10`.
    """
    config.augment.update(randaugment=0, cutout=0)
    if config.epochs is not None:
        config.update(steps=240_000, epochs=None)


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
    """Swaps in a network of half a million parameters or fewer, for CPUs, and an optimizer that
    trains it in few updates: AdamW.

    Args:
      config: is changed.
    """
    config.model.update(SMALL[config.model.name])
    if "batch_norm_momentum" in config.model:
        config.model.batch_norm_momentum = 0.1
    config.optimizer.update(name="adamw", learning_rate=0.01, weight_decay=0.1)


def use_pretrained(config: Config) -> None:
    """Swaps in a backbone with ImageNet weights, and for it a learning rate that leaves them their
    worth; the head stays as it is and keeps its rate.

    EfficientNet-Lite0 at stride 16, whatever the crop: at 64x128 a stride of 32 would leave 2x4
    features, and one of 8 costs three times as much. To classify whole images the stride stays 32,
    for which the weights were trained.

    Args:
      config: is changed.

    Raises:
      UserError: the network has no convolutional backbone.
    """
    if "output_stride" not in config.model:
        advice = "Use the network classifier, which has one."
        if "pretrained" in config.model:
            advice = "Set --config.model.pretrained to a file or repository of its own kind."
        raise UserError(
            "The variant 'pretrained' is a backbone with ImageNet weights, and "
            f"{config.model.name} has none. {advice}"
        )
    config.model.update(backbone="efficientnet_lite0", pretrained="imagenet")
    config.model.output_stride = max(16, config.model.output_stride)
    rate = {"sgd": 0.01, "adamw": 0.001}[config.optimizer.name]
    config.optimizer.head_factor *= config.optimizer.learning_rate / rate
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
    """Raises a UserError where a number is below its `LEAST` or `parallel` an unknown word; keys
    that are open or missing pass.
    """
    values = _flat(config.to_dict())
    for key, least in LEAST.items():
        if (value := values.get(key)) is not None and value < least:
            raise UserError(f"{key}={value} is too small. Set --config.{key} to {least} or more.")
    if (parallel := values.get("parallel", "mesh")) not in ("mesh", "pmap"):
        raise UserError(f"Unknown parallel={parallel!r}. There are: mesh, pmap.")


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
