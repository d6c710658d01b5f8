"""Reinforcement learning: GRPO with over-turn masking.

For each of P questions the policy plays a group of G conversations of at most --max_turns turns.
A rollout is one conversation; its sampled tokens, those of all its turns, are its response. The
reward is 1 if the answer is right, else 0. A conversation that ran out of turns or of context
(finish reasons over_turn and over_context) is called *unfinished*; gymnasium says truncated, the
official code says exceed_mask. The one new thing here is the loss mask M (Mini-o3, section on
reinforcement learning): M = 0 for an unfinished conversation, else 1. With the rewards r of a
group, a baseline b, the standard deviation s of the rewards (if b is a fixed number, unfinished
conversations enter s with b), and the ratio rho of a token's probability under the trained policy
to that under the sampling policy:

    A'_i = M_i (r_i - b) / (s + eps), 0 where s = 0       i: N conversations, t: tokens of each
    J    = 1/N  sum_i  mean_t  min(rho_it A'_i, clip(rho_it, 1 - 0.2, 1 + 0.3) A'_i)

So running out of turns is not punished. Without the mask (--no-overturn_mask) it counts as a wrong
answer, and the policy learns to answer early instead of searching. With the mask, a policy that was
trained with few turns keeps searching at 32.

The mask is not neutral. A masked conversation has A' = 0, as one with the reward b would have. So
masking acts like the rewards 1 for a right answer, 0 for a wrong one and b for an unfinished
conversation, all minus b; and a constant changes no expected gradient, because E[grad log pi] is 0.
Apart from the division by s, the policy climbs P(correct) + b P(unfinished): a guess pays only
where its probability of being right is above b (docs/mask.md).

What differs from textbook GRPO and from the paper:
1. No KL term, no entropy term, no reference model; clip-higher 0.2 / 0.3 (paper).
2. What b is: --baseline. The paper leaves it open.
       a number    the same for every question. Default 0.5: a guess with a lower probability
                   loses, and a faster search gains
       group       the group's success rate (official code)
       completed   the success rate of its kept conversations
       estimate    the accuracy, at the last evaluation, of conversations that took more than
                   --max_turns turns
       outcome     nothing is masked: conversations are played to --eval_turns and scored by how
                   they end; only their first --max_turns turns are trained on. b is as in "group"
3. N counts masked conversations too (official code), so a step in which few conversations finish
   is a small one. The paper divides by sum(M): --divisor kept.
4. Denominators are counted once over the whole mini-batch on all ranks, and gradients are summed.
   Nothing depends on how micro-batches are cut or on the number of processes.
5. Old log-probabilities come from the sampler, token by token. Their mismatch to the trainer's own
   is logged.
6. If all rewards that enter s are equal (s = 0), all A' of the group are 0, even where r differs
   from a fixed b: the group has no signal. Nor has one in which all conversations are masked, or in
   which the judge failed. It gets another question, at most --resample times. If it still has no
   signal, it is dropped from the update and counted. Mini-batches are cut from the groups with
   signal.
7. A conversation with A'_i = 0 has no gradient and is not run through the model in the update.
8. The checkpoint that is kept is the best on held-out questions at the *large* turn budget
   (--eval_turns). Within the training cap, a policy that guesses looks better than one that keeps
   searching. If the policy gets worse on them, the log says so.
9. SGD without momentum, where the paper has AdamW (--optimizer adamw). AdamW divides each weight's
   step by the size of its gradients, so what has no signal moves as fast as what has. After some
   steps it makes the policy sure of whatever it does most often, and what lies beyond the training
   cap, where no reward pulls back, decays (docs/worse.md). SGD takes rare large gradients at their
   full size instead, so they are clipped to about the norm of the first steps.
10. At most 4 turns on questions of all levels (paper: 6). Before RL one conversation in five is
   right within them, so what the mask does can be seen.

Commands:
    1 CPU          python rl.py
    2 CPU cores    torchrun --nproc_per_node=2 rl.py
    1 GPU          python rl.py --model checkpoints/sft-3b --optimizer adamw --lr 1e-6 \\
                       --prompts_per_step 16 --group_size 8 --mini_batch_size 4 --max_turns 6 \\
                       --gradient_checkpointing --max_new_tokens 1024 --max_model_len 16384 \\
                       --max_num_seqs 16
    8 GPUs         torchrun --nproc_per_node=8 rl.py --model checkpoints/sft-7b ...
                       (the paper's run: docs/large.md)
    memory, hours  python extras/plan.py --model checkpoints/sft-7b ...   (the flags of the run)
    2 nodes        torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d \\
                       --rdzv_endpoint=HOST:29500 rl.py ...
"""

import argparse
import collections
import heapq
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

import evaluate
import sft
import tools
from extras import run_folder, terminal, track
from extras.images import check_images

# ---- The algorithm ------------------------------------------------------------------------------


def group_baselines(rewards, kept, baseline):
    """Return b of each group, (P, 1): what is subtracted from its rewards. So it is also what the
    mask pays for an unfinished response.

    rewards (P, G) float, kept M (P, G) bool. `baseline` chooses:
        "group"      the mean reward of all responses; unfinished ones enter with their reward, 0
                     (official code)
        "completed"  the mean reward of the kept responses; NaN if there is none
        a number     that number"""
    if baseline == "group":
        return rewards.mean(1, keepdim=True)                                                # (P, 1)
    if baseline == "completed":
        kept_rewards = torch.where(kept, rewards, 0.0)                                      # (P, G)
        return kept_rewards.sum(1, keepdim=True) / kept.sum(1, keepdim=True)                # (P, 1)
    return torch.full_like(rewards[:, :1], baseline)                                        # (P, 1)


def group_advantages(rewards, kept, baseline, *, eps=1e-6):
    """Return A'_i = M_i (r_i - b) / (s + eps) of each response in its group.

    rewards (P, G) float, kept M (P, G) bool -> (P, G) float of the same dtype. `baseline` chooses b
    (see group_baselines) and the rewards whose unbiased standard deviation is s:
        "group"      those of all responses
        "completed"  those of the kept responses
        a number     those of all responses; it replaces the reward of those that are not kept
    All A' of a group are 0, never NaN, if fewer than two responses enter s, if the rewards that
    enter s are equal, or if one of these is NaN (no score). A NaN that does not enter s, that of an
    unfinished response, changes nothing where b is a number or "completed".

    One right answer, one wrong answer, two unfinished conversations: mean 1/4, deviation 1/2.

    >>> rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    >>> kept = torch.tensor([[True, True, False, False]])
    >>> group_advantages(rewards, kept, "group")
    tensor([[ 1.5000, -0.5000,  0.0000,  0.0000]])"""
    # 1. Which responses enter the statistics, and with which reward?
    is_number = not isinstance(baseline, str)
    is_counted = kept if baseline == "completed" else torch.ones_like(kept)                 # (P, G)
    if baseline != "group":
        rewards = torch.where(kept, rewards, baseline if is_number else 0.0)                # (P, G)
    # 2. Mean and unbiased variance of each group.
    weights = is_counted.to(rewards.dtype)                                                  # (P, G)
    num_counted = weights.sum(1, keepdim=True)                                              # (P, 1)
    mean_reward = (weights * rewards).sum(1, keepdim=True) / num_counted.clamp(min=1)       # (P, 1)
    squared_deviations = weights * (rewards - mean_reward) ** 2                             # (P, G)
    variance = squared_deviations.sum(1, keepdim=True) / (num_counted - 1).clamp(min=1)     # (P, 1)
    # 3. Masked responses get 0. So does a group without spread; a single response has none. The
    #    variance cannot tell: that of three rewards of -0.1 is 1e-34.
    highest_reward = torch.where(is_counted, rewards, -math.inf).amax(1, keepdim=True)      # (P, 1)
    lowest_reward = torch.where(is_counted, rewards, math.inf).amin(1, keepdim=True)        # (P, 1)
    has_spread = highest_reward > lowest_reward                                             # (P, 1)
    b = group_baselines(rewards, kept, baseline)                                            # (P, 1)
    advantages = (rewards - b) / (variance.sqrt() + eps)                                    # (P, G)
    return torch.where(kept & has_spread, advantages, 0.0)                                  # (P, G)


def count_denominator(mask, kept, *, divisor="kept", aggregation="response",
                      max_response_tokens=None):
    """Return what the summed loss is divided by, a float64 scalar tensor.

    mask (B, T) bool: sampled tokens; kept (B,) bool. divisor: count the kept responses only
    ("kept", the paper; the default of these functions) or all ("all", the default of --divisor).
    aggregation: count responses ("response"), their sampled tokens ("token"), or
    max_response_tokens for each response ("constant")."""
    is_counted = kept if divisor == "kept" else torch.ones_like(kept)                       # (B,)
    if aggregation == "token":
        return (mask.sum(1) * is_counted).sum().double()
    num_responses = is_counted.sum().double()
    if aggregation == "constant":
        return num_responses * max_response_tokens
    return num_responses


def grpo_loss(logprobs, old_logprobs, advantages, mask, kept, *, clip_low=0.2, clip_high=0.3,
              divisor="kept", aggregation="response", denominator=None, max_response_tokens=None):
    """Return -J, the clipped policy-gradient loss with the over-turn mask, a scalar.

    logprobs, old_logprobs (B, T): of the sampled tokens under the trained and the sampling policy;
    advantages (B,); mask (B, T) bool: True where the policy wrote the token; kept M (B,) bool.
    aggregation: "response" averages over the tokens of a response, then over responses (paper);
    "token" averages over all tokens (DAPO); "constant" divides by max_response_tokens (Dr. GRPO).
    denominator: the count over the whole mini-batch on all ranks (default: count this batch). If it
    is 0, the loss is 0 and still has a gradient. Masked responses (M = 0) add nothing, whatever
    their advantages and log-probs are. Raises ValueError for an unknown divisor or aggregation, and
    for "constant" without max_response_tokens (None or 0)."""
    if divisor not in ("kept", "all") or aggregation not in ("response", "token", "constant"):
        raise ValueError(f"unknown divisor '{divisor}' or aggregation '{aggregation}'")
    if aggregation == "constant" and not max_response_tokens:
        raise ValueError("aggregation 'constant' needs max_response_tokens")
    if denominator is None:
        denominator = count_denominator(mask, kept, divisor=divisor, aggregation=aggregation,
                                        max_response_tokens=max_response_tokens).item()
    # 1. Only sampled tokens of kept responses count. Elsewhere the ratio is 1, without a gradient.
    in_loss = mask & kept[:, None]                                                          # (B, T)
    ratio = torch.where(in_loss, logprobs - old_logprobs, 0.0).exp()                        # (B, T)
    # 2. The smaller of clipped and unclipped objective, token by token.
    advantage = advantages[:, None]                                                         # (B, 1)
    clipped_ratio = ratio.clamp(1 - clip_low, 1 + clip_high)                                # (B, T)
    token_objective = torch.min(ratio * advantage, clipped_ratio * advantage)               # (B, T)
    # 3. Sum over tokens, then over responses.
    objective = torch.where(in_loss, token_objective, 0.0).sum(1)                           # (B,)
    if aggregation == "response":
        objective = objective / in_loss.sum(1).clamp(min=1)                                 # (B,)
    if denominator == 0:    # nothing is counted: 0, but still connected to the policy
        return torch.where(in_loss, logprobs, 0.0).sum() * 0.0
    return -objective.sum() / denominator


def is_unfinished(rollout, args):
    """Return whether the conversation ran out of turns or of context. With --mask_void a void one
    (its last turn has no call and no answer, or was cut at the token cap) counts as unfinished too.

    An unfinished conversation is masked (see is_kept), except with --no-overturn_mask: then its
    reward counts, less --overturn_penalty."""
    if rollout.finish_reason == "void":
        return args.mask_void
    return rollout.finish_reason in ("over_turn", "over_context")


def is_kept(rollout, args):
    """Return M_i: True unless the over-turn mask removes this conversation from the loss. With
    --baseline outcome nothing is masked, not even by --mask_void: conversations are played to their
    end."""
    if not args.overturn_mask or args.baseline == "outcome":
        return True
    return not is_unfinished(rollout, args)


def step_baseline(args, unfinished_accuracy):
    """Return the baseline of this step for group_advantages.

    unfinished_accuracy: accuracy of the held-out conversations that took more than --max_turns
    turns, so that training would have left them unfinished. It is the last result of `validate`,
    None before the first one."""
    if not args.overturn_mask or args.baseline == "outcome":
        return "group"      # nothing is masked: an ordinary baseline
    if args.baseline != "estimate":
        return args.baseline
    if unfinished_accuracy is None:     # 0.0 is an estimate like any other
        return "group"
    return unfinished_accuracy


# ---- Rollouts -----------------------------------------------------------------------------------


@dataclass
class Questions:
    """The questions of a run; both lists hold (question row, folder of its images)."""
    training: list
    held_out: list


def pick_question(num_questions, prompt_number, seed, step):
    """Return the index of the question that a prompt of a step asks.

    Each step has an order of its own, one permutation of all questions, and prompt number n is the
    n-th of it. So no question is asked twice in a step, unless there are too few.

    A step of two groups whose order of five questions is 2 4 3 0 1. Groups 0 and 1 are played, then
    group 1 again, because it had no signal. Its prompt number is now 2 + 1:

    >>> [pick_question(5, prompt_number, seed=0, step=0) for prompt_number in (0, 1)]
    [2, 4]
    >>> pick_question(5, 3, seed=0, step=0)
    0"""
    step_order = np.random.default_rng([seed, step]).permutation(num_questions)
    return int(step_order[prompt_number % num_questions])


def truncate_rollout(rollout, max_turns):
    """Return a copy of a rollout with only its first max_turns turns, their tokens and log-probs;
    the tool's words after them are cut, too. Only --baseline outcome plays longer ones.

    Reward and finish reason stay those of the whole conversation. A rollout of at most max_turns
    turns is returned as it is. Rollouts hold no images: with_images cuts those of the turns."""
    if len(rollout.turns) <= max_turns:
        return rollout
    num_tokens = rollout.turn_ends[max_turns - 1]
    loss_mask = rollout.loss_mask[:num_tokens]
    return replace(rollout, token_ids=rollout.token_ids[:num_tokens], loss_mask=loss_mask,
                   logprobs=rollout.logprobs[:sum(loss_mask)],
                   turns=rollout.turns[:max_turns], turn_ends=rollout.turn_ends[:max_turns])


def reward_or_nan(rollout):
    """Return the reward of a rollout, NaN if the judge failed."""
    return math.nan if rollout.reward is None else rollout.reward


def assign_advantages(groups, args, baseline):
    """Return the groups as they are trained on: copies with their A', cut at the training cap.
    groups: P lists of G finished rollouts. baseline: of group_advantages. In the rollouts
    themselves it notes b, and what an unfinished one is worth, for the log."""
    # 1. Rewards and loss mask. NaN, where the judge failed, leaves the group without signal.
    rewards = torch.zeros(len(groups), args.group_size, dtype=torch.float64)                # (P, G)
    kept = torch.zeros(len(groups), args.group_size, dtype=torch.bool)                      # (P, G)
    for group_number, group in enumerate(groups):
        for sample_number, rollout in enumerate(group):
            reward = reward_or_nan(rollout)
            penalty = args.overturn_penalty if is_unfinished(rollout, args) else 0.0
            rewards[group_number, sample_number] = reward - penalty
            kept[group_number, sample_number] = is_kept(rollout, args)
    # 2. For the log: a masked conversation is worth b; one that is not masked, its reward. With
    #    --baseline outcome those beyond the training cap would have been unfinished.
    b_of_groups = group_baselines(rewards, kept, baseline)                                  # (P, 1)
    values = torch.where(kept, rewards, b_of_groups)                                        # (P, G)
    for group, [b], group_values in zip(groups, b_of_groups.tolist(), values.tolist()):
        for rollout, value in zip(group, group_values):
            rollout.baseline = b
            is_late = args.baseline == "outcome" and len(rollout.turns) > args.max_turns
            if is_late or is_unfinished(rollout, args):
                rollout.unfinished_value = value
    # 3. Copies with their advantage.
    assigned_groups = []
    for group, advantages in zip(groups, group_advantages(rewards, kept, baseline).tolist()):
        assigned_groups.append([
            replace(truncate_rollout(rollout, args.max_turns), advantage=advantage)
            for rollout, advantage in zip(group, advantages)])
    return assigned_groups


class GroupsOfStep:
    """The groups of one step that this rank plays. A group without signal is asked another
    question, at most --resample times. Which one depends on the group and the attempt only."""

    def __init__(self, training_questions, step, args, baseline, prompts):
        self.training_questions = training_questions
        self.step = step
        self.args = args
        self.baseline = baseline        # of group_advantages
        self.prompts = prompts
        self.num_attempts = collections.Counter()
        self.undecided = {}             # group_index: its rollouts, which may still be played
        self.with_signal = {}           # group_index: its rollouts with their A'
        self.played_rollouts = []

    def ask(self, group_index):
        """Return new conversations of a group, about its next question."""
        args = self.args
        # The question's number in the order of this step. It also enters the random streams.
        prompt_number = self.num_attempts[group_index] * args.prompts_per_step + group_index
        self.num_attempts[group_index] += 1
        question_index = pick_question(len(self.training_questions), prompt_number, args.seed,
                                       self.step)
        row, image_folder = self.training_questions[question_index]
        rollouts = evaluate.make_rollouts([row], args.group_size, image_folder, [prompt_number],
                                          self.prompts)
        self.undecided[group_index] = rollouts
        self.played_rollouts += rollouts
        return rollouts

    def decide(self, judge_is_done):
        """Assign advantages in the groups that have ended. Return new conversations of those
        without signal. judge_is_done: False while a reward of None may still become a number."""
        new_rollouts = []
        for group_index, group in list(self.undecided.items()):     # a copy: ask() adds to it
            # 1. Has it ended, with a score? If not, later.
            has_ended = all(rollout.finish_reason is not None for rollout in group)
            is_scored = all(rollout.reward is not None for rollout in group)
            if not has_ended or not (is_scored or judge_is_done):
                continue
            del self.undecided[group_index]
            # 2. With signal it is kept. Without it is asked again, if an attempt is left.
            group, = assign_advantages([group], self.args, self.baseline)
            if any(rollout.advantage != 0 for rollout in group):
                self.with_signal[group_index] = group
                for rollout in group:
                    rollout.group_index = group_index
            elif self.num_attempts[group_index] <= self.args.resample:
                new_rollouts += self.ask(group_index)
        return new_rollouts


def collect_groups(engine, training_questions, step, group_indices, args, baseline):
    """Play this rank's groups of one step, and again with other questions those without signal.

    A group that ends without signal gets its next question at once, while others are still played:
    a rank that waited for all of them would have empty slots behind the longest conversation.

    group_indices: which of the step's groups 0 ... prompts_per_step - 1 are this rank's. baseline:
    of group_advantages. Returns (the groups with signal as {group_index: rollouts with their A'},
    all rollouts that were played, the number of groups that are still without signal)."""
    engine.begin_step(step)
    groups = GroupsOfStep(training_questions, step, args, baseline, engine.policy.prompts)
    rollouts = [rollout for group_index in group_indices for rollout in groups.ask(group_index)]
    while rollouts:
        # 1. What has a new question joins the conversations that are waiting for a slot ...
        for _ in engine.play_all(rollouts):
            if engine.judge is not None:
                engine.judge.collect_verdicts()
            engine.waiting += groups.decide(judge_is_done=False)
        # 2. ... or is played after them, if that depends on the judge's last verdicts.
        if engine.judge is not None:
            engine.judge.wait()
        rollouts = groups.decide(judge_is_done=True)
    engine.free_cache()     # the update needs the memory
    groups.played_rollouts.sort(
        key=lambda rollout: (rollout.prompt_number, rollout.sample_number))
    num_zero_variance_groups = len(groups.num_attempts) - len(groups.with_signal)
    return groups.with_signal, groups.played_rollouts, num_zero_variance_groups


VALIDATION_STEP = 2**31     # training never gets here: validation has random streams of its own


def validate(engine, held_out, args, step):
    """Play the held-out questions once, with at most --eval_turns turns. Write the conversations to
    --out/rollouts/val_STEP.jsonl and return a dict:

        val_accuracy            share of right answers
        val_accuracy_in_cap     share of right answers within --max_turns turns
        val_over_turn, val_over_context, val_void     shares of these finish reasons
        unfinished_accuracy     accuracy of the conversations that took more than --max_turns turns:
                                training would have left them unfinished
        step                    as given: after how many steps of training

    An accuracy is None if there is no such conversation, or if the judge failed on one: the
    remaining scores would be mostly exact matches and overestimate the accuracy. The random numbers
    are the same at every evaluation, so the scores of two checkpoints differ by the policy only."""
    # 1. This rank's share of the questions, which may be empty.
    prompt_numbers = list(range(sft.get_rank(), len(held_out), sft.world_size()))
    rows = [held_out[index][0] for index in prompt_numbers]
    image_folders = [held_out[index][1] for index in prompt_numbers]
    engine.begin_step(VALIDATION_STEP)
    rollouts = engine.run(rows, 1, image_folders, prompt_numbers)
    engine.free_cache()     # the update and saving need the memory
    # 2. They can be read: how did the same questions end this time?
    played_rows = sft.all_gather_objects([rollout.to_row() for rollout in rollouts])
    if sft.get_rank() == 0:
        tools.write_jsonl(Path(args.out) / "rollouts" / f"val_{step:05d}.jsonl", played_rows)
    # 3. Sums over all ranks. One NaN, where the judge failed, makes its sums NaN.
    counts = {"in_cap_correct": 0.0, "beyond_cap": 0, "beyond_cap_correct": 0.0}
    counts.update(dict.fromkeys(evaluate.FINISH_REASONS, 0))
    for rollout in rollouts:
        counts[rollout.finish_reason] += 1
        if len(rollout.turns) <= args.max_turns:
            counts["in_cap_correct"] += reward_or_nan(rollout)
        else:
            counts["beyond_cap"] += 1
            counts["beyond_cap_correct"] += reward_or_nan(rollout)
    total = sft.all_reduce_dict(counts, engine.policy.device)
    # 4. Shares of all questions.
    num_questions = len(held_out)
    num_correct = total["in_cap_correct"] + total["beyond_cap_correct"]
    unfinished_accuracy = None
    if total["beyond_cap"] > 0:
        unfinished_accuracy = sft.finite_or_none(total["beyond_cap_correct"] / total["beyond_cap"])
    return {"step": step,
            "val_accuracy": sft.finite_or_none(num_correct / num_questions),
            "val_accuracy_in_cap": sft.finite_or_none(total["in_cap_correct"] / num_questions),
            "val_over_turn": total["over_turn"] / num_questions,
            "val_over_context": total["over_context"] / num_questions,
            "val_void": total["void"] / num_questions,
            "unfinished_accuracy": unfinished_accuracy}


def find_decline(evaluations, num_questions):
    """Return a sentence that says in what the latest evaluation is worse than the best so far, or
    None.

    evaluations: dicts with the step and the metrics of validate, oldest first, all on the same
    num_questions questions. Two signs count. The accuracy is below the best by more than two
    standard errors; or it is below the best, and over_turn is above what it was then by more than
    two: the search runs away. The standard error is that of a difference between two shares p and q
    of n questions, sqrt((p(1 - p) + q(1 - q)) / n). What to do: docs/worse.md."""
    scored = [evaluation for evaluation in evaluations if evaluation["val_accuracy"] is not None]
    if not scored or scored[-1] is not evaluations[-1]:
        return None
    best = max(scored, key=lambda evaluation: evaluation["val_accuracy"])
    latest = scored[-1]
    if latest["val_accuracy"] == best["val_accuracy"]:
        return None
    for name, high, low in [("val_accuracy", best, latest), ("val_over_turn", latest, best)]:
        p = high.get(name, 0.0)     # logs of older versions lack val_over_turn
        q = low.get(name, 0.0)
        standard_error = math.sqrt((p * (1 - p) + q * (1 - q)) / num_questions)
        if p - q > 2 * standard_error:
            return (f"step {latest['step']}: the policy gets worse on held-out questions: {name} "
                    f"was {best[name]:.3f} at step {best['step']} and is {latest[name]:.3f}, more "
                    "than two standard errors from it (docs/worse.md)")
    return None


def best_evaluation(evaluations):
    """Return the best evaluation after a step of training, of equal ones the latest; None if there
    is none with a score."""
    scored = [evaluation for evaluation in evaluations
              if evaluation["step"] > 0 and evaluation["val_accuracy"] is not None]
    return max(scored, default=None,
               key=lambda evaluation: (evaluation["val_accuracy"], evaluation["step"]))


def gets_worse(evaluations, num_questions):
    """Return whether the two latest evaluations both show a decline: one alone may be chance."""
    return bool(find_decline(evaluations, num_questions)
                and find_decline(evaluations[:-1], num_questions))


def evaluation_metrics(evaluations, steps_done, num_questions):
    """Return what the line of a step in metrics.jsonl says about evaluations."""
    metrics = {}
    for evaluation in evaluations:
        if evaluation["step"] == 0 and steps_done == 1:
            metrics.update({f"{name}_initial": figure for name, figure in evaluation.items()
                            if name != "step"})
        if evaluation["step"] == steps_done:
            metrics.update(evaluation)
            metrics["alarm"] = find_decline(evaluations, num_questions)
    metrics["unfinished_accuracy"] = last_estimate(evaluations)
    return metrics


def last_estimate(evaluations):
    """Return the latest unfinished_accuracy that is known, or None."""
    for evaluation in reversed(evaluations):
        if evaluation.get("unfinished_accuracy") is not None:   # 0.0 is an estimate, too
            return evaluation["unfinished_accuracy"]
    return None


# ---- The update ---------------------------------------------------------------------------------


def encode_rollouts(policy, rollouts):
    """Return one packed batch of these conversations with their images (see sft.collate). Images
    are cut again from the original: storing them would need too much memory."""
    return sft.collate(policy, [rollout.with_images(policy) for rollout in rollouts])


def response_mask(rollouts, device):
    """Return a (B, T) bool tensor whose row i begins with one True per sampled token of rollout i.

    Two conversations with 3 and 1 sampled tokens: [[True, True, True], [True, False, False]]."""
    response_lengths = [len(rollout.logprobs) for rollout in rollouts]
    token_indices = torch.arange(max(response_lengths, default=0), device=device)           # (T,)
    num_tokens = torch.tensor(response_lengths, dtype=torch.long, device=device)            # (B,)
    return token_indices < num_tokens[:, None]                                              # (B, T)


def compute_logprobs(policy, rollouts, batch):
    """Return (logprobs, old_logprobs, mask) of the sampled tokens, each (B, T), a row per response.

    logprobs are those of the policy now, old_logprobs those that the sampler recorded. Both are 0
    where mask is False. batch: encode_rollouts of these rollouts."""
    mask = response_mask(rollouts, policy.device)                                           # (B, T)
    flat_logprobs = sft.token_logprobs(policy, batch)                                       # (N,)
    sampler_logprobs = []
    for rollout in rollouts:
        sampler_logprobs += rollout.logprobs
    flat_old_logprobs = flat_logprobs.new_tensor(sampler_logprobs)                          # (N,)
    zeros = flat_logprobs.new_zeros(mask.shape)                                             # (B, T)
    logprobs = zeros.masked_scatter(mask, flat_logprobs)                                    # (B, T)
    old_logprobs = zeros.masked_scatter(mask, flat_old_logprobs)                            # (B, T)
    return logprobs, old_logprobs, mask


def deal_micro_batches(rollouts, max_tokens):
    """Return this rank's micro-batches of the rollouts of all ranks, as lists. Every rank must call
    this.

    With --shard_optimizer gradients are summed over ranks in every micro-batch. So ranks work in
    rounds, one micro-batch each, and a round takes as long as its largest micro-batch: all of them
    should have about as many tokens. (Without it ranks wait once, at the end.) The number of rounds
    grows until every micro-batch fits in max_tokens; only a conversation that is longer exceeds
    them. Who played a conversation does not matter.

    Lengths 6 5 4 3 2 1 on two ranks with at most 6 tokens: two rounds, so four micro-batches.
    Longest first, each into the emptiest: 6 | 5 | 4 1 | 3 2. Rank 0 gets 6 and 4 1, rank 1 gets 5
    and 3 2.
    """
    num_ranks = sft.world_size()
    all_rollouts = sft.all_gather_objects(rollouts)
    all_rollouts.sort(key=lambda rollout: (-len(rollout.token_ids), rollout.group_index,
                                           rollout.sample_number))
    lengths = [len(rollout.token_ids) for rollout in all_rollouts]
    # 1. One round more, until the fullest micro-batch has room.
    num_rounds = max(1, math.ceil(sum(lengths) / (max_tokens * num_ranks)))
    micro_batches = fill_evenly(all_rollouts, num_rounds * num_ranks)
    while any(len(part) > 1 and sum_of_tokens(part) > max_tokens for part in micro_batches):
        num_rounds += 1
        micro_batches = fill_evenly(all_rollouts, num_rounds * num_ranks)
    # 2. Neighbours in size are one round. Without enough conversations some are empty.
    return [micro_batch for micro_batch in micro_batches[sft.get_rank()::num_ranks] if micro_batch]


def fill_evenly(rollouts, num_parts):
    """Return num_parts lists of these rollouts, the fullest first: each rollout, in the order that
    is given, goes into the list with the fewest tokens. In a list they are in the order of their
    groups, since a group shares an image."""
    # (tokens, number, rollouts) of each list. All are empty, so this is a heap already: the
    # emptiest is the first.
    parts = [(0, number, []) for number in range(num_parts)]
    for rollout in rollouts:
        num_tokens, number, part = heapq.heappop(parts)
        part.append(rollout)
        heapq.heappush(parts, (num_tokens + len(rollout.token_ids), number, part))
    parts.sort(key=lambda part: (-part[0], part[1]))
    return [sorted(part, key=lambda rollout: (rollout.group_index, rollout.sample_number))
            for _, _, part in parts]


def sum_of_tokens(rollouts):
    return sum(len(rollout.token_ids) for rollout in rollouts)


def mini_batches(groups_with_signal, args, device):
    """Cut the indices of the groups with signal, on all ranks, into mini-batches: a list of lists.

    groups_with_signal: this rank's, by index. Each mini-batch has about --mini_batch_size groups
    (their number is rounded); sizes differ by at most one. So a step in which few groups have
    signal takes fewer optimizer steps, not noisier ones. Without any signal there is one, empty
    mini-batch. All ranks must call this and get the same result, because they must take the same
    number of optimizer steps."""
    has_signal = [int(group_index in groups_with_signal)
                  for group_index in range(args.prompts_per_step)]
    group_indices = np.flatnonzero(sft.all_reduce(has_signal, device))
    num_mini_batches = max(1, round(len(group_indices) / args.mini_batch_size))
    return [part.tolist() for part in np.array_split(group_indices, num_mini_batches)]


class UpdateStatistics:
    """What the log says about one optimizer step. Sums are over this rank's trained tokens.
    grad_norm is None if there was no step, because no rank had any signal."""

    def __init__(self):
        self.sums = collections.Counter(
            loss=0.0, logprob_diff=0.0, approx_kl=0.0, num_clipped=0, num_trained_tokens=0,
            num_trained_responses=0)
        self.max_log_ratio = 0.0
        self.grad_norm = None

    def add(self, loss, log_ratio, num_responses, args):
        """Add a micro-batch. log_ratio (N,): log p(trainer) - log p(sampler) of its tokens.
        approx_kl is Schulman's k3 estimate of KL(sampler, trainer): (ratio - 1) - log ratio."""
        ratio = log_ratio.exp()
        is_clipped = (ratio < 1 - args.clip_low) | (ratio > 1 + args.clip_high)
        self.sums["loss"] += loss
        self.sums["logprob_diff"] += log_ratio.abs().sum().item()
        self.sums["approx_kl"] += (ratio - 1 - log_ratio).sum().item()
        self.sums["num_clipped"] += is_clipped.sum().item()
        self.sums["num_trained_tokens"] += len(log_ratio)
        self.sums["num_trained_responses"] += num_responses
        # NaN as infinity: the maximum of NaN and a number may be the number.
        largest = log_ratio.abs().nan_to_num(nan=math.inf, posinf=math.inf).max().item()
        self.max_log_ratio = max(self.max_log_ratio, largest)


def update_policy(policy, optimizer, rollouts, args, lr):
    """Take one optimizer step on one mini-batch and return its UpdateStatistics. rollouts: those of
    the mini-batch that this rank played, with their A'. Every rank must call this."""
    statistics = UpdateStatistics()
    max_response_tokens = args.max_new_tokens * args.max_turns
    # 1. The loss's denominator, over the whole mini-batch on all ranks.
    kept = torch.tensor([is_kept(rollout, args) for rollout in rollouts], dtype=torch.bool)  # (B,)
    my_denominator = count_denominator(
        response_mask(rollouts, "cpu"), kept, divisor=args.divisor, aggregation=args.aggregation,
        max_response_tokens=max_response_tokens)
    denominator = sft.all_reduce([my_denominator.item()], policy.device)[0]
    if denominator == 0:    # the one, empty mini-batch of a step without any signal
        return statistics   # AdamW would move the weights by its moments alone
    # 2. Share the conversations that have a gradient among the ranks; cut this rank's share.
    micro_batches = deal_micro_batches(
        [rollout for rollout in rollouts if rollout.advantage != 0], args.micro_batch_tokens)

    def encode_micro_batch(micro_batch):
        return micro_batch, encode_rollouts(policy, micro_batch)

    def loss_of(encoded):
        """Return the loss of an encoded micro-batch, and note its statistics."""
        micro_batch, batch = encoded
        logprobs, old_logprobs, mask = compute_logprobs(policy, micro_batch, batch)         # (B, T)
        advantages = logprobs.new_tensor([rollout.advantage for rollout in micro_batch])    # (B,)
        # The mask has acted already: a masked conversation has A' = 0 and was left out above, and
        # the denominator was counted before. So all of these are kept.
        all_kept = torch.ones_like(advantages, dtype=torch.bool)                            # (B,)
        loss = grpo_loss(logprobs, old_logprobs, advantages, mask, all_kept,
                         clip_low=args.clip_low, clip_high=args.clip_high,
                         aggregation=args.aggregation, denominator=denominator,
                         max_response_tokens=max_response_tokens)
        log_ratio = (logprobs.detach() - old_logprobs)[mask]                                # (N,)
        statistics.add(loss.item(), log_ratio, len(micro_batch), args)
        return loss

    # 3. Backward through every micro-batch; meanwhile threads encode the images of the next ones.
    #    On a GPU the images of one take longer than its backward pass.
    num_threads = 3 if policy.device.type == "cuda" else 1
    encoded = sft.prefetch(encode_micro_batch, micro_batches, num_threads)
    optimizer.backward(encoded, loss_of, num_micro_batches=len(micro_batches))
    # 4. The step. A loss that is not finite on any rank skips it on all.
    total_loss = sft.all_reduce([statistics.sums["loss"]], policy.device)[0]
    statistics.grad_norm = optimizer.step(lr, args.max_grad_norm, math.isfinite(total_loss))
    return statistics


# ---- Metrics ------------------------------------------------------------------------------------


def count_rollouts(played_rollouts):
    """Return a Counter with sums over the conversations that this rank played in a step."""
    # All names, so that every rank has the same ones in the same order.
    counts = collections.Counter(
        num_rollouts=0, num_unscored=0, num_correct=0, num_turns=0, num_turns_correct=0,
        num_sampled_tokens=0, negative_logprobs=0.0, num_baselines=0, baselines=0.0,
        num_unfinished=0, num_unfinished_values=0, unfinished_values=0.0)
    counts.update(dict.fromkeys(evaluate.FINISH_REASONS, 0))
    # Every conversation; then those that were correct.
    for rollout in played_rollouts:
        counts["num_rollouts"] += 1
        counts["num_turns"] += len(rollout.turns)
        counts["num_sampled_tokens"] += len(rollout.logprobs)
        counts["negative_logprobs"] -= sum(rollout.logprobs)
        counts[rollout.finish_reason] += 1
        if rollout.reward is None:      # the judge failed
            counts["num_unscored"] += 1
        elif rollout.reward == 1.0:
            counts["num_correct"] += 1
            counts["num_turns_correct"] += len(rollout.turns)
        # What has no value (a group that the judge could not score) is left out of the means.
        counts["num_unfinished"] += rollout.unfinished_value is not None
        for name in ("baseline", "unfinished_value"):
            value = getattr(rollout, name)
            if value is not None and math.isfinite(value):
                counts[f"num_{name}s"] += 1
                counts[f"{name}s"] += value
    return counts


def mean_or_none(total, name):
    """Return the mean of what was counted under `name` and num_`name`, None if that is nothing."""
    if total[f"num_{name}"] == 0:
        return None
    return total[name] / total[f"num_{name}"]


def conversation_metrics(total):
    """Return the metrics of a step about the conversations that were played. total: the sums of
    count_rollouts over all ranks."""
    # 1. How good, how long, how they ended.
    num_rollouts = total["num_rollouts"]
    num_scored = num_rollouts - total["num_unscored"]
    num_incorrect = total["answer"] - total["num_correct"] - total["num_unscored"]
    metrics = {
        "reward": total["num_correct"] / max(num_scored, 1),    # without --overturn_penalty
        "unscored": total["num_unscored"] / num_rollouts,
        "num_rollouts": int(num_rollouts),
        "mean_turns": total["num_turns"] / num_rollouts,
        "mean_turns_correct": total["num_turns_correct"] / max(total["num_correct"], 1)}
    for finish_reason in evaluate.FINISH_REASONS:
        metrics[finish_reason] = total[finish_reason] / num_rollouts
    metrics["incorrect"] = num_incorrect / num_rollouts
    # 2. What the mask pays (docs/mask.md); None if there is nothing to average.
    metrics["baseline"] = mean_or_none(total, "baselines")
    metrics["unfinished"] = total["num_unfinished"] / num_rollouts
    metrics["unfinished_value"] = mean_or_none(total, "unfinished_values")
    # 3. Sampled tokens. The expectation of -log p is the entropy, so its mean estimates it.
    metrics["num_sampled_tokens"] = int(total["num_sampled_tokens"])
    metrics["mean_response_length"] = total["num_sampled_tokens"] / num_rollouts
    metrics["entropy"] = total["negative_logprobs"] / max(total["num_sampled_tokens"], 1)
    return metrics


def step_metrics(played_rollouts, updates, num_zero_variance_groups, engine_counts, device):
    """Return the metrics of a step, over all ranks (docs/metrics.md explains each of them).

    played_rollouts and num_zero_variance_groups: of this rank. updates: UpdateStatistics of each
    optimizer step. engine_counts: Engine.counts of the step. Every rank must call this."""
    # 1. Sums over all ranks. The norms need none: all ranks take the same steps.
    counts = count_rollouts(played_rollouts)
    counts["num_zero_variance_groups"] = num_zero_variance_groups
    for name in evaluate.COUNTS:
        counts[name] = engine_counts[name]
    for update in updates:
        counts.update(update.sums)
    total = sft.all_reduce_dict(counts, device)
    my_max_log_ratio = max(update.max_log_ratio for update in updates)
    max_log_ratio = sft.all_reduce([my_max_log_ratio], device, torch.distributed.ReduceOp.MAX)[0]
    grad_norms = [update.grad_norm for update in updates if update.grad_norm is not None]
    # 2. What was played.
    metrics = conversation_metrics(total)
    # 3. The update, over the tokens that were trained on. The loss is the sum over the step's
    #    mini-batches, the gradient norm is their mean.
    num_trained_tokens = max(total["num_trained_tokens"], 1)
    metrics.update({
        "approx_kl": sft.finite_or_none(total["approx_kl"] / num_trained_tokens),
        "num_zero_variance_groups": int(total["num_zero_variance_groups"]),
        "num_trained_responses": int(total["num_trained_responses"]),
        "num_trained_tokens": int(total["num_trained_tokens"]),
        "loss": sft.finite_or_none(total["loss"]),
        "logprob_diff": sft.finite_or_none(total["logprob_diff"] / num_trained_tokens),
        "max_log_ratio": sft.finite_or_none(max_log_ratio),
        "clip_fraction": total["num_clipped"] / num_trained_tokens,
        "grad_norm": sft.finite_or_none(sum(grad_norms) / max(len(grad_norms), 1)),
        **evaluate.draft_statistics(total)})
    return metrics


# ---- The loop -----------------------------------------------------------------------------------


def learning_rate(step, args):
    """Return the learning rate of a step, counted from 0. It rises linearly over the first
    --warmup_ratio of the steps. With --anneal_lr it also falls linearly over the whole run, and
    would reach 0 one step after the last. (sft.learning_rate falls along half a cosine instead, and
    only after the warmup.)"""
    num_warmup_steps = max(1, round(args.warmup_ratio * args.steps))
    rate = args.lr * min(1.0, (step + 1) / num_warmup_steps)
    if args.anneal_lr:
        rate *= 1 - step / args.steps
    return rate


def train_step(policy, optimizer, engine, questions, step, args, baseline):
    """Play the conversations of a step and train on them. Returns (metrics, this rank's groups with
    signal as {group_index: rollouts})."""
    # 1. Rollouts and advantages. Groups are dealt to the ranks in turn.
    rollout_start = time.time()
    my_group_indices = range(sft.get_rank(), args.prompts_per_step, sft.world_size())
    groups_with_signal, played_rollouts, num_zero_variance_groups = collect_groups(
        engine, questions.training, step, my_group_indices, args, baseline)
    # The ranks that are done first wait for the others. Without a barrier that would be logged as
    # time of the update.
    wait_start = time.time()
    sft.barrier()
    update_start = time.time()
    # 2. One optimizer step per mini-batch, on the rollouts of all ranks.
    lr = learning_rate(step, args)
    updates = []
    for group_indices in mini_batches(groups_with_signal, args, policy.device):
        my_rollouts = []
        for group_index in group_indices:
            my_rollouts += groups_with_signal.get(group_index, [])
        updates.append(update_policy(policy, optimizer, my_rollouts, args, lr))
    seconds_update = time.time() - update_start
    # 3. What the log says.
    metrics = step_metrics(played_rollouts, updates, num_zero_variance_groups, engine.counts,
                           policy.device)
    metrics = {"step": step + 1, "lr": lr, **metrics,
               "seconds_rollout": wait_start - rollout_start,
               "seconds_wait": update_start - wait_start, "seconds_update": seconds_update}
    return metrics, groups_with_signal


def save_rollouts(out, step, groups_with_signal, max_rows=8):
    """Write at most max_rows rollouts of rank 0's groups with signal as trajectory rows, with their
    advantages. They are the copies that training uses: with --baseline outcome they are cut at the
    training cap. Read them: they show what is learned."""
    rows = []
    for group_index in sorted(groups_with_signal):
        for rollout in groups_with_signal[group_index]:
            rows.append({**rollout.to_row(), "advantage": rollout.advantage})
    tools.write_jsonl(Path(out) / "rollouts" / f"step_{step:05d}.jsonl", rows[:max_rows])


def read_evaluations(out):
    """Return the evaluations in the log of a run that is resumed, see find_decline. Every rank must
    call this."""
    sft.barrier()   # rank 0 has removed the lines after the checkpoint
    path = Path(out) / "metrics.jsonl"
    lines = tools.read_jsonl(path)
    tools.check(lines, f"{path} is gone: without it --resume does not know the best model so far; "
                "put it back, or leave out --resume to start over (nothing is deleted)")
    # The evaluation before the first step is in the first line, under names of its own.
    initial = {name.removesuffix("_initial"): figure for name, figure in lines[0].items()
               if name.endswith("_initial")}
    return [line for line in [{**initial, "step": 0}, *lines] if "val_accuracy" in line]


def train(policy, questions, args, process, judge=None):
    """Run the loop: a step, and now and then an evaluation, saved rollouts, a checkpoint. The model
    in --out is the best one that was evaluated, or the last one if none was."""
    # 1. Where an earlier run has stopped.
    run = sft.start_training("rl", policy, args, process, args.freeze_vision, args.steps,
                             args.optimizer)
    is_main = process.rank == 0
    log = sft.MetricsLog(args.out, run) if is_main else None
    evaluations = read_evaluations(args.out) if run.first_step > 0 else []
    # 2. Two engines: validation has a larger turn budget, and so has training with "outcome".
    training_turns = args.eval_turns if args.baseline == "outcome" else args.max_turns
    training_engine = evaluate.make_engine(policy, args, training_turns, judge)
    validation_engine = evaluate.make_engine(policy, args, args.eval_turns, judge)
    progress_bar = terminal.progress_bar(range(run.first_step, args.steps), initial=run.first_step,
                                         total=args.steps, disable=not is_main, desc="rl")
    for step in progress_bar:
        steps_done = step + 1
        if questions.held_out and step == 0:
            evaluations.append(validate(validation_engine, questions.held_out, args, step))
        # 3. Rollouts, advantages, updates.
        baseline = step_baseline(args, last_estimate(evaluations))
        metrics, groups_with_signal = train_step(policy, run.optimizer, training_engine,
                                                 questions, step, args, baseline)
        # 4. Evaluate, keep the best model. Is the policy getting worse?
        last_step = args.steps
        if questions.held_out and (steps_done % args.eval_every == 0 or steps_done == args.steps):
            evaluations.append(validate(validation_engine, questions.held_out, args, steps_done))
            if best_evaluation(evaluations) is evaluations[-1]:
                sft.export(policy, args.out)
            if args.stop_when_worse and gets_worse(evaluations, len(questions.held_out)):
                last_step = steps_done
        # 5. Log, save rollouts, checkpoint.
        if is_main:
            write_metrics(log, progress_bar, {
                **metrics, **evaluation_metrics(evaluations, steps_done, len(questions.held_out))})
            if steps_done % args.save_rollouts_every == 0:
                save_rollouts(args.out, steps_done, groups_with_signal)
        sft.end_step(run, args, steps_done, last_step, policy.device)
        if steps_done == last_step:
            if is_main and last_step < args.steps:
                print(f"rl: stopped after step {last_step} of {args.steps}, since the policy gets "
                      "worse (--stop_when_worse)", flush=True)
            break
    if best_evaluation(evaluations) is None:
        sft.export(policy, args.out)
    if is_main:
        run_folder.report_rl_model(args.out)
    if judge is not None:
        judge.report_cost(policy.device, process.rank)


def write_metrics(log, progress_bar, metrics):
    """Append a line to metrics.jsonl and show the most important numbers next to the bar."""
    log.write(metrics)
    shown_metrics = []
    for name in ("reward", "over_turn", "incorrect", "val_accuracy"):
        if metrics.get(name) is not None:
            shown_metrics.append(f"{name} {metrics[name]:.3f}")
    progress_bar.set_postfix_str(" ".join(shown_metrics), refresh=False)
    if metrics.get("alarm"):
        progress_bar.write(f"rl: {metrics['alarm']}")


# ---- The command --------------------------------------------------------------------------------


def baseline_flag(text):
    """Return the value of --baseline: one of four words, or a number."""
    words = ("group", "completed", "estimate", "outcome")
    if text in words:
        return text
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"'{text}' is none of {', '.join(words)}, or a number")
    return number


# of --optimizer: --lr and --max_grad_norm
OPTIMIZER_DEFAULTS = {"sgd": (0.2, 0.1), "adamw": (2.5e-4, 1.0)}


def parse_args(description="GRPO with over-turn masking."):
    """Return the flags. Raise InputError for values that cannot be right."""
    parser = terminal.make_parser(description)
    group = parser.add_argument_group("model and data")
    add = group.add_argument
    add("--model", default="checkpoints/sft", help="local folder or hub id to start from")
    add("--data", nargs="+", default=["data/train.jsonl"], metavar="FILE",
        help="question files, read one after the other")
    add("--out", type=Path, default=Path("checkpoints/rl"), help="folder for the trained model")
    sft.add_policy_flags(group)

    group = parser.add_argument_group("rollouts")
    add = group.add_argument
    add("--steps", type=int, default=16, help="RL steps (paper: about 200)")
    add("--prompts_per_step", type=int, default=24,
        help="P: questions per step over all processes (paper: 256)")
    add("--group_size", type=int, default=16, help="G: conversations per question (paper: 16)")
    add("--resample", type=int, default=1,
        help="how often a group without signal gets another question")
    add("--max_turns", type=int, default=4,
        help="turns per conversation, the answer included (paper: 6)")
    evaluate.add_rollout_flags(group)
    evaluate.add_judge_flags(parser)

    group = parser.add_argument_group("loss")
    add = group.add_argument
    add("--overturn_mask", action=argparse.BooleanOptionalAction, default=True,
        help="mask conversations that ran out of turns or context; without: they count as wrong")
    # No default here: check_args tells whether the user has given it.
    add("--baseline", type=baseline_flag, default=argparse.SUPPRESS, metavar="BASELINE",
        help="b, which is also what the mask pays for an unfinished conversation: a number, group "
             "(official code), completed, estimate (accuracy of such conversations among the "
             "held-out ones) or outcome (play them to their end); without the mask nothing is "
             "paid, and b is the group's mean (default: 0.5)")
    add("--mask_void", action="store_true",
        help="treat a void conversation (no call and no answer, or cut at the token cap) as "
             "unfinished")
    add("--overturn_penalty", type=float, default=0.0,
        help="subtracted from the reward of an unfinished conversation (with --no-overturn_mask)")
    add("--divisor", default="all", choices=["kept", "all"],
        help="the loss is divided by all responses (official code) or by the kept ones (paper)")
    add("--aggregation", default="response", choices=["response", "token", "constant"],
        help="mean per response (paper), over tokens (DAPO), or by a constant length (Dr. GRPO)")
    add("--clip_low", type=float, default=0.2, help="the ratio is clipped below 1 - this")
    add("--clip_high", type=float, default=0.3, help="the ratio is clipped above 1 + this")

    group = parser.add_argument_group("optimisation")
    add = group.add_argument
    add("--optimizer", default="sgd", choices=["adamw", "sgd"],
        help="sgd has no momentum (paper: AdamW)")
    # No default for these two: check_args knows that of the optimizer.
    add("--lr", type=float, default=argparse.SUPPRESS,
        help="learning rate (default: 0.2 with sgd, 2.5e-4 with adamw; paper: 1e-6)")
    add("--max_grad_norm", type=float, default=argparse.SUPPRESS,
        help="gradients are clipped to this global norm (default: 0.1 with sgd, 1.0 with adamw)")
    add("--anneal_lr", action=argparse.BooleanOptionalAction, default=False,
        help="let the learning rate fall linearly to 0 over the run (paper: constant)")
    add("--warmup_ratio", type=float, default=0.0,
        help="fraction of the steps with a rising learning rate")
    add("--mini_batch_size", type=int, default=3,
        help="groups with signal per optimizer step (paper: 32 of 256)")
    add("--micro_batch_tokens", type=int, default=4096,
        help="tokens per forward pass on one process")
    add("--freeze_vision", action=argparse.BooleanOptionalAction, default=True,
        help="do not train the vision tower and its projector, as in the cold start")
    sft.add_training_flags(group, weight_decay=0.0, save_every=10)
    add("--seed", type=int, default=0, help="questions of each step and draws of the samples")

    group = parser.add_argument_group("evaluation")
    add = group.add_argument
    add("--eval_every", type=int, default=8,
        help="steps between evaluations on held-out questions; --out keeps the best model (0: no "
             "evaluation, the last model is kept)")
    add("--eval_size", type=int, default=240, help="questions of --eval_data that are played")
    add("--eval_data", type=Path, default=Path("data/val.jsonl"),
        help="questions that no stage has trained on")
    add("--eval_turns", type=int, default=32,
        help="turns per conversation in these evaluations: choose the checkpoint by the accuracy "
             "that counts in the end")
    add("--stop_when_worse", action="store_true",
        help="end the run when two evaluations in a row are clearly below the best one (it is "
             "logged either way); --out keeps the best model")
    add("--save_rollouts_every", type=int, default=4,
        help="steps after which 8 conversations are saved to --out/rollouts/")
    args = parser.parse_args()
    check_args(args)
    return args


def check_args(args):
    """Raise InputError for flags that make no sense, alone or together. Set --baseline, --lr and
    --max_grad_norm if they were not given."""
    tools.check(args.overturn_mask or "baseline" not in args, "--baseline is what the mask pays, "
                "and --no-overturn_mask takes the mask away: leave one of them out")
    args.baseline = getattr(args, "baseline", 0.5)
    default_lr, default_norm = OPTIMIZER_DEFAULTS[args.optimizer]
    args.lr = getattr(args, "lr", default_lr)
    args.max_grad_norm = getattr(args, "max_grad_norm", default_norm)
    # Each alone.
    terminal.check_number_flags(
        args, may_be_zero=["seed", "num_speculative_tokens", "resample", "clip_low", "clip_high",
                           "warmup_ratio", "weight_decay", "eval_every", "eval_size",
                           "overturn_penalty", "lora"],
        any_number=["baseline"])
    run_folder.check_warmup(args.warmup_ratio)
    track.check(args.track)
    tools.check(args.group_size >= 2, "--group_size must be at least 2: an advantage compares "
                "conversations about one question")
    evaluate.check_rollout_flags(args)
    # Two that contradict each other.
    tools.check(args.optimizer == "adamw" or args.lr >= 1e-4,
                f"--lr {args.lr} is a rate for AdamW: with sgd it would leave the weights as they "
                "are; add --optimizer adamw")
    tools.check((args.eval_every and args.eval_size) or args.baseline != "estimate",
                "--baseline estimate comes from the evaluations: set --eval_every and --eval_size "
                "above 0")
    tools.check(args.overturn_penalty == 0 or not args.overturn_mask,
                "--overturn_penalty needs --no-overturn_mask: a masked conversation has no reward "
                "to take from")
    uses_eval_turns = args.eval_every > 0 or args.baseline == "outcome"
    tools.check(not uses_eval_turns or args.eval_turns >= args.max_turns,
                f"--eval_turns {args.eval_turns} is less than --max_turns {args.max_turns}: it is "
                "the larger budget, of evaluations and of --baseline outcome")


def load_questions(args):
    """Return the Questions of --data and --eval_data."""
    training = []
    for file_name in args.data:
        path = Path(file_name)
        rows = tools.read_questions(path, hint="python build_data.py")
        check_images(path, rows)
        training += [(row, path.parent) for row in rows]
    tools.check(len(training) >= args.prompts_per_step, f"--data has {len(training)} questions to "
                f"train on, fewer than --prompts_per_step {args.prompts_per_step}")
    held_out = []
    if args.eval_every:
        rows = tools.read_questions(args.eval_data, hint="python build_data.py")[:args.eval_size]
        check_images(args.eval_data, rows)
        held_out = [(row, args.eval_data.parent) for row in rows]
    run_folder.check_overlap(training, held_out)
    return Questions(training, held_out)


def main():
    """Train a policy by GRPO, as the flags say."""
    # 1. What can be wrong is told before the model is loaded, which takes longest.
    args = parse_args()
    run_folder.check_out(args.out, args.model)
    process = sft.setup_distributed()
    tools.check(args.prompts_per_step >= process.world_size,
                f"--prompts_per_step {args.prompts_per_step} is less than the number of processes "
                f"{process.world_size}")
    questions = load_questions(args)
    prompts = tools.load_prompts(args.prompts)
    judge = evaluate.make_judge(args, process.rank)
    # 2. The policy.
    policy = sft.load_policy(args.model, process.device, args.dtype, prompts, args.min_pixels,
                             args.max_pixels, "python sft.py")
    args.out.mkdir(parents=True, exist_ok=True)
    if process.rank == 0:
        print(f"{len(questions.training)} questions to train on, {len(questions.held_out)} held "
              f"out; {process.world_size} process(es) on {process.device.type}", flush=True)
    # 3. Train it. Meanwhile no other run may write to the folder.
    with run_folder.lock_folder(args.out, process.rank, process.attempt):
        train(policy, questions, args, process, judge)
    sft.close_distributed()


if __name__ == "__main__":
    terminal.run(main)
