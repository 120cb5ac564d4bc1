"""MKD on a folder of your own images, of which some have masks.

Command:
  python -m jaxssl.main --config=configs/mkd_folder.py --config.data.root=DIR --workdir=W
  python -m jaxssl.main --config=configs/mkd_folder.py:small --config.data.root=DIR --workdir=W
  python -m jaxssl.check_data --config=configs/mkd_folder.py --config.data.root=DIR  # looks first

DIR holds images/ and labels/ (masks of the same names) and, if you have them, unlabeled/ with more
images and val/images/ and val/labels/; or train/ and trainannot/; or list files train.txt, val.txt.
Images without a mask are unlabeled. DIR/classes.txt, with a line such as "road 128 64 128" for each
class, names them; without it, the masks say which there are. --config.data.ignore=255,0 are values
that count nowhere; --config.data.split=1_8 uses an eighth of the masks, for experiments.

Variants: small is for CPUs; r50 (if none is given) and r101 are for GPUs and TPUs; pretrained
begins with ImageNet features, alone or with small. Crop, batch, steps, warm-up and evaluation are
chosen from the images and printed; what you set, such as --config.crop=256,256, stays.

Cost: four networks a step. small: --config.warmup=1500 --config.steps=4000, with which MKD gained
  six points on images of 64x64 (README), took twelve to sixteen minutes on one CPU core; the few
  steps that small chooses itself show that all works. A crop of 256x256 has sixteen times the
  pixels.

Published: none. Compare with configs/supervised_folder.py, which learns from the masks alone.
"""

from jaxssl import config as configs


def get_config(arg: str | None = None) -> configs.Config:
    variant = configs.choose(
        arg, network=("small", "r50", "r101"), backbone=("r50", "r101", "pretrained")
    )
    config = configs.folder(variant["network"])
    config.method = configs.mkd(ema_decay_max=0.99)
    if variant["backbone"] == "pretrained":
        configs.use_pretrained(config)
    else:
        # Pseudo-labels of networks that began with random weights are poor: trust them less.
        config.method.update(alpha=1.0, beta=0.25, feature_augmentation=False)
    config.next = ("compare with the masks alone: configs/supervised_folder.py, another --workdir",)
    return config
