"""Supervised training on CIFAR-10's labeled images alone, with mixup: the baseline of DMT's tables.

Command, with --config.data.root=DIR for the folder that holds cifar-10-batches-py:
  python -m jaxssl.main --config=configs/supervised_cifar10.py:4000 --workdir=W
  python -m jaxssl.main --config=configs/supervised_cifar10.py:all --workdir=W
  python -m jaxssl.main --config=configs/supervised_cifar10.py:digits --workdir=W  # no download

Data and variants are those of dmt_cifar10.py. It is what that begins with: as many updates, at the
same rate, on the same augmented images, and the average of the network is evaluated.

Cost: one network a step, 512 images; 8286 updates with 4000 labels, 4143 with 1000, 29297 with all.

Published (DMT's Tables 2 and 3, accuracy on the test set, mean of five runs):
               1000    4000     all
  labels      75.14   86.08   96.35
"""

import math

from jaxssl import config as configs


def get_config(arg: str | None = None) -> configs.Config:
    variant = configs.choose(
        arg,
        labels=("20", "50", "250", "1000", "4000", "all"),
        data=("digits", "fashion"),
        network=("small",),
    )
    config = configs.cifar10(variant)
    config.method = configs.supervised(mixup=0.75, ema_decay_max=0.999)
    if variant["data"] == "digits" or variant["network"] == "small":
        config.method.ema_decay_max = 0.98
        config.batch.labeled = 16 if variant["data"] == "digits" else 32
        if variant["data"] != "digits":
            config.method.mixup = 0.0
        config.next = (
            "compare with DMT: python -m jaxssl.main "
            f"--config=configs/dmt_cifar10.py:{arg} --workdir=/tmp/dmt",
        )
        return config
    images = {"fashion": 60_000}.get(variant["data"] or "", 50_000)
    labels = images if variant["labels"] == "all" else int(variant["labels"] or 4000)
    config.epochs = 300 * math.sqrt(images / labels)
    config.batch.labeled = 512
    config.optimizer.learning_rate = 0.2
    return config
