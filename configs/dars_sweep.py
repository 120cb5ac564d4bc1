"""The rows of DARS's ablations, Tables 4 and 6, as overrides of a DARS config.

Command:
  python launch/sweep.py --sweep=configs/dars_sweep.py --config=CONFIG --workdir=W

with a CONFIG such as configs/dars_cityscapes.py:1_8 or configs/dars_cityscapes.py:streets. It runs
every row in a folder of its own and prints a table; --dry_run prints the commands alone. Cost:
fifteen runs, of which six have two rounds, eight have one and the baseline has none.

The published figures are mIoU on Cityscapes val, 1/8, crop 361, of PSPNet-50: of all 19 classes,
and of the 13 that Table 4 calls the tail. IT means a second round, TS a temperature.
"""

from typing import Any, NamedTuple


class Row(NamedTuple):
    """One run: its name, what it overrides, and the published mIoU in percent."""

    name: str
    overrides: dict[str, Any]
    published: dict[str, float]


def get_rows() -> list[Row]:
    return [*_table_4(), *_table_6()]


def _rounds(
    ratios: tuple[float, ...], beta_min: tuple[float, ...], beta_max: tuple[float, ...]
) -> dict[str, Any]:
    return {"method.ratios": ratios, "method.beta_min": beta_min, "method.beta_max": beta_max}


NONE = _rounds((), (), ())
ONE = _rounds((0.2,), (0.0,), (0.0,))
TWO = _rounds((0.2, 0.5), (0.0, 0.2), (0.0, 0.5))
"""IT."""


def _table_4() -> list[Row]:
    def row(
        name: str,
        published: float,
        tail: float,
        *,
        rounds: dict[str, Any] = ONE,
        rule: str = "dars",
        temperature: float = 1.0,
    ) -> Row:
        overrides = {**rounds, "method.rule": rule, "method.temperature": temperature}
        return Row(f"table4/{name}", overrides, {"pspnet50": published, "tail": tail})

    return [
        row("baseline", 60.75, 47.2, rounds=NONE),
        row("st", 65.70, 54.0, rule="st"),
        row("st_ts", 65.89, 54.3, rule="st", temperature=1.27),
        row("cbst", 66.29, 55.0, rule="cbst"),
        row("cbst_ts", 66.61, 55.5, rule="cbst", temperature=1.27),
        row("da_ts", 67.31, 56.7, rule="da", temperature=1.27),
        row("dars", 68.01, 57.9),
        row("st_it", 66.59, 55.2, rule="st", rounds=TWO),
        row("cbst_it", 67.20, 56.1, rule="cbst", rounds=TWO),
        row("dars_it", 69.64, 60.6, rounds=TWO),
    ]


def _table_6() -> list[Row]:
    """Rounds by their last one's ratio (alpha, in percent) and widened scale (beta)."""
    published = {
        "round1_20": (ONE, 68.01),
        "round1_20_wider": (_rounds((0.2,), (0.2,), (0.5,)), 67.54),
        "round2_20": (_rounds((0.2, 0.2), (0.0, 0.0), (0.0, 0.0)), 68.27),
        "round2_50": (_rounds((0.2, 0.5), (0.0, 0.0), (0.0, 0.0)), 68.93),
        "round2_50_wider": (TWO, 69.64),
    }
    return [
        Row(f"table6/{name}", rounds, {"pspnet50": miou})
        for name, (rounds, miou) in published.items()
    ]
