"""One of two processes: targets, centre and monitors from its half of a batch.

python -m tests.patch_encoder.selfdistill.two_process_targets FOLDER   (see run_two_processes)
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

from patch_encoder.selfdistill.losses.centring import centred_targets, update_centre
from patch_encoder.selfdistill.losses.sinkhorn import sinkhorn_targets
from patch_encoder.selfdistill.monitors import measure_targets
from tests.patch_encoder.selfdistill.references import random_logits
from wsi_common.distributed import init_distributed, shutdown

BATCH = 6
TEMPERATURE = 0.05


def inputs() -> Tensor:
    """Logits of two views of a whole batch."""
    logits = random_logits(2, BATCH, 5)
    # halves that differ: one process alone would find other scales
    logits[:, : BATCH // 2] *= 3
    return logits


def compute(logits: Tensor) -> dict[str, Tensor]:
    """Everything that looks at all processes."""
    centre = torch.linspace(-0.1, 0.1, logits.shape[-1], dtype=torch.float64)
    monitors = measure_targets(centred_targets(logits, centre, TEMPERATURE))
    return {
        "centre": update_centre(centre, logits),
        "sinkhorn": sinkhorn_targets(logits, TEMPERATURE),
        **monitors,
    }


def main(folder: Path) -> None:
    """Leave the results in a file of this process."""
    world = init_distributed("cpu")
    logits = inputs()
    own = slice(world.rank * BATCH // 2, (world.rank + 1) * BATCH // 2)
    found = compute(logits[:, own])
    torch.save(found, folder / f"{world.rank}.pt")
    shutdown()  # else threads of the group may outlive the interpreter


if __name__ == "__main__":
    main(Path(sys.argv[1]))
