#include "int8_plain.h"

namespace fx {
namespace {

void row(const Int8Row& of) {
    for (int64_t p = 0; p < of.count; p++)
        for (int64_t block = 0; block * LANES16 < of.outputs; block++) {
            int32_t sums[LANES16] = {};
            const int8_t* weights = of.weights + block * of.block_bytes();
            for (int64_t i = 0; i < of.dwords; i++, weights += 4 * LANES16) {
                const uint8_t* from = of.image + p * of.pixel_bytes + of.places[i];
                for (int64_t o = 0; o < LANES16; o++)
                    for (int64_t j = 0; j < 4; j++) sums[o] += int32_t(from[j]) * weights[4 * o + j];
            }
            for (int64_t o = 0; o < least(LANES16, of.outputs - block * LANES16); o++)
                finish(of, p, block * LANES16 + o, sums[o]);
        }
}

}  // namespace

const Int8Kernels int8_portable = {span_plain, round_plain, row, across_plain, down_plain};

}  // namespace fx
