"""An exported folder as a repository of the Hugging Face Hub, by huggingface_hub; its token is that of the environment.

zopro export RUN --out DIR --push-to-hub me/my-adapter
"""

from __future__ import annotations

import shlex
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from zopro.errors import InputError, Stopped, one_line


def check_repository(name: str) -> None:
    """Raise `InputError`: the Hub takes no such name, or nobody is signed in."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise InputError(f"--push-to-hub: must be a name on the Hub such as me/my-adapter, got {name!r}.") from error
    if not get_token():
        raise InputError("--push-to-hub: must have a token, found none. Set HF_TOKEN, or run 'hf auth login'.")


def push(folder: str | Path, name: str) -> str:
    """Upload `folder` as the repository `name`, made if it is not there, and return its address.

    Raises `Stopped`, with the folder left as it is: the Hub cannot be reached, or refuses.
    """
    hub = HfApi()
    try:
        address = hub.create_repo(name, exist_ok=True)
        name = address.repo_id  # with the owner, whom a bare name leaves to the token
        hub.upload_folder(repo_id=name, folder_path=folder, commit_message="Exported by zopro")
    except Exception as error:  # of httpx, of the Hub's own kinds, and OSError: none of them is ours
        raise Stopped(
            f"--push-to-hub: '{name}' was not uploaded ({one_line(error)[:300].rstrip('.')}). '{folder}' is whole: "
            f"upload it with: hf upload {name} {shlex.quote(str(folder))}"
        ) from error
    return str(address)
