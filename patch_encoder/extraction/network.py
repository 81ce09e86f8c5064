"""An encoder's network made ready for inference: channels last, BatchNorm folded, fused or
compiled, batches of one shape.

Every batch that the network sees has the same shape (a last, partial one is padded): kernels are
chosen by shape, so a tile has the same features to the last bit whichever batch it falls into, and
compiled code is compiled once.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from patch_encoder.extraction.onednn_fusion import FusedNetwork
from patch_encoder.models.onnx_network import OnnxNetwork
from wsi_common.device import autocast
from wsi_common.errors import UserError
from wsi_common.memory import is_out_of_memory, reuse_large_blocks

logger = logging.getLogger(__name__)
CPU_ROWS = 8  # the same for any number of threads: the last bits of a feature may hang on it
FOLDING_TOLERANCE = 1e-3  # of the largest output
# by name, since torchvision and timm take seconds to load
CONVOLUTIONS = ("Conv2d", "Conv2dSame")
NORMS = ("BatchNorm2d", "FrozenBatchNorm2d")
ACTIVATED_NORMS = ("BatchNormAct2d", "FrozenBatchNormAct2d")  # timm's, with what follows the norm


@dataclass(frozen=True)
class PendingFeatures:
    """Features that the device may still be computing."""

    host: Tensor
    done: torch.cuda.Event | None

    def features(self) -> Tensor:
        """float32 (B, D) on the host, once they are there."""
        if self.done is not None:
            self.done.synchronize()
        return self.host


class Network:
    """An encoder's module on its device, called with batches of tiles; made ready with the first
    one.

    Args:
        model: batch of items -> (B, D).
        device, precision: resolved.
        batch_size: tiles of a batch. A network with weights sees all of them at once, on a CPU few
            at a time: activations above 32 MiB are mapped anew for every layer, a fifth of a
            ResNet-50's time at 32 tiles.
        compiler: backend of torch.compile; empty: not compiled.
        kernels: of a CPU, `fused`, `plain` or `auto`, as `FusedNetwork` has them.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        precision: str,
        batch_size: int,
        compiler: str = "",
        kernels: str = "fused",
    ) -> None:
        self.device, self.precision, self.compiler = device, precision, compiler
        self._kernels = kernels
        if device.type == "cpu":
            reuse_large_blocks()  # activations; mapped anew per batch they cost as much again
        # a module without weights would only compute the padding
        self.rows = (
            0
            if not has_weights(model)
            else min(batch_size, CPU_ROWS)
            if device.type == "cpu"
            else batch_size
        )
        self.batch_size = batch_size
        self._model = model.to(device, memory_format=torch.channels_last).eval()
        self._fused: FusedNetwork | None = None
        self._ready = self._warned = False

    @property
    def kernels(self) -> str:
        """Those in force; `fused` wherever there is no choice."""
        return self._fused.kernels if self._fused is not None else "fused"

    def launch(self, items: Tensor) -> PendingFeatures:
        """Start on items (n, ...); the caller goes on while CUDA computes.

        Where the memory does not suffice, this batch and all later ones go through the network in
        parts of half as many items.

        Raises:
            UserError: not even one item fits in the device's memory, or the network cannot be
                compiled.
        """
        pending = self._try_launch(items)
        while pending is None:
            self._halve()
            pending = self._try_launch(items)
        return pending

    def _halve(self) -> None:
        if not self._warned:
            logger.warning(
                "batch_size=%d: does not fit in the memory of %s, which gets fewer tiles at a time "
                "from now on; set a smaller batch_size next time",
                self.batch_size,
                self.device,
            )
        self.rows, self._warned = self.rows // 2, True
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _try_launch(self, items: Tensor) -> PendingFeatures | None:
        """As `launch`; None where the memory does not suffice and there is something to halve."""
        try:
            return self._launch(items)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if self.rows < 2:
                raise UserError(
                    f"batch_size={self.batch_size}: not even one tile at a time fits in the memory "
                    f"of {self.device}; choose another device or a smaller encoder"
                ) from None
            return None

    # inference_mode would guard compiled code by the kind of tensor: ordinary from workers, not
    # when padded
    @torch.no_grad()
    def _launch(self, items: Tensor) -> PendingFeatures:
        with _explain(_compile_errors() if self.compiler else ()):
            parts = [self._encode(part) for part in items.split(self.rows or len(items))]
            # to pinned memory on CUDA
            host = torch.cat(parts).to("cpu", non_blocking=True)
        if self.device.type != "cuda":
            return PendingFeatures(host, None)
        done = torch.cuda.Event()
        done.record()
        return PendingFeatures(host, done)

    def _encode(self, items: Tensor) -> Tensor:
        """float32 (n, D) of at most `rows` items, on the device."""
        filled = pad_batch(items, self.rows).to(self.device, non_blocking=True)
        if not self._ready:
            self._prepare(filled)
        if self._fused is not None:
            return self._fused(filled)[: len(items)].float()
        with autocast(self.device, self.precision):
            return self._model(filled)[: len(items)].float()

    def _prepare(self, items: Tensor) -> None:
        self._model, self._ready = fold_batch_norms(self._model, items[:2]), True
        if self.compiler:
            # freezing: weights become constants that are laid out for their kernels once
            options = {"freezing": True} if self.compiler == "inductor" else None
            self._model = torch.compile(
                self._model, backend=self.compiler, dynamic=False, options=options
            )
        elif self.device.type == "cpu":
            self._fused = FusedNetwork(self._model, self.precision, self._kernels)


def has_weights(model: nn.Module) -> bool:
    """Whether the device computes anything; it does not for a descriptor of the workers."""
    return isinstance(model, OnnxNetwork) or any(True for _ in model.parameters())


def pad_batch(items: Tensor, rows: int) -> Tensor:
    """Items (n, ...) with zeros behind them up to `rows`."""
    if len(items) >= rows:
        return items
    return torch.cat([items, items.new_zeros(rows - len(items), *items.shape[1:])])


def _compile_errors() -> tuple[type[Exception], ...]:
    from torch._dynamo.exc import (
        TorchDynamoException,
    )  # two seconds, which a run without torch.compile need not wait

    return (TorchDynamoException,)


@contextmanager
def _explain(compile_errors: tuple[type[Exception], ...]) -> Iterator[None]:
    try:
        yield
    except compile_errors as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(
            f"compile=true: torch.compile cannot compile this network here: {reason}; set "
            "compile=false"
        ) from None


def fold_batch_norms(model: nn.Module, example: Tensor) -> nn.Module:
    """A copy with every batch norm folded into its convolution; the model itself where there is
    none.

    A pair is a convolution whose output, when `example` passes, is a BatchNorm's input. Whether
    something else takes that output too cannot be seen, so the copy is compared on `example` and
    dropped when it differs.
    """
    pairs = _find_pairs(model, example)
    if not pairs:
        return model
    folded = copy.deepcopy(model)
    for convolution, norm in pairs:
        fused = fuse_conv_bn_eval(folded.get_submodule(convolution), folded.get_submodule(norm))  # type: ignore[type-var]
        folded.set_submodule(convolution, fused)
        folded.set_submodule(norm, _keep_activation(folded.get_submodule(norm)))
    folded = folded.to(memory_format=torch.channels_last)
    expected, found = model(example), folded(example)
    if (expected - found).abs().max() > FOLDING_TOLERANCE * expected.abs().max():
        logger.info("BatchNorm is not folded: another layer takes a convolution's output as well")
        return model
    return folded


def _keep_activation(norm: nn.Module) -> nn.Module:
    """What is left of a norm that is folded."""
    if type(norm).__name__ in ACTIVATED_NORMS:
        return nn.Sequential(norm.get_submodule("drop"), norm.get_submodule("act"))
    return nn.Identity()


def _find_pairs(model: nn.Module, example: Tensor) -> list[tuple[str, str]]:
    """(convolution, BatchNorm) by name, each called exactly once."""
    outputs: dict[
        int, tuple[str, Tensor]
    ] = {}  # the tensors are kept, so that no other gets their id
    calls: dict[str, int] = {}
    pairs: list[tuple[str, str]] = []
    kinds = (*NORMS, *ACTIVATED_NORMS)

    def remember(name: str, output: Tensor) -> None:
        calls[name] = calls.get(name, 0) + 1
        outputs[id(output)] = (name, output)

    def match(name: str, module: Any, source: Tensor) -> None:
        calls[name] = calls.get(name, 0) + 1
        if id(source) in outputs and not module.training and module.running_var is not None:
            pairs.append((outputs[id(source)][0], name))

    handles = []
    for name, module in model.named_modules():
        if type(module).__name__ in CONVOLUTIONS:
            handles.append(
                module.register_forward_hook(
                    lambda _, __, output, name=name: remember(name, output)
                )
            )
        elif type(module).__name__ in kinds:
            handles.append(
                module.register_forward_pre_hook(
                    lambda own, args, name=name: match(name, own, args[0])
                )
            )
    if any(type(module).__name__ in kinds for module in model.modules()):
        model(example)
    for handle in handles:
        handle.remove()
    return [pair for pair in pairs if all(calls[name] == 1 for name in pair)]
