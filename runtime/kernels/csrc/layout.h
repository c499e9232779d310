// Index layouts: the 64-byte header, its checks, and reading any layout one row at a time.
#pragma once

#include "common.h"

namespace fx {

// Layout numbers; runtime/kernels/layout.py packs them, and has the same table.
enum LayoutId : uint32_t {
    PLAIN = 1,  // [tap][m][output], one byte each
    LANES = 2,  // 32-bit lanes: output, 8 (K <= 16, 4 bits each) or 6 (K = 32, 5 bits each) sub-spaces per lane
    ROWS = 3,   // [panel of 256 outputs][m][output, rounded up to 64], one byte each
    PAIRS = 4,  // K <= 16: [panel of 256 outputs][pair of sub-spaces][output, rounded up to 32], even | odd << 4
    CONV1 = 5,  // blocks of 64 channels, 1, 2 or 4 sub-spaces interleaved: pq_conv_layout.cpp
    CONV2 = 6,
    CONV4 = 7,
};

constexpr int64_t HEADER_BYTES = 64;
constexpr int64_t PANEL = 256;  // outputs of a panel of LANES, ROWS and PAIRS

// A checked header. `payload` has exactly taps * tap_bytes(*this) bytes.
struct Layout {
    uint32_t id = 0, codewords = 0, taps = 0, subspaces = 0, outputs = 0, groups = 0;
    const uint8_t* payload = nullptr;
};

// Reads and checks `bytes` bytes at `data`; OK or BAD_LAYOUT.
int read_layout(const uint8_t* data, int64_t bytes, Layout* layout);

// Bytes of the payload per tap.
int64_t tap_bytes(const Layout& layout);

// Indices of sub-space m, outputs begin..begin+count-1, of one tap -> `row`; always below the number of code words.
void unpack_row(const Layout& layout, int64_t tap, int64_t m, int64_t begin, int64_t count, uint8_t* row);

}  // namespace fx
