"""Build the compiled operators ahead of time: always the CPU unit, the CUDA unit where nvcc and a
CUDA torch are there.

    python -m wsi_common.ops.build cuda=yes architectures=[90]

All libraries at the same time, a compiler a core. Again over finished work it does nothing. The
compiler's output is kept in `<ops>/build/*.log`.
"""

from __future__ import annotations

import logging
import os
import time
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from wsi_common.cli import launch
from wsi_common.config import key
from wsi_common.errors import UserError
from wsi_common.ops.native import (
    Unit,
    build,
    cpu_units,
    cuda_units,
    find_nvcc,
    library_path,
    load_library,
)

logger = logging.getLogger(__name__)
ROOT = Path(__file__).resolve().parents[2]
Library = tuple[Path, str, list[Unit]]


@dataclass
class Config:
    """Keys of the build."""

    ops: list[str] = key(
        ["detection_kd/ops", "mil/ops"], "folders with csrc/; beside the package wsi_common"
    )
    cuda: str = key(
        "auto",
        "auto: where nvcc and a CUDA torch are there; yes: fail without; no",
        choices=("auto", "yes", "no"),
    )
    architectures: list[str] = key(
        [], "compute capabilities without the dot, as in [80,90]; empty: this machine's"
    )
    force: bool = key(False, "build again what is built already")


def main(config: Config) -> int:
    wanted = [library for name in config.ops for library in libraries(ROOT / name, config)]
    with (
        ThreadPoolExecutor(os.cpu_count()) as compilers,
        ThreadPoolExecutor(len(wanted)) as builders,
    ):
        list(builders.map(partial(build_one, force=config.force, compilers=compilers), wanted))
    for ops, kind, _ in wanted:  # the CPU library of an operator comes first: it has the schema
        if reason := load_library(library_path(ops, kind)):
            raise UserError(f"{reason}; log: {library_path(ops, kind).with_suffix('.log')}")
    return 0


def libraries(ops: Path, config: Config) -> list[Library]:
    """What there is to build in one folder: (folder, kind, units), the CPU library first.

    Raises:
        UserError: there is no csrc/, or CUDA is demanded and cannot be built.
    """
    if not (ops / "csrc").is_dir():
        raise UserError(f"ops: expected a folder with csrc/, found none at {ops}")
    found: list[Library] = [(ops, "cpu", cpu_units(ops))]
    if config.cuda == "no" or not (ops / "csrc" / "cuda").is_dir():
        return found
    nvcc, reason = find_nvcc()
    if nvcc:
        found.append((ops, "cuda", cuda_units(ops, nvcc, config.architectures)))
    elif config.cuda == "yes":
        raise UserError(f"cuda=yes: {reason}")
    else:
        logger.info("build_ops: %s: no CUDA unit: %s", ops.relative_to(ROOT), reason)
    return found


def build_one(library: Library, force: bool, compilers: Executor) -> None:
    """Build one library and say so."""
    ops, kind, units = library
    start, path = time.monotonic(), library_path(ops, kind)
    if build(ops, kind, units, force, compilers):
        logger.info("build_ops: %s built in %.0f s", path.name, time.monotonic() - start)
    else:
        logger.info("build_ops: %s is up to date", path.name)


if __name__ == "__main__":
    launch(main, Config)
