import sys
import types

import numpy as np
import pytest
import safetensors.numpy
import test_torch_names

from jaxssl.contracts import UserError
from jaxssl.models import hub, pretrained

NAMES = ("model.safetensors", "pytorch_model.bin")


class HfHubHTTPError(OSError):
    pass


class RepositoryNotFoundError(HfHubHTTPError):
    pass


class GatedRepoError(RepositoryNotFoundError):
    pass


class EntryNotFoundError(Exception):
    pass


class LocalEntryNotFoundError(FileNotFoundError, EntryNotFoundError):
    pass


class HFValidationError(ValueError):
    pass


@pytest.fixture
def repository(monkeypatch):
    """A stand-in for the package huggingface_hub: (repository, file) -> path or error."""
    files, asked = {}, []

    def download(repository, file, *, local_files_only):
        asked.append((repository, file, local_files_only))
        found = files.get((repository, file), EntryNotFoundError())
        if isinstance(found, Exception):
            raise found
        return str(found)

    errors = types.ModuleType("huggingface_hub.errors")
    kinds = (HfHubHTTPError, RepositoryNotFoundError, GatedRepoError, EntryNotFoundError)
    for kind in (*kinds, LocalEntryNotFoundError, HFValidationError):
        setattr(errors, kind.__name__, kind)
    module = types.ModuleType("huggingface_hub")
    monkeypatch.setattr(module, "hf_hub_download", download, raising=False)
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", errors)
    return types.SimpleNamespace(files=files, asked=asked)


def test_the_first_file_that_is_there(repository, tmp_path):
    repository.files["timm/net", "pytorch_model.bin"] = tmp_path / "b"
    assert hub.find("hf:timm/net") == tmp_path / "b"
    assert repository.asked == [("timm/net", name, False) for name in NAMES]
    repository.files["timm/net", "model.safetensors"] = tmp_path / "a"
    assert hub.find("hf:timm/net") == tmp_path / "a"
    with pytest.raises(
        UserError, match=r"timm/no has neither model\.safetensors nor pytorch_model"
    ):
        hub.find("hf:timm/no")


def test_the_cache_serves_without_a_network(repository, tmp_path):
    repository.files["o/n", "model.safetensors"] = LocalEntryNotFoundError()
    repository.files["o/n", "pytorch_model.bin"] = tmp_path / "b"
    assert hub.find("hf:o/n") == tmp_path / "b"
    assert [local for *_, local in repository.asked] == [False, True]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (LocalEntryNotFoundError(), r"cannot be reached, and o/n is not in the cache"),
        (GatedRepoError(), r"o/n is open to those alone whom .*https://huggingface\.co/o/n"),
        (RepositoryNotFoundError(), r"has no repository o/n, or not for you"),
        (HFValidationError(), r"model\.pretrained is 'hf:o/n'; it must be hf:OWNER/NAME"),
        (
            HfHubHTTPError("500 Server Error\nmore"),
            r"was not downloaded \(500 Server Error\)\. Try",
        ),
        (OSError(), r"was not downloaded \(OSError\)"),
    ],
)
def test_errors_are_one_line(repository, error, message):
    for name in NAMES:
        repository.files["o/n", name] = error
    with pytest.raises(UserError, match=message) as raised:
        hub.find("hf:o/n")
    assert "\n" not in str(raised.value)


def test_a_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"hf:o/n', and huggingface_hub .*'jaxssl\[hub\]'"):
        hub.find("hf:o/n")


def test_networks_start_from_a_repository(repository, tmp_path):
    file, state = tmp_path / "model.safetensors", test_torch_names.small_resnet()
    safetensors.numpy.save_file({name: array + 1 for name, array in state.items()}, file)
    repository.files["timm/net", "model.safetensors"] = file
    fields = test_torch_names.RESNET10
    loaded, lines = pretrained.load(
        {"a": {"pretrained": "hf:timm/net", **fields}}, {"a": test_torch_names.shapes_of(**fields)}
    )
    assert lines == ["resnet10 of a starts from hf:timm/net: 60 arrays of backbone."]
    np.testing.assert_array_equal(loaded["a"].params["backbone"]["stem1"]["conv"]["kernel"], 1)
