// What every translation unit shares: types, status codes, limits. Plain C++17, no other library.
//
// Rules for files that are compiled for one instruction set (*_avx2.cpp, *_avx512.cpp): everything they define is
// `static` or in an anonymous namespace, apart from the one table of functions that they export, and they use no
// templates of the standard library. The linker keeps one copy of an inline function: it could be theirs, and an older
// CPU would run it.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__GNUC__)
#define FX_EXPORT extern "C" __attribute__((visibility("default")))
#define FX_INLINE inline __attribute__((always_inline))
#define FX_RESTRICT __restrict__
#define FX_UNROLL _Pragma("GCC unroll 16")
#else
#define FX_EXPORT extern "C"
#define FX_INLINE inline
#define FX_RESTRICT
#define FX_UNROLL
#endif

// What the struct of every exported function of a layer begins with; runtime/kernels/bound.py packs it.
struct FxpressCall {
    const void* x;
    void* y;
    int32_t threads, isa;
};

namespace fx {

// Instruction sets; the numbers are those of runtime/kernels/library.py.
enum Isa : int { PORTABLE = 0, AVX2 = 1, AVX512 = 2 };

// Element types of the tables; the numbers are those of runtime/kernels/pq_ops.py.
enum Tables : int { FP32 = 0, INT16 = 1, INT8 = 2 };

// What an exported function returns; library.py raises KernelError with fxpress_message() for all but OK.
enum Status : int { OK = 0, BAD_LAYOUT = 1, BAD_ARGUMENT = 2, NO_MEMORY = 3 };

// Keeps the message of this thread's last failure and returns `status`; printf format.
int fail(int status, const char* format, ...);

// Memory of this thread that lives on between calls: `bytes` bytes, 64-byte aligned, nullptr when there is none.
// A slot is overwritten by the next call that asks for the same slot on the same thread.
enum Slot : int {
    SLOT_TABLES = 0, SLOT_PACKED = 1, SLOT_ROWS = 2,
    SLOT_CONV_CALL = 3, SLOT_CONV_INDEX = 4, SLOT_CONV_IMAGE = 5, SLOT_CONV_ROWS = 6, SLOT_CONV_EXACT = 7,
    SLOT_EDGES = 8, SLOT_NETWORK = 9, SLOTS = 10
};
void* scratch(int slot, size_t bytes);

static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace fx
