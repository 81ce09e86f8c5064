"""Packed distillation sets: pairs, batches and checkpoints of the folder; cut from slides; resumed;
refused when broken.
"""

from __future__ import annotations

import csv
import pickle
import shutil
import signal
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import detection_kd.pack_distillation as pack_distillation
from detection_kd import train_d2vfm
from detection_kd.datasets.distillation import DistillationTiles, digest_pairs, read_pairs
from detection_kd.datasets.packed_pairs import Pack, PackWriter
from detection_kd.datasets.pair_problems import read_header_size
from detection_kd.datasets.pairs import HEADER
from patch_encoder import extract_features, tile_slides
from patch_encoder.bags.bag import read_bag
from patch_encoder.bags.writer import write_bag
from patch_encoder.slides import open_slide
from tests.detection_kd.d2vfm_runs import write_backbone
from tests.detection_kd.distillation_sets import SIDE, write_set
from tests.helpers import die, draw_slide, make_cohort
from wsi_common.cli import run
from wsi_common.errors import UserError

TILE = 64


def pack(*arguments: object) -> int:
    return run(
        pack_distillation.main, pack_distillation.Config, [str(argument) for argument in arguments]
    )


def train(*arguments: object) -> int:
    base = [
        "device=cpu",
        "workers=0",
        "precision=fp32",
        "figures=false",
        "epochs=2",
        "batch_size=4",
        "val_fraction=0.3",
        "scales=[1.0,1.25]",
    ]
    return run(train_d2vfm.main, train_d2vfm.Config, [*base, *map(str, arguments)])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_set(tmp_path / "set", suffix=".jpg")


def test_a_packed_set_is_the_folder(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "packed" / "set.h5"
    assert pack(f"dataset={folder}", f"output={output}", "verify=true") == 0
    loose, packed = read_pairs(folder), read_pairs(output, verify=True)
    assert len(loose) == 12
    assert [(p.slide_id, p.image.name) for p in loose] == [
        (p.slide_id, p.image.name) for p in packed
    ]
    assert all(
        torch.equal(a.feature, b.feature) and a.picture() == b.picture()
        for a, b in zip(loose, packed)
    )
    assert digest_pairs(loose) == digest_pairs(packed)
    content = Pack(output)
    assert content.coords[4].tolist() == [1 * SIDE, 1 * SIDE] and content.provenance[
        "pairs"
    ] == digest_pairs(loose)
    assert [file.name for file in output.parent.iterdir()] == ["set.h5"], (
        "nothing is left beside it"
    )


@pytest.mark.process
def test_training_on_either_form_gives_the_same_checkpoint(folder: Path, tmp_path: Path) -> None:
    output, backbone = tmp_path / "set.h5", write_backbone(tmp_path / "backbone.pt")
    assert pack(f"dataset={folder}", f"output={output}") == 0
    for name, dataset, workers in (("folder", folder, 0), ("packed", output, 2)):
        arguments = (
            f"dataset={dataset}",
            f"backbone={backbone}",
            f"output={tmp_path / name}",
            f"workers={workers}",
        )
        assert train(*arguments, "augmentation.stain=0.05") == 0
    first, second = (
        torch.load(tmp_path / n / "checkpoint_last.pt", weights_only=True)
        for n in ("folder", "packed")
    )
    assert all(torch.equal(first["model"][name], second["model"][name]) for name in first["model"])
    lines = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("folder", "packed")]
    assert lines[0] == lines[1] and len(lines[0].splitlines()) == 2


def test_every_worker_reads_for_itself(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "set.h5"
    pack(f"dataset={folder}", f"output={output}")
    tiles = DistillationTiles(read_pairs(output), augment=False, seed=0)
    before = [
        tiles[index][0] for index in range(12)
    ]  # this process has the file open when the workers fork
    for epoch in range(2):
        read = [tile for batch, _ in DataLoader(tiles, 3, num_workers=2) for tile in batch]
        assert all(torch.equal(a, b) for a, b in zip(before, read)), epoch
    again = pickle.loads(pickle.dumps(tiles))
    assert torch.equal(again[7][0], before[7]) and again.pairs[7].pack._descriptor is not None
    assert tiles.pairs[0].pack is tiles.pairs[1].pack, "one file, not one a pair"


def test_packing_again_does_nothing_and_another_set_is_not_overwritten(
    folder: Path, tmp_path: Path, capsys
) -> None:
    output = tmp_path / "set.h5"
    pack(f"dataset={folder}", f"output={output}")
    stamp = output.stat().st_mtime_ns
    assert pack(f"dataset={folder}", f"output={output}") == 0 and output.stat().st_mtime_ns == stamp
    torch.save(torch.zeros(151), folder / "wsi_root" / "S0" / "0_0.pt")
    assert pack(f"dataset={folder}", f"output={output}") == 2
    assert (
        "holds another packed set: pairs" in capsys.readouterr().err
        and output.stat().st_mtime_ns == stamp
    )
    assert pack(f"dataset={folder}", f"output={output}", "overwrite=true") == 0
    assert torch.equal(read_pairs(output)[0].feature, torch.zeros(151))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["output=x.h5"], "either dataset="),
        (["output=x.h5", "slides=.", "dataset=."], "either dataset="),
        (["output=x.h5", "slides=."], "either dataset="),
        (["output=x.zip", "dataset=."], "ends in .h5"),
        (["output=x.h5", "slides=.", "features=.", "tiles_per_slide=-1"], "tiles_per_slide=-1"),
        (["output=x.h5", "slides=.", "features=.", "subset=train"], "expected labels="),
    ],
)
def test_wrong_keys_are_refused(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pack(*arguments) == 2
    assert expected in capsys.readouterr().err


def damage(path: Path, kind: str) -> None:
    """Break a packed set in one way."""
    if kind == "text":
        path.write_text("packed")
        return
    if kind == "cut off":
        path.write_bytes(path.read_bytes()[:-2000])
        return
    with h5py.File(path, "r+") as file:
        if kind == "format":
            file.attrs["format"] = "distillation pairs 0"
        elif kind == "no names":
            del file["names"]
        elif kind == "numbers as names":
            del file["names"]
            file["names"] = np.arange(12)
        elif kind == "group":
            del file["names"]
            file.create_group("names")
        elif kind == "offsets":
            file["offsets"][3] = 10**9
        elif kind == "compressed":
            content = file["images"][()]
            del file["images"]
            file.create_dataset("images", data=content, compression="gzip")


@pytest.mark.parametrize(
    "kind",
    ["text", "cut off", "format", "no names", "numbers as names", "group", "offsets", "compressed"],
)
def test_a_broken_file_is_one_line(kind: str, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "set.h5"
    pack(f"dataset={folder}", f"output={output}")
    damage(output, kind)
    with pytest.raises(UserError, match=r"set\.h5: expected .* pack") as caught:
        read_pairs(output)
    assert "\n" not in str(caught.value)


def test_problems_inside_a_packed_set(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "set.h5"
    pack(f"dataset={folder}", f"output={output}")
    with h5py.File(output, "r+") as file:
        file["features"][2, 5] = np.nan
        low, high = file["offsets"][7:9]
        file["images"][low : low + 20] = 0
        file["images"][high - 200 : high] = 0
        file["names"][3] = file["names"].asstr()[0]
    with pytest.raises(
        UserError, match="3 problems .*1 not finite, 1 duplicate, 1 undecodable picture"
    ):
        read_pairs(output)
    with pytest.raises(UserError, match="1 changed pictures"):
        read_pairs(output, verify=True)
    assert len(read_pairs(output, skip_bad=True)) == 9


def test_a_header_of_any_length_tells_the_size(folder: Path, tmp_path: Path) -> None:
    tile = sorted(folder.rglob("*.jpg"))[0]
    with Image.open(tile) as image:
        image.load()
    image.save(tile, comment=b"x" * 3 * HEADER)
    output = tmp_path / "set.h5"
    assert pack(f"dataset={folder}", f"output={output}") == 0
    starts = [read_header_size(Pack(output).picture(row, HEADER)) for row in range(2)]
    assert starts == [None, (SIDE, SIDE)], "the first one's is longer than what is read of it"
    assert len(read_pairs(output)) == 12


def test_float16_that_cannot_hold_a_feature_is_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match="float16 can hold"),
        PackWriter(tmp_path / "a.h5", "float16") as writer,
    ):
        writer.append("S", "0_0.jpg", b"x", np.array([1e6, 0.0], np.float32))
    with pytest.raises(UserError, match="width 2"), PackWriter(tmp_path / "a.h5") as writer:
        writer.append("S", "0_0.jpg", b"x", np.zeros(2, np.float32))
        writer.append("S", "0_1.jpg", b"x", np.zeros(3, np.float32))
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two slides and a tile folder, tiled and encoded with stain_texture."""
    root = make_cohort(tmp_path_factory.mktemp("encoded"), 2)
    (root / "labels.csv").write_text(
        "case_id,slide_id,label,split\na,S000,x,train\nb,S001,y,train\nc,T2,y,test\n"
    )
    pixels, folder = draw_slide(4 * TILE, seed=7), root / "slides" / "T2"
    folder.mkdir()
    for row in range(4):
        for col in range(4):
            tile = pixels[row * TILE : (row + 1) * TILE, col * TILE : (col + 1) * TILE]
            Image.fromarray(tile).save(folder / f"{row}_{col}.jpg", quality=90)
    tiling = [
        f"slides={root}/slides",
        f"output={root}/tiles",
        f"tile_size={TILE}",
        "tissue.min_area=50",
        "workers=1",
    ]
    tiling += ["target_mpp=null"]
    assert run(tile_slides.main, tile_slides.Config, tiling) == 0
    extraction = [
        f"slides={root}/slides",
        f"coords={root}/tiles",
        f"output={root}/features",
        "workers=0",
        "device=cpu",
    ]
    assert run(extract_features.main, extract_features.Config, extraction) == 0
    return root


@pytest.fixture
def cohort(encoded: Path, tmp_path: Path) -> Path:
    """A copy to be changed."""
    return Path(shutil.copytree(encoded, tmp_path / "cohort"))


def from_slides(cohort: Path, output: Path, *more: str) -> int:
    base = [
        f"slides={cohort}/slides",
        f"coords={cohort}/tiles",
        f"features={cohort}/features/stain_texture",
    ]
    return pack(*base, f"output={output}", *more)


def bag_of(cohort: Path, slide_id: str) -> Path:
    return cohort / "features" / "stain_texture" / "h5_files" / f"{slide_id}.h5"


def test_tiles_from_slides_are_those_that_the_teacher_saw(cohort: Path, tmp_path: Path) -> None:
    assert from_slides(cohort, tmp_path / "set.h5", "encoding=png") == 0
    content, pairs = Pack(tmp_path / "set.h5"), read_pairs(tmp_path / "set.h5", verify=True)
    bags = {slide_id: read_bag(bag_of(cohort, slide_id)) for slide_id in ("S000", "S001", "T2")}
    assert [pair.slide_id for pair in pairs] == [s for s, bag in bags.items() for _ in bag.features]
    tiles = DistillationTiles(pairs, augment=False, seed=0)
    rows = {slide_id: iter(range(len(bag.features))) for slide_id, bag in bags.items()}
    for index, pair in enumerate(pairs):
        row = next(rows[pair.slide_id])
        assert torch.equal(pair.feature, bags[pair.slide_id].features[row])
        corner = bags[pair.slide_id].coords[row].tolist()
        assert content.coords[index].tolist() == corner
        path = (
            cohort
            / "slides"
            / (pair.slide_id if pair.slide_id == "T2" else f"{pair.slide_id}.tiff")
        )
        with open_slide(path) as slide:
            assert np.array_equal(
                tiles[index][0].permute(1, 2, 0).numpy(), slide.read(*corner, TILE)
            )
    own = next(pair for pair in pairs if pair.slide_id == "T2")
    assert own.picture() == (cohort / "slides" / "T2" / own.image.name).read_bytes(), (
        "a folder's JPEG as it is"
    )
    teacher = content.provenance["teacher"]
    assert teacher["encoder"] == "stain_texture" and content.provenance["failed"] == []
    assert not (tmp_path / "set.h5.parts").exists() and not (tmp_path / "problems.csv").exists()


def test_budgets_take_tiles_at_random_or_the_highest(cohort: Path, tmp_path: Path) -> None:
    assert (
        from_slides(
            cohort,
            tmp_path / "a.h5",
            "tiles_per_slide=3",
            f"labels={cohort}/labels.csv",
            "subset=train",
        )
        == 0
    )
    assert from_slides(cohort, tmp_path / "b.h5", "tiles_per_slide=3", "workers=2") == 0
    assert from_slides(cohort, tmp_path / "c.h5", "tiles_per_slide=3", "seed=1") == 0
    a, b, c = (Pack(tmp_path / f"{name}.h5") for name in "abc")
    assert a.slides == ["S000"] * 3 + ["S001"] * 3 and b.slides == a.slides + ["T2"] * 3
    assert b.names[:6] == a.names and c.names != b.names
    scores = {
        tuple(corner): float(i % 5)
        for i, corner in enumerate(read_bag(bag_of(cohort, "S000")).coords.tolist())
    }
    rows = ["slide_id,x,y,score", *(f"S000,{x},{y},{score}" for (x, y), score in scores.items())]
    (tmp_path / "ranking.csv").write_text("\n".join(rows) + "\n")
    assert (
        from_slides(
            cohort, tmp_path / "d.h5", "tiles_per_slide=4", f"ranking={tmp_path}/ranking.csv"
        )
        == 1
    ), "two slides unranked"
    d = Pack(tmp_path / "d.h5")
    chosen = [scores[tuple(corner)] for corner in d.coords.tolist()]
    assert d.slides == ["S000"] * 4 and chosen == sorted(scores.values(), reverse=True)[:4]
    assert {
        row["slide"] for row in csv.DictReader((tmp_path / "failures.csv").read_text().splitlines())
    } == {"S001", "T2"}


def test_the_folders_road_and_the_slides_road_meet(cohort: Path, tmp_path: Path) -> None:
    """The set that rank_patches cuts, packed, is what packing cuts from the same slides and the
    list's own scores.
    """
    from mil import rank_patches

    arguments = [
        f"labels={cohort}/labels.csv",
        f"features={cohort}/features/stain_texture",
        f"slides={cohort}/slides",
    ]
    arguments += [
        f"output={tmp_path}/set",
        "top_k=3",
        "device=cpu",
        "training.epochs=1",
        "training.min_epochs=1",
        "val_fraction=0.4",
    ]
    (cohort / "labels.csv").write_text(
        "case_id,slide_id,label\n"
        + "".join(f"{i},{s},{'xy'[i % 2]}\n" for i, s in enumerate(("S000", "S001", "T2", "S003")))
    )
    shutil.copy(cohort / "slides" / "S001.tiff", cohort / "slides" / "S003.tiff")
    shutil.copy(bag_of(cohort, "S001"), bag_of(cohort, "S003"))
    shutil.copy(cohort / "tiles" / "coords" / "S001.h5", cohort / "tiles" / "coords" / "S003.h5")
    assert run(rank_patches.main, rank_patches.Config, arguments) == 0
    assert pack(f"dataset={tmp_path}/set", f"output={tmp_path}/folder.h5") == 0
    assert (
        from_slides(
            cohort,
            tmp_path / "slides.h5",
            "tiles_per_slide=3",
            f"ranking={tmp_path}/set/ann_root/ann.json",
        )
        == 0
    )
    packs = [Pack(tmp_path / f"{name}.h5") for name in ("folder", "slides")]
    contents = [
        {
            (p.slides[i], p.names[i]): (p.picture(i), p.features[i].tolist(), p.coords[i].tolist())
            for i in range(len(p))
        }
        for p in packs
    ]
    assert contents[0] == contents[1] and len(contents[0]) == 12
    assert packs[0].provenance["distillation"]["jpeg_quality"] == 95


def test_mismatches_are_listed_and_bad_slides_do_not_stop_the_rest(
    cohort: Path, tmp_path: Path, capsys
) -> None:
    bag = read_bag(bag_of(cohort, "S000"))
    moved = bag.coords.numpy().copy()
    moved[0] = [7, 7]
    other = read_bag(bag_of(cohort, "S001"))
    write_bag(bag_of(cohort, "S000"), bag.features, moved, bag.attributes)
    write_bag(
        bag_of(cohort, "S001"), other.features, other.coords, other.attributes | {"patch_size": 32}
    )
    assert from_slides(cohort, tmp_path / "set.h5") == 1
    rows = list(csv.DictReader((tmp_path / "problems.csv").read_text().splitlines()))
    x, y = bag.coords[0].tolist()
    assert [(row["slide"], row["patch"], row["kind"]) for row in rows] == [
        ("S000", f"{x}_{y}", "tile without feature"), ("S000", "7_7", "feature without tile"),
    ]  # fmt: skip
    failure = next(csv.DictReader((tmp_path / "failures.csv").read_text().splitlines()))
    assert failure["slide"] == "S001" and "patch_size 32 -> 64" in failure["error"]
    content = Pack(tmp_path / "set.h5")
    assert set(content.slides) == {"S000", "T2"} and content.provenance["failed"] == ["S001"]
    assert content.slides.count("S000") == len(bag.features) - 1
    parts = tmp_path / "set.h5.parts"
    assert sorted(part.name for part in parts.iterdir()) == ["S000.h5", "T2.h5"], (
        "kept for the next attempt"
    )
    write_bag(bag_of(cohort, "S001"), other.features * 2, other.coords, other.attributes)
    assert from_slides(cohort, tmp_path / "set.h5") == 0, (
        "the slide that had failed may be another one now"
    )
    content = Pack(tmp_path / "set.h5")
    assert (
        set(content.slides) == {"S000", "S001", "T2"}
        and not parts.exists()
        and not (tmp_path / "failures.csv").exists()
    )
    write_bag(bag_of(cohort, "S001"), other.features, other.coords, other.attributes)
    assert from_slides(cohort, tmp_path / "set.h5") == 2
    assert "holds another packed set: slides.S001" in capsys.readouterr().err


def test_a_damaged_bag_is_listed_and_a_damaged_set_is_made_again(
    cohort: Path, tmp_path: Path
) -> None:
    whole = bag_of(cohort, "S001").read_bytes()
    bag_of(cohort, "S001").write_bytes(whole[:500])
    output = tmp_path / "set.h5"
    assert from_slides(cohort, output) == 1
    failure = next(csv.DictReader((tmp_path / "failures.csv").read_text().splitlines()))
    assert failure["slide"] == "S001" and "cannot be read" in failure["error"]
    assert set(Pack(output).slides) == {"S000", "T2"}
    bag_of(cohort, "S001").write_bytes(whole)
    with h5py.File(bag_of(cohort, "S001"), "r+") as file:  # another tool's, with a bad tile
        del file["features"].attrs["sha256"]
        file["features"][0] = np.nan
    assert from_slides(cohort, output) == 1
    failure = next(csv.DictReader((tmp_path / "failures.csv").read_text().splitlines()))
    assert failure["slide"] == "S001" and "found NaN" in failure["error"]
    bag_of(cohort, "S001").write_bytes(whole)
    output.write_bytes(output.read_bytes()[:-100])
    assert from_slides(cohort, output) == 0
    assert set(Pack(output).slides) == {"S000", "S001", "T2"}


def test_a_killed_run_goes_on_from_its_finished_slides(
    cohort: Path, tmp_path: Path, monkeypatch
) -> None:
    cut, calls = pack_distillation.cut_slide, []

    def dies(job, provenance):
        calls.append(job.slide_id)
        if job.slide_id == "S001":
            raise KeyboardInterrupt
        cut(job, provenance)

    monkeypatch.setattr(pack_distillation, "cut_slide", dies)
    with pytest.raises(KeyboardInterrupt):
        from_slides(cohort, tmp_path / "set.h5", "tiles_per_slide=2", "workers=0")
    assert not (tmp_path / "set.h5").exists() and calls == ["S000", "S001"]
    monkeypatch.setattr(
        pack_distillation, "cut_slide", lambda *a: (calls.append(a[0].slide_id), cut(*a))
    )
    assert from_slides(cohort, tmp_path / "set.h5", "tiles_per_slide=2", "workers=0") == 0
    assert calls == ["S000", "S001", "S001", "T2"]
    assert from_slides(cohort, tmp_path / "whole.h5", "tiles_per_slide=2") == 0
    images = [Pack(tmp_path / f"{name}.h5").images_sha256 for name in ("set", "whole")]
    assert images[0] == images[1]


def test_a_slide_that_crashes_its_reader_is_listed(
    cohort: Path, tmp_path: Path, monkeypatch
) -> None:
    cut = pack_distillation.cut_slide
    monkeypatch.setattr(
        pack_distillation,
        "cut_slide",
        lambda job, made: die(signal.SIGSEGV) if job.slide_id == "S001" else cut(job, made),
    )
    assert from_slides(cohort, tmp_path / "set.h5", "tiles_per_slide=2") == 1
    failure = next(csv.DictReader((tmp_path / "failures.csv").read_text().splitlines()))
    assert (failure["slide"], failure["error"]) == (
        "S001",
        "the worker crashed (signal 11, SIGSEGV)",
    )
    assert set(Pack(tmp_path / "set.h5").slides) == {"S000", "T2"}


def test_bags_of_two_teachers_are_refused(
    cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with h5py.File(bag_of(cohort, "S001"), "r+") as file:
        file["features"].attrs["encoder"] = "plip"
    assert from_slides(cohort, tmp_path / "set.h5") == 2
    assert (
        "slides S000 and S001 differ in encoder 'stain_texture' -> 'plip'"
        in capsys.readouterr().err
    )
