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
    const int64_t tables = x * job->table_step, index = block * job->index_block;
    for (int64_t i = 0; i < job->step_count; i++) {
        const uint8_t *table = job->steps[i].table + tables, *codes = job->steps[i].index + index;
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
    FX_UNROLL
    for (int p = 0; p < P; p++)
        for (int v = 0; v < 4; v++) store(at + p * 256 + v * 64, acc[p][v]);
}

// K = 64 and K = 128: P pixels of one block or two, two steps at once, in registers that are given by their numbers.
//
// The order of instructions matters, as do additions that saturate although no sum is that large: on Zen 5 plain ones
// take the ports of the look-ups. What a compiler makes of intrinsics is a fifth slower. Registers 16 to 19 are the
// indices of the first step, 20 to 23 those of the second, 24 to 27 tables, 31 the weights that widen; the sums begin
// at 0.
#define FX_READ(AT, TO) "vmovdqu64 " AT ", %%zmm" TO "\n\t"
#define FX_WRITE(FROM, AT) "vmovdqu64 %%zmm" FROM ", " AT "\n\t"
#define FX_COPY(FROM, TO) "vmovdqa64 %%zmm" FROM ", %%zmm" TO "\n\t"
// looks up: in place of the indices, or of the table
#define FX_FIRST(INDEX) "vpermi2b %%zmm25, %%zmm24, %%zmm" INDEX "\n\t"
#define FX_SECOND(INDEX) "vpermi2b %%zmm27, %%zmm26, %%zmm" INDEX "\n\t"
#define FX_LAST_FIRST(INDEX) "vpermt2b %%zmm25, %%zmm" INDEX ", %%zmm24\n\t"
#define FX_LAST_SECOND(INDEX) "vpermt2b %%zmm27, %%zmm" INDEX ", %%zmm26\n\t"
#define FX_ADD(FROM, TO) "vpaddusb %%zmm" FROM ", %%zmm" TO ", %%zmm" TO "\n\t"
#define FX_WIDEN(OF) "vpmaddubsw %%zmm31, %%zmm" OF ", %%zmm" OF "\n\t"
#define FX_SUM(FROM, TO) "vpaddusw %%zmm" FROM ", %%zmm" TO ", %%zmm" TO "\n\t"
#define FX_WRAP(FROM, TO) "vpaddw %%zmm" FROM ", %%zmm" TO ", %%zmm" TO "\n\t"
// the tables of one pixel, and on to the next one
#define FX_TABLES \
    FX_READ("(%[t])", "24") FX_READ("64(%[t])", "25") FX_READ("(%[u])", "26") FX_READ("64(%[u])", "27") \
    "add %[step], %[t]\n\tadd %[step], %[u]\n\t"
// K = 64: of a block two vectors of 32 sums of 16 bits; a lane pair holds one channel's two sub-spaces.
#define FX_PIXEL_OF_ONE(P, A, B) \
    FX_TABLES FX_COPY("16", "28") FX_COPY("20", "29") FX_FIRST("28") FX_SECOND("29") FX_LAST_FIRST("17") \
    FX_LAST_SECOND("21") FX_ADD("29", "28") FX_ADD("26", "24") FX_WIDEN("28") FX_WIDEN("24") FX_SUM("28", A) \
    FX_SUM("24", B)
#define FX_PIXEL_OF_TWO(P, A, B, C, D) \
    FX_TABLES FX_COPY("16", "28") FX_COPY("20", "29") FX_COPY("17", "30") FX_FIRST("28") FX_SECOND("29") \
    FX_FIRST("30") FX_ADD("29", "28") FX_COPY("21", "29") FX_SECOND("29") FX_WIDEN("28") FX_SUM("28", A) \
    FX_ADD("29", "30") FX_WIDEN("30") FX_COPY("18", "28") FX_COPY("22", "29") FX_FIRST("28") FX_SECOND("29") \
    FX_SUM("30", B) FX_LAST_FIRST("19") FX_LAST_SECOND("23") FX_ADD("29", "28") FX_ADD("26", "24") FX_WIDEN("28") \
    FX_WIDEN("24") FX_SUM("28", C) FX_SUM("24", D)
#define FX_CODES_OF_ONE \
    FX_READ("(%[i])", "16") FX_READ("64(%[i])", "17") FX_READ("(%[j])", "20") FX_READ("64(%[j])", "21")
#define FX_CODES_OF_TWO \
    FX_CODES_OF_ONE FX_READ("(%[i],%[block])", "18") FX_READ("64(%[i],%[block])", "19") \
    FX_READ("(%[j],%[block])", "22") FX_READ("64(%[j],%[block])", "23")
// K = 128: of a block even bytes + 256 odd bytes, which may wrap, and odd bytes alone.
#define FX_PIXEL_OF_ONE_128(P, A, B) \
    FX_TABLES FX_LAST_FIRST("16") FX_LAST_SECOND("20") FX_ADD("26", "24") FX_WRAP("24", A) FX_WIDEN("24") \
    FX_SUM("24", B)
#define FX_CODES_OF_ONE_128 FX_READ("(%[i])", "16") FX_READ("(%[j])", "20")
#define FX_PIXEL_OF_TWO_128(P, A, B, C, D) \
    FX_TABLES FX_COPY("16", "28") FX_COPY("20", "29") FX_FIRST("28") FX_SECOND("29") FX_LAST_FIRST("17") \
    FX_LAST_SECOND("21") FX_ADD("29", "28") FX_ADD("26", "24") FX_WRAP("28", A) FX_WRAP("24", C) FX_WIDEN("28") \
    FX_WIDEN("24") FX_SUM("28", B) FX_SUM("24", D)
#define FX_CODES_OF_TWO_128 \
    FX_READ("(%[i])", "16") FX_READ("(%[i],%[block])", "17") FX_READ("(%[j])", "20") FX_READ("(%[j],%[block])", "21")
#define FX_OPEN_ONE(P, A, B) FX_READ("128*" P "(%[acc])", A) FX_READ("128*" P "+64(%[acc])", B)
#define FX_CLOSE_ONE(P, A, B) FX_WRITE(A, "128*" P "(%[acc])") FX_WRITE(B, "128*" P "+64(%[acc])")
#define FX_OPEN_TWO(P, A, B, C, D) \
    FX_OPEN_ONE(P, A, B) FX_READ("128*" P "(%[acc],%[next])", C) FX_READ("128*" P "+64(%[acc],%[next])", D)
#define FX_CLOSE_TWO(P, A, B, C, D) \
    FX_CLOSE_ONE(P, A, B) FX_WRITE(C, "128*" P "(%[acc],%[next])") FX_WRITE(D, "128*" P "+64(%[acc],%[next])")
#define FX_RUN(OPEN, CODES, PIXELS, CLOSE) \
    asm volatile(OPEN "vpbroadcastw %[weights], %%zmm31\n\t" \
                 "1:\n\tmov (%[at]), %[t]\n\tmov 8(%[at]), %[i]\n\tmov 16(%[at]), %[u]\n\tmov 24(%[at]), %[j]\n\t" \
                 "add %[x], %[t]\n\tadd %[x], %[u]\n\tadd %[from], %[i]\n\tadd %[from], %[j]\n\t" CODES PIXELS \
                 "add $32, %[at]\n\tcmp %[at], %[end]\n\tjne 1b\n\t" CLOSE \
                 : [at] "+r"(at), [t] "=&r"(t), [u] "=&r"(u), [i] "=&r"(i), [j] "=&r"(j) \
                 : [end] "r"(end), [x] "r"(x * job->table_step), [from] "r"(block * job->index_block), \
                   [step] "r"(job->table_step), [block] "r"(job->index_block), [acc] "r"(acc), \
                   [next] "r"(job->pixels * 128), [weights] "m"(weights) \
                 : "memory", "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", \
                   "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15", "xmm16", "xmm17", "xmm18", "xmm19", "xmm20", \
                   "xmm21", "xmm22", "xmm23", "xmm24", "xmm25", "xmm26", "xmm27", "xmm28", "xmm29", "xmm30", "xmm31")
// what is done for each pixel, and registers of its sums
#define FX_ONE_1(DO) DO("0", "0", "1")
#define FX_ONE_2(DO) FX_ONE_1(DO) DO("1", "2", "3")
#define FX_ONE_3(DO) FX_ONE_2(DO) DO("2", "4", "5")
#define FX_ONE_4(DO) FX_ONE_3(DO) DO("3", "6", "7")
#define FX_ONE_5(DO) FX_ONE_4(DO) DO("4", "8", "9")
#define FX_ONE_6(DO) FX_ONE_5(DO) DO("5", "10", "11")
#define FX_ONE_7(DO) FX_ONE_6(DO) DO("6", "12", "13")
#define FX_ONE_8(DO) FX_ONE_7(DO) DO("7", "14", "15")
#define FX_TWO_1(DO) DO("0", "0", "1", "2", "3")
#define FX_TWO_2(DO) FX_TWO_1(DO) DO("1", "4", "5", "6", "7")
#define FX_TWO_3(DO) FX_TWO_2(DO) DO("2", "8", "9", "10", "11")
#define FX_TWO_4(DO) FX_TWO_3(DO) DO("3", "12", "13", "14", "15")
// registers that the indices of K = 128 leave free
#define FX_TWO_5(DO) FX_TWO_4(DO) DO("4", "18", "19", "22", "23")
// a tile of P pixels; ONE or TWO blocks, and which codes and look-ups
#define FX_TILE(BLOCKS, P, KIND) \
    if constexpr (PIXELS == P) \
        FX_RUN(FX_##BLOCKS##_##P(FX_OPEN_##BLOCKS), FX_CODES_OF_##KIND, FX_##BLOCKS##_##P(FX_PIXEL_OF_##KIND), \
               FX_##BLOCKS##_##P(FX_CLOSE_##BLOCKS))

// The step that is left over where their number is odd.
static void add_step(const SumJob* job, const ConvStep& step, int64_t block, int64_t x, int64_t pixels) {
    const __m512i ones = _mm512_set1_epi8(1);
    const uint8_t* codes = step.index + block * job->index_block;
    uint8_t* acc = job->acc + (block * job->pixels + x) * 128;
    for (int64_t p = 0; p < pixels; p++) {
        const uint8_t* table = step.table + (x + p) * job->table_step;
        for (int i = 0; i < 128; i += 64) {
            const __m512i e = _mm512_permutex2var_epi8(load(table), load(codes + i), load(table + 64));
            store(acc + p * 128 + i, _mm512_add_epi16(load(acc + p * 128 + i), _mm512_maddubs_epi16(e, ones)));
        }
    }
}

template <int PIXELS, int BLOCKS>
static void sum_gang2(const SumJob* job, int64_t block, int64_t x) {
    const ConvStep *at = job->steps, *end = at + job->step_count / 2 * 2;
    uint8_t* acc = job->acc + (block * job->pixels + x) * 128;
    const uint8_t *t, *u, *i, *j;
    const uint16_t weights = 0x0101;  // both bytes
    if (at < end) {
        if constexpr (BLOCKS == 2) {
            FX_TILE(TWO, 1, TWO); FX_TILE(TWO, 2, TWO); FX_TILE(TWO, 3, TWO); FX_TILE(TWO, 4, TWO);
        } else {
            FX_TILE(ONE, 1, ONE); FX_TILE(ONE, 2, ONE); FX_TILE(ONE, 3, ONE); FX_TILE(ONE, 4, ONE);
            FX_TILE(ONE, 5, ONE); FX_TILE(ONE, 6, ONE); FX_TILE(ONE, 7, ONE); FX_TILE(ONE, 8, ONE);
        }
    }
    for (int b = 0; b < BLOCKS && job->step_count % 2; b++)
        add_step(job, job->steps[job->step_count - 1], block + b, x, PIXELS);
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
    const int64_t tables = x * step, index = block * job->index_block;
    for (int64_t i = 0; i < job->step_count; i += 2) {
        const bool pair = i + 1 < job->step_count;
        const ConvStep one = job->steps[i], two = job->steps[pair ? i + 1 : i];
        const uint8_t *table0 = one.table + tables, *table1 = two.table + tables;
        __m512i c0[Q], c1[Q];
        __mmask64 m0[Q], m1[Q];
        FX_UNROLL
        for (int q = 0; q < Q; q++) {
            const int64_t codes = index + q * job->index_block;
            c0[q] = load(one.index + codes), c1[q] = load(two.index + codes);
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
    FX_UNROLL
    for (int p = 0; p < P; p++)
        for (int i = 0; i < 2 * Q; i++) store(at + (i / 2 * job->pixels + p) * 128 + i % 2 * 64, acc[p][i / 2][i % 2]);
}

template <int PIXELS, int BLOCKS>
static void sum_128(const SumJob* job, int64_t block, int64_t x) {
    const ConvStep *at = job->steps, *end = at + job->step_count / 2 * 2;
    uint8_t* acc = job->acc + (block * job->pixels + x) * 128;
    const uint8_t *t, *u, *i, *j;
    const uint16_t weights = 0x0100;  // the odd byte
    if (at < end) {
        if constexpr (BLOCKS == 2) {
            FX_TILE(TWO, 1, TWO_128); FX_TILE(TWO, 2, TWO_128); FX_TILE(TWO, 3, TWO_128); FX_TILE(TWO, 4, TWO_128);
            FX_TILE(TWO, 5, TWO_128);
        } else {
            FX_TILE(ONE, 1, ONE_128); FX_TILE(ONE, 2, ONE_128); FX_TILE(ONE, 3, ONE_128); FX_TILE(ONE, 4, ONE_128);
            FX_TILE(ONE, 5, ONE_128); FX_TILE(ONE, 6, ONE_128); FX_TILE(ONE, 7, ONE_128); FX_TILE(ONE, 8, ONE_128);
        }
    }
    if (job->step_count % 2 == 0) return;
    SumJob rest = *job;
    rest.steps += job->step_count - 1, rest.step_count = 1;
    sum_gang1<128, PIXELS, BLOCKS>(&rest, block, x);
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
    static const Sum gang2[] = {sum_gang2<1, 1>, sum_gang2<2, 1>, sum_gang2<3, 1>, sum_gang2<4, 1>,
                                sum_gang2<5, 1>, sum_gang2<6, 1>, sum_gang2<7, 1>, sum_gang2<8, 1>};
    static const Sum gang2_two[] = {sum_gang2<1, 2>, sum_gang2<2, 2>, sum_gang2<3, 2>, sum_gang2<4, 2>};
    static const Sum one128[] = {sum_128<1, 1>, sum_128<2, 1>, sum_128<3, 1>, sum_128<4, 1>,
                                 sum_128<5, 1>, sum_128<6, 1>, sum_128<7, 1>, sum_128<8, 1>};
    static const Sum two128[] = {sum_128<1, 2>, sum_128<2, 2>, sum_128<3, 2>, sum_128<4, 2>, sum_128<5, 2>};
    static const Sum one256[] = {sum_gang1<256, 1, 1>, sum_gang1<256, 2, 1>, sum_gang1<256, 3, 1>,
                                 sum_gang1<256, 4, 1>};
    static const Sum one64[] = {sum_gang1<64, 1, 1>, sum_gang1<64, 2, 1>, sum_gang1<64, 3, 1>, sum_gang1<64, 4, 1>,
                                sum_gang1<64, 5, 1>, sum_gang1<64, 6, 1>, sum_gang1<64, 7, 1>, sum_gang1<64, 8, 1>};
    if (t->gang == 1 && t->entries == 64) return sum_all(t, job, one64, 8, nullptr, 0);
    switch (t->entries) {
        case 16: return sum_all(t, job, gang4, 5, nullptr, 0);
        case 32: return sum_all(t, job, gang4_two, 5, nullptr, 0);
        case 64: return sum_all(t, job, gang2, 8, gang2_two, 4);
        case 128: return sum_all(t, job, one128, 8, two128, 5);
        default: return sum_all(t, job, one256, 4, nullptr, 0);
    }
}

// Accumulators of one pixel -> its sums, channels in order, with those in `sums` where there are any.
FX_INLINE void widen(int64_t gang, const uint8_t* acc, const int32_t* sums, __m512i v[4]) {
    if (gang == 4) {
        for (int i = 0; i < 4; i++) v[i] = load(acc + i * 64);
    } else {
        __m512i low = load(acc), high = load(acc + 64);
        if (gang == 1) low = _mm512_sub_epi16(low, _mm512_slli_epi16(high, 8));
        v[0] = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(low));
        v[1] = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(low, 1));
        v[2] = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(high));
        v[3] = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(high, 1));
    }
    for (int i = 0; sums && i < 4; i++) v[i] = _mm512_add_epi32(v[i], load(sums + i * 16));
}

static void decode(const ConvTables* t, const uint8_t* acc, int64_t pixels, int32_t* sums, int add) {
    for (int64_t p = 0; p < pixels; p++, sums += BLOCK, acc += t->acc_bytes) {
        __m512i v[4];
        widen(t->gang, acc, add ? sums : nullptr, v);
        for (int i = 0; i < 4; i++) store(sums + i * 16, v[i]);
    }
}

template <int GANG>
static void finish_row(const ConvTables* t, const FinishJob* job) {
    const FinishJob of = *job;  // no store can change this one
    const __m512i constant = _mm512_set1_epi32(of.constant);
    const __m512 unit = _mm512_set1_ps(of.unit), zero = _mm512_setzero_ps();
    const int64_t bytes = t->acc_bytes;
    __m512 bias[4];
    __mmask16 mask[4];
    for (int i = 0; i < 4; i++) {
        bias[i] = _mm512_loadu_ps(of.bias + i * 16);
        mask[i] = of.channels > i * 16 ? first(of.channels - i * 16) : 0;
    }
    // NaN stays, negative zero goes
    const __mmask16 all = of.relu ? 0 : 0xffff;
    for (int64_t p = 0; p < of.pixels; p++) {
        __m512i sum[4], high[4];
        widen(GANG, of.acc[0] + p * bytes, of.sums[0] ? of.sums[0] + p * BLOCK : nullptr, sum);
        if (of.acc[1]) {
            widen(GANG, of.acc[1] + p * bytes, of.sums[1] ? of.sums[1] + p * BLOCK : nullptr, high);
            for (int i = 0; i < 4; i++) sum[i] = _mm512_add_epi32(sum[i], _mm512_slli_epi32(high[i], 7));
        }
        FX_UNROLL
        for (int i = 0; i < 4; i++) {
            __m512 y = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(sum[i], constant)), unit);
            y = _mm512_add_ps(y, bias[i]);
            y = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(y, zero, _CMP_NLE_UQ) | all, y);
            _mm512_mask_storeu_ps(of.y + p * of.y_stride + i * 16, mask[i], y);
        }
    }
}

static void finish(const ConvTables* t, const FinishJob* job) {
    switch (t->gang) {
        case 4: return finish_row<4>(t, job);
        case 2: return finish_row<2>(t, job);
        default: return finish_row<1>(t, job);
    }
}

}  // namespace
}  // namespace fx
