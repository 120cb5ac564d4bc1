"""Between linen modules and the library: preprocessing, precision, parameters as trees."""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Collection, Mapping
from typing import Any, ClassVar, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxssl.contracts import Outputs, Params, Stats, Task, UserError, Variables
from jaxssl.models import layers

Color: TypeAlias = tuple[float, float, float]

PREPROCESSING: Mapping[str, tuple[Color, Color]] = {
    "imagenet": ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
    "caffe": ((122.675, 116.669, 104.008), (1.0, 1.0, 1.0)),
    "inception": ((127.5, 127.5, 127.5), (127.5, 127.5, 127.5)),
    "cifar10": ((125.3, 123.0, 113.9), (63.0, 62.1, 66.7)),
    "mnist": ((33.33, 33.33, 33.33), (78.57, 78.57, 78.57)),
}
"""Name -> (mean, std) in [0,255], red first: of torchvision's weights; of DeepLab's in Caffe; of
ViT's, from -1 to 1, as Inception's were and timm calls them; of CIFAR-10's training images, as in
DMT's code; and of MNIST's.

Caffe's see blue first; `pretrained.load` turns them around.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinenNetwork(abc.ABC):
    """A `contracts.Network` made of linen modules; a file in this folder gives its `module`.

    Attributes:
      num_classes: C, channels of the logits.
      dropout: probability that a channel of a classifier's input is dropped.
      align_corners: convention of every bilinear resizing.
      batch_norm_momentum: share of the batch in new running statistics, as in PyTorch.
      dtype: of activations: "float32", "bfloat16" or "float64". Parameters, statistics and logits
        are float64 with the last, else float32.
      axis_name: of a `jax.pmap` over whose devices BatchNorm takes its statistics.
      preprocessing: the colors that become 0 and 1, a name in `PREPROCESSING`. A backbone that
        comes with its own has those.
    """

    task: ClassVar[Task] = "segmentation"

    num_classes: int
    dropout: float = 0.0
    align_corners: bool = False
    batch_norm_momentum: float = 0.1
    dtype: str = "float32"
    axis_name: str | None = None
    preprocessing: str = "imagenet"

    def __post_init__(self) -> None:
        check_rate("dropout", self.dropout)
        check_choice("preprocessing", self.preprocessing, PREPROCESSING)
        check_choice("dtype", self.dtype, ("float32", "bfloat16", "float64"))
        if self.dtype == "float64" and jax.dtypes.canonicalize_dtype(np.float64) != np.float64:
            raise UserError('model.dtype "float64" needs JAX_ENABLE_X64=1 in the environment.')

    @abc.abstractmethod
    def module(self, *, batch_stats: bool) -> nn.Module:
        """The linen module in one of its two modes: normalized `[B,H,W,3]` -> `Outputs`.

        The last 1x1 convolution, where there is one, is the parameter "head/classifier".
        """

    def norm(self, batch_stats: bool) -> layers.NormDef:
        """What makes the normalization layers of `module`."""
        return functools.partial(
            layers.BatchNorm,
            batch_stats=batch_stats,
            momentum=self.batch_norm_momentum,
            axis_name=self.axis_name,
        )

    def init(self, key: jax.Array, size: tuple[int, int]) -> Variables:
        """Draws parameters for images of `size` (height, width)."""
        return _draw(self, key, tuple(size))

    def apply(
        self,
        params: Params,
        stats: Stats,
        image: jax.Array,
        *,
        valid: jax.Array | None = None,
        batch_stats: bool,
        key: jax.Array | None = None,
    ) -> tuple[Outputs, Stats]:
        """Runs the network as `contracts.Network.apply` says."""
        outputs, updated = self.module(batch_stats=batch_stats).apply(
            {"params": params, "batch_stats": stats},
            *self.inputs(image, valid),
            rngs=None if key is None else {"dropout": key},
            mutable=["batch_stats"] if batch_stats else [],
        )
        return outputs, updated.get("batch_stats", stats)

    def inputs(self, image: jax.Array, valid: jax.Array | None) -> tuple[Any, ...]:
        """What `module` is called with: the normalized image, mean color where not `valid`."""
        mean, std = (jnp.asarray(value, self.param_dtype) for value in (self.mean, self.std))
        x = (image.astype(self.param_dtype) - mean) / std
        if valid is not None:
            x = jnp.where(valid[..., None], x, 0)
        return (x.astype(self.dtype),)

    def classifier(self, params: Params) -> tuple[jax.Array, jax.Array]:
        """The last 1x1 convolution, as kernel `[D,C]` and bias `[C]`; UserError without one."""
        try:
            last = params["head"]["classifier"]
        except KeyError:
            raise UserError(
                f"The head of {type(self).__module__} does not end in one 1x1 convolution, which "
                "the method needs. Choose another model.name."
            ) from None
        return last["kernel"][0, 0], last["bias"]

    def resize(self, logits: jax.Array, size: tuple[int, ...]) -> jax.Array:
        """Bilinear `[B,h,w,C]` -> `[B,*size,C]`."""
        return layers.resize_bilinear(logits, size, align_corners=self.align_corners)

    @property
    def mean(self) -> Color:
        """The color that becomes 0, per channel, in [0,255]."""
        return PREPROCESSING[self.preprocessing][0]

    @property
    def std(self) -> Color:
        """The distance from `mean` that becomes 1, likewise."""
        return PREPROCESSING[self.preprocessing][1]

    @property
    def param_dtype(self) -> jnp.dtype:
        """Of parameters, statistics and logits."""
        return jnp.promote_types(self.dtype, jnp.float32)


@functools.partial(jax.jit, static_argnums=(0, 2))
def _draw(network: LinenNetwork, key: jax.Array, size: tuple[int, int]) -> Variables:
    image = jnp.zeros((1, *size, 3), network.dtype)
    variables = network.module(batch_stats=True).init(key, image)
    params = _randomized(key, variables["params"])
    # linen makes float32 statistics; they must have the dtype that they have after a step.
    cast = functools.partial(jax.tree.map, lambda x: x.astype(network.param_dtype))
    return Variables(cast(params), cast(variables.get("batch_stats", {})))


def _randomized(key: jax.Array, params: Params) -> Params:
    """Multiplies what holds its standard deviation by normal numbers.

    One draw serves all: a generator per layer would take ten times as long to compile.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    sizes = [leaf.size for path, leaf in leaves if _is_drawn(path)]
    normal = iter(jnp.split(jax.random.normal(key, (sum(sizes),)), np.cumsum(sizes)[:-1]))
    return jax.tree_util.tree_map_with_path(
        lambda path, x: x * next(normal).reshape(x.shape) if _is_drawn(path) else x, params
    )


def _is_drawn(path: tuple[Any, ...]) -> bool:
    return path[-1].key in ("kernel", "positions", "tokens")


class EncoderDecoder(nn.Module):
    """A backbone and what reads its stages.

    Attributes:
      backbone: `[B,H,W,3]` -> outputs of its stages.
      head: outputs of the stages -> `Outputs` without auxiliary logits.
      auxiliary: output of the last stage but one -> `Outputs`, whose logits count; None where not
        needed.
    """

    backbone: nn.Module
    head: nn.Module
    auxiliary: nn.Module | None = None

    def __call__(self, x: jax.Array) -> Outputs:
        """Runs all parts."""
        stages = self.backbone(x)
        outputs = self.head(stages)
        if self.auxiliary is None:
            return outputs
        return outputs._replace(auxiliary=self.auxiliary(stages[-2]).logits)


def check(field: str, value: object, good: bool, wanted: str) -> None:
    """Refuses the value of a config's field that is not `good`."""
    if not good:
        raise UserError(f"model.{field} is {value!r}; it must be {wanted}.")


def check_choice(field: str, value: object, choices: Collection[object]) -> None:
    """Refuses the value of a config's field that is not among `choices`."""
    check(field, value, value in choices, f"one of {', '.join(map(repr, choices))}")


def check_rate(field: str, value: float) -> None:
    """Refuses the value of a config's field that is no probability of dropping something."""
    check(field, value, 0 <= value < 1, "in [0, 1)")
