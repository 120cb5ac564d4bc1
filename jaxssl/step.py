"""The training step: a pure function of arrays, jitted by its caller."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxssl.contracts import Aux, Batch, Method, Metrics, Network, Phase, Variables
from jaxssl.optim import Schedule
from jaxssl.state import TrainState, ema


class Clock(NamedTuple):
    """Where a phase lies, as int32 scalars: traced, so that phases alike but for their place share
    one program.

    Attributes:
      begin: the run's step at which the phase began.
      steps: updates of the phase.
      schedule_begin: updates that the schedule had behind it then.
      schedule_steps: updates that the schedule covers.
    """

    begin: jax.Array
    steps: jax.Array
    schedule_begin: jax.Array
    schedule_steps: jax.Array

    @classmethod
    def of(cls, phase: Phase, begin: int) -> Clock:
        """The clock of a phase that begins at step `begin` of the run."""
        return cls(
            *(jnp.int32(v) for v in (begin, phase.steps, *(phase.schedule or (0, phase.steps))))
        )


Step = Callable[[TrainState, Mapping[str, Variables], Batch, Clock], tuple[TrainState, Metrics]]


def make_train_step(
    method: Method,
    nets: Mapping[str, Network],
    phase: Phase,
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
    *,
    learning_rate: float,
    seed: int,
    accumulate: int = 1,
    axis_name: str | None = None,
) -> Step:
    """Makes `step(state, frozen, batch, clock) -> (state, metrics)` for one phase.

    The gradient of `method.loss` moves the networks that the phase trains, then the teachers
    follow. Where the loss or a gradient is not finite, only `step` and `skipped` advance;
    everything else keeps its value. The state's shapes and dtypes are a fixed point of the step.

    Args:
      method: what to minimize.
      nets: by student.
      phase: static.
      optimizer: applied to each network on its own.
      schedule: factor of the learning rate.
      learning_rate: base rate, where the phase has none of its own.
      seed: step k draws from `fold_in(key(seed), k)`.
      accumulate: micro-batches per update. Each is a batch of its own, with its own denominators
        and BatchNorm statistics, as with accumulation in PyTorch; gradients are averaged.
      axis_name: of a `jax.pmap`; then losses and their denominators are local to a device, and
        gradients, statistics, `extra` and metrics are reduced over the axis.
    """
    base_rate = phase.learning_rate if phase.learning_rate is not None else learning_rate

    def objective(
        trained: Mapping[str, Any],
        state: TrainState,
        frozen: Mapping[str, Variables],
        batch: Batch,
        *rest: Any,
    ) -> tuple[jax.Array, Aux]:
        key, progress = rest
        params = {**state.params, **trained}
        return method.loss(nets, params, state, frozen, batch, key, phase=phase, progress=progress)

    gradient = jax.value_and_grad(objective, has_aux=True)

    def step(
        state: TrainState, frozen: Mapping[str, Variables], batch: Batch, clock: Clock
    ) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        if axis_name is not None:
            key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
        done = state.step - clock.begin
        run = _accumulated(gradient, accumulate)
        trained = {name: state.params[name] for name in phase.train}
        (loss, aux), grads = run(trained, state, frozen, batch, key, done / clock.steps)
        if axis_name is not None:
            extra = method.reduce_extra(state.extra, aux.extra, axis_name)
            loss, aux, grads = _reduce(loss, aux._replace(extra=extra), grads, axis_name)

        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        rate = base_rate * schedule(done + clock.schedule_begin, clock.schedule_steps)

        def update() -> TrainState:
            return _updated(method, phase, optimizer, state, grads, aux, rate, done)

        # A condition around the update costs nothing; selecting leaf by leaf would double it.
        state = jax.lax.cond(finite, update, lambda: state).replace(
            step=state.step + 1, skipped=state.skipped + ~finite
        )
        one = jnp.ones(())
        metrics = {**aux.metrics, "loss": (loss, one), "gradient_norm": (norm, one)}
        metrics = jax.tree.map(lambda value: jnp.where(finite, value, 0.0), metrics)
        return state, {**metrics, "learning_rate": (rate, one), "skipped": (1.0 - finite, one)}

    return step


def _updated(
    method: Method,
    phase: Phase,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    grads: Mapping[str, Any],
    aux: Aux,
    rate: jax.Array,
    done: jax.Array,
) -> TrainState:
    params, opt_state = dict(state.params), dict(state.opt_state)
    for name in phase.train:
        direction, opt_state[name] = optimizer.update(grads[name], opt_state[name], params[name])
        params[name] = jax.tree.map(
            lambda p, d: p - rate.astype(p.dtype) * d, params[name], direction
        )
    decay, stats = method.ema_decay(phase, done), {**state.stats, **aux.stats}
    teacher_stats = {
        "ema": lambda name: ema(state.teacher_stats[name], stats[name], decay),
        "copy": lambda name: stats[name],
        "own": lambda name: aux.teacher_stats[name],
    }[method.teacher_stats]
    return state.replace(
        params=params,
        stats=stats,
        opt_state=opt_state,
        teacher_params={
            name: ema(state.teacher_params[name], params[name], decay) for name in method.teachers
        },
        teacher_stats={name: teacher_stats(name) for name in method.teachers},
        extra=dict(aux.extra),
    )


def _accumulated(gradient: Callable[..., Any], accumulate: int) -> Callable[..., Any]:
    """`gradient` over micro-batches in turn: statistics and `extra` pass through, gradients are
    averaged.
    """
    if accumulate == 1:
        return gradient

    def run(
        trained: Any,
        state: TrainState,
        frozen: Any,
        batch: Batch,
        key: jax.Array,
        progress: jax.Array,
    ) -> Any:
        def micro(carry: tuple[TrainState, Any], inputs: tuple[Batch, jax.Array]) -> Any:
            state, total = carry
            (loss, aux), grads = gradient(trained, state, frozen, *inputs, progress)
            state = state.replace(
                stats={**state.stats, **aux.stats},
                teacher_stats=dict(aux.teacher_stats),
                extra=dict(aux.extra),
            )
            return (state, jax.tree.map(jnp.add, total, grads)), (loss, aux.metrics)

        # Rows j, j + accumulate, ... form micro-batch j: every device keeps working on rows that it
        # holds.
        micros = jax.tree.map(
            lambda x: jnp.moveaxis(x.reshape(-1, accumulate, *x.shape[1:]), 1, 0), batch
        )
        keys = jax.random.split(key, accumulate)
        zeros = jax.tree.map(jnp.zeros_like, trained)
        (last, total), (losses, metrics) = jax.lax.scan(micro, (state, zeros), (micros, keys))
        aux = Aux(
            last.stats, last.teacher_stats, last.extra, jax.tree.map(lambda m: m.sum(0), metrics)
        )
        return (losses.mean(), aux), jax.tree.map(lambda g: g / accumulate, total)

    return run


def _reduce(loss: jax.Array, aux: Aux, grads: Any, axis_name: str) -> tuple[jax.Array, Aux, Any]:
    def mean(tree: Any) -> Any:
        return jax.tree.map(lambda x: jax.lax.pmean(x, axis_name), tree)

    metrics = jax.lax.psum(aux.metrics, axis_name)
    return (
        mean(loss),
        aux._replace(stats=mean(aux.stats), teacher_stats=mean(aux.teacher_stats), metrics=metrics),
        mean(grads),
    )
