"""What a run watches in itself: its pseudo-labels, the distance of its networks, dead losses, and
updates that came to nothing.

Pseudo-labels and distances are measured on labeled validation images, shown as they are and with
running statistics. Training sees crops, and students strong views of them.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxssl import metrics, sharding, sweep
from jaxssl.config import Config
from jaxssl.contracts import (
    IGNORE_LABEL,
    Method,
    Metrics,
    Source,
    UnreadableError,
    UserError,
)
from jaxssl.data import loading
from jaxssl.evaluate import Evaluator
from jaxssl.inference import Presentation
from jaxssl.state import TEACHER, TrainState

PRIOR_IMAGES = 500
"""Labeled training images, evenly spaced, whose labels the prior is counted from at most."""


def pseudo_label_counts(
    truth: jax.Array, taught: jax.Array, valid: jax.Array, num_classes: int
) -> jax.Array:
    """Counts pairs of true class and pseudo-label.

    Args:
      truth: uint8 `[...]`, below C or 255.
      taught: uint8 `[...]`, below C, or 255 where nothing is taught.
      valid: bool `[...]`, False for padding, which is not counted.
      num_classes: C.

    Returns:
      int32 `[C+1,C+1]`: rows truth, the last one for pixels without; columns pseudo-labels, the
      last one for pixels without.
    """

    def with_none(labels: jax.Array) -> jax.Array:
        return jnp.where(labels == IGNORE_LABEL, num_classes, labels.astype(jnp.int32))

    rows = jnp.where(valid, with_none(truth), IGNORE_LABEL)
    return metrics.confusion_matrix(rows, with_none(taught), num_classes + 1)


@dataclasses.dataclass(frozen=True)
class PseudoLabels:
    """Pseudo-labels beside the truth. Shares are in [0,1], nan where there is nothing to divide by.

    Attributes:
      counts: int64 `[C+1,C+1]` of `pseudo_label_counts`.
    """

    counts: np.ndarray

    @property
    def per_class(self) -> np.ndarray:
        """Pixels with a truth that each class is taught to, int64 `[C]`."""
        return self.counts[:-1, :-1].sum(0)

    @property
    def accuracy(self) -> float:
        """Share of the kept pixels that are right."""
        return metrics.accuracy(self.counts[:-1, :-1])

    @property
    def coverage(self) -> float:
        """Share of the pixels with a truth that are kept."""
        return _share(self.counts[:-1, :-1].sum(), self.counts[:-1].sum())

    @property
    def kept(self) -> float:
        """Share of all pixels that are kept, those without a truth included."""
        return _share(self.counts[:, :-1].sum(), self.counts.sum())

    @property
    def precision(self) -> np.ndarray:
        """By pseudo-label: share that is right, `[C]`."""
        return metrics.class_accuracy(self.counts[:-1, :-1].T)

    @property
    def class_coverage(self) -> np.ndarray:
        """By true class: share that is kept, right or wrong, `[C]`."""
        rows = self.counts[:-1]
        return np.array([_share(row[:-1].sum(), row.sum()) for row in rows])


@dataclasses.dataclass(frozen=True)
class Watched:
    """What one look at the networks found.

    Attributes:
      labeler: the network whose pseudo-labels these are.
      pseudo: pseudo-labels.
      prior: int64 `[C]`, pixels per class in the labels that training has.
      distances: "coupling", and "gap/a" for each teacher and its student: their mean total
        variation distance.
      images: how many were looked at.
      mode: how they were shown to the networks, in words; scores may have another one.
    """

    labeler: str
    pseudo: PseudoLabels
    prior: np.ndarray
    distances: Mapping[str, float]
    images: int
    mode: str

    @property
    def kl(self) -> float:
        """KL(prior || pseudo-labels), see `metrics.kl_divergence`."""
        return metrics.kl_divergence(self.prior, self.pseudo.per_class)

    @property
    def title(self) -> str:
        """What was looked at, and how."""
        return f"pseudo-labels of {self.labeler} on {self.images} images, {self.mode}"

    def values(self, classes: Sequence[str]) -> dict[str, float]:
        """Numbers for metrics.jsonl; what is undefined, such as the precision of a class that is
        not taught, is left out.
        """
        found = {
            "watch/pseudo/accuracy": self.pseudo.accuracy,
            "watch/pseudo/coverage": self.pseudo.coverage,
            "watch/pseudo/kept": self.pseudo.kept,
            "watch/pseudo/kl": self.kl,
        }
        for name, values in self._per_class().items():
            for label, value in zip(classes, values, strict=True):
                found[f"watch/pseudo/{name}/{label}"] = float(value)
        found |= {f"watch/{name}": value for name, value in self.distances.items()}
        return {name: value for name, value in found.items() if np.isfinite(value)}

    def line(self) -> str:
        """The overall values, in one line."""
        shares = {"accuracy": self.pseudo.accuracy, "coverage": self.pseudo.coverage}
        words = [f"{name} {_percent(value)}" for name, value in shares.items()]
        words.append(f"KL(labels || pseudo) {self.kl:.2f}" if np.isfinite(self.kl) else "")
        words += [f"{name.replace('/', ' ')} {v:.3f}" for name, v in self.distances.items()]
        found = ", ".join(word for word in words if word)
        return f"{self.title}: {found}"

    def rows(self, classes: Sequence[str]) -> list[tuple[str, ...]]:
        """A table of percentages by class under the names in `COLUMNS`; classes that neither the
        labels nor the pseudo-labels have are left out.
        """
        prior = self.prior / max(self.prior.sum(), 1)
        columns = [*self._per_class().values(), prior]
        occurs = (self.pseudo.counts[:-1].sum(1) + self.pseudo.per_class + self.prior) > 0
        return [
            (label, *(_percent(column[i], "") for column in columns))
            for i, label in enumerate(classes)
            if occurs[i]
        ]

    def _per_class(self) -> dict[str, np.ndarray]:
        taught = self.pseudo.per_class
        return {
            "precision": self.pseudo.precision,
            "coverage": self.pseudo.class_coverage,
            "share": np.array([_share(count, taught.sum()) for count in taught]),
        }


COLUMNS = ("class", "precision %", "coverage %", "of pseudo-labels %", "of labels %")
"""Of `Watched.rows`."""


class Watcher:
    """Looks at the networks of a method that has a labeler; compiles once per architecture and
    image size.
    """

    def __init__(
        self,
        method: Method,
        evaluator: Evaluator,
        sources: Mapping[str, Source],
        config: Config,
    ):
        """Prepares; nothing is read or compiled yet.

        Args:
          method: says which networks to look at.
          evaluator: runs them, on the devices of its process.
          sources: "val", with labels, is looked at; the prior comes from "labeled".
          config: of the run. `eval.watch` is the number of images, evenly spaced, 0 for none. They
            are shown whole, or by windows or at half the size where evaluation does so.
        """
        self._method, self._evaluator = method, evaluator
        self._labeled = loading.evenly_spaced(sources["labeled"], PRIOR_IMAGES)
        self._source = loading.evenly_spaced(sources["val"], config.eval.watch)
        self._pairs = _pairs(method)
        how = evaluator.how.uncropped
        # Mirror images and scales would show the average.
        self._how = Presentation(how.mode, how.window, how.stride)
        rows, everywhere = sharding.batched(evaluator.mesh), sharding.replicated(evaluator.mesh)
        self._compare = jax.jit(
            self._measure,
            in_shardings=(rows, rows, rows, everywhere),
            out_shardings=everywhere,
        )

    def __call__(self, state: TrainState, progress: float) -> Watched | None:
        """Looks; None where there is nothing to look at, and in all processes but the main one.

        Args:
          state: with the networks.
          progress: of the phase, in [0,1]; a method's threshold may depend on it.
        """
        labeler = self._method.labeler
        if labeler is None or not len(self._source) or jax.process_index():
            return None
        names = {labeler, *(name for pair in self._pairs.values() for name in pair)}
        run, mesh = self._evaluator, self._evaluator.mesh
        networks = {name: run.local(state.network(name)) for name in sorted(names)}
        now = np.float32(progress)

        def update(batch: Mapping[str, jax.Array]) -> object:
            logits = {
                name: run.predict(name, self._how, variables, batch)
                for name, variables in networks.items()
            }
            return self._compare(logits, batch["label"], batch["valid"], now)

        # One image for each device: several networks' logits are large.
        batches = run.batches(self._source, mesh.size)
        with run.telling_compilations("Watching"):
            total = sweep.add_up(update, batches, mesh)
        return Watched(
            labeler,
            PseudoLabels(total["counts"]),
            self.prior,
            {name: _share(total[name], total["counts"].sum()) for name in self._pairs},
            len(self._source),
            str(self._how),
        )

    @functools.cached_property
    def prior(self) -> np.ndarray:
        """Pixels per class in the labels that training has, int64 `[C]`; counted once, from at most
        `PRIOR_IMAGES` images. One that cannot be read is left out.
        """
        return class_counts(self._labeled)

    def _measure(
        self,
        logits: Mapping[str, jax.Array],
        label: jax.Array,
        valid: jax.Array,
        progress: jax.Array,
    ) -> dict[str, jax.Array]:
        """Sums over one batch: "counts" `[C+1,C+1]`, and a scalar for each pair of networks."""
        assert self._method.labeler is not None
        teaching = logits[self._method.labeler]
        taught = self._method.pseudo_labels(teaching, valid=valid, progress=progress)
        sums = {"counts": pseudo_label_counts(label, taught, valid, teaching.shape[-1])}
        for name, (one, other) in self._pairs.items():
            distance = metrics.total_variation(logits[one], logits[other])
            sums[name] = jnp.where(valid, distance, 0).sum()
        return sums


def class_counts(source: Source) -> np.ndarray:
    """Pixels of each class in the labels of a source, int64 `[C]`."""

    def count(position: int) -> np.ndarray:
        try:
            label = source[position].get("label")
        except UnreadableError:
            label = None
        flat = np.zeros(0, np.uint8) if label is None else np.ravel(label)
        return np.bincount(flat, minlength=IGNORE_LABEL + 1)[: source.info.num_classes]

    with ThreadPoolExecutor(4) as pool:
        return sum(pool.map(count, range(len(source))), np.zeros(source.info.num_classes, np.int64))


class SkippedUpdates:
    """Counts updates in a row that were dropped because something was not finite, and ends the run
    after too many. It holds what a step gave until it is asked, as the host runs ahead of the
    device.
    """

    def __init__(self, limit: int, sources: Mapping[str, Source]):
        """Starts at none.

        Args:
          limit: updates in a row that end the run; 0 for none.
          sources: by stream, for the ids of images.
        """
        self._limit, self._sources = limit, sources
        self._pending: list[tuple[int, Any, dict[str, np.ndarray]]] = []
        self._row: list[tuple[int, dict[str, np.ndarray]]] = []

    def add(
        self, step: int, measured: Metrics, rows: Mapping[str, Mapping[str, np.ndarray]]
    ) -> None:
        """Takes the metrics of one step, still on the device, and the batch that it saw."""
        # A copy: a view would keep the whole batch alive.
        indices = {name: np.array(part["index"]) for name, part in rows.items() if "index" in part}
        self._pending.append((step, measured["skipped"][0], indices))

    def wait(self, ahead: int = 2) -> None:
        """Waits until the device has at most `ahead` steps still to do. More would keep their
        batches in memory, and make the host's progress look like the device's.
        """
        if len(self._pending) > ahead:
            jax.block_until_ready(self._pending[-1 - ahead][1])

    def device_is_busy(self) -> bool:
        """Whether the last step that was added is still to be done."""
        return bool(self._pending) and not self._pending[-1][1].is_ready()

    def in_a_row(self) -> int:
        """Updates up to the last one that were dropped, one after the other; waits for the device.

        Raises:
          UserError: there were `limit` in a row since the last call, or before.
        """
        pending, self._pending = self._pending, []
        flags = jax.device_get([flag for _, flag, _ in pending])
        for (step, _, indices), skipped in zip(pending, flags, strict=True):
            if not skipped:
                self._row.clear()
                continue
            self._row.append((step, indices))
            if 0 < self._limit <= len(self._row):
                raise self._error()
        return len(self._row)

    def _error(self) -> UserError:
        lines = [
            f"  step {step}, {stream}: {', '.join(self._sources[stream].ids[i] for i in index)}"
            for step, indices in self._row[-3:]
            for stream, index in indices.items()
        ]
        return UserError(
            f"Training stops: in steps {self._row[0][0]} to {self._row[-1][0]}, {len(self._row)} "
            "updates in a row were skipped, as the loss or its gradient was not finite. Nothing "
            "was saved since. Images of the last of these steps:\n"
            + "\n".join(lines)
            + "\nIf train/loss or train/gradient_norm grew before that, start again with a lower "
            "--config.optimizer.learning_rate, or with --config.optimizer.clip_norm=10 (--config."
            "model.dtype=float32 where it is another); if not, look at these images. "
            "--config.max_skipped=N waits for N updates, 0 for ever."
        )


class ZeroLosses:
    """Finds loss terms that do nothing: exactly zero in several reports of a phase in a row.

    A loss term is what a method logs as "loss_<term>". Reports without it, as in a warm-up, say
    nothing of it.
    """

    def __init__(self, phase: str, reports: int = 5):
        self._phase, self._reports = phase, reports
        self._zeros: collections.Counter[str] = collections.Counter()
        self._told: set[str] = set()

    def add(self, values: Mapping[str, float]) -> list[str]:
        """Takes the metrics of a report; the warnings to give now, one for each term and phase."""
        for name, value in values.items():
            if name.startswith("loss_"):
                self._zeros[name] = self._zeros[name] + 1 if value == 0 else 0
        found = [name for name, count in self._zeros.items() if count == self._reports]
        new = [name for name in found if name not in self._told]
        self._told.update(new)
        return [
            f"warning: {name} was exactly zero in the last {self._reports} reports of "
            f"{self._phase}. Unless the config turns it off, see whether any pseudo-labels are "
            "kept (train/kept, watch/pseudo/kept in metrics.jsonl) and what a threshold asks for."
            for name in new
        ]


def _pairs(method: Method) -> dict[str, tuple[str, str]]:
    """Networks to compare: the two teachers, or else the two students; each teacher and its
    student.
    """
    teachers = {name: TEACHER + name for name in method.teachers}
    peers = tuple(teachers.values()) if len(teachers) == 2 else method.students
    pairs = {"coupling": (peers[0], peers[1])} if len(peers) == 2 else {}
    return pairs | {f"gap/{name}": (teacher, name) for name, teacher in teachers.items()}


def _share(part: float, whole: float) -> float:
    return float(part / whole) if whole else float("nan")


def _percent(share: float, unit: str = " %") -> str:
    return f"{100 * share:.1f}{unit}" if np.isfinite(share) else "-"
