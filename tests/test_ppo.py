"""ppo_loop.py: its pieces against plain float64 loops, a bandit with a known optimum, and whole runs."""

import json
import math
import re
import shlex
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, data, launch, settings, toy
from launch import Launch
from safetensors.torch import load_file
from test_batch import DATA, ROWS, SEPARATES, SHARES, load
from test_run import interrupt, records
from torch.distributed.tensor import DTensor
from transformers import (
    AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig, LlamaForCausalLM)

import common
import ppo_loop

RUN, CPU = Path("runs/ppo_loop"), torch.device("cpu")
SMALL = ["--reward-model", "rm", "--gold", ROOT / "docs/toy/make.py", "--iterations", 6, "--batch-size", 8, "--epochs",
         2, "--num-responses", 2, "--max-new-tokens", 6, "--critic-lr", 1e-3, "--eval-prompts", 5, "--num-samples", 4,
         "--temperature", 1, "--rollout-batch-size", 4, "--eval-every", 3]


def args(**changes):
    return settings(**{"temperature": 1.0, "max_new_tokens": 5, "rollout_batch_size": 32, **changes})


@pytest.fixture(scope="session")
def reward_model(llama, tokenizer, tmp_path_factory):
    """A folder with a random reward model of the tiny Llama's shape."""
    folder = tmp_path_factory.mktemp("rm")
    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_pretrained(llama, num_labels=1)
    model.score.weight.data.normal_(0, 0.5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def ppo(script, reward_model):
    """Run ppo_loop.py in this process, on little data and with a random reward model -> what it printed."""
    shutil.copytree(reward_model, "rm")
    return lambda *flags: script("ppo_loop.py", *SMALL, *flags)


# -------------------------------------------------------------------------------------------------------------- pieces
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma", "bloom"])
def test_policy_and_critic_read_what_separate_rows_say(name, tmp_path, tokenizer):
    """Log-probabilities at a temperature and the critic's values, one response at a time."""
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config({**SHARES, **SEPARATES}[name]).eval()
    plain.save_pretrained(tmp_path / "policy")
    flags = args(max_length=32, max_new_tokens=9, temperature=0.7)
    policy = ppo_loop.load_policy(tmp_path / "policy", tokenizer, CPU, flags, "--model")
    critic = load(name, tmp_path / "critic", tokenizer)
    assert policy.share == critic.share == (name in SHARES)
    batch = common.collate(DATA, [0, 1, 2], "cpu", policy.share)
    with torch.no_grad():
        logp, values = ppo_loop.read_logp(policy, batch, flags), ppo_loop.read_values(critic, batch, flags)
    for i, (prompt, responses) in enumerate(ROWS):
        for j, response in enumerate(responses):
            ids, n = torch.tensor([prompt + response]), len(response)
            with torch.no_grad():
                expected = torch.log_softmax(plain(ids).logits[0, len(prompt) - 1 : -1] / 0.7, -1)[range(n), response]
                hidden = critic.hf_model.base_model(ids).last_hidden_state[0, len(prompt) - 1 : -1]
            torch.testing.assert_close(logp[i, j, :n], expected, rtol=0, atol=2e-5)
            torch.testing.assert_close(values[i, j, :n], critic.hf_model.score(hidden)[:, 0], rtol=0, atol=2e-5)
            assert (logp[i, j, n:] == 0).all() and (values[i, j, n:] == 0).all()


def gae(rewards, values, gae_lambda):
    """The advantages of one response, from their definition: lists (tokens,)."""
    n, values = len(rewards), [*values, 0.0]
    deltas = [rewards[t] + values[t + 1] - values[t] for t in range(n)]
    return [sum(gae_lambda ** (u - t) * deltas[u] for u in range(t, n)) for t in range(n)]


def test_advantages_against_a_plain_loop():
    """Each response has a length of its own."""
    generator = torch.Generator().manual_seed(0)
    rewards, values = (torch.randn(4, 3, 7, dtype=torch.float64, generator=generator) for _ in range(2))
    counts = torch.randint(1, 8, (4, 3), generator=generator)
    mask = torch.arange(7) < counts[..., None]
    result = ppo_loop.estimate_advantages(rewards * mask, values * mask, 0.8)
    for i, j in np.ndindex(4, 3):
        n = counts[i, j]
        expected = gae(rewards[i, j, :n].tolist(), values[i, j, :n].tolist(), 0.8)
        assert result[i, j, :n].tolist() == pytest.approx(expected, rel=1e-12)
        assert (result[i, j, n:] == 0).all()


@pytest.mark.parametrize("share", [True, False])
def test_response_tokens_by_hand(share):
    """The docstring's example."""
    rows = ppo_loop.make_rows(prompts_of([[5, 6]]), [[[7, 8], [9]]])
    mask, ids, before = ppo_loop.response_tokens(common.collate(rows, [0], CPU, share), 3)
    assert mask.int().tolist() == [[[1, 1, 0], [1, 0, 0]]] and ids.tolist() == [7, 8, 9]
    assert [x.tolist() for x in before] == [[0, 0, 0 if share else 1], [1, 2, 1]]


def test_losses_by_hand():
    """Ratios 1, 1.5 and 0.5 with advantages of both signs; values that went the right way, too far, and the wrong."""
    logp, advantage = torch.tensor([1.0, 1.5, 0.5, 1.0, 1.5, 0.5]).log(), torch.tensor([2.0, 2, 2, -2, -2, -2])
    loss, clipped = ppo_loop.policy_loss(logp, torch.zeros(6), advantage, 0.2)
    torch.testing.assert_close(loss, torch.tensor([-2, -2.4, -1, 2, 3, 1.6]))
    assert clipped.tolist() == [False, True, False, False, False, True]
    values, old, returns = torch.tensor([1.0, 3, 3]), torch.tensor([1.0, 1, 1]), torch.tensor([2.0, 4, 0])
    loss, clipped = ppo_loop.value_loss(values, old, returns, 0.5)
    assert loss.tolist() == [0.5, 2.5**2 / 2, 4.5] and clipped.tolist() == [False, True, False]
    assert ppo_loop.value_loss(values, old, returns, math.inf)[0].tolist() == [0.5, 0.5, 4.5]
    # old + (new - old) is not new, but rounding does not count as clipping
    assert not ppo_loop.value_loss(torch.tensor(0.1), torch.tensor(-0.05), torch.tensor(0.05), 0.2)[1]


def test_rewards_stand_at_the_last_token():
    logp, reference = torch.tensor([[[-1.0, -2, 0], [-1, -1, -1]]]), torch.tensor([[[-3.0, -2, 0], [-1, -1, -2]]])
    mask = torch.tensor([[[True, True, False], [True, True, True]]])
    rewards = ppo_loop.token_rewards(torch.tensor([[5.0, 7.0]]), logp, reference, mask, 0.1)
    torch.testing.assert_close(rewards, torch.tensor([[[-0.2, 5, 0], [0, 0, 7 - 0.1]]]))


@pytest.mark.parametrize("scaling", ["none", "std", "norm"])
def test_scores_are_rescaled_by_all_so_far(scaling):
    sums, seen = torch.zeros(3, dtype=torch.float64), []
    for part in np.random.default_rng(0).normal(3, 2, size=(6, 4, 5)):
        seen = np.append(seen, part)
        shift, scale = (seen.mean() if scaling == "norm" else 0), (seen.std(ddof=1) if scaling != "none" else 1)
        result = ppo_loop.rescale(torch.tensor(part), sums, scaling, 0).numpy()
        np.testing.assert_allclose(result, (part - shift) / scale, rtol=1e-9)
    large = torch.tensor([[-30.0, 40.0, 90.0]])
    sizes = ppo_loop.rescale(large, sums, scaling, 0.8).abs()
    torch.testing.assert_close(sizes, large.abs() if scaling == "none" else torch.full((1, 3), 0.8))
    assert ppo_loop.rescale(torch.full((2, 2), 4.0), sums * 0, "norm", 0).abs().max() == 0  # std 0


def test_responses_end_as_in_reward_training():
    """The stop token, of which there may be several, gives way to what ends a response there. Nothing may be left of a
    response only if nothing ends it, as in TRL's models that pad with EOS."""
    for tokens, end, expected in [
            ([7, 8, 2], [2], [7, 8, 2]), ([7, 8, 5], [2], [7, 8, 2]), ([7, 8], [2], [7, 8, 2]), ([2], [2], [2]),
            ([7, 5], [5, 9], [7, 5, 9]), ([7, 2], [], [7]), ([2], [], [2])]:
        assert ppo_loop.end_response(tokens, [2, 5], end) == expected


# ------------------------------------------------------------------------------------------------------------ sampling
def prompts_of(rows):
    return [ppo_loop.Prompt("", ids) for ids in rows]


def test_samples_follow_the_policy(llama, tokenizer):
    """First tokens of 4,000 samples against the softmax at the temperature; prompts of two lengths in one call. The
    total variation is 0.04 on average, with a standard deviation of 0.003."""
    policy = ppo_loop.load_policy(llama, tokenizer, CPU, args(temperature=0.5), "--model")
    policy.hf_model.generation_config.max_new_tokens = 1
    with torch.no_grad():
        policy.hf_model.lm_head.weight *= 8  # opinions
    prompts = prompts_of([[1, 7, 9], [1, 4, 5, 6, 7, 8, 9, 10]])
    responses = ppo_loop.sample_responses(policy, prompts, 4000, (0, 0, 1), args())
    assert responses == ppo_loop.sample_responses(policy, prompts, 4000, (0, 0, 1), args())
    assert responses != ppo_loop.sample_responses(policy, prompts, 4000, (0, 0, 2), args())
    for prompt, response in zip(prompts, responses):
        with torch.no_grad():
            expected = torch.softmax(policy.hf_model(torch.tensor([prompt.ids])).logits[0, -1] / 0.5, -1)
        drawn = torch.bincount(torch.tensor(response)[:, 0], minlength=len(expected)) / 4000
        assert expected.max() > 0.05 and (drawn - expected).abs().sum() / 2 < 0.1


def test_a_policy_stops_at_each_of_its_stop_tokens(llama, tokenizer, tmp_path):
    """Llama 3, Gemma and Phi have several; the policy's other settings for generation do not count."""
    model = AutoModelForCausalLM.from_pretrained(llama)
    model.generation_config.update(eos_token_id=[2, 5, 9], repetition_penalty=50.0, num_beams=2, do_sample=True)
    model.save_pretrained(tmp_path)
    policy = ppo_loop.load_policy(tmp_path, tokenizer, CPU, args(max_new_tokens=60), "--model")
    prompts = prompts_of([1, 7, 9 + i % 5] for i in range(50))
    responses = ppo_loop.sample_responses(policy, prompts, 3, (0, 1, 1), args())
    lasts = []
    for y in sum(responses, []):
        assert not {2, 5, 9} & set(y[:-1]) and (y[-1] in (2, 5, 9) or len(y) == 60)
        lasts.append(y[-1])
    assert {2, 5, 9} <= set(lasts)


def test_sampling_in_bf16_leaves_the_weights_sharded(llama, tokenizer):
    """They are gathered for the whole of it, and must be gathered anew after the next step."""
    policy = ppo_loop.load_policy(llama, tokenizer, CPU, args(dtype="bfloat16"), "--model")
    batch = common.collate(DATA, [0, 1, 2], "cpu", policy.share)
    flags = args(max_new_tokens=9)
    before = ppo_loop.read_logp(policy, batch, flags).detach()
    responses = ppo_loop.sample_responses(policy, prompts_of([[1, 5], [1, 6, 7]]), 3, (0, 0, 0), args())
    assert [len(y) for y in responses] == [3, 3] and policy.training
    assert all(isinstance(p, DTensor) for p in policy.parameters())
    with torch.no_grad():
        for p in policy.parameters():
            p.mul_(1.5)
    assert (ppo_loop.read_logp(policy, batch, flags) - before).abs().max() > 0.01


def write(name, rows):
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(name)


def texts(prompts):
    return [prompt.text for prompt in prompts]


def test_prompts(tokenizer, tmp_path, capsys):
    """Of rows with a prompt alone and of comparisons; long ones keep the BOS and their end, with room for an EOS."""
    rows = [{"prompt": text} for text in ("name two fruits", "name three tools and four trees", "", None)]
    rows[2].update({"chosen": FIG, "rejected": DOG})  # conversations without a prompt
    prompts = ppo_loop.load_prompts(write(tmp_path / "p.jsonl", rows), "train", tokenizer, args(max_length=10))
    assert sorted(texts(prompts), reverse=True) == [row["prompt"] for row in rows[:2]]
    read = sorted(tokenizer.decode(prompt.ids) for prompt in prompts)
    assert read == ["<s> and four trees", "<s> name two fruits"]
    assert "2 of 4 rows read have a prompt; 1 prompts truncated" in capsys.readouterr().out
    everything = ppo_loop.load_prompts(data("id", 40), "test", tokenizer, args())
    prompts = ppo_loop.load_prompts(data("id", 40), "test", tokenizer, args(), 7)
    assert prompts == everything[:7]
    in_file = [json.loads(line)["prompt"] for line in Path(data("id", 40)).read_text().splitlines()]
    assert sorted(texts(everything)) == sorted(in_file) and texts(everything) != in_file
    for other in ({"responses": []}, {"chosen": None, "rejected": None}, {"responses": [" fig"], "chosen": None}):
        one = write(tmp_path / "one.jsonl", [{"prompt": "name two fruits", **other}])
        assert texts(ppo_loop.load_prompts(one, "train", tokenizer, args())) == ["name two fruits"]


def test_prompts_are_texts_or_conversations(tmp_path):
    rows = [{"chosen": [*CHAT, *FIG], "rejected": [*CHAT, *DOG]}, {"prompt": "name two fruits"}]
    mixed = write(tmp_path / "mixed.jsonl", rows)
    tokenizer = toy.make_tokenizer()
    tokenizer.chat_template = PLAIN
    with pytest.raises(SystemExit, match="conversations"):
        ppo_loop.load_prompts(mixed, "train", tokenizer, args())


def test_gold_reads_what_the_reward_model_reads():
    """All of a response. A sample for meta_rm.py ends where a policy goes on as the human, unless it is a message."""
    class Words:
        def batch_decode(self, responses, skip_special_tokens):
            return responses

        def decode(self, text, skip_special_tokens):
            return text

    text = " fig\n\nHuman: dog "
    models = ppo_loop.Models(None, None, None, Words(), None, lambda prompt, response: len(response))
    prompt = ppo_loop.Prompt("name", "name")
    assert ppo_loop.mean_gold([prompt], [[text, "fig"]], models) == (len(text) - 2 + 3) / 2
    assert ppo_loop.decode(prompt, [text, "fig"], Words()) == [" fig", "fig"]
    message = {"role": "assistant", "content": text.strip()}
    assert ppo_loop.decode(ppo_loop.Prompt(CHAT, "name"), [text], Words()) == [[message]]


def test_prompts_without_tokens_are_dropped(tmp_path, capsys):
    """A tokenizer without BOS has none for white space. Nor have answers to different prompts a prompt."""
    tokenizer = toy.make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = None
    rows = [{"prompt": "\n"}, {"prompt": "name two fruits"}]
    prompts = ppo_loop.load_prompts(write(tmp_path / "p.jsonl", rows), "train", tokenizer, args())
    assert texts(prompts) == ["name two fruits"] and "1 of 2 rows read" in capsys.readouterr().out
    pairs = [{"chosen": f"\n\nHuman: {x}\n\nAssistant: fig", "rejected": "\n\nHuman: a\n\nAssistant: dog"}
             for x in "ab"]
    assert len(ppo_loop.load_prompts(write(tmp_path / "q.jsonl", pairs), "train", tokenizer, args())) == 1


@pytest.mark.parametrize("pad", ["<pad>", "</s>"])
@pytest.mark.parametrize("is_chat", [False, True])
def test_scores_are_those_of_reward_training(is_chat, pad, llama, reward_model, tmp_path, monkeypatch):
    """Of a response that ends with either stop token or not at all, as of its text. Conversations end as the template
    ends them. TRL's models pad with EOS and are read before it."""
    monkeypatch.chdir(tmp_path)
    classifier = AutoModelForSequenceClassification.from_pretrained(reward_model)
    classifier.config.pad_token_id = 0 if pad == "<pad>" else 2
    classifier.save_pretrained("rm")
    tokenizer = toy.make_tokenizer()
    tokenizer.chat_template, tokenizer.pad_token = PLAIN.replace("{{ eos_token }}", "pear {{ eos_token }}"), pad
    tokenizer.save_pretrained("rm")
    lm = AutoModelForCausalLM.from_pretrained(llama)
    lm.generation_config.eos_token_id = [2, tokenizer.vocab["pear"]]
    lm.save_pretrained("lm")
    tokenizer.pad_token = "<pad>"
    tokenizer.save_pretrained("lm")

    flags = args(model="lm", reward_model="rm", gold=None)
    policy, theirs = ppo_loop.load_policy("lm", tokenizer, CPU, flags, "--model"), common.load_tokenizer("rm")
    reward = common.load_reward_model("rm", theirs, CPU, flags, "--reward-model")
    write("p.jsonl", [{"prompt": CHAT if is_chat else "name two fruits"}])
    prompts = ppo_loop.load_prompts("p.jsonl", "train", tokenizer, flags)
    responses = [tokenizer(text, add_special_tokens=False).input_ids for text in ("fig", "fig pear", "dog saw </s>")]
    models = ppo_loop.Models(policy, policy, reward, tokenizer, theirs, None)
    rollout = ppo_loop.score_rollouts(prompts, [responses], models, flags)
    assert rollout.ended.tolist() == [[False, True, True]]
    texts = [FIG, FIG, DOG] if is_chat else [" fig", " fig", " dog saw"]
    prompt, trained, _ = common.encode(prompts[0].text, texts, theirs, 64)
    expected = [classifier(torch.tensor([prompt + ids])).logits.item() for ids in trained]
    assert rollout.scores[0].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5)


CHAT = [{"role": "user", "content": "name two fruits"}]
FIG, DOG = [{"role": "assistant", "content": "fig"}], [{"role": "assistant", "content": "dog saw"}]
PLAIN = ("{% for m in messages %}{{ m.role }} {{ m.content }} {{ eos_token }} {% endfor %}"
         "{% if add_generation_prompt %}assistant {% endif %}")
THINKS = PLAIN.replace("assistant {%", "assistant <think> {%")


@pytest.mark.parametrize("template, bos, fits", [
    (None, True, True), (None, False, True), (PLAIN, True, True), ("{{ bos_token }} " + PLAIN, True, True),
    (THINKS, True, False)])
def test_prompts_have_the_ids_of_reward_training(template, bos, fits, tmp_path, capsys):
    """Here every turn ends in EOS, as DialoGPT's do. Where the template writes something else in front of a response
    that is sampled, there is a warning."""
    tokenizer = toy.make_tokenizer()
    tokenizer.chat_template = template
    if not bos:
        tokenizer.backend_tokenizer.post_processor = None
    prompt = CHAT if template else "\n\nHuman: name two fruits\n\nAssistant:"
    ids = ppo_loop.load_prompts(write(tmp_path / "p.jsonl", [{"prompt": prompt}]), "train", tokenizer, args())[0].ids
    if template:
        ppo_loop.warn_of_template(prompt, tokenizer)
    responses = [FIG, DOG] if template else [" fig", " dog saw"]
    trained = common.encode(prompt, responses, tokenizer, 64)[0]
    assert (ids == trained) == fits == ("warning" not in capsys.readouterr().out)


@pytest.mark.parametrize("change, is_chat, fits", [
    ({}, True, True), ({"pad_token": "<|other pad|>"}, True, True), ({"pad_token": "</s>"}, False, True),
    ({"eos_token": "fig"}, False, False), ({"bos": False}, False, False),
    ({"chat_template": THINKS}, True, False), ({"chat_template": THINKS}, False, True)])
def test_the_reward_model_must_read_like_the_policy(change, is_chat, fits):
    """Llama 3's base and instruct models have one vocabulary, but different EOS tokens and templates."""
    ours, theirs = toy.make_tokenizer(), toy.make_tokenizer()
    ours.chat_template = theirs.chat_template = PLAIN
    if "pad_token" in change:
        theirs.add_special_tokens(change)
    elif "bos" in change:
        theirs.backend_tokenizer.post_processor = None
    else:
        for name, value in change.items():
            setattr(theirs, name, value)
    assert (ppo_loop.compare_tokenizers(ours, theirs, is_chat) == []) == fits


# ---------------------------------------------------------------------------------------------------------------- runs
def test_bandit_reaches_its_optimum(ppo, llama, reward_model, tokenizer):
    """One prompt, responses of one token. With a KL penalty the best policy is pi_ref exp(r / beta), normalised, and
    can be computed. The divergence from it falls to a twentieth."""
    Path("one.jsonl").write_text(json.dumps({"prompt": "\n\nHuman: name two fruits\n\nAssistant:"}) + "\n")
    ppo("--data", "one.jsonl", "--eval-data", "one=one.jsonl", "--iterations", 25, "--batch-size", 1,
        "--num-responses", 256, "--max-new-tokens", 1, "--reward-scaling", "none", "--reward-clip", 0,
        "--missing-eos-penalty", 0, "--kl-coef", 0.5, "--lr", 1e-2, "--critic-lr", 2e-2, "--eval-every", 0)
    prompt = ppo_loop.load_prompts("one.jsonl", "train", tokenizer, args())[0].ids
    start, end = (AutoModelForCausalLM.from_pretrained(name) for name in (llama, RUN / "policy"))
    reward = AutoModelForSequenceClassification.from_pretrained(reward_model)
    with torch.no_grad():
        before, after = (torch.log_softmax(m(torch.tensor([prompt])).logits[0, -1], -1) for m in (start, end))
        rows = [[*prompt, token] if token == 2 else [*prompt, token, 2] for token in range(len(tokenizer))]
        r = torch.tensor([reward(torch.tensor([row])).logits.item() for row in rows])
    best = torch.log_softmax(before + r / 0.5, -1)
    gaps = [(best.exp() * (best - logp)).sum().item() for logp in (before, after)]
    assert gaps[0] > 0.05 and gaps[1] < gaps[0] / 20


@pytest.mark.parametrize("warmup, factor", [(0, 1.0), (1, 0.5)])
def test_an_iteration_against_a_plain_reference(warmup, factor, ppo, llama, reward_model, tokenizer):
    """The first of two iterations, one response at a time, with plain transformers models: metrics and new weights. The
    policy stops at twenty tokens, so that some responses end and some do not."""
    lm, ref = (AutoModelForCausalLM.from_pretrained(llama) for _ in range(2))
    lm.generation_config.eos_token_id = [2, *range(50, 70)]
    torch.manual_seed(3)
    with torch.no_grad():
        for p in ref.parameters():
            p.add_(0.05 * torch.randn_like(p))
    for folder, model in (("lm", lm), ("ref", ref)):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    ppo("--model", "lm", "--reference", "ref", "--iterations", 2, "--epochs", 1, "--warmup-ratio", warmup,
        "--save-every", 1, "--eval-data", "--lr", 1e-3, "--critic-lr", 2e-3, "--max-grad-norm", 0, "--kl-coef", 0.3,
        "--missing-eos-penalty", 0.7, "--reward-clip", 1, "--temperature", 0.9)
    line = records(RUN)[1]

    # the same responses
    flags = args(temperature=0.9, max_new_tokens=6, rollout_batch_size=4)
    prompts = ppo_loop.load_prompts(data(), "train", tokenizer, flags)
    prompts = [prompts[i] for i in common.batch_indices(len(prompts), 8, 0, 0)]
    policy = ppo_loop.load_policy("lm", tokenizer, CPU, flags, "--model")
    responses = ppo_loop.sample_responses(policy, prompts, 2, (0, 0, 0), flags)
    pairs = [(prompt.ids, y) for prompt, ys in zip(prompts, responses) for y in ys]
    stop = {2, *range(50, 70)}
    ended = np.array([y[-1] in stop for _, y in pairs])
    assert 2 < ended.sum() < len(ended) - 2

    # log-probabilities, values and scores
    rm, critic = (AutoModelForSequenceClassification.from_pretrained(reward_model) for _ in range(2))
    def read(model, prompt, y):
        logits = model(torch.tensor([prompt + y])).logits[0, len(prompt) - 1 : -1]
        return F.log_softmax(logits / 0.9, -1)[range(len(y)), y]
    logps, values, ref_logps, scores = [], [], [], []
    for prompt, y in pairs:
        logps.append(read(lm, prompt, y))
        hidden = critic.model(torch.tensor([prompt + y])).last_hidden_state[0, len(prompt) - 1 : -1]
        values.append(critic.score(hidden)[:, 0])
        ref_logps.append(read(ref, prompt, y).detach())
        words = y[:-1] if y[-1] in stop else y
        scores.append(rm(torch.tensor([prompt + words + [2]])).logits.item())

    # rewards and advantages
    scores = np.array(scores)
    rescaled = ((scores - scores.mean()) / scores.std(ddof=1)).clip(-1, 1) - 0.7 * ~ended
    advantages, returns = [], []
    for logp, value, ref_logp, score in zip(logps, values, ref_logps, rescaled):
        rewards = (-0.3 * (logp - ref_logp)).tolist()
        rewards[-1] += score
        advantages.append(torch.tensor(gae(rewards, value.tolist(), 0.95)))
        returns.append(advantages[-1] + value.detach())
    advantages, returns, logp, ref_logp, value = map(torch.cat, (advantages, returns, logps, ref_logps, values))
    advantages = (advantages - advantages.mean()) / advantages.std()

    # losses and gradients
    policy_loss = -(advantages * (logp - logp.detach()).exp()).mean()
    value_loss = (value - returns).pow(2).mean() / 2
    norms = []
    for model, loss in ((lm, policy_loss), (critic, value_loss)):
        loss.backward()
        norms.append(math.sqrt(sum(p.grad.pow(2).sum() for p in model.parameters() if p.grad is not None)))
    expected = {
        "policy_loss": policy_loss, "value_loss": value_loss, "grad_norm": norms[0], "critic_grad_norm": norms[1],
        "score": scores.mean(), "score_std": scores.reshape(8, 2).std(1, ddof=1).mean(), "ended": ended.mean(),
        "length": len(logp) / 16, "kl": (logp - ref_logp).sum() / 16, "perplexity": (-ref_logp.mean()).exp(),
        "entropy": -logp.mean(), "approx_kl": 0, "clip_fraction": 0, "value_clip_fraction": 0}
    for key, x in expected.items():
        assert line[f"ppo/{key}"] == pytest.approx(torch.as_tensor(x).item(), rel=1e-3, abs=1e-5), key

    # AdamW's first step
    saved = {name: x for path in RUN.glob("checkpoint-1/*.safetensors") for name, x in load_file(path).items()}
    for name, model, lr, eps in (("policy", lm, 1e-3, 1e-6), ("critic", critic, 2e-3, 1e-8)):
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr * factor, betas=(0.9, 0.95), eps=eps, weight_decay=0)
        optimizer.step()
        for key, p in model.named_parameters():
            error = (saved[f"model.{name}.hf_model.{key}"] - p).abs()
            assert (error < 0.02 * lr).float().mean() > 0.99, key  # the sign of a tiny gradient is rounding


def test_a_run_and_its_samples(ppo, llama, tokenizer):
    out = ppo("--lr", 1e-3)
    lines = records(RUN)
    assert [line["step"] for line in lines] == list(range(7))
    assert lines[0]["eval/id/kl"] == pytest.approx(0, abs=1e-5) and lines[6]["eval/id/kl"] > 1e-3
    assert "eval/id/gold" in lines[3] and "eval/id/gold" not in lines[4] and lines[1]["ppo/approx_kl"] > 0
    assert "id after 6 iterations: score" in out
    samples = [json.loads(line) for line in (RUN / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 4 and all(len(row["responses"]) == 5 for row in samples)
    ppo("--iterations", 0, "--model", RUN / "policy", "--output-dir", "again", "--seed", 3)  # samples alone
    again = [json.loads(line) for line in Path("again/samples.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in again] == [row["prompt"] for row in samples] and again != samples
    assert not Path("again/policy").exists()


def test_micro_batches_and_ranks_do_not_change_the_run(ppo, llama, tmp_path):
    flags = ["--lr", 1e-3, "--iterations", 2, "--batch-size", 9]  # a batch that ranks and chunks do not divide
    ppo(*flags, "--output-dir", "one")
    ppo(*flags, "--output-dir", "micro", "--micro-batch-tokens", 1)
    launch(llama, "ppo_loop.py", *SMALL, *flags, "--output-dir", "two", ranks=2).finish()
    for other in ("micro", "two"):
        assert Path(other, "samples.jsonl").read_text() == Path("one/samples.jsonl").read_text()
        for one, two in zip(records("one"), records(other), strict=True):
            assert one == pytest.approx(two, rel=2e-3, abs=1e-5)


def test_interrupted_and_resumed_with_tied_weights(ppo, tokenizer, reward_model, monkeypatch):
    """The embedding and the head are one tensor, as in Qwen2.5 0.5B and Gemma: written once, loaded into both."""
    LlamaForCausalLM(LlamaConfig.from_pretrained(reward_model, tie_word_embeddings=True)).save_pretrained("tied")
    tokenizer.save_pretrained("tied")
    flags = ["--model", "tied", "--lr", 1e-3, "--output-dir"]
    ppo(*flags, "whole")
    interrupt(monkeypatch, 5, ppo, *flags, "broken", "--save-every", 2)
    ppo(*flags, "broken", "--save-every", 2, "--resume")
    assert records("broken") == records("whole")
    for name in ("policy/model.safetensors", "samples.jsonl"):
        assert Path("broken", name).read_bytes() == Path("whole", name).read_bytes()
    Path("rm/model.safetensors").touch()  # another reward model is not taken for the one the run began with
    with pytest.raises(SystemExit, match="--resume"):
        ppo(*flags, "broken", "--save-every", 2, "--resume")


def test_gold_gets_the_texts_of_conversations(ppo, llama):
    tokenizer = toy.make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
    for folder in (shutil.copytree(llama, "lm"), "rm"):
        tokenizer.save_pretrained(folder)
    Path("chat.jsonl").write_text(json.dumps({"prompt": [{"role": "user", "content": "name two fruits"}]}) + "\n")
    Path("gold.py").write_text("def gold(prompt, response):\n    return isinstance(response, str)\n")
    ppo("--model", "lm", "--data", "chat.jsonl", "--eval-data", "chat=chat.jsonl", "--gold", "gold.py",
        "--iterations", 1)
    assert records(RUN)[-1]["eval/chat/gold"] == records(RUN)[-1]["ppo/gold"] == 1


def test_conversations_to_evaluate_on(ppo, llama, reward_model):
    """The two templates must be equal, even if the policy is trained on texts only."""
    tokenizer = toy.make_tokenizer()
    for folder, template in ((shutil.copytree(llama, "lm"), PLAIN), ("rm", THINKS)):
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
    write("chat.jsonl", [{"prompt": CHAT}])
    with pytest.raises(SystemExit, match="chat template"):
        ppo("--model", "lm", "--eval-data", "chat=chat.jsonl")


def test_the_loop_of_the_docstring(tmp_path, monkeypatch):
    """Two tiny rounds of iterated RLHF, word for word but for the sizes."""
    loop = re.search(r"    cp docs.*?done\n", ppo_loop.__doc__, re.S)[0].replace("1 2 3", "1 2")
    tiny = f"--data {data()} --max-length 64 --eval-data"
    loop = loop.replace("meta_rm.py", f"meta_rm.py {tiny} --epochs 0.5 --batch-size 16")
    loop = loop.replace("ppo_loop.py", f"ppo_loop.py {tiny} --max-new-tokens 6 --iterations 2 --num-samples 8")
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    monkeypatch.chdir(tmp_path)

    # instead of Python, the shell asks this process to run a script, and waits
    python = 'python() { echo "$@" > call.tmp; mv call.tmp call; until rm done 2> /dev/null; do sleep 0.05; done; }; '
    shell = subprocess.Popen(["bash", "-euc", python + loop])
    while shell.poll() is None:
        if Path("call").exists():
            name, *flags = shlex.split(Path("call").read_text())
            Path("call").unlink()
            Launch([str(ROOT / name), *flags], 1).finish()
            Path("done").touch()
        time.sleep(0.05)
    assert shell.returncode == 0
    policies = [load_file(tmp_path / f"runs/ppo-{i}/policy/model.safetensors") for i in (1, 2)]
    assert any(not torch.equal(tensor, policies[1][name]) for name, tensor in policies[0].items())
    assert json.loads((tmp_path / "runs/ppo-2/metrics.jsonl").read_text().splitlines()[0])["step"] == 0


def test_a_policy_without_a_pad_token(ppo, llama, tokenizer):
    """load_tokenizer adds one, for which the policy has no embedding. Plain transformers pads a batch for what is
    saved, and samples from it."""
    lm = AutoModelForCausalLM.from_pretrained(llama)
    lm.config.pad_token_id = lm.generation_config.pad_token_id = None
    for folder in ("lm", "rm"):
        own = toy.make_tokenizer()
        own.pad_token = None
        own.save_pretrained(folder)
    lm.save_pretrained("lm")
    ppo("--model", "lm", "--iterations", 1, "--eval-data")
    saved, model = AutoTokenizer.from_pretrained(RUN / "policy"), AutoModelForCausalLM.from_pretrained(RUN / "policy")
    rows = model.get_input_embeddings().num_embeddings
    assert max(len(saved), saved.pad_token_id + 1, *(i + 1 for i in saved.get_vocab().values())) <= rows
    batch = saved(["name two fruits", "name three tools and trees"], padding=True, return_tensors="pt")
    assert batch.attention_mask.min() == 0
    model.generate(input_ids=batch.input_ids, attention_mask=batch.attention_mask)


def test_a_batch_of_one_token(ppo):
    """It has no standard deviation: its advantage is not whitened, and the run goes on."""
    write("one.jsonl", [{"prompt": "\n\nHuman: name two fruits\n\nAssistant:"}])
    ppo("--data", "one.jsonl", "--eval-data", "--batch-size", 1, "--num-responses", 1, "--max-new-tokens", 1,
        "--iterations", 2, "--reward-scaling", "none")
    assert [line["ppo/length"] for line in records(RUN)[1:]] == [1, 1]
    assert all(math.isfinite(x) for line in records(RUN) for x in line.values())


def test_the_toy_world(monkeypatch):
    """By default, and for a policy of later rounds, however the reference is spelled. Otherwise there is no default
    reward model, but samples need none."""
    def parse(*flags):
        monkeypatch.setattr("sys.argv", ["ppo_loop.py", *flags])
        return ppo_loop.parse_args()

    for flags in ([], ["--reference", f"{ROOT}/tests/../docs/toy/model/", "--model", "runs/ppo-1/policy"]):
        found = parse(*flags, "--kl-coef", "0.5")
        assert (found.iterations, found.kl_coef, found.lr) == (100, 0.5, 1e-3)
        assert found.model == (flags[-1] if flags else f"{ROOT}/docs/toy/model")
        assert Path(found.reward_model) == ROOT / "docs/toy/reward_model"
    with pytest.raises(SystemExit):
        parse("--model", "gpt2")
    assert parse("--model", "gpt2", "--iterations", "0").data == "Anthropic/hh-rlhf"


@pytest.mark.parametrize("flags, name", [
    (["--kl-coef", "-1"], "--kl-coef"), (["--missing-eos-penalty", "nan"], "--missing-eos-penalty"),
    (["--max-new-tokens", "64"], "--max-new-tokens"), (["--data", "none.jsonl"], "none.jsonl"),
    (["--data", "bad.jsonl"], "bad.jsonl: row 2"), (["--reward-model", "nowhere"], "nowhere"),
    (["--model", "rm"], "--model rm"), (["--iterations", "0", "--max-length", "257"], "--max-length"),
    (["--reward-model", "lm"], "lm"), (["--reward-model", "words"], "tokenizer"),
    (["--lr", "1e30", "--max-grad-norm", "1e30"], "--lr"), (["--reward-model", "eos"], "EOS"),
    (["--reference", "words_lm"], "words_lm")])
def test_bad_input(flags, name, ppo, llama, tokenizer):
    write("bad.jsonl", [{"chosen": "\n\nAssistant: a", "rejected": "\n\nAssistant: b"},
                        {"chosen": "no transcript", "rejected": "x"}])
    shutil.copytree(llama, "lm")
    for folder, source, file, old, new in [
            ("words", "rm", "tokenizer.json", '"apple"', '"pomme"'),
            ("words_lm", llama, "tokenizer.json", '"apple"', '"pomme"'),
            ("eos", "rm", "tokenizer_config.json", '"eos_token": "</s>"', '"eos_token": "fig"')]:
        path = Path(shutil.copytree(source, folder), file)
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))
    with pytest.raises(SystemExit) as error:
        ppo(*flags)
    assert name in str(error.value) and "\n" not in str(error.value)
