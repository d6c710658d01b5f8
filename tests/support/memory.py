"""Count the bytes of living tensors."""

import time

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten


def tensors_in(tree):
    """Return the tensors in nested lists, tuples and dicts."""
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, torch.Tensor)]


class LiveBytes(TorchDispatchMode):
    """Context that counts the bytes of tensor storages which were made inside it and are alive.

    peak is the largest number so far. A process's memory (RSS) would say little, because allocators
    keep what was freed.
    """

    def __init__(self):
        super().__init__()
        self.storages = {}      # {key: (weak reference, bytes)}
        self.peak = 0

    def live(self):
        """Return the bytes that are alive now."""
        self.storages = {key: entry for key, entry in self.storages.items()
                         if not entry[0].expired()}
        return sum(num_bytes for _, num_bytes in self.storages.values())

    def settled(self):
        """Return live() when it no longer changes: gloo's thread frees a message a moment after the
        wait for it."""
        bytes_before = None
        while bytes_before != self.live():
            bytes_before = self.live()
            time.sleep(0.2)
        return bytes_before

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        outputs = function(*args, **(kwargs or {}))
        # a view or an in-place result shares the storage of an argument: it is not new
        old_keys = {tensor.untyped_storage()._cdata for tensor in tensors_in((args, kwargs))}
        for tensor in tensors_in(outputs):
            storage = tensor.untyped_storage()
            if storage._cdata not in old_keys:
                self.storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, self.live())
        return outputs
