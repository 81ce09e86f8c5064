"""Region encoders over region stores: bags of regions that everybody reads, reused or refused, and
what fails is listed.
"""

from __future__ import annotations

import csv
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from mil import benchmark
from mil.models import MODELS, build
from mil.training.bag_record import read_tiling
from patch_encoder import extract_regions, pretrain_slpd
from patch_encoder.bags.bag import open_bag, slide_grid
from patch_encoder.bags.paths import list_bags
from patch_encoder.extract_regions import open_extraction
from patch_encoder.prototypes.region_encoder import (
    RegionEncoderDescription,
    open_region_encoder,
    write_region_encoder,
)
from patch_encoder.prototypes.region_packing import pack_regions
from patch_encoder.prototypes.region_vit import RegionViT
from tests.mil.models.small_options import SMALL
from tests.patch_encoder.prototypes.region_cohort import TINY, write_region_cohort
from tests.patch_encoder.regions.cohort import STEP, write_cohort
from tests.patch_encoder.regions.cohort import build as build_regions
from wsi_common.checkpoint import save_tensors
from wsi_common.cli import run
from wsi_common.config import load_config

G, WIDTH = 4, 32
DESCRIBED = RegionEncoderDescription(12, G, WIDTH, 2, 1, 3, "slide", "tiny")


def make_run(folder: Path, seed: int = 0) -> Path:
    """A run directory of pretrain_slpd: a tiny region encoder that has seen nothing."""
    torch.manual_seed(seed)
    folder.mkdir(parents=True)
    network = DESCRIBED.build()
    save_tensors(folder / "backbone.pt", network.state_dict())
    write_region_encoder(folder, DESCRIBED)
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Bags and regions of three slides, and a run."""
    write_cohort(tmp_path / "features")
    assert build_regions(tmp_path, f"region_tiles={G}") == 0
    make_run(tmp_path / "slpd")
    return tmp_path


def arguments(root: Path, *more: str) -> list[str]:
    regions = f"regions={root}/regions/tiny"
    output = f"output={root}/out"
    return [f"weights={root}/slpd", regions, output, "device=cpu", "precision=fp32", *more]


def extract(root: Path, *more: str) -> int:
    return run(extract_regions.main, extract_regions.Config, arguments(root, *more))


def test_bags_hold_the_encoders_vectors_and_the_regions_corners(root: Path):
    assert extract(root, "batch_size=3", "pt=true") == 0
    job = open_extraction(load_config(extract_regions.Config, arguments(root)))
    store, network = job.store, job.network
    assert store.standardise == "slide"  # as in the training, unasked
    bags = list_bags(root / "out" / "slpd")
    assert sorted(bags) == store.slides
    for slide, name in enumerate(store.slides):
        bag = open_bag(bags[name])
        features, valid = store.fetch(store.regions.region_numbers(slide))
        with torch.no_grad():
            expected = network(pack_regions(features, valid))
        torch.testing.assert_close(bag.read(), expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(bag.coords, store.corners(slide))
        geometry = bag.coordinates().geometry
        assert geometry.patch_size_level0 == G * STEP == geometry.target_size
        grid = slide_grid(bag)
        assert grid is not None and grid.step == G * STEP
        assert torch.equal(open_bag(root / "out/slpd/pt_files" / f"{name}.pt").read(), bag.read())
        assert bag.provenance["encoder"] == "slpd" and bag.provenance["tile_encoder"] == "tiny"


def test_overlapping_regions_keep_their_step(root: Path):
    assert build_regions(root, f"region_tiles={G}", "stride=2", output="half") == 0
    given = (f"regions={root}/half/tiny", "dtype=float16")
    assert extract(root, *given) == 0
    bag = open_bag(list_bags(root / "out" / "slpd")["S0"])
    geometry = bag.coordinates().geometry
    assert (geometry.patch_size_level0, geometry.step) == (G * STEP, 2 * STEP)
    assert bag.dtype == "float16"


def test_mean_is_one_row_per_slide_around_its_regions(root: Path):
    assert extract(root) == 0 and extract(root, "pool=mean") == 0
    regions, means = (list_bags(root / "out" / name) for name in ("slpd", "slpd_mean"))
    for name in regions:
        bag, mean = open_bag(regions[name]), open_bag(means[name])
        torch.testing.assert_close(mean.read(), bag.read().mean(0, keepdim=True))
        corners = bag.coords.numpy()
        np.testing.assert_array_equal(mean.coords[0], corners.min(0))
        side = mean.coordinates().geometry.patch_size_level0
        assert side == (corners.max(0) - corners.min(0)).max() + G * STEP
        # the tiling that mil.predict compares is that of the regions, the same for every slide
        assert read_tiling(mean) == read_tiling(bag) == {"target_mpp": 0.5, "target_size": G * STEP}


def test_every_slide_classifier_reads_them(root: Path):
    assert extract(root) == 0 and extract(root, "pool=mean") == 0
    files = [*list_bags(root / "out/slpd").values(), *list_bags(root / "out/slpd_mean").values()]
    for name in MODELS:
        model = build(name, WIDTH, 2, **SMALL[name]).eval()
        for bag in map(open_bag, files):
            output = model(bag.read(), bag.coords)
            assert output.logits.isfinite().all() and len(output.attention) == len(bag), name


def test_finished_bags_are_kept_and_others_refused(root: Path, capsys: pytest.CaptureFixture[str]):
    assert extract(root) == 0
    folder = root / "out" / "slpd" / "h5_files"
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    (folder / "S1.h5").unlink()
    (folder / "S2.h5").write_bytes((folder / "S2.h5").read_bytes()[:200])  # cut off
    assert extract(root) == 0
    after = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert after["S0.h5"] == before["S0.h5"] and after.keys() == before.keys()
    assert after["S1.h5"] != before["S1.h5"] and len(open_bag(folder / "S2.h5")) > 0
    make_run(root / "other" / "slpd", seed=1)
    assert extract(root, f"weights={root}/other/slpd") == 2
    assert "holds features of another provenance: weights_sha256" in capsys.readouterr().err
    assert extract(root, f"weights={root}/other/slpd", "overwrite=true") == 0
    other = open_bag(folder / "S0.h5").provenance["weights_sha256"]
    assert extract(root, "pt=true") == 2 and "weights_sha256" in capsys.readouterr().err
    assert extract(root, f"weights={root}/other/slpd", "pt=true") == 0  # as it lacks a second file
    assert open_bag(folder / "S0.h5").provenance["weights_sha256"] == other
    assert len(list((root / "out/slpd/pt_files").iterdir())) == 3


def write_list(root: Path, *slides: str) -> Path:
    (root / "list.txt").write_text("\n".join(slides))
    return root / "list.txt"


def test_a_bad_slide_does_not_stop_the_others(root: Path):
    """Its bag was written over after its regions were checked."""
    file = list_bags(root / "features" / "tiny")["S1"]
    with h5py.File(file, "r+") as bag:
        bag["features"][...] = np.nan
    assert extract(root) == 1
    assert sorted(list_bags(root / "out" / "slpd")) == ["S0", "S2"]
    with (root / "out/slpd/failures.csv").open() as stream:
        (row,) = csv.DictReader(stream)
    assert row["slide"] == "S1" and "expected finite features" in row["error"]
    assert extract(root, f"slides_list={write_list(root, 'S0')}") == 0  # another list, no failure
    assert not (root / "out/slpd/failures.csv").exists()


def test_half_precision_is_close_and_says_so(root: Path):
    assert extract(root) == 0 and extract(root, "precision=bf16", "name=low") == 0
    exact, low = (open_bag(list_bags(root / "out" / name)["S0"]) for name in ("slpd", "low"))
    assert low.provenance["precision"] == "bf16" and not torch.equal(low.read(), exact.read())
    torch.testing.assert_close(low.read(), exact.read(), rtol=0.1, atol=0.1)


def test_regions_of_another_kind_are_refused(
    root: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
):
    assert extract(root, "standardise=none") == 2
    assert "standardise=none: expected slide, with which" in capsys.readouterr().err
    other = RegionEncoderDescription(12, G, WIDTH, 2, 1, 3, "slide", "uni2_h")
    write_region_encoder(root / "slpd", other)
    assert extract(root) == 2
    assert "expected tiles of encoder uni2_h" in capsys.readouterr().err
    write_region_encoder(root / "slpd", RegionEncoderDescription(12, 16, WIDTH, 2, 1, 3, "slide"))
    assert extract(root) == 0
    assert "trained on regions of 16 x 16 tiles, these have 4 x 4" in caplog.text
    wide = RegionEncoderDescription(20, G, WIDTH, 2, 1, 3, "slide")
    save_tensors(root / "slpd" / "backbone.pt", wide.build().state_dict())
    write_region_encoder(root / "slpd", wide)
    assert extract(root) == 2
    assert "expected tile features of width 20" in capsys.readouterr().err


def test_hipts_file_is_read_by_its_shapes(root: Path, capsys: pytest.CaptureFixture[str]):
    """As the authors store it: student and teacher with prefixes of DDP, a head beside them."""
    torch.manual_seed(1)
    teacher = RegionViT(12, 64, 3, 2, 14)
    state = {f"module.backbone.{n}": v for n, v in teacher.state_dict().items()}
    state["module.head.mlp.0.weight"] = torch.zeros(2, 2)
    file = root / "vit4k_xs.pth"
    save_tensors(file, {"student": {"module.x": torch.zeros(1)}, "teacher": state, "epoch": 9})
    network, described, found = open_region_encoder(str(file))
    assert described is None and found == file and not network.training
    assert network.num_features == 64 and len(network.blocks) == 3
    x = torch.randn(2, 13, 4, 4).abs()
    torch.testing.assert_close(network(x), teacher.eval()(x))
    assert extract(root, f"weights={file}", "standardise=slide") == 0
    bag = open_bag(list_bags(root / "out" / "vit4k_xs")["S0"])
    assert bag.provenance["standardise"] == "slide" and bag.shape[1] == 64
    assert extract(root, f"weights={root}/regions") == 2
    assert "expected a run directory of pretrain_slpd" in capsys.readouterr().err
    save_tensors(file, {"weight": torch.zeros(3)})
    assert extract(root, f"weights={file}") == 2
    assert "or HIPT's vit4k_xs (with keys" in capsys.readouterr().err


def test_from_the_pretraining_to_the_benchmark(tmp_path: Path):
    """The teacher of the last epoch encodes the regions, and slide classifiers train on them."""
    regions, labels = write_region_cohort(tmp_path)
    trained = [regions, labels, *TINY, "epochs=2", f"output={tmp_path}/slpd"]
    assert run(pretrain_slpd.main, pretrain_slpd.Config, trained) == 0
    given = [regions, f"weights={tmp_path}/slpd", f"output={tmp_path}/out"]
    given += ["device=cpu", "precision=fp32"]
    assert run(extract_regions.main, extract_regions.Config, given) == 0
    job = open_extraction(load_config(extract_regions.Config, given))
    last = torch.load(tmp_path / "slpd" / "checkpoint_last.pt", weights_only=True)["teacher"]
    for name, weight in job.network.state_dict().items():
        assert torch.equal(weight, last[f"backbone.{name}"])
    folder = tmp_path / "out" / "slpd"
    for slide, name in enumerate(job.store.slides):
        with torch.no_grad():
            features, valid = job.store.fetch(job.store.regions.region_numbers(slide))
            expected = job.network(pack_regions(features, valid))
        torch.testing.assert_close(open_bag(list_bags(folder)[name]).read(), expected)
    bench = [labels, f"features=[{folder}]", f"output={tmp_path}/bench", "models=[mean,hipt]"]
    bench += ["seeds=[1]", "folds=2", "training.epochs=1", "training.min_epochs=1", "device=cpu"]
    bench += ["isolated=false", "resamples=20", "headline=mean"]
    assert run(benchmark.main, benchmark.Config, bench) == 0
    with (tmp_path / "bench" / "results.csv").open() as stream:
        assert {row["model"] for row in csv.DictReader(stream)} == {"mean", "hipt"}
