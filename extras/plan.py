"""Calculate what a run of rl.py needs: memory per GPU on 1 to 64 GPUs, disk and hours. Where a GPU
has too little memory, print which flags would help.

Only the model's configuration is read, no weights. The flags are those of rl.py, so that the
command of a run works here, too:

    python extras/plan.py --model Qwen/Qwen2.5-VL-7B-Instruct --micro_batch_tokens 32768 \\
        --max_model_len 32768 --optimizer adamw --gradient_checkpointing --shard_optimizer
"""

from typing import NamedTuple

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

import root  # noqa: F401
import evaluate
import rl
import sft
import tools
from extras import model_folder, terminal
from extras.lora import linear_layers, num_adapter_parameters

# an H100: bytes of memory, FLOP/s in bfloat16, bytes per second of memory
GPU_MEMORY = 80e9
GPU_FLOPS = 989e12
GPU_BANDWIDTH = 3.35e12
# seconds of a decoding pass in kernels that are too small to be limited by either: some 1,500 of
# 2.5 microseconds (counted; not measured)
SMALL_KERNELS = 0.004


def plan_memory(model, num_ranks, *, micro_batch_tokens, max_num_seqs, max_model_len,
                shard_optimizer, gradient_checkpointing=True, freeze_vision=False,
                rule="adamw", short_model_len=8192, lora_rank=0, chunk_size=None):
    """Return {name: bytes} on each of `num_ranks` processes. The model's tensors may be on the meta
    device.

    With N parameters of w bytes (N' of them trained), W ranks, T tokens per micro-batch, L layers
    (width D, queries Q, keys K, MLP ff), V ids in the vocabulary and F = 4 bytes (8 in float64).
    With adapters (lora_rank) these are trained instead: N' numbers, w = F from gradients on.
        weights       w N, and F N' for adapters
        gradients     F N' / W and three buckets in flight; not sharded: w N' + F N'
        optimizer     2 F N' (with rule "sgd" nothing) and, if w < F, F N' for master weights; / W
                      if sharded
        activations   gradient checkpointing: w T D L + those of one layer; without: those of L
                      layers. Those of one layer: w T times 7 D + 3 Q + 2 K + 4 ff, and 2 Q + 2 K
                      more where queries and keys are normalised (Qwen3-VL)
        logits        min(T, chunk_size) V (w + 3 F): projected, in float32, without suppressed ids,
                      normalised; chunk_size as in sft.token_logprobs
        vision        what the tower needs beyond that, see vision_memory
        KV cache      2 w L K max_num_seqs short_model_len (or max_model_len, if that is less),
                      freed before the update
        prefill       a forward pass over max_model_len tokens (the engine feeds no more images at
                      once), w times max(3 D + 3 Q + 4 K, 5 D + 3 ff) each, or the tower's if that
                      is more
    """
    w, F = value_sizes(model)
    vocab_size = model.lm_head.weight.shape[0]
    chunk_size = chunk_size or sft.positions_per_chunk(vocab_size)
    # 1. an update: the state of training, then the peak of one micro-batch
    gradients, optimizer = training_state(model, num_ranks, shard_optimizer, freeze_vision, rule,
                                          lora_rank)
    activations = text_activations(model, micro_batch_tokens, gradient_checkpointing)
    logits = min(micro_batch_tokens, chunk_size) * vocab_size * (w + 3 * F)
    vision_kept, vision_peak = vision_memory(model, micro_batch_tokens, gradient_checkpointing,
                                             freeze_vision)
    # 2. rollouts: the cache, and the peak of one forward pass; nothing is kept for a backward pass
    cache = cache_memory(model, max_num_seqs * min(short_model_len, max_model_len))
    _, vision_prefill = vision_memory(model, max_model_len, gradient_checkpointing, frozen=True)
    prefill = max(text_prefill(model, max_model_len), vision_prefill)
    return {"weights": weight_memory(model, lora_rank),
            "gradients": gradients,
            "optimizer": optimizer,
            "activations": activations,
            "logits": logits,
            # the tower's peak comes before or after the text's activations and logits exist
            "vision": max(vision_kept, vision_peak - activations - logits),
            "KV cache": cache,
            "prefill": prefill}


# The functions below calculate the lines of the table above, in its letters.


def weight_memory(model, lora_rank):
    """Return the bytes of the weights, and of the adapters beside them."""
    w, F = value_sizes(model)
    num_adapters = num_adapter_parameters(model, lora_rank) if lora_rank else 0
    return w * sum(p.numel() for p in model.parameters()) + F * num_adapters


def value_sizes(model):
    """Return (w, F): the bytes of a weight, and of a value of the optimizer's state."""
    w = model.lm_head.weight.element_size()
    return w, max(4, w)


class TextSizes(NamedTuple):
    """Sizes of the text model."""
    L: int      # layers
    D: int      # width
    Q: int      # width of all queries
    K: int      # width of all keys
    ff: int     # width of the MLP


def text_sizes(model):
    """Return the TextSizes of a model."""
    config = model.config.text_config
    return TextSizes(L=config.num_hidden_layers, D=config.hidden_size,
                     Q=sft.head_size(config) * config.num_attention_heads,
                     K=sft.head_size(config) * config.num_key_value_heads,
                     ff=config.intermediate_size)


def training_state(model, num_ranks, shard_optimizer, freeze_vision, rule, lora_rank):
    """Return the bytes of gradients, and of the optimizer."""
    frozen = set(model.model.visual.parameters()) if freeze_vision else set()
    trained = [p for p in model.parameters() if p not in frozen]
    num_trained = sum(p.numel() for p in trained)       # N'
    num_shards = num_ranks if shard_optimizer else 1
    w, F = value_sizes(model)
    if lora_rank:
        num_trained = num_adapter_parameters(model, lora_rank)
        w = F

    # 1. gradients: those that are summed over micro-batches, and those of the last backward pass
    if shard_optimizer and num_ranks > 1:
        buckets = sft.make_buckets(trained[::-1])
        largest_bucket = max(sum(p.numel() for p in bucket) for bucket in buckets)
        model_gradients = 3 * F * min(largest_bucket, num_trained)
    else:
        model_gradients = w * num_trained
    gradients = F * num_trained // num_shards + model_gradients

    # 2. two moments of AdamW, and the master weights of parameters that are not in float32
    bytes_per_parameter = 0 if rule == "sgd" else 2 * F
    if w < F:
        bytes_per_parameter += F
    return gradients, bytes_per_parameter * num_trained // num_shards


def text_activations(model, num_tokens, gradient_checkpointing):
    """Return the bytes that the text model keeps for the backward pass of a micro-batch."""
    L, D, Q, K, ff = text_sizes(model)
    w, _ = value_sizes(model)
    layer_width = 7 * D + 3 * Q + 2 * K + 4 * ff
    if hasattr(model.model.language_model.layers[0].self_attn, "q_norm"):
        layer_width += 2 * Q + 2 * K
    one_layer = w * num_tokens * layer_width
    if gradient_checkpointing:
        return w * num_tokens * D * L + one_layer
    return L * one_layer


def cache_memory(model, num_tokens):
    """Return the bytes of keys and values of this many tokens."""
    sizes = text_sizes(model)
    w, _ = value_sizes(model)
    return 2 * w * sizes.L * sizes.K * num_tokens


def text_prefill(model, num_tokens):
    """Return the peak of a text layer's forward pass without a backward pass, in bytes: in its
    attention or in its MLP."""
    _, D, Q, K, ff = text_sizes(model)
    w, _ = value_sizes(model)
    return w * num_tokens * max(3 * D + 3 * Q + 4 * K, 5 * D + 3 * ff)


def vision_memory(model, num_tokens, gradient_checkpointing, frozen):
    """Return the bytes of the vision tower's activations if all tokens are of images: (what is kept
    while the text's activations exist, the peak before or after that).

    P = 4 patches a token, width V, layers L, MLPs of n matrices and width ff, m mergers:
        trained       gradient checkpointing: w P V (L + 5 m) is kept; after the text's backward
                      pass that of one layer is added: w P (V L + 12 V + 2 n ff). Without, both are
                      w P L (12 V + (n + 1) ff)
        frozen        nothing is kept. A forward pass takes P max(10 w V + 4 F V, 3 w V + 3 w ff)
    """
    visual = model.model.visual
    config = model.config.vision_config
    w, F = value_sizes(model)
    P = num_tokens * config.spatial_merge_size**2
    V = config.hidden_size
    L = config.depth
    ff = config.intermediate_size
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
    rollout = plan["weights"] + plan["optimizer"] + only_rollout
    update = sum(plan.values()) - only_rollout
    return rollout, update


def fits(plan):
    """Return whether a plan fits on one GPU, with a tenth for the allocator's gaps and the
    libraries."""
    return 1.1 * max(phases(plan)) < GPU_MEMORY


def in_gb(num_bytes):
    """Return a number of bytes as a text in GB (1e9), below 0.1 GB with three decimals."""
    decimals = 1
    if 0 < num_bytes < 1e8:
        decimals = 3
    return f"{num_bytes / 1e9:.{decimals}f}"


def plan_seconds(model, args, num_ranks):
    """Return the seconds of one RL step on H100s, counted: matrix products at 40% of the GPU's
    FLOP/s, memory at 60% of its bandwidth.

    Conversations have a quarter of --max_model_len tokens, and an eighth of them is sampled. Every
    token (an image: 4 patches a token) goes through the model once during rollouts. The update
    costs 4 forward passes, one less without --gradient_checkpointing and one less with --lora
    (which needs no gradients of weights), and no more of a frozen tower than 1. A decoding pass
    (evaluate.DecodePass) reads the weights and the whole cache; its small kernels take as long
    however few bytes there are. Not counted: --resample, and ranks that wait for the slowest.
    """
    num_tokens = args.max_model_len / 4
    tower_params = sum(p.numel() for p in model.model.visual.parameters())
    text_params = sum(p.numel() for p in model.parameters()) - tower_params

    # 1. matrix products of one conversation: a forward pass in the rollout, the rest in the update
    text_passes = 1 + 4 - (not args.gradient_checkpointing) - (args.lora > 0)
    tower_passes = 2 if args.freeze_vision else text_passes
    flops = 2 * num_tokens * (text_passes * text_params + 4 * tower_passes * tower_params)

    # 2. bytes that one decoding pass reads
    num_columns = args.max_num_seqs * min(args.short_model_len, args.max_model_len)
    bytes_per_pass = 2 * (text_params + tower_params) + cache_memory(model, num_columns)

    # 3. seconds of this rank's conversations
    num_rollouts = args.prompts_per_step * args.group_size / num_ranks
    num_passes = num_rollouts / args.max_num_seqs * num_tokens / 8
    return (num_rollouts * flops / (0.4 * GPU_FLOPS)
            + num_passes * (SMALL_KERNELS + bytes_per_pass / (0.6 * GPU_BANDWIDTH)))


def read_model(path):
    """Return a model without weights (on the meta device) from a folder or hub id. Raise InputError
    if its configuration cannot be read or its family is not supported."""
    folder = model_folder.find(path, "python sft.py", files=["config.json"])
    try:
        sft.read_config(folder)
        with torch.device("meta"):
            return AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder),
                                                           dtype=torch.bfloat16)
    except (OSError, ValueError) as error:
        raise tools.InputError(f"cannot read the configuration of {path}: "
                               f"{tools.first_line(error)}") from None


def advise(model, num_ranks, flags):
    """Return one line about flags with which a run fits on the GPUs, "" if it fits already. Flags
    are changed one after the other, the mildest first, until it fits."""
    # 1. change flags of a copy
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
    # 2. say which
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
        "micro_batch_tokens", "max_num_seqs", "max_model_len", "short_model_len",
        "shard_optimizer", "gradient_checkpointing", "freeze_vision")}
    flags["rule"] = args.optimizer
    flags["lora_rank"] = args.lora

    # 1. memory
    rows = []
    advice = []
    for num_ranks in (1, 2, 4, 8, 64):
        plan = plan_memory(model, num_ranks, **flags)
        sizes = [in_gb(num_bytes) for num_bytes in (*plan.values(), *phases(plan))]
        rows.append([str(num_ranks), *sizes, "yes" if fits(plan) else "no"])
        advice.append(advise(model, num_ranks, flags))
    print(f"GB per GPU (1e9 bytes), bfloat16, {args.micro_batch_tokens} tokens per micro-batch, "
          f"{args.max_num_seqs} conversations of "
          f"{min(args.short_model_len, args.max_model_len)} at once")
    evaluate.print_rows(["GPUs", *plan, "rollout", "update", "fits 80 GB"], rows)
    for line in filter(None, advice):
        print(line)

    # 2. disk: unsharded, that is on one GPU
    plan = plan_memory(model, 1, **flags)
    exported = sum(p.nbytes for p in model.parameters())
    saved = plan["optimizer"]
    if args.lora:       # the master weights are the adapters; export merges them in float32
        saved += 4 * num_adapter_parameters(model, args.lora)
        exported += sum(2 * layer.weight.numel() for layer in linear_layers(model))
    print(f"disk: {in_gb(saved)} GB a checkpoint, {args.keep_checkpoints + 1} of them "
          f"during a save (--keep_checkpoints {args.keep_checkpoints}); "
          f"{in_gb(exported)} GB for the model in --out")

    # 3. time
    seconds = plan_seconds(model, args, 8)
    print(f"time on 8 H100: about {seconds / 60:.0f} minutes a step, "
          f"{seconds * args.steps * 8 / 3600:.0f} GPU-hours for --steps {args.steps}, if a "
          f"conversation has {args.max_model_len // 4} tokens (a quarter of --max_model_len), an "
          "eighth of them is sampled, and no group is played again")


DESCRIPTION = (
    "Calculate what a run of rl.py needs: memory per GPU, disk, hours. Every flag of rl.py is "
    "accepted, so that its command works here. What counts: --model, --micro_batch_tokens, "
    "--max_num_seqs, --max_model_len, --short_model_len, --shard_optimizer, "
    "--gradient_checkpointing, --freeze_vision, --optimizer, --lora, --keep_checkpoints, --steps, "
    "--prompts_per_step, --group_size.")

if __name__ == "__main__":
    terminal.run(lambda: print_plan(rl.parse_args(DESCRIPTION)))
