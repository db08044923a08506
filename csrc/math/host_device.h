// Marks functions that run on the host and, when nvcc compiles them, on the device too.
#pragma once

#if defined(__CUDACC__)
#define GS_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define GS_HOST_DEVICE inline __attribute__((always_inline))
#endif
