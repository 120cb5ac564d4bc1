"""What a run says while it trains: metrics.jsonl, TensorBoard, and the console."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TextIO

import numpy as np

from jaxssl import __version__
from jaxssl.contracts import Metrics

if TYPE_CHECKING:
    import rich.progress
    import tensorboardX


_COMPILING = (
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "/jax/core/compile/backend_compile_duration",
)


class MetricSums:
    """Sums metrics over steps without waiting for the device."""

    def __init__(self):
        self._steps: list[Metrics] = []

    def add(self, metrics: Metrics) -> None:
        """Takes one step's metrics, still on the device."""
        self._steps.append(metrics)

    def reduce(self) -> dict[str, float]:
        """Name -> sum of sums / sum of counts since the last call; waits for the device.

        Names that counted nothing are left out.
        """
        import jax

        steps, self._steps = jax.device_get(self._steps), []
        sums, counts = collections.defaultdict(float), collections.defaultdict(float)
        for step in steps:
            for name, (total, count) in step.items():
                if count:  # 0/0 of one step would spoil the mean of all
                    sums[name] += float(total)
                    counts[name] += float(count)
        return {name: sums[name] / counts[name] for name in sums}


@dataclasses.dataclass
class Lap:
    """A stretch of time and what it counts as; may be renamed while it lasts."""

    name: str
    seconds: float = 0.0


class Stopwatch:
    """Wall time by what the host did or waited for: `with stopwatch("evaluation"): ...`.

    Stretches may be nested; time counts for the innermost, and time in none as "other". Devices
    work while the host goes on, so what is measured is what the host waited for: steps count as
    the wait for their results.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic):
        self._clock, self._mark = clock, clock()
        self._laps = [Lap("other")]
        self._seconds: collections.defaultdict[str, float] = collections.defaultdict(float)

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[Lap]:
        """Times a block."""
        lap = Lap(name)
        self._split()
        self._laps.append(lap)
        try:
            yield lap
        finally:
            self._split()
            self._laps.pop()
            self._seconds[lap.name] += lap.seconds

    @contextlib.contextmanager
    def counting_compilation(self) -> Iterator[None]:
        """In the block, what jax compiles counts as "compilation", wherever it happens."""
        from jax import monitoring

        def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
            del kwargs
            if event in _COMPILING:
                self._laps[-1].seconds -= duration_secs
                self._seconds["compilation"] += duration_secs

        monitoring.register_event_duration_secs_listener(listen)
        try:
            yield
        finally:
            monitoring.unregister_event_duration_listener(listen)

    def seconds(self) -> dict[str, float]:
        """Seconds since this stopwatch was made, by name."""
        self._split()
        found = collections.defaultdict(float, self._seconds)
        for lap in self._laps:
            found[lap.name] += lap.seconds
        return dict(found)

    def percent(self) -> dict[str, int]:
        """Shares of the time since this stopwatch was made, the largest first; they sum to 100."""
        seconds = self.seconds()
        exact = {name: 100 * value / sum(seconds.values()) for name, value in seconds.items()}
        found = {name: math.floor(value) for name, value in exact.items()}
        largest_rest = sorted(exact, key=lambda name: found[name] - exact[name])
        for name in largest_rest[: 100 - sum(found.values())]:
            found[name] += 1
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    def _split(self) -> None:
        now = self._clock()
        self._laps[-1].seconds += now - self._mark
        self._mark = now


class Logger:
    """Writes `metrics.jsonl` and `tensorboard/` in the workdir; a context manager.

    A line of metrics.jsonl is `{"step": 100, "phase": "main", "train/loss": 2.31, ...}`. Processes
    other than the main one write nothing.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        *,
        main_process: bool = True,
        tensorboard: bool = True,
    ):
        self._workdir = Path(workdir)
        self._main_process = main_process
        self._tensorboard = tensorboard
        self._purge_step: int | None = None
        self._lines: IO[str] | None = None
        self._events: tensorboardX.SummaryWriter | None = None

    def __enter__(self) -> Logger:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def rewind(self, step: int) -> None:
        """Forgets what was written after `step`, so that a resumed run has no line twice.

        Call it before the first `write`, with the restored step, or -1 to start from nothing.
        """
        if not self._main_process:
            return
        self.close()
        self._purge_step = step + 1
        path = self._workdir / "metrics.jsonl"
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if _step_of(line) <= step]
            part = path.with_name("metrics.jsonl.part")
            part.write_text("".join(f"{line}\n" for line in kept))
            part.replace(path)

    def write(self, step: int, phase: str, values: Mapping[str, float | str]) -> None:
        """Appends one line; JSON has no NaN and no infinity, they become null. TensorBoard gets the
        numbers as curves and words as text.
        """
        if not self._main_process:
            return
        if self._lines is None:
            self._workdir.mkdir(parents=True, exist_ok=True)
            self._lines = (self._workdir / "metrics.jsonl").open("a")
        finite = {name: _json_value(value) for name, value in values.items()}
        self._lines.write(json.dumps({"step": step, "phase": phase, **finite}) + "\n")
        self._lines.flush()
        if not self._tensorboard:
            return
        for name, value in finite.items():
            if isinstance(value, str):
                self._writer().add_text(name, value, step)
            elif value is not None:
                self._writer().add_scalar(name, value, step)

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """Shows a uint8 `[H,W,3]` image in TensorBoard."""
        if self._main_process and self._tensorboard:
            self._writer().add_image(name, image, step, dataformats="HWC")

    def close(self) -> None:
        """Flushes and closes the files."""
        if self._lines is not None:
            self._lines.close()
        if self._events is not None:
            self._events.close()
        self._lines = self._events = None

    def _writer(self) -> tensorboardX.SummaryWriter:
        if self._events is None:
            import tensorboardX

            # Files are named by the second they were opened in; a second one would overwrite it.
            self._events = tensorboardX.SummaryWriter(
                str(self._workdir / "tensorboard"),
                purge_step=self._purge_step,
                flush_secs=30,
                filename_suffix=f".{time.time_ns()}",
            )
        return self._events


class Console:
    """Progress as plain lines, for log files and notebooks; a context manager.

    Without a stream it says nothing.
    """

    def __init__(
        self, stream: TextIO | None = None, *, clock: Callable[[], float] = time.monotonic
    ):
        self._stream = stream
        self._clock = clock
        self._name, self._steps = "", 0
        self._speed = _Speed("steps")

    def __enter__(self) -> Console:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def phase(self, name: str, steps: int, start: int = 0, *, unit: str = "steps") -> None:
        """Begins a phase of `steps` steps, of which `start` are done; `unit` is their name."""
        del start
        self._name, self._steps = name, steps
        self._speed = _Speed(unit)

    def step(self, step: int) -> None:
        """Notes that `step` steps of the phase are done; cheap, to be called after each."""
        self._speed.mark(step, self._clock())

    def report(self, step: int, values: Mapping[str, float]) -> None:
        """Shows values such as {"loss": 2.31, "mIoU": 0.4}, with rate and time left."""
        speed = self._speed.words(self._steps - step)
        words = [f"[{self._name} {step}/{self._steps}]", _values(values), speed]
        self.message(" ".join(word for word in words if word))

    def message(self, text: str) -> None:
        """Prints a line."""
        if self._stream is not None:
            print(text, file=self._stream, flush=True)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Prints a table: columns of text to the left, columns with numbers to the right."""
        cells = [[*columns], *([str(cell) for cell in row] for row in rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        right = _numeric(rows, len(columns))
        lines = [
            "  ".join(
                cell.rjust(width) if to_right else cell.ljust(width)
                for cell, width, to_right in zip(row, widths, right, strict=True)
            )
            for row in cells
        ]
        self.message("\n".join([title, *(f"  {line.rstrip()}" for line in lines)]))

    def class_table(
        self,
        classes: Sequence[str],
        scores: Sequence[float] | np.ndarray,
        present: Sequence[bool] | np.ndarray,
        *,
        title: str = "IoU",
        column: str = "IoU",
    ) -> None:
        """Prints the score of each class in percent, "absent" for a class that does not occur.

        Args:
          classes: C names.
          scores: `[C]`, 0 to 1; any value where absent.
          present: bool `[C]`.
          title: what was evaluated; the mean over the classes present is put beside it.
          column: what the scores are.
        """
        values = [100 * float(v) for v, there in zip(scores, present, strict=True) if there]
        mean = f"{np.mean(values):.1f} %" if values else "undefined"
        words = [
            f"{100 * float(v):.1f}" if p else "absent" for v, p in zip(scores, present, strict=True)
        ]
        blocks = 3 if len(classes) > 8 else 1
        height = -(-len(classes) // blocks)
        pairs = [*zip(classes, words, strict=True)]
        pairs += [("", "")] * (blocks * height - len(pairs))
        rows = [[cell for pair in pairs[i::height] for cell in pair] for i in range(height)]
        self.table(
            f"{title}: mean {mean} over {len(values)} of {len(classes)} classes",
            ["class", f"{column} %"] * blocks,
            rows,
        )

    def close(self) -> None:
        """Gives the terminal back as it was."""


class TerminalConsole(Console):
    """Progress as one bar per phase, drawn by rich."""

    def __init__(self, stream: TextIO, *, clock: Callable[[], float] = time.monotonic):
        import rich.console

        super().__init__(stream, clock=clock)
        self._rich = rich.console.Console(file=stream, markup=False, highlight=False)
        self._bar: rich.progress.Progress | None = None
        self._shown: dict[str, float] = {}

    def phase(self, name: str, steps: int, start: int = 0, *, unit: str = "steps") -> None:
        """Begins a phase and its bar; that of the phase before stays on the screen."""
        from rich import progress

        self.close()
        super().phase(name, steps, start, unit=unit)
        self._shown = {}
        self._bar = progress.Progress(
            progress.TextColumn("{task.description}", style="bold", markup=False),
            progress.BarColumn(bar_width=24),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[speed]}", style="cyan", markup=False),
            progress.TextColumn("{task.fields[values]}", markup=False),
            console=self._rich,
            refresh_per_second=4,
        )
        self._bar.add_task(name, total=steps, completed=start, speed="", values="")
        self._bar.start()

    def step(self, step: int) -> None:
        """Moves the bar."""
        super().step(step)
        if self._bar is not None:
            speed = self._speed.words(self._steps - step)
            self._bar.update(self._bar.task_ids[0], completed=step, speed=speed)

    def report(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the values beside the bar; those of earlier reports stay."""
        self._shown |= values
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step, values=_values(self._shown))

    def message(self, text: str) -> None:
        """Prints a line above the bar; a long path stays in one piece."""
        self._rich.print(text, soft_wrap=True)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Prints a table above the bar."""
        import rich.box
        import rich.table

        table = rich.table.Table(box=rich.box.SIMPLE_HEAD)
        for name, right in zip(columns, _numeric(rows, len(columns)), strict=True):
            table.add_column(name, justify="right" if right else "left")
        for row in rows:
            table.add_row(*map(str, row))
        self.message(title)  # rich would break that of a narrow table
        self._rich.print(table)

    def close(self) -> None:
        """Stops the bar and shows the cursor again."""
        if self._bar is not None:
            self._bar.stop()
        self._bar = None


def create_console(*, main_process: bool = True) -> Console:
    """A progress bar on a terminal, plain lines elsewhere, nothing in other processes."""
    if not main_process:
        return Console()
    terminal = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
    return TerminalConsole(sys.stdout) if terminal else Console(sys.stdout)


def memory(count: int) -> str:
    """Bytes as text, such as "12.3 MB"."""
    for unit, size in (("GB", 10**9), ("MB", 10**6)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count / 1000:.1f} kB"


def environment() -> dict[str, Any]:
    """Versions, devices, command line and git commit of this process, as JSON values."""
    import jax

    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    devices = collections.Counter(device.device_kind for device in jax.devices())
    return {
        "command": shlex.join(sys.orig_argv),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {"jaxssl": __version__} | {n: importlib.metadata.version(n) for n in names},
        "backend": jax.default_backend(),
        "devices": dict(devices),
        "processes": jax.process_count(),
        "git_commit": _git_commit(Path(__file__).parent),
    }


class _Speed:
    """Steps per second over about the last half minute.

    The clock starts when the first step is done, so that its compilation does not count.
    """

    def __init__(self, unit: str, seconds: float = 30.0):
        self._unit, self._seconds = unit, seconds
        self._marks: collections.deque[tuple[int, float]] = collections.deque()

    def mark(self, step: int, now: float) -> None:
        self._marks.append((step, now))
        while len(self._marks) > 2 and self._marks[1][1] < now - self._seconds:
            self._marks.popleft()

    def words(self, steps_left: int) -> str:
        """Such as "12.3 steps/s, 0:41 left"; empty while nothing is known."""
        if len(self._marks) < 2:
            return ""
        (first, begin), (last, end) = self._marks[0], self._marks[-1]
        if last <= first or end <= begin:
            return ""
        rate = (last - first) / (end - begin)
        left = f", {_duration(steps_left / rate)} left" if steps_left > 0 else ""
        return f"{_number(rate)} {self._unit}/s{left}"


def _duration(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{s:02}" if hours else f"{minutes}:{s:02}"


def _number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _values(values: Mapping[str, float]) -> str:
    return " ".join(f"{name} {_number(value)}" for name, value in values.items())


def _numeric(rows: Sequence[Sequence[object]], columns: int) -> list[bool]:
    """Which columns hold a number."""
    texts = [[str(row[i]) for row in rows] for i in range(columns)]

    def is_number(text: str) -> bool:
        return text.lstrip("-").replace(",", "").replace(".", "", 1).isdigit()

    return [any(map(is_number, column)) for column in texts]


def _json_value(value: float | str) -> float | str | None:
    if isinstance(value, str):
        return value
    return float(value) if math.isfinite(value) else None


def _step_of(line: str) -> float:
    """The step of a line of metrics.jsonl; infinite for the torn line that a killed run leaves."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


def _git_commit(folder: Path) -> str | None:
    """Commit of a checkout, "-dirty" if changed; None for an installed package."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(folder), *words],
            capture_output=True,
            check=True,
            text=True,
            timeout=10,
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # not some other repository around it
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return None
