"""Pictures of tiles become the features that extraction would give them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from patch_encoder.models.encoders import build_encoder
from patch_encoder.probing.encoders import ProbedEncoder
from patch_encoder.probing.pictures import Pictures, encode_pictures, load_batches
from wsi_common.errors import UserError

CPU = torch.device("cpu")


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    random = np.random.default_rng(0)
    found = []
    for index in range(5):
        found.append(tmp_path / f"{index}.png")
        Image.fromarray(random.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(found[-1])
    return found


@pytest.mark.parametrize(("batch_size", "workers"), [(2, 0), (64, 2)])
def test_features_are_those_of_the_network_in_the_order_of_the_files(
    paths: list[Path], batch_size: int, workers: int
) -> None:
    torch.manual_seed(0)
    encoder = build_encoder("timm:test_vit", "random")
    items = torch.stack([encoder.transform(np.asarray(Image.open(path))) for path in paths])
    with torch.no_grad():
        expected = encoder.model(items)
    found = encode_pictures(paths, encoder, CPU, "fp32", batch_size, workers)
    assert found.dtype == np.float32 and found.shape == (5, encoder.dim)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


def test_a_classical_descriptor_needs_no_network(paths: list[Path]) -> None:
    encoder = build_encoder("colour_statistics")
    found = encode_pictures(paths[::-1], encoder, CPU, "fp32", 2)
    expected = [encoder.transform(np.asarray(Image.open(path))).numpy() for path in paths[::-1]]
    np.testing.assert_array_equal(found, np.stack(expected))


def test_pictures_of_several_sizes_are_refused_where_the_encoder_keeps_them(
    paths: list[Path],
) -> None:
    Image.new("RGB", (9, 9)).save(paths[3])
    plain = Pictures(paths, lambda tile: torch.from_numpy(tile.copy()))
    assert next(iter(load_batches(plain, [2, 0], 4, 0))).shape == (2, 40, 50, 3)
    with pytest.raises(UserError, match=r"expected one size.*\(9, 9, 3\), \(40, 50, 3\)"):
        list(load_batches(plain, range(5), 5, 0))


def test_random_starts_differ_repeat_and_leave_the_global_generator_alone() -> None:
    probed = ProbedEncoder("x", "timm:test_vit", control=True, starts=(0, 1))
    before = torch.random.get_rng_state()
    digests = [probed.build(seed).provenance["weights_sha256"] for seed in (0, 1, 0)]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert digests[0] == digests[2] != digests[1]


def test_a_size_that_weights_tell_holds_for_the_untrained_network(tmp_path: Path) -> None:
    import timm

    options = {"patch_size": 8, "img_size": 32, "embed_dim": 192, "depth": 2, "num_heads": 3}
    trained = timm.create_model("vit_base_patch16_224", num_classes=0, **options)
    torch.save(trained.state_dict(), tmp_path / "dino.pt")
    ours = ProbedEncoder("x", "dino", str(tmp_path / "dino.pt"))
    fresh = ProbedEncoder("x", "dino", str(tmp_path / "dino.pt"), control=True, starts=(0,))
    networks = [one.build(0).model for one in (ours, fresh)]
    shapes = [{n: p.shape for n, p in network.named_parameters()} for network in networks]
    assert shapes[0] == shapes[1] and len(shapes[0]) > 20
    weights = [dict(network.named_parameters()) for network in networks]
    name = next(name for name in weights[0] if name.endswith("attn.qkv.weight"))
    assert not torch.equal(weights[0][name], weights[1][name])
