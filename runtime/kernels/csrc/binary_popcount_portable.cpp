// Binary layers by counting bits, one word at a time.
#include "binary.h"

namespace fx {
namespace {

int64_t ones(uint64_t word) {
#if defined(__GNUC__)
    return __builtin_popcountll(word);
#else
    word -= word >> 1 & 0x5555555555555555u;
    word = (word & 0x3333333333333333u) + (word >> 2 & 0x3333333333333333u);
    return int64_t(((word + (word >> 4)) & 0x0f0f0f0f0f0f0f0fu) * 0x0101010101010101u >> 56);
#endif
}

void planes(const float* x, int64_t count, const BinaryEdges& edges, int64_t channel, uint64_t* words) {
    for (int64_t begin = 0; begin < count; begin += 64) {
        uint64_t low = 0, high = 0;
        for (int64_t i = 0; i < least(64, count - begin); i++) {
            const unsigned level = level_of(edges, x[begin + i], channel + begin + i);
            low |= uint64_t(level & 1) << i;
            high |= uint64_t(level >> 1) << i;
        }
        words[begin / 32] = low, words[begin / 32 + 1] = high;
    }
}

void level_planes(const uint8_t* levels, int64_t count, uint64_t* words) {
    for (int64_t begin = 0; begin < count; begin += 64) {
        uint64_t low = 0, high = 0;
        for (int64_t i = 0; i < least(64, count - begin); i++) {
            low |= uint64_t(levels[begin + i] & 1) << i;
            high |= uint64_t(levels[begin + i] >> 1 & 1) << i;
        }
        words[begin / 32] = low, words[begin / 32 + 1] = high;
    }
}

void dot(const uint64_t* rows, int64_t count, int64_t words, const uint64_t* weights, int64_t blocks, int32_t* sums) {
    for (int64_t r = 0; r < count; r++, rows += 2 * words, sums += 8 * blocks)
        for (int64_t block = 0; block < blocks; block++)
            for (int64_t o = 0; o < 8; o++) {
                const PlanesPlace place(block, blocks, words);
                int64_t sum = 0;
                for (int64_t i = 0; i < words; i++) {
                    const uint64_t weight = weights[place.first + i * place.step + o];
                    sum += ones(weight & rows[2 * i]) + 2 * ones(weight & rows[2 * i + 1]);
                }
                sums[8 * block + o] = int32_t(sum);
            }
}

}  // namespace

const BinaryPopcount binary_popcount_portable = {planes, level_planes, dot};

}  // namespace fx
