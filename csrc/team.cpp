#include "team.h"

#include <condition_variable>
#include <deque>
#include <mutex>
#include <stdexcept>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#include <sched.h>
#endif

namespace tokenloom {
namespace {

// Long enough for the others to finish a piece; then the core is offered to whoever else wants it.
constexpr int SPINS = 4000;

inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

template <class F>
void spin_until(F&& reached) {
    for (int spins = 0; !reached(); ++spins) {
        if (spins < SPINS) {
            relax();
        } else {
            sched_yield();
        }
    }
}

struct Call {
    TeamFunction function;
    void* data;
    Team* team;
};

void enter(void* data) {
    auto* call = static_cast<Call*>(data);
    call->function(call->data, *call->team);
}

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

GompParallel gomp_parallel() {
#if defined(__linux__)
    static const auto found = reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    return found;
#else
    return nullptr;
#endif
}

// Threads that wait for a call; the caller is one more.
class Pool {
  public:
    ~Pool() {
        {
            std::lock_guard lock(mutex_);
            stop_ = true;
        }
        wake_.notify_all();
        for (auto& thread : threads_) thread.join();
    }

    void run(int workers, Call& call) {
        std::unique_lock lock(mutex_);
        while (static_cast<int>(threads_.size()) < workers) threads_.emplace_back([this] { work(); });
        for (int i = 0; i < workers; ++i) calls_.push_back(&call);
        pending_ += workers;
        lock.unlock();
        wake_.notify_all();
        enter(&call);
        lock.lock();
        done_.wait(lock, [this] { return pending_ == 0; });
    }

  private:
    void work() {
        std::unique_lock lock(mutex_);
        while (true) {
            wake_.wait(lock, [this] { return stop_ || !calls_.empty(); });
            if (stop_) return;
            Call* call = calls_.front();
            calls_.pop_front();
            lock.unlock();
            enter(call);
            lock.lock();
            if (--pending_ == 0) done_.notify_all();
        }
    }

    std::mutex mutex_;
    std::condition_variable wake_, done_;
    std::deque<Call*> calls_;
    std::vector<std::thread> threads_;
    int pending_ = 0;
    bool stop_ = false;
};

}  // namespace

void Work::wait_beyond(uint64_t step) const {
    spin_until([&] { return (team_.state.load(std::memory_order_acquire) >> 32) > step; });
}

void wait_for(const std::atomic<int>& counter, int count) {
    spin_until([&] { return counter.load(std::memory_order_acquire) >= count; });
}

void run_team(int threads, TeamFunction function, void* data) {
    if (threads < 1) throw std::invalid_argument("threads: at least 1 expected");
    Team team;
    if (threads == 1) {
        function(data, team);
        return;
    }
    Call call{function, data, &team};
    if (const auto parallel = gomp_parallel()) {
        parallel(enter, &call, static_cast<unsigned>(threads), 0);
        return;
    }
    // One pool for each calling thread, as OpenMP has it: two callers never wait for each other's threads.
    thread_local Pool pool;
    pool.run(threads - 1, call);
}

const char* pool_name() { return gomp_parallel() ? "GNU OpenMP" : "own"; }

}  // namespace tokenloom
