// Inner loops of the convolution in plain C++: the code to read first. Each file that includes this has its own copy,
// compiled for its instruction set.
#pragma once

#include <cmath>
#include <cstring>

#include "pq_conv.h"

namespace fx {
namespace plain {
namespace {

[[maybe_unused]] static void choose(ConvTables* t, int64_t) { t->gang = 1; }

[[maybe_unused]] static uint32_t largest(const float* x, int64_t count) {
    uint32_t most = 0;
    for (int64_t i = 0; i < count; i++) {
        uint32_t bits;
        memcpy(&bits, x + i, 4);
        bits &= 0x7fffffff;
        most = bits > most ? bits : most;
    }
    return most;
}

[[maybe_unused]] static void samples(const float* even, const float* odd, int64_t count, float scale, int32_t* words) {
    for (int64_t i = 0; i < count; i++) {
        uint32_t low = uint32_t(int32_t(std::nearbyintf(even[i] * scale)));
        uint32_t high = odd ? uint32_t(int32_t(std::nearbyintf(odd[i] * scale))) : 0;
        words[i] = int32_t((low & 0xffff) | high << 16);
    }
}

[[maybe_unused]] static int32_t dot(int32_t a, int32_t b) {
    return int32_t(int16_t(a)) * int32_t(int16_t(b)) + (a >> 16) * (b >> 16);
}

[[maybe_unused]] static float bounds(const int32_t* words, int64_t stride, int64_t pairs, int64_t count, float scale, float* out) {
    float most = 0;
    for (int64_t i = 0; i < count; i++) {
        int32_t sum = 0;
        for (int64_t p = 0; p < pairs; p++) sum += dot(words[p * stride + i], words[p * stride + i]);
        out[i] = float(sum) * scale;
        most = out[i] > most ? out[i] : most;
    }
    return most;
}

// a of 16 entries
[[maybe_unused]] static void products(const int32_t* codebook, const int32_t* const* planes, int64_t pairs, int64_t column, int32_t a[16]) {
    for (int i = 0; i < 16; i++) a[i] = 0;
    for (int64_t p = 0; p < pairs; p++)
        for (int i = 0; i < 16; i++) a[i] += dot(codebook[p * 16 + i], planes[p][column]);
}

[[maybe_unused]] static int32_t peak(const ConvTables* t, const int32_t* codebook, const int32_t* const* planes, int64_t,
                                     const float* bounds, int64_t pixels, int32_t found) {
    int32_t a[16];
    for (int64_t i = 0; i < pixels; i++) {
        if (bounds[i] <= peak_limit(found)) continue;
        for (int64_t c = 0; c < t->entries / 16; c++) {
            products(codebook + c * t->pairs * 16, planes, t->pairs, i, a);
            for (int32_t v : a) found = (v < 0 ? -v : v) > found ? (v < 0 ? -v : v) : found;
        }
    }
    return found;
}

[[maybe_unused]] static void build(const ConvTables* t, const BuildJob* job) {
    for (int64_t term = 0; term < t->terms; term++)
        for (int64_t c = 0; c < t->entries / 16; c++)
            for (int64_t i = 0; i < job->count; i++) {
                int32_t a[16];
                const int64_t at = (term * t->columns + job->targets[i]) * t->term_bytes + c * 16;
                products(job->codebook + (term * t->entries / 16 + c) * t->pairs * 16, job->planes + term * t->pairs,
                         t->pairs, job->inputs[i], a);
                for (int k = 0; k < 16; k++) {
                    if (!job->wide) {
                        int32_t u = (a[k] >> job->shift) * job->multiplier + (1 << 14);
                        job->tables[0][at + k] = uint8_t((u >> 15) + MIDDLE);
                        continue;
                    }
                    int32_t u = int32_t(std::nearbyintf(float(a[k]) * job->factor)) + MIDDLE * 128;
                    job->tables[0][at + k] = uint8_t(u & 127), job->tables[1][at + k] = uint8_t(u >> 7);
                }
            }
}

// Accumulators: 64 numbers of 16 bits in the order of the index lanes.
[[maybe_unused]] static void accumulate(const ConvTables* t, const SumJob* job) {
    for (int64_t block = 0; block < t->blocks; block++)
        for (int64_t x = 0; x < job->pixels; x++) {
            uint16_t* acc = reinterpret_cast<uint16_t*>(job->acc + (block * job->pixels + x) * t->acc_bytes);
            for (int64_t i = 0; i < job->step_count; i++) {
                const uint8_t* table = job->steps[i].table + x * job->table_step;
                const uint8_t* index = job->steps[i].index + block * job->index_block;
                for (int64_t c = 0; c < BLOCK; c++) acc[c] = uint16_t(acc[c] + table[index[c]]);
            }
        }
}

[[maybe_unused]] static void decode(const ConvTables* t, const uint8_t* acc, int64_t pixels, int32_t* sums, int add) {
    for (int64_t p = 0; p < pixels; p++) {
        const uint16_t* from = reinterpret_cast<const uint16_t*>(acc + p * t->acc_bytes);
        for (int64_t c = 0; c < BLOCK; c++) {
            int32_t& sum = sums[p * BLOCK + lane_channel(1, 0, c)];
            sum = from[c] + (add ? sum : 0);
        }
    }
}

// NaN stays, negative zero goes.
[[maybe_unused]] static float rectified(float v) { return v > 0 || v != v ? v : 0; }

using Decode = void (*)(const ConvTables*, const uint8_t* acc, int64_t pixels, int32_t* sums, int add);

template <Decode DECODE>
static void finish(const ConvTables* t, const FinishJob* job) {
    for (int64_t p = 0; p < job->pixels; p++) {
        int32_t sums[2][BLOCK] = {};
        for (int i = 0; i < 2 && job->acc[i]; i++) {
            if (job->sums[i]) memcpy(sums[i], job->sums[i] + p * BLOCK, sizeof(sums[i]));
            DECODE(t, job->acc[i] + p * t->acc_bytes, 1, sums[i], job->sums[i] != nullptr);
        }
        for (int64_t c = 0; c < job->channels; c++) {
            const float out = float(sums[0][c] + sums[1][c] * 128 - job->constant) * job->unit + job->bias[c];
            job->y[p * job->y_stride + c] = job->relu ? rectified(out) : out;
        }
    }
}

[[maybe_unused]] static void pool(const PoolJob* job) {
    for (int64_t x = 0; x < job->pixels; x++) {
        const int64_t left = x * job->stride - job->padding;
        float best[BLOCK] = {};
        for (int64_t row = 0; row < job->row_count; row++)
            for (int64_t k = most(left, 0); k < least(left + job->kernel, job->width); k++)
                for (int64_t c = 0; c < BLOCK; c++) {
                    const float v = job->rows[row][k * BLOCK + c];
                    best[c] = v > best[c] || v != v ? v : best[c];
                }
        memcpy(job->y + x * job->y_stride, best, size_t(job->channels) * sizeof(float));
    }
}

[[maybe_unused]] static void exact_sum(const ExactJob* job) {
    for (int64_t x = 0; x < job->pixels; x++)
        for (int64_t row = 0; row < job->row_count; row++)
            for (int64_t k = 0; k < job->kernel_columns; k++)
                for (int64_t m = 0; m < job->subspaces; m++) {
                    const int64_t column = x * job->pixel_step + k * job->column_step;
                    const float* table = job->rows[row] + (m * job->columns + column) * job->entries;
                    const uint8_t* index = job->index[row] + (k * job->subspaces + m) * job->index_step;
                    for (int64_t c = 0; c < job->channels; c++) job->y[x * BLOCK + c] += table[index[c]];
                }
}

[[maybe_unused]] static void transpose(const float* x, int64_t x_stride, int64_t rows, int64_t columns, float* y, int64_t y_stride) {
    for (int64_t i = 0; i < rows; i += 8)
        for (int64_t j = 0; j < columns; j++)
            for (int64_t r = i; r < least(i + 8, rows); r++) y[j * y_stride + r] = x[r * x_stride + j];
}

// Products in the order of j, each rounded: the same bits as the reference.
[[maybe_unused]] static void exact_build(const ExactJob* job) {
    for (int64_t m = 0; m < job->subspaces; m++)
        for (int64_t i = 0; i < job->count; i++) {
            float* FX_RESTRICT table = job->tables + (m * job->columns + job->targets[i]) * job->entries;
            const float* codes = job->codebook + m * job->subwidth * job->entries;
            for (int64_t j = 0; j < job->subwidth; j++) {
                const float* plane = job->planes[m * job->subwidth + j];
                if (!plane) break;
                const float s = plane[job->inputs[i]], *FX_RESTRICT code = codes + j * job->entries;
                if (j == 0)
                    for (int64_t k = 0; k < job->entries; k++) table[k] = code[k] * s;
                else
                    for (int64_t k = 0; k < job->entries; k++) table[k] = table[k] + code[k] * s;
            }
        }
}

}  // namespace
}  // namespace plain
}  // namespace fx
