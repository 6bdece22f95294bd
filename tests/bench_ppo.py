"""Seconds of a PPO iteration: split into roll-out, scoring and update; other ways to roll out; another trainer's.

    python tests/bench_ppo.py [--data FILE] [--hidden 512 --layers 6] [--keep DIR]
    python tests/bench_ppo.py --keep DIR --only trl     by hand, in an environment of trl 0.2x, after the line above

    ours       ppo_loop.py as it is, on random weights that seldom say EOS
    roll-out   the same prompts by `generate` with its dynamic cache, a static cache, and by continuous batching
    trl        TRL's PPOTrainer on the same model, prompts, number of roll-outs and passes

Prints medians over the iterations, the first two left out.
"""

import argparse
import contextlib
import json
import os
import runpy
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import transformers

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
CPU = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def prepare(args, folder):
    """A random policy, a random reward model and prompts, as folders and a file."""
    import common
    rows = common.load_rows(args.data)
    rows = rows.take(min(2000, len(rows)))
    tokenizer = common.train_bpe(rows, 8192)
    prompts = [prompt for prompt, _ in map(common.read_row, rows) if isinstance(prompt, str)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    ids, _ = common.encode_prompts(prompts, tokenizer, args.max_length - args.max_new_tokens)
    (folder / "ids.json").write_text(json.dumps(ids))
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=args.hidden, intermediate_size=4 * args.hidden, num_attention_heads=8,
        num_hidden_layers=args.layers, num_labels=1, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    for name, kind in (("policy", "LlamaForCausalLM"), ("reward", "LlamaForSequenceClassification")):
        getattr(transformers, kind)(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def ours(args, folder):
    """-> {part: seconds of each iteration}."""
    flags = ["--model", folder / "policy", "--reward-model", folder / "reward", "--prompts", folder / "prompts.jsonl",
             "--eval-data", "--rounds", 1, "--iterations", args.steps + 2, "--batch-size", args.batch_size,
             "--rollouts", args.rollouts, "--epochs", args.epochs, "--max-length", args.max_length, "--max-new-tokens",
             args.max_new_tokens, "--micro-tokens", args.micro_tokens, "--sample-batch", args.batch_size,
             "--temperature", 1, "--save-every", 0, "--dtype", args.dtype]
    with tempfile.TemporaryDirectory() as run, open(os.devnull, "w") as null:
        sys.argv = ["ppo_loop.py", "--output-dir", f"{run}/run", *map(str, flags)]
        with contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
            runpy.run_path(str(ROOT / "ppo_loop.py"), run_name="__main__")
        lines = [json.loads(line) for line in Path(f"{run}/run/metrics.jsonl").read_text().splitlines()][2:]
    return {part: [line[f"ppo/{part}_seconds"] for line in lines] for part in ("rollout", "scoring", "update")}


def ways_to_roll_out(args, folder):
    """-> {way: seconds of each of as many roll-outs}."""
    import common
    tokenizer = common.load_tokenizer(folder / "policy", None)
    model = common.load_language_model(folder / "policy", "--model", getattr(torch, args.dtype), tokenizer, 1.0,
                                       args.max_new_tokens).to(CPU).eval()
    prompts, k = json.loads((folder / "ids.json").read_text()), args.rollouts

    def batching(part):  # takes no num_return_sequences
        common.torch.manual_seed(0)
        answers = model.generate_batch([x for x in part for _ in range(k)], generation_config=model.generation_config)
        assert len(answers) == k * len(part)

    ways = {"dynamic cache": lambda part: common.respond(model, part, k, (0, 0, 1), len(part), CPU),
            "static cache": lambda part: common.respond(model, part, k, (0, 0, 1), len(part), CPU),
            "continuous batching": batching}
    times = {way: [] for way in ways}
    for step in range(args.steps + 2):
        part = [prompts[i] for i in common.step_rows(len(prompts), args.batch_size, 0, step)]
        for way, roll_out in ways.items():
            model.generation_config.cache_implementation = "static" if way == "static cache" else None
            began = time.time()
            with contextlib.redirect_stderr(open(os.devnull, "w")), torch.no_grad():
                roll_out(part)
            times[way].append(time.time() - began)
    return {way: seconds[2:] for way, seconds in times.items()}


def trl(args, folder):
    """-> {"PPOTrainer": seconds of each iteration}."""
    import datasets
    from trl import PPOConfig, PPOTrainer
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "policy/tokenizer.json"), pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        padding_side="left")
    prompts = json.loads((folder / "ids.json").read_text())
    rows = datasets.Dataset.from_dict({"input_ids": [x for x in prompts for _ in range(args.rollouts)]})
    classifier, times = transformers.AutoModelForSequenceClassification.from_pretrained, []
    policy = transformers.AutoModelForCausalLM.from_pretrained
    each = args.batch_size * args.rollouts
    config = PPOConfig(
        output_dir=str(folder / "trl"), per_device_train_batch_size=8, gradient_accumulation_steps=each // 8,
        num_mini_batches=1, num_ppo_epochs=args.epochs, response_length=args.max_new_tokens, temperature=1.0,
        total_episodes=each * (args.steps + 2), local_rollout_forward_batch_size=each, num_sample_generations=0,
        report_to="none", save_strategy="no", bf16=args.dtype == "bfloat16", gradient_checkpointing=False,
        disable_tqdm=True)

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *_, **__):
            times.append(time.time())

    PPOTrainer(config, tokenizer, policy(folder / "policy"), policy(folder / "policy"), classifier(folder / "reward"),
               train_dataset=rows, value_model=classifier(folder / "reward"), eval_dataset=rows.select(range(8)),
               callbacks=[Clock()]).train()
    return {"PPOTrainer": np.diff(times)[1:]}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", default="toy", help="whose prompts")
    add("--hidden", type=int, default=512)
    add("--layers", type=int, default=6)
    add("--batch-size", type=int, default=8, help="prompts")
    add("--rollouts", type=int, default=4)
    add("--epochs", type=int, default=2)
    add("--max-length", type=int, default=256)
    add("--max-new-tokens", type=int, default=48)
    add("--micro-tokens", type=int, default=8192 if torch.cuda.is_available() else 2048)
    add("--steps", type=int, default=6)
    add("--dtype", choices=["float32", "bfloat16"], default="bfloat16" if torch.cuda.is_available() else "float32")
    add("--keep", type=Path, help="folder for models and prompts, for another environment")
    add("--only", nargs="*", choices=["ours", "roll-out", "trl"], default=["ours", "roll-out"])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.keep or Path(temporary)
        folder.mkdir(exist_ok=True)
        if not (folder / "ids.json").exists():
            prepare(args, folder)
        for name, run in (("ours", ours), ("roll-out", ways_to_roll_out), ("trl", trl)):
            if name in args.only:
                times = run(args, folder)
                parts = ", ".join(f"{part} {np.median(seconds):.3f} s" for part, seconds in times.items())
                total = f"; together {np.median(np.sum([*times.values()], 0)):.3f} s" * (name == "ours")
                print(f"{name}: {parts}{total}")
