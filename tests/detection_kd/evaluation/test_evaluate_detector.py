"""Evaluating a detector: the training's own figures again, COCO results that pycocotools reads,
resuming, refusals.
"""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detection_kd import evaluate_detector, train_detector
from tests.helpers import run_two_processes
from wsi_common.checkpoint import load_checkpoint, save_checkpoint
from wsi_common.cli import run
from wsi_common.files import sha256_file

TINY = [
    "backbone=resnet18", "norm=group", "pretrained=false", "epochs=1", "batch_size=4", "workers=0",
    "lr=0.001",
    "precision=fp32", "device=cpu", "architecture.hidden_dim=32", "architecture.heads=2",
    "architecture.feedforward_dim=32",
    "architecture.encoder_layers=1", "architecture.decoder_layers=1", "architecture.queries=60",
    "architecture.levels=2",
    "augmentation.sizes=[48]", "augmentation.crop_sizes=[]", "augmentation.eval_size=48",
    "augmentation.max_size=64",
    "augmentation.pad_to=96",
]  # fmt: skip
# those of `finished`, which is made before any test asks for this, are rendered
pytestmark = pytest.mark.usefixtures("no_rendering")

IDS = [7, 2, 40]  # neither contiguous nor in order
NAMES = ["HSIL", "ASC", "none of these"]


def draw_set(folder: Path, name: str, count: int) -> Path:
    """`count` images of 64 x 56 px with boxes of two categories, the last image without any."""
    rng = np.random.default_rng(len(name))
    images, annotations = [], []
    for index in range(count):
        Image.fromarray(rng.integers(0, 255, (56, 64, 3), dtype=np.uint8)).save(
            folder / f"{name}_{index}.png"
        )
        images.append(
            {"id": 900 - index, "file_name": f"{name}_{index}.png", "width": 64, "height": 56}
        )
        for _ in range(int(index < count - 1) * rng.integers(6, 10)):
            # the size that boxes start with, so that some are hit from the beginning
            x, y, width, height = (
                int(v) for v in (*rng.integers(2, 46, 2), *rng.integers(6, 10, 2))
            )
            row = {
                "id": len(annotations) + 1,
                "image_id": 900 - index,
                "category_id": IDS[rng.integers(0, 2)],
                "iscrowd": 0,
            }
            annotations.append(row | {"bbox": [x, y, width, height], "area": width * height})
    path = folder / f"{name}.json"
    categories = [
        {"id": identifier, "name": label} for identifier, label in zip(IDS, NAMES, strict=True)
    ]
    path.write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories})
    )
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Training and validation set and a detector of one epoch, in `detector/`."""
    path = tmp_path_factory.mktemp("evaluation")
    sets = [
        f"train={draw_set(path, 'train', 4)}",
        f"val={draw_set(path, 'val', 5)}",
        f"images={path}",
    ]
    assert (
        run(train_detector.main, train_detector.Config, [*sets, *TINY, f"output={path}/detector"])
        == 0
    )
    return path


def keys(folder: Path, output: Path, *changes: str) -> list[str]:
    inputs = [
        f"detector={folder}/detector/checkpoint_best.pt",
        f"annotations={folder}/val.json",
        f"images={folder}",
    ]
    return [
        *inputs,
        f"output={output}",
        "workers=0",
        "device=cpu",
        "precision=fp32",
        "min_score=0.005",
        "overlays=3",
        *changes,
    ]


def evaluate(folder: Path, output: Path, *changes: str) -> int:
    return run(evaluate_detector.main, evaluate_detector.Config, keys(folder, output, *changes))


def read(path: Path) -> Any:
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def finished(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("out") / "evaluation"
    assert evaluate(folder, output) == 0
    return output


def test_the_validation_set_gives_the_figures_of_the_training(folder: Path, finished: Path) -> None:
    results, trained = read(finished / "results.json"), read(folder / "detector" / "results.json")
    assert trained.pop("epoch") == 1 and len(trained) > 10
    assert {name: results[name] for name in trained} == pytest.approx(trained)
    assert results["AP50"] > 0 and results["sensitivity@8"] > 0  # or the line above says nothing
    assert results["AP_ci"] is results["AP50_ci"] is None, "five images are too few"
    assert results["settings"]["eval_size"] == 48 and results["settings"]["max_size"] == 64
    boxes = read(folder / "val.json")["annotations"]
    assert (results["images"], results["boxes"]) == (5, len(boxes))
    assert results["images_per_second"] == pytest.approx(5 / results["seconds"], rel=0.05)
    assert results["detector_sha256"] == sha256_file(folder / "detector" / "checkpoint_best.pt")
    assert results["annotations_sha256"] == sha256_file(folder / "val.json")
    at_score = results["at_score"]
    assert list(at_score) == ["ASC", "HSIL", "none of these"]  # in the order of the ids
    assert sum(row["hits"] + row["misses"] for row in at_score.values()) == len(boxes)
    confusion = results["confusion"]
    assert confusion["classes"] == [*at_score, "background"]
    counts = np.array(confusion["annotated_by_detected"])
    assert counts[:3].sum() == len(boxes)
    assert np.diag(counts)[:3].tolist() == [row["hits"] for row in at_score.values()]
    assert counts[:, :3].sum() == sum(
        row["hits"] + row["false_positives"] for row in at_score.values()
    )


def test_results_of_another_detector_are_measured_alike(
    folder: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its own predictions, read back as any detector's, are worth what they were."""
    other = ("detector=", f"results={finished}/predictions.json")
    assert evaluate(folder, tmp_path / "e", *other) == 0
    own, found = read(finished / "results.json"), read(tmp_path / "e" / "results.json")
    for name in ("seconds", "images_per_second", "settings", "detector_sha256"):
        del own[name]
    assert found["results_sha256"] == sha256_file(finished / "predictions.json")
    for name, value in own.items():
        expected = value if isinstance(value, dict | str) else pytest.approx(value)
        assert found[name] == expected, name
    assert evaluate(folder, tmp_path / "e", *other) == 0  # finished
    for both in (f"results={finished}/predictions.json", "detector="):
        assert evaluate(folder, tmp_path / "b", both) == 2
        assert "give one of them" in capsys.readouterr().err


def test_classes_are_merged_in_annotations_and_detections(
    folder: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    merged = "class_map={HSIL: lesion, ASC: lesion, 'none of these': null}"
    assert evaluate(folder, tmp_path / "a", merged) == 0
    other = ("detector=", f"results={finished}/predictions.json")
    assert evaluate(folder, tmp_path / "b", merged, *other) == 0
    own, found = (read(tmp_path / name / "results.json") for name in "ab")
    assert list(own["at_score"]) == ["lesion"] == list(found["at_score"])
    assert own["AP"] == pytest.approx(found["AP"]) and own["at_score"] == found["at_score"]
    assert own["boxes"] == read(finished / "results.json")["boxes"]
    one = sum(row["hits"] for row in read(finished / "results.json")["at_score"].values())
    assert own["at_score"]["lesion"]["hits"] >= one > 0
    assert {row["category_id"] for row in read(tmp_path / "a" / "predictions.json")} == {2}
    assert evaluate(folder, tmp_path / "c", "class_map={HSILL: lesion}") == 2
    assert "HSIL" in capsys.readouterr().err
    # what a training merged, its checkpoint merges again
    chosen = changed(folder, tmp_path, config={"categories": ["lesion", "x", "y"]})
    assert evaluate(folder, tmp_path / "d", chosen) == 2


def test_pycocotools_reads_the_predictions_with_the_same_result(
    folder: Path, finished: Path
) -> None:
    rows = read(finished / "predictions.json")
    assert {row["image_id"] for row in rows} == {900, 899, 898, 897, 896} and {
        row["category_id"] for row in rows
    } <= set(IDS)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(folder / "val.json"))
        evaluation = COCOeval(truth, truth.loadRes(str(finished / "predictions.json")), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    results = read(finished / "results.json")
    assert evaluation.stats[:3] == pytest.approx(
        [results["AP"], results["AP50"], results["AP75"]], abs=1e-6
    )
    asc = evaluation.eval["precision"][:, :, evaluation.params.catIds.index(2), 0, -1].mean()
    assert asc == pytest.approx(results["AP/ASC"], abs=1e-6)


def test_score_and_precision_come_from_the_checkpoint(folder: Path, tmp_path: Path) -> None:
    own = load_checkpoint(folder / "detector" / "checkpoint_best.pt")["config"]
    assert own["precision"] == "fp32" and own["field"]["resize"] == pytest.approx(48 / 64, abs=0.3)
    chosen = changed(
        folder, tmp_path, config={"precision": "bf16", "operating_point": {"min_score": 0.0123}}
    )
    asked = ["min_score=auto", "precision=auto", "overlays=0", chosen]
    assert evaluate(folder, tmp_path / "out", *asked) == 0
    results = read(tmp_path / "out" / "results.json")
    assert results["min_score"] == 0.0123 and results["settings"]["precision"] == "bf16"


def test_pictures_are_there_and_open(finished: Path) -> None:
    names = {path.name for path in finished.iterdir() if path.suffix == ".png"}
    assert names == {"precision_recall.png", "froc.png", "confusion.png"}
    for path in [*finished.glob("*.png"), *finished.glob("overlays/*.jpg")]:
        with Image.open(path) as image:
            image.load()
            assert min(image.size) > 300
    assert len(list((finished / "overlays").iterdir())) == 3
    assert {path.stem for path in (finished / "overlays").iterdir()} <= {
        "900",
        "899",
        "898",
        "897",
        "896",
    }


@pytest.mark.process
def test_finished_work_is_left_alone_and_other_settings_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(folder, tmp_path / "e") == 0
    stamp = (tmp_path / "e" / "predictions.json").stat().st_mtime_ns
    assert evaluate(folder, tmp_path / "e") == 0
    assert (
        evaluate(folder, tmp_path / "e", "eval_size=48") == 0
    )  # what the checkpoint says, said again
    assert (tmp_path / "e" / "predictions.json").stat().st_mtime_ns == stamp
    assert evaluate(folder, tmp_path / "e", "eval_size=40") == 2
    assert "config.eval_size 48 -> 40" in capsys.readouterr().err
    other = tmp_path / "other.json"
    other.write_text((folder / "val.json").read_text() + " ")
    assert evaluate(folder, tmp_path / "e", f"annotations={other}") == 2
    assert "inputs.annotations" in capsys.readouterr().err
    (tmp_path / "e" / "results.json").unlink()  # killed before its end
    assert evaluate(folder, tmp_path / "e") == 0 and (tmp_path / "e" / "results.json").is_file()
    assert evaluate(folder, tmp_path / "e", "overlays=1", "overwrite=true") == 0
    assert (
        len(list((tmp_path / "e" / "overlays").iterdir())) == 1
    )  # those of the other settings are gone


@pytest.mark.process
def test_two_processes_give_the_same_files(folder: Path, finished: Path, tmp_path: Path) -> None:
    run_two_processes("detection_kd.evaluate_detector", keys(folder, tmp_path / "two"))
    one, two = (read(path / "predictions.json") for path in (finished, tmp_path / "two"))
    assert [(row["image_id"], row["category_id"]) for row in one] == [
        (row["image_id"], row["category_id"]) for row in two
    ]
    assert np.allclose([row["bbox"] for row in one], [row["bbox"] for row in two], atol=1e-3)
    first, second = (read(path / "results.json") for path in (finished, tmp_path / "two"))
    for results in (first, second):
        del results["seconds"], results["images_per_second"]
    assert first == second
    assert sorted(p.name for p in (tmp_path / "two" / "overlays").iterdir()) == sorted(
        p.name for p in (finished / "overlays").iterdir()
    )


@pytest.mark.parametrize(
    ("most", "kept"), [(3, 3), (150, 150), (500, 180)]
)  # 60 queries of 3 classes
def test_as_many_detections_are_kept_as_asked_for(
    folder: Path, tmp_path: Path, most: int, kept: int
) -> None:
    assert evaluate(folder, tmp_path / "e", f"max_detections={most}", "overlays=0") == 0
    assert len(read(tmp_path / "e" / "predictions.json")) == 5 * kept
    assert not (tmp_path / "e" / "overlays").exists()


def test_one_class_for_all_categories(folder: Path, tmp_path: Path) -> None:
    sets = [
        f"train={folder}/train.json",
        f"val={folder}/val.json",
        f"images={folder}",
        "class_agnostic=true",
    ]
    assert (
        run(
            train_detector.main,
            train_detector.Config,
            [*sets, *TINY, f"output={tmp_path}/detector"],
        )
        == 0
    )
    assert evaluate(folder, tmp_path / "e", f"detector={tmp_path}/detector/checkpoint_best.pt") == 0
    results = read(tmp_path / "e" / "results.json")
    trained = read(tmp_path / "detector" / "results.json")
    assert results["AP"] == pytest.approx(trained["AP"]) and list(results["at_score"]) == ["lesion"]
    assert {row["category_id"] for row in read(tmp_path / "e" / "predictions.json")} == {2}


def changed(folder: Path, path: Path, **changes: Any) -> str:
    """The key of a copy of the detector with other training settings or weights."""
    content = load_checkpoint(folder / "detector" / "checkpoint_best.pt")
    content["config"] |= changes.get("config", {})
    weights = {name: value * changes.get("factor", 1) for name, value in content["model"].items()}
    save_checkpoint(path / "changed.pt", model=weights, config=content["config"], epoch=1)
    return f"detector={path}/changed.pt"


def test_what_cannot_be_evaluated_is_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = read(folder / "val.json")
    document["categories"][0]["name"] = "LSIL"
    (tmp_path / "renamed.json").write_text(json.dumps(document))
    training = str(folder / "detector")
    for change, expected in {
        f"annotations={tmp_path}/renamed.json": "['ASC', 'HSIL', 'none of these'], found ['ASC', "
        "'LSIL', 'none of these']",
        f"detector={folder}/detector/backbone.pt": "expected a detector checkpoint",
        "max_detections=0": "max_detections=0: expected at least 1",
        "overlays=-1": "overlays=-1: expected at least 0",
        "eval_size=-1": "eval_size=-1: expected at least 0",
        "iou=0": "iou=0.0",
        "group=^slide": "group='^slide': does not match image 'val_0.png'",
        "group=(": "group='(': expected a regular expression",
        "min_score=1.5": "min_score=1.5",
        f"output={training}": f"output={training}: expected a folder for the evaluation, found a "
        "training run",
        changed(
            folder, tmp_path, config={"training": {}}
        ): "holds no training settings to take sizes from",
    }.items():
        assert evaluate(folder, tmp_path / "e", change, "overwrite=true") == 2, change
        error = capsys.readouterr().err.strip()
        assert expected in error and error.startswith("error: ") and "\n" not in error, change
    assert not (tmp_path / "e").exists() and (folder / "detector" / "checkpoint_best.pt").is_file()
    assert (
        evaluate(
            folder,
            tmp_path / "e",
            changed(folder, tmp_path, config={"training": {}}),
            "eval_size=48",
            "max_size=64",
        )
        == 0
    )


def test_a_detector_of_nans_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(folder, tmp_path / "e", changed(folder, tmp_path, factor=float("nan"))) == 2
    assert "val_0.png: expected finite boxes and scores, found NaN" in capsys.readouterr().err
    assert not (tmp_path / "e" / "results.json").exists()
