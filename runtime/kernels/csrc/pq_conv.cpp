// Product-quantized convolution: checks, memory, and the order of the work.
//
// An image is read twice: its largest |x|, then 16-bit samples, one 32-bit word per pixel and two channels. The exact
// largest |a| of all tables gives their scale; sub-spaces whose Cauchy-Schwarz bound lies below what was found already
// are not computed for it. Output rows are then made one by one; the tables of the input rows they need live in a ring.
#include "pq_conv_call.h"

#include "dispatch.h"
#include "threads.h"

namespace fx {
namespace {

const ConvKernels* kernels_of(int isa) {
#if defined(FX_HAVE_AVX512)
    if (isa >= AVX512 && can_run(AVX512)) return &conv_avx512;
#endif
#if defined(FX_HAVE_AVX2)
    if (isa >= AVX2 && can_run(AVX2)) return &conv_avx2;
#endif
    (void)isa;
    return &conv_portable;
}

bool fits(const ConvShape& s, const Layout& layout, int64_t book_subspaces, int64_t book_codewords) {
    return layout.taps == s.kernel[0] * s.kernel[1] && layout.groups == s.groups && layout.outputs == s.outputs &&
           layout.subspaces == book_subspaces && layout.codewords == book_codewords;
}

// Sizes of y; false where a pool does not fit.
bool size_pool(Call& call) {
    ConvPool& pool = call.pool;
    const int64_t from[] = {call.shape.out_height, call.shape.out_width};
    int64_t* const to[] = {&pool.height, &pool.width};
    for (int i = 0; i < 2; i++) *to[i] = from[i];
    if (!pool.kernel[0]) return true;
    for (int i = 0; i < 2; i++) {
        const int64_t kernel = pool.kernel[i], padding = pool.padding[i];
        if (kernel < 1 || kernel > from[i] + 2 * padding || pool.stride[i] < 1 || padding < 0 || padding > kernel / 2)
            return false;
        *to[i] = (from[i] + 2 * padding - kernel) / pool.stride[i] + 1;
    }
    return call.relu;
}

int check(Call& call) {
    ConvShape& s = call.shape;
    const int64_t limit = int64_t(1) << 31;
    const int64_t positive[] = {s.channels, s.outputs, s.kernel[0], s.kernel[1], s.stride[0], s.stride[1], s.dilation[0],
                                s.dilation[1], s.groups, s.out_height, s.out_width, s.subspaces, s.codewords, s.subwidth};
    const int64_t natural[] = {s.images, s.height, s.width, s.padding[0], s.padding[1]};
    bool good = true;
    for (int64_t v : positive) good = good && v >= 1 && v < limit;
    for (int64_t v : natural) good = good && v >= 0 && v < limit;
    good = good && s.channels % s.groups == 0 && s.outputs % s.groups == 0 && call.mode >= FP32 && call.mode <= INT8;
    for (int i = 0; good && i < 2; i++) {
        const int64_t size = (i ? s.width : s.height) + 2 * s.padding[i] - s.dilation[i] * (s.kernel[i] - 1);
        good = size >= 1 && (size - 1) / s.stride[i] + 1 == (i ? s.out_width : s.out_height);
    }
    if (good) {
        s.group_channels = s.channels / s.groups, s.group_outputs = s.outputs / s.groups;
        good = (s.subspaces - 1) * s.subwidth < s.group_channels && s.group_channels <= s.subspaces * s.subwidth;
    }
    if (!good) return fail(BAD_ARGUMENT, "The sizes of a convolution do not fit each other: %lld x %lld x %lld x %lld images, "
                           "%lld sub-spaces of width %lld", (long long)s.images, (long long)s.channels,
                           (long long)s.height, (long long)s.width, (long long)s.subspaces, (long long)s.subwidth);
    if (!size_pool(call))
        return fail(BAD_ARGUMENT, "A max pool of %lld x %lld does not fit %lld x %lld rectified outputs",
                    (long long)call.pool.kernel[0], (long long)call.pool.kernel[1], (long long)s.out_height,
                    (long long)s.out_width);
    const Layout& l = call.layout;
    if (!fits(s, l, s.subspaces, s.codewords))
        return fail(BAD_LAYOUT, "An index layout of %u taps, %u sub-spaces, %u code words, %u outputs and %u groups does not "
                    "fit a convolution of %lld taps, %lld sub-spaces, %lld code words, %lld outputs and %lld groups",
                    l.taps, l.subspaces, l.codewords, l.outputs, l.groups, (long long)call.taps(), (long long)s.subspaces,
                    (long long)s.codewords, (long long)s.outputs, (long long)s.groups);
    return OK;
}

// Opens image `number` in memory of this thread; false where there is none.
bool open(Image& image) {
    for (Arena arena{nullptr};;) {
        const bool real = arena.base;
        arena.used = 0;
        image.reserve(arena);
        if (real) break;
        arena.base = static_cast<uint8_t*>(scratch(SLOT_CONV_IMAGE, arena.used));
        if (!arena.base) return false;
    }
    image.read();
    return true;
}

using RowsOf = bool (*)(const Image&, int64_t, int64_t);

// One image: by this thread alone, or its rows by all of them.
bool compute(Image& image, RowsOf rows, int threads) {
    const int64_t height = image.call.pool.height;
    const int64_t strips = threads == 1 ? 1 : least(height, 2 * threads);
    bool enough = true;
    parallel_for(threads, strips, [&](int64_t strip) {
        if (!rows(image, strip * height / strips, (strip + 1) * height / strips)) enough = false;
    });
    return enough;
}

// Several images at once where there are enough of them, else one after the other, each by all threads.
template <class Work>
void each_image(const Call& call, Work&& work) {
    const int64_t images = call.shape.images;
    const bool many = images >= 2 * call.threads;
    parallel_for(many ? call.threads : 1, images, [&](int64_t i) { work(i, many ? 1 : call.threads); });
}

int run(Call& call) {
    if (int status = prepare(call)) return status;
    if (call.quantized)
        each_image(call, [&](int64_t i, int threads) {
            Image image{call, i};
            bool enough = open(image);
            if (enough) image.quantize();
            if (enough && !image.exact) enough = compute(image, quantized_rows, threads);
            call.exact[i] = enough ? image.exact : 2;
        });
    bool some = !call.quantized;
    for (int64_t i = 0; i < call.shape.images; i++) {
        if (call.exact[i] == 2) return fail(NO_MEMORY, "No memory for the tables of a convolution");
        some = some || call.exact[i];
    }
    if (!some) return OK;
    if (int status = prepare_exact(call)) return status;
    const bool all = !call.quantized;
    each_image(call, [&](int64_t i, int threads) {
        Image image{call, i};
        if ((all || call.exact[i]) && !(open(image) && compute(image, exact_rows, threads))) call.exact[i] = 2;
    });
    for (int64_t i = 0; i < call.shape.images; i++)
        if (call.exact[i] == 2) return fail(NO_MEMORY, "No memory for the tables of a convolution");
    return OK;
}

}  // namespace
}  // namespace fx

// x (images, channels, height, width) and y (images, outputs, ...), each contiguous or channels-last (`last`); bias may be
// null. out_height and out_width are those of the convolution, before a pool. pq_ops.py packs the same fields.
struct FxpressPQConv2d {
    FxpressCall call;
    const float* codebook;
    const uint8_t* layout;
    const float* bias;
    int64_t layout_bytes;
    int64_t images, channels, height, width, outputs, out_height, out_width;
    int64_t kernel[2], stride[2], padding[2], dilation[2];
    int64_t groups, subspaces, codewords, subwidth;
    int64_t pool_kernel[2], pool_stride[2], pool_padding[2];  // of a max pool behind the ReLU; kernel 0: none
    int32_t last, y_last, dims_major, tables, relu;
};

FX_EXPORT int fxpress_pq_conv2d(const FxpressPQConv2d* layer) {
    using namespace fx;
    const FxpressPQConv2d& of = *layer;
    Call call;
    if (int status = read_layout(of.layout, of.layout_bytes, &call.layout)) return status;
    ConvShape& s = call.shape;
    s.images = of.images, s.channels = of.channels, s.height = of.height, s.width = of.width, s.outputs = of.outputs;
    s.out_height = of.out_height, s.out_width = of.out_width;
    for (int i = 0; i < 2; i++) {
        s.kernel[i] = of.kernel[i], s.stride[i] = of.stride[i], s.padding[i] = of.padding[i];
        s.dilation[i] = of.dilation[i];
        call.pool.kernel[i] = of.pool_kernel[i], call.pool.stride[i] = of.pool_stride[i];
        call.pool.padding[i] = of.pool_padding[i];
    }
    s.groups = of.groups, s.subspaces = of.subspaces, s.codewords = of.codewords, s.subwidth = of.subwidth;
    call.x = static_cast<const float*>(of.call.x), call.y = static_cast<float*>(of.call.y);
    call.codebook = of.codebook, call.bias = of.bias, call.mode = of.tables, call.last = of.last != 0, call.y_last = of.y_last != 0;
    call.relu = of.relu != 0, call.dims_major = of.dims_major != 0, call.threads = int(most(1, least(of.call.threads, 1024)));
    if (int status = check(call)) return status;
    call.kernels = kernels_of(of.call.isa);
    if (!s.images) return OK;
    lay_out(call);
    return run(call);
}
