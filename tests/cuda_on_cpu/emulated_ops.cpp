// The ops of csrc/cuda/, host code and kernels, as flowgrove_emulated::* of CPU tensors.
#include "cuda/run.h"

#define CUDA CPU
#define flowgrove_native flowgrove_emulated
#include "schemas.cpp"

#include "cuda/clean_estimate.cu"
#include "cuda/flow_logprob.cu"
#include "cuda/flow_step.cu"
#include "cuda/grpo_loss.cu"
#include "cuda/philox_normal.cu"
