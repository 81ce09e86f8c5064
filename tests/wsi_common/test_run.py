"""A run directory belongs to one run; checkpoints resume bit for bit and refuse what they cannot
hold.
"""

from __future__ import annotations

import io
import json
import math
import random
import resource
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from wsi_common import cli, device
from wsi_common.checkpoint import (
    load_checkpoint,
    load_tensors,
    load_weights,
    resume,
    save_checkpoint,
    save_tensors,
)
from wsi_common.config import key
from wsi_common.device import autocast, pick_device, pick_precision
from wsi_common.distributed import World, all_reduce_mean, gather_objects, mean_dict
from wsi_common.errors import UserError
from wsi_common.run import Run, open_run
from wsi_common.seed import epoch_generator, rng_state, seed_everything, set_rng_state
from wsi_common.tracking import Tracker

WORLD = World(0, 1, torch.device("cpu"))


@dataclass
class Config:
    lr: float = key(0.1, "learning rate")
    workers: int = key(1, "workers", runtime=True)


def start(path: Path, config: Config, overwrite: bool = False, **inputs: str) -> Run:
    return open_run(path, config, WORLD, inputs=inputs, overwrite=overwrite, tracker=Tracker())


def test_saved_tensors_are_the_same_bytes_under_any_name(tmp_path: Path) -> None:
    """Not so with `torch.save(content, path)`, which puts the (temporary) file's name, with machine
    and process, inside.
    """
    content = {"model": {"weight": torch.arange(3.0)}, "epoch": 4}
    for name in ("a.pt", "another.pt"):
        save_tensors(tmp_path / name, content)
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "another.pt").read_bytes()
    assert torch.equal(
        load_tensors(tmp_path / "a.pt", "tensors")["model"]["weight"], torch.arange(3.0)
    )


def test_a_file_that_cannot_grow_is_the_error_of_the_system(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            save_tensors(tmp_path / "a.pt", torch.zeros(10_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


def test_a_signal_while_tensors_are_written_is_no_error_of_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupted(io.FileIO):
        def write(self, *_: object) -> int:
            raise KeyboardInterrupt

    monkeypatch.setattr(Path, "open", lambda path, mode: Interrupted(path, "w"))
    with pytest.raises(KeyboardInterrupt):
        save_tensors(tmp_path / "a.pt", torch.zeros(10_000))
    assert not list(tmp_path.iterdir())


def test_same_run_goes_on_and_another_is_refused(tmp_path: Path) -> None:
    run = start(tmp_path / "r", Config(), labels="a")
    assert run.results is None
    run.finish({"auc": 0.9})
    assert start(tmp_path / "r", Config(workers=8), labels="a").results == {"auc": 0.9}
    with pytest.raises(UserError, match=r"config.lr 0.1 -> 0.2"):
        start(tmp_path / "r", Config(lr=0.2), labels="a")
    with pytest.raises(UserError, match="inputs.labels 'a' -> 'b'"):
        start(tmp_path / "r", Config(), labels="b")
    assert start(tmp_path / "r", Config(lr=0.2), overwrite=True, labels="a").results is None


def test_a_script_that_fails_before_it_has_anything_to_keep_gives_its_folder_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(config: Config, *lines: float) -> int:
        run = start(tmp_path / "r", config, labels="a")
        with pytest.raises(UserError, match="another run"):  # by another script, meanwhile
            start(tmp_path / "r", Config(lr=0.5), labels="a")
        for loss in lines:
            run.log({"loss": loss})
        raise UserError("expected weights, found none")

    assert cli.run(fail, Config, ["lr=0.3"]) == 2
    assert cli.run(lambda config: fail(config, 1.0), Config, ["lr=0.2"]) == 2
    assert capsys.readouterr().err.count("expected weights, found none") == 2
    with pytest.raises(UserError, match=r"config.lr 0.2 -> 0.1"):
        start(tmp_path / "r", Config(), labels="a")


def test_checkpoints_of_unknown_origin_are_not_taken_over(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "checkpoint_last.pt")
    with pytest.raises(UserError, match="unknown origin"):
        start(tmp_path, Config())
    assert not start(tmp_path, Config(), overwrite=True).last.is_file(), "nothing to go on from"


def test_run_writes_what_the_contract_names(tmp_path: Path) -> None:
    run = start(tmp_path, Config())
    run.log({"epoch": 1, "loss": 0.5})
    run.finish({"auc": 1.0})
    for name in ("config.yaml", "metrics.jsonl", "results.json", "environment.json"):
        assert (tmp_path / name).is_file(), name
    assert json.loads((tmp_path / "environment.json").read_text())["torch"] == torch.__version__


def test_numbers_that_json_does_not_have_are_null(tmp_path: Path) -> None:
    run = start(tmp_path, Config())
    run.log({"epoch": 1, "loss": float("nan"), "by_class": [float("inf"), 0.5, {"a": -math.inf}]})

    def refuse(token: str) -> None:
        raise AssertionError(f"{token} is no JSON")

    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=refuse) == {
        "epoch": 1, "loss": None, "by_class": [None, 0.5, {"a": None}],
    }  # fmt: skip


@dataclass
class Precise:
    precision: str = key("auto", "number format", choices=("auto", "fp32", "bf16", "fp16"))


def test_a_run_does_not_go_on_in_the_arithmetic_of_another_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "_cpu_has_bf16", lambda: True)
    open_run(tmp_path, Precise(), WORLD, inputs={})
    open_run(tmp_path, Precise("bf16"), WORLD, inputs={})
    monkeypatch.setattr(device, "_cpu_has_bf16", lambda: False)
    with pytest.raises(UserError, match="config.precision 'bf16' -> 'fp32'"):
        open_run(tmp_path, Precise(), WORLD, inputs={})
    open_run(tmp_path, Precise("bf16"), WORLD, inputs={})


def test_epochs_that_will_be_run_again_are_forgotten(tmp_path: Path) -> None:
    run = start(tmp_path, Config())
    for epoch in (1, 2, 3):
        run.log({"epoch": epoch})
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"epoch": 3, "lo')
    run.forget_after(2)
    assert [
        json.loads(line)["epoch"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
    ] == [1, 2]


def test_steps_of_an_unfinished_epoch_are_kept_up_to_the_checkpoint(tmp_path: Path) -> None:
    run = start(tmp_path, Config())
    for line in ({"epoch": 1, "step": 0}, {"epoch": 1}, {"epoch": 2, "step": 1}):
        run.log(line)
    run.log({"epoch": 2, "step": 2})
    run.forget_after(1, step=2)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line).get("step") for line in lines] == [0, None, 1]


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
    for _ in range(count):
        x = torch.randn(4, 3) * random.random() + float(np.random.rand())
        optimizer.zero_grad()
        nn.functional.dropout(model(x), 0.5).square().sum().backward()
        optimizer.step()


def new() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Linear(3, 2)
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def test_resume_is_bit_for_bit(tmp_path: Path) -> None:
    seed_everything(3)
    model, optimizer = new()
    steps(model, optimizer, 2)
    state = {
        "model": model.state_dict(),
        "config": {},
        "epoch": 2,
        "optimizer": optimizer.state_dict(),
        "best": {"auc": 0.7},
    }
    save_checkpoint(tmp_path / "c.pt", **state)
    steps(model, optimizer, 3)
    seed_everything(99)
    again, optimizer_again = new()
    assert resume(tmp_path / "c.pt", again, optimizer=optimizer_again) == (2, {"auc": 0.7})
    steps(again, optimizer_again, 3)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)
    )


def test_resume_without_a_checkpoint_starts_at_zero(tmp_path: Path) -> None:
    assert resume(tmp_path / "none.pt", nn.Linear(1, 1)) == (0, {})


def test_rng_state_covers_python_numpy_and_torch() -> None:
    seed_everything(1)
    state = rng_state()
    first = (random.random(), np.random.rand(), torch.rand(1).item())
    set_rng_state(state)
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == first


def test_epoch_generators_differ_by_epoch_and_seed() -> None:
    draws = {
        torch.rand(1, generator=epoch_generator(seed, epoch)).item()
        for seed in (1, 2)
        for epoch in (0, 1)
    }
    assert len(draws) == 4


class Evil:
    def __reduce__(self):
        return (print, ("unpickled",))


def test_unsafe_and_broken_checkpoints_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"model": Evil()}, tmp_path / "evil.pt")
    torch.save({"model": {}, "config": {}}, tmp_path / "short.pt")
    torch.save({"model": torch.zeros(999)}, tmp_path / "cut.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "cut.pt").read_bytes()[:700])
    for name in ("evil.pt", "cut.pt"):
        with pytest.raises(UserError, match="cannot be read"):
            load_tensors(tmp_path / name, "a checkpoint")
    with pytest.raises(UserError, match="'epoch' is missing"):
        load_checkpoint(tmp_path / "short.pt")
    with pytest.raises(UserError, match="found no file"):
        load_checkpoint(tmp_path / "none.pt")
    assert "unpickled" not in capsys.readouterr().out


def test_weights_of_another_architecture_are_refused() -> None:
    with pytest.raises(
        UserError, match=r"1 of another shape \['weight \(4, 3\) for \(2, 3\)'\]|another shape"
    ):
        load_weights(nn.Linear(3, 2), nn.Linear(3, 4).state_dict(), "w.pt")
    with pytest.raises(UserError, match="1 missing"):
        load_weights(nn.Linear(3, 2), nn.Linear(3, 2, bias=False).state_dict(), "w.pt")


def test_device_and_precision_choices() -> None:
    cpu = pick_device("cpu")
    assert pick_precision("fp32", cpu) == "fp32"
    assert pick_precision("auto", cpu) in {"bf16", "fp32"}
    with pytest.raises(UserError, match="expected auto, cpu"):
        pick_device("gpuu")
    with pytest.raises(UserError, match="expected one of"):
        pick_precision("fp8", cpu)
    with pytest.raises(UserError, match="CUDA"):
        pick_precision("fp16", cpu)
    with autocast(cpu, "bf16"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    with autocast(cpu, "fp32"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_missing_cuda_is_said_at_once() -> None:
    with pytest.raises(UserError, match="set device=cpu"):
        pick_device("cuda")


def test_reductions_with_one_process_are_the_values() -> None:
    assert mean_dict({"b": torch.tensor(2.0), "a": torch.tensor(1.0)}) == {"a": 1.0, "b": 2.0}
    assert all_reduce_mean(torch.tensor(3.0)).item() == 3.0
    assert gather_objects("x") == ["x"]
