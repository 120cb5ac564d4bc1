"""DMT for images that have one label as a whole (Algorithm 1 of the paper that `dmt` is about): one
network, trained anew in each round, and more of the images labeled by the one of the round before.

Without the dynamic weight it is Curriculum Labeling (Cascante-Bonilla et al., Curriculum Labeling:
Revisiting Pseudo-Labeling for Semi-Supervised Learning, AAAI 2021).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp

from jaxssl import contracts
from jaxssl.contracts import (
    Aux,
    Batch,
    Labeling,
    Network,
    NonNegative,
    Params,
    Phase,
    Plan,
    Positive,
    Share,
    UserError,
    Variables,
    Weights,
)
from jaxssl.inference import WHOLE
from jaxssl.methods import dmt, supervised
from jaxssl.methods.mean_teacher import sigmoid_ramp
from jaxssl.selection import Aligned, TopShare
from jaxssl.state import TrainState

Rule = Literal["top", "balanced", "aligned"]


@dataclasses.dataclass(frozen=True)
class Method(supervised.TeacherStudent):
    """`L = 1/B sum_i w_i (lambda CE(own label) + (1 - lambda) CE(partner's label))`, of images that
    are mixed with a partner each from the whole batch, labeled and pseudo-labeled ones.

    A weight is lambda times that of the image and 1 - lambda times that of its partner: 1 where the
    label is given, `dmt.dynamic_weight` of the network's view of the image before mixing where it
    is a pseudo-label. That view is a forward pass of the joint batch, without dropout and with
    statistics of the batch, as released; running ones lag behind a network that begins anew.

    Attributes:
      gamma_1: exponent of the weight where network and pseudo-label agree, at the end of `gamma`'s
        ramp.
      gamma_2: where they do not.
      ratios: share of the unlabeled images that a round labels, the surest; it learns from these
        alone, and its updates are as many passes over them as the plan has over all.
      rule: which images these are: the surest of all ("top", the paper), or of each predicted class
        ("balanced"), or as many of each as there are among the labels ("aligned", as DARS does).
        The first pseudo-labels of an unsure network are of its easiest classes: at "top" a network
        that has few updates learns little else.
      weight: as of `dmt.Method`; "none" is Curriculum Labeling, without the second pass.
      mixup: alpha of mixup, 0 for none.
      labeled_by: the "best" weights of the round before or its "last" (released).
      restart: whether a round trains a new network, or goes on with the one that labeled, as DMT
        does for segmentation: at a few thousand updates new ones know less than what teaches them.
      oracle_epochs: as of `dmt.Method`; 300 on CIFAR-10.
      supervised_rate: learning rate while learning from labels alone, .2 on CIFAR-10; None takes
        the config's.
      ema_decay_max: share of its old value that the average of the network keeps, reached within
        the first updates of a round, of which the first leaves nothing of the round before. The
        average is evaluated and labels. .001 is what was released, by mistake.
    """

    tasks = ("classification",)

    gamma_1: NonNegative = 4.0
    gamma_2: NonNegative = 4.0
    ratios: tuple[Share, ...] = (0.2, 0.4, 0.6, 0.8, 1.0)
    rule: Rule = "top"
    weight: dmt.Weight = "dynamic"
    mixup: NonNegative = 0.75
    labeled_by: Literal["best", "last"] = "best"
    restart: bool = True
    oracle_epochs: Positive = 300.0
    supervised_rate: Positive | None = None
    ema_decay_max: Share = 0.999

    @property
    def labeler(self) -> None:
        """None: files teach, and no network of the moment."""

    def phases(self, plan: Plan) -> tuple[Phase, ...]:
        """A supervised phase, then one for each round (Algorithm 1)."""
        phases = [
            dmt.supervised_phase(
                plan,
                "supervised",
                "a",
                oracle_epochs=self.oracle_epochs,
                learning_rate=self.supervised_rate,
            )
        ]
        for number, ratio in enumerate(self.ratios, 1):
            phases.append(self._round(plan, number, ratio, phases[-1]))
        return tuple(phases)

    def labeling_rule(self, ratio: float) -> contracts.Rule:
        """What chooses this share of the pseudo-labels."""
        match self.rule:
            case "top":
                return TopShare(ratio, per_class=False)
            case "balanced":
                return TopShare(ratio)
            case "aligned":
                return Aligned(ratio, precision="stored")

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
        """The class docstring's sum; all images share a BatchNorm batch."""
        del frozen, phase
        mixup_loss = functools.partial(
            supervised.mixup_loss,
            self,
            nets,
            params,
            alpha=self.mixup,
            auxiliary_weight=self.auxiliary_weight,
        )
        if "unlabeled" not in batch:
            return mixup_loss(state, batch["labeled"], key)
        labels, weights, metrics = batch["unlabeled"]["label"], None, {}
        if self.weight != "none":
            taught, state = self._taught(nets["a"], params["a"], state, batch, progress)
            given = jnp.ones(batch["labeled"]["label"].shape)
            labels, weights = taught.label, jnp.concatenate([given, taught.weight])
            metrics = dmt.measured(batch["unlabeled"], taught)
        joint = {
            **supervised.joined(batch),
            "label": jnp.concatenate([batch["labeled"]["label"], labels]),
        }
        loss, aux = mixup_loss(state, joint, key, weights=weights)
        return loss, aux._replace(metrics={"loss_mixed": (loss, jnp.ones(())), **metrics})

    def _round(self, plan: Plan, number: int, ratio: float, before: Phase) -> Phase:
        """A network learns from what that of the last round labeled."""
        kept, batch = math.ceil(ratio * plan.sizes["unlabeled"]), plan.batch["unlabeled"]
        if kept < batch:
            raise UserError(
                f"Round {number} learns from {kept} pseudo-labels, fewer than the {batch} of a "
                "batch. Set --config.batch.unlabeled to that many or fewer, or give "
                "--config.method.ratios a larger share."
            )
        labeling = Labeling(
            Weights(before.name, self.headline, self.labeled_by),
            self.labeling_rule(ratio),
            WHOLE,
            seed=plan.seed + number,
            confidence=self.weight != "none",
        )
        return Phase(
            f"round_{number}",
            max(1, round(ratio * plan.main_steps("unlabeled"))),
            self.students,
            plan.streams(labeling),
            start={} if self.restart else {"a": Weights(before.name, "a", self.labeled_by)},
            reinitialize=self.students if self.restart else (),
        )

    def _taught(
        self, net: Network, params: Params, state: TrainState, batch: Batch, progress: jax.Array
    ) -> tuple[dmt.Taught, TrainState]:
        """What pseudo-labels teach, and the state with the statistics of having looked."""
        images, unlabeled = supervised.joined(batch), batch["unlabeled"]
        outputs, stats = net.apply(params, state.stats["a"], images["image"], batch_stats=True)
        logits = jax.lax.stop_gradient(outputs.logits)[len(batch["labeled"]["image"]) :]
        taught = dmt.teach(
            jax.nn.softmax(logits),
            unlabeled["label"],
            unlabeled["confidence"],
            gamma(progress, self.gamma_1),
            gamma(progress, self.gamma_2),
            weight=self.weight,
        )
        return taught, state.replace(stats={**state.stats, "a": stats})


def gamma(progress: jax.Array | float, most: float) -> jax.Array:
    """`most exp(-5 (1 - progress)^2)` (section 4.2.1, whose print lacks the minus): a network that
    begins anew cannot judge a pseudo-label yet.
    """
    return most * sigmoid_ramp(progress, 1.0)
