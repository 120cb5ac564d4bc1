"""The rows of U2PL's ablations, Tables 4 to 7, as overrides of a U2PL config.

Command:
  python launch/sweep.py --sweep=configs/u2pl_sweep.py --config=CONFIG --workdir=W

with a CONFIG such as configs/u2pl_voc.py:1_4 or configs/u2pl_cityscapes.py:streets. It runs every
row in a folder of its own and prints a table; --dry_run prints the commands alone. Cost: eighteen
runs. Four of them are the method as it is, one in each table.

The published figures are mIoU on PASCAL VOC val, blender set, by share of labels. Of the baseline
in Table 6 the paper says that it is the mean teacher of its Table 2, so it has no CutMix and
teaches all pixels but the least sure one.
"""

from typing import Any, NamedTuple


class Row(NamedTuple):
    """One run: its name, what it overrides, and the published mIoU in percent."""

    name: str
    overrides: dict[str, Any]
    published: dict[str, float]


def get_rows() -> list[Row]:
    return [*_table_4(), *_table_5(), *_table_6(), *_table_7()]


def _table_4() -> list[Row]:
    """Which unlabeled pixels may be negatives."""
    published = {
        "unreliable": (79.01, 79.30),
        "reliable": (77.30, 77.35),
        "all": (77.40, 77.57),
    }
    return [
        _row(f"table4/{pixels}", {"method.negative_pixels": pixels}, *miou)
        for pixels, miou in published.items()
    ]


def _table_5() -> list[Row]:
    """Limits of ranks."""
    published = {
        (1, 3): (78.57, 79.03),
        (1, 20): (78.64, 79.07),
        (3, 10): (78.27, 78.91),
        (3, 20): (79.01, 79.30),
        (10, 20): (78.62, 78.94),
    }
    return [
        _row(
            f"table5/ranks_{low}_{high}", {"method.rank_low": low, "method.rank_high": high}, *miou
        )
        for (low, high), miou in published.items()
    ]


def _table_6() -> list[Row]:
    """Components: Lc, memory bank, dynamic partition, limits of ranks, unreliable negatives."""

    def row(
        name: str, miou: float, *, bank: bool, dynamic: bool, ranks: bool, unreliable: bool
    ) -> Row:
        overrides = {
            "method.memory_bank": bank,
            "method.dynamic": dynamic,
            "method.probability_rank": ranks,
            "method.negative_pixels": "unreliable" if unreliable else "all",
        }
        return Row(f"table6/{name}", overrides, {"1_4": miou})

    nothing = {"method.lambda_c": 0.0, "method.cutmix": 0.0, "method.alpha_0": 0.0}
    return [
        Row("table6/baseline", nothing, {"1_4": 73.02}),
        row("contrast", 77.08, bank=False, dynamic=False, ranks=False, unreliable=False),
        row("no_dynamic", 78.49, bank=True, dynamic=False, ranks=True, unreliable=True),
        row("no_ranks", 79.07, bank=True, dynamic=True, ranks=False, unreliable=True),
        row("no_unreliable", 77.57, bank=True, dynamic=True, ranks=True, unreliable=False),
        row("all", 79.30, bank=True, dynamic=True, ranks=True, unreliable=True),
    ]


def _table_7() -> list[Row]:
    """Percent of the pixels that are unreliable at first."""
    published = {40: (76.77, 76.92), 30: (77.34, 77.38), 20: (79.01, 79.30), 10: (77.80, 77.95)}
    return [
        _row(f"table7/alpha_{alpha}", {"method.alpha_0": float(alpha)}, *miou)
        for alpha, miou in published.items()
    ]


def _row(name: str, overrides: dict[str, Any], eighth: float, quarter: float) -> Row:
    return Row(name, overrides, {"1_8": eighth, "1_4": quarter})
