"""contrastive_rm.py: its losses by hand, its dropout, its cached gradients against one graph, and whole runs."""

import math

import pytest
import torch
from conftest import data, launch, settings
from test_run import assert_close, interrupt, records

import common
import contrastive_rm as rm

SCRIPT, SWAV = "contrastive_rm.py", ["--method", "swav", "--num-prototypes", 6]


def tiny(llama, tokenizer, rate, **changes):
    """A model with dropout, its data, and the micro-batches of the first step of a small run."""
    rows = common.tokenize(common.load_rows(data()), "data", tokenizer, 64)
    model = common.load_reward_model(llama, tokenizer, torch.device("cpu"), settings(**changes), dropout=rate)
    return model, rows, [*common.micro_batches(rows, common.batch_indices(96, 16, 0, 0), 100, model)]


def test_losses_by_hand():
    one, h = torch.randn(1, 8), torch.eye(4, dtype=torch.float64)
    assert rm.simcse_loss(one, torch.randn_like(one), 0.05).item() == 0  # N' = 1: nothing to confuse it with
    expected = -math.log(math.e**2 / (math.e**2 + 3))
    assert rm.simcse_loss(3 * h, 7 * h, 0.5).item() == pytest.approx(expected)  # length does not matter
    assert rm.simcse_loss(h, h.flip(0), 0.5).item() == pytest.approx(expected + 2)
    h, expected = h[:2, :2], 2 * math.log(1 + math.exp(-1 / 0.5))  # a prototype for each: codes (1, 0) and (0, 1)
    assert rm.swav_loss(2 * h, 3 * h, 7 * h, 0.5).item() == pytest.approx(expected)
    assert rm.swav_loss(h, h.flip(0), h, 0.5).item() == pytest.approx(expected + 4)


def test_sinkhorn_by_hand():
    scores = torch.randn(64, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    q = scores.div(0.5).exp()
    for _ in range(3):
        q = q / q.sum(0)
        q = q / q.sum(1, keepdim=True)
    codes = rm.sinkhorn(scores.requires_grad_(), 0.5, 3)
    torch.testing.assert_close(codes, q)
    assert not codes.requires_grad
    torch.testing.assert_close(rm.sinkhorn(scores, 0.5, 100).sum(0), torch.full((8,), 8.0, dtype=torch.float64))


def test_stack_samples():
    features = torch.tensor([[[[1, 2], [3, 5]], [[7, 8], [9, 9]]]])  # one view, N = 2
    assert rm.stack_samples(features, "pairs").tolist() == [[[1, 2], [7, 8], [3, 5], [9, 9]]]
    assert rm.stack_samples(features, "differences").tolist() == [[[-2, -3], [-2, -1], [2, 3], [2, 1]]]


def test_both_passes_see_the_same_masks(llama, tokenizer, monkeypatch):
    """Also if activations are recomputed, and then the gradients are those of the same masks."""
    def features(seed, step):  # (32, 2, hidden), the first view first
        return torch.cat([x[3] for x in rm.forward_views(model, batches, 2, seed, step)])

    gradients = []
    for checkpointing in (False, True):
        model, rows, batches = tiny(llama, tokenizer, 0.2, gradient_checkpointing=checkpointing)
        with torch.no_grad():
            first = features(0, 5)
        second = features(0, 5)
        assert torch.equal(first, second)
        second.square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(*gradients)
    others = [first.roll(16, 0), features(1, 5), features(0, 6)]  # views, seeds and steps differ
    monkeypatch.setattr(rm, "RANK", 1)
    for other in (*others, features(0, 5)):  # and ranks
        assert (other - first).norm() > 0.1 * first.norm()
    plain = tiny(llama, tokenizer, 0.0)[0]  # what the evaluation of the model is, too
    assert torch.equal(common.compute_rewards(model, rows, 256), common.compute_rewards(plain, rows, 256))


@pytest.mark.parametrize("method", ["simcse", "swav"])
@pytest.mark.parametrize("on", ["pairs", "differences"])
def test_cached_gradients_are_the_gradients(method, on, script, llama, tokenizer, monkeypatch):
    """Those that the optimizer gets in a run with several micro-batches, against one graph over everything."""
    def step(optimizer):
        seen.extend(p.grad.clone() for group in optimizer.param_groups for p in group["params"] if p.grad is not None)
        raise KeyboardInterrupt

    seen = []
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    with pytest.raises(KeyboardInterrupt):
        script(SCRIPT, *SWAV, "--method", method, "--on", on, "--beta", 0.7, "--temperature", 0.3,
               "--micro-batch-tokens", 100, "--max-grad-norm", 1e9)
    model, _, batches = tiny(llama, tokenizer, 0.05)
    _, _, rewards, features = zip(*rm.forward_views(model, batches, 2, 0, 0))
    h_s, h_t = rm.stack_samples(torch.cat(features).view(2, 16, 2, 32), on)
    torch.manual_seed(0)
    prototypes = torch.nn.Linear(32, 6, bias=False)
    contrastive = rm.simcse_loss(h_s, h_t, 0.3)
    if method == "swav":
        contrastive = rm.swav_loss(h_s, h_t, prototypes.weight, 0.3)
    (rm.preference_loss(torch.cat(rewards)).mean() + 0.7 * contrastive).backward()
    expected = [p.grad for p in (*model.parameters(), *prototypes.parameters()) if p.grad is not None]
    for gradient, other in zip(seen, expected, strict=True):
        assert len(batches) > 2 and (gradient - other).norm() < 1e-5 * other.norm()


def test_neutral_is_the_baseline_bit_for_bit(script):
    script("baseline_rm.py", "--output-dir", "baseline")
    script(SCRIPT, "--beta", 0, "--dropout", 0, "--output-dir", "neutral")
    assert_close("neutral", "baseline", rel=0)
    with pytest.raises(SystemExit, match="--dropout 0"):  # beta is not 0
        script(SCRIPT, "--dropout", 0)


def test_what_is_logged_of_the_first_step(script):
    """Means over the views; the contrastive loss without its weight. This dropout makes the views equal, as in models
    that have none, and the run says so."""
    script("baseline_rm.py", "--epochs", 0.1, "--output-dir", "baseline")
    for beta in (1, 0.25):
        out = script(SCRIPT, "--beta", beta, "--dropout", 1e-9, "--epochs", 0.1, "--output-dir", f"beta-{beta}")
        assert "views are equal" in out
    assert "views are equal" not in script(SCRIPT, "--epochs", 0.1, "--output-dir", "other")
    [one], [quarter], [plain] = records("beta-1"), records("beta-0.25"), records("baseline")
    assert one["train/contrastive"] == pytest.approx(quarter["train/contrastive"], rel=1e-6)
    for key in ("train/loss", "train/accuracy", "train/reward_chosen"):
        assert one[key] == pytest.approx(plain[key], rel=1e-5)


def test_resumed_with_prototypes(script, monkeypatch):
    """A run that ends between two checkpoints and goes on is the uninterrupted run, bit for bit."""
    script(SCRIPT, *SWAV, "--output-dir", "whole")
    interrupt(monkeypatch, 8, script, SCRIPT, *SWAV, "--save-every", 5, "--output-dir", "broken")
    script(SCRIPT, *SWAV, "--save-every", 5, "--output-dir", "broken", "--resume")
    assert_close("broken", "whole", rel=0)


def test_ranks_do_not_matter(script, llama, tmp_path):
    """The negatives are those of all ranks. Dropout of 1e-9 drops nothing: the masks would depend on the ranks."""
    flags = [SCRIPT, *SWAV, "--epochs", 1, "--dropout", 1e-9, "--output-dir"]
    two = launch(llama, *flags, "two", ranks=2)
    script(*flags, "one")
    two.finish()
    assert_close("two", "one")
