"""Specification of GRPO with over-turn masking: numbers worked by hand, an independent reference,
float64 autograd, and real runs on one and two processes."""

import argparse
import collections
import copy
import doctest
import json
import math
import random
import re
import runpy
import shlex
import signal
import statistics
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import rl
import sft
import tools
from extras import crash, run_folder
from support.launch import ROOT, Forked, run_script
from support.models import largest_difference
from support.servers import ChatServer


def masks(*texts):
    """Return a bool tensor with a row per text, True where it has a 1."""
    return torch.tensor([[letter == "1" for letter in text] for text in texts])


def test_the_examples_in_docstrings_print_what_they_say():
    results = doctest.testmod(rl)
    assert results.attempted >= 5 and results.failed == 0


# ---- Advantages ---------------------------------------------------------------------------------


@pytest.mark.parametrize("rewards, kept, baseline, eps, expected", [
    # mean 1/4, unbiased deviation 1/2
    pytest.param([1, 0, 0, 0], "1100", "group", 0.0, [1.5, -0.5, 0, 0], id="group"),
    # without the two unfinished ones: r = (1, 0), mean 1/2, deviation sqrt(1/2)
    pytest.param([1, 0, 0, 0], "1100", "completed", 0.0, [0.5**0.5, -(0.5**0.5), 0, 0],
                 id="completed"),
    # r = (1, 0, 1/2, 1/2), deviation sqrt(1/6); b = 1/2 whatever the mean is
    pytest.param([1, 0, 0, 0], "1100", 0.5, 0.0, [1.5**0.5, -(1.5**0.5), 0, 0], id="number"),
    # b = 0; r = (1, 0, 0, 0), deviation 1/2
    pytest.param([1, 0, 0, 0], "1100", 0.0, 0.0, [2, 0, 0, 0], id="number-0"),
    # eps is added to the deviation: (1 - 1/4) / (1/2 + 1/2)
    pytest.param([1, 0, 0, 0], "1100", "group", 0.5, [0.75, -0.25, 0, 0], id="eps"),
    # a number below 1: right answers still gain. r = (1, 1, 0.9, 0.9), deviation 0.1 / sqrt(3)
    pytest.param([1, 1, 0, 0], "1100", 0.9, 0.0, [3**0.5, 3**0.5, 0, 0], id="all-kept-are-right"),
    # a number may be an int: r = (1, 0, 0, 1), deviation sqrt(1/3); and r = (1, 1, 1, 1)
    pytest.param([1, 0, 0, 0], "1110", 1, 0.0, [0, -(3**0.5), -(3**0.5), 0], id="int-1"),
    pytest.param([1, 1, 0, 0], "1100", 1, 0.0, [0, 0, 0, 0], id="int-1-no-spread"),
    pytest.param([1, 0, 0, 0], "1100", 0, 0.0, [2, 0, 0, 0], id="int-0"),
    # r = (1, -1/2): mean 1/4, deviation sqrt(9/8); 3/2 over that is sqrt(2)
    pytest.param([1, 0], "10", -0.5, 0.0, [2**0.5, 0], id="negative-number"),
    # a masked response without a score: r = (1, 0, 1/2), deviation 1/2; and r = (1, 0)
    pytest.param([1, 0, math.nan], "110", 0.5, 0.0, [1, -1, 0], id="number-without-a-score"),
    pytest.param([1, 0, math.nan], "110", "completed", 0.0, [0.5**0.5, -(0.5**0.5), 0],
                 id="completed-without-a-score"),
    pytest.param([1, 0, math.nan], "110", "group", 0.0, [0, 0, 0], id="group-without-a-score"),
    pytest.param([1, math.nan, 0], "110", 0.5, 0.0, [0, 0, 0], id="no-score-of-a-kept-one"),
])
def test_group_advantages_by_hand(rewards, kept, baseline, eps, expected):
    advantages = rl.group_advantages(torch.tensor([rewards], dtype=torch.float64), masks(kept),
                                     baseline, eps=eps)
    assert advantages[0].tolist() == pytest.approx(expected, abs=1e-12)
    assert advantages.dtype == torch.float64


def test_the_baseline_has_no_default():
    with pytest.raises(TypeError):
        rl.group_advantages(torch.zeros(1, 2), masks("11"))


def test_groups_do_not_know_of_each_other():
    """Three groups at once: (1, 0, 0, 0) and (1, 1, 1, 0), whose deviations are 1/2 and 1/2, means
    1/4 and 3/4; and one with a reward that is not a number, which teaches nothing. With b = 1/2 a
    group without a right answer still learns that its wrong one is worse than searching on."""
    rewards = torch.tensor([[1.0, 0, 0, 0], [1, 1, 1, 0], [math.nan, 1, 0, 0]])
    advantages = rl.group_advantages(rewards, masks("1111", "1111", "1111"), "group", eps=0.0)
    assert advantages.tolist() == [[1.5, -0.5, -0.5, -0.5], [0.5, 0.5, 0.5, -1.5], [0, 0, 0, 0]]
    advantages = rl.group_advantages(torch.zeros(2, 4), masks("1000", "1110"), 0.5, eps=0.0)
    # (0, 1/2, 1/2, 1/2) and (0, 0, 0, 1/2) have deviation 1/4
    assert advantages.tolist() == [[-2, 0, 0, 0], [-2, -2, -2, 0]]


@pytest.mark.parametrize("rewards, kept", [
    pytest.param([1.0, 1, 1, 1], "1111", id="all-right"),
    pytest.param([0.0, 0, 0, 0], "1010", id="none-right"),
    pytest.param([1.0], "1", id="one-alone"),
    pytest.param([0.0, 0, 0], "000", id="none-kept")])
@pytest.mark.parametrize("baseline", ["group", "completed"])
def test_no_spread_means_no_advantage_and_never_nan(rewards, kept, baseline):
    advantages = rl.group_advantages(torch.tensor([rewards]), masks(kept), baseline)
    assert torch.equal(advantages, torch.zeros_like(advantages))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("baseline", ["group", "completed", 0.5, -0.1])
def test_equal_rewards_have_no_advantage_even_if_their_mean_is_rounded(baseline, dtype):
    """In float64 the mean of three rewards of -0.1 is another number, and their variance 1e-34."""
    for group_size in range(1, 33):
        rewards = torch.full((1, group_size), -0.1, dtype=dtype)
        advantages = rl.group_advantages(rewards, masks("1" * group_size), baseline)
        assert torch.equal(advantages, torch.zeros_like(rewards)) and advantages.dtype == dtype
        # with "completed" a masked response of another reward is no spread
        rewards = torch.cat([rewards, torch.ones(1, 1, dtype=dtype)], dim=1)
        advantages = rl.group_advantages(rewards, masks("1" * group_size + "0"), "completed")
        assert torch.equal(advantages, torch.zeros_like(advantages))


@pytest.mark.parametrize("rewards, kept, baseline", [
    pytest.param([1.0, 1, 1], "111", 0.5, id="all-right"),
    pytest.param([0.0, 0, 0], "000", 0.5, id="none-kept"),
    pytest.param([1.0, 0, 1], "101", 1.0, id="all-worth-the-same"),
    pytest.param([1.0], "1", 0.5, id="one-alone")])
def test_a_number_needs_a_spread_too(rewards, kept, baseline):
    """s is of the rewards in which b replaces those of unfinished ones."""
    advantages = rl.group_advantages(torch.tensor([rewards]), masks(kept), baseline)
    assert torch.equal(advantages, torch.zeros_like(advantages))


@pytest.mark.parametrize("baseline", ["group", "completed", 0.0, 0.75, 1.5, -2])
def test_group_advantages_one_by_one(baseline):
    """300 groups of 2 to 6 against statistics.stdev, with rewards that are no more than a few."""
    generator = random.Random(0)
    for _ in range(300):
        group_size = generator.randint(2, 6)
        rewards = [generator.choice([0.0, 1.0, 0.5, -0.25]) for _ in range(group_size)]
        kept = [generator.random() < 0.6 for _ in range(group_size)]
        counted = list(rewards)
        if baseline == "completed":
            counted = [reward for reward, is_kept in zip(rewards, kept) if is_kept]
        elif baseline != "group":
            counted = [reward if is_kept else baseline for reward, is_kept in zip(rewards, kept)]
        expected = [0.0] * group_size
        if len(counted) > 1 and len(set(counted)) > 1:
            b = statistics.fmean(counted) if isinstance(baseline, str) else baseline
            expected = [(reward - b) / (statistics.stdev(counted) + 0.1) if is_kept else 0.0
                        for reward, is_kept in zip(rewards, kept)]
        advantages = rl.group_advantages(torch.tensor([rewards], dtype=torch.float64),
                                         torch.tensor([kept]), baseline, eps=0.1)
        assert advantages[0].tolist() == pytest.approx(expected, abs=1e-12)


def test_one_completed_response_outside_the_baseline_has_no_advantage():
    rewards = torch.tensor([[1.0, 0, 0]])
    kept = masks("100")
    assert rl.group_advantages(rewards, kept, "completed").abs().sum() == 0
    assert rl.group_advantages(rewards, kept, "group")[0, 0] > 0


@pytest.mark.parametrize("baseline", ["group", "completed", 0.0, 0.5, 1.0, -0.5])
def test_masked_responses_never_carry_advantage(baseline):
    torch.manual_seed(0)
    kept = torch.rand(50, 6) < 0.5
    rewards = (torch.rand(50, 6) < 0.5).double() * kept
    before = rewards.clone(), kept.clone()
    assert (rl.group_advantages(rewards, kept, baseline)[~kept] == 0).all()
    # the rewards are still needed, for the log
    assert torch.equal(rewards, before[0]) and torch.equal(kept, before[1])


# ---- What the mask pays -------------------------------------------------------------------------


class Tree:
    """A small world for softmax policies. At each of three turns the policy guesses, looks closer
    and claims, or continues. A guess and a claim are right with a probability that the turn
    decides. Who has not answered at the end is unfinished."""

    def __init__(self, seed, num_turns=3):
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(num_turns, 3, generator=generator, dtype=torch.float64)
        self.logits = logits.requires_grad_(True)
        self.p_right = torch.rand(num_turns, 2, generator=generator, dtype=torch.float64)

    def outcomes(self):
        """Return all conversations as (log-prob, reward, kept), a right and a wrong one for each
        answer."""
        logprobs = self.logits.log_softmax(-1)
        logprob_so_far = 0.0
        outcomes = []
        for turn in range(len(logprobs)):
            for choice in range(2):
                for reward in (1.0, 0.0):
                    p_right = self.p_right[turn, choice]
                    p_reward = p_right if reward else 1 - p_right
                    logprob = logprob_so_far + logprobs[turn, choice] + p_reward.log()
                    outcomes.append((logprob, reward, True))
            logprob_so_far = logprob_so_far + logprobs[turn, 2]
        return [*outcomes, (logprob_so_far, 0.0, False)]

    def gradient(self, expression):
        return torch.autograd.grad(expression, self.logits, retain_graph=True)[0]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("b", [0.0, 0.17, 0.5, 1.0])
def test_masking_pays_the_baseline_for_an_unfinished_conversation(seed, b):
    """E[M (r - b) grad log pi] = grad(P(correct) + b P(unfinished)), exactly: the expectation by
    enumeration of all conversations, the right-hand side by autograd. Without the mask (all M = 1)
    it is grad P(correct), whatever b is."""
    tree = Tree(seed)
    outcomes = tree.outcomes()
    assert sum(logp.exp() for logp, _, _ in outcomes).item() == pytest.approx(1.0, abs=1e-12)
    masked = tree.gradient(
        sum(logp.exp().detach() * kept * (r - b) * logp for logp, r, kept in outcomes))
    paid = tree.gradient(sum(logp.exp() * (r if kept else b) for logp, r, kept in outcomes))
    assert torch.allclose(masked, paid, atol=1e-14, rtol=0) and masked.abs().sum() > 1e-3
    unmasked = tree.gradient(sum(logp.exp().detach() * (r - b) * logp for logp, r, _ in outcomes))
    correct = tree.gradient(sum(logp.exp() * r for logp, r, _ in outcomes))
    assert torch.allclose(unmasked, correct, atol=1e-14, rtol=0)
    if b:
        assert (masked - unmasked).abs().max() > 1e-5


def test_the_advantages_of_many_groups_follow_that_gradient():
    """The same through group_advantages: 20,000 groups of 16 sampled conversations of one tree,
    b = 0.4 (a number): the mean of A' (s + eps) grad log pi is the gradient of
    P(correct) + 0.4 P(unfinished), within four standard errors."""
    tree = Tree(1)
    outcomes = tree.outcomes()
    gradients = torch.stack([tree.gradient(logp).flatten() for logp, _, _ in outcomes])     # (N, 9)
    probabilities = torch.stack([logp.exp().detach() for logp, _, _ in outcomes]).float()   # (N,)
    picked = torch.multinomial(probabilities, 20000 * 16, True,
                               generator=torch.Generator().manual_seed(0))
    all_rewards = torch.tensor([r for _, r, _ in outcomes], dtype=torch.float64)
    rewards = all_rewards[picked].view(-1, 16)                                              # (P, G)
    kept = torch.tensor([kept for _, _, kept in outcomes])[picked].view(-1, 16)             # (P, G)
    spread = torch.where(kept, rewards, 0.4).std(1, keepdim=True)                           # (P, 1)
    scaled = rl.group_advantages(rewards, kept, 0.4, eps=0.0) * spread                      # (P, G)
    estimates = (scaled.view(-1, 1) * gradients[picked]).view(-1, 16, 9).mean(1)            # (P, 9)
    expected = tree.gradient(
        sum(logp.exp() * (r if kept else 0.4) for logp, r, kept in outcomes)).flatten()
    error = estimates.std(0) / len(estimates) ** 0.5
    assert ((estimates.mean(0) - expected).abs() < 4 * error + 1e-12).all()
    assert (expected.abs() > 8 * error).any()


@pytest.fixture(scope="module")
def mask_page(tmp_path_factory):
    """Return (find_b, rows of its table) of docs/mask.md; a row is a list of cells."""
    text = (ROOT / "docs/mask.md").read_text()
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL)
               if "def find_b" in block]
    assert len(code.splitlines()) <= 25 and max(map(len, code.splitlines())) <= 100
    path = tmp_path_factory.mktemp("mask") / "find_b.py"
    path.write_text(code)
    find_b = runpy.run_path(str(path))["find_b"]
    _, _, after = text.partition("With the advantages of `rl.py`")
    lines = after.strip().split("\n\n")[1].splitlines()
    return find_b, [line.strip("| ").split(" | ") for line in lines]


def advantages_of_row(title):
    """Return what find_b tests in a row of the table."""
    def advantages(rewards, kept):
        if title == "no mask":
            return rl.group_advantages(rewards[None], torch.ones_like(kept)[None], "group")[0]
        if title == "a penalty of 1/2, no mask":
            fined = rewards - 0.5 * ~kept
            return rl.group_advantages(fined[None], torch.ones_like(kept)[None], "group")[0]
        baseline = rl.baseline_flag(re.match("`(.+?)`", title)[1])
        return rl.group_advantages(rewards[None], kept[None], baseline)[0]

    return advantages


def test_the_b_of_every_baseline_is_that_of_the_page(mask_page):
    """docs/mask.md: the function that people copy, and the table it gives for rl.py."""
    find_b, (head, _, *rows) = mask_page
    policies = [[float(share) for share in cell.split(", ")] for cell in head[1:]]
    assert len(rows) == 8 and len(policies) == 4
    for title, *cells in rows:
        found = [find_b(advantages_of_row(title), *policy) for policy in policies]
        assert found == pytest.approx([float(cell) for cell in cells], abs=6e-4), title


def test_find_b_finds_the_b_that_is_there(mask_page):
    """Without the division by s, a number is paid exactly; in groups of two as well."""
    find_b, _ = mask_page
    for b in (-0.5, 0.0, 0.3, 1.0):
        for group_size in (2, 16):
            found = find_b(lambda rewards, kept: kept * (rewards - b), 0.2, 0.1, 0.7, group_size)
            assert found == pytest.approx(b, abs=1e-12)


# ---- The loss -----------------------------------------------------------------------------------


def worked_batch():
    """Return three responses of 2, 1 and 2 tokens, the last one masked: ratios (2, 1), (0.5) and
    (1, 1); A' = (1, -1, 0)."""
    new = torch.tensor([[math.log(2), 0.0], [math.log(0.5), 7.0], [0.0, 0.0]], dtype=torch.float64)
    old = torch.zeros(3, 2, dtype=torch.float64)
    advantages = torch.tensor([1.0, -1, 0], dtype=torch.float64)
    return new, old, advantages, masks("11", "10", "11"), masks("110")[0]


@pytest.mark.parametrize("flags, objective", [
    # clipped at 0.8 and 1.3: first min(2, 1.3) = 1.3 and 1, mean 1.15; second min(-0.5, -0.8)
    pytest.param({}, (1.15 - 0.8) / 2, id="response-kept"),
    pytest.param({"divisor": "all"}, (1.15 - 0.8) / 3, id="response-all"),
    pytest.param({"aggregation": "token"}, (2.3 - 0.8) / 3, id="token-kept"),
    pytest.param({"aggregation": "token", "divisor": "all"}, (2.3 - 0.8) / 5, id="token-all"),
    pytest.param({"aggregation": "constant", "max_response_tokens": 10}, (2.3 - 0.8) / 20,
                 id="constant-kept"),
    pytest.param({"aggregation": "constant", "max_response_tokens": 10, "divisor": "all"},
                 (2.3 - 0.8) / 30, id="constant-all"),
    pytest.param({"denominator": 7}, (1.15 - 0.8) / 7, id="denominator"),
    # clipped at 0.6 and 1.5: 1.5 and 1, mean 1.25; min(-0.5, -0.6) = -0.6
    pytest.param({"clip_low": 0.4, "clip_high": 0.5}, (1.25 - 0.6) / 2, id="other-clips"),
])
def test_grpo_loss_by_hand(flags, objective):
    assert rl.grpo_loss(*worked_batch(), **flags).item() == pytest.approx(-objective, abs=1e-12)


def test_a_negative_advantage_is_not_clipped_from_above_by_hand():
    """Ratio 8. A = -1: min(8 x -1, 1.3 x -1) = -8. A = 1: min(8, 1.3) = 1.3."""
    new = torch.full((2, 1), math.log(8.0))
    loss = rl.grpo_loss(new, torch.zeros(2, 1), torch.tensor([-1.0, 1.0]), masks("1", "1"),
                        masks("11")[0])
    assert loss.item() == pytest.approx((8 - 1.3) / 2)


def test_a_response_without_a_token_adds_nothing_but_is_counted():
    zeros = torch.zeros(1, 2)
    empty = (zeros, zeros, torch.ones(1), zeros.bool(), torch.tensor([True]))
    batch = [torch.cat([old, new.to(old.dtype)]) for old, new in zip(worked_batch(), empty)]
    assert rl.grpo_loss(*batch).item() == pytest.approx(-(1.15 - 0.8) / 3)


def reference_loss(new, old, advantages, mask, kept, low, high, aggregation, divisor):
    """Return the loss by the paper's formula, one token at a time in plain Python floats; a
    response's constant is 9 tokens."""
    total = 0.0
    for i in range(len(new)):
        if not kept[i]:
            continue
        terms = []
        for t in range(len(new[i])):
            if mask[i][t]:
                ratio = math.exp(new[i][t] - old[i][t])
                clipped = min(max(ratio, 1 - low), 1 + high)
                terms.append(min(ratio * advantages[i], clipped * advantages[i]))
        total += sum(terms) / (max(len(terms), 1) if aggregation == "response" else 1)
    counted = [i for i in range(len(new)) if kept[i] or divisor == "all"]
    number = {"response": len(counted), "token": sum(sum(mask[i]) for i in counted),
              "constant": 9 * len(counted)}[aggregation]
    return -total / max(number, 1)


def random_batch(seed, num_responses=5, num_tokens=7, spread=0.5):
    generator = torch.Generator().manual_seed(seed)
    shape = (num_responses, num_tokens)
    old = -torch.rand(shape, generator=generator, dtype=torch.float64)
    new = old + spread * torch.randn(shape, generator=generator, dtype=torch.float64)
    advantages = torch.randn(num_responses, generator=generator, dtype=torch.float64)
    mask = torch.rand(shape, generator=generator) < 0.7
    kept = torch.rand(num_responses, generator=generator) < 0.6
    return new, old, advantages, mask, kept


@pytest.mark.parametrize("aggregation", ["response", "token", "constant"])
@pytest.mark.parametrize("divisor", ["kept", "all"])
def test_grpo_loss_equals_the_formula(aggregation, divisor):
    """Also of a single response or none, of few tokens, and of ratios from 1e-4 to 1e4."""
    for seed in range(40):
        batch = random_batch(seed, num_responses=seed % 6, num_tokens=1 + seed % 5,
                             spread=3.0 if seed % 2 else 0.5)
        expected = reference_loss(*(x.tolist() for x in batch), 0.2, 0.3, aggregation, divisor)
        loss = rl.grpo_loss(*batch, aggregation=aggregation, divisor=divisor,
                            max_response_tokens=9)
        assert loss.item() == pytest.approx(expected, abs=1e-12)


def test_gradient_by_finite_differences():
    new, *rest = random_batch(3)
    new.requires_grad_(True)
    assert torch.autograd.gradcheck(lambda x: rl.grpo_loss(x, *rest), (new,), eps=1e-7, atol=1e-6)


@pytest.mark.parametrize("aggregation", ["response", "token", "constant"])
@pytest.mark.parametrize("divisor", ["kept", "all"])
def test_micro_batches_add_up(aggregation, divisor):
    """With the global denominator the losses of micro-batches sum to that of the whole batch,
    however it is cut."""
    batch = random_batch(1, num_responses=8)
    flags = {"aggregation": aggregation, "divisor": divisor, "max_response_tokens": 9}
    denominator = rl.count_denominator(batch[3], batch[4], **flags)
    assert (denominator.dtype, denominator.shape) == (torch.float64, ())
    denominator = denominator.item()
    whole = rl.grpo_loss(*batch, **flags)
    for size in (1, 3, 5):
        total = 0.0
        for start in range(0, 8, size):
            micro_batch = [x[start:start + size] for x in batch]
            total += rl.grpo_loss(*micro_batch, **flags, denominator=denominator).item()
        assert total == pytest.approx(whole.item(), abs=1e-12)


@pytest.mark.parametrize("garbage", [1e30, -1e30, math.inf, math.nan])
@pytest.mark.parametrize("place", ["logprobs", "old_logprobs"])
def test_masked_responses_get_no_gradient_and_no_garbage(garbage, place):
    """Neither a masked response nor an unsampled position moves anything, whatever its log-probs
    and advantages are."""
    new, old, advantages, mask, kept = random_batch(5)
    kept[0] = False
    kept[1] = True
    clean = rl.grpo_loss(new, old, advantages, mask, kept)
    dirty = new if place == "logprobs" else old
    dirty[~mask | ~kept[:, None]] = garbage
    advantages[~kept] = garbage
    new.requires_grad_(True)
    loss = rl.grpo_loss(new, old, advantages, mask, kept)
    loss.backward()
    assert loss.item() == pytest.approx(clean.item())
    assert torch.isfinite(new.grad).all() and new.grad.abs().sum() > 0
    assert (new.grad[~kept] == 0).all() and (new.grad[~mask] == 0).all()


def test_nothing_kept_is_a_zero_loss_still_connected():
    new, old, advantages, mask, _ = random_batch(2)
    new[~mask] = math.inf
    # also if other ranks kept some
    for denominator in (None, 3.0):
        new = new.detach().requires_grad_(True)
        loss = rl.grpo_loss(new, old, advantages, mask, torch.zeros(5, dtype=torch.bool),
                            denominator=denominator)
        loss.backward()
        assert loss.item() == 0 and (new.grad == 0).all()
    # the same if the denominator of all ranks is 0, which is a number like any other
    batch = random_batch(2)
    batch[0].requires_grad_(True)
    loss = rl.grpo_loss(*batch[:4], torch.ones(5, dtype=torch.bool), denominator=0.0)
    loss.backward()
    assert loss.item() == 0 and (batch[0].grad == 0).all()


@pytest.mark.parametrize("denominator", [None, 3])
@pytest.mark.parametrize("flags", [{"divisor": "some"}, {"aggregation": "some"},
                                   {"aggregation": "constant"},
                                   {"aggregation": "constant", "max_response_tokens": 0}], ids=str)
def test_unknown_flags_are_refused(flags, denominator):
    with pytest.raises(ValueError):
        rl.grpo_loss(*random_batch(0), **flags, denominator=denominator)


# ---- Who is masked, and which baseline ----------------------------------------------------------


@pytest.mark.parametrize("flags, kept", [
    pytest.param({}, ["answer", "void"], id="default"),
    pytest.param({"mask_void": True}, ["answer"], id="mask_void"),
    pytest.param({"overturn_mask": False}, evaluate.FINISH_REASONS, id="no-mask"),
    pytest.param({"overturn_mask": False, "mask_void": True}, evaluate.FINISH_REASONS,
                 id="no-mask, mask_void"),
    pytest.param({"baseline": "outcome"}, evaluate.FINISH_REASONS, id="outcome"),
    pytest.param({"baseline": "outcome", "mask_void": True}, evaluate.FINISH_REASONS,
                 id="outcome, mask_void")])
def test_who_is_masked(flags, kept):
    """Masked or not, unfinished is what ran out: the penalty is for these."""
    args = argparse.Namespace(**{"overturn_mask": True, "mask_void": False, "baseline": "group",
                                 **flags})
    unfinished = ["void"] * args.mask_void + ["over_turn", "over_context"]
    for finish_reason in evaluate.FINISH_REASONS:
        rollout = evaluate.Rollout(finish_reason=finish_reason)
        assert rl.is_kept(rollout, args) == (finish_reason in kept)
        assert rl.is_unfinished(rollout, args) == (finish_reason in unfinished)


@pytest.mark.parametrize("flag, overturn_mask, unfinished_accuracy, expected", [
    (0.5, True, 0.9, 0.5), ("completed", True, 0.9, "completed"), ("group", True, None, "group"),
    ("estimate", True, 0.9, 0.9), ("estimate", True, 0.0, 0.0), ("estimate", True, None, "group"),
    ("outcome", True, 0.9, "group"),
    (0.5, False, 0.9, "group"), ("completed", False, 0.9, "group"),
    ("estimate", False, 0.9, "group"), ("estimate", False, None, "group"),
    ("outcome", False, 0.9, "group"), ("outcome", True, None, "group"), (0, True, 0.9, 0)])
def test_the_baseline_of_a_step(flag, overturn_mask, unfinished_accuracy, expected):
    """Where nothing is masked the baseline pays nothing, and is the group's mean."""
    args = argparse.Namespace(baseline=flag, overturn_mask=overturn_mask)
    assert rl.step_baseline(args, unfinished_accuracy) == expected


# ---- Rollouts -----------------------------------------------------------------------------------


def test_questions_of_a_step_depend_on_seed_step_and_prompt_number_only():
    def pick(prompt_numbers, seed=0, step=7):
        return [rl.pick_question(110, number, seed, step) for number in prompt_numbers]
    whole = pick(range(40))
    assert pick([1, 3]) == [whole[1], whole[3]]
    assert len(set(whole)) == 40 and all(0 <= index < 110 for index in whole)
    others = [pick(range(40), step=8), pick(range(40), seed=1), pick(range(40, 80))]
    assert len({tuple(picked) for picked in [whole, *others]}) == 4


def test_no_question_comes_twice_in_a_step():
    """Not in a further attempt either, as long as there are others."""
    picked = [rl.pick_question(160, number, 0, 3) for number in range(200)]
    assert sorted(picked[:160]) == list(range(160))
    assert picked[160:] == picked[:40]


def mask_of(text):
    return [letter == "1" for letter in text]


def test_a_conversation_is_cut_after_its_last_turn_within_the_cap():
    """Three turns of 3, 1 and 2 sampled tokens; the other tokens are the prompt's and the tool's.
    All that is not cut stays as it is, and so does the conversation that was played."""
    turns = [{"text": "a"}, {"text": "b"}, {"text": "c"}]
    whole = evaluate.Rollout(
        token_ids=list(range(20, 32)), loss_mask=mask_of("001110010011"),
        logprobs=[-1.0, -2.0, -3.0, -4.0, -5.0, -6.0], turns=turns, turn_ends=[5, 8, 12],
        reward=0.25, finish_reason="answer", prediction="7", advantage=2.0, row={"id": "1"},
        group_index=3)
    before = copy.deepcopy(whole)
    one_turn = replace(before, token_ids=[20, 21, 22, 23, 24], loss_mask=mask_of("00111"),
                       logprobs=[-1.0, -2.0, -3.0], turns=[{"text": "a"}], turn_ends=[5])
    two_turns = replace(before, token_ids=[20, 21, 22, 23, 24, 25, 26, 27],
                        loss_mask=mask_of("00111001"), logprobs=[-1.0, -2.0, -3.0, -4.0],
                        turns=[{"text": "a"}, {"text": "b"}], turn_ends=[5, 8])
    for max_turns, expected in ((1, one_turn), (2, two_turns), (3, before), (4, before)):
        assert rl.truncate_rollout(whole, max_turns) == expected
        assert whole == before


def test_outcome_trains_on_the_turns_before_the_cap(trained_policy, world):
    """A conversation that was played on is cut after its first or second turn: its tokens,
    log-probs and images are those of the same conversation played with as many turns at most, its
    reward is that of the whole; one that was shorter stays as it is."""
    rows = tools.read_jsonl(world / "train.jsonl")[:2]

    def play(max_turns):
        limits = evaluate.Limits(max_turns, max_turns, 80, 1200)
        return evaluate.Engine(trained_policy, limits, 8).run(rows, 4, world)

    longer = play(6)
    for max_turns in (1, 2):
        num_cut = 0
        for short, whole in zip(play(max_turns), longer):
            before = copy.deepcopy((whole.token_ids, whole.loss_mask, whole.turns, whole.turn_ends,
                                    whole.logprobs))
            cut = rl.truncate_rollout(whole, max_turns)
            assert cut.token_ids == short.token_ids and cut.loss_mask == short.loss_mask
            assert cut.logprobs == pytest.approx(short.logprobs, abs=1e-9)
            assert len(cut.logprobs) == sum(cut.loss_mask)
            assert [t["text"] for t in cut.turns] == [t["text"] for t in short.turns]
            assert cut.turn_ends == short.turn_ends
            num_images = len(short.with_images(trained_policy).images)
            assert len(cut.with_images(trained_policy).images) == num_images
            assert cut.reward == whole.reward and cut.prediction == whole.prediction
            assert cut.finish_reason == whole.finish_reason
            assert before == (whole.token_ids, whole.loss_mask, whole.turns, whole.turn_ends,
                              whole.logprobs)
            num_cut += len(cut.token_ids) < len(whole.token_ids)
        assert num_cut > 0


def test_a_conversation_within_the_cap_is_returned_as_it_is():
    whole = evaluate.Rollout(token_ids=[1, 2, 3], loss_mask=[False, True, True], turns=[{}, {}],
                             logprobs=[-1.0, -2.0], turn_ends=[2, 3], finish_reason="answer")
    assert rl.truncate_rollout(whole, 2) is whole
    assert rl.truncate_rollout(whole, 3) is whole


def rollout(reward, finish_reason="answer", **fields):
    return evaluate.Rollout(reward=reward, finish_reason=finish_reason, **fields)


@pytest.mark.parametrize("flags, baseline, expected", [
    # r = (1, 0), the second one unfinished and masked: mean 1/2, deviation sqrt(1/2)
    pytest.param({}, "group", [0.5**0.5, 0], id="masked"),
    pytest.param({"overturn_mask": False}, "group", [0.5**0.5, -(0.5**0.5)], id="no-mask"),
    # r = (1, -1): mean 0, deviation sqrt(2), once the unfinished one is fined
    pytest.param({"overturn_mask": False, "overturn_penalty": 1.0}, 0.0, [0.5**0.5, -(0.5**0.5)],
                 id="penalty")])
def test_advantages_are_assigned_to_copies(flags, baseline, expected):
    args = argparse.Namespace(**{"overturn_mask": True, "mask_void": False, "baseline": "group",
                                 "group_size": 2, "overturn_penalty": 0.0, "max_turns": 6, **flags})
    groups = [[rollout(1.0), rollout(0.0, "over_turn")], [rollout(1.0), rollout(None)]]
    first_group, second_group = rl.assign_advantages(groups, args, baseline)
    assert [r.advantage for r in first_group] == pytest.approx(expected, abs=1e-5)
    assert [r.advantage for r in second_group] == [0, 0]    # the judge failed: no signal
    assert [r.reward for r in first_group + second_group] == [1.0, 0.0, 1.0, None]
    assert all(r.advantage == 0 for r in groups[0] + groups[1])


@pytest.mark.parametrize("flags, baseline, b, values", [
    ({"baseline": "group"}, "group", 0.25, [None, None, 0.25, 0.25]),
    ({"baseline": "completed"}, "completed", 0.5, [None, None, 0.5, 0.5]),
    ({"baseline": 0.7}, 0.7, 0.7, [None, None, 0.7, 0.7]),
    ({"overturn_mask": False}, "group", 0.25, [None, None, 0.0, 0.0]),
    ({"overturn_mask": False, "overturn_penalty": 1.0}, "group", -0.25, [None, None, -1.0, -1.0]),
    ({"mask_void": True, "baseline": 0.7}, 0.7, 0.7, [None, 0.7, 0.7, 0.7]),
    # the third was played to its end, as all are, after more turns than training has
    ({"baseline": "outcome", "late": True}, "group", 0.5, [None, None, 1.0, 0.0])], ids=str)
def test_the_log_says_what_unfinished_conversations_are_worth(flags, baseline, b, values):
    """One right, one void, two that ran out of turns."""
    is_late = flags.pop("late", False)
    late_turns = [{}] * (7 if is_late else 6)
    args = argparse.Namespace(**{"overturn_mask": True, "mask_void": False, "baseline": "group",
                                 "group_size": 4, "overturn_penalty": 0.0, "max_turns": 6, **flags})
    group = [rollout(1.0, turns=[{}] * 6), rollout(0.0, "void", turns=[{}]),
             rollout(float(is_late), "answer" if is_late else "over_turn", turns=late_turns,
                     turn_ends=[1] * 7),
             rollout(0.0, "over_turn", turns=late_turns, turn_ends=[1] * 7)]
    rl.assign_advantages([group], args, baseline)
    assert [member.baseline for member in group] == [b] * 4
    assert [member.unfinished_value for member in group] == values
    counts = rl.count_rollouts(group)
    known_values = [value for value in values if value is not None]
    assert counts["num_unfinished"] == len(known_values)
    assert rl.mean_or_none(counts, "unfinished_values") == pytest.approx(
        statistics.fmean(known_values))
    assert rl.mean_or_none(counts, "baselines") == pytest.approx(b)


def test_what_has_no_value_is_left_out_of_the_log():
    """A group that the judge could not score; then a group of which nothing is kept."""
    args = argparse.Namespace(overturn_mask=True, mask_void=False, baseline="completed",
                              group_size=2, overturn_penalty=0.0, max_turns=6)
    groups = [[rollout(None), rollout(0.0, "over_turn")], [rollout(0.0, "over_turn")] * 2]
    rl.assign_advantages(groups, args, "completed")
    counts = rl.count_rollouts(sum(groups, []))
    assert counts["num_unfinished"] == 3
    assert rl.mean_or_none(counts, "baselines") is None
    assert rl.mean_or_none(counts, "unfinished_values") is None


class ScriptedEngine:
    """Plays conversations whose rewards are given in advance, and notes what it was asked."""

    def __init__(self, *runs, finish_reasons=None, judge=None):
        self.runs = iter(runs)      # for each run(): (reward, number of turns) per conversation
        self.finish_reasons = finish_reasons    # of each conversation; "answer" if left out
        self.policy = argparse.Namespace(device="cpu", prompts=tools.PROMPTS)
        self.judge = judge
        self.calls = []

    def play_all(self, rollouts):
        """Play one conversation after the other. The results are {(prompt number, sample): (reward,
        number of turns)}."""
        results = next(self.runs)
        self.waiting = collections.deque(rollouts)
        while self.waiting:
            rollout = self.waiting.popleft()
            self.calls.append((rollout.prompt_number, rollout.sample_number, rollout.row["id"],
                               rollout.root))
            rollout.reward, num_turns = results[rollout.prompt_number, rollout.sample_number]
            rollout.turns = [{}] * num_turns
            rollout.finish_reason = "answer"
            yield rollout

    def begin_step(self, step):
        self.calls.append(("begin_step", step))

    def run(self, rows, num_samples, root, prompt_numbers):
        self.calls.append(("run", [row["id"] for row in rows], root, prompt_numbers))
        results = next(self.runs)
        assert len(rows) == len(root) and len(rows) * num_samples == len(results)
        finish_reasons = self.finish_reasons or ["answer"] * len(results)
        return [rollout(reward, row={}, turns=[{}] * num_turns, finish_reason=finish_reason)
                for (reward, num_turns), finish_reason in zip(results, finish_reasons)]

    def free_cache(self):
        self.calls.append("free_cache")


def test_groups_without_signal_are_played_again_by_hand():
    """Groups 0 and 2 of four are this rank's; five questions, in the order 2 4 3 0 1 of the
    example of pick_question. Group 0 has signal. Group 2 has none, gets prompt number
    4 + 2 (the second of the order, after all five), and has none again."""
    args = argparse.Namespace(seed=0, prompts_per_step=4, resample=1, group_size=2,
                              overturn_mask=True, mask_void=False, overturn_penalty=0.0,
                              baseline="group", max_turns=6)
    engine = ScriptedEngine({(0, 0): (1.0, 1), (0, 1): (0.0, 1), (2, 0): (0.0, 2),
                             (2, 1): (0.0, 3), (6, 0): (1.0, 4), (6, 1): (1.0, 5)})
    questions = [({"id": number}, f"folder{number}") for number in range(5)]
    groups_with_signal, played_rollouts, num_zero_variance_groups = rl.collect_groups(
        engine, questions, 0, range(0, 4, 2), args, "group")
    assert engine.calls == [
        ("begin_step", 0), (0, 0, 2, "folder2"), (0, 1, 2, "folder2"), (2, 0, 3, "folder3"),
        (2, 1, 3, "folder3"), (6, 0, 4, "folder4"), (6, 1, 4, "folder4"), "free_cache"]
    assert list(groups_with_signal) == [0] and num_zero_variance_groups == 1
    group = groups_with_signal[0]
    assert [r.advantage for r in group] == pytest.approx([0.5**0.5, -(0.5**0.5)], abs=1e-5)
    assert [r.group_index for r in group] == [0, 0]
    assert [len(r.turns) for r in played_rollouts] == [1, 1, 2, 3, 4, 5]


def test_a_group_without_signal_gets_its_next_question_at_once():
    """Group 0 ends without signal before group 1 is played: its second question is queued then. The
    same with group 1, behind it. The log's order is that of questions."""
    args = argparse.Namespace(seed=0, prompts_per_step=2, resample=2, group_size=2,
                              overturn_mask=True, mask_void=False, overturn_penalty=0.0,
                              baseline="group", max_turns=6)
    wrong, right = (0.0, 1), (1.0, 1)
    engine = ScriptedEngine({(0, 0): wrong, (0, 1): wrong, (1, 0): right, (1, 1): right,
                             (2, 0): right, (2, 1): wrong, (3, 0): right, (3, 1): right,
                             (5, 0): wrong, (5, 1): wrong})
    queued = []
    inner = engine.play_all

    def play_all(rollouts):
        for rollout in inner(rollouts):
            yield rollout
            queued.append([other.prompt_number for other in engine.waiting])

    engine.play_all = play_all
    questions = [({"id": number}, "folder") for number in range(9)]
    groups_with_signal, played_rollouts, num_zero_variance_groups = rl.collect_groups(
        engine, questions, 0, [0, 1], args, "group")
    assert queued == [[0, 1, 1], [1, 1, 2, 2], [1, 2, 2], [2, 2, 3, 3], [2, 3, 3], [3, 3], [3],
                      [5, 5], [5], []]
    assert list(groups_with_signal) == [0] and num_zero_variance_groups == 1
    assert {r.prompt_number for r in groups_with_signal[0]} == {2}
    assert [r.prompt_number for r in played_rollouts] == [0, 0, 1, 1, 2, 2, 3, 3, 5, 5]


@pytest.mark.parametrize("verdict, expected", [(1.0, [0]), (None, [])], ids=str)
def test_a_group_waits_for_the_judge(verdict, expected):
    """A verdict that comes after all has been played decides whether the group has signal. Without
    one it has none, and gets another question."""
    args = argparse.Namespace(seed=0, prompts_per_step=1, resample=1, group_size=2,
                              overturn_mask=True, mask_void=False, overturn_penalty=0.0,
                              baseline="group", max_turns=6)

    class Judge:
        def collect_verdicts(self):
            pass

        def wait(self):
            for rollout in judged:
                rollout.reward = verdict

    judged = []
    first = {(0, 0): (None, 1), (0, 1): (0.0, 1)}
    engine = ScriptedEngine(first, {(1, 0): (0.0, 1), (1, 1): (0.0, 1)}, judge=Judge())
    inner = engine.play_all

    def play_all(rollouts):
        for rollout in inner(rollouts):
            if rollout.reward is None:
                judged.append(rollout)
            yield rollout

    engine.play_all = play_all
    groups_with_signal, played_rollouts, num_zero_variance_groups = rl.collect_groups(
        engine, [({"id": 0}, "folder")], 0, [0], args, "group")
    assert list(groups_with_signal) == expected
    assert num_zero_variance_groups == 1 - len(expected)
    assert len(played_rollouts) == 4 - 2 * len(expected)


def in_rounds(engine, questions, step, group_indices, args, baseline):
    """Return {group_index: (prompt number, what each conversation wrote)} of the groups with
    signal, found in rounds: a group is asked again after all have ended."""
    engine.begin_step(step)
    found = {}
    for attempt in range(args.resample + 1):
        left = [index for index in group_indices if index not in found]
        numbers = [attempt * args.prompts_per_step + index for index in left]
        for index, number in zip(left, numbers):
            question_index = rl.pick_question(len(questions), number, args.seed, step)
            row, folder = questions[question_index]
            group = engine.run([row], args.group_size, folder, [number])
            rewards = torch.tensor([[r.reward for r in group]], dtype=torch.float64)
            kept = torch.tensor([[rl.is_kept(r, args) for r in group]])
            if rl.group_advantages(rewards, kept, baseline).any():
                found[index] = (number, [r.token_ids for r in group])
    return found


@pytest.mark.parametrize("max_num_seqs, short_model_len", [(16, None), (3, None), (16, 250)])
def test_asking_at_once_gives_the_groups_of_rounds(trained_policy, world, max_num_seqs,
                                                   short_model_len):
    questions = [(row, world) for row in tools.read_jsonl(world / "train.jsonl")]
    args = argparse.Namespace(seed=0, prompts_per_step=5, resample=2, group_size=3,
                              overturn_mask=True, mask_void=False, overturn_penalty=0.0,
                              baseline=0.5, max_turns=6)
    limits = evaluate.Limits(6, 6, 48, 1200)
    reference = in_rounds(evaluate.Engine(trained_policy, limits, 16), questions, 3,
                          [0, 2, 3, 4], args, 0.5)
    engine = evaluate.Engine(trained_policy, limits, max_num_seqs, short_model_len=short_model_len)
    groups_with_signal, played_rollouts, _ = rl.collect_groups(
        engine, questions, 3, [0, 2, 3, 4], args, 0.5)
    assert {index: (group[0].prompt_number, [r.token_ids for r in group])
            for index, group in groups_with_signal.items()} == reference
    assert len(played_rollouts) > 12 and reference


def test_a_group_that_the_judge_could_not_score_is_resampled(trained_policy, world, tmp_path):
    """Answers in other words are unscored while the judge fails: their groups leave no signal,
    whatever the other rewards are."""
    from extras import chat_client, served
    questions = [(row, world) for row in tools.read_jsonl(world / "train.jsonl")]
    args = argparse.Namespace(seed=0, prompts_per_step=4, resample=1, group_size=4,
                              overturn_mask=True, mask_void=False, overturn_penalty=0.0,
                              baseline="group", max_turns=6)
    with ChatServer(lambda body: (503, {}, b"")) as server:
        client = chat_client.ChatClient(server.url, role="judge", attempts=1)
        judge = served.Judge(client, tmp_path)
        engine = evaluate.Engine(trained_policy, evaluate.Limits(6, 6, 48, 1200), 16, judge=judge)
        groups_with_signal, played, num_zero_variance_groups = rl.collect_groups(
            engine, questions, 0, [0, 1, 2, 3], args, "group")
        counts = dict(engine.counts)
        # no exact match: all is left to the judge
        held_out = [(dict(row, answer="something else"), world) for row, _ in questions]
        args.out = tmp_path
        assert rl.validate(engine, held_out, args, step=2)["val_accuracy"] is None
    rows = tools.read_jsonl(tmp_path / "rollouts/val_00002.jsonl", tools.check_trajectory)
    assert {row["reward"] for row in rows} == {0, None} and len(rows) == len(held_out)
    unscored = [r for r in played if r.reward is None]
    assert unscored and all(r.finish_reason == "answer" and r.prediction for r in unscored)
    assert not any(r.reward is None for group in groups_with_signal.values() for r in group)
    assert len(played) > 16 and set(groups_with_signal) <= {0, 1, 2, 3}
    assert len(groups_with_signal) + num_zero_variance_groups == 4

    metrics = rl.step_metrics(played, [rl.UpdateStatistics()], num_zero_variance_groups, counts,
                              "cpu")
    assert 1 <= metrics["mean_acceptance_length"] <= 9 and 0 <= metrics["acceptance_rate"] <= 1
    num_correct = sum(r.reward == 1.0 for r in played)
    num_answered = sum(r.finish_reason == "answer" for r in played)
    assert metrics["unscored"] == len(unscored) / len(played)
    assert metrics["reward"] == num_correct / max(1, len(played) - len(unscored))
    assert metrics["incorrect"] == (num_answered - num_correct - len(unscored)) / len(played)


@pytest.mark.parametrize("results, expected", [     # (reward, number of turns) of four questions
    pytest.param([(1, 1), (0, 6), (1, 7), (0, 9)], (0.5, 0.25, 0.5), id="half"),
    pytest.param([(1, 1), (0, 6), (1, 6), (1, 2)], (0.75, 0.75, None), id="none-late"),
    pytest.param([(1, 1), (None, 6), (1, 7), (1, 9)], (None, None, 1.0),
                 id="judge-failed-on-a-short"),
    pytest.param([(1, 1), (0, 6), (1, 7), (None, 9)], (None, 0.25, None),
                 id="judge-failed-on-a-long")])
def test_validation_by_hand(results, expected, tmp_path):
    """Late is what took more turns than training allows, here 6. The random streams are the
    same at every evaluation. The third conversation is void, the last one over_turn."""
    engine = ScriptedEngine(results, finish_reasons=["answer", "answer", "void", "over_turn"])
    held_out = [({"id": number}, "folder") for number in range(4)]
    args = argparse.Namespace(max_turns=6, out=tmp_path)
    metrics = rl.validate(engine, held_out, args, step=50)
    assert metrics == {
        "step": 50, "val_accuracy": expected[0], "val_accuracy_in_cap": expected[1],
        "val_over_turn": 0.25, "val_over_context": 0.0, "val_void": 0.25, "unfinished_accuracy": expected[2]}
    assert engine.calls == [("begin_step", 2**31),
                            ("run", [0, 1, 2, 3], ["folder"] * 4, [0, 1, 2, 3]), "free_cache"]
    rows = tools.read_jsonl(tmp_path / "rollouts/val_00050.jsonl")
    assert [(row["reward"], len(row["turns"])) for row in rows] == results


def evaluated(*figures):
    """Return evaluations at steps 0, 6, 12, ... from (accuracy, over_turn) of each."""
    return [{"step": 6 * number, "val_accuracy": accuracy, "val_over_turn": over_turn,
             "unfinished_accuracy": None} for number, (accuracy, over_turn) in enumerate(figures)]


@pytest.mark.parametrize("figures, expected", [
    # Of 100 questions: 0.9 and 0.8 differ by 0.1; sqrt((0.09 + 0.16) / 100) = 0.05, twice: 0.1.
    ([(0.9, 0.0), (0.8, 0.0)], None),
    ([(0.9, 0.0), (0.79, 0.0)], "step 6: .*: val_accuracy was 0.900 at step 0 and is 0.790"),
    # It is the best that counts, not the one before.
    ([(0.7, 0.0), (0.9, 0.0), (0.85, 0.0), (0.79, 0.0)], "step 18: .* at step 6 and is 0.790"),
    ([(0.9, 0.0), (0.5, 0.0), (0.9, 0.0)], None),       # it has recovered
    # 0.02 and 0.12: sqrt((0.0196 + 0.1056) / 100) = 0.0354; 0.1 is more than twice that
    ([(0.9, 0.02), (0.89, 0.12)], "val_over_turn was 0.020 at step 0 and is 0.120"),
    ([(0.9, 0.02), (0.9, 0.12)], None),                 # nothing is lost by it
    ([(0.8, 0.02), (0.9, 0.12)], None),                 # better, with more turns
    ([(0.9, 0.12), (0.89, 0.02)], None),
    ([(0.9, 0.0), (None, 0.5)], None),                  # the judge failed
    ([(None, 0.0), (0.9, 0.0), (0.5, 0.0)], "val_accuracy"),
    ([(0.9, 0.0)], None), ([], None)], ids=str)
def test_a_decline_by_hand(figures, expected):
    decline = rl.find_decline(evaluated(*figures), 100)
    assert (decline is None) == (expected is None)
    assert decline is None or re.search(expected, decline)


def test_a_decline_needs_fewer_points_with_more_questions():
    """0.9 and 0.85: the error is 0.0466 with 100 questions, 0.0147 with 1,000."""
    evaluations = evaluated((0.9, 0.0), (0.85, 0.0))
    assert rl.find_decline(evaluations, 100) is None
    assert rl.find_decline(evaluations, 1000) is not None


def test_only_two_declines_in_a_row_end_a_run():
    assert not rl.gets_worse(evaluated((0.9, 0), (0.5, 0)), 100)
    assert rl.gets_worse(evaluated((0.9, 0), (0.5, 0), (0.5, 0)), 100)
    assert not rl.gets_worse(evaluated((0.9, 0), (0.5, 0), (0.89, 0)), 100)
    assert not rl.gets_worse([], 100)


# ---- The update ---------------------------------------------------------------------------------


def test_trainer_agrees_with_sampler(trained_policy, world):
    """The log-probs of an update, before any step, are those the sampler recorded: every
    ratio is 1."""
    rows = tools.read_jsonl(world / "train.jsonl")[:2]
    engine = evaluate.Engine(trained_policy, evaluate.Limits(4, 4, 80, 1200), 8)
    rollouts = engine.run(rows, 4, world)
    batch = rl.encode_rollouts(trained_policy, rollouts)
    with torch.no_grad():
        new, old, mask = rl.compute_logprobs(trained_policy, rollouts, batch)
    assert ((new - old)[mask]).abs().max() < 1e-9
    assert (new[~mask] == 0).all() and (old[~mask] == 0).all()
    assert [row[m].tolist() for row, m in zip(old, mask)] == [r.logprobs for r in rollouts]


def test_the_response_mask_by_hand():
    rollouts = [evaluate.Rollout(logprobs=[-0.5] * length) for length in (3, 1, 0)]
    assert torch.equal(rl.response_mask(rollouts, "cpu"), masks("111", "100", "000"))
    assert rl.response_mask([], "cpu").shape == (0, 0)


def dealt(monkeypatch, rollouts, world_size, max_tokens):
    """Return each rank's micro-batches of these rollouts."""
    monkeypatch.setattr(sft, "all_gather_objects", lambda items: list(rollouts))
    monkeypatch.setattr(sft, "world_size", lambda: world_size)
    shares = []
    for rank in range(world_size):
        monkeypatch.setattr(sft, "get_rank", lambda: rank)
        shares.append(rl.deal_micro_batches([], max_tokens))
    return shares


def rollouts_of_lengths(lengths):
    """Return rollouts in groups of four, in another order than that of groups and samples."""
    rollouts = [evaluate.Rollout(token_ids=[0] * length, group_index=i // 4, sample_number=i % 4)
                for i, length in enumerate(lengths)]
    return rollouts[::-1]


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("num_rollouts", [0, 1, 7, 96])
def test_conversations_are_balanced_by_tokens(monkeypatch, world_size, num_rollouts):
    """Each goes to exactly one micro-batch, none of which is larger than allowed, unless it is a
    single one. In a round the fullest has at most the longest conversation more than the emptiest,
    and no round could be left out."""
    lengths = np.random.default_rng(num_rollouts).integers(100, 900, num_rollouts).tolist()
    rollouts = rollouts_of_lengths(lengths)
    shares = dealt(monkeypatch, rollouts, world_size, 2000)
    dealt_rollouts = [rollout for share in shares for micro_batch in share
                      for rollout in micro_batch]
    assert len(dealt_rollouts) == len(rollouts)
    assert all(rollout in dealt_rollouts for rollout in rollouts)
    sizes = [[rl.sum_of_tokens(micro_batch) for micro_batch in share] for share in shares]
    assert all(0 < size <= 2000 for share in sizes for size in share)
    num_rounds = max(map(len, sizes))
    for round_sizes in zip(*sizes):
        if num_rollouts == 96:
            assert max(round_sizes) - min(round_sizes) <= 100
    assert num_rounds <= -(-sum(lengths) // (2000 * world_size)) + 1


@pytest.mark.parametrize("lengths, max_tokens, expected", [
    # two rounds: 6 | 5 | 4 1 | 3 2
    pytest.param([1, 2, 3, 4, 5, 6], 6, [[[6], [1, 4]], [[5], [2, 3]]], id="two-rounds"),
    # one round of 15 and 15 tokens; the order is that of groups and samples
    pytest.param([3, 3, 6, 12, 6], 15, [[[3, 12]], [[3, 6, 6]]], id="one-round"),
    # 20 tokens would be one round of 10 and 10, but three of 6 do not fit in it: a second round
    pytest.param([6, 6, 6, 2], 10, [[[6], [6]], [[6], [2]]], id="one-round-more"),
    pytest.param([], 10, [[], []], id="none"),
    pytest.param([5], 10, [[[5]], [], []], id="one-for-three"),
    pytest.param([50, 5], 10, [[[50]], [[5]]], id="longer-than-allowed"),
    # two of 6 must not share a micro-batch, whatever else is longer: a round more than 30 / 10
    pytest.param([12, 6, 6, 6], 10, [[[12], [6], [6], [6]]], id="one-longer-than-allowed")])
def test_balance_by_hand(monkeypatch, lengths, max_tokens, expected):
    shares = dealt(monkeypatch, rollouts_of_lengths(lengths), len(expected), max_tokens)
    assert [[[len(rollout.token_ids) for rollout in micro_batch] for micro_batch in share]
            for share in shares] == expected


def test_who_played_a_conversation_does_not_matter(monkeypatch):
    """Two of the same length, of which the first was played again, as question number 2 = 1 * 2 +
    0: its group is still in front of the other."""
    again = evaluate.Rollout(token_ids=[0] * 5, group_index=0, prompt_number=2)
    first_time = evaluate.Rollout(token_ids=[0] * 5, group_index=1, prompt_number=1)
    for rollouts in ([first_time, again], [again, first_time]):
        assert dealt(monkeypatch, rollouts, 2, 10) == [[[again]], [[first_time]]]
        assert dealt(monkeypatch, rollouts, 1, 10) == [[[again, first_time]]]


@pytest.mark.parametrize("group_indices, size, expected", [
    ([1, 4, 5, 9, 11, 12], 3, [[1, 4, 5], [9, 11, 12]]), ([0, 2, 3, 7], 3, [[0, 2, 3, 7]]),
    ([0, 2, 3, 7, 8], 3, [[0, 2, 3], [7, 8]]), ([6], 3, [[6]]), ([], 3, [[]]),
    (list(range(10)), 3, [[0, 1, 2, 3], [4, 5, 6], [7, 8, 9]])], ids=str)
def test_mini_batches_are_cut_from_the_groups_with_signal(group_indices, size, expected):
    args = argparse.Namespace(prompts_per_step=16, mini_batch_size=size)
    groups_with_signal = {group_index: [evaluate.Rollout()] for group_index in group_indices}
    assert rl.mini_batches(groups_with_signal, args, torch.device("cpu")) == expected


def test_mini_batches_are_cut_from_the_groups_of_all_ranks(monkeypatch):
    """Here groups 2 and 5 have signal, on other ranks 0 and 7. All ranks tell what they have."""
    told = []

    def all_reduce(has_signal, device):
        told.append(list(has_signal))
        return [float(group_index in (0, 2, 5, 7)) for group_index in range(8)]

    monkeypatch.setattr(sft, "all_reduce", all_reduce)
    monkeypatch.setattr(sft, "world_size", lambda: 4)
    args = argparse.Namespace(prompts_per_step=8, mini_batch_size=2)
    for groups_with_signal in ({5: [evaluate.Rollout()], 2: [evaluate.Rollout()]}, {}):
        mini_batches = rl.mini_batches(groups_with_signal, args, torch.device("cpu"))
        assert mini_batches == [[0, 2], [5, 7]]
        assert all(type(index) is int for index in sum(mini_batches, []))
    assert told == [[0, 0, 1, 0, 0, 1, 0, 0], [0] * 8]


def update_args(**flags):
    return argparse.Namespace(**{
        "overturn_mask": True, "mask_void": False, "baseline": "group", "divisor": "kept",
        "aggregation": "response", "max_new_tokens": 80, "max_turns": 6, "micro_batch_tokens": 700,
        "clip_low": 0.2, "clip_high": 0.3, "max_grad_norm": 1.0, "prompts_per_step": 2, **flags})


def test_an_update_encodes_every_image_once_and_in_a_thread(trained_folder, prompts, world,
                                                            monkeypatch):
    """Two groups of five: each original is opened and encoded once, each crop once per
    conversation, and the main thread, which trains, does none of it."""
    policy = sft.load_policy(str(trained_folder), "cpu", "float64", prompts)
    rows = tools.read_jsonl(world / "train.jsonl")[:2]
    engine = evaluate.Engine(policy, evaluate.Limits(6, 6, 80, 1200), 16)
    rollouts = engine.run(rows, 5, world)
    for i, r in enumerate(rollouts):
        r.advantage = (-1.0) ** i
        r.group_index = i // 5
    opened = []
    encoded = []
    open_image = tools.open_image
    preprocess_images = sft.Policy.preprocess_images

    def noting_open_image(path):
        opened.append(path.name)
        return open_image(path)

    def noting_preprocess_images(policy, views):
        encoded.extend([threading.current_thread()] * len(views))
        return preprocess_images(policy, views)

    monkeypatch.setattr(tools, "open_image", noting_open_image)
    monkeypatch.setattr(sft.Policy, "preprocess_images", noting_preprocess_images)
    evaluate.open_and_preprocess.cache_clear()
    optimizer = sft.Optimizer(sft.trainable_parameters(policy, True), 1e-5, 0.0)
    statistics = rl.update_policy(policy, optimizer, rollouts, update_args(), 1e-5)
    assert statistics.sums["num_trained_responses"] == 10 and statistics.grad_norm > 0
    assert opened == [Path(row["image"]).name for row in rows]
    num_crops = sum(r.token_ids.count(policy.vision_start_id) - 1 for r in rollouts)
    assert len(encoded) == 2 + num_crops and num_crops > 5
    assert threading.main_thread() not in encoded


def test_micro_batches_are_encoded_one_ahead(trained_policy, monkeypatch):
    """The update never holds more than two encoded micro-batches: the one it trains on and the
    next one."""
    encoded = []
    trained = []
    monkeypatch.setattr(rl, "encode_rollouts", lambda policy, rollouts: encoded.append(rollouts))

    def compute_logprobs(policy, rollouts, batch):
        trained.append(rollouts)
        assert rollouts == encoded[len(trained) - 1] and len(encoded) <= len(trained) + 1
        weight = next(p for p in policy.model.parameters() if p.requires_grad)
        logprobs = weight.sum() * torch.zeros(1, 1, dtype=torch.float64)
        return logprobs, torch.zeros(1, 1, dtype=torch.float64), masks("1")

    monkeypatch.setattr(rl, "compute_logprobs", compute_logprobs)
    policy = copy.deepcopy(trained_policy)
    optimizer = sft.Optimizer(sft.trainable_parameters(policy, True), 1e-5, 0.0)
    rollouts = [evaluate.Rollout(token_ids=[0] * 600, logprobs=[0.0], advantage=1.0,
                                 sample_number=i) for i in range(6)]
    rl.update_policy(policy, optimizer, rollouts, update_args(), 1e-5)
    assert [len(micro_batch) for micro_batch in trained] == [1] * 6


# ---- Metrics ------------------------------------------------------------------------------------


def test_statistics_of_the_ratio_by_hand():
    """Ratios 2, 1/2 and 1 with clips at 0.8 and 1.3: two are outside. Mean |log ratio| 2 log 2 / 3.
    approx_kl is the mean of (ratio - 1) - log ratio: (1 - log 2) + (-1/2 + log 2) + 0 = 1/2 over
    3 tokens. A second micro-batch, ratio 4: 3 - log 4, in all 3.5 - 2 log 2 over 4."""
    args = argparse.Namespace(clip_low=0.2, clip_high=0.3)
    statistics = rl.UpdateStatistics()
    statistics.add(0.25, torch.tensor([2.0, 0.5, 1.0], dtype=torch.float64).log(), 2, args)
    log_2 = math.log(2)
    assert statistics.sums == pytest.approx({
        "loss": 0.25, "logprob_diff": 2 * log_2, "approx_kl": 0.5, "num_clipped": 2,
        "num_trained_tokens": 3, "num_trained_responses": 2}, abs=1e-12)
    assert statistics.max_log_ratio == pytest.approx(log_2)
    statistics.add(-1.0, torch.tensor([4.0], dtype=torch.float64).log(), 1, args)
    statistics.grad_norm = 2.0
    assert statistics.max_log_ratio == pytest.approx(2 * log_2)
    metrics = rl.step_metrics([rollout(1.0, logprobs=[0.0])], [statistics], 0,
                              dict.fromkeys(evaluate.COUNTS, 0), "cpu")
    assert metrics["approx_kl"] == pytest.approx((3.5 - 2 * log_2) / 4, abs=1e-12)
    assert metrics["logprob_diff"] == pytest.approx(4 * log_2 / 4)
    assert metrics["max_log_ratio"] == pytest.approx(2 * log_2)
    assert metrics["clip_fraction"] == 3 / 4 and metrics["loss"] == -0.75
    assert metrics["num_trained_responses"] == 3 and metrics["num_trained_tokens"] == 4
    assert metrics["grad_norm"] == 2.0


@pytest.mark.parametrize("log_ratios", [[math.nan], [0.5, math.nan], [math.inf, 0.5]])
def test_a_ratio_that_is_not_finite_is_not_lost(log_ratios):
    """Also where a later micro-batch is healthy. The log says null."""
    args = argparse.Namespace(clip_low=0.2, clip_high=0.3)
    statistics = rl.UpdateStatistics()
    statistics.add(0.0, torch.tensor(log_ratios), 1, args)
    statistics.add(0.0, torch.tensor([0.25]), 1, args)
    metrics = rl.step_metrics([rollout(1.0, logprobs=[0.0])], [statistics, rl.UpdateStatistics()],
                              0, dict.fromkeys(evaluate.COUNTS, 0), "cpu")
    for name in ("max_log_ratio", "logprob_diff", "approx_kl"):
        assert metrics[name] is None


def test_metrics_of_the_conversations_by_hand():
    """Four conversations: right after 2 turns, wrong after 1, unfinished after 3, unscored after
    2. They have 3 + 1 + 4 + 2 = 10 tokens, of log-probability -1/2 but for two of -3: the mean of
    -log p is (8 / 2 + 6) / 10 = 1."""
    played = [
        rollout(1.0, turns=[{}] * 2, logprobs=[-0.5, -0.5, -3.0]),
        rollout(0.0, turns=[{}], logprobs=[-3.0]),
        rollout(0.0, "over_turn", turns=[{}] * 3, logprobs=[-0.5] * 4),
        rollout(None, turns=[{}] * 2, logprobs=[-0.5] * 2)]
    metrics = rl.step_metrics(played, [rl.UpdateStatistics()], 2,
                              dict.fromkeys(evaluate.COUNTS, 0), "cpu")
    expected = {"reward": 1 / 3, "unscored": 1 / 4, "num_rollouts": 4, "mean_turns": 2.0,
                "mean_turns_correct": 2.0, "answer": 3 / 4, "void": 0.0, "over_turn": 1 / 4,
                "over_context": 0.0, "incorrect": 1 / 4, "num_sampled_tokens": 10,
                "mean_response_length": 2.5, "entropy": 1.0, "num_zero_variance_groups": 2,
                "num_trained_responses": 0, "approx_kl": 0.0, "loss": 0.0}
    assert {name: metrics[name] for name in expected} == expected


def test_the_mean_of_minus_log_p_estimates_the_entropy():
    """20,000 draws from (1/2, 1/4, 1/4), whose entropy is 1.5 log 2: within five standard
    errors."""
    probabilities = torch.tensor([0.5, 0.25, 0.25])
    picked = torch.multinomial(probabilities, 20000, True,
                               generator=torch.Generator().manual_seed(0))
    played = [rollout(1.0, turns=[{}], logprobs=probabilities[picked].log().tolist())]
    metrics = rl.step_metrics(played, [rl.UpdateStatistics()], 0,
                              dict.fromkeys(evaluate.COUNTS, 0), "cpu")
    # -log p is log 2 or 2 log 2, each half of the time: its deviation is log(2) / 2
    standard_error = math.log(2) / 2 / 20000**0.5
    assert abs(metrics["entropy"] - 1.5 * math.log(2)) < 5 * standard_error


# ---- The loop -----------------------------------------------------------------------------------


@pytest.mark.parametrize("anneal_lr, warmup_ratio, expected", [
    (False, 0.5, [4.0, 8.0, 8.0, 8.0]), (True, 0.5, [4.0, 6.0, 4.0, 2.0]),
    (False, 0.0, [8.0, 8.0, 8.0, 8.0]), (False, 1.0, [2.0, 4.0, 6.0, 8.0])])
def test_learning_rate_by_hand(anneal_lr, warmup_ratio, expected):
    args = argparse.Namespace(lr=8.0, steps=4, warmup_ratio=warmup_ratio, anneal_lr=anneal_lr)
    assert [rl.learning_rate(step, args) for step in range(4)] == expected


COMMON = ["--prompts_per_step", 4, "--group_size", 4, "--max_turns", 6, "--max_new_tokens", 80,
          "--dtype", "float64", "--max_num_seqs", 16,
          "--max_model_len", 1200, "--warmup_ratio", 0, "--no-anneal_lr", "--eval_every", 0,
          # one update a step: the sampler is then the policy that is trained
          "--mini_batch_size", 4]


@pytest.fixture(scope="module")
def runs(trained_folder, world, tmp_path_factory):
    """Three steps on one process, and the same on two. The questions are those that the small
    policy has seen in training: some of its samples are right and some are not."""
    out = tmp_path_factory.mktemp("rl")
    prompts = out / "prompts.json"
    prompts.write_text(json.dumps({"system": "Look closer."}))
    fields = ("id", "image", "question", "answer")
    seen = [{field: row[field] for field in fields}
            for row in tools.read_jsonl(world / "coldstart.jsonl")[:4]]
    tools.write_jsonl(world / "seen.jsonl", seen)
    tools.write_jsonl(world / "seen2.jsonl", seen[::-1])
    seen_images = {row["image"] for row in seen}
    tools.write_jsonl(world / "unseen.jsonl", [
        row for row in tools.read_jsonl(world / "train.jsonl") if row["image"] not in seen_images])
    common = ["rl.py", "--model", trained_folder,
              "--data", world / "seen.jsonl", world / "seen2.jsonl",
              "--prompts", prompts, *COMMON, "--save_every", 1, "--save_rollouts_every", 2,
              "--eval_every", 2, "--eval_data", world / "unseen.jsonl",
              "--eval_size", 2, "--eval_turns", 8]
    run_script(*common, "--steps", 3, "--out", out / "one")
    run_script(*common, "--steps", 3, "--out", out / "two", nproc=2)
    return out, common


def read_metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").open()]


def test_two_processes_equal_one(runs, trained_folder):
    out, _ = runs
    one = read_metrics(out / "one")
    two = read_metrics(out / "two")
    assert any(m["num_trained_responses"] > 0 for m in one)
    assert largest_difference(out / "one", trained_folder) > 1e-6
    assert largest_difference(out / "one", out / "two") < 1e-10
    assert ["val_accuracy" in m for m in one] == [False, True, True]
    assert "val_accuracy_initial" in one[0]
    assert all(m["val_accuracy"] in (0.0, 0.5, 1.0) for m in one[1:])
    # seconds differ, and each process drafts by itself
    depends = {"seconds_rollout", "seconds_update", "seconds_wait", "mean_acceptance_length",
               "acceptance_rate"}
    for a, b in zip(one, two):
        assert a.keys() == b.keys()
        for name in a.keys() - depends:
            assert a[name] == pytest.approx(b[name], abs=1e-9), name
        assert a["logprob_diff"] < 1e-9 and a["max_log_ratio"] < 1e-8 and a["approx_kl"] < 1e-9
        assert a["entropy"] > 0
        assert a["mean_response_length"] == a["num_sampled_tokens"] / a["num_rollouts"]


def test_who_trains_on_what_does_not_matter(runs, trained_folder, world):
    """Three questions, one that is sometimes answered right and two whose answer is never given, so
    that one group has signal: one, two and three processes train the same on it. The ranks that did
    not play it take part in the update, too."""
    out, _ = runs
    rows = [tools.read_jsonl(world / "train.jsonl")[i] for i in (0, 2, 4)]
    never_right = [{**row, "answer": "no such answer"} for row in rows[1:]]
    tools.write_jsonl(world / "half.jsonl", [rows[0], *never_right])
    common = ["rl.py", "--model", trained_folder, "--data", world / "half.jsonl",
              "--prompts", out / "prompts.json", *COMMON,
              "--prompts_per_step", 3, "--group_size", 8, "--resample", 0, "--steps", 2,
              "--baseline", "group"]
    num_trained = {}
    for nproc in (1, 2, 3):
        run_script(*common, "--out", out / f"half{nproc}", nproc=nproc)
        metrics = read_metrics(out / f"half{nproc}")
        num_trained[nproc] = [m["num_trained_responses"] for m in metrics]
    assert all(m["num_zero_variance_groups"] >= 2 for m in read_metrics(out / "half1"))
    assert all(number > 3 for number in num_trained[1])
    for nproc in (2, 3):
        assert largest_difference(out / "half1", out / f"half{nproc}") < 1e-10
        assert num_trained[nproc] == num_trained[1]
    assert largest_difference(out / "half1", trained_folder) > 1e-6


def test_a_policy_without_any_signal_does_not_hang_and_does_not_move(make_tiny, world, tmp_path):
    """A random policy never finishes a turn: no group carries signal on any rank, every collective
    is still joined."""
    policy = make_tiny(torch.float64)
    policy.model.config.save_pretrained(tmp_path / "random")
    sft.export(policy, tmp_path / "random")
    done = run_script("rl.py", "--model", tmp_path / "random", "--data", world / "train.jsonl",
                      *COMMON, "--max_new_tokens", 4,
                      "--steps", 1, "--out", tmp_path / "out", nproc=2)
    assert done.stdout.count("rl: nothing was trained") == 1
    metrics = read_metrics(tmp_path / "out")[0]
    assert metrics["num_zero_variance_groups"] == 4 and metrics["void"] == 1.0
    assert metrics["num_trained_responses"] == 0 and metrics["grad_norm"] == 0
    assert largest_difference(tmp_path / "random", tmp_path / "out") == 0


def test_saved_rollouts_are_trajectory_rows(runs, world):
    """The first eight conversations of a step, here two whole groups, with their advantages. Those
    about held-out questions are saved at each evaluation, also on two processes."""
    out, _ = runs
    folder = out / "one" / "rollouts"
    evaluated_steps = ["val_00000.jsonl", "val_00002.jsonl", "val_00003.jsonl"]
    assert sorted(path.name for path in folder.iterdir()) == ["step_00002.jsonl", *evaluated_steps]
    for name in evaluated_steps:
        rows = tools.read_jsonl(folder / name, tools.check_trajectory)
        other_rows = tools.read_jsonl(out / "two/rollouts" / name)
        assert len(rows) == len({row["id"] for row in rows}) == 2 and rows == other_rows
    rows = tools.read_jsonl(folder / "step_00002.jsonl", tools.check_trajectory)
    assert len(rows) == 8
    for group in (rows[:4], rows[4:]):
        assert len({row["id"] for row in group}) == 1
        assert [row["sample"] for row in group] == [0, 1, 2, 3]
        rewards = torch.tensor([[row["reward"] for row in group]], dtype=torch.float64)
        kept = torch.tensor([[row["finish_reason"] in ("answer", "void") for row in group]])
        expected = rl.group_advantages(rewards, kept, 0.5)
        assert [row["advantage"] for row in group] == expected[0].tolist() and expected.any()
    assert all(row["system"] == "Look closer." and (world / row["image"]).exists() for row in rows)


@pytest.mark.parametrize("scores, kept", [((0.9, 0.1), 1), ((0.1, 0.1), 2)],
                         ids=["first-is-better", "equal"])
def test_the_best_checkpoint_is_kept(runs, tmp_path, monkeypatch, scores, kept):
    """Validated after both of two steps: the exported model is that of the better one, the later
    one if equal."""
    results = iter(evaluated((0.99, 0), *((score, 0) for score in scores)))

    monkeypatch.setattr(rl, "validate", lambda *args: {**next(results), "step": args[-1]})
    run_script(*runs[1], "--steps", 2, "--eval_every", 1, "--out", tmp_path)
    metrics = read_metrics(tmp_path)
    assert [m["val_accuracy"] for m in metrics] == list(scores)
    assert metrics[0]["val_accuracy_initial"] == 0.99 and metrics[1]["alarm"]
    policy = sft.load_policy(str(tmp_path), "cpu", "float64")
    optimizer = sft.Optimizer(sft.trainable_parameters(policy, True), 0.0, 0.0)
    exported = [bucket.master for bucket in optimizer.buckets]
    same = []
    for step in (1, 2):
        state = torch.load(tmp_path / f"state/step_000000{step}/0.pt")["optimizer"]
        if all(torch.equal(a, shard["master"]) for a, shard in zip(exported, state)):
            same.append(step)
    assert same == [kept]


def test_a_run_that_gets_worse_is_told_and_ended(runs, tmp_path, monkeypatch):
    """Of four steps: the second evaluation in a row that is clearly below the best ends the run,
    which is saved like a finished one. Without the flag it goes on."""
    def run(*flags):
        results = iter(evaluated(*[(accuracy, 0) for accuracy in (0.9, 0.99, 0.1, 0.1, 0.1)]))

        monkeypatch.setattr(rl, "validate", lambda *args: {**next(results), "step": args[-1]})
        done = run_script(*runs[1], "--steps", 4, "--eval_every", 1, "--out", tmp_path, *flags)
        return done.stdout, read_metrics(tmp_path)

    stdout, metrics = run("--stop_when_worse")
    assert "rl: stopped after step 3 of 4" in stdout
    assert "that of step 1, val_accuracy 0.990" in stdout
    assert [bool(line["alarm"]) for line in metrics] == [False, True, True]
    assert stdout.count("the policy gets worse on held-out questions: val_accuracy was 0.990") == 2
    assert (tmp_path / "state/step_0000003").is_dir()
    stdout, metrics = run()
    assert len(metrics) == 4 and "stopped" not in stdout


@pytest.mark.parametrize("nproc, whole", [(1, "one"), (2, "two")])
def test_resume_is_exact(runs, nproc, whole):
    """Killed twice at random moments and resumed: the same weights, bit for bit, and one line per
    step in the log."""
    out, common = runs
    cut = out / f"cut{nproc}"
    assert crash.run_killed([*common, "--steps", 3], nproc, cut, 2, 0.5, launch=Forked) == 2
    assert largest_difference(out / whole, cut) == 0
    assert [m["step"] for m in read_metrics(cut)] == [1, 2, 3]


def test_a_resumed_run_knows_its_evaluations(tmp_path):
    """Those before the first step, after it, and two steps later: the log gives back what the run
    knew, also what the judge could not score."""
    evaluations = evaluated((0.4, 0.1), (0.6, 0.2), (None, 0.3), (0.5, 0.0))
    for evaluation, step in zip(evaluations, (0, 1, 3, 4)):
        evaluation["step"] = step
    evaluations[1]["unfinished_accuracy"] = 0.25
    lines = []
    for step in range(1, 5):
        so_far = [evaluation for evaluation in evaluations if evaluation["step"] <= step]
        lines.append({"step": step, **rl.evaluation_metrics(so_far, step, 100)})
    assert [line["unfinished_accuracy"] for line in lines] == [0.25] * 4
    assert [line.get("val_accuracy", "none") for line in lines] == [0.6, "none", None, 0.5]
    assert lines[0]["val_accuracy_initial"] == 0.4
    assert [bool(line.get("alarm")) for line in lines] == [False, False, False, False]
    tools.write_jsonl(tmp_path / "metrics.jsonl", lines)
    again = rl.read_evaluations(tmp_path)
    for evaluation, known in zip(again, evaluations, strict=True):
        assert {name: evaluation[name] for name in ("step", "val_accuracy", "val_over_turn")} == {
            name: known[name] for name in ("step", "val_accuracy", "val_over_turn")}
    assert rl.best_evaluation(again) is again[1] and rl.last_estimate(again) == 0.25


def test_the_best_evaluation_is_one_after_training():
    assert rl.best_evaluation(evaluated((0.9, 0), (0.5, 0), (0.5, 0)))["step"] == 12
    assert rl.best_evaluation(evaluated((0.9, 0), (0.5, 0), (None, 0)))["step"] == 6
    assert rl.best_evaluation(evaluated((0.9, 0), (None, 0))) is None


def test_resuming_without_the_log_is_refused(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(tools.InputError, match="metrics.jsonl is gone"):
        rl.read_evaluations(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st')
    with pytest.raises(tools.InputError, match="metrics.jsonl:2: "):
        rl.read_evaluations(tmp_path)


def test_the_advice_after_a_forgotten_resume_works(runs, monkeypatch):
    """Stopped after step 1 and started again without --resume: as told, the first run continues
    with its log, and ends like a run that was never stopped."""
    out, common = runs
    folder = out / "forgotten"
    three_steps = [*common, "--steps", 3]
    with monkeypatch.context() as patch:
        patch.setattr(sft.StopSignal, "received_by_any_rank", lambda *_: signal.SIGTERM)
        for _ in range(2):
            stopped = run_script(*three_steps, "--out", folder, check=False)
            assert stopped.returncode == 143
    advice = shlex.split(stopped.stdout.split("stop this one and give ")[1].splitlines()[0])
    continued = run_script(*three_steps, *advice)
    assert "rl: continues from step 1 of 3" in continued.stdout
    assert largest_difference(out / "one", folder / "old_run_1") == 0
    assert [m["step"] for m in read_metrics(folder / "old_run_1")] == [1, 2, 3]
    best = max(m["val_accuracy"] for m in read_metrics(folder / "old_run_1")[1:])
    assert f"rl: model written to {advice[2]}: that of step " in continued.stdout
    assert f"val_accuracy {best:.3f}" in continued.stdout


@pytest.mark.parametrize("accuracies, trained, expected", [
    ([0.5, None, 0.7, 0.7, 0.6], 3, "that of step 4, val_accuracy 0.700"),
    ([None, None], 3, "that of the last step, 2 (nothing was evaluated)"),
    ([0.5], 0, "that of step 1, val_accuracy 0.500")])
def test_the_end_of_a_run_says_which_model_it_has_kept(
        tmp_path, capsys, accuracies, trained, expected):
    rows = [{"step": step, "val_accuracy": accuracy, "num_trained_responses": 0, "grad_norm": 1.0}
            for step, accuracy in enumerate(accuracies, 1)]
    rows[0]["num_trained_responses"] = trained
    tools.write_jsonl(tmp_path / "metrics.jsonl", rows)
    run_folder.report_rl_model(tmp_path)
    first, *others = capsys.readouterr().out.splitlines()
    assert first == f"rl: model written to {tmp_path}: {expected}"
    assert len(others) == (trained == 0) and all("nothing was trained" in line for line in others)


# ---- The command --------------------------------------------------------------------------------


@pytest.mark.parametrize("text, expected", [("group", "group"), ("completed", "completed"),
                                            ("estimate", "estimate"), ("outcome", "outcome"),
                                            ("0.5", 0.5), ("-1", -1.0), ("0", 0.0)])
def test_a_baseline_is_a_word_or_a_number(text, expected):
    assert rl.baseline_flag(text) == expected


@pytest.mark.parametrize("text", ["mean", "nan", "inf", ""])
def test_other_baselines_are_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="group, completed, estimate, outcome"):
        rl.baseline_flag(text)


@pytest.mark.parametrize("flags, message", [
    (["--group_size", "1"], "--group_size must be at least 2"),
    (["--overturn_penalty", "1"], "--overturn_penalty needs --no-overturn_mask"),
    (["--baseline", "estimate", "--eval_every", "0"], "set --eval_every and --eval_size above 0"),
    (["--baseline", "estimate", "--eval_size", "0"], "set --eval_every and --eval_size above 0"),
    (["--eval_turns", "3"], "--eval_turns 3 is less than --max_turns 4"),
    (["--eval_turns", "3", "--baseline", "outcome", "--eval_every", "0"],
     "--eval_turns 3 is less than --max_turns 4"),
    (["--baseline", "0.5", "--no-overturn_mask"], "leave one of them out"),
    (["--no-overturn_mask", "--base", "group"], "leave one of them out"),
    (["--max_images", "1"], "--max_images 1 allows no zoom"),
    (["--lr", "1e-6"], "--lr 1e-06 is a rate for AdamW: with sgd .* add --optimizer adamw"),
    (["--warmup_ratio", "50"], "--warmup_ratio 50.0 is above 1: it is a fraction")],
    ids=lambda value: value if isinstance(value, str) else None)
def test_flags_that_make_no_sense_together_are_refused(monkeypatch, flags, message):
    monkeypatch.setattr("sys.argv", ["rl.py", *flags])
    with pytest.raises(tools.InputError, match=message):
        rl.parse_args()


@pytest.mark.parametrize("flags, baseline", [
    ([], 0.5), (["--no-overturn_mask"], 0.5), (["--baseline", "group"], "group"),
    (["--overturn_mask", "--baseline", "0"], 0.0)], ids=str)
def test_the_default_of_the_baseline(monkeypatch, flags, baseline):
    monkeypatch.setattr("sys.argv", ["rl.py", *flags])
    assert rl.parse_args().baseline == baseline


@pytest.mark.parametrize("flags, lr, max_grad_norm", [
    ([], 0.2, 0.1), (["--optimizer", "adamw"], 2.5e-4, 1.0),
    (["--optimizer", "adamw", "--lr", "1e-6"], 1e-6, 1.0), (["--lr", "0.4"], 0.4, 0.1),
    (["--max_grad_norm", "0.5"], 0.2, 0.5)], ids=str)
def test_each_optimizer_has_a_default_rate_and_norm(monkeypatch, flags, lr, max_grad_norm):
    monkeypatch.setattr("sys.argv", ["rl.py", *flags])
    args = rl.parse_args()
    assert (args.lr, args.max_grad_norm) == (lr, max_grad_norm)


@pytest.mark.parametrize("flags", [["--eval_turns", "4"],
                                   ["--eval_turns", "3", "--eval_every", "0"]], ids=str)
def test_turns_of_evaluation_that_do_make_sense(monkeypatch, flags):
    """As many as in training, or any number if nothing is evaluated."""
    monkeypatch.setattr("sys.argv", ["rl.py", *flags])
    assert rl.parse_args().max_turns == 4


@pytest.fixture
def question_files(tmp_path):
    """Two question files of five rows each, in folders of their own."""
    for name in "ab":
        tools.write_jsonl(tmp_path / name / "q.jsonl", [
            {"id": f"{name}{i}", "image": "x.jpg", "question": "?", "answer": "1"}
            for i in range(5)])
        Image.new("RGB", (8, 8)).save(tmp_path / name / "x.jpg")
    return [tmp_path / "a" / "q.jsonl", tmp_path / "b" / "q.jsonl"]


def test_question_files_are_concatenated(question_files):
    """Each question with its own file's folder, in which its image lies."""
    args = argparse.Namespace(data=question_files, eval_every=0, eval_size=2, prompts_per_step=10)
    questions = rl.load_questions(args)
    assert [(row["id"], folder.name) for row, folder in questions.training] == [
        (f"{name}{i}", name) for name in "ab" for i in range(5)]
    assert questions.held_out == []
    args.data = question_files[:1]
    args.eval_data = question_files[1]
    args.eval_every = 1
    args.prompts_per_step = 5
    assert [(row["id"], folder.name) for row, folder in rl.load_questions(args).held_out] == [
        ("b0", "b"), ("b1", "b")]


@pytest.mark.parametrize("held_out, message", [
    ([("b7", "y.jpg"), ("a3", "y.jpg"), ("a2", "x.jpg")],
     "2 of 3 held-out .* by their id or image.*'a3'"),
    ([("new", "./x.jpg")], "1 of 1 held-out .*'new'"),
    ([("new", "link.jpg")], "1 of 1 held-out .*'new'"),
    ([("new", "y.jpg"), ("a3", "y.jpg")], None)], ids=str)
def test_questions_that_are_trained_on_are_not_held_out(question_files, held_out, message):
    """By their id, and by their image in any spelling; only those that are played (--eval_size)."""
    folder = question_files[0].parent
    for name in ("x.jpg", "y.jpg"):
        Image.new("RGB", (40, 40)).save(folder / name)
    (folder / "link.jpg").symlink_to("x.jpg")
    tools.write_jsonl(folder / "val.jsonl", [
        {"id": name, "image": image, "question": "?", "answer": "1"} for name, image in held_out])
    args = argparse.Namespace(data=question_files[:1], eval_data=folder / "val.jsonl", eval_every=1,
                              eval_size=3 if message else 1, prompts_per_step=5)
    if message is None:
        assert len(rl.load_questions(args).held_out) == 1
        return
    with pytest.raises(tools.InputError, match=message):
        rl.load_questions(args)
    args.eval_every = 0     # then no checkpoint is chosen
    assert rl.load_questions(args).held_out == []


def test_too_few_questions_are_refused(question_files):
    args = argparse.Namespace(data=question_files, eval_every=0, prompts_per_step=11)
    with pytest.raises(tools.InputError, match="--data has 10 questions to train on, fewer than "
                       "--prompts_per_step 11"):
        rl.load_questions(args)


def test_missing_images_are_told_before_the_first_step(question_files):
    """Of the questions that are used: those beyond --eval_size are not."""
    train_file, eval_file = question_files
    args = argparse.Namespace(data=[train_file], eval_data=eval_file, eval_every=1, eval_size=2,
                              prompts_per_step=1)
    eval_rows = tools.read_jsonl(eval_file)
    tools.write_jsonl(eval_file, [*eval_rows[:2], {**eval_rows[2], "image": "gone.jpg"}])
    assert len(rl.load_questions(args).held_out) == 2
    args.eval_size = 3
    with pytest.raises(tools.InputError, match="b/q.jsonl:3: .*gone.jpg: image is missing"):
        rl.load_questions(args)
    (train_file.parent / "x.jpg").unlink()
    with pytest.raises(tools.InputError, match=r"a/q.jsonl:1: .* \(and 4 more rows\)"):
        rl.load_questions(args)


def test_a_missing_question_file_says_which_stage_makes_it(tmp_path):
    args = argparse.Namespace(data=[tmp_path / "none.jsonl"], eval_every=0, prompts_per_step=1)
    with pytest.raises(tools.InputError, match="build_data.py"):
        rl.load_questions(args)


def test_mistakes_are_one_line(trained_folder, world, monkeypatch):
    data = ["--data", world / "train.jsonl", "--eval_every", 0]
    done = run_script("rl.py", "--model", trained_folder, *data, "--prompts_per_step", 1,
                      nproc=2, check=False)
    assert done.returncode != 0
    assert "--prompts_per_step 1 is less than the number of processes 2" in done.stderr
    monkeypatch.setattr("sys.argv", ["rl.py", "--model", "checkpoints/none", *map(str, data),
                                     "--prompts_per_step", "4"])
    with pytest.raises(tools.InputError, match="python sft.py"):
        rl.main()


def test_no_library_prints_a_warning(trained_folder, world, tmp_path):
    """As a user starts them, with gradient checkpointing: what a stage prints is its own lines
    only."""
    coldstart = ["sft.py", "--data", world / "coldstart.jsonl", "--batch_size", 2]
    rows = tools.read_jsonl(world / "train.jsonl")
    tools.write_jsonl(world / "first.jsonl", rows[:1])
    tools.write_jsonl(world / "others.jsonl", rows[1:])
    step = ["rl.py", "--data", world / "others.jsonl",
            "--prompts_per_step", 2, "--group_size", 2, "--max_num_seqs", 4,
            "--max_turns", 2, "--max_new_tokens", 40, "--eval_data", world / "first.jsonl",
            "--eval_size", 1, "--eval_turns", 2]
    started = {}
    for stage, *flags in (coldstart, step):
        started[stage] = crash.launch(
            [stage, "--model", trained_folder, *flags, "--steps", 1, "--gradient_checkpointing",
             "--out", tmp_path / stage],
            env={"PYTHONWARNINGS": "default,ignore::ResourceWarning"})
    for stage, process in started.items():
        code, out, err = crash.finish(process)
        assert code == 0, err
        lines = [line for line in (out + err).splitlines() if line]
        name = stage.removesuffix(".py")
        ours = (f"{stage}: ", f"{name} ", f"{name}: ", f"{trained_folder}: ", "11 questions")
        assert lines and all(line.startswith(ours) for line in lines), lines
