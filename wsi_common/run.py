"""A run directory: resolved config, one JSON object per step or epoch, checkpoints, results,
environment.

A run is identified by the configuration keys that decide its result and by fingerprints of its
inputs. The same run started again goes on from its last checkpoint, or does nothing when it is
finished; another run is never mixed into the directory of the first.
"""

from __future__ import annotations

import json
import math
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from wsi_common import __version__
from wsi_common.checkpoint import share_checkpoint
from wsi_common.config import identity, to_dict
from wsi_common.device import pick_precision
from wsi_common.distributed import World, barrier
from wsi_common.files import read_json, without_nan, write_json, write_text
from wsi_common.provenance import can_reuse, unknown_origin
from wsi_common.shared_weights import BEST, DESCRIPTION, WEIGHTS
from wsi_common.tracking import (
    EVENTS,
    METRICS,
    WANDB_ID,
    TensorBoardEvents,
    Tracker,
    WandbRun,
    make_tracking,
)

STAMP = "run.json"
CLAIM = {STAMP, "config.yaml", "environment.json"}  # what `open_run` itself writes
_claimed = list[Path]()  # directories that this process has opened


class Run:
    """One run directory, written by the main process only.

    Attributes:
        path: the directory.
        results: content of results.json when the run is finished, else None.
        last, best: where checkpoints go.
    """

    def __init__(
        self,
        path: Path,
        results: dict[str, Any] | None,
        tracking: TensorBoardEvents | WandbRun | None,
        writes: bool,
    ) -> None:
        self.path = path
        self.results = results
        self.last = path / "checkpoint_last.pt"
        self.best = path / BEST
        self._tracking = tracking
        self._writes = writes

    def log(self, values: dict[str, Any]) -> None:
        """Append one JSON object to metrics.jsonl and hand it to the tracker; NaN and infinity,
        which JSON does not have, are null in the file.
        """
        if not self._writes:
            return
        with (self.path / METRICS).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(without_nan(values), allow_nan=False) + "\n")
        if self._tracking is not None:
            self._tracking.log(values)

    def forget_after(self, epoch: int, step: int = -1) -> None:
        """Drop logged lines of what will be run again: of epochs beyond `epoch` completed ones.

        Args:
            epoch: epochs that are completed.
            step: for scripts that also stop inside an epoch, steps that are completed: their
                lines, which are those with a `step`, are kept.
        """
        file = self.path / METRICS
        if not self._writes or not file.is_file():
            return
        kept = []
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                values = json.loads(line)
                if values.get("epoch", 0) <= epoch or values.get("step", math.inf) < step:
                    kept.append(line)
            except json.JSONDecodeError:
                break  # a line that a kill cut short; what follows it is later still
        write_text(file, "".join(line + "\n" for line in kept))

    def finish(self, results: dict[str, Any]) -> None:
        """Write the best weights as `model.safetensors`, then results.json, which marks the run as
        finished.
        """
        self.results = results
        if self._writes:
            if self.best.is_file():
                share_checkpoint(self.best)
            write_json(self.path / "results.json", results)
        if self._tracking is not None:
            self._tracking.finish(results)


def open_run(
    output: str | Path,
    config: Any,
    world: World,
    *,
    inputs: dict[str, str],
    overwrite: bool = False,
    tracker: Tracker | None = None,
    label: str = "",
) -> Run:
    """Make or reopen a run directory.

    Args:
        output: the directory.
        config: the script's configuration object.
        world: this process; only the main one writes.
        inputs: fingerprint (any string) of each input, by name: file digests, cohort digests.
        overwrite: start afresh over another run's directory.
        tracker: where metrics go besides metrics.jsonl.
        label: name of the run there, as for `make_tracking`.

    Raises:
        UserError: the directory holds a run with other settings or inputs, which are named.
    """
    path = Path(output)
    identified = {"config": _resolve_precision(identity(config), world), "inputs": inputs}
    stamp = path / STAMP
    if world.is_main:
        path.mkdir(parents=True, exist_ok=True)
        if overwrite:
            _clear(path)
        if not stamp.is_file() and any(path.glob("checkpoint_*.pt")):
            raise unknown_origin(path, "checkpoints", stamp.name)
        can_reuse(
            stamp,
            lambda: read_json(stamp, "a run's identity"),
            identified,
            "another run",
            overwrite=overwrite,
        )
        write_text(path / "config.yaml", yaml.safe_dump(to_dict(config), sort_keys=False))
        write_json(path / "environment.json", environment(world.device))
        write_json(stamp, identified)
        _claimed.append(path)
    barrier()
    finished = path / "results.json"
    results = read_json(finished, "a run's results") if finished.is_file() else None
    tracker = tracker if world.is_main else None
    tracking = make_tracking(tracker, path, to_dict(config), label)
    return Run(path, results, tracking, world.is_main)


def give_up_claims() -> None:
    """Leave the directories of this process to other settings where nothing else was written into
    them, as after an error before the first step.
    """
    while _claimed:
        path = _claimed.pop()
        if path.is_dir() and {entry.name for entry in path.iterdir()} <= CLAIM:
            (path / STAMP).unlink(missing_ok=True)


def _resolve_precision(settings: dict[str, Any], world: World) -> dict[str, Any]:
    """`precision=auto` by what it means on this device, so that a run does not go on in another
    arithmetic on another machine.
    """
    return {
        name: pick_precision(value, world.device)
        if name.rpartition(".")[2] == "precision"
        else value
        for name, value in settings.items()
    }


def _clear(path: Path) -> None:
    made = ("results.json", METRICS, "checkpoint_last.pt", BEST, WEIGHTS, DESCRIPTION, WANDB_ID)
    for name in made:
        (path / name).unlink(missing_ok=True)
    shutil.rmtree(path / EVENTS, ignore_errors=True)


def find_commit(root: Path) -> str | None:
    """The git commit of a clone; None for a package that was installed without one, even where the
    environment lies in a repository of the user's.
    """
    if not (root / ".git").exists():
        return None
    command = ["git", "rev-parse", "HEAD"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, git commit and hardware, for environment.json."""
    return {
        "software_version": __version__,
        "git_commit": find_commit(Path(__file__).resolve().parents[1]),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "command": sys.argv,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
