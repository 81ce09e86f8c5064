"""One row per training script and way of training, for the tests that all of them share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image

from detection_kd.datasets.distillation import DistillationTiles, read_pairs
from patch_encoder.demo.pyramid import write_pyramid
from patch_encoder.models.encoders import build_encoder
from tests.detection_kd import d2vfm_runs, distillation_sets
from tests.detection_kd.detector_runs import SMALL_TRUNK, TINY, write_detection_sets
from tests.detection_kd.grading_runs import TINY as TINY_GRADER
from tests.detection_kd.grading_runs import train as train_grader
from tests.detection_kd.grading_runs import write_graded_set, write_ungraded
from tests.detection_kd.mitosis_runs import TINY as TINY_LOCALISER
from tests.detection_kd.mitosis_runs import write_mitosis_set, write_some_kept
from tests.mil.conftest import write_cohort
from tests.patch_encoder.prototypes.region_cohort import region_inputs
from tests.training_harness import Pair, Row

DETECTOR, D2VFM, MIL = "detection_kd.train_detector", "detection_kd.train_d2vfm", "mil.train"
MITOSIS = "detection_kd.train_mitosis"
RESOLUTION = "detection_kd.train_resolution_kd"
PRETRAIN, SLPD = "patch_encoder.pretrain_dino", "patch_encoder.pretrain_slpd"


# -- detection_kd.train_detector


def detection_inputs(folder: Path) -> list[str]:
    """Nine training and three validation images of 64 px; no pictures are drawn."""
    return [*write_detection_sets(folder), *TINY, "overlays=0"]


# group norm: two processes have no common batch statistics
DETECTOR_PAIR = Pair(
    settings=(
        "architecture.dropout=0",
        "architecture.box_refine=true",
        "architecture.two_stage=true",
        "epochs=1",
    ),
    alone=("accumulate=2",),
    close={"loss": 2e-3, "class*": 2e-3, "box*": 2e-3, "giou*": 2e-3},
    absolute=2e-4,
    first={"loss": 1e-5, "gradient_norm": 1e-3},
)

# two steps, the epoch, and a step of the second epoch that will be done again
DETECTOR_ROWS = [
    Row(
        "detector",
        DETECTOR,
        DETECTOR,
        detection_inputs,
        settings=(*SMALL_TRUNK, "epochs=6", "log_every=1", "lr=0.002"),
        kill_at=4,
        learns=("loss", 0.85),
        pair=DETECTOR_PAIR,
    ),
    Row(
        "detector with a moving average",
        DETECTOR,
        DETECTOR,
        detection_inputs,
        settings=("backbone=test_resnet", "norm=batch", "epochs=2", "ema=0.9"),
        kill_at=4,
    ),
]


# -- detection_kd.train_d2vfm


def pairs_inputs(folder: Path) -> list[str]:
    """24 pairs with a stored teacher, and a random backbone."""
    pairs = d2vfm_runs.write_pairs(folder / "pairs")
    backbone = d2vfm_runs.write_backbone(folder / "backbone.pt")
    arguments = d2vfm_runs.arguments(pairs, backbone, Path("unused"))
    return [value for value in arguments if not value.startswith("output=")]


def teacher_inputs(folder: Path) -> list[str]:
    """12 pairs whose stored features are those of a random timm network on the plain tiles; the
    network itself is the online teacher.
    """
    pairs, weights = distillation_sets.write_set(folder / "set"), folder / "vit.pth"
    backbone = d2vfm_runs.write_backbone(folder / "backbone.pt")
    torch.manual_seed(0)
    torch.save(timm.create_model("test_vit", num_classes=0).state_dict(), weights)
    write_features(pairs, "timm:test_vit", weights)
    paths = [f"dataset={pairs}", f"backbone={backbone}", f"teacher_weights={weights}"]
    device = ["device=cpu", "workers=0", "precision=fp32", "batch_size=4", "val_fraction=0.3"]
    return [*paths, *device, "epochs=2", "figures=false", "online_teacher=timm:test_vit"]


def write_features(root: Path, encoder_name: str, weights: Path) -> None:
    """Store an encoder's features of the plain tiles as those of the teacher."""
    encoder, pairs = build_encoder(encoder_name, str(weights)), read_pairs(root)
    plain = DistillationTiles(pairs, augment=False, seed=0)
    with torch.no_grad():
        for index, pair in enumerate(pairs):
            item = encoder.transform(plain[index][0].permute(1, 2, 0).numpy())
            torch.save(encoder.model(item[None])[0], pair.image.with_suffix(".pt"))


def same_files_in_the_cache(one: Path, two: Path) -> None:
    """Both processes filled one cache, which has the files of one process."""
    caches = [run.with_name(f"{run.name}_cache") for run in (one, two)]
    names = [sorted(path.name for path in cache.iterdir()) for cache in caches]
    assert names[0] == names[1] and len(names[0]) == 2


EVERY_SWITCH = (
    "epochs=3",
    "stages=[0,1]",
    "pooling=gem",
    "adapter=ln",
    "unfreeze=1",
    "unfreeze_lr=0.5",
    "ema=0.9",
    "loss=smooth_l1",
    "extra.distance=3",
    "extra.angle=5",
    "extra.contrastive=2",
    "loss_weight=0.5",
)
CACHED = ("augment=false", "scales=[1.0]", "cache=true", "batch_size=6", "loss_weight=0.05")
CACHED_TERMS = ("extra.distance=1", "extra.contrastive=1", "ema=0.5", "cache_dir={output}_cache")
AUGMENTED = ("augmentation.crop=true", "augmentation.colour=0.2", "augmentation.sizes=[32,40]")

D2VFM_ROWS = [
    Row(
        "student",
        D2VFM,
        D2VFM,
        pairs_inputs,
        settings=("epochs=4",),
        learns=("loss", 0.7),
        pair=Pair(("batch_size=6",), close={"loss": 1e-4}, torchrun=True),
    ),
    Row("student with every switch", D2VFM, D2VFM, pairs_inputs, EVERY_SWITCH, kill_at=1),
    # terms of pairs and triplets over the tiles of both processes, with the gradient of one
    Row(
        "student on cached features",
        D2VFM,
        D2VFM,
        pairs_inputs,
        resumes=False,
        pair=Pair(
            (*CACHED, *CACHED_TERMS),
            close=dict.fromkeys(
                ("loss", "loss_mse", "loss_distance", "loss_contrastive", "cosine", "r2"), 1e-3
            ),
            check=same_files_in_the_cache,
        ),
    ),
    # each process shows the teacher its own augmented tiles: those of one process, wherever they fall
    Row(
        "student of an online teacher",
        D2VFM,
        D2VFM,
        teacher_inputs,
        settings=(*AUGMENTED, "epochs=3"),
        kill_at=1,
        pair=Pair((*AUGMENTED, "extra.distance=1"), close={"loss": 1e-4}, weights=(1e-3, 1e-5)),
    ),
]


# -- detection_kd.train_mitosis


def mitosis_inputs(folder: Path) -> list[str]:
    """Ten cases with two fields each, and the small network with settings that learn in seconds."""
    return [*write_mitosis_set(folder), *TINY_LOCALISER]


def kept_inputs(folder: Path) -> list[str]:
    """The same, with a table of a filter that dropped, relabelled and weighted tiles."""
    inputs = mitosis_inputs(folder)
    return [*inputs, f"kept={write_some_kept(inputs, folder / 'kept')}"]


MITOSIS_ROWS = [
    Row(
        "mitosis localiser",
        MITOSIS,
        MITOSIS,
        mitosis_inputs,
        settings=("epochs=4",),
        kill_at=9,
        learns=("loss", 0.3),
        # every step has 8 tiles per process; the location term is a mean over positives of both
        pair=Pair(
            ("epochs=2", "location.kind=l2"),
            alone=("workers=1",),
            close={"loss": 1e-4, "bag_loss": 1e-4, "location_loss": 1e-4, "redrawn": 0.0},
            first={"loss": 1e-6},
            weights=(1e-2, 1e-3),
        ),
    ),
    # killed inside an epoch; workers, batch norm, and all that is drawn for a batch
    Row(
        "mitosis student with every switch",
        MITOSIS,
        MITOSIS,
        kept_inputs,
        settings=(
            "epochs=3",
            "workers=2",
            "network.norm=batch",
            "network.pooling=lse",
            "network.enlarged=true",
            "location.kind=lb",
            "location.margin=4",
            "augmentation.rotation=90",
            "augmentation.elastic=2",
            "augmentation.elastic_spacing=16",
            "augmentation.stain=0.05",
            "augmentation.colour=0.1",
            "stain=macenko",
            "stain_scope=tile",
            "overlap=0.25",
            "schedule=cosine",
            "warmup_steps=5",
            "clip_norm=1",
            "eval_every=2",
        ),
        kill_at=9,
    ),
]


# -- detection_kd.train_resolution_kd


def graded_inputs(folder: Path) -> list[str]:
    """Twelve slides with patches of three grades, and a small network."""
    return [*write_graded_set(folder), *TINY_GRADER]


def graded_teacher_inputs(folder: Path) -> list[str]:
    """The same, a teacher of them, and a student that sees a quarter of the pixels, and further
    patches without a grade.
    """
    inputs = graded_inputs(folder)
    teacher = train_grader(inputs, folder / "teacher", "epochs=2")
    inputs.append(write_ungraded(folder / "further"))
    return [*inputs, f"teacher_checkpoint={teacher}/checkpoint_best.pt", "ratio=2"]


EVERY_TERM = ("kd", "fm", "sr", "at", "grad_cam", "at_plus")
GRADED_TERMS = tuple(f"terms.{name}=1" for name in EVERY_TERM)

RESOLUTION_ROWS = [
    Row(
        "grading network",
        RESOLUTION,
        RESOLUTION,
        graded_inputs,
        settings=("epochs=5",),
        kill_at=9,
        learns=("loss", 0.6),
    ),
    # roots of means over the batches of both processes, with the gradient of one
    Row(
        "grading student with every term and switch",
        RESOLUTION,
        RESOLUTION,
        graded_teacher_inputs,
        settings=(
            *GRADED_TERMS,
            "epochs=3",
            "terms.temperature=2",
            "terms.level=-2",
            "network.removed_strides=1",
            "augmentation.rotation=20",
            "augmentation.scale=0.1",
            "augmentation.shift=0.05",
            "augmentation.stain=0.05",
            "augmentation.colour=0.1",
            "schedule=cosine",
            "warmup_steps=3",
            "clip_norm=1",
            "eval_every=2",
        ),
        kill_at=9,
        pair=Pair(
            (*GRADED_TERMS, "epochs=2"),
            close={"loss": 1e-4, "loss_*": 1e-3},
            first={"loss": 1e-6, "loss_*": 1e-5},
            weights=(1e-2, 1e-3),
        ),
    ),
    # enlarged as published; killed inside an epoch, the teacher's maps are computed again
    Row(
        "grading student with kept maps of its teacher",
        RESOLUTION,
        RESOLUTION,
        graded_teacher_inputs,
        settings=("terms.at_plus=10", "network.enlarged=true", "cache_teacher=true", "epochs=3"),
        kill_at=9,
    ),
]


# -- mil.train


def cohort_inputs(folder: Path) -> list[str]:
    """26 slides, whose first fold trains on 13: with 4 a step the last step has one bag, so that one
    of two processes has none.
    """
    cohort = write_cohort(folder / "cohort", slides=26)
    paths = [f"labels={cohort}/labels.csv", f"features={cohort}/bags"]
    return [*paths, "device=cpu", "folds=3", "training.lr=1e-3", "training.save_every=2"]


LONG = ("training.epochs=30", "training.min_epochs=30")
MIL_PAIR = ("training.accumulate=4", "dropout=0.0", "training.epochs=2", "training.min_epochs=1")

MIL_ROWS = [
    # one epoch beyond the last checkpoint
    Row(
        "slide classifier",
        MIL,
        "mil.training.engine",
        cohort_inputs,
        settings=("model=abmil", *LONG),
        kill_at=3,
        learns=("train_loss", 0.7),
        pair=Pair(MIL_PAIR, close={"train_loss": 1e-5}, weights=(1e-4, 1e-6)),
    ),
    Row(
        "slide classifier in accumulated steps",
        MIL,
        "mil.training.engine",
        cohort_inputs,
        settings=("model=mean", "standardize=true", "training.accumulate=4", *LONG),
        kill_at=3,
    ),
]

# -- patch_encoder.pretrain_dino


def slides_inputs(folder: Path) -> list[str]:
    """Six slides of smooth colours in two sub-datasets, each with 25 corners in a .npy file beside
    it, and a network of 60,000 parameters.
    """
    rng = np.random.default_rng(0)
    corners = np.stack(np.meshgrid(range(0, 160, 32), range(0, 160, 32)), -1).reshape(-1, 2)
    for number in range(6):
        place = folder / "corpus" / f"site{number % 2}"
        place.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 255, (10, 10, 3), dtype=np.uint8))
        picture = np.asarray(coarse.resize((192, 192), Image.Resampling.BICUBIC))
        write_pyramid(place / f"s{number}.tiff", picture, 0.5, "a slide")
        np.save(place / f"s{number}.npy", corners)
    network = ["network.arch=timm:test_vit", "network.drop_path=0.0", "network.out_dim=64"]
    network += ["network.hidden_dim=64", "network.bottleneck_dim=32"]
    views = ["tile_size=32", "views.global_size=32", "views.local_size=16", "views.local_number=2"]
    steps = ["batch_size=8", "epoch_tiles=96", "open_slides=2", "tiles_per_visit=4"]
    rates = ["training.lr=0.05", "training.warmup=0.5", "training.freeze_last_layer=0.5"]
    run = ["device=cpu", "precision=fp32", "workers=0", "shuffle.grid=2", "log_every=1"]
    return [f"slides={folder}/corpus", *network, *views, *steps, *rates, *run]


PRETRAIN_PAIR = Pair(
    ("epochs=2", "epoch_tiles=48", "pyramid.factor=2", "pyramid.teacher=true"),
    alone=("accumulate=2", "workers=1"),
    close={"loss": 1e-4, "kl": 1e-3},
    first={"loss": 1e-6, "gradient_norm": 1e-4},
    # a key's bias has no gradient but rounding, which AdamW makes a step of
    weights=(1e-2, 1e-3),
)

PRETRAIN_ROWS = [
    Row(
        "patch encoder by self-distillation",
        PRETRAIN,
        PRETRAIN,
        slides_inputs,
        settings=("epochs=4",),
        kill_at=14,
        learns=("kl", 0.75),
        pair=PRETRAIN_PAIR,
        checkpoints=("checkpoint_last.pt",),
    ),
    # killed inside an epoch, with workers and a checkpoint after every step
    Row(
        "patch encoder with every switch",
        PRETRAIN,
        PRETRAIN,
        slides_inputs,
        settings=(
            "epochs=3",
            "epoch_tiles=48",
            "workers=2",
            "save_minutes=0",
            "accumulate=2",
            "pyramid.factor=2",
            "network.drop_path=0.2",
            "objective.targets=sinkhorn",
            "objective.koleo=0.1",
            "training.clip_each=false",
            "mpps=[0.5,1.0]",
        ),
        kill_at=16,
        checkpoints=("checkpoint_last.pt",),
    ),
]


# -- patch_encoder.pretrain_slpd

# steps of four regions, of which a process has two: in some of them it has none of a slide that is
# clustered
SLPD_PAIR = Pair(
    ("epochs=2", "batch_size=4", "prototypes.start_epoch=0", "prototypes.neighbours=2"),
    alone=("accumulate=2",),
    close={"loss": 1e-3, "intra*": 1e-3, "inter*": 1e-3},
    first={"loss": 1e-6, "gradient_norm": 1e-4},
    weights=(1e-2, 1e-3),
)

SLPD_ROWS = [
    Row(
        "region encoder by slide prototypes",
        SLPD,
        SLPD,
        region_inputs,
        settings=("epochs=4",),
        kill_at=15,
        learns=("dino", 0.95),
        pair=SLPD_PAIR,
        checkpoints=("checkpoint_last.pt",),
    ),
    # killed inside an epoch, with a checkpoint after every step
    Row(
        "region encoder with every switch",
        SLPD,
        SLPD,
        region_inputs,
        settings=(
            "epochs=4",
            "save_minutes=0",
            "accumulate=2",
            "store=ram",
            "standardise=slide",
            "network.drop_path=0.2",
            "views.symmetries=eight",
            "views.tile_dropout=0.1",
            "views.channel_dropout=0.1",
            "prototypes.every=2",
            "prototypes.target=greedy",
            "prototypes.cluster_view=center14",
            "prototypes.centre=slide",
            "losses.skip_first_view=true",
            "losses.ramp=1",
        ),
        kill_at=25,
        checkpoints=("checkpoint_last.pt",),
    ),
]

ROWS = [
    *DETECTOR_ROWS,
    *D2VFM_ROWS,
    *MITOSIS_ROWS,
    *RESOLUTION_ROWS,
    *MIL_ROWS,
    *PRETRAIN_ROWS,
    *SLPD_ROWS,
]
