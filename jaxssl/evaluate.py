"""Evaluation: one confusion matrix over a set of labeled images, in one named mode.

`python -m jaxssl.evaluate --workdir=W [--config.eval.mode=slide ...]` evaluates the networks of a
run that was trained; its results are printed and appended to `W/evaluations.jsonl`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxssl import logs, metrics, sharding, startup, sweep
from jaxssl.config import Config
from jaxssl.contracts import DataInfo, Network, Source, UserError, Variables
from jaxssl.data import loading, pipeline
from jaxssl.inference import Predict, Presentation, halve, make_predict
from jaxssl.state import TEACHER
from jaxssl.trained import Trained, open_trained


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What one network scores.

    Attributes:
      confusion: int64 `[C,C]`, rows are the truth.
      mode: how images were shown to the network, in words.
      measure: what the score is.
      reliability: sums about its confidences, in classification.
    """

    confusion: np.ndarray
    mode: str
    measure: metrics.Measure = metrics.MEASURES["segmentation"]
    reliability: metrics.Reliability | None = None

    @property
    def score(self) -> float:
        """What networks are compared by, 0 to 1."""
        return self.measure.score(self.confusion)

    @property
    def choice(self) -> float:
        """What weights are chosen by, 0 to 1: the score or, of whole images, the mean probability
        of the true class, since a few images have few scores (DMT's fine-grained testing).
        """
        return self.calibration.get("true_probability", self.score)

    @property
    def per_class(self) -> np.ndarray:
        """The score of each class, float64 `[C]`, 0 to 1, nan for one that is absent."""
        return self.measure.per_class(self.confusion)

    @property
    def present(self) -> np.ndarray:
        """Bool `[C]`: classes that occur; the others are absent."""
        return ~np.isnan(self.per_class)

    @property
    def calibration(self) -> dict[str, float]:
        """What confidences are worth, in classification."""
        if self.reliability is None:
            return {}
        return {
            "calibration_error": metrics.calibration_error(self.reliability),
            "true_probability": metrics.true_probability(self.reliability),
        }

    def to_json(self, classes: Sequence[str]) -> dict[str, Any]:
        """`mode`, the score by its name and, by that of the measure, those of the classes that are
        present, and names of `absent` ones; in classification also `confusion`, the fields of
        `reliability`, `calibration_error` and `true_probability`.
        """
        scores = zip(classes, self.per_class.tolist(), self.present, strict=True)
        present = {name: value for name, value, there in scores if there}
        values = {
            "mode": self.mode,
            self.measure.name: self.score,
            self.measure.of_class: present,
            "absent": [name for name in classes if name not in present],
        }
        if self.reliability is not None:
            sums = {name: x.tolist() for name, x in self.reliability._asdict().items()}
            values |= {
                **self.calibration,
                "confusion": self.confusion.tolist(),
                "reliability": sums,
            }
        return values


class Evaluator:
    """Evaluates networks on one source; compiles once per architecture and image size.

    Each process evaluates its share of the images on its own devices, and the confusion matrices
    are summed in the end, so sizes may differ.

    Attributes:
      how: images are shown.
      whole_labels: whether a label is a class of the whole image.
      mesh: the devices of this process.
      batch: images that they take at a time.
      bucket: what the sides of images are padded to a multiple of.
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
        self.whole_labels = source.info.task == "classification"
        check_mode(self.how, source.info)
        # What is halved before it is shown must not be halved again.
        self._halves = self.how.mode == "half_res"
        self._scored = dataclasses.replace(self.how, mode="whole") if self._halves else self.how
        self._nets, self._source, self._say = dict(nets), source, say
        self.bucket = config.eval.bucket
        self.mesh = sharding.make_mesh(mesh.local_devices)
        share = -(-config.eval.batch // jax.process_count())
        self.batch = sharding.round_up(share, self.mesh)
        self._everywhere, self._rows = sharding.replicated(self.mesh), sharding.batched(self.mesh)
        self._halve = jax.jit(halve, out_shardings=self._rows)
        self._count = jax.jit(self._sums, out_shardings=self._everywhere)
        self._programs: dict[tuple[Network, Presentation], Predict] = {}
        self._compiled: set[tuple[Any, ...]] = set()

    def __call__(self, name: str, variables: Variables) -> Evaluation:
        """Evaluates a student, or a teacher ("teacher_a").

        Raises:
          UserError: the source has no labels, or no labeled pixel.
        """
        variables, info = self.local(variables), self._source.info

        def update(batch: Mapping[str, jax.Array]) -> dict[str, Any]:
            if "label" not in batch:
                raise UserError(_NO_LABELS)
            batch = self._halve(batch) if self._halves else batch
            logits = self.predict(name, self._scored, variables, batch)
            return self._count(batch, logits)

        center = self.how.center
        with self.telling_compilations("Evaluation"):
            batches = sweep.in_shares(self._source, self.batch, bucket=self.bucket, center=center)
            sums = sweep.sum_over_processes(sweep.add_up(update, batches, self.mesh))
        if not sums["confusion"].any():
            raise UserError(_NO_LABELS)
        padded = sums["padded"] and center is None
        note = f", padded to multiples of {self.bucket}" if padded else ""
        measure = metrics.MEASURES[info.task]
        return Evaluation(sums["confusion"], f"{self.how}{note}", measure, sums.get("reliability"))

    def maps(
        self,
        name: str,
        variables: Variables,
        source: Source,
        read: Callable[[jax.Array, jax.Array], Mapping[str, jax.Array]],
    ) -> list[dict[str, np.ndarray]]:
        """What the logits of every image of a small source say, in order and at its size.

        Args:
          name: of a student or a teacher.
          variables: its arrays.
          source: of images.
          read: jitted, from logits `[b,h,w,C]` and `valid` `[b,h,w]`, False in padding, to name ->
            `[b,h,w,...]`, which alone leaves the devices.
        """
        found: dict[int, dict[str, np.ndarray]] = {}
        variables = self.local(variables)

        def update(batch: Mapping[str, jax.Array]) -> object:
            return read(self.predict(name, self.how, variables, batch), batch["valid"])

        def collect(batch: Mapping[str, np.ndarray], maps: Mapping[str, np.ndarray]) -> None:
            for row, (index, valid) in enumerate(zip(batch["index"], batch["valid"], strict=True)):
                place = pipeline.filled(valid)
                found[int(index)] = {key: x[row][place] for key, x in maps.items()}

        sweep.each(update, self.batches(source), self.mesh, collect)
        return [found[i] for i in range(len(source))]

    def predict(
        self, name: str, how: Presentation, variables: Variables, batch: Mapping[str, jax.Array]
    ) -> jax.Array:
        """Logits `[b,h,w,C]`, or `[b,C]`, of a batch on `mesh`; networks of one architecture share
        a program.
        """
        program = self._nets[name.removeprefix(TEACHER)], how
        if program not in self._programs:
            self._programs[program] = jax.jit(
                make_predict(*program),
                in_shardings=(self._everywhere, self._rows, self._rows),
                out_shardings=self._rows,
            )
        self._compiled.add((*program, batch["image"].shape))
        return self._programs[program](variables, batch["image"], batch["valid"])

    def local(self, variables: Variables) -> Variables:
        """This process's copy, for programs in which no other process takes part."""
        return sweep.local(variables, self.mesh)

    @contextlib.contextmanager
    def telling_compilations(self, what: str) -> Iterator[None]:
        """Says how often networks were compiled in the block, where images differ in size."""
        before = set(self._compiled)
        yield
        new = self._compiled - before
        sizes = {shape for *_, shape in new}
        if len(sizes) > 1 and self._say is not None:
            self._say(
                f"{what}: {len(sizes)} image sizes, {len(new)} compilations of a network, once per "
                f"start. A larger --config.eval.bucket (now {self.bucket}) pads to fewer sizes."
            )

    @property
    def fitted(self) -> tuple[int, int] | None:
        """(height, width) that whole images are brought to before they are classified, if any."""
        return self.how.center if self.whole_labels else None

    def batches(self, source: Source, size: int | None = None, **options: Any) -> Iterator[Any]:
        """Images in order, whole or `fitted`; see `pipeline.in_order`.

        Args:
          source: of images.
          size: of a batch, `batch` if None.
          **options: of `in_order`.
        """
        return pipeline.in_order(
            source, size or self.batch, bucket=self.bucket, center=self.fitted, **options
        )

    def _sums(self, batch: Mapping[str, jax.Array], logits: jax.Array) -> dict[str, Any]:
        """What a batch adds to an evaluation."""
        labels, C = batch["label"], self._source.info.num_classes
        rows = (batch["index"] >= 0).reshape(-1, *(1,) * (batch["valid"].ndim - 1))
        sums: dict[str, Any] = {
            "confusion": metrics.confusion_matrix(labels, logits.argmax(-1), C),
            "padded": jnp.sum(~batch["valid"] & rows, dtype=jnp.int32),
        }
        if self.whole_labels:
            sums["reliability"] = metrics.reliability(labels, logits)
        return sums


def check_mode(how: Presentation, info: DataInfo) -> None:
    """UserError where images that have a class as a whole are to be seen by parts."""
    if info.task == "classification" and how.mode in ("slide", "half_res"):
        raise UserError(
            f"eval.mode={how.mode} is for labels of pixels. To classify images, set "
            "--config.eval.mode=whole, or center_crop where they differ in size."
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
        epilog="Any --config.eval.KEY=VALUE (--config.eval.flip, --noconfig.eval.flip for short) "
        "and --config.data.root=DIR change the run's config.",
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
    run.check_classes(source.info)
    classes = run.info.classes
    startup.keep_compiled(run.config)
    console = logs.create_console()
    evaluator = Evaluator(run.nets, source, sharding.make_mesh(), run.config, say=console.message)
    rows = []
    for name in [network] if network else run.networks:
        score = evaluator(name, run.variables(name, number))
        show(console, score, classes, f"{name} on {split}, {score.mode}, step {number}")
        rows.append((name, f"{100 * score.score:.2f}", score.mode))
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
    title = metrics.MEASURES[source.info.task].title
    console.table(f"On {split}, step {number}", ("network", f"{title} %", "mode"), rows)
    console.message(f"Added to {run.workdir / 'evaluations.jsonl'}")


def show(console: logs.Console, score: Evaluation, classes: Sequence[str], title: str) -> None:
    """Prints what an evaluation came to, by class."""
    measure = score.measure
    if score.reliability is not None:  # else the mean of the table is the score
        title += f", {measure.title} {100 * score.score:.2f} %"
    console.class_table(
        classes, score.per_class, score.present, title=title, column=measure.class_title
    )


def _overrides(arguments: Sequence[str]) -> dict[str, str]:
    """Keys and values of arguments `--config.KEY=VALUE`; `--config.KEY` and `--noconfig.KEY` are
    true and false. Evaluation may change some keys alone.
    """
    overrides = {}
    for argument in arguments:
        match = re.fullmatch(r"--(?P<no>no)?config\.(?P<key>[^=]+)(=(?P<value>.*))?", argument)
        if match is None or (match["no"] and match["value"] is not None):
            raise UserError(f"Unexpected argument {argument!r}. See --help.")
        key, flag = match["key"], "false" if match["no"] else "true"
        if key != "data.root" and not key.startswith("eval."):
            raise UserError(
                f"--config.{key} cannot be changed: the run was trained with it. --config.eval.* "
                "and --config.data.root can."
            )
        overrides[key] = flag if match["value"] is None else match["value"]
    return overrides


def _phase(phases: Sequence[tuple[str, int]], step: int) -> str:
    """The phase that a step of the run lies in."""
    ends = itertools.accumulate(steps for _, steps in phases)
    return next(name for (name, _), end in zip(phases, ends, strict=True) if step <= end)


if __name__ == "__main__":
    sys.exit(main())
