"""Supervised fine-tuning: teach a vision-language model conversations, by next-token prediction on
its own turns.

This file introduces the policy (the tiny Qwen2.5-VL of build_data.py, or a pretrained Qwen2.5-VL or
Qwen3-VL), how a conversation becomes token ids + loss mask + images, log-probabilities, data
parallel with a sharded AdamW by hand, and checkpoints. rl.py and evaluate.py import them. The last
two sections, after the command, only add speed and survive SIGTERM and restarts.

What differs from a textbook fine-tuning script and from the Mini-o3 paper:
1. Loss only on the assistant's tokens, the stop token included. A turn marked "learn": false (a
   teacher's deliberate mistake) is context, not target.
2. A batch is packed: its conversations lie end to end in one row, and each attends only to itself.
   So there is neither padding nor an attention mask.
3. Positions are explicit (three axes, M-RoPE). One function computes those of images, for the
   rollout engine, too.
4. Ids that a policy may never write (image placeholders, unused rows of the vocabulary) are
   excluded from the softmax, here as in the sampler.
5. The loss is divided by the number of tokens (or responses) of the *global* batch, and gradients
   are summed over ranks. So the result depends neither on the number of processes nor on how a
   batch is cut into micro-batches. Gradients are reduced while backward runs.
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
                       --batch_size 32 --lr 1e-5 --shard_optimizer --gradient_checkpointing \\
                       --micro_batch_tokens 32768 --min_pixels 40000 --max_pixels 2000000
    2 nodes        torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d \\
                       --rdzv_endpoint=HOST:29500 sft.py ...
"""

import argparse
import collections
import functools
import itertools
import json
import math
import os
import shutil
import signal
import sys
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
from torch.utils.checkpoint import checkpoint
from transformers import (AttentionInterface, AttentionMaskInterface, AutoModelForImageTextToText,
                          AutoTokenizer, GenerationConfig)
from transformers.configuration_utils import PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils import logging as hf_logging

import tools
from build_data import SPECIAL_TOKENS, build_tiny, project_texts
from extras import model_folder, run_folder, terminal, track
from extras.images import check_images

hf_logging.disable_progress_bar()
hf_logging.set_verbosity_error()        # load_policy says in a line what it warns of in many

# On a CPU the first call of a function chooses its kernel. If two threads make that call at once,
# one may get a coarse kernel (pytorch issue 188792): in 4 of 100 processes cosines were off by
# 1e-4. So each function is called once before there are threads.
for math_dtype in (torch.float32, torch.float64):
    for math_function in (torch.cos, torch.sin, torch.exp, torch.log, torch.sqrt):
        math_function(torch.ones(1, dtype=math_dtype))

# ---- The policy: model, tokenizer, images -------------------------------------------------------

# The supported model types, and the processor that inference servers load for each.
FAMILIES = {"qwen2_5_vl": "Qwen2_5_VLProcessor", "qwen3_vl": "Qwen3VLProcessor"}


@dataclass(eq=False)    # hashable, by identity: evaluate.py caches results by policy
class Policy:
    """A model with everything that is needed to talk to it.

    stop_ids: ids that end a turn. suppressed_ids: ids that the policy may never write; the same as
    a tensor on the device: suppressed_index. merge_size: this many patches a side become one image
    token. resize_factor: an image's sides are multiples of it, in pixels."""
    model: torch.nn.Module
    tokenizer: object
    image_processor: object
    prompts: dict
    min_pixels: int
    max_pixels: int
    has_adapters: bool = False      # of extras/lora.py

    def __post_init__(self):
        config = self.model.config
        token_id = self.tokenizer.convert_tokens_to_ids
        self.device = next(self.model.parameters()).device
        # Special tokens.
        self.image_token_id = token_id("<|image_pad|>")
        self.im_start_id = token_id("<|im_start|>")
        self.im_end_id = token_id("<|im_end|>")
        self.vision_start_id = token_id("<|vision_start|>")
        self.vision_end_id = token_id("<|vision_end|>")
        self.stop_ids = {self.im_end_id, token_id("<|endoftext|>")}
        # What may not be sampled: other special tokens, and rows of the vocabulary without a token.
        other_special_ids = {token_id(token) for token in SPECIAL_TOKENS} - self.stop_ids
        unused_ids = range(len(self.tokenizer), config.text_config.vocab_size)
        self.suppressed_ids = sorted(other_special_ids.union(unused_ids))
        self.suppressed_index = torch.tensor(self.suppressed_ids, device=self.device)
        # Image sizes.
        self.merge_size = config.vision_config.spatial_merge_size
        self.resize_factor = config.vision_config.patch_size * self.merge_size

    def encode_text(self, text):
        """Return the token ids of a text. A special token written in it is split into ordinary
        ones, so no text can inject one."""
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    def encode_message(self, role, before_image, after_image=None, num_image_tokens=0):
        """Return the token ids of one chat message in the Qwen format, with a picture of that many
        tokens between two texts, or, if after_image is None, without a picture."""
        token_ids = [self.im_start_id, *self.encode_text(f"{role}\n{before_image}")]
        if after_image is not None:
            token_ids.append(self.vision_start_id)
            token_ids += [self.image_token_id] * num_image_tokens
            token_ids.append(self.vision_end_id)
            token_ids += self.encode_text(after_image)
        return [*token_ids, self.im_end_id, *self.encode_text("\n")]

    def preprocess_images(self, views):
        """Resize PIL views as the model sees them and cut them into patches. Return a list of
        (patches (N, C), grid (t, h, w) in patches)."""
        if not views:
            return []
        resized_views = [tools.resize_for_model(view, self.min_pixels, self.max_pixels,
                                                self.resize_factor) for view in views]
        features = self.image_processor(images=resized_views, do_resize=False, return_tensors="pt")
        grids = features["image_grid_thw"].tolist()
        patches = features["pixel_values"].split([t * h * w for t, h, w in grids])
        return [(image_patches.to(self.model.dtype), tuple(grid))
                for image_patches, grid in zip(patches, grids)]

    def image_grid(self, view):
        """Return the grid that preprocess_images gives a view, without computing its patches."""
        width, height = tools.size_for_model(*view.size, self.min_pixels, self.max_pixels,
                                             self.resize_factor)
        patch_size = self.resize_factor // self.merge_size
        return 1, height // patch_size, width // patch_size

    def num_image_tokens(self, grid):
        """Return how many tokens an image of this grid takes in the text."""
        num_frames, height, width = grid
        return num_frames * height * width // self.merge_size**2

    def prompt_ids(self, row, grid):
        """Return the ids of system prompt and question, up to where the assistant begins."""
        token_ids = []
        system = tools.system_text(row, self.prompts)
        if system:
            token_ids += self.encode_message("system", system)
        before_image, after_image = tools.question_text(row, self.prompts)
        num_image_tokens = self.num_image_tokens(grid)
        token_ids += self.encode_message("user", before_image, after_image, num_image_tokens)
        return token_ids + self.generation_prompt()

    def generation_prompt(self):
        """Return the ids after which the assistant writes."""
        return [self.im_start_id, *self.encode_text("assistant\n")]

    def tool_message_ids(self, turn, turn_number, num_observations, grid=None):
        """Return the ids between an assistant's stop token and its next turn: the tool's message
        (see tools.tool_message). grid: the crop's, if the turn was a zoom. The message of a refused
        call does not name num_observations."""
        before_image, after_image = tools.tool_message(turn, turn_number, num_observations,
                                                       self.prompts)
        num_image_tokens = 0 if grid is None else self.num_image_tokens(grid)
        message = self.encode_message("user", before_image, after_image, num_image_tokens)
        return self.encode_text("\n") + message + self.generation_prompt()


def cast_parameters(model, dtype):
    """Change the type of a new model's parameters. Rotary frequencies, which are buffers, stay
    float32, as in a model that is loaded."""
    for param in model.parameters():
        param.data = param.data.to(dtype)


def make_policy(model, tokenizer, image_processor, device, prompts=None, min_pixels=None,
                max_pixels=None):
    """Return a Policy of these parts. Pixel limits default to the image processor's own. Raise
    InputError if the parts do not fit together."""
    model_folder.check_parts(model.config, tokenizer, image_processor)
    min_pixels, max_pixels = model_folder.pixel_limits(image_processor, min_pixels, max_pixels)
    model.set_attn_implementation({"text_config": "per_conversation"})
    speed_up_vision_tower(model)
    model.to(device)
    model.requires_grad_(True)
    prompts = prompts or dict(tools.PROMPTS)
    policy = Policy(model, tokenizer, image_processor, prompts, min_pixels, max_pixels)
    # An exported copy on an inference server must sample as the policy does: without image
    # placeholders, at temperature 1, without any cut or penalty. Published models have other
    # defaults, so this replaces all of them.
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0,
        eos_token_id=sorted(policy.stop_ids), bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.convert_tokens_to_ids("<|endoftext|>"),
        suppress_tokens=policy.suppressed_ids)
    return policy


def load_policy(path, device, dtype="auto", prompts=None, min_pixels=None, max_pixels=None,
                hint=""):
    """Return the Policy of a local folder or hub id. hint: the command that makes the folder.
    Raise InputError."""
    folder = model_folder.find(path, hint)
    # 1. A damaged file shows as any of a dozen exceptions of several libraries. The weights, which
    #    take longest, are read last.
    try:
        check_device(path, read_config(folder), device, dtype)
        model_folder.check_files(path, folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        image_processor = model_folder.load_image_processor(folder)
        model_folder.pixel_limits(image_processor, min_pixels, max_pixels)
        model, report = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=pick_dtype(dtype, device), generation_config=GenerationConfig(),
            output_loading_info=True, ignore_mismatched_sizes=True)
    except tools.InputError:
        raise
    except Exception as error:
        reason = model_folder.one_line(error)
        raise tools.InputError(f"{path}: cannot load a model: {reason}") from None
    # 2. Whether the weights are whole.
    model_folder.check_weights(path, report, model.config)
    policy = make_policy(model, tokenizer, image_processor, device, prompts, min_pixels, max_pixels)
    model_folder.check_finite(path, model)
    return policy


def read_config(path):
    """Return a model's configuration. Raise InputError for another family, OSError for no model."""
    config = PreTrainedConfig.get_config_dict(path)[0]
    family = config.get("model_type")
    tools.check(family in FAMILIES, f"{path}: model family '{family}' is not supported; use one of "
                f"{', '.join(FAMILIES)}")
    all_names = {*config, *config.get("text_config", {})}
    tools.check("quantization_config" not in all_names, f"{path}: a quantized model cannot be "
                "trained; use the one that it was made of")
    return config


def check_device(path, config, device, dtype):
    """Raise InputError if a model of billions of parameters would run on a CPU by mistake."""
    if torch.device(device).type != "cpu":
        return
    hidden_size = config.get("text_config", config).get("hidden_size", 0)
    is_large = hidden_size >= 1024
    chose_cpu = dtype != "auto"
    tools.check(not is_large or chose_cpu,
                f"{path}: no GPU was found for a model as large as this (width {hidden_size}); to "
                "run it on the CPU anyway, add --dtype bfloat16 or float32")


def pick_dtype(name, device):
    """Return the torch dtype of a --dtype flag; auto: bfloat16 on a GPU, float32 on a CPU."""
    if name == "auto":
        name = "bfloat16" if torch.device(device).type == "cuda" else "float32"
    return getattr(torch, name)


def head_size(text_config):
    """Return the width of one attention head. Only Qwen3-VL's configuration names it."""
    named_size = getattr(text_config, "head_dim", None)
    return named_size or text_config.hidden_size // text_config.num_attention_heads


# ---- From a conversation to tensors -------------------------------------------------------------


@dataclass
class Sequence:
    """One conversation as tokens. loss_mask[t]: token t was (or is to be) written by the policy,
    which never holds for the first token. images: list of (patches, grid), in their order."""
    token_ids: list = field(default_factory=list)
    loss_mask: list = field(default_factory=list)
    images: list = field(default_factory=list)

    def append(self, token_ids, in_loss, image=None):
        """Append tokens that are all in the loss or all not, with the image that is in them."""
        self.token_ids += token_ids
        self.loss_mask += [in_loss] * len(token_ids)
        if image is not None:
            self.images.append(image)


def encode(policy, row, root):
    """Turn a trajectory row into a Sequence. root: the folder that image paths are relative to.

    In the loss is what the policy writes: its turns with their stop token, except turns that say
    "learn": false. For one zoom and an answer:
        tokens                                                              in the loss
        system prompt, question with image, <|im_start|>assistant           no
        <grounding>{"bbox_2d": ..., "source": ...}</grounding><|im_end|>    yes
        observation_1: with image, <|im_start|>assistant                    no
        <answer>7</answer><|im_end|>                                        yes
    Raise InputError if an image is missing or a zoom cannot be carried out."""
    # 1. Carry out all zooms: the original image and every observation.
    views = tools.replay(row, tools.open_image(Path(root) / row["image"]))
    images = policy.preprocess_images(views)
    # 2. The prompt, with the original.
    sequence = Sequence()
    _, original_grid = images[0]
    sequence.append(policy.prompt_ids(row, original_grid), False, images[0])
    # 3. The turns. After each except the last comes the tool's message.
    num_observations = 0
    for turn_number, turn in enumerate(row["turns"], 1):
        turn_ids = [*policy.encode_text(turn["text"]), policy.im_end_id]
        sequence.append(turn_ids, turn.get("learn", True))
        if turn_number == len(row["turns"]):
            break
        image = None
        grid = None
        if "zoom" in turn:
            num_observations += 1
            image = images[num_observations]
            _, grid = image
        message_ids = policy.tool_message_ids(turn, turn_number, num_observations, grid)
        sequence.append(message_ids, False, image)
    return sequence


def mrope_positions(token_ids, image_grids, image_token_id, merge_size, start=0):
    """Return the M-RoPE positions (Qwen2-VL, arXiv 2409.12191, section 2.1) of part of a
    conversation, (3, T) long, and the position of the token after it.

    A text token has the same position on all three axes, and the next token has one more. All
    tokens of an image share the temporal position p; height is p + row, width is p + column, and
    the text after it continues at p + max(rows, columns). image_grids: (1, height, width) in
    patches, one per image. start: position of the first token. Two words, an image of 4 x 6 patches
    (2 x 3 tokens after merging two by two) and a word:
        temporal   0 1   2 2 2 2 2 2   5
        height     0 1   2 2 2 3 3 3   5
        width      0 1   2 3 4 2 3 4   5      the next position is 6
    """
    position_chunks = []    # (3, length) each
    text_start = 0          # index of the first token after the last image
    text_position = start
    for _, grid_height, grid_width in image_grids:
        # 1. The text before the image.
        image_start = token_ids.index(image_token_id, text_start)
        image_position = text_position + image_start - text_start
        position_chunks.append(torch.arange(text_position, image_position).expand(3, -1))
        # 2. The image, row by row.
        h = grid_height // merge_size
        w = grid_width // merge_size
        cell = torch.arange(h * w)
        frame_row_column = torch.stack([torch.zeros_like(cell), cell // w, cell % w])
        position_chunks.append(image_position + frame_row_column)
        text_start = image_start + h * w
        text_position = image_position + max(h, w)
    # 3. The text after the last image.
    next_position = text_position + len(token_ids) - text_start
    position_chunks.append(torch.arange(text_position, next_position).expand(3, -1))
    return torch.cat(position_chunks, dim=1), next_position


def per_conversation(module, query, key, value, attention_mask, scaling=None, attend=None,
                     **kwargs):
    """Compute text attention, as every layer of transformers calls it. query (1, H, T, D) ->
    ((1, T, H, D), None).

    transformers hands keyword arguments that it does not know on to this function. So whoever runs
    the model decides who attends to whom, by model(..., attend=function):
        training    attend_packed below. key and value: (1, K, T, D), K <= H heads
        rollouts    CachePlan.attend of evaluate.py. key and value: those of the whole KV cache,
                    (num_slots, K, length, D), as CachePlan.update has returned them
        without     the library's attention, for its `generate`"""
    if attend is not None:
        return attend(query, key, value, scaling), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling,
                                  **kwargs)


AttentionInterface.register("per_conversation", per_conversation)
# The mask for the library's attention, which its `generate` needs.
AttentionMaskInterface.register("per_conversation", sdpa_mask)


def attend_packed(sequence_lengths, query, key, value, scaling):
    """Attend within each of the conversations that lie end to end in one row: one causal call per
    conversation. query: (1, H, T, D); key and value: (1, K, T, D). Return (1, T, H, D)."""
    queries = query.split(sequence_lengths, dim=2)      # (1, H, length, D) each
    keys = key.split(sequence_lengths, dim=2)           # (1, K, length, D) each
    values = value.split(sequence_lengths, dim=2)
    outputs = [F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling,
                                              enable_gqa=True)
               for q, k, v in zip(queries, keys, values)]
    return torch.cat(outputs, dim=2).transpose(1, 2)


def collate(policy, sequences):
    """Put Sequences end to end into one row. Return a dict of tensors on the policy's device:
        input_ids        (1, T)
        position_ids     (3, 1, T), they begin at 0 in every conversation
        loss_positions   (N,), where in the row the policy wrote, never a conversation's first token
        pixel_values     (sum of patches, C), and
        image_grid_thw   (images, 3), both only if there are images
        attend           not a tensor: the attention function above, for these conversations
    Example: two conversations. The first is an image (four tokens I) and a word, the second is
    three words. The policy wrote 101, 103 and 104:
        input_ids        [[  I   I   I   I 101 102 103 104]]
        position_ids     [[[ 0   0   0   0   2   0   1   2]],
                          [[ 0   0   1   1   2   0   1   2]],
                          [[ 0   1   0   1   2   0   1   2]]]
        loss_positions   [4, 6, 7]
    """
    # 1. Everything end to end.
    token_ids = []
    loss_mask = []
    position_ids = []       # (3, length) each
    images = []
    for sequence in sequences:
        grids = [grid for _, grid in sequence.images]
        positions, _ = mrope_positions(sequence.token_ids, grids, policy.image_token_id,
                                       policy.merge_size)
        token_ids += sequence.token_ids
        loss_mask += sequence.loss_mask
        position_ids.append(positions)
        images += sequence.images
    # 2. As tensors.
    batch = {"input_ids": torch.tensor([token_ids]),                        # (1, T)
             "position_ids": torch.cat(position_ids, dim=1)[:, None],       # (3, 1, T)
             "loss_positions": torch.tensor(loss_mask).nonzero()[:, 0]}     # (N,)
    if images:
        batch["pixel_values"] = torch.cat([patches for patches, _ in images])
        batch["image_grid_thw"] = torch.tensor([grid for _, grid in images])
    batch = {name: tensor.to(policy.device) for name, tensor in batch.items()}
    # 3. Each conversation attends to itself.
    sequence_lengths = [len(sequence.token_ids) for sequence in sequences]
    batch["attend"] = partial(attend_packed, sequence_lengths)
    return batch


def micro_batches(sequences, max_tokens):
    """Yield a list of Sequences, in its order, as lists of at most max_tokens tokens, each as long
    as that allows. A sequence that is longer is alone in its list. No list is empty."""
    micro_batch = []
    num_tokens = 0
    for sequence in sequences:
        if micro_batch and num_tokens + len(sequence.token_ids) > max_tokens:
            yield micro_batch
            micro_batch = []
            num_tokens = 0
        micro_batch.append(sequence)
        num_tokens += len(sequence.token_ids)
    if micro_batch:
        yield micro_batch


def prefetch(function, items, num_threads=1):
    """Yield function(item) of each item, in order. While the caller uses one result, num_threads
    threads compute the next ones, one each."""
    with ThreadPoolExecutor(num_threads) as threads:
        futures = collections.deque()
        for item in items:
            # As many as there are threads are ahead of the caller.
            if len(futures) == num_threads:
                result = futures.popleft().result()
                futures.append(threads.submit(function, item))
                yield result
            else:
                futures.append(threads.submit(function, item))
        while futures:
            yield futures.popleft().result()


# ---- The loss -----------------------------------------------------------------------------------


def vocab_logprobs(policy, hidden_states):
    """Return log-probabilities over the vocabulary, in float32 at least: (N, D) -> (N, V). A
    suppressed id has -inf, and no share in the softmax."""
    logits = policy.model.lm_head(hidden_states)
    if logits.dtype != torch.float64:
        logits = logits.float()
    return logits.index_fill(-1, policy.suppressed_index, -math.inf).log_softmax(-1)


# Logits that are in memory at once: half a gigabyte in float32. Qwen2.5-VL-7B: of 882 positions.
LOGITS_PER_CHUNK = 2**27


def token_logprobs(policy, batch, chunk_size=None):
    """Return the log-probability of every token that the policy wrote, given all tokens before it:
    (N,), in the order of batch["loss_positions"]. If the policy wrote no token, the empty result
    still has a gradient function.

    The vocabulary is computed at those positions only. More than chunk_size of them (by default as
    many as have LOGITS_PER_CHUNK logits) are computed chunk by chunk, and again in backward: with
    152k ids and 32k tokens the logits would otherwise be the largest tensor by far. The model runs
    with use_cache=False."""
    # 1. The transformer. All entries of batch but one are its keyword arguments.
    inputs = {name: value for name, value in batch.items() if name != "loss_positions"}
    hidden_states = policy.model.model(**inputs, use_cache=False).last_hidden_state[0]  # (T, D)
    # 2. The token at t is predicted at t - 1, in the same conversation: the first token of one is
    #    never in the loss.
    loss_positions = batch["loss_positions"]
    hidden_states = hidden_states[loss_positions - 1]                                   # (N, D)
    targets = batch["input_ids"][0, loss_positions]                                     # (N,)

    # 3. Log-probabilities of the targets, chunk by chunk.
    if chunk_size is None:
        chunk_size = positions_per_chunk(len(policy.model.lm_head.weight))

    def target_logprobs(hidden_chunk, target_chunk):
        logprobs = vocab_logprobs(policy, hidden_chunk)                 # (n, V)
        return logprobs.gather(-1, target_chunk[:, None])[:, 0]         # (n,)

    if len(targets) <= chunk_size:
        return target_logprobs(hidden_states, targets)
    logprob_chunks = []
    for chunk in zip(hidden_states.split(chunk_size), targets.split(chunk_size)):
        logprob_chunks.append(checkpoint(target_logprobs, *chunk, use_reentrant=False))
    return torch.cat(logprob_chunks)


def positions_per_chunk(vocab_size):
    """Return how many positions have LOGITS_PER_CHUNK logits."""
    return max(1, LOGITS_PER_CHUNK // vocab_size)


def sft_loss(policy, sequences, aggregation, denominator):
    """Return the share of these Sequences in the loss of the global batch, a scalar.

    aggregation "token": the sum of -log p(token); denominator: the number of tokens. "response":
    the sum over conversations of the mean over their own tokens, so that a short reply weighs as
    much as a long one; denominator: the number of conversations."""
    logprobs = token_logprobs(policy, collate(policy, sequences))       # (N,)
    if aggregation == "response":
        lengths = torch.tensor([sum(s.loss_mask) for s in sequences], device=policy.device)
        logprobs = logprobs / lengths.repeat_interleave(lengths)        # (N,)
    return -logprobs.sum() / denominator


def train_step(policy, optimizer, sequences, lr, args):
    """Take one optimizer step. sequences: this rank's share of the batch. Return the loss of the
    global batch, the gradient's norm before clipping, and the number of tokens in the loss."""
    # 1. Denominators over all ranks, before the batch is cut into micro-batches.
    lengths = [sum(sequence.loss_mask) for sequence in sequences]
    local_counts = [sum(lengths), sum(length > 0 for length in lengths)]
    num_tokens, num_responses = all_reduce(local_counts, policy.device)
    denominator = max(1, num_tokens if args.aggregation == "token" else num_responses)
    # 2. Gradients, summed over micro-batches and ranks.
    loss = optimizer.backward(
        micro_batches(sequences, args.micro_batch_tokens),
        lambda micro_batch: sft_loss(policy, micro_batch, args.aggregation, denominator))
    # 3. All ranks take the step, or skip it if the loss is not finite.
    global_loss = all_reduce([loss], policy.device)[0]
    grad_norm = optimizer.step(lr, args.max_grad_norm, math.isfinite(global_loss))
    return global_loss, grad_norm, int(num_tokens)


# ---- Data parallel: processes and their collectives ---------------------------------------------
# Every rank (process) holds the whole model, runs forward and backward on its share of the batch,
# and takes the same step, since gradients are summed over all ranks. A collective is called by
# every rank, in the same order; one process needs none of them.

# How long a rank waits for the others to start, and then in a collective: longer than the slowest
# rank's rollouts may take. Ranks of a 7B run may differ by an hour where most groups have no signal
# and are played again.
START_TIMEOUT = timedelta(minutes=60)
COLLECTIVE_TIMEOUT = timedelta(hours=6)
# Torch 2.13 renamed these two.
reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


@dataclass
class Process:
    """This process among those of the run. rank and world_size are those of get_rank() and
    world_size(), which functions below ask. attempt: 1, or more after torchrun has restarted it."""
    rank: int
    world_size: int
    device: torch.device
    attempt: int


def setup_distributed():
    """Join the process group if torchrun started us (gloo on CPU, NCCL on GPU). Return our
    Process."""
    rank = get_rank()
    num_ranks = int(os.environ.get("WORLD_SIZE", "1"))
    # 1. The device.
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        # CuDNN's attention plans for every new shape, and our shapes are all different.
        torch.backends.cuda.enable_cudnn_sdp(False)
    elif num_ranks > 1 and "LOCAL_WORLD_SIZE" in os.environ:
        num_threads = (os.cpu_count() or 1) // int(os.environ["LOCAL_WORLD_SIZE"])
        torch.set_num_threads(max(1, num_threads))
    # 2. The group. After a restart it must not read the keys of the one that crashed (see
    #    agree_on_attempt, at the end of this file).
    attempt = 1 + int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if num_ranks > 1 and not dist.is_initialized():
        store, rank, num_ranks = next(dist.rendezvous("env://", timeout=START_TIMEOUT))
        attempt = agree_on_attempt(store, rank, num_ranks)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                timeout=COLLECTIVE_TIMEOUT, rank=rank, world_size=num_ranks,
                                store=dist.PrefixStore(f"attempt_{attempt}", store),
                                device_id=device if device.type == "cuda" else None)
    return Process(rank, num_ranks, device, attempt)


def get_rank():
    return int(os.environ.get("RANK", "0"))


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier():
    """Wait until every rank has called this."""
    if world_size() > 1:
        dist.barrier()


def close_distributed():
    if dist.is_initialized():
        dist.destroy_process_group()


def all_reduce(values, device, op=dist.ReduceOp.SUM):
    """Return the sum over all ranks (or the maximum, op=MAX) of each number of a list, as floats.
    The sum is computed in float64."""
    totals = torch.tensor(values, dtype=torch.float64, device=device)
    if world_size() > 1:
        dist.all_reduce(totals, op=op)
    return totals.tolist()


def all_reduce_dict(counts, device):
    """Return {name: sum over all ranks}. Every rank must have the same names in the same order."""
    totals = all_reduce(list(counts.values()), device)
    return dict(zip(counts, totals))


def all_gather_objects(items):
    """Return the items of all ranks' lists as one new list, rank by rank. They are sent pickled."""
    if world_size() == 1:
        return list(items)
    items_of_ranks = [None] * world_size()
    dist.all_gather_object(items_of_ranks, items)
    return list(itertools.chain(*items_of_ranks))


def broadcast_weights(model):
    """Copy rank 0's parameters and buffers to every rank."""
    if world_size() > 1:
        for tensor in [*model.parameters(), *model.buffers()]:
            dist.broadcast(tensor.data, src=0)


# ---- Data parallel: from the naive version to a sharded optimizer -------------------------------
# Three steps. 1: all_reduce_gradients, after backward. 2: buckets, reduced while backward runs.
# 3: each rank keeps the optimizer's state of its own shard of the model only. Class Optimizer does
# the second step, and with shard=True the third.


def all_reduce_gradients(params):
    """Sum every gradient over all ranks, after backward: the whole of data parallel (section 3.2.1
    of the DDP paper, arXiv 2006.15704; picotron's DataParallelNaive).

    Correct, but slow: one small message per parameter, and the network is idle while backward runs.
    Not used here, except by the tests: Optimizer.backward gives the same gradients."""
    for param in params:
        if param.grad is None:      # this rank had no image, or no sample at all
            param.grad = torch.zeros_like(param)
        if world_size() > 1:
            dist.all_reduce(param.grad)


def make_buckets(params, megabytes=25):
    """Yield a list of parameters, in its order, as lists of one dtype each, so that few, large
    messages are sent. A list is complete once it is larger than that many megabytes (2**20
    bytes). No list is empty."""
    bucket_params = []
    num_bytes = 0
    for param in params:
        is_full = num_bytes > megabytes * 2**20
        if bucket_params and (is_full or param.dtype != bucket_params[0].dtype):
            yield bucket_params
            bucket_params = []
            num_bytes = 0
        bucket_params.append(param)
        num_bytes += param.numel() * param.element_size()
    if bucket_params:
        yield bucket_params


class Bucket:
    """Parameters whose gradients are reduced in one message. They become views of one flat tensor,
    which is padded so that it can be cut into num_shards equal shards.

    params, sizes, size: the parameters, the number of elements of each, and of all (without
    padding). flat: the tensor. shard: the part of it that this rank updates (all of it, if not
    sharded). master: what AdamW trains: shard itself or, if the weights are in bfloat16, a float32
    copy of it, since a small step would be lost in bfloat16's 8 bits. params_pending: parameters
    whose gradient of the current micro-batch is not complete yet."""

    def __init__(self, params, num_shards, shard_index):
        self.params = params
        self.sizes = [param.numel() for param in params]
        self.size = sum(self.sizes)
        self.num_shards = num_shards
        self.shard_index = shard_index
        self.params_pending = set()
        # 1. The flat tensor replaces the parameters' own memory.
        shard_length = math.ceil(self.size / num_shards)
        self.flat = torch.zeros(shard_length * num_shards, dtype=params[0].dtype,
                                device=params[0].device)
        for param, view in zip(params, self.views(self.flat)):
            view.copy_(param.data.flatten())
            param.data = view.view_as(param)
        # 2. What this rank updates.
        self.shard = self.shard_of(self.flat)
        if self.shard.dtype in (torch.float32, torch.float64):
            self.master = torch.nn.Parameter(self.shard)
        else:
            self.master = torch.nn.Parameter(self.shard.float())

    def views(self, flat):
        """Return one view per parameter, 1-D, of a tensor that is as long as self.flat."""
        return flat[:self.size].split(self.sizes)

    def shard_of(self, flat):
        """Return this rank's shard of a tensor that is as long as self.flat."""
        return flat.chunk(self.num_shards)[self.shard_index]

    def flatten_gradients(self):
        """Return all gradients as one tensor of the master's dtype, as long as self.flat, and free
        them. A parameter without a gradient (this rank had no image, or no sample at all) has
        zeros."""
        flat_gradients = torch.zeros(len(self.flat), dtype=self.master.dtype,
                                     device=self.flat.device)
        for param, view in zip(self.params, self.views(flat_gradients)):
            if param.grad is not None:
                view.copy_(param.grad.flatten())
                param.grad = None
        return flat_gradients

    def accumulate(self, gradient):
        """Add a gradient, as long as master, to master.grad, which AdamW will read."""
        if self.master.grad is None:
            self.master.grad = gradient
        else:
            self.master.grad.add_(gradient)

    def reshard(self, saved_shards):
        """Return this rank's shard, given the shards of a run with any number of ranks."""
        if len(saved_shards) == self.num_shards:
            return saved_shards[self.shard_index]
        whole = torch.cat(saved_shards)[:self.size]     # without the old padding
        return self.shard_of(F.pad(whole, (0, len(self.flat) - self.size)))


class Optimizer:
    """AdamW or SGD with data parallel: buckets whose reduction overlaps with backward, as in DDP
    (arXiv 2006.15704, sections 3.2.2 and 3.2.3), and with shard=True a sharded state, as in ZeRO
    stage 2 (arXiv 1910.02054).

    Buckets of matrices come first, then those of vectors (norms and biases, few bytes), each in
    about the order in which backward completes gradients, last layer first. A hook on every
    parameter starts the reduction of a bucket as soon as all of its gradients are complete: an all-
    reduce, or, if sharded, a reduce-scatter, in which a rank receives the sum of its own shard
    only. Buckets are always reduced in the same order, so ranks whose batches differ call the same
    collectives. Then the global norm is clipped, each rank updates its shard, and the new weights
    are all-gathered.

    Bytes per parameter on one of W ranks, weights of w bytes (w = 2: bfloat16), besides a few
    buckets in flight:
        whole      w weights + w gradient until it is reduced + 4 sum of gradients + 8 moments
                   + 4 master (only if w = 2)
        sharded    w weights + (4 sum of gradients + 8 moments + 4 master (only if w = 2)) / W
    SGD has no moments. rule: "adamw" or "sgd", which rl.py explains.
    """

    def __init__(self, params, lr, weight_decay, shard=False, megabytes=25, rule="adamw"):
        self.is_sharded = shard and world_size() > 1
        self.num_shards = world_size() if self.is_sharded else 1
        self.shard_index = get_rank() if self.is_sharded else 0
        self.num_skipped = 0                    # steps in a row
        # What the hooks need to know during backward: buckets that are not reduced yet, in their
        # order, and collectives that were started, the oldest first: (work, bucket, what is sent,
        # what is received or None). What is sent must live until work.wait() returns.
        self.is_last_micro_batch = False
        self.buckets_pending = collections.deque()
        self.in_flight = collections.deque()
        # 1. Buckets. Only matrices decay: shrinking norms and biases has no use.
        matrices = [param for param in reversed(params) if param.dim() > 1]
        vectors = [param for param in reversed(params) if param.dim() <= 1]
        self.buckets = []
        parameter_groups = []
        for group, decay in [(matrices, weight_decay), (vectors, 0.0)]:
            group_buckets = [Bucket(bucket_params, self.num_shards, self.shard_index)
                             for bucket_params in make_buckets(group, megabytes)]
            self.buckets += group_buckets
            if group_buckets:
                masters = [bucket.master for bucket in group_buckets]
                parameter_groups.append({"params": masters, "weight_decay": decay})
        # 2. The update rule sees the masters, which are this rank's shards.
        if rule == "sgd":
            self.update_rule = torch.optim.SGD(parameter_groups, lr=lr)
        else:
            self.update_rule = torch.optim.AdamW(parameter_groups, lr=lr, betas=(0.9, 0.95),
                                                 fused=True)
        # 3. autograd calls mark_ready(bucket, param) when it has completed param.grad.
        for bucket in self.buckets:
            for param in bucket.params:
                param.register_post_accumulate_grad_hook(partial(self.mark_ready, bucket))

    def backward(self, micro_batches, loss_of, num_micro_batches=None):
        """Run backward through loss_of(micro_batch) of each of this rank's micro-batches; leave the
        sum of all gradients over all ranks in the masters. Return the sum of this rank's losses.

        micro_batches: an iterable. num_micro_batches: how many it yields; None turns it into a list
        first."""
        if num_micro_batches is None:
            micro_batches = list(micro_batches)
            num_micro_batches = len(micro_batches)
        # 1. All ranks go through the same number of rounds, so that all call the same collectives.
        device = self.buckets[0].flat.device
        num_rounds = int(all_reduce([max(1, num_micro_batches)], device, dist.ReduceOp.MAX)[0])
        remaining = iter(micro_batches)
        losses = []
        for round_number in range(num_rounds):
            # 2. Everything is pending again.
            self.is_last_micro_batch = round_number == num_rounds - 1
            self.buckets_pending = collections.deque(self.buckets)
            for bucket in self.buckets:
                bucket.params_pending.update(bucket.params)
            # 3. Backward; the hooks reduce what becomes complete.
            if round_number < num_micro_batches:
                loss = loss_of(next(remaining))
                loss.backward()
                losses.append(loss.item())
            # 4. Reduce the buckets in which a parameter had no gradient.
            while self.buckets_pending:
                self.reduce_bucket(self.buckets_pending.popleft())
        # 5. Wait for the last sums.
        while self.in_flight:
            self.wait_for_oldest()
        return sum(losses)

    def mark_ready(self, bucket, param):
        """Reduce the next buckets that are complete, now that param.grad is. Outside of backward()
        no bucket is pending, and nothing is reduced."""
        bucket.params_pending.discard(param)
        while self.buckets_pending and not self.buckets_pending[0].params_pending:
            self.reduce_bucket(self.buckets_pending.popleft())

    def reduce_bucket(self, bucket):
        """Start summing a bucket's gradients over all ranks into master.grad.

        Sharded: reduce-scatter after every micro-batch, so that no rank ever holds all gradients;
        wait_for_oldest() adds the result to master.grad. Not sharded: add up the micro-batches
        here, in the master's precision (in bfloat16 a hundred sums would lose the small ones), and
        all-reduce once, in place, after the last."""
        gradients = bucket.flatten_gradients()                          # (num_shards * length,)
        if self.is_sharded:
            shard_gradient = torch.empty_like(bucket.master)            # (length,)
            work = reduce_scatter(shard_gradient, gradients, async_op=True)
            self.in_flight.append((work, bucket, gradients, shard_gradient))
        else:
            bucket.accumulate(gradients)
            if self.is_last_micro_batch and world_size() > 1:
                work = dist.all_reduce(bucket.master.grad, async_op=True)
                self.in_flight.append((work, bucket, bucket.master.grad, None))
        if len(self.in_flight) > 2:     # bounds the memory of what is in flight
            self.wait_for_oldest()

    def wait_for_oldest(self):
        """Wait for the collective that was started first. Sharded: add its sum to master.grad."""
        work, bucket, _, shard_gradient = self.in_flight.popleft()
        work.wait()
        if self.is_sharded:
            bucket.accumulate(shard_gradient)

    @torch.no_grad()
    def step(self, lr, max_grad_norm, healthy=True):
        """Clip the gradient, update the masters, send the new weights to all ranks.
        Return the global norm before clipping, a float, summed in float64.

        If the norm is not finite, or healthy is False (on all ranks alike), nothing changes, not
        even AdamW's moments, and num_skipped counts one more step. Gradients are freed either
        way."""
        # 1. The norm over all buckets and shards.
        squared_norms = [torch.linalg.vector_norm(bucket.master.grad, dtype=torch.float64) ** 2
                         for bucket in self.buckets]
        squared_norm = sum(squared_norms).item()
        if self.is_sharded:
            squared_norm = all_reduce([squared_norm], self.buckets[0].flat.device)[0]
        grad_norm = math.sqrt(squared_norm)
        # 2. The update. The factor is that of torch.nn.utils.clip_grad_norm_.
        if healthy and math.isfinite(grad_norm):
            for bucket in self.buckets:
                bucket.master.grad.mul_(min(1.0, max_grad_norm / (grad_norm + 1e-6)))
            for group in self.update_rule.param_groups:
                group["lr"] = lr
            self.update_rule.step()
            self.all_gather_weights()
            self.num_skipped = 0
        else:
            self.num_skipped += 1
        self.update_rule.zero_grad(set_to_none=True)
        return grad_norm

    @torch.no_grad()
    def all_gather_weights(self):
        """Copy the masters into the weights of every rank."""
        in_flight = []      # what is sent must live until work.wait() returns
        for bucket in self.buckets:
            if bucket.master.dtype != bucket.shard.dtype:   # else they are the same memory
                bucket.shard.copy_(bucket.master)
            if self.is_sharded:
                shard = bucket.shard.clone()
                in_flight.append((all_gather(bucket.flat, shard, async_op=True), shard))
        for work, _ in in_flight:
            work.wait()

    def state(self):
        """Return what this rank must save: one dict per bucket, of its shard of the master and of
        AdamW's moments. The master is a copy: a view would be saved with all of its bucket."""
        return [{"size": bucket.size, "master": bucket.master.data.clone(),
                 **self.update_rule.state[bucket.master]} for bucket in self.buckets]

    @torch.no_grad()
    def load(self, shard_states):
        """Continue from an earlier run. shard_states: the state() of each of its ranks.

        If the number of shards has changed, master and moments are concatenated and split again.
        Copies replace what was there. There are no moments if no step of that run succeeded. Raise
        ValueError, before anything changes, if it is of another model: other buckets or sizes."""
        saved_sizes = [bucket_state["size"] for bucket_state in shard_states[0]]
        if saved_sizes != [bucket.size for bucket in self.buckets]:
            raise ValueError("it belongs to another model or another choice of what is trained")
        # `saved` holds the states of one bucket, one per shard.
        for bucket, saved in zip(self.buckets, zip(*shard_states)):
            rule_state = {}
            for name in saved[0].keys() - {"size"}:
                if name == "step":      # a number, the same for all shards
                    tensor = saved[0]["step"]
                else:
                    tensor = bucket.reshard([shard_state[name] for shard_state in saved])
                # Copied, or a view of the concatenated tensor would keep all of it in memory.
                rule_state[name] = tensor.to(bucket.master.device, copy=True)
            bucket.master.data.copy_(rule_state.pop("master"))
            self.update_rule.state[bucket.master] = rule_state
        self.all_gather_weights()


# ---- State of a run, and the exported model -----------------------------------------------------


def save_state(out, run, step, keep_checkpoints=2):
    """Write the state after `step` steps to out/state/step_N/. Of all states, this one included,
    the last keep_checkpoints stay. A kill at any moment leaves a complete state. run: TrainingRun.
    Raise InputError if the disk is full."""
    rank = get_rank()
    optimizer = run.optimizer
    step_folder = Path(out) / "state" / f"step_{step:07d}"
    # 1. Every rank writes its shard, all at once.
    if rank < optimizer.num_shards:
        state = {"step": step, "optimizer": optimizer.state()}
        try:
            tools.write_atomic(step_folder / f"{rank}.pt", lambda file: torch.save(state, file))
        except RuntimeError as error:       # torch reports a full disk this way
            reason = tools.first_line(error)
            raise tools.InputError(
                f"cannot save to {step_folder}, perhaps the disk is full ({reason}); free space; "
                f"{run_folder.what_is_saved(out)}") from None
    barrier()
    # 2. All shards are written: checkpoint.json says so, and older ones may go.
    if rank == 0:
        checkpoint_info = {**run.info, "step": step, "num_shards": optimizer.num_shards,
                           "world_size": world_size()}
        tools.write_atomic(step_folder / "checkpoint.json",
                           lambda file: file.write(json.dumps(checkpoint_info).encode()))
        run_folder.prune(out, keep_checkpoints)
    barrier()


def load_state(out, run, resume, total_steps):
    """Continue from the newest checkpoint that every rank can read, and return its step. Without
    resume, or if there is no checkpoint, the run starts at step 0, and what an earlier one has left
    in `out` is set aside. run: TrainingRun. Raise InputError if no checkpoint can be read, or if
    the newest is of another kind of run or beyond its total_steps."""
    is_main = get_rank() == 0
    # 1. Nothing to continue.
    folders = all_gather_objects(run_folder.checkpoints(out) if resume and is_main else [])
    if not folders:
        if is_main:
            run_folder.start_over(out, run.info["stage"], resume, total_steps)
        barrier()
        return 0
    # 2. The newest that all ranks can read. Shards are mapped into memory: only what is used is
    #    read.
    load_shard = partial(torch.load, map_location="cpu", weights_only=True, mmap=True)
    bucket_sizes = [bucket.size for bucket in run.optimizer.buckets]
    problems = []
    for folder in folders:
        my_problem = []
        try:
            saved, shard_states = run_folder.read_checkpoint(folder, run.info, bucket_sizes,
                                                             load_shard)
        except tools.InputError:
            raise
        except Exception as error:      # of a damaged or foreign file
            my_problem = [f"{folder.name} cannot be read ({error})"]
        problems_of_ranks = all_gather_objects(my_problem)
        if not problems_of_ranks:
            break
        problems.append(problems_of_ranks[0])
    tools.check(len(problems) < len(folders), f"cannot resume from {folders[0].parent}: "
                f"{', '.join(problems)}; leave out --resume to start over (nothing is deleted)")
    step = saved["step"]
    tools.check(step <= total_steps, f"{folder} is at step {step}, beyond the {total_steps} steps "
                "of this run; ask for more steps")
    # 3. Continue it.
    run.optimizer.load(shard_states)
    if is_main:
        run_folder.continue_from(folder, saved, run.info, problems, total_steps, world_size())
    barrier()
    return step


class MetricsLog:
    """metrics.jsonl of a TrainingRun, and with --track a tracker that mirrors it (rank 0)."""

    def __init__(self, out, run):
        """Open the file for appending. Lines after the run's first step are removed: a run wrote
        them that was killed before its next checkpoint."""
        self.tracker = run.tracker
        path = Path(out) / "metrics.jsonl"
        complete_lines = []
        if path.exists():
            complete_lines = path.read_bytes().split(b"\n")[:-1]
        content = b"".join(line + b"\n" for line in complete_lines[:run.first_step])
        tools.write_atomic(path, lambda file: file.write(content))
        self.file = path.open("a", encoding="utf-8")

    def write(self, metrics):
        """Append the metrics of a step, a dict, as a line of JSON."""
        try:
            self.file.write(tools.json_line(metrics))
            self.file.flush()       # a kill loses no finished step
        except OSError as error:    # the disk is full; this error does not know where
            error.filename = self.file.name
            raise
        if self.tracker is not None:
            self.tracker.log(metrics)


def export(policy, out):
    """Write a plain Hugging Face folder (rank 0). Raise InputError if it cannot be written."""
    if get_rank() != 0:
        return
    weights = None      # all of the policy's
    if policy.has_adapters:
        from extras import lora
        weights = lora.merged_weights(policy.model)
    temporary = write_model(policy, out, weights)
    model_folder.replace_model(temporary, Path(out))


def check_export(policy, out):
    """Raise InputError if export would fail: it should not show after hours of training."""
    if get_rank() == 0:
        shutil.rmtree(write_model(policy, out, weights={}))


def write_model(policy, out, weights=None):
    """Write all files of a model to out/.export, and return this folder. weights: {name: tensor};
    None: all of the policy's. Raise InputError."""
    temporary = Path(out) / ".export"
    image_processor = policy.image_processor
    image_processor.size = {"shortest_edge": policy.min_pixels, "longest_edge": policy.max_pixels}
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        policy.model.save_pretrained(temporary, state_dict=weights)
        policy.tokenizer.save_pretrained(temporary)
        image_processor.save_pretrained(temporary)
        # Inference servers look up the processor's class here.
        processor_config = {"processor_class": FAMILIES[policy.model.config.model_type]}
        text = json.dumps(processor_config, indent=2) + "\n"
        (temporary / "processor_config.json").write_text(text)
    except Exception as error:      # any of several libraries
        shutil.rmtree(temporary, ignore_errors=True)
        raise model_folder.cannot_save(out, error) from None
    return temporary


# ---- The training loop --------------------------------------------------------------------------

MAX_SKIPPED_STEPS = 5       # in a row


def trainable_parameters(policy, freeze_vision):
    """Return the parameters to train. freeze_vision: without the vision tower and its projector."""
    policy.model.model.visual.requires_grad_(not freeze_vision)
    return [param for param in policy.model.parameters() if param.requires_grad]


def learning_rate(step, total_steps, peak, warmup_ratio):
    """Return the learning rate of a step, counted from 0. Over the first
    max(1, round(warmup_ratio * total_steps)) steps it rises linearly to peak; then it falls as half
    a cosine that would reach 0 at step total_steps, one after the last."""
    warmup_steps = max(1, round(warmup_ratio * total_steps))
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    angle = math.pi * (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return peak * 0.5 * (1 + math.cos(angle))


def rows_of_step(rows, step, batch_size, seed):
    """Return the rows of a step, counted from 0. Epochs follow one another, each shuffled by (seed,
    epoch) and nothing else. A batch may lie across their border, or hold several. Five rows in
    batches of three, if the epochs' orders are 2 0 1 4 3 and 3 1 0 2 4:
        step 0: 2 0 1    step 1: 4 3 3    step 2: 1 0 2    step 3: 4 ...
    """
    batch = []
    epoch_order = None
    for sample_index in range(step * batch_size, (step + 1) * batch_size):
        epoch, index_in_epoch = divmod(sample_index, len(rows))
        if epoch_order is None or index_in_epoch == 0:
            epoch_order = np.random.default_rng([seed, epoch]).permutation(len(rows))
        batch.append(rows[epoch_order[index_in_epoch]])
    return batch


def finite_or_none(value):
    """Return a number for metrics.jsonl, or None if it is not finite: the step was skipped."""
    return value if math.isfinite(value) else None


def enable_gradient_checkpointing(model):
    """Recompute the layers' activations in backward. The library also makes the embeddings ask for
    a gradient, which adapters need. The last line undoes this: a frozen vision tower would
    otherwise keep its activations and run a backward pass for nothing."""
    if hasattr(model, "activation_checkpointing_enable"):       # the name in newer versions
        model.activation_checkpointing_enable()
    else:
        model.gradient_checkpointing_enable()
    model.disable_input_require_grads()


@dataclass
class TrainingRun:
    """What a trainer needs from start_training to its end. info: what its checkpoints say about it.
    first_step: steps done by an earlier run that this one continues."""
    optimizer: Optimizer
    info: dict
    stop_signal: "StopSignal"
    first_step: int = 0
    tracker: object = None      # of rank 0, with --track


def start_training(stage, policy, args, process, freeze_vision, total_steps, rule="adamw"):
    """Do what every trainer does first: the same weights on all ranks, an optimizer, the state of
    an earlier run. stage: "sft" or "rl"; rule: of Optimizer. Return a TrainingRun."""
    stop_signal = StopSignal(args.out)
    check_export(policy, args.out)
    params = trainable_parameters(policy, freeze_vision)
    if args.lora:
        from extras import lora
        tools.check(freeze_vision, "--lora trains adapters of the language model only: leave out "
                    "--no-freeze_vision")
        params = lora.add_adapters(policy, args.lora, args.lora_alpha, args.seed)
    broadcast_weights(policy.model)
    optimizer = Optimizer(params, args.lr, args.weight_decay, args.shard_optimizer, rule=rule)
    if args.gradient_checkpointing:
        enable_gradient_checkpointing(policy.model)
    policy.model.train()
    info = {"stage": stage, "dtype": str(policy.model.dtype).removeprefix("torch."),
            "num_parameters": sum(param.numel() for param in params),
            "flags": run_folder.describe_flags(args)}
    run = TrainingRun(optimizer, info, stop_signal)
    # A worker that torchrun has restarted continues, whatever the flag.
    resume = args.resume or process.attempt > 1
    run.first_step = load_state(args.out, run, resume, total_steps)
    if args.track and process.rank == 0:
        run.tracker = track.Tracker(args.track, args.out, info["flags"], run.first_step > 0)
    return run


def end_step(run, args, steps_done, total_steps, device):
    """Do what every trainer does after a step: save if it is time. If a rank has received SIGTERM
    or Ctrl-C, the run ends here, before its last step, with an exit code (see exit_code). Raise
    InputError after too many steps in a row without a finite loss and gradient, or if no step of
    the whole run had them (all ranks count the same)."""
    num_skipped = run.optimizer.num_skipped
    tools.check(num_skipped < min(MAX_SKIPPED_STEPS, total_steps),
                f"step {steps_done}: loss or gradient was not finite {num_skipped} times in "
                "a row (these steps were skipped); lower --lr and start again; "
                f"{run_folder.what_is_saved(args.out)}")
    stop_signal = 0
    if steps_done < total_steps:
        stop_signal = run.stop_signal.received_by_any_rank(device)
    # A loss that is not finite may come from weights that an earlier step has broken. So after a
    # skipped step the regular checkpoint is left out, until the next one is due: it could push out
    # an older, healthy state.
    is_due = steps_done % args.save_every == 0 and num_skipped == 0
    if stop_signal or is_due or steps_done == total_steps:
        save_state(args.out, run, steps_done, args.keep_checkpoints)
    if stop_signal:
        if get_rank() == 0:
            print(f"stopped after step {steps_done} of {total_steps}, as "
                  f"{signal.Signals(stop_signal).name} asks, and saved in {args.out}; continue "
                  "with --resume", flush=True)
        close_distributed()
        sys.exit(exit_code(stop_signal))


def load_batch(policy, rows, root, args, process, step):
    """Return this rank's share of a step's batch as Sequences. Sorted by the number of turns and
    dealt in turn, long conversations are spread evenly over the ranks."""
    batch = rows_of_step(rows, step, args.batch_size, args.seed)
    batch.sort(key=lambda row: len(row["turns"]))
    return [encode(policy, row, root) for row in batch[process.rank::process.world_size]]


def train(policy, rows, root, args, process):
    """Train on trajectory rows, log every step, and export the policy to args.out. root: the folder
    that image paths are relative to."""
    # 1. Prepare. A batch is encoded in a thread while the model trains on the one before it.
    total_steps = args.steps or math.ceil(args.epochs * len(rows) / args.batch_size)
    freeze_vision = args.freeze_vision
    if freeze_vision is None:
        freeze_vision = args.model != "tiny"
    run = start_training("sft", policy, args, process, freeze_vision, total_steps)
    steps = range(run.first_step, total_steps)
    batches = prefetch(partial(load_batch, policy, rows, root, args, process), steps)
    is_main = process.rank == 0
    log = MetricsLog(args.out, run) if is_main else None
    progress_bar = terminal.progress_bar(steps, initial=run.first_step, total=total_steps,
                                         disable=not is_main, desc=f"sft {args.out.name}")
    for step, sequences in zip(progress_bar, batches):
        # 2. One step.
        longest = max((len(sequence.token_ids) for sequence in sequences), default=0)
        tools.check(longest <= args.max_seq_len, f"a conversation has {longest} tokens, more than "
                    f"--max_seq_len {args.max_seq_len}: raise it, lower --max_pixels, or remove "
                    "the longest rows")
        lr = learning_rate(step, total_steps, args.lr, args.warmup_ratio)
        loss, grad_norm, num_tokens = train_step(policy, run.optimizer, sequences, lr, args)
        # 3. Log and save.
        if is_main:
            metrics = {"step": step + 1, "loss": finite_or_none(loss),
                       "grad_norm": finite_or_none(grad_norm), "lr": lr, "tokens": num_tokens}
            log.write(metrics)
            progress_bar.set_postfix_str(f"loss {loss:.4f} norm {grad_norm:.2f}", refresh=False)
        end_step(run, args, step + 1, total_steps, policy.device)
    export(policy, args.out)
    if is_main:
        run_folder.report_sft_model(args.out)


# ---- Flags and the command ----------------------------------------------------------------------


def add_policy_flags(group):
    """Add the flags of every stage that loads a policy."""
    add = group.add_argument
    add("--prompts", type=Path,
        help="JSON file with other system, question, observation and error texts (default: "
             "tools.PROMPTS)")
    add("--min_pixels", type=int,
        help="smallest view that is shown (default: the model's own limit)")
    add("--max_pixels", type=int,
        help="largest view that is shown (default: the model's own limit)")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float64"],
        help="weights and arithmetic; auto: bfloat16 on GPU, float32 on CPU")


def add_training_flags(group, weight_decay, save_every):
    """Add the flags of every trainer, which start_training and end_step read."""
    add = group.add_argument
    add("--weight_decay", type=float, default=weight_decay, help="decay of matrices")
    add("--shard_optimizer", action="store_true",
        help="each process keeps gradients, float32 weights and moments of its own shard only")
    add("--gradient_checkpointing", action="store_true",
        help="recompute activations in backward to save memory")
    add("--lora", type=int, default=0, metavar="RANK",
        help="train adapters of this rank in the language model instead of its weights, see "
             "extras/lora.py; 0: all weights")
    add("--lora_alpha", type=float, default=32.0, help="adapters are multiplied by this / RANK")
    add("--save_every", type=int, default=save_every, help="steps between checkpoints")
    add("--keep_checkpoints", type=int, default=2, help="how many checkpoints are kept")
    add("--track", metavar="PROJECT",
        help="mirror metrics.jsonl to a project in trackio or wandb (default: to neither)")
    add("--resume", action="store_true",
        help="continue from the newest whole checkpoint in --out/state, if there is one")


def parse_args():
    """Return the flags. Raise InputError for values that cannot be right."""
    parser = terminal.make_parser("Supervised fine-tuning on conversations.")
    group = parser.add_argument_group("model and data")
    add = group.add_argument
    add("--model", default="checkpoints/base", help="'tiny' (random), local folder or hub id")
    add("--data", type=Path, default=Path("data/coldstart.jsonl"), help="trajectory rows")
    add("--out", type=Path, default=Path("checkpoints/sft"), help="folder for the trained model")
    add_policy_flags(group)
    group = parser.add_argument_group("optimisation")
    add = group.add_argument
    length = group.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=float, default=1.5, help="passes over the data")
    length.add_argument("--steps", type=int, help="optimizer steps (default: as --epochs says)")
    add("--batch_size", type=int, default=8, help="conversations per step, over all processes")
    add("--micro_batch_tokens", type=int, default=2048,
        help="tokens per forward pass on one process")
    add("--max_seq_len", type=int, default=32768, help="longest conversation that is accepted")
    add("--lr", type=float, default=1.5e-3, help="peak learning rate (7B: 1e-5)")
    add("--aggregation", default="token", choices=["token", "response"],
        help="the loss is a mean over all tokens, or over each conversation's mean")
    add("--warmup_ratio", type=float, default=0.1,
        help="fraction of steps with rising learning rate")
    add("--max_grad_norm", type=float, default=1.0,
        help="gradients are clipped to this global norm")
    add("--freeze_vision", action=argparse.BooleanOptionalAction, default=None,
        help="do not train the vision tower and its projector (default: frozen, as in the paper, "
             "except with --model tiny)")
    add_training_flags(group, weight_decay=0.01, save_every=200)
    add("--seed", type=int, default=0, help="order of the data and the tiny model's first weights")
    args = parser.parse_args()
    terminal.check_number_flags(args, ["seed", "weight_decay", "warmup_ratio", "lora"])
    run_folder.check_warmup(args.warmup_ratio)
    track.check(args.track)
    return args


def main():
    """Train a policy on trajectory rows, as the flags say."""
    # 1. The data.
    args = parse_args()
    run_folder.check_out(args.out, None if args.model == "tiny" else args.model)
    process = setup_distributed()
    stage = "build_data.py" if args.data.name == "instruct.jsonl" else "collect_coldstart.py"
    rows = tools.read_jsonl(args.data, tools.check_trajectory, f"python {stage}")
    tools.check(rows, f"{args.data} has no rows")
    check_images(args.data, rows, replays_zooms=True)
    args.out.mkdir(parents=True, exist_ok=True)
    # 2. The policy.
    prompts = tools.load_prompts(args.prompts)
    if args.model == "tiny":
        model, tokenizer, image_processor = build_tiny(project_texts(rows), args.seed)
        cast_parameters(model, pick_dtype(args.dtype, process.device))
        policy = make_policy(model, tokenizer, image_processor, process.device, prompts,
                             args.min_pixels, args.max_pixels)
    else:
        hint = ("torchrun --nproc_per_node=2 sft.py --model tiny --data data/instruct.jsonl --out "
                "checkpoints/base --batch_size 16 --epochs 2.5 --aggregation response")
        policy = load_policy(args.model, process.device, args.dtype, prompts, args.min_pixels,
                             args.max_pixels, hint)
    # 3. Train it.
    if process.rank == 0:
        millions = sum(param.numel() for param in policy.model.parameters()) / 1e6
        print(f"{args.model}: {millions:.1f} M parameters, vocabulary {len(policy.tokenizer)}; "
              f"{len(rows)} conversations; {process.world_size} process(es) on "
              f"{process.device.type}", flush=True)
    with run_folder.lock_folder(args.out, process.rank, process.attempt):
        train(policy, rows, args.data.parent, args, process)
    close_distributed()


# ---- Two faster parts of the library's vision tower ---------------------------------------------
# Only speed: without this section, and its call in make_policy, results are the same (within
# rounding). On a CPU embed_patches saves an eighth of an evaluation, and windows_flash nothing.
# That one is for GPUs, where the library's loop waits for the device in every layer and launches
# some 9,000 kernels for an image of a million pixels in the 7B tower (counted, not measured).


def speed_up_vision_tower(model):
    """Make the vision tower call the two functions below."""
    model.set_attn_implementation({"vision_config": "windows_flash"})
    patch_embed = model.model.visual.patch_embed
    patch_embed.forward = partial(embed_patches, patch_embed.proj)


def embed_patches(conv, patches):
    """Return the patch embedding, (N, C) -> (N, D). It is a convolution whose stride is its kernel,
    hence a matrix product, which is several times faster on a CPU."""
    return F.linear(patches.to(conv.weight.dtype), conv.weight.flatten(1), conv.bias)


# Planning waits for the GPU (.tolist()), so it is done once per forward pass: the library hands
# the same `borders` tensor to every layer, and lru_cache compares tensors by identity. maxsize=2:
# a pass has at most two such tensors, the borders of windows and those of whole images.
@functools.lru_cache(maxsize=2)
def plan_windows(borders):
    """Group attention windows by their length. borders (W + 1,): window i is patches borders[i] to
    borders[i + 1]. Return [(length, indices of the patches in windows of that length)] and the
    inverse permutation (S,), which puts patches that are in the order of the groups back."""
    window_lengths = borders.diff()                                     # (W,)
    window_groups = []
    for length in window_lengths.unique().tolist():
        starts = borders[:-1][window_lengths == length]                 # (windows,)
        offsets = torch.arange(length, device=starts.device)
        window_groups.append((length, (starts[:, None] + offsets).flatten()))  # (windows * length,)
    return window_groups, torch.cat([indices for _, indices in window_groups]).argsort()


def windows_flash(module, query, key, value, attention_mask, scaling=None, cu_seq_lens_q=None,
                  **kwargs):
    """Compute vision attention, one batched call for all windows of one length. query, key, value:
    (1, H, S, D). Return ((1, S, H, D), None).

    The library calls the attention once per window, in a Python loop, unless the implementation's
    name contains "flash"; then it passes the windows' borders, cu_seq_lens_q. Hence the name."""
    window_groups, inverse_permutation = plan_windows(cu_seq_lens_q)
    outputs = []
    for length, indices in window_groups:
        q, k, v = (tensor[0][:, indices].unflatten(1, (-1, length)).transpose(0, 1)
                   for tensor in (query, key, value))                   # (windows, H, length, D)
        output = F.scaled_dot_product_attention(q, k, v, scale=scaling)
        outputs.append(output.transpose(1, 2).flatten(0, 1))            # (windows * length, H, D)
    return torch.cat(outputs)[inverse_permutation].unsqueeze(0), None


AttentionInterface.register("windows_flash", windows_flash)

# ---- Only for SIGTERM and for restarts by torchrun ----------------------------------------------


class StopSignal:
    """Note SIGTERM and Ctrl-C instead of dying of them. A batch system sends SIGTERM before it ends
    a job, and torchrun when another worker has died. A second Ctrl-C ends the run at once."""

    def __init__(self, out):
        self.out = out
        self.number = 0         # of the signal that was received
        signal.signal(signal.SIGTERM, self.receive)
        # A shell makes what it starts in the background ignore Ctrl-C. So it stays.
        if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
            signal.signal(signal.SIGINT, self.receive)

    def receive(self, number, frame):
        if number == signal.SIGINT and self.number == signal.SIGINT:
            raise KeyboardInterrupt(run_folder.what_is_saved(self.out))
        self.number = number
        if number == signal.SIGINT and get_rank() == 0:
            # Not print, which may be what the signal has interrupted.
            os.write(2, b"\nCtrl-C: ends after this step, and saves it (again Ctrl-C: at once)\n")

    def received_by_any_rank(self, device):
        """Return the number of the signal that a rank has received, 0 if none has. All ranks ask at
        the end of a step, so all stop at the same one: they save and exit. A rank whose peers have
        died never gets here: its collectives fail."""
        return int(all_reduce([self.number], device, dist.ReduceOp.MAX)[0])


def exit_code(stop_signal):
    """Return the exit code of a run that a signal has stopped, that of a shell: 143 for SIGTERM,
    130 for Ctrl-C. So `python sft.py && python rl.py` ends here. But if torchrun has restarts left
    (--max_restarts) the code is 0: with any other it would start the run again."""
    num_restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    max_restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    return 128 + stop_signal if num_restarts >= max_restarts else 0


def agree_on_attempt(store, rank, num_ranks):
    """Return the number of this attempt to run, 1 for the first, the same on all ranks.

    After a crash torchrun --max_restarts starts new workers on the same store, which still holds
    what the dead ones wrote. The agents of several nodes may have counted different numbers of
    restarts. So rank 0 counts, and makes sure that everybody who is alive has its number. Keys:
        hello/RANK = NAME         another rank: a new random name, so that no old answer fits it
        answer/NAME = ATTEMPT     rank 0: to every name that it finds, perhaps a dead worker's
        thanks/ATTEMPT/RANK       the other rank: no dead worker could know this ATTEMPT
    Rank 0 returns when all ranks have thanked."""
    # Any other rank: introduce yourself, wait for the number.
    if rank > 0:
        name = uuid.uuid4().hex
        store.set(f"hello/{rank}", name)
        attempt = int(store.get(f"answer/{name}"))      # waits; nobody else has this name
        store.set(f"thanks/{attempt}/{rank}", "")
        return attempt
    # Rank 0: count, and answer until nobody is missing.
    attempt = store.add("attempts", 1)
    missing_ranks = set(range(1, num_ranks))
    deadline = time.time() + START_TIMEOUT.total_seconds()
    while missing_ranks and time.time() < deadline:
        for other_rank in list(missing_ranks):
            if store.check([f"hello/{other_rank}"]):
                name = store.get(f"hello/{other_rank}").decode()
                store.set(f"answer/{name}", str(attempt))
            if store.check([f"thanks/{attempt}/{other_rank}"]):
                missing_ranks.remove(other_rank)
        time.sleep(0.01)
    return attempt


if __name__ == "__main__":
    terminal.run(main)
