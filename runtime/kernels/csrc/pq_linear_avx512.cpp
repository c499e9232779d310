// AVX-512 with VBMI and VNNI: tables live in registers, indices are the operands of byte and word permutations.
//
// LANES (K <= 32): a 32-bit lane is one output. vpermps and vpermt2ps look at the lowest 4 and 5 bits of a lane only, so
// float32 tables need one shift per look-up. For integers, four sub-spaces of an output are put side by side in the four
// bytes of its lane, each with the number of its table in the bits above the index; vpermb (K = 16: four tables in one
// register) or vpermt2b (K = 32: in two) looks all of them up, and vpdpbusd with ones adds the four entries to 32 bits.
// ROWS (K >= 64): a byte is one output, a register (two, four) one table. Entries are added in 16 bits: whole registers to
// one sum, their upper bytes to another; 256 entries fit before both go to 32 bits.
#if defined(__AVX512VBMI__) && defined(__AVX512VNNI__)

#include <immintrin.h>

#include "pq_linear.h"
#include "pq_tables.h"

namespace fx {
namespace {

using Floats = __m512;
using Ints = __m512i;

// The sum is made here: gcc would rather keep all terms in memory and add them up at the end.
#define FX_NOW(sum) __asm__("" : "+v"(sum))

constexpr int64_t AHEAD = 2048;  // bytes between what is read and what is fetched into the cache

bool knows(const Layout& layout, int) { return layout.id == LANES || (layout.id == ROWS && layout.codewords >= 64); }

// ---- tables ----------------------------------------------------------------------------------------------------------

// Smallest or largest number of each of sixteen vectors, in their order: halves are joined pairwise, 16 to 8 to 4 to 2 to 1.
template <class Pick>
FX_INLINE Floats across(Floats* v, Pick pick) {
    FX_UNROLL
    for (int i = 0; i < 8; i++)
        v[i] = pick(_mm512_shuffle_f32x4(v[2 * i], v[2 * i + 1], 0x44), _mm512_shuffle_f32x4(v[2 * i], v[2 * i + 1], 0xEE));
    FX_UNROLL
    for (int i = 0; i < 4; i++)
        v[i] = pick(_mm512_shuffle_f32x4(v[2 * i], v[2 * i + 1], 0x88), _mm512_shuffle_f32x4(v[2 * i], v[2 * i + 1], 0xDD));
    FX_UNROLL
    for (int i = 0; i < 2; i++)
        v[i] = pick(_mm512_shuffle_ps(v[2 * i], v[2 * i + 1], 0x44), _mm512_shuffle_ps(v[2 * i], v[2 * i + 1], 0xEE));
    v[0] = pick(_mm512_shuffle_ps(v[0], v[1], 0x88), _mm512_shuffle_ps(v[0], v[1], 0xDD));
    const Ints order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return _mm512_permutexvar_ps(order, v[0]);
}

struct RangeSum {
    Ints worst = _mm512_setzero_si512();
    Floats half = _mm512_setzero_ps();
    __m512d low = _mm512_setzero_pd(), high = _mm512_setzero_pd();

    // Sixteen tables of K entries -> their offsets; those from `count` on do not count.
    template <int K>
    FX_INLINE void add(const float* rows, int64_t stride, int count, Ints spread, float* offsets) {
        Floats least[16], most[16];
        for (int i = 0; i < 16; i++) {
            const float* row = rows + (i < count ? i : 0) * stride;
            least[i] = most[i] = _mm512_permutexvar_ps(spread, _mm512_loadu_ps(row));
            track(least[i]);
            for (int k = 16; k < K; k += 16) {
                const Floats entries = _mm512_loadu_ps(row + k);
                least[i] = _mm512_min_ps(least[i], entries);
                most[i] = _mm512_max_ps(most[i], entries);
                track(entries);
            }
        }
        const Floats bottom = across(least, [](Floats a, Floats b) { return _mm512_min_ps(a, b); });
        const Floats top = across(most, [](Floats a, Floats b) { return _mm512_max_ps(a, b); });
        const Floats middle = _mm512_mul_ps(_mm512_add_ps(bottom, top), _mm512_set1_ps(0.5f));
        half = _mm512_max_ps(half, _mm512_mul_ps(_mm512_sub_ps(top, bottom), _mm512_set1_ps(0.5f)));
        const __mmask16 there = __mmask16((1u << count) - 1);
        _mm512_mask_storeu_ps(offsets, there, middle);
        const Floats counted = _mm512_maskz_mov_ps(there, middle);
        low = _mm512_add_pd(low, _mm512_cvtps_pd(_mm512_castps512_ps256(counted)));
        high = _mm512_add_pd(high, _mm512_cvtps_pd(_mm512_extractf32x8_ps(counted, 1)));
    }

    // As integers, the magnitudes of infinity and NaN are the largest.
    FX_INLINE void track(Floats entries) {
        worst = _mm512_max_epu32(worst, _mm512_and_si512(_mm512_castps_si512(entries), _mm512_set1_epi32(0x7fffffff)));
    }

    FX_INLINE void into(TableRange* range) const {
        const __m512 bound = _mm512_castsi512_ps(_mm512_set1_epi32(int(_mm512_reduce_max_epu32(worst))));
        const float largest = _mm512_reduce_max_ps(half);
        range->ordinary = range->ordinary && _mm_cvtss_f32(_mm512_castps512_ps128(bound)) <= LARGEST;
        range->half = largest > range->half ? largest : range->half;
        range->offsets += _mm512_reduce_add_pd(_mm512_add_pd(low, high));
    }
};

template <int K>
void ranges(int64_t codewords, const float* tables, int64_t begin, int64_t end, float* offsets, TableRange* range) {
    const Ints number = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const Ints spread = _mm512_and_si512(number, _mm512_set1_epi32(int(codewords) - 1));  // K < 16: the first K, repeated
    RangeSum sum;
    for (int64_t m = begin; m < end; m += 16)
        sum.add<K>(tables + m * K, K, int(least(16, end - m)), spread, offsets + m);
    sum.into(range);
}

void build(const Codebook& codebook, const float* x, int64_t inputs, int64_t begin, int64_t end, float* tables,
           float* offsets, TableRange* range, float* buffer) {
    build_tables(codebook, x, inputs, begin, end, tables, nullptr, range, buffer);
    if (!offsets) return;
    switch (codebook.codewords) {
        case 32: return ranges<32>(32, tables, begin, end, offsets, range);
        case 64: return ranges<64>(64, tables, begin, end, offsets, range);
        case 128: return ranges<128>(128, tables, begin, end, offsets, range);
        case 256: return ranges<256>(256, tables, begin, end, offsets, range);
        default: return ranges<16>(codebook.codewords, tables, begin, end, offsets, range);
    }
}

// Sub-spaces that one step of the integer kernel of LANES reads, and the bytes of their tables.
constexpr int64_t STEP16 = 8, BYTES16 = 128, STEP32 = 12, BYTES32 = 384;

int64_t plane_bytes(const Layout& layout) {
    if (layout.id == ROWS) return int64_t(layout.subspaces) * layout.codewords;
    if (layout.codewords <= 16) return ceil_div(layout.subspaces, STEP16) * BYTES16;
    return ceil_div(layout.subspaces, STEP32) * BYTES32;
}

int64_t packed_bytes(const Layout& layout, int tables) { return plane_bytes(layout) * (tables == INT16 ? 2 : 1); }

// Where the table of sub-space m begins in a plane.
static inline int64_t place16(int64_t m) { return m / 8 * BYTES16 + m % 2 * 64 + m % 8 / 2 * 16; }

static inline int64_t place32(int64_t m) {
    constexpr int64_t slots[12] = {0, 1, 2, 3, 4, 5, 8, 9, 10, 11, 6, 7};
    return m / 12 * BYTES32 + slots[m % 12] * 32;
}

// Rounds tables of K entries to bytes; two planes for INT16. `bias` makes them unsigned.
template <int K, bool TWO, class Place>
FX_INLINE void pack_rows(const float* values, const float* offsets, float inverse, float top, int64_t begin, int64_t end,
                         uint8_t* low, uint8_t* high, int32_t bias, Place place) {
    const Floats scale = _mm512_set1_ps(inverse), most = _mm512_set1_ps(top), least = _mm512_set1_ps(-top);
    const Ints shift = _mm512_set1_epi32(bias);
    for (int64_t m = begin; m < end; m++) {
        const Floats offset = _mm512_set1_ps(offsets[m]);
        const int64_t where = place(m);
        for (int k = 0; k < K; k += 16) {
            Floats value = _mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(values + m * K + k), offset), scale);
            value = _mm512_max_ps(_mm512_min_ps(value, most), least);
            Ints whole = _mm512_add_epi32(_mm512_cvtps_epi32(value), shift);
            _mm_storeu_si128((__m128i*)(low + where + k), _mm512_cvtepi32_epi8(whole));
            if (TWO) _mm_storeu_si128((__m128i*)(high + where + k), _mm512_cvtepi32_epi8(_mm512_srai_epi32(whole, 8)));
        }
    }
}

template <int K, class Place>
void pack_plane(const Layout& layout, int tables, const float* values, const float* offsets, float inverse, float top,
                int64_t begin, int64_t end, uint8_t* packed, Place place) {
    const bool rows = layout.id == ROWS;
    uint8_t* high = packed + plane_bytes(layout);
    if (tables == INT16)
        pack_rows<K, true>(values, offsets, inverse, top, begin, end, packed, high, rows ? 32768 : 0, place);
    else
        pack_rows<K, false>(values, offsets, inverse, top, begin, end, packed, high, rows ? 128 : 0, place);
}

void pack(const Layout& layout, int tables, const float* values, const float* offsets, float inverse, float top,
          int64_t begin, int64_t end, uint8_t* packed) {
    switch (layout.codewords) {
        case 32: return pack_plane<32>(layout, tables, values, offsets, inverse, top, begin, end, packed, place32);
        case 64:
            return pack_plane<64>(layout, tables, values, offsets, inverse, top, begin, end, packed,
                                  [](int64_t m) { return m * 64; });
        case 128:
            return pack_plane<128>(layout, tables, values, offsets, inverse, top, begin, end, packed,
                                   [](int64_t m) { return m * 128; });
        case 256:
            return pack_plane<256>(layout, tables, values, offsets, inverse, top, begin, end, packed,
                                   [](int64_t m) { return m * 256; });
        default: return pack_plane<16>(layout, tables, values, offsets, inverse, top, begin, end, packed, place16);
    }
}

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

// ---- LANES -----------------------------------------------------------------------------------------------------------

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

// R times 16 outputs of B images, from column `column` of a panel whose step is `stride` bytes wide.
template <class Kind, bool TWO, int R, int B>
FX_INLINE void sum_lanes(const PqLookUp& job, const PqImage* images, const uint8_t* panel, int64_t stride,
                         int64_t output) {
    const Layout& layout = *job.layout;
    const int64_t words = ceil_div(layout.subspaces, layout.codewords <= 16 ? 8 : 6);
    const int64_t plane = plane_bytes(layout);
    const Ints ones = _mm512_set1_epi8(1);
    Ints low[R][B], high[R][B];
    for (int r = 0; r < R; r++)
        for (int b = 0; b < B; b++) low[r][b] = high[r][b] = _mm512_setzero_si512();
    for (int64_t word = 0, step = 0; word < words; word += Kind::WORDS, step++) {
        const uint8_t* at = panel + word * stride;
        const int64_t next = word + 1 < words ? stride : 0;  // an odd last word is read twice: its tables are zero
        FX_UNROLL
        for (int r = 0; r < R; r++) {
            _mm_prefetch((const char*)(at + r * 64 + AHEAD), _MM_HINT_T0);
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
    for (int r = 0; r < R; r++)
        for (int b = 0; b < B; b++)
            store_whole(job, images[b], output + r * 16,
                        TWO ? _mm512_add_epi32(low[r][b], _mm512_slli_epi32(high[r][b], 8)) : low[r][b]);
}

// float32 tables of 16 or 32 entries, in one or two registers.
template <int K, int R, int B>
FX_INLINE void sum_lanes_fp32(const PqLookUp& job, const PqImage* images, const uint8_t* panel, int64_t stride,
                              int64_t output) {
    constexpr int BITS = K == 16 ? 4 : 5, PER_WORD = 32 / BITS;
    const int64_t words = ceil_div(job.layout->subspaces, PER_WORD);
    Floats sum[R][B];
    for (int r = 0; r < R; r++)
        for (int b = 0; b < B; b++) sum[r][b] = _mm512_setzero_ps();
    for (int64_t word = 0; word < words; word++) {
        const uint8_t* at = panel + word * stride;
        for (int r = 0; r < R; r++) _mm_prefetch((const char*)(at + r * 64 + AHEAD), _MM_HINT_T0);
        FX_UNROLL
        for (int j = 0; j < PER_WORD; j++) {
            Floats table[B], upper[B];
            for (int b = 0; b < B; b++) {
                const float* row = images[b].tables + (word * PER_WORD + j) * K;
                table[b] = _mm512_loadu_ps(row);
                upper[b] = K == 32 ? _mm512_loadu_ps(row + 16) : table[b];
            }
            FX_UNROLL
            for (int r = 0; r < R; r++) {
                const Ints index = _mm512_srli_epi32(_mm512_loadu_si512(at + r * 64), j * BITS);
                for (int b = 0; b < B; b++) {
                    const Floats found = K == 16 ? _mm512_permutexvar_ps(index, table[b])
                                                 : _mm512_permutex2var_ps(table[b], index, upper[b]);
                    sum[r][b] = _mm512_add_ps(sum[r][b], found);
                    FX_NOW(sum[r][b]);
                }
            }
        }
    }
    for (int r = 0; r < R; r++)
        for (int b = 0; b < B; b++) store(job, images[b], output + r * 16, sum[r][b]);
}

template <int R, int B>
void sum_lanes_any(const PqLookUp& job, const PqImage* images, const uint8_t* panel, int64_t stride, int64_t output) {
    const bool small = job.layout->codewords <= 16;
    switch (job.tables) {
        case FP32:
            return small ? sum_lanes_fp32<16, R, B>(job, images, panel, stride, output)
                         : sum_lanes_fp32<32, R, B>(job, images, panel, stride, output);
        case INT16:
            return small ? sum_lanes<Whole16, true, R, B>(job, images, panel, stride, output)
                         : sum_lanes<Whole32, true, R, B>(job, images, panel, stride, output);
        default:
            return small ? sum_lanes<Whole16, false, R, B>(job, images, panel, stride, output)
                         : sum_lanes<Whole32, false, R, B>(job, images, panel, stride, output);
    }
}

// All images, in pairs, for R * 16 outputs of a panel.
template <int R>
void lanes_of(const PqLookUp& job, const uint8_t* panel, int64_t stride, int64_t output) {
    int i = 0;
    for (; i + 2 <= job.images; i += 2) sum_lanes_any<R, 2>(job, job.image + i, panel, stride, output);
    if (i < job.images) sum_lanes_any<R, 1>(job, job.image + i, panel, stride, output);
}

void look_up_lanes(const PqLookUp& job, int64_t begin, int64_t end) {
    const Layout& layout = *job.layout;
    const int64_t words = ceil_div(layout.subspaces, layout.codewords <= 16 ? 8 : 6);
    const int64_t padded = ceil_div(layout.outputs, 16) * 16;
    for (int64_t output = begin; output < end;) {
        const int64_t first = output / PANEL * PANEL, width = least(PANEL, padded - first);
        const uint8_t* panel = layout.payload + first * words * 4 + (output - first) * 4;
        const int64_t left = ceil_div(least(end, first + width) - output, 16);
        if (left >= 16 && job.images == 1) {
            sum_lanes_any<16, 1>(job, job.image, panel, width * 4, output);
            output += 256;
        } else if (left >= 8) {
            lanes_of<8>(job, panel, width * 4, output);
            output += 128;
        } else if (left >= 4) {
            lanes_of<4>(job, panel, width * 4, output);
            output += 64;
        } else {
            lanes_of<1>(job, panel, width * 4, output);
            output += 16;
        }
    }
}

// ---- ROWS ------------------------------------------------------------------------------------------------------------

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
                _mm_prefetch((const char*)(at + r * 64 + AHEAD), _MM_HINT_T0);
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
        _mm_prefetch((const char*)(at + AHEAD), _MM_HINT_T0);
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

void look_up(const PqLookUp& job, int64_t begin, int64_t end) {
    if (job.layout->id == LANES) return look_up_lanes(job, begin, end);
    switch (job.layout->codewords) {
        case 64: return look_up_rows<64>(job, begin, end);
        case 128: return look_up_rows<128>(job, begin, end);
        default: return look_up_rows<256>(job, begin, end);
    }
}

}  // namespace

const PqLinearKernels pq_linear_avx512 = {knows, packed_bytes, build, pack, look_up};

}  // namespace fx

#endif
