"""What happens to a process that is told to stop; each test starts one of its own."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from jaxssl.signals import StopSignal

LOOP = """
import signal, sys, time
from jaxssl.signals import StopSignal

signal.signal(signal.SIGINT, {sigint})
with StopSignal() as stop:
    print("ready", flush=True)
    for step in range(2000):
        time.sleep(0.01)
        if stop.should_stop(step):
            print("stopping", flush=True)
            {then}
            sys.exit(128 + stop.received)
"""

TWO = """
import sys, time
import jax

rank, port = int(sys.argv[1]), sys.argv[2]
jax.distributed.initialize(f"localhost:{port}", 2, rank)
from jaxssl.signals import StopSignal

with StopSignal(jax.process_count()) as stop:
    print("ready", flush=True)
    for step in range(2000):
        time.sleep(0.02)
        if stop.should_stop(step):
            print(step, stop.received, flush=True)
            break
jax.distributed.shutdown()
"""


@pytest.fixture
def start():
    processes = []

    def run(code, *arguments):
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "XLA_FLAGS": ""}
        process = subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        processes.append(process)
        return process

    yield run
    for process in processes:
        process.kill()
        process.communicate()


def loop(then="", sigint="signal.default_int_handler"):
    return LOOP.format(then=then, sigint=sigint)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_first_signal_leaves_after_the_step(start, number):
    process = start(loop())
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert out == "stopping\n"
    assert process.returncode == 128 + number
    assert err.count("\n") == 1
    assert number.name in err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_second_signal_kills(start, number):
    process = start(loop(then="time.sleep(60)"))
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "stopping\n"
    began = time.monotonic()
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == -number
    assert time.monotonic() - began < 5


def test_ignored_interrupt_stays_ignored(start):
    process = start(loop(sigint="signal.SIG_IGN"))
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM


def test_handlers_are_given_back():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with StopSignal() as stop:
        assert signal.getsignal(signal.SIGTERM) != before[0]
        assert not stop.should_stop(1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.should_stop(2)
        assert stop.received == signal.SIGTERM
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_outside_the_main_thread_nothing_is_installed():
    seen = []

    def train():
        with StopSignal() as stop:
            seen.append((signal.getsignal(signal.SIGTERM), stop.should_stop(1)))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert seen == [(before, False)]


def test_two_processes_stop_at_the_same_step(start):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    processes = [start(TWO, str(rank), port) for rank in range(2)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    processes[1].send_signal(signal.SIGTERM)
    said = [process.communicate(timeout=60)[0].split() for process in processes]
    assert said[0] == said[1]
    assert int(said[0][0]) < 1999
    assert said[0][1] == str(int(signal.SIGTERM))
