"""The batch, its mask, the model that reads it, and the order of a run."""

import gc
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from conftest import TINY, settings
from datasets import Dataset
from torch.distributed.tensor import DTensor

import common

CPU = torch.device("cpu")
ROWS = [  # prompt, responses
    ([1, 5, 6, 7], [[8, 9, 2], [10, 11, 12, 13, 2]]),
    ([1, 20], [[21, 22, 23, 24, 25, 26, 27, 2], [2]]),
    ([1, 30, 31, 32, 33, 34, 35], [[36, 2], [37, 2]]),
]
DATA = Dataset.from_list([{"prompt_ids": p, "response_ids": r, "length": len(p) + sum(map(len, r))} for p, r in ROWS])

SMALL = {"vocab_size": TINY["vocab_size"], "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SHARES = {  # models that read shared prompts
    "llama": transformers.LlamaConfig(**TINY),
    "qwen2": transformers.Qwen2Config(**TINY, num_key_value_heads=2),
    "qwen3": transformers.Qwen3Config(**TINY, num_key_value_heads=2, head_dim=8),
    "mistral": transformers.MistralConfig(**TINY, num_key_value_heads=2),
    "gpt2": transformers.GPT2Config(vocab_size=TINY["vocab_size"], n_embd=32, n_layer=2, n_head=4, n_positions=128),
    "gpt_neox": transformers.GPTNeoXConfig(**TINY),
    "opt": transformers.OPTConfig(**SMALL, ffn_dim=64, max_position_embeddings=128, word_embed_proj_dim=32),
    "phi3": transformers.Phi3Config(**TINY, num_key_value_heads=2, pad_token_id=0),
    "gemma": transformers.GemmaConfig(**TINY, head_dim=8, num_key_value_heads=2),
    "gemma3": transformers.Gemma3TextConfig(**TINY, head_dim=8, num_key_value_heads=2, sliding_window=64),
    "falcon": transformers.FalconConfig(**SMALL, alibi=False, max_position_embeddings=128),
}
SEPARATES = {  # models that cannot
    "bloom": transformers.BloomConfig(vocab_size=TINY["vocab_size"], hidden_size=32, n_layer=2, n_head=4),
    "falcon-alibi": transformers.FalconConfig(**SMALL, alibi=True),
    "mistral-window": transformers.MistralConfig(**TINY, num_key_value_heads=2, sliding_window=4),
}


def load(name, tmp_path, tokenizer, **changes):
    """A reward model from a folder with a random language model."""
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config({**SHARES, **SEPARATES}[name]).save_pretrained(tmp_path)
    return common.load_reward_model(tmp_path, tokenizer, CPU, settings(max_length=32, **changes))


def plain_rewards(model):
    """The definition: every prompt with one response alone, through the classifier's own forward pass."""
    return torch.tensor([[model(torch.tensor([p + y])).logits.item() for y in r] for p, r in ROWS])


def gradients(model, batch):
    """Of the sum of squares of a batch's rewards."""
    model.zero_grad()
    model(batch).pow(2).sum().backward()
    return {name: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad.clone()
            for name, p in model.hf_model.named_parameters()}


def test_collate_by_hand():
    batch = common.collate(DATA, [0, 1], CPU, True)
    assert batch.input_ids.tolist() == [[1, 5, 6, 7, 8, 9, 2, 10, 11, 12, 13, 2, 0, 0, 0, 0],
                                        [1, 20, 21, 22, 23, 24, 25, 26, 27, 2, 2, 0, 0, 0, 0, 0]]
    assert batch.segments.tolist() == [[0] * 4 + [1] * 3 + [2] * 5 + [-1] * 4, [0] * 2 + [1] * 8 + [2] + [-1] * 5]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 6, 4, 5, 6, 7, 8] + [0] * 4, [*range(10), 2] + [0] * 5]
    assert batch.row.tolist() == [[0, 0], [1, 1]] and batch.last.tolist() == [[6, 11], [9, 10]]
    batch = common.collate(DATA, [2, 0], CPU, False)
    assert batch.input_ids.tolist() == [p + y + [0] * (16 - len(p + y)) for p, r in (ROWS[2], ROWS[0]) for y in r]
    assert batch.position_ids.tolist() == [[*range(n)] + [0] * (16 - n) for n in (9, 9, 7, 9)]
    assert batch.segments[2:].tolist() == [[0] * 4 + [1] * 3 + [-1] * 9, [0] * 4 + [2] * 5 + [-1] * 7]
    assert batch.row.tolist() == [[0, 1], [2, 3]] and batch.last.tolist() == [[8, 8], [6, 8]]
    assert batch.index.tolist() == [2, 0]


def test_tree_mask_by_hand():
    mask = common.tree_mask(torch.tensor([[0, 0, 1, 2, 2, -1]]), torch.float32)
    assert mask.shape == (1, 1, 6, 6) and set(mask.unique().tolist()) == {0, -torch.inf}
    assert (mask[0, 0] == 0).int().tolist() == [  # a padded query that sees nothing would be NaN
        [1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0], [1, 1, 0, 1, 0, 0], [1, 1, 0, 1, 1, 0],
        [1, 1, 0, 0, 0, 1]]


@pytest.mark.parametrize("name", [*SHARES, *SEPARATES])
def test_rewards_are_those_of_texts_alone(name, tmp_path, tokenizer):
    """In fp32, and in bf16 as well as it can; in the layout that the model can read, found out by itself."""
    model = load(name, tmp_path, tokenizer).eval()
    assert model.share == (name in SHARES)
    with torch.no_grad():
        plain = plain_rewards(model.hf_model)
        for model.share in {model.share, False}:
            rewards, features = model(common.collate(DATA, [0, 1, 2], CPU, model.share), with_features=True)
            torch.testing.assert_close(rewards, plain, rtol=0, atol=2e-5)
            torch.testing.assert_close(model.hf_model.score(features)[..., 0], rewards)
    half = load(name, tmp_path, tokenizer, dtype="bfloat16")
    assert half.share == (name in SHARES) and {type(p) for p in half.parameters()} == {DTensor}
    assert {p.dtype for p in half.parameters()} == {torch.float32}
    torch.testing.assert_close(common.compute_rewards(half, DATA, 64), plain, rtol=0, atol=0.05)


def test_one_model_at_a_time(tmp_path, tokenizer):
    """FSDP keeps a deleted model in reference cycles until the next load."""
    model = load("llama", tmp_path, tokenizer, dtype="bfloat16")
    weight = weakref.ref(model.hf_model.score.weight)
    del model
    gc.disable()
    load("llama", tmp_path, tokenizer, dtype="bfloat16")
    gc.enable()
    assert weight() is None


def test_gradients_are_those_of_texts_alone(tmp_path, tokenizer):
    """Shared or not, checkpointed or not; bf16 as well as it can."""
    model = load("llama", tmp_path, tokenizer)
    for p, r in ROWS:
        for y in r:
            model.hf_model(torch.tensor([p + y])).logits.pow(2).sum().backward()
    plain = {name: p.grad.clone() for name, p in model.hf_model.named_parameters()}
    shared, separate = (common.collate(DATA, [0, 1, 2], CPU, share) for share in (True, False))
    checkpointed = load("llama", tmp_path, tokenizer, gradient_checkpointing=True)
    assert checkpointed.hf_model.is_activation_checkpointing
    for model.share, batch in ((True, shared), (False, separate)):
        torch.testing.assert_close(gradients(model, batch), plain, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(gradients(checkpointed, shared), plain, rtol=1e-3, atol=1e-5)
    half = gradients(load("llama", tmp_path, tokenizer, dtype="bfloat16"), shared)
    assert all((half[name] - plain[name]).norm() < 0.05 * plain[name].norm() for name in plain)


def test_padding_and_empty_batches(tmp_path, tokenizer):
    model = load("llama", tmp_path, tokenizer)
    together, alone = (common.compute_rewards(model, DATA, micro_tokens) for micro_tokens in (10_000, 1))
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)
    assert together.dtype == torch.float32 and together.shape == (3, 2) and model.training
    for model.share in (True, False):
        rewards = model(common.collate(DATA, [], CPU, model.share))
        assert rewards.shape == (0, 2)
        rewards.sum().backward()  # which other ranks wait for
        assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_rewards_that_are_not_finite_are_refused(tmp_path, tokenizer):
    model = load("llama", tmp_path, tokenizer)
    with torch.no_grad():
        model.hf_model.score.weight[0, 0] = torch.nan
    with pytest.raises(SystemExit):
        common.compute_rewards(model, DATA, 64)


def test_head_and_dropout(llama, tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(common, "can_share_prompts", lambda *_: True)  # to load 12 models in less time
    model = load("gpt2", tmp_path, tokenizer)
    assert model.training and not [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout) and m.p]
    assert model.hf_model.config.pad_token_id == tokenizer.pad_token_id
    seeds = [common.load_reward_model(llama, tokenizer, CPU, settings(seed=i)).state_dict() for i in (*range(10), 0)]
    assert [key for key in seeds[0] if not torch.equal(seeds[0][key], seeds[-1][key])] == []
    assert [key for key in seeds[0] if not torch.equal(seeds[0][key], seeds[1][key])] == ["hf_model.score.weight"]
    head = torch.cat([weights["hf_model.score.weight"] for weights in seeds[:-1]])
    assert head.std().item() == pytest.approx(1 / np.sqrt(33), rel=0.18)  # 4.5 standard errors


@pytest.mark.parametrize("max_norm, clipped", [(1.0, [0.6, 0.8]), (9.0, [3.0, 4.0]), (0, [3.0, 4.0])])
def test_clipping(max_norm, clipped):
    layer = torch.nn.Linear(2, 1, bias=False)
    layer.weight.grad = torch.tensor([[3.0, 4.0]])
    assert common.clip_gradients(layer, max_norm) == 5
    assert layer.weight.grad[0].tolist() == pytest.approx(clipped, rel=1e-5)


def test_each_epoch_is_a_permutation():
    for epoch in (0, 1):
        parts = [common.batch_indices(103, 8, 5, epoch * 13 + i) for i in range(13)]
        assert [len(part) for part in parts] == [8] * 12 + [7] and sorted(np.concatenate(parts)) == [*range(103)]
    a, b, c = (common.batch_indices(103, 103, seed, epoch).tolist() for seed, epoch in ((5, 0), (5, 1), (6, 0)))
    assert a != b and a != c and a == common.batch_indices(103, 103, 5, 0).tolist()


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("micro_tokens", [1, 130, 10**5])
def test_micro_batches(micro_tokens, world, share, monkeypatch):
    lengths = np.random.default_rng(0).integers(3, 60, 200)
    data = Dataset.from_list([{"prompt_ids": [1] * (n - 2), "response_ids": [[2], [2]], "length": n} for n in lengths])
    index = np.random.default_rng(1).permutation(200)[:21]
    ranks = []
    monkeypatch.setattr(common, "WORLD_SIZE", world)
    for rank in range(world):
        monkeypatch.setattr(common, "RANK", rank)
        ranks.append([*common.micro_batches(data, index, micro_tokens, SimpleNamespace(device=CPU, share=share))])
    assert len({len(batches) for batches in ranks}) == 1  # FSDP needs as many forward passes on every rank
    batches = [batch for batches in ranks for batch in batches]
    assert sorted(np.concatenate([batch.index for batch in batches])) == sorted(index)
    assert all(len(x.index) <= 1 or x.input_ids.numel() <= micro_tokens for x in batches)
    assert micro_tokens < 10**5 or len(batches) == world
