// The threads of a block as fibers in a shuffled order: a warp may run far ahead of the others up to the next barrier,
// and lanes interleave at every shuffle, ballot and atomic. What depends on the order shows as a wrong result.
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <deque>
#include <memory>
#include <random>
#include <vector>

#include "cuda_runtime.h"

thread_local uint3 threadIdx, blockIdx;
dim3 gridDim;

namespace gs_shim {

namespace {

constexpr size_t kStackBytes = size_t{1} << 16;

struct Fiber {
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  ucontext_t start;
  jmp_buf resume;  // once started: unlike swapcontext it makes no system call
  bool started = false;
};

struct Warp {
  uint32_t ready = 0;  // lanes that can run
  int arrived = 0;     // lanes waiting in warp_exchange
  Exchange kind;
  uint64_t deposited[kLanes], taken[kLanes];
};

std::deque<Fiber> fibers;  // a context must not move: it points into itself
std::vector<Warp> warps;
std::mt19937_64 schedule;
jmp_buf scheduler;
int current, num_threads, num_finished, num_at_barrier;
const std::function<void()>* running_body;

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "cuda_on_cpu: %s (block %u, thread %d; %d of %d threads at a barrier, %d finished)\n", what,
               blockIdx.x, current, num_at_barrier, num_threads, num_finished);
  std::exit(3);
}

void to_scheduler() {
  if (_setjmp(fibers[current].resume) == 0) _longjmp(scheduler, 1);
}

void wait() {
  warps[current / kLanes].ready &= ~(1u << current % kLanes);
  to_scheduler();
}

void fiber_main() {
  for (;;) {
    (*running_body)();
    ++num_finished;
    wait();
  }
}

void resume(int fiber) {
  current = fiber;
  threadIdx = {unsigned(fiber), 0, 0};
  if (_setjmp(scheduler) != 0) return;
  Fiber& f = fibers[current];
  if (f.started) _longjmp(f.resume, 1);
  f.started = true;
  setcontext(&f.start);
}

void run_block() {
  num_finished = num_at_barrier = 0;
  const int num_warps = num_threads / kLanes;
  for (int w = 0; w < num_warps; ++w) {
    warps[w].ready = ~0u;
    warps[w].arrived = 0;
  }
  int favoured = 0;
  uint64_t turns = 0;
  while (num_finished < num_threads) {
    if (turns-- == 0 || warps[favoured].ready == 0) {
      turns = schedule() % 200;
      const int first = int(schedule() % num_warps);
      int tried = 0;
      while (tried < num_warps && warps[(first + tried) % num_warps].ready == 0) ++tried;
      if (tried == num_warps) fail("threads wait for one another for ever");
      favoured = (first + tried) % num_warps;
    }
    const int turn = int(schedule() % kLanes);
    const uint32_t ready = warps[favoured].ready;
    const uint32_t rotated = ready >> turn | ready << (kLanes - turn) % kLanes;
    resume(favoured * kLanes + (__builtin_ctz(rotated) + turn) % kLanes);
  }
}

}  // namespace

void set_schedule(uint64_t seed) {
  schedule.seed(seed);
}

void block_barrier() {
  if (++num_at_barrier == num_threads) {
    num_at_barrier = 0;
    for (int w = 0; w < num_threads / kLanes; ++w) warps[w].ready = ~0u;
    preempt();
  } else {
    wait();
  }
}

void warp_exchange(Exchange kind, uint64_t value, uint64_t (&of_lane)[kLanes]) {
  Warp& warp = warps[current / kLanes];
  if (warp.arrived > 0 && warp.kind != kind) fail("lanes of a warp meet in different functions");
  warp.kind = kind;
  warp.deposited[current % kLanes] = value;
  if (++warp.arrived == kLanes) {
    // The lanes have all taken what they were given last: each is here.
    std::memcpy(warp.taken, warp.deposited, sizeof warp.taken);
    warp.arrived = 0;
    warp.ready = ~0u;
    preempt();
  } else {
    wait();
  }
  std::memcpy(of_lane, warp.taken, sizeof warp.taken);
}

void preempt() {
  if (schedule() % 4 == 0) to_scheduler();
}

void launch(dim3 grid, dim3 block, const std::function<void()>& body) {
  num_threads = int(block.x);
  if (num_threads % kLanes != 0) fail("a block must be whole warps");
  while (fibers.size() < size_t(num_threads)) {
    Fiber& f = fibers.emplace_back();
    getcontext(&f.start);
    f.start.uc_stack.ss_sp = f.stack.get();
    f.start.uc_stack.ss_size = kStackBytes;
    makecontext(&f.start, fiber_main, 0);
  }
  warps.resize(num_threads / kLanes);
  gridDim = grid;
  running_body = &body;
  std::vector<uint3> blocks;
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; ++x) blocks.push_back({x, y, 0});
  }
  std::shuffle(blocks.begin(), blocks.end(), schedule);
  for (const uint3& b : blocks) {
    blockIdx = b;
    poison_shared_memory(schedule());
    run_block();
  }
}

}  // namespace gs_shim
