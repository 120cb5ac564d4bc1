"""FixMatch (Sohn et al., FixMatch: Simplifying Semi-Supervised Learning with Consistency and
Confidence, NeurIPS 2020): what a network is sure of in an image, it learns for a strong view of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jaxssl import losses, mixing, views
from jaxssl.contracts import (
    IGNORE_LABEL,
    Aux,
    Batch,
    Network,
    NonNegative,
    Params,
    Phase,
    Share,
    Variables,
)
from jaxssl.methods import supervised
from jaxssl.state import TrainState


@dataclasses.dataclass(frozen=True)
class Method(supervised.TeacherStudent):
    """A network learns from the labels and, on strong views, from its own confident predictions.

    `L = CE(labels) + weight * 1[max p >= threshold] CE(strong, argmax p)`, p of the weak image

    The second mean is over all that could be taught, kept or not, as the paper divides by the batch
    (eq. 4). The strong view is RandAugment without its geometry, then CutOut; the weak one is the
    image as it is. Of segmentation the paper does not speak: where CutOut takes pixels away, they
    are like padding, and nothing is taught.

    Attributes:
      weight: lambda_u.
      threshold: tau, on the probability of the most probable class.
    """

    weight: NonNegative = 1.0
    threshold: Share = 0.95
    ema_decay_max: Share = 0.999

    @property
    def labeler(self) -> str:
        """The network itself; its average is evaluated and teaches nothing."""
        return "a"

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
        """The class docstring's sum; labeled, weak and strong images have BatchNorm batches of
        their own (released: one for all).
        """
        del frozen, progress
        labeled_key, view_key, cutout_key, own_key = jax.random.split(key, 4)
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
        image, valid = batch["unlabeled"]["image"], batch["unlabeled"].get("valid")
        B, H, W = image.shape[:3]
        seen = ~mixing.cutout_mask(cutout_key, B, (H, W))
        seen = seen if valid is None else seen & valid
        strong = {"image": views.rand_augment(view_key, image, valid=valid), "valid": seen}
        weak, stats = nets["a"].apply(
            params["a"], aux.stats["a"], image, valid=valid, batch_stats=True
        )
        student = supervised.forward(nets, params, {"a": stats}, strong, own_key)
        own, logits = (
            supervised.at_full_size(nets["a"], outputs.logits, (H, W))
            for outputs in (jax.lax.stop_gradient(weak), student.outputs["a"])
        )
        taught = own.argmax(-1)
        if taught.ndim > 1:
            taught = jnp.where(seen, taught, IGNORE_LABEL)
        known, kept = taught != IGNORE_LABEL, self.pseudo_labels(own) != IGNORE_LABEL
        consistency = losses.cross_entropy(logits, taught, weights=kept)
        counts = (jnp.sum(x, dtype=jnp.float32) for x in (known & kept, known))
        metrics = {
            **aux.metrics,
            "loss_consistency": (consistency, jnp.ones(())),
            "kept": tuple(counts),
        }
        # The average runs nowhere in training: statistics of its own would be the student's.
        return loss + self.weight * consistency, Aux(
            student.stats, student.stats, aux.extra, metrics
        )
