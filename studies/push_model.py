"""Share a trained model: write its folder with weights, description and model card, and push it to
a hub, unless the licence of an encoder behind it forbids that.

    python -m studies.push_model run=runs/abmil_fold0 repo=lab/cervix-abmil licence=apache-2.0
        data_statement='312 liquid-based cytology slides of one hospital' output=runs/shared/abmil
    python -m studies.push_model run=runs/d2vfm output=runs/shared/student upload=false

Every run of a training script can be shared: slide classifiers, students, detectors, localisers,
graders, pre-trained encoders. The folder holds no slide ids, case ids or paths.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from studies.sharing.card import CardText, write_card
from studies.sharing.folder import read_model, write_folder
from studies.sharing.hub import upload
from studies.sharing.metrics import count_slides, list_metrics
from studies.sharing.origins import find_origins
from studies.sharing.terms import choose_licence
from wsi_common.cli import launch
from wsi_common.config import REQUIRED, key
from wsi_common.errors import UserError
from wsi_common.shared_weights import WEIGHTS

logger = logging.getLogger(__name__)


@dataclass
class Config:
    """Keys of sharing a model."""

    run: str = key(REQUIRED, "run directory; of a finished training", path=True)
    output: str = key(
        REQUIRED, "where the results are written; the folder that is shared", runtime=True
    )
    repo: str = key("", "repository on the hub, <owner>/<name>")
    upload: bool = key(True, "push the folder; false: write it only, with its card")
    licence: str = key(
        "", "licence of the model, as apache-2.0; empty: the one that its encoders ask for"
    )
    teacher: str = key(
        "", "name of the teacher encoder; here where the checkpoint does not name it"
    )
    licences: dict[str, Any] = key(
        {}, "licences of encoders that list_encoders does not know; {encoder: licence}"
    )
    title: str = key(
        "", "title of the page; here of the card; empty: the repository's or the run's name"
    )
    data_statement: str = key(
        "", "what the card says of the cohort: where it is from, who may use it"
    )
    limits: list[str] = key([], "known limits, one sentence each, for the card")
    evaluations: list[str] = key(
        [], "results.json of evaluations of the model, or their folders; for the card", path=True
    )
    private: bool = key(True, "make a new repository private")
    endpoint: str = key("", "address of the hub; empty: HF_ENDPOINT, or huggingface.co")


def main(config: Config) -> int:
    if config.upload and config.repo.count("/") != 1:
        raise UserError(
            f"repo='{config.repo}': expected <owner>/<name>; set it, or upload=false to write the "
            "folder only"
        )
    model = read_model(config.run)
    stated = {encoder: str(licence).lower() for encoder, licence in config.licences.items()}
    origins = find_origins(model.config, config.teacher)
    licence, refusal = config.licence, ""
    try:
        licence = choose_licence(origins, config.licence, stated)
    except UserError as error:
        if config.upload:
            raise
        licence, refusal = "", str(error)
        logger.warning("it may not be pushed: %s", refusal)
    title = config.title or config.repo.rpartition("/")[2] or Path(config.run).resolve().name
    text = CardText(title, config.data_statement, tuple(config.limits), licence, refusal)
    metrics, counts = list_metrics(model, config.evaluations), count_slides(model)
    card = write_card(model, origins, stated, metrics, counts, text)
    digests = write_folder(Path(config.output), model, card)
    logger.info("%s: written; sha256 of %s: %s", config.output, WEIGHTS, digests[WEIGHTS])
    if config.upload:
        message = f"{model.kind.title}: {title}"
        where = upload(
            Path(config.output), config.repo, config.endpoint, private=config.private,
            message=message,
        )  # fmt: skip
        logger.info("pushed to %s; tell those who fetch it the sha256 above", where)
    return 0


if __name__ == "__main__":
    launch(main, Config)
