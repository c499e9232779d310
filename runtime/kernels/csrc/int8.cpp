// Layers of 8-bit weights and inputs: checks, rounding of the images, rows of outputs dealt out to threads.
#include "int8.h"

#include <cfloat>
#include <cmath>
#include <cstring>

#include "dispatch.h"
#include "threads.h"

namespace fx {
namespace {

constexpr int64_t LIMIT = int64_t(1) << 24;
constexpr int64_t TERMS = int64_t(1) << 16;       // of a sum: 255 * 127 * TERMS fits 31 bits
constexpr int64_t IMAGES_BYTES = int64_t(8) << 20;  // rounded images that are made together
constexpr int64_t PARTS = 16;                       // of an image, whose spans are found side by side

}  // namespace
}  // namespace fx

// One call of a layer; int8_ops.py packs the same fields.
struct FxpressInt8Layer {
    FxpressCall call;
    const int8_t* weights;
    const int32_t* offset;
    const float *scale, *bias;  // where images have their own grids: steps of the weights; offset of a zero of 1
    int64_t weight_bytes;
    int64_t batch, channels, height, width;
    int64_t outputs, out_height, out_width;  // before the pool
    int64_t kernel[2], stride[2], padding[2], dilation[2];
    int64_t pool_kernel[2], pool_stride[2], pool_padding[2];  // of a max pool behind the layer; kernel 0: none
    int64_t pooled_height, pooled_width;                      // of y then
    float inverse;  // 0: every image is rounded by its own span
    int32_t zero, channels_last, relu;

    const float* x() const { return static_cast<const float*>(call.x); }
    float* y() const { return static_cast<float*>(call.y); }
};

namespace fx {
namespace {

using Layer = FxpressInt8Layer;

const Int8Kernels& kernels_for(int isa) {
#if defined(FX_HAVE_AVX512)
    if (isa >= AVX512 && can_run(AVX512)) return int8_avx512;
#endif
#if defined(FX_HAVE_AVX2)
    if (isa >= AVX2 && can_run(AVX2)) return int8_avx2;
#endif
    (void)isa;
    return int8_portable;
}

// What belongs to an image that is rounded by its own span.
struct Grid {
    Int8Span parts[PARTS];
    Int8Rounding rounding;
    int32_t* offset;
    float* scale;
};

// Images of one layer with their borders, and the runs of bytes of a window.
struct Images {
    const Layer& of;
    const Int8Kernels& kernels;
    uint8_t* bytes;
    int64_t* places;
    int32_t* flips;
    Grid* grids;
    bool falls = false;  // whether an output falls with its sum

    bool dilated() const { return of.dilation[1] > 1 && of.kernel[1] > 1; }
    bool pooled() const { return of.pool_kernel[0] > 0; }
    int64_t segments() const { return of.kernel[0] * (dilated() ? of.kernel[1] : 1); }
    int64_t segment_dwords() const { return ceil_div(of.channels * (dilated() ? 1 : of.kernel[1]), 4); }
    int64_t dwords() const { return segments() * segment_dwords(); }
    int64_t wide() const { return of.width + 2 * of.padding[1]; }
    int64_t row_bytes() const { return wide() * of.channels; }
    bool own_grids() const { return of.inverse == 0; }
    int64_t grid_bytes() const { return own_grids() ? sizeof(Grid) + 8 * of.outputs : 0; }
    Int8Rounding rounding(int64_t slot) const {
        return own_grids() ? grids[slot].rounding : Int8Rounding{of.inverse, of.zero};
    }
    Int8End end(int64_t slot) const {
        if (own_grids()) return {grids[slot].offset, grids[slot].scale, of.bias, of.relu != 0};
        return {of.offset, of.scale, of.bias, of.relu != 0};
    }
    int64_t image_bytes() const { return (of.height + 2 * of.padding[0]) * row_bytes() + SLACK; }
    int64_t lanes() const { return whole_lanes(of.outputs); }
    int64_t weight_bytes() const { return lanes() * dwords() * 4; }
    bool reserve(int64_t together);
    void place();
    void span(int64_t image, int64_t slot, int64_t part) const;
    void settle(int64_t slot) const;
    void round(int64_t image, int64_t slot, int64_t line) const;
    int64_t pieces() const;
    bool compute(int64_t image, int64_t slot, int64_t piece) const;
    void line(int64_t image, int64_t slot, int64_t row, int32_t* sums) const;
    void turn(int32_t* sums) const;
    bool pooled_lines(int64_t image, int64_t slot, int64_t top, int64_t bottom) const;
};

// Memory for so many images at a time.
bool Images::reserve(int64_t together) {
    bytes = static_cast<uint8_t*>(scratch(SLOT_CONV_CALL, size_t(together * image_bytes())));
    places = static_cast<int64_t*>(scratch(SLOT_CONV_INDEX, size_t(dwords() * 8 + lanes() * 4)));
    if (!bytes || !places) return false;
    flips = reinterpret_cast<int32_t*>(places + dwords());
    if (!own_grids()) return true;
    grids = static_cast<Grid*>(scratch(SLOT_CONV_EXACT, size_t(together * grid_bytes())));
    if (!grids) return false;
    float* numbers = reinterpret_cast<float*>(grids + together);
    for (int64_t slot = 0; slot < together; slot++, numbers += 2 * of.outputs) {
        grids[slot].scale = numbers;
        grids[slot].offset = reinterpret_cast<int32_t*>(numbers + of.outputs);
    }
    return true;
}

void Images::place() {
    const int64_t across = dilated() ? of.kernel[1] : 1, each = segment_dwords();
    for (int64_t s = 0; s < segments(); s++) {
        const int64_t first = s / across * of.dilation[0] * row_bytes() + s % across * of.dilation[1] * of.channels;
        for (int64_t i = 0; i < each; i++) places[s * each + i] = first + 4 * i;
    }
    falls = false;
    for (int64_t o = 0; o < lanes(); o++) {
        flips[o] = o < of.outputs && of.scale[o] < 0 ? -1 : 0;
        falls = falls || flips[o];
    }
}

// What a part of an image spans; parts lie behind each other in either format.
void Images::span(int64_t image, int64_t slot, int64_t part) const {
    const int64_t count = of.channels * of.height * of.width, first = count * part / PARTS;
    grids[slot].parts[part] = kernels.span(of.x() + image * count + first, count * (part + 1) / PARTS - first);
}

// The grid of an image whose parts are known, as `input_grid` in int8_grid.py has it.
void Images::settle(int64_t slot) const {
    Grid& grid = grids[slot];
    Int8Span all = grid.parts[0];
    for (const Int8Span& part : grid.parts) {
        all.low = part.low < all.low ? part.low : all.low;
        all.high = part.high > all.high ? part.high : all.high;
    }
    float step = (all.high - all.low) / 255;
    if (!(step >= FLT_MIN && step <= FLT_MAX)) step = 1;
    const float zero = nearbyintf(-all.low / step);
    grid.rounding = {1 / step, zero < 255 ? int32_t(zero) : 255};
    for (int64_t o = 0; o < of.outputs; o++) {
        grid.scale[o] = step * of.scale[o];
        grid.offset[o] = grid.rounding.zero * of.offset[o];
    }
}

// One line of a padded image.
void Images::round(int64_t image, int64_t slot, int64_t line) const {
    uint8_t* to = bytes + slot * image_bytes() + line * row_bytes();
    const int64_t y = line - of.padding[0], border = of.padding[1] * of.channels;
    if (line == of.height + 2 * of.padding[0] - 1) memset(to + row_bytes(), 0, SLACK);
    const Int8Rounding rounding = this->rounding(slot);
    if (y < 0 || y >= of.height) return void(memset(to, rounding.zero, size_t(row_bytes())));
    memset(to, rounding.zero, size_t(border));
    memset(to + row_bytes() - border, rounding.zero, size_t(border));
    const int64_t plane = of.height * of.width, whole = image * of.channels * plane;
    if (of.channels_last)
        kernels.round({of.x() + whole + y * of.width * of.channels, 1, of.channels, of.channels, of.width, to + border},
                      rounding);
    else
        kernels.round({of.x() + whole + y * of.width, plane, 1, of.channels, of.width, to + border}, rounding);
}

// How many tasks an image is: lines, or bands of pooled lines, which overlap.
int64_t Images::pieces() const {
    if (!pooled()) return of.out_height;
    return of.call.threads == 1 || of.batch >= 2 * of.call.threads ? 1 : least(of.pooled_height, 2 * of.call.threads);
}

bool Images::compute(int64_t image, int64_t slot, int64_t piece) const {
    if (pooled())
        return pooled_lines(image, slot, of.pooled_height * piece / pieces(),
                            of.pooled_height * (piece + 1) / pieces());
    line(image, slot, piece, nullptr);
    return true;
}

// One line of outputs, or of sums if there is a place for them.
void Images::line(int64_t image, int64_t slot, int64_t row, int32_t* sums) const {
    const uint8_t* window = bytes + slot * image_bytes() + row * of.stride[0] * row_bytes();
    float* y = of.y() + (image * of.out_height + row) * of.out_width * of.outputs;
    kernels.row({window, of.out_width, of.stride[1] * of.channels, places, dwords(), of.weights, end(slot), of.outputs,
                 y, sums});
}

void Images::turn(int32_t* sums) const {
    for (int64_t x = 0; x < of.out_width; x++, sums += lanes())
        for (int64_t o = 0; o < lanes(); o++) sums[o] ^= flips[o];
}

// Pooled lines [top, bottom). Every line of sums is pooled along its length as soon as it is there, into a ring; so
// neither the layer's whole outputs nor any of its lines leave the caches.
bool Images::pooled_lines(int64_t image, int64_t slot, int64_t top, int64_t bottom) const {
    const int64_t line_count = of.pooled_width * lanes(), ring = of.pool_kernel[0];
    int32_t* sums = static_cast<int32_t*>(scratch(SLOT_CONV_ROWS, size_t(of.out_width * lanes()) * 4));
    int32_t* rows = static_cast<int32_t*>(scratch(SLOT_CONV_IMAGE, size_t(ring * line_count) * 4));
    if (!sums || !rows) return false;
    int64_t made = 0;
    for (int64_t y = top; y < bottom; y++) {
        const int64_t above = y * of.pool_stride[0] - of.pool_padding[0];
        const int64_t first = most(above, 0), last = least(above + ring, of.out_height);
        for (made = most(made, first); made < last; made++) {
            line(image, slot, made, sums);
            if (falls) turn(sums);
            kernels.across({sums, of.out_width, lanes(), of.pool_kernel[1], of.pool_stride[1],
                            of.pool_padding[1], of.pooled_width, rows + made % ring * line_count});
        }
        float* to = of.y() + (image * of.pooled_height + y) * of.pooled_width * of.outputs;
        Int8Down down{{}, last - first, flips, of.pooled_width, lanes(), of.outputs, end(slot), to};
        for (int64_t row = first; row < last; row++) down.rows[row - first] = rows + row % ring * line_count;
        kernels.down(down);
    }
    return true;
}

int check(const Images& images) {
    const Layer& of = images.of;
    const int64_t size[2] = {of.height, of.width}, out[2] = {of.out_height, of.out_width};
    bool fits = of.batch >= 0 && of.channels >= 1 && of.outputs >= 1 && of.call.threads >= 1 && of.zero >= 0;
    fits = fits && of.zero < 256 && of.channels < LIMIT && of.outputs < LIMIT;
    fits = fits && (of.inverse > 0 || (images.own_grids() && of.zero == 1));
    for (int i = 0; i < 2 && fits; i++) {
        fits = size[i] >= 0 && size[i] < LIMIT && of.padding[i] >= 0 && of.padding[i] < LIMIT && of.stride[i] >= 1 &&
               of.dilation[i] >= 1 && of.dilation[i] < LIMIT && of.kernel[i] >= 1 && of.kernel[i] < LIMIT;
        const int64_t reach = size[i] + 2 * of.padding[i] - of.dilation[i] * (of.kernel[i] - 1);
        fits = fits && reach > 0 && (reach - 1) / of.stride[i] + 1 == out[i];
    }
    const int64_t pooled[2] = {of.pooled_height, of.pooled_width};
    for (int i = 0; i < 2 && fits && images.pooled(); i++) {
        const int64_t kernel = of.pool_kernel[i], reach = out[i] + 2 * of.pool_padding[i] - kernel;
        fits = kernel >= 1 && kernel <= POOL_ROWS && of.pool_padding[i] >= 0 && 2 * of.pool_padding[i] <= kernel &&
               of.pool_stride[i] >= 1 && reach >= 0 && reach / of.pool_stride[i] + 1 == pooled[i];
    }
    if (!fits)
        return fail(BAD_ARGUMENT, "An 8-bit layer of %lld x %lld pixels to %lld x %lld does not fit its kernel",
                    (long long)of.height, (long long)of.width, (long long)of.out_height, (long long)of.out_width);
    if (of.kernel[0] * of.kernel[1] > TERMS / of.channels)
        return fail(BAD_ARGUMENT, "An 8-bit layer has at most %lld weights per output", (long long)TERMS);
    if (of.weight_bytes == images.weight_bytes()) return OK;
    return fail(BAD_LAYOUT, "8-bit weights of %lld bytes where the layer needs %lld", (long long)of.weight_bytes,
                (long long)images.weight_bytes());
}

int run(const Layer& of) {
    Images images{of, kernels_for(of.call.isa), nullptr, nullptr, nullptr, nullptr};
    const int status = check(images);
    if (status || !of.batch) return status;
    const int64_t each = images.image_bytes() + images.grid_bytes();
    const int64_t together = most(1, least(of.batch, IMAGES_BYTES / each));
    if (!images.reserve(together)) return fail(NO_MEMORY, "No memory for the rounded images of an 8-bit layer");
    images.place();
    bool failed = false;
    const int64_t lines = of.height + 2 * of.padding[0], pieces = images.pieces();
    for (int64_t first = 0; first < of.batch; first += together) {
        const int64_t count = least(together, of.batch - first);
        if (images.own_grids())
            parallel_for(of.call.threads, count * PARTS,
                         [&](int64_t task) { images.span(first + task / PARTS, task / PARTS, task % PARTS); });
        for (int64_t slot = 0; slot < count && images.own_grids(); slot++) images.settle(slot);
        parallel_for(of.call.threads, count * lines,
                     [&](int64_t task) { images.round(first + task / lines, task / lines, task % lines); });
        parallel_for(of.call.threads, count * pieces, [&](int64_t task) {
            if (!images.compute(first + task / pieces, task / pieces, task % pieces)) failed = true;
        });
    }
    return failed ? fail(NO_MEMORY, "No memory for the sums of an 8-bit layer") : int(OK);
}

}  // namespace
}  // namespace fx

FX_EXPORT int fxpress_int8_layer(const FxpressInt8Layer* layer) { return fx::run(*layer); }
