"""The batch with shared prompts, its mask, and the model that reads it."""

import numpy as np
import pytest
import torch
import transformers
from conftest import TINY, settings
from datasets import Dataset
from torch.distributed.tensor import DTensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import flex_attention
from transformers import AutoModelForSequenceClassification

import common

ROWS = [  # prompt, responses
    ([1, 5, 6, 7], [[8, 9, 2], [10, 11, 12, 13, 2]]),
    ([1, 20], [[21, 22, 23, 24, 25, 26, 27, 2], [2]]),
    ([1, 30, 31, 32, 33, 34, 35], [[36, 2], [37, 2]]),
]
DATA = Dataset.from_list([{"prompt_ids": p, "response_ids": r, "length": len(p) + sum(map(len, r))} for p, r in ROWS])

SHARES = {  # models that read shared prompts
    "llama": transformers.LlamaConfig(**TINY),
    "qwen2": transformers.Qwen2Config(**TINY, num_key_value_heads=2),
    "qwen3": transformers.Qwen3Config(**TINY, num_key_value_heads=2, head_dim=8),
    "mistral": transformers.MistralConfig(**TINY, num_key_value_heads=2),
    "gpt2": transformers.GPT2Config(vocab_size=TINY["vocab_size"], n_embd=32, n_layer=2, n_head=4, n_positions=128),
    "gpt_neox": transformers.GPTNeoXConfig(**TINY),
    "opt": transformers.OPTConfig(vocab_size=TINY["vocab_size"], hidden_size=32, ffn_dim=64, num_hidden_layers=2,
                                  num_attention_heads=4, max_position_embeddings=128, word_embed_proj_dim=32),
    "phi3": transformers.Phi3Config(**TINY, num_key_value_heads=2, pad_token_id=0),
    "gemma": transformers.GemmaConfig(**TINY, head_dim=8, num_key_value_heads=2),
    "gemma3": transformers.Gemma3TextConfig(**TINY, head_dim=8, num_key_value_heads=2, sliding_window=64),
    "falcon": transformers.FalconConfig(vocab_size=TINY["vocab_size"], hidden_size=32, num_hidden_layers=2,
                                        num_attention_heads=4, alibi=False, max_position_embeddings=128),
}
SEPARATES = {  # models that cannot
    "bloom": transformers.BloomConfig(vocab_size=TINY["vocab_size"], hidden_size=32, n_layer=2, n_head=4),
    "falcon-alibi": transformers.FalconConfig(vocab_size=TINY["vocab_size"], hidden_size=32, num_hidden_layers=2,
                                              num_attention_heads=4, alibi=True),
    "mistral-window": transformers.MistralConfig(**TINY, num_key_value_heads=2, sliding_window=4),
}


def load(config, tmp_path, tokenizer, **kwargs):
    config.save_pretrained(tmp_path)
    args = settings(max_length=32, **kwargs)
    return common.load_reward_model(f"{tmp_path}/config.json", tokenizer, torch.device("cpu"), args)


def plain_rewards(model, rows=ROWS):
    """The definition: every prompt with one response alone, through the classifier's own forward pass."""
    return torch.tensor([[model(torch.tensor([p + y])).logits.item() for y in r] for p, r in rows])


def test_collate():
    batch = common.collate(DATA, [0, 1], "cpu")
    assert batch.input_ids.tolist() == [[1, 5, 6, 7, 8, 9, 2, 10, 11, 12, 13, 2],
                                        [1, 20, 21, 22, 23, 24, 25, 26, 27, 2, 2, 0]]
    assert batch.branch.tolist() == [[0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 2], [0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, -1]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 5, 6, 4, 5, 6, 7, 8], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 2, 0]]
    assert batch.tree.tolist() == [[0] * 11 + [0], [1] * 11 + [-1]]
    assert batch.ends.tolist() == [[3, 6, 11], [12 + 1, 12 + 9, 12 + 10]]
    assert batch.index.tolist() == [0, 1] and common.collate(DATA, [], "cpu").index.tolist() == []


def test_collate_packs():
    """One prompt behind the other, in a row whose length is a multiple of the width."""
    batch = common.collate(DATA, [1, 0], "cpu", 16)
    said = [1, 20, 21, 22, 23, 24, 25, 26, 27, 2, 2, 1, 5, 6, 7, 8, 9, 2, 10, 11, 12, 13, 2]
    assert batch.input_ids.tolist() == [said + [0] * 9]
    assert batch.tree.tolist() == [[0] * 11 + [1] * 12 + [-1] * 9]
    assert batch.branch.tolist() == [[0, 0] + [1] * 8 + [2] + [0] * 4 + [1] * 3 + [2] * 5 + [-1] * 9]
    assert batch.positions.tolist() == [[*range(10), 2, *range(7), *range(4, 9)] + [0] * 9]
    assert batch.ends.tolist() == [[1, 9, 10], [14, 17, 22]] and batch.index.tolist() == [1, 0]


def test_tree_mask_by_hand():
    rows = [{"prompt_ids": [1, 1], "response_ids": [[2], [2, 2]], "length": 5}] * 2
    mask = common.tree_mask(common.collate(Dataset.from_list(rows[:1]), [0], "cpu", 6))
    assert mask.shape == (1, 1, 6, 6)
    both = common.tree_mask(common.collate(Dataset.from_list(rows), [0, 1], "cpu", 10))[0, 0]
    assert torch.equal(both == 0, torch.block_diag(*[mask[0, 0, :5, :5] == 0] * 2))
    assert set(mask.unique().tolist()) == {0, float("-inf")}
    assert (mask[0, 0, :5] == 0).int().tolist() == [
        [1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0], [1, 1, 0, 1, 0, 0], [1, 1, 0, 1, 1, 0]]
    assert (mask[0, 0, 5] == 0).any()  # a padded query that sees nothing would be NaN


def test_separate_rows_by_hand():
    batch = common.collate(DATA, [0, 1], "cpu")
    places, mask = common.separate_rows(batch)
    ids, positions = batch.input_ids.flatten()[places], batch.positions.flatten()[places]
    assert [row[m == 1].tolist() for row, m in zip(ids, mask)] == [p + y for p, r in ROWS[:2] for y in r]
    assert [row[m == 1].tolist() for row, m in zip(positions, mask)] == [
        list(range(len(p + y))) for p, r in ROWS[:2] for y in r]


@pytest.mark.parametrize("name", SHARES)
def test_shared_prompts_score_as_rows_alone(name, tmp_path, tokenizer):
    model = load(SHARES[name], tmp_path, tokenizer).eval()
    assert model.layout == "shared"
    with torch.no_grad():
        rewards, features = model(common.collate(DATA, [0, 1, 2], "cpu"), with_features=True)
        torch.testing.assert_close(rewards, plain_rewards(model.model), rtol=0, atol=2e-5)
        torch.testing.assert_close(model.model.score(features)[..., 0], rewards)
        model.layout = "separate"
        torch.testing.assert_close(model(common.collate(DATA, [0, 1, 2], "cpu")), rewards, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", SEPARATES)
def test_models_that_cannot_share_get_separate_rows(name, tmp_path, tokenizer, capsys):
    sharded = load(SEPARATES[name], tmp_path, tokenizer, dtype="bfloat16")
    assert all(isinstance(p, DTensor) for p in sharded.parameters())  # also after an attempt that failed
    model = load(SEPARATES[name], tmp_path, tokenizer).eval()
    assert "it reads the prompt with each" in capsys.readouterr().out
    assert model.layout == "separate"
    with torch.no_grad():
        rewards = model(common.collate(DATA, [0, 1, 2], "cpu"))
        torch.testing.assert_close(rewards, plain_rewards(model.model), rtol=0, atol=2e-5)


def gradients(model, batch):
    """Of the sum of squares of its rewards, by name."""
    model.zero_grad()
    model(batch).pow(2).sum().backward()
    grads = {name: p.grad.clone() for name, p in model.model.named_parameters()}
    return {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in grads.items()}


@pytest.fixture
def flex(monkeypatch):
    """FlexAttention as it is defined, without a kernel, in which form it has gradients on the CPU as well."""
    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *tensors: None)
    with torch.compiler.set_stance("force_eager"):
        yield


def test_gradients_equal_those_of_rows_alone(tmp_path, tokenizer):
    model = load(SHARES["llama"], tmp_path, tokenizer)
    shared = gradients(model, common.collate(DATA, [0, 1, 2], "cpu"))
    model.zero_grad()
    for p, r in ROWS:
        for y in r:
            model.model(torch.tensor([p + y])).logits.pow(2).sum().backward()
    for name, p in model.model.named_parameters():
        torch.testing.assert_close(shared[name], p.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name, checkpointing", [
    ("llama", False), ("llama", True), ("qwen3", False), ("gpt_neox", False), ("gemma", False)])
def test_flex_attention_reads_packed_rows_as_rows_alone(name, checkpointing, flex, tmp_path, tokenizer):
    """Rewards, and gradients, which are those of the other path."""
    model = load(SHARES[name], tmp_path, tokenizer, attention="flex", gradient_checkpointing=checkpointing)
    assert model.layout == "packed" and model.model.config._attn_implementation == "flex_attention"
    assert all(hasattr(layer.forward, "_torchdynamo_orig_callable") for layer in common.decoder_layers(model))
    assert all(w.grad is None for w in model.parameters())  # nothing is left of trying it out
    batch = common.collate(DATA, [2, 0, 1], "cpu", common.pack_width(model, 64))
    assert batch.input_ids.shape == (1, 40)
    other = load(SHARES[name], tmp_path, tokenizer)
    ours, theirs = gradients(model, batch), gradients(other, common.collate(DATA, [0, 1, 2], "cpu"))
    for key in theirs:
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-3, atol=1e-5)
    rewards = plain_rewards(other.model)
    for micro_tokens in (1, 64):
        torch.testing.assert_close(common.score(model, DATA, micro_tokens), rewards, rtol=0, atol=2e-5)


def test_flex_attention_is_refused_where_it_fails(flex, tmp_path, tokenizer, monkeypatch):
    for name, why in (("mistral-window", "features are off"), ("bloom", "leave it at sdpa")):
        with pytest.raises(SystemExit, match=f"^error: --attention flex: .*{why}"):
            load(SEPARATES[name], tmp_path, tokenizer, attention="flex")
    monkeypatch.setattr(torch.Tensor, "backward", lambda *_: 1 / 0)
    with pytest.raises(SystemExit, match="ZeroDivisionError.*; leave it at sdpa"):
        load(SHARES["llama"], tmp_path, tokenizer, attention="flex")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_compiled_layers_trace_whole(dtype, checkpointing, tmp_path, tokenizer, monkeypatch):
    """What a GPU would compile, forwards and backwards, in bf16 under FSDP: the graph of a layer with FlexAttention in
    it has no break, serves all layers, and is checkpointed if asked for; batches of the same width as the row that was
    tried out need none of their own."""
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *tensors: None)
    counter, compiling = CompileCounterWithBackend("aot_eager"), torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **kwargs: compiling(f, **kwargs, backend=counter, fullgraph=True))
    flags = {"gradient_checkpointing": checkpointing, "dtype": dtype, "micro_tokens": 256}
    model = load(SHARES["llama"], tmp_path, tokenizer, attention="flex", **flags)
    monkeypatch.setattr(torch, "compile", compiling)
    assert model.layout == "packed"
    graphs = [*counter.graphs]  # the last one that of packed rows
    plain = load(SHARES["llama"], tmp_path, tokenizer, **flags)
    for index in ([0, 1], [2, 0]):
        ours = gradients(model, common.collate(DATA, index, "cpu", 64))
        theirs = gradients(plain, common.collate(DATA, index, "cpu"))
        for key in theirs:
            far = (ours[key] - theirs[key]).norm() / theirs[key].norm()
            assert far < (1e-4 if dtype == "float32" else 0.1), key
    assert counter.graphs == graphs
    checkpointed = any("checkpoint" in str(node.target) for node in graphs[-1].graph.nodes)
    assert checkpointed == checkpointing


def test_padding_does_not_change_a_score(tmp_path, tokenizer):
    model = load(SHARES["llama"], tmp_path, tokenizer)
    together = common.score(model, DATA, 10_000)
    alone = common.score(model, DATA, 1)  # every row longer than the budget: one by one
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)
    assert together.dtype == torch.float32 and together.shape == (3, 2) and model.training


def test_micro_batch_without_rows_has_zero_gradient(tmp_path, tokenizer):
    model = load(SHARES["llama"], tmp_path, tokenizer)
    rewards = model(common.collate(DATA, [], "cpu"))
    assert rewards.shape == (0, 2)
    rewards.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters() if p.requires_grad)


def test_head_and_dropout(tmp_path, tokenizer):
    config = transformers.GPT2Config(vocab_size=TINY["vocab_size"], n_embd=1024, n_layer=1, n_head=4, n_positions=128)
    model = load(config, tmp_path, tokenizer)
    assert model.model.score.weight.std().item() == pytest.approx(1 / np.sqrt(1025), rel=0.1)  # 4.5 sigma
    assert model.training and not [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout) and m.p]
    assert model.model.config.pad_token_id == tokenizer.pad_token_id


def test_seed_decides_the_head_alone(llama, tokenizer):
    def build(seed):
        return common.load_reward_model(llama, tokenizer, torch.device("cpu"), settings(seed=seed)).state_dict()
    a, b, c = build(0), build(0), build(1)
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert [key for key in a if not torch.equal(a[key], c[key])] == ["model.score.weight"]


def test_a_trained_head_is_kept(llama, tmp_path, tokenizer):
    model = AutoModelForSequenceClassification.from_pretrained(llama, num_labels=1)
    torch.nn.init.constant_(model.score.weight, 0.5)
    model.save_pretrained(tmp_path)
    loaded = common.load_reward_model(tmp_path, tokenizer, torch.device("cpu"), settings(max_length=32))
    assert (loaded.model.score.weight == 0.5).all()


def test_bf16_keeps_head_and_weights_in_fp32(tmp_path, tokenizer):
    SHARES["llama"].save_pretrained(tmp_path)
    model = common.load_reward_model(
        f"{tmp_path}/config.json", tokenizer, torch.device("cpu"), settings(max_length=32, dtype="bfloat16"))
    assert model.layout == "shared" and {p.dtype for p in model.parameters()} == {torch.float32}
    rewards, features = model(common.collate(DATA, [0, 1, 2], "cpu"), with_features=True)
    assert rewards.dtype == torch.float32
    weight = model.model.score.weight.full_tensor()[0].double()
    torch.testing.assert_close(rewards, (features.double() @ weight).float())


def test_gradient_checkpointing_changes_nothing(tmp_path, tokenizer):
    gradients = []
    for checkpointing in (False, True):
        model = load(SHARES["llama"], tmp_path, tokenizer, gradient_checkpointing=checkpointing)
        assert model.model.is_activation_checkpointing == checkpointing
        model(common.collate(DATA, [0, 1, 2], "cpu")).pow(2).sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("config, words", [
    (transformers.BertConfig(**TINY), "not a decoder"),
    (transformers.T5Config(vocab_size=TINY["vocab_size"], d_model=32, num_layers=1, num_heads=4), "not a decoder"),
])
def test_encoders_are_refused(config, words, tmp_path, tokenizer):
    with pytest.raises(SystemExit, match=words):
        load(config, tmp_path, tokenizer)


def test_what_is_no_reward_model_is_refused(llama, tmp_path, tokenizer):
    transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**TINY)).save_pretrained(tmp_path)  # 2 labels
    for name, flag, words in ((tmp_path, "--model", "2 labels"), (tmp_path, "--reward-model", "2 labels"),
                              (llama, "--reward-model", "no reward model: it lacks score.weight")):
        with pytest.raises(SystemExit, match=f"^error: {flag} {name}.* {words}"):
            common.load_reward_model(name, tokenizer, torch.device("cpu"), settings(max_length=32), flag=flag)


def test_incomplete_weights_are_refused(llama, tmp_path, tokenizer):
    model = transformers.LlamaForCausalLM.from_pretrained(llama)
    weights = {k: v for k, v in model.state_dict().items() if "layers.1.mlp.up_proj" not in k}
    model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(SystemExit, match="lack 1 weights, model.layers.1.mlp.up_proj.weight"):
        common.load_reward_model(tmp_path, tokenizer, torch.device("cpu"), settings(max_length=32))
