"""Keys of trainings with one optimiser and one schedule, the same for every such script."""

from __future__ import annotations

from dataclasses import dataclass

from wsi_common.config import REQUIRED, group, key
from wsi_common.device import PRECISIONS
from wsi_common.schedules import SCHEDULES
from wsi_common.tracking import Tracker


@dataclass
class TrainingRunKeys:
    """Where a training goes, how its steps are taken, and on what it runs."""

    output: str = key(REQUIRED, "where the results are written; a run directory", runtime=True)
    lr: float = key(1e-4, "learning rate")
    weight_decay: float = key(0.0, "weight decay")
    clip_norm: float = key(0.0, "largest L2 norm of the gradients of a step; 0: any")
    schedule: str = key(
        "constant",
        "learning rate over the run: constant, one drop, or half a cosine",
        choices=SCHEDULES,
    )
    warmup_steps: int = key(0, "steps of linear warm-up")
    eval_every: int = key(
        1, "epochs between evaluations; the last epoch is always evaluated", least=1
    )
    seed: int = key(42, "seed of everything that is drawn at random")
    precision: str = key(
        "auto",
        "number format of the computation; auto: bf16 where the device has it in "
        "hardware, else fp32; losses are always fp32",
        choices=PRECISIONS,
    )
    device: str = key("auto", "auto, cpu, cuda or cuda:N", runtime=True)
    compile: bool = key(False, "compile the network with torch.compile; of the trunk", runtime=True)
    log_every: int = key(50, "steps between lines in metrics.jsonl", runtime=True, least=1)
    overwrite: bool = key(False, "replace results of other settings or inputs", runtime=True)
    tracker: Tracker = group(Tracker, "experiment tracking")
