// block.h for any processor, and the choice between the instruction sets.
#include "cpu/block.h"

#define FLOWGROVE_SET baseline
#include "cpu/block_functions.h"

namespace flowgrove::cpu {

#if defined(FLOWGROVE_X86_SETS)
namespace avx512 {
extern const Block functions;
}
namespace avx2 {
extern const Block functions;
}
#endif

static const Block& choose() {
#if defined(FLOWGROVE_X86_SETS)
  if (instruction_set() == InstructionSet::avx512) return avx512::functions;
  if (instruction_set() == InstructionSet::avx2) return avx2::functions;
#endif
  return baseline::functions;
}

const Block& block() {
  static const Block& chosen = choose();
  return chosen;
}

}  // namespace flowgrove::cpu
