"""Reads the arrays of weight files of other libraries, and runs nothing that stands in them."""

from __future__ import annotations

import hashlib
import importlib
import pickle
import re
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from jaxssl.contracts import UnreadableError, UserError
from jaxssl.models import pth

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
"""What the names of weight files end with; PyTorch's two formats are told apart by content."""

HASH = re.compile(r"-([0-9a-f]{8,64})\.\w+$")
DATE = re.compile(r"(19|20)\d\d(0[1-9]|1[0-2])([0-2]\d|3[01])")

AGAIN = "Download it again, or correct its path."
SAVE = "torch.save(network.state_dict(), PATH)"


def read(path: Path, advice: str = AGAIN) -> dict[str, np.ndarray]:
    """The arrays of a file by name; those of nested dicts as `pth.flatten` names them.

    How many batches a BatchNorm has seen is left out: nothing here needs it.

    Args:
      path: of a .safetensors file, or of one that `torch.save` wrote.
      advice: what to do about a damaged file.

    Raises:
      UnreadableError: the file is missing or damaged, or not what the hash in its name says.
      UserError: it asks for something that arrays do not need, holds none, or needs PyTorch.
    """
    check_hash(path, advice)
    try:
        with path.open("rb") as file:
            zipped = file.read(4) == b"PK\x03\x04"
    except OSError as error:
        raise UnreadableError(f"{path} cannot be read: {error.strerror}. {advice}") from None
    if path.suffix == ".safetensors":
        arrays = _read_safetensors(path, advice)
    elif zipped:
        arrays = _read_zip(path, advice)
    else:
        arrays = pth.read(path)
    arrays = {name: a for name, a in arrays.items() if not name.endswith("num_batches_tracked")}
    if not arrays:
        raise UserError(f"{path} holds no arrays by name. Save a state dict: {SAVE}")
    return arrays


def check_hash(path: Path, advice: str = AGAIN) -> None:
    """Compares a file with the first digits of its SHA-256, where its name ends with them, as in
    `resnet50-0676ba61.pth`. A date is not taken for them.

    Raises:
      UnreadableError: the file is missing, or its content is not what its name says.
    """
    match = HASH.search(path.name)
    try:
        if match is None or DATE.fullmatch(match[1]):
            path.stat()
            return
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UnreadableError(f"{path} cannot be read: {error.strerror}. {advice}") from None
    if not digest.startswith(match[1]):
        raise UnreadableError(
            f"{path} is damaged: its SHA-256 begins with {digest[:8]}. {advice} If its name does "
            "not end with a hash, rename it."
        )


def _read_safetensors(path: Path, advice: str) -> dict[str, np.ndarray]:
    try:
        return safetensors.numpy.load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise UnreadableError(f"{path} is damaged ({error}). {advice}") from None
    except (AttributeError, TypeError) as error:
        raise UserError(
            f"{path} holds arrays of a type that NumPy does not have ({error}). Save them as "
            "float32."
        ) from None


def _read_zip(path: Path, advice: str) -> dict[str, np.ndarray]:
    """The arrays of a file of PyTorch 1.6 or later, by PyTorch's reader for weights alone."""
    try:
        torch = importlib.import_module("torch")
    except ImportError:
        raise UserError(
            f"{path} has the format of PyTorch 1.6 or later, and PyTorch is not installed: "
            "pip install 'jaxssl[torch]'"
        ) from None
    try:
        with warnings.catch_warnings(action="ignore"):
            tree: Any = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        asked = f"would call {named[1]}" if named else "holds more than arrays"
        raise UserError(
            f"{path} {asked}, which arrays do not need. It was not run; get the file elsewhere, or "
            f"where you trust it open it in PyTorch and save what is needed: {SAVE}"
        ) from None
    except (RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        reason = str(error).split(". ")[0].splitlines()[0]
        if "TorchScript" in str(error):
            raise UserError(f"{path} holds a program (TorchScript): {SAVE}") from None
        raise UnreadableError(f"{path} is damaged ({reason}). {advice}") from None
    tensors = pth.flatten(tree, torch.Tensor)
    arrays = {}
    for name, tensor in tensors.items():
        try:
            # NumPy has no bfloat16.
            wide = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
            arrays[name] = wide.detach().numpy()
        except (TypeError, RuntimeError) as error:  # sparse, quantized, without data
            raise UserError(
                f"{path} holds {name!r} in a form that is no plain array ({error}). Save a plain "
                f"state dict: {SAVE}"
            ) from None
    return arrays


def describe(names: Collection[str], most: int = 4) -> str:
    """A few of the names of arrays, for messages."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(list(names)[:most]) + more
