#include "common.h"

#include <cstdarg>
#include <cstdio>
#include <cstdlib>

namespace fx {
namespace {

thread_local char message[256] = "";

struct Arena {
    void* memory[SLOTS] = {};
    size_t bytes[SLOTS] = {};
    ~Arena() {
        for (void* part : memory) free(part);
    }
};

thread_local Arena arena;

}  // namespace

int fail(int status, const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(message, sizeof message, format, arguments);
    va_end(arguments);
    return status;
}

void* scratch(int slot, size_t bytes) {
    if (bytes > (size_t(1) << 40)) return nullptr;
#if defined(__SANITIZE_ADDRESS__)
    size_t rounded = (bytes + 63) & ~size_t(63);  // anew at every call, so that a step outside shows
#else
    if (bytes <= arena.bytes[slot]) return arena.memory[slot];
    size_t rounded = (bytes + bytes / 8 + 4095) & ~size_t(4095);
#endif
    free(arena.memory[slot]);
    arena.memory[slot] = aligned_alloc(64, rounded);
    arena.bytes[slot] = arena.memory[slot] ? rounded : 0;
    return arena.memory[slot];
}

}  // namespace fx

// Why this thread's last call failed.
FX_EXPORT const char* fxpress_message() { return fx::message; }
