"""The teacher's targets: centring against lightly over steps, Sinkhorn-Knopp against optimal
transport, and two processes against one.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import ot
import pytest
import torch
from lightly.loss.dino_loss import DINOLoss

from patch_encoder.selfdistill.losses.centring import centred_targets, update_centre
from patch_encoder.selfdistill.losses.sinkhorn import sinkhorn_targets
from tests.helpers import run_two_processes
from tests.patch_encoder.selfdistill.references import random_logits
from tests.patch_encoder.selfdistill.two_process_targets import TEMPERATURE, compute, inputs


def test_a_step_is_centred_by_the_steps_before_it() -> None:
    """The first by nothing, the second by a tenth of the first one's mean: lightly's order."""
    published, centre = DINOLoss(7, teacher_temp=0.05).double(), torch.zeros(7).double()
    for step in range(3):
        teacher = random_logits(2, 4, 7, seed=step) + step
        targets = centred_targets(teacher, centre, TEMPERATURE)
        if step == 0:
            assert torch.equal(targets, (teacher / TEMPERATURE).softmax(-1))
        if step == 1:
            first = random_logits(2, 4, 7, seed=0).mean(dim=(0, 1))
            expected = ((teacher - 0.1 * first) / TEMPERATURE).softmax(-1)
            torch.testing.assert_close(targets, expected, rtol=0, atol=1e-14)
        centre = update_centre(centre, teacher)
        published([*teacher], [*teacher])
        torch.testing.assert_close(centre, published.center[0, 0], rtol=0, atol=1e-14)


def test_momentum_is_the_share_of_the_old_centre() -> None:
    logits = torch.full((2, 3, 4), 2.0)
    assert torch.allclose(update_centre(torch.ones(4), logits, 0.75), torch.full((4,), 1.25))


@pytest.mark.parametrize("rounds", [1, 3])
def test_sinkhorn_is_entropic_optimal_transport(rounds: int) -> None:
    """Between samples and prototypes of equal weight, stopped after as many rounds."""
    logits = random_logits(2, 6, 5)
    flat = logits.flatten(0, 1).numpy()
    plan = ot.bregman.sinkhorn_knopp(
        np.full(12, 1 / 12), np.full(5, 1 / 5), -flat, TEMPERATURE, numItermax=rounds, stopThr=0,
        warn=False,
    )  # fmt: skip
    ours = sinkhorn_targets(logits, TEMPERATURE, rounds)
    np.testing.assert_allclose(ours.flatten(0, 1).numpy(), plan * 12, rtol=0, atol=1e-12)


def test_sinkhorn_uses_all_prototypes_evenly() -> None:
    targets = sinkhorn_targets(random_logits(2, 50, 8) + torch.arange(8) / 4, 0.1, rounds=200)
    torch.testing.assert_close(targets.sum(dim=-1), torch.ones(2, 50).double())
    torch.testing.assert_close(targets.mean(dim=(0, 1)), torch.full((8,), 1 / 8).double())


def test_sinkhorn_of_logits_beyond_any_exponential() -> None:
    targets = sinkhorn_targets(1000 * random_logits(2, 6, 5).float(), 0.01)
    assert targets.isfinite().all()
    torch.testing.assert_close(targets.sum(dim=-1), torch.ones(2, 6))


def test_targets_carry_no_gradient() -> None:
    logits = random_logits(2, 3, 4).requires_grad_()
    centre = torch.zeros(4).double()
    for target in (sinkhorn_targets(logits, 0.1), centred_targets(logits, centre, 0.1),
                   update_centre(centre, logits)):  # fmt: skip
        assert not target.requires_grad


@pytest.mark.process
def test_two_processes_have_the_targets_and_the_centre_of_one(tmp_path: Path) -> None:
    whole = compute(inputs())
    run_two_processes("tests.patch_encoder.selfdistill.two_process_targets", [str(tmp_path)])
    shares = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert whole["sinkhorn"].std() > 0.05
    joined = torch.cat([share["sinkhorn"] for share in shares], dim=1)
    torch.testing.assert_close(joined, whole["sinkhorn"], rtol=0, atol=1e-13)
    for name in whole.keys() - {"sinkhorn"}:
        for share in shares:
            torch.testing.assert_close(share[name], whole[name], rtol=0, atol=1e-13, msg=name)
