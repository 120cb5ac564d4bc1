"""A run: the method's phases in order, from wherever the workdir stands."""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from jaxssl import (
    auto,
    labeling,
    logs,
    methods,
    metrics,
    models,
    optim,
    sharding,
    startup,
    sweep,
    train,
    trained,
)
from jaxssl import config as configs
from jaxssl.checkpoint import Checkpoints
from jaxssl.config import Config
from jaxssl.contracts import (
    DataInfo,
    Method,
    Network,
    Phase,
    Plan,
    Source,
    UserError,
    Variables,
)
from jaxssl.data import loading
from jaxssl.data.quarantine import Damage
from jaxssl.data.splits import Split
from jaxssl.evaluate import Evaluator
from jaxssl.models import pretrained
from jaxssl.signals import StopSignal
from jaxssl.state import TEACHER, TrainState, create, draw
from jaxssl.train import Run, Stopped, read_weights
from jaxssl.watch import Watcher


def run(config: Config, workdir: str | os.PathLike[str]) -> int:
    """Trains what the config says, resuming what the workdir holds.

    Returns:
      The exit code: 0, or 128 + the signal that ended the run after saving.

    Raises:
      UserError: a mistake in the config, the data or the workdir.
    """
    stopwatch = logs.Stopwatch()
    startup.prepare_jax(config)
    path = Path(workdir).expanduser().absolute()
    mesh = sharding.make_mesh()
    main_process = jax.process_index() == 0
    with contextlib.ExitStack() as stack:
        console = stack.enter_context(logs.create_console(main_process=main_process))
        stack.enter_context(stopwatch.counting_compilation())
        stop = stack.enter_context(StopSignal(jax.process_count()))
        began = path if trained.has_begun(path) else None
        config = auto.resolve(config, began, console.message, mesh.size)
        current = build(config, path, mesh, console, stop, stopwatch, stack)
        try:
            state = train_all(current)
        except Stopped as stopped:
            _finish(current)
            step, _ = current.checkpoints.latest() or (0, None)
            console.message(f"The same command goes on from step {step}: --workdir={path}")
            return 128 + stopped.signal
        _finish(current)
        console.close()  # the last bar stays above the result
        _report(current, state)
    return 0


def build(
    config: Config,
    workdir: Path,
    mesh: Mesh,
    console: logs.Console,
    stop: StopSignal,
    stopwatch: logs.Stopwatch,
    stack: contextlib.ExitStack,
) -> Run:
    """Opens data, networks and workdir; every mistake that can be found before training is found
    here.

    Args:
      config: of the run.
      workdir: is made, with what describes the run; a workdir of another config is refused.
      mesh: all devices.
      console: shows progress.
      stop: says when to leave.
      stopwatch: started with the run.
      stack: closes what is opened.
    """
    method = methods.load(config.method)
    split, sources = open_sources(config.data, truth=config.eval.unlabeled_truth)
    parts = assemble(config, method, sources, mesh, say=console.message)
    info = sources["labeled"].info
    main_process = jax.process_index() == 0
    open_workdir(workdir, config, split, info, main_process=main_process)
    multihost_utils.sync_global_devices("all processes have looked at the workdir")
    tensorboard = config.log.tensorboard
    current = Run(
        **parts._asdict(),
        config=config,
        workdir=workdir,
        method=method,
        sources=sources,
        mesh=mesh,
        watcher=Watcher(method, parts.evaluator, sources, config),
        checkpoints=stack.enter_context(Checkpoints(workdir / "checkpoints")),
        logger=stack.enter_context(
            logs.Logger(workdir, main_process=main_process, tensorboard=tensorboard)
        ),
        console=console,
        stop=stop,
        stopwatch=stopwatch,
    )
    console.message(
        f"{config.method.name}: {len(sources['labeled'])} labeled ({split.family}), "
        f"{len(sources['unlabeled'])} unlabeled, {len(sources['val'])} validation images; "
        + ", ".join(f"{phase.name} {phase.steps} steps" for phase in current.phases)
        + f"; {mesh.size} {jax.devices()[0].platform} device(s)"
    )
    for note in filter(None, (split.note, *method.notes(info.num_classes))):
        console.message(note)
    return current


def open_sources(data: Config, *, truth: bool = False) -> tuple[Split, dict[str, Source]]:
    """The split, and the sources "labeled", "unlabeled" and "val" of a config's `data` section; and
    "truth", if it is asked for: the labels of the unlabeled images, of which nothing learns.
    """
    split, sources = loading.training_sets(data)
    if truth:
        sources["truth"] = loading.truth(data, split)
    return split, sources | {"val": loading.load(data, "val", labels=True)}


class Parts(NamedTuple):
    """What a config makes for its data, as `Run` has it: nothing is written, drawn or compiled."""

    phases: tuple[Phase, ...]
    nets: dict[str, Network]
    optimizer: optax.GradientTransformation
    schedule: optim.Schedule
    evaluator: Evaluator
    chooser: Evaluator | None


def assemble(
    config: Config,
    method: Method,
    sources: Mapping[str, Source],
    mesh: Mesh,
    *,
    say: Callable[[str], None] | None = None,
) -> Parts:
    """Makes the parts of a run that a config describes.

    Raises:
      UserError: one of them cannot be, or the data or the devices do not fit it.
    """
    info = sources["labeled"].info
    if info.task not in method.tasks:
        raise UserError(
            f"The method {config.method.name!r} is for {' and '.join(method.tasks)}, and the data "
            f"are for {info.task}. Methods for that: {', '.join(methods.for_task(info.task))}."
        )
    nets = {
        name: models.load(configs.model_of(config, name), info.num_classes, task=info.task)
        for name in method.students
    }
    phases = method.phases(make_plan(config, sources))
    for phase in phases:
        train.make_feeds(config, phase, sources, mesh)
    return Parts(
        phases,
        nets,
        optim.make_optimizer(config.optimizer),
        optim.make_schedule(config.optimizer),
        Evaluator(nets, sources["val"], mesh, config, say=say),
        Evaluator(nets, sources["holdout"], mesh, config) if "holdout" in sources else None,
    )


def find_weights(config: Config, method: Method) -> None:
    """Makes sure that the pretrained weights are there and fit; a run that goes on does not need
    them.

    Raises:
      UserError: as `pretrained.load`.
    """
    of_student = {name: configs.model_of(config, name) for name in method.students}
    wanted = {name: model for name, model in of_student.items() if model.get("pretrained")}
    key, shapes = jax.random.key(0), {}
    for name, model in wanted.items():
        net = models.load(model, num_classes=2)  # of heads nothing is an error
        shapes[name] = jax.eval_shape(functools.partial(net.init, size=tuple(config.crop)), key)
    pretrained.load(wanted, shapes)


def make_plan(config: Config, sources: Mapping[str, Source]) -> Plan:
    """What a method plans its phases from."""
    return Plan(
        sizes={name: len(source) for name, source in sources.items()},
        batch={"labeled": config.batch.labeled, "unlabeled": config.batch.unlabeled},
        num_classes=sources["labeled"].info.num_classes,
        steps=config.steps,
        epochs=config.epochs,
        warmup=config.warmup,
        crop=tuple(config.crop),
        scale=tuple(config.augment.scale),
        seed=config.seed,
    )


def train_all(run: Run) -> TrainState:
    """Trains every phase that is not behind the newest checkpoint."""
    index, state = restore_or_create(run)
    if int(state.step) < run.begin(len(run.phases)):
        run.console.table("What is trained", *overview(state))
    for i in range(index, len(run.phases)):
        frozen = {
            name: read_weights(run, weights) for name, weights in run.phases[i].frozen.items()
        }
        if int(state.step) == run.begin(i) and (i > 0 or run.phases[i].sweeps):
            labeling.label(run, i)
            state = enter(run, i, state)
        if int(state.step) < run.begin(i + 1):
            if int(state.step) > run.begin(i):
                labeling.check(run, i)
            state = train.train_phase(run, i, state, frozen)
    return state


def restore_or_create(run: Run) -> tuple[int, TrainState]:
    """The newest checkpoint and the phase it belongs to, or a new state and the first phase."""
    latest = run.checkpoints.latest()
    run.logger.rewind(-1 if latest is None else latest[0])
    if latest is None:
        everywhere = sharding.replicated(run.mesh)
        key = jax.random.key(run.config.seed)
        make = jax.jit(functools.partial(make_state, run, 0), out_shardings=everywhere)
        return 0, make(draw_networks(run, key))
    step, meta = latest
    phases = [[phase.name, phase.steps] for phase in run.phases]
    if meta["phases"] != phases:
        raise UserError(
            f"{run.workdir} was trained in the phases {meta['phases']}, this run has {phases}. "
            "The data or the library changed: choose another --workdir."
        )
    for name, record in meta["best"].items():
        run.best[name] = {"mode": "mode unknown", **record}  # which older versions did not store
    index = next(i for i in range(len(phases)) if run.begin(i) < step <= run.begin(i + 1))
    state = run.checkpoints.restore(step, abstract_state(run, index))
    if int(state.step) != step:
        raise UserError(
            f"The checkpoint {step} in {run.workdir} holds step {int(state.step)}. Delete it."
        )
    run.console.message(
        f"Resumed at step {step} of {run.begin(len(phases))}, in phase {meta['phase']}."
    )
    return index, state


def overview(state: TrainState) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Columns and rows of a table of what a state consists of, and how large it is."""

    def size(tree: Any) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(tree))

    def memory(*trees: Any) -> str:
        return logs.memory(sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(trees)))

    rows = []
    for name in (*state.params, *(TEACHER + name for name in state.teacher_params)):
        params, stats = state.network(name)
        total, backbone = size(params), size(params["backbone"])
        counts = (f"{count:,}" for count in (total, backbone, total - backbone))
        rows.append((name, *counts, memory(params, stats)))
    rows.append(("optimizer", "", "", "", memory(state.opt_state)))
    if state.extra:
        rows.append(("the method's own", "", "", "", memory(state.extra)))
    rows.append(("total", "", "", "", memory(state)))
    return ("", "parameters", "backbone", "head", "memory"), rows


def draw_networks(run: Run, key: jax.Array) -> dict[str, Variables]:
    """What students begin with: random variables, and where the config names pretrained weights,
    those, as NumPy arrays.
    """
    networks = draw(run.nets, key, tuple(run.config.crop), sharding.replicated(run.mesh))
    of_student = {name: configs.model_of(run.config, name) for name in networks}
    networks, lines = pretrained.load(of_student, networks)
    for line in lines:
        run.console.message(line)
    return networks


def make_state(run: Run, index: int, variables: Mapping[str, Variables]) -> TrainState:
    """A new state with optimizers for a phase's networks; pure."""
    return create(run.method, run.nets, run.optimizer, run.phases[index].train, variables)


def abstract_state(run: Run, index: int) -> TrainState:
    """Shapes and shardings of the state in a phase."""
    key, size = jax.random.key(run.config.seed), tuple(run.config.crop)
    variables = {
        name: jax.eval_shape(functools.partial(net.init, size=size), key)
        for name, net in run.nets.items()
    }
    shapes = jax.eval_shape(functools.partial(make_state, run, index), variables)
    return sharding.abstract(shapes, sharding.replicated(run.mesh))


def enter(run: Run, index: int, state: TrainState) -> TrainState:
    """The state as a phase starts with it, from the end of the one before."""
    phase = run.phases[index]
    for name, weights in phase.start.items():
        state = state.with_network(name, read_weights(run, weights))
    if phase.reinitialize:
        key = jax.random.fold_in(jax.random.key(run.config.seed), run.begin(index))
        drawn = draw_networks(run, key)
        for name in phase.reinitialize:
            state = state.with_network(name, drawn[name])
    extra = sweep_all(run, index, state)

    def start(state: TrainState, extra: Mapping[str, Any]) -> TrainState:
        kept = state.opt_state if phase.optimizer == "continue" else {}
        opt_state = {
            name: kept[name] if name in kept else run.optimizer.init(state.params[name])
            for name in phase.train
        }
        # A teacher that starts as its student must not share its buffers: the step donates both.
        return jax.tree.map(jnp.copy, state.replace(opt_state=opt_state, extra=extra))

    return jax.jit(start, out_shardings=sharding.replicated(run.mesh))(state, extra)


def sweep_all(run: Run, index: int, state: TrainState) -> Mapping[str, Any]:
    """Runs a phase's sweeps in order; the method's arrays as the last one leaves them.

    Raises:
      UserError: more images than may be cannot be read; fewer are left out.
    """
    extra, sums, mesh = state.extra, {}, run.evaluator.mesh
    noted = train.quarantine_for(run, index)
    for one in run.phases[index].sweeps:
        networks = {name: read_weights(run, weights) for name, weights in one.networks.items()}
        # As arguments: what a jitted function closes over becomes constants of its program.
        given = sweep.local((networks, extra), mesh)
        update = functools.partial(jax.jit(functools.partial(one.update, run.nets)), *given)
        shown, damaged = run.evaluator, list[Damage]()
        batches = sweep.in_shares(
            run.sources[one.source],
            shown.batch,
            bucket=shown.bucket,
            center=shown.fitted,
            on_damage=lambda *what, name=one.source, to=damaged: to.append(Damage(name, *what)),
        )
        total = sweep.add_up(update, batches, mesh)
        for damage in damaged:
            noted.add(0, damage)
        sums[one.name] = sweep.sum_over_processes(total)
        extra = one.finish(sums, extra)
    return extra


def open_workdir(
    workdir: Path, config: Config, split: Split, info: DataInfo, *, main_process: bool
) -> None:
    """Writes what describes the run, or makes sure that the workdir belongs to it. What a start
    that failed at once left there is replaced: its error may have asked for another config.
    """
    current = json.loads(config.to_json_best_effort())
    if trained.has_begun(workdir):
        _refuse_other_run(workdir, current, split, info)
    if main_process:
        workdir.mkdir(parents=True, exist_ok=True)
        environment = json.dumps(logs.environment(), indent=1) + "\n"
        trained.write_whole(workdir / "environment.json", environment)
        trained.write_whole(workdir / "splits.json", split.to_json())
        trained.write_classes(workdir, info)
        # Last: it says that the rest is there.
        trained.write_whole(workdir / "config.json", json.dumps(current, indent=1) + "\n")


def _refuse_other_run(
    workdir: Path, current: Mapping[str, Any], split: Split, info: DataInfo
) -> None:
    """Refuses to go on with a run of another config, or whose data changed since."""
    stored = workdir / "config.json"
    if not stored.exists():
        raise UserError(f"{workdir} holds a run without its config.json. Choose another --workdir.")
    if different := configs.differences(json.loads(stored.read_text()), current):
        raise UserError(
            f"{workdir} belongs to another config. Choose another --workdir, or set back:\n  "
            + "\n  ".join(different)
        )
    splits = workdir / "splits.json"
    if splits.exists() and Split.from_json(splits.read_text()) != split:
        raise UserError(
            f"The images differ from those in {splits}: the data changed since the run began. "
            "Restore them, or choose another --workdir."
        )
    if (workdir / "classes.json").exists() and trained.read_classes(workdir) != info:
        raise UserError(
            f"The classes differ from those in {workdir / 'classes.json'}: the data changed since "
            "the run began. Restore them, or choose another --workdir."
        )


def _finish(run: Run) -> None:
    """Waits for the disk, and adds where the time of this start went to time.jsonl, and what memory
    its steps took.
    """
    with run.stopwatch("checkpoint"):
        run.checkpoints.wait()
    seconds = {name: round(value, 3) for name, value in run.stopwatch.seconds().items()}
    step, _ = run.checkpoints.latest() or (0, None)
    if jax.process_index() == 0:
        with (run.workdir / "time.jsonl").open("a") as file:
            line = {"step": step, "seconds": seconds, "memory": run.memory}
            file.write(json.dumps(line) + "\n")


def _report(run: Run, state: TrainState) -> None:
    """Ends a run by saying its result, where the pictures are, and what to do next."""
    step = run.begin(len(run.phases))
    minutes, seconds = divmod(round(sum(run.stopwatch.seconds().values())), 60)
    first, *others = sorted(trained.results(run.best).values(), key=lambda one: -one["choice"])
    title = metrics.MEASURES[run.sources["val"].info.task].title
    lines = [f"Done: step {step}, {minutes}:{seconds:02d} min. {_score(first, title)}."]
    lines += [f"Also:     {_score(one, title)}." for one in others]
    if better := trained.earlier(run.best):
        phase, one = better
        lines.append(
            f"Earlier:  {title} {100 * one['score']:.2f} in phase {phase}, with {one['network']}: "
            f"--step={one['step']} of evaluate, predict and label takes it"
        )
    lines += [f"Metrics:  {run.workdir / 'metrics.jsonl'}, and tensorboard --logdir {run.workdir}"]
    if "training" in (shares := run.stopwatch.percent()):
        lines.append(f"Time:     {', '.join(f'{name} {n} %' for name, n in shares.items())}")
    if skipped := int(state.skipped):
        lines.append(f"Skipped:  {skipped} updates, whose loss or gradient was not finite")
    if (pictures := train.panel_path(run.workdir, step)).exists():
        lines.append(f"Pictures: {pictures}")
    lines += [f"Next:     {hint}" for hint in run.config.next]
    run.console.message("\n".join(lines))


def _score(best: Mapping[str, Any], title: str) -> str:
    return (
        f"Network {best['network']} on val, {best['mode']}: {title} {100 * best['last']:.2f} at "
        f"the end, {100 * best['score']:.2f} at its best (step {best['step']})"
    )
