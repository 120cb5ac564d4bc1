"""FixMatch on Cityscapes: the network learns for strong views what it is sure of in weak ones.

Command, with --config.data.root=DIR for the folder that holds leftImg8bit and gtFine:
  python -m jaxssl.main --config=configs/fixmatch_cityscapes.py:1_16,r50 --workdir=W
  python -m jaxssl.main --config=configs/fixmatch_cityscapes.py:streets --workdir=W  # no download
  python -m jaxssl.main --config=configs/fixmatch_cityscapes.py:streets,pretrained --workdir=W

Cost: three passes of one network a step, one of them without a gradient. The variant pretrained
  begins with ImageNet features (pip install 'jaxssl[pretrained]').

Published: none; the paper is about classification, and the tables of the papers that this library
reproduces have no such row.

Crop, batch and schedule are those of mkd_cityscapes.py, so that methods compare. FixMatch takes
seven unlabeled images for a labeled one: --config.batch.labeled=4 --config.batch.unlabeled=28.
"""

from ml_collections import ConfigDict

from jaxssl import config as configs


def get_config(arg: str | None = None) -> configs.Config:
    variant = configs.choose(
        arg,
        split=("1_16", "1_8", "1_4", "1_2"),
        backbone=("r50", "r101", "pretrained"),
        data=("streets",),
        budget=("long",),
    )
    config = configs.cityscapes(variant)
    config.method = ConfigDict(
        {
            "name": "fixmatch",
            "weight": 1.0,
            "threshold": 0.95,
            "ema_decay_max": 0.999,
            "auxiliary_weight": 0.4,
        }
    )
    if variant["data"] == "streets":
        config.next = (
            "compare with the labeled images alone: python -m jaxssl.main "
            f"--config=configs/supervised_cityscapes.py:{arg} --workdir=/tmp/supervised",
        )
        config.method.ema_decay_max = 0.99
    return config
