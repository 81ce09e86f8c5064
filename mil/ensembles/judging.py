"""One subject after the other through the models: bags read ahead, numbers kept in a record each,
so that a cohort that was interrupted goes on where it was.

`predicted/<subject>.json` holds the numbers of every model and what they were made from: digests of
the weights and of the bags. Cuts and calibration are applied when the tables are made.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mil.datasets.bags import Sample
from mil.datasets.case_bags import join_bags
from mil.datasets.covariates import Cells
from mil.ensembles.classifier import Classifier
from mil.ensembles.subjects import Subject
from mil.training.bag_record import read_tiling
from mil.training.prediction import WHOLE_BYTES
from patch_encoder.bags.bag import Bag, open_bag
from patch_encoder.cohort.failures import Failures
from wsi_common.errors import UserError
from wsi_common.files import read_json, write_json
from wsi_common.memory import is_out_of_memory
from wsi_common.progress import progress
from wsi_common.provenance import can_reuse

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pending:
    """A subject whose bags can be used.

    Attributes:
        subject: slide or case.
        files: slide id -> bag file.
        digests: slide id -> digest of its bag.
        tiles: in all bags.
        covariates: column -> cell; None for models without.
    """

    subject: Subject
    files: Mapping[str, Path]
    digests: Mapping[str, str]
    tiles: int
    covariates: Cells | None = None

    def open(self) -> dict[str, Bag]:
        """Slide id -> bag, features on disk."""
        return {slide: open_bag(file) for slide, file in self.files.items()}


def open_subjects(
    classifier: Classifier,
    subjects: Sequence[Subject],
    files: Mapping[str, Path],
    failures: Failures,
    unnamed: bool,
    covariates: Mapping[str, Cells],
) -> list[Pending]:
    """Open the bags of all subjects; those that cannot be used are listed.

    Args:
        classifier: whose encoder the bags have to be of.
        subjects: slides or cases.
        files: slide id -> bag file.
        failures: gets the others.
        unnamed: take bags that do not say which encoder made them.
        covariates: slide id -> column -> cell; empty for models without.

    Raises:
        UserError: not one subject is left; the first one's error, and how many more there are.
    """
    found, odd = [], []
    known = [tiling for m in classifier.members for tiling in m.config["bags"]["tilings"]]
    for subject in progress(subjects, "bags", len(subjects), "slides"):
        try:
            absent = [slide for slide in subject.slides if slide not in files]
            if absent:
                raise UserError(f"expected a bag of slide {absent[0]}, found none")
            own = {slide: files[slide] for slide in subject.slides}
            digests, tiles = {}, 0
            for slide, file in own.items():
                bag = open_bag(file)
                classifier.check_bag(slide, bag, unnamed=unnamed)
                digests[slide] = bag.digest()
                tiles += len(bag)
                if is_tiled_otherwise(bag, known):
                    odd.append((slide, read_tiling(bag)))
            cells = covariates.get(subject.slides[0])
            found.append(Pending(subject, own, digests, tiles, cells))
        except (UserError, OSError) as error:
            failures.add(subject.name, str(error))
    if subjects and not found:
        more = f" ({len(subjects) - 1} more failed)" if len(subjects) > 1 else ""
        raise UserError(f"{failures.rows[0]['error']}{more}")
    if odd:
        line = "predict: %d slides were tiled otherwise than in training, %s: slide %s has %s"
        logger.warning(line, len(odd), known[0], *odd[0])
    return found


def is_tiled_otherwise(bag: Bag, known: Sequence[Mapping[str, float]]) -> bool:
    """Whether a bag states another size or resolution of its tiles than all of the training's; what
    a bag does not state cannot differ.
    """
    tiling = read_tiling(bag)
    return bool(tiling) and all(known) and tiling not in known


def judge_all(
    classifier: Classifier,
    pending: Sequence[Pending],
    folder: Path,
    failures: Failures,
    *,
    overwrite: bool,
) -> dict[str, np.ndarray]:
    """Subject -> (M, V) numbers of the models, from their records or from their bags.

    Raises:
        UserError: a record was made by other models or from another bag, and may not be replaced.
    """
    found: dict[str, np.ndarray] = {}
    left = []
    for one in pending:
        path, wanted = folder / f"{one.subject.name}.json", describe_inputs(classifier, one)
        if is_done(path, wanted, overwrite):
            found[one.subject.name] = read_record(path, classifier)
        else:
            left.append(one)
    read = read_ahead(left, lambda one: read_samples(one, classifier))
    for one, result in progress(read, "predict", len(left), "slides or cases"):
        name = one.subject.name
        try:
            samples = result.result()
            values = pool(classifier, classifier.predict_samples(samples, one.covariates))
            if not np.isfinite(values).all():
                raise UserError(f"{name}: expected finite predictions, found others")
        except (UserError, OSError) as error:
            failures.add(name, str(error))
            continue
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            failures.add(name, f"expected memory for {one.tiles} tiles, found none; use device=cpu")
            continue
        members = zip(classifier.members, values.tolist(), strict=True)
        record = {"made_from": describe_inputs(classifier, one), "tiles": one.tiles}
        record["models"] = {member.name: numbers for member, numbers in members}
        write_json(folder / f"{name}.json", record)
        found[name] = values
    return found


def describe_inputs(classifier: Classifier, one: Pending) -> dict[str, Any]:
    """What decides a subject's numbers."""
    weights = {member.name: member.digest for member in classifier.members}
    found = {"weights": weights, "bags": dict(one.digests)}
    return found | ({} if one.covariates is None else {"covariates": dict(one.covariates)})


def is_done(path: Path, wanted: Mapping[str, Any], overwrite: bool) -> bool:
    """Whether the record was made from the same.

    Raises:
        UserError: it was made from something else.
    """
    what, read = "a prediction of other models or inputs", "a slide's prediction"
    return can_reuse(
        path, lambda: read_json(path, read).get("made_from", {}), wanted, what, overwrite=overwrite
    )


def read_record(path: Path, classifier: Classifier) -> np.ndarray:
    """(M, V) numbers of a finished subject."""
    models = read_json(path, "a slide's prediction")["models"]
    return np.array([models[member.name] for member in classifier.members])


def read_samples(one: Pending, classifier: Classifier) -> list[Sample]:
    """The bags of a subject, small ones in memory; of a case that is one bag, that one.

    Raises:
        UserError: features that are not finite.
    """
    bags = []
    for bag in one.open().values():
        small = 4 * bag.shape[0] * bag.shape[1] <= WHOLE_BYTES
        bags.append(bag.load() if small else bag)
        bags[-1].check_finite()
    if classifier.unit == "case":
        return [Sample(one.subject.name, join_bags(one.subject.name, bags), 0)]
    return [Sample(slide, bag, 0) for slide, bag in zip(one.subject.slides, bags, strict=True)]


def pool(classifier: Classifier, values: np.ndarray) -> np.ndarray:
    """(M, V) of a subject from each model's numbers for its bags, (M, S, V)."""
    how = "max" if classifier.unit == "case_max" else "mean"
    pairs = zip(classifier.members, values, strict=True)
    return np.stack([member.task.pool_slides(own, how) for member, own in pairs])


def read_ahead(
    items: Sequence[Pending], read: Callable[[Pending], list[Sample]]
) -> Iterator[tuple[Pending, Future[list[Sample]]]]:
    """Each item with what is read of it, the next one while this one is used."""
    with ThreadPoolExecutor(1) as workers:
        waiting: list[tuple[Pending, Future[list[Sample]]]] = []
        for item in items:
            waiting.append((item, workers.submit(read, item)))
            if len(waiting) > 1:
                yield waiting.pop(0)
        yield from waiting
