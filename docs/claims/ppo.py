"""PPO against denoised and contrastive reward models, and MetaRM's rounds (sections 2.5 and 3)."""

import denoising
import generalisation
from measure import Claim
from world import MODEL, TOY, TRAIN

FLIPS = [0.1]  # fraction of the annotators' labels that are flipped
PPO = (
    f"ppo_loop.py --model {MODEL} --data {TOY}/train.jsonl --gold docs/toy/make.py --seed $seed "
    f"--eval-data id={TOY}/id.jsonl ood={TOY}/ood.jsonl --epochs 2 --batch-size 16 --lr 1e-3 "
    "--critic-lr 1e-3 --max-length 64 --max-new-tokens 12 --rollout-batch-size 64 --temperature 1 "
    "--reward-clip 0 --eval-every 0 --save-every 0")
ANSWERS = f"{PPO} --iterations 0 --data {TOY}/id.jsonl --k 1"
FREE = ["baseline", "simcse", "swav", "baseline-1", "flip-1", "S1-1", "S3-1"]  # -1: after one epoch
HELD = ["baseline", "simcse", "baseline-1", "S3-1"]  # those also used with a KL penalty
DUELS = {  # a policy: those that are compared with it by gold
    "free-baseline-1": ["free-flip-1", "free-S1-1", "free-S3-1"], "held-baseline-1": ["held-S3-1"],
    "free-baseline": ["free-simcse", "free-swav"], "held-baseline": ["held-simcse"],
    "once": ["meta-3"], "plain-3": ["meta-3"]}
FIGURES = {
    "free-baseline-1": "Fig. 10", "held-baseline-1": "ours", "free-baseline": "Fig. 13",
    "held-baseline": "ours", "once": "Table 3", "plain-3": "Table 3"}

RUNS = {"vote-0.1": denoising.RUNS["vote-0.1"]}
for name in FREE:
    RUNS[name] = denoising.RUNS.get(name) or generalisation.RUNS[name]
    RUNS[f"free-{name}"] = f"{PPO} --iterations 200 --kl-coef 0 --reward-model $dir/{name}/model"
for name in HELD:
    RUNS[f"held-{name}"] = f"{PPO} --iterations 200 --kl-coef 0.2 --reward-model $dir/{name}/model"
RUNS["once"] = f"{PPO} --iterations 300 --kl-coef 0.2 --reward-model $dir/baseline/model"
for method, eta in (("meta", 0.01), ("plain", 0)):  # three rounds, with the meta step and without
    policy = MODEL
    samples = f"{TOY}/meta.jsonl"
    for i in (1, 2, 3):
        RUNS[f"rm-{method}-{i}"] = (
            f"meta_rm.py {TRAIN} --ascent normalized --eta {eta} --meta-data {samples}")
        RUNS[f"{method}-{i}"] = (
            f"{PPO} --model {policy} --reference {MODEL} --reward-model $dir/rm-{method}-{i}/model "
            f"--kl-coef 0.2 --iterations 100 --seed {i}$seed")
        policy = f"$dir/{method}-{i}/policy"
        samples = f"$dir/{method}-{i}/samples.jsonl"
for name, others in DUELS.items():  # on the 32 prompts of `id`, which are also in training
    files = ""
    for policy in (name, *others):
        RUNS[f"answers-{policy}"] = f"{ANSWERS} --model $dir/{policy}/policy"
        files += f" {policy}=$dir/answers-{policy}/samples.jsonl"
    RUNS[f"against-{name}"] = f"eval.py --gold docs/toy/make.py --policies{files}"

ID = "eval/id/gold"
OOD = "eval/ood/gold"
KL = "ppo/kl"
GOLD = "KL 6 to 8/ppo/gold"
NEAR = "KL 0 to 1/ppo/score_std"
FAR = "KL 6 to 8/ppo/score_std"
COLUMNS = {
    "KL": KL, "gold, `id`": ID, "gold, `ood`": OOD, "gold before, `id`": f"first/{ID}",
    "gold, KL 0 to 1": "KL 0 to 1/ppo/gold", "gold, KL 6 to 8": GOLD,
    "std of scores, KL 0 to 1": NEAR, "std of scores, KL 6 to 8": FAR}
BASES = {}

CLAIMS = [
    Claim("MetaRM Fig. 1", "Scores lie closer together as the policy moves away", NEAR,
          larger="free-baseline", smaller="free-baseline", smaller_key=FAR),
    Claim("arXiv 2210.10760", "Without a KL penalty gold falls", f"first/{ID}",
          larger="free-baseline", smaller="free-baseline", smaller_key=ID),
    Claim("ours", "Gold rises", ID,
          larger="held-baseline", smaller="held-baseline", smaller_key=f"first/{ID}"),
    Claim("ours", "SimCSE: more gold", ID, "held-simcse", "held-baseline"),
    Claim("ours", "SimCSE: more gold on ood", OOD, "held-simcse", "held-baseline"),
    Claim("Table 2", "Three rounds of MetaRM: more gold than one", ID, "meta-3", "meta-1"),
    Claim("Table 3", "MetaRM's rounds: more gold than one long run", ID, "meta-3", "once"),
    Claim("Table 3", "MetaRM's rounds: more gold than plain ones", ID, "meta-3", "plain-3"),
    Claim("Fig. 15", "MetaRM's rounds: more gold on ood", OOD, "meta-3", "plain-3")]
for name in ("flip-1", "S1-1", "S3-1"):
    text = f"{name}: more gold at the same KL"
    CLAIMS.append(Claim("Fig. 9", text, GOLD, f"free-{name}", "free-baseline-1"))
for name in ("simcse", "swav"):
    run = f"free-{name}"
    CLAIMS += [
        Claim("Fig. 12", f"{name}: more gold after 200 iterations", ID, run, "free-baseline"),
        Claim("Fig. 12", f"{name}: more gold at the same KL", GOLD, run, "free-baseline"),
        Claim("Fig. 12", f"{name}: the policy moves less", KL, "free-baseline", run)]
for against, others in DUELS.items():
    for name in others:
        text = f"{name} wins against {against}"
        key = f"net wins over {against}"
        CLAIMS.append(Claim(FIGURES[against], text, key, name, 0.0, threshold=0.02))
