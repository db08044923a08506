// Stands in for CUDA's header of this name, so that g++ compiles csrc/cuda/*.cu as they are and a kernel runs on the
// CPU: every thread of a block as a fiber (fibers.cpp) or as a real thread (threads.cpp), one block after another.
//
// Only what the kernels use is here. Warp functions expect all 32 lanes, as the kernels call them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(threads)
// All shared memory lies in one section, which is filled with rubbish before each block.
#define __shared__ static __attribute__((section("gs_shared")))

#define GS_LAUNCH(kernel, grid, block, smem, stream, ...) \
  (void(smem), void(stream), gs_shim::launch(grid, block, [&] { kernel(__VA_ARGS__); }))

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  explicit dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {
  }
};

extern thread_local uint3 threadIdx, blockIdx;
extern dim3 gridDim;

namespace gs_shim {

constexpr int kLanes = 32;
enum class Exchange { kShuffle, kBallot, kMatch };

void launch(dim3 grid, dim3 block, const std::function<void()>& body);
void set_schedule(uint64_t seed);  // fibers only: the order in which threads run
void block_barrier();
// Hands `value` to the other lanes of the warp and takes theirs. Orders no memory, as on the GPU.
void warp_exchange(Exchange kind, uint64_t value, uint64_t (&of_lane)[kLanes]);
// Where another thread of the block may come first.
void preempt();
void poison_shared_memory(uint64_t seed);

template <class T>
T shuffle(T value, int lane) {
  uint64_t bits = 0, of_lane[kLanes];
  std::memcpy(&bits, &value, sizeof value);
  warp_exchange(Exchange::kShuffle, bits, of_lane);
  std::memcpy(&value, &of_lane[lane], sizeof value);
  return value;
}

inline int lane() {
  return int(threadIdx.x) % kLanes;
}

inline void expect_all_lanes(unsigned mask) {
  if (mask != 0xffffffffu) std::abort();
}

}  // namespace gs_shim

inline void __syncthreads() {
  gs_shim::block_barrier();
}

template <class T>
T __shfl_sync(unsigned mask, T value, int lane) {
  gs_shim::expect_all_lanes(mask);
  return gs_shim::shuffle(value, lane);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
  gs_shim::expect_all_lanes(mask);
  return gs_shim::shuffle(value, gs_shim::lane() ^ lane_mask);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, int distance) {
  gs_shim::expect_all_lanes(mask);
  const int lane = gs_shim::lane();
  return gs_shim::shuffle(value, lane >= distance ? lane - distance : lane);
}

inline unsigned __ballot_sync(unsigned mask, bool vote) {
  gs_shim::expect_all_lanes(mask);
  uint64_t of_lane[gs_shim::kLanes];
  gs_shim::warp_exchange(gs_shim::Exchange::kBallot, vote, of_lane);
  unsigned votes = 0;
  for (int k = 0; k < gs_shim::kLanes; ++k) votes |= unsigned(of_lane[k]) << k;
  return votes;
}

inline unsigned __match_any_sync(unsigned mask, uint32_t value) {
  gs_shim::expect_all_lanes(mask);
  uint64_t of_lane[gs_shim::kLanes];
  gs_shim::warp_exchange(gs_shim::Exchange::kMatch, value, of_lane);
  unsigned peers = 0;
  for (int k = 0; k < gs_shim::kLanes; ++k) peers |= unsigned(of_lane[k] == value) << k;
  return peers;
}

inline int __ffs(int word) {
  return __builtin_ffs(word);
}

inline int __popc(unsigned word) {
  return __builtin_popcount(word);
}

// Atomics are relaxed: on the GPU, too, they order nothing else.
inline uint32_t atomicAdd(uint32_t* address, uint32_t value) {
  gs_shim::preempt();
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}

inline unsigned long long atomicMax(unsigned long long* address, unsigned long long value) {
  gs_shim::preempt();
  unsigned long long seen = __atomic_load_n(address, __ATOMIC_RELAXED);
  while (seen < value &&
         !__atomic_compare_exchange_n(address, &seen, value, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return seen;
}

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost };

// Rubbish, as fresh device memory is.
inline cudaError_t cudaMalloc(void** memory, size_t bytes) {
  *memory = std::malloc(bytes);
  std::memset(*memory, 0xcd, bytes);
  return cudaSuccess;
}

inline cudaError_t cudaFree(void* memory) {
  std::free(memory);
  return cudaSuccess;
}

inline cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  if (bytes > 0) std::memcpy(to, from, bytes);
  return cudaSuccess;
}

inline cudaError_t cudaGetLastError() {
  return cudaSuccess;
}

inline cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  std::memset(memory, value, bytes);
  return cudaSuccess;
}
