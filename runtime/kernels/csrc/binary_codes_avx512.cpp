// Convolution by tables: activations -> codes. A code is the levels of three channels, two bits each.
#include "binary_table_avx512.h"

namespace fx {
namespace table {
namespace {

constexpr int64_t RUN = 1024;  // pixels of a plane that are quantised at a time: every channel is a stream for the memory

// Levels of 16 values by the edges of one channel, or of 16.
struct Quantizer {
    __m512 edge[3], flip;
    __m512i one = _mm512_set1_epi32(1), two = _mm512_set1_epi32(2), three = _mm512_set1_epi32(3);

    Quantizer(const BinaryEdges& from, int64_t channel) : flip(_mm512_setzero_ps()) {
        for (int i = 0; i < 3; i++) edge[i] = _mm512_set1_ps(from.edges[from.step ? i * from.step + channel : i]);
        if (from.step) flip = _mm512_set1_ps(from.flip[channel]);
    }
    Quantizer(const BinaryEdges& from, int64_t channel, __mmask16 mask) : flip(_mm512_setzero_ps()) {
        for (int i = 0; i < 3; i++)
            edge[i] = from.step ? _mm512_maskz_loadu_ps(mask, from.edges + i * from.step + channel)
                                : _mm512_set1_ps(from.edges[i]);
        if (from.step) flip = _mm512_maskz_loadu_ps(mask, from.flip + channel);
    }
    // in 32-bit lanes
    FX_INLINE __m512i level(__m512 x) const {
        x = _mm512_xor_ps(x, flip);
        __m512i found = _mm512_maskz_mov_epi32(_mm512_cmp_ps_mask(x, edge[0], _CMP_GT_OQ), one);
        found = _mm512_mask_mov_epi32(found, _mm512_cmp_ps_mask(x, edge[1], _CMP_GT_OQ), two);
        return _mm512_mask_mov_epi32(found, _mm512_cmp_ps_mask(x, edge[2], _CMP_GT_OQ), three);
    }
};

FX_INLINE __mmask64 first_of(int64_t count) { return count >= 64 ? ~__mmask64(0) : (__mmask64(1) << count) - 1; }

// -- x is (N, C, H, W) -------------------------------------------------------------------------------------------------

// `count` pixels of the code of CHANNELS channels from `channel` on, `step` apart.
template <int CHANNELS>
void plane_of_codes(const Job& job, const float* x, int64_t channel, int64_t step, int64_t count, uint8_t* codes) {
    const BinaryEdges& edges = job.call.edges;
    const Quantizer one(edges, channel), two(edges, channel + (CHANNELS > 1 ? step : 0)),
        three(edges, channel + (CHANNELS > 2 ? 2 * step : 0));
    const int64_t next = step * job.call.pixels();
    for (int64_t p = 0; p < count; p += 16) {
        const __mmask16 mask = __mmask16(first_of(least(16, count - p)));
        __m512i code = one.level(_mm512_maskz_loadu_ps(mask, x + p));
        if (CHANNELS > 1)
            code = _mm512_or_si512(code, _mm512_slli_epi32(two.level(_mm512_maskz_loadu_ps(mask, x + next + p)), 2));
        if (CHANNELS > 2)
            code =
                _mm512_or_si512(code, _mm512_slli_epi32(three.level(_mm512_maskz_loadu_ps(mask, x + 2 * next + p)), 4));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + p), _mm512_cvtepi32_epi8(code));
    }
}

// The codes of half a group, of `count` pixels from pixel p on.
void plane_of(const Job& job, int64_t image, int64_t half, int64_t group, int64_t p, int64_t count) {
    const BinaryCall& call = job.call;
    const int64_t channel = 3 * half * job.groups + group, pixels = call.pixels();
    // channels of the code that there are
    const int64_t left = call.channels <= channel ? 0 : ceil_div(call.channels - channel, job.groups);
    const float* x = static_cast<const float*>(call.x) + ((job.first + image) * call.channels + channel) * pixels + p;
    uint8_t* codes = job.codes_of(image) + (half * job.groups + group) * job.plane + p;
    switch (left) {
        case 0:
            for (int64_t i = 0; i < count; i += 16) _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + i), __m128i());
            break;
        case 1: plane_of_codes<1>(job, x, channel, job.groups, count, codes); break;
        case 2: plane_of_codes<2>(job, x, channel, job.groups, count, codes); break;
        default: plane_of_codes<3>(job, x, channel, job.groups, count, codes);
    }
}

struct CodeTotals {
    alignas(64) uint8_t total[64];
    CodeTotals() {
        for (int code = 0; code < 64; code++) total[code] = uint8_t((code & 3) + (code >> 2 & 3) + (code >> 4));
    }
};

bool planes(const Job& job, int64_t image, int64_t begin, int64_t end) {
    static const CodeTotals of_code;
    const int64_t count = 2 * job.groups, last = least(end, job.call.pixels());
    for (int64_t p = begin; p < last; p += RUN)
        for (int64_t half = 0; half < 2; half++)
            for (int64_t group = 0; group < job.groups; group++)
                plane_of(job, image, half, group, p, least(RUN, last - p));
    const __m512i total = _mm512_load_si512(of_code.total);
    const uint8_t* codes = job.codes_of(image);
    int16_t* totals = job.totals_of(image);
    for (int64_t p = begin; p < end; p += 64) {
        __m512i low = _mm512_setzero_si512(), high = low;
        for (int64_t i = 0; i < count;) {
            __m512i bytes = _mm512_setzero_si512();
            for (const int64_t stop = least(count, i + 28); i < stop; i++)  // 28 times 9 fit a byte
                bytes = _mm512_add_epi8(
                    bytes, _mm512_permutexvar_epi8(_mm512_loadu_si512(codes + i * job.plane + p), total));
            low = _mm512_add_epi16(low, _mm512_cvtepu8_epi16(_mm512_castsi512_si256(bytes)));
            high = _mm512_add_epi16(high, _mm512_cvtepu8_epi16(_mm512_extracti64x4_epi64(bytes, 1)));
        }
        _mm512_storeu_si512(totals + p, low);
        _mm512_storeu_si512(totals + p + 32, high);
    }
    return true;
}

// -- x is channels-last ------------------------------------------------------------------------------------------------

// Levels of the channels of one pixel.
void levels_of_pixel(const BinaryCall& call, const float* x, uint8_t* levels) {
    const BinaryEdges& edges = call.edges;
    Quantizer at(edges, 0, 0);
    for (int64_t c = 0; c < call.channels; c += 16) {
        const __mmask16 mask = __mmask16(first_of(least(16, call.channels - c)));
        if (edges.step) at = Quantizer(edges, c, mask);
        // lanes behind the last channel are 0, which may exceed an edge
        const __m512i found = _mm512_maskz_mov_epi32(mask, at.level(_mm512_maskz_loadu_ps(mask, x + c)));
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

// The same for at most 128 channels: three permutes gather what a code is made of.
class Narrow {
public:
    static constexpr int64_t MOST_CHANNELS = 128;

    explicit Narrow(const Job& job) : channels_(job.call.channels), bytes_(2 * job.groups) {
        alignas(64) uint8_t from[3][64] = {};
        for (int64_t i = 0; i < bytes_; i++)
            for (int64_t k = 0; k < 3; k++) {
                const int64_t channel = (3 * (i / job.groups) + k) * job.groups + i % job.groups;
                if (channel >= channels_) continue;
                from[k][i] = uint8_t(channel);
                there_[k] |= uint64_t(1) << i;
            }
        for (int64_t k = 0; k < 3; k++) from_[k] = _mm512_load_si512(from[k]);
    }
    FX_INLINE __m512i operator()(const uint8_t* levels, uint8_t* codes, const uint8_t* end) const {
        const __m512i low = masked(levels, channels_);
        const __m512i high = channels_ > 64 ? masked(levels + 64, channels_ - 64) : low;
        __m512i part[3];
        FX_UNROLL
        for (int k = 0; k < 3; k++)
            part[k] = _mm512_maskz_mov_epi8(there_[k], _mm512_permutex2var_epi8(low, from_[k], high));
        const __m512i code =
            _mm512_ternarylogic_epi32(part[0], _mm512_slli_epi16(part[1], 2), _mm512_slli_epi16(part[2], 4), 0xfe);
        if (bytes_ <= 32 && end - codes >= 32)
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes), _mm512_castsi512_si256(code));
        else if (end - codes >= 64) _mm512_storeu_si512(codes, code);
        else _mm512_mask_storeu_epi8(codes, first_of(bytes_), code);
        const __m512i all = _mm512_add_epi8(part[0], _mm512_add_epi8(part[1], part[2]));
        return _mm512_sad_epu8(all, _mm512_setzero_si512());
    }

private:
    static FX_INLINE __m512i masked(const uint8_t* levels, int64_t count) {
        return _mm512_and_si512(_mm512_maskz_loadu_epi8(first_of(count), levels), _mm512_set1_epi8(3));
    }
    const int64_t channels_, bytes_;
    __mmask64 there_[3] = {};
    __m512i from_[3];
};

// The first `count` words of `sums`.
FX_INLINE void store_totals(uint64_t sums, int16_t* totals, int64_t count) {
    for (int64_t i = 0; i < count; i++) totals[i] = int16_t(sums >> 16 * i);
}

bool pixels(const Job& job, int64_t image, int64_t begin, int64_t end) {
    const BinaryCall& call = job.call;
    int16_t* totals = job.totals_of(image);
    const int64_t last = least(end, call.pixels());
    // levels are read in other pieces than they are written in: some pixels later, when they have left the store buffer
    constexpr int64_t FEW = 8;
    const int64_t level_step = call.levels_in ? call.channels : call.channels + 64;
    uint8_t* found = nullptr;
    if (!call.levels_in) {
        found = static_cast<uint8_t*>(scratch(SLOT_PACKED, size_t(FEW * level_step)));
        if (!found) return false;
    }
    // the codes behind the last pixel may be another thread's
    uint8_t* codes = job.codes_of(image) + begin * job.pixel_step();
    const uint8_t* const stop = codes + (last - begin) * job.pixel_step();
    const bool is_narrow = call.channels <= Narrow::MOST_CHANNELS;
    const Narrow narrow(is_narrow ? job : Job{call, 0, 0, 0, false, 0, nullptr, nullptr});
    for (int64_t p = begin; p < last; p += FEW) {
        const int64_t count = least(FEW, last - p), at = ((job.first + image) * call.pixels() + p) * call.channels;
        for (int64_t i = 0; found && i < count; i++)
            levels_of_pixel(call, static_cast<const float*>(call.x) + at + i * call.channels, found + i * level_step);
        const uint8_t* levels = found ? found : static_cast<const uint8_t*>(call.x) + at;
        // the sums of four pixels are words of the same 64 bits: they take one sum over a register together
        for (int64_t i = 0; i < count; i += 4) {
            __m512i sums = _mm512_setzero_si512();
            const int64_t four = least(4, count - i);
            for (int64_t j = 0; j < four; j++, levels += level_step, codes += job.pixel_step()) {
                const __m512i sum =
                    is_narrow ? narrow(levels, codes, stop) : codes_of_pixel(job, levels, codes, stop);
                sums = _mm512_or_si512(sums, _mm512_sll_epi64(sum, _mm_cvtsi32_si128(int(16 * j))));
            }
            store_totals(uint64_t(_mm512_reduce_add_epi64(sums)), totals + p + i, four);
        }
    }
    return true;
}

}  // namespace

bool find_codes(const Job& job, int64_t image, int64_t begin, int64_t end) {
    return (job.planar ? planes : pixels)(job, image, begin, end);
}

}  // namespace table
}  // namespace fx
