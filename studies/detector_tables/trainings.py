"""The trainings of a row: one recipe with one change, one seed at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detection_kd.datasets.coco import DetectionSet, read_coco, same_categories
from studies.region_tables.stages import load_settings, run_script
from wsi_common.config import make_assignments

TASK = ("class_agnostic", "class_map")  # keys that say what is to be found
SHARED = (*TASK, "train", "val", "images", "output", "seed", "device")  # the same for all rows


@dataclass(frozen=True)
class DetectorRecipe:
    """What all rows have.

    Attributes:
        arguments: of train_detector; its recipe, and what was set beside it.
        files: annotations by the key that names them (train, val, test), and `images`.
        device: where to compute.
    """

    arguments: Sequence[str]
    files: Mapping[str, str]
    device: str

    def read_sets(self) -> tuple[DetectionSet, DetectionSet]:
        """The training and the test images, with the classes that the recipe makes of theirs."""
        settings = load_settings("train_detector", self._name(Path()))
        classes = {name: getattr(settings, name) for name in TASK}
        train, test = (
            read_coco(self.files[side], self.files["images"], **classes)
            for side in ("train", "test")
        )
        same_categories(train, test)
        return train, test

    def train(self, run: Path, seed: int, keys: Mapping[str, Any]) -> Path:
        """Train with a change, or go on with it, and detect in the test images.

        Returns:
            The file of COCO results.

        Raises:
            UserError: what the training refuses.
        """
        given = make_assignments({"seed": seed, "device": self.device, "overlays": 0, **keys})
        run_script("train_detector", [*self._name(run), *given])
        measured = {"annotations": self.files["test"], "images": self.files["images"]}
        measured |= {"detector": str(run / "checkpoint_best.pt"), "output": str(run / "test")}
        measured |= {"device": self.device, "overwrite": True}  # of another detector, in this place
        run_script(
            "evaluate_detector", make_assignments({**measured, "overlays": 0, "resamples": 0})
        )
        return run / "test" / "predictions.json"

    def _name(self, run: Path) -> list[str]:
        named = {name: self.files[name] for name in ("train", "val", "images")}
        return [*self.arguments, *make_assignments({**named, "output": run})]
