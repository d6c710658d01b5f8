"""Specification of extras/plan.py: against the bytes that the tiny model allocates, published
numbers of parameters, and the seconds of a step calculated by hand."""

import argparse
import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

import evaluate
import rl
import sft
import tools
from extras import plan
from extras.plan import in_gb, plan_memory, plan_seconds, print_plan, vision_memory
from support.memory import LiveBytes
from support.models import RELEASED


def policy_to_train(folder, **options):
    """Return a policy with gradient checkpointing, ready to train."""
    policy = sft.load_policy(str(folder), "cpu", "float32", **options)
    sft.enable_gradient_checkpointing(policy.model)
    policy.model.train()
    return policy


# ---- Memory -------------------------------------------------------------------------------------


def test_plan_is_what_the_tiny_model_allocates(trained_folder, prompts, world):
    """Weights, gradients and optimizer to 5%; the peak of backward, with gradient checkpointing, to
    15%; the cache exactly."""
    policy = policy_to_train(trained_folder, prompts=prompts)
    # so long that the text's activations dominate
    rows = tools.read_jsonl(world / "coldstart.jsonl") * 3
    sequences = [sft.encode(policy, row, world) for row in rows]
    batch = sft.collate(policy, sequences)
    planned = plan_memory(policy.model, 1, micro_batch_tokens=batch["input_ids"].shape[1],
                          max_num_seqs=4, max_model_len=256, shard_optimizer=False,
                          chunk_size=4096)
    assert planned["weights"] == sum(p.nbytes for p in policy.model.parameters())
    with LiveBytes() as memory:
        optimizer = sft.Optimizer(sft.trainable_parameters(policy, False), 1e-5, 0.0)
        before = memory.live()          # the flat weights; the old ones were made outside
        optimizer.backward([batch], lambda batch: -sft.token_logprobs(policy, batch, 4096).sum())
        used = memory.peak - before
        optimizer.step(1e-5, 1.0)
        assert before == pytest.approx(planned["weights"], rel=0.05)
        assert memory.live() - before == pytest.approx(planned["optimizer"], rel=0.05)
    cache = evaluate.SlotCache(policy.model.config.text_config, 4, torch.float32, "cpu", 256)
    assert sum(t.nbytes for layer in cache.layers for t in layer) == planned["KV cache"]
    expected = planned["activations"] + planned["logits"] + planned["gradients"]
    assert used == pytest.approx(expected, rel=0.15)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", ["tiny", "Qwen3-VL-8B"])
def test_plan_counts_the_vision_tower(trained_folder, released_folder, world, name, frozen):
    """A conversation is all image but for some words, so that the tower dominates. The peak of
    forward and backward is planned to 15%; a frozen tower takes no part in backward and keeps
    nothing. The tower dominates prefill, too (2,400 tokens in one forward pass): to 20%."""
    policy = policy_to_train(trained_folder if name == "tiny" else released_folder(name))
    visual = policy.model.model.visual
    grid = (1, 96, 100)
    num_tokens = policy.num_image_tokens(grid)
    patches = torch.randn(96 * 100, visual.patch_embed.proj.weight[0].numel())
    sequence = sft.Sequence()
    sequence.append([policy.im_start_id, *[policy.image_token_id] * num_tokens,
                     *policy.encode_text("red")], False, (patches, grid))
    sequence.append(policy.encode_text("red square"), True)
    batch = sft.collate(policy, [sequence])
    sft.trainable_parameters(policy, frozen)
    # gradients of the vocabulary would dominate everything else
    for table in (policy.model.lm_head, policy.model.get_input_embeddings()):
        table.requires_grad_(False)
    planned = plan_memory(policy.model, 1, micro_batch_tokens=num_tokens, max_num_seqs=1,
                          max_model_len=num_tokens, shard_optimizer=False, freeze_vision=frozen,
                          chunk_size=1)
    gradients = sum(p.nbytes for p in policy.model.parameters() if p.requires_grad)
    with LiveBytes() as memory:
        sft.token_logprobs(policy, batch, chunk_size=1).sum().backward()
    expected = planned["activations"] + planned["logits"] + planned["vision"]
    assert max(vision_memory(policy.model, num_tokens, True, frozen)) > 0.6 * expected
    assert memory.peak == pytest.approx(expected + gradients, rel=0.15)
    assert (visual.patch_embed.proj.weight.grad is None) == frozen
    with torch.inference_mode(), LiveBytes() as memory:
        visual(patches, grid_thw=torch.tensor([grid]))
    assert memory.peak == pytest.approx(planned["prefill"], rel=0.2)


@pytest.mark.parametrize("name, billions, cache", [
    # published; key and value, layers x key heads x 128, 2 bytes each
    ("Qwen2.5-VL-7B", 8.292, 2 * 28 * 4 * 128 * 2), ("Qwen2.5-VL-3B", 3.755, 2 * 36 * 2 * 128 * 2),
    ("Qwen3-VL-8B", 8.767, 2 * 36 * 8 * 128 * 2), ("Qwen3-VL-4B", 4.438, 2 * 36 * 8 * 128 * 2)])
def test_plan_of_the_released_models(monkeypatch, capsys, tmp_path, name, billions, cache):
    """From config.json alone: the number of parameters, and bytes of cache per token."""
    plans = []

    def recorded(*args, **flags):
        plans.append(plan_memory(*args, **flags))
        return plans[-1]

    monkeypatch.setattr(plan, "plan_memory", recorded)
    (tmp_path / "config.json").write_text(json.dumps(RELEASED[name]))
    monkeypatch.setattr("sys.argv", ["plan.py", "--model", str(tmp_path), "--max_num_seqs", "16",
                                     "--max_model_len", "1000", "--no-freeze_vision",
                                     "--optimizer", "adamw"])
    print_plan(rl.parse_args())
    assert plans[0]["weights"] / 2e9 == pytest.approx(billions, abs=5e-4)
    assert plans[0]["KV cache"] == cache * 16 * 1000
    printed = capsys.readouterr().out
    assert f"| 1 | {2 * billions:.1f} | " in printed
    # float32 master weights and two moments: 12 bytes a parameter, 99.5 GB for 7B
    assert f"disk: {12 * billions:.1f} GB a checkpoint, 3 of them during a save" in printed


def test_advice_names_flags_until_it_fits(tmp_path):
    """7B: one GPU is never enough, two are with a sharded optimizer and a frozen tower, and on 64
    a sharded optimizer is all that is missing."""
    (tmp_path / "config.json").write_text(json.dumps(RELEASED["Qwen2.5-VL-7B"]))
    model = plan.read_model(str(tmp_path))
    flags = {"micro_batch_tokens": 4096, "max_num_seqs": 16, "max_model_len": 4096,
             "shard_optimizer": False, "gradient_checkpointing": True, "freeze_vision": False}
    assert plan.advise(model, 1, flags) == (
        "1 GPU(s): does not fit with any of these flags: use more GPUs")
    assert plan.advise(model, 64, flags) == "64 GPU(s): fits with --shard_optimizer"
    assert plan.advise(model, 64, {**flags, "shard_optimizer": True}) == ""


# ---- Seconds ------------------------------------------------------------------------------------


def test_seconds_of_a_step_of_7b_by_hand(tmp_path):
    """512 conversations a GPU of 8,192 tokens, 7.615 billion parameters of text and 0.677 of the
    tower. FLOPs of one: 2 x 8,192 x (5 x 7.615 + 4 x 2 x 0.677) billion = 0.7126e15; all of them at
    395.6e12 a second: 922 s. Decoding: the 64 conversations at once are replaced 8 times, 1,024
    passes each, of 16.58 GB of weights and 64 x 8,192 x 57,344 bytes of cache: 46.65 GB at 2.01
    TB/s and 4 ms: 27.2 ms, 223 s. Adapters: 4 passes of the text instead of 5."""
    (tmp_path / "config.json").write_text(json.dumps(RELEASED["Qwen2.5-VL-7B"]))
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(tmp_path),
                                                        dtype=torch.bfloat16)
    args = argparse.Namespace(prompts_per_step=256, group_size=16, max_num_seqs=64,
                              max_model_len=32768, short_model_len=8192, lora=0,
                              gradient_checkpointing=True, freeze_vision=True)
    assert plan_seconds(model, args, 8) == pytest.approx(922 + 223, rel=0.002)
    args.lora = 32
    assert plan_seconds(model, args, 8) == pytest.approx(922 * 35.88 / 43.49 + 223, rel=0.002)


# ---- The command --------------------------------------------------------------------------------


def test_it_takes_the_flags_of_the_run_and_describes_itself(tmp_path, monkeypatch, capsys):
    """A command of rl.py works as it is, flags that need no memory included."""
    (tmp_path / "config.json").write_text(json.dumps(RELEASED["Qwen2.5-VL-3B"]))
    monkeypatch.setattr("sys.argv", ["plan.py", "--model", str(tmp_path), "--lr", "0.1",
                                     "--baseline", "group", "--max_num_seqs", "8"])
    print_plan(rl.parse_args(plan.DESCRIPTION))
    assert "8 conversations of 4096 at once" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["plan.py", "--help"])
    with pytest.raises(SystemExit):
        rl.parse_args(plan.DESCRIPTION)
    assert "Calculate what a run of rl.py" in capsys.readouterr().out


def test_plan_refuses_other_families(monkeypatch, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_vl_moe"}))
    monkeypatch.setattr("sys.argv", ["plan.py", "--model", str(tmp_path)])
    with pytest.raises(tools.InputError, match="'qwen3_vl_moe' is not supported; "
                                               "use one of qwen2_5_vl, qwen3_vl"):
        print_plan(rl.parse_args())


def test_sizes_of_a_tiny_model_are_not_printed_as_zero():
    assert [in_gb(n) for n in (0, 19_400_000, 99_999_999, 100_000_000, 91.4e9)] == [
        "0.0", "0.019", "0.100", "0.1", "91.4"]
