"""Specification of GRPO with over-turn masking: numbers worked by hand, an independent reference,
float64 autograd, and real runs on one and two processes."""

import argparse
import copy
import json
import math
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from extras import crash
import evaluate
import rl
import sft
import tools
from conftest import ChatServer, Forked, run_script

T, F = True, False


def test_group_advantages_by_hand():
    """r = (1, 0, 0, 0): mean 1/4, unbiased std 1/2. Without the two unfinished: r = (1, 0),
    mean 1/2, std sqrt(1/2). With 1/2 in their place: r = (1, 0, 1/2, 1/2), std sqrt(1/6); b = 1/2
    whatever the mean is. With 0: b = 0."""
    rewards, completed = (torch.tensor([[1.0, 0, 0, 0]], dtype=torch.float64),
                          torch.tensor([[T, T, F, F]]))
    inside = rl.group_advantages(rewards, completed, eps=0.0)
    assert torch.allclose(inside, torch.tensor([[1.5, -0.5, 0, 0]], dtype=torch.float64),
                          atol=1e-12)
    outside = rl.group_advantages(rewards, completed, baseline="completed", eps=0.0)
    assert torch.allclose(outside, torch.tensor([[0.5**0.5, -(0.5**0.5), 0, 0]],
                                                dtype=torch.float64), atol=1e-12)
    half = rl.group_advantages(rewards, completed, baseline=0.5, eps=0.0)
    assert torch.allclose(half, torch.tensor([[1.5**0.5, -(1.5**0.5), 0, 0]],
                                             dtype=torch.float64), atol=1e-12)
    zero = rl.group_advantages(rewards, completed, baseline=0.0, eps=0.0)
    assert torch.allclose(zero, torch.tensor([[2.0, 0, 0, 0]], dtype=torch.float64), atol=1e-12)
    # eps is added to the deviation: (1 - 1/4) / (1/2 + 1/2)
    damped = rl.group_advantages(rewards, completed, eps=0.5)
    assert torch.allclose(damped, torch.tensor([[0.75, -0.25, 0, 0]], dtype=torch.float64),
                          atol=1e-12)
    ones, done = torch.ones(1, 4, dtype=torch.float64), torch.tensor([[T, T, F, F]])
    # a value below 1: right ones still gain
    paid = rl.group_advantages(ones * done, done, baseline=0.9, eps=0.0)
    assert torch.allclose(paid, torch.tensor([[3**0.5, 3**0.5, 0, 0]], dtype=torch.float64),
                          atol=1e-12)
    # a negative value: (1, -1/2) has mean 1/4 and deviation sqrt(9/8); 3/2 over that is sqrt(2)
    fined = rl.group_advantages(torch.tensor([[1.0, 0]], dtype=torch.float64),
                                torch.tensor([[T, F]]), baseline=-0.5, eps=0.0)
    assert torch.allclose(fined, torch.tensor([[2**0.5, 0]], dtype=torch.float64), atol=1e-12)


def test_groups_do_not_know_of_each_other():
    """Three groups at once: (1, 0, 0, 0) and (1, 1, 1, 0), whose deviations are 1/2 and 1/2, means
    1/4 and 3/4; and one with a reward that is not a number, which teaches nothing. With b = 1/2 a
    group without a right answer still learns that its wrong one is worse than going on."""
    rewards = torch.tensor([[1.0, 0, 0, 0], [1, 1, 1, 0], [math.nan, 1, 0, 0]])
    found = rl.group_advantages(rewards, torch.ones(3, 4, dtype=torch.bool), eps=0.0)
    assert found.tolist() == [[1.5, -0.5, -0.5, -0.5], [0.5, 0.5, 0.5, -1.5], [0, 0, 0, 0]]
    found = rl.group_advantages(torch.zeros(2, 4), torch.tensor([[T, F, F, F], [T, T, T, F]]),
                                baseline=0.5, eps=0.0)
    # (0, 1/2, 1/2, 1/2) and (0, 0, 0, 1/2) have deviation 1/4
    assert found.tolist() == [[-2, 0, 0, 0], [-2, -2, -2, 0]]


@pytest.mark.parametrize("rewards, completed", [
    ([1.0, 1, 1, 1], [T, T, T, T]), ([0.0, 0, 0, 0], [T, F, T, F]), ([1.0], [T]),
    ([0.0, 0, 0], [F, F, F])])
@pytest.mark.parametrize("unfinished_accuracy", ["group", "completed"])
def test_no_spread_means_no_advantage_and_never_nan(rewards, completed, value):
    out = rl.group_advantages(torch.tensor([rewards]), torch.tensor([completed]),
                              baseline=value)
    assert torch.equal(out, torch.zeros_like(out))


@pytest.mark.parametrize("rewards, completed, value", [
    ([1.0, 1, 1], [T, T, T], 0.5), ([0.0, 0, 0], [F, F, F], 0.5),
    ([1.0, 0, 1], [T, F, T], 1.0), ([1.0], [T], 0.5)])
def test_a_number_needs_a_spread_too(rewards, completed, value):
    """s is of the rewards with b in the place of unfinished ones: all right, none completed, all
    worth the same, one alone."""
    out = rl.group_advantages(torch.tensor([rewards]), torch.tensor([completed]),
                              baseline=value)
    assert torch.equal(out, torch.zeros_like(out))


class Tree:
    """A small world for softmax policies: at each of `turns` turns answer (right with odds that the
    choice decides) or go on; who has not answered at the end is unfinished. Choices of a turn:
    guess (0.2), look closer and claim (0.6), go on."""

    def __init__(self, seed, turns=3):
        g = torch.Generator().manual_seed(seed)
        self.logits = torch.randn(turns, 3, generator=g, dtype=torch.float64).requires_grad_(True)
        self.odds = torch.rand(turns, 2, generator=g, dtype=torch.float64)

    def outcomes(self):
        """All conversations: (log-prob, reward, completed), a right and a wrong one for each
        answer."""
        logp, alive, found = self.logits.log_softmax(-1), 0.0, []
        for turn in range(len(logp)):
            for choice in range(2):
                for reward in (1.0, 0.0):
                    chance = self.odds[turn, choice] if reward else 1 - self.odds[turn, choice]
                    found.append((alive + logp[turn, choice] + chance.log(), reward, True))
            alive = alive + logp[turn, 2]
        return [*found, (alive, 0.0, False)]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("b", [0.0, 0.17, 0.5, 1.0])
def test_masking_pays_the_baseline_for_an_unfinished_conversation(seed, b):
    """E[M (r - b) grad log pi] = grad(P(correct) + b P(unfinished)), exactly: the expectation by
    enumeration of all conversations, the right-hand side by autograd. Without the mask (all M = 1)
    it is grad P(correct), whatever b is."""
    tree = Tree(seed)
    paths = tree.outcomes()
    assert sum(logp.exp() for logp, _, _ in paths).item() == pytest.approx(1.0, abs=1e-12)
    surrogate = sum(logp.exp().detach() * done * (r - b) * logp for logp, r, done in paths)
    left, = torch.autograd.grad(surrogate, tree.logits, retain_graph=True)
    value = sum(logp.exp() * (r if done else b) for logp, r, done in paths)
    right, = torch.autograd.grad(value, tree.logits, retain_graph=True)
    assert torch.allclose(left, right, atol=1e-14, rtol=0) and left.abs().sum() > 1e-3
    unmasked, = torch.autograd.grad(
        sum(logp.exp().detach() * (r - b) * logp for logp, r, _ in paths), tree.logits,
        retain_graph=True)
    correct, = torch.autograd.grad(sum(logp.exp() * r for logp, r, _ in paths), tree.logits)
    assert torch.allclose(unmasked, correct, atol=1e-14, rtol=0)
    if b:
        assert (left - unmasked).abs().max() > 1e-5


def test_the_advantages_of_many_groups_follow_that_gradient():
    """The same through group_advantages: 20,000 groups of 16 sampled conversations of one tree,
    b = 0.4 (a number): the mean of A' (s + eps) grad log pi is the gradient of
    P(correct) + 0.4 P(unfinished), within four standard errors."""
    tree, g = Tree(1), torch.Generator().manual_seed(0)
    paths = tree.outcomes()
    grads = torch.stack([torch.autograd.grad(logp, tree.logits, retain_graph=True)[0].flatten()
                         for logp, _, _ in paths])                                   # (N, 9)
    picked = torch.multinomial(torch.stack([logp.exp().detach() for logp, _, _ in paths]).float(),
                               20000 * 16, True, generator=g)
    rewards = torch.tensor([r for _, r, _ in paths],
                           dtype=torch.float64)[picked].view(-1, 16)                 # (P, G)
    completed = torch.tensor([done for *_, done in paths])[picked].view(-1, 16)      # (P, G)
    spread = torch.where(completed, rewards, 0.4).std(1, keepdim=True)               # (P, 1)
    scaled = rl.group_advantages(rewards, completed, baseline=0.4,
                                 eps=0.0) * spread                                   # (P, G)
    each = (scaled.view(-1, 1) * grads[picked]).view(-1, 16, 9).mean(1)              # (P, 9)
    value = sum(logp.exp() * (r if done else 0.4) for logp, r, done in paths)
    expected = torch.autograd.grad(value, tree.logits)[0].flatten()
    error = each.std(0) / len(each) ** 0.5
    assert (((each.mean(0) - expected).abs() < 4 * error + 1e-12).all()
            and (expected.abs() > 8 * error).any())


def test_one_completed_response_outside_the_baseline_has_no_advantage():
    args = torch.tensor([[1.0, 0, 0]]), torch.tensor([[T, F, F]])
    assert rl.group_advantages(*args, baseline="completed").abs().sum() == 0
    assert rl.group_advantages(*args)[0, 0] > 0


def test_incomplete_responses_never_carry_advantage():
    torch.manual_seed(0)
    completed = torch.rand(50, 6) < 0.5
    rewards = (torch.rand(50, 6) < 0.5).double() * completed
    for value in ("group", "completed", 0.0, 0.5, 1.0, -0.5):
        assert (rl.group_advantages(rewards, completed,
                                    baseline=value)[~completed] == 0).all()


def test_grpo_loss_by_hand():
    """Three responses of 2, 1 and 2 tokens; the last ran out of turns.

    Ratios (2, 1), (0.5), (1, 1); A = (1, -1, 0). Clipped at 0.8 and 1.3: first min(2, 1.3) = 1.3
    and 1, mean 1.15; second min(-0.5, -0.8) = -0.8. J = (1.15 - 0.8) / 2 over the completed, / 3
    over all; tokens: (2.3 - 0.8) / 3 or / 5; constant with 10 tokens: 1.5 / 20 or / 30.
    """
    old = torch.zeros(3, 2, dtype=torch.float64)
    new = torch.tensor([[math.log(2), 0.0], [math.log(0.5), 7.0], [0.0, 0.0]], dtype=torch.float64)
    args = (new, old, torch.tensor([1.0, -1, 0], dtype=torch.float64),
            torch.tensor([[T, T], [T, F], [T, T]]), torch.tensor([T, T, F]))
    expected = {("response", "completed"): 0.35 / 2, ("response", "all"): 0.35 / 3,
                ("token", "completed"): 1.5 / 3, ("token", "all"): 1.5 / 5,
                ("constant", "completed"): 1.5 / 20, ("constant", "all"): 1.5 / 30}
    for (aggregation, divisor), value in expected.items():
        loss = rl.grpo_loss(*args, aggregation=aggregation, divisor=divisor, max_tokens=10)
        assert loss.item() == pytest.approx(-value, abs=1e-12)
    assert rl.grpo_loss(*args, denominator=7).item() == pytest.approx(-0.35 / 7)
    # clip 0.4 / 0.5: 1.5 and 1, mean 1.25; min(-0.5, -0.6) = -0.6
    loss = rl.grpo_loss(*args, clip_low=0.4, clip_high=0.5)
    assert loss.item() == pytest.approx(-(1.25 - 0.6) / 2)
    # a response of which nothing was sampled adds nothing, but is counted
    none = torch.zeros(1, 2)
    more = [torch.cat([a, b.to(a.dtype)]) for a, b in
            zip(args, (none, none, torch.ones(1), none.bool(), torch.tensor([T])))]
    assert rl.grpo_loss(*more).item() == pytest.approx(-0.35 / 3)


def reference_loss(new, old, advantages, mask, completed, low, high):
    """The formula of the paper, one token at a time in plain Python floats (response means, over
    completed ones)."""
    total = 0.0
    for i in range(len(new)):
        if not completed[i]:
            continue
        terms = []
        for t in range(len(new[i])):
            if mask[i][t]:
                ratio = math.exp(new[i][t] - old[i][t])
                terms.append(min(ratio * advantages[i],
                                 min(max(ratio, 1 - low), 1 + high) * advantages[i]))
        total += sum(terms) / max(len(terms), 1)
    return -total / max(sum(completed), 1)


def random_batch(seed, b=5, t=7):
    g = torch.Generator().manual_seed(seed)
    old = -torch.rand(b, t, generator=g, dtype=torch.float64)
    new = old + 0.5 * torch.randn(b, t, generator=g, dtype=torch.float64)
    advantages = torch.randn(b, generator=g, dtype=torch.float64)
    mask, completed = torch.rand(b, t, generator=g) < 0.7, torch.rand(b, generator=g) < 0.6
    return new, old, advantages, mask, completed


@pytest.mark.parametrize("seed", range(20))
def test_grpo_loss_equals_the_formula(seed):
    batch = random_batch(seed)
    expected = reference_loss(*(x.tolist() for x in batch), 0.2, 0.3)
    assert rl.grpo_loss(*batch).item() == pytest.approx(expected, abs=1e-12)


def test_gradient_by_finite_differences():
    new, *rest = random_batch(3)
    new.requires_grad_(True)
    assert torch.autograd.gradcheck(lambda x: rl.grpo_loss(x, *rest), (new,), eps=1e-7, atol=1e-6)


@pytest.mark.parametrize("aggregation", ["response", "token", "constant"])
@pytest.mark.parametrize("divisor", ["completed", "all"])
def test_micro_batches_add_up(aggregation, divisor):
    """With the global denominator the pieces' losses sum to the whole, however the batch is cut."""
    batch = random_batch(1, b=8)
    how = dict(aggregation=aggregation, divisor=divisor, max_tokens=9)
    denominator = rl.count_denominator(batch[3], batch[4], **how).item()
    whole = rl.grpo_loss(*batch, **how)
    for cut in (1, 3, 5):
        parts = sum(rl.grpo_loss(*(x[i:i + cut] for x in batch), **how, denominator=denominator)
                    for i in range(0, 8, cut))
        assert parts.item() == pytest.approx(whole.item(), abs=1e-12)


def test_masked_responses_get_no_gradient_and_no_garbage():
    """Neither an over-turn response nor an unsampled position moves anything, whatever stands
    there."""
    for value in (1e30, -1e30, math.inf, math.nan):
        for which in (0, 1):    # under the trained and the sampling policy
            new, old, advantages, mask, completed = random_batch(5)
            completed[0], completed[1] = F, T
            clean = rl.grpo_loss(new, old, advantages, mask, completed)
            (new, old)[which][~mask | ~completed[:, None]] = value
            advantages[~completed] = value
            new.requires_grad_(True)
            loss = rl.grpo_loss(new, old, advantages, mask, completed)
            loss.backward()
            assert loss.item() == pytest.approx(clean.item()) and torch.isfinite(new.grad).all()
            assert ((new.grad[~completed] == 0).all() and (new.grad[~mask] == 0).all()
                    and new.grad.abs().sum() > 0)


def test_nothing_completed_is_a_zero_loss_still_connected():
    new, old, advantages, mask, _ = random_batch(2)
    new[~mask] = math.inf
    new.requires_grad_(True)
    loss = rl.grpo_loss(new, old, advantages, mask, torch.zeros(5, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0 and (new.grad == 0).all()


def test_dual_clip_bounds_a_negative_advantage_by_hand():
    """Ratio 8. A = -1: min(8 x -1, 1.3 x -1) = -8, not below -3 with a dual clip of 3, and without
    gradient there; A = 1: min(8, 1.3) = 1.3 in any case."""
    old, mask = torch.zeros(2, 1), torch.ones(2, 1, dtype=torch.bool)
    completed = torch.tensor([T, T])
    new = torch.full((2, 1), math.log(8.0), requires_grad=True)
    batch = new, old, torch.tensor([-1.0, 1.0]), mask, completed
    assert rl.grpo_loss(*batch).item() == pytest.approx((8 - 1.3) / 2)
    loss = rl.grpo_loss(*batch, clip_dual=3.0)
    loss.backward()
    assert loss.item() == pytest.approx((3 - 1.3) / 2) and (new.grad == 0).all()
    assert rl.grpo_loss(*batch, clip_dual=5.0).item() == pytest.approx((5 - 1.3) / 2)
    ratio_2 = torch.full((2, 1), math.log(2.0)), *batch[1:]
    assert rl.grpo_loss(*ratio_2, clip_dual=3.0).item() == rl.grpo_loss(*ratio_2).item()


def test_unknown_flags_are_refused():
    for flags in ({"divisor": "some"}, {"aggregation": "some"}, {"aggregation": "constant"}):
        for denominator in (None, 3):
            with pytest.raises(ValueError):
                rl.grpo_loss(*random_batch(0), **flags, denominator=denominator)


@pytest.mark.parametrize("flags, told", [
    (["--clip_dual", "0.5"], "--clip_dual must be above 1"),
    (["--group_size", "1"], "--group_size must be at least 2"),
    (["--overturn_penalty", "1"], "--overturn_penalty needs --no-overturn_mask"),
    (["--baseline", "estimate", "--eval_every", "0"], "set --eval_every above 0")])
def test_flags_that_make_no_sense_together_are_refused(monkeypatch, flags, told):
    monkeypatch.setattr("sys.argv", ["rl.py", *flags])
    with pytest.raises(tools.InputError, match=told):
        rl.parse_args()


@pytest.mark.parametrize("flags, expected", [       # answer, void, over_turn, over_context
    ({}, [T, T, F, F]), ({"mask_void": True}, [T, F, F, F]),
    ({"overturn_mask": False}, [T, T, T, T]),
    ({"overturn_mask": False, "mask_void": True}, [T, T, T, T]),
    ({"baseline": "outcome"}, [T, T, T, T])])
def test_who_is_masked(flags, expected):
    args = argparse.Namespace(**{"overturn_mask": True, "mask_void": False,
                                 "baseline": "group", **flags})
    assert [rl.is_kept(evaluate.Rollout(finish=finish), args)
            for finish in evaluate.FINISH_REASONS] == expected
    # masked or not, unfinished is what ran out (the penalty is for these)
    ran_out = ["over_turn", "over_context"] + ["void"] * args.mask_void
    assert [finish for finish in evaluate.FINISH_REASONS
            if rl.is_unfinished(evaluate.Rollout(finish=finish), args)] == sorted(
                ran_out, key=evaluate.FINISH_REASONS.index)


def test_outcome_trains_on_the_turns_before_the_cap(trained_policy, world):
    """A conversation that was played on is cut behind its first or second turn: its tokens,
    log-probs and images are those of the same conversation played with as many turns at most, its
    reward is that of the whole; one that was shorter stays as it is."""
    rows = tools.read_jsonl(world / "train.jsonl")[:2]
    play = lambda turns: evaluate.Engine(
        trained, evaluate.Limits(turns, turns, 80, 1200), 8).run(rows, 4, world)
    longer = play(6)
    for turns in (1, 2):
        cut = 0
        for short, whole in zip(play(turns), longer):
            before = copy.deepcopy((whole.token_ids, whole.loss_mask, whole.turns, whole.logprobs))
            part = rl.truncate_rollout(whole, turns)
            assert (part.ids, part.loss_mask, part.reward) == (short.token_ids, short.loss_mask, whole.reward)
            assert (part.finish_reason, part.prediction) == (whole.finish_reason, whole.prediction)
            assert (part.logprobs == pytest.approx(short.logprobs, abs=1e-9)
                    and len(part.logprobs) == sum(part.loss_mask))
            assert [t["text"] for t in part.turns] == [t["text"] for t in short.turns]
            assert len(part.with_images(trained_policy).images) == len(short.with_images(trained_policy).images)
            assert (whole.token_ids, whole.loss_mask, whole.turns, whole.logprobs) == before
            cut += len(part.ids) < len(whole.token_ids)
        assert cut > 0


def test_learning_rate_by_hand():
    args = argparse.Namespace(lr=8.0, warmup_steps=2, steps=4, decay=False)
    assert [rl.learning_rate(step, args) for step in range(4)] == [4.0, 8.0, 8.0, 8.0]
    args.anneal_lr = True
    assert [rl.learning_rate(step, args) for step in range(4)] == [4.0, 6.0, 4.0, 2.0]


def test_questions_of_a_step_depend_on_seed_step_and_place_only():
    def pick(places, step=7, seed=0, attempt=0):
        return rl.pick_questions([50, 60], [1, 1], places, 40, seed, step, attempt)
    whole = pick(range(40))
    assert pick([1, 3]) == [whole[1], whole[3]] and len(set(whole)) == 40
    assert all(0 <= index < [50, 60][which] for which, index in whole)
    assert len({tuple(p) for p in (whole, pick(range(40), step=8), pick(range(40), seed=1),
                                   pick(range(40), attempt=1))}) == 4


def test_no_question_comes_twice_in_a_step():
    """Not in a fresh attempt either, as long as there are others."""
    picked = [q for attempt in range(4)
              for q in rl.pick_questions([160], [1.0], range(40), 40, 0, 3, attempt)]
    assert sorted(picked) == [(0, index) for index in range(160)]


@pytest.mark.parametrize("places, size, expected", [
    ([1, 4, 5, 9, 11, 12], 3, [[1, 4, 5], [9, 11, 12]]), ([0, 2, 3, 7], 3, [[0, 2, 3, 7]]),
    ([0, 2, 3, 7, 8], 3, [[0, 2, 3], [7, 8]]), ([6], 3, [[6]]), ([], 3, [[]])])
def test_minibatches_are_cut_from_the_groups_with_signal(places, size, expected):
    args = argparse.Namespace(prompts_per_step=16, minibatch=size)
    cut = rl.mini_batches(dict.fromkeys(places), args, torch.device("cpu"))
    assert [part.tolist() for part in cut] == expected


def test_files_are_mixed_by_weight():
    """Weights 3 and 1: a quarter of 4,000 places, give or take five standard deviations (27 each),
    come from the second."""
    which = [s for step in range(100)
             for s, _ in rl.pick_questions([9, 9], [3.0, 1.0], range(40), 40, 0, step, 0)]
    assert abs(sum(which) - 1000) < 5 * 27.4


def test_sets_and_weights(tmp_path):
    """A weight stands behind the name."""
    for name in "ab":
        tools.write_jsonl(tmp_path / name / "q.jsonl", [
            {"id": f"{name}{i}", "image": "x.jpg", "question": "?", "answer": "1"}
            for i in range(5)])
    sets, weights = rl.read_sets([f"{tmp_path}/a/q.jsonl:0.5", f"{tmp_path}/b/q.jsonl"])
    assert weights == [0.5, 1.0]
    assert [[(row["id"], root.name) for row, root in s] for s in sets] == [
        [(f"{name}{i}", name) for i in range(5)] for name in "ab"]


@pytest.mark.parametrize("spec, told", [
    ("q.jsonl:0", "positive"), ("q.jsonl:nan", "positive"), ("q.jsonl:x", "not a positive number"),
    ("none.jsonl", "build_data.py")])
def test_bad_files_and_weights_are_refused(tmp_path, spec, told):
    tools.write_jsonl(tmp_path / "q.jsonl", [
        {"id": "1", "image": "x.jpg", "question": "?", "answer": "1"}])
    with pytest.raises(tools.InputError, match=told):
        rl.read_sets([f"{tmp_path}/{spec}"])


def test_trainer_agrees_with_sampler(trained_policy, world):
    """The log-probs of an update, before any step, are those the sampler recorded: every
    ratio is 1."""
    rows = tools.read_jsonl(world / "train.jsonl")[:2]
    rollouts = evaluate.Engine(trained_policy, evaluate.Limits(4, 4, 80, 1200), 8).run(rows, 4, world)
    with torch.no_grad():
        new, old, mask = rl.compute_logprobs(trained_policy, rollouts, rl.encode_rollouts(trained_policy, rollouts))
    assert (((new - old)[mask]).abs().max() < 1e-9
            and (new[~mask] == 0).all() and (old[~mask] == 0).all())
    assert [row[m].tolist() for row, m in zip(old, mask)] == [r.logprobs for r in rollouts]


def shares(monkeypatch, lengths, world):
    """How deal cuts conversations of these lengths, which rank 0 holds in another order: (place,
    sample) of each rank."""
    rollouts = [evaluate.Rollout(ids=[0] * n, prompt=40 + i // 4, sample=i % 4)
                for i, n in enumerate(lengths)]
    monkeypatch.setattr(sft, "gather", lambda own: rollouts[::-1])
    monkeypatch.setattr(sft, "world_size", lambda: world)
    cut = []
    for rank in range(world):
        monkeypatch.setattr(sft, "get_rank", lambda: rank)
        cut.append([(r.prompt, r.sample, len(r.token_ids)) for r in rl.balance_by_tokens([], 40)])
    return cut


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_conversations_are_dealt_out_by_length(monkeypatch, world):
    """Everyone to exactly one rank, in order; a rank's tokens are its share to within the
    longest."""
    lengths = np.random.default_rng(0).integers(100, 900, 96).tolist()
    cut = shares(monkeypatch, lengths, world)
    assert sum(cut, []) == [(40 + i // 4, i % 4, n) for i, n in enumerate(lengths)]
    assert all(abs(sum(n for *_, n in part) - sum(lengths) / world) <= max(lengths) for part in cut)


def test_dealing_by_hand(monkeypatch):
    """3 + 3 + 6 tokens and 12: the middles 1.5, 4.5, 9 and 18 of 24 are on rank 0, 0, 0 and 1 of
    two."""
    assert [len(part) for part in shares(monkeypatch, [3, 3, 6, 12], 2)] == [3, 1]
    assert shares(monkeypatch, [], 2) == [[], []]
    assert [len(part) for part in shares(monkeypatch, [5], 3)] == [0, 1, 0]
    assert [len(part) for part in shares(monkeypatch, [5, 5, 5], 2)] == [1, 2]  # just half: behind
    # of two places the first was given to a fresh question, 2 = 1 * 2 + 0: it still comes first
    played = [evaluate.Rollout(ids=[0] * 5, prompt=prompt) for prompt in (1, 2)]
    monkeypatch.setattr(sft, "gather", lambda items: list(played))
    monkeypatch.setattr(sft, "world_size", lambda: 2)
    monkeypatch.setattr(sft, "get_rank", lambda: 0)
    assert rl.balance_by_tokens([], 2) == played[1:]


def update_args(**flags):
    return argparse.Namespace(**{
        "overturn_mask": True, "mask_void": False, "baseline": "group",
        "divisor": "completed", "aggregation": "response", "max_new_tokens": 80,
        "max_turns": 6, "tokens": 700, "clip_low": 0.2,
        "clip_high": 0.3, "clip_dual": 0.0, "max_norm": 1.0, "prompts_per_step": 2, **flags})


def test_an_update_encodes_every_image_once_and_aside(trained_folder, prompts, world, monkeypatch):
    """Two groups of five: each original is opened and encoded once, each crop once per
    conversation, and the main thread, which trains, does none of it."""
    policy = sft.load_policy(str(trained_folder), "cpu", "float64", prompts)
    rows = tools.read_jsonl(world / "train.jsonl")[:2]
    rollouts = evaluate.Engine(policy, evaluate.Limits(6, 6, 80, 1200), 16).run(rows, 5, world)
    for i, r in enumerate(rollouts):
        r.advantage = (-1.0) ** i
    opened, encoded, pixels, open_image = [], [], sft.Policy.preprocess_images, tools.open_image
    monkeypatch.setattr(tools, "open_image",
                        lambda path: opened.append(path.name) or open_image(path))
    monkeypatch.setattr(sft.Policy, "pixels", lambda policy, views: encoded.extend(
        [threading.current_thread()] * len(views)) or pixels(policy, views))
    evaluate.open_and_preprocess.cache_clear()
    optimizer = sft.Optimizer(sft.trainable_parameters(policy, True), 1e-5, 0.0)
    sums, _, norm = rl.update_policy(policy, optimizer, rollouts, update_args(), 1e-5)
    assert sums["responses"] == 10 and norm > 0
    assert opened == [Path(row["image"]).name for row in rows]
    crops = sum(r.token_ids.count(policy.vision_ids[0]) - 1 for r in rollouts)
    assert len(encoded) == 2 + crops and crops > 5 and threading.main_thread() not in encoded


COMMON = ["--prompts_per_step", 4, "--group_size", 4, "--max_turns", 6, "--max_new_tokens", 80,
          "--dtype", "float64", "--max_num_seqs", 16,
          "--max_model_len", 1200, "--warmup_ratio", 0, "--no-anneal_lr", "--eval_every", 0,
          "--mini_batch_size", 4]     # one update a step: the sampler is then the policy that is trained


@pytest.fixture(scope="module")
def runs(trained_folder, world, tmp_path_factory):
    """Three steps on one process, and the same on two. The questions are those that the small
    policy has seen in training: some of its samples are right and some are not."""
    out = tmp_path_factory.mktemp("rl")
    prompts = out / "prompts.json"
    prompts.write_text(json.dumps({"system": "Look closer."}))
    seen = [{k: row[k] for k in ("id", "image", "question", "answer")}
            for row in tools.read_jsonl(world / "coldstart.jsonl")[:4]]
    tools.write_jsonl(world / "seen.jsonl", seen)
    tools.write_jsonl(world / "seen2.jsonl", seen[::-1])
    common = ["rl.py", "--model", trained_folder,
              "--data", f"{world / 'seen.jsonl'}:2", world / "seen2.jsonl",
              "--prompts", prompts, *COMMON, "--save_every", 1, "--dump_every", 2,
              "--eval_every", 2, "--eval_data", world / "seen2.jsonl",
              "--eval_size", 2, "--eval_turns", 8]
    run_script(*common, "--steps", 3, "--out", out / "one")
    run_script(*common, "--steps", 3, "--out", out / "two", nproc=2)
    return out, common


def largest_difference(a, b):
    a, b = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    return max((a[k] - b[k]).abs().max().item() for k in a)


def read(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").open()]


def test_two_processes_equal_one(runs, trained_folder):
    out, _ = runs
    one, two = read(out / "one"), read(out / "two")
    assert any(m["num_trained_responses"] > 0 for m in one)
    assert largest_difference(out / "one", trained_folder) > 1e-6
    assert largest_difference(out / "one", out / "two") < 1e-10
    assert ["val_accuracy" in m for m in one] == [False, True, True] and "val_accuracy_initial" in one[0]
    assert all(m["val_accuracy"] in (0.0, 0.5, 1.0) for m in one[1:])
    for a, b in zip(one, two):
        # each process drafts by itself
        depends = ("seconds_rollout", "seconds_update", "mean_acceptance_length", "acceptance_rate")
        assert all(a[k] == pytest.approx(b[k], abs=1e-9) for k in a if k not in depends)
        assert a["logprob_diff"] < 1e-9 and a["max_log_ratio"] < 1e-8


@pytest.mark.parametrize("scores, kept", [((0.9, 0.1), 1), ((0.1, 0.1), 2)])
def test_the_best_checkpoint_is_kept(runs, tmp_path, monkeypatch, scores, kept):
    """Scored after both of two steps: the exported model is that of the better one, the later one
    if equal."""
    given = iter([(0.5, None), *((score, None) for score in scores)])
    monkeypatch.setattr(rl, "validate", lambda *_: next(given))
    run_script(*runs[1], "--steps", 2, "--eval_every", 1, "--out", tmp_path)
    assert [m["val_accuracy"] for m in read(tmp_path)] == list(scores)
    policy = sft.load_policy(str(tmp_path), "cpu", "float64")
    weights = [b.master for b in sft.Optimizer(sft.trainable_parameters(policy, True), 0.0, 0.0).buckets]
    same = []
    for step in (1, 2):
        state = torch.load(tmp_path / f"state/step_000000{step}/0.pt")["optimizer"]
        same += [step] * all(torch.equal(a, part["master"]) for a, part in zip(weights, state))
    assert same == [kept]


def test_dumps_are_trajectory_rows(runs, world):
    """The first eight conversations of a step, here two whole groups, with their advantages."""
    out, _ = runs
    assert [p.name for p in sorted((out / "one" / "num_rollouts").iterdir())] == ["step_00002.jsonl"]
    rows = tools.read_jsonl(out / "one" / "num_rollouts" / "step_00002.jsonl", tools.check_trajectory)
    assert len(rows) == 8
    for group in (rows[:4], rows[4:]):
        assert len({row["id"] for row in group}) == 1
        assert [row["sample"] for row in group] == [0, 1, 2, 3]
        rewards = torch.tensor([[row["reward"] for row in group]], dtype=torch.float64)
        completed = torch.tensor([[row["finish_reason"] in ("answer", "void") for row in group]])
        expected = rl.group_advantages(rewards, completed, baseline=0.5)
        assert [row["advantage"] for row in group] == expected[0].tolist() and expected.any()
    assert all(row["system"] == "Look closer." and (world / row["image"]).exists() for row in rows)


@pytest.mark.parametrize("nproc, whole", [(1, "one"), (2, "two")])
def test_resume_is_exact(runs, nproc, whole):
    """Killed twice at random moments and resumed: the same weights, bit for bit, and one line per
    step in the log."""
    out, common = runs
    cut = out / f"cut{nproc}"
    assert crash.run_killed([*common, "--steps", 3], nproc, cut, 2, 0.5, launch=Forked) == 2
    assert largest_difference(out / whole, cut) == 0
    assert [m["step"] for m in read(cut)] == [1, 2, 3]


def test_who_trains_on_what_does_not_matter(runs, trained_folder, world):
    """Three questions, one that is sometimes answered right and two whose answer is never given, so
    that one group has signal: one, two and three processes train the same on it. The ranks that did
    not play it have their part of the update, too."""
    out, _ = runs
    rows = [tools.read_jsonl(world / "train.jsonl")[i] for i in (0, 2, 4)]
    tools.write_jsonl(world / "half.jsonl", [
        rows[0], *({**row, "answer": "no such answer"} for row in rows[1:])])
    common = ["rl.py", "--model", trained_folder, "--data", world / "half.jsonl",
              "--prompts", out / "prompts.json", *COMMON,
              "--prompts_per_step", 3, "--group_size", 8, "--resample", 0, "--steps", 2,
              "--baseline", "group"]
    for nproc in (1, 2, 3):
        run_script(*common, "--out", out / f"half{nproc}", nproc=nproc)
    assert all(m["zero_variance_groups"] >= 2 for m in read(out / "half1"))
    assert all(m["num_trained_responses"] > 3 for m in read(out / "half1"))
    for nproc in (2, 3):
        assert largest_difference(out / "half1", out / f"half{nproc}") < 1e-10
        assert [m["num_trained_responses"] for m in read(out / "half1")] == [
            m["num_trained_responses"] for m in read(out / f"half{nproc}")]
    assert largest_difference(out / "half1", trained_folder) > 1e-6


@pytest.mark.parametrize("flag, mask, value, expected", [
    (0.5, True, 0.9, 0.5), ("completed", True, 0.9, "completed"), ("group", True, None, "group"),
    ("estimate", True, 0.9, 0.9), ("estimate", True, 0.0, 0.0), ("estimate", True, None, "group"),
    ("outcome", True, 0.9, "group"),
    (0.5, False, 0.9, "group"), ("completed", False, 0.9, "group")])
def test_what_is_subtracted_in_a_step(flag, mask, value, expected):
    """Where nothing is masked the baseline pays nothing, and is the group's mean."""
    args = argparse.Namespace(baseline=flag, overturn_mask=mask)
    assert rl.step_baseline(args, value) == expected


def test_resuming_without_the_log_is_refused(tmp_path):
    """The best score so far stands there only."""
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(tools.InputError, match="metrics.jsonl is gone"):
        rl.history(tmp_path)
    rows = [{"val_accuracy": 0.5, "unfinished_accuracy": 0.7}, {"unfinished_accuracy": 0.8}, {"val_accuracy": None, "unfinished_accuracy": None}]
    tools.write_jsonl(tmp_path / "metrics.jsonl", rows)
    assert rl.history(tmp_path) == (0.5, None)


def test_a_policy_without_any_signal_does_not_hang_and_does_not_move(make_tiny, world, tmp_path):
    """A random policy never finishes a turn: no group carries signal on any rank, every collective
    is still joined."""
    policy = make_tiny(torch.float64)
    policy.model.config.save_pretrained(tmp_path / "random")
    sft.export(policy, tmp_path / "random")
    run_script("rl.py", "--model", tmp_path / "random", "--data", world / "train.jsonl",
               *COMMON, "--max_new_tokens", 4,
               "--steps", 1, "--out", tmp_path / "out", nproc=2)
    metrics = read(tmp_path / "out")[0]
    assert (metrics["zero_variance_groups"] == 4 and metrics["void"] == 1.0
            and metrics["num_trained_responses"] == 0)
    assert largest_difference(tmp_path / "random", tmp_path / "out") == 0


def test_no_library_prints_a_warning(trained_folder, world, tmp_path):
    """As a user starts them, with checkpointing: what a stage prints is its own lines only."""
    coldstart = ["sft.py", "--data", world / "coldstart.jsonl", "--batch_size", 2]
    step = ["rl.py", "--data", world / "train.jsonl",
            "--prompts_per_step", 2, "--group_size", 2, "--max_num_seqs", 4,
            "--max_new_tokens", 40, "--eval_data", world / "train.jsonl", "--eval_size", 1,
            "--eval_turns", 2]
    started = {stage: crash.launch(
        [stage, "--model", trained_folder, *flags, "--steps", 1, "--gradient_checkpointing",
         "--out", tmp_path / stage],
        env={"PYTHONWARNINGS": "default,ignore::ResourceWarning"})
        for stage, *flags in (coldstart, step)}
    for stage, process in started.items():
        code, out, err = crash.finish(process)
        assert code == 0, err
        lines = [line for line in (out + err).splitlines() if line]
        ours = (f"{stage}: ", f"{stage[:-3]} ", f"{stage[:-3]}: ", f"{trained_folder}: ",
                "12 questions")
        assert lines and all(line.startswith(ours) for line in lines), lines


def test_mistakes_are_one_line(trained_folder, world, monkeypatch):
    data = ["--data", world / "train.jsonl", "--eval_every", 0]
    done = run_script("rl.py", "--model", trained_folder, *data, "--prompts_per_step", 1,
                      nproc=2, check=False)
    assert (done.returncode != 0
            and "--prompts_per_step 1 is less than the number of processes 2" in done.stderr)
    monkeypatch.setattr("sys.argv", ["rl.py", "--model", "checkpoints/none", *map(str, data),
                                     "--prompts_per_step", "4"])
    with pytest.raises(tools.InputError, match="python sft.py"):
        rl.main()


def test_a_group_that_the_judge_could_not_score_is_resampled(trained_policy, world, tmp_path):
    """Answers in other words are unscored while the judge fails: their groups leave no signal,
    whatever the other rewards are."""
    rows = [(row, world) for row in tools.read_jsonl(world / "train.jsonl")]
    args = argparse.Namespace(seed=0, prompts_per_step=4, resample=1, group=4, overturn_mask=True,
                              mask_void=False, overturn_penalty=0.0,
                              baseline="group", max_turns=6)
    with ChatServer(lambda body: (503, {}, b"")) as server:
        judge = evaluate.Judge(tools.ChatClient(server.url, role="judge", attempts=1), tmp_path)
        engine = evaluate.Engine(trained_policy, evaluate.Limits(6, 6, 48, 1200), 16, judge=judge)
        groups, played, silent = rl.collect_groups(engine, [rows], [1.0], 0, [0, 1, 2, 3], args,
                                                   "group")
        # no exact match: all is left to the judge
        held_out = [(dict(row, answer="something else"), world) for row, _ in rows]
        args.eval_turns, args.max_images = 6, 6
        assert rl.validate(engine, held_out, args, 0, 1)[0] is None
    unscored = [r for r in played if r.reward is None]
    assert unscored and all(r.finish_reason == "answer" and r.prediction for r in unscored)
    assert not any(r.reward is None for part in groups.values() for r in part)
    assert len(played) > 16 and set(silent) | set(groups) == {0, 1, 2, 3}
    sums = {"loss": 0.0, "logprob_diff": 0.0, "clipped": 0.0, "tokens": 0, "responses": 0}
    metrics = rl.step_metrics(played, sums, 0.0, [], len(silent), (0, 0), "cpu", engine.counts)
    assert 1 <= metrics["mean_acceptance_length"] <= 9 and 0 <= metrics["acceptance_rate"] <= 1
    right = sum(r.reward == 1.0 for r in played)
    assert (metrics["unscored"] == len(unscored) / len(played)
            and metrics["reward"] == right / max(1, len(played) - len(unscored)))
    answered = sum(r.finish_reason == "answer" for r in played)
    assert metrics["incorrect"] == (answered - right - len(unscored)) / len(played)
