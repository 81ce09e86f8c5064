"""The rebuilt slide encoders on fabricated miniature checkpoints in the true key layout: they load
key by key, compute what the authors' code computes, and refuse other files.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from patch_encoder.slide_encoders import gigapath, longnet
from patch_encoder.slide_encoders.build import build_slide_encoder
from patch_encoder.slide_encoders.chief import ORGANS, load_chief
from patch_encoder.slide_encoders.gigapath import load_gigapath, make_positions
from patch_encoder.slide_encoders.longnet import attend_dilated
from patch_encoder.slide_encoders.places import PlacedTiles
from patch_encoder.tiles.slide_grid import SlideGrid
from tests.patch_encoder.slide_encoders import published
from wsi_common.errors import UserError

SIDE = 256


def place(cells: np.ndarray) -> PlacedTiles:
    corners = torch.from_numpy(cells * SIDE)
    return PlacedTiles(corners, SlideGrid(SIDE, (0, 0)), torch.from_numpy(cells), SIDE)


def draw_cells(count: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    numbers = rng.choice(40 * 40, count, replace=False)
    return np.stack((numbers // 40, numbers % 40), 1)


def test_chief_from_its_published_layout(tmp_path: Path):
    state, features = published.chief_state(), torch.randn(7, 12)
    torch.save(state, tmp_path / "CHIEF_pretraining.pth")
    encoder = build_slide_encoder("chief", str(tmp_path))  # the folder: found by its name
    vector = encoder.module(features, None)
    torch.testing.assert_close(vector, published.chief_by_hand(state, features))
    assert vector.shape == (12,)  # the weighted mean of the features themselves
    organ = ORGANS.index("lung")
    assert organ == 6
    anatomical = load_chief(state, "file", "lung").eval()(features, None)
    torch.testing.assert_close(anatomical, published.chief_by_hand(state, features, organ))
    assert anatomical.shape == (8,)


def test_chief_without_organs_in_the_file_still_gives_its_vector():
    state = {name: x for name, x in published.chief_state().items() if name != "organ_embedding"}
    features = torch.randn(4, 12)
    torch.testing.assert_close(
        load_chief(state, "file").eval()(features, None), published.chief_by_hand(state, features)
    )
    with pytest.raises(UserError, match="organ_embedding"):
        load_chief(state, "file", "lung")
    with pytest.raises(UserError, match="organ=lungs: .*lung"):
        load_chief(state, "file", "lungs")


def test_madeleine_from_its_published_layout(tmp_path: Path):
    state, features = published.madeleine_state(), torch.randn(9, 10)
    torch.save(state, tmp_path / "model.pt")
    module = build_slide_encoder("madeleine", str(tmp_path)).module
    torch.testing.assert_close(
        module(features, None), published.madeleine_by_hand(state, features), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("heads", [1, 3])
def test_feather_from_its_published_layout(tmp_path: Path, heads: int):
    state, features = published.feather_state(heads=heads), torch.randn(6, 9)
    save_file(state, tmp_path / "model.safetensors")
    module = build_slide_encoder("feather", str(tmp_path)).module
    torch.testing.assert_close(module(features, None), published.feather_by_hand(state, features))


@pytest.mark.parametrize(("norm", "pool"), [(True, "published"), (False, "mean")])
def test_gigapath_from_its_published_layout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, norm: bool, pool: str
):
    # segments that end within 13 tokens: each ratio has full, cut and single ones
    segments, ratios = (4, 8, 16), (1, 2, 4)
    monkeypatch.setattr(gigapath, "SEGMENTS", segments)
    monkeypatch.setattr(gigapath, "RATIOS", ratios)
    state, features = published.gigapath_state(norm=norm), torch.randn(12, 10)
    torch.save({"model": state}, tmp_path / "slide_encoder.pth")
    module = build_slide_encoder("gigapath", str(tmp_path), pool=pool).module
    cells = draw_cells(12)
    expected = published.gigapath_by_hand(state, features, cells, segments, ratios, pool)
    torch.testing.assert_close(module(features, place(cells)), expected, rtol=1e-4, atol=1e-4)


def test_gigapath_in_half_precision_is_close():
    module = load_gigapath(published.gigapath_state(), "file").eval()
    features, places = torch.randn(12, 10), place(draw_cells(12))
    with torch.inference_mode():
        expected = module(features, places)
        with torch.autocast("cpu", torch.bfloat16):
            found = module(features, places).float()
    assert found.isfinite().all()
    assert torch.nn.functional.cosine_similarity(found, expected, dim=0) > 0.99


def test_gigapaths_segments_are_the_authors():
    sizes = np.power(2, np.linspace(np.log2(1024), int(np.log2((262144 // 256) ** 2)), 5))
    assert tuple(sizes.astype(int).tolist()) == gigapath.SEGMENTS
    assert gigapath.RATIOS == (1, 2, 4, 8, 16)


def test_positions_are_rows_of_the_authors_table():
    cells = np.array([[0, 0], [3, 999], [712, 5]])
    expected = [published.position_by_hand(c * 1000 + r, 16) for c, r in cells]
    found = make_positions(torch.from_numpy(cells), 16).numpy()
    np.testing.assert_allclose(found, np.stack(expected), atol=1e-6)


@pytest.mark.parametrize("length", [1, 5, 8, 11])
@pytest.mark.parametrize("block", [1, 1 << 20])
def test_dilated_attention_is_torchscales(monkeypatch: pytest.MonkeyPatch, length: int, block: int):
    """Also with one query at a time, and with more tokens than the longest segment."""
    monkeypatch.setattr(longnet, "BLOCK", block)
    torch.manual_seed(length)
    q, k, v = (torch.randn(length, 4, 3, dtype=torch.float64) for _ in range(3))
    segments, ratios = (2, 3, 7), (1, 2, 4)
    parts = [attend_dilated(q, k, v, *pair) for pair in zip(segments, ratios, strict=True)]
    shares = torch.softmax(torch.stack([logs for _, logs in parts]), 0)
    mixed = sum(out * share[..., None] for (out, _), share in zip(parts, shares, strict=True))
    expected = published.dilated_by_hand(q, k, v, segments, ratios)
    torch.testing.assert_close(mixed, expected, rtol=1e-5, atol=1e-5)


def test_a_slide_beyond_gigapaths_table_is_refused():
    module = load_gigapath(published.gigapath_state(depth=1), "file").eval()
    with pytest.raises(UserError, match="at most 1000 x 1000 tiles"):
        module(torch.randn(1, 10), place(np.array([[1000, 2]])))


@pytest.mark.parametrize(
    ("name", "file", "make"),
    [
        ("chief", "CHIEF_pretraining.pth", published.chief_state),
        ("madeleine", "model.pt", published.madeleine_state),
        ("feather", "model.bin", published.feather_state),
        ("gigapath", "slide_encoder.pth", published.gigapath_state),
    ],
)
def test_files_of_other_layouts_are_one_line(tmp_path: Path, name: str, file: str, make):
    """No key may be missing, and none beside those that are known may be there."""
    state = make()
    for change in ("unknown", "missing"):
        other = dict(state)
        kept = [key for key in other if "attention" in key or "self_attn" in key]
        if change == "unknown":
            other["something.weight"] = torch.ones(2)
        else:
            del other[kept[-1]]
        torch.save(other, tmp_path / file)
        with pytest.raises(UserError, match=r"weights of another architecture|published layout"):
            build_slide_encoder(name, str(tmp_path / file))
    torch.save({"other": torch.ones(2)}, tmp_path / file)
    with pytest.raises(UserError, match="expected the published layout with the key"):
        build_slide_encoder(name, str(tmp_path / file))


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.target,))


def test_weights_that_hold_code_are_not_run(tmp_path: Path):
    torch.save({"model": Bomb(tmp_path / "ran")}, tmp_path / "CHIEF_pretraining.pth")
    with pytest.raises(
        UserError, match="tensors and plain containers only.*it holds .*, which may run code"
    ):
        build_slide_encoder("chief", str(tmp_path))
    assert not (tmp_path / "ran").exists()


def test_options_of_other_encoders_are_refused():
    with pytest.raises(UserError, match="organ: expected only with slide_encoder=chief"):
        build_slide_encoder("mean", organ="lung")
    with pytest.raises(UserError, match="pool: expected only with slide_encoder=gigapath"):
        build_slide_encoder("chief", pool="mean")
    with pytest.raises(UserError, match="slide encoder max has none"):
        build_slide_encoder("max", weights="x.pt")
    with pytest.raises(UserError, match="slide_encoder=titanic: .*titan"):
        build_slide_encoder("titanic")
    with pytest.raises(UserError, match="its weights are on no hub; give the file as weights="):
        build_slide_encoder("chief")
