// Binary convolutions and linear layers: checks, choice of kernels, and the driver of those that count bits.
#include "binary.h"

#include <cstring>

#include "dispatch.h"
#include "threads.h"

namespace fx {
namespace {

constexpr uint32_t LIMIT = 1u << 24;
constexpr int64_t ROWS = 8;           // output pixels per task
constexpr int64_t SLICE = 64;         // blocks of eight outputs per task, a multiple of BESIDE
constexpr int64_t MOST_TAPS = 1 << 12;

uint32_t word(const uint8_t* data) {
    return uint32_t(data[0]) | uint32_t(data[1]) << 8 | uint32_t(data[2]) << 16 | uint32_t(data[3]) << 24;
}

int64_t payload_bytes(const BinaryLayout& layout) {
    if (layout.id == SIX) return six_groups(layout) * ceil_div(layout.outputs, 64) * layout.taps() * 64;
    return layout.groups * ceil_div(layout.outputs_per_group(), 8) * layout.taps() * layout.blocks() * 64;
}

}  // namespace

int binary_read(const uint8_t* data, int64_t bytes, BinaryLayout* layout) {
    if (!data || bytes < BINARY_HEADER || memcmp(data, "FXPBIN03", 8) != 0)
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
    if (sane && layout->id == SIX)
        sane = layout->groups == 1 && layout->kw <= BYTE_SUMS && layout->kh <= TABLE_ROWS &&
               layout->terms() <= WORD_SUMS;
    if (sane && payload_bytes(*layout) == bytes - BINARY_HEADER) return OK;
    return fail(BAD_LAYOUT,
                "A layout of binary weights whose header does not fit its %lld bytes: layout %u, %u groups, %u outputs, "
                "%u channels, %u x %u taps",
                (long long)bytes, layout->id, layout->groups, layout->outputs, layout->channels, layout->kh, layout->kw);
}

namespace {

// One weight of layout SIX.
bool is_plus(const BinaryLayout& layout, int64_t output, int64_t tap, int64_t channel) {
    const int64_t group = channel % six_groups(layout), bit = channel / six_groups(layout);
    const int64_t lane = output % 64 < 32 ? 2 * (output % 32) : 2 * (output % 32) + 1;
    const int64_t look_up = (output / 64 * six_groups(layout) + group) * layout.taps() + tap;
    return layout.payload[look_up * 64 + lane] >> bit & 1;
}

// Layout SIX -> PLANES, for kernels that do not know it.
int unpack(BinaryLayout* layout) {
    BinaryLayout planes = *layout;
    planes.id = PLANES;
    const int64_t bytes = payload_bytes(planes), words = layout->taps() * layout->blocks();
    uint64_t* to = static_cast<uint64_t*>(scratch(SLOT_TABLES, size_t(bytes)));
    if (!to) return fail(NO_MEMORY, "No memory for %lld bytes of binary weights", (long long)bytes);
    memset(to, 0, size_t(bytes));
    for (int64_t o = 0; o < layout->outputs; o++) {
        const PlanesPlace place(o / 8, ceil_div(layout->outputs, 8), words);
        for (int64_t tap = 0; tap < layout->taps(); tap++)
            for (int64_t c = 0; c < layout->channels; c++)
                if (is_plus(*layout, o, tap, c))
                    to[place.first + (tap * layout->blocks() + c / 64) * place.step + o % 8] |= uint64_t(1) << c % 64;
    }
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
#if defined(__GNUC__)
    return __builtin_popcountll(value);
#endif
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
        if (call.levels_in) kernels.level_planes(static_cast<const uint8_t*>(call.x) + at, channels, to);
        else kernels.planes(static_cast<const float*>(call.x) + at, channels, call.edges, g * channels, to);
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
            const unsigned level = level_of(call.edges, x[p], c);
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
    if (call.cuts) {
        uint8_t* to = static_cast<uint8_t*>(call.y) + pixel * outputs + output;
        const int32_t* at = call.cuts + output;
        for (int64_t o = 0; o < count; o++) {
            const int64_t sum = 2 * int64_t(sums[o]) - total;
            to[o] = uint8_t((sum >= at[o]) + (sum >= at[outputs + o]) + (sum >= at[2 * outputs + o]));
        }
        return;
    }
    const int64_t image = pixel / call.out_pixels(), place = pixel % call.out_pixels();
    const int64_t step = call.y_channels_last ? 1 : call.out_pixels();
    const int64_t from = image * outputs * call.out_pixels() +
                         (call.y_channels_last ? place * outputs + output : output * call.out_pixels() + place);
    float y[8 * SLICE];  // one operation after the other over all outputs: each is a loop of vectors
    for (int64_t o = 0; o < count; o++) y[o] = float(2 * sums[o] - int32_t(total)) * call.scale[output + o];
    if (call.bias)
        for (int64_t o = 0; o < count; o++) y[o] += call.bias[output + o];
    if (call.residual)
        for (int64_t o = 0; o < count; o++) {
            const float other = call.residual[from + o * step];
            y[o] += call.residual_relu && other < 0 ? 0 : other;
        }
    if (call.relu)
        for (int64_t o = 0; o < count; o++) y[o] = y[o] < 0 ? 0 : y[o];
    for (int64_t o = 0; o < count; o++) static_cast<float*>(call.y)[from + o * step] = y[o];
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

int check(const BinaryCall& call) {
    if (int64_t(call.layout.channels) * call.layout.groups != call.channels)
        return fail(BAD_LAYOUT, "A layout of binary weights for %u x %u channels was given to a layer of %lld channels",
                    call.layout.groups, call.layout.channels, (long long)call.channels);
    const int64_t size[2] = {call.height, call.width}, out[2] = {call.out_height, call.out_width};
    const int64_t kernel[2] = {call.layout.kh, call.layout.kw};
    bool fits = call.batch >= 0 && call.threads >= 1 && (call.cuts || call.scale);
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

// Thresholds of one channel (or of all) -> three ascending edges, infinite ones where there are fewer; whether the sign of
// what is compared with them changes.
int edges_of(const BinaryCall& call, int64_t channel, float* edges, int64_t step, bool* flip) {
    const int64_t count = call.threshold_count, row = call.threshold_per_channel ? call.channels : 1;
    const float* from = call.threshold + channel;
    *flip = call.threshold_per_channel && from[0] > from[(count - 1) * row];
    bool ascends = true;
    for (int64_t i = 0; i < 3; i++) {
        const float value = i < count ? from[i * row] : 0;
        edges[i * step] = i >= count ? INFINITY : *flip ? -value : value;
        ascends = ascends && (i ? edges[i * step] >= edges[(i - 1) * step] : edges[0] == edges[0]);
    }
    if (ascends) return OK;
    return fail(BAD_ARGUMENT, "Thresholds of a binary layer must ascend (or descend, where each channel has its own), "
                "those of channel %lld do not: they begin with %g", (long long)channel, double(from[0]));
}

// Fills in call->edges.
int make_edges(BinaryCall* call) {
    if (call->levels_in) return OK;
    if (!call->threshold || call->threshold_count < 1 || call->threshold_count > 3)
        return fail(BAD_ARGUMENT, "A binary layer has 1 to 3 thresholds, not %lld", (long long)call->threshold_count);
    const int64_t sets = call->threshold_per_channel ? call->channels : 1;
    float* edges = static_cast<float*>(scratch(SLOT_EDGES, size_t(4 * sets) * sizeof(float)));
    if (!edges) return fail(NO_MEMORY, "No memory for the thresholds of a binary layer");
    for (int64_t c = 0; c < sets; c++) {
        bool flip = false;
        const int status = edges_of(*call, c, edges + c, sets, &flip);
        if (status) return status;
        edges[3 * sets + c] = flip ? -0.0f : 0.0f;
    }
    call->edges = {edges, call->threshold_per_channel ? edges + 3 * sets : nullptr,
                   call->threshold_per_channel ? sets : 0};
    return OK;
}

}  // namespace

int binary_layer(const BinaryCall& given, int isa) {
    BinaryCall call = given;
    int status = check(call);
    if (!status) status = make_edges(&call);
    if (status || !call.batch) return status;
#if defined(FX_HAVE_AVX512)
    if (isa >= AVX512 && can_run(AVX512) && call.layout.id == SIX)
        return binary_table_avx512(call);
#endif
    if (call.layout.id == SIX) status = unpack(&call.layout);
    return status ? status : count_bits(call, isa);
}

}  // namespace fx

// One call of a layer; binary_call.py packs the same fields.
struct FxpressBinaryLayer {
    FxpressCall call;
    const float* threshold;
    const uint8_t* layout;
    const float *scale, *bias, *residual;
    const int32_t* cuts;  // of these and `scale` one is null
    int64_t layout_bytes;
    int64_t batch, channels, height, width;
    int64_t outputs, out_height, out_width;
    int64_t kernel[2], stride[2], padding[2], dilation[2];
    int32_t kind;  // of x: 0 float32 (N, C, H, W), 1 float32 channels-last, 2 levels in bytes, channels-last
    int32_t threshold_count, threshold_per_channel, residual_relu, relu, y_channels_last;
};

FX_EXPORT int fxpress_binary_layer(const FxpressBinaryLayer* layer) {
    using namespace fx;
    const FxpressBinaryLayer& of = *layer;
    BinaryCall call{};
    const int status = binary_read(of.layout, of.layout_bytes, &call.layout);
    if (status) return status;
    if (call.layout.outputs != of.outputs || call.layout.kh != of.kernel[0] || call.layout.kw != of.kernel[1])
        return fail(BAD_LAYOUT, "A layout of binary weights for %u outputs and %u x %u taps was given to a layer of %lld "
                    "outputs and %lld x %lld taps", call.layout.outputs, call.layout.kh, call.layout.kw,
                    (long long)of.outputs, (long long)of.kernel[0], (long long)of.kernel[1]);
    call.x = of.call.x, call.levels_in = of.kind == 2, call.channels_last = of.kind != 0;
    call.threshold = of.threshold, call.threshold_count = of.threshold_count;
    call.threshold_per_channel = of.threshold_per_channel != 0;
    call.batch = of.batch, call.channels = of.channels, call.height = of.height, call.width = of.width;
    call.out_height = of.out_height, call.out_width = of.out_width;
    for (int i = 0; i < 2; i++)
        call.stride[i] = of.stride[i], call.padding[i] = of.padding[i], call.dilation[i] = of.dilation[i];
    call.scale = of.scale, call.bias = of.bias, call.residual = of.residual, call.cuts = of.cuts;
    call.residual_relu = of.residual_relu != 0, call.relu = of.relu != 0;
    call.y = of.call.y, call.y_channels_last = of.y_channels_last != 0, call.threads = of.call.threads;
    return binary_layer(call, of.call.isa);
}
