// Threads that run one function together, and meet at barriers inside it.
//
// Where the process already has GNU OpenMP (PyTorch's wheels bring it), its pool is used through the entry
// point that compiled OpenMP code calls: two pools would fight for the same cores, since idle OpenMP workers
// spin for a while. Elsewhere a small pool of our own does the same.
#pragma once

#include <atomic>
#include <cstdint>

namespace tokenloom {

// What the threads of one parallel region share.
struct Team {
    // The step that is under way (upper half) and its next free piece (lower half).
    alignas(64) std::atomic<uint64_t> state{0};
    alignas(64) std::atomic<int> done{0};  // pieces of the step that are finished
};

using TeamFunction = void (*)(void* data, Team& team);

// Runs `function(data, team)` in so many threads at the same time and returns when all have.
void run_team(int threads, TeamFunction function, void* data);

template <class F>
void run_team(int threads, F&& f) {
    run_team(
        threads, [](void* data, Team& team) { (*static_cast<F*>(data))(team); }, &f);
}

// Returns when a counter has come so far: another thread of the team is at work on what is missing.
void wait_for(const std::atomic<int>& counter, int count);

// Whose threads `run_team` uses: "GNU OpenMP" or "own".
const char* pool_name();

// Steps of a parallel function. Every thread makes the same calls in the same order:
//
//     Work work(team, threads);
//     work.each(count, [&](int piece) { ... });   // ends when all pieces are done
//
// Pieces go to whichever thread is free, and a step ends when its pieces are done, not when every thread has
// come: one that the machine keeps from running holds up nobody, and skips what was done without it.
class Work {
  public:
    Work(Team& team, int threads) : team_(team), threads_(threads) {}

    int threads() const { return threads_; }

    template <class F>
    void each(int count, F&& f) {
        if (threads_ == 1 || count <= 0) {
            for (int piece = 0; piece < count; ++piece) f(piece);
            return;
        }
        const uint64_t step = step_++;
        uint64_t state = team_.state.load(std::memory_order_acquire);
        while ((state >> 32) == step && static_cast<int>(state & 0xffffffff) < count) {
            if (!team_.state.compare_exchange_weak(state, state + 1, std::memory_order_acq_rel)) continue;
            f(static_cast<int>(state & 0xffffffff));
            if (team_.done.fetch_add(1, std::memory_order_acq_rel) == count - 1) {
                team_.done.store(0, std::memory_order_relaxed);
                team_.state.store((step + 1) << 32, std::memory_order_release);
                return;
            }
            state = team_.state.load(std::memory_order_acquire);
        }
        wait_beyond(step);
    }

  private:
    void wait_beyond(uint64_t step) const;

    Team& team_;
    const int threads_;
    uint64_t step_ = 0;
};

}  // namespace tokenloom
