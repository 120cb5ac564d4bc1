"""Evaluation: one confusion matrix over a set of labeled images, in one named mode.

`python -m jaxssl.evaluate --workdir=W [--config.eval.mode=slide ...]` evaluates the networks of a
run that was trained; its results are printed and appended to `W/evaluations.jsonl`.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from jaxssl import logs, metrics, sharding, startup
from jaxssl.config import Config
from jaxssl.contracts import Network, Source, UserError, Variables
from jaxssl.data import loading, pipeline
from jaxssl.inference import Presentation, halve, make_predict
from jaxssl.state import TEACHER
from jaxssl.sweep import fold
from jaxssl.trained import Trained, open_trained


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What one network scores.

    Attributes:
      confusion: int64 `[C,C]`, rows are the truth.
      mode: how images were shown to the network, in words.
    """

    confusion: np.ndarray
    mode: str

    @property
    def iou(self) -> np.ndarray:
        """Intersection over union per class, 0 to 1, nan for an absent class."""
        return metrics.iou(self.confusion)

    @property
    def miou(self) -> float:
        """Mean over the classes that are present, 0 to 1."""
        return metrics.mean_iou(self.confusion)

    @property
    def present(self) -> np.ndarray:
        """Bool `[C]`: classes that are true or predicted somewhere; the others are absent."""
        return ~np.isnan(self.iou)

    def to_json(self, classes: Sequence[str]) -> dict[str, Any]:
        """`mode`, `miou`, `iou` of the classes that are present by name, and names of `absent`
        ones.
        """
        iou = {
            name: float(value)
            for name, value in zip(classes, self.iou, strict=True)
            if not np.isnan(value)
        }
        absent = [name for name in classes if name not in iou]
        return {"mode": self.mode, "miou": self.miou, "iou": iou, "absent": absent}


class Evaluator:
    """Evaluates networks on one source; compiles once per architecture and image size.

    Each process evaluates its share of the images on its own devices, and the confusion matrices
    are summed in the end, so sizes may differ.

    Attributes:
      how: images are shown.
    """

    def __init__(
        self,
        nets: Mapping[str, Network],
        source: Source,
        mesh: Mesh,
        config: Config,
        *,
        say: Callable[[str], None] | None = None,
    ):
        """Prepares evaluation.

        Args:
          nets: by student.
          source: with labels.
          mesh: devices; those of this process share its batches.
          config: of the run. `eval` says how images are shown (see `Presentation.of`), how many at
            a time (`batch`, rounded up to fill the devices), and to multiples of how many pixels
            they are padded (`bucket`, so that fewer sizes are compiled for).
          say: takes a line on what was compiled, where images differ in size.
        """
        self.how = Presentation.of(config.eval, config.crop)
        # What is halved before it is shown must not be halved again.
        self._halves = self.how.mode == "half_res"
        self._scored = dataclasses.replace(self.how, mode="whole") if self._halves else self.how
        self._nets, self._source, self._say = dict(nets), source, say
        self._bucket = _at_least_one("eval.bucket", config.eval.bucket)
        self._mesh = sharding.make_mesh(mesh.local_devices)
        share = -(-_at_least_one("eval.batch", config.eval.batch) // jax.process_count())
        self._batch = sharding.round_up(share, self._mesh)
        self._everywhere, rows = sharding.replicated(self._mesh), sharding.batched(self._mesh)
        # Networks of one architecture share a program.
        self._predict = {
            (net, how): jax.jit(
                make_predict(net, how),
                in_shardings=(self._everywhere, rows, rows),
                out_shardings=rows,
            )
            for net in set(nets.values())
            for how in {self.how, self._scored}
        }
        self._halve = jax.jit(halve, out_shardings=rows)
        self._count = jax.jit(self._confusion, out_shardings=self._everywhere)
        self._compiled: set[tuple[Any, ...]] = set()

    def __call__(self, name: str, variables: Variables) -> Evaluation:
        """Evaluates a student, or a teacher ("teacher_a").

        Raises:
          UserError: the source has no labels, or no labeled pixel.
        """
        C, compiled = self._source.info.num_classes, set(self._compiled)
        variables = self._local(variables)
        total, padded = np.zeros((C, C), np.int64), np.zeros((), np.int64)

        def update(carry: None, batch: Mapping[str, jax.Array]) -> tuple[None, jax.Array]:
            if "label" not in batch:
                raise UserError(_NO_LABELS)
            batch = self._halve(batch) if self._halves else batch
            logits = self._run(name, self._scored, variables, batch)
            return carry, self._count(batch["label"], logits)

        def add(batch: Mapping[str, np.ndarray], counts: np.ndarray) -> None:
            # A device's int32 would overflow over a data set.
            np.add(total, counts, out=total)
            np.add(padded, (~batch["valid"][batch["index"] >= 0]).any(), out=padded)

        center = self.how.center
        fold(update, None, self._batches(self._share(), center), self._mesh, sink=add)
        total, padded = map(_sum_over_processes, (total, padded))
        if not total.any():
            raise UserError(_NO_LABELS)
        self._tell_compilations(len(self._compiled - compiled))
        note = f", padded to multiples of {self._bucket}" if padded and center is None else ""
        return Evaluation(total, f"{self.how}{note}")

    def logits(self, name: str, variables: Variables, source: Source) -> list[np.ndarray]:
        """Logits `[h,w,C]` of every image of a small source, in order and at its size."""
        found: dict[int, np.ndarray] = {}
        variables = self._local(variables)

        def update(carry: None, batch: Mapping[str, jax.Array]) -> tuple[None, jax.Array]:
            return carry, self._run(name, self.how, variables, batch)

        def collect(batch: Mapping[str, np.ndarray], logits: np.ndarray) -> None:
            for index, valid, padded in zip(batch["index"], batch["valid"], logits, strict=True):
                height, width = valid.any(1).sum(), valid.any(0).sum()
                found[int(index)] = padded[:height, :width]

        fold(update, None, self._batches(source), self._mesh, sink=collect)
        return [found[i] for i in range(len(source))]

    def _run(
        self, name: str, how: Presentation, variables: Variables, batch: Mapping[str, jax.Array]
    ) -> jax.Array:
        program = self._nets[name.removeprefix(TEACHER)], how
        self._compiled.add((*program, batch["image"].shape))
        return self._predict[program](variables, batch["image"], batch["valid"])

    def _share(self) -> Source:
        """The images that this process evaluates."""
        if jax.process_count() == 1:
            return self._source
        mine = self._source.ids[jax.process_index() :: jax.process_count()]
        return loading.Subset(self._source, mine)

    def _batches(
        self, source: Source, center: tuple[int, int] | None = None
    ) -> Iterator[dict[str, np.ndarray]]:
        return pipeline.in_order(source, self._batch, bucket=self._bucket, center=center)

    def _local(self, variables: Variables) -> Variables:
        """This process's copy, for programs in which no other process takes part."""
        if jax.process_count() == 1:
            return variables
        return jax.tree.map(
            lambda x: jax.make_array_from_single_device_arrays(
                x.shape, self._everywhere, [shard.data for shard in x.addressable_shards]
            ),
            variables,
        )

    def _confusion(self, labels: jax.Array, logits: jax.Array) -> jax.Array:
        return metrics.confusion_matrix(labels, logits.argmax(-1), self._source.info.num_classes)

    def _tell_compilations(self, count: int) -> None:
        if count > 1 and self._say is not None:
            self._say(
                f"Evaluation: {count} image sizes, {count} compilations, once per start. A larger "
                f"--config.eval.bucket (now {self._bucket}) pads to fewer sizes."
            )


_NO_LABELS = (
    "The images to evaluate on have no labeled pixel: nothing to compare predictions with. "
    "Give them labels, or look at predictions: python -m jaxssl.predict."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        prog="python -m jaxssl.evaluate",
        description="Evaluates the networks of a run.",
        epilog="Any --config.eval.KEY=VALUE and --config.data.root=DIR change the run's config.",
    )
    parser.add_argument("--workdir", required=True, type=Path, help="of the run")
    parser.add_argument("--network", help="one of the run's networks (default: all)")
    parser.add_argument("--step", default="best", help="best, last or a number (default: best)")
    parser.add_argument("--split", default="val", help="part of the data set (default: val)")
    args, rest = parser.parse_known_args(argv)
    try:
        run = open_trained(args.workdir, _overrides(rest))
        evaluate_trained(run, args.network, args.step, args.split)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def evaluate_trained(run: Trained, network: str | None, step: str, split: str) -> None:
    """Evaluates networks of a run, prints the results and appends them to `evaluations.jsonl`.

    Args:
      run: whose config says which data, and how they are shown.
      network: None takes all.
      step: "best", "last" or a number.
      split: part of the data set.

    Raises:
      UserError: there is no such network or step, or the data do not fit.
    """
    number = run.step(int(step) if step.isdigit() else cast(Any, step))
    source = loading.load(run.config.data, split, labels=True)
    classes = source.info.classes
    if classes != run.info.classes:
        raise UserError(
            f"The data have the classes {', '.join(classes)}, but {run.workdir} was trained on "
            f"{', '.join(run.info.classes)}."
        )
    startup.keep_compiled(run.config)
    console = logs.create_console()
    evaluator = Evaluator(run.nets, source, sharding.make_mesh(), run.config, say=console.message)
    rows = []
    for name in [network] if network else run.networks:
        score = evaluator(name, run.variables(name, number))
        title = f"{name} on {split}, {score.mode}, step {number}"
        console.iou_table(classes, score.iou, score.present, title=title)
        rows.append((name, f"{100 * score.miou:.2f}", score.mode))
        line = {
            "step": number,
            "phase": _phase(run.phases, number),
            "network": name,
            "split": split,
            "images": len(source),
            **score.to_json(classes),
        }
        with (run.workdir / "evaluations.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
    console.table(f"On {split}, step {number}", ("network", "mIoU", "mode"), rows)
    console.message(f"Added to {run.workdir / 'evaluations.jsonl'}")


def _overrides(arguments: Sequence[str]) -> dict[str, str]:
    """Keys and values of arguments `--config.KEY=VALUE`; evaluation may change these alone."""
    overrides = {}
    for argument in arguments:
        name, given, value = argument.partition("=")
        key = name.removeprefix("--config.")
        if key == name or not given:
            raise UserError(f"Unexpected argument {argument!r}. See --help.")
        if key != "data.root" and not key.startswith("eval."):
            raise UserError(
                f"{name} cannot be changed: the run was trained with it. --config.eval.* and "
                "--config.data.root can."
            )
        overrides[key] = value
    return overrides


def _phase(phases: Sequence[tuple[str, int]], step: int) -> str:
    """The phase that a step of the run lies in."""
    ends = itertools.accumulate(steps for _, steps in phases)
    return next(name for (name, _), end in zip(phases, ends, strict=True) if step <= end)


def _sum_over_processes(counts: np.ndarray) -> np.ndarray:
    # Devices take no int64, so it travels as bytes.
    sent = np.frombuffer(counts.tobytes(), np.uint8)
    gathered = np.asarray(multihost_utils.process_allgather(sent[None], tiled=True))
    return gathered.view(np.int64).sum(0).reshape(counts.shape)


def _at_least_one(key: str, value: int) -> int:
    if value < 1:
        raise UserError(f"{key}={value} is too small. Give 1 or more.")
    return value


if __name__ == "__main__":
    sys.exit(main())
