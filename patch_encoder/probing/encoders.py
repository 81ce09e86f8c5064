"""Which encoders are probed: those that the user names, and always the controls beside them.

A figure says something of an encoder only next to what colour alone reaches (`mean_colour`,
`colour_statistics`), what a classical descriptor reaches (`stain_texture`), what its own network
reaches before any training, and what ImageNet alone reaches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from patch_encoder.models.encoder_table import ENCODERS
from patch_encoder.models.encoders import CLASSICAL, RANDOM, Encoder, build_encoder
from wsi_common.errors import UserError

CONTROLS = ("mean_colour", "colour_statistics", "stain_texture", "imagenet_lite0")


@dataclass(frozen=True)
class ProbedEncoder:
    """One row of the table.

    Attributes:
        label: name in the table.
        name, weights: of `build_encoder`.
        control: whether it is there for comparison only.
        starts: seeds of random weights, each a network of its own; empty: the weights as they are.
    """

    label: str
    name: str
    weights: str = ""
    control: bool = False
    starts: tuple[int, ...] = ()

    @property
    def has_network(self) -> bool:
        """Whether there is something to fine-tune."""
        return self.name not in CLASSICAL

    @property
    def seeds(self) -> tuple[int, ...]:
        """One number per network: the random starts, or 0."""
        return self.starts or (0,)

    def build(self, seed: int) -> Encoder:
        """The encoder, with the random weights of one of the `seeds` if it has random ones."""
        if not self.starts:
            return build_encoder(self.name, self.weights)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return build_encoder(self.name, self.weights, untrained=True)


def choose_encoders(specs: Sequence[str], random_starts: int) -> list[ProbedEncoder]:
    """The encoders of `name` or `name=weights`, then the controls.

    Args:
        specs: as the user wrote them.
        random_starts: random initialisations of each network; 0: none.

    Raises:
        UserError: an encoder is named twice.
    """
    starts = tuple(range(random_starts))
    chosen: list[ProbedEncoder] = []
    for spec in specs:
        name, _, weights = spec.strip().partition("=")
        label = "=".join(filter(None, (name, "/".join(Path(weights).parts[-2:]))))
        if weights == RANDOM:
            chosen.append(ProbedEncoder(label, name, "", control=True, starts=starts or (0,)))
        else:
            control = name in CONTROLS and not weights
            chosen.append(ProbedEncoder(label, name, weights, control))
    for probed in [one for one in chosen if one.has_network and not one.starts and starts]:
        label = f"{probed.label}, random weights"
        chosen.append(ProbedEncoder(label, probed.name, probed.weights, True, starts))
    named = [probed.label for probed in chosen]
    chosen += [
        ProbedEncoder(n, n, control=True) for n in CONTROLS if n in ENCODERS and n not in named
    ]
    twice = next((label for label in named if named.count(label) > 1), None)
    if twice is not None:
        raise UserError(f"encoders: expected each one once, found {twice} twice; leave one out")
    return chosen
