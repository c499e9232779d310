// Product-quantized convolution: what its portable driver (pq_conv.cpp) and its inner loops (pq_conv_*.cpp) share.
//
// Tables are integers of a known width, so that every instruction set and the reference in Python give the same bits:
//
//   s = round(x * fs), c = round(D * fd)   16-bit numbers of at most sample_top and code_top
//   a = sum_j c_j s_j                      32 bits, exact
//   "int8":  u = 64 + ((a >> shift) * multiplier + 2^14 >> 15)                      0..127, one byte
//   "int16": u = 8192 + round(float(a) * factor)                                    0..16383, two planes of 7 bits
//
// with shift, multiplier and factor such that the largest |a| of the image just fits. Sums of u are exact.
#pragma once

#include "layout.h"

namespace fx {

constexpr int64_t BLOCK = 64;         // output channels that are computed together
constexpr int64_t SUM_LIMIT = 516;    // 7-bit numbers whose sum fits 16 bits: 516 * 127 < 2^16
constexpr int32_t MIDDLE = 64;        // the entry that stands for 0

// The shape of one call. Strides and sizes are in elements.
struct ConvShape {
    int64_t images, channels, height, width, outputs;
    int64_t kernel[2], stride[2], padding[2], dilation[2], groups;
    int64_t out_height, out_width;
    int64_t subspaces, codewords, subwidth;
    int64_t group_channels, group_outputs;
};

// A max pool of rectified outputs: kernel (0: there is none), stride, padding; height and width of y.
struct ConvPool {
    int64_t kernel[2], stride[2], padding[2];
    int64_t height, width;
};

// One row of a pool, BLOCK channels.
struct PoolJob {
    const float* const* rows;  // [row_count][width][BLOCK] rectified: no number is negative
    int64_t row_count, width;
    int64_t kernel, stride, padding;  // of columns
    float* y;                         // [pixel * y_stride + channel]
    int64_t pixels, y_stride, channels;
};

// How tables and indices lie in memory. A term is `gang` neighbouring sub-spaces whose tables one instruction reads.
struct ConvTables {
    int64_t gang;         // sub-spaces per term: 1, 2 or 4
    int64_t entries;      // code words, at least 16 (some kernels want 64): bytes of one table
    int64_t terms;        // ceil(subspaces / gang)
    int64_t term_bytes;   // gang * entries
    int64_t pairs;        // 32-bit words of two 16-bit samples, as many as a sub-space has channels for
    int64_t columns;      // table columns of a row: those that some tap reads, and padding
    int64_t blocks;       // ceil(group_outputs / BLOCK)
    int64_t lane_chunk;   // entries that build() makes at once: 4 vectors of 32-bit lanes
    int64_t acc_bytes;    // accumulators of BLOCK channels of one pixel: 2 bytes each, or 4 where gang is 4
};

// One row of tables to build, of one group.
struct BuildJob {
    const int32_t* codebook;       // [term][chunk of 64, 32 or 16 bytes][pair][4][lane], two 16-bit numbers each
    const int32_t* const* planes;  // [terms * gang * pairs] -> samples of the row, one word per input column
    const int32_t* inputs;         // input column of each table column that is to be built
    const int32_t* targets;        // its table column
    int64_t count;
    uint8_t* tables[2];            // [term][column][term_bytes] of the low (or only) and the high plane
    int wide;                      // 0: 7-bit entries; 1: 14 bits in two planes
    int shift, multiplier;
    float factor;
};

// One step of a sum: a term's tables for the first output pixel, and its indices for the first block.
struct ConvStep {
    const uint8_t *table, *index;
};

// Adds the table entries of some steps to the accumulators of one row of output pixels, all blocks of a group.
struct SumJob {
    const ConvStep* steps;
    int64_t step_count;
    int64_t index_block;          // bytes from one block's indices to the next one's
    int64_t table_step;           // bytes between the tables of neighbouring output pixels
    int64_t pixels;
    uint8_t* acc;                 // [block][pixel][acc_bytes]
};

// (low + high * 128 - constant) * unit + bias -> y[pixel * y_stride + channel], one row of a block.
struct FinishJob {
    const uint8_t* acc[2];   // of both planes, the high one nullptr where there is one plane
    const int32_t* sums[2];  // [pixel][BLOCK] what decode() has taken out of them; nullptr: nothing
    int64_t pixels;
    int32_t constant;
    float unit;
    const float* bias;
    int relu;
    float* y;
    int64_t y_stride, channels;
};

// The same with exact tables of float32; members are used by exact_build (first part) or exact_sum (second part).
struct ExactJob {
    int64_t subspaces, entries, columns;
    const float* codebook;        // [m][j][entry]
    const float* const* planes;   // [m * subwidth + j] -> the row, nullptr where there is no such channel
    int64_t subwidth;
    const int32_t *inputs, *targets;
    int64_t count;
    float* tables;                // [m][column][entry]
    const float* const* rows;     // [row_count]
    const uint8_t* const* index;  // [row_count] of a kernel row: [tap][m][index_step]
    int64_t row_count, kernel_columns, column_step, pixel_step, index_step;
    int64_t pixels, channels;
    float* y;                     // [pixel][BLOCK]
};

// The inner loops of one instruction set.
struct ConvKernels {
    int64_t lanes;                            // 32-bit lanes of a vector
    void (*choose)(ConvTables* tables, int64_t subspaces);  // sets gang, given entries, which it may raise
    uint32_t (*largest)(const float* x, int64_t count);  // the largest bit pattern of |x|
    // even and odd (may be nullptr: zeros) channels -> words of two 16-bit samples
    void (*samples)(const float* even, const float* odd, int64_t count, float scale, int32_t* words);
    // sum of squares of `pairs` planes, `stride` words apart, times `scale` -> bounds; returns the largest
    float (*bounds)(const int32_t* words, int64_t stride, int64_t pairs, int64_t count, float scale, float* bounds);
    // the largest of `found` and of |a| in the tables of one sub-space, at the pixels whose bound is above peak_limit();
    // codebook and planes as in BuildJob, of the sub-space's term, in which it is number `sub`
    int32_t (*peak)(const ConvTables* tables, const int32_t* codebook, const int32_t* const* planes, int64_t sub,
                    const float* bounds, int64_t pixels, int32_t found);
    void (*build)(const ConvTables* tables, const BuildJob* job);
    void (*accumulate)(const ConvTables* tables, const SumJob* job);
    // accumulators of one block -> sums (or += where `add`), int32 [pixel][BLOCK], channels in order
    void (*decode)(const ConvTables* tables, const uint8_t* acc, int64_t pixels, int32_t* sums, int add);
    void (*finish)(const ConvTables* tables, const FinishJob* job);
    // the largest number of each window, NaN where there is one
    void (*pool)(const PoolJob* job);
    // float tables of one pixel column after the other: codebook [m][j][entry], planes [m][j] -> tables [m][column][entry]
    void (*exact_build)(const ExactJob* job);
    // adds entries to y[pixel][BLOCK], `channels` of them
    void (*exact_sum)(const ExactJob* job);
    // y[column * y_stride + row] = x[row * x_stride + column]
    void (*transpose)(const float* x, int64_t x_stride, int64_t rows, int64_t columns, float* y, int64_t y_stride);
};

extern const ConvKernels conv_portable, conv_avx2, conv_avx512;

// A table whose bound (the square of what it can reach, rounded) is not above this has no |a| above `found`.
static inline float peak_limit(int32_t found) { return 0.999f * float(found) * float(found); }

// Lane of a codebook vector -> code word within a chunk, such that packing 4 vectors to bytes gives code words in order.
static inline int64_t chunk_entry(int64_t vector, int64_t lane) { return lane / 4 * 16 + vector * 4 + lane % 4; }

// Byte of a term's tables in which code word k of its sub-space `sub` lies.
static inline int64_t term_byte(int64_t gang, int64_t entries, int64_t sub, int64_t k) {
    return gang == 4 ? k / 16 * 64 + k / 4 % 4 * 16 + sub * 4 + k % 4 : sub * entries + k;
}

// Lane of an index vector -> sub-space of its term and channel of its block.
static inline int64_t lane_sub(int64_t gang, int64_t lane) { return lane % gang; }
static inline int64_t lane_channel(int64_t gang, int64_t vector, int64_t lane) {
    return gang == 1 ? lane / 2 + lane % 2 * 32 : vector * (BLOCK / gang) + lane / gang;
}

// Layouts CONV1, CONV2 and CONV4: [group][block of 64 channels][term][tap][vector][64 lanes], one byte each, which is
// term_byte() of its index; what a few terms need lies together, so that it stays in the first-level cache. Gang 4 wants K <= 32, gang 2 wants K = 64.
int64_t conv_gang(const Layout& layout);
int64_t conv_entries(const Layout& layout);
int64_t conv_tap_bytes(const Layout& layout);
void conv_unpack_row(const Layout& layout, int64_t tap, int64_t m, int64_t begin, int64_t count, uint8_t* row);
// Any layout -> payload of that gang; the inverse of conv_unpack_row.
void conv_pack(const Layout& layout, int64_t gang, uint8_t* payload, uint8_t* row);

}  // namespace fx
