// Plain loops, but for levels and max pools: these keep a block of channels in registers.
#include <immintrin.h>

#include "binary_elements_plain.h"

namespace fx {
namespace {

constexpr int64_t LANES8 = 64, LANES32 = 16;

// Levels of 64 channels: the bits of three comparisons, added up as bytes.
template <bool SIGNED>
void level_block(const float* x, int64_t pixels, int64_t channels, const float* edges, uint8_t* y) {
    const __m512i one = _mm512_set1_epi8(1);
    __m512 edge[3][4], sign[4];
    FX_UNROLL
    for (int i = 0; i < 4; i++) {
        FX_UNROLL
        for (int k = 0; k < 3; k++) edge[k][i] = _mm512_loadu_ps(edges + k * channels + LANES32 * i);
        sign[i] = _mm512_loadu_ps(edges + 3 * channels + LANES32 * i);
    }
    for (int64_t p = 0; p < pixels; p++, x += channels, y += channels) {
        __m512 value[4];
        FX_UNROLL
        for (int i = 0; i < 4; i++) {
            value[i] = _mm512_loadu_ps(x + LANES32 * i);
            if (SIGNED) value[i] = _mm512_mul_ps(value[i], sign[i]);
        }
        __mmask64 above[3];
        FX_UNROLL
        for (int k = 0; k < 3; k++) {
            __mmask16 m[4];
            FX_UNROLL
            for (int i = 0; i < 4; i++) m[i] = _mm512_cmp_ps_mask(value[i], edge[k][i], _CMP_GT_OQ);
            above[k] = _mm512_kunpackd(_mm512_kunpackw(m[3], m[2]), _mm512_kunpackw(m[1], m[0]));
        }
        __m512i level = _mm512_maskz_mov_epi8(above[0], one);
        level = _mm512_mask_add_epi8(level, above[1], level, one);
        _mm512_storeu_si512(y, _mm512_mask_add_epi8(level, above[2], level, one));
    }
}

void level_blocks(const float* x, int64_t pixels, int64_t channels, const float* edges, uint8_t* y) {
    if (channels % LANES8) return levels(x, pixels, channels, edges, y);
    for (int64_t c = 0; c < channels; c += LANES8) {
        bool changed = false;
        for (int64_t i = 0; i < LANES8; i++) changed = changed || edges[3 * channels + c + i] != 1;
        (changed ? level_block<true> : level_block<false>)(x + c, pixels, channels, edges + c, y + c);
    }
}

// A vector of values and the larger one of two; NaN stays.
struct Levels64 {
    using Value = uint8_t;
    static constexpr int64_t LANES = LANES8;
    static constexpr uint8_t NOTHING = 0;
    __m512i v;

    static FX_INLINE Levels64 load(const uint8_t* from, uint64_t mask) { return {_mm512_maskz_loadu_epi8(mask, from)}; }
    FX_INLINE Levels64 max(Levels64 other) const { return {_mm512_max_epu8(v, other.v)}; }
    FX_INLINE void store(uint8_t* to, uint64_t mask) const { _mm512_mask_storeu_epi8(to, mask, v); }
};

struct Floats16 {
    using Value = float;
    static constexpr int64_t LANES = LANES32;
    static constexpr float NOTHING = -__builtin_huge_valf();
    __m512 v;

    static FX_INLINE Floats16 load(const float* from, uint64_t mask) {
        return {_mm512_maskz_loadu_ps(__mmask16(mask), from)};
    }
    FX_INLINE Floats16 max(Floats16 other) const {
        const __m512 larger = _mm512_max_ps(other.v, v);  // v where either is NaN
        return {_mm512_mask_mov_ps(larger, _mm512_cmp_ps_mask(other.v, other.v, _CMP_UNORD_Q), other.v)};
    }
    FX_INLINE void store(float* to, uint64_t mask) const { _mm512_mask_storeu_ps(to, __mmask16(mask), v); }
};

// Taps of a window that lie in the image.
struct Taps {
    int64_t y0, y1, x0, x1;
};

template <class Vector>
void max_window(const typename Vector::Value* from, const Taps& at, const BinaryPool& pool,
                typename Vector::Value* to) {
    const int64_t right = pool.dilation[1] * pool.channels, below = pool.dilation[0] * pool.width * pool.channels;
    for (int64_t c = 0; c < pool.channels; c += Vector::LANES) {
        const int64_t rest = pool.channels - c;
        const uint64_t mask = rest >= 64 ? ~uint64_t(0) : (uint64_t(1) << rest) - 1;
        Vector best = Vector::load(from + at.y0 * below + at.x0 * right + c, mask);
        for (int64_t ky = at.y0; ky < at.y1; ky++)
            for (int64_t kx = at.x0; kx < at.x1; kx++)
                best = best.max(Vector::load(from + ky * below + kx * right + c, mask));
        best.store(to + c, mask);
    }
}

template <class Vector>
void max_windows(const typename Vector::Value* image, const BinaryPool& pool, int64_t row, typename Vector::Value* y) {
    const int64_t top = row * pool.stride[0] - pool.padding[0];
    Taps at;
    inside(pool, 0, top, pool.height, &at.y0, &at.y1);
    for (int64_t x = 0; x < pool.out_width; x++, y += pool.channels) {
        const int64_t left = x * pool.stride[1] - pool.padding[1];
        inside(pool, 1, left, pool.width, &at.x0, &at.x1);
        if (at.y0 < at.y1 && at.x0 < at.x1)
            max_window<Vector>(image + (top * pool.width + left) * pool.channels, at, pool, y);
        else
            for (int64_t i = 0; i < pool.channels; i++) y[i] = Vector::NOTHING;
    }
}

// 16 rows of 16 values: in each step the halves of twice as many rows change places.
FX_INLINE void transpose(__m512* rows) {
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    FX_UNROLL
    for (int step = 0; step < 4; step++) {  // row i and row i + 8 become the rows 2 i and 2 i + 1
        __m512 next[16];
        FX_UNROLL
        for (int i = 0; i < 8; i++) {
            next[2 * i] = _mm512_permutex2var_ps(rows[i], low, rows[i + 8]);
            next[2 * i + 1] = _mm512_permutex2var_ps(rows[i], high, rows[i + 8]);
        }
        FX_UNROLL
        for (int i = 0; i < 16; i++) rows[i] = next[i];
    }
}

void flatten_blocks(const float* image, int64_t pixels, int64_t channels, float* y) {
    const int64_t whole = channels / LANES32 * LANES32;
    for (int64_t p = 0; p < pixels; p += LANES32) {
        const int64_t count = least(LANES32, pixels - p);
        const __mmask16 mask = __mmask16((1u << count) - 1);
        for (int64_t c = 0; c < whole; c += LANES32) {
            __m512 rows[LANES32];
            FX_UNROLL
            for (int64_t i = 0; i < LANES32; i++)
                rows[i] = _mm512_loadu_ps(image + (p + least(i, count - 1)) * channels + c);
            transpose(rows);
            FX_UNROLL
            for (int64_t i = 0; i < LANES32; i++) _mm512_mask_storeu_ps(y + (c + i) * pixels + p, mask, rows[i]);
        }
        for (int64_t c = whole; c < channels; c++)
            for (int64_t i = 0; i < count; i++) y[c * pixels + p + i] = image[(p + i) * channels + c];
    }
}

}  // namespace

const BinaryElements binary_elements_avx512 = {
    level_blocks, PLAIN.affine, PLAIN.add, PLAIN.relu, PLAIN.decode, max_windows<Levels64>, max_windows<Floats16>,
    PLAIN.average, PLAIN.mean, flatten_blocks};

}  // namespace fx
