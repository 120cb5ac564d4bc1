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
FEWER = {"STEPS": 2, "WARMUP": 2}


def with_parameters(notebook, **values):
    """Sets names in the cell tagged "parameters"; every name there must be given."""
    (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    names = re.findall(r"[A-Z_]+(?=[^=\n]*=)", cell.source)
    assert set(names) == set(values)
    cell.source = "\n".join(f"{name} = {value!r}" for name, value in values.items())


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_stripped_and_nothing_is_defined_but_in_files(path):
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert not cell.outputs
            assert cell.execution_count is None
            assert cell.source.startswith("%%writefile") or not re.search(
                r"^\s*(def|class) ", cell.source, re.MULTILINE
            )


@pytest.fixture
def execute(tmp_path, monkeypatch):
    """Runs a notebook in a copy of the repository; returns what it prints and shows."""
    for folder in ("configs", "colabs"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))

    def run(name, **parameters):
        notebook = nbformat.read(ROOT / "colabs" / f"{name}.ipynb", as_version=4)
        with_parameters(notebook, **parameters, OUT=str(tmp_path / "out"))
        resources = {"metadata": {"path": str(tmp_path / "colabs")}}
        nbclient.NotebookClient(notebook, timeout=600, resources=resources).execute()
        outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
        return "".join(o.get("text", "") + str(o.get("data", "")) for o in outputs)

    return run


@pytest.mark.slow
def test_quickstart_runs(execute, tmp_path):
    text = execute("quickstart", **FEWER, OWN_STEPS=2, OWN_WARMUP=2)
    assert list((tmp_path / "out" / "predicted" / "labels").glob("*.png"))
    assert "Training would start" in text


@pytest.mark.slow
def test_a_method_is_added(execute, tmp_path):
    text = execute("add_a_method", **FEWER)
    for words in ("Method(teacher_stats='ema', weight=0.1)", "as in NumPy", "'train/loss_entropy'"):
        assert words in text
    for name in ("supervised", "entropy"):
        assert list((tmp_path / "out" / name / "panels").glob("*.png"))
