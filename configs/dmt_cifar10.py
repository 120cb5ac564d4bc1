"""DMT on CIFAR-10: one network, trained anew in five rounds, labels more and more for itself.

Command, with --config.data.root=DIR for the folder that holds cifar-10-batches-py:
  python -m jaxssl.main --config=configs/dmt_cifar10.py:4000 --workdir=W
  python -m jaxssl.main --config=configs/dmt_cifar10.py:1000 --workdir=W
  python -m jaxssl.main --config=configs/dmt_cifar10.py:digits --workdir=W      # no download
  python -m jaxssl.main --config=configs/dmt_cifar10.py:fashion,1000 --config.data.root=DIR ...

The data are the Python version of https://www.cs.toronto.edu/~kriz/cifar.html; Fashion-MNIST's are
the four files of https://github.com/zalandoresearch/fashion-mnist (on Debian, the package
dataset-fashion-mnist has them in /usr/share/datasets/fashion-mnist). digits has 50 labels, or with
digits,20 twenty.
"""

from jaxssl import config as configs


def get_config(arg: str | None = None) -> configs.Config:
    variant = configs.choose(
        arg,
        labels=("20", "50", "250", "1000", "4000"),
        data=("digits", "fashion"),
    )
    config = configs.cifar10(variant)
    config.method = configs.dmt_images()
    if variant["data"] == "digits":
        config.method.update(supervised_rate=None, ema_decay_max=0.98)
    return config
