"""Section 3 on reward models: contrastive losses and MetaRM, from the SFT model and from random weights."""

from run import TRAIN, compare

FLIPS = [0.1]  # fraction of the annotators' labels that are flipped
META_RM = f"meta_rm.py {TRAIN} --meta-data {{dir}}/toy-0.1/meta.jsonl"
CONTRASTIVE = {
    "simcse": f"contrastive_rm.py {TRAIN} --method simcse",
    "simcse-differences": f"contrastive_rm.py {TRAIN} --method simcse --on differences",
    "swav": f"contrastive_rm.py {TRAIN} --method swav",
    "swav-differences": f"contrastive_rm.py {TRAIN} --method swav --on differences"}
META = {
    "meta-5e-6": f"{META_RM} --eta 5e-6",
    "meta": f"{META_RM} --eta 1e-2",
    "meta-normalized": f"{META_RM} --eta 1e-2 --ascent normalized",
    "meta-alternate": f"{META_RM} --eta 1e-3 --ascent normalized --update alternate"}
SFT = {"baseline": f"baseline_rm.py {TRAIN}", "dropout": f"contrastive_rm.py {TRAIN} --beta 0", **CONTRASTIVE, **META}
RANDOM = {f"random-{name}": f"{SFT[name]} --model {{dir}}/toy-0.1/random" for name in ("baseline", *CONTRASTIVE)}
EVAL = ("eval.py --max-length 64 --eval-data id={dir}/toy-0.1/id.jsonl shifted={dir}/toy-0.1/shifted.jsonl "
        "pairs={dir}/toy-0.1/pairs.jsonl --reward-models")
CELLS = {**SFT, "eval": " ".join([EVAL, *(f"{name}={{dir}}/{name}/model" for name in SFT)]),
         **RANDOM, "random-eval": " ".join([EVAL, *(f"{name}={{dir}}/{name}/model" for name in RANDOM)])}

ID, SHIFTED = "eval/id/accuracy", "eval/shifted/accuracy"
KEYS = ID, "eval/ood/accuracy", SHIFTED, "eval/noisy/accuracy", "id/overlap", "shifted/overlap"
DIFFERENCES = "pairs/reward_difference", "pairs/normalized_difference"
TABLES = [("from the SFT model", SFT, KEYS, "baseline"), ("from random weights", RANDOM, KEYS, "random-baseline"),
          ("MetaRM", ["baseline", *META], ["mean/train/shift", "mean/train/update", *DIFFERENCES])]
COMPARISONS = [("section 3.1", "simcse", "swav", ID)]
for world in ("", "random-"):
    COMPARISONS += [("Fig. 11", f"{world}baseline", f"{world}simcse", key) for key in ("id/overlap", "shifted/overlap")]
    COMPARISONS += [("section 3.1", f"{world}{name}", f"{world}baseline", ID) for name in CONTRASTIVE]
for name in META:
    COMPARISONS += [("MetaRM, shifted", name, "baseline", SHIFTED)]
    COMPARISONS += [("Fig. 16", name, "baseline", key) for key in DIFFERENCES]


def more_claims(folders):
    gains = {name: compare(folders, "", name, "baseline", ID)[2] for name in META if name != "meta-5e-6"}  # no effect
    return [("MetaRM Fig. 4", f"{name} costs no accuracy on id: gain + half a point, in points", 100 * gain + 0.5, 1)
            for name, gain in gains.items()]
