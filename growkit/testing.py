"""For your test suite: assert that a grown model, a fine-tuned one or an ONNX file matches its reference.

from growkit.testing import assert_matches_reference

def test_model_is_the_one_that_was_accepted():
    assert_matches_reference("run/finetuned", "reference/finetuned")
"""

from pathlib import Path

from torch import nn

from growkit.deploy.golden import read_golden
from growkit.deploy.settings import VerifySettings
from growkit.deploy.subject import Subject, model_subject
from growkit.deploy.verify import verify_alone
from growkit.source import load_source


def assert_matches_reference(
    model: str | Path | nn.Module, reference: str | Path, *, tolerance: float | None = None
) -> None:
    """Assert what `growkit verify --model-only --reference` checks, or `growkit verify FILE.onnx --reference`.

    model      a model folder, a checkpoint, an .onnx file (run on the CPU), or a PyTorch model as it stands
    reference  folder that `growkit verify --update-reference` wrote
    tolerance  relative RMS difference of the logits; that of the reference when left out

    Raises:
        AssertionError: with one line for each check that did not pass.
        GrowkitError: a model or a reference that is missing or cannot be read.
    """
    __tracebackhide__ = True  # pytest shows the caller's line
    golden = read_golden(Path(reference))
    subject: Subject | Path
    if isinstance(model, nn.Module):
        subject = model_subject(model)
    elif Path(model).suffix == ".onnx":
        subject = Path(model)
    else:
        source = load_source(str(model))
        name = source.architecture.name
        subject = model_subject(source.model(), weights_sha256=source.sha256, architecture=name, labels=source.labels)
    verified = verify_alone(subject, golden, VerifySettings(), tolerance=tolerance)
    said = [c.line for c in verified.checks if c.verdict != "pass"]
    name = type(model).__name__ if isinstance(model, nn.Module) else str(model)
    if said:
        raise AssertionError("\n".join((f"{name} does not match {reference}:", *said)))
