"""An op's gradient cannot be differentiated again: each way to try it says so, none takes it for constant."""

import pytest
import torch
from torch.autograd import forward_ad

from mtfast.ops import (
    bias_gelu,
    concat_mlp,
    dropout_add_layer_norm,
    packed_attention,
    packed_attention_cls,
    packed_attention_qkv,
)

CU = torch.tensor([0, 5], dtype=torch.int32)
MLP = [
    torch.linspace(-1, 1, n).double().view(shape)
    for n, shape in ((256, (4, 64)), (4, 4), (8, (2, 4)), (2, 2))
]


def attention(x):
    return packed_attention(x, x, x, CU, 5)


def attention_qkv(x):
    return packed_attention_qkv(x[:, None].expand(-1, 3, -1, -1).contiguous(), CU, 5)


def attention_cls(x):
    return packed_attention_cls(x[:1], x, x, CU, 5)


def mlp(x):
    x = x.flatten(1)
    return concat_mlp(x, x, *MLP, activation="tanh")


def layer_norm(x):
    return dropout_add_layer_norm(x, x * x, torch.linspace(1, 2, 32).double(), torch.zeros(32).double())


def raw_attention(x):
    return torch.ops.mtfast.packed_attention(x, x, x, CU, 5, 0.0, 0.2, None)[0]


OPS = {
    "packed_attention": attention,
    "packed_attention_qkv": attention_qkv,
    "packed_attention_cls": attention_cls,
    "concat_mlp": mlp,
    "bias_gelu": lambda x: bias_gelu(x, MLP[1].repeat(8)),
    "dropout_add_layer_norm": layer_norm,
    "torch.ops": raw_attention,
}


def gradient_penalty(f, x):
    """Of a sum, whose gradient's own gradient needs no grad: what hid the fault."""
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(f(x), x, create_graph=True)
    gradient.square().sum().backward()


def penalty_beside_loss(f, x):
    x.requires_grad_()
    loss = f(x)
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    (loss + gradient.square().sum()).backward()


def backward_twice(f, x):
    x.requires_grad_()
    f(x).backward(create_graph=True)
    x.grad.sum().backward()


WAYS = {
    "grad, then backward": gradient_penalty,
    "a penalty beside the loss": penalty_beside_loss,
    "backward(create_graph=True)": backward_twice,
    "gradcheck's own": lambda f, x: torch.autograd.gradgradcheck(f, x.requires_grad_()),
    "functional.hvp": lambda f, x: torch.autograd.functional.hvp(f, x, torch.ones_like(x)),
    "functional.vhp": lambda f, x: torch.autograd.functional.vhp(f, x, torch.ones_like(x)),
    "functional.hessian": torch.autograd.functional.hessian,
    "functional.hessian, vectorised": lambda f, x: torch.autograd.functional.hessian(f, x, vectorize=True),
    "functional.jvp": lambda f, x: torch.autograd.functional.jvp(f, x, torch.ones_like(x)),
    "func.grad of grad": lambda f, x: torch.func.grad(lambda y: torch.func.grad(f)(y).square().sum())(x),
    "func.jacrev of grad": lambda f, x: torch.func.jacrev(torch.func.grad(f))(x),
    "func.vjp of grad": lambda f, x: torch.func.vjp(torch.func.grad(f), x)[1](torch.ones_like(x)),
    "autograd of func.grad": lambda f, x: torch.func.grad(f)(x.requires_grad_()).sum().backward(),
    "func.grad of autograd.grad": lambda f, x: torch.func.grad(
        lambda y: torch.autograd.grad(f(y), y, create_graph=True)[0].sum()
    )(x),
}
FORWARD_WAYS = {
    "func.jacfwd of grad": lambda f, x: torch.func.jacfwd(torch.func.grad(f))(x),
    "func.hessian": lambda f, x: torch.func.hessian(f)(x),
    "func.jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),)),
    "func.jvp of grad": lambda f, x: torch.func.jvp(torch.func.grad(f), (x,), (torch.ones_like(x),)),
    "func.jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "func.linearize": lambda f, x: torch.func.linearize(f, x),
}


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(5, 1, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.filterwarnings("ignore:Using backward")
@pytest.mark.parametrize("power", (1, 2))
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("op", OPS)
def test_second_derivatives_are_refused(op, way, power, x):
    # The transforms of torch.func do not take an op that is called bare, and say so.
    bare = op == "torch.ops" and "func." in way
    with pytest.raises(RuntimeError, match="setup_context" if bare else "has no second derivative"):
        WAYS[way](lambda y: OPS[op](y).pow(power).sum(), x)


PUBLIC = [op for op in OPS if op != "torch.ops"]


@pytest.mark.parametrize("way", FORWARD_WAYS)
@pytest.mark.parametrize("op", PUBLIC)
def test_forward_mode_is_refused(op, way, x):
    with pytest.raises(RuntimeError, match=r"forward|jvp"):
        FORWARD_WAYS[way](lambda y: OPS[op](y).square().sum(), x)


@pytest.mark.parametrize("grad_enabled", (True, False))
@pytest.mark.parametrize("op", PUBLIC)
def test_dual_numbers_are_refused(op, grad_enabled, x):
    with torch.set_grad_enabled(grad_enabled), forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(RuntimeError, match="forward mode AD"):
            OPS[op](dual)


@pytest.mark.parametrize("op", OPS)
def test_compiled_second_derivatives_are_refused(op, x):
    f = torch.compile(lambda y: OPS[op](y).sum(), backend="aot_eager", fullgraph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        gradient_penalty(f, x)


@pytest.mark.parametrize("op", OPS)
def test_create_graph_by_itself_costs_nothing(op, x):
    x.requires_grad_()
    (plain,) = torch.autograd.grad(OPS[op](x).square().sum(), x)
    (with_graph,) = torch.autograd.grad(OPS[op](x).square().sum(), x, create_graph=True)
    assert torch.equal(plain, with_graph)
