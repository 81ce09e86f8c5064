"""Compiled operators: C++ and CUDA sources beside a package's `ops`, built ahead of time, loaded
where they are there.

    <package>/ops/csrc/cpu/*.cpp        -> <package>/ops/build/lib<name>_cpu.so
    <package>/ops/csrc/cuda/*.{cpp,cu}  -> <package>/ops/build/lib<name>_cuda.so   (name: the
    package)

The sources include only torch's stable ABI and what the operators share in `wsi_common/csrc`, so
one build serves every torch from 2.10 on. A unit named `*_avx512.cpp` or `*_avx2.cpp` is compiled
for that instruction set, all others for what every processor of the architecture has; which one
runs is decided at run time, so a build can be copied to another machine.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from wsi_common.errors import UserError
from wsi_common.files import atomic_path, write_text

TORCH_INCLUDE = str(Path(torch.__file__).parent / "include")
SHARED = Path(__file__).resolve().parents[1] / "csrc"
"""Headers that the operators of several packages share."""
TORCH_TARGET = "0x020a000000000000"
"""Version of torch's stable ABI that the sources are written for: 2.10."""
COMMON_FLAGS = ["-O3", "-std=c++17", f"-DTORCH_TARGET_VERSION={TORCH_TARGET}ULL"]
WARNINGS = ["-Wall", "-Wextra", "-Wno-maybe-uninitialized", "-Wno-psabi"]
CPU_FLAGS = [
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-Wall",
    "-Wextra",
    "-Wno-maybe-uninitialized",
    "-Wno-psabi",
]
X86_FLAGS = {
    "_avx512": [
        "-mavx512f",
        "-mavx512bw",
        "-mavx512dq",
        "-mavx512vl",
        "-mfma",
        "-mf16c",
        "-mprefer-vector-width=512",
    ],
    "_avx2": ["-mavx2", "-mfma", "-mf16c"],
}
ARCHITECTURES = ("80", "86", "89", "90", "100", "120")
"""CUDA architectures of a build on a machine without a GPU, as far as nvcc knows them; the last one
also as PTX.
"""


@dataclass(frozen=True)
class Unit:
    """One source file and the command that turns it into an object file, less the two file
    names.
    """

    source: Path
    command: tuple[str, ...]


def library_path(ops: Path, kind: str) -> Path:
    """Where the library of an `ops` folder is built; kind "cpu" or "cuda"."""
    return ops / "build" / f"lib{ops.parent.name}_{kind}.so"


def load_library(path: Path) -> str | None:
    """Load a library of operators; None, or the reason why it cannot be."""
    if not path.is_file():
        return (
            f"{path.name} is not built (bash tools/build_ops.sh, or python -m wsi_common.ops.build)"
        )
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"{path.name} does not load: {str(error).splitlines()[0]}"
    return None


def cpu_units(ops: Path) -> list[Unit]:
    """The C++ units of an `ops` folder.

    Raises:
        UserError: no C++ compiler.
    """
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    compiler = next(filter(None, map(shutil.which, names)), None)
    if not compiler:
        raise UserError(
            f"C++ compiler: expected one of {', '.join(names)}, found none; install g++ or set CXX"
        )
    x86 = platform.machine() in {"x86_64", "AMD64"}
    units = []
    for source in sorted((ops / "csrc" / "cpu").glob("*.cpp")):
        extra = (
            next((flags for end, flags in X86_FLAGS.items() if source.stem.endswith(end)), [])
            if x86
            else []
        )
        units.append(
            Unit(
                source,
                (
                    compiler,
                    *COMMON_FLAGS,
                    *CPU_FLAGS,
                    *extra,
                    *_includes([TORCH_INCLUDE]),
                    f"-I{SHARED}",
                    "-c",
                ),
            )
        )
    return units


def find_nvcc() -> tuple[str | None, str]:
    """(nvcc, "") or (None, the reason why CUDA units cannot be built)."""
    if torch.version.cuda is None:
        return None, "torch was installed without CUDA"
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = (
        str(Path(home, "bin", "nvcc"))
        if home
        else shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    )
    if not Path(nvcc).is_file():
        return None, f"nvcc was not found ({nvcc}); set CUDA_HOME"
    return nvcc, ""


def cuda_units(ops: Path, nvcc: str, architectures: list[str]) -> list[Unit]:
    """The CUDA units of an `ops` folder; arguments and errors as of `cuda_command`."""
    command = cuda_command(nvcc, architectures)
    sources = sorted(
        [*(ops / "csrc" / "cuda").glob("*.cu"), *(ops / "csrc" / "cuda").glob("*.cpp")]
    )
    return [Unit(source, command) for source in sources]


def cuda_command(nvcc: str, architectures: list[str]) -> tuple[str, ...]:
    """The command that compiles one CUDA unit, less the two file names.

    Args:
        architectures: compute capabilities without the dot ("90"); empty: those of the GPUs here,
            without any ARCHITECTURES.

    Raises:
        UserError: nvcc does not know one of them.
    """
    listed = subprocess.run(
        [nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True
    ).stdout
    known = {line.removeprefix("compute_") for line in listed.split()}
    wanted = architectures or _visible() or [name for name in ARCHITECTURES if name in known]
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise UserError(
            f"architectures: nvcc does not know {', '.join(unknown)}; it knows "
            f"{', '.join(sorted(known, key=int))}"
        )
    code = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in wanted]
    code.append(f"-gencode=arch=compute_{wanted[-1]},code=compute_{wanted[-1]}")
    # headers of the toolkit that torch's own packages bring, for an nvcc that comes without
    packaged = sorted(Path(torch.__file__).parents[1].glob("nvidia/cu*/include"))
    flags = [
        *COMMON_FLAGS,
        "-DUSE_CUDA",
        "--expt-relaxed-constexpr",
        "-lineinfo",
        "-Xcompiler=-fPIC,-fvisibility=hidden",
        *code,
    ]
    return (nvcc, *flags, *_includes([TORCH_INCLUDE, *map(str, packaged)]), f"-I{SHARED}", "-c")


def build(
    ops: Path, kind: str, units: list[Unit], force: bool = False, pool: Executor | None = None
) -> bool:
    """Compile and link one library, unless it is there for the same sources and commands; the log
    is kept beside it.

    Args:
        ops: the folder with csrc/.
        kind: "cpu" or "cuda".
        units: what to compile.
        force: even if it is there.
        pool: where the compilers run; libraries that are built at the same time share one. None: a
            process a core.

    Returns:
        Whether anything was built.

    Raises:
        UserError: the compiler failed; the message names the log.
    """
    library = library_path(ops, kind)
    stamp, log = library.with_suffix(".stamp"), library.with_suffix(".log")
    wanted = _digest(ops, kind, units)
    if not force and library.is_file() and stamp.is_file() and stamp.read_text() == wanted:
        stamp.touch()  # looked at now: setup.sh compares its time with that of the sources
        return False
    library.parent.mkdir(exist_ok=True)
    stamp.unlink(missing_ok=True)
    objects = [library.parent / f"{kind}_{unit.source.name}.o" for unit in units]
    commands = [
        [*unit.command, str(unit.source), "-o", str(to)] for unit, to in zip(units, objects)
    ]
    with nullcontext(pool) if pool else ThreadPoolExecutor(os.cpu_count()) as compilers:
        done = list(compilers.map(_compile, commands))
    with atomic_path(library) as temporary:
        if all(status == 0 for status, _ in done):
            # symbols of torch come from the libraries that `import torch` has loaded
            torch_lib = Path(torch.__file__).parent / "lib"
            flags = [
                "-shared",
                f"-L{torch_lib}",
                "-ltorch_cpu",
                *(["-ltorch_cuda"] if kind == "cuda" else []),
            ]
            done.append(
                _compile([units[0].command[0], *map(str, objects), *flags, "-o", str(temporary)])
            )
        write_text(log, "\n".join(text for _, text in done))
        if any(status != 0 for status, _ in done):
            first = next(text for status, text in done if status != 0)
            lines = [line for line in first.splitlines() if "error" in line] or first.splitlines()[
                -1:
            ]
            raise UserError(
                f"{library.name}: the compiler failed: {lines[0].strip()[:300]}; whole log: {log}"
            )
    for file in objects:
        file.unlink()
    write_text(stamp, wanted)
    return True


def _visible() -> list[str]:
    capabilities = {
        torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())
    }
    return [f"{major}{minor}" for major, minor in sorted(capabilities)]


def _includes(folders: list[str]) -> list[str]:
    return [flag for folder in dict.fromkeys(folders) for flag in ("-isystem", folder)]


def _compile(command: list[str]) -> tuple[int, str]:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, f"$ {' '.join(command)}\n{done.stdout}{done.stderr}"


def _digest(ops: Path, kind: str, units: list[Unit]) -> str:
    digest = hashlib.sha256()
    sources = [*SHARED.glob("*"), *(ops / "csrc").glob("*"), *(ops / "csrc" / kind).rglob("*")]
    for file in sorted(path for path in sources if path.is_file()):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    for unit in units:
        digest.update("\0".join(unit.command).encode())
    compiler = subprocess.run(
        [units[0].command[0], "--version"], capture_output=True, text=True, check=False
    ).stdout
    return hashlib.sha256(digest.digest() + compiler.encode()).hexdigest()
