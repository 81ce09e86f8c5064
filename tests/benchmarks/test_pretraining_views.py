"""The benchmark of the views: what its figures are of, and that the PIL loop draws what the preset
says.
"""

from __future__ import annotations

import pytest
from PIL import Image

from benchmarks import pretraining_views
from benchmarks.pretraining_views import PIL_LOOP, build_pil_loop, draw_tiles, measure
from patch_encoder.selfdistill.view_recipe import PRESETS


def test_figures_are_per_tile_and_ratios_within_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    warm_up, rounds = [900.0, 900.0], [40.0, 8.0, 20.0, 2.0, 60.0, 6.0]
    times = iter([*warm_up, *rounds])
    monkeypatch.setattr(pretraining_views, "clock", lambda call: next(times))
    calls = {PIL_LOOP: (lambda: None, 2), "ours": (lambda: None, 4)}
    found = measure(calls, rounds=3)
    assert found[PIL_LOOP] == {"ms/tile": 20.0, "ratio": 1.0}
    assert found["ours"] == {"ms/tile": 1.5, "ratio": 20.0}


def test_the_pil_loop_is_dinos_multi_crop() -> None:
    picture = Image.fromarray(draw_tiles(1, 64)[0].permute(1, 2, 0).contiguous().numpy())
    made = build_pil_loop(PRESETS["dino"])(picture)
    assert [tuple(view.shape) for view in made] == [(3, 224, 224)] * 2 + [(3, 96, 96)] * 8
    assert all(float(view.min()) > -2.2 and float(view.max()) < 2.7 for view in made)
