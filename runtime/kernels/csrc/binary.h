// Layers with one-bit weights (+1, -1) on activations of levels 0..3: what their kernels share.
//
// A sum is 2 S - X: S adds the levels that meet a weight +1, X those of the whole window. Levels are 0..3 whatever the
// bits, so that one code serves 1 and 2 bits; zero padding is level 0 and adds nothing to either.
#pragma once

#include "common.h"

namespace fx {

enum BinaryLayoutId : uint32_t {
    SIX = 1,     // [channel / 64][piece of 14 / kw groups of 6 channels][output / 64][ky][group][kx][64]: table indices
    PLANES = 2,  // [group][output / 8][tap][channel / 64][8] words of 64 weight bits
};

constexpr int64_t BINARY_HEADER = 64;
constexpr int64_t GROUPS = 11;  // groups of six channels that hold a block of 64
constexpr int64_t CODES = 22;   // bytes for these 64 levels: byte t has the channels t, t + 22 and t + 44
// 18 is the largest entry of a table: so many fit a byte
constexpr int64_t BYTE_SUMS = 14;
// |2 S - X| fits 16 bits up to here
constexpr int64_t WORD_SUMS = 32767 / 3;

struct BinaryLayout {
    uint32_t id = 0, groups = 0, outputs = 0, channels = 0, kh = 0, kw = 0;  // channels of one group
    const uint8_t* payload = nullptr;

    int64_t taps() const { return int64_t(kh) * kw; }
    int64_t blocks() const { return ceil_div(channels, 64); }
    int64_t outputs_per_group() const { return outputs / groups; }
    int64_t terms() const { return taps() * channels; }
};

// Activations and what the sums become.
struct BinaryCall {
    BinaryLayout layout;
    const void* x;       // float32 or, if `levels_in`, bytes 0..3 (the two low bits count)
    bool levels_in, channels_last;  // levels are always channels-last
    float threshold[3];  // a level is how many of these x exceeds (infinite for those that 1 bit has not)
    int64_t batch, channels, height, width;  // channels of all groups
    int64_t out_height, out_width, stride[2], padding[2], dilation[2];
    // float32: y = scale[o] sum + bias[o]; levels: how many of thresholds[3][o] the sum reaches, channels-last bytes
    const float *scale, *bias;
    const int32_t* thresholds;
    void* y;
    bool y_channels_last;
    int threads;

    int64_t pixels() const { return height * width; }
    int64_t out_pixels() const { return out_height * out_width; }
};

// OK or NO_MEMORY.
using BinaryRun = int(const BinaryCall& call);

// By table: layout SIX, kw <= BYTE_SUMS, at most WORD_SUMS terms.
extern BinaryRun* const binary_table_avx512;

// Functions of the popcount kernel for one instruction set.
struct BinaryPopcount {
    // `count` float32 -> words of plane 0 and plane 1 in turn, ceil(count / 64) pairs
    void (*planes)(const float* x, int64_t count, const float* threshold, uint64_t* words);
    // sums[row][o] = levels that meet +1, o < 8 * blocks; rows of `words` pairs, `row_words` apart; weights PLANES
    void (*dot)(const uint64_t* rows, int64_t count, int64_t words, const uint64_t* weights, int64_t blocks,
                int32_t* sums);
};
extern const BinaryPopcount binary_popcount_portable, binary_popcount_avx2, binary_popcount_avx512;

}  // namespace fx
