"""meta_rm.py: its objective by hand, its two phases against the plainest loop, and whole runs."""

import argparse
import itertools
import json
import math
import random
from pathlib import Path

import pytest
import torch
import transformers
from conftest import settings, shell

import common
import meta_rm
from test_baseline import ends_alike, finished, records, weights

RUN = "runs/meta_rm"


@pytest.fixture
def meta(tmp_path):
    """Twenty rows of a prompt with five responses, as ppo_loop.py writes them; the last two are held out."""
    rng, rows = random.Random(0), []
    for _ in range(20):
        prompt = common.toy_prompt(rng, 1)
        rows.append({"prompt": prompt, "responses": [common.toy_response(rng, prompt, 0.9) for _ in range(5)]})
    (tmp_path / "meta.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def trained(script, *flags):
    """A run that reads its meta set, with steps that can be seen in fp32."""
    return script("meta_rm.py", "--meta-data", "meta.jsonl", "--meta-batch-size", 4, *flags)


# ---------------------------------------------------------------------------------------------------------- objective
def test_objective_and_its_bounds():
    """k = 5: 0.4 where all are equal, always below 0.8; only differences count."""
    equal = torch.full((3, 5), 1.7, dtype=torch.float64, requires_grad=True)
    assert meta_rm.difference(equal).tolist() == pytest.approx([0.4] * 3)
    assert torch.autograd.grad(meta_rm.difference(equal).sum(), equal)[0].abs().max() == 0
    rewards = 9 * torch.randn(1000, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    values = meta_rm.difference(rewards)
    assert 0.4 < values.min() and values.max() < 0.8
    assert meta_rm.difference(torch.arange(5.0)[None].double() * 1e3).item() == pytest.approx(0.8)
    torch.testing.assert_close(meta_rm.difference(rewards + 3), values)
    torch.testing.assert_close(meta_rm.difference(rewards.flip(1)), values)


def test_objective_by_hand():
    def sigmoid(x):
        return 1 / (1 + math.exp(-x))

    by_hand = 2 / 9 * (sigmoid(1) + sigmoid(4) + sigmoid(3))
    assert meta_rm.difference(torch.tensor([[0.0, 1.0, -3.0]])).item() == pytest.approx(by_hand)


# --------------------------------------------------------------------------------------------------------------- runs
@pytest.mark.parametrize("update", ["restore", "alternate"])
@pytest.mark.parametrize("ascent", ["plain", "normalized"])
def test_run_against_the_plainest_loop(update, ascent, script, llama, tokenizer, meta):
    """One response at a time, in float64, both phases and the optimizer written out; three steps."""
    eta = 0.3
    trained(script, "--eta", eta, "--ascent", ascent, "--update", update, "--epochs", 0.5)
    model = common.load_reward_model(llama, tokenizer, torch.device("cpu"), settings()).model.double()
    parameters, rows = list(model.parameters()), common.toy_comparisons(n=96)
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in parameters]

    def reward(text):
        return model(**tokenizer(text + " </s>", return_tensors="pt")).logits[0, 0]

    for step, record in enumerate(records(RUN)):
        before, terms = [p.detach().clone() for p in parameters], []
        for row in (meta[i] for i in common.step_rows(18, 4, 0, step)):
            pairs = itertools.combinations([reward(row["prompt"] + response) for response in row["responses"]], 2)
            terms += [2 / 25 * torch.sigmoid(abs(a - b)) for a, b in pairs]
        objective = sum(terms) / 4
        slopes = torch.autograd.grad(objective, parameters)
        slope = sum(g.square().sum() for g in slopes).sqrt()
        shift = eta if ascent == "normalized" else eta * slope.item()
        with torch.no_grad():
            for p, g in zip(parameters, slopes):
                p += shift * g / slope
        pairs = [rows[i] for i in common.step_rows(96, 16, 0, step)]
        loss = -sum(torch.sigmoid(reward(row["prompt"] + row["chosen"]) - reward(row["prompt"] + row["rejected"])).log()
                    for row in pairs) / 16
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
        assert record["train/J"] == pytest.approx(objective.item(), rel=1e-4)
        assert record["train/shift"] == pytest.approx(shift, rel=1e-3)
        assert record["train/loss"] == pytest.approx(loss.item(), rel=1e-4)
        assert record["train/grad_norm"] == pytest.approx(norm.item(), rel=1e-3)
        assert record["train/update"] == pytest.approx(moved.item(), rel=2e-2)
    for name, tensor in model.state_dict().items():
        assert (weights(RUN)[name] - tensor).abs().max() < 3e-4, name  # a step is 1e-3


def test_no_ascent_is_the_baseline_bit_for_bit(script):
    script("baseline_rm.py", "--output-dir", "theirs")
    script("meta_rm.py", "--eta", 0, "--output-dir", "ours")
    assert records("ours") == records("theirs")
    assert all(torch.equal(tensor, weights("theirs")[name]) for name, tensor in weights("ours").items())


def test_weights_are_restored_exactly(script, llama, tokenizer, meta):
    """With a rate that AdamW cannot feel, a step leaves them as they were, however far they went in between."""
    trained(script, "--eta", 100, "--ascent", "normalized", "--lr", 1e-30, "--epochs", 0.2, "--clip", 1e-30)
    assert records(RUN)[0]["train/shift"] == pytest.approx(100) and records(RUN)[0]["train/update"] < 1e-20
    start = common.load_reward_model(llama, tokenizer, torch.device("cpu"), settings()).model.state_dict()
    assert all(torch.equal(tensor, start[name]) for name, tensor in weights(RUN).items())


def test_micro_tokens_are_memory_only(script, meta):
    for tokens in (1, 10_000):
        trained(script, "--eta", 0.1, "--micro-tokens", tokens, "--output-dir", tokens)
    for one, other in zip(records("1"), records("10000"), strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-5)


def test_two_processes_train_alike(llama, tmp_path, script, meta):
    flags = ["--eta", 0.1, "--ascent", "normalized", "--meta-batch-size", 4, "--policy", llama, "--meta-prompts", 40,
             "--max-new-tokens", 6]
    script("meta_rm.py", *flags, "--output-dir", "one")
    process = shell(llama, "meta_rm.py", *flags, "--output-dir", "two", ranks=2, cwd=tmp_path)
    _, error = process.communicate()
    assert process.returncode == 0, error
    assert Path("one/meta.jsonl").read_text() == Path("two/meta.jsonl").read_text()
    for one, two in zip(records("one"), records("two"), strict=True):
        assert one == pytest.approx(two, rel=1e-3, abs=1e-5)


def test_samples(script, llama, tokenizer):
    """A policy without any preference says every word there is. Its samples are kept, and a resumed run reads them."""
    policy = transformers.AutoModelForCausalLM.from_pretrained(llama)
    torch.nn.init.zeros_(policy.lm_head.weight)
    policy.save_pretrained("policy")
    tokenizer.save_pretrained("policy")
    flags = ["--policy", "policy", "--meta-prompts", 30, "--responses", 4, "--max-new-tokens", 3, "--save-every", 5,
             "--eta", 0.1]
    out = script("meta_rm.py", *flags)
    after = records(RUN)[-1]
    assert "meta data held out, before training: J 0.4" in out  # a new head hardly tells them apart
    gap = after["eval/meta/difference"]
    assert f"held out, after: J {after['eval/meta/J']:.3f}, |reward difference| {gap:.3f}" in out
    rows = [json.loads(line) for line in Path(f"{RUN}/meta.jsonl").read_text().splitlines()]
    prompts = [row["prompt"] for row in common.toy_comparisons(n=96)]
    assert len(rows) == 30 and all(row["prompt"] in prompts and len(row["responses"]) == 4 for row in rows)
    words = [word for row in rows for response in row["responses"] for word in response.split()]
    assert len(set(words)) > 50 and max(len(response.split()) for row in rows for response in row["responses"]) == 3
    out = script("meta_rm.py", *flags, "--resume")
    assert f"{RUN}/meta.jsonl: " in out and "before" not in out


def test_conversations_are_answered(script, llama, tokenizer, tmp_path):
    """Prompts of messages go through the chat template, and come back with messages for answers."""
    chat = transformers.AutoTokenizer.from_pretrained(llama)
    chat.chat_template = ("{% for m in messages %}{{ 'Human: ' if m.role == 'user' else 'Assistant: ' }}"
                          "{{ m.content }} {% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}")
    transformers.AutoModelForCausalLM.from_pretrained(llama).save_pretrained("chat")
    chat.save_pretrained("chat")
    rows = [{"prompt": [{"role": "user", "content": f"name {number} {kind}"}],
             "chosen": [{"role": "assistant", "content": " ".join(words.split()[:2])}],
             "rejected": [{"role": "assistant", "content": "gin"}]}
            for number in ("two", "three") for kind, words in common.THINGS.items()]
    Path("talk.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = script("meta_rm.py", "--model", "chat", "--data", "talk.jsonl", "--eval-data", "--eta", 0.1, "--batch-size",
                 4, "--max-new-tokens", 6, "--responses", 3)
    assert "chat answers 16 prompts 3 times" in out and "meta data held out, after" in out
    row = json.loads(Path(f"{RUN}/meta.jsonl").read_text().splitlines()[0])
    assert row["prompt"][0]["role"] == "user" and [y[0]["role"] for y in row["responses"]] == ["assistant"] * 3


def test_meta_data_is_watched_without_ascent(script, meta):
    """So that the baseline can be compared on it."""
    out = script("meta_rm.py", "--eta", 0, "--meta-data", "meta.jsonl")
    assert "meta data held out, after" in out and "eval/meta/difference" in records(RUN)[-1]
    assert "train/shift" not in records(RUN)[-1]


def test_long_prompts_are_cut_before_sampling(tmp_path, tokenizer):
    """A policy of few positions, whose own settings for generation do not count."""
    config = transformers.GPT2Config(vocab_size=len(common.WORDS), n_embd=16, n_layer=1, n_head=2, n_positions=20)
    policy = transformers.GPT2LMHeadModel(config)
    policy.generation_config.repetition_penalty, policy.generation_config.num_beams = 50.0, 2
    policy.save_pretrained(tmp_path / "policy")
    tokenizer.save_pretrained(tmp_path / "policy")
    args = argparse.Namespace(temperature=1.0, max_new_tokens=5, max_length=20, sample_batch=4)
    prompts = ["name two fruits " * 30, "name two tools "]
    rows = common.sample_responses(
        tmp_path / "policy", "--policy", prompts, 2, (0, 0, 1), args, torch.device("cpu"))
    assert [row["prompt"] for row in rows] == prompts
    assert not any(answer.startswith(" ") for row in rows for answer in row["responses"])  # the prompts end in a space
    model = common.load_language_model(tmp_path / "policy", "--policy", torch.float32, tokenizer, 0.7, 5)
    assert model.generation_config.repetition_penalty in (None, 1) and model.generation_config.temperature == 0.7


def test_killed_and_resumed(llama, tmp_path, meta):
    def start(folder, *more):
        return shell(llama, "meta_rm.py", "--epochs", 30, "--save-every", 60, "--eval-every", 0, "--eta", 0.1,
                     "--meta-data", "meta.jsonl", "--output-dir", folder, *more, cwd=tmp_path)

    finished(start(tmp_path / "whole"))
    ends_alike(start, tmp_path / "whole", tmp_path / "broken", "checkpoint-60")


@pytest.mark.parametrize("flags, words", [
    (["--eta", "-1"], "--eta and --meta-prompts are 0 or more"),
    (["--temperature", "0"], "--temperature and --max-new-tokens above 0"),
    (["--responses", "1"], "--responses is 2 or more"),
    (["--max-new-tokens", "64"], "--max-new-tokens 64 leave nothing of --max-length 64 to a prompt"),
    (["--model", "random.json", "--max-new-tokens", "6"], "cannot answer prompts, its weights are random"),
    (["--meta-data", "pairs.jsonl"], "pairs.jsonl: no column 'prompt'"),
    (["--meta-data", "none.jsonl"], "none.jsonl: no such file"),
    (["--meta-data", "few.jsonl"], "few.jsonl: row 2: it needs a 'prompt' and two 'responses' or more"),
    (["--meta-data", "same.jsonl"], "same.jsonl: none of 2 rows can be used"),
    (["--meta-data", "uneven.jsonl"], "uneven.jsonl: the rows have 2 to 5 responses, not all as many"),
    (["--meta-data", "one.jsonl"], "one.jsonl: two rows are the least"),
    (["--meta-data", "column.jsonl"], "column.jsonl: no column 'prompt'"),
    (["--policy", "nowhere", "--max-new-tokens", "6"], "nowhere is no folder or file here"),
    (["--policy", "runs/baseline_rm/model", "--max-new-tokens", "6"], "is no language model: lm_head.weight"),
    (["--meta-data", "meta.jsonl", "--eta", "1e30"], "lower --eta or --lr"),
])
def test_bad_input(flags, words, script, meta, tmp_path):
    row = meta[0]
    files = {"few": [row, {**row, "responses": [" fig"]}], "same": [{**row, "responses": [" fig", " fig"]}] * 2,
             "uneven": [row, {**row, "responses": row["responses"][:2]}], "one": [row],
             "column": [{"responses": row["responses"]}], "pairs": [{"chosen": "a", "rejected": "b"}]}
    for name, rows in files.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if "runs/baseline_rm/model" in flags:
        script("baseline_rm.py")
    with pytest.raises(SystemExit) as error:
        script("meta_rm.py", *flags)
    assert words in str(error.value) and "\n" not in str(error.value)
