// Any layout on any machine: rows of indices are unpacked where they are not bytes already, entries are added one by one.
#include "pq_linear.h"
#include "pq_tables.h"

namespace fx {
namespace {

constexpr int64_t BLOCK = 256;

bool knows(const Layout&, int) { return true; }

int64_t packed_bytes(const Layout& layout, int) {
    return layout.subspaces * table_stride(layout.codewords) * int64_t(sizeof(int32_t));
}

void pack(const Layout& layout, int, const float* values, const float* offsets, float inverse, float top, int64_t begin,
          int64_t end, uint8_t* packed) {
    const int64_t stride = table_stride(layout.codewords);
    for (int64_t m = begin; m < end; m++)
        round_row(values + m * stride, stride, offsets[m], inverse, top, reinterpret_cast<int32_t*>(packed) + m * stride);
}

// Sums of BLOCK outputs or fewer; Entry is float or int32_t.
template <class Entry>
void sums(const Layout& layout, const Entry* tables, int64_t begin, int64_t count, Entry* total) {
    const int64_t stride = table_stride(layout.codewords);
    uint8_t row[BLOCK];
    for (int64_t i = 0; i < count; i++) total[i] = 0;
    for (int64_t m = 0; m < layout.subspaces; m++) {
        unpack_row(layout, 0, m, begin, count, row);
        const Entry* table = tables + m * stride;
        for (int64_t i = 0; i < count; i++) total[i] += table[row[i]];
    }
}

void look_up_image(const PqLookUp& job, const PqImage& image, int64_t begin, int64_t count) {
    const float* bias = job.bias ? job.bias + begin : nullptr;
    float* y = image.y + begin;
    float total[BLOCK];
    if (job.tables == FP32) {
        sums(*job.layout, image.tables, begin, count, total);
        for (int64_t i = 0; i < count; i++) y[i] = total[i] + (bias ? bias[i] : 0.0f);
        return;
    }
    int32_t whole[BLOCK];
    sums(*job.layout, reinterpret_cast<const int32_t*>(image.packed), begin, count, whole);
    for (int64_t i = 0; i < count; i++)
        y[i] = float(whole[i]) * image.scale + image.constant + (bias ? bias[i] : 0.0f);
}

void look_up(const PqLookUp& job, int64_t begin, int64_t end) {
    for (int64_t start = begin; start < end; start += BLOCK)
        for (int i = 0; i < job.images; i++) look_up_image(job, job.image[i], start, least(BLOCK, end - start));
}

}  // namespace

const PqLinearKernels pq_linear_portable = {knows, packed_bytes, build_tables, pack, look_up};

}  // namespace fx
