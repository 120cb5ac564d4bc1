"""Imports point one way, and importing the package does nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "jaxssl"

# What the modules of a layer may import from this package, beside their own layer.
ALLOWED = {
    "contracts": {"inference", "state"},  # for type checkers alone
    "selection": {"contracts"},
    "data": {"contracts", "pickles", "selection"},
    "models": {"contracts", "pickles"},
    "quantile": {"contracts"},
    "losses": {"contracts", "mixing", "quantile"},
    "memory_bank": set(),
    "sampling": set(),
    "metrics": {"contracts"},
    "mixing": {"contracts"},
    "views": {"contracts"},
    "state": {"contracts"},
    "optim": {"contracts"},
    "sharding": {"contracts"},
    "signals": {"contracts"},
    "panels": {"contracts"},
    "logs": {"contracts"},
    "checkpoint": {"contracts"},
    "config": {"contracts"},
    "auto": {"config", "contracts", "data"},
    "inference": {"contracts"},
    "methods": {
        "contracts",
        "inference",
        "losses",
        "memory_bank",
        "metrics",
        "mixing",
        "quantile",
        "sampling",
        "selection",
        "state",
        "views",
    },
    "step": {"contracts", "optim", "state"},
    "sweep": {"contracts", "data", "sharding"},
    "labeling": {
        "contracts",
        "data",
        "metrics",
        "selection",
        "sweep",
        "train",
        "watch",
    },
    "calibration": {"contracts", "selection"},
    "comparison": {
        "calibration",
        "contracts",
        "data",
        "evaluate",
        "inference",
        "labeling",
        "logs",
        "metrics",
        "phases",
        "selection",
        "sharding",
        "startup",
        "sweep",
        "trained",
        "watch",
    },
    "figures": {"contracts", "metrics"},
    "report": {
        "comparison",
        "contracts",
        "data",
        "figures",
        "logs",
        "metrics",
        "panels",
        "trained",
    },
    "check_data": {
        "auto",
        "config",
        "contracts",
        "data",
        "logs",
        "main",
        "methods",
        "phases",
        "sharding",
    },
    "trained": {"checkpoint", "config", "contracts", "methods", "models", "sharding", "state"},
    "prepare": {"config", "contracts", "data", "logs"},
    "predictions": {"contracts", "data"},
    "classify": {
        "contracts",
        "data",
        "evaluate",
        "logs",
        "predict",  # for type checkers alone
        "predictions",
        "sharding",
        "startup",
        "sweep",
    },
    "predict": {
        "classify",
        "contracts",
        "data",
        "evaluate",
        "inference",
        "logs",
        "panels",
        "predictions",
        "startup",
        "trained",
    },
    "label_images": {
        "classify",
        "contracts",
        "data",
        "labeling",
        "logs",
        "predict",  # for type checkers alone
        "selection",
    },
    "label": {
        "contracts",
        "data",
        "label_images",
        "labeling",
        "logs",
        "predict",
        "predictions",
        "selection",
        "trained",
        "watch",
    },
    "startup": {"config", "contracts"},
    "evaluate": {
        "config",
        "contracts",
        "data",
        "inference",
        "logs",
        "metrics",
        "sharding",
        "state",
        "sweep",
        "startup",
        "trained",
    },
    "watch": {
        "config",
        "contracts",
        "data",
        "evaluate",
        "inference",
        "metrics",
        "sharding",
        "state",
        "sweep",
    },
}
FILES = sorted(ROOT.rglob("*.py"))


def imports_of(path: Path) -> set[str]:
    """Layers of this package that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("jaxssl.")}
    return found - {"__version__"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
    layer = path.relative_to(ROOT).parts[0].removesuffix(".py")
    if layer in ALLOWED:
        assert imports_of(path) - {layer} <= ALLOWED[layer]


@pytest.mark.parametrize(
    ("folder", "package"), [("data", "jax"), ("methods", "flax"), (".", "torch")]
)
def test_packages_stay_where_they_belong(folder, package):
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name == package or name.startswith(package + ".") for name in names), (
                path
            )


def test_linen_lives_in_models_alone():
    for path in FILES:
        if "models" not in path.parts:
            assert "flax.linen" not in path.read_text(), path


def test_importing_the_package_imports_nothing_else():
    code = "import sys, jaxssl; print([m for m in ('jax', 'numpy', 'flax') if m in sys.modules])"
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert printed.stdout.strip() == "[]"
