"""A proxy for gold where nobody knows the true reward: another reward model.

    cp docs/clean_gold.py runs/gold.py
    python eval.py --gold runs/gold.py --eval-data samples=samples.jsonl --reward-models ...

It reads the reward model in clean/model beside it, here runs/clean/model. Prompts are texts.
"""

from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

FOLDER = Path(__file__).parent / "clean/model"
tokenizer = AutoTokenizer.from_pretrained(FOLDER)
model = AutoModelForSequenceClassification.from_pretrained(FOLDER)


@torch.no_grad()
def gold(prompt, response):
    """Two texts -> the reward, read at the one EOS that the training scripts put at the end."""
    if not isinstance(prompt, str):
        raise ValueError("clean_gold.py reads prompts that are texts")
    inputs = tokenizer(f"{prompt} {response}{tokenizer.eos_token}", return_tensors="pt")
    return model(**inputs).logits.item()
