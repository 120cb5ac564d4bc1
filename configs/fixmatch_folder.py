"""FixMatch on a folder of your own images, of which some have masks: the network learns for strong
views what it is sure of in weak ones.

Command:
  python -m jaxssl.main --config=configs/fixmatch_folder.py --config.data.root=DIR --workdir=W
  python -m jaxssl.main --config=configs/fixmatch_folder.py:small --config.data.root=DIR --workdir=W

What DIR holds, and the variants, are those of mkd_folder.py.

Cost: three passes of one network a step, one of them without a gradient.

Published: none. Compare with configs/supervised_folder.py, which learns from the masks alone.
"""

from ml_collections import ConfigDict

from jaxssl import config as configs


def get_config(arg: str | None = None) -> configs.Config:
    variant = configs.choose(
        arg, network=("small", "r50", "r101"), backbone=("r50", "r101", "pretrained")
    )
    config = configs.folder(variant["network"])
    config.method = ConfigDict(
        {
            "name": "fixmatch",
            "weight": 1.0,
            "threshold": 0.95,
            "ema_decay_max": 0.99,
            "auxiliary_weight": 0.4,
        }
    )
    if variant["backbone"] == "pretrained":
        configs.use_pretrained(config)
    config.next = ("compare with the masks alone: configs/supervised_folder.py, another --workdir",)
    return config
