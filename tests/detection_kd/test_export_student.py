"""Exported students: the features of PyTorch within the bars, one more encoder for extraction, and
what is refused.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from detection_kd import export_student, extract_student
from detection_kd.models.backbone import Backbone
from detection_kd.models.student import Student, describe_student, load_student_encoder
from detection_kd.models.student_onnx import find_feature_map_nodes, load_students
from patch_encoder.bags.bag import read_bag
from patch_encoder.extraction.network import Network, fold_batch_norms
from patch_encoder.models.onnx_network import OnnxNetwork
from patch_encoder.tiles.coordinates import Coordinates, TileGeometry, write_coordinates
from studies import measure_encoders
from wsi_common.checkpoint import save_checkpoint
from wsi_common.cli import run
from wsi_common.errors import UserError

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.process  # an export takes seconds

DIM, SIDE = 12, 64
CPU = torch.device("cpu")
CHECKS = ["calibration_tiles=8", "check_tiles=6"]


def textured(seed: int, side: int) -> np.ndarray:
    """Blobs of two stains at two scales, uint8 (side, side, 3)."""
    rng = np.random.default_rng(seed)
    share = np.zeros((side, side))
    for cells, weight in ((4, 0.6), (16, 0.4)):
        noise = Image.fromarray(rng.random((side // cells, side // cells), np.float32))
        share += weight * np.asarray(noise.resize((side, side), Image.Resampling.BICUBIC))
    share = np.clip((share - 0.3) / 0.4, 0, 1)[..., None]
    return (share * (90, 50, 140) + (1 - share) * (235, 190, 220)).astype(np.uint8)


def save_student(path: Path, seed: int = 0, scale: float = 1.0) -> Path:
    """A ResNet-18 student whose frozen statistics and adapter are those of no initialisation."""
    torch.manual_seed(seed)
    student = Student(Backbone("resnet18", "frozen"), 1, "mpa", DIM, scale)
    for name, buffer in student.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.1)
        elif name.endswith(("running_var", "weight")):
            buffer.uniform_(0.7, 1.4)
    for parameter in student.adapter.parameters():
        nn.init.normal_(parameter, std=0.2)
    config = {"student": describe_student(student, "teacher")}
    save_checkpoint(path, model=student.state_dict(), config=config, epoch=1)
    return path


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tile folders of 9 tiles each, their coordinates, and a student."""
    root = tmp_path_factory.mktemp("cohort")
    for slide in range(2):
        folder = root / "slides" / f"S{slide}"
        folder.mkdir(parents=True)
        for index in range(9):
            Image.fromarray(textured(20 * slide + index, SIDE)).save(
                folder / f"{index // 3}_{index % 3}.png"
            )
        corners = np.array([(index % 3 * SIDE, index // 3 * SIDE) for index in range(9)])
        geometry = TileGeometry(f"S{slide}", SIDE, SIDE, 0, SIDE, 0.5, 0.5, 0.0, 3 * SIDE, 3 * SIDE)
        write_coordinates(root / "coords" / f"S{slide}.h5", Coordinates(corners, geometry))
    save_student(root / "student.pt")
    return root


def on_cohort(root: Path, output: Path, *extra: str) -> list[str]:
    return [f"slides={root}/slides", f"coords={root}/coords", f"output={output}", *extra]


def export(root: Path, output: Path, *extra: str) -> int:
    arguments = on_cohort(
        root,
        output,
        *CHECKS,
        *([] if any(e.startswith("student=") for e in extra) else [f"student={root}/student.pt"]),
    )
    return run(export_student.main, export_student.Config, [*arguments, *extra])


def extract(root: Path, output: Path, student: Path, *extra: str) -> int:
    keys = [f"student={student}", "device=cpu", "batch_size=4", "workers=0", *extra]
    return run(extract_student.main, extract_student.Config, on_cohort(root, output, *keys))


@pytest.fixture(scope="module")
def exported(cohort: Path) -> Path:
    """The export of that student."""
    assert export(cohort, cohort / "export") == 0
    return cohort / "export"


def cosines(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    return (
        (found * expected).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(expected, axis=1)
    )


def test_exports_give_the_students_features_at_any_size_and_batch(
    cohort: Path, exported: Path
) -> None:
    """Against the unfolded PyTorch student, on tiles of another size than those that calibrated."""
    model = load_student_encoder(cohort / "student.pt", "s").model
    for side in (SIDE, 96):
        tiles = torch.stack(
            [torch.from_numpy(textured(100 + i, side)).permute(2, 0, 1) for i in range(5)]
        )
        expected = model(tiles).numpy()
        found = {
            form: OnnxNetwork(exported / name, DIM)(tiles).numpy()
            for form, name in export_student.FILES.items()
        }
        assert np.allclose(found["onnx"], expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())
        assert cosines(found["int8"], expected).min() >= 0.99
        assert not np.allclose(found["int8"], found["onnx"], rtol=1e-6), "int8 is what it says"
    one = OnnxNetwork(exported / "student.onnx", DIM)(tiles[:1]).numpy()
    assert np.allclose(one, found["onnx"][:1], rtol=1e-4, atol=1e-4)


def test_record_names_what_was_exported_and_how_well(cohort: Path, exported: Path) -> None:
    record = json.loads((exported / "export.json").read_text())
    assert (
        record["student_sha256"]
        == load_student_encoder(cohort / "student.pt", "s").provenance["weights_sha256"]
    )
    assert (
        record["cosine"]["onnx"]["min"] >= 0.999
        and 0.99 <= record["cosine"]["int8"]["min"] <= record["cosine"]["int8"]["mean"]
    )
    assert (
        record["calibration"]["tiles"],
        record["held_out"]["tiles"],
        record["held_out"]["size"],
    ) == (8, 6, [SIDE, SIDE])
    assert record["calibration"]["sha256"] != record["held_out"]["sha256"]
    assert set(record["versions"]) == {"torch", "onnx", "onnxruntime", "software"}
    assert sorted(path.name for path in exported.iterdir()) == [
        "export.json",
        "student.onnx",
        "student_int8.onnx",
    ]


def test_graph_holds_no_norm_no_path_and_int8_only_behind_the_first_convolution(
    exported: Path,
) -> None:
    plain, quantised = (
        onnx.load(str(exported / name)) for name in ("student.onnx", "student_int8.onnx")
    )
    kinds = [node.op_type for node in plain.graph.node]
    assert "BatchNormalization" not in kinds and kinds.count("Conv") == 15
    assert kinds.count("Conv") + kinds.count("Add") + kinds.count("Relu") + kinds.count(
        "MaxPool"
    ) >= len(find_feature_map_nodes(plain.graph))
    assert str(Path(__file__).parents[2]).encode() not in (exported / "student.onnx").read_bytes()
    made_int8 = {
        i.name
        for i in quantised.graph.initializer
        if i.data_type == onnx.TensorProto.INT8 and len(i.dims) == 4
    }
    assert len(made_int8) == 14
    scales = {
        i.name: i.dims for i in quantised.graph.initializer if i.name.endswith("weight_scale")
    }
    assert sum(len(dims) == 1 and dims[0] >= 64 for dims in scales.values()) == 14, (
        "one scale a channel"
    )
    gemms = [node for node in quantised.graph.node if node.op_type in ("Gemm", "MatMul")]
    floats = {i.name for i in quantised.graph.initializer if i.data_type == onnx.TensorProto.FLOAT}
    first = next(node for node in quantised.graph.node if node.op_type == "Conv")
    assert first.input[1] in floats, "the convolution of the pixels stays float"
    assert len(gemms) == 3 and all(set(node.input[1:]) <= floats for node in gemms), (
        "the adapter stays float"
    )


def test_export_is_not_repeated_refuses_to_mix_and_notices_damage(
    cohort: Path,
    exported: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stamps = {path: path.stat().st_mtime_ns for path in exported.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(export_student, "export", lambda *_: pytest.fail("exported again"))
        assert export(cohort, exported) == 0
        assert export(cohort, exported, "seed=1") == 2
        assert "holds another export: calibration.sha256" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in exported.iterdir()} == stamps
    for name in ("student.onnx", "export.json"):
        (tmp_path / name).write_bytes((exported / name).read_bytes())
    content = bytearray((exported / "student_int8.onnx").read_bytes())
    content[len(content) // 2] ^= 255
    (tmp_path / "student_int8.onnx").write_bytes(bytes(content))
    assert export(cohort, tmp_path) == 2
    assert "student_int8.onnx: missing or damaged" in capsys.readouterr().err
    assert extract(cohort, tmp_path / "features", tmp_path / "student_int8.onnx") == 2
    assert "damaged" in capsys.readouterr().err and not (tmp_path / "features").exists()


def test_missed_bar_is_an_error_with_the_figure_and_leaves_nothing(
    cohort: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(export_student.BARS, "int8", 0.9999999)
    assert export(cohort, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert (
        "student_int8.onnx: expected cosine >= 0.9999999" in error
        and "found 0.9999" in error
        and error.count("\n") == 1
    )
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["calibration_tiles=20"], "expected 26 tiles (calibration_tiles + check_tiles), found 18"),
        (["check_tiles=1"], "check_tiles=1: expected at least 2"),
        (["slides="], "expected slides=... and coords=..., or dataset=..."),
    ],
)
def test_export_refuses(
    cohort: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    assert export(cohort, tmp_path / "out", *arguments) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_missing_package_is_one_line(
    cohort: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    package: str,
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert export(cohort, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "pip install" in error and package in error and error.count("\n") == 1


def test_exported_student_is_an_encoder_whose_bags_do_not_mix(
    cohort: Path, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    students = {"student": cohort / "student.pt", "student_onnx": exported / "student.onnx"}
    students["student_int8"] = exported / "student_int8.onnx"
    for student in students.values():
        assert (
            extract(
                cohort, tmp_path, student, "workers=2" if student.suffix == ".onnx" else "workers=0"
            )
            == 0
        )
    bags = {name: read_bag(tmp_path / name / "h5_files" / "S1.h5") for name in students}
    features = {name: bag.read().numpy() for name, bag in bags.items()}
    assert len({bag.attributes["weights_sha256"] for bag in bags.values()}) == 3
    assert bags["student_int8"].attributes["encoder"] == "d2vfm mpa stage 1 scale 1, int8"
    assert bags["student_int8"].attributes["transform"] == bags["student"].attributes["transform"]
    assert cosines(features["student_onnx"], features["student"]).min() >= 0.999
    assert cosines(features["student_int8"], features["student"]).min() >= 0.99
    stamp = (tmp_path / "student_int8" / "h5_files" / "S0.h5").stat().st_mtime_ns
    (tmp_path / "student_int8" / "h5_files" / "S1.h5").unlink()
    assert extract(cohort, tmp_path, students["student_int8"]) == 0
    assert (tmp_path / "student_int8" / "h5_files" / "S0.h5").stat().st_mtime_ns == stamp
    again = read_bag(tmp_path / "student_int8" / "h5_files" / "S1.h5")
    assert np.array_equal(again.read().numpy(), features["student_int8"]), (
        "the same bits whatever the batch"
    )
    assert extract(cohort, tmp_path, f"student_onnx={students['student_int8']}") == 2
    assert "another provenance: encoder" in capsys.readouterr().err


def test_extraction_refuses_files_and_settings_that_cannot_be(
    cohort: Path,
    exported: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = (exported / "student.onnx").read_bytes()
    (tmp_path / "cut.onnx").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.onnx").write_text("no model")
    foreign = onnx.load(str(exported / "student.onnx"))
    foreign.ClearField("metadata_props")
    onnx.save(foreign, str(tmp_path / "foreign.onnx"))
    onnx.helper.set_model_props(foreign, {"d2vfm": "{}"})
    onnx.save(foreign, str(tmp_path / "empty.onnx"))
    good = exported / "student.onnx"
    for student, extra, message in (
        (tmp_path / "cut.onnx", [], "cut.onnx: expected an ONNX file, onnxruntime cannot read it"),
        (
            tmp_path / "text.onnx",
            [],
            "text.onnx: expected an ONNX file, onnxruntime cannot read it",
        ),
        (
            tmp_path / "foreign.onnx",
            [],
            "expected a student of export_student, found another ONNX file",
        ),
        (
            tmp_path / "empty.onnx",
            [],
            "expected a note of export_student with dim, encoder, form, transform",
        ),
        (good, ["compile=true"], "set compile=false"),
        (good, ["precision=bf16"], "set precision=auto"),
    ):
        assert extract(cohort, tmp_path / "features", student, *extra) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert extract(cohort, tmp_path / "features", good) == 2
    assert "expected the package onnxruntime, found none; pip install" in capsys.readouterr().err
    assert not (tmp_path / "features").exists()


def test_int8_and_missing_providers_are_refused_on_cuda(exported: Path) -> None:
    cuda = torch.device("cuda:0")
    with pytest.raises(UserError, match="int8 is for CPUs, found device=cuda:0"):
        load_students([str(exported / "student_int8.onnx")], cuda)[0]
    if "CUDAExecutionProvider" not in __import__("onnxruntime").get_available_providers():
        with pytest.raises(UserError, match="has no CUDA; pip install onnxruntime-gpu"):
            load_students([str(exported / "student.onnx")], cuda)[0]


def test_network_travels_by_path_and_pads_its_batches(
    exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = load_students([str(exported / "student_int8.onnx")], CPU)[0]
    tiles = torch.randint(0, 255, (5, 3, SIDE, SIDE), dtype=torch.uint8)
    expected = encoder.model(tiles)
    packed = pickle.dumps(encoder)
    assert len(packed) < 4000
    monkeypatch.chdir(exported)
    travelled = pickle.loads(packed).model
    assert torch.equal(travelled(tiles), expected)
    network = Network(travelled, CPU, "fp32", 4)
    assert network.rows == 4
    parts = [network.launch(part).features() for part in (tiles[:1], tiles[1:4], tiles[4:])]
    assert torch.equal(
        torch.cat(parts), torch.cat([network.launch(part).features() for part in tiles.split(4)])
    )


def test_distillation_tiles_and_scaled_students_are_exported_too(
    cohort: Path, tmp_path: Path
) -> None:
    root = tmp_path / "distillation"
    (root / "ann_root").mkdir(parents=True)
    (root / "wsi_root" / "S0").mkdir(parents=True)
    images = []
    for index in range(6):
        Image.fromarray(textured(index, SIDE)).save(root / "wsi_root" / "S0" / f"{index}_0.jpg")
        torch.save(torch.zeros(DIM), root / "wsi_root" / "S0" / f"{index}_0.pt")
        images.append({"id": index, "file_name": f"S0/{index}_0.jpg"})
    (root / "ann_root" / "ann.json").write_text(json.dumps({"images": images}))
    keys = [
        f"student={save_student(tmp_path / 'half.pt', 1, 0.5)}",
        f"dataset={root}",
        f"output={tmp_path}/out",
    ]
    keys += ["int8=false", "calibration_tiles=2", "check_tiles=3"]
    assert run(export_student.main, export_student.Config, keys) == 0
    record = json.loads((tmp_path / "out" / "export.json").read_text())
    assert record["forms"] == ["onnx"] and record["cosine"]["onnx"]["min"] >= 0.999
    network = OnnxNetwork(tmp_path / "out" / "student.onnx", DIM)
    tiles = torch.stack(
        [torch.from_numpy(textured(50 + i, SIDE)).permute(2, 0, 1) for i in range(2)]
    )
    found = network(tiles)
    with pytest.raises(
        UserError, match="expected tiles of 64 x 64 px, for which it was exported, found 96 x 64"
    ):
        network(torch.zeros(1, 3, 64, 96, dtype=torch.uint8))
    expected = load_student_encoder(tmp_path / "half.pt", "s").model(tiles)
    assert nn.functional.cosine_similarity(found, expected).min() >= 0.999


def test_one_student_gives_one_file(cohort: Path, exported: Path, tmp_path: Path) -> None:
    assert export(cohort, tmp_path / "again", "int8=false") == 0
    assert (tmp_path / "again" / "student.onnx").read_bytes() == (
        exported / "student.onnx"
    ).read_bytes()


@pytest.mark.parametrize("norm", ["frozen", "batch"])
def test_folded_student_has_no_norm_left_and_the_same_features(norm: str) -> None:
    torch.manual_seed(0)
    student = Student(Backbone("resnet18", norm), 1, "mpa", DIM).eval().requires_grad_(False)
    for name, buffer in student.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_()
    pixels = torch.randn(2, 3, SIDE, SIDE)
    folded = fold_batch_norms(student, pixels)
    assert not [name for name, _ in folded.named_buffers() if name.endswith("running_mean")]
    assert torch.allclose(folded(pixels), student(pixels), rtol=1e-4, atol=1e-4)


def test_bf16_student_agrees_with_fp32(cohort: Path) -> None:
    tiles = torch.stack([torch.from_numpy(textured(i, SIDE)).permute(2, 0, 1) for i in range(4)])
    found = [
        Network(load_student_encoder(cohort / "student.pt", "s").model, CPU, p, 4)
        .launch(tiles)
        .features()
        for p in ("fp32", "bf16")
    ]
    assert 0.999 <= nn.functional.cosine_similarity(*found).min() < 0.9999999


COMPILED = """
import torch
from detection_kd.models.student import load_student_encoder
from patch_encoder.extraction.network import Network
torch._dynamo.config.error_on_recompile = True
tiles = torch.randint(0, 255, (5, 3, 64, 64), dtype=torch.uint8)
student, cpu = load_student_encoder({path!r}, "s").model, torch.device("cpu")
plain, fast = Network(student, cpu, "fp32", 4), Network(student, cpu, "fp32", 4, compiler={backend!r})
for part in tiles.split(4):
    assert torch.allclose(plain.launch(part).features(), fast.launch(part).features(), rtol=1e-3, atol=1e-3)
assert torch._dynamo.utils.counters["frames"]["total"] >= 1, "nothing was compiled"
"""


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_student_has_the_same_features(
    cohort: Path, root: Path, backend: str, warm_python: Path
) -> None:
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    code = COMPILED.format(path=str(cohort / "student.pt"), backend=backend)
    done = subprocess.run(
        [warm_python, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_comparison_takes_options_of_encoders_and_exported_students(
    cohort: Path, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = on_cohort(
        cohort,
        tmp_path / "cost.json",
        "tiles_per_round=4",
        "rounds=1",
        "batch_size=4",
        "workers=0",
        "precision=fp32",
    )
    encoders = "encoders=[resnet18=random layer=1 crop=false, resnet18=random layer=2]"
    done = run(
        measure_encoders.main,
        measure_encoders.Config,
        [*keys, encoders, f"student={exported}/student_int8.onnx"],
    )
    assert done == 0, capsys.readouterr().err
    costs = json.loads((tmp_path / "cost.json").read_text())
    assert {name: cost["dim"] for name, cost in costs.items()} == {
        "resnet18-layer1": 64,
        "resnet18-layer2": 128,
        "student_int8": DIM,
    }
    assert (
        costs["resnet18-layer1"]["gflops"] < costs["resnet18-layer2"]["gflops"]
        and costs["student_int8"]["gflops"] is None
    )
    for encoders, message in (
        ("encoders=[resnet18=random layer=9]", "layer expected one of 0, 1, 2, 3, 4, found '9'"),
        (
            "encoders=[resnet18=random, resnet18=random crop=false]",
            "expected encoders of different names",
        ),
        ("encoders=[resnet18=random layre=2]", "layre=2"),
    ):
        assert (
            run(measure_encoders.main, measure_encoders.Config, [*keys, encoders, "overwrite=true"])
            == 2
        )
        assert message in capsys.readouterr().err
