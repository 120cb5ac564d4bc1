"""Images that cannot be read while training: noted once each, up to a limit."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from jaxssl.contracts import UserError
from jaxssl.data import files


class Damage(NamedTuple):
    """An image that could not be read.

    Attributes:
      stream: that it was to be part of.
      id: of the image.
      message: names the file, which may be the label's, and says what is wrong.
    """

    stream: str
    id: str
    message: str


def allowed(max_damaged: int | None, count: int) -> int:
    """How many of `count` images may be damaged.

    None allows one percent but ten at least, as real data sets have some, and never more than half:
    beyond that, something else is wrong.
    """
    return min(max(10, count // 100), count // 2) if max_damaged is None else max_damaged


def too_many(stream: str, limit: int, messages: Sequence[str]) -> UserError:
    """The error for more damaged images in a stream than its limit allows."""
    return UserError(
        f"{len(messages)} image(s) of {stream!r} cannot be read, data.max_damaged allows {limit}. "
        "Mend them and start the same command again, or allow more with "
        f"--config.data.max_damaged=N, and others stand in for them:{files.listed(messages, 20)}"
    )


class Quarantine:
    """Writes the damaged images that a phase meets into `quarantine.jsonl` of the workdir.

    A line is `{"stream": ..., "id": ..., "message": ..., "phase": ..., "step": ...}`, one per image
    and stream, however often its turn comes and the run is resumed; the image was to be part of
    the update that makes it `step`. Of several processes each writes what it reads, those after
    the first into `quarantine.<process>.jsonl`.
    """

    def __init__(
        self,
        workdir: Path,
        phase: str,
        begin: int,
        limits: Mapping[str, int],
        say: Callable[[str], None],
        process_index: int = 0,
    ):
        """Prepares; nothing is written before an image is damaged.

        Args:
          workdir: of the run.
          phase: name.
          begin: step at which the phase begins.
          limits: by stream, the damaged images to put up with; counted anew in each phase and at
            each start, as files may have been mended.
          say: is told of each image that is not in the files yet.
          process_index: of this process.
        """
        self._workdir, self._phase, self._begin = workdir, phase, begin
        self._limits, self._say = limits, say
        name = f"quarantine.{process_index}.jsonl" if process_index else "quarantine.jsonl"
        self._path = workdir / name
        self._met: dict[str, dict[str, str]] = {stream: {} for stream in limits}

    def add(self, batch: int, damage: Damage) -> None:
        """Notes an image that was to be part of the phase's batch number `batch`.

        Raises:
          UserError: more images of its stream are damaged than its limit allows.
        """
        met, limit = self._met[damage.stream], self._limits[damage.stream]
        if damage.id in met:
            return
        met[damage.id] = damage.message
        if (damage.stream, damage.id) not in set(self._noted()):
            where = {"phase": self._phase, "step": self._begin + batch + 1}
            with self._path.open("a") as file:
                file.write(json.dumps({**damage._asdict(), **where}) + "\n")
            self._say(f"Damaged, another image stands in for it: {damage.message}")
        if len(met) > limit:
            raise too_many(damage.stream, limit, [*met.values()])

    def _noted(self) -> Iterator[tuple[str, str]]:
        for path in self._workdir.glob("quarantine*.jsonl"):
            for line in path.read_text().splitlines():
                try:
                    record = json.loads(line)
                except ValueError:
                    continue  # torn by the end of a process
                yield record["stream"], record["id"]
