"""Random programs of views and in-place writes: the functional graph computes what eager torch computes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from fxpress.ir.trace import trace
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

Step = tuple[str, int, int]
MAX_RANK = 6


def dim_of(t: Tensor, number: int) -> int:
    """A dimension that is not the batch."""
    return 1 + number % (t.dim() - 1)


# from a tensor, a dimension of it and a number to a view of it
VIEWS: dict[str, Callable[[Tensor, int, int], Tensor]] = {
    "slice": lambda t, d, n: t.narrow(d, 0, t.shape[d])[(slice(None),) * d + (slice(n % t.shape[d], None),)],
    "step": lambda t, d, n: t[(slice(None),) * d + (slice(None, None, 2),)],
    "select": lambda t, d, n: t.select(d, n % t.shape[d]) if t.dim() > 2 else t,
    "transpose": lambda t, d, n: t.transpose(d, 1),
    "permute": lambda t, d, n: t.permute(0, *reversed(range(1, t.dim()))),
    "movedim": lambda t, d, n: t.movedim(d, -1),
    "reshape": lambda t, d, n: t.reshape(t.shape[0], -1),
    "split": lambda t, d, n: t.split(1 + n % t.shape[d], d)[-1],
    "chunk": lambda t, d, n: t.chunk(2, d)[0],
    "unbind": lambda t, d, n: t.unbind(d)[n % t.shape[d]] if t.dim() > 2 else t,
    "unsqueeze": lambda t, d, n: t.unsqueeze(d) if t.dim() < MAX_RANK else t,
    "squeeze": lambda t, d, n: t.squeeze(d) if t.dim() > 2 else t,
    "contiguous": lambda t, d, n: t.contiguous(),
    "dropout": lambda t, d, n: nn.functional.dropout(t, 0.3, training=False),
    "diagonal": lambda t, d, n: torch.diagonal(t, dim1=1, dim2=2) if t.dim() > 2 else t,
}
WRITES: dict[str, Callable[[Tensor, int, int], object]] = {
    "add": lambda t, d, n: t.add_(n),
    "relu": lambda t, d, n: t.relu_(),
    "fill": lambda t, d, n: t.select(d, n % t.shape[d]).fill_(n),
    "mask": lambda t, d, n: t.masked_fill_(t > 3, 0.5),
    "assign": lambda t, d, n: t.narrow(d, 0, 1).copy_(t.narrow(d, t.shape[d] - 1, 1).clone()),
    "augment": lambda t, d, n: t.__setitem__((slice(None), 0), t[:, 0] * 2),
}


class Program(nn.Module):
    """Runs steps on a growing list of tensors; every one of them is an output."""

    def __init__(self, steps: list[Step]) -> None:
        super().__init__()
        self.steps = steps

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        live = [x * 2, x + 1]
        for name, index, number in self.steps:
            t = live[index % len(live)]
            if name in VIEWS:
                live.append(VIEWS[name](t, dim_of(t, number), number))
            elif name in WRITES:
                WRITES[name](t, dim_of(t, number), number)
            else:
                live.append(t * 0.5 + 1)
        return tuple(live)


names = st.sampled_from([*VIEWS, *WRITES, *WRITES, *WRITES, "new"])
steps = st.lists(st.tuples(names, st.integers(0, 9), st.integers(0, 5)), min_size=3, max_size=12)


@settings(max_examples=40)
@given(steps)
def test_random_program(steps: list[Step]) -> None:
    model = Program(steps).eval()
    graph = trace(model, torch.randn(2, 3, 4, 4))
    for batch in (2, 3) if graph.dynamic_batch else (2,):
        x = torch.randn(batch, 3, 4, 4)
        for ours, theirs in zip(graph(x), model(x.clone()), strict=True):
            torch.testing.assert_close(ours, theirs)
