"""The host loop of one phase: step, log, evaluate, save."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from jaxssl import panels, sharding
from jaxssl.checkpoint import Checkpoints
from jaxssl.config import Config
from jaxssl.contracts import Method, Network, Phase, Source, Variables, Weights
from jaxssl.data import loading, pipeline
from jaxssl.data.transforms import Augment
from jaxssl.evaluate import Evaluation, Evaluator
from jaxssl.logs import Console, Logger, MetricSums
from jaxssl.optim import Schedule
from jaxssl.signals import StopSignal
from jaxssl.state import TEACHER, TrainState
from jaxssl.step import Clock, make_train_step


class Stopped(Exception):  # noqa: N818
    """A signal ended the run after its state was saved."""

    def __init__(self, signal: int):
        super().__init__(signal)
        self.signal = signal


@dataclasses.dataclass
class Run:
    """Everything that a run is made of besides its state.

    Attributes:
      config: as given.
      workdir: where everything is written.
      method: what is minimized.
      phases: the method's, in order.
      nets: by student.
      optimizer: one for all networks.
      schedule: of the learning rate.
      sources: "labeled", "unlabeled" and "val".
      mesh: the devices.
      evaluator: of all networks on "val".
      checkpoints: of this run.
      logger: of metrics.
      console: of words.
      stop: asks whether to leave.
      best: phase name -> {"step", "miou", "network", "last"}: the headline's best evaluation so far
        and the mIoU of its last one.
    """

    config: Config
    workdir: Path
    method: Method
    phases: tuple[Phase, ...]
    nets: Mapping[str, Network]
    optimizer: optax.GradientTransformation
    schedule: Schedule
    sources: Mapping[str, Source]
    mesh: Mesh
    evaluator: Evaluator
    checkpoints: Checkpoints
    logger: Logger
    console: Console
    stop: StopSignal
    best: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

    def begin(self, index: int) -> int:
        """The step at which a phase begins: skipped updates count, so it is known beforehand."""
        return sum(phase.steps for phase in self.phases[:index])

    def step_of(self, weights: Weights) -> int:
        """The step whose checkpoint holds these weights."""
        if weights.which == "best":
            return self.best[weights.phase]["step"]
        names = [phase.name for phase in self.phases]
        return self.begin(names.index(weights.phase) + 1)


def train_phase(
    run: Run, index: int, state: TrainState, frozen: Mapping[str, Variables]
) -> TrainState:
    """Trains from wherever `state` stands in the phase to its end; the last step is evaluated and
    saved.

    Args:
      run: what everything is made of; `run.best` is updated.
      index: of the phase.
      state: on all devices; donated.
      frozen: the phase's read-only networks.

    Raises:
      Stopped: after saving, on a signal.
      UserError: the data cannot be read.
    """
    phase, config, begin = run.phases[index], run.config, run.begin(index)
    step, end = int(state.step), begin + phase.steps
    clock = jax.device_put(Clock.of(phase, begin), sharding.replicated(run.mesh))
    train_step = compile_step(run, phase)
    sums, first = MetricSums(), True
    run.console.phase(phase.name, phase.steps, step - begin)
    with _batches(run, index, start=step - begin) as batches:
        for rows in batches:
            batch = sharding.to_devices(rows, run.mesh)
            if first:
                run.console.message(f"{phase.name}: compiling; the next start takes less time.")
                check_fixed_point(train_step, state, frozen, batch, clock)
                first = False
            state, metrics = train_step(state, frozen, batch, clock)
            sums.add(metrics)
            step += 1
            done, last = step - begin, step == end
            run.console.step(done)
            if done % config.log.every == 0 or last:
                values = sums.reduce()
                run.console.report(done, _some(values, "loss", "learning_rate"))
                run.logger.write(
                    step, phase.name, {f"train/{name}": value for name, value in values.items()}
                )
            improved = False
            if done % config.eval.every == 0 or last:
                improved = evaluate(run, phase, state, step, everything=last)
            stop = run.stop.should_stop(step)
            if done % config.checkpoint.every == 0 or last or improved or stop:
                save(run, index, state, step)
            if stop and run.stop.received is not None:
                raise Stopped(run.stop.received)
    return state


def compile_step(run: Run, phase: Phase) -> Any:
    """The phase's step under jit: the state on every device and donated, batches split over the
    devices.
    """
    config = run.config
    everywhere, rows = sharding.replicated(run.mesh), sharding.batched(run.mesh)
    step = make_train_step(
        run.method,
        run.nets,
        phase,
        run.optimizer,
        run.schedule,
        learning_rate=config.optimizer.learning_rate,
        seed=config.seed,
        accumulate=config.batch.accumulate,
    )
    return jax.jit(
        step,
        in_shardings=(everywhere, everywhere, rows, everywhere),
        out_shardings=everywhere,
        donate_argnums=0,
    )


def evaluate(run: Run, phase: Phase, state: TrainState, step: int, *, everything: bool) -> bool:
    """Evaluates the headline network, or all, writes panels, and says whether the headline is the
    phase's best.
    """
    headline = phase.headline or run.method.headline
    names = [headline]
    if everything:
        teachers = [TEACHER + name for name in run.method.teachers]
        names += [name for name in (*run.method.students, *teachers) if name != headline]
    scores = {name: run.evaluator(name, state.network(name)) for name in names}
    values = {"val/miou": scores[headline].miou}
    for name, score in scores.items():
        values |= _score_values(name, score, run.sources["val"].info.classes)
    run.logger.write(step, phase.name, values)
    best = scores[headline]
    run.console.iou_table(
        run.sources["val"].info.classes,
        best.iou,
        best.present,
        title=f"{phase.name}: {headline} on val, {best.mode} image, step {step}",
    )
    if everything and len(scores) > 1:
        rows = [(name, f"{100 * score.miou:.2f}") for name, score in scores.items()]
        run.console.table(f"{phase.name}: all networks", ("network", "mIoU"), rows)
    if run.config.eval.panels and jax.process_count() == 1:
        write_panels(run, headline, state, step)
    record = run.best.setdefault(phase.name, {"step": 0, "miou": -1.0, "network": headline})
    record["last"] = best.miou
    improved = best.miou > record["miou"]
    if improved:
        record.update(step=step, miou=best.miou)
    return improved


def write_panels(run: Run, headline: str, state: TrainState, step: int) -> None:
    """Pictures of a few validation images: truth, prediction, and what the labeler teaches."""
    source, student = run.sources["val"], headline.removeprefix(TEACHER)
    shown = loading.Subset(source, source.ids[:: -(-len(source) // run.config.eval.panels)])
    records = [shown[i] for i in range(len(shown))]
    columns = {
        "image": [record["image"] for record in records],
        "truth": [record["label"] for record in records if "label" in record],
        f"student {student}": [
            logits.argmax(-1).astype(np.uint8)
            for logits in run.evaluator.logits(student, state.network(student), shown)
        ],
    }
    if labeler := run.method.labeler:
        all_logits = run.evaluator.logits(labeler, state.network(labeler), shown)
        columns[f"{labeler.replace('_', ' ')}: pseudo-label"] = [
            logits.argmax(-1).astype(np.uint8) for logits in all_logits
        ]
        columns["kept"] = [
            np.asarray(run.method.pseudo_labels(jnp.asarray(logits))) for logits in all_logits
        ]
    picture = panels.write(
        panel_path(run.workdir, step),
        list(zip(*columns.values(), strict=True)),
        source.info,
        list(columns),
        captions=[record["id"] for record in records],
    )
    run.logger.image(step, "panels", picture)


def panel_path(workdir: Path, step: int) -> Path:
    """Where the pictures of a step are."""
    return workdir / "panels" / f"{step:07d}.png"


def save(run: Run, index: int, state: TrainState, step: int) -> None:
    """Saves the state, and keeps what this phase's resume and later phases will read."""
    if (latest := run.checkpoints.latest()) is not None and latest[0] == step:
        return
    phase, later = run.phases[index], run.phases[index + 1 :]
    wanted = [*phase.frozen.values()]
    for other in later:
        wanted += [*other.start.values(), *other.frozen.values()]
        wanted += [weights for sweep in other.sweeps for weights in sweep.networks.values()]
    trained = {p.name for p in run.phases[: index + 1]}
    run.checkpoints.keep = {
        run.step_of(weights) for weights in wanted if weights.phase in trained & run.best.keys()
    }
    if phase.name in run.best:
        run.checkpoints.keep.add(run.best[phase.name]["step"])
    meta = {
        "phase": phase.name,
        "phases": [[p.name, p.steps] for p in run.phases],
        "best": run.best,
        "config": run.config.to_dict(),
    }
    run.checkpoints.save(step, state, meta)


def make_feeds(
    config: Config, phase: Phase, sources: Mapping[str, Source], mesh: Mesh
) -> list[pipeline.Feed]:
    """What a phase reads; UserError where a batch fits neither the data nor the devices."""
    augment = Augment(
        crop=tuple(config.crop), scale=tuple(config.augment.scale), flip=config.augment.flip
    )
    feeds = [pipeline.Feed(stream, sources[stream.name], augment) for stream in phase.streams]
    for feed in feeds:
        sharding.check_batch(feed.stream, config.batch.accumulate, mesh)
        pipeline.check(feed, config.seed, jax.process_count())
    return feeds


def _batches(run: Run, index: int, *, start: int) -> pipeline.Batches:
    config, phase = run.config, run.phases[index]
    return pipeline.batches(
        make_feeds(config, phase, run.sources, run.mesh),
        seed=config.seed,
        phase_index=index,
        start=start,
        steps=phase.steps,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        workers=config.data.workers,
        threads=config.data.threads,
    )


def _some(values: Mapping[str, float], *names: str) -> dict[str, float]:
    """What there is of some values: an interval in which every step was skipped has no loss."""
    return {name: values[name] for name in names if name in values}


def _score_values(name: str, score: Evaluation, classes: Sequence[str]) -> dict[str, float]:
    per_class = {
        f"val/{name}/iou/{label}": float(value)
        for label, value in zip(classes, score.iou, strict=True)
        if np.isfinite(value)
    }
    return {f"val/{name}/miou": score.miou, **per_class}


def check_fixed_point(step: Any, state: TrainState, *rest: Any) -> None:
    """Makes sure that a step keeps the state's shapes and dtypes; orbax would cast silently.

    Raises:
      TypeError: names the leaves that a method changes.
    """
    after = jax.eval_shape(step, state, *rest)[0]
    before, structure = jax.tree_util.tree_flatten_with_path(state)
    if jax.tree.structure(after) != structure:
        raise TypeError("The step returns a state of another structure than it got.")
    for (path, old), new in zip(before, jax.tree.leaves(after), strict=True):
        if (old.shape, old.dtype) != (new.shape, new.dtype):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            kinds = f"{old.dtype}{list(old.shape)} to {new.dtype}{list(new.shape)}"
            raise TypeError(f"The step changes {name} from {kinds}.")
