"""Evaluation: play questions with the policy, and report Avg@K accuracy over turn budgets.

This file introduces the rollout engine, which rl.py uses unchanged: many conversations at once in
the slots of one KV cache. A conversation keeps its cache over turns, so only new tokens are ever
fed; the question's image and prompt are encoded once and shared by the K samples of a question; a
finished conversation's slot is refilled at once.

What differs from a textbook sampling loop and from the Mini-o3 paper:
1. Token in, token out: sampled ids are appended as they are, with a mask and their log-probability;
   text is decoded only to be parsed. Image placeholders can never be sampled.
2. Each draw is a function of (seed, step, prompt, sample, position) and the logits, so a sample
   does not depend on what else is in the batch, on slots or on processes (beyond rounding).
3. Speculative decoding without a draft model and without an acceptance rule. What the policy tends
   to write is drafted from n-grams it wrote before, fed in one pass, and drawn again at every
   position; by (2) a draw that equals the draft is the very draw that decoding token by token would
   have made, and the first that differs is so too. Conversations are the same without drafts.
4. Accuracy at every turn budget T comes from one run with the largest budget: correct *and*
   finished within T turns. The policy is not told its budget, so its first T turns are the same.
5. The standard error is over questions: the K samples of a question are not independent.
6. A judge (--judge URL) is asked only where words alone cannot tell. A sample that it could not
   judge has no score: it is left out and counted, never wrong.

Commands:
    1 CPU          python evaluate.py
    2 CPU cores    torchrun --nproc_per_node=2 evaluate.py
    1 GPU          python evaluate.py --model checkpoints/rl --max_num_seqs 64
    8 GPUs         torchrun --nproc_per_node=8 evaluate.py --data data/visualprobe/hard.jsonl \\
                       --num_samples 32 --max_new_tokens 2048 --max_model_len 32768 --max_num_seqs 16
    2 nodes        torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d \\
                       --rdzv_endpoint=HOST:29500 evaluate.py ...
    a server       python evaluate.py --model http://localhost:8000/v1 --model_name NAME --max_num_seqs 16
    a page         python extras/report.py results/rl results/sft
"""

import argparse
import collections
import functools
import hashlib
import inspect
import itertools
import json
import math
import statistics
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

import sft
import tools

BUDGETS = [1, 2, 4, 6, 8, 12, 16, 24, 32]
FINISH_REASONS = ["answer", "void", "over_turn", "over_context"]

# ---- The rollout engine -------------------------------------------------------------------------


@dataclass
class Limits:
    """What ends a conversation. Turns and images are counts (the original is an image); tokens are
    per turn and in all."""
    max_turns: int = 32
    max_images: int = 32
    max_new_tokens: int = 96
    max_model_len: int = 4096


@dataclass
class Rollout(sft.Sequence):
    """One conversation while it is played and after. logprobs: one number per token the policy
    wrote, in order.

    fed: how many of ids are in the KV cache; next_position: M-RoPE position of ids[fed]; pending_image:
    an observation that was appended but not fed yet (a future, since it is cut into patches in the
    background). What was seen is let go of at the end. numbers: random numbers, the n-th one for
    the n-th token that the policy writes, however often that token is drawn.
    """
    row: dict = None
    system: str = ""
    prompt: int = 0
    sample: int = 0
    root: Path = None
    logprobs: list = field(default_factory=list)
    views: list = field(default_factory=list)
    turns: list = field(default_factory=list)
    finish_reason: str = None
    prediction: str = None
    reward: float = 0.0
    advantage: float = 0.0
    random: object = None
    numbers: list = field(default_factory=list)
    num_cached_tokens: int = 0
    next_position: int = 0
    pending_image: Future = None
    turn_start: int = 0
    job: tuple = None

    def uniform(self, count):
        """Random numbers for the next `count` tokens behind those that logprobs counts: a list of
        floats from 0 to 1, 1 excluded, drawn as float32 from `random` and kept in `numbers`."""
        at = len(self.logprobs)
        while len(self.numbers) < at + count:
            self.numbers += self.random.random(64, dtype=np.float32).tolist()
        return self.numbers[at:at + count]

    def to_row(self):
        """The trajectory row that is written to JSONL."""
        return {**tools.without_layout(self.row), "system": self.system, "turns": self.turns,
                "finish_reason": self.finish_reason, "prediction": self.prediction, "reward": self.reward,
                "teacher": "policy", "sample": self.sample}

    def score(self, judge=None):
        """Reward 1 if the answer is right, else 0. Where words alone cannot tell: the judge's
        verdict, a Future for now."""
        options = self.row.get("options")
        self.reward = float(tools.match_answer(self.prediction, self.row["answer"], options))
        if judge is not None and not self.reward and not tools.is_decided(self.prediction, options):
            self.reward = judge.submit(self.row["question"], self.row["answer"], self.prediction)

    def with_images(self, policy):
        """A copy with all images that were seen, cut again: kept, they would make memory grow with
        the number of rollouts."""
        image, shown = open_and_preprocess(policy, Path(self.root) / self.row["image"])
        views = tools.replay(self.to_row(), image)
        return replace(self, images=[shown, *policy.preprocess_images(views[1:])])


@functools.lru_cache(maxsize=1)     # the conversations of a group share one image
def open_and_preprocess(policy, path):
    """An image, and the copy of it that the model sees: (PIL image, (patches, grid))."""
    image = tools.open_image(path)
    return image, policy.preprocess_images([image])[0]


CHUNK = 8   # slots that attend in one call, each over as many columns as the longest of them has
LONG = 64   # a piece of more new tokens (a prompt, an observation) attends alone, and needs no mask


def plan_spans(pieces):
    """Cut slots with these numbers of new tokens into spans that attend in one call: a list of
    (first, last), last excluded. A slot joins the span of the one before it, unless that one has
    CHUNK slots, either piece is a LONG one (which is a span of its own), or they differ by more
    than 12 tokens, since all of a span is padded to its longest piece. Spans without a new token
    are left out."""
    spans = []
    for i, piece in enumerate(pieces):
        before = pieces[i - 1]  # of the first one: not asked for
        if (i > 0 and i - spans[-1][0] < CHUNK and max(piece, before) <= LONG
                and abs(piece - before) <= 12):
            spans[-1] = spans[-1][0], i + 1
        else:
            spans.append((i, i + 1))
    return [(first, last) for first, last in spans if max(pieces[first:last])]


def to_device(device, *arrays):
    """Arrays of integers as tensors on the device, in one copy: on a GPU every small one would cost
    as much as a layer."""
    arrays = [np.asarray(array) for array in arrays]
    flat = torch.from_numpy(np.concatenate([array.ravel() for array in arrays])).to(device)
    parts = flat.split([array.size for array in arrays])
    return [part.view(array.shape) for part, array in zip(parts, arrays)]


class SlotCache:
    """Keys and values of every slot, two tensors per layer: (slots, heads, length, D). Grows with
    the longest conversation.

    The model calls update() in every layer; the engine says beforehand, with at(), which slots and
    columns are written. Nothing is ever erased: a column is written anew, by a token that is kept,
    before any query may see it. What is attended to is cut into spans of neighbouring slots, so
    that nothing is copied and a short conversation is not charged for the longest one. The engine
    keeps conversations of similar length together.
    """

    def __init__(self, config, slots, dtype, device, longest):
        heads, width = config.num_key_value_heads, sft.head_size(config)
        self.slots, self.longest, self.share = slots, longest, config.num_attention_heads // heads
        # a GPU's allocator would keep what was outgrown, so there all of it is taken at once
        length = longest if torch.device(device).type == "cuda" else 256
        shape = slots, heads, length, width
        self.layers = [[torch.zeros(shape, dtype=dtype, device=device) for _ in "kv"]
                       for _ in range(config.num_hidden_layers)]

    def at(self, slots, fed, pieces, device):
        """Next forward: pieces[i] new tokens behind fed[i] old ones in slots[i], all N of them end
        to end in one row; slots are neighbours. Makes room, and keeps the (2, N) slots and columns
        of the tokens for update() in self.where. Returns what sft.attend_slots needs:
        padded (P,): which token stands where if pieces are padded to the longest of their span
        (token 0 where none does),
        back (N,): where among these P places the tokens are,
        spans: (first place, last place, width), a slice of slots, columns in use, and a mask
        (b, 1, w * H / K, length): 0 where a query sees, else -inf; rows of one place stand
        together. Of a LONG piece None: a large model's would take gigabytes.

        Two slots with 5 and 6 old tokens and pieces of 1 and 2, in one span, N = 3 and P = 4:
            token           0   1   2
            place       0   1   2   3       place 1 is padding
            padded      0   0   1   2       back = 0, 2, 3          slice(0, 2), 8 columns
            last seen   5   6   6   7       a query sees the columns up to its own
        """
        slots, fed, pieces = np.array(slots), np.array(fed), np.array(pieces)
        self.grow((fed + pieces).max())
        cuts, places = plan_spans(pieces.tolist()), []
        for first, last in cuts:
            slot, old, new = (a[first:last, None] for a in (slots, fed, pieces))  # (b, 1) each
            offset = np.arange(new.max())  # (width,)
            grid = np.broadcast_arrays(slot, old + offset, offset < new)  # (b, width) each
            places.append([array.ravel() for array in grid])
        slot, column, real = map(np.concatenate, zip(*places))  # (P,) each
        padded = np.where(real, real.cumsum() - 1, 0)  # a place of padding repeats the first token
        where = np.stack([slot[real], column[real]])  # (2, N)
        # a place has a row for each of the H / K queries that share a key head
        self.where, padded, back, seen = to_device(
            device, where, padded, real.nonzero()[0], column.repeat(self.share))
        keys = torch.arange((fed + pieces).max(), device=device)
        zero = torch.zeros((), dtype=self.layers[0][0].dtype, device=device)
        spans, place = [], 0
        for first, last in cuts:
            width, length = int(pieces[first:last].max()), int((fed + pieces)[first:last].max())
            end, mask = place + (last - first) * width, None
            if width <= LONG:
                rows = seen[place * self.share:end * self.share].view(-1, 1, width * self.share, 1)
                mask = torch.where(keys[:length] > rows, -math.inf, zero)
            both = slice(slots[first], slots[last - 1] + 1)
            spans.append(((place, end, width), both, length, mask))
            place = end
        return padded, back, spans

    def grow(self, need):
        """Make room for `need` columns."""
        have = self.layers[0][0].shape[2]
        if need > have:
            more = max(need - have, min(have // 2, self.longest - have))
            for layer in self.layers:  # one by one: old and new never exist whole side by side
                layer[:] = [torch.nn.functional.pad(t, (0, 0, 0, more)) for t in layer]

    def update(self, key, value, layer, *args, **kwargs):
        """key, value: (1, heads, N, D) of the new tokens. Returns the keys and values of all slots,
        of which spans are cut."""
        slots, columns = self.where
        for store, new in zip(self.layers[layer], (key, value)):
            store[slots, :, columns] = new[0].transpose(0, 1)  # (N, heads, D)
        return self.layers[layer]

    def read(self, slot, length):
        return [[t[slot, :, :length].clone() for t in layer] for layer in self.layers]

    def write(self, slot, saved):
        for layer, parts in zip(self.layers, saved):
            for store, part in zip(layer, parts):
                store[slot, :, :part.shape[1]] = part


class NgramProposer:
    """What the policy tends to write: for every n-gram of a conversation, one guess at what it
    writes next, and how often that was right lately. Whatever is in here, conversations are the
    same: a bad guess only costs time (see Engine.keep)."""

    def __init__(self, ngrams=(3, 6), most=200_000):
        self.ngrams, self.most, self.guesses = ngrams, most, {}

    def learn(self, ids, start):
        """Take in what the policy wrote: ids[start:]. For the n-gram in front of each, which may
        begin before start, shortest first: guesses[n-gram] = (token, rate), a moving average
        (weight 0.2, from 0.7 on) of how often it was right; at 0.3 or below this token replaces it.
        A longer n-gram is kept once a shorter one at its end was known before: what comes only once
        costs little. A table of more than `most` begins anew."""
        if len(self.guesses) > self.most:
            self.guesses.clear()  # bounds memory; what is common is soon known again
        for end in range(start, len(ids)):
            token = ids[end]
            for n in self.ngrams:
                context = tuple(ids[end - n:end])
                known = self.guesses.get(context)
                if known is None:
                    self.guesses[context] = token, 0.7
                    break
                guess, rate = known
                rate += 0.2 * ((guess == token) - rate)  # a moving average
                self.guesses[context] = (guess, rate) if rate > 0.3 else (token, 0.7)

    def after(self, ids, most, least=0.5):
        """A guess at what follows ids: a list of up to `most` tokens that are right together with a
        chance of at least `least`. A token's guess is that of the longest n-gram known, however
        often it is right. ids stay as they are."""
        ids, chance, draft = ids[-self.ngrams[-1]:], 1.0, []
        while len(draft) < most:
            guess, rate = None, 0.0
            for n in self.ngrams:
                known = self.guesses.get(tuple(ids[-n:]))
                if known is None:
                    break
                guess, rate = known
            chance *= rate
            if chance < least:
                break
            draft.append(guess)
            ids.append(guess)
        return draft


COUNTS = ["passes", "drafted", "accepted"]  # passes of one slot each; tokens


def drafting(counts):
    """What drafts have brought, from an engine's counts."""
    return {"mean_acceptance_length": 1 + counts["accepted"] / max(counts["passes"], 1),
            "acceptance_rate": counts["accepted"] / max(counts["drafted"], 1)}


class Engine:
    """Plays (row, prompt, sample) jobs to the end: fill the slots -> draft -> feed -> draw -> keep
    what agrees with the draft -> step the tool."""

    def __init__(self, policy, limits, slots=64, seed=0, step=0, greedy=False, judge=None, draft=4):
        self.policy, self.limits, self.greedy, self.judge = policy, limits, greedy, judge
        self.max_slots, self.key, self.cache = slots, (seed, step), None
        self.draft, self.drafts, self.counts = draft, NgramProposer(), collections.Counter()
        self.never = {*policy.suppressed_ids, *policy.stop_ids}  # not drafted: an image, what ends a turn
        # newer versions of transformers call it "cache", and swallow a name that they do not know
        known = inspect.signature(policy.model.model.forward).parameters
        self.cache_name = "cache" if "cache" in known else "past_key_values"
        self.loader = ThreadPoolExecutor(2)     # opens and resizes images while the model runs

    @torch.inference_mode()
    def run(self, rows, samples, root, prompts=None, bar=None):
        """Play every row `samples` times. prompts: a number per row that enters its random stream
        (default: its index). root: folder of the images, or one per row. Returns Rollouts ordered
        by row, then sample. Raises InputError if a prompt does not fit in max_model_len."""
        prompts = list(range(len(rows))) if prompts is None else prompts
        self.queue = collections.deque((i, s) for i in range(len(rows)) for s in range(samples))
        self.roots = root if isinstance(root, (list, tuple)) else [root] * len(rows)
        self.rows, self.prompts, self.bar = rows, prompts, bar
        self.slots, self.done, self.opened = [], {}, None
        self.ahead = {0: self.loader.submit(self.load, 0)} if rows else {}
        count = min(self.max_slots, len(self.queue))
        if self.cache is None or self.cache.slots < count:
            model = self.policy.model
            self.cache = SlotCache(model.config.text_config, count, model.dtype,
                                   self.policy.device, self.limits.max_model_len)
        training, _ = self.policy.model.training, self.policy.model.eval()
        while self.queue and len(self.slots) < self.max_slots:
            self.slots.append(None)
            self.start(len(self.slots) - 1)
        while self.slots:
            self.step()
        self.policy.model.train(training)
        return with_verdicts([self.done[key] for key in sorted(self.done)])

    def load(self, i):
        """Question i's image and the copy that the model sees."""
        return open_and_preprocess(self.policy, Path(self.roots[i]) / self.rows[i]["image"])

    def start(self, slot):
        """Put the next job into a slot. The prompt is encoded by the first sample of a question;
        the others copy its keys and values. The prompt's last token stays pending, so that the
        first draw is like every other."""
        i, sample = self.queue.popleft()
        if self.opened is None or self.opened[0] != i:
            image, shown = self.ahead.pop(i).result()
            if i + 1 < len(self.rows):
                self.ahead[i + 1] = self.loader.submit(self.load, i + 1)
            ids = self.policy.prompt_ids(self.rows[i], shown[1])
            turn, most = self.limits.max_new_tokens, self.limits.max_model_len
            tools.check(len(ids) + turn <= most, f"question {self.rows[i]['id']}: prompt "
                       f"({len(ids)} tokens) and one turn ({turn}) do not fit in --max_model_len "
                       f"{most}: raise it or lower --max_pixels")
            self.slots[slot] = Rollout()
            _, after = self.forward([slot], [ids[:-1]], [shown])
            self.opened = (i, image, ids, self.cache.read(slot, len(ids) - 1), after[0])
        _, image, ids, saved, position = self.opened
        self.cache.write(slot, saved)
        self.slots[slot] = Rollout(
            token_ids=list(ids), loss_mask=[False] * len(ids), row=self.rows[i], root=self.roots[i],
            system=tools.system_text(self.rows[i], self.policy.prompts), prompt=self.prompts[i],
            sample=sample, views=[image], num_cached_tokens=len(ids) - 1, next_position=position,
            turn_start=len(ids), job=(i, sample),
            random=np.random.default_rng([*self.key, self.prompts[i], sample]))

    def step(self):
        """Feed what is pending in every slot and a draft behind it, draw at the last pending token
        and at every token of the draft, and keep what agrees. Slots with an image to come feed
        nothing until it is their turn."""
        fed_images = self.images_to_feed()
        drafts = [None if r.pending_image and i not in fed_images else self.guess(r)
                  for i, r in enumerate(self.slots)]
        pieces = [[] if d is None else r.token_ids[r.num_cached_tokens:] + d for r, d in zip(self.slots, drafts)]
        images = [r.pending_image.result()[0] if i in fed_images else None
                  for i, r in enumerate(self.slots)]
        draws = [0 if d is None else len(d) + 1 for d in drafts]
        fed = sum(d is not None for d in drafts)
        self.counts.update(passes=fed, drafted=sum(draws) - fed)
        logprobs, after = self.forward(range(len(pieces)), pieces, images, draws)  # (M, V)
        ids, scores = self.draw(logprobs, [r.uniform(n) for r, n in zip(self.slots, draws)])
        at, ended = 0, []
        for i, (r, draft) in enumerate(zip(self.slots, drafts)):
            if draft is not None:
                r.pending_image = None
                end = at + len(draft) + 1
                if self.keep(r, draft, ids[at:end], scores[at:end], after[i]):
                    self.step_tool(r)
                    if r.finish_reason is not None:
                        ended.append(i)
                at = end
        for slot in reversed(ended):  # from the back: moving the last slot into a hole is correct
            self.retire(slot)

    def images_to_feed(self):
        """The slots whose images are fed now: all that wait when they are a quarter of the slots, a
        batch worth its overhead, but no more than max_model_len tokens, which bounds the memory."""
        waiting = [i for i, r in enumerate(self.slots) if r.pending_image]
        if 4 * len(waiting) < len(self.slots):
            return []
        ends = itertools.accumulate(len(r.token_ids) - r.num_cached_tokens for r in (self.slots[i] for i in waiting))
        return [i for i, end in zip(waiting, ends) if end <= self.limits.max_model_len]

    def guess(self, r):
        """What to draft behind a conversation: at most `draft` tokens, never the last token of a
        turn or beyond, since what comes then is not written by the policy, and nothing from the
        first token on that is in `never`."""
        left = self.limits.max_new_tokens - (len(r.token_ids) - r.turn_start)
        draft = self.drafts.after(r.token_ids, min(self.draft, left - 1)) if self.draft else []
        return list(itertools.takewhile(lambda token: token not in self.never, draft))

    def forward(self, slots, pieces, images, draws=None):
        """Run the model on a piece of token ids per slot, behind what the slot's cache holds
        already. Slots are neighbours. Pieces lie end to end in one row of N tokens, without
        padding.

        images: (patches, grid) or None per slot; draws: how many of the last tokens of each piece
        are followed by a draw (default: one). Returns (log-probs behind these (M, V), position
        behind each piece)."""
        rollouts, device = [self.slots[i] for i in slots], self.policy.device
        where = np.tile([r.next_position + i for r, piece in zip(rollouts, pieces)
                         for i in range(len(piece))], (3, 1, 1))  # (3, 1, N)
        after = [r.next_position + len(piece) for r, piece in zip(rollouts, pieces)]
        ends, pixels = list(itertools.accumulate(map(len, pieces))), {}
        for j, image in enumerate(images):
            if image is not None:
                where[:, 0, ends[j] - len(pieces[j]):ends[j]], after[j] = sft.mrope_positions(
                    pieces[j], [image[1]], self.policy.image_token_id, self.policy.merge_size,
                    rollouts[j].next_position)
        if any(image is not None for image in images):
            pixels = {"pixel_values": torch.cat([i[0] for i in images if i]).to(device),
                      "image_grid_thw": torch.tensor([i[1] for i in images if i], device=device)}
        spans = self.cache.at(slots, [r.num_cached_tokens for r in rollouts], list(map(len, pieces)), device)
        drawn = [i for end, n in zip(ends, draws or [1] * len(ends)) for i in range(end - n, end)]
        # (1, N), (3, 1, N), (M,)
        ids, where, drawn = to_device(device, [sum(pieces, [])], where, drawn)
        hidden = self.policy.model.model(  # a 4-D mask keeps the library from making one
            input_ids=ids, position_ids=where, attention_mask=torch.zeros(1, 1, 1, 1),
            use_cache=True, spans=spans, **{self.cache_name: self.cache},
            **pixels).last_hidden_state[0]
        return sft.vocab_logprobs(self.policy, hidden[drawn]), after

    def draw(self, logprobs, numbers):
        """A token from each row of log-probs (M, V), by inverting its cumulative distribution at
        the conversation's own random number; the likeliest one if `greedy`. numbers: a list of them
        for each slot, M in all. Returns (ids, log-probs of these), two lists."""
        if self.greedy:
            ids = logprobs.argmax(-1)
        else:
            u = torch.tensor(sum(numbers, []), dtype=torch.float64, device=logprobs.device)[:, None]
            total = logprobs.exp().cumsum(-1, dtype=torch.float64)  # (M, V)
            # the first id whose cumulative mass exceeds u: never a banned one
            ids = (total <= u * total[:, -1:]).sum(-1)
        scores = logprobs.gather(-1, ids[:, None])[:, 0]
        ids, scores = torch.stack([ids.double(), scores.double()]).tolist()
        return list(map(int, ids)), scores

    def keep(self, r, draft, ids, scores, after):
        """ids[n] was drawn behind n tokens of the draft: it counts if these are what was drawn
        before it. So the first that differs from the draft is the last to count. What was fed
        beyond it is forgotten: the next tokens take its columns of the cache. Appends what counts
        to the conversation, counts drafts that were right in `accepted`, lets the drafts learn what
        is new, and moves fed and next_position; after: the position behind all that was fed.
        Returns whether the turn is over: it is full, or ends in any token of policy.stop_ids."""
        right = next((n for n, token in enumerate(draft) if token != ids[n]), len(draft))
        wrong = len(draft) - right
        r.next_position = after - wrong
        r.num_cached_tokens = len(r.token_ids) + right
        r.add(ids[:right + 1], True)
        r.logprobs += scores[:right + 1]
        if self.draft:
            self.drafts.learn(r.token_ids, len(r.token_ids) - right - 1)
        self.counts["accepted"] += right
        full = len(r.token_ids) - r.turn_start >= self.limits.max_new_tokens
        return full or ids[right] in self.policy.stop_ids

    def step_tool(self, r):
        """A turn is complete: parse it, zoom, and append what the tool returned, or say in
        r.finish_reason why the conversation is over."""
        limits, written = self.limits, r.token_ids[r.turn_start:]
        stopped = written[-1] in self.policy.stop_ids
        text = self.policy.tokenizer.decode(written[:-1] if stopped else written,
                                            skip_special_tokens=False)
        if stopped:
            turn, r.finish_reason, r.prediction = tools.take_turn(
                r.views, text, len(r.turns) + 1, limits.max_turns, limits.max_images)
        else:
            turn, r.finish_reason = {"text": text}, "void"  # hit the per-turn token cap
        r.turns.append(turn)
        if r.finish_reason is None:
            self.append_observation(r)

    def append_observation(self, r):
        """Append what the tool returned to a conversation, unless it would not fit: then it ends
        as over_context."""
        zoomed = "zoom" in r.turns[-1]
        grid = self.policy.image_grid(r.views[-1]) if zoomed else None
        ids = self.policy.tool_message_ids(r.turns[-1], len(r.turns), len(r.views) - 1, grid)
        if len(r.token_ids) + len(ids) + self.limits.max_new_tokens > self.limits.max_model_len:
            r.finish_reason = "over_context"
            return
        r.add(ids, False)
        r.pending_image = self.loader.submit(self.policy.preprocess_images, r.views[-1:]) if zoomed else None
        r.turn_start = len(r.token_ids)

    def retire(self, slot):
        """Score a finished conversation and fill its slot. Long conversations stand in front, so
        that a chunk, which attends over as many columns as its longest one has, holds equally long
        ones: every chunk behind the free slot hands its longest forward, and the new conversation
        begins in the last. With chunks of two and these lengths, when the second one has ended:
            9 _ | 5 7 | 1 3    ->    9 7 | 5 3 | 1 _
        Without a new one the slots close up."""
        r = self.slots[slot]
        r.score(self.judge)
        self.done[r.job], r.views, r.numbers = r, [], []
        if self.bar is not None:
            self.bar.update()
        last = len(self.slots) - 1
        for first in range((slot // CHUNK + 1) * CHUNK, last + 1, CHUNK):
            chunk = range(first, min(first + CHUNK, last + 1))
            slot = self.move(max(chunk, key=lambda i: self.slots[i].num_cached_tokens), slot)
        if self.queue:
            self.start(slot)
        else:
            self.move(last, slot)
            self.slots.pop()

    def move(self, slot, hole):
        """Move a conversation into a free slot, or leave it. Returns the slot that is free then."""
        if slot != hole:
            self.cache.write(hole, self.cache.read(slot, self.slots[slot].num_cached_tokens))
            self.slots[hole] = self.slots[slot]
        return slot


def with_verdicts(rollouts):
    """Waits for the judge's verdicts."""
    for r in rollouts:
        r.reward = r.reward.result() if isinstance(r.reward, Future) else r.reward
    return rollouts


def add_judge_flags(parser):
    group = parser.add_argument_group("judge")
    group.add_argument("--judge", help="URL of an OpenAI-compatible server that is asked whether "
                       "other words mean the same (its key in JUDGE_API_KEY; verdicts are kept in "
                       "--out). Default: normalised words only")
    group.add_argument("--judge_model", help="name of the judge on that server")


# ---- Scores -------------------------------------------------------------------------------------


def mean_and_error(values):
    """Mean over questions and its standard error: s / sqrt(Q), s the unbiased deviation."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return statistics.fmean(values), error


def group_by(items, key):
    """{key(item): [items]}, in the order of their first appearance."""
    groups = collections.defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return groups


def accuracy_per_question(rows, budget):
    """{question: share of its scored samples that are right and finished within `budget` turns};
    a question without any is left out."""
    scored = group_by((row for row in rows if row["reward"] is not None), lambda row: row["id"])
    return {ident: statistics.fmean(r["reward"] == 1.0 and len(r["turns"]) <= budget for r in part)
            for ident, part in scored.items()}


def avg_at_k(rows, budget):
    """Avg@K at a turn budget: the share of samples that are correct and finished within `budget`
    turns, first per question, then over questions. rows: trajectory rows of one level. Returns
    (mean, standard error). HR-Bench asks a question in several cycles, its options in another order
    each: where rows have a `cycle`, the score is the mean over cycles of the mean over a cycle's
    questions, and the forms of a question, which share an image, are one for the error."""
    shares = accuracy_per_question(rows, budget)
    mean, error = mean_and_error(list(shares.values()))
    if any("cycle" in row for row in rows):
        asked = {row["id"]: row for row in rows if row["id"] in shares}.values()

        def means(key):
            return [statistics.fmean(shares[row["id"]] for row in part)
                    for part in group_by(asked, lambda row: row.get(key)).values()]

        mean, error = statistics.fmean(means("cycle")), mean_and_error(means("image"))[1]
    return mean, error


def pass_rates(rows, budget):
    """One row per question for build_data.py --filter: its id and the share of its samples that are
    correct. A question with an unscored sample is left out: what is scored first are exact matches,
    so that its rate would be too high."""
    counts = collections.Counter(row["id"] for row in rows)
    unscored = {row["id"] for row in rows if row["reward"] is None}
    return [{"id": ident, "pass_rate": rate, "samples": counts[ident]}
            for ident, rate in accuracy_per_question(rows, budget).items() if ident not in unscored]


def summarise(levels, budgets):
    """{level: trajectory rows} -> one dict per level: accuracy and standard error per budget, mean
    turns, finish shares; at the largest budget also the accuracy per category, where questions have
    one. Raises InputError if nothing in a level is scored."""
    table = {}
    for level, rows in levels.items():
        scored = [r for r in rows if r["reward"] is not None]
        tools.check(scored, f"{level}: no sample has a score, since the server gave no usable "
                   "replies; see that it answers and run the same command again")
        correct = [len(r["turns"]) for r in rows if r["reward"] == 1.0]
        categories = group_by((r for r in scored if "category" in r), lambda r: r["category"])
        sources = {r.get("source") for r in rows}
        accuracy = {str(b): avg_at_k(rows, b) for b in budgets}
        table[level] = {
            "benchmark": sources.pop() if len(sources) == 1 else None,
            "questions": len({r["id"] for r in rows}), "samples": len(rows),
            "unscored": len(rows) - len(scored),
            "categories": {name: avg_at_k(part, budgets[-1])
                           for name, part in sorted(categories.items())},
            "accuracy": {b: mean for b, (mean, _) in accuracy.items()},
            "standard_error": {b: error for b, (_, error) in accuracy.items()},
            "mean_turns": statistics.fmean(len(r["turns"]) for r in rows if r["turns"]),
            "mean_turns_correct": statistics.fmean(correct) if correct else None,
            "finish_reason": {f: sum(r["finish_reason"] == f for r in rows) / len(rows) for f in FINISH_REASONS}}
    if len(table) > 1:  # levels weigh the same; their errors are independent
        parts = list(table.values())
        table["mean"] = {
            "accuracy": {b: statistics.fmean(t["accuracy"][b] for t in parts) for b in accuracy},
            "standard_error": {b: math.sqrt(sum(t["standard_error"][b] ** 2 for t in parts))
                               / len(parts) for b in accuracy}}
    return table


def print_rows(head, rows):
    """A Markdown table of texts."""
    for cells in [head, ["---"] * len(head), *rows]:
        print("| " + " | ".join(cells) + " |")


def percent(mean, error):
    return f"{100 * mean:.1f} ({100 * error:.1f})"


def print_table(table, budgets, samples):
    """Accuracy over turn budgets as a Markdown table, in percent, with the standard error; by
    category, where there are some, at the largest."""
    print(f"Avg@{samples} in % (standard error) when at most T turns are allowed")
    rows = []
    for level, t in table.items():
        cells = [percent(t["accuracy"][str(b)], t["standard_error"][str(b)]) for b in budgets]
        played = [""] * (1 + len(FINISH_REASONS))
        if "finish_reason" in t:
            right = f" ({t['mean_turns_correct']:.1f})" if t["mean_turns_correct"] else ""
            shares = (f"{100 * t['finish_reason'][f]:.1f}" for f in FINISH_REASONS)
            played = [f"{t['mean_turns']:.1f}{right}", *shares]
        rows.append([level, *cells, *played])
    print_rows(["level", *(f"T={b}" for b in budgets), "turns (correct)", *FINISH_REASONS], rows)
    for level, t in table.items():
        if t.get("unscored"):
            print(f"{level}: {t['unscored']} of {t['samples']} samples have no score, since a "
                  "server gave no usable reply, and are left out; what is left flatters (words "
                  "that match need no judge). Run the same command to ask once more")
        if t.get("categories"):
            print()
            print_rows([f"{level}, T={budgets[-1]}", "% (standard error)"],
                       [[category, percent(*found)] for category, found in t["categories"].items()])


# ---- The command --------------------------------------------------------------------------------


def play_level(engine, path, rows, settings, args, rank, world):
    """All questions of one file, `samples` times each, shared out over ranks. What an interrupted
    run with the same settings has finished is not played again, whatever its number of processes.
    Returns (all trajectory rows in order, pattern of the names of its partial files)."""
    digest = hashlib.sha256(json.dumps([path.stem, settings, rows]).encode()).hexdigest()[:8]
    journal = tools.Journal(args.out / f"partial.{digest}.{rank}.jsonl",
                            args.out.glob(f"partial.{digest}.*.jsonl"))
    sft.barrier()  # everybody has read before anybody adds
    played = {(r["id"], r["sample"]): r for r in journal.rows if r["reward"] is not None}
    samples = collections.Counter(ident for ident, _ in played)
    todo = [i for i, row in enumerate(rows) if samples[row["id"]] < args.num_samples]
    mine, new = todo[rank::world], []
    chunk = max(1, 4 * args.max_num_seqs // args.num_samples)  # questions between two saves
    with tools.progress_bar(total=len(mine) * args.num_samples, disable=rank != 0, desc=path.stem) as bar:
        for part in (mine[at:at + chunk] for at in range(0, len(mine), chunk)):
            done = engine.run([rows[i] for i in part], args.num_samples, path.parent, part, bar)
            finished = [r.to_row() for r in done]
            journal.add(*finished)
            new += finished
    for row in sft.all_gather_objects(new):
        if row["reward"] is not None or (row["id"], row["sample"]) not in played:
            played[row["id"], row["sample"]] = row
    every = [played[row["id"], sample] for row in rows for sample in range(args.num_samples)]
    return every, f"partial.{digest}.*.jsonl"


def add_rollout_flags(group):
    """The flags that say how the engine plays."""
    add = group.add_argument
    add("--max_images", type=int, help="images per conversation, the original included (default: "
        "the turn cap)")
    add("--max_new_tokens", type=int, default=96, help="a longer turn ends as void")
    add("--max_model_len", type=int, default=4096, help="tokens per conversation (paper: 32768; not "
        "of a server)")
    add("--max_num_seqs", type=int, default=64, help="conversations, or requests to a server, at once on "
        "one process")
    add("--num_speculative_tokens", type=int, default=4, help="most tokens that are drafted ahead in a pass and "
        "then checked; the conversations do not depend on it (0: none)")


def parse_args():
    parser = argparse.ArgumentParser(description="Avg@K over turn budgets.")
    group = parser.add_argument_group("what is evaluated")
    add = group.add_argument
    add("--model", default="checkpoints/rl", help="local folder, hub id, or the URL of an "
        "OpenAI-compatible server (its key in the environment variable MODEL_API_KEY; it is sent "
        "40,000 to 2,000,000 pixels by default)")
    add("--model_name", help="name of the model on that server")
    add("--data", type=Path, nargs="+", help="question files, one level each",
        default=[Path(f"data/{level}.jsonl") for level in ("easy", "medium", "hard")])
    add("--out", type=Path, help="folder for tables and trajectories (default: results/<name>)")
    add("--limit", type=int, help="use only the first questions of each file")
    sft.add_policy_flags(group)
    add("--max_image_bytes", type=int, default=1_500_000, help="largest picture that is sent to a "
        "server, in bytes; larger ones become JPEG, and smaller")
    group = parser.add_argument_group("how it is played")
    add = group.add_argument
    add("--num_samples", type=int, default=4, help="K: samples per question, at temperature 1")
    add("--greedy", action="store_true", help="take the most likely token (use with --num_samples 1)")
    add("--budgets", type=int, nargs="+", default=BUDGETS, help="turns; the most are played")
    add_rollout_flags(group)
    add("--seed", type=int, default=0, help="random numbers of the samples")
    add_judge_flags(parser)
    args = parser.parse_args()
    tools.check_number_flags(args, ["seed", "num_speculative_tokens"])
    args.budgets = sorted(set(args.budgets))
    tools.check(args.budgets[0] >= 1, "--budgets must be at least 1")
    levels = [path.stem for path in args.data]
    tools.check(len({*levels, "mean"}) > len(levels), "--data: file names are the names of levels; "
               "they must differ, and none may be 'mean'")
    args.served = args.model.startswith(("http://", "https://"))
    name = (args.model_name or "served") if args.served else Path(args.model).name
    args.out = args.out or Path("results") / name
    written = {(args.out / f"{level}.jsonl").resolve() for level in levels}
    tools.check(not written & {path.resolve() for path in args.data},
               f"--out {args.out} would overwrite the questions in --data; choose another folder")
    return args


def make_judge(args, rank):
    """The judge that --judge names, or None."""
    if not args.judge:
        return None
    from extras.served import ChatClient, Judge
    client = ChatClient(args.judge, args.judge_model, "judge", timeout=60.0)
    return Judge(client, args.out, rank)


def make_player(args, prompts, rank, device):
    """What plays the questions: an Engine around a policy, or a served model."""
    turns, judge = max(args.budgets), make_judge(args, rank)
    limits = Limits(turns, args.max_images or turns, args.max_new_tokens, args.max_model_len)
    if args.served:
        from extras.served import ChatClient, Served
        client = ChatClient(args.model, args.model_name, "model", args.min_pixels or 40_000,
                                  args.max_pixels or 2_000_000, args.max_image_bytes)
        return Served(client, prompts, limits, args.max_num_seqs, args.seed, judge, args.greedy)
    policy = sft.load_policy(args.model, device, args.dtype, prompts, args.min_pixels,
                             args.max_pixels, "torchrun --nproc_per_node=2 rl.py (or name another "
                             "with --model)")
    return Engine(policy, limits, args.max_num_seqs, args.seed, greedy=args.greedy, judge=judge,
                  draft=args.num_speculative_tokens)


def write_results(levels, engine, args):
    """Print the tables; write table.json, trajectories and pass rates."""
    table = summarise(levels, args.budgets)
    print_table(table, args.budgets, args.num_samples)
    for level, rows in levels.items():
        rates = pass_rates(rows, args.budgets[-1])
        tools.write_jsonl(args.out / f"{level}.jsonl", rows)
        tools.write_jsonl(args.out / f"{level}.rates.jsonl", rates)
    text = json.dumps(table, indent=1) + "\n"
    tools.write_atomic(args.out / "table.json", lambda file: file.write(text.encode()))
    if not args.served and engine.counts["passes"]:
        print("drafts: {mean_acceptance_length:.2f} tokens per pass, {acceptance_rate:.0%} of drafted "
              "tokens accepted".format(**drafting(engine.counts)))
    files = ", ".join(f"{level}.jsonl, {level}.rates.jsonl" for level in levels)
    print(f"written to {args.out}/: table.json, {files}")


def main():
    args = parse_args()
    rank, world, device = sft.setup_distributed()
    prompts = tools.load_prompts(args.prompts)
    engine = make_player(args, prompts, rank, device)
    irrelevant = ("data", "slots", "draft", "out")
    settings = {k: str(v) for k, v in vars(args).items() if k not in irrelevant}
    weights = Path(args.model) / "model.safetensors"    # trained anew: what was played is void
    settings.update(prompts=prompts, weights=weights.exists() and weights.stat().st_mtime)
    questions = {path: tools.read_questions(path, "python build_data.py")[:args.limit]
                 for path in args.data}
    for path, rows in questions.items():
        tools.check(rows, f"{path} has no rows")
    found = {path.stem: play_level(engine, path, rows, settings, args, rank, world)
             for path, rows in questions.items()}
    levels = {level: rows for level, (rows, _) in found.items()}
    if rank == 0:
        write_results(levels, engine, args)
    if args.served:
        from extras.served import report_cost
        report_cost(engine.client, device, rank)
    if engine.judge:
        from extras.served import report_cost
        report_cost(engine.judge.client, device, rank)
    sft.barrier()  # the table is written: nothing is left to go on with, but what has no score
    for rows, pattern in found.values() if rank == 0 else ():
        if all(row["reward"] is not None for row in rows):
            for path in args.out.glob(pattern):
                path.unlink()
    sft.close_distributed()


if __name__ == "__main__":
    tools.run(main)
