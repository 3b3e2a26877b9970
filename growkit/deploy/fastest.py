"""Which graph is fastest on the provider that will run it? Candidates are kept only if faithful and measurably faster.

Off by default: on CPUs the candidates are worth a few percent at most, and cost compatibility.
"""

import functools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from growkit.deploy.contention import Contention
from growkit.deploy.data_sets import made_inputs
from growkit.deploy.export import Export, export_onnx
from growkit.deploy.form import Form
from growkit.deploy.parity import check_parity
from growkit.deploy.runtime import PROVIDERS, open_session
from growkit.deploy.settings import VerifySettings
from growkit.deploy.timing import NOISY, Comparison, compare
from growkit.deploy.truth import preprocessing
from growkit.errors import GrowkitError
from growkit.ranges import refuse_choice


@dataclass(frozen=True)
class Choice:
    """The outcome for one candidate; `why` is a sentence.

    The verdict is kept, faster, slower, no faster, not faithful, not decided or not measured.
    """

    attention: str
    verdict: str
    why: str
    comparisons: tuple[Comparison, ...] = ()


def candidates(form: Form, place: str) -> tuple[Form, ...]:
    """Return the forms that may run faster at `place` than `form` does, on the same runtime.

    Raises:
        GrowkitError: an unknown place.
    """
    refuse_choice("--for", place, PROVIDERS)
    if form.exporter != "dynamo" or form.precision not in ("fp32", "fp16"):
        return ()
    kinds = ["standard"] if form.opset >= 23 else []
    # TensorRT lacks ONNX Runtime's own operators; here they are written in float32 only
    if place != "tensorrt" and form.precision == "fp32":
        kinds.append("contrib")
    return tuple(replace(form, attention=kind) for kind in kinds)


def fastest(
    model: nn.Module,
    path: Path,
    form: Form,
    place: str,
    *,
    max_batch: int = 8,
    seconds: float = 12.0,
    seed: int = 0,
    say: Callable[[str], None] = lambda line: None,
    **options: Any,
) -> tuple[Export, tuple[Choice, ...]]:
    """Export `model` to `path` in the fastest form; also return what was tried, each against the graph of `form`.

    max_batch  largest batch size to time, besides 1; a form with a fixed one is timed at that
    seconds    longest time of one comparison
    options    of export_onnx

    Raises:
        GrowkitError: an unknown place, or a form that does not fit the model.
    """
    tried = candidates(form, place)
    if not tried:
        say(f"--for {place}: there is no other graph to try; the portable one is written")
        return export_onnx(model, path, form, **options), ()
    batches = form.batches_timed(max_batch)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:

        def written(wanted: Form) -> Export:
            (own := Path(folder, wanted.attention)).mkdir()
            return export_onnx(model, own / path.name, wanted, **options)

        plain = written(form)
        try:
            open_session(plain.path, provider=place)
        except GrowkitError as error:
            return _moved(plain, path), tuple(Choice(one.attention, "not measured", str(error)) for one in tried)
        fed = {batch: made_inputs(preprocessing(model), form, batch, seed) for batch in batches}
        timed = functools.partial(compare, seconds=seconds, seed=seed, foreign=Contention().lap)

        def opened(path: Path, batch: int) -> Callable[[], object]:
            session = open_session(path, provider=place)
            return lambda: session.outputs(fed[batch])

        def against_plain(path: Path, what: str, **names: Any) -> tuple[Comparison, ...]:
            found = []
            for batch in batches:
                say(f"timing {what}, batch {batch}")
                sides = (functools.partial(opened, file, batch) for file in (path, plain.path))
                found.append(timed(*sides, batch=batch, **names))
            return tuple(found)

        noise = max(c.noise for c in against_plain(plain.path, "the plain graph against itself"))
        choices, made = [], {}
        for one in tried:
            attention = one.attention
            made[attention] = written(one)
            if made[attention].form.attention != attention:
                choices.append(Choice(attention, "not measured", "the operator cannot express the model's attention"))
                continue
            parity = check_parity(model, made[attention].path, VerifySettings(provider=place, seed=seed))
            if not parity.passed:
                choices.append(Choice(attention, "not faithful", parity.failed[0].line))
                continue
            what = f"{attention} attention against the plain graph"
            found = against_plain(made[attention].path, what, names=(attention, "plain"))
            choices.append(judged(attention, found, noise))
        kept = [choice for choice in choices if choice.verdict == "kept"]
        best = min(kept, key=lambda choice: max(c.ratio for c in choice.comparisons), default=None)
        chosen = _moved(plain if best is None else made[best.attention], path)
    return chosen, tuple(_overtaken(one) if one in kept and one is not best else one for one in choices)


def _moved(export: Export, path: Path) -> Export:
    """Move the files of an export, which keep their names, to `path` on the same file system."""
    for name in export.files:
        export.path.with_name(name).replace(path.with_name(name))
    return replace(export, path=path)


def _overtaken(choice: Choice) -> Choice:
    return replace(choice, verdict="faster", why=f"{choice.why}; another is faster still")


def judged(attention: str, found: tuple[Comparison, ...], noise: float) -> Choice:
    """Keep a candidate whose whole interval is faster at some batch size, and at no batch size slower.

    noise  of the plain graph against itself; above timing.NOISY nothing is concluded
    """
    told = ", ".join(f"batch {c.batch}: {c.ratio:.3f} x [{c.low:.3f}, {c.high:.3f}]" for c in found)
    if noise > NOISY:
        return Choice(attention, "not decided", f"the machine is too noisy: {noise:.1%} against itself; {told}", found)
    if any(c.low > 1 for c in found):
        return Choice(attention, "slower", told, found)
    # sessions of the same file differ by up to a percent: an interval that ends within that says nothing
    if any(c.high < 1 - noise for c in found):
        return Choice(attention, "kept", told, found)
    return Choice(attention, "no faster", told, found)
