"""Losses over the rows of all processes: rows, value and gradient of two processes are those of
one.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.detection_kd.losses.gathered_gradient import inputs, loss
from tests.helpers import run_two_processes
from wsi_common.distributed import gather_rows


@pytest.mark.process
def test_two_processes_have_the_gradient_of_the_whole_batch(tmp_path: Path) -> None:
    layer, x, teacher = inputs()
    rows = layer(x)
    value = loss(rows, teacher)
    value.backward()
    assert layer.weight.grad is not None and layer.weight.grad.abs().min() > 1e-6
    run_two_processes("tests.detection_kd.losses.gathered_gradient", [str(tmp_path)])
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert torch.allclose(found["rows"], rows.detach(), rtol=0, atol=1e-14), (
            "in the order of the ranks"
        )
        assert torch.allclose(found["loss"], value.detach(), rtol=1e-12)
        assert torch.allclose(found["weight"], layer.weight.grad, rtol=1e-9, atol=1e-12)
        # relations do not see a shift: the bias has the contrastive term's gradient alone
        assert layer.bias.grad is not None and torch.allclose(
            found["bias"], layer.bias.grad, rtol=1e-9, atol=1e-12
        )


def test_one_process_keeps_its_rows() -> None:
    rows = torch.randn(3, 2, requires_grad=True)
    assert gather_rows(rows) is rows
