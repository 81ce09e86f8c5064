"""The quickstart's own script, small: it has to run, not to be good."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

from tests.helpers import ROOT

FEATURE_SETS = {"imagenet_lite0", "student", "stain_texture", "mean_colour"}
SMALL = {
    "DETECTOR": "epochs=1 architecture.encoder_layers=1 architecture.decoder_layers=1",
    "RANK": "training.epochs=2 training.min_epochs=1 top_k=6 extra_random=2 workers=0",
    "D2VFM": "epochs=2 lr_drop=1",
    "COST": "tiles_per_round=32 rounds=1 workers=0",
    "MIL": "training.epochs=2 training.min_epochs=1 models=[abmil] folds=2 resamples=50 workers=1",
}


def start(python: Path, run: Path, settings: dict[str, str]) -> subprocess.Popen[str]:
    """The script with this interpreter; it writes to `run`, and says what it says to a file beside
    it.
    """
    environment = {
        **os.environ,
        "ENV": "active",
        "PYTHON": str(python),
        "PYTHON_BASE": str(python),
        "OMP_NUM_THREADS": "1",
        **SMALL,
        **settings,
        "RUN": str(run),
    }
    command = ["bash", str(ROOT / "tools" / "quickstart.sh")]
    with (run.parent / f"{run.name}.log").open("a") as log:
        streams = {"stdout": log, "stderr": log, "text": True}
        return subprocess.Popen(
            command, env=environment, cwd=run.parent, start_new_session=True, **streams
        )


def printed(run: Path) -> str:
    """The end of what the script said."""
    return (run.parent / f"{run.name}.log").read_text()[-3000:]


def finish(python: Path, run: Path, settings: dict[str, str]) -> dict:
    """Run the script to its end; its summary."""
    status = start(python, run, settings).wait(timeout=600)
    assert status == 0, printed(run)
    return json.loads((run / "summary.json").read_text())


def kill_when(python: Path, run: Path, sign: str, settings: dict[str, str]) -> None:
    """SIGKILL the quickstart and all its children as soon as a file that matches `sign` appears."""
    process = start(python, run, settings)
    deadline = time.monotonic() + 300
    while not any(run.glob(sign)) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert process.poll() is None, printed(run)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
