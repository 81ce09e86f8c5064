"""What a student costs in each of its forms beside foundation models of common sizes, all in one
process, interleaved.

    python benchmarks/student.py [--device cpu] [--rounds 3] [--compile] [--bf16] [--memory]
    [--json] [--output FILE]

Random weights; the student is ResNet-50 up to `--stages` with the adapter mpa to 768. Tiles are
224 px for everyone, with `--native` the student also at its published 256. Forms: `published` (all
stages whatever the stage, no folding, one batch, channels first: TS2G-KD's loop), `fp32` and
`bf16` (ours in PyTorch), `onnx` and `int8` (onnxruntime). In a round every contestant encodes a
batch (ViT-g one tile); figures are medians over rounds, ratios medians of the rounds' ratios, each
side in its faster form where `--compile` gives two. Slides per hour: extraction end to end,
decoding included, over a rendered slide of `--tiles` tiles of 256 px, at 10,000 tiles a slide.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tifffile
import timm
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.extraction import texture, tiles_of
from benchmarks.rounds import make_parser, say
from detection_kd.models.adapter import Adapter
from detection_kd.models.backbone import Backbone
from detection_kd.models.student import Student
from detection_kd.models.student_onnx import export_onnx, quantise
from patch_encoder.extraction.loop import ExtractSettings, encode_slides
from patch_encoder.extraction.network import Network
from patch_encoder.models.encoder_table import IMAGENET
from patch_encoder.models.encoders import Encoder, PixelEncoder, build_encoder
from patch_encoder.models.onnx_network import OnnxNetwork
from patch_encoder.models.transforms import ToInputSize
from patch_encoder.tiles.coordinates import Coordinates, SlideJob, TileGeometry
from wsi_common.files import write_json
from wsi_common.memory import peak_memory as own_peak

GIGAPATH = {"img_size": 224, "patch_size": 16, "mlp_ratio": 5.33334}
VITS: dict[str, tuple[str, dict]] = {
    "vit_b16": ("vit_base_patch16_224", {}),
    "vit_b32": ("vit_base_patch32_224", {}),
    "vit_l16": ("vit_large_patch16_224", {}),
    "vit_g14": ("vit_giant_patch14_dinov2", GIGAPATH),
}
ENCODERS = {"resnet50_layer3": "resnet50"}
FORMS = ("published", "fp32", "onnx", "int8")
BARS = {("student_n1", "vit_b16"): 4.0, ("student_n1", "vit_g14"): 30.0}
DIM, INPUT, TILE, SLIDE = 768, 224, 256, 10_000


class Published(nn.Module):
    """TS2G-KD's student: every stage is computed, one is pooled."""

    def __init__(self, stage: int) -> None:
        super().__init__()
        self.backbone, self.deepest_stage = Backbone("resnet50", "frozen"), stage
        self.adapter = Adapter("mpa", self.backbone.channels[stage], DIM)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.adapter(
            self.backbone(pixels.contiguous(), upto=2)[self.deepest_stage].mean(dim=(2, 3))
        )


def build(model: str, form: str = "fp32") -> nn.Module:
    """A contestant's network over uint8 pixels, random weights."""
    torch.manual_seed(0)
    if model.startswith("student"):
        stage = int(model[len("student_n")])
        inner: nn.Module = (
            Published(stage)
            if form == "published"
            else Student(Backbone("resnet50", "frozen"), stage, "mpa", DIM)
        )
        return PixelEncoder(inner, IMAGENET).eval().requires_grad_(False)
    if model in ENCODERS:
        return build_encoder(ENCODERS[model], "random").model
    name, options = VITS[model]
    # timm's own initial values take a minute for a billion weights; without any, features are not
    # finite
    vit = timm.create_model(name, num_classes=0, weight_init="skip", **options).requires_grad_(
        False
    )
    for key, value in vit.named_parameters():
        if value.ndim > 1:
            value.normal_(std=0.02)
        else:
            value.fill_(0.0 if key.endswith("bias") else 1.0)
    return PixelEncoder(vit, IMAGENET).eval()


def side_of(model: str) -> int:
    """Tiles' side in pixels: `student_n1@256` is the student at its native size."""
    return int(model.partition("@")[2] or INPUT)


def pixels_of(model: str, count: int) -> Tensor:
    """uint8 (count, 3, side, side) with texture, since calibration looks at it."""
    side = side_of(model)
    return torch.stack(
        [
            torch.from_numpy(t[:side, :side].copy()).permute(2, 0, 1)
            for t in tiles_of(texture(), count)
        ]
    )


def call_of(
    model: str, form: str, a: argparse.Namespace, folder: Path
) -> tuple[Callable[[], object], int, nn.Module]:
    """(one batch of this contestant, its tiles, the module that it calls)."""
    device = torch.device(a.device)
    rows = 1 if model == "vit_g14" and a.device == "cpu" else a.batch
    module, pixels = build(model, form), pixels_of(model, max(rows, 2))[:rows]
    if form == "published":
        module = module.to(device)
        return torch.no_grad()(lambda: module(pixels.to(device)).cpu()), rows, module
    if form in ("onnx", "int8"):
        plain = folder / f"{model}.onnx"
        if not plain.is_file():
            export_onnx(module, pixels_of(model, 2), plain, {})
        if form == "int8":
            quantise(plain, folder / f"{model}_int8.onnx", pixels_of(model, 8), {})
            plain = folder / f"{model}_int8.onnx"
        module = OnnxNetwork(plain, DIM)
    precision = "bf16" if form.startswith("bf16") else "fp32"
    network = Network(
        module, device, precision, rows, "inductor" if form.endswith("compiled") else ""
    )
    return lambda: network.launch(pixels).features(), rows, module


def contestants(a: argparse.Namespace) -> list[tuple[str, str]]:
    """(model, form) of everyone."""
    forms = [
        "fp32",
        *["fp32 compiled"] * a.compile,
        *["bf16"] * a.bf16,
        *["bf16 compiled"] * (a.bf16 and a.compile),
    ]
    students = [f"student_n{stage}" for stage in a.stages]
    out = [(s, form) for s in students for form in [*a.forms, *forms[1:]]]
    out += [(f"student_n1@{TILE}", form) for form in a.forms if 1 in a.stages and a.native]
    out += [(m, form) for m in a.models for form in (forms if m != "vit_g14" else ["fp32"])]
    return [*out, *[("vit_b16", "onnx")] * ("vit_b16" in a.models and "onnx" in a.forms)]


def counts(model: str, form: str) -> dict[str, float]:
    """GFLOPs a tile (a multiply-add is two) and parameters in millions, without storage."""
    with torch.device("meta"):
        module = build(model, form)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        module(torch.empty(1, 3, side_of(model), side_of(model), dtype=torch.uint8, device="meta"))
    return {
        "gflops": counter.get_total_flops() / 1e9,
        "parameters_m": sum(v.numel() for n, v in module.state_dict().items() if "running" not in n)
        / 1e6,
    }


def end_to_end(model: str, form: str, a: argparse.Namespace, folder: Path) -> float:
    """Slides of 10,000 tiles an hour, from a slide file to its bag."""
    slide, across = folder / "slide.tiff", 2048 // TILE
    if not slide.is_file():
        tifffile.imwrite(slide, texture(), tile=(TILE, TILE), compression="jpeg", photometric="rgb")
    corners = np.stack(np.meshgrid(*[np.arange(across) * TILE] * 2), -1).reshape(-1, 2)[: a.tiles]
    geometry = TileGeometry("slide", TILE, TILE, 0, TILE, 0.5, 0.5, 0.0, 2048, 2048)
    _, _, module = call_of(model, form, a, folder)
    fit = ToInputSize(None if side_of(model) == TILE else INPUT)
    encoder = Encoder(
        f"{model}_{form}", ENCODER_WIDTHS.get(model, DIM), fit, module, {"encoder": model}
    )
    settings = ExtractSettings(torch.device(a.device), "fp32", a.batch, a.workers)
    network = Network(module, settings.device, "fp32", a.batch)
    network.launch(pixels_of(model, a.batch)).features()  # fold, open
    start = time.perf_counter()
    report = encode_slides(
        [SlideJob("slide", slide, Coordinates(corners, geometry), 0.5)], encoder, folder / "bags",
        settings, show=False,
        network=network,
    )  # fmt: skip
    assert not report.failures, report.failures
    return 3600 * report.tiles / (time.perf_counter() - start) / SLIDE


ENCODER_WIDTHS = {"vit_l16": 1024, "vit_g14": 1536, "resnet50_layer3": 1024}


def peak_memory(model: str, form: str, a: argparse.Namespace) -> int:
    """MiB of a fresh process that encodes one batch; on CUDA, of the device."""
    command = [
        sys.executable,
        __file__,
        "--peak",
        model,
        form,
        "--batch",
        str(a.batch),
        "--device",
        a.device,
    ]
    return int(
        subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]
    )


def run_for_peak(a: argparse.Namespace) -> None:
    """What `peak_memory` starts."""
    with tempfile.TemporaryDirectory() as folder:
        call_of(*a.peak, a, Path(folder))[0]()
    cuda = a.device.startswith("cuda")
    print(torch.cuda.max_memory_allocated() >> 20 if cuda else own_peak() >> 20)


def best(rates: dict[str, float], model: str, precision: str) -> float:
    """The faster of a model's PyTorch forms of this precision."""
    return max(
        rate
        for name, rate in rates.items()
        if name in (f"{model} {precision}", f"{model} {precision} compiled")
    )


def ratios(rounds: list[dict[str, float]], a: argparse.Namespace) -> dict[str, float]:
    """Medians over rounds of the ratios within a round."""
    pairs = []
    for student in (f"student_n{stage}" for stage in a.stages):
        for form in [*(form for form in a.forms if form != "published"), *["bf16"] * a.bf16]:
            pairs += [(student, form, student, "published")] if "published" in a.forms else []
            pairs += [
                (student, form, other, "bf16" if form == "bf16" else "fp32") for other in a.models
            ]
            pairs += (
                [(student, form, "vit_b16", "onnx")]
                if form == "onnx" and "vit_b16" in a.models
                else []
            )
    return {
        f"{one} {form} / {other} {its}": statistics.median(
            best(r, one, form) / best(r, other, its) for r in rounds
        )
        for one, form, other, its in pairs
        if any(f"{other} {its}" == name for name in rounds[0])
    }


def verdicts(found: dict[str, float]) -> dict[str, bool]:
    """Whether each ratio that has a bar meets it, at equal precision and runtime."""
    out = {}
    for (student, other), bar in BARS.items():
        for form in ("fp32", "onnx", "bf16"):
            name = f"{student} {form} / {other} {form}"
            if name in found:
                out[name] = found[name] >= bar
    return out


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = make_parser(__doc__, batch=8, rounds=3, threads=2, workers=2, tiles=32)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--stages", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument(
        "--models", nargs="*", default=[*VITS, *ENCODERS], choices=[*VITS, *ENCODERS]
    )
    parser.add_argument(
        "--forms", nargs="+", default=list(FORMS), choices=FORMS, help="of the student"
    )
    parser.add_argument(
        "--native", action="store_true", help=f"the student of stage 1 at {TILE} px as well"
    )
    parser.add_argument(
        "--compile", action="store_true", help="compiled forms as well (a minute or two each)"
    )
    parser.add_argument(
        "--bf16", action="store_true", help="bf16 as well; slow on CPUs that emulate it"
    )
    parser.add_argument("--memory", action="store_true", help="peak memory, a process each")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true")
    parser.add_argument(
        "--output", type=Path, help="JSON file that keeps everything, every round as well"
    )
    return parser.parse_args(arguments)


def measure(a: argparse.Namespace, folder: Path) -> dict[str, dict]:
    """Rates, ratios, verdicts and costs."""
    calls = {}
    for model, form in contestants(a):
        say(f"preparing {model} {form}")
        calls[f"{model} {form}"] = call_of(model, form, a, folder)
        calls[f"{model} {form}"][0]()
    say("one round that does not count")
    for call, _, _ in calls.values():
        call()  # torch.compile may look at a network again once there are others
    rounds: list[dict[str, float]] = []
    for _ in range(a.rounds):
        rates = {}
        for name, (call, rows, _) in calls.items():
            start = time.perf_counter()
            call()
            rates[name] = rows / (time.perf_counter() - start)
        rounds.append(rates)
        if a.output:
            write_json(
                a.output, {"rounds": rounds}
            )  # what comes after the rounds takes longer than they do
        rounded = {name: round(rate, 2) for name, rate in rates.items()}
        say(f"round {len(rounds)}: {rounded}")
    rows: dict[str, dict] = {
        name: {"tiles_per_second": statistics.median(r[name] for r in rounds)} for name in calls
    }
    del calls
    for model, form in contestants(a):
        rows[f"{model} {form}"] |= counts(model, form)
        if a.memory:
            say(f"memory of {model} {form}")
            rows[f"{model} {form}"]["peak_mib"] = peak_memory(model, form, a)
    for model, form in (
        ("student_n1", "fp32"),
        ("student_n1", "onnx"),
        ("student_n1", "int8"),
        ("vit_b16", "fp32"),
    ):
        if f"{model} {form}" in rows and a.tiles:
            say(f"end to end {model} {form}")
            rows[f"{model} {form}"]["slides_per_hour"] = end_to_end(model, form, a, folder)
    found = ratios(rounds, a)
    return {"contestants": rows, "rounds": rounds, "ratios": found, "met": verdicts(found)}


def main(arguments: list[str] | None = None) -> None:
    a = parse(arguments)
    torch.set_num_threads(a.threads)
    if a.peak:
        run_for_peak(a)
        return
    with tempfile.TemporaryDirectory() as folder:
        found = measure(a, Path(folder))
    found["arguments"] = {
        name: value for name, value in vars(a).items() if name not in ("peak", "output")
    }
    if a.output:
        write_json(a.output, found)
    if a.json:
        print(json.dumps(found))
        return
    print(f"{a.device}, {a.threads} threads, {a.batch} tiles a batch, {a.rounds} rounds")
    for name, row in found["contestants"].items():
        print(f"  {name:32}" + "".join(f" {key} {value:9.2f}" for key, value in row.items()))
    for name, value in found["ratios"].items():
        print(
            f"  {name:56} {value:7.2f}  "
            + {True: "met", False: "not met", None: ""}[found["met"].get(name)]
        )


if __name__ == "__main__":
    main()
