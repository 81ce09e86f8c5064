"""Where every MIL model drops units while it trains, with which probability, and of what."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from torch import nn

from mil.models import MODELS, build
from mil.models.layers import Dropout
from tests.mil.models.small_options import SMALL

TILES, GIVEN = 19, 0.5
BAG = torch.randn(TILES, 6, generator=torch.Generator().manual_seed(0))
Place = tuple[float, tuple[int, ...]]  # probability, shape of what goes through
EMBEDDED: Place = (GIVEN, (TILES, 16))
TENTH = 26 / 256  # 0.1 in steps of 1/256


def nystrom(tiles: int) -> dict[str, list[Place]]:
    """After both attentions of TransMIL, over the tiles (of the square) and the class token."""
    return {f"layer{i}.attn.to_out.1": [(TENTH, (tiles + 1, 16))] for i in (1, 2)}


def of_both(
    student: dict[str, list[Place]], teacher: dict[str, list[Place]]
) -> dict[str, list[Place]]:
    """Of a teacher-student model: the teacher keeps its dropout."""
    return {f"student.{n}": p for n, p in student.items()} | {
        f"teacher.{n}": p for n, p in teacher.items()
    }


TILE = {"tile.2": [EMBEDDED]}
EMBED = {"embed.2": [EMBEDDED]}
VALUE = {"value.0": [(0.0, (TILES, 16))]}  # a layer that drops nothing
# the branches' dropout does not depend on the one that is given
CLAM = EMBED | {name: [(0.25, (TILES, 8))] for name in ("attend.2", "gate.2")}
DTFD: dict[str, list[Place]] = {
    "drop": [(GIVEN, (4, 16)), (GIVEN, (1, 16))]
}  # pseudo-bags, then the slide
RRT: dict[str, list[Place]] = {
    "pooling.embed.2": [EMBEDDED],
    "region.attn.proj.1": [(TENTH, (4, 9, 16))],  # 2 x 2 regions of a square of 6
    "cross.attn.attn.proj.1": [(TENTH, (1, 4, 16))],
}
# on the weights of the attention as well, see test_hipt.py
HIPT: dict[str, list[Place]] = {
    "embed.2": [EMBEDDED],
    "attend.2": [EMBEDDED],
    "gate.2": [EMBEDDED],
    "project.2": [(GIVEN, (16,))],
    **{f"layers.{i}.attn.proj.1": [(GIVEN, (1, TILES, 16))] for i in (0, 1)},
    **{f"layers.{i}.mlp.{place}": [EMBEDDED] for i in (0, 1) for place in (2, 4)},
}
PLACES: dict[str, dict[str, list[Place]]] = {
    "mean": TILE,
    "max": TILE,
    **dict.fromkeys(("abmil", "gated_abmil", "multihead_abmil"), EMBED),
    "minet_instance": {"drop": [(GIVEN, (TILES, 4))]},
    "minet_embedding": {"drop": [(GIVEN, (TILES, 4))]},
    "minet_deep": {"drop": [(GIVEN, (TILES, width)) for width in (16, 8, 4)]},
    "minet_residual": {"drop": [(GIVEN, (TILES, 8))] * 3},
    "dsmil": {},  # no embedding, no value layer
    "clam_sb": CLAM,
    "clam_mb": CLAM,
    "transmil": EMBED | nystrom(25),
    # tiles are masked after the embedding: of mhim_dsmil's 10 of 19, of mhim_transmil's 17
    "mhim_abmil": of_both(EMBED, EMBED),
    "mhim_dsmil": of_both(EMBED | {"value.0": [(0.0, (9, 16))]}, EMBED | VALUE),
    "mhim_transmil": of_both(EMBED | nystrom(2), EMBED | nystrom(TILES)),
    "dtfd": DTFD,
    "ilra": {"drop": [(GIVEN, (16,))]},
    "rrt": RRT,
    "hipt": HIPT,
}


def note(places: list[Place], layer: nn.Module, given: tuple[torch.Tensor]) -> None:
    assert isinstance(layer, Dropout)
    places.append((layer.dropped / 256, tuple(given[0].shape)))


@contextmanager
def watched(model: nn.Module) -> Iterator[dict[str, list[Place]]]:
    """What goes through the model's dropout layers."""
    seen: dict[str, list[Place]] = {}
    hooks = []
    for name, layer in model.named_modules():
        assert not isinstance(layer, nn.Dropout) and (
            not isinstance(layer, nn.MultiheadAttention) or layer.dropout == 0
        )
        if isinstance(layer, Dropout):
            hooks.append(layer.register_forward_pre_hook(partial(note, seen.setdefault(name, []))))
    yield seen
    for hook in hooks:
        hook.remove()


def places_of(name: str, **options) -> dict[str, list[Place]]:
    torch.manual_seed(0)  # how many tiles MHIM masks hangs on the weights
    model = build(name, 6, 3, dropout=GIVEN, **SMALL[name] | options).train()
    with watched(model) as seen:
        model(BAG, None, 1)
    return seen


@pytest.mark.parametrize("name", [name for name in MODELS if name != "deform_mil"])
def test_dropout_is_where_the_docstring_says(name: str):
    assert places_of(name) == PLACES[name]


def test_options_of_dsmil_bring_their_dropout():
    assert places_of("dsmil", hidden=16, passing_v=True) == EMBED | {"value.0": [EMBEDDED]}


@pytest.mark.parametrize("name", ["transmil", "rrt"])
def test_attention_dropout_is_an_option(name: str):
    changed = {
        place[0] for places in places_of(name, attention_dropout=0.25).values() for place in places
    }
    assert changed == {GIVEN, 0.25}


def test_training_differs_by_dropout_alone():
    """What goes through the layers matters: two passes give two answers, without dropout one."""
    for name in PLACES:
        for dropout, same in ((GIVEN, False), (0.0, True)):
            still = {"attention_dropout": 0.0} if name in ("transmil", "rrt") and same else {}
            if name.startswith(("dtfd", "mhim")) or (name == "dsmil" and not same):
                continue  # random pseudo-bags and masks; DSMIL has none by default
            torch.manual_seed(0)
            model = build(name, 6, 3, dropout=dropout, **SMALL[name] | still).train()
            assert torch.equal(model(BAG, None, 1).logits, model(BAG, None, 1).logits) == same, name
