"""SelectionMask: the cut is complete forward and absent backward; hard cuts block; and it is a layer like any other."""

from __future__ import annotations

import copy

import pytest
import torch
from fxpress.ir import dialect
from fxpress.runtime.layers.selection_mask import LEAK, Alive, SelectionMask
from hypothesis import given
from hypothesis import strategies as st

from fxpress import OptionError


def masked(dim: int = 1, *, alive: Alive = "layers", dtype: torch.dtype = torch.float64) -> SelectionMask:
    layer = SelectionMask(4, dim, alive).to(dtype)
    with torch.no_grad():
        layer.mask.copy_(torch.tensor([0.5, -2.0, 1.5, 1.0]))
    layer.keep.copy_(torch.tensor([True, True, False, False]))
    return layer


def test_the_cut_is_complete_forward() -> None:
    x = torch.randn(3, 4, 5, dtype=torch.float64)
    expected = x * torch.tensor([0.5, -2.0, 0.0, 0.0], dtype=torch.float64)[:, None]
    layer = masked()
    assert torch.equal(layer(x)[:, :2], expected[:, :2])
    assert float(layer(x)[:, 2:].detach().abs().max()) <= LEAK * 1.5 * float(x.abs().max())
    assert torch.equal(masked().eval()(x), expected)
    with torch.no_grad():
        assert torch.equal(layer(x), expected)
    assert torch.equal(masked(alive="none")(x), expected)
    assert torch.equal(masked(alive="sums")(x), expected)
    assert layer.factors.tolist() == [0.5, -2.0, 0.0, 0.0]
    assert layer.cut.tolist() == [False, False, True, True]


@given(
    st.sampled_from([(3, 4), (2, 4, 5), (2, 4, 3, 2)]),
    st.sampled_from([1, -1]),
    st.integers(0, 15),
    st.sampled_from(["sums", "layers"]),
)
def test_backward_the_cut_does_not_exist(shape: tuple[int, ...], dim: int, bits: int, alive: Alive) -> None:
    order = list(shape)
    order[1], order[dim] = order[dim], order[1]
    x = torch.randn(order, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(order, dtype=torch.float64)
    layer = masked(dim, alive=alive)
    layer.keep.copy_(torch.tensor([bool(bits >> i & 1) for i in range(4)]))
    (layer(x) * weight).sum().backward()
    # autograd on the layer without its switch is the reference
    plain, mask = x.detach().requires_grad_(), layer.mask.detach().requires_grad_()
    view = [1] * len(order)
    view[dim] = 4
    (plain * mask.reshape(view) * weight).sum().backward()
    assert torch.allclose(x.grad, plain.grad, rtol=1e-12)
    assert torch.allclose(layer.mask.grad, mask.grad, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_relu_behind_it_lets_gradients_through(dtype: torch.dtype) -> None:
    x = torch.randn(64, 4).to(dtype).requires_grad_()
    layer = masked(dtype=torch.float32)
    torch.relu(layer(x)).sum().backward()
    open_at = x.detach() * layer.mask.detach() > 0
    assert torch.equal(x.grad != 0, open_at)
    assert bool((layer.mask.grad != 0).all())


def test_factors_alone_may_stay_alive() -> None:
    x = torch.randn(64, 4, dtype=torch.float64, requires_grad=True)
    layer = masked(alive="factors")
    torch.relu(layer(x)).sum().backward()
    assert bool((x.grad[:, 2:] == 0).all())
    assert bool((layer.mask.grad != 0).all())


def test_without_the_leak_a_relu_lets_nothing_through() -> None:
    layer = masked(alive="sums")
    x = torch.randn(64, 4, dtype=torch.float64)
    torch.relu(layer(x)).sum().backward()
    assert layer.mask.grad[2:].tolist() == [0, 0]
    layer.mask.grad = None
    torch.relu(layer(x) + 1).sum().backward()  # in a sum it does
    assert bool((layer.mask.grad[2:] != 0).all())


def test_what_may_be_alive() -> None:
    with pytest.raises(OptionError, match="alive is 'all'; allowed: none, sums, factors, layers"):
        SelectionMask(4, 1, "all")  # type: ignore[arg-type]


def test_a_hard_cut_blocks_gradients() -> None:
    x = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    layer = masked(alive="none")
    layer(x).square().sum().backward()
    assert layer.mask.grad[2:].tolist() == [0, 0]
    assert bool((layer.mask.grad[:2] != 0).all())
    assert bool((x.grad[:, 2:] == 0).all())


def test_gradients_where_nothing_is_cut() -> None:
    layer = SelectionMask(3).double()
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    mask = torch.randn(3, dtype=torch.float64, requires_grad=True)

    def call(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, {"mask": mask}, (x,))

    assert torch.autograd.gradcheck(call, (x, mask))


def test_only_what_needs_a_gradient_gets_one() -> None:
    layer = masked()
    layer.mask.requires_grad_(False)
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    layer(x).sum().backward()
    assert layer.mask.grad is None
    assert torch.equal(x.grad, layer.mask.expand(2, 4))


def test_the_dtype_of_the_input_stays() -> None:
    layer = masked(dtype=torch.float32)
    x = torch.randn(2, 4, 3, dtype=torch.bfloat16, requires_grad=True)
    y = layer(x)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert layer.mask.grad.dtype == torch.float32
    assert x.grad.dtype == torch.bfloat16


def test_compiles() -> None:
    layer = masked()
    x = torch.randn(2, 4, 3, dtype=torch.float64)
    fast = torch.compile(copy.deepcopy(layer), backend="aot_eager")
    y = fast(x)
    assert torch.allclose(y, layer(x), rtol=1e-12)
    y.sum().backward()
    layer(x).sum().backward()
    assert torch.allclose(fast.mask.grad, layer.mask.grad)


def test_exports() -> None:
    layer = masked().eval()
    x = torch.randn(2, 4, 3, dtype=torch.float64)
    assert torch.equal(torch.export.export(layer, (x,)).module()(x), layer(x))


def test_is_rebuilt_from_its_configuration() -> None:
    twin = dialect.build("SelectionMask", dialect.config(SelectionMask(5, -1, "none")))
    assert isinstance(twin, SelectionMask)
    assert (twin.channels, twin.dim, twin.alive, twin.keep.dtype) == (5, -1, "none", torch.bool)
    assert repr(masked()) == "SelectionMask(4, dim=1, alive='layers', on=2)"
    assert repr(twin) == "SelectionMask(5, dim=-1, alive='none')"


def test_wrong_number_of_channels() -> None:
    with pytest.raises(RuntimeError):
        masked()(torch.ones(2, 5, 3))
