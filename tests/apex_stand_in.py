"""NVIDIA apex where there is none and no GPU: what mtfast calls of it, with apex's signatures, as strict
about arguments as apex is, but for where tensors lie. DeepSpeed's Adam has the same kernel."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `apex` and its compiled modules importable."""
    for name, contents in {
        "apex": {},
        "apex.optimizers": {"FusedAdam": FusedAdam},
        "apex.normalization": {},
        "apex.normalization.fused_layer_norm": {"fused_layer_norm_affine": fused_layer_norm_affine},
        "apex.mlp": {"MLP": MLP},
        "amp_C": {"multi_tensor_adam": multi_tensor_adam},
        "fused_layer_norm_cuda": {},
        "mlp_cuda": {},
    }.items():
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)


def multi_tensor_adam(
    chunk_size, noop, tensor_lists, lr, beta1, beta2, epsilon, step, mode, bias_correction, weight_decay
) -> None:
    """Adam's update by its definition, in float64; mode 1 decays the weights apart from the gradient."""
    assert {type(x) for x in (lr, beta1, beta2, epsilon, weight_decay)} == {float}, "the kernel takes numbers"
    assert type(step) is int and step >= 1 and mode == 1 and bias_correction == 1
    assert noop.dtype == torch.int32 and not noop.any()
    for gradient, weight, average, square in zip(*tensor_lists, strict=True):
        for x in (gradient, average, square):
            assert x.shape == weight.shape and x.is_contiguous() and x.device == weight.device
            assert x.dtype == weight.dtype == torch.float32
        g, w = gradient.double(), weight.double()
        m = beta1 * average.double() + (1 - beta1) * g
        v = beta2 * square.double() + (1 - beta2) * g**2
        change = m / (1 - beta1**step) / ((v / (1 - beta2**step)).sqrt() + epsilon)
        for x, value in ((average, m), (square, v), (weight, w - lr * (change + weight_decay * w))):
            x.data.copy_(value)


class FusedAdam(Optimizer):
    """Counts the steps of a group of weights, where it has any."""

    def __init__(
        self,
        params,
        lr=1e-3,
        bias_correction=True,
        betas=(0.9, 0.999),
        eps=1e-8,
        adam_w_mode=True,
        weight_decay=0.0,
        amsgrad=False,
        set_grad_none=True,
        capturable=False,
        master_weights=False,
    ) -> None:
        assert adam_w_mode and not (amsgrad or capturable or master_weights), "mtfast asks for none of these"
        settings = {"lr": lr, "bias_correction": bias_correction, "betas": betas, "eps": eps}
        super().__init__(params, {**settings, "weight_decay": weight_decay})

    def step(self, closure=None) -> None:  # type: ignore[override]
        for group in filter(lambda group: group["params"], self.param_groups):
            group["step"] = group.get("step", 0) + 1
            lists: list[list[Tensor]] = [[], [], [], []]
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state |= {name: torch.zeros_like(weight.data) for name in ("exp_avg", "exp_avg_sq")}
                found = (weight.grad, weight, state["exp_avg"], state["exp_avg_sq"])
                for tensors, x in zip(lists, found, strict=True):
                    tensors.append(x)
            rest = (*group["betas"], group["eps"], group["step"], 1, int(group["bias_correction"]))
            noop = torch.zeros(1, dtype=torch.int32)
            multi_tensor_adam(2**16, noop, lists, group["lr"], *rest, group["weight_decay"])


def fused_layer_norm_affine(
    x: Tensor, weight: Tensor, bias: Tensor, normalized_shape, eps=1e-6, memory_efficient=False
) -> Tensor:
    """Takes weights of the input's dtype, and rounds nothing in between."""
    assert x.dtype == weight.dtype == bias.dtype and not memory_efficient
    assert weight.shape == bias.shape == torch.Size(normalized_shape) == x.shape[-1:]
    x_, weight_, bias_ = (y.double() for y in (x, weight, bias))
    centred = x_ - x_.mean(-1, keepdim=True)
    scale = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (centred * scale * weight_ + bias_).to(x.dtype)


class MLP(nn.Module):
    """Takes weights of the input's dtype, none of which may be bf16; relu comes behind the last layer too."""

    def __init__(self, mlp_sizes, bias=True, activation="relu") -> None:
        super().__init__()
        assert bias and activation == "relu", "mtfast asks for no other"
        self.shapes = list(zip(mlp_sizes[1:], mlp_sizes[:-1], strict=True))
        self.weights: list[Tensor] = []
        self.biases: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.bfloat16:
            raise RuntimeError("\"mlp_forward\" not implemented for 'BFloat16'")
        assert [tuple(weight.shape) for weight in self.weights] == self.shapes
        for weight, bias in zip(self.weights, self.biases, strict=True):
            assert weight.dtype == bias.dtype == x.dtype
            x = (x @ weight.t() + bias).clamp_min(0)
        return x
