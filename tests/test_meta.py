"""meta_rm.py: its objective by hand, its two phases against the plainest loop, and whole runs."""

import itertools
import json
import math
import random
from pathlib import Path

import pytest
import torch
from conftest import launch, settings, toy
from test_run import assert_close, interrupt, records, weights
from transformers import AutoModelForCausalLM

import common
import meta_rm

RUN, CPU = "runs/meta_rm", torch.device("cpu")


@pytest.fixture
def meta(tmp_path):
    """Twenty rows of a prompt with five responses, as ppo_loop.py writes them; the last two are held out."""
    rng, rows = random.Random(0), []
    for _ in range(20):
        prompt = toy.make_prompt(rng, 1)
        rows.append({"prompt": prompt, "responses": [toy.make_response(rng, prompt, 0.9) for _ in range(5)]})
    (tmp_path / "meta.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def train(script, *flags):
    return script("meta_rm.py", "--meta-data", "meta.jsonl", "--meta-batch-size", 4, *flags)


def test_objective_and_its_bounds():
    """k = 5: 0.4 where all are equal, always below 0.8; only differences count. And one value by hand."""
    equal = torch.full((3, 5), 1.7, dtype=torch.float64, requires_grad=True)
    assert meta_rm.difference_loss(equal).tolist() == pytest.approx([0.4] * 3)
    assert torch.autograd.grad(meta_rm.difference_loss(equal).sum(), equal)[0].abs().max() == 0
    rewards = 9 * torch.randn(1000, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    values = meta_rm.difference_loss(rewards)
    assert 0.4 < values.min() and values.max() < 0.8
    torch.testing.assert_close(meta_rm.difference_loss(rewards.flip(1) + 3), values)
    by_hand = 2 / 9 * sum(1 / (1 + math.exp(-gap)) for gap in (1, 4, 3))
    assert meta_rm.difference_loss(torch.tensor([[0.0, 1.0, -3.0]])).item() == pytest.approx(by_hand)


@pytest.mark.parametrize("update, ascent", [("restore", "plain"), ("alternate", "normalized")])
def test_run_against_the_plainest_loop(update, ascent, script, llama, tokenizer, meta):
    """One response at a time, in float64, both phases and the optimizer written out; three steps."""
    eta = 0.3
    train(script, "--eta", eta, "--ascent", ascent, "--update", update, "--epochs", 0.5)
    model = common.load_reward_model(llama, tokenizer, CPU, settings()).hf_model.double()
    parameters, rows = list(model.parameters()), toy.make_comparisons(n=96)
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in parameters]

    def reward(text):
        return model(**tokenizer(text + " </s>", return_tensors="pt")).logits[0, 0]

    for step, record in enumerate(records(RUN)):
        before, terms = [p.detach().clone() for p in parameters], []
        for i in common.batch_indices(18, 4, 0, step):
            rewards = [reward(meta[i]["prompt"] + response) for response in meta[i]["responses"]]
            terms += [2 / 25 * torch.sigmoid(abs(a - b)) for a, b in itertools.combinations(rewards, 2)]
        objective = sum(terms) / 4
        slopes = torch.autograd.grad(objective, parameters)
        slope = sum(g.square().sum() for g in slopes).sqrt()
        shift = eta if ascent == "normalized" else eta * slope.item()
        with torch.no_grad():
            for p, g in zip(parameters, slopes):
                p += shift * g / slope
        batch = [rows[i] for i in common.batch_indices(96, 16, 0, step)]
        margins = [reward(row["prompt"] + row["chosen"]) - reward(row["prompt"] + row["rejected"]) for row in batch]
        loss = -torch.sigmoid(torch.stack(margins)).log().mean()
        gradients = torch.autograd.grad(loss, parameters)
        norm = sum(g.square().sum() for g in gradients).sqrt()
        with torch.no_grad():
            for p, old, g, (m, v) in zip(parameters, before, gradients, moments):
                if update == "restore":
                    p.copy_(old)
                m.copy_(0.9 * m + 0.1 * g / max(1, norm))
                v.copy_(0.95 * v + 0.05 * (g / max(1, norm)) ** 2)
                lr = 1e-3 * min(step + 1, (3 - step) / 2)
                p -= lr * m / (1 - 0.9 ** (step + 1)) / ((v / (1 - 0.95 ** (step + 1))).sqrt() + 1e-6)
            moved = sum((p - old).square().sum() for p, old in zip(parameters, before)).sqrt()
        expected = {"train/J": objective.item(), "train/ascent": shift, "train/loss": loss.item(),
                    "train/grad_norm": norm.item()}
        assert {key: record[key] for key in expected} == pytest.approx(expected, rel=1e-3)
        assert record["train/update"] == pytest.approx(moved.item(), rel=2e-2)
    for name, tensor in model.state_dict().items():
        assert (weights(RUN)[name] - tensor).abs().max() < 3e-4, name  # a step is 1e-3


def test_no_ascent_is_the_baseline_bit_for_bit(script, meta):
    script("baseline_rm.py", "--output-dir", "theirs")
    train(script, "--eta", 0, "--output-dir", "ours")
    for ours, theirs in zip(records("ours"), records("theirs"), strict=True):
        assert {key: ours[key] for key in theirs} == theirs
    assert all(torch.equal(tensor, weights("theirs")[name]) for name, tensor in weights("ours").items())


def test_weights_are_restored_exactly(script, llama, tokenizer, meta):
    """Without a step of AdamW they are as they were, however far the ascent went."""
    train(script, "--eta", 100, "--ascent", "normalized", "--lr", 0, "--epochs", 0.2)
    assert records(RUN)[0]["train/ascent"] == pytest.approx(100)
    start = common.load_reward_model(llama, tokenizer, CPU, settings()).hf_model.state_dict()
    assert all(torch.equal(tensor, start[name]) for name, tensor in weights(RUN).items())


def test_shift_is_what_arrives_in_bf16(script, llama, tokenizer, meta):
    """Weights on the bf16 grid, as pretrained ones are: a small step is rounded away, and the log says so."""
    AutoModelForCausalLM.from_pretrained(llama, dtype=torch.bfloat16).save_pretrained("grid")
    tokenizer.save_pretrained("grid")
    shifts = {}
    for dtype in ("float32", "bfloat16"):
        out = train(script, "--model", "grid", "--dtype", dtype, "--eta", 5e-6, "--epochs", 0.2, "--output-dir", dtype)
        shifts[dtype] = records(dtype)[0]["train/ascent"]
        assert ("bfloat16 rounds" in out) == (dtype == "bfloat16")
    assert shifts["bfloat16"] < 0.5 * shifts["float32"]


def test_micro_batches_and_ranks_do_not_change_the_run(llama, tmp_path, script, meta):
    flags = ["--eta", 0.1, "--epochs", 1, "--output-dir"]
    train(script, *flags, "one")
    train(script, *flags, "micro", "--micro-batch-tokens", 1)
    launch(llama, "meta_rm.py", "--meta-data", "meta.jsonl", "--meta-batch-size", 4, *flags, "two", ranks=2).finish()
    assert_close("micro", "one")
    assert_close("two", "one")


def test_interrupted_and_resumed(script, meta, monkeypatch):
    train(script, "--eta", 0.1, "--output-dir", "whole")
    flags = ["--eta", 0.1, "--save-every", 5, "--output-dir", "broken"]
    interrupt(monkeypatch, 8, train, script, *flags)
    train(script, *flags, "--resume")
    assert_close("broken", "whole", rel=0)


@pytest.mark.parametrize("change", ["none", "one response", "equal responses", "uneven", "one row"])
def test_bad_meta_data(change, script, meta):
    row, name = meta[0], change.replace(" ", "-") + ".jsonl"
    rows = {"one response": [row, {**row, "responses": [" fig"]}],
            "equal responses": [{**row, "responses": [" fig"] * 2}],
            "uneven": [row, {**row, "responses": row["responses"][:2]}], "one row": [row]}
    if change in rows:
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows[change]))
    with pytest.raises(SystemExit) as error:
        script("meta_rm.py", "--meta-data", name)
    assert name in str(error.value) and "\n" not in str(error.value)
