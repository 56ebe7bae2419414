// block.h for processors with AVX-512 (F, BW, DQ, VL).
#include "cpu/block.h"

#if defined(FLOWGROVE_X86_SETS)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#define FLOWGROVE_SET avx512
#include "cpu/block_functions.h"
#endif
