// Look-ups of a product-quantized convolution in integer tables, and their sums. Part of pq_conv_avx512.cpp.
#pragma once

#include "pq_conv_tables_avx512.h"

namespace fx {
namespace {

// K <= 32: P pixels, 64 channels as 4 vectors of 16 sums of 32 bits.
template <int P, int TWO>
static void sum_gang4(const SumJob* job, int64_t block, int64_t x) {
    const __m512i ones = _mm512_set1_epi8(1);
    __m512i acc[P][4];
    uint8_t* at = job->acc + (block * job->pixels + x) * 256;
    FX_UNROLL
    for (int p = 0; p < P; p++)
        for (int v = 0; v < 4; v++) acc[p][v] = load(at + p * 256 + v * 64);
    for (int64_t row = 0; row < job->row_count; row++) {
        const uint8_t* tables = job->rows[row] + x * job->table_step;
        const uint8_t* index = job->index[row] + block * job->index_block;
        for (int64_t i = 0; i < job->step_count; i++) {
            const uint8_t *table = tables + job->steps[i].table, *codes = index + job->steps[i].index;
            __m512i c[4];
            for (int v = 0; v < 4; v++) c[v] = load(codes + v * 64);
            FX_UNROLL
            for (int p = 0; p < P; p++) {
                const __m512i t0 = hold(table + p * job->table_step);
                const __m512i t1 = TWO ? hold(table + p * job->table_step + 64) : t0;
                FX_UNROLL
                for (int v = 0; v < 4; v++) {
                    __m512i e = TWO ? _mm512_permutex2var_epi8(t0, c[v], t1) : _mm512_permutexvar_epi8(c[v], t0);
                    acc[p][v] = _mm512_dpbusd_epi32(acc[p][v], e, ones);
                }
            }
        }
    }
    FX_UNROLL
    for (int p = 0; p < P; p++)
        for (int v = 0; v < 4; v++) store(at + p * 256 + v * 64, acc[p][v]);
}

// K = 64: P pixels, 64 channels as 2 vectors of 32 sums of 16 bits; a lane pair holds one channel's two sub-spaces.
template <int P>
static void sum_gang2(const SumJob* job, int64_t block, int64_t x) {
    const __m512i ones = _mm512_set1_epi8(1);
    const int64_t step = job->table_step;
    __m512i acc[P][2];
    uint8_t* at = job->acc + (block * job->pixels + x) * 128;
    FX_UNROLL
    for (int p = 0; p < P; p++) acc[p][0] = load(at + p * 128), acc[p][1] = load(at + p * 128 + 64);
    for (int64_t row = 0; row < job->row_count; row++) {
        const uint8_t* tables = job->rows[row] + x * step;
        const uint8_t* index = job->index[row] + block * job->index_block;
        int64_t i = 0;
        for (; i + 2 <= job->step_count; i += 2) {
            const uint8_t *table0 = tables + job->steps[i].table, *table1 = tables + job->steps[i + 1].table;
            const uint8_t *codes0 = index + job->steps[i].index, *codes1 = index + job->steps[i + 1].index;
            const __m512i c00 = load(codes0), c01 = load(codes0 + 64), c10 = load(codes1), c11 = load(codes1 + 64);
            FX_UNROLL
            for (int p = 0; p < P; p++) {
                const __m512i t0 = hold(table0 + p * step), t1 = hold(table0 + p * step + 64);
                const __m512i u0 = hold(table1 + p * step), u1 = hold(table1 + p * step + 64);
                __m512i e0 = _mm512_add_epi8(_mm512_permutex2var_epi8(t0, c00, t1), _mm512_permutex2var_epi8(u0, c10, u1));
                __m512i e1 = _mm512_add_epi8(_mm512_permutex2var_epi8(t0, c01, t1), _mm512_permutex2var_epi8(u0, c11, u1));
                acc[p][0] = _mm512_add_epi16(acc[p][0], _mm512_maddubs_epi16(e0, ones));
                acc[p][1] = _mm512_add_epi16(acc[p][1], _mm512_maddubs_epi16(e1, ones));
            }
        }
        for (; i < job->step_count; i++) {
            const uint8_t *table = tables + job->steps[i].table, *codes = index + job->steps[i].index;
            const __m512i c0 = load(codes), c1 = load(codes + 64);
            for (int p = 0; p < P; p++) {
                const __m512i t0 = load(table + p * step), t1 = load(table + p * step + 64);
                acc[p][0] = _mm512_add_epi16(acc[p][0], _mm512_maddubs_epi16(_mm512_permutex2var_epi8(t0, c0, t1), ones));
                acc[p][1] = _mm512_add_epi16(acc[p][1], _mm512_maddubs_epi16(_mm512_permutex2var_epi8(t0, c1, t1), ones));
            }
        }
    }
    FX_UNROLL
    for (int p = 0; p < P; p++) store(at + p * 128, acc[p][0]), store(at + p * 128 + 64, acc[p][1]);
}

// The tables of one pixel for K = 128 or 256, in registers, or for one sub-space of K <= 64, as an operand in memory.
template <int WIDTH>
struct Entries {
    __m512i part[WIDTH / 64];
    FX_INLINE explicit Entries(const uint8_t* table) {
        for (int i = 0; i < WIDTH / 64; i++) part[i] = WIDTH == 64 ? load(table) : hold(table + i * 64);
    }
    FX_INLINE __m512i at(__m512i codes, __mmask64 upper) const {
        if constexpr (WIDTH == 64) return _mm512_permutexvar_epi8(codes, part[0]);
        __m512i e = _mm512_permutex2var_epi8(part[0], codes, part[WIDTH / 64 - 1 ? 1 : 0]);
        if (WIDTH == 256) {
            __m512i f = _mm512_permutex2var_epi8(part[WIDTH == 256 ? 2 : 0], codes, part[WIDTH == 256 ? 3 : 0]);
            e = _mm512_mask_blend_epi8(upper, e, f);
        }
        return e;
    }
};

// K = 128 and 256, and one sub-space: P pixels, Q blocks of 64 channels. Sums of 16 bits: even bytes + 256 odd bytes, and
// odd bytes alone.
template <int WIDTH, int P, int Q>
static void sum_gang1(const SumJob* job, int64_t block, int64_t x) {
    const int64_t step = job->table_step;
    __m512i acc[P][Q][2];
    uint8_t* at = job->acc + (block * job->pixels + x) * 128;
    FX_UNROLL
    for (int p = 0; p < P; p++)
        for (int i = 0; i < 2 * Q; i++) acc[p][i / 2][i % 2] = load(at + (i / 2 * job->pixels + p) * 128 + i % 2 * 64);
    for (int64_t row = 0; row < job->row_count; row++) {
        const uint8_t* tables = job->rows[row] + x * step;
        const uint8_t* index = job->index[row] + block * job->index_block;
        for (int64_t i = 0; i < job->step_count; i += 2) {
            const bool pair = i + 1 < job->step_count;
            const ConvStep one = job->steps[i], two = job->steps[pair ? i + 1 : i];
            const uint8_t *table0 = tables + one.table, *table1 = tables + two.table;
            __m512i c0[Q], c1[Q];
            __mmask64 m0[Q], m1[Q];
            FX_UNROLL
            for (int q = 0; q < Q; q++) {
                c0[q] = load(index + one.index + q * job->index_block), c1[q] = load(index + two.index + q * job->index_block);
                m0[q] = _mm512_movepi8_mask(c0[q]), m1[q] = _mm512_movepi8_mask(c1[q]);
            }
            if (pair) {
                FX_UNROLL
                for (int p = 0; p < P; p++) {
                    const Entries<WIDTH> t(table0 + p * step), u(table1 + p * step);
                    FX_UNROLL
                    for (int q = 0; q < Q; q++) {
                        __m512i e = _mm512_add_epi8(t.at(c0[q], m0[q]), u.at(c1[q], m1[q]));
                        acc[p][q][0] = _mm512_add_epi16(acc[p][q][0], e);
                        acc[p][q][1] = _mm512_add_epi16(acc[p][q][1], _mm512_srli_epi16(e, 8));
                    }
                }
            } else {
                for (int p = 0; p < P; p++) {
                    const Entries<WIDTH> t(table0 + p * step);
                    for (int q = 0; q < Q; q++) {
                        __m512i e = t.at(c0[q], m0[q]);
                        acc[p][q][0] = _mm512_add_epi16(acc[p][q][0], e);
                        acc[p][q][1] = _mm512_add_epi16(acc[p][q][1], _mm512_srli_epi16(e, 8));
                    }
                }
            }
        }
    }
    FX_UNROLL
    for (int p = 0; p < P; p++)
        for (int i = 0; i < 2 * Q; i++) store(at + (i / 2 * job->pixels + p) * 128 + i % 2 * 64, acc[p][i / 2][i % 2]);
}

using Sum = void (*)(const SumJob*, int64_t block, int64_t x);

// All blocks, all pixels, `most` pixels at a time; sums[p - 1] does p pixels of one block, wide[p - 1] of two.
static void sum_all(const ConvTables* t, const SumJob* job, const Sum* sums, int64_t most_pixels, const Sum* wide,
                    int64_t most_wide) {
    for (int64_t block = 0; block < t->blocks;) {
        const bool two = wide && block + 2 <= t->blocks;
        const int64_t limit = two ? most_wide : most_pixels;
        const int64_t parts = ceil_div(job->pixels, limit);
        int64_t x = 0;
        for (int64_t part = 0; part < parts; part++) {
            int64_t count = ceil_div(job->pixels - x, parts - part);
            (two ? wide : sums)[count - 1](job, block, x);
            x += count;
        }
        block += two ? 2 : 1;
    }
}

static void accumulate(const ConvTables* t, const SumJob* job) {
    static const Sum gang4[] = {sum_gang4<1, 0>, sum_gang4<2, 0>, sum_gang4<3, 0>, sum_gang4<4, 0>, sum_gang4<5, 0>};
    static const Sum gang4_two[] = {sum_gang4<1, 1>, sum_gang4<2, 1>, sum_gang4<3, 1>, sum_gang4<4, 1>,
                                    sum_gang4<5, 1>};
    static const Sum gang2[] = {sum_gang2<1>, sum_gang2<2>, sum_gang2<3>, sum_gang2<4>,
                                sum_gang2<5>, sum_gang2<6>, sum_gang2<7>, sum_gang2<8>};
    static const Sum one128[] = {sum_gang1<128, 1, 1>, sum_gang1<128, 2, 1>, sum_gang1<128, 3, 1>,
                                 sum_gang1<128, 4, 1>, sum_gang1<128, 5, 1>, sum_gang1<128, 6, 1>,
                                 sum_gang1<128, 7, 1>, sum_gang1<128, 8, 1>};
    static const Sum two128[] = {sum_gang1<128, 1, 2>, sum_gang1<128, 2, 2>, sum_gang1<128, 3, 2>,
                                 sum_gang1<128, 4, 2>, sum_gang1<128, 5, 2>};
    static const Sum one256[] = {sum_gang1<256, 1, 1>, sum_gang1<256, 2, 1>, sum_gang1<256, 3, 1>,
                                 sum_gang1<256, 4, 1>};
    static const Sum one64[] = {sum_gang1<64, 1, 1>, sum_gang1<64, 2, 1>, sum_gang1<64, 3, 1>, sum_gang1<64, 4, 1>,
                                sum_gang1<64, 5, 1>, sum_gang1<64, 6, 1>, sum_gang1<64, 7, 1>, sum_gang1<64, 8, 1>};
    if (t->gang == 1 && t->entries == 64) return sum_all(t, job, one64, 8, nullptr, 0);
    switch (t->entries) {
        case 16: return sum_all(t, job, gang4, 5, nullptr, 0);
        case 32: return sum_all(t, job, gang4_two, 5, nullptr, 0);
        case 64: return sum_all(t, job, gang2, 8, nullptr, 0);
        case 128: return sum_all(t, job, one128, 8, two128, 5);
        default: return sum_all(t, job, one256, 4, nullptr, 0);
    }
}

FX_INLINE void put(int32_t* sums, __m512i v, int add) { store(sums, add ? _mm512_add_epi32(v, load(sums)) : v); }

static void decode(const ConvTables* t, const uint8_t* acc, int64_t pixels, int32_t* sums, int add) {
    for (int64_t p = 0; p < pixels; p++, sums += BLOCK, acc += t->acc_bytes) {
        if (t->gang == 4) {
            for (int v = 0; v < 4; v++) put(sums + v * 16, load(acc + v * 64), add);
            continue;
        }
        __m512i low = load(acc), high = load(acc + 64);
        if (t->gang == 1) low = _mm512_sub_epi16(low, _mm512_slli_epi16(high, 8));
        put(sums, _mm512_cvtepu16_epi32(_mm512_castsi512_si256(low)), add);
        put(sums + 16, _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(low, 1)), add);
        put(sums + 32, _mm512_cvtepu16_epi32(_mm512_castsi512_si256(high)), add);
        put(sums + 48, _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(high, 1)), add);
    }
}

static void finish(const int32_t* sums, const int32_t* high, int64_t pixels, int32_t constant, float unit,
                   const float* bias, int relu, float* y, int64_t stride, int64_t channels) {
    const __m512i c = _mm512_set1_epi32(constant);
    const __m512 u = _mm512_set1_ps(unit);
    for (int64_t v = 0; v * 16 < channels; v++) {
        const __m512 b = _mm512_loadu_ps(bias + v * 16);
        const __mmask16 mask = first(channels - v * 16);
        for (int64_t p = 0; p < pixels; p++) {
            int64_t i = p * BLOCK + v * 16;
            __m512i sum = _mm512_sub_epi32(load(sums + i), c);
            if (high) sum = _mm512_add_epi32(sum, _mm512_slli_epi32(load(high + i), 7));
            __m512 out = _mm512_add_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(sum), u), b);
            // NaN stays, negative zero goes
            if (relu) out = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(out, _mm512_setzero_ps(), _CMP_NLE_UQ), out);
            _mm512_mask_storeu_ps(y + p * stride + v * 16, mask, out);
        }
    }
}

}  // namespace
}  // namespace fx
