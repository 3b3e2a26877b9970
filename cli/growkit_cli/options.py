"""Options that commands share, and options made from settings dataclasses."""

import ast
import dataclasses
import functools
import inspect
import itertools
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from growkit.settings import Loading
from growkit.train.settings import FitSettings


def _run_folder(text: object) -> Path:
    """Refuse an empty --run: with an unset shell variable it would scatter files in the current folder."""
    if text == "":
        raise typer.BadParameter("it is empty; give a folder, or . for the current one")
    return Path(str(text))


Run = Annotated[
    Path,
    typer.Option("--run", parser=_run_folder, metavar="PATH", help="Run folder that every command reads and writes."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout and nothing else there.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what the command would otherwise refuse to touch.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N; auto is cuda if there is one.")]
_IMAGES = typer.Option(
    "--data", help="ImageFolder directory (train/, val/) or a timm dataset string such as torch/cifar10."
)
Data = Annotated[str | None, _IMAGES]
NeededData = Annotated[str, _IMAGES]
Model = Annotated[
    Path | None,
    typer.Argument(
        help="Model folder or checkpoint; the run's furthest stage when left out.",
        show_default=False,
    ),
]
Start = Annotated[
    Path | None,
    typer.Argument(
        help="Model folder or checkpoint; the run's grown model, else its trained one, when left out.",
        show_default=False,
    ),
]
ModelOrFile = Annotated[
    Path | None,
    typer.Argument(
        help="Model folder, checkpoint or .onnx file; the model of the run's furthest stage when left out.",
        show_default=False,
    ),
]
SourceArgument = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE", help="A .pth, .pt or .safetensors, a model folder, timm:NAME, or hf-hub:OWNER/NAME."
    ),
]
To = Annotated[str, typer.Option("--to", help="Target: a timm name or a short one, such as deit_base.")]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override an argument of the architecture, as in --set depth=8; repeatable."),
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue a stopped or killed run, if anything was saved.")]


def field_docs(settings: type) -> dict[str, str]:
    """Return the string under each field of a settings dataclass, by field name."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(settings)))
    body = next(node for node in tree.body if isinstance(node, ast.ClassDef)).body
    docs = {}
    for field, below in itertools.pairwise(body):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(below, ast.Expr)
            and isinstance(below.value, ast.Constant)
        ):
            docs[field.target.id] = str(below.value.value)
    return docs


def with_settings(
    settings: type,
    *,
    name: str = "settings",
    prefix: str = "",
    panel: str | None = None,
    skip: tuple[str, ...] = (),
    only: tuple[str, ...] | None = None,
    auto: dict[str, int] | None = None,
    docs: dict[str, str] | None = None,
    **defaults: Any,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a command one option per field of `settings`, collected into its argument `name`.

    An option's help is the string under its field; its default is the field's, unless `defaults` overrides it. Fields
    in `skip`, or not in `only` if that is given, get no option. `prefix` goes before each option's name, `panel` is the
    heading in --help, and `docs` overrides the help of fields that mean something else to this command. Options named
    in `auto` also accept the word auto, which stands for the number given there.
    """

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        helps = {**field_docs(settings), **(docs or {})}
        fields = [f for f in dataclasses.fields(settings) if f.name not in skip and (only is None or f.name in only)]
        shown = {f.name for f in fields}
        hidden = {key: value for key, value in defaults.items() if key not in shown}

        @functools.wraps(command)
        def wrapper(**given: Any) -> Any:
            chosen = {f.name: given.pop(prefix + f.name) for f in fields}
            return command(**given, **{name: settings(**hidden, **chosen)})

        options = [
            inspect.Parameter(
                prefix + f.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=defaults.get(f.name, f.default),
                annotation=Annotated[
                    f.type,
                    typer.Option(*_flag(prefix + f.name), rich_help_panel=panel, **_told(f.name, helps, auto)),
                ],
            )
            for f in fields
        ]
        own = inspect.signature(command).parameters.values()
        kept = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own if p.name != name]
        wrapper.__signature__ = inspect.Signature([*kept, *options])  # type: ignore[attr-defined]
        wrapper.__annotations__ = {p.name: p.annotation for p in [*kept, *options]}
        return wrapper

    return decorate


def with_loading(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options for reading a checkpoint, collected into its argument `loading`."""
    return with_settings(Loading, name="loading", panel="How a checkpoint is read")(command)


def with_recipe(panel: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a command that trains many models the options for training each, collected into its argument `recipe`."""
    skip = ("lr", "eval_every", "tensorboard", "shard")
    undecided = {"compile": field_docs(FitSettings)["compile"].partition(";")[0] + "."}
    return with_settings(FitSettings, name="recipe", panel=panel, skip=skip, docs=undecided)


def _flag(name: str) -> tuple[str, ...]:
    """Option name for a field that would otherwise be a Python keyword: `for_` is --for."""
    return (f"--{name.rstrip('_')}",) if name.endswith("_") else ()


def _told(name: str, docs: dict[str, str], auto: dict[str, int] | None) -> dict[str, Any]:
    """The help of an option, and the parser that lets an integer option accept the word auto."""
    if not auto or name not in auto:
        return {"help": docs[name]}
    meant = auto[name]

    def number_or_auto(text: object) -> int:
        if text == "auto":
            return meant
        try:
            number = int(str(text))
        except ValueError:
            number = meant
        if number == meant:
            raise typer.BadParameter(f"{text!r} is neither a whole number above 0 nor auto")
        return number

    told = f"{docs[name]} auto takes the largest that fits in memory, and leaves the learning rate to you."
    return {"parser": number_or_auto, "metavar": "INTEGER|auto", "help": told}
