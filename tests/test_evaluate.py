"""Specification of the rollout engine and of Avg@K.

In float64 the engine must agree with `model.generate` token for token, must not depend on batch,
slots or world size, and its recorded log-probabilities must be those of a full forward pass over
the same ids.
"""

import argparse
import collections
import copy
import itertools
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForImageTextToText

import evaluate
import sft
import tools
from extras import crash, results_folder
from support.launch import Forked, run_script
from support.memory import LiveBytes
from support.models import RELEASED, library_attention

LIMITS = evaluate.Limits(max_turns=6, max_images=6, max_new_tokens=48, max_model_len=1200)


def play(policy, world, num_samples=2, max_num_seqs=8, limits=LIMITS, **flags):
    """Play the first three questions."""
    rows = tools.read_jsonl(world / "train.jsonl")[:3]
    return evaluate.Engine(policy, limits, max_num_seqs, **flags).run(rows, num_samples, world)


@pytest.fixture(scope="module")
def rollouts(trained_policy, world):
    """Three questions, six samples each, in 16 slots, with drafts (the default)."""
    return play(trained_policy, world, num_samples=6, max_num_seqs=16)


@pytest.fixture(scope="module")
def undrafted(trained_policy, world):
    """The same without drafts."""
    return play(trained_policy, world, num_samples=6, max_num_seqs=16, num_speculative_tokens=0)


def first_two_of_each(rollouts):
    """The first two of six samples of three questions."""
    return rollouts[:2] + rollouts[6:8] + rollouts[12:14]


def conversations(rollouts):
    return [(rollout.token_ids, rollout.loss_mask, rollout.turns, rollout.finish_reason)
            for rollout in rollouts]


def same(ours, theirs):
    return conversations(ours) == conversations(theirs)


def same_logprobs(ours, theirs):
    for our_rollout, their_rollout in zip(ours, theirs, strict=True):
        if our_rollout.logprobs != pytest.approx(their_rollout.logprobs, abs=1e-9):
            return False
    return True


# ---- One conversation ---------------------------------------------------------------------------


def test_random_numbers_are_indexed_by_position():
    """The n-th token of a conversation gets the n-th number of its stream, however often it is
    drawn."""
    one_by_one = np.random.default_rng([0, 0, 1, 2])
    stream = [float(one_by_one.random(dtype=np.float32)) for _ in range(200)]
    rollout = evaluate.Rollout(random_generator=np.random.default_rng([0, 0, 1, 2]))
    assert rollout.next_uniforms(3) == stream[:3]
    assert rollout.next_uniforms(3) == stream[:3]
    rollout.logprobs = [0.0] * 60
    assert rollout.next_uniforms(9) == stream[60:69]
    assert rollout.next_uniforms(0) == []
    assert rollout.next_uniforms(130) == stream[60:190]
    rollout.logprobs = [0.0] * 150
    assert rollout.next_uniforms(9) == stream[150:159]
    fresh = evaluate.Rollout(random_generator=np.random.default_rng([0, 0, 1, 2]))
    assert fresh.next_uniforms(200) == stream


class Inbox:
    """A judge that only takes in what it is asked."""

    def __init__(self):
        self.submitted = []

    def submit(self, rollout):
        self.submitted.append(rollout.prediction)


@pytest.mark.parametrize("prediction, reward, submitted", [
    ("A cat.", 1.0, []), (None, 0.0, []), ("kitten", 0.0, ["kitten"])])
def test_the_judge_gets_what_words_cannot_tell(prediction, reward, submitted):
    row = {"question": "What?", "answer": "a cat"}
    for judge in (None, Inbox()):
        rollout = evaluate.Rollout(row=row, prediction=prediction)
        rollout.compute_reward(judge)
        assert rollout.reward == reward
    assert judge.submitted == submitted


# ---- The KV cache: spans, rows, and attention over slots ----------------------------------------


@pytest.mark.parametrize("num_new, spans", [
    ([1, 1, 1], [(0, 3)]),
    ([1] * 9, [(0, 8), (8, 9)]),
    ([1, 13], [(0, 2)]), ([13, 1], [(0, 2)]), ([1, 14, 14], [(0, 1), (1, 3)]),
    ([14, 1], [(0, 1), (1, 2)]), ([1, 10, 20], [(0, 3)]),
    ([64, 64], [(0, 2)]), ([65, 1], [(0, 1), (1, 2)]), ([70, 60], [(0, 1), (1, 2)]),
    ([70, 70], [(0, 1), (1, 2)]),
    ([0, 3], [(0, 2)]), ([3, 0], [(0, 2)]), ([0, 3, 0, 1], [(0, 4)]), ([0, 0], []),
    ([70, 1, 5, 1, 30], [(0, 1), (1, 4), (4, 5)])], ids=str)
def test_spans_by_hand(num_new, spans):
    """At most 8 slots; a slot with more than 64 new tokens, or with 13 more or fewer than the one
    before, begins a new span; without any new token there is no span."""
    assert evaluate.plan_spans(num_new) == spans


def test_rows_of_two_slots_by_hand():
    """The example of plan_rows: which row a token stands in, where its key goes, what it sees."""
    rows = evaluate.plan_rows(2, np.array([5, 6]), np.array([1, 2]))
    assert rows.spans == [evaluate.Span(slice(0, 4), slice(2, 4), width=2, num_columns=8)]
    assert rows.slot_of_token.tolist() == [2, 3, 3]
    assert rows.column_of_token.tolist() == [5, 6, 7]
    assert rows.row_of_token.tolist() == [0, 2, 3]
    assert rows.token_of_row.tolist() == [0, 0, 1, 2]
    assert rows.last_visible.tolist() == [5, 6, 6, 7]


def test_rows_of_many_slots():
    """Token by token: in its slot, a token is as far from the first column as the tokens before it,
    and its row is as far from the first row of its slot. Rows of padding repeat token 0."""
    rng = np.random.default_rng(0)
    for _ in range(100):
        first_slot, num_slots = rng.integers(0, 4), rng.integers(1, 20)
        num_cached = rng.integers(0, 90, num_slots)
        num_new = rng.choice([0, 1, 2, 5, 40, 70], num_slots, p=[.2, .3, .2, .1, .1, .1])
        if num_new.max() == 0:
            continue
        rows = evaluate.plan_rows(first_slot, num_cached, num_new)
        token_of_row = [0] * len(rows.token_of_row)
        num_rows = 0
        num_tokens = 0
        for span, (first, end) in zip(rows.spans, evaluate.plan_spans(num_new), strict=True):
            assert span.slots == slice(first_slot + first, first_slot + end)
            assert span.width == num_new[first:end].max()
            assert span.num_columns == (num_cached + num_new)[first:end].max()
            assert span.query_rows.start == num_rows
            for slot in range(first, end):
                for offset in range(span.width):
                    assert rows.last_visible[num_rows + offset] == num_cached[slot] + offset
                for offset in range(num_new[slot]):
                    assert rows.slot_of_token[num_tokens] == first_slot + slot
                    assert rows.column_of_token[num_tokens] == num_cached[slot] + offset
                    assert rows.row_of_token[num_tokens] == num_rows + offset
                    token_of_row[num_rows + offset] = num_tokens
                    num_tokens += 1
                num_rows += span.width
            assert span.query_rows.stop == num_rows
        assert num_tokens == len(rows.slot_of_token) == len(rows.row_of_token) == num_new.sum()
        assert rows.token_of_row.tolist() == token_of_row
        assert len(rows.last_visible) == num_rows


@pytest.fixture
def make_cache(make_tiny):
    """make_cache(num_slots) -> the cache of a tiny policy."""
    config = make_tiny().model.config.text_config
    return lambda num_slots: evaluate.SlotCache(config, num_slots, torch.float64, "cpu", 4096)


def test_the_plan_of_two_slots_by_hand(make_cache):
    """The same two slots: the span, its mask, and where new keys are written."""
    cache = make_cache(4)
    plan = cache.plan(2, np.array([5, 6]), np.array([1, 2]))
    [span] = plan.spans
    assert (span.query_rows, span.slots) == (slice(0, 4), slice(2, 4))
    assert (span.width, span.num_columns) == (2, 8)
    # the rows of the query heads that share a key head stand together
    visible = [[column <= last for column in range(8)] for last in (5, 6, 6, 7)]
    repeated = [row for row in visible for _ in range(cache.queries_per_key)]
    half = len(repeated) // 2
    assert (span.mask[:, 0] == 0).tolist() == [repeated[:half], repeated[half:]]
    assert span.mask[span.mask != 0].unique().tolist() == [-np.inf]
    _, num_key_heads, _, head_size = cache.layers[0][0].shape
    ones = torch.ones(1, num_key_heads, 3, head_size, dtype=torch.float64)
    keys, values = plan.update(ones, 2 * ones, 0)
    assert keys[:, 0, :, 0].nonzero().tolist() == [[2, 5], [3, 6], [3, 7]]
    assert torch.equal(values, 2 * keys)


def test_each_span_has_its_own_length(make_cache):
    """And there is room for it, new tokens included."""
    cache = make_cache(4)
    plan = cache.plan(0, np.array([5, 250]), np.array([1, 50]))
    assert [span.num_columns for span in plan.spans] == [6, 300]
    assert cache.layers[0][0].shape[2] >= 300
    # the longest cache and the most new tokens are not in the same slot
    [span] = make_cache(2).plan(0, np.array([7, 6]), np.array([1, 2])).spans
    assert span.num_columns == span.mask.shape[-1] == 8


def test_only_a_slot_with_more_than_64_new_tokens_has_no_mask(make_cache):
    plan = make_cache(3).plan(0, np.array([0, 3, 9]), np.array([64, 60, 65]))
    assert [span.width for span in plan.spans] == [64, 65]
    assert [span.mask is None for span in plan.spans] == [False, True]


def test_no_more_room_is_made_than_is_needed(make_cache):
    cache = make_cache(2)
    cache.plan(0, np.array([250, 0]), np.array([1, 60]))
    assert cache.layers[0][0].shape[2] == 256


def attend_over(policy, num_cached, num_new, seed=0):
    """Attention of random queries over random keys and values in a cache: (what CachePlan.attend
    gives, the same by an explicit softmax), (N, H, D) each."""
    config = policy.model.config.text_config
    generator = torch.Generator().manual_seed(seed)
    cache = evaluate.SlotCache(config, len(num_cached), torch.float64, "cpu", 4096)
    plan = cache.plan(0, np.array(num_cached), np.array(num_new))
    N = sum(num_new)
    H, K, D = config.num_attention_heads, config.num_key_value_heads, sft.head_size(config)
    for tensor in cache.layers[0]:
        tensor.normal_(generator=generator)
    new_key = torch.randn(1, K, N, D, dtype=torch.float64, generator=generator)
    new_value = torch.randn(1, K, N, D, dtype=torch.float64, generator=generator)
    query = torch.randn(1, H, N, D, dtype=torch.float64, generator=generator)
    keys, values = plan.update(new_key, new_value, 0)
    ours = plan.attend(query, keys, values, D**-0.5)[0]

    theirs = []
    for slot, (cached, new) in enumerate(zip(num_cached, num_new)):
        first = len(theirs)
        # new ones lie after the cached ones
        for stored, written in ((keys, new_key), (values, new_value)):
            assert torch.equal(stored[slot, :, cached:cached + new],
                               written[0, :, first:first + new])
        for offset in range(new):
            visible = cached + offset + 1
            k = keys[slot, :, :visible].repeat_interleave(H // K, 0)        # (H, S, D)
            v = values[slot, :, :visible].repeat_interleave(H // K, 0)
            scores = k @ query[0, :, first + offset, :, None]               # (H, S, 1)
            theirs.append((scores.mul(D**-0.5).softmax(1) * v).sum(1))      # (H, D)
    return ours, torch.stack(theirs)


@pytest.mark.parametrize("num_cached, num_new", [
    ([0], [70]), ([90], [70]), ([5, 300, 0, 40], [1, 50, 33, 4]), ([9] * 11, [3] * 11),
    ([7, 7, 50, 50, 1], [32, 31, 40, 40, 0])], ids=str)
def test_attention_over_slots_equals_a_softmax(each_family, num_cached, num_new):
    """Prompts, observations after a conversation and short feeds, of neighbouring slots."""
    ours, theirs = attend_over(each_family, num_cached, num_new)
    assert (ours - theirs).abs().max() < 1e-12


@pytest.mark.parametrize("num_cached, num_new", [
    ([90], [70]), ([5, 300, 0, 40], [1, 50, 33, 4]),
    ([7, 7, 50, 50, 1], [32, 31, 40, 40, 0])], ids=str)
def test_attention_over_slots_of_an_untrained_policy(make_tiny, num_cached, num_new):
    ours, theirs = attend_over(make_tiny(), num_cached, num_new)
    assert (ours - theirs).abs().max() < 1e-12


def test_a_long_feed_builds_no_mask(make_cache):
    """3,000 new tokens after 1,000: masks of (heads, new, all) would take 190 MB, and more at
    32k."""
    cache = make_cache(2)
    cache.reserve(4096)
    with LiveBytes() as memory:
        plan = cache.plan(0, np.array([1000, 30]), np.array([3000, 4]))
    assert memory.peak < 1e6
    assert [span.mask is None for span in plan.spans] == [True, False]


def test_the_cache_given_is_the_cache_used(trained_policy, world):
    """A library that renamed the argument would ignore it, and use a cache of its own."""
    engine = evaluate.Engine(trained_policy, LIMITS, max_num_seqs=1)
    engine.run(tools.read_jsonl(world / "train.jsonl")[:1], 1, world)
    assert all(tensor[0, :, 0].abs().sum() > 0 for layer in engine.cache.layers for tensor in layer)


# ---- The engine: the conversations of a model that decodes alone --------------------------------


def turn_spans(rollout):
    """(first, last) of the tokens of every turn, last excluded, by the loss mask."""
    spans = []
    index = 0
    for in_loss, group in itertools.groupby(rollout.loss_mask):
        length = len(list(group))
        if in_loss:
            spans.append((index, index + length))
        index += length
    return spans


def zooms_like_generate(policy, rollouts):
    """Assert that every turn of greedy rollouts is what `generate` writes after the same
    conversation; count their zooms."""
    for rollout in rollouts:
        for start, end in turn_spans(rollout):
            ids = torch.tensor([rollout.token_ids[:start]])
            is_image = ids == policy.image_token_id
            images = []
            num_image_tokens = 0
            for patches, grid in rollout.with_images(policy).images:
                if num_image_tokens < is_image.sum().item():
                    images.append((patches, grid))
                    num_image_tokens += policy.num_image_tokens(grid)
            with library_attention(policy):
                reference = policy.model.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids),
                    mm_token_type_ids=is_image.long(),
                    pixel_values=torch.cat([patches for patches, _ in images]),
                    image_grid_thw=torch.tensor([grid for _, grid in images]),
                    do_sample=False, max_new_tokens=LIMITS.max_new_tokens,
                    suppress_tokens=policy.suppressed_ids)
            assert reference[0, start:].tolist() == rollout.token_ids[start:end]
    return sum("zoom" in turn for rollout in rollouts for turn in rollout.turns[:-1])


def sampler_trainer_gap(policy, rollouts):
    """Largest difference between log-probs that the engine recorded and those of the trainer, all
    conversations in one row."""
    recorded = torch.tensor([logprob for rollout in rollouts for logprob in rollout.logprobs],
                            dtype=torch.float64)
    batch = sft.collate(policy, [rollout.with_images(policy) for rollout in rollouts])
    with torch.no_grad():
        full = sft.token_logprobs(policy, batch, chunk_size=64)
    assert len(recorded) == len(full) == sum(sum(rollout.loss_mask) for rollout in rollouts)
    return (full - recorded).abs().max().item()


def test_greedy_equals_generate_token_for_token(trained_policy, world):
    """On the questions that the small policy has seen: most of them take it two zooms."""
    rows = tools.read_jsonl(world / "coldstart.jsonl")[:4]
    rollouts = evaluate.Engine(trained_policy, LIMITS, 4, greedy=True).run(rows, 1, world)
    assert zooms_like_generate(trained_policy, rollouts) >= 4   # not only first turns


@pytest.mark.parametrize("dtype, tolerance", [("float64", 1e-10), ("float32", 1e-4)])
def test_recorded_logprobs_equal_a_full_forward_pass(trained_folder, prompts, world, dtype,
                                                     tolerance):
    policy = sft.load_policy(str(trained_folder), "cpu", dtype, prompts)
    rollouts = play(policy, world, num_samples=3, max_num_seqs=6)
    assert sampler_trainer_gap(policy, rollouts) < tolerance


def test_released_families(each_family, world):
    """The question that the policy was trained on takes it two zooms: greedily like `generate`, and
    sampled with the trainer's log-probabilities, in two slots of different length."""
    rows = tools.read_jsonl(world / "coldstart.jsonl")[:1]
    greedy = evaluate.Engine(each_family, LIMITS, 1, greedy=True).run(rows, 1, world)
    assert zooms_like_generate(each_family, greedy) == 2
    sampled = evaluate.Engine(each_family, LIMITS, 2).run(rows, 2, world)
    assert sampler_trainer_gap(each_family, sampled) < 1e-12


def test_samples_do_not_depend_on_batch_slots_or_order(rollouts, trained_policy, world):
    rows = tools.read_jsonl(world / "train.jsonl")[:3]
    assert same(first_two_of_each(rollouts), play(trained_policy, world, max_num_seqs=1))
    assert same(rollouts, play(trained_policy, world, num_samples=6, max_num_seqs=5))
    alone = evaluate.Engine(trained_policy, LIMITS, 3).run([rows[2]], 6, world, prompt_numbers=[2])
    assert same(rollouts[12:], alone)


def test_seed_step_and_prompt_number_change_the_samples(rollouts, trained_policy, world):
    first = first_two_of_each(rollouts)
    rows = tools.read_jsonl(world / "train.jsonl")[:3]
    engine = evaluate.Engine(trained_policy, LIMITS, 8)
    assert same(first, engine.run(rows, 2, world))
    assert not same(first, play(trained_policy, world, seed=1))
    assert not same(first, play(trained_policy, world, step=1))
    assert not same(first, engine.run(rows, 2, world, prompt_numbers=[4, 5, 6]))


def test_a_new_step_is_that_of_a_new_engine(rollouts, trained_policy, world):
    """Another random stream; n-grams and counts of the step before are gone, and so is the cache,
    if its memory was needed."""
    rows = tools.read_jsonl(world / "train.jsonl")[:3]
    fresh = evaluate.Engine(trained_policy, LIMITS, 8, step=1)
    expected = fresh.run(rows, 2, world)
    engine = evaluate.Engine(trained_policy, LIMITS, 8)
    engine.run(rows[:1], 2, world)
    engine.begin_step(1)
    engine.free_cache()
    assert engine.cache is None
    again = engine.run(rows, 2, world)
    assert same(again, expected) and same_logprobs(again, expected)
    assert engine.counts == fresh.counts


class CountingEngine(evaluate.Engine):
    """Keeps the feeds of every forward pass."""

    def __init__(self, *args, **flags):
        super().__init__(*args, **flags)
        self.passes = []

    def forward(self, feeds, first_slot):
        self.passes.append(feeds)
        return super().forward(feeds, first_slot)


def test_a_prompt_is_encoded_once_and_a_conversation_keeps_its_cache(trained_policy, world):
    """Without drafts: a prompt's tokens are fed once for all samples, but for the last one; every
    other token is fed once, except the last of a conversation."""
    rows = tools.read_jsonl(world / "train.jsonl")[:2]
    engine = CountingEngine(trained_policy, LIMITS, 4, num_speculative_tokens=0)
    rollouts = engine.run(rows, 3, world)
    num_fed = sum(len(feed.token_ids) for feeds in engine.passes for feed in feeds)
    prompt_lengths = [rollout.loss_mask.index(True) for rollout in rollouts]
    num_prompt_tokens = sum(prompt_lengths[index] - 1 for index in (0, 3))
    num_later_tokens = sum(len(rollout.token_ids) - length
                           for rollout, length in zip(rollouts, prompt_lengths))
    assert num_fed == num_prompt_tokens + num_later_tokens
    assert max(len(rollout.turns) for rollout in rollouts) > 1


def test_a_step_feeds_no_more_images_than_a_context(trained_policy, world):
    """As many conversations wait for an image as there are slots: they are fed one after the other
    when together they are longer than --max_model_len, and results are the same."""
    limits = replace(LIMITS, max_model_len=420)
    expected = play(trained_policy, world, num_samples=6, max_num_seqs=1, limits=limits)
    engine = CountingEngine(trained_policy, limits, 16)
    again = engine.run(tools.read_jsonl(world / "train.jsonl")[:3], 6, world)
    assert same(again, expected)
    lengths = [sum(len(feed.token_ids) for feed in feeds if feed.images)
               for feeds in engine.passes]
    smallest = min(length for length in lengths if length > 0)
    assert max(lengths) <= 420 < 18 * smallest


class CacheOfAGpu(evaluate.SlotCache):
    """On the CPU what a GPU has: all memory at once, one span, columns in multiples of 8."""

    def __init__(self, config, num_slots, dtype, device, max_length):
        super().__init__(config, num_slots, dtype, device, max_length)
        self.max_span_slots = num_slots
        self.column_multiple = 8
        self.reserve(self.round_up(max_length))


def test_the_cache_of_a_gpu_gives_the_same_conversations(rollouts, trained_policy, world,
                                                         monkeypatch):
    """All slots attend in one call, over a number of columns that is a multiple of 8."""
    monkeypatch.setattr(evaluate, "SlotCache", CacheOfAGpu)
    spans = []

    class Watched(evaluate.CachePlan):
        def __init__(self, layers, plan_spans, *indices):
            super().__init__(layers, plan_spans, *indices)
            spans.extend(plan_spans)

    monkeypatch.setattr(evaluate, "CachePlan", Watched)
    again = play(trained_policy, world, num_samples=6, max_num_seqs=16)
    assert same(again, rollouts) and same_logprobs(again, rollouts)
    masked = [span for span in spans if span.mask is not None]
    assert max(len(span.mask) for span in masked) == 16
    assert all(span.mask.shape[-1] == span.num_columns for span in masked)
    assert {span.num_columns % 8 for span in masked} == {0}


@pytest.mark.parametrize("delay", [8, 10**6])
def test_an_image_waits_until_it_is_surely_prepared(rollouts, trained_policy, world, delay):
    """On a GPU at least 8 steps, unless nothing else can be fed. Conversations are the same."""
    engine = CountingEngine(trained_policy, LIMITS, 16)
    engine.image_delay = delay
    waits = []
    step_of_image = {}

    def schedule():
        for rollout in engine.slots:
            if rollout.pending_image is not None:
                step_of_image.setdefault(id(rollout.pending_image), engine.num_steps - 1)
        all_wait = all(rollout.pending_image is not None for rollout in engine.slots)
        feeds = evaluate.Engine.schedule(engine)
        for rollout, feed in zip(engine.slots, feeds):
            if feed.images:
                waits.append((engine.num_steps - step_of_image[id(rollout.pending_image)],
                              all_wait))
        return feeds

    engine.schedule = schedule
    again = engine.run(tools.read_jsonl(world / "train.jsonl")[:3], 6, world)
    assert same(again, rollouts) and same_logprobs(again, rollouts)
    assert all(all_wait or steps >= delay for steps, all_wait in waits)
    assert any(not all_wait for _, all_wait in waits) == (delay == 8)


def test_a_decoding_step_moves_four_tensors(trained_policy, world, monkeypatch):
    """Between host and device, each way: what is fed and where, where it attends, random numbers;
    ids with their log-probs. A step without images builds no other tensor from Python numbers."""
    moved = []
    steps = []

    class Counted(evaluate.Engine):
        def step(self):
            moved.clear()
            return super().step()

        def sample_tokens(self, logprobs, uniforms):
            sampled = super().sample_tokens(logprobs, uniforms)
            steps.append(sorted(moved))
            return sampled

        def schedule(self):
            feeds = super().schedule()
            moved.extend("image" for feed in feeds if feed.images)
            return feeds

    def watch(owner, name):
        inner = getattr(owner, name)

        def counted(*args, **kwargs):
            moved.append(name)
            return inner(*args, **kwargs)
        monkeypatch.setattr(owner, name, counted)

    for name in ("tensor", "from_numpy"):
        watch(torch, name)
    for name in ("tolist", "item", "numpy"):
        watch(torch.Tensor, name)
    Counted(trained_policy, LIMITS, 8).run(tools.read_jsonl(world / "train.jsonl")[:3], 2, world)
    decoding_steps = [names for names in steps if "image" not in names]
    assert len(decoding_steps) > 20
    for names in decoding_steps:
        assert names == ["from_numpy", "from_numpy", "tensor", "tolist"]


# ---- The engine: sampling -----------------------------------------------------------------------


def test_sampling_follows_the_distribution(make_tiny):
    """A random number selects the id whose interval of the cumulative distribution contains it; a
    suppressed id has no interval."""
    engine = evaluate.Engine(make_tiny(), LIMITS, 1)
    probs = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0], dtype=torch.float64)
    uniforms = [0.0, 0.2499, 0.25, 0.7499, 0.75, 1 - 2**-24]
    expected = [1, 1, 3, 3, 4, 4]
    ids, logprobs = engine.sample_tokens(probs.log().expand(6, -1), uniforms)
    assert ids == expected
    assert logprobs == pytest.approx(probs[expected].log().tolist(), abs=1e-12)
    assert all(type(token_id) is int for token_id in ids)
    assert type(logprobs) is list and all(type(logprob) is float for logprob in logprobs)
    # in float32 the second probability would be lost: 1/2 + 2**-26 is 1/2
    assert engine.sample_tokens(torch.tensor([[0.5, 2**-26, 0.5]]).log(), [0.5])[0] == [1]
    # many rows, each with its own number
    generator = torch.Generator().manual_seed(0)
    probs = torch.rand(200, 9, dtype=torch.float64, generator=generator)
    probs /= probs.sum(1, keepdim=True)
    uniforms = torch.rand(200, dtype=torch.float64, generator=generator).tolist()
    ids, logprobs = engine.sample_tokens(probs.log(), uniforms)
    expected = [int(np.searchsorted(row.cumsum(), uniform, side="right"))
                for row, uniform in zip(probs.numpy(), uniforms)]
    assert ids == expected
    assert logprobs == pytest.approx(probs.log()[range(200), expected].tolist())


@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_end_in_one_line(make_tiny, value, greedy):
    """One of them, in the last of three slots; not the -inf of a suppressed id."""
    policy = make_tiny()
    engine = evaluate.Engine(policy, LIMITS, greedy=greedy)
    logits = torch.zeros(3, 9)
    logits[:, 8] = -math.inf
    engine.sample_tokens(logits.log_softmax(-1), [0.5] * 3)
    logits[2, 7] = value
    with pytest.raises(tools.InputError, match=r"not finite \(NaN or infinite\) in torch\.float"):
        engine.sample_tokens(logits.log_softmax(-1), [0.5] * 3)


def test_a_suppressed_id_is_not_sampled_when_rounding_took_some_of_the_mass(make_tiny):
    engine = evaluate.Engine(make_tiny(), LIMITS, 1)
    ids, _ = engine.sample_tokens(torch.tensor([[0.5, 0.4999, 0.0]]).log(), [1 - 2**-24])
    assert ids == [1]


def test_greedy_takes_the_most_likely_token(make_tiny):
    engine = evaluate.Engine(make_tiny(), LIMITS, 1, greedy=True)
    probs = torch.tensor([[0.3, 0.4, 0.3], [0.6, 0.4, 0.0]])
    ids, logprobs = engine.sample_tokens(probs.log(), [0.99] * 2)
    assert ids == [1, 0]
    assert logprobs == pytest.approx(np.log([0.4, 0.6]).tolist())


# ---- The engine: turns, observations, limits ----------------------------------------------------


def test_mask_marks_exactly_what_was_sampled(rollouts, trained_policy):
    """The sampled tokens of a turn decode to its text; everything else is prompt, observation or
    refusal."""
    suppressed_ids = set(trained_policy.suppressed_ids)
    for rollout in rollouts:
        texts = []
        for first, last in turn_spans(rollout):
            turn_ids = [token_id for token_id in rollout.token_ids[first:last]
                        if token_id not in trained_policy.stop_ids]
            texts.append(trained_policy.tokenizer.decode(turn_ids, skip_special_tokens=False))
            assert suppressed_ids.isdisjoint(rollout.token_ids[first:last])
        assert texts == [turn["text"] for turn in rollout.turns]


def test_turn_ends_are_the_ends_of_the_sampled_tokens(rollouts):
    for rollout in rollouts:
        assert rollout.turn_ends == [last for _, last in turn_spans(rollout)]
        assert rollout.turn_ends[-1] == len(rollout.token_ids)


def test_conversation_equals_its_stored_row(rollouts, trained_policy, world):
    """Token in, token out: a stored trajectory, encoded again by the trainer, has the observations
    the engine fed."""
    def forced_ids(sequence):
        return [token_id for token_id, in_loss in zip(sequence.token_ids, sequence.loss_mask)
                if not in_loss]

    for rollout in rollouts:
        again = sft.encode(trained_policy, {**rollout.to_row(), "system": None}, world)
        assert forced_ids(again) == forced_ids(rollout)
        images = rollout.with_images(trained_policy).images
        assert [grid for _, grid in again.images] == [grid for _, grid in images]
        for (our_patches, _), (patches, _) in zip(again.images, images):
            assert torch.equal(our_patches, patches)
        assert (rollout.token_ids.count(trained_policy.image_token_id)
                == sum(trained_policy.num_image_tokens(grid) for _, grid in images))
        # memory does not grow with the number of rollouts
        assert rollout.views == rollout.images == rollout.uniforms == []


def test_finish_reasons_and_limits(rollouts, trained_policy):
    finish_reasons = {rollout.finish_reason for rollout in rollouts}
    assert finish_reasons <= set(evaluate.FINISH_REASONS)
    assert len(finish_reasons) >= 2
    for rollout in rollouts:
        assert len(rollout.turns) <= LIMITS.max_turns
        assert len(rollout.with_images(trained_policy).images) <= LIMITS.max_images
        assert (rollout.finish_reason == "answer") == (rollout.prediction is not None)
        if rollout.finish_reason == "over_turn":
            assert "zoom" in rollout.turns[-1] or "error" in rollout.turns[-1]


def test_a_policy_is_not_told_its_budget(rollouts, trained_policy, world):
    """With fewer turns the first turns are the same."""
    short = play(trained_policy, world, num_samples=6, limits=evaluate.Limits(2, 2, 48, 1200))
    for long_rollout, short_rollout in zip(rollouts, short, strict=True):
        assert short_rollout.turns[:1] == long_rollout.turns[:1]
        is_longer = len(long_rollout.turns) > 2 or long_rollout.finish_reason == "over_turn"
        assert (short_rollout.finish_reason == "over_turn") == is_longer


def test_a_blank_crop_is_black_and_nothing_else_changes(rollouts, trained_policy, world):
    """The original is shown as it is, so the first turn is the same; every crop that is fed is
    black. Rows keep the zooms, and a later zoom cuts from what was really there."""
    fed_images = []
    preprocess = trained_policy.preprocess_images

    def spy(views):
        fed_images.extend(views)
        return preprocess(views)

    spying_policy = replace(trained_policy)
    spying_policy.preprocess_images = spy
    blank = play(spying_policy, world, num_samples=6, max_num_seqs=16,
                 limits=replace(LIMITS, blank_crops=True))
    is_black = [view.getextrema() == ((0, 0),) * 3 for view in fed_images]
    num_zooms = sum(len(tools.view_boxes(rollout.to_row())) - 1 for rollout in blank)
    assert is_black.count(True) == num_zooms > 0
    assert is_black.count(False) == 3       # one original for each question
    assert [rollout.turns[0] for rollout in blank] == [rollout.turns[0] for rollout in rollouts]
    assert conversations(blank) != conversations(rollouts)


def test_over_context(rollouts, trained_policy, world):
    """Room for one turn and less than one observation."""
    max_model_len = max(rollout.loss_mask.index(True) for rollout in rollouts) + 48 + 20
    again = play(trained_policy, world, limits=evaluate.Limits(6, 6, 48, max_model_len))
    assert any(rollout.finish_reason == "over_context" for rollout in again)
    assert all(len(rollout.token_ids) <= max_model_len for rollout in again)


def test_a_context_without_room_for_a_turn_is_one_line(trained_policy, world):
    with pytest.raises(tools.InputError, match="--max_model_len"):
        play(trained_policy, world, limits=evaluate.Limits(6, 6, 48, 60))


def test_token_cap_ends_a_turn_as_void(trained_policy, world):
    for rollout in play(trained_policy, world, limits=evaluate.Limits(6, 6, 5, 1200)):
        assert rollout.finish_reason == "void"
        assert len(rollout.turns) == 1
        assert sum(rollout.loss_mask) == 5
        assert rollout.turn_ends == [len(rollout.token_ids)]


# ---- The engine: a decoding step of fixed shape -------------------------------------------------


class FixedShape(evaluate.Engine):
    """On the CPU, as on a GPU: decoding steps have a fixed shape, which is run eagerly. Counts the
    other passes: prompts and steps that feed an image or a long message."""

    def __init__(self, *args, **flags):
        super().__init__(*args, **flags)
        self.has_fixed_shape = True
        self.num_other_passes = 0

    def forward(self, feeds, first_slot):
        self.num_other_passes += 1
        return super().forward(feeds, first_slot)


@pytest.mark.parametrize("max_num_seqs, flags", [
    (16, {}), (5, {}), (16, {"num_speculative_tokens": 0}), (3, {"greedy": True}),
    (18, {"num_speculative_tokens": 7})], ids=str)
def test_a_fixed_shape_gives_the_same_conversations(trained_policy, world, monkeypatch,
                                                    max_num_seqs, flags):
    """Whatever the number of slots, with drafts and without. Nearly all steps have the shape, and
    there are columns to grow into."""
    monkeypatch.setattr(evaluate, "MIN_GRAPH_COLUMNS", 64)
    rows = tools.read_jsonl(world / "train.jsonl")[:3]
    expected = play(trained_policy, world, 6, 16, **flags)
    engine = FixedShape(trained_policy, LIMITS, max_num_seqs, **flags)
    again = engine.run(rows, 6, world)
    assert same(again, expected) and same_logprobs(again, expected)
    assert engine.num_steps > 2 * engine.num_other_passes


def test_a_fixed_shape_fits_every_family(each_family, world):
    rows = tools.read_jsonl(world / "train.jsonl")[:2]
    expected = evaluate.Engine(each_family, LIMITS, 3).run(rows, 2, world)
    engine = FixedShape(each_family, LIMITS, 3)
    again = engine.run(rows, 2, world)
    assert same(again, expected) and same_logprobs(again, expected)
    assert engine.num_steps > engine.num_other_passes


@pytest.mark.parametrize("num_columns, expected", [
    (1, 2048), (2048, 2048), (2049, 3072), (3073, 4096), (4097, 6144), (9000, 12288),
    (20_000, 20_004)])
def test_columns_of_a_graph_by_hand(num_columns, expected):
    decode_pass = evaluate.DecodePass.__new__(evaluate.DecodePass)
    decode_pass.cache = argparse.Namespace(length=20_004)
    assert decode_pass.round_up(num_columns) == expected


@pytest.mark.parametrize("name", RELEASED)
def test_a_recorded_step_never_waits_for_the_device(name):
    """The released models without weights: on the meta device an operation that needs a value
    (item, nonzero, a data-dependent shape) raises an error. Every tensor is on that device: one of the CPU
    would be copied while the graph is recorded."""
    config = AutoConfig.for_model(**copy.deepcopy(RELEASED[name]))
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16).eval()
    model.set_attn_implementation({"text_config": "per_conversation"})
    policy = argparse.Namespace(model=model, device=torch.device("meta"),
                                suppressed_index=torch.tensor([7], device="meta"))
    cache = evaluate.SlotCache(config.text_config, 16, torch.bfloat16, "meta", 4096)
    cache.reserve(4096)
    decode_pass = evaluate.DecodePass(policy, cache, evaluate.cache_argument(model), 5, False)
    devices = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            tensors = [x for x in tree_leaves((args, kwargs, result)) if torch.is_tensor(x)]
            devices.update(tensor.device.type for tensor in tensors)
            return result

    with torch.inference_mode(), Watch():
        decode_pass.body(2048)
    assert devices == {"meta"}


# ---- The engine: short slots first --------------------------------------------------------------


@pytest.mark.parametrize("short_model_len, num_set_aside", [(300, range(1, 6)),
                                                            (200, range(6, 19))], ids=str)
@pytest.mark.parametrize("engine_class", [evaluate.Engine, FixedShape])
def test_what_outgrows_its_slot_is_played_again_in_a_longer_one(
        rollouts, trained_policy, world, short_model_len, num_set_aside, engine_class):
    """Some or most conversations: they are the same, draws included, and every one ends once."""
    rows = tools.read_jsonl(world / "train.jsonl")[:3]
    engine = engine_class(trained_policy, LIMITS, 16, short_model_len=short_model_len)
    lengths = []
    feed_again = engine.feed_again

    def watch(slot, rollout):
        lengths.append(len(rollout.token_ids))
        assert engine.slot_length == 1200 and len(engine.slots) <= 16 * short_model_len // 1200
        feed_again(slot, rollout)

    engine.feed_again = watch
    again = engine.run(rows, 6, world)
    assert same(again, rollouts) and same_logprobs(again, rollouts)
    assert len(lengths) in num_set_aside
    assert all(length > short_model_len for length in lengths)
    # the same engine begins with short slots again
    again = engine.run(rows, 6, world)
    assert same(again, rollouts) and not engine.set_aside


@pytest.mark.parametrize("engine_class", [evaluate.Engine, FixedShape])
def test_a_prompt_that_needs_a_long_slot_waits_for_one(rollouts, trained_policy, world,
                                                       engine_class):
    """Short slots of 60 tokens hold no prompt of these questions: all are played in long ones."""
    rows = tools.read_jsonl(world / "train.jsonl")[:3]
    again = engine_class(trained_policy, LIMITS, 40, short_model_len=60).run(rows, 6, world)
    assert same(again, rollouts) and same_logprobs(again, rollouts)


def test_what_is_appended_meanwhile_is_played_in_short_slots(rollouts, trained_policy, world):
    """Questions that are asked while a long slot is played wait for a short one."""
    row, *other_rows = tools.read_jsonl(world / "train.jsonl")[:3]
    engine = evaluate.Engine(trained_policy, LIMITS, 16, short_model_len=250)
    new = evaluate.make_rollouts(other_rows, 6, world, [1, 2], trained_policy.prompts)
    slot_lengths = set()
    start_next = engine.start_next

    def watch(slot):
        started = start_next(slot)
        if started is not None and started in new and not started.turns:
            slot_lengths.add(engine.slot_length)
        return started

    engine.start_next = watch
    first = evaluate.make_rollouts([row], 6, world, [0], trained_policy.prompts)
    is_appended = False
    for _ in engine.play_all(first):
        if engine.slot_length == 1200 and not is_appended:
            engine.waiting += new
            is_appended = True
    assert is_appended and slot_lengths == {250}
    assert same(first + new, rollouts)


def test_set_aside_with_black_crops(trained_policy, world):
    """A conversation is fed the same pictures again."""
    limits = replace(LIMITS, blank_crops=True)
    expected = play(trained_policy, world, 6, 16, limits=limits)
    again = play(trained_policy, world, 6, 16, limits=limits, short_model_len=250)
    assert same(again, expected) and same_logprobs(again, expected)


# ---- The engine: which slot a conversation is in ------------------------------------------------


@pytest.mark.parametrize("lengths, slot, expected", [
    ([9, 8, 5, 7, 1, 3], 1, [9, 7, 5, 3, 1]), ([9, 8, 5, 7, 1, 3], 5, [9, 8, 5, 7, 1]),
    ([9, 8, 5, 7, 1, 3], 4, [9, 8, 5, 7, 3]), ([9, 8, 5], 2, [9, 8]), ([9], 0, [])], ids=str)
def test_slots_stay_sorted_when_one_is_evicted(make_tiny, monkeypatch, lengths, slot, expected):
    """The example of Engine.evict, with groups of two slots; keys and values move along."""
    monkeypatch.setattr(evaluate, "MAX_SPAN_SLOTS", 2)
    policy = make_tiny()
    engine = evaluate.Engine(policy, LIMITS, len(lengths))
    engine.cache = evaluate.SlotCache(policy.model.config.text_config, len(lengths), torch.float64,
                                      "cpu", 256)
    for index, length in enumerate(lengths):
        engine.slots.append(evaluate.Rollout(row={"answer": "1"}, num_cached_tokens=length))
        for tensor in engine.cache.layers[-1]:
            tensor[index, :, :length] = length
    engine.evict(slot)
    assert [rollout.num_cached_tokens for rollout in engine.slots] == expected
    for index, length in enumerate(expected):
        for tensor in engine.cache.layers[-1]:
            assert (tensor[index, :, :length] == length).all()


# ---- Drafts: conversations are the same without -------------------------------------------------


class Script(evaluate.NgramProposer):
    """Proposes what `propose(token_ids, max_tokens)` says, instead of what was learned."""

    def __init__(self, propose):
        super().__init__()
        self.propose = propose


def test_drafts_change_nothing(rollouts, undrafted):
    assert same(rollouts, undrafted) and same_logprobs(rollouts, undrafted)


@pytest.mark.parametrize("max_num_seqs, num_samples, num_speculative_tokens",
                         [(64, 6, 3), (1, 2, 8)])
def test_drafts_are_accepted_and_counted(undrafted, trained_policy, world, max_num_seqs,
                                         num_samples, num_speculative_tokens):
    engine = evaluate.Engine(trained_policy, LIMITS, max_num_seqs,
                             num_speculative_tokens=num_speculative_tokens)
    again = engine.run(tools.read_jsonl(world / "train.jsonl")[:3], num_samples, world)
    expected = undrafted if num_samples == 6 else first_two_of_each(undrafted)
    assert same(again, expected) and same_logprobs(again, expected)
    num_passes, num_draft_tokens, num_accepted = (engine.counts[name] for name in evaluate.COUNTS)
    assert num_passes + num_accepted == sum(sum(rollout.loss_mask) for rollout in again)
    assert 0 < num_accepted <= num_draft_tokens <= num_speculative_tokens * num_passes
    assert evaluate.draft_statistics(engine.counts) == {
        "mean_acceptance_length": 1 + num_accepted / num_passes,
        "acceptance_rate": num_accepted / num_draft_tokens}


def test_drafts_change_nothing_greedily(trained_policy, world):
    without = play(trained_policy, world, max_num_seqs=6, greedy=True, num_speculative_tokens=0)
    with_drafts = play(trained_policy, world, max_num_seqs=6, greedy=True, num_speculative_tokens=8)
    assert same(with_drafts, without) and same_logprobs(with_drafts, without)


def oracle(rollouts, wrong=False, beyond=()):
    """A propose() that knows the conversations: always right, or always wrong; `beyond` is added at
    the end of a turn."""
    next_id = {}
    for rollout in rollouts:
        for index, in_loss in enumerate(rollout.loss_mask):
            if in_loss:
                next_id[tuple(rollout.token_ids[:index])] = rollout.token_ids[index]

    def propose(token_ids, max_tokens):
        context = list(token_ids)
        draft = []
        while len(draft) < max_tokens and tuple(context) in next_id:
            token_id = next_id[tuple(context)]
            context.append(token_id)
            if wrong:
                token_id = 106 if token_id == 105 else 105
            draft.append(token_id)
        return (draft + list(beyond))[:max_tokens]
    return propose


def random_ids(policy):
    """A propose() of random ids, a tenth of them such as the policy may never write or as end a
    turn."""
    generator = np.random.default_rng(0)
    special_ids = sorted(policy.stop_ids) + policy.suppressed_ids

    def propose(token_ids, max_tokens):
        draft = []
        for _ in range(generator.integers(max_tokens + 1)):
            is_special = generator.random() < 0.1
            draft.append(int(generator.choice(special_ids) if is_special
                             else generator.integers(100, 500)))
        return draft
    return propose


@pytest.mark.parametrize("kind", ["wrong", "right", "random"])
def test_no_draft_however_bad_changes_a_conversation(undrafted, trained_policy, world, kind):
    """Always wrong; always right, up to and beyond the end of a turn; random, with image
    placeholders."""
    beyond = [trained_policy.im_end_id, 105, trained_policy.image_token_id, 105]
    propose = {"wrong": oracle(undrafted, wrong=True), "right": oracle(undrafted, beyond=beyond),
               "random": random_ids(trained_policy)}[kind]
    engine = CountingEngine(trained_policy, LIMITS, 16)
    engine.proposer = Script(propose)
    again = engine.run(tools.read_jsonl(world / "train.jsonl")[:3], 6, world)
    assert same(again, undrafted) and same_logprobs(again, undrafted)
    assert engine.counts["draft_tokens"] > 300
    acceptance_rate = evaluate.draft_statistics(engine.counts)["acceptance_rate"]
    # samples that begin alike differ later, so even the oracle is wrong at times
    assert acceptance_rate > 0.8 if kind == "right" else acceptance_rate < 0.1
    drafted_ids = set()
    for feeds in engine.passes:
        for feed in feeds:
            drafted_ids.update(feed.draft_ids)
    assert drafted_ids.isdisjoint({*trained_policy.suppressed_ids, *trained_policy.stop_ids})


@pytest.mark.parametrize("end", ["token cap", "end of the context"])
def test_drafts_end_where_the_conversation_must(undrafted, trained_policy, world, end):
    """A draft without end meets the cap of a turn, and the end of a context with no spare token."""
    limits = evaluate.Limits(6, 6, 5, 1200)
    if end == "end of the context":
        longest = max(undrafted, key=lambda rollout: len(rollout.turns))
        second_turn, _ = turn_spans(longest)[1]
        limits = evaluate.Limits(6, 6, 48, max_model_len=second_turn + 48)
    expected = play(trained_policy, world, num_samples=6, max_num_seqs=16, limits=limits,
                    num_speculative_tokens=0)
    engine = evaluate.Engine(trained_policy, limits, 16, num_speculative_tokens=50)
    engine.proposer = Script(oracle(expected, beyond=[105] * 50))
    again = engine.run(tools.read_jsonl(world / "train.jsonl")[:3], 6, world)
    assert same(again, expected) and same_logprobs(again, expected)
    assert {rollout.finish_reason for rollout in again} & {"void", "over_context"}
    assert all(len(rollout.token_ids) <= limits.max_model_len for rollout in again)


class PoisonedEngine(evaluate.Engine):
    """Makes all columns after a conversation absurd before every pass."""

    def forward(self, feeds, first_slot):
        for slot, feed in enumerate(feeds, first_slot):
            for layer in self.cache.layers:
                for tensor in layer:
                    tensor[slot, :, feed.num_cached_tokens:] = 1e30
        return super().forward(feeds, first_slot)


def test_nothing_stale_in_the_cache_is_seen(undrafted, trained_policy, world):
    """Rejected drafts stay in the cache, but no query sees them."""
    engine = PoisonedEngine(trained_policy, LIMITS, 16)
    engine.proposer = Script(random_ids(trained_policy))
    again = engine.run(tools.read_jsonl(world / "train.jsonl")[:3], 6, world)
    assert same(again, undrafted) and same_logprobs(again, undrafted)
    assert sampler_trainer_gap(trained_policy, again) < 1e-10


@pytest.mark.parametrize("num_left, proposed, expected", [
    (3, [7, 7, 7, 7], [7, 7]), (5, [7, 7, 7, 7], [7, 7, 7, 7]), (8, [7] * 9, [7, 7, 7, 7]),
    (3, [7, "image"], [7]), (3, ["stop", 7], []), (3, [], []), (2, [7, 7], [7]), (1, [7, 7], [])],
    ids=str)
def test_what_is_drafted_by_hand(make_tiny, num_left, proposed, expected):
    """Not the last token of a turn: with 3 left of a turn, 2 at most; and 4 at most by
    --num_speculative_tokens. Nothing that ends a turn, no image placeholder, nor what comes
    after it."""
    policy = make_tiny()
    special_ids = {"image": policy.image_token_id, "stop": policy.im_end_id}
    proposed_ids = [special_ids.get(token, token) for token in proposed]
    engine = evaluate.Engine(policy, evaluate.Limits(2, 2, 10, 100), 1, num_speculative_tokens=4)
    engine.proposer = Script(lambda token_ids, max_tokens: proposed_ids[:max_tokens])
    rollout = evaluate.Rollout(token_ids=[1] * (15 - num_left), turn_start=5)
    assert engine.draft_for(rollout) == expected


def test_without_speculative_tokens_nothing_is_drafted(make_tiny):
    engine = evaluate.Engine(make_tiny(), LIMITS, 1, num_speculative_tokens=0)
    engine.proposer = Script(lambda token_ids, max_tokens: [7])
    assert engine.draft_for(evaluate.Rollout(token_ids=[1] * 12, turn_start=5)) == []


class Verdict:
    """What accept() did with a draft after ids 5, 6, of which 5 is in the cache. All tokens that
    were fed end at position 2 + len(draft)."""

    def __init__(self, policy, draft, sampled, turn_start=2):
        self.engine = evaluate.Engine(policy, LIMITS, 1, num_speculative_tokens=0)
        self.rollout = evaluate.Rollout(token_ids=[5, 6], loss_mask=[False] * 2,
                                        num_cached_tokens=1, turn_start=turn_start)
        logprobs = [-0.5 * index for index in range(len(sampled))]
        self.is_over = self.engine.accept(self.rollout, draft, sampled, logprobs, 2 + len(draft))


@pytest.mark.parametrize("draft, sampled, appended", [
    ([7, 8, 9], [7, 8, 3, 4], [7, 8, 3]),       # 4 was sampled after 9, which was never written
    ([7, 8, 9], [7, 8, 9, 4], [7, 8, 9, 4]),
    ([7, 8, 9], [7, 3, 9, 4], [7, 3]),          # right again after a wrong one: no matter
    ([7], [6, 8], [6]), ([], [3], [3])], ids=str)
def test_what_is_accepted_of_a_draft_by_hand(make_tiny, draft, sampled, appended):
    """After 7, 8, 9 the policy sampled 7, 8, 3: two are right, and 3 is what it writes next. Of
    four fed tokens, up to position 5, the last one is forgotten."""
    verdict = Verdict(make_tiny(), draft, sampled)
    rollout = verdict.rollout
    num_accepted = len(appended) - 1
    assert not verdict.is_over
    assert rollout.token_ids == [5, 6, *appended]
    assert rollout.loss_mask == [False] * 2 + [True] * len(appended)
    assert rollout.logprobs == [-0.5 * index for index in range(len(appended))]
    assert rollout.num_cached_tokens == 2 + num_accepted
    assert rollout.next_position == 2 + num_accepted
    assert verdict.engine.counts == {"sequence_passes": 1, "draft_tokens": len(draft),
                                     "accepted_tokens": num_accepted}


def test_positions_go_back_by_what_was_rejected(make_tiny):
    """An image takes fewer positions than columns, and several tokens may have been pending."""
    engine = evaluate.Engine(make_tiny(), LIMITS, 1, num_speculative_tokens=0)
    for num_cached_tokens in (1, 0):
        rollout = evaluate.Rollout(token_ids=[5, 6], loss_mask=[False] * 2, turn_start=2,
                                   num_cached_tokens=num_cached_tokens)
        engine.accept(rollout, [7, 8, 9], [7, 8, 3, 4], [0.0] * 4, 25)
        assert (rollout.num_cached_tokens, rollout.next_position) == (4, 24)


def test_a_turn_is_over_when_it_is_full_or_stops(make_tiny):
    """A stop that was sampled after a rejected token does not count."""
    policy = make_tiny()
    stop = policy.im_end_id
    for stop_id in policy.stop_ids:
        assert Verdict(policy, [], [stop_id]).is_over
    # a stop token that differs from the draft is appended, and nothing after it
    verdict = Verdict(policy, [7], [stop, 8])
    rollout = verdict.rollout
    assert verdict.is_over and rollout.token_ids == [5, 6, stop]
    assert (rollout.loss_mask[2:], rollout.logprobs) == ([True], [0.0])
    assert (rollout.num_cached_tokens, rollout.next_position) == (2, 2)
    # one that was sampled after a wrong token does not count
    verdict = Verdict(policy, [7, 8, 9], [7, 3, 9, stop])
    rollout = verdict.rollout
    assert not verdict.is_over and rollout.token_ids == [5, 6, 7, 3]
    assert (rollout.loss_mask[2:], rollout.logprobs) == ([True, True], [0.0, -0.5])
    assert (rollout.num_cached_tokens, rollout.next_position) == (3, 3)
    # full
    verdict = Verdict(policy, [7], [7, 8], turn_start=4 - LIMITS.max_new_tokens)
    assert verdict.is_over and verdict.engine.counts["accepted_tokens"] == 1
    assert Verdict(policy, [7], [7, stop], turn_start=4 - LIMITS.max_new_tokens).is_over
    assert not Verdict(policy, [7], [7, 8], turn_start=5 - LIMITS.max_new_tokens).is_over


def test_every_token_is_learned_once(make_tiny):
    """The proposer is told of every token that was accepted, also the first and last of a turn."""
    policy = make_tiny()
    engine = evaluate.Engine(policy, LIMITS, 1)
    learned = []
    engine.proposer.update = lambda token_ids, start: learned.extend(token_ids[start:])
    rollout = evaluate.Rollout(token_ids=[5, 6], loss_mask=[False] * 2, num_cached_tokens=1,
                               turn_start=2)
    for draft, sampled in (([], [7]), ([8], [8, 9]), ([4], [policy.im_end_id, 4])):
        engine.accept(rollout, draft, sampled, [-0.5 * token_id for token_id in sampled], 9)
    assert learned == rollout.token_ids[2:] == [7, 8, 9, policy.im_end_id]
    assert rollout.logprobs == [-0.5 * token_id for token_id in learned]    # of all turns


# ---- Drafts: the table of n-grams ---------------------------------------------------------------


def make_proposer(*updates, **settings):
    """A proposer of 1- and 2-grams that has seen each (token_ids, start, times)."""
    proposer = evaluate.NgramProposer(ngram_sizes=(1, 2), **settings)
    for token_ids, start, times in updates:
        for _ in range(times):
            proposer.update(token_ids, start)
    return proposer


def test_a_turn_is_proposed_after_it_was_written_once():
    """Hit rates begin at 0.7; 0.7 * 0.7 = 0.49, and a third token would be right with 0.34."""
    assert make_proposer().propose([0, 9], 4) == []
    proposer = make_proposer(([0, 0, 9, 1, 2, 3], 3, 1))
    assert proposer.propose([0, 9], 8, min_probability=0.4) == [1, 2]
    assert proposer.propose([0, 9], 8) == [1]
    assert proposer.propose([7, 7], 8) == []


def test_a_guess_that_is_often_wrong_is_replaced():
    """The unigram first, then the bigram."""
    proposer = make_proposer(([0, 0, 9, 1, 2, 3], 3, 1), ([8, 9, 4], 2, 2))
    assert proposer.propose([8, 9], 1) == [4]
    assert proposer.propose([7, 9], 1, min_probability=0.4) == [1]
    for _ in range(5):
        proposer.update([8, 9, 5], 2)
    assert proposer.propose([8, 9], 1) == proposer.propose([7, 9], 1) == [5]


def test_the_hit_rate_moves_by_a_fifth():
    """0.7 -> 0.56, wrong -> 0.648, right; and 0.7 is at least 0.7."""
    proposer = make_proposer(([8, 9, 4], 2, 1))
    assert proposer.propose([8, 9], 1, min_probability=0.7) == [4]
    proposer.update([8, 9, 5], 2)
    assert proposer.guesses[(9,)] == (4, pytest.approx(0.56))
    proposer.update([8, 9, 4], 2)
    assert proposer.guesses[(9,)] == (4, pytest.approx(0.648))
    # from 0.7: right, right, right; four times wrong is 0.287, and 5 replaces 4
    for token_ids, expected in (([4] * 4, (4, 0.8464)), ([4, 4, 5, 4], (4, 0.6864)),
                                ([4, 5, 5, 5], (4, 0.3584)), ([4, 5, 5, 5, 5], (5, 0.7)),
                                ([4, 5, 5, 5, 5, 5], (5, 0.76))):
        proposer = make_proposer(*[([9, token_id], 1, 1) for token_id in token_ids])
        assert proposer.guesses[(9,)] == (expected[0], pytest.approx(expected[1]))


def test_a_long_ngram_is_added_when_its_end_was_there_before():
    proposer = make_proposer(([8, 9, 4], 2, 1))
    assert set(proposer.guesses) == {(9,)}
    proposer.update([8, 9, 4], 2)
    assert set(proposer.guesses) == {(9,), (8, 9)}


def test_the_longest_ngram_decides_even_if_a_shorter_one_is_right_more_often():
    """The bigram 8 9 wavers between 4 and 5, after 9 alone 4 is sure."""
    proposer = make_proposer(([8, 9, 4], 2, 2))
    assert proposer.propose([8, 9], 1, min_probability=0.7) == [4]
    proposer = make_proposer(([8, 9, 4], 2, 2), ([7, 9, 4], 2, 6), ([8, 9, 5], 2, 3),
                             ([7, 9, 4], 2, 6))
    assert proposer.propose([7, 9], 1) == [4]
    assert proposer.propose([8, 9], 1) == []


def test_a_draft_has_at_most_max_tokens_and_leaves_the_conversation_alone():
    proposer = make_proposer(([0, 9, 1, 2, 3], 2, 1))
    token_ids = [0, 9]
    assert proposer.propose(token_ids, 1, min_probability=0.1) == [1]
    assert proposer.propose(token_ids, 0) == []
    assert token_ids == [0, 9]


def test_a_full_table_is_cleared_and_continues_to_learn():
    proposer = make_proposer(max_guesses=20)
    for token_id in range(100):
        proposer.update([token_id, token_id, token_id], 2)
        assert len(proposer.guesses) <= 20 + 2
    for _ in range(2):
        proposer.update([9, 4], 1)
    assert proposer.propose([9], 1) == [4]
    # a table of exactly max_guesses is not too large
    proposer = evaluate.NgramProposer(ngram_sizes=(1,), max_guesses=2)
    for token_ids in ([0, 1], [1, 2], [0, 1]):
        proposer.update(token_ids, 1)
    assert set(proposer.guesses) == {(0,), (1,)}


# ---- Avg@K --------------------------------------------------------------------------------------


def result(question_id, reward, num_turns, **fields):
    """A trajectory row."""
    return {"id": question_id, "reward": reward, "turns": [{"text": ""}] * num_turns,
            "finish_reason": "answer", **fields}


TWO_QUESTIONS = [result("a", 1.0, 2), result("a", 1.0, 5), result("b", 1.0, 6), result("b", 0.0, 1)]


@pytest.mark.parametrize("budget, accuracy", [(3, 0.25), (6, 0.75)])
def test_avg_at_k_by_hand(budget, accuracy):
    """Two questions, two samples each. Within 3 turns: (1 + 0)/2 and 0 -> 0.25; within 6: 1 and 0.5
    -> 0.75. The deviation of (0.5, 0) and of (1, 0.5) is 0.3536; over sqrt 2 it is 0.25."""
    assert evaluate.avg_at_k(TWO_QUESTIONS, budget) == pytest.approx((accuracy, 0.25))


def test_samples_that_agree_are_no_more_evidence_than_one():
    """The deviation of (1, 0) is 0.7071."""
    agreeing = [result("a", 1.0, 2), result("a", 1.0, 2), result("b", 0.0, 2), result("b", 0.0, 2)]
    assert evaluate.avg_at_k(agreeing, 3) == pytest.approx((0.5, 0.5))
    # one question says nothing of its error
    assert evaluate.avg_at_k(agreeing[:2], 3) == (1.0, 0.0)


def test_a_question_counts_once_however_many_samples_it_has():
    """Also if two questions are about one image."""
    uneven = [result("a", 1.0, 1, image="x"), *[result("b", 0.0, 1, image="x")] * 3]
    assert evaluate.avg_at_k(uneven, 3) == pytest.approx((0.5, 0.5))
    # in any order of the rows
    mixed = [result("a", 1.0, 1), result("b", 0.0, 1),
             result("a", 0.0, 1, finish_reason="over_turn")]    # unfinished is not correct
    assert evaluate.accuracy_per_question(mixed, 3) == {"a": 0.5, "b": 0.0}


def test_one_question_has_no_error():
    assert evaluate.avg_at_k([result("a", 1.0, 1)], 1) == (1.0, 0.0)


def test_what_was_not_scored_is_not_wrong():
    rows = [result("a", 1.0, 1), result("a", None, 1), result("b", None, 1), result("c", 0.0, 1)]
    assert evaluate.accuracy_per_question(rows, 1) == {"a": 1.0, "c": 0.0}
    assert evaluate.accuracy_per_question(rows[2:3], 1) == {}


def zooms_to(*boxes, reward=1.0, target=(0.5, 0.5, 0.75, 0.75)):
    """A conversation that zooms into these boxes of the original and then answers."""
    turns = [{"text": "", "zoom": {"bbox_2d": list(box), "source": "original_image"}}
             for box in boxes]
    return {**result("a", reward, 1), "turns": [*turns, {"text": ""}], "target_bbox": list(target)}


@pytest.mark.parametrize("boxes, is_seen", [
    ([(0.5, 0.5, 1.0, 1.0)], True),
    ([(0.51, 0.5, 0.75, 0.75)], True),          # 96% of the target
    ([(0.53, 0.5, 0.75, 0.75)], False),         # 88%
    ([(0.0, 0.0, 0.5, 0.5)], False),
    ([(0.0, 0.8, 0.3, 1.0)], False),            # beyond two of its edges
    ([(0.5, 0.5, 1.0, 1.0), (0.0, 0.0, 0.5, 0.5)], False),     # the last one counts
    ([], False)], ids=str)                      # seen from afar only
def test_the_last_crop_holds_the_target(boxes, is_seen):
    assert evaluate.target_in_last_crop(zooms_to(*boxes)) == is_seen


def test_target_seen_is_a_share_of_the_right_answers(capsys):
    """By hand: three right answers, of which two have looked; a wrong one does not count, and
    neither does a question whose box nobody knows."""
    target = (0.5, 0.5, 0.75, 0.75)
    rows = [zooms_to(target), zooms_to(target), zooms_to((0.0, 0.0, 0.5, 0.5)),
            zooms_to((0.0, 0.0, 0.5, 0.5), reward=0.0), result("b", 1.0, 1)]
    assert evaluate.target_seen(rows) == pytest.approx(2 / 3)
    assert evaluate.target_seen(TWO_QUESTIONS) is None
    table = evaluate.summarise({"x": rows, "y": TWO_QUESTIONS}, [6])
    evaluate.print_table(table, [6], 1)
    head, _, x, y, mean = capsys.readouterr().out.splitlines()[1:6]
    column = head.split(" | ").index("target seen")
    assert [line.split(" | ")[column] for line in (x, y, mean)] == ["66.7", "", ""]


def test_levels_weigh_the_same():
    table = evaluate.summarise({"easy": TWO_QUESTIONS, "hard": TWO_QUESTIONS}, [3, 6])
    assert table["mean"]["accuracy"] == {"3": 0.25, "6": 0.75}
    assert table["mean"]["standard_error"]["6"] == pytest.approx(0.25 / 2**0.5)
    assert table["easy"]["mean_turns"] == 3.5
    assert table["easy"]["mean_turns_correct"] == pytest.approx(13 / 3)
    assert table["easy"]["finish_reason"] == {"answer": 1.0, "void": 0.0, "over_turn": 0.0,
                                              "over_context": 0.0}


def unscored_level():
    """Question a: right, unscored; b: wrong, right; c: unscored twice."""
    rows = []
    for question_id, rewards in (("a", (1.0, None)), ("b", (0.0, 1.0)), ("c", (None, None))):
        for sample_number, reward in enumerate(rewards):
            rows.append(result(question_id, reward, 2, sample=sample_number))
    return rows


def test_unscored_samples_are_left_out_and_counted(capsys):
    """By hand: a 1, b 1/2, c left out."""
    rows = unscored_level()
    assert evaluate.avg_at_k(rows, 2) == pytest.approx((0.75, 0.25))
    table = evaluate.summarise({"x": rows}, [1, 2])
    assert table["x"]["unscored"] == 3
    assert table["x"]["samples"] == 6
    assert table["x"]["accuracy"] == {"1": 0.0, "2": 0.75}
    evaluate.print_table(table, [1, 2], 2)
    assert "x: 3 of 6 samples have no score" in capsys.readouterr().out


def test_a_question_with_an_unscored_sample_has_no_pass_rate():
    assert evaluate.pass_rates(unscored_level(), 2) == [{"id": "b", "pass_rate": 0.5, "samples": 2}]


def test_a_category_without_a_score_is_left_out():
    rows = [dict(row, category="mixed" if row["id"] == "a" else "unscored")
            for row in unscored_level() if row["id"] != "b"]
    assert list(evaluate.summarise({"x": rows}, [2])["x"]["categories"]) == ["mixed"]


def test_a_level_without_a_score_is_one_line():
    rows = [row for row in unscored_level() if row["reward"] is None]
    with pytest.raises(tools.InputError, match="x: no sample has a score"):
        evaluate.summarise({"x": rows}, [2])


def test_categories_are_printed_apart(capsys):
    """V* is scored by category, too."""
    rows = [result("1", 1.0, 1, source="vstar", category="direct_attributes"),
            result("2", 0.0, 1, source="vstar", category="relative_position"),
            result("3", 0.0, 1, source="vstar", category="relative_position")]
    table = evaluate.summarise({"vstar": rows}, [1])
    assert table["vstar"]["benchmark"] == "vstar"
    evaluate.print_table(table, [1], 1)
    assert ("| direct_attributes | 100.0 (0.0) |\n| relative_position | 0.0 (0.0) |"
            in capsys.readouterr().out)


def test_rows_with_a_cycle_are_scored_as_hr_bench_does():
    """Cycle 1 has 2 of 2 right, cycle 2 0 of 1: the score is 1/2, not 2/3; the error is over
    images."""
    rows = [result("1", 1.0, 1, image="a", cycle="1", category="single"),
            result("2", 1.0, 1, image="b", cycle="1", category="cross"),
            result("3", 0.0, 1, image="a", cycle="2", category="single")]
    table = evaluate.summarise({"4k": rows}, [1])
    assert table["4k"]["accuracy"]["1"] == 0.5
    assert table["4k"]["standard_error"]["1"] == pytest.approx(0.25)
    assert table["4k"]["categories"] == {"cross": (1.0, 0.0), "single": pytest.approx((0.5, 0.0))}


# ---- The command --------------------------------------------------------------------------------


def test_command_line_two_processes_equal_one(trained_folder, world, tmp_path):
    """The table and trajectories are the same for 1 and 2 processes, with drafts and without."""
    common = ["evaluate.py", "--model", trained_folder, "--data", world / "train.jsonl",
              "--num_samples", 2, "--budgets", 1, 2, 4, "--dtype", "float64",
              "--max_new_tokens", 48, "--max_num_seqs", 4, "--limit", 4]
    one = run_script(*common, "--out", tmp_path / "one")
    run_script(*common, "--out", tmp_path / "two", "--num_speculative_tokens", 0, nproc=2)
    for name in ("train.jsonl", "table.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert "T=4" in one.stdout
    assert "finished in" in one.stdout
    assert not list(tmp_path.glob("*/partial*"))
    rows = tools.read_jsonl(tmp_path / "one/train.jsonl", tools.check_trajectory)
    assert len(rows) == 8


def test_a_killed_evaluation_continues_where_it_was(trained_folder, world, tmp_path):
    """Killed in its second level: the first is not played again, and the results are those of an
    uninterrupted run. A row of other questions is not taken over."""
    rows = tools.read_jsonl(world / "train.jsonl")
    tools.write_jsonl(world / "a.jsonl", rows[:2])
    tools.write_jsonl(world / "b.jsonl", rows[2:4])
    common = ["evaluate.py", "--model", trained_folder, "--data", world / "a.jsonl",
              world / "b.jsonl", "--num_samples", 2, "--budgets", 2, "--dtype", "float64",
              "--max_new_tokens", 24, "--max_num_seqs", 1]
    whole = tmp_path / "whole"
    cut = tmp_path / "cut"
    run_script(*common, "--out", whole)
    process = Forked([*common, "--out", cut])
    crash.wait_until(process, lambda: len(list(cut.glob("partial.*"))) == 2)
    crash.kill(process)
    assert 4 in [len(path.read_bytes().splitlines()) for path in cut.glob("partial.*")]
    other = cut / "partial.00000000.0.jsonl"    # of a run that is not finished yet
    other.write_text("{}\n")
    again = run_script(*common, "--out", cut)
    assert "a: 0/0 " in again.stderr            # nothing left to play in the first level
    for name in ("a.jsonl", "b.jsonl", "table.json"):
        assert (whole / name).read_bytes() == (cut / name).read_bytes()
    assert list(cut.glob("partial*")) == [other]


def test_other_results_are_moved_not_replaced_or_mixed(tmp_path):
    """The same evaluation again replaces its results. One with fewer questions, with other levels
    or of another model of the same name moves them."""
    def write(levels, model="a/sft"):
        args = argparse.Namespace(out=tmp_path, model=model, budgets=[1], num_samples=1,
                                  data=[], judge=None)
        engine = argparse.Namespace(counts=collections.Counter())
        evaluate.write_results(levels, engine, args)
        return [sorted(path.name for path in folder.iterdir() if path.is_file())
                for folder in (tmp_path, *sorted(tmp_path.glob("old_results/*")))]

    def files(*levels):
        endings = (".jsonl", ".rates.jsonl")
        return sorted([f"{level}{ending}" for level in levels for ending in endings]
                      + ["settings.json", "table.json"])

    rows = [result("1", 1.0, 1), result("2", 0.0, 1)]
    assert write({"easy": rows, "hard": rows}) == [files("easy", "hard")]
    assert write({"easy": rows, "hard": rows}) == [files("easy", "hard")]
    assert write({"easy": rows[:1]}) == [files("easy"), files("easy", "hard")]
    assert write({"easy": rows[:1]}, "b/sft") == [files("easy"), files("easy", "hard"),
                                                 files("easy")]
    assert tools.read_jsonl(tmp_path / "old_results/1/hard.jsonl") == rows
    # results of before there were settings
    (tmp_path / "settings.json").unlink()
    (tmp_path / "table.json").write_text('{"easy": {}}')
    assert len(write({"easy": rows[:1]}, "b/sft")) == 4
    # where the user has removed a folder, its number is free
    shutil.rmtree(tmp_path / "old_results/1")
    assert len(write({"easy": rows, "hard": rows})) == 4
    # a kill in the middle: the next run moves the rest
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "rename", interrupted_after(2, Path.rename))
        with pytest.raises(KeyboardInterrupt):
            write({"easy": rows})
    assert write({"easy": rows})[0] == files("easy")


def interrupted_after(count, function):
    """Return the function, which raises KeyboardInterrupt instead from call count + 1 on."""
    calls = []

    def call(*args):
        calls.append(args)
        if len(calls) > count:
            raise KeyboardInterrupt
        return function(*args)
    return call


class ScriptedPlayer:
    """A player whose samples have these scores; rewards[(question, sample)] (default: 1). played:
    "1a 1b " are both samples of question 1."""

    def __init__(self):
        self.rewards = {}
        self.played = ""
        self.judge = None

    def play_all(self, rollouts):
        for rollout in rollouts:
            key = (rollout.row["id"], rollout.sample_number)
            self.played += f"{key[0]}{'ab'[key[1]]} "
            rollout.reward = self.rewards.get(key, 1.0)
            yield rollout


@pytest.fixture
def play_again(tmp_path):
    """play_again(player, level=, settings=, questions=) -> the questions that were played."""
    def play_again(player, level="a", settings="x", questions="123", max_num_seqs=1):
        args = argparse.Namespace(out=tmp_path, num_samples=2, max_num_seqs=max_num_seqs, model="m",
                                  settings=settings, data=[], judge=None)
        rows = [{"id": question_id} for question_id in questions]
        path = Path(f"{level}.jsonl")
        digest = results_folder.run_digest(level, rows, args, {})
        player.played = ""
        process = argparse.Namespace(rank=0, world_size=1)
        results = evaluate.play_level(player, path, rows, digest, args, process, tools.PROMPTS)
        assert ([(row["id"], row["sample"]) for row in results]
                == [(question_id, sample) for question_id in questions for sample in range(2)])
        return player.played
    return play_again


EVERYTHING = "1a 1b 2a 2b 3a 3b "


def test_only_samples_without_a_score_are_played_again(play_again, tmp_path):
    """What other processes have left counts, whatever their number."""
    player = ScriptedPlayer()
    player.rewards = {("1", 1): 0.0, ("2", 1): None}
    assert play_again(player) == EVERYTHING
    assert play_again(player) == "2b "
    player.rewards = {}
    assert play_again(player) == "2b "
    assert play_again(player) == ""
    for path in tmp_path.glob("partial.*.0.jsonl"):
        path.rename(path.with_name(path.name.replace(".0.", ".7.")))
    assert play_again(player) == ""


def test_other_settings_questions_or_levels_start_over(play_again):
    player = ScriptedPlayer()
    assert play_again(player) == EVERYTHING
    assert play_again(player, level="b") == EVERYTHING
    assert play_again(player, settings="y") == EVERYTHING
    assert play_again(player, questions="12") == "1a 1b 2a 2b "


def test_another_model_starts_over(tmp_path):
    """Also one in several files, that was written into the same folder. The log is no part of
    it."""
    args = argparse.Namespace(model=str(tmp_path), data=[], judge=None)
    digests = set()
    for name in ("config.json", "model-00001-of-00002.safetensors",
                 "model-00002-of-00002.safetensors"):
        (tmp_path / name).write_text("old")
        digests.add(results_folder.run_digest("a", [], args, {}))
    stat = (tmp_path / name).stat()
    os.utime(tmp_path / name, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1000))
    digests.add(results_folder.run_digest("a", [], args, {}))
    assert len(digests) == 4
    (tmp_path / "metrics.jsonl").write_text("a step")
    assert results_folder.run_digest("a", [], args, {}) in digests


def test_every_conversation_is_saved_as_it_ends(play_again, tmp_path):
    """The fourth conversation of a block of six is interrupted: three are in the file, and the
    other three are played by the next run."""
    class Interrupted(ScriptedPlayer):
        def play_all(self, rollouts):
            for number, rollout in enumerate(super().play_all(rollouts)):
                if number == 3:
                    raise KeyboardInterrupt
                yield rollout

    with pytest.raises(KeyboardInterrupt):
        play_again(Interrupted(), max_num_seqs=64)
    [path] = tmp_path.glob("partial.*")
    assert [(row["id"], row["sample"]) for row in tools.read_jsonl(path)] == [
        ("1", 0), ("1", 1), ("2", 0)]
    assert play_again(ScriptedPlayer(), max_num_seqs=64) == "2b 3a 3b "


def test_what_waits_for_the_judge_is_saved_with_its_verdict(play_again, tmp_path):
    """Never without a score: it would be played again."""
    class Judged(ScriptedPlayer):
        def play_all(self, rollouts):
            self.judge = self
            self.waiting = rollouts[1]
            for rollout in super().play_all(rollouts):
                rollout.reward = None if rollout is self.waiting else rollout.reward
                yield rollout

        def collect_verdicts(self):
            """None has come yet."""

        def wait(self):
            self.waiting.reward = 0.5

    play_again(Judged(), questions="1")
    [path] = tmp_path.glob("partial.*")
    rewards = {row["sample"]: row["reward"] for row in tools.read_jsonl(path)}
    assert rewards == {0: 1.0, 1: 0.5}


@pytest.mark.parametrize("flags, words", [
    (["--data", "q/easy.jsonl", "r/easy.jsonl"], "must differ"),
    (["--data", "q/mean.jsonl"], "mean"),
    (["--data", "q/easy.jsonl", "--out", "q"], "would overwrite"),
    (["--limit", -1], "--limit -1"), (["--seed", -1], "--seed"), (["--budgets", 0, 2], "--budgets"),
    (["--max_pixels", 0], "--max_pixels"),
    (["--greedy"], "--greedy plays every sample of a question alike: add --num_samples 1"),
    (["--max_images", 1], "--max_images 1 allows no zoom"),
    (["--max_new_tokens", 100000], "--max_new_tokens 100000 leaves no room for a question in "
     "--max_model_len 4096: lower the first or raise the second"),
    (["--model_name", "x"], "--model_name cannot be used unless --model is the URL of a server"),
    (["--model", "http://h/v1", "--dtype", "float32"], "--dtype cannot be used with a server"),
], ids=str)
def test_a_bad_flag_of_evaluate_is_one_line(monkeypatch, flags, words):
    monkeypatch.setattr("sys.argv", ["evaluate.py", *map(str, flags)])
    with pytest.raises(tools.InputError, match=words):
        evaluate.parse_args()


def test_the_flag_for_blank_crops_reaches_the_player(monkeypatch, trained_folder, prompts):
    """And its results have a folder of their own."""
    monkeypatch.setattr("sys.argv", ["evaluate.py", "--model", str(trained_folder / "."),
                                     "--blank_crops"])
    args = evaluate.parse_args()
    assert args.out == Path("results") / f"{trained_folder.name}-blank"
    process = sft.Process(0, 1, torch.device("cpu"), 0)
    assert evaluate.make_player(args, prompts, process).limits.blank_crops
    monkeypatch.setattr("sys.argv", ["evaluate.py", "--model", str(trained_folder)])
    args = evaluate.parse_args()
    assert args.out == Path("results") / trained_folder.name
    assert not evaluate.make_player(args, prompts, process).limits.blank_crops


def test_missing_model_says_which_command_makes_it():
    completed = run_script("evaluate.py", "--model", "checkpoints/nothing_here", check=False)
    assert completed.returncode == 1
    assert "rl.py" in completed.stderr and "Traceback" not in completed.stderr


def test_corrupt_image_is_one_line(trained_folder, world, tmp_path):
    image = world / tools.read_jsonl(world / "train.jsonl")[0]["image"]
    (tmp_path / "bad.jpg").write_bytes(image.read_bytes()[:500])
    tools.write_jsonl(tmp_path / "q.jsonl",
                      [{"id": "1", "image": "bad.jpg", "question": "?", "answer": "1"}])
    completed = run_script("evaluate.py", "--model", trained_folder, "--data",
                           tmp_path / "q.jsonl", "--out", tmp_path / "o", check=False)
    assert completed.returncode == 1
    assert "q.jsonl:1: " in completed.stderr and "bad.jpg" in completed.stderr
    assert "Traceback" not in completed.stderr
