"""CutMix-Seg on Cityscapes: the mean teacher with CutMix images for the student.

Command, with --config.data.root=DIR for the folder that holds leftImg8bit and gtFine:
  python -m jaxssl.main --config=configs/cutmix_seg_cityscapes.py:1_16,r101 --workdir=W
  python -m jaxssl.main --config=configs/cutmix_seg_cityscapes.py:streets --workdir=W  # no download
  python -m jaxssl.main --config=configs/cutmix_seg_cityscapes.py:streets,pretrained --workdir=W

Cost: two passes of the student a step, and one of the teacher, without a gradient. The variant
  pretrained begins with ImageNet features (pip install 'jaxssl[pretrained]').

Published (mIoU on val; MKD's Table 2 at a single scale, U2PL's Table 3 by sliding windows):
              1_16    1_8     1_4     1_2
  r101       72.13   75.83   77.24   78.93   MKD's
  r101       67.06   71.83   76.36   78.25   U2PL's

Crop, batch and schedule are those of mkd_cityscapes.py, so that methods compare; the authors of
the figures had others. As in mkd_cityscapes.py, the teacher normalizes with the batch.
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
            "name": "cutmix_seg",
            "weight": 1.0,
            "threshold": 0.97,
            "ema_decay_max": 0.99,
            "teacher_stats": "own",
            "auxiliary_weight": 0.4,
        }
    )
    if variant["data"] == "streets":
        config.next = (
            "compare with the labeled images alone: python -m jaxssl.main "
            f"--config=configs/supervised_cityscapes.py:{arg} --workdir=/tmp/supervised",
        )
    return config
