"""Training from the weights of another classifier: the body is loaded, the head is new, and what
does not fit is one line. Foreign files are fabricated: random numbers under the published names.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mil import train
from mil.models import MODELS, build
from mil.training.engine import load_trained_model
from mil.training.init_weights import find_heads, find_initial, load_initial, rename
from tests.mil.models.small_options import SMALL
from tests.patch_encoder.slide_encoders import published
from wsi_common.cli import run
from wsi_common.errors import UserError


def network_of(name: str, classes: int = 2, dim: int = 9, **options: object) -> dict[str, object]:
    return {"name": name, "dim": dim, "classes": classes, "standardize": False, **options}


def save(path: Path, network: dict[str, object], seed: int = 7) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    state = build(**network).state_dict()
    torch.save({"model": state, "config": {"network": network}, "epoch": 1}, path)
    return state


@pytest.mark.parametrize("name", [name for name in MODELS if not name.startswith("mhim")])
def test_the_body_is_loaded_and_the_head_is_new(tmp_path: Path, name: str):
    """From a run of three classes to a model of two, for every model."""
    options = SMALL[name]
    state = save(tmp_path / "checkpoint_best.pt", network_of(name, 3, **options))
    network = network_of(name, **options)
    torch.manual_seed(1)
    fresh = build(**network).state_dict()
    torch.manual_seed(1)
    model = build(**network)
    line = load_initial(model, network, find_initial(str(tmp_path)))
    heads, loaded = find_heads(network), model.state_dict()
    assert heads
    for key, value in loaded.items():
        expected = fresh[key] if key.startswith(heads) else state[key]
        assert torch.equal(value, expected), key
    count = sum(not key.startswith(heads) for key in loaded)
    assert f"loaded {count} tensors" in line and "made anew: " in line and "lacks" not in line


def test_heads_are_what_depends_on_the_classes():
    assert find_heads(network_of("abmil")) == ("head.",)
    assert find_heads(network_of("clam_sb")) == ("head.", "instance_heads.")
    assert find_heads(network_of("clam_mb")) == ("head.", "instance_heads.", "score.")
    assert find_heads(network_of("max")) == ("tile.3.",)
    assert find_heads(network_of("transmil")) == ("head.",)


FEATHER = {"hidden": 6, "attention": 5, "activation": "tanh", "bias": True}


def test_feather_becomes_the_body_of_a_gated_abmil(tmp_path: Path):
    """And computes what FEATHER computes before its head."""
    state, features = published.feather_state(), torch.randn(7, 9)
    save_file(state, tmp_path / "model.safetensors")
    network = network_of("gated_abmil", **FEATHER)
    model = build(**network).eval()
    line = load_initial(model, network, find_initial(str(tmp_path)))
    assert "loaded 8 tensors (embed.0, attend.0, gate.0, score); made anew: head" in line
    assert line.endswith("left out of the file: classifier")
    with torch.no_grad():
        expected = model.head(published.feather_by_hand(state, features))
        torch.testing.assert_close(model(features).logits, expected)


@pytest.mark.parametrize("place", [2, 3])  # CLAM without and with dropout
def test_clam_and_chief_become_the_body_of_clam_sb(tmp_path: Path, place: int):
    state = {
        name.replace("attention_net.3.", f"attention_net.{place}."): value
        for name, value in published.chief_state(9, 8, 5).items()
        if "organ" not in name and "text" not in name
    }
    torch.save(state, tmp_path / "s_0_checkpoint.pt")
    network = network_of("clam_sb", hidden=8, attention=5)
    model = build(**network)
    line = load_initial(model, network, tmp_path / "s_0_checkpoint.pt")
    assert "loaded 8 tensors" in line and "instance_heads" in line
    assert torch.equal(model.embed[0].weight, state["attention_net.0.weight"])
    own = f"attention_net.{place}.attention_b.0.bias"
    assert torch.equal(model.gate[0].bias, state[own])


def test_what_does_not_fit_is_one_line(tmp_path: Path):
    path = tmp_path / "w.pt"
    torch.save(published.feather_state(), path)
    for options, shape in (({"hidden": 12}, "hidden"), ({"attention": 4}, "attention")):
        network = network_of("gated_abmil", **(FEATHER | options))
        with pytest.raises(
            UserError, match=r"expected \w+\.0\.\w+ of shape .* found .*set options="
        ):
            load_initial(build(**network), network, path)
        assert shape in options
    network = network_of("gated_abmil", dim=4, **FEATHER)
    with pytest.raises(UserError, match="give features of its encoder"):
        load_initial(build(**network), network, path)
    torch.save({"other.weight": torch.ones(2)}, path)
    with pytest.raises(UserError, match=r"expected weights of abmil .*found other.weight"):
        load_initial(build(**network_of("abmil")), network_of("abmil"), path)
    with pytest.raises(UserError, match="found probe linear_probe"):
        load_initial(build("linear_probe", 9, 2), network_of("linear_probe"), path)
    with pytest.raises(UserError, match="or a folder with checkpoint_best.pt"):
        find_initial(str(tmp_path / "nothing"))


def test_layers_that_the_file_lacks_or_the_model_does_not_have_are_named(tmp_path: Path):
    torch.save(published.feather_state(), tmp_path / "w.pt")
    network = network_of("abmil", hidden=6, attention=5, bias=True)  # not gated
    line = load_initial(build(**network), network, tmp_path / "w.pt")
    assert "left out of the file: gate.0, classifier" in line
    network = network_of("gated_abmil", **FEATHER)
    state = {key: x for key, x in published.feather_state().items() if "attention_b" not in key}
    torch.save(state, tmp_path / "w.pt")
    line = load_initial(build(**network), network, tmp_path / "w.pt")
    assert "since the file lacks them, gate.0" in line


def test_names_of_a_wrapper_are_taken_off():
    """Of MIL-Lab's files for the hub, and of our models that standardise."""
    state = {"model.embed.0.weight": torch.ones(1), "mean": torch.ones(1)}
    assert set(rename(state)) == {"embed.0.weight", "mean"}


def test_a_training_starts_from_a_file_and_says_so(
    make_cohort: Callable[..., Path], tmp_path: Path, caplog, capsys
):
    cohort = make_cohort()
    common = [f"labels={cohort}/labels.csv", f"features={cohort}/bags", "folds=3", "device=cpu"]
    common += ["model=abmil", "options={hidden: 8}", "training.min_epochs=0"]

    def start(output: str, *keys: str) -> int:
        return run(train.main, train.Config, [*common, f"output={tmp_path}/{output}", *keys])

    assert start("first", "training.epochs=2", "standardize=true") == 0
    # no step at all: the body is that of the file
    keys = ["training.epochs=1", "training.lr=0.0", "training.weight_decay=0.0"]
    with caplog.at_level("INFO"):
        assert start("second", *keys, f"init={tmp_path}/first") == 0
    assert "loaded 4 tensors" in caplog.text and "made anew: head" in caplog.text
    cpu = torch.device("cpu")
    first, _ = load_trained_model(tmp_path / "first" / "checkpoint_best.pt", cpu)
    second, checkpoint = load_trained_model(tmp_path / "second" / "checkpoint_best.pt", cpu)
    assert checkpoint["config"]["init"] == "checkpoint_best.pt", "sharing asks for its licence"
    assert torch.equal(first.model.embed[0].weight, second.embed[0].weight)
    assert not torch.equal(first.model.head.weight, second.head.weight)
    # the weights are one of the run's inputs
    assert "init" in json.loads((tmp_path / "second" / "run.json").read_text())["inputs"]
    assert start("second", *keys) == 2
    assert "inputs.init" in capsys.readouterr().err
    # refused before there is a run directory
    assert start("third", f"init={tmp_path}/first", "options={hidden: 16}") == 2
    assert "of shape (16, 8)" in capsys.readouterr().err
    assert not (tmp_path / "third").exists()


def test_a_teacher_starts_from_an_initialised_plain_model(
    make_cohort: Callable[..., Path], tmp_path: Path, caplog
):
    cohort = make_cohort()
    keys = [f"labels={cohort}/labels.csv", f"features={cohort}/bags", "folds=3", "device=cpu"]
    keys += ["training.epochs=1", "training.min_epochs=0", "options={hidden: 8}"]
    plain = [*keys, "model=abmil", f"output={tmp_path}/plain"]
    assert run(train.main, train.Config, plain) == 0
    with caplog.at_level("INFO"):
        mhim = [*keys, "model=mhim_abmil", f"output={tmp_path}/mhim", f"init={tmp_path}/plain"]
        assert run(train.main, train.Config, mhim) == 0
    assert caplog.text.count("made anew: head") == 1
