// The threads of a block as real threads, for ThreadSanitizer (an access that no barrier orders is a report) and
// AddressSanitizer.
#include <pthread.h>
#include <sched.h>

#include <atomic>
#include <thread>
#include <vector>

#include "cuda_runtime.h"

thread_local uint3 threadIdx, blockIdx;
dim3 gridDim;

namespace gs_shim {

namespace {

struct Warp {
  std::atomic<uint64_t> deposited[2][kLanes];
  std::atomic<int> arrived{0};
  std::atomic<unsigned> round{0};
};

pthread_barrier_t block_wide;
std::vector<Warp> warps;

void keep_order() {
  asm volatile("" ::: "memory");
}

}  // namespace

void set_schedule(uint64_t) {
}

void preempt() {
}

void block_barrier() {
  pthread_barrier_wait(&block_wide);
}

// Relaxed atomics and no lock, so that ThreadSanitizer sees no order where the GPU gives none.
void warp_exchange(Exchange, uint64_t value, uint64_t (&of_lane)[kLanes]) {
  Warp& warp = warps[threadIdx.x / kLanes];
  const unsigned round = warp.round.load(std::memory_order_relaxed);
  auto& deposited = warp.deposited[round % 2];
  deposited[lane()].store(value, std::memory_order_relaxed);
  keep_order();
  if (warp.arrived.fetch_add(1, std::memory_order_relaxed) == kLanes - 1) {
    warp.arrived.store(0, std::memory_order_relaxed);
    keep_order();
    warp.round.store(round + 1, std::memory_order_relaxed);
  } else {
    while (warp.round.load(std::memory_order_relaxed) == round) sched_yield();
  }
  keep_order();
  for (int k = 0; k < kLanes; ++k) of_lane[k] = deposited[k].load(std::memory_order_relaxed);
}

void launch(dim3 grid, dim3 block, const std::function<void()>& body) {
  gridDim = grid;
  warps = std::vector<Warp>(block.x / kLanes);
  pthread_barrier_init(&block_wide, nullptr, block.x);
  std::vector<std::thread> threads;
  for (unsigned t = 0; t < block.x; ++t) {
    threads.emplace_back([&, t] {
      threadIdx = {t, 0, 0};
      for (unsigned b = 0; b < grid.x * grid.y; ++b) {
        blockIdx = {b % grid.x, b / grid.x, 0};
        if (t == 0) poison_shared_memory(b);
        block_barrier();
        body();
        block_barrier();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  pthread_barrier_destroy(&block_wide);
}

}  // namespace gs_shim
