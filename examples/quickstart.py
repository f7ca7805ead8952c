"""normkit in ten lines: torch's layer and normkit's, side by side."""

import torch

import normkit

x = torch.randn(8, 3, 32, 32)
theirs, ours = torch.nn.BatchNorm2d(3), normkit.BatchNorm2d(3)
ours.load_state_dict(theirs.state_dict())
print("largest difference:", (ours(x) - theirs(x)).abs().max().item())

fused = normkit.BatchNorm(3, act="relu")
mask = torch.arange(32) < 20
print("masked, with residual:", fused(x, mask=mask[None, None, None], residual=x).shape)
print(normkit.explain(fused, x))
