// Compiled last, with FX_HAVE_AVX2 and FX_HAVE_AVX512 for the sets whose files the compiler accepted.
#include "dispatch.h"

namespace fx {

bool can_run(int isa) {
    switch (isa) {
        case PORTABLE: return true;
#if defined(FX_HAVE_AVX2)
        case AVX2: return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
#if defined(FX_HAVE_AVX512)
        case AVX512:
            return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                   __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni") &&
                   __builtin_cpu_supports("avx512vpopcntdq");
#endif
        default: return false;
    }
}

}  // namespace fx

// Version of the C functions; library.py refuses a library that is not its own.
FX_EXPORT int fxpress_abi() { return 6; }

FX_EXPORT int fxpress_can_run(int isa) { return fx::can_run(isa); }
