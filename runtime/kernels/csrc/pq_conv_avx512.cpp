// Product-quantized convolution with AVX-512 VBMI and VNNI: tables in registers, looked up by byte permutes.
//
// 64 look-ups take one vpermi2b (two tables of 64 entries, one of 128) or vpermb (four of 16), and
//   K <= 32:  vpdpbusd adds four sub-spaces to 32 bits                                  2 instructions per 64
//   K = 64:   two terms are added as bytes, vpmaddubsw adds neighbours, vpaddw          2.5
//   K = 128:  two terms are added as bytes; vpaddw, vpmaddubsw, vpaddw                  3
#include "pq_conv_plain.h"
#include "pq_conv_sums_avx512.h"
#include "pq_conv_write_avx512.h"

namespace fx {

extern const ConvKernels conv_avx512;
const ConvKernels conv_avx512 = {16, choose, largest, samples, bounds, peak, build, accumulate, decode, finish, pool,
                                 plain::exact_build, exact_sum, transpose};

}  // namespace fx
