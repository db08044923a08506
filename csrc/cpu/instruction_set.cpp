#include "instruction_set.h"

#include <cstdlib>
#include <cstring>

namespace gs_d2 {

namespace {

InstructionSet detect() {
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  const char* wanted = std::getenv("GS_D2_CPU_CAPABILITY");
  if (wanted != nullptr && std::strcmp(wanted, "baseline") == 0) return InstructionSet::kBaseline;
  if (wanted != nullptr && std::strcmp(wanted, "avx2") == 0 && avx2) return InstructionSet::kAvx2;
  if (avx512) return InstructionSet::kAvx512;
  if (avx2) return InstructionSet::kAvx2;
#endif
  return InstructionSet::kBaseline;
}

}  // namespace

InstructionSet active_instruction_set() {
  static const InstructionSet detected = detect();
  return detected;
}

}  // namespace gs_d2
