"""Weights from the Hugging Face Hub."""

from __future__ import annotations

import importlib
from pathlib import Path

from jaxssl.contracts import UserError

PREFIX = "hf:"

FILES = ("model.safetensors", "pytorch_model.bin")
"""What a repository may call its weights; the first that is there is taken."""


def find(name: str) -> Path:
    """Downloads the weights of a repository, unless they are in the local cache.

    Args:
      name: "hf:OWNER/NAME".

    Raises:
      UserError: they cannot be had, and why.
    """
    repository = name.removeprefix(PREFIX)
    try:
        hub = importlib.import_module("huggingface_hub")
        errors = importlib.import_module("huggingface_hub.errors")
    except ImportError:
        raise UserError(
            f"model.pretrained is {name!r}, and huggingface_hub is not installed: "
            "pip install 'jaxssl[hub]'"
        ) from None
    offline = False
    for file in FILES:
        try:
            return Path(hub.hf_hub_download(repository, file, local_files_only=offline))
        # From here on every class comes before the one that it is derived from.
        except errors.GatedRepoError:
            raise UserError(
                f"The repository {repository} is open to those alone whom its owner allows it. Ask "
                f"on its page, https://huggingface.co/{repository}, then run: hf auth login"
            ) from None
        except errors.RepositoryNotFoundError:
            raise UserError(
                f"The Hugging Face Hub has no repository {repository}, or not for you. Check the "
                "name; for a private one run: hf auth login"
            ) from None
        except errors.LocalEntryNotFoundError:
            offline = True
        except errors.EntryNotFoundError:
            continue
        except errors.HFValidationError:
            raise UserError(f"model.pretrained is {name!r}; it must be hf:OWNER/NAME.") from None
        except (errors.HfHubHTTPError, OSError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise UserError(
                f"{file} of {repository} was not downloaded ({reason}). Try again, or download it "
                "otherwise and give its path as model.pretrained."
            ) from None
    if offline:
        raise UserError(
            f"The Hugging Face Hub cannot be reached, and {repository} is not in the cache. Where "
            f"there is a network, download its {FILES[0]}; give its path as model.pretrained."
        )
    raise UserError(
        f"The repository {repository} has neither {' nor '.join(FILES)}. Download the file that "
        "you want from it, and give its path as model.pretrained."
    )
