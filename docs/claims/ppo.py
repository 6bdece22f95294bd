"""PPO against denoised and contrastive reward models (sections 2.5 and 3.1), and MetaRM's rounds (section 3.2)."""

import numpy as np

import denoising
import generalisation
from run import TRAIN, make, read_lines

FLIPS = [0.1]  # fraction of the annotators' labels that are flipped
PPO = ("ppo_loop.py --model {model} --data {dir}/toy-0.1/train.jsonl --gold docs/toy/make.py --seed {seed} "
       "--eval-data id={dir}/toy-0.1/id.jsonl ood={dir}/toy-0.1/ood.jsonl --epochs 2 --batch-size 16 --lr 1e-3 "
       "--critic-lr 1e-3 --max-length 64 --max-new-tokens 12 --rollout-batch-size 64 --temperature 1 --reward-clip 0 "
       "--eval-every 0 --save-every 0")
FREE = "baseline", "simcse", "swav", "baseline-1", "flip-1", "S1-1", "S3-1"  # reward models; -1: after one epoch
HELD = "baseline", "simcse", "baseline-1", "S3-1"  # those also used with a KL penalty

CELLS = {"vote-0.1": denoising.CELLS["vote-0.1"]}
for name in FREE:
    CELLS[name] = {**denoising.CELLS, **generalisation.CELLS}[name]
for name in FREE:
    CELLS[f"free-{name}"] = f"{PPO} --iterations 200 --kl-coef 0 --reward-model {{dir}}/{name}/model"
for name in HELD:
    CELLS[f"held-{name}"] = f"{PPO} --iterations 200 --kl-coef 0.2 --reward-model {{dir}}/{name}/model"
CELLS["once"] = f"{PPO} --iterations 300 --kl-coef 0.2 --reward-model {{dir}}/baseline/model"
for method, eta in (("meta", 0.01), ("plain", 0)):  # three rounds, with the meta step and without
    policy, samples = "{model}", "{dir}/toy-0.1/meta.jsonl"
    for i in (1, 2, 3):
        CELLS[f"rm-{method}-{i}"] = f"meta_rm.py {TRAIN} --ascent normalized --eta {eta} --meta-data {samples}"
        CELLS[f"{method}-{i}"] = (
            f"{PPO} --model {policy} --reference {{model}} --reward-model {{dir}}/rm-{method}-{i}/model --kl-coef 0.2 "
            f"--iterations 100 --seed {i}{{seed}}")
        policy, samples = f"{{dir}}/{method}-{i}/policy", f"{{dir}}/{method}-{i}/samples.jsonl"

ID, OOD, KL, GOLD = "eval/id/gold", "eval/ood/gold", "ppo/kl", "KL 6 to 8/ppo/gold"
TABLES = [("no KL penalty", [f"free-{name}" for name in FREE],
           ["KL 0 to 1/ppo/gold", GOLD, "KL 0 to 1/ppo/score_std", "KL 6 to 8/ppo/score_std"]),
          ("last iteration", [x for x in CELLS if CELLS[x].startswith("ppo")], [KL, ID, OOD, "ppo/perplexity"])]
COMPARISONS = [
    ("MetaRM Fig. 1", "free-baseline", "free-baseline", "KL 0 to 1/ppo/score_std", "KL 6 to 8/ppo/score_std"),
    ("2210.10760", "free-baseline", "free-baseline", f"first/{ID}", ID),  # gold falls without a KL penalty
    ("section 2.5", "held-baseline", "held-baseline", ID, f"first/{ID}"),  # and rises with it
    *(("Fig. 9", f"free-{name}", "free-baseline-1", GOLD) for name in ("flip-1", "S1-1", "S3-1")),
    *(("Fig. 12", f"free-{name}", "free-baseline", key) for name in ("simcse", "swav") for key in (ID, GOLD)),
    *(("Fig. 12", "free-baseline", f"free-{name}", KL) for name in ("simcse", "swav")),
    *(("Fig. 13", "held-simcse", "held-baseline", key) for key in (ID, OOD)),
    ("Table 2", "meta-3", "meta-1", ID), ("Table 3", "meta-3", "once", ID), ("Table 3", "meta-3", "plain-3", ID),
    ("Fig. 15", "meta-3", "plain-3", OOD)]
DUELS = [*(("Fig. 10", f"free-{name}", "free-baseline-1") for name in ("flip-1", "S1-1", "S3-1")),
         ("Fig. 10", "held-S3-1", "held-baseline-1"), ("Fig. 12", "free-simcse", "free-baseline"),
         ("Fig. 12", "free-swav", "free-baseline"), ("Fig. 13", "held-simcse", "held-baseline"),
         ("Table 3", "meta-3", "once"), ("Table 3", "meta-3", "plain-3")]


def more_claims(folders):
    """Win - lose by gold of the samples, whose prompts are from the training set; `id` has the same 32."""
    def win_rate(a, b):
        rows = zip(read_lines(a / "samples.jsonl"), read_lines(b / "samples.jsonl"))
        return np.mean([np.sign(make.gold(x["prompt"], first) - make.gold(y["prompt"], second))
                        for x, y in rows for first, second in zip(x["responses"], y["responses"])] or [np.nan])
    return [(figure, f"win - lose: {a} against {b}", np.array([win_rate(x / a, x / b) for x in folders]), 1)
            for figure, a, b in DUELS]
