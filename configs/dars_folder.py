"""DARS on a folder of your own images, of which some have masks: the network labels the others, no
class more often than the masks have it, and learns from that.

Command:
  python -m jaxssl.main --config=configs/dars_folder.py --config.data.root=DIR --workdir=W
  python -m jaxssl.main --config=configs/dars_folder.py:small --config.data.root=DIR --workdir=W

What DIR holds, and the variants, are those of mkd_folder.py. Steps are those of a round, of which
there are two; the warm-up is training on the masks alone before. Images without a mask should show
what those with one show, about as often.

Cost: one network, two forward passes a step; before each round the network labels all images
  without a mask, by windows of the crop, mirrored too.

Published: none. Compare with configs/supervised_folder.py, which learns from the masks alone.
"""

from jaxssl import config as configs


def get_config(arg: str | None = None) -> configs.Config:
    variant = configs.choose(
        arg, network=("small", "r50", "r101"), backbone=("r50", "r101", "pretrained")
    )
    config = configs.folder(variant["network"])
    config.method = configs.dars()
    if variant["backbone"] == "pretrained":
        configs.use_pretrained(config)
    config.next = ("compare with the masks alone: configs/supervised_folder.py, another --workdir",)
    return config
