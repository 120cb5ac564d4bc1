"""DMT: dynamic mutual training (Feng et al., DMT: Dynamic Mutual Training for Semi-Supervised
Learning, Pattern Recognition 2022). Two networks take turns: one labels the unlabeled images, the
other learns from these files and trusts each label as far as it agrees.

Self-training with one network (CBST, DST, online) is a setting of it: the rows of Table 7.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxssl import contracts, losses
from jaxssl.contracts import (
    IGNORE_LABEL,
    Aux,
    Batch,
    Bounds,
    Labeling,
    Metrics,
    Network,
    NonNegative,
    Outputs,
    Params,
    Phase,
    Plan,
    Positive,
    Share,
    Stream,
    Variables,
    Weights,
)
from jaxssl.inference import Presentation, two_thirds
from jaxssl.methods import supervised
from jaxssl.selection import TopShare
from jaxssl.state import TrainState

Labels = Literal["mutual", "own", "online"]
Weight = Literal["dynamic", "naive", "flip", "none"]
Start = Literal["weights", "sampling"]
LabelAt = Literal["crop", "full"]
Gamma = float | jax.Array


@dataclasses.dataclass(frozen=True)
class Method(contracts.Method):
    """`L = (sum of CE over labels + sum of w CE over pseudo-labels) / (number of both)` (eqs. 7, 9
    and 10), where w is `dynamic_weight` and counts in the number even where it is 0.

    First each network learns from the labels alone. Then, round by round, each is labeled for by
    the other one as it was after the round before, and goes on from its own best weights of then
    (Algorithm 2). A round labels more than the last.

    Attributes:
      gamma_1: exponent of the weight where network and pseudo-label agree: 5 on PASCAL VOC, 3 on
        Cityscapes (Table 1).
      gamma_2: where they do not.
      ratios: share of the pixels of each predicted class that a round labels, the surest.
      labels: "mutual": two networks label for each other; "own": one labels for itself (DST, with
        weight "none" CBST); "online": one takes its own prediction of the moment, in one phase of
        as many updates as all rounds have.
      weight: "dynamic" (eq. 6); "naive", `p^gamma_1` whatever the network predicts; "flip", where
        it is surer of another class, that is the target (`flip`); "none", 1.
      threshold: online, what a prediction has to surpass to be a target.
      start: how two networks come to differ. "weights": by what they begin with, two files or
        random numbers. "sampling": by parts of the labeled images (eq. 11), for two that begin with
        one file.
      alpha: size of such a part.
      oracle_epochs: N of appendix B, the epochs that training on the labels of all images would
        have: 30 on VOC, 60 on Cityscapes; see `supervised_epochs`. The plan's `warmup`, if it has
        one, is the number of updates of each supervised phase instead.
      supervised_rate: learning rate while learning from labels alone, 2e-3 on VOC and 4e-3 on
        Cityscapes; None takes the config's.
      label_at: the network labels windows of the "crop"'s size that overlap by a third, or the
        "full" image (released).
      label_scale: factor of the size at which it sees images then: .5 for Cityscapes' halved ones.
      label_flip: whether it sees the mirror image too.
      auxiliary_weight: weight of an auxiliary head, where the network has one.
    """

    gamma_1: NonNegative = 5.0
    gamma_2: NonNegative = 5.0
    ratios: tuple[Share, ...] = (0.2, 0.4, 0.6, 0.8, 1.0)
    labels: Labels = "mutual"
    weight: Weight = "dynamic"
    threshold: Annotated[float, Bounds(0, 1, without=(1,))] = 0.9
    start: Start = "weights"
    alpha: Annotated[float, Bounds(0.5, 1, without=(0.5, 1))] = 0.8
    oracle_epochs: Positive = 30.0
    supervised_rate: Positive | None = None
    label_at: LabelAt = "crop"
    label_scale: Positive = 1.0
    label_flip: bool = False
    auxiliary_weight: NonNegative = 0.4

    @property
    def students(self) -> tuple[str, ...]:
        """Two networks, or one that learns from itself."""
        return ("a", "b") if self.labels == "mutual" else ("a",)

    @property
    def labeler(self) -> str | None:
        """Online the network itself; otherwise files teach, and no network of the moment."""
        return "a" if self.labels == "online" else None

    def phases(self, plan: Plan) -> tuple[Phase, ...]:
        """A supervised phase for each network, then for each round and network one more."""
        newest = {
            name: supervised_phase(
                plan,
                f"supervised_{name}",
                name,
                oracle_epochs=self.oracle_epochs,
                learning_rate=self.supervised_rate,
                part=self._part(name),
                headline=name,
            )
            for name in self.students
        }
        phases = [*newest.values()]
        if self.labels == "online":
            return (*phases, self._online(plan, newest["a"]))
        for number, ratio in enumerate(self.ratios, 1):
            # Algorithm 2: who learns second is labeled for by the first as that was before.
            newest = {
                name: self._round(plan, number, ratio, name, newest)
                for name in reversed(self.students)
            }
            phases += newest.values()
        return tuple(phases)

    def pseudo_labels(
        self,
        logits: jax.Array,
        *,
        valid: jax.Array | None = None,
        progress: jax.Array | float = 1.0,
    ) -> jax.Array:
        """The most probable class; online 255 where it does not surpass the threshold (eq. 2)."""
        del valid, progress
        labels = super().pseudo_labels(logits)
        if self.labels != "online":
            return labels
        confident = jax.nn.softmax(logits).max(-1) > self.threshold
        return jnp.where(confident, labels, IGNORE_LABEL).astype(jnp.uint8)

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
        """Equation 10; labeled and unlabeled images share a BatchNorm batch."""
        del frozen, progress
        (name,) = phase.train
        net, labeled = nets[name], batch["labeled"]
        if "unlabeled" not in batch:
            return supervised.warmup_loss(
                self,
                {name: net},
                params,
                state,
                labeled,
                key,
                auxiliary_weight=self.auxiliary_weight,
            )
        images, n, label = supervised.joined(batch), len(labeled["image"]), labeled["label"]
        outputs, stats = net.apply(
            params[name],
            state.stats[name],
            images["image"],
            valid=images.get("valid"),
            batch_stats=True,
            key=key,
        )
        heads = self._heads(net, outputs, label.shape[1:])
        taught = self._taught(batch["unlabeled"], heads[0].logits[n:])
        known = [_count(x != IGNORE_LABEL) for x in (label, taught.label)]
        shares = [count / jnp.maximum(sum(known), 1) for count in known]
        loss_labeled = shares[0] * _cross_entropy(heads, slice(n), label)
        loss_pseudo = shares[1] * _cross_entropy(
            heads, slice(n, None), taught.label, weights=taught.weight
        )
        one = jnp.ones(())
        metrics = {
            "loss_labeled": (loss_labeled, one),
            "loss_pseudo": (loss_pseudo, one),
            **measured(batch["unlabeled"], taught),
        }
        return loss_labeled + loss_pseudo, Aux({name: stats}, {}, state.extra, metrics)

    def _part(self, name: str) -> tuple[float, float]:
        """The labeled images that a network learns from before the rounds."""
        if self.start == "weights" or len(self.students) == 1:
            return (0.0, 1.0)
        return difference_maximized_parts(self.alpha)[self.students.index(name)]

    def _round(
        self, plan: Plan, number: int, ratio: float, name: str, newest: Mapping[str, Phase]
    ) -> Phase:
        """One network learns from what the other one's newest phase left; alone, its own."""
        other = self.students[self.students.index(name) - 1]
        labeling = Labeling(
            _best(newest[other]), TopShare(ratio), self._shown(plan), seed=plan.seed + number
        )
        return Phase(
            f"round_{number}_{name}",
            plan.main_steps("unlabeled"),
            (name,),
            plan.streams(labeling),
            start={name: _best(newest[name])},
            headline=name,
        )

    def _online(self, plan: Plan, before: Phase) -> Phase:
        """Self-training as it goes: 20 epochs in Table 7, the five rounds' 4 each."""
        return Phase(
            "online_a",
            len(self.ratios) * plan.main_steps("unlabeled"),
            ("a",),
            plan.streams(),
            start={"a": _best(before)},
            headline="a",
        )

    def _shown(self, plan: Plan) -> Presentation:
        """How an image is shown to the network that labels it."""
        scales = (self.label_scale,)
        if self.label_at == "full" or plan.crop is None:
            return Presentation(flip=self.label_flip, scales=scales)
        return Presentation("slide", plan.crop, two_thirds(plan.crop), self.label_flip, scales)

    def _heads(self, net: Network, outputs: Outputs, size: tuple[int, ...]) -> list[Head]:
        """What the loss is taken of, at the size of the labels; `()` for one label an image."""
        heads = [Head(1.0, outputs.logits)]
        if outputs.auxiliary is not None:
            heads.append(Head(self.auxiliary_weight, outputs.auxiliary))
        return [Head(factor, net.resize(x, size) if size else x) for factor, x in heads]

    def _taught(self, images: Mapping[str, jax.Array], logits: jax.Array) -> Taught:
        """What unlabeled images teach the network that has these logits for them."""
        p = jax.nn.softmax(jax.lax.stop_gradient(logits))
        if self.labels == "online":
            label = jnp.where(supervised.valid_of(images), self.pseudo_labels(logits), IGNORE_LABEL)
            confidence = p.max(-1)
        else:
            label, confidence = images["label"], images["confidence"]
        return teach(p, label, confidence, self.gamma_1, self.gamma_2, weight=self.weight)


class Cases(NamedTuple):
    """How a network's prediction compares to a pseudo-label (section 4.1.1), bool `[...]`.

    Attributes:
      agreement: it predicts that class.
      negative: "negative disagreement", it predicts another class and is not surer of it than the
        labeler was of its own.
      positive: "positive disagreement", it is surer.
    """

    agreement: jax.Array
    negative: jax.Array
    positive: jax.Array


class Taught(NamedTuple):
    """What unlabeled images teach.

    Attributes:
      label: uint8 `[...]`, 255 for nothing.
      weight: float32 `[...]`, without meaning where the label is 255.
      cases: see `compare`.
    """

    label: jax.Array
    weight: jax.Array
    cases: Cases


class Head(NamedTuple):
    """Logits `[B,...,C]` at the size of the labels, and the factor of their loss."""

    factor: float
    logits: jax.Array


def compare(p: jax.Array, label: jax.Array, confidence: jax.Array) -> Cases:
    """Which of the three cases of eq. 6 each position is; none where there is no pseudo-label.

    Args:
      p: probabilities of the network that learns, `[...,C]`.
      label: of the one that labeled, uint8 `[...]`, 255 for none.
      confidence: how sure it was, `[...]` in [0,1].
    """
    known, agree, surer = label != IGNORE_LABEL, p.argmax(-1) == label, confidence < p.max(-1)
    return Cases(known & agree, known & ~agree & ~surer, known & ~agree & surer)


def probability(p: jax.Array, label: jax.Array) -> jax.Array:
    """p_B of eq. 6, what `[...,C]` has at each label `[...]`; at 255, 0."""
    known = label != IGNORE_LABEL
    at_label = jnp.take_along_axis(p, jnp.where(known, label, 0)[..., None], -1)[..., 0]
    return jnp.where(known, at_label, 0.0)


def teach(
    p: jax.Array,
    label: jax.Array,
    confidence: jax.Array,
    gamma_1: Gamma,
    gamma_2: Gamma,
    *,
    weight: Weight = "dynamic",
) -> Taught:
    """What pseudo-labels teach a network.

    Args:
      p: as for `dynamic_weight`, like the others.
      label: likewise.
      confidence: likewise.
      gamma_1: likewise.
      gamma_2: likewise.
      weight: as `Method.weight`.
    """
    cases = compare(p, label, confidence)
    match weight:
        case "dynamic":
            found = dynamic_weight(p, label, confidence, gamma_1, gamma_2)
        case "flip":
            label, found = flip(p, label, confidence, gamma_1, gamma_2)
        case "naive":
            found = probability(p, label) ** gamma_1
        case "none":
            found = jnp.ones_like(confidence)
    return Taught(label, found, cases)


def dynamic_weight(
    p: jax.Array, label: jax.Array, confidence: jax.Array, gamma_1: Gamma, gamma_2: Gamma
) -> jax.Array:
    """Equation 6, float `[...]` in [0,1]; 0 where there is no pseudo-label.

    Args:
      p: as for `compare`.
      label: likewise.
      confidence: likewise.
      gamma_1: exponent where network and pseudo-label agree.
      gamma_2: exponent where the network predicts another class, but is not surer of it.
    """
    cases, at_label = compare(p, label, confidence), probability(p, label)
    return jnp.select(
        [cases.agreement, cases.negative], [at_label**gamma_1, at_label**gamma_2], 0.0
    )


def flip(
    p: jax.Array, label: jax.Array, confidence: jax.Array, gamma_1: Gamma, gamma_2: Gamma
) -> tuple[jax.Array, jax.Array]:
    """DMT-Flip (section 5.4): labels and weights where the network's own prediction replaces a
    pseudo-label that it is surer than, with the weight (1 - confidence)^gamma_2.

    Args:
      p: as for `dynamic_weight`.
      label: likewise.
      confidence: likewise.
      gamma_1: likewise.
      gamma_2: likewise; also of the weight of what is flipped.
    """
    flipped = compare(p, label, confidence).positive
    weight = dynamic_weight(p, label, confidence, gamma_1, gamma_2)
    return (
        jnp.where(flipped, p.argmax(-1), label).astype(label.dtype),
        jnp.where(flipped, (1 - confidence) ** gamma_2, weight),
    )


def difference_maximized_parts(alpha: float) -> tuple[tuple[float, float], tuple[float, float]]:
    """Equation 11: what two networks learn from, as (begin, end) of the shuffled labeled images.

    Two parts of size alpha overlap least where one takes the first and the other the last.
    """
    return (0.0, alpha), (1 - alpha, 1.0)


def supervised_epochs(oracle_epochs: float, labeled: int, images: int) -> float:
    """Passes over the labeled images that train a baseline well (appendix B), `N sqrt(1 / r)`.

    Between as many passes as with the labels of all images and as many updates.

    Args:
      oracle_epochs: N, the passes over all images with their labels.
      labeled: how many images have labels; their share is r.
      images: how many there are.
    """
    return oracle_epochs * math.sqrt(images / labeled)


def supervised_phase(
    plan: Plan,
    name: str,
    student: str,
    *,
    oracle_epochs: float,
    learning_rate: float | None = None,
    part: tuple[float, float] = (0.0, 1.0),
    headline: str | None = None,
) -> Phase:
    """Training on labels alone before the rounds, on as many images an update as a round has in
    all, or what there is of them.

    Args:
      plan: of the run; its `warmup`, if there is one, is the number of updates.
      name: of the phase.
      student: that learns.
      oracle_epochs: as for `supervised_epochs`, whose passes it takes without a warm-up.
      learning_rate: as for `Phase`.
      part: of the labeled images, as for `Stream`.
      headline: as for `Phase`.
    """
    labeled, unlabeled = plan.sizes["labeled"], plan.sizes["unlabeled"]
    images = (part[1] - part[0]) * labeled
    batch = plan.joint_batch(round(images))
    epochs = supervised_epochs(oracle_epochs, labeled, labeled + unlabeled)
    return Phase(
        name,
        plan.warmup or max(1, round(epochs * images / batch)),
        (student,),
        (Stream("labeled", batch, part=part),),
        learning_rate=learning_rate,
        headline=headline,
    )


def measured(images: Mapping[str, jax.Array], taught: Taught) -> Metrics:
    """How much is labeled, and of that, the mean weight and the share of each case."""
    label, weight, cases = taught
    known = label != IGNORE_LABEL
    labeled = _count(known)
    shares = {
        "agreement": cases.agreement,
        "negative_disagreement": cases.negative,
        "positive_disagreement": cases.positive,
    }
    return {
        "kept": (labeled, _count(supervised.valid_of(images))),
        "weight": (jnp.where(known, weight, 0).sum(), labeled),
        **{name: (_count(case), labeled) for name, case in shares.items()},
    }


def _best(phase: Phase) -> Weights:
    (name,) = phase.train
    return Weights(phase.name, name, "best")


def _cross_entropy(
    heads: Sequence[Head], rows: slice, label: jax.Array, *, weights: jax.Array | None = None
) -> jax.Array:
    """Over the labels of some of the images, all heads together."""
    terms = (
        factor * losses.cross_entropy(logits[rows], label, weights=weights)
        for factor, logits in heads
    )
    return sum(terms, jnp.zeros(()))


def _count(mask: jax.Array) -> jax.Array:
    return jnp.sum(mask, dtype=jnp.float32)
