"""docs/architectures.md says of every name of timm's registry what the code does."""

import importlib.util
import re
from pathlib import Path

import pytest
import timm

from growkit.arch import find
from growkit.errors import GrowkitError

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "architectures.md").read_text(encoding="utf-8")
LINES = {line.split(" | ")[0].removeprefix("| "): line for line in PAGE.splitlines() if line.startswith("| ")}
spec = importlib.util.spec_from_file_location("architectures", ROOT / "examples" / "architectures.py")
assert spec is not None
assert spec.loader is not None
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)
OURS = [name for name in timm.list_models() if timm.models.model_entrypoint(name).__module__.endswith(script.COVERED)]
SAMPLE = (
    "deit3_small_patch16_224",
    "deit_tiny_distilled_patch16_224",
    "vit_base_patch16_clip_224",
    "vit_base_patch16_siglip_224",
    "vit_giant_patch14_reg4_dinov2",
    "aimv2_large_patch14_224",
    "beit3_base_patch16_224",
    "test_vit4",
    "vit_base_patch16_rpn_224",
)


def without_numbers(line: str) -> str:
    """Rounding differs from machine to machine, what is exact does not."""
    return re.sub(r"\d+e-\d+", "N", line)


def test_page_has_a_line_for_every_name_of_timms_vits() -> None:
    assert [name for name in OURS if name not in LINES] == []


@pytest.mark.parametrize("name", SAMPLE)
def test_line_is_what_the_code_does(name: str) -> None:
    assert without_numbers(LINES[name]) == without_numbers(script.line_of(name))


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", [name for name in OURS if name not in SAMPLE])
def test_every_line_is_what_the_code_does(name: str) -> None:
    assert without_numbers(LINES[name]) == without_numbers(script.line_of(name))


def test_page_names_every_family_and_counts_its_names() -> None:
    families: dict[str, int] = {}
    for name in timm.list_models():
        family = timm.models.model_entrypoint(name).__module__.rpartition(".")[2]
        families[family] = families.get(family, 0) + 1
    wrong = {
        family: count
        for family, count in families.items()
        if family not in script.COVERED and f"| {family} | {count} | " not in PAGE
    }
    assert wrong == {}


@pytest.mark.parametrize(
    "name", ["swin_tiny_patch4_window7_224", "eva02_tiny_patch14_224", "convnext_tiny", "vitamin_small_224"]
)
def test_other_family_is_refused_by_name(name: str) -> None:
    with pytest.raises(GrowkitError, match=name):
        find(name)


def test_wrong_verdict_would_be_noticed() -> None:
    """The negative twin: a network that keeps nothing is no exact one."""
    assert script.verdict([(0.02, 0.02)]) == "off by 2e-02"
    assert script.verdict([(1e-6, 1e-15), (1e-13, 1e-15)]) == "to eps, 1e-06"
    assert script.verdict([(1e-6, 1e-6), (1e-6, 1e-15)]) == "nearly, 1e-06"
    assert script.verdict([(1e-6, 1e-4)]) == "off by 1e-06"
    assert script.verdict([(1e-3, 1e-15)]) == "off by 1e-03"
    assert script.verdict([(1e-13, 1e-15)]) == "exact"
