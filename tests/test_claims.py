"""The experiments are made of commands that the scripts accept, the verdicts are what a table of
Student's t gives, and the pages show what the results files say."""

import argparse
import importlib
import json
import runpy
import shutil
import types

import pytest
import torch
from conftest import ROOT, data, settings

import common

EXPERIMENTS = ["denoising", "generalisation", "ppo", "real"]


@pytest.fixture(autouse=True)
def paths(monkeypatch):
    for folder in ("docs/claims", "docs"):
        monkeypatch.syspath_prepend(ROOT / folder)


def load(name, monkeypatch):
    """-> RUNS, CLAIMS, COLUMNS and BASES of an experiment."""
    experiment = importlib.import_module(name)
    if name != "real":
        return experiment
    command = "real.py trial --model m --train a.jsonl --test b.jsonl --gold --clean c.jsonl"
    monkeypatch.setattr("sys.argv", [*command.split(), "--ood", "other=d.jsonl"])
    args = experiment.parse_args()
    return types.SimpleNamespace(
        RUNS=experiment.make_runs(args), CLAIMS=experiment.make_claims(args),
        COLUMNS=experiment.make_columns(args), BASES=experiment.make_bases(args))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_scripts_accept_the_runs(name, monkeypatch, tmp_path):
    runs = load(name, monkeypatch).RUNS
    monkeypatch.chdir(tmp_path)
    for command in set(runs.values()):
        words = command.replace("$seed", "1").replace("$voter", "10").split()
        monkeypatch.setattr("sys.argv", words)
        script = importlib.import_module(words[0].removesuffix(".py"))
        assert isinstance(script.parse_args(), argparse.Namespace)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_claims_are_about_runs(name, monkeypatch):
    """A claim about a run that does not exist would be left out in silence."""
    experiment = load(name, monkeypatch)
    named = {*experiment.BASES, *experiment.BASES.values()}
    for claim in experiment.CLAIMS:
        for side in (claim.larger, claim.smaller):
            if not isinstance(side, float):
                named.update([side] if isinstance(side, str) else side)
    assert named <= {*experiment.RUNS}
    texts = [claim.text for claim in experiment.CLAIMS]
    assert len(texts) == len({*texts})


def test_runs_with_the_same_name_are_the_same(monkeypatch):
    """The experiments of the toy world share folders."""
    runs = {}
    for name in EXPERIMENTS[:3]:
        for run, command in load(name, monkeypatch).RUNS.items():
            assert runs.setdefault(run, command) == command


def test_a_missing_run_brings_what_it_needs():
    run = importlib.import_module("run")
    runs = {"vote": "a", "other": "b", "flip": "c $dir/vote/train.jsonl", "eval": "d $dir/flip/model", "last": "e"}
    assert [*run.find_needed(runs, ".*", {"vote", "flip", "last"})] == ["vote", "other", "flip", "eval"]
    assert [*run.find_needed(runs, "flip", {"vote"})] == ["vote", "flip"]
    assert run.find_needed(runs, ".*", {*runs}) == run.find_needed(runs, "evil", {}) == {}


def test_numbers_of_votes():
    """Forty pairs, two with wrong labels: the weakest, and one behind which there are 9 right."""
    measure = importlib.import_module("measure")
    rows = []
    for i in reversed(range(40)):
        rows.append({
            "mean preference difference": i - 4.5,
            "std preference difference": abs(i - 20.0),
            "gold": 0 if i in (0, 10) else 1})
    numbers = measure.measure_votes(rows)
    expected = {
        "share wrong below 0": 1 / 5, "share below 0 of wrong": 1 / 2,
        "share wrong, tenth 1": 1 / 4, "share wrong, tenth 2": 0, "share wrong, tenth 3": 1 / 4,
        "area under the curve": (9 * 1 + 29 * 2) / (2 * 38), "accuracy, weakest": 1 / 2,
        "accuracy, at 0": 1, "std, weakest": 19.5, "std, 20 to 40 %": 8.5}
    assert {name: numbers[name] for name in expected} == pytest.approx(expected)


def test_another_reward_model_as_gold(tokenizer, tmp_path):
    """It gives what the scripts read, here in docs/toy/reward_model."""
    (tmp_path / "clean").mkdir()
    (tmp_path / "clean/model").symlink_to(ROOT / "docs/toy/reward_model")
    shutil.copy(ROOT / "docs/clean_gold.py", tmp_path)
    gold = runpy.run_path(tmp_path / "clean_gold.py")["gold"]
    sets = common.load_sets([("id", data("id", 8))], tokenizer, 64)
    model = common.load_reward_model(ROOT / "docs/toy/reward_model", tokenizer, torch.device("cpu"), settings())
    for row, rewards in zip(common.load_rows(data("id", 8)), common.compute_rewards(model, sets["id"], 256)):
        responses = (row["chosen"].strip(), row["rejected"].strip())  # as eval.py passes them
        assert [gold(row["prompt"], x) for x in responses] == pytest.approx(rewards.tolist(), abs=1e-4)


def test_summaries_are_students():
    """Five values, mean 3, standard error 0.7071: t is 4.243, and the quantile in tables 2.776."""
    measure = importlib.import_module("measure")
    summary = measure.summarise(measure.np.array([1.0, 2, 3, 4, 5, measure.math.nan]))
    assert summary["n"] == 5 and summary["mean"] == 3
    assert summary["half"] == pytest.approx(2.776 * 0.70711, rel=1e-3)
    assert summary["p"] == pytest.approx(0.01324, rel=1e-3)
    equal = measure.summarise(measure.np.array([0.1, 0.1, 0.1]))  # whose variance nobody knows
    assert equal == {"mean": 0.1, "half": 0, "p": 1, "n": 3}


def claim(figure, mean, half, p):
    return {
        "figure": figure, "text": f"{figure} {p}", "mean": mean, "half": half, "p": p, "n": 5,
        "threshold": 0.005, "percent": True, "signed": True}


def test_verdicts_by_hand():
    """Three claims about Fig. 1, five seeds. Holm's p are 3 x 0.01, 2 x 0.02 and 0.4; Bonferroni's
    would be 0.03, 0.06 and 1. The interval of the third, 0.1 ± 0.35 points, lies within half a
    point. At the level 1 - 0.05 / 3 it does not: it is 3.961 / 2.776 times as wide, ± 0.50. About
    Fig. 2 there is one claim, so the same interval counts. Of the three about Fig. 5, two are not measured yet."""
    tables = importlib.import_module("tables")
    claims = [
        claim("Fig. 1", 0.02, 0.012, 0.01), claim("Fig. 1", 0.02, 0.014, 0.02),
        claim("Fig. 1", 0.001, 0.0035, 0.4), claim("Fig. 2", 0.001, 0.0035, 0.4),
        claim("Fig. 3", -0.02, 0.01, 0.004), claim("Fig. 4", -0.004, 0.0005, 0.0001),
        {**claim("Fig. 5", 0.02, 0.014, 0.02), "asked": 3}]
    judged = tables.judge(claims)
    assert [x["p"] for x in judged] == pytest.approx([0.03, 0.04, 0.4, 0.4, 0.004, 0.0001, 0.06])
    assert [x["verdict"] for x in judged] == [
        "confirmed", "confirmed", "undecided", "no effect", "opposite", "opposite", "undecided"]


def test_the_pages_show_the_results():
    tables = importlib.import_module("tables")
    for name in ("README.md", "docs/results.md"):
        page = (ROOT / name).read_text()
        assert tables.render(page) == page, f"{name}: python docs/tables.py {name}"


def test_a_changed_digit_is_rendered_again(monkeypatch, tmp_path):
    tables = importlib.import_module("tables")
    entry = {"mean": 0.871, "half": 0.0123, "p": 0.1, "n": 5, "percent": True, "signed": False}
    loss = {**entry, "percent": False, "n": 4}
    results = {
        "seeds": 5, "hours": 1.5, "code": ["commit abc, torch 1", "commit def, torch 1"],
        "runs": {"S3-1": {"test, %": entry, "loss": loss}},
        "claims": [claim("Fig. 1", 0.02, 0.012, 0.01)]}
    (tmp_path / "trial.json").write_text(json.dumps(results))
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    marks = ["table: trial/S.*/test.*", "measured: trial/Fig. 1 0.01", "verdict: trial/Fig. 1 0.01",
             "number: trial/S3-1/loss", "hours: trial",
             r"pivot: trial/(.*)-(\d)/test, %", "pivot: trial/claims/(.*) (0.*)"]
    page = tables.render(" and ".join(f"<!-- {mark} --><!-- end -->" for mark in marks))
    assert "|  | 1 |\n| --- | --- |\n| S3 | 87.1 ± 1.2 |\n" in page
    assert "| Fig. 1 | +2.0 ± 1.2 points, p 0.01: confirmed |" in page
    assert "| S3-1 | 87.1 ± 1.2 |" in page and "+2.0 ± 1.2 points<" in page and "confirmed<" in page
    assert "0.871 ± 0.012 (4 seeds)" in page and "1.5 hours of one core (commit abc, def; torch 1)" in page
    assert tables.render(page) == page == tables.render(page.replace("87.1", "97.1"))
    for mark in ("verdict: trial/none", "table: trial/none", "number: trial/S3-1/none", "hours: x",
                 "pivot: trial/(x)(y)/loss"):
        with pytest.raises(ValueError):
            tables.render(f"<!-- {mark} --><!-- end -->")
