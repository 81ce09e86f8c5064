"""DSMIL: streams and losses against loops, the authors' published weights against a
re-computation.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from mil.models.dsmil import DSMIL, load_published
from mil.training.engine import training_loss
from wsi_common.errors import UserError

BAG = torch.randn(11, 6, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def streams_by_hand(
    model: DSMIL, x: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Highest tile logits, bag logits and attention of each class, tile by tile."""
    tiles = [model.instance.weight @ t + model.instance.bias for t in x]
    queries = [model.query(t) for t in x]
    highest, bags, maps = [], [], []
    for c in range(len(tiles[0])):
        critical = max(range(len(x)), key=lambda n: float(tiles[n][c]))
        highest.append(tiles[critical][c])
        raw = [
            math.exp(float(queries[n] @ queries[critical]) / math.sqrt(128)) for n in range(len(x))
        ]
        a = [value / sum(raw) for value in raw]
        maps.append(a)
        bags.append(sum(a[n] * model.value(x[n]) for n in range(len(x))))
    stacked = torch.stack(bags)
    pooled = [(model.head.weight[c] * stacked).sum() + model.head.bias[c] for c in range(len(bags))]
    return torch.stack(highest), torch.stack(pooled), torch.tensor(maps)


@torch.no_grad()
@pytest.mark.parametrize(("nonlinear", "passing_v"), [(True, False), (False, False), (True, True)])
@pytest.mark.parametrize("classes", [1, 3])
def test_streams_are_their_loops(classes: int, nonlinear: bool, passing_v: bool):
    torch.manual_seed(0)
    model = DSMIL(6, classes, nonlinear=nonlinear, passing_v=passing_v).eval()
    highest, pooled, maps = streams_by_hand(model, BAG)
    output = model(BAG)
    torch.testing.assert_close(output.logits, (highest + pooled) / 2, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output.attention, maps.mean(0), rtol=1e-5, atol=1e-6)


def test_both_streams_are_trained_by_half():
    torch.manual_seed(0)
    model = DSMIL(6, 2).train()
    highest, pooled, _ = streams_by_hand(model, BAG)
    expected = 0.5 * cross_entropy(highest[None], torch.tensor([1])) + 0.5 * cross_entropy(
        pooled[None], torch.tensor([1])
    )
    torch.testing.assert_close(training_loss(model(BAG, None, 1), 1), expected)


def test_embedding_comes_first_where_it_is_wanted():
    model = DSMIL(6, 2, hidden=4).eval()
    bare = DSMIL(4, 2).eval()
    bare.load_state_dict(
        {name: w for name, w in model.state_dict().items() if not name.startswith("embed.")}
    )
    torch.testing.assert_close(model(BAG).logits, bare(model.embed(BAG)).logits)
    assert (model.embed(BAG) >= 0).all()


@torch.no_grad()
@pytest.mark.parametrize(
    ("file", "classes"), [("dsmil_c16_aggregator.pth", 1), ("dsmil_tcga_aggregator.pth", 2)]
)
def test_published_aggregators_give_what_their_weights_say(
    real_data: Path, file: str, classes: int
):
    path = real_data / "weights_small" / file
    model = load_published(path)
    w = torch.load(path, weights_only=True, map_location="cpu")
    x = torch.randn(40, 512, generator=torch.Generator().manual_seed(1))
    tiles = x @ w["i_classifier.fc.0.weight"].T + w["i_classifier.fc.0.bias"]
    q = torch.relu(x @ w["b_classifier.q.0.weight"].T + w["b_classifier.q.0.bias"])
    q = torch.tanh(q @ w["b_classifier.q.2.weight"].T + w["b_classifier.q.2.bias"])
    bags = []
    for c in range(classes):
        a = torch.softmax(q @ q[tiles[:, c].argsort(descending=True)[0]] / math.sqrt(128), 0)
        bags.append(a @ x)
    pooled = (
        torch.einsum("oci,ci->o", w["b_classifier.fcc.weight"], torch.stack(bags))
        + w["b_classifier.fcc.bias"]
    )
    output = model(x)
    assert output.logits.shape == (classes,)
    torch.testing.assert_close(output.logits, (pooled + tiles.amax(0)) / 2, rtol=1e-5, atol=1e-5)


def test_other_files_are_refused(real_data: Path, tmp_path: Path):
    with pytest.raises(UserError, match="expected a DSMIL aggregator"):
        load_published(
            real_data / "weights_small" / "dsmil_init.pth"
        )  # an initialisation: no classifiers in it
    with pytest.raises(UserError, match="found no file"):
        load_published(tmp_path / "nothing.pth")
