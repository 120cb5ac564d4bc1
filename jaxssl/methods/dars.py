"""DARS: distribution alignment and random sampling (He et al., Re-distributing Biased Pseudo Labels
for Semi-supervised Semantic Segmentation: A Baseline Investigation, ICCV 2021). One network learns
from the labels, labels the other images so that no class is taught more often than the ground truth
has it, and goes on with both, round by round.

The plain self-training that it is compared with (ST, CBST, DA) is a setting of it. Where the
released code differs from the paper, a field says so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Literal

import jax
import jax.numpy as jnp

from jaxssl import contracts
from jaxssl.contracts import (
    IGNORE_LABEL,
    Aux,
    Batch,
    Bounds,
    Labeling,
    Network,
    NonNegative,
    Params,
    Phase,
    Plan,
    Positive,
    Rule,
    Share,
    Stats,
    Stream,
    UserError,
    Variables,
    Weights,
)
from jaxssl.inference import Presentation, two_thirds
from jaxssl.methods import supervised
from jaxssl.selection import Aligned, TopShare
from jaxssl.state import TrainState

Kind = Literal["dars", "da", "cbst", "st"]
Precision = Literal["float16", "stored"]
Schedule = Literal["restart", "stretched"]
LabelMode = Literal["slide", "whole"]


@dataclasses.dataclass(frozen=True)
class Method(contracts.Method):
    """`L = CE(labels) + CE(pseudo-labels)`, each a mean over its own pixels (eq. 2, as released:
    the paper divides by images).

    `ratios`, `beta_min` and `beta_max` hold a value for each round (section 3.3); without any, what
    remains is the baseline.

    Attributes:
      ratios: alpha, share of the unlabeled pixels that a round labels.
      beta_min: by how much a round lowers the lower bound of the random scale.
      beta_max: by how much it raises the upper one.
      rule: which pseudo-labels are kept. "dars" (Algorithm 1); "da", that without its random
        sampling; "cbst", the surest of each predicted class; "st", the surest of all, by one
        threshold.
      precision: of the confidences that "dars" and "da" compare, "float16" (released) or as
        "stored": see `selection.Aligned`.
      temperature: of the softmax that gives them; 1.27 is that of temperature scaling (TS).
      schedule: of the learning rate. "restart": each round begins at the base rate. "stretched"
        (released): round k goes through the last of k+1 parts of one curve, and momentum goes on.
      label_mode: an image is labeled by windows of the crop's size that overlap by a third, and
        mirrored too ("slide", as released), or as it is ("whole").
      label_scale: factor of the size at which it is shown then.
      auxiliary_weight: weight of an auxiliary head, where the network has one.
    """

    ratios: tuple[Share, ...] = (0.2, 0.5)
    beta_min: tuple[Annotated[float, Bounds(0, 1, without=(1,))], ...] = (0.0, 0.2)
    beta_max: tuple[NonNegative, ...] = (0.0, 0.5)
    rule: Kind = "dars"
    precision: Precision = "float16"
    temperature: Positive = 1.0
    schedule: Schedule = "restart"
    label_mode: LabelMode = "slide"
    label_scale: Positive = 1.0
    auxiliary_weight: NonNegative = 0.4

    def __post_init__(self) -> None:
        super().__post_init__()
        if not len(self.ratios) == len(self.beta_min) == len(self.beta_max):
            raise UserError(
                f"method.ratios={self.ratios}, method.beta_min={self.beta_min} and "
                f"method.beta_max={self.beta_max} differ in length. Give a number for each round."
            )

    @property
    def students(self) -> tuple[str, ...]:
        """The one network."""
        return ("a",)

    def phases(self, plan: Plan) -> tuple[Phase, ...]:
        """Labels alone, then the rounds (steps 1 to 3 of section 3.1)."""
        phases = [self._supervised(plan)]
        for number in range(1, len(self.ratios) + 1):
            phases.append(self._round(plan, number, phases[-1]))
        return tuple(phases)

    def labeling_rule(self, ratio: float) -> Rule:
        """What chooses this share of the pseudo-labels."""
        match self.rule:
            case "dars":
                return Aligned(ratio, precision=self.precision)
            case "da":
                return Aligned(ratio, sample=False, precision=self.precision)
            case "cbst":
                return TopShare(ratio)
            case "st":
                return TopShare(ratio, per_class=False)

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
        del frozen, phase, progress
        labeled_key, pseudo_key = jax.random.split(key)
        loss, stats = self._cross_entropy(nets, params, state.stats, batch["labeled"], labeled_key)
        one = jnp.ones(())
        metrics = {"loss_labeled": (loss, one)}
        if "unlabeled" in batch:
            images = batch["unlabeled"]
            loss_pseudo, stats = self._cross_entropy(nets, params, stats, images, pseudo_key)
            loss += loss_pseudo
            valid = images.get("valid", jnp.ones_like(images["label"], bool))
            kept = _count(images["label"] != IGNORE_LABEL), _count(valid)
            metrics |= {"loss_pseudo": (loss_pseudo, one), "kept": kept}
        return loss, Aux(stats, state.teacher_stats, state.extra, metrics)

    def _supervised(self, plan: Plan) -> Phase:
        """As many labeled images as a round has unlabeled ones, unless the plan says how many
        updates.

        An update takes as many images as a round's in all, or what there is of them.
        """
        batch = plan.joint_batch(plan.sizes["labeled"])
        images = plan.main_steps("unlabeled") * plan.batch["unlabeled"]
        steps = plan.warmup or max(1, round(images / batch))
        return Phase("supervised", steps, self.students, (Stream("labeled", batch),))

    def _round(self, plan: Plan, number: int, before: Phase) -> Phase:
        """Labels by the network that the phase before left, which goes on with them."""
        steps, stretched = plan.main_steps("unlabeled"), self.schedule == "stretched"
        ratio, *betas = (x[number - 1] for x in (self.ratios, self.beta_min, self.beta_max))
        labeling = Labeling(
            Weights(before.name, "a"),
            self.labeling_rule(ratio),
            self._shown(plan),
            temperature=self.temperature,
            seed=plan.seed + number,
            confidence=False,
        )
        augment = {"scale": widened(plan.scale, *betas)}
        return Phase(
            f"round_{number}",
            steps,
            self.students,
            plan.streams(labeling, augment=augment),
            optimizer="continue" if stretched else "fresh",
            schedule=(number * steps, (number + 1) * steps) if stretched else None,
        )

    def _shown(self, plan: Plan) -> Presentation:
        """How an image is shown to the network that labels it."""
        scales = (self.label_scale,)
        if self.label_mode == "whole" or plan.crop is None:
            return Presentation(scales=scales)
        return Presentation("slide", plan.crop, two_thirds(plan.crop), flip=True, scales=scales)

    def _cross_entropy(
        self,
        nets: Mapping[str, Network],
        params: Mapping[str, Params],
        stats: Mapping[str, Stats],
        images: Mapping[str, jax.Array],
        key: jax.Array,
    ) -> tuple[jax.Array, dict[str, Stats]]:
        """Of the images' labels, with the auxiliary head's; and the new running statistics."""
        run = supervised.forward(nets, params, stats, images, key)
        loss = supervised.loss_at_full_size(
            nets["a"], run.outputs["a"], images["label"], auxiliary_weight=self.auxiliary_weight
        )
        return loss, run.stats


def widened(scale: tuple[float, float], beta_min: float, beta_max: float) -> tuple[float, float]:
    """The range of the random scale in a round of stronger augmentation (section 3.3):
    [(1 - beta_min) s_min, (1 + beta_max) s_max].
    """
    low, high = scale
    return (1 - beta_min) * low, (1 + beta_max) * high


def _count(mask: jax.Array) -> jax.Array:
    return jnp.sum(mask, dtype=jnp.float32)
