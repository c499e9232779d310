#include "threads.h"

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#include <signal.h>
#define FX_POSIX 1
#endif
#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

namespace fx {
namespace {

// About 90 us on a Zen 5: long enough to reach the next layer of a network from Python, as waking a thread that sleeps costs
// as much (AlexNet on two threads: 0.83 ms against 0.98 with a quarter of it, for the same CPU time).
constexpr int SPINS = 4000;

void pause() {
#if defined(__x86_64__) || defined(__i386__)
    _mm_pause();
#else
    std::this_thread::yield();
#endif
}

struct Job {
    void (*work)(void*, int64_t) = nullptr;
    void* data = nullptr;
    int64_t tasks = 0;
};

// Late threads do not hold up the others: a job is closed as soon as its caller finds no task left, and waits only for
// those that have joined it.
class Pool {
public:
    void run(int threads, const Job& job) {
        if (!caller_.try_lock()) return alone(job);
        grow(threads - 1);
        {
            std::lock_guard<std::mutex> lock(mutex_);
            job_ = job;
            next_.store(0, std::memory_order_relaxed);
            seats_ = threads - 1;
            open_ = true;
            epoch_.fetch_add(1, std::memory_order_release);
        }
        if (sleeping_.load() > 0) wake_.notify_all();
        take(job);
        close();
        caller_.unlock();
    }

    static void alone(const Job& job) {
        for (int64_t task = 0; task < job.tasks; task++) job.work(job.data, task);
    }

private:
    void take(const Job& job) {
        for (int64_t task; (task = next_.fetch_add(1, std::memory_order_relaxed)) < job.tasks;)
            job.work(job.data, task);
    }

    void close() {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            open_ = false;
        }
        for (int spin = 0; spin < SPINS && active_.load(std::memory_order_acquire); spin++) pause();
        std::unique_lock<std::mutex> lock(mutex_);
        done_.wait(lock, [this] { return active_.load(std::memory_order_acquire) == 0; });
    }

    void grow(int wanted) {
        while (workers_ < wanted) {
            try {
                std::thread([this] { serve(); }).detach();
            } catch (const std::system_error&) {
                return;  // no more threads to be had: those that are there do the work
            }
            workers_++;
        }
    }

    void serve() {
#ifdef FX_POSIX
        sigset_t all;  // signals are for the threads of the program
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, nullptr);
#endif
        for (uint64_t seen = 0;; seen = await(seen)) join();
    }

    // Returns the number of the newest job, once there is one after `seen`.
    uint64_t await(uint64_t seen) {
        for (int spin = 0; spin < SPINS; spin++) {
            uint64_t now = epoch_.load(std::memory_order_acquire);
            if (now != seen) return now;
            pause();
        }
        std::unique_lock<std::mutex> lock(mutex_);
        sleeping_++;
        wake_.wait(lock, [&] { return epoch_.load(std::memory_order_relaxed) != seen; });
        sleeping_--;
        return epoch_.load(std::memory_order_relaxed);
    }

    void join() {
        std::unique_lock<std::mutex> lock(mutex_);
        if (!open_ || seats_ == 0) return;
        seats_--;
        active_++;
        Job job = job_;
        lock.unlock();
        take(job);
        lock.lock();
        active_--;
        if (active_ == 0) done_.notify_one();
    }

    std::mutex caller_, mutex_;
    std::condition_variable wake_, done_;
    std::atomic<uint64_t> epoch_{0};
    std::atomic<int64_t> next_{0};
    std::atomic<int> active_{0}, sleeping_{0};
    int workers_ = 0, seats_ = 0;
    bool open_ = false;
    Job job_;
};

// Never destroyed: its threads may still sleep in it while the process ends.
std::atomic<Pool*> pool{nullptr};

Pool* the_pool() {
    Pool* found = pool.load(std::memory_order_acquire);
    if (found) return found;
    Pool* made = new Pool;
    if (pool.compare_exchange_strong(found, made)) return made;
    delete made;
    return found;
}

#ifdef FX_POSIX
// The threads are not copied by a fork: the child makes a pool of its own when it needs one.
void forget() { pool.store(nullptr); }
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, forget);
#endif

}  // namespace

void parallel(int threads, int64_t tasks, void (*work)(void*, int64_t), void* data) {
    Job job;
    job.work = work, job.data = data, job.tasks = tasks;
    int useful = int(least(threads, tasks));
    useful > 1 ? the_pool()->run(useful, job) : Pool::alone(job);
}

}  // namespace fx
