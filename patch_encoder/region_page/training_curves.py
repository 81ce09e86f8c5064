"""The curves of the pre-training that region features come from (pretrain_slpd)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from patch_encoder.pretrain_page.curves import PANELS, Panel, draw_panels
from patch_encoder.pretrain_page.run_folder import read_lines
from wsi_common.errors import UserError
from wsi_common.files import read_json

LOSSES = Panel(
    "Loss",
    {"loss": "in all", "dino": "DINO", "intra": "intra-slide", "inter": "inter-slide"},
    "Cross-entropies; the sum weighs those of prototypes, which start with the first "
    "clustering. Only a jump, or NaN, is bad.",
)
PROTOTYPES = (
    Panel(
        "Entropy of the centre",
        {"centre_entropy": "nats"},
        "The centre of the teacher's outputs as a distribution. Healthy: near the dashed line "
        "(uniform). A fall towards 0 is a collapse onto one prototype.",
        bound="log_k",
    ),
    Panel(
        "Sizes of clusters",
        {"prototypes/smallest_share": "smallest", "prototypes/largest_share": "largest"},
        "Shares of a slide's regions, mean over slides. Healthy: the smallest stays above 0, the "
        "largest well below 1.",
    ),
    Panel(
        "Distinct targets",
        {"prototypes/distinct_targets": "share"},
        "Prototypes of the nearest neighbour that a slide's are matched with, as a share of K. "
        "Always 1 with target=matched; far below with target=greedy, one teaches all clusters.",
    ),
    Panel(
        "k-NN of slides or zones",
        {
            "slide_knn_balanced_accuracy": "slides, balanced accuracy",
            "zone_knn_balanced_accuracy": "zones, balanced accuracy",
        },
        "The teacher on labels that training does not see. The judge of the run: the loss does not "
        "tell good features from bad ones.",
    ),
    Panel(
        "Encoding and clustering",
        {"time/prototypes": "share of an epoch"},
        "What prototypes cost. It is large where training itself is cheap; prototypes.every lowers "
        "it.",
    ),
)
# of the tiles' panels; their k-NN probe and pictures are not of regions
SHARED = ("Distance", "Entropy of the targets", "Spread", "Effective rank", "Gradient", "Learning")


def list_panels() -> list[Panel]:
    """All panels of pretrain_slpd, the losses and the judge first."""
    shared = [panel for panel in PANELS if panel.title.startswith(SHARED)]
    words = ("tile", "region")
    return [LOSSES, *(replace(p, healthy=p.healthy.replace(*words)) for p in shared), *PROTOTYPES]


def draw_training(run: str) -> list[dict[str, str]]:
    """The panels of a run directory, as `draw_panels` gives them; none where no run is given.

    Raises:
        UserError: it has no finished epoch of pretrain_slpd.
    """
    if not run:
        return []
    lines = read_lines(Path(run) / "metrics.jsonl")
    finished = [line for line in lines if "steps" in line]
    if not finished:
        raise UserError(
            f"run={run}: expected a run directory of pretrain_slpd with a finished epoch in "
            "metrics.jsonl, found none"
        )
    last = finished[-1]
    settings = read_json(Path(run) / "run.json", "settings of a run")["config"]
    outputs = settings["network.out_dim"]
    return draw_panels(list_panels(), lines, last["steps"] // last["epoch"], outputs)
