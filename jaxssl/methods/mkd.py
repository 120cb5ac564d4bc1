"""MKD: mutual knowledge distillation (Yuan et al., Semi-supervised Semantic Segmentation with
Mutual Knowledge Distillation). Two students, a mean teacher of each, strong images and augmented
features for the students.

Where the released code differs from the paper, a field says so; its first value is the default.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from jaxssl import contracts, losses, mixing, views
from jaxssl.contracts import (
    IGNORE_LABEL,
    Aux,
    Batch,
    Count,
    Network,
    NonNegative,
    Outputs,
    Params,
    Phase,
    Plan,
    Share,
    Stats,
    UserError,
    Variables,
)
from jaxssl.methods import supervised
from jaxssl.state import TEACHER, TrainState


@dataclasses.dataclass(frozen=True)
class Method(contracts.Method):
    """`L = Ls + alpha * Lst + beta * Lss` (eq. 4).

    Ls: each student against the labels (eq. 5). Lst: each student against the other student's
      teacher (eq. 2).
    Lss: each student against the other. The last two on strong unlabeled images.

    Attributes:
      alpha: weight of Lst.
      beta: weight of Lss.
      teacher: a student learns from the "mutual" teacher (the other's), its "own" (mean teacher),
        or "none" (CPS).
      strong: students see strong CutMix views of the unlabeled images; else they see what the
        teachers see.
      feature_augmentation: ISDA's term is added to logits (eq. 3).
      threshold: teacher targets of lower probability are ignored; None keeps all (0.95: the paper's
        starred row).
      consistency_on: Lst and Lss on "unlabeled" images, or on "all" (released).
      augment: logits that ISDA's term is added to: "students" on unlabeled images, or "all"
        (released): theirs on labeled images and the teachers' as well.
      covariance: of a class's features, "diagonal" (released) or "full".
      classifier_gradient: whether ISDA's term has a gradient in the classifier's kernel (eq. 3
        does, released not).
      strength: lambda of eq. 3 at the end of the run.
      ramp: of lambda, from 0: "cosine" or "linear".
      ema_decay_max: gamma of eq. 1, reached in the first updates (released .6).
      consistency_stride: image pixels per pixel of Lst and Lss, 4 or 8 (released).
      weak_photometric: random brightness, contrast, saturation and hue in labeled and weak images
        (released).
      auxiliary_weight: weight of an auxiliary head, where the network has one.
    """

    tasks = ("segmentation",)

    alpha: NonNegative = 1.5
    beta: NonNegative = 1.0
    teacher: Literal["mutual", "own", "none"] = "mutual"
    strong: bool = True
    feature_augmentation: bool = True
    threshold: Share | None = None
    consistency_on: Literal["unlabeled", "all"] = "unlabeled"
    augment: Literal["students", "all"] = "students"
    covariance: Literal["diagonal", "full"] = "diagonal"
    classifier_gradient: bool = False
    strength: NonNegative = 1.5
    ramp: Literal["cosine", "linear"] = "cosine"
    ema_decay_max: Share = 0.4
    consistency_stride: Count = 4
    weak_photometric: bool = False
    auxiliary_weight: NonNegative = 0.4

    @property
    def students(self) -> tuple[str, ...]:
        """Two networks of one architecture that differ in their initialization."""
        return ("a", "b")

    @property
    def teachers(self) -> tuple[str, ...]:
        """The mean of each student, unless students teach each other alone."""
        return () if self.teacher == "none" else self.students

    @property
    def labeler(self) -> str:
        """What teaches student a."""
        return {"mutual": "teacher_b", "own": "teacher_a", "none": "b"}[self.teacher]

    def phases(self, plan: Plan) -> tuple[Phase, ...]:
        """A warm-up, if the plan has one, and the method."""
        return supervised.warmup_and_main(plan, self.students)

    def init_extra(
        self, nets: Mapping[str, Network], params: Mapping[str, Params]
    ) -> dict[str, Any]:
        """Feature statistics per class, for each network whose logits are augmented."""
        if not self.feature_augmentation:
            return {}
        full = self.covariance == "full"
        empty = {
            name: empty_statistics(nets[name].classifier(params[name])[0], full=full)
            for name in nets
        }
        if self.augment == "all":
            empty |= {TEACHER + name: jax.tree.map(jnp.copy, empty[name]) for name in self.teachers}
        return {"features": empty}

    def reduce_extra(
        self, before: Mapping[str, Any], after: Mapping[str, Any], axis_name: str
    ) -> Mapping[str, Any]:
        """Feature statistics of the pixels of all devices, exactly."""
        if not self.feature_augmentation:
            return after
        features = {
            name: merge_devices(statistics, after["features"][name], axis_name)
            for name, statistics in before["features"].items()
        }
        return {"features": features}

    def ema_decay(self, phase: Phase, k: jax.Array) -> jax.Array | float:
        """min(1 - 1/(k+1), gamma), k from 1: the paper updates at the start of a step, we at the
        end of the last.

        While warming up, teachers are copies of the students.
        """
        return (
            0.0
            if phase.name == supervised.WARMUP
            else jnp.minimum(1 - 1 / (k + 2), self.ema_decay_max)
        )

    def pseudo_labels(
        self,
        logits: jax.Array,
        *,
        valid: jax.Array | None = None,
        progress: jax.Array | float = 1.0,
    ) -> jax.Array:
        """The most probable class, 255 where its probability is below the threshold."""
        del valid, progress
        labels = super().pseudo_labels(logits)
        if self.threshold is None:
            return labels
        confident = jax.nn.softmax(logits).max(-1) >= self.threshold
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
        """Equation 4, where `progress` moves lambda."""
        del frozen
        view_key, dropout_key = jax.random.split(key)
        images = self._views(batch, view_key)
        if phase.name == supervised.WARMUP:
            return supervised.warmup_loss(
                self,
                nets,
                params,
                state,
                images.labeled,
                dropout_key,
                auxiliary_weight=self.auxiliary_weight,
            )
        seen, labeled, stats, teacher_stats = self._forward(
            nets, params, state, images, dropout_key
        )
        # The threshold looks at probabilities before augmentation.
        plain = {name: self._on(outputs) for name, outputs in seen.items()}
        extra = state.extra
        if self.feature_augmentation:
            seen, labeled, features = self._augmented(
                nets, params, state, images, seen, labeled, progress
            )
            extra = {**extra, "features": features}
        logits = {name: self._on(outputs) for name, outputs in seen.items()}
        valid = self._valid(images, logits["a"].shape[1:3])
        targets = self._targets(plain, logits, valid, progress)

        other = {"a": "b", "b": "a"}
        teachers = {"mutual": other, "own": {"a": "a", "b": "b"}, "none": {}}[self.teacher]
        loss_s = supervised.total_loss(
            nets, labeled, batch["labeled"]["label"], auxiliary_weight=self.auxiliary_weight
        )
        loss_st = loss_ss = jnp.zeros(())
        for name, teacher in teachers.items():
            loss_st += losses.cross_entropy(logits[name], targets[TEACHER + teacher])
        for name, peer in other.items():
            loss_ss += losses.cross_entropy(logits[name], targets[peer])
        loss = loss_s + self.alpha * loss_st + self.beta * loss_ss
        one = jnp.ones(())
        metrics = {
            "loss_supervised": (loss_s, one),
            "loss_students": (loss_ss, one),
            "kept": (_count(targets[self.labeler] != IGNORE_LABEL), _count(valid)),
        }
        if teachers:
            metrics["loss_teachers"] = (loss_st, one)
        return loss, Aux(stats, teacher_stats, extra, metrics)

    def _views(self, batch: Batch, key: jax.Array) -> Views:
        """Weak and strong images. Without strong views the mask keeps every pixel."""
        labeled_key, weak_key, strong_key, mask_key = jax.random.split(key, 4)

        def weak(images: Mapping[str, jax.Array], key: jax.Array) -> Mapping[str, jax.Array]:
            if not self.weak_photometric:
                return images
            return {**images, "image": views.photometric_distortion(key, images["image"])}

        labeled = weak(batch["labeled"], labeled_key)
        if "unlabeled" not in batch:
            return Views(labeled, {}, {}, None)
        unlabeled = batch["unlabeled"]
        weak_images = weak(unlabeled, weak_key)
        if not self.strong:
            return Views(labeled, weak_images, weak_images, None)
        mask = mixing.box_mask(mask_key, unlabeled["image"].shape[0], unlabeled["image"].shape[1:3])
        strong = {
            "image": views.strong(strong_key, unlabeled["image"], valid=unlabeled["valid"]),
            "valid": unlabeled["valid"],
        }
        return Views(
            labeled, weak_images, jax.tree.map(lambda x: mixing.mix(mask, x), strong), mask
        )

    def _forward(
        self,
        nets: Mapping[str, Network],
        params: Mapping[str, Params],
        state: TrainState,
        images: Views,
        key: jax.Array,
    ) -> tuple[dict[str, Seen], dict[str, Outputs], dict[str, Stats], dict[str, Stats]]:
        """All networks' outputs at the consistency stride, and the students' labeled ones at the
        head's.

        Every network sees labeled and unlabeled images in batches of their own.
        """
        height, width = images.labeled["image"].shape[1:3]
        size = (-(-height // self.consistency_stride), -(-width // self.consistency_stride))
        run = supervised.forward(nets, params, state.stats, images.labeled, key)
        stats, teacher_stats, seen = dict(run.stats), dict(state.teacher_stats), {}
        for i, name in enumerate(self.students):
            outputs, stats[name] = nets[name].apply(
                params[name],
                stats[name],
                images.strong["image"],
                valid=images.strong["valid"],
                batch_stats=True,
                key=jax.random.fold_in(key, len(self.students) + i),
            )
            seen[name] = Seen(*(_resize(nets[name], o, size) for o in (run.outputs[name], outputs)))
        for name in self.teachers:
            passes = []
            for view in (images.labeled, images.weak):
                outputs, teacher_stats[name] = nets[name].apply(
                    state.teacher_params[name],
                    teacher_stats[name],
                    view["image"],
                    valid=view["valid"],
                    batch_stats=self.teacher_stats == "own",
                )
                passes.append(_resize(nets[name], outputs, size))
            # Where nothing reads the labeled pass, the compiler drops it.
            labeled, unlabeled = passes
            if images.mask is not None:
                mask = mixing.resize_nearest(images.mask, size)
                unlabeled = Pixels(*(mixing.mix(mask, x) for x in unlabeled))
            seen[TEACHER + name] = Seen(labeled, unlabeled)
        return seen, dict(run.outputs), stats, teacher_stats

    def _on(self, seen: Seen) -> jax.Array:
        """Logits of the images that Lst and Lss are taken on."""
        if self.consistency_on == "all":
            return jnp.concatenate([seen.labeled.logits, seen.unlabeled.logits])
        return seen.unlabeled.logits

    def _valid(self, images: Views, size: tuple[int, ...]) -> jax.Array:
        """Bool, which pixels of `_on` are not padding."""
        valid = mixing.resize_nearest(images.strong["valid"], size)
        if self.consistency_on == "all":
            labeled = mixing.resize_nearest(images.labeled["valid"], size)
            return jnp.concatenate([labeled, valid])
        return valid

    def _targets(
        self,
        plain: Mapping[str, jax.Array],
        logits: Mapping[str, jax.Array],
        valid: jax.Array,
        progress: jax.Array,
    ) -> dict[str, jax.Array]:
        """What each network teaches: its most probable class; a teacher's only where it is kept."""
        targets = {}
        for name, augmented in logits.items():
            kept = valid
            if name.startswith(TEACHER):
                kept &= self.pseudo_labels(plain[name]) != IGNORE_LABEL
            targets[name] = jnp.where(kept, augmented.argmax(-1), IGNORE_LABEL)
        return targets

    def _augmented(
        self,
        nets: Mapping[str, Network],
        params: Mapping[str, Params],
        state: TrainState,
        images: Views,
        seen: Mapping[str, Seen],
        labeled: Mapping[str, Outputs],
        progress: jax.Array,
    ) -> tuple[dict[str, Seen], dict[str, Outputs], dict[str, FeatureStatistics]]:
        """Outputs with augmented logits, and the feature statistics with this batch's features."""
        seen, labeled, features = dict(seen), dict(labeled), {}
        label = images.labeled["label"]
        valid = mixing.resize_nearest(images.strong["valid"], seen["a"].unlabeled.logits.shape[1:3])
        for name, statistics in state.extra["features"].items():
            student = name in params
            variables = params[name] if student else state.network(name).params
            kernel, _ = nets[name.removeprefix(TEACHER)].classifier(variables)
            features[name] = self._observe(statistics, seen[name], label, valid)
            table = self._table(kernel, features[name], progress)
            from_labeled, from_unlabeled = seen[name]
            if self.augment == "all":
                from_labeled = _augment_labeled(from_labeled, label, table)
                if student:
                    labeled[name] = _augment_labeled(labeled[name], label, table)
            own = from_unlabeled.logits.argmax(-1)
            from_unlabeled = from_unlabeled._replace(
                logits=augment(from_unlabeled.logits, own, table)
            )
            seen[name] = Seen(from_labeled, from_unlabeled)
        return seen, labeled, features

    def _observe(
        self, statistics: FeatureStatistics, seen: Seen, label: jax.Array, valid: jax.Array
    ) -> FeatureStatistics:
        """Adds labeled features at the ground truth and unlabeled ones at the own prediction."""
        truth = mixing.resize_nearest(label, seen.labeled.logits.shape[1:3])
        own = jnp.where(valid, seen.unlabeled.logits.argmax(-1), IGNORE_LABEL)
        for pixels, classes in ((seen.labeled, truth), (seen.unlabeled, own)):
            new = feature_statistics(pixels.features, classes, like=statistics)
            statistics = merge(statistics, new)
        return statistics

    def _table(
        self, kernel: jax.Array, statistics: FeatureStatistics, progress: jax.Array
    ) -> jax.Array:
        rising = {"cosine": lambda t: (1 - jnp.cos(jnp.pi * t)) / 2, "linear": lambda t: t}[
            self.ramp
        ]
        if not self.classifier_gradient:
            kernel = jax.lax.stop_gradient(kernel)
        return isda_table(kernel, statistics, self.strength * rising(progress))


class Views(NamedTuple):
    """One batch as the networks see it: `image` and `valid`, and `label` where labeled.

    `mask` bool `[B,H,W]` is the CutMix mask that `strong` was mixed with.
    """

    labeled: Mapping[str, jax.Array]
    weak: Mapping[str, jax.Array]
    strong: Mapping[str, jax.Array]
    mask: jax.Array | None


class Pixels(NamedTuple):
    """A network's outputs at the consistency stride: logits `[B,h,w,C]`, features `[B,h,w,A]`."""

    logits: jax.Array
    features: jax.Array


class Seen(NamedTuple):
    """What one network computes from labeled and from unlabeled images."""

    labeled: Pixels
    unlabeled: Pixels


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FeatureStatistics:
    """Running moments of the features of each class.

    Attributes:
      count: float32 `[C]`, pixels seen.
      mean: `[C,A]`.
      m2: sum of squared deviations from the mean, `[C,A]`; or of their outer products, `[C,A,A]`.
    """

    count: jax.Array
    mean: jax.Array
    m2: jax.Array


def empty_statistics(kernel: jax.Array, *, full: bool) -> FeatureStatistics:
    """Statistics before any pixel, for a classifier with kernel `[A,C]`."""
    A, C = kernel.shape
    shapes = (C,), (C, A), (C, A, A) if full else (C, A)
    return FeatureStatistics(*(jnp.zeros(shape, kernel.dtype) for shape in shapes))


def feature_statistics(
    features: jax.Array, labels: jax.Array, *, like: FeatureStatistics
) -> FeatureStatistics:
    """Moments of one batch.

    Args:
      features: `[...,A]`; no gradient flows.
      labels: `[...]` class of each feature vector; 255 leaves it out.
      like: whose number of classes, dtype and kind of covariance to take.
    """
    C, A = like.mean.shape
    x = jax.lax.stop_gradient(features).reshape(-1, A).astype(like.mean.dtype)
    member = jax.nn.one_hot(labels.reshape(-1), C, dtype=x.dtype)
    count = member.sum(0)
    mean = member.T @ x / jnp.maximum(count, 1)[:, None]
    if like.m2.ndim == 2:
        deviation = x - member @ mean
        return FeatureStatistics(count, mean, member.T @ deviation**2)

    def outer(of_class: tuple[jax.Array, jax.Array]) -> jax.Array:
        weight, center = of_class
        deviation = x - center
        return deviation.T @ (weight[:, None] * deviation)

    # One class at a time: the products of all classes at once would not fit.
    return FeatureStatistics(count, mean, jax.lax.map(outer, (member.T, mean)))


def merge(a: FeatureStatistics, b: FeatureStatistics) -> FeatureStatistics:
    """Moments of the union of two sets, exactly (Chan et al., 1979)."""
    count = a.count + b.count
    share = b.count / jnp.maximum(count, 1)
    delta = b.mean - a.mean
    between = _spread(a.count * share, delta, full=a.m2.ndim == 3)
    return FeatureStatistics(count, a.mean + share[:, None] * delta, a.m2 + b.m2 + between)


def merge_devices(
    before: FeatureStatistics, after: FeatureStatistics, axis_name: str
) -> FeatureStatistics:
    """Moments of a set and of all that the devices of a `jax.pmap` added to it, exactly.

    Args:
      before: of the set, the same on all devices.
      after: of the set and what this device added.
      axis_name: of the devices.
    """

    def total(after: jax.Array, before: jax.Array) -> jax.Array:
        return before + jax.lax.psum(after - before, axis_name)

    def about(mean: jax.Array, statistics: FeatureStatistics) -> jax.Array:
        away = statistics.mean - mean
        return statistics.m2 + _spread(statistics.count, away, full=before.m2.ndim == 3)

    count = total(after.count, before.count)
    # Deviations from the old mean, to whose sum the set itself adds nothing.
    moved = jax.lax.psum(after.count[:, None] * (after.mean - before.mean), axis_name)
    mean = before.mean + moved / jnp.maximum(count, 1)[:, None]
    return FeatureStatistics(count, mean, total(about(mean, after), about(mean, before)))


def _spread(weight: jax.Array, delta: jax.Array, *, full: bool) -> jax.Array:
    """`weight` `[C]` times the squares of `delta` `[C,A]`, or its outer products `[C,A,A]`."""
    if full:
        return weight[:, None, None] * delta[:, :, None] * delta[:, None, :]
    return weight[:, None] * delta**2


def isda_table(
    kernel: jax.Array, statistics: FeatureStatistics, strength: jax.Array | float
) -> jax.Array:
    """What augmentation adds to logit j of a pixel of class y (eq. 3): it depends on (y, j) alone.

    Args:
      kernel: the classifier's, `[A,C]`.
      statistics: whose covariance is that of the features; no gradient flows into it.
      strength: lambda.

    Returns:
      `[C,C]`, row y, column j: `lambda/2 * (w_j - w_y)^T Sigma_y (w_j - w_y)`.
    """
    w = kernel.T
    v = w[None] - w[:, None]
    count = jnp.maximum(statistics.count, 1)
    if statistics.m2.ndim == 2:
        spread = jnp.einsum("yja,ya->yj", v**2, statistics.m2 / count[:, None])
    else:
        spread = jnp.einsum("yja,yab,yjb->yj", v, statistics.m2 / count[:, None, None], v)
    return strength / 2 * spread


def augment(logits: jax.Array, labels: jax.Array, table: jax.Array) -> jax.Array:
    """Logits `[...,C]` of augmented features, given each pixel's class `[...]`; as they are where
    it is 255.
    """
    known = (labels != IGNORE_LABEL)[..., None]
    return logits + jnp.where(known, table[jnp.where(labels == IGNORE_LABEL, 0, labels)], 0.0)


def _resize(net: Network, outputs: Outputs, size: tuple[int, int]) -> Pixels:
    if outputs.features is None:
        raise UserError("MKD needs a network that returns the input of its classifier.")
    return Pixels(net.resize(outputs.logits, size), net.resize(outputs.features, size))


T = TypeVar("T", Pixels, Outputs)


def _augment_labeled(outputs: T, label: jax.Array, table: jax.Array) -> T:
    truth = mixing.resize_nearest(label, outputs.logits.shape[1:3])
    return outputs._replace(logits=augment(outputs.logits, truth, table))


def _count(mask: jax.Array) -> jax.Array:
    return jnp.sum(mask, dtype=jnp.float32)
