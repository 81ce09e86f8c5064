"""A trained model goes to a hub and comes back as it was; what a licence forbids is not pushed, and
what only concerns those who trained is not in the folder.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from detection_kd.models.student import load_student
from mil import load_classifier, train
from patch_encoder.models.encoder_table import ENCODERS
from studies import pull_model, push_model
from studies.sharing.folder import hide_private, read_model
from studies.sharing.metrics import list_metrics
from studies.sharing.origins import find_kind, find_origins
from studies.sharing.terms import TERMS, Origin, choose_licence, find_licence, judge
from tests.mil.conftest import write_cohort
from tests.studies.fake_hub import FakeHub, running_hub
from tests.training_harness import assert_equal
from wsi_common.checkpoint import load_checkpoint, save_checkpoint
from wsi_common.cli import run
from wsi_common.errors import UserError
from wsi_common.files import sha256_file, write_json

REPO = "lab/cervix"
UNKNOWN = {"gpfm", "brow"}  # whose licence is on no card that the table knows


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    with running_hub() as started:
        yield started


@pytest.fixture
def classifier(tiny_benchmark: Path) -> Path:
    """The run of one fold of a benchmark."""
    return tiny_benchmark / "bench" / "runs" / "teacher" / "abmil" / "seed1_fold0"


def push(folder: Path, output: Path, *more: str) -> int:
    return run(push_model.main, push_model.Config, [f"run={folder}", f"output={output}", *more])


def pull(hub: FakeHub, output: Path, *more: str) -> int:
    keys = [f"repo={REPO}", f"output={output}", f"endpoint={hub.address}", *more]
    return run(pull_model.main, pull_model.Config, keys)


def read_card(folder: Path) -> tuple[dict[str, Any], str]:
    """Front matter and text of the card."""
    _, header, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(header), text


def test_a_classifier_goes_to_the_hub_and_comes_back(
    classifier: Path, hub: FakeHub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    there, back = tmp_path / "shared", tmp_path / "back"
    named = [f"repo={REPO}", f"endpoint={hub.address}", "licence=mit", "teacher=virchow"]
    with caplog.at_level(logging.INFO):
        assert push(classifier, there, *named, "data_statement=Two dozen drawn slides") == 0
    assert hub.private == {REPO: True}
    names = {"model.safetensors", "config.json", "README.md", "sha256.json"}
    assert hub.repos[REPO].keys() == names
    digest = sha256_file(there / "model.safetensors")
    assert digest in caplog.text
    assert pull(hub, back, f"sha256={digest}") == 0
    for name in names:
        assert (back / name).read_bytes() == (there / name).read_bytes()
    torch.manual_seed(0)
    features = torch.randn(5, 8)
    shutil.copy(classifier / "checkpoint_best.pt", tmp_path / "alone.pt")  # no predictions beside
    ours, theirs = (
        load_classifier(path, device="cpu").predict_bag(features)
        for path in (tmp_path / "alone.pt", back)
    )
    assert repr(theirs) == repr(ours), "probabilities, threshold and call"


def test_the_card_has_figures_with_the_intervals_of_the_run(
    classifier: Path, tmp_path: Path
) -> None:
    extra = tmp_path / "elsewhere"
    write_json(extra / "results.json", {"AP": 0.5, "AP_ci": [0.25, 0.75], "seed": 3})
    keys = ["upload=false", "licence=mit", "teacher=virchow", "title=Cervix"]
    assert push(classifier, tmp_path / "o", *keys, f"evaluations=[{extra}]") == 0
    header, text = read_card(tmp_path / "o")
    assert (header["license"], header["pipeline_tag"]) == ("mit", "image-classification")
    assert {"pathology", "virchow"} <= set(header["tags"])
    entry = header["model-index"][0]
    assert entry["name"] == "Cervix"
    test = next(part for part in entry["results"] if part["dataset"]["name"] == "test slides")
    auc = next(metric for metric in test["metrics"] if metric["type"] == "auc")
    measured = json.loads((classifier / "results.json").read_text())["test"]["auc"]
    assert auc["value"] == pytest.approx(measured, abs=1e-6)
    assert "args" not in auc, "six slides per class are too few"
    summary = json.loads((classifier.parents[3] / "summary.json").read_text())
    folds = summary["feature_sets"]["teacher"]["abmil"]
    low, high = folds["auc_ci"]
    shown = f"{folds['auc_mean']:.4g} | {low:.3f} to {high:.3f}"
    assert f"| all folds and seeds, 2 models | auc | {shown} |" in text
    assert "| elsewhere | AP | 0.5 | 0.250 to 0.750 |" in text and "| seed |" not in text
    assert "slides: 24:" in text and "`virchow`, Apache-2.0" in text


def test_the_intervals_of_a_single_run_draw_its_patients(tmp_path: Path) -> None:
    cohort = write_cohort(tmp_path / "cohort", slides=60)
    data = [f"labels={cohort}/labels.csv", f"features={cohort}/bags", "model=mean", "folds=2"]
    short = ["training.epochs=3", "training.min_epochs=1", "device=cpu"]
    assert run(train.main, train.Config, [*data, *short, f"output={tmp_path}/run"]) == 0
    found = {metric.name: metric for metric in list_metrics(read_model(tmp_path / "run"), [])}
    low, high = found["auc"].interval
    measured = json.loads((tmp_path / "run" / "results.json").read_text())["test"]["auc"]
    assert found["auc"].value == measured and 0 <= low < measured < high <= 1


def test_no_slide_id_case_id_or_path_is_shared(classifier: Path, tmp_path: Path) -> None:
    assert push(classifier, tmp_path / "o", "upload=false", "licence=mit", "teacher=virchow") == 0
    slides = json.loads((classifier / "config.json").read_text())["config"]["bags"]["digests"]
    assert len(slides) == 24
    record = load_checkpoint(tmp_path / "o")["config"]["bags"]
    tilings = [{"target_mpp": 0.5, "target_size": 16.0}]
    assert record == {"digests": {}, "encoders": [{}], "tilings": tilings, "cases": []}
    for name in ("README.md", "config.json", "sha256.json"):
        text = (tmp_path / "o" / name).read_text()
        assert not [slide for slide in slides if f'"{slide}"' in text]
        assert str(classifier.parents[4]) not in text
    hidden = hide_private(
        {
            "a": "/slides/a patient/S1",
            "b": {"c": ["x/y.pt"]},
            "init": "timm:a/b",
            "left_out": ["P7"],
        }
    )
    assert hidden == {
        "a": "(left out)", "b": {"c": ["(left out)"]}, "init": "timm:a/b", "left_out": []
    }  # fmt: skip


def test_a_shared_classifier_knows_the_encoder_of_its_bags() -> None:
    bags = {"encoders": [{"encoder": "uni", "transform": "resize 224, mean/std ((0.5,), (0.5,))"}]}
    assert hide_private({"bags": bags}) == {"bags": bags}


def test_a_student_of_a_restricted_teacher_is_not_pushed(
    tiny_student: Path, hub: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student, output = tiny_student / "run", tmp_path / "o"
    named = [f"repo={REPO}", f"endpoint={hub.address}", "licence=mit"]
    assert push(student, output, *named) == 2
    assert "does not name; name it with teacher=<encoder>" in capsys.readouterr().err
    assert push(student, output, *named, "teacher=uni2_h") == 2
    said = capsys.readouterr().err
    assert "the outputs of its teacher uni2_h, whose licence (CC-BY-NC-ND-4.0) forbids" in said
    assert "train with an encoder that permits it (imagenet_lite0," in said
    assert not hub.asked and not output.exists(), "nothing is written or sent"
    assert push(student, output, "upload=false", "teacher=uni2_h") == 0
    header, text = read_card(output)
    assert (header["license"], header["license_name"]) == ("other", "not-to-be-shared")
    assert "**The model may not be shared:**" in text
    assert push(student, output, *named, "teacher=imagenet_lite0") == 0
    assert_equal(
        load_student(output)[0].state_dict(), load_student(student)[0].state_dict(), "weights"
    )


def test_what_was_changed_on_the_way_is_refused(
    tiny_student: Path, hub: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = [f"repo={REPO}", f"endpoint={hub.address}", "licence=mit", "teacher=imagenet_lite0"]
    assert push(tiny_student / "run", tmp_path / "o", *named) == 0
    files = dict(hub.repos[REPO])
    assert pull(hub, tmp_path / "a", f"sha256={'0' * 64}") == 2
    assert "these are other weights" in capsys.readouterr().err

    def refused(name: str, content: bytes) -> str:
        hub.repos[REPO] = files | {name: content}
        assert pull(hub, tmp_path / f"b{len(list(tmp_path.iterdir()))}") == 2
        return capsys.readouterr().err

    assert "expected the file that was shared" in refused("config.json", b"{}")
    digests = json.loads(files["sha256.json"])
    strange = json.dumps(digests | {"../run.py": "0"}).encode()
    assert "found '../run.py'" in refused("sha256.json", strange)
    assert "expected digests of" in refused("sha256.json", b"{}")
    pickled = (tiny_student / "run" / "checkpoint_best.pt").read_bytes()
    save = tmp_path / "pickle"
    save.write_bytes(pickled)
    both = {"model.safetensors": pickled}
    both["sha256.json"] = json.dumps(digests | {"model.safetensors": sha256_file(save)}).encode()
    hub.repos[REPO] = files | both
    assert pull(hub, tmp_path / "c") == 2, "a pickle under the name of weights"
    assert "model.safetensors: expected" in capsys.readouterr().err
    hub.repos[REPO] = files | {"setup.py": b"raise SystemExit", "checkpoint_best.pt": pickled}
    assert pull(hub, tmp_path / "d") == 0
    assert not (tmp_path / "d" / "setup.py").exists(), "other files are not even fetched"
    assert not (tmp_path / "d" / "checkpoint_best.pt").exists()


def test_a_hub_that_refuses_is_one_line(
    tiny_student: Path, hub: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pull(hub, tmp_path / "a") == 2
    assert f"repo={REPO}: it could not be fetched (404" in capsys.readouterr().err
    for keys, expected in (
        (["repo=cervix"], "expected <owner>/<name>"),
        ([f"repo={REPO}", "teacher=virchow"], "licence: expected one for the model"),
    ):
        assert push(tiny_student / "run", tmp_path / "o", *keys) == 2
        assert expected in capsys.readouterr().err
    assert push(tiny_student, tmp_path / "o", "upload=false") == 2
    assert "expected the results of a finished run" in capsys.readouterr().err
    same = [f"output={tiny_student}/run", "upload=false", "licence=mit", "teacher=virchow"]
    assert push(tiny_student / "run", tmp_path / "o", *same) == 2
    assert "expected another folder than the run's" in capsys.readouterr().err


@pytest.mark.parametrize("name", ENCODERS)
def test_every_encoder_of_the_table_has_terms(name: str) -> None:
    licence = find_licence(name, {name: "mit"})
    assert licence.lower() in TERMS
    assert (licence == "mit" and ENCODERS[name].licence != "MIT") == (name in UNKNOWN)
    for way in ("weights", "outputs"):
        origin = Origin(name, way, "teacher")
        if "NC-ND" in licence:
            with pytest.raises(UserError, match=r"licence \(CC-BY-NC-ND-4\.0\) forbids"):
                judge(origin, {})
        elif name in UNKNOWN:
            with pytest.raises(UserError, match="licence is not known .* state it as licences="):
                judge(origin, {})
        else:
            judge(origin, {})


def teachers(*names: str, way: str = "outputs") -> list[Origin]:
    return [Origin(name, way, "teacher") for name in names]


def test_a_licence_has_to_satisfy_every_encoder() -> None:
    assert choose_licence(teachers("resnet50"), "mit", {}) == "mit"
    assert choose_licence([], "apache-2.0", {}) == "apache-2.0"
    assert choose_licence(teachers("mae_vitb16"), "", {}) == "cc-by-nc-4.0"
    assert choose_licence(teachers("mae_vitb16"), "cc-by-nc-sa-4.0", {}) == "cc-by-nc-sa-4.0"
    assert choose_licence(teachers("phikon", "virchow"), "", {}) == "owkin-non-commercial"
    assert choose_licence(teachers("ctranspath"), "mit", {}) == "mit", "outputs are not covered"
    assert choose_licence(teachers("ctranspath", way="weights"), "", {}) == "gpl-3.0"
    with pytest.raises(UserError, match="licence=mit: expected cc-by-nc-4.0 or .* of mae_vitb16"):
        choose_licence(teachers("mae_vitb16"), "mit", {})
    with pytest.raises(UserError, match="from phikon and from kaiko_vits8, .* satisfies both"):
        choose_licence(teachers("phikon", "kaiko_vits8"), "", {})
    with pytest.raises(UserError, match="licence: expected one for the model"):
        choose_licence(teachers("virchow"), "", {})


def test_the_table_s_licence_cannot_be_talked_away() -> None:
    assert find_licence("uni", {"uni": "mit"}) == "CC-BY-NC-ND-4.0"
    assert find_licence("uni-cls_mean", {}) == "CC-BY-NC-ND-4.0", "another pooling of it"
    assert find_licence("uni_v1", {}) == "CC-BY-NC-ND-4.0", "its name elsewhere"
    assert find_licence("my_encoder", {"my_encoder": "mit"}) == "mit"
    assert find_licence("my_encoder", {}) == ""


def test_origins_are_found_in_every_kind_of_checkpoint(tmp_path: Path) -> None:
    def found(config: dict[str, Any]) -> list[tuple[str, str]]:
        find_kind(config)
        return [(origin.encoder, origin.way) for origin in find_origins(config)]

    assert found({"student": {"teacher": ""}, "online_teacher": "uni"}) == [("uni", "outputs")]
    bags = {"encoders": [{"encoder": "uni2_h"}, {"encoder": "d2vfm mpa", "teacher": "conch"}]}
    assert found({"bags": bags, "network": {}}) == [("uni2_h", "outputs"), ("conch", "outputs")]
    pretrained = {"backbone": {}, "training": {"network": {"init": "dino_vits16"}}}
    assert found(pretrained) == [("dino_vits16", "weights")]
    assert found({"backbone": {}, "training": {"network": {"init": "random"}}}) == []
    regions = {"backbone": {"region_tiles": 4, "encoder": "uni"}, "training": {}}
    assert found(regions) == [("uni", "outputs")]
    localiser = {"kind": "weak_localiser", "network": {"init": "timm:resnet18.tv_in1k"}}
    assert found(localiser) == [("timm:resnet18.tv_in1k", "weights")]
    assert found({"kind": "atypical_head", "localiser": localiser})[0][1] == "weights"
    detector = {"kind": "deformable_detr", "backbone": {"name": "resnet50"}, "training": {}}
    assert found(detector) == [("timm:resnet50", "weights")]
    assert found(detector | {"training": {"pretrained": False}}) == []
    assert found(detector | {"training": {"weights": "/x/a.pth"}}) == [("a.pth", "weights")]
    teacher = {"kind": "grading_network", "network": {"init": "uni"}}
    save_checkpoint(tmp_path / "t.pt", model={}, config=teacher, epoch=1)
    student = {"kind": "grading_network", "network": {"init": "random"}}
    student["training"] = {"teacher_checkpoint": str(tmp_path / "t.pt")}
    assert found(student) == [("uni", "outputs")]
    gone = student | {"training": {"teacher_checkpoint": "gone.pt"}}
    assert found(gone) == [("gone.pt", "outputs")], "whose licence the user has to state"
    with pytest.raises(UserError, match="expected the run of a network"):
        find_kind({"kind": "something"})


def test_bags_of_a_student_name_its_teacher(tiny_student: Path, tmp_path: Path) -> None:
    """So that a classifier on them is known to come from that teacher."""
    from detection_kd.models.student import load_student_encoder
    from mil.training.bag_record import ENCODER

    content = load_checkpoint(tiny_student / "run")
    content["config"]["student"]["teacher"] = "uni2_h"
    parts = {name: content[name] for name in ("model", "config", "epoch")}
    save_checkpoint(tmp_path / "s.pt", **parts)
    assert load_student_encoder(tmp_path / "s.pt", "student").provenance["teacher"] == "uni2_h"
    assert "teacher" in ENCODER
