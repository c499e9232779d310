// Product-quantized convolution with AVX-512 VBMI and VNNI: tables in registers, looked up by byte permutes.
//
// 64 look-ups take one vpermi2b (two tables of 64 entries, one of 128) or vpermb (four of 16), and
//   K <= 32:  vpdpbusd adds four sub-spaces to 32 bits                                  2 instructions per 64
//   K = 64:   two terms are added as bytes, vpmaddubsw adds neighbours, vpaddw          2.5
//   K = 128:  two terms are added as bytes; vpaddw, vpsrlw, vpaddw                      3
#include <immintrin.h>

#include "pq_conv.h"
#include "pq_conv_plain.h"

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

// Pixels are compared sixteen at a time; what the tables of those above the limit hold is reduced once for all of them.
template <int GANG, int PAIRS>
static int32_t peak_chunks(int64_t chunks, const int32_t* codebook, const int32_t* const* planes, int64_t pairs,
                           const float* bounds, int64_t pixels, int32_t found) {
    for (int64_t i = 0; i < pixels; i += 16) {
        const __m512 limit = _mm512_set1_ps(peak_limit(found));
        const __m512 here = _mm512_maskz_loadu_ps(first(pixels - i), bounds + i);
        uint32_t above = _mm512_cmp_ps_mask(here, limit, _CMP_GT_OQ);
        if (!above) continue;
        __m512i most = _mm512_setzero_si512(), a[4];
        for (; above; above &= above - 1)
            for (int64_t c = 0; c < chunks; c++) {
                products<GANG, PAIRS>(codebook + c * pairs * 64, planes, pairs, i + __builtin_ctz(above), a);
                for (int v = 0; v < 4; v++) most = _mm512_max_epi32(most, _mm512_abs_epi32(a[v]));
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
    __m512i held[PAIRS ? PAIRS * 4 : 1];
    for (int i = 0; i < PAIRS * 4; i++) held[i] = load(codebook + i * 16);
    for (int64_t i = 0; i < job->count; i++) {
        __m512i a[4];
        const int64_t column = job->inputs[i], at = offset + job->targets[i] * t->term_bytes;
        if (PAIRS) {
            for (int v = 0; v < 4; v++) a[v] = _mm512_setzero_si512();
            FX_UNROLL
            for (int p = 0; p < PAIRS; p++) {
                __m512i s = _mm512_set1_epi32(planes[p][column]);
                FX_UNROLL
                for (int v = 0; v < 4; v++) {
                    if (GANG == 4) s = _mm512_set1_epi32(planes[v * PAIRS + p][column]);
                    a[v] = _mm512_dpwssd_epi32(a[v], held[p * 4 + v], s);
                }
            }
        } else {
            products<GANG, 0>(codebook, planes, t->pairs, column, a);
        }
        if (WIDE)
            split(a, factor, job->tables[0] + at, job->tables[1] + at);
        else
            store(job->tables[0] + at, narrow(a, shift, multiplier));
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

// K = 128 and 256, and one sub-space: P pixels, Q blocks of 64 channels. Sums of 16 bits: even bytes + 256 odd bytes, and odd bytes alone.
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

extern const ConvKernels conv_avx512;
const ConvKernels conv_avx512 = {16, choose, largest, samples, bounds, peak, build, accumulate, decode, finish, pool,
                                 plain::exact_build, exact_sum, transpose};

}  // namespace fx
