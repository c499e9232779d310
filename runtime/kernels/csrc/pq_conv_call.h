// One call of the convolution: what its parts (pq_conv.cpp, pq_conv_setup.cpp, pq_conv_image.cpp, pq_conv_rows.cpp) share.
#pragma once

#include "pq_conv.h"

namespace fx {

constexpr float SMALLEST_RANGE = 1e-30f, LARGEST_RANGE = 1e30f;

struct Call {
    ConvShape shape{};
    ConvPool pool{};
    ConvTables tables{};
    Layout layout;
    const ConvKernels* kernels = nullptr;
    const float *x = nullptr, *bias = nullptr, *codebook = nullptr;
    float* y = nullptr;
    int mode = FP32, threads = 1;
    bool last = false, y_last = false;  // channels-last images, outputs
    bool dims_major = false, relu = false;  // code words adjacent in memory

    // derived
    bool quantized = false;         // integer tables are possible at all
    float sample_top = 0, code_scale = 0;
    const uint8_t* index = nullptr;  // CONV layout of this instruction set
    int32_t* codes = nullptr;        // 16-bit code words, as build() reads them
    float* longest = nullptr;        // [term * gang] largest squared length of a 16-bit code word
    float* padded_bias = nullptr;    // [group][block][BLOCK]
    int32_t *inputs = nullptr, *targets = nullptr;  // [row of a batch][column]
    int64_t count = 0;               // columns of tables to build, of one row
    int64_t batch = 1;               // rows whose tables are built at once
    uint8_t* exact = nullptr;        // [image] 1 where it takes exact tables, 2 where there was no memory
    // exact tables, made when they are needed
    const uint8_t* plain = nullptr;
    const float* exact_codes = nullptr;

    int64_t taps() const { return shape.kernel[0] * shape.kernel[1]; }
    int64_t pixels() const { return shape.height * shape.width; }
    // Rows of tables in memory: whole batches, as many as a window may touch.
    int64_t ring() const {
        const int64_t extent = (shape.kernel[0] - 1) * shape.dilation[0] + 1;
        return ceil_div(least(shape.height, extent + batch - 1), batch) * batch;
    }
    int64_t slots() const { return tables.terms * tables.gang; }
    int64_t words() const { return ceil_div(pixels(), 16) * 16; }  // of one plane of samples
    int64_t row_bytes() const { return tables.terms * tables.columns * tables.term_bytes; }
    float code(int64_t m, int64_t k, int64_t j) const {
        return codebook[dims_major ? (m * shape.subwidth + j) * shape.codewords + k
                                   : (m * shape.codewords + k) * shape.subwidth + j];
    }
};

// Hands out parts of one block of memory; first run with nullptr to learn the size.
struct Arena {
    uint8_t* base;
    size_t used = 0;
    template <class T>
    T* take(int64_t count) {
        T* at = base ? reinterpret_cast<T*>(base + used) : nullptr;
        used += (size_t(count) * sizeof(T) + 127) / 64 * 64;
        return at;
    }
};

// Sizes of the tables and widths of the numbers.
void lay_out(Call& call);
// Everything that all images share; OK or NO_MEMORY.
int prepare(Call& call);
// Plain indices and transposed code words for exact tables, in memory of this thread; OK or NO_MEMORY.
int prepare_exact(Call& call);

// One image: its samples and the scale of its tables.
struct Image {
    const Call& call;
    int64_t number;
    const float* planar = nullptr;  // [channel][pixel]
    int32_t* words = nullptr;       // [group][sub-space][pair][words()]
    float* bounds = nullptr;        // [sub-space][words()] of a group
    float* reach = nullptr;         // [sub-space] the largest of its bounds
    const int32_t** planes = nullptr;
    bool exact = false;
    float scale = 0, unit = 0, factor = 0;
    int shift = 0, multiplier = 0;

    int64_t sub_pairs() const { return call.shape.subspaces * call.tables.pairs; }
    void reserve(Arena& arena);
    // Channels as planes, whatever the format of the image.
    void read();
    // After read(): words, exact, and the scale of the tables.
    void quantize();
    // Pointers to the pairs of each slot at the start of an input row; slots beyond the last sub-space have code words 0.
    void plane_list(int64_t group, int64_t offset, const int32_t** list) const;

private:
    void make_samples(int64_t group, int64_t m);
    int32_t peak();
    float bound(int64_t group, int64_t m);
    int32_t peak_of(int64_t m, int32_t found);
    void choose_scale(int32_t most);
};

// Rows begin..end-1 of y of an image; false where there is no memory.
bool quantized_rows(const Image& image, int64_t begin, int64_t end);
bool exact_rows(const Image& image, int64_t begin, int64_t end);

}  // namespace fx
