"""Draw the figures of the documents that --plot of eval.py does not draw: from docs/toy, from the
results in docs/claims/results and from files that runs write. A figure without files is skipped.

    strength.png                     docs/toy/voted.jsonl
    dialogues.png                    docs/claims/results/dialogues.json, by docs/claims/real.py
    deciles.png                      docs/claims/results/denoising.json, by docs/claims/run.py
    features.png, differences.png    the runs of python docs/claims/run.py generalisation
    ppo.png                          the runs of python docs/claims/run.py ppo
"""

import argparse
import sys
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import common  # noqa: E402
from measure import read_lines  # noqa: E402
from tables import read_results  # noqa: E402

SEEDS = sorted(Path("runs/claims").glob("[0-9]*"))


def score_pairs(seed, run, split):
    """-> rewards (N, 2) and features (N, 2, hidden) of a seed's comparisons by a run's model."""
    args = argparse.Namespace(
        seed=0, max_length=64, dtype="float32", gradient_checkpointing=False, offload=False)
    source = str(seed / f"toy-0.1/{split}.jsonl")
    name = str(seed / run / "model")
    device = common.setup()
    tokenizer = common.load_tokenizer(name)
    data = common.tokenize(common.load_rows(source), source, tokenizer, args.max_length)
    model = common.load_reward_model(name, tokenizer, device, args, "--reward-models")
    rewards, features = common.compute_rewards(model, data, 8192, with_features=True)
    return rewards.double().numpy(), features.double().numpy()


def draw_strength(axes):
    """Figs. 1 to 3: how many labels are right at each strength, and how far the voters disagree."""
    rows = read_lines(ROOT / "docs/toy/voted.jsonl")
    rows.sort(key=lambda row: row["mean preference difference"])
    strength = np.array([row["mean preference difference"] for row in rows])
    gold = np.array([row["gold"] for row in rows])
    axes[0].hist(
        [strength[gold == label] for label in (1, -1, 0)], 50, stacked=True,
        color=["C0", "C7", "C3"], label=["right", "no true preference", "wrong"])
    axes[0].axvline(0, color="black", linewidth=0.8)
    axes[0].set(
        title="Wrong labels have low strength", xlabel="strength: mean margin of ten voters",
        ylabel="pairs", ylim=(0, 420))
    axes[0].legend(title="label", loc="upper right")

    center = np.arange(2.5, 100, 5)
    labels = [part[part >= 0] for part in np.array_split(gold, 20)]
    axes[1].bar(center, [100 * np.mean(part) for part in labels], 4.4)
    axes[1].axhline(50, color="black", linewidth=0.8)
    axes[1].set(
        title="The weakest labels are mostly wrong", xlabel="pairs by strength, %",
        ylabel="right labels, %")
    std = np.array_split([row["std preference difference"] for row in rows], 20)
    axes[2].plot(center, [np.mean(part) for part in std], "o-")
    axes[2].set(
        title="How much the votes on a pair differ", xlabel="pairs by strength, %",
        ylabel="std of the margins")


def draw_dialogues(axes):
    """Figs. 2 and 3 by a language model on real text: where the flipped labels are."""
    vote = read_results("dialogues")["runs"]["vote"]
    tenths = [vote[f"tenth {i}, %"] for i in range(1, 11)]
    center = np.arange(5, 100, 10)
    means = [100 * tenth["mean"] for tenth in tenths]
    halves = [100 * tenth["half"] for tenth in tenths]
    axes[0].bar(center, means, 8.8, yerr=halves, color="C3", capsize=3)
    share = 100 * vote["wrong labels, %"]["mean"]
    axes[0].axhline(share, color="black", linewidth=0.8, linestyle="--")
    axes[0].text(99, share + 1.5, f"all pairs: {share:.0f} %", ha="right")
    axes[0].set(
        title="Flipped labels have low strength", ylabel="labels that were flipped, %",
        xlabel="tenth of the pairs by strength, weakest first, %", ylim=(0, 105))


def draw_deciles(axes):
    """Figs. 4 and 5: what a tenth of the data teaches."""
    runs = read_results("denoising")["runs"]
    for end, label in {"": "labels as they are", "-flipped": "labels flipped"}.items():
        points = []
        for low in range(0, 100, 10):
            run = f"tenth-{low}{end}"
            if run in runs:
                accuracy = runs[run]["annotators' labels, %"]
                points.append((low + 5, 100 * accuracy["mean"], 100 * accuracy["half"]))
        x, y, half = np.transpose(points)
        axes[0].errorbar(x, y, half, fmt="o", capsize=3, label=label)
    axes[0].axhline(50, color="black", linewidth=0.8)
    axes[0].set(
        title="Reward models trained on a tenth", xlabel="tenth of the pairs, weakest first, %",
        ylabel="accuracy on annotators' labels, %")
    axes[0].legend()


def draw_features(axes):
    """Fig. 11 as a projection: features of `shifted` on the line through both sides' means."""
    titles = {"baseline": "Baseline", "simcse": "SimCSE"}
    for axis, (run, title) in zip(axes, titles.items()):
        _, features = score_pairs(SEEDS[0], run, "shifted")
        line = (features[:, 0] - features[:, 1]).mean(0)
        line /= np.linalg.norm(line)
        positions = (features - features.mean((0, 1))) @ line  # (N, 2)
        axis.hist(
            positions, 50, histtype="stepfilled", alpha=0.6,
            label=["chosen", "rejected"])
        axis.set(
            title=f"{title}: features of two good responses", xlabel="from rejected to chosen",
            ylabel="responses")
        axis.legend()


def draw_differences(axes):
    """Fig. 16: how far apart the rewards of two nearly perfect responses to a prompt are."""
    labels = {"baseline": "baseline", "meta-normalized": "MetaRM",
              "meta-alternate": "MetaRM, weights not restored"}
    for run, label in labels.items():
        rewards = np.concatenate([score_pairs(seed, run, "pairs")[0] for seed in SEEDS])
        sizes = abs(rewards[:, 0] - rewards[:, 1])
        bins = np.linspace(0, 2.5, 51)
        axes[0].hist(
            sizes, bins, density=True, histtype="step", linewidth=1.5,
            label=f"{label} (mean {sizes.mean():.2f})")
    axes[0].set(
        title="Rewards of two nearly perfect responses", xlabel="their difference",
        ylabel="density")
    axes[0].legend()


def draw_ppo(axes):
    """Over-optimisation: the reward model's score and the true reward since the first iteration."""
    if not SEEDS:
        raise ValueError("no seed in runs/claims")
    titles = {"free-baseline": "Baseline", "free-simcse": "SimCSE"}
    names = {"score": "reward model's score", "gold": "true reward"}
    for axis, (run, title) in zip(axes, titles.items()):
        for color, (key, label) in enumerate(names.items()):
            for i, seed in enumerate(SEEDS):
                records = read_lines(seed / run / "metrics.jsonl")[1:]
                kl = [record["ppo/kl"] for record in records]
                change = [record[f"ppo/{key}"] - records[0][f"ppo/{key}"] for record in records]
                axis.plot(
                    kl, change, ".", color=f"C{color}", markersize=3,
                    label="" if i else label)
        axis.set(
            title=f"PPO without KL penalty: {title}", ylabel="change since the start",
            xlabel="KL to the SFT model, nats per response", xlim=(0, 42), ylim=(-10, 4))
        axis.legend(markerscale=3)


FIGURES = {  # number of panels
    draw_strength: 3, draw_dialogues: 1, draw_deciles: 1, draw_features: 2, draw_differences: 1,
    draw_ppo: 2}

if __name__ == "__main__":
    for draw, columns in FIGURES.items():
        path = ROOT / f"docs/{draw.__name__.removeprefix('draw_')}.png"
        size = (1.5 + 3.7 * columns, 3.6)
        figure, axes = plt.subplots(
            1, columns, figsize=size, layout="constrained", squeeze=False)
        try:
            draw(axes[0])
            figure.savefig(path, dpi=90)
        except (OSError, SystemExit, LookupError, ValueError) as error:
            print(f"no {path.name}: {error!r}"[:200])
