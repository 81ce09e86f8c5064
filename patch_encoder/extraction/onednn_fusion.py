"""A convolutional network on a CPU with its activations and residual sums inside the convolutions,
weights packed once.

A ResNet-50 whose BatchNorm is folded spends a fifth of its time on passes over memory that only
rectify or add, and more on laying its weights out anew for every batch. oneDNN does both within a
convolution; torch.compile calls those operators on CPUs, here they are called without a compiler,
on the graph of aten calls that one batch leaves behind when it passes.
"""

from __future__ import annotations

import logging
import math
import operator
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from wsi_common.device import autocast

logger = logging.getLogger(__name__)
aten = torch.ops.aten
CPU = torch.device("cpu")
CONVOLUTION, ADD, RELU = aten.convolution.default, aten.add.Tensor, aten.relu.default
HARDTANH = aten.hardtanh.default  # what ReLU6 is
ACTIVATIONS = {
    RELU: "relu",
    HARDTANH: "hardtanh",
    aten.silu.default: "swish",
    aten.hardswish.default: "hardswish",
}  # as oneDNN calls them
KERNELS = ("auto", "fused", "plain")
MARGIN = 1.15  # as many times faster must another way be to be taken instead of the first
TURNS, SECONDS, SHORT = 3, 1.0, 0.05  # of a measurement; of calls between SHORT and SECONDS
TOLERANCE = {"fp32": 1e-5, "bf16": 3e-2}  # of the largest output
MAX_POOL = aten.max_pool2d_with_indices.default
FRESH = (
    CONVOLUTION,
    ADD,
    *ACTIVATIONS,
    MAX_POOL,
    aten.mean.dim,
)  # what gives memory of its own, and keeps no hold of what it read


class FusedNetwork:
    """A network in evaluation mode, called with batches on the CPU without gradients; a graph for
    the last shape that was seen.

    Where nothing can be fused, or the graph gives something else than the network, the network
    itself is called.

    Args:
        model: batch of items -> (B, D).
        precision: fp32 or bf16.
        kernels: `fused`; `plain`, the network itself; `auto`: the graph, unless the network is
            faster on the first batch.

    Attributes:
        kernels: `auto` until the first batch has passed. What is chosen stays, since the two differ
            by rounding.
    """

    def __init__(self, model: nn.Module, precision: str, kernels: str = "fused") -> None:
        assert kernels in KERNELS
        self._model, self._precision, self.kernels = model, precision, kernels
        self._seen: tuple[object, ...] = ()
        self._graph: GraphModule | None = None

    def __call__(self, items: Tensor) -> Tensor:
        """(B, ...) -> (B, D)."""
        seen = (items.shape, items.stride(), items.dtype)
        if seen != self._seen and self.kernels != "plain":
            self._graph, self._seen = fuse_network(self._model, items, self._precision), seen
            self._choose(items)
        if self._graph is not None and not torch.is_grad_enabled():
            return self._graph(items)
        return self._call_plain(items)

    def _call_plain(self, items: Tensor) -> Tensor:
        with autocast(CPU, self._precision):
            return self._model(items)

    @torch.no_grad()
    def _choose(self, items: Tensor) -> None:
        if self.kernels != "auto":
            return
        self.kernels, graph = "fused", self._graph
        if graph is not None:
            ways = {"fused": lambda: graph(items), "plain": lambda: self._call_plain(items)}
            self.kernels = choose_fastest(ways)
        if self.kernels == "plain":
            self._graph = None


def choose_fastest(
    calls: Mapping[str, Callable[[], object]], clock: Callable[[], float] = time.perf_counter
) -> str:
    """Time calls that take turns, for one or two seconds, and return the name of the fastest.

    The first one stays unless another is `MARGIN` times as fast, so that noise rarely decides; it
    stays also where a call is too short for the choice to matter, or too long for this time.
    """
    shortest, start = dict.fromkeys(calls, math.inf), clock()
    first, turn = next(iter(calls)), 0
    while turn < TURNS and clock() - start < SECONDS:
        for name, call in calls.items():
            began = clock()
            call()
            shortest[name] = min(shortest[name], clock() - began)
            if not SHORT <= shortest[first] <= SECONDS:
                return first
        turn += 1
    fastest = min(shortest, key=lambda name: shortest[name])
    chosen = fastest if MARGIN * shortest[fastest] < shortest[first] else first
    times = ", ".join(f"{name} {1e3 * seconds:.0f} ms" for name, seconds in shortest.items())
    logger.info("kernels of the network: %s (one call: %s)", chosen, times)
    return chosen


@torch.no_grad()
def fuse_network(model: nn.Module, example: Tensor, precision: str = "fp32") -> GraphModule | None:
    """The network as a graph for batches like `example`; None where there is nothing to gain, or no
    way.

    The graph holds packed weights, which cannot be saved.
    """
    if not _can_fuse(model, example, precision):
        return None
    try:
        graph = _trace(model, example, precision)
        gained = 0
        for node in list(graph.graph.nodes):
            gained += _fuse_convolution(graph, node) if _fits(graph, node) else 0
        if not gained:
            return None
        graph.graph.eliminate_dead_code()
        graph.recompile()
        # not the example: what came of it as a constant would pass
        other = example.flip(0, -1)
        found = graph(other)
    except (
        RuntimeError
    ) as error:  # values that decide what is computed; operators without a form for this layer
        reason = str(error).strip().partition("\n")[0][:160]
        logger.info("convolutions are not fused: %s: %s", type(model).__name__, reason)
        return None
    with autocast(CPU, precision):
        expected = model(other)
    if not (expected - found).abs().max() <= TOLERANCE[precision] * expected.abs().max():
        logger.info(
            "convolutions are not fused: the graph of %s gives other features", type(model).__name__
        )
        return None
    return graph


def _can_fuse(model: nn.Module, example: Tensor, precision: str) -> bool:
    """Whether it is worth a try: a transformer has one convolution, of its patches."""
    places = {tensor.device.type for tensor in (example, *model.parameters(), *model.buffers())}
    return (
        places == {"cpu"}
        and not model.training
        and example.numel() > 0
        and precision in TOLERANCE
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and hasattr(torch.ops.mkldnn, "_convolution_pointwise_")
        and (precision == "fp32" or torch.ops.mkldnn._is_mkldnn_bf16_supported())
        and sum(isinstance(module, nn.Conv2d) for module in model.modules()) > 1
    )


def _trace(model: nn.Module, example: Tensor, precision: str) -> GraphModule:
    """The aten calls of one batch, none of which changes its arguments."""
    from torch.fx.experimental.proxy_tensor import make_fx  # a second

    def forward(items: Tensor) -> Tensor:
        with autocast(CPU, precision):
            return model(items)

    return make_fx(torch.func.functionalize(forward))(example)


def _fits(graph: GraphModule, node: Node) -> bool:
    """A convolution of maps with constant weights."""
    if node.target is not CONVOLUTION:
        return False
    maps, weight, bias, *_, transposed, _, _ = node.args
    constants = [_read_constant(graph, weight), _read_constant(graph, bias)]
    return (
        isinstance(maps, Node)
        and _read_meta(maps) is not None
        and len(_read_meta(maps).shape) == 4
        and not transposed
        and constants[0] is not None
        and (bias is None or constants[1] is not None)
        and _read_meta(maps).dtype == _read_meta(node).dtype == constants[0].dtype
    )


def _fuse_convolution(graph: GraphModule, node: Node) -> int:
    """Fuse a convolution with a sum and a rectifier, or with any activation, behind it; returns how
    many of these go.
    """
    maps, weight, bias, stride, padding, dilation, _, _, groups = node.args
    packed = torch.ops.mkldnn._reorder_convolution_weight(
        _read_constant(graph, weight),
        padding,
        stride,
        dilation,
        groups,
        list(_read_meta(maps).shape),
    )
    total = _find_only_user(node, ADD)
    addend = _find_addend(total, node) if total is not None else None
    summed = node if total is None or addend is None else total
    activated = _find_only_user(summed, *(ACTIVATIONS if addend is None else [RELU]))
    last = activated or summed
    layer = (padding, stride, dilation, groups)
    with graph.graph.inserting_before(last):
        weights = [
            _add_buffer(graph, packed),
            None if bias is None else _add_buffer(graph, _read_constant(graph, bias)),
        ]
        if addend is None:
            fused = _add_call(
                graph.graph,
                "_convolution_pointwise",
                "default",
                maps,
                *weights,
                *layer,
                *_describe_activation(activated),
            )
        else:
            kinds = ("add", 1.0, None if activated is None else "relu", [], "")
            free = _free(addend, total)
            name, pair = (
                ("_convolution_pointwise_", (addend, maps))
                if free
                else ("_convolution_pointwise", (maps, addend))
            )
            fused = _add_call(graph.graph, name, "binary", *pair, *weights, *layer, *kinds)
    fused.meta = dict(last.meta)
    last.replace_all_uses_with(fused)
    replaced = list(dict.fromkeys((last, summed, node)))
    for old in replaced:
        graph.graph.erase_node(old)
    return len(replaced) - 1


def _describe_activation(node: Node | None) -> tuple[str, list[float], str]:
    """Name, scalars and algorithm of an activation, as oneDNN wants them."""
    if node is None:
        return "none", [], ""
    limits = []
    if node.target is HARDTANH:
        given = [float(value) for value in node.args[1:]]
        limits = given + [-1.0, 1.0][len(given) :]  # what is not given is its default
    return ACTIVATIONS[node.target], limits, ""


def _add_call(graph: Graph, name: str, overload: str, *arguments: Any) -> Node:
    return graph.call_function(getattr(getattr(torch.ops.mkldnn, name), overload), arguments)


def _add_buffer(graph: GraphModule, value: Tensor | None) -> Node:
    name = f"packed_{len(list(graph.buffers()))}"
    graph.register_buffer(name, value, persistent=False)
    return graph.graph.get_attr(name)


def _find_only_user(node: Node, *targets: object) -> Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].target in targets else None


def _find_addend(total: Node, node: Node) -> Node | None:
    """What is added to a convolution's maps, of their shape; None where the sum is another."""
    addends = [argument for argument in total.args if argument is not node]
    if (
        total.kwargs
        or len(total.args) != 2
        or len(addends) != 1
        or not isinstance(addends[0], Node)
    ):
        return None
    one, other, both = (_read_meta(part) for part in (node, addends[0], total))
    alike = other is not None and (one.shape, one.dtype) == (other.shape, other.dtype) == (
        both.shape,
        both.dtype,
    )
    return addends[0] if alike else None


def _free(addend: Node, total: Node) -> bool:
    """Whether the sum may overwrite the addend: nobody else reads that memory any more."""
    others = [user for user in addend.users if user is not total]
    return _is_fresh(addend) and all(_is_fresh(user) and user < total for user in others)


def _is_fresh(node: Node) -> bool:
    if node.target is operator.getitem:
        node = node.args[0]  # type: ignore[assignment]
    return node.target in FRESH or getattr(node.target, "namespace", "") == "mkldnn"


def _read_constant(graph: GraphModule, node: object) -> Tensor | None:
    """A weight, also one that autocast casts for every batch."""
    if not isinstance(node, Node):
        return None
    if node.op == "get_attr":
        return getattr(graph, str(node.target)).detach()
    if (
        node.target is aten._to_copy.default
        and (source := _read_constant(graph, node.args[0])) is not None
    ):
        return aten._to_copy.default(source, **node.kwargs)
    return None


def _read_meta(node: Node) -> Any:
    """Shape and dtype of what it gave; None for weights."""
    return node.meta.get("tensor_meta")
