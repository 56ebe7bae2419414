// The vector instructions of the processor that runs this.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define FLOWGROVE_X86_SETS 1  // block_avx512.cpp and block_avx2.cpp have something in them
#endif

namespace flowgrove::cpu {

enum class InstructionSet { baseline, avx2, avx512 };

inline InstructionSet instruction_set() {
#if defined(FLOWGROVE_X86_SETS)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx2) return avx512 ? InstructionSet::avx512 : InstructionSet::avx2;
#endif
  return InstructionSet::baseline;
}

inline const char* name_of(InstructionSet set) {
  return set == InstructionSet::avx512 ? "avx512" : set == InstructionSet::avx2 ? "avx2" : "baseline";
}

}  // namespace flowgrove::cpu
