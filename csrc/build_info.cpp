// What the op libraries were compiled with; a Python module, so that the libraries themselves need no Python.
#include <pybind11/pybind11.h>

#include "cpu/instruction_set.h"

#define FLOWGROVE_TEXT_OF(value) #value
#define FLOWGROVE_TEXT(value) FLOWGROVE_TEXT_OF(value)

PYBIND11_MODULE(_build_info, m) {
  m.doc() = "Compiler, CUDA version and architectures of the compiled ops.";
#if defined(__clang__)
  m.attr("compiler") = "clang " __clang_version__;
#elif defined(__GNUC__)
  m.attr("compiler") = "g++ " __VERSION__;
#else
  m.attr("compiler") = "unknown";
#endif
  m.attr("torch") = FLOWGROVE_TEXT(FLOWGROVE_TORCH);    // the version whose headers were used
  m.attr("cuda") = FLOWGROVE_TEXT(FLOWGROVE_CUDA);      // of nvcc, or "none"
  m.attr("cuda_architectures") = FLOWGROVE_TEXT(FLOWGROVE_ARCHITECTURES);
  m.def(
      "instruction_set", [] { return flowgrove::cpu::name_of(flowgrove::cpu::instruction_set()); },
      "The vector instructions that the cpu backend uses on this processor.");
}
