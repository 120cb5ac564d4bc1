"""Metrics on disk, on TensorBoard, and on the console."""

import contextlib
import io
import json
import os
import pty
import struct
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxssl.logs import (
    Console,
    Logger,
    MetricSums,
    Stopwatch,
    create_console,
    environment,
    memory,
)


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def events(workdir):
    """What TensorBoard would read, in the order of writing: the TFRecord format, by hand."""
    from tensorboardX.proto import event_pb2

    found = []
    for path in sorted((workdir / "tensorboard").iterdir(), key=lambda p: p.name.split(".")[-1]):
        data = path.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            found.append(event_pb2.Event.FromString(data[12 : 12 + size]))
            data = data[16 + size :]
    return found


def scalars(workdir):
    return [
        (event.step, value.tag, value.simple_value)
        for event in events(workdir)
        for value in event.summary.value
        if value.HasField("simple_value")
    ]


def test_metric_sums():
    sums = MetricSums()
    for total, count in [(2.0, 1), (10.0, 3), (np.nan, 0)]:
        pair = jnp.float32(total), jnp.int32(count)
        sums.add({"loss": pair, "kept": (jnp.float32(0), jnp.float32(0))})
    sums.add({"only": (jnp.float32(1), jnp.float32(4))})
    assert sums.reduce() == {"loss": 3.0, "only": 0.25}
    assert sums.reduce() == {}


def test_metric_sums_add_in_double_precision():
    sums = MetricSums()
    for total in (2.0**24, 1.0, 1.0):
        sums.add({"pixels": (jnp.float32(total), jnp.float32(1))})
    assert sums.reduce() == {"pixels": (2**24 + 2) / 3}


def test_metrics_file(tmp_path):
    with Logger(tmp_path / "new", tensorboard=False) as logger:
        logger.write(10, "warmup", {"train/loss": np.float32(0.5), "train/kept": 1})
        assert len(lines(tmp_path / "new")) == 1  # without waiting for the end
        logger.write(20, "main", {"train/loss": np.nan, "val/miou": np.inf, "eval/mode": "whole"})
    assert lines(tmp_path / "new") == [
        {"step": 10, "phase": "warmup", "train/loss": 0.5, "train/kept": 1.0},
        {"step": 20, "phase": "main", "train/loss": None, "val/miou": None, "eval/mode": "whole"},
    ]
    assert not (tmp_path / "new" / "tensorboard").exists()


@pytest.mark.parametrize(("restored", "kept"), [(20, [10, 20]), (15, [10]), (-1, [])])
def test_rewind(tmp_path, restored, kept):
    with Logger(tmp_path, tensorboard=False) as logger:
        for step in (10, 20, 30):
            logger.write(step, "main", {"train/loss": step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "phase": "ma')  # killed while writing
    with Logger(tmp_path, tensorboard=False) as logger:
        logger.rewind(restored)
        logger.write(50, "main", {})
    assert [line["step"] for line in lines(tmp_path)] == [*kept, 50]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_tensorboard(tmp_path):
    image = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    with Logger(tmp_path) as logger:
        logger.write(10, "main", {"train/loss": 0.5, "val/miou": np.nan, "eval/mode": "slide"})
        logger.image(10, "panel", image)
    assert scalars(tmp_path) == [(10, "train/loss", 0.5)]
    (words,) = [
        value.tensor.string_val
        for event in events(tmp_path)
        for value in event.summary.value
        if value.tag.startswith("eval/mode")
    ]
    assert list(words) == [b"slide"]
    (picture,) = [
        value.image
        for event in events(tmp_path)
        for value in event.summary.value
        if value.HasField("image")
    ]
    from PIL import Image

    shown = np.asarray(Image.open(io.BytesIO(picture.encoded_image_string)))
    np.testing.assert_array_equal(shown, image)


def test_tensorboard_forgets_what_a_resumed_run_repeats(tmp_path):
    for restored, step in [(None, 10), (10, 20), (10, 20)]:
        with Logger(tmp_path) as logger:
            if restored is not None:
                logger.rewind(restored)
            logger.write(step, "main", {"train/loss": step})
    found = events(tmp_path)
    assert len({event.step for event in found if event.HasField("session_log")}) == 1
    assert [event.step for event in found if event.HasField("session_log")] == [11, 11]
    assert [step for step, _, _ in scalars(tmp_path)] == [10, 20, 20]
    assert [line["step"] for line in lines(tmp_path)] == [10, 20]


def test_other_processes_write_nothing(tmp_path, capsys):
    with Logger(tmp_path, main_process=False) as logger:
        logger.rewind(3)
        logger.write(1, "main", {"train/loss": 1.0})
        logger.image(1, "panel", np.zeros((2, 2, 3), np.uint8))
    with create_console(main_process=False) as console:
        console.message("hello")
        console.table("title", ["a"], [["b"]])
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


class Clock:
    """Seconds that pass only when told."""

    now = 0.0

    def __call__(self):
        return self.now


def test_stopwatch():
    clock = Clock()
    stopwatch = Stopwatch(clock=clock)

    def wait(seconds):
        clock.now += seconds

    wait(1)
    with contextlib.suppress(KeyError), stopwatch("evaluation"):
        wait(10)
        with stopwatch("training"):  # nested: not evaluation
            wait(100)
        wait(20)
        raise KeyError
    with stopwatch("data wait") as lap:
        wait(300)
        lap.name = "training"
    with stopwatch("checkpoint"):
        wait(2)
        expected = {"other": 1, "evaluation": 30, "training": 400, "checkpoint": 2}
        assert stopwatch.seconds() == expected  # what is still running counts
    assert stopwatch.seconds() == expected
    assert stopwatch.percent() == {"training": 92, "evaluation": 7, "other": 0, "checkpoint": 1}


def test_shares_sum_to_a_hundred():
    clock = Clock()
    stopwatch = Stopwatch(clock=clock)
    for name in "abc":
        with stopwatch(name):
            clock.now += 1
    assert sorted(stopwatch.percent().values()) == [0, 33, 33, 34]


def test_compilation_is_not_where_it_happens():
    begin, stopwatch = time.monotonic(), Stopwatch()
    with stopwatch.counting_compilation(), stopwatch("evaluation"):
        jax.jit(lambda x: jnp.sin(x) + 0.1234)(jnp.ones(7))
    seen = stopwatch.seconds()
    assert sum(seen.values()) <= time.monotonic() - begin  # no second counts twice
    jax.jit(lambda x: jnp.cos(x) + 0.1234)(jnp.ones(7))  # nobody listens any more
    assert seen["compilation"] > 0
    assert seen["evaluation"] >= 0
    assert stopwatch.seconds()["compilation"] == seen["compilation"]


@pytest.mark.parametrize(
    ("count", "text"),
    [(740, "0.7 kB"), (1_000_000, "1.0 MB"), (12_340_000, "12.3 MB"), (5 * 10**12, "5,000.0 GB")],
)
def test_memory(count, text):
    assert memory(count) == text


def test_plain_lines_with_rate_and_time_left():
    out, clock = io.StringIO(), Clock()
    with Console(out, clock=clock) as console:
        console.phase("warmup", 600)
        clock.now = 40.0  # compiling
        for step in range(1, 101):
            console.step(step)
            if step in (1, 100):
                console.report(step, {"loss": 2.3123, "lr": 0.01})
            clock.now += 0.08
    assert out.getvalue().splitlines() == [
        "[warmup 1/600] loss 2.31 lr 0.01",
        "[warmup 100/600] loss 2.31 lr 0.01 12.5 steps/s, 0:40 left",
    ]


@pytest.mark.parametrize(
    ("seconds", "left"), [(0.001, "0:01"), (1.0, "16:40"), (100.0, "27:46:40")]
)
def test_time_left(seconds, left):
    out, clock = io.StringIO(), Clock()
    console = Console(out, clock=clock)
    console.phase("main", 1002, start=0)
    for step in (1, 2):
        clock.now += seconds
        console.step(step)
    console.report(2, {})
    assert out.getvalue().endswith(f" steps/s, {left} left\n")


def test_rate_forgets_the_distant_past():
    out, clock = io.StringIO(), Clock()
    console = Console(out, clock=clock)
    console.phase("main", 1000, unit="images")
    for step in range(1, 201):
        clock.now += 10.0 if step <= 100 else 1.0
        console.step(step)
    console.report(200, {"loss": 1.0})
    assert "loss 1 1 images/s, 13:20 left" in out.getvalue()


def test_plain_table():
    out = io.StringIO()
    rows = [["a", 0.5, "1,200"], ["teacher_a", "absent", ""]]
    Console(out).table("Result", ["network", "mIoU", "size"], rows)
    assert out.getvalue() == (
        "Result\n  network      mIoU   size\n  a             0.5  1,200\n  teacher_a  absent\n"
    )


def test_class_table():
    out = io.StringIO()
    Console(out).class_table(
        ["road", "train", "sky"], [0.5, np.nan, 1.0], np.array([True, False, True]), title="main, a"
    )
    assert out.getvalue() == (
        "main, a: mean 75.0 % over 2 of 3 classes\n"
        "  class   IoU %\n"
        "  road     50.0\n"
        "  train  absent\n"
        "  sky     100.0\n"
    )


def test_class_table_of_many_classes_is_folded():
    out = io.StringIO()
    names = [f"class{i}" for i in range(19)]
    Console(out).class_table(names, np.arange(19) / 100, np.ones(19, bool))
    words = out.getvalue().split()
    assert [word for word in words if word in names] == [
        names[i + j] for i in range(7) for j in (0, 7, 14) if i + j < 19
    ]
    assert len(out.getvalue().splitlines()) == 9


def test_class_table_without_any_class_has_no_warning():
    out = io.StringIO()
    Console(out).class_table(["road"], [np.nan], [False])
    assert "mean undefined over 0 of 1 classes" in out.getvalue()


TERMINAL = """
from jaxssl.logs import create_console

with create_console() as console:
    console.phase("warmup", 60)
    for step in range(1, 61):
        console.step(step)
    console.report(60, {"loss": 2.3123})
    console.report(60, {"mIoU": 0.25})
    console.message("saved in " + "/path" * 40)
    console.class_table(["[road]"], [0.5], [True], title="[main]")
    console.table("a title that is wider than the table", ["a"], [["b"]])
    raise KeyError("training failed")
"""


def on_a_terminal(code):
    """All that a process writes on an 80-column terminal, and its exit code."""
    ours, theirs = pty.openpty()
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "TERM": "xterm",
        "COLUMNS": "80",
    }
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=theirs, stdout=theirs, stderr=theirs, env=environment
    )
    os.close(theirs)
    written = b""
    while True:
        try:
            chunk = os.read(ours, 4096)
        except OSError:  # the other end is closed
            break
        if not chunk:
            break
        written += chunk
    os.close(ours)
    return written.decode(), process.wait(timeout=60)


def test_terminal_is_given_back_after_an_exception():
    text, code = on_a_terminal(TERMINAL)
    assert code == 1
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # the cursor is shown again
    assert text.rindex("KeyError") > text.rindex("60/60")
    words = ("warmup", "loss 2.31", "mIoU 0.25", "[main]", "[road]", "50.0", "/path" * 40)
    for word in (*words, "a title that is wider than the table"):
        assert word in text


def test_environment_is_json():
    found = json.loads(json.dumps(environment()))
    assert found["python"] == sys.version.split()[0]
    assert found["versions"]["numpy"] == np.__version__
    assert sum(found["devices"].values()) == jax.device_count()
    assert found["command"]


def test_import_is_light():
    """Neither jax nor rich nor TensorBoard comes with the import, and no warning."""
    code = (
        "import sys, jaxssl.logs, jaxssl.signals;"
        "print(sorted({'jax', 'rich', 'tensorboardX'} & sys.modules.keys()))"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    said = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    assert said.stdout == "[]\n"
