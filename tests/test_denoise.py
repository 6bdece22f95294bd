"""denoise_rm.py: its losses against closed forms and the paper's own numbers, and whole runs."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import data, settings, toy
from test_run import records, weights

import baseline_rm
import common
import denoise_rm

CPU = torch.device("cpu")
STRENGTHS, ZERO = np.random.default_rng(0).normal(0.7, 1.0, 1000), np.zeros((1000, 2))
WEAKEST = STRENGTHS < np.quantile(STRENGTHS, 0.1)


def loss(rewards, strengths, **flags):
    """Mean loss of rewards (B, 2) with all that make_targets makes of the strengths."""
    swap, margin, target = (torch.tensor(x) for x in denoise_rm.make_targets(np.array(strengths, float), **flags))
    rewards = torch.tensor(rewards, dtype=torch.float64)
    rewards = torch.where(swap[:, None], rewards.flip(1), rewards)
    return denoise_rm.denoised_loss(rewards, margin, target).mean().item()


def softplus(x):
    return np.log1p(np.exp(x))


def test_neutral_is_the_baseline_bit_for_bit():
    rewards = torch.randn(100, 2, requires_grad=True)
    swap, margin, target = (torch.tensor(x) for x in denoise_rm.make_targets(STRENGTHS[:100]))
    ours = denoise_rm.denoised_loss(rewards, margin.float(), target.float())
    theirs = baseline_rm.preference_loss(rewards)
    assert not swap.any() and torch.equal(ours, theirs)
    assert torch.equal(*(torch.autograd.grad(x.sum(), rewards)[0] for x in (ours, theirs)))


def test_first_losses_of_the_paper():
    """At equal rewards: E softplus(mu) with the margin; after a flip of the weakest tenth with their mu negated."""
    assert loss(ZERO, STRENGTHS, margin=True) == pytest.approx(softplus(STRENGTHS).mean())
    negated = np.where(WEAKEST, -STRENGTHS, STRENGTHS)
    assert loss(ZERO, STRENGTHS, margin=True, flip=0.1) == pytest.approx(softplus(negated).mean())


def test_smoothing_floor():
    """With A = 0.2 no loss gets below the entropy of 0.2, 0.5004; the best margin is the log odds of 0.8."""
    margins = np.linspace(-4, 8, 2401)
    losses = [loss([[x, 0.0]], [1.0], label_smoothing=0.2) for x in margins]
    assert min(losses) == pytest.approx(0.5004, abs=5e-5)
    assert margins[np.argmin(losses)] == pytest.approx(math.log(4), abs=0.005)


@pytest.mark.parametrize("flags, expected", [
    ({"label_smoothing": 0.3}, lambda x, mu: 0.7 * softplus(-x) + 0.3 * softplus(x)),
    ({"margin": True}, lambda x, mu: softplus(-(x - mu))),
    ({"margin": True, "label_smoothing": 0.3, "smooth_on": "negative"},  # S1
     lambda x, mu: np.where(mu < 0, 0.7 * softplus(mu - x) + 0.3 * softplus(x - mu), softplus(mu - x))),
    ({"soft_targets": 2.0},  # S3
     lambda x, mu: softplus(-x) / (1 + np.exp(-mu / 2)) + softplus(x) / (1 + np.exp(mu / 2))),
    ({"soft_targets": 2.0, "flip": 0.4},  # which flipping does not change
     lambda x, mu: softplus(-x) / (1 + np.exp(-mu / 2)) + softplus(x) / (1 + np.exp(mu / 2))),
    ({"flip": 0.1}, lambda x, mu: np.where(WEAKEST, softplus(x), softplus(-x))),
    ({"flip": 0.1, "label_smoothing": 0.3, "smooth_on": "negative"},  # a flipped pair is no longer negative
     lambda x, mu: np.where(
         WEAKEST, softplus(x), np.where(mu < 0, 0.7 * softplus(-x) + 0.3 * softplus(x), softplus(-x)))),
])
def test_closed_forms(flags, expected):
    rewards = np.random.default_rng(1).normal(size=(1000, 2))
    assert loss(rewards, STRENGTHS, **flags) == pytest.approx(expected(rewards[:, 0] - rewards[:, 1], STRENGTHS).mean())


def test_select_rows():
    strengths = np.array([5.0, 1, 4, 2, 3, 9, 8, 7, 6, 0])
    order = [9, 1, 3, 4, 2, 0, 8, 7, 6, 5]  # weak to strong
    assert denoise_rm.select_rows(strengths).tolist() == list(range(10))
    assert denoise_rm.select_rows(strengths, (0, 20)).tolist() == sorted(order[:2])
    assert denoise_rm.select_rows(strengths, drop=0.3).tolist() == sorted(order[3:])
    assert denoise_rm.select_rows(strengths, (20, 60), drop=0.5).tolist() == sorted(order[4:6])  # half of that part
    tenths = [denoise_rm.select_rows(strengths, (10 * i, 10 * i + 10)) for i in range(10)]
    assert sorted(np.concatenate(tenths)) == list(range(10))


@pytest.fixture
def voted(tmp_path):
    """The rows of the small runs with strengths, the first row without one; their strengths."""
    rows = toy.make_comparisons(n=96)
    strengths = np.random.default_rng(0).normal(0.5, 1, 96)
    for row, strength in zip(rows, strengths):
        row["mean preference difference"] = strength
    rows[0]["mean preference difference"] = None
    path = tmp_path / "voted.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path, rows, strengths[1:]


def test_neutral_run_is_the_baseline_run(script, voted):
    path, rows, _ = voted
    Path("usable.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[1:]))
    script("baseline_rm.py", "--data", "usable.jsonl", "--output-dir", "theirs")
    script("denoise_rm.py", "--data", path, "--output-dir", "ours")
    for ours, theirs in zip(records("ours"), records("theirs"), strict=True):
        assert ours.pop("train/objective") == pytest.approx(ours["train/loss"], rel=1e-5)
        assert ours == theirs
    assert all(torch.equal(tensor, weights("theirs")[name]) for name, tensor in weights("ours").items())


def test_flipping_equals_flipped_data(script, voted):
    path, rows, strengths = voted
    for i in 1 + np.argsort(strengths)[:19]:
        rows[i]["chosen"], rows[i]["rejected"] = rows[i]["rejected"], rows[i]["chosen"]
    Path("flipped.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[1:]))
    script("baseline_rm.py", "--data", "flipped.jsonl", "--output-dir", "file")
    script("denoise_rm.py", "--flip", 0.2, "--data", path, "--output-dir", "flag")
    for one, other in zip(records("flag"), records("file"), strict=True):
        for key in ("train/loss", "train/accuracy", "train/grad_norm"):
            assert one[key] == pytest.approx(other[key], rel=1e-4)


def test_every_pair_gets_its_own_margin_and_target(script, voted, llama, tokenizer):
    """The gradient of the first step, in micro-batches, against one graph over the batch."""
    path, rows, strengths = voted
    script("denoise_rm.py", "--data", path, "--margin", "--soft-targets", 1, "--flip", 0.3, "--micro-batch-tokens", 80)
    model = common.load_reward_model(llama, tokenizer, CPU, settings())
    train = common.tokenize(common.load_rows(data()), "toy", tokenizer, 64).select(range(1, 96))
    index = common.batch_indices(95, 16, 0, 0)
    swap, margin, target = (torch.tensor(x)[index] for x in denoise_rm.make_targets(
        strengths, flip=0.3, margin=True, soft_targets=1))
    rewards = model(common.collate(train, index, CPU, share=True))
    rewards = torch.where(swap[:, None], rewards.flip(1), rewards)
    objective = denoise_rm.denoised_loss(rewards, margin, target).mean()
    objective.backward()
    norm = math.sqrt(sum(p.grad.double().square().sum().item() for p in model.parameters()))
    first = records("runs/denoise_rm")[0]
    assert first["train/objective"] == pytest.approx(objective.item(), rel=1e-4)
    assert first["train/grad_norm"] == pytest.approx(norm, rel=1e-3)


@pytest.mark.parametrize("flags, name", [
    (["--flip", "1.5"], "--flip"), (["--label-smoothing", "0.6"], "--label-smoothing"),
    (["--percentiles", "50", "50"], "--percentiles"), (["--drop", "1"], "--drop"),
    (["--flip", "0.1"], "mean preference difference"), (["--smooth-on", "negative"], "mean preference difference")])
def test_bad_input(flags, name, script, voted):
    with pytest.raises(SystemExit) as error:
        script("denoise_rm.py", *flags, *([] if "mean" in name else ["--data", voted[0]]))
    assert name in str(error.value) and "\n" not in str(error.value)


def test_strengths_are_numbers(script):
    rows = [{**row, "mean preference difference": "weak"} for row in toy.make_comparisons("id", 4)]
    Path("words.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(SystemExit, match="words.jsonl.*mean preference difference"):
        script("denoise_rm.py", "--data", "words.jsonl")
