"""A missing GPU library is named with what brings it, from what the loader says."""

import ctypes
from pathlib import Path
from types import SimpleNamespace

import pytest

from growkit.deploy import libraries
from growkit.deploy.libraries import load, missing, remedy

ABSENT = "{}: cannot open shared object file: No such file or directory"


class Loader:
    """ctypes.CDLL on a machine whose libraries say what they are told to; the others load."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **says: str):
        self.says, self.loaded = says, []  # type: tuple[dict[str, str], list[str]]
        monkeypatch.setattr(ctypes, "CDLL", self.load)
        monkeypatch.setattr(libraries.ort, "preload_dlls", lambda: self.loaded.append("preload"))
        monkeypatch.setattr(libraries.sys, "platform", "linux")

    def load(self, library: str) -> None:
        self.loaded.append(library)
        for part, message in self.says.items():
            if part in Path(library).name:
                raise OSError(message)


@pytest.mark.parametrize(
    ("library", "does"),
    [
        ("libcuda.so.1", "install an NVIDIA driver"),
        ("libcudart.so.13", "pip install 'onnxruntime-gpu[cuda,cudnn]'"),
        ("libcublasLt.so.13", "pip install 'onnxruntime-gpu[cuda,cudnn]'"),
        ("libcurand.so.10", "pip install 'onnxruntime-gpu[cuda,cudnn]'"),
    ],
)
def test_first_missing_library_of_cuda_is_named(library: str, does: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Loader(monkeypatch, providers_cuda=ABSENT.format(library))
    assert missing("cuda") == (f"{library} is missing: {does}",)


def test_cudnn_is_missed_although_cudas_own_library_does_not_name_it(monkeypatch: pytest.MonkeyPatch) -> None:
    Loader(monkeypatch, cudnn=ABSENT.format("libcudnn.so.9"))
    assert missing("cuda") == ("libcudnn.so.9 is missing: pip install 'onnxruntime-gpu[cuda,cudnn]'",)


def test_tensorrt_needs_cuda_too_and_its_own_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libraries.ort, "cuda_version", "13.0", raising=False)
    says = {"providers_cuda": ABSENT.format("libcuda.so.1"), "providers_tensorrt": ABSENT.format("libnvinfer.so.10")}
    Loader(monkeypatch, **says)
    assert missing("tensorrt") == (
        "libcuda.so.1 is missing: install an NVIDIA driver",
        "libnvinfer.so.10 is missing: pip install 'tensorrt-cu13==10.*'",
    )
    assert remedy("libnvonnxparser.so.11") == "pip install 'tensorrt-cu13==11.*'"


def test_nothing_is_called_missing_where_all_load_or_the_loader_complains_of_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Loader(monkeypatch)
    assert missing("cuda") == missing("tensorrt") == ()
    Loader(monkeypatch, providers_cuda="/x/libonnxruntime_providers_cuda.so: undefined symbol: cuTensorMapEncodeTiled")
    assert missing("cuda") == ()
    Loader(monkeypatch, providers_cuda=ABSENT.format("libcuda.so.1"))
    monkeypatch.setattr(libraries.sys, "platform", "win32")
    assert missing("cuda") == ()


def test_library_that_two_need_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    Loader(monkeypatch, providers_=ABSENT.format("libcublas.so.13"))
    assert len(missing("tensorrt")) == 1


def test_tensorrt_is_loaded_from_its_package_after_cudas_libraries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["libnvinfer.so.10", "libnvinfer_plugin.so.10", "libnvonnxparser.so.10"]
    for name in [*names, "libnvinfer_builder_resource.so.10.9.0", "__init__.py"]:
        (tmp_path / name).touch()
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(libraries.importlib.util, "find_spec", lambda name: spec if name == "tensorrt_libs" else None)
    loader = Loader(monkeypatch)
    load("cuda")
    assert loader.loaded == ["preload"]
    load("tensorrt")
    assert loader.loaded[1:] == ["preload", *(str(tmp_path / name) for name in names)]
    monkeypatch.setattr(libraries.importlib.util, "find_spec", lambda name: None)
    load("tensorrt")
    assert loader.loaded[5:] == ["preload"]
