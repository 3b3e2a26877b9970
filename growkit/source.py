"""Load SOURCE and MODEL arguments, a file, a model folder, timm:NAME or hf-hub:OWNER/NAME, as a Source."""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_model_data_config
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from growkit.arch import build, detect, find, parse_sets
from growkit.arch.spec import Architecture
from growkit.checkpoint import CONFIG, PREPROCESSING, WEIGHTS, read_checkpoint
from growkit.errors import GrowkitError, first_line
from growkit.seeds import random_kept
from growkit.settings import Loading

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
CROP_MODES = ("center", "squash", "border")
TIMM, HUB = "timm:", "hf-hub:"
FETCHED = (TIMM, HUB)  # only names with these prefixes are fetched from the network


AS_IT_IS = Loading()


@dataclass(frozen=True)
class Source:
    """A loaded model: its architecture, its weights, and what to tell the user about it."""

    path: str
    architecture: Architecture
    state: dict[str, Tensor] = field(repr=False)
    sha256: str  # of the weights file, for timm:NAME of the tensors; empty for random weights
    preprocessing: dict[str, Any]  # input_size, mean, std, interpolation, crop_pct, crop_mode
    labels: tuple[str, ...] | None
    history: dict[str, Any] | None  # growkit.json, where growkit wrote it
    notes: tuple[str, ...]
    adapted: tuple[str, ...] = ()  # what was changed to make it fit (see adapt.py), one line each
    loading: Loading = AS_IT_IS  # how it was loaded
    own_head: bool = True  # False: its classifier is new, and its predictions mean nothing before training

    def model(self) -> VisionTransformer:
        """The timm network with these weights: float32, eval mode, its own preprocessing in pretrained_cfg."""
        model = build(self.architecture.name, self.architecture.arguments, device="meta")
        # contiguous, as safetensors writes; a network trained channels-last was saved in another layout
        state = {name: value.clone(memory_format=torch.contiguous_format) for name, value in self.state.items()}
        model.load_state_dict(state, assign=True)
        model.pretrained_cfg = {**model.pretrained_cfg, **self.preprocessing}
        return model.eval()


def load_source(
    path: str | Path, loading: Loading = AS_IT_IS, *, say: Callable[[str], None] = lambda line: None
) -> Source:
    """Load a .pth/.pt, a .safetensors, a model folder, `timm:NAME` or `hf-hub:OWNER/NAME[@REVISION]`.

    `say` gets the source's notes: how its architecture was recognized, which of several weights were taken.

    Raises:
        GrowkitError: the file cannot be read safely, or its weights fit no known architecture.
    """
    source = replace(_load(str(path), loading), loading=loading)
    for note in source.notes:
        say(note)
    return source


def _load(path: str, loading: Loading) -> Source:
    told = loading.from_ or loading.from_set
    if path.startswith(TIMM):
        if told:
            raise GrowkitError(f"{path}: its name is its architecture; --from and --from-set are for bare checkpoints")
        return _load_timm(path)
    if path.startswith(HUB):
        return replace(_load(str(_from_hub(path)), loading), path=path)
    _refuse_name(path)
    checkpoint = read_checkpoint(Path(path), ema=loading.ema)
    if checkpoint.config is not None:
        config = checkpoint.config
        name, arguments = config["architecture"], config.get("model_args") or {}
        if not isinstance(arguments, dict):
            raise GrowkitError(f"{path}: model_args in its config.json is no object; expected timm's config.json")
        arguments = dict(arguments)
        if isinstance(size := arguments.get("img_size"), list) and len(set(size)) == 1:
            arguments["img_size"] = size[0]
        if told:
            raise GrowkitError(
                f"{path}: its config.json names the architecture; --from and --from-set are for bare checkpoints"
            )
        with _about(path):
            architecture = find(name, {"num_classes": config.get("num_classes", 1000), **arguments})
            architecture.check(checkpoint.state)
        described = config.get("pretrained_cfg", config) or {}  # older timm wrote it all as one object
        given = _prepared_as(path, described)
        # timm moves the names of a folder that it loaded and wrote again
        labels = config.get("label_names") or described.get("label_names") or described.get("labels")
        notes = checkpoint.notes
        if isinstance(labels, list) and len(labels) != architecture.classes:
            said = f"its {len(labels)} class names were left out: its head has {architecture.classes} classes"
            labels, notes = None, (*notes, said)
    else:
        with _about(path):
            architecture, how = detect(
                checkpoint.state, hint=Path(path).stem, name=loading.from_, sets=loading.from_set or ()
            )
        given, labels, notes = {}, None, (*checkpoint.notes, f"source is {how}")
    return Source(
        path=path,
        architecture=architecture,
        state=checkpoint.state,
        sha256=checkpoint.sha256,
        preprocessing=_preprocessing(architecture, given),
        labels=tuple(map(str, labels)) if isinstance(labels, list) else None,
        history=checkpoint.history,
        notes=notes,
    )


def _refuse_name(path: str) -> None:
    """Refuse what is no file but named as weights that timm publishes; another missing file is left to who reads it."""
    given, name = Path(path), None
    if not given.exists():
        with suppress(GrowkitError):
            names = (given.name, given.stem, find(given.name).name)  # with its tag, where it has one
            name = next(filter(timm.is_model_pretrained, names), None)
    if name:
        raise GrowkitError(f"{path}: no such file or folder; {TIMM}{name} fetches the weights that timm publishes")


@contextmanager
def _about(path: str) -> Iterator[None]:
    """Name the file in errors about what it holds."""
    try:
        yield
    except GrowkitError as error:
        raise GrowkitError(f"{path}: {error}") from None


def fresh(name: str, sets: Sequence[str], labels: Sequence[str], *, seed: int) -> Source:
    """Build a network with timm's random weights, for training from scratch.

    Raises:
        GrowkitError: unknown name or argument.
    """
    architecture, preprocessing = named(name, sets, len(labels))
    state = untrained(architecture, seed=seed)
    return Source(name, architecture, state, "", preprocessing, tuple(labels), None, ())


def named(name: str, sets: Sequence[str], classes: int = 1) -> tuple[Architecture, dict[str, Any]]:
    """Return the named architecture and its preprocessing; it has `classes` classes unless `sets` says otherwise.

    Raises:
        GrowkitError: unknown name or argument.
    """
    find(name)  # another family's arguments would look like typing errors
    architecture = find(name, {"num_classes": classes, **parse_sets(sets)})
    return architecture, _preprocessing(architecture, {})


def untrained(architecture: Architecture, *, seed: int) -> dict[str, Tensor]:
    """Return timm's random weights, the same for the same seed."""
    with random_kept():
        torch.default_generator.manual_seed(seed)
        return build(architecture.name, architecture.arguments).state_dict()


def _load_timm(path: str) -> Source:
    name = path.removeprefix(TIMM)
    plain = find(name).name
    _ask_quietly()
    try:
        # a tag, as in deit_small_patch16_224.fb_in1k, selects among published weights
        model = timm.create_model(name if "." in name else plain, pretrained=True)
    except Exception as error:  # the hub's client raises many kinds
        reason = first_line(error, 160)
        raise GrowkitError(f"{path}: cannot be fetched ({reason}); give a downloaded file instead") from None
    architecture = find(name, {"num_classes": model.num_classes})  # a tag may have others, or no head
    config = {key: value for key, value in model.pretrained_cfg.items() if key in PREPROCESSING}
    state = model.state_dict()
    architecture.check(state)
    return Source(
        path=path,
        architecture=architecture,
        state=state,
        sha256=_digest(state),
        preprocessing=_preprocessing(architecture, config),
        labels=None,
        history=None,
        notes=(),
    )


def _digest(state: Mapping[str, Tensor]) -> str:
    """Hash names, types, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _from_hub(path: str) -> Path:
    """Fetch the model folder of `hf-hub:OWNER/NAME[@REVISION]`: config.json and safetensors, from one commit.

    Nothing else in the repository is fetched, above all no pickle.
    """
    from huggingface_hub import hf_hub_download

    _ask_quietly()
    name, _, revision = path.removeprefix(HUB).partition("@")
    try:
        config = Path(hf_hub_download(name, CONFIG, revision=revision or None))
        return Path(hf_hub_download(name, WEIGHTS, revision=config.parent.name)).parent
    except Exception as error:  # the hub's client raises many kinds
        reason = first_line(error, 160)
        raise GrowkitError(
            f"{path}: no {CONFIG} and {WEIGHTS} to be fetched ({reason}); give a downloaded file instead"
        ) from None


def _ask_quietly() -> None:
    """Turn off the hub client's telemetry: it would also send torch's version and look up its environment."""
    from huggingface_hub import constants

    constants.HF_HUB_DISABLE_TELEMETRY = True


def _prepared_as(path: str, config: object) -> dict[str, Any]:
    """Read the preprocessing from a config.json.

    Raises:
        GrowkitError: it is not an object, or an entry has an impossible value; the message names the entry.
    """
    if not isinstance(config, dict):
        raise GrowkitError(f"{path}: pretrained_cfg in its config.json is no object; expected timm's config.json")
    given = {key: value for key, value in config.items() if key in PREPROCESSING and value is not None}
    sound = {
        "mean": _numbers,
        "std": lambda value: _numbers(value) and min(value) > 0,
        "crop_pct": lambda value: _numbers([value]) and 0 < value <= 2,  # timm's go up to 1.15; 87.5 is per cent
        "interpolation": INTERPOLATIONS.__contains__,
        "crop_mode": CROP_MODES.__contains__,
    }
    for key, fits in sound.items():
        if key in given and not fits(given[key]):
            shown = str(given[key])[:40]
            raise GrowkitError(f"{path}: {key} in its config.json is {shown}; no image is prepared by that, correct it")
    return given


def _numbers(value: object) -> bool:
    """Whether it is a list of finite numbers."""
    return (
        isinstance(value, list | tuple)
        and len(value) > 0
        and all(isinstance(v, int | float) and not isinstance(v, bool) and abs(v) < math.inf for v in value)
    )


def _preprocessing(architecture: Architecture, given: dict[str, Any]) -> dict[str, Any]:
    """timm's data config for the architecture, overridden by `given`; small images are not cropped."""
    model = build(architecture.name, architecture.arguments, device="meta")
    config = {**resolve_model_data_config(model), **given}
    for what, (height, width) in (("images", model.patch_embed.img_size), ("patches", model.patch_embed.patch_size)):
        if height != width:
            raise GrowkitError(
                f"{architecture.name} reads {what} of {height} x {width}; growkit grows square ones alone"
            )
    channels, size, patch = model.in_chans, model.patch_embed.img_size[0], model.patch_embed.patch_size[0]
    if size < patch:
        raise GrowkitError(
            f"images {size} wide hold no patch of {patch}; choose --set img_size={patch} or more, or --set patch_size=N"
        )
    config["input_size"] = (channels, size, size)
    if not given and size < 64:
        config["crop_pct"] = 1.0
    for key in ("mean", "std"):
        values = tuple(config[key])
        config[key] = values if len(values) == channels else (sum(values) / len(values),) * channels
    return {key: config[key] for key in PREPROCESSING if key in config}
