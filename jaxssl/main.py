"""Trains a config: `python -m jaxssl.main --config=configs/FILE.py:VARIANT --workdir=W`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from absl import app, flags, logging
from ml_collections import config_flags

from jaxssl import config as configs

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "What to train: a file of configs/, with a :variant."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where to write everything. The same one resumes.")


def main(argv: Sequence[str]) -> int:
    """Runs the config that the flags name; returns the exit code."""
    from jaxssl import phases
    from jaxssl.contracts import UserError

    # absl itself raises the level to INFO; orbax alone would write twenty lines a checkpoint.
    if not any(argument.startswith("--verbosity") for argument in sys.argv):
        logging.set_verbosity(logging.WARNING)
    try:
        if len(argv) > 1:
            raise UserError(
                f"Unexpected argument {argv[1]!r}. Overrides look like --config.steps=100."
            )
        if _CONFIG.value is None:
            raise UserError("--config is missing: --config=configs/mkd_cityscapes.py:streets, say.")
        if _WORKDIR.value is None:
            raise UserError("--workdir is missing: where to write to, --workdir=/tmp/mkd, say.")
        return phases.run(_CONFIG.value, _WORKDIR.value)
    except UserError as error:
        return _fail(str(error))


def parse(argv: Sequence[str]) -> list[str]:
    """Parses flags; a mistake is one message and exit code 2."""
    for argument in argv[1:]:
        name, _, value = argument.lstrip("-").partition("=")
        if name == "config" and value and not os.path.exists(value.partition(":")[0]):
            sys.exit(
                _fail(
                    f"There is no config file {value.partition(':')[0]!r}. See the folder configs/."
                )
            )
    try:
        return flags.FLAGS(argv)
    except Exception as error:
        sys.exit(_fail(configs.reason(error)))


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
