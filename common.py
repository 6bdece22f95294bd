"""What all scripts share: processes, data, the batch, the reward model, checkpoints and the log. No loss, no loop.

One data structure serves every method: a prompt with k responses (a comparison has k = 2). The prompt is computed once:

    input_ids       prompt | response 1 | response 2 | padding     A token attends to the earlier tokens of the prompt
    segments        0 0 0    1 1          2 2 2        -1 -1       and of its own response, and has the position that
    position_ids    0 1 2    3 4          3 4 5         0  0       it would have if its response stood there alone.
"""

import argparse
import atexit
import json
import math
import os
import re
import shutil
import sys
import time
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers
from datasets.fingerprint import Hasher
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_state_dict
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

RANK = int(os.environ.get("RANK", 0))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))


def fatal(message):
    """End the run with one line on stderr and exit code 1."""
    raise SystemExit(f"error: {' '.join(str(message).split())[:500]}")


def print0(text):
    """Print a line on rank 0, above the progress bar."""
    if RANK == 0:
        tqdm.write(text)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """--help with the docstring as it stands and the default of every flag."""


def in_range(kind, low, high=math.inf):
    """An argparse type: an int or float from `low` to `high`."""
    def parse(text):
        if not low <= kind(text) <= high:
            raise ValueError
        return kind(text)
    parse.__name__ = f"{kind.__name__} from {low:g} to {high:g}"  # argparse: "invalid float from 0 to 1 value: '2'"
    return parse


def setup():
    """Join the processes that torchrun started, or be the only one; -> the device of this rank."""
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(LOCAL_RANK)
    if not dist.is_initialized():
        store = None if "RANK" in os.environ else dist.HashStore()
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", store=store, rank=RANK, world_size=WORLD_SIZE)
        atexit.register(time.sleep, 0.5 if WORLD_SIZE > 1 else 0)  # gloo's threads still need Python: pytorch #190489
        atexit.register(dist.destroy_process_group)  # which runs first
    transformers.utils.logging.set_verbosity_error()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it logs as an error, it raises as well
    if RANK > 0 or not sys.stderr.isatty():
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()
    return torch.device(f"cuda:{LOCAL_RANK}" if cuda else "cpu")


def named_source(text):
    """An argparse type: NAME=SOURCE -> (name, source)."""
    name, source = text.split("=", 1)
    return name, source


def load_rows(source, split="train"):
    """Raw rows of a .jsonl, .json (also .gz) or .parquet file or hub data set (id[[:config]:split]); exits if none."""
    path, *parts = source.split(":")
    try:
        if re.search(r"\.(json|jsonl|parquet)(\.gz)?$", source):
            rows = datasets.load_dataset("parquet" if ".parquet" in path else "json", data_files=source, split="train")
        else:
            *config, split = parts or [split]
            rows = datasets.load_dataset(path, *config, split=split)
    except Exception as error:
        fatal(f"{source}: {error.__cause__ or error!r}")
    return rows if len(rows) else fatal(f"{source}: no rows")


def transcript(turns):
    """Turns without names, the last one the assistant's -> '\\n\\nHuman: ...\\n\\nAssistant: ...'."""
    speakers = ["Assistant" if (len(turns) - i) % 2 else "Human" for i in range(len(turns))]
    return "".join(f"\n\n{speaker}: " + turn for speaker, turn in zip(speakers, turns))


def read_row(row):
    """One raw row in any known form -> prompt and list of responses, as texts or as lists of messages. The prompt is
    None if chosen and rejected answer different ones. Raises an error if the row has no known form."""
    prompt = row.get("prompt")
    if row.get("responses") and not row.get("chosen"):
        return prompt, row["responses"]
    pair = [row["chosen"], row["rejected"]]
    if pair[0] and isinstance(pair[0][0], dict):  # conversations, which may repeat the prompt
        if any(messages[-1]["role"] != "assistant" for messages in pair):
            raise ValueError("'chosen' or 'rejected' does not end with a message of the assistant")
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        heads = [messages[:-1] for messages in pair]
        if prompt and not {str(x["content"]).strip() for x in prompt} <= {str(x["content"]).strip() for x in heads[0]}:
            heads = [prompt + head for head in heads]
        return heads[0] if heads[0] == heads[1] else None, [messages[-1:] for messages in pair]
    if isinstance(pair[0], list):  # the authors' release
        pair = [transcript(turns) for turns in pair]
    if prompt:
        both_repeat_it = all(text.startswith(prompt) for text in pair)
        return prompt, [text.removeprefix(prompt) for text in pair] if both_repeat_it else pair
    heads, marks, responses = zip(*(text.rpartition("\n\nAssistant:") for text in pair))
    if not all(marks):
        raise ValueError("no 'prompt', and 'chosen' and 'rejected' have no '\\n\\nAssistant:' turn")
    return heads[0] + marks[0] if heads[0] == heads[1] else None, list(responses)


def to_ids(texts, tokenizer, is_chat):
    """Texts -> lists of token ids with one BOS, where the tokenizer or the chat template has one, and without EOS."""
    bos, rows = tokenizer.bos_token_id, tokenizer(texts, add_special_tokens=not is_chat).input_ids
    rows = [ids[1:] if ids[:2] == [bos, bos] else ids for ids in rows]  # the text already had one
    return [ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids for ids in rows]


def encode(prompt, responses, tokenizer, max_length):
    """A prompt and k responses, texts or lists of messages -> prompt_ids, k response_ids that end in one EOS, and
    whether the prompt was truncated. The prompt is the common prefix of the k full texts. If a text is longer than
    `max_length`, the prompt loses its oldest tokens, but not the BOS; it is [] if nothing is left."""
    texts = [prompt + response for response in responses]
    if isinstance(prompt, list):
        texts = [tokenizer.apply_chat_template(messages, tokenize=False).rstrip() for messages in texts]
    ids = [[*x, tokenizer.eos_token_id] for x in to_ids(texts, tokenizer, is_chat=isinstance(prompt, list))]
    length = min(len(os.path.commonprefix(ids)), min(map(len, ids)) - 1)  # a response keeps its EOS
    start = 1 if ids[0][0] == tokenizer.bos_token_id else 0
    # UNSTATED: the paper is silent about long rows; the authors' code skips those whose last turn alone is too long.
    surplus = max(0, max(map(len, ids)) - max_length)
    rest = ids[0][start + surplus : length]
    return ids[0][:start] + rest if rest else [], [x[length:] for x in ids], surplus > 0


def tokenize(rows, source, tokenizer, max_length, k=2):
    """Raw rows -> data set with prompt_ids, response_ids, length (tokens, the prompt once), row (number of the raw row)
    and the other raw columns. Rows that cannot be used are dropped and counted. Exits if a row has no known form, if
    none can be used or not all have k responses (None: equally many), or if the tokenizer does not know the words."""
    def encode_row(row, number):
        prompt_ids, response_ids, truncated = [], [], False
        try:
            prompt, responses = read_row({key: x for key, x in row.items() if x is not None})
            texts = [x if isinstance(x, str) else x[-1]["content"] for x in responses]
            if prompt and all(x.strip() for x in texts) and len(set(texts)) > 1:
                prompt_ids, response_ids, truncated = encode(prompt, responses, tokenizer, max_length)
        except Exception as error:  # a chat template raises what it likes
            raise ValueError(f"row {number + 1}: {error!r}") from None
        length = len(prompt_ids) + sum(map(len, response_ids)) if prompt_ids else 0
        return {"prompt_ids": prompt_ids or [0], "response_ids": response_ids or [[0]], "k": len(response_ids),
                "length": length, "row": number, "truncated": truncated}

    key = Hasher.hash([Path(__file__).read_text(), rows._fingerprint, tokenizer.backend_tokenizer.to_str(),
                       tokenizer.chat_template, tokenizer.special_tokens_map, max_length])
    if LOCAL_RANK > 0:  # the first rank of a machine fills the cache for the others
        dist.barrier()
    try:
        data = rows.map(encode_row, with_indices=True, new_fingerprint=key, desc=f"tokenising {source}",
                        num_proc=os.cpu_count() if len(rows) > 20_000 else None,
                        remove_columns={"prompt", "chosen", "rejected", "responses"} & {*rows.column_names})
    except ValueError as error:
        fatal(f"{source}: {error}")
    if LOCAL_RANK == 0:
        dist.barrier()
    data = data.select(np.flatnonzero(data["length"][:]))
    print0(f"{source}: {len(data):,} of {len(rows):,} rows, {sum(data['truncated'][:]):,} prompts truncated")
    if len(data) == 0:
        fatal(f"{source}: no usable row: prompts differ, responses are equal, one is empty, or the row is too long")
    if set(data["k"][:]) != {k or data[0]["k"]}:
        fatal(f"{source}: rows have {sorted(set(data['k'][:]))} responses, which must be {k or 'equally many'}")
    if np.mean(np.concatenate(data[:100]["prompt_ids"]) == tokenizer.unk_token_id) > 0.5:
        fatal(f"{source}: most tokens of the prompts are unknown to the tokenizer: choose a --model for such text")
    return data


def load_sets(pairs, tokenizer, max_length):
    """(name, source) pairs -> {name: tokenised data set}."""
    return {name: tokenize(load_rows(source, "test"), source, tokenizer, max_length) for name, source in pairs}


def load_tokenizer(name):
    """The tokenizer of a folder or hub id. Its pad token is never EOS; otherwise the scored token would be masked."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:
        fatal(f"no tokenizer in {name}: {error!r}")
    tokenizer("a")  # a call clears padding set in its file, which would make cache keys and saved files depend on calls
    if tokenizer.eos_token is None:
        fatal(f"the tokenizer of {name} has no EOS token, and every response must end in one")
    if tokenizer.pad_token in (None, tokenizer.eos_token):
        tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    if isinstance(tokenizer.chat_template, str):  # Llama 3's inserts today's date: pin it, for reproducible scores
        tokenizer.chat_template = re.sub(r"strftime_now\(.*?\)", "'01 Jan 2024'", tokenizer.chat_template)
    return tokenizer


class Batch(NamedTuple):
    """B prompts with k responses each, in R = B rows of T tokens or, if prompts are not shared, in R = B k rows."""
    index: np.ndarray           # (B,) row numbers; empty on a rank without rows, whose tensors hold row 0
    input_ids: torch.Tensor     # (R, T)
    segments: torch.Tensor      # (R, T) 0 for the prompt, j for response j, -1 for padding
    position_ids: torch.Tensor  # (R, T)
    row: torch.Tensor           # (B, k) the row of each response
    last: torch.Tensor          # (B, k) and the column of its last token


def collate(data, index, device, share):
    """Rows `index` of a tokenised data set -> Batch. T is a multiple of 8, or SDPA copies the mask in every layer."""
    examples = data.select_columns(["prompt_ids", "response_ids"])[index if len(index) else [0]]
    input_ids, segments, position_ids, row, last = [], [], [], [], []
    for prompt, responses in zip(examples["prompt_ids"], examples["response_ids"]):
        for j, response in enumerate(responses, 1):
            if j == 1 or not share:  # a new row
                input_ids.append([*prompt])
                segments.append([0] * len(prompt))
                position_ids.append([*range(len(prompt))])
            input_ids[-1] += response
            segments[-1] += [j] * len(response)
            position_ids[-1] += range(len(prompt), len(prompt) + len(response))
            row.append(len(input_ids) - 1)
            last.append(len(input_ids[-1]) - 1)
    width = 8 * math.ceil(max(map(len, input_ids)) / 8)
    def pad(rows, value):
        return torch.tensor([x + [value] * (width - len(x)) for x in rows], device=device)
    row, last = (torch.tensor(x, device=device).view(-1, len(responses))[: len(index)] for x in (row, last))
    return Batch(np.asarray(index, int), pad(input_ids, 0), pad(segments, -1), pad(position_ids, 0), row, last)


def tree_mask(segments, dtype):
    """Segments (R, T) -> mask (R, 1, T, T): 0 for earlier tokens of the prompt and of the same segment, else -inf."""
    query, key = segments[:, :, None], segments[:, None, :]
    allowed = ((key == 0) | (key == query)).tril()
    return torch.zeros_like(allowed, dtype=dtype).masked_fill_(~allowed, -torch.inf)[:, None]


def batch_indices(n, batch_size, seed, step):
    """Row numbers of one optimizer step (batch_size,), equal on all ranks: the next ones in the epoch's permutation."""
    epoch, i = divmod(step, math.ceil(n / batch_size))
    return np.random.default_rng((seed, epoch)).permutation(n)[i * batch_size : (i + 1) * batch_size]


def micro_batches(data, index, micro_tokens, model):
    """Yield this rank's rows of `index`, longest first, as Batches of at most `micro_tokens` padded tokens or one row,
    as many on every rank. Rows join while their padding costs less than one more pass, 1/8 of `micro_tokens`."""
    lengths = 8 * np.ceil(np.array(data.select_columns(["length"])[index]["length"]) / 8)  # as `collate` pads
    order = np.argsort(-lengths, kind="stable")
    while len(order):
        longest = lengths[order[0]]
        similar = np.sum(np.cumsum(longest - lengths[order]) <= WORLD_SIZE * micro_tokens / 8)
        count = WORLD_SIZE * max(1, min(int(micro_tokens // longest), math.ceil(similar / WORLD_SIZE)))
        yield collate(data, index[order[:count][RANK::WORLD_SIZE]], model.device, model.share)
        order = order[count:]


class RewardModel(torch.nn.Module):
    """A Hugging Face sequence classifier with one label, read at the last token of each response. Weights, scores and
    features are fp32, FSDP computes in `dtype`, and `share` says whether rows share a prompt (see `Batch`)."""
    def __init__(self, model, dtype, device):
        super().__init__()
        self.hf_model, self.dtype, self.device, self.share = model, dtype, device, True

    def inputs(self, batch):
        """The arguments of a transformers decoder for a batch in either layout."""
        mask = tree_mask(batch.segments, self.dtype) if self.share else (batch.segments >= 0).long()
        return dict(input_ids=batch.input_ids, attention_mask=mask, position_ids=batch.position_ids, use_cache=False)

    def forward(self, batch, at=None, with_features=False):
        """Batch -> rewards (B, k); with_features: also the hidden states (B, k, hidden) that the head reads. `at`:
        index tensors (row, column) of any shape, to read there instead of at the last tokens."""
        hidden = self.hf_model.base_model(**self.inputs(batch)).last_hidden_state
        features = hidden[at or (batch.row, batch.last)].float()
        rewards = self.hf_model.score(features).sum(-1)  # of the one label
        return (rewards, features) if with_features else rewards


def load_pretrained(auto_class, name, flag, **changes):
    """-> fp32 model of a folder or hub id, dropout off, and the set of weights that its files lack."""
    try:
        config = AutoConfig.from_pretrained(name, **changes)
        for part in (config, config.get_text_config()):
            part.update({key: 0.0 for key, x in part.to_dict().items() if "drop" in key and isinstance(x, float)})
        model, info = auto_class.from_pretrained(name, config=config, dtype=torch.float32, output_loading_info=True)
    except Exception as error:
        fatal(f"{flag} {name}: {error!r}")
    return model, set(info["missing_keys"])


def load_reward_model(name, tokenizer, device, args, flag="--model"):
    """A RewardModel from a folder or hub id: a reward model or, if `flag` is --model, a language model, which gets a
    head seeded by args.seed. Exits on anything but a decoder with a linear `score` head of one label."""
    torch.manual_seed(args.seed)
    model, missing = load_pretrained(AutoModelForSequenceClassification, name, flag, num_labels=1)
    if model.config.is_encoder_decoder or not isinstance(getattr(model, "score", None), torch.nn.Linear):
        fatal(f"{flag} {name}: {type(model).__name__} is not a decoder with a linear `score` head")
    if missing and (flag != "--model" or missing != {"score.weight"}):
        fatal(f"{flag} {name} is no reward model: its files lack {', '.join(sorted(missing))}")
    if missing:  # UNSTATED: the paper gives no init of the head; this is the usual one
        torch.nn.init.normal_(model.score.weight, std=1 / math.sqrt(model.score.in_features + 1))
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer))
    model.config.pad_token_id = model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return prepare(RewardModel(model, getattr(torch, args.dtype), device), args)


def decoder_layers(model):
    """The decoder layers: transformers' `_no_split_modules`."""
    names = model.hf_model._no_split_modules or ()
    return [x for x in model.modules() if type(x).__name__.removeprefix("FSDP") in names]  # FSDP renames their class


def prepare(model, args):
    """Shard a RewardModel or Policy with FSDP2, cast to args.dtype; exits if it has too few positions. -> the model"""
    positions = getattr(model.hf_model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    if args.max_length > positions:
        fatal(f"--max-length {args.max_length}: {model.hf_model.name_or_path} has {positions} positions")
    if args.gradient_checkpointing:
        model.hf_model.activation_checkpointing_enable({"use_reentrant": False})
    if WORLD_SIZE > 1 or model.dtype != torch.float32 or args.offload:
        kwargs = {"offload_policy": CPUOffloadPolicy(pin_memory=model.device.type == "cuda")} if args.offload else {}
        mixed = MixedPrecisionPolicy(param_dtype=model.dtype, reduce_dtype=torch.float32)
        heads = [model.hf_model.score] if hasattr(model.hf_model, "score") else []  # which stay in fp32
        for module in (*decoder_layers(model), *heads, model):
            policy = MixedPrecisionPolicy() if module in heads else mixed
            fully_shard(module, mp_policy=policy, reshard_after_forward=True, **kwargs)
            if WORLD_SIZE > 1:  # sum gradients: losses are divided by the global count already
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
    model.to("cpu" if args.offload else model.device)
    model.share = can_share_prompts(model, args.max_length)
    return model.train()


@torch.no_grad()
def can_share_prompts(model, max_length):
    """Whether two responses behind one prompt get the features of separate rows; not with ALiBi or recurrent layers."""
    features, size = [], (3, max(1, max_length // 2))
    prompt, *responses = np.random.default_rng(0).integers(model.hf_model.config.get_text_config().vocab_size, size=size)
    data = datasets.Dataset.from_dict({"prompt_ids": [prompt], "response_ids": [responses]})
    try:
        for model.share in (False, True):
            features.append(model(collate(data, [0], model.device, model.share), with_features=True)[1])
        error = (features[1] - features[0]).norm() / features[0].norm()  # rounding: 1e-6, in bf16 0.01; else about 1
    except Exception as exception:
        error = math.inf
        print0(f"shared prompts fail: {exception!r}")
        if isinstance(model, FSDPModule):
            model.reset_iter_state()  # or some weights would stay gathered
    if error < (1e-3 if model.dtype == torch.float32 else 0.05):
        return True
    print0("this model cannot share prompts: each response gets a row of its own, which is slower")
    return False


def clip_gradients(model, max_norm):
    """Scale the gradients, sharded over the ranks, to a norm of at most `max_norm` (0: any); -> the norm before."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm or math.inf)
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()


@torch.no_grad()
def compute_rewards(model, data, micro_tokens, with_features=False):
    """Rewards of all rows (N, k), fp32 on the CPU, equal on all ranks; with_features: also (N, k, hidden)."""
    rewards = torch.zeros(len(data), len(data[0]["response_ids"]))
    features = torch.zeros(*rewards.shape, model.hf_model.score.in_features if with_features else 0)
    batches = micro_batches(data, np.arange(len(data)), micro_tokens, model)
    model.eval()
    for batch in tqdm(batches, "scoring", leave=False, disable=RANK > 0 or not sys.stderr.isatty()):
        values = model(batch, with_features=True)
        rewards[batch.index] = values[0].cpu()
        if with_features:
            features[batch.index] = values[1].cpu()
    model.train()
    dist.all_reduce(rewards)
    dist.all_reduce(features)
    return (rewards, features) if with_features else rewards


def atomic_write(path, text):
    """Write a file under a temporary name, then rename it: a kill leaves the old file or the new one."""
    tmp = Path(f"{path}.{os.getpid()}.tmp")
    tmp.write_text(text)
    tmp.replace(path)


def run_state(model, optimizer):
    """{"model": ..., "optimizer": ...}, tensors by name: each rank's own shards, not copies; tied weights once."""
    weights, moments = get_state_dict(model, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=True))
    names = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    return {"model": {name: x for name, x in weights.items() if name in names},
            "optimizer": {name: x for name, x in moments.items() if torch.is_tensor(x)}}


def save_checkpoint(folder, model, optimizer, step):
    """Write <folder>/checkpoint-<step>, then remove older ones. Data order and randomness follow from seed and step."""
    tmp, older = Path(folder, "checkpoint.tmp"), [*Path(folder).glob("checkpoint-*")]
    if RANK == 0:
        shutil.rmtree(tmp, ignore_errors=True)
    dist.barrier()
    dcp.save(run_state(model, optimizer), storage_writer=HuggingFaceStorageWriter(tmp, save_distributed=True))
    if RANK == 0:
        tmp.rename(Path(folder, f"checkpoint-{step}"))
        for path in older:
            shutil.rmtree(path)


def load_checkpoint(folder, model, optimizer, step):
    """Load <folder>/checkpoint-<step> in place; any number of ranks may have written it."""
    state, reader = run_state(model, optimizer), HuggingFaceStorageReader(Path(folder, f"checkpoint-{step}"))
    saved = reader.read_metadata().state_dict_metadata  # a weight that never had a gradient has no moments
    state["optimizer"] = {name: x for name, x in state["optimizer"].items() if f"optimizer.{name}" in saved}
    dcp.load(state, storage_reader=reader)


def save_model(folder, model, tokenizer):
    """Write an ordinary Hugging Face folder; plain AutoModelForSequenceClassification gives the same scores."""
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if RANK == 0:
        model.hf_model.save_pretrained(folder, state_dict={k.removeprefix("hf_model."): x for k, x in weights.items()})
        tokenizer.save_pretrained(folder)
    print0(f"saved {folder}")
    dist.barrier()


def open_run(args, inputs, may_change=()):
    """Begin a run in --output-dir, where an earlier run is renamed, never overwritten. With --resume continue it if
    its flags, except `may_change`, and the files and folders in `inputs` are the same. -> its last step, or 0."""
    if len(dict(args.eval_data)) < len(args.eval_data):
        fatal("--eval-data: two sets have the same name")
    folder, path, metrics = (Path(args.output_dir, name) for name in ("", "args.json", "metrics.jsonl"))
    if folder.is_file() or any(x.suffix != ".tmp" for x in folder.glob("*")) and not path.exists():
        fatal(f"--output-dir {folder} has files that are not from a run: choose another folder")
    written = {str(x): x.stat().st_mtime for y in inputs if y for x in (Path(y), *Path(y).glob("*")) if x.is_file()}
    settings = json.loads(json.dumps({"script": Path(sys.argv[0]).name, **vars(args), "input file times": written}))
    old = json.loads(path.read_text()) if args.resume and path.exists() else {}
    for name in old.keys() - {"resume", "output_dir", "micro_batch_tokens", "save_every", *may_change}:
        if old[name] != settings.get(name):
            fatal(f"--resume: {name} is {settings.get(name)}, but was {old[name]} when the run in {folder} began")
    step = max((int(x.name.split("-")[1]) for x in folder.glob("checkpoint-*")), default=0) if old else 0
    dist.barrier()
    if RANK == 0:
        if path.exists() and not args.resume:
            number = next(i for i in range(1, 10**6) if not Path(f"{folder}.{i}").exists())
            print0(f"{folder} holds an earlier run, which is now {folder.rename(f'{folder}.{number}')}")
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write(path, json.dumps(settings, indent=1))
        lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
        atomic_write(metrics, "".join(x for x in lines if step and x.endswith("\n") and json.loads(x)["step"] <= step))
    dist.barrier()
    return step


def log(folder, step, metrics):
    """Append one record, {"step": ..., **metrics}, to <folder>/metrics.jsonl."""
    if RANK == 0:
        with open(f"{folder}/metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
