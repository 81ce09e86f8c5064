"""The probes against scikit-learn, on signals that are there and on those that are not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from patch_encoder.models.encoders import Encoder, PixelEncoder
from patch_encoder.models.transforms import ToInputSize
from patch_encoder.probing import knn
from patch_encoder.probing.fine_tune import (
    FineTuneKeys,
    fine_tune_probe,
    group_by_layer,
    number_layers,
    turn,
)
from patch_encoder.probing.knn import knn_probe, probe_features
from patch_encoder.probing.linear import STRENGTHS, choose_strength, linear_probe
from wsi_common.errors import UserError

RANDOM = np.random.default_rng(0)


def make_features(shift: float, count: int = 120) -> tuple[np.ndarray, np.ndarray]:
    """Three classes whose means are `shift` apart in 8 dimensions."""
    targets = np.arange(count) % 3
    features = RANDOM.normal(size=(count, 8)) + shift * np.eye(8)[targets]
    return features.astype(np.float32), targets


# --- k-NN -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 20, 500])
def test_knn_votes_as_scikit_learn_with_the_same_weights(
    k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(knn, "CHUNK_BYTES", 4 * 120 * 7)  # several chunks, the last one shorter
    features, targets = make_features(1.0)
    test = RANDOM.normal(size=(50, 8)).astype(np.float32)
    model = KNeighborsClassifier(
        min(k, len(features)),
        metric="cosine",
        algorithm="brute",
        weights=lambda distance: np.exp((1 - distance) / 0.07),
    )
    expected = model.fit(features, targets).predict_proba(test)
    found = knn_probe(features, targets, test, 3, k)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_balanced_votes_are_divided_by_the_shares_of_the_classes() -> None:
    train = np.array([[1.0, 0.0]] * 4, np.float32)
    shares = knn_probe(train, np.array([0, 0, 0, 1]), train[:1], 2)
    balanced = knn_probe(train, np.array([0, 0, 0, 1]), train[:1], 2, balanced=True)
    np.testing.assert_allclose(shares, [[0.75, 0.25]], atol=1e-6)
    np.testing.assert_allclose(balanced, [[0.5, 0.5]], atol=1e-6)


def test_a_class_without_training_tiles_gets_no_votes() -> None:
    train = np.eye(2, dtype=np.float32)
    for balanced in (False, True):
        found = knn_probe(train, np.array([0, 1]), train, 3, balanced=balanced)
        assert np.isfinite(found).all() and (found[:, 2] == 0).all()


def test_a_training_script_gets_plain_numbers_by_group() -> None:
    features, targets = make_features(3.0)
    names = np.array(["grade_a", "grade_b", "grade_c"])[targets]
    scores = probe_features(features, names)
    assert scores.keys() == {"knn_auc", "knn_average_precision", "knn_balanced_accuracy"}
    assert all(type(value) is float and value > 0.9 for value in scores.values())
    assert probe_features(torch.tensor(features).numpy(), names) == scores, "the same folds"
    # every group is one picture four times, labelled at random: who splits groups finds them again
    groups = np.repeat(np.arange(30), 4)
    copies = np.repeat(RANDOM.normal(size=(30, 8)), 4, axis=0).astype(np.float32)
    labels = np.repeat(np.arange(30) % 2, 4)
    assert probe_features(copies, labels)["knn_auc"] > 0.95
    assert probe_features(copies, labels, groups)["knn_auc"] < 0.8
    with pytest.raises(UserError, match="at least 5 groups each, found 2 with 4"):
        probe_features(copies[:32], labels[:32], groups[:32])


# --- linear ---------------------------------------------------------------------------------------


def test_the_linear_probe_finds_an_easy_signal_and_not_a_random_one() -> None:
    accuracy = {}
    for shift in (4.0, 0.0):
        features, targets = make_features(shift, 300)
        probabilities, strength = linear_probe(
            features[:200], targets[:200], features[200:], np.arange(200)
        )
        np.testing.assert_allclose(probabilities.sum(1), 1)
        assert strength in STRENGTHS
        accuracy[shift] = (probabilities.argmax(1) == targets[200:]).mean()
    assert accuracy[4.0] > 0.95 and accuracy[0.0] < 0.55


def test_the_linear_probe_does_not_care_about_scale_nor_about_the_number_of_a_class() -> None:
    targets = np.repeat([0, 1], [180, 20])
    features = (RANDOM.normal(size=(200, 4)) + targets[:, None]).astype(np.float32)
    given = (targets, features, np.arange(200))
    found, _ = linear_probe(features, *given)
    scaled, _ = linear_probe(features * 1000 + 5, targets, features * 1000 + 5, np.arange(200))
    np.testing.assert_allclose(found, scaled, atol=1e-3)
    called = found.argmax(1)
    assert (called[targets == 1] == 1).mean() > 0.7, "a rare class is not given up"


def test_more_features_than_tiles_give_the_model_of_scikit_learn() -> None:
    targets, groups = np.arange(40) % 2, np.arange(40)
    features = RANDOM.normal(size=(40, 90)) + 0.3 * targets[:, None]
    test = RANDOM.normal(size=(9, 90))
    found, strength = linear_probe(features, targets, test, groups)
    model = make_pipeline(
        StandardScaler(), LogisticRegression(C=strength, class_weight="balanced", tol=1e-8)
    )
    expected = model.fit(features, targets).predict_proba(test)
    np.testing.assert_allclose(found, expected, atol=2e-3)


def test_the_penalty_is_chosen_by_groups_of_the_training_tiles() -> None:
    """Near copies of a tile are found again at any C, so that they must not judge it."""
    random, groups = np.random.default_rng(0), np.repeat(np.arange(40), 5)
    targets = groups % 2
    features = random.normal(size=(40, 60))[groups] + 0.3 * random.normal(size=(200, 60))
    features[:, 0] += 1.5 * targets
    by_group = choose_strength(features, targets, groups, 0)
    assert by_group != choose_strength(features, targets, np.arange(200), 0)
    assert linear_probe(features, targets, features, groups)[1] == by_group
    assert choose_strength(features, targets, targets, 0) == 1.0, "nothing to choose by"


# --- fine-tuning ----------------------------------------------------------------------------------


class TinyNetwork(nn.Module):
    """A stem, two blocks and a norm, named as in a ViT; (B, 3, H, W) -> (B, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(3, 8)
        self.blocks = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.norm = nn.LayerNorm(8)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        x = self.stem(pixels.mean((2, 3)))
        for block in self.blocks:
            x = x + block(torch.relu(x))
        return self.norm(x)


def make_encoder() -> Encoder:
    torch.manual_seed(0)
    half = ((0.5,) * 3, (0.5,) * 3)
    module = PixelEncoder(TinyNetwork(), half).eval().requires_grad_(False)
    return Encoder("tiny", 8, ToInputSize(None), module, {})


def test_depths_of_layers_by_hand() -> None:
    vit = ["network.cls_token", "network.patch_embed.proj.weight", "network.blocks.0.qkv.weight"]
    vit += ["network.blocks.0.fc.bias", "network.blocks.1.qkv.weight", "network.norm.weight"]
    assert number_layers(vit) == ([0, 0, 1, 1, 2, 3], 3)
    resnet = ["conv1.weight", "bn1.bias", "layer1.0.conv1.weight", "layer1.1.bn2.bias"]
    resnet += ["layer2.0.downsample.0.weight"]
    assert number_layers(resnet) == ([0, 0, 1, 2, 3], 4)
    assert number_layers(["weight", "bias"]) == ([0, 0], 1), "no blocks: only the head is above"
    assert number_layers(["a.0.w", "between.w", "b.0.w"]) == ([1, 1, 2], 3)


def test_rates_and_weight_decay_of_layers_by_hand() -> None:
    encoder, head = make_encoder(), nn.Linear(8, 2)
    groups = group_by_layer(encoder.model, head, lr=1.0, layer_decay=0.5, weight_decay=0.1)
    found = {(group["lr"], group["weight_decay"]): len(group["params"]) for group in groups}
    # stem 1/8, first block 1/4, second 1/2, norm (two vectors) and head 1; vectors do not decay
    assert found == {
        (0.125, 0.1): 1, (0.125, 0.0): 1, (0.25, 0.1): 1, (0.25, 0.0): 1, (0.5, 0.1): 1,
        (0.5, 0.0): 1, (1.0, 0.1): 1, (1.0, 0.0): 3,
    }  # fmt: skip


class ColourTask(torch.utils.data.Dataset):
    """Noise that is a little redder in class 1."""

    def __init__(self, targets: np.ndarray) -> None:
        random = np.random.default_rng(0)
        noise = random.integers(60, 160, (len(targets), 3, 8, 8))
        noise[:, 0] += 40 * targets[:, None, None]
        self.items = torch.from_numpy(noise.astype(np.uint8))

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.items[index]


def test_fine_tuning_learns_a_colour_task_and_repeats_itself() -> None:
    targets = np.array([0, 0, 1] * 30)
    train, test = np.arange(61), np.arange(61, 90)  # 61: the last batch has one tile
    settings = FineTuneKeys(epochs=20, lr=2e-2, batch_size=4)
    given = (ColourTask(targets), targets, train, test, 2, settings, torch.device("cpu"))
    encoder = make_encoder()
    before = [parameter.clone() for parameter in encoder.model.parameters()]
    found = fine_tune_probe(encoder, *given, seed=1)
    np.testing.assert_allclose(found.sum(1), 1)
    assert (found.argmax(1) == targets[test]).mean() > 0.95
    after = list(encoder.model.parameters())
    assert not any(torch.equal(*pair) for pair in zip(before, after)), "all layers are trained"
    np.testing.assert_array_equal(fine_tune_probe(make_encoder(), *given, seed=1), found)
    assert (fine_tune_probe(make_encoder(), *given, seed=2) != found).any()


def test_without_layers_that_learn_only_the_head_is_trained() -> None:
    targets = np.array([0, 1] * 10)
    settings = FineTuneKeys(epochs=2, lr=1e-2, layer_decay=0.0, weight_decay=0.0, batch_size=4)
    encoder = make_encoder()
    before = encoder.model.network.stem.weight.clone()
    index = np.arange(20)
    fine_tune_probe(
        encoder, ColourTask(targets), targets, index, index, 2, settings, torch.device("cpu")
    )
    assert torch.equal(encoder.model.network.stem.weight, before)


def test_turns_keep_the_pixels_and_vary() -> None:
    items = torch.arange(2 * 3 * 4 * 4).view(2, 3, 4, 4)
    seen = set()
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        turned = turn(items, generator)
        assert torch.equal(turned.flatten(2).sort(-1).values, items.flatten(2))
        seen.add(tuple(turned[0, 0].flatten().tolist()))
    assert len(seen) == 8, "the square's eight symmetries"
    assert turn(items[..., :2], generator).shape == (2, 3, 4, 2)
