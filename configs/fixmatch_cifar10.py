"""FixMatch on CIFAR-10: the network learns for strong views what it is sure of in weak ones.

Command, with --config.data.root=DIR for the folder that holds cifar-10-batches-py:
  python -m jaxssl.main --config=configs/fixmatch_cifar10.py:4000 --workdir=W
  python -m jaxssl.main --config=configs/fixmatch_cifar10.py:digits --workdir=W  # no download

Data and variants are those of dmt_cifar10.py.

Cost: three passes of one network a step, one of them without a gradient, over 64 labeled and twice
  448 unlabeled images; 240 thousand steps, as many as all phases of dmt_cifar10.py have.

Published (FixMatch's Table 2, accuracy on the test set with RandAugment; DMT's has no such row):
                250    4000
              94.93   95.74

That took 2^20 steps, over which the rate fell to a fifth, not to 0, and strong views that were
turned and sheared, too: here they differ in light alone. With 1000 labels or fewer a batch has 16
labeled images, as DMT's; there it has 64: --config.batch.labeled=64 --config.batch.unlabeled=448.
"""

from ml_collections import ConfigDict

from jaxssl import config as configs


def get_config(arg: str | None = None) -> configs.Config:
    variant = configs.choose(
        arg,
        labels=("20", "50", "250", "1000", "4000"),
        data=("digits", "fashion"),
        network=("small",),
    )
    config = configs.cifar10(variant)
    config.method = ConfigDict(
        {
            "name": "fixmatch",
            "weight": 1.0,
            "threshold": 0.95,
            "ema_decay_max": 0.999,
        }
    )
    configs.use_own_views(config)
    if variant["data"] == "digits" or variant["network"] == "small":
        config.method.ema_decay_max = 0.98
        config.next = (
            "compare with the labeled images alone: python -m jaxssl.main "
            f"--config=configs/supervised_cifar10.py:{arg} --workdir=/tmp/supervised",
        )
    else:
        config.optimizer.update(learning_rate=0.03, nesterov=True)
    return config
