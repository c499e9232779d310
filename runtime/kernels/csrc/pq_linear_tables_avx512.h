// Tables of a fully connected layer with AVX-512: building them, their ranges, rounding them to bytes. Part of
// pq_linear_avx512.cpp.
#pragma once

#include <immintrin.h>

#include "pq_linear.h"
#include "pq_tables.h"

namespace fx {
namespace {

using Floats = __m512;
using Ints = __m512i;

// The sum is made here: gcc would rather keep all terms in memory and add them up at the end.
#define FX_NOW(sum) __asm__("" : "+v"(sum))

// Smallest or largest number of each of sixteen vectors, in their order: halves are joined pairwise, 16 to 8 to 4 to 2 to 1.
template <class Pick>
FX_INLINE Floats across(Floats* v, Pick pick) {
    FX_UNROLL
    for (int i = 0; i < 8; i++)
        v[i] = pick(_mm512_shuffle_f32x4(v[2 * i], v[2 * i + 1], 0x44), _mm512_shuffle_f32x4(v[2 * i], v[2 * i + 1], 0xEE));
    FX_UNROLL
    for (int i = 0; i < 4; i++)
        v[i] = pick(_mm512_shuffle_f32x4(v[2 * i], v[2 * i + 1], 0x88), _mm512_shuffle_f32x4(v[2 * i], v[2 * i + 1], 0xDD));
    FX_UNROLL
    for (int i = 0; i < 2; i++)
        v[i] = pick(_mm512_shuffle_ps(v[2 * i], v[2 * i + 1], 0x44), _mm512_shuffle_ps(v[2 * i], v[2 * i + 1], 0xEE));
    v[0] = pick(_mm512_shuffle_ps(v[0], v[1], 0x88), _mm512_shuffle_ps(v[0], v[1], 0xDD));
    const Ints order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return _mm512_permutexvar_ps(order, v[0]);
}

struct RangeSum {
    Ints worst = _mm512_setzero_si512();
    Floats half = _mm512_setzero_ps();
    __m512d low = _mm512_setzero_pd(), high = _mm512_setzero_pd();

    // Sixteen tables of K entries -> their offsets; those from `count` on do not count.
    template <int K>
    FX_INLINE void add(const float* rows, int64_t stride, int count, Ints spread, float* offsets) {
        Floats least[16], most[16];
        for (int i = 0; i < 16; i++) {
            const float* row = rows + (i < count ? i : 0) * stride;
            least[i] = most[i] = _mm512_permutexvar_ps(spread, _mm512_loadu_ps(row));
            track(least[i]);
            for (int k = 16; k < K; k += 16) {
                const Floats entries = _mm512_loadu_ps(row + k);
                least[i] = _mm512_min_ps(least[i], entries);
                most[i] = _mm512_max_ps(most[i], entries);
                track(entries);
            }
        }
        const Floats bottom = across(least, [](Floats a, Floats b) { return _mm512_min_ps(a, b); });
        const Floats top = across(most, [](Floats a, Floats b) { return _mm512_max_ps(a, b); });
        const Floats middle = _mm512_mul_ps(_mm512_add_ps(bottom, top), _mm512_set1_ps(0.5f));
        half = _mm512_max_ps(half, _mm512_mul_ps(_mm512_sub_ps(top, bottom), _mm512_set1_ps(0.5f)));
        const __mmask16 there = __mmask16((1u << count) - 1);
        _mm512_mask_storeu_ps(offsets, there, middle);
        const Floats counted = _mm512_maskz_mov_ps(there, middle);
        low = _mm512_add_pd(low, _mm512_cvtps_pd(_mm512_castps512_ps256(counted)));
        high = _mm512_add_pd(high, _mm512_cvtps_pd(_mm512_extractf32x8_ps(counted, 1)));
    }

    // As integers, the magnitudes of infinity and NaN are the largest.
    FX_INLINE void track(Floats entries) {
        worst = _mm512_max_epu32(worst, _mm512_and_si512(_mm512_castps_si512(entries), _mm512_set1_epi32(0x7fffffff)));
    }

    FX_INLINE void into(TableRange* range) const {
        const __m512 bound = _mm512_castsi512_ps(_mm512_set1_epi32(int(_mm512_reduce_max_epu32(worst))));
        const float largest = _mm512_reduce_max_ps(half);
        range->ordinary = range->ordinary && _mm_cvtss_f32(_mm512_castps512_ps128(bound)) <= LARGEST;
        range->half = largest > range->half ? largest : range->half;
        range->offsets += _mm512_reduce_add_pd(_mm512_add_pd(low, high));
    }
};

template <int K>
void ranges(int64_t codewords, const float* tables, int64_t begin, int64_t end, float* offsets, TableRange* range) {
    const Ints number = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const Ints spread = _mm512_and_si512(number, _mm512_set1_epi32(int(codewords) - 1));  // K < 16: the first K, repeated
    RangeSum sum;
    for (int64_t m = begin; m < end; m += 16)
        sum.add<K>(tables + m * K, K, int(least(16, end - m)), spread, offsets + m);
    sum.into(range);
}

// Tables of sub-spaces whose width and number of code words are known here: code words are adjacent, all inputs there.
template <int K, int WIDTH>
void build_whole(const float* FX_RESTRICT codes, const float* FX_RESTRICT x, int64_t count, float* FX_RESTRICT tables) {
    for (int64_t m = 0; m < count; m++, codes += K * WIDTH, x += WIDTH, tables += K)
        FX_UNROLL
        for (int k = 0; k < K; k += 16) {
            Floats sum = _mm512_mul_ps(_mm512_loadu_ps(codes + k), _mm512_set1_ps(x[0]));
            FX_UNROLL
            for (int j = 1; j < WIDTH; j++)
                sum = _mm512_add_ps(sum, _mm512_mul_ps(_mm512_loadu_ps(codes + j * K + k), _mm512_set1_ps(x[j])));
            _mm512_storeu_ps(tables + k, sum);
        }
}

using Whole = void (*)(const float*, const float*, int64_t, float*);

Whole whole_of(int64_t codewords, int64_t width) {
    switch (codewords * 16 + width) {
        case 16 * 16 + 1: return build_whole<16, 1>;
        case 16 * 16 + 4: return build_whole<16, 4>;
        case 16 * 16 + 8: return build_whole<16, 8>;
        case 32 * 16 + 4: return build_whole<32, 4>;
        case 32 * 16 + 8: return build_whole<32, 8>;
        case 64 * 16 + 4: return build_whole<64, 4>;
        case 64 * 16 + 8: return build_whole<64, 8>;
        default: return nullptr;
    }
}

void build(const Codebook& codebook, const float* x, int64_t inputs, int64_t begin, int64_t end, float* tables,
           float* offsets, TableRange* range, float* buffer) {
    const int64_t words = codebook.codewords, width = codebook.width;
    const Whole whole = codebook.dims_major && width < 16 ? whole_of(words, width) : nullptr;
    const int64_t known = whole ? most(begin, least(end, inputs / width)) : begin;  // not a ragged last sub-space
    if (known > begin) whole(codebook.data + begin * words * width, x + begin * width, known - begin, tables + begin * words);
    build_tables(codebook, x, inputs, known, end, tables, nullptr, range, buffer);
    if (!offsets) return;
    switch (codebook.codewords) {
        case 32: return ranges<32>(32, tables, begin, end, offsets, range);
        case 64: return ranges<64>(64, tables, begin, end, offsets, range);
        case 128: return ranges<128>(128, tables, begin, end, offsets, range);
        case 256: return ranges<256>(256, tables, begin, end, offsets, range);
        default: return ranges<16>(codebook.codewords, tables, begin, end, offsets, range);
    }
}

// Sub-spaces that one step of the integer kernel of LANES reads, and the bytes of their tables.
constexpr int64_t STEP16 = 8, BYTES16 = 128, STEP32 = 12, BYTES32 = 384;

int64_t plane_bytes(const Layout& layout) {
    if (layout.id == ROWS) return int64_t(layout.subspaces) * layout.codewords;
    if (layout.codewords <= 16) return ceil_div(layout.subspaces, STEP16) * BYTES16;
    return ceil_div(layout.subspaces, STEP32) * BYTES32;
}

int64_t packed_bytes(const Layout& layout, int tables) { return plane_bytes(layout) * (tables == INT16 ? 2 : 1); }

// Where the table of sub-space m begins in a plane.
static inline int64_t place16(int64_t m) { return m / 8 * BYTES16 + m % 2 * 64 + m % 8 / 2 * 16; }

static inline int64_t place32(int64_t m) {
    constexpr int64_t slots[12] = {0, 1, 2, 3, 4, 5, 8, 9, 10, 11, 6, 7};
    return m / 12 * BYTES32 + slots[m % 12] * 32;
}

// Rounds tables of K entries to bytes; two planes for INT16. `bias` makes them unsigned.
template <int K, bool TWO, class Place>
FX_INLINE void pack_rows(const float* values, const float* offsets, float inverse, float top, int64_t begin, int64_t end,
                         uint8_t* low, uint8_t* high, int32_t bias, Place place) {
    const Floats scale = _mm512_set1_ps(inverse), most = _mm512_set1_ps(top), least = _mm512_set1_ps(-top);
    const Ints shift = _mm512_set1_epi32(bias);
    for (int64_t m = begin; m < end; m++) {
        const Floats offset = _mm512_set1_ps(offsets[m]);
        const int64_t where = place(m);
        for (int k = 0; k < K; k += 16) {
            Floats value = _mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(values + m * K + k), offset), scale);
            value = _mm512_max_ps(_mm512_min_ps(value, most), least);
            Ints whole = _mm512_add_epi32(_mm512_cvtps_epi32(value), shift);
            _mm_storeu_si128((__m128i*)(low + where + k), _mm512_cvtepi32_epi8(whole));
            if (TWO) _mm_storeu_si128((__m128i*)(high + where + k), _mm512_cvtepi32_epi8(_mm512_srai_epi32(whole, 8)));
        }
    }
}

template <int K, class Place>
void pack_plane(const Layout& layout, int tables, const float* values, const float* offsets, float inverse, float top,
                int64_t begin, int64_t end, uint8_t* packed, Place place) {
    const bool rows = layout.id == ROWS;
    uint8_t* high = packed + plane_bytes(layout);
    if (tables == INT16)
        pack_rows<K, true>(values, offsets, inverse, top, begin, end, packed, high, rows ? 32768 : 0, place);
    else
        pack_rows<K, false>(values, offsets, inverse, top, begin, end, packed, high, rows ? 128 : 0, place);
}

void pack(const Layout& layout, int tables, const float* values, const float* offsets, float inverse, float top,
          int64_t begin, int64_t end, uint8_t* packed) {
    switch (layout.codewords) {
        case 32: return pack_plane<32>(layout, tables, values, offsets, inverse, top, begin, end, packed, place32);
        case 64:
            return pack_plane<64>(layout, tables, values, offsets, inverse, top, begin, end, packed,
                                  [](int64_t m) { return m * 64; });
        case 128:
            return pack_plane<128>(layout, tables, values, offsets, inverse, top, begin, end, packed,
                                   [](int64_t m) { return m * 128; });
        case 256:
            return pack_plane<256>(layout, tables, values, offsets, inverse, top, begin, end, packed,
                                   [](int64_t m) { return m * 256; });
        default: return pack_plane<16>(layout, tables, values, offsets, inverse, top, begin, end, packed, place16);
    }
}

}  // namespace
}  // namespace fx
