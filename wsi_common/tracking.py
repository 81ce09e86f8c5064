"""Metrics on a tracker's page beside metrics.jsonl: Weights & Biases, or TensorBoard.

TensorBoard's event files cannot take a line back, which a run that is resumed has to do. They are
therefore written anew from metrics.jsonl when a process first logs, and then line by line: they
always say what that file says.
"""

from __future__ import annotations

import importlib.util
import json
import math
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from wsi_common.config import key
from wsi_common.errors import UserError
from wsi_common.files import write_text

METRICS, EVENTS, WANDB_ID = "metrics.jsonl", "tensorboard", "wandb_id.txt"
PACKAGES = {"offline": "wandb", "online": "wandb", "tensorboard": "tensorboard"}


@dataclass
class Tracker:
    """Where metrics go; metrics.jsonl is written in any case."""

    mode: str = key(
        "disabled",
        "experiment tracker; offline, online: Weights & Biases; tensorboard: event files in the "
        "run directory",
        choices=("disabled", *PACKAGES),
        runtime=True,
    )
    project: str = key("wsi", "Weights & Biases project", runtime=True)


class TensorBoardEvents:
    """The event files of one run, in `tensorboard/` of its directory.

    Lines of single steps are under `steps/`, those of epochs under `epochs/`, and what results.json
    says under `results/`.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self._settings = settings
        self._writer: Any = None

    def log(self, values: Mapping[str, Any]) -> None:
        """Add a line that metrics.jsonl has already."""
        if self._writer is None:
            self._start()
        else:
            self._add(values)

    def finish(self, results: Mapping[str, Any]) -> None:
        """Add the results, and close the files."""
        if self._writer is None:
            self._start()
        for name, value in flatten_numbers(results).items():
            self._writer.add_scalar(f"results/{name}", value, 0)
        self._writer.close()
        self._writer = None

    def show(self, numbers: Mapping[str, float], table: str) -> None:
        """Write the numbers and the table (Markdown) of something that has no epochs."""
        self._start()
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, 0)
        self._writer.add_text("summary", table)
        self._writer.close()
        self._writer = None

    def _start(self) -> None:
        from torch.utils.tensorboard import SummaryWriter  # a while to load

        folder, logged = self.path / EVENTS, self.path / METRICS
        shutil.rmtree(folder, ignore_errors=True)
        self._writer = SummaryWriter(str(folder), flush_secs=30)
        text = yaml.safe_dump(dict(self._settings), sort_keys=False)
        self._writer.add_text("config", f"```yaml\n{text}```")
        if logged.is_file():
            for line in logged.read_text(encoding="utf-8").splitlines():
                self._add(json.loads(line))

    def _add(self, values: Mapping[str, Any]) -> None:
        kind, place = ("steps", "step") if "step" in values else ("epochs", "epoch")
        for name, value in flatten_numbers(values).items():
            if name not in ("epoch", "step"):
                self._writer.add_scalar(f"{kind}/{name}", value, int(values.get(place, 0)))


class WandbRun:
    """A run of Weights & Biases, begun with the first line; a resumed run goes on in the same one.

    Args:
        path: run directory.
        settings: configuration, for its page.
        tracker: mode and project.
        label: its name there; what stands before the first slash is the name of its group.
    """

    def __init__(
        self, path: Path, settings: Mapping[str, Any], tracker: Tracker, label: str
    ) -> None:
        self.path, self._settings, self._tracker = path, settings, tracker
        group, slash, name = label.partition("/")
        self._named = {"name": name, "group": group} if slash else {"name": label}
        self._run: Any = None

    def log(self, values: Mapping[str, Any]) -> None:
        """Add a line."""
        self._start()
        self._run.log(dict(values))

    def finish(self, results: Mapping[str, Any]) -> None:
        """Add the results to the run's summary, and end it."""
        self._start()
        self._run.summary.update(flatten_numbers(results))
        self._run.finish()
        self._run = None

    def show(self, numbers: Mapping[str, float], table: str) -> None:
        """Add the numbers of something that has no epochs; the table is made of the same ones."""
        self.finish(numbers)

    def _start(self) -> None:
        if self._run is not None:
            return
        import wandb

        file = self.path / WANDB_ID
        if not file.is_file():
            write_text(file, secrets.token_hex(8))
        self._run = wandb.init(
            project=self._tracker.project,
            id=file.read_text(encoding="utf-8"),
            dir=str(self.path),
            config=dict(self._settings),
            mode=self._tracker.mode,
            resume="allow",
            **self._named,
        )


def make_tracking(
    tracker: Tracker | None, path: Path, settings: Mapping[str, Any], label: str = ""
) -> TensorBoardEvents | WandbRun | None:
    """What a run's lines are handed to; None where tracking is off. Nothing is started yet.

    Args:
        tracker: the user's settings.
        path: run directory.
        settings: configuration, which is shown.
        label: name of the run, as for `WandbRun`; empty: that of the directory.

    Raises:
        UserError: the package is not installed.
    """
    if tracker is None or tracker.mode == "disabled":
        return None
    package = PACKAGES[tracker.mode]
    if importlib.util.find_spec(package) is None:
        raise UserError(
            f"tracker.mode={tracker.mode}: expected the package {package}; install it (pip install "
            f"{package}) or set tracker.mode=disabled"
        )
    if package == "tensorboard":
        return TensorBoardEvents(path, settings)
    return WandbRun(path, settings, tracker, label or path.name)


def flatten_numbers(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The finite numbers of nested dicts, by names with slashes.

    The two ends of an interval (`<name>_ci`) are `low` and `high`; other lists and texts are left
    out.
    """
    found: dict[str, float] = {}
    for name, value in values.items():
        if name.endswith("_ci") and isinstance(value, list | tuple):
            value = dict(zip(("low", "high"), value, strict=True))
        if isinstance(value, Mapping):
            found |= flatten_numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and math.isfinite(value):
            found[f"{prefix}{name}"] = float(value)
    return found
