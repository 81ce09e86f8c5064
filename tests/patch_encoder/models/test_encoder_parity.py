"""One architecture in two libraries, the same random weights, the same features: evidence without
published weights.

CLIP in transformers and open_clip, DINOv2 (registers, SwiGLU) and ViT in transformers and timm;
CONCH's pools against open_clip's and an einsum; MUSK against BEiT-3 written out; CTransPath under
the names of its old timm.
"""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn

from patch_encoder.models import backbones
from patch_encoder.models.backbones import initialise
from patch_encoder.models.encoder_table import ENCODERS, EncoderRow
from patch_encoder.models.encoder_weights import load_encoder_weights
from patch_encoder.models.image_towers import (
    AttentionPool,
    LinearAttentionPool,
    build_conch_v1,
    build_conch_v1_5,
    fit_positions,
)
from patch_encoder.models.pooling import TransformersPool, pool_tokens

State = dict[str, Tensor]


def drawn(module: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter drawn, biases and layer scales too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return module.eval()


def same(first: nn.Module, second: nn.Module, size: int) -> None:
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        one, other = first(pixels), second(pixels)
    assert one.shape == other.shape
    assert one.std() > 1e-3
    assert torch.allclose(one, other, atol=2e-5), float((one - other).abs().max())


def renamed(state: State, rules: list[tuple[str, str]]) -> State:
    names = {}
    for name in state:
        new = name
        for pattern, replacement in rules:
            new = re.sub(pattern, replacement, new)
        names[name] = new
    return {names[name]: value for name, value in state.items()}


def joined(state: State, parts: tuple[str, ...], whole: str) -> State:
    """`...<part>.weight` of all parts, one below the other, under the name of the whole."""
    out = {
        name: value
        for name, value in state.items()
        if not any(f".{part}." in name for part in parts)
    }
    for name in [name for name in state if f".{parts[0]}." in name]:
        out[name.replace(f".{parts[0]}.", f".{whole}.")] = torch.cat(
            [state[name.replace(f".{parts[0]}.", f".{p}.")] for p in parts]
        )
    return out


@pytest.mark.parametrize("quick_gelu", [True, False])
def test_clip_of_transformers_is_clip_of_open_clip(quick_gelu: bool) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=256,
        image_size=32, patch_size=16,
        projection_dim=16, hidden_act="quick_gelu" if quick_gelu else "gelu",
    )  # fmt: skip
    reference = TransformersPool(drawn(CLIPVisionModelWithProjection(config)), "")
    rules = [
        (r"^vision_model\.", "visual."), (r"embeddings\.class_embedding", "class_embedding"),
        (r"embeddings\.patch_embedding\.", "conv1."),
        (r"embeddings\.position_embedding\.weight", "positional_embedding"),
        (r"pre_layrnorm", "ln_pre"), (r"post_layernorm", "ln_post"),
        (r"encoder\.layers\.", "transformer.resblocks."),
        (r"layer_norm", "ln_"), (r"self_attn\.out_proj", "attn.out_proj"),
        (r"self_attn\.qkv\.", "attn.in_proj_"),
        (r"mlp\.fc1", "mlp.c_fc"), (r"mlp\.fc2", "mlp.c_proj"),
        (r"^visual_projection\.weight", "visual.proj"),
    ]  # fmt: skip
    state = renamed(
        joined(reference.model.state_dict(), ("q_proj", "k_proj", "v_proj"), "qkv"), rules
    )
    state = {name: value for name, value in state.items() if "position_ids" not in name}
    state["visual.proj"] = state["visual.proj"].T
    vision = {"layers": 2, "width": 64, "patch_size": 16, "head_width": 32, "image_size": 32}
    row = EncoderRow(
        "open_clip", "none", "", 16, options={"vision_cfg": vision, "quick_gelu": quick_gelu}
    )
    network = initialise(row).eval()
    load_encoder_weights(network, row, state, "test")
    same(network, reference, 32)


@pytest.mark.parametrize(("registers", "swiglu"), [(0, False), (4, False), (4, True), (0, True)])
@pytest.mark.parametrize("pool", ["cls", "cls_mean"])
def test_dinov2_of_transformers_is_dinov2_of_timm(registers: int, swiglu: bool, pool: str) -> None:
    import transformers

    kind = "Dinov2WithRegisters" if registers else "Dinov2"
    sizes = {
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 56,
        "patch_size": 14,
    }
    more = {"num_register_tokens": registers} if registers else {}
    config = getattr(transformers, f"{kind}Config")(**sizes, use_swiglu_ffn=swiglu, **more)
    reference = TransformersPool(drawn(getattr(transformers, f"{kind}Model")(config)), pool)
    # to the names of DINOv2's own files, which timm reads; gate_proj and up_proj are w12's halves
    state = joined(reference.model.state_dict(), ("q_proj", "k_proj", "v_proj"), "qkv")
    state = joined(joined(state, ("query", "key", "value"), "qkv"), ("gate_proj", "up_proj"), "w12")
    rules = [
        (r"embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
        (r"embeddings\.position_embeddings", "pos_embed"),
        (r"^embeddings\.", ""), (r"encoder\.layer\.", "blocks."),
        (r"attention\.(attention\.)?qkv", "attn.qkv"),
        (r"attention\.(output\.dense|o_proj)", "attn.proj"),
        (r"layer_scale(\d)\.lambda1", r"ls\1.gamma"),
        (r"mlp\.(weights_in|w12)", "mlp.w12"), (r"mlp\.(weights_out|down_proj)", "mlp.w3"),
        (r"^layernorm", "norm"),
    ]  # fmt: skip
    state = renamed(state, rules)
    options = {"embed_dim": 48, "depth": 2, "num_heads": 2, "img_size": 56}
    options |= (
        {"mlp_ratio": 2.66667 * 2, "mlp_layer": "SwiGLUPacked", "act_layer": "silu"}
        if swiglu
        else {}
    )
    model = f"vit_base_patch14_{'reg4_' if registers else ''}dinov2"
    row = EncoderRow("timm", model, "", 48, pool=pool, options=options)
    network = initialise(row).eval()
    load_encoder_weights(network, row, state, "test")
    same(network, reference, 56)


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_vit_of_transformers_is_vit_of_timm(pool: str) -> None:
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=2, intermediate_size=192,
        image_size=32, patch_size=16,
        layer_norm_eps=1e-6,
    )  # fmt: skip
    reference = TransformersPool(drawn(ViTModel(config, add_pooling_layer=False)), pool)
    state = joined(reference.model.state_dict(), ("q_proj", "k_proj", "v_proj"), "qkv")
    state = joined(state, ("query", "key", "value"), "qkv")
    rules = [
        (r"embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
        (r"embeddings\.position_embeddings", "pos_embed"),
        (r"^embeddings\.", ""), (r"(encoder\.)?layers?\.(\d+)", r"blocks.\2"),
        (r"attention\.(attention\.)?qkv", "attn.qkv"),
        (r"attention\.(output\.dense|o_proj)", "attn.proj"), (r"layernorm_before", "norm1"),
        (r"layernorm_after", "norm2"),
        (r"intermediate\.dense", "mlp.fc1"), (r"(\d)\.output\.dense", r"\1.mlp.fc2"),
        (r"^layernorm", "norm"),
    ]  # fmt: skip
    row = EncoderRow("timm", "vit_base_patch16_224", "", 48, pool=pool,
                     options={"embed_dim": 48, "depth": 2, "num_heads": 2,
                     "img_size": 32})  # fmt: skip
    network = initialise(row).eval()
    load_encoder_weights(network, row, renamed(state, rules), "test")
    same(network, reference, 32)


def test_dinov3_of_transformers_is_dinov3_of_timm() -> None:
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    config = DINOv3ViTConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=256,
        image_size=64, patch_size=16,
        num_register_tokens=4,
    )  # fmt: skip
    reference = TransformersPool(drawn(DINOv3ViTModel(config)), "cls")
    state = reference.model.state_dict()
    weights = {
        name: value
        for name, value in state.items()
        if not name.endswith(("q_proj.bias", "v_proj.bias", "mask_token"))
    }
    rules = [
        (r"embeddings\.patch_embeddings", "patch_embed.proj"), (r"register_tokens", "reg_token"),
        (r"^embeddings\.", ""),
        (r"(model\.)?layer\.", "blocks."), (r"attention\.(qkv|q_proj\.bias|v_proj\.bias)",
        r"attn.\1"),
        (r"([qv])_proj\.bias", r"\1_bias"), (r"attention\.o_proj", "attn.proj"),
        (r"layer_scale(\d)\.lambda1", r"gamma_\1"),
        (r"up_proj", "fc1"), (r"down_proj", "fc2"),
    ]  # fmt: skip
    biases = {
        name: value
        for name, value in state.items()
        if name.endswith(("q_proj.bias", "v_proj.bias"))
    }
    native = renamed(joined(weights, ("q_proj", "k_proj", "v_proj"), "qkv") | biases, rules)
    row = EncoderRow("timm", ENCODERS["dinov3_vits16"].model, "", 64, pool="cls",
                     options={"embed_dim": 64, "depth": 2, "num_heads": 2,
                     "img_size": 64})  # fmt: skip
    network = initialise(row).eval()
    load_encoder_weights(network, row, native, "test")
    same(network, reference, 64)


def test_pools_by_hand() -> None:
    tokens = torch.arange(2 * 7 * 3, dtype=torch.float32).view(2, 7, 3)
    assert torch.equal(pool_tokens(tokens, "cls", 3), tokens[:, 0])
    assert torch.equal(pool_tokens(tokens, "mean", 3), sum(tokens[:, i] for i in range(3, 7)) / 4)  # type: ignore[operator]
    assert torch.equal(pool_tokens(tokens, "cls_mean", 3)[:, :3], tokens[:, 0])
    assert torch.equal(pool_tokens(tokens, "cls_mean", 3)[:, 3:], pool_tokens(tokens, "mean", 3))


def test_conchs_pool_is_open_clips() -> None:
    from open_clip.transformer import AttentionalPooler

    pool = drawn(AttentionPool(16, 24, heads=4))
    reference = AttentionalPooler(16, 24, n_head=4, n_queries=1).eval()
    reference.load_state_dict(pool.state_dict())
    tokens = torch.randn(3, 5, 24)
    with torch.no_grad():
        assert torch.allclose(pool(tokens), reference(tokens)[:, 0], atol=1e-5)


def test_conch_v1_5s_pool_written_out() -> None:
    pool = drawn(LinearAttentionPool(16, 24, heads=4))
    tokens = torch.randn(3, 5, 24)
    with torch.no_grad():
        query = (pool.ln_q(pool.query) @ pool.to_q.weight.T).view(4, 4)
        both = pool.ln_k(tokens) @ pool.to_kv.weight.T
        key, value = both[..., :16].view(3, 5, 4, 4), both[..., 16:].view(3, 5, 4, 4)
        weights = (torch.einsum("hd,bnhd->bhn", query, key) / 2).softmax(dim=-1)
        expected = (
            torch.einsum("bhn,bnhd->bhd", weights, value).reshape(3, 16) @ pool.to_out.weight.T
        )
        assert torch.allclose(pool(tokens), expected, atol=1e-5)


@pytest.mark.parametrize("version", ["conch", "conch_v1_5"])
def test_conch_loads_what_is_published(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    build = {"conch": build_conch_v1, "conch_v1_5": build_conch_v1_5}[version]
    small = {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 64}
    monkeypatch.setattr(backbones, build.__name__, lambda: build(**small))
    row = ENCODERS[version]
    module = drawn(initialise(row))
    state = module.state_dict()
    if version == "conch":
        extra = ["text.ln_final.weight", "text_decoder.x", "logit_scale", "visual.proj_contrast",
        "visual.ln_caption.weight",
                 "visual.attn_pool_caption.query"]  # fmt: skip
        state = {f"visual.{name}": value for name, value in state.items()} | {
            name: torch.ones(2) for name in extra
        }
    network = initialise(row).eval()
    load_encoder_weights(network, row, state, "test")
    same(network, module, 64)


def test_keep_loads_what_is_published(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its file: `visual.` with layer scales called weight, `visual_head.`, and the text half."""
    build, small = backbones.build_keep, {"embed_dim": 32, "depth": 2, "num_heads": 2}
    monkeypatch.setattr(backbones, "build_keep", lambda: build(**small))
    row = ENCODERS["keep"]
    module = drawn(initialise(row))
    state = {key.replace(".gamma", ".weight"): value for key, value in module.state_dict().items()}
    assert "visual.blocks.0.ls1.weight" in state and "visual_head.2.weight" in state
    state |= {"text.encoder.layer.0.weight": torch.ones(2), "logit_scale": torch.ones(())}
    network = initialise(row).eval()
    load_encoder_weights(network, row, state, "test")
    same(network, module, 224)
    pixels = torch.rand(2, 3, 224, 224)
    written_out = module.visual(pixels)
    for name in ("0", "2"):
        layer = module.visual_head.get_submodule(name)
        written_out = written_out @ layer.weight.T + layer.bias
        written_out = nn.functional.gelu(written_out) if name == "0" else written_out
    assert torch.allclose(network(pixels), written_out, atol=1e-5)


def test_conch_v1_5s_positions_grow_as_in_its_forward() -> None:
    positions = torch.randn(1, 1 + 14 * 14, 8)
    grown = fit_positions({"trunk.pos_embed": positions}, 28)["trunk.pos_embed"]
    assert grown.shape == (1, 1 + 28 * 28, 8)
    assert torch.equal(grown[:, 0], positions[:, 0])
    # DINO's formula on the scale (28 + 0.1) / 14: close to a doubling, and not that of size=
    plain = nn.functional.interpolate(
        positions[:, 1:].view(1, 14, 14, 8).permute(0, 3, 1, 2), size=(28, 28), mode="bicubic"
    )
    difference = (grown[:, 1:].view(28, 28, 8) - plain[0].permute(1, 2, 0)).abs()
    assert 0 < difference.max() < 0.5
    assert fit_positions({"trunk.pos_embed": positions}, 14)["trunk.pos_embed"] is positions


def beit3_names(depth: int, width: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of BEiT-3's state dict in torchscale: expert A and B of everything."""
    shapes: dict[str, tuple[int, ...]] = {
        "vision_embed.cls_token": (1, 1, width), "vision_embed.mask_token": (1, 1, width),
        "vision_embed.proj.weight": (width, 3, 16, 16), "vision_embed.proj.bias": (width,),
        "text_embed.weight": (9, width),
        "encoder.embed_positions.A.weight": (4 + 1 + 2, width),
        "encoder.embed_positions.B.weight": (12, width),
    }  # fmt: skip
    norms = ["encoder.layer_norm"]
    for i in range(depth):
        layer = f"encoder.layers.{i}."
        norms += [
            f"{layer}{name}"
            for name in ("self_attn_layer_norm", "final_layer_norm", "self_attn.inner_attn_ln")
        ]
        for expert in "AB":
            for part in "qkv":
                shapes[f"{layer}self_attn.{part}_proj.{expert}.weight"] = (width, width)
                shapes[f"{layer}self_attn.{part}_proj.{expert}.bias"] = (width,)
            shapes |= {
                f"{layer}self_attn.out_proj.{expert}.weight": (width, width),
                f"{layer}self_attn.out_proj.{expert}.bias": (width,),
            }
            shapes |= {
                f"{layer}ffn.{expert}.fc1.weight": (4 * width, width),
                f"{layer}ffn.{expert}.fc1.bias": (4 * width,),
            }
            shapes |= {
                f"{layer}ffn.{expert}.fc2.weight": (width, 4 * width),
                f"{layer}ffn.{expert}.fc2.bias": (width,),
            }
            shapes |= {
                f"{layer}ffn.{expert}.ffn_layernorm.{part}": (4 * width,)
                for part in ("weight", "bias")
            }
    shapes |= {
        f"{name}.{expert}.{part}": (width,)
        for name in norms
        for expert in "AB"
        for part in ("weight", "bias")
    }
    return shapes


def beit3_image_path(state: State, pixels: Tensor, depth: int, heads: int) -> Tensor:
    """Expert A written out: patches, positions from 2 on, pre-norm layers with inner norms, last
    norm, class token.
    """
    linear, width = nn.functional.linear, state["vision_embed.cls_token"].shape[-1]

    def norm(values: Tensor, name: str) -> Tensor:
        return nn.functional.layer_norm(
            values, values.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-5
        )

    def dense(values: Tensor, name: str) -> Tensor:
        return linear(values, state[f"{name}.weight"], state[f"{name}.bias"])

    patches = nn.functional.conv2d(
        pixels, state["vision_embed.proj.weight"], state["vision_embed.proj.bias"], stride=16
    )
    x = torch.cat(
        [
            state["vision_embed.cls_token"].expand(len(pixels), -1, -1),
            patches.flatten(2).transpose(1, 2),
        ],
        dim=1,
    )
    x = x + state["encoder.embed_positions.A.weight"][2 : 2 + x.shape[1]]
    for i in range(depth):
        layer = f"encoder.layers.{i}."
        inner = norm(x, f"{layer}self_attn_layer_norm.A")
        q, k, v = (
            dense(inner, f"{layer}self_attn.{p}_proj.A").unflatten(-1, (heads, -1)).transpose(1, 2)
            for p in "qkv"
        )
        attention = (q * (width // heads) ** -0.5 @ k.transpose(-1, -2)).softmax(dim=-1)
        attended = norm(
            (attention @ v).transpose(1, 2).flatten(2), f"{layer}self_attn.inner_attn_ln.A"
        )
        x = x + dense(attended, f"{layer}self_attn.out_proj.A")
        hidden = nn.functional.gelu(
            dense(norm(x, f"{layer}final_layer_norm.A"), f"{layer}ffn.A.fc1")
        )
        x = x + dense(norm(hidden, f"{layer}ffn.A.ffn_layernorm"), f"{layer}ffn.A.fc2")
    return norm(x, "encoder.layer_norm.A")[:, 0]


def test_musk_is_beit3s_image_path() -> None:
    depth, width, heads = 2, 32, 2
    generator = torch.Generator().manual_seed(0)
    state = {
        name: torch.randn(shape, generator=generator) * 0.3
        for name, shape in beit3_names(depth, width).items()
    }
    published = {f"beit3.{name}": value for name, value in state.items()}
    published |= {
        "vision_head.weight": torch.ones(2, 2),
        "language_head.weight": torch.ones(2, 2),
        "logit_scale": torch.ones(()),
    }
    options = {
        "img_size": 32,
        "global_pool": "token",
        "embed_dim": width,
        "depth": depth,
        "num_heads": heads,
    }
    row = EncoderRow("timm", ENCODERS["musk"].model, "", width, pool="cls", options=options)
    network = initialise(row).eval()
    load_encoder_weights(network, row, published, "test")
    pixels = torch.randn(2, 3, 32, 32, generator=generator)
    with torch.no_grad():
        assert torch.allclose(
            network(pixels), beit3_image_path(state, pixels, depth, heads), atol=2e-5
        )


def test_ctranspath_under_the_names_of_its_old_timm() -> None:
    row = ENCODERS["ctranspath"]
    module = drawn(initialise(row))
    old = {}
    for name, value in module.state_dict().items():
        # downsampling stood at the end of a stage, and masks were stored
        old[
            re.sub(
                r"layers\.(\d)\.downsample",
                lambda found: f"layers.{int(found[1]) - 1}.downsample",
                name,
            )
        ] = value
    old |= {
        "layers.0.blocks.1.attn_mask": torch.ones(4),
        "layers.0.blocks.0.attn.relative_position_index": torch.ones(4),
    }
    assert "layers.0.downsample.reduction.weight" in old
    network = initialise(row).eval()
    load_encoder_weights(
        network,
        row,
        {f"module.{name}".removeprefix("module."): value for name, value in old.items()},
        "test",
    )
    same(network, module, 224)


def test_ctranspaths_stem_written_out() -> None:
    from patch_encoder.models.image_towers import ConvStem

    stem = drawn(ConvStem(32, 4, 3, 16, norm_layer=nn.LayerNorm))
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert [layer.out_channels for layer in stem.proj if isinstance(layer, nn.Conv2d)] == [
            2,
            4,
            16,
        ]
        expected = stem.norm(stem.proj(pixels).movedim(1, -1))
        assert stem(pixels).shape == (2, 8, 8, 16)
        assert torch.equal(stem(pixels), expected)
