"""Everything of one seed: fields with wrong labels, and the networks that are trained on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detection_kd.mitosis_sets.keys import MitosisSetKeys
from studies.region_tables.stages import run_script
from wsi_common.config import make_assignments

TRUTH = "MIDOG.json"


@dataclass(frozen=True)
class SeedFolder:
    """Everything of one seed: its composed fields with wrong labels, and its networks.

    Attributes:
        path: of the folder.
        seed: of fields, wrong labels and training.
        noise: name of the annotations with wrong labels.
        train: further arguments of train_mitosis.
    """

    path: Path
    seed: int
    noise: str
    train: Sequence[str]

    def data(self, annotations: str) -> MitosisSetKeys:
        """The fields with one of their annotations."""
        cohort = self.path / "fields"
        return MitosisSetKeys(
            annotations=str(cohort / annotations),
            images=str(cohort / "images"),
            cases=str(cohort / "cases.csv"),
        )

    def compose(self, crops: str, options: Sequence[str]) -> None:
        """Compose the fields that are missing."""
        given = {"crops": crops, "output": self.path / "fields", "seed": self.seed}
        run_script("compose_mitoses", [*options, *make_assignments(given)])

    def train_network(self, name: str, annotations: str, **settings: Any) -> Path:
        """Train a network, or go on with it; its run directory."""
        run = self.path / name
        given = {"output": run, "seed": self.seed, **settings}
        run_script("train_mitosis", [*self.train, *self._name_data(annotations), *_assign(given)])
        return run

    def filter(self, name: str, teachers: Sequence[Path], keys: Mapping[str, Any]) -> Path:
        """Filter the wrong labels by these teachers; the folder of kept.csv and audit.json."""
        output = self.path / name / "filter"
        checkpoints = ",".join(str(path / "checkpoint_best.pt") for path in teachers)
        given = {"output": output, "seed": self.seed, "truth": self.data(TRUTH).annotations}
        run_script(
            "filter_samples",
            [
                *self._name_data(self.noise),
                f"teachers=[{checkpoints}]",
                *_assign({**given, **keys}),
            ],
        )
        return output

    def _name_data(self, annotations: str) -> list[str]:
        data = self.data(annotations)
        named = {name: getattr(data, name) for name in ("annotations", "images", "cases")}
        return make_assignments({f"data.{name}": value for name, value in named.items()})


def _assign(settings: Mapping[str, Any]) -> list[str]:
    return make_assignments(dict(settings))
