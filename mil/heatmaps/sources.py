"""Which model judges which slide: a run directory's own test slides, or for a benchmark the fold that tests the slide."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.checkpoint import load_checkpoint
from common.errors import UserError, did_you_mean
from common.files import read_json
from mil.benchmark_folder import run_folders
from mil.job import read_predictions
from mil.metrics import Predictions


@dataclass(frozen=True)
class Judged:
    """A slide and what its model said.

    Attributes:
        label: true class, '' when it is not known.
        predicted: class at the validation threshold, '' where the run made no prediction.
        probabilities: of each class, in the order of Source.classes; empty without a prediction.
        fold: of the run; None without a prediction.
        split: test or val, '' for a slide outside both.
        checkpoint: weights of the model that judges it.
    """

    slide_id: str
    case_id: str
    label: str
    predicted: str
    probabilities: tuple[float, ...]
    fold: int | None
    split: str
    checkpoint: Path
    threshold: float | None

    @property
    def right(self) -> bool | None:
        """Whether the prediction is the label; None when one of them is not known."""
        return self.predicted == self.label if self.label and self.predicted else None


@dataclass(frozen=True)
class Source:
    """A run or a benchmark: class names, folder of bags, judged slides, test predictions of every fold, a name for people."""

    classes: tuple[str, ...]
    features: str
    slides: list[Judged]
    runs: list[Predictions]
    title: str


def read_run(folder: Path, split: str) -> tuple[tuple[str, ...], list[Judged], Predictions | None, str]:
    """(classes, slides of `split`, predictions on them, model's name) of one finished training.

    Raises:
        UserError: not finished, or no classifier.
    """
    results = read_json(folder / "results.json", "a finished run of mil.train or mil.benchmark")
    checkpoint = folder / "checkpoint_best.pt"
    config = load_checkpoint(checkpoint, "a slide classifier's checkpoint")["config"]
    if "class_names" not in config:
        raise UserError(f"{checkpoint}: expected a slide classifier with class names, found config keys {sorted(config)}")
    classes, threshold = tuple(config["class_names"]), results.get("threshold")
    table = folder / "predictions.csv"
    if not table.is_file():
        raise UserError(f"{table}: expected the run's predictions, found no file; train again")
    try:
        said, rows = read_predictions(table, classes, split, threshold)
    except IndexError:
        return classes, [], None, str(results["model"])
    except KeyError as error:
        raise UserError(
            f"{table}: expected columns slide_id, label, prob_<class> of a classifier, {error} is missing"
        ) from None
    slides = [
        Judged(
            row["slide_id"],
            row["case_id"],
            row["label"],
            row["predicted"],
            tuple(said.probabilities[index].tolist()),
            said.fold,
            split,
            checkpoint,
            threshold,
        )
        for index, row in enumerate(rows)
    ]
    return classes, slides, said, str(results["model"])


def from_run(folder: Path, features: str, bags: Mapping[str, Path], split: str) -> Source:
    """The slides of a run directory; `split=all` adds validation slides and every bag that the run did not predict."""
    classes, slides, said, model = read_run(folder, "val" if split == "val" else "test")
    if split == "all":
        slides += read_run(folder, "val")[1]
        known = {slide.slide_id for slide in slides}
        weights = folder / "checkpoint_best.pt"
        threshold = read_json(folder / "results.json", "a run's results").get("threshold")
        slides += [Judged(name, "", "", "", (), None, "", weights, threshold) for name in bags if name not in known]
    if not slides:
        raise UserError(f"{folder}: expected {split} slides in predictions.csv, found none; use split=val or split=all")
    return Source(classes, features, slides, [said] if said is not None else [], model)


def from_benchmark(folder: Path, feature_set: str, model: str, seed: int | None) -> Source:
    """The test slides of every fold, each judged by the model that did not train on it."""
    summary = read_json(folder / "summary.json", "a benchmark's summary")
    name = _choice("feature_set", feature_set, list(summary["feature_sets"]), next(iter(summary["feature_sets"])))
    chosen = _choice("model", model, summary["models"], summary["headline"])
    grid = folder / "runs" / name / chosen
    folders = run_folders(folder, summary, name, chosen)
    seeds = sorted({_place(path)[0] for path in folders})
    if not folders or (seed is not None and seed not in seeds):
        raise UserError(f"{grid}: expected finished runs{f' of seed {seed}' if seed is not None else ''}, found seeds {seeds}")
    first = seeds[0] if seed is None else seed
    slides: list[Judged] = []
    runs: list[Predictions] = []
    for path in folders:
        if _place(path)[0] == first:
            _, found, said, _ = read_run(path, "test")
            slides += found
            runs += [said] if said is not None else []
    return Source(tuple(summary["classes"]), str(summary["features"][name]), slides, runs, f"{chosen} on {name}, seed {first}")


def _place(folder: Path) -> tuple[int, int]:
    seed, fold = folder.name.removeprefix("seed").split("_fold")
    return int(seed), int(fold)


def _choice(key: str, asked: str, known: Sequence[str], default: str) -> str:
    if asked and asked not in known:
        raise UserError(f"{key}={asked}: expected one of {', '.join(known)}; {did_you_mean(asked, known)}")
    return asked or default


def is_benchmark(folder: Path) -> bool:
    """Whether `mil.benchmark` wrote the folder (a run directory has a checkpoint of its own)."""
    return (folder / "summary.json").is_file() and not (folder / "checkpoint_best.pt").is_file()


def facts(slide: Judged, classes: Sequence[str]) -> dict[str, Any]:
    """What a page says about the slide's prediction, as plain values."""
    values: dict[str, Any] = {
        "slide": slide.slide_id,
        "case": slide.case_id,
        "label": slide.label,
        "predicted": slide.predicted,
    }
    values |= {"probabilities": dict(zip(classes, slide.probabilities, strict=False)), "fold": slide.fold, "split": slide.split}
    return values | {"right": slide.right, "threshold": slide.threshold}
