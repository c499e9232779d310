// What look-ups of both layouts need with AVX-512: reading ahead, writing outputs. Part of pq_linear_avx512.cpp.
#pragma once

#include "pq_linear_tables_avx512.h"

namespace fx {
namespace {

// Indices are fetched this many bytes before they are read: as many as must be under way to read memory at its full rate.
// On a Zen 5 into the first-level cache (64 and 82 us for 9216 x 4096, K = 16 and 32, against 82 and 92 into the second;
// cold 200 and 158 against 220 and 230); on a Zen 4, 8 KB were better than 2 KB (430 us against 549, cold).
constexpr int64_t AHEAD = 8192;

FX_INLINE void fetch(const uint8_t* at) { _mm_prefetch((const char*)(at + AHEAD), _MM_HINT_T0); }

// Sixteen outputs of one image: bias and constant added, those past the last left out.
FX_INLINE void store(const PqLookUp& job, const PqImage& image, int64_t output, Floats sum) {
    const int64_t left = int64_t(job.layout->outputs) - output;
    if (left <= 0) return;
    const __mmask16 there = left >= 16 ? __mmask16(0xffff) : __mmask16((1u << left) - 1);
    if (job.bias) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(there, job.bias + output));
    _mm512_mask_storeu_ps(image.y + output, there, sum);
}

FX_INLINE void store_whole(const PqLookUp& job, const PqImage& image, int64_t output, Ints sum) {
    const Floats scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), _mm512_set1_ps(image.scale));
    store(job, image, output, _mm512_add_ps(scaled, _mm512_set1_ps(image.constant)));
}

}  // namespace
}  // namespace fx
