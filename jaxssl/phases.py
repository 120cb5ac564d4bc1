"""A run: the method's phases in order, from wherever the workdir stands."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils

from jaxssl import config as configs
from jaxssl import logs, methods, models, optim, sharding, train
from jaxssl.checkpoint import Checkpoints
from jaxssl.config import Config
from jaxssl.contracts import Plan, UserError, Variables, Weights
from jaxssl.data import loading, pipeline
from jaxssl.data.splits import Split
from jaxssl.evaluate import Evaluator
from jaxssl.signals import StopSignal
from jaxssl.state import TEACHER, TrainState, create, draw
from jaxssl.sweep import fold
from jaxssl.train import Run, Stopped


def run(config: Config, workdir: str | os.PathLike[str]) -> int:
    """Trains what the config says, resuming what the workdir holds.

    Returns:
      The exit code: 0, or 128 + the signal that ended the run after saving.

    Raises:
      UserError: a mistake in the config, the data or the workdir.
    """
    began = time.monotonic()
    prepare_jax(config)
    path = Path(workdir).expanduser().absolute()
    main_process = jax.process_index() == 0
    with contextlib.ExitStack() as stack:
        console = stack.enter_context(logs.create_console(main_process=main_process))
        stop = stack.enter_context(StopSignal(jax.process_count()))
        current = build(config, path, console, stop, stack)
        try:
            train_all(current)
        except Stopped as stopped:
            current.checkpoints.wait()
            console.message(f"Saved. The same command goes on from here: --workdir={path}")
            return 128 + stopped.signal
        current.checkpoints.wait()
        console.close()  # the last bar stays above the result
        _report(current, time.monotonic() - began)
    return 0


def build(
    config: Config,
    workdir: Path,
    console: logs.Console,
    stop: StopSignal,
    stack: contextlib.ExitStack,
) -> Run:
    """Opens data, networks and workdir; every mistake that can be found before training is found
    here.

    Args:
      config: of the run.
      workdir: is made, with what describes the run; a workdir of another config is refused.
      console: shows progress.
      stop: says when to leave.
      stack: closes what is opened.
    """
    method = methods.load(config.method)
    split, sources = loading.training_sets(config.data)
    sources["val"] = loading.load(config.data, "val", labels=True)
    info = sources["labeled"].info
    mesh = sharding.make_mesh()
    nets = {
        name: models.load(configs.model_of(config, name), info.num_classes)
        for name in method.students
    }
    plan = Plan(
        sizes={name: len(source) for name, source in sources.items()},
        batch={"labeled": config.batch.labeled, "unlabeled": config.batch.unlabeled},
        num_classes=info.num_classes,
        steps=config.steps,
        epochs=config.epochs,
        warmup=config.warmup,
        crop=tuple(config.crop),
        seed=config.seed,
    )
    phases = method.phases(plan)
    for phase in phases:
        train.make_feeds(config, phase, sources, mesh)
    main_process = jax.process_index() == 0
    open_workdir(workdir, config, split, main_process=main_process)
    multihost_utils.sync_global_devices("all processes have looked at the workdir")
    tensorboard = config.log.tensorboard
    current = Run(
        config=config,
        workdir=workdir,
        method=method,
        phases=phases,
        nets=nets,
        optimizer=optim.make_optimizer(config.optimizer),
        schedule=optim.make_schedule(config.optimizer),
        sources=sources,
        mesh=mesh,
        evaluator=Evaluator(nets, sources["val"], mesh, config.eval),
        checkpoints=stack.enter_context(Checkpoints(workdir / "checkpoints")),
        logger=stack.enter_context(
            logs.Logger(workdir, main_process=main_process, tensorboard=tensorboard)
        ),
        console=console,
        stop=stop,
    )
    console.message(
        f"{config.method.name}: {len(sources['labeled'])} labeled ({split.family}), "
        f"{len(sources['unlabeled'])} unlabeled, {len(sources['val'])} validation images; "
        + ", ".join(f"{phase.name} {phase.steps} steps" for phase in current.phases)
        + f"; {mesh.size} {jax.devices()[0].platform} device(s)"
    )
    return current


def train_all(run: Run) -> TrainState:
    """Trains every phase that is not behind the newest checkpoint."""
    index, state = restore_or_create(run)
    for i in range(index, len(run.phases)):
        frozen = {
            name: read_weights(run, weights) for name, weights in run.phases[i].frozen.items()
        }
        if int(state.step) == run.begin(i) and (i > 0 or run.phases[i].sweeps):
            state = enter(run, i, state)
        if int(state.step) < run.begin(i + 1):
            state = train.train_phase(run, i, state, frozen)
    return state


def restore_or_create(run: Run) -> tuple[int, TrainState]:
    """The newest checkpoint and the phase it belongs to, or a new state and the first phase."""
    latest = run.checkpoints.latest()
    run.logger.rewind(-1 if latest is None else latest[0])
    if latest is None:
        everywhere = sharding.replicated(run.mesh)
        key = jax.random.key(run.config.seed)
        variables = draw(run.nets, key, tuple(run.config.crop), everywhere)
        make = jax.jit(functools.partial(make_state, run, 0), out_shardings=everywhere)
        return 0, make(variables)
    step, meta = latest
    phases = [[phase.name, phase.steps] for phase in run.phases]
    if meta["phases"] != phases:
        raise UserError(
            f"{run.workdir} was trained in the phases {meta['phases']}, this run has {phases}. "
            "The data or the library changed: choose another --workdir."
        )
    run.best.update(meta["best"])
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
        everywhere = sharding.replicated(run.mesh)
        drawn = draw(run.nets, key, tuple(run.config.crop), everywhere)
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
    """Runs a phase's sweeps in order; the method's arrays as the last one leaves them."""
    extra, results = state.extra, {}
    for sweep in run.phases[index].sweeps:
        networks = {name: read_weights(run, weights) for name, weights in sweep.networks.items()}
        # As an argument: what a jitted function closes over becomes constants of its program.
        update = functools.partial(jax.jit(functools.partial(sweep.update, run.nets)), networks)
        batches = pipeline.in_order(
            run.sources[sweep.source],
            run.config.eval.batch,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        results[sweep.name] = fold(update, sweep.init(results, extra), batches, run.mesh)
        extra = sweep.finish(results[sweep.name], extra)
    return extra


def read_weights(run: Run, weights: Weights) -> Variables:
    """Reads one network of an earlier phase from its checkpoint."""
    student = weights.network.removeprefix(TEACHER)
    prefix = TEACHER if weights.network.startswith(TEACHER) else ""
    index = [phase.name for phase in run.phases].index(weights.phase)
    run.checkpoints.wait()
    shapes, step = abstract_state(run, index).network(weights.network), run.step_of(weights)
    params = run.checkpoints.restore_part(step, (f"{prefix}params", student), shapes.params)
    return Variables(
        params, run.checkpoints.restore_part(step, (f"{prefix}stats", student), shapes.stats)
    )


def open_workdir(workdir: Path, config: Config, split: Split, *, main_process: bool) -> None:
    """Writes what describes the run, or makes sure that the workdir belongs to it."""
    current = json.loads(config.to_json_best_effort())
    stored = workdir / "config.json"
    if stored.exists():
        different = configs.differences(json.loads(stored.read_text()), current)
        if different:
            raise UserError(
                f"{workdir} belongs to another config. Choose another --workdir, or set back:\n  "
                + "\n  ".join(different)
            )
    elif (workdir / "checkpoints").exists() or (workdir / "metrics.jsonl").exists():
        raise UserError(f"{workdir} holds a run without its config.json. Choose another --workdir.")
    splits = workdir / "splits.json"
    if splits.exists() and Split.from_json(splits.read_text()) != split:
        raise UserError(
            f"The images differ from those in {splits}: the data changed since the run began. "
            "Restore them, or choose another --workdir."
        )
    if main_process:
        workdir.mkdir(parents=True, exist_ok=True)
        stored.write_text(json.dumps(current, indent=1) + "\n")
        splits.write_text(split.to_json())
        (workdir / "environment.json").write_text(json.dumps(logs.environment(), indent=1) + "\n")


def prepare_jax(config: Config) -> None:
    """Joins the other processes, and keeps compiled programs for the next start."""
    if config.distributed:
        # TPU pods, Slurm and others say all of this themselves; elsewhere the environment does.
        count, rank = os.environ.get("JAX_NUM_PROCESSES"), os.environ.get("JAX_PROCESS_ID")
        jax.distributed.initialize(
            num_processes=None if count is None else int(count),
            process_id=None if rank is None else int(rank),
        )
    cache = config.compilation_cache
    if cache == "auto":
        home = os.environ.get("XDG_CACHE_HOME", "~/.cache")
        cache = os.path.expanduser(os.path.join(home, "jaxssl", "compilation"))
    if cache and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", cache)


def _report(run: Run, seconds: float) -> None:
    """Ends a run by saying its result, where the pictures are, and what to do next."""
    last = run.phases[-1]
    step, best = run.begin(len(run.phases)), run.best[last.name]
    minutes, seconds = divmod(round(seconds), 60)
    lines = [
        f"Done: step {step}, {minutes}:{seconds:02d} min. Network {best['network']} on val, "
        f"{run.config.eval.mode} image: mIoU {100 * best['last']:.2f} at the end, "
        f"{100 * best['miou']:.2f} at its best (step {best['step']}).",
        f"Metrics:  {run.workdir / 'metrics.jsonl'}, and tensorboard --logdir {run.workdir}",
    ]
    if (pictures := train.panel_path(run.workdir, step)).exists():
        lines.append(f"Pictures: {pictures}")
    lines += [f"Next:     {hint}" for hint in run.config.next]
    run.console.message("\n".join(lines))
