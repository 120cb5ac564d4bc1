"""U2PL: using unreliable pseudo-labels (Wang et al., Semi-Supervised Semantic Segmentation Using
Unreliable Pseudo-Labels, CVPR 2022). A mean teacher labels the pixels of which it is sure. Of the
others it is sure at least what they are not: they become negatives of contrastive learning.

Where the released code differs from the paper, a field says so; its first value is the default.
Here N is the number of all pixels of a batch at the stride of the features, labeled images first,
and E the number of channels of the representation.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxssl import losses, memory_bank, mixing, sampling
from jaxssl.contracts import (
    IGNORE_LABEL,
    Aux,
    Batch,
    Bounds,
    Count,
    Metrics,
    Network,
    NonNegative,
    Outputs,
    Params,
    Phase,
    Positive,
    Share,
    Stats,
    UserError,
    Variables,
)
from jaxssl.methods import dmt, rml, supervised
from jaxssl.quantile import percentile
from jaxssl.state import TEACHER, TrainState


@dataclasses.dataclass(frozen=True)
class Method(supervised.TeacherStudent):
    """`L = Ls + lambda_u * Lu + lambda_c * Lc` (eq. 1).

    Ls: cross entropy on labels, eq. 2. Lu: on the teacher's pseudo-labels of mixed images, eq. 3;
      lambda_u is eq. 8. Lc: contrast of representations, eq. 4.

    Attributes:
      lambda_c: weight of Lc, the authors' word in a thread (their configurations say nothing, which
        is 1); 0 leaves out Lc and the memory bank.
      eta: base weight of Lu.
      alpha_0: percent of the unlabeled pixels that are unreliable when the main phase starts.
      dynamic: that share goes to 0 as the phase goes on (eq. 7); else it stays.
      cutmix: probability that a batch of unlabeled images is mixed.
      teacher_forwards: "two" (released): pseudo-labels come from the images as they are, and all
        else from labeled and mixed images together. "one" pass over labeled images and those as
        they are, mixed afterwards, takes a third less.
      anchor_threshold: delta_p of eqs. 9 and 10.
      num_anchors: M of eq. 4, for each class (released: 256).
      num_negatives: N of eq. 4, for each anchor (released: 50).
      temperature: tau of eq. 4.
      positive: of a class, the center of its anchors ("paper", eq. 12), or of all pixels of that
        label, however probable ("released").
      negatives: of a class, as eqs. 13 to 16 say ("intended"), or of those, pixels whose own label
        or pseudo-label is that class ("released"), which leaves none of the labeled.
      negative_pixels: unlabeled pixels that may be negatives: "unreliable" ones, as many of the
        most "reliable", or "all" (Table 4).
      probability_rank: negatives have to keep to the limits of ranks.
      rank_low: r_l of eqs. 14 and 15; shrinks where there are no more classes (`rank_limits`).
      rank_high: r_h of eq. 15.
      contrast_mean: Lc is a mean over "all" classes (eq. 4), or over those "present" among labels
        and pseudo-labels (released).
      memory_bank: negatives are drawn from a bank; else from those of the batch alone.
      capacity: keys that the bank holds of a class.
      capacity_0: of class 0, the background.
      keys: most of a class that enter in a step, or are drawn from without a bank.
      bank_dtype: "float32", or "bfloat16" in half the memory.
      ohem: Ls is taken of hard pixels only; see `losses.ohem_cross_entropy`.
      ohem_threshold: probability of the truth up to which a pixel is hard.
      ohem_min_kept: pixels per image that count at least.
    """

    tasks = ("segmentation",)

    lambda_c: NonNegative = 0.1
    eta: NonNegative = 1.0
    alpha_0: Annotated[float, Bounds(0, 100)] = 20.0
    dynamic: bool = True
    cutmix: Share = 0.5
    teacher_forwards: Literal["two", "one"] = "two"
    anchor_threshold: Share = 0.3
    num_anchors: Count = 50
    num_negatives: Count = 256
    temperature: Positive = 0.5
    positive: Literal["paper", "released"] = "paper"
    negatives: Literal["intended", "released"] = "intended"
    negative_pixels: Literal["unreliable", "reliable", "all"] = "unreliable"
    probability_rank: bool = True
    rank_low: int = 3
    rank_high: int = 20
    contrast_mean: Literal["all", "present"] = "all"
    memory_bank: bool = True
    capacity: Count = 30_000
    capacity_0: Count = 50_000
    keys: Count = 512
    bank_dtype: Literal["float32", "bfloat16"] = "float32"
    ohem: bool = False
    ohem_threshold: Positive = 0.7
    ohem_min_kept: Annotated[int, Bounds(0)] = 50_000

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.rank_low < self.rank_high:
            raise UserError(
                f"method.rank_low={self.rank_low} and method.rank_high={self.rank_high} leave no "
                "ranks. Give 1 or more, and a larger number."
            )
        if self.keys >= min(self.capacity, self.capacity_0):
            raise UserError(
                f"method.keys={self.keys} of a step would fill the bank of method.capacity="
                f"{self.capacity}, method.capacity_0={self.capacity_0}. Give fewer keys."
            )

    def notes(self, num_classes: int) -> tuple[str, ...]:
        """That there are fewer classes than the ranks were chosen for."""
        low, _ = rank_limits(self.rank_low, self.rank_high, num_classes)
        if low == self.rank_low or not (self.lambda_c and self.probability_rank):
            return ()
        return (
            f"Of {num_classes} classes none ranks {self.rank_low} or lower: negatives of unlabeled "
            f"pixels rank from {low} on, as with --config.method.rank_low={low}.",
        )

    def init_extra(
        self, nets: Mapping[str, Network], params: Mapping[str, Params]
    ) -> dict[str, Any]:
        """The empty memory bank."""
        del params
        if not self.lambda_c:
            return {}
        outputs = supervised.output_shapes(nets["a"])
        if outputs.embedding is None:
            raise UserError(
                "U2PL needs a network with a representation head: set --config.model.embedding=256."
            )
        if not self.memory_bank:
            return {}
        C, E = outputs.logits.shape[-1], outputs.embedding.shape[-1]
        lengths = (self.capacity_0,) + (self.capacity,) * (C - 1)
        return {"bank": memory_bank.empty(lengths, E, self.bank_dtype)}

    def reduce_extra(
        self, before: Mapping[str, Any], after: Mapping[str, Any], axis_name: str
    ) -> Mapping[str, Any]:
        """The bank with the keys of all devices."""
        if not before:
            return after
        banks = before["bank"], after["bank"]
        return {"bank": memory_bank.push_of_devices(*banks, self.keys, axis_name)}

    def alpha(self, progress: jax.Array | float) -> jax.Array | float:
        """Percent of the pixels that are unreliable: eq. 7, or alpha_0."""
        return self.alpha_0 * (1 - progress) if self.dynamic else self.alpha_0

    def pseudo_labels(
        self,
        logits: jax.Array,
        *,
        valid: jax.Array | None = None,
        progress: jax.Array | float = 1.0,
    ) -> jax.Array:
        """The most probable class, 255 where these logits are less sure than most (eq. 6)."""
        labels, entropies = super().pseudo_labels(logits), entropy(logits)
        gamma = percentile(entropies, 100 - self.alpha(progress), valid=valid)
        return reliable(labels, entropies, gamma)

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
        """Equation 1; labeled and mixed images share a BatchNorm batch."""
        del frozen
        net, labeled = nets["a"], batch["labeled"]
        if phase.name == supervised.WARMUP:
            return supervised.warmup_loss(
                self,
                nets,
                params,
                state,
                labeled,
                key,
                auxiliary_weight=self.auxiliary_weight,
                criterion=self._criterion,
            )
        mask_key, dropout_key, contrast_key = jax.random.split(key, 3)
        weak = {name: batch["unlabeled"][name] for name in ("image", "valid")}
        mask = self._mask(mask_key, weak["valid"].shape)
        mixed = {name: mixing.mix(mask, x) for name, x in weak.items()}
        images = supervised.joined({"labeled": labeled, "unlabeled": mixed})
        teacher, n = state.network(TEACHER + "a"), len(labeled["image"])
        seen = jax.lax.stop_gradient(self._seen(net, teacher, batch, images, mask))
        alpha, valid = self.alpha(progress), mixed["valid"]
        gamma = percentile(seen.entropies, 100 - alpha, valid=valid)
        known = jnp.where(valid, seen.pseudo, IGNORE_LABEL)
        targets = reliable(known, seen.entropies, gamma)

        student = Variables(params["a"], state.stats["a"])
        outputs, stats = _apply(net, student, images, batch_stats=True, key=dropout_key)
        loss_s = supervised.loss_at_full_size(
            net,
            jax.tree.map(lambda x: x[:n], outputs),
            labeled["label"],
            auxiliary_weight=self.auxiliary_weight,
            criterion=self._criterion,
        )
        loss_u = losses.cross_entropy(net.resize(outputs.logits[n:], valid.shape[1:]), targets)
        lambda_u, one = unsupervised_weight(targets, valid, self.eta), jnp.ones(())
        loss = loss_s + lambda_u * loss_u
        metrics: Metrics = {
            "loss_supervised": (loss_s, one),
            "loss_unsupervised": (loss_u, one),
            "weight_unsupervised": (lambda_u, one),
            "kept": (_count(targets != IGNORE_LABEL), _count(valid)),
        }
        extra = state.extra
        if self.lambda_c:
            maybe = self._maybe_negative(seen.entropies, valid, gamma, alpha)
            pixels = _pixels(seen.outputs, labeled["label"], known, targets, maybe)
            loss_c, extra, more = self.contrast(outputs, pixels, extra, contrast_key)
            loss += self.lambda_c * loss_c
            metrics = {**metrics, "loss_contrast": (loss_c, one), **more}
        return loss, Aux({"a": stats}, {"a": seen.stats}, extra, metrics)

    def contrast(
        self, student: Outputs, pixels: Pixels, extra: Mapping[str, Any], key: jax.Array
    ) -> tuple[jax.Array, Mapping[str, Any], Metrics]:
        """Lc, `extra` with this step's negatives in the bank, and metrics (Algorithm 1).

        Args:
          student: outputs for labeled and mixed images.
          pixels: the same pixels, and what the teacher makes of them.
          extra: with the bank as it was.
          key: randomness.
        """
        assert student.embedding is not None
        C, E = pixels.p.shape[-1], pixels.z.shape[-1]
        draw_key, negatives_key = jax.random.split(key)
        anchors = anchor_classes(pixels.p, pixels.label, self.anchor_threshold)
        drawn = self._drawn(pixels, anchors, draw_key)
        keys, metrics = pixels.z[drawn.negatives], {}
        pool = memory_bank.of(keys, drawn.num_negatives)
        if self.memory_bank:
            pool = memory_bank.push(extra["bank"], keys, drawn.num_negatives)
            extra = {**extra, "bank": pool}
            metrics["bank"] = _count(pool.fill), _count(pool.length)
        averaged = anchors if self.positive == "paper" else pixels.label
        positives, _ = rml.class_means(pixels.z, averaged, C)  # eq. 12

        @jax.checkpoint
        def term(of_class: tuple[jax.Array, ...]) -> jax.Array:
            c, z, positive = of_class
            key, shape = jax.random.fold_in(negatives_key, c), (len(z), self.num_negatives)
            return info_nce(z, positive, memory_bank.draw(pool, c, key, shape), self.temperature)

        z = student.embedding.reshape(-1, E)[drawn.anchors]
        terms = jax.lax.map(term, (jnp.arange(C), z, positives))
        total = jnp.where((drawn.num_anchors > 0) & (pool.fill > 0), terms, 0).sum()
        divisor = C if self.contrast_mean == "all" else jnp.maximum(drawn.present.sum(), 1)
        metrics["anchors"] = _count(anchors != IGNORE_LABEL), _count(pixels.label != IGNORE_LABEL)
        return total / divisor, extra, metrics

    @property
    def _criterion(self) -> supervised.Criterion:
        if not self.ohem:
            return losses.cross_entropy
        return functools.partial(
            losses.ohem_cross_entropy, threshold=self.ohem_threshold, min_kept=self.ohem_min_kept
        )

    def _mask(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """CutMix's, or True everywhere: one coin for the batch, as released."""
        coin_key, box_key = jax.random.split(key)
        box = mixing.box_mask(box_key, shape[0], shape[1:], boxes=1, area=(0.5, 0.5))
        return box | ~jax.random.bernoulli(coin_key, self.cutmix)

    def _seen(
        self,
        net: Network,
        teacher: Variables,
        batch: Batch,
        images: Mapping[str, jax.Array],
        mask: jax.Array,
    ) -> Seen:
        """The teacher's forward passes, without dropout; `images` are labeled and mixed ones."""
        size, n, own = mask.shape[1:], len(batch["labeled"]["image"]), self.teacher_stats == "own"
        if self.teacher_forwards == "two":
            first, _ = _apply(net, teacher, batch["unlabeled"], batch_stats=False)
            source = net.resize(first.logits, size)
            outputs, stats = _apply(net, teacher, images, batch_stats=own)
            logits = net.resize(outputs.logits[n:], size)
        else:
            outputs, stats = _apply(net, teacher, supervised.joined(batch), batch_stats=own)
            source = net.resize(outputs.logits[n:], size)
            logits = mixing.mix(mask, source)
            outputs = jax.tree.map(functools.partial(_mixed_behind, mask, n), outputs)
        pseudo = mixing.mix(mask, source.argmax(-1).astype(jnp.uint8))
        return Seen(pseudo, entropy(logits), outputs, stats)

    def _maybe_negative(
        self, entropies: jax.Array, valid: jax.Array, gamma: jax.Array, alpha: jax.Array | float
    ) -> jax.Array:
        """Bool `[B,H,W]`, which mixed pixels may be negatives: Table 4."""
        match self.negative_pixels:
            case "unreliable":
                return valid & (entropies >= gamma)
            case "reliable":
                return valid & (entropies <= percentile(entropies, alpha, valid=valid))
            case "all":
                return valid

    def _drawn(self, pixels: Pixels, anchors: jax.Array, key: jax.Array) -> Drawn:
        """Anchors and negatives of each class."""
        C = pixels.p.shape[-1]
        order = class_order(pixels.p)
        limits = rank_limits(self.rank_low, self.rank_high, C) if self.probability_rank else None

        def draw(c: jax.Array) -> Drawn:
            anchor_key, negative_key = jax.random.split(jax.random.fold_in(key, c))
            negative = is_negative(c, pixels.known, order[:, c], pixels.labeled, limits)
            negative &= pixels.maybe_negative
            if self.negatives == "released":
                negative &= pixels.known == c
            return Drawn(
                *sampling.draw(anchor_key, anchors == c, self.num_anchors, replace=True),
                *sampling.draw(negative_key, negative, self.keys, replace=False),
                (pixels.label == c).any(),
            )

        # One class at a time: the masks of all would be large.
        return jax.lax.map(draw, jnp.arange(C))


class Seen(NamedTuple):
    """What the teacher makes of a batch.

    Attributes:
      pseudo: uint8 `[B,H,W]`, the most probable class of each mixed pixel.
      entropies: `[B,H,W]`, likewise.
      outputs: of labeled and mixed images, at the stride of the features.
      stats: new running statistics.
    """

    pseudo: jax.Array
    entropies: jax.Array
    outputs: Outputs
    stats: Stats


class Pixels(NamedTuple):
    """What contrast looks at: labeled and mixed pixels at the stride of the features.

    Attributes:
      z: the teacher's representation, `[N,E]`.
      p: the teacher's probabilities, `[N,C]`.
      label: ground truth or kept pseudo-label, uint8 `[N]`.
      known: ground truth or pseudo-label, kept or not.
      maybe_negative: bool `[N]`, whether it has a label, or its entropy is right.
      labeled: bool `[N]`, whether the image is.
    """

    z: jax.Array
    p: jax.Array
    label: jax.Array
    known: jax.Array
    maybe_negative: jax.Array
    labeled: jax.Array


class Drawn(NamedTuple):
    """Pixels drawn for each class, as positions among all N.

    Attributes:
      anchors: int32 `[C,M]`, with replacement.
      num_anchors: int32 `[C]`, M, or 0 where there is none.
      negatives: int32 `[C,K]`, all different.
      num_negatives: int32 `[C]`, K, or as many as there are.
      present: bool `[C]`, whether any pixel has that label.
    """

    anchors: jax.Array
    num_anchors: jax.Array
    negatives: jax.Array
    num_negatives: jax.Array
    present: jax.Array


def entropy(logits: jax.Array) -> jax.Array:
    """Equation 5: that of the softmax of `[...,C]`, in nats."""
    return jax.scipy.special.entr(jax.nn.softmax(logits)).sum(-1)


def reliable(labels: jax.Array, entropies: jax.Array, gamma: jax.Array) -> jax.Array:
    """Equation 6: labels `[...]` of entropy below gamma, 255 elsewhere."""
    return jnp.where(entropies < gamma, labels, IGNORE_LABEL).astype(labels.dtype)


def unsupervised_weight(labels: jax.Array, valid: jax.Array, eta: float) -> jax.Array:
    """Equation 8: eta over the share of the pixels that have a label; 0 if none has.

    Of all pixels, B H W there, padding is none: on PASCAL VOC, where it is a third of the crops,
    the weight would be half as large again.

    Args:
      labels: uint8 `[B,H,W]`.
      valid: bool, likewise, False in padding.
      eta: base weight.
    """
    kept = _count(labels != IGNORE_LABEL)
    return jnp.where(kept > 0, eta * _count(valid) / jnp.maximum(kept, 1), 0)


def anchor_classes(p: jax.Array, labels: jax.Array, threshold: float) -> jax.Array:
    """Equations 9 to 11: the class whose anchor a pixel may be, uint8 `[N]`, 255 for none.

    Args:
      p: the teacher's probabilities, `[N,C]`.
      labels: uint8 `[N]`, ground truth or kept pseudo-label.
      threshold: delta_p, which the probability of that class has to surpass.
    """
    return jnp.where(dmt.probability(p, labels) > threshold, labels, IGNORE_LABEL)


def class_order(p: jax.Array) -> jax.Array:
    """O of section 3.3: the rank of each class among `[N,C]`, uint8, 0 for the most probable.

    By counting, a small part of the time of a sort; of equals the lower class comes first.
    """
    this, other = p[..., :, None], p[..., None, :]
    earlier = np.tri(p.shape[-1], k=-1, dtype=bool)
    return ((other > this) | ((other == this) & earlier)).sum(-1, dtype=jnp.uint8)


def rank_limits(low: int, high: int, num_classes: int) -> tuple[int, int]:
    """r_l and r_h; where no class would rank as low as r_l, it is half of their number."""
    return (low if low < num_classes else num_classes // 2), high


def is_negative(
    c: jax.Array | int,
    labels: jax.Array,
    rank: jax.Array,
    labeled: jax.Array,
    limits: tuple[int, int] | None,
) -> jax.Array:
    """Equations 13 to 15 but for entropy: whether pixels qualify as negatives of class c.

    Args:
      c: the class.
      labels: the ground truth of the labeled pixels, `[N]`.
      rank: the class's among the teacher's probabilities, `[N]`.
      labeled: bool `[N]`.
      limits: r_l and r_h; None: of any rank.

    Returns:
      bool `[N]`.
    """
    other = labels != c
    if limits is None:
        return other | ~labeled
    low, high = limits
    rank = rank.astype(jnp.int32)  # bytes would wrap a limit of 256 around
    return jnp.where(labeled, other & (rank < low), (low <= rank) & (rank < high))


def info_nce(
    anchors: jax.Array, positive: jax.Array, negatives: jax.Array, temperature: float
) -> jax.Array:
    """Equation 4 of one class: the mean over anchors, float scalar.

    Args:
      anchors: `[M,E]`.
      positive: `[E]`; no gradient flows.
      negatives: `[M,N,E]`, of each anchor; likewise.
      temperature: tau.
    """
    positive, negatives = jax.lax.stop_gradient((_unit(positive), _unit(negatives)))
    z = _unit(anchors)
    logits = jnp.concatenate([z @ positive[:, None], jnp.einsum("me,mne->mn", z, negatives)], 1)
    logits /= temperature
    return (jax.nn.logsumexp(logits, 1) - logits[:, 0]).mean()


def _pixels(
    teacher: Outputs,
    truth: jax.Array,
    known: jax.Array,
    targets: jax.Array,
    maybe_negative: jax.Array,
) -> Pixels:
    """All pixels of a batch, labels and masks at the nearest.

    Args:
      teacher: outputs of labeled and mixed images.
      truth: uint8 `[B,H,W]` of the labeled ones.
      known: pseudo-labels of the mixed ones, likewise.
      targets: those that are kept.
      maybe_negative: bool, likewise.
    """
    z = teacher.embedding
    assert z is not None

    def small(labeled: jax.Array, mixed: jax.Array) -> jax.Array:
        return mixing.resize_nearest(jnp.concatenate([labeled, mixed]), z.shape[1:3]).ravel()

    return Pixels(
        z=z.reshape(-1, z.shape[-1]),
        p=jax.nn.softmax(teacher.logits).reshape(-1, teacher.logits.shape[-1]),
        label=small(truth, targets),
        known=small(truth, known),
        maybe_negative=small(truth != IGNORE_LABEL, maybe_negative),
        labeled=small(jnp.ones_like(truth, bool), jnp.zeros_like(known, bool)),
    )


def _apply(
    net: Network,
    variables: Variables,
    images: Mapping[str, jax.Array],
    *,
    batch_stats: bool,
    key: jax.Array | None = None,
) -> tuple[Outputs, Stats]:
    image, valid = images["image"], images["valid"]
    return net.apply(*variables, image, valid=valid, batch_stats=batch_stats, key=key)


def _mixed_behind(mask: jax.Array, first: int, x: jax.Array) -> jax.Array:
    """`[B,h,w,D]` with all but the first images mixed, by the pixels nearest to the mask's."""
    small = mixing.resize_nearest(mask, x.shape[1:3])
    return jnp.concatenate([x[:first], mixing.mix(small, x[first:])])


def _unit(x: jax.Array) -> jax.Array:
    """At length 1; what is 0 stays 0, with a gradient of 0."""
    return x / jnp.sqrt(jnp.maximum((x * x).sum(-1, keepdims=True), 1e-16))


def _count(x: jax.Array | np.ndarray) -> jax.Array:
    return jnp.sum(x, dtype=jnp.float32)
