"""Calculate what a run of rl.py needs: memory per GPU on 1 to 64 of them, with advice where that is
too much; disk; hours. Only the model's configuration is read. The flags are those of
the run, that is, of rl.py:

    python extras/plan.py --model Qwen/Qwen2.5-VL-7B-Instruct --micro_batch_tokens 32768 \\
        --max_model_len 32768 --max_num_seqs 16 --gradient_checkpointing --shard_optimizer
"""

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

import root  # noqa: F401
import evaluate
import rl
import sft
import tools

# an H100: bytes of memory, FLOP/s in bfloat16, bytes per second of memory
GPU_MEMORY = 80e9
GPU_FLOPS = 989e12
GPU_BANDWIDTH = 3.35e12


def plan_memory(model, num_ranks, *, micro_batch_tokens, max_num_seqs, max_model_len,
                shard_optimizer, gradient_checkpointing=True, freeze_vision=False,
                chunk_size=4096):
    """Return {part: bytes} on each of `num_ranks` processes. The model's tensors may be on the meta
    device.

    With N parameters of w bytes (N' of them trained), W ranks, T tokens per micro-batch, L layers
    (width D, queries Q, keys K, MLP ff), V ids in the vocabulary and F = 4 bytes (8 in float64):
        weights       w N
        gradients     F N' / W and three buckets in flight; not sharded: w N' + F N'
        optimizer     2 F N' and, if w < F, F N' for master weights; / W if sharded
        activations   gradient checkpointing: w T D L + one layer's own; without: L layers' own. One
                      layer's own: w T times 7 D + 3 Q + 2 K + 4 ff, and 2 Q + 2 K more where
                      queries and keys are normalised (Qwen3-VL)
        logits        min(T, chunk_size) V (w + 3 F): projected, in float32, without suppressed ids,
                      normalised
        vision        what the tower needs beyond that, see vision_memory
        KV cache      2 w L K max_num_seqs max_model_len, freed before the update
        prefill       a forward pass over max_model_len tokens (the engine feeds no more images at
                      once), w times max(3 D + 3 Q + 4 K, 5 D + 3 ff) each, or the tower's if that
                      is more
    """
    # 1. parameters: N, N', w, F, W
    frozen = set(model.model.visual.parameters()) if freeze_vision else set()
    trained = [p for p in model.parameters() if p not in frozen]
    num_params = sum(p.numel() for p in model.parameters())
    num_trained = sum(p.numel() for p in trained)
    head = model.lm_head.weight     # (V, D)
    w = head.element_size()
    F = max(4, w)
    num_shards = num_ranks if shard_optimizer else 1

    # 2. gradients and the optimizer's state
    buckets = sft.make_buckets(trained[::-1])
    largest_bucket = max(sum(p.numel() for p in bucket) for bucket in buckets)
    if shard_optimizer and num_ranks > 1:
        model_gradients = 3 * F * largest_bucket
    else:
        model_gradients = w * num_trained
    optimizer_bytes = 2 * F
    if w < F:
        optimizer_bytes += F

    # 3. the text model's activations, and the logits
    text = model.config.text_config
    L, D, ff = text.num_hidden_layers, text.hidden_size, text.intermediate_size
    Q = sft.head_size(text) * text.num_attention_heads
    K = sft.head_size(text) * text.num_key_value_heads
    layer_width = 7 * D + 3 * Q + 2 * K + 4 * ff
    if hasattr(model.model.language_model.layers[0].self_attn, "q_norm"):
        layer_width += 2 * Q + 2 * K
    layer = w * micro_batch_tokens * layer_width
    activations = L * layer
    if gradient_checkpointing:
        activations = w * micro_batch_tokens * D * L + layer
    logits = min(micro_batch_tokens, chunk_size) * head.shape[0] * (w + 3 * F)

    # 4. the vision tower, and rollouts
    vision_kept, vision_peak = vision_memory(model, micro_batch_tokens, gradient_checkpointing,
                                             freeze_vision)
    text_prefill = w * max_model_len * max(3 * D + 3 * Q + 4 * K, 5 * D + 3 * ff)
    _, vision_prefill = vision_memory(model, max_model_len, gradient_checkpointing, frozen=True)

    return {"weights": w * num_params,
            "gradients": F * num_trained // num_shards + model_gradients,
            "optimizer": optimizer_bytes * num_trained // num_shards,
            "activations": activations,
            "logits": logits,
            "vision": max(vision_kept, vision_peak - activations - logits),
            "KV cache": 2 * w * L * K * max_num_seqs * max_model_len,
            "prefill": max(text_prefill, vision_prefill)}


def vision_memory(model, num_tokens, gradient_checkpointing, frozen):
    """Return bytes of the vision tower's activations if all tokens are of images: (what is kept
    while the text's activations exist, the peak before or after that).

    P = 4 patches a token, width V, layers L, MLPs of n matrices and width ff, m mergers:
        trained       gradient checkpointing: w P V (L + 5 m) is kept; after the text's backward one
                      layer's own is added: w P (V L + 12 V + 2 n ff). Without, both are
                      w P L (12 V + (n + 1) ff)
        frozen        nothing is kept. A forward pass takes P max(10 w V + 4 F V, 3 w V + 3 w ff)
    """
    visual = model.model.visual
    config = model.config.vision_config
    w = model.lm_head.weight.element_size()
    F = max(4, w)
    P = num_tokens * config.spatial_merge_size**2
    V, L, ff = config.hidden_size, config.depth, config.intermediate_size
    if frozen:
        return 0, P * max((10 * w + 4 * F) * V, 3 * w * (V + ff))
    n = sum(isinstance(module, torch.nn.Linear) for module in visual.blocks[0].mlp.modules())
    if not gradient_checkpointing:
        every_layer = w * P * L * (12 * V + (n + 1) * ff)
        return every_layer, every_layer
    num_mergers = 1 + len(getattr(visual, "deepstack_merger_list", []))
    return w * P * V * (L + 5 * num_mergers), w * P * (V * L + 12 * V + 2 * n * ff)


def phases(plan):
    """Return the bytes held during rollouts and during an update."""
    only_rollout = plan["KV cache"] + plan["prefill"]
    return plan["weights"] + plan["optimizer"] + only_rollout, sum(plan.values()) - only_rollout


def fits(plan):
    """Return whether a plan fits on one GPU, with a tenth for the allocator's gaps and the
    libraries."""
    return 1.1 * max(phases(plan)) < GPU_MEMORY


def in_gb(num_bytes):
    """Return bytes as a text in GB (1e9), below 0.1 GB with three decimals."""
    decimals = 1
    if 0 < num_bytes < 1e8:
        decimals = 3
    return f"{num_bytes / 1e9:.{decimals}f}"


def plan_seconds(model, args, num_ranks):
    """Return the seconds of one RL step on H100s, counted: matrix products at 40% of the GPU's
    FLOP/s, memory at 60% of its bandwidth.

    Conversations have half of --max_model_len tokens, and an eighth of them is sampled. Every token
    (an image: 4 patches a token) goes through the model once during rollouts. The update costs 4
    forward passes, 3 without --gradient_checkpointing, and no more of a frozen tower than 1. A
    decoding pass reads the weights and the cache of all conversations.
    """
    num_tokens = args.max_model_len / 2
    tower_params = sum(p.numel() for p in model.model.visual.parameters())
    text_params = sum(p.numel() for p in model.parameters()) - tower_params

    # 1. matrix products of one conversation: a forward pass in the rollout, the rest in the update
    text_passes = 1 + (4 if args.gradient_checkpointing else 3)
    tower_passes = 2 if args.freeze_vision else text_passes
    flops = 2 * num_tokens * (text_passes * text_params + 4 * tower_passes * tower_params)

    # 2. bytes that one decoding pass reads; a conversation is half as long on average
    token_cache = plan_memory(model, 1, micro_batch_tokens=1, max_num_seqs=1, max_model_len=1,
                              shard_optimizer=False)["KV cache"]
    bytes_per_pass = (2 * (text_params + tower_params)
                      + args.max_num_seqs * token_cache * num_tokens / 2)

    # 3. seconds of this rank's conversations
    num_rollouts = args.prompts_per_step * args.group_size / num_ranks
    num_passes = num_rollouts / args.max_num_seqs * num_tokens / 8
    return (num_rollouts * flops / (0.4 * GPU_FLOPS)
            + num_passes * bytes_per_pass / (0.6 * GPU_BANDWIDTH))


def read_model(path):
    """Return a model without weights (on the meta device) from a folder or hub id. Raise InputError
    if its configuration cannot be read or its family is not supported."""
    try:
        sft.read_config(path)
        with torch.device("meta"):
            return AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(path),
                                                           dtype=torch.bfloat16)
    except (OSError, ValueError) as error:
        raise tools.InputError(f"cannot read the configuration of {path}: "
                               f"{tools.first_line(error)}") from None


def advise(model, num_ranks, flags):
    """Return one line about flags with which a run fits on the GPUs, "" if it fits already. Flags
    are changed one after the other, the mildest first, until it fits."""
    changes = {"gradient_checkpointing": True, "shard_optimizer": True,
               "max_num_seqs": max(1, flags["max_num_seqs"] // 4),
               "micro_batch_tokens": max(1, flags["micro_batch_tokens"] // 4),
               "freeze_vision": True}
    flags = dict(flags)
    plan = plan_memory(model, num_ranks, **flags)
    added = ""
    for flag, value in changes.items():
        if not fits(plan) and flags[flag] != value:
            flags[flag] = value
            added += f" --{flag}" if value is True else f" --{flag} {value}"
            plan = plan_memory(model, num_ranks, **flags)
    if not added:
        return ""
    if fits(plan):
        return f"{num_ranks} GPU(s): fits with{added}"
    return f"{num_ranks} GPU(s): does not fit with any of these flags: use more GPUs"


def print_plan(args):
    """Print what a run with these flags needs per GPU on 1, 2, 4, 8 and 64 of them, with advice
    where that is too much; then disk and time."""
    model = read_model(args.model)
    flags = {name: getattr(args, name) for name in (
        "micro_batch_tokens", "max_num_seqs", "max_model_len", "shard_optimizer",
        "gradient_checkpointing", "freeze_vision")}

    # 1. memory
    rows = []
    advice = []
    for num_ranks in (1, 2, 4, 8, 64):
        plan = plan_memory(model, num_ranks, **flags)
        sizes = [in_gb(num_bytes) for num_bytes in (*plan.values(), *phases(plan))]
        rows.append([str(num_ranks), *sizes, "yes" if fits(plan) else "no"])
        advice.append(advise(model, num_ranks, flags))
    print(f"GB per GPU (1e9 bytes), bfloat16, {args.micro_batch_tokens} tokens per micro-batch, "
          f"{args.max_num_seqs} conversations of {args.max_model_len} at once")
    evaluate.print_rows(["GPUs", *plan, "rollout", "update", "fits 80 GB"], rows)
    for line in filter(None, advice):
        print(line)

    # 2. disk: unsharded, that is on one GPU
    plan = plan_memory(model, 1, **flags)
    print(f"disk: {in_gb(plan['optimizer'])} GB a checkpoint, {args.keep_checkpoints + 1} of them "
          f"during a save (--keep_checkpoints {args.keep_checkpoints}); "
          f"{in_gb(plan['weights'])} GB for the model in --out")

    # 3. time
    seconds = plan_seconds(model, args, 8)
    print(f"time on 8 H100: about {seconds / 60:.0f} minutes a step, "
          f"{seconds * args.steps * 8 / 3600:.0f} GPU-hours for --steps {args.steps}, if a "
          f"conversation has {args.max_model_len // 2} tokens (half of --max_model_len) and an "
          "eighth of them is sampled")


DESCRIPTION = "Calculate what a run of rl.py with these flags needs: memory per GPU, disk, hours."

if __name__ == "__main__":
    tools.run(lambda: print_plan(rl.parse_args(DESCRIPTION)))
