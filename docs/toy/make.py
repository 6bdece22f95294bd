"""The toy world: preference data whose true reward is a rule of one line, for reward modelling what CartPole is for
control.

A prompt asks for a number of things of a kind, a response is a list of words:

    Human: name three fruits                Assistant: apple plum fig

The gold reward is +1 for each different thing that was asked for, up to the number asked, and -1 for every other word,
also for repetitions. Annotators choose by Bradley-Terry on the gold rewards, and a tenth of their labels is then
flipped. In train.jsonl 16 % of the labels are wrong, and in another 18 % of the pairs both responses have the same
gold reward.

    train, noisy    labels of the annotators, 4,000 and 1,000 comparisons
    id              the same distribution, gold labels
    ood             prompts that ask for two kinds at once, gold labels
    shifted         two nearly perfect responses, one point apart, gold labels
    meta            five responses of the SFT model to each of 1,000 prompts
    model/          the SFT model: a two-layer Llama trained on demonstrations of middling skill

    python docs/toy/make.py --output-dir DIR                         makes what lies in docs/toy
    python docs/toy/make.py --output-dir DIR --seed 3 --flip 0.25    another world with other noise

voted.jsonl is the train.jsonl that `python vote_strength.py` writes, without its two lists of scores and
rounded, and reward_model/ the model that `python baseline_rm.py` writes.
"""

import argparse
import json
import math
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

THINGS = {
    "fruits": "apple pear plum fig grape lemon mango peach cherry melon banana kiwi",
    "animals": "dog cat horse cow sheep goat pig wolf bear lion tiger fox",
    "colors": "red green blue yellow black white brown purple pink grey orange violet",
    "tools": "hammer saw drill wrench file axe shovel rake chisel clamp level knife",
    "metals": "iron gold silver copper tin lead zinc nickel steel brass bronze cobalt",
    "trees": "oak elm ash birch maple pine cedar willow beech spruce poplar larch",
    "drinks": "water tea coffee milk juice wine beer cider soda cocoa rum gin",
    "rooms": "kitchen bedroom bathroom cellar attic hall garage office library pantry lounge studio",
}
KIND = {word: kind for kind, words in THINGS.items() for word in words.split()}
NUMBERS = {"two": 2, "three": 3, "four": 4, "five": 5}
WORDS = ["<pad>", "<s>", "</s>", "<unk>", "Human:", "Assistant:", "name", "and", *NUMBERS, *THINGS, *KIND]


def gold(prompt, response):
    """The true reward of a response: different things asked for, up to the number asked, minus all other words."""
    asked, words = prompt.split(), response.split()
    number = next(NUMBERS[word] for word in asked if word in NUMBERS)
    right = min(number, len({word for word in words if KIND.get(word) in asked}))
    return right - (len(words) - right)


def make_prompt(rng, num_kinds):
    """A prompt like '\\n\\nHuman: name three fruits and tools\\n\\nAssistant:', which has num_kinds = 2."""
    return f"\n\nHuman: name {rng.choice([*NUMBERS])} {' and '.join(rng.sample([*THINGS], num_kinds))}\n\nAssistant:"


def make_response(rng, prompt, skill):
    """A list of words. Each is right with probability `skill`, otherwise any thing, a repetition or any word at all;
    with probability 1 - skill there are too few or too many."""
    asked = prompt.split()
    number = next(NUMBERS[word] for word in asked if word in NUMBERS)
    length = number if rng.random() < skill else max(1, number + rng.choice([-2, -1, 1, 2]))
    right = [word for kind in asked for word in THINGS.get(kind, "").split()]
    rng.shuffle(right)
    words = []
    for _ in range(length):
        wrong = rng.choice([*KIND]), rng.choice(words or WORDS[4:]), rng.choice(WORDS[4:])
        words.append(right.pop() if rng.random() < skill else rng.choice(wrong))
    return " " + " ".join(words)


def make_comparisons(split="train", n=None, seed=0, flip=0.1):
    """Rows of prompt, chosen, rejected and gold (1: gold prefers chosen, 0: rejected, -1: neither).
    split: train, noisy, id, ood or shifted; n: 4,000 rows for train, 1,000 for the others."""
    rng, rows, annotated = random.Random(f"{split} {seed}"), [], split in ("train", "noisy")
    while len(rows) < (n or (4000 if split == "train" else 1000)):
        prompt = make_prompt(rng, 2 if split == "ood" else 1)
        pair = [make_response(rng, prompt, rng.uniform(0.8 if split == "shifted" else 0.2, 1)) for _ in range(2)]
        difference = gold(prompt, pair[0]) - gold(prompt, pair[1])
        if pair[0] == pair[1] or (not annotated and difference == 0) or (split == "shifted" and abs(difference) > 1):
            continue
        first_wins = difference > 0
        if annotated:
            first_wins = (rng.random() < 1 / (1 + math.exp(-difference))) != (rng.random() < flip)
        chosen, rejected = pair if first_wins else pair[::-1]
        label = -1 if difference == 0 else int(first_wins == (difference > 0))
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected, "gold": label})
    return rows


def make_tokenizer():
    """One token a word, BOS in front."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def make_model(tokenizer, seed=0, steps=400, hidden_size=64, num_layers=2):
    """The SFT model, trained for `steps` batches of 64 demonstrations."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(WORDS), hidden_size=hidden_size, intermediate_size=4 * hidden_size, num_attention_heads=4,
        num_hidden_layers=num_layers, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3 * 64 / hidden_size)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for _ in tqdm(range(steps), "SFT model", mininterval=5):
        prompts = [make_prompt(rng, rng.choice([1, 2])) for _ in range(64)]
        texts = [prompt + make_response(rng, prompt, rng.uniform(0.4, 1)) + " </s>" for prompt in prompts]
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
        model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=labels).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model


def sample(model, tokenizer, prompts, k):
    """Rows of prompt and k responses sampled from the model."""
    tokenizer.padding_side = "left"
    batch = tokenizer(prompts, padding=True, return_tensors="pt")
    tokens = model.generate(input_ids=batch.input_ids, attention_mask=batch.attention_mask, do_sample=True, top_k=0,
                            max_new_tokens=12, num_return_sequences=k)
    texts = tokenizer.batch_decode(tokens[:, batch.input_ids.size(1):], skip_special_tokens=True)
    return [{"prompt": prompt, "responses": [f" {text}" for text in texts[i * k : (i + 1) * k]]}
            for i, prompt in enumerate(prompts)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0, help="random seed of everything")
    parser.add_argument("--flip", type=float, default=0.1, help="fraction of the annotators' labels that are flipped")
    parser.add_argument("--rows", type=int, help="comparisons in train.jsonl (default: 4,000)")
    parser.add_argument("--hidden-size", type=int, default=64, help="hidden size of the SFT model")
    parser.add_argument("--num-layers", type=int, default=2, help="layers of the SFT model")
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    files = {split: make_comparisons(split, args.rows if split == "train" else None, args.seed, args.flip)
             for split in ("train", "noisy", "id", "ood", "shifted")}
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, args.seed, hidden_size=args.hidden_size, num_layers=args.num_layers)
    model.save_pretrained(args.output_dir / "model")
    tokenizer.save_pretrained(args.output_dir / "model")
    files["meta"] = sample(model, tokenizer, [row["prompt"] for row in files["train"][:1000]], 5)
    for name, rows in files.items():
        (args.output_dir / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
