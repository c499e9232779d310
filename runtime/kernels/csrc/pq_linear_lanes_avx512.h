// Look-ups of layout LANES (K <= 32) with AVX-512. Part of pq_linear_avx512.cpp.
#pragma once

#include "pq_linear_store_avx512.h"

namespace fx {
namespace {

FX_INLINE Ints four_tables(Ints index, Ints mask, Ints number) {  // (index & mask) | number
    return _mm512_ternarylogic_epi32(index, mask, number, 0xEA);
}

// Looks up K <= 16: eight sub-spaces of sixteen outputs, in the even and the odd halves of the bytes.
struct Whole16 {
    static constexpr int64_t WORDS = 1, BYTES = BYTES16;
    template <class Use>
    static FX_INLINE void steps(const uint8_t* words, int64_t, Use&& use) {
        const Ints mask = _mm512_set1_epi8(0x0f), number = _mm512_set1_epi32(0x30201000);
        const Ints lanes = _mm512_loadu_si512(words);
        use(0, four_tables(lanes, mask, number));
        use(64, four_tables(_mm512_srli_epi16(lanes, 4), mask, number));
    }
    static FX_INLINE Ints entries(Ints index, const uint8_t* tables) {
        return _mm512_permutexvar_epi8(index, _mm512_loadu_si512(tables));
    }
};

// Looks up K = 32: twelve sub-spaces in two words; four of the first, two of each, four of the second.
struct Whole32 {
    static constexpr int64_t WORDS = 2, BYTES = BYTES32;
    template <class Use>
    static FX_INLINE void steps(const uint8_t* words, int64_t next, Use&& use) {
        const Ints mask = _mm512_set1_epi8(0x1f), number = _mm512_set1_epi32(0x60402000);
        const Ints first = _mm512_loadu_si512(words), second = _mm512_loadu_si512(words + next);
        // bit positions of the eight bytes of two lanes
        const Ints low = _mm512_set1_epi64(0x2f2a25200f0a0500), high = _mm512_set1_epi64(0x3934393419141914);
        use(0, four_tables(_mm512_multishift_epi64_epi8(low, first), mask, number));
        const Ints middle = _mm512_mask_multishift_epi64_epi8(_mm512_multishift_epi64_epi8(high, first),
                                                              0xccccccccccccccccull, high, second);
        use(128, four_tables(middle, mask, number));
        use(256, four_tables(_mm512_multishift_epi64_epi8(low, second), mask, number));
    }
    static FX_INLINE Ints entries(Ints index, const uint8_t* tables) {
        return _mm512_permutex2var_epi8(_mm512_loadu_si512(tables), index, _mm512_loadu_si512(tables + 64));
    }
};

// Words begin..end-1 of a panel. Where more than one pair of images is to be summed, a part of the panel that fits the
// first-level cache is read for all of them, and their sums wait in `kept`; nullptr: from the first word to the last.
struct Part {
    int64_t begin, end;
    Ints* kept;
    bool first, last;
};

constexpr int64_t PART_WORDS = 24;  // of up to 512 bytes, and as many tables of two images

// R times 16 outputs of B images, from column `column` of a panel whose step is `stride` bytes wide.
template <class Kind, bool TWO, int R, int B>
FX_INLINE void sum_lanes(const PqLookUp& job, const PqImage* images, const uint8_t* panel, int64_t stride,
                         int64_t output, const Part& part) {
    const Layout& layout = *job.layout;
    const int64_t words = ceil_div(layout.subspaces, layout.codewords <= 16 ? 8 : 6);
    const int64_t plane = plane_bytes(layout);
    const Ints ones = _mm512_set1_epi8(1);
    Ints low[R][B], high[R][B];
    FX_UNROLL
    for (int i = 0; i < R * B; i++) {
        low[i / B][i % B] = part.first ? _mm512_setzero_si512() : part.kept[i];
        high[i / B][i % B] = part.first || !TWO ? _mm512_setzero_si512() : part.kept[R * B + i];
    }
    for (int64_t word = part.begin, step = word / Kind::WORDS; word < part.end; word += Kind::WORDS, step++) {
        const uint8_t* at = panel + word * stride;
        const int64_t next = word + 1 < words ? stride : 0;  // an odd last word is read twice: its tables are zero
        FX_UNROLL
        for (int r = 0; r < R; r++) {
            fetch(at + r * 64);
            if (Kind::WORDS == 2) fetch(at + next + r * 64);
            Kind::steps(at + r * 64, next, [&](int64_t offset, Ints index) __attribute__((always_inline)) {
                FX_UNROLL
                for (int b = 0; b < B; b++) {
                    const uint8_t* tables = images[b].packed + step * Kind::BYTES + offset;
                    const Ints found = Kind::entries(index, tables);
                    if (!TWO) {
                        low[r][b] = _mm512_dpbusd_epi32(low[r][b], ones, found);
                    } else {
                        low[r][b] = _mm512_dpbusd_epi32(low[r][b], found, ones);
                        high[r][b] = _mm512_dpbusd_epi32(high[r][b], ones, Kind::entries(index, tables + plane));
                    }
                }
            });
        }
    }
    if (!part.last) {
        FX_UNROLL
        for (int i = 0; i < R * B; i++) {
            part.kept[i] = low[i / B][i % B];
            if (TWO) part.kept[R * B + i] = high[i / B][i % B];
        }
        return;
    }
    for (int r = 0; r < R; r++)
        for (int b = 0; b < B; b++)
            store_whole(job, images[b], output + r * 16,
                        TWO ? _mm512_add_epi32(low[r][b], _mm512_slli_epi32(high[r][b], 8)) : low[r][b]);
}

// The `bits` of every lane from bit `shift` on, in its lowest bits; what is above them is something else. Shifts are done by
// the units that look up, which have enough to do: where a multiplication gives the same, it is taken. Fields of the lower
// halves are read in turns with those of the upper, so that all units are busy at any time.
FX_INLINE Ints field(Ints lanes, int shift, int bits) {
    if (shift == 0) return lanes;
    if (shift + bits <= 16) return _mm512_mulhi_epu16(lanes, _mm512_set1_epi16(short(1 << (16 - shift))));
    if (shift == 16) return _mm512_madd_epi16(lanes, _mm512_set1_epi32(1 << 16));
    return _mm512_srli_epi32(lanes, shift);
}

// float32 tables of 16 or 32 entries, in one or two registers.
template <int K, int R, int B>
FX_INLINE void sum_lanes_fp32(const PqLookUp& job, const PqImage* images, const uint8_t* panel, int64_t stride,
                              int64_t output, const Part& part) {
    constexpr int BITS = K == 16 ? 4 : 5, PER_WORD = 32 / BITS;
    Floats sum[R][B];
    FX_UNROLL
    for (int i = 0; i < R * B; i++)
        sum[i / B][i % B] = part.first ? _mm512_setzero_ps() : _mm512_castsi512_ps(part.kept[i]);
    for (int64_t word = part.begin; word < part.end; word++) {
        const uint8_t* at = panel + word * stride;
        for (int r = 0; r < R; r++) fetch(at + r * 64);
        FX_UNROLL
        for (int j = 0; j < PER_WORD / 2; j++) {
            Floats table[2][B], upper[2][B];
            for (int i = 0; i < 2 * B; i++) {
                const float* row = images[i / 2].tables + (word * PER_WORD + j + i % 2 * PER_WORD / 2) * K;
                table[i % 2][i / 2] = _mm512_loadu_ps(row);
                upper[i % 2][i / 2] = K == 32 ? _mm512_loadu_ps(row + 16) : table[i % 2][i / 2];
            }
            FX_UNROLL
            for (int r = 0; r < R; r++) {
                const Ints lanes = _mm512_loadu_si512(at + r * 64);
                FX_UNROLL
                for (int half = 0; half < 2; half++) {
                    const Ints index = field(lanes, (j + half * PER_WORD / 2) * BITS, BITS);
                    for (int b = 0; b < B; b++) {
                        const Floats found = K == 16 ? _mm512_permutexvar_ps(index, table[half][b])
                                                     : _mm512_permutex2var_ps(table[half][b], index, upper[half][b]);
                        // the same sum from other units: permutations, shifts and additions share three of four
                        sum[r][b] = half ? _mm512_fmadd_ps(found, _mm512_set1_ps(1.0f), sum[r][b])
                                         : _mm512_add_ps(sum[r][b], found);
                        FX_NOW(sum[r][b]);
                    }
                }
            }
        }
    }
    FX_UNROLL
    for (int i = 0; i < R * B; i++) {
        if (part.last)
            store(job, images[i % B], output + i / B * 16, sum[i / B][i % B]);
        else
            part.kept[i] = _mm512_castps_si512(sum[i / B][i % B]);
    }
}

template <int R, int B>
void sum_lanes_any(const PqLookUp& job, const PqImage* images, const uint8_t* panel, int64_t stride, int64_t output,
                   const Part& part) {
    const bool small = job.layout->codewords <= 16;
    switch (job.tables) {
        case FP32:
            return small ? sum_lanes_fp32<16, R, B>(job, images, panel, stride, output, part)
                         : sum_lanes_fp32<32, R, B>(job, images, panel, stride, output, part);
        case INT16:
            return small ? sum_lanes<Whole16, true, R, B>(job, images, panel, stride, output, part)
                         : sum_lanes<Whole32, true, R, B>(job, images, panel, stride, output, part);
        default:
            return small ? sum_lanes<Whole16, false, R, B>(job, images, panel, stride, output, part)
                         : sum_lanes<Whole32, false, R, B>(job, images, panel, stride, output, part);
    }
}

// All images, in pairs, for R * 16 outputs of a panel.
template <int R>
void lanes_of(const PqLookUp& job, const uint8_t* panel, int64_t stride, int64_t output, int64_t words) {
    Ints kept[2 * R * MAX_IMAGES];  // of each image: its sums, and those of the upper bytes
    const int64_t step = job.images > 2 ? PART_WORDS : words;
    for (int64_t begin = 0; begin < words; begin += step) {
        const int64_t end = least(words, begin + step);
        int i = 0;
        for (; i + 2 <= job.images; i += 2)
            sum_lanes_any<R, 2>(job, job.image + i, panel, stride, output, {begin, end, kept + 2 * R * i, !begin, end == words});
        if (i < job.images)
            sum_lanes_any<R, 1>(job, job.image + i, panel, stride, output, {begin, end, kept + 2 * R * i, !begin, end == words});
    }
}

void look_up_lanes(const PqLookUp& job, int64_t begin, int64_t end) {
    const Layout& layout = *job.layout;
    const int64_t words = ceil_div(layout.subspaces, layout.codewords <= 16 ? 8 : 6);
    const int64_t padded = ceil_div(layout.outputs, 16) * 16;
    for (int64_t output = begin; output < end;) {
        const int64_t first = output / PANEL * PANEL, width = least(PANEL, padded - first);
        const uint8_t* panel = layout.payload + first * words * 4 + (output - first) * 4;
        const int64_t left = ceil_div(least(end, first + width) - output, 16);
        const bool fits = job.images == 1 && job.tables != INT16;  // the sums of sixteen registers, and their tables
        if (left >= 16 && fits) {
            sum_lanes_any<16, 1>(job, job.image, panel, width * 4, output, {0, words, nullptr, true, true});
            output += 256;
        } else if (left >= 8) {
            lanes_of<8>(job, panel, width * 4, output, words);
            output += 128;
        } else if (left >= 4) {
            lanes_of<4>(job, panel, width * 4, output, words);
            output += 64;
        } else {
            lanes_of<1>(job, panel, width * 4, output, words);
            output += 16;
        }
    }
}

}  // namespace
}  // namespace fx
