"""How an image is shown to a network: whole or by windows, mirrored too, at several scales.

What is averaged over windows, mirror images and scales is logits, as the released code of U2PL
(windows) and DARS (windows and mirror images, when it labels) does; so what comes out are logits
again, to be thresholded or calibrated like those of a single pass.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jaxssl.contracts import Network, UserError, Variables

Mode = Literal["whole", "slide", "center_crop", "half_res"]
Predict = Callable[[Variables, jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Presentation:
    """What a network sees of an image; `str` says it in a few words.

    Attributes:
      mode: "whole"; "slide", overlapping windows; "center_crop", of which the central window is
        all that is scored; "half_res", shown and scored at half the size.
      window: (height, width) of a window ("slide", "center_crop").
      stride: (height, width) from one window to the next ("slide").
      flip: whether the mirror image is shown too.
      scales: factors of the size at which the image is shown.

    Raises:
      UserError: an unknown mode, or numbers that fit none.
    """

    mode: Mode = "whole"
    window: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    flip: bool = False
    scales: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise UserError(
                f"Unknown eval.mode {self.mode!r}. There are: {', '.join(get_args(Mode))}."
            )
        # In any mode: a run may be evaluated by windows later.
        windows = self.window or self.mode in ("slide", "center_crop")
        if windows and not _is_size(self.window):
            raise UserError(
                f"eval.window={self.window} is no size. Give height and width: 769,769."
            )
        if self.mode == "slide" and not (
            _is_size(self.stride) and all(map(operator.le, self.stride, self.window))
        ):
            raise UserError(
                f"eval.stride={self.stride} is no step between windows of {_words(self.window)}. "
                "Give height and width, at most those of the window."
            )
        if not self.scales or min(self.scales) <= 0:
            raise UserError(f"eval.scales={self.scales} holds no factors. Give 0.75,1.0,1.25, say.")

    @classmethod
    def of(cls, config: Mapping[str, Any], crop: Sequence[int]) -> Presentation:
        """What a config's `eval` section says.

        Args:
          config: `mode`, `flip`, `scales`, `window`, where empty the crop, and `stride`, where
            empty two thirds of the window, rounded up.
          crop: (height, width) of training images.
        """
        window = tuple(config["window"] or crop)
        stride = tuple(config["stride"] or two_thirds(window))
        return cls(config["mode"], window, stride, config["flip"], tuple(config["scales"]))

    @property
    def center(self) -> tuple[int, int] | None:
        """(height, width) of the central window that alone is scored, where one is."""
        if self.mode != "center_crop":
            return None
        height, width = self.window
        return height, width

    @property
    def uncropped(self) -> Presentation:
        """The same of whole images: that only a center counts is of interest to scores alone."""
        return dataclasses.replace(self, mode="whole") if self.mode == "center_crop" else self

    def __str__(self) -> str:
        """Such as "slide 769x769 stride 513x513, flip", height before width."""
        words = {
            "slide": f"slide {_words(self.window)} stride {_words(self.stride)}",
            "center_crop": f"center_crop {_words(self.window)}",
        }.get(self.mode, self.mode)
        words += ", flip" if self.flip else ""
        shown = " ".join(f"{scale:g}" for scale in self.scales)
        return words if self.scales == (1.0,) else f"{words}, scales {shown}"


def two_thirds(window: Sequence[int]) -> tuple[int, ...]:
    """The step between windows that overlap by a third, rounded up."""
    return tuple(-(-2 * side // 3) for side in window)


WHOLE = Presentation()
"""The image as it is, once."""


def make_predict(net: Network, how: Presentation = WHOLE) -> Predict:
    """Makes `predict(variables, image, valid) -> logits`, pure and at the size of the image.

    `image` is uint8 or float `[B,H,W,3]` in [0,255], `valid` bool `[B,H,W]`, logits are float32
    `[B,H,W,C]`. Where a network classifies whole images, logits are `[B,C]`, and `valid` is `[B]`:
    no image is padded. In the mode "center_crop" the whole image is shown, in the mode "half_res"
    logits are enlarged. Windows, mirror images and scales follow one another, so memory does not
    grow with their number.
    """
    predict: Predict = functools.partial(_forward, net)
    if how.mode == "slide":
        predict = _over_windows(predict, how.window, how.stride)
    if how.flip:
        predict = _with_mirror_image(predict)
    if how.scales != (1.0,):
        predict = _over_scales(predict, how.scales)
    if how.mode == "half_res":
        predict = _over_scales(predict, (0.5,))

    def show(variables: Variables, image: jax.Array, valid: jax.Array) -> jax.Array:
        if valid.ndim == 1:
            valid = jnp.ones(image.shape[:3], bool)
        return predict(variables, image, valid)

    return show


def halve(batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """A batch at half its size, as it is scored in the mode "half_res".

    Images are resized bilinearly and antialiased, labels take the nearest pixel: what training does
    at scale 0.5, and DMT's released code to all images of Cityscapes.

    Args:
      batch: `image` `[B,H,W,3]`, `valid` and `label` `[B,H,W]`; the rest stays.
    """
    image, valid = rescaled(batch["image"], batch["valid"], 0.5)
    rows, columns = (
        (2 * np.arange(new) + 1) * old // (2 * new)
        for old, new in zip(batch["label"].shape[1:], image.shape[1:3], strict=True)
    )
    label = batch["label"][:, rows][:, :, columns]
    return {**batch, "image": image, "valid": valid, "label": label}


def rescaled(image: jax.Array, valid: jax.Array, factor: float) -> tuple[jax.Array, jax.Array]:
    """Images `[B,H,W,3]` and `valid` `[B,H,W]` at `factor` of their size; no color of the padding
    gets into the image.
    """
    size = _scaled(image.shape[1:3], factor)
    if image.shape[1:3] == size:
        return image, valid
    weight = valid[..., None].astype(jnp.float32)
    share = _bilinear(weight, size)
    colors = _bilinear(image * weight, size) / jnp.maximum(share, 1e-6)
    return colors, share[..., 0] >= 0.5


def _forward(net: Network, variables: Variables, image: jax.Array, valid: jax.Array) -> jax.Array:
    outputs, _ = net.apply(*variables, image, valid=valid, batch_stats=False)
    logits = outputs.logits
    return net.resize(logits, image.shape[1:3]) if logits.ndim > 2 else logits


def _over_windows(predict: Predict, window: Sequence[int], stride: Sequence[int]) -> Predict:
    """Averages where windows overlap; one that the image does not fill is cut to the image."""

    def slide(variables: Variables, image: jax.Array, valid: jax.Array) -> jax.Array:
        size = image.shape[1:3]
        height, width = (min(*sides) for sides in zip(window, size, strict=True))
        tops, lefts = _starts(size[0], height, stride[0]), _starts(size[1], width, stride[1])

        def show(start: jax.Array) -> jax.Array:
            top, left = start
            cut = functools.partial(_cut, top=top, left=left, size=(height, width))
            return predict(variables, cut(image), cut(valid))

        def add(total: jax.Array, start: jax.Array) -> tuple[jax.Array, None]:
            top, left = start
            logits = show(start) + _cut(total, top, left, (height, width))
            return jax.lax.dynamic_update_slice(total, logits, (0, top, left, 0)), None

        starts = jnp.asarray([*itertools.product(tops, lefts)], jnp.int32)
        like = jax.eval_shape(show, starts[0])
        zeros = jnp.zeros((like.shape[0], *size, like.shape[-1]), like.dtype)
        total, _ = jax.lax.scan(add, zeros, starts)
        times = np.outer(_covered(tops, height, size[0]), _covered(lefts, width, size[1]))
        return total / jnp.asarray(times[..., None], total.dtype)

    return slide


def _with_mirror_image(predict: Predict) -> Predict:
    def both(variables: Variables, image: jax.Array, valid: jax.Array) -> jax.Array:
        # One after the other in a loop: compiles once, and takes the memory of one.
        pairs = jax.tree.map(lambda x: jnp.stack([x, x[:, :, ::-1]]), (image, valid))
        plain, mirrored = jax.lax.map(lambda pair: predict(variables, *pair), pairs)
        return (plain + (mirrored[:, :, ::-1] if mirrored.ndim > 2 else mirrored)) / 2

    return both


def _over_scales(predict: Predict, scales: Sequence[float]) -> Predict:
    def mean(variables: Variables, image: jax.Array, valid: jax.Array) -> jax.Array:
        size = image.shape[1:3]
        shown = (predict(variables, *rescaled(image, valid, scale)) for scale in scales)
        logits = (_bilinear(x, size) if x.ndim > 2 else x for x in shown)
        return functools.reduce(jnp.add, logits) / len(scales)

    return mean


def _bilinear(x: jax.Array, size: tuple[int, ...]) -> jax.Array:
    """Resizes `[B,h,w,C]`, antialiased where it shrinks."""
    return jax.image.resize(x, (x.shape[0], *size, x.shape[-1]), "linear")


def _scaled(size: Sequence[int], factor: float) -> tuple[int, int]:
    height, width = (max(1, round(factor * side)) for side in size)
    return height, width


def _starts(size: int, window: int, stride: int) -> list[int]:
    """Where windows begin along an axis; the last one ends with the image."""
    count = -(-(size - window) // stride) + 1
    return [min(i * stride, size - window) for i in range(count)]


def _covered(starts: Sequence[int], window: int, size: int) -> np.ndarray:
    """How many windows each of `size` pixels lies in."""
    pixel = np.arange(size)
    return np.sum([(start <= pixel) & (pixel < start + window) for start in starts], axis=0)


def _cut(x: jax.Array, top: jax.Array, left: jax.Array, size: tuple[int, int]) -> jax.Array:
    """A window of `[B,H,W,...]`."""
    rows = jax.lax.dynamic_slice_in_dim(x, top, size[0], axis=1)
    return jax.lax.dynamic_slice_in_dim(rows, left, size[1], axis=2)


def _is_size(size: Sequence[int]) -> bool:
    return len(size) == 2 and min(size) > 0


def _words(size: Sequence[int]) -> str:
    return "x".join(map(str, size))
