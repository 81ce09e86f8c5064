"""Build the compiled operators ahead of time: always the CPU unit, the CUDA unit where nvcc and a CUDA torch are there.

    python -m common.build_ops cuda=yes architectures=[90]

Again over finished work it does nothing. The compiler's output is kept in `<ops>/build/*.log`.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path

from common.cli import launch
from common.config import key
from common.errors import UserError
from common.native import build, cpu_units, cuda_units, find_nvcc, library_path, load_library

logger = logging.getLogger(__name__)
ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Config:
    """Keys of the build."""

    ops: list[str] = key(["detection_kd/ops"], "folders with csrc/, from the repository's root")
    cuda: str = key("auto", "auto: where nvcc and a CUDA torch are there; yes: fail without; no", choices=("auto", "yes", "no"))
    architectures: list[str] = key([], "compute capabilities without the dot, as in [80,90]; empty: this machine's")
    force: bool = key(False, "build again what is built already")


def main(config: Config) -> int:
    for name in config.ops:
        ops = ROOT / name
        if not (ops / "csrc").is_dir():
            raise UserError(f"ops: expected a folder with csrc/, found none at {ops}")
        build_one(ops, "cpu", cpu_units(ops), config.force)
        if config.cuda == "no" or not (ops / "csrc" / "cuda").is_dir():
            continue
        nvcc, reason = find_nvcc()
        if nvcc:
            build_one(ops, "cuda", cuda_units(ops, nvcc, config.architectures), config.force)
        elif config.cuda == "yes":
            raise UserError(f"cuda=yes: {reason}")
        else:
            logger.info("build_ops: %s: no CUDA unit: %s", name, reason)
    return 0


def build_one(ops: Path, kind: str, units: list, force: bool) -> None:
    """Build one library and see that it loads."""
    start, library = time.monotonic(), library_path(ops, kind)
    if build(ops, kind, units, force):
        logger.info("build_ops: %s built in %.0f s", library.name, time.monotonic() - start)
    else:
        logger.info("build_ops: %s is up to date", library.name)
    reason = load_library(library_path(ops, "cpu")) or load_library(library)
    if reason:
        raise UserError(f"{reason}; log: {library.with_suffix('.log')}")


if __name__ == "__main__":
    launch(main, Config)
