"""Mean teacher on a folder of your own images, of which some have masks: consistency with the
average of the student.

Command:
  python -m jaxssl.main --config=configs/mean_teacher_folder.py --config.data.root=DIR --workdir=W

What DIR holds, and the variants, are those of mkd_folder.py; with :small after the file it is for
CPUs.

Cost: two passes of the student a step, and one of the teacher, without a gradient.

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
            "name": "mean_teacher",
            "weight": 1.0,
            "rampup": 0.27,
            "ema_decay_max": 0.99,
            "teacher_stats": "own",
            "auxiliary_weight": 0.4,
        }
    )
    if variant["backbone"] == "pretrained":
        configs.use_pretrained(config)
    config.next = ("compare with the masks alone: configs/supervised_folder.py, another --workdir",)
    return config
