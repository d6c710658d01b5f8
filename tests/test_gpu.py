"""What only a GPU can show. Skipped where CUDA is not; `pytest -s tests/test_gpu.py` prints what it
measures.

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
from support.launch import ROOT, run_script
from support.models import wide
from extras.plan import phases, plan_memory
from test_rl import update_args
from test_sft import largest_difference, weights

DEVICE, BACKEND = "cuda", "nccl"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with CUDA")


@pytest.mark.parametrize("dtype, mean, largest", [
    ("float32", 1e-4, 1e-2), ("bfloat16", 0.02, 1.0)])
def test_sampler_and_trainer_agree(trained_folder, prompts, world, dtype, mean, largest):
    """Log-probs that the sampler recorded against the trainer's own: other kernels, other shapes.
    In bfloat16 they differ by rounding, which the ratio of the loss corrects: 2% on average is
    little beside its clip at 20 to 30%."""
    policy = sft.load_policy(str(trained_folder), DEVICE, dtype, prompts)
    rows = tools.read_jsonl(world / "train.jsonl")[:4]
    rollouts = evaluate.Engine(policy, evaluate.Limits(6, 6, 80, 1200), 16).run(rows, 8, world)
    with torch.no_grad():
        new, old, mask = rl.compute_logprobs(policy, rollouts, rl.encode_rollouts(policy, rollouts))
    gap = (new - old)[mask].abs()
    print(f"{dtype}: sampler and trainer differ by {gap.mean():.2e} on average, {gap.max():.2e} at "
          f"most, over {len(gap)} tokens")
    assert gap.mean() < mean and gap.max() < largest


def test_conversations_do_not_depend_on_slots(trained_folder, prompts, world):
    """In float32 almost every conversation is the same in 3 slots and in 16: rounding decides a
    draw now and then, a wrong mask would decide nearly all."""
    policy = sft.load_policy(str(trained_folder), DEVICE, "float32", prompts)
    rows = tools.read_jsonl(world / "train.jsonl")[:4]
    few, many = (evaluate.Engine(policy, evaluate.Limits(6, 6, 80, 1200), slots).run(rows, 8, world)
                 for slots in (3, 16))
    same = sum(a.token_ids == b.token_ids for a, b in zip(few, many))
    print(f"{same} of {len(few)} conversations are the same in 3 slots and in 16")
    assert same >= 0.8 * len(few)


SHARDED = """
import json, sys, torch, torch.distributed as dist
sys.path.insert(0, {root!r})
import sft
rank, world, device = sft.setup_distributed()
if world == 1:
    dist.init_process_group({backend!r}, init_method="tcp://localhost:{port}", rank=0, world_size=1)
ends = []
for shard in (True, False):
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape).to(device))
              for shape in ((300, 101), (77,), (64, 200))]
    optimizer = sft.Optimizer(params, 1e-3, 0.1, shard=shard, megabytes=0.05)
    optimizer.shard = shard             # a single rank sends its gradients, too, to itself
    for step in range(2):
        torch.manual_seed(1000 * step + rank)
        factors = [torch.randn(p.shape).to(device) for p in params]
        optimizer.backward([0, 1], lambda _: sum((p * f).sum() for p, f in zip(params, factors)))
        norm = optimizer.step(1e-3, 1.0)
    ends.append(torch.cat([p.detach().flatten() for p in params]).cpu())
if rank == 0:
    print(json.dumps([dist.get_backend(), world, (ends[0] - ends[1]).abs().max().item(), norm]))
sft.close_distributed()
"""


def test_two_sharded_steps(tmp_path):
    """Reduce-scatter and all-gather on all GPUs (one rank where there is one) against the whole
    optimizer."""
    script = tmp_path / "worker.py"
    script.write_text(SHARDED.format(root=str(ROOT), backend=BACKEND, port=29511))
    done = run_script(script, nproc=max(1, torch.cuda.device_count()))
    backend, world, gap, norm = json.loads(done.stdout.splitlines()[-1])
    print(f"{backend}, {world} rank(s): sharded and whole weights differ by {gap:.1e}")
    assert backend == BACKEND and gap < 1e-6 and math.isfinite(norm)


def wide_policy(make_tiny, **text):
    """Two layers of text and two of vision at the widths of Qwen2.5-VL-7B (or those in `text`),
    random, in bfloat16. An image has up to 7,000 tokens."""
    tiny = make_tiny(torch.float32)
    model = wide("Qwen2.5-VL-7B", tiny.tokenizer, DEVICE, 2, **text)
    return sft.make_policy(model, tiny.tokenizer, tiny.processor, DEVICE, tiny.prompts, 28**2,
                           7000 * 28**2)


@pytest.mark.parametrize("frozen", [True, False])
def test_memory_against_the_plan(make_tiny, tmp_path, frozen, **text):
    """Peaks of rollouts and of an update, almost all of it images: at most a tenth above what
    plan_memory says, which is what extras/plan.py allows for, and not far below it."""
    def held(run):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before

    gc.collect()
    before, written, tokens = torch.cuda.memory_allocated(), 64, 8192
    policy = wide_policy(make_tiny, **text)
    sft.enable_gradient_checkpointing(policy.model)
    optimizer = sft.Optimizer(sft.trainable_parameters(policy, frozen), 1e-6, 0.0)
    plan = plan_memory(policy.model, 1, tokens=tokens, slots=8, max_model_len=tokens,
                          shard_optimizer=False, freeze_vision=frozen, chunk=written)
    Image.effect_noise((3000, 2000), 60).convert("RGB").save(tmp_path / "noise.jpg")
    row = {"id": "0", "image": "noise.jpg", "question": "Which colour?", "answer": "red"}
    engine, rollouts = evaluate.Engine(policy, evaluate.Limits(2, 2, written, tokens), 8), []
    peaks = {"rollout": held(lambda: rollouts.extend(engine.run([row], 8, tmp_path)))}
    engine.cache = None
    for i, r in enumerate(rollouts):
        r.advantage = (-1.0) ** i
    policy.model.train()
    args = update_args(tokens=tokens, prompts_per_step=1)

    def update():
        rl.update_policy(policy, optimizer, rollouts, args, 1e-6)

    update()    # makes the moments, which the plan of a rollout counts, too
    peaks["update"], (rollout, planned) = held(update), phases(plan)
    planned = {"rollout": rollout - plan["optimizer"] * 2 // 3, "update": planned}
    for name, peak in peaks.items():
        print(f"{name}, frozen tower {frozen}: measured {peak / 1e9:.2f} GB, plan "
              f"{planned[name] / 1e9:.2f} GB; {plan}")
    assert all(0.6 * planned[name] < peak < 1.1 * planned[name] for name, peak in peaks.items())


def test_a_whole_step_of_rl(trained_folder, world, tmp_path):
    """Rollouts, update, evaluation and export of the tiny model, in the type of --dtype auto."""
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps({"system": "Look closer."}))
    run_script("rl.py", "--model", trained_folder, "--data", world / "train.jsonl",
               "--prompts", prompts, "--prompts_per_step", 6, "--group_size", 8, "--max_new_tokens", 80,
               "--max_model_len", 1200, "--steps", 2, "--eval_every", 2,
               "--eval_data", world / "train.jsonl", "--eval_size", 4, "--eval_turns", 8,
               "--gradient_checkpointing", "--out", tmp_path / "rl")
    rows = [json.loads(line) for line in (tmp_path / "rl/metrics.jsonl").open()]
    print([(m["trained_responses"], m["mismatch"], m["largest_log_ratio"], m["seconds_rollout"],
            m["seconds_update"]) for m in rows])
    assert sum(m["trained_responses"] for m in rows) > 0 and rows[-1]["eval"] is not None
    assert rows[0]["mismatch"] < 0.05 and all(m["grad_norm"] is not None for m in rows)
    sft.load_policy(str(tmp_path / "rl"), DEVICE)


def test_save_and_resume(trained_folder, world, tmp_path):
    """Resumed from its second step of four, a run ends where the uninterrupted one does, within
    rounding (on a GPU sums are not always added in the same order)."""
    command = ["sft.py", "--model", trained_folder, "--data", world / "coldstart.jsonl",
               "--batch_size", 4, "--lr", "1e-4", "--micro_batch_tokens", 2000, "--save_every", 2, "--keep", 9,
               "--steps", 4, "--dtype", "float32"]
    run_script(*command, "--out", tmp_path / "whole")
    shutil.copytree(tmp_path / "whole/state", tmp_path / "cut/state")
    shutil.copy(tmp_path / "whole/metrics.jsonl", tmp_path / "cut")
    latest = tmp_path / "cut/state/latest.json"
    latest.write_text(json.dumps({**json.loads(latest.read_text()), "step": 2}))
    run_script(*command, "--out", tmp_path / "cut", "--resume")
    gap = largest_difference(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    moved = largest_difference(weights(tmp_path / "whole"), weights(trained_folder))
    print(f"resumed and uninterrupted differ by {gap:.1e}, four steps moved weights by {moved:.1e}")
    assert gap < 0.05 * moved
    lines = (tmp_path / "cut/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]
