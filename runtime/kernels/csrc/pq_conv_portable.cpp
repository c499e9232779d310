// Product-quantized convolution for any CPU.
#include "pq_conv_plain.h"

namespace fx {

using namespace plain;

extern const ConvKernels conv_portable;
const ConvKernels conv_portable = {4,          choose, largest, samples, bounds,      peak,      build,
                                   accumulate, decode, finish<decode>,  pool,    exact_build, exact_sum, transpose};

}  // namespace fx
