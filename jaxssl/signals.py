"""Stopping a run on request, between two steps.

One process: SIGTERM and SIGINT raise a flag that the training loop reads after every step; a second
signal ends the process at once. While a step compiles, the flag may rise only afterwards.

Several processes: jax's preemption service, which `jax.distributed.initialize` starts, listens to
SIGTERM and makes all processes stop at the same step. A Python handler would silence it, so none is
installed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignal:
    """Tells the training loop when it is asked to stop; a context manager.

    Attributes:
      received: the signal that asked for the stop, or None; the exit code is then `128 + received`.
    """

    def __init__(self, process_count: int = 1):
        self.received: int | None = None
        self._process_count = process_count
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        # Python allows handlers in the main thread only; in another one, signals are not ours.
        if self._process_count == 1 and threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                # nohup and background jobs ignore signals on purpose.
                if signal.getsignal(number) != signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            # None stands for a handler that was not installed from Python and cannot be given back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous = {}

    def should_stop(self, step: int) -> bool:
        """Whether to save and leave after `step`; every process must ask at every step."""
        if self._process_count > 1 and self.received is None:
            from jax.experimental import multihost_utils

            if multihost_utils.reached_preemption_sync_point(step):
                self.received = signal.SIGTERM
        return self.received is not None

    def _receive(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.received = number
        for each in self._previous:
            signal.signal(each, signal.SIG_DFL)
        name = signal.Signals(number).name
        line = f"{name}: saving after this step, then leaving. A second signal quits at once.\n"
        # print is not reentrant: a handler that runs inside another print would raise.
        with contextlib.suppress(OSError):
            os.write(2, line.encode())
