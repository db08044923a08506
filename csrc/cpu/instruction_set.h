// One body, compiled for several instruction sets and chosen at run time, so that a portable build is fast everywhere.
//
// Contraction into FMA is off for all of them, so they give the same bits; tests force each one in turn through the
// environment variable GS_D2_CPU_CAPABILITY = baseline | avx2 | avx512 (read once, at first use).
#pragma once

namespace gs_d2 {

enum class InstructionSet { kBaseline, kAvx2, kAvx512 };

InstructionSet active_instruction_set();

}  // namespace gs_d2

// GS_MULTIVERSION(f, (int n, float* x), (n, x)) defines f(int, float*) from an always_inline function f_body.
#if defined(__x86_64__) && defined(__GNUC__)
#define GS_TARGET_AVX2 "avx2,bmi2,fma"
#define GS_TARGET_AVX512 GS_TARGET_AVX2 ",avx512f,avx512bw,avx512cd,avx512dq,avx512vl"
#if defined(__clang__)
#define GS_WIDE_VECTORS
#else
#define GS_WIDE_VECTORS ",prefer-vector-width=512"
#endif
#define GS_MULTIVERSION(name, params, args)                                                    \
  __attribute__((target(GS_TARGET_AVX512 GS_WIDE_VECTORS))) static void name##_avx512 params { \
    name##_body args;                                                                          \
  }                                                                                            \
  __attribute__((target(GS_TARGET_AVX2))) static void name##_avx2 params {                     \
    name##_body args;                                                                          \
  }                                                                                            \
  static void name params {                                                                    \
    switch (active_instruction_set()) {                                                        \
      case InstructionSet::kAvx512:                                                            \
        return name##_avx512 args;                                                             \
      case InstructionSet::kAvx2:                                                              \
        return name##_avx2 args;                                                               \
      case InstructionSet::kBaseline:                                                          \
        return name##_body args;                                                               \
    }                                                                                          \
  }
#else
#define GS_MULTIVERSION(name, params, args) \
  static void name params {                 \
    name##_body args;                       \
  }
#endif
