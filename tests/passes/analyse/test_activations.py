"""Statistics of activations against numpy on all activations at once."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fxpress.ir.errors import DataError, ModelError, OptionError
from fxpress.ir.graph import Graph
from fxpress.ir.trace import trace
from fxpress.passes.analyse.activations import (
    ActivationStatistics,
    ChannelAccumulator,
    activation_places,
    activation_statistics,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn


class Net(nn.Module):
    """Two convolutions with a residual sum, one whose first channel is dead, tokens, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.inner = nn.Conv2d(6, 5, 3, padding=1)
        self.outer = nn.Conv2d(5, 6, 3, padding=1)
        self.mix = nn.Linear(6, 7)
        self.head = nn.Linear(7, 4)
        with torch.no_grad():
            self.inner.weight[0], self.inner.bias[0] = 0, -1

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = (x + self.outer(self.inner(x).relu())).relu()
        tokens = x.flatten(2).transpose(1, 2)
        return self.head(self.mix(tokens).relu().mean(1))


@pytest.fixture
def graph() -> Graph:
    return trace(Net(), torch.randn(2, 3, 6, 6))


def loader(*sizes: int, dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [(torch.randn(n, 3, 6, 6, generator=generator).to(dtype), torch.zeros(n).long()) for n in sizes]


def all_activations(graph: Graph, data: list[tuple[Tensor, Tensor]], node: str) -> np.ndarray:
    """(channels, images, positions), from an interpreter that runs once on everything."""

    class Keep(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> object:
            value = super().run_node(n)
            if n.name == node:
                self.found = value
            return value

    keep = Keep(graph.module.eval())
    with torch.no_grad():
        keep.run(torch.cat([x for x, _ in data]), enable_io_processing=False)
    found = keep.found.double()
    return (
        found.movedim(2 if found.ndim == 3 else 1, 0).flatten(2).numpy()
        if found.ndim > 2
        else found.T[..., None].numpy()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("node", ["stem", "relu_1", "relu_2", "mix", "head", "x"])
def test_against_numpy(dtype: torch.dtype, node: str) -> None:
    graph = trace(Net().to(dtype), torch.randn(2, 3, 6, 6, dtype=dtype))
    data = loader(5, 3, 1, dtype=dtype)
    found = activation_statistics(graph, data, places=[node])[node]
    values = all_activations(graph, data, node)
    flat = values.reshape(len(values), -1)
    assert found.count == flat.shape[1]
    # a batch of another size may round its convolutions otherwise
    close = {"rtol": 1e-5, "atol": 1e-6} if dtype is not torch.bfloat16 else {"rtol": 2e-2, "atol": 2e-2}
    np.testing.assert_allclose(found.mean, flat.mean(1), **close)
    np.testing.assert_allclose(found.variance, flat.var(1), **close)
    np.testing.assert_allclose(found.std, flat.std(1), **close)
    np.testing.assert_allclose(found.zeros, (flat == 0).mean(1), atol=0.01)
    np.testing.assert_allclose(found.minimum, flat.min(1), **close)
    np.testing.assert_allclose(found.maximum, flat.max(1), **close)
    assert (found.histogram.counts.sum(1).numpy() == flat.shape[1]).all()
    assert (found.pooled.counts.sum(1).numpy() == values.shape[1]).all()
    np.testing.assert_allclose(
        found.entropy, numpy_entropy(values.mean(2)), atol=0.4 if dtype is torch.bfloat16 else 1e-9
    )


def numpy_entropy(pooled: np.ndarray, bins: int = 128) -> np.ndarray:
    """Entropies of rows with bins of one width, a power of two, such that the widest row has at most `bins` of them."""
    width = 2.0**-60
    while (np.floor(pooled.max(1) / width) - np.floor(pooled.min(1) / width) >= bins).any():
        width *= 2
    counts = [np.unique(np.floor(row / width), return_counts=True)[1] / pooled.shape[1] for row in pooled]
    return np.array([-(share * np.log(share)).sum() for share in counts])


def test_half_precision_sums_do_not_overflow() -> None:
    """70,000 values near 60,000 would be infinite as a sum in float16, and 1 beside 2,048 is lost there."""
    accumulator = ChannelAccumulator(1, 1)
    values = torch.full((4, 1, 130, 130), 60000.0, dtype=torch.float16)
    accumulator.add(values)
    assert accumulator.result().mean[0] == float(values[0, 0, 0, 0])
    steps = ChannelAccumulator(1, 1)
    steps.add((torch.arange(4096).view(4, 1, 32, 32) % 2 + 1).half())
    assert steps.result().mean[0] == 1.5
    assert steps.result().variance[0] == 0.25


def test_places_are_what_later_layers_mix(graph: Graph) -> None:
    assert activation_places(graph) == ["relu", "relu_1", "transpose", "mean"]
    statistics = activation_statistics(graph, loader(4))
    assert list(statistics) == activation_places(graph)
    assert len(statistics) == 4
    assert statistics.images == 4
    assert statistics["transpose"].dim == 2
    assert statistics["relu_1"].zeros[0] == 1
    assert statistics["relu_1"].entropy[0] == 0
    assert (statistics["relu_1"].zeros[1:] < 1).all()


def test_memory_does_not_grow_with_the_number_of_images() -> None:
    accumulator = ChannelAccumulator(3, 1, bins=16)
    sizes = []
    for _ in range(3):
        accumulator.add(torch.randn(50, 3, 4, 4))
        held = [accumulator.moments.mean, accumulator.zeros, accumulator.values.counts, accumulator.pooled.counts]
        sizes.append([tensor.numel() for tensor in held])
    assert sizes == [[3, 3, 48, 48]] * 3


def equal(a: ActivationStatistics, b: ActivationStatistics) -> None:
    assert (a.images, list(a)) == (b.images, list(b))
    for node in a:
        one, two = a[node], b[node]
        assert one.count == two.count
        for field in ("mean", "variance"):
            np.testing.assert_allclose(getattr(one, field), getattr(two, field), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(one.zeros, two.zeros, atol=0.01)
        assert torch.equal(one.histogram.counts.sum(1), two.histogram.counts.sum(1))


def test_batch_size_and_limit_do_not_matter(graph: Graph) -> None:
    data = loader(12)
    whole = activation_statistics(graph, data)
    x, y = data[0]
    equal(activation_statistics(graph, [(x[i : i + 5], y[i : i + 5]) for i in (0, 5, 10)]), whole)
    more = [*data, *loader(3)]
    equal(activation_statistics(graph, more, limit=12), whole)


def test_errors(graph: Graph) -> None:
    with pytest.raises(DataError, match="is empty"):
        activation_statistics(graph, [])
    with pytest.raises(OptionError, match="no node or module 'stme'"):
        activation_statistics(graph, loader(1), places=["stme"])
    with torch.no_grad():
        graph.module.inner.bias[2] = torch.nan
    with pytest.raises(ModelError, match=r"36 of 180 activations of node 'relu_1' are NaN"):
        activation_statistics(graph, loader(1), places=["relu_1"])


def test_channels_along_the_images_are_refused() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x).mean((1, 2, 3))

    graph = trace(Odd(), torch.randn(2, 3, 6, 6))
    with pytest.raises(OptionError, match=r"shape \(2,\) has no channels"):
        activation_statistics(graph, loader(1), places=["mean"])


WORKER = """
import pickle, sys, torch
sys.path.insert(0, sys.argv[2])
import test_activations as t
torch.set_num_threads(1)
torch.manual_seed(0)
graph = t.trace(t.Net(), torch.randn(2, 3, 6, 6))
found = t.activation_statistics(graph, t.loader(5, 1, 4))
from accelerate import PartialState
state = PartialState()
assert (state.num_processes, found.images) == (2, 10)
pickle.dump(found, open(f"{sys.argv[1]}/{state.process_index}", "wb"))
"""


@given(st.integers(0, 9), st.integers(1, 8), st.integers(0, 2**32 - 1))
def test_two_parts_are_the_whole(first: int, second: int, seed: int) -> None:
    """However the images are dealt out, also when one gets none."""
    values = torch.randn(first + second, 3, 4, generator=torch.Generator().manual_seed(seed)).relu() * 10**5
    one, two, whole = (ChannelAccumulator(3, 1, bins=16) for _ in range(3))
    if first:
        one.add(values[:first])
    two.add(values[first:])
    whole.add(values)
    one.merge(two)
    for field in ("mean", "variance", "entropy"):
        np.testing.assert_allclose(getattr(one.result(), field), getattr(whole.result(), field), rtol=1e-12)
    for field in ("zeros", "minimum", "maximum"):
        assert (getattr(one.result(), field) == getattr(whole.result(), field)).all()
    assert one.result().count == whole.result().count == (first + second) * 4
    assert torch.equal(one.values.counts, whole.values.counts)
    assert torch.equal(one.pooled.counts, whole.pooled.counts)


@pytest.mark.slow
def test_two_processes_give_what_one_gives(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["worker.py", str(tmp_path), str(Path(__file__).parent)]
    (tmp_path / "worker.py").write_text(WORKER)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    torch.manual_seed(0)
    whole = activation_statistics(trace(Net(), torch.randn(2, 3, 6, 6)), loader(5, 1, 4))
    for rank in (0, 1):
        with open(tmp_path / str(rank), "rb") as file:
            equal(pickle.load(file), whole)  # noqa: S301 - written above
