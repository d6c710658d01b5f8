"""LoRA (Hu et al., arXiv 2106.09685) by hand: `--lora RANK` of sft.py and rl.py trains two small
matrices beside each linear layer of the language model, and nothing else:

    y = W x + (alpha / rank) B A x        W (out, in) frozen, A (rank, in), B (out, rank)

A begins random and B with zeros, so the model is unchanged at first. Gradients and optimizer states
are needed for A and B only: 7B fits on one GPU of 80 GB, 3B on one of 24 GB (docs/large.md).

1. A and B are float32 even if W is bfloat16: steps are small. They are not added to W while the
   policy plays: bfloat16 has 8 significant bits, so W + B A would be W as long as B A is small.
2. An exported model is a plain one, with W + B A in float32 in the place of W. Nothing is lost in
   the file; who loads it in bfloat16 rounds the sum. (Adapters beside the base would be exact, but
   servers that do not know them would silently serve the base.)
3. A checkpoint holds A, B and their moments. The base comes from --model again.
4. Layers are found by what they are, linear layers inside the language model. The vision tower has
   layers of the same names, and stays as it is.
"""

import torch
import torch.nn.functional as F


class AdaptedLinear(torch.nn.Module):
    """A frozen linear layer with its A and B. Both are on its device."""

    def __init__(self, linear, rank, alpha, generator):
        super().__init__()
        self.linear = linear
        self.scale = alpha / rank
        weight = linear.weight
        # float32 at least; in float64, as tests want it, everything is float64
        dtype = torch.promote_types(weight.dtype, torch.float32)
        A = torch.randn(rank, linear.in_features, generator=generator) / linear.in_features ** 0.5
        self.A = torch.nn.Parameter(A.to(weight.device, dtype))                 # (rank, in)
        self.B = torch.nn.Parameter(torch.zeros(linear.out_features, rank, dtype=dtype,
                                                device=weight.device))          # (out, rank)

    def forward(self, x):
        """(..., in) -> (..., out). Computed in the dtype of x: copies of x in float32 would take
        gigabytes."""
        A, B = self.A.to(x.dtype), self.B.to(x.dtype)
        return self.linear(x) + self.scale * F.linear(F.linear(x, A), B)

    def merged_weight(self):
        """Return W + (alpha / rank) B A, (out, in), in float32 at least."""
        return self.linear.weight + self.scale * self.B @ self.A


def add_adapters(policy, rank, alpha, seed):
    """Replace the linear layers of a policy's language model by adapted ones, and freeze all the
    rest. Return the A and B of all layers, the parameters to train. seed: of A, so that all
    processes begin with the same."""
    generator = torch.Generator().manual_seed(seed)
    policy.model.requires_grad_(False)
    params = []
    for module in list(policy.model.model.language_model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, torch.nn.Linear):
                adapted = AdaptedLinear(child, rank, alpha, generator)
                setattr(module, name, adapted)
                params += [adapted.A, adapted.B]
    policy.has_adapters = True
    return params


@torch.no_grad()
def merged_weights(model):
    """Return {name: tensor} of the model without adapters that computes the same."""
    weights = model.state_dict()
    for name, module in model.named_modules():
        if isinstance(module, AdaptedLinear):
            # one layer after the other: all of them would not fit beside the model on its GPU
            weights[f"{name}.weight"] = module.merged_weight().cpu()
            for inner_name in ("A", "B", "linear.weight"):
                del weights[f"{name}.{inner_name}"]
            if module.linear.bias is not None:
                weights[f"{name}.bias"] = weights.pop(f"{name}.linear.bias")
    return weights


def linear_layers(model):
    """Return the layers of a model without adapters that would get some."""
    return [module for module in model.model.language_model.modules()
            if isinstance(module, torch.nn.Linear)]


def num_adapter_parameters(model, rank):
    """Return how many numbers A and B of all layers would have."""
    return sum(rank * (layer.in_features + layer.out_features) for layer in linear_layers(model))
