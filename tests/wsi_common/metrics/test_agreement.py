"""Cohen's kappa against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics as sk

from tests.wsi_common.metrics.scored_slides import (
    draw_copies,
)
from wsi_common.metrics.agreement import kappa
from wsi_common.metrics.classification import confusion


@pytest.mark.parametrize(("power", "name"), [(0, None), (1, "linear"), (2, "quadratic")])
def test_kappa_is_scikit_learns(power: int, name: str | None):
    generator = np.random.default_rng(power)
    targets, called = generator.integers(0, 4, 90), generator.integers(0, 4, 90)
    called[:40] = targets[:40]
    weights = draw_copies(90, 5)
    values = kappa(confusion(targets, called, 4, weights), power)
    for value, weight in zip(values, weights, strict=True):
        assert value == pytest.approx(
            sk.cohen_kappa_score(targets, called, weights=name, sample_weight=weight)
        )
    assert np.isnan(kappa(np.array([[[5.0, 0], [0, 0]]]))[0])
