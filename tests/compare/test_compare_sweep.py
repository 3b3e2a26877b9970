"""A pilot in seconds: what it asks, what it recommends, and that it goes on where it was stopped."""

import json
import shlex
from dataclasses import replace

import pytest
import torch
from compare_samples import CPU, LARGE, RECIPE
from pairs import PAIRS, randomised

from growkit.compare import bench as bench_module
from growkit.compare.bench import Bench
from growkit.compare.settings import SweepSettings
from growkit.compare.sweep import sweep_settings
from growkit.errors import GrowkitError
from growkit.grow import grow
from growkit.methods import METHODS
from growkit.record import RunFolder
from growkit.settings import GrowSettings

QUICK = {
    "trials": 6,
    "rank_choices": "1,2",
    "ring_orders": "BOLI",
    "stage_choices": "both",
    "noises": "0.1",
    "operator_steps": "0,3",
    "operator_lrs": "1e-3",
    "lrs": "2e-3",
    "share": 0.5,
    "evals": 2,
}


def run_sweep(folder, source, digits, *, sets=LARGE, force=False, resume=False, say=lambda line: None, **given):
    return sweep_settings(
        RunFolder(folder),
        source,
        "deit_tiny",
        digits,
        SweepSettings(**{**QUICK, **given}),
        RECIPE,
        sets=sets,
        device=CPU,
        force=force,
        resume=resume,
        command="growkit sweep ...",
        say=say,
    )


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
    full = found.content["from_nothing"]["flops"]
    step = found.content["from_nothing"]["flops_per_step"]
    for one in found.tried:
        if one.state == "finished":
            assert one.flops == pytest.approx(full, abs=step)
            assert (one.operator_flops > 0) == (one.options["steps"] > 0)


def test_recommended_is_the_cheapest_of_those_as_good_as_the_best(swept):
    _, found = swept
    finished = [one for one in found.tried if one.state == "finished"]
    top = max(one.score for one in finished)
    count = found.content["from_nothing"]["final"]["count"]
    error = (top * (1 - top) / count) ** 0.5
    equal = [one for one in finished if one.score >= top - error]
    assert found.best in equal
    assert found.best.operator_flops == min(one.operator_flops for one in equal)


def test_commands_are_growkits_own_and_say_what_was_recommended(swept, source):
    from typer.main import get_command

    from growkit_cli.main import app

    _, found = swept
    grow, finetune = (shlex.split(command) for command in found.commands)
    assert grow[:3] == ["growkit", "grow", source.path]
    assert grow[grow.index("--rank") + 1] == str(found.best.options["rank"])
    for words in (grow, finetune):
        command = get_command(app).commands[words[1]]
        command.make_context(words[1], words[2:])  # raises on an option that is not there


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
    again = run_sweep(folder, source, digits, resume=True)
    assert again.best == found.best
    assert again.tried == found.tried


def test_stopped_sweep_goes_on_with_the_trial_it_was_at(source, digits, tmp_path, monkeypatch):
    fit, calls = bench_module.fit, []

    def stopping(*args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return fit(*args, **kwargs)

    monkeypatch.setattr(bench_module, "fit", stopping)
    with pytest.raises(KeyboardInterrupt):
        run_sweep(tmp_path, source, digits)
    monkeypatch.setattr(bench_module, "fit", fit)
    found = run_sweep(tmp_path, source, digits, resume=True)
    tried = [(one.options["rank"], one.options["steps"]) for one in found.tried]
    assert sorted(tried) == [(1, 0), (1, 3), (2, 0), (2, 3)]


def test_failing_trial_does_not_lose_the_others(source, digits, tmp_path, monkeypatch):
    start = Bench.start

    def failing(self, arm, *args, **kwargs):
        if "rank=2" in arm.name:
            raise RuntimeError("out of memory")
        return start(self, arm, *args, **kwargs)

    monkeypatch.setattr(Bench, "start", failing)
    found = run_sweep(tmp_path, source, digits)
    assert {one.state for one in found.tried if one.options["rank"] == 2} == {"failed"}
    assert found.best.options["rank"] == 1


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"methods": "mangoo"}, "unknown method 'mangoo'"),
        ({"methods": "stackbert"}, "methods that can"),
        ({"stage_choices": "both,sideways"}, "--stages sideways"),
        ({"rank_choices": "0"}, "--rank 0"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_runs(source, digits, tmp_path, given, says):
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
    assert differ == METHODS[name].NOISE
