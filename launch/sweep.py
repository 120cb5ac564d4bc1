"""Runs the rows of a sweep file in turn, each in a folder of its own; the same command goes on.

python launch/sweep.py --sweep=configs/mkd_sweep.py --config=CONFIG --workdir=W
"""

from __future__ import annotations

import argparse
import importlib.util
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any


def main() -> int:
    """Runs or prints the commands; returns the first failing exit code, or 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sweep", required=True, help="a file with get_rows()")
    parser.add_argument("--config", required=True, help="what the rows vary, with its :variant")
    parser.add_argument("--workdir", required=True, type=Path, help="each row gets a folder in it")
    parser.add_argument("--only", default="", help="rows whose name begins like this")
    parser.add_argument("--dry_run", action="store_true", help="print the commands, run nothing")
    args, overrides = parser.parse_known_args()
    rows = [row for row in _load(args.sweep).get_rows() if row.name.startswith(args.only)]
    for row in rows:
        command = [sys.executable, "-m", "jaxssl.main", f"--config={args.config}"]
        command += [f"--workdir={args.workdir / row.name}", *overrides]
        command += [f"--config.{key}={value}" for key, value in row.overrides.items()]
        print(shlex.join(command), flush=True)
        if not args.dry_run and (code := subprocess.run(command, check=False).returncode):
            return code
    if not args.dry_run:
        _print_table(rows, args.workdir)
    return 0


def _print_table(rows: list[Any], workdir: Path) -> None:
    """Of the reported network at its end; of several, the one that had the best score."""
    from jaxssl.trained import open_trained  # jax, which a dry run does without

    print(f"{'row':40s} {'mIoU here':>10s}   published")
    for row in rows:
        result = open_trained(workdir / row.name).best
        last = 100 * result["last"] if result else float("nan")
        print(f"{row.name:40s} {last:10.2f}   {row.published}")


def _load(path: str) -> Any:
    spec = importlib.util.spec_from_file_location("sweep", path)
    if spec is None or spec.loader is None:
        sys.exit(f"error: {path} is not a Python file.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    sys.exit(main())
