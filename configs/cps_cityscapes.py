"""CPS on Cityscapes: two students teach each other, on CutMix images; MKD's baseline.

Command, with --config.data.root=DIR for the folder that holds leftImg8bit and gtFine:
  python -m jaxssl.main --config=configs/cps_cityscapes.py:1_16,r50 --workdir=W
  python -m jaxssl.main --config=configs/cps_cityscapes.py:streets --workdir=W  # no download
  python -m jaxssl.main --config=configs/cps_cityscapes.py:streets,pretrained --workdir=W

Cost: two networks a step, and a pass of each for the pseudo-labels of CutMix images. The
  variant pretrained begins with ImageNet features (pip install 'jaxssl[pretrained]').

Published (Table 2 of the MKD paper, with CutMix, mIoU on val, single scale):
              1_16    1_8     1_4     1_2
  r50        74.47   76.61   77.83   78.77
  r101       74.72   77.62   79.21   80.2

The weight 5 is that of the authors' released Cityscapes configuration. Crop, batch and schedule are
those of mkd_cityscapes.py, so that the two compare; the authors' own differ.
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
        {"name": "cps", "weight": 5.0, "cutmix": True, "auxiliary_weight": 0.4}
    )
    if variant["data"] == "streets":
        config.next = (
            "compare with MKD: python -m jaxssl.main "
            f"--config=configs/mkd_cityscapes.py:{arg} --workdir=/tmp/mkd",
        )
        config.method.weight = 1.0
    return config
