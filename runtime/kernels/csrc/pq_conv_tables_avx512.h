// Tables of a product-quantized convolution: scales, building them, rounding them to bytes. Part of pq_conv_avx512.cpp.
#pragma once

#include <immintrin.h>

#include "pq_conv.h"

namespace fx {
namespace {

FX_INLINE __m512i load(const void* p) { return _mm512_loadu_si512(p); }
FX_INLINE void store(void* p, __m512i v) { _mm512_storeu_si512(p, v); }
// A load that stays one: else the compiler repeats it as the operand of every instruction that uses the value.
FX_INLINE __m512i hold(const void* p) {
    __m512i v = load(p);
    asm("" : "+v"(v));
    return v;
}
FX_INLINE __mmask16 first(int64_t count) { return count >= 16 ? 0xffff : __mmask16((1u << count) - 1); }

// A single sub-space has no neighbours: a table is one register then, however few its code words.
static void choose(ConvTables* t, int64_t subspaces) {
    t->gang = subspaces == 1 || t->entries > 64 ? 1 : t->entries == 64 ? 2 : 4;
    if (subspaces == 1) t->entries = most(t->entries, 64);
}

static uint32_t largest(const float* x, int64_t count) {
    const __m512i sign = _mm512_set1_epi32(0x7fffffff);
    __m512i most0 = _mm512_setzero_si512(), most1 = most0;
    int64_t i = 0;
    for (; i + 32 <= count; i += 32) {
        most0 = _mm512_max_epu32(most0, _mm512_and_si512(load(x + i), sign));
        most1 = _mm512_max_epu32(most1, _mm512_and_si512(load(x + i + 16), sign));
    }
    for (; i < count; i += 16)
        most0 = _mm512_max_epu32(most0, _mm512_and_si512(_mm512_maskz_loadu_epi32(first(count - i), x + i), sign));
    return _mm512_reduce_max_epu32(_mm512_max_epu32(most0, most1));
}

static void samples(const float* even, const float* odd, int64_t count, float scale, int32_t* words) {
    const __m512 s = _mm512_set1_ps(scale);
    for (int64_t i = 0; i < count; i += 16) {
        __mmask16 mask = first(count - i);
        __m512i low = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_maskz_loadu_ps(mask, even + i), s));
        __m512i high = _mm512_setzero_si512();
        if (odd) high = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_maskz_loadu_ps(mask, odd + i), s));
        _mm512_mask_storeu_epi32(words + i, mask, _mm512_mask_blend_epi16(0xaaaaaaaa, low, _mm512_slli_epi32(high, 16)));
    }
}

static float bounds(const int32_t* words, int64_t stride, int64_t pairs, int64_t count, float scale, float* out) {
    __m512 most = _mm512_setzero_ps(), s = _mm512_set1_ps(scale);
    for (int64_t i = 0; i < count; i += 16) {
        __mmask16 mask = first(count - i);
        __m512i sum = _mm512_setzero_si512();
        for (int64_t p = 0; p < pairs; p++) {
            __m512i v = _mm512_maskz_loadu_epi32(mask, words + p * stride + i);
            sum = _mm512_dpwssd_epi32(sum, v, v);
        }
        __m512 bound = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), s);
        _mm512_mask_storeu_ps(out + i, mask, bound);
        most = _mm512_mask_max_ps(most, mask, most, bound);
    }
    return _mm512_reduce_max_ps(most);
}

// a of one chunk: 4 vectors of 16 entries. Where the gang is 4, vector v belongs to sub-space v, else all to one.
template <int GANG, int PAIRS>
FX_INLINE void products(const int32_t* codebook, const int32_t* const* planes, int64_t pairs, int64_t column,
                        __m512i a[4]) {
    for (int v = 0; v < 4; v++) a[v] = _mm512_setzero_si512();
    const int64_t count = PAIRS ? PAIRS : pairs;
    FX_UNROLL
    for (int64_t p = 0; p < count; p++) {
        __m512i s = _mm512_set1_epi32(planes[p][column]);
        FX_UNROLL
        for (int v = 0; v < 4; v++) {
            if (GANG == 4) s = _mm512_set1_epi32(planes[v * count + p][column]);
            a[v] = _mm512_dpwssd_epi32(a[v], load(codebook + (p * 4 + v) * 16), s);
        }
    }
}

// Pixels are compared sixteen at a time. What the tables of those above the limit hold is reduced, and the limit raised,
// once in a stretch: it takes longer than tables of some pixels that a higher limit would have ruled out.
template <int GANG, int PAIRS>
static int32_t peak_chunks(int64_t chunks, const int32_t* codebook, const int32_t* const* planes, int64_t pairs,
                           const float* bounds, int64_t pixels, int32_t found) {
    constexpr int64_t STRETCH = 256;
    for (int64_t begin = 0; begin < pixels; begin += STRETCH) {
        const __m512 limit = _mm512_set1_ps(peak_limit(found));
        __m512i most = _mm512_setzero_si512(), a[4];
        for (int64_t i = begin; i < least(pixels, begin + STRETCH); i += 16) {
            const __m512 here = _mm512_maskz_loadu_ps(first(pixels - i), bounds + i);
            for (uint32_t above = _mm512_cmp_ps_mask(here, limit, _CMP_GT_OQ); above; above &= above - 1)
                for (int64_t c = 0; c < chunks; c++) {
                    products<GANG, PAIRS>(codebook + c * pairs * 64, planes, pairs, i + __builtin_ctz(above), a);
                    for (int v = 0; v < 4; v++) most = _mm512_max_epi32(most, _mm512_abs_epi32(a[v]));
                }
        }
        found = int32_t(fx::most(found, _mm512_reduce_max_epi32(most)));
    }
    return found;
}

static int32_t peak(const ConvTables* t, const int32_t* codebook, const int32_t* const* planes, int64_t sub,
                    const float* bounds, int64_t pixels, int32_t found) {
    const int64_t pairs = t->pairs;
    if (t->gang == 4)
        return peak_chunks<4, 0>(t->term_bytes / 64, codebook, planes, pairs, bounds, pixels, found);
    const int64_t chunks = t->entries / 64;
    codebook += sub * chunks * pairs * 64, planes += sub * pairs;
    switch (pairs) {
        case 2: return peak_chunks<1, 2>(chunks, codebook, planes, pairs, bounds, pixels, found);
        case 4: return peak_chunks<1, 4>(chunks, codebook, planes, pairs, bounds, pixels, found);
        default: return peak_chunks<1, 0>(chunks, codebook, planes, pairs, bounds, pixels, found);
    }
}

// 64 entries of 7 bits
FX_INLINE __m512i narrow(const __m512i a[4], __m128i shift, __m512i multiplier) {
    __m512i low = _mm512_packs_epi32(_mm512_sra_epi32(a[0], shift), _mm512_sra_epi32(a[1], shift));
    __m512i high = _mm512_packs_epi32(_mm512_sra_epi32(a[2], shift), _mm512_sra_epi32(a[3], shift));
    low = _mm512_mulhrs_epi16(low, multiplier), high = _mm512_mulhrs_epi16(high, multiplier);
    return _mm512_add_epi8(_mm512_packs_epi16(low, high), _mm512_set1_epi8(MIDDLE));
}

// 64 entries of 14 bits -> their low and high 7 bits
FX_INLINE void split(const __m512i a[4], __m512 factor, uint8_t* low, uint8_t* high) {
    const __m512i middle = _mm512_set1_epi16(MIDDLE * 128), mask = _mm512_set1_epi16(127);
    __m512i q[4];
    for (int v = 0; v < 4; v++) q[v] = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_cvtepi32_ps(a[v]), factor));
    __m512i u0 = _mm512_add_epi16(_mm512_packs_epi32(q[0], q[1]), middle);
    __m512i u1 = _mm512_add_epi16(_mm512_packs_epi32(q[2], q[3]), middle);
    store(low, _mm512_packus_epi16(_mm512_and_si512(u0, mask), _mm512_and_si512(u1, mask)));
    store(high, _mm512_packus_epi16(_mm512_srli_epi16(u0, 7), _mm512_srli_epi16(u1, 7)));
}

// One chunk of one term for all columns of a row; with few pairs the codebook stays in registers.
template <int GANG, int PAIRS, int WIDE>
static void build_chunk(const ConvTables* t, const BuildJob* job, const int32_t* codebook, const int32_t* const* planes,
                        int64_t offset) {
    const __m128i shift = _mm_cvtsi32_si128(job->shift);
    const __m512i multiplier = _mm512_set1_epi16(int16_t(job->multiplier));
    const __m512 factor = _mm512_set1_ps(job->factor);
    // what stores of bytes could change, for all that the compiler knows
    const int32_t *const inputs = job->inputs, *const targets = job->targets;
    uint8_t *const low = job->tables[0] + offset, *const high = WIDE ? job->tables[1] + offset : nullptr;
    const int64_t count = job->count, bytes = t->term_bytes;
    constexpr int SUBS = GANG == 4 ? 4 : 1;
    const int32_t* from[PAIRS ? PAIRS * SUBS : 1];
    __m512i held[PAIRS ? PAIRS * 4 : 1];
    FX_UNROLL
    for (int i = 0; i < PAIRS * SUBS; i++) from[i] = planes[i];
    FX_UNROLL
    for (int i = 0; i < PAIRS * 4; i++) held[i] = load(codebook + i * 16);
    for (int64_t i = 0; i < count; i++) {
        __m512i a[4];
        const int64_t column = inputs[i], at = targets[i] * bytes;
        if (PAIRS) {
            for (int v = 0; v < 4; v++) a[v] = _mm512_setzero_si512();
            FX_UNROLL
            for (int p = 0; p < PAIRS; p++) {
                __m512i s = _mm512_set1_epi32(from[p][column]);
                FX_UNROLL
                for (int v = 0; v < 4; v++) {
                    if (GANG == 4) s = _mm512_set1_epi32(from[(v * PAIRS + p) % (PAIRS * SUBS)][column]);
                    a[v] = _mm512_dpwssd_epi32(a[v], held[p * 4 + v], s);
                }
            }
        } else {
            products<GANG, 0>(codebook, planes, t->pairs, column, a);
        }
        if (WIDE)
            split(a, factor, low + at, high + at);
        else
            store(low + at, narrow(a, shift, multiplier));
    }
}

template <int GANG, int WIDE>
static void build_rows(const ConvTables* t, const BuildJob* job) {
    const int64_t chunks = t->term_bytes / 64, per_sub = GANG == 4 ? 1 : t->entries / 64;
    for (int64_t term = 0; term < t->terms; term++)
        for (int64_t c = 0; c < chunks; c++) {
            const int32_t* codebook = job->codebook + (term * chunks + c) * t->pairs * 64;
            const int32_t* const* planes = job->planes + (term * GANG + (GANG == 4 ? 0 : c / per_sub)) * t->pairs;
            const int64_t offset = term * t->columns * t->term_bytes + c * 64;
            switch (t->pairs) {
                case 1: build_chunk<GANG, 1, WIDE>(t, job, codebook, planes, offset); break;
                case 2: build_chunk<GANG, 2, WIDE>(t, job, codebook, planes, offset); break;
                case 4: build_chunk<GANG, 4, WIDE>(t, job, codebook, planes, offset); break;
                default: build_chunk<GANG, 0, WIDE>(t, job, codebook, planes, offset);
            }
        }
}

static void build(const ConvTables* t, const BuildJob* job) {
    switch (t->gang) {
        case 4: return job->wide ? build_rows<4, 1>(t, job) : build_rows<4, 0>(t, job);
        case 2: return job->wide ? build_rows<2, 1>(t, job) : build_rows<2, 0>(t, job);
        default: return job->wide ? build_rows<1, 1>(t, job) : build_rows<1, 0>(t, job);
    }
}

}  // namespace
}  // namespace fx
