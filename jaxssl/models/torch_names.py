"""What PyTorch libraries call the arrays of our networks, and which backbone a file holds.

ResNets as torchvision, timm, mmseg (with the stem "v1c") and semseg (its `resnet50_v2`) name them;
heads of DeepLabv3+ as mmseg, of DeepLabv2 as AdvSemiSeg and DMT's code, of PSPNet as mmseg
and semseg do; transformers as `vit_names` says. A network may stand anywhere in a file: before its
names there may be `state_dict.`, `module.`, `backbone.` and the like.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxssl.contracts import UserError
from jaxssl.models import efficientnet_lite, resnet, vit_names, weight_files

Shape = tuple[int, ...]

MARKS = {
    "resnet": "layer1.0.conv1.weight",
    "efficientnet_lite0": "_conv_stem.weight",
    "vit": vit_names.MARK,
}
"""Kind of backbone -> an array that it has in all libraries."""

OUTER = ("state_dict.", "model_state_dict.", "model_state.", "model.", "network.", "net.")
"""Where a training's own network stands, if the file has several: the first that is there."""


class Body(NamedTuple):
    """A ResNet as the shapes of its arrays tell it.

    Attributes:
      bottleneck: kind of its blocks.
      depths: blocks of each stage.
      width: channels of the first stage's first convolution.
      stem: (size, channels) of each convolution before the first stage.
    """

    bottleneck: bool
    depths: tuple[int, ...]
    width: int
    stem: tuple[tuple[int, int], ...]

    def __str__(self) -> str:
        kind = "bottleneck" if self.bottleneck else "basic"
        depths, settings = ", ".join(map(str, self.depths)), self.settings()
        name = settings["backbone"] or f"a ResNet of {depths} {kind} blocks"
        stem = settings["stem"] or ", ".join(f"{size}x{size}" for size, _ in self.stem) or "unknown"
        channels = ", ".join(str(count) for _, count in self.stem) or "?"
        return f"{name} of width {self.width} and stem {stem} ({channels} channels)"

    def settings(self) -> dict[str, Any]:
        """The keys of a config's `model` that say so; None for what no network here can be."""
        same = [k for k, v in resnet.DEPTHS.items() if v == (self.bottleneck, self.depths)]
        sizes, channels = ([one[axis] for one in self.stem] for axis in (0, 1))
        stem = {(7,): "conv7", (3, 3, 3): "deep"}.get(tuple(sizes))
        half = channels[-1] // 2 if channels else 0
        if channels not in ([2 * half], [half, half, 2 * half]):
            stem = None
        return {
            "backbone": same[0] if same else None,
            "width": self.width,
            "stem": stem,
            "stem_width": half,
        }


class Contents(NamedTuple):
    """A network that was found in a file.

    Attributes:
      where: what messages call the file.
      arrays: of the network, by their names in the file; PyTorch's layout.
      name_of: path in our trees -> name in the file, or "".
      backbone: names of the arrays that are the backbone's.
      body: what ResNet or transformer it is; None for EfficientNet-Lite0.
      prefix: of the backbone's names.
      others: prefixes of other networks in the file.
    """

    where: str
    arrays: dict[str, np.ndarray]
    name_of: Callable[[tuple[str, ...]], str]
    backbone: frozenset[str] = frozenset()
    body: Body | vit_names.Transformer | None = None
    prefix: str = ""
    others: tuple[str, ...] = ()


def find(arrays: Mapping[str, np.ndarray], where: str) -> Contents:
    """Finds the network in a file and what its arrays are called here.

    Args:
      arrays: all of the file.
      where: what messages call the file.

    Raises:
      UserError: there is none, there are several, or it is a kind that is not here.
    """
    starts = {
        name.removesuffix(mark): backbone
        for backbone, mark in MARKS.items()
        for name in arrays
        if name == mark or name.endswith(f".{mark}")
    }
    if not starts:
        raise UserError(
            f"{where} holds no backbone that is known here, such as a ResNet with the names of "
            "torchvision, timm, mmseg or semseg, or a ViT with those of timm or mmseg. Its arrays "
            f"are {weight_files.describe(arrays)}."
        )
    prefix = _choose(tuple(starts), where)
    outer = re.sub(r"(backbone|encoder)\.$", "", prefix)
    short = {
        name: name.removeprefix(prefix if name.startswith(prefix) else outer)
        for name in arrays
        if name.startswith(outer)
    }
    others = tuple(start for start in starts if start != prefix)
    found = {"prefix": prefix, "others": others}
    mine = {
        name: arrays[name]
        for name in short
        if not any(name.startswith(other) for other in others if other.startswith(outer))
    }
    if starts[prefix] == "efficientnet_lite0":
        backbone = {name for name in mine if short[name].startswith(("_conv_stem", "_blocks"))}

        def name_of(path: tuple[str, ...]) -> str:
            return prefix + efficientnet_lite.torch_name(path) if path[0] == "backbone" else ""

        return Contents(where, mine, name_of, frozenset(backbone), **found)
    if starts[prefix] == "vit":
        full = {short[name]: name for name in mine}
        prepared = vit_names.prepare({name: mine[full[name]] for name in full}, where)
        short = {full.get(name, prefix + name): name for name in prepared}
        mine = {name: prepared[short[name]] for name in short}
        vit_names.refuse_others({name: array.shape for name, array in prepared.items()}, where)
    else:
        _refuse_other_kinds({short[name]: array.shape for name, array in mine.items()}, where)
    ours = _our_paths({short[name]: array.ndim for name, array in mine.items()})
    names = {ours[short[name]]: name for name in mine if short[name] in ours}
    shapes = {path: to_ours(mine[name]).shape for path, name in names.items()}
    backbone = {name for path, name in names.items() if path.startswith("backbone/")}
    return Contents(
        where,
        mine,
        lambda path: names.get("/".join(path), ""),
        frozenset(backbone),
        body(shapes),
        **found,
    )


def to_ours(array: np.ndarray, axes: int = 4) -> np.ndarray:
    """Turns PyTorch's layout to ours: convolutions `[O,I,kh,kw]` and matrices `[O,I]` become
    `[kh,kw,I,O]`, or matrices `[I,O]` where that is what has as many `axes`; others stay as they
    are.
    """
    if array.ndim == axes == 2:
        return array.T
    if array.ndim == 2:
        array = array[:, :, None, None]
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array


def body(shapes: Mapping[str, Shape]) -> Body | vit_names.Transformer | None:
    """The ResNet or transformer with arrays of these shapes, by "backbone/layer1_0/conv1/kernel"
    and the like; None where there is none.
    """
    if (transformer := vit_names.body(shapes)) is not None:
        return transformer
    blocks = {m[0] for path in shapes if (m := re.match(r"backbone/layer\d_\d+/", path))}
    if not blocks:
        return None
    stem = [shapes.get(f"backbone/stem{i}/conv/kernel", ()) for i in (1, 2, 3)]
    return Body(
        bottleneck="backbone/layer1_0/conv3/kernel" in shapes,
        depths=tuple(sum(f"/layer{stage}_" in block for block in blocks) for stage in (1, 2, 3, 4)),
        width=shapes["backbone/layer1_0/conv1/kernel"][-1],
        stem=tuple((shape[0], shape[-1]) for shape in stem if shape),
    )


def compare(
    weights: Contents, ours: Body | vit_names.Transformer | None, model: Mapping[str, Any]
) -> None:
    """Refuses weights of another backbone than a network's, and says what to set.

    Args:
      weights: of a file.
      ours: the network's ResNet or transformer; None where its backbone is something else.
      model: the section `model` of its config.
    """
    theirs = weights.body
    if theirs == ours and (theirs or model["backbone"] == "efficientnet_lite0"):
        return
    text = (
        f"{weights.where} holds {theirs or 'efficientnet_lite0'}, and the network has "
        f"{ours or model['backbone']}. "
    )
    transformers = [isinstance(one, vit_names.Transformer) for one in (theirs, ours)]
    if any(transformers) and not all(transformers):
        raise UserError(
            f"{text}SETR takes the weights of a ViT, and no other network does: take other weights."
        )
    wanted: dict[str, Any] = {"backbone": "efficientnet_lite0"}
    if theirs is not None:
        wanted = theirs.settings()
    have = model if ours is None else ours.settings()
    if None in wanted.values():
        raise UserError(f"{text}There is no such network here: take other weights.")
    if all(one.get("stem_width") in (None, 0, one.get("width", 0) // 2) for one in (wanted, have)):
        wanted.pop("stem_width", None)  # it follows the width where it is not set
    flags = " ".join(
        f"--config.model.{key}={value}" for key, value in wanted.items() if value != have.get(key)
    )
    raise UserError(f"{text}Take other weights, or set {flags}")


def _choose(starts: tuple[str, ...], where: str) -> str:
    """The one prefix; of several the empty one, or the one in the first of `OUTER` that has one."""
    if "" in starts:
        return ""
    for outer in ("", *OUTER):
        inside = [start for start in starts if start.startswith(outer)]
        if len(inside) == 1:
            return inside[0]
    raise UserError(
        f"{where} holds several networks, whose names begin with {', '.join(sorted(starts))}. Save "
        "the state dict of one of them in a file of its own."
    )


def _our_paths(dimensions: Mapping[str, int]) -> dict[str, str]:
    """Name -> path in our trees, for the names that have one.

    Args:
      dimensions: name -> number of its array's axes.
    """
    deep, paths = "conv1.0.weight" in dimensions, {}
    for name, count in dimensions.items():
        if name in vit_names.WHOLE:
            paths[name] = vit_names.WHOLE[name]
        layer, _, leaf = name.rpartition(".")
        # timm's deep stem is a sequence whose last normalization stands outside of it.
        layer = "conv1.7" if deep and layer == "bn1" else layer
        for pattern, path in (*_RULES, *vit_names.RULES):
            if (match := re.fullmatch(pattern, layer)) and leaf in _LEAVES:
                ours = "kernel" if leaf == "weight" and count > 1 else _LEAVES[leaf]
                paths[name] = f"{path(match)}/{ours}"
                break
    return paths


_LEAVES = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}
_STEM = dict(enumerate(("conv", "bn", "relu") * 3))
_FCN = {"0": "conv/conv", "1": "conv/bn", "4": "classifier"}
_RULES: tuple[tuple[str, Callable[[re.Match[str]], str]], ...] = (
    # ResNets: torchvision, timm, mmseg, semseg.
    (r"layer(\d)\.(\d+)\.(conv\d|bn\d)", lambda m: f"backbone/layer{m[1]}_{m[2]}/{m[3]}"),
    (r"layer(\d)\.(\d+)\.downsample\.0", lambda m: f"backbone/layer{m[1]}_{m[2]}/downsample_conv"),
    (r"layer(\d)\.(\d+)\.downsample\.1", lambda m: f"backbone/layer{m[1]}_{m[2]}/downsample_bn"),
    (r"(conv|bn)([123])", lambda m: f"backbone/stem{m[2]}/{m[1]}"),
    (
        r"(?:conv1|stem|layer0)\.([013467])",
        lambda m: f"backbone/stem{int(m[1]) // 3 + 1}/{_STEM[int(m[1])]}",
    ),
    # mmseg.
    (r"decode_head\.conv_seg", lambda m: "head/classifier"),
    (r"decode_head\.image_pool\.1\.(conv|bn)", lambda m: f"head/pool/{m[1]}"),
    (r"decode_head\.aspp_modules\.(\d)\.(conv|bn)", lambda m: f"head/aspp{m[1]}/{m[2]}"),
    (
        r"decode_head\.aspp_modules\.(\d)\.(depthwise|pointwise)_conv\.(conv|bn)",
        lambda m: f"head/aspp{m[1]}/{m[2]}/{m[3]}",
    ),
    (r"decode_head\.bottleneck\.(conv|bn)", lambda m: f"head/bottleneck/{m[1]}"),
    (r"decode_head\.c1_bottleneck\.(conv|bn)", lambda m: f"head/low_level/{m[1]}"),
    (
        r"decode_head\.sep_bottleneck\.(\d)\.(depthwise|pointwise)_conv\.(conv|bn)",
        lambda m: f"head/decoder{int(m[1]) + 1}/{m[2]}/{m[3]}",
    ),
    (
        r"decode_head\.psp_modules\.(\d)\.1\.(conv|bn)",
        lambda m: f"head/pool{int(m[1]) + 1}/{m[2]}",
    ),
    (r"auxiliary_head\.convs\.0\.(conv|bn)", lambda m: f"auxiliary/conv/{m[1]}"),
    (r"auxiliary_head\.conv_seg", lambda m: "auxiliary/classifier"),
    # DeepLabv2: AdvSemiSeg, DMT.
    (
        r"(?:layer5\.conv2d_list|classifier\.0\.convs)\.(\d)",
        lambda m: f"head/aspp{int(m[1]) + 1}",
    ),
    # PSPNet: semseg; its auxiliary head as in torchvision.
    (r"ppm\.features\.(\d)\.1", lambda m: f"head/pool{int(m[1]) + 1}/conv"),
    (r"ppm\.features\.(\d)\.2", lambda m: f"head/pool{int(m[1]) + 1}/bn"),
    (r"cls\.([01])", lambda m: f"head/bottleneck/{_FCN[m[1]].removeprefix('conv/')}"),
    (r"cls\.4", lambda m: "head/classifier"),
    (r"(?:aux|aux_classifier)\.([014])", lambda m: f"auxiliary/{_FCN[m[1]]}"),
)


def _refuse_other_kinds(shapes: Mapping[str, Shape], where: str) -> None:
    """Refuses networks whose arrays look like a ResNet's and compute something else."""
    for name, shape in shapes.items():
        kind = None
        if re.fullmatch(r"layer\d\.\d+\.downsample\.1\.weight", name) and len(shape) == 4:
            kind = "a ResNet-D, which averages in its shortcuts"
        elif re.fullmatch(r"layer\d\.\d+\.conv2\.weight", name) and shape[0] != shape[1]:
            kind = "a ResNeXt, whose 3x3 convolutions have groups"
        elif re.fullmatch(r"layer1\.0\.conv3\.weight", name) and shape[0] != 4 * shape[1]:
            kind = "a wide ResNet, whose bottlenecks do not have a factor of 4"
        elif re.match(r"layer[1-4]\.", name) and name not in _our_paths({name: len(shape)}):
            kind = "a ResNet with other layers in its blocks"
        if kind is not None:
            raise UserError(
                f"{where} holds {kind} ({name} {list(shape)}). That is another network than the "
                "ResNets here: take other weights."
            )
