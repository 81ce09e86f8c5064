"""Reads from a finished run which network it trained and which encoders that comes from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from studies.sharing.terms import Origin
from wsi_common.checkpoint import load_checkpoint
from wsi_common.errors import UserError

RANDOM = "random"


@dataclass(frozen=True)
class Kind:
    """What sort of network it is.

    Attributes:
        title: for people.
        task: the hub's name of the task, and tags.
        load: how it is loaded or used, one command or Python lines per entry.
    """

    title: str
    task: str
    tags: tuple[str, ...]
    load: tuple[str, ...]


CLASSIFIER = Kind(
    "slide classifier",
    "image-classification",
    ("multiple-instance-learning",),
    (
        "from mil import load_classifier",
        "prediction = load_classifier('<folder>').predict_bag(features, coords)",
    ),
)
STUDENT = Kind(
    "distilled tile encoder",
    "image-feature-extraction",
    ("knowledge-distillation",),
    ("bash tools/extract_student.sh student=<folder> slides=... coords=... output=...",),
)
DETECTOR = Kind(
    "lesion detector",
    "object-detection",
    ("deformable-detr",),
    ("bash tools/detect_slide.sh detector=<folder> slides=... coords=... output=...",),
)
LOCALISER = Kind(
    "mitosis localiser",
    "object-detection",
    ("mitosis", "weakly-supervised"),
    ("bash tools/detect_mitosis.sh localiser=<folder> slides=... output=...",),
)
GRADER = Kind(
    "grading network",
    "image-classification",
    ("grading",),
    ("bash tools/grade_slide.sh grader=<folder> slides=... output=...",),
)
ATYPICAL = Kind(
    "atypical-mitosis head",
    "image-classification",
    ("mitosis",),
    ("bash tools/detect_mitosis.sh atypical=<folder> localiser=... slides=... output=...",),
)
ENCODER = Kind(
    "tile encoder",
    "image-feature-extraction",
    ("self-supervised",),
    ("bash tools/extract_features.sh encoder=dino weights=<folder> slides=... coords=...",),
)
REGION_ENCODER = Kind(
    "region encoder",
    "image-feature-extraction",
    ("self-supervised",),
    ("bash tools/extract_regions.sh weights=<folder> regions=... output=...",),
)
KINDS = {
    "deformable_detr": DETECTOR,
    "weak_localiser": LOCALISER,
    "grading_network": GRADER,
    "atypical_head": ATYPICAL,
}


def find_kind(config: Mapping[str, Any]) -> Kind:
    """The sort of network that a checkpoint's description is of.

    Raises:
        UserError: none that is known here.
    """
    if "student" in config:
        return STUDENT
    if "bags" in config:
        return CLASSIFIER
    if "backbone" in config and "training" in config and "kind" not in config:
        return REGION_ENCODER if "region_tiles" in config["backbone"] else ENCODER
    if config.get("kind") in KINDS:
        return KINDS[config["kind"]]
    raise UserError(
        f"expected the run of a network, found a description with {', '.join(sorted(config)[:6])}"
    )


def find_origins(config: Mapping[str, Any], teacher: str = "") -> list[Origin]:
    """The encoders whose weights or outputs made a network.

    Args:
        config: of its checkpoint.
        teacher: name of a student's teacher, where its checkpoint does not say it.
    """
    training = config.get("training", {})
    found: list[Origin] = []
    if "student" in config:
        known = config["student"].get("teacher") or config.get("online_teacher") or teacher
        found.append(Origin(known, "outputs", "teacher"))
    for made in config.get("bags", {}).get("encoders", []):
        known = made.get("teacher") or made.get("encoder", "")
        found.append(Origin(known or teacher, "outputs", "tile encoder"))
    network = config.get("network", {})
    starts = (network.get("init", ""), training.get("network", {}).get("init", ""))
    starts += (training.get("init", ""), config.get("init", ""))
    names = {Path(name).name if Path(name).exists() else name for name in starts if name}
    found += [Origin(name, "weights", "initial weights") for name in sorted(names - {RANDOM})]
    if "region_tiles" in config.get("backbone", {}):
        found.append(Origin(config["backbone"].get("encoder", ""), "outputs", "tile encoder"))
    if config.get("kind") == "deformable_detr":
        found += _find_trunk(config, training)
    if training.get("teacher_checkpoint"):
        found += _follow(Path(training["teacher_checkpoint"]))
    if config.get("kind") == "atypical_head":
        found += find_origins(config["localiser"])
    return found


def _find_trunk(config: Mapping[str, Any], training: Mapping[str, Any]) -> list[Origin]:
    """A detector's trunk: a file that it started from, or timm's weights of its name."""
    files = [training[name] for name in ("detector", "weights") if training.get(name)]
    if files:
        return [Origin(Path(file).name, "weights", "initial weights") for file in files]
    if not training.get("pretrained", True):
        return []
    return [Origin(f"timm:{config['backbone']['name']}", "weights", "initial weights")]


def _follow(checkpoint: Path) -> list[Origin]:
    """The origins of a teacher that is a network of ours."""
    if not checkpoint.exists():
        return [Origin(checkpoint.name, "outputs", "teacher")]
    above = find_origins(load_checkpoint(checkpoint)["config"])
    return [Origin(origin.encoder, "outputs", "teacher's " + origin.role) for origin in above]
