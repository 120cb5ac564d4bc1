"""Direct mutual learning on a folder of your own images, of which some have masks: two students
imitate each other's probabilities.

Command:
  python -m jaxssl.main --config=configs/dml_folder.py --config.data.root=DIR --workdir=W
  python -m jaxssl.main --config=configs/dml_folder.py:small --config.data.root=DIR --workdir=W

What DIR holds, and the variants, are those of mkd_folder.py.

Cost: two networks a step, each on labeled and unlabeled images.

Published: none. Compare with configs/supervised_folder.py, which learns from the masks alone.
"""

from ml_collections import ConfigDict

from jaxssl import config as configs


def get_config(arg: str | None = None) -> configs.Config:
    variant = configs.choose(
        arg, network=("small", "r50", "r101"), backbone=("r50", "r101", "pretrained")
    )
    config = configs.folder(variant["network"])
    config.method = ConfigDict({"name": "dml", "weight": 1.0, "auxiliary_weight": 0.4})
    if variant["backbone"] == "pretrained":
        configs.use_pretrained(config)
    config.next = ("compare with the masks alone: configs/supervised_folder.py, another --workdir",)
    return config
