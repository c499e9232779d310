// With VNNI: one `vpdpbusd` adds four products to each of 16 outputs. Six pixels and 64 outputs stay in registers.
#include <immintrin.h>

#include "int8_plain.h"

namespace fx {
namespace {

constexpr int PIXELS = 6;
constexpr int64_t AHEAD = 8192;  // bytes between where images are read or outputs written and what is fetched

// Images and outputs of large layers come from beyond the second-level cache: waiting for them took a third of the time
// of a 3x3 layer of 64 channels on 224 x 224 pixels.
FX_INLINE void fetch(const float* at) { _mm_prefetch(reinterpret_cast<const char*>(at) + AHEAD, _MM_HINT_T0); }

FX_INLINE __m512i rounded16(__m512 x, const Int8Rounding& at) {
    __m512 value = _mm512_mul_ps(x, _mm512_set1_ps(at.inverse));
    value = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(value, value, _CMP_ORD_Q), value);
    value = _mm512_min_ps(_mm512_max_ps(value, _mm512_set1_ps(at.low())), _mm512_set1_ps(at.high()));
    return _mm512_add_epi32(_mm512_cvtps_epi32(value), _mm512_set1_epi32(at.zero));
}

FX_INLINE __mmask16 first16(int64_t count) { return count >= 16 ? 0xffff : __mmask16((1 << count) - 1); }

Int8Span span(const float* x, int64_t count) {
    constexpr int SIDE = 4;
    const __m512 largest = _mm512_set1_ps(FLT_MAX);
    __m512 low[SIDE], high[SIDE];
    FX_UNROLL
    for (int j = 0; j < SIDE; j++) low[j] = high[j] = _mm512_setzero_ps();
    for (int64_t i = 0; i < count; i += 16 * SIDE) {
        FX_UNROLL
        for (int j = 0; j < SIDE; j++) {
            const int64_t left = count - i - 16 * j;
            fetch(x + i + 16 * j);
            const __m512 value = _mm512_maskz_loadu_ps(left > 0 ? first16(left) : 0, x + i + 16 * j);
            const __mmask16 finite = _mm512_cmp_ps_mask(_mm512_abs_ps(value), largest, _CMP_LE_OQ);
            low[j] = _mm512_mask_min_ps(low[j], finite, low[j], value);
            high[j] = _mm512_mask_max_ps(high[j], finite, high[j], value);
        }
    }
    FX_UNROLL
    for (int j = 1; j < SIDE; j++) {
        low[0] = _mm512_min_ps(low[0], low[j]);
        high[0] = _mm512_max_ps(high[0], high[j]);
    }
    return {_mm512_reduce_min_ps(low[0]), _mm512_reduce_max_ps(high[0])};
}

// Bytes of four channels of 16 pixels: lane p has those of pixel p.
FX_INLINE __m512i rounded4(const Int8Pixels& of, int64_t channel, int64_t channels, int64_t pixel, __mmask16 mask,
                           const Int8Rounding& at) {
    const float* x = of.x + channel * of.channel_step + pixel;
    __m512i lanes = _mm512_setzero_si512();
    for (int64_t c = 0; c < channels; c++, x += of.channel_step) {
        fetch(x);
        const __m128i shift = _mm_cvtsi32_si128(int(8 * c));
        lanes = _mm512_or_si512(lanes, _mm512_sll_epi32(rounded16(_mm512_maskz_loadu_ps(mask, x), at), shift));
    }
    return lanes;
}

// Up to four planes of channels: of each lane the first `channels` bytes are kept.
void round_few_planes(const Int8Pixels& of, const Int8Rounding& at) {
    alignas(64) uint8_t places[64] = {};
    for (int64_t p = 0; p < 16; p++)
        for (int64_t c = 0; c < of.channels; c++) places[p * of.channels + c] = uint8_t(4 * p + c);
    const __m512i order = _mm512_load_si512(places);
    for (int64_t p = 0; p < of.width; p += 16) {
        const int64_t count = least(16, of.width - p), bytes = count * of.channels;
        const __m512i lanes = rounded4(of, 0, of.channels, p, first16(count), at);
        const __mmask64 mask = bytes >= 64 ? ~__mmask64(0) : (__mmask64(1) << bytes) - 1;
        _mm512_mask_storeu_epi8(of.to + p * of.channels, mask, _mm512_permutexvar_epi8(order, lanes));
    }
}

// Four planes at a time; the last four may be some of those before.
void round_planes(const Int8Pixels& of, const Int8Rounding& at) {
    const __m512i count = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i places = _mm512_mullo_epi32(count, _mm512_set1_epi32(int(of.channels)));
    for (int64_t done = 0; done < of.channels; done += 4) {
        const int64_t c = least(done, of.channels - 4);
        for (int64_t p = 0; p < of.width; p += 16) {
            const __mmask16 mask = first16(of.width - p);
            const __m512i lanes = rounded4(of, c, 4, p, mask, at);
            _mm512_mask_i32scatter_epi32(of.to + p * of.channels + c, mask, places, lanes, 1);
        }
    }
}

void round_row(const Int8Pixels& of, const Int8Rounding& at) {
    const bool planes = of.pixel_step == 1 && of.channels > 1;
    if (planes) return of.channels <= 4 ? round_few_planes(of, at) : round_planes(of, at);
    if (of.channel_step != 1 || of.pixel_step != of.channels) {
        if (of.channels != 1 || of.pixel_step != 1) return round_plain(of, at);
    }
    const int64_t values = of.width * of.channels;
    for (int64_t i = 0; i < values; i += 16) {
        const __mmask16 mask = first16(values - i);
        fetch(of.x + i);
        const __m512i bytes = rounded16(_mm512_maskz_loadu_ps(mask, of.x + i), at);
        _mm512_mask_cvtepi32_storeu_epi8(of.to + i, mask, bytes);
    }
}

// Ends of 16 outputs.
struct End16 {
    __m512i offset;
    __m512 scale, bias;
    __mmask16 mask;
    bool full, biased, relu;

    FX_INLINE End16(const Int8End& of, int64_t output, int64_t outputs)
        : mask(first16(outputs - output)), full(outputs - output >= 16), biased(of.bias != nullptr), relu(of.relu) {
        offset = _mm512_maskz_loadu_epi32(mask, of.offset + output);
        scale = _mm512_maskz_loadu_ps(mask, of.scale + output);
        bias = biased ? _mm512_maskz_loadu_ps(mask, of.bias + output) : _mm512_setzero_ps();
    }
    FX_INLINE void store(float* y, __m512i sum) const {
        __m512 value = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_add_epi32(sum, offset)), scale);
        if (biased) value = _mm512_add_ps(value, bias);
        if (relu) value = _mm512_max_ps(_mm512_setzero_ps(), value);  // NaN stays
        if (full) _mm512_storeu_ps(y, value);
        else _mm512_mask_storeu_ps(y, mask, value);
    }
};

// In every lane, by the load unit alone.
FX_INLINE __m512i four_bytes(const uint8_t* from) {
    int32_t word;
    __builtin_memcpy(&word, from, 4);
    return _mm512_set1_epi32(word);
}

template <int COUNT, int BLOCKS, bool SUMS>
void tile(const Int8Row& of, int64_t pixel, int64_t block) {
    __m512i sums[COUNT][BLOCKS], zero = _mm512_setzero_si512();
    asm("" : "+v"(zero));
    FX_UNROLL
    for (int p = 0; p < COUNT; p++) {
        FX_UNROLL
        for (int b = 0; b < BLOCKS; b++) sums[p][b] = zero;
    }
    if (!SUMS) {
        FX_UNROLL
        for (int p = 0; p < COUNT; p++) {
            FX_UNROLL
            for (int b = 0; b < BLOCKS; b++) fetch(of.y + (pixel + p) * of.outputs + (block + b) * LANES16);
        }
    }
    const int8_t* weights = of.weights + block * of.block_bytes();
    const uint8_t* const window = of.image + pixel * of.pixel_bytes;
    const int64_t apart = of.block_bytes();
    for (int64_t i = 0; i < of.dwords; i++, weights += 4 * LANES16) {
        const uint8_t* from = window + of.places[i];
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
    FX_UNROLL
    for (int b = 0; b < BLOCKS; b++) {
        const int64_t output = (block + b) * LANES16, at = pixel * of.outputs + output;
        if (SUMS) {
            int32_t* to = of.sums + pixel * of.lanes() + output;
            FX_UNROLL
            for (int p = 0; p < COUNT; p++, to += of.lanes()) _mm512_storeu_si512(to, sums[p][b]);
            continue;
        }
        const End16 end(of.end, output, of.outputs);
        FX_UNROLL
        for (int p = 0; p < COUNT; p++) end.store(of.y + at + p * of.outputs, sums[p][b]);
    }
}

template <int BLOCKS, bool SUMS>
void all_pixels(const Int8Row& of, int64_t block) {
    int64_t pixel = 0;
    for (; pixel + PIXELS <= of.count; pixel += PIXELS) tile<PIXELS, BLOCKS, SUMS>(of, pixel, block);
    for (; pixel + 4 <= of.count; pixel += 4) tile<4, BLOCKS, SUMS>(of, pixel, block);
    for (; pixel + 2 <= of.count; pixel += 2) tile<2, BLOCKS, SUMS>(of, pixel, block);
    if (pixel < of.count) tile<1, BLOCKS, SUMS>(of, pixel, block);
}

template <bool SUMS>
void all_blocks(const Int8Row& of) {
    const int64_t blocks = ceil_div(of.outputs, LANES16);
    for (int64_t block = 0; block < blocks; block += 4) {
        decltype(&all_pixels<1, SUMS>) const by_rest[] = {all_pixels<1, SUMS>, all_pixels<2, SUMS>, all_pixels<3, SUMS>,
                                                          all_pixels<4, SUMS>};
        by_rest[least(4, blocks - block) - 1](of, block);
    }
}

void row(const Int8Row& of) { of.sums ? all_blocks<true>(of) : all_blocks<false>(of); }

// Largest sums of a few pixels beside each other.
template <int TAPS>
FX_INLINE void largest(const int32_t* sums, int64_t lanes, int64_t taps, int32_t* to) {
    for (int64_t o = 0; o < lanes; o += LANES16) {
        __m512i best = _mm512_loadu_si512(sums + o);
        for (int64_t i = 1; i < (TAPS ? TAPS : taps); i++)
            best = _mm512_max_epi32(best, _mm512_loadu_si512(sums + i * lanes + o));
        _mm512_storeu_si512(to + o, best);
    }
}

void across(const Int8Across& of) {
    const int64_t lanes = of.lanes, width = of.width, kernel = of.kernel, stride = of.stride, count = of.out_width;
    const int32_t* const sums = of.sums;
    int32_t* to = of.to;
    for (int64_t x = 0, left = -of.padding; x < count; x++, left += stride, to += lanes) {
        const int64_t first = most(left, 0), taps = least(left + kernel, width) - first;
        const int32_t* const from = sums + first * lanes;
        if (taps == 3) largest<3>(from, lanes, taps, to);
        else if (taps == 2) largest<2>(from, lanes, taps, to);
        else largest<0>(from, lanes, taps, to);
    }
}

void down(const Int8Down& of) {
    const int64_t outputs = of.outputs, lanes = of.lanes, count = of.count;
    for (int64_t o = 0; o < outputs; o += LANES16) {
        const End16 end(of.end, o, outputs);
        const __m512i flip = _mm512_loadu_si512(of.flips + o);
        const int32_t* rows[POOL_ROWS];
        for (int64_t i = 0; i < count; i++) rows[i] = of.rows[i] + o;
        float* y = of.y + o;
        for (int64_t at = 0; at < of.width * lanes; at += lanes, y += outputs) {
            __m512i best = _mm512_loadu_si512(rows[0] + at);
            for (int64_t i = 1; i < count; i++) best = _mm512_max_epi32(best, _mm512_loadu_si512(rows[i] + at));
            end.store(y, _mm512_xor_si512(best, flip));
        }
    }
}

}  // namespace

const Int8Kernels int8_avx512 = {span, round_row, row, across, down};

}  // namespace fx
