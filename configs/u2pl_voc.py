"""U2PL on PASCAL VOC 2012: pixels too unsure to be taught become negatives of contrastive learning.

Command, with --config.data.root=DIR for the folder that holds VOCdevkit:
  python -m jaxssl.main --config=configs/u2pl_voc.py:1_16 --workdir=W
  python -m jaxssl.main --config=configs/u2pl_voc.py:92 --workdir=W

A share is drawn from the 10582 images of the blender set, a count from the 1464 of the classic set,
where the other images of the 10582 are unlabeled; configs/mkd_voc.py says more on the data.

Cost: a student and its teacher, three forward passes a step, one backward. With 1_16 there are 620
  updates on labels alone and 48985 on 16 + 16 crops of 513x513, 80 epochs of the unlabeled images
  in all. The memory bank takes 1.0 GiB, and while a step runs twice that;
  configs/u2pl_cityscapes.py says what saves memory.

Published (mIoU on val, single scale, the teacher, central crops of 513x513). Table 2, shares:
                   1_16    1_8     1_4     1_2
  U2PL w/ CutMix  77.21   79.01   79.30   80.50
  CutMix          71.66   75.51   77.33   78.21
  labels alone    67.87   71.55   75.80   77.13

Table 1, counts:     92     183     366     732    1464
  U2PL w/ CutMix  67.98   69.15   73.66   76.16   79.49
  CutMix          52.16   63.47   69.46   73.73   76.54
  labels alone    45.77   54.92   65.88   71.69   72.50

They start from ImageNet weights (ResNet-101), and each is the best of all epochs. Its code counted
the padding of images smaller than 513x513 as background; here it does not count. Later papers
evaluate whole images, --config.eval.mode=whole.
"""

from jaxssl import config as configs

IMAGES = 10_582


def get_config(arg: str | None = None) -> configs.Config:
    variant = configs.choose(
        arg,
        split=("92", "183", "366", "732", "1464", "1_16", "1_8", "1_4", "1_2"),
        backbone=("r50", "r101", "pretrained"),
    )
    split = variant["split"] or "1_16"
    config = configs.voc({"split": split, "backbone": None})
    configs.use_u2pl(config, variant["backbone"], 513)
    config.optimizer.update(learning_rate=0.001, weight_decay=1e-4)
    config.eval.mode = "center_crop"
    # The first of 80 epochs has labels alone.
    labeled = int(split) if split.isdecimal() else IMAGES // int(split.removeprefix("1_"))
    config.warmup = round((IMAGES - labeled) / config.batch.unlabeled)
    config.epochs = 79.0
    config.method = configs.u2pl()
    return config
