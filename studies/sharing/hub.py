"""Carries a shared folder to a hub and back, with huggingface_hub; nothing of a hub is ever run."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from studies.sharing.folder import FILES
from wsi_common.errors import UserError

CLIENTS = ("httpx", "httpx2", "urllib3")  # which log every request
NETWORK_ERRORS = (OSError, RuntimeError, ValueError)


def open_hub(endpoint: str) -> Any:
    """The hub's client.

    Args:
        endpoint: address; empty: HF_ENDPOINT, or huggingface.co.
    """
    from huggingface_hub import HfApi  # a while to load

    _quieten()
    return HfApi(endpoint=endpoint or None)


def upload(folder: Path, repo: str, endpoint: str, *, private: bool, message: str) -> str:
    """Put the files of a folder into a repository, which is made where there is none.

    Returns:
        The address of what was uploaded.

    Raises:
        UserError: the hub cannot be reached or refuses.
    """
    hub = open_hub(endpoint)
    try:
        hub.create_repo(repo, private=private, exist_ok=True)
        done = hub.upload_folder(
            repo_id=repo,
            folder_path=str(folder),
            allow_patterns=list(FILES),
            commit_message=message,
        )
    except NETWORK_ERRORS as error:
        raise _explain(error, repo, "uploaded") from None
    return str(done.commit_url)


def download(repo: str, revision: str, folder: Path, endpoint: str) -> None:
    """Fetch the files of a shared model, and no others.

    Raises:
        UserError: the hub cannot be reached or refuses.
    """
    from huggingface_hub import snapshot_download

    _quieten()
    try:
        snapshot_download(
            repo,
            revision=revision or None,
            local_dir=folder,
            allow_patterns=list(FILES),
            endpoint=endpoint or None,
        )
    except NETWORK_ERRORS as error:
        raise _explain(error, repo, "fetched") from None


def _quieten() -> None:
    for name in CLIENTS:
        logging.getLogger(name).setLevel(logging.WARNING)


def _explain(error: Exception, repo: str, done: str) -> UserError:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return UserError(
        f"repo={repo}: it could not be {done} ({reason}); check the name and the network, and log "
        "in with `hf auth login` or HF_TOKEN"
    )
