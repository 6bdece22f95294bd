"""Draw the README's figures into docs/ from the files that runs write. A figure whose files are missing is skipped.

    strength.png                     docs/toy/voted.jsonl
    deciles.png                      python docs/claims/run.py denoising
    features.png, differences.png    python docs/claims/run.py generalisation
    ppo.png                          python docs/claims/run.py ppo
    best_of_n.png                    the runs of baseline_rm.py, contrastive_rm.py, meta_rm.py and

        python contrastive_rm.py --method swav --output-dir runs/swav
        python ppo_loop.py --iterations 0 --num-samples 300 --k 64 --output-dir runs/samples
        python eval.py --reward-models runs/{baseline_rm,contrastive_rm,meta_rm,swav}/model --gold docs/toy/make.py \\
            --eval-data n=runs/samples/samples.jsonl
"""

import argparse
import json
import sys
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs/claims")]
import common  # noqa: E402
from run import interval, read_lines, read_metric  # noqa: E402

SEEDS = [folder for folder in sorted(Path("runs/claims").glob("*")) if folder.name.isdigit()]


def score_pairs(seed, cell, split):
    """-> rewards (N, 2) and features (N, 2, hidden) of the comparisons of a seed under the reward model of a cell."""
    args = argparse.Namespace(seed=0, max_length=64, dtype="float32", gradient_checkpointing=False, offload=False)
    source, name = str(seed / f"toy-0.1/{split}.jsonl"), str(seed / cell / "model")
    device, tokenizer = common.setup(), common.load_tokenizer(name)
    data = common.tokenize(common.load_rows(source), source, tokenizer, args.max_length)
    model = common.load_reward_model(name, tokenizer, device, args, "--reward-models")
    return [x.double().numpy() for x in common.compute_rewards(model, data, 8192, with_features=True)]


def draw_strength(axes):
    """Figs. 1 to 3: how many labels are right at each strength, and how far the voters disagree."""
    rows = read_lines(ROOT / "docs/toy/voted.jsonl")
    columns = "mean preference difference", "std preference difference", "gold"
    strength, std, gold = np.array(sorted([row[column] for column in columns] for row in rows)).T
    axes[0].hist([strength[gold == x] for x in (1, -1, 0)], 50, stacked=True, color=["C0", "C7", "C3"],
                 label=["right", "no true preference", "wrong"])
    axes[0].axvline(0, color="black", linewidth=0.8)
    axes[0].set(title="Wrong labels have low strength", xlabel="strength: mean margin of ten voters", ylabel="pairs",
                ylim=(0, 420))
    axes[0].legend(title="label", loc="upper right")
    center, right = np.arange(2.5, 100, 5), [100 * part[part >= 0].mean() for part in np.array_split(gold, 20)]
    axes[1].bar(center, right, 4.4)
    axes[1].axhline(50, color="black", linewidth=0.8)
    axes[1].set(title="The weakest labels are mostly wrong", xlabel="pairs by strength, %", ylabel="right labels, %")
    axes[2].plot(center, [group.mean() for group in np.array_split(std, 20)], "o-")
    axes[2].set(title="Voters disagree most at the ends", xlabel="pairs by strength, %", ylabel="std of the margins")


def draw_deciles(axes):
    """Figs. 4 and 5: what a tenth of the data teaches."""
    cells = ("decile-{}", range(0, 100, 10), "labels as they are"), ("decile-{}-flipped", (0, 10), "labels flipped")
    for name, lows, label in cells:
        points = [interval(100 * read_metric(SEEDS, name.format(low), "eval/noisy/accuracy")) for low in lows]
        if np.isnan(points).any():
            raise ValueError("a run is missing")
        axes[0].errorbar(np.array(lows) + 5, *np.transpose(points)[:2], fmt="o", capsize=3, label=label)
    axes[0].axhline(50, color="black", linewidth=0.8)
    axes[0].set(title="Reward models trained on a tenth", xlabel="tenth of the pairs, weakest first, %",
                ylabel="accuracy on annotators' labels, %")
    axes[0].legend()


def draw_features(axes):
    """Fig. 11 as a projection: features of the responses of `shifted` on the line through the means of both sides."""
    for axis, cell, title in zip(axes, ("baseline", "simcse"), ("Baseline", "SimCSE")):
        features = score_pairs(SEEDS[0], cell, "shifted")[1]
        line = (features[:, 0] - features[:, 1]).mean(0)
        positions = (features - features.mean((0, 1))) @ line / np.linalg.norm(line)  # (N, 2)
        axis.hist(positions, 50, histtype="stepfilled", alpha=0.6, label=["chosen", "rejected"])
        axis.set(title=f"{title}: features of two good responses", xlabel="from rejected to chosen", ylabel="responses")
        axis.legend()


def draw_differences(axes):
    """Fig. 16: how far apart the rewards of two nearly perfect responses to a prompt are."""
    cells = ("baseline", "baseline"), ("meta-normalized", "MetaRM"), ("meta-alternate", "MetaRM, weights not restored")
    for cell, label in cells:
        rewards = np.concatenate([score_pairs(seed, cell, "pairs")[0] for seed in SEEDS])
        sizes = abs(rewards[:, 0] - rewards[:, 1])
        axes[0].hist(sizes, np.linspace(0, 2.5, 51), density=True, histtype="step", linewidth=1.5,
                     label=f"{label} (mean {sizes.mean():.2f})")
    axes[0].set(title="Rewards of two nearly perfect responses", xlabel="their difference", ylabel="density")
    axes[0].legend()


def draw_ppo(axes):
    """Over-optimisation: what the reward model says and what the responses are worth, since the first iteration."""
    if not SEEDS:
        raise ValueError("no seed in runs/claims")
    for axis, cell, title in zip(axes, ("free-baseline", "free-simcse"), ("Baseline", "SimCSE")):
        for key, label, color in (("score", "reward model's score", "C0"), ("gold", "true reward", "C1")):
            for i, seed in enumerate(SEEDS):
                _, *records = map(json.loads, (seed / cell / "metrics.jsonl").read_text().splitlines())
                points = [[x["ppo/kl"], x[f"ppo/{key}"] - records[0][f"ppo/{key}"]] for x in records]
                axis.plot(*np.transpose(points), ".", color=color, markersize=3, label="" if i else label)
        axis.set(title=f"PPO without KL penalty: {title}", xlabel="KL to the SFT model, nats per response",
                 ylabel="change since the start", xlim=(0, 25), ylim=(-6, 4))
        axis.legend(markerscale=3)


def draw_best_of_n(axes):
    """The true reward of the best of n responses by reward."""
    records = [x for x in json.loads(Path("runs/eval/eval.json").read_text()) if x["table"] == "best of n"]
    if not records:
        raise ValueError("runs/eval/eval.json has no best of n")
    for model in dict.fromkeys(record["model"] for record in records):
        points = [[x["n"], x["score"], x["score_half"]] for x in records if x["model"] == model]
        axes[0].errorbar(*np.transpose(points), fmt=".-", capsize=2, label=model)
    axes[0].set_xscale("log", base=2)
    axes[0].xaxis.set_major_formatter("{x:.0f}")
    axes[0].set(title="Best of n responses by each reward model", xlabel="n", ylabel="true reward of the best")
    axes[0].legend()


if __name__ == "__main__":
    for draw, columns in ((draw_strength, 3), (draw_deciles, 1), (draw_features, 2), (draw_differences, 1),
                          (draw_ppo, 2), (draw_best_of_n, 1)):
        path = ROOT / f"docs/{draw.__name__.removeprefix('draw_')}.png"
        figure, axes = plt.subplots(1, columns, figsize=(1.5 + 3.7 * columns, 3.6), layout="constrained", squeeze=False)
        try:
            draw(axes[0])
            figure.savefig(path, dpi=90)
        except (OSError, SystemExit, IndexError, ValueError) as error:
            print(f"no {path.name}: {error!r}"[:200])
