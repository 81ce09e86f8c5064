"""Bags on disk and in memory: every layout, every fault in one line, the same training wherever a
bag lies.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from mil.benchmark import Config
from mil.datasets.bags import (
    Sample,
    choose_memory,
    digest_bags,
    digest_each,
    find_bags,
    load_bags,
    select_usable_bags,
)
from mil.models import Standardised, build
from mil.training.engine import train_one_epoch
from mil.training.epochs import Smoother, draws
from mil.training.keys import warn_of_scale
from mil.training.prediction import predict, prefetch
from mil.training.recipes import Recipe
from patch_encoder.bags.bag import make_bag, open_bag, read_bag
from patch_encoder.bags.writer import write_bag
from wsi_common.config import load_config
from wsi_common.distributed import World
from wsi_common.errors import UserError

CPU = World(0, 1, torch.device("cpu"))
ROWS = np.random.default_rng(0).normal(size=(30, 5)).astype(np.float16)


def write(folder: Path, layout: str) -> Path:
    """One bag of ROWS in a layout that is met in the wild."""
    path = folder / f"{layout}.{'pt' if layout.startswith('pt') else 'h5'}"
    tensor = torch.from_numpy(ROWS)
    if layout == "pt_dict":
        torch.save({"feats": tensor, "coords": torch.arange(60).reshape(30, 2)}, path)
    elif layout.startswith("pt"):
        torch.save(
            tensor[None] if layout == "pt_3d" else tensor,
            path,
            _use_new_zipfile_serialization=layout != "pt_old",
        )
    else:
        with h5py.File(path, "w", userblock_size=512 if layout == "userblock" else 0) as file:
            options = {"compression": "gzip", "chunks": (7, 5)} if layout == "chunked" else {}
            rows = ROWS.astype({"big_endian": ">f4", "double": np.float64}.get(layout, np.float16))
            name = "feats" if layout == "trident" else "features"
            file.create_dataset(name, data=rows[None] if layout == "3d" else rows, **options)
            file["coords"] = np.arange(60).reshape(30, 2)
    return path


LAYOUTS = [
    "plain",
    "chunked",
    "3d",
    "trident",
    "big_endian",
    "double",
    "userblock",
    "pt",
    "pt_dict",
    "pt_old",
    "pt_3d",
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_read_whole_by_rows_and_by_blocks(tmp_path: Path, layout: str):
    path = write(tmp_path, layout)
    bag, expected = open_bag(path), torch.from_numpy(ROWS).float()
    assert bag.shape == (30, 5) and (bag.offset is not None) == (
        layout in ("plain", "3d", "trident", "double")
    )
    half = layout not in ("big_endian", "double")
    assert bag.read().dtype == (torch.float16 if half else torch.float32)
    assert torch.equal(bag.read().float(), expected) and bag.nbytes == 30 * 5 * (2 if half else 4)
    rows = torch.tensor([29, 3, 3, 0])
    assert torch.equal(bag.rows(rows).float(), expected[rows])
    parts = list(bag.blocks(8))
    assert [len(part) for part in parts] == [8, 8, 8, 6] and torch.equal(
        torch.cat(parts).float(), expected
    )
    assert torch.equal(read_bag(path).read(), expected)
    if not layout.startswith("pt") or layout == "pt_dict":
        assert bag.coords is not None and bag.coords.tolist()[1] == [2, 3]


def test_one_bag_under_two_patients_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    features = np.ones((2, 3), np.float32)
    files = {name: tmp_path / f"{name}.h5" for name in "abc"}
    for name, path in files.items():
        write_bag(path, features * (name == "c"), [[0, 0], [1, 1]], {})
    with caplog.at_level("WARNING"):
        digest = digest_each(files, {"a": "P1", "b": "P1", "c": "P2"})
        assert not caplog.records, "a patient may have a slide twice"
        assert digest == digest_each(files, {"a": "P1", "b": "P2", "c": "P3"})
    (record,) = caplog.records
    assert "a (P1) and b (P2) have the same features" in record.getMessage()


def test_all_bad_bags_come_in_one_line_or_are_left_out(
    make_cohort, caplog: pytest.LogCaptureFixture
):
    folder = make_cohort(slides=6) / "bags"
    faults = {
        "s01": np.full((3, 8), np.nan),
        "s02": np.zeros((0, 8)),
        "s03": np.zeros((3, 7)),
        "s04": None,
    }
    for slide, features in faults.items():
        path = folder / "h5_files" / f"{slide}.h5"
        path.write_bytes(b"no bag")
        if features is not None:
            with h5py.File(path, "w") as file:
                file["features"] = features
    files = find_bags(folder, [f"s{i:02d}" for i in range(6)])
    with pytest.raises(UserError) as caught:
        load_bags(files)
    line = str(caught.value)
    with pytest.raises(UserError) as digested:  # what comes before it in a stage
        digest_bags(files)
    assert str(digested.value) == line
    assert (
        "\n" not in line
        and line.startswith("4 of 6 bags cannot be used")
        and "skip_bad=true" in line
    )
    for part in (
        "s01.h5: expected finite",
        "s02.h5: expected at least one tile",
        "s03.h5: expected 8 features",
        "s04.h5",
    ):
        assert part in line
    assert list(select_usable_bags(files)) == ["s00", "s05"] and "left out" in caplog.text
    with pytest.raises(UserError, match="s01.h5: expected finite"):
        select_usable_bags({"s01": files["s01"]})


def test_a_double_too_large_for_float32_is_not_finite(tmp_path: Path):
    with h5py.File(tmp_path / "s.h5", "w") as file:
        file["features"] = np.array([[1.0, 1e300]])
    with pytest.raises(UserError, match="NaN or infinity in 1 of 1 tiles"):
        load_bags({"s": tmp_path / "s.h5"})


def test_memory_budget_decides_where_and_nothing_else(
    make_cohort, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO)
    files = find_bags(make_cohort(slides=6) / "bags", [f"s{i:02d}" for i in range(6)])
    size = 12 * 8 * 4
    results = []
    for memory, held in ((10**9, 6), (2 * size, 2), (0, 0)):
        bags = load_bags(files, memory)
        assert sum(bag.features is not None for bag in bags.values()) == held
        samples = [Sample(slide, bag, i % 2) for i, (slide, bag) in enumerate(bags.items())]
        torch.manual_seed(0)
        model = build("abmil", 8, 2, standardize=True)
        assert isinstance(model, Standardised)
        model.fit([sample.bag for sample in samples])
        recipe = Recipe(max_tiles=5)
        loss = train_one_epoch(
            model,
            samples,
            torch.optim.SGD(model.parameters(), 0.1),
            recipe,
            CPU,
            [3, 1, 0, 2, 5, 4],
        )
        results.append((loss, predict(model, samples, CPU.device).tolist()))
    assert results[0] == results[1] == results[2]
    assert "4 of 6 stay on disk" in caplog.text


def test_memory_of_a_process(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("mil.datasets.bags.free_memory", lambda: 4800)
    assert choose_memory(0.0) == 2400 and choose_memory(0.0, 3) == 800
    assert choose_memory(2.5) == 2_500_000_000 and choose_memory(2.5, 4) == 2_500_000_000
    with pytest.raises(UserError, match="ram_gb=-1"):
        choose_memory(-1.0)


def test_drawn_tiles_are_new_in_every_epoch_and_the_same_again(tmp_path: Path):
    bag = Sample("a", make_bag(torch.zeros(30, 5)), 0)
    small = Sample("b", make_bag(torch.zeros(4, 5)), 1)

    def drawn(seed: int) -> list:
        return [
            tiles if tiles is None else tiles.tolist()
            for _, tiles in draws([(bag, 0), (bag, 1), (small, 2)], 6, seed)
        ]

    first, second, third = drawn(1)
    assert (
        len(set(first)) == 6
        and first == sorted(first)
        and max(first) < 30
        and first != second
        and third is None
    )
    assert drawn(1) == [first, second, None] and drawn(2)[0] != first
    assert [tiles for _, tiles in draws([(bag, 0)], 0, 1)] == [None]


def test_bags_on_disk_are_loaded_ahead_in_order_and_errors_arrive(tmp_path: Path):
    stored, threads = open_bag(write(tmp_path, "plain")), []

    class Watched(Sample):
        def load(
            self, tiles: torch.Tensor | None = None
        ) -> tuple[torch.Tensor, torch.Tensor | None]:
            threads.append(threading.current_thread())
            if self.slide_id == "3":
                raise UserError("slide 3 has gone")
            return super().load(tiles)

    samples = [Watched(str(i), stored, 0) for i in range(5)]
    seen = []
    with pytest.raises(UserError, match="slide 3 has gone"):
        for sample, (features, _) in prefetch([(sample, None) for sample in samples], CPU.device):
            seen.append(sample.slide_id)
            assert features.shape == (30, 5)
            deadline = time.monotonic() + 20
            while len(threads) < min(len(seen) + 2, 4) and time.monotonic() < deadline:
                time.sleep(0.001)  # the next two come while this one is held
            assert len(threads) >= min(len(seen) + 2, 4)
    assert seen == ["0", "1", "2"] and threading.main_thread() not in threads
    assert samples[0].bag.features is None


def test_smoothed_selection_is_a_moving_average():
    plain, smooth = Smoother(0.0), Smoother(0.75)
    scores = [0.5, 0.9, 0.5, 0.7]
    expected = scores[0]
    for score in scores:
        values = {"auc": score, "loss": 1.0, "threshold": 0.5}
        expected = 0.75 * expected + 0.25 * score
        assert plain(values, "auc") == {"auc": score, "loss": 1.0}
        assert smooth(values, "auc")["auc"] == pytest.approx(expected)
    before = smooth.values["auc"]
    assert smooth({"auc": math.nan, "loss": 1.0}, "auc") == {"auc": before, "loss": 1.0}
    assert math.isnan(plain({"auc": math.nan, "loss": 1.0}, "auc")["auc"])
    unknown = Smoother(0.5)
    for score in (math.nan, 0.6, 0.8):
        unknown({"auc": score, "loss": 1.0}, "auc")
    assert unknown.values["auc"] == pytest.approx(0.7)
    again = Smoother(0.75)
    again.load_state_dict(smooth.values)
    assert again({"auc": 1.0, "loss": 0.0}, "auc") == smooth({"auc": 1.0, "loss": 0.0}, "auc")
    with pytest.raises(UserError, match=r"training.smoothing=1\.0"):
        Smoother(1.0)


def test_features_of_another_scale_are_reported_once(
    make_cohort, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    small, usual = (make_cohort(name) / "bags" for name in ("small", "usual"))
    for path in (small / "h5_files").iterdir():
        bag = open_bag(path)
        write_bag(path, bag.read() * 0.05, bag.coords, bag.attributes)
    caplog.set_level(logging.WARNING)
    for folder, standardize, count in ((small, False, 1), (usual, False, 0), (small, True, 0)):
        caplog.clear()
        given = [f"labels={small.parent}/labels.csv", f"features=[{folder}]", "folds=2"]
        given += [f"output={tmp_path}/out", f"standardize={standardize}"]
        load_config(Config, given).read_cohort({"uni": folder})
        found = [record for record in caplog.records if "standardize=true" in record.getMessage()]
        assert len(found) == count
    caplog.clear()
    warn_of_scale("uni", find_bags(small, ["s00", "s01"]))
    assert "features of uni: expected a standard deviation near 1, found 0.0" in caplog.text
