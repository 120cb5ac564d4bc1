"""CutMix-Seg (French et al., Semi-supervised semantic segmentation needs strong, varied
perturbations, BMVC 2020, arXiv:1906.01916): the mean teacher with CutMix for the student.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jaxssl import losses, mixing
from jaxssl.contracts import Aux, Batch, Network, NonNegative, Params, Phase, Share, Variables
from jaxssl.methods import supervised
from jaxssl.state import TrainState


@dataclasses.dataclass(frozen=True)
class Method(supervised.TeacherStudent):
    """The student learns from the labels and, on CutMix images, the teacher's probabilities.

    `L = CE(labels) + weight * share * ||p_student - p_teacher||^2`

    A mask has one box of half the area, as in the released code, and mixes what the teacher makes
    of the two source images too; here the other one is the next of the batch. `share` is that of
    the pixels that the teacher is confident of, in the whole batch. Shares and means are over the
    pixels that are not padding (released: over all).

    Attributes:
      weight: of the consistency.
      threshold: probability from which on the teacher counts as confident.
    """

    tasks = ("segmentation",)

    weight: NonNegative = 1.0
    threshold: Share = 0.97

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
        """The class docstring's sum; labeled and mixed images have BatchNorm batches of their
        own.
        """
        del frozen, progress
        labeled_key, mask_key, own_key = jax.random.split(key, 3)
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
        images = {name: batch["unlabeled"][name] for name in ("image", "valid")}
        B, H, W = images["valid"].shape
        mask = mixing.box_mask(mask_key, B, (H, W), boxes=1, area=(0.5, 0.5))
        mixed = {name: mixing.mix(mask, x) for name, x in images.items()}
        student = supervised.forward(nets, params, aux.stats, mixed, own_key)
        teacher = supervised.teacher_forward(self, nets, state, images)
        logits, source = (
            supervised.at_full_size(nets["a"], run.outputs["a"].logits, (H, W))
            for run in (student, teacher)
        )
        taught = mixing.mix(mask, source)  # as the probabilities would be mixed
        distance = losses.squared_distance(logits, taught, valid=mixed["valid"])
        confident = (jax.nn.softmax(taught).max(-1) >= self.threshold) & mixed["valid"]
        sure, all_valid = (jnp.sum(x, dtype=jnp.float32) for x in (confident, mixed["valid"]))
        consistency = sure / jnp.maximum(all_valid, 1) * distance
        metrics = {
            **aux.metrics,
            "loss_consistency": (consistency, jnp.ones(())),
            "confident": (sure, all_valid),
        }
        return loss + self.weight * consistency, Aux(
            student.stats, teacher.stats, aux.extra, metrics
        )
