// Inner loops of the convolution in plain C++, for compilers to vectorise; each file that includes this has its own copy.
#pragma once

#include "pq_conv.h"

namespace fx {
namespace {

// Products in the order of j, each rounded: the same bits as the reference.
[[maybe_unused]] static void exact_build(const ExactJob* job) {
    for (int64_t m = 0; m < job->subspaces; m++)
        for (int64_t i = 0; i < job->count; i++) {
            float* FX_RESTRICT table = job->tables + (m * job->columns + job->targets[i]) * job->entries;
            const float* codes = job->codebook + m * job->subwidth * job->entries;
            for (int64_t j = 0; j < job->subwidth; j++) {
                const float* plane = job->planes[m * job->subwidth + j];
                if (!plane) break;
                const float s = plane[job->inputs[i]], *FX_RESTRICT code = codes + j * job->entries;
                if (j == 0)
                    for (int64_t k = 0; k < job->entries; k++) table[k] = code[k] * s;
                else
                    for (int64_t k = 0; k < job->entries; k++) table[k] = table[k] + code[k] * s;
            }
        }
}

}  // namespace
}  // namespace fx
