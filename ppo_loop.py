"""PPO against a reward model: the loop that shows what a reward model is worth.

Secrets of RLHF in Large Language Models Part II: Reward Modeling (arXiv 2401.06080), sections 2.5, 3.1 and 3.2.

PPO samples responses y to prompts x. The reward model r gives a reward at the last token, and every token has a penalty
for leaving the reference, the SFT model. The critic V starts as a copy of r and gives a value before every token:

    R_t     = -beta (log pi(y_t) - log pi_ref(y_t))  [ + z at the last token, less 1 if the response does not end ]
    z       = clip( (r(x, y) - mean) / std, -c', c' )            mean and std of all scores so far; c': --reward-clip
    A_t     = sum_l lambda^l delta_{t+l},    delta_t = R_t + V_{t+1} - V_t,    G_t = A_t + V_t       (GAE, gamma = 1)
    policy    -min( rho A, clip(rho, 1 - c, 1 + c) A ),            rho = pi(y_t) / pi_old(y_t)
    critic    1/2 max( (V - G)^2, (V_old + clip(V - V_old, -c, c) - G)^2 )

    torchrun ppo_loop.py                                                            the toy world, 20 seconds on a CPU
    python ppo_loop.py --kl-coef 0 --reward-model runs/denoise_rm/model             no KL penalty, as in section 2.5
    python ppo_loop.py --iterations 0 --model my-policy --data prompts.jsonl        only sample: writes samples.jsonl

Plot ppo/score, the mean reward, over ppo/kl, the distance to the reference. --gold measures what the responses are
really worth: if it falls while the score rises, the policy exploits errors of the reward model.

Iterated RLHF with MetaRM (section 3.2) alternates between a reward model for the latest policy and PPO:

    cp docs/toy/meta.jsonl samples.jsonl; policy=docs/toy/model
    for round in 1 2 3; do
        python meta_rm.py --meta-data samples.jsonl --output-dir runs/rm-$round
        python ppo_loop.py --model $policy --reference docs/toy/model --reward-model runs/rm-$round/model \\
            --seed $round --output-dir runs/ppo-$round
        cp runs/ppo-$round/samples.jsonl .; policy=runs/ppo-$round/policy
    done
"""

import argparse
import math
import runpy
import time

import datasets
import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, GenerationConfig

from common import (
    RANK, WORLD_SIZE, HelpFormatter, RewardModel, batch_indices, clip_gradients, compute_rewards,
    fatal, in_range, load_checkpoint, load_pretrained, load_reward_model, load_rows,
    load_tokenizer, log, micro_batches, named_source, open_run, prepare, print0, read_row,
    save_checkpoint, save_model, setup, to_ids)

TOY_DEFAULTS = {  # replace those of the flags when --model or --reference is docs/toy/model
    "data": "docs/toy/train.jsonl", "gold": "docs/toy/make.py", "iterations": 100, "epochs": 2, "batch_size": 16,
    "lr": 1e-3, "critic_lr": 1e-3, "max_length": 64, "max_new_tokens": 12, "rollout_batch_size": 64, "eval_every": 50,
    "save_every": 50, "temperature": 1.0, "kl_coef": 0.2, "reward_clip": 0.0,
    "eval_data": [(name, f"docs/toy/{name}.jsonl") for name in ("id", "ood")]}


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False, epilog=f"toy defaults: {TOY_DEFAULTS}")
    parser.error, add = fatal, parser.add_argument
    add("--model", default="docs/toy/model", help="the policy to start from: folder or hub id of a language model")
    # UNSTATED: what reward model, policy and reference start from in a later round. Here all three are flags.
    add("--reference", help="language model of the KL penalty: folder or hub id; by default --model")
    add("--reward-model", default="docs/toy/reward_model", help="folder or hub id")
    add("--gold", help="FILE.py with gold(prompt, response) -> float, the true reward: logged, not trained on")
    add("--data", default="Anthropic/hh-rlhf", help="comparisons or rows of `prompt`, in the other scripts' formats")
    add("--eval-data", nargs="*", type=named_source, default=[("test", "Anthropic/hh-rlhf:test")],
        metavar="NAME=SOURCE", help="named sets whose prompts the policy is evaluated on")
    add("--output-dir", default="runs/ppo_loop", help="folder for policy/, samples.jsonl, metrics.jsonl and args.json")
    add("--seed", type=in_range(int, 0), default=0, help="random seed for the order of the prompts and for sampling")
    add("--iterations", type=in_range(int, 0), default=2000, help="roll-outs with --epochs updates each; 0: just sample")
    add("--epochs", type=in_range(int, 1), default=1, help="updates on the roll-outs of an iteration")
    # UNSTATED: whether the paper's batch of 32 are prompts or responses; here prompts.
    add("--batch-size", type=in_range(int, 1), default=32, help="prompts per iteration, over all ranks")
    add("--num-responses", type=in_range(int, 1), default=4, help="responses to each prompt of an iteration")
    add("--lr", type=in_range(float, 0), default=5e-7, help="peak learning rate of the policy's AdamW")
    add("--critic-lr", type=in_range(float, 0), default=1.5e-6, help="peak learning rate of the critic's AdamW")
    add("--warmup-ratio", type=in_range(float, 0, 1), default=0.1, help="fraction of iterations for warm-up, then 1/sqrt")
    add("--max-grad-norm", type=in_range(float, 0), default=1.0, help="gradients are clipped to this norm; 0: never")
    add("--max-length", type=in_range(int, 2), default=2048, help="max tokens of prompt + response, cut from the left")
    add("--max-new-tokens", type=in_range(int, 1), default=512, help="maximum length of a response in tokens")
    add("--rollout-batch-size", type=in_range(int, 1), default=8, help="prompts whose responses are sampled together")
    add("--micro-batch-tokens", type=in_range(int, 1), default=8192, help="tokens per forward pass, limits memory only")
    add("--eval-every", type=in_range(int, 0), default=100, help="iterations between evaluations; 0: only at the end")
    add("--eval-prompts", type=in_range(int, 1), default=200, help="prompts of each set, with one response to each")
    add("--num-samples", type=in_range(int, 0), default=1000, help="prompts in samples.jsonl: the first ones of --data")
    add("--k", type=in_range(int, 1), default=5, help="responses to each prompt in samples.jsonl")
    add("--save-every", type=in_range(int, 0), default=100, help="iterations between checkpoints; 0: none")
    add("--resume", action="store_true", help="continue from the last checkpoint in --output-dir")
    add("--dtype", choices=["float32", "bfloat16"], default="bfloat16" if torch.cuda.is_available() else "float32",
        help="dtype of the computation; weights, scores and losses are always float32")
    add("--gradient-checkpointing", action="store_true", help="recompute activations: less memory, a third slower")
    add("--offload", action="store_true", help="keep weights, gradients and optimizer state in host memory")
    # DEVIATION: the paper also samples with top-p 0.9 and a repetition penalty of 1.1. PPO needs the log-probabilities
    # of the distribution it samples from, and those of a nucleus are not defined once the policy has moved.
    add("--temperature", type=in_range(float, 0.01), default=0.8, help="temperature of sampling and log-probabilities")
    add("--kl-coef", type=in_range(float, 0), default=0.05, help="beta, the weight of the KL penalty; 0: none")
    add("--reward-scaling", choices=["none", "std", "norm"], default="norm", help="divide by running std; norm: center")
    add("--reward-clip", type=in_range(float, 0), default=0.8, help="clip rescaled scores to +- this; 0: no clipping")
    # UNSTATED: the penalty; the clip ranges, here those of the authors' released PPO; whether to whiten advantages.
    add("--missing-eos-penalty", type=in_range(float, 0), default=1.0, help="subtracted if there is no stop token")
    add("--gae-lambda", type=in_range(float, 0, 1), default=0.95, help="lambda of GAE")
    add("--clip-range", type=in_range(float, 0), default=0.2, help="clip range of the policy ratio")
    add("--clip-range-value", type=in_range(float, 0), default=0.2, help="clip range of the change in value; 0: none")
    add("--whiten-advantages", action=argparse.BooleanOptionalAction, default=True, help="to mean 0 and std 1")
    known = parser.parse_known_args()[0]
    if "docs/toy/model" in (known.model, known.reference):
        parser.set_defaults(**TOY_DEFAULTS)
    return parser.parse_args()


class Policy(RewardModel):
    """A language model that reads the same batches as a reward model, and samples."""

    def forward(self, batch, temperature=1.0, length=None, with_features=False):
        """Batch -> log-probabilities of the response tokens (B, k, length), 0 where there is none; with_features: None
        and the hidden states at the last tokens."""
        if with_features:
            return None, self.hf_model.base_model(**self.inputs(batch)).last_hidden_state[batch.row, batch.last].float()
        row, column, previous, mask = response_tokens(batch, length)
        logits = self.hf_model(**self.inputs(batch)).logits[row[mask], previous[mask]].float()  # (tokens, vocabulary)
        tokens = batch.input_ids[row[mask], column[mask]]
        logp = torch.log_softmax(logits / temperature, -1).gather(1, tokens[:, None])[:, 0]
        return torch.zeros(mask.shape, device=logp.device).masked_scatter(mask, logp)

    def generate(self, ids, **kwargs):
        """Sample with transformers' generate; weights sharded by FSDP are gathered once, not for every token."""
        self.eval()  # or gradient checkpointing would turn the cache off
        if isinstance(self, FSDPModule):
            self.set_reshard_after_forward(False)
        tokens = self.hf_model.generate(ids, synced_gpus=WORLD_SIZE > 1, use_cache=True, **kwargs)
        if isinstance(self, FSDPModule):
            self.set_reshard_after_forward(True)
            for module in self.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()
        self.train()
        return tokens


def load_policy(name, tokenizer, device, args, flag):
    """A Policy with fp32 weights from a folder or hub id. It samples from its plain softmax at a temperature, whatever
    generation settings it came with, but for its stop tokens. Exits on anything that is no language model."""
    model, missing = load_pretrained(AutoModelForCausalLM, name, flag)
    if missing or "SequenceClassification" in str(model.config.architectures):
        fatal(f"{flag} {name} is no language model")
    stop = model.generation_config.eos_token_id
    stop = sorted({tokenizer.eos_token_id, *(stop if isinstance(stop, list) else [stop])} - {None})
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=args.temperature, top_k=0, top_p=1.0, max_new_tokens=args.max_new_tokens,
        eos_token_id=stop, pad_token_id=tokenizer.eos_token_id)  # tokens after a stop token are cut off
    policy = prepare(Policy(model, getattr(torch, args.dtype), device), args)
    register_fsdp_forward_method(policy, "generate")
    return policy


def load_prompts(source, split, tokenizer, args, limit=None):
    """The prompts of the first `limit` rows -> texts or lists of messages (N,), and token ids (N,). Long ones keep the
    BOS and their newest tokens, so that a response and an EOS fit. Exits naming a row that cannot be read."""
    rows, prompts, texts = load_rows(source, split), [], []
    for number, row in enumerate(rows.take(min(limit or len(rows), len(rows))), 1):
        try:
            text = prompt = read_row(row)[0] if row.get("chosen") or row.get("responses") else row["prompt"]
            if isinstance(prompt, list):
                text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        except Exception as error:  # a chat template raises what it likes
            fatal(f"{source}: row {number}: {error!r}")
        if prompt:
            prompts.append(prompt)
            texts.append(text)
    room = args.max_length - args.max_new_tokens - 1
    if room < 2 or not prompts:
        fatal(f"{source}: no prompts, or --max-length minus --max-new-tokens leaves no room for one")
    ids = to_ids(texts, tokenizer, is_chat=isinstance(prompts[0], list))
    print0(f"{source}: {len(ids):,} of {len(rows):,} prompts, {sum(len(x) > room for x in ids):,} truncated")
    heads = [x[:1] if x[0] == tokenizer.bos_token_id else [] for x in ids]
    return prompts, [x if len(x) <= room else head + x[len(head) - room :] for head, x in zip(heads, ids)]


@torch.no_grad()
def generate(policy, prompt_ids, k, seed, args):
    """k sampled responses to each prompt: token ids (N, k, tokens) up to a stop token or --max-new-tokens, equal on all
    ranks, whatever their number. `seed`: a tuple of numbers, unique to this call."""
    stop, size = set(policy.hf_model.generation_config.eos_token_id), args.rollout_batch_size
    chunks, responses = [prompt_ids[i : i + size] for i in range(0, len(prompt_ids), size)], {}
    calls = range(RANK, math.ceil(len(chunks) / WORLD_SIZE) * WORLD_SIZE, WORLD_SIZE)  # FSDP: equally many on each
    for call in tqdm(calls, "sampling", leave=False, disable=RANK > 0 or len(calls) < 10, mininterval=1):
        number, chunk = call % len(chunks), chunks[call % len(chunks)]
        torch.manual_seed(int(np.random.default_rng((*seed, number)).integers(2**62)))
        width = max(map(len, chunk))
        ids = torch.tensor([[0] * (width - len(x)) + x for x in chunk], device=policy.device)
        mask = torch.tensor([[0] * (width - len(x)) + [1] * len(x) for x in chunk], device=policy.device)
        tokens = policy.generate(ids, attention_mask=mask, num_return_sequences=k)[:, width:].tolist()
        ends = [next((i + 1 for i, token in enumerate(x) if token in stop), len(x)) for x in tokens]
        tokens = [x[:end] for x, end in zip(tokens, ends)]
        responses[number] = [tokens[i : i + k] for i in range(0, len(tokens), k)]
    parts = [None] * WORLD_SIZE
    dist.all_gather_object(parts, responses)
    responses = {number: chunk for part in parts for number, chunk in part.items()}
    return [response for number in range(len(chunks)) for response in responses[number]]


def decode(prompt, responses, tokenizer):
    """Responses (k, tokens) -> texts up to the next human turn or, if the prompt is a list, lists of one message."""
    texts = [x.split("\n\nHuman:")[0].strip() for x in tokenizer.batch_decode(responses, skip_special_tokens=True)]
    if isinstance(prompt, list):
        return [[{"role": "assistant", "content": text}] for text in texts]
    return [text if prompt[-1:].isspace() else f" {text}" for text in texts]


def response_tokens(batch, length):
    """Where the response tokens of a batch are: row, column, and column of the previous token, which predicts it,
    (B, k, length) each, and a mask of those that exist."""
    segments = batch.segments[batch.row]  # (B, k, T)
    number = torch.arange(1, segments.size(1) + 1, device=segments.device)[:, None]
    count, offset = (segments == number).sum(-1, keepdim=True), torch.arange(length, device=segments.device)
    mask = offset < count
    column = (batch.last[..., None] - count + 1 + offset) * mask
    previous = torch.where(offset > 0, column - 1, (segments == 0).sum(-1, keepdim=True) - 1) * mask
    return batch.row[..., None].expand_as(column), column, previous, mask


def read_values(critic, batch, length):
    """The critic's value before each response token (B, k, length), 0 where there is none."""
    row, _, previous, mask = response_tokens(batch, length)
    values = critic(batch, at=(row[mask], previous[mask]))
    return torch.zeros(mask.shape, device=values.device).masked_scatter(mask, values)


@torch.no_grad()
def by_token(function, model, rows, args):
    """Apply `function`, Batch -> (B, k, --max-new-tokens), to all rows; (N, k, length), equal on all ranks."""
    output = torch.zeros(len(rows), len(rows[0]["response_ids"]), args.max_new_tokens, device=model.device)
    for batch in micro_batches(rows, np.arange(len(rows)), args.micro_batch_tokens, model):
        output[batch.index] = function(batch)
    dist.all_reduce(output)
    return output


def token_rewards(scores, logp, reference, mask, kl_coef):
    """Scores (N, k) at the last tokens and the KL penalty at every token: log-probabilities (N, k, L) -> (N, k, L)."""
    rewards = -kl_coef * (logp - reference)
    return rewards.scatter_add(2, mask.sum(2, keepdim=True) - 1, scores[..., None])


def estimate_advantages(rewards, values, mask, gae_lambda, gamma=1.0):
    """Generalised advantage estimation (arXiv 1506.02438): rewards, values and mask (..., L) -> (..., L). The value
    after the last token is 0."""
    advantages, advantage, next_value = torch.zeros_like(rewards), 0.0, 0.0
    for t in reversed(range(rewards.size(-1))):
        delta = rewards[..., t] + gamma * next_value - values[..., t]
        advantage = (delta + gamma * gae_lambda * advantage) * mask[..., t]
        next_value = values[..., t] * mask[..., t]
        advantages[..., t] = advantage
    return advantages


def policy_loss(logp, old_logp, advantage, clip_range):
    """Loss of each token (...) and whether it is clipped (arXiv 1707.06347, Eq. 7)."""
    ratio = torch.exp(logp - old_logp)
    plain, clipped = -advantage * ratio, -advantage * ratio.clamp(1 - clip_range, 1 + clip_range)
    return torch.maximum(plain, clipped), clipped > plain


def value_loss(values, old_values, returns, clip_range):
    """Loss of each token (...) and whether it is clipped; clip_range 0: no clipping."""
    plain = clipped = (values - returns) ** 2
    if clip_range:
        clipped = (old_values + (values - old_values).clamp(-clip_range, clip_range) - returns) ** 2
    return torch.maximum(plain, clipped) / 2, clipped > plain


class RunningMoments(nn.Module):
    """Count, sum and sum of squares of all scores so far, in float64; a module, so that checkpoints have them."""

    def __init__(self):
        super().__init__()
        self.register_buffer("sums", torch.zeros(3, dtype=torch.float64))

    def rescale(self, scores, scaling, clip):
        """Add scores (...) and return them rescaled by --reward-scaling and --reward-clip."""
        x = scores.double()
        self.sums += torch.tensor([x.numel(), x.sum(), (x**2).sum()])
        count, total, squares = self.sums.tolist()
        mean, variance = total / count, max(0.0, squares - total**2 / count) / max(1, count - 1)
        if scaling == "norm":
            scores = scores - mean
        if scaling != "none":
            scores = scores / (math.sqrt(variance) or 1.0)
        return scores.clamp(-clip, clip) if clip else scores


def score_rollouts(prompts, responses, models, tokenizer, gold, args):
    """(texts, token ids) of N prompts and k responses each -> rows, scores and ended (N, k), logp, reference and mask
    (N, k, L), and means: score, score_std within a prompt, gold, ended, length in tokens, and, at --temperature, kl to
    the reference in nats per response and perplexity under it."""
    texts, ids = prompts
    lengths = [len(x) + sum(map(len, y)) for x, y in zip(ids, responses)]
    rows = datasets.Dataset.from_dict({"prompt_ids": ids, "response_ids": responses, "length": lengths})
    eos, stop = tokenizer.eos_token_id, models["policy"].hf_model.generation_config.eos_token_id
    with_eos, counts, ended = [], [], []
    for y in responses:
        with_eos.append([x if x[-1] == eos else [*x, eos] for x in y])  # as the reward model was trained
        counts.append([len(x) for x in y])
        ended.append([x[-1] in stop for x in y])
    scored_rows = datasets.Dataset.from_dict({"prompt_ids": ids, "response_ids": with_eos, "length": lengths})
    device, length = models["policy"].device, args.max_new_tokens
    scores = compute_rewards(models["reward_model"], scored_rows, args.micro_batch_tokens).to(device)
    logp, reference = (
        by_token(lambda batch: models[name](batch, args.temperature, length), models[name], rows, args)
        for name in ("policy", "reference"))
    counts, ended = torch.tensor(counts, device=device), torch.tensor(ended, device=device)
    mask = torch.arange(length, device=device) < counts[..., None]
    means = {"score": scores.mean(), "kl": (logp - reference).sum(-1).mean(), "ended": ended.float().mean(),
             "perplexity": (-reference.sum() / mask.sum()).exp(), "length": counts.float().mean()}
    if scores.size(1) > 1:
        means["score_std"] = scores.std(1).mean()
    means = {key: value.item() for key, value in means.items()}
    if gold:
        means["gold"] = np.mean([gold(x, text) for x, y in zip(texts, responses) for text in decode("", y, tokenizer)])
    return rows, scores, ended, logp, reference, mask, means


def evaluate(models, sets, tokenizer, gold, args, step):
    """One response to each prompt of every set -> {"eval/<set>/<mean>": value}; prints the means and a response."""
    metrics = {}
    for number, (name, prompts) in enumerate(sets.items()):
        responses = generate(models["policy"], prompts[1], 1, (args.seed, step, 1, number), args)
        means = score_rollouts(prompts, responses, models, tokenizer, gold, args)[-1]
        metrics.update({f"eval/{name}/{key}": value for key, value in means.items()})
        print0(f"{name} after {step} iterations: " + ", ".join(f"{key} {value:.2f}" for key, value in means.items())
               + f"; {str(prompts[0][0])[-60:]!r} -> {tokenizer.decode(responses[0][0])[:80]!r}")
    return metrics


if __name__ == "__main__":
    args = parse_args()
    device = setup()
    try:
        gold = runpy.run_path(args.gold)["gold"] if args.gold else None
    except Exception as error:
        fatal(f"--gold {args.gold}: {error!r}")

    # prompts and models
    tokenizer = load_tokenizer(args.model)
    prompts = load_prompts(args.data, "train", tokenizer, args)
    policy = load_policy(args.model, tokenizer, device, args, "--model")
    if args.iterations:
        sets = {x: load_prompts(source, "test", tokenizer, args, args.eval_prompts) for x, source in args.eval_data}
        if load_tokenizer(args.reward_model).get_vocab() != tokenizer.get_vocab():
            fatal(f"--reward-model {args.reward_model} has a different tokenizer than --model {args.model}")
        critic, reward_model = (load_reward_model(args.reward_model, tokenizer, device, args, "--reward-model")
                                for _ in range(2))
        reference = load_policy(args.reference or args.model, tokenizer, device, args, "--reference")
        models = {"policy": policy, "reference": reference.requires_grad_(False),
                  "reward_model": reward_model.requires_grad_(False)}
        policy.share = critic.share = policy.share and critic.share  # they read the same batches
        parts = nn.ModuleDict({"policy": policy, "critic": critic, "moments": RunningMoments()})
        optimizers = [torch.optim.AdamW(part.parameters(), lr=lr, betas=(0.9, 0.95), eps=eps, weight_decay=0.0,
                                        fused=device.type == "cuda")
                      for part, lr, eps in ((policy, args.lr, 1e-6), (critic, args.critic_lr, 1e-8))]
    start = open_run(args, [args.model, args.reference, args.reward_model, args.data])
    if start:
        load_checkpoint(args.output_dir, parts, optimizers, start)
    elif args.iterations:
        log(args.output_dir, 0, evaluate(models, sets, tokenizer, gold, args, 0))

    bar = tqdm(range(start, args.iterations), "PPO", args.iterations, initial=start, mininterval=1, disable=RANK > 0)
    for step in bar:
        began = time.time()
        # UNSTATED: the schedule and AdamW's settings. Here they are those of the authors' released PPO.
        warmup = max(1, round(args.iterations * args.warmup_ratio))
        for optimizer, lr in zip(optimizers, (args.lr, args.critic_lr)):
            optimizer.param_groups[0]["lr"] = lr * min((step + 1) / warmup, math.sqrt(warmup / (step + 1)))

        # roll-outs
        index = batch_indices(len(prompts[1]), args.batch_size, args.seed, step)
        batch_prompts = [prompts[0][i] for i in index], [prompts[1][i] for i in index]
        responses = generate(policy, batch_prompts[1], args.num_responses, (args.seed, step, 0), args)
        rollout_seconds = time.time() - began

        # rewards, values and advantages, token by token
        rows, scores, ended, logp, reference_logp, mask, means = score_rollouts(
            batch_prompts, responses, models, tokenizer, gold, args)
        scores = parts["moments"].rescale(scores, args.reward_scaling, args.reward_clip)
        scores -= args.missing_eos_penalty * ~ended
        rewards = token_rewards(scores, logp, reference_logp, mask, args.kl_coef)
        values = by_token(lambda batch: read_values(critic, batch, args.max_new_tokens), critic, rows, args)
        advantages = estimate_advantages(rewards, values, mask, args.gae_lambda)
        returns = advantages + values
        if args.whiten_advantages:
            advantages = (advantages - advantages[mask].mean()) / (advantages[mask].std() + 1e-8)

        # updates
        count = mask.sum()
        for epoch in range(args.epochs):
            sums = torch.zeros(5, device=device)
            for batch in micro_batches(rows, np.arange(len(rows)), args.micro_batch_tokens, policy):
                real = mask[batch.index]  # (B, k, L)
                old_logp, old_values, advantage, target = (
                    x[batch.index][real] for x in (logp, values, advantages, returns))  # (tokens,)
                new_logp = policy(batch, args.temperature, args.max_new_tokens)[real]
                loss, clipped = policy_loss(new_logp, old_logp, advantage, args.clip_range)
                (loss.sum() / count).backward()
                new_values = read_values(critic, batch, args.max_new_tokens)[real]
                critic_loss, value_clipped = value_loss(new_values, old_values, target, args.clip_range_value)
                (critic_loss.sum() / count).backward()
                approx_kl = (new_logp - old_logp).expm1() - (new_logp - old_logp)
                sums += torch.stack([x.detach().sum() for x in (loss, critic_loss, approx_kl, clipped, value_clipped)])
            dist.all_reduce(sums)
            names = "policy_loss", "value_loss", "approx_kl", "clip_fraction", "value_clip_fraction"
            metrics = {f"ppo/{key}": value for key, value in zip(names, (sums / count).tolist())}
            if epoch == 0 and metrics["ppo/approx_kl"] > (0.01 if args.dtype == "bfloat16" else 1e-5):
                fatal(f"step {step + 1}: the ratio before any update is not 1: KL {metrics['ppo/approx_kl']:.2g}")
            grad_norms = [clip_gradients(model, args.max_grad_norm) for model in (policy, critic)]
            if not math.isfinite(metrics["ppo/policy_loss"] + metrics["ppo/value_loss"] + sum(grad_norms)):
                fatal(f"step {step + 1}: a loss or gradient is not finite: lower --lr or --critic-lr")
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()

        metrics.update({f"ppo/{key}": value for key, value in means.items()})
        metrics.update({"ppo/explained_variance": 1 - ((returns - values)[mask].var() / returns[mask].var()).item(),
                        "ppo/entropy": -logp[mask].mean().item(), "ppo/grad_norm": grad_norms[0],
                        "ppo/critic_grad_norm": grad_norms[1], "ppo/rollout_seconds": rollout_seconds})
        if step + 1 == args.iterations or args.eval_every and (step + 1) % args.eval_every == 0:
            metrics.update(evaluate(models, sets, tokenizer, gold, args, step + 1))
        log(args.output_dir, step + 1, metrics)
        bar.set_postfix({key: f"{means[key]:.2f}" for key in ("score", "gold", "kl") if key in means}, refresh=False)
        if args.save_every and (step + 1) % args.save_every == 0 and step + 1 < args.iterations:
            save_checkpoint(args.output_dir, parts, optimizers, step + 1)

    if args.iterations:
        save_model(f"{args.output_dir}/policy", policy, tokenizer)
    texts, ids = (part[: args.num_samples] for part in prompts)
    responses = generate(policy, ids, args.k, (args.seed, args.iterations, 2), args)
    samples = [{"prompt": text, "responses": decode(text, y, tokenizer)} for text, y in zip(texts, responses)]
    if RANK == 0:
        datasets.Dataset.from_list(samples).to_json(f"{args.output_dir}/samples.jsonl")
