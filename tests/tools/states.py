"""Everything of a model that a tool may not leave changed, as one comparable value."""

import random

import numpy as np
import torch


def state_of(model, optimizer=None):
    """Names, bytes of all tensors, flags, hooks, gradients, optimizer and random states."""
    tensors = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        grad = None if tensor.grad is None else tensor.grad.numpy().tobytes()
        tensors[name] = (id(tensor), tensor.detach().numpy().tobytes(), tensor.requires_grad, grad)
    modules = {
        name: (
            type(m),
            m.training,
            sorted(vars(m)),
            [len(v) for k, v in sorted(vars(m).items()) if "hooks" in k],
        )
        for name, m in model.named_modules()
    }
    rng = (random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().tolist())
    return tensors, modules, rng, repr(optimizer.state_dict()) if optimizer else None
