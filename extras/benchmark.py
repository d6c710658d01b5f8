"""Compare this code with what a user would write with the library, on the same model, weights,
questions and tokens.

Each case alternates ours and the peer in one process. It prints the median time of both and the
median of the pairwise ratios (peer / ours: above 1 we are faster). Nothing is asserted, because
timings depend on the machine.

    rollout     groups of conversations against a loop around `generate` on the whole conversation,
                batched over all
    drafts      the same with drafts and without, and against `generate` with a static cache; and
                drafts on a policy that writes at random, where they can only cost
    cached      the same against `generate` with its cache carried over turns, one conversation at
                a time
    prompt      what could be saved at most if a group read its prompt's keys and values only once
    sft         one optimizer step against a padded batch with `labels`, torch's AdamW (and
                DistributedDataParallel)
    grpo        one GRPO update against full logits over a padded batch, all conversations in it
    images      seconds of an update in which the model waits for images of two megapixels, as rl.py
                prepares them, against one conversation after the other on the main thread
    ddp         our data parallel against torch's around the same forward pass and update (under
                torchrun)
    fsdp        our sharded optimizer against torch's fully_shard: time and memory (under torchrun)
    rate        the update's FLOP/s next to the machine's own on matrices of the model's sizes
    growth      cost of our rollouts as turns, conversations and pixels grow
    paper       FLOPs, bytes and seconds of one RL step of Qwen2.5-VL-7B on 8 H100, counted and not
                run
    step        seconds of that step for the slowest GPU, with few slots and many, with graphs and
                without; passes and waiting are simulated
    large       the same for one question on one GPU, run: a model of that size with random weights
                whose turns are scripted

An engine that plays the same conversations again would draft all of them correctly. So its n-grams
are empty at the start of every timed run ("cold", as in a step of RL), or come from other samples
of these questions ("warm").

Both sides of `rollout` and `cached` write the same tokens: ours are sampled, and the peer's
sampling is forced to them.

Commands:
    1 CPU, 1 GPU     python extras/benchmark.py          (checkpoints/sft, data/train.jsonl)
    one case         python extras/benchmark.py rollout --groups 4 --repeats 1
    1 GPU of 80 GB   python extras/benchmark.py large
    2 processes      torchrun --nproc_per_node=2 extras/benchmark.py ddp fsdp sft grpo
"""

import argparse
import collections
import contextlib
import copy
import heapq
import itertools
import json
import math
import resource
import statistics
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.flop_counter import FlopCounterMode
from transformers import LogitsProcessor

import root  # noqa: F401
import build_data
import evaluate
import rl
import sft
import tools
from extras import lora, terminal
from extras.images import check_images
from extras.plan import GPU_BANDWIDTH, GPU_FLOPS, SMALL_KERNELS
from support.memory import LiveBytes
from support.models import wide

# six turns, as in training
LIMITS = evaluate.Limits(max_turns=6, max_images=6)


# ---- Timing -------------------------------------------------------------------------------------


def say(text):
    """Print on rank 0."""
    if sft.get_rank() == 0:
        print(text, flush=True)


def clock(function):
    """Return the seconds that a call takes, until the device has finished."""
    start_time = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start_time


def alternate(title, ours, peer, repeats):
    """Time both in turn, after one warm-up each. Print both medians and the median of the pairwise
    ratios. With one repeat the warm-up is counted, too."""
    times = []
    for repeat in range(repeats + 1):
        pair = []
        for function in (ours, peer):
            sft.barrier()
            pair.append(clock(function))
        if repeat > 0 or repeats == 1:
            times.append(pair)
    our_median = statistics.median(our_time for our_time, _ in times)
    peer_median = statistics.median(peer_time for _, peer_time in times)
    ratio = statistics.median(peer_time / our_time for our_time, peer_time in times)
    say(f"{title:60} ours {our_median:8.3f} s   peer {peer_median:8.3f} s   ratio {ratio:6.2f}")


def alternate_all(title, sides, repeats):
    """Time all of {name: function} in turn, after one warm-up each. Print the median time of each
    and the median of its ratios to the first."""
    rounds = []
    for _ in range(repeats + 1):
        rounds.append([clock(function) for function in sides.values()])
    rounds = rounds[1:]
    for column, name in enumerate(sides):
        times = [one_round[column] for one_round in rounds]
        ratio = statistics.median(one_round[column] / one_round[0] for one_round in rounds)
        say(f"{title:44} {name:20} {statistics.median(times):8.3f} s   ratio {ratio:6.2f}")


# ---- Data and models ----------------------------------------------------------------------------


def load_policy(args, process, library=False):
    """Return the policy of --model. library: with transformers' own attention, in the text and in
    the vision tower."""
    policy = sft.load_policy(args.model, process.device, hint="bash run.sh")
    if library:
        policy.model.set_attn_implementation("sdpa")
    return policy


def read_questions(args, process):
    """Return this process's share of the first --groups questions."""
    rows = tools.read_jsonl(args.data, tools.check_question, "python build_data.py")
    check_images(args.data, rows[:args.groups])
    return rows[:args.groups][process.rank::process.world_size]


def read_trajectories(args, process):
    """Return this process's share of a batch of trajectories."""
    rows = tools.read_jsonl(args.trajectories, tools.check_trajectory,
                            "python collect_coldstart.py")
    check_images(args.trajectories, rows[:args.batch_size], replays_zooms=True)
    return rows[:args.batch_size][process.rank::process.world_size]


def encode_rows(policy, rows, args):
    """Return the Sequences of trajectories."""
    return [sft.encode(policy, row, args.trajectories.parent) for row in rows]


def num_sampled_tokens(rollouts):
    """Return how many tokens the policy wrote in these conversations."""
    return sum(sum(rollout.loss_mask) for rollout in rollouts)


# ---- The peer's rollouts ------------------------------------------------------------------------


class ForceTokens(LogitsProcessor):
    """Make `generate` write given tokens: the next token of row i is scripts[i][position]."""

    def __init__(self, scripts, start, device):
        longest = max(len(script) for script in scripts)
        padded = [script + [script[-1]] * (longest - len(script)) for script in scripts]
        self.start = start
        self.scripts = torch.tensor(padded, device=device)                      # (B, T)

    def __call__(self, input_ids, scores):
        position = min(input_ids.shape[1] - self.start, self.scripts.shape[1] - 1)
        token_ids = self.scripts[:, position:position + 1]                      # (B, 1)
        is_other = torch.ones_like(scores, dtype=torch.bool).scatter(1, token_ids, False)
        return scores.masked_fill(is_other, -1e30)


def turn_spans(rollout):
    """Return [(start, end)] of the policy's turns in a rollout's token_ids."""
    edges = []
    for index in range(1, len(rollout.token_ids)):
        if rollout.loss_mask[index] != rollout.loss_mask[index - 1]:
            edges.append(index)
    edges.append(len(rollout.token_ids))
    return list(zip(edges[0::2], edges[1::2]))


def images_before(policy, rollout, end):
    """Return the images among the first `end` tokens of a rollout."""
    num_left = sum(token_id == policy.image_token_id for token_id in rollout.token_ids[:end])
    images = []
    for image in rollout.images:
        if num_left > 0:
            _, grid = image
            images.append(image)
            num_left -= policy.num_image_tokens(grid)
    return images


def image_inputs(images, device):
    """Return the model's arguments for these images, {} if there are none."""
    if not images:
        return {}
    return {"pixel_values": torch.cat([patches for patches, _ in images]).to(device),
            "image_grid_thw": torch.tensor([grid for _, grid in images], device=device)}


def generate(policy, prompts, scripts, images, **options):
    """Call model.generate on left-padded conversations, forced to write `scripts`. prompts: token
    ids; images: those of all conversations."""
    longest = max(len(prompt) for prompt in prompts)
    pad_id = policy.tokenizer.pad_token_id
    padded = [[pad_id] * (longest - len(prompt)) + prompt for prompt in prompts]
    attention = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    input_ids = torch.tensor(padded, device=policy.device)                      # (B, T)
    return policy.model.generate(
        input_ids=input_ids,
        attention_mask=torch.tensor(attention, device=policy.device),           # (B, T)
        mm_token_type_ids=(input_ids == policy.image_token_id).long(), do_sample=True,
        max_new_tokens=max(len(script) for script in scripts),
        logits_processor=[ForceTokens(scripts, longest, policy.device)],
        **image_inputs(images, policy.device), **options)


@torch.inference_mode()
def play_with_generate(policy, rollouts, **options):
    """Play as a user would: for every turn, call `generate` on the whole conversations of all who
    still play."""
    num_turns = max(len(rollout.turns) for rollout in rollouts)
    for turn_index in range(num_turns):
        # 1. the conversations that have this turn, up to its beginning
        prompts = []
        scripts = []
        images = []
        for rollout in rollouts:
            if len(rollout.turns) > turn_index:
                start, end = turn_spans(rollout)[turn_index]
                prompts.append(rollout.token_ids[:start])
                scripts.append(rollout.token_ids[start:end])
                images += images_before(policy, rollout, start)
        # 2. write it, and parse it as an agent has to
        output = generate(policy, prompts, scripts, images, **options)          # (B, T)
        longest = max(len(prompt) for prompt in prompts)
        texts = policy.tokenizer.batch_decode(output[:, longest:])
        turns = [tools.parse_turn(text) for text in texts]
        assert len(turns) == len(prompts)


@torch.inference_mode()
def play_with_cache(policy, rollouts, check=False):
    """Play with `generate` and its cache carried over turns, one conversation at a time.

    check: compare the logits of every turn with those of the whole conversation, greedily. Position
    ids have to be given, or the peer is wrong without an error.
    """
    for rollout in rollouts:
        cache = None
        num_images = 0
        positions, _ = sft.mrope_positions(
            rollout.token_ids, [grid for _, grid in rollout.images], policy.image_token_id,
            policy.merge_size)                                                  # (3, T)
        for start, end in turn_spans(rollout):
            # 1. write a turn; of the images, the model gets those that are not in the cache yet
            images = images_before(policy, rollout, start)
            text_positions = torch.arange(start)[None]                          # (1, T)
            position_ids = torch.cat([text_positions, positions[:, :start]])[:, None]   # (4, 1, T)
            input_ids = torch.tensor([rollout.token_ids[:start]])
            force = ForceTokens([rollout.token_ids[start:end]], start, policy.device)
            output = policy.model.generate(
                input_ids=input_ids, attention_mask=torch.ones_like(input_ids),
                position_ids=position_ids, past_key_values=cache, do_sample=not check,
                max_new_tokens=end - start, logits_processor=[force],
                return_dict_in_generate=True, output_logits=check,
                **image_inputs(images[num_images:], policy.device))
            cache = output.past_key_values
            num_images = len(images)
            # 2. compare with a forward pass over the whole conversation
            if check:
                whole = policy.model.model(
                    input_ids=torch.tensor([rollout.token_ids[:end - 1]]),
                    position_ids=positions[:, None, :end - 1], use_cache=False,
                    **image_inputs(images, policy.device))
                logits = policy.model.lm_head(whole.last_hidden_state[0, start - 1:])   # (n, V)
                gap = (torch.cat(output.logits) - logits).abs().max().item()
                assert gap < 1e-3, f"the peer's cache is wrong: logits differ by {gap}"


# ---- Cases: rollouts ----------------------------------------------------------------------------


def play_cold(engine, rows, args):
    """Play with an engine whose n-grams are empty."""
    engine.begin_step(0)
    return engine.run(rows, args.group_size, args.data.parent)


def play_warm(engine, rows, args, proposer):
    """Play with an engine that has these n-grams."""
    engine.begin_step(0)
    engine.proposer = copy.deepcopy(proposer)
    return engine.run(rows, args.group_size, args.data.parent)


def case_rollout(args, process):
    """Compare our rollouts with a loop around `generate` that plays the same conversations."""
    ours = load_policy(args, process)
    peer = load_policy(args, process, library=True)
    rows = read_questions(args, process)
    engine = evaluate.Engine(ours, LIMITS)
    rollouts = [rollout.with_images(peer) for rollout in play_cold(engine, rows, args)]
    alternate(f"rollout: {len(rows)} x {args.group_size} a process, 6 turns, "
              f"{num_sampled_tokens(rollouts)} tokens",
              lambda: play_cold(engine, rows, args), lambda: play_with_generate(peer, rollouts),
              args.repeats)


def case_drafts(args, process):
    """Compare rollouts with drafts, without drafts, and with `generate`. Then compare them for a
    policy that writes at random."""
    ours = load_policy(args, process)
    peer = load_policy(args, process, library=True)
    rows = read_questions(args, process)
    without_drafts = evaluate.Engine(ours, LIMITS, num_speculative_tokens=0)
    with_drafts = evaluate.Engine(ours, LIMITS)

    # 1. cold and warm n-grams, no drafts, and the peer
    other_samples = evaluate.Engine(ours, LIMITS, seed=1)
    other_samples.run(rows, args.group_size, args.data.parent)
    rollouts = [rollout.with_images(peer) for rollout in play_cold(without_drafts, rows, args)]
    sides = {"drafts, cold": lambda: play_cold(with_drafts, rows, args),
             "drafts, warm": lambda: play_warm(with_drafts, rows, args, other_samples.proposer),
             "without": lambda: play_cold(without_drafts, rows, args),
             "generate": lambda: play_with_generate(peer, rollouts)}
    static = {"cache_implementation": "static", "disable_compile": True}
    try:
        play_with_generate(peer, rollouts[:2], **static)
        sides["generate, static"] = lambda: play_with_generate(peer, rollouts, **static)
    except Exception as error:  # depends on the library's version
        say("drafts: generate with a static cache does not run here: "
            f"{tools.first_line(error)[:80]}")
    title = f"drafts: {len(rows)} x {args.group_size}, {num_sampled_tokens(rollouts)} tokens"
    alternate_all(title, sides, args.repeats)
    for name in ("drafts, cold", "drafts, warm"):
        sides[name]()
        statistics_of_drafts = evaluate.draft_statistics(with_drafts.counts)
        say("{}: {mean_acceptance_length:.2f} tokens per forward pass, {acceptance_rate:.0%} of "
            "draft tokens accepted".format(name, **statistics_of_drafts))

    # 2. a policy whose logits are all about 0: it writes at random
    with torch.no_grad():
        ours.model.model.language_model.norm.weight.mul_(0.01)
    sides = {"drafts, cold": lambda: play_cold(with_drafts, rows[:4], args),
             "without": lambda: play_cold(without_drafts, rows[:4], args)}
    alternate_all("drafts: a policy that writes at random", sides, args.repeats)
    say("drafts, at random: {mean_acceptance_length:.2f} tokens per forward pass".format(
        **evaluate.draft_statistics(with_drafts.counts)))


def case_cached(args, process):
    """Compare our rollouts with `generate` and a cache that is carried over turns.

    The peer plays two conversations of each group, since its time is proportional to their number.
    Ours plays all, and is charged for these two.
    """
    # 1. the same conversations for both; the peer's cache must be right
    ours = load_policy(args, process)
    peer = load_policy(args, process, library=True)
    rows = read_questions(args, process)
    engine = evaluate.Engine(ours, LIMITS)
    all_rollouts = play_cold(engine, rows, args)
    some = [rollout.with_images(peer) for rollout in all_rollouts[::max(1, args.group_size // 2)]]
    play_with_cache(peer, some[:4], check=True)
    # 2. the times
    share = num_sampled_tokens(some) / num_sampled_tokens(all_rollouts)
    our_time = share * clock(lambda: play_cold(engine, rows, args))
    peer_time = clock(lambda: play_with_cache(peer, some))
    title = f"cached: {len(some)} of {len(all_rollouts)} conversations (ours: their share)"
    say(f"{title:60} ours {our_time:8.3f} s   peer {peer_time:8.3f} s   "
        f"ratio {peer_time / our_time:6.2f}")


class AttentionCall(NamedTuple):
    """One forward pass's attention, the same in all layers."""
    plan: evaluate.CachePlan
    query: torch.Tensor     # (1, H, N, D)
    key_shape: torch.Size   # (num_slots, K, S, D)

    def without_prompts(self, prompt_length):
        """Return the plan without the columns of the prompts, in the spans that are longer."""
        spans = []
        for span in self.plan.spans:
            if span.mask is not None and span.num_columns > prompt_length:
                spans.append(span._replace(num_columns=span.num_columns - prompt_length,
                                           mask=span.mask[..., prompt_length:]))
            else:
                spans.append(span)
        return replace(self.plan, spans=spans)


def record_attention(engine, rows, args):
    """Play, and return the rollouts and the AttentionCalls of all forward passes."""
    calls = []
    attend = evaluate.CachePlan.attend

    def record(plan, query, key, value, scaling):
        if not calls or calls[-1].plan is not plan:     # once for all layers
            calls.append(AttentionCall(plan, query, key.shape))
        return attend(plan, query, key, value, scaling)

    evaluate.CachePlan.attend = record
    try:
        rollouts = play_cold(engine, rows, args)
    finally:
        evaluate.CachePlan.attend = attend
    return rollouts, calls


def case_prompt(args, process):
    """Time what a run would save if a group read its prompt's keys and values only once.

    The attention calls of a run are recorded and made again: as they were, and without the columns
    of the prompts, which all slots with the same question then read in one call. To combine the two
    results would cost more; that is not counted.
    """
    # 1. record a run; only the shapes of keys and values matter
    policy = load_policy(args, process)
    rows = read_questions(args, process)
    engine = evaluate.Engine(policy, LIMITS)
    rollouts, calls = record_attention(engine, rows, args)
    prompt_length = min(rollout.loss_mask.index(True) for rollout in rollouts) - 1
    longest = max((call.key_shape for call in calls), key=lambda shape: shape[2])
    keys = torch.randn(longest)
    prompt_keys = keys[:1, :, :prompt_length]                                   # (1, K, S, D)

    # 2. both ways to attend, for one layer
    def as_it_was():
        """Make all calls as they were."""
        for call in calls:
            call.plan.attend(call.query, keys, keys, 1.0)

    def prompts_once():
        """Make all calls without the prompts, and one call for the prompt of every question."""
        for call in calls:
            call.without_prompts(prompt_length).attend(call.query, keys, keys, 1.0)
            num_slots, num_key_heads = call.key_shape[:2]
            num_questions = max(1, num_slots // args.group_size)
            for query in call.query.chunk(num_questions, dim=2):                # (1, H, n, D)
                query = query.unflatten(1, (num_key_heads, -1))             # (1, K, H / K, n, D)
                torch.nn.functional.scaled_dot_product_attention(
                    query.flatten(2, 3), prompt_keys, prompt_keys)

    # 3. the times, for all layers
    num_layers = policy.model.config.text_config.num_hidden_layers
    sides = {"whole run": lambda: play_cold(engine, rows, args),
             f"attention x {num_layers}": lambda: [as_it_was() for _ in range(num_layers)],
             "prompts once": lambda: [prompts_once() for _ in range(num_layers)]}
    alternate_all(f"prompt: {prompt_length} tokens, 6 turns", sides, args.repeats)


# ---- Cases: updates -----------------------------------------------------------------------------


def padded_batch(policy, sequences):
    """Return a right-padded batch as a data collator would make it: with an attention mask and
    labels, without positions."""
    def pad(lists, value):
        tensors = [torch.tensor(items) for items in lists]
        return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)

    input_ids = pad([sequence.token_ids for sequence in sequences],
                    policy.tokenizer.pad_token_id)                              # (B, T)
    loss_mask = pad([sequence.loss_mask for sequence in sequences], False)      # (B, T)
    attention_mask = pad([[1] * len(sequence.token_ids) for sequence in sequences], 0)
    packed = sft.collate(policy, sequences)
    batch = {"input_ids": input_ids, "attention_mask": attention_mask,
             "mm_token_type_ids": (input_ids == policy.image_token_id).long(),
             "labels": input_ids.masked_fill(~loss_mask, -100)}
    for name in ("pixel_values", "image_grid_thw"):
        if name in packed:
            batch[name] = packed[name]
    return {name: tensor.to(policy.device) for name, tensor in batch.items()}


def training_settings(args, **changes):
    """Return the flags that sft.train_step reads."""
    settings = {"micro_batch_tokens": args.micro_batch_tokens, "max_grad_norm": 1.0,
                "aggregation": "token", **changes}
    return argparse.Namespace(**settings)


def sft_step(policy, optimizer, sequences, settings):
    """Return a function that takes one optimizer step of sft.py on these sequences."""
    return partial(sft.train_step, policy, optimizer, sequences, 1e-5, settings)


def our_trainer(policy, weight_decay=0.0, shard=False):
    """Return our optimizer for all parameters of a policy."""
    optimizer = sft.Optimizer(sft.trainable_parameters(policy, freeze_vision=False), 1e-5,
                              weight_decay, shard=shard)
    policy.model.train()
    return optimizer


def peer_trainer(args, process):
    """Return (policy, the module to call, optimizer) with torch's own AdamW and, on several
    processes, DistributedDataParallel."""
    policy = load_policy(args, process, library=True)
    policy.model.train()
    module = policy.model
    if process.world_size > 1:
        module = torch.nn.parallel.DistributedDataParallel(policy.model)
    return policy, module, torch.optim.AdamW(policy.model.parameters(), lr=1e-5)


def peer_step(model, optimizer):
    """Take the peer's optimizer step."""
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def case_sft(args, process):
    """Compare one optimizer step of sft.py with one on a padded batch with `labels`."""
    policy = load_policy(args, process)
    peer, module, peer_optimizer = peer_trainer(args, process)
    sequences = encode_rows(policy, read_trajectories(args, process), args)
    optimizer = our_trainer(policy, weight_decay=0.01)
    our_step = sft_step(policy, optimizer, sequences, training_settings(args))

    def step_of_peer():
        """Let the model itself compute the loss of all conversations at once."""
        module(**padded_batch(peer, sequences), use_cache=False).loss.backward()
        peer_step(peer.model, peer_optimizer)

    num_tokens = sum(len(sequence.token_ids) for sequence in sequences)
    alternate(f"sft: {len(sequences)} conversations a process, {num_tokens} tokens",
              our_step, step_of_peer, args.repeats)


def case_rate(args, process):
    """Print the FLOP/s of an update next to the machine's own on matrices of the model's sizes."""
    policy = load_policy(args, process)
    sequences = encode_rows(policy, read_trajectories(args, process), args)
    optimizer = our_trainer(policy, weight_decay=0.01)
    our_step = sft_step(policy, optimizer, sequences, training_settings(args))

    # 1. an update
    with FlopCounterMode(display=False) as counter:
        our_step()
    flops = counter.get_total_flops()
    seconds = statistics.median(clock(our_step) for _ in range(args.repeats + 1))

    # 2. plain products with the model's matrices
    product_flops = 0
    product_seconds = 0.0
    for module in policy.model.modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        weight = module.weight                                                  # (out, in)
        x = torch.randn(args.micro_batch_tokens, weight.shape[1], dtype=weight.dtype,
                        device=weight.device)
        with torch.no_grad():
            product_seconds += min(clock(lambda: x @ weight.T) for _ in range(10))
        product_flops += 2 * args.micro_batch_tokens * weight.numel()

    # 3. the rates
    rate = flops / seconds / 1e9
    product_rate = product_flops / product_seconds / 1e9
    num_tokens = sum(len(sequence.token_ids) for sequence in sequences)
    say(f"rate: an update of {num_tokens} tokens: {flops / 1e9:.0f} GFLOP in {seconds:.2f} s = "
        f"{rate:.0f} GFLOP/s, {rate / product_rate:.0%} of the {product_rate:.0f} GFLOP/s of plain "
        f"products ({args.micro_batch_tokens}, in) x (in, out) with the model's own matrices")


class Loss(torch.nn.Module):
    """The loss of an update as a module, which is what DistributedDataParallel needs."""

    def __init__(self, policy):
        super().__init__()
        self.model = policy.model
        self.policy = [policy]      # in a list: it is not a submodule

    def forward(self, batch):
        return -sft.token_logprobs(self.policy[0], batch).sum()


def case_ddp(args, process):
    """Compare our data parallel with torch's.

    Only the data parallel differs: torch's DistributedDataParallel is around the same forward pass,
    and the peer has torch's AdamW.
    """
    if process.world_size == 1:
        say("ddp: needs torchrun --nproc_per_node=2")
        return
    # 1. both sides start from the same weights and have the same conversations
    ours = load_policy(args, process)
    peer = load_policy(args, process)
    sequences = encode_rows(ours, read_trajectories(args, process), args)
    optimizer = our_trainer(ours)
    our_step = sft_step(ours, optimizer, sequences, training_settings(args))
    wrapped = torch.nn.parallel.DistributedDataParallel(Loss(peer))
    adam = torch.optim.AdamW(sft.trainable_parameters(peer, freeze_vision=False), 1e-5, fused=True)

    def step_of_peer():
        """Take a step on the same micro-batches. Gradients are reduced in the last one's backward
        pass."""
        micro_batches = list(sft.micro_batches(sequences, args.micro_batch_tokens))
        for index, micro_batch in enumerate(micro_batches):
            is_last = index + 1 == len(micro_batches)
            with contextlib.nullcontext() if is_last else wrapped.no_sync():
                wrapped(sft.collate(peer, micro_batch)).backward()
        peer_step(wrapped, adam)

    # 2. the times, and what is sent
    alternate(f"ddp: {len(sequences)} conversations a process, {process.world_size} processes",
              our_step, step_of_peer, args.repeats)
    measure_traffic(ours, optimizer, wrapped, peer, sequences[:1])


def measure_traffic(policy, optimizer, wrapped, peer, sequences):
    """Print the bytes of gradients that a process hands to all-reduce in one step, ours and torch
    DDP's."""
    num_bytes = {"ours": 0, "peer": 0}
    all_reduce = torch.distributed.all_reduce

    # 1. both sides' all-reduce, with a count
    def counted(tensor, *args, **kwargs):
        num_bytes["ours"] += tensor.numel() * tensor.element_size()
        return all_reduce(tensor, *args, **kwargs)

    def hook(state, bucket):
        buffer = bucket.buffer()
        num_bytes["peer"] += buffer.numel() * buffer.element_size()
        return all_reduce(buffer, async_op=True).get_future().then(lambda future: future.value()[0])

    # 2. one backward pass each
    wrapped.register_comm_hook(None, hook)
    wrapped(sft.collate(peer, sequences)).backward()
    torch.distributed.all_reduce = counted
    optimizer.backward([sft.collate(policy, sequences)], Loss(policy))
    torch.distributed.all_reduce = all_reduce
    say("gradient bytes handed to all-reduce per step: "
        f"ours {num_bytes['ours']:,}   peer {num_bytes['peer']:,}")


def our_sharded_step(args, process):
    """Return a function that takes one step with our sharded optimizer."""
    policy = sft.load_policy(args.model, "cpu", "bfloat16")
    sequences = encode_rows(policy, read_trajectories(args, process), args)
    optimizer = our_trainer(policy, shard=True)
    settings = training_settings(args, micro_batch_tokens=10**6)
    return sft_step(policy, optimizer, sequences, settings)


def fully_sharded_step(args, process):
    """Return a function that takes one step with torch's fully_shard."""
    policy = sft.load_policy(args.model, "cpu", "float32")
    sequences = encode_rows(policy, read_trajectories(args, process), args)
    options = {"reshard_after_forward": False,
               "mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32)}
    policy.model.requires_grad_(True)
    model = policy.model.model
    for layer in [*model.language_model.layers, *model.visual.blocks]:
        fully_shard(layer, **options)
    module = Loss(policy)
    fully_shard(module, **options)
    adam = torch.optim.AdamW(module.parameters(), 1e-5, foreach=True)

    def step():
        module(sft.collate(policy, sequences)).backward()
        peer_step(module, adam)
    return step


def case_fsdp(args, process):
    """Compare our sharded optimizer with torch's fully_shard(reshard_after_forward=False), with
    bfloat16 weights and float32 reduction: time, and the peak of living tensor storages in a
    step."""
    if process.world_size == 1:
        say("fsdp: needs torchrun --nproc_per_node=2")
        return
    # 1. memory: the second step already has the optimizer's state
    steps = []
    peaks = []
    for make_step in (our_sharded_step, fully_sharded_step):
        with LiveBytes() as memory:
            step = make_step(args, process)
            step()
            step()
        steps.append(step)
        peaks.append(memory.peak)
    # 2. time
    num_rows = len(read_trajectories(args, process))
    alternate(f"fsdp: {num_rows} conversations a process, {process.world_size} processes",
              steps[0], steps[1], args.repeats)
    say(f"fsdp: peak of living storages: ours {peaks[0] / 2**20:.1f} MB   "
        f"peer {peaks[1] / 2**20:.1f} MB")


def assign_advantages(rollouts, settings, group_size):
    """Set the advantage of every rollout. Return advantages and loss mask, (B,) each."""
    num_groups = len(rollouts) // group_size
    rewards = torch.tensor([rollout.reward for rollout in rollouts], dtype=torch.float64)
    kept = torch.tensor([rl.is_kept(rollout, settings) for rollout in rollouts])
    advantages = rl.group_advantages(rewards.view(num_groups, group_size),
                                     kept.view(num_groups, group_size), settings.baseline).flatten()
    for rollout, advantage in zip(rollouts, advantages.tolist()):
        rollout.advantage = advantage
    return advantages, kept


def case_grpo(args, process):
    """Compare one GRPO update with a peer's on the same groups. The peer runs all conversations
    through the model, with logits at every position."""
    # 1. rollouts and their advantages
    policy = load_policy(args, process)
    peer, module, peer_optimizer = peer_trainer(args, process)
    rows = read_questions(args, process)
    rollouts = play_cold(evaluate.Engine(policy, LIMITS), rows, args)
    settings = argparse.Namespace(
        overturn_mask=True, mask_void=False, baseline="group", divisor="kept",
        aggregation="response", max_new_tokens=LIMITS.max_new_tokens, max_turns=LIMITS.max_turns,
        micro_batch_tokens=args.micro_batch_tokens, clip_low=0.2, clip_high=0.3, max_grad_norm=1.0,
        prompts_per_step=len(rows))
    advantages, kept = assign_advantages(rollouts, settings, args.group_size)
    denominator = max(1, int(kept.sum()))
    optimizer = our_trainer(policy)

    # 2. both updates
    def our_step():
        rl.update_policy(policy, optimizer, rollouts, settings, 1e-5)

    def step_of_peer():
        """Take a step over padded micro-batches of --micro_batch_size conversations."""
        for first in range(0, len(rollouts), args.micro_batch_size):
            chosen = slice(first, first + args.micro_batch_size)
            batch = padded_batch(peer, [rollout.with_images(peer) for rollout in rollouts[chosen]])
            labels = batch.pop("labels")[:, 1:]                                 # (B, T - 1)
            logits = module(**batch, use_cache=False).logits[:, :-1]            # (B, T - 1, V)
            token_ids = labels.clamp(min=0)[:, :, None]                         # (B, T - 1, 1)
            logprobs = logits.log_softmax(-1).gather(-1, token_ids)[:, :, 0]    # (B, T - 1)
            recorded = []
            for rollout in rollouts[chosen]:
                recorded += rollout.logprobs
            old_logprobs = torch.zeros_like(logprobs).masked_scatter(
                labels >= 0, logprobs.new_tensor(recorded))
            rl.grpo_loss(logprobs, old_logprobs, advantages[chosen].to(logprobs), labels >= 0,
                         kept[chosen].to(policy.device), denominator=denominator).backward()
        peer_step(peer.model, peer_optimizer)

    # 3. the times
    num_with_signal = int((advantages != 0).sum())
    alternate(f"grpo: {len(rollouts)} conversations, {num_with_signal} with signal",
              our_step, step_of_peer, args.repeats)


def draw_noise(path, size):
    """Write a JPEG of noise, which takes as long to read as a photo."""
    Image.effect_noise(size, 60).convert("RGB").save(path, quality=95)


def time_updates(policy, rollouts, batches):
    """Run forward and backward of one rollout per batch. Return (seconds, seconds in which the
    model waits for a batch, seconds until the first one)."""
    waited = []
    start_time = time.perf_counter()
    for rollout in rollouts:
        before = time.perf_counter()
        batch = next(batches)
        waited.append(time.perf_counter() - before)
        rl.compute_logprobs(policy, [rollout], batch)[0].sum().backward()
    seconds = time.perf_counter() - start_time
    policy.model.zero_grad()
    return seconds, sum(waited), waited[0]      # nothing can hide the first


def case_images(args, process, max_pixels=2_000_000):
    """Compare how long an update waits for images: one group whose image, and first crop, have two
    megapixels, a conversation per micro-batch. The peer opens the image once, and preprocesses it
    again for every conversation."""
    policy = load_policy(args, process)
    policy.max_pixels = max_pixels
    call = json.dumps({"bbox_2d": [0.1, 0.1, 0.8, 0.8], "source": "original_image"})
    row = {"id": "0", "image": "noise.jpg", "question": "Which colour?", "answer": "red"}
    with tempfile.TemporaryDirectory() as folder:
        # 1. a conversation with one zoom, --group_size times
        draw_noise(Path(folder) / "noise.jpg", (2000, 1500))
        image = tools.open_image(Path(folder) / "noise.jpg")
        zoom_turn = tools.take_turn([image], f"<think></think><grounding>{call}</grounding>",
                                    1, 6, 6).turn
        turns = [zoom_turn, {"text": "<answer>red</answer>"}]
        sequence = sft.encode(policy, {**row, "turns": turns}, folder)
        rollouts = []
        for _ in range(args.group_size):
            rollouts.append(evaluate.Rollout(
                token_ids=sequence.token_ids, loss_mask=sequence.loss_mask, row=row,
                root=folder, turns=turns, logprobs=[-1.0] * sum(sequence.loss_mask)))

        # 2. both ways to prepare the batches
        def batches_of_peer():
            """Yield the batch of one conversation after the other."""
            for rollout in rollouts:
                views = tools.replay(rollout.to_row(), image)
                yield sft.collate(policy, [replace(rollout,
                                                   images=policy.preprocess_images(views))])

        sides = {"the peer": batches_of_peer(),
                 "ours": sft.prefetch(partial(rl.encode_rollouts, policy),
                                      [[rollout] for rollout in rollouts])}

        # 3. the times
        policy.model.train()
        sft.trainable_parameters(policy, freeze_vision=True)
        for name, batches in sides.items():
            seconds, waited, first = time_updates(policy, rollouts, batches)
            say(f"images: {args.group_size} conversations of {len(sequence.token_ids)} tokens, "
                f"{name}: {seconds:.2f} s, of which the model waits {waited:.2f} s "
                f"({first:.2f} s for the first)")


# ---- Case: growth -------------------------------------------------------------------------------


def measure_growth(policy, rows, args, title, num_rollouts, max_turns, pixels_factor=1):
    """Play num_rollouts conversations of up to max_turns turns, 16 for each question, and print
    time and memory."""
    policy.min_pixels = 6000 * pixels_factor
    policy.max_pixels = 8000 * pixels_factor
    engine = evaluate.Engine(policy, evaluate.Limits(max_turns, max_turns))
    start_time = time.perf_counter()
    rollouts = engine.run(rows[:num_rollouts // 16], 16, args.data.parent)
    seconds = time.perf_counter() - start_time
    num_tokens = num_sampled_tokens(rollouts)
    cache = sum(tensor.nbytes for layer in engine.cache.layers for tensor in layer) / 2**20
    # the process's memory is a high-water mark: hence cases come in rising order
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    say(f"growth: {title:24} {seconds:8.2f} s   {num_tokens:8d} tokens   "
        f"{num_tokens / seconds:8.0f} tokens/s   "
        f"KV cache {cache:6.1f} MB   peak memory of the process {peak:6.0f} MB")


def case_growth(args, process):
    """Print what our rollouts cost as conversations, turns and pixels grow."""
    policy = load_policy(args, process)
    rows = tools.read_jsonl(args.data, tools.check_question, "python build_data.py")
    check_images(args.data, rows)
    measure = partial(measure_growth, policy, rows, args)
    measure("warm-up", 64, 6)
    for num_rollouts in (64, 256, 1024):
        measure(f"{num_rollouts} rollouts", num_rollouts, 6)
    for max_turns in (8, 16, 32):
        measure(f"{max_turns} turns", 256, max_turns)
    for pixels_factor in (1, 2, 4):
        measure(f"{pixels_factor} x pixels", 256, 6, pixels_factor)


# ---- Case: one RL step of Qwen2.5-VL-7B on 8 H100, on paper --------------------------------------


def count_stages(num_gpus, num_prompts, group_size, num_turns, turn_tokens, view_tokens,
                 text_tokens, num_slots):
    """Return {stage: (FLOPs, bytes of memory, bytes over links)} per GPU, and the number of
    parameters; see case_paper."""
    # 1. the model
    L, D, ff, kv, vocab_size = 28, 3584, 18944, 4 * 128, 152064
    L_v, D_v, ff_v, num_full_layers = 32, 1280, 3420, 4
    N = L * (2 * D * D + 2 * D * kv + 3 * D * ff)
    N_head = vocab_size * D
    N_v = L_v * (4 * D_v**2 + 3 * D_v * ff_v) + (4 * D_v) * (4 * D_v + D)
    num_params = N + 2 * N_head + N_v

    def forward(t, c=0):
        return 2 * N * t + 4 * L * D * t * (c + t / 2)

    # 2. one GPU's share of the conversations
    num_rollouts = num_prompts * group_size / num_gpus
    num_prompts = num_prompts / num_gpus
    T = text_tokens + num_turns * (view_tokens + turn_tokens)
    P = 4 * view_tokens
    image_flops = 2 * N_v * P + 4 * D_v * P**2 * num_full_layers
    num_images = num_prompts + num_rollouts * (num_turns - 1)
    num_sampled = num_rollouts * num_turns * turn_tokens
    num_passes = num_sampled / num_slots
    mean_length = T / 2     # while a conversation is played
    observations = sum(forward(view_tokens, text_tokens + turn * (view_tokens + turn_tokens))
                       for turn in range(1, num_turns))

    # 3. the stages
    stages = {
        "rollout: images": (num_images * image_flops, num_images * P * 1176 * 2, 0),
        "rollout: prefill": (
            num_prompts * forward(text_tokens + view_tokens) + num_rollouts * observations,
            num_passes / turn_tokens * 2 * N, 0),
        "rollout: decode": (
            num_sampled * (forward(1, mean_length) + 2 * N_head),
            num_passes * (2 * (N + N_head) + num_slots * 4 * L * kv * mean_length), 0),
        "update: images": (num_rollouts * num_turns * image_flops, 0, 0),
        "update: text": (4 * num_rollouts * forward(T) + 4 * 2 * N_head * num_sampled, 0, 0),
        "gradients and AdamW": (0, num_params * (2 + 2 + 16 + 16) / num_gpus,
                                2 * 2 * num_params * (num_gpus - 1) / num_gpus)}
    return stages, num_params, T


class SimulatedRank:
    """The decoding of one rank in a step of RL, simulated: in short slots first, as Engine.play_all
    does. A pass gives every slot a sampled token. Half of the groups end without signal, and are
    asked again: at once, or in rounds."""

    num_groups = 32
    group_size = 16
    mean_length = 7250          # tokens of a conversation, of which 1,000 are sampled
    tokens_per_pass = 7.25      # so much longer it gets with each, with its prompt and its views
    spread = 0.5                # lengths are log-normal
    max_length = 30_720         # a whole turn of 2,048 would no longer fit
    long_slot_length = 32_768
    resample = 3

    def __init__(self, rng, num_slots, slot_length, asks_at_once):
        self.rng = rng
        self.num_slots = num_slots
        self.slot_length = slot_length
        self.asks_at_once = asks_at_once
        self.waiting = collections.deque()      # (tokens so far, tokens at its end, group, attempt)
        self.set_aside = collections.deque()
        self.next_round = []                    # (group, attempt)
        self.num_left = {}                      # conversations of each group and attempt

    def run(self):
        """Return the passes in short slots, those in long ones, and how many conversations have
        outgrown a short slot."""
        num_long_slots = self.num_slots * self.slot_length // self.long_slot_length
        short_passes, long_passes, num_outgrown = 0, 0, 0
        for group in range(self.num_groups):
            self.ask(group, 0)
        while self.waiting:
            short_passes += self.play(self.waiting, self.num_slots, self.slot_length)
            num_outgrown += len(self.set_aside)
            long_passes += self.play(self.set_aside, num_long_slots, self.long_slot_length)
            for group, attempt in self.next_round:
                self.ask(group, attempt)
            self.next_round.clear()
        return short_passes, long_passes, num_outgrown

    def ask(self, group, attempt):
        """Let the conversations of a group wait for a slot."""
        mean_of_log = math.log(self.mean_length) - self.spread**2 / 2
        for length in self.rng.lognormal(mean_of_log, self.spread, self.group_size):
            self.waiting.append((0, min(length, self.max_length), group, attempt))
        self.num_left[group, attempt] = self.group_size

    def play(self, queue, num_slots, slot_length):
        """Play until the queue and all slots are empty. Return the passes."""
        now = 0
        playing = []        # (pass in which it leaves its slot, ...), as a heap
        while queue or playing:
            # 1. Fill the slots.
            while queue and len(playing) < num_slots:
                start, length, group, attempt = queue.popleft()
                num_passes = (min(length, slot_length) - start) / self.tokens_per_pass
                heapq.heappush(playing, (now + num_passes, length, group, attempt))
            # 2. Go on to the next conversation that leaves its slot.
            now, length, group, attempt = heapq.heappop(playing)
            if length > slot_length:
                self.set_aside.append((slot_length, length, group, attempt))
            else:
                self.end(group, attempt)
        return now

    def end(self, group, attempt):
        """Count a conversation that has ended. After the last one the group may be asked again."""
        self.num_left[group, attempt] -= 1
        has_signal = self.num_left[group, attempt] > 0 or self.rng.random() >= 0.5
        if has_signal or attempt == self.resample:
            return
        if self.asks_at_once:
            self.ask(group, attempt + 1)
        else:
            self.next_round.append((group, attempt + 1))


def update_rounds(rng, balanced, num_gpus=8, num_rollouts=512, mean_tokens=7250, spread=0.5,
                  max_tokens=32768):
    """Return the time of an update in which all ranks wait for the longest micro-batch of each
    round, relative to one without waiting, simulated. balanced: with rl.fill_evenly; otherwise each
    rank fills its micro-batches one after the other."""
    lengths = rng.lognormal(math.log(mean_tokens) - spread**2 / 2, spread, num_rollouts).astype(int)
    rollouts = [evaluate.Rollout(token_ids=range(min(length, max_tokens))) for length in lengths]
    if balanced:
        rollouts.sort(key=lambda rollout: -len(rollout.token_ids))
        num_rounds = math.ceil(rl.sum_of_tokens(rollouts) / (max_tokens * num_gpus))
        parts = rl.fill_evenly(rollouts, num_rounds * num_gpus)
        while any(len(part) > 1 and rl.sum_of_tokens(part) > max_tokens for part in parts):
            num_rounds += 1
            parts = rl.fill_evenly(rollouts, num_rounds * num_gpus)
        micro_batches = [parts[rank::num_gpus] for rank in range(num_gpus)]
    else:
        micro_batches = [list(sft.micro_batches(rollouts[rank::num_gpus], max_tokens))
                         for rank in range(num_gpus)]
    sizes = [[rl.sum_of_tokens(micro_batch) for micro_batch in part] for part in micro_batches]
    longest = [max(round_sizes) for round_sizes in itertools.zip_longest(*sizes, fillvalue=0)]
    return sum(longest) * num_gpus / rl.sum_of_tokens(rollouts)


def pass_seconds(num_slots, num_columns, graphs):
    """Return the seconds of a decoding pass of Qwen2.5-VL-7B on an H100: measured without graphs,
    counted with them as in extras/plan.py."""
    if not graphs:
        return 0.0403           # 16 slots, docs/speed.md
    num_bytes = 16.58e9 + num_slots * num_columns * 57_344      # weights, keys and values
    return SMALL_KERNELS + num_bytes / (0.6 * GPU_BANDWIDTH)


def print_decoding(token_seconds, num_gpus, num_trials):
    """Print the passes and seconds of decoding, simulated, as a Markdown table. token_seconds: of
    one token of a conversation that is fed again."""
    rng = np.random.default_rng(0)
    rows = [("16 slots, no graphs", 16, 32_768, False, False),
            ("64 short slots first, no graphs", 64, 8192, False, False),
            ("16 slots, graphs", 16, 32_768, False, True),
            ("64 short slots first, graphs", 64, 8192, False, True),
            ("the same, groups are asked again at once", 64, 8192, True, True),
            ("96 slots of 6,144 tokens first", 96, 6144, True, True),
            ("42 slots of 12,288 tokens first", 42, 12_288, True, True)]
    say("| decoding | passes in short slots | passes in long slots | conversations fed again | "
        "seconds of passes, slowest rank | seconds of feeding again |\n"
        "|---|---|---|---|---|---|")
    for name, num_slots, slot_length, asks_at_once, graphs in rows:
        # 1. Passes of all ranks of all trials.
        ranks = np.array([SimulatedRank(rng, num_slots, slot_length, asks_at_once).run()
                          for _ in range(num_trials * num_gpus)])          # (ranks, 3)
        short_passes, long_passes, num_outgrown = ranks.mean(axis=0)
        # 2. Seconds of the slowest. The longest conversation in a long slot takes about 16,384
        #    columns.
        short_seconds = pass_seconds(num_slots, min(slot_length, 16_384), graphs)
        long_seconds = pass_seconds(16, 16_384, graphs)
        seconds_of_rank = ranks[:, 0] * short_seconds + ranks[:, 1] * long_seconds
        slowest = seconds_of_rank.reshape(num_trials, num_gpus).max(axis=1)
        say(f"| {name} | {short_passes:,.0f} | {long_passes:,.0f} | {num_outgrown:,.0f} | "
            f"{slowest.mean():,.0f} | {num_outgrown * slot_length * token_seconds:,.0f} |")


def case_step(args, process, num_gpus=8, num_trials=20):
    """Print the seconds of one step of RL with Qwen2.5-VL-7B on 8 H100, 256 prompts x 16, for the
    slowest of them, as Markdown tables. Nothing is run: decoding and the rounds of the update are
    simulated, the other parts are counted from their FLOPs as in `paper`."""
    stages, _, num_tokens = count_stages(num_gpus, num_prompts=256, group_size=16, num_turns=4,
                                         turn_tokens=250, view_tokens=1500, text_tokens=250,
                                         num_slots=64)

    def stage_seconds(part):
        return sum(flops for name, (flops, _, _) in stages.items()
                   if name.startswith(part)) / (0.4 * GPU_FLOPS)

    # 1. Decoding. What has outgrown its slot is fed again: one forward pass, of which an update has
    #    four.
    forward = stage_seconds("update: images") + stage_seconds("update: text") / 4
    print_decoding(forward / (256 * 16 / num_gpus * num_tokens), num_gpus, num_trials)

    # 2. The other parts.
    num_attempts = 1 + 1 / 2 + 1 / 4 + 1 / 8    # half of the groups are asked again, three times
    prefill = num_attempts * (stage_seconds("rollout: images") + stage_seconds("rollout: prefill"))
    update = stage_seconds("update")
    say("\n| other parts | seconds |\n|---|---|\n"
        f"| images and prefill of all attempts | {prefill:,.0f} |")
    for name, balanced in (("each rank fills its micro-batches alone", False),
                           ("rounds of equal tokens", True)):
        rng = np.random.default_rng(0)
        factor = statistics.fmean(update_rounds(rng, balanced) for _ in range(num_trials))
        say(f"| update, {name} (x {factor:.2f}) | {update * factor:,.0f} |")


def case_paper(args, process, num_gpus=8, num_prompts=32, group_size=16, num_turns=4,
               turn_tokens=250, view_tokens=1500, text_tokens=250, num_slots=16):
    """Print FLOPs, bytes and seconds of one RL step per GPU, stage by stage, as a Markdown table.
    Nothing is run.

    A conversation has T = text + turns (view + sampled) tokens: `view` image tokens and `sampled`
    tokens a turn. With N parameters in L text layers of width D:
        forward of t tokens after c others      2 N t + 4 L D t (c + t / 2)
                                                matrices, causal attention
        vision tower, P = 4 view patches        2 N_v P + 4 D_v P^2 per full-attention layer
                                                (windows are negligible)
        decode of one token in every slot       bytes: 2 (N + N_head)
                                                + slots * 2 * 2 * L * kv * mean length
        update                                  4 forwards (forward, recomputation, backward twice)
                                                of the text, 1 of the frozen tower; head at
                                                the sampled tokens
    Seconds: FLOPs at 40% of 989 TFLOP/s (bf16), memory at 60% of 3.35 TB/s, links at 60% of
    450 GB/s.
    """
    stages, num_params, num_tokens = count_stages(
        num_gpus, num_prompts, group_size, num_turns, turn_tokens, view_tokens, text_tokens,
        num_slots)
    say(f"{num_gpus} x H100, {num_prompts} x {group_size} conversations of {num_turns} turns and "
        f"{num_tokens} tokens, {num_slots} slots, {num_params / 1e9:.2f} billion parameters; per "
        "GPU:\n\n"
        "| stage | PFLOP | TB of memory | GB over links | seconds |\n|---|---|---|---|---|")
    total_seconds = 0
    for name, (flops, memory, link) in stages.items():
        seconds = max(flops / (0.4 * GPU_FLOPS), memory / (0.6 * GPU_BANDWIDTH))
        seconds += link / (0.6 * 450e9)
        total_seconds += seconds
        say(f"| {name} | {flops / 1e15:.2f} | {memory / 1e12:.2f} | {link / 1e9:.1f} | "
            f"{seconds:.1f} |")
    say(f"| total | | | | {total_seconds:.1f} |")


# ---- Case: the same, run ------------------------------------------------------------------------


class ScriptedEngine(evaluate.Engine):
    """An engine in which every turn of every conversation is the same script, at the cost of
    sampling it. It keeps the seconds of every step that only decodes, and of every step that feeds
    images."""

    def __init__(self, policy, limits, max_num_seqs, script, **options):
        super().__init__(policy, limits, max_num_seqs, **options)
        self.script = script
        self.decoding_steps = []
        self.image_steps = []

    def step(self):
        times = self.image_steps if self.slots_to_feed_images() else self.decoding_steps
        finished = []
        times.append(clock(lambda: finished.extend(evaluate.Engine.step(self))))
        return finished

    def accept(self, rollout, draft, sampled_ids, sampled_logprobs, next_position):
        first = len(rollout.token_ids) - rollout.turn_start
        scripted_ids = self.script[first:first + len(sampled_ids)]
        return super().accept(rollout, draft, scripted_ids, sampled_logprobs, next_position)


class RepeatingProposer(evaluate.NgramProposer):
    """Always propose the same token."""

    def __init__(self, token_id):
        super().__init__()
        self.token_id = token_id

    def propose(self, token_ids, max_tokens, min_probability=0.5):
        return [self.token_id] * max_tokens


def large_policy(num_layers, device):
    """Return a Qwen2.5-VL-7B with random weights in bfloat16 and the tiny model's words.
    num_layers: of its text and of its vision tower, or None for all."""
    _, tokenizer, image_processor = build_data.build_tiny([json.dumps(tools.PROMPTS)], 0)
    model = wide("Qwen2.5-VL-7B", tokenizer, device, num_layers)
    return sft.make_policy(model, tokenizer, image_processor, device, max_pixels=1500 * 28**2)


def peak_gigabytes():
    """Return the most GB that were allocated on the GPU since the last call."""
    if not torch.cuda.is_available():
        return math.nan
    peak = torch.cuda.max_memory_allocated() / 1e9
    torch.cuda.reset_peak_memory_stats()
    return peak


def play_scripted(policy, row, folder, script, filler_id, limits, num_rollouts, num_draft_tokens,
                  fixed_shape):
    """Play one question with scripted turns, print the times, and return the rollouts. fixed_shape:
    decode with evaluate.DecodePass, on a GPU as CUDA graphs."""
    engine = ScriptedEngine(policy, limits, num_rollouts, script,
                            num_speculative_tokens=num_draft_tokens)
    engine.proposer = RepeatingProposer(filler_id)
    engine.has_fixed_shape = fixed_shape
    rollouts = engine.run([row], num_rollouts, folder)
    drafted = engine.counts["draft_tokens"] / engine.counts["sequence_passes"]
    say(f"large: {'graphs' if fixed_shape else 'no graphs'}, {num_rollouts} conversations of "
        f"{limits.max_turns} turns and "
        f"{len(rollouts[0].token_ids)} tokens, {drafted:.1f} draft tokens a pass: "
        f"{len(engine.decoding_steps)} steps that only decode, "
        f"{1000 * statistics.median(engine.decoding_steps):.1f} ms each; "
        f"{len(engine.image_steps)} that feed images, {sum(engine.image_steps):.1f} s in all; "
        f"at most {peak_gigabytes():.1f} GB")
    return rollouts


def case_large(args, process, group_size=16, num_turns=4, turn_tokens=250):
    """Time the rollouts and the update of one question as in `paper`. The optimizer is left out,
    because it does not fit on one GPU."""
    if not args.layers and not torch.cuda.is_available():
        say("large: needs a GPU with 80 GB (or --layers 2)")
        return
    policy = large_policy(args.layers, process.device)
    sft.trainable_parameters(policy, freeze_vision=True)
    # a turn: "a a a ... a" and a call
    filler_ids = policy.encode_text("a")
    call_ids = policy.encode_text('<grounding>{"bbox_2d": [0, 0, 0.5, 0.5], '
                                  '"source": "original_image"}</grounding>') + [policy.im_end_id]
    script = filler_ids * (turn_tokens - len(call_ids)) + call_ids
    with tempfile.TemporaryDirectory() as folder:
        draw_noise(f"{folder}/noise.jpg", (4000, 2700))
        row = {"id": "0", "image": "noise.jpg", "question": "Which colour?", "answer": "red"}

        # 1. rollouts; the first run is the warm-up
        longest = []
        for num_rollouts, num_draft_tokens, max_turns, fixed_shape in (
                (group_size, 4, 1, False), (group_size, 4, 1, True),
                (group_size, 0, num_turns, True), (group_size, 4, num_turns, True),
                (group_size, 0, 1, False), (4 * group_size, 0, 1, True),
                (4 * group_size, 4, 1, True), (4 * group_size, 4, 1, False)):
            limits = evaluate.Limits(max_turns, num_turns, turn_tokens, 8192)
            rollouts = play_scripted(policy, row, folder, script, filler_ids[0], limits,
                                     num_rollouts, num_draft_tokens, fixed_shape)
            if max_turns == num_turns:
                longest = rollouts

        # 2. forward and backward, of all weights and then of adapters
        sft.enable_gradient_checkpointing(policy.model)
        policy.model.train()

        def update(rollout):
            batch = rl.encode_rollouts(policy, [rollout])
            logprobs, _, mask = rl.compute_logprobs(policy, [rollout], batch)
            logprobs[mask].sum().backward()

        for trained in ("all weights", "adapters of rank 32"):
            seconds = statistics.median(clock(lambda: update(rollout)) for rollout in longest[:4])
            say(f"large: forward and backward of {trained}, one conversation after the other: "
                f"{seconds:.2f} s each, including the reading of images; "
                f"{group_size * seconds:.1f} s for all; at most {peak_gigabytes():.1f} GB")
            policy.model.zero_grad()
            if not policy.has_adapters:
                lora.add_adapters(policy, 32, 32.0, seed=0)
    say("\ncounted:")
    case_paper(args, process, 1, 1, group_size, num_turns, turn_tokens)


# ---- The command --------------------------------------------------------------------------------

CASES = {"rollout": case_rollout, "drafts": case_drafts, "cached": case_cached,
         "prompt": case_prompt, "sft": case_sft, "grpo": case_grpo, "images": case_images,
         "ddp": case_ddp, "fsdp": case_fsdp, "rate": case_rate, "growth": case_growth,
         "paper": case_paper, "step": case_step, "large": case_large}


def parse_args():
    """Return the flags. Raise InputError for a case that does not exist."""
    parser = terminal.make_parser(
        "Compare this code with what a user would write with the library, case by case. Each case "
        "is described in the docstring of its function, such as case_rollout.")
    add = parser.add_argument
    add("cases", nargs="*", metavar="CASE", help=f"which of {', '.join(CASES)} (default: all)")
    add("--model", default="checkpoints/sft", help="folder of the model")
    add("--data", type=Path, default=Path("data/train.jsonl"), help="questions for rollouts")
    add("--trajectories", type=Path, default=Path("data/coldstart.jsonl"),
        help="conversations for sft")
    add("--groups", type=int, default=16, help="questions")
    add("--group_size", type=int, default=16, help="conversations per question")
    add("--batch_size", type=int, default=16, help="conversations in an sft step")
    add("--micro_batch_size", type=int, default=16,
        help="conversations per forward pass of the grpo peer")
    add("--micro_batch_tokens", type=int, default=2048, help="tokens per forward pass of ours")
    add("--layers", type=int,
        help="layers of the model of `large`, and of its tower (default: all)")
    add("--repeats", type=int, default=3, help="timed runs of each side")
    args = parser.parse_args()
    # what the parser itself does not check
    for name in args.cases:
        tools.check(name in CASES, f"there is no case {name}: choose from {', '.join(CASES)}")
    terminal.check_number_flags(args)
    return args


def main():
    """Run the cases that are named, or all."""
    args = parse_args()
    process = sft.setup_distributed()
    for name in args.cases or CASES:
        CASES[name](args, process)
    sft.close_distributed()


if __name__ == "__main__":
    terminal.run(main)
