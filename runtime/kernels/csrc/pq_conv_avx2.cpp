// Product-quantized convolution with AVX2: tables of 16 bytes are looked up by vpshufb; longer ones are as many of them,
// each of which gives 0 for the indices of the others.
#include <immintrin.h>

#include "pq_conv_plain.h"

namespace fx {
namespace {

FX_INLINE __m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
FX_INLINE void store(void* p, __m256i v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
FX_INLINE __m256i both(const void* p) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(static_cast<const __m128i*>(p)));
}
FX_INLINE void store_halves(uint8_t* one, uint8_t* two, __m256i v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(one), _mm256_castsi256_si128(v));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(two), _mm256_extracti128_si256(v, 1));
}

// Two pixels at once, one in each half: 16 entries of each.
static void build_chunk(const ConvTables* t, const BuildJob* job, const int32_t* codebook, const int32_t* const* planes,
                        int64_t offset) {
    const __m128i shift = _mm_cvtsi32_si128(job->shift);
    const __m256i multiplier = _mm256_set1_epi16(int16_t(job->multiplier)), low7 = _mm256_set1_epi16(127);
    const __m256i middle = _mm256_set1_epi16(MIDDLE * 128);
    const __m256 factor = _mm256_set1_ps(job->factor);
    for (int64_t i = 0; i < job->count; i += 2) {
        const int64_t j = i + 1 < job->count ? i + 1 : i;
        const int64_t one = offset + job->targets[i] * t->term_bytes, two = offset + job->targets[j] * t->term_bytes;
        __m256i a[4] = {};
        for (int64_t p = 0; p < t->pairs; p++) {
            const __m256i s = _mm256_set_m128i(_mm_set1_epi32(planes[p][job->inputs[j]]),
                                               _mm_set1_epi32(planes[p][job->inputs[i]]));
            for (int v = 0; v < 4; v++)
                a[v] = _mm256_add_epi32(a[v], _mm256_madd_epi16(both(codebook + (p * 4 + v) * 4), s));
        }
        if (!job->wide) {
            for (int v = 0; v < 4; v++) a[v] = _mm256_sra_epi32(a[v], shift);
            __m256i q0 = _mm256_mulhrs_epi16(_mm256_packs_epi32(a[0], a[1]), multiplier);
            __m256i q1 = _mm256_mulhrs_epi16(_mm256_packs_epi32(a[2], a[3]), multiplier);
            __m256i u = _mm256_add_epi8(_mm256_packs_epi16(q0, q1), _mm256_set1_epi8(MIDDLE));
            store_halves(job->tables[0] + one, job->tables[0] + two, u);
            continue;
        }
        for (int v = 0; v < 4; v++) a[v] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_cvtepi32_ps(a[v]), factor));
        __m256i u0 = _mm256_add_epi16(_mm256_packs_epi32(a[0], a[1]), middle);
        __m256i u1 = _mm256_add_epi16(_mm256_packs_epi32(a[2], a[3]), middle);
        store_halves(job->tables[0] + one, job->tables[0] + two,
                     _mm256_packus_epi16(_mm256_and_si256(u0, low7), _mm256_and_si256(u1, low7)));
        store_halves(job->tables[1] + one, job->tables[1] + two,
                     _mm256_packus_epi16(_mm256_srli_epi16(u0, 7), _mm256_srli_epi16(u1, 7)));
    }
}

static void build(const ConvTables* t, const BuildJob* job) {
    const int64_t chunks = t->entries / 16;
    for (int64_t term = 0; term < t->terms; term++)
        for (int64_t c = 0; c < chunks; c++)
            build_chunk(t, job, job->codebook + (term * chunks + c) * t->pairs * 16, job->planes + term * t->pairs,
                        term * t->columns * t->term_bytes + c * 16);
}

// P pixels, 32 channels. Sums of 16 bits: even bytes + 256 odd bytes, and odd bytes alone.
template <int PARTS, int P>
static void sum_pixels(const SumJob* job, int64_t block, int64_t x, int64_t half) {
    __m256i acc[P][2];
    uint8_t* at = job->acc + (block * job->pixels + x) * 128 + half * 32;
    for (int p = 0; p < P; p++) acc[p][0] = load(at + p * 128), acc[p][1] = load(at + p * 128 + 64);
    const int64_t tables = x * job->table_step, index = block * job->index_block + half * 32;
    for (int64_t i = 0; i < job->step_count; i += 2) {
        __m256i e[P];
        for (int p = 0; p < P; p++) e[p] = _mm256_setzero_si256();
        for (int64_t k = i; k < least(i + 2, job->step_count); k++) {
            const __m256i codes = load(job->steps[k].index + index);
            const uint8_t* table = job->steps[k].table + tables;
            FX_UNROLL
            for (int part = 0; part < PARTS; part++) {
                // bit 7 is set, and vpshufb gives 0, where the index is not one of this part's
                const __m256i own = _mm256_xor_si256(codes, _mm256_set1_epi8(char(part * 16)));
                const __m256i mine = _mm256_adds_epu8(own, _mm256_set1_epi8(0x70));
                FX_UNROLL
                for (int p = 0; p < P; p++)
                    e[p] = _mm256_add_epi8(e[p], _mm256_shuffle_epi8(both(table + p * job->table_step + part * 16), mine));
            }
        }
        FX_UNROLL
        for (int p = 0; p < P; p++) {
            acc[p][0] = _mm256_add_epi16(acc[p][0], e[p]);
            acc[p][1] = _mm256_add_epi16(acc[p][1], _mm256_srli_epi16(e[p], 8));
        }
    }
    for (int p = 0; p < P; p++) store(at + p * 128, acc[p][0]), store(at + p * 128 + 64, acc[p][1]);
}

template <int PARTS>
static void sum_all(const ConvTables* t, const SumJob* job) {
    for (int64_t block = 0; block < t->blocks; block++)
        for (int64_t half = 0; half < 2; half++) {
            int64_t x = 0;
            for (; x + 4 <= job->pixels; x += 4) sum_pixels<PARTS, 4>(job, block, x, half);
            for (; x + 2 <= job->pixels; x += 2) sum_pixels<PARTS, 2>(job, block, x, half);
            for (; x < job->pixels; x++) sum_pixels<PARTS, 1>(job, block, x, half);
        }
}

static void accumulate(const ConvTables* t, const SumJob* job) {
    switch (t->entries) {
        case 16: return sum_all<1>(t, job);
        case 32: return sum_all<2>(t, job);
        case 64: return sum_all<4>(t, job);
        case 128: return sum_all<8>(t, job);
        default: return sum_all<16>(t, job);
    }
}

static void decode(const ConvTables*, const uint8_t* acc, int64_t pixels, int32_t* sums, int add) {
    for (int64_t i = 0; i < pixels * 4; i++) {
        const int64_t p = i / 4, part = i % 4;  // 16 channels each: low bytes of both halves, then high bytes
        __m256i v = load(acc + p * 128 + part * 32);
        if (part < 2) v = _mm256_sub_epi16(v, _mm256_slli_epi16(load(acc + p * 128 + 64 + part * 32), 8));
        int32_t* to = sums + p * BLOCK + part * 16;
        __m256i one = _mm256_cvtepu16_epi32(_mm256_castsi256_si128(v));
        __m256i two = _mm256_cvtepu16_epi32(_mm256_extracti128_si256(v, 1));
        if (add) one = _mm256_add_epi32(one, load(to)), two = _mm256_add_epi32(two, load(to + 8));
        store(to, one), store(to + 8, two);
    }
}

}  // namespace

extern const ConvKernels conv_avx2;
const ConvKernels conv_avx2 = {4, plain::choose, plain::largest, plain::samples, plain::bounds, plain::peak, build,
                               accumulate, decode, plain::finish<decode>, plain::pool, plain::exact_build, plain::exact_sum,
                               plain::transpose};

}  // namespace fx
