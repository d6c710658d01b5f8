"""What a run of rl.py needs, counted on paper: memory per GPU on 1 to 64 of them, with advice where
it is too much; disk; hours. From the model's configuration alone, with the flags of the run:

    python extras/plan.py --model Qwen/Qwen2.5-VL-7B-Instruct --micro_batch_tokens 32768 --max_model_len 32768 \\
        --max_num_seqs 16 --gradient_checkpointing --shard_optimizer
"""

import sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

import root  # noqa: F401
import evaluate
import rl
import sft
import tools


def plan_memory(model, ranks, *, tokens, slots, max_model_len, shard_optimizer, checkpointing=True,
                freeze_vision=False, chunk=4096):
    """Bytes on each of `ranks` processes, from a model whose tensors may be on the meta device.
    Returns {part: bytes}.

    With N parameters of w bytes (N' of them trained), W ranks, T tokens per micro-batch, L layers
    (width D, queries Q, keys K, MLP ff), V ids in the vocabulary and F = 4 bytes (8 in float64):
        weights       w N
        gradients     F N' / W and three buckets under way; not sharded: w N' + F N'
        optimizer     2 F N' and, if w < F, F N' for master weights; / W if sharded
        activations   checkpointing: w T D L + one layer's own; without: L layers' own. One layer's
                      own: w T times 7 D + 3 Q + 2 K + 4 ff, and 2 Q + 2 K more where queries and
                      keys are normalised (Qwen3-VL)
        logits        min(T, chunk) V (w + 3 F): projected, widened, without banned ids, normalised
        vision        what the tower needs beyond that, see vision_memory
        KV cache      2 w L K slots max_model_len, given back before the update
        prefill       a forward pass over max_model_len tokens (Engine feeds no more images at once),
                      w times max(3 D + 3 Q + 4 K, 5 D + 3 ff) each, or the tower's if that is more
    """
    text, head = model.config.text_config, model.lm_head.weight
    frozen = set(model.model.visual.parameters()) if freeze_vision else set()
    trained = [p for p in model.parameters() if p not in frozen]
    N, own = sum(p.numel() for p in model.parameters()), sum(p.numel() for p in trained)
    w = head.element_size()
    F, W = max(4, w), ranks if shard_optimizer else 1
    L, D, ff = text.num_hidden_layers, text.hidden_size, text.intermediate_size
    d = sft.head_size(text)
    Q, K = d * text.num_attention_heads, d * text.num_key_value_heads
    norms = 2 * hasattr(model.model.language_model.layers[0].self_attn, "q_norm")
    layer = w * tokens * (7 * D + (3 + norms) * Q + (2 + norms) * K + 4 * ff)
    flying = 3 * F * max(sum(p.numel() for p in bucket) for bucket in sft.make_buckets(trained[::-1]))
    activations = w * tokens * D * L + layer if checkpointing else L * layer
    logits = min(tokens, chunk) * head.shape[0] * (w + 3 * F)
    kept, peak = vision_memory(model, tokens, checkpointing, freeze_vision)
    prefill = w * max_model_len * max(3 * D + 3 * Q + 4 * K, 5 * D + 3 * ff)
    return {"weights": w * N,
            "gradients": F * own // W + (flying if shard_optimizer and ranks > 1 else w * own),
            "optimizer": (2 * F + (F if w < F else 0)) * own // W,
            "activations": activations,
            "logits": logits,
            "vision": max(kept, peak - activations - logits),
            "KV cache": 2 * w * L * K * slots * max_model_len,
            "prefill": max(prefill, vision_memory(model, max_model_len, checkpointing, True)[1])}


def vision_memory(model, tokens, checkpointing, frozen):
    """Bytes of the vision tower's activations if all tokens are of images: (what is kept while the
    text's are there, what there is at the most before or after that).

    P = 4 patches a token, width V, layers L, MLPs of n matrices and width ff, m mergers:
        trained       kept: w P V (L + 5 m), checkpointing; after the text's backward, one layer's
                      own: w P (V L + 12 V + 2 n ff). Without, both: w P L (12 V + (n + 1) ff)
        frozen        nothing is kept. A forward pass takes P max(10 w V + 4 F V, 3 w V + 3 w ff)
    """
    visual, config = model.model.visual, model.config.vision_config
    w, patches = model.lm_head.weight.element_size(), tokens * config.spatial_merge_size**2
    V, L, ff = config.hidden_size, config.depth, config.intermediate_size
    if frozen:
        return 0, patches * max((10 * w + 4 * max(4, w)) * V, 3 * w * (V + ff))
    n = sum(isinstance(part, torch.nn.Linear) for part in visual.blocks[0].mlp.modules())
    mergers = 1 + len(getattr(visual, "deepstack_merger_list", []))
    if checkpointing:
        return w * patches * V * (L + 5 * mergers), w * patches * (V * L + 12 * V + 2 * n * ff)
    return (w * patches * L * (12 * V + (n + 1) * ff),) * 2


def phases(plan):
    """Bytes held during rollouts and during an update."""
    rollout = plan["KV cache"] + plan["prefill"]
    return plan["weights"] + plan["optimizer"] + rollout, sum(plan.values()) - rollout


def fits(plan, gigabytes=80.0):
    """With a tenth for the allocator's gaps and the libraries."""
    return 1.1 * max(phases(plan)) < gigabytes * 1e9


def in_gb(size):
    """Bytes as GB (1e9), the tiny model's with three decimals."""
    return f"{size / 1e9:.{1 if size >= 1e8 or not size else 3}f}"


def print_plan(args):
    """What a run with these flags needs per GPU on 1, 2, 4, 8 and 64 of them, as a table; where
    that is too much, the first of a few sets of flags, from mild to hard, with which it fits."""
    try:
        sft.check_family(args.model)
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(
                AutoConfig.from_pretrained(args.model), dtype=torch.bfloat16)
    except (OSError, ValueError) as error:
        raise tools.InputError(f"cannot read the configuration of {args.model}: "
                               f"{str(error).splitlines()[0]}") from None
    flags = {"shard_optimizer": args.shard_optimizer, "checkpointing": args.gradient_checkpointing,
             "slots": args.max_num_seqs, "tokens": args.micro_batch_tokens, "freeze_vision": args.freeze_vision,
             "max_model_len": args.max_model_len}
    milder = {"checkpointing": True, "shard_optimizer": True, "slots": max(1, args.max_num_seqs // 4),
              "tokens": max(1, args.micro_batch_tokens // 4), "freeze_vision": True}
    plans = {ranks: plan_memory(model, ranks, **flags) for ranks in (1, 2, 4, 8, 64)}
    rows, advice = [], []
    for ranks, plan in plans.items():
        sizes = [in_gb(size) for size in (*plan.values(), *phases(plan))]
        rows.append([str(ranks), *sizes, "yes" if fits(plan) else "no"])
        have, extra = dict(flags), ""
        for flag, value in milder.items():
            if not fits(plan) and have[flag] != value:
                have[flag] = value
                extra += f" --{flag}" if value is True else f" --{flag} {value}"
                plan = plan_memory(model, ranks, **have)
        if extra:
            advice.append(f"{ranks} GPU(s): " + (f"fits with{extra}" if fits(plan) else "does not "
                          "fit with any of these flags: use more GPUs"))
    print(f"GB per GPU (1e9 bytes), bfloat16, {args.micro_batch_tokens} tokens per micro-batch, {args.max_num_seqs} "
          f"slots of {args.max_model_len}")
    evaluate.print_rows(["GPUs", *plans[1], "rollout", "update", "fits 80 GB"], rows)
    for line in advice:
        print(line)
    seconds = plan_seconds(model, args, 8)
    print(f"disk: {in_gb(plans[1]['optimizer'])} GB a checkpoint, {args.keep + 1} of them "
          f"during a save (--keep {args.keep}); {in_gb(plans[1]['weights'])} GB for the model "
          "in --out")
    print(f"time on 8 H100: about {seconds / 60:.0f} minutes a step, "
          f"{seconds * args.steps * 8 / 3600:.0f} GPU-hours for --steps {args.steps}, if a "
          f"conversation has {args.max_model_len // 2} tokens (half of --max_model_len) and an eighth "
          "of them is sampled")


def plan_seconds(model, args, ranks):
    """Seconds of one RL step on H100s, by counting: matrix products at 40% of 989 TFLOP/s, memory
    at 60% of 3.35 TB/s. Every token (an image: 4 patches a token) goes through the model once when
    it is fed; the update takes 4 forward passes, 3 without --gradient_checkpointing, but 1 of a frozen
    tower. A pass of decoding reads the weights and the cache of all slots."""
    tokens, tower = args.max_model_len / 2, sum(p.numel() for p in model.model.visual.parameters())
    text = sum(p.numel() for p in model.parameters()) - tower
    passes = 1 + (4 if args.gradient_checkpointing else 3)
    each = 2 * tokens * (passes * text + 4 * (2 if args.freeze_vision else passes) * tower)  # FLOPs
    cache = plan_memory(model, 1, tokens=1, slots=1, max_model_len=1,
                        shard_optimizer=False)["KV cache"]  # of one token
    read = 2 * (text + tower) + args.max_num_seqs * cache * tokens / 2  # bytes a pass
    mine = args.prompts_per_step * args.group_size / ranks
    decoding = mine / args.max_num_seqs * tokens / 8 * read / (0.6 * 3.35e12)
    return mine * each / (0.4 * 989e12) + decoding


if __name__ == "__main__":
    tools.run(lambda: print_plan(rl.parse_args()))
