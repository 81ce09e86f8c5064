"""Fetch a model that was shared with push_model from a hub, and check it.

    python -m studies.pull_model repo=lab/cervix-abmil output=models/cervix
        sha256=<as its author states it>

Only weights, description, card and digests are fetched. Every file has to have its sha256, the
weights are read as safetensors, and no code of the repository is run. The folder then takes the
place of a checkpoint in every command.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path

from studies.sharing.folder import CARD, verify_folder
from studies.sharing.hub import download
from wsi_common.cli import launch
from wsi_common.config import REQUIRED, key
from wsi_common.errors import UserError

logger = logging.getLogger(__name__)


@dataclass
class Config:
    """Keys of fetching a model."""

    repo: str = key(REQUIRED, "repository on the hub, <owner>/<name>")
    output: str = key(REQUIRED, "where the results are written; the model's folder", runtime=True)
    revision: str = key("", "branch, tag or commit; empty: the newest")
    sha256: str = key(
        "", "sha256 of model.safetensors as its author states it; empty: not compared"
    )
    endpoint: str = key("", "address of the hub; empty: HF_ENDPOINT, or huggingface.co")


def main(config: Config) -> int:
    if config.repo.count("/") != 1:
        raise UserError(f"repo='{config.repo}': expected <owner>/<name>")
    if config.sha256 and not re.fullmatch(r"[0-9a-fA-F]{64}", config.sha256):
        raise UserError(f"sha256={config.sha256}: expected 64 hexadecimal digits")
    folder = Path(config.output)
    download(config.repo, config.revision, folder, config.endpoint)
    model = verify_folder(folder, config.sha256)
    logger.info("%s: a %s, every file as it was shared", folder, model.kind.title)
    logger.info("read %s before you use it, its licence and limits first", folder / CARD)
    return 0


if __name__ == "__main__":
    launch(main, Config)
