// Without VNNI: `vpmaddubsw` adds two products in 16 bits, which hold them for inputs of 7 bits; the eighth bit goes apart.
#include <immintrin.h>

#include "int8_plain.h"

namespace fx {
namespace {

void row(const Int8Row& of) {
    const __m256i ones = _mm256_set1_epi16(1), seven = _mm256_set1_epi8(127), one = _mm256_set1_epi8(1);
    for (int64_t p = 0; p < of.count; p++)
        for (int64_t block = 0; block * LANES16 < of.outputs; block++) {
            __m256i low[2] = {}, high[2] = {};
            const int8_t* weights = of.weights + block * of.block_bytes();
            for (int64_t i = 0; i < of.dwords; i++, weights += 4 * LANES16) {
                const uint8_t* from = of.image + p * of.pixel_bytes + of.places[i];
                const __m256i x = _mm256_broadcastd_epi32(_mm_loadu_si32(from));
                const __m256i rest = _mm256_and_si256(_mm256_srli_epi16(x, 7), one);
                for (int half = 0; half < 2; half++) {
                    const __m256i weight = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(weights + 32 * half));
                    const __m256i some = _mm256_maddubs_epi16(_mm256_and_si256(x, seven), weight);
                    low[half] = _mm256_add_epi32(low[half], _mm256_madd_epi16(some, ones));
                    const __m256i more = _mm256_maddubs_epi16(rest, weight);
                    high[half] = _mm256_add_epi32(high[half], _mm256_madd_epi16(more, ones));
                }
            }
            alignas(32) int32_t sums[LANES16];
            for (int half = 0; half < 2; half++)
                _mm256_store_si256(reinterpret_cast<__m256i*>(sums + 8 * half),
                                   _mm256_add_epi32(low[half], _mm256_slli_epi32(high[half], 7)));
            for (int64_t o = 0; o < least(LANES16, of.outputs - block * LANES16); o++)
                finish(of, p, block * LANES16 + o, sums[o]);
        }
}

}  // namespace

const Int8Kernels int8_avx2 = {span_plain, round_plain, row, across_plain, down_plain};

}  // namespace fx
