// Binary layers by counting bits: a byte shuffle counts those of a nibble (Mula's method).
#include <immintrin.h>

#include "binary.h"

namespace fx {
namespace {

constexpr int64_t STEPS = 10;  // a step adds at most 24 to a byte

// The first `count` of eight floats, zeros behind them.
FX_INLINE __m256 some(const float* from, int64_t count) {
    alignas(32) float part[8] = {};
    for (int64_t i = 0; i < count; i++) part[i] = from[i];
    return _mm256_load_ps(part);
}

void planes(const float* x, int64_t count, const BinaryEdges& edges, int64_t channel, uint64_t* words) {
    __m256 t[3], flip = _mm256_setzero_ps();
    for (int j = 0; j < 3; j++) t[j] = _mm256_set1_ps(edges.edges[edges.step ? 0 : j]);
    for (int64_t begin = 0; begin < count; begin += 64) {
        uint64_t low = 0, high = 0;
        for (int64_t i = 0; i < least(64, count - begin); i += 8) {
            const int64_t rest = least(8, count - begin - i), at = channel + begin + i;
            __m256 value = rest == 8 ? _mm256_loadu_ps(x + begin + i) : some(x + begin + i, rest);
            if (edges.step) {
                for (int j = 0; j < 3; j++) t[j] = some(edges.edges + j * edges.step + at, rest);
                flip = some(edges.flip + at, rest);
            }
            value = _mm256_xor_ps(value, flip);
            uint64_t found[3];
            for (int j = 0; j < 3; j++)
                found[j] = uint64_t(_mm256_movemask_ps(_mm256_cmp_ps(value, t[j], _CMP_GT_OQ))) &
                           ((uint64_t(1) << rest) - 1);
            low |= (found[0] ^ found[1] ^ found[2]) << i;
            high |= found[1] << i;
        }
        words[begin / 32] = low, words[begin / 32 + 1] = high;
    }
}

void level_planes(const uint8_t* levels, int64_t count, uint64_t* words) {
    for (int64_t begin = 0; begin < count; begin += 64) {
        alignas(32) uint8_t part[64] = {};
        const uint8_t* from = levels + begin;
        if (count - begin < 64) {
            for (int64_t i = 0; i < count - begin; i++) part[i] = from[i];
            from = part;
        }
        uint64_t low = 0, high = 0;
        for (int i = 0; i < 64; i += 32) {  // the bit that is wanted goes to the top of each byte
            const __m256i found = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i));
            low |= uint64_t(uint32_t(_mm256_movemask_epi8(_mm256_slli_epi16(found, 7)))) << i;
            high |= uint64_t(uint32_t(_mm256_movemask_epi8(_mm256_slli_epi16(found, 6)))) << i;
        }
        words[begin / 32] = low, words[begin / 32 + 1] = high;
    }
}

// Bits of every byte, by a table of those of its halves.
FX_INLINE __m256i bits(__m256i v, __m256i table) {
    const __m256i nibble = _mm256_set1_epi8(15);
    return _mm256_add_epi8(_mm256_shuffle_epi8(table, _mm256_and_si256(v, nibble)),
                           _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(v, 4), nibble)));
}

// Four outputs of one row; `step` from word to word.
FX_INLINE __m256i four(const uint64_t* row, int64_t words, const uint64_t* weights, int64_t step) {
    const __m256i once = _mm256_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4, 0, 1, 1, 2, 1, 2, 2, 3, 1, 2,
                                          2, 3, 2, 3, 3, 4);
    const __m256i twice = _mm256_add_epi8(once, once);
    __m256i total = _mm256_setzero_si256();
    for (int64_t begin = 0; begin < words; begin += STEPS) {
        __m256i bytes = _mm256_setzero_si256();
        for (int64_t i = begin; i < least(words, begin + STEPS); i++) {
            const __m256i weight = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(weights + step * i));
            const __m256i low = _mm256_and_si256(weight, _mm256_set1_epi64x(int64_t(row[2 * i])));
            const __m256i high = _mm256_and_si256(weight, _mm256_set1_epi64x(int64_t(row[2 * i + 1])));
            bytes = _mm256_add_epi8(bytes, _mm256_add_epi8(bits(low, once), bits(high, twice)));
        }
        total = _mm256_add_epi64(total, _mm256_sad_epu8(bytes, _mm256_setzero_si256()));
    }
    return total;
}

void dot(const uint64_t* rows, int64_t count, int64_t words, const uint64_t* weights, int64_t blocks, int32_t* sums) {
    for (int64_t block = 0; block < blocks; block++) {
        const PlanesPlace place(block, blocks, words);
        for (int64_t r = 0; r < count; r++)
            for (int64_t half = 0; half < 8; half += 4) {
                alignas(32) int64_t found[4];
                const __m256i total = four(rows + 2 * words * r, words, weights + place.first + half, place.step);
                _mm256_store_si256(reinterpret_cast<__m256i*>(found), total);
                for (int64_t i = 0; i < 4; i++) sums[8 * (blocks * r + block) + half + i] = int32_t(found[i]);
            }
    }
}

}  // namespace

const BinaryPopcount binary_popcount_avx2 = {planes, level_planes, dot};

}  // namespace fx
