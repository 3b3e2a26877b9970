"""A source adapted to other images or classes is what timm's own loading of its weights gives, and grows from there."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pairs import published_scale, randomised, tiny
from PIL import Image
from test_cli import growkit, listing, write_images
from torch import Tensor

from growkit.adapt import head_is_new, with_classes, with_input
from growkit.arch import find, find_target
from growkit.arch.spec import Architecture
from growkit.compare.bench import bench_of
from growkit.compare.settings import CompareSettings
from growkit.errors import GrowkitError
from growkit.grow import grow, lossless_gap
from growkit.job import Job
from growkit.plan import plan_growth
from growkit.record import RunFolder
from growkit.settings import GrowSettings, Loading
from growkit.source import Source
from growkit.train.settings import FitSettings

PREPARED = {"mean": (0.4, 0.5, 0.7), "std": (0.2, 0.25, 0.3), "interpolation": "bicubic", "crop_pct": 0.9}
KINDS: dict[str, Architecture] = {
    "plain": tiny(32, 2, 2),
    "register tokens": tiny(32, 2, 2, reg_tokens=3),
    "positions of the patches alone": tiny(32, 2, 2, reg_tokens=3, no_embed_class=True),
    "no class token": tiny(32, 2, 2, class_token=False, global_pool="avg"),
    "no positions": tiny(32, 2, 2, pos_embed="none"),
    "distilled": tiny(32, 2, 2, name="deit_tiny_distilled_patch16_224"),
    "pooled by attention": tiny(32, 2, 2, name="vit_base_patch16_siglip_224"),
    "pre-norm": tiny(32, 2, 2, pre_norm=True),
    "layer scale": tiny(32, 2, 2, init_values=1e-5),
    "any size": tiny(32, 2, 2, dynamic_img_size=True),
    "no head": tiny(32, 2, 2, num_classes=0),
}
INPUTS: dict[str, dict[str, int]] = {
    "larger": {"img_size": 40},
    "smaller": {"img_size": 8},
    "no whole patches": {"img_size": 30},
    "smaller patches": {"patch_size": 4},
    "one patch": {"patch_size": 16},
    "the same grid of larger patches": {"img_size": 32, "patch_size": 16},
    "grey": {"in_chans": 1},
    "four channels": {"in_chans": 4},
    "all of it": {"img_size": 36, "patch_size": 6, "in_chans": 7},
}


def source_of(architecture: Architecture, *, labels: str | None = None, channels: int = 3, seed: int = 0) -> Source:
    state = {name: tensor.float() for name, tensor in randomised(architecture, seed=seed).state_dict().items()}
    prepared = {name: value[:channels] if isinstance(value, tuple) else value for name, value in PREPARED.items()}
    size = architecture.arguments["img_size"]
    return Source(
        path="small.pth",
        architecture=architecture,
        state=state,
        sha256="ab",
        preprocessing={**prepared, "input_size": (channels, size, size)},
        labels=tuple(labels) if labels else None,
        history=None,
        notes=("a note",),
    )


def sets(changed: dict[str, int]) -> list[str]:
    return [f"{key}={value}" for key, value in changed.items()]


def by_timm(source: Source, changed: dict[str, Any]) -> dict[str, Tensor]:
    """The weights after timm's own loading of the source's into a network with these arguments."""
    architecture = source.architecture
    was = {"input_size": source.preprocessing["input_size"], "num_classes": architecture.classes}
    model = timm.create_model(
        architecture.name,
        pretrained=True,
        pretrained_cfg_overlay={"state_dict": {k: v.clone() for k, v in source.state.items()}, "url": "", **was},
        **{**architecture.arguments, **changed},
    )
    return model.state_dict()


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


# Input


ALL_KINDS = ("no whole patches", "smaller patches", "all of it")  # the changes that are tried on every kind


@pytest.mark.parametrize(
    ("kind", "change"), [(k, c) for k in KINDS for c in INPUTS if k in ("plain", "distilled") or c in ALL_KINDS]
)
def test_adapted_weights_are_those_of_timms_own_loading_bit_for_bit(kind: str, change: str) -> None:
    source, changed = source_of(KINDS[kind]), INPUTS[change]
    if (kind, change) == ("any size", "no whole patches"):
        with pytest.raises(GrowkitError, match="whole patches of 8 alone; choose --set img_size=32"):
            with_input(source, sets(changed))
        return
    before = {name: tensor.clone() for name, tensor in source.state.items()}
    adapted = with_input(source, sets(changed))
    assert differing(dict(adapted.state), by_timm(source, changed)) == []
    assert differing(before, dict(source.state)) == []
    model = adapted.model()
    size, channels = changed.get("img_size", 16), changed.get("in_chans", 3)
    with torch.no_grad():
        assert model(torch.zeros(1, channels, size, size)).isfinite().all()
    assert adapted.preprocessing["input_size"] == (channels, size, size)
    assert adapted.notes == source.notes
    assert len(adapted.adapted) == len(changed)


@settings(max_examples=20)
@given(
    grid=st.integers(1, 6),
    size=st.integers(8, 40),
    patches=st.tuples(st.sampled_from([2, 4, 8]), st.sampled_from([2, 4, 5, 8])),
    channels=st.tuples(st.integers(1, 3), st.integers(1, 8)),
    tokens=st.integers(0, 2),
)
def test_any_size_is_adapted_as_timm_does_it(
    grid: int, size: int, patches: tuple[int, int], channels: tuple[int, int], tokens: int
) -> None:
    small = {"img_size": grid * patches[0], "patch_size": patches[0], "in_chans": channels[0], "reg_tokens": tokens}
    source = source_of(tiny(16, 1, 1, **small), channels=channels[0])
    changed = {"img_size": size, "patch_size": patches[1], "in_chans": channels[1]}
    adapted = with_input(source, sets(changed))
    assert differing(dict(adapted.state), by_timm(source, changed)) == []
    prefix = 1 + tokens
    assert torch.equal(adapted.state["pos_embed"][:, :prefix], source.state["pos_embed"][:, :prefix])


def test_a_grey_image_answers_as_the_same_image_in_three_channels() -> None:
    source = source_of(KINDS["plain"])
    grey = torch.randn(2, 1, 16, 16)
    with torch.no_grad():
        wanted, got = source.model()(grey.repeat(1, 3, 1, 1)), with_input(source, ["in_chans=1"]).model()(grey)
    assert torch.allclose(wanted, got, atol=1e-5)


def test_channels_are_normalised_as_their_kernels_came_about() -> None:
    source = source_of(KINDS["plain"])
    one, two, five = (with_input(source, [f"in_chans={count}"]).preprocessing for count in (1, 2, 5))
    assert one["mean"] == pytest.approx((1.6 / 3,))
    assert one["std"] == pytest.approx((0.25,))
    assert two["mean"] == (0.4, 0.5)
    assert five["mean"] == (0.4, 0.5, 0.7, 0.4, 0.5)
    assert five["crop_pct"] == 0.9


def test_every_change_is_said_in_one_line() -> None:
    source = source_of(KINDS["plain"])
    changed = with_input(source, ["img_size=32", "patch_size=4", "in_chans=1", "depth=5"])
    assert changed.adapted == (
        "source adapted: img_size 16 -> 32, position embeddings resampled from 2 x 2 to 8 x 8",
        "source adapted: patch_size 8 -> 4, patch kernels resampled",
        "source adapted: in_chans 3 -> 1, channels of the patch kernels summed",
    )
    (odd,) = with_input(source, ["img_size=30"]).adapted
    assert odd.endswith("from 2 x 2 to 3 x 3, the last 6 pixels of each row and column are in no patch and not read")
    (bare,) = with_input(source_of(KINDS["no positions"]), ["patch_size=4"]).adapted
    assert bare.endswith("patch kernels resampled, 2 x 2 patches become 4 x 4")


@pytest.mark.parametrize("agreed", [[], ["img_size=16"], ["in_chans=3", "patch_size=8", "depth=9"]])
def test_what_is_asked_for_and_there_changes_nothing(agreed: list[str]) -> None:
    source = source_of(KINDS["plain"])
    assert with_input(source, agreed) is source


@pytest.mark.parametrize(
    ("item", "said"),
    [
        ("img_size=(32, 16)", r"--set img_size=\(32, 16\): growkit grows networks for square images; give one number"),
        ("img_size=large", "--set img_size=large: expected a whole number of at least 1"),
        ("img_size=0", "expected a whole number"),
        ("img_size=16.5", "expected a whole number"),
        ("in_chans=True", "expected a whole number"),
        ("patch_size=-4", "expected a whole number"),
        ("patch_size=17", "images 16 wide hold no patch of 17; choose --set img_size=17 or more"),
        ("img_size=7", "images 7 wide hold no patch of 8"),
    ],
)
def test_input_that_cannot_be_is_refused(item: str, said: str) -> None:
    with pytest.raises(GrowkitError, match=said):
        with_input(source_of(KINDS["plain"]), [item])


@pytest.mark.parametrize("kind", KINDS)
def test_grown_model_starts_where_the_adapted_source_stands(kind: str) -> None:
    source = source_of(KINDS[kind])
    source = replace(source, state={name: tensor.double() for name, tensor in source.state.items()})
    changed = ["img_size=24", "patch_size=6", "in_chans=2"]
    adapted = with_input(source, changed)
    sizes = ["embed_dim=64", "depth=3", "num_heads=4", "mlp_ratio=4"]
    target, _ = find_target(adapted.architecture, source.architecture.name, [*changed, *sizes])
    grown = grow(adapted.architecture, target, adapted.state, GrowSettings()).materialize()
    assert grown.patch_embed.proj.weight.shape == (64, 2, 6, 6)
    assert lossless_gap(adapted.model(), grown, seed=0) < 1e-11


def test_target_names_the_remedy_for_an_input_that_is_kept() -> None:
    _, (note,) = find_target(find("deit_base"), "deit_base_patch16_384")
    assert note == (
        "target takes the source's img_size 224 (deit_base_patch16_384 has 384; --set img_size=384 adapts it)"
    )
    adapted = with_input(source_of(KINDS["plain"]), ["img_size=224", "patch_size=16"])
    _, (note,) = find_target(adapted.architecture, "deit_base_patch16_384", ["img_size=224"])  # as asked: not told
    assert note == "target takes the source's num_classes 7 (deit_base_patch16_384 has 1000)"


# Classes


def test_head_that_fits_is_kept_with_the_datas_labels() -> None:
    source = source_of(KINDS["plain"])
    adapted = with_classes(source, list("abcdefg"), seed=0)
    assert adapted.labels == tuple("abcdefg")
    assert (adapted.notes, adapted.adapted) == (source.notes, ())
    assert all(adapted.state[name] is source.state[name] for name in source.state)


def test_other_classes_get_a_new_head_by_the_seed_and_it_is_said() -> None:
    source = source_of(KINDS["plain"])
    before = torch.random.get_rng_state()
    adapted = with_classes(source, ["cat", "dog"], seed=5)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert adapted.adapted == ("the source has 7 classes, the data 2: a new head starts from scratch",)
    assert not adapted.own_head
    assert adapted.labels == ("cat", "dog")
    assert adapted.architecture.shapes["head.weight"] == (2, 32)
    assert adapted.model()(torch.zeros(1, 3, 16, 16)).shape == (1, 2)
    rest = [name for name in source.state if not name.startswith("head.")]
    assert [name for name in rest if not torch.equal(adapted.state[name], source.state[name])] == []
    again, other = (with_classes(source, ["cat", "dog"], seed=seed) for seed in (5, 6))
    assert torch.equal(again.state["head.weight"], adapted.state["head.weight"])
    assert not torch.equal(other.state["head.weight"], adapted.state["head.weight"])
    assert source.state["head.weight"].shape == (7, 32)


@pytest.mark.parametrize("kind", ["plain", "distilled", "pooled by attention"])
@pytest.mark.parametrize("names", ["bdf", "fdb", "gfedcba", "a"])
def test_head_sliced_by_label_gives_the_sources_logits_of_these_classes(kind: str, names: str) -> None:
    source = source_of(KINDS[kind], labels="abcdefg")
    adapted = with_classes(source, list(names), seed=0)
    images = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        wanted, got = source.model()(images), adapted.model()(images)
    assert torch.allclose(got, wanted[:, ["abcdefg".index(name) for name in names]], atol=1e-6)
    assert adapted.labels == tuple(names)
    assert adapted.own_head
    assert adapted.architecture.classes == len(names)
    (line,) = adapted.adapted
    assert ("put into the data's order" if len(names) == 7 else f"the data's {len(names)} are kept") in line
    if kind == "distilled":
        assert adapted.state["head_dist.weight"].shape == (len(names), 32)


@pytest.mark.parametrize("labels", ["abcdefa", "abcdef", None], ids=["twice the same", "too few", "none"])
def test_labels_that_do_not_name_each_row_slice_nothing(labels: str | None) -> None:
    adapted = with_classes(source_of(KINDS["plain"], labels=labels), ["a", "b"], seed=0)
    assert adapted.adapted == ("the source has 7 classes, the data 2: a new head starts from scratch",)


def test_one_class_that_the_source_does_not_know_makes_the_head_new() -> None:
    adapted = with_classes(source_of(KINDS["plain"], labels="abcdefg"), ["a", "z"], seed=0)
    assert adapted.adapted == ("the source has 7 classes, the data 2: a new head starts from scratch",)


def test_other_names_of_as_many_classes_are_taken_in_order_and_it_is_said() -> None:
    source = source_of(KINDS["plain"], labels="abcdefg")
    adapted = with_classes(source, list("tuvwxyz"), seed=0)
    assert adapted.state is source.state
    (line,) = adapted.adapted
    assert (
        line == "the source calls its classes a, b, c and 4 more, the data t, u, v and 4 more: they are taken in order"
    )
    (line,) = with_classes(source, list("abcdxyz"), seed=0).adapted
    assert line == "the source calls its classes from 4 on e, f, g, the data x, y, z: they are taken in order"


def test_number_of_classes_without_data_makes_the_head_new_or_leaves_it_out() -> None:
    source = source_of(KINDS["distilled"], labels="abcdefg")
    assert with_classes(source, None, ["num_classes=7"], seed=0).labels == source.labels
    three = with_classes(source, None, ["num_classes=3"], seed=0)
    assert (three.architecture.classes, three.labels) == (3, None)
    assert three.state["head_dist.weight"].shape == (3, 32)
    assert three.adapted == ("the source has 7 classes, --set num_classes=3: a new head starts from scratch",)
    none = with_classes(source, None, ["num_classes=0"], seed=0)
    assert [name for name in none.state if "head" in name] == []
    assert none.model()(torch.zeros(1, 3, 16, 16)).shape == (1, 32)
    assert "its head is left out" in none.adapted[0]


def test_source_without_a_head_gets_one() -> None:
    source = source_of(KINDS["no head"])
    assert with_classes(source, None, seed=0) == source
    adapted = with_classes(source, ["cat", "dog"], seed=0)
    assert adapted.model()(torch.zeros(1, 3, 16, 16)).shape == (1, 2)
    assert adapted.adapted == ("the source has no head, the data 2 classes: a new head starts from scratch",)
    with pytest.raises(GrowkitError, match="no head and the data names no classes"):
        with_classes(source, [], seed=0)
    assert with_classes(source, [], ["num_classes=4"], seed=0).architecture.classes == 4


@pytest.mark.parametrize("item", ["num_classes=3", "num_classes=0", "num_classes=two", "num_classes=-1"])
def test_number_of_classes_that_is_not_the_datas_is_refused(item: str) -> None:
    with pytest.raises(GrowkitError, match=f"--set {item}: "):
        with_classes(source_of(KINDS["plain"]), ["cat", "dog"], [item], seed=0)


# Through the commands


TO = ("--to", "vit_tiny", "--set", "embed_dim=64", "--set", "depth=3", "--set", "num_heads=4")
QUICK = ("--workers", "0", "--batch-size", "8", "--scale-min", "0.8")
NAMES = ("ant", "elk", "bee", "cat", "yak", "dog", "fox")


def test_source_of_other_classes_is_told_to_learn_them_with_the_options_it_was_read_by() -> None:
    loading = Loading(from_="vit_tiny", from_set=["num_heads=2"], ema=False)
    line = head_is_new(replace(source_of(tiny(32, 2, 2)), path="a b.pth", loading=loading), "my images")
    options = "--from vit_tiny --no-ema --from-set num_heads=2 --data 'my images' --run OTHER"
    assert f"growkit finetune 'a b.pth' {options}, and take OTHER/finetuned" in line


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small model of seven named classes, and images of three of them."""
    root = tmp_path_factory.mktemp("place")
    arguments = {name: value for name, value in KINDS["plain"].arguments.items() if name != "num_classes"}
    config = {"architecture": "vit_tiny_patch16_224", "model_args": arguments, "label_names": list(NAMES)}
    model = published_scale(KINDS["plain"])
    timm.models.save_for_hf(model, str(root / "small"), model_config=config, safe_serialization=True)
    shutil.copytree(root / "small", root / "wide")
    wide = json.loads((root / "wide" / "config.json").read_text())
    wide["model_args"]["img_size"] = [16, 20]
    (root / "wide" / "config.json").write_text(json.dumps(wide))
    write_images(root / "images", ("cat", "dog", "elk"), 4)
    write_images(root / "others", ("ape", "dog", "elk"), 4)
    return root


def ok(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[dict[str, Any], str]:
    """What the command gave as JSON, and what it said."""
    status, out, err = growkit(capsys, *arguments, "--json")
    assert status == 0, err
    return json.loads(out), err


def test_grow_adapts_the_source_says_it_and_starts_where_timm_would_put_it(place, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(place)
    changed = {"img_size": 32, "patch_size": 4, "in_chans": 1}
    options = [word for item in sets(changed) for word in ("--set", item)]
    content, said = ok(capsys, "grow", "small", *TO, *options, "--run", tmp_path)
    assert content["step0_gap"] <= 1e-5
    assert "source adapted: img_size 16 -> 32, position embeddings resampled from 2 x 2 to 8 x 8" in said
    grown = timm.create_model(f"local-dir:{tmp_path / 'grown'}", pretrained=True).eval()
    assert (*grown.pretrained_cfg["input_size"],) == (1, 32, 32)
    assert len(grown.pretrained_cfg["mean"]) == 1
    small = timm.create_model(f"local-dir:{place / 'small'}", pretrained=True, **changed).eval()
    images = torch.randn(2, 1, 32, 32)
    with torch.no_grad():
        assert torch.allclose(grown(images), small(images), atol=1e-5)
    history = json.loads((tmp_path / "grown" / "growkit.json").read_text())
    assert history["source"]["adapted"] == [line for line in said.splitlines() if line.startswith("source adapted")]
    assert history["source"]["arguments"]["img_size"] == 32
    (step,) = json.loads((tmp_path / "record.json").read_text())["steps"]
    assert step["figures"]["adapted"] == history["source"]["adapted"]
    page, _ = ok(capsys, "report", "--run", tmp_path)
    assert "in_chans 3 -&gt; 1, channels of the patch kernels summed" in Path(page["report"]).read_text()


def test_plan_and_comparison_see_the_adapted_source(place, tmp_path, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setattr("growkit.plan.RANKS", (1,))
    source = source_of(KINDS["plain"], labels="".join("abcdefg"))
    asked = ["embed_dim=64", "depth=2", "num_heads=4", "img_size=32", "patch_size=4"]
    planned = plan_growth(source, "vit_tiny", asked, batch_size=2)
    assert planned.notes[0].startswith("source adapted: img_size 16 -> 32")
    assert planned.flops_per_step[0] > 8 * plan_growth(source, "vit_tiny", asked[:3], batch_size=2).flops_per_step[0]
    lines: list[str] = []
    bench = bench_of(
        Job(RunFolder(tmp_path), "cpu", say=lines.append),
        tmp_path,
        replace(source, labels=NAMES),
        "vit_tiny",
        "images",
        FitSettings(workers=0, batch_size=4),
        split=CompareSettings(),
        sets=asked,
    )
    with torch.no_grad():
        wanted = with_input(source, asked).model()(torch.ones(1, 3, 32, 32))
        got = bench.source.model()(torch.ones(1, 3, 32, 32))
    assert torch.allclose(got, wanted[:, [NAMES.index(name) for name in ("cat", "dog", "elk")]], atol=1e-6)
    assert bench.target.shapes["pos_embed"] == (1, 65, 64)
    assert next(iter(bench.data.train))[0].shape == (3, 32, 32)
    assert [line.partition(" -> ")[0] for line in lines[:2]] == [
        "source adapted: img_size 16",
        "source adapted: patch_size 8",
    ]


def test_data_of_some_of_the_sources_classes_keeps_what_the_head_knows(place, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(place)
    content, said = ok(capsys, "grow", "small", *TO, "--data", "images", "--steps", 1, *QUICK, "--run", tmp_path)
    assert "source adapted: of the head's 7 classes the data's 3 are kept, by their names" in said
    assert content["scores"]["step0"] == pytest.approx(content["scores"]["source"], abs=1e-5)
    config = json.loads((tmp_path / "grown" / "config.json").read_text())
    assert (config["num_classes"], config["label_names"]) == (3, ["cat", "dog", "elk"])
    small = timm.create_model("local-dir:small", pretrained=True).eval()
    prepare, rows, loss = timm.data.create_transform(**timm.data.resolve_model_data_config(small)), [3, 5, 1], []
    for row, name in enumerate(("cat", "dog", "elk")):
        for path in (place / "images" / "val" / name).iterdir():
            with torch.no_grad():
                logits = small(prepare(Image.open(path))[None])[:, rows]
            loss.append(float(torch.nn.functional.cross_entropy(logits, torch.tensor([row]))))
    assert content["scores"]["source"]["loss"] == pytest.approx(sum(loss) / len(loss), rel=1e-4)
    _, said = ok(capsys, "finetune", "small", "--data", "images", "--steps", 1, *QUICK, "--run", tmp_path / "tuned")
    assert "of the head's 7 classes the data's 3 are kept" in said
    _, said = ok(capsys, "finetune", "small", "--data", "others", "--steps", 1, *QUICK, "--run", tmp_path / "other")
    assert "the source has 7 classes, the data 3: a new head starts from scratch" in said


MISTAKES = {
    "two numbers": (("grow", "small", *TO, "--set", "img_size=(32, 16)"), "give one number"),
    "a word": (("plan", "small", *TO, "--set", "img_size=big"), "--set img_size=big: expected a whole number"),
    "patch above the image": (("grow", "small", *TO, "--set", "patch_size=32"), "images 16 wide hold no patch of 32"),
    "classes not the data's": (
        ("grow", "small", *TO, "--data", "images", "--set", "num_classes=5"),
        "--set num_classes=5: the data has 3 classes; leave it out",
    ),
    "channels that images do not have": (
        ("grow", "small", *TO, "--data", "images", "--set", "in_chans=4"),
        "--data images: the model reads 4 channels, and images have 1 or 3",
    ),
    "source for images that are not square": (("grow", "wide", *TO), "reads images of 16 x 20; growkit grows square"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_cannot_be_adapted_is_one_line_and_nothing_is_written(mistake, place, capsys, monkeypatch):
    monkeypatch.chdir(place)
    arguments, said = MISTAKES[mistake]
    before = listing(place)
    status, _, err = growkit(capsys, *arguments)
    assert (status, err.count("\n")) == (2, 1)
    assert said in err
    assert listing(place) == before
