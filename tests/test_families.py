"""Every decoder of the installed transformers, tiny and random: layout, rewards and layers.

None is left out: each runs in fp32 at a tiny size. A new one is tested too."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import settings
from datasets import Dataset
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

import common

CPU = torch.device("cpu")
VOCABULARY = 64
SMALL = {  # what the configs call their sizes
    "vocab_size": VOCABULARY, "pad_token_id": 0,
    "hidden_size": 16, "n_embd": 16, "d_model": 16, "word_embed_proj_dim": 16,
    "intermediate_size": 32, "n_inner": 32, "ffn_dim": 32, "ffn_hidden_size": 32,
    "num_attention_heads": 2, "n_head": 2, "n_heads": 2, "num_heads": 2,
    "num_key_value_heads": 2, "num_kv_heads": 2, "head_dim": 8, "kv_channels": 8, "rotary_dim": 8,
    "max_position_embeddings": 2048, "n_positions": 2048, "max_seq_len": 2048,
    # latent attention and its index
    "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "index_head_dim": 8, "index_n_heads": 2,
    # mixtures of experts
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "n_group": 1, "topk_group": 1, "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    # recurrent layers
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2,
    "linear_num_value_heads": 2, "mamba_d_state": 4, "mamba_dt_rank": 4, "n_mamba_heads": 4,
    "attn_layer_period": 2, "attn_layer_offset": 1, "attention_hidden_size": 32,
    "attention_head_dim": 16, "adapter_rank": 8}
VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "depth": 1,
          "num_attention_heads": 2, "num_heads": 2, "out_hidden_size": 16,
          "num_position_embeddings": 16}
ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
SPECIAL = {  # what else a config needs
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE}},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "jamba": {"num_hidden_layers": 4},
    "mistral4": {"head_dim": 16},
    "zamba": {"num_hidden_layers": 4, "n_mamba_heads": 2,
              "layers_block_type": ["linear_attention", "hybrid"] * 2},
}
SLOW = {"axk2", "doge", "gemma2", "gpt_oss", "zamba"}  # seconds for 2,048 tokens in plain PyTorch: 512 there
SEPARATE = {  # families whose responses get rows of their own, and why
    "bloom": "ALiBi takes no tree mask",
    "gpt_neo": "every second layer sees the 256 columns before",
    "gpt_oss": "every second layer sees the 128 tokens before: from --max-length 129",
    "jamba": "recurrent layers (Mamba)",
    "minimax": "recurrent layers (lightning attention)",
    "mpt": "ALiBi counts columns",
    "openai-gpt": "takes no tree mask",
    "qwen3_5": "recurrent layers (gated delta net)",
    "qwen3_5_text": "recurrent layers (gated delta net)",
    "qwen3_next": "recurrent layers (gated delta net)",
    "zamba": "recurrent layers (Mamba)",
    "zamba2": "recurrent layers (Mamba 2)",
}
NOT_IN_BF16 = {  # families that FSDP cannot run in bf16, in either layout, and why
    "minimax": "an fp32 buffer meets bf16 weights",
    "openai-gpt": "an fp32 buffer meets bf16 weights",
    "zamba": "layers share weights",
}


@pytest.fixture(autouse=True, scope="module")
def two_threads():
    """2,048 tokens are worth a second thread."""
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def read_classes():
    """The sources of all classes in transformers' models, by name."""
    sources = {}
    for path in Path(transformers.__file__).parent.glob("models/*/modeling_*.py"):
        for source in re.split(r"^class ", path.read_text(), flags=re.MULTILINE)[1:]:
            sources[re.match(r"\w+", source)[0]] = source
    return sources


def find_families():
    """The model types that load_reward_model accepts: decoders with a linear `score` head."""
    sources = read_classes()
    names = []
    for name, class_name in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.items():
        source = sources[class_name]
        has_score = "self.score = nn.Linear" in source or "GenericForSequenceClass" in source
        if has_score and not transformers.CONFIG_MAPPING[name]().is_encoder_decoder:
            names.append(name)
    return sorted(names)


def tiny_config(name):
    """The default config, made small, with one layer of each kind, or two of one kind."""
    config_class = transformers.CONFIG_MAPPING[name]
    default = config_class()
    text = default.get_text_config()
    changes = {key: value for key, value in SMALL.items() if key in text.to_dict()}
    num_layers = 2
    for key, value in text.to_dict().items():
        if isinstance(value, list) and len(value) == text.num_hidden_layers:
            kinds = list(dict.fromkeys(value))
            changes[key] = kinds * 2 if len(kinds) == 1 else kinds
            num_layers = len(changes[key])
    changes[text.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = num_layers
    changes.update(SPECIAL.get(name, {}))
    if text is default:
        return config_class(**changes, num_labels=1)
    vision = {key: value for key, value in VISION.items() if key in default.vision_config.to_dict()}
    return config_class(text_config=changes, vision_config=vision, num_labels=1)


def tiny_model(name):
    """Random weights on the scale of trained ones: with smaller ones context hardly matters."""
    torch.manual_seed(0)
    config = tiny_config(name)
    model = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.25)
    return model


def random_rows(max_length):
    """Short and long responses behind each other, and behind a short and a long prompt."""
    random = np.random.default_rng(1)
    half = max_length // 2
    sizes = [[1, max_length - 1, 2, 4]]
    if max_length <= 64:
        sizes += [[half, half, 1, 3], [half, 1, half, 2]]
    rows = []
    for size in sizes:
        prompt, *responses = [random.integers(VOCABULARY, size=n).tolist() for n in size]
        rows.append({"prompt_ids": prompt, "response_ids": responses})
    return Dataset.from_list(rows)


@torch.no_grad()
def plain_rewards(model, data):
    """The definition: every text alone, through the classifier's own forward pass."""
    rewards = torch.zeros(len(data), 3)
    for i, row in enumerate(data):
        for j, response in enumerate(row["response_ids"]):
            rewards[i, j] = model(torch.tensor([row["prompt_ids"] + response])).logits.item()
    return rewards


@torch.no_grad()
def rewards_of(model, data):
    """Rewards (N, 3) in the layout that the model has, one row of data at a time."""
    batches = [common.collate(data, [i], CPU, model.share) for i in range(len(data))]
    return torch.cat([model(batch) for batch in batches])


def expect_shared(name, max_length):
    """Whether a family shares prompts; gpt_oss does if its window holds a text."""
    return name not in SEPARATE or (name == "gpt_oss" and max_length <= 128)


@pytest.mark.parametrize("name", find_families())
def test_family(name):
    """The layout is the right one, and gives the rewards of plain transformers."""
    hf_model = tiny_model(name)
    plain = {}
    model = common.RewardModel(hf_model, torch.float32, CPU)
    layers = common.decoder_layers(model)
    assert len(layers) == hf_model.config.get_text_config().num_hidden_layers
    for max_length in (16, 64, 512 if name in SLOW else 2048):
        data = random_rows(max_length)
        plain[max_length] = plain_rewards(hf_model, data)
        model.share = common.can_share_prompts(model, max_length)
        assert model.share == expect_shared(name, max_length)
        torch.testing.assert_close(rewards_of(model, data), plain[max_length], rtol=0, atol=1e-5)

    half = common.RewardModel(hf_model, torch.bfloat16, CPU)
    if name in NOT_IN_BF16:  # an error, and not a layout
        with pytest.raises((RuntimeError, ValueError)):
            common.prepare(half, settings(max_length=16))
        return

    common.prepare(half, settings(max_length=16)).eval()
    for max_length in (16, 64, 512) if name == "gpt_oss" else (16, 64):
        if max_length > 16:
            half.share = common.can_share_prompts(half, max_length)
        assert half.share == expect_shared(name, max_length)
        error = (rewards_of(half, random_rows(max_length)) - plain[max_length]).abs()
        assert error.median() < 0.15  # rounding may choose other experts for a token


@pytest.mark.parametrize("name", ["jamba", "qwen3_5_text", "qwen3_next"])
def test_weak_leaks(name):
    """With the config's own small weights a leak is smaller than what bf16 rounds."""
    torch.manual_seed(0)
    hf_model = transformers.AutoModelForSequenceClassification.from_config(tiny_config(name)).eval()
    half = common.prepare(
        common.RewardModel(hf_model, torch.bfloat16, CPU), settings(max_length=2048))
    shares = half.share
    assert not shares


@pytest.mark.parametrize("name", find_families())
def test_dropout_gives_two_views(name, tmp_path):
    """In training mode the seed decides, and nothing else."""
    tiny_model(name).save_pretrained(tmp_path)
    if name == "diffllama":  # stops with an error instead
        with pytest.raises(SystemExit):
            load_with_dropout(tmp_path)
        return
    model = common.RewardModel(load_with_dropout(tmp_path), torch.float32, CPU)
    batch = common.collate(random_rows(16), [0], CPU, share=False)
    model.share = False
    views = []
    for seed in (0, 1, 0):
        torch.manual_seed(seed)
        views.append(model(batch))
    assert torch.equal(views[0], views[2])
    assert torch.equal(views[0], views[1]) == (name == "mpt")  # which has none where its config is read


def load_with_dropout(folder):
    auto_class = transformers.AutoModelForSequenceClassification
    return common.load_pretrained(auto_class, folder, "--model", 0.5, num_labels=1)[0].train()


def test_lists_name_families():
    assert {*SEPARATE, *NOT_IN_BF16, *SLOW, *SPECIAL} <= {*find_families()}
