"""U2PL on Cityscapes: pixels too unsure to be taught become negatives of contrastive learning.

Command, with --config.data.root=DIR for the folder that holds leftImg8bit and gtFine:
  python -m jaxssl.main --config=configs/u2pl_cityscapes.py:1_16 --workdir=W
  python -m jaxssl.main --config=configs/u2pl_cityscapes.py:streets --workdir=W  # no download
  python -m jaxssl.main --config=configs/u2pl_cityscapes.py:streets,pretrained --workdir=W

Cost: a student and its teacher, three forward passes a step, one backward. With 1_16 there are
  34862 updates on 16 + 16 crops of 769x769, which the paper does not say the time of. The memory
  bank takes 0.9 GiB, and while a step runs twice that; --config.method.bank_dtype=bfloat16 halves
  it, --config.method.teacher_forwards=one saves a third of the teacher's time. On smaller machines:
  --config.model.dtype=bfloat16, --config.model.remat, --config.batch.accumulate=4. In the
  demo a step takes seven tenths of MKD's; contrast is a tenth of it, and a part of the same size is
  for the representation head (benchmarks/u2pl_contrast.py).

Published (Table 3, mIoU on val, windows of the crop, single scale, the teacher):
                   1_16    1_8     1_4     1_2
  U2PL w/ CutMix  70.30   74.37   76.47   79.05
  CutMix          67.06   71.83   76.36   78.25
  labels alone    65.74   72.53   74.43   77.83

They start from ImageNet weights (ResNet-101). The released configuration has the head at the
backbone's learning rate, --config.optimizer.head_factor=1, and what it computes otherwise is named
in the fields of the method.
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
    if variant["data"] == "streets" or variant["budget"]:
        config = configs.cityscapes(variant)
        config.model.embedding = 32
        config.method = configs.u2pl(**configs.SMALL_CONTRAST)
        config.next = (
            "compare with the labeled images alone: python -m jaxssl.main "
            f"--config=configs/supervised_cityscapes.py:{arg} --workdir=/tmp/supervised",
        )
        return config
    config = configs.default()
    configs.use_u2pl(config, variant["backbone"], 769)
    config.data.split = variant["split"] or "1_16"
    config.epochs = 200.0
    config.model.auxiliary = True
    config.optimizer.update(learning_rate=0.01, weight_decay=5e-4)
    config.eval.mode = "slide"
    config.method = configs.u2pl(ohem=True)
    return config
