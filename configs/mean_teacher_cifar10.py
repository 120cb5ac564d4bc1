"""Mean teacher on CIFAR-10: consistency with the average of the student, in another light.

Command, with --config.data.root=DIR for the folder that holds cifar-10-batches-py:
  python -m jaxssl.main --config=configs/mean_teacher_cifar10.py:4000 --workdir=W
  python -m jaxssl.main --config=configs/mean_teacher_cifar10.py:digits --workdir=W  # no download

Data and variants are those of dmt_cifar10.py.

Cost: two passes of the student a step, and one of the teacher, without a gradient, over 512 images
  together; 240 thousand steps, as many as all phases of dmt_cifar10.py have.

Published (DMT's Table 3, accuracy on the test set with this network):
               4000
  r           89.64

The figure is of MixMatch's authors, who had another number of steps and Adam. Images are cropped
and flipped alone: it is the method that shows them to student and teacher in lights of their own.
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
            "name": "mean_teacher",
            "weight": 10.0,
            "rampup": 0.27,
            "ema_decay_max": 0.999,
            "teacher_stats": "ema",
        }
    )
    configs.use_own_views(config)
    if variant["data"] == "digits" or variant["network"] == "small":
        config.method.ema_decay_max = 0.98
        config.next = (
            "compare with the labeled images alone: python -m jaxssl.main "
            f"--config=configs/supervised_cifar10.py:{arg} --workdir=/tmp/supervised",
        )
    return config
