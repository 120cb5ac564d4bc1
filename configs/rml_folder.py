"""RML on a folder of your own images, of which some have masks: robust mutual learning.

Command:
  python -m jaxssl.main --config=configs/rml_folder.py --config.data.root=DIR --workdir=W
  python -m jaxssl.main --config=configs/rml_folder.py:small --config.data.root=DIR --workdir=W

What DIR holds, and the variants, are those of mkd_folder.py. Steps are those of a stage, of which
there are two, half of MKD's. With pretrained features a fifth of a stage goes before, on the masks
alone. Two different networks learn from each other, too: --config.model_b.backbone=resnet18, or
--config.model_b.name=pspnet.

Cost: two students, their teachers and, for p0, the two teachers of a stage's start a step; before
  each stage both teachers see all images once.

Published: none. Compare with configs/supervised_folder.py, which learns from the masks alone.
"""

from jaxssl import config as configs


def get_config(arg: str | None = None) -> configs.Config:
    variant = configs.choose(
        arg, network=("small", "r50", "r101"), backbone=("r50", "r101", "pretrained")
    )
    config = configs.folder(variant["network"])
    config.method = configs.rml(ema_decay_max=0.99)
    if variant["backbone"] == "pretrained":
        configs.use_pretrained(config)
    config.model.update(dropout=0.1, stochastic_depth=0.9)
    config.limits.steps //= 2
    config.next = ("compare with the masks alone: configs/supervised_folder.py, another --workdir",)
    return config
