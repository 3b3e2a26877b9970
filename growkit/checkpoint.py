"""Read and write weights: checkpoints of every common kind, without running pickled code, and timm model folders."""

import argparse
import re
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.models import clean_state_dict, save_for_hf
from torch import Tensor, nn

from growkit.errors import GROWS, GrowkitError, first_line
from growkit.files import read_json, refuse_no_file, sha256_of, whole_files, without_folders, write_json, writing
from growkit.text import clipped, some

WEIGHTS, CONFIG, HISTORY, OPERATOR = (
    "model.safetensors",
    "config.json",
    "growkit.json",
    "operator.safetensors",
)
LARGEST_HISTORY, LONGEST_WORD = 64 * 2**20, 10_000  # bytes and characters; growkit.json stays below
EMA_KEYS = ("state_dict_ema", "model_ema")
PLAIN_KEYS = ("state_dict", "model", "model_state_dict", "module", "net")
WRAPPERS = ("model.", "backbone.", "module.", "_orig_mod.")  # prefixes by Lightning, DDP and torch.compile
PICKLED = "pytorch_model.bin"  # the weights file of model folders from before safetensors
STEM = "patch_embed.proj.weight"  # in every timm ViT, so its prefix shows where one lies
# How a model expects its images; passed on with the weights, from the source to the grown model.
PREPROCESSING = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")


@dataclass(frozen=True)
class Checkpoint:
    """Weights by checkpoint name, float32, and what else the file contained."""

    state: dict[str, Tensor] = field(repr=False)
    sha256: str
    config: dict[str, Any] | None  # timm's config.json, of a model folder
    history: dict[str, Any] | None  # growkit.json, where growkit wrote the folder
    notes: tuple[str, ...]  # for the user


def read_checkpoint(path: Path, *, ema: bool = True) -> Checkpoint:
    """Read a .pth/.pt/.bin, a .safetensors or a timm model folder.

    With `ema`, averaged weights are preferred where the file holds both, as in timm. If the file also holds other
    modules, such as a loss or a text tower, only the tensors of its ViT are taken, and a note says what was left out.

    Raises:
        GrowkitError: no such file, a folder that is not a model, a damaged file, a pickle that needs more than
            tensors (none of it is run), a file without weights, or one that claims to hold more than it does.
    """
    if not path.exists():
        raise GrowkitError(f"{path}: no such file or folder")
    if path.suffix.lower() == ".onnx" and path.is_file():
        raise GrowkitError(f"{path}: an ONNX file is not read back into a model; give the folder it was exported from")
    config, folder = None, path
    if path.is_dir():
        weights = next((path / name for name in (WEIGHTS, PICKLED) if (path / name).exists()), None)
        if not (path / CONFIG).exists() or weights is None:
            within = [path / stage for stage in ("finetuned", "grown", "trained") if (path / stage / WEIGHTS).exists()]
            remedy = f"give {within[0]}, the model in it" if within else f"expected {CONFIG} and {WEIGHTS} in it"
            if (onnx := path / "model.onnx").exists():
                remedy = f"evaluate takes {onnx}, other commands the model that it was exported from"
            raise GrowkitError(f"{path}: no model folder; {remedy}")
        config = read_json(path / CONFIG)
        if not isinstance(config, dict) or not isinstance(config.get("architecture"), str):
            if isinstance(config, dict) and isinstance(kind := config.get("model_type"), str):
                raise GrowkitError(f"{path / CONFIG}: of a Hugging Face {clipped(kind, 40)}, not of timm's; {GROWS}")
            raise GrowkitError(f"{path / CONFIG}: names no architecture; expected timm's config.json")
        path = weights
    refuse_no_file(path)
    raw, notes = _read_safetensors(path) if path.suffix.lower() == ".safetensors" else _read_torch(path, ema)
    raw.pop("n_averaged", None)  # how many torch's AveragedModel has seen
    odd = [str(key) for key, value in raw.items() if not isinstance(value, Tensor)]
    if odd or not raw:
        told = f" ({', '.join(odd[:3])}: no tensors)" if odd else ""
        raise GrowkitError(
            f"{path}: holds no weights{told}; expected a state dict or one under {', '.join(PLAIN_KEYS)}"
        )
    # DeiT III's layer scale gets timm's names
    timms = {re.sub(r"\.gamma_([12])$", r".ls\1.gamma", str(key)): value for key, value in raw.items()}
    named = _unwrapped(clean_state_dict(timms))
    if len(named) < len(raw):
        raise GrowkitError(f"{path}: holds weights of one name twice, with and without a prefix; save them once")
    state, left = _network(path, named)
    notes = (*notes, *left)
    for key, value in state.items():
        if key.endswith("num_batches_tracked"):
            raise GrowkitError(f"{path}: has batch norms ({key}); growkit grows timm's plain ViT and DeiT, without any")
        if not value.is_floating_point():
            raise GrowkitError(f"{path}: {key} is {value.dtype}; expected floating-point weights")
        stored = 0 if value.is_meta or value.layout is not torch.strided else value.untyped_storage().nbytes()
        if stored < value.numel() * value.element_size():
            raise GrowkitError(f"{path}: {key} of shape {tuple(value.shape)} is sparse or lacks values")
    if any(value.dtype is not torch.float32 for value in state.values()):
        kinds = sorted({str(value.dtype).removeprefix("torch.") for value in state.values()})
        notes = (*notes, f"weights are {', '.join(kinds)}; read as float32")
        state = {key: value.float() for key, value in state.items()}
    sha256 = sha256_of(path)
    history, said = (None, ()) if config is None else _read_history(folder / HISTORY, sha256)
    return Checkpoint(state, sha256, config, history, (*notes, *said))


def _read_history(path: Path, sha256: str) -> tuple[dict[str, Any] | None, tuple[str, ...]]:
    """Return growkit.json if it describes these weights, else None and a note for the user.

    It does not affect the weights, so a damaged one is no error.
    """
    if not path.exists():
        return None, ()
    try:
        content = read_json(path) if path.stat().st_size <= LARGEST_HISTORY else None
    except GrowkitError:
        content = None
    unknown = "was left out: where these weights come from is not known"
    if not isinstance(content, dict) or not _sound(content):
        return None, (f"{path} is damaged and {unknown}",)
    if content.get("weights_sha256", sha256) != sha256:
        return None, (f"{path} tells of other weights and {unknown}",)
    return content, ()


def _sound(value: object, levels: int = 16) -> bool:
    """Whether JSON is no deeper and its strings no longer than growkit writes, so that it can safely be passed on."""
    if isinstance(value, dict):
        return levels > 0 and all(_sound(key) and _sound(entry, levels - 1) for key, entry in value.items())
    if isinstance(value, list):
        return levels > 0 and all(_sound(entry, levels - 1) for entry in value)
    return not isinstance(value, str) or len(value) <= LONGEST_WORD


def _read_safetensors(path: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    try:
        return load_file(path), ()
    except (SafetensorError, OSError, ValueError) as error:
        raise GrowkitError(f"{path}: not readable as safetensors ({first_line(error, 200)})") from None


def _read_torch(path: Path, ema: bool) -> tuple[dict[str, Any], tuple[str, ...]]:
    with path.open("rb") as stream:
        start = stream.read(2)
    # torch.load takes any text for a pickle; say plainly that a Git LFS pointer or an error page is no checkpoint.
    if start != b"PK" and start[:1] != b"\x80":
        raise GrowkitError(f"{path}: not readable as a torch checkpoint (neither a zip archive nor a pickle)")
    packed = zipfile.is_zipfile(path)
    if start == b"PK" and not packed:
        raise GrowkitError(f"{path}: a zip archive without its end, so the file was cut short; fetch it again")
    if packed:
        _refuse_damaged(path)
    try:
        # DeiT's and timm's training checkpoints keep their options in a Namespace: data, no code.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            for told in (".*TorchScript archive", "Detected pickle protocol"):  # refused below, in one line
                warnings.filterwarnings("ignore", told)
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=packed)
    except Exception as error:  # torch raises a dozen kinds for broken files
        if "weights_only" in str(error) or "Unsupported" in str(error):
            raise GrowkitError(
                f"{path}: holds more than weights, and growkit runs no code from checkpoints; "
                "save its state_dict() alone, or as safetensors"
            ) from None
        raise GrowkitError(f"{path}: not readable as a torch checkpoint ({first_line(error, 200)})") from None
    if not isinstance(content, dict):
        raise GrowkitError(f"{path}: holds a {type(content).__name__}; expected a state dict")
    holding = [key for key, value in content.items() if isinstance(value, dict) and value]
    averaged = [key for key in EMA_KEYS if key in holding]
    plain = [key for key in PLAIN_KEYS if key in holding]
    if averaged and ema:
        other = f"; --no-ema takes {plain[0]!r}" if plain else ""
        return content[averaged[0]], (f"took the averaged (EMA) weights under {averaged[0]!r}{other}",)
    if plain:
        return content[plain[0]], ((f"took {plain[0]!r}, not {averaged[0]!r}",) if averaged else ())
    return content, ()


def _refuse_damaged(path: Path) -> None:
    """Raise GrowkitError if a zip archive is not as torch writes it, or its contents do not match their checksums.

    torch does not notice a flipped bit, and decompresses an archive however large it becomes.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            stored = all(member.compress_type == zipfile.ZIP_STORED for member in members)
            if not stored or sum(member.file_size for member in members) > path.stat().st_size:
                raise GrowkitError(f"{path}: a packed archive, which torch.save does not write; save it by torch.save")
            damaged = archive.testzip()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, RuntimeError, EOFError) as error:
        raise GrowkitError(f"{path}: not readable as a torch checkpoint ({first_line(error, 200)})") from None
    if damaged:
        raise GrowkitError(f"{path}: {damaged} does not match its checksum, so the file is damaged; fetch it again")


def _unwrapped(state: dict[str, Any]) -> dict[str, Any]:
    """Strip the wrapper prefixes that every name has."""
    while wrapper := next((w for w in WRAPPERS if state and all(key.startswith(w) for key in state)), None):
        state = {key.removeprefix(wrapper): value for key, value in state.items()}
    return state


def _network(path: Path, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Pick the ViT's tensors from a file that may also hold a loss or a text tower; with a note on what is left out.

    Raises:
        GrowkitError: the file holds several ViTs.
    """
    prefixes = [key.removesuffix(STEM) for key in state if key.endswith(f".{STEM}")]
    if STEM in state or not prefixes:
        return state, ()
    if len(prefixes) > 1:
        several = [prefix.rstrip(".") for prefix in prefixes]
        raise GrowkitError(f"{path}: holds several networks ({some(several)}); save the state_dict() of one")
    (prefix,) = prefixes
    own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    others = [key for key in state if not key.startswith(prefix)]
    left = f", and left out {some(others)}" if others else ""
    return own, (f"took the network under '{prefix.rstrip('.')}'{left}",)


def write_model(
    folder: Path,
    model: nn.Module,
    *,
    preprocessing: dict[str, Any],
    labels: Sequence[str] | None,
    history: dict[str, Any],
) -> None:
    """Write a timm model folder with growkit.json into the existing `folder` (see files.whole_folder).

    `timm.create_model("local-dir:FOLDER", pretrained=True)` loads it bit for bit.
    """
    extra: dict[str, Any] = {"pretrained_cfg": preprocessing}
    if labels:
        extra["label_names"] = list(labels)
    with _readable(folder / WEIGHTS):
        save_for_hf(model, str(folder), model_config=extra, safe_serialization=True)
    config = read_json(folder / CONFIG)
    # growkit.json says where the weights came from; timm's tag would name other weights.
    config["pretrained_cfg"].pop("tag", None)
    write_json(folder / CONFIG, config)
    told = without_folders({**history, "weights_sha256": sha256_of(folder / WEIGHTS)})
    write_json(folder / HISTORY, told)


def replace_model(folder: Path, model: nn.Module, **described: Any) -> None:
    """Like write_model, but into a folder in use: each file is swapped in whole, the weights last.

    So a folder that has weights is a complete model, even if the writer was killed.
    """
    with whole_files(folder, CONFIG, HISTORY, WEIGHTS) as staged:
        write_model(staged, model, **described)


def sha256_written(folder: Path) -> str:
    """SHA-256 of the weights that were just written into a model folder.

    Raises:
        UnwritableError: the folder is gone again.
    """
    with writing(folder / WEIGHTS):
        return sha256_of(folder / WEIGHTS)


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write plain tensors as safetensors."""
    with _readable(path):
        save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, path)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Give a file that safetensors writes the usual permissions of a new file; by itself it is owner-only."""
    path.touch()
    mode = path.stat().st_mode
    yield
    path.chmod(mode)
