"""Saving and restoring the training state; everything that concerns orbax stands here.

A checkpoint is a directory `<step>/` with two items: `meta`, JSON that is read first and says what
the state is, and `state`, the arrays. An atomic rename of the directory completes it, so that an
interrupted save leaves the earlier checkpoints as they were.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from jaxssl.contracts import UserError

FORMAT = 2
"""Version of what `meta` and `state` hold; another one is not read."""


class CheckpointError(UserError):
    """A checkpoint could not be written; earlier ones are untouched, so training may go on."""


class Checkpoints:
    """The checkpoints of one run, in one directory; a context manager.

    Every process of a run opens the same directory and makes the same calls. Steps rise over the
    whole run. Directories that do not read (empty, half copied, of another format) are left alone;
    opening names those that are newer than the newest checkpoint in a warning.

    Args:
      directory: is made where it is missing.
      async_save: whether `save` returns before the disk has everything.
      read_only: leaves the directory, which must exist, as it is: a run may be saving to it.

    Attributes:
      keep: steps to keep beside the newest, such as the best of each phase; a save deletes the
        checkpoints that are neither. It is stored with each checkpoint, and opening the directory
        brings back the newest one's.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        async_save: bool = True,
        read_only: bool = False,
    ):
        self._directory = Path(directory).absolute()
        if not read_only:
            _create(self._directory)
        logging.getLogger("absl").addFilter(_without_traceback)
        self._manager = ocp.CheckpointManager(
            self._directory,
            handler_registry=_handlers(),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=_Preserve(self._wanted),
                create=not read_only,
                cleanup_tmp_directories=not read_only,  # one may be a save that another is writing
                enable_async_checkpointing=async_save,
            ),
        )
        self.keep: set[int] = set()
        self._latest: tuple[int, dict[str, Any]] | None = None
        self._unreadable: set[int] = set()
        for step in sorted(self._manager.all_steps(), reverse=True):
            self._examine(step)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        try:
            self.close()
        except CheckpointError as error:
            if kind is None:
                raise
            logging.getLogger(__name__).warning("%s", error)  # what is under way matters more

    def save(self, step: int, state: Any, meta: Mapping[str, Any]) -> None:
        """Saves in the background; the arrays may be donated as soon as this returns.

        Args:
          step: larger than that of every earlier save.
          state: a tree of arrays.
          meta: JSON values; tuples come back as lists. `format` and `keep` are added.

        Raises:
          CheckpointError: this save, or the one before, could not be written (disk full, say).
          ValueError: `step` does not rise; orbax would drop it silently.
        """
        if self._latest is not None and step <= self._latest[0]:
            raise ValueError(f"Step {step} is saved after step {self._latest[0]}; steps must rise.")
        stored = json.loads(json.dumps({**meta, "format": FORMAT, "keep": sorted(self.keep)}))
        self.wait()
        if step in self._unreadable:
            self._set_aside(step)
        self._latest = step, stored
        items = ocp.args.Composite(meta=ocp.args.JsonSave(stored), state=ocp.args.PyTreeSave(state))
        with self._write_errors():
            # Without force, orbax drops a step below that of an unreadable directory.
            self._manager.save(step, args=items, force=True)

    def latest(self) -> tuple[int, dict[str, Any]] | None:
        """Newest step and its metadata, be it still on its way to disk; None for a new run."""
        return self._latest

    def steps(self) -> tuple[int, ...]:
        """Steps of the checkpoints on disk, rising."""
        return tuple(sorted(set(self._manager.all_steps()) - self._unreadable))

    def meta(self, step: int) -> dict[str, Any]:
        """What was saved with a step that is on disk; UserError where it does not read."""
        where = self._directory / str(step)
        if not where.is_dir():
            raise UserError(f"There is no checkpoint {where}.")
        try:
            items = ocp.args.Composite(meta=ocp.args.JsonRestore())
            meta = self._manager.restore(step, args=items)["meta"]
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{where} is not a readable checkpoint ({_reason(error)}).") from error
        found = meta.get("format") if isinstance(meta, dict) else None
        if found != FORMAT:
            raise UserError(f"{where} has checkpoint format {found}; this version reads {FORMAT}.")
        return meta

    def restore(self, step: int, abstract_state: Any) -> Any:
        """Reads the whole state.

        Args:
          step: of a checkpoint in this directory.
          abstract_state: the state as a tree of `jax.ShapeDtypeStruct` with this run's shardings,
            which may be of other devices than it was saved from.

        Raises:
          UserError: the saved tree has other leaves, shapes or dtypes, or its files are damaged.
        """
        self._check(step, (), abstract_state)
        return self._read(step, abstract_state, partial=False)

    def restore_part(self, step: int, path: Sequence[str], abstract_subtree: Any) -> Any:
        """Reads the subtree at `path`, such as ("params", "a"), alone; otherwise as `restore`."""
        self._check(step, path, abstract_subtree)
        tree = abstract_subtree
        for key in reversed(path):
            tree = {key: tree}
        tree = self._read(step, tree, partial=True)
        for key in path:
            tree = tree[key]
        return tree

    def wait(self) -> None:
        """Blocks until a running save is on disk; CheckpointError if it could not be written."""
        with self._write_errors():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then ends orbax's threads."""
        try:
            self.wait()
        finally:
            self._manager.close()
            logging.getLogger("absl").removeFilter(_without_traceback)

    @contextlib.contextmanager
    def _write_errors(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:
            # orbax has forgotten the steps that this save was to replace, without deleting them.
            self._manager.reload()
            if jax.process_index() == 0:  # half a checkpoint would keep a full disk full
                for half in self._directory.glob("*.orbax-checkpoint-tmp"):
                    shutil.rmtree(half, ignore_errors=True)
            steps = set(self._manager.all_steps()) - self._unreadable
            self._latest = (max(steps), self.meta(max(steps))) if steps else None
            raise CheckpointError(
                f"Could not write a checkpoint to {self._directory}: {_reason(error)}. "
                "Free space there or choose another --workdir; earlier checkpoints are intact."
            ) from error

    def _set_aside(self, step: int) -> None:
        """Renames an unreadable directory whose name is needed; nothing of it is lost."""
        if jax.process_index() == 0:
            where = self._directory / str(step)
            where.rename(where.with_name(f"{step}.unreadable-{time.time_ns()}"))
        multihost_utils.sync_global_devices(f"checkpoint {step} set aside")
        self._manager.reload()
        self._unreadable.remove(step)

    def _examine(self, step: int) -> None:
        """Notes what a directory found at opening is: newest first."""
        try:
            meta = self.meta(step)
        except UserError as error:
            self._unreadable.add(step)
            if self._latest is None:
                logging.getLogger(__name__).warning("%s It is skipped.", error)
            return
        if self._latest is None:
            self._latest, self.keep = (step, meta), set(meta.get("keep", ()))

    def _wanted(self) -> set[int]:
        newest = {self._latest[0]} if self._latest is not None else set()
        return newest | self.keep | self._unreadable

    def _check(self, step: int, path: Sequence[str], abstract: Any) -> None:
        self.meta(step)
        with self._read_errors(step):
            stored = _leaves(self._manager.item_metadata(step)["state"].tree)
        prefix = "".join(f"{key}/" for key in path)
        found = {name: kind for name, kind in stored.items() if name.startswith(prefix)}
        expected = {prefix + name: kind for name, kind in _leaves(abstract).items()}
        if found != expected:
            raise UserError(
                f"The checkpoint {self._directory / str(step)} does not fit this run: "
                f"{_difference(found, expected)}. "
                "Use the config that it was trained with, or another --workdir."
            )

    def _read(self, step: int, abstract: Any, *, partial: bool) -> Any:
        arguments = ocp.args.PyTreeRestore(
            abstract,
            restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
            partial_restore=partial,
        )
        with self._read_errors(step):
            return self._manager.restore(step, args=ocp.args.Composite(state=arguments))["state"]

    @contextlib.contextmanager
    def _read_errors(self, step: int) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # TensorStore's errors have no type of their own
            raise UserError(
                f"The checkpoint {self._directory / str(step)} is damaged ({_reason(error)}). "
                "Delete that directory to go on from the one before."
            ) from error


class _Preserve:
    """orbax's preservation policy, asked at each save."""

    def __init__(self, wanted: Callable[[], set[int]]):
        self._wanted = wanted

    def should_preserve(self, checkpoints: Sequence[Any], *, context: object) -> list[bool]:
        del context
        wanted = self._wanted()
        return [checkpoint.step in wanted for checkpoint in checkpoints]


def _handlers() -> ocp.handlers.CheckpointHandlerRegistry:
    # Random floats hardly compress: 0.5 GB is written four times faster without, and is 8 % larger.
    state = ocp.PyTreeCheckpointHandler(use_compression=False)
    meta = ocp.JsonCheckpointHandler()
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    registry.add("state", ocp.args.PyTreeSave, state)
    registry.add("state", ocp.args.PyTreeRestore, state)
    registry.add("meta", ocp.args.JsonSave, meta)
    registry.add("meta", ocp.args.JsonRestore, meta)
    return registry


def _create(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"Cannot create {directory}: {_reason(error)}. Choose another --workdir."
        ) from error


def _leaves(tree: Any) -> dict[str, str]:
    """Name -> "float32[3,4]" of every leaf."""
    paths, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): (
            f"{np.dtype(leaf.dtype).name}[{','.join(map(str, leaf.shape))}]"
        )
        for path, leaf in paths
    }


def _difference(found: Mapping[str, str], expected: Mapping[str, str]) -> str:
    missing = sorted(expected.keys() - found.keys())
    extra = sorted(found.keys() - expected.keys())
    other = [
        f"{name} ({found[name]} saved, {expected[name]} expected)"
        for name in sorted(expected.keys() & found.keys())
        if found[name] != expected[name]
    ]
    parts = {"missing from it": missing, "only in it": extra, "different": other}
    return "; ".join(
        f"{len(names)} {what}: {_some(names)}" for what, names in parts.items() if names
    )


def _some(names: Sequence[str], limit: int = 5) -> str:
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")


def _reason(error: BaseException) -> str:
    """The end of TensorStore's long messages, which says what happened."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error.args[0]) if len(error.args) == 1 else str(error)
    if code := re.search(r"os_error_code='(\d+)'", text):
        return os.strerror(int(code[1]))
    text = text.split(" [tensorstore_spec=")[0].rsplit('": ', 1)[-1].strip()
    return text.splitlines()[0][:200] if text else type(error).__name__


def _without_traceback(record: logging.LogRecord) -> bool:
    # orbax logs a failed write as four tracebacks, 300 lines beside the message that `wait` raises.
    if "orbax" in record.pathname:
        record.exc_info = None
    return True
