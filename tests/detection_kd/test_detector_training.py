"""The training script: learns, resumes bit for bit, gives the same on two processes, and refuses
what cannot work.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from detection_kd import engine, train_detector
from detection_kd.datasets.detection import DetectionBatch
from detection_kd.models.backbone import Backbone, load_backbone
from detection_kd.models.deformable_detr import DeformableDETR, load_detector, place_detector
from detection_kd.models.deformable_transformer import Architecture, Detections
from detection_kd.models.given_trunk import wrap_trunk
from detection_kd.train_detector import Config, build_initial_model, has_stalled, main
from tests.detection_kd.detector_runs import SMALL_TRUNK, TINY, write_detection_sets
from wsi_common.cli import run
from wsi_common.config import load_config
from wsi_common.distributed import World
from wsi_common.errors import UserError

# those of `finished`, which is made before any test asks for this, are rendered
pytestmark = pytest.mark.usefixtures("no_rendering")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments that name a tiny training and validation set."""
    return write_detection_sets(tmp_path_factory.mktemp("detection"))


def arguments(inputs: list[str], output: Path, *changes: str) -> list[str]:
    return [*inputs, *TINY, f"output={output}", *changes]


def metrics(output: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [
        {
            name: value
            for name, value in line.items()
            if name != "train_seconds" and not name.startswith("time/")
        }
        for line in lines
    ]


@pytest.fixture(scope="module")
def finished(inputs: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of two uninterrupted epochs."""
    output = tmp_path_factory.mktemp("run") / "detector"
    assert run(main, Config, arguments(inputs, output)) == 0
    return output


def test_run_directory_is_complete(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    assert results["epoch"] in (1, 2) and {"AP", "AP50", "AP75", "AR"} <= set(results)
    lines = metrics(finished)
    assert [line["epoch"] for line in lines if "step" not in line] == [1, 2]
    assert [line["step"] for line in lines if "step" in line] == [0, 1, 2, 3]
    assert (finished / "precision_recall.png").stat().st_size > 5_000 and (
        finished / "froc.png"
    ).stat().st_size > 5_000
    assert len(list((finished / "overlays").glob("*.jpg"))) == 3
    model, config = load_detector(finished / "checkpoint_best.pt")
    assert config["categories"] == ["lesion"] and config["training"]["lr"] == 0.001
    for name in ("backbone.pt", "checkpoint_best.pt"):
        trunk, description = load_backbone(finished / name)
        assert (description["name"], description["norm"]) == ("resnet18", "group")
        assert all(
            torch.equal(value, trunk.state_dict()[key])
            for key, value in model.backbone.state_dict().items()
        )


def test_finished_run_is_left_alone_and_other_settings_refused(
    finished: Path, inputs: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in finished.glob("*.pt")}
    assert run(main, Config, arguments(inputs, finished)) == 0
    assert before == {path.name: path.stat().st_mtime_ns for path in finished.glob("*.pt")}
    assert run(main, Config, arguments(inputs, finished, "lr=0.002")) == 2
    assert "config.lr 0.001 -> 0.002" in capsys.readouterr().err


@pytest.mark.process
def test_moving_average_is_what_is_kept(inputs: list[str], tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    assert run(main, Config, arguments(inputs, whole, *SMALL_TRUNK, "ema=0.9")) == 0
    last, best = (
        torch.load(whole / name, weights_only=True)
        for name in ("checkpoint_last.pt", "checkpoint_best.pt")
    )
    assert last["average"]["n_averaged"] == 4
    if best["epoch"] == last["epoch"]:
        assert all(
            torch.equal(value, last["average"][f"module.{name}"])
            for name, value in best["model"].items()
        )
    assert any(not torch.equal(value, last["model"][name]) for name, value in best["model"].items())
    assert run(main, Config, arguments(inputs, tmp_path / "bad", "ema=1")) == 2


@pytest.mark.process
def test_accumulated_parts_equal_the_whole_batch(inputs: list[str], tmp_path: Path) -> None:
    changes = (
        *SMALL_TRUNK,
        "architecture.dropout=0",
        "architecture.box_refine=true",
        "architecture.two_stage=true",
        "epochs=1",
    )
    for parts in (1, 4):
        assert (
            run(
                main,
                Config,
                arguments(inputs, tmp_path / str(parts), *changes, f"accumulate={parts}"),
            )
            == 0
        )
    whole, split = (metrics(tmp_path / str(parts)) for parts in (1, 4))
    assert len(split) == len(whole) == 3
    for name in ("loss", "class", "box", "giou", "class_enc", "gradient_norm"):
        assert split[0][name] == pytest.approx(whole[0][name], rel=1e-4), name
    assert split[1]["loss"] == pytest.approx(whole[1]["loss"], rel=1e-2)
    assert run(main, Config, arguments(inputs, tmp_path / "bad", "accumulate=3")) == 2


@pytest.mark.process
def test_every_switch_trains_and_its_detector_comes_back(inputs: list[str], tmp_path: Path) -> None:
    two_stage = ("architecture.box_refine=true", "architecture.two_stage=true")
    cases = {
        "groups": (*SMALL_TRUNK, "architecture.groups=2"),
        "mixed": (
            *SMALL_TRUNK,
            *two_stage,
            "architecture.mixed_selection=true",
            "architecture.groups=3",
            "architecture.denoising=6",
        ),
        "bf16": (*SMALL_TRUNK, "precision=bf16", *two_stage, "architecture.denoising=4"),
        "dilation": (
            "dilation=true",
            "layer_decay=0.8",
            "architecture.queries=320",
            "max_detections=310",
        ),
    }
    for name, changes in cases.items():
        assert run(main, Config, arguments(inputs, tmp_path / name, "epochs=1", *changes)) == 0, (
            name
        )
        lines = metrics(tmp_path / name)
        assert all(math.isfinite(value) for line in lines for value in line.values())
        assert ("class_dn" in lines[0]) is any("denoising" in change for change in changes)
        model, _ = load_detector(tmp_path / name / "checkpoint_best.pt")
        found = model.eval()(torch.randn(1, 3, 64, 64), torch.zeros(1, 64, 64, dtype=torch.bool))
        assert (
            found.logits.shape[2] == (320 if name == "dilation" else 5) and found.denoised is None
        )


def test_times_of_every_part_are_logged(finished: Path) -> None:
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    parts = {
        "time/data",
        "time/forward",
        "time/matching",
        "time/loss",
        "time/backward",
        "time/step",
    }
    for line in lines:
        assert parts | {"time/images_per_second", "time/data_share"} <= line.keys()
        total = sum(line[part] for part in parts)
        assert line["time/images_per_second"] == pytest.approx(4 / total)
        assert line["time/data_share"] == pytest.approx(line["time/data"] / total)


@pytest.mark.process
def test_training_goes_on_from_a_whole_detector(
    finished: Path, inputs: list[str], tmp_path: Path
) -> None:
    source = finished / "checkpoint_best.pt"
    given = torch.load(source, weights_only=True)["model"]
    config = config_of(inputs, tmp_path, f"detector={source}", "architecture.queries=8", "freeze=3")
    # what is not in the file keeps the random numbers that a network of the same seed starts with
    fresh = config_of(inputs, tmp_path, "architecture.queries=8")
    before = build_seeded(fresh, ["lesion"]).query_embed.weight[5:]
    model = build_seeded(config, ["lesion"])
    own = model.state_dict()
    assert all(
        torch.equal(value, own[name])
        for name, value in given.items()
        if name != "query_embed.weight"
    )
    assert torch.equal(own["query_embed.weight"][:5], given["query_embed.weight"])
    assert torch.equal(own["query_embed.weight"][5:], before)
    assert (
        not model.backbone.layer2[0].conv1.weight.requires_grad
        and model.backbone.layer3[0].conv1.weight.requires_grad
    )
    heads = {
        name: value
        for name, value in build_seeded(fresh, ["normal", "lesion"]).state_dict().items()
        if name.startswith("class_embed")
    }
    other = build_seeded(config, ["normal", "lesion"]).state_dict()
    assert heads and all(torch.equal(value, other[name]) for name, value in heads.items())
    assert (
        run(main, Config, arguments(inputs, tmp_path / "on", f"detector={source}", "epochs=1")) == 0
    )
    both = (f"detector={source}", f"weights={source}")
    assert run(main, Config, arguments(inputs, tmp_path / "both", *both)) == 2
    assert (
        run(
            main,
            Config,
            arguments(inputs, tmp_path / "width", both[0], "architecture.feedforward_dim=48"),
        )
        == 2
    )
    assert run(main, Config, arguments(inputs, tmp_path / "freeze", both[0], "freeze=6")) == 2


def loss_of(
    detections: Detections, batch: DetectionBatch
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss as a step computes it."""
    return engine.compute_batch_loss(
        detections,
        batch,
        engine.match_batch(detections, batch),
        engine.count_boxes([batch], torch.device("cpu")),
    )


def test_diverged_network_stops_with_that_error(
    inputs: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def diverged(
        model: nn.Module, images: torch.Tensor, padding: torch.Tensor, annotated: object
    ) -> Detections:
        shape = (2, len(images), 5)
        return Detections(torch.full((*shape, 1), float("nan")), torch.rand(*shape, 4))

    monkeypatch.setattr(DeformableDETR, "forward", diverged)
    assert run(main, Config, arguments(inputs, tmp_path / "run")) == 2
    error = capsys.readouterr().err
    assert (
        "images [" in error and "found nan in class_0, class" in error and "look at these" in error
    )


def build_seeded(config: Config, categories: list[str]) -> DeformableDETR:
    """The detector that a training starts from, drawn from a fixed seed."""
    torch.manual_seed(3)
    return build_initial_model(config, categories)


def config_of(inputs: list[str], tmp_path: Path, *changes: str) -> Config:
    return load_config(Config, arguments(inputs, tmp_path / "run", *changes))


def test_batch_norm_on_many_cpu_processes_is_refused(inputs: list[str], tmp_path: Path) -> None:
    config = config_of(inputs, tmp_path, "norm=batch")
    with pytest.raises(
        UserError, match="norm=batch: expected CUDA with 2 processes, found cpu; set norm=group"
    ):
        model = build_initial_model(config, ["lesion"])
        place_detector(model, World(0, 2, torch.device("cpu")), compile=False)


def test_settings_that_cannot_work_are_user_errors(
    inputs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused = {
        (
            "accumulate=3",
        ): "batch_size=4: expected a multiple of the 1 processes times accumulate=3",
        (
            "accumulate=0",
        ): "batch_size=4: expected a multiple of the 1 processes times accumulate=0",
        ("batch_size=10",): "batch_size=10: expected at most the 9 training images",
    }
    for changes, message in refused.items():
        assert run(main, Config, arguments(inputs, tmp_path / "run", *changes)) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="norm=frozen: expected trained weights"):
        build_initial_model(config_of(inputs, tmp_path, "norm=frozen"), ["lesion"])
    torch.save(Backbone("resnet34", "batch").state_dict(), tmp_path / "resnet34.pt")
    with pytest.raises(UserError, match="weights of another architecture"):
        config = config_of(inputs, tmp_path, f"weights={tmp_path / 'resnet34.pt'}")
        build_initial_model(config, ["lesion"])


def test_given_weights_are_used_and_their_stem_kept(inputs: list[str], tmp_path: Path) -> None:
    torch.save(Backbone("resnet18", "batch").state_dict(), tmp_path / "resnet18.pt")
    weights = torch.load(tmp_path / "resnet18.pt", weights_only=True)
    for freeze in (2, 0):
        config = config_of(
            inputs,
            tmp_path,
            "norm=frozen",
            f"weights={tmp_path / 'resnet18.pt'}",
            f"freeze={freeze}",
        )
        trunk = build_initial_model(config, ["lesion"]).backbone
        assert torch.equal(trunk.layer4[0].conv1.weight, weights["layer4.0.conv1.weight"])
        assert (
            trunk.conv1.weight.requires_grad is (freeze == 0)
            and trunk.layer2[0].conv1.weight.requires_grad
        )
    scratch = build_initial_model(config_of(inputs, tmp_path), ["lesion"])
    assert all(parameter.requires_grad for parameter in scratch.parameters())


def test_parameter_groups_are_the_published_ones() -> None:
    model = DeformableDETR(
        Backbone("resnet18", "frozen"), 1, Architecture(32, 2, 32, 1, 1, queries=3)
    )
    model.backbone.freeze(2)
    groups = engine.make_parameter_groups(model, 2e-4, 2e-5)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    transformer, backbone, slow = ({names[id(p)] for p in group["params"]} for group in groups)
    decayed = engine.make_parameter_groups(model, 2e-4, 2e-5, layer_decay=0.5)
    rates = {
        names[id(p)].split(".")[1]: group["lr"] for group in decayed[1:-1] for p in group["params"]
    }
    assert rates == pytest.approx({"layer4": 2e-5, "layer3": 1e-5, "layer2": 0.5e-5})
    assert all(
        name.startswith("backbone.layer") and not name.startswith("backbone.layer1")
        for name in backbone
    )
    assert {name.split(".")[-2] for name in slow} == {"reference_points", "sampling_offsets"}
    assert [group["lr"] for group in groups] == pytest.approx([2e-4, 2e-5, 2e-5])
    assert len(transformer) + len(backbone) + len(slow) == sum(
        p.requires_grad for p in model.parameters()
    )


def test_post_processing_keeps_the_best_pairs_in_pixels() -> None:
    logits = torch.tensor([[[[2.0, -3.0], [0.0, 1.0]]]])
    boxes = torch.tensor([[[[0.5, 0.5, 0.2, 0.4], [0.9, 0.5, 0.4, 0.2]]]])
    ((found, scores, labels),) = engine.post_process(Detections(logits, boxes), [(200, 100)], 3)
    assert labels.tolist() == [0, 1, 0]
    np.testing.assert_allclose(scores, torch.tensor([2.0, 1.0, 0.0]).sigmoid())
    np.testing.assert_allclose(
        found, [[80, 30, 120, 70], [140, 40, 200, 60], [140, 40, 200, 60]], atol=1e-4
    )


def test_loss_uses_every_box_and_both_stages() -> None:
    torch.manual_seed(0)
    detections = Detections(
        torch.randn(2, 2, 3, 1), torch.rand(2, 2, 3, 4), torch.randn(2, 6, 1), torch.rand(2, 6, 4)
    )
    boxes = [torch.rand(2, 4), torch.zeros(0, 4)]
    labels = [torch.zeros(2, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)]
    batch = DetectionBatch(
        torch.zeros(2, 3, 8, 8), torch.zeros(2, 8, 8, dtype=torch.bool), boxes, labels, [0, 1]
    )
    loss, terms = loss_of(detections, batch)
    assert {
        f"{kind}{suffix}" for kind in ("class", "box", "giou") for suffix in ("", "_0", "_enc")
    } == set(terms)
    twice = DetectionBatch(
        batch.images,
        batch.padding,
        [boxes[0].repeat(2, 1), boxes[1]],
        [labels[0].repeat(2), labels[1]],
        [0, 1],
    )
    assert (
        loss_of(detections, twice)[1]["class"] < terms["class"]
    )  # divided by four boxes instead of two
    weights = {"class": 2, "box": 5, "giou": 2}
    torch.testing.assert_close(
        loss, sum(weights[name.partition("_")[0]] * value for name, value in terms.items())
    )


def test_patience_counts_evaluations_since_the_best() -> None:
    every = {"output": "", "train": "", "val": "", "images": "", "epochs": 9, "eval_every": 2}
    config = Config(**every, patience=2)
    assert [has_stalled(config, epoch, {"epoch": 2}) for epoch in range(2, 8)] == [
        *[False] * 4,  # epoch 4 is the first evaluation without a better one
        True,  # after epoch 6
        True,
    ]
    assert not has_stalled(config, 3, {})  # one evaluation, none of them good
    assert has_stalled(config, 9, {"epoch": 6})  # the last epoch is always evaluated
    assert not any(has_stalled(Config(**every), epoch, {"epoch": 2}) for epoch in range(10))


@pytest.mark.process
def test_stopped_early_with_merged_classes_repeats_and_stain(
    inputs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All further switches at once; a run that was interrupted stops where the whole one does."""
    ranks = iter([0.5, 0.4, 0.4, 0.9, 0.4, 0.4])

    def measure(*arguments: object) -> dict[str, float]:
        return {"AP": next(ranks)}

    monkeypatch.setattr(train_detector, "average_precision", measure)
    changes = [
        *SMALL_TRUNK, "epochs=5", "patience=2", "class_map={lesion: cell}", "augmentation.stain=0.1",
        "repeat_threshold=1",
    ]  # fmt: skip
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run(main, Config, arguments(inputs, whole, *changes)) == 0
    assert [line["epoch"] for line in metrics(whole) if "AP" in line] == [1, 2, 3]
    assert json.loads((whole / "results.json").read_text())["AP"] == 0.5
    config = load_detector(whole / "checkpoint_best.pt")[1]
    assert config["categories"] == ["cell"]
    assert config["training"]["class_map"] == {"lesion": "cell"}
    # the same from the checkpoint after its last epoch: nothing is trained on
    (whole / "results.json").unlink()
    assert run(main, Config, arguments(inputs, whole, *changes)) == 0
    assert next(ranks) == 0.9 and not broken.exists()
    assert len([line for line in metrics(whole) if "AP" in line]) == 3


def test_a_trunk_given_as_an_object_is_trained(inputs: list[str], tmp_path: Path) -> None:
    class Maps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.steps = nn.ModuleList(nn.Conv2d(3, 8, s, stride=s) for s in (8, 16, 32))

        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
            return [step(x) for step in self.steps]

    trunk = wrap_trunk(Maps())
    before = trunk.body.steps[1].weight.clone()
    config = config_of(inputs, tmp_path, "epochs=1", "overlays=0")
    assert main(config, trunk) == 0
    assert not torch.equal(trunk.body.steps[1].weight, before)
    best = tmp_path / "run" / "checkpoint_best.pt"
    model, _ = load_detector(best, trunk=wrap_trunk(Maps()))
    assert torch.equal(model.backbone.body.steps[1].weight, trunk.body.steps[1].weight)
