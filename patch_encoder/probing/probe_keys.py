"""The configuration keys of the probes."""

from __future__ import annotations

from dataclasses import dataclass

from patch_encoder.extraction.keys import DeviceKeys
from patch_encoder.probing.fine_tune import FineTuneKeys
from patch_encoder.probing.tile_sets import TileSet, read_tile_set
from wsi_common.config import REQUIRED, group, key
from wsi_common.errors import UserError

PROBES = ("knn", "linear", "fine_tune")


@dataclass
class KnnKeys:
    """Keys of the k-NN probe."""

    k: int = key(20, "neighbours that vote")
    temperature: float = key(0.07, "a neighbour's vote is exp(cosine similarity / temperature)")
    balanced: bool = key(
        False, "divide the votes of a class by its share of the training tiles; DINO does not"
    )


@dataclass
class TileSetKeys:
    """Keys of a script that reads labelled tiles."""

    tile_set: str = key(
        REQUIRED,
        "labelled tiles; a folder with one sub-folder of pictures per class, or a CSV "
        "(image,label[,group][,split], or slide_id,x,y,label[,case_id][,split] with features=)",
        path=True,
    )
    where: str = key(
        "", "regular expression; only tiles with a match in their name are taken; empty: all"
    )
    test_where: str = key(
        "",
        "regular expression; tiles with a match in their name are tested, the others trained on; "
        "empty: by the column split, or folds",
    )
    group: str = key(
        "",
        "regular expression; tiles whose file names match alike stay together, as ^[^_]+; empty: "
        "by the column group, or each on its own",
    )
    positive: str | None = key(None, "label of the positive class; null: the last one by alphabet")

    def read_tiles(self) -> TileSet:
        """The labelled tiles."""
        return read_tile_set(self.tile_set, self.where, self.test_where, self.group, self.positive)


@dataclass
class ProbeKeys(TileSetKeys, DeviceKeys):
    """Keys of the probes of several encoders on one set of tiles."""

    encoders: list[str] = key(
        [], "encoders, as name or name=weights; the controls are added to them"
    )
    random_starts: int = key(
        3, "random initialisations of each network, as a control of its weights; 0: none"
    )
    features: list[str] = key(
        [],
        "folder of feature bags; for a set of slide_id,x,y,label, in place of encoders",
        path=True,
    )
    coords: str = key(
        "", "folder of coordinates files; for bags without coordinates (.pt)", path=True
    )
    probes: list[str] = key(["knn", "linear"], "probes, one table each", choices=PROBES)
    reference: str = key(
        "", "row of the table that the others are compared with; empty: the first one"
    )
    folds: int = key(5, "number of folds; where the set itself has no split")
    seed: int = key(0, "seed of everything that is drawn at random")
    resamples: int = key(2000, "bootstrap resamples of the confidence intervals")
    knn: KnnKeys = group(KnnKeys, "the k-NN probe")
    fine_tune: FineTuneKeys = group(FineTuneKeys, "the fine-tuning probe")
    batch_size: int = key(64, "items per step over all processes; tiles", runtime=True)
    workers: int | None = key(
        None,
        "worker processes; they decode; null: one per core, at most 8; 0: the main process does",
        runtime=True,
    )
    overwrite: bool = key(False, "replace results of other settings or inputs", runtime=True)
    output: str = key(
        REQUIRED,
        "where the results are written; the tables, the figure, the features",
        runtime=True,
    )

    def check(self) -> None:
        """Refuse numbers that nothing can be made of, and keys that contradict each other."""
        least = {
            "knn.k": (self.knn.k, 1), "resamples": (self.resamples, 1),
            "batch_size": (self.batch_size, 1), "random_starts": (self.random_starts, 0),
            "fine_tune.epochs": (self.fine_tune.epochs, 1),
            "fine_tune.batch_size": (self.fine_tune.batch_size, 2),
        }  # fmt: skip
        for name, (value, fewest) in least.items():
            if value < fewest:
                raise UserError(f"{name}={value}: expected at least {fewest}")
        if self.knn.temperature <= 0:
            raise UserError(f"knn.temperature={self.knn.temperature}: expected more than 0")
        for name, values in (("probes", self.probes), ("fine_tune.seeds", self.fine_tune.seeds)):
            if not values or len(set(values)) < len(values):
                raise UserError(f"{name}={values}: expected at least one, and each once")
        if self.features and (self.encoders or "fine_tune" in self.probes):
            raise UserError(
                "features=...: expected no encoders and no probe fine_tune beside it, since bags "
                "hold no pixels; leave one out"
            )
