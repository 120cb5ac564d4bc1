"""The rows of DMT's ablation, Table 7, as overrides of a DMT config.

Command:
  python launch/sweep.py --sweep=configs/dmt_sweep.py --config=CONFIG --workdir=W

with a CONFIG such as configs/dmt_voc.py:1_20 or configs/dmt_cityscapes.py:streets. It runs every
row in a folder of its own and prints a table; --dry_run prints the commands alone. Cost: three runs
of two networks, three of one, and the baseline, one without rounds.

The published figures are mIoU on VOC 2012 val, of one random split each.
"""

from typing import Any, NamedTuple


class Row(NamedTuple):
    """One run: its name, what it overrides, and the published mIoU in percent by share labeled."""

    name: str
    overrides: dict[str, Any]
    published: dict[str, float]


def get_rows() -> list[Row]:
    def row(
        name: str,
        of_20: float,
        of_50: float,
        *,
        labels: str = "mutual",
        weight: str = "dynamic",
        ratios: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8, 1.0),
    ) -> Row:
        overrides = {"method.labels": labels, "method.weight": weight, "method.ratios": ratios}
        return Row(f"table7/{name}", overrides, {"1_20": of_20, "1_50": of_50})

    return [
        row("baseline", 61.90, 56.29, labels="own", ratios=()),
        row("online_st", 63.12, 53.52, labels="online", weight="none"),
        row("cbst", 65.09, 62.29, labels="own", weight="none"),
        row("dst", 69.43, 66.50, labels="own"),
        row("dmt_naive", 70.00, 64.95, weight="naive"),
        row("dmt", 70.16, 68.37),
        row("dmt_flip", 70.17, 68.35, weight="flip"),
    ]
