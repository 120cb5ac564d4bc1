"""DMT on CIFAR-10: one network, trained anew in five rounds, labels more and more for itself.

Command, with --config.data.root=DIR for the folder that holds cifar-10-batches-py:
  python -m jaxssl.main --config=configs/dmt_cifar10.py:4000 --workdir=W
  python -m jaxssl.main --config=configs/dmt_cifar10.py:1000 --workdir=W
  python -m jaxssl.main --config=configs/dmt_cifar10.py:digits --workdir=W      # no download
  python -m jaxssl.main --config=configs/dmt_cifar10.py:fashion,1000 --config.data.root=DIR ...
  python -m jaxssl.main --config=configs/dmt_cifar10.py:fashion,1000,small ...  # for CPUs

The data are the Python version at https://www.cs.toronto.edu/~kriz/cifar.html. fashion is
Fashion-MNIST, four files at https://github.com/zalandoresearch/fashion-mnist; of Debian's package
dataset-fashion-mnist DIR is /usr/share/datasets/fashion-mnist. digits are embedded, 8x8 pixels,
with 50 labels or, as digits,20, with twenty.

Cost: WRN-28-2 on 512 images of 32x32 a step, and once more without a gradient for the weights. With
  4000 labels 8286 updates on these and 230 thousand in five rounds; the paper gives 10 hours on one
  2080 Ti. digits takes 3400 updates of a small network, two minutes on two CPU cores; small is
  that network for the other data: 6000 updates on 32 images, without mixup, in which rounds go on
  with the network that labeled, class by class; ten minutes on one core.

Published (Tables 2 and 3, accuracy on the test set, mean of five runs, average of the network):
                          1000    4000     all
  labels                 75.14   86.08   96.35
  Curriculum Labeling    90.61   94.02
  DMT                    91.51   94.21

Curriculum Labeling is --config.method.weight=none. 200 training images choose the weights that
label, by the mean probability of the right class; the test set is only looked at.

What is released takes the last weights instead, --config.method.labeled_by=last, whose average is
almost the network itself, --config.method.ema_decay_max=0.001, with the network's own statistics,
--config.method.teacher_stats=copy; and it draws from other operations, of which Cutout is one:
--config.augment.operations=released --config.augment.cutout=0.
"""

from jaxssl import config as configs


def get_config(arg: str | None = None) -> configs.Config:
    variant = configs.choose(
        arg,
        labels=("20", "50", "250", "1000", "4000"),
        data=("digits", "fashion"),
        network=("small",),
    )
    config = configs.cifar10(variant)
    config.method = configs.dmt_images()
    if variant["data"] == "digits" or variant["network"] == "small":
        config.method.update(supervised_rate=None, ema_decay_max=0.98)
        if variant["data"] != "digits":  # a network that learns so little at once fits no mixtures
            config.method.update(rule="balanced", mixup=0.0, restart=False)
        config.next = (
            "compare with the labeled images alone: python -m jaxssl.main "
            f"--config=configs/supervised_cifar10.py:{arg} --workdir=/tmp/supervised",
        )
    return config
