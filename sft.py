"""Supervised fine-tuning: teach a vision-language model conversations, by next-token prediction on
its own turns.

This file introduces the policy (the tiny Qwen2.5-VL of build_data.py, or a pretrained Qwen2.5-VL or
Qwen3-VL), how a conversation becomes token ids + mask + images, log-probabilities, data parallel
with a sharded AdamW by hand, and checkpoints. rl.py and evaluate.py import them.

What differs from a textbook fine-tuning script and from the Mini-o3 paper:
1. Loss only on the assistant's tokens, the stop token included; a turn marked "learn": false (a
   teacher's deliberate mistake) is context, not target.
2. A batch is packed: its conversations lie end to end in one row and attend each to itself, so
   there is neither padding nor an attention mask.
3. Positions are explicit (three axes, M-RoPE), by one function that the rollout engine uses too.
4. Ids that a policy may never write (image placeholders, unused rows of the vocabulary) are
   excluded from the softmax, here as in the sampler.
5. The loss is divided by the count of tokens (or responses) of the *global* batch, so gradients are
   summed over ranks and the result does not depend on the number of processes or on how a batch is
   cut into micro-batches. They are sent while backward runs.
6. Images go through the family's own processor, but are resized by tools.resize_for_model, once,
   for every stage.

Commands:
    base, 1 CPU    python sft.py --model tiny --data data/instruct.jsonl --out checkpoints/base \\
                       --batch_size 16 --epochs 2.5 --aggregation response
    cold start     python sft.py
    2 CPU cores    torchrun --nproc_per_node=2 sft.py
    1 GPU          python sft.py --model Qwen/Qwen2.5-VL-3B-Instruct --batch_size 32 --lr 1e-5 \\
                       --gradient_checkpointing
    8 GPUs         torchrun --nproc_per_node=8 sft.py --model Qwen/Qwen2.5-VL-7B-Instruct \\
                       --batch_size 32 --lr 1e-5 --shard_optimizer --gradient_checkpointing --micro_batch_tokens 32768 \\
                       --min_pixels 40000 --max_pixels 2000000
    2 nodes        torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d \\
                       --rdzv_endpoint=HOST:29500 sft.py ...
"""

import argparse
import collections
import itertools
import json
import math
import os
import shutil
import signal
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right
from torch.utils.checkpoint import checkpoint
from transformers import (AttentionInterface, AttentionMaskInterface, AutoModelForImageTextToText,
                          AutoTokenizer)
from transformers.configuration_utils import PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
# 5.17: the top-level name wants torchvision
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.utils import logging as hf_logging

import tools
from build_data import SPECIAL, build_tiny, project_texts

hf_logging.disable_progress_bar()
# On a CPU a function's first call chooses its kernel, and of two threads that call at once one may
# get a coarse one (pytorch issue 188792): cosines wrong by 1e-4 in 4 of 100 processes.
for dtype in (torch.float32, torch.float64):
    for function in (torch.cos, torch.sin, torch.exp, torch.log, torch.sqrt):
        function(torch.ones(1, dtype=dtype))
# of a collective: longer than the slowest rank's rollouts may keep the others waiting
TIMEOUT = timedelta(minutes=60)
MAX_SKIPPED = 5     # steps in a row

# ---- Processes: how they meet, agree, and stop together -----------------------------------------


def setup_distributed():
    """Join the process group if torchrun started us. Returns (rank, world size, device). gloo on
    CPU, NCCL on GPU."""
    rank, world = get_rank(), int(os.environ.get("WORLD_SIZE", "1"))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        torch.backends.cuda.enable_cudnn_sdp(False)     # plans for every new shape; ours all differ
    elif world > 1 and "LOCAL_WORLD_SIZE" in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ["LOCAL_WORLD_SIZE"])))
    if world > 1 and not dist.is_initialized():
        store, rank, world = next(dist.rendezvous("env://", timeout=TIMEOUT))
        attempt.append(meet(store, rank, world))
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT,
                                rank=rank, world_size=world,
                                store=dist.PrefixStore(f"attempt_{attempt[-1]}", store))
    return rank, world, device


def meet(store, rank, world):
    """The number of this attempt, 1 for the first; all ranks agree on it. After a crash torchrun
    starts workers again on the same store, where the addresses of dead ones still stand; nor do the
    agents of several nodes count restarts alike. Hence rank 0 counts, and tells everyone who has
    introduced himself with a name never used before."""
    if rank > 0:
        name = uuid.uuid4().hex
        store.set(f"hello/{rank}", name)
        number = int(store.get(f"answer/{name}"))  # waits; nobody answers the dead
        store.set(f"thanks/{number}/{rank}", "")
        return number
    number, missing = store.add("attempts", 1), set(range(1, world))
    deadline = time.time() + TIMEOUT.total_seconds()
    while missing and time.time() < deadline:
        for other in [r for r in missing if store.check([f"hello/{r}"])]:
            store.set(f"answer/{store.get(f'hello/{other}').decode()}", str(number))
        missing = {r for r in missing if not store.check([f"thanks/{number}/{r}"])}
        time.sleep(0.01)
    return number


# the last one counts; meet() knows better
attempt = [1 + int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))]
stop_signals = []


def install_sigterm_handler():
    """From now on SIGTERM (of a batch system, or of torchrun when a peer has died) only leaves a
    note for stop_requested."""
    signal.signal(signal.SIGTERM, lambda *_: stop_signals.append(time.time()))


def stop_requested(device):
    """Whether any rank has received SIGTERM. All ranks ask at the end of a step, so that all stop
    at the same one: they save and exit 0. A rank whose peers have died never gets here: its
    collectives fail."""
    return all_reduce([len(stop_signals)], device, dist.ReduceOp.MAX)[0] > 0


def get_rank():
    return int(os.environ.get("RANK", "0"))


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier():
    """Wait until every rank is here."""
    if world_size() > 1:
        dist.barrier()


def close_distributed():
    if dist.is_initialized():
        dist.destroy_process_group()


def all_reduce(values, device, op=dist.ReduceOp.SUM):
    """Sum a list of numbers over all ranks (or op=MAX: their largest), in float64. Every rank must
    call this. Returns a list of floats."""
    total = torch.tensor(values, dtype=torch.float64, device=device)
    if world_size() > 1:
        dist.all_reduce(total, op=op)
    return total.tolist()


def all_gather_objects(items):
    """The items of all ranks' lists, as one list, rank by rank; they travel pickled. Every rank
    must call this."""
    lists = [items]
    if world_size() > 1:
        lists = [None] * world_size()
        dist.all_gather_object(lists, items)
    return sum(lists, [])


def broadcast_weights(model):
    """Make every rank start from rank 0's parameters and buffers."""
    if world_size() > 1:
        for tensor in [*model.parameters(), *model.buffers()]:
            dist.broadcast(tensor.data, src=0)


def make_buckets(params, megabytes=25):
    """Cut parameters, in their order, into lists of about this many megabytes (2**20 bytes) of one
    dtype each: few, large messages. A list is closed once it is larger than that."""
    bucket, size = [], 0
    for param in params:
        if bucket and (size > megabytes * 2**20 or param.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(param)
        size += param.numel() * param.element_size()
    if bucket:
        yield bucket


class Bucket:
    """Parameters that travel together. They become views into one flat tensor, padded so that it
    can be cut into equal pieces.

    params, sizes, size: the parameters, how many numbers each has, and all (padding does not
    count). flat: the tensor. own: the piece that this rank looks after (the whole, if not sharded).
    master: what AdamW trains, own itself or, if the weights are in bfloat16, a float32 copy of it,
    since a small step would be lost in bfloat16's 8 bits. missing: gradients still to come.
    """

    def __init__(self, params, pieces, piece):
        self.params, self.sizes, self.missing = params, [p.numel() for p in params], 0
        self.size = sum(self.sizes)
        length = math.ceil(self.size / pieces)
        self.flat = torch.zeros(length * pieces, dtype=params[0].dtype, device=params[0].device)
        for param, view in zip(params, self.views(self.flat)):
            view.copy_(param.data.flatten())
            param.data = view.view_as(param)
        self.own = self.flat[length * piece:length * (piece + 1)]
        narrow = self.own.dtype not in (torch.float32, torch.float64)
        self.master = torch.nn.Parameter(self.own.float() if narrow else self.own)

    def views(self, flat):
        return flat[:self.size].split(self.sizes)

    def take_gradients(self):
        """All gradients as one flat tensor in the master's dtype, as long as `flat`; they are freed
        one by one. A parameter without a gradient on this rank (its batch had no image, or no
        sample at all) takes part with zeros."""
        flat = torch.zeros(len(self.flat), dtype=self.master.dtype, device=self.flat.device)
        for param, view in zip(self.params, self.views(flat)):
            if param.grad is not None:
                view.copy_(param.grad.flatten())
                param.grad = None
        return flat

    def add(self, gradient):
        """Add a gradient, as long as master, to master.grad: the sum that AdamW will see."""
        grad = self.master.grad
        self.master.grad = gradient if grad is None else grad.add_(gradient)


class Optimizer:
    """AdamW with data parallel and, with shard=True, a sharded state (ZeRO stage 2), by hand.

    Parameters are put into buckets in the order in which backward finishes them, last layer first.
    While backward runs, a hook sends off every bucket that is complete: all-reduced, or
    reduce-scattered, so that a rank receives the sum of its own piece only. Buckets are always sent
    in the same order, so that ranks whose batches differ join the same collectives. Then the
    gradient's norm over all pieces is clipped, each rank updates its pieces, and new weights are
    all-gathered.

    Bytes per parameter on one of W ranks, weights of w bytes (w = 2: bfloat16), besides a few
    buckets under way:
        whole      w weights + w gradient until it is sent + 4 received + 8 moments
                   + 4 master (only if w = 2)
        sharded    w weights + (4 received + 8 moments + 4 master (only if w = 2)) / W
    """

    def __init__(self, params, lr, weight_decay, shard=False, megabytes=25):
        self.world = world_size()
        self.shard = shard and self.world > 1
        self.pieces, self.piece = (self.world, get_rank()) if self.shard else (1, 0)
        # decay on matrices only: shrinking norms and biases has no use
        groups = [([p for p in reversed(params) if p.dim() > 1], weight_decay),
                  ([p for p in reversed(params) if p.dim() <= 1], 0.0)]
        self.buckets, options = [], []
        for group, decay in groups:
            added = [Bucket(part, self.pieces, self.piece) for part in make_buckets(group, megabytes)]
            self.buckets += added
            if added:
                options.append({"params": [b.master for b in added], "weight_decay": decay})
        self.adam = torch.optim.AdamW(options, lr=lr, betas=(0.9, 0.95), fused=True)
        self.sending, self.last, self.next = False, False, 0
        self.flying, self.skipped = collections.deque(), 0
        for bucket in self.buckets:
            for param in bucket.params:
                param.register_post_accumulate_grad_hook(partial(self.arrived, bucket))

    def backward(self, micros, loss_of):
        """Run backward through loss_of(micro) for each of this rank's micro-batches. Gradients are
        summed in the master's precision: a hundred sums in bfloat16 would lose the small ones.
        Sharded, every micro-batch is a round of collectives, so that no rank ever holds all
        gradients; otherwise they are summed locally, and over ranks during the last round. Returns
        the sum of this rank's losses."""
        micros, losses = list(micros), []
        device = self.buckets[0].flat.device
        rounds = int(all_reduce([max(1, len(micros))], device, dist.ReduceOp.MAX)[0])
        for i in range(rounds):
            self.sending, self.last, self.next = True, i == rounds - 1, 0
            for bucket in self.buckets:
                bucket.missing = len(bucket.params)
            if i < len(micros):
                loss = loss_of(micros[i])
                loss.backward()
                losses.append(loss.item())
            while self.next < len(self.buckets):    # what had no gradient here
                self.send(self.buckets[self.next])
        while self.flying:
            self.receive()
        self.sending = False
        return sum(losses)

    def arrived(self, bucket, param):
        """A gradient is complete: send off what is ready, in order. Outside of backward() nothing
        is sent."""
        bucket.missing -= 1
        while (self.sending and self.next < len(self.buckets)
               and self.buckets[self.next].missing == 0):
            self.send(self.buckets[self.next])

    def send(self, bucket):
        """Take a bucket's gradients, on their way to the sum over all rounds and ranks in
        master.grad; the bucket behind it is `next`. Sharded, every round is a reduce-scatter, and
        what it brings is added there by receive(). Otherwise rounds are added up there, and the
        last one ends in the only all-reduce, in place. What travels waits in `flying`, first in
        first out: (work, bucket, what is received or None, what was sent)."""
        self.next += 1
        sent, received = bucket.take_gradients(), None  # (pieces * length,)
        if self.shard:
            received = torch.empty_like(bucket.master)  # (length,)
            work = reduce_scatter(received, sent, async_op=True)
        else:
            bucket.add(sent)
            if self.world == 1 or not self.last:
                return
            work = dist.all_reduce(bucket.master.grad, async_op=True)
        self.flying.append((work, bucket, received, sent))
        if len(self.flying) > 2:    # bounds what is held beyond the shard
            self.receive()

    def receive(self):
        """Wait for what was sent first; a sum of this rank's piece is added to earlier rounds'."""
        work, bucket, received, _ = self.flying.popleft()
        work.wait()
        if received is not None:
            bucket.add(received)

    @torch.no_grad()
    def step(self, lr, max_norm, healthy=True):
        """Clip the global norm (times max_norm / (norm + 1e-6), as torch does, if that is below 1),
        AdamW, new weights to all ranks. Returns the norm before clipping. If it is not finite (or
        healthy is False, on all ranks alike) nothing changes, AdamW's moments included, and
        `skipped` counts one step more; it counts steps in a row. Gradients are freed either way."""
        squares = sum(torch.linalg.vector_norm(bucket.master.grad, dtype=torch.float64) ** 2
                      for bucket in self.buckets)
        if self.shard:
            squares = all_reduce([squares], squares.device)[0]
        norm = math.sqrt(squares)
        if healthy and math.isfinite(norm):
            for group in self.adam.param_groups:
                group["lr"] = lr
            for bucket in self.buckets:
                bucket.master.grad.mul_(min(1.0, max_norm / (norm + 1e-6)))
            self.adam.step()
            self.spread()
            self.skipped = 0
        else:
            self.skipped += 1
        self.adam.zero_grad(set_to_none=True)
        return norm

    @torch.no_grad()
    def spread(self):
        """Masters -> weights, on every rank."""
        works = []
        for bucket in self.buckets:
            if bucket.master.data_ptr() != bucket.own.data_ptr():
                bucket.own.copy_(bucket.master)
            if self.shard:
                works.append(all_gather(bucket.flat, bucket.own.clone(), async_op=True))
        for work in works:
            work.wait()

    def state(self):
        """This rank's pieces, one dict per bucket; copies, since a view is saved with its whole."""
        return [{"size": bucket.size, "master": bucket.master.data.clone(),
                 **self.adam.state[bucket.master]} for bucket in self.buckets]

    @torch.no_grad()
    def load(self, parts):
        """Take over the state() of all ranks of an earlier run. If their number was another one,
        pieces are put together and cut anew, the master like AdamW's moments (a run without a good
        step has none). Raises ValueError, before anything changes, if it was another model: another
        number of buckets, or another size of one."""
        if [part["size"] for part in parts[0]] != [bucket.size for bucket in self.buckets]:
            raise ValueError("it belongs to another model or another choice of what is trained")
        for i, bucket in enumerate(self.buckets):
            saved, length, state = [part[i] for part in parts], len(bucket.own), {}
            for key in saved[0].keys() - {"size"}:
                if key == "step":       # is the same for all
                    piece = saved[0][key]
                elif len(saved) == self.pieces:
                    piece = saved[self.piece][key]
                else:
                    whole = torch.cat([part[key] for part in saved])[:bucket.size]
                    whole = F.pad(whole, (0, length * self.pieces - bucket.size))
                    piece = whole[length * self.piece:length * (self.piece + 1)]
                state[key] = piece.to(bucket.master.device, copy=True)
            bucket.master.data.copy_(state.pop("master"))
            self.adam.state[bucket.master].update(state)
        self.spread()


# torch 2.13 renamed these collectives
reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


# ---- The policy: model, tokenizer, images -------------------------------------------------------

# model_type -> processor, for servers
FAMILIES = {"qwen2_5_vl": "Qwen2_5_VLProcessor", "qwen3_vl": "Qwen3VLProcessor"}


def window_plan(borders):
    """The vision tower's windows by their length: [(length, which tokens they hold (W * length,))],
    and the order that undoes this (S,). The library hands the same borders (W + 1,) to every layer:
    the plan is made once and kept with them, since making it waits for the device."""
    if not hasattr(borders, "plan"):
        lengths, parts = borders.diff(), []
        for length in lengths.unique().tolist():
            starts = borders[:-1][lengths == length]
            index = starts[:, None] + torch.arange(length, device=starts.device)    # (W, length)
            parts.append((length, index.flatten()))
        borders.plan = parts, torch.cat([index for _, index in parts]).argsort()
    return borders.plan


def windows_flash(module, query, key, value, attention_mask, scaling=None, cu_seq_lens_q=None,
                  **unused):
    """Vision attention: all windows of one length in one batched call. query: (1, H, S, D).
    Returns ((1, S, H, D), None).

    transformers calls the attention once per window in a Python loop unless the implementation's
    name contains "flash", in which case it hands over the window borders; hence this name.
    """
    parts, back = window_plan(cu_seq_lens_q)
    out = []
    for length, index in parts:
        q, k, v = (t[0][:, index].unflatten(1, (-1, length)).transpose(0, 1)
                   for t in (query, key, value))                            # (W, H, length, D)
        o = F.scaled_dot_product_attention(q, k, v, scale=scaling)
        out.append(o.transpose(1, 2).flatten(0, 1))                         # (W * length, H, D)
    return torch.cat(out)[back].unsqueeze(0), None


def conversations(module, query, key, value, attention_mask, scaling=None, lengths=None, spans=None,
                  **more):
    """Text attention. query: (B, H, T, D), key and value: (B, K, S, D) with K <= H heads. Returns
    ((B, T, H, D), None).

    lengths (training): conversations of these lengths lie end to end in one row; each is a causal
    call of its own. spans (rollouts): see attend_slots. Without either: the library's own
    attention.
    """
    if spans is not None:
        return attend_slots(query, key, value, scaling, *spans), None
    if lengths is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling,
                                      **more)
    parts = zip(*(t.split(lengths, dim=2) for t in (query, key, value)))  # (1, H, length, D)
    out = torch.cat([F.scaled_dot_product_attention(*qkv, is_causal=True, scale=scaling,
                                                    enable_gqa=True) for qkv in parts], dim=2)
    return out.transpose(1, 2), None


def attend_slots(query, key, value, scaling, padded, back, spans):
    """Attention of new tokens to their own slot of the cache. query (1, H, N, D): the new tokens of
    all slots end to end; key and value (slots, K, S, D); the rest as SlotCache.at of evaluate.py
    returns it. Returns (1, N, H, D).

    A long piece needs no mask. Of short ones the H / K query heads that share a key head are laid
    along the query axis, so that keys are neither repeated nor read twice.
    """
    heads, out = key.shape[1], []
    rows = query[0].transpose(0, 1)[padded].unflatten(1, (heads, -1))  # (P, K, H / K, D)
    for (first, last, width), slots, length, mask in spans:
        q, k, v = rows[first:last], key[slots, :, :length], value[slots, :, :length]
        if mask is None:
            q = q.flatten(1, 2).transpose(0, 1)[None]  # (1, H, w, D)
            part = F.scaled_dot_product_attention(
                q, k, v, attn_mask=causal_lower_right(width, length), scale=scaling,
                enable_gqa=True)
            out.append(part[0].transpose(0, 1))  # (w, H, D)
        else:
            q = q.unflatten(0, (-1, width)).transpose(1, 2).flatten(2, 3)  # (b, K, w * H / K, D)
            part = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)
            part = part.unflatten(2, (width, -1)).transpose(1, 2)  # (b, w, K, H / K, D)
            out.append(part.flatten(2, 3).flatten(0, 1))  # (b * w, H, D)
    return torch.cat(out)[back][None]


AttentionInterface.register("windows_flash", windows_flash)
AttentionInterface.register("conversations", conversations)
AttentionMaskInterface.register("conversations", sdpa_mask)     # for `generate` on a policy's model


@dataclass(eq=False)
class Policy:
    """A model with everything needed to talk to it. banned: ids it may never write; stop: ids that
    end a turn."""
    model: torch.nn.Module
    tokenizer: object
    image_processor: object
    prompts: dict
    min_pixels: int
    max_pixels: int

    def __post_init__(self):
        config, token = self.model.config, self.tokenizer.convert_tokens_to_ids
        self.device = next(self.model.parameters()).device
        self.image_token_id = token("<|image_pad|>")
        self.im_start_id, self.im_end_id = token("<|im_start|>"), token("<|im_end|>")
        self.vision_ids = (token("<|vision_start|>"), token("<|vision_end|>"))
        self.stop_ids = {self.im_end_id, token("<|endoftext|>")}
        self.merge_size = config.vision_config.spatial_merge_size
        self.resize_factor = config.vision_config.patch_size * self.merge_size
        never = {token(t) for t in SPECIAL} - self.stop_ids
        self.suppressed_ids = sorted(never | set(range(len(self.tokenizer), config.text_config.vocab_size)))
        self.suppressed_index = torch.tensor(self.suppressed_ids, device=self.device)

    def encode_text(self, text):
        """Token ids of a text; a special token written in it is split into ordinary ones."""
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    def encode_message(self, role, text, image_tokens=None):
        """Ids of one chat message in the Qwen format; `<image>` in a template was cut beforehand:
        text is (before, after)."""
        before, after = text if isinstance(text, tuple) else (text, "")
        ids = [self.im_start_id, *self.encode_text(f"{role}\n{before}")]
        if image_tokens is not None:
            ids += [self.vision_ids[0], *[self.image_token_id] * image_tokens, self.vision_ids[1]]
        return [*ids, *self.encode_text(after), self.im_end_id, *self.encode_text("\n")]

    def preprocess_images(self, views):
        """The copies of PIL views that the model sees: list of (patches (N, C), grid (t, h, w) in
        patches)."""
        if not views:
            return []
        small = [tools.resize_for_model(view, self.min_pixels, self.max_pixels, self.resize_factor)
                 for view in views]
        out = self.image_processor(images=small, do_resize=False, return_tensors="pt")
        grids = out["image_grid_thw"].tolist()
        patches = out["pixel_values"].split([t * h * w for t, h, w in grids])
        return [(p.to(self.model.dtype), tuple(g)) for p, g in zip(patches, grids)]

    def image_grid(self, view):
        """The grid that pixels() gives a view, without making its pixels."""
        width, height = tools.size_for_model(*view.size, self.min_pixels, self.max_pixels,
                                             self.resize_factor)
        return 1, height * self.merge_size // self.resize_factor, width * self.merge_size // self.resize_factor

    def num_image_tokens(self, grid):
        return grid[0] * grid[1] * grid[2] // self.merge_size**2

    def prompt_ids(self, row, grid):
        """Ids of system prompt and question up to where the assistant begins to write."""
        system = tools.system_text(row, self.prompts)
        ids = self.encode_message("system", system) if system else []
        question = tools.question_text(row, self.prompts)
        return ids + self.encode_message("user", question, self.num_image_tokens(grid)) + self.generation_prompt()

    def generation_prompt(self):
        return [self.im_start_id, *self.encode_text("assistant\n")]

    def tool_message_ids(self, turn, turns, shown, grid=None):
        """Ids between an assistant's stop token and its next turn: what the tool says, see
        tools.tool_message. grid: the crop's."""
        text = tools.tool_message(turn, turns, shown, self.prompts)
        message = self.encode_message("user", text, grid and self.num_image_tokens(grid))
        return self.encode_text("\n") + message + self.generation_prompt()


def check_family(path):
    """The configuration of a local folder or hub id, as a dict. Raises InputError unless its family
    is supported (OSError if there is none)."""
    config = PreTrainedConfig.get_config_dict(path)[0]
    family = config.get("model_type")
    tools.check(family in FAMILIES, f"{path}: model family '{family}' is not supported; use one of "
               f"{', '.join(FAMILIES)}")
    return config


def check_device(path, config, device, dtype):
    """Raise InputError if a model of billions of parameters is about to run on a CPU by mistake."""
    width = config.get("text_config", config).get("hidden_size", 0)
    tools.check(width < 1024 or torch.device(device).type != "cpu" or dtype != "auto",
               f"{path}: no GPU was found for a model as large as this (width {width}); to run it "
               "on the CPU all the same, say so with --dtype bfloat16 or float32")


def head_size(text):
    """Width of one attention head; Qwen3-VL's text configuration names it, Qwen2.5-VL's does
    not."""
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def load_policy(path, device, dtype="auto", prompts=None, min_pixels=None, max_pixels=None,
                hint=""):
    """A policy from a local folder or hub id. Raises InputError (hint: how to make the folder)."""
    local = str(path).startswith(("checkpoints", ".", "/")) or Path(path).is_dir()
    tools.check(not local or (Path(path) / "config.json").exists(),
               f"{path} holds no model" + (f"; make it with: {hint}" if hint else ""))
    try:
        check_device(path, check_family(path), device, dtype)
        parts = (AutoModelForImageTextToText.from_pretrained(path, dtype=pick_dtype(dtype, device)),
                 AutoTokenizer.from_pretrained(path),
                 AutoImageProcessor.from_pretrained(path, backend="pil"))
    except tools.InputError:
        raise
    except Exception as error:  # a damaged file shows as any of a dozen exceptions of libraries
        reason = str(error).strip().splitlines()[0]
        if hint and not Path(path).exists():
            reason += f"; if a local folder is meant, make it with: {hint}"
        raise tools.InputError(f"{path}: cannot load a model: {reason}") from None
    return make_policy(*parts, device, prompts, min_pixels, max_pixels)


def pick_dtype(name, device):
    """torch dtype of a --dtype flag; auto: bfloat16 on a GPU, float32 on a CPU."""
    if name == "auto":
        name = "bfloat16" if torch.device(device).type == "cuda" else "float32"
    return getattr(torch, name)


def embed_patches(conv, patches):
    """The patch embedding, a convolution whose stride is its kernel, as the matrix product that it
    is: several times faster on a CPU. (N, C) -> (N, D)."""
    return F.linear(patches.to(conv.weight.dtype), conv.weight.flatten(1), conv.bias)


def make_policy(model, tokenizer, processor, device, prompts=None, min_pixels=None,
                max_pixels=None):
    """Put the parts together; pixel limits default to the image processor's own."""
    model.set_attn_implementation({"text_config": "conversations",
                                   "vision_config": "windows_flash"})
    model.to(device)
    model.requires_grad_(True)
    embed = model.model.visual.patch_embed
    embed.forward = partial(embed_patches, embed.proj)
    smallest = min_pixels or processor.size["shortest_edge"]
    largest = max_pixels or processor.size["longest_edge"]
    tools.check(smallest <= largest, f"--min_pixels {smallest} is above --max_pixels {largest}")
    policy = Policy(model, tokenizer, processor, prompts or dict(tools.PROMPTS), smallest, largest)
    # a served copy must not write image placeholders either
    model.generation_config.suppress_tokens = policy.suppressed_ids
    return policy


# ---- From a conversation to tensors -------------------------------------------------------------


@dataclass
class Sequence:
    """One conversation as tokens. mask[t]: token t was (or is to be) written by the policy. images:
    (patches, grid)."""
    token_ids: list = field(default_factory=list)
    loss_mask: list = field(default_factory=list)
    images: list = field(default_factory=list)

    def add(self, ids, written, image=None):
        self.token_ids += ids
        self.loss_mask += [written] * len(ids)
        self.images += [image] if image is not None else []


def encode(policy, row, root):
    """Trajectory row -> Sequence. root: folder that image paths are relative to. Every turn is
    written by the policy, its end_id too, unless it says "learn": false. Behind every turn but the
    last stands what the tool said: nothing was said behind that one. Raises InputError."""
    views = tools.replay(row, tools.open_image(Path(root) / row["image"]))
    images, shown = policy.preprocess_images(views), 1
    sequence = Sequence()
    sequence.add(policy.prompt_ids(row, images[0][1]), False, images[0])
    for number, turn in enumerate(row["turns"], 1):
        sequence.add([*policy.encode_text(turn["text"]), policy.im_end_id], turn.get("learn", True))
        if number == len(row["turns"]):
            break
        image = images[shown] if "zoom" in turn else None
        sequence.add(policy.tool_message_ids(turn, number, shown, image and image[1]), False, image)
        shown += "zoom" in turn
    return sequence


def mrope_positions(ids, grids, image_id, merge, start=0):
    """M-RoPE positions (Qwen2-VL paper, section 2.1) of a piece of a conversation that begins at
    position `start`.

    Text advances all three axes by one. An image of h x w merged tokens takes t = p, height = p +
    row, width = p + col, and the text after it goes on at p + max(h, w). grids: (1, height, width)
    of each image in order, in patches. Returns ((3, T) long, next position).
    """
    columns, i, p = [], 0, start
    for _, h, w in grids:
        text = ids.index(image_id, i) - i  # tokens before the image
        columns.append(torch.arange(p, p + text).expand(3, -1))
        h, w, i, p = h // merge, w // merge, i + text + h * w // merge**2, p + text
        cell = torch.arange(h * w)
        columns.append(torch.stack([torch.zeros_like(cell), cell // w, cell % w]) + p)
        p += max(h, w)
    columns.append(torch.arange(p, p + len(ids) - i).expand(3, -1))
    return torch.cat(columns, dim=1), p + len(ids) - i


def collate(policy, sequences):
    """Several Sequences end to end as one row, a dict of tensors on the policy's device: input_ids
    (1, T); position_ids (3, 1, T); written (N,), the places in the row of what the policy wrote,
    which is never a conversation's first token; and, if there are images, pixel_values, all their
    patches, and image_grid_thw (images, 3). Beside them lengths, a list."""
    where = [mrope_positions(s.token_ids, [g for _, g in s.images], policy.image_token_id, policy.merge_size)[0]
             for s in sequences]  # (3, length)
    written = torch.tensor([written for s in sequences for written in s.loss_mask])
    batch = {"input_ids": torch.tensor([[token for s in sequences for token in s.token_ids]]),
             "loss_positions": written.nonzero()[:, 0],  # (N,)
             "position_ids": torch.cat(where, dim=1)[:, None]}
    images = [image for s in sequences for image in s.images]
    if images:
        batch["pixel_values"] = torch.cat([patches for patches, _ in images])  # (sum of patches, C)
        batch["image_grid_thw"] = torch.tensor([grid for _, grid in images])  # (images, 3)
    batch = {name: tensor.to(policy.device) for name, tensor in batch.items()}
    return {"lengths": [len(s.token_ids) for s in sequences], **batch}


def micro_batches(sequences, tokens):
    """Cut a list, in its order, into batches of at most `tokens` tokens. A sequence longer than
    that goes alone; no batch is empty."""
    batch, size = [], 0
    for sequence in sequences:
        if batch and size + len(sequence.token_ids) > tokens:
            yield batch
            batch, size = [], 0
        batch.append(sequence)
        size += len(sequence.token_ids)
    if batch:
        yield batch


def prefetch(function, items):
    """function(item) of each item in turn; the next one is computed in a thread meanwhile."""
    items = iter(items)
    with ThreadPoolExecutor(1) as thread:
        ahead = [thread.submit(function, item) for item in itertools.islice(items, 1)]
        while ahead:
            result = ahead[0].result()
            ahead = [thread.submit(function, item) for item in itertools.islice(items, 1)]
            yield result


def vocab_logprobs(policy, hidden):
    """Log-probabilities over the vocabulary, in at least float32. Banned ids have -inf, and no
    share. (N, D) -> (N, V)."""
    logits = policy.model.lm_head(hidden)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits.index_fill(-1, policy.suppressed_index, -math.inf).log_softmax(-1)


def token_logprobs(policy, batch, chunk=4096):
    """Log-probability of every token the policy wrote, given all before it: (N,), in the order of
    batch["loss_positions"]. Of nothing an empty tensor, connected to the model all the same. All else in
    the batch is for policy.model.model.

    The vocabulary is projected only at those positions, `chunk` at a time, and recomputed in
    backward: with 152k ids and 32k tokens the logits would otherwise be the largest tensor by far.
    """
    inputs = {name: value for name, value in batch.items() if name != "loss_positions"}
    hidden = policy.model.model(**inputs, use_cache=False).last_hidden_state[0]         # (T, D)
    # token t is predicted at t - 1
    hidden, targets = hidden[batch["loss_positions"] - 1], batch["input_ids"][0, batch["loss_positions"]]

    def score(h, t):
        return vocab_logprobs(policy, h).gather(-1, t[:, None])[:, 0]  # (n, V) -> (n,)

    parts = [checkpoint(score, h, t, use_reentrant=False) if len(targets) > chunk else score(h, t)
             for h, t in zip(hidden.split(chunk), targets.split(chunk))]
    return torch.cat(parts)


# ---- Optimizer and checkpoints ------------------------------------------------------------------


def trainable_parameters(policy, freeze_vision):
    """Parameters to train. freeze_vision: the vision tower and its projector stay as they are."""
    policy.model.model.visual.requires_grad_(not freeze_vision)
    return [p for p in policy.model.parameters() if p.requires_grad]


def learning_rate(step, total, peak, warmup):
    """Of a step, from 0 on. The first ramp = max(1, round(warmup * total)) steps rise linearly,
    from peak / ramp to peak; then half a cosine, from peak at step `ramp` to 0 at step `total`,
    which is behind the last."""
    ramp = max(1, round(warmup * total))
    if step < ramp:
        return peak * (step + 1) / ramp
    return peak * 0.5 * (1 + math.cos(math.pi * (step - ramp) / max(1, total - ramp)))


def save_state(out, optimizer, step, keep=2):
    """Write the state at `step`: every rank its pieces to out/state/step_N/RANK.pt, all at once;
    when all are on the disk, rank 0 names the step in latest.json, and older steps go, but for the
    last `keep`. A kill at any moment leaves a whole state."""
    rank, folder = get_rank(), Path(out) / "state" / f"step_{step:07d}"
    if rank < optimizer.pieces:
        state = {"optimizer": optimizer.state(), "rng": torch.get_rng_state()}
        try:
            tools.write_atomic(folder / f"{rank}.pt", lambda file: torch.save(state, file))
        except RuntimeError as error:  # torch reports a full disk this way
            reason = str(error).splitlines()[0]
            raise tools.InputError(
                f"cannot save to {folder}, perhaps the disk is full ({reason}); free space and go "
                "on with --resume: what was saved before is untouched") from None
    barrier()
    if rank == 0:
        facts = {"step": step, "pieces": optimizer.pieces, "world": world_size()}
        tools.write_atomic(folder.parent / "latest.json",
                           lambda file: file.write(json.dumps(facts).encode()))
        others = sorted(path for path in folder.parent.glob("step_*") if path != folder)
        for old in others[:-keep + 1 or None]:
            shutil.rmtree(old, ignore_errors=True)
    barrier()


def load_state(out, optimizer, resume, total):
    """Continue from the last state that is complete. Returns its step, 0 if there is none. Without
    `resume` the run starts anew, and an older run's state is set aside, so that a later --resume
    cannot mix the two; a worker restarted by torchrun --max_restarts always resumes. Raises
    InputError if a file is unreadable or beyond the `total` steps of this run."""
    folder, rank = Path(out) / "state", get_rank()
    if not resume and attempt[-1] == 1:
        if folder.exists() and rank == 0:
            shutil.rmtree(folder.with_name("old_state"), ignore_errors=True)
            os.replace(folder, folder.with_name("old_state"))
            print(f"starting anew; the checkpoints of an earlier run are set aside in "
                  f"{out}/old_state (to go on with it: --resume)", flush=True)
        barrier()
        return 0
    path = folder / "latest.json"
    if not path.exists():
        return 0
    try:
        facts = json.loads(path.read_text())
        path = folder / f"step_{facts['step']:07d}"
        parts = [torch.load(path / f"{i}.pt", map_location="cpu", weights_only=True, mmap=True)
                 for i in range(facts["pieces"])]
        torch.set_rng_state(parts[min(rank, len(parts) - 1)]["rng"])
        optimizer.load([part["optimizer"] for part in parts])
    except Exception as error:  # a damaged or foreign file shows as any of a dozen exceptions
        reason = str(error).strip().splitlines()[0]
        raise tools.InputError(f"{path}: cannot resume: {reason}; delete {folder} to start "
                               "over") from None
    tools.check(facts["step"] <= total, f"{path} is at step {facts['step']}, beyond the {total} "
               "steps of this run; ask for more steps")
    if facts["world"] != world_size() and rank == 0:
        print(f"{path} was saved by {facts['world']} processes, now there are {world_size()}: the "
              "run goes on with the same data and order, but equals the uninterrupted one only "
              "within rounding", flush=True)
    return facts["step"]


def open_log(out, step):
    """metrics.jsonl for appending; lines after `step`, written by a run that was killed before its
    next checkpoint, go."""
    path = Path(out) / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1][:step] if path.exists() else []
    tools.write_atomic(path, lambda file: file.writelines(line + b"\n" for line in lines))
    return path.open("a", encoding="utf-8")


def export(policy, out):
    """Write a plain Hugging Face folder (rank 0). Files are written aside and then moved, weights
    last."""
    if get_rank() != 0:
        return
    out, aside = Path(out), Path(out) / ".export"
    policy.image_processor.size["shortest_edge"] = policy.min_pixels
    policy.image_processor.size["longest_edge"] = policy.max_pixels
    shutil.rmtree(aside, ignore_errors=True)
    try:
        policy.model.save_pretrained(aside)
        policy.tokenizer.save_pretrained(aside)
        policy.image_processor.save_pretrained(aside)
    except Exception as error:  # safetensors has exceptions of its own for a full disk
        shutil.rmtree(aside, ignore_errors=True)
        raise tools.InputError(f"cannot save a model to {out}: {str(error).splitlines()[0]}; free "
                               "disk space") from None
    server = {"processor_class": FAMILIES[policy.model.config.model_type]}
    (aside / "processor_config.json").write_text(json.dumps(server, indent=2) + "\n")
    for path in sorted(aside.iterdir(), key=lambda p: p.suffix == ".safetensors"):
        path.chmod(0o644)   # weights come as 0600
        os.replace(path, out / path.name)
    aside.rmdir()


# ---- Training -----------------------------------------------------------------------------------


def rows_of_step(rows, step, batch, seed):
    """The `batch` rows of a step, counted from 0. Epochs follow one another, each shuffled by
    (seed, epoch); nothing else decides. A batch may hold the end of one and the beginning of the
    next, or several."""
    picked = []
    for i in range(step * batch, (step + 1) * batch):
        epoch, at = divmod(i, len(rows))
        if not picked or at == 0:
            order = np.random.default_rng([seed, epoch]).permutation(len(rows))
        picked.append(rows[order[at]])
    return picked


def finite_or_none(value):
    """A number for metrics.jsonl; None where it is not finite: the step was skipped."""
    return value if math.isfinite(value) else None


def enable_gradient_checkpointing(model):
    """Recompute the layers' activations in backward. The library (whose newer versions call it by
    another name) also makes the embeddings ask for a gradient, as adapters need it: a frozen vision
    tower would then keep its activations, and run a backward pass, for nothing."""
    name = "activation_checkpointing_enable"
    getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")()
    model.disable_input_require_grads()


def start_training(policy, args, freeze_vision, total):
    """What every trainer does first: the same weights on all ranks, an optimizer, the state of an
    earlier run. Returns (optimizer, steps done before)."""
    install_sigterm_handler()
    broadcast_weights(policy.model)
    optimizer = Optimizer(trainable_parameters(policy, freeze_vision), args.lr, args.weight_decay,
                          args.shard_optimizer)
    if args.gradient_checkpointing:
        enable_gradient_checkpointing(policy.model)
    policy.model.train()
    return optimizer, load_state(args.out, optimizer, args.resume, total)


def end_step(args, optimizer, done, total, device):
    """What every trainer does after `done` steps: save where that is due. Returns whether the run
    must stop before its end, because a rank has received SIGTERM. Raises InputError after too many
    steps in a row without a finite loss and gradient (all ranks count alike)."""
    tools.check(optimizer.skipped < MAX_SKIPPED, f"step {done}: loss or gradient was not finite "
               f"{MAX_SKIPPED} times in a row (these steps were skipped); lower --lr and start "
               "again, or go on from the last checkpoint with --resume")
    stop = done < total and stop_requested(device)
    # after skipped steps weights may be broken: keep the older ones
    due = done % args.save_every == 0 and not optimizer.skipped
    if stop or due or done == total:
        save_state(args.out, optimizer, done, args.keep_checkpoints)
    if stop and get_rank() == 0:
        print(f"stopped after step {done}, as asked to: go on with --resume ({args.out})",
              flush=True)
    return stop


def train_step(policy, optimizer, sequences, lr, args):
    """One optimizer step on this rank's share of the batch: minimise the mean of -log p(token) over
    the tokens of the global batch, or ("response") over its conversations the mean over a
    conversation's own tokens: a short reply then weighs as much as a long one. Returns (loss,
    gradient norm, tokens)."""
    lengths = [sum(s.loss_mask[1:]) for s in sequences]
    tokens, responses = all_reduce([sum(lengths), sum(n > 0 for n in lengths)], policy.device)

    def loss_of(micro):
        logprobs = token_logprobs(policy, collate(policy, micro))                       # (N,)
        if args.aggregation == "token":
            return -logprobs.sum() / max(tokens, 1)
        own = torch.tensor([sum(s.loss_mask[1:]) for s in micro], device=policy.device)
        return -(logprobs / own.repeat_interleave(own)).sum() / max(responses, 1)

    loss = optimizer.backward(micro_batches(sequences, args.micro_batch_tokens), loss_of)
    total = all_reduce([loss], policy.device)[0]
    return total, optimizer.step(lr, args.max_grad_norm, math.isfinite(total)), int(tokens)


def train(policy, rows, root, args, rank, world):
    """The loop: learning rate -> batch -> micro-steps -> sum over ranks -> clip -> step -> log ->
    save."""
    def load(step):
        """This rank's share of a step's batch as Sequences; long conversations are shared out
        evenly."""
        batch = rows_of_step(rows, step, args.batch_size, args.seed)
        batch.sort(key=lambda row: len(row["turns"]))
        return [encode(policy, row, root) for row in batch[rank::world]]
    total = args.steps or math.ceil(args.epochs * len(rows) / args.batch_size)
    freeze = args.model != "tiny" if args.freeze_vision is None else args.freeze_vision
    optimizer, start = start_training(policy, args, freeze, total)
    log = open_log(args.out, start) if rank == 0 else None
    bar = tools.progress_bar(range(start, total), initial=start, total=total, disable=rank != 0,
                         desc=f"sft {args.out.name}")
    # images of the next batch are opened and cut while the model trains on this one
    for step, sequences in zip(bar, prefetch(load, range(start, total))):
        lr = learning_rate(step, total, args.lr, args.warmup_ratio)
        longest = max((len(s.token_ids) for s in sequences), default=0)
        tools.check(longest <= args.max_seq_len, f"a conversation has {longest} tokens, more than "
                   f"--max_seq_len {args.max_seq_len}: raise it, lower --max_pixels, or remove the "
                   "longest rows")
        loss, norm, count = train_step(policy, optimizer, sequences, lr, args)
        if rank == 0:
            log.write(tools.json_line({"step": step + 1, "loss": finite_or_none(loss),
                                       "grad_norm": finite_or_none(norm), "lr": lr, "tokens": count}))
            log.flush()
            bar.set_postfix_str(f"loss {loss:.4f} norm {norm:.2f}", refresh=False)
        if end_step(args, optimizer, step + 1, total, policy.device):
            return
    export(policy, args.out)


def add_policy_flags(group):
    """The flags of every stage that loads a policy."""
    add = group.add_argument
    add("--prompts", type=Path,
        help="JSON file with other system, question, observation and error texts")
    add("--min_pixels", type=int, help="smallest view that is shown (default: the model's own)")
    add("--max_pixels", type=int, help="largest view that is shown (default: the model's own)")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float64"],
        help="weights and arithmetic; auto: bfloat16 on GPU, float32 on CPU")


def add_training_flags(group, weight_decay, save_every):
    """The flags that start_training and end_step read, of every trainer."""
    add = group.add_argument
    add("--weight_decay", type=float, default=weight_decay, help="AdamW's decay of matrices")
    add("--max_grad_norm", type=float, default=1.0, help="gradients are clipped to this global norm")
    add("--shard_optimizer", action="store_true",
        help="each process keeps gradients, float32 weights and moments of its own share of the "
             "model only")
    add("--gradient_checkpointing", action="store_true",
        help="recompute activations in backward to save memory")
    add("--save_every", type=int, default=save_every, help="steps between checkpoints")
    add("--keep_checkpoints", type=int, default=2, help="how many checkpoints are kept")
    add("--resume", action="store_true",
        help="go on from the last checkpoint in --out/state where there is one")


def parse_args():
    parser = argparse.ArgumentParser(description="Supervised fine-tuning on conversations.")
    group = parser.add_argument_group("model and data")
    add = group.add_argument
    add("--model", default="checkpoints/base", help="'tiny' (random), local folder or hub id")
    add("--data", type=Path, default=Path("data/coldstart.jsonl"), help="trajectory rows")
    add("--out", type=Path, default=Path("checkpoints/sft"), help="folder for the trained model")
    add_policy_flags(group)
    group = parser.add_argument_group("optimisation")
    add = group.add_argument
    add("--epochs", type=float, default=1.5, help="passes over the data")
    add("--steps", type=int, help="optimizer steps, instead of --epochs")
    add("--batch_size", type=int, default=8, help="conversations per step, over all processes")
    add("--micro_batch_tokens", type=int, default=2048, help="tokens per forward pass on one process")
    add("--max_seq_len", type=int, default=32768, help="longest conversation that is accepted")
    add("--lr", type=float, default=1.5e-3, help="peak learning rate (7B: 1e-5)")
    add("--aggregation", default="token", choices=["token", "response"],
        help="the loss is a mean over all tokens, or over each conversation's mean")
    add("--warmup_ratio", type=float, default=0.1, help="fraction of steps with rising learning rate")
    add("--freeze_vision", action=argparse.BooleanOptionalAction, default=None,
        help="do not train the vision tower and its projector (default, as in the paper, but for "
             "--model tiny)")
    add_training_flags(group, weight_decay=0.01, save_every=200)
    add("--seed", type=int, default=0, help="order of the data and the tiny model's first weights")
    args = parser.parse_args()
    tools.check_number_flags(args, ["seed", "weight_decay", "warmup_ratio"])
    return args


def main():
    args = parse_args()
    rank, world, device = setup_distributed()
    stage = "build_data.py" if args.data.name == "instruct.jsonl" else "collect_coldstart.py"
    rows = tools.read_jsonl(args.data, tools.check_trajectory, f"python {stage}")
    tools.check(rows, f"{args.data} has no rows")
    args.out.mkdir(parents=True, exist_ok=True)
    prompts = tools.load_prompts(args.prompts)
    if args.model == "tiny":
        model, tokenizer, processor = build_tiny(project_texts(rows), args.seed)
        model.to(pick_dtype(args.dtype, device))
        policy = make_policy(model, tokenizer, processor, device, prompts, args.min_pixels,
                             args.max_pixels)
    else:
        hint = "python sft.py --model tiny --data data/instruct.jsonl --out checkpoints/base"
        policy = load_policy(args.model, device, args.dtype, prompts, args.min_pixels,
                             args.max_pixels, hint)
    if rank == 0:
        millions = sum(p.numel() for p in policy.model.parameters()) / 1e6
        print(f"{args.model}: {millions:.1f} M parameters, vocabulary {len(policy.tokenizer)}; "
              f"{len(rows)} conversations; {world} process(es) on {device.type}", flush=True)
    train(policy, rows, args.data.parent, args, rank, world)
    close_distributed()


if __name__ == "__main__":
    tools.run(main)
