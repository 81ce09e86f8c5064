"""The benchmark of a step of pre-training: both loops take the same step, and memory is measured
training by training.
"""

from __future__ import annotations

import copy

import pytest
import torch

from benchmarks.pretraining_step import OurLoop, PlainLoop, run_memory
from benchmarks.pretraining_views import draw_tiles
from patch_encoder.selfdistill.student import build_student
from patch_encoder.selfdistill.view_recipe import ViewRecipe
from patch_encoder.selfdistill.views import make_views


def test_both_loops_take_the_same_step() -> None:
    recipe = ViewRecipe(global_size=32, local_size=16, local_number=2)
    views = make_views(draw_tiles(4, 40), None, torch.arange(4), recipe, 0)
    options = {"image_size": 32, "drop_path": 0.0, "out_dim": 16}
    torch.manual_seed(0)
    student = build_student("timm:test_vit", **options, hidden_dim=32, bottleneck_dim=64)
    plain, ours = PlainLoop(copy.deepcopy(student), 16), OurLoop(student, 16, 4)
    for loop in (plain, ours):
        loop.step(views)
    torch.testing.assert_close(ours.state.centre, plain.centre[0])
    for name, value in plain.student.state_dict().items():
        # the rates differ: what moved did so in the same direction
        torch.testing.assert_close(ours.state.student.state_dict()[name], value, rtol=0, atol=1e-3)


@pytest.mark.process
def test_memory_is_that_of_trainings_of_their_own() -> None:
    rows = run_memory((10, 20))["a tiny ViT from a slide"]
    assert list(rows) == ["10 steps", "20 steps"]
    assert rows["10 steps"]["ratio"] == 1 and rows["10 steps"]["peak MB"] > 100
    grown = rows["20 steps"]["peak MB"] / rows["10 steps"]["peak MB"]
    assert rows["20 steps"]["ratio"] == pytest.approx(grown)
