// Product quantization: what its fully connected and convolution kernels share.
#pragma once

#include "common.h"

namespace fx {

// Entries of a table in memory: K, or 16 where K is less (the rest is zero).
static inline int64_t table_stride(int64_t codewords) { return codewords < 16 ? 16 : codewords; }

// Sub-spaces for which there is room: the kernels read whole groups of 8 and 12. Those past the last are zero.
static inline int64_t table_rows(int64_t subspaces) { return ceil_div(subspaces, 24) * 24; }

// Bounds of |entry| and of the half range between which an image is rounded to integers; reference.py has the same.
constexpr float SMALLEST = 1e-30f, LARGEST = 1e30f;

struct Codebook {
    const float* data;   // M blocks of K * width numbers
    int64_t subspaces, codewords, width;
    bool dims_major;     // a block is [width][K] (prepare_codebook) rather than [K][width]
};

// What building has found out about some sub-spaces of an image.
struct TableRange {
    float half = 0;          // largest half range
    bool ordinary = true;    // every |entry| <= LARGEST, so none is infinite or NaN
    double offsets = 0;      // sum of the offsets
};

}  // namespace fx
