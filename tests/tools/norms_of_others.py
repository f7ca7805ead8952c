"""Norms as other packages write them: each family's interface and arithmetic, small."""

import torch
from torch import nn
from torch.nn import functional as F


class LlamaRMSNorm(nn.Module):
    """Cast to the input's dtype before the weight."""

    def __init__(self, size, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.variance_epsilon = eps

    def forward(self, hidden_states):
        dtype = hidden_states.dtype
        wide = hidden_states.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * wide.to(dtype)


class GemmaRMSNorm(nn.Module):
    """1 + weight, cast after it."""

    def __init__(self, size, eps=1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(size))

    def forward(self, x):
        y = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
        return (y * (1.0 + self.weight.float())).type_as(x)


class T5LayerNorm(nn.Module):
    """The mean isn't subtracted, whatever its name says."""

    def __init__(self, size, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.variance_epsilon = eps

    def forward(self, hidden_states):
        variance = hidden_states.to(torch.float32).pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        if self.weight.dtype in (torch.float16, torch.bfloat16):
            hidden_states = hidden_states.to(self.weight.dtype)
        return self.weight * hidden_states


class CohereLayerNorm(nn.Module):
    """No bias; all in float32."""

    def __init__(self, size, eps=1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.variance_epsilon = eps

    def forward(self, hidden_states):
        wide = hidden_states.to(torch.float32)
        wide = wide - wide.mean(-1, keepdim=True)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return (self.weight.to(torch.float32) * wide).to(hidden_states.dtype)


class DebertaLayerNorm(nn.Module):
    """Cast before weight and bias."""

    def __init__(self, size, eps=1e-12):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(size)), nn.Parameter(torch.zeros(size))
        self.variance_epsilon = eps

    def forward(self, hidden_states):
        dtype, wide = hidden_states.dtype, hidden_states.float()
        wide = wide - wide.mean(-1, keepdim=True)
        wide = wide / torch.sqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * wide.to(dtype) + self.bias


class OlmoLayerNorm(nn.Module):
    """No tensors at all, and an eps that only the forward knows."""

    def __init__(self, size):
        super().__init__()
        self.normalized_shape = (size,)

    def forward(self, hidden_states):
        wide = hidden_states.to(torch.float32)
        return F.layer_norm(wide, self.normalized_shape, None, None, 1e-5).to(hidden_states.dtype)


class LayerNormOfOpenClip(nn.LayerNorm):
    """torch's, cast back to the input's dtype."""

    def forward(self, x):
        y = F.layer_norm(x.float(), self.normalized_shape, self.weight.float(), self.bias.float())
        return y.to(x.dtype)


class LayerNorm2d(nn.Module):
    """Segment Anything's: over the channels of (N, C, H, W)."""

    def __init__(self, channels, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x):
        u = x.mean(1, keepdim=True)
        s = (x - u).pow(2).mean(1, keepdim=True)
        x = (x - u) / torch.sqrt(s + self.eps)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class DetrFrozenBatchNorm2d(nn.Module):
    """Four buffers, and an eps that only the forward knows."""

    def __init__(self, channels):
        super().__init__()
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x):
        scale = (
            self.weight.reshape(1, -1, 1, 1)
            * (self.running_var.reshape(1, -1, 1, 1) + 1e-5).rsqrt()
        )
        shift = self.bias.reshape(1, -1, 1, 1) - self.running_mean.reshape(1, -1, 1, 1) * scale
        return x * scale + shift


class GlobalLayerNorm(nn.Module):
    """Over channels and positions together: group norm of one group."""

    def __init__(self, channels, eps=1e-8):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x):
        axes = tuple(range(1, x.dim()))
        mean = x.mean(axes, keepdim=True)
        var = (x - mean).pow(2).mean(axes, keepdim=True)
        over = (-1, *[1] * (x.dim() - 2))
        return self.weight.view(over) * (x - mean) / (var + self.eps).sqrt() + self.bias.view(over)


class BatchNormMish(nn.BatchNorm2d):
    """Batch norm with an activation of its own."""

    def __init__(self, channels):
        super().__init__(channels)
        self.activation = nn.Mish()

    def forward(self, x):
        return self.activation(super().forward(x))


class GroupNormPReLU(nn.GroupNorm):
    """Group norm with an activation that learns."""

    def __init__(self, channels):
        super().__init__(2, channels)
        self.act = nn.PReLU()

    def forward(self, x):
        return self.act(F.group_norm(x, 2, self.weight, self.bias, self.eps))


class UnbiasedLayerNorm(nn.Module):
    """x.std() divides by n - 1, and eps stands outside the root (The Annotated Transformer)."""

    def __init__(self, size, eps=1e-6):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(size)), nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, x):
        mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
        return self.weight * (x - mean) / (std + self.eps) + self.bias


class ScaleNorm(LlamaRMSNorm):
    """eps outside the root, which only small inputs show."""

    def forward(self, x):
        return self.weight * x / (x.pow(2).mean(-1, keepdim=True).sqrt() + self.variance_epsilon)


class NoisyNorm(LlamaRMSNorm):
    """Another function in training."""

    def forward(self, x):
        y = super().forward(x)
        return y + torch.randn_like(y) if self.training else y


class DetachedNorm(LlamaRMSNorm):
    """The same outputs, other gradients."""

    def forward(self, x):
        rms = (x.detach().pow(2).mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()
        return self.weight * x * rms


class SimpleNorm(LlamaRMSNorm):
    """timm's: divides by the standard deviation, keeps the mean."""

    def forward(self, x):
        return self.weight * x * (x.var(-1, keepdim=True) + self.variance_epsilon).rsqrt()


class GatedRMSNorm(LlamaRMSNorm):
    """A second argument, where normkit's layers take a mask."""

    def forward(self, x, gate=None):
        return super().forward(x if gate is None else x * F.silu(gate))


class GammaNorm(nn.Module):
    """Its weight has another name in the state dict."""

    def __init__(self, size):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(size))

    def forward(self, x):
        return F.rms_norm(x, self.gamma.shape, self.gamma, 1e-6)


class TrainableFrozenBatchNorm(nn.BatchNorm2d):
    """Fixed statistics with a weight that learns: freeze() of BatchNorm, not FrozenBatchNorm."""

    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)


class PreNorm(nn.Module):
    """Called a norm, and made of a norm and a layer."""

    def __init__(self, size):
        super().__init__()
        self.norm, self.fn = nn.LayerNorm(size), nn.Linear(size, size)

    def forward(self, x):
        return self.fn(self.norm(x))


def shaken(module):
    """The module with values that no norm starts from."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5, generator=generator)
    return module
