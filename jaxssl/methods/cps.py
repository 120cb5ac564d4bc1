"""CPS: two students teach each other (Chen et al., Semi-Supervised Semantic Segmentation with Cross
Pseudo Supervision, CVPR 2021); the co-training baseline of MKD.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jaxssl import contracts, losses, mixing
from jaxssl.contracts import (
    IGNORE_LABEL,
    Aux,
    Batch,
    Network,
    NonNegative,
    Params,
    Phase,
    Plan,
    Variables,
)
from jaxssl.methods import supervised
from jaxssl.state import TrainState


@dataclasses.dataclass(frozen=True)
class Method(contracts.Method):
    """Each student learns from the labels and from the other student's predictions.

    `L = CE(a) + CE(b) + weight * (CE(a, argmax b) + CE(b, argmax a))`

    Attributes:
      weight: of the cross supervision.
      cutmix: students see CutMix images, and the pseudo-labels are those of the two source images,
        mixed alike; else both see the images as they are, labeled ones too.
      auxiliary_weight: weight of an auxiliary head, where the network has one.
    """

    tasks = ("segmentation",)

    weight: NonNegative = 1.0
    cutmix: bool = True
    auxiliary_weight: NonNegative = 0.4

    @property
    def students(self) -> tuple[str, ...]:
        """Two networks that differ in their initialization."""
        return ("a", "b")

    @property
    def labeler(self) -> str:
        """Student b teaches the headline, student a."""
        return "b"

    def phases(self, plan: Plan) -> tuple[Phase, ...]:
        """A warm-up, if the plan has one, and the method."""
        return supervised.warmup_and_main(plan, self.students)

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
        """The class docstring's sum."""
        del frozen, progress
        labeled_key, mask_key, source_key, cross_key = jax.random.split(key, 4)
        weight = self.auxiliary_weight
        if phase.name == supervised.WARMUP:
            return supervised.warmup_loss(
                self, nets, params, state, batch["labeled"], labeled_key, auxiliary_weight=weight
            )
        run = supervised.forward(nets, params, state.stats, batch["labeled"], labeled_key)
        sup = supervised.total_loss(
            nets, run.outputs, batch["labeled"]["label"], auxiliary_weight=weight
        )
        image, valid = batch["unlabeled"]["image"], batch["unlabeled"]["valid"]
        # Published CPS fills the boxes from the other image; the complement of MKD's mask.
        mask = ~mixing.box_mask(mask_key, image.shape[0], image.shape[1:3])
        stats, logits, targets = dict(run.stats), {}, {}

        def predict(name: str, image: jax.Array, valid: jax.Array, key: jax.Array) -> jax.Array:
            outputs, stats[name] = nets[name].apply(
                params[name], stats[name], image, valid=valid, batch_stats=True, key=key
            )
            return nets[name].resize(outputs.logits, image.shape[1:3])

        for i, name in enumerate(self.students):
            key = jax.random.fold_in(cross_key, i)
            if self.cutmix:
                source = predict(name, image, valid, jax.random.fold_in(source_key, i))
                target = mixing.mix(mask, jax.lax.stop_gradient(source))
                logits[name] = predict(name, mixing.mix(mask, image), mixing.mix(mask, valid), key)
                seen = mixing.mix(mask, valid)
            else:
                own = nets[name].resize(run.outputs[name].logits, image.shape[1:3])
                logits[name] = jnp.concatenate([own, predict(name, image, valid, key)])
                target = logits[name]
                seen = jnp.concatenate([batch["labeled"]["valid"], valid])
            targets[name] = jnp.where(seen, self.pseudo_labels(target), IGNORE_LABEL)

        cross = losses.cross_entropy(logits["a"], targets["b"]) + losses.cross_entropy(
            logits["b"], targets["a"]
        )
        one = jnp.ones(())
        metrics = {"loss_supervised": (sup, one), "loss_students": (cross, one)}
        return sup + self.weight * cross, Aux(stats, state.teacher_stats, state.extra, metrics)
