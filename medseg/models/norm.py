"""Instance norm that is quick to learn by on a processor, where torch's own backward pass takes two to three times
as long."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class _NormActivation(torch.autograd.Function):
    """Instance norm and, with a slope below 1, leaky ReLU of (B, C, ...) in channels-last order, as few passes over
    memory as torch's operations allow."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, epsilon: float, slope: float) -> Tensor:
        batch, channels = x.shape[:2]
        voxels = x.shape[2:].numel()
        out, mean, inverse = torch.native_group_norm(x, weight, bias, batch, channels, voxels, channels, epsilon)
        ctx.slope = slope
        if slope < 1:
            F.leaky_relu_(out, slope)
        ctx.save_for_backward(x, out if slope < 1 else None, mean, inverse, weight)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        x, out, mean, inverse, weight = ctx.saved_tensors
        spatial = tuple(range(2, x.ndim))
        mean, inverse = (v.view(*x.shape[:2], *(1 for _ in spatial)) for v in (mean, inverse))
        if out is not None:
            gradient = torch.ops.aten.leaky_relu_backward(gradient, out, ctx.slope, True)
        of_bias = gradient.sum(spatial, keepdim=True)
        of_weight = ((gradient * x).sum(spatial, keepdim=True) - mean * of_bias) * inverse
        scale = inverse * weight.view(-1, *(1 for _ in spatial))
        slope = -scale * inverse * of_weight / x[0, 0].numel()
        of_x = torch.addcmul(-scale * of_bias / x[0, 0].numel() - slope * mean, x, slope).addcmul_(gradient, scale)
        return of_x, of_weight.sum(0).flatten(), of_bias.sum(0).flatten(), None, None


def norm_activation(x: Tensor, weight: Tensor, bias: Tensor, epsilon: float, slope: float = 1.0) -> Tensor:
    """Instance norm of (B, C, ...) and, with a ``slope`` below 1, leaky ReLU. What it gives is in channels-last order,
    in which convolutions take little more than half as long."""
    order = torch.channels_last_3d if x.ndim == 5 else torch.channels_last
    out: Tensor = _NormActivation.apply(x.contiguous(memory_format=order), weight, bias, epsilon, slope)
    return out


class InstanceNorm(nn.Module):
    """torch's layer, whose weights it takes over; in training on a processor as `norm_activation` has it."""

    def __init__(self, norm: nn.InstanceNorm2d | nn.InstanceNorm3d) -> None:
        super().__init__()
        self.weight, self.bias, self.epsilon = norm.weight, norm.bias, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, ...) to as much."""
        if self.training and self.weight.device.type == "cpu" and not torch.compiler.is_compiling():
            return norm_activation(x, self.weight, self.bias, self.epsilon)
        return F.instance_norm(x, weight=self.weight, bias=self.bias, eps=self.epsilon)


def with_quick_norms(network: nn.Module) -> nn.Module:
    """The network, its learnt instance norms replaced, names and weights as they were."""
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.InstanceNorm2d | nn.InstanceNorm3d) and child.affine:
                module.add_module(name, InstanceNorm(child))
    return network
