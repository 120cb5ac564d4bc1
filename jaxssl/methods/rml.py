"""RML: robust mutual learning (Zhang et al., Robust Mutual Learning for Semi-supervised Semantic
Segmentation, 2021). Two students learn from the mean teachers of both. Before a teacher teaches, it
rectifies its labels by how near the features of a pixel are to each class's mean, its prototype.

Its code was not released. What the paper leaves open follows ProDA (Zhang et al., CVPR 2021), of
which the rectification is.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxssl import contracts, inference, losses, metrics, mixing, views
from jaxssl.contracts import (
    IGNORE_LABEL,
    Aux,
    Batch,
    Bounds,
    Network,
    NonNegative,
    Outputs,
    Params,
    Phase,
    Plan,
    Positive,
    Share,
    Stats,
    UserError,
    Variables,
    Weights,
)
from jaxssl.methods import supervised
from jaxssl.state import TEACHER, TrainState

STAGE = "stage_"
"""Prefix of the stages' names."""

Images: TypeAlias = Mapping[str, jax.Array]
"""One stream of a batch."""


@dataclasses.dataclass(frozen=True)
class Method(contracts.Method):
    """`L = Ls + weight * Lu`: the students' cross entropies with the labels (eq. 1), and with the
    hard labels that teachers give to unlabeled images (eq. 5).

    Labels alone come first; without them p0 and prototypes would be noise. Then come stages, and
    each begins with new p0 and prototypes. Students may be of any two architectures.

    Attributes:
      supervision: a student learns from "both" teachers (eq. 5), from the other student's, its
        "peer" (eqs. 3 and 4), or, "direct", from the other student itself, and there are no
        teachers (eq. 3).
      rectification: of the labels (eqs. 6, 9, 10 and 11); else each is what a teacher predicts at
        the moment.
      p0: the probabilities that are rectified, those of the teacher as it was when the "stage"
        began (eq. 6), or as it is ("online").
      stages: how many there are. 0 leaves the baseline: labels alone, for as long as a stage takes
        after a warm-up, if the plan has one.
      momentum: lambda of eq. 11.
      model_noise: students have dropout and stochastic depth, as strong as their networks say.
      input_noise: each student sees the unlabeled images through its own `views.rand_augment`, then
        both through the same CutMix, a box of half the area; the labels are mixed alike.
      weight: of Lu.
      ema_decay_max: share of its old value that a teacher keeps, reached within the first updates.
      prototype_scale: factor of the size at which images are shown when prototypes are first made:
        that at which training sees them.
      auxiliary_weight: weight of an auxiliary head, where the network has one, on labeled images.
    """

    supervision: Literal["both", "peer", "direct"] = "both"
    rectification: bool = True
    p0: Literal["stage", "online"] = "stage"
    stages: Annotated[int, Bounds(0)] = 2
    momentum: Share = 0.9999
    model_noise: bool = True
    input_noise: bool = True
    weight: NonNegative = 1.0
    ema_decay_max: Share = 0.999
    prototype_scale: Positive = 1.0
    auxiliary_weight: NonNegative = 0.4
    teacher_stats: Literal["copy", "ema", "own"] = dataclasses.field(default="copy", kw_only=True)

    @property
    def students(self) -> tuple[str, ...]:
        """Two networks that differ in their initialization, or in their architecture."""
        return ("a", "b")

    @property
    def teachers(self) -> tuple[str, ...]:
        """The mean of each student, unless students teach each other themselves."""
        return () if self.supervision == "direct" else self.students

    @property
    def headline(self) -> str:
        """Teacher a, or student a where there are no teachers."""
        return self._labeler_of("a")

    @property
    def labeler(self) -> str:
        """What teaches student a, alone or with its own teacher."""
        return self._labeler_of("b")

    def phases(self, plan: Plan) -> tuple[Phase, ...]:
        """Labels alone, for a fifth of a stage unless the plan says how long, then the stages."""
        steps = plan.main_steps("unlabeled")
        before = plan.warmup or max(1, steps // 5)
        warmup = before if self.stages else plan.warmup + steps
        phases = [*supervised.warmup_phase(dataclasses.replace(plan, warmup=warmup), self.students)]
        for number in range(1, self.stages + 1):
            phases.append(self._stage(plan, number, phases[-1]))
        return tuple(phases)

    def init_extra(
        self, nets: Mapping[str, Network], params: Mapping[str, Params]
    ) -> dict[str, Any]:
        """Prototypes by student, `[C,D]`, zero until the first stage makes them."""
        del params
        if not self.rectification:
            return {}
        return {"prototypes": {name: _no_prototypes(nets[name]) for name in self.students}}

    def reduce_extra(
        self, before: Mapping[str, Any], after: Mapping[str, Any], axis_name: str
    ) -> Mapping[str, Any]:
        """The mean over the devices that have a prototype of a class."""
        del before

        def reduced(prototypes: jax.Array) -> jax.Array:
            devices = jax.lax.psum(made(prototypes).astype(prototypes.dtype), axis_name)
            return jax.lax.psum(prototypes, axis_name) / jnp.maximum(devices, 1)[:, None]

        return jax.tree.map(reduced, dict(after))

    def ema_decay(self, phase: Phase, k: jax.Array) -> jax.Array | float:
        """See `supervised.ema_decay`; k is 0 when the first stage begins, and goes on counting in
        the later ones.
        """
        if phase.name == supervised.WARMUP:
            return 0.0
        before = (int(phase.name.removeprefix(STAGE)) - 1) * phase.steps
        return supervised.ema_decay(phase, before + k, self.ema_decay_max)

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
        own, and teachers running statistics, unless theirs are their own.
        """
        del progress
        labeled_key, view_key, noise_key = jax.random.split(key, 3)
        loss_s, aux = supervised.warmup_loss(
            self,
            nets,
            params,
            state,
            batch["labeled"],
            labeled_key if self.model_noise else None,
            auxiliary_weight=self.auxiliary_weight,
        )
        if phase.name == supervised.WARMUP:
            return loss_s, aux
        weak = {k: x for k, x in batch["unlabeled"].items() if k in ("image", "valid")}
        taught = self._teach(nets, state, frozen, weak)
        strong, labels = self._strong(weak, taught.labels, view_key)
        stats, loss_u = {}, jnp.zeros(())
        for i, (name, net) in enumerate(nets.items()):
            noise = jax.random.fold_in(noise_key, i) if self.model_noise else None
            variables = Variables(params[name], aux.stats[name])
            outputs, stats[name] = _see(net, variables, strong[name], batch_stats=True, key=noise)
            logits = supervised.at_full_size(net, outputs.logits, labels[name].shape[1:])
            for teacher in self._teachers_of(name):
                loss_u += losses.cross_entropy(logits, labels[teacher])
        measured = {**aux.metrics, **taught.metrics, "loss_unsupervised": (loss_u, jnp.ones(()))}
        extra = {"prototypes": taught.prototypes} if self.rectification else {}
        return loss_s + self.weight * loss_u, Aux(stats, taught.stats, extra, measured)

    def _labeler_of(self, student: str) -> str:
        """The network whose labels student's name stands for, wherever labels are by student."""
        return TEACHER + student if self.teachers else student

    def _teachers_of(self, student: str) -> tuple[str, ...]:
        """Whose labels a student learns from."""
        if self.supervision == "both":
            return self.students
        return tuple(name for name in self.students if name != student)

    def _stage(self, plan: Plan, number: int, before: Phase) -> Phase:
        """Begins with what the labelers have become, as p0 and for the prototypes."""
        labelers = {name: Weights(before.name, self._labeler_of(name)) for name in self.students}
        sets = ("labeled", "unlabeled") if self.rectification else ()
        return Phase(
            f"{STAGE}{number}",
            plan.main_steps("unlabeled"),
            self.students,
            plan.streams(),
            frozen=labelers if self.rectification and self.p0 == "stage" else {},
            sweeps=tuple(Prototypes(name, labelers, self.prototype_scale) for name in sets),
        )

    def _strong(
        self, weak: Images, labels: Mapping[str, jax.Array], key: jax.Array
    ) -> tuple[dict[str, Images], Mapping[str, jax.Array]]:
        """What each student sees, and the labels of that."""
        if not self.input_noise:
            return dict.fromkeys(self.students, weak), labels
        valid, mask_key, *keys = weak.get("valid"), *jax.random.split(key, 3)
        seen: dict[str, Images] = {
            name: {**weak, "image": views.rand_augment(k, weak["image"], valid=valid)}
            for name, k in zip(self.students, keys, strict=True)
        }
        if valid is None:  # one label an image cannot be cut
            return seen, labels
        images, *size = valid.shape
        mask = mixing.box_mask(mask_key, images, tuple(size), boxes=1, area=(0.5, 0.5))
        return jax.tree.map(functools.partial(mixing.mix, mask), (seen, labels))

    def _teach(
        self,
        nets: Mapping[str, Network],
        state: TrainState,
        frozen: Mapping[str, Variables],
        weak: Images,
    ) -> Taught:
        """Labels of weak images, and the prototypes with their features."""
        valid, own = supervised.valid_of(weak), bool(self.teachers) and self.teacher_stats == "own"
        size, taught, predicted = valid.shape[1:], Taught({}, {}, {}, {}), {}
        for name, net in nets.items():
            variables = state.network(self._labeler_of(name))
            outputs, stats = _see(net, variables, weak, batch_stats=own)
            target = predicted[name] = supervised.at_full_size(net, outputs.logits, size)
            if self.rectification:
                first = outputs.logits
                if self.p0 == "stage":
                    first = _see(net, frozen[name], weak)[0].logits
                features, of_class = _features(outputs), _predicted(outputs.logits, valid)
                old = state.extra["prototypes"][name]
                new = moved(old, *class_means(features, of_class, len(old)), self.momentum)
                p = rectified(first, distances(features, new))
                target = supervised.at_full_size(net, p, size)
                taught.prototypes[name] = new
                before, after = _predicted(first, valid), _predicted(p, valid)
                taught.metrics[f"rectified_{name}"] = _share(after != before, after != IGNORE_LABEL)
                step = jnp.linalg.norm(new - old, axis=-1)
                taught.metrics[f"prototype_step_{name}"] = step.sum(), made(new).sum()
            taught.labels[name] = jnp.where(valid, self.pseudo_labels(target), IGNORE_LABEL)
            if name in self.teachers:
                taught.stats[name] = stats
        distance = metrics.total_variation(*predicted.values())
        taught.metrics["coupling"] = jnp.where(valid, distance, 0).sum(), valid.sum()
        taught.metrics["kept"] = _share(taught.labels["b"] != IGNORE_LABEL, valid)
        return taught


class Taught(NamedTuple):
    """What the labelers make of a batch, by the student's name.

    Attributes:
      labels: uint8 `[B,H,W]`, 255 in padding.
      prototypes: after this batch; none without rectification.
      stats: running statistics of the teachers.
      metrics: what to log.
    """

    labels: dict[str, jax.Array]
    prototypes: dict[str, jax.Array]
    stats: dict[str, Stats]
    metrics: dict[str, tuple[jax.Array, jax.Array]]


@dataclasses.dataclass(frozen=True)
class Prototypes:
    """A pass over one image set that makes prototypes, together with the sets before it (eq. 10):
    the mean over all images of the mean feature that a class has in an image.

    A class is where the network itself predicts it. An image without it does not count, where the
    equation divides by all images; nor do the other pixels of one that has it.

    Attributes:
      source: which images; also the name of the pass.
      networks: labelers, by the student's name.
      scale: factor of the size at which images are shown.
    """

    source: str
    networks: Mapping[str, Weights]
    scale: float = 1.0

    @property
    def name(self) -> str:
        """That of the image set."""
        return self.source

    def update(
        self,
        nets: Mapping[str, Network],
        networks: Mapping[str, Variables],
        extra: Mapping[str, Any],
        batch: Images,
    ) -> dict[str, Any]:
        """By name, the sum of the images' means `[C,D]` and the images that have a class `[C]`."""
        rows, whole = batch["index"] >= 0, batch["valid"].ndim == 1
        valid = jnp.ones(batch["image"].shape[:3], bool) if whole else batch["valid"]
        image, valid = inference.rescaled(batch["image"], valid, self.scale)
        valid &= rows[:, None, None]
        sums = {}
        for name, variables in networks.items():
            outputs, _ = _see(nets[name], variables, {"image": image, "valid": valid})
            of_image = functools.partial(class_means, num_classes=outputs.logits.shape[-1])
            of_class = _predicted(outputs.logits, rows if whole else valid)
            sums[name] = [x.sum(0) for x in jax.vmap(of_image)(_features(outputs), of_class)]
        return sums

    def finish(self, sums: Mapping[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
        """The prototypes; zero for a class that is predicted nowhere."""
        prototypes = {}
        for name, old in extra["prototypes"].items():
            means, images = (sum(one[name][i] for one in sums.values()) for i in (0, 1))
            prototypes[name] = jnp.asarray(means / np.maximum(images, 1)[:, None], old.dtype)
        return {**extra, "prototypes": prototypes}


def class_means(
    features: jax.Array, labels: jax.Array, num_classes: int
) -> tuple[jax.Array, jax.Array]:
    """The mean feature of each class, eta' of eq. 11, `[C,D]`, and which classes there are, bool
    `[C]`; the mean of one that there is not is 0.

    Args:
      features: `[...,D]`.
      labels: `[...]`, below C or 255.
      num_classes: C.
    """
    x = features.reshape(-1, features.shape[-1])
    member = jax.nn.one_hot(labels.reshape(-1), num_classes, dtype=x.dtype)
    count = member.sum(0)
    total = jnp.matmul(member.T, x, precision="highest")
    return total / jnp.maximum(count, 1)[:, None], count > 0


def made(prototypes: jax.Array) -> jax.Array:
    """Which classes have a prototype in `[C,D]`, bool `[C]`; those of the others are zero."""
    return (prototypes != 0).any(-1)


def moved(
    prototypes: jax.Array, means: jax.Array, present: jax.Array, momentum: float
) -> jax.Array:
    """Equation 11: `lambda * eta + (1 - lambda) * eta'`. A class that is absent keeps its
    prototype; one that has none yet takes the mean as it is, of which the paper says nothing.

    Args:
      prototypes: eta, `[C,D]`.
      means: eta', `[C,D]`.
      present: bool `[C]`.
      momentum: lambda.
    """
    average = momentum * prototypes + (1 - momentum) * means
    new = jnp.where(made(prototypes)[:, None], average, means)
    return jnp.where(present[:, None], new, prototypes)


def distances(features: jax.Array, prototypes: jax.Array) -> jax.Array:
    """Euclidean distances of features `[...,D]` to prototypes `[C,D]`: `[...,C]`, infinite to a
    class without one, and all 0 where no class has one.

    As `|f|^2 - 2 f eta + |eta|^2`, since the differences `[...,C,D]` would not fit. All is seen
    from the middle of the prototypes: far from it, squares would be large and differ by little.
    """
    exists = made(prototypes)
    middle = prototypes.sum(0) / jnp.maximum(exists.sum(), 1)
    f, eta = features - middle, prototypes - middle
    products = jnp.matmul(f, eta.T, precision="highest")
    squares = jnp.square(f).sum(-1, keepdims=True) - 2 * products + jnp.square(eta).sum(-1)
    nowhere = jnp.where(exists.any(), jnp.inf, 0.0)
    return jnp.where(exists, jnp.sqrt(jnp.maximum(squares, 0)), nowhere)


def rectified(logits: jax.Array, distance: jax.Array) -> jax.Array:
    """Equations 6 and 9: `omega * p0`, normalized, where `omega = softmax(-distance)` and `p0 =
    softmax(logits)`. A product of exponentials is the exponential of a sum, so one softmax does.

    Args:
      logits: `[...,C]`.
      distance: to the prototypes, `[...,C]`.
    """
    return jax.nn.softmax(logits - distance)


def _no_prototypes(net: Network) -> jax.Array:
    """Zeros `[C,D]` for a network."""
    outputs = supervised.output_shapes(net)
    features = _features(outputs)
    return jnp.zeros((outputs.logits.shape[-1], features.shape[-1]), features.dtype)


def _see(
    net: Network,
    variables: Variables,
    images: Images,
    *,
    batch_stats: bool = False,
    key: jax.Array | None = None,
) -> tuple[Outputs, Stats]:
    image, valid = images["image"], images.get("valid")
    return net.apply(*variables, image, valid=valid, batch_stats=batch_stats, key=key)


def _features(outputs: Outputs) -> jax.Array:
    if outputs.features is None:
        raise UserError("RML needs a network that returns the input of its classifier.")
    return outputs.features


def _predicted(logits: jax.Array, valid: jax.Array) -> jax.Array:
    """The most probable class at the resolution of logits `[B,h,w,C]`, or `[B,C]`; 255 where the
    images are padding.
    """
    size = logits.shape[1:-1]
    seen = mixing.resize_nearest(valid, size) if size else valid
    return jnp.where(seen, logits.argmax(-1), IGNORE_LABEL)


def _share(part: jax.Array, whole: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.sum(part & whole, dtype=jnp.float32), jnp.sum(whole, dtype=jnp.float32)
