// Look-ups of layout ROWS (K >= 64) with AVX-512. Part of pq_linear_avx512.cpp.
#pragma once

#include "pq_linear_store_avx512.h"

namespace fx {
namespace {

// K bytes of a table in registers; 64 look-ups at once.
template <int K>
struct ByteTable {
    Ints part[K / 64];
    FX_INLINE explicit ByteTable(const uint8_t* table) {
        for (int i = 0; i < K / 64; i++) part[i] = _mm512_loadu_si512(table + i * 64);
    }
    FX_INLINE Ints find(Ints index) const {
        if constexpr (K == 64) return _mm512_permutexvar_epi8(index, part[0]);
        if constexpr (K >= 128) {
            const Ints low = _mm512_permutex2var_epi8(part[0], index, part[1]);
            if constexpr (K == 128) return low;
            if constexpr (K == 256)
                return _mm512_mask_mov_epi8(low, _mm512_movepi8_mask(index),
                                            _mm512_permutex2var_epi8(part[2], index, part[3]));
        }
    }
};

// Sums of up to 256 unsigned bytes in 16 bits: all = sum of pairs of bytes as numbers, odd = sum of the upper bytes.
struct ByteSum {
    Ints all = _mm512_setzero_si512(), odd = _mm512_setzero_si512();
    FX_INLINE void add(Ints bytes) {
        all = _mm512_add_epi16(all, bytes);
        odd = _mm512_add_epi16(odd, _mm512_srli_epi16(bytes, 8));
    }
    // total[0..63] += factor * sums
    FX_INLINE void flush(int32_t* total, int32_t factor) const {
        alignas(64) uint16_t even_sums[32], odd_sums[32];
        _mm512_store_si512(even_sums, _mm512_sub_epi16(all, _mm512_slli_epi16(odd, 8)));
        _mm512_store_si512(odd_sums, odd);
        for (int i = 0; i < 32; i++) {
            total[2 * i] += factor * int32_t(even_sums[i]);
            total[2 * i + 1] += factor * int32_t(odd_sums[i]);
        }
    }
};

template <int K, bool TWO, int R>
void sum_rows(const PqLookUp& job, const PqImage& image, const uint8_t* panel, int64_t stride, int64_t output) {
    const int64_t subspaces = job.layout->subspaces, plane = subspaces * K;
    const int32_t bias = TWO ? 32768 : 128;
    alignas(64) int32_t total[R * 64];
    for (int i = 0; i < R * 64; i++) total[i] = -int32_t(bias * subspaces);
    for (int64_t start = 0; start < subspaces; start += 256) {
        ByteSum low[R], high[R];
        const int64_t stop = least(subspaces, start + 256);
        for (int64_t m = start; m < stop; m++) {
            const uint8_t* at = panel + m * stride;
            const ByteTable<K> table(image.packed + m * K);
            const ByteTable<K> upper(TWO ? image.packed + plane + m * K : image.packed + m * K);
            FX_UNROLL
            for (int r = 0; r < R; r++) {
                fetch(at + r * 64);
                const Ints index = _mm512_loadu_si512(at + r * 64);
                low[r].add(table.find(index));
                if (TWO) high[r].add(upper.find(index));
            }
        }
        for (int r = 0; r < R; r++) {
            low[r].flush(total + r * 64, 1);
            if (TWO) high[r].flush(total + r * 64, 256);
        }
    }
    for (int i = 0; i < R * 64; i += 16) store_whole(job, image, output + i, _mm512_load_si512(total + i));
}

// K numbers of a float32 table in registers; 16 look-ups at once.
template <int K>
FX_INLINE Floats find_fp32(const float* table, Ints index) {
    if constexpr (K == 32) {
        return _mm512_permutex2var_ps(_mm512_loadu_ps(table), index, _mm512_loadu_ps(table + 16));
    } else {
        const __mmask16 upper = _mm512_test_epi32_mask(index, _mm512_set1_epi32(K / 2));
        return _mm512_mask_mov_ps(find_fp32<K / 2>(table, index), upper, find_fp32<K / 2>(table + K / 2, index));
    }
}

template <int K>
void sum_rows_fp32(const PqLookUp& job, const PqImage& image, const uint8_t* panel, int64_t stride, int64_t output) {
    constexpr int R = 4;
    Floats sum[R];
    for (int r = 0; r < R; r++) sum[r] = _mm512_setzero_ps();
    for (int64_t m = 0; m < job.layout->subspaces; m++) {
        const uint8_t* at = panel + m * stride;
        fetch(at);
        FX_UNROLL
        for (int r = 0; r < R; r++) {
            const Ints index = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(at + r * 16)));
            sum[r] = _mm512_add_ps(sum[r], find_fp32<K>(image.tables + m * K, index));
            FX_NOW(sum[r]);
        }
    }
    for (int r = 0; r < R; r++) store(job, image, output + r * 16, sum[r]);
}

template <int K>
void look_up_rows(const PqLookUp& job, int64_t begin, int64_t end) {
    const Layout& layout = *job.layout;
    const int64_t padded = ceil_div(layout.outputs, 64) * 64;
    for (int64_t output = begin; output < end;) {
        const int64_t first = output / PANEL * PANEL, width = least(PANEL, padded - first);
        const uint8_t* panel = layout.payload + first * layout.subspaces + (output - first);
        const bool wide = least(end, first + width) - output >= 128 && job.tables != FP32;
        for (int i = 0; i < job.images; i++) {
            const PqImage& image = job.image[i];
            if (job.tables == FP32)
                sum_rows_fp32<K>(job, image, panel, width, output);
            else if (job.tables == INT16)
                wide ? sum_rows<K, true, 2>(job, image, panel, width, output)
                     : sum_rows<K, true, 1>(job, image, panel, width, output);
            else
                wide ? sum_rows<K, false, 2>(job, image, panel, width, output)
                     : sum_rows<K, false, 1>(job, image, panel, width, output);
        }
        output += wide ? 128 : 64;
    }
}

}  // namespace
}  // namespace fx
