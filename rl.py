"""Reinforcement learning: GRPO with over-turn masking.

For each of P prompts the policy plays G conversations of at most `--max_turns` turns. Reward: 1 if
the answer is right, else 0. The one new thing here is the loss (Mini-o3, section on reinforcement
learning): with rewards r and the completion mask M of a group (M = 0 for a conversation that ran
out of turns or context) and a baseline b,

    A'_i = M_i (r_i - b) / (s + eps)
    J    = 1/sum(M)  sum_i  mean_t  min(rho_it A'_i, clip(rho_it, 1 - 0.2, 1 + 0.3) A'_i)

Running out of turns is thus not punished. Without the mask (--no-overturn_mask) it counts as a
wrong answer, and the policy learns to answer early instead of to search on; with it, a policy
trained with 6 turns goes on searching at 32. Why: since E[grad log pi] = 0, the expected gradient
is that of P(correct) + b P(unfinished). The mask pays b for an unfinished conversation, and a guess
is worth its while only where its odds are above b (docs/mask.md).

What differs from textbook GRPO and from the paper:
1. No KL term, no entropy term, no reference model; clip-higher 0.2 / 0.3 (paper).
2. What b is: --baseline. The paper leaves it open; "group", the group's success rate, is
   the official code's choice. Default: 0.5 for every question. A guess at lower odds loses, and a
   faster search gains.
3. Divisor: the paper's sum(M) by default; --divisor all counts masked conversations too (official
   code).
4. Denominators are counted once over the whole mini-batch on all ranks; gradients are summed.
   Nothing depends on how micro-batches are cut or on the number of processes.
5. Old log-probabilities come from the sampler, token by token; the mismatch to the trainer's own is
   logged.
6. A group in which every A'_i is 0 teaches nothing: its place is given to a fresh prompt,
   --resample times at most; what is left over then is dropped from the update and counted
   ("zero_variance_groups"). Mini-batches are cut from the groups with signal.
7. A conversation with A'_i = 0 has no gradient and is not run through the model in the update.
8. The checkpoint that is kept is the best on held-out questions at the *large* budget
   (--eval_turns): within the training cap a policy that guesses looks better than one that searches
   on.

Commands:
    1 CPU          python rl.py
    2 CPU cores    torchrun --nproc_per_node=2 rl.py
    1 GPU          python rl.py --model checkpoints/sft-3b --lr 1e-6 --prompts_per_step 16 \\
                       --group_size 8 --mini_batch_size 4 --gradient_checkpointing --max_new_tokens 1024 \\
                       --max_model_len 16384 --max_num_seqs 16
    8 GPUs         torchrun --nproc_per_node=8 rl.py --model checkpoints/sft-7b ...
                       (the paper's run: docs/large.md)
    memory, hours  python extras/plan.py --model checkpoints/sft-7b ...   (the flags of the run)
    2 nodes        torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d \\
                       --rdzv_endpoint=HOST:29500 rl.py ...
"""

import argparse
import collections
import json
import math
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

import evaluate
import sft
import tools

# ---- The algorithm ------------------------------------------------------------------------------


def group_advantages(rewards, kept, baseline, *, eps=1e-6):
    """A'_i = M_i (r_i - b) / (s + eps), per group: the mask pays b for an unfinished response.

    rewards (P, G) float, kept M (P, G) bool -> (P, G). baseline says what b is and
    what enters the unbiased deviation s:
        "group"      b = mean(r) over all, unfinished ones with their reward, 0 (released code)
        "completed"  b = mean(r) over the kept ones
        a number     b = that number; s is of the rewards with b in the place of unfinished ones
    With fewer than two responses that enter s, no spread, or a reward that is NaN, A' = 0 in the
    whole group, never NaN.
    """
    alone = baseline == "completed"
    weight = kept.to(rewards.dtype) if alone else torch.ones_like(rewards)          # (P, G)
    if not isinstance(baseline, str):
        rewards = torch.where(kept, rewards, baseline)                      # (P, G)
    count = weight.sum(1, keepdim=True)  # (P, 1)
    mean = (weight * rewards).sum(1, keepdim=True) / count.clamp(min=1)
    variance = (weight * (rewards - mean) ** 2).sum(1, keepdim=True) / (count - 1).clamp(min=1)
    subtracted = mean if isinstance(baseline, str) else baseline
    advantages = (rewards - subtracted) / (variance.sqrt() + eps)                          # (P, G)
    # one response alone has no spread
    return torch.where(kept & (variance > 0), advantages, 0.0)                      # (P, G)


def count_denominator(mask, kept, *, divisor="kept", aggregation="response",
                      max_tokens=None):
    """What the summed loss is divided by. mask (B, T) bool: sampled tokens; kept (B,) bool.
    Returns a float tensor.

    response: number of responses; token: their sampled tokens; constant: max_tokens x number of
    responses; over kept responses only (divisor "kept", the paper) or over all ("all").
    """
    counted = kept if divisor == "kept" else torch.ones_like(kept)  # (B,)
    if aggregation == "token":
        return (mask.sum(1) * counted).sum().double()
    return counted.sum().double() * (max_tokens if aggregation == "constant" else 1)


def grpo_loss(logprobs, old_logprobs, advantages, mask, kept, *, clip_low=0.2, clip_high=0.3,
              clip_dual=0.0, divisor="kept", aggregation="response", denominator=None,
              max_tokens=None):
    """-J: clipped policy gradient with over-turn mask, a scalar to minimise.

    logprobs, old_logprobs (B, T): of the sampled tokens under the trained and the sampling policy;
    advantages (B,); mask (B, T) bool: 1 where the policy wrote the token; kept M (B,) bool.
    aggregation: "response" averages the tokens of each response, then responses (paper); "token"
    averages all tokens (DAPO); "constant" divides by max_tokens (Dr. GRPO). clip_dual c > 1: where
    A' < 0 the objective is not below c A' (0: no bound, as in the paper). denominator: the count
    over the whole mini-batch on all ranks (None: of this batch). Denominator 0 gives a zero loss
    that is still connected to logprobs. Masked responses (M = 0) add nothing, whatever their
    advantages and log-probs are. Raises ValueError for an unknown divisor or aggregation, whether a
    denominator is given or not, and for "constant" without max_tokens.
    """
    if divisor not in ("kept", "all") or aggregation not in ("response", "token", "constant"):
        raise ValueError(f"unknown divisor '{divisor}' or aggregation '{aggregation}'")
    if aggregation == "constant" and not max_tokens:
        raise ValueError("aggregation 'constant' needs max_tokens")
    if denominator is None:
        denominator = count_denominator(mask, kept, divisor=divisor, aggregation=aggregation,
                                        max_tokens=max_tokens).item()
    mask = mask & kept[:, None]  # (B, T)
    ratio = torch.where(mask, logprobs - old_logprobs, 0.0).exp()  # (B, T)
    advantage = advantages[:, None]  # (B, 1)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)  # (B, T)
    objective = torch.min(ratio * advantage, clipped * advantage)  # (B, T)
    if clip_dual:
        least = torch.where(advantage < 0, clip_dual * advantage, -math.inf)                # (B, 1)
        objective = torch.max(objective, least)                                             # (B, T)
    objective = torch.where(mask, objective, 0.0).sum(1)  # (B,)
    if aggregation == "response":
        objective = objective / mask.sum(1).clamp(min=1)
    if not denominator:
        return torch.where(mask, logprobs, 0.0).sum() * 0.0
    return -objective.sum() / denominator


# ---- Rollouts -----------------------------------------------------------------------------------


def is_unfinished(rollout, args):
    """The conversation did not end by itself (answer or void) but for lack of turns or context.
    --mask_void: nor does a turn that breaks off, at its token cap or without a call or an answer,
    count as an end. Whether unfinished ones are masked is another question: a penalty is for them,
    too."""
    lacking = ["over_turn", "over_context"] + ["void"] * args.mask_void
    return rollout.finish_reason in lacking


def is_kept(rollout, args):
    """M_i: the conversation is not masked. Without --overturn_mask none is, nor is any that was
    played to its end (outcome)."""
    masking = args.overturn_mask and args.baseline != "outcome"
    return not (masking and is_unfinished(rollout, args))


def read_sets(specs):
    """Question files, each "FILE" or "FILE:WEIGHT" (1 by default) -> (sets, weights). A set is a
    list of (question row, folder of its images)."""
    sets, weights = [], []
    for spec in specs:
        name, colon, weight = spec.rpartition(":")
        if not colon or Path(spec).exists():
            name, weight = spec, "1"
        try:
            weights.append(float(weight))
        except ValueError:
            weights.append(math.nan)
        tools.check(0 < weights[-1] < math.inf, f"--data {spec}: '{weight}' is not a positive "
                   "number; write FILE or FILE:WEIGHT")
        rows = tools.read_questions(Path(name), "python build_data.py")
        sets.append([(row, Path(name).parent) for row in rows])
    return sets, weights


def pick_questions(sizes, weights, places, total, seed, step, attempt):
    """Questions for some of the `total` places of a step: [(set, index in it)]. A place's set is
    drawn by weight. A set's questions come in an order drawn for the step, in which every place of
    every attempt has a number of its own: none comes twice in a step as long as the set lasts.
    Depends on (seed, step, attempt) and the place only."""
    rng = np.random.default_rng([seed, step, attempt])
    which = rng.choice(len(sizes), size=total, p=np.array(weights) / sum(weights))
    rng = np.random.default_rng([seed, step])
    orders, picked = [rng.permutation(size) for size in sizes], []
    for place in places:
        order = orders[which[place]]
        picked.append((int(which[place]), int(order[(attempt * total + place) % len(order)])))
    return picked


def truncate_rollout(rollout, turns):
    """What is trained on of a conversation that was played beyond the training cap: a copy with its
    first `turns` turns and their tokens, with what came of them in the end. One that is no longer
    stays as it is. Images are cut again from the turns."""
    if len(rollout.turns) <= turns:
        return rollout
    ends = [t for t in range(1, len(rollout.token_ids)) if rollout.loss_mask[t - 1] and not rollout.loss_mask[t]]
    mask = rollout.loss_mask[:ends[turns - 1]]       # ends: the first token that is not the policy's
    return replace(rollout, token_ids=rollout.token_ids[:len(mask)], loss_mask=mask, turns=rollout.turns[:turns],
                   logprobs=rollout.logprobs[:sum(mask)])


def assign_advantages(parts, args, paid):
    """Groups of finished conversations, P lists of G -> the same, as they are trained on: each with
    its A', cut at the training cap. paid: the baseline of group_advantages."""
    # a sample that the judge could not score leaves no signal
    rewards = torch.tensor([[math.nan if r.reward is None else r.reward for r in part]
                            for part in parts], dtype=torch.float64)                     # (P, G)
    kept = torch.tensor([[is_kept(r, args) for r in part] for part in parts])
    unfinished = torch.tensor([[is_unfinished(r, args) for r in part] for part in parts])
    rewards -= args.overturn_penalty * unfinished                                        # (P, G)
    advantages = group_advantages(rewards, kept, paid).tolist()
    return [[replace(truncate_rollout(r, args.max_turns), advantage=a) for r, a in zip(*group)]
            for group in zip(parts, advantages)]


def collect_groups(engine, sets, weights, step, places, args, paid):
    """Play this rank's places of one step; paid: the baseline of group_advantages. Returns
    ({place: rollouts of the group, with their A'}, everything that was played, places left without
    signal). A group without signal gives its place to a fresh prompt, a bounded number of times."""
    groups, played = {}, []
    engine.key, total = (args.seed, step), args.prompts_per_step
    # anew in every step: a resumed run must repeat the rounding, too
    engine.drafts, engine.counts = evaluate.NgramProposer(), collections.Counter()
    for attempt in range(args.resample + 1):
        if not places:
            break
        picked = pick_questions([len(s) for s in sets], weights, places, total, args.seed, step, attempt)
        rows, roots = zip(*(sets[s][i] for s, i in picked))
        prompts = [attempt * total + place for place in places]
        rollouts = engine.run(rows, args.group_size, roots, prompts)
        played += rollouts
        parts = [rollouts[i:i + args.group_size] for i in range(0, len(rollouts), args.group_size)]  # P of G
        for place, part in zip(places, assign_advantages(parts, args, paid)):
            if any(r.advantage for r in part):
                groups[place] = part
        places = [place for place in places if place not in groups]
    engine.cache = None  # the update needs the memory
    return groups, played, places


def validate(engine, held_out, args, rank, world):
    """Play the held-out questions once, with at most --eval_turns turns. The random numbers are the
    same at every evaluation, so that scores of two checkpoints differ by the policy only. Returns
    (accuracy, accuracy of those conversations that were unfinished after --max_turns turns: what
    such a conversation is worth). Each is None if there is nothing to count, or if a judge left any
    unscored: what is scored without it are exact matches, so that the score would be too high."""
    training, mine = (engine.limits, engine.key), list(range(rank, len(held_out), world))
    engine.limits = replace(engine.limits, max_turns=args.eval_turns,
                            max_images=args.max_images or args.eval_turns)
    engine.key = (args.seed, 2**31)  # a step number that training never reaches
    rows, roots = zip(*(held_out[i] for i in mine)) if mine else ((), ())
    played = [(len(r.turns) > args.max_turns, math.nan if r.reward is None else r.reward)
              for r in engine.run(rows, 1, roots, mine)]
    engine.limits, engine.key = training
    engine.cache = None  # the update and saving need the memory
    late = [reward for longer, reward in played if longer]
    right, count, late_right = sft.all_reduce(
        [sum(reward for _, reward in played), len(late), sum(late)], engine.policy.device)
    return sft.finite_or_none(right / len(held_out)), sft.finite_or_none(late_right / count) if count else None


# ---- The update ---------------------------------------------------------------------------------


def encode_rollouts(policy, rollouts):
    """Conversations end to end, with the images that they saw, on the device (see sft.collate)."""
    return sft.collate(policy, [r.with_images(policy) for r in rollouts])


def response_mask(rollouts, device):
    """(B, T) bool: row i begins with as many 1s as conversation i has sampled tokens."""
    lengths = [len(r.logprobs) for r in rollouts]
    columns = torch.arange(max(lengths, default=0), device=device)                          # (T,)
    return columns < torch.tensor(lengths, dtype=torch.long, device=device)[:, None]


def compute_logprobs(policy, rollouts, batch):
    """Log-probs of the sampled tokens under the policy as it is now and as it was when they were
    sampled, response by response; batch: encode_rollouts of them. Returns (new (B, T), old (B, T),
    mask (B, T) bool)."""
    mask = response_mask(rollouts, policy.device)                                              # (B, T)
    new = sft.token_logprobs(policy, batch)                                                 # (N,)
    old = new.new_tensor([x for r in rollouts for x in r.logprobs])                         # (N,)
    empty = new.new_zeros(mask.shape)
    return empty.masked_scatter(mask, new), empty.masked_scatter(mask, old), mask


def balance_by_tokens(rollouts, places):
    """This rank's part of all ranks' conversations: about the same number of tokens on every rank,
    whoever played them, so that none waits long for the others. They are cut in the order of places
    and samples: most of a group, which shares an image, stays together. places: how many a step
    has. Every rank must call this."""
    # a fresh question of a place has the place's number plus a multiple of their count
    everybody = sorted(sft.all_gather_objects(rollouts), key=lambda r: (r.prompt % places, r.sample))
    lengths = np.array([len(r.token_ids) for r in everybody])
    middles = lengths.cumsum() - lengths / 2
    owners = middles * sft.world_size() // max(lengths.sum(), 1)
    return [r for r, owner in zip(everybody, owners) if owner == sft.get_rank()]


def mini_batches(groups, args, device):
    """The places with signal, on whichever rank, cut into mini-batches of about --mini_batch_size places
    each, equal to within one: a step in which few groups have signal takes fewer optimizer steps,
    not noisier ones. groups: this rank's, by place. Every rank must call this."""
    flags = sft.all_reduce([place in groups for place in range(args.prompts_per_step)], device)
    places = [place for place, here in enumerate(flags) if here]
    return np.array_split(places, max(1, round(len(places) / args.mini_batch_size)))


def update_policy(policy, optimizer, rollouts, args, lr):
    """One optimizer step on one mini-batch; rollouts: those that this rank played, with their A'.
    Returns (sums for the log, largest |log ratio| of a token, gradient norm). Without signal on any
    rank there is no step, which would move the weights by momentum alone; the norm is then None."""
    kept = torch.tensor([is_kept(r, args) for r in rollouts], dtype=torch.bool)   # (B,)
    how = {"divisor": args.divisor, "aggregation": args.aggregation,
           "max_tokens": args.max_new_tokens * args.max_turns}
    counted = count_denominator(response_mask(rollouts, "cpu"), kept, **how).item()
    denominator = sft.all_reduce([counted], policy.device)[0]
    sums = {"loss": 0.0, "logprob_diff": 0.0, "clipped": 0.0, "tokens": 0, "responses": 0}
    largest = [0.0]
    if not denominator:
        return sums, 0.0, None
    mine = balance_by_tokens([r for r in rollouts if r.advantage], args.prompts_per_step)
    micros = list(sft.micro_batches(mine, args.micro_batch_tokens))
    batches = sft.prefetch(partial(encode_rollouts, policy), micros)

    def loss_of(micro):     # backward asks once for each, in their order
        new, old, mask = compute_logprobs(policy, micro, next(batches))                       # (B, T)
        advantages = new.new_tensor([r.advantage for r in micro])                           # (B,)
        done = torch.ones_like(advantages, dtype=torch.bool)  # A' != 0 implies M = 1
        loss = grpo_loss(new, old, advantages, mask, done, clip_low=args.clip_low,
                         clip_high=args.clip_high, clip_dual=args.clip_dual,
                         denominator=denominator, **how)
        gap = (new.detach() - old)[mask]                                                    # (N,)
        ratio = gap.exp()
        largest.append(gap.abs().max().item())
        sums["loss"] += loss.item()
        sums["logprob_diff"] += gap.abs().sum().item()
        sums["clipped"] += ((ratio < 1 - args.clip_low) | (ratio > 1 + args.clip_high)).sum().item()
        sums["tokens"] += len(gap)
        sums["responses"] += len(micro)
        return loss

    optimizer.backward(micros, loss_of)
    healthy = math.isfinite(sft.all_reduce([sums["loss"]], policy.device)[0])
    return sums, max(largest), optimizer.step(lr, args.max_grad_norm, healthy)


def step_metrics(played, sums, largest, norms, silent, seconds, device, counts):
    """One row of metrics.jsonl, over all ranks (docs/metrics.md explains every metric)."""
    right = [r for r in played if r.reward == 1.0]
    own = {"num_rollouts": len(played), "unscored": sum(r.reward is None for r in played),
           "right": len(right), "turns": sum(len(r.turns) for r in played),
           "turns_right": sum(len(r.turns) for r in right),
           **{finish: sum(r.finish_reason == finish for r in played) for finish in evaluate.FINISH_REASONS},
           "sampled": sum(len(r.logprobs) for r in played), "silent": silent,
           **{name: counts[name] for name in evaluate.COUNTS}, **sums}
    total = dict(zip(own, sft.all_reduce(list(own.values()), device)))
    largest = sft.all_reduce([largest], device, torch.distributed.ReduceOp.MAX)[0]
    n, tokens = total["num_rollouts"], max(total["tokens"], 1)
    return {"reward": total["right"] / max(n - total["unscored"], 1),
            "unscored": total["unscored"] / n, "num_rollouts": int(n), "mean_turns": total["turns"] / n,
            "mean_turns_correct": total["turns_right"] / max(total["right"], 1),
            **{finish: total[finish] / n for finish in evaluate.FINISH_REASONS},
            "incorrect": (total["answer"] - total["right"] - total["unscored"]) / n,
            "num_sampled_tokens": int(total["sampled"]), "zero_variance_groups": int(total["silent"]),
            "num_trained_responses": int(total["responses"]), "loss": sft.finite_or_none(total["loss"]),
            "logprob_diff": sft.finite_or_none(total["logprob_diff"] / tokens),
            "max_log_ratio": sft.finite_or_none(largest), "clip_fraction": total["clipped"] / tokens,
            "grad_norm": sft.finite_or_none(sum(norms) / max(len(norms), 1)), "seconds_rollout": seconds[0],
            "seconds_update": seconds[1], **evaluate.drafting(total)}


# ---- The loop -----------------------------------------------------------------------------------


def learning_rate(step, args):
    """Of a step, counted from 0: rises over the first --warmup_ratio; with --anneal_lr it also falls,
    from --lr before the first step to 0 behind the last."""
    rate = args.lr * min(1.0, (step + 1) / max(1, round(args.warmup_ratio * args.steps)))
    return rate * (1 - step / args.steps) if args.anneal_lr else rate


def step_baseline(args, value):
    """The baseline of group_advantages in this step. value: what validate found, None
    before the first evaluation; 0 is a value."""
    # nothing is masked, or nothing known yet: an ordinary baseline, the group's mean
    if not args.overturn_mask or args.baseline == "outcome":
        return "group"
    if args.baseline == "estimate":
        return "group" if value is None else value
    return args.baseline


def train_step(policy, optimizer, engine, sets, weights, step, args, paid, rank, world):
    """rollouts -> advantages -> one optimizer step per mini-batch. Returns (metrics, groups of this
    rank)."""
    begin = time.time()
    places = list(range(rank, args.prompts_per_step, world))
    groups, played, silent = collect_groups(engine, sets, weights, step, places, args, paid)
    middle = time.time()
    totals, largest, norms = {}, 0.0, []
    lr = learning_rate(step, args)
    for places in mini_batches(groups, args, policy.device):
        share = [r for place in places for r in groups.get(place, [])]
        sums, gap, norm = update_policy(policy, optimizer, share, args, lr)
        largest = max(largest, gap)
        totals = {k: totals.get(k, 0) + v for k, v in sums.items()}
        norms += [norm] if norm is not None else []
    seconds = (middle - begin, time.time() - middle)
    measured = step_metrics(played, totals, largest, norms, len(silent), seconds, policy.device,
                       engine.counts)
    return {"step": step + 1, "lr": lr, **measured}, groups


def save_rollouts(out, step, groups, count=8):
    """A few whole conversations of a step as trajectory rows, with their advantages: read them,
    they say what is learned."""
    rows = [{**r.to_row(), "advantage": r.advantage}
            for place in sorted(groups) for r in groups[place]]
    tools.write_jsonl(Path(out) / "num_rollouts" / f"step_{step:05d}.jsonl", rows[:count])


def train(policy, sets, weights, held_out, args, rank, world):
    """The loop: a step -> now and then an evaluation, a dump, a checkpoint. The model in --out is
    the best one evaluated."""
    optimizer, start = sft.start_training(policy, args, args.freeze_vision, args.steps)
    turns = args.eval_turns if args.baseline == "outcome" else args.max_turns
    limits = evaluate.Limits(turns, args.max_images or turns, args.max_new_tokens,
                             args.max_model_len)
    judge = evaluate.make_judge(args, rank)
    engine = evaluate.Engine(policy, limits, args.max_num_seqs, judge=judge, draft=args.num_speculative_tokens)
    log = sft.open_log(args.out, start) if rank == 0 else None
    best, value = history(args.out) if start else (-1.0, None)
    bar = tools.progress_bar(range(start, args.steps), initial=start, total=args.steps,
                         disable=rank != 0, desc="rl")
    for step in bar:
        scores = {}
        if held_out and step == 0:
            scores["val_accuracy_initial"], value = validate(engine, held_out, args, rank, world)
        metrics, groups = train_step(policy, optimizer, engine, sets, weights, step, args,
                                     step_baseline(args, value), rank, world)
        if held_out and ((step + 1) % args.eval_every == 0 or step + 1 == args.steps):
            scores["val_accuracy"], latest = validate(engine, held_out, args, rank, world)
            value = value if latest is None else latest
            if scores["val_accuracy"] is not None and scores["val_accuracy"] >= best:
                best = scores["val_accuracy"]
                sft.export(policy, args.out)
        if rank == 0:
            metrics = {**metrics, **scores, "unfinished_accuracy": value}
            log.write(tools.json_line(metrics))
            log.flush()
            shown = {k: metrics.get(k) for k in ("reward", "over_turn", "incorrect", "val_accuracy")}
            bar.set_postfix_str(" ".join(f"{k} {v:.3f}" for k, v in shown.items() if v is not None),
                                refresh=False)
            if (step + 1) % args.dump_every == 0:
                save_rollouts(args.out, step + 1, groups)
        if sft.end_step(args, optimizer, step + 1, args.steps, policy.device):
            return
    if best < 0:    # nothing was evaluated
        sft.export(policy, args.out)
    if engine.judge:
        from extras.served import report_cost
        report_cost(engine.judge.client, policy.device, rank)


def history(out):
    """What a resumed run knows from metrics.jsonl: (the best score on the held-out questions, the
    last value of an unfinished conversation). All ranks wait until the file has been cut."""
    sft.barrier()   # until rank 0 has cut the file
    path = Path(out) / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_bytes().splitlines()]
    tools.check(lines, f"{path} is gone: without it --resume does not know the best model so far; "
               "start again without --resume")
    scores = [line["val_accuracy"] for line in lines if line.get("val_accuracy") is not None]
    return max(scores, default=-1.0), lines[-1]["unfinished_accuracy"]


def value_flag(text):
    """What --baseline may be: a word, or a number."""
    words = ("group", "completed", "estimate", "outcome")
    try:
        if text in words or math.isfinite(float(text)):
            return text if text in words else float(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"'{text}' is none of {', '.join(words)}, or a number")


def parse_args():
    parser = argparse.ArgumentParser(description="GRPO with over-turn masking.")
    group = parser.add_argument_group("model and data")
    add = group.add_argument
    add("--model", default="checkpoints/sft", help="local folder or hub id to start from")
    add("--data", nargs="+", default=["data/train_easy.jsonl"], metavar="FILE[:WEIGHT]",
        help="question files; a question's file is drawn by weight (default 1)")
    add("--out", type=Path, default=Path("checkpoints/rl"), help="folder for the trained model")
    sft.add_policy_flags(group)
    group = parser.add_argument_group("num_rollouts")
    add = group.add_argument
    add("--steps", type=int, default=12, help="RL steps")
    add("--prompts_per_step", type=int, default=24,
        help="P: questions per step over all processes (paper: 256)")
    add("--group_size", type=int, default=16, help="G: conversations per question (paper: 16)")
    add("--resample", type=int, default=1,
        help="how often a place without signal gets a fresh question")
    add("--max_turns", type=int, default=6,
        help="turns per conversation, the answer included (paper: 6)")
    evaluate.add_rollout_flags(group)
    evaluate.add_judge_flags(parser)
    group = parser.add_argument_group("loss")
    add = group.add_argument
    add("--overturn_mask", action=argparse.BooleanOptionalAction, default=True,
        help="mask conversations that ran out of turns or context; without: they count as wrong")
    add("--baseline", type=value_flag, default=0.5, metavar="VALUE",
        help="the baseline, which is what the mask pays for an unfinished conversation: a number, "
             "group (released code), completed, estimate (accuracy of such conversations among "
             "the held-out ones) or outcome (play on); without the mask nothing is paid, and the "
             "baseline is the group's mean")
    add("--mask_void", action="store_true",
        help="mask conversations in which a turn broke off, too; without: they count as wrong")
    add("--overturn_penalty", type=float, default=0.0,
        help="taken from the reward of an unfinished conversation (with --no-overturn_mask)")
    add("--divisor", default="kept", choices=["kept", "all"],
        help="what the loss is divided by")
    add("--aggregation", default="response", choices=["response", "token", "constant"],
        help="mean per response (paper), over tokens (DAPO), or by a constant length (Dr. GRPO)")
    add("--clip_low", type=float, default=0.2, help="ratio is clipped below 1 - this")
    add("--clip_high", type=float, default=0.3, help="ratio is clipped above 1 + this")
    add("--clip_dual", type=float, default=0.0,
        help="where the advantage is negative, a ratio counts as this at most, e.g. 3 (0: "
             "unbounded, as in the paper)")
    group = parser.add_argument_group("optimisation")
    add = group.add_argument
    add("--lr", type=float, default=2.5e-4, help="peak learning rate (paper: 1e-6)")
    add("--anneal_lr", action=argparse.BooleanOptionalAction, default=True,
        help="let the rate fall linearly to 0 over the run (paper: constant)")
    add("--warmup_ratio", type=float, default=0.25, help="fraction of steps with rising learning rate")
    add("--mini_batch_size", type=int, default=3,
        help="prompts with signal per optimizer step (paper: 32 of 256)")
    add("--micro_batch_tokens", type=int, default=4096, help="tokens per forward pass on one process")
    add("--freeze_vision", action=argparse.BooleanOptionalAction, default=True,
        help="do not train the vision tower and its projector, as in the cold start")
    sft.add_training_flags(group, weight_decay=0.0, save_every=10)
    add("--seed", type=int, default=0, help="questions of each step and draws of the samples")
    group = parser.add_argument_group("evaluation")
    add = group.add_argument
    add("--eval_every", type=int, default=6,
        help="steps between scores on questions held out from RL; --out keeps the best model (0: "
             "no evaluation, the last model is kept)")
    add("--eval_size", type=int, default=240, help="questions of --eval_data that are played")
    add("--eval_data", type=Path, default=Path("data/val.jsonl"),
        help="questions that no stage has seen")
    add("--eval_turns", type=int, default=32,
        help="turns per conversation in these evaluations: choose the checkpoint by the accuracy "
             "that counts in the end")
    add("--dump_every", type=int, default=4,
        help="steps between dumps of 8 conversations to --out/rollouts/")
    args = parser.parse_args()
    tools.check_number_flags(
        args, ["seed", "num_speculative_tokens", "resample", "clip_low", "clip_high", "clip_dual", "warmup_ratio",
               "weight_decay", "eval_every", "eval_size", "overturn_penalty"],
        free=["baseline"])
    tools.check(args.eval_every or args.baseline != "estimate",
               "--baseline estimate comes from the evaluations: set --eval_every above 0")
    tools.check(not (args.overturn_penalty and args.overturn_mask), "--overturn_penalty needs "
               "--no-overturn_mask: a masked conversation has no reward to take from")
    tools.check(not 0 < args.clip_dual <= 1,
               "--clip_dual must be above 1, where a ratio is, or 0 for none")
    tools.check(args.group_size >= 2,
               "--group_size must be at least 2: an advantage compares conversations about one question")
    return args


def main():
    args = parse_args()
    rank, world, device = sft.setup_distributed()
    tools.check(args.prompts_per_step >= world, f"--prompts_per_step {args.prompts_per_step} is "
               f"less than the number of processes {world}")
    sets, weights = read_sets(args.data)
    held_out = []
    if args.eval_every:
        rows = tools.read_questions(args.eval_data, "python build_data.py")[:args.eval_size]
        held_out = [(row, args.eval_data.parent) for row in rows]
    count = sum(map(len, sets))
    tools.check(count >= args.prompts_per_step, f"--data has {count} questions to train on, fewer "
               f"than --prompts_per_step {args.prompts_per_step}")
    prompts = tools.load_prompts(args.prompts)
    policy = sft.load_policy(args.model, device, args.dtype, prompts, args.min_pixels,
                             args.max_pixels, "python sft.py")
    args.out.mkdir(parents=True, exist_ok=True)
    if rank == 0:
        print(f"{count} questions to train on, {len(held_out)} held out; {world} process(es) on "
              f"{device.type}", flush=True)
    train(policy, sets, weights, held_out, args, rank, world)
    sft.close_distributed()


if __name__ == "__main__":
    tools.run(main)
