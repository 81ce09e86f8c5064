"""Where and in which precision to compute."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from wsi_common.errors import UserError

PRECISIONS = ("auto", "fp32", "bf16", "fp16")


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """`auto` -> this process's CUDA device, else the CPU; anything else is a torch device string.

    Raises:
        UserError: the string is no device, or CUDA is asked for and not there.
    """
    if name == "auto":
        name = f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu"
    elif name == "cuda":
        name = f"cuda:{local_rank}"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device '{name}': expected auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"device '{name}': expected a CUDA GPU, found none that torch {torch.__version__} can "
            "use; set device=cpu"
        )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def pick_precision(name: str, device: torch.device) -> str:
    """`auto` -> bf16 where the device has it in hardware (CUDA; CPUs with AMX or AVX512-BF16), else
    fp32.
    """
    if name not in PRECISIONS:
        raise UserError(f"precision '{name}': expected one of {', '.join(PRECISIONS)}")
    if name != "auto":
        if name == "fp16" and device.type == "cpu":
            raise UserError("precision 'fp16': expected a CUDA device, found cpu; use bf16 or fp32")
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    return "bf16" if _cpu_has_bf16() else "fp32"


def _cpu_has_bf16() -> bool:
    checks = (
        getattr(torch.cpu, name, None)
        for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    )
    return any(check is not None and check() for check in checks)


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """Autocast context for a resolved precision (fp32 | bf16 | fp16)."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16 if precision == "bf16" else torch.float16)
