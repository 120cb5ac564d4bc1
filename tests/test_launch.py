"""The starters, with programs of the same names in the place of Slurm and Google Cloud."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))
ARGUMENTS = ["--config=c.py:a b", "--workdir=W"]

# Stands in for python: notes its arguments and the variables that matter, and does as told.
PYTHON = """#!/usr/bin/env bash
if [[ $1 == -c ]]; then exec {python} "$@"; fi
# In one write: two processes note theirs at the same time.
line=$(printf '%s|' "${{JAX_PROCESS_ID-}}/${{JAX_NUM_PROCESSES-}}" "$@"); echo "$line" >> calls
trap 'echo saved >> calls; exit 143' TERM
if [[ -e wait ]]; then echo ready >> calls; while :; do sleep 0.05; done; fi
exit "$(cat "code${{JAX_PROCESS_ID-}}" 2>/dev/null || echo 0)"
"""
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do echo "srun $1" >> calls; shift; done
exec "$@"
"""
SCONTROL = '#!/usr/bin/env bash\necho "scontrol $*" >> calls\n'

# The TPU is what the file `state` says. It is preempted while the first run of main is under way.
GCLOUD = """#!/usr/bin/env bash
printf '%s ' "$@" | tr '\\n' ' ' >> calls; echo >> calls
case "$*" in
  *describe*) cat state 2>/dev/null || exit 1 ;;
  *'queued-resources create'*) echo ACTIVE > state ;;
  *'queued-resources delete'*) rm state ;;
  *jaxssl.main*)
    if [[ -e mistake ]]; then exit 2; fi
    if [[ ! -e preempted ]]; then touch preempted; echo SUSPENDED > state; exit 255; fi ;;
esac
"""


def install(folder, **programs):
    for name, text in programs.items():
        path = folder / name
        path.write_text(text.format(python=sys.executable) if name == "python" else text)
        path.chmod(0o755)


def start(folder, script, **variables):
    environment = {"PATH": f"{folder}:{os.environ['PATH']}", "HOME": str(folder), **variables}
    return subprocess.Popen(
        ["bash", str(ROOT / "launch" / script), *ARGUMENTS],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(folder, script, **variables):
    process = start(folder, script, **variables)
    _, stderr = process.communicate(timeout=60)
    return process.returncode, stderr, calls(folder)


def calls(folder):
    path = folder / "calls"
    return path.read_text().splitlines() if path.exists() else []


def wait_for(folder, line, count=1):
    deadline = time.monotonic() + 30
    while calls(folder).count(line) < count:
        assert time.monotonic() < deadline, calls(folder)
        time.sleep(0.02)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_sound(path):
    text = path.read_text()
    assert os.access(path, os.X_OK)
    assert "set -euo pipefail" in text
    for word in ("Prerequisites:", "Cost:", "goes on", f"launch/{path.name}"):
        assert word in text
    subprocess.run(["bash", "-n", str(path)], check=True)
    if checker := shutil.which("shellcheck"):
        subprocess.run([checker, str(path)], check=True)


def test_local_hands_everything_to_one_process(tmp_path):
    install(tmp_path, python=PYTHON)
    (tmp_path / "code").write_text("2")
    code, _, called = run(tmp_path, "local.sh")
    assert code == 2
    assert called == ["/|-m|jaxssl.main|--config=c.py:a b|--workdir=W|"]


@pytest.mark.parametrize("failing", [None, 0, 1])
def test_local_starts_several_processes(tmp_path, failing):
    install(tmp_path, python=PYTHON)
    if failing is not None:
        (tmp_path / f"code{failing}").write_text("7")
    code, _, called = run(tmp_path, "local.sh", PROCESSES="2")
    assert code == (0 if failing is None else 7)
    arguments = "-m|jaxssl.main|--config=c.py:a b|--workdir=W|"
    assert sorted(called) == [f"{rank}/2|{arguments}" for rank in range(2)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_local_waits_until_all_have_saved(tmp_path, number):
    install(tmp_path, python=PYTHON)
    (tmp_path / "wait").touch()
    process = start(tmp_path, "local.sh", PROCESSES="2")
    wait_for(tmp_path, "ready", 2)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == 143
    assert calls(tmp_path).count("saved") == 2


def test_local_really_starts_the_program(tmp_path):
    command = ["bash", str(ROOT / "launch" / "local.sh"), "--config=nowhere.py", "--workdir=W"]
    environment = os.environ | {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr == (
        "error: There is no config file 'nowhere.py'. See the folder configs/.\n"
    )


def test_slurm_runs_a_step(tmp_path):
    install(tmp_path, python=PYTHON, srun=SRUN, scontrol=SCONTROL)
    code, _, called = run(tmp_path, "slurm.sh", SLURM_JOB_ID="17")
    assert code == 0
    assert called == [
        "srun --kill-on-bad-exit=1",
        "srun --gpu-bind=none",
        "/|-m|jaxssl.main|--config=c.py:a b|--workdir=W|",
    ]
    (tmp_path / "code").write_text("2")
    code, _, called = run(tmp_path, "slurm.sh", SLURM_JOB_ID="17")
    assert code == 2
    assert not any("requeue" in line for line in called)


@pytest.mark.parametrize("canceled", [False, True])
def test_slurm_saves_and_requeues_when_time_is_up(tmp_path, canceled):
    install(tmp_path, python=PYTHON, srun=SRUN, scontrol=SCONTROL)
    (tmp_path / "wait").touch()
    process = start(tmp_path, "slurm.sh", SLURM_JOB_ID="17")
    wait_for(tmp_path, "ready")
    if canceled:  # Slurm signals the script and the tasks
        process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        assert process.poll() is None
        tasks = subprocess.run(
            ["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True
        )
        os.kill(int(tasks.stdout.split()[0]), signal.SIGTERM)
    else:
        process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=60)
    assert process.returncode == 143
    assert calls(tmp_path)[-1] == ("saved" if canceled else "scontrol requeue 17")
    assert "saved" in calls(tmp_path)


TPU = {"NAME": "mkd", "ZONE": "z", "TYPE": "v5litepod-8", "BUCKET": "b", "POLL_SECONDS": "0"}


def test_tpu_vm_goes_on_after_preemption(tmp_path):
    install(tmp_path, gcloud=GCLOUD)
    code, stderr, called = run(tmp_path, "tpu_vm.sh", **TPU)
    assert code == 0, stderr
    words = ["create", "delete", "scp", "jaxssl.main"]
    order = [word for line in called for word in words if f" {word} " in line]
    once = ["create", "scp", "jaxssl.main"]
    assert order == [*once, "delete", *once, "delete"]
    assert not (tmp_path / "state").exists()
    create = next(line for line in called if " create " in line)
    assert "--accelerator-type=v5litepod-8" in create
    assert "--spot" in create
    trained = next(line for line in called if "jaxssl.main" in line)
    assert "--worker=all" in trained
    assert r"-m jaxssl.main --config.distributed=on --config=c.py:a\ b --workdir=W" in trained
    assert any("gcsfuse --implicit-dirs b bucket" in line for line in called)


def test_tpu_vm_uses_what_is_there_and_stops_at_a_mistake(tmp_path):
    install(tmp_path, gcloud=GCLOUD)
    (tmp_path / "state").write_text("ACTIVE\n")
    (tmp_path / "mistake").touch()
    code, stderr, called = run(tmp_path, "tpu_vm.sh", **TPU)
    assert code == 2
    assert "gcloud compute tpus queued-resources delete mkd" in stderr
    assert not any(" create " in line or " delete " in line for line in called)


def test_tpu_vm_says_what_it_needs(tmp_path):
    code, stderr, called = run(tmp_path, "tpu_vm.sh", NAME="mkd")
    assert code != 0
    assert "set ZONE" in stderr
    assert called == []
