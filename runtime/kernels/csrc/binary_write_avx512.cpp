// Convolution by tables: sums -> float32 or levels.
#include "binary_table_avx512.h"

namespace fx {
namespace table {
namespace {

// Words of 64 outputs in order.
struct Words {
    __m512i low, high;
};

// What a tile leaves, S[o] + 256 S[o + 32] and S[o + 32] -> 2 S - X, X of the whole window.
FX_INLINE Words settled(const uint16_t* sums, int16_t window) {
    const __m512i odd = _mm512_load_si512(sums + 32), minus = _mm512_set1_epi16(window);
    const __m512i even = _mm512_sub_epi16(_mm512_load_si512(sums), _mm512_slli_epi16(odd, 8));
    return {_mm512_sub_epi16(_mm512_slli_epi16(even, 1), minus), _mm512_sub_epi16(_mm512_slli_epi16(odd, 1), minus)};
}

// Of 16 outputs.
struct Scales {
    __m512 scale, bias;
    __mmask16 mask;

    Scales(const BinaryCall& call, int64_t output) {
        const int64_t count = most(0, least(16, int64_t(call.layout.outputs) - output));
        mask = __mmask16((1u << count) - 1);
        if (!count) output = 0;  // no address beyond the end
        scale = _mm512_maskz_loadu_ps(mask, call.scale + output);
        bias = call.bias ? _mm512_maskz_loadu_ps(mask, call.bias + output) : _mm512_setzero_ps();
    }
    FX_INLINE __m512 operator()(const uint16_t* sums) const {
        const __m256i words = _mm256_load_si256(reinterpret_cast<const __m256i*>(sums));
        return _mm512_add_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(words)), scale), bias);
    }
};

// What comes after scale and bias; the place `at` of y is that of the residual. NaN stays NaN.
FX_INLINE __m512 ended(const BinaryCall& call, __m512 y, const float* at, __mmask16 mask) {
    const __m512 zero = _mm512_setzero_ps();
    if (call.residual) {
        const __m512 residual = _mm512_maskz_loadu_ps(mask, call.residual + (at - static_cast<const float*>(call.y)));
        y = _mm512_add_ps(y, call.residual_relu ? _mm512_max_ps(zero, residual) : residual);
    }
    return call.relu ? _mm512_max_ps(zero, y) : y;
}

FX_INLINE void transpose(__m512* v) {
    __m512 t[16];
    FX_UNROLL
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_ps(v[i], v[i + 1]);
        t[i + 1] = _mm512_unpackhi_ps(v[i], v[i + 1]);
    }
    FX_UNROLL
    for (int i = 0; i < 16; i += 4) FX_UNROLL for (int j = 0; j < 2; j++) {
        const __m512d a = _mm512_castps_pd(t[i + j]), b = _mm512_castps_pd(t[i + j + 2]);
        v[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
        v[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    }
    FX_UNROLL
    for (int half = 0; half < 16; half += 8) FX_UNROLL for (int j = 0; j < 4; j++) {
        t[half + j] = _mm512_shuffle_f32x4(v[half + j], v[half + j + 4], 0x88);
        t[half + j + 4] = _mm512_shuffle_f32x4(v[half + j], v[half + j + 4], 0xdd);
    }
    FX_UNROLL
    for (int j = 0; j < 8; j++) {
        v[j] = _mm512_shuffle_f32x4(t[j], t[j + 8], 0x88);
        v[j + 8] = _mm512_shuffle_f32x4(t[j], t[j + 8], 0xdd);
    }
}

// What a tile leaves of 16 pixels -> S of 32 of the 64 outputs, HIGH the odd ones: 16 pixels of the outputs 2 i and
// 2 i + 1 in words of v[i]. Of fewer pixels the last one is there several times.
template <bool HIGH, bool WHOLE>
FX_INLINE void load_pairs(const uint16_t* sums, int64_t pixels, __m512* v) {
    FX_UNROLL
    for (int i = 0; i < 16; i++) {
        const uint16_t* const from = sums + 64 * (WHOLE || i < pixels ? i : pixels - 1);
        const __m512i odd = _mm512_load_si512(from + 32);
        v[i] = _mm512_castsi512_ps(
            HIGH ? odd : _mm512_sub_epi16(_mm512_load_si512(from), _mm512_slli_epi16(odd, 8)));
    }
    transpose(v);
}

// Rows of at most 16 pixels, one for each output: S -> y. PLAIN: y is scale (2 S - X) and no more; WHOLE: 16 pixels.
template <bool PLAIN, bool WHOLE>
struct Row {
    const BinaryCall& call;
    const float *scale, *bias;
    __m512i minus;  // -X of each pixel
    __mmask16 mask;

    // `twos`: 2 in the low or in the high word, whichever holds the output's S; the other is 0
    FX_INLINE void operator()(__m512i pairs, __m512i twos, int64_t output, float* at) const {
        const __m512 sum = _mm512_cvtepi32_ps(_mm512_dpwssd_epi32(minus, pairs, twos));
        __m512 y = _mm512_mul_ps(sum, _mm512_set1_ps(scale[output]));
        if (!PLAIN && bias) y = _mm512_add_ps(y, _mm512_set1_ps(bias[output]));
        if (!PLAIN) y = ended(call, y, at, mask);
        if (WHOLE) _mm512_storeu_ps(at, y);
        else _mm512_mask_storeu_ps(at, mask, y);
    }
};

// At most 16 pixels from pixel x on of 32 of a block's outputs.
template <bool HIGH, bool PLAIN, bool WHOLE>
void write_rows(const Finished& of, int64_t block, const uint16_t* sums, int64_t x) {
    const BinaryCall& call = of.job.call;
    const int64_t step = call.out_pixels(), first = 64 * block + 32 * HIGH, rows = call.layout.outputs - first;
    const int64_t pixels = WHOLE ? 16 : least(16, of.pixels - x);
    float* const to = static_cast<float*>(call.y) +
                      ((of.job.first + of.image) * call.layout.outputs + first) * step + of.place + x;
    const __mmask16 mask = __mmask16((1u << pixels) - 1);
    const __m512i window = _mm512_cvtepi16_epi32(_mm256_maskz_loadu_epi16(mask, of.windows + x));
    const Row<PLAIN, WHOLE> row{call, call.scale + first, call.bias ? call.bias + first : nullptr,
                                _mm512_sub_epi32(_mm512_setzero_si512(), window), mask};
    __m512 v[16];
    load_pairs<HIGH, WHOLE>(sums + 64 * x, pixels, v);
    FX_UNROLL
    for (int i = 0; i < 16; i++) {
        const __m512i pairs = _mm512_castps_si512(v[i]);
        if (WHOLE || 2 * i < rows) row(pairs, _mm512_set1_epi32(2), 2 * i, to + 2 * i * step);
        if (WHOLE || 2 * i + 1 < rows) row(pairs, _mm512_set1_epi32(2 << 16), 2 * i + 1, to + (2 * i + 1) * step);
    }
}

// 32 outputs of a block -> (outputs, pixels)
template <bool HIGH, bool PLAIN>
void write_half(const Finished& of, int64_t block, const uint16_t* sums) {
    const bool all = of.job.call.layout.outputs - 64 * block - 32 * HIGH >= 32;
    int64_t x = 0;
    for (; all && x + 16 <= of.pixels; x += 16) write_rows<HIGH, PLAIN, true>(of, block, sums, x);
    for (; x < of.pixels; x += 16) write_rows<HIGH, PLAIN, false>(of, block, sums, x);
}

template <bool PLAIN>
void write_channels(const Finished& of, int64_t block, const uint16_t* sums) {
    write_half<false, PLAIN>(of, block, sums);
    write_half<true, PLAIN>(of, block, sums);
}

// 64 outputs -> channels-last
void write_pixels(const Finished& of, int64_t block, uint16_t* sums) {
    const BinaryCall& call = of.job.call;
    const int64_t outputs = call.layout.outputs, first = 64 * block, count = least(64, outputs - first);
    const int64_t pixel = (of.job.first + of.image) * call.out_pixels() + of.place;
    float* to = static_cast<float*>(call.y) + pixel * outputs + first;
    const Scales scales[4] = {{call, first}, {call, first + 16}, {call, first + 32}, {call, first + 48}};
    for (int64_t x = 0; x < of.pixels; x++, to += outputs, sums += 64) {
        const Words words = settled(sums, of.windows[x]);
        _mm512_store_si512(sums, words.low);
        _mm512_store_si512(sums + 32, words.high);
        if (count == 64) {
            FX_UNROLL
            for (int i = 0; i < 4; i++)
                _mm512_storeu_ps(to + 16 * i, ended(call, scales[i](sums + 16 * i), to + 16 * i, 0xffff));
            continue;
        }
        for (int i = 0; 16 * i < count; i++) {
            const __mmask16 mask = scales[i].mask;
            _mm512_mask_storeu_ps(to + 16 * i, mask, ended(call, scales[i](sums + 16 * i), to + 16 * i, mask));
        }
    }
}

// 32 cuts of 32 bits -> words; what lies beyond any sum stays beyond it.
FX_INLINE __m512i cut_words(const int32_t* from, int64_t count) {
    const int64_t rest = most(0, least(32, count));
    const uint32_t bits = rest == 32 ? 0xffffffffu : (1u << rest) - 1;
    const __m256i low = _mm512_cvtsepi32_epi16(_mm512_maskz_loadu_epi32(__mmask16(bits), from));
    const __m256i high = _mm512_cvtsepi32_epi16(_mm512_maskz_loadu_epi32(__mmask16(bits >> 16), from + 16));
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

// Of 32 outputs.
struct Cuts {
    __m512i at[3];

    Cuts(const BinaryCall& call, int64_t output) {
        const int64_t outputs = call.layout.outputs;
        for (int i = 0; i < 3; i++)
            at[i] = output < outputs ? cut_words(call.cuts + i * outputs + output, outputs - output)
                                     : _mm512_setzero_si512();
    }
    FX_INLINE __m256i operator()(__m512i sums) const {
        const __m512i one = _mm512_set1_epi16(1);
        __m512i level = _mm512_maskz_mov_epi16(_mm512_cmpge_epi16_mask(sums, at[0]), one);
        level = _mm512_mask_add_epi16(level, _mm512_cmpge_epi16_mask(sums, at[1]), level, one);
        level = _mm512_mask_add_epi16(level, _mm512_cmpge_epi16_mask(sums, at[2]), level, one);
        return _mm512_cvtepi16_epi8(level);
    }
};

void write_levels(const Finished& of, int64_t block, const uint16_t* sums) {
    const BinaryCall& call = of.job.call;
    const int64_t outputs = call.layout.outputs, first = 64 * block, count = least(64, outputs - first);
    const int64_t pixel = (of.job.first + of.image) * call.out_pixels() + of.place;
    const Cuts low(call, first), high(call, first + 32);
    const __mmask64 mask = count == 64 ? ~__mmask64(0) : (__mmask64(1) << count) - 1;
    uint8_t* to = static_cast<uint8_t*>(call.y) + pixel * outputs + first;
    for (int64_t x = 0; x < of.pixels; x++, to += outputs, sums += 64) {
        const Words words = settled(sums, of.windows[x]);
        const __m512i levels = _mm512_inserti64x4(_mm512_castsi256_si512(low(words.low)), high(words.high), 1);
        if (count == 64) _mm512_storeu_si512(to, levels);
        else _mm512_mask_storeu_epi8(to, mask, levels);
    }
}

}  // namespace

void write(const Finished& of) {
    const BinaryCall& call = of.job.call;
    for (int64_t block = of.first; block < of.last; block++) {
        uint16_t* sums = of.sums + (block - of.first) * of.block_step;
        if (call.cuts) {
            write_levels(of, block, sums);
            continue;
        }
        if (call.y_channels_last) write_pixels(of, block, sums);
        else if (call.bias || call.residual || call.relu) write_channels<false>(of, block, sums);
        else write_channels<true>(of, block, sums);
    }
}

}  // namespace table
}  // namespace fx
