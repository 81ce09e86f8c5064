"""One of two processes: a relational loss over the rows of both, its value and gradient as
DistributedDataParallel averages it.

python -m tests.detection_kd.losses.gathered_gradient FOLDER   (see run_two_processes)
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from detection_kd.losses.feature_losses import (
    contrastive_loss,
    relational_angle_loss,
    relational_distance_loss,
)
from wsi_common.distributed import gather_rows, init_distributed

ROWS = 6


def inputs() -> tuple[nn.Linear, Tensor, Tensor]:
    """A student of one layer, what it sees, and its teacher's features of it, the same on every
    process.
    """
    torch.manual_seed(0)
    return nn.Linear(5, 4).double(), torch.randn(ROWS, 5).double(), torch.randn(ROWS, 7).double()


def loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Everything that looks at more than one row; pairs with a teacher of its own width."""
    relations = relational_distance_loss(student, teacher) + 2 * relational_angle_loss(
        student, teacher
    )
    return relations + 0.3 * contrastive_loss(student, teacher[:, :4], 0.5)


def main(folder: Path) -> None:
    """Leave rows, loss and gradient in a file of this process."""
    world = init_distributed("cpu")
    layer, x, teacher = inputs()
    model, own = (
        DistributedDataParallel(layer),
        slice(world.rank * ROWS // 2, (world.rank + 1) * ROWS // 2),
    )
    rows = gather_rows(model(x[own]))
    value = loss(rows, gather_rows(teacher[own]))
    value.backward()
    found = {
        "rows": rows.detach(),
        "loss": value.detach(),
        "weight": layer.weight.grad,
        "bias": layer.bias.grad,
    }
    torch.save(found, folder / f"{world.rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
