// Fully connected layer by table look-ups: checks, choice of kernels, and the three phases of a batch.
#include "pq_linear.h"

#include <cstring>
#include <initializer_list>

#include "dispatch.h"
#include "threads.h"

namespace fx {
namespace {

constexpr int64_t CHUNK = 64;                    // sub-spaces per task while tables are built, whatever the threads
constexpr int64_t TABLE_BYTES = int64_t(4) << 20;  // of all images that are computed together

struct Call {
    Layout layout;
    Codebook codebook;
    const float *x, *bias;
    float* y;
    int64_t batch, inputs;
    int tables, threads;
    bool relu;
    const PqLinearKernels *kernels, *exact;  // `exact` reads float32 tables
};

const PqLinearKernels* choose(const Layout& layout, int tables, int isa) {
#if defined(FX_HAVE_AVX512)
    if (isa >= AVX512 && can_run(AVX512) && pq_linear_avx512.knows(layout, tables)) return &pq_linear_avx512;
#endif
#if defined(FX_HAVE_AVX2)
    if (isa >= AVX2 && can_run(AVX2) && pq_linear_avx2.knows(layout, tables)) return &pq_linear_avx2;
#endif
    (void)isa;
    (void)layout;
    (void)tables;
    return &pq_linear_portable;
}

int check(const Call& call, int64_t outputs) {
    const Codebook& book = call.codebook;
    const Layout& layout = call.layout;
    if (layout.taps != 1 || layout.groups != 1)
        return fail(BAD_LAYOUT, "An index layout of %u taps and %u groups does not fit a linear layer", layout.taps,
                    layout.groups);
    if (layout.subspaces != book.subspaces || layout.codewords != book.codewords || layout.outputs != outputs)
        return fail(BAD_LAYOUT,
                    "An index layout of %u sub-spaces, %u code words, %u outputs does not fit a codebook of %lld "
                    "sub-spaces, %lld code words, %lld outputs",
                    layout.subspaces, layout.codewords, layout.outputs, (long long)book.subspaces,
                    (long long)book.codewords, (long long)outputs);
    bool fits = book.width >= 1 && book.width < (1 << 24) && call.inputs > (book.subspaces - 1) * book.width &&
                call.inputs <= book.subspaces * book.width;
    if (!fits || call.batch < 0 || call.tables < FP32 || call.tables > INT8)
        return fail(BAD_ARGUMENT, "%lld x %lld inputs do not fit %lld sub-spaces of width %lld, tables %d",
                    (long long)call.batch, (long long)call.inputs, (long long)book.subspaces, (long long)book.width,
                    call.tables);
    return OK;
}

// Integers reach this far: as many as there are sub-spaces never leave 32 bits.
float top_level(int tables, int64_t terms) {
    return float(least(tables == INT8 ? 127 : 32767, INT32_MAX / terms));
}

// A few images whose tables fit the cache together.
struct Block {
    const Call& call;
    int64_t first;
    int images;
    float *tables, *offsets;
    uint8_t* packed;
    int64_t table_size, packed_size, chunks;
    TableRange* ranges;  // [image][chunk]

    int64_t rows() const { return call.layout.subspaces; }
    const float* x(int image) const { return call.x + (first + image) * call.inputs; }
    float* y(int image) const { return call.y + (first + image) * call.layout.outputs; }

    // A chunk of the codebook is read once for all images.
    void build(int64_t chunk) {
        float* buffer = static_cast<float*>(
            scratch(SLOT_ROWS, size_t(call.codebook.codewords * call.codebook.width) * sizeof(float)));
        for (int image = 0; image < images; image++) {
            TableRange& range = ranges[image * chunks + chunk] = TableRange();
            if (!buffer) return void(range.half = -1);  // told to the caller by `run`
            call.kernels->build(call.codebook, x(image), call.inputs, chunk * CHUNK, least(rows(), (chunk + 1) * CHUNK),
                                tables + image * table_size,
                                call.tables == FP32 ? nullptr : offsets + image * rows(), &range, buffer);
        }
    }

    TableRange range_of(int image) const {
        TableRange all;
        for (int64_t chunk = 0; chunk < chunks; chunk++) {
            const TableRange& part = ranges[image * chunks + chunk];
            all.half = part.half > all.half ? part.half : all.half;
            all.ordinary = all.ordinary && part.ordinary;
            all.offsets += part.offsets;
        }
        return all;
    }

    void run();
};

// NaN stays.
void rectify(float* y, int64_t count) {
    for (int64_t i = 0; i < count; i++) y[i] = y[i] < 0 ? 0 : y[i];
}

void Block::run() {
    const bool whole = call.tables != FP32;
    parallel_for(call.threads, chunks, [this](int64_t chunk) { build(chunk); });
    const float top = top_level(call.tables, rows());
    PqLookUp exact{&call.layout, FP32, call.bias, 0, {}}, rounded{&call.layout, call.tables, call.bias, 0, {}};
    float inverse[MAX_IMAGES];
    for (int i = 0; i < images; i++) {
        const TableRange range = range_of(i);
        const bool fits = range.ordinary && (range.half == 0 || range.half >= SMALLEST);
        const float half = range.half == 0 ? 1.0f : range.half;
        PqLookUp& job = whole && fits ? rounded : exact;
        if (whole && fits) inverse[job.images] = top / half;
        job.image[job.images++] = {tables + i * table_size, packed + i * packed_size, half / top, float(range.offsets),
                                   y(i)};
    }
    parallel_for(call.threads, rounded.images * chunks, [&](int64_t task) {
        const int64_t i = task / chunks, chunk = task % chunks;
        const PqImage& image = rounded.image[i];
        const int64_t number = (image.tables - tables) / table_size;
        call.kernels->pack(call.layout, call.tables, image.tables, offsets + number * rows(), inverse[i], top,
                           chunk * CHUNK, least(rows(), (chunk + 1) * CHUNK), packed + number * packed_size);
    });
    const int64_t outputs = call.layout.outputs, panels = ceil_div(outputs, PANEL);
    const int64_t step = panels >= 4 * call.threads || call.threads == 1 ? PANEL : PANEL / 2;
    for (const PqLookUp* job : {&rounded, &exact}) {
        if (!job->images) continue;
        parallel_for(call.threads, ceil_div(outputs, step), [&](int64_t task) {
            const int64_t begin = task * step, end = least(outputs, begin + step);
            (job == &exact ? call.exact : call.kernels)->look_up(*job, begin, end);
            for (int i = 0; call.relu && i < job->images; i++) rectify(job->image[i].y + begin, end - begin);
        });
    }
}

int run(const Call& call) {
    const int64_t rows = table_rows(call.layout.subspaces), stride = table_stride(call.layout.codewords);
    const int64_t table_size = rows * stride, chunks = ceil_div(call.layout.subspaces, CHUNK);
    const int64_t packed_size = call.tables == FP32 ? 0 : ceil_div(call.kernels->packed_bytes(call.layout, call.tables), 64) * 64;
    const int64_t together = most(1, least(least(MAX_IMAGES, call.batch), TABLE_BYTES / (table_size * 4)));
    const size_t floats = size_t(table_size + call.layout.subspaces) * size_t(together) * sizeof(float);
    float* tables = static_cast<float*>(scratch(SLOT_TABLES, floats + size_t(together * chunks) * sizeof(TableRange) + 64));
    uint8_t* packed = static_cast<uint8_t*>(scratch(SLOT_PACKED, size_t(packed_size * together) + 64));
    if (!tables || !packed) return fail(NO_MEMORY, "No memory for the tables of %lld images", (long long)together);
    memset(packed, 0, size_t(packed_size * together));
    float* offsets = tables + table_size * together;
    size_t used = ceil_div(int64_t(floats), 16) * 16;
    TableRange* ranges = reinterpret_cast<TableRange*>(reinterpret_cast<uint8_t*>(tables) + used);
    for (int64_t i = 0; i < together; i++)
        memset(tables + i * table_size + call.layout.subspaces * stride, 0,
               size_t((rows - call.layout.subspaces) * stride) * sizeof(float));
    for (int64_t first = 0; first < call.batch; first += together) {
        const int images = int(least(together, call.batch - first));
        Block block{call, first, images, tables, offsets, packed, table_size, packed_size, chunks, ranges};
        block.run();
        for (int64_t task = 0; task < images * chunks; task++)
            if (ranges[task].half < 0) return fail(NO_MEMORY, "No memory for a code book's rows");
    }
    return OK;
}

}  // namespace
}  // namespace fx

// y[n][o] = bias[o] + sum_m codebook[m][index(m, o)] . x[n][m]; all pointers to C-contiguous numbers, bias may be null.
// pq_ops.py packs the same fields.
struct FxpressPQLinear {
    FxpressCall call;
    const float* codebook;
    const uint8_t* layout;
    const float* bias;
    int64_t batch, inputs;
    int64_t subspaces, codewords, width, layout_bytes, outputs;
    int32_t dims_major, tables, relu;
};

FX_EXPORT int fxpress_pq_linear(const FxpressPQLinear* layer) {
    using namespace fx;
    const FxpressPQLinear& of = *layer;
    Call call{};
    if (int status = read_layout(of.layout, of.layout_bytes, &call.layout)) return status;
    call.codebook = {of.codebook, of.subspaces, of.codewords, of.width, of.dims_major != 0};
    call.x = static_cast<const float*>(of.call.x), call.y = static_cast<float*>(of.call.y), call.bias = of.bias;
    call.batch = of.batch, call.inputs = of.inputs;
    call.tables = of.tables, call.relu = of.relu != 0, call.threads = int(most(1, least(of.call.threads, 1024)));
    if (int status = check(call, of.outputs)) return status;
    call.kernels = choose(call.layout, of.tables, of.call.isa), call.exact = choose(call.layout, FP32, of.call.isa);
    return of.batch ? run(call) : OK;
}
