"""What PyTorch libraries call the arrays of vision transformers, and which one a file holds.

ViT and DeiT as timm names them, and SETR with its naive head as mmseg does. DINOv2's and DeiT III's
branches end in a factor per channel (LayerScale), which goes into the matrix before it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxssl.contracts import UserError
from jaxssl.models import vit

MARK = "pos_embed"
"""An array that all of them have, and that no network has here beside them."""

WHOLE = {"pos_embed": "backbone/positions", "cls_token": "backbone/tokens"}
"""Name -> path in our trees, of the arrays that `prepare` makes of several."""

RULES: tuple[tuple[str, Callable[[re.Match[str]], str]], ...] = (
    # timm; DeiT, MAE and DINOv2 have the same names.
    (r"patch_embed\.proj(?:ection)?", lambda m: "backbone/patch"),
    (r"blocks\.(\d+)\.(norm[12])", lambda m: f"backbone/block{m[1]}/{m[2]}"),
    (
        r"blocks\.(\d+)\.(?:attn\.(qkv|proj)|mlp\.(fc[12]))",
        lambda m: f"backbone/block{m[1]}/{m[2] or m[3]}",
    ),
    (r"norm", lambda m: "backbone/norm"),
    # mmseg. Its backbone ends without normalization, its head begins with one.
    (r"layers\.(\d+)\.ln([12])", lambda m: f"backbone/block{m[1]}/norm{m[2]}"),
    (r"layers\.(\d+)\.attn\.attn\.in_proj", lambda m: f"backbone/block{m[1]}/qkv"),
    (r"layers\.(\d+)\.attn\.attn\.out_proj", lambda m: f"backbone/block{m[1]}/proj"),
    (r"layers\.(\d+)\.ffn\.layers\.0\.0", lambda m: f"backbone/block{m[1]}/fc1"),
    (r"layers\.(\d+)\.ffn\.layers\.1", lambda m: f"backbone/block{m[1]}/fc2"),
    (r"decode_head\.norm", lambda m: "backbone/norm"),
    (r"decode_head\.up_convs\.0\.0\.(conv|bn)", lambda m: f"head/conv/{m[1]}"),
)
"""Patterns of a layer's name -> its path in our trees."""

_SCALES = {"ls1": "attn.proj", "ls2": "mlp.fc2"}
_OTHERS = re.compile(
    r"(blocks|layers)\.\d+\.|patch_embed\.|norm_pre\.|reg_token|register_tokens|dist_token|ln1\."
)
"""Arrays that a ViT here would have under other names, if it had what they are for."""


class Transformer(NamedTuple):
    """A vision transformer as the shapes of its arrays tell it.

    Attributes:
      width: channels of a patch.
      depth: blocks.
      patch: side of a patch.
      tokens: tokens that stand for no patch.
    """

    width: int
    depth: int
    patch: int
    tokens: int

    def __str__(self) -> str:
        name = self.settings()["backbone"] or f"a ViT of {self.depth} blocks of width {self.width}"
        return f"{name} with patches of {self.patch} and tokens {self.tokens}"

    def settings(self) -> dict[str, Any]:
        """The keys of a config's `model` that say so; None for what no network here can be."""
        sizes = {(size.width, size.depth): name for name, size in vit.SIZES.items()}
        return {
            "backbone": sizes.get((self.width, self.depth)),
            "patch": self.patch,
            "tokens": self.tokens,
        }


def body(shapes: Mapping[str, tuple[int, ...]]) -> Transformer | None:
    """The transformer with arrays of these shapes, by "backbone/positions" and the like; None
    where there is none.
    """
    if "backbone/positions" not in shapes:
        return None
    blocks = {path.split("/")[1] for path in shapes if path.startswith("backbone/block")}
    return Transformer(
        width=shapes["backbone/positions"][-1],
        depth=len(blocks),
        patch=shapes.get("backbone/patch/kernel", (0,))[0],
        tokens=shapes.get("backbone/tokens", (1, 0, 0))[1],
    )


def prepare(arrays: Mapping[str, np.ndarray], where: str) -> dict[str, np.ndarray]:
    """The arrays of a transformer, by their names there, as a network here would have them.

    The class token, and the distillation token of a distilled DeiT, become one array
    `[1,tokens,D]` with their positions added; the position embedding becomes a grid `[h,w,D]`;
    factors of LayerScale go into the matrices and biases before them.

    Args:
      arrays: as the file has them, but for what stands before their names.
      where: what messages call the file.

    Raises:
      UserError: the network has something that is not here.
    """
    arrays = {name.replace(".in_proj_", ".in_proj."): array for name, array in arrays.items()}
    tokens = [arrays.pop(name) for name in ("cls_token", "dist_token") if name in arrays]
    positions = arrays[MARK].reshape(-1, arrays[MARK].shape[-1])
    if tokens:
        first = np.concatenate([token.reshape(1, 1, -1) for token in tokens], 1)
        # Newer networks give the patches alone a position.
        if math.isqrt(len(positions)) ** 2 != len(positions):
            first, positions = first + positions[: len(tokens)], positions[len(tokens) :]
        arrays["cls_token"] = first
    side = math.isqrt(len(positions))
    if side**2 != len(positions):
        raise UserError(
            f"{where} holds a ViT whose position embedding {list(arrays[MARK].shape)} is of no "
            f"square grid with {len(tokens)} tokens beside it: take other weights."
        )
    arrays[MARK] = positions.reshape(side, side, -1)
    for name in [*arrays]:
        if match := re.fullmatch(r"(blocks\.\d+\.)(ls[12])\.gamma", name):
            scale, layer = arrays.pop(name), match[1] + _SCALES[match[2]]
            for before in {f"{layer}.weight", f"{layer}.bias"} & arrays.keys():
                array = arrays[before]
                arrays[before] = array * scale.reshape(-1, *[1] * (array.ndim - 1))
    return arrays


def refuse_others(shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Refuses a transformer that computes something else than those here.

    Args:
      shapes: as `prepare` gives the arrays, by name.
      where: what messages call the file.
    """
    for name, shape in shapes.items():
        layer = name.rpartition(".")[0]
        known = name in WHOLE or any(re.fullmatch(pattern, layer) for pattern, _ in RULES)
        if _OTHERS.match(name) and not known:
            raise UserError(
                f"{where} holds a ViT with more than those here have ({name} {list(shape)}). That "
                "is another network: take other weights."
            )
