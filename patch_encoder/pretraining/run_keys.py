"""Configuration keys that every pre-training script has: how it computes, and when it writes."""

from __future__ import annotations

from dataclasses import dataclass

from patch_encoder.pretraining.keys import LossKeys, OptimiserKeys
from wsi_common.config import REQUIRED, group, key
from wsi_common.device import PRECISIONS
from wsi_common.tracking import Tracker


@dataclass
class RunKeys:
    """Losses, optimiser, and the run itself."""

    output: str = key(REQUIRED, "where the results are written; a run directory", runtime=True)
    objective: LossKeys = group(LossKeys, "targets and losses")
    training: OptimiserKeys = group(OptimiserKeys, "training recipe; optimiser and teacher")
    accumulate: int = key(
        1,
        "parts that a step's images are computed in, one after the other, to save memory",
        least=1,
    )
    precision: str = key(
        "auto",
        "number format of the computation; auto: bf16 where the device has it in "
        "hardware, else fp32; losses are always fp32",
        choices=PRECISIONS,
    )
    device: str = key("auto", "auto, cpu, cuda or cuda:N", runtime=True)
    compile: bool = key(
        False, "compile the network with torch.compile; student and teacher", runtime=True
    )
    log_every: int = key(50, "steps between lines in metrics.jsonl", runtime=True, least=1)
    save_minutes: float = key(
        10.0, "minutes between checkpoints inside an epoch", runtime=True, least=0
    )
    keep_start: bool = key(
        False,
        "write the backbone as it was before training, too, as backbone_start.pt, a control "
        "for every figure",
        runtime=True,
    )
    overwrite: bool = key(False, "replace results of other settings or inputs", runtime=True)
    tracker: Tracker = group(Tracker, "experiment tracking")
