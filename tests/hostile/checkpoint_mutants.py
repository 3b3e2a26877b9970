"""Checkpoints and model folders that somebody damaged, or made to do harm; each by a name that makes it again."""

import argparse
import io
import json
import os
import pickle
import random
import shutil
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

State = dict[str, Tensor]
Mutate = Callable[[Path, random.Random], None]  # writes one source into an empty folder, under the name `SOURCE`
SOURCE = "source"
CANARY = "canary"  # what a pickle that runs would make, in the working directory
FORMATS = ("zip.pth", "legacy.pth", "wrapped.pth", "plain.safetensors")
HUGE = 10**12


def write(state: Mapping[str, Any], path: Path, kind: str) -> None:
    """A checkpoint of one of FORMATS."""
    if kind == "plain.safetensors":
        save_file(dict(state), path)
    elif kind == "legacy.pth":
        torch.save(dict(state), path, _use_new_zipfile_serialization=False)
    elif kind == "wrapped.pth":
        torch.save({"model": dict(state), "epoch": 3, "args": argparse.Namespace(lr=0.1)}, path)
    else:
        torch.save(dict(state), path)


def damaged(data: bytes, how: str, rng: random.Random) -> bytes:
    """Bytes cut short, flipped, taken out, put in or overwritten, at the front, where headers are, half of the time."""
    at = rng.randrange(min(len(data), 600)) if rng.random() < 0.5 else rng.randrange(len(data))
    if how == "cut":
        return data[:at]
    if how == "flip":
        changed = bytearray(data)
        for _ in range(rng.choice((1, 1, 8))):
            changed[rng.randrange(at, min(at + 64, len(data)))] ^= 1 << rng.randrange(8)
        return bytes(changed)
    size = rng.choice((1, 4, 64))
    if how == "out":
        return data[:at] + data[at + size :]
    filler = bytes(size) if how == "zero" else rng.randbytes(size)
    return data[:at] + filler + data[at + (size if how == "zero" else 0) :]


class Runs:
    """Pickles as a call of `function`."""

    def __init__(self, function: Any, *arguments: Any):
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def gadgets() -> dict[str, Any]:
    """Objects whose unpickling would make the canary."""
    import builtins
    import runpy
    import subprocess

    touch, code = f"touch {CANARY}", f"open({CANARY!r}, 'w').close()"
    rebuild = torch._utils._rebuild_tensor_v2
    return {
        "os.system": Runs(os.system, touch),
        "os.popen": Runs(os.popen, touch),
        "eval": Runs(builtins.eval, code),
        "exec": Runs(builtins.exec, code),
        "subprocess": Runs(subprocess.call, ["touch", CANARY]),
        "runpy": Runs(runpy.run_path, "code.py"),
        "open": Runs(open, CANARY, "w"),
        "getattr": Runs(getattr, Runs(__import__, "os"), "system"),
        "torch.load": Runs(torch.load, "evil.pth", "cpu", None, False),
        "mkdir": Runs(os.mkdir, CANARY),
        "Namespace": Runs(argparse.Namespace, Runs(os.system, touch)),
        "rebuilt of nothing": Runs(rebuild, "no storage", 0, (4,), (1,), False, {}),
        "rebuilt of a command": Runs(rebuild, Runs(os.system, touch), 0, (4,), (1,), False, {}),
        "partial": Runs(__import__("functools").partial, os.system, touch),
    }


def safetensors(header: Any, body: bytes = bytes(64), length: int | None = None) -> bytes:
    """A file of the format, with a header that may lie; `length` is what it says of its own."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def entry(shape: Any = (4,), offsets: Any = (0, 16), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def headers() -> dict[str, bytes]:
    """Safetensors headers that lie."""
    one = entry()
    return {
        "says 2^64 - 1": safetensors({"a": one}, length=2**64 - 1),
        "says 10 GB": safetensors({"a": one}, length=10**10),
        "says 0": safetensors({"a": one}, length=0),
        "overlapping": safetensors({"a": one, "b": entry(offsets=(8, 24))}),
        "gap": safetensors({"a": one, "b": entry(offsets=(32, 48))}),
        "backwards": safetensors({"a": entry(offsets=(16, 0))}),
        "beyond": safetensors({"a": entry(shape=(HUGE,), offsets=(0, 4 * HUGE))}),
        "product overflows": safetensors({"a": entry(shape=(2**32, 2**32), offsets=(0, 0))}),
        "negative": safetensors({"a": entry(shape=(-4,))}),
        "a thousand axes": safetensors({"a": entry(shape=(1,) * 1000, offsets=(0, 4))}),
        "unknown type": safetensors({"a": entry(dtype="F31")}),
        "float8": safetensors({"a": entry(shape=(16,), dtype="F8_E4M3")}, bytes(16)),
        "two alike": safetensors(b'{"a":' + json.dumps(one).encode() + b',"a":' + json.dumps(one).encode() + b"}"),
        "a list": safetensors([1, 2]),
        "deep": safetensors(b"[" * 100_000 + b"]" * 100_000),
        "no json": safetensors(b"\xff\xfe{"),
        "metadata of numbers": safetensors({"__metadata__": {"a": 1}, "a": one}),
    }


def bombs() -> dict[str, Callable[[Path, State], None]]:
    """Archives that are small and say or become large."""

    def inflated(path: Path, state: State) -> None:
        """Stored as torch never stores: a member of zeros that inflates to 1.5 GB, more than a command gets here."""
        plain, zeros = io.BytesIO(), bytes(10_000_000)
        torch.save(state, plain)
        with zipfile.ZipFile(plain) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as new:
            for member in old.namelist():
                if member.endswith("data/0"):
                    with new.open(member, "w", force_zip64=True) as stream:
                        for _ in range(150):
                            stream.write(zeros)
                else:
                    new.writestr(member, old.read(member))

    def many(path: Path, state: State) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            for number in range(20_000):
                archive.writestr(f"archive/data/{number}", b"")

    def deep(path: Path, state: State) -> None:
        nested: Any = dict(state)
        for _ in range(150):
            nested = {"model": nested}
        torch.save(nested, path)

    def pickled(path: Path, state: State) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", b"\x80\x02" + b"(" * 3_000_000 + b".")
            archive.writestr("archive/version", b"3\n")

    def doubled(path: Path, state: State) -> None:
        """A billion laughs: a list of two of the one before, thirty deep."""
        laughs: Any = ["ha"]
        for _ in range(30):
            laughs = [laughs, laughs]
        torch.save({"model": dict(state), "laughs": laughs}, path)

    return {"inflated": inflated, "many members": many, "deep": deep, "marks": pickled, "laughs": doubled}


def states(state: State) -> dict[str, dict[Any, Any]]:
    """State dicts that are no weights of a ViT, or odd ones."""
    first = "blocks.0.attn.qkv.weight"
    weight = state[first]

    def with_first(value: Any) -> dict[Any, Any]:
        return {**state, first: value}

    kinds = {str(kind).removeprefix("torch."): with_first(weight.to(kind)) for kind in KINDS}
    tokens = torch.zeros(1).expand(1, 10**9, 16)
    blocks = {key: tensor for key, tensor in state.items() if key.startswith("blocks.0.")}
    many = {key.replace("blocks.0.", f"blocks.{n}."): tensor for n in range(2, 300) for key, tensor in blocks.items()}
    return {
        **kinds,
        "stride 0, a trillion": with_first(torch.zeros(1).expand(10**6, 10**6)),
        "stride 0, pos_embed": {**state, "pos_embed": tokens},
        "stride 0, head": {**state, "head.weight": torch.zeros(1).expand(10**9, 16), "head.bias": torch.zeros(10)},
        "stride 0, stem": {**state, "patch_embed.proj.weight": torch.zeros(1).expand(10**6, 3, 8, 8)},
        "stride 0, fc1": {**state, "blocks.0.mlp.fc1.weight": torch.zeros(1).expand(10**9, 16)},
        "stride 0, registers": {**state, "reg_token": torch.zeros(1).expand(1, 10**9, 16)},
        "strided": {key: torch.stack([tensor, tensor], -1)[..., 0] for key, tensor in state.items()},
        "transposed": with_first(weight.T.contiguous().T),
        "shared": {**state, "blocks.1.attn.qkv.weight": state[first]},
        "empty": with_first(torch.empty(0, 16)),
        "scalar": with_first(torch.zeros(())),
        "sixty axes": with_first(torch.zeros((1,) * 60)),
        "sparse": with_first(weight.to_sparse()),
        "nested": with_first({"weight": weight}),
        "none": with_first(None),
        "NaN": with_first(weight * torch.nan),
        "infinite": with_first(torch.full_like(weight, torch.inf)),
        "huge": with_first(torch.full_like(weight, 3e38)),
        "huge in float64": {key: tensor.double() * 1e300 for key, tensor in state.items()},
        "missing": {key: tensor for key, tensor in state.items() if key != first},
        "a layer missing": {key: tensor for key, tensor in state.items() if not key.startswith("blocks.0.")},
        "layers of other names": {key.replace("blocks.1", "blocks.x"): tensor for key, tensor in state.items()},
        "layer 1e18": {key.replace("blocks.1", f"blocks.{10**18}"): tensor for key, tensor in state.items()},
        "three hundred layers": {**state, **many},
        "a layer's name alone": {**state, "blocks.": weight},
        "extra": {**state, "extra.weight": weight},
        "path": {**state, "../../../etc/passwd": weight},
        "zero": {**state, "a\x00b": weight},
        "long": {**state, "x" * 10_000: weight},
        "escapes": {**state, "\x1b[2J\x1b[31mowned\r\n": weight},
        "markup": {**state, "[red]owned[/red] [link=http://a]b[/link]": weight},
        "unicode": {**state, "\u202egnp.exe\u2066": weight},
        "numbers": dict(enumerate(state.values())),
        "prefixed": {f"module.{key}": tensor for key, tensor in state.items()},
        "twice": {**{f"module.{key}": tensor * 2 for key, tensor in state.items()}, **state},
        "an optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]},
        "nothing": {},
        "tensors of bits": {key: tensor.view(torch.int32) for key, tensor in state.items()},
        "Swin": {"layers.0.blocks.0.attn.relative_position_bias_table": weight},
    }


KINDS = (
    torch.int64,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.complex64,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
)


def configs(good: Mapping[str, Any]) -> dict[str, bytes]:
    """config.json files that name something else, or too much of it."""
    arguments = good["model_args"]

    def text(**changed: Any) -> bytes:
        return json.dumps({**good, **changed}).encode()

    def args(**changed: Any) -> bytes:
        return text(model_args={**arguments, **changed})

    def prepared(**changed: Any) -> bytes:
        return text(pretrained_cfg={**good["pretrained_cfg"], **changed})

    names = (
        "/etc/passwd",
        "hf-hub:a/b",
        "local-dir:.",
        "../..",
        "resnet18",
        "",
        "vit" * 9999,
        "\x1b[2Jvit",
        "os.system",
    )
    sizes = {
        key: args(**{key: size})
        for key in ("depth", "embed_dim", "num_heads", "reg_tokens", "patch_size", "in_chans", "mlp_ratio", "img_size")
        for size in (10**9,)
    }
    odd = (-1, 0, 1.5, "many", None, [1, 2], {"a": 1}, True, 1e308)
    wrong = {f"{key} {value}": args(**{key: value}) for key in ("depth", "embed_dim", "img_size") for value in odd}
    code = {
        key: args(**{key: value})
        for key, value in (
            ("embed_layer", "os.system"),
            ("block_fn", "builtins.eval"),
            ("norm_layer", "subprocess"),
            ("act_layer", "__import__"),
            ("mlp_layer", "x"),
            ("attn_layer", "x"),
            ("weight_init", "skip"),
            ("checkpoint_path", "evil.pth"),
            ("pretrained", True),
            ("pretrained_cfg_overlay", {"file": "evil.pth"}),
            ("cache_dir", "/"),
            ("device", "cuda:99"),
            ("dtype", "float8"),
            ("scriptable", True),
            ("features_only", True),
            ("no_such", 1),
        )
    }
    means = ([0.5], [0.5] * 4, ["a"] * 3, [float("nan")] * 3, None, {}, 0.5, [[0.5]] * 3, [1e999] * 3)
    return {
        **{f"name {name[:12]!r}": text(architecture=name) for name in names},
        **{f"{key} 1e9": value for key, value in sizes.items()},
        **wrong,
        **code,
        **{f"mean {value}": prepared(mean=value) for value in means},
        **{f"std {value}": prepared(std=value) for value in (*means, [0.0] * 3, [-1.0] * 3)},
        **{f"interpolation {value}": prepared(interpolation=value) for value in ("evil", 7, None, "[red]")},
        **{f"input_size {value}": prepared(input_size=value) for value in ([3, 10**9, 10**9], "x", None, [1])},
        **{f"crop_pct {value}": prepared(crop_pct=value) for value in (0, -1, 1e9, "x", float("nan"))},
        "url": prepared(url="http://127.0.0.1:9/evil.pth", hf_hub_id="a/b", file="evil.pth", custom_load=True),
        "num_classes 1e10": text(num_classes=10**10),
        "num_classes x": text(num_classes="x"),
        "labels of numbers": text(label_names=[1, None, {}, []]),
        "labels with escapes": text(label_names=["\x1b[2J", "<script>", "[red]", "a\nb", "\x00", "\u202e", "e"]),
        "a million labels": text(label_names=["a"] * 10**6),
        "labels no list": text(label_names={"a": 1}),
        "no json": b"{",
        "a list": b"[]",
        "a number": b"7",
        "no text": b"\xff\xfe\x00",
        "empty": b"",
        "deep": b'{"architecture":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        "a long number": b'{"architecture": "vit_tiny_patch16_224", "num_classes": ' + b"9" * 10_000 + b"}",
        "infinite": b'{"architecture": "vit_tiny_patch16_224", "num_classes": Infinity}',
        "two alike": b'{"architecture": "vit_tiny_patch16_224", ' + json.dumps(good).encode()[1:],
        "args no object": text(model_args=[1]),
        "cfg no object": text(pretrained_cfg=[1]),
        "cfg a word": text(pretrained_cfg="word"),
    }


def histories() -> dict[str, bytes]:
    """growkit.json files of somebody else."""
    return {
        "a list": b"[1, 2]",
        "a word": b'"word"',
        "deep": b"[" * 100_000 + b"]" * 100_000,
        "10 MB": json.dumps({"stage": "x" * 10_000_000}).encode(),
        "no json": b"{",
        "not text": b"\xff\x00",
        "ancestors of words": json.dumps({"stage": "grown", "ancestors": ["a", 1, None, {"sha256": [1]}]}).encode(),
        "markup": json.dumps({"stage": "\x1b[2J[red]<script>", "source": {"name": "../../x"}, "settings": []}).encode(),
        "numbers": json.dumps({"stage": 7, "fit": {"flops": 1e999, "steps": "x"}}).encode(),
    }


def files(state: State, folder: Path, seed: int, rounds: int) -> dict[str, Mutate]:
    """All mutants, by name. `folder` is a model folder of the same weights; `rounds` of random damage."""
    found: dict[str, Mutate] = {}

    def of_bytes(name: str, suffix: str, data: bytes) -> None:
        found[name] = lambda place, rng: (place / f"{SOURCE}{suffix}").write_bytes(data) and None

    for kind in FORMATS:
        for number in range(rounds):
            for how in ("cut", "flip", "out", "in", "zero"):

                def damage(place: Path, rng: random.Random, kind: str = kind, how: str = how) -> None:
                    path = place / f"{SOURCE}{Path(kind).suffix}"
                    write(state, path, kind)
                    path.write_bytes(damaged(path.read_bytes(), how, rng))

                found[f"{kind} {how} {number}"] = damage
        of_bytes(f"{kind} empty", Path(kind).suffix, b"")
        of_bytes(f"{kind} a page", Path(kind).suffix, b"<html>not found</html>")
    for name, data in headers().items():
        of_bytes(f"header {name}", ".safetensors", data)
    for name, odd in states(state).items():
        for kind in ("zip.pth", "legacy.pth"):
            found[f"{kind} of {name}"] = lambda place, rng, odd=odd, kind=kind: write(
                odd, place / f"{SOURCE}.pth", kind
            )
    for name, bomb in bombs().items():
        found[f"bomb {name}"] = lambda place, rng, bomb=bomb: bomb(place / f"{SOURCE}.pth", state)
    for name, gadget in gadgets().items():

        def armed(place: Path, rng: random.Random, gadget: Any = gadget, where: str = "model") -> None:
            (place.parent / "code.py").write_text(f"open({CANARY!r}, 'w').close()")
            torch.save({"model": dict(state), "extra": gadget}, place / f"{SOURCE}.pth")

        def bare(place: Path, rng: random.Random, gadget: Any = gadget) -> None:
            (place / f"{SOURCE}.pth").write_bytes(pickle.dumps(gadget, protocol=2))

        found[f"gadget {name}"] = armed
        found[f"bare gadget {name}"] = bare
    good = json.loads((folder / "config.json").read_text())
    for changed, texts in (("config.json", configs(good)), ("growkit.json", histories())):
        for name, data in texts.items():

            def config(place: Path, rng: random.Random, data: bytes = data, changed: str = changed) -> None:
                shutil.copytree(folder, place / SOURCE)
                (place / SOURCE / changed).write_bytes(data)

            found[f"{changed} {name}"] = config
    found |= places(folder)
    return found


def places(folder: Path) -> dict[str, Mutate]:
    """What is no file where one should be, and links that lead elsewhere."""

    def linked(target: str, name: str) -> Mutate:
        def make(place: Path, rng: random.Random) -> None:
            shutil.copytree(folder, place / SOURCE)
            (place / SOURCE / name).unlink()
            (place / SOURCE / name).symlink_to(target)

        return make

    def pipe(name: str) -> Mutate:
        def make(place: Path, rng: random.Random) -> None:
            shutil.copytree(folder, place / SOURCE)
            (place / SOURCE / name).unlink()
            os.mkfifo(place / SOURCE / name)

        return make

    def folded(name: str) -> Mutate:
        def make(place: Path, rng: random.Random) -> None:
            shutil.copytree(folder, place / SOURCE)
            (place / SOURCE / name).unlink()
            (place / SOURCE / name).mkdir()

        return make

    made: dict[str, Mutate] = {}
    for name in ("model.safetensors", "config.json", "growkit.json"):
        for target in ("nowhere", name, "/dev/zero", "/etc/hostname", "../../.."):
            made[f"{name} links to {target}"] = linked(target, name)
        made[f"{name} a pipe"] = pipe(name)
        made[f"{name} a folder"] = folded(name)
    for suffix in (".pth", ".safetensors"):
        made[f"{suffix} a pipe"] = lambda place, rng, suffix=suffix: os.mkfifo(place / f"{SOURCE}{suffix}")
        made[f"{suffix} links to itself"] = lambda place, rng, suffix=suffix: (place / f"{SOURCE}{suffix}").symlink_to(
            f"{SOURCE}{suffix}"
        )
        made[f"{suffix} links to zeros"] = lambda place, rng, suffix=suffix: (place / f"{SOURCE}{suffix}").symlink_to(
            "/dev/zero"
        )
    made["an empty folder"] = lambda place, rng: (place / SOURCE).mkdir()
    return made
