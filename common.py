"""What the scripts share and no reader of the papers would ask about: processes, data, the batch, the model's head,
the order of a run, checkpoints, the log, and a toy world to try everything on. No loss, no training loop.

One structure serves all of them: a prompt with k responses (a comparison has k = 2). A row never repeats the prompt:

    row:        prompt | response 1 | response 2 | padding          A token sees an earlier one in the prompt or in its
    branch:     0 0 0    1 1          2 2 2        -1 -1            own branch, so the responses cannot see each other
    positions:  0 1 2    3 4          3 4 5         0  0            and each stands where it would stand alone.
"""

import atexit
import collections
import datetime
import functools
import gc
import gzip
import heapq
import importlib.util
import inspect
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import time
import warnings
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers
from datasets.fingerprint import Hasher
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.attention.flex_attention import create_block_mask
from tqdm.auto import tqdm
from transformers import (
    AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast)

RANK, LOCAL_RANK, WORLD = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
CACHE = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "secrets-of-reward-modeling"


# ---------------------------------------------------------------------------------------------------------- processes
def fail(message):
    """End the run: one line on stderr, exit code 1, no traceback."""
    if LOCAL_RANK:  # mostly all ranks fail alike: let the first of the machine speak, torchrun then ends the others
        time.sleep(10)
    raise SystemExit(f"error: {message}")


def one_line(error):
    """The message of somebody else's exception, for `fail`."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def settle(args, defaults, eval_data, ranks, taken=()):
    """Complete parsed flags with `defaults`, {flag: (the paper's, the toy's)}, and `eval_data`, {data: its sets}; check
    what all scripts have in common, names of sets that are `taken` included. -> args. Exits naming the flag."""
    for name, values in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, values[args.model == "toy"])
    if args.eval_data is None:
        args.eval_data = eval_data.get(args.data.split(":")[0], [])
    names = [*taken, *(pair.partition("=")[0] for pair in args.eval_data if re.match(r"[^:/=]+=", pair))]
    if len(set(names)) < len(taken) + len(args.eval_data):
        fail(f"--eval-data {' '.join(args.eval_data)}: give every set a name of its own, as in test=FILE, "
             "and no / or : in it")
    if not (0 < args.epochs < math.inf and 0 < args.lr < math.inf and 0 < args.clip and 0 <= args.warmup <= 1):
        fail("--epochs, --lr and --clip are above 0, --warmup is between 0 and 1")
    if not 0 <= getattr(args, "center", 0) < math.inf or args.micro_tokens < 1:
        fail("--center is 0 or more, --micro-tokens 1 or more")
    for name in ("seed", "eval_every", "save_every"):
        if getattr(args, name, 0) < 0:
            fail(f"--{name.replace('_', '-')} {getattr(args, name)} is below 0")
    if getattr(args, "attention", "sdpa") == "flex" and not torch.cuda.is_available():
        fail("--attention flex needs a GPU: FlexAttention cannot train on a CPU")
    if args.batch_size < 1:
        fail(f"--batch-size {args.batch_size} is below 1")
    if args.batch_size % ranks:
        fail(f"--batch-size {args.batch_size} cannot be divided among {ranks} ranks")
    if getattr(args, "plot", False) and not importlib.util.find_spec("matplotlib"):
        fail("--plot draws with matplotlib: pip install matplotlib")
    return args


def spell(defaults):
    """{flag: (the paper's, the toy's)}, as --help shows it."""
    lines = [f"  --{name.replace('_', '-'):16} {paper!s:30} {toy}" for name, (paper, toy) in defaults.items()]
    return "\n".join([f"  {'default of':18} {'the paper':30} the toy world", *lines])


def setup(seed):
    """Join the processes that torchrun started (without it: one process), seed them alike; -> this rank's device."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", LOCAL_RANK) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for every shape, and no two batches have the same
    if WORLD > 1 and not dist.is_initialized():
        waits = datetime.timedelta(days=30)  # for the rank that tokenises, or trains one member more
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=waits)
        atexit.register(time.sleep, 0.5)  # gloo's threads still drop tensors, and need Python for it: pytorch #190489
        atexit.register(dist.destroy_process_group)  # runs first
    transformers.utils.logging.set_verbosity_error()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # its errors are raised as well
    if RANK or not sys.stderr.isatty():
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", "torch.distributed is disabled")  # a checkpoint of one process
    signal.signal(signal.SIGINT, lambda *_: fail("interrupted"))
    torch.manual_seed(seed)
    return device


@contextmanager
def local_rank0_first():
    """The first rank of each machine runs the block before the others, so that they find its caches filled."""
    if LOCAL_RANK:
        barrier()
    yield
    if not LOCAL_RANK:
        barrier()


def barrier():
    """Wait for all ranks."""
    if WORLD > 1:
        dist.barrier()


def all_sum(tensor):
    """Sum a tensor over the ranks, in place; every rank gets the same result."""
    if WORLD > 1:
        dist.all_reduce(tensor)
    return tensor


@contextmanager
def replaced(path):
    """Write a file or folder under a temporary name; it gets its own when complete: no kill leaves half of it."""
    tmp = path.with_name(f"{path.name}.{os.uname().nodename}.{os.getpid()}.tmp")  # somebody may write the same cache
    path.parent.mkdir(parents=True, exist_ok=True)
    yield tmp
    shutil.rmtree(path, ignore_errors=True)
    tmp.replace(path)


# -------------------------------------------------------------------------------------------------- batch and model
class Batch(NamedTuple):
    """B prompts with k responses each in R rows of T tokens; see the picture at the top of this file. Each prompt has a
    row of its own or, where they are packed, all share one. A place is a number in the flattened (R, T)."""
    input_ids: torch.Tensor  # (R, T)
    tree: torch.Tensor       # (R, T) the prompt that a token belongs to, 0 to B - 1; -1 for padding
    branch: torch.Tensor     # (R, T) 0 for the prompt, j for response j, -1 for padding
    positions: torch.Tensor  # (R, T)
    ends: torch.Tensor       # (B, k + 1) the place of the last token of the prompt and of each response
    index: np.ndarray        # (B,) numbers of the prompts in the data; () where a rank just keeps in step


def collate(data, index, device, width=0):
    """The rows `index` of a tokenised data set (see `tokenize`) as one Batch: padded on the right to the longest or,
    with a `width`, one behind the other in a row whose length is the next multiple of that."""
    picked = data[index if len(index) else [0]]
    parts = [[prompt, *responses] for prompt, responses in zip(picked["prompt_ids"], picked["response_ids"])]
    sizes = np.array([[len(part) for part in row] for row in parts])  # (B, k + 1), the prompt first
    ends, lengths = sizes.cumsum(1), sizes.sum(1)
    before = lengths.cumsum() - lengths  # tokens of the batch before each prompt
    shape = (1, -(-lengths.sum() // width) * width) if width else (len(sizes), lengths.max())
    begin = before if width else np.arange(len(sizes)) * shape[1]  # the place of each prompt's first token
    inside = np.arange(lengths.sum()) - before.repeat(lengths)  # the place of a token among those of its prompt
    back = ends - sizes - sizes[:, :1]  # how far a response stands behind the end of the prompt
    back[:, 0] = 0

    def spread(values, padding):
        """Values of all tokens, one behind the other -> (R, T)."""
        flat = np.full(math.prod(shape), padding)
        flat[inside + begin.repeat(lengths)] = values
        return flat.reshape(shape)

    arrays = (spread([token for row in parts for part in row for token in part], 0),
              spread(np.arange(len(sizes)).repeat(lengths), -1),
              spread(np.tile(np.arange(sizes.shape[1]), len(sizes)).repeat(sizes.ravel()), -1),
              spread(inside - back.ravel().repeat(sizes.ravel()), 0),
              begin[:, None] + ends - 1)
    return Batch(*(torch.from_numpy(x).to(device, non_blocking=True) for x in arrays), np.asarray(index, int))


def sees(batch):
    """The rule of the mask, as FlexAttention takes it: (row, head, query, key), index tensors of any shapes -> whether
    this query sees this key, which comes no later and is in its prompt or in its own branch."""
    tree, branch = batch.tree, batch.branch

    def rule(row, head, query, key):
        own = (branch[row, key] == 0) | (branch[row, key] == branch[row, query])
        return (key <= query) & (tree[row, key] == tree[row, query]) & own

    return rule


def tree_mask(batch, dtype=torch.float32):
    """The whole mask (R, 1, T, T), which any attention adds to its logits: 0 where a query sees a key, else -inf. Of a
    bool mask SDPA would make such numbers in every layer, and keep them for the backward pass."""
    row, place = (torch.arange(n, device=batch.tree.device) for n in batch.tree.shape)
    seen = sees(batch)(row[:, None, None], None, place[:, None], place)[:, None]
    return torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, -torch.inf)


def separate_rows(batch):
    """The same batch with the prompt repeated, for models that cannot take a tree mask: the places (B*k, T') of the
    tokens of each prompt with each response alone, and which of them are there. A token stands where its position
    says."""
    branch = torch.arange(1, batch.ends.size(1), device=batch.branch.device)[:, None]  # (k, 1)
    keep = ((batch.branch[:, None] == 0) | (batch.branch[:, None] == branch)).flatten(0, 1)  # (B*k, T)
    # What is kept comes first, in its own order: a stable sort of "not kept".
    order = (~keep).int().argsort(dim=-1, stable=True)[:, : keep.sum(-1).max()]
    row = torch.arange(len(batch.branch), device=order.device).repeat_interleave(len(branch))
    return row[:, None] * batch.branch.size(1) + order, keep.gather(-1, order)


def response_tokens(batch):
    """The responses of a batch token by token, (B, k, L) each, L the longest: the place of the token before, which
    predicts it, its own place, and whether it is there at all (if not, these are its response's first)."""
    first, last = batch.ends[:, :-1, None] + 1, batch.ends[:, 1:, None]
    place = torch.arange((last - first).max() + 1, device=first.device) + first
    real = place <= last
    before = torch.cat([batch.ends[:, :1, None].expand_as(first), place[..., 1:] - 1], -1)
    return before.where(real, before[..., :1]), place.where(real, first), real


class RewardModel(nn.Module):
    """A Hugging Face sequence classifier with one label, read at each response's last token, by `ranks` ranks together.
    `layout` is how it reads a batch: rows with "shared" prompts, "packed" in one row by FlexAttention, or "separate"
    rows (see `choose_layout`). Weights are fp32; in bf16, FSDP casts those that it gathers, but for the head's."""

    def __init__(self, model, dtype=torch.float32, ranks=1):
        super().__init__()
        self.model, self.dtype, self.ranks = model, dtype, ranks
        self.layout, self.device = "shared", torch.device("cpu")  # `prepare` says otherwise

    def states(self, ids, places, **kwargs):
        """The last hidden states at places of any shape."""
        return self.model.base_model(ids, **kwargs).last_hidden_state.flatten(0, 1)[places]

    def read(self, batch, places, real=None):
        """The model at `places` (B, k) or (B, k, L) -> (B, k, [L,] hidden), fp32; B is 0 if the batch has no rows. Or
        at those of them that are `real`, (B, k, L) -> (N, hidden)."""
        ids, positions, device = batch.input_ids, batch.positions, batch.input_ids.device
        if self.layout == "separate":
            order, keep = separate_rows(batch)
            rows = torch.arange(len(order), device=device).view(len(places), -1, *[1] * (places.dim() - 2))
            places = rows * order.size(1) + positions.flatten()[places]
            ids, positions = ids.flatten()[order] * keep, positions.flatten()[order] * keep
            mask = keep.long()
        elif self.layout == "packed":
            make = torch.compile(create_block_mask) if device.type == "cuda" else create_block_mask
            mask = make(sees(batch), ids.size(0), None, ids.size(1), ids.size(1), device=device)
        else:
            mask = tree_mask(batch, self.dtype)
        places = places[: len(batch.index)]
        places = places if real is None else places[real]
        return self.states(ids, places, attention_mask=mask, position_ids=positions, use_cache=False).float()

    def forward(self, batch, with_features=False, every=False):
        """Batch -> rewards (B, k), fp32; with_features: also the hidden states (B, k, hidden) that the head reads;
        every: a value for each token of the responses instead, read before it, (B, k, L) as in `response_tokens`."""
        features = self.read(batch, response_tokens(batch)[0] if every else batch.ends[:, 1:])
        rewards = self.model.score(features).sum(-1)  # of the one label
        return (rewards, features) if with_features else rewards


def load_config(name, **changes):
    """The configuration of a folder or hub id, with dropout off."""
    config = AutoConfig.from_pretrained(name, **changes)
    for part in (config, config.get_text_config()):  # two objects where the model also reads images
        part.update({k: 0.0 for k, v in part.to_dict().items() if "drop" in k and isinstance(v, float)})
    return config


def reward_config(name, flag):
    """The configuration of what shall be a reward model. Exits if its head has other labels than one."""
    try:
        saved, config = load_config(name), load_config(name, num_labels=1)
    except Exception as error:
        fail(f"{flag} {name}: {one_line(error)}")
    if "SequenceClassification" in str(saved.architectures) and saved.num_labels != 1:
        fail(f"{flag} {name}: its `score` head has {saved.num_labels} labels, that of a reward model has one")
    return config


def load_reward_model(name, tokenizer, device, args, seed=None, ranks=WORLD, flag="--model"):
    """A RewardModel from a Hugging Face folder or hub id: a reward model or, where `flag` is --model, also a language
    model (it gets a new head) or a config.json (random weights). Weights are fp32, dropout is off; each rank holds a
    shard or, with ranks = 1, a model of its own. `args`: dtype, seed, max_length, micro_tokens and, where a script has
    them, attention, offload, gradient_checkpointing. Exits on anything that is not a decoder with a `score` head of one
    label."""
    if device.type == "cuda":
        gc.collect()  # a model that is gone, with its hooks and graphs, holds memory until then
    # before the weights, so that members of an ensemble differ by their seed and nothing else
    torch.manual_seed(args.seed if seed is None else seed)
    config = reward_config(name, flag)
    try:
        kwargs = {"config": config, "dtype": torch.float32}
        if str(name).endswith(".json"):
            model, missing = AutoModelForSequenceClassification.from_config(**kwargs), {"score.weight"}
        else:
            model, info = AutoModelForSequenceClassification.from_pretrained(name, **kwargs, output_loading_info=True)
            missing = set(info["missing_keys"])
    except Exception as error:
        fail(f"{flag} {name}: {one_line(error)}")
    if config.is_encoder_decoder or not isinstance(getattr(model, "score", None), nn.Linear):
        fail(f"{flag} {name}: {type(model).__name__} is not a decoder with a linear `score` head on its last token")
    if missing and flag != "--model":
        fail(f"{flag} {name} is no reward model: it lacks {min(missing)}")
    positions = getattr(config.get_text_config(), "max_position_embeddings", None) or args.max_length
    if positions < args.max_length:
        fail(f"--max-length {args.max_length} is more than the {positions:,} positions of {flag} {name}")
    if lacking := missing - {"score.weight"}:
        fail(f"{flag} {name}: its files lack {len(lacking)} weights, {min(lacking)} for one")
    if missing:  # UNSTATED: the paper gives no init; this is the usual one (transformers' own has std 0.02)
        nn.init.normal_(model.score.weight, std=1 / math.sqrt(model.score.in_features + 1))
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer))
    for part in (model.config, model.config.get_text_config()):
        part.update({"pad_token_id": tokenizer.pad_token_id, "use_cache": False})
    return prepare(RewardModel(model, getattr(torch, args.dtype), ranks), name, device, args)


def prepare(model, name, device, args):
    """A RewardModel or its like as it is trained: checkpointed, sharded and compiled as `args` say, on its device, in
    the layout that it can read."""
    if getattr(args, "gradient_checkpointing", False):
        model.model.activation_checkpointing_enable({"use_reentrant": False})
    offload, model.device = getattr(args, "offload", False), device
    model = shard(model, device, offload)
    model = (model if offload else model.to(device)).train()
    if flex := getattr(args, "attention", "sdpa") == "flex":
        torch._dynamo.config.recompile_limit = 256  # a few widths of rows, each in training and without gradients
        for layer in decoder_layers(model):  # as FSDP has made them, or they would not checkpoint
            layer.forward = torch.compile(layer.forward, dynamic=False)
    choose_layout(model, name, args, flex)
    return model


def decoder_layers(model):
    """The modules that transformers says are not to be split."""
    names = model.model._no_split_modules or ()
    return [m for m in model.modules() if type(m).__name__.removeprefix("FSDP") in names]  # which FSDP prefixes


@functools.cache
def mesh(kind, ranks):
    """The ranks that hold a model together: all, or this one alone."""
    if not dist.is_initialized():  # one process, which torchrun did not start
        dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo", store=dist.HashStore(), rank=0,
                                world_size=1)
        atexit.register(dist.destroy_process_group)
    if ranks == WORLD:
        return init_device_mesh(kind, (WORLD,))
    return DeviceMesh.from_group(dist.new_group([RANK], use_local_synchronization=True), kind)


def shard(model, device, offload=False):
    """FSDP2: split weights, gradients and optimizer state over the ranks, by decoder layer, compute in bf16, keep the
    rest in host memory (`offload`). Gradients are summed, not averaged, because every loss is already divided by the
    global count. Where nothing of this is asked for, the model stays as it is."""
    if model.ranks > 1 or model.dtype != torch.float32 or offload:
        layers, shared = decoder_layers(model), {"mesh": mesh(device.type, model.ranks), "reshard_after_forward": True}
        if offload:
            shared["offload_policy"] = CPUOffloadPolicy(pin_memory=device.type == "cuda")
        heads = [model.model.score] if hasattr(model.model, "score") else []  # in fp32; a language model has none
        policy = MixedPrecisionPolicy(param_dtype=model.dtype, reduce_dtype=torch.float32)
        for module in (*layers, *heads, model):
            fully_shard(module, mp_policy=MixedPrecisionPolicy() if module in heads else policy, **shared)
        if model.ranks > 1:  # one rank has nothing to divide, and would copy its gradients to do so
            for module in (m for m in model.modules() if isinstance(m, FSDPModule)):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
    return model


def choose_layout(model, name, args, flex):
    """Set `model.layout` by trying it out: packed by FlexAttention if that is asked for, shared prompts if a row of
    max_length gives the features of its separate rows (not so with ALiBi, recurrent layers, or a sliding window shorter
    than max_length), or else separate rows. Exits if FlexAttention is asked for and fails, forwards or backwards."""
    vocabulary = model.model.config.get_text_config().vocab_size
    prompt, *responses = np.random.default_rng(0).integers(vocabulary, size=(3, max(1, args.max_length // 2)))
    rows = datasets.Dataset.from_list([{"prompt_ids": prompt, "response_ids": responses}])

    def features(layout):
        model.layout = layout
        if layout == "packed":
            model.model.set_attn_implementation("flex_attention")
        try:
            batch = collate(rows, [0], model.device, pack_width(model, args.micro_tokens))
            with torch.set_grad_enabled(layout == "packed"):
                read = model(batch, with_features=True)[1]
            if layout == "packed":  # whose backward pass is a kernel of its own
                read.sum().backward()
                model.zero_grad()
            return read.detach(), None
        except Exception as error:
            if isinstance(model, FSDPModule):
                model.reset_iter_state()  # or some weights would stay gathered, and never be trained
            return None, one_line(error)

    expected, error = features("separate")
    if error:
        fail(f"the model cannot read a row of tokens: {error}")
    found, error = features("packed" if flex else "shared")
    if not error:
        # They differ by rounding, 1e-6 in fp32 and 0.01 in bf16, or else by about 1.
        distance = (found - expected).norm() / expected.norm()
        if distance < (0.05 if model.dtype == torch.bfloat16 else 1e-3):
            return
        error = f"its features are off by {distance:.1%}"
    if flex:
        fail(f"--attention flex: {name} cannot read packed rows: {error}; leave it at sdpa")
    model.layout = "separate"
    say(f"{name} cannot read two responses in one row ({error}): it reads the prompt with each, which takes longer")


def clip_gradients(model, most):
    """Scale the gradients of a model, whose shards lie on all its ranks, to a norm of at most `most`; -> their norm."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), most)
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()


# --------------------------------------------------------------------------------------------------------------- data
def load_rows(source, split="train"):
    """`source` -> datasets.Dataset of raw rows. A source is `toy` (`toy:id`, if not to train on), `toy:ood`,
    `toy:seed=3,flip=0.25` (arguments of `toy_comparisons`); a .jsonl, .json (both also with .gz) or .parquet file; a
    folder from save_to_disk; a hub id; the last two with `:split` or `:config:split` where needed. Exits naming the
    source, and the line, that cannot be read."""
    path, *parts = source.split(":")
    try:
        if path == "toy":
            options = {} if split == "train" else {"split": "id"}
            for word in re.split("[:,]", source)[1:]:
                key, equals, value = word.partition("=")
                options |= {key: json.loads(value)} if equals else {"split": word}
            return datasets.Dataset.from_list(toy_comparisons(**options))
        if re.search(r"\.(jsonl?|parquet|gz):", source):
            fail(f"{source}: a file has no splits, leave out what stands behind the colon")
        if re.search(r"\.(csv|tsv|txt|arrow|xlsx?|parquet\.gz|zip|zst|bz2|xz)$", source):
            fail(f"{source}: files are .jsonl, .json, .jsonl.gz, .json.gz or .parquet")
        if re.search(r"\.(jsonl?|parquet|gz)$", source):
            if not Path(source).is_file():
                fail(f"{source}: no such file")
            kind = "parquet" if ".parquet" in source else "json"
            return datasets.load_dataset(kind, data_files=source, split="train")
        if not Path(path).is_dir():
            return datasets.load_dataset(path, *parts[:-1], split=parts[-1] if parts else split)
        rows = datasets.load_from_disk(path)
        splits = {"": rows} if isinstance(rows, datasets.Dataset) else rows
        wanted = parts[-1] if parts else "" if "" in splits else split
        return splits[wanted] if wanted in splits else fail(
            f"{source}: no split '{wanted}'" + f", it has {', '.join(splits)}" * ("" not in splits))
    except Exception as error:
        fail(f"{source}: {broken_line(source) or one_line(error.__cause__ or error)}")


def load_prompts(source, split, most=None):
    """The prompts of the first `most` rows, rows in any form or with a `prompt` alone: texts or lists of messages, None
    and empty ones left out and counted. Exits naming the row that cannot be read."""
    prompts, rows = [], load_rows(source, split)
    rows = rows.take(min(most or len(rows), len(rows)))
    for number, row in enumerate(rows, 1):
        try:
            prompts.append(read_row(row)[0] if row.keys() & {"chosen", "responses"} else row["prompt"])
        except (KeyError, ValueError) as error:
            fail(f"{source}: row {number}: {one_line(error)}")
    prompts = [prompt for prompt in prompts if prompt and (isinstance(prompt, list) or prompt.strip())]
    say(f"{source}: {len(prompts):,} prompts of {len(rows):,} rows")
    return prompts or fail(f"{source}: no prompt in {len(rows):,} rows")


def broken_line(path):
    """The number and fault of the first line of a JSON-lines file that is no JSON object; "no rows"; or None."""
    number = 0
    try:
        with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip() and not isinstance(json.loads(line), dict):
                    return f"line {number} is no JSON object"
        return None if number else "no rows"
    except (OSError, EOFError, ValueError) as error:
        return f"line {number}: {one_line(error)}" if ".jsonl" in path else None


def read_row(row):
    """One comparison in any known form -> (prompt, [chosen, rejected]), as texts or as lists of messages; the prompt is
    None if the two do not share it. Or one prompt with its `responses`. Raises ValueError if the form is not known."""
    prompt, answers = row.get("prompt"), row["responses"] if "responses" in row else [row["chosen"], row["rejected"]]
    if "responses" in row and (prompt is None or answers is None or len(answers) < 2):
        raise ValueError("it needs a 'prompt' and two 'responses' or more")
    kinds = {type(part) for answer in answers for part in (answer if isinstance(answer, list) else [answer])}
    if None in answers or [] in answers:
        raise ValueError("'chosen' or 'rejected' is missing")
    if kinds == {dict} and all({"role", "content"} <= set(message) for answer in answers for message in answer):
        before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt or []
        answers = [answer if answer[: len(before)] == before else before + answer for answer in answers]
        if any(answer[-1]["role"] != "assistant" or not isinstance(answer[-1]["content"], str) for answer in answers):
            raise ValueError("'chosen' or 'rejected' does not end with a text of the assistant's")
        heads = [answer[:-1] for answer in answers]
        return heads[0] if heads.count(heads[0]) == len(heads) else None, [answer[-1:] for answer in answers]
    if kinds != {str} or isinstance(prompt, list) or prompt is not None and isinstance(answers[0], list):
        raise ValueError("'chosen' and 'rejected' are neither texts nor, like 'prompt', lists of {'role', 'content'}")
    if isinstance(answers[0], list):  # the paper's release: lists of turns, the last one the assistant's
        answers = ["".join(f"\n\n{('Assistant', 'Human')[(len(turns) - i) % 2]}: {turn}"
                           for i, turn in enumerate(turns, 1)) for turns in answers]
    if isinstance(prompt, str):  # which the answers may repeat
        whole = all(answer.startswith(prompt) for answer in answers)
        return prompt, [answer.removeprefix(prompt) for answer in answers] if whole else answers
    heads, marks, answers = zip(*(answer.rpartition("\n\nAssistant:") for answer in answers))
    if not all(marks):
        raise ValueError("no 'prompt', and 'chosen' and 'rejected' are no transcripts with '\\n\\nAssistant:' turns")
    return heads[0] + marks[0] if heads[0] == heads[1] else None, list(answers)


def full_texts(prompt, answers, tokenizer):
    """Yield the text of the prompt with each answer, then without the prompt's oldest turn, and so on: (k,) texts each.
    Raises ValueError for messages without a chat template."""
    if isinstance(prompt, str):
        for start in (0, *(turn.start() for turn in re.finditer("\n\nHuman:", prompt) if turn.start())):
            yield [prompt[start:] + answer for answer in answers]
    elif tokenizer.chat_template is None:
        raise ValueError("it is a conversation, but the tokenizer has no chat template")
    else:  # some templates print today's date, and no score may change overnight
        template = "{% macro strftime_now(format) %}01 Jan 2024{% endmacro %}" + tokenizer.get_chat_template()
        render = functools.partial(tokenizer.apply_chat_template, chat_template=template, tokenize=False)
        system = [message for message in prompt[:1] if message["role"] == "system"]
        for i in (0, *(i for i, message in enumerate(prompt) if message["role"] == "user" and i > len(system))):
            yield [render((system if i else []) + prompt[i:] + answer).rstrip() for answer in answers]


def encode(texts, tokenizer):
    """Texts -> lists of token ids: exactly one BOS in front where the tokenizer uses one, and one EOS at the end."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    adds_bos = bos is not None and tokenizer("a").input_ids[0] == bos
    rows = []
    for ids in tokenizer(texts, add_special_tokens=False).input_ids:
        has_bos = adds_bos or ids[:1] == [bos]
        while ids and ids[0] == bos:
            ids = ids[1:]
        while ids and ids[-1] == eos:
            ids = ids[:-1]
        rows.append([bos] * has_bos + ids + [eos])
    return rows


def encode_answers(prompt, answers, tokenizer, max_length):
    """A prompt and k answers, texts or lists of one message -> the tokens that the full texts begin with in common, the
    k rests, and whether tokens were lost to max_length: the prompt's oldest, then the answers'."""
    for turns_lost, texts in enumerate(full_texts(prompt, answers, tokenizer)):
        ids = encode(texts, tokenizer)
        if max(map(len, ids)) <= max_length:
            break
    shared = min(len(os.path.commonprefix(ids)), *(len(x) - 1 for x in ids))  # an answer keeps its EOS
    prompt, responses = ids[0][:shared], [x[shared:] for x in ids]
    surplus = len(prompt) + max(map(len, responses)) - max_length
    # UNSTATED: the paper is silent about long rows, the authors' code skips those whose last turn alone is too long.
    # Here that turn loses its oldest tokens, but not the BOS.
    if surplus > 0:
        bos = prompt[:1] if prompt[:1] == [tokenizer.bos_token_id] else []
        prompt = bos + prompt[len(bos) + surplus :]
    return prompt, [x[-max_length:] for x in responses], turns_lost > 0 or surplus > 0


def encode_row(row, tokenizer, max_length):
    """One raw row -> prompt_ids and response_ids as `encode_answers` makes them; length, the sum of theirs; cut,
    whether the prompt lost tokens to max_length; twice, whether some of the answers repeat the prompt, but not all;
    dropped, why the row is no use ("": it is)."""
    (prompt, answers), ids, cut, dropped = read_row(row), [], False, ""
    repeats = {isinstance(x, str) and isinstance(prompt, str) and x.startswith(prompt) for x in answers}
    if prompt is None:
        dropped = "different prompts"
    elif not all((answer if isinstance(answer, str) else answer[0]["content"]).strip() for answer in answers):
        dropped = "empty response"
    else:
        *ids, cut = encode_answers(prompt, answers, tokenizer, max_length)
        if ids[1].count(ids[1][0]) == len(ids[1]):
            dropped = "identical responses"
        elif cut and not set(ids[0]) - {tokenizer.bos_token_id}:
            dropped = "nothing left of the prompt in --max-length"
    prompt, responses = ids if not dropped else ([0], [[0]])
    return {"prompt_ids": prompt, "response_ids": responses, "length": len(prompt) + sum(map(len, responses)),
            "cut": cut and not dropped, "dropped": dropped, "twice": len(repeats) > 1}


def tokenize(rows, source, tokenizer, max_length, wanted=("chosen", "rejected")):
    """Raw rows -> a data set with the columns of `encode_row`, `row` (the raw row's number) and what else the rows had.
    `wanted`: comparisons, or ("prompt", "responses"). Cached on disk; a large set is done by all cores. Rows that
    cannot be used are left out and counted; one in no known form ends the run."""
    for column in wanted:
        if column not in rows.column_names:
            fail(f"{source}: no column '{column}', it has {', '.join(rows.column_names) or 'none'}")
    rows = rows.remove_columns([name for name in ("chosen", "rejected", "responses")
                                if name in rows.column_names and name not in wanted])
    functions = tokenize, read_row, full_texts, encode, encode_answers, encode_row
    code = [inspect.getsource(function) for function in functions]
    key = Hasher.hash([code, rows._fingerprint, tokenizer.backend_tokenizer.to_str(), tokenizer.special_tokens_map,
                       tokenizer.chat_template, max_length])

    def work(row, number):
        try:
            return {**encode_row(row, tokenizer, max_length), "row": number}
        except Exception as error:  # a chat template raises what it likes
            raise ValueError(f"row {number + 1}: {error}") from None

    (CACHE / "tokens").mkdir(parents=True, exist_ok=True)
    try:
        with local_rank0_first():
            done = rows.map(
                work, with_indices=True, new_fingerprint=key, cache_file_name=str(CACHE / f"tokens/{key}.arrow"),
                num_proc=os.cpu_count() if len(rows) > 20_000 else None, desc=f"tokenising {source}",
                remove_columns=list({"prompt", "chosen", "rejected", "responses"} & {*rows.column_names}))
    except ValueError as error:
        fail(f"{source}: {' '.join(str(error).split())}")
    dropped, cut, twice = np.array(done["dropped"][:]), sum(done["cut"][:]), sum(done["twice"][:])
    notes = [f"{count:,} dropped: {why}" for why, count in collections.Counter(dropped).items() if why]
    notes += [f"{cut:,} prompts cut"] * (cut > 0)
    notes += [f"in {twice:,} a part of the responses repeats the prompt: none should, or all"] * (twice > 0)
    say("; ".join([f"{source}: {(dropped == '').sum():,} of {len(rows):,} rows", *notes]))
    if all(dropped):
        fail(f"{source}: none of {len(rows):,} rows can be used")
    done = done.select(np.flatnonzero(dropped == ""))
    check_words(done, source, tokenizer)
    return done


def check_words(data, source, tokenizer):
    """Exit if the tokenizer does not know half of what the first prompts say."""
    if np.mean(np.concatenate(data[:100]["prompt_ids"]) == tokenizer.unk_token_id) > 0.5:
        fail(f"{source}: the tokenizer knows less than half the words: give the model or --tokenizer of such text")


def load_tokenizer(name, rows):
    """The tokenizer of a folder or hub id; for a config.json a byte-level BPE trained on the texts of `rows`, as large
    as the config says. Pad is never EOS: who pads with EOS loses the token that is scored. Exits if there is no EOS."""
    given = name
    try:
        if str(name).endswith(".json"):
            name, size = None, AutoConfig.from_pretrained(name).vocab_size
            name = CACHE / f"bpe-{Hasher.hash([rows._fingerprint, size, inspect.getsource(train_bpe)])}"
            with local_rank0_first():
                if not name.is_dir():
                    with replaced(name) as folder:
                        train_bpe(rows, size).save_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:
        if name is None or not Path(name).exists():
            fail(f"{given} is no folder or file here, and not to be had from the hub ({one_line(error)})")
        fail(f"no tokenizer in {name}" + ", give one with --tokenizer" * (rows is not None) + f" ({one_line(error)})")
    if tokenizer.eos_token is None:
        fail(f"the tokenizer of {name} has no EOS token, and every response must end in one")
    if tokenizer.pad_token in (None, tokenizer.eos_token):
        spare = tokenizer.unk_token not in (None, tokenizer.eos_token, tokenizer.bos_token)
        tokenizer.add_special_tokens({"pad_token": tokenizer.unk_token if spare else "<|pad|>"})
    if tokenizer.is_fast:  # as every call leaves it, or what is saved would depend on what was found in the cache
        tokenizer.backend_tokenizer.no_padding()
        tokenizer.backend_tokenizer.no_truncation()
    return tokenizer


def train_bpe(rows, size):
    """A byte-level BPE tokenizer of `size` tokens from the texts of raw rows."""
    def texts():
        for row in rows:
            with suppress(ValueError, KeyError):  # `tokenize` reports them, with their number
                prompt, answers = read_row(row)
                yield from (prompt + answer for answer in answers if isinstance(prompt, str))

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.train_from_iterator(texts(), trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<pad>", "<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


# ------------------------------------------------------------------------------------------------------------ sampling
def load_language_model(name, flag, dtype, tokenizer, temperature, max_new_tokens):
    """The language model in a folder or hub id that `flag` gave, which samples from its plain softmax at a temperature,
    whatever it came with. Exits on anything that is no language model."""
    try:
        config = load_config(name)
        model, info = AutoModelForCausalLM.from_pretrained(name, config=config, dtype=dtype, output_loading_info=True)
    except Exception as error:
        fail(f"{flag} {name}: {one_line(error)}")
    missing = [*info["missing_keys"], *(x for x in config.architectures or () if "SequenceClassification" in x)]
    if missing:
        fail(f"{flag} {name} is no language model: {missing[0]}")
    model.generation_config = transformers.GenerationConfig(
        do_sample=True, temperature=temperature, top_k=0, top_p=1.0, max_new_tokens=max_new_tokens,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id)  # what comes after it is cut off
    return model


def encode_prompts(prompts, tokenizer, longest):
    """Prompts, texts or lists of messages -> their token ids, and how many were cut: of more than `longest` tokens the
    BOS and the newest are kept. Exits if the tokenizer cannot put messages into words."""
    try:
        texts = [prompt if isinstance(prompt, str) else tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, tokenize=False) for prompt in prompts]
    except Exception as error:  # a chat template raises what it likes
        fail(f"a prompt is a conversation, and the tokenizer cannot write it: {one_line(error)}")
    ids = [x[:-1] for x in encode(texts, tokenizer)]  # without the EOS
    heads = [x[: int(x[:1] == [tokenizer.bos_token_id])] for x in ids]
    kept = [x if len(x) <= longest else head + x[len(x) - longest + len(head) :] for x, head in zip(ids, heads)]
    return kept, sum(len(x) > longest for x in ids)


@torch.no_grad()
def respond(model, prompts, k, seed, chunk, device):
    """k responses to each prompt (token ids), sampled by what `load_language_model` gave, `chunk` prompts at a time:
    lists of token ids up to the EOS or the longest allowed, the same on all ranks, whatever their number. `seed`: three
    numbers that no other call has."""
    eos, answers = model.generation_config.eos_token_id, []
    chunks = [prompts[i : i + chunk] for i in range(0, len(prompts), chunk)]
    calls = range(RANK, math.ceil(len(chunks) / WORLD) * WORLD, WORLD)  # as many on each rank, FSDP needs them all
    for number in tqdm(calls, "sampling", leave=False, disable=RANK > 0 or len(calls) < 10, mininterval=1):
        part = chunks[number % len(chunks)]
        torch.manual_seed(int(np.random.default_rng((*seed, number)).integers(2**62)))
        width = max(map(len, part))
        ids = torch.tensor([[0] * (width - len(x)) + x for x in part], device=device)
        mask = torch.tensor([[0] * (width - len(x)) + [1] * len(x) for x in part], device=device)
        tokens = model.generate(ids, attention_mask=mask, num_return_sequences=k)
        tokens = [row[: (*row, eos).index(eos) + 1] for row in tokens[:, width:].tolist()]
        answers += [(number, tokens[i : i + k]) for i in range(0, len(tokens), k)] * (number < len(chunks))
    if WORLD > 1:
        parts = [None] * WORLD
        dist.all_gather_object(parts, answers)
        answers = sorted(itertools.chain(*parts), key=lambda answer: answer[0])
    return [answer for _, answer in answers]


def as_answers(prompt, answers, tokenizer):
    """Sampled tokens -> answers in the form of their prompt: texts that end where the next turn begins, or lists of one
    message."""
    texts = [text.strip() for text in tokenizer.batch_decode(answers, skip_special_tokens=True)]
    if isinstance(prompt, str):
        space = "" if prompt[-1:].isspace() else " "
        return [space + text.split("\n\nHuman:")[0].strip() for text in texts]
    return [[{"role": "assistant", "content": text}] for text in texts]


def sample_responses(name, flag, prompts, k, seed, args, device):
    """Prompts (texts or lists of messages) -> rows of prompt and responses, k of each from the policy in folder or hub
    id `name`, which `flag` gave, the same whatever the number of ranks. Exits if it is no language model."""
    tokenizer = load_tokenizer(name, None)
    policy = load_language_model(name, flag, torch.bfloat16 if device.type == "cuda" else torch.float32, tokenizer,
                                 args.temperature, args.max_new_tokens).to(device).eval()
    ids, cut = encode_prompts(prompts, tokenizer, args.max_length - args.max_new_tokens)
    say(f"{name} answers {len(ids):,} prompts {k} times" + f"; {cut:,} prompts cut" * (cut > 0))
    sampled = respond(policy, ids, k, seed, args.sample_batch, device)
    return [{"prompt": prompt, "responses": as_answers(prompt, answers, tokenizer)}
            for prompt, answers in zip(prompts, sampled)]


# ------------------------------------------------------------------------------------------------------ order of a run
def step_rows(n, batch_size, seed, step):
    """The rows of one optimizer step, an int array (batch_size,) alike on every rank: the next ones in the order of the
    epoch, a permutation of all n; fewer at its end."""
    epoch, start = divmod(step, math.ceil(n / batch_size))
    return np.random.default_rng((seed, epoch)).permutation(n)[start * batch_size : (start + 1) * batch_size]


def micro_batches(data, index, micro_tokens, model):
    """Yield this rank's part of the rows `index` of a tokenised data set as Batches of at most `micro_tokens` tokens (a
    longer row stands alone), as many on every rank of the model. The gradient of a step depends neither on the cuts nor
    on the number of ranks."""
    index, lengths = np.asarray(index), np.array(data.select_columns(["length"])[index]["length"])
    width = pack_width(model, micro_tokens)
    parts = (pack if width else cut)(lengths, micro_tokens, model.ranks)
    for part in parts[RANK % model.ranks :: model.ranks]:
        yield collate(data, index[part], model.device, width)


def pack_width(model, micro_tokens):
    """Packed rows are a multiple of this in length, so that there are few shapes to compile for; 0: do not pack."""
    return -(-micro_tokens // 8) if model.layout == "packed" else 0


def cut(lengths, micro_tokens, ranks):
    """Lengths (N,) -> int arrays of row numbers, a multiple of `ranks`: sorted by length, at most `micro_tokens` tokens
    with the padding. They make tokens + micro_tokens / 8 per cut the least: one more pass was measured to cost as much
    as that many tokens (117 for 1,024, on two CPU cores)."""
    order = np.argsort(lengths, kind="stable")
    best = [(0, 0)]  # for the first j rows: the least cost, and where the last of the cuts begins
    for j, length in enumerate(lengths[order].tolist(), 1):
        starts = range(max(0, j - max(1, micro_tokens // length)), j)
        best.append(min((best[i][0] + (j - i) * length + micro_tokens / 8, i) for i in starts))
    cuts, j = [], len(order)
    while j:
        cuts, j = [order[best[j][1] : j], *cuts], best[j][1]
    while len(cuts) % ranks:  # halve the largest; half of one row is an empty micro-batch, which `collate` knows
        largest = max(range(len(cuts)), key=lambda i: len(cuts[i]))
        half = len(cuts[largest]) // 2
        cuts[largest : largest + 1] = [cuts[largest][:half], cuts[largest][half:]]
    return cuts


def pack(lengths, micro_tokens, ranks):
    """Lengths (N,) -> int arrays of row numbers, a multiple of `ranks`, about as full as one another and none of more
    than `micro_tokens` tokens or the longest row, there being no padding: the longest first, each to the emptiest."""
    most = max(micro_tokens, lengths.max())
    count = math.ceil(lengths.sum() / most / ranks) * ranks
    while True:
        parts, loads = [[] for _ in range(count)], [(0, i) for i in range(count)]
        for row in np.argsort(-lengths, kind="stable").tolist():
            load, i = loads[0]
            heapq.heapreplace(loads, (load + int(lengths[row]), i))
            parts[i].append(row)
        if max(loads)[0] <= most:
            return [np.array(part, int) for part in parts]
        count += max(1, count // 50 // ranks) * ranks


@torch.no_grad()
def score(model, data, micro_tokens, name="", with_features=False):
    """Rewards of all rows, (N, k) fp32 on the CPU, in the data's order and the same on all ranks of the model;
    with_features: also the features (N, k, hidden) that the head reads."""
    model.eval()
    shape = len(data), len(data[0]["response_ids"])
    outputs = [torch.zeros(shape), torch.zeros(*shape, model.model.score.in_features if with_features else 0)]
    bar = tqdm(total=len(data), desc=f"scoring {name}", leave=False, disable=RANK > 0 or not sys.stderr.isatty())
    for batch in micro_batches(data, np.arange(len(data)), micro_tokens, model):
        for output, values in zip(outputs, model(batch, with_features=True)):
            if output.numel():
                output[batch.index] = values.cpu()
        bar.update(len(batch.index) * model.ranks)
    bar.close()
    model.train()
    outputs = [all_sum(x) if model.ranks > 1 else x for x in outputs]
    return outputs if with_features else outputs[0]


# -------------------------------------------------------------------------------------------------- save, resume, log
def run_state(model, optimizer):
    """Weights and optimizer state by name, each rank's own shards: the tensors themselves, none of them a copy."""
    weights, moments = get_state_dict(model, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=True))
    return {"model": weights, "optimizer": {key: x for key, x in moments.items() if torch.is_tensor(x)}}


def save_checkpoint(folder, model, optimizer, step, file_size=2**30):
    """Write <folder>/checkpoint-<step>, safetensors of every rank's shards, then remove older ones. Data order and
    all randomness are functions of the seed and the step, so nothing else is needed to go on, on a CPU bit for bit.
    `file_size`: bytes of tensors in a file, about; while it is written, it is in host memory twice."""
    tmp = Path(folder) / "checkpoint.tmp"
    if RANK == 0:
        shutil.rmtree(tmp, ignore_errors=True)
    barrier()
    state, files, size = run_state(model, optimizer), {}, 0
    for name, tensor in ((f"{part}.{key}", x) for part, tensors in state.items() for key, x in tensors.items()):
        files[name], size = 1 + size // file_size, size + tensor.numel() * tensor.element_size()
    dcp.save(state, storage_writer=HuggingFaceStorageWriter(tmp, files, save_distributed=True))
    if RANK == 0:
        older = [path for path in Path(folder).glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
        tmp.rename(Path(folder) / f"checkpoint-{step}")
        for path in older:
            shutil.rmtree(path)


def last_checkpoint(folder):
    """The step of the newest complete checkpoint, 0 if there is none. Exits if the ranks do not see the same one."""
    names = (path.name.removeprefix("checkpoint-") for path in Path(folder).glob("checkpoint-*"))
    step = max((int(name) for name in names if name.isdigit()), default=0)
    if all_sum(torch.tensor(step)) != step * WORLD:
        fail(f"--output-dir {folder} is not the same on all machines: put it on a disk that they share")
    return step


def load_checkpoint(folder, model, optimizer):
    """Load the newest complete checkpoint, written by any number of ranks; return its step, 0 if there is none."""
    if step := last_checkpoint(folder):
        state, reader = run_state(model, optimizer), HuggingFaceStorageReader(Path(folder) / f"checkpoint-{step}")
        saved = reader.read_metadata().state_dict_metadata  # no moments of a weight that never had a gradient
        state["optimizer"] = {key: x for key, x in state["optimizer"].items() if f"optimizer.{key}" in saved}
        dcp.load(state, storage_reader=reader)  # in place
    return step


def save_model(folder, model, tokenizer):
    """Write an ordinary Hugging Face folder: plain AutoModelForSequenceClassification gets the same scores."""
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if RANK == 0:
        with replaced(Path(folder)) as tmp:
            model.model.save_pretrained(tmp, state_dict={k.removeprefix("model."): v for k, v in weights.items()})
            tokenizer.save_pretrained(tmp)
        say(f"saved {folder}")
    barrier()  # now every rank may read it


def hash_tokens(data):
    """A hash of all tokens of a tokenised data set and of the lengths of its rows."""
    hasher = Hasher()
    for table in data.select_columns(["prompt_ids", "response_ids", "length"]).with_format("arrow").iter(1_000):
        prompt, responses, length = (column.combine_chunks() for column in table.columns)
        hasher.update([x.to_numpy() for x in (prompt.flatten(), responses.flatten().flatten(), length)])
    return hasher.hexdigest()


def say(text):
    """Print a line on rank 0, above the progress bar."""
    if RANK == 0:
        tqdm.write(text)


class Log:
    """A run's folder: args.json, metrics.jsonl (one JSON line a record) and a progress bar, all on rank 0."""

    def __init__(self, folder, settings, resume, may_change=("resume", "output_dir", "micro_tokens", "save_every")):
        """Check, before any work is done, that a run can begin in `folder` or, with `resume`, go on there: exits if
        that holds something else, or a run of other settings, those in `may_change` aside."""
        self.folder, self.args, self.resume = Path(folder), Path(folder) / "args.json", resume
        self.settings = {"script": Path(sys.argv[0]).name, **settings}
        if self.folder.resolve() in Path.cwd().resolve().parents or self.folder.resolve() == Path.cwd().resolve():
            fail(f"--output-dir {folder}: name a folder of its own")
        if self.folder.exists() and not self.folder.is_dir():
            fail(f"--output-dir {folder} is a file")
        for key, value in settings.items():
            for text in value if isinstance(value, list) else [value]:
                path = Path(str(text).partition("=")[2] or str(text)).resolve()
                if not resume and self.folder.resolve() in path.parents and path.exists():
                    fail(f"--{key.replace('_', '-')} {text} lies in --output-dir {folder}, which a new run moves aside")
        if not self.args.exists() and self.folder.exists() and any(self.folder.iterdir()):
            fail(f"--output-dir {folder} is not empty and holds no run: name another folder")
        self.old = json.loads(self.args.read_text()) if resume and self.args.exists() else {}
        keys = (self.old.keys() | self.settings.keys()) - {*may_change, "script", "data_hash"}
        for key in ("script", *sorted(keys)) if self.old else ():
            if self.old.get(key) != self.settings.get(key):
                flag = key if key == "script" else f"--{key.replace('_', '-')}"
                fail(f"{flag} is {self.settings.get(key)}, but {self.old.get(key)} in the run of {folder}: "
                     "resume that with its own flags, or begin another without --resume")

    def start(self, step, total, *data):
        """Begin after `step` of `total` steps on `data`, tokenised or arrays, the same when a run is resumed.
        Another run that is there is moved aside, never overwritten; the records that a killed run wrote after `step`
        are written anew."""
        self.settings["data_hash"] = Hasher.hash([
            hash_tokens(values) if isinstance(values, datasets.Dataset) else torch.as_tensor(values).cpu().numpy()
            for values in data])
        if self.old and self.old.get("data_hash") != self.settings["data_hash"]:
            fail(f"the data are not those of the run in {self.folder}: begin another without --resume")
        if RANK == 0:
            if self.args.exists() and not self.resume:
                names = (self.folder.with_name(f"{self.folder.name}.{i}") for i in itertools.count(1))
                aside = self.folder.rename(next(path for path in names if not path.exists()))
                say(f"{self.folder} holds an earlier run, which is now {aside}")
            with replaced(self.args) as tmp:
                tmp.write_text(json.dumps(self.settings, indent=1))
            if self.resume:
                say(f"{self.folder}: going on after step {step} of {total}" if step else
                    f"{self.folder}: no checkpoint to go on from, so from the start")
            path = self.folder / "metrics.jsonl"
            lines = path.read_text().splitlines(keepends=True) if path.exists() else []
            with replaced(path) as tmp:
                tmp.write_text("".join(x for x in lines if x.endswith("\n") and json.loads(x)["step"] <= step))
            self.file, self.began = path.open("a", buffering=1), time.time()
            every = 0.5 if sys.stderr.isatty() else 20  # seconds
            self.bar = tqdm(total=total, initial=step, desc=self.folder.name, mininterval=every, disable=step == total)

    def __call__(self, step, metrics, watch=("train/loss", "train/accuracy")):
        """Write one record, {"step": ..., "seconds" since the start: ..., **metrics}, and move the bar, which shows the
        metrics to `watch`."""
        if RANK == 0:
            record = {"step": step, "seconds": round(time.time() - self.began, 3), **metrics}
            self.file.write(json.dumps(record) + "\n")
            shown = {name.split("/")[-1]: f"{metrics[name]:.3f}" for name in watch if name in metrics}
            self.bar.set_postfix(shown, refresh=False)
            self.bar.update(step - self.bar.n)
            if step == self.bar.total:
                self.bar.close()


# ---------------------------------------------------------------------------------------------------------- toy world
# What CartPole is to control. A prompt asks for a number of things of a kind, a response is a list of words. The gold
# reward: +1 for each thing asked for, up to the number asked, -1 for every other word. Check any label by eye.
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


def toy_gold(prompt, response):
    """The true reward: how many different things that were asked for, up to the number asked, minus all other words."""
    asked, words = prompt.split(), response.split()
    number = next(NUMBERS[word] for word in asked if word in NUMBERS)
    right = min(number, len({word for word in words if KIND.get(word) in asked}))
    return right - (len(words) - right)


def toy_prompt(rng, kinds):
    """'\\n\\nHuman: name three fruits\\n\\nAssistant:', or, with kinds = 2, 'name three fruits and tools'."""
    return f"\n\nHuman: name {rng.choice([*NUMBERS])} {' and '.join(rng.sample([*THINGS], kinds))}\n\nAssistant:"


def toy_response(rng, prompt, skill):
    """A list of words. Each is a right one with probability `skill`, else any thing, a repetition or any word at all;
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


def toy_comparisons(split="train", n=None, seed=0, flip=0.1):
    """Comparisons as dicts: prompt, chosen, rejected, gold (1: gold reward prefers chosen, 0: rejected, -1: neither).
    Splits: `train` and `noisy` carry annotators' labels, Bradley-Terry on the gold rewards and then a share `flip`
    turned around; `id`, `ood` (two kinds at once) and `shifted` (both nearly perfect, one point apart) carry gold
    labels. n: 4,000 rows for train, else 1,000. Raises ValueError for another split."""
    if split not in ("train", "noisy", "id", "ood", "shifted"):
        raise ValueError(f"the toy world has no split {split}")
    rng, rows, annotated = random.Random(f"{split} {seed}"), [], split in ("train", "noisy")
    while len(rows) < (n or (4000 if split == "train" else 1000)):
        prompt = toy_prompt(rng, 2 if split == "ood" else 1)
        pair = [toy_response(rng, prompt, rng.uniform(0.8 if split == "shifted" else 0.2, 1)) for _ in "ab"]
        difference = toy_gold(prompt, pair[0]) - toy_gold(prompt, pair[1])
        if pair[0] == pair[1] or not annotated and difference == 0 or split == "shifted" and abs(difference) > 1:
            continue
        first = difference > 0
        if annotated:
            first = (rng.random() < 1 / (1 + math.exp(-difference))) != (rng.random() < flip)
        gold = -1 if difference == 0 else int(first == (difference > 0))
        rows.append({"prompt": prompt, "chosen": pair[not first], "rejected": pair[first], "gold": gold})
    return rows


def toy_tokenizer():
    """Words, BOS in front; the vocabulary is WORDS."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def toy_model():
    """The folder of the toy's SFT model, a 2-layer Llama trained on demonstrations of middling skill; made once, cached
    under a name that depends on all that made it."""
    source = "".join(map(inspect.getsource, (toy_model, toy_tokenizer, toy_prompt, toy_response)))
    path = CACHE / f"toy-sft-{Hasher.hash([source, WORDS, torch.__version__, transformers.__version__])}"
    with local_rank0_first():
        if path.is_dir():
            return path
        with torch.random.fork_rng(), replaced(path) as folder:
            torch.manual_seed(0)
            rng, tokenizer, steps = random.Random(0), toy_tokenizer(), 400
            model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
                vocab_size=len(WORDS), hidden_size=64, intermediate_size=256, num_hidden_layers=2,
                num_attention_heads=4, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2))
            optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
            schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
            for _ in tqdm(range(steps), "training the toy's SFT model (once)", mininterval=5):
                prompts = [toy_prompt(rng, rng.choice([1, 2])) for _ in range(64)]
                texts = [prompt + toy_response(rng, prompt, rng.uniform(0.4, 1)) + " </s>" for prompt in prompts]
                batch = tokenizer(texts, padding=True, return_tensors="pt")
                labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
                model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=labels).loss.backward()
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    return path
