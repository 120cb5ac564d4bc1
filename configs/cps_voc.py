"""CPS on PASCAL VOC 2012: two students teach each other, on CutMix images; MKD's baseline.

Command, with --config.data.root=DIR for the folder that holds VOCdevkit:
  python -m jaxssl.main --config=configs/cps_voc.py:1_16,r50 --workdir=W
  python -m jaxssl.main --config=configs/cps_voc.py:92,r101 --workdir=W --config.data.extra=False

A share is drawn from the 10582 images of train.txt and SBD, a count from the 1464 of train.txt;
configs/mkd_voc.py says more.

Cost: two networks a step, and a pass of each for the pseudo-labels of CutMix images; 30k steps. The
  variant pretrained begins with ImageNet features (pip install 'jaxssl[pretrained]').

Published (Tables 1 and 2 of the MKD paper, shares with CutMix, mIoU on val, single scale):
              1_16    1_8     1_4     1_2
  r50        71.98   73.67   74.90   76.15
  r101       74.48   76.44   77.68   78.6

                92     183     366     732
  r101       64.07   67.42   71.71   75.88   the others of train.txt unlabeled

The weight is that of the authors' released VOC configuration with CutMix. Crop, batch and schedule
are those of mkd_voc.py, so that the two compare; the authors' own differ.
"""

from ml_collections import ConfigDict

from jaxssl import config as configs


def get_config(arg: str | None = None) -> configs.Config:
    variant = configs.choose(
        arg,
        split=("92", "183", "366", "732", "1464", "1_16", "1_8", "1_4", "1_2"),
        backbone=("r50", "r101", "pretrained"),
    )
    config = configs.voc(variant)
    config.method = ConfigDict(
        {"name": "cps", "weight": 1.0, "cutmix": True, "auxiliary_weight": 0.4}
    )
    return config
