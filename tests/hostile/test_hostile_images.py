"""Damaged image files by the hundred: each gives the tensor that timm gives, or one line; nothing else happens.

`pytest tests/hostile/test_hostile_images.py` reads a few, `-m exhaustive` all. A mutant is named by its number, and the
same number is the same mutant wherever Pillow writes the same files.
"""

import hashlib
import io
import json
import resource
import struct
import subprocess
import sys
import time
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

FEW, ALL, TOGETHER = 60, 3000, 1000
ZEROS = zlib.compress(bytes(80_000_000))
SECONDS = 5.0  # for one mutant; a small picture takes a thousandth of that
KILOBYTES = 1_500_000  # on top of what torch takes, for all mutants of a process


def picture(rng: np.random.Generator) -> Image.Image:
    """A small picture of a random size and colour mode."""
    high, wide = rng.integers(1, 90, 2)
    mode = str(rng.choice(["L", "RGB", "RGBA", "P", "CMYK", "1", "LA"]))
    return Image.fromarray(rng.integers(0, 255, (high, wide, 3)).astype(np.uint8)).convert(mode)


def saved(rng: np.random.Generator) -> tuple[str, bytes]:
    """A good file and its format."""
    kind = str(rng.choice(["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"]))
    image = picture(rng)
    more: dict[str, object] = {}
    if kind in ("GIF", "WEBP") and rng.random() < 0.5:
        more = {"save_all": True, "append_images": [image.rotate(90, expand=False)]}
    if kind == "TIFF":
        more = {"compression": str(rng.choice(["raw", "tiff_lzw", "tiff_deflate", "packbits"]))}
    if kind == "JPEG":
        more = {"progressive": bool(rng.random() < 0.5)}
    takes = {"JPEG": ("L", "RGB", "CMYK"), "BMP": ("1", "L", "P", "RGB", "RGBA"), "PPM": ("1", "L", "RGB", "RGBA")}
    takes |= {"GIF": ("L", "P", "RGB"), "WEBP": ("RGB", "RGBA"), "TIFF": ("1", "L", "P", "RGB", "RGBA", "CMYK")}
    if image.mode not in takes.get(kind, ("1", "L", "LA", "P", "RGB", "RGBA")):
        image = image.convert("RGB")
        more.pop("append_images", None)
    stream = io.BytesIO()
    image.save(stream, kind, **more)
    return kind, stream.getvalue()


def flipped(rng: np.random.Generator, content: bytes) -> bytes:
    """Some bits turned over."""
    damaged = np.frombuffer(content, np.uint8).copy()
    places = rng.integers(0, len(damaged), int(rng.integers(1, 9)))
    damaged[places] ^= np.uint8(1) << rng.integers(0, 8, len(places)).astype(np.uint8)
    return damaged.tobytes()


def flipped_head(rng: np.random.Generator, content: bytes) -> bytes:
    """The same among the first bytes, where sizes and offsets lie."""
    return flipped(rng, content[:64]) + content[64:]


def truncated(rng: np.random.Generator, content: bytes) -> bytes:
    return content[: int(rng.integers(0, len(content)))]


def spliced(rng: np.random.Generator, content: bytes) -> bytes:
    """The head of one file on the body of another."""
    _, other = saved(rng)
    at = int(rng.integers(4, 80))
    return other[:at] + content[at:]


def lengthened(rng: np.random.Generator, content: bytes) -> bytes:
    """A number of four bytes, of either order, made absurd."""
    at = int(rng.integers(0, max(1, min(len(content), 200) - 4)))
    number = int(rng.choice([0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x10000, 50_000]))
    return content[:at] + struct.pack(str(rng.choice(["<I", ">I"])), number) + content[at + 4 :]


def repeated(rng: np.random.Generator, content: bytes) -> bytes:
    """A piece twice, or left out."""
    start, end = sorted(int(place) for place in rng.integers(0, len(content), 2))
    return content[:end] + content[start:] if rng.random() < 0.5 else content[:start] + content[end:]


def lying_png(rng: np.random.Generator, content: bytes) -> bytes:
    """A PNG of absurd size whose checksums are right, with data that unpack to much."""
    wide, high = (int(rng.choice([1, 40, 13_000, 50_000, 2**31 - 1])) for _ in range(2))
    deep, colour = int(rng.choice([1, 2, 4, 8, 16])), int(rng.choice([0, 2, 3, 4, 6]))

    def chunk(name: bytes, inside: bytes) -> bytes:
        return struct.pack(">I", len(inside)) + name + inside + struct.pack(">I", zlib.crc32(name + inside))

    text = chunk(b"zTXt", b"a\0\0" + ZEROS) if rng.random() < 0.3 else b""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", wide, high, deep, colour, 0, 0, int(rng.integers(0, 2))))
    body = chunk(b"IDAT", zlib.compress(bytes(2_000_000)))
    return b"\x89PNG\r\n\x1a\n" + head + text + body + chunk(b"IEND", b"")


MUTATIONS: tuple[Callable[[np.random.Generator, bytes], bytes], ...] = (
    *(flipped, flipped_head, truncated, spliced, lengthened, repeated, lying_png),
)


def mutant(number: int) -> tuple[str, bytes]:
    """Mutant `number`: what was done to which kind, and the file."""
    rng = np.random.default_rng(number)
    kind, content = saved(rng)
    mutation = MUTATIONS[number % len(MUTATIONS)]
    return f"{mutation.__name__} {kind}", mutation(rng, content)


def read_all(folder: Path) -> None:
    """Read the validation images of `folder`; print for each its name, tensor's hash, error, timm's hash and seconds.

    timm's is None where timm raises, and where growkit says that it goes another way than PIL.
    """
    import timm.data

    from growkit.pictures import FORMATS, LONGEST, UnreadablePictureError
    from growkit.train.data import open_data
    from growkit.train.settings import FitSettings

    def refuse(event: str, given: object) -> None:
        if event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect"):
            raise SystemExit(f"a picture started {event} {given}")

    def hash_of(tensor: torch.Tensor) -> str:
        return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()

    config = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.2,) * 3, "interpolation": "bicubic"}
    transform = timm.data.create_transform(**config)
    data = open_data(str(folder), {**config, "crop_pct": 0.875, "crop_mode": "center"}, FitSettings(color_jitter=0.0))
    sys.addaudithook(refuse)
    for place, (path, _) in enumerate(data.val.reader.samples):  # type: ignore[attr-defined]
        began, given, error, expected = time.perf_counter(), None, None, None
        try:
            given = hash_of(data.normalised(data.val[place][0][None])[0])
        except UnreadablePictureError as raised:
            error = str(raised)
        seconds = time.perf_counter() - began
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with Image.open(path) as image:
                    odd = image.mode[0] in "IF" or max(image.size) > LONGEST * min(image.size)
                    if not odd and (image.format in FORMATS or image.format == "MPO"):
                        expected = hash_of(transform(image.convert("RGB")))
        except Exception:  # whatever PIL raises, growkit must refuse
            pass
        print(json.dumps([Path(path).name, given, error, expected, seconds]), flush=True)


LONG = [pytest.param(range(at, at + TOGETHER), marks=pytest.mark.exhaustive) for at in range(0, ALL, TOGETHER)]


@pytest.mark.parametrize("numbers", [range(FEW), *LONG], ids=lambda numbers: f"{numbers[0]} to {numbers[-1]}")
def test_damaged_picture_is_read_as_timm_reads_it_or_refused_in_a_line(tmp_path: Path, numbers: range) -> None:
    for name in ("train/cat", "train/dog", "val/cat", "val/dog"):
        (tmp_path / name).mkdir(parents=True)
        Image.new("RGB", (9, 9)).save(tmp_path / name / "good.png")
    whats = {}
    for number in numbers:
        whats[f"{number}.jpg"], content = mutant(number)
        (tmp_path / "val" / "cat" / f"{number}.jpg").write_bytes(content)
    made = subprocess.run([sys.executable, __file__, str(tmp_path)], capture_output=True, text=True, timeout=600)
    lines = [json.loads(line) for line in made.stdout.splitlines()]
    assert made.returncode == 0, (len(lines), made.stderr[-2000:])
    assert len(lines) == len(numbers) + 3  # with the good ones and the memory
    for name, given, error, expected, seconds in lines[:-1]:
        assert given == expected, (name, whats.get(name), error)
        assert (given is None) == (error is not None), name
        if error is not None:
            assert f"/val/cat/{name}: not a readable picture (" in error, whats[name]
            assert error.isprintable(), whats[name]
        assert seconds < SECONDS, (name, whats.get(name))
    refused = sum(error is not None for _, _, error, *_ in lines[:-1])
    assert 0.2 * len(numbers) < refused < 0.9 * len(numbers)  # the mutations do damage, and not all of them
    assert lines[-1] < KILOBYTES
    assert "Traceback" not in made.stderr


if __name__ == "__main__":
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    read_all(Path(sys.argv[1]))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
