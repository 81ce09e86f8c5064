"""What the doors of the compiled operators share, with an operator that is not built; the
operators' own tests do the rest.
"""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from wsi_common.errors import UserError
from wsi_common.ops.compiled_op import (
    CompiledOp,
    bound_of,
    compute_dtype,
    empty_gradients,
    takes_compiled,
    warn_once,
)


@pytest.fixture
def missing(tmp_path: Path) -> CompiledOp:
    """An operator without libraries."""

    def never(*_: object) -> None:
        raise AssertionError("registered without a library")

    return CompiledOp(
        tmp_path / "some" / "ops", "some", "op", "SOME_BACKEND", never, never, never, never, never
    )


def test_reasons_say_what_is_missing(missing: CompiledOp) -> None:
    assert "libsome_cpu.so is not built" in str(missing.unavailable("cpu"))
    assert missing.unavailable("cuda") == missing.unavailable("cpu"), (
        "the CPU library has the schema"
    )
    assert missing.unavailable("mps") == "there is no compiled kernel for mps"


def test_who_asks_comes_before_the_environment(
    missing: CompiledOp, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def takes(asked: str | None = None, device: str = "cpu") -> bool:
        return takes_compiled(asked, "SOME_BACKEND", device, missing.unavailable, "some operator")

    warn_once.cache_clear()
    monkeypatch.delenv("SOME_BACKEND", raising=False)
    with caplog.at_level(logging.WARNING):
        assert [takes(), takes(), takes("reference")] == [False] * 3
    assert [record.getMessage().split(",")[0] for record in caplog.records] == [
        "some operator runs in plain PyTorch"
    ]
    monkeypatch.setenv("SOME_BACKEND", "compiled")
    assert not takes("auto")
    with pytest.raises(UserError, match="SOME_BACKEND=compiled: .*not built"):
        takes()
    with pytest.raises(UserError, match="backend=fast: expected one of auto, compiled, reference"):
        takes("fast")
    assert takes_compiled("compiled", "SOME_BACKEND", "cpu", lambda device: None, "some operator")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_gradients_are_as_wide_as_what_is_computed_in(dtype: torch.dtype) -> None:
    value = torch.ones(2, 3, dtype=dtype).t()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    found = empty_gradients(value, torch.ones(4, 2), torch.ones(4))
    assert compute_dtype(value) == wide == found[0].dtype and found[0].is_contiguous()
    assert [tuple(gradient.shape) for gradient in found] == [(3, 2), (4, 2), (4,)]
    assert bound_of(value, value, value) is None, "only CUDA adds in an order that changes"
