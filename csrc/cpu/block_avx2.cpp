// block.h for processors with AVX2 and FMA.
#include "cpu/block.h"

#if defined(FLOWGROVE_X86_SETS)
#pragma GCC target("avx2,fma,f16c")
#define FLOWGROVE_SET avx2
#include "cpu/block_functions.h"
#endif
