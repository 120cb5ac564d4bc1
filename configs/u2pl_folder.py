"""U2PL on a folder of your own images, of which some have masks: a mean teacher labels the pixels
of which it is sure, and from the others the network learns what they are not.

Command:
  python -m jaxssl.main --config=configs/u2pl_folder.py --config.data.root=DIR --workdir=W
  python -m jaxssl.main --config=configs/u2pl_folder.py:small --config.data.root=DIR --workdir=W

What DIR holds, and the variants, are those of mkd_folder.py. With two or three classes, ranks of
probability mean less, and a run says so.

Cost: a student and its teacher, three forward passes a step, one backward, and a memory bank of 49
  MiB for each class (small: 0.1 MiB), of which a step makes a second one.

Published: none. Compare with configs/supervised_folder.py, which learns from the masks alone.
"""

from jaxssl import config as configs


def get_config(arg: str | None = None) -> configs.Config:
    variant = configs.choose(
        arg, network=("small", "r50", "r101"), backbone=("r50", "r101", "pretrained")
    )
    config = configs.folder(variant["network"])
    small = variant["network"] == "small"
    config.model.embedding = 32 if small else 256
    config.method = configs.u2pl(**configs.SMALL_CONTRAST if small else {})
    if variant["backbone"] == "pretrained":
        configs.use_pretrained(config)
    config.next = ("compare with the masks alone: configs/supervised_folder.py, another --workdir",)
    return config
