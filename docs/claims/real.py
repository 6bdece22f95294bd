"""The papers' claims on real text, by a language model of your choice. Like run.py.

    python docs/claims/real.py dialogues --model SmolLM2-135M-Instruct --flags ' --lr 5e-5' \\
        --train 'data/$seed/train.jsonl' --test 'data/$seed/test.jsonl'
"""

import argparse
import json
import shutil
import types

from run import ROOT, common, run_missing, save_results  # first, because it extends the path

import denoising
from measure import Claim

EPOCHS = (1, 2)
CONTRASTIVE = {"dropout": "--beta 0", "simcse": "--method simcse", "swav": "--method swav"}
META = {"meta-0": "--eta 0", "plain-5e-6": "--eta 5e-6"}
for eta in ("1e-3", "1e-2", "1e-1"):
    for update in ("restore", "alternate"):
        META[f"{update}-{eta}"] = f"--eta {eta} --ascent normalized --update {update}"
BEST = ("baseline-1", "S3-1", "flip-1", "drop-1", "clean")  # they choose the best of n
TEST = "eval/test/accuracy"
WRONG = "eval/wrong/accuracy"


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("name", help="of the results file")
    add("--about", default="", help="a sentence for the results file")
    add("--model", required=True, help="folder or hub id of a language model")
    add("--train", required=True, help="comparisons; $seed in a name is the seed")
    add("--test", required=True, help="comparisons in distribution")
    add("--gold", action="store_true", help="the column gold of --train is 0 for wrong labels")
    add("--clean", help="the texts of --train with right labels: a model trained on them is gold")
    add("--ood", nargs="*", default=[], metavar="NAME=SOURCE", help="others out of distribution")
    add("--seeds", type=common.in_range(int, 2), default=5)
    add("--jobs", type=int, default=1, help="processes; 0: only measure")
    add("--runs", default=".*", help="regular expression for their names")
    add("--members", type=int, default=10, help="voters")
    add("--fraction", type=float, default=0.1, help="of the pairs, to flip or drop")
    add("--flags", default="", help="of all training scripts")
    add("--ppo-flags", default="--max-new-tokens 128", help="of ppo_loop.py, which samples")
    return parser.parse_args()


def make_methods(args):
    return {
        "S3": "--soft-targets 1", "flip": f"--flip {args.fraction}",
        "drop": f"--drop {args.fraction}", "margin": "--margin",
        "S1": "--margin --label-smoothing 0.2 --smooth-on negative",
        "smooth": "--label-smoothing 0.2"}


def make_runs(args):
    """-> {name: command}. No run needs a later one."""
    setting = f"--model {args.model} --data {args.train} {args.flags}"
    sets = [f"test={args.test}", *args.ood]
    if args.gold:
        sets.append("wrong=$dir/wrong.jsonl")
    train = f"{setting} --seed $voter --eval-every 0 --save-every 0 --eval-data {' '.join(sets)}"
    voted = f"denoise_rm.py {train} --data $dir/vote/train.jsonl"
    runs = {"vote": f"vote_strength.py {setting} --seed $voter --members {args.members} --eval-data"}
    for epochs in EPOCHS:
        runs[f"baseline-{epochs}"] = f"baseline_rm.py {train} --epochs {epochs}"
        for name, flags in make_methods(args).items():
            runs[f"{name}-{epochs}"] = f"{voted} {flags} --epochs {epochs}"
    for low in (0, 90):  # a tenth of the pairs, so more epochs
        runs[f"tenth-{low}"] = f"{voted} --percentiles {low} {low + 10} --epochs 8"
    runs["flipped"] = f"{runs['tenth-0']} --flip 1"
    for name, flags in CONTRASTIVE.items():
        runs[name] = f"contrastive_rm.py {train} {flags}"
    models = " ".join(f"{name}=$dir/{name}/model" for name in ("dropout", "simcse"))
    runs["features"] = f"eval.py --eval-data test={args.test} --reward-models {models}"

    sample = f"ppo_loop.py --model {args.model} --iterations 0 --seed $seed {args.ppo_flags}"
    if args.clean:
        runs["clean"] = f"baseline_rm.py {train} --data {args.clean}"
        runs["many"] = f"{sample} --data {args.test} --num-samples 30 --k 8"
        models = " ".join(f"{name}=$dir/{name}/model" for name in BEST)
        samples = "samples=$dir/many/samples.jsonl"
        runs["best"] = f"eval.py --eval-data {samples} --gold $dir/gold.py --reward-models {models}"

    # MetaRM with the model's own samples; in float32, because bfloat16 rounds small steps away
    runs["samples"] = f"{sample} --data {args.train} --num-samples 200 --k 2"
    for name, flags in META.items():
        runs[name] = (
            f"meta_rm.py {train} --meta-data $dir/samples/samples.jsonl {flags} --dtype float32")
    return runs


def make_columns(args):
    """{name on the page: number of a run}"""
    columns = {
        "test, %": TEST, "loss on test": "eval/test/loss", "wrong labels repeated, %": WRONG,
        "overlap": "test/overlap", "ascent": "mean/train/ascent", "update": "mean/train/update",
        "difference": "eval/meta/difference", "best of 1": "samples/best of 1",
        "best of 8": "samples/best of 8", "minutes": "minutes"}
    for source in args.ood:
        name = source.partition("=")[0]
        columns[f"{name}, %"] = f"eval/{name}/accuracy"
    for name, key in denoising.COLUMNS.items():
        if "share" in key or "curve" in key:
            columns[name] = key
    return columns


def make_bases(args):
    """{run: the run over which its accuracies are gains}"""
    bases = {**dict.fromkeys(META, "meta-0"), **dict.fromkeys(CONTRASTIVE, "dropout")}
    for epochs in EPOCHS:
        for name in make_methods(args):
            bases[f"{name}-{epochs}"] = f"baseline-{epochs}"
    return bases


def make_claims(args):
    claims = [
        Claim("Fig. 3", "The weakest tenth is mostly wrong", "share wrong, tenth 1", "vote", 0.5),
        Claim("Fig. 3", "The strongest tenth is right: less than 5 % are wrong",
              "share wrong, tenth 10", larger=0.05, smaller="vote"),
        Claim("Fig. 3", "Labels below 0 are mostly wrong", "share wrong below 0", "vote", 0.5),
        Claim("Fig. 4", "The weakest tenth teaches the opposite", TEST, 0.5, "tenth-0"),
        Claim("Fig. 5", "Flipped, it beats the strongest tenth", TEST, "flipped", "tenth-90"),
        Claim("Fig. 28", "The second epoch fits wrong labels", WRONG, "baseline-2", "baseline-1"),
        Claim("Fig. 11", "SimCSE separates the two sides", "test/overlap", "dropout", "simcse"),
        Claim("section 3.1", "SimCSE beats dropout alone", TEST, "simcse", "dropout"),
        Claim("section 3.1", "SwAV beats dropout alone", TEST, "swav", "dropout"),
        Claim("best of n", "The baseline's best of 8 beats a random response", "samples/best of 8",
              "baseline-1", "baseline-1", smaller_key="samples/best of 1")]
    for part in ("weakest", "strongest"):
        text = f"Voters disagree more about the {part} labels than about weak ones"
        claims.append(Claim(
            "Fig. 2", text, f"std, {part}", "vote", "vote", smaller_key="std, 20 to 40 %"))
    for epochs in EPOCHS:
        for name in make_methods(args):
            run = f"{name}-{epochs}"
            baseline = f"baseline-{epochs}"
            text = f"{name} beats the baseline, epochs: {epochs}"
            claims.append(Claim("Fig. 8", text, TEST, run, baseline))
            text = f"{name} repeats fewer wrong labels, epochs: {epochs}"
            claims.append(Claim("Fig. 28", text, WRONG, baseline, run))
        text = f"Dropping beats flipping, epochs: {epochs}"
        claims.append(Claim("arXiv 2509.23564", text, TEST, f"drop-{epochs}", f"flip-{epochs}"))
    for run in BEST[1:-1]:  # the last one is gold
        text = f"The best of 8 by {run} beats that by the baseline"
        claims.append(Claim("best of n", text, "samples/best of 8", run, "baseline-1"))
    for name in list(META)[1:]:
        text = f"{name} sets samples further apart"
        claims.append(Claim("Fig. 16", text, "eval/meta/difference", name, "meta-0"))
        text = f"{name} costs less than half a point"
        claims.append(Claim("MetaRM Fig. 4", text, TEST, name, "meta-0", plus=0.005))
        for source in args.ood:
            place = source.partition("=")[0]
            text = f"{name} helps on {place}"
            claims.append(Claim("MetaRM: ood", text, f"eval/{place}/accuracy", name, "meta-0"))
    return claims


if __name__ == "__main__":
    args = parse_args()
    folders = []
    for seed in range(args.seeds):
        folder = ROOT / f"runs/{args.name}/{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        folders.append(folder)
        if args.gold:
            rows = common.load_rows(args.train.replace("$seed", str(seed)))
            wrong = [json.dumps(row) + "\n" for row in rows if row["gold"] == 0]
            (folder / "wrong.jsonl").write_text("".join(wrong))
        if args.clean:
            shutil.copy(ROOT / "docs/clean_gold.py", folder / "gold.py")
    runs = make_runs(args)
    if args.jobs:
        run_missing(args, args.name, runs, folders)
    experiment = types.SimpleNamespace(
        RUNS=runs, COLUMNS=make_columns(args), CLAIMS=make_claims(args), BASES=make_bases(args))
    save_results(args.name, experiment, folders, args.about)
