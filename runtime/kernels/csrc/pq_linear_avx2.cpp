// AVX2: tables of sixteen bytes in both halves of a register, looked up by vpshufb.
//
// PAIRS (K <= 16): a byte holds the indices of an even and an odd sub-space of one output. ROWS: a byte is one output;
// a table of K bytes is K / 16 registers, and the bits above the fourth choose between them. Entries are made unsigned and
// added in 16 bits as on AVX-512: whole registers to one sum, their upper bytes to another. float32 tables are gathered.
#if defined(__AVX2__)

#include <immintrin.h>

#include "pq_linear.h"
#include "pq_tables.h"

namespace fx {
namespace {

using Bytes = __m256i;

constexpr int64_t AHEAD = 2048;  // bytes between what is read and what is fetched into the cache

bool knows(const Layout& layout, int tables) {
    return layout.id == ROWS || (layout.id == PAIRS && tables != FP32);
}

int64_t plane_bytes(const Layout& layout) {
    return ceil_div(layout.subspaces, 2) * 2 * table_stride(layout.codewords);
}

int64_t packed_bytes(const Layout& layout, int tables) { return plane_bytes(layout) * (tables == INT16 ? 2 : 1); }

void pack(const Layout& layout, int tables, const float* values, const float* offsets, float inverse, float top,
          int64_t begin, int64_t end, uint8_t* packed) {
    const int64_t stride = table_stride(layout.codewords), plane = plane_bytes(layout);
    const int32_t bias = tables == INT16 ? 32768 : 128;
    int32_t whole[256];
    for (int64_t m = begin; m < end; m++) {
        round_row(values + m * stride, stride, offsets[m], inverse, top, whole);
        uint8_t* low = packed + m * stride;
        for (int64_t k = 0; k < stride; k++) low[k] = uint8_t(whole[k] + bias);
        if (tables == INT16)
            for (int64_t k = 0; k < stride; k++) low[plane + k] = uint8_t((whole[k] + bias) >> 8);
    }
}

// The table of K bytes begins at `table`; `low` are the lowest four bits of `index`.
template <int K>
FX_INLINE Bytes find(const uint8_t* table, Bytes index, Bytes low) {
    if constexpr (K == 16) {
        return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)table)), low);
    } else {
        // the bit that chooses a half of the table, moved to the top of its byte
        constexpr int shift = K == 32 ? 3 : K == 64 ? 2 : K == 128 ? 1 : 0;
        return _mm256_blendv_epi8(find<K / 2>(table, index, low), find<K / 2>(table + K / 2, index, low),
                                  _mm256_slli_epi16(index, shift));
    }
}

// Sums of up to 256 unsigned bytes in 16 bits.
struct ByteSum {
    Bytes all = _mm256_setzero_si256(), odd = _mm256_setzero_si256();
    FX_INLINE void add(Bytes bytes) {
        all = _mm256_add_epi16(all, bytes);
        odd = _mm256_add_epi16(odd, _mm256_srli_epi16(bytes, 8));
    }
    // total[0..31] += factor * sums
    FX_INLINE void flush(int32_t* total, int32_t factor) const {
        alignas(32) uint16_t even_sums[16], odd_sums[16];
        _mm256_store_si256((Bytes*)even_sums, _mm256_sub_epi16(all, _mm256_slli_epi16(odd, 8)));
        _mm256_store_si256((Bytes*)odd_sums, odd);
        for (int i = 0; i < 16; i++) {
            total[2 * i] += factor * int32_t(even_sums[i]);
            total[2 * i + 1] += factor * int32_t(odd_sums[i]);
        }
    }
};

FX_INLINE void store_whole(const PqLookUp& job, const PqImage& image, int64_t output, const int32_t* total,
                           int64_t count) {
    count = least(count, int64_t(job.layout->outputs) - output);
    for (int64_t i = 0; i < count; i++)
        image.y[output + i] = float(total[i]) * image.scale + image.constant + (job.bias ? job.bias[output + i] : 0.0f);
}

// R times 32 outputs. `PAIR`: one row of bytes holds two sub-spaces.
template <int K, bool PAIR, bool TWO, int R>
void sum_bytes(const PqLookUp& job, const PqImage& image, const uint8_t* panel, int64_t stride, int64_t output) {
    constexpr int PER_ROW = PAIR ? 2 : 1;
    const int64_t subspaces = job.layout->subspaces, rows = ceil_div(subspaces, PER_ROW);
    const int64_t plane = plane_bytes(*job.layout);
    const Bytes nibble = _mm256_set1_epi8(0x0f);
    // the table past an odd last sub-space is zero, without the bias
    alignas(32) int32_t total[R * 32];
    for (int i = 0; i < R * 32; i++) total[i] = -int32_t((TWO ? 32768 : 128) * subspaces);
    for (int64_t start = 0; start < rows; start += 256 / PER_ROW) {
        ByteSum low[R], high[R];
        const int64_t stop = least(rows, start + 256 / PER_ROW);
        for (int64_t row = start; row < stop; row++) {
            const uint8_t* at = panel + row * stride;
            const uint8_t* table = image.packed + row * PER_ROW * K;
            _mm_prefetch((const char*)(at + AHEAD), _MM_HINT_T0);
            FX_UNROLL
            for (int r = 0; r < R; r++) {
                const Bytes index = _mm256_loadu_si256((const Bytes*)(at + r * 32));
                const Bytes first = _mm256_and_si256(index, nibble);
                low[r].add(find<K>(table, index, first));
                if (TWO) high[r].add(find<K>(table + plane, index, first));
                if (PAIR) {
                    const Bytes second = _mm256_and_si256(_mm256_srli_epi16(index, 4), nibble);
                    low[r].add(find<K>(table + K, second, second));
                    if (TWO) high[r].add(find<K>(table + plane + K, second, second));
                }
            }
        }
        for (int r = 0; r < R; r++) {
            low[r].flush(total + r * 32, 1);
            if (TWO) high[r].flush(total + r * 32, 256);
        }
    }
    store_whole(job, image, output, total, R * 32);
}

// 64 outputs of ROWS with float32 tables.
void sum_fp32(const PqLookUp& job, const PqImage& image, const uint8_t* panel, int64_t stride, int64_t output) {
    const int64_t step = table_stride(job.layout->codewords);
    const __m256i mask = _mm256_set1_epi32(int(job.layout->codewords) - 1);
    __m256 sum[8];
    for (int r = 0; r < 8; r++) sum[r] = _mm256_setzero_ps();
    for (int64_t m = 0; m < job.layout->subspaces; m++) {
        const uint8_t* at = panel + m * stride;
        const float* table = image.tables + m * step;
        FX_UNROLL
        for (int r = 0; r < 8; r++) {
            const __m256i index = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(at + r * 8)));
            sum[r] = _mm256_add_ps(sum[r], _mm256_i32gather_ps(table, _mm256_and_si256(index, mask), 4));
        }
    }
    alignas(32) float total[64];
    for (int r = 0; r < 8; r++) _mm256_store_ps(total + r * 8, sum[r]);
    const int64_t count = least(64, int64_t(job.layout->outputs) - output);
    for (int64_t i = 0; i < count; i++) image.y[output + i] = total[i] + (job.bias ? job.bias[output + i] : 0.0f);
}

template <int K, bool PAIR>
void sum_of(const PqLookUp& job, const PqImage& image, const uint8_t* panel, int64_t stride, int64_t output, bool wide) {
    if (job.tables == INT16)
        wide ? sum_bytes<K, PAIR, true, 2>(job, image, panel, stride, output)
             : sum_bytes<K, PAIR, true, 1>(job, image, panel, stride, output);
    else
        wide ? sum_bytes<K, PAIR, false, 2>(job, image, panel, stride, output)
             : sum_bytes<K, PAIR, false, 1>(job, image, panel, stride, output);
}

void sum_any(const PqLookUp& job, const PqImage& image, const uint8_t* panel, int64_t stride, int64_t output, bool wide) {
    if (job.layout->id == PAIRS) return sum_of<16, true>(job, image, panel, stride, output, wide);
    if (job.tables == FP32) return sum_fp32(job, image, panel, stride, output);
    switch (job.layout->codewords) {
        case 32: return sum_of<32, false>(job, image, panel, stride, output, wide);
        case 64: return sum_of<64, false>(job, image, panel, stride, output, wide);
        case 128: return sum_of<128, false>(job, image, panel, stride, output, wide);
        case 256: return sum_of<256, false>(job, image, panel, stride, output, wide);
        default: return sum_of<16, false>(job, image, panel, stride, output, wide);
    }
}

void look_up(const PqLookUp& job, int64_t begin, int64_t end) {
    const Layout& layout = *job.layout;
    const int64_t unit = layout.id == PAIRS ? 32 : 64, padded = ceil_div(layout.outputs, unit) * unit;
    const int64_t rows = layout.id == PAIRS ? ceil_div(layout.subspaces, 2) : layout.subspaces;
    for (int64_t output = begin; output < end;) {
        const int64_t first = output / PANEL * PANEL, width = least(PANEL, padded - first);
        const uint8_t* panel = layout.payload + first * rows + (output - first);
        const bool wide = first + width - output >= 64;
        for (int i = 0; i < job.images; i++) sum_any(job, job.image[i], panel, width, output, wide);
        output += wide ? 64 : 32;
    }
}

}  // namespace

const PqLinearKernels pq_linear_avx2 = {knows, packed_bytes, build_tables, pack, look_up};

}  // namespace fx

#endif
