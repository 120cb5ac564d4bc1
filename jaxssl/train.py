"""The host loop of one phase: step, log, evaluate, save."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from jaxssl import models, panels, sharding, trained, watch
from jaxssl.checkpoint import Checkpoints
from jaxssl.config import Config
from jaxssl.contracts import (
    Batch,
    Labeling,
    Method,
    Network,
    Phase,
    Source,
    Variables,
    Weights,
)
from jaxssl.data import files, loading, pipeline, quarantine
from jaxssl.data.pseudo_labels import PseudoLabeled, Store
from jaxssl.data.transforms import Augment
from jaxssl.evaluate import Evaluation, Evaluator, show
from jaxssl.logs import Console, Logger, MetricSums, Stopwatch, memory
from jaxssl.optim import Schedule
from jaxssl.signals import StopSignal
from jaxssl.state import TEACHER, TrainState
from jaxssl.step import Clock, make_train_step
from jaxssl.watch import SkippedUpdates, Watched, Watcher, ZeroLosses


def read_weights(run: Run, weights: Weights) -> Variables:
    """Reads one network of an earlier phase from its checkpoint."""
    run.checkpoints.wait()
    return trained.read_network(
        run.checkpoints,
        run.step_of(weights),
        weights.network,
        run.nets[weights.network.removeprefix(TEACHER)],
        tuple(run.config.crop),
        sharding.replicated(run.mesh),
    )


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
      sources: "labeled", "unlabeled" and "val"; "truth", the labels of the unlabeled images, where
        pseudo-labels are to be measured.
      mesh: the devices.
      evaluator: of all networks on "val".
      chooser: of all networks on "holdout", where images are held out to choose what is best.
      watcher: looks at what the method teaches, there too.
      checkpoints: of this run.
      logger: of metrics.
      console: of words.
      stop: asks whether to leave.
      stopwatch: where the time of this start goes.
      memory: by phase, bytes that a step takes on each device, where the compiler says.
      best: phase name -> {"step", "score", "choice", "network", "mode", "last"}: the headline's
        best evaluation so far, by its "choice", and the score of its last one, both in this mode.
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
    chooser: Evaluator | None
    watcher: Watcher
    checkpoints: Checkpoints
    logger: Logger
    console: Console
    stop: StopSignal
    stopwatch: Stopwatch
    memory: dict[str, int] = dataclasses.field(default_factory=dict)
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
      UserError: the data cannot be read (validation images are all opened before the first step
        of a run), or nothing finite has come of too many steps.
    """
    phase, config, begin = run.phases[index], run.config, run.begin(index)
    step, end = int(state.step), begin + phase.steps
    clock = jax.device_put(Clock.of(phase, begin), sharding.replicated(run.mesh))
    sums, zeros = MetricSums(), ZeroLosses(phase.name)
    skips = SkippedUpdates(config.max_skipped, run.sources)
    train_step = None
    if run.checkpoints.latest() is None:  # a run that goes on has opened them before
        with run.stopwatch("data wait"):
            pipeline.check_all(run.sources["val"], "val")
    run.console.phase(phase.name, phase.steps, step - begin)
    with _batches(run, index, start=step - begin) as batches:
        for rows in _timed(batches, run.stopwatch, skips):
            with run.stopwatch("training"):
                batch = sharding.to_devices(rows, run.mesh, config.parallel)
                train_step = train_step or compile_step(run, phase, state, frozen, batch, clock)
                state, metrics = train_step(state, frozen, batch, clock)
                step += 1
                sums.add(metrics)
                skips.add(step, metrics, rows)
                skips.wait()
            done, last = step - begin, step == end
            run.console.step(done)
            logs, evaluates, saves = (
                last or (every > 0 and done % every == 0)
                for every in (config.log.every, config.eval.every, config.checkpoint.every)
            )
            if logs or evaluates or saves:
                with run.stopwatch("training"):  # what the device still has to do is not evaluation
                    skips.in_a_row()
            if logs:
                report(run, phase, state, done, sums.reduce(), zeros)
            improved = evaluates and evaluate(
                run, index, state, step, everything=last, trusted=last or not skips.in_a_row()
            )
            stop = run.stop.should_stop(step)
            # Weights that give nothing finite must not replace the last ones that did. Nobody knows
            # which these are until a step from them is finite: a run that is to stop waits for it.
            saved = last or improved or ((saves or stop) and not skips.in_a_row())
            if saved:
                save(run, index, state, step)
            if stop and saved and run.stop.received is not None:
                raise Stopped(run.stop.received)
    return state


def compile_step(
    run: Run,
    phase: Phase,
    state: TrainState,
    frozen: Mapping[str, Variables],
    batch: Batch,
    clock: Clock,
) -> Any:
    """The phase's step, compiled for arguments like these: the state on every device and donated,
    batches split over the devices. Says what memory it takes.

    With `config.parallel` "mesh", results do not depend on the number of devices. With "pmap", each
    device takes its losses over its own images, with denominators, percentiles and CutMix partners
    of its own; BatchNorm's statistics and gradients are means over the devices. That is what
    PyTorch's DistributedDataParallel with SyncBatchNorm does, of which published numbers come.
    """
    config = run.config
    axis_name = sharding.AXIS if config.parallel == "pmap" else None
    step = make_train_step(
        run.method,
        {name: models.over_devices(net, axis_name) for name, net in run.nets.items()},
        phase,
        run.optimizer,
        run.schedule,
        learning_rate=config.optimizer.learning_rate,
        seed=config.seed,
        accumulate=config.batch.accumulate,
        axis_name=axis_name,
    )
    jitted = sharding.parallelize(step, run.mesh, config.parallel)
    run.console.message(f"{phase.name}: compiling; the next start takes less time.")
    with run.stopwatch("compilation"):
        lowered = jitted.lower(state, frozen, batch, clock)
        check_fixed_point(state, lowered.out_info[0])
        compiled = lowered.compile()
    if (estimate := MemoryEstimate.of(compiled)) is not None:
        run.memory[phase.name] = estimate.total
        run.console.message(f"{phase.name}: {estimate}")
    return compiled


class MemoryEstimate(NamedTuple):
    """What the compiler says that a call takes on each device, in bytes.

    Attributes:
      given: the arguments.
      work: what is in between.
      total: all, with what comes out and does not stand where an argument was.
    """

    given: int
    work: int
    total: int

    @classmethod
    def of(cls, compiled: jax.stages.Compiled) -> MemoryEstimate | None:
        """None where the backend does not say."""
        stats = compiled.memory_analysis()
        if stats is None:
            return None
        given, work = stats.argument_size_in_bytes, stats.temp_size_in_bytes
        new = stats.output_size_in_bytes - stats.alias_size_in_bytes
        return cls(given, work, given + work + new)

    def __str__(self) -> str:
        return (
            f"a step takes about {memory(self.total)} of memory on each device: state and batch "
            f"{memory(self.given)}, intermediate results {memory(self.work)}."
        )


def report(
    run: Run,
    phase: Phase,
    state: TrainState,
    done: int,
    values: Mapping[str, float],
    zeros: ZeroLosses,
) -> None:
    """Logs the metrics since the last report, `done` steps into the phase."""
    # An interval in which every step was skipped has no loss.
    shown = {name: values[name] for name in ("loss", "learning_rate") if name in values}
    if skipped := int(state.skipped):
        shown["skipped"] = skipped
    run.console.report(done, shown)
    named = {f"train/{name}": value for name, value in values.items()}
    run.logger.write(int(state.step), phase.name, named)
    for warning in zeros.add(values):
        run.console.message(warning)


def evaluate(
    run: Run, index: int, state: TrainState, step: int, *, everything: bool, trusted: bool
) -> bool:
    """Evaluates the headline network, or all, looks at what the method teaches, and writes panels.

    Args:
      run: `run.best` is updated.
      index: of the phase.
      state: at `step`.
      step: of the run.
      everything: evaluates all networks.
      trusted: whether these weights may be the best.

    Returns:
      Whether the headline is the phase's best.
    """
    phase = run.phases[index]
    headline = phase.headline or run.method.headline
    names = [headline]
    if everything:
        teachers = [TEACHER + name for name in run.method.teachers]
        names += [name for name in (*run.method.students, *teachers) if name != headline]
    progress = (step - run.begin(index)) / phase.steps
    with run.stopwatch("evaluation"):
        scores = {name: run.evaluator(name, state.network(name)) for name in names}
        watched = run.watcher(state, progress)
        _log_scores(run, phase, step, scores, watched)
        _show_scores(run, f"{phase.name}: ", step, scores, watched, everything=everything)
        if run.evaluator.whole_labels and jax.process_index() == 0:
            write_evaluations(run, step, scores)
        if run.config.eval.panels and jax.process_count() == 1:
            write_panels(run, headline, state, step, progress)
        choice = scores[headline].score
        if run.chooser is not None:
            choice = run.chooser(headline, state.network(headline)).choice
            run.logger.write(step, phase.name, {f"holdout/{headline}/choice": choice})
    return trusted and _note_best(run, phase, headline, step, scores[headline], choice)


def write_evaluations(run: Run, step: int, scores: Mapping[str, Evaluation]) -> None:
    """Keeps what networks take for what, and how sure they are, which is more than metrics.jsonl
    holds; TensorBoard shows the former of the first one.
    """
    info = run.sources["val"].info
    found = {name: score.to_json(info.classes) for name, score in scores.items()}
    files.write_json(trained.evaluation_path(run.workdir, step), found)
    headline = next(iter(scores.values()))
    run.logger.image(step, "confusion", panels.confusion(headline.confusion, info))


def _note_best(
    run: Run, phase: Phase, headline: str, step: int, score: Evaluation, choice: float
) -> bool:
    """Whether an evaluation is the phase's best; one of another mode, as before a resume, has no
    say.
    """
    best = run.best.get(phase.name)
    if best is None or best["mode"] != score.mode or choice > best["choice"]:
        best = {
            "step": step,
            "score": score.score,
            "choice": choice,
            "network": headline,
            "mode": score.mode,
        }
    run.best[phase.name] = {**best, "last": score.score}
    return best["step"] == step


def write_panels(run: Run, headline: str, state: TrainState, step: int, progress: float) -> None:
    """Pictures of a few validation images: truth, prediction, and what the labeler teaches at this
    progress of the phase.
    """
    source, student = run.sources["val"], headline.removeprefix(TEACHER)
    shown = loading.Subset(source, source.ids[:: -(-len(source) // run.config.eval.panels)])
    records = [shown[i] for i in range(len(shown))]
    read = functools.partial(_labels, run.method, np.float32(progress))

    def look(network: str) -> list[dict[str, np.ndarray]]:
        return run.evaluator.maps(network, state.network(network), shown, read)

    columns = {
        "image": [record["image"] for record in records],
        "truth": [record["label"] for record in records if "label" in record],
        f"student {student}": [labels["predicted"] for labels in look(student)],
    }
    if labeler := run.method.labeler:
        found = look(labeler)
        name = f"{labeler.replace('_', ' ')}: pseudo-label"
        columns[name] = [labels["predicted"] for labels in found]
        columns["kept"] = [labels["taught"] for labels in found]
    if source.info.task == "classification":  # a class is a tile of its color
        images = columns.pop("image")
        tiles = {name: _tiles(images, labels) for name, labels in columns.items()}
        columns = {"image": images, **tiles}
    picture = panels.write(
        panel_path(run.workdir, step),
        list(zip(*columns.values(), strict=True)),
        source.info,
        list(columns),
        captions=[record["id"] for record in records],
    )
    run.logger.image(step, "panels", picture)


def _tiles(images: Sequence[np.ndarray], labels: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Classes of images `[h,w,3]` as labels of all their pixels."""
    pairs = zip(images, labels, strict=True)
    return [np.full(image.shape[:2], label, np.uint8) for image, label in pairs]


@functools.partial(jax.jit, static_argnums=0)
def _labels(
    method: Method, progress: jax.Array, logits: jax.Array, valid: jax.Array
) -> dict[str, jax.Array]:
    """What logits predict, and what the method would teach from them, uint8 `[b,h,w]` or `[b]`."""
    return {
        "predicted": logits.argmax(-1).astype(jnp.uint8),
        "taught": method.pseudo_labels(logits, valid=valid, progress=progress),
    }


def panel_path(workdir: Path, step: int) -> Path:
    """Where the pictures of a step are."""
    return workdir / "panels" / f"{step:07d}.png"


def save(run: Run, index: int, state: TrainState, step: int) -> None:
    """Saves the state, and keeps what this phase's resume and later phases will read."""
    if (latest := run.checkpoints.latest()) is not None and latest[0] == step:
        return
    phase, later = run.phases[index], run.phases[index + 1 :]
    wanted = [*phase.frozen.values()]
    # What labeled first is what rules for labels are compared with when the run is over.
    wanted += [p.labeling.network for p in run.phases if p.labeling][:1]
    for other in later:
        wanted += [*other.start.values(), *other.frozen.values()]
        wanted += [weights for sweep in other.sweeps for weights in sweep.networks.values()]
        wanted += [other.labeling.network] if other.labeling else []
    done = {p.name for p in run.phases[: index + 1]}
    run.checkpoints.keep = {
        run.step_of(weights) for weights in wanted if weights.phase in done & run.best.keys()
    }
    run.checkpoints.keep |= {one["step"] for one in trained.results(run.best).values()}
    if run.best and (better := trained.earlier(run.best)):
        run.checkpoints.keep.add(better[1]["step"])
    meta = {
        "phase": phase.name,
        "phases": [[p.name, p.steps] for p in run.phases],
        "best": run.best,
        "config": run.config.to_dict(),
    }
    with run.stopwatch("checkpoint"):
        run.checkpoints.save(step, state, meta)


def make_feeds(
    config: Config,
    phase: Phase,
    sources: Mapping[str, Source],
    mesh: Mesh,
    workdir: Path | None = None,
) -> list[pipeline.Feed]:
    """What a phase reads; UserError where a batch fits neither the data nor the devices.

    Args:
      config: of the run.
      phase: its streams are read.
      sources: by stream.
      mesh: the devices.
      workdir: where pseudo-labels are; None as long as there are none, to check the rest.
    """
    changes = {**config.augment, "scale": tuple(config.augment.scale)}
    augment = Augment(crop=tuple(config.crop), **changes)
    feeds = []
    for stream in phase.streams:
        source, without = sources[stream.name], set[str]()
        limit = quarantine.allowed(config.data.max_damaged, len(source))
        if isinstance(stream.labels, Labeling) and workdir is not None:
            labels = Store.of(workdir, phase.name, source.info)
            without = labels.dropped(source.ids)
            source = PseudoLabeled(source, labels, confidence=stream.labels.confidence)
        feeds.append(pipeline.Feed(stream, source, augment, limit, without))
        sharding.check_batch(stream, config.batch.accumulate, mesh)
        pipeline.check(feeds[-1], config.seed, jax.process_count())
    return feeds


def _batches(run: Run, index: int, *, start: int) -> pipeline.Batches:
    config, phase = run.config, run.phases[index]
    feeds = make_feeds(config, phase, run.sources, run.mesh, run.workdir)
    return pipeline.batches(
        feeds,
        seed=config.seed,
        phase_index=index,
        start=start,
        steps=phase.steps,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        workers=config.data.workers,
        threads=config.data.threads,
        on_damage=quarantine_for(run, index).add,
    )


def quarantine_for(run: Run, index: int) -> quarantine.Quarantine:
    """Where a phase notes images that cannot be read."""
    process, limit = jax.process_index(), run.config.data.max_damaged
    streams = {stream.name for stream in run.phases[index].streams}
    return quarantine.Quarantine(
        run.workdir,
        run.phases[index].name,
        run.begin(index),
        {name: quarantine.allowed(limit, len(run.sources[name])) for name in streams},
        # The console of the other processes is silent, but what they read they alone know.
        say=functools.partial(print, file=sys.stderr) if process else run.console.message,
        process_index=process,
    )


def _timed(
    batches: pipeline.Batches, stopwatch: Stopwatch, skips: SkippedUpdates
) -> Iterator[Mapping[str, Mapping[str, np.ndarray]]]:
    """The batches. Waiting for one counts as data wait where the device ran out of work in it, and
    as training where it did not: the host is ahead of it, and nothing was lost.
    """
    while True:
        with stopwatch("data wait") as lap:
            rows = next(batches, None)
            if skips.device_is_busy():
                lap.name = "training"
        if rows is None:
            return
        yield rows


def _log_scores(
    run: Run,
    phase: Phase,
    step: int,
    scores: Mapping[str, Evaluation],
    watched: Watched | None,
) -> None:
    """Writes one line of metrics; the first network of `scores` is the headline."""
    classes = run.sources["val"].info.classes
    headline = next(iter(scores.values()))
    measure = headline.measure.name
    values: dict[str, Any] = {"eval/mode": headline.mode, f"val/{measure}": headline.score}
    for name, score in scores.items():
        values |= _score_values(name, score, classes)
    if watched is not None:
        values |= {"watch/mode": watched.mode, **watched.values(classes)}
    for name in run.method.teachers:
        if {name, TEACHER + name} <= scores.keys():
            gap = scores[TEACHER + name].score - scores[name].score
            values[f"watch/gap/{name}/{measure}"] = gap
    run.logger.write(step, phase.name, values)


def _show_scores(
    run: Run,
    title: str,
    step: int,
    scores: Mapping[str, Evaluation],
    watched: Watched | None,
    *,
    everything: bool,
) -> None:
    """Prints the headline by class and, at the end of a phase, all that there is."""
    classes, (headline, best) = run.sources["val"].info.classes, next(iter(scores.items()))
    show(run.console, best, classes, f"{title}{headline} on val, {best.mode}, step {step}")
    if everything and len(scores) > 1:
        rows = [(name, f"{100 * score.score:.2f}") for name, score in scores.items()]
        columns = ("network", best.measure.title)
        run.console.table(f"{title}all networks, {best.mode}", columns, rows)
    if watched is not None:
        run.console.message(f"{title}{watched.line()}")
        if everything:
            table = watched.rows(classes)
            run.console.table(f"{title}{watched.title}", watch.COLUMNS, table)


def _score_values(name: str, score: Evaluation, classes: Sequence[str]) -> dict[str, float]:
    """What metrics.jsonl holds of a network's evaluation."""
    start, measure = f"val/{name}", score.measure
    values = {f"{start}/{measure.name}": score.score}
    values |= {f"{start}/{key}": value for key, value in score.calibration.items()}
    for label, value in zip(classes, score.per_class.tolist(), strict=True):
        if np.isfinite(value):
            values[f"{start}/{measure.of_class}/{label}"] = value
    return values


def check_fixed_point(state: TrainState, after: Any) -> None:
    """Makes sure that a step keeps the state's shapes and dtypes; orbax would cast silently.

    Args:
      state: before a step.
      after: shapes and dtypes of the state after it.

    Raises:
      TypeError: names the leaves that a method changes.
    """
    before, structure = jax.tree_util.tree_flatten_with_path(state)
    if jax.tree.structure(after) != structure:
        raise TypeError("The step returns a state of another structure than it got.")
    for (path, old), new in zip(before, jax.tree.leaves(after), strict=True):
        if (old.shape, old.dtype) != (new.shape, new.dtype):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            kinds = f"{old.dtype}{list(old.shape)} to {new.dtype}{list(new.shape)}"
            raise TypeError(f"The step changes {name} from {kinds}.")
