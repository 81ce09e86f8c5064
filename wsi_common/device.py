"""Where and in which precision to compute."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

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
    """Autocast context for a resolved precision (fp32 | bf16 | fp16).

    In a training on a CPU, 2D depthwise convolutions are computed in float32
    (`_DepthwiseInFloat`); what `torch.utils.checkpoint` computes again has to be called with
    `use_reentrant=True` then, since the other kind does not come back to this context.
    """
    if precision == "fp32":
        return nullcontext()
    if device.type == "cpu" and torch.is_grad_enabled():
        return _autocast_training_on_cpu()
    return torch.autocast(device.type, torch.bfloat16 if precision == "bf16" else torch.float16)


@contextmanager
def _autocast_training_on_cpu() -> Iterator[None]:
    with torch.autocast("cpu", torch.bfloat16), _DepthwiseInFloat():
        yield


class _DepthwiseInFloat(TorchFunctionMode):
    """Computes depthwise convolutions in float32 and gives their results as bfloat16.

    Their gradients take oneDNN several times as long in bfloat16 as in float32, so that a training
    step of an EfficientNet or a MobileNet was slower than without autocast
    (`benchmarks/small_networks.py`).
    """

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if function is not torch.conv2d or not _needs_float(args):
            return function(*args, **kwargs)
        images, weight, *others = args
        if others and isinstance(others[0], torch.Tensor):
            others[0] = others[0].float()
        with torch.autocast("cpu", enabled=False):
            return function(images.float(), weight.float(), *others, **kwargs).bfloat16()


def _needs_float(arguments: Sequence[Any]) -> bool:
    """Whether these are of a depthwise convolution in a training under autocast."""
    if len(arguments) < 2 or not (torch.is_grad_enabled() and torch.is_autocast_enabled("cpu")):
        return False
    images, weight = arguments[:2]
    return bool(weight.shape[1] == 1 and images.shape[-3] > 1)
