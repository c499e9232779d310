// With VNNI: one `vpdpbusd` adds four products to each of 16 outputs. Six pixels and 64 outputs stay in registers.
#include <immintrin.h>

#include "int8_plain.h"

namespace fx {
namespace {

constexpr int PIXELS = 6;

FX_INLINE __m512i rounded16(__m512 x, const Int8Rounding& at) {
    __m512 value = _mm512_mul_ps(x, _mm512_set1_ps(at.inverse));
    value = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(value, value, _CMP_ORD_Q), value);
    value = _mm512_min_ps(_mm512_max_ps(value, _mm512_set1_ps(at.low())), _mm512_set1_ps(at.high()));
    return _mm512_add_epi32(_mm512_cvtps_epi32(value), _mm512_set1_epi32(at.zero));
}

FX_INLINE __mmask16 first16(int64_t count) { return count >= 16 ? 0xffff : __mmask16((1 << count) - 1); }

// Up to four planes of channels: 16 pixels become 16 lanes of four bytes, of which the first `channels` are kept.
void round_planes(const Int8Pixels& of, const Int8Rounding& at) {
    alignas(64) uint8_t places[64] = {};
    for (int64_t p = 0; p < 16; p++)
        for (int64_t c = 0; c < of.channels; c++) places[p * of.channels + c] = uint8_t(4 * p + c);
    const __m512i order = _mm512_load_si512(places);
    for (int64_t p = 0; p < of.width; p += 16) {
        const int64_t count = least(16, of.width - p), bytes = count * of.channels;
        __m512i lanes = _mm512_setzero_si512();
        for (int64_t c = 0; c < of.channels; c++) {
            const __m512 x = _mm512_maskz_loadu_ps(first16(count), of.x + c * of.channel_step + p);
            const __m128i shift = _mm_cvtsi32_si128(int(8 * c));
            lanes = _mm512_or_si512(lanes, _mm512_sll_epi32(rounded16(x, at), shift));
        }
        const __mmask64 mask = bytes >= 64 ? ~__mmask64(0) : (__mmask64(1) << bytes) - 1;
        _mm512_mask_storeu_epi8(of.to + p * of.channels, mask, _mm512_permutexvar_epi8(order, lanes));
    }
}

void round_row(const Int8Pixels& of, const Int8Rounding& at) {
    if (of.pixel_step == 1 && of.channels > 1 && of.channels <= 4) return round_planes(of, at);
    if (of.channel_step != 1 || of.pixel_step != of.channels) {
        if (of.channels != 1 || of.pixel_step != 1) return round_plain(of, at);
    }
    const int64_t values = of.width * of.channels;
    for (int64_t i = 0; i < values; i += 16) {
        const __mmask16 mask = first16(values - i);
        const __m512i bytes = rounded16(_mm512_maskz_loadu_ps(mask, of.x + i), at);
        _mm512_mask_cvtepi32_storeu_epi8(of.to + i, mask, bytes);
    }
}

FX_INLINE __m512 ended16(const Int8Row& of, int64_t output, __mmask16 mask, __m512i sum) {
    sum = _mm512_add_epi32(sum, _mm512_maskz_loadu_epi32(mask, of.offset + output));
    __m512 y = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), _mm512_maskz_loadu_ps(mask, of.scale + output));
    if (of.bias) y = _mm512_add_ps(y, _mm512_maskz_loadu_ps(mask, of.bias + output));
    if (of.relu) y = _mm512_mask_mov_ps(y, _mm512_cmp_ps_mask(y, _mm512_setzero_ps(), _CMP_LT_OQ), _mm512_setzero_ps());
    return y;
}

// In every lane, by the load unit alone.
FX_INLINE __m512i four_bytes(const uint8_t* from) {
    int32_t word;
    __builtin_memcpy(&word, from, 4);
    return _mm512_set1_epi32(word);
}

template <int COUNT, int BLOCKS>
void tile(const Int8Row& of, int64_t pixel, int64_t block) {
    __m512i sums[COUNT][BLOCKS];
    FX_UNROLL
    for (int p = 0; p < COUNT; p++) {
        FX_UNROLL
        for (int b = 0; b < BLOCKS; b++) sums[p][b] = _mm512_setzero_si512();
    }
    const int8_t* weights = of.weights + block * of.block_bytes();
    const int64_t apart = of.block_bytes();
    for (int64_t s = 0; s < of.segments; s++) {
        const uint8_t* from = of.image + pixel * of.pixel_bytes + of.places[s];
        for (int64_t i = 0; i < of.dwords; i++, from += 4, weights += 4 * LANES16) {
            __m512i weight[BLOCKS];
            FX_UNROLL
            for (int b = 0; b < BLOCKS; b++) weight[b] = _mm512_loadu_si512(weights + b * apart);
            FX_UNROLL
            for (int p = 0; p < COUNT; p++) {
                const __m512i x = four_bytes(from + p * of.pixel_bytes);
                FX_UNROLL
                for (int b = 0; b < BLOCKS; b++) sums[p][b] = _mm512_dpbusd_epi32(sums[p][b], x, weight[b]);
            }
        }
    }
    FX_UNROLL
    for (int p = 0; p < COUNT; p++) {
        FX_UNROLL
        for (int b = 0; b < BLOCKS; b++) {
            const int64_t output = (block + b) * LANES16;
            const __mmask16 mask = first16(of.outputs - output);
            _mm512_mask_storeu_ps(of.y + (pixel + p) * of.outputs + output, mask, ended16(of, output, mask, sums[p][b]));
        }
    }
}

template <int BLOCKS>
void all_pixels(const Int8Row& of, int64_t block) {
    int64_t pixel = 0;
    for (; pixel + PIXELS <= of.count; pixel += PIXELS) tile<PIXELS, BLOCKS>(of, pixel, block);
    for (; pixel + 2 <= of.count; pixel += 2) tile<2, BLOCKS>(of, pixel, block);
    if (pixel < of.count) tile<1, BLOCKS>(of, pixel, block);
}

void row(const Int8Row& of) {
    const int64_t blocks = ceil_div(of.outputs, LANES16);
    for (int64_t block = 0; block < blocks; block += 4) {
        decltype(&all_pixels<1>) const by_rest[] = {all_pixels<1>, all_pixels<2>, all_pixels<3>, all_pixels<4>};
        by_rest[least(4, blocks - block) - 1](of, block);
    }
}

}  // namespace

const Int8Kernels int8_avx512 = {round_row, row};

}  // namespace fx
