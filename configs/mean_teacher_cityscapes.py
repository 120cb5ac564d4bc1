"""Mean teacher on Cityscapes: consistency with the average of the student, in another light.

Command, with --config.data.root=DIR for the folder that holds leftImg8bit and gtFine:
  python -m jaxssl.main --config=configs/mean_teacher_cityscapes.py:1_16,r101 --workdir=W
  python -m jaxssl.main --config=configs/mean_teacher_cityscapes.py:streets --workdir=W  # no data
  python -m jaxssl.main --config=configs/mean_teacher_cityscapes.py:streets,pretrained --workdir=W

Cost: two passes of the student a step, and one of the teacher, without a gradient. The variant
  pretrained begins with ImageNet features (pip install 'jaxssl[pretrained]').

Published (mIoU on val; MKD's Table 2 at a single scale, U2PL's Table 3 by sliding windows):
              1_16    1_8     1_4     1_2
  r50        66.14   72.03   74.47   77.43   MKD's
  r101       68.08   73.71   76.53   78.59   MKD's
  r101       69.03   72.06   74.20   78.15   U2PL's

Crop, batch and schedule are those of mkd_cityscapes.py, so that methods compare; the authors of
the figures had others. The weight is that of CutMix-Seg: with the method's default, the paper's for
CIFAR-10, the loss on the labels rose on the street scenes.

The teacher normalizes with the batch, as in the authors' PyTorch code; with running statistics
MKD's taught worse on the street scenes (benchmarks/results/streets_tuning.md).
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
            "name": "mean_teacher",
            "weight": 1.0,
            "rampup": 0.27,
            "ema_decay_max": 0.999,
            "teacher_stats": "own",
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
