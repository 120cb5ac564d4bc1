"""A multi-layer perceptron for images of one, small size, such as MNIST's.

RML's Figure 2 trains "3 layers of MLPs" on MNIST and says no more of them. Here three layers are
three matrices, so two hidden layers, with ReLU; there is no normalization.
"""

from __future__ import annotations

import dataclasses
import math

import flax.linen as nn
import jax

from jaxssl.contracts import UserError
from jaxssl.models import classification, layers, network


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model(classification.ClassificationNetwork):
    """A perceptron. `dropout` acts behind each hidden layer.

    Attributes:
      hidden: units of the hidden layers.
    """

    preprocessing: str = "mnist"
    hidden: tuple[int, ...] = (256, 256)

    def __post_init__(self) -> None:
        super().__post_init__()
        some = len(self.hidden) > 0 and min(self.hidden) > 0
        network.check("hidden", self.hidden, some, "the units of each hidden layer, such as (256,)")

    def body(self, norm: layers.NormDef) -> nn.Module:
        """The hidden layers: normalized `[B,H,W,3]` -> `[B,1,1,D]` of each."""
        del norm
        return HiddenLayers(self.hidden, self.dropout)


class HiddenLayers(nn.Module):
    """A perceptron without its classifier. Kernels start with a standard deviation of `sqrt(2/I)`
    for I inputs (He et al., Delving deep into rectifiers, ICCV 2015, eq. 10).
    """

    hidden: tuple[int, ...]
    dropout: float

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, ...]:
        """`[B,H,W,3]` -> `[B,1,1,D]` of each layer."""
        x, outputs = x.reshape(len(x), -1), []
        self._check_size(x.shape[-1])
        for i, units in enumerate(self.hidden):
            if i > 0:  # the head drops behind the last one
                x = layers.Dropout(self.dropout, shared=())(x)
            std = nn.initializers.constant(math.sqrt(2 / x.shape[-1]))
            x = nn.relu(nn.Dense(units, dtype=x.dtype, kernel_init=std, name=f"layer{i + 1}")(x))
            outputs.append(x[:, None, None])
        return tuple(outputs)

    def _check_size(self, inputs: int) -> None:
        if self.is_initializing():
            return
        expected = self.get_variable("params", "layer1")["kernel"].shape[0]
        if inputs != expected:
            raise UserError(
                f"An mlp that was made for images of {expected // 3} pixels cannot see one of "
                f"{inputs // 3}: it takes one size alone. Show images at the size of the crop, or "
                "choose another model.name."
            )
