"""A finished run leaves its best weights as safetensors, from which every loader of a checkpoint
rebuilds the same network; nothing in such a folder can run code.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.helpers import ROOT
from tests.training_harness import assert_equal
from wsi_common.checkpoint import load_checkpoint, load_checkpoint_of, read_weights, save_checkpoint
from wsi_common.config import key
from wsi_common.distributed import World
from wsi_common.errors import DamagedFile, UserError
from wsi_common.run import open_run
from wsi_common.shared_weights import (
    DESCRIPTION,
    WEIGHTS,
    digest_weights_file,
    write_shared_weights,
)

WORLD = World(0, 1, torch.device("cpu"))


@dataclass
class Config:
    lr: float = key(0.1, "learning rate")


CONFIG = {"kind": "tiny", "sizes": [3, 4], "rate": 0.1, "nothing": None, "on": True}


def write_run(folder: Path) -> Path:
    """A finished run whose network has what safetensors does not take as it is: shared and strided
    tensors, a scalar, half precision.
    """
    run = open_run(folder, Config(), WORLD, inputs={})
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)
    weights = {"a.weight": layer.weight.detach(), "b.weight": layer.weight.detach()}
    weights |= {"half": torch.randn(5).half(), "steps": torch.tensor(7)}
    save_checkpoint(run.best, model=weights, config=CONFIG, epoch=3, best={"auc": 0.75})
    assert not (folder / WEIGHTS).exists(), "not before the run is finished"
    run.finish({"auc": 0.75})
    return folder


def test_a_finished_run_is_read_back_bit_for_bit(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    wanted = load_checkpoint(folder / "checkpoint_best.pt")
    del wanted["rng"]
    for path in (folder, folder / WEIGHTS):
        assert_equal(load_checkpoint(path), wanted, str(path))
        assert load_checkpoint_of(path, "tiny", "a tiny network", "tiny")["epoch"] == 3
        assert_equal(read_weights(path, "weights")["model"], wanted["model"], str(path))


def test_who_may_read_a_run_may_read_its_weights(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    assert (folder / WEIGHTS).stat().st_mode == (folder / DESCRIPTION).stat().st_mode


class Trap:
    def __reduce__(self) -> tuple:
        return open, (str(Path("trap").resolve()), "w")


def test_a_file_that_cannot_be_read_says_why_and_never_how_to_run_its_code(tmp_path: Path) -> None:
    file = tmp_path / "file.pt"
    torch.save({"a": torch.zeros(1000)}, file)
    half = file.read_bytes()[:2000]
    torch.save({"model": Trap()}, file)
    for content, reason in (
        (file.read_bytes(), "it holds io.open, which may run code"),
        (half, "it is damaged, or no file of torch.save"),
        (b"nothing of the kind", "it is damaged, or no file of torch.save"),
        (b"", "it is damaged, or no file of torch.save"),
    ):
        file.write_bytes(content)
        with pytest.raises(DamagedFile, match=reason) as caught:
            read_weights(file, "weights")
        assert "weights_only" not in str(caught.value)


def test_an_unfinished_run_is_read_from_its_best_checkpoint(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "checkpoint_best.pt", model={}, config={}, epoch=2)
    assert load_checkpoint(tmp_path)["epoch"] == 2
    with pytest.raises(
        UserError, match=r"checkpoint_best\.pt: expected a checkpoint, found no file"
    ):
        load_checkpoint(ROOT / "docs")


def test_a_run_that_is_started_over_leaves_no_old_weights(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    open_run(folder, Config(), WORLD, inputs={}, overwrite=True)
    assert not (folder / WEIGHTS).exists() and not (folder / DESCRIPTION).exists()


def test_the_digest_is_of_weights_and_description(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    first = digest_weights_file(folder)
    assert first == digest_weights_file(folder / WEIGHTS)
    content = json.loads((folder / DESCRIPTION).read_text())
    content["config"]["kind"] = "other"
    (folder / DESCRIPTION).write_text(json.dumps(content))
    assert digest_weights_file(folder) != first
    with pytest.raises(UserError, match="found no file"):
        digest_weights_file(tmp_path)


def test_another_library_s_safetensors_are_plain_weights_and_no_checkpoint(tmp_path: Path) -> None:
    write_shared_weights(tmp_path, {"model": {"w": torch.arange(3.0)}})
    (tmp_path / DESCRIPTION).write_text('{"model_type": "vit"}')
    assert torch.equal(read_weights(tmp_path / WEIGHTS, "weights")["w"], torch.arange(3.0))
    with pytest.raises(UserError, match="found another library's"):
        load_checkpoint(tmp_path)
    (tmp_path / DESCRIPTION).unlink()
    with pytest.raises(UserError, match=r"config\.json: expected the description"):
        load_checkpoint(tmp_path)


def test_damaged_weights_and_pickles_in_their_place_are_refused(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    whole = (folder / WEIGHTS).read_bytes()
    for content in (whole[:-5], (folder / "checkpoint_best.pt").read_bytes(), b""):
        (folder / WEIGHTS).write_bytes(content)
        with pytest.raises(DamagedFile, match=r"model\.safetensors: expected .* cannot be read"):
            load_checkpoint(folder)


def test_reading_a_checkpoint_does_not_load_safetensors() -> None:
    """Workers import this module at their start."""
    code = "import sys, wsi_common.run; assert 'safetensors' not in sys.modules, 'loaded'"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
