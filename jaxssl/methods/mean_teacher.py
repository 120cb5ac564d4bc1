"""Mean teacher (Tarvainen & Valpola, Mean teachers are better role models, NIPS 2017): a student's
probabilities stay close to those of the average of its past.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jaxssl import losses, views
from jaxssl.contracts import Aux, Batch, Network, NonNegative, Params, Phase, Share, Variables
from jaxssl.methods import supervised
from jaxssl.state import TrainState


@dataclasses.dataclass(frozen=True)
class Method(supervised.TeacherStudent):
    """The student learns from the labels and from the teacher's probabilities.

    `L = CE(labels) + weight * ramp * ||p_student - p_teacher||^2`

    Each of the two sees the unlabeled images in a light of its own. The paper compares them on
    labeled images too.

    Attributes:
      weight: of the consistency at the end of its ramp. The paper's, for ten classes, is 100 times
        their mean, which is 10 times the sum that is taken here.
      rampup: share of the main phase in which the weight rises (the paper's: 40 of 150 thousand
        updates).
    """

    weight: NonNegative = 10.0
    rampup: Share = 0.27
    ema_decay_max: Share = 0.999

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
        """The class docstring's sum; labeled and unlabeled images have BatchNorm batches of their
        own.
        """
        del frozen
        labeled_key, own_key, student_key, teacher_key = jax.random.split(key, 4)
        loss, aux = supervised.warmup_loss(
            self,
            nets,
            params,
            state,
            batch["labeled"],
            labeled_key,
            auxiliary_weight=self.auxiliary_weight,
        )
        if phase.name == supervised.WARMUP:
            return loss, aux
        images = batch["unlabeled"]

        def view(key: jax.Array) -> Mapping[str, jax.Array]:
            return {**images, "image": views.photometric_distortion(key, images["image"])}

        student = supervised.forward(nets, params, aux.stats, view(student_key), own_key)
        teacher = supervised.teacher_forward(self, nets, state, view(teacher_key))
        logits, taught = (
            supervised.at_full_size(nets["a"], run.outputs["a"].logits, images["image"].shape[1:3])
            for run in (student, teacher)
        )
        consistency = losses.squared_distance(logits, taught, valid=images.get("valid"))
        metrics = {**aux.metrics, "loss_consistency": (consistency, jnp.ones(()))}
        loss += self.weight * sigmoid_ramp(progress, self.rampup) * consistency
        return loss, Aux(student.stats, teacher.stats, aux.extra, metrics)


def sigmoid_ramp(progress: jax.Array | float, length: float) -> jax.Array:
    """exp(-5 (1 - t)^2), where t goes from 0 to 1 in the first `length` of progress (Laine & Aila,
    2017).
    """
    rising = progress < length
    return jnp.where(rising, jnp.exp(-5 * (1 - progress / jnp.where(rising, length, 1)) ** 2), 1.0)
