"""Build the operator with this machine's C++ compiler, and find the library that was built."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).resolve().parent / "kernels"
FOLDER = Path(sys.prefix) / "share" / "ffn2moe"  # of the environment: copies of the package in workspaces share it
REMEDY = "build it: make native (or python -m ffn2moe.runtime.native)"

# The instructions of each file; which path runs is decided when a model is loaded, so the library runs anywhere.
_AVX2 = ["-mavx2", "-mfma"]
_AVX512 = [*_AVX2, *(f"-mavx512{part}" for part in ("f", "bw", "vl", "dq", "vnni"))]
_AMX = [*_AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-int8", "-mamx-bf16"]
_INSTRUCTIONS = {
    "avx2.cpp": _AVX2,
    "avx512.cpp": _AVX512,
    "rows_avx2.cpp": _AVX2,
    "rows_avx512.cpp": _AVX512,
    "amx.cpp": _AMX,
    "attention_amx.cpp": _AMX,
}


def is_built() -> bool:
    """Return whether `library` finds the operator."""
    try:
        library()
    except FileNotFoundError:
        return False
    return True


def library() -> Path:
    """Return the extension library for `openvino.Core().add_extension`, built for the installed openvino and sources.

    Outside a checkout, such as in the copy of the package beside a registered model, a library built from other
    sources serves as well: it must pass the self-test. FileNotFoundError, with the remedy, if there is none.
    """
    _openvino()
    path = _library(FOLDER)
    if path.is_file():
        return path
    built = sorted(FOLDER.glob(f"{_stem()}-openvino{importlib.metadata.version('openvino')}-*.so"))
    if built and not _in_checkout():
        return built[0]
    others = sorted(FOLDER.glob(f"{_stem()}-*")) if FOLDER.is_dir() else []
    if others:
        built_for = {other.name.split("-openvino")[1].rsplit("-", 1)[0] for other in others}
        version = importlib.metadata.version("openvino")
        why = (
            "its sources have changed since it was built"
            if version in built_for
            else f"it is built for openvino {', '.join(sorted(built_for))}, and {version} is installed"
        )
        raise FileNotFoundError(f"the experts operator must be built again: {why}; {REMEDY}")
    raise FileNotFoundError(f"the experts operator is not built; {REMEDY}")


def build(folder: Path = FOLDER) -> Path:
    """Compile the operator into `folder` with this machine's C++ compiler; return the library.

    The compiler is $CXX, c++, g++ or clang++.

    Libraries built there before, for another openvino or from other sources, are removed. FileNotFoundError where there
    is no compiler, no openvino or no sources, RuntimeError where the compiler fails, both with the remedy.
    """
    compiler = _compiler()
    home = _openvino()
    sources = _sources()
    flags = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-w", f"-I{home / 'include'}"]
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    target = _library(folder)
    with tempfile.TemporaryDirectory(prefix="ffn2moe-native-") as scratch:

        def compile_one(source: Path) -> str:
            result = str(Path(scratch) / f"{source.stem}.o")
            extra = _INSTRUCTIONS.get(source.name, []) if x86 else []
            _run([*compiler, *flags, *extra, "-c", str(source), "-o", result])
            return result

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, [source for source in sources if source.suffix == ".cpp"]))
        libraries = [_engine_library(home, name) for name in ("libopenvino", "libopenvino_onnx_frontend", "libtbb")]
        built = Path(scratch) / target.name
        kind = "-dynamiclib" if sys.platform == "darwin" else "-shared"
        _run([*compiler, kind, *objects, *libraries, f"-Wl,-rpath,{home / 'libs'}", "-o", str(built)])
        folder.mkdir(parents=True, exist_ok=True)
        for other in folder.glob(f"{_stem()}-*"):
            if other != target:
                other.unlink()
        fresh = folder / f".{target.name}.{os.getpid()}"
        shutil.copy(built, fresh)
        fresh.replace(target)
    return target


def _stem() -> str:
    return f"experts-{sys.platform}-{platform.machine().lower()}"


def _library(folder: Path) -> Path:
    """Return the file name of the library for these sources and the installed openvino."""
    digest = hashlib.sha256()
    for source in _sources():
        digest.update(source.read_bytes())
    version = importlib.metadata.version("openvino")
    return folder / f"{_stem()}-openvino{version}-{digest.hexdigest()[:8]}.so"


def _sources() -> list[Path]:
    files = sorted([*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h")])
    if not files:
        raise FileNotFoundError(f"the operator's sources are not in {SOURCES}: install ffn2moe again")
    return files


def _in_checkout() -> bool:
    """Return whether this package lies in a checkout, where a library must be rebuilt after its sources changed."""
    return (Path(__file__).resolve().parents[3] / "pyproject.toml").is_file()


def _openvino() -> Path:
    spec = importlib.util.find_spec("openvino")
    if spec is None or spec.origin is None:
        raise FileNotFoundError('the experts operator needs openvino: pip install "ffn2moe[openvino]"')
    return Path(spec.origin).parent


def _engine_library(home: Path, name: str) -> str:
    found = sorted((home / "libs").glob(f"{name}.*"))
    if not found:
        raise FileNotFoundError(f"{home / 'libs'} has no {name}: install openvino as a wheel, pip install openvino")
    return str(found[0])


def _compiler() -> list[str]:
    wish = shlex.split(os.environ.get("CXX", ""))
    if wish:
        if shutil.which(wish[0]) is None:
            raise FileNotFoundError(f"CXX={wish[0]} was not found: name another compiler, or unset CXX")
        return wish
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return [name]
    raise FileNotFoundError("no C++ compiler was found: install one (Debian, Ubuntu: apt install g++), or set CXX")


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(
            f"the compiler failed (g++ from 11 and clang++ from 14 are known to work): {shlex.join(command)}\n"
            + done.stderr[-4000:]
        )
