"""A script that reproduces what a failed verification found: it loads model and file and runs the failing input."""

import os
from pathlib import Path
from string import Template

from growkit.deploy.parity import Parity
from growkit.deploy.settings import VerifySettings
from growkit.text import clipped, visible

LINE = 500  # characters of a finding

_SCRIPT = Template('''\
"""Reproduce what `growkit verify` found wrong, and exit 1 as long as it persists:

$findings

    python reproduce.py [--model MODEL] [--onnx FILE]
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from growkit.deploy.inputs import extremes
from growkit.deploy.numbers import in_batches, rms
from growkit.deploy.parity import Material, check_parity
from growkit.deploy.parts import core_session
from growkit.deploy.settings import VerifySettings
from growkit.deploy.truth import at_image_size, logits_of, noise_images, preprocessing, truth_of
from growkit.deploy.store import form_in
from growkit.settings import Loading
from growkit.source import load_source

HERE = Path(__file__).resolve().parent
MODEL = $model
FILE = $file
DATA_SETS = $data_sets
FAILING = $failing  # the first run whose numbers were wrong
PROVIDER = $provider


def show_failing_input(network, file: Path) -> None:
    """Run the failing input and say how far the file is off, in standard deviations of the logits."""
    form = form_in(file)
    network = at_image_size(network, form.image_size)
    prepared, truth = preprocessing(network), truth_of(network)
    made = noise_images(prepared, FAILING["made"], FAILING["seed"])
    spread = logits_of(truth, made).std()
    images = extremes(prepared, FAILING["seed"]).get(FAILING["run"], made[: FAILING["used"]])
    wanted = logits_of(truth, images)
    session = core_session(file, form, prepared, provider=PROVIDER)
    try:
        got = in_batches(session, images, FAILING["batch"])
    except Exception as error:
        print(f"{FAILING['run']}: refused: {error}")
        return
    if got.shape != wanted.shape:
        print(f"{FAILING['run']}: logits {got.shape}, expected {wanted.shape}")
        return
    difference = got.astype(np.float64) - wanted
    off, most = rms(difference) / spread, np.abs(difference).max() / spread
    print(f"{FAILING['run']}: relative RMS error {off:.3g}")
    print(f"{FAILING['run']}: largest error / std {most:.3g}, at image {int(np.abs(difference).max(axis=1).argmax())}")


def main() -> int:
    """0 when the file answers like the model, 1 when not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL, help="model folder, checkpoint, timm:NAME or hf-hub:OWNER/NAME")
    parser.add_argument("--onnx", type=Path, default=HERE / FILE, help="the ONNX file")
    given = parser.parse_args()
    model = given.model if given.model != MODEL or not (HERE / MODEL).exists() else str(HERE / MODEL)
    source = load_source(model, $loading)
    network = source.model()
    if FAILING is not None:
        show_failing_input(network, given.onnx)
    # what is allowed is judged as `growkit verify` does, by the same function
    parity = check_parity(
        network,
        given.onnx,
        VerifySettings(provider=PROVIDER, precision=$precision, max_batch=$max_batch, seed=$seed),
        Material(
            weights_sha256=source.sha256,
            labels=source.labels,
            data_sets=HERE / DATA_SETS if DATA_SETS is not None else None,
        ),
    )
    for check in parity.failed:
        print(f"FAILED {check.group}: {check.line}")
    if parity.passed:
        print("no check fails; only `growkit verify` makes those that need your images or labels")
    return 0 if parity.passed else 1


if __name__ == "__main__":
    sys.exit(main())
''')


def reproduction(
    parity: Parity,
    folder: Path,
    *,
    run: Path,
    model: str,
    file: Path,
    settings: VerifySettings,
    data_sets: Path | None = None,
    loading: str = "Loading()",
) -> str:
    """Return the text of a script in `folder` that reproduces the failures in `parity`; other paths can be given to it.

    run      the run folder that `folder` is in
    model    as source.load_source takes it
    loading  its other argument as Python source: the repr of a settings.Loading
    """
    findings = "\n".join(f"    {clipped(visible(f'{c.group}: {c.line}'), LINE)}" for c in parity.failed[:12])
    if len(parity.failed) > 12:
        findings += f"\n    and {len(parity.failed) - 12} more"
    return _SCRIPT.substitute(
        # it goes into a docstring
        findings=findings.replace("\\", "/").replace('"""', "'''"),
        model=repr(_seen_from(folder, run, Path(model)) if os.path.exists(model) else model),
        file=repr(_seen_from(folder, run, file)),
        data_sets=repr(_seen_from(folder, run, data_sets) if data_sets is not None else None),
        failing=repr(parity.figures.get("failing")),
        provider=repr(parity.provider if parity.provider != "none" else settings.provider),
        loading=loading,
        precision=repr(settings.precision),
        max_batch=settings.max_batch,
        seed=settings.seed,
    )


def _seen_from(folder: Path, run: Path, path: Path) -> str:
    """Return `path` relative to `folder` where both lie in the run folder, which may move as a whole."""
    path = path.resolve()
    return os.path.relpath(path, folder.resolve()) if path.is_relative_to(run.resolve()) else str(path)
