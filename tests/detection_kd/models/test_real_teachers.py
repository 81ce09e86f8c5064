"""The road of every published teacher, from a local weights file in its library's format to the
student's features.

Networks are those of the table with fewer and narrower layers; files, key names, input sizes and
transforms are the real ones.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from detection_kd import extract_student, pack_distillation, train_d2vfm
from detection_kd.datasets.distillation import digest_pairs, read_pairs
from detection_kd.datasets.packed_pairs import Pack
from detection_kd.models.student import load_student
from mil import rank_patches
from mil.datasets.bags import digest_bags
from patch_encoder import extract_features, tile_slides
from patch_encoder.bags.bag import read_bag
from patch_encoder.bags.paths import list_bags
from patch_encoder.models import encoder_table
from patch_encoder.models.backbones import initialise
from patch_encoder.models.encoder_table import ENCODERS, EncoderRow
from patch_encoder.models.encoders import build_encoder, digest_weights
from tests.detection_kd.d2vfm_runs import write_backbone
from tests.helpers import draw_slide, write_pyramid
from wsi_common.cli import run
from wsi_common.files import sha256_file

TILE = 64
VIT = {"embed_dim": 48, "depth": 2, "num_heads": 2}
CLIP_VISION = {"layers": 2, "width": 48, "patch_size": 16, "head_width": 24, "image_size": 224}
TIMM_VISION = {
    "timm_model_name": "test_vit",
    "timm_pool": "",
    "timm_proj": "linear",
    "image_size": 224,
}
SMALL: dict[str, tuple[int, dict[str, Any]]] = {
    "plip": (24, {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2,
                  "projection_dim": 24}),
    "clip": (24, {"vision_cfg": CLIP_VISION}),
    "biomedclip": (24, {"vision_cfg": TIMM_VISION}),
    "gigapath": (48, VIT),
    "dinov2": (48, VIT),
    "mae": (48, VIT),
}  # fmt: skip


def drawn(network: nn.Module) -> nn.Module:
    """The network with every weight drawn: some published ones start at zero."""
    torch.manual_seed(3)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    return network.eval()


def plip(folder: Path, row: EncoderRow) -> Path:
    """transformers: a folder with config.json and model.safetensors, the text tower inside."""
    from transformers import CLIPConfig, CLIPModel

    text = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 32,
    }
    vision = {key: value for key, value in row.options.items() if key != "projection_dim"}
    drawn(
        CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=row.width))
    ).save_pretrained(folder)
    return folder


def clip(folder: Path, row: EncoderRow) -> Path:
    """open_clip: open_clip_config.json beside open_clip_model.safetensors, both towers."""
    import open_clip

    text = {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2, "layers": 1}
    model = drawn(open_clip.CLIP(row.width, vision_cfg=CLIP_VISION, text_cfg=text))
    settings = {"model_cfg": {"embed_dim": row.width, "vision_cfg": CLIP_VISION, "text_cfg": text}}
    (folder / "open_clip_config.json").write_text(json.dumps(settings))
    state = {
        key: value.contiguous().clone()
        for key, value in model.state_dict().items()
        if key != "attn_mask"
    }
    safetensors.torch.save_file(state, folder / "open_clip_model.safetensors")
    return folder


def biomedclip(folder: Path, row: EncoderRow) -> Path:
    """open_clip with timm's image tower and a BERT: open_clip_pytorch_model.bin."""
    visual = {f"visual.{key}": value for key, value in drawn(initialise(row)).state_dict().items()}
    text = {
        "text.transformer.embeddings.word_embeddings.weight": torch.ones(4, 4),
        "text.proj.0.weight": torch.ones(4, 4),
    }
    torch.save(
        visual | text | {"logit_scale": torch.ones(())}, folder / "open_clip_pytorch_model.bin"
    )
    settings = {"model_cfg": {"embed_dim": row.width, "vision_cfg": TIMM_VISION}}
    (folder / "open_clip_config.json").write_text(json.dumps(settings))
    return folder


def gigapath(folder: Path, row: EncoderRow) -> Path:
    """timm: pytorch_model.bin, a bare state dict; a file is given, not its folder."""
    torch.save(drawn(initialise(row)).state_dict(), folder / "pytorch_model.bin")
    return folder / "pytorch_model.bin"


def dinov2(folder: Path, row: EncoderRow) -> Path:
    """torch.hub's file: 518 px positions and the mask token."""
    large = replace(row, options={**row.options, "img_size": 518})
    state = {**drawn(initialise(large)).state_dict(), "mask_token": torch.zeros(1, row.width)}
    assert state["pos_embed"].shape[1] == 1 + 37 * 37
    torch.save(state, folder / "dinov2_vitb14_pretrain.pth")
    return folder / "dinov2_vitb14_pretrain.pth"


def mae(folder: Path, row: EncoderRow) -> Path:
    """The authors' file: under `model`, the decoder beside the encoder."""
    decoder = {
        "mask_token": torch.zeros(1, 1, 16),
        "decoder_embed.weight": torch.ones(16, row.width),
    }
    decoder |= {
        "decoder_pos_embed": torch.ones(1, 197, 16),
        "decoder_blocks.0.norm1.weight": torch.ones(16),
    }
    torch.save(
        {"model": {**drawn(initialise(row)).state_dict(), **decoder}},
        folder / "mae_pretrain_vit_base.pth",
    )
    return folder / "mae_pretrain_vit_base.pth"


PUBLISH: dict[str, Callable[[Path, EncoderRow], Path]] = {
    "plip": plip, "clip": clip, "biomedclip": biomedclip, "gigapath": gigapath, "dinov2": dinov2,
    "mae": mae,
}  # fmt: skip


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Slides of 256 px of four patients, tiled, and a lesion detector's backbone."""
    root, lines = tmp_path_factory.mktemp("teachers"), ["case_id,slide_id,label"]
    for index in range(4):
        write_pyramid(root / "slides" / f"S{index}.tiff", draw_slide(256, seed=index))
        lines.append(f"C{index},S{index},{'negative' if index % 2 else 'positive'}")
    (root / "labels.csv").write_text("\n".join(lines) + "\n")
    tiling = [
        f"slides={root}/slides",
        f"output={root}/tiles",
        f"tile_size={TILE}",
        "tissue.min_area=50",
        "workers=1",
    ]
    assert run(tile_slides.main, tile_slides.Config, tiling) == 0
    write_backbone(root / "backbone.pt")
    return root


def walk_the_road(cohort: Path, out: Path, name: str, weights: Path) -> None:
    """Teacher features -> ranking and set (packed from slides, too) -> D2VFM with the teacher
    online -> student features.
    """
    cpu = ["device=cpu", "workers=0", "precision=fp32"]
    common = [f"slides={cohort}/slides", f"coords={cohort}/tiles", f"output={out}/features", *cpu]
    teacher = [f"encoder={name}", f"weights={weights}", "batch_size=8"]
    assert run(extract_features.main, extract_features.Config, [*common, *teacher]) == 0
    bags = [f"slides={cohort}/slides", f"features={out}/features/{name}"]
    ranking = [
        f"labels={cohort}/labels.csv",
        f"output={out}/set",
        "top_k=3",
        "device=cpu",
        "val_fraction=0.4",
    ]
    ranking += ["training.epochs=1", "training.min_epochs=1"]
    assert run(rank_patches.main, rank_patches.Config, [*bags, *ranking]) == 0
    packing = [
        *bags,
        f"coords={cohort}/tiles",
        f"output={out}/set.h5",
        "tiles_per_slide=3",
        f"ranking={out}/set/ann_root/ann.json",
    ]
    assert run(pack_distillation.main, pack_distillation.Config, packing) == 0
    training = [
        f"dataset={out}/set",
        f"backbone={cohort}/backbone.pt",
        f"output={out}/d2vfm",
        f"teacher={name}",
        "epochs=1",
    ]
    training += [
        "batch_size=4",
        "figures=false",
        "val_fraction=0.3",
        f"online_teacher={name}",
        f"teacher_weights={weights}",
        *cpu,
    ]
    assert run(train_d2vfm.main, train_d2vfm.Config, training) == 0
    student = [f"student={out}/d2vfm/checkpoint_best.pt"]
    assert run(extract_student.main, extract_student.Config, [*common, *student]) == 0


@pytest.mark.process
@pytest.mark.parametrize("name", list(SMALL))
def test_a_published_teacher_reaches_the_student(
    name: str, cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    width, options = SMALL[name]
    published = ENCODERS[name]
    row = replace(published, width=width, options={**published.options, **options})
    monkeypatch.setitem(encoder_table.ENCODERS, name, row)
    (tmp_path / "weights").mkdir()
    weights = PUBLISH[name](tmp_path / "weights", row)
    walk_the_road(cohort, tmp_path, name, weights)
    check_chain(cohort, tmp_path, name, weights, width)


def check_chain(cohort: Path, out: Path, name: str, weights: Path, width: int) -> None:
    """Widths, and that every stage names the one before it."""
    encoder, files = build_encoder(name, str(weights)), list_bags(out / "features" / name)
    assert encoder.dim == width and len(files) == 4
    for bag in map(read_bag, files.values()):
        assert bag.features.shape[1] == width and bag.features.std(0).mean() > 0
        assert (bag.attributes["encoder"], bag.attributes["weights_sha256"]) == (
            name,
            encoder.provenance["weights_sha256"],
        )
        if ENCODERS[name].normalise:
            assert np.allclose(np.linalg.norm(bag.features.numpy(), axis=1), 1, atol=1e-4)
    stamp, packed = (
        json.loads((out / "set" / "distillation.json").read_text()),
        Pack(out / "set.h5"),
    )
    assert stamp["teacher"] == digest_bags(files)
    assert packed.provenance["teacher"]["weights_sha256"] == encoder.provenance["weights_sha256"]
    pairs = read_pairs(out / "set")
    assert sorted((p.slide_id, p.image.name) for p in pairs) == sorted(
        zip(packed.slides, packed.names)
    )
    assert {len(pair.feature) for pair in pairs} == {width} == {packed.features.shape[1]}
    identity = json.loads((out / "d2vfm" / "run.json").read_text())["inputs"]
    assert identity["dataset"] == digest_pairs(pairs) and identity["backbone"] == sha256_file(
        cohort / "backbone.pt"
    )
    assert identity["online_teacher"].startswith(encoder.provenance["weights_sha256"])
    student, config = load_student(out / "d2vfm" / "checkpoint_best.pt")
    assert (config["teacher"], config["dim"]) == (name, width)
    for slide_id in files:
        with h5py.File(out / "features" / "student" / "h5_files" / f"{slide_id}.h5") as file:
            assert file["features"].shape[1] == width
            assert file["features"].attrs["weights_sha256"] == digest_weights(student)


@pytest.mark.slow
def test_a_teacher_of_true_size(cohort: Path, tmp_path: Path) -> None:
    """PLIP's ViT-B/32 with random weights in its 600 MB file."""
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    CLIPModel(CLIPConfig(vision_config={"patch_size": 32})).save_pretrained(tmp_path / "plip")
    walk_the_road(cohort, tmp_path, "plip", tmp_path / "plip")
    check_chain(cohort, tmp_path, "plip", tmp_path / "plip", 512)
