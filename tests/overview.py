"""The README's first figure, from what its block of commands leaves in runs/.

    python tests/overview.py
"""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


if __name__ == "__main__":
    figure, (vote, hack, best) = plt.subplots(1, 3, figsize=(13, 3.9), layout="constrained")

    edge, _, _, agreement = zip(*json.loads(Path("runs/vote_strength/report.json").read_text())["train"]["groups"])
    vote.bar([100 * x - 2.5 for x in edge], [100 * x for x in agreement], 4.4, color="C0")
    vote.axhline(50, color="black", linewidth=0.8)
    vote.set(title="Voting finds the wrong labels", xlabel="rows by strength, weakest first, %",
             ylabel="labels that are right, %")

    for name, color in (("score", "C1"), ("gold", "C2")):
        records = lines("runs/hacking/metrics.jsonl")
        hack.plot([x["ppo/kl"] for x in records], [x[f"ppo/{name}"] for x in records], ".", color=color,
                  label={"score": "what the reward model says", "gold": "what it is worth"}[name])
    hack.set(title="PPO without KL penalty", xlabel="KL to the SFT model, nats a response", ylabel="reward")
    hack.legend()

    records = [x for x in json.loads(Path("runs/eval/eval.json").read_text()) if x["table"] == "best of n"]
    for name in ("oracle", "baseline_rm", "denoise_rm", "meta_rm"):
        mine = [x for x in records if x["model"] == name]
        best.errorbar([x["n"] for x in mine], [x["score"] for x in mine], [x["score_half"] for x in mine], fmt="o-",
                      markersize=3, capsize=2, label=name)
    best.set_xscale("log", base=2)
    best.set(title="Best of n", xlabel="n responses, of which the reward model picks one", ylabel="what it is worth")
    best.legend()
    figure.savefig(ROOT / "docs/overview.png", dpi=100)
