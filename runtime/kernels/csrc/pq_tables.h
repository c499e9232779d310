// Tables of product quantization: building them from a codebook, and rounding them to integers.
//
// Everything is static and is compiled once per instruction set, by the file that includes it. The products of an entry
// are added in the order of j and rounded one by one (-ffp-contract=off), so that all sets and reference.py give the
// same bits.
#pragma once

#include <cstring>

#include "pq.h"

namespace fx {

namespace {

// [K][width] -> [width][K].
FX_INLINE void transpose_block(const float* FX_RESTRICT block, int64_t codewords, int64_t width, float* FX_RESTRICT out) {
    for (int64_t k = 0; k < codewords; k++)
        for (int64_t j = 0; j < width; j++) out[j * codewords + k] = block[k * width + j];
}

// One table of K >= 16 entries, sixteen at a time: out[k] = sum_j block[j][k] x[j].
FX_INLINE void build_row(const float* FX_RESTRICT block, const float* FX_RESTRICT x, int64_t codewords, int64_t width,
                         float* FX_RESTRICT out) {
    for (int64_t k = 0; k < codewords; k += 16) {
        float sum[16];
        for (int i = 0; i < 16; i++) sum[i] = block[k + i] * x[0];
        for (int64_t j = 1; j < width; j++)
            for (int i = 0; i < 16; i++) sum[i] += block[j * codewords + k + i] * x[j];
        for (int i = 0; i < 16; i++) out[k + i] = sum[i];
    }
}

FX_INLINE void build_short_row(const float* block, const float* x, int64_t codewords, int64_t width, float* out) {
    for (int64_t k = 0; k < 16; k++) {
        float sum = k < codewords ? block[k] * x[0] : 0.0f;
        for (int64_t j = 1; j < width && k < codewords; j++) sum += block[j * codewords + k] * x[j];
        out[k] = sum;
    }
}

FX_INLINE float reduce16(const float* lanes, bool largest) {
    float half[16];
    for (int i = 0; i < 16; i++) half[i] = lanes[i];
    for (int step = 8; step; step /= 2)
        for (int i = 0; i < step; i++) {
            float a = half[i], b = half[i + step];
            half[i] = largest ? (a > b ? a : b) : (a < b ? a : b);
        }
    return half[0];
}

// Middle of a table and what it adds to `range`; entries past K are left out.
FX_INLINE float range_of_row(const float* row, int64_t codewords, TableRange* range) {
    float low[16], high[16];
    for (int i = 0; i < 16; i++) low[i] = high[i] = row[i < codewords ? i : 0];
    for (int64_t k = 16; k < codewords; k += 16)
        for (int i = 0; i < 16; i++) {
            float entry = row[k + i];
            low[i] = entry < low[i] ? entry : low[i];
            high[i] = entry > high[i] ? entry : high[i];
        }
    uint32_t worst = 0;  // as integers, the magnitudes of infinity and NaN are the largest
    for (int64_t k = 0; k < (codewords < 16 ? 16 : codewords); k++) {
        uint32_t magnitude;
        memcpy(&magnitude, row + k, 4);
        magnitude &= 0x7fffffff;
        worst = magnitude > worst ? magnitude : worst;
    }
    float bound;
    memcpy(&bound, &worst, 4);
    range->ordinary = range->ordinary && bound <= LARGEST;
    float least_entry = reduce16(low, false), most_entry = reduce16(high, true);
    float half = (most_entry - least_entry) * 0.5f, middle = (least_entry + most_entry) * 0.5f;
    range->half = half > range->half ? half : range->half;
    range->offsets += middle;
    return middle;
}

// Tables of sub-spaces begin..end-1 of one image -> `tables` [M][stride], and their offsets where `offsets` is given.
// `buffer` holds K * width numbers.
static void build_tables(const Codebook& codebook, const float* x, int64_t inputs, int64_t begin, int64_t end,
                         float* tables, float* offsets, TableRange* range, float* buffer) {
    const int64_t k = codebook.codewords, width = codebook.width, stride = table_stride(k);
    for (int64_t m = begin; m < end; m++) {
        const float* block = codebook.data + m * k * width;
        const int64_t valid = least(width, inputs - m * width);
        if (!codebook.dims_major && width > 1) {
            transpose_block(block, k, width, buffer);
            block = buffer;
        }
        float* row = tables + m * stride;
        if (k < 16)
            build_short_row(block, x + m * width, k, valid, row);
        else if (k == 16)
            build_row(block, x + m * width, 16, valid, row);
        else
            build_row(block, x + m * width, k, valid, row);
        if (offsets) offsets[m] = range_of_row(row, k, range);
    }
}

// Nearest whole number, ties to even, of |value| < 2^22.
FX_INLINE int32_t nearest(float value) {
    float shifted = value + 12582912.0f;  // 1.5 * 2^23: what is left of the mantissa are the units
    int32_t bits;
    memcpy(&bits, &shifted, 4);
    return bits - 0x4b400000;
}

// One table of `count` entries to integers in -top..top.
FX_INLINE void round_row(const float* FX_RESTRICT row, int64_t count, float offset, float inverse, float top,
                         int32_t* FX_RESTRICT out) {
    for (int64_t k = 0; k < count; k++) {
        float value = (row[k] - offset) * inverse;
        value = value > top ? top : value;
        value = value < -top ? -top : value;
        out[k] = nearest(value);
    }
}

}  // namespace
}  // namespace fx
