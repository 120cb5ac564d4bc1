"""Supervised training on labeled images: the baseline, and the warm-up of every other method."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxssl import contracts, losses, mixing, views
from jaxssl.contracts import (
    Aux,
    Batch,
    Network,
    NonNegative,
    Outputs,
    Params,
    Phase,
    Plan,
    Share,
    Stats,
    Stream,
    UserError,
    Variables,
)
from jaxssl.state import TEACHER, TrainState

WARMUP = "warmup"

Criterion = Callable[[jax.Array, jax.Array], jax.Array]
"""From logits `[B,...,C]` and labels `[B,...]` to a loss."""


@dataclasses.dataclass(frozen=True)
class Method(contracts.Method):
    """One network, cross entropy on labeled images.

    Attributes:
      strong: trains on MKD's strong view of the images, one photometric operation each, not on the
        images as they are.
      mixup: alpha of mixup, 0 for none; see `mixup_loss`.
      ema_decay_max: share of its old value that the average of the network keeps, reached within
        the first updates, and then that average is evaluated; 0 for none.
      auxiliary_weight: weight of an auxiliary head, where the network has one.
    """

    strong: bool = False
    mixup: NonNegative = 0.0
    ema_decay_max: Share = 0.0
    auxiliary_weight: NonNegative = 0.4

    @property
    def students(self) -> tuple[str, ...]:
        """The one network."""
        return ("a",)

    @property
    def teachers(self) -> tuple[str, ...]:
        """Its average, which teaches nothing."""
        return self.students if self.ema_decay_max else ()

    @property
    def headline(self) -> str:
        """The average, if there is one."""
        return TEACHER + "a" if self.ema_decay_max else "a"

    def ema_decay(self, phase: Phase, k: jax.Array) -> jax.Array | float:
        """See `ema_decay`."""
        return ema_decay(phase, k, self.ema_decay_max)

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
        loss = functools.partial(mixup_loss, alpha=self.mixup) if self.mixup else warmup_loss
        return loss(self, nets, params, state, labeled, key, auxiliary_weight=self.auxiliary_weight)


@dataclasses.dataclass(frozen=True)
class TeacherStudent(contracts.Method):
    """What methods of one student and its mean teacher have in common: the teacher labels and is
    reported, and before it starts, there may be a warm-up.

    Attributes:
      ema_decay_max: share of its old value that the teacher keeps, reached within the first
        updates.
      auxiliary_weight: weight of an auxiliary head, where the network has one.
    """

    ema_decay_max: Share = 0.99
    auxiliary_weight: NonNegative = 0.4

    @property
    def students(self) -> tuple[str, ...]:
        """The one network."""
        return ("a",)

    @property
    def teachers(self) -> tuple[str, ...]:
        """Its average."""
        return self.students

    @property
    def headline(self) -> str:
        """The teacher."""
        return TEACHER + "a"

    @property
    def labeler(self) -> str | None:
        """The teacher."""
        return TEACHER + "a"

    def phases(self, plan: Plan) -> tuple[Phase, ...]:
        """A warm-up, if the plan has one, and the method."""
        return warmup_and_main(plan, self.students)

    def ema_decay(self, phase: Phase, k: jax.Array) -> jax.Array | float:
        """See the function of that name."""
        return ema_decay(phase, k, self.ema_decay_max)


class Forward(NamedTuple):
    """The forward pass of every student, or every teacher, over the same images."""

    outputs: dict[str, Outputs]
    stats: dict[str, Stats]


def forward(
    nets: Mapping[str, Network],
    params: Mapping[str, Params],
    stats: Mapping[str, Stats],
    images: Mapping[str, jax.Array],
    key: jax.Array | None,
) -> Forward:
    """Runs all students on images, each in a BatchNorm batch of its own and, with a key, with noise
    of its own.
    """
    result = Forward({}, {})
    for i, name in enumerate(nets):
        result.outputs[name], result.stats[name] = nets[name].apply(
            params[name],
            stats[name],
            images["image"],
            valid=images.get("valid"),
            batch_stats=True,
            key=None if key is None else jax.random.fold_in(key, i),
        )
    return result


def teacher_forward(
    method: contracts.Method,
    nets: Mapping[str, Network],
    state: TrainState,
    images: Mapping[str, jax.Array],
) -> Forward:
    """Runs all teachers on images, by the student's name: with the batch's statistics where theirs
    are their own, without dropout.
    """
    result = Forward({}, {})
    for name in method.teachers:
        result.outputs[name], result.stats[name] = nets[name].apply(
            state.teacher_params[name],
            state.teacher_stats[name],
            images["image"],
            valid=images.get("valid"),
            batch_stats=method.teacher_stats == "own",
        )
    return result


def valid_of(images: Mapping[str, jax.Array]) -> jax.Array:
    """Bool `[B,H,W]`, or all True `[B]`, which positions are no padding."""
    return images.get("valid", jnp.ones(images["image"].shape[0], bool))


def joined(batch: Batch) -> dict[str, jax.Array]:
    """Labeled, then unlabeled images, and which of their pixels are no padding, if any may be."""
    labeled, unlabeled = batch["labeled"], batch["unlabeled"]
    names = [name for name in ("image", "valid") if name in labeled]
    return {name: jnp.concatenate([labeled[name], unlabeled[name]]) for name in names}


def ema_decay(phase: Phase, k: jax.Array, most: float) -> jax.Array | float:
    """min(1 - 1/(k+1), most) at update k = 0, 1, ... of the main phase: the mean of all students so
    far, then a moving one.

    While warming up, teachers are copies of the students.
    """
    return 0.0 if phase.name == WARMUP else jnp.minimum(1 - 1 / (k + 1), most)


def output_shapes(net: Network) -> Outputs:
    """What a network computes from an image, as shapes; channels do not depend on its size."""
    size = (64, 64)

    def run(key: jax.Array) -> Outputs:
        image = jnp.zeros((1, *size, 3), jnp.uint8)
        return net.apply(*net.init(key, size), image, batch_stats=False)[0]

    return jax.eval_shape(run, jax.random.key(0))


def at_full_size(net: Network, logits: jax.Array, size: tuple[int, ...]) -> jax.Array:
    """Logits `[B,h,w,C]` resized to the images' size; those of whole images, `[B,C]`, as they
    are.
    """
    return net.resize(logits, size) if logits.ndim > 2 else logits


def loss_at_full_size(
    net: Network,
    outputs: Outputs,
    labels: jax.Array,
    *,
    auxiliary_weight: float,
    criterion: Criterion = losses.cross_entropy,
) -> jax.Array:
    """Cross entropy of the logits and, weighted, of an auxiliary head's, resized to the labels
    `[B,H,W]`, or `[B]` for classification.
    """

    def loss(logits: jax.Array) -> jax.Array:
        return criterion(at_full_size(net, logits, labels.shape[1:]), labels)

    if outputs.auxiliary is None:
        return loss(outputs.logits)
    return loss(outputs.logits) + auxiliary_weight * loss(outputs.auxiliary)


def total_loss(
    nets: Mapping[str, Network],
    outputs: Mapping[str, Outputs],
    labels: jax.Array,
    *,
    auxiliary_weight: float,
    criterion: Criterion = losses.cross_entropy,
) -> jax.Array:
    """The sum of `loss_at_full_size` over all students."""
    total = jnp.zeros(())
    for name, output in outputs.items():
        total += loss_at_full_size(
            nets[name], output, labels, auxiliary_weight=auxiliary_weight, criterion=criterion
        )
    return total


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
    warmup, schedule = warmup_phase(plan, students), (plan.warmup, total)
    main = Phase("main", steps, students, plan.streams(), optimizer="continue", schedule=schedule)
    return (*(dataclasses.replace(phase, schedule=(0, total)) for phase in warmup), main)


def warmup_loss(
    method: contracts.Method,
    nets: Mapping[str, Network],
    params: Mapping[str, Params],
    state: TrainState,
    labeled: Mapping[str, jax.Array],
    key: jax.Array | None,
    *,
    auxiliary_weight: float = 0.4,
    criterion: Criterion = losses.cross_entropy,
) -> tuple[jax.Array, Aux]:
    """The sum of all students' supervised losses; teachers' statistics follow the students'."""
    run = forward(nets, params, state.stats, labeled, key)
    total = total_loss(
        nets,
        run.outputs,
        labeled["label"],
        auxiliary_weight=auxiliary_weight,
        criterion=criterion,
    )
    teacher_stats = {name: run.stats[name] for name in method.teachers}
    metrics = {"loss_supervised": (total, jnp.ones(()))}
    return total, Aux(run.stats, teacher_stats, state.extra, metrics)


def mixup_loss(
    method: contracts.Method,
    nets: Mapping[str, Network],
    params: Mapping[str, Params],
    state: TrainState,
    labeled: Mapping[str, jax.Array],
    key: jax.Array,
    *,
    alpha: float,
    weights: jax.Array | None = None,
    auxiliary_weight: float = 0.4,
) -> tuple[jax.Array, Aux]:
    """As `warmup_loss`, of images that are mixed, with labels that are mixed alike.

    Args:
      method: as for `warmup_loss`, like all that is not named here.
      nets: likewise.
      params: likewise.
      state: likewise.
      labeled: likewise; labels are of whole images.
      key: likewise.
      alpha: of `mixing.mixup`.
      weights: `[B]`, of the images before; they are mixed alike, too.
      auxiliary_weight: likewise.
    """
    if "valid" in labeled:
        raise UserError(
            "mixup is for images with one label each; these have a label for each pixel. Choose "
            "another method, or --config.method.mixup=0 for supervised training."
        )
    mixup_key, key = jax.random.split(key)
    mixed = mixing.mixup(mixup_key, len(labeled["image"]), alpha=alpha)
    criterion = functools.partial(
        losses.mixup_cross_entropy,
        mixed=mixed,
        weights=None if weights is None else mixed(weights),
    )
    return warmup_loss(
        method,
        nets,
        params,
        state,
        {**labeled, "image": mixed(labeled["image"])},
        key,
        auxiliary_weight=auxiliary_weight,
        criterion=criterion,
    )
