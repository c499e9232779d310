// Convolution by tables: activations -> codes. A code is the levels of three channels, two bits each.
#include "binary_table_avx512.h"

#include <cstring>
#include <utility>

namespace fx {
namespace table {
namespace {

// Levels of 16 values by the edges of one channel, or of 16.
struct Quantizer {
    __m512 edge[3], flip;

    Quantizer(const BinaryEdges& from, int64_t channel) : flip(_mm512_setzero_ps()) {
        for (int i = 0; i < 3; i++) edge[i] = _mm512_set1_ps(from.edges[from.step ? i * from.step + channel : i]);
        if (from.step) flip = _mm512_set1_ps(from.flip[channel]);
    }
    // of channels with edges of their own
    Quantizer(const BinaryEdges& from, int64_t channel, __mmask16 mask) {
        for (int i = 0; i < 3; i++) edge[i] = _mm512_maskz_loadu_ps(mask, from.edges + i * from.step + channel);
        flip = _mm512_maskz_loadu_ps(mask, from.flip + channel);
    }
    // `sum` + `unit` times the level, in 32-bit lanes; FLIPS: whether the sign of any channel changes
    template <bool FLIPS>
    FX_INLINE __m512i add(__m512i sum, __m512i unit, __m512 x) const {
        if (FLIPS) x = _mm512_xor_ps(x, flip);
        FX_UNROLL
        for (int i = 0; i < 3; i++)
            sum = _mm512_mask_add_epi32(sum, _mm512_cmp_ps_mask(x, edge[i], _CMP_GT_OQ), sum, unit);
        return sum;
    }
    FX_INLINE __m512i level(__m512 x) const {
        return add<true>(_mm512_setzero_si512(), _mm512_set1_epi32(1), x);
    }
};

FX_INLINE __mmask64 first_of(int64_t count) { return count >= 64 ? ~__mmask64(0) : (__mmask64(1) << count) - 1; }

// -- x is (N, C, H, W) ------------------------------------------------------------------------------------------------

// Codes that lie side by side: code i is made of x[i], x[i + next] and x[i + 2 next].
struct Run {
    const float* x;
    int64_t next, count;
    uint8_t* codes;
};

// The values of channel k of 64 codes, 16 at a time; of fewer codes, 0 for those that are not there.
struct Whole {
    const float* x;
    int64_t next;
    FX_INLINE __m512 operator()(int k, int i) const { return _mm512_loadu_ps(x + k * next + 16 * i); }
};
struct Part : Whole {
    __mmask64 there;
    FX_INLINE __m512 operator()(int k, int i) const {
        return _mm512_maskz_loadu_ps(__mmask16(there >> 16 * i), x + k * next + 16 * i);
    }
};

// 64 codes of CHANNELS channels, whatever their edges are.
template <int CHANNELS, bool FLIPS>
struct AnyEdges {
    Quantizer of[CHANNELS];

    // of `channel` and those `step` apart
    AnyEdges(const BinaryEdges& edges, int64_t channel, int64_t step)
        : AnyEdges(edges, channel, step, std::make_integer_sequence<int, CHANNELS>()) {}
    template <class Load>
    FX_INLINE __m512i operator()(Load load) const {
        __m128i found[4];
        FX_UNROLL
        for (int i = 0; i < 4; i++) {
            __m512i code = _mm512_setzero_si512();
            FX_UNROLL
            for (int k = 0; k < CHANNELS; k++)
                code = of[k].template add<FLIPS>(code, _mm512_set1_epi32(1 << 2 * k), load(k, i));
            found[i] = _mm512_cvtepi32_epi8(code);
        }
        const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(found[0]), found[1], 1);
        const __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(found[2]), found[3], 1);
        return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
    }

private:
    template <int... K>
    AnyEdges(const BinaryEdges& edges, int64_t channel, int64_t step, std::integer_sequence<int, K...>)
        : of{Quantizer(edges, channel + K * step)...} {}
};

// The same for one set of edges that are not negative, without masks, of which a cycle makes but one. Floats that are
// not negative are ordered as integers; the sign of a difference outlives saturation, and two bits of a level are the
// signs of one difference and of all three.
template <int CHANNELS>
struct PositiveEdges {
    __m512i edge[3];

    explicit PositiveEdges(const BinaryEdges& from) {
        for (int i = 0; i < 3; i++) edge[i] = _mm512_castps_si512(_mm512_set1_ps(from.edges[i] + 0.0f));  // -0 -> 0
    }
    template <class Load>
    FX_INLINE __m512i operator()(Load load) const {
        __m512i code = _mm512_setzero_si512();
        FX_UNROLL
        for (int k = 0; k < CHANNELS; k++) {
            __m512i x[4];
            FX_UNROLL
            for (int i = 0; i < 4; i++)  // NaN -> 0
                x[i] = _mm512_castps_si512(_mm512_max_ps(load(k, i), _mm512_setzero_ps()));
            const __m512i one = exceeds(x, 0), two = exceeds(x, 1), three = exceeds(x, 2);
            code = with_bit(code, _mm512_ternarylogic_epi32(one, two, three, 0x96), 2 * k);
            code = with_bit(code, two, 2 * k + 1);
        }
        return _mm512_permutexvar_epi32(
            _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), code);
    }

private:
    // in the sign of each byte; four bytes of each of x in turn
    FX_INLINE __m512i exceeds(const __m512i (&x)[4], int i) const {
        const __m512i low = _mm512_packs_epi32(_mm512_sub_epi32(edge[i], x[0]), _mm512_sub_epi32(edge[i], x[1]));
        const __m512i high = _mm512_packs_epi32(_mm512_sub_epi32(edge[i], x[2]), _mm512_sub_epi32(edge[i], x[3]));
        return _mm512_packs_epi16(low, high);
    }
    static FX_INLINE __m512i with_bit(__m512i code, __m512i signs, int bit) {
        return _mm512_ternarylogic_epi32(code, _mm512_srli_epi16(signs, unsigned(7 - bit)),
                                         _mm512_set1_epi8(char(1 << bit)), 0xf8);
    }
};

template <class Quantise>
void fill(const Run& run, const Quantise& quantise) {
    int64_t p = 0;
    for (; p + 64 <= run.count; p += 64) _mm512_storeu_si512(run.codes + p, quantise(Whole{run.x + p, run.next}));
    const __mmask64 rest = first_of(run.count - p);
    if (rest) _mm512_mask_storeu_epi8(run.codes + p, rest, quantise(Part{{run.x + p, run.next}, rest}));
}

template <int CHANNELS>
void fill_channels(const Job& job, const Run& of, int64_t channel) {
    const BinaryEdges& edges = job.call.edges;
    if (edges.step) fill(of, AnyEdges<CHANNELS, true>(edges, channel, job.groups));
    else if (edges.edges[0] >= 0) fill(of, PositiveEdges<CHANNELS>(edges));
    else fill(of, AnyEdges<CHANNELS, false>(edges, channel, job.groups));
}

// Codes of half a group and of the groups after it, as many as lie side by side; returns the group behind them.
int64_t fill_half(const Job& job, int64_t image, int64_t half, int64_t group, int64_t begin, int64_t end) {
    const BinaryCall& call = job.call;
    const int64_t channel = 3 * half * job.groups + group, pixels = call.pixels();
    // channels of the code that there are, and how many groups have as many
    const int64_t there = most(0, least(3, ceil_div(call.channels - channel, job.groups)));
    int64_t alike = job.groups - group;
    if (there) alike = least(alike, call.channels - channel - (there - 1) * job.groups);
    if (call.edges.step || begin > 0 || end < pixels) alike = 1;
    const Run run{static_cast<const float*>(call.x) + ((job.first + image) * call.channels + channel) * pixels + begin,
                  job.groups * pixels, (alike - 1) * pixels + end - begin,
                  job.codes_of(image) + (half * job.groups + group) * job.code_step() + begin};
    switch (there) {
        case 0: memset(run.codes, 0, size_t(run.count)); break;
        case 1: fill_channels<1>(job, run, channel); break;
        case 2: fill_channels<2>(job, run, channel); break;
        default: fill_channels<3>(job, run, channel);
    }
    return group + alike;
}

bool planes(const Job& job, int64_t image, int64_t begin, int64_t end) {
    static constexpr CodeTotals TOTALS;
    const int64_t count = 2 * job.groups;
    for (int64_t half = 0; half < 2; half++)
        for (int64_t group = 0; group < job.groups;) group = fill_half(job, image, half, group, begin, end);
    const __m512i total = _mm512_load_si512(TOTALS.of);
    const uint8_t* codes = job.codes_of(image);
    int16_t* totals = job.totals_of(image);
    for (int64_t p = begin; p < end; p += 64) {
        __m512i low = _mm512_setzero_si512(), high = low;
        for (int64_t i = 0; i < count;) {
            __m512i bytes = _mm512_setzero_si512();
            for (const int64_t stop = least(count, i + 28); i < stop; i++)  // 28 times 9 fit a byte
                bytes = _mm512_add_epi8(
                    bytes, _mm512_permutexvar_epi8(_mm512_loadu_si512(codes + i * job.code_step() + p), total));
            low = _mm512_add_epi16(low, _mm512_cvtepu8_epi16(_mm512_castsi512_si256(bytes)));
            high = _mm512_add_epi16(high, _mm512_cvtepu8_epi16(_mm512_extracti64x4_epi64(bytes, 1)));
        }
        _mm512_storeu_si512(totals + p, low);
        _mm512_storeu_si512(totals + p + 32, high);
    }
    return true;
}

// -- x is channels-last -----------------------------------------------------------------------------------------------

// Levels of `count` pixels side by side; those of the last are followed by at most 15 bytes of anything.
void levels_of_pixels(const Job& job, const float* x, int64_t count, uint8_t* levels) {
    const BinaryEdges& edges = job.call.edges;
    const int64_t channels = job.call.channels;
    if (!edges.step) return fill_channels<1>(job, {x, 0, count * channels, levels}, 0);
    for (int64_t i = 0; i < count; i++, x += channels, levels += channels)
        for (int64_t c = 0; c < channels; c += 16) {
            const __mmask16 mask = __mmask16(first_of(least(16, channels - c)));
            const __m512i found = Quantizer(edges, c, mask).level(_mm512_maskz_loadu_ps(mask, x + c));
            _mm_storeu_si128(reinterpret_cast<__m128i*>(levels + c), _mm512_cvtepi32_epi8(found));
        }
}

// Codes of one pixel from its levels; returns eight numbers whose sum is that of the levels. What lies behind the last
// code, before `end`, is overwritten.
__m512i codes_of_pixel(const Job& job, const uint8_t* levels, uint8_t* codes, const uint8_t* end) {
    const int64_t groups = job.groups, channels = job.call.channels;
    __m512i sum = _mm512_setzero_si512();
    auto field = [&](int64_t begin, int64_t g) {
        const int64_t count = least(groups - g, channels - begin - g);
        if (count <= 0) return _mm512_setzero_si512();
        const __m512i found = _mm512_maskz_loadu_epi8(first_of(count), levels + begin + g);
        return _mm512_and_si512(found, _mm512_set1_epi8(3));
    };
    for (int64_t half = 0; half < 2; half++)
        for (int64_t g = 0; g < groups; g += 64) {
            const int64_t begin = 3 * half * groups;
            const __m512i one = field(begin, g), two = field(begin + groups, g), three = field(begin + 2 * groups, g);
            const __m512i all = _mm512_add_epi8(one, _mm512_add_epi8(two, three));
            sum = _mm512_add_epi64(sum, _mm512_sad_epu8(all, _mm512_setzero_si512()));
            const __m512i code =
                _mm512_ternarylogic_epi32(one, _mm512_slli_epi16(two, 2), _mm512_slli_epi16(three, 4), 0xfe);
            uint8_t* const to = codes + half * groups + g;
            if (end - to >= 64) _mm512_storeu_si512(to, code);
            else _mm512_mask_storeu_epi8(to, first_of(groups - g), code);
        }
    return sum;
}

// Codes and totals of as many pixels as 128 levels make, or of one: three permutes gather what the codes are made of.
class Narrow {
public:
    static constexpr int64_t MOST_CHANNELS = 128;

    explicit Narrow(const Job& job) : channels_(job.call.channels), bytes_(2 * job.groups) {
        // the channels whose totals are found for several pixels together; their codes fit a vector
        pixels_ = channels_ == 16 || channels_ == 32 || channels_ == 64 ? MOST_CHANNELS / channels_ : 1;
        alignas(64) uint8_t from[3][64] = {};
        int64_t i = 0;
        for (int64_t pixel = 0; pixel < pixels_; pixel++)
            for (int64_t half = 0; half < 2; half++)
                for (int64_t group = 0; group < job.groups; group++, i++)
                    for (int64_t k = 0; k < 3; k++) {
                        const int64_t channel = (3 * half + k) * job.groups + group;
                        if (channel >= channels_) continue;
                        from[k][i] = uint8_t(pixel * channels_ + channel);
                        there_[k] |= uint64_t(1) << i;
                    }
        for (int64_t k = 0; k < 3; k++) from_[k] = _mm512_load_si512(from[k]);
    }
    int64_t pixels() const { return pixels_; }
    // Of the first `count` pixels.
    FX_INLINE void operator()(const uint8_t* levels, int64_t count, uint8_t* codes, const uint8_t* end,
                              int16_t* totals) const {
        const __m512i low = masked(levels, count * channels_);
        const __m512i high = masked(levels + 64, count * channels_ - 64);
        __m512i part[3];
        FX_UNROLL
        for (int k = 0; k < 3; k++)
            part[k] = _mm512_maskz_mov_epi8(there_[k], _mm512_permutex2var_epi8(low, from_[k], high));
        const __m512i code =
            _mm512_ternarylogic_epi32(part[0], _mm512_slli_epi16(part[1], 2), _mm512_slli_epi16(part[2], 4), 0xfe);
        if (end - codes >= 64) _mm512_storeu_si512(codes, code);
        else _mm512_mask_storeu_epi8(codes, first_of(count * bytes_), code);
        _mm_mask_storeu_epi16(totals, __mmask8((1u << count) - 1), totals_of(low, high));
    }

private:
    static FX_INLINE __m512i masked(const uint8_t* levels, int64_t count) {
        return _mm512_and_si512(_mm512_maskz_loadu_epi8(first_of(most(0, count)), levels), _mm512_set1_epi8(3));
    }
    // Words of all pixels, from sums of eight levels.
    FX_INLINE __m128i totals_of(__m512i low, __m512i high) const {
        const __m512i zero = _mm512_setzero_si512();
        const __m128i eights = _mm_unpacklo_epi64(_mm512_cvtepi64_epi8(_mm512_sad_epu8(low, zero)),
                                                  _mm512_cvtepi64_epi8(_mm512_sad_epu8(high, zero)));
        if (pixels_ >= 4) {
            const __m128i words = _mm_maddubs_epi16(eights, _mm_set1_epi8(1));
            if (pixels_ == 8) return words;
            const __m128i dwords = _mm_madd_epi16(words, _mm_set1_epi16(1));
            return _mm_packs_epi32(dwords, dwords);
        }
        const __m128i halves = _mm_sad_epu8(eights, _mm_setzero_si128());  // 64 levels each
        if (pixels_ == 2) return _mm_shufflelo_epi16(_mm_packs_epi32(halves, halves), 0x08);
        return _mm_add_epi64(halves, _mm_unpackhi_epi64(halves, halves));
    }
    const int64_t channels_, bytes_;
    int64_t pixels_;
    __mmask64 there_[3] = {};
    __m512i from_[3];
};

// `levels` of `count` pixels side by side -> codes and totals, for any number of channels.
void codes_of_pixels(const Job& job, const uint8_t* levels, int64_t count, uint8_t* codes, const uint8_t* end,
                     int16_t* totals) {
    for (int64_t i = 0; i < count; i++, levels += job.call.channels, codes += job.pixel_step())
        totals[i] = int16_t(_mm512_reduce_add_epi64(codes_of_pixel(job, levels, codes, end)));
}

bool pixels(const Job& job, int64_t image, int64_t begin, int64_t end) {
    const BinaryCall& call = job.call;
    // levels are read in other pieces than they are written in: some pixels later, when they have left the store buffer
    constexpr int64_t FEW = 8;
    uint8_t* found = nullptr;
    if (!call.levels_in) {
        found = static_cast<uint8_t*>(scratch(SLOT_PACKED, size_t(FEW * call.channels + 16)));
        if (!found) return false;
    }
    // the codes behind the last pixel may be another thread's
    const uint8_t* const stop = job.codes_of(image) + end * job.pixel_step();
    const bool is_narrow = call.channels <= Narrow::MOST_CHANNELS;
    const Narrow narrow(is_narrow ? job : Job{call, 0, 0, 0, false, nullptr, nullptr});
    for (int64_t p = begin; p < end; p += FEW) {
        const int64_t count = least(FEW, end - p), at = ((job.first + image) * call.pixels() + p) * call.channels;
        if (found) levels_of_pixels(job, static_cast<const float*>(call.x) + at, count, found);
        const uint8_t* levels = found ? found : static_cast<const uint8_t*>(call.x) + at;
        uint8_t* const codes = job.codes_of(image) + p * job.pixel_step();
        int16_t* const totals = job.totals_of(image) + p;
        if (!is_narrow) codes_of_pixels(job, levels, count, codes, stop, totals);
        for (int64_t i = 0; is_narrow && i < count; i += narrow.pixels())
            narrow(levels + i * call.channels, least(narrow.pixels(), count - i), codes + i * job.pixel_step(), stop,
                   totals + i);
    }
    return true;
}

}  // namespace

bool find_codes(const Job& job, int64_t image, int64_t begin, int64_t end) {
    return (job.planar ? planes : pixels)(job, image, begin, end);
}

}  // namespace table
}  // namespace fx
