"""A pilot in seconds: what it asks, what it recommends, and that it goes on where it was stopped."""

import html
import json
import shlex
import shutil
import signal
import sys
import warnings
from collections import Counter
from dataclasses import asdict, fields, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from compare_samples import LARGE, RECIPE, SMALL
from optuna import TrialPruned
from optuna.pruners import SuccessiveHalvingPruner
from optuna.trial import TrialState
from pairs import PAIRS, randomised
from typer.main import get_command
from typer.testing import CliRunner

from growkit.compare import bench as bench_module
from growkit.compare import sweep as sweep_module
from growkit.compare.arms import parse_arm
from growkit.compare.bench import Bench, Start, bench_of
from growkit.compare.page import trials_table
from growkit.compare.recommend import _Choice, _choose, _commands, _reasons
from growkit.compare.settings import SweepSettings
from growkit.compare.space import SearchSpace
from growkit.compare.sweep import sweep_settings
from growkit.compare.trials import Tried
from growkit.errors import GrowkitError
from growkit.grow import grow
from growkit.job import Job
from growkit.methods import METHODS, ignored
from growkit.record import RunFolder
from growkit.settings import GrowSettings, Loading
from growkit.source import load_source
from growkit.train.data import size_of
from growkit.train.progress import follow_nothing
from growkit.train.score import Scores
from growkit.train.settings import FitSettings
from growkit_cli.main import app

QUICK = {
    "trials": 6,
    "rank_choices": "1,2",
    "ring_orders": "BOLI",
    "stage_choices": "both",
    "noises": "0.1",
    "operator_steps": "0,3",
    "operator_lrs": "1e-3",
    "lrs": "2e-3",
    "share": 0.1,
    "evals": 2,
}


def run_sweep(folder, source, digits, *, resume=False, say=print, follow=follow_nothing, **given):
    run, settings = RunFolder(folder, command_line="growkit sweep ..."), SweepSettings(**{**QUICK, **given})
    job = Job(run, "cpu", resume=resume, say=say, follow=follow)
    return sweep_settings(job, source, "deit_tiny", digits, settings, RECIPE, sets=LARGE)


@pytest.fixture(scope="module")
def swept(source, digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    return folder, run_sweep(folder, source, digits)


def test_every_combination_is_tried_where_there_are_few(swept):
    _, found = swept
    tried = {(one.options["rank"], one.options["steps"]) for one in found.tried}
    assert tried == {(1, 0), (1, 3), (2, 0), (2, 3)}
    assert all("ring_order" not in one.options for one in found.tried if one.options["rank"] == 1)
    assert all(one.state in ("finished", "stopped early") for one in found.tried)


def test_trials_cost_the_same_and_the_operator_is_in_it(swept):
    _, found = swept
    full = found.content["from_scratch"]["flops"]
    step = found.content["from_scratch"]["flops_per_step"]
    for one in found.tried:
        if one.state == "finished":
            assert one.flops == pytest.approx(full, abs=step)
            assert (one.operator_flops > 0) == (one.options["steps"] > 0)


def test_recommended_is_the_cheapest_of_those_as_good_as_the_best(swept):
    _, found = swept
    finished = [one for one in found.tried if one.state == "finished"]
    top = max(one.score for one in finished)
    count = found.content["from_scratch"]["final"]["count"]
    error = (top * (1 - top) / count) ** 0.5
    equal = [one for one in finished if one.score >= top - error]
    assert found.best in equal
    assert found.best.operator_flops == min(one.operator_flops for one in equal)


def parsed(command):
    """What growkit's own command line makes of a command: its name, settings by class, and other arguments."""
    words = shlex.split(command)
    context = get_command(app).commands[words[1]].make_context(words[1], words[2:])
    given = dict(context.params)
    fitting = {f.name: given[f.name] for f in fields(FitSettings) if f.name in given}
    growing = {f.name: given[f.name] for f in fields(GrowSettings) if f.name in given}
    return words[:2], FitSettings(**fitting), GrowSettings(**growing), given


# Every setting of a recipe that a trial can have, none as it is left out.
UNLIKE = {
    "batch_size": 32,
    "grad_accum_steps": 2,
    "opt": "lamb",
    "weight_decay": 0.1,
    "clip_grad": 0.5,
    "sched": "constant",
    "warmup_epochs": 0.25,
    "min_lr": 1e-7,
    "smoothing": 0.1,
    "mixup": 0.2,
    "cutmix": 0.3,
    "hflip": 0.25,
    "scale_min": 0.9,
    "reprob": 0.1,
    "model_ema": True,
    "model_ema_decay": 0.99,
    "precision": "fp32",
    "grad_checkpointing": True,
    "seed": 3,
    "workers": 1,
    "data_dir": "else where",
    "dataset_download": True,
    "val_split": "train",
    "log_every": 7,
    "save_seconds": 61.5,
    "color_jitter": 0.2,
    "aa": "rand-m9-mstd0.5",
}
BEST = Tried(
    number=0,
    options={
        "method": "mango",
        "variant": "noisy",
        "ranks": "2,1,2,1",
        "ring_order": "BIOL",
        "vectors": False,
        "stages": "width-first",
        "noise": 0.125,
        "steps": 7,
        "operator_lr": 3e-4,
        "lr": 2.5e-3,
    },
    state="finished",
    reason=None,
    score=0.5,
    step0=0.4,
    operator_flops=25.0,
    flops=100.0,
    flops_to_scratch=None,
)


def commands_of(best, recipe, source, digits, folder, *, budget, share):
    settings = SweepSettings(**{**QUICK, "share": share})
    job = Job(RunFolder(folder), "cpu", say=print)
    bench = bench_of(job, folder, source, "deit_tiny", digits, recipe, split=settings, sets=LARGE)
    what = ["a b.pth", "--to", "deit_tiny"]
    return bench, [parsed(line) for line in _commands(best, bench, budget, what, "my images")]


def test_commands_do_what_was_measured(source, digits, tmp_path):
    recipe = FitSettings(epochs=4, **UNLIKE)
    bench, (grow, tune) = commands_of(BEST, recipe, source, digits, tmp_path, budget=100, share=0.4)
    assert (grow[0], tune[0]) == (["growkit", "grow"], ["growkit", "finetune"])
    assert (grow[3]["source"], grow[3]["data"], tune[3]["data"]) == ("a b.pth", "my images", "my images")
    settings = {name: value for name, value in BEST.options.items() if name not in ("steps", "operator_lr", "lr")}
    assert grow[2] == GrowSettings(**settings, seed=3)
    # `growkit grow` has no epochs, and takes the seed of its draws for the data too
    assert grow[1] == replace(bench.operator, steps=7, lr=3e-4, epochs=10.0, model_ema_decay=0.9998, seed=grow[2].seed)
    # On all images the budget is 250, of which the operator takes 25; but a class has no 0.4 of an image.
    assert bench.share == pytest.approx(0.4, rel=2e-3)
    epochs, warmup = (float(f"{whole * (1 - 25 * bench.share / 100):g}") for whole in (4, 0.25))
    assert (epochs, warmup) == (pytest.approx(3.6, rel=2e-4), pytest.approx(0.225, rel=2e-4))
    assert tune[1] == replace(recipe, epochs=epochs, lr=2.5e-3, warmup_epochs=warmup)


def test_commands_count_the_images_that_a_pilot_had_and_not_those_it_asked_for(source, digits, tmp_path):
    recipe = replace(RECIPE, steps=30, batch_size=4)
    best = replace(BEST, options={**BEST.options, "steps": 0}, operator_flops=0.0)
    bench, (_, tune) = commands_of(best, recipe, source, digits, tmp_path, budget=100, share=1e-4)
    assert size_of(bench.data.train) == 10  # one of each class
    assert tune[1].steps == round(30 * 1442 / 10)


def test_commands_keep_a_recipe_in_steps_and_train_no_operator_that_was_not(source, digits, tmp_path):
    recipe = replace(RECIPE, steps=30, seed=3, cache="ram", compile="default")
    best = replace(BEST, options={**BEST.options, "steps": 0})
    _, (grow, tune) = commands_of(best, recipe, source, digits, tmp_path, budget=100, share=0.5)
    assert (grow[3]["data"], grow[2].seed) == (None, 3)
    assert tune[1] == replace(
        recipe, epochs=10.0, steps=52, lr=2.5e-3
    )  # 60 of a budget of 200, of which the operator takes 25


def test_every_setting_of_the_recipe_is_tried_in_a_command():
    left = {f.name for f in fields(FitSettings)} - set(UNLIKE)
    # cached images are not jittered, so these two are tried with another recipe; a sweep has not the last four
    assert left == {"epochs", "steps", "cache", "compile", "lr", "eval_every", "tensorboard", "shard", "tf32"}
    plain = asdict(FitSettings())
    assert all(value != plain[name] for name, value in UNLIKE.items())


def test_recommended_commands_name_source_and_target_as_given(source, digits, tmp_path):
    bare = tmp_path / "bare.pth"
    torch.save(source.state, bare)
    loaded = load_source(str(bare), Loading(from_="deit_tiny", from_set=list(SMALL), ema=False))
    choices = {"operator_steps": "3", "rank_choices": "2"}
    found = run_sweep(tmp_path, loaded, digits, **choices)
    grow, tune = (parsed(command) for command in found.commands)
    assert [command[3]["run"] for command in (grow, tune)] == [tmp_path] * 2
    assert (grow[3]["from_"], grow[3]["ema"]) == ("deit_tiny", False)
    assert (tuple(grow[3]["from_set"]), tuple(grow[3]["sets"])) == (SMALL, LARGE)
    assert (grow[3]["source"], grow[3]["to"], grow[2].rank, grow[1].steps) == (str(bare), "deit_tiny", 2, 3)


def test_command_line_tells_the_sweep_how_the_source_was_loaded(source, tmp_path, monkeypatch):
    bare = tmp_path / "bare.pth"
    torch.save(source.state, bare)
    asked = []
    monkeypatch.setattr(sweep_module, "sweep_settings", lambda *given, **_: asked.append(given[1]) or sys.exit(0))
    loading = ["--no-ema", "--from", "deit_tiny", *(word for item in SMALL for word in ("--from-set", item))]
    CliRunner().invoke(app, ["sweep", str(bare), "--to", "deit_tiny", "--data", "images", *loading])
    assert [source.loading for source in asked] == [Loading(from_="deit_tiny", from_set=list(SMALL), ema=False)]


def test_weights_of_trials_are_let_go(swept):
    folder, _ = swept
    assert not list((folder / "sweep").rglob("*.safetensors"))


def test_report_and_json_hold_the_recommendation(swept):
    folder, found = swept
    content = json.loads((folder / "sweep" / "results.json").read_text())
    assert content["recommended"]["number"] == found.best.number
    page = (folder / "sweep" / "report.html").read_text()
    assert found.commands[0].split(" --to ")[0] in page
    assert "growkit sweep ..." in page


def test_ended_sweep_runs_nothing_again_and_may_ask_for_more(swept, source, digits, monkeypatch):
    folder, found = swept
    monkeypatch.setattr(Bench, "train", lambda *a, **k: pytest.fail("trained again"))
    again = run_sweep(folder, source, digits, resume=True, trials=7)
    assert again.best == found.best
    assert again.tried == found.tried


def outcomes(found):
    return {json.dumps(one.options): (one.state, one.score, one.flops, one.flops_to_scratch) for one in found.tried}


@pytest.fixture(scope="module")
def drawn(source, digits, tmp_path_factory):
    """Of twelve combinations, five are tried: Optuna chooses."""
    return run_sweep(tmp_path_factory.mktemp("drawn"), source, digits, **DRAWN)


DRAWN = {"trials": 5, "noises": "1,0.1,0.01"}


def test_trials_are_distinct_and_as_many_as_asked_for(drawn):
    assert len(outcomes(drawn)) == len(drawn.tried) == 5
    assert sorted(one.number for one in drawn.tried) == [1, 2, 3, 4, 5]


def test_sweep_that_is_stopped_again_and_again_ends_as_if_it_had_not_been(drawn, source, digits, tmp_path, monkeypatch):
    fit, calls = bench_module.fit, []
    stops = {1, 4, 7, 10}  # at the first fit, the third, fifth and seventh: two from scratch, and some of an operator

    def stopping(*args, **kwargs):
        calls.append(1)
        if len(calls) in stops:
            raise KeyboardInterrupt
        return fit(*args, **kwargs)

    monkeypatch.setattr(bench_module, "fit", stopping)
    for _ in stops:
        with pytest.raises(KeyboardInterrupt):
            run_sweep(tmp_path, source, digits, resume=bool(calls), **DRAWN)
    found = run_sweep(tmp_path, source, digits, resume=True, **DRAWN)
    assert outcomes(found) == outcomes(drawn)
    assert len(found.tried) == len(drawn.tried)


@pytest.fixture
def journal(swept, tmp_path):
    """The trials of a finished sweep, in a copy of its folder."""
    shutil.copytree(swept[0] / "sweep", tmp_path / "sweep")
    return tmp_path / "sweep" / "study.log"


def test_trial_whose_line_in_the_journal_is_cut_short_is_made_again(swept, journal, source, digits, tmp_path):
    _, found = swept
    *lines, last = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines) + last[:-40])
    again = run_sweep(tmp_path, source, digits, resume=True)
    assert outcomes(again) == outcomes(found)
    assert len(again.tried) == len(found.tried)


def test_damaged_journal_is_refused_by_name(journal, source, digits, tmp_path):
    journal.write_bytes(journal.read_bytes().replace(b"{", b"[", 2))
    with pytest.raises(GrowkitError, match=r"study\.log: damaged; start anew with --force in place of --resume"):
        run_sweep(tmp_path, source, digits, resume=True)


def test_training_from_scratch_goes_on_where_it_was_stopped(swept, source, digits, tmp_path, monkeypatch):
    def stopping(title, finished, total):
        def progress(done, total, note=""):
            if title == "from scratch, lr 0.004" and done == 10:
                signal.raise_signal(signal.SIGINT)

        return progress

    with pytest.raises(KeyboardInterrupt):
        run_sweep(tmp_path, source, digits, follow=stopping)
    fit, calls = bench_module.fit, []

    def noting(*args, folder, resume, **given):
        calls.append((folder and folder.name, resume))
        return fit(*args, folder=folder, resume=resume, **given)

    monkeypatch.setattr(bench_module, "fit", noting)
    found = run_sweep(tmp_path, source, digits, resume=True)
    assert calls[0] == ("lr0.004", True)
    assert ("lr0.002", False) not in calls
    for name in ("lr", "final", "curve", "training_losses", "flops"):
        assert found.content["from_scratch"][name] == swept[1].content["from_scratch"][name]


def test_rates_that_differ_little_have_results_of_their_own(source, digits, tmp_path):
    found = run_sweep(tmp_path, source, digits, operator_steps="0", rank_choices="1", lrs="2e-3,2.0000001e-3")
    made = [json.loads(path.read_text())["lr"] for path in tmp_path.glob("sweep/from-scratch/*/result.json")]
    assert sorted(made) == [2e-3, 2.0000001e-3, 4.0000002e-3]
    assert len(found.tried) == 2


def test_rate_that_fails_from_scratch_is_left_out(source, digits, tmp_path, monkeypatch):
    train, failing, lines = Bench.train, [2e-4], []
    choices = {"operator_steps": "0", "rank_choices": "1", "lrs": "1e-4"}  # twice that is better

    def training(self, start, arm, *, lr, **given):
        if arm.grow is None and lr in failing:
            raise GrowkitError(f"the loss is nan at {lr:g}")
        return train(self, start, arm, lr=lr, **given)

    monkeypatch.setattr(Bench, "train", training)
    found = run_sweep(tmp_path / "one", source, digits, **choices, say=lines.append)
    assert found.content["from_scratch"]["lr"] == 1e-4
    assert "from scratch, lr 0.0002: failed (the loss is nan at 0.0002)" in lines
    failing.append(1e-4)
    with pytest.raises(GrowkitError, match=r"from scratch: failed at every rate.*nan at 0\.0001"):
        run_sweep(tmp_path / "all", source, digits, **choices)
    failing.clear()  # what trials were held against stays, and what failed at every rate is tried again
    again = run_sweep(tmp_path / "one", source, digits, **choices, resume=True)
    assert again.content["from_scratch"] == found.content["from_scratch"]
    tried = run_sweep(tmp_path / "all", source, digits, **choices, resume=True)
    assert tried.content["from_scratch"]["lr"] == 2e-4


@pytest.mark.parametrize(
    ("reached", "saving", "says"),
    [
        (40, 0.2, "with 20% less compute"),
        (0, 1.0, "starts where training from scratch ends"),
        (50, 0.0, "no sooner: do not expect a saving"),
        (60, -0.2, "no sooner: do not expect a saving"),
        (None, None, "it never reached what training from scratch ends with"),
    ],
)
def test_saving_is_over_what_training_from_scratch_took_to_its_own_score(
    source, digits, tmp_path, monkeypatch, reached, saving, says
):
    alone = [(25, 0.3, 1.0), (50, 0.6, 1.0), (75, 0.5, 1.0), (100, 0.6, 1.0)]  # there halfway, and again at the end
    grown = [(100, 0.5, 1.0)] if reached is None else [(reached, 0.6, 1.0)]

    def train(self, start, arm, **given):
        curve = alone if arm.grow is None else grown
        final = {"top1": curve[-1][1], "loss": 1.0, "count": 100}
        return {"final": final, "curve": curve, "flops": 100, "flops_per_step": 1}

    def start(self, arm, *args):
        scores = Scores(top1=0.1, top5=0.5, loss=1.0, ece=0.1, count=100)
        return Start(torch.nn.Identity(), scores, None, 0, 0.0)

    monkeypatch.setattr(Bench, "train", train)
    monkeypatch.setattr(Bench, "start", start)
    found = run_sweep(tmp_path, source, digits, operator_steps="0")
    assert found.saving == (saving if saving is None else pytest.approx(saving))
    assert any(says in reason for reason in found.reasons)
    assert any("chosen among 2 trials on the images it is reported on" in reason for reason in found.reasons)


def test_combinations_that_optuna_never_asks_for_are_tried_too(source, digits, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep_module, "REPEATS", 0)
    found = run_sweep(tmp_path, source, digits, operator_steps="0")
    assert sorted(one.options["rank"] for one in found.tried) == [1, 2]


def test_same_choice_written_twice_is_one_trial(source, digits, tmp_path):
    found = run_sweep(tmp_path, source, digits, methods="lemon,lemon:noise=0.1", lrs="2e-3,0.002")
    assert [one.options for one in found.tried] == [
        {"method": "lemon", "stages": "both", "noise": 0.1, "steps": 0, "operator_lr": None, "lr": 0.002}
    ]


class Asking:
    """A space of a pair that grows in width and depth, without any training."""

    def __init__(self, source, digits, folder, sets=LARGE, **given):
        settings = SweepSettings(**{**QUICK, **given})
        job = Job(RunFolder(folder), "cpu", say=print)
        bench = bench_of(job, folder, source, "deit_tiny", digits, RECIPE, split=settings, sets=sets)
        self.source, self.target = bench.source, bench.target
        space = SearchSpace(bench, settings)
        self.made = [space.combine(answers) for answers in space.combinations.values()]
        self.options = [options for _, options in self.made]


def test_options_of_a_method_reach_name_options_and_settings(source, digits, tmp_path):
    texts = "mango:noise=0.5,mango:vectors=false,mango:variant=noisy:rank=4,mango:ranks=2x1x2x1:ring-order=BIOL"
    found = Asking(source, digits, tmp_path, methods=texts, rank_choices="1,1x1x2x1", operator_steps="3")
    common = {"method": "mango", "stages": "both", "steps": 3, "operator_lr": 1e-3, "lr": 2e-3}
    assert found.options == [
        {**common, "rank": 1, "noise": 0.5},
        {**common, "ranks": "1,1,2,1", "noise": 0.5, "ring_order": "BOLI"},
        {**common, "rank": 1, "noise": 0.1, "vectors": False},
        {**common, "ranks": "1,1,2,1", "noise": 0.1, "ring_order": "BOLI", "vectors": False},
        {**common, "rank": 4, "noise": 0.1, "variant": "noisy", "ring_order": "BOLI"},
        {**common, "ranks": "2,1,2,1", "noise": 0.1, "ring_order": "BIOL"},
    ]
    for arm, _ in found.made:
        assert parse_arm(arm.name).grow == arm.grow  # so that the name, and the folder of its start, hold everything
    assert len({arm.slug for arm, _ in found.made}) == len(found.made)


def test_what_a_method_settles_or_ignores_is_not_asked(source, digits, tmp_path):
    choices = {"rank_choices": "1,2", "ring_orders": "BOLI,BIOL", "noises": "1,0.1", "operator_steps": "0,3"}
    found = Asking(source, digits, tmp_path, methods="random-pad,lemon,mango,mango:rank=2:noise=1", **choices)
    counts = Counter((one["method"], one.get("rank"), one.get("noise")) for one in found.options)
    assert counts == {
        ("random-pad", None, None): 1,
        ("lemon", None, 1.0): 1,
        ("lemon", None, 0.1): 1,
        ("mango", 1, 1.0): 2,  # with the operator trained, and not
        ("mango", 1, 0.1): 2,
        ("mango", 2, 1.0): 3,  # trained in both ring orders, and not; what the last text gives is among them
        ("mango", 2, 0.1): 3,
    }


def test_untrained_operators_are_tried_once_for_each_start(source, digits, tmp_path):
    choices = {"rank_choices": "4,1,2,2x1x2x4,8", "ring_orders": "BOLI,BIOL", "operator_steps": "0", "noises": "1"}
    found = Asking(source, digits, tmp_path, methods="mango,mango:rank=8,mango:variant=noisy", **choices)
    lossless, noisy = ([o for o in found.options if ("variant" in o) == noisy] for noisy in (False, True))
    assert [one["rank"] for one in lossless] == [4, 1]
    assert len(noisy) == 1 + 4 * 2  # what its noise does depends on both
    pair = found.source.architecture, found.target, found.source.state
    starts = [
        grow(*pair, GrowSettings(rank=rank, ring_order=order)).materialize()
        for rank in (4, 2, 8)
        for order in ("BOLI", "BIOL")
    ]
    for start in starts[1:]:
        for name, weight in start.state_dict().items():
            assert torch.allclose(weight, starts[0].state_dict()[name], atol=1e-6), name
    wider = ("depth=1", "num_heads=4", "mlp_ratio=2", "embed_dim=32")  # whole multiples: one path is all it needs
    found = Asking(source, digits, tmp_path / "wider", wider, methods="mango", **choices)
    assert [one["rank"] for one in found.options] == [4]
    pair = found.source.architecture, found.target, found.source.state
    one, two = (grow(*pair, GrowSettings(rank=rank)).materialize().state_dict() for rank in (1, 2))
    assert all(torch.allclose(weight, two[name], atol=1e-6) for name, weight in one.items())


def test_trials_are_told_best_first_then_those_that_were_stopped_then_those_without_a_score(
    source, digits, tmp_path, monkeypatch
):
    ends = {1e-3: 0.5, 2e-3: 0.1, 3e-3: 0.3}

    def train(self, start, arm, *, lr, watch=None, **given):
        final = {"loss": ends.get(lr, 1.0), "count": 100}
        if watch and lr == 2e-3:
            watch(SimpleNamespace(scores=SimpleNamespace(**final), step=1, total=2))
            raise TrialPruned
        if watch and lr == 4e-3:
            raise RuntimeError("out of memory")
        return {"final": final, "curve": [(100, 0.5, final["loss"])], "flops": 100, "flops_per_step": 1}

    monkeypatch.setattr(Bench, "train", train)
    choices = {"operator_steps": "0", "rank_choices": "1", "lrs": "1e-3,2e-3,3e-3,4e-3", "metric": "loss"}
    found = run_sweep(tmp_path, source, digits, **choices)
    told = [(one.options["lr"], one.score) for one in found.tried]
    assert told == [(3e-3, 0.3), (1e-3, 0.5), (2e-3, 0.1), (4e-3, None)]
    assert found.best is found.tried[0]


@pytest.mark.parametrize(
    ("metric", "source", "known", "word"),
    [("top1", 0.8212, "82.12%", "below"), ("loss", 0.3, "0.3000", "above")],
)
def test_best_trial_that_is_worse_than_the_source_is_a_warning(metric, source, known, word):
    scratch = {"final": {metric: 0.4, "count": 90}}
    first, warning, *_ = _reasons(_Choice(BEST, (BEST,), 0.05), [BEST], scratch, metric, 0.2, source)
    assert first.endswith(f"; the source itself has {known}")
    assert warning.startswith(f"warning: that is {word} the source itself ({known}): give more --epochs")
    for known in (BEST.score, None):
        lines = _reasons(_Choice(BEST, (BEST,), 0.05), [BEST], scratch, metric, 0.2, known)
        assert not any("warning" in line for line in lines)


@pytest.mark.parametrize(
    ("metric", "step0", "told"),
    [
        ("top1", 0.6, "below its start, 60.00%"),
        ("top1", 0.4, None),
        ("loss", 0.4, "above its start, 0.4000"),
        ("loss", 0.6, None),
    ],
)
def test_trial_that_training_made_worse_is_told_with_its_start(metric, step0, told):
    best = replace(BEST, step0=step0)
    lines = _reasons(_Choice(best, (best,), 0.05), [best], {"final": {metric: 0.4, "count": 90}}, metric, 0.2)
    remedies = [line for line in lines if "try lower --lrs" in line]
    assert remedies == ([f"it ends {told}: try lower --lrs or a longer pilot"] if told else [])


def test_sweep_scores_the_source_on_the_held_out_images_once_and_warns_on_its_page(
    source, digits, tmp_path, monkeypatch
):
    score, scored, lines = Bench.score, [], []

    def scoring(self, model, *, test=False):
        known = score(self, model, test=test)
        if sum(p.numel() for p in model.parameters()) == sum(w.numel() for w in source.state.values()):
            scored.append(known)
            return replace(known, top1=0.9999)
        return known

    monkeypatch.setattr(Bench, "score", scoring)
    found = run_sweep(tmp_path, source, digits, operator_steps="0", rank_choices="1", say=lines.append)
    assert len(scored) == 1
    assert "the source itself: held-out top-1 99.99%" in lines
    assert found.content["source_score"]["top1"] == 0.9999
    assert found.reasons[1].startswith("warning: that is below the source itself (99.99%): ")
    page = html.unescape((tmp_path / "sweep" / "report.html").read_text())
    assert page.count("warning: that is below the source itself (99.99%): ") == 2  # in the summary and with the reasons


def test_score_of_a_source_with_a_new_head_is_not_held_against_trials(source, digits, tmp_path):
    found = run_sweep(tmp_path, replace(source, own_head=False), digits, operator_steps="0", rank_choices="1")
    assert found.content["source_score"] is None
    assert not any("the source itself" in reason for reason in found.reasons)


@pytest.mark.parametrize(
    ("flops", "error", "said"),
    [
        (30.0, 0.05, "2 trials lie within one standard error (5.00%); of these its operator is the cheapest"),
        (25.0, 0.05, "2 trials lie within one standard error (5.00%); of these it is the best"),
        (30.0, 0.0, "2 trials have the best score; of these its operator is the cheapest"),  # a loss has no such error
        (25.0, 0.0, "2 trials have the best score; of these it came first"),
    ],
)
def test_reason_for_a_trial_among_equals_is_the_one_that_decided(flops, error, said):
    choice = _Choice(BEST, (BEST, replace(BEST, number=2, operator_flops=flops)), error)
    scratch = {"final": {"top1": 0.4, "count": 90}}
    lines = _reasons(choice, choice.equal, scratch, "top1", 0.2)
    assert [line for line in lines if line.startswith("2 trials")] == [said]


def test_of_equals_that_cost_the_same_the_best_is_recommended():
    tried = [replace(BEST, number=number, score=score) for number, score in enumerate((0.5, 0.52, 0.51))]
    choice = _choose(tried, "top1", count=90)
    assert (len(choice.equal), choice.best) == (3, tried[1])


def test_cheaper_trial_is_recommended_within_one_standard_error_of_the_best_and_not_beyond():
    error = np.std([0, 1] * 45) / 90**0.5  # of half of 90 images
    for short, chosen in ((0.99, 1), (1.01, 0)):
        tried = [BEST, replace(BEST, number=1, score=BEST.score - short * error, operator_flops=1.0)]
        assert _choose(tried, "top1", count=90).best is tried[chosen]


def test_best_scores_by_option_are_listed_in_the_order_of_its_values():
    tried = [replace(BEST, options={**BEST.options, "steps": steps}, score=steps / 1000) for steps in (100, 20, 0, 3)]
    tried.append(replace(tried[0], score=0.05))
    lines = _reasons(_Choice(BEST, (BEST,), 0.05), tried, {"final": {"top1": 0.4, "count": 90}}, "top1", 0.2)
    assert "best top-1 by steps: 0 0.00%, 3 0.30%, 20 2.00%, 100 10.00%" in lines


def test_failing_trial_says_why_and_does_not_lose_the_others(source, digits, tmp_path, monkeypatch):
    start, lines = Bench.start, []

    def failing(self, arm, *args, **kwargs):
        if "rank=2" in arm.name:
            raise RuntimeError("out of memory\nand a long story")
        return start(self, arm, *args, **kwargs)

    monkeypatch.setattr(Bench, "start", failing)
    found = run_sweep(tmp_path, source, digits, operator_steps="0", say=lines.append)
    failed = next(one for one in found.tried if one.options["rank"] == 2)
    assert (failed.state, failed.reason) == ("failed", "out of memory")
    assert found.best.options["rank"] == 1
    assert any(line.startswith(f"[{failed.number}/2]") and "failed (out of memory)" in line for line in lines)
    assert trials_table(found.tried, "top1")[1][-1][-1] == "failed: out of memory"
    written = json.loads((tmp_path / "sweep" / "results.json").read_text())
    assert [one["reason"] for one in written["trials"]] == [None, "out of memory"]


def test_sweep_without_a_finished_trial_says_why(source, digits, tmp_path, monkeypatch):
    train = Bench.train

    def failing(self, start, arm, **given):
        if arm.grow is not None:
            raise RuntimeError(f"no memory for {arm.grow.method}")
        return train(self, start, arm, **given)

    monkeypatch.setattr(Bench, "train", failing)
    with pytest.raises(GrowkitError, match=r"no trial finished.*no memory for mango"):
        run_sweep(tmp_path, source, digits, operator_steps="0")


def test_loser_is_stopped_early_and_its_flops_are_counted(source, digits, tmp_path, monkeypatch):
    def prune(self, study, trial):
        return trial.last_step == 1 and bool(study.get_trials(states=(TrialState.COMPLETE,)))

    monkeypatch.setattr(SuccessiveHalvingPruner, "prune", prune)
    found = run_sweep(tmp_path, source, digits, operator_steps="3")
    scratch = found.content["from_scratch"]
    finished, stopped = found.tried
    assert (finished.number, finished.state, stopped.number, stopped.state) == (1, "finished", 2, "stopped early")
    assert stopped.operator_flops < stopped.flops < 0.8 * scratch["flops"]
    assert (stopped.flops - stopped.operator_flops) % scratch["flops_per_step"] == 0
    assert stopped.score is not None
    assert stopped.step0 > scratch["final"]["top1"]
    row = trials_table(found.tried, "top1")[1][-1]
    assert (row[2:4], row[-2:]) == ((f"{stopped.score:.2%}", f"{stopped.step0:.2%}"), ("0", "stopped early"))


@pytest.mark.parametrize(
    ("metric", "step0", "shown"), [("top1", 1.0, "0"), ("top1", 0.0, "–"), ("loss", 0.0, "0"), ("loss", 9.0, "–")]
)
def test_trial_stopped_early_took_nothing_to_reach_scratch_if_it_started_there(
    source, digits, tmp_path, monkeypatch, metric, step0, shown
):
    start = Bench.start

    def starting(self, arm, *given):
        found = start(self, arm, *given)
        return found if found.step0 is None else replace(found, step0=replace(found.step0, **{metric: step0}))

    monkeypatch.setattr(Bench, "start", starting)

    def prune(self, study, trial):
        return bool(study.get_trials(states=(TrialState.COMPLETE,)))

    monkeypatch.setattr(SuccessiveHalvingPruner, "prune", prune)
    found = run_sweep(tmp_path, source, digits, operator_steps="0", metric=metric)
    assert trials_table(found.tried, metric)[1][-1][-2:] == (shown, "stopped early")
    page = (tmp_path / "sweep" / "report.html").read_text()
    assert "then the others, whose score is the last one they had, when they were stopped early" in page


def test_trials_whose_operator_would_take_all_are_left_out(source, digits, tmp_path):
    lines = []
    found = run_sweep(tmp_path, source, digits, operator_steps="0,3,2000", lrs="2e-3,1e-3", say=lines.append)
    assert {one.options["steps"] for one in found.tried} == {0, 3}
    assert len(found.tried) == QUICK["trials"]  # of eight that can be paid for
    told = "4 of 12 combinations are left out, their operators would take all of a trial's "
    assert [line for line in lines if line.startswith(told) and line.endswith("steps=2000, at every rate")]
    assert told in html.unescape((tmp_path / "sweep" / "report.html").read_text())


def test_optuna_has_nothing_to_warn_of(source, digits, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        run_sweep(tmp_path, source, digits, operator_steps="0", evals=15)  # which is no divisor of the updates


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"methods": "mangoo"}, "unknown method 'mangoo'"),
        ({"methods": "stackbert"}, "methods that can"),
        ({"stage_choices": "both,sideways"}, "--stage-choices both,sideways"),
        ({"rank_choices": "0"}, "--rank-choices 0"),
        ({"methods": "mango:steps=1"}, "--methods mango:steps=1: .* steps from --operator-steps"),
        ({"methods": "mango,mango:lr=1e-4"}, "--methods mango:lr=1e-4: .* lr from --operator-lrs"),
        ({"operator_steps": "1900,2000"}, "steps=1900: its operator takes .* leaves nothing of .* --operator-steps"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_read(source, digits, tmp_path, monkeypatch, given, says):
    monkeypatch.setattr(bench_module, "read_through", lambda *_, **__: pytest.fail("read"))
    with pytest.raises(GrowkitError, match=says):
        run_sweep(tmp_path, source, digits, **given)
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize(
    ("name", "variant"), [(name, variant) for name, method in METHODS.items() for variant in method.VARIANTS or (None,)]
)
def test_methods_say_whether_noise_means_something_to_them(name, variant):
    settings = GrowSettings(method=name, variant=variant)
    pair = PAIRS["twice as deep" if name in ("stackbert", "llama-pro") else "thrice as wide"]
    state = randomised(pair[0]).state_dict()
    quiet, loud = (grow(*pair, state, replace(settings, noise=noise)).weights() for noise in (0.0, 1.0))
    differ = any(not torch.equal(quiet[key], loud[key]) for key in quiet)
    assert differ == ("noise" in METHODS[name].TAKES)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("given", [{"rank": 3}, {"ranks": "2,2,1,2"}, {"ring_order": "BLOI"}, {"vectors": False}])
def test_methods_say_whether_a_ring_means_something_to_them(name, given):
    pair = PAIRS["twice as deep" if name in ("stackbert", "llama-pro") else "thrice as wide"]
    state = randomised(pair[0]).state_dict()
    settings = replace(GrowSettings(method=name), **given)
    plain, asked = (grow(*pair, state, one) for one in (GrowSettings(method=name), settings))

    def told(grown):
        parameters = {key: (value.shape, value.requires_grad) for key, value in grown.method.named_parameters()}
        ring = getattr(grown.method, "ring", None)
        return parameters, ring and ring.order

    same = told(plain) == told(asked) and all(torch.equal(plain.weights()[k], v) for k, v in asked.weights().items())
    (option,) = given
    assert same == (option not in METHODS[name].TAKES)
    assert ignored(settings) == (
        [] if not same else ["--no-vectors" if option == "vectors" else f"--{option}".replace("_", "-")]
    )
