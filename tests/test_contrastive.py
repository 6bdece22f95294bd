"""contrastive_rm.py: its losses by hand, its cached gradients against plain ones, and whole runs."""

import math
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from conftest import settings, shell
from safetensors.torch import load_file

import common
import contrastive_rm
from test_baseline import ends_alike, finished, records, weights

RUN, CPU = "runs/contrastive_rm", torch.device("cpu")
VARIANTS = [(method, on) for method in ("simcse", "swav") for on in ("pairs", "differences")]


def tiny(llama, tokenizer, rate=0.05, seed=0):
    """A model with dropout, and the rows of the small runs."""
    model = common.load_reward_model(llama, tokenizer, CPU, settings(seed=seed))
    return model, contrastive_rm.Dropout(model, rate), common.tokenize(
        common.load_rows("toy:n=96"), "toy", tokenizer, 64)


# -------------------------------------------------------------------------------------------------------------- losses
def test_simcse_by_hand():
    one = torch.randn(2, 1, 8)
    assert contrastive_rm.simcse(one, 0.05).item() == 0  # nothing to confuse it with
    views = 3 * torch.eye(4).repeat(2, 1, 1)  # length does not matter
    assert contrastive_rm.simcse(views, 0.5).item() == pytest.approx(-math.log(math.e**2 / (math.e**2 + 3)))


def test_samples():
    features = torch.tensor([[[1.0, 2], [3, 5]], [[7, 8], [9, 9]]])  # (N, 2, hidden)
    assert contrastive_rm.samples(features, "pairs").tolist() == [[1, 2], [7, 8], [3, 5], [9, 9]]
    assert contrastive_rm.samples(features, "differences").tolist() == [[-2, -3], [-2, -1], [2, 3], [2, 1]]


def test_codes_share_the_prototypes():
    scores = torch.randn(64, 8, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    for iterations in (1, 3, 100):
        codes = contrastive_rm.sinkhorn(scores, 0.05, iterations)
        torch.testing.assert_close(codes.sum(1), torch.ones(64))
    torch.testing.assert_close(codes.sum(0), torch.full((8,), 8.0), rtol=1e-3, atol=0)
    greedy = torch.softmax(scores / 0.05, 1).sum(0)
    assert (contrastive_rm.sinkhorn(scores, 0.05, 3).sum(0) - 8).abs().max() < (greedy - 8).abs().max() / 2
    torch.testing.assert_close(contrastive_rm.sinkhorn(scores + 50, 0.05, 3),
                               contrastive_rm.sinkhorn(scores, 0.05, 3), rtol=1e-2, atol=1e-4)  # no overflow
    assert not contrastive_rm.sinkhorn(scores.requires_grad_(), 0.05, 3).requires_grad


def test_swav_by_hand():
    """Two samples, each on a prototype of its own, and the codes are those: p is softmax(1 / tau, 0)."""
    views, prototypes = 2 * torch.eye(2).repeat(2, 1, 1), 7 * torch.eye(2)
    expected = 2 * math.log(1 + math.exp(-1 / 0.5))
    assert contrastive_rm.swav(views, prototypes, 0.5, 0.01, 3).item() == pytest.approx(expected)
    crossed = torch.stack([torch.eye(2), torch.eye(2).flip(0)])  # each view predicts what the other is not
    assert contrastive_rm.swav(crossed, prototypes, 0.5, 0.01, 3).item() == pytest.approx(expected + 4)


# ------------------------------------------------------------------------------------------------------------- dropout
def test_dropout_is_dropout():
    class Bare(torch.nn.Module):
        _no_split_modules = None

        def get_input_embeddings(self):
            return torch.nn.Identity()

    dropout = contrastive_rm.Dropout(common.RewardModel(Bare()), 0.05)
    data = datasets.Dataset.from_list([{"prompt_ids": [1] * 500, "response_ids": [[2], [2]]}] * 2)
    rows = common.collate(data, [0, 1], "cpu")
    dropout.start(0, 0, 0, rows)
    ones = torch.ones(2, 502, 200)
    kept = dropout.drop(ones, 1)
    assert sorted(kept.unique().tolist()) == pytest.approx([0.0, 1 / 0.95])
    zeros = kept == 0
    sd = math.sqrt(0.05 * 0.95 / 200_800)
    assert abs(zeros.double().mean() - 0.05) < 5 * sd  # the hash is fixed: this cannot fail by chance
    for other in (zeros[:, 1:] & zeros[:, :-1], zeros[:, :, 1:] & zeros[:, :, :-1], zeros[0] & zeros[1],
                  zeros & (dropout.drop(ones, 2) == 0)):  # neighbours, rows and layers know nothing of each other
        assert abs(other.double().mean() - 0.0025) < 5 * math.sqrt(0.0025 / other.numel())
    assert not torch.equal(zeros[:, 500], zeros[:, 501])  # the two responses, at the same position
    for changed in ((1, 0, 0), (0, 1, 0), (0, 0, 1)):
        dropout.start(*changed, rows)
        assert not torch.equal(dropout.drop(ones, 1), kept)
    dropout.stop()
    assert dropout.drop(ones, 1) is ones


def test_a_row_is_dropped_alike_in_any_company(llama, tokenizer):
    model, dropout, data = tiny(llama, tokenizer)

    def features(rows, view=0, width=0):
        batch = common.collate(data, rows, CPU, width)
        dropout.start(0, 5, view, batch)
        return model(batch, with_features=True)[1]

    together, longest = features([3, 8, 11]), int(np.argmax(data["length"]))
    torch.testing.assert_close(features([8]), together[1:2])
    torch.testing.assert_close(features([longest, 11])[1], together[2])
    assert (features([8], view=1) - together[1:2]).norm() > 0.1 * together[1].norm()
    torch.testing.assert_close(features([11, 8, 3], width=64), together.flip(0))  # packed
    model.layout = "separate"
    torch.testing.assert_close(features([3, 8, 11]), together)


# ---------------------------------------------------------------------------------------------------------------- runs
@pytest.mark.parametrize("method, on", VARIANTS)
def test_cached_gradients_are_the_gradients(method, on, script, llama, tokenizer):
    """The first step of a run in micro-batches of one row, against one graph over everything."""
    script("contrastive_rm.py", "--method", method, "--on", on, "--prototypes", 6, "--micro-tokens", 1, "--beta", 0.7)
    model, dropout, data = tiny(llama, tokenizer)
    index, views, losses = common.step_rows(96, 16, 0, 0), [], []
    for view in (0, 1):
        batch = common.collate(data, index, CPU)
        dropout.start(0, 0, view, batch)
        rewards, features = model(batch, with_features=True)
        losses.append(contrastive_rm.preference_loss(rewards).mean())
        views.append(features)
    h = contrastive_rm.samples(torch.stack(views), on)
    temperature = contrastive_rm.METHODS[method, on][1]
    torch.manual_seed(0)
    prototypes = torch.nn.Linear(32, 6, bias=False).weight
    contrastive = contrastive_rm.simcse(h, temperature) if method == "simcse" else contrastive_rm.swav(
        h, prototypes, temperature, 0.05, 3)
    (sum(losses) / 2 + 0.7 * contrastive).backward()
    norm = math.sqrt(sum(p.grad.double().square().sum().item() for p in model.parameters()))
    first = records(RUN)[0]
    assert first["train/loss"] == pytest.approx((sum(losses) / 2).item(), rel=1e-4)
    assert first["train/contrastive"] == pytest.approx(contrastive.item(), rel=1e-4)
    assert first["train/grad_norm"] == pytest.approx(norm, rel=1e-3)


def test_neutral_is_the_baseline_bit_for_bit(script):
    script("baseline_rm.py", "--output-dir", "theirs")
    script("contrastive_rm.py", "--beta", 0, "--dropout", 0, "--output-dir", "ours")
    ours, theirs = records("ours"), records("theirs")
    assert [{key: line[key] for key in other} for line, other in zip(ours, theirs, strict=True)] == theirs
    assert all(torch.equal(tensor, weights("theirs")[name]) for name, tensor in weights("ours").items())


@pytest.mark.parametrize("method", ["simcse", "swav"])
def test_processes_and_micro_tokens_do_not_matter(method, llama, tmp_path, script):
    flags = ["--method", method, "--prototypes", 6]
    script("contrastive_rm.py", *flags, "--micro-tokens", 10_000, "--output-dir", "one")
    process = shell(llama, "contrastive_rm.py", *flags, "--output-dir", "two", ranks=2, cwd=tmp_path)
    _, error = process.communicate()
    assert process.returncode == 0, error
    for one, two in zip(records("one"), records("two"), strict=True):
        assert one == pytest.approx(two, rel=5e-3, abs=1e-3)


def test_killed_and_resumed(llama, tmp_path):
    """With SwAV, which has all that SimCSE has, and prototypes."""
    def start(folder, *more):
        return shell(llama, "contrastive_rm.py", "--epochs", 30, "--save-every", 60, "--eval-every", 0, "--method",
                     "swav", "--prototypes", 6, "--output-dir", folder, *more, cwd=tmp_path)

    finished(start(tmp_path / "whole"))
    ends_alike(start, tmp_path / "whole", tmp_path / "broken", "checkpoint-60")


def test_prototypes_learn(script):
    """They begin where the seed puts them, and do not stay there."""
    script("contrastive_rm.py", "--method", "swav", "--prototypes", 6, "--save-every", 10)
    [moved] = [tensor for path in Path(f"{RUN}/checkpoint-10").glob("*.safetensors")
               for name, tensor in load_file(path).items() if name.endswith("prototypes.weight") and "optim" not in name
               and "exp_avg" not in name]
    torch.manual_seed(0)
    start = torch.nn.Linear(moved.size(1), 6, bias=False).weight
    assert 1e-3 < (moved - start).abs().max() < 0.1


def test_overlap():
    features = torch.randn(5000, 2, 3, generator=torch.Generator().manual_seed(0))
    assert contrastive_rm.overlap(features) > 0.9
    features[:, 0] += torch.tensor([20.0, 0, 0])
    assert contrastive_rm.overlap(features) == 0


def test_plot(script, monkeypatch):
    script("contrastive_rm.py", "--plot", "--eval-data", "id=toy:id,n=40", "noisy=toy:noisy,n=40")
    assert Path(f"{RUN}/features.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="--plot draws with matplotlib: pip install matplotlib"):
        script("contrastive_rm.py", "--plot")


@pytest.mark.parametrize("flags, words", [
    (["--beta", "-1"], "--beta is 0 or more"),
    (["--dropout", "1"], "--dropout is from 0 to below 1"),
    (["--temperature", "0"], "--temperature and --epsilon are above 0"),
    (["--method", "swav", "--prototypes", "1"], "--prototypes 2 or more"),
    (["--plot", "--eval-data"], "--plot draws the features of --eval-data"),
    (["--dropout", "0"], "--beta must be 0 as well"),
    (["--lr", "1e30", "--clip", "1e30"], "lower --lr"),
])
def test_bad_input(flags, words, script):
    with pytest.raises(SystemExit) as error:
        script("contrastive_rm.py", *flags)
    assert words in str(error.value) and "\n" not in str(error.value)
