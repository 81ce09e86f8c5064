"""Train the atypical-figure head: typical or atypical, for mitotic figures that were found.

    python -m detection_kd.train_atypical --config configs/uts/atypical.yaml \
        crops=data/amibr_midog21 output=runs/atypical

Source of the task: MIDOG 2025, track 2; labels: AMi-Br. Slides are in folds: each is scored by a
network that has seen none of its figures, and balanced accuracy has an interval by slide, beside
the same for 33 colour numbers. With `fine_tune.epochs=0` the trunk stays as it is, and a logistic
regression is fitted to its features: minutes on a CPU. The network in `checkpoint_best.pt` is
trained on all slides; its threshold is 0.5, since classes weigh the same. A killed run goes on with
the fold that it was killed in.

Written: checkpoint_best.pt, atypical.csv (crop, slide, label, fold, score), results.json.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from detection_kd.mitosis_sets.crops import AtypicalCrop, read_atypical_crops
from detection_kd.models.atypical import CLASSES, AtypicalHead, CropFeatures, resize_crop
from detection_kd.models.cam import LocaliserKeys, WeakLocaliser, load_localiser
from patch_encoder.descriptors.colour_statistics import colour_statistics
from patch_encoder.models.encoders import Encoder
from patch_encoder.probing.feature_sets import load_or_make, name_file
from patch_encoder.probing.fine_tune import FineTuneKeys, fine_tune, predict
from patch_encoder.probing.folds import Fold, make_folds
from patch_encoder.probing.linear import choose_strength, linear_probe
from patch_encoder.probing.pictures import Pictures, encode_pictures, load_batches, read_picture
from patch_encoder.probing.scores import Score, TilePredictions, score_runs
from wsi_common.checkpoint import save_checkpoint
from wsi_common.cli import launch
from wsi_common.config import REQUIRED, group, key
from wsi_common.device import PRECISIONS, pick_precision
from wsi_common.distributed import World, init_distributed, require_one_process
from wsi_common.errors import UserError
from wsi_common.files import sha256_file, write_csv
from wsi_common.processes.pool import pick_workers
from wsi_common.run import Run, open_run
from wsi_common.seed import seed_everything
from wsi_common.shared_weights import digest_weights_file

TABLE = "AMI-BR_MIDOG21.csv"
logger = logging.getLogger(__name__)


@dataclass
class Config:
    """Keys of `train_atypical`."""

    output: str = key(REQUIRED, "where the results are written; a run directory", runtime=True)
    crops: str = key(
        REQUIRED, "folder of AMi-Br: patches/ and the table of its MIDOG 2021 part", path=True
    )
    localiser: str = key(
        "",
        "checkpoint of train_mitosis; the head starts from its trunk and has its mpp; "
        "empty: from network",
        path=True,
    )
    network: LocaliserKeys = group(LocaliserKeys, "student and teacher; trunk, map and pooling")
    target_mpp: float | None = key(
        0.5, "micrometres per pixel of the tiles; of the crops, which cover 32 um"
    )
    fine_tune: FineTuneKeys = group(FineTuneKeys, "the fine-tuning probe")
    folds: int = key(5, "number of folds; slides are never divided")
    resamples: int = key(2000, "bootstrap resamples of the confidence intervals", least=1)
    seed: int = key(0, "seed of everything that is drawn at random")
    device: str = key("auto", "auto, cpu, cuda or cuda:N", runtime=True)
    precision: str = key(
        "auto",
        "number format of the computation; auto: bf16 where the device has it in hardware, else "
        "fp32",
        choices=PRECISIONS,
    )
    workers: int | None = key(
        None,
        "worker processes; they decode; null: one per core, at most 8; 0: the main process does",
        runtime=True,
    )
    overwrite: bool = key(False, "replace results of other settings or inputs", runtime=True)


@dataclass
class AtypicalStudy:
    """What all folds have in common."""

    config: Config
    world: World
    crops: list[AtypicalCrop]
    targets: np.ndarray
    slides: np.ndarray
    mpp: float
    encoded: np.ndarray | None = None

    def train(self, indices: np.ndarray) -> AtypicalHead:
        """A network that starts anew and is trained on some of the crops."""
        config, device = self.config, self.world.device
        seed_everything(config.seed)
        features = CropFeatures(self._start_localiser())
        if not config.fine_tune.epochs:
            known = self.targets[indices], self.slides[indices]
            head = fit_head(self._encode(features)[indices], *known, config.seed)
            return AtypicalHead(features, head, self.mpp).to(device).eval()
        encoder = Encoder("atypical", features.dim, self._resize, features, {})
        how = (device, pick_precision(config.precision, device), pick_workers(config.workers))
        given = (self.targets, indices, len(CLASSES), config.fine_tune, *how)
        trained = fine_tune(encoder, self.pictures, *given, seed=config.seed)
        head = trained[-1]
        assert isinstance(head, nn.Linear)
        return AtypicalHead(features, head, self.mpp).to(device).eval()

    def _encode(self, features: CropFeatures) -> np.ndarray:
        """Features (N, D) of all crops, computed once: the trunk starts alike in every fold."""
        if self.encoded is None:
            encoder = Encoder("trunk", features.dim, self._resize, features.eval(), {})
            precision = pick_precision(self.config.precision, self.world.device)
            paths = [crop.path for crop in self.crops]
            self.encoded = encode_pictures(paths, encoder, self.world.device, precision)
        return self.encoded

    def _start_localiser(self) -> WeakLocaliser:
        """The network below the head, before it is trained."""
        if self.config.localiser:
            return load_localiser(self.config.localiser)[0]
        return WeakLocaliser(self.config.network)

    def _resize(self, crop: np.ndarray) -> torch.Tensor:
        return resize_crop(crop, self.mpp)

    @property
    def pictures(self) -> Pictures:
        """All crops as the network takes them."""
        return Pictures([crop.path for crop in self.crops], self._resize)

    def test(self, fold: Fold) -> np.ndarray:
        """Probabilities (T, 2) of a fold's test crops by a network that is trained on the rest."""
        config, device = self.config, self.world.device
        model = self.train(fold.train)
        batches = load_batches(self.pictures, fold.test, config.fine_tune.batch_size, 0)
        return predict(model, batches, device, pick_precision(config.precision, device))

    def describe(self, fold: Fold, probabilities: np.ndarray) -> TilePredictions:
        """Probabilities of a fold's test crops with what is known of these."""
        known = (self.slides[fold.test], self.targets[fold.test])
        return TilePredictions(fold.number, *known, probabilities, fold.test)


def fit_head(features: np.ndarray, targets: np.ndarray, slides: np.ndarray, seed: int) -> nn.Linear:
    """A logistic regression on standardised features, as a layer on the features as they are; its
    penalty is chosen by inner folds of slides.
    """
    from sklearn.linear_model import LogisticRegression  # seconds to load

    mean, spread = features.mean(axis=0), features.std(axis=0) + 1e-6
    strength = choose_strength(features, targets, slides, seed)
    model = LogisticRegression(C=strength, class_weight="balanced", max_iter=1000)
    model.fit((features - mean).astype(np.float64) / spread, targets)
    weight = model.coef_[0] / spread
    head = nn.Linear(len(weight), 2)
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(np.stack([np.zeros_like(weight), weight])))
        head.bias.copy_(torch.tensor([0.0, float(model.intercept_[0] - weight @ mean)]))
    return head


def open_study(config: Config, world: World) -> AtypicalStudy:
    """Read the crops and what the localiser says of its resolution.

    Raises:
        UserError: crops or a localiser that cannot be used.
    """
    mpp = config.target_mpp
    if config.localiser:
        mpp = load_localiser(config.localiser)[1]["mpp"]
    if not mpp or not 0.1 <= mpp <= 2:
        raise UserError(f"target_mpp={mpp}: expected 0.1 to 2 um per px")
    folder = Path(config.crops)
    crops = read_atypical_crops(folder / TABLE, folder / "patches")
    targets = np.array([int(crop.atypical) for crop in crops], np.int64)
    slides = np.array([crop.slide for crop in crops])
    return AtypicalStudy(config, world, crops, targets, slides, float(mpp))


def main(config: Config) -> int:
    """Train and test the folds, then train on all slides."""
    require_one_process("train_atypical", "on one device")
    world = init_distributed(config.device)
    study = open_study(config, world)
    inputs = {"table": sha256_file(Path(config.crops) / TABLE)}
    if config.localiser:
        inputs["localiser"] = digest_weights_file(config.localiser)
    run = open_run(config.output, config, world, inputs=inputs, overwrite=config.overwrite)
    if run.results is not None:
        logger.info("%s: finished already: %s", run.path, run.results["summary"])
        return 0
    given = (study.targets, study.slides, np.full(len(study.crops), ""))
    folds = make_folds(*given, config.folds, config.seed, CLASSES)
    results = test_folds(study, folds, run)
    model = study.train(np.arange(len(study.crops)))
    save_checkpoint(
        run.path / "checkpoint_best.pt",
        model=model.state_dict(),
        config=model.describe(),
        epoch=config.fine_tune.epochs,
    )
    run.finish(results)
    logger.info("%s: %s", run.path, results["summary"])
    return 0


def test_folds(study: AtypicalStudy, folds: list[Fold], run: Run) -> dict[str, Any]:
    """Scores of the network and of colour over all folds; also writes atypical.csv."""
    config, made_from = study.config, {"run": sha256_file(run.path / "run.json")}
    network = []
    for fold in folds:
        path = name_file(run.path / "folds", "fold", fold.number)
        split = {"train": fold.train, "test": fold.test, **asdict(config.fine_tune)}
        probabilities = load_or_make(path, made_from | split, partial(study.test, fold))
        network.append(study.describe(fold, probabilities))
    colours = np.stack([colour_statistics(read_picture(crop.path)) for crop in study.crops])
    colour = []
    for fold in folds:
        known = (colours[fold.train], study.targets[fold.train], colours[fold.test])
        probabilities, _ = linear_probe(*known, study.slides[fold.train], config.seed)
        colour.append(study.describe(fold, probabilities))
    write_scores(run.path / "atypical.csv", study, network)
    scores = [score_runs(runs, config.resamples, config.seed) for runs in (network, colour)]
    return summarise_scores(study, *scores)


def summarise_scores(study: AtypicalStudy, network: Score, colour: Score) -> dict[str, Any]:
    """results.json."""
    value, interval = (network.summary[f"balanced_accuracy_{name}"] for name in ("mean", "ci"))
    shown = f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else ""
    baseline = colour.summary["balanced_accuracy_mean"]
    return {
        "crops": len(study.crops),
        "atypical": int(study.targets.sum()),
        "slides": len(set(study.slides.tolist())),
        "network": dict(network.summary),
        "colour_statistics": dict(colour.summary),
        "difference": network.differences(colour),
        "summary": (f"balanced accuracy {value:.3f}{shown}, 33 colour numbers {baseline:.3f}"),
    }


def write_scores(path: Path, study: AtypicalStudy, runs: list[TilePredictions]) -> None:
    """The score of every crop by the network that has not seen its slide."""
    rows = []
    for run in runs:
        assert run.tiles is not None
        for index, score in zip(run.tiles, run.probabilities[:, 1], strict=True):
            crop = study.crops[index]
            row = {"crop": crop.path.name, "slide": crop.slide, "label": CLASSES[crop.atypical]}
            rows.append(row | {"fold": run.fold, "score": float(score)})
    write_csv(path, ("crop", "slide", "label", "fold", "score"), rows)


if __name__ == "__main__":
    launch(main, Config)
