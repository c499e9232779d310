// Layers with one-bit weights (+1, -1) on activations of levels 0..3: what their kernels share.
//
// A sum is 2 S - X: S adds the levels that meet a weight +1, X those of the whole window. Levels are 0..3 whatever the
// bits, so that one code serves 1 and 2 bits; zero padding is level 0 and adds nothing to either.
#pragma once

#include <cmath>

#include "common.h"

namespace fx {

enum BinaryLayoutId : uint32_t {
    SIX = 1,     // [output / 64][group][ky][kx][64] indices into tables of groups of six channels
    PLANES = 2,  // [group][output / 32][tap][channel / 64][block of 8 outputs, up to 4][8] words of 64 weight bits
};

constexpr int64_t BINARY_HEADER = 64;
constexpr int64_t BESIDE = 4;       // blocks of eight outputs that lie beside each other in PLANES, fewer at the end
// |2 S - X| fits 16 bits up to here
constexpr int64_t WORD_SUMS = 32767 / 3;
constexpr int64_t TABLE_ROWS = 16;  // most kernel rows of layout SIX

struct BinaryLayout {
    uint32_t id = 0, groups = 0, outputs = 0, channels = 0, kh = 0, kw = 0;  // channels of one group
    const uint8_t* payload = nullptr;

    int64_t taps() const { return int64_t(kh) * kw; }
    int64_t blocks() const { return ceil_div(channels, 64); }
    int64_t outputs_per_group() const { return outputs / groups; }
    int64_t terms() const { return taps() * channels; }
};

// Of layout SIX: groups, and how many look-ups surely add up in a byte, at least one kernel row.
constexpr int64_t BYTE_SUMS = 255 / 18;
static inline int64_t six_groups(const BinaryLayout& layout) { return ceil_div(layout.channels, 6); }

// Where the words of a block of eight outputs of one group lie in PLANES, and how far apart they are.
struct PlanesPlace {
    int64_t first, step;
    PlanesPlace(int64_t block, int64_t blocks, int64_t words)
        : first((block / BESIDE * BESIDE * words + block % BESIDE) * 8),
          step(8 * least(BESIDE, blocks - block / BESIDE * BESIDE)) {}
};

// How levels are found, as the kernels read it: the level of x in channel c is how many of the three `edges[i][c]`
// x exceeds, infinite ones never. With `flip` the sign of x is changed first where flip[c] is -0.0f. NaN is level 0.
struct BinaryEdges {
    const float *edges, *flip;  // flip is null where one set of three edges serves all channels
    int64_t step;               // channels, or 0 where one set serves them all
};

static inline unsigned level_of(const BinaryEdges& at, float x, int64_t channel) {
    const float* edge = at.edges + (at.step ? channel : 0);
    const int64_t step = at.step ? at.step : 1;
    if (at.flip && std::signbit(at.flip[channel])) x = -x;
    return (x > edge[0]) + (x > edge[step]) + (x > edge[2 * step]);
}

// Activations and what the sums become. A caller leaves `edges` empty: binary_layer makes them of the thresholds.
struct BinaryCall {
    BinaryLayout layout;
    const void* x;       // float32 or, if `levels_in`, bytes 0..3 (the two low bits count)
    bool levels_in, channels_last;  // levels are always channels-last
    // 1 to 3 ascending numbers, or as many rows of `channels` each; unused with levels_in. A channel whose thresholds
    // descend (a batch norm with a negative scale is folded into them) counts those that x stays below; a single
    // threshold descends if it is followed by a row of -infinity.
    const float* threshold;
    int64_t threshold_count;
    bool threshold_per_channel;
    int64_t batch, channels, height, width;  // channels of all groups
    int64_t out_height, out_width, stride[2], padding[2], dilation[2];
    // float32: y = relu?(scale[o] sum + bias[o] + relu?(residual)), rounded after each operation; bias and residual may
    // be null; the residual lies as y does. With `cuts` (3, outputs) instead levels, channels-last bytes: how many of
    // the three the sum reaches.
    const float *scale, *bias, *residual;
    bool residual_relu, relu;
    const int32_t* cuts;
    void* y;
    bool y_channels_last;
    int threads;
    BinaryEdges edges;

    int64_t pixels() const { return height * width; }
    int64_t out_pixels() const { return out_height * out_width; }
};

// Header of a prepared layout; OK or BAD_LAYOUT. `layout` points into `data`.
int binary_read(const uint8_t* data, int64_t bytes, BinaryLayout* layout);

// One layer: everything is checked, then the best kernel of at most this instruction set runs. OK or why not. Uses this
// thread's scratch, and those of the pool's threads, but not SLOT_NETWORK.
int binary_layer(const BinaryCall& call, int isa);

// OK or NO_MEMORY.
using BinaryRun = int(const BinaryCall& call);

// By table: layout SIX.
extern BinaryRun* const binary_table_avx512;

// Functions of the popcount kernel for one instruction set.
struct BinaryPopcount {
    // `count` float32, the channels from `channel` on -> words of plane 0 and plane 1 in turn, ceil(count / 64) pairs
    void (*planes)(const float* x, int64_t count, const BinaryEdges& edges, int64_t channel, uint64_t* words);
    // the same from levels in bytes
    void (*level_planes)(const uint8_t* levels, int64_t count, uint64_t* words);
    // sums[row][o] = levels that meet +1, o < 8 * blocks; rows of `words` pairs; weights PLANES from a block on that is
    // the first of those beside it
    void (*dot)(const uint64_t* rows, int64_t count, int64_t words, const uint64_t* weights, int64_t blocks,
                int32_t* sums);
};
extern const BinaryPopcount binary_popcount_portable, binary_popcount_avx2, binary_popcount_avx512;

}  // namespace fx
