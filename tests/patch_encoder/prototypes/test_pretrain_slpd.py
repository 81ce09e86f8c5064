"""What a run of `pretrain_slpd` leaves, what its switches change, and how it ends where regions or
settings do not do.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from patch_encoder import pretrain_slpd
from patch_encoder.prototypes.region_encoder import build_region_encoder
from patch_encoder.prototypes.region_packing import pack_regions
from patch_encoder.regions.keys import RegionKeys
from patch_encoder.regions.opening import open_store
from patch_encoder.regions.store import FileStore
from tests.patch_encoder.prototypes.region_cohort import TINY, write_region_cohort
from wsi_common.cli import Terminated, run
from wsi_common.errors import UserError

SHORT = ("epochs=2", "training.freeze_last_layer=0")


def start(arguments: Sequence[str], output: Path, *more: str) -> int:
    given = [*arguments, *TINY, *SHORT, *more, f"output={output}"]
    return run(pretrain_slpd.main, pretrain_slpd.Config, given)


def read(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def read_lines(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return write_region_cohort(tmp_path_factory.mktemp("cohort"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, cohort: list[str]) -> Path:
    output = tmp_path_factory.mktemp("finished") / "run"
    zones = Path(cohort[1].removeprefix("labels=")).with_name("zones.csv")
    more = ("keep_start=true", f"probe.zones={zones}", "prototypes.neighbours=2")
    assert start(cohort, output, *more) == 0
    return output


def test_the_backbone_is_the_teachers_and_a_region_encoder(
    finished: Path, cohort: list[str]
) -> None:
    weights, last = read(finished / "backbone.pt"), read(finished / "checkpoint_last.pt")
    for name, value in weights.items():
        assert torch.equal(last["teacher"][f"backbone.{name}"], value)
    store = open_store(RegionKeys(regions=cohort[0].removeprefix("regions=")))
    packed, found = pack_regions(*store.fetch(np.arange(5))), []
    for place in (finished, finished / "backbone.pt", finished / "backbone_start.pt"):
        network, description = build_region_encoder(place)
        assert (description.region_tiles, description.width, description.in_dim) == (4, 32, 8)
        assert (description.standardise, description.encoder) == ("none", "plain")
        found.append(network(packed))
        assert found[-1].shape == (5, description.width)
    assert torch.equal(found[0], found[1]) and not torch.allclose(found[0], found[2])


def test_prototypes_are_logged_when_they_are_found_and_kept_in_the_checkpoint(
    finished: Path,
) -> None:
    lines = read_lines(finished)
    plain, both = (line for line in lines if "step" not in line)
    assert both["prototypes/ignored_slides"] == 5 and "prototypes/ignored_slides" not in plain
    assert both["prototypes/distinct_targets"] == 1  # matched one to one
    assert "intra" not in plain and {"intra", "inter", "time/prototypes"} <= both.keys()
    assert plain["time/prototypes"] == 0 < both["time/prototypes"] < 1
    kept = read(finished / "checkpoint_last.pt")["prototypes"]
    assert kept["centres"].keys() == {"intra", "inter"}
    assert kept["slides"]["clusters"]["prototypes"].shape == (11, 2, 32)
    assert kept["slides"]["neighbours"]["partner"].shape == (11, 2, 2)


def test_monitors_and_probes_are_logged(finished: Path) -> None:
    lines = read_lines(finished)
    monitors = {"feature_std", "rankme", "centre_entropy", "teacher_entropy", "momentum"}
    assert all(monitors <= line.keys() for line in lines if "lr" in line and "step" in line)
    scores = [line["zone_knn_balanced_accuracy"] for line in lines if "step" not in line]
    assert len(scores) == 2 and min(scores) > 0.8
    assert json.loads((finished / "results.json").read_text())["slide_knn_balanced_accuracy"] >= 0


def test_without_prototype_losses_it_is_plain_dino_and_never_clusters(
    cohort: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert start(cohort, tmp_path / "late", "prototypes.start_epoch=9") == 0

    def refuse(*_: object) -> None:
        raise AssertionError("nothing is clustered")

    monkeypatch.setattr(pretrain_slpd, "find_slide_prototypes", refuse)
    off = ("losses.intra=0", "losses.inter=0", "prototypes.min_regions=1000")
    assert start(cohort, tmp_path / "off", *off, "prototypes.clusters=1000") == 0
    weights = [read(tmp_path / name / "checkpoint_last.pt") for name in ("late", "off")]
    for part in ("model", "teacher"):
        assert all(torch.equal(v, weights[1][part][n]) for n, v in weights[0][part].items())
    assert torch.equal(weights[0]["centre"], weights[1]["centre"])
    assert all("intra" not in line for line in read_lines(tmp_path / "late"))


SWITCHES = {
    "intra alone": ("losses.inter=0",),
    "inter alone": ("losses.intra=0",),
    "first view": ("losses.skip_first_view=true",),
    "centred by slide": ("prototypes.centre=slide",),
    "ramp": ("losses.ramp=2",),
    "standardised": ("standardise=slide",),
}


def test_every_switch_changes_the_result(cohort: list[str], tmp_path: Path) -> None:
    found = {}
    for name, switches in {"plain": (), **SWITCHES}.items():
        assert start(cohort, tmp_path / name, *switches, "log_every=100") == 0, name
        found[name] = read(tmp_path / name / "backbone.pt")["norm.weight"]
    for name, value in found.items():
        others = [other for label, other in found.items() if label != name]
        assert not any(torch.equal(value, other) for other in others), name


def test_slides_with_no_one_or_too_few_regions_are_ignored_and_trained_on(tmp_path: Path) -> None:
    cohort = write_region_cohort(tmp_path, sizes=(9, 0, 1, 9, 3, 9))
    assert start(cohort, tmp_path / "run", "prototypes.clusters=4") == 0
    line = next(x for x in read_lines(tmp_path / "run") if "prototypes/ignored_slides" in x)
    assert line["prototypes/ignored_slides"] == 2  # the one without regions is not in the set


def test_slides_with_the_same_regions_are_trained_on(tmp_path: Path) -> None:
    cohort = write_region_cohort(tmp_path, sizes=(9, 9, 9, 9), copies=True)
    assert start(cohort, tmp_path / "run") == 0
    kept = read(tmp_path / "run" / "checkpoint_last.pt")["prototypes"]["slides"]["neighbours"]
    assert (kept["slides"][:, 0] != torch.arange(4)).all()  # never itself
    assert kept["slides"][2, 0] not in (2, 3) and kept["slides"][3, 0] not in (2, 3)  # one patient


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("prototypes.min_regions=10", "expected slides of two patients with so many regions"),
        (
            "prototypes.clusters=9",
            "prototypes.min_regions=8: expected at least prototypes.clusters",
        ),
        ("batch_size=100", "batch_size=100: expected at most the 84 regions"),
        ("accumulate=3", "expected a multiple of the 1 processes times accumulate=3"),
        ("network.heads=3", "expected a multiple of the 3 heads"),
        ("network.init=nowhere.pt", "nowhere.pt: expected a weights file"),
        ("views.global_side=5", "views.global_side=5: expected 1 to 4 tiles"),
        ("losses.intra=-1", "key 'losses.intra': expected at least 0"),
        ("prototypes.target=best", "prototypes.target"),
        ("training.warmup=2", "training.warmup=2: expected fewer epochs than epochs=2"),
    ],
)
def test_settings_that_cannot_be_are_one_line(
    cohort: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    settings: str,
    said: str,
) -> None:
    assert start(cohort, tmp_path / "run", settings) == 2
    error = capsys.readouterr().err.strip()
    assert said in error and len(error.splitlines()) == 1
    assert not (tmp_path / "run" / "checkpoint_last.pt").exists()


def test_a_schedule_that_cannot_be_leaves_the_folder_to_the_next_try(
    cohort: list[str], tmp_path: Path
) -> None:
    assert start(cohort, tmp_path / "run", "training.warmup=2") == 2
    assert not (tmp_path / "run" / "run.json").exists()


@pytest.fixture
def break_fetch(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`break_fetch(call, damage)`: a later call of `fetch` goes through `damage`."""

    def install(call: int, damage: Callable[[Any], Any]) -> None:
        fetch, calls = FileStore.fetch, []

        def broken(store: FileStore, ids: np.ndarray) -> Any:
            calls.append(None)
            found = fetch(store, ids)
            return damage(found) if len(calls) == call else found

        monkeypatch.setattr(FileStore, "fetch", broken)

    return install


def test_a_region_with_features_that_are_no_numbers_is_named(
    cohort: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    break_fetch: Callable[..., None],
) -> None:
    def spoil(found: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        found[0][3, 0, 0, 0] = torch.nan
        return found

    break_fetch(2, spoil)
    assert start(cohort, tmp_path / "run") == 2
    error = capsys.readouterr().err.strip()
    assert "of slide s" in error and "found NaN or infinity" in error
    assert len(error.splitlines()) == 1


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, cohort: list[str]) -> dict[str, Any]:
    """The backbone of a run that nothing interrupts."""
    output = tmp_path_factory.mktemp("whole") / "run"
    assert start(cohort, output) == 0
    return read(output / "backbone.pt")


def assert_resumed_as_whole(cohort: list[str], output: Path, whole: dict[str, Any]) -> None:
    assert 10 < read(output / "checkpoint_last.pt")["step"] < 20  # inside the second epoch
    assert start(cohort, output) == 0
    resumed = read(output / "backbone.pt")
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_a_store_that_dies_inside_an_epoch_ends_the_run_which_then_resumes(
    cohort: list[str],
    whole: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    break_fetch: Callable[..., None],
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(pretrain_slpd, "is_checkpoint_due", lambda *_: True)

        def die(_: object) -> None:
            raise UserError("redis: expected an answer, found none; start the server again")

        break_fetch(17, die)  # 10 batches, all regions twice, then inside the second epoch
        assert start(cohort, tmp_path / "run") == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert_resumed_as_whole(cohort, tmp_path / "run", whole)


def test_a_run_that_is_told_to_end_writes_a_checkpoint_first(
    cohort: list[str], whole: dict[str, Any], tmp_path: Path, break_fetch: Callable[..., None]
) -> None:
    def tell(found: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return found

    break_fetch(17, tell)
    with pytest.raises(Terminated):
        start(cohort, tmp_path / "run")
    assert_resumed_as_whole(cohort, tmp_path / "run", whole)


def test_other_regions_or_patients_are_another_run(
    cohort: list[str], finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start(cohort, tmp_path / "run", "epochs=1", "training.warmup=0") == 0
    more = ("epochs=1", "training.warmup=0")
    assert start(cohort[:1], tmp_path / "run", *more) == 2
    assert "another run: inputs.patients" in capsys.readouterr().err


def test_the_network_starts_from_the_weights_of_another_run(
    cohort: list[str], finished: Path, tmp_path: Path
) -> None:
    more = (f"network.init={finished / 'backbone.pt'}", "keep_start=true", "epochs=1")
    assert start(cohort, tmp_path / "run", *more, "training.warmup=0") == 0
    first, second = read(finished / "backbone.pt"), read(tmp_path / "run" / "backbone_start.pt")
    assert all(torch.equal(value, second[name]) for name, value in first.items())
