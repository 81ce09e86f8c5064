"""What is watched while a network distils itself, and the alarm when it has collapsed."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from patch_encoder.selfdistill.monitors import (
    describe_collapse,
    feature_std,
    measure_targets,
    rankme,
)
from wsi_common.distributed import gather_rows, mean_dict
from wsi_common.errors import UserError

WINDOW = 10  # logged lines whose means are judged
WATCHED = ("teacher_entropy", "target_information", "feature_std")


def measure_training(
    targets: Float[Tensor, "t b k"], features: Float[Tensor, "b d"]
) -> dict[str, float]:
    """Entropies of the targets, and spread and effective rank of the teacher's features, over all
    processes, which call this together.

    Args:
        targets: (T, B, K) probabilities of the teacher.
        features: (B, D) of the teacher, of one view.
    """
    everywhere = gather_rows(features.float())
    spread = {"feature_std": feature_std(everywhere), "rankme": rankme(everywhere)}
    return mean_dict(measure_targets(targets) | spread)


class RecentValues:
    """The monitors of the last logged lines, judged when there are enough.

    Args:
        prototypes: K.
        after: steps of the warm-up, in which an untrained network is no collapsed one.
        item: what the network encodes, for messages.
    """

    def __init__(self, prototypes: int, after: int, item: str = "tile") -> None:
        self.prototypes, self.after, self.item = prototypes, after, item
        self.rows: list[dict[str, float]] = []

    def add(self, values: dict[str, float], step: int) -> None:
        """Take the values of a logged step.

        Raises:
            UserError: the training has collapsed.
        """
        if step < self.after:
            return
        self.rows = [*self.rows, {name: values[name] for name in WATCHED}][-WINDOW:]
        means = {name: sum(row[name] for row in self.rows) / len(self.rows) for name in WATCHED}
        found = describe_collapse(means, self.prototypes) if len(self.rows) == WINDOW else None
        if found:
            raise UserError(
                f"step {step + 1}: expected features that differ from {self.item} to {self.item}, "
                f"found a collapse: {found}; lower training.lr, objective.temperature_end or raise "
                "training.teacher_momentum, and start again with overwrite=true"
            )
