"""Supervised training on labeled images: the baseline, and the warm-up of every other method."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxssl import contracts, losses, views
from jaxssl.contracts import (
    Aux,
    Batch,
    Network,
    Outputs,
    Params,
    Phase,
    Plan,
    Stats,
    Stream,
    Variables,
)
from jaxssl.state import TrainState

WARMUP = "warmup"


@dataclasses.dataclass(frozen=True)
class Method(contracts.Method):
    """One network, cross entropy on labeled images.

    Attributes:
      strong: trains on MKD's strong view of the images, one photometric operation each, not on the
        images as they are.
      auxiliary_weight: weight of an auxiliary head, where the network has one.
    """

    strong: bool = False
    auxiliary_weight: float = 0.4

    @property
    def students(self) -> tuple[str, ...]:
        """The one network."""
        return ("a",)

    def phases(self, plan: Plan) -> tuple[Phase, ...]:
        """One phase; a warm-up only makes it longer, so that budgets compare."""
        steps = plan.main_steps("labeled") + plan.warmup
        return (Phase("main", steps, self.students, (Stream("labeled", plan.batch["labeled"]),)),)

    def loss(
        self,
        nets: Mapping[str, Network],
        params: Mapping[str, Params],
        state: TrainState,
        frozen: Mapping[str, Variables],
        batch: Batch,
        key: jax.Array,
        *,
        phase: Phase,
        progress: jax.Array,
    ) -> tuple[jax.Array, Aux]:
        """Cross entropy over the labeled pixels of the batch."""
        del frozen, phase, progress
        labeled = batch["labeled"]
        if self.strong:
            view_key, key = jax.random.split(key)
            labeled = {
                **labeled,
                "image": views.strong(view_key, labeled["image"], valid=labeled.get("valid")),
            }
        return warmup_loss(
            self, nets, params, state, labeled, key, auxiliary_weight=self.auxiliary_weight
        )


class Forward(NamedTuple):
    """Every student's forward pass over the labeled images, by student."""

    outputs: dict[str, Outputs]
    stats: dict[str, Stats]


def forward(
    nets: Mapping[str, Network],
    params: Mapping[str, Params],
    stats: Mapping[str, Stats],
    labeled: Mapping[str, jax.Array],
    key: jax.Array,
) -> Forward:
    """Runs all students on the labeled images, each in a BatchNorm batch of its own."""
    result = Forward({}, {})
    for i, name in enumerate(nets):
        result.outputs[name], result.stats[name] = nets[name].apply(
            params[name],
            stats[name],
            labeled["image"],
            valid=labeled.get("valid"),
            batch_stats=True,
            key=jax.random.fold_in(key, i),
        )
    return result


def loss_at_full_size(
    net: Network, outputs: Outputs, labels: jax.Array, *, auxiliary_weight: float
) -> jax.Array:
    """Cross entropy of the logits and, weighted, of an auxiliary head's, resized to the labels
    `[B,H,W]`.

    Labels `[B]` of a classification batch meet their logits as they are.
    """

    def loss(logits: jax.Array) -> jax.Array:
        resized = net.resize(logits, labels.shape[1:]) if labels.ndim > 1 else logits
        return losses.cross_entropy(resized, labels)

    if outputs.auxiliary is None:
        return loss(outputs.logits)
    return loss(outputs.logits) + auxiliary_weight * loss(outputs.auxiliary)


def warmup_phase(plan: Plan, students: tuple[str, ...]) -> tuple[Phase, ...]:
    """The supervised phase before a method starts, if the plan has one."""
    if not plan.warmup:
        return ()
    return (Phase(WARMUP, plan.warmup, students, (Stream("labeled", plan.batch["labeled"]),)),)


def warmup_and_main(plan: Plan, students: tuple[str, ...]) -> tuple[Phase, ...]:
    """A warm-up, if the plan has one, and a main phase on labeled and unlabeled images.

    One schedule covers both, and momentum goes on. So a method differs from supervised training of
    as many updates in nothing but what is minimized, and no high rate undoes what was learned.
    """
    steps = plan.main_steps("unlabeled")
    total = plan.warmup + steps
    warmup = warmup_phase(plan, students)
    streams = (
        Stream("labeled", plan.batch["labeled"]),
        Stream("unlabeled", plan.batch["unlabeled"], labels=None),
    )
    main = Phase(
        "main", steps, students, streams, optimizer="continue", schedule=(plan.warmup, total)
    )
    return (*(dataclasses.replace(phase, schedule=(0, total)) for phase in warmup), main)


def warmup_loss(
    method: contracts.Method,
    nets: Mapping[str, Network],
    params: Mapping[str, Params],
    state: TrainState,
    labeled: Mapping[str, jax.Array],
    key: jax.Array,
    *,
    auxiliary_weight: float = 0.4,
) -> tuple[jax.Array, Aux]:
    """The sum of all students' supervised losses; teachers' statistics follow the students'."""
    run = forward(nets, params, state.stats, labeled, key)
    total = jnp.zeros(())
    for name, outputs in run.outputs.items():
        total += loss_at_full_size(
            nets[name], outputs, labeled["label"], auxiliary_weight=auxiliary_weight
        )
    teacher_stats = {name: run.stats[name] for name in method.teachers}
    metrics = {"loss_supervised": (total, jnp.ones(()))}
    return total, Aux(run.stats, teacher_stats, state.extra, metrics)
