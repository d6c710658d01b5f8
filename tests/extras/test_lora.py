"""Specification of extras/lora.py: adapters by hand, merged equals unmerged, and training with
them, on one process and on two, killed and resumed."""

import functools
import json

import pytest
import torch

import evaluate
import sft
import tools
from extras import crash, lora
from support.launch import Forked, run_script
from support.models import largest_difference


def with_random_adapters(policy, rank=3):
    """Add adapters whose B is not zero."""
    params = lora.add_adapters(policy, rank, 6.0, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for B in params[1::2]:
            B.copy_(0.05 * torch.randn(B.shape, generator=generator))
    return params


def logprobs_of(policy, world):
    rows = tools.read_jsonl(world / "coldstart.jsonl")[:3]
    batch = sft.collate(policy, [sft.encode(policy, row, world) for row in rows])
    with torch.no_grad():
        return sft.token_logprobs(policy, batch)


def test_an_adapted_layer_by_hand():
    """W = (1 2), A = (3 4), B = (5), alpha / rank = 2: (1 2) x + 2 * 5 * (3 4) x = (31 42) x."""
    linear = torch.nn.Linear(2, 1, bias=False)
    adapted = lora.AdaptedLinear(linear, 1, 2.0, torch.Generator())
    x = torch.tensor([[1.0, 1.0], [2.0, -1.0]])
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[1.0, 2.0]]))
        assert adapted(x).tolist() == [[3.0], [0.0]]        # B is 0 at first
        adapted.A.copy_(torch.tensor([[3.0, 4.0]]))
        adapted.B.fill_(5.0)
    assert adapted(x).tolist() == [[73.0], [20.0]]
    assert adapted.merged_weight().tolist() == [[31.0, 42.0]]


def test_adapters_are_in_the_language_model_only(released_folder):
    """All seven linear layers of each of its two layers, none of the vision tower (whose layers
    have the same names), of the embedding or of the head. Everything else is frozen."""
    policy = sft.load_policy(str(released_folder("Qwen2.5-VL-7B")), "cpu", "float64")
    params = lora.add_adapters(policy, 2, 32.0, seed=0)
    names = {name for name, module in policy.model.named_modules()
             if isinstance(module, lora.AdaptedLinear)}
    expected = set()
    for layer in (0, 1):
        expected |= {f"model.language_model.layers.{layer}.{name}" for name in (
            "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
            "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")}
    assert names == expected and len(params) == 28
    trained = [param for param in policy.model.parameters() if param.requires_grad]
    assert {id(param) for param in trained} == {id(param) for param in params}
    tower = [module for module in policy.model.model.visual.modules()
             if isinstance(module, torch.nn.Linear)]
    assert tower


@pytest.mark.parametrize("name", ["tiny", "Qwen3-VL-4B"])
def test_a_merged_model_is_the_same(name, world, tmp_path, trained_folder, released_folder,
                                    prompts):
    """Log-probs and conversations, after it was written and read again. With B = 0 it is the base,
    bit for bit."""
    def load(folder):
        return sft.load_policy(str(folder), "cpu", "float64", prompts, max_pixels=100_000)

    policy = load(trained_folder if name == "tiny" else released_folder(name))
    base = logprobs_of(policy, world)
    params = with_random_adapters(policy)
    unmerged = logprobs_of(policy, world)
    assert (unmerged - base).abs().max() > 0.01
    sft.export(policy, tmp_path)
    merged = load(tmp_path)
    assert (logprobs_of(merged, world) - unmerged).abs().max() < 1e-10
    rows = tools.read_jsonl(world / "train.jsonl")[:2]
    limits = evaluate.Limits(4, 4, 48, 1200)
    played = [evaluate.Engine(each, limits, 4).run(rows, 2, world) for each in (policy, merged)]
    assert [r.token_ids for r in played[0]] == [r.token_ids for r in played[1]]
    with torch.no_grad():
        for B in params[1::2]:
            B.zero_()
    assert torch.equal(logprobs_of(policy, world), base)


def test_bfloat16_would_swallow_what_adapters_keep(trained_folder, prompts, world, tmp_path):
    """B A is a ten thousandth of W: the adapted model differs, W + B A in bfloat16 does not. The
    exported matrix is float32."""
    policy = sft.load_policy(str(trained_folder), "cpu", "bfloat16", prompts)
    params = lora.add_adapters(policy, 2, 2.0, seed=0)
    assert {param.dtype for param in params} == {torch.float32}
    layer = next(module for module in policy.model.modules()
                 if isinstance(module, lora.AdaptedLinear))
    with torch.no_grad():
        layer.B.fill_(1e-4)
        change = layer.merged_weight() - layer.linear.weight
        assert 0 < change.abs().max() < 2**-9 * layer.linear.weight.abs().mean()
        swallowed = (layer.linear.weight + change.bfloat16()) != layer.linear.weight
        assert swallowed.float().mean() < 0.1
    sft.export(policy, tmp_path)
    exported = sft.load_policy(str(tmp_path), "cpu", "float32", prompts)
    weight = dict(exported.model.named_parameters())[
        next(name for name, module in policy.model.named_modules() if module is layer) + ".weight"]
    assert torch.equal(weight, layer.merged_weight())


def test_a_layer_with_a_bias_is_merged(trained_folder, prompts):
    """Qwen2.5-VL has one in queries, keys and values."""
    policy = sft.load_policy(str(trained_folder), "cpu", "float64", prompts)
    names = set(policy.model.state_dict())
    assert any(name.endswith("q_proj.bias") for name in names)
    with_random_adapters(policy)
    assert set(lora.merged_weights(policy.model)) == names


# ---- Training -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def command(trained_folder, world):
    return functools.partial(make_command, trained_folder, world)


def make_command(trained_folder, world, *flags):
    return ["sft.py", "--model", trained_folder, "--data", world / "short.jsonl", "--dtype",
            "float64", "--batch_size", 4, "--lr", "1e-2", "--warmup_ratio", 0,
            "--micro_batch_tokens", 500, "--lora", 4, "--steps", 6, "--save_every", 1, *flags]


@pytest.fixture(scope="module")
def one(command, tmp_path_factory):
    out = tmp_path_factory.mktemp("one")
    run_script(*command("--out", out))
    return out


def test_it_learns_and_leaves_the_rest_alone(one, trained_folder, prompts):
    """The loss falls; embeddings and tower are those of the base; a checkpoint holds the adapters
    only."""
    losses = [json.loads(line)["loss"] for line in (one / "metrics.jsonl").open()]
    assert losses[-1] < 0.8 * losses[0]
    base, trained = [dict(sft.load_policy(str(folder), "cpu", "float64", prompts)
                          .model.named_parameters()) for folder in (trained_folder, one)]
    changed = {name for name in base if not torch.equal(base[name], trained[name])}
    assert changed and all("language_model.layers" in name and "proj" in name for name in changed)
    state = torch.load(sorted((one / "state").iterdir())[-1] / "0.pt")["optimizer"]
    num_saved = sum(len(bucket["master"]) for bucket in state)
    policy = sft.load_policy(str(trained_folder), "cpu", "float64", prompts)
    assert num_saved == lora.num_adapter_parameters(policy.model, 4)
    assert num_saved < 0.2 * sum(param.numel() for param in base.values())


def test_two_sharded_processes_train_the_same_adapters(command, one, tmp_path):
    run_script(*command("--out", tmp_path, "--shard_optimizer", "--gradient_checkpointing"),
               nproc=2)
    assert largest_difference(one, tmp_path) < 1e-9


def test_killed_and_resumed_equals_uninterrupted(command, one, tmp_path):
    assert crash.run_killed(command(), 1, tmp_path, 2, 0.5, launch=Forked) == 2
    assert crash.same_weights(one, tmp_path)


def test_another_rank_cannot_continue(command, one):
    completed = run_script(*command("--out", one, "--resume", "--lora", 2, "--steps", 8),
                           check=False)
    assert "--lora was different" in completed.stderr


def test_the_tower_has_no_adapters(command, tmp_path):
    completed = run_script(*command("--out", tmp_path, "--no-freeze_vision"), check=False)
    assert "--lora trains adapters of the language model only" in completed.stderr


def test_a_step_of_rl(trained_folder, world, tmp_path):
    """Rollouts with adapters, an update, and an export that evaluation can read."""
    run_script("rl.py", "--model", trained_folder, "--data", world / "train.jsonl", "--lora", 2,
               "--prompts_per_step", 4, "--group_size", 4, "--max_new_tokens", 80,
               "--max_model_len", 1200, "--eval_every", 0, "--steps", 2, "--lr", 1.0,
               "--dtype", "float64", "--out", tmp_path)
    metrics = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    assert all(line["logprob_diff"] < 1e-6 for line in metrics[:1])
    assert largest_difference(trained_folder, tmp_path) > 0
