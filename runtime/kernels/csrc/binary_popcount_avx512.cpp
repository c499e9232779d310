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

template <int ROWS, int BLOCKS>
FX_INLINE void dot_of(const uint64_t* rows, int64_t words, const uint64_t* weights, int64_t blocks, int32_t* sums) {
    __m512i low[ROWS][BLOCKS], high[ROWS][BLOCKS];
    FX_UNROLL
    for (int r = 0; r < ROWS; r++) {
        FX_UNROLL
        for (int b = 0; b < BLOCKS; b++) low[r][b] = high[r][b] = _mm512_setzero_si512();
    }
    for (int64_t i = 0; i < words; i++) {
        __m512i weight[BLOCKS];
        FX_UNROLL
        for (int b = 0; b < BLOCKS; b++) weight[b] = _mm512_loadu_si512(weights + (b * words + i) * 8);
        FX_UNROLL
        for (int r = 0; r < ROWS; r++) {
            const __m512i one = _mm512_set1_epi64(int64_t(rows[2 * (r * words + i)]));
            const __m512i two = _mm512_set1_epi64(int64_t(rows[2 * (r * words + i) + 1]));
            FX_UNROLL
            for (int b = 0; b < BLOCKS; b++) {
                low[r][b] = _mm512_add_epi64(low[r][b], _mm512_popcnt_epi64(_mm512_and_si512(weight[b], one)));
                high[r][b] = _mm512_add_epi64(high[r][b], _mm512_popcnt_epi64(_mm512_and_si512(weight[b], two)));
            }
        }
    }
    FX_UNROLL
    for (int r = 0; r < ROWS; r++) {
        FX_UNROLL
        for (int b = 0; b < BLOCKS; b++) {
            const __m512i sum = _mm512_add_epi64(low[r][b], _mm512_slli_epi64(high[r][b], 1));
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums + 8 * (r * blocks + b)), _mm512_cvtepi64_epi32(sum));
        }
    }
}

void dot(const uint64_t* rows, int64_t count, int64_t words, const uint64_t* weights, int64_t blocks, int32_t* sums) {
    int64_t block = 0;
    for (; block + 4 <= blocks; block += 4) {
        const uint64_t* from = weights + 8 * words * block;
        int64_t r = 0;
        for (; r + 2 <= count; r += 2)
            dot_of<2, 4>(rows + 2 * words * r, words, from, blocks, sums + 8 * (blocks * r + block));
        for (; r < count; r++)
            dot_of<1, 4>(rows + 2 * words * r, words, from, blocks, sums + 8 * (blocks * r + block));
    }
    for (; block < blocks; block++)
        for (int64_t r = 0; r < count; r++)
            dot_of<1, 1>(rows + 2 * words * r, words, weights + 8 * words * block, blocks,
                         sums + 8 * (blocks * r + block));
}

}  // namespace

const BinaryPopcount binary_popcount_avx512 = {planes, dot};

}  // namespace fx
