"""denoise_rm.py: its losses against closed forms and the paper's own numbers, and whole runs."""

import json
import math
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from conftest import settings

import baseline_rm
import common
import denoise_rm
from test_baseline import records


def loss(rewards, strength, **how):
    """Mean loss of rewards (B, 2) with all that `targets` makes of the strengths."""
    swap, margin, target = (torch.tensor(x) for x in denoise_rm.targets(np.array(strength, float), **how))
    rewards = torch.tensor(rewards, dtype=torch.float64)
    rewards = torch.where(swap[:, None], rewards.flip(1), rewards)
    return denoise_rm.preference_loss(rewards, margin, target).mean().item()


def softplus(x):
    return np.log1p(np.exp(x))


softplus_of = torch.nn.functional.softplus
RNG = np.random.default_rng(0)
STRENGTH, ZERO = RNG.normal(0.7, 1.0, 1000), np.zeros((1000, 2))
SUSPECT = STRENGTH < np.quantile(STRENGTH, 0.1)


# ------------------------------------------------------------------------------------------------------------- losses
def test_neutral_is_the_baseline_bit_for_bit():
    rewards = torch.randn(100, 2, requires_grad=True)
    swap, margin, target = (torch.tensor(x) for x in denoise_rm.targets(np.random.default_rng(0).normal(size=100)))
    ours = denoise_rm.preference_loss(rewards, margin.float(), target.float())
    theirs = baseline_rm.preference_loss(rewards)
    assert not swap.any() and torch.equal(ours, theirs)
    assert torch.equal(*(torch.autograd.grad(x.sum(), rewards)[0] for x in (ours, theirs)))


def test_first_losses_of_the_paper():
    """At equal rewards: E[softplus(mu)] with the margin; with the weakest tenth flipped, their mu negated."""
    assert loss(ZERO, STRENGTH, margin=True) == pytest.approx(softplus(STRENGTH).mean())
    negated = np.where(SUSPECT, -STRENGTH, STRENGTH)
    assert loss(ZERO, STRENGTH, margin=True, flip=0.1) == pytest.approx(softplus(negated).mean())
    assert loss(ZERO, STRENGTH, flip=0.1) == pytest.approx(math.log(2))


def test_smoothing_floor():
    """With A = 0.2 no rewards get below the entropy of 0.2, 0.5004, and the best margin is the log odds of 0.8."""
    losses = [loss([[x, 0.0]], [1.0], smoothing=0.2) for x in np.linspace(-4, 8, 2401)]
    assert min(losses) == pytest.approx(0.5004, abs=5e-5)
    assert np.linspace(-4, 8, 2401)[np.argmin(losses)] == pytest.approx(math.log(4), abs=0.005)


@pytest.mark.parametrize("how, expected", [
    ({"smoothing": 0.3}, lambda x, mu: 0.7 * softplus(-x) + 0.3 * softplus(x)),
    ({"smoothing": 0.3, "smooth_on": "negative"},
     lambda x, mu: np.where(mu < 0, 0.7 * softplus(-x) + 0.3 * softplus(x), softplus(-x))),
    ({"margin": True}, lambda x, mu: softplus(-(x - mu))),
    ({"margin": True, "smoothing": 0.3, "smooth_on": "negative"},  # S1
     lambda x, mu: np.where(mu < 0, 0.7 * softplus(mu - x) + 0.3 * softplus(x - mu), softplus(mu - x))),
    ({"soft_targets": 2.0},  # S3
     lambda x, mu: softplus(-x) / (1 + np.exp(-mu / 2)) + softplus(x) / (1 + np.exp(mu / 2))),
    ({"soft_targets": 2.0, "smoothing": 0.3},
     lambda x, mu: 0.3 * (softplus(-x) + softplus(x)) + 0.4 * (
         softplus(-x) / (1 + np.exp(-mu / 2)) + softplus(x) / (1 + np.exp(mu / 2)))),
    ({"noise_rate": 0.2}, lambda x, mu: (0.8 * softplus(-x) - 0.2 * softplus(x)) / 0.6),
    ({"flip": 0.1}, lambda x, mu: np.where(SUSPECT, softplus(x), softplus(-x))),
    ({"flip": 0.1, "smoothing": 0.3, "smooth_on": "negative"},  # a flipped pair is no longer negative
     lambda x, mu: np.where(
         SUSPECT, softplus(x), np.where(mu < 0, 0.7 * softplus(-x) + 0.3 * softplus(x), softplus(-x)))),
])
def test_closed_forms(how, expected):
    rewards = np.random.default_rng(1).normal(size=(1000, 2))
    assert loss(rewards, STRENGTH, **how) == pytest.approx(expected(rewards[:, 0] - rewards[:, 1], STRENGTH).mean())


def test_the_unbiased_loss_is_unbiased():
    """Over labels flipped with probability E, its mean is the loss of the clean label."""
    clean, flipped = (loss(rewards, [0.0], noise_rate=0.3) for rewards in ([[0.7, -0.4]], [[-0.4, 0.7]]))
    assert 0.7 * clean + 0.3 * flipped == pytest.approx(softplus(-1.1))


def test_select():
    strength = np.array([5.0, 1, 4, 2, 3, 9, 8, 7, 6, 0])
    order = [9, 1, 3, 4, 2, 0, 8, 7, 6, 5]  # weak to strong
    assert denoise_rm.select(strength).tolist() == list(range(10))
    assert denoise_rm.select(strength, (0, 20)).tolist() == sorted(order[:2])
    assert denoise_rm.select(strength, (90, 100)).tolist() == order[9:]
    assert denoise_rm.select(strength, drop=0.3).tolist() == sorted(order[3:])
    assert denoise_rm.select(strength, (20, 60), drop=0.5).tolist() == sorted(order[4:6])  # half of that part
    parts = [denoise_rm.select(strength, (10 * i, 10 * i + 10)) for i in range(10)]
    assert sorted(np.concatenate(parts)) == list(range(10))
    assert len(denoise_rm.select(strength, (0, 1))) == 0


def test_accuracy_by_label_and_strength():
    rewards = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    data = common.datasets.Dataset.from_dict(
        {"gold": [1, 0, 0, 0, -1], "mean preference difference": [0.1, -0.2, 0.3, 0.0, 0.2]})
    assert denoise_rm.by_label_and_strength(rewards, data, segments=5) == {
        "accuracy_second": 0.75, "accuracy_agreeing": 1, "accuracy_segment_01": 0, "accuracy_segment_02": 0,
        "accuracy_segment_03": 1, "accuracy_segment_04": 0, "accuracy_segment_05": 1}


# --------------------------------------------------------------------------------------------------------------- runs
@pytest.fixture
def voted(tmp_path):
    """The rows of the small runs with strengths: right where gold says so; the first row has none."""
    rows = common.toy_comparisons(n=96)
    for i, row in enumerate(rows):
        row["mean preference difference"] = (i + 1) / 96 if row["gold"] else -(i + 1) / 96
    rows[0]["mean preference difference"] = None
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path, rows


def test_neutral_run_is_the_baseline_run(script):
    script("baseline_rm.py", "--output-dir", "theirs")
    script("denoise_rm.py", "--output-dir", "ours")
    ours, theirs = records("ours"), records("theirs")
    assert [{key: line[key] for key in other} for line, other in zip(ours, theirs, strict=True)] == theirs
    weights = [(Path(folder) / "model/model.safetensors").read_bytes() for folder in ("ours", "theirs")]
    assert weights[0] == weights[1]


def test_flipping_equals_flipped_data(script, voted):
    """Flipping the pairs of negative strength is training on a file in which they stand the other way round."""
    path, rows = voted
    share = sum(row["mean preference difference"] < 0 for row in rows[1:]) / 95
    for row in rows:
        if (row.pop("mean preference difference") or 0) < 0:
            row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    Path("flipped.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[1:]))
    script("baseline_rm.py", "--data", "flipped.jsonl", "--output-dir", "file")
    out = script("denoise_rm.py", "--flip", share, "--strength", path, "--output-dir", "flag")
    assert "95 of 96 rows kept; 1 have no strength" in out and f"{round(share * 95)} pairs flipped" in out
    for one, other in zip(records("flag"), records("file"), strict=True):
        for key in ("train/loss", "train/accuracy", "train/grad_norm"):
            assert one[key] == pytest.approx(other[key], rel=1e-4)


def test_every_pair_gets_its_own_margin_and_target(script, voted, llama, tokenizer):
    """The gradient of the first step, in micro-batches, against one graph over the batch."""
    path, rows = voted
    script("denoise_rm.py", "--strength", path, "--margin", "--soft-targets", 1, "--flip", 0.3, "--micro-tokens", 80)
    cpu = torch.device("cpu")
    model = common.load_reward_model(llama, tokenizer, cpu, settings())
    data = common.tokenize(common.load_rows("toy:n=96"), "toy", tokenizer, 64).select(range(1, 96))
    strength = np.array([row["mean preference difference"] for row in rows[1:]])
    index = common.step_rows(95, 16, 0, 0)
    swap, margin, target = (torch.tensor(x)[index] for x in denoise_rm.targets(
        strength, flip=0.3, margin=True, soft_targets=1))
    rewards = model(common.collate(data, index, cpu))
    rewards = torch.where(swap[:, None], rewards.flip(1), rewards)
    denoise_rm.preference_loss(rewards, margin, target).mean().backward()
    norm = math.sqrt(sum(p.grad.double().square().sum().item() for p in model.parameters()))
    assert records("runs/denoise_rm")[0]["train/grad_norm"] == pytest.approx(norm, rel=1e-3)


def test_pairs_without_a_label_get_soft_targets(script, voted, llama, tokenizer):
    """96 labelled pairs, and 95 voted on of 96 without label: the first gradient against one graph over the batch."""
    path, rows = voted
    out = script("denoise_rm.py", "--unlabelled", path, "--flip", 0.3, "--strength", path, "--batch-size", 190)
    assert "28 pairs flipped, 95 targets other than 1" in out and records("runs/denoise_rm")[0]["pairs"] == 190
    cpu = torch.device("cpu")
    model = common.load_reward_model(llama, tokenizer, cpu, settings())
    data = common.tokenize(common.load_rows("toy:n=96"), "toy", tokenizer, 64).select(range(1, 96))
    strength = torch.tensor([row["mean preference difference"] for row in rows[1:]])
    rewards = model(common.collate(data, np.arange(95), cpu))
    margin = rewards[:, 0] - rewards[:, 1]
    swap = torch.zeros(95, dtype=bool)
    swap[strength.argsort()[:28]] = True
    t = strength.sigmoid()
    losses = torch.cat([softplus_of(torch.where(swap, margin, -margin)),
                        t * softplus_of(-margin) + (1 - t) * softplus_of(margin)])
    losses.mean().backward()
    norm = math.sqrt(sum(p.grad.double().square().sum().item() for p in model.parameters()))
    first = records("runs/denoise_rm")[0]
    assert first["train/objective"] == pytest.approx(losses.mean().item(), rel=1e-4)
    assert first["train/grad_norm"] == pytest.approx(norm, rel=1e-3)


def test_strengths_go_to_their_rows(voted):
    path, rows = voted
    strength = denoise_rm.read_strength(str(path), common.load_rows("toy:n=96"), np.array([0, 3, 7]))
    expected = [math.nan, *(rows[i]["mean preference difference"] for i in (3, 7))]
    assert np.array_equal(strength, expected, equal_nan=True)


def test_every_option_at_once(script, voted):
    out = script("denoise_rm.py", "--strength", voted[0], "--percentiles", 5, 95, "--drop", 0.1, "--flip", 0.1,
                 "--margin", "--smoothing", 0.1, "--smooth-on", "negative", "--soft-targets", 1, "--noise-rate", 0.1,
                 "--eval-data", "voted=train.jsonl", "noisy=toy:noisy,n=40")
    assert "77 of 96 rows kept" in out and "8 pairs flipped, 77 targets other than 1" in out
    last = records("runs/denoise_rm")[-1]
    assert {"eval/noisy/accuracy_second", "eval/noisy/accuracy_agreeing", "eval/voted/accuracy_segment_20"} <= set(last)


def test_strengths_of_the_data_itself(script, voted):
    """Without --strength; and the objective of the log is the loss that is trained on, not below its floor."""
    out = script("denoise_rm.py", "--data", voted[0], "--flip", 0.2, "--smoothing", 0.2)
    assert "95 of 96 rows kept" in out and "19 pairs flipped" in out
    for record in records("runs/denoise_rm"):
        assert record["train/objective"] > 0.5004
    script("denoise_rm.py", "--output-dir", "plain")
    for record in records("plain"):
        assert record["train/objective"] == pytest.approx(record["train/loss"], rel=1e-5)


def test_labels_and_strengths_that_say_nothing():
    """Second labels that are no 0 or 1 take no side, rows without strength are in no segment."""
    rewards = torch.tensor([[1.0, 0], [0, 1], [1, 0], [0, 1]])
    data = datasets.Dataset.from_dict(
        {"GPT4 label": ["A", "A", "B", None], "mean preference difference": [None, 2.0, 1, 3]})
    metrics = denoise_rm.by_label_and_strength(rewards, data, segments=3)
    assert metrics == {"accuracy_segment_01": 1, "accuracy_segment_02": 0, "accuracy_segment_03": 0}
    data = datasets.Dataset.from_dict({"gold": [1.0, math.nan, 0, -1]})
    assert denoise_rm.by_label_and_strength(rewards, data) == {"accuracy_second": 0.5, "accuracy_agreeing": 1}


@pytest.mark.parametrize("flags, words", [
    (["--flip", "1.5"], "--flip 1.5 is not between 0 and 1"),
    (["--drop", "-0.1"], "--drop -0.1 is not between 0 and 1"),
    (["--noise-rate", "0.5"], "--noise-rate 0.5 is not between"),
    (["--percentiles", "50", "50"], "--percentiles 50.0 50.0 leave nothing"),
    (["--percentiles", "0", "0.1"], "leave no row to train on"),
    (["--drop", "1"], "leave no row to train on"),
    (["--flip", "0.1", "--strength", "none.jsonl"], "none.jsonl: no such file"),
    (["--flip", "0.1", "--strength", "short.jsonl"], "--strength short.jsonl has 95 rows, the data 96"),
    (["--flip", "0.1", "--strength", "other.jsonl"], "--strength other.jsonl: row 3 is not that of the data"),
    (["--flip", "0.1", "--strength", "text.jsonl"], "'mean preference difference' is not a number everywhere"),
    (["--flip", "0.1", "--strength", "prompt.jsonl"], "--strength prompt.jsonl: row 2 is not that of the data"),
    (["--flip", "0.1", "--strength", "bare.jsonl"], "bare.jsonl: no column 'chosen'"),
    (["--unlabelled", "column.jsonl", "--flip", "0"], "changes nothing without --percentiles"),
    (["--unlabelled", "column.jsonl", "--margin"], "--unlabelled column.jsonl: no column 'mean preference difference'"),
    (["--noise-rate", "0.2"], "changes nothing without --percentiles"),
    (["--smooth-on", "negative"], "--smoothing has to say how much"),
    (["--smoothing", "0.6"], "--smoothing 0.6 is not between 0 and 0.5"),
    (["--flip", "0.1", "--strength", "column.jsonl"], "column.jsonl: no column 'mean preference difference'"),
])
def test_bad_input(flags, words, script, voted, tmp_path):
    path, rows = voted
    lines = path.read_text().splitlines(keepends=True)
    (tmp_path / "short.jsonl").write_text("".join(lines[:-1]))
    (tmp_path / "other.jsonl").write_text("".join([*lines[:2], lines[5], *lines[3:]]))
    (tmp_path / "column.jsonl").write_text("".join(json.dumps({"chosen": "a", "rejected": "b"}) + "\n" for _ in rows))
    changes = {"text": {"mean preference difference": "much"}, "prompt": {"prompt": "name two tools"}}
    for name, change in changes.items():
        texts = [json.dumps({**row, **(change if name == "text" or i == 1 else {})}) for i, row in enumerate(rows)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(texts))
    (tmp_path / "bare.jsonl").write_text('{"mean preference difference": 1}\n' * len(rows))
    with pytest.raises(SystemExit) as error:
        script("denoise_rm.py", "--strength", path, *flags)
    assert words in str(error.value) and "\n" not in str(error.value)
