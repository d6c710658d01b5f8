"""What only a GPU can show. Skipped where there is no CUDA; `pytest -s tests/test_gpu.py` prints
what it measures.

One GPU is enough: collectives then run over NCCL with a single rank.
"""

import gc
import json
import math
import shutil

import pytest
import torch
from PIL import Image

import evaluate
import rl
import sft
import tools
from extras.plan import phases, plan_memory
from support.launch import run_script
from support.models import largest_difference, wide
from test_rl import update_args

DEVICE = "cuda"
BACKEND = "nccl"
LIMITS = evaluate.Limits(max_turns=6, max_images=6, max_new_tokens=80, max_model_len=1200)
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with CUDA")


# ---- Sampler and trainer ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, mean, largest", [
    ("float32", 1e-4, 1e-2), ("bfloat16", 0.02, 1.0)])
def test_sampler_and_trainer_agree(trained_folder, prompts, world, dtype, mean, largest):
    """Log-probs that the sampler recorded against the trainer's own: other kernels, other shapes.
    In bfloat16 they differ by rounding, which the ratio of the loss corrects. 2% on average is
    little compared with its clip at 20 to 30%."""
    policy = sft.load_policy(str(trained_folder), DEVICE, dtype, prompts)
    rows = tools.read_jsonl(world / "train.jsonl")[:4]
    rollouts = evaluate.Engine(policy, LIMITS, 16).run(rows, 8, world)
    with torch.no_grad():
        logprobs, old_logprobs, mask = rl.compute_logprobs(
            policy, rollouts, rl.encode_rollouts(policy, rollouts))
    differences = (logprobs - old_logprobs)[mask].abs()
    print(f"{dtype}: sampler and trainer differ by {differences.mean():.2e} on average, "
          f"{differences.max():.2e} at most, over {len(differences)} tokens")
    assert differences.mean() < mean
    assert differences.max() < largest


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_graphs_replay_what_the_pass_computes(trained_folder, prompts, world, monkeypatch, dtype):
    """Decoding steps as CUDA graphs and run eagerly: the same conversations and log-probs, bit for
    bit, since the kernels are the same. Two sizes of graphs are recorded."""
    policy = sft.load_policy(str(trained_folder), DEVICE, dtype, prompts)
    rows = tools.read_jsonl(world / "train.jsonl")[:4]
    monkeypatch.setattr(evaluate, "MIN_GRAPH_COLUMNS", 256)
    engine = evaluate.Engine(policy, LIMITS, 16)
    replayed = engine.run(rows, 8, world)
    assert len(engine.decode_pass.graphs) >= 2
    monkeypatch.setattr(evaluate.DecodePass, "replay", evaluate.DecodePass.body)
    eager = evaluate.Engine(policy, LIMITS, 16).run(rows, 8, world)
    assert [r.token_ids for r in replayed] == [r.token_ids for r in eager]
    assert [r.logprobs for r in replayed] == [r.logprobs for r in eager]


def test_conversations_do_not_depend_on_slots(trained_folder, prompts, world):
    """In float32 almost every conversation is the same in 3 slots and in 16. Rounding changes a
    sampled token now and then; a wrong mask would change nearly all."""
    policy = sft.load_policy(str(trained_folder), DEVICE, "float32", prompts)
    rows = tools.read_jsonl(world / "train.jsonl")[:4]
    few = evaluate.Engine(policy, LIMITS, max_num_seqs=3).run(rows, 8, world)
    many = evaluate.Engine(policy, LIMITS, max_num_seqs=16).run(rows, 8, world)
    num_same = sum(a.token_ids == b.token_ids for a, b in zip(few, many))
    print(f"{num_same} of {len(few)} conversations are the same in 3 slots and in 16")
    assert num_same >= 0.8 * len(few)


# ---- The sharded optimizer ----------------------------------------------------------------------


SHARDED = """
import json, torch, torch.distributed as dist
import sft
process = sft.setup_distributed()
if process.world_size == 1:
    dist.init_process_group({backend!r}, init_method="tcp://localhost:{port}", rank=0, world_size=1)
weights = []
for shard in (True, False):
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape).to(process.device))
              for shape in ((300, 101), (77,), (64, 200))]
    optimizer = sft.Optimizer(params, 1e-3, 0.1, shard=shard, megabytes=0.05)
    optimizer.is_sharded = shard        # a single rank sends its gradients, too, to itself
    for step in range(2):
        torch.manual_seed(1000 * step + process.rank)
        factors = [torch.randn(p.shape).to(process.device) for p in params]
        optimizer.backward([0, 1], lambda _: sum((p * f).sum() for p, f in zip(params, factors)))
        norm = optimizer.step(1e-3, 1.0)
    weights.append(torch.cat([p.detach().flatten() for p in params]).cpu())
if process.rank == 0:
    difference = (weights[0] - weights[1]).abs().max().item()
    print(json.dumps([dist.get_backend(), process.world_size, difference, norm]))
sft.close_distributed()
"""


def test_two_sharded_steps(tmp_path):
    """Reduce-scatter and all-gather on all GPUs (one rank where there is one) against the whole
    optimizer."""
    script = tmp_path / "worker.py"
    script.write_text(SHARDED.format(backend=BACKEND, port=29511))
    completed = run_script(script, nproc=max(1, torch.cuda.device_count()))
    backend, world_size, difference, norm = json.loads(completed.stdout.splitlines()[-1])
    print(f"{backend}, {world_size} rank(s): sharded and whole weights differ by {difference:.1e}")
    assert backend == BACKEND
    assert difference < 1e-6 and math.isfinite(norm)


# ---- Memory -------------------------------------------------------------------------------------


def wide_policy(make_tiny, **text_fields):
    """Return a policy with two layers of text and two of vision at the widths of Qwen2.5-VL-7B (or
    those in text_fields), random, in bfloat16. An image has up to 7,000 tokens."""
    tiny = make_tiny(torch.float32)
    model = wide("Qwen2.5-VL-7B", tiny.tokenizer, DEVICE, 2, **text_fields)
    return sft.make_policy(model, tiny.tokenizer, tiny.image_processor, DEVICE, tiny.prompts,
                           28**2, 7000 * 28**2)


@pytest.mark.parametrize("frozen", [True, False])
def test_memory_against_the_plan(make_tiny, tmp_path, frozen, **text_fields):
    """Peaks of rollouts and of an update, almost all of it images. They are at most a tenth above
    what plan_memory says, which is what extras/plan.py allows for, and not far below it."""
    gc.collect()
    allocated_before = torch.cuda.memory_allocated()

    def peak_of(run):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - allocated_before

    # 1. what is planned
    max_new_tokens = 64
    max_model_len = 8192
    policy = wide_policy(make_tiny, **text_fields)
    sft.enable_gradient_checkpointing(policy.model)
    optimizer = sft.Optimizer(sft.trainable_parameters(policy, frozen), 1e-6, 0.0)
    plan = plan_memory(policy.model, 1, micro_batch_tokens=max_model_len, max_num_seqs=8,
                       max_model_len=max_model_len, shard_optimizer=False, freeze_vision=frozen,
                       chunk_size=max_new_tokens)
    rollout_bytes, update_bytes = phases(plan)
    # the two moments do not exist before the first step
    planned = {"rollout": rollout_bytes - plan["optimizer"] * 2 // 3, "update": update_bytes}

    # 2. rollouts
    Image.effect_noise((3000, 2000), 60).convert("RGB").save(tmp_path / "noise.jpg")
    row = {"id": "0", "image": "noise.jpg", "question": "Which colour?", "answer": "red"}
    limits = evaluate.Limits(2, 2, max_new_tokens, max_model_len)
    engine = evaluate.Engine(policy, limits, max_num_seqs=8)
    rollouts = []
    peaks = {"rollout": peak_of(lambda: rollouts.extend(engine.run([row], 8, tmp_path)))}
    engine.free_cache()

    # 3. an update; the first one makes the moments
    for index, rollout in enumerate(rollouts):
        rollout.advantage = (-1.0) ** index
    policy.model.train()
    args = update_args(micro_batch_tokens=max_model_len, prompts_per_step=1)
    rl.update_policy(policy, optimizer, rollouts, args, 1e-6)
    peaks["update"] = peak_of(lambda: rl.update_policy(policy, optimizer, rollouts, args, 1e-6))

    for name, peak in peaks.items():
        print(f"{name}, frozen tower {frozen}: measured {peak / 1e9:.2f} GB, plan "
              f"{planned[name] / 1e9:.2f} GB; {plan}")
    assert all(0.6 * planned[name] < peak < 1.1 * planned[name] for name, peak in peaks.items())


# ---- Stages -------------------------------------------------------------------------------------


def test_a_whole_step_of_rl(trained_folder, world, tmp_path):
    """Rollouts, update, evaluation and export of the tiny model, in the type of --dtype auto."""
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps({"system": "Look closer."}))
    seen = {row["id"] for row in tools.read_jsonl(world / "coldstart.jsonl")[:4]}
    rows = sorted(tools.read_jsonl(world / "train.jsonl"), key=lambda row: row["id"] in seen)
    tools.write_jsonl(world / "held_out.jsonl", rows[:4])
    tools.write_jsonl(world / "trained_on.jsonl", rows[4:])
    run_script("rl.py", "--model", trained_folder, "--data", world / "trained_on.jsonl",
               "--prompts", prompts, "--prompts_per_step", 6, "--group_size", 8,
               "--max_new_tokens", 80, "--max_model_len", 1200, "--steps", 2, "--eval_every", 2,
               "--eval_data", world / "held_out.jsonl", "--eval_size", 4, "--eval_turns", 8,
               "--gradient_checkpointing", "--out", tmp_path / "rl")
    steps = [json.loads(line) for line in (tmp_path / "rl/metrics.jsonl").open()]
    for metrics in steps:
        print([metrics[name] for name in ("num_trained_responses", "logprob_diff", "max_log_ratio",
                                          "seconds_rollout", "seconds_update")])
    assert sum(metrics["num_trained_responses"] for metrics in steps) > 0
    assert steps[-1]["val_accuracy"] is not None
    assert steps[0]["logprob_diff"] < 0.05
    assert all(metrics["grad_norm"] is not None for metrics in steps)
    sft.load_policy(str(tmp_path / "rl"), DEVICE)


def test_save_and_resume(trained_folder, world, tmp_path):
    """Resumed from its second step of four, a run ends where the uninterrupted one does, within
    rounding (on a GPU sums are not always added in the same order)."""
    command = ["sft.py", "--model", trained_folder, "--data", world / "coldstart.jsonl",
               "--batch_size", 4, "--lr", "1e-4", "--micro_batch_tokens", 2000,
               "--save_every", 2, "--keep_checkpoints", 9, "--steps", 4, "--dtype", "float32"]
    run_script(*command, "--out", tmp_path / "whole")
    shutil.copytree(tmp_path / "whole/state", tmp_path / "cut/state")
    shutil.copy(tmp_path / "whole/metrics.jsonl", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut/state/step_0000004")
    run_script(*command, "--out", tmp_path / "cut", "--resume")
    difference = largest_difference(tmp_path / "whole", tmp_path / "cut")
    moved = largest_difference(tmp_path / "whole", trained_folder)
    print(f"resumed and uninterrupted differ by {difference:.1e}, four steps moved weights by "
          f"{moved:.1e}")
    assert difference < 0.05 * moved
    lines = (tmp_path / "cut/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]
