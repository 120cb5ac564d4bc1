"""Supervised training on a folder of your own images: on those with masks alone.

Command:
  python -m jaxssl.main --config=configs/supervised_folder.py --config.data.root=DIR --workdir=W

What DIR holds, and the variants (small for CPUs), are those of mkd_folder.py.
Images without a mask are not read.

Cost: one network a step; as many steps as MKD has, warm-up included.

Published: none. It is what a semi-supervised method has to surpass on the same masks.
"""

from jaxssl import config as configs


def get_config(arg: str | None = None) -> configs.Config:
    variant = configs.choose(
        arg, network=("small", "r50", "r101"), backbone=("r50", "r101", "pretrained")
    )
    config = configs.folder(variant["network"])
    config.method = configs.supervised()
    if variant["backbone"] == "pretrained":
        configs.use_pretrained(config)
    config.next = ("learn from images without masks too: configs/mkd_folder.py, another --workdir",)
    return config
