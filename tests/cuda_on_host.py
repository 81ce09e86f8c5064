"""Compile CUDA sources with the host's C++ compiler against `cuda_on_host.h`, which runs their
kernels thread by thread.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

HEADER = Path(__file__).resolve().parent / "cuda_on_host.h"
LAUNCH = re.compile(r"(\w+(?:<[\w, ]+>)?)<<<(.+?), (\w+), 0, stream>>>\((.*?)\);", re.DOTALL)
FLAGS = ["-std=c++17", "-O1", "-shared", "-fPIC", "-w", "-static-libubsan"]
FLAGS += ["-fsanitize=alignment,signed-integer-overflow,bounds", "-fno-sanitize-recover=all"]


def build_for_host(sources: list[Path], library: Path, extra: str = "") -> Path:
    """One library of CUDA sources and, after them, of `extra` C++; skips the test where there is no
    g++.

    Misaligned accesses and overflows of signed integers end the process.
    """
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ to compile the kernels for the host")
    parts = [f'#include "{HEADER}"']
    for source in sources:
        text = re.sub(r'#include ("|<cuda_).*|#pragma once', "", source.read_text())
        parts.append(LAUNCH.sub(r"on_host::run(\2, \3, [&] { \1(\4); });", text))
    assert not any("<<<" in part for part in parts)
    unit = library.with_suffix(".cpp")
    unit.write_text("\n".join([*parts, extra]))
    done = subprocess.run(
        [compiler, *FLAGS, str(unit), "-o", str(library)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[:3000]
    return library
