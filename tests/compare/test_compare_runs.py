"""A whole comparison in seconds: what is paired, what is kept, what is refused, what is scored once."""

import html
import json
import re
import shutil
import signal
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import timm
import torch
from compare_samples import LARGE, RECIPE, options
from typer.testing import CliRunner

from growkit import files
from growkit.compare import bench as bench_module
from growkit.compare.arms import LONGER, SCRATCH, Arm, parse_arm
from growkit.compare.bench import Bench, bench_of
from growkit.compare.compare import Comparison, compare_methods
from growkit.compare.page import _reading, comparison_report, plots, write_pages
from growkit.compare.savings import Estimate, Saving, estimate
from growkit.errors import GrowkitError, UnwritableError
from growkit.grow import grow
from growkit.job import Job
from growkit.pictures import UnreadablePictureError
from growkit.ranges import SEEDS
from growkit.record import RunFolder
from growkit.report.plot import draw
from growkit.settings import GrowSettings
from growkit.train import loop
from growkit.train.data import open_data
from growkit.train.loop import fit
from growkit.train.score import score_model
from growkit.train.training import Training
from growkit_cli.main import app


def run_compare(folder, source, digits, settings, recipe=RECIPE, **more):
    run = RunFolder(folder, command_line="growkit compare ...")
    return compare_methods(Job(run, "cpu", **more), source, "deit_tiny", digits, settings, recipe, sets=LARGE)


def runs_of(folder: Path) -> dict[str, dict]:
    """Every result on file, without the times."""
    found = {}
    for path in sorted((folder / "compare" / "runs").glob("*/result.json")):
        content = json.loads(path.read_text())
        found[path.parent.name] = {k: v for k, v in content.items() if "seconds" not in k and "per_second" not in k}
    return found


@pytest.fixture(scope="module")
def whole(source, digits, tmp_path_factory):
    """Two methods with all controls, two seeds, two budgets, two rates."""
    folder = tmp_path_factory.mktemp("whole")
    settings = options(
        controls="random-pad,untrained-source,untrained-operator,source-longer",
        seeds=2,
        budgets="0.5,1",
        lrs="1e-3,4e-3",
    )
    return folder, run_compare(folder, source, digits, settings)


@pytest.fixture(scope="module")
def begun(source, digits, tmp_path_factory):
    """A comparison of one method, which tests go on with in copies of their own."""
    folder = tmp_path_factory.mktemp("begun")
    run_compare(folder, source, digits, options(methods="lemon"), replace(RECIPE, precision="auto"))
    return folder / "compare"


def test_every_arm_has_figures_for_every_budget_and_seed(whole):
    _, compared = whole
    names = [arm.name for arm in compared.arms]
    assert names[:3] == ["from scratch", "mango", "lemon"]
    assert len(names) == 7
    for arm in compared.arms:
        assert [found.budget for found in arm.budgets] == [0.5, 1.0]
        assert not arm.failures, arm.failures
        assert all(found.top1.count == 2 for found in arm.budgets)
        assert not arm.failures
        assert len(arm.flops_to_target) == 2


def test_lossless_methods_start_at_the_sources_score(whole):
    _, compared = whole
    source_top1 = compared.content["source_score"]["top1"]
    by_name = {arm.name: arm for arm in compared.arms}
    assert by_name["mango"].step0.mean == pytest.approx(source_top1)
    assert by_name["lemon"].step0.mean == pytest.approx(source_top1)
    assert by_name["mango, source untrained"].step0.mean < source_top1 - 0.1
    assert by_name["from scratch"].step0 is None


def test_every_arm_spends_the_same_budget_operator_included(whole):
    _, compared = whole
    full = compared.content["full_flops"]
    for run in compared.content["runs"]:
        left = run["budget"] * full - run["flops"]
        assert -1e-6 * full < left < run["flops_per_step"]
    mango = next(run for run in compared.content["runs"] if run["arm"] == "mango")
    assert mango["operator_flops"] == compared.arms[1].operator_flops > 0
    assert mango["operator_seconds"] > 0
    assert mango["flops"] == mango["operator_flops"] + mango["steps"] * mango["flops_per_step"]
    assert mango["flops_per_step"] == 2 * mango["macs_per_step"]


def test_rates_are_chosen_on_the_first_seed_by_held_out_images(whole):
    _, compared = whole
    runs = compared.content["runs"]
    for arm in ("from scratch", "mango"):
        for budget in (0.5, 1.0):
            mine = [run for run in runs if (run["arm"], run["budget"]) == (arm, budget)]
            first = {run["lr"]: run for run in mine if run["seed"] == 0}
            assert set(first) == {1e-3, 4e-3}
            best = max(first.values(), key=lambda run: run["final"]["top1"])
            assert [run["lr"] for run in mine if run["seed"] == 1] == [best["lr"]]
            assert [run["lr"] for run in mine if run["test"] is not None] == [best["lr"]] * 2


def test_curve_begins_at_step_0_and_ends_at_the_final_score(whole):
    _, compared = whole
    run = next(r for r in compared.content["runs"] if r["arm"] == "mango" and r["budget"] == 1)
    assert run["curve"][0][:2] == [0, run["step0"]["top1"]]
    assert run["curve"][1] == [run["operator_flops"], run["started_from"]["top1"], run["started_from"]["loss"]]
    assert run["curve"][-1] == [run["flops"], run["final"]["top1"], run["final"]["loss"]]
    mango, place = compared.arms[1], [flops for flops, _ in compared.arms[1].curve].index(run["operator_flops"])
    assert (mango.step0, mango.after_operator) == (mango.curve[0][1], mango.curve[place][1])


def test_report_has_all_that_makes_the_result(whole):
    folder, _ = whole
    page = (folder / "compare" / "report.html").read_text()
    for word in ("mango", "from scratch", "growkit compare ...", "smoothing", "torch", "cores", "source untrained"):
        assert word in page
    for plot in ("curves", "final", "saving"):
        for kind in ("svg", "png"):
            assert (folder / "compare" / "plots" / f"{plot}.{kind}").stat().st_size > 1000
    assert "Best at the edge of the grid of rates" not in page  # there are but two, and no middle
    content = json.loads((folder / "compare" / "results.json").read_text())
    assert content["arm_settings"]["mango"]["grow"]["noise"] == 1.0
    assert content["recipe"]["batch_size"] == 64
    assert content["versions"]["torch"]
    assert len(content["runs"]) == 7 * 2 * 3


def test_summary_names_the_test_images_the_sources_score_and_arms_that_end_below_their_start(whole):
    folder, compared = whole
    images, own = compared.content["images"]["test images"], compared.content["source_score"]["top1"]
    curve = ((0, estimate([0.9])), (1, estimate([0.5])))
    arms = [replace(arm, curve=curve) if arm.name == "mango" else arm for arm in compared.arms]
    write_pages(folder, compared.content, arms)
    for name in ("report.html", "results.md"):
        page = html.unescape((folder / name).read_text())
        assert f"2 paired seeds, {images} test images, one of which is {100 / images:.2g} points of top-1." in page
        assert f"The source itself has top-1 {own:.1%} on the held-out images." in page
        assert re.search("Beware: worse at the end than at the start: .*mango", page)
    lines = comparison_report({**compared.content, "full_flops": 4e12}, arms).summary
    assert any("after 4.000 TFLOP (2.000 T multiply-adds)." in line for line in lines)
    earlier = {key: value for key, value in compared.content.items() if key not in ("own_head", "source_score")}
    for content in ({**compared.content, "own_head": False}, earlier):
        lines = comparison_report(content, arms).summary
        assert not any(line.startswith("The source itself") for line in lines)


def test_what_the_tables_cannot_tell_is_said_above_them(whole):
    _, compared = whole
    for seeds, lr in ((1, 1e-3), (2, 2e-3), (2, 4e-3)):
        budgets = (replace(compared.arms[1].budgets[-1], lr=lr),)
        told = _reading({"seeds": seeds, "lrs": "1e-3,2e-3,4e-3"}, [replace(compared.arms[1], budgets=budgets)])
        assert ("One seed has none" in told) is (seeds == 1)
        assert ("Best at the edge of the grid of rates" in told) is (lr != 2e-3)


def test_what_is_drawn_of_a_share_stays_between_0_and_100_percent(whole):
    _, compared = whole
    wide = Estimate(0.5, -0.6, 1.7, 2)
    full = replace(compared.arms[1].budgets[-1], top1=wide)
    saved = Saving(0.5, -0.6, 1.7, 2, 2)
    arm = replace(compared.arms[1], curve=((0, wide), (1, wide)), budgets=(full,), saving=saved)
    drawn = plots([arm, arm], "top1")
    assert [drawn["curves"].series[0].low, drawn["curves"].series[0].high] == [[0, 0], [100, 100]]
    assert (drawn["final"].bars[0].low, drawn["final"].bars[0].high) == (0, 100)
    assert (drawn["saving"].bars[0].low, drawn["saving"].bars[0].high) == (-60, 100)
    assert plots([arm, arm], "loss")["curves"].series[0].high == [1.7, 1.7]
    ticks = re.findall(
        r">([−\d]+)</text>", draw(replace(drawn["final"], bars=[replace(drawn["final"].bars[0], note="n" * 30)]))
    )
    assert ticks[-1] == "100"


def test_weights_of_runs_are_let_go(whole):
    folder, _ = whole
    assert not list((folder / "compare").rglob("*.safetensors"))
    assert not list((folder / "compare").rglob("state.pt"))


def test_untrained_source_cost_nothing_and_the_trained_one_the_same_for_every_arm(whole):
    _, compared = whole
    by_name = {arm.name: arm for arm in compared.arms}
    untrained, spent = by_name["mango, source untrained"], compared.content["source_flops"]
    for arm in (untrained, by_name[SCRATCH]):
        assert arm.saving_including_source == arm.saving
    share = sum(spent / alone for alone in by_name[SCRATCH].flops_to_target) / 2
    for arm in (by_name["mango"], by_name["random-pad"], by_name[LONGER]):
        assert arm.saving.mean - arm.saving_including_source.mean == pytest.approx(share)


def test_resumed_comparison_runs_nothing_again_and_may_ask_for_more(whole, source, digits, tmp_path, monkeypatch):
    folder, compared = whole
    shutil.copytree(folder / "compare", tmp_path / "compare")
    trained = []
    train = Bench.train

    def noting(self, start, arm, **more):
        trained.append(arm.name)
        return train(self, start, arm, **more)

    monkeypatch.setattr(Bench, "train", noting)
    settings = options(**{**compared.content["settings"], "methods": "mango,lemon,bert2bert"})
    counts, run = [], Comparison.run
    monkeypatch.setattr(Comparison, "run", lambda self: (run(self), counts.append((self.finished, self.total)))[0])
    more = run_compare(tmp_path, source, digits, settings, resume=True)
    assert set(trained) == {"bert2bert"}
    assert counts == [(48, 48)]  # what is there already counts, too
    assert [arm.name for arm in more.arms[:4]] == ["from scratch", "mango", "lemon", "bert2bert"]
    assert more.arms[1] == compared.arms[1]


def test_test_images_are_scored_once_for_each_chosen_run_alone(source, digits, tmp_path, monkeypatch):
    scored = []
    score = Bench.score

    def counting(self, model, *, test=False):
        if test:
            scored.append(1)
        return score(self, model, test=test)

    monkeypatch.setattr(Bench, "score", counting)
    settings, recipe = options(methods="lemon", lrs="1e-5,2e-5,4e-3"), replace(RECIPE, epochs=10)
    compared = run_compare(tmp_path, source, digits, settings, recipe)
    assert len(scored) == 2  # of six runs, two are chosen
    assert {arm.budgets[-1].lr for arm in compared.arms} == {4e-3}
    page = (tmp_path / "compare" / "report.html").read_text()
    assert "Best at the edge of the grid of rates, so that a wider one may serve better: from scratch, lemon." in page


def test_source_is_scored_once_whoever_asks(source, digits, tmp_path, monkeypatch):
    sizes = []
    score = Bench.score

    def counting(self, model, *, test=False):
        sizes.append((model.embed_dim, test))
        return score(self, model, test=test)

    monkeypatch.setattr(Bench, "score", counting)
    settings = options(methods="lemon", controls="source-longer", lrs="1e-3,2e-3", seeds=2)
    recipe = replace(RECIPE, eval_every=0.0)
    compared = run_compare(tmp_path, source, digits, settings, recipe)
    own = source.model().embed_dim
    longer = [run for run in compared.content["runs"] if run["arm"] == LONGER]
    assert len(longer) == 3
    assert all(run["step0"] == compared.content["source_score"] for run in longer)
    trained = sum(len(run["curve"]) - 1 for run in longer)
    assert sizes.count((own, False)) == 1 + trained
    grown = [run for run in compared.content["runs"] if run["arm"] == "lemon"]
    alone = [run for run in compared.content["runs"] if run["arm"] == SCRATCH]
    trained = sum(len(run["curve"]) - 1 for run in grown) + sum(len(run["curve"]) for run in alone)
    assert sizes.count((2 * own, False)) == 2 + trained  # the start of each seed, not of each of three runs


def test_unreadable_images_are_named_though_nothing_is_left_to_run(source, digits, tmp_path):
    images = tmp_path / "images"
    shutil.copytree(digits, images)
    broken = sorted((images / "train").rglob("*.png"))[3]
    broken.write_bytes(b"no picture")
    settings, recipe = options(methods="lemon", lrs="1e-3", share=1), replace(RECIPE, steps=2)
    first = run_compare(tmp_path, source, str(images), settings, recipe)
    again = run_compare(tmp_path, source, str(images), settings, recipe, resume=True)
    assert first.content["unreadable"] == again.content["unreadable"]
    (line,) = again.content["unreadable"]
    assert line.startswith(f"{broken}: not a readable picture")


def test_stopped_comparison_ends_bit_for_bit_where_an_unbroken_one_does(source, digits, tmp_path, monkeypatch):
    settings = options(methods="mango", evals=2)
    recipe = replace(RECIPE, epochs=3, save_seconds=0, log_every=1)
    run_compare(tmp_path / "unbroken", source, digits, settings, recipe)
    fit, clock, late, stopped = bench_module.fit, time.perf_counter, [0], set()
    monkeypatch.setattr(time, "perf_counter", lambda: clock() + late[0])

    def stopping(model, *args, folder, **kwargs):
        watch = kwargs.pop("on_step") or (lambda record: None)

        def once(record):
            watch(record)
            if folder not in stopped and record.step == 1:
                late[0] += 1000
            elif folder not in stopped:
                stopped.add(folder)
                raise KeyboardInterrupt

        return fit(model, *args, folder=folder, on_step=once, **kwargs)

    monkeypatch.setattr(bench_module, "fit", stopping)
    stops = 0
    while not (tmp_path / "stopped" / "compare" / "results.json").exists():
        try:
            run_compare(tmp_path / "stopped", source, digits, settings, recipe, resume=True)
        except KeyboardInterrupt:
            stops += 1
    names = {folder.parent.name + "/" + folder.name.split("-")[0] for folder in stopped}
    assert names == {"runs/from", "starts/mango", "runs/mango"}
    assert stops == 3
    assert runs_of(tmp_path / "stopped") == runs_of(tmp_path / "unbroken")
    for path in (tmp_path / "stopped" / "compare" / "runs").glob("*/result.json"):
        found = json.loads(path.read_text())
        assert found["seconds"] // 1000 == 1  # of both parts
        assert found["operator_seconds"] // 1000 == (found["arm"] == "mango")


def test_run_whose_saved_state_is_damaged_has_not_failed_and_is_made_anew(begun, source, digits, tmp_path):
    shutil.copytree(begun, tmp_path / "compare")
    for run in (tmp_path / "compare" / "runs").iterdir():
        (run / "result.json").unlink()
        (run / "state.pt").write_bytes(b"PK\x03\x04 cut off")
    lines = []
    run_compare(tmp_path, source, digits, options(methods="lemon"), resume=True, say=lines.append)
    assert runs_of(tmp_path) == runs_of(begun.parent)
    assert sum(line.endswith("state.pt: damaged; trained anew") for line in lines) == 2


@pytest.mark.parametrize("damaged", [False, True])
def test_run_whose_weights_are_gone_or_damaged_before_its_test_is_made_again(begun, source, digits, tmp_path, damaged):
    shutil.copytree(begun, tmp_path / "compare")
    for path in (tmp_path / "compare" / "runs").glob("*/result.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "test": None}))
        if damaged:
            path.with_name("model.safetensors").write_bytes(b"cut off")
    lines = []
    run_compare(tmp_path, source, digits, options(methods="lemon"), resume=True, say=lines.append)
    assert runs_of(tmp_path) == runs_of(begun.parent)
    assert sum(line.endswith("model.safetensors: damaged; trained anew") for line in lines) == 2 * damaged


def test_operator_whose_kept_weights_are_damaged_is_trained_again(source, digits, tmp_path):
    bench = bench_of(
        Job(RunFolder(tmp_path), "cpu"),
        tmp_path,
        source,
        "deit_tiny",
        digits,
        RECIPE,
        split=options(),
        operator_steps=2,
        sets=LARGE,
    )
    first = bench.start(parse_arm("mango"), 0, 1e-3)
    next(tmp_path.rglob("model.safetensors")).write_bytes(b"cut off")
    again = bench.start(parse_arm("mango"), 0, 1e-3)
    assert again.after_operator == first.after_operator
    assert all(torch.equal(first.model.state_dict()[name], value) for name, value in again.model.state_dict().items())


def failing_train(monkeypatch, fails):
    """Let every run of which `fails` says so fail; gives what lets them be."""
    train = Bench.train

    def failing(self, start, arm, **more):
        if fails(arm.name, more):
            raise RuntimeError("out of memory\nmore words")
        return train(self, start, arm, **more)

    monkeypatch.setattr(Bench, "train", failing)
    return lambda: monkeypatch.setattr(Bench, "train", train)


def test_rate_that_failed_is_not_chosen_after_all_when_it_works_again(source, digits, tmp_path, monkeypatch):
    mend = failing_train(monkeypatch, lambda arm, run: arm == "lemon" and run["lr"] == 4e-3)
    settings = options(methods="lemon", lrs="1e-5,4e-3", seeds=2)  # the one that fails is the better
    first = run_compare(tmp_path, source, digits, settings)
    mend()
    again = run_compare(tmp_path, source, digits, settings, resume=True)
    assert again.arms[1].budgets == first.arms[1].budgets
    assert again.arms[1].failures == first.arms[1].failures != ()  # nor is it run again
    assert (again.arms[1].budgets[-1].lr, again.arms[1].budgets[-1].top1.count) == (1e-5, 2)
    assert len(again.arms[1].flops_to_target) == 2


def test_seed_that_failed_counts_as_one_that_never_got_there(source, digits, tmp_path, monkeypatch):
    failing_train(monkeypatch, lambda arm, run: arm == "lemon" and run["seed"] == 1)
    arm = run_compare(tmp_path, source, digits, options(methods="lemon", seeds=3)).arms[1]
    assert len(arm.failures) == 1
    assert arm.flops_to_target[1] is None
    assert arm.saving.bound
    assert (arm.saving.reached, arm.saving.seeds) == (sum(cost is not None for cost in arm.flops_to_target), 3)
    full = arm.budgets[-1]
    assert (full.top1.count, full.seeds, full.top1.low) == (2, 3, None)
    text = (tmp_path / "compare" / "results.md").read_text()
    (row, cost) = (line.split(" | ") for line in text.splitlines() if line.startswith("| lemon"))
    assert [cell.endswith("(2 of 3)") for cell in row[2:4]] == [True, True]  # score, and how far it is ahead
    assert not any("±" in cell for cell in (*row, *cost))
    assert all(point.low is None for _, point in arm.curve)


def test_seed_of_which_training_from_scratch_failed_leaves_no_interval(source, digits, tmp_path, monkeypatch):
    failing_train(monkeypatch, lambda arm, run: arm == "from scratch" and run["seed"] == 1)
    scratch, lemon = run_compare(tmp_path, source, digits, options(methods="lemon", seeds=3)).arms
    assert len(scratch.failures) == 1
    assert (lemon.budgets[-1].top1.count, lemon.budgets[-1].top1.low is None) == (3, False)
    assert (lemon.budgets[-1].ahead.count, lemon.budgets[-1].ahead.low) == (2, None)
    assert lemon.saving.low is lemon.saving.high is None
    text = (tmp_path / "compare" / "results.md").read_text()
    (row, cost) = (line.split(" | ") for line in text.splitlines() if line.startswith("| lemon"))
    assert row[3].endswith("(2 of 3)")
    assert "±" in row[2]
    assert "±" not in cost[4]  # TFLOP to the target


def test_run_that_fails_on_the_test_images_does_not_end_the_others(source, digits, tmp_path, monkeypatch):
    fresh, asked = Bench.fresh, []

    def failing(self, arm):  # of a run that is to be tested, its network is made anew
        asked.append(arm.name)
        if asked.count("lemon") == 1 == len(asked) - asked.index("lemon"):
            raise GrowkitError("the model's outputs are not finite")
        return fresh(self, arm)

    monkeypatch.setattr(Bench, "fresh", failing)
    lines, settings = [], options(methods="lemon,net2net", seeds=2, lrs="1e-3,2e-3")
    compared = run_compare(tmp_path, source, digits, settings, say=lines.append)
    _, lemon, net2net = compared.arms
    (failure,) = lemon.failures
    assert failure.endswith("on the test images: the model's outputs are not finite")
    assert (lemon.budgets[-1].top1.count, lemon.budgets[-1].top1.low) == (1, None)
    assert net2net.budgets[-1].top1.count == 2
    assert any("failed on the test images, the others go on" in line for line in lines)
    tested = {(r["seed"], r["lr"]) for r in compared.content["runs"] if r["arm"] == "lemon" and r["test"]}
    trained = []
    monkeypatch.setattr(Bench, "train", lambda *given, **_: trained.append(given))
    again = run_compare(tmp_path, source, digits, settings, resume=True)
    assert trained == []
    assert again.arms[1].failures == ()
    assert again.arms[1].budgets[-1].top1.count == 2
    both = {(r["seed"], r["lr"]) for r in again.content["runs"] if r["arm"] == "lemon" and r["test"]}
    ((_, rate),) = tested
    assert both == {(0, rate), (1, rate)}  # the rate that the first seed chose
    assert not list((tmp_path / "compare").rglob("*.safetensors"))


def test_operator_that_fails_at_every_rate_is_tried_once_at_each(source, digits, tmp_path, monkeypatch):
    start, tried = Bench.start, []

    def failing(self, arm, seed, operator_lr, *rest):
        if arm.name == "mango":
            tried.append(operator_lr)
            raise GrowkitError("the loss is nan")
        return start(self, arm, seed, operator_lr, *rest)

    monkeypatch.setattr(Bench, "start", failing)
    settings = options(methods="mango,lemon", operator_lrs="1e-3,1e-2", budgets="0.5,1", lrs="1e-3,2e-3")
    _, mango, lemon = run_compare(tmp_path, source, digits, settings).arms
    assert sorted(tried) == [1e-3, 1e-2]
    assert len(mango.failures) == 4
    assert "its operator failed at every rate of 1e-3,1e-2" in mango.failures[0]
    assert lemon.failures == ()


def test_arms_that_end_below_their_start_are_named_and_training_from_scratch_has_none(
    begun, source, digits, tmp_path, monkeypatch
):
    shutil.copytree(begun, tmp_path / "compare")
    monkeypatch.setattr("growkit.compare.figures._ends_below_start", lambda arm, metric: True)
    lines = []
    run_compare(tmp_path, source, digits, options(methods="lemon"), resume=True, say=lines.append)
    assert "warning: worse at the end than at the start: lemon; try lower --lrs, or more --epochs or --steps" in lines


def test_failing_method_does_not_lose_the_others_and_is_tried_again(source, digits, tmp_path, monkeypatch):
    start = Bench.start

    def failing(self, arm, *args, **kwargs):
        if arm.name == "lemon":
            raise RuntimeError("out of memory\nmore words")
        return start(self, arm, *args, **kwargs)

    monkeypatch.setattr(Bench, "start", failing)
    lines = []
    settings = options(methods="net2net,lemon", seeds=2)
    compared = run_compare(tmp_path, source, digits, settings, say=lines.append)
    by_name = {arm.name: arm for arm in compared.arms}
    assert by_name["lemon"].failures == ("budget 100%, seed 0, lr 0.002: out of memory",)
    assert by_name["lemon"].saving is None
    assert by_name["net2net"].saving is not None
    assert any("failed, the others go on (out of memory)" in line for line in lines)
    assert "Failed runs" in (tmp_path / "compare" / "report.html").read_text()
    monkeypatch.setattr(Bench, "start", start)
    again = run_compare(tmp_path, source, digits, settings, resume=True)
    assert again.arms[2].failures == ()
    assert again.arms[2].budgets[-1].top1.count == 2


@pytest.mark.parametrize("kind", [UnreadablePictureError, UnwritableError])
def test_what_every_run_would_meet_ends_a_comparison_and_is_no_run_that_failed(
    source, digits, tmp_path, monkeypatch, kind
):
    def meeting(*_, **__):
        raise kind("run/compare: as every other run would find it")

    monkeypatch.setattr(Bench, "train", meeting)
    with pytest.raises(kind):
        run_compare(tmp_path, source, digits, options(methods="lemon"))
    assert runs_of(tmp_path) == {}


def test_a_comparison_that_is_stopped_in_the_last_scoring_of_a_run_ends_and_goes_on(
    source, digits, tmp_path, monkeypatch
):
    fit, asked = bench_module.fit, []

    def stopping(*given, evaluate, **more):
        def judge(model):
            if not asked:
                asked.append(True)
                signal.raise_signal(signal.SIGINT)
            return evaluate(model)

        return fit(*given, evaluate=judge, **more)

    monkeypatch.setattr(bench_module, "fit", stopping)
    with pytest.raises(KeyboardInterrupt):
        run_compare(tmp_path, source, digits, options(methods="lemon", evals=1))
    assert asked
    assert not (tmp_path / "compare" / "results.json").exists()
    again = run_compare(tmp_path, source, digits, options(methods="lemon", evals=1), resume=True)
    assert all(arm.budgets[-1].top1 is not None for arm in again.arms)


def test_operator_whose_scoring_is_stopped_is_not_trained_again(source, digits, tmp_path, monkeypatch):
    score, updates, stopped = Bench.score, [], []

    def stopping(self, model, *, test=False):
        if (self.folder / "starts" / "mango-s0-lr0.001" / "model.safetensors").exists() and not stopped:
            stopped.append(True)
            raise KeyboardInterrupt
        return score(self, model, test=test)

    update = Training.update
    monkeypatch.setattr(Bench, "score", stopping)
    monkeypatch.setattr(Training, "update", lambda *given: (updates.append(given[1]), update(*given))[1])
    settings = options(methods="mango")
    with pytest.raises(KeyboardInterrupt):
        run_compare(tmp_path, source, digits, settings)
    made = len(updates)
    compared = run_compare(tmp_path, source, digits, settings, resume=True)
    (run,) = [run for run in compared.content["runs"] if run["arm"] == "mango"]
    assert len(updates) == made + run["steps"]
    assert not list((tmp_path / "compare").rglob("state.pt"))


def test_same_seed_same_images_in_the_same_order_for_every_arm(source, digits, tmp_path, monkeypatch):
    seen = {}
    train, order = Bench.train, loop.train_batches
    current = []

    def watching(data, settings, first, last, **more):
        for images, labels in order(data, settings, first, last, **more):
            if last - first > 1:
                seen.setdefault(current[-1], []).append((labels.tolist(), images.sum().item()))
            yield images, labels

    def training(self, start, arm, **more):
        current.append((arm.name, more["seed"]))
        return train(self, start, arm, **more)

    monkeypatch.setattr(loop, "train_batches", watching)
    monkeypatch.setattr(Bench, "train", training)
    run_compare(tmp_path, source, digits, options(methods="lemon,bert2bert", seeds=2))
    assert seen["from scratch", 0] == seen["lemon", 0] == seen["bert2bert", 0]
    assert seen["from scratch", 1] == seen["lemon", 1] != seen["lemon", 0]


def test_every_seed_draws_its_own_weights_noise_and_order_of_the_operators_images(
    source, digits, tmp_path, monkeypatch
):
    job, mango, asked = Job(RunFolder(tmp_path), "cpu"), parse_arm("mango"), []
    bench = bench_of(job, tmp_path, source, "deit_tiny", digits, RECIPE, split=options(), sets=LARGE)
    arms = [Arm(SCRATCH), mango, replace(mango, name="mango, source untrained", fresh_source=True)]
    monkeypatch.setattr(bench_module, "fit", lambda model, data, recipe, **_: asked.append(recipe.seed) or sys.exit(0))

    def drawn(architecture, seed):
        torch.manual_seed(seed)
        return timm.create_model(architecture.name, **architecture.arguments).state_dict()

    for seed in (0, 1):
        states = source.state, drawn(source.architecture, seed)
        grown = [grow(source.architecture, bench.target, state, GrowSettings(seed=seed)) for state in states]
        expected = [drawn(bench.target, seed), *(one.materialize().state_dict() for one in grown)]
        for arm, weights in zip(arms, expected, strict=True):
            found = bench.start(arm, seed, None).model.state_dict()
            assert [name for name in weights if not torch.equal(found[name], weights[name])] == []
        with pytest.raises(SystemExit):
            bench.start(mango, seed, 1e-3)
    assert asked == [0, 1]


def test_held_out_and_test_images_are_scored_apart_and_are_all_there_are(source, digits, tmp_path):
    job, split, model = Job(RunFolder(tmp_path), "cpu"), options(hold_out=0.2), source.model()
    bench = bench_of(job, tmp_path, source, "deit_tiny", digits, RECIPE, split=split, sets=LARGE)
    held_out, test = (bench.score(model, test=test) for test in (False, True))
    whole = score_model(model, open_data(digits, source.preprocessing, RECIPE), RECIPE, bench.device)
    assert held_out.count + test.count == whole.count
    assert held_out.count == pytest.approx(0.2 * whole.count, abs=5)  # whole images of each class
    assert held_out.top1 * held_out.count + test.top1 * test.count == pytest.approx(whole.top1 * whole.count)


def test_options_of_the_recipe_that_mean_nothing_are_told(source, digits, tmp_path):
    lines, recipe = [], replace(RECIPE, sched="constant", min_lr=1e-6, model_ema_decay=0.9)
    job = Job(RunFolder(tmp_path), "cpu", say=lines.append)
    bench_of(job, tmp_path, source, "deit_tiny", digits, recipe, split=options(), sets=LARGE)
    assert [line for line in lines if line.startswith("warning")] == [
        "warning: --model-ema-decay means nothing without --model-ema",
        "warning: --min-lr means nothing with --sched constant",
    ]


@pytest.mark.parametrize(
    ("settings", "recipe", "says"),
    [
        ({"methods": "mangoo"}, {}, "unknown method 'mangoo'; nearest: mango"),
        ({"methods": "bert2bert:variant=akki"}, {}, "--variant akki: not a variant of bert2bert; choose fpi or aki"),
        ({"methods": "lemon,stackbert"}, {}, "stackbert: embed grows .* methods that can: mango"),
        ({"operator_steps": 500}, {}, "mango: its operator takes .* leaves nothing of a budget .*at most"),
        ({"hold_out": 0.9999}, {}, "too few validation images"),
        ({"methods": "mango:noise=inf"}, {}, "--noise inf: expected 0 or more"),
        ({"seeds": 2}, {"seed": SEEDS}, f"--seed {SEEDS + 1}: expected 0 or more, and at most {SEEDS}"),
        ({"methods": "mango:lr=1e-5"}, {"min_lr": 1e-4}, "--min-lr 0.0001: expected at most the learning rate, 1e-05"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_read(
    source, digits, tmp_path, monkeypatch, settings, recipe, says
):
    monkeypatch.setattr(bench_module, "read_through", lambda *_, **__: pytest.fail("read"))
    with pytest.raises(GrowkitError, match=says):
        run_compare(tmp_path, source, digits, options(**settings), replace(RECIPE, **recipe))
    assert not (tmp_path / "compare").exists()


def test_comparison_that_is_there_is_neither_replaced_nor_mixed(begun, source, digits, tmp_path):
    settings = options(methods="lemon")
    shutil.copytree(begun, tmp_path / "compare")
    before = runs_of(tmp_path)
    with pytest.raises(GrowkitError, match="already exists; --resume goes on with it, --force replaces it"):
        run_compare(tmp_path, source, digits, settings)
    with pytest.raises(GrowkitError, match=r"begun with --smoothing 0\.0, not 0\.1"):
        run_compare(tmp_path, source, digits, settings, replace(RECIPE, smoothing=0.1), resume=True)
    with pytest.raises(GrowkitError, match="begun with --operator-steps 3, not 7; give the same"):
        run_compare(tmp_path, source, digits, options(methods="lemon", operator_steps=7), resume=True)
    with pytest.raises(GrowkitError, match=r"begun with --hold-out 0\.5, not 0\.2"):
        run_compare(tmp_path, source, digits, replace(settings, hold_out=0.2), resume=True)
    assert runs_of(tmp_path) == before


def test_folder_that_a_kill_left_half_emptied_is_replaced_again_and_a_link_stays(
    begun, source, digits, tmp_path, monkeypatch
):
    shutil.copytree(begun, tmp_path / "elsewhere")
    (tmp_path / "compare").symlink_to("elsewhere")
    settings = options(methods="lemon")

    remove = files._remove

    def killed(path: Path) -> None:
        if path.suffix != ".old":
            return remove(path)
        (path / "begun.json").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(files, "_remove", killed)
        with pytest.raises(KeyboardInterrupt):
            run_compare(tmp_path, source, digits, settings, force=True)
    assert json.loads((tmp_path / "compare" / "begun.json").read_text())["settings"]["methods"] == "lemon"
    assert list((tmp_path / "compare").iterdir()) == [tmp_path / "compare" / "begun.json"]
    run_compare(tmp_path, source, digits, replace(settings, lrs="1e-3"), force=True)
    assert {found["lr"] for found in runs_of(tmp_path).values()} == {1e-3}
    assert (tmp_path / "compare").is_symlink()


def test_weights_that_a_kill_left_after_the_test_go_with_the_next_start(begun, source, digits, tmp_path):
    shutil.copytree(begun, tmp_path / "compare")
    for run in (tmp_path / "compare" / "runs").iterdir():
        (run / "model.safetensors").touch()
    run_compare(tmp_path, source, digits, options(methods="lemon"), resume=True)
    assert list((tmp_path / "compare" / "runs").glob("*/model.safetensors")) == []


@pytest.mark.parametrize("name", ["begun.json", "result.json"])
def test_file_of_another_version_is_refused_by_name_and_left(begun, source, digits, tmp_path, name):
    settings = options(methods="lemon")
    shutil.copytree(begun, tmp_path / "compare")
    path = next((tmp_path / "compare").rglob(name))
    old = path.read_text().replace('"growkit": "', '"growkit": "0.0.')
    path.write_text(old)
    with pytest.raises(GrowkitError, match=rf"{name}: written by growkit 0\.0\."):
        run_compare(tmp_path, source, digits, settings, resume=True)
    assert path.read_text() == old


def test_moving_average_is_what_the_test_images_score_too(source, digits, tmp_path, monkeypatch):
    score, held_out = Bench.score, []

    def recording(self, model, *, test=False):
        if test:
            held_out.append(score(self, model))
        return score(self, model, test=test)

    monkeypatch.setattr(Bench, "score", recording)
    recipe = replace(RECIPE, model_ema=True, model_ema_decay=0.9)
    compared = run_compare(tmp_path, source, digits, options(methods="lemon"), recipe)
    assert [asdict(found) for found in held_out] == [run["final"] for run in compared.content["runs"]]


def test_operator_is_trained_again_where_another_budget_needs_what_was_let_go(source, digits, tmp_path, monkeypatch):
    trained = []
    fit = bench_module.fit

    def noting(model, *args, **kwargs):
        trained.append(type(model).__name__)
        return fit(model, *args, **kwargs)

    monkeypatch.setattr(bench_module, "fit", noting)
    first = run_compare(tmp_path, source, digits, options(methods="mango"))
    assert trained.count("GrownModel") == 1
    more = run_compare(tmp_path, source, digits, options(methods="mango", budgets="0.5,1"), resume=True)
    assert trained.count("GrownModel") == 2
    starts = [run["started_from"] for run in more.content["runs"] if run["arm"] == "mango"]
    assert starts == [first.content["runs"][1]["started_from"]] * 2


@pytest.mark.parametrize("changes", [{"grad_checkpointing": True}, {"grad_accum_steps": 2}])
def test_arms_pay_what_their_training_counts_and_it_is_counted_once(source, digits, tmp_path, monkeypatch, changes):
    recipe, given = replace(RECIPE, **changes), {"split": options(), "operator_steps": 3, "sets": LARGE}
    bench = bench_of(Job(RunFolder(tmp_path), "cpu"), tmp_path, source, "deit_tiny", digits, recipe, **given)
    mango, step = parse_arm("mango"), replace(recipe, steps=1)
    grown = grow(source.architecture, bench.target, source.state, mango.grow)
    operator = fit(grown, bench.data, replace(bench.operator, steps=1)).flops_per_step
    arms = {Arm(SCRATCH): None, Arm(LONGER, control=True): None, mango: 1e-3}
    counted = [fit(bench.fresh(arm), bench.data, step).flops_per_step for arm in arms]
    full = counted[0] * bench.costs.full.total
    monkeypatch.setattr(Training, "_count_flops", lambda *_: pytest.fail("counted again"))
    assert bench.costs.operator_flops(mango) == 3 * operator > 0
    for (arm, rate), flops in zip(arms.items(), counted, strict=True):
        run = bench.train(bench.start(arm, 0, rate), arm, flops=full, seed=0, lr=2e-3, evals=1)
        assert run["operator_flops"] == (3 * operator if rate else 0)
        assert run["flops_per_step"] == flops
        assert -1e-6 * full < full - run["flops"] < flops


def test_warm_up_is_the_same_share_of_every_run_and_leaves_operators_alone(source, digits, tmp_path, monkeypatch):
    fit, seen = bench_module.fit, []

    def noting(model, data, recipe, **more):
        seen.append((type(model).__name__, recipe.warmup_epochs, recipe.steps))
        return fit(model, data, recipe, **more)

    monkeypatch.setattr(bench_module, "fit", noting)
    recipe = replace(RECIPE, epochs=10, warmup_epochs=1)
    compared = run_compare(tmp_path, source, digits, options(methods="mango", budgets="0.25,1"), recipe)
    full = max(steps for _, _, steps in seen)
    assert not any(arm.failures for arm in compared.arms)
    assert {warmup for name, warmup, _ in seen if name == "GrownModel"} == {None}
    assert all(warmup == pytest.approx(steps / full) for name, warmup, steps in seen if name != "GrownModel")


def test_what_is_left_out_of_the_figures_is_told(whole, source, digits, tmp_path):
    folder, compared = whole
    shutil.copytree(folder / "compare", tmp_path / "compare")
    asked = {**compared.content["settings"], "controls": "none", "seeds": 1, "budgets": "1"}
    lines = []
    less = run_compare(tmp_path, source, digits, options(**asked), resume=True, say=lines.append)
    assert [arm.name for arm in less.arms] == ["from scratch", "mango", "lemon"]
    told = [line for line in lines if line.startswith("not in these figures")]
    left = sorted({arm.name for arm in compared.arms} - {arm.name for arm in less.arms})
    assert len(left) == 4
    assert [line.split(": ")[1].split(";")[0] for line in told] == [*left, "budget 0.5", "seed 1"]


@pytest.mark.parametrize("methods", ["mango,ligo", "ligo,mango:rank=4"])
def test_most_operator_steps_that_are_offered_are_taken(source, digits, tmp_path, methods):
    with pytest.raises(GrowkitError, match="at most") as refused:
        run_compare(tmp_path, source, digits, options(methods=methods, operator_steps=500))
    most = int(re.search(r"fewer --operator-steps \(at most (\d+) here", str(refused.value)).group(1))
    compared = run_compare(tmp_path, source, digits, options(methods=methods, operator_steps=most))
    assert not any(arm.failures for arm in compared.arms)
    with pytest.raises(GrowkitError, match="at most"):
        run_compare(tmp_path / "more", source, digits, options(methods=methods, operator_steps=most + 1))


def test_operator_that_takes_all_of_the_smallest_budget_is_told_with_remedies_that_work(source, digits, tmp_path):
    asked = options(methods="mango,ligo", budgets="0.25,1", operator_steps=5)
    with pytest.raises(GrowkitError) as refused:
        run_compare(tmp_path, source, digits, asked)
    told = str(refused.value)
    remedies = "train for more --epochs or --steps, give --budgets 1, or give it fewer "
    assert f" (25% of the full one, the smallest of --budgets); {remedies}" in told
    run_compare(tmp_path, source, digits, replace(asked, budgets="1"))
    for own, far in (("mango:steps=5", False), ("mango:steps=500", True)):
        with pytest.raises(GrowkitError, match=r"give it fewer steps= in --methods") as refused:
            run_compare(tmp_path / "own", source, digits, options(methods=own, budgets="0.25,1"))
        assert ("--budgets 1" in str(refused.value)) != far


def test_arm_of_which_nothing_came_out_fails_the_command(source, digits, tmp_path, monkeypatch):
    failing_train(monkeypatch, lambda arm, run: arm == "lemon")
    small = [w for item in LARGE for w in ("--set", item)]
    short = ["--steps", "2", "--batch-size", "64", "--scale-min", "0.8", "--color-jitter", "0", "--workers", "0"]
    words = ["--methods", "lemon", "--controls", "none", "--seeds", "1", "--lrs", "2e-3", "--budgets", "1"]
    command = ["compare", source.path, "--to", "deit_tiny", *small, "--data", digits, *words, *short]
    found = CliRunner().invoke(app, [*command, "--run", str(tmp_path / "run")])
    assert found.exit_code == 1
    assert "failed: lemon" in found.output
    assert (tmp_path / "run" / "compare" / "results.json").exists()


def test_resume_leaves_a_folder_alone_that_it_did_not_make(source, digits, tmp_path):
    (tmp_path / "compare").mkdir()
    (tmp_path / "compare" / "precious.txt").write_text("mine")
    with pytest.raises(GrowkitError, match="nothing to resume; --force replaces it"):
        run_compare(tmp_path, source, digits, options(methods="lemon"), resume=True)
    assert (tmp_path / "compare" / "precious.txt").read_text() == "mine"


def test_runs_on_other_images_are_not_mixed(begun, source, digits, tmp_path):
    shutil.copytree(begun, tmp_path / "compare")
    shutil.copytree(digits, tmp_path / "digits")
    place = next((tmp_path / "digits" / "val").rglob("*.png"))
    place.rename(place.with_stem("another"))
    with pytest.raises(GrowkitError, match=r"begun with other validation images \(some were added, removed or renamed"):
        run_compare(tmp_path, source, str(tmp_path / "digits"), options(methods="lemon"), resume=True)


def test_runs_of_another_machine_are_not_mixed(begun, source, digits, tmp_path):
    settings = options(methods="lemon")
    shutil.copytree(begun, tmp_path / "compare")
    written = tmp_path / "compare" / "begun.json"
    content = json.loads(written.read_text())
    assert content["machine"] == {"device": "cpu", "torch": torch.__version__}
    assert content["recipe"]["precision"] == content["operator"]["precision"] == "fp32"  # what auto is on a CPU
    written.write_text(json.dumps({**content, "machine": {**content["machine"], "device": "cuda"}}))
    with pytest.raises(GrowkitError, match="begun with device cuda, not cpu"):
        run_compare(tmp_path, source, digits, settings, resume=True)


def test_other_class_names_are_told(begun, source, digits, tmp_path):
    shutil.copytree(begun, tmp_path / "compare")
    lines = []
    named = replace(source, labels=tuple("abcdefghij"))
    run_compare(tmp_path, named, digits, options(methods="lemon"), resume=True, say=lines.append)
    told = "the source calls its classes a, b, c and 7 more, the data 0, 1, 2 and 7 more: they are taken in order"
    assert told in lines
