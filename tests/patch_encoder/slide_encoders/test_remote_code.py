"""Slide encoders whose authors publish Python code: it runs when it is allowed to, and only then.

The repositories here are fabricated: a local folder with the file names, the entries of config.json
and the methods of the real ones (MahmoodLab/TITAN, paige-ai/Prism), and a tiny network that says
what it was given.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from patch_encoder import encode_slides
from patch_encoder.bags.bag import open_bag
from patch_encoder.bags.writer import write_bag
from patch_encoder.slide_encoders.build import build_slide_encoder
from wsi_common.cli import run
from wsi_common.errors import UserError

CONFIGURATION = """
from transformers import PretrainedConfig

class {kind}Config(PretrainedConfig):
    model_type = "{name}"
"""
TITAN = """
import pathlib, torch
from torch import nn
from transformers import PreTrainedModel
from .configuration_titan import TitanConfig

pathlib.Path("{mark}").touch()

class Titan(PreTrainedModel):
    config_class = TitanConfig

    def __init__(self, config):
        super().__init__(config)
        self.scale = nn.Parameter(torch.zeros(768))
        self.post_init()

    def encode_slide_from_patch_features(self, patch_features, patch_coords, patch_size_lv0):
        assert patch_features.ndim == 3 and patch_coords.shape == (*patch_features.shape[:2], 2)
        vector = patch_features.mean(1) * self.scale
        vector[:, 0] = patch_size_lv0
        vector[:, 1] = torch.floor_divide(patch_coords, patch_size_lv0).float().sum()
        return vector
"""
PRISM = """
import pathlib, torch
from torch import nn
from transformers import PreTrainedModel
from .configuration_prism import PrismConfig

pathlib.Path("{mark}").touch()

class Prism(PreTrainedModel):
    config_class = PrismConfig

    def __init__(self, config):
        super().__init__(config)
        self.scale = nn.Parameter(torch.zeros(1280))
        self.text_decoder = nn.Linear(4, 4)
        self.post_init()

    def slide_representations(self, tile_embeddings, tile_mask=None):
        embedding = tile_embeddings[..., :1280].mean(1) * self.scale
        return {{"image_embedding": embedding, "image_latents": embedding[:, None]}}
"""


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """transformers copies code that it runs below its cache; here, below the test's folder."""
    import transformers.dynamic_module_utils as dynamic

    monkeypatch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    before, path = set(sys.modules), list(sys.path)
    yield
    for name in set(sys.modules) - before:
        if name.startswith("transformers_modules"):
            del sys.modules[name]
    sys.modules.pop("transformers_modules", None)
    sys.path[:] = path


def publish(folder: Path, name: str, code: str, scale: int) -> Path:
    """A copy of a hub repository, as a user has fetched it; `mark` appears when its code runs."""
    folder.mkdir()
    kind = name.capitalize()
    (folder / f"configuration_{name}.py").write_text(CONFIGURATION.format(kind=kind, name=name))
    text = code.format(mark=folder.parent / f"{name}_ran")
    (folder / f"modeling_{name}.py").write_text(text)
    auto = {
        "AutoConfig": f"configuration_{name}.{kind}Config",
        "AutoModel": f"modeling_{name}.{kind}",
    }
    (folder / "config.json").write_text(json.dumps({"model_type": name, "auto_map": auto}))
    torch.manual_seed(0)
    state = {"scale": torch.rand(scale)}
    if name == "prism":
        state |= {"text_decoder.weight": torch.ones(4, 4), "text_decoder.bias": torch.ones(4)}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder


def write_tiles(folder: Path, encoder: str, width: int, side: int = 512) -> np.ndarray:
    rng = np.random.default_rng(1)
    features = rng.normal(size=(6, width)).astype(np.float32)
    corners = np.array([[0, 0], [1, 0], [2, 0], [0, 1], [1, 1], [4, 3]]) * side + (512, 1024)
    geometry = {"name": "S1", "patch_size": side, "patch_size_level0": side, "patch_level": 0}
    geometry |= {"target_size": 512, "target_mpp": 0.5, "mpp": 0.5, "overlap": 0.0}
    geometry |= {"level0_width": 9000, "level0_height": 9000}
    path = folder / encoder / "h5_files" / "S1.h5"
    write_bag(path, features, corners, geometry, {"encoder": encoder})
    return features


def encode(root: Path, *keys: str) -> int:
    common = [f"output={root}/out", "device=cpu"]
    return run(encode_slides.main, encode_slides.Config, [*common, *keys])


def test_code_runs_only_when_it_is_allowed_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
):
    folder = publish(tmp_path / "TITAN", "titan", TITAN, 768)
    features = write_tiles(tmp_path / "features", "conch_v1_5", 768)
    bags = f"features={tmp_path}/features/conch_v1_5"
    keys = ["slide_encoder=titan", f"weights={folder}", bags]
    assert encode(tmp_path, *keys) == 2
    message = capsys.readouterr().err
    assert "set trust_remote_code=true" in message and str(folder) in message
    assert not (tmp_path / "titan_ran").exists()
    with caplog.at_level(logging.WARNING):
        assert encode(tmp_path, *keys, "trust_remote_code=true") == 0
    assert (tmp_path / "titan_ran").exists()
    assert "running Python code" in caplog.text and "modeling_titan.py" in caplog.text
    bag = open_bag(tmp_path / "out" / "titan" / "S1.h5")
    vector = bag.read()[0]
    assert vector[0] == 512  # the side in level-0 px
    assert vector[1] == 6 * (1 + 2) + (0 + 1 + 2 + 0 + 1 + 4) + (0 + 0 + 0 + 1 + 1 + 3)  # cells
    torch.manual_seed(0)
    expected = features.mean(0) * torch.rand(768).numpy()
    np.testing.assert_allclose(vector[2:], expected[2:], rtol=1e-5, atol=1e-6)
    assert (
        bag.provenance["licence"] == "CC-BY-NC-ND-4.0" and len(bag.provenance["code_sha256"]) == 64
    )
    # other code is another vector
    with (folder / "modeling_titan.py").open("a") as stream:
        stream.write("\nEDITED = True\n")
    assert encode(tmp_path, *keys, "trust_remote_code=true") == 1
    listed = (tmp_path / "out" / "titan" / "failures.csv").read_text()
    assert "code_sha256" in listed


def test_prism_takes_the_slides_embedding_of_virchow_tiles(tmp_path: Path):
    folder = publish(tmp_path / "Prism", "prism", PRISM, 1280)
    features = write_tiles(tmp_path / "features", "virchow", 2560, 224)
    encoder = build_slide_encoder("prism", str(folder), trust_remote_code=True)
    assert encoder.module.model.text_decoder is None
    bags = f"features={tmp_path}/features/virchow"
    allowed = [f"weights={folder}", "trust_remote_code=true"]
    assert encode(tmp_path, "slide_encoder=prism", bags, *allowed) == 0
    vector = open_bag(tmp_path / "out" / "prism" / "S1.h5").read()[0]
    torch.manual_seed(0)
    expected = features[:, :1280].mean(0) * torch.rand(1280).numpy()
    np.testing.assert_allclose(vector, expected, rtol=1e-5, atol=1e-6)


def test_what_is_no_repository_or_does_not_run_is_one_line(tmp_path: Path):
    with pytest.raises(UserError, match=r"expected the folder of a copy of MahmoodLab/TITAN"):
        build_slide_encoder("titan", str(tmp_path / "nothing"), trust_remote_code=True)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "model.safetensors").touch()
    with pytest.raises(UserError, match=r"config.json and its Python code.*whole repository"):
        build_slide_encoder("titan", str(tmp_path / "empty"), trust_remote_code=True)
    needs = publish(
        tmp_path / "needs", "titan", "import a_package_that_is_not_there\n" + TITAN, 768
    )
    with pytest.raises(
        UserError, match=r"does not run here .*a_package_that_is_not_there.*model card"
    ):
        build_slide_encoder("titan", str(needs), trust_remote_code=True)
    other = publish(
        tmp_path / "other", "titan", TITAN.replace("encode_slide_from", "encode_from"), 768
    )
    with pytest.raises(
        UserError, match=r"with encode_slide_from_patch_features, found Titan without"
    ):
        build_slide_encoder("titan", str(other), trust_remote_code=True)


def test_without_network_the_hubs_repository_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"fetch 'MahmoodLab/TITAN'.*it is gated"):
        build_slide_encoder("titan", trust_remote_code=True)
    with pytest.raises(UserError, match=r"fetch 'MahmoodLab/madeleine' \(file model.pt\)"):
        build_slide_encoder("madeleine")
