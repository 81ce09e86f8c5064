"""Run one stage as a child process and note its wall time and peak memory, once, in a JSON file.

    python -m wsi_common.stage_timer runs/stages.json tiling -- python -m patch_encoder.tile_slides
    ...

The first successful run of a stage is the one that counts; running it again over finished work
leaves the note alone.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path

from wsi_common.files import write_json

USAGE = "usage: python -m wsi_common.stage_timer FILE.json STAGE -- COMMAND [ARGUMENT ...]"


def main(arguments: list[str]) -> int:
    """Run the command; returns its exit status (128 + signal when a signal ended it)."""
    if len(arguments) < 4 or arguments[2] != "--":
        print(USAGE, file=sys.stderr)
        return 2
    file, name, command = Path(arguments[0]), arguments[1], arguments[3:]
    notes = json.loads(file.read_text()) if file.is_file() else {"stages": []}
    known = {stage["name"]: stage for stage in notes["stages"]}
    attempts = known.get(name, {}).get("attempts", 0)
    if known.get(name, {}).get("seconds") is not None:
        return _status(subprocess.run(command, check=False).returncode)
    _note(file, notes, {"name": name, "seconds": None, "peak_mib": None, "attempts": attempts + 1})
    start = time.monotonic()
    status = _status(subprocess.run(command, check=False).returncode)
    seconds = time.monotonic() - start
    if status == 0:
        # the largest single process among the stage's processes
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        _note(
            file,
            notes,
            {
                "name": name,
                "seconds": round(seconds, 1),
                "peak_mib": round(peak),
                "attempts": attempts + 1,
            },
        )
    return status


def _status(returncode: int) -> int:
    return returncode if returncode >= 0 else 128 - returncode


def _note(file: Path, notes: dict, stage: dict) -> None:
    kept = [other for other in notes["stages"] if other["name"] != stage["name"]]
    index = next(
        (i for i, other in enumerate(notes["stages"]) if other["name"] == stage["name"]), len(kept)
    )
    notes["stages"] = [*kept[:index], stage, *kept[index:]]
    write_json(file, notes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
