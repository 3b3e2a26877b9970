"""The architectures growkit knows, found by name or by the shapes of their weights."""

import ast
import difflib
import inspect
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import cache
from types import NoneType
from typing import Any, get_args, get_type_hints

import timm
import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from growkit.arch import recognise, vit
from growkit.arch.spec import LAYERS, Architecture, StateDict
from growkit.errors import GROWS, GrowkitError, first_line

ENDINGS = ("_patch16_224", "_patch14_224")  # that a short name leaves out
HEAD_SIZE = 64  # of every published ViT and DeiT up to ViT-L
DRAWING = {
    *(nn.init.kaiming_uniform_, nn.init.uniform_, nn.init.normal_),
    *(Tensor.uniform_, Tensor.erfinv_, Tensor.mul_, Tensor.add_, Tensor.clamp_),  # steps of timm's trunc_normal_
}
ARGUMENTS = tuple(inspect.signature(VisionTransformer).parameters)  # those of the network, and no others
KINDS = get_type_hints(VisionTransformer.__init__)
WORDS = {"true": True, "false": False, "none": None}  # other tools' spelling of what Python capitalises
MOST = 2**20  # of any size
MOST_LAYERS = 1024


def full_name(name: str) -> str:
    """Complete a short name to timm's, and leave timm's as it is: deit_base -> deit_base_patch16_224.

    Raises:
        GrowkitError: no such model; the nearest names are offered, where any is near.
    """
    base = name.partition(".")[0]
    for candidate in (base, *(f"{base}{ending}" for ending in ENDINGS)):
        if timm.is_model(candidate):
            return candidate
    near = difflib.get_close_matches(base, {_short(known) for known in _named()}, n=3)
    known = f"nearest: {', '.join(near)}" if near else GROWS
    raise GrowkitError(f"unknown architecture {name!r}; {known}")


def _short(name: str) -> str:
    """The short name that `full_name` completes to this one; the name itself if there is none."""
    short = name.removesuffix(ENDINGS[0]).removesuffix(ENDINGS[1])
    return short if full_name(short) == name else name


def _named() -> list[str]:
    """List timm's names of VisionTransformers and DeiTs."""
    return timm.list_models(module="vision_transformer") + timm.list_models(module="deit")


def parse_sets(sets: Sequence[str]) -> dict[str, Any]:
    """Parse `--set` values into arguments of VisionTransformer: ['depth=8'] -> {'depth': 8}.

    Raises:
        GrowkitError: not KEY=VALUE, or no such argument; the nearest are offered.
    """
    arguments = {}
    for item in sets:
        key, equals, value = item.partition("=")
        if not equals:
            raise GrowkitError(f"--set {item}: expected KEY=VALUE, as in --set depth=8")
        if key not in ARGUMENTS:
            near = difflib.get_close_matches(key, ARGUMENTS, n=3, cutoff=0.3) or ["embed_dim", "depth", "num_heads"]
            raise GrowkitError(f"--set {item}: no argument {key!r}; nearest: {', '.join(near)}")
        try:
            arguments[key] = WORDS[value.lower()] if value.lower() in WORDS else ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            arguments[key] = value
    return arguments


def find(name: str, arguments: Mapping[str, Any] | None = None) -> Architecture:
    """The architecture of a timm or short name, with arguments of its constructor overridden.

    Raises:
        GrowkitError: unknown name, arguments that timm refuses, or a network the table does not cover.
    """
    name = full_name(name)
    arguments = dict(arguments or {})
    return vit.describe(build(name, arguments, device="meta"), name, arguments)


class _Undrawn(TorchFunctionMode):
    """Inside, no random weights are drawn: on the meta device it has no effect, and takes long."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in DRAWING:
            return args[0] if args else kwargs["tensor"]  # as torch.nn.init hands it over
        return func(*args, **(kwargs or {}))


def build(name: str, arguments: Mapping[str, Any], device: str = "cpu") -> VisionTransformer:
    """Build the network with random weights, or none at all on the meta device.

    Raises:
        GrowkitError: timm refuses the arguments, or the network is no plain VisionTransformer.
    """
    # timm.create_model has others that fetch weights (pretrained, pretrained_cfg) or read files (checkpoint_path)
    if strange := [key for key in arguments if key not in ARGUMENTS]:
        raise GrowkitError(f"{name}: {strange[0]!r} is no argument of a VisionTransformer; take it out of model_args")
    for key, value in arguments.items():
        if expected := _expected(key, value):
            raise GrowkitError(f"cannot build {name} with {key}={value}: expected {expected}")
    try:
        with torch.device(device), _Undrawn() if device == "meta" else nullcontext():
            model = timm.create_model(name, **arguments)
    except Exception as error:  # constructors raise errors of every kind on odd arguments
        first = first_line(error)
        if arguments:
            own = _as_named(name)
            width = arguments.get("embed_dim", own.embed_dim)
            heads = arguments.get("num_heads", own.blocks[0].attn.num_heads)
            if heads and width % heads:
                remedy = f"embed_dim={-(-width // heads) * heads} is"
                if "num_heads" in arguments:  # weights may have decided the width
                    divisors = (number for number in range(1, width + 1) if width % number == 0)
                    remedy = f"but of num_heads={min(divisors, key=lambda number: abs(number - heads))}"
                raise GrowkitError(f"num_heads={heads}: embed_dim={width} is no multiple of it, {remedy}") from None
        given = " ".join(f"{key}={value}" for key, value in arguments.items())
        raise GrowkitError(f"cannot build {name} with {given or 'its defaults'}: {first}") from None
    if type(model) not in (VisionTransformer, VisionTransformerDistilled):
        raise GrowkitError(f"{name} is timm's {type(model).__name__}; {GROWS}")
    return model


def _expected(key: str, value: Any) -> str | None:
    """Say what an argument should be if timm would misread its value; None if the value is right."""
    kinds = {KINDS.get(key), *get_args(KINDS.get(key))}
    if value is None and NoneType in kinds:
        return None
    if bool in kinds:
        return None if isinstance(value, bool) else "true or false"
    if int in kinds:
        sizes = value if key in ("img_size", "patch_size") and isinstance(value, tuple | list) else (value,)
        most = MOST_LAYERS if key == "depth" else MOST
        right = all(_is_number(size, int) and 0 <= size <= most for size in sizes)
        return None if right else f"a whole number up to {most}"
    if float in kinds:
        rate = key.endswith("_rate")
        right = _is_number(value, int | float) and 0 <= value <= MOST and not (rate and value >= 1)
        return None if right else "a number from 0 to below 1" if rate else f"a number from 0 to {MOST}"
    return None


def _is_number(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


@cache
def _as_named(name: str) -> VisionTransformer:
    """Build timm's network of a full timm name, on the meta device and to be read alone, if the table covers it."""
    model = build(name, {}, device="meta")
    vit.describe(model, name, {})
    return model


def detect(
    state: StateDict, *, hint: str = "", name: str | None = None, sets: Sequence[str] = ()
) -> tuple[Architecture, str]:
    """Detect the architecture of a checkpoint; also return a line that says how it was detected.

    What the shapes do not show, above all the head count, comes from `name` (--from), else from a
    timm name that begins `hint` (the file's name), else from assuming 64-wide heads.

    Raises:
        GrowkitError: the tensors are not a plain ViT's, or do not fit the name; the message names them.
    """
    shapes = recognise.arguments_of(state)
    chosen = parse_sets(sets)
    if name is not None:
        name, how = full_name(name), f"--from {name}"
    elif named := _named_by(hint, state, shapes):
        name, how = named, f"{named}, from the file's name"
    else:
        if marked := recognise.telltale(state):
            key, kind, example = marked
            raise GrowkitError(
                f"the weights hold {key}: {kind}, whose norms and activation leave no trace in them; "
                f"--from NAME says which, as in --from {example}"
            )
        name, how = _name_for(shapes, heads_given="num_heads" in chosen, distilled="dist_token" in state)
    base = _as_named(name)
    own = {**vit.input_arguments(base), **vit.grown_arguments(base)}
    arguments = {key: value for key, value in shapes.items() if not vit.same_argument(key, value, own[key])}
    if own["global_pool"] not in ("token", "map") and shapes["global_pool"] != "map":
        arguments.pop("global_pool", None)  # mean or max pooling leaves no trace: the name decides
    if "global_pool" in arguments:
        arguments["fc_norm"] = shapes["fc_norm"]  # which would follow the pooling otherwise
    if "embed_dim" in arguments:
        arguments["num_heads"] = shapes["embed_dim"] // base.blocks[0].attn.head_dim
    architecture = find(name, {**arguments, **chosen})
    told = "".join(f", --from-set {item}" for item in sets)
    architecture.check(state, f"what they were taken for ({how.partition(';')[0]}{told})")
    return architecture, how


def _named_by(hint: str, state: StateDict, shapes: Mapping[str, Any]) -> str | None:
    """Return the timm name that a file's name begins with, if its network has these sizes and may be of this kind."""
    words, marked = hint.replace("-", "_").lower(), recognise.telltale(state)
    for candidate in sorted(_named(), key=len, reverse=True):
        if words.startswith((candidate, _short(candidate))):
            model = build(candidate, {}, device="meta")
            own = model.state_dict()
            sizes = (model.embed_dim, len(model.blocks)) == (shapes["embed_dim"], shapes["depth"])
            distilled = ("dist_token" in own) == ("dist_token" in state)
            # a plain name, as of vit_base_clip.pth, does not say which norms and activation such weights had
            if sizes and distilled and marked in (None, recognise.telltale(own)):
                return candidate
    return None


def _name_for(shapes: Mapping[str, Any], *, heads_given: bool, distilled: bool) -> tuple[str, str]:
    """Return the timm name for the shapes and the line that says how it was found."""
    embed, depth = shapes["embed_dim"], shapes["depth"]
    known = recognise.KNOWN.get((embed, depth), "")
    if distilled:
        known = known.replace("_patch16", "_distilled_patch16") if known.startswith("deit") else ""
    if embed % HEAD_SIZE and not heads_given:
        raise GrowkitError(
            f"the weights do not show their head count and {embed} is no multiple of {HEAD_SIZE}; "
            "--from-set num_heads=N says it"
        )
    name = known or ("deit_small_distilled_patch16_224" if distilled else "deit_small_patch16_224")
    size = _as_named(name).blocks[0].attn.head_dim
    assumed = f"{size}-wide heads assumed, which weights do not show (--from-set num_heads=N says otherwise)"
    heads = "heads as --from-set" if heads_given else assumed
    return name, f"{known or f'a ViT of {depth} layers, {embed} wide'}, from its shapes; {heads}"


def find_target(source: Architecture, name: str, sets: Sequence[str] = ()) -> tuple[Architecture, list[str]]:
    """Find the architecture to grow into: input, classes and tokens from the source, sizes from `name` and `sets`.

    Returns the architecture and lines that say what was taken over from the source.

    Raises:
        GrowkitError: unknown name or argument, or a `--set` that contradicts the source.
    """
    name = full_name(name)
    model = _as_named(name)
    chosen = parse_sets(sets)
    kept = vit.input_arguments(build(source.name, source.arguments, device="meta"))
    for key in vit.INPUT_ARGUMENTS:
        if key in chosen and not vit.same_argument(key, chosen[key], kept[key]):
            raise GrowkitError(f"--set {key}={chosen[key]}: the source has {kept[key]}, and growing keeps it")
    own = vit.input_arguments(model)
    taken = {key: value for key, value in kept.items() if not vit.same_argument(key, value, own[key])}
    implied = {key: value for key, value in source.arguments.items() if key.endswith("_layer")}  # as act_layer
    if "global_pool" in taken:
        implied["fc_norm"] = kept["fc_norm"]  # which would follow the pooling otherwise
    remedy = {key: f"; --set {key}={own[key]} adapts it" for key in ("img_size", "patch_size", "in_chans")}
    said = ", ".join(
        f"{key} {value} ({name} has {own[key]}{remedy.get(key, '')})"
        for key, value in taken.items()
        if key not in chosen
    )
    width, heads = chosen.get("embed_dim", model.embed_dim), chosen.get("num_heads", model.blocks[0].attn.num_heads)
    if all(_is_number(count, int) and count > 0 for count in (width, heads)) and width % heads:
        size = source.spaces["attn"].group
        fits = -(-width // size)
        wider = f"--set embed_dim={fits * size} " if width % size else ""
        raise GrowkitError(
            f"embed_dim={width} is no multiple of {heads} heads; the source's are {size} wide: "
            f"{wider}--set num_heads={fits}"
        )
    return find(name, {**implied, **taken, **chosen}), [f"target takes the source's {said}"] if said else []


def halfway(source: Architecture, target: Architecture, *, depth: bool) -> Architecture | None:
    """Return the target's widths at the source's depth or, with `depth`, the reverse; None if that is one of them."""
    wide, deep = (source, target) if depth else (target, source)
    middle = find(wide.name, {**wide.arguments, "depth": deep.spaces[LAYERS].size})
    return None if middle.spaces in (source.spaces, target.spaces) else middle
