import hashlib
import os
import sys

import numpy as np
import pytest
import safetensors.numpy

from jaxssl.contracts import UnreadableError, UserError
from jaxssl.models import weight_files

ARRAYS = {"conv.weight": np.arange(24, dtype=np.float32).reshape(2, 3, 2, 2), "b": np.ones(2)}


def assert_same(arrays, expected):
    assert arrays.keys() == expected.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, expected[name], strict=True)


def test_safetensors(tmp_path):
    file = tmp_path / "w.safetensors"
    counts = {"bn.num_batches_tracked": np.array(3)}
    safetensors.numpy.save_file(ARRAYS | counts, file)
    assert_same(weight_files.read(file), ARRAYS)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UnreadableError, match=r"w\.safetensors is damaged \(.*Download it again"):
        weight_files.read(file)
    safetensors.numpy.save_file({}, file)
    with pytest.raises(
        UserError, match=r"holds no arrays by name\. Save a state dict: torch\.save"
    ):
        weight_files.read(file)


@pytest.mark.torch
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", ["w.pth", "w.pt", "pytorch_model.bin", "w.pth.tar"])
def test_both_formats_of_pytorch(zipped, name, tmp_path):
    torch = pytest.importorskip("torch")
    file = tmp_path / name
    tensors = {name: torch.tensor(array) for name, array in ARRAYS.items()}
    optimizer = {"state": {0: {"step": torch.tensor(7)}}, "param_groups": [{"lr": 0.1}]}
    checkpoint = {"epoch": 3, "best": 0.5, "model": tensors, "optimizer": optimizer, "note": None}
    torch.save(checkpoint, file, _use_new_zipfile_serialization=zipped)
    expected = {f"model.{name}": array for name, array in ARRAYS.items()}
    assert_same(weight_files.read(file), expected | {"optimizer.state.0.step": np.array(7)})
    file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(UnreadableError, match=rf"{name} is damaged"):
        weight_files.read(file)


@pytest.mark.torch
def test_half_precision(tmp_path):
    torch, file = pytest.importorskip("torch"), tmp_path / "w.pth"
    tensors = {"half": torch.tensor([0.5], dtype=torch.float16)}
    torch.save(tensors | {"b": torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))}, file)
    expected = {"half": np.array([0.5], np.float16), "b": np.ones(2, np.float32)}
    assert_same(weight_files.read(file), expected)


class Call:
    """Calls a function when Python's own reader meets it."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


@pytest.mark.torch
def test_nothing_in_a_zip_is_run(tmp_path):
    torch, file, mark = pytest.importorskip("torch"), tmp_path / "w.pth", tmp_path / "ran"
    for call, named in (
        (Call(os.system, f"touch {mark}"), r"posix\.system"),
        (Call(eval, f"open({str(mark)!r}, 'w')"), r"\S*eval"),
        (Call(open, str(mark), "w"), r"(_?io)\.open"),
        (np.float64(0.5), r"numpy\S*\.scalar"),
    ):
        torch.save({"a": torch.ones(2), "b": call}, file)
        with pytest.raises(UserError, match=rf"w\.pth would call {named}, .*It was not run; get"):
            weight_files.read(file)
    assert not mark.exists()
    torch.save({"b": Call(os.system, f"touch {mark}")}, file)
    torch.load(file, weights_only=False)  # so that it is known to be an attack
    assert mark.exists()


def test_zips_need_pytorch(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    file = tmp_path / "w.pth"
    file.write_bytes(b"PK\x03\x04")
    with pytest.raises(
        UserError, match=r"w\.pth has the format of .* pip install 'jaxssl\[torch\]'"
    ):
        weight_files.read(file)


def test_a_hash_in_the_name_is_checked(tmp_path):
    content = safetensors.numpy.save(ARRAYS)
    digest = hashlib.sha256(content).hexdigest()

    def read(ending, content=content):
        file = tmp_path / f"resnet50{ending}.safetensors"
        file.write_bytes(content)
        return weight_files.read(file)

    for ending in ("", f"-{digest[:8]}", f"_1-{digest}", "-20240229", "-0676", "-v1c"):
        assert_same(read(ending), ARRAYS)
    wrong = "0676ba61" if digest[:8] != "0676ba61" else "deadbeef"
    with pytest.raises(
        UnreadableError,
        match=rf"{wrong}\.safetensors is damaged: its SHA-256 begins with {digest[:8]}\. Download "
        "it again, or correct its path. If its name does not end with a hash, rename it",
    ):
        read(f"-{wrong}")
    with pytest.raises(UnreadableError, match=r"none\.pth cannot be read: No such file"):
        weight_files.read(tmp_path / "none.pth")
    with pytest.raises(UnreadableError, match=r"cannot be read: Is a directory"):
        weight_files.read(tmp_path)


def test_long_lists_are_cut():
    assert weight_files.describe(["a", "b"]) == "a, b"
    assert weight_files.describe(dict.fromkeys("abcde")) == "a, b, c, d and 1 more"
