"""In-place operations: the graph computes what the model computes, whatever is a view of what."""

from __future__ import annotations

import textwrap

import pytest
import torch
from fxpress.ir.errors import TraceError
from fxpress.ir.trace import trace
from torch import Tensor, fx, nn

SNIPPETS = {
    "slice": "y = x * 2; y[:, :2] += x[:, 1:3]; return y",
    "copy to a slice": "y = x * 2; y[:, :2] = x[:, 1:3]; return y",
    "copy, broadcast": "y = x * 2; y[:, 1:3] = x[:, :1]; return y",
    "overlapping views": "y = x * 2; a = y[:, :2]; b = y[:, 1:]; a.add_(1); b.mul_(2); return a, b, y",
    "view": "y = x * 2; v = y.view(x.shape[0], -1); v.relu_(); return y + 1",
    "transpose": "y = x * 2; v = y.transpose(1, 2); v[:, 0] = 5; return y",
    "permute": "y = x * 2; v = y.permute(0, 2, 3, 1); v[..., 0].add_(3); v[:, 1].zero_(); return y",
    "movedim": "y = x * 2; y.movedim(1, -1)[..., 1].add_(2); return y",
    "split": "y = x * 2; a, b = y.split([1, 3], 1); a.sigmoid_(); b.add_(a); return y, b",
    "chunk": "y = x * 2; a, b = y.chunk(2, 1); a.sigmoid_(); return torch.cat([b, a], 1), y",
    "unbind": "y = x * 2; y.unbind(1)[2].mul_(3); return y",
    "fill": "y = x * 2; y[:, 0].fill_(2.0); y[:, 1].zero_(); return y",
    "index": "y = x * 2; y[:, torch.tensor([0, 2])] = 1.5; y[y > 2] = 0.0; return y",
    "masked fill": "y = x * 2; y.masked_fill_(y > 0, 3.0); y[:, 1:].clamp_(0, 1); return y",
    "flatten": "y = x * 2; v = y.flatten(2); v[:, :, 3].exp_(); return y, v",
    "unflatten": "y = x * 2; y.unflatten(1, (2, 2))[:, 1].neg_(); return y",
    "unsqueeze": "y = x * 2; v = y.unsqueeze(1); v.add_(1); w = v.squeeze(1); w[:, 0].mul_(7); return y, v, w",
    "in-place view": "y = x * 2; y.unsqueeze_(1); y.add_(1); y.squeeze_(1); y.transpose_(1, 2); return y",
    "inactive dropout": "y = x * 2; v = F.dropout(y, 0.5, self.training); v.add_(1); return y",
    "contiguous, no copy": "y = x * 2; v = y.contiguous(); v.add_(1); return y",
    "contiguous, a copy": "y = (x * 2).transpose(1, 2); v = y.contiguous(); v.add_(1); return y, v",
    "reshape, a copy": "y = (x * 2).transpose(1, 2); v = y.reshape(x.shape[0], -1); v.add_(1); return y, v",
    "reshape, no copy": "y = x * 2; v = y.reshape(x.shape[0], -1); v.add_(1); return y, v",
    "buffer of zeros": "y = torch.zeros_like(x); y[:, :2] = x[:, 2:]; y[:, 2:] = x[:, :2] * 2; return y",
    "padding by hand": "y = x.new_zeros(x.shape[0], 6, 5, 5); y[:, 1:5] = x; return y",
    "loop": "y = x * 1\nfor i in range(1, 4):\n  y[:, i] += y[:, i - 1]\nreturn y",
    "diagonal": "y = x * 2; torch.diagonal(y, dim1=2, dim2=3).add_(4); return y",
    "narrow": "y = x * 2; y.narrow(1, 1, 2).mul_(3); return y",
    "steps": "y = x * 2; y[:, :, ::2, 1::2] = 0; y[..., -1] += 1; return y",
    "read of an old view": "y = x * 2; v = y[:, 0]; y.add_(1); z = v * 2; y.mul_(3); return z, v, y",
    "one of two results": "a, b = x.topk(2, 1); a.add_(1); a[:, 0].mul_(2); return a, b",
    "swap": "y = x * 2; t = y[:, 0].clone(); y[:, 0] = y[:, 1]; y[:, 1] = t; return y",
    "write after a write": "y = x * 2; y[:, :2] += 1; v = y[:, 2:]; v += 3; w = y[:, 0]; w *= 2; return y, w",
    "no_grad": "y = x * 2\nwith torch.no_grad():\n  y[:, 0].add_(1)\n  z = y.relu_()\nreturn y, z",
    "one image of the batch": "y = x * 2; y[0] += 1; return y",
    "type is kept": "y = (x * 2).half(); y += x; z = (x * 9).int(); z += 2; z *= 3; return y, z",
    "many operations": "y = x * 2; y.addcmul_(x, x, value=0.5); y.lerp_(x, 0.3); y.pow_(2); y.sub_(x); return y",
    "activations": "y = x * 2; F.hardtanh_(y, -0.5, 0.5); F.leaky_relu_(y, 0.1); F.silu(y, inplace=True); return y",
    "scatter": "y = x * 2; y.cumsum_(1); y.index_add_(1, torch.tensor([0, 1]), x[:, :2]); return y",
    "the input itself": "z = x * 1; x[:, 0] = 1; return x, z",
}


def model_of(snippet: str) -> nn.Module:
    """A module whose forward pass is a snippet of code."""
    lines = [part for line in snippet.splitlines() for part in line.split("; ")]
    code = "def forward(self, x):\n" + textwrap.indent("\n".join(lines), "  ")
    names: dict[str, object] = {"torch": torch, "F": nn.functional}
    exec(code, names)  # noqa: S102 - the snippets above
    return type("Snippet", (nn.Module,), {"forward": names["forward"]})().eval()


def leaves(value: object) -> list[Tensor]:
    return list(value) if isinstance(value, tuple) else [value]  # type: ignore[list-item]


@pytest.mark.parametrize("snippet", SNIPPETS.values(), ids=SNIPPETS.keys())
def test_functional_form_is_exact(snippet: str) -> None:
    model = model_of(snippet)
    graph = trace(model, torch.randn(2, 4, 5, 5))
    assert not any(getattr(getattr(n.target, "_schema", None), "is_mutable", False) for n in graph.nodes)
    for batch in (1, 2, 3) if graph.dynamic_batch else (2,):
        x = torch.randn(batch, 4, 5, 5)
        for ours, theirs in zip(leaves(graph(x)), leaves(model(x.clone())), strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", ["overlapping views", "type is kept", "split", "padding by hand"])
def test_specs_are_what_runs(name: str) -> None:
    graph = trace(model_of(SNIPPETS[name]), torch.randn(2, 4, 5, 5))

    class Checking(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            value = super().run_node(n)
            if isinstance(value, Tensor):
                assert (n.meta["spec"].shape, n.meta["spec"].dtype) == (tuple(value.shape), value.dtype), n
            return value

    Checking(graph.module).run(*graph.example_args)


def test_callers_tensor_is_not_written_to() -> None:
    graph = trace(model_of(SNIPPETS["the input itself"]), torch.randn(2, 4, 5, 5))
    x = torch.randn(2, 4, 5, 5)
    before = x.clone()
    graph(x)
    assert torch.equal(x, before)


def test_usual_case_adds_no_node() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Hardswish(inplace=True))
    graph = trace(model, torch.randn(2, 3, 8, 8))
    ops = [str(n.target) for n in graph.nodes if n.op == "call_function"]
    assert ops == ["aten.relu.default", "aten.hardswish.default"]


def test_write_back_of_an_augmented_slice_is_one_scatter() -> None:
    graph = trace(model_of(SNIPPETS["slice"]), torch.randn(2, 4, 5, 5))
    ops = [str(n.target) for n in graph.nodes if n.op == "call_function"]
    assert ops.count("aten.slice_scatter.default") == 1
    assert "aten.copy.default" not in ops


def test_overlapping_windows_are_refused_by_line() -> None:
    class Windows(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x * 2
            y.unfold(1, 2, 1).add_(1)
            return y

    with pytest.raises(TraceError, match=r"test_functional\.py:\d+ y\.unfold\(1, 2, 1\)"):
        trace(Windows(), torch.randn(2, 4, 5))
