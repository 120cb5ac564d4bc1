"""DML: deep mutual learning (Zhang et al., CVPR 2018), the direct one of RML's paper: two students
imitate each other's probabilities on the same images.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jaxssl import contracts, losses
from jaxssl.contracts import Aux, Batch, Network, NonNegative, Params, Phase, Plan, Variables
from jaxssl.methods import supervised
from jaxssl.state import TrainState


@dataclasses.dataclass(frozen=True)
class Method(contracts.Method):
    """Each student learns from the labels and from the other student's probabilities.

    `L = CE(a) + CE(b) + weight * (KL(p_b || p_a) + KL(p_a || p_b))`

    Of each divergence, only the second one learns. Both see all images as they are and imitate each
    other on labeled ones too, as in the paper's semi-supervised setting. They are updated at the
    same time (the paper: in turns).

    Attributes:
      weight: of the imitation.
      auxiliary_weight: weight of an auxiliary head, where the network has one.
    """

    weight: NonNegative = 1.0
    auxiliary_weight: NonNegative = 0.4

    @property
    def students(self) -> tuple[str, ...]:
        """Two networks that differ in their initialization, and may in their architecture."""
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
        """The class docstring's sum; labeled and unlabeled images have BatchNorm batches of their
        own.
        """
        del frozen, progress
        labeled_key, unlabeled_key = jax.random.split(key)
        if phase.name == supervised.WARMUP:
            return supervised.warmup_loss(
                self,
                nets,
                params,
                state,
                batch["labeled"],
                labeled_key,
                auxiliary_weight=self.auxiliary_weight,
            )
        labeled, unlabeled = batch["labeled"], batch["unlabeled"]
        first = supervised.forward(nets, params, state.stats, labeled, labeled_key)
        second = supervised.forward(nets, params, first.stats, unlabeled, unlabeled_key)
        size = labeled["image"].shape[1:3]
        logits = {
            name: supervised.at_full_size(
                nets[name],
                jnp.concatenate([run.outputs[name].logits for run in (first, second)]),
                size,
            )
            for name in self.students
        }
        valid = None
        if "valid" in labeled:
            valid = jnp.concatenate([labeled["valid"], unlabeled["valid"]])
        imitation = losses.kl_divergence(logits["a"], logits["b"], valid=valid)
        imitation += losses.kl_divergence(logits["b"], logits["a"], valid=valid)
        loss = supervised.total_loss(
            nets, first.outputs, labeled["label"], auxiliary_weight=self.auxiliary_weight
        )
        one = jnp.ones(())
        metrics = {"loss_supervised": (loss, one), "loss_students": (imitation, one)}
        return loss + self.weight * imitation, Aux(
            second.stats, state.teacher_stats, state.extra, metrics
        )
