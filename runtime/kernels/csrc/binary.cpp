// Binary convolutions and linear layers: checks, choice of kernels, and the driver of those that count bits.
#include "binary.h"

#include <cstring>

#include "dispatch.h"
#include "threads.h"

namespace fx {
namespace {

constexpr uint32_t LIMIT = 1u << 24;
constexpr int64_t ROWS = 8;           // output pixels per task
constexpr int64_t SLICE = 64;         // blocks of eight outputs per task
constexpr int64_t MOST_TAPS = 1 << 12;

uint32_t word(const uint8_t* data) {
    return uint32_t(data[0]) | uint32_t(data[1]) << 8 | uint32_t(data[2]) << 16 | uint32_t(data[3]) << 24;
}

int64_t payload_bytes(const BinaryLayout& layout) {
    if (layout.id == SIX) return layout.blocks() * GROUPS * ceil_div(layout.outputs, 64) * layout.taps() * 64;
    return layout.groups * ceil_div(layout.outputs_per_group(), 8) * layout.taps() * layout.blocks() * 64;
}

int read(const uint8_t* data, int64_t bytes, BinaryLayout* layout) {
    if (!data || bytes < BINARY_HEADER || memcmp(data, "FXPBIN01", 8) != 0)
        return fail(BAD_LAYOUT, "Not a layout of binary weights: %lld bytes without its mark", (long long)bytes);
    uint32_t* const numbers[] = {&layout->id, &layout->groups, &layout->outputs, &layout->channels, &layout->kh,
                                 &layout->kw};
    bool sane = true;
    for (int i = 0; i < 6; i++) {
        *numbers[i] = word(data + 8 + 4 * i);
        sane = sane && *numbers[i] >= 1 && *numbers[i] < LIMIT;
    }
    layout->payload = data + BINARY_HEADER;
    sane = sane && (layout->id == SIX || layout->id == PLANES) && layout->outputs % layout->groups == 0 &&
           layout->taps() <= MOST_TAPS && layout->terms() < (int64_t(1) << 28);
    if (sane && layout->id == SIX) sane = layout->groups == 1 && layout->kw <= BYTE_SUMS && layout->terms() <= WORD_SUMS;
    if (sane && payload_bytes(*layout) == bytes - BINARY_HEADER) return OK;
    return fail(BAD_LAYOUT,
                "A layout of binary weights whose header does not fit its %lld bytes: layout %u, %u groups, %u outputs, "
                "%u channels, %u x %u taps",
                (long long)bytes, layout->id, layout->groups, layout->outputs, layout->channels, layout->kh, layout->kw);
}

// Byte and bit of one weight of layout SIX.
bool is_plus(const BinaryLayout& layout, int64_t output, int64_t tap, int64_t channel) {
    const int64_t kw = layout.kw, ky = tap / kw, kx = tap % kw, within = channel % 64, code = within % CODES;
    const int64_t group = code / 2, bit = within / CODES + 3 * (code % 2), at_once = least(GROUPS, BYTE_SUMS / kw);
    const int64_t begin = group / at_once * at_once, count = least(GROUPS, begin + at_once) - begin;
    const int64_t lane = output % 64 < 32 ? 2 * (output % 32) : 2 * (output % 32) + 1;
    const int64_t piece = (channel / 64 * GROUPS + begin) * ceil_div(layout.outputs, 64) * layout.taps();
    const int64_t row = (output / 64 * layout.kh + ky) * count * kw + (group - begin) * kw + kx;
    return layout.payload[(piece + row) * 64 + lane] >> bit & 1;
}

// Layout SIX -> PLANES, for kernels that do not know it.
int unpack(BinaryLayout* layout) {
    BinaryLayout planes = *layout;
    planes.id = PLANES;
    const int64_t bytes = payload_bytes(planes), words = layout->taps() * layout->blocks();
    uint64_t* to = static_cast<uint64_t*>(scratch(SLOT_TABLES, size_t(bytes)));
    if (!to) return fail(NO_MEMORY, "No memory for %lld bytes of binary weights", (long long)bytes);
    memset(to, 0, size_t(bytes));
    for (int64_t o = 0; o < layout->outputs; o++)
        for (int64_t tap = 0; tap < layout->taps(); tap++)
            for (int64_t c = 0; c < layout->channels; c++)
                if (is_plus(*layout, o, tap, c))
                    to[(o / 8 * words + tap * layout->blocks() + c / 64) * 8 + o % 8] |= uint64_t(1) << c % 64;
    planes.payload = reinterpret_cast<const uint8_t*>(to);
    *layout = planes;
    return OK;
}

const BinaryPopcount& popcount(int isa) {
#if defined(FX_HAVE_AVX512)
    if (isa >= AVX512 && can_run(AVX512)) return binary_popcount_avx512;
#endif
#if defined(FX_HAVE_AVX2)
    if (isa >= AVX2 && can_run(AVX2)) return binary_popcount_avx2;
#endif
    (void)isa;
    return binary_popcount_portable;
}

int64_t ones(uint64_t value) {
    value -= value >> 1 & 0x5555555555555555u;
    value = (value & 0x3333333333333333u) + (value >> 2 & 0x3333333333333333u);
    return int64_t(((value + (value >> 4)) & 0x0f0f0f0f0f0f0f0fu) * 0x0101010101010101u >> 56);
}

// A batch whose activations are bit planes: words [pixel][group][block][plane].
struct Counting {
    const BinaryCall& call;
    const BinaryPopcount& kernels;
    uint64_t* words;
    int64_t slices, chunks;
    bool failed;

    int64_t blocks() const { return call.layout.blocks(); }
    int64_t group_words() const { return 2 * blocks(); }
    int64_t pixel_words() const { return call.layout.groups * group_words(); }
    void pack(int64_t pixel) const;
    void pack_image(int64_t image) const;
    int64_t gather(int64_t pixel, int64_t group, uint64_t* row) const;
    void compute(int64_t task);
    void write(int64_t pixel, int64_t output, int64_t count, const int32_t* sums, int64_t total) const;
};

// One pixel of channels-last activations.
void Counting::pack(int64_t pixel) const {
    const int64_t channels = call.layout.channels;
    for (int64_t g = 0; g < call.layout.groups; g++) {
        uint64_t* to = words + pixel * pixel_words() + g * group_words();
        const int64_t at = pixel * call.channels + g * channels;
        if (!call.levels_in) {
            kernels.planes(static_cast<const float*>(call.x) + at, channels, call.threshold, to);
            continue;
        }
        const uint8_t* levels = static_cast<const uint8_t*>(call.x) + at;
        memset(to, 0, size_t(group_words()) * 8);
        for (int64_t c = 0; c < channels; c++) {
            to[c / 64 * 2] |= uint64_t(levels[c] & 1) << c % 64;
            to[c / 64 * 2 + 1] |= uint64_t(levels[c] >> 1 & 1) << c % 64;
        }
    }
}

// All pixels of an image of contiguous channels.
void Counting::pack_image(int64_t image) const {
    const int64_t pixels = call.pixels(), channels = call.layout.channels;
    uint64_t* to = words + image * pixels * pixel_words();
    memset(to, 0, size_t(pixels * pixel_words()) * 8);
    const float* x = static_cast<const float*>(call.x) + image * call.channels * pixels;
    for (int64_t c = 0; c < call.channels; c++, x += pixels) {
        const int64_t within = c % channels, at = c / channels * group_words() + within / 64 * 2;
        for (int64_t p = 0; p < pixels; p++) {
            const unsigned level = (x[p] > call.threshold[0]) + (x[p] > call.threshold[1]) + (x[p] > call.threshold[2]);
            to[p * pixel_words() + at] |= uint64_t(level & 1) << within % 64;
            to[p * pixel_words() + at + 1] |= uint64_t(level >> 1) << within % 64;
        }
    }
}

// The window of an output pixel, [tap][block][plane]; returns the sum of its levels.
int64_t Counting::gather(int64_t pixel, int64_t group, uint64_t* row) const {
    const int64_t image = pixel / call.out_pixels(), place = pixel % call.out_pixels();
    const int64_t top = place / call.out_width * call.stride[0] - call.padding[0];
    const int64_t left = place % call.out_width * call.stride[1] - call.padding[1];
    int64_t total = 0;
    for (int64_t ky = 0; ky < call.layout.kh; ky++)
        for (int64_t kx = 0; kx < call.layout.kw; kx++, row += group_words()) {
            const int64_t y = top + ky * call.dilation[0], x = left + kx * call.dilation[1];
            if (y < 0 || x < 0 || y >= call.height || x >= call.width) {
                memset(row, 0, size_t(group_words()) * 8);
                continue;
            }
            const int64_t from = (image * call.pixels() + y * call.width + x) * pixel_words() + group * group_words();
            memcpy(row, words + from, size_t(group_words()) * 8);
            for (int64_t i = 0; i < group_words(); i += 2) total += ones(row[i]) + 2 * ones(row[i + 1]);
        }
    return total;
}

// Tasks: chunk of output pixels, group, slice of outputs.
void Counting::compute(int64_t task) {
    const BinaryLayout& layout = call.layout;
    const int64_t slice = task % slices, group = task / slices % layout.groups, chunk = task / slices / layout.groups;
    const int64_t first = chunk * ROWS, count = least(ROWS, call.batch * call.out_pixels() - first);
    const int64_t length = layout.taps() * blocks(), outputs = layout.outputs_per_group();
    const int64_t begin = slice * SLICE, end = least(ceil_div(outputs, 8), begin + SLICE);
    uint64_t* rows = static_cast<uint64_t*>(scratch(SLOT_CONV_ROWS, size_t(ROWS * length) * 16));
    if (!rows) return void(failed = true);
    int64_t totals[ROWS];
    int32_t sums[ROWS * SLICE * 8];
    for (int64_t r = 0; r < count; r++) totals[r] = gather(first + r, group, rows + 2 * length * r);
    const uint64_t* weights = reinterpret_cast<const uint64_t*>(layout.payload) +
                              (group * ceil_div(outputs, 8) + begin) * length * 8;
    kernels.dot(rows, count, length, weights, end - begin, sums);
    for (int64_t r = 0; r < count; r++)
        write(first + r, group * outputs + begin * 8, least(end * 8, outputs) - begin * 8,
              sums + r * (end - begin) * 8, totals[r]);
}

void Counting::write(int64_t pixel, int64_t output, int64_t count, const int32_t* sums, int64_t total) const {
    const int64_t outputs = call.layout.outputs;
    if (call.thresholds) {
        uint8_t* to = static_cast<uint8_t*>(call.y) + pixel * outputs + output;
        const int32_t* at = call.thresholds + output;
        for (int64_t o = 0; o < count; o++) {
            const int64_t sum = 2 * int64_t(sums[o]) - total;
            to[o] = uint8_t((sum >= at[o]) + (sum >= at[outputs + o]) + (sum >= at[2 * outputs + o]));
        }
        return;
    }
    const int64_t image = pixel / call.out_pixels(), place = pixel % call.out_pixels();
    const int64_t step = call.y_channels_last ? 1 : call.out_pixels();
    float* to = static_cast<float*>(call.y) + image * outputs * call.out_pixels() +
                (call.y_channels_last ? place * outputs + output : output * call.out_pixels() + place);
    for (int64_t o = 0; o < count; o++) {
        const float sum = float(2 * int64_t(sums[o]) - total), scaled = sum * call.scale[output + o];
        to[o * step] = call.bias ? scaled + call.bias[output + o] : scaled;
    }
}

int count_bits(const BinaryCall& call, int isa) {
    const int64_t pixels = call.batch * call.pixels(), outputs = ceil_div(call.layout.outputs_per_group(), 8);
    Counting all{call, popcount(isa), nullptr, ceil_div(outputs, SLICE), ceil_div(call.batch * call.out_pixels(), ROWS),
                 false};
    all.words = static_cast<uint64_t*>(scratch(SLOT_CONV_CALL, size_t(most(1, pixels * all.pixel_words())) * 8));
    if (!all.words) return fail(NO_MEMORY, "No memory for the bit planes of a binary layer");
    if (call.levels_in || call.channels_last)
        parallel_for(call.threads, ceil_div(pixels, 64), [&](int64_t task) {
            for (int64_t p = 64 * task; p < least(pixels, 64 * task + 64); p++) all.pack(p);
        });
    else
        parallel_for(call.threads, call.batch, [&](int64_t image) { all.pack_image(image); });
    parallel_for(call.threads, all.chunks * call.layout.groups * all.slices, [&](int64_t task) { all.compute(task); });
    return all.failed ? fail(NO_MEMORY, "No memory for the windows of a binary layer") : int(OK);
}

int check(const BinaryCall& call, int64_t outputs, int64_t kh, int64_t kw) {
    const BinaryLayout& layout = call.layout;
    if (layout.outputs != outputs || int64_t(layout.channels) * layout.groups != call.channels || layout.kh != kh ||
        layout.kw != kw)
        return fail(BAD_LAYOUT,
                    "A layout of binary weights for %u outputs, %u x %u channels and %u x %u taps was given to a layer "
                    "of %lld outputs, %lld channels and %lld x %lld taps",
                    layout.outputs, layout.groups, layout.channels, layout.kh, layout.kw, (long long)outputs,
                    (long long)call.channels, (long long)kh, (long long)kw);
    const int64_t size[2] = {call.height, call.width}, out[2] = {call.out_height, call.out_width};
    const int64_t kernel[2] = {kh, kw};
    bool fits = call.batch >= 0 && call.threads >= 1 && (call.thresholds || call.scale);
    for (int i = 0; i < 2; i++) {
        fits = fits && size[i] >= 0 && size[i] < LIMIT && call.padding[i] >= 0 && call.padding[i] < LIMIT &&
               call.stride[i] >= 1 && call.dilation[i] >= 1 && call.dilation[i] < LIMIT && out[i] >= 1;
        if (fits)
            fits = (size[i] + 2 * call.padding[i] - call.dilation[i] * (kernel[i] - 1) - 1) / call.stride[i] + 1 ==
                       out[i] &&
                   size[i] + 2 * call.padding[i] > call.dilation[i] * (kernel[i] - 1);
    }
    if (fits) return OK;
    return fail(BAD_ARGUMENT, "A binary convolution of %lld x %lld pixels to %lld x %lld does not fit its kernel",
                (long long)size[0], (long long)size[1], (long long)out[0], (long long)out[1]);
}

}  // namespace
}  // namespace fx

// x: 0 float32 (N, C, H, W), 1 float32 channels-last, 2 levels in bytes, channels-last. `geometry`: kernel, stride,
// padding, dilation, two numbers each. With `thresholds` (3, outputs) y is levels in channels-last bytes, else float32.
FX_EXPORT int fxpress_binary_conv2d(const void* x, int kind, int64_t batch, int64_t channels, int64_t height,
                                    int64_t width, const float* threshold, const uint8_t* layout, int64_t layout_bytes,
                                    const float* scale, const float* bias, const int32_t* thresholds, void* y,
                                    int y_channels_last, int64_t outputs, int64_t out_height, int64_t out_width,
                                    const int64_t* geometry, int threads, int isa) {
    using namespace fx;
    BinaryCall call{};
    const int status = read(layout, layout_bytes, &call.layout);
    if (status) return status;
    call.x = x, call.levels_in = kind == 2, call.channels_last = kind != 0;
    for (int i = 0; i < 3; i++) call.threshold[i] = threshold[i];
    call.batch = batch, call.channels = channels, call.height = height, call.width = width;
    call.out_height = out_height, call.out_width = out_width;
    for (int i = 0; i < 2; i++)
        call.stride[i] = geometry[2 + i], call.padding[i] = geometry[4 + i], call.dilation[i] = geometry[6 + i];
    call.scale = scale, call.bias = bias, call.thresholds = thresholds;
    call.y = y, call.y_channels_last = y_channels_last != 0, call.threads = threads;
    const int fits = check(call, outputs, geometry[0], geometry[1]);
    if (fits || !batch) return fits;
#if defined(FX_HAVE_AVX512)
    if (isa >= AVX512 && can_run(AVX512) && call.layout.id == SIX && call.stride[1] <= 2)
        return binary_table_avx512(call);
#endif
    if (call.layout.id == SIX) {
        const int unpacked = unpack(&call.layout);
        if (unpacked) return unpacked;
    }
    return count_bits(call, isa);
}
