"""Policies in float64 that are exact (not collected by pytest). The library's norms and the rotary
embedding of its vision tower go through float32, which would drown comparisons to 1e-10. Importing
this puts others in their place, in every policy of this process that is made in float64."""

import functools
import sys

import torch

import sft


def exact_norm(norm, x):
    """RMSNorm in the precision of x."""
    variance = x.square().mean(-1, keepdim=True)
    return norm.weight * (x * torch.rsqrt(variance + norm.variance_epsilon))


def exact_rotary(rotate_half, q, k, cos, sin):
    """The vision tower's rotary embedding in the precision of q. q, k: (S, H, D); cos, sin: (S,
    D)."""
    cos, sin = cos.unsqueeze(-2).to(q.dtype), sin.unsqueeze(-2).to(q.dtype)
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


def exact(make_policy):
    @functools.wraps(make_policy)
    def make(model, *args, **kwargs):
        if model.dtype == torch.float64:
            library = sys.modules[type(model).__module__]   # the family's own
            library.apply_rotary_pos_emb_vision = functools.partial(
                exact_rotary, library.rotate_half)
            for module in model.modules():
                if type(module).__name__.endswith("RMSNorm"):
                    module.forward = functools.partial(exact_norm, module)
        return make_policy(model, *args, **kwargs)
    return make


sft.make_policy = exact(sft.make_policy)
