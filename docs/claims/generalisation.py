"""Section 3 on reward models: contrastive losses and MetaRM."""

from measure import Claim
from world import TOY, TRAIN

FLIPS = [0.1]  # fraction of the annotators' labels that are flipped
CONTRASTIVE = {
    "simcse": "--method simcse", "simcse-differences": "--method simcse --on differences",
    "swav": "--method swav", "swav-differences": "--method swav --on differences"}
META = {
    "meta-5e-6": "--eta 5e-6", "meta": "--eta 1e-2",
    "meta-normalized": "--eta 1e-2 --ascent normalized",
    "meta-alternate": "--eta 1e-3 --ascent normalized --update alternate"}
ID = "eval/id/accuracy"
SHIFTED = "eval/shifted/accuracy"
DIFFERENCES = {
    "difference": "pairs/reward_difference", "over the largest": "pairs/normalized_difference"}
COLUMNS = {
    "`id`, %": ID, "`ood`, %": "eval/ood/accuracy", "`shifted`, %": SHIFTED,
    "`noisy`, %": "eval/noisy/accuracy", "overlap on `id`": "id/overlap",
    "overlap on `shifted`": "shifted/overlap", "ascent": "mean/train/ascent",
    "update": "mean/train/update", **DIFFERENCES}


def eval_command(runs):
    """eval.py on the reward models of some runs."""
    sets = f"id={TOY}/id.jsonl shifted={TOY}/shifted.jsonl pairs={TOY}/pairs.jsonl"
    models = " ".join(f"{name}=$dir/{name}/model" for name in runs)
    return f"eval.py --max-length 64 --eval-data {sets} --reward-models {models}"


SFT = {"baseline": f"baseline_rm.py {TRAIN}"}
SFT["dropout"] = f"contrastive_rm.py {TRAIN} --beta 0"  # the noise of the views without the loss
RANDOM = {"random-baseline": f"baseline_rm.py {TRAIN} --model {TOY}/random"}
for name, flags in CONTRASTIVE.items():
    SFT[name] = f"contrastive_rm.py {TRAIN} {flags}"
    RANDOM[f"random-{name}"] = f"{SFT[name]} --model {TOY}/random"
for name, flags in META.items():
    SFT[name] = f"meta_rm.py {TRAIN} --meta-data {TOY}/meta.jsonl {flags}"
RUNS = {**SFT, **RANDOM}
RUNS["eval-generalisation"] = eval_command(SFT)
RUNS["eval-random"] = eval_command(RANDOM)
BASES = {**dict.fromkeys(SFT, "baseline"), **dict.fromkeys(RANDOM, "random-baseline")}

CLAIMS = [Claim("section 3.1", "SimCSE beats SwAV", ID, "simcse", "swav")]
for start, words in (("", "the SFT model"), ("random-", "random weights")):
    baseline = f"{start}baseline"
    for name in ("id", "shifted"):
        text = f"SimCSE separates chosen from rejected on {name}, from {words}"
        CLAIMS.append(Claim("Fig. 11", text, f"{name}/overlap", baseline, f"{start}simcse"))
    for name in CONTRASTIVE:
        text = f"{name} beats the baseline, from {words}"
        CLAIMS.append(Claim("section 3.1", text, ID, f"{start}{name}", baseline))
for name in META:
    text = f"{name} beats the baseline on shifted"
    CLAIMS.append(Claim("MetaRM: shifted", text, SHIFTED, name, "baseline"))
    for words, key in DIFFERENCES.items():
        text = f"{name} sets similar responses further apart: {words}"
        CLAIMS.append(Claim("Fig. 16", text, key, name, "baseline"))
    if name != "meta-5e-6":  # which changes nothing
        text = f"{name} costs less than half a point on id"
        CLAIMS.append(Claim("MetaRM Fig. 4", text, ID, name, "baseline", plus=0.005))
