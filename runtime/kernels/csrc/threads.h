// A pool of threads that lives as long as the process, and survives a fork.
#pragma once

#include <type_traits>

#include "common.h"

namespace fx {

// Runs work(data, task) for task = 0..tasks-1 on at most `threads` threads, this one among them, and returns when all
// are done. Tasks are handed out one by one, so make them a few microseconds long. `work` must not throw. A call from
// inside of `work`, or while another thread's call is running, runs its tasks on the calling thread alone.
void parallel(int threads, int64_t tasks, void (*work)(void* data, int64_t task), void* data);

// The same for a lambda: parallel_for(threads, tasks, [&](int64_t task) { ... }). Not for *_avx2.cpp and the like.
template <class Work>
static inline void parallel_for(int threads, int64_t tasks, Work&& work) {
    using Type = std::remove_reference_t<Work>;
    parallel(threads, tasks, [](void* data, int64_t task) { (*static_cast<Type*>(data))(task); }, &work);
}

}  // namespace fx
