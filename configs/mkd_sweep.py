"""The rows of MKD's ablations, Tables 3, 4 and 5, as overrides of an MKD config.

Command:
  python launch/sweep.py --sweep=configs/mkd_sweep.py --config=CONFIG --workdir=W

with a CONFIG such as configs/mkd_cityscapes.py:streets. It runs every row in a folder of its own
and prints a table; --dry_run prints the commands alone. Cost: that of one run, seventeen times.

The published figures are mIoU on VOC 2012 val, 1/16 of the augmented set (662 labels). The rows of
Table 3 switch parts on one at a time; only the last two combine them.
"""

from typing import Any, NamedTuple


class Row(NamedTuple):
    """One run: its name, what it overrides, and the published mIoU in percent per backbone."""

    name: str
    overrides: dict[str, Any]
    published: dict[str, float]


def get_rows() -> list[Row]:
    return [*_table_3(), *_table_4(), *_table_5()]


def _table_3() -> list[Row]:
    def row(
        name: str,
        published: float,
        *,
        teacher: str = "none",
        strong: bool = False,
        features: bool = False,
    ) -> Row:
        overrides = {
            "method.teacher": teacher,
            "method.strong": strong,
            "method.feature_augmentation": features,
        }
        return Row(f"table3/{name}", overrides, {"r50": published})

    return [
        row("co_training", 68.82),
        row("mean_teacher", 68.85, teacher="own"),
        row("mutual_mean_teacher", 70.19, teacher="mutual"),
        row("strong", 72.52, strong=True),
        row("features", 70.76, features=True),
        row("mutual_strong", 73.66, teacher="mutual", strong=True),
        row("mutual_strong_features", 74.02, teacher="mutual", strong=True, features=True),
    ]


def _table_4() -> list[Row]:
    """How fast teachers follow (gamma of eq. 1)."""
    published = {
        0.0: (72.41, 74.53),
        0.2: (72.68, 74.60),
        0.4: (72.82, 75.34),
        0.6: (72.74, 75.17),
        0.8: (72.78, 75.07),
    }
    return [
        Row(f"table4/gamma_{gamma}", {"method.ema_decay_max": gamma}, {"r50": r50, "r101": r101})
        for gamma, (r50, r101) in published.items()
    ]


def _table_5() -> list[Row]:
    """The weight of the loss between students (beta of eq. 4), alpha 1.5."""
    published = {
        0.0: (72.52, 74.44),
        0.5: (72.80, 75.81),
        1.0: (73.66, 75.44),
        1.5: (73.43, 75.80),
        2.0: (73.49, 75.64),
    }
    return [
        Row(
            f"table5/beta_{beta}",
            {"method.alpha": 1.5, "method.beta": beta},
            {"r50": r50, "r101": r101},
        )
        for beta, (r50, r101) in published.items()
    ]
