"""Load the shared libraries that ONNX Runtime's GPU providers need, as torch does, and name missing ones.

When one is missing, ONNX Runtime silently falls back to the CPU and names it only in its log.
"""

import ctypes
import importlib.util
import re
import sys
from pathlib import Path

import onnxruntime as ort

# cuDNN is listed because CUDA's provider opens it later, without naming it; TensorRT's runs beside CUDA's
NEEDED = {
    "cuda": ("libonnxruntime_providers_cuda.so", "libcudnn.so.9"),
    "tensorrt": ("libonnxruntime_providers_cuda.so", "libonnxruntime_providers_tensorrt.so"),
}
TENSORRT = ("libnvinfer.so.*", "libnvinfer_plugin.so.*", "libnvonnxparser.so.*")

_ABSENT = re.compile(r"(?P<library>[\w.+-]+\.so[\w.]*): cannot open shared object file")
_SONAME_VERSION = re.compile(r"\.so\.(\d+)")


def load(provider: str) -> None:
    """Load the libraries of `provider`, 'cuda' or 'tensorrt', from the Python packages that ship them.

    CUDA's come from the nvidia packages, as in torch; TensorRT's from tensorrt_libs. Libraries in neither
    are left to the system's loader. Nothing is raised here, see `missing`.
    """
    ort.preload_dlls()
    if provider == "tensorrt":
        for folder in _package_folders("tensorrt_libs"):
            for pattern in TENSORRT:
                for file in sorted(folder.glob(pattern)):
                    _error_of(str(file))


def missing(provider: str) -> tuple[str, ...]:
    """Return a sentence with a remedy for each missing library that `provider` needs; call `load` first.

    () where none is missing, or where the loader does not name them (Windows).
    """
    if not sys.platform.startswith("linux"):
        return ()
    folder = Path(ort.__file__).parent / "capi"
    found = []
    for name in NEEDED[provider]:
        own = folder / name
        absent = _ABSENT.search(_error_of(str(own) if own.exists() else name))
        if absent:
            found.append(f"{absent['library']} is missing: {remedy(absent['library'])}")
    return tuple(dict.fromkeys(found))


def remedy(library: str) -> str:
    """Say how to install a missing library, given its file name, as in 'libcurand.so.10'."""
    if library.startswith("libcuda.so"):
        return "install an NVIDIA driver"
    if library.startswith(("libnvinfer", "libnvonnxparser")):
        version = _SONAME_VERSION.search(library)
        wanted = f"=={version[1]}.*" if version else ""
        return f"pip install 'tensorrt-cu{cuda_version().partition('.')[0]}{wanted}'"
    if library.startswith("libonnxruntime"):
        return "pip install --force-reinstall onnxruntime-gpu"
    return "pip install 'onnxruntime-gpu[cuda,cudnn]'"


def cuda_version() -> str:
    """Return the CUDA version that this ONNX Runtime was built with, as in '13.0'; empty for a build without it."""
    return str(getattr(ort, "cuda_version", "") or "")


def _error_of(library: str) -> str:
    """Return the loader's error for `library`; empty when it loads."""
    try:
        ctypes.CDLL(library)
    except OSError as error:
        return str(error)
    return ""


def _package_folders(package: str) -> list[Path]:
    spec = importlib.util.find_spec(package)
    return [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []
