// How grpo_loss is planned and launched.
#pragma once

#include "cuda/grpo_loss.cuh"
#include "cuda/reduce_launch.cuh"

namespace flowgrove::cuda {

// That share a multiprocessor's memory: one alone has nothing to do while its threads meet.
constexpr int LEAST_BLOCKS = 2;

struct GRPOPlan {
  using Kernel = void(GRPOLoss, Partition, GRPOPasses, GRPOScratch);
  Kernel *loss, *gradient;
  Partition partition;
  GRPOPasses passes;
  Launch launch;
  bool clustered;

  int64_t partials(const GRPOLoss& op) const {
    return clustered ? 0 : op.edges * passes.sums_an_edge * partition.parts;
  }
  int64_t drifts(const GRPOLoss& op) const { return clustered ? 0 : op.states.rows * passes.with_kl * partition.parts; }
  size_t scratch_bytes(const GRPOLoss& op) const {
    return (partials(op) + drifts(op)) * sizeof(double) + op.edges * (sizeof(Slope) + sizeof(float));
  }
  GRPOScratch scratch(const GRPOLoss& op, void* memory) const {
    double* partials_of = static_cast<double*>(memory);
    double* drifts_of = partials_of + partials(op);
    Slope* slopes = reinterpret_cast<Slope*>(drifts_of + drifts(op));
    return {clustered ? nullptr : partials_of, drifts_of, slopes, reinterpret_cast<float*>(slopes + op.edges)};
  }
};

// A block a part, and the parts of a row meet in device memory.
inline GRPOPlan plan_without_clusters(const GRPOLoss& op) {
  GRPOPlan plan = {};
  const bool all_whole = whole(op.states, op.x_next, op.noise.given, op.v_ref, op.grad_v, op.grad_v_uncond);
  with_layout(all_whole, op.states.v.kind, [&](auto layout) {
    using L = decltype(layout);
    plan.loss = op.guard ? grpo_loss_kernel<L, true> : grpo_loss_kernel<L, false>;
    plan.gradient = op.guard ? grpo_gradient_kernel<L, true> : grpo_gradient_kernel<L, false>;
  });
  plan.partition = partition_of(op.states.elements);
  plan.passes.part_chunks = plan.passes.block_chunks = static_cast<int>(plan.partition.part_elements / WIDTH);
  plan.passes.with_kl = op.v_ref.data != nullptr;
  plan.passes.sums_an_edge = op.guard && op.old_logp != nullptr ? 3 : 1;
  const int64_t most = MOST_SUMS / plan.passes.sums_an_edge;
  const int64_t children = op.children.offsets != nullptr ? op.edges : op.children.fanout;
  plan.passes.edges_a_pass = static_cast<int>(children < 1 ? 1 : children < most ? children : most);
  const int sums = plan.passes.with_kl + plan.passes.edges_a_pass * plan.passes.sums_an_edge;
  plan.launch = {op.states.rows * plan.partition.parts, plan.partition.threads};
  plan.launch.shared_bytes = gathered_bytes(sums, plan.partition.threads);
  return plan;
}

// How many chunks of 8 elements the gradient needs of what a row's sums are made of. Rows have different numbers of
// children under offsets: this is the average, and what then does not fit is read again.
inline int64_t kept_at_best(const GRPOLoss& op, const GRPOPasses& passes) {
  if (op.grad_loss == nullptr) return 0;
  const int64_t rows = op.states.rows > 0 ? op.states.rows : 1;
  return passes.with_kl + (op.children.offsets != nullptr ? divide_up(op.edges, rows) : op.children.fanout);
}

// With clusters where they fit, with as much kept in shared memory as fits there or else nothing.
inline GRPOPlan plan_grpo_loss(const GRPOLoss& op) {
  GRPOPlan plan = plan_without_clusters(op);
  const int64_t wanted = kept_at_best(op, plan.passes);
  const size_t slot = plan.partition.part_elements * sizeof(float);
  const size_t head = plan.launch.shared_bytes + MOST_SLOPES * sizeof(Slope);
  const size_t room = most_shared_bytes() / LEAST_BLOCKS;
  const int64_t fitting = room > head && slot > 0 ? static_cast<int64_t>((room - head) / slot) : 0;
  for (const int64_t kept : {wanted < fitting ? wanted : fitting, int64_t{0}}) {
    // More than one only where the chunks of all parts fit.
    const int turns = wanted == 0 ? MOST_PARTS : static_cast<int>(kept < wanted ? 1 : fitting / wanted);
    const Partition shared = in_turns(plan.partition, op.states.rows, turns);
    Launch clustered = plan.launch;
    clustered.blocks = op.states.rows * shared.blocks;
    clustered.cluster = static_cast<int>(shared.blocks);
    clustered.shared_bytes = head + kept * slot * shared.turns;
    if (shared.parts > MOST_PARTS || !fits(plan.loss, clustered)) continue;
    plan.launch = clustered;
    plan.partition = shared;
    plan.passes.block_chunks = plan.passes.part_chunks * shared.turns;
    plan.passes.kept = static_cast<int>(kept);
    plan.clustered = true;
    break;
  }
  return plan;
}

inline cudaError_t launch_grpo_loss(const GRPOLoss& op, const GRPOPlan& plan, void* memory, cudaStream_t stream) {
  const GRPOScratch scratch = plan.scratch(op, memory);
  const Launch a_row_each = {op.states.rows, FINISHING_THREADS};
  Launch once = {1, THREADS, 1, THREADS / WARP * sizeof(double)};
  once.early = plan.clustered;
  cudaError_t error = launch(plan.loss, plan.launch, stream, op, plan.partition, plan.passes, scratch);
  if (error == cudaSuccess && !plan.clustered) {
    error = launch(grpo_score_kernel, a_row_each, stream, op, plan.partition.parts, plan.passes, scratch);
    if (error == cudaSuccess && op.grad_loss != nullptr) {
      Launch gradient = {plan.launch.blocks, plan.launch.threads};
      error = launch(plan.gradient, gradient, stream, op, plan.partition, plan.passes, scratch);
    }
  }
  if (error != cudaSuccess) return error;
  return launch(grpo_total_kernel, once, stream, scratch.losses, op.edges, op.loss);
}

}  // namespace flowgrove::cuda
