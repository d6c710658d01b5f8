"""Benchmarks: this code against what a user would write with the library, on the same model,
weights, questions and tokens.

Each case alternates ours and the peer in one process and prints the median time of both and the
median of the pairwise ratios (peer / ours: above 1 we are faster). Nothing is asserted: timings
depend on the machine.

    rollout     groups of conversations against a loop around `generate` on the whole conversation,
                batched over all
    drafts      the same with drafts and without, and against `generate` with a static cache; and
                drafts on a policy that is all chance, where they can only cost
    cached      the same against `generate` with its cache carried over turns, one conversation at
                a time
    prompt      what could be gained at most if a group read its prompt's keys and values only once
    sft         one optimizer step against a padded batch with `labels`, torch's AdamW (and
                DistributedDataParallel)
    grpo        one GRPO update against full logits over a padded batch, all conversations in it
    images      seconds of an update in which the model waits for images of two megapixels, as rl.py
                prepares them, against one conversation after the other on the main thread
    ddp         our data parallel against torch's around the same forward pass and update (under
                torchrun)
    fsdp        our sharded optimizer against torch's fully_shard: time and memory (under torchrun)
    rate        the update's FLOP/s beside the machine's own on matrices of the model's sizes
    growth      cost of our rollouts as turns, conversations and pixels grow
    paper       FLOPs, bytes and seconds of one RL step of Qwen2.5-VL-7B on 8 H100, counted and not
                run
    large       the same for one question on one GPU, run: the model of that size with random
                weights, told what to write

An engine that plays the same conversations again would know them by heart: drafts start from
nothing in every timed run ("cold", as in a step of RL), or from other samples of these questions
("warm").

Both sides of `rollout` and `cached` write the same tokens: ours are sampled, the peer's sampling is
forced to them.

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
import json
import math
import resource
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

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

THREADS = torch.get_num_threads()
from conftest import LiveBytes, wide  # noqa: E402

torch.set_num_threads(THREADS)  # OMP_NUM_THREADS counts: conftest sets a number for tests


def alternate(title, ours, peer, repeats):
    """Time both in turn, after one warm-up each, and print medians and the median of the pairwise
    ratios."""
    times = []
    for repeat in range(repeats + 1):
        pair = []
        for function in (ours, peer):
            sft.barrier()
            pair.append(clock(function))
        times += [pair] if repeat or repeats == 1 else []
    a, b = (statistics.median(t) for t in zip(*times))
    ratio = statistics.median(p / o for o, p in times)
    say(f"{title:60} ours {a:8.3f} s   peer {b:8.3f} s   ratio {ratio:6.2f}")


def clock(function):
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def say(text):
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        print(text, flush=True)


# -------------------------------------------------------------------------------------------------
# Rollouts


class Force(LogitsProcessor):
    """Makes `generate` write given tokens: row i's next one is script[i][position]."""

    def __init__(self, scripts, start, device):
        longest = max(map(len, scripts))
        self.start, self.script = start, torch.tensor(
            [s + [s[-1]] * (longest - len(s)) for s in scripts], device=device)

    def __call__(self, ids, scores):
        at = min(ids.shape[1] - self.start, self.script.shape[1] - 1)
        return scores.masked_fill(
            torch.ones_like(scores, dtype=torch.bool).scatter(1, self.script[:, at:at + 1], False),
            -1e30)


def turns_of(rollout):
    """[(start, end)] of the policy's turns in a rollout's ids."""
    edges = [i for i in range(1, len(rollout.token_ids))
             if rollout.loss_mask[i] != rollout.loss_mask[i - 1]] + [len(rollout.token_ids)]
    return list(zip(edges[0::2], edges[1::2]))


def shown_images(policy, rollout, end):
    """The images among the first `end` ids of a rollout."""
    left, images = sum(t == policy.image_token_id for t in rollout.token_ids[:end]), []
    for image in rollout.images:
        if left > 0:
            images.append(image)
            left -= policy.num_image_tokens(image[1])
    return images


def generate(policy, ids, scripts, images, **more):
    """model.generate on left-padded conversations, forced to write `scripts`."""
    longest, device = max(map(len, ids)), policy.device
    pad = policy.tokenizer.pad_token_id
    padded = torch.tensor([[pad] * (longest - len(i)) + i for i in ids], device=device)  # (B, T)
    attention = torch.tensor([[0] * (longest - len(i)) + [1] * len(i) for i in ids],
                             device=device)  # (B, T)
    pixels = {"pixel_values": torch.cat([p for p, _ in images]).to(device),
              "image_grid_thw": torch.tensor([g for _, g in images],
                                             device=device)} if images else {}
    return policy.model.generate(
        input_ids=padded, attention_mask=attention,
        mm_token_type_ids=(padded == policy.image_token_id).long(), do_sample=True,
        max_new_tokens=max(map(len, scripts)),
        logits_processor=[Force(scripts, longest, device)], **pixels, **more)


@torch.inference_mode()
def play_with_generate(policy, rollouts, **more):
    """The loop a user would write: every turn, `generate` on the whole conversations of all who
    still play."""
    for number in range(max(len(r.turns) for r in rollouts)):
        playing = [(r, *turns_of(r)[number]) for r in rollouts if len(r.turns) > number]
        ids, scripts = ([r.token_ids[:start] for r, start, _ in playing],
                        [r.token_ids[start:end] for r, start, end in playing])
        out = generate(policy, ids, scripts,
                       [i for r, start, _ in playing for i in shown_images(policy, r, start)],
                       **more)
        texts = policy.tokenizer.batch_decode(out[:, max(map(len, ids)):])
        views = [tools.parse_turn(text) for text in texts]
        assert len(views) == len(playing)


@torch.inference_mode()
def play_with_cache(policy, rollouts, check=False):
    """`generate` with its cache carried over turns, one conversation at a time. check: compare
    every turn with `generate` on the whole conversation, greedily (position ids have to be given,
    or it is silently wrong)."""
    for r in rollouts:
        cache, seen = None, 0
        positions, _ = sft.mrope_positions(r.token_ids, [g for _, g in r.images], policy.image_token_id,
                                     policy.merge_size)  # (3, T)
        for start, end in turns_of(r):
            images = shown_images(policy, r, start)
            new, seen = images[seen:], len(images)
            text = torch.arange(start)[None]                                # (1, T)
            where = torch.cat([text, positions[:, :start]])[:, None]        # (4, 1, T)
            pixels = {"pixel_values": torch.cat([p for p, _ in new]),
                      "image_grid_thw": torch.tensor([g for _, g in new])} if new else {}
            ids = torch.tensor([r.token_ids[:start]])
            out = policy.model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=where,
                past_key_values=cache, do_sample=not check, max_new_tokens=end - start,
                logits_processor=[Force([r.token_ids[start:end]], start, policy.device)],
                return_dict_in_generate=True, output_logits=check, **pixels)
            cache = out.past_key_values
            if check:
                whole = policy.model.model(
                    input_ids=torch.tensor([r.token_ids[:end - 1]]),
                    position_ids=positions[:, None, :end - 1], use_cache=False,
                    pixel_values=torch.cat([p for p, _ in images]),
                    image_grid_thw=torch.tensor([g for _, g in images]))
                full = policy.model.lm_head(whole.last_hidden_state[0, start - 1:])  # (n, V)
                gap = (torch.cat(out.logits) - full).abs().max().item()
                assert gap < 1e-3, f"the peer's cache is wrong: logits differ by {gap}"


def load(args, library=False):
    """The model of --model; library: as the library runs it, without our vision attention."""
    _, _, device = sft.setup_distributed()
    policy = sft.load_policy(args.model, device, hint="the README's main command")
    if library:
        policy.model.set_attn_implementation("sdpa")
    return policy


def questions(args):
    """This process's share of the questions."""
    rank, world, _ = sft.setup_distributed()
    return tools.read_jsonl(args.data, tools.check_question,
                            "python build_data.py")[:args.groups][rank::world]


def case_rollout(args):
    ours, peer, rows = load(args), load(args, library=True), questions(args)
    engine = evaluate.Engine(ours, evaluate.Limits(max_turns=6, max_images=6), slots=64)
    rollouts = [r.with_images(peer) for r in engine.run(rows, args.group_size, args.data.parent)]
    tokens = sum(sum(r.loss_mask) for r in rollouts)
    alternate(f"rollout: {len(rows)} x {args.group_size} a process, 6 turns, {tokens} tokens",
              lambda: play_cold(engine, rows, args), lambda: play_with_generate(peer, rollouts),
              args.repeats)


def play_cold(engine, rows, args):
    engine.drafts = evaluate.NgramProposer()
    return engine.run(rows, args.group_size, args.data.parent)


def play_warm(engine, rows, args, known):
    engine.drafts = copy.deepcopy(known)
    return engine.run(rows, args.group_size, args.data.parent)


def alternate_all(title, sides, repeats):
    """Time all of {name: function} in turn, after one warm-up each. Prints the median time of each
    and the median of its ratios to the first."""
    times = [[clock(function) for function in sides.values()] for _ in range(repeats + 1)][1:]
    for name, column in zip(sides, zip(*times)):
        ratio = statistics.median(t / row[0] for t, row in zip(column, times))
        say(f"{title:44} {name:20} {statistics.median(column):8.3f} s   ratio {ratio:6.2f}")


def case_drafts(args):
    ours, peer, rows = load(args), load(args, library=True), questions(args)
    limits = evaluate.Limits(max_turns=6, max_images=6)
    plain, drafted = evaluate.Engine(ours, limits, draft=0), evaluate.Engine(ours, limits)
    other = evaluate.Engine(ours, limits, seed=1)
    other.run(rows, args.group_size, args.data.parent)
    rollouts = [r.with_images(peer) for r in plain.run(rows, args.group_size, args.data.parent)]
    title = f"drafts: {len(rows)} x {args.group_size}, {sum(sum(r.loss_mask) for r in rollouts)} tokens"
    sides = {"drafts, cold": lambda: play_cold(drafted, rows, args),
             "drafts, warm": lambda: play_warm(drafted, rows, args, other.drafts),
             "without": lambda: plain.run(rows, args.group_size, args.data.parent),
             "generate": lambda: play_with_generate(peer, rollouts)}
    try:
        play_with_generate(peer, rollouts[:2], cache_implementation="static", disable_compile=True)
        sides["generate, static"] = lambda: play_with_generate(
            peer, rollouts, cache_implementation="static", disable_compile=True)
    except Exception as error:  # depends on the library's version
        say("drafts: generate with a static cache does not run here: "
            f"{str(error).splitlines()[0][:80]}")
    alternate_all(title, sides, args.repeats)
    for name, play in (("cold", sides["drafts, cold"]), ("warm", sides["drafts, warm"])):
        drafted.counts.clear()
        play()
        say("drafts, {}: {tokens_per_pass:.2f} tokens per pass, "
            "{draft_accepted:.0%} of drafted accepted".format(
                name, **evaluate.drafting(drafted.counts)))
    with torch.no_grad():
        ours.model.model.language_model.norm.weight.mul_(0.01)  # all logits are about 0
    drafted.counts.clear()
    sides = {"drafts, cold": lambda: play_cold(drafted, rows[:4], args),
             "without": lambda: plain.run(rows[:4], args.group_size, args.data.parent)}
    alternate_all("drafts: a policy that is all chance", sides, args.repeats)
    say("drafts, chance: {tokens_per_pass:.2f} tokens per pass".format(
        **evaluate.drafting(drafted.counts)))


def case_cached(args):
    """On two conversations a group, since the peer's time is proportional to their number."""
    ours, peer, rows = load(args), load(args, library=True), questions(args)
    engine = evaluate.Engine(ours, evaluate.Limits(max_turns=6, max_images=6), slots=64)
    everything = engine.run(rows, args.group_size, args.data.parent)
    some = [r.with_images(peer) for r in everything[::max(1, args.group_size // 2)]]
    play_with_cache(peer, some[:4], check=True)
    share = sum(sum(r.loss_mask) for r in some) / sum(sum(r.loss_mask) for r in everything)
    start = time.perf_counter()
    play_cold(engine, rows, args)
    middle = time.perf_counter()
    play_with_cache(peer, some)
    ours_time, peer_time = (middle - start) * share, time.perf_counter() - middle
    say(f"{f'cached: {len(some)} of {len(everything)} conversations (ours: their share)':60} "
        f"ours {ours_time:8.3f} s   "
        f"peer {peer_time:8.3f} s   ratio {peer_time / ours_time:6.2f}")


def case_prompt(args):
    """The attention calls of a run are recorded and played again: as they were, and without the
    columns of the prompts, which all slots with the same question then read in one call. What
    putting the two parts together costs is not counted."""
    policy, rows, calls = load(args), questions(args), []
    engine = evaluate.Engine(policy, evaluate.Limits(max_turns=6, max_images=6), slots=64)
    attend = sft.attend_slots

    def record(query, key, value, scaling, padded, back, spans):
        if not calls or calls[-1][-1] is not spans:     # once for all layers
            calls.append((query, key.shape, padded, back, spans))
        return attend(query, key, value, scaling, padded, back, spans)

    sft.attend_slots = record
    rollouts = engine.run(rows, args.group_size, args.data.parent)
    sft.attend_slots = attend
    shared = min(r.loss_mask.index(True) for r in rollouts) - 1
    keys = torch.randn(max((shape for _, shape, *_ in calls), key=lambda shape: shape[2]))

    def as_it_was():
        for query, _, padded, back, spans in calls:
            attend(query, keys, keys, 1.0, padded, back, spans)

    def prompts_once():
        for query, shape, padded, back, spans in calls:
            attend(query, keys, keys, 1.0, padded, back, [
                (place, slots, length, mask) if mask is None or length <= shared else
                (place, slots, length - shared, mask[..., shared:])
                for place, slots, length, mask in spans])
            for part in query.chunk(max(1, shape[0] // args.group_size), dim=2):   # a question's slots
                part = part.unflatten(1, (shape[1], -1)).flatten(2, 3)  # (1, K, n * H / K, D)
                torch.nn.functional.scaled_dot_product_attention(
                    part, keys[:1, :, :shared], keys[:1, :, :shared])

    layers = policy.model.config.text_config.num_hidden_layers
    sides = {"whole run": lambda: play_cold(engine, rows, args),
             f"attention x {layers}": lambda: [as_it_was() for _ in range(layers)],
             "prompts once": lambda: [prompts_once() for _ in range(layers)]}
    alternate_all(f"prompt: {shared} tokens, 6 turns", sides, args.repeats)


# -------------------------------------------------------------------------------------------------
# Updates


def padded(policy, sequences):
    """A right-padded batch as a data collator would make it: attention mask, labels, no
    positions."""
    def pad(lists, value):
        return torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(x) for x in lists], batch_first=True, padding_value=value)

    ids, written = (pad([s.token_ids for s in sequences], policy.tokenizer.pad_token_id),
                    pad([s.loss_mask for s in sequences], False))
    batch = {"input_ids": ids,
             "attention_mask": pad([[1] * len(s.token_ids) for s in sequences], 0),  # (B, T)
             "mm_token_type_ids": (ids == policy.image_token_id).long(),
             "labels": ids.masked_fill(~written, -100)}
    packed = sft.collate(policy, sequences)
    batch |= {k: packed[k] for k in ("pixel_values", "image_grid_thw") if k in packed}
    return {k: v.to(policy.device) for k, v in batch.items()}


def peer_trainer(args):
    """(policy, the module to call, optimizer) with torch's own AdamW and, on several processes,
    DistributedDataParallel."""
    policy = load(args, library=True)
    policy.model.train()
    module = policy.model
    if sft.world_size() > 1:
        module = torch.nn.parallel.DistributedDataParallel(policy.model)
    return policy, module, torch.optim.AdamW(policy.model.parameters(), lr=1e-5)


def case_sft(args):
    rank, world, _ = sft.setup_distributed()
    policy, (peer, module, peer_optimizer) = load(args), peer_trainer(args)
    rows = tools.read_jsonl(args.trajectories, tools.check_trajectory,
                            "python collect_coldstart.py")[:args.batch_size][rank::world]
    sequences = [sft.encode(policy, row, args.trajectories.parent) for row in rows]
    optimizer = sft.Optimizer(sft.trainable_parameters(policy, False), 1e-5, 0.01)
    policy.model.train()
    settings = argparse.Namespace(tokens=args.micro_batch_tokens, max_norm=1.0)

    def step_of_peer():
        module(**padded(peer, sequences), use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(peer.model.parameters(), 1.0)
        peer_optimizer.step()
        peer_optimizer.zero_grad()

    tokens = sum(len(s.token_ids) for s in sequences)
    alternate(f"sft: {len(rows)} conversations a process, {tokens} tokens", lambda: sft.train_step(
        policy, optimizer, sequences, 1e-5, settings), step_of_peer, args.repeats)


def case_rate(args):
    """How fast an update computes, beside the machine's rate on matrices of the model's own
    sizes."""
    policy = load(args)
    rows = tools.read_jsonl(args.trajectories, tools.check_trajectory,
                            "python collect_coldstart.py")[:args.batch_size]
    sequences = [sft.encode(policy, row, args.trajectories.parent) for row in rows]
    optimizer = sft.Optimizer(sft.trainable_parameters(policy, False), 1e-5, 0.01)
    settings = argparse.Namespace(tokens=args.micro_batch_tokens, max_norm=1.0)
    policy.model.train()

    def step():
        sft.train_step(policy, optimizer, sequences, 1e-5, settings)

    with FlopCounterMode(display=False) as counter:
        step()
    flops, seconds = (counter.get_total_flops(),
                      statistics.median(clock(step) for _ in range(args.repeats + 1)))
    work, time_of_matrices = 0, 0.0
    for weight in (m.weight for m in policy.model.modules() if isinstance(m, torch.nn.Linear)):
        x = torch.randn(args.micro_batch_tokens, weight.shape[1], dtype=weight.dtype, device=weight.device)
        with torch.no_grad():
            time_of_matrices += min(clock(lambda: x @ weight.T) for _ in range(10))
        work += 2 * args.micro_batch_tokens * weight.numel()
    rate, plain = flops / seconds / 1e9, work / time_of_matrices / 1e9
    say(f"rate: an update of {sum(len(s.token_ids) for s in sequences)} tokens: "
        f"{flops / 1e9:.0f} GFLOP in {seconds:.2f} s = "
        f"{rate:.0f} GFLOP/s, {rate / plain:.0%} of the {plain:.0f} GFLOP/s of plain products "
        f"({args.micro_batch_tokens}, in) x (in, out) with the model's own matrices")


def case_ddp(args):
    """Only the data parallel differs: torch's DistributedDataParallel around the very same forward
    pass, and torch's AdamW."""
    rank, world, _ = sft.setup_distributed()
    if world == 1:
        return say("ddp: needs torchrun --nproc_per_node=2")
    rows = tools.read_jsonl(args.trajectories, tools.check_trajectory,
                            "python collect_coldstart.py")[:args.batch_size][rank::world]
    ours, peer = load(args), load(args)
    sequences = [sft.encode(ours, row, args.trajectories.parent) for row in rows]
    wrapped = torch.nn.parallel.DistributedDataParallel(Loss(peer))
    optimizer = sft.Optimizer(sft.trainable_parameters(ours, False), 1e-5, 0.0)
    settings = argparse.Namespace(tokens=args.micro_batch_tokens, max_norm=1.0)
    adam = torch.optim.AdamW(sft.trainable_parameters(peer, False), 1e-5, fused=True)

    def step_of_peer():
        micro = list(sft.micro_batches(sequences, args.micro_batch_tokens))
        for i, part in enumerate(micro):
            with wrapped.no_sync() if i + 1 < len(micro) else contextlib.nullcontext():
                wrapped(sft.collate(peer, part)).backward()
        torch.nn.utils.clip_grad_norm_(wrapped.parameters(), 1.0)
        adam.step()
        adam.zero_grad()

    alternate(f"ddp: {len(rows)} conversations a process, {world} processes",
              lambda: sft.train_step(ours, optimizer, sequences, 1e-5, settings), step_of_peer,
              args.repeats)
    measure_traffic(ours, optimizer, wrapped, peer, sequences[:1])


def case_fsdp(args):
    """Our sharded optimizer against torch's fully_shard(reshard_after_forward=False) with bfloat16
    weights and float32 reduction: time, and the peak of living tensor storages during a step."""
    rank, world, _ = sft.setup_distributed()
    if world == 1:
        return say("fsdp: needs torchrun --nproc_per_node=2")
    rows = tools.read_jsonl(args.trajectories, tools.check_trajectory,
                            "python collect_coldstart.py")[:args.batch_size][rank::world]
    settings = argparse.Namespace(tokens=10**6, max_norm=1.0)
    sides = []
    for name in ("ours", "torch"):
        with LiveBytes() as memory:
            policy = sft.load_policy(args.model, "cpu", "bfloat16" if name == "ours" else "float32")
            sequences = [sft.encode(policy, row, args.trajectories.parent) for row in rows]
            if name == "ours":
                optimizer = sft.Optimizer(sft.trainable_parameters(policy, False), 1e-5, 0.0, shard=True)

                def step(policy=policy, sequences=sequences, optimizer=optimizer):
                    sft.train_step(policy, optimizer, sequences, 1e-5, settings)
            else:
                how = {"reshard_after_forward": False,
                       "mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32)}
                policy.model.requires_grad_(True)
                for layer in [*policy.model.model.language_model.layers,
                              *policy.model.model.visual.blocks]:
                    fully_shard(layer, **how)
                module = Loss(policy)
                fully_shard(module, **how)
                adam = torch.optim.AdamW(module.parameters(), 1e-5, foreach=True)

                def step(policy=policy, sequences=sequences, module=module, adam=adam):
                    module(sft.collate(policy, sequences)).backward()
                    torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
                    adam.step()
                    adam.zero_grad()
            step()
            step()
        sides.append((step, memory.peak))
    alternate(f"fsdp: {len(rows)} conversations a process, {world} processes",
              sides[0][0], sides[1][0], args.repeats)
    say(f"fsdp: peak of living storages: ours {sides[0][1] / 2**20:.1f} MB   "
        f"peer {sides[1][1] / 2**20:.1f} MB")


class Loss(torch.nn.Module):
    """The loss of an update as a module, which is what DistributedDataParallel wants."""

    def __init__(self, policy):
        super().__init__()
        self.model, self.policy = policy.model, [policy]

    def forward(self, batch):
        return -sft.token_logprobs(self.policy[0], batch).sum()


def measure_traffic(policy, optimizer, module, peer, sequences):
    """Bytes of gradients that a process hands to all-reduce in one step, ours and torch DDP's."""
    sent, reduce = {"ours": 0, "peer": 0}, torch.distributed.all_reduce

    def counted(tensor, *rest, **more):
        sent["ours"] += tensor.numel() * tensor.element_size()
        return reduce(tensor, *rest, **more)

    def hook(state, bucket):
        sent["peer"] += bucket.buffer().numel() * bucket.buffer().element_size()
        return reduce(bucket.buffer(), async_op=True).get_future().then(lambda f: f.value()[0])

    module.register_comm_hook(None, hook)
    module(sft.collate(peer, sequences)).backward()
    torch.distributed.all_reduce = counted
    optimizer.backward([sft.collate(policy, sequences)], Loss(policy))
    torch.distributed.all_reduce = reduce
    say("gradient bytes handed to all-reduce per step: "
        f"ours {sent['ours']:,}   peer {sent['peer']:,}")


def case_grpo(args):
    """One update on the same groups. The peer runs all conversations through the model, with logits
    at every position."""
    policy, (peer, module, peer_optimizer), rows = load(args), peer_trainer(args), questions(args)
    rollouts = evaluate.Engine(policy, evaluate.Limits(6, 6), 64).run(
        rows, args.group_size, args.data.parent)
    parts = [rollouts[i:i + args.group_size] for i in range(0, len(rollouts), args.group_size)]
    rewards = torch.tensor([[r.reward for r in part] for part in parts],
                           dtype=torch.float64)  # (P, G)
    settings = argparse.Namespace(
        overturn_mask=True, mask_void=False, baseline="group", divisor="completed",
        aggregation="response", max_new_tokens=96, max_turns=6, tokens=args.micro_batch_tokens, clip_low=0.2,
        clip_high=0.3, clip_dual=0.0, max_norm=1.0, prompts_per_step=len(parts))
    completed = torch.tensor([[rl.is_kept(r, settings) for r in part] for part in parts])
    advantages = rl.group_advantages(rewards, completed)
    for r, a in zip(rollouts, advantages.flatten().tolist()):
        r.advantage = a
    optimizer = sft.Optimizer(sft.trainable_parameters(policy, False), 1e-5, 0.0)
    policy.model.train()

    def step_of_peer():
        flat, keep = advantages.flatten(), completed.flatten()
        for at in range(0, len(rollouts), args.micro):
            part = rollouts[at:at + args.micro]
            batch = padded(peer, [r.with_images(peer) for r in part])
            labels = batch.pop("labels")[:, 1:]  # (B, T - 1)
            # (B, T - 1, V)
            logprobs = module(**batch, use_cache=False).logits[:, :-1].log_softmax(-1)
            new = logprobs.gather(-1, labels.clamp(min=0)[:, :, None])[:, :, 0]
            old = torch.zeros_like(new).masked_scatter(
                labels >= 0, torch.tensor([x for r in part for x in r.logprobs]))
            rl.grpo_loss(new, old, flat[at:at + args.micro].float(), labels >= 0,
                         keep[at:at + args.micro],
                         denominator=int(keep.sum()) or 1).backward()
        torch.nn.utils.clip_grad_norm_(peer.model.parameters(), 1.0)
        peer_optimizer.step()
        peer_optimizer.zero_grad()

    used = int((advantages != 0).sum())
    alternate(f"grpo: {len(rollouts)} conversations, {used} with signal", lambda: rl.update_policy(
        policy, optimizer, rollouts, settings, 1e-5), step_of_peer, args.repeats)


def case_images(args, pixels=2_000_000):
    """One group whose image, and first crop, have two megapixels; a conversation per micro-batch.
    The peer opens the image once, and encodes it again for every conversation."""
    policy = load(args)
    policy.max_pixels, place = pixels, "noise.jpg"
    zoom = json.dumps({"bbox_2d": [0.1, 0.1, 0.8, 0.8], "source": "original_image"})
    turns = [{"text": f"<think></think><grounding>{zoom}</grounding>"},
             {"text": "<answer>red</answer>"}]
    row = {"id": "0", "image": place, "question": "Which colour?", "answer": "red"}
    with tempfile.TemporaryDirectory() as folder:
        Image.effect_noise((2000, 1500), 60).convert("RGB").save(Path(folder) / place, quality=95)
        image = tools.open_image(Path(folder) / place)
        turns[0], *_ = tools.take_turn([image], turns[0]["text"], 1, 6, 6)
        sequence = sft.encode(policy, {**row, "turns": turns}, folder)
        written = sum(sequence.loss_mask)
        rollouts = [evaluate.Rollout(sequence.token_ids, sequence.loss_mask, row=row, root=folder, turns=turns,
                                     logprobs=[-1.0] * written) for _ in range(args.group_size)]
        alone = ([replace(r, images=policy.preprocess_images(tools.replay(r.to_row(), image)))]
                 for r in rollouts)
        sides = {"the peer": (sft.collate(policy, sequences) for sequences in alone),
                 "ours": sft.prefetch(partial(rl.encode_rollouts, policy),
                                       [[r] for r in rollouts])}
        policy.model.train()
        sft.trainable_parameters(policy, freeze_vision=True)
        for name, batches in sides.items():
            waited, begin, ready = 0.0, time.perf_counter(), None
            for r in rollouts:
                start = time.perf_counter()
                batch = next(batches)
                waited += time.perf_counter() - start
                ready = ready or waited     # the first batch has nothing to hide behind
                rl.compute_logprobs(policy, [r], batch)[0].sum().backward()
            policy.model.zero_grad()
            say(f"images: {args.group_size} conversations of {len(sequence.token_ids)} tokens, {name}: "
                f"{time.perf_counter() - begin:.2f} s, of which the model waits {waited:.2f} s "
                f"({ready:.2f} s for the first)")


# -------------------------------------------------------------------------------------------------
# Growth


def case_growth(args):
    policy, rows = load(args), tools.read_jsonl(
        args.data, tools.check_question, "python build_data.py")

    def measure(title, count, turns, pixels=1):
        policy.min_pixels, policy.max_pixels = 6000 * pixels, 8000 * pixels
        engine = evaluate.Engine(policy, evaluate.Limits(turns, turns), slots=64)
        start = time.perf_counter()
        rollouts = engine.run(rows[:count // 16], 16, args.data.parent)
        seconds, tokens = time.perf_counter() - start, sum(sum(r.loss_mask) for r in rollouts)
        cache = sum(t.nbytes for layer in engine.cache.layers for t in layer) / 2**20
        # a high-water mark: hence in rising order
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        say(f"growth: {title:24} {seconds:8.2f} s   {tokens:8d} tokens   "
            f"{tokens / seconds:8.0f} tokens/s   "
            f"KV cache {cache:6.1f} MB   peak memory of the process {peak:6.0f} MB")

    measure("warm-up", 64, 6)
    for count in (64, 256, 1024):
        measure(f"{count} rollouts", count, 6)
    for turns in (8, 16, 32):
        measure(f"{turns} turns", 256, turns)
    for pixels in (1, 2, 4):
        measure(f"{pixels} x pixels", 256, 6, pixels)


# -------------------------------------------------------------------------------------------------
# One RL step of Qwen2.5-VL-7B on 8 H100, on paper


def case_paper(args, gpus=8, prompts=32, group=16, turns=4, written=250, view=1500, text=250,
               slots=16):
    """FLOPs, bytes and seconds of one RL step per GPU, stage by stage, as a Markdown table. Nothing
    is run.

    A conversation has T = text + turns (view + written) tokens: `view` image tokens and `written`
    sampled ones a turn. With N parameters in L text layers of width D:
        forward of t tokens behind c others     2 N t + 4 L D t (c + t / 2)
                                                matrices, causal attention
        vision tower, P = 4 view patches        2 N_v P + 4 D_v P^2 per full-attention layer
                                                (windows are negligible)
        decode of one token in every slot       bytes: 2 (N + N_head)
                                                + slots * 2 * 2 * L * kv * mean length
        update                                  4 forwards (forward, recomputation, backward twice)
                                                of the text, 1 of the frozen tower; head at
                                                `written` tokens
    Seconds: FLOPs at 40% of 989 TFLOP/s (bf16), memory at 60% of 3.35 TB/s, links at 60% of
    450 GB/s.
    """
    L, D, ff, kv, vocabulary = 28, 3584, 18944, 4 * 128, 152064
    layers_v, D_v, ff_v, full_v = 32, 1280, 3420, 4
    N = L * (2 * D * D + 2 * D * kv + 3 * D * ff)
    N_head, N_v = (vocabulary * D,
                   layers_v * (4 * D_v**2 + 3 * D_v * ff_v) + (4 * D_v) * (4 * D_v + D))
    total = N + 2 * N_head + N_v
    mine, P, T = prompts * group / gpus, 4 * view, text + turns * (view + written)

    def forward(t, c=0):
        return 2 * N * t + 4 * L * D * t * (c + t / 2)

    vision = 2 * N_v * P + 4 * D_v * P**2 * full_v                          # per image
    images, steps = prompts / gpus + mine * (turns - 1), mine / slots * turns * written
    middle = T / 2  # mean length while a conversation is played
    stages = {
        "rollout: images": (images * vision, images * P * 1176 * 2, 0),
        "rollout: prefill": (
            prompts / gpus * forward(text + view) + mine * sum(
                forward(view, text + turn * (view + written)) for turn in range(1, turns)),
            steps / written * 2 * N, 0),
        "rollout: decode": (mine * turns * written * (forward(1, middle) + 2 * N_head),
                            steps * (2 * (N + N_head) + slots * 4 * L * kv * middle), 0),
        "update: images": (mine * turns * vision, 0, 0),
        "update: text": (mine * (4 * forward(T) + 4 * 2 * N_head * turns * written), 0, 0),
        "gradients and AdamW": (0, total * (2 + 2 + 16 + 16) / gpus,
                                2 * 2 * total * (gpus - 1) / gpus)}
    say(f"{gpus} x H100, {prompts} x {group} conversations of {turns} turns and {T} tokens, "
        f"{slots} slots, {total / 1e9:.2f} billion parameters; per GPU:\n\n"
        "| stage | PFLOP | TB of memory | GB over links | seconds |\n|---|---|---|---|---|")
    seconds = 0
    for name, (flops, memory, link) in stages.items():
        needed = max(flops / (0.4 * 989e12), memory / (0.6 * 3.35e12)) + link / (0.6 * 450e9)
        seconds += needed
        say(f"| {name} | {flops / 1e15:.2f} | {memory / 1e12:.2f} | {link / 1e9:.1f} | "
            f"{needed:.1f} |")
    say(f"| total | | | | {seconds:.1f} |")


# -------------------------------------------------------------------------------------------------
# The same, run


class Told(evaluate.Engine):
    """Every turn of every conversation is the same script, at the cost of sampling it. Keeps the
    seconds of every step that only decodes, and of every one that feeds images, in lists."""

    def step(self):
        self.fed_images = False
        seconds = clock(super().step)       # its draw waits for the device
        (self.feeding if self.fed_images else self.decoding).append(seconds)

    def forward(self, slots, pieces, images, draws=None):
        self.fed_images = any(images)
        return super().forward(slots, pieces, images, draws)

    def draw(self, logprobs, numbers):
        _, scores = super().draw(logprobs, numbers)
        told = []
        for r, n in zip(self.slots, numbers):
            at = len(r.token_ids) - r.turn_start
            told += self.script[at:at + len(n)]
        return told, scores


def large_policy(layers):
    """Qwen2.5-VL-7B with random weights on the GPU, in bfloat16, with the tiny model's words.
    layers: of its text and of its vision tower, or None for all."""
    _, tokenizer, processor = build_data.build_tiny([json.dumps(tools.PROMPTS)], 0)
    device = sft.setup_distributed()[2]
    model = wide("Qwen2.5-VL-7B", tokenizer, device, layers)
    return sft.make_policy(model, tokenizer, processor, device, max_pixels=1500 * 28**2)


def peak():
    """Most GB that were allocated on the GPU since the last call."""
    if not torch.cuda.is_available():
        return math.nan
    most = torch.cuda.max_memory_allocated() / 1e9
    torch.cuda.reset_peak_memory_stats()
    return most


def case_large(args, group=16, turns=4, written=250):
    """The rollouts and the update of one question as in `paper`. Its optimizer is left out: on one
    GPU it has no room."""
    if not args.layers and not torch.cuda.is_available():
        return say("large: needs a GPU with 80 GB (or --layers 2)")
    policy = large_policy(args.layers)
    sft.trainable_parameters(policy, freeze_vision=True)
    call = policy.encode_text('<grounding>{"bbox_2d": [0, 0, 0.5, 0.5], "source": "original_image"}'
                       "</grounding>") + [policy.im_end_id]
    script = policy.encode_text("a") * (written - len(call)) + call
    with tempfile.TemporaryDirectory() as folder:
        Image.effect_noise((4000, 2700), 60).convert("RGB").save(f"{folder}/noise.jpg")
        row = {"id": "0", "image": "noise.jpg", "question": "Which colour?", "answer": "red"}
        longest = []
        for slots, draft, most in ((group, 4, 1), (group, 0, turns), (group, 4, turns),
                                   (4 * group, 0, 1), (4 * group, 4, 1)):   # the first warms up
            engine = Told(policy, evaluate.Limits(most, turns, written, 8192), slots, draft=draft)
            engine.script, engine.decoding, engine.feeding = script, [], []
            if draft:
                engine.drafts.after = lambda ids, most: policy.encode_text("a") * most
            rollouts = engine.run([row], slots, folder)
            drafted = engine.counts["drafted"] / engine.counts["passes"]
            say(f"large: {slots} conversations of {most} turns and {len(rollouts[0].ids)} tokens, "
                f"{drafted:.1f} drafted a pass: {len(engine.decoding)} steps that only decode, "
                f"{1000 * statistics.median(engine.decoding):.1f} ms each; {len(engine.feeding)} "
                f"that feed images, {sum(engine.feeding):.1f} s in all; at most {peak():.1f} GB")
            longest = rollouts if most == turns else longest
        engine.cache = None
        sft.enable_gradient_checkpointing(policy.model)
        policy.model.train()

        def update(r):
            new, _, mask = rl.compute_logprobs(policy, [r], rl.encode_rollouts(policy, [r]))
            new[mask].sum().backward()

        seconds = [clock(lambda: update(r)) for r in longest[:4]]
        say(f"large: forward and backward of one conversation after the other "
            f"{statistics.median(seconds):.2f} s each, images read meanwhile included; "
            f"{group * statistics.median(seconds):.1f} s for all; at most {peak():.1f} GB")
    say("\ncounted:")
    case_paper(args, 1, 1, group, turns, written)


CASES = {"rollout": case_rollout, "drafts": case_drafts, "cached": case_cached,
         "prompt": case_prompt, "sft": case_sft, "grpo": case_grpo, "images": case_images,
         "ddp": case_ddp, "fsdp": case_fsdp, "rate": case_rate, "growth": case_growth,
         "paper": case_paper, "large": case_large}


def main():
    parser = argparse.ArgumentParser(description="Ours against what a user would write.")
    parser.add_argument("cases", nargs="*", choices=[*CASES, []], default=[],
                        help="which cases (default: all)")
    parser.add_argument("--model", default="checkpoints/sft", help="folder of the model")
    parser.add_argument("--data", type=Path, default=Path("data/train.jsonl"),
                        help="questions for rollouts")
    parser.add_argument("--trajectories", type=Path, default=Path("data/coldstart.jsonl"),
                        help="conversations for sft")
    parser.add_argument("--groups", type=int, default=16, help="questions")
    parser.add_argument("--group_size", type=int, default=16, help="conversations per question")
    parser.add_argument("--batch_size", type=int, default=16, help="conversations in an sft step")
    parser.add_argument("--micro", type=int, default=16,
                        help="conversations per forward pass of the grpo peer")
    parser.add_argument("--micro_batch_tokens", type=int, default=2048,
                        help="padded tokens per forward pass of ours")
    parser.add_argument("--layers", type=int,
                        help="layers of the model of `large` and of its tower (default: all)")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each side")
    args = parser.parse_args()
    for name in args.cases or CASES:
        CASES[name](args)
    sft.close_distributed()


if __name__ == "__main__":
    tools.run(main)
