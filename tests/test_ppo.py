"""ppo_loop.py: its pieces against plain float64 loops, a bandit with a known optimum, and whole runs."""

import argparse
import functools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import shell
from safetensors.torch import load_file
from test_baseline import CLOCK, ends_alike, finished
from test_batch import DATA, ROWS, SEPARATES, SHARES, load
from torch.distributed.tensor import DTensor

import common
import ppo_loop

RUN, CPU = "runs/ppo_loop", torch.device("cpu")
RM = "--epochs 1 --batch-size 16 --lr 1e-3 --max-length 64 --micro-tokens 256 --meta-prompts 20 --max-new-tokens 4"
SMALL = ["--rm-flags", RM, "--rounds", 1, "--iterations", 6, "--batch-size", 8, "--rollouts", 2, "--max-new-tokens", 6,
         "--critic-lr", 1e-3, "--eval-prompts", 5, "--temperature", 1, "--sample-batch", 32]


def small_args(**changes):
    return argparse.Namespace(**{"temperature": 1.0, "max_new_tokens": 5, "gradient_checkpointing": False,
                                 "dtype": "float32", "max_length": 64, "seed": 0, "micro_tokens": 256, **changes})


def records(folder=RUN):
    """The run's metrics, without the clock's."""
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in CLOCK and "seconds" not in key} for line in lines]


def flat(record):
    return {key: value for key, value in record.items() if key != "samples"}


# -------------------------------------------------------------------------------------------------------------- pieces
def test_response_tokens_by_hand():
    batch = common.collate(DATA, [0, 1], "cpu")
    before, place, real = common.response_tokens(batch)
    for i, (prompt, responses) in enumerate(ROWS[:2]):
        for j, response in enumerate(responses):
            there = real[i, j]
            assert there.tolist() == [t < len(response) for t in range(real.size(2))]
            assert batch.input_ids.flatten()[place[i, j][there]].tolist() == response
            assert batch.input_ids.flatten()[before[i, j][there]].tolist() == [prompt[-1], *response[:-1]]
            assert batch.positions.flatten()[before[i, j][there]].tolist() == [
                len(prompt) - 1 + t for t in range(len(response))]
            assert (place[i, j][~there] == place[i, j, 0]).all() and (before[i, j][~there] == before[i, j, 0]).all()


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma", "bloom"])
def test_policy_reads_what_separate_rows_say(name, tmp_path, tokenizer):
    """Log-probabilities at a temperature, entropies, and the critic's values, one response at a time."""
    config = (SHARES | SEPARATES)[name]
    torch.manual_seed(0)
    plain = transformers.AutoModelForCausalLM.from_config(config).eval()
    plain.save_pretrained(tmp_path)
    policy = ppo_loop.load_policy(tmp_path, tokenizer, CPU, small_args())
    critic = load(config, tmp_path / "critic", tokenizer)
    assert policy.layout == ("shared" if name in SHARES else "separate")
    batch = common.collate(DATA, [0, 1, 2], "cpu")
    with torch.no_grad():
        logp, entropy = policy(batch, 0.7)
        values = critic(batch, every=True)
    for i, (prompt, responses) in enumerate(ROWS):
        for j, response in enumerate(responses):
            ids, n = torch.tensor([prompt + response]), len(response)
            with torch.no_grad():
                expected = torch.log_softmax(plain(ids).logits[0, len(prompt) - 1 : -1] / 0.7, -1)
                hidden = critic.model.base_model(ids).last_hidden_state[0, len(prompt) - 1 : -1]
            picked = expected[range(n), response]
            torch.testing.assert_close(logp[i, j, :n], picked, rtol=0, atol=2e-5)
            torch.testing.assert_close(entropy[i, j, :n], torch.distributions.Categorical(logits=expected).entropy(),
                                       rtol=0, atol=2e-5)
            torch.testing.assert_close(values[i, j, :n], critic.model.score(hidden)[:, 0], rtol=0, atol=2e-5)
            assert (logp[i, j, n:] == 0).all() and (entropy[i, j, n:] == 0).all()
    for learnt in (False, True):  # and the graph of an entropy that nobody learns from would take memory
        logp, entropy = policy(batch, 0.7, learn_entropy=learnt)
        assert logp.requires_grad and entropy.requires_grad == learnt


def test_sampling_in_bf16_leaves_the_weights_sharded(llama, tokenizer):
    """Gathered for the whole of it, they must be gathered anew after the next step."""
    policy = ppo_loop.load_policy(llama, tokenizer, CPU, small_args(dtype="bfloat16"))
    for _ in range(2):
        before = policy(common.collate(DATA, [0, 1, 2], "cpu"))[0].detach()
        answers = common.respond(policy, [[1, 5], [1, 6, 7]], 3, (0, 0, 0), 2, CPU)
        assert [len(answer) for answer in answers] == [3, 3] and policy.training
        assert all(isinstance(p, DTensor) for p in policy.parameters())
        with torch.no_grad():
            for p in policy.parameters():
                p.mul_(1.5)
        assert (policy(common.collate(DATA, [0, 1, 2], "cpu"))[0] - before).abs().max() > 0.01


def test_advantages_against_a_plain_loop():
    """A response of its own length each; what stands behind it, any numbers here, does not count."""
    generator = torch.Generator().manual_seed(0)
    rewards, values = (torch.randn(4, 3, 7, dtype=torch.float64, generator=generator) for _ in "rv")
    counts = torch.randint(1, 8, (4, 3), generator=generator)
    real = torch.arange(7) < counts[..., None]
    result = ppo_loop.advantages(rewards, values, real, 0.9, 0.8)
    for i in range(4):
        for j in range(3):
            r, v = rewards[i, j, : counts[i, j]].tolist(), [*values[i, j, : counts[i, j]].tolist(), 0.0]
            deltas = [r[t] + 0.9 * v[t + 1] - v[t] for t in range(len(r))]
            expected = [sum((0.9 * 0.8) ** (u - t) * deltas[u] for u in range(t, len(r))) for t in range(len(r))]
            assert result[i, j, : len(r)].tolist() == pytest.approx(expected, rel=1e-12)
            assert (result[i, j, len(r) :] == 0).all()


def test_advantages_of_known_returns():
    """lambda = gamma = 1: what is still to come, less the value."""
    rewards, values = torch.tensor([[1.0, 2, 3]]), torch.tensor([[10.0, 20, 30]])
    assert ppo_loop.advantages(rewards, values, torch.ones(1, 3), 1, 1).tolist() == [[6 - 10, 5 - 20, 3 - 30]]


def test_policy_loss_by_hand():
    """Ratios 1, 1.5 and 0.5, for advantages of both signs: held back where the ratio has gone the way it should."""
    logp, advantage = torch.tensor([1.0, 1.5, 0.5] * 2).log(), torch.tensor([2.0] * 3 + [-2.0] * 3)
    loss, held = ppo_loop.policy_loss(logp, torch.zeros(6), advantage, 0.2)
    torch.testing.assert_close(loss, torch.tensor([-2, -2.4, -1, 2, 3, 1.6]))
    assert held.tolist() == [False, True, False, False, False, True]
    torch.testing.assert_close(ppo_loop.policy_loss(logp[:1], logp[:1], advantage[:1], 0.2)[0], -advantage[:1])


def test_value_loss_by_hand():
    values, old, returns = torch.tensor([1.0, 3, 3]), torch.tensor([1.0, 1, 1]), torch.tensor([2.0, 4, 0])
    loss, held = ppo_loop.value_loss(values, old, returns, 0.5)
    assert loss.tolist() == [0.5, 2.5**2 / 2, 4.5]
    assert held.tolist() == [False, True, False]
    assert ppo_loop.value_loss(values, old, returns, 0)[0].tolist() == [0.5, 0.5, 4.5]


def test_rewards_stand_at_the_last_token():
    logp, reference = torch.tensor([[[-1.0, -2, 0], [-1, -1, -1]]]), torch.tensor([[[-3.0, -2, 0], [-1, -1, -2]]])
    real = torch.tensor([[[True, True, False], [True, True, True]]])
    rewards = ppo_loop.token_rewards(torch.tensor([[5.0, 7.0]]), logp, reference, real, 0.1)
    torch.testing.assert_close(rewards, torch.tensor([[[-0.2, 5, 0], [0, 0, 7 - 0.1]]]))
    assert ppo_loop.token_rewards(torch.zeros(1, 2), logp, logp, real, 0.1).abs().max() == 0


def test_scores_are_rescaled_by_all_so_far():
    parts = [np.random.default_rng(i).normal(3, 2, size=(4, 5)) for i in range(6)]
    for scaling in ("none", "std", "norm"):
        moments, seen = ppo_loop.Moments(), []
        for part in parts:
            scores, clipped = moments.rescale(torch.tensor(part), scaling, 0)
            seen = np.append(seen, part)
            shift, scale = (seen.mean() if scaling == "norm" else 0), (seen.std(ddof=1) if scaling != "none" else 1)
            np.testing.assert_allclose(scores.numpy(), (part - shift) / scale, rtol=1e-12)
            assert clipped == 0
    scores, clipped = ppo_loop.Moments().rescale(torch.tensor([[-3.0, 0.5, 9.0, 0.0]]), "none", 0.8)
    torch.testing.assert_close(scores, torch.tensor([[-0.8, 0.5, 0.8, 0]]))
    assert clipped == 0.5
    assert ppo_loop.Moments().rescale(torch.full((2, 2), 4.0), "norm", 0)[0].abs().max() == 0  # no spread, no division


# ------------------------------------------------------------------------------------------------------------ sampling
def test_samples_follow_the_policy(llama, tokenizer):
    """First words of 4,000 samples against the softmax at the temperature; prompts of two lengths in one call. A total
    variation of 0.1 or more has a chance far below 1e-6: its mean is 0.04, its standard deviation 0.003."""
    policy = ppo_loop.load_policy(llama, tokenizer, CPU, small_args(temperature=0.5, max_new_tokens=1))
    with torch.no_grad():
        policy.model.lm_head.weight *= 8  # opinions
    prompts = [[1, 7, 9], [1, 4, 5, 6, 7, 8, 9, 10]]
    answers = common.respond(policy, prompts, 4000, (0, 0, 1), 32, CPU)
    for prompt, answer in zip(prompts, answers):
        with torch.no_grad():
            expected = torch.softmax(policy.model(torch.tensor([prompt])).logits[0, -1] / 0.5, -1)
        drawn = torch.bincount(torch.tensor(answer)[:, 0], minlength=len(expected)) / 4000
        assert expected.max() > 0.05 and (drawn - expected).abs().sum() / 2 < 0.1


def test_samples_end_once(llama, tokenizer):
    policy = ppo_loop.load_policy(llama, tokenizer, CPU, small_args(max_new_tokens=40))
    answers = common.respond(policy, [[1, 7, 9 + i % 5] for i in range(70)], 3, (0, 1, 1), 32, CPU)
    eos = tokenizer.eos_token_id
    assert len(answers) == 70 and all(len(answer) == 3 for answer in answers)
    flat = [y for answer in answers for y in answer]
    assert all(y.count(eos) == (y[-1] == eos) and (y[-1] == eos or len(y) == 40) for y in flat)
    assert 10 < sum(y[-1] == eos for y in flat) < 200
    assert answers == common.respond(policy, [[1, 7, 9 + i % 5] for i in range(70)], 3, (0, 1, 1), 32, CPU)
    assert answers != common.respond(policy, [[1, 7, 9 + i % 5] for i in range(70)], 3, (0, 1, 2), 32, CPU)


def test_prompts(tokenizer, tmp_path, capsys, monkeypatch):
    """Of comparisons, of their own, and too long ones, which keep the BOS and their end."""
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": "name two fruits"}, {"prompt": "name three tools and four trees"}, {"prompt": " "}]
    Path("p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = ppo_loop.prepare_prompts("p.jsonl", "train", tokenizer, small_args(max_length=10, max_new_tokens=5))
    assert prompts.texts == [row["prompt"] for row in rows[:2]] and not prompts.toy
    assert tokenizer.batch_decode(prompts.ids) == ["<s> name two fruits", "<s> tools and four trees"]
    assert "p.jsonl: 2 prompts of 3 rows\np.jsonl: 1 prompts cut" in capsys.readouterr().out
    prompts = ppo_loop.prepare_prompts("toy:id", "test", tokenizer, small_args(), 7)
    assert len(prompts.ids) == 7 and prompts.toy
    assert prompts.texts == [row["prompt"] for row in common.toy_comparisons("id", n=7)]


def test_reward_model_of_another_tokenizer_reads_the_text(llama, tokenizer, script, tmp_path):
    """The same reward model with its words numbered otherwise gives the same scores, and a run with it works."""
    torch.manual_seed(1)
    model = transformers.LlamaForSequenceClassification(transformers.LlamaConfig.from_pretrained(llama, num_labels=1))
    order = [*range(4), *np.random.default_rng(0).permutation(np.arange(4, len(common.WORDS))).tolist()]
    for name in ("same", "other"):
        if name == "other":
            weight = model.model.embed_tokens.weight.data
            weight[order] = weight.clone()
        model.save_pretrained(name)
        tokenizer.save_pretrained(name)
    words = json.loads(Path("other/tokenizer.json").read_text())
    words["model"]["vocab"] = {word: order[i] for i, word in enumerate(common.WORDS)}
    Path("other/tokenizer.json").write_text(json.dumps(words))
    prompts = ppo_loop.prepare_prompts("toy:id", "test", tokenizer, small_args(), 4)
    said = ["fig", "fig pear plum", "red", "red red"], ["</s>", "fig </s>", "five </s>", "cat"]
    answers = [tokenizer(list(texts), add_special_tokens=False).input_ids for texts in said for _ in range(2)]
    policy, scores = ppo_loop.load_policy(llama, tokenizer, CPU, small_args()), {}
    for name in ("same", "other"):
        reader = common.load_tokenizer(name, None)
        models = {"policy": policy, "reference": policy, "reader": reader if name == "other" else None,
                  "reward": common.load_reward_model(name, reader, CPU, small_args())}
        scores[name] = ppo_loop.judge(prompts, answers, models, tokenizer, small_args(micro_tokens=100), CPU).scores
    assert torch.allclose(scores["same"], scores["other"], atol=1e-5) and scores["same"].std() > 0.01
    assert "other has another tokenizer" in script("ppo_loop.py", *SMALL, "--iterations", 1, "--reward-model", "other")


# ---------------------------------------------------------------------------------------------------------------- runs
def test_bandit_reaches_its_optimum(script, llama, tokenizer):
    """One prompt, responses of one token. With a KL penalty the best policy is pi_ref exp(r / beta), normalised; all
    can be listed. The divergence from it falls to a twentieth of what it was (to a hundredth over ten seeds)."""
    script("baseline_rm.py", "--epochs", 4, "--lr", 3e-3)
    Path("one.jsonl").write_text(json.dumps({"prompt": "\n\nHuman: name two fruits\n\nAssistant:"}) + "\n")
    script("ppo_loop.py", *SMALL, "--prompts", "one.jsonl", "--eval-data", "one=one.jsonl", "--reward-model",
           "runs/baseline_rm/model", "--iterations", 120, "--batch-size", 1, "--rollouts", 256, "--max-new-tokens", 1,
           "--reward-scaling", "none", "--reward-clip", 0, "--missing-eos-penalty", 0, "--kl", 0.5, "--lr", 3e-3,
           "--critic-lr", 1e-2)
    prompt = ppo_loop.prepare_prompts("one.jsonl", "train", tokenizer, small_args()).ids[0]
    start, end = (transformers.AutoModelForCausalLM.from_pretrained(name) for name in (llama, f"{RUN}/round-1/policy"))
    reward = transformers.AutoModelForSequenceClassification.from_pretrained("runs/baseline_rm/model")
    words, eos = range(len(tokenizer)), tokenizer.eos_token_id
    with torch.no_grad():
        before, after = (torch.log_softmax(m(torch.tensor([prompt])).logits[0, -1], -1) for m in (start, end))
        r = torch.tensor([reward(torch.tensor([[*prompt, w, *[eos] * (w != eos)]])).logits.item() for w in words])
    best = torch.log_softmax(before + r / 0.5, -1)
    gaps = [(best.exp() * (best - logp)).sum().item() for logp in (before, after)]
    assert gaps[0] > 0.05 and gaps[1] < gaps[0] / 20


def test_two_rounds(script, llama):
    """Each begins where it should, is scored by a reward model of its own, and leaves ordinary folders."""
    out = script("ppo_loop.py", *SMALL, "--rounds", 2, "--lr", 1e-3, "--eval-every", 3, "--plot", "--kl", 0.05)
    lines = records()
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert [line["round"] for line in lines] == [1] * 6 + [2] * 6
    assert Path(f"{RUN}/kl.png").read_bytes().startswith(b"\x89PNG")
    for line in (lines[0], lines[6]):
        assert line["ppo/log_ratio"] > 0  # of two passes, the second
    assert [lines[0][key] for key in ("ppo/kl", "before/id/kl")] == pytest.approx([0, 0], abs=1e-5)
    assert abs(lines[6]["before/id/kl"]) > 1e-3 and abs(lines[6]["ppo/kl"]) > 1e-3  # the policy goes on alone
    assert "eval/id/gold" in lines[2] and "samples" in lines[5] and "eval/id/gold" not in lines[3]
    assert "round 1, before, id: score" in out and "round 2, after, id: score" in out
    start, *after = (load_file(path / "model.safetensors") for path in
                     (llama, Path(f"{RUN}/round-1/policy"), Path(f"{RUN}/round-2/policy")))
    assert all(not torch.equal(one["lm_head.weight"], other["lm_head.weight"])
               for one, other in ((start, after[0]), (after[0], after[1])))
    metas = [[json.loads(line) for line in Path(f"{RUN}/round-{i}/rm/meta.jsonl").read_text().splitlines()]
             for i in (1, 2)]
    assert [row["prompt"] for row in metas[0]] == [row["prompt"] for row in metas[1]] and metas[0] != metas[1]
    for name in ("before", "after"):
        rows = [json.loads(line) for line in Path(f"{RUN}/round-2/{name}.jsonl").read_text().splitlines()]
        assert len(rows) == 5 and all(
            row["gold"] == common.toy_gold(row["prompt"], row["response"]) and row["set"] == "id" for row in rows)


def test_where_rounds_begin(script, llama):
    flags = [*SMALL, "--rounds", 2, "--iterations", 2, "--lr", 1e-3]
    script("ppo_loop.py", *flags, "--method", "baseline", "--policy-from", "sft", "--output-dir", "a")
    assert not Path("a/round-2/rm").exists()  # the same again
    assert json.loads(Path("a/round-1/rm/args.json").read_text())["eta"] == 0
    assert records("a")[2]["before/id/kl"] == pytest.approx(0, abs=1e-5)
    script("ppo_loop.py", *flags, "--rm-from", "last", "--reference", "last", "--output-dir", "b")
    assert json.loads(Path("b/round-2/rm/args.json").read_text())["model"] == "b/round-1/rm/model"
    assert json.loads(Path("b/round-2/rm/args.json").read_text())["policy"] == "b/round-1/policy"
    assert records("b")[2]["before/id/kl"] == pytest.approx(0, abs=1e-5)
    assert json.loads(Path("b/round-1/rm/args.json").read_text())["model"] == str(llama)


def test_micro_tokens_are_memory_only(script):
    for tokens in (1, 10_000):
        script("ppo_loop.py", *SMALL, "--micro-tokens", tokens, "--output-dir", tokens)
    for one, other in zip(records("1"), records("10000"), strict=True):
        assert flat(one) == pytest.approx(flat(other), rel=2e-3, abs=1e-5)


def test_two_processes_train_alike(llama, tmp_path, script):
    script("ppo_loop.py", *SMALL, "--batch-size", 40, "--output-dir", "one")  # two calls of generate
    process = shell(llama, "ppo_loop.py", *SMALL, "--batch-size", 40, "--output-dir", "two", ranks=2, cwd=tmp_path)
    _, error = process.communicate()
    assert process.returncode == 0, error
    assert Path("one/round-1/rm/meta.jsonl").read_text() == Path("two/round-1/rm/meta.jsonl").read_text()
    for one, two in zip(records("one"), records("two"), strict=True):
        assert flat(one) == pytest.approx(flat(two), rel=2e-3, abs=1e-5)


def two_rounds(llama, folder, *more):
    return shell(llama, "ppo_loop.py", *SMALL, "--rounds", 2, "--iterations", 10, "--save-every", 4, "--lr", 1e-3,
                 "--output-dir", folder, *more, cwd=folder.parent)


@pytest.fixture(scope="module")
def whole(llama, tmp_path_factory):
    """The folder of a run that was left alone."""
    finished(two_rounds(llama, folder := tmp_path_factory.mktemp("ppo") / "whole"))
    return folder


@pytest.mark.parametrize("sign", ["round-1/rm/meta.jsonl", "checkpoint-4", "round-1/policy"])
def test_killed_and_resumed(sign, llama, tmp_path, whole):
    """Killed while a reward model trains, in a round, and soon after one."""
    ends_alike(functools.partial(two_rounds, llama), whole, tmp_path / "broken", sign)


def test_updates_end_at_the_target(script):
    script("ppo_loop.py", *SMALL, "--lr", 1e-2, "--epochs", 5, "--target-kl", 1e-4, "--reward-clip", 0.1)
    assert any(line["ppo/stopped"] for line in records()) and records()[0]["ppo/reward_clipped"] > 0


@pytest.mark.parametrize("flags, words", [
    (["--kl", "-1"], "--kl -1.0 is not 0 or more"),
    (["--missing-eos-penalty", "nan"], "--missing-eos-penalty nan is not 0 or more"),
    (["--batch-size", "1", "--rollouts", "1"], "cannot be whitened: --no-whiten"),
    (["--rounds", "0"], "--rounds 0 is not 1 or more"),
    (["--rounds", "2", "--reward-model", "rm", "--rm-flags", "--ascent normal"],
     "--rm-flags '--ascent normal': argument --ascent: invalid choice"),  # before the first round
    (["--max-new-tokens", "64"], "--max-new-tokens below --max-length"),
    (["--prompts", "none.jsonl"], "none.jsonl: no such file"),
    (["--prompts", "bad.jsonl"], "bad.jsonl: row 1: "),
    (["--prompts", "empty.jsonl"], "empty.jsonl: no prompt in 1 rows"),
    (["--reward-model", "nowhere"], "nowhere"),
    (["--reward-model", "rm"], "scores of the reward model are not finite"),
    (["--model", "rm"], "is no language model: lm_head.weight"),
    (["--reward-model", "lm"], "--reward-model lm is no reward model: it lacks score.weight"),
    (["--lr", "1e30", "--clip", "1e30"], "lower --lr or --critic-lr"),
])
def test_bad_input(flags, words, script, llama, tokenizer):
    Path("bad.jsonl").write_text(json.dumps({"text": "x"}) + "\n")
    Path("empty.jsonl").write_text(json.dumps({"prompt": ""}) + "\n")
    config = transformers.LlamaConfig.from_pretrained(llama, num_labels=1)
    model = transformers.LlamaForSequenceClassification(config)
    model.score.weight.data.fill_(math.nan)
    model.save_pretrained("rm")
    transformers.LlamaForCausalLM.from_pretrained(llama).save_pretrained("lm")
    for name in ("rm", "lm"):
        tokenizer.save_pretrained(name)
    with pytest.raises(SystemExit) as error:
        script("ppo_loop.py", *SMALL, *flags)
    assert words in str(error.value) and "\n" not in str(error.value)
