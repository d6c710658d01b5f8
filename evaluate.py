"""Evaluation: play questions with the policy, and report Avg@K accuracy over turn budgets.

This file introduces the rollout engine, which rl.py uses unchanged. It plays many conversations at
once, each in a slot of one KV cache. A conversation keeps its cache over turns, so only new tokens
are fed. The question's image and prompt are encoded once and shared by the K samples of a question.
When a conversation ends, the next one takes its slot at once.

What differs from a textbook sampling loop and from the Mini-o3 paper:
1. Token in, token out: sampled ids are appended as they are, with a loss mask and their
   log-probability. Text is decoded only to be parsed. Image placeholders can never be sampled.
2. Every sampled token is a function of the logits and of (seed, step, prompt, sample, number of the
   token). So a sample does not depend on the batch, on slots or on processes (beyond rounding).
3. Speculative decoding without a draft model and without a random acceptance test. A table of
   n-grams that the policy wrote guesses the next tokens: the draft. One forward pass samples the
   token after each of them. Samples are kept up to and including the first that differs from the
   draft. Each of these was sampled after the right tokens, so by (2) it is the one that decoding
   one by one would have sampled (see Engine.accept).
4. Accuracy at every turn budget T comes from one run with the largest budget: correct *and*
   finished within T turns. The policy is not told its budget, so its first T turns are the same.
5. The standard error is over questions: the K samples of a question are not independent.
6. A judge (--judge URL) is asked only where words alone cannot tell. A sample that the judge could
   not score is left out and counted; it does not count as wrong.

Commands:
    1 CPU          python evaluate.py
    2 CPU cores    torchrun --nproc_per_node=2 evaluate.py
    1 GPU          python evaluate.py --model checkpoints/rl --max_num_seqs 64
    8 GPUs         torchrun --nproc_per_node=8 evaluate.py --data data/visualprobe/hard.jsonl \\
                       --num_samples 32 --max_new_tokens 2048 --max_model_len 32768
    2 nodes        torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d \\
                       --rdzv_endpoint=HOST:29500 evaluate.py ...
    a server       python evaluate.py --model http://localhost:8000/v1 --model_name NAME \\
                       --max_num_seqs 16
    a page         python extras/report.py results/rl results/sft
"""

import collections
import functools
import inspect
import json
import math
import statistics
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

import sft
import tools
from extras import results_folder, terminal
from extras.images import check_images

BUDGETS = [1, 2, 4, 6, 8, 12, 16, 24, 32]
FINISH_REASONS = ["answer", "void", "over_turn", "over_context"]

# ---- One conversation ---------------------------------------------------------------------------


@dataclass
class Limits:
    """What ends a conversation. The original image counts as one of max_images."""
    max_turns: int = 32
    max_images: int = 32
    max_new_tokens: int = 96        # per turn
    max_model_len: int = 4096       # tokens of the whole conversation
    blank_crops: bool = False       # show a black picture in the place of every crop


@dataclass
class Rollout(sft.Sequence):
    """One conversation, while it is played and after. token_ids and loss_mask are those of
    sft.Sequence; images stays empty, see with_images."""
    # The question and the number of the sample.
    row: dict = None
    root: Path = None               # folder that the image's path is relative to
    system: str = ""
    prompt_number: int = 0          # enters the random stream
    sample_number: int = 0
    # What was played.
    logprobs: list = field(default_factory=list)    # one number per sampled token
    turns: list = field(default_factory=list)
    turn_ends: list = field(default_factory=list)   # [k]: index just after the last token of turn k
    finish_reason: str = None
    prediction: str = None
    # For training.
    reward: float = 0.0             # None: the judge gave no verdict
    advantage: float = 0.0
    baseline: float = None          # b of its group, for the log
    unfinished_value: float = None  # what it is worth to the update; None: it is finished
    group_index: int = 0            # which group of a step of rl.py
    # The engine's own state.
    views: list = field(default_factory=list)       # PIL images; dropped at the end
    turn_start: int = 0             # index of the first token of the current turn
    num_cached_tokens: int = 0      # token_ids[:num_cached_tokens] are in the KV cache
    next_position: int = 0          # M-RoPE position of token_ids[num_cached_tokens]
    pending_image: Future = None    # [(patches, grid)] of an observation that is not fed yet
    image_step: int = 0             # the engine's step in which it was appended
    random_generator: np.random.Generator = None
    uniforms: list = field(default_factory=list)    # [n]: the number that samples token n

    def next_uniforms(self, count):
        """Return the float32 random numbers in [0, 1) that sample the next `count` tokens.
        uniforms[n] belongs to the n-th sampled token of the conversation. A draft token that is
        rejected does not use one up."""
        start = len(self.logprobs)      # tokens sampled so far
        while len(self.uniforms) < start + count:
            self.uniforms += self.random_generator.random(64, dtype=np.float32).tolist()
        return self.uniforms[start:start + count]

    def to_row(self):
        """Return the trajectory row that is written to JSONL."""
        return {**tools.without_layout(self.row), "system": self.system, "turns": self.turns,
                "finish_reason": self.finish_reason, "prediction": self.prediction,
                "reward": self.reward, "teacher": "policy", "sample": self.sample_number}

    def compute_reward(self, judge=None):
        """Set reward to 1 if the answer is right, else 0. Where words alone cannot tell, the judge
        sets it later (judge.wait() waits for that)."""
        options = self.row.get("options")
        is_match = tools.match_answer(self.prediction, self.row["answer"], options)
        self.reward = float(is_match)
        if judge is not None and not is_match and not tools.is_decided(self.prediction, options):
            judge.submit(self)

    def with_images(self, policy):
        """Return a copy with all images of the conversation, cropped again from the original. The
        engine does not keep them: memory would grow with the number of rollouts."""
        path = Path(self.root) / self.row["image"]
        image, preprocessed = open_and_preprocess(policy, path)
        views = tools.replay(self.to_row(), image)
        return replace(self, images=[preprocessed, *policy.preprocess_images(views[1:])])


@functools.lru_cache(maxsize=32)    # the conversations of a group share one image
def open_and_preprocess(policy, path):
    """Return an image and the copy of it that the model sees: (PIL image, (patches, grid))."""
    image = tools.open_image(path)
    return image, policy.preprocess_images([image])[0]


def make_rollouts(rows, num_samples, root, prompt_numbers, prompts):
    """Return num_samples new Rollouts of every row, ordered by row, then sample.

    root: folder of the images, or a list with one per row. prompt_numbers: the number of each row
    that enters its random stream (default: its index)."""
    roots = root if isinstance(root, (list, tuple)) else [root] * len(rows)
    if prompt_numbers is None:
        prompt_numbers = range(len(rows))
    rollouts = []
    for row, row_root, prompt_number in zip(rows, roots, prompt_numbers):
        system = tools.system_text(row, prompts)
        for sample_number in range(num_samples):
            rollouts.append(Rollout(row=row, root=row_root, system=system,
                                    prompt_number=prompt_number, sample_number=sample_number))
    return rollouts


# ---- The KV cache -------------------------------------------------------------------------------
# A slot holds one conversation; its token n is in column n. In a forward pass the slots have
# different numbers of new tokens. One attention call per slot would be slow, and one call for all
# would pad every slot to the largest. So neighbouring slots with about as many new tokens are one
# span, and a span is one call:
#     b   its slots
#     w   most new tokens of one of its slots; the other slots are padded, so it has b * w rows
#     S   its columns: as many as its longest conversation has, new tokens included
# A row (in this section only) is one query: a new token, or padding. There are H query heads and K
# key heads. H / K query heads share a key head, so a mask has H / K equal lines per row.

MAX_SPAN_SLOTS = 8      # slots that attend in one call on a CPU, where padding costs most
MAX_SPAN_PADDING = 12   # two neighbours in a span differ by at most so many new tokens
MAX_SHORT_FEED = 64     # a slot with more new tokens (a prompt, an observation) attends alone


def plan_spans(num_new, max_span_slots=MAX_SPAN_SLOTS):
    """Group neighbouring slots into spans: a span attends in one call.

    num_new: new tokens of each slot. All slots of a span are padded to its most new tokens. So a
    new span starts after max_span_slots slots, where two neighbours differ by more than
    MAX_SPAN_PADDING tokens, and before and after a slot with more than MAX_SHORT_FEED tokens.
    Return a list of (first, end). Spans without any new token are left out.

        >>> plan_spans([70, 1, 5, 1, 30])
        [(0, 1), (1, 4), (4, 5)]
    """
    spans = [(0, 1)]
    for slot in range(1, len(num_new)):
        first, _ = spans[-1]
        num_before = num_new[slot - 1]
        has_room = slot - first < max_span_slots
        both_short = max(num_new[slot], num_before) <= MAX_SHORT_FEED
        if has_room and both_short and abs(num_new[slot] - num_before) <= MAX_SPAN_PADDING:
            spans[-1] = (first, slot + 1)
        else:
            spans.append((slot, slot + 1))
    return [(first, end) for first, end in spans if max(num_new[first:end]) > 0]


class Span(NamedTuple):
    """Neighbouring slots that attend in one call: b slots with w rows each, over S columns."""
    query_rows: slice               # b * w rows
    slots: slice                    # b slots of the cache
    width: int                      # w
    num_columns: int                # S
    mask: torch.Tensor = None       # (b, 1, w * H / K, S); None: one slot with many new tokens


class RowPlan(NamedTuple):
    """Where the N new tokens go in the cache, and in which of P rows they attend."""
    spans: list
    slot_of_token: np.ndarray       # (N,)
    column_of_token: np.ndarray     # (N,) where its key and value are written
    row_of_token: np.ndarray        # (N,)
    token_of_row: np.ndarray        # (P,) token 0 in a row of padding
    last_visible: np.ndarray        # (P,) last column that the query of a row sees: its own


def plan_rows(first_slot, num_cached, num_new, max_span_slots=MAX_SPAN_SLOTS):
    """Plan the attention of neighbouring slots, of which the first is first_slot.

    num_cached, num_new: arrays with the number of cached and of new tokens of each slot. All new
    tokens are given end to end. To attend, they are laid out in rows: every slot is padded to the
    most new tokens of its span (see plan_spans). Return a RowPlan.

    Slots 2 and 3 have 5 and 6 cached tokens and get 1 and 2 new ones. They are one span, and row 1
    is padding. plan_rows(2, np.array([5, 6]), np.array([1, 2])) returns:
        spans              one: rows 0 to 3, slots 2 and 3, width 2, num_columns 8
        slot_of_token      [2, 3, 3]
        column_of_token    [5, 6, 7]
        row_of_token       [0, 2, 3]
        token_of_row       [0, 0, 1, 2]
        last_visible       [5, 6, 6, 7]
    """
    spans = []
    slot_parts = []
    column_parts = []
    is_token_parts = []
    num_rows = 0
    for first, end in plan_spans(num_new, max_span_slots):
        # 1. The rows of a span: w for each of its b slots.
        new = num_new[first:end, None]                                      # (b, 1)
        cached = num_cached[first:end, None]                                # (b, 1)
        width = int(new.max())
        offset = np.arange(width)                                           # (w,)
        slot = np.arange(first_slot + first, first_slot + end)              # (b,)
        slot_parts.append(slot.repeat(width))                               # (b * w,)
        column_parts.append((cached + offset).ravel())                      # (b * w,)
        is_token_parts.append((offset < new).ravel())                       # (b * w,)
        # 2. What its attention call needs.
        query_rows = slice(num_rows, num_rows + (end - first) * width)
        span_slots = slice(first_slot + first, first_slot + end)
        spans.append(Span(query_rows, span_slots, width, int((cached + new).max())))
        num_rows = query_rows.stop
    # 3. Rows without padding are the tokens, in order.
    is_token = np.concatenate(is_token_parts)                               # (P,)
    column_of_row = np.concatenate(column_parts)                            # (P,)
    return RowPlan(spans,
                   slot_of_token=np.concatenate(slot_parts)[is_token],
                   column_of_token=column_of_row[is_token],
                   row_of_token=is_token.nonzero()[0],
                   token_of_row=np.where(is_token, is_token.cumsum() - 1, 0),
                   last_visible=column_of_row)


def to_device(device, *arrays):
    """Copy arrays of integers to the device in one transfer. Return tensors of the same shapes. On
    a GPU every small transfer would cost as much as a layer of the model."""
    flat = np.concatenate([array.ravel() for array in arrays])
    parts = torch.from_numpy(flat).to(device).split([array.size for array in arrays])
    return [part.view(array.shape) for part, array in zip(parts, arrays)]


class SlotCache:
    """Keys and values of every slot: two tensors (num_slots, K, length, D) per layer, K key heads.

    On a CPU the cache grows with the longest conversation; on a GPU it has its full size at once.
    Rejected draft tokens are not erased: their columns are overwritten before any query can see
    them. Attention runs over spans of neighbouring slots, each cut to its own longest conversation.
    So nothing is copied, and a short conversation is not charged for the longest one, if slots are
    sorted by length (see Engine.evict)."""

    def __init__(self, config, num_slots, dtype, device, max_length):
        self.num_slots = num_slots
        self.max_length = max_length
        self.dtype = dtype
        self.device = torch.device(device)
        self.queries_per_key = config.num_attention_heads // config.num_key_value_heads     # H / K
        # On a CPU padding costs most. On a GPU calls do: a span may have all slots, and its number
        # of columns is a multiple of 8 (PyTorch would pad other masks anew in every layer). A GPU's
        # allocator would keep what was outgrown, so there all memory is taken at once.
        on_gpu = self.device.type == "cuda"
        self.max_span_slots = num_slots if on_gpu else MAX_SPAN_SLOTS
        self.column_multiple = 8 if on_gpu else 1
        length = self.round_up(max_length) if on_gpu else 256
        shape = (num_slots, config.num_key_value_heads, length, sft.head_size(config))
        self.layers = []
        for _ in range(config.num_hidden_layers):
            keys = torch.zeros(shape, dtype=dtype, device=device)
            values = torch.zeros(shape, dtype=dtype, device=device)
            self.layers.append([keys, values])

    @property
    def length(self):
        """Return the number of columns."""
        return self.layers[0][0].shape[2]

    def round_up(self, num_columns):
        """Return the next multiple of column_multiple."""
        return -(-num_columns // self.column_multiple) * self.column_multiple

    def reserve(self, num_columns):
        """Make room for conversations of num_columns tokens. Grow by half at least, up to
        max_length."""
        length = self.length
        if num_columns <= length:
            return
        growth = max(num_columns - length, min(length // 2, self.max_length - length))
        for layer in self.layers:   # one tensor after the other: never two whole caches at once
            for index, tensor in enumerate(layer):
                layer[index] = F.pad(tensor, (0, 0, 0, growth))

    def plan(self, first_slot, num_cached, num_new):
        """Prepare a forward pass over neighbouring slots, see plan_rows. Return a CachePlan."""
        num_columns = int((num_cached + num_new).max())
        self.reserve(num_columns)
        row_plan = plan_rows(first_slot, num_cached, num_new, self.max_span_slots)
        # The H / K queries of a row have the same last column, one line of the mask each.
        last_of_mask_row = row_plan.last_visible.repeat(self.queries_per_key)   # (P * H / K,)
        *indices, last_of_mask_row = to_device(
            self.device, row_plan.slot_of_token, row_plan.column_of_token, row_plan.row_of_token,
            row_plan.token_of_row, last_of_mask_row)
        columns = torch.arange(self.round_up(num_columns), device=self.device)
        spans = [self.add_mask(span, columns, last_of_mask_row) for span in row_plan.spans]
        return CachePlan(self.layers, spans, *indices)

    def add_mask(self, span, columns, last_of_mask_row):
        """Return a span with its mask (b, 1, w * H / K, S): 0 in columns that a query sees, else
        -inf. A slot with many new tokens gets none: in a large model it would take gigabytes."""
        if span.width > MAX_SHORT_FEED:
            return span
        span = span._replace(num_columns=self.round_up(span.num_columns))
        first = span.query_rows.start * self.queries_per_key
        end = span.query_rows.stop * self.queries_per_key
        mask_height = span.width * self.queries_per_key
        last_visible = last_of_mask_row[first:end].view(-1, 1, mask_height, 1)
        zero = torch.zeros((), dtype=self.dtype, device=self.device)
        mask = torch.where(columns[:span.num_columns] > last_visible, -math.inf, zero)
        return span._replace(mask=mask)

    def copy_out(self, slot, length):
        """Return copies of the first `length` keys and values of a slot, layer by layer."""
        return [[tensor[slot, :, :length].clone() for tensor in layer] for layer in self.layers]

    def copy_in(self, slot, saved):
        """Write what copy_out returned into a slot."""
        for layer, saved_layer in zip(self.layers, saved):
            for tensor, saved_tensor in zip(layer, saved_layer):
                tensor[slot, :, :saved_tensor.shape[1]] = saved_tensor      # (K, length, D)


@dataclass
class CachePlan:
    """What the model uses as its KV cache in one forward pass over N new tokens. Every layer calls
    update(), and then attend() through the attention function of sft.py."""
    layers: list                        # of the SlotCache
    spans: list
    slot_of_token: torch.Tensor         # these four as in RowPlan
    column_of_token: torch.Tensor
    row_of_token: torch.Tensor
    token_of_row: torch.Tensor

    def update(self, key, value, layer_index, *args, **kwargs):
        """Write the keys and values of the new tokens, (1, K, N, D) each, into a layer. Return the
        keys and values of all slots, (num_slots, K, length, D) each."""
        keys, values = self.layers[layer_index]
        keys[self.slot_of_token, :, self.column_of_token] = key[0].transpose(0, 1)      # (N, K, D)
        values[self.slot_of_token, :, self.column_of_token] = value[0].transpose(0, 1)
        return keys, values

    def attend(self, query, key, value, scaling):
        """Let every new token attend to its own slot. query (1, H, N, D): the new tokens of all
        slots end to end. key and value (num_slots, K, length, D), as update() returns them. Return
        (1, N, H, D)."""
        num_key_heads = key.shape[1]
        query_rows = query[0].transpose(0, 1)[self.token_of_row]            # (P, H, D)
        query_rows = query_rows.unflatten(1, (num_key_heads, -1))           # (P, K, H / K, D)
        outputs = []
        for span in self.spans:
            attention = attend_unmasked if span.mask is None else attend_masked
            outputs.append(attention(
                span, query_rows[span.query_rows],                          # (b * w, K, H / K, D)
                key[span.slots, :, :span.num_columns],                      # (b, K, S, D)
                value[span.slots, :, :span.num_columns], scaling))
        return torch.cat(outputs)[self.row_of_token][None]                  # (1, N, H, D)


def attend_masked(span, query_rows, keys, values, scaling):
    """Attend with a few new tokens per slot. Return (b * w, H, D). The H / K query heads that share
    a key head are laid along the query axis. So keys are neither repeated nor read twice."""
    queries = query_rows.unflatten(0, (-1, span.width))                     # (b, w, K, H / K, D)
    queries = queries.transpose(1, 2).flatten(2, 3)                         # (b, K, w * H / K, D)
    output = F.scaled_dot_product_attention(queries, keys, values, attn_mask=span.mask,
                                            scale=scaling)                  # (b, K, w * H / K, D)
    output = output.unflatten(2, (span.width, -1)).transpose(1, 2)          # (b, w, K, H / K, D)
    return output.flatten(2, 3).flatten(0, 1)


def attend_unmasked(span, query_rows, keys, values, scaling):
    """Attend with many new tokens of one slot. Return (w, H, D). Its last token sees all columns,
    the one before it all but one, and so on."""
    queries = query_rows.flatten(1, 2).transpose(0, 1)[None]                # (1, H, w, D)
    output = F.scaled_dot_product_attention(
        queries, keys, values, attn_mask=causal_lower_right(span.width, span.num_columns),
        scale=scaling, enable_gqa=True)                                     # (1, H, w, D)
    return output[0].transpose(0, 1)


# ---- The rollout engine -------------------------------------------------------------------------


class EncodedPrompt(NamedTuple):
    """The prompt of a question, after prefill. All samples of the question begin with it."""
    row: dict               # the question
    image: object           # PIL image
    token_ids: list         # of the whole prompt
    keys_values: list       # of all its tokens but the last, see SlotCache.copy_out
    next_position: int      # M-RoPE position of the last token


class Feed(NamedTuple):
    """What one slot feeds into one forward pass. A slot that waits for an image feeds no tokens."""
    num_cached_tokens: int
    position: int           # M-RoPE position of the first new token
    pending_ids: list       # tokens of the conversation that are not in the cache yet
    draft_ids: list         # proposed tokens after them (without drafts: [])
    images: list            # (patches, grid) of the images among pending_ids

    @property
    def token_ids(self):
        return self.pending_ids + self.draft_ids

    @property
    def num_sampled(self):
        """Return how many tokens are sampled: one after the last pending token, and one after each
        token of the draft."""
        return len(self.draft_ids) + 1 if self.pending_ids else 0


# A graph attends over at least so many columns: fewer would be no faster.
MIN_GRAPH_COLUMNS = 2048

# Steps of decoding in which two images of a megapixel are cut and resized. A turn has ten times as
# many.
GPU_IMAGE_DELAY = 8


def cache_argument(model):
    """Return the name of the argument with the KV cache. Newer versions of transformers call it
    "cache", and ignore a name that they do not know."""
    parameters = inspect.signature(model.model.forward).parameters
    return "cache" if "cache" in parameters else "past_key_values"


def sample(logprobs, random_numbers, greedy):
    """Sample a token from each row of log-probs (M, V) with its own random number in [0, 1), (M,)
    in float64. It is the first whose cumulative probability, summed in float64, exceeds the random
    number. So a token of probability 0 is never sampled. Return ids and log-probs, (2, M), in
    float64. `greedy`: take the most likely token instead."""
    if greedy:
        token_ids = logprobs.argmax(-1)                                     # (M,)
    else:
        cumulative = logprobs.exp().cumsum(-1, dtype=torch.float64)         # (M, V)
        # Rounded probabilities do not add up to exactly 1, so compare with shares of their sum.
        thresholds = random_numbers[:, None] * cumulative[:, -1:]           # (M, 1)
        token_ids = (cumulative <= thresholds).sum(-1)                      # (M,)
    token_logprobs = logprobs.gather(-1, token_ids[:, None])[:, 0]          # (M,)
    return torch.stack([token_ids.double(), token_logprobs.double()])


def split_list(items, sizes):
    """Cut a list into consecutive lists of these sizes."""
    parts = []
    first = 0
    for size in sizes:
        parts.append(items[first:first + size])
        first += size
    return parts


class DecodePass:
    """A decoding step of fixed shape, so that a GPU can replay it as a CUDA graph.

    For one step of a 7B model Python starts some 1,400 kernels, which takes three times as long as
    the kernels do. A graph is recorded once and then started at once. But a graph always uses the
    same memory, and no shape may change. So all b slots of the cache take part, with w rows each,
    w = 1 + num_speculative_tokens. With w = 3:

        slot 0    a b c     a pending token and a draft of two
        slot 1    d . .     no draft: the other rows are padding
        slot 2    . . .     waits for an image, or is empty

    Padding is token 0. It sees at least its own column, so nothing is NaN. Its keys and values are
    written after those of the slot's tokens, where a token that is kept overwrites them before any
    query sees the column. What is sampled after it is ignored. The number of columns over which all
    slots attend is the only size that grows, so there is a graph for each of a few numbers.

    A CPU, which pays for padding and not for starting kernels, uses Engine.forward; tests run the
    same pass there, eagerly."""

    def __init__(self, policy, cache, cache_argument, width, greedy):
        self.policy = policy
        self.cache = cache
        self.cache_argument = cache_argument
        self.width = width
        self.greedy = greedy
        self.graphs = {}        # of each number of columns
        device = policy.device
        num_rows = cache.num_slots * width
        # What a step reads and writes, at fixed addresses: ids, positions and columns of all rows;
        # random numbers; ids and log-probs that are sampled. Pinned memory is copied while Python
        # goes on.
        on_gpu = device.type == "cuda"
        self.host_integers = torch.zeros(3, num_rows, dtype=torch.long, pin_memory=on_gpu)
        self.host_uniforms = torch.zeros(num_rows, dtype=torch.float64, pin_memory=on_gpu)
        self.integers = self.host_integers.to(device, copy=True)
        self.uniforms = self.host_uniforms.to(device, copy=True)
        self.sampled = torch.zeros(2, num_rows, dtype=torch.float64, device=device)
        # What never changes: no tensor may be copied to the device while a graph is recorded.
        self.rows = torch.arange(num_rows, device=device)
        self.slot_of_row = self.rows // width
        # Never read: a mask of four dimensions keeps transformers from making one.
        self.any_mask = torch.zeros(1, 1, 1, 1, device=device)

    def fits(self, feeds):
        """Return whether a step is a decoding step: no images, and at most `width` tokens a slot,
        as always unless the tool has just answered."""
        return all(not feed.images and len(feed.token_ids) <= self.width for feed in feeds)

    @torch.inference_mode()
    def run(self, feeds, uniforms):
        """Feed every slot, and sample with these random numbers. Return ids and log-probs, (2, M),
        as sample() does for the rows of forward()."""
        # 1. Lay the tokens out in rows, padded. A token is sampled after the last num_sampled
        #    tokens of each feed.
        shape = (self.cache.num_slots, self.width)
        token_ids = np.zeros(shape, dtype=np.int64)                         # (b, w)
        first_position = np.zeros((self.cache.num_slots, 1), dtype=np.int64)
        first_column = np.zeros((self.cache.num_slots, 1), dtype=np.int64)
        sampled_rows = []
        num_columns = 1
        for slot, feed in enumerate(feeds):
            num_tokens = len(feed.token_ids)
            token_ids[slot, :num_tokens] = feed.token_ids
            first_position[slot] = feed.position
            first_column[slot] = feed.num_cached_tokens
            num_columns = max(num_columns, feed.num_cached_tokens + num_tokens)
            end_row = slot * self.width + num_tokens
            sampled_rows.extend(range(end_row - feed.num_sampled, end_row))
        offset = np.arange(self.width)                                      # (w,)
        rows = np.stack([token_ids, first_position + offset, first_column + offset])
        self.host_integers.copy_(torch.from_numpy(rows.reshape(3, -1)))     # (3, b * w)
        self.host_uniforms[sampled_rows] = torch.tensor(uniforms, dtype=torch.float64)
        # 2. Run. Padding needs columns, too.
        self.cache.reserve(int(first_column.max()) + self.width)
        self.integers.copy_(self.host_integers, non_blocking=True)
        self.uniforms.copy_(self.host_uniforms, non_blocking=True)
        num_columns = self.round_up(num_columns)
        if self.policy.device.type == "cuda":
            self.replay(num_columns)
        else:
            self.body(num_columns)
        return self.sampled.cpu()[:, sampled_rows]                          # (2, M)

    def round_up(self, num_columns):
        """Return for how many columns the pass is run: 2,048, 3,072, 4,096, 6,144, 8,192 and so on,
        or all that the cache has."""
        size = MIN_GRAPH_COLUMNS
        while size < num_columns:
            size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
        return min(size, self.cache.length)

    def body(self, num_columns):
        """Go from token ids to sampled ids. Nothing here waits for the device, or depends on what a
        tensor contains."""
        token_ids, positions, columns = self.integers                       # (b * w,) each
        # 1. All slots are one span. A query sees the columns up to its own.
        last_visible = columns.view(-1, 1, self.width, 1)                   # (b, 1, w, 1)
        last_visible = last_visible.expand(-1, -1, -1, self.cache.queries_per_key)
        last_visible = last_visible.flatten(2)[..., None]                   # (b, 1, w * H / K, 1)
        is_hidden = torch.arange(num_columns, device=columns.device) > last_visible
        mask = torch.zeros(is_hidden.shape, dtype=self.cache.dtype, device=columns.device)
        mask.masked_fill_(is_hidden, -math.inf)                             # (b, 1, w * H / K, S)
        span = Span(slice(0, len(self.rows)), slice(0, self.cache.num_slots), self.width,
                    num_columns, mask)
        plan = CachePlan(self.cache.layers, [span], self.slot_of_row, columns, self.rows, self.rows)
        # 2. The language model alone: with images, its wrapper would wait for the device.
        model = self.policy.model
        hidden = model.model.language_model(
            inputs_embeds=model.get_input_embeddings()(token_ids[None]),    # (1, b * w, width)
            position_ids=positions.expand(3, 1, -1), attention_mask=self.any_mask, use_cache=True,
            attend=plan.attend, **{self.cache_argument: plan}).last_hidden_state[0]
        logprobs = sft.vocab_logprobs(self.policy, hidden)                  # (b * w, V)
        self.sampled.copy_(sample(logprobs, self.uniforms, self.greedy))

    def replay(self, num_columns):
        """Replay the graph of body(num_columns). Record it when it is needed for the first time."""
        if num_columns not in self.graphs:
            # A first run outside of a graph: libraries take their memory in it.
            self.body(num_columns)
            # Graphs run one after the other, so they share their memory.
            pool = next(iter(self.graphs.values())).pool() if self.graphs else None
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                self.body(num_columns)
            self.graphs[num_columns] = graph
        self.graphs[num_columns].replay()


class Engine:
    """Play conversations: fill the slots, then step until all are finished. A step, which is one
    forward pass: schedule -> forward -> sample -> accept -> let the tool answer complete turns ->
    evict finished conversations. (begin_step() is about a step of rl.py.) `greedy`: take the most
    likely token instead of a sample."""

    def __init__(self, policy, limits, max_num_seqs=64, seed=0, step=0, greedy=False, judge=None,
                 num_speculative_tokens=4, short_model_len=None):
        self.policy = policy
        self.limits = limits
        self.max_num_seqs = max_num_seqs
        self.seed = seed
        self.greedy = greedy
        self.judge = judge
        # Threads crop and resize images while the model runs.
        on_gpu = policy.device.type == "cuda"
        self.loader = ThreadPoolExecutor(4 if on_gpu else 2)
        self.image_delay = GPU_IMAGE_DELAY if on_gpu else 0
        self.num_steps = 0
        self.cache_argument = cache_argument(policy.model)
        self.cache = None
        self.slot_length = 0                    # tokens for which a slot of the cache has room
        self.short_length = min(short_model_len or limits.max_model_len, limits.max_model_len)
        self.has_fixed_shape = on_gpu           # decode with a DecodePass
        self.decode_pass = None
        # Of a run.
        self.waiting = collections.deque()      # Rollouts that have no slot yet
        self.set_aside = collections.deque()    # those that do not fit in a short slot
        self.queue = self.waiting               # the one of the two that is played now
        self.slots = []                         # the Rollout in each slot of the cache
        self.next_images = (None, None)         # a Rollout, and what load_images returned for it
        self.encoded_prompt = None              # of the question that was begun last
        # Of drafts.
        self.num_speculative_tokens = num_speculative_tokens
        self.never_drafted = {*policy.suppressed_ids, *policy.stop_ids}
        self.proposer = NgramProposer()
        # Of a step of rl.py.
        self.random_key = (seed, step)
        self.counts = collections.Counter()

    def begin_step(self, step):
        """Take another random stream, and forget n-grams and counts. N-grams are forgotten so that
        a resumed run has the same drafts, hence the same batch shapes and rounding, as one without
        a break."""
        self.random_key = (self.seed, step)
        self.proposer = NgramProposer()
        self.counts = collections.Counter()

    def free_cache(self):
        """Free the memory of keys and values; the next run takes it again. A GPU's allocator would
        keep it in blocks whose sizes do not fit the update."""
        self.cache = None
        self.decode_pass = None
        self.encoded_prompt = None
        if self.policy.device.type == "cuda":
            torch.cuda.empty_cache()

    def run(self, rows, num_samples, root, prompt_numbers=None):
        """Play every row num_samples times. Return Rollouts, ordered by row, then sample. The
        arguments are those of make_rollouts. Raise InputError as play_all."""
        rollouts = make_rollouts(rows, num_samples, root, prompt_numbers, self.policy.prompts)
        for _ in self.play_all(rollouts):
            pass
        # The judge answers while conversations are played. Wait for its last verdicts.
        if self.judge is not None:
            self.judge.wait()
        return rollouts

    @torch.inference_mode()
    def play_all(self, rollouts):
        """Play these conversations, in which those about one question follow one another. Yield
        each as soon as it has ended; if it needs the judge, its reward is None until judge.wait().
        Meanwhile the caller may append others to self.waiting. Raise InputError if a prompt does
        not fit.

        Most conversations are short. So they are played in max_num_seqs slots of short_length
        tokens. Those that outgrow their slot are set aside, and played to the end in the same
        memory, in fewer slots of max_model_len tokens: their tokens are fed again. What the
        caller has appended in the meantime begins in short slots: hence the loop."""
        model = self.policy.model
        was_training = model.training
        model.eval()
        self.waiting = collections.deque(rollouts)
        self.set_aside = collections.deque()
        self.encoded_prompt = None
        num_long_slots = self.max_num_seqs * self.short_length // self.limits.max_model_len
        try:
            while self.waiting or self.set_aside:
                yield from self.play_queue(self.waiting, self.max_num_seqs, self.short_length)
                yield from self.play_queue(self.set_aside, max(1, num_long_slots),
                                           self.limits.max_model_len)
        finally:
            model.train(was_training)

    def play_queue(self, queue, max_slots, slot_length):
        """Play until no conversation is in this queue or in a slot, in slots of slot_length
        tokens."""
        # 1. A cache with a slot for each of them, up to max_slots. A draft may reach beyond the
        #    slot's last token.
        self.queue = queue
        num_slots = min(max_slots, len(queue))
        if num_slots == 0:
            return
        has_room = self.cache is not None and self.cache.num_slots >= num_slots
        if not has_room or self.slot_length != slot_length:
            self.free_cache()       # before the new one takes memory
            model = self.policy.model
            self.cache = SlotCache(model.config.text_config, num_slots, model.dtype,
                                   self.policy.device, slot_length + self.num_speculative_tokens)
            self.slot_length = slot_length
            if self.has_fixed_shape:
                self.decode_pass = DecodePass(self.policy, self.cache, self.cache_argument,
                                              1 + self.num_speculative_tokens, self.greedy)
        # 2. Fill the slots and play; evict() refills a slot as long as there are rollouts waiting.
        self.slots = []
        while queue or self.slots:
            while queue and len(self.slots) < num_slots:
                started = self.start_next(len(self.slots))
                if started is not None:
                    self.slots.append(started)
            if self.slots:
                yield from self.step()

    def load_images(self, rollout):
        """Let a thread read the images with which a conversation begins; return its Future. Of a
        new one: (PIL image, (patches, grid)). Of one that was set aside: [(patches, grid)] of all
        its images."""
        if rollout.token_ids:
            original, *crops = rollout.views
            views = [original, *map(self.shown, crops)]
            return self.loader.submit(self.policy.preprocess_images, views)
        path = Path(rollout.root) / rollout.row["image"]
        return self.loader.submit(open_and_preprocess, self.policy, path)

    def take_images(self, rollout):
        """Return what load_images promised for a conversation that starts now. Those of the next
        conversation that needs any are prepared meanwhile."""
        prepared_for, future = self.next_images
        if prepared_for is not rollout:
            future = self.load_images(rollout)
        self.next_images = (None, None)
        for other in self.queue:    # other samples of this question copy its prompt: no image
            if other.token_ids or other.row is not rollout.row:
                self.next_images = (other, self.load_images(other))
                break
        return future.result()

    def start_next(self, slot):
        """Start the next conversation of the queue in a free slot, and return it. Return None if
        its prompt needs a longer slot: it is set aside. The prompt's last token is not fed yet: the
        first token is sampled after it in step(), like every other token."""
        rollout = self.queue.popleft()
        if rollout.token_ids:   # it has outgrown a shorter slot
            self.feed_again(slot, rollout)
            return rollout
        # 1. The first sample of a question encodes the prompt; all samples copy its cache.
        if self.encoded_prompt is None or self.encoded_prompt.row is not rollout.row:
            self.encoded_prompt = self.prefill(slot, rollout)
        if self.encoded_prompt is None:
            self.set_aside.append(rollout)
            return None
        prompt = self.encoded_prompt
        self.cache.copy_in(slot, prompt.keys_values)
        # 2. The conversation so far is the prompt; none of it is trained on.
        rollout.append(prompt.token_ids, False)
        rollout.views.append(prompt.image)
        rollout.turn_start = len(prompt.token_ids)
        rollout.num_cached_tokens = len(prompt.token_ids) - 1
        rollout.next_position = prompt.next_position
        rollout.random_generator = np.random.default_rng(
            [*self.random_key, rollout.prompt_number, rollout.sample_number])
        return rollout

    def prefill(self, slot, rollout):
        """Run the model on the prompt of a rollout's question, in a slot that is free. Return an
        EncodedPrompt, or None if the slot is too short for it."""
        row = rollout.row
        image, preprocessed = self.take_images(rollout)
        _, image_grid = preprocessed
        token_ids = self.policy.prompt_ids(row, image_grid)
        limits = self.limits
        tools.check(len(token_ids) + limits.max_new_tokens <= limits.max_model_len,
                    f"question {row['id']}: prompt ({len(token_ids)} tokens) and one turn "
                    f"({limits.max_new_tokens}) do not fit in --max_model_len "
                    f"{limits.max_model_len}: raise it, or lower --max_new_tokens or --max_pixels")
        if len(token_ids) > self.slot_length:
            return None
        feed = Feed(0, 0, token_ids[:-1], [], [preprocessed])
        _, next_positions = self.forward([feed], first_slot=slot)
        keys_values = self.cache.copy_out(slot, len(token_ids) - 1)
        return EncodedPrompt(row, image, token_ids, keys_values, next_positions[0])

    def feed_again(self, slot, rollout):
        """Continue a conversation that was set aside, in a free slot: feed its tokens but the
        last, and all its images, in one pass."""
        feed = Feed(0, 0, rollout.token_ids[:-1], [], self.take_images(rollout))
        _, next_positions = self.forward([feed], first_slot=slot)
        rollout.num_cached_tokens = len(rollout.token_ids) - 1
        rollout.next_position = next_positions[0]

    def shown(self, crop):
        """Return what the model sees of a crop: the crop, or a black picture."""
        return tools.black_picture(crop) if self.limits.blank_crops else crop

    def step(self):
        """Advance every conversation by one token, or by several if a draft was right.
        Conversations that wait for an image are not advanced, see slots_to_feed_images. Return
        those that have ended. Those that have outgrown their slot are set aside."""
        # 1. Schedule: the tokens of every slot that are not in the cache yet.
        self.num_steps += 1
        feeds = self.schedule()
        # 2. Run the model and sample; M = one token per feed and per token of a draft.
        uniforms = []
        for rollout, feed in zip(self.slots, feeds):
            uniforms += rollout.next_uniforms(feed.num_sampled)
        if self.decode_pass is not None and self.decode_pass.fits(feeds):
            sampled = self.decode_pass.run(feeds, uniforms)                 # (2, M)
            sampled_ids, sampled_logprobs = self.to_lists(sampled)
            next_positions = [feed.position + len(feed.token_ids) for feed in feeds]
        else:
            logprobs, next_positions = self.forward(feeds, first_slot=0)    # (M, V)
            sampled_ids, sampled_logprobs = self.sample_tokens(logprobs, uniforms)
        # 3. Append what was sampled. The tool answers turns that are complete.
        sizes = [feed.num_sampled for feed in feeds]
        ids_of_slot = split_list(sampled_ids, sizes)
        logprobs_of_slot = split_list(sampled_logprobs, sizes)
        free_slots = []
        finished = []
        for slot, feed in enumerate(feeds):
            if feed.num_sampled == 0:
                continue
            rollout = self.slots[slot]
            rollout.pending_image = None
            turn_is_over = self.accept(rollout, feed.draft_ids, ids_of_slot[slot],
                                       logprobs_of_slot[slot], next_positions[slot])
            if turn_is_over:
                self.finish_turn(rollout)
            if rollout.finish_reason is not None:
                finished.append(rollout)
                free_slots.append(slot)
            elif len(rollout.token_ids) > self.slot_length:     # also within a turn
                rollout.pending_image = None    # feed_again() feeds all images
                self.set_aside.append(rollout)
                free_slots.append(slot)
        # 4. Evict from the last slot on, since evict() moves the slots after the one that is free.
        for rollout in finished:
            rollout.compute_reward(self.judge)
            rollout.views = []      # what only the engine needs
            rollout.uniforms = []
        for slot in reversed(free_slots):
            self.evict(slot)
        return finished

    def schedule(self):
        """Return one Feed per slot, in order: pending tokens, and a draft of the next ones."""
        image_slots = self.slots_to_feed_images()
        feeds = []
        for slot, rollout in enumerate(self.slots):
            pending_ids = []
            draft_ids = []
            images = []
            if slot in image_slots:
                images = rollout.pending_image.result()
            if rollout.pending_image is None or slot in image_slots:
                pending_ids = rollout.token_ids[rollout.num_cached_tokens:]
                draft_ids = self.draft_for(rollout)
            feeds.append(Feed(rollout.num_cached_tokens, rollout.next_position, pending_ids,
                              draft_ids, images))
        return feeds

    def slots_to_feed_images(self):
        """Return the slots whose pending images are fed in this step. Images wait until a quarter
        of the slots have one: a batch that is worth its overhead. Their tokens together are at most
        max_model_len, which bounds the memory; the rest waits. An image counts from image_delay
        steps after its zoom on, when a thread has certainly prepared it, or if nothing else can be
        fed: asking the threads would make a run depend on their speed."""
        waiting_slots = [slot for slot, rollout in enumerate(self.slots)
                         if rollout.pending_image is not None]
        if len(waiting_slots) < len(self.slots):
            waiting_slots = [slot for slot in waiting_slots if
                             self.num_steps - self.slots[slot].image_step >= self.image_delay]
        if 4 * len(waiting_slots) < len(self.slots):
            return []
        chosen_slots = []
        num_tokens = 0
        for slot in waiting_slots:
            rollout = self.slots[slot]
            num_tokens += len(rollout.token_ids) - rollout.num_cached_tokens
            if num_tokens <= self.limits.max_model_len:
                chosen_slots.append(slot)
        return chosen_slots

    def forward(self, feeds, first_slot):
        """Run the model on the new tokens of neighbouring slots, end to end: N tokens. feeds: one
        per slot, from first_slot on. Return log-probs (M, V) over the token after each of the last
        num_sampled tokens of each feed, and the M-RoPE position after each feed."""
        policy = self.policy
        device = policy.device
        # 1. Token ids, their positions, and the indices of those after which a token is sampled.
        token_ids = []
        positions = []
        next_positions = []
        sampled_after = []
        for feed in feeds:
            token_ids += feed.token_ids
            sampled_after.extend(range(len(token_ids) - feed.num_sampled, len(token_ids)))
            feed_positions, next_position = self.feed_positions(feed)
            positions.append(feed_positions)
            next_positions.append(next_position)
        input_ids, position_ids, sample_index = to_device(      # (1, N), (3, 1, N), (M,)
            device, np.array([token_ids]), np.concatenate(positions, axis=1)[:, None],
            np.array(sampled_after))
        # 2. Images.
        image_inputs = {}
        images = [image for feed in feeds for image in feed.images]
        if images:
            patches, image_grids = zip(*images)
            image_inputs["pixel_values"] = torch.cat(patches).to(device)    # (all patches, C)
            image_inputs["image_grid_thw"] = torch.tensor(image_grids, device=device)
        # 3. Where keys and values are written, and what every token attends to.
        plan = self.cache.plan(first_slot,
                               np.array([feed.num_cached_tokens for feed in feeds]),
                               np.array([len(feed.token_ids) for feed in feeds]))
        # 4. The model. A four-dimensional mask keeps transformers from building one; attend()
        # ignores it.
        hidden = policy.model.model(
            input_ids=input_ids, position_ids=position_ids,
            attention_mask=torch.zeros(1, 1, 1, 1), use_cache=True, attend=plan.attend,
            **{self.cache_argument: plan}, **image_inputs).last_hidden_state[0]     # (N, D)
        return sft.vocab_logprobs(policy, hidden[sample_index]), next_positions

    def feed_positions(self, feed):
        """Return the M-RoPE positions of a feed's tokens, (3, n), and the position after them."""
        if not feed.images:     # as mrope_positions does, but without tensors: faster
            next_position = feed.position + len(feed.token_ids)
            return np.tile(np.arange(feed.position, next_position), (3, 1)), next_position
        image_grids = [image_grid for _, image_grid in feed.images]
        positions, next_position = sft.mrope_positions(
            feed.token_ids, image_grids, self.policy.image_token_id, self.policy.merge_size,
            feed.position)
        return positions.numpy(), next_position

    def sample_tokens(self, logprobs, uniforms):
        """Sample a token from each row of log-probs (M, V) with its own random number in [0, 1).
        Return two lists of length M: ids, log-probs."""
        random_numbers = torch.tensor(uniforms, dtype=torch.float64, device=logprobs.device)
        return self.to_lists(sample(logprobs, random_numbers, self.greedy))

    def to_lists(self, sampled):
        """Return the ids and the log-probs of sampled tokens, (2, M), as two lists: one transfer
        from the device for both. Raise InputError if a log-prob is not finite."""
        id_list, logprob_list = sampled.tolist()
        tools.check(all(map(math.isfinite, logprob_list)), "the model's logits are not finite (NaN "
                    f"or infinite) in {self.policy.model.dtype}: its weights are damaged, or too "
                    "large for it; try --dtype float32")
        return list(map(int, id_list)), logprob_list

    def finish_turn(self, rollout):
        """Parse a complete turn and let the tool answer it, or set finish_reason."""
        limits = self.limits
        turn_ids = rollout.token_ids[rollout.turn_start:]
        rollout.turn_ends.append(len(rollout.token_ids))
        if turn_ids[-1] in self.policy.stop_ids:
            text = self.policy.tokenizer.decode(turn_ids[:-1], skip_special_tokens=False)
            turn, rollout.finish_reason, rollout.prediction = tools.take_turn(
                rollout.views, text, len(rollout.turns) + 1, limits.max_turns, limits.max_images)
        else:   # the turn has max_new_tokens tokens and no end
            text = self.policy.tokenizer.decode(turn_ids, skip_special_tokens=False)
            turn = {"text": text}
            rollout.finish_reason = "void"
        rollout.turns.append(turn)
        if rollout.finish_reason is None:
            self.append_observation(rollout)

    def append_observation(self, rollout):
        """Append the tool's message, with the crop after a zoom. If it and one more turn do not
        fit, the conversation ends as over_context."""
        # 1. The ids of the message. The crop's grid says how many image tokens they contain.
        turn = rollout.turns[-1]
        image_grid = None
        if "zoom" in turn:
            image_grid = self.policy.image_grid(rollout.views[-1])
        message_ids = self.policy.tool_message_ids(
            turn, turn_number=len(rollout.turns), num_observations=len(rollout.views) - 1,
            grid=image_grid)
        # 2. Do they fit? A conversation must never be cut in the middle of a turn.
        num_tokens = len(rollout.token_ids) + len(message_ids)
        if num_tokens + self.limits.max_new_tokens > self.limits.max_model_len:
            rollout.finish_reason = "over_context"
            return
        # 3. Append them. The crop is cut into patches in the background.
        rollout.append(message_ids, False)
        rollout.turn_start = len(rollout.token_ids)
        if "zoom" in turn:
            view = self.shown(rollout.views[-1])
            rollout.pending_image = self.loader.submit(self.policy.preprocess_images, [view])
            rollout.image_step = self.num_steps

    def evict(self, slot):
        """Give the slot of a conversation that has ended or is set aside to the next one.

        Slots are kept roughly sorted, longest first, since a span is as long as its longest
        conversation. For this the slots are seen as blocks of max_span_slots, whatever spans a pass
        has. The longest conversation of the next block moves into the free slot, the longest of the
        block after that into the slot that is free now, and so on. The new conversation starts in
        the last block. With blocks of two and these lengths, when the conversation in the second
        slot has ended:

            9 _ | 5 7 | 1 3    ->    9 7 | 5 3 | 1 _

        If no conversation is waiting, the last slot moves into the free one."""
        # 1. Hand the free slot on to the last block.
        free_slot = slot
        block_size = self.cache.max_span_slots
        first_of_next_block = (slot // block_size + 1) * block_size
        for first in range(first_of_next_block, len(self.slots), block_size):
            next_block = range(first, min(first + block_size, len(self.slots)))
            longest = max(next_block, key=lambda other: self.slots[other].num_cached_tokens)
            self.move(longest, free_slot)
            free_slot = longest
        # 2. Fill it, or close the gap.
        started = None
        while self.queue and started is None:
            started = self.start_next(free_slot)
        if started is not None:
            self.slots[free_slot] = started
        else:
            self.move(len(self.slots) - 1, free_slot)
            self.slots.pop()

    def move(self, slot, free_slot):
        """Move a conversation into a free slot (which may be its own)."""
        if slot == free_slot:
            return
        rollout = self.slots[slot]
        self.cache.copy_in(free_slot, self.cache.copy_out(slot, rollout.num_cached_tokens))
        self.slots[free_slot] = rollout

    # ---- Drafts: speculative decoding (to be skipped at a first reading) ------------------------
    # Without drafts draft_for() returns [], and accept() appends the one token that was sampled.

    def draft_for(self, rollout):
        """Propose up to num_speculative_tokens tokens that the policy may write next.
        accept() appends one token more than it accepts of the draft. So the draft leaves room for
        that token in the turn, and ends before a token that ends the turn, since nothing comes
        after it. It holds no image placeholders."""
        if self.num_speculative_tokens == 0:
            return []
        num_left = self.limits.max_new_tokens - (len(rollout.token_ids) - rollout.turn_start)
        max_tokens = min(self.num_speculative_tokens, num_left - 1)
        draft_ids = []
        for token_id in self.proposer.propose(rollout.token_ids, max_tokens):
            if token_id in self.never_drafted:
                break
            draft_ids.append(token_id)
        return draft_ids

    def accept(self, rollout, draft_ids, sampled_ids, sampled_logprobs, next_position):
        """Verify a draft and append the sampled tokens that are valid. Return whether the turn is
        over: it ends in one of policy.stop_ids, or is full.

        sampled_ids[n] was sampled after the first n tokens of the draft. It is valid if these are
        the first n sampled tokens. So the longest prefix in which draft and samples agree is
        accepted, and the next sample as well:

            fed          6 7 8 9        6 was pending, 7 8 9 is the draft
            sampled      7 8 3 4        each after the token above it
            appended     7 8 3          num_accepted = 2; 4 was sampled after 9, which is wrong

        6, 7 and 8 are in the cache now, 3 is pending, and 9 will be overwritten. next_position: the
        position after all tokens that were fed."""
        # 1. Compare.
        num_accepted = 0
        while (num_accepted < len(draft_ids)
               and draft_ids[num_accepted] == sampled_ids[num_accepted]):
            num_accepted += 1
        num_rejected = len(draft_ids) - num_accepted
        self.counts["sequence_passes"] += 1
        self.counts["draft_tokens"] += len(draft_ids)
        self.counts["accepted_tokens"] += num_accepted
        # 2. Append what is valid. Its last token is not in the cache yet.
        rollout.num_cached_tokens = len(rollout.token_ids) + num_accepted
        rollout.next_position = next_position - num_rejected
        rollout.append(sampled_ids[:num_accepted + 1], True)
        rollout.logprobs += sampled_logprobs[:num_accepted + 1]
        if self.num_speculative_tokens > 0:
            self.proposer.update(rollout.token_ids, len(rollout.token_ids) - num_accepted - 1)
        # 3. Is the turn over?
        is_full = len(rollout.token_ids) - rollout.turn_start >= self.limits.max_new_tokens
        return is_full or rollout.token_ids[-1] in self.policy.stop_ids


class NgramProposer:
    """Propose drafts: for every n-gram, the token that the policy wrote after it.

    guesses[n-gram] = (token id, hit rate), where the hit rate is a moving average of how often the
    guess was right lately. Whatever is in here, conversations are the same: a wrong guess only
    costs time, see Engine.accept."""

    def __init__(self, ngram_sizes=(3, 6), max_guesses=200_000):
        self.ngram_sizes = ngram_sizes      # shortest first
        self.max_guesses = max_guesses
        self.guesses = {}

    def propose(self, token_ids, max_tokens, min_probability=0.5):
        """Return up to max_tokens tokens that may follow token_ids (which is not changed). Each is
        the guess for the longest n-gram that has one, even if a shorter one is right more often.
        The draft ends where the product of its hit rates is below min_probability."""
        context = token_ids[-self.ngram_sizes[-1]:]
        probability = 1.0
        draft_ids = []
        while len(draft_ids) < max_tokens:
            # Without any n-gram in the table the hit rate is 0, and the draft ends.
            guessed_id = None
            hit_rate = 0.0
            for ngram_size in self.ngram_sizes:
                ngram = tuple(context[-ngram_size:])
                if ngram not in self.guesses:
                    break
                guessed_id, hit_rate = self.guesses[ngram]
            probability *= hit_rate
            if probability < min_probability:
                break
            draft_ids.append(guessed_id)
            context.append(guessed_id)
        return draft_ids

    def update(self, token_ids, start):
        """Learn from the tokens token_ids[start:], which the policy has just written.

        For each n-gram before such a token, shortest first: a new n-gram gets the token as its
        guess, with a hit rate of 0.7. The hit rate of an old guess moves by a fifth of the way to 1
        (right) or 0 (wrong); at 0.3 or below the token replaces the guess. A longer n-gram is added
        only if the shorter ones at its end were in the table before, so that what comes only once
        costs little. A table of more than max_guesses is cleared, which bounds the memory."""
        if len(self.guesses) > self.max_guesses:
            self.guesses.clear()
        for index in range(start, len(token_ids)):
            token_id = token_ids[index]
            for ngram_size in self.ngram_sizes:
                # An n-gram that was never seen before: this token is the guess.
                ngram = tuple(token_ids[index - ngram_size:index])
                if ngram not in self.guesses:
                    self.guesses[ngram] = (token_id, 0.7)
                    break
                # A known one: was its guess right? A guess that is rarely right is replaced.
                guessed_id, hit_rate = self.guesses[ngram]
                is_hit = guessed_id == token_id
                hit_rate += 0.2 * (is_hit - hit_rate)
                if hit_rate > 0.3:
                    self.guesses[ngram] = (guessed_id, hit_rate)
                else:
                    self.guesses[ngram] = (token_id, 0.7)


# Engine.counts: forward passes of each sequence; tokens that were drafted, and accepted
COUNTS = ["sequence_passes", "draft_tokens", "accepted_tokens"]


def draft_statistics(counts):
    """Return tokens per forward pass of a sequence, and the share of draft tokens accepted."""
    num_passes = max(counts["sequence_passes"], 1)
    num_draft_tokens = max(counts["draft_tokens"], 1)
    return {"mean_acceptance_length": 1 + counts["accepted_tokens"] / num_passes,
            "acceptance_rate": counts["accepted_tokens"] / num_draft_tokens}


# ---- Avg@K --------------------------------------------------------------------------------------


def mean_and_error(values):
    """Return the mean and its standard error s / sqrt(Q), s the unbiased deviation of Q values."""
    mean = statistics.fmean(values)
    if len(values) == 1:
        return mean, 0.0
    return mean, statistics.stdev(values) / math.sqrt(len(values))


def group_by(rows, name):
    """Return {value: rows in which the field `name` has this value}, in order of appearance."""
    groups = collections.defaultdict(list)
    for row in rows:
        groups[row[name]].append(row)
    return groups


def scored_rows(rows):
    """Return the rows without those that a judge or a server left without a score."""
    return [row for row in rows if row["reward"] is not None]


def accuracy_per_question(rows, turn_budget):
    """Return {question id: share of its scored samples that are correct and finished within
    `turn_budget` turns}. A question without a scored sample is left out."""
    accuracy = {}
    for question_id, samples in group_by(scored_rows(rows), "id").items():
        is_correct = [row["reward"] == 1.0 and len(row["turns"]) <= turn_budget for row in samples]
        accuracy[question_id] = statistics.fmean(is_correct)
    return accuracy


def avg_at_k(rows, turn_budget):
    """Return Avg@K at a turn budget and its standard error. It is the share of samples that are
    correct and finished within `turn_budget` turns, first per question, then over questions. rows:
    trajectory rows of one level, in any order."""
    return mean_and_error(list(accuracy_per_question(rows, turn_budget).values()))


def benchmark_score(rows, turn_budget):
    """Return a level's score and its standard error: Avg@K, except for HR-Bench. That benchmark
    asks each question in several cycles and has a rule of its own for them."""
    if not any("cycle" in row for row in rows):
        return avg_at_k(rows, turn_budget)
    from extras import import_data
    return import_data.avg_at_k_over_cycles(rows, accuracy_per_question(rows, turn_budget))


def pass_rates(rows, turn_budget):
    """Return a row per question for build_data.py --filter: id, share of correct samples, samples.
    A question with an unscored sample is left out. Exact matches need no judge, so the rate over
    its other samples would be too high."""
    accuracy = accuracy_per_question(rows, turn_budget)
    rates = []
    for question_id, samples in group_by(rows, "id").items():
        if len(scored_rows(samples)) == len(samples):
            rates.append({"id": question_id, "pass_rate": accuracy[question_id],
                          "samples": len(samples)})
    return rates


# A crop holds the target if it covers this share of its area. The coordinates of a nested zoom are
# rounded, so it may miss a thin edge.
TARGET_SHARE = 0.9


def target_in_last_crop(row):
    """Return whether the last crop of a conversation holds the target of its question. It does not
    if there was no zoom. row: a trajectory row with target_bbox (data whose boxes are known)."""
    crop_boxes = tools.view_boxes(row)[1:]
    if not crop_boxes:
        return False
    left, top, right, bottom = row["target_bbox"]
    x0, y0, x1, y1 = crop_boxes[-1]
    covered_width = max(0.0, min(right, x1) - max(left, x0))
    covered_height = max(0.0, min(bottom, y1) - max(top, y0))
    return covered_width * covered_height >= TARGET_SHARE * (right - left) * (bottom - top)


def target_seen(rows):
    """Return the share of the right answers whose last crop holds the target; None if there is no
    right answer to a question whose box is known."""
    is_seen = [target_in_last_crop(row) for row in rows
               if row["reward"] == 1.0 and row.get("target_bbox")]
    return statistics.fmean(is_seen) if is_seen else None


def summarise(levels, budgets):
    """Return {level: what table.json says about it}, from {level: trajectory rows}. If there are
    several levels, "mean" is their mean: all weigh the same, and their errors are independent.
    Raise InputError if nothing in a level is scored."""
    table = {level: summarise_level(level, rows, budgets) for level, rows in levels.items()}
    if len(table) > 1:
        # JSON has no numbers as keys, so budgets are texts in the table.
        accuracy = {}
        standard_error = {}
        for turn_budget in map(str, budgets):
            means = [summary["accuracy"][turn_budget] for summary in table.values()]
            variances = [summary["standard_error"][turn_budget] ** 2 for summary in table.values()]
            accuracy[turn_budget] = statistics.fmean(means)
            standard_error[turn_budget] = math.sqrt(sum(variances)) / len(table)
        table["mean"] = {"accuracy": accuracy, "standard_error": standard_error}
    return table


def summarise_level(level, rows, budgets):
    """Return a dict: score and standard error per turn budget, mean turns, shares of finish
    reasons, whether right answers have seen the target, and the score per category at the largest
    budget, where questions have a category."""
    scored = scored_rows(rows)
    tools.check(scored, f"{level}: no sample has a score, since the server gave no usable "
                "replies, for the reasons above; mend them and run the same command again")
    # 1. Scores.
    accuracy = {}
    standard_error = {}
    for turn_budget in budgets:
        mean, error = benchmark_score(rows, turn_budget)
        accuracy[str(turn_budget)] = mean
        standard_error[str(turn_budget)] = error
    with_category = [row for row in scored if "category" in row]
    categories = {}
    for category, category_rows in sorted(group_by(with_category, "category").items()):
        categories[category] = benchmark_score(category_rows, budgets[-1])
    # 2. Turns and endings. A conversation that a server refused has no turns.
    num_turns = [len(row["turns"]) for row in rows if row["turns"]]
    num_turns_correct = [len(row["turns"]) for row in rows if row["reward"] == 1.0]
    finish_reasons = collections.Counter(row["finish_reason"] for row in rows)
    sources = {row.get("source") for row in rows}
    return {
        "benchmark": sources.pop() if len(sources) == 1 else None,
        "questions": len({row["id"] for row in rows}),
        "samples": len(rows),
        "unscored": len(rows) - len(scored),
        "categories": categories,
        "accuracy": accuracy,
        "standard_error": standard_error,
        "mean_turns": statistics.fmean(num_turns),
        "mean_turns_correct": statistics.fmean(num_turns_correct) if num_turns_correct else None,
        "target_seen": target_seen(rows),
        "finish_reason": {reason: finish_reasons[reason] / len(rows) for reason in FINISH_REASONS}}


def print_rows(header, rows):
    """Print a Markdown table; all cells are texts."""
    for cells in [header, ["---"] * len(header), *rows]:
        print("| " + " | ".join(cells) + " |")


def percent(mean, error):
    return f"{100 * mean:.1f} ({100 * error:.1f})"


def print_table(table, budgets, num_samples):
    """Print what summarise() returns as Markdown tables: a line per level, with its accuracy at
    every turn budget; then its unscored samples and its categories, where there are some."""
    # 1. Accuracy at every turn budget, and how conversations ended.
    print(f"Avg@{num_samples} in % (standard error) when at most T turns are allowed")
    rows = []
    for level, summary in table.items():
        cells = [level]
        for turn_budget in map(str, budgets):
            mean = summary["accuracy"][turn_budget]
            cells.append(percent(mean, summary["standard_error"][turn_budget]))
        rows.append(cells + conversation_cells(summary))
    print_rows(["level", *(f"T={turn_budget}" for turn_budget in budgets), "turns (correct)",
                "target seen", *FINISH_REASONS], rows)
    # 2. What the numbers above leave out, and categories, where questions have them.
    for level, summary in table.items():
        if summary.get("unscored"):
            print(f"{level}: {summary['unscored']} of {summary['samples']} samples have no score, "
                  "since a server gave no usable reply, and are left out; if it was the judge, the "
                  "accuracy is too high (words that match need none). Run the same command again")
        if summary.get("categories"):
            print()
            print_rows([f"{level}, T={budgets[-1]}", "% (standard error)"],
                       [[category, percent(mean, error)]
                        for category, (mean, error) in summary["categories"].items()])


def conversation_cells(summary):
    """Return a level's cells about turns, the target and finish reasons; the mean of levels has
    none."""
    if "finish_reason" not in summary:
        return [""] * (2 + len(FINISH_REASONS))
    turns = f"{summary['mean_turns']:.1f}"
    if summary["mean_turns_correct"]:
        turns += f" ({summary['mean_turns_correct']:.1f})"
    seen = ""
    if summary["target_seen"] is not None:
        seen = f"{100 * summary['target_seen']:.1f}"
    shares = [f"{100 * summary['finish_reason'][reason]:.1f}" for reason in FINISH_REASONS]
    return [turns, seen, *shares]


# ---- The command --------------------------------------------------------------------------------


def play_level(engine, question_file, rows, digest, args, process, prompts):
    """Play all questions of one file, num_samples times each, shared out over ranks. A sample is
    left out if an interrupted run of this digest, with any number of processes, has finished and
    scored it. Return all trajectory rows, ordered by question, then sample."""
    # 1. What is there already. No rank may add rows before all have read.
    journal = tools.Journal(results_folder.journal_path(args.out, digest, process.rank),
                            results_folder.journal_paths(args.out, digest))
    sft.barrier()
    finished = {(row["id"], row["sample"]): row for row in scored_rows(journal.rows)}
    # 2. This rank's share of the rest.
    waiting = []
    for rollout in make_rollouts(rows, args.num_samples, question_file.parent, None, prompts):
        is_mine = rollout.prompt_number % process.world_size == process.rank
        if is_mine and (rollout.row["id"], rollout.sample_number) not in finished:
            waiting.append(rollout)
    # 3. Play it.
    with terminal.progress_bar(total=len(waiting), desc=question_file.stem,
                               disable=process.rank != 0) as progress:
        new_rows = play_and_save(engine, waiting, journal, progress)
    # 4. Everybody's rows.
    for row in sft.all_gather_objects(new_rows):
        finished[row["id"], row["sample"]] = row
    return [finished[row["id"], sample] for row in rows for sample in range(args.num_samples)]


def play_and_save(engine, rollouts, journal, progress):
    """Play conversations, and append the row of each to the journal as soon as it has a score.
    Return all rows."""
    without_score = []      # the judge has not replied yet, or a server gave no usable reply
    for rollout in engine.play_all(rollouts):
        progress.update()
        # Its row is all that is needed; the tokens of all conversations would take gigabytes.
        rollout.token_ids, rollout.loss_mask, rollout.logprobs = [], [], []
        if engine.judge is not None:
            engine.judge.collect_verdicts()
        without_score.append(rollout)
        journal.add(*[rollout.to_row() for rollout in without_score if rollout.reward is not None])
        without_score = [rollout for rollout in without_score if rollout.reward is None]
    if engine.judge is not None:
        engine.judge.wait()
    journal.add(*[rollout.to_row() for rollout in without_score])
    return [rollout.to_row() for rollout in rollouts]


def add_rollout_flags(group):
    """Add the flags that say how the engine plays."""
    add = group.add_argument
    add("--max_images", type=int,
        help="images per conversation, the original included (default: as many as turns)")
    add("--max_new_tokens", type=int, default=96, help="tokens per turn; a longer one ends as void")
    add("--max_model_len", type=int, default=4096,
        help="tokens per conversation (paper: 32768; of no effect on a server)")
    add("--max_num_seqs", type=int, default=64,
        help="conversations that one process plays at the same time (or requests to a server)")
    add("--short_model_len", type=int, default=8192,
        help="tokens for which each of them has room at first, if --max_model_len is more; what "
             "outgrows them is played to its end after the others, in fewer, longer caches; "
             "conversations do not depend on it")
    add("--num_speculative_tokens", type=int, default=4,
        help="most tokens of a draft, which one forward pass verifies (0: no drafts); "
             "conversations do not depend on it")


def check_rollout_flags(args):
    """Raise InputError for flags of add_rollout_flags with which nothing useful can be played."""
    tools.check(args.max_images != 1, "--max_images 1 allows no zoom: the original counts, too")
    has_room = results_folder.is_served(args) or args.max_new_tokens < args.max_model_len
    tools.check(has_room, f"--max_new_tokens {args.max_new_tokens} leaves no room for a question "
                f"in --max_model_len {args.max_model_len}: lower the first or raise the second")


def add_judge_flags(parser):
    """Add the flags of every stage that may ask a judge."""
    group = parser.add_argument_group("judge")
    group.add_argument("--judge", metavar="URL",
                       help="an OpenAI-compatible server that is asked whether other words mean "
                            "the same; its key is in JUDGE_API_KEY, and verdicts are kept in --out "
                            "(default: words are only normalised)")
    group.add_argument("--judge_model",
                       help="name of the judge on that server (default: its only one)")


def make_judge(args, rank):
    """Return the judge that --judge names, or None."""
    tools.check(args.judge or not args.judge_model, "--judge_model needs --judge URL")
    if not args.judge:
        return None
    from extras.chat_client import ChatClient
    from extras.served import Judge
    client = ChatClient(args.judge, args.judge_model, "judge", timeout=60.0)
    args.judge_model = client.check_server()
    return Judge(client, args.out, rank)


def make_limits(args, max_turns):
    """Return the Limits of conversations of at most max_turns turns."""
    return Limits(max_turns, args.max_images or max_turns, args.max_new_tokens, args.max_model_len)


def make_engine(policy, args, max_turns, judge, greedy=False):
    """Return an Engine whose conversations have at most max_turns turns."""
    return Engine(policy, make_limits(args, max_turns), args.max_num_seqs, seed=args.seed,
                  greedy=greedy, judge=judge, num_speculative_tokens=args.num_speculative_tokens,
                  short_model_len=args.short_model_len)


def make_player(args, prompts, process):
    """Return what plays the questions: an Engine with a policy, or a ServedPlayer with a server."""
    max_turns = max(args.budgets)
    judge = make_judge(args, process.rank)
    if results_folder.is_served(args):
        from extras.chat_client import ChatClient
        from extras.served import ServedPlayer
        client = ChatClient(args.model, args.model_name, "model", args.min_pixels or 40_000,
                            args.max_pixels or 2_000_000, args.max_image_bytes)
        args.model_name = client.check_server()
        player = ServedPlayer(client, prompts, make_limits(args, max_turns), args.max_num_seqs,
                              seed=args.seed, judge=judge, greedy=args.greedy)
    else:
        policy = sft.load_policy(args.model, process.device, args.dtype, prompts, args.min_pixels,
                                 args.max_pixels, hint="torchrun --nproc_per_node=2 rl.py (or name "
                                                       "another with --model)")
        player = make_engine(policy, args, max_turns, judge, args.greedy)
    player.limits.blank_crops = args.blank_crops
    return player


def write_results(levels, engine, args):
    """Write table.json, trajectories and pass rates; print the tables."""
    # 1. Write first: what cannot be printed must not be lost.
    table = summarise(levels, args.budgets)
    results_folder.set_aside(levels, args)
    file_names = ["table.json"]
    for level, rows in levels.items():
        tools.write_jsonl(args.out / f"{level}.jsonl", rows)
        tools.write_jsonl(args.out / f"{level}.rates.jsonl", pass_rates(rows, args.budgets[-1]))
        file_names += [f"{level}.jsonl", f"{level}.rates.jsonl"]
    text = json.dumps(table, indent=1) + "\n"
    tools.write_atomic(args.out / "table.json", lambda file: file.write(text.encode()))
    # 2. Print.
    print_table(table, args.budgets, args.num_samples)
    if not results_folder.is_served(args) and engine.counts["sequence_passes"] > 0:
        statistics_of_drafts = draft_statistics(engine.counts)
        print("drafts of rank 0: "
              f"{statistics_of_drafts['mean_acceptance_length']:.2f} tokens per pass, "
              f"{statistics_of_drafts['acceptance_rate']:.0%} of drafted tokens accepted")
    print(f"written to {args.out}/: {', '.join(file_names)}")


def parse_args():
    """Return the flags. Raise InputError for values that cannot be right."""
    parser = terminal.make_parser("Avg@K over turn budgets.")
    group = parser.add_argument_group("model and data")
    add = group.add_argument
    add("--model", default="checkpoints/rl",
        help="local folder, hub id, or the URL of an OpenAI-compatible server (its key is in "
             "MODEL_API_KEY; without other limits it is sent pictures of 40,000 to 2,000,000 "
             "pixels)")
    add("--model_name", help="name of the model on that server (default: its only one)")
    add("--max_image_bytes", type=int, default=1_500_000,
        help="largest picture that is sent to a server; larger ones become JPEG, and smaller")
    add("--data", type=Path, nargs="+", help="question files, one level each",
        default=[Path("data/easy.jsonl"), Path("data/medium.jsonl"), Path("data/hard.jsonl")])
    add("--out", type=Path,
        help="folder for tables and trajectories (default: results/NAME, the model's name; with "
             "--blank_crops results/NAME-blank)")
    add("--limit", type=int, help="use only the first questions of each file (default: all)")
    sft.add_policy_flags(group)

    group = parser.add_argument_group("rollouts")
    add = group.add_argument
    add("--num_samples", type=int, default=4, help="K: samples per question, at temperature 1")
    add("--greedy", action="store_true",
        help="take the most likely token (needs --num_samples 1)")
    add("--budgets", type=int, nargs="+", default=BUDGETS,
        help="turn budgets; conversations are played with the largest")
    add("--blank_crops", action="store_true",
        help="show a black picture in the place of every crop, from the same random numbers: "
             "accuracy that remains does not come from zooming")
    add_rollout_flags(group)
    add("--seed", type=int, default=0, help="random numbers of the samples")
    add_judge_flags(parser)

    args = parser.parse_args()
    terminal.check_number_flags(args, may_be_zero=("seed", "num_speculative_tokens"))
    args.budgets = sorted(set(args.budgets))
    tools.check(args.budgets[0] >= 1, "--budgets must be at least 1")
    tools.check(args.num_samples == 1 or not args.greedy, "--greedy plays every sample of a "
                "question alike: add --num_samples 1")
    if results_folder.is_served(args):
        terminal.check_unused(args, parser, ["dtype", "max_model_len", "short_model_len",
                                             "num_speculative_tokens"],
                              "with a server as --model")
    else:
        terminal.check_unused(args, parser, ["model_name", "max_image_bytes"],
                              "unless --model is the URL of a server")
    check_rollout_flags(args)
    if args.out is None:
        is_served = results_folder.is_served(args)
        name = (args.model_name or "served") if is_served else Path(args.model).name
        args.out = Path("results") / (f"{name}-blank" if args.blank_crops else name)
    check_level_names(args)
    return args


def check_level_names(args):
    """Raise InputError unless every file of --data can have results of its own in --out."""
    levels = [path.stem for path in args.data]
    tools.check(len({*levels, "mean"}) == len(levels) + 1, "--data: file names are the names of "
                "levels; they must differ, and none may be 'mean'")
    written = {(args.out / f"{level}.jsonl").resolve() for level in levels}
    tools.check(written.isdisjoint(path.resolve() for path in args.data),
                f"--out {args.out} would overwrite the questions in --data; choose another folder")


def main():
    """Play the questions of every level, and report Avg@K over turn budgets."""
    args = parse_args()
    process = sft.setup_distributed()
    prompts = tools.load_prompts(args.prompts)
    engine = make_player(args, prompts, process)
    # 1. Read all questions first: a mistake in the last file should not show after hours.
    questions = {}
    digests = {}
    for question_file in args.data:
        rows = tools.read_questions(question_file, hint="python build_data.py")[:args.limit]
        tools.check(rows, f"{question_file} has no rows")
        check_images(question_file, rows)
        questions[question_file] = rows
        digest = results_folder.run_digest(question_file.stem, rows, args, prompts)
        # Rank 0's: on several nodes, copies of one model may have different times.
        digests[question_file.stem] = sft.all_gather_objects([digest])[0]
    # 2. Play them.
    levels = {}
    try:
        for question_file, rows in questions.items():
            level = question_file.stem
            levels[level] = play_level(engine, question_file, rows, digests[level], args, process,
                                       prompts)
    except KeyboardInterrupt:
        num_all = args.num_samples * sum(len(rows) for rows in questions.values())
        num_saved = results_folder.count_saved(args.out, digests.values())
        raise KeyboardInterrupt(f"{num_saved} of {num_all} conversations are saved in {args.out}; "
                                "run the same command again to continue") from None
    # 3. Score them, after what servers say about samples without a score.
    if results_folder.is_served(args):
        engine.report_cost(process.device, process.rank)
    if engine.judge is not None:
        engine.judge.report_cost(process.device, process.rank)
    if process.rank == 0:
        write_results(levels, engine, args)
    # 4. The table is written: only samples without a score are worth another run.
    sft.barrier()
    if process.rank == 0:
        for level, digest in digests.items():
            if len(scored_rows(levels[level])) == len(levels[level]):
                for path in results_folder.journal_paths(args.out, digest):
                    path.unlink(missing_ok=True)
    sft.close_distributed()


if __name__ == "__main__":
    terminal.run(main)
