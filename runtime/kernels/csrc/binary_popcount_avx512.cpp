// Binary layers by counting bits, eight outputs in the lanes of a register (vpopcntq).
#include <immintrin.h>

#include "binary.h"

namespace fx {
namespace {

// Edges of 16 channels.
struct Edges {
    __m512 edge[3], flip;

    Edges(const BinaryEdges& from, int64_t channel, __mmask16 mask) : flip(_mm512_setzero_ps()) {
        for (int i = 0; i < 3; i++)
            edge[i] = from.step ? _mm512_maskz_loadu_ps(mask, from.edges + i * from.step + channel)
                                : _mm512_set1_ps(from.edges[i]);
        if (from.step) flip = _mm512_maskz_loadu_ps(mask, from.flip + channel);
    }
};

void planes(const float* x, int64_t count, const BinaryEdges& edges, int64_t channel, uint64_t* words) {
    Edges at(edges, channel, 0);
    for (int64_t begin = 0; begin < count; begin += 64) {
        uint64_t low = 0, high = 0;
        for (int64_t i = 0; i < least(64, count - begin); i += 16) {
            const __mmask16 mask = __mmask16((1u << least(16, count - begin - i)) - 1);
            if (edges.step) at = Edges(edges, channel + begin + i, mask);
            const __m512 value = _mm512_xor_ps(_mm512_maskz_loadu_ps(mask, x + begin + i), at.flip);
            uint64_t found[3];
            for (int j = 0; j < 3; j++) found[j] = _mm512_mask_cmp_ps_mask(mask, value, at.edge[j], _CMP_GT_OQ);
            low |= (found[0] ^ found[1] ^ found[2]) << i;
            high |= found[1] << i;
        }
        words[begin / 32] = low, words[begin / 32 + 1] = high;
    }
}

void level_planes(const uint8_t* levels, int64_t count, uint64_t* words) {
    for (int64_t begin = 0; begin < count; begin += 64) {
        const int64_t rest = count - begin;
        const __mmask64 mask = rest >= 64 ? ~__mmask64(0) : (__mmask64(1) << rest) - 1;
        const __m512i found = _mm512_maskz_loadu_epi8(mask, levels + begin);
        words[begin / 32] = _mm512_test_epi8_mask(found, _mm512_set1_epi8(1));
        words[begin / 32 + 1] = _mm512_test_epi8_mask(found, _mm512_set1_epi8(2));
    }
}

// BLOCKS blocks beside each other of ROWS rows; `stride` from one row's sums to the next.
template <int ROWS, int BLOCKS>
void dot_of(const uint64_t* rows, int64_t words, const uint64_t* weights, int64_t stride, int32_t* sums) {
    __m512i low[ROWS][BLOCKS], high[ROWS][BLOCKS];
    FX_UNROLL
    for (int r = 0; r < ROWS; r++) {
        FX_UNROLL
        for (int b = 0; b < BLOCKS; b++) low[r][b] = high[r][b] = _mm512_setzero_si512();
    }
    for (int64_t i = 0; i < words; i++, weights += 8 * BLOCKS) {
        FX_UNROLL
        for (int r = 0; r < ROWS; r++) {
            const __m512i one = _mm512_set1_epi64(int64_t(rows[2 * (r * words + i)]));
            const __m512i two = _mm512_set1_epi64(int64_t(rows[2 * (r * words + i) + 1]));
            FX_UNROLL
            for (int b = 0; b < BLOCKS; b++) {
                const __m512i weight = _mm512_loadu_si512(weights + 8 * b);
                low[r][b] = _mm512_add_epi64(low[r][b], _mm512_popcnt_epi64(_mm512_and_si512(weight, one)));
                high[r][b] = _mm512_add_epi64(high[r][b], _mm512_popcnt_epi64(_mm512_and_si512(weight, two)));
            }
        }
    }
    FX_UNROLL
    for (int r = 0; r < ROWS; r++) {
        FX_UNROLL
        for (int b = 0; b < BLOCKS; b++) {
            const __m512i sum = _mm512_add_epi64(low[r][b], _mm512_slli_epi64(high[r][b], 1));
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums + r * stride + 8 * b), _mm512_cvtepi64_epi32(sum));
        }
    }
}

template <int BLOCKS>
void all_rows(const uint64_t* rows, int64_t count, int64_t words, const uint64_t* weights, int64_t stride,
              int32_t* sums) {
    int64_t r = 0;
    for (; r + 2 <= count; r += 2)
        dot_of<2, BLOCKS>(rows + 2 * words * r, words, weights, stride, sums + stride * r);
    if (r < count) dot_of<1, BLOCKS>(rows + 2 * words * r, words, weights, stride, sums + stride * r);
}

void dot(const uint64_t* rows, int64_t count, int64_t words, const uint64_t* weights, int64_t blocks, int32_t* sums) {
    for (int64_t block = 0; block < blocks; block += BESIDE, weights += 8 * BESIDE * words, sums += 8 * BESIDE) {
        decltype(&all_rows<1>) const by_rest[] = {all_rows<1>, all_rows<2>, all_rows<3>, all_rows<4>};
        by_rest[least(BESIDE, blocks - block) - 1](rows, count, words, weights, 8 * blocks, sums);
    }
}

}  // namespace

const BinaryPopcount binary_popcount_avx512 = {planes, level_planes, dot};

}  // namespace fx
