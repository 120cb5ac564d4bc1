"""Two local processes train as one with two devices does; and what ends one ends the other."""

import functools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import leaves

from jaxssl.contracts import UserError
from jaxssl.data.cityscapes import INFO
from jaxssl.data.pseudo_labels import Store
from jaxssl.startup import has_peers, join_peers

ROOT = Path(__file__).parents[1]

# The whole program, but for a network that compiles in seconds.
PROGRAM = """
import os, sys
sys.path.insert(0, {tests!r})
import conftest
os.environ["XLA_FLAGS"] = sys.argv.pop()
from absl import app
from jaxssl import main, models

models.load = lambda config, num_classes, **_: conftest.Small(num_classes=num_classes)
if __name__ == "__main__":
    app.run(main.main, flags_parser=main.parse)
"""
FLAGS = {
    "data.size": "32,64",
    "data.train_count": 20,
    "data.val_count": 6,
    "data.split": 8,
    "crop": "32,64",
    "warmup": 0,
    "steps": 6,
    "log.every": 1,
    "log.tensorboard": False,
    "eval.every": 4,
    "eval.batch": 4,
    "eval.panels": 0,
    "checkpoint.every": 1,
}


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """Starts the program as one of `count` processes with `devices` devices each."""
    folder = tmp_path_factory.mktemp("program")
    script = folder / "program.py"
    script.write_text(PROGRAM.format(tests=str(ROOT / "tests")))

    def start(workdir, *, count=1, rank=0, port=0, devices=1, method="mkd", **changes):
        environment = os.environ | {"XDG_CACHE_HOME": str(folder), "PYTHONPATH": str(ROOT)}
        if count > 1:
            environment |= one_of(count, rank, port)
        flags = [f"--config.{key}={value}" for key, value in {**FLAGS, **changes}.items()]
        config = f"--config=configs/{method}_cityscapes.py:streets"
        # Compiling is most of the time; without optimization it takes half as long.
        xla = f"--xla_backend_optimization_level=0 --xla_force_host_platform_device_count={devices}"
        return subprocess.Popen(
            [sys.executable, script, config, f"--workdir={workdir}", *flags, xla],
            env=environment,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


def one_of(count, rank, port):
    """Variables that make a process one of several."""
    return {
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_NUM_PROCESSES": str(count),
        "JAX_PROCESS_ID": str(rank),
    }


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def finish(*processes):
    """Waits, and gives what each printed."""
    said = [process.communicate(timeout=600) for process in processes]
    for process, (_, stderr) in zip(processes, said, strict=True):
        assert process.returncode == 0, stderr
        assert "Traceback" not in stderr
    return [re.sub(r"\[Gloo\].*\n?", "", stdout) for stdout, _ in said]


def pair(program, workdir, **changes):
    port = free_port()
    return [program(workdir, count=2, rank=rank, port=port, **changes) for rank in range(2)]


def wait_for_checkpoint(workdir):
    """Waits for the first one; a save waits for the one before, so the run is not far ahead."""
    deadline = time.monotonic() + 600
    while not any(path.name.isdigit() for path in (workdir / "checkpoints").glob("*")):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["mesh", "pmap"])
def test_two_processes_train_as_one_does(program, tmp_path, parallel):
    """They are killed once, and resumed; all of it within float32's rounding."""
    one, two = tmp_path / "one", tmp_path / "two"
    program = functools.partial(program, parallel=parallel)
    finish(program(one, devices=2))
    interrupted = pair(program, two)
    wait_for_checkpoint(two)
    for process in interrupted:
        process.kill()
        process.communicate()
    assert len(lines(two)) < len(lines(one))
    first, second = finish(*pair(program, two))
    assert "Resumed at step" in first
    assert "Done: step 6" in first
    assert second == ""  # one process speaks

    assert [line.keys() for line in lines(one)] == [line.keys() for line in lines(two)]
    for mine, theirs in zip(lines(one), lines(two), strict=True):
        for name in mine:
            if isinstance(mine[name], str):
                assert mine[name] == theirs[name]
                continue
            np.testing.assert_allclose(mine[name], theirs[name], rtol=1e-4, atol=1e-6, err_msg=name)
    mine, theirs = leaves(one), leaves(two)
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        np.testing.assert_allclose(value, theirs[name], rtol=1e-3, atol=2e-5, err_msg=name)
    # The second process writes nothing of its own.
    names = [{path.name for path in folder.iterdir()} for folder in (one, two)]
    assert names[1] == names[0]


DARS = {
    "method.ratios": "(0.5,)",
    "method.beta_min": "(0.0,)",
    "method.beta_max": "(0.0,)",
    "warmup": 2,
    "steps": 3,
    "data.train_count": 21,
}


@pytest.mark.slow
def test_two_processes_label_as_one_does(program, tmp_path):
    """Thirteen images, so that their shares differ."""
    one, two = tmp_path / "one", tmp_path / "two"
    finish(program(one, devices=2, method="dars", **DARS))
    finish(*pair(program, two, method="dars", **DARS))
    stores = [Store(folder / "pseudo_labels" / "round_1", INFO) for folder in (one, two)]
    ids = sorted(path.stem for path in (stores[0].folder / "labels").iterdir())
    assert len(ids) == 13
    for image_id in ids:
        (labels, levels), (others, other_levels) = (store.read(image_id) for store in stores)
        # float32 rounds otherwise where two devices share a batch.
        assert np.abs(levels.astype(int) - other_levels).max() <= 2
        assert (labels == others).mean() > 0.98
    mine, theirs = (store.read_summary() for store in stores)
    assert (mine["images"], mine["left_out"]) == (theirs["images"], theirs["left_out"]) == (13, 0)
    counts = [
        sum(c["predicted"] for c in summary["classes"].values()) for summary in (mine, theirs)
    ]
    assert counts == [13 * 32 * 64] * 2
    assert mine["kept"] == pytest.approx(theirs["kept"], abs=2e-3)
    assert mine["kl"] == pytest.approx(theirs["kl"], abs=2e-3)
    assert [line.keys() for line in lines(one)] == [line.keys() for line in lines(two)]
    for mine, theirs in zip(lines(one), lines(two), strict=True):
        if "train/loss" in mine:
            assert mine["train/loss"] == pytest.approx(theirs["train/loss"], rel=1e-2)

    # As if killed near the end of labeling: the second process lacks one, the first none. (The
    # others have been selected from already, so what is selected now differs.)
    for name in ("summary.json", "selection.json", f"labels/{ids[1]}.png"):
        (stores[1].folder / name).unlink()
    for path in (two / "checkpoints").iterdir():
        if int(path.name) > DARS["warmup"]:
            shutil.rmtree(path)
    finish(*pair(program, two, method="dars", **DARS))
    assert stores[1].complete
    assert stores[1].missing(ids) == []
    assert lines(two)[-1]["step"] == lines(one)[-1]["step"]


ALONE = """
import sys
import jax
from jax.experimental import multihost_utils
from jaxssl.startup import join_peers

join_peers()
if jax.process_index() == 1:
    sys.exit(2)
multihost_utils.sync_global_devices("the other one never comes")
"""


@pytest.mark.slow
def test_an_error_in_one_process_ends_the_other():
    """Takes as long as jax is told to wait, 30 seconds."""
    port, began = free_port(), time.monotonic()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", ALONE],
            env=os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""} | one_of(2, rank, port),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for rank in range(2)
    ]
    assert all(process.wait(timeout=200) for process in processes)
    assert time.monotonic() - began < 90


@pytest.mark.parametrize(
    ("environment", "several"),
    [
        ({}, False),
        ({"JAX_COORDINATOR_ADDRESS": "host:1234"}, True),
        ({"SLURM_NTASKS": "4", "SLURM_JOB_ID": "1"}, False),  # salloc, not srun
        ({"SLURM_STEP_NUM_TASKS": "1"}, False),
        ({"SLURM_STEP_NUM_TASKS": "2"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, False),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"TPU_WORKER_HOSTNAMES": "a"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
    ],
)
def test_the_environment_says_whether_there_are_others(environment, several):
    assert has_peers(environment) == several


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"JAX_COORDINATOR_ADDRESS": "localhost:1"},
        {"JAX_NUM_PROCESSES": "two"},
        {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"},  # Open MPI 5 names no address
    ],
)
def test_an_environment_that_does_not_say_enough_is_refused(monkeypatch, variables):
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="JAX_NUM_PROCESSES and JAX_PROCESS_ID"):
        join_peers()
