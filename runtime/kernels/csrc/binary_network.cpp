// A whole binarized network in one call: the steps as they run.
#include <cstring>
#include <new>

#include "binary.h"
#include "binary_network.h"
#include "dispatch.h"

namespace fx {
namespace network {
namespace {

const BinaryElements& elements(int isa) {
#if defined(FX_HAVE_AVX512)
    if (isa >= AVX512 && can_run(AVX512)) return binary_elements_avx512;
#endif
#if defined(FX_HAVE_AVX2)
    if (isa >= AVX2 && can_run(AVX2)) return binary_elements_avx2;
#endif
    (void)isa;
    return binary_elements_portable;
}

Value external(const int64_t* sizes, void* at) {
    Value value;
    value.n = sizes[0], value.c = sizes[1], value.h = sizes[2], value.w = sizes[3], value.at = at;
    return value;
}

}  // namespace

Network::Network(int threads, int isa) : threads_(threads), isa_(isa), run_(elements(isa)) {}

int Network::run() {
    for (size_t i = 0; i < steps_.size(); i++) {
        const int status = execute(steps_[i], values_[size_t(steps_[i][0])], values_[inputs_ + i]);
        if (status) return status;
    }
    return OK;
}

int Network::execute(const Step& step, const Value& x, Value& y) {
    float* to = static_cast<float*>(y.at);
    const float* factors =
        FORMS[step.kind].sections ? reinterpret_cast<const float*>(sections_[size_t(step.section)].data) : nullptr;
    switch (step.kind) {
        case LEVELS: levels(step, x, y); return OK;
        case CONV_LEVELS:
        case CONV: return conv(step, x, y);
        case AFFINE:
            rows(x.pixels(), x.c, [&](int64_t first, int64_t count) {
                run_.affine(x.floats() + first * x.c, count, x.c, factors, step[1] != 0, to + first * x.c);
            });
            return OK;
        case ADD: {
            const float* other = values_[size_t(step[1])].floats();
            pieces(x.count(), [&](int64_t first, int64_t count) {
                run_.add(x.floats() + first, other + first, count, step[2] != 0, step[3] != 0, to + first);
            });
            return OK;
        }
        case RELU:
            pieces(x.count(), [&](int64_t first, int64_t count) { run_.relu(x.floats() + first, count, to + first); });
            return OK;
        case MAX_POOL:
        case AVERAGE_POOL: pool(step, x, y); return OK;
        case MEAN:
            parallel_for(threads_, x.n, [&](int64_t image) {
                run_.mean(x.floats() + image * x.h * x.w * x.c, x.h * x.w, x.c, to + image * x.c);
            });
            return OK;
        case SHORTCUT: shortcut(step, x, y); return OK;
        case CAT: cat(step, y); return OK;
        case FLATTEN: flatten(x, y); return OK;
        default: {  // DECODE
            const uint8_t* from = static_cast<const uint8_t*>(x.at);
            pieces(x.count(),
                   [&](int64_t first, int64_t count) { run_.decode(from + first, count, *factors, to + first); });
            return OK;
        }
    }
}

int Network::conv(const Step& step, const Value& x, Value& y) {
    const Section& weights = sections_[size_t(step.section)];
    const uint8_t* ends = sections_[size_t(step.section) + 1].data;
    BinaryCall call{};
    const int status = binary_read(weights.data, weights.bytes, &call.layout);
    if (status) return status;
    call.x = x.at, call.levels_in = true, call.channels_last = true;
    call.batch = x.n, call.channels = x.c, call.height = x.h, call.width = x.w;
    call.out_height = y.h, call.out_width = y.w;
    for (int i = 0; i < 2; i++)
        call.stride[i] = step[5 + i], call.padding[i] = step[7 + i], call.dilation[i] = step[9 + i];
    call.y = y.at, call.y_channels_last = true, call.threads = threads_;
    if (step.kind == CONV_LEVELS) {
        call.cuts = reinterpret_cast<const int32_t*>(ends);
    } else {
        call.scale = reinterpret_cast<const float*>(ends), call.bias = call.scale + y.c;
        call.residual = step[12] < 0 ? nullptr : values_[size_t(step[12])].floats();
        call.residual_relu = step[13] != 0, call.relu = step[14] != 0;
    }
    return binary_layer(call, isa_);
}

// Thresholds that descend count what a value stays below: they and the value change sign.
void Network::levels(const Step& step, const Value& x, Value& y) {
    const float* from = reinterpret_cast<const float*>(sections_[size_t(step.section)].data);
    std::vector<float> edges(size_t(4 * x.c));
    for (int64_t c = 0; c < x.c; c++) {
        const float sign = from[c] > from[x.c + c] || from[x.c + c] > from[2 * x.c + c] ? -1.0f : 1.0f;
        for (int64_t i = 0; i < 3; i++) edges[size_t(i * x.c + c)] = sign * from[i * x.c + c];
        edges[size_t(3 * x.c + c)] = sign;
    }
    uint8_t* to = static_cast<uint8_t*>(y.at);
    rows(x.pixels(), x.c, [&](int64_t first, int64_t count) {
        run_.levels(x.floats() + first * x.c, count, x.c, edges.data(), to + first * x.c);
    });
}

void Network::pool(const Step& step, const Value& x, Value& y) {
    BinaryPool at{};
    at.channels = x.c, at.height = x.h, at.width = x.w, at.out_width = y.w;
    for (int i = 0; i < 2; i++) {
        at.kernel[i] = step[1 + i], at.stride[i] = step[3 + i], at.padding[i] = step[5 + i];
        at.dilation[i] = step.kind == MAX_POOL ? step[7 + i] : 1;
    }
    at.count_padding = step.kind == AVERAGE_POOL && step[7] != 0;
    parallel_for(threads_, x.n * y.h, [&](int64_t task) {
        const int64_t from = task / y.h * x.h * x.w * x.c, to = task * y.w * y.c, row = task % y.h;
        if (x.levels)
            run_.max_levels(static_cast<const uint8_t*>(x.at) + from, at, row, static_cast<uint8_t*>(y.at) + to);
        else
            (step.kind == MAX_POOL ? run_.max_floats : run_.average)(x.floats() + from, at, row,
                                                                     static_cast<float*>(y.at) + to);
    });
}

void Network::shortcut(const Step& step, const Value& x, Value& y) {
    const size_t unit = x.levels ? 1 : 4, before = size_t(step[3]) * unit, kept = size_t(x.c) * unit;
    const size_t after = size_t(step[4]) * unit;
    const uint8_t* source = static_cast<const uint8_t*>(x.at);
    uint8_t* target = static_cast<uint8_t*>(y.at);
    parallel_for(threads_, y.n * y.h, [&](int64_t task) {
        const uint8_t* from = source + size_t((task / y.h * x.h + task % y.h * step[1]) * x.w) * kept;
        uint8_t* to = target + size_t(task * y.w) * (before + kept + after);
        for (int64_t column = 0; column < y.w; column++, to += before + kept + after) {
            memset(to, 0, before);
            memcpy(to + before, from + size_t(column * step[2]) * kept, kept);
            memset(to + before + kept, 0, after);
        }
    });
}

void Network::cat(const Step& step, Value& y) {
    const size_t unit = y.levels ? 1 : 4, row = size_t(y.c) * unit;
    rows(y.pixels(), y.c, [&](int64_t first, int64_t count) {
        uint8_t* to = static_cast<uint8_t*>(y.at) + size_t(first) * row;
        for (int64_t i = 0; i < step.count; i++) {
            const Value& part = values_[size_t(step[i])];
            const size_t width = size_t(part.c) * unit;
            const uint8_t* from = static_cast<const uint8_t*>(part.at) + size_t(first) * width;
            for (int64_t p = 0; p < count; p++) memcpy(to + size_t(p) * row, from + size_t(p) * width, width);
            to += width;
        }
    });
}

// (n, h, w, c) -> (n, c h w): channels go first, as in the networks that are compiled.
void Network::flatten(const Value& x, Value& y) {
    const int64_t pixels = x.h * x.w, each = pixels * x.c;
    const uint8_t* from = static_cast<const uint8_t*>(x.at);
    uint8_t* to = static_cast<uint8_t*>(y.at);
    if (pixels == 1) return void(memcpy(to, from, size_t(x.bytes())));
    for (int64_t n = 0; n < x.n; n++) {
        if (!x.levels) {
            run_.flatten(x.floats() + n * each, pixels, x.c, static_cast<float*>(y.at) + n * each);
            continue;
        }
        for (int64_t p = 0; p < pixels; p++)
            for (int64_t c = 0; c < x.c; c++) to[n * each + c * pixels + p] = from[n * each + p * x.c + c];
    }
}

}  // namespace network
}  // namespace fx

// Inputs and outputs are float32, channels-last, four sizes (N, C, H, W) each.
FX_EXPORT int fxpress_binary_network(const int64_t* program, int64_t length, const uint8_t* data, int64_t bytes,
                                     void* const* inputs, const int64_t* input_sizes, int64_t input_count,
                                     void* const* outputs, const int64_t* output_sizes, int64_t output_count, int threads,
                                     int isa) {
    using namespace fx;
    using namespace fx::network;
    try {
        std::vector<Value> given, made;
        for (int64_t i = 0; i < input_count; i++) given.push_back(external(input_sizes + 4 * i, inputs[i]));
        for (int64_t i = 0; i < output_count; i++) made.push_back(external(output_sizes + 4 * i, outputs[i]));
        Network network(threads, isa);
        int status = network.read(program, length, data, bytes);
        if (!status) status = network.shape(given.data(), input_count, made.data(), output_count);
        return status ? status : network.run();
    } catch (const std::bad_alloc&) {
        return fail(NO_MEMORY, "No memory for the steps of a binary network");
    }
}
