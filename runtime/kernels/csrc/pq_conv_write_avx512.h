// What comes behind the sums of a product-quantized convolution, and sums of float32 tables. Part of pq_conv_avx512.cpp.
#pragma once

#include "pq_conv_tables_avx512.h"

namespace fx {
namespace {

// Numbers that are not negative compare as their bits do, and any NaN is more than all of them.
static void pool(const PoolJob* job) {
    for (int64_t x = 0; x < job->pixels; x++) {
        const int64_t left = x * job->stride - job->padding;
        const int64_t begin = most(left, 0), end = least(left + job->kernel, job->width);
        __m512i best[4] = {};
        for (int64_t row = 0; row < job->row_count; row++)
            for (int64_t k = begin; k < end; k++)
                for (int v = 0; v < 4; v++) best[v] = _mm512_max_epu32(best[v], load(job->rows[row] + k * BLOCK + v * 16));
        for (int64_t v = 0; v * 16 < job->channels; v++)
            _mm512_mask_storeu_epi32(job->y + x * job->y_stride + v * 16, first(job->channels - v * 16), best[v]);
    }
}

static void transpose16(const float* x, int64_t x_stride, int64_t rows, int64_t columns, float* y, int64_t y_stride) {
    __m512 a[16], b[16];
    const __mmask16 mask = first(columns), out = first(rows);
    for (int i = 0; i < 16; i++) a[i] = i < rows ? _mm512_maskz_loadu_ps(mask, x + i * x_stride) : _mm512_setzero_ps();
    for (int i = 0; i < 16; i += 2) b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]), b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            __m512d p = _mm512_castps_pd(b[i + j]), q = _mm512_castps_pd(b[i + j + 2]);
            a[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(p, q));
            a[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(p, q));
        }
    for (int i = 0; i < 4; i++) {
        b[i] = _mm512_shuffle_f32x4(a[i], a[i + 4], 0x88), b[i + 4] = _mm512_shuffle_f32x4(a[i], a[i + 4], 0xdd);
        b[i + 8] = _mm512_shuffle_f32x4(a[i + 8], a[i + 12], 0x88);
        b[i + 12] = _mm512_shuffle_f32x4(a[i + 8], a[i + 12], 0xdd);
    }
    for (int i = 0; i < 8; i++) {
        a[i] = _mm512_shuffle_f32x4(b[i], b[i + 8], 0x88), a[i + 8] = _mm512_shuffle_f32x4(b[i], b[i + 8], 0xdd);
    }
    for (int i = 0; i < 16 && i < columns; i++) _mm512_mask_storeu_ps(y + i * y_stride, out, a[i]);
}

// Sixteen pixels of three channels -> three planes.
FX_INLINE void planes3(const float* x, float* y, int64_t y_stride) {
    const __m512 a = _mm512_loadu_ps(x), b = _mm512_loadu_ps(x + 16), c = _mm512_loadu_ps(x + 32);
    const __m512i number = _mm512_setr_epi32(0, 3, 6, 9, 12, 15, 18, 21, 24, 27, 30, 33, 36, 39, 42, 45);
    FX_UNROLL
    for (int plane = 0; plane < 3; plane++) {
        const __m512i from = _mm512_add_epi32(number, _mm512_set1_epi32(plane));
        const __mmask16 third = _mm512_cmpge_epi32_mask(from, _mm512_set1_epi32(32));
        const __m512 two = _mm512_permutex2var_ps(a, from, b);
        _mm512_storeu_ps(y + plane * y_stride, _mm512_mask_permutexvar_ps(two, third, from, c));
    }
}

static void transpose(const float* x, int64_t x_stride, int64_t rows, int64_t columns, float* y, int64_t y_stride) {
    for (; x_stride == 3 && columns == 3 && rows >= 16; rows -= 16, x += 48, y += 16) planes3(x, y, y_stride);
    for (int64_t i = 0; i < rows; i += 16)
        for (int64_t j = 0; j < columns; j += 16)
            transpose16(x + i * x_stride + j, x_stride, rows - i, columns - j, y + j * y_stride + i, y_stride);
}

// Float tables: 16 channels at once, from registers where they fit, else by gathers.
template <int VECTORS>
FX_INLINE __m512 entries_of(const float* table, __m512i codes) {
    if (VECTORS == 1) return _mm512_permutexvar_ps(codes, _mm512_loadu_ps(table));
    if (VECTORS == 0) return _mm512_i32gather_ps(codes, table, 4);
    __m512 e = _mm512_permutex2var_ps(_mm512_loadu_ps(table), codes, _mm512_loadu_ps(table + 16));
    for (int v = 2; v < VECTORS; v += 2) {
        __mmask16 here = _mm512_cmpge_epi32_mask(codes, _mm512_set1_epi32(v * 16));
        e = _mm512_mask_mov_ps(e, here, _mm512_permutex2var_ps(_mm512_loadu_ps(table + v * 16), codes,
                                                               _mm512_loadu_ps(table + v * 16 + 16)));
    }
    return e;
}

template <int VECTORS, int P>
static void exact_pixels(const ExactJob* job, int64_t x, int64_t channel) {
    const int64_t step = job->pixel_step * job->entries;
    const __mmask16 mask = first(job->channels - channel);
    __m512 acc[P];
    FX_UNROLL
    for (int p = 0; p < P; p++) acc[p] = _mm512_loadu_ps(job->y + (x + p) * BLOCK + channel);
    for (int64_t row = 0; row < job->row_count; row++)
        for (int64_t k = 0; k < job->kernel_columns; k++)
            for (int64_t m = 0; m < job->subspaces; m++) {
                const float* table = job->rows[row] + (m * job->columns + x * job->pixel_step + k * job->column_step) * job->entries;
                const uint8_t* index = job->index[row] + (k * job->subspaces + m) * job->index_step + channel;
                const __m512i codes = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, index));
                FX_UNROLL
                for (int p = 0; p < P; p++) acc[p] = _mm512_add_ps(acc[p], entries_of<VECTORS>(table + p * step, codes));
            }
    FX_UNROLL
    for (int p = 0; p < P; p++) _mm512_storeu_ps(job->y + (x + p) * BLOCK + channel, acc[p]);
}

template <int VECTORS>
static void exact_all(const ExactJob* job) {
    constexpr int P = VECTORS == 0 || VECTORS > 4 ? 4 : 12;
    for (int64_t channel = 0; channel < job->channels; channel += 16) {
        int64_t x = 0;
        for (; x + P <= job->pixels; x += P) exact_pixels<VECTORS, P>(job, x, channel);
        for (; x + 4 <= job->pixels; x += 4) exact_pixels<VECTORS, 4>(job, x, channel);
        for (; x < job->pixels; x++) exact_pixels<VECTORS, 1>(job, x, channel);
    }
}

static void exact_sum(const ExactJob* job) {
    switch (job->entries) {
        case 16: return exact_all<1>(job);
        case 32: return exact_all<2>(job);
        case 64: return exact_all<4>(job);
        case 128: return exact_all<8>(job);
        default: return exact_all<0>(job);
    }
}

}  // namespace
}  // namespace fx
