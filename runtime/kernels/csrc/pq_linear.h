// Fully connected layers: what the driver (pq_linear.cpp) hands to the kernels of one instruction set.
#pragma once

#include "layout.h"
#include "pq.h"

namespace fx {

constexpr int MAX_IMAGES = 8;  // that are computed together

struct PqImage {
    const float* tables;     // [rows][stride] float32
    const uint8_t* packed;   // integers in the kernel's own order
    float scale, constant;   // y = scale * sum of integers + constant + bias
    float* y;
};

struct PqLookUp {
    const Layout* layout;
    int tables;              // FP32 reads `tables` of every image, others `packed`
    const float* bias;       // or nullptr
    int images;
    PqImage image[MAX_IMAGES];
};

// Kernels of one instruction set. `begin` of look_up is a multiple of 64, `end` one too or the number of outputs.
struct PqLinearKernels {
    bool (*knows)(const Layout& layout, int tables);
    int64_t (*packed_bytes)(const Layout& layout, int tables);
    void (*build)(const Codebook& codebook, const float* x, int64_t inputs, int64_t begin, int64_t end, float* tables,
                  float* offsets, TableRange* range, float* buffer);
    void (*pack)(const Layout& layout, int tables, const float* values, const float* offsets, float inverse, float top,
                 int64_t begin, int64_t end, uint8_t* packed);
    void (*look_up)(const PqLookUp& job, int64_t begin, int64_t end);
};

extern const PqLinearKernels pq_linear_portable, pq_linear_avx2, pq_linear_avx512;

}  // namespace fx
