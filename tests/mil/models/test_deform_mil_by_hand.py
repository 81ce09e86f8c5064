"""DeformMIL against its equations tile by tile in float64: encoder, class query, levels, holes,
shared cells, first offsets.
"""

from __future__ import annotations

from itertools import product
from math import cos, exp, floor, sin

import pytest
import torch
from torch import Tensor, nn

from mil.models.deform_mil import DeformMIL, SparseDeformAttn

WIDTH, HEADS, LEVELS, POINTS = 8, 2, 2, 2
PER_HEAD = WIDTH // HEADS
Cells = dict[tuple[int, int], Tensor]


class ByHand:
    """The forward of a bag in loops over tiles, heads, levels, points and corners; nothing of the
    module's but its weights.
    """

    def __init__(self, model: nn.Module, renormalise: bool) -> None:
        self.weights = {name: weight.double() for name, weight in model.state_dict().items()}
        self.renormalise = renormalise

    def linear(self, name: str, x: Tensor) -> Tensor:
        return self.weights[f"{name}.weight"] @ x + self.weights[f"{name}.bias"]

    def norm(self, name: str, x: Tensor) -> Tensor:
        scaled = (x - x.mean()) / ((x - x.mean()).square().mean() + 1e-5) ** 0.5
        return scaled * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def feed_forward(self, name: str, x: Tensor) -> Tensor:
        return x + self.linear(f"{name}.linear2", self.linear(f"{name}.linear1", x).clamp(min=0))

    def forward(
        self, features: Tensor, places: list[tuple[int, int]]
    ) -> tuple[Tensor, list[float]]:
        """Logits and attention of tiles in the cells `places`."""
        codes = [encoding(place) for place in places]
        tiles = [self.norm("embed.1", self.linear("embed.0", x)) for x in features.double()]
        for layer in ("encoder.0", "encoder.1"):
            values = [{cell: self.linear(f"{layer}.self_attn.value_proj", row) for cell,
            row in level.items()}
                      for level in pyramid(tiles, places)]  # fmt: skip
            around = [
                self.attend(layer, x + code, place, values)
                for x, code, place in zip(tiles, codes, places, strict=True)
            ]
            tiles = [
                self.norm(f"{layer}.norm1", x + there)
                for x, there in zip(tiles, around, strict=True)
            ]
            tiles = [
                self.norm(f"{layer}.norm2", self.feed_forward(f"{layer}.feed_forward", x))
                for x in tiles
            ]
        return self.decode(tiles, codes)

    def attend(
        self, layer: str, query: Tensor, place: tuple[int, int], values: list[Cells]
    ) -> Tensor:
        """What one tile samples around itself."""
        offsets = (
            self.linear(f"{layer}.self_attn.sampling_offsets", query)
            .view(HEADS, LEVELS, POINTS, 2)
            .tolist()
        )
        scores = (
            self.linear(f"{layer}.self_attn.attention_weights", query)
            .view(HEADS, LEVELS, POINTS)
            .tolist()
        )
        parts = []
        for head in range(HEADS):
            total = sum(
                exp(score) for level in scores[head] for score in level
            )  # over levels and points
            part = torch.zeros(PER_HEAD, dtype=torch.float64)
            for level, point in product(range(LEVELS), range(POINTS)):
                x, y = (
                    (axis + 0.5) / 2**level - 0.5 + d
                    for axis, d in zip(place, offsets[head][level][point], strict=True)
                )
                part += (
                    exp(scores[head][level][point]) / total * self.sample(values[level], head, x, y)
                )
            parts.append(part)
        return self.linear(f"{layer}.self_attn.output_proj", torch.cat(parts))

    def sample(self, level: Cells, head: int, x: float, y: float) -> Tensor:
        """Bilinear mixture of the four cells around (x, y)."""
        result, present = torch.zeros(PER_HEAD, dtype=torch.float64), 0.0
        for cell in product((floor(x), floor(x) + 1), (floor(y), floor(y) + 1)):
            if cell in level:
                weight = (1 - abs(x - cell[0])) * (1 - abs(y - cell[1]))
                result, present = (
                    result + weight * level[cell][head * PER_HEAD : (head + 1) * PER_HEAD],
                    present + weight,
                )
        return result / present if self.renormalise and present else result

    def decode(self, tiles: list[Tensor], codes: list[Tensor]) -> tuple[Tensor, list[float]]:
        """The class query over the tiles."""
        start = self.weights["decoder.query"][0]
        query, pooled, attention = self.linear("decoder.query_proj", start), [], [0.0] * len(tiles)
        keys = [
            self.linear("decoder.key_proj", x + code) for x, code in zip(tiles, codes, strict=True)
        ]
        values = [self.linear("decoder.value_proj", x) for x in tiles]
        for head in range(HEADS):
            own = slice(head * PER_HEAD, (head + 1) * PER_HEAD)
            odds = [exp(float(query[own] @ key[own]) / PER_HEAD**0.5) for key in keys]
            shares = [odd / sum(odds) for odd in odds]
            pooled.append(
                sum(
                    (share * value[own] for share, value in zip(shares, values, strict=True)),
                    torch.zeros(()),
                )
            )
            attention = [
                mean + share / HEADS for mean, share in zip(attention, shares, strict=True)
            ]
        token = self.norm(
            "decoder.norm1", start + self.linear("decoder.output_proj", torch.cat(pooled))
        )
        token = self.norm("decoder.norm2", self.feed_forward("decoder.feed_forward", token))
        return self.linear("head", token), attention


def encoding(place: tuple[int, int]) -> Tensor:
    """DETR's: sine and cosine in turn, wavelengths in a geometric series, y before x."""
    code = []
    for axis in reversed(place):
        for i in range(WIDTH // 4):
            phase = axis / 10_000 ** (2 * i / (WIDTH / 2))
            code += [sin(phase), cos(phase)]
    return torch.tensor(code, dtype=torch.float64)


def pyramid(tiles: list[Tensor], places: list[tuple[int, int]]) -> list[Cells]:
    """Rows of level 0, the mean of a cell's tiles, and of each further level, the mean of the rows
    of 2 x 2 cells.
    """
    levels = [means([(place, tile) for place, tile in zip(places, tiles, strict=True)])]
    for _ in range(1, LEVELS):
        levels.append(means([((x // 2, y // 2), row) for (x, y), row in levels[-1].items()]))
    return levels


def means(rows: list[tuple[tuple[int, int], Tensor]]) -> Cells:
    cells = {cell for cell, _ in rows}
    return {cell: torch.stack([row for at, row in rows if at == cell]).mean(0) for cell in cells}


@pytest.mark.parametrize("renormalise", [False, True])
def test_the_whole_forward_by_hand(renormalise: bool) -> None:
    torch.manual_seed(3)
    model = DeformMIL(5, 3, 0.0, WIDTH, 2, LEVELS, HEADS, POINTS, renormalise).eval()
    for name, weight in model.named_parameters():
        nn.init.normal_(weight, std=1.0 if "sampling_offsets.bias" in name else 0.5)
    # two islands, holes, and two tiles in cell (3, 1)
    places = [
        (0, 1),
        (1, 0),
        (1, 1),
        (2, 1),
        (3, 1),
        (3, 1),
        (2, 3),
        (4, 4),
        (9, 5),
        (9, 6),
        (10, 6),
    ]
    features, coords = (
        torch.randn(len(places), 5),
        torch.tensor(places) * 256 + torch.tensor([1000, 3000]),
    )
    coords[5] += torch.tensor([9, -20])
    output = model(features, coords)
    logits, attention = ByHand(model, renormalise).forward(features, places)
    torch.testing.assert_close(output.logits.double(), logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        output.attention.double(),
        torch.tensor(attention, dtype=torch.float64),
        rtol=1e-5,
        atol=1e-5,
    )
    assert max(attention) > 1.5 * min(attention)  # an error could hide behind uniform ones


def test_offsets_start_on_rays_a_cell_further_with_each_point() -> None:
    layer = SparseDeformAttn(16, heads=8, levels=2, points=3)
    offsets = layer.sampling_offsets.bias.view(8, 2, 3, 2)
    rays = torch.tensor(
        [[1, 0], [1, 1], [0, 1], [-1, 1], [-1, 0], [-1, -1], [0, -1], [1, -1]]
    ).float()
    for level, point in product(range(2), range(3)):
        torch.testing.assert_close(offsets[:, level, point], rays * (point + 1), rtol=0, atol=1e-5)
    assert not layer.sampling_offsets.weight.any()
    assert (
        not layer.attention_weights.weight.any() and not layer.attention_weights.bias.any()
    )  # uniform
