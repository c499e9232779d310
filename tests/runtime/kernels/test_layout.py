"""Index layouts: what is packed comes back, and nothing that is damaged is read."""

from __future__ import annotations

import pytest
import torch
from fxpress.ir.errors import KernelError
from fxpress.runtime import kernels
from fxpress.runtime.kernels import layout as layouts
from hypothesis import given
from hypothesis import strategies as st

LINEAR = (layouts.PLAIN, layouts.LANES, layouts.ROWS, layouts.PAIRS)
MOST = {layouts.PLAIN: 256, layouts.LANES: 32, layouts.ROWS: 256, layouts.PAIRS: 16}


@given(
    st.sampled_from(LINEAR), st.integers(1, 8), st.integers(1, 3), st.integers(1, 30), st.integers(1, 600), st.data()
)
def test_unpacking_gives_back_the_indices(
    number: int, bits: int, taps: int, subspaces: int, outputs: int, data: st.DataObject
) -> None:
    codewords = min(2**bits, MOST[number])
    groups = data.draw(st.sampled_from([g for g in (1, 2, 3) if outputs % g == 0]))
    indices = torch.randint(0, codewords, (taps, subspaces, outputs), dtype=torch.uint8)
    layout = layouts.pack(number, indices, codewords, groups)
    header, again = layouts.unpack(layout)
    assert torch.equal(again, indices)
    assert (header.layout, header.codewords, header.groups) == (number, codewords, groups)


def test_bytes_of_a_layer() -> None:
    """9216 x 4096 with 16 code words and sub-spaces of 4: half a byte per index; 32 code words: 5 1/3 bits."""
    indices = torch.zeros(1, 2304, 4096, dtype=torch.uint8)
    assert len(layouts.pack(layouts.LANES, indices, 16)) == 64 + 2304 * 4096 // 2
    assert len(layouts.pack(layouts.PAIRS, indices, 16)) == 64 + 2304 * 4096 // 2
    assert len(layouts.pack(layouts.LANES, indices, 32)) == 64 + 2304 * 4096 * 4 // 6


@pytest.mark.parametrize("tables", ["fp32", "int16", "int8"])
@pytest.mark.parametrize("codewords", [2, 4, 8, 16, 32, 64, 128, 256])
def test_prepared_for_each_isa(codewords: int, tables: str) -> None:
    indices = torch.randint(0, codewords, (1, 5, 40), dtype=torch.uint8)
    for isa in kernels.isas():
        with kernels.using(isa):
            assert torch.equal(layouts.unpack(kernels.prepare_linear(indices, codewords, tables))[1], indices)


def damaged() -> dict[str, torch.Tensor]:
    good = layouts.pack(layouts.LANES, torch.zeros(1, 20, 100, dtype=torch.uint8), 16)

    def with_word(offset: int, value: int) -> torch.Tensor:
        words = good[:64].clone().view(torch.int32)
        words[offset // 4] = value
        return torch.cat([words.view(torch.uint8), good[64:]])

    return {
        "empty": good[:0],
        "half a header": good[:40],
        "cut": good[:-1],
        "longer": torch.cat([good, good[:1]]),
        "mark": with_word(0, 0),
        "unknown layout": with_word(8, 99),
        "no layout": with_word(8, 0),
        "three code words": with_word(12, 3),
        "512 code words": with_word(12, 512),
        "code words beyond the layout's": with_word(12, 64),
        "no taps": with_word(16, 0),
        "many taps": with_word(16, 2**24 - 1),
        "negative sub-spaces": with_word(20, -1),
        "more sub-spaces": with_word(20, 25),
        "more outputs": with_word(24, 10_000),
        "groups": with_word(28, 3),
        "payload": with_word(32, 1),
        "huge payload": with_word(36, 1),
    }


@pytest.mark.parametrize("isa", kernels.isas())
@pytest.mark.parametrize("what", sorted(damaged()))
def test_damaged_layouts_are_refused(isa: str, what: str) -> None:
    codebook = torch.randn(20, 16, 2)
    with kernels.using(isa), pytest.raises(KernelError, match="index layout"):
        torch.ops.fxpress.pq_linear(torch.randn(1, 40), codebook, damaged()[what], None, 100, "fp32")


@pytest.mark.parametrize("isa", kernels.isas())
@pytest.mark.parametrize("codewords", [2, 8, 16, 32, 64, 128, 256])
def test_any_payload_is_memory_safe(isa: str, codewords: int) -> None:
    """Random bytes behind a right header: indices out of range are cut to their bits, nothing outside is read."""
    for number in LINEAR:
        if codewords > MOST[number]:
            continue
        layout = layouts.pack(number, torch.zeros(1, 11, 37, dtype=torch.uint8), codewords)
        layout[64:] = torch.randint(0, 256, layout[64:].shape, dtype=torch.uint8)
        for tables in ("fp32", "int16", "int8"):
            with kernels.using(isa):
                x, codebook = torch.ones(2, 22), torch.ones(11, codewords, 2)
                y = torch.ops.fxpress.pq_linear(x, codebook, layout, None, 37, tables)
            assert ((y > -0.01) & (y < 22.01)).all()  # an index past few code words finds a zero


def test_indices_are_checked() -> None:
    with pytest.raises(KernelError, match="An index is 16 where there are only 16 code words"):
        kernels.prepare_linear(torch.full((1, 2, 3), 16, dtype=torch.uint8), 16)
    with pytest.raises(KernelError, match="Indices are uint8"):
        kernels.prepare_linear(torch.zeros(1, 2, 3), 16)
    with pytest.raises(KernelError, match="power of two"):
        kernels.prepare_linear(torch.zeros(1, 2, 3, dtype=torch.uint8), 24)
