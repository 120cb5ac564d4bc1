"""The rows of RML's ablation and of its pairs of networks, Tables 4 and 5, as overrides of an RML
config.

Command:
  python launch/sweep.py --sweep=configs/rml_sweep.py --config=CONFIG --workdir=W

with a CONFIG such as configs/rml_cityscapes.py:1_8 or configs/rml_cityscapes.py:streets. It runs
every row in a folder of its own and prints a table; --dry_run prints the commands alone, and
--only=table4 leaves out SETR, whose default is too large for streets. Cost: twelve runs, of which
one has two stages, eight have one and the baselines have none.

The published figures are mIoU on Cityscapes val, 1/8, of network a and, in Table 5, of b. IML is
mutual learning by teachers, RML with rectified labels too. Table 5's text has no noise in any row;
its first pair has the figure of Table 4's full noise.
"""

from typing import Any, NamedTuple


class Row(NamedTuple):
    """One run: its name, what it overrides, and the published mIoU in percent by network."""

    name: str
    overrides: dict[str, Any]
    published: dict[str, float]


def get_rows() -> list[Row]:
    return [*_table_4(), *_table_5()]


def _iml(*, model_noise: bool = False, input_noise: bool = False) -> dict[str, Any]:
    return {
        "method.supervision": "peer",
        "method.rectification": False,
        "method.model_noise": model_noise,
        "method.input_noise": input_noise,
        "method.stages": 1,
    }


def _baseline() -> dict[str, Any]:
    return {**_iml(), "method.stages": 0}


def _table_4() -> list[Row]:
    rows = {
        "baseline": (_baseline(), 56.03),
        "iml": (_iml(), 60.09),
        "iml_model_noise": (_iml(model_noise=True), 60.51),
        "iml_input_noise": (_iml(input_noise=True), 60.49),
        "iml_full_noise": (_iml(model_noise=True, input_noise=True), 61.25),
        "rml": ({"method.stages": 1}, 62.85),
        "rml_two_stages": ({"method.stages": 2}, 63.65),
    }
    return [
        Row(f"table4/{name}", overrides, {"a": miou}) for name, (overrides, miou) in rows.items()
    ]


def _table_5() -> list[Row]:
    def row(name: str, method: dict[str, Any], setr: str, *published: float) -> Row:
        networks = {f"model_{student}.name": "setr" for student in setr}
        return Row(
            f"table5/{name}", {**method, **networks}, dict(zip("ab", published, strict=False))
        )

    return [
        row("baseline", _baseline(), "", 54.52),
        row("setr_baseline", _baseline(), "ab", 57.79),
        row("iml", _iml(), "", 61.25, 61.53),
        row("setr_setr_iml", _iml(), "ab", 64.15, 63.74),
        row("deeplab_v2_setr_iml", _iml(), "b", 63.96, 64.35),
    ]
