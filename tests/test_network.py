"""Nothing is fetched unless a SOURCE says timm: or hf-hub:, and what is fetched from a hub is never unpickled."""

import hashlib
import json
import os
import re
import runpy
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from pairs import published_scale, tiny
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from growkit.errors import GrowkitError
from growkit.source import load_source

ROOT = Path(__file__).parents[1]
TO = ["--to", "vit_tiny", "--set", "embed_dim=64", "--set", "depth=3", "--set", "num_heads=4"]
QUICK = ["--data", "images", "--workers", "0", "--batch-size", "4"]
COMMANDS = [
    ["--help"],
    ["grow", "--help"],
    ["plan", "small", *TO],
    ["train", "vit_tiny", "--set", "img_size=16", "--set", "patch_size=8", "--set", "depth=1", "--steps", "1", *QUICK],
    ["grow", "small", *TO, *QUICK, "--steps", "1", "--force"],
    ["finetune", *QUICK, "--steps", "1"],
    ["export", "--onnx"],
    ["evaluate", *QUICK[:4], "--against", "run/grown"],
    ["verify", *QUICK[:4], "--no-latency", "--junit", "junit.xml"],
    ["report"],
]
ASKING = [
    ["plan", source, *TO] for source in ("timm:vit_tiny_patch16_224", "hf-hub:timm/vit_tiny_patch16_224.augreg_in21k")
]
# Ends the process at the first name that is looked up and the first address that is called, whichever library asks.
# Sockets between processes of this machine have no address. Those that ask do so in processes of their own.
PROGRAM = """
import glob, json, os, socket, sys

_, commands, asking = sys.argv

def listen(event, arguments):
    inner = event == "socket.connect" and arguments[0].family == socket.AF_UNIX
    if event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.connect", "socket.sendto") and not inner:
        os.write(2, f"NETWORK: {event} {arguments[1:]}\\n".encode())
        os._exit(77)

sys.addaudithook(listen)
from growkit_cli.main import main

def run(words):
    sys.argv = ["growkit", *words]
    try:
        main()
    except SystemExit as left:
        if left.code:
            sys.exit(f"{words} ended with {left.code}")

for words in json.loads(commands):
    run(words)
os.write(2, f"all done, {glob.glob(os.environ['HF_HOME'])} was cached\\n".encode())
for words in json.loads(asking):
    process = os.fork()
    if not process:
        run(words)
        os._exit(0)
    os.write(2, f"{words[1]} ended with {os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])}\\n".encode())
"""


def write_small(folder: Path) -> None:
    """A model folder."""
    arguments = {key: value for key, value in tiny(32, 2, 2).arguments.items() if key != "num_classes"}
    config = {"architecture": "vit_tiny_patch16_224", "model_args": arguments}
    model = published_scale(tiny(32, 2, 2))
    timm.models.save_for_hf(model, str(folder), model_config=config, safe_serialization=True)


def edit(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    content = json.loads(path.read_text())
    for key, value in changes.items():
        content[key] = {**content[key], **value} if isinstance(value, dict) else value
    path.write_text(json.dumps(content))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model whose config.json names addresses wherever timm looks for them, and images."""
    root = tmp_path_factory.mktemp("place")
    write_small(root / "small")
    address = "http://localhost:9/w.pth"
    asking = {"url": address, "hf_hub_id": "timm/vit_tiny", "hf_hub_filename": "x.bin", "source": "hf-hub"}
    edit(root / "small", pretrained=True, url=address, pretrained_cfg={**asking, "file": "/etc/passwd"})
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for label in ("cat", "dog", "elk"):
            (root / "images" / split / label).mkdir(parents=True)
            for number in range(2):
                pixels = generator.integers(0, 255, (16, 16, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(root / "images" / split / label / f"{number}.png")
    return root


def test_commands_ask_the_network_for_nothing_and_what_asks_is_seen_to_ask(place: Path) -> None:
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "cli")))
    environment = {**os.environ, "PYTHONPATH": paths, "HF_HOME": str(place / "hub"), "TORCH_HOME": str(place / "torch")}
    environment["OMP_NUM_THREADS"] = "1"  # more than one do not outlive a fork
    for name in ("HF_HUB_OFFLINE", "HF_ENDPOINT"):
        environment.pop(name, None)
    words = [sys.executable, "-c", PROGRAM, json.dumps(COMMANDS), json.dumps(ASKING)]
    run = {"cwd": place, "env": environment, "capture_output": True, "text": True}
    said = subprocess.run(words, **run, check=False, timeout=600).stderr  # one that does ask may wait for long
    quiet, done, asking = said.partition("all done, [] was cached\n")
    assert done, said
    assert "NETWORK" not in quiet
    assert (place / "run" / "report.html").is_file()
    for words in ASKING:
        assert re.search(rf"NETWORK: socket\..*\n{words[1]} ended with 77\n", asking), asking


@pytest.mark.parametrize(
    ("name", "classes"),
    [
        ("vit_tiny_patch16_224.augreg_in21k_ft_in1k", 1000),
        ("vit_tiny_patch16_224.augreg_in21k", 21843),
        ("vit_small_patch16_224.dino", 0),
    ],
)
def test_published_weights_of_any_tag_are_loaded_with_the_classes_they_have(
    name: str, classes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """timm as it is, but that the weights are random in place of fetched."""
    create = timm.create_model

    def unfetched(model: str, pretrained: bool = False, **arguments: object) -> nn.Module:
        if pretrained:
            torch.manual_seed(seed)
        return create(model, **arguments)

    seed = 0

    monkeypatch.setattr("growkit.source.timm.create_model", unfetched)
    source = load_source(f"timm:{name}")
    assert source.architecture.classes == classes
    assert source.model().num_classes == classes
    assert load_source(f"timm:{name}").sha256 == source.sha256 != ""
    seed = 1  # other weights
    assert load_source(f"timm:{name}").sha256 != source.sha256


@pytest.mark.parametrize(
    "arguments",
    [
        {"pretrained": True},
        {"pretrained": True, "pretrained_cfg": {"url": "http://localhost:9/w.pth", "hf_hub_id": None}},
        {"pretrained_cfg": {"file": "w.pth"}},
        {"checkpoint_path": "w.pth"},
        {"pretrained_cfg_overlay": {"hf_hub_id": "a/b"}},
        {"cache_dir": "cache"},
    ],
    ids=lambda arguments: " ".join(arguments),
)
def test_arguments_that_make_timm_fetch_or_read_are_refused(
    arguments: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("socket.getaddrinfo", lambda *_: pytest.fail("asked the network"))
    write_small(tmp_path / "small")
    edit(tmp_path / "small", model_args=arguments)
    with pytest.raises(GrowkitError, match="is no argument of a VisionTransformer"):
        load_source(str(tmp_path / "small"))


def test_onnx_runtime_is_told_to_report_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[bool] = []
    monkeypatch.setattr("onnxruntime.disable_telemetry_events", lambda: told.append(True))
    runpy.run_path(str(ROOT / "growkit" / "deploy" / "runtime.py"))
    assert told == [True]


# --- hf-hub:


class Hub(ThreadingHTTPServer):
    """A hub on this machine that serves the files of a folder as those of any repository."""

    COMMIT = "c0" * 20

    def __init__(self, folder: Path):
        self.folder, self.asked = folder, set[str]()
        super().__init__(("127.0.0.1", 0), Answer)


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        path = self.path.partition("?")[0]
        self.server.asked.add(path)
        file = self.server.folder / Path(path).name
        data = file.read_bytes() if file.is_file() else b"no such file"
        self.send_response(200 if file.is_file() else 404)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("X-Repo-Commit", Hub.COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        if not file.is_file():
            self.send_header("X-Error-Code", "EntryNotFound")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    do_GET = do_HEAD  # noqa: N815

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The hub that huggingface_hub asks, with a model of growkit's own making in it."""
    write_small(tmp_path / "served")
    edit(tmp_path / "served", label_names=["a", "b", "c", "d", "e"])
    server = Hub(tmp_path / "served")
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    here = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", here)
    template = here + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield server
    server.shutdown()
    server.server_close()


def test_model_of_a_hub_is_what_its_folder_is(hub: Hub) -> None:
    got, wanted = load_source("hf-hub:owner/name"), load_source(str(hub.folder))
    assert got.path == "hf-hub:owner/name"
    assert got.sha256 == hashlib.sha256((hub.folder / "model.safetensors").read_bytes()).hexdigest()
    assert (got.labels, got.architecture, got.preprocessing) == (
        wanted.labels,
        wanted.architecture,
        wanted.preprocessing,
    )
    stored = load_file(hub.folder / "model.safetensors")
    assert all(torch.equal(got.state[name], tensor) for name, tensor in stored.items())
    at = f"/owner/name/resolve/{Hub.COMMIT}/"
    assert hub.asked == {"/owner/name/resolve/main/config.json", f"{at}model.safetensors"}


def test_revision_is_asked_for(hub: Hub) -> None:
    load_source("hf-hub:owner/name@v1.2")
    assert "/owner/name/resolve/v1.2/config.json" in hub.asked


@pytest.mark.parametrize("missing", ["model.safetensors", "config.json"])
def test_pickles_of_a_hub_are_not_even_fetched(missing: str, hub: Hub) -> None:
    (hub.folder / missing).unlink()
    for name in ("pytorch_model.bin", "model.pth"):
        (hub.folder / name).write_bytes(b"\x80\x04cos\nsystem\n(S'touch ran'\ntR.")
    with pytest.raises(GrowkitError, match=r"no config.json and model.safetensors to be fetched") as caught:
        load_source("hf-hub:owner/name")
    assert "\n" not in str(caught.value)
    assert not [path for path in hub.asked if path.endswith((".bin", ".pth"))]


def test_hostile_config_of_a_hub_is_refused_as_that_of_a_folder(hub: Hub) -> None:
    edit(hub.folder, model_args={"pretrained": True})
    with pytest.raises(GrowkitError, match="is no argument of a VisionTransformer"):
        load_source("hf-hub:owner/name")


@pytest.mark.parametrize("source", ["hf-hub:owner/name", "timm:vit_tiny_patch16_224"])
def test_source_that_cannot_be_fetched_is_told_in_whole_sentences(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(GrowkitError, match=r"\(.* the local cache\); give a downloaded file instead$"):
        load_source(source)


@pytest.mark.parametrize("name", ["", "../../etc", "a/b/c", "owner/na me"])
def test_name_that_is_none_is_one_line(name: str, hub: Hub) -> None:
    with pytest.raises(GrowkitError, match="give a downloaded file instead"):
        load_source(f"hf-hub:{name}")
    assert hub.asked == set()
