"""DMT for images and what it is compared with: accuracy by labels, on digits or Fashion-MNIST.

  python benchmarks/digits_methods.py  # all rows, 20 and 50 labels, seeds 0 to 4; goes on
  python benchmarks/digits_methods.py --rows=supervised,dmt --labels=20 --seeds=0
  python benchmarks/digits_methods.py --table  # prints what is there, runs nothing
  python benchmarks/digits_methods.py --fashion=DIR --labels=250,1000 --seeds=0  # DIR: its files

Options and files are those of streets_methods.py. A seed chooses the labeled images, the
initialization and the order of the batches, so differences to "supervised" of the same seed are
paired. Scores are accuracy in percent on the 360 validation images, or the 10000 test images of
Fashion-MNIST, after the last update, of the network that the method reports: the average of what
was trained, in every row. Updates are those of all phases. In each of five rounds DMT
and Curriculum Labeling train a new network on digits, and go on with the last one on Fashion-MNIST.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import streets_methods as methods
from streets_methods import BASELINE, Row

FILE = Path(__file__).resolve()


def rows() -> dict[str, Row]:
    return {
        BASELINE: Row("supervised", {"method.mixup": 0.0}),
        "supervised_mixup": Row("supervised"),
        "curriculum_labeling": Row("dmt", {"method.weight": "none"}),
        "dmt": Row("dmt"),
        "mean_teacher": Row("mean_teacher"),
        "fixmatch": Row("fixmatch"),
    }


def main() -> int:
    parser = methods.create_parser(__doc__, rows(), range(5))
    parser.add_argument("--labels", default="20,50", help="how many, separated by commas")
    parser.add_argument("--fashion", type=Path, help="folder of Fashion-MNIST's four files")
    args = methods.parse(parser, rows())
    results = args.results or methods.RESULTS / ("fashion_methods" if args.fashion else FILE.stem)
    words, given = ["digits"], {}
    if args.fashion:
        words, given = ["fashion", "small"], {"data.root": str(args.fashion.absolute())}
    for labels in args.labels.split(","):

        def config(row: Row, seed: int, labels: str = labels) -> Any:
            return methods.load_config(row, "cifar10", [*words, labels], seed, given | args.changes)

        print(f"{labels} labels\n\n{methods.compare(args, rows(), config, results)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
