"""The whole loop: PPO against a reward model, then a reward model for the policy that came out of it, and so on.

Secrets of RLHF in Large Language Models Part II: Reward Modeling (arXiv 2401.06080), sections 2.5, 3.1 and 3.2, and
Alleviating Shifted Distribution in Human Preference Alignment through Meta-Learning (arXiv 2405.00438).

    policy <- SFT model
    for round = 1 ... R:
        reward model r <- MetaRM on the comparisons, its meta set sampled from the policy      (meta_rm.py does it)
        policy         <- PPO against r

PPO samples responses y to prompts x, token by token, and takes them for episodes whose reward is r, at the last token,
less a price for leaving the reference (the SFT model); the critic V starts as a copy of r, read before every token:

    R_t     = -beta (log pi(y_t) - log pi_ref(y_t))  [ + z at the last token, less 1 where the response does not end ]
    z       = clip( (r(x, y) - mean) / std, -c', c' )            mean and std of all scores so far; c' as --reward-clip
    A_t     = sum_l (gamma lambda)^l delta_{t+l},    delta_t = R_t + gamma V_{t+1} - V_t,    G_t = A_t + V_t
    policy    -min( rho A, clip(rho, 1 - c, 1 + c) A ),            rho = pi(y_t) / pi_old(y_t)
    critic    1/2 max( (V - G)^2, (V_old + clip(V - V_old, -c, c) - G)^2 )

    torchrun ppo_loop.py                                                         the toy world
    torchrun ppo_loop.py --rounds 1 --kl 0 --reward-model runs/baseline_rm/model       PPO alone, without KL penalty
    torchrun --nproc_per_node 8 ppo_loop.py --model my-sft-model

Watch ppo/score, what the reward model says, over ppo/kl, how far the policy has gone for it. In the toy world ppo/gold
says what it is worth: if it falls while the score rises, the policy has found what the reward model gets wrong.
"""

import argparse
import itertools
import json
import math
import runpy
import shlex
import sys
import time
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

from common import (
    RANK, WORLD, Log, RewardModel, all_sum, as_answers, barrier, clip_gradients, encode_answers, encode_prompts, fail,
    last_checkpoint, load_checkpoint, load_language_model, load_prompts, load_reward_model, load_tokenizer,
    micro_batches, prepare, replaced, respond, response_tokens, reward_config, save_checkpoint, save_model, say, score,
    settle, setup, spell, step_rows, toy_gold, toy_model)

# UNSTATED: whether the paper's 32 are prompts or responses (here prompts), the clips of ratio and value (here those of
# the authors' released PPO), the whitening.
DEFAULTS = {  #     the paper's            the toy's: taken when --model is toy
    "data":         ("Anthropic/hh-rlhf",   "toy"),
    "rounds":       (4,                     3),
    "iterations":   (2000,                  100),
    "epochs":       (1,                     2),
    "batch_size":   (32,                    16),
    "rollouts":     (4,                     4),
    "lr":           (5e-7,                  1e-3),
    "critic_lr":    (1.5e-6,                1e-3),
    "max_length":   (2048,                  64),
    "max_new_tokens": (512,                 12),
    "micro_tokens": (8192,                  4096),
    "sample_batch": (8,                     64),
    "eval_every":   (100,                   50),
    "save_every":   (100,                   50),
    "temperature":  (0.8,                   1.0),
    "kl":           (0.05,                  0.2),
    "reward_clip":  (0.8,                   0.0),
}
RM_FLAGS = "", "--epochs 3 --batch-size 32 --lr 5e-4 --eval-every 0 --save-every 0 --eta 0.01 --meta-prompts 1000"
EVAL_DATA = {  # of --data, when --eval-data is not given
    "Anthropic/hh-rlhf": ["test=Anthropic/hh-rlhf:test"],
    "toy": ["id=toy:id", "ood=toy:ood"],
}


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=spell(DEFAULTS), formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False)
    parser.error, add = fail, parser.add_argument
    add("--model", default="toy", help="the SFT model, a language model: folder or hub id")
    add("--reward-model", help="of the first round: a folder; by default it is trained like those of the others")
    add("--data", help="toy | file (.jsonl .json .parquet .gz) | folder of save_to_disk | hub id[[:config]:split]")
    add("--prompts", help="of PPO, in the same forms or with a column `prompt` alone; by default those of --data")
    add("--eval-data", nargs="*", metavar="NAME=SOURCE", help="named sets whose prompts the policy is tried on")
    add("--output-dir", default="runs/ppo_loop", help="gets round-N/, metrics.jsonl, args.json and checkpoints")
    add("--seed", type=int, default=0, help="of the order of the prompts and of the sampling")
    add("--rounds", type=int, help="of reward model and PPO")
    add("--method", choices=["meta", "baseline"], default="meta", help="of the reward models: with meta step or not")
    add("--rm-from", choices=["sft", "last"], default="sft", help="a round's reward model starts from")
    add("--policy-from", choices=["sft", "last"], default="last", help="a round's policy starts from")
    add("--reference", choices=["sft", "last"], default="sft", help="a round's KL is to the SFT or to the last policy")
    add("--rm-flags", default="", help='more flags of meta_rm.py, in one string: --rm-flags="--ascent normalized"')
    add("--iterations", type=int, help="of a round: roll-outs, then --epochs passes over them")
    add("--epochs", type=int, help="passes over the roll-outs of an iteration")
    add("--minibatches", type=int, default=1, help="optimizer steps in a pass")
    add("--batch-size", type=int, help="prompts in an iteration, over all ranks")
    add("--rollouts", type=int, help="responses to a prompt")
    add("--lr", type=float, help="peak learning rate of the policy's AdamW")
    add("--critic-lr", type=float, help="and of the critic's")
    add("--max-length", type=int, help="most tokens of a prompt with one response; prompts lose their oldest tokens")
    add("--max-new-tokens", type=int, help="most tokens of a response")
    add("--sample-batch", type=int, help="prompts whose responses are sampled together: memory and random numbers")
    add("--micro-tokens", type=int, help="most padded tokens in one forward pass: memory only, not the result")
    add("--eval-every", type=int, help="iterations between evaluations; 0: only at the end of a round")
    add("--eval-prompts", type=int, default=200, help="of each set, one response to each")
    add("--save-every", type=int, help="iterations between checkpoints; 0: none")
    add("--resume", action="store_true", help="go on from the last checkpoint in --output-dir")
    add("--warmup", type=float, default=0.1, help="share of a round in which the rates rise; then 1 / sqrt(iteration)")
    add("--clip", type=float, default=1.0, help="largest norm of a gradient")
    add("--dtype", choices=["float32", "bfloat16"], default="bfloat16" if torch.cuda.is_available() else "float32",
        help="of the computation; weights, scores and losses are float32 always")
    add("--gradient-checkpointing", action="store_true", help="less memory for a third more computation")
    add("--temperature", type=float, help="of the sampling; all log-probabilities are under it")
    add("--kl", type=float, help="beta, the price of a token's log-ratio to the reference; 0: none")
    add("--reward-scaling", choices=["none", "std", "norm"], default="norm",
        help="divide scores by their standard deviation so far; norm: and subtract their mean")
    add("--reward-clip", type=float, help="then clip them to +-this; 0: do not")
    add("--missing-eos-penalty", type=float, default=1.0, help="off the reward of a response that does not end")
    add("--gamma", type=float, default=1.0, help="discount")
    add("--lam", type=float, default=0.95, help="lambda of GAE")
    add("--ratio-clip", type=float, default=0.2, help="of the policy's ratio")
    add("--value-clip", type=float, default=0.2, help="of the critic's change; 0: none")
    add("--whiten", action=argparse.BooleanOptionalAction, default=True, help="advantages to mean 0 and std 1")
    add("--entropy", type=float, default=0.0, help="weight of an entropy bonus")
    add("--target-kl", type=float, default=0.0, help="end an iteration's updates beyond this KL to its start; 0: never")
    add("--plot", action="store_true", help="draw score and gold over KL into --output-dir, with matplotlib")
    args = settle(parser.parse_args(), DEFAULTS, EVAL_DATA, 1)
    least = {"rounds": 1, "iterations": 1, "epochs": 1, "minibatches": 1, "rollouts": 1, "max_new_tokens": 1,
             "sample_batch": 1, "eval_prompts": 1, "kl": 0, "reward_clip": 0, "entropy": 0, "target_kl": 0,
             "value_clip": 0, "missing_eos_penalty": 0}
    for name, low in least.items():
        if not low <= getattr(args, name) < math.inf:
            fail(f"--{name.replace('_', '-')} {getattr(args, name)} is not {low} or more")
    if not (args.temperature > 0 and args.critic_lr > 0 and 0 < args.ratio_clip and args.minibatches <= args.batch_size
            and 0 <= args.gamma <= 1 and 0 <= args.lam <= 1 and args.max_new_tokens < args.max_length):
        fail("--temperature, --critic-lr and --ratio-clip are above 0, --gamma and --lam between 0 and 1, "
             "--minibatches is at most --batch-size, --max-new-tokens below --max-length")
    if args.model.endswith(".json"):
        fail(f"--model {args.model}: PPO starts from a language model, not from a configuration")
    if args.whiten and args.batch_size * args.rollouts < 2:
        fail("--batch-size 1 --rollouts 1 give one response an iteration, which cannot be whitened: --no-whiten")
    if args.rounds > 1 or not args.reward_model:  # now, not when hours later a reward model shall be trained
        given = sys.argv
        try:
            train_reward_model(Path(args.output_dir), args.model, args.model, args, check=True)
        except SystemExit as error:
            fail(f"--rm-flags '{args.rm_flags}': {str(error).removeprefix('error: ')}")
        sys.argv = given
    return args


class Policy(RewardModel):
    """A language model that reads the same batches: log-probabilities of the response tokens, and samples."""

    def states(self, ids, places, **kwargs):
        """The logits at places of any shape, computed there alone: half the tokens are prompts."""
        row, column = places // ids.size(1), places % ids.size(1)
        kept = column.unique()
        return self.model(ids, logits_to_keep=kept, **kwargs).logits[row, torch.searchsorted(kept, column)]

    def forward(self, batch, temperature=1.0, with_features=False, learn_entropy=False):
        """Batch -> log-probability of each response token under the sampling distribution, and the entropy of that,
        without a graph unless it shall be learnt, (B, k, L) each, 0 where there is no token; with_features: None and
        the logits at the last tokens."""
        if with_features:
            return None, self.read(batch, batch.ends[:, 1:])
        before, place, real = response_tokens(batch)
        real = real[: len(batch.index)]
        logits = self.read(batch, before, real)  # (tokens, vocabulary), which is what takes the memory here
        logp = torch.log_softmax(logits / temperature, -1)
        chosen = logp.gather(1, batch.input_ids.flatten()[place[: len(real)][real]][:, None])[:, 0]
        with torch.set_grad_enabled(learn_entropy and torch.is_grad_enabled()):
            entropy = -(logp.exp() * logp).sum(1)
        return tuple(torch.zeros(real.shape, device=x.device).masked_scatter(real, x) for x in (chosen, entropy))

    def generate(self, ids, **kwargs):
        """Sample, as `respond` asks for it."""
        self.eval()  # or gradient checkpointing would take the cache away
        if isinstance(self, FSDPModule):
            self.set_reshard_after_forward(False)  # gather the weights once, not for every token
        tokens = self.model.generate(ids, synced_gpus=self.ranks > 1, **kwargs)
        if isinstance(self, FSDPModule):
            self.set_reshard_after_forward(True)
            for module in (m for m in self.modules() if isinstance(m, FSDPModule)):
                module.reshard()
        self.train()
        return tokens

    @property
    def generation_config(self):
        return self.model.generation_config


def load_policy(name, tokenizer, device, args):
    """A Policy from a folder or hub id, fp32 weights. Exits on anything that is no language model."""
    # DEVIATION: the paper samples with top-p 0.9 and a repetition penalty of 1.1 as well. What is learnt from must have
    # the log-probabilities that it was sampled with, and those of a nucleus are not defined once the policy moves.
    model = load_language_model(name, "--model", torch.float32, tokenizer, args.temperature, args.max_new_tokens)
    policy = prepare(Policy(model, getattr(torch, args.dtype), WORLD), name, device, args)
    register_fsdp_forward_method(policy, "generate")  # does nothing where there is no FSDP
    return policy


def prepare_prompts(source, split, tokenizer, args, most=None):
    """The prompts of the first `most` rows -> Prompts. Of each its BOS and newest tokens are kept, --max-length less
    --max-new-tokens of them, which is counted. Exits naming the row that cannot be read."""
    prompts = load_prompts(source, split, most)
    ids, cut = encode_prompts(prompts, tokenizer, args.max_length - args.max_new_tokens)
    if cut:
        say(f"{source}: {cut:,} prompts cut")
    return Prompts(prompts, ids, source.split(":")[0] == "toy")


def as_rows(prompts, answers, ends_with=None):
    """Prompts and k responses to each, token ids -> a data set as `tokenize` makes it; with an EOS (`ends_with`) where
    a response has none."""
    if ends_with is not None:
        answers = [[y if y[-1] == ends_with else [*y, ends_with] for y in answer] for answer in answers]
    return datasets.Dataset.from_dict({
        "prompt_ids": prompts, "response_ids": answers,
        "length": [len(prompt) + sum(map(len, answer)) for prompt, answer in zip(prompts, answers)]})


@torch.no_grad()
def by_token(model, data, micro_tokens, **kwargs):
    """A value for each response token of all rows, 0 where there is none, (N, k, L) on the device, and whether there is
    one; the same on all ranks."""
    counts = torch.tensor([[len(y) for y in answer] for answer in data["response_ids"][:]], device=model.device)
    real = torch.arange(counts.max(), device=model.device) < counts[..., None]
    output = torch.zeros(real.shape, device=model.device)
    for batch in micro_batches(data, np.arange(len(data)), micro_tokens, model):
        values = model(batch, **kwargs)
        values = values[0] if isinstance(values, tuple) else values
        if len(batch.index):
            output[batch.index, :, : values.size(2)] = values
    return all_sum(output) * real, real


def advantages(rewards, values, real, gamma, lam):
    """Generalised advantage estimation (arXiv 1506.02438): rewards, values and real (..., L) -> (..., L). What comes
    after the last token is worth nothing."""
    result, after, value_after = torch.zeros_like(rewards), 0.0, 0.0
    for t in reversed(range(rewards.size(-1))):
        delta = rewards[..., t] + gamma * value_after - values[..., t]
        after = (delta + gamma * lam * after) * real[..., t]
        value_after = values[..., t] * real[..., t]
        result[..., t] = after
    return result


def policy_loss(logp, old, advantage, clip):
    """For each token, (...) each -> loss, and whether the clip holds it back (PPO, arXiv 1707.06347, Eq. 7)."""
    ratio = torch.exp(logp - old)
    plain, clipped = -advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip)
    return torch.maximum(plain, clipped), clipped > plain


def value_loss(values, old, returns, clip):
    """For each token, (...) each -> loss, and whether the clip holds it back. clip 0: none."""
    plain = (values - returns) ** 2
    clipped = (old + (values - old).clamp(-clip, clip) - returns) ** 2 if clip else plain
    return torch.maximum(plain, clipped) / 2, clipped > plain


def token_rewards(scores, logp, reference, real, kl):
    """Scores (N, k) at the last tokens, and the price of every token: log-probabilities (N, k, L) -> (N, k, L)."""
    rewards = -kl * (logp - reference)
    return rewards.scatter_add(2, real.sum(2, keepdim=True) - 1, scores[..., None])


class Moments(nn.Module):
    """Count, mean and sum of squared deviations of all scores so far; kept in the checkpoints."""

    def __init__(self):
        super().__init__()
        self.register_buffer("sums", torch.zeros(3, dtype=torch.float64))

    def rescale(self, scores, scaling, clip):
        """Take scores (...) in, -> them rescaled as --reward-scaling and --reward-clip say, and the share clipped."""
        n, mean, squares = self.sums.tolist()
        new, total = scores.double(), n + scores.numel()
        shift = new.mean().item() - mean
        squares += ((new - new.mean()) ** 2).sum().item() + shift**2 * n * scores.numel() / total
        mean += shift * scores.numel() / total
        self.sums.copy_(torch.tensor([total, mean, squares], dtype=torch.float64))
        std = math.sqrt(squares / max(1, total - 1)) or 1.0
        if scaling != "none":
            scores = (scores - (mean if scaling == "norm" else 0)) / std
        return (scores.clamp(-clip, clip), (scores.abs() > clip).double().mean().item()) if clip else (scores, 0.0)


class Prompts(NamedTuple):
    """N prompts, as texts or lists of messages and as token ids; whether they are the toy world's: gold is known."""
    texts: list
    ids: list
    toy: bool


class Judged(NamedTuple):
    """k responses to each of N prompts, and what is known of them."""
    rows: datasets.Dataset   # prompt_ids, response_ids, length
    texts: list              # (N, k) the responses
    scores: torch.Tensor     # (N, k) of the reward model
    gold: torch.Tensor       # (N, k) of the toy world; NaN elsewhere
    ended: torch.Tensor      # (N, k) with an EOS
    logp: torch.Tensor       # (N, k, L) of each token under the policy
    reference: torch.Tensor  # (N, k, L) and under the reference, both at --temperature
    real: torch.Tensor       # (N, k, L) whether there is a token

    def summary(self):
        """Means over the responses: KL to the reference in nats a response; perplexity of a token under the latter;
        spread, the standard deviation of the scores of a prompt; agreement, in how many pairs of responses to a prompt
        that differ in gold the score prefers the better."""
        metrics = {"score": self.scores.mean(), "kl": (self.logp - self.reference).sum(-1).mean(),
                   "perplexity": (-self.reference.sum() / self.real.sum()).exp(), "ended": self.ended.float().mean(),
                   "length": self.real.sum(-1).float().mean()}
        if several := self.scores.size(1) > 1:
            metrics["spread"] = self.scores.std(1).mean()
        if not self.gold.isnan().any():
            metrics["gold"] = self.gold.mean()
            better = self.gold[:, :, None] > self.gold[:, None]
            if several and better.any():
                metrics["agreement"] = (self.scores[:, :, None] > self.scores[:, None])[better].float().mean()
        return {name: value.item() for name, value in metrics.items()}


def judge(prompts, answers, models, tokenizer, args, device):
    """N prompts and `respond`'s answers to them -> Judged."""
    eos, said = tokenizer.eos_token_id, [tokenizer.batch_decode(answer, skip_special_tokens=True) for answer in answers]
    # The reward model learnt from responses that end; one that does not is shown to it as if it did.
    rows, shown = as_rows(prompts.ids, answers), as_rows(prompts.ids, answers, eos)
    if models["reader"]:  # and if its tokens are not the policy's, it is shown the text
        shown = as_rows(*zip(*(
            encode_answers(prompt, as_answers(prompt, answer, tokenizer), models["reader"], args.max_length)[:2]
            for prompt, answer in zip(prompts.texts, answers))))
    scores = score(models["reward"], shown, args.micro_tokens).to(device)
    if not scores.isfinite().all():
        fail(f"{(~scores.isfinite()).sum():,} scores of the reward model are not finite: its weights must be broken")
    gold = [[toy_gold(text, y) if prompts.toy else math.nan for y in ys] for text, ys in zip(prompts.texts, said)]
    ended = [[y[-1] == eos for y in answer] for answer in answers]
    (logp, real), (reference, _) = (
        by_token(models[name], rows, args.micro_tokens, temperature=args.temperature)
        for name in ("policy", "reference"))
    return Judged(rows, said, scores, torch.tensor(gold).to(scores), torch.tensor(ended, device=device), logp,
                  reference, real)


def evaluate(models, sets, tokenizer, args, seed, device):
    """One response of the policy to each prompt of each set -> metrics, and the responses as rows for a file."""
    metrics, samples = {}, []
    for name, prompts in sets.items():
        answers = respond(models["policy"], prompts.ids, 1, seed, args.sample_batch, device)
        judged = judge(prompts, answers, models, tokenizer, args, device)
        metrics |= {f"{name}/{key}": value for key, value in judged.summary().items()}
        samples += [{"set": name, "prompt": prompt, "response": text[0], "score": x.item()} | (
            {"gold": gold.item()} if prompts.toy else {})
            for prompt, text, x, gold in zip(prompts.texts, judged.texts, judged.scores, judged.gold)]
    return metrics, samples


METRICS = "policy_loss", "value_loss", "entropy", "approx_kl", "clip_fraction", "value_clip_fraction", "log_ratio"


def write_samples(path, samples):
    """Write rows as JSON lines, on rank 0."""
    if RANK == 0:
        with replaced(path) as tmp:
            tmp.write_text("".join(json.dumps(row) + "\n" for row in samples))


def say_samples(when, metrics, samples):
    """Print means of each set, and its first sample."""
    for name in dict.fromkeys(row["set"] for row in samples):
        row = next(row for row in samples if row["set"] == name)
        means = {key.removeprefix(f"{name}/"): value for key, value in metrics.items() if key.startswith(f"{name}/")}
        say(f"{when}, {name}: " + ", ".join(f"{key} {value:.2f}" for key, value in means.items())
            + f"; for one, {str(row['prompt'])[-60:]!r}: {row['response'][:60]!r}")


def train_reward_model(folder, start, policy, args, check=False):
    """Run meta_rm.py on the comparisons, with samples of `policy` for its meta set, unless it has been run; -> the
    model's folder. check: just see whether it takes its flags."""
    if check or not (folder / "model").exists():
        flags = ["--model", start, "--policy", policy, "--data", args.data, "--eval-data", "--dtype", args.dtype,
                 "--output-dir", folder, "--seed", args.seed, "--max-length", args.max_length, "--max-new-tokens",
                 args.max_new_tokens, "--micro-tokens", args.micro_tokens,
                 *shlex.split(f"{RM_FLAGS[args.model == 'toy']} {args.rm_flags}")]
        flags += ["--eta", 0] * (args.method == "baseline") + ["--gradient-checkpointing"] * args.gradient_checkpointing
        sys.argv = ["meta_rm.py", *map(str, flags), *["--resume"] * (folder / "args.json").exists()]
        path = Path(__file__).with_name("meta_rm.py")
        script = runpy.run_path(str(path), run_name="meta_rm" if check else "__main__")
        if check:
            script["parse_args"]()
    return folder / "model"


def plot(path, records):
    """Score and, in the toy world, gold over the KL to the reference, a colour for each round."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    names = [name for name in ("score", "gold") if f"ppo/{name}" in records[0]]
    figure, axes = plt.subplots(1, len(names), figsize=(6 * len(names), 4), squeeze=False)
    for axis, name in zip(axes[0], names):
        for number, mine in itertools.groupby(records, lambda record: record["round"]):
            points = zip(*((x["ppo/kl"], x[f"ppo/{name}"]) for x in mine))
            axis.plot(*points, "o", markersize=3, label=f"round {number}")
        axis.set(xlabel="KL to the reference, nats a response", ylabel=name)
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    args = parse_args()
    device = setup(args.seed)
    log = Log(args.output_dir, vars(args), args.resume, ("resume", "output_dir", "micro_tokens", "save_every", "plot"))

    # where to begin, and the prompts
    out, sft = Path(args.output_dir), toy_model() if args.model == "toy" else args.model
    if args.reward_model:
        reward_config(args.reward_model, "--reward-model")
    done = sum((out / f"round-{i + 1}/policy").exists() for i in range(args.rounds)) * args.resume  # rounds
    begin = max(done * args.iterations, last_checkpoint(out)) if args.resume else 0
    tokenizer = load_tokenizer(sft, None)
    prompts = prepare_prompts(args.prompts or args.data, "train", tokenizer, args)
    sets = {key: prepare_prompts(source, "test", tokenizer, args, args.eval_prompts)
            for key, source in (pair.split("=", 1) for pair in args.eval_data)}
    log.start(begin, args.rounds * args.iterations, *([len(x) for x in part.ids] for part in (prompts, *sets.values())))

    for number in range(done, args.rounds):
        # the reward model, policy, reference and critic of this round
        here, last = out / f"round-{number + 1}", out / f"round-{number}"
        latest = last / "policy" if number else sft
        # UNSTATED: where reward model, policy and reference start; so all three are flags.
        same = args.method == "baseline" and args.rm_from == "sft"  # data, seed and start, so the same reward model
        judges = [args.reward_model or out / "round-1/rm/model", *(out / f"round-{i + 1}/rm/model" for i in
                                                                   range(1, args.rounds))]
        judged_by = judges[0 if same else number]
        if judged_by != args.reward_model:
            start = judges[number - 1] if number and args.rm_from == "last" else sft
            train_reward_model(judged_by.parent, start, latest, args)
        reader, critic_from = load_tokenizer(judged_by, None), judged_by
        if foreign := reader.get_vocab() != tokenizer.get_vocab():
            # UNSTATED: a critic reads the policy's tokens, so it cannot start from a model that has others.
            critic_from = sft
            say(f"{judged_by} has another tokenizer than {sft}: it reads text, and the critic starts from the latter")
        policy = load_policy(latest if args.policy_from == "last" else sft, tokenizer, device, args)
        critic = load_reward_model(
            critic_from, tokenizer, device, args, flag="--model" if foreign else "--reward-model")
        reward_model = load_reward_model(judged_by, reader, device, args, flag="--reward-model").requires_grad_(False)
        reference = load_policy(latest if args.reference == "last" else sft, tokenizer, device, args)
        models = {"policy": policy, "reference": reference.requires_grad_(False), "reward": reward_model,
                  "reader": reader if foreign else None}
        parts = nn.ModuleDict({"policy": policy, "critic": critic, "moments": (moments := Moments())})
        optimizers = [torch.optim.AdamW(part.parameters(), lr=lr, betas=(0.9, 0.95), eps=eps, weight_decay=0.0,
                                        fused=device.type == "cuda")
                      for part, lr, eps in ((policy, args.lr, 1e-6), (critic, args.critic_lr, 1e-8))]
        first = number * args.iterations
        start = load_checkpoint(out, parts, optimizers) if begin > first else first
        before = {}
        if start == first:
            before, samples = evaluate(models, sets, tokenizer, args, (args.seed, first, 2), device)
            write_samples(here / "before.jsonl", samples)
            say_samples(f"round {number + 1}, before", before, samples)

        for step in range(start, first + args.iterations):
            began, i = time.time(), step - first
            # UNSTATED: the schedule. This is that of the authors' released PPO.
            warmup = max(1, round(args.iterations * args.warmup))
            for optimizer, lr in zip(optimizers, (args.lr, args.critic_lr)):
                optimizer.param_groups[0]["lr"] = lr * min((i + 1) / warmup, math.sqrt(warmup / (i + 1)))

            # roll out, and what the roll-outs are worth, token by token
            picked = step_rows(len(prompts.ids), args.batch_size, args.seed, step)
            mine = Prompts([prompts.texts[j] for j in picked], [prompts.ids[j] for j in picked], prompts.toy)
            answers = respond(policy, mine.ids, args.rollouts, (args.seed, step, 1), args.sample_batch, device)
            rolled = time.time() - began
            judged = judge(mine, answers, models, tokenizer, args, device)
            real, old = judged.real, {"logp": judged.logp}
            old["value"], _ = by_token(critic, judged.rows, args.micro_tokens, every=True)
            scores, clipped = moments.rescale(judged.scores, args.reward_scaling, args.reward_clip)
            # UNSTATED: what a response is worth that does not end.
            scores = scores - args.missing_eos_penalty * ~judged.ended
            rewards = token_rewards(scores, judged.logp, judged.reference, real, args.kl)
            old["advantage"] = advantages(rewards, old["value"], real, args.gamma, args.lam)
            old["return"] = returns = old["advantage"] + old["value"]
            if args.whiten:
                all_of_them = old["advantage"][real]
                old["advantage"] = (old["advantage"] - all_of_them.mean()) / (all_of_them.std() + 1e-8)
            judged_at = time.time() - began

            # learn from them
            orders = [np.random.default_rng((args.seed, step, i)).permutation(len(picked)) for i in range(args.epochs)]
            sums, tokens = torch.zeros(len(METRICS)).to(old["logp"]), 0
            for index in (part for order in orders for part in np.array_split(order, args.minibatches)):
                count, now = real[index].sum().item(), torch.zeros_like(sums)
                for batch in micro_batches(judged.rows, index, args.micro_tokens, policy):
                    logp, entropy = policy(batch, args.temperature, learn_entropy=args.entropy > 0)  # (B, k, L)
                    mask = real[batch.index, :, : logp.size(2)]
                    was = {key: x[batch.index, :, : logp.size(2)][mask] for key, x in old.items()}  # (tokens,)
                    logp, entropy = logp[mask], entropy[mask]
                    loss, held = policy_loss(logp, was["logp"], was["advantage"], args.ratio_clip)
                    ((loss - args.entropy * entropy).sum() / count).backward()
                    value = critic(batch, every=True)[mask]
                    miss, value_held = value_loss(value, was["value"], was["return"], args.value_clip)
                    (miss.sum() / count).backward()
                    change = (logp - was["logp"]).detach()
                    now += torch.stack([x.detach().sum() for x in (
                        loss, miss, entropy, change.exp() - 1 - change, held, value_held, change.abs())])
                means = dict(zip(METRICS, (all_sum(now) / count).tolist()))
                if not tokens and means["log_ratio"] > (0.1 if args.dtype == "bfloat16" else 1e-3):
                    fail(f"step {step + 1}: before any update the log-probabilities differ from those of the "
                         f"roll-outs, by {means['log_ratio']:.4f} a token; they should be equal")
                norms = [clip_gradients(model, args.clip) for model in (policy, critic)]
                if not math.isfinite(means["policy_loss"] + means["value_loss"] + sum(norms)):
                    fail(f"step {step + 1}: a loss or its gradient is not finite; lower --lr or --critic-lr (earlier "
                         f"checkpoints in {out} are intact)")
                sums, tokens = sums + now, tokens + count
                stopped = 0 < args.target_kl < means["approx_kl"]
                for optimizer in optimizers if not stopped else ():
                    optimizer.step()
                for optimizer in optimizers:
                    optimizer.zero_grad()
                if stopped:
                    break

            unexplained = (returns - old["value"])[real].var() / returns[real].var()
            metrics = {"round": number + 1} | {f"ppo/{key}": value for key, value in {
                **judged.summary(), **dict(zip(METRICS, (sums / tokens).tolist())),
                "return": returns[real].mean().item(), "explained_variance": 1 - unexplained.item(),
                "reward_clipped": clipped, "stopped": float(stopped), "grad_norm": norms[0],
                "critic_grad_norm": norms[1], "lr": optimizers[0].param_groups[0]["lr"],
                "rollout_seconds": rolled, "scoring_seconds": judged_at - rolled,
                "update_seconds": time.time() - began - judged_at}.items()}
            metrics |= {f"before/{key}": value for key, value in before.items()}
            before, ends = {}, step + 1 == first + args.iterations
            if ends or args.eval_every and (i + 1) % args.eval_every == 0:
                after, samples = evaluate(models, sets, tokenizer, args, (args.seed, step, 3), device)
                metrics |= {f"eval/{key}": value for key, value in after.items()}
                metrics["samples"] = samples[:: max(1, len(samples) // 5)]
            log(step + 1, metrics, ("ppo/score", "ppo/gold", "ppo/kl"))
            if ends:
                write_samples(here / "after.jsonl", samples)
                say_samples(f"round {number + 1}, after", after, samples)
                save_model(here / "policy", policy, tokenizer)  # last: what says that the round is done
            if args.save_every and (i + 1) % args.save_every == 0 and not ends:
                save_checkpoint(out, parts, optimizers, step + 1)
        del policy, critic, reward_model, reference, models, parts, optimizers, optimizer
        del logp, entropy, loss, value, miss  # whose graphs hold the weights as well
        barrier()

    if args.plot and RANK == 0:
        plot(out / "kl.png", [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()])
