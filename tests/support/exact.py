"""Exact policies in float64. The library's norms and the rotary embedding of its vision tower go
through float32, which would hide differences below 1e-7. After install(), every policy that this
process makes in float64 computes them in float64."""

import functools
import sys

import torch

import sft


def exact_norm(norm, x):
    """Return RMSNorm of x, in the precision of x."""
    variance = x.square().mean(-1, keepdim=True)
    return norm.weight * (x * torch.rsqrt(variance + norm.variance_epsilon))


def exact_rotary(rotate_half, q, k, cos, sin):
    """Return the vision tower's rotary embedding in the precision of q. q, k: (S, H, D); cos, sin:
    (S, D)."""
    cos = cos.unsqueeze(-2).to(q.dtype)     # (S, 1, D)
    sin = sin.unsqueeze(-2).to(q.dtype)
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


def install():
    """Replace sft.make_policy by one that makes float64 models exact."""
    library_make_policy = sft.make_policy

    @functools.wraps(library_make_policy)
    def make_policy(model, *args, **kwargs):
        """Make the model exact if it is in float64, then its policy."""
        if model.dtype == torch.float64:
            # the module of transformers that defines this model family
            library = sys.modules[type(model).__module__]
            library.apply_rotary_pos_emb_vision = functools.partial(
                exact_rotary, library.rotate_half)
            for module in model.modules():
                if type(module).__name__.endswith("RMSNorm"):
                    module.forward = functools.partial(exact_norm, module)
        return library_make_policy(model, *args, **kwargs)

    sft.make_policy = make_policy
