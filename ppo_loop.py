r"""PPO: train a policy, a language model, to get high scores from a reward model.

Secrets of RLHF in Large Language Models Part II: Reward Modeling (arXiv 2401.06080), sections
2.5, 3.1 and 3.2.

The policy pi samples responses y to prompts x. The reward model r scores each response, and the
score is a reward for its last token. At every token the policy pays a penalty for its distance from
the reference, the SFT model. The critic V starts as a copy of r. Before each token it predicts the
rewards still to come. After the last one its value counts as 0, also if the response is cut off.

    z       = clip( (r(x, y) - mean) / std, -c', c' )    mean and std of all scores up to now
    R_t     = -beta log( pi_old(y_t) / pi_ref(y_t) )     at the last token also + z, and - 1 if the
                                                         response does not end
    delta_t = R_t + V_old_{t+1} - V_old_t                V_old is the critic before the updates
    A_t     = sum_l lambda^l delta_{t+l}                 advantage (GAE with gamma = 1)
    A'_t    = (A_t - mean) / std                         over all tokens of the roll-out
    G_t     = A_t + V_old_t                              return, the target of the critic
    rho_t   = pi(y_t) / pi_old(y_t)                      pi_old is the policy that sampled y

    policy    -min( rho A', clip(rho, 1 - c, 1 + c) A' )
    critic    1/2 max( (V - G)^2, (V_old + clip(V - V_old, -c, c) - G)^2 )

    torchrun ppo_loop.py                                           a toy world, 20 seconds on a CPU
    python ppo_loop.py --kl-coef 0 --reward-model runs/denoise_rm/model
    python ppo_loop.py --iterations 0 --model my-policy --data prompts.jsonl

The second command has no KL penalty, as in section 2.5. The third only samples: it writes
samples.jsonl.

Plot ppo/score, the mean reward, against ppo/kl, the distance from the reference. With --gold the
true reward is logged as well. If it falls while the score rises, the policy exploits errors of the
reward model.

Iterated RLHF with MetaRM (section 3.2) alternates between a reward model for the latest policy and
PPO:

    cp docs/toy/meta.jsonl samples.jsonl; policy=docs/toy/model
    for round in 1 2 3; do
        python meta_rm.py --meta-data samples.jsonl --output-dir runs/rm-$round
        python ppo_loop.py --model $policy --reference docs/toy/model --seed $round \
            --reward-model runs/rm-$round/model --output-dir runs/ppo-$round
        cp runs/ppo-$round/samples.jsonl .; policy=runs/ppo-$round/policy
    done
"""

import argparse
import json
import math
import runpy
from typing import NamedTuple

import datasets
import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from common import (
    RANK, TOY, TOY_DATA, WORLD_SIZE, HelpFormatter, RewardModel, atomic_write, batch_indices,
    clip_gradients, compute_rewards, default_max_length, end_ids, fatal, in_range, is_toy,
    load_checkpoint, load_pretrained, load_reward_model, load_rows, load_tokenizer, log,
    micro_batches, named_source, open_run, prepare, print0, print_once, read_row, render,
    save_checkpoint, save_model, setup, to_ids)

GAE_LAMBDA = 0.95
TOY_FILES = {
    **TOY_DATA, "reward_model": f"{TOY}/reward_model", "gold": f"{TOY}/make.py",
    "eval_data": TOY_DATA["eval_data"][:2]}  # id and ood
TOY_SETTINGS = {
    "iterations": 100, "epochs": 2, "batch_size": 16, "lr": 1e-3, "critic_lr": 1e-3,
    "max_length": 64, "max_new_tokens": 12, "rollout_batch_size": 64, "temperature": 1.0,
    "kl_coef": 0.2, "reward_clip": 0.0, "eval_every": 50}


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False,
        epilog="defaults if --model or --reference is the language model of the toy world: "
        f"{TOY_SETTINGS}")
    parser.error = fatal  # one line, without the usage
    add = parser.add_argument
    positive = in_range(int, 1)
    not_negative = in_range(float, 0)

    # models and data
    # UNSTATED: what reward model, policy and reference start from in a later round. Here all three
    # are flags.
    add("--model", help="the policy to start from, a language model: folder or hub id; by default "
        "that of the toy world")
    add("--reference",
        help="language model of the KL penalty: folder or hub id; by default --model")
    add("--reward-model",
        help="a trained reward model: folder or hub id; only the toy world has a default")
    add("--gold", metavar="FILE.py",
        help="a file with gold(prompt, response) -> float, the true reward: the prompt as in the "
        "data, the response as a text; logged, not trained on")
    add("--data", default="Anthropic/hh-rlhf",
        help="comparisons in the formats of the other scripts, or rows of `prompt`")
    add("--eval-data", nargs="*", type=named_source, metavar="NAME=SOURCE",
        default=[("test", "Anthropic/hh-rlhf:test")],
        help="named sets whose prompts the policy is evaluated on")

    # roll-outs
    add("--iterations", type=in_range(int, 0), default=2000,
        help="roll-outs, each followed by --epochs updates; 0: write samples.jsonl only")
    # UNSTATED: whether the paper's batch of 32 are prompts or responses. Here prompts.
    add("--batch-size", type=positive, default=32,
        help="prompts per iteration, over all ranks")
    add("--num-responses", type=positive, default=4,
        help="responses to each prompt of an iteration")
    add("--max-new-tokens", type=positive, default=512,
        help="maximum length of a response in tokens")
    # DEVIATION: the paper also samples with top-p 0.9 and a repetition penalty of 1.1. PPO needs
    # the log-probabilities of the distribution it samples from, and those of a nucleus are not
    # defined once the policy has moved.
    add("--temperature", type=in_range(float, 0.01), default=0.8,
        help="temperature of sampling and of all log-probabilities")
    add("--rollout-batch-size", type=positive, default=8,
        help="prompts whose responses are sampled together")

    # rewards and advantages
    add("--kl-coef", type=not_negative, default=0.05,
        help="beta, the weight of the KL penalty; 0: no penalty")
    # UNSTATED: whether the runs without a KL penalty rescale scores, too. Here they do.
    add("--reward-scaling", choices=["none", "std", "norm"], default="norm",
        help="std: divide scores by their running std; norm: also subtract their running mean")
    add("--reward-clip", type=not_negative, default=0.8,
        help="c', the largest size of a rescaled score; 0, or without scaling: no clipping")
    # UNSTATED: this penalty.
    add("--missing-eos-penalty", type=not_negative, default=1.0,
        help="subtracted from the rescaled score of a response without a stop token")

    # updates
    add("--epochs", type=positive, default=1, help="updates on a roll-out")
    # UNSTATED: the clip range. This is that of the authors' released PPO.
    add("--clip-range", type=in_range(float, 0.01), default=0.2,
        help="c, the clip range of the policy's ratio and of the change in value; inf: no clipping")
    add("--lr", type=float, default=5e-7, help="peak learning rate of the policy's AdamW")
    add("--critic-lr", type=float, default=1.5e-6, help="peak learning rate of the critic's AdamW")
    add("--warmup-ratio", type=in_range(float, 0, 1), default=0.1,
        help="fraction of iterations for linear warm-up, followed by decay as 1 / sqrt(iteration)")

    # evaluation and samples
    add("--eval-every", type=int, default=100,
        help="iterations between evaluations; 0: only at the start and at the end")
    add("--eval-prompts", type=positive, default=200,
        help="random prompts of each set of --eval-data, with one response to each")
    add("--num-samples", type=in_range(int, 0), default=1000,
        help="random prompts of --data in samples.jsonl")
    add("--k", type=positive, default=5, help="responses to each prompt in samples.jsonl")

    # as in the other scripts
    add("--output-dir", default="runs/ppo_loop",
        help="folder for policy/, samples.jsonl, metrics.jsonl, args.json and checkpoints")
    add("--seed", type=in_range(int, 0), default=0,
        help="random seed for the order of the prompts and for sampling")
    add("--max-grad-norm", type=in_range(float, 0), default=1.0,
        help="gradients are clipped to this norm; 0: never")
    add("--max-length", type=int,
        help="maximum length of prompt plus response in tokens; longer prompts are truncated from "
        "the left; by default what the model can read, at most 2048")
    add("--micro-batch-tokens", type=int, default=8192,
        help="tokens per forward pass: changes memory and speed, not the result")
    add("--save-every", type=int, default=100, help="iterations between checkpoints; 0: none")
    add("--resume", action="store_true", help="continue from the last checkpoint in --output-dir")
    add("--dtype", choices=["float32", "bfloat16"],
        default="bfloat16" if torch.cuda.is_available() else "float32",
        help="dtype of the computation; weights, scores and losses are always float32")
    add("--gradient-checkpointing", action="store_true",
        help="recompute activations in the backward pass: less memory, about a third slower")
    add("--offload", action="store_true",
        help="keep weights, gradients and optimizer state in host memory")

    known = parser.parse_known_args()[0]
    # in later rounds only the reference is toy; is_toy(None) is true
    if is_toy(known.model) or known.reference and is_toy(known.reference):
        parser.set_defaults(**TOY_FILES | TOY_SETTINGS)
        print0(f"toy world, with the defaults {TOY_SETTINGS}")
    args = parser.parse_args()
    if args.iterations and not args.reward_model:
        fatal("--reward-model is missing: the folder or hub id of a trained reward model")
    return args


class Prompt(NamedTuple):
    """A prompt and its token ids, which may be truncated."""
    text: object  # a text or a list of messages
    ids: list

    @property
    def is_chat(self):
        return isinstance(self.text, list)


class Models(NamedTuple):
    """What responses are sampled and scored with."""
    policy: nn.Module
    reference: nn.Module
    reward_model: nn.Module
    tokenizer: object         # of policy and reference
    reward_tokenizer: object  # of the reward model
    gold: object              # the function of --gold, or None


class Rollout(NamedTuple):
    """k responses to each of N prompts. L is --max-new-tokens."""
    rows: datasets.Dataset        # (N,) token ids of prompts and responses
    scores: torch.Tensor          # (N, k) rewards of the whole responses by the reward model
    ended: torch.Tensor           # (N, k) whether a response ends with a stop token
    mask: torch.Tensor            # (N, k, L) which of the L tokens exist
    logp: torch.Tensor            # (N, k, L) log-probabilities by the policy that sampled them
    reference_logp: torch.Tensor  # (N, k, L) and by the reference
    means: dict                   # averages for the log


class Policy(RewardModel):
    """A language model that reads the same batches as a reward model, and samples."""

    def forward(self, batch, at=None, with_features=False):
        """Batch -> logits (n, vocabulary) at `at`, index tensors (row, column) of shape (n,).

        with_features, for `can_share_prompts`: None and the hidden states at the last tokens."""
        inputs = self.inputs(batch)
        if with_features:
            hidden = self.hf_model.base_model(**inputs).last_hidden_state
            return None, hidden[batch.row, batch.last].float()
        return self.hf_model(**inputs).logits[at].float()

    def generate(self, ids, **kwargs):
        """Sample with transformers' generate. FSDP gathers weights once, not for every token."""
        sharded = [module for module in self.modules() if isinstance(module, FSDPModule)]
        for module in sharded:
            module.set_reshard_after_forward(False)
        self.eval()  # or gradient checkpointing would turn the cache off
        tokens = self.hf_model.generate(ids, synced_gpus=WORLD_SIZE > 1, **kwargs)
        self.train()
        for module in sharded:
            module.set_reshard_after_forward(True)
            module.reshard()
        return tokens


def load_policy(name, tokenizer, device, args, flag):
    """A Policy with fp32 weights from a folder or hub id.

    It samples from its plain softmax at --temperature: of the generation settings in its files only
    the stop tokens count. Stops with an error if it is no language model."""
    model, missing = load_pretrained(AutoModelForCausalLM, name, flag)
    if missing or "SequenceClassification" in str(model.config.architectures):
        fatal(f"{flag} {name} is no language model")
    stop = model.generation_config.eos_token_id
    stop = {tokenizer.eos_token_id, *(stop if isinstance(stop, list) else [stop])} - {None}
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=args.temperature, top_k=0,
        max_new_tokens=args.max_new_tokens, eos_token_id=sorted(stop),
        pad_token_id=tokenizer.eos_token_id)  # what follows a stop token is cut off
    policy = prepare(Policy(model, getattr(torch, args.dtype), device), args)
    register_fsdp_forward_method(policy, "generate")
    return policy


def compare_tokenizers(tokenizer, other, is_chat):
    """What makes two tokenizers read the same response as different ids: a list of names.

    Pad tokens may differ. Chat templates matter for conversations only."""
    # words that one of them lacks, or that have another id
    words = {word for word, _ in tokenizer.get_vocab().items() ^ other.get_vocab().items()}
    differs = {
        "vocabulary": words - {tokenizer.pad_token, other.pad_token},
        "EOS token": tokenizer.eos_token_id != other.eos_token_id,
        "BOS token": to_ids("a", tokenizer, False) != to_ids("a", other, False),
        "chat template": is_chat and tokenizer.chat_template != other.chat_template}
    return [name for name, found in differs.items() if found]


def warn_of_template(prompt, tokenizer):
    """Print a warning if the policy's response follows another text than in reward training.

    Templates of reasoning models may open "<think>" in one of the two only."""
    start = render(prompt, tokenizer, add_generation_prompt=True)
    whole = render([*prompt, {"role": "assistant", "content": "RESPONSE"}], tokenizer)
    if not whole.startswith(start):
        print0(f"warning: scores may be wrong, because the policy's response follows "
               f"{start[-50:]!r}, but in reward training the chat template gives {whole[-50:]!r}")


def load_prompts(source, split, tokenizer, args, limit=math.inf):
    """A data set -> a list of at most `limit` Prompts, in a random order that is always the same.

    Rows whose prompt has no tokens are dropped and counted, and so are comparisons of answers to
    different prompts. A long prompt keeps its BOS and its newest tokens, so that a response and its
    end fit in --max-length. Stops with an error at a row that cannot be read, or if only some of
    the prompts are conversations."""
    rows = load_rows(source, split)
    prompts = []
    # hh-rlhf has all harmless prompts first
    order = np.random.default_rng(0).permutation(len(rows))
    bar = tqdm(order, f"reading {source}", leave=False, disable=RANK > 0 or None)
    for num_read, i in enumerate(bar, 1):
        try:
            # with a list of responses, if an empty one, `read_row` accepts rows of `prompt` alone
            prompt = text = read_row({**rows[i], "responses": []})[0]
            is_chat = isinstance(prompt, list)
            if is_chat and prompt:
                text = render(prompt, tokenizer, add_generation_prompt=True)
            ids = to_ids(text, tokenizer, is_chat) if text else []
        except Exception as error:  # a chat template may raise anything
            fatal(f"{source}: row {i + 1}: {error!r}")
        if ids:
            prompts.append(Prompt(prompt, ids))
        if len(prompts) == limit:
            break
    if not prompts:
        fatal(f"{source}: no row has a prompt")
    if len({prompt.is_chat for prompt in prompts}) > 1:
        fatal(f"{source}: some prompts are texts, and some are conversations")

    # truncate from the left, but keep BOS
    room = args.max_length - args.max_new_tokens - len(end_ids(tokenizer, prompts[0].is_chat))
    if room < 2:
        fatal("--max-length minus --max-new-tokens leaves no room for a prompt")
    num_truncated = 0
    for _, ids in prompts:
        surplus = len(ids) - room
        if surplus > 0:
            start = 1 if ids[0] == tokenizer.bos_token_id else 0
            del ids[start : start + surplus]
            num_truncated += 1
    print0(f"{source}: {len(prompts):,} of {num_read:,} rows read have a prompt; "
           f"{num_truncated:,} prompts truncated to {room} tokens")
    print_once(f"first prompt: {tokenizer.decode(prompts[0].ids)[-400:]!r}")
    return prompts


@torch.no_grad()
def sample_responses(policy, prompts, k, seed, args):
    """k responses to each prompt: token ids (N, k, tokens) up to a stop token or --max-new-tokens.

    They are equal on all ranks, and do not depend on the number of ranks. `seed`: --seed, the
    iteration, and 0 for a roll-out, 1 and the number of the set for an evaluation, 2 for the
    samples."""
    stop = policy.hf_model.generation_config.eos_token_id  # all stop tokens
    size = args.rollout_batch_size
    chunks = [prompts[i : i + size] for i in range(0, len(prompts), size)]

    # Rank r samples the chunks r, r + WORLD_SIZE, r + 2 WORLD_SIZE, ... FSDP needs equally many
    # calls on each rank, so after the last chunk the count starts again at 0. Of 5 chunks, rank 0
    # of 2 samples 0, 2, 4 and rank 1 samples 1, 3, 0. Seeds belong to chunks, so both agree on 0.
    num_calls = math.ceil(len(chunks) / WORLD_SIZE)
    calls = tqdm(range(num_calls), "sampling", leave=False, disable=RANK > 0 or num_calls < 10)
    sampled = {}
    for call in calls:
        number = (RANK + call * WORLD_SIZE) % len(chunks)
        chunk = chunks[number]
        torch.manual_seed(int(np.random.default_rng((*seed, number)).integers(2**62)))

        # prompts end in the same column, with padding (-1) on the left
        width = max(len(ids) for _, ids in chunk)
        ids = [[-1] * (width - len(ids)) + ids for _, ids in chunk]
        ids = torch.tensor(ids, device=policy.device)
        tokens = policy.generate(
            ids.clamp(min=0), attention_mask=(ids >= 0).long(), num_return_sequences=k)

        # a response ends after its first stop token
        responses = []
        for response in tokens[:, width:].tolist():
            ends = [i for i, token in enumerate(response, 1) if token in stop]
            responses.append(response[: ends[0]] if ends else response)
        sampled[number] = [responses[i : i + k] for i in range(0, len(responses), k)]

    # every rank gets the chunks of all
    parts = [None] * WORLD_SIZE
    dist.all_gather_object(parts, sampled)
    for part in parts:
        sampled.update(part)
    return [response for number in range(len(chunks)) for response in sampled[number]]


def decode(prompt, responses, tokenizer):
    """Responses (k, tokens) -> texts up to the next human turn or, in a conversation, messages.

    They are cut there because in reward training a response is one turn.

    A text begins as the policy wrote it, with or without a space. It is decoded after the last
    token of the prompt, because some tokenizers leave out a space at the very beginning."""
    before = prompt.ids[-1:]
    start = len(tokenizer.decode(before, skip_special_tokens=True))
    texts = []
    for tokens in responses:
        text = tokenizer.decode(before + tokens, skip_special_tokens=True)[start:]
        if prompt.is_chat:
            texts.append([{"role": "assistant", "content": text.strip()}])
        else:
            texts.append(text.split("\n\nHuman:")[0].rstrip())
    return texts


def response_tokens(batch, length):
    """Where the response tokens of a batch are.

    -> mask (B, k, length) of those that exist and, for these n alone, their ids (n,) and the (row,
    column) of the token before each, which predicts it. On a rank without rows, B is 0, and the n
    tokens are those of the row that it computes for FSDP. For example, two responses of 2 and 1
    tokens to a prompt of 2 tokens, in one row, at length 3:

        input_ids   5 6 | 7 8 | 9        mask     [[[1 1 0], [1 0 0]]]
        segments    0 0   1 1   2        ids      [7, 8, 9]
        column      0 1   2 3   4        before   rows [0, 0, 0], columns [1, 2, 1]
    """
    prompt_length = (batch.segments == 0).sum(1)  # (R,)
    row, column = (batch.segments > 0).nonzero(as_tuple=True)  # in the order of the mask
    # the first token of a response is predicted by the last one of the prompt
    is_first = batch.position_ids[row, column] == prompt_length[row]
    before = torch.where(is_first, prompt_length[row] - 1, column - 1)

    count = batch.position_ids[batch.row, batch.last] + 1 - prompt_length[batch.row]  # (B, k)
    mask = torch.arange(length, device=count.device) < count[..., None]
    return mask, batch.input_ids[row, column], (row, before)


def read_logp(policy, batch, args):
    """Log-probability of each response token at --temperature (B, k, L), 0 where there is none."""
    mask, ids, before = response_tokens(batch, args.max_new_tokens)
    logits = policy(batch, at=before) / args.temperature  # (n, vocabulary)
    logp = -nn.functional.cross_entropy(logits, ids, reduction="none")
    return logp.new_zeros(mask.shape).masked_scatter(mask, logp)


def read_values(critic, batch, args):
    """The critic's value before each response token (B, k, L), 0 where there is none."""
    mask, _, before = response_tokens(batch, args.max_new_tokens)
    values = critic(batch, at=before)
    return values.new_zeros(mask.shape).masked_scatter(mask, values)


@torch.no_grad()
def read_all(read, model, rows, args):
    """`read_logp` or `read_values` of all rows (N, k, L), equal on all ranks."""
    k = len(rows[0]["response_ids"])
    output = torch.zeros(len(rows), k, args.max_new_tokens, device=model.device)
    for batch in micro_batches(rows, np.arange(len(rows)), args.micro_batch_tokens, model):
        output[batch.index] = read(model, batch, args)
    dist.all_reduce(output)
    return output


def token_rewards(scores, logp, reference_logp, mask, kl_coef):
    """The KL penalty at every token, and the scores (N, k) at the last ones -> (N, k, L)."""
    rewards = -kl_coef * (logp - reference_logp)
    last = mask.sum(2, keepdim=True) - 1
    return rewards.scatter_add(2, last, scores[..., None])


def estimate_advantages(rewards, values, gae_lambda):
    """Generalised advantage estimation (arXiv 1506.02438): rewards and values (..., L) -> (..., L).

    Both are 0 after the last token of a response. The discount gamma is 1."""
    advantages = torch.zeros_like(rewards)
    advantage = next_value = 0.0
    for t in reversed(range(rewards.size(-1))):
        delta = rewards[..., t] + next_value - values[..., t]
        advantage = delta + gae_lambda * advantage
        advantages[..., t] = advantage
        next_value = values[..., t]
    return advantages


def policy_loss(logp, old_logp, advantages, clip_range):
    """Loss of each token (...) and whether it is clipped (arXiv 1707.06347, Eq. 7)."""
    ratio = torch.exp(logp - old_logp)
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)
    return torch.maximum(plain, clipped), clipped > plain


def value_loss(values, old_values, returns, clip_range):
    """Loss of each token (...) and whether it is clipped."""
    plain = (values - returns) ** 2
    near_old = values.clamp(old_values - clip_range, old_values + clip_range)
    clipped = (near_old - returns) ** 2
    return torch.maximum(plain, clipped) / 2, clipped > plain


def rescale(scores, sums, scaling, clip):
    """Scores (...) -> rescaled by --reward-scaling and --reward-clip.

    `sums` (3,), float64: count, sum and sum of squares of all scores so far. These are added."""
    x = scores.double()
    sums += torch.tensor([x.numel(), x.sum(), (x**2).sum()])
    count, total, squares = sums.tolist()
    mean = total / count
    variance = (squares - total**2 / count) / max(1, count - 1)
    std = math.sqrt(max(0.0, variance))

    if scaling == "norm":
        scores = scores - mean
    if scaling != "none" and std > 0:
        scores = scores / std
    return scores.clamp(-clip, clip) if clip and scaling != "none" else scores


def make_rows(prompts, responses):
    """N prompts and the token ids of k responses to each -> a data set for `micro_batches`."""
    prompt_ids = [prompt.ids for prompt in prompts]
    lengths = [len(x) + sum(map(len, y)) for x, y in zip(prompt_ids, responses)]
    return datasets.Dataset.from_dict(
        {"prompt_ids": prompt_ids, "response_ids": responses, "length": lengths})


def end_response(tokens, stop, end):
    """A sampled response as the reward model was trained to read it: `end` replaces the stop token.

    A response that would be empty keeps its stop token."""
    words = tokens[:-1] if tokens[-1] in stop else tokens
    return (words + end) or tokens


def mean_gold(prompts, responses, models):
    """The mean true reward of all responses, whole: for the score they are not cut, either."""
    values = []
    for prompt, y in zip(prompts, responses):
        for text in models.tokenizer.batch_decode(y, skip_special_tokens=True):
            values.append(float(models.gold(prompt.text, text.strip())))
    return np.mean(values)


def score_rollouts(prompts, responses, models, args):
    """N prompts and the token ids (N, k, tokens) of responses -> Rollout.

    Its means: score, score_std within a prompt, gold, ended, length in tokens. At --temperature: kl
    to the reference in nats per response, and perplexity under the reference."""
    device = models.policy.device

    # log-probabilities (N, k, L)
    rows = make_rows(prompts, responses)
    logp = read_all(read_logp, models.policy, rows, args)
    reference_logp = read_all(read_logp, models.reference, rows, args)

    # how long each response is, whether it ends, and how the reward model reads it
    stop = models.policy.hf_model.generation_config.eos_token_id
    end = end_ids(models.reward_tokenizer, prompts[0].is_chat)
    counts = []
    ended = []
    complete = []
    for y in responses:
        counts.append([len(tokens) for tokens in y])
        ended.append([tokens[-1] in stop for tokens in y])
        complete.append([end_response(tokens, stop, end) for tokens in y])
    counts = torch.tensor(counts, device=device)
    ended = torch.tensor(ended, device=device)
    mask = torch.arange(args.max_new_tokens, device=device) < counts[..., None]

    # scores (N, k)
    scored_rows = make_rows(prompts, complete)
    scores = compute_rewards(models.reward_model, scored_rows, args.micro_batch_tokens).to(device)

    # averages for the log
    means = {"score": scores.mean(), "kl": (logp - reference_logp).sum(-1).mean(),
             "ended": ended.float().mean(), "length": counts.float().mean(),
             "perplexity": (-reference_logp.sum() / mask.sum()).exp()}
    if scores.size(1) > 1:
        means["score_std"] = scores.std(1).mean()
    means = {key: value.item() for key, value in means.items()}
    if models.gold:
        means["gold"] = mean_gold(prompts, responses, models)
    return Rollout(rows, scores, ended, mask, logp, reference_logp, means)


def evaluate(models, sets, args, step):
    """One response to each prompt of every set -> {"eval/<set>/<mean>": value}; prints them."""
    metrics = {}
    for number, (name, prompts) in enumerate(sets.items()):
        seed = args.seed, step, 1, number
        responses = sample_responses(models.policy, prompts, 1, seed, args)
        means = score_rollouts(prompts, responses, models, args).means
        metrics.update({f"eval/{name}/{key}": value for key, value in means.items()})
        line = ", ".join(f"{key} {value:.2f}" for key, value in means.items())
        prompt = str(prompts[0].text)[-60:]
        response = models.tokenizer.decode(responses[0][0])[:80]
        print0(f"{name} after {step} iterations: {line}; {prompt!r} -> {response!r}")
    return metrics


if __name__ == "__main__":
    args = parse_args()
    device = setup()
    gold = runpy.run_path(args.gold)["gold"] if args.gold else None

    # prompts and policy
    tokenizer = load_tokenizer(args.model)
    args.max_length = args.max_length or default_max_length(args.model)
    limit = math.inf if args.iterations else args.num_samples  # to sample only, read no more
    prompts = load_prompts(args.data, "train", tokenizer, args, limit)
    sets = {}  # prompts to evaluate on
    if args.iterations:
        for name, source in args.eval_data:
            sets[name] = load_prompts(source, "test", tokenizer, args, args.eval_prompts)
    # the first prompt of each set of conversations
    chats = [x[0].text for x in (prompts, *sets.values()) if x[0].is_chat]
    if chats:
        warn_of_template(chats[0], tokenizer)
    policy = load_policy(args.model, tokenizer, device, args, "--model")

    if args.iterations:
        # tokenizers: the reward model must read the ids that the policy writes
        reward_tokenizer = load_tokenizer(args.reward_model)
        different = compare_tokenizers(tokenizer, reward_tokenizer, bool(chats))
        if different:
            fatal(f"--reward-model {args.reward_model} and --model {args.model} must have the same "
                  f"tokenizer, but theirs differ in: {', '.join(different)}")
        args.reference = args.reference or args.model
        if "vocabulary" in compare_tokenizers(tokenizer, load_tokenizer(args.reference), False):
            fatal(f"--reference {args.reference} has another vocabulary than --model {args.model}")

        # The tokenizer to save with the policy. load_tokenizer may have added a pad token, but the
        # policy's embedding may have no row for it. Then EOS is the pad token.
        policy_tokenizer = AutoTokenizer.from_pretrained(args.model)
        num_rows = policy.hf_model.get_input_embeddings().num_embeddings
        if policy_tokenizer.pad_token_id not in range(num_rows):
            policy_tokenizer.pad_token = policy_tokenizer.eos_token

        # critic, reward model and reference
        critic = load_reward_model(
            args.reward_model, reward_tokenizer, device, args, "--reward-model")
        reward_model = load_reward_model(
            args.reward_model, reward_tokenizer, device, args, "--reward-model")
        reference = load_policy(args.reference, tokenizer, device, args, "--reference")
        reward_model.requires_grad_(False)
        reference.requires_grad_(False)
        models = Models(policy, reference, reward_model, tokenizer, reward_tokenizer, gold)
        # policy and critic read the same batches: they share prompts if both can
        policy.share = critic.share = policy.share and critic.share

        # UNSTATED: AdamW's settings and the schedule. Here they are those of the authors' PPO.
        trained = nn.ModuleDict({"policy": policy, "critic": critic})
        # a buffer, so that checkpoints have it
        trained.register_buffer("score_sums", torch.zeros(3, dtype=torch.float64))
        optimizer = torch.optim.AdamW(
            [{"params": policy.parameters(), "lr": args.lr, "eps": 1e-6},
             {"params": critic.parameters(), "lr": args.critic_lr, "eps": 1e-8}],
            betas=(0.9, 0.95), weight_decay=0.0, fused=device.type == "cuda")

    # a new run, or the one to resume
    start = open_run(args, [args.model, args.reference, args.reward_model, args.data])
    if start:
        load_checkpoint(args.output_dir, trained, optimizer, start)
    elif args.iterations:
        log(args.output_dir, 0, evaluate(models, sets, args, 0))

    warmup = max(1, round(args.iterations * args.warmup_ratio))
    bar = tqdm(range(start, args.iterations), "PPO", args.iterations, initial=start,
               mininterval=1, disable=RANK > 0)
    for step in bar:
        done = step + 1

        # learning rates of policy and critic: linear warm-up, then 1 / sqrt(iteration)
        factor = min(done / warmup, math.sqrt(warmup / done))
        optimizer.param_groups[0]["lr"] = args.lr * factor
        optimizer.param_groups[1]["lr"] = args.critic_lr * factor

        # sample responses to the next prompts
        index = batch_indices(len(prompts), args.batch_size, args.seed, step)
        batch_prompts = [prompts[i] for i in index]
        seed = args.seed, step, 0
        responses = sample_responses(policy, batch_prompts, args.num_responses, seed, args)

        # scores of whole responses (N, k), rescaled, with a penalty where a response does not end
        rollout = score_rollouts(batch_prompts, responses, models, args)
        scores = rescale(
            rollout.scores, trained.score_sums, args.reward_scaling, args.reward_clip)
        scores = scores - args.missing_eos_penalty * ~rollout.ended

        # rewards, values, advantages and returns of their tokens (N, k, L)
        old_logp = rollout.logp
        mask = rollout.mask
        rewards = token_rewards(scores, old_logp, rollout.reference_logp, mask, args.kl_coef)
        old_values = read_all(read_values, critic, rollout.rows, args)
        advantages = estimate_advantages(rewards, old_values, GAE_LAMBDA)
        returns = advantages + old_values
        num_tokens = mask.sum()
        # UNSTATED: whether advantages are whitened. Here they are; a single token has no std.
        if num_tokens > 1:
            mean = advantages[mask].mean()
            advantages = (advantages - mean) / (advantages[mask].std() + 1e-8)

        # Updates, each on the whole roll-out. There are no minibatches: micro-batches only limit
        # memory. So with --epochs 1, the default but for the toy world, the ratio is 1, and
        # clipping has no effect.
        for epoch in range(args.epochs):
            sums = torch.zeros(5, device=device)
            order = np.arange(len(rollout.rows))
            for batch in micro_batches(rollout.rows, order, args.micro_batch_tokens, policy):
                i = batch.index
                real = mask[i]  # (B, k, L)

                # the policy's gradient
                logp = read_logp(policy, batch, args)
                loss, clipped = policy_loss(logp, old_logp[i], advantages[i], args.clip_range)
                (loss[real].sum() / num_tokens).backward()

                # the critic's gradient
                values = read_values(critic, batch, args)
                critic_loss, value_clipped = value_loss(
                    values, old_values[i], returns[i], args.clip_range)
                (critic_loss[real].sum() / num_tokens).backward()

                # sums over the tokens, for the log
                log_ratio = logp - old_logp[i]
                approx_kl = log_ratio.expm1() - log_ratio
                parts = [loss, critic_loss, approx_kl, clipped, value_clipped]
                sums += torch.stack(parts).detach()[:, real].sum(1)

            # means over the tokens of all ranks; the gradients are summed by FSDP
            dist.all_reduce(sums)
            names = "policy_loss", "value_loss", "approx_kl", "clip_fraction", "value_clip_fraction"
            losses = dict(zip(names, (sums / num_tokens).tolist()))

            # clip the gradients, and step
            grad_norm = clip_gradients(policy, args.max_grad_norm)
            critic_grad_norm = clip_gradients(critic, args.max_grad_norm)
            if not math.isfinite(sums[:2].sum() + grad_norm + critic_grad_norm):
                fatal(f"step {done}: a loss or gradient is not finite: "
                      "lower --lr or --critic-lr")
            optimizer.step()
            optimizer.zero_grad()

        # log, evaluate and save
        metrics = {**losses, **rollout.means, "entropy": -old_logp[mask].mean().item(),
                   "grad_norm": grad_norm, "critic_grad_norm": critic_grad_norm}
        metrics = {f"ppo/{key}": value for key, value in metrics.items()}
        if done == args.iterations or args.eval_every and done % args.eval_every == 0:
            metrics.update(evaluate(models, sets, args, done))
        log(args.output_dir, done, metrics)
        bar.set_postfix(rollout.means, refresh=False)
        if args.save_every and done % args.save_every == 0 and done < args.iterations:
            save_checkpoint(args.output_dir, trained, optimizer, done)

    # the trained policy
    if args.iterations:
        save_model(f"{args.output_dir}/policy", policy, policy_tokenizer)

    # its samples, for meta_rm.py
    seed = args.seed, args.iterations, 2
    responses = sample_responses(policy, prompts[: args.num_samples], args.k, seed, args)
    lines = ""
    for prompt, y in zip(prompts, responses):
        sample = {"prompt": prompt.text, "responses": decode(prompt, y, tokenizer)}
        lines += json.dumps(sample) + "\n"
    if RANK == 0:
        atomic_write(f"{args.output_dir}/samples.jsonl", lines)
