"""DMT on a folder of your own images, of which some have masks: two networks label for each other.

Command:
  python -m jaxssl.main --config=configs/dmt_folder.py --config.data.root=DIR --workdir=W
  python -m jaxssl.main --config=configs/dmt_folder.py:small --config.data.root=DIR --workdir=W

What DIR holds, and the variants, are those of mkd_folder.py. Steps are those of a round, of which
each network has five, a fifth of MKD's; the warm-up is its training on the masks alone before.
With pretrained features the networks are alike but for their heads, so each gets four fifths of
the masks then: --config.method.start=weights gives each all of them.

Cost: one network a step, in twelve phases; before each round a network labels all images without a
  mask, by windows of the crop.

Published: none. Compare with configs/supervised_folder.py, which learns from the masks alone.
"""

from jaxssl import config as configs


def get_config(arg: str | None = None) -> configs.Config:
    variant = configs.choose(
        arg, network=("small", "r50", "r101"), backbone=("r50", "r101", "pretrained")
    )
    config = configs.folder(variant["network"])
    config.method = configs.dmt()
    if variant["backbone"] == "pretrained":
        configs.use_pretrained(config)
        config.method.start = "sampling"
    else:
        config.warmup = config.limits.steps // 2
    config.limits.steps //= 5
    # Half the rate, as on VOC, so that a round does not undo what the last one learned.
    config.method.supervised_rate = config.optimizer.learning_rate
    config.optimizer.learning_rate /= 2
    config.next = ("compare with the masks alone: configs/supervised_folder.py, another --workdir",)
    return config
