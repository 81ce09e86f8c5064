"""One of two processes: prototype loss, its gradient and the centre from its half of a batch.

python -m tests.patch_encoder.prototypes.two_process_prototypes FOLDER SHARES
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

from patch_encoder.prototypes.prototype_loss import (
    move_prototype_centre,
    prototype_loss,
    prototype_targets,
)
from tests.patch_encoder.prototypes.references import random_units
from tests.patch_encoder.selfdistill.references import random_logits
from wsi_common.distributed import init_distributed, shutdown

BATCH = 256
OUTPUTS = 11
# kept regions in the first and the second half of the batch
SHARES = {"128/32": (128, 32), "128/0": (128, 0), "0/0": (0, 0)}


def inputs(kept: tuple[int, int]) -> dict[str, Tensor]:
    """A whole batch."""
    half = torch.arange(BATCH // 2)
    return {
        "logits": random_logits(4, BATCH, OUTPUTS),
        "prototypes": random_units(BATCH, 5) + 0.5,
        "keep": torch.cat([half < count for count in kept]),
    }


def compute(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Everything that looks at all processes."""
    layer = random_logits(5, OUTPUTS, seed=1)
    centre = torch.linspace(-0.1, 0.1, OUTPUTS, dtype=torch.float64)
    targets = prototype_targets(batch["prototypes"], lambda p: p @ layer, centre, 0.05)
    logits = batch["logits"].requires_grad_()
    loss = prototype_loss(logits, targets, 0.1, batch["keep"])
    loss.backward()
    moved = move_prototype_centre(
        centre, batch["prototypes"], batch["keep"], lambda p: p @ layer, 0.9
    )
    return {"loss": loss.detach(), "gradient": logits.grad, "centre": moved}


def main(folder: Path, shares: str) -> None:
    """Leave the results in a file of this process."""
    world = init_distributed("cpu")
    batch = inputs(SHARES[shares])
    own = slice(world.rank * BATCH // 2, (world.rank + 1) * BATCH // 2)
    part = {
        name: value[:, own] if value.dim() == 3 else value[own] for name, value in batch.items()
    }
    torch.save(compute(part), folder / f"{world.rank}.pt")
    shutdown()  # else threads of the group may outlive the interpreter


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
