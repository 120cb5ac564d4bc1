"""Notebooks are executed as they are, in a copy of the repository, with fewer steps."""

import os
import re
import shutil
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "colabs").glob("*.ipynb"))
FEWER = {"STEPS": 2, "WARMUP": 2, "OWN_STEPS": 2, "OWN_WARMUP": 2}


def with_parameters(notebook, **values):
    """Sets names in the cell tagged "parameters"; every name there must be given."""
    (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    names = re.findall(r"[A-Z_]+(?=[^=\n]*=)", cell.source)
    assert set(names) == set(values)
    cell.source = "\n".join(f"{name} = {value!r}" for name, value in values.items())


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_stripped_and_nothing_is_defined(path):
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert not cell.outputs
            assert cell.execution_count is None
            assert not re.search(r"^\s*(def|class) ", cell.source, re.MULTILINE)


@pytest.mark.slow
def test_quickstart_runs(tmp_path, monkeypatch):
    for folder in ("configs", "colabs"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(ROOT / "colabs" / "quickstart.ipynb", as_version=4)
    with_parameters(notebook, **FEWER, OUT=str(tmp_path / "out"))
    resources = {"metadata": {"path": str(tmp_path / "colabs")}}
    nbclient.NotebookClient(notebook, timeout=600, resources=resources).execute()
    assert list((tmp_path / "out" / "predicted" / "labels").glob("*.png"))
    texts = [o.get("text", "") for cell in notebook.cells for o in cell.get("outputs", ())]
    assert any("Training would start" in text for text in texts)
