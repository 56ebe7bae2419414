// The clipped GRPO loss of every edge and its gradient, each input read once: the blocks of a cluster compute the parts of a row and keep what the gradient
// needs in shared memory while the sums meet. Rows of too many parts, and GPUs without clusters, read twice: sums, then scores, then gradients.
#pragma once

#include "cuda/reduce.cuh"

namespace flowgrove::cuda {

// How an edge enters ∂loss/∂v: push·r (guard: push·z) + pull·(v − v_ref).
struct Slope {
  float push, pull;
};

constexpr int MOST_SLOPES = 64;  // of a row in shared memory; a row with more children uses device memory

struct GRPOPasses {
  int edges_a_pass, sums_an_edge;  // Σ r²; under guard Σ z² and Σ z·r too
  int with_kl;                     // 1: sum 0 and the first kept chunk are those of v − v_ref
  int part_chunks;
  int kept;                        // chunks that fit in shared memory, of v − v_ref and of each edge in turn, per 8 elements of a part
};

// Device memory, for the parts and edges that do not meet in shared memory.
struct GRPOScratch {
  double *partials, *drifts;  // [E, sums_an_edge, parts] and [B, parts]; no partials: a cluster adds up the parts
  Slope* slopes;              // [E]
  float* losses;              // [E]
};

// ---- what is kept between sums and gradient: each thread reads back only what it wrote ----

DEVICE Slope* shared_slopes(const GRPOPasses& passes) {
  return reinterpret_cast<Slope*>(thread_sums() + (passes.with_kl + passes.edges_a_pass * passes.sums_an_edge) * threads());
}

// The halves of a chunk lie apart, so that a warp's accesses meet every bank once.
DEVICE float4* kept_chunk(const GRPOPasses& passes, int slot, int start) {
  return reinterpret_cast<float4*>(shared_slopes(passes) + MOST_SLOPES) + 2 * slot * passes.part_chunks + start / WIDTH;
}

DEVICE void keep(const Octet& octet, const GRPOPasses& passes, int slot, int start) {
  float4* to = kept_chunk(passes, slot, start);
  to[0] = make_float4(octet.at[0], octet.at[1], octet.at[2], octet.at[3]);
  to[passes.part_chunks] = make_float4(octet.at[4], octet.at[5], octet.at[6], octet.at[7]);
}

DEVICE Octet kept(const GRPOPasses& passes, int slot, int start) {
  const float4* from = kept_chunk(passes, slot, start);
  const float4 low = from[0], high = from[passes.part_chunks];
  return {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
}

// ---- sums ----

template <bool WHOLE>
DEVICE Octet drift_chunk(const GRPOLoss& op, const Octet& velocity, int64_t row, Chunk<WHOLE> chunk) {
  return residual(velocity, widen(read(op.v_ref, row, chunk), op.v_ref.kind));
}

// Adds up the elements of `count` children of a row, the first of which is its child number `child`.
template <bool WHOLE>
DEVICE void add_up(
    const GRPOLoss& op, const GRPOPasses& passes, const Part& part, const MeanCoefficients& coef, int64_t first_edge, int child,
    int count) {
  const int first_slot = child < passes.kept ? passes.with_kl + static_cast<int>(child) : passes.kept;
#pragma unroll 1
  for (int start = first_start(); start < part.count; start += stride()) {
    const auto chunk = chunk_of<WHOLE>(part, start);
    const Loaded loaded = load(op.states, part.row, chunk);
    const Octet mean = mean_chunk(loaded, coef);
    if (passes.with_kl && child == 0) {
      const Octet drift = drift_chunk(op, loaded.velocity, part.row, chunk);
      add_to_sum(0, drift, drift);
      if (passes.kept > 0) keep(drift, passes, 0, start);
    }
#pragma unroll 1
    for (int c = 0; c < count; ++c) {
      const int64_t edge = first_edge + child + c;
      const int sum = passes.with_kl + c * passes.sums_an_edge;
      const Octet r = residual(read_state(op.x_next, edge, chunk), mean);
      add_to_sum(sum, r, r);
      if (!op.guard) {
        if (first_slot + c < passes.kept) keep(r, passes, first_slot + c, start);
        continue;
      }
      const Octet z = noise_chunk(op.noise, gathered().noise[c], edge, chunk);
      if (first_slot + c < passes.kept) keep(z, passes, first_slot + c, start);
      if (passes.sums_an_edge == 1) continue;
      add_to_sum(sum + 1, z, z);
      add_to_sum(sum + 2, z, r);
    }
  }
}

// total(k) is sum k of the edge over all parts, in every lane of the warp that calls this.
template <typename Total>
DEVICE EdgeScore score_sums(const GRPOLoss& op, int64_t row, int64_t edge, const GRPOPasses& passes, double drift, Total total) {
  EdgeSums sums;
  sums.drift = drift;
  sums.squares = total(0);
  if (passes.sums_an_edge == 3) {
    sums.noise_squares = total(1);
    sums.noise_residual = total(2);
  }
  return score_edge(op, row, edge, sums);
}

DEVICE void write_score(const GRPOLoss& op, int64_t edge, const EdgeScore& score, float* losses) {
  op.logp[edge] = score.logp;
  op.ratio[edge] = score.ratio;
  op.clipped[edge] = score.clipped;
  op.kl[edge] = score.kl;
  losses[edge] = score.loss;
}

// ---- gradient ----

// z (GUARD) or r of an edge for which there was no room.
template <bool GUARD, bool WHOLE>
DEVICE Octet direction_again(const GRPOLoss& op, const Octet& mean, int64_t edge, Chunk<WHOLE> chunk) {
  if constexpr (GUARD) {
    const EdgeNoise name = op.noise.key.data == nullptr ? EdgeNoise{} : edge_noise(op.noise.key, edge);
    return noise_chunk(op.noise, name, edge, chunk);
  } else {
    return residual(read_state(op.x_next, edge, chunk), mean);
  }
}

template <bool GUARD, bool WHOLE>
DEVICE void write_gradients_along(
    const GRPOLoss& op, const GRPOPasses& passes, const Part& part, const MeanCoefficients& coef, const Family& family, const Slope* slopes) {
  float pull = 0.0f;
#pragma unroll 1
  for (int64_t child = 0; child < family.count; ++child) pull = add(pull, slopes[child].pull);
  const int64_t room = passes.kept > passes.with_kl ? passes.kept - passes.with_kl : 0;
  const bool with_kl = passes.with_kl && family.count > 0;  // without children nothing was kept
  const bool drift_again = with_kl && passes.kept == 0, mean_again = !GUARD && family.count > room;
#pragma unroll 1
  for (int start = first_start(); start < part.count; start += stride()) {
    const auto chunk = chunk_of<WHOLE>(part, start);
    Octet gradient = {}, mean = {};
    if (drift_again || mean_again) {
      const Loaded loaded = load(op.states, part.row, chunk);
      if (drift_again) accumulate(gradient, pull, drift_chunk(op, loaded.velocity, part.row, chunk));
      mean = mean_chunk(loaded, coef);
    }
    if (with_kl && !drift_again) accumulate(gradient, pull, kept(passes, 0, start));
#pragma unroll 1
    for (int64_t child = 0; child < family.count; ++child) {
      const Octet direction = child < room ? kept(passes, passes.with_kl + static_cast<int>(child), start)
                                           : direction_again<GUARD>(op, mean, family.first + child, chunk);
      accumulate(gradient, slopes[child].push, direction);
    }
    write_gradient(gradient, op.states, op.grad_v, op.grad_v_uncond, part.row, chunk);
  }
}

template <bool WHOLE>
DEVICE void write_gradients(
    const GRPOLoss& op, const GRPOPasses& passes, const Part& part, const MeanCoefficients& coef, const Family& family, const Slope* slopes) {
  if (op.guard) {
    write_gradients_along<true, WHOLE>(op, passes, part, coef, family, slopes);
  } else {
    write_gradients_along<false, WHOLE>(op, passes, part, coef, family, slopes);
  }
}

// ---- kernels ----

template <bool WHOLE>
__global__ void __launch_bounds__(THREADS, blocks_per_sm(WHOLE)) grpo_loss_kernel(
    const __grid_constant__ GRPOLoss op, const __grid_constant__ Partition partition, const __grid_constant__ GRPOPasses passes,
    const __grid_constant__ GRPOScratch scratch) {
  const Part part = part_of(partition);
  const Family family = family_of(op.children, op.states.rows, op.edges, part.row);
  const MeanCoefficients coef = mean_coefficients(op.states, part.row);
  const bool clustered = scratch.partials == nullptr;
  Slope* slopes = family.count <= MOST_SLOPES ? shared_slopes(passes) : scratch.slopes + family.first;  // then every block of a row writes the same there
  int pass = 0;
  for (int child = 0; child < family.count; child += passes.edges_a_pass, ++pass) {
    const int count = static_cast<int>(family.count - child < passes.edges_a_pass ? family.count - child : passes.edges_a_pass);
    const int64_t first = family.first + child;
    const int with_kl = passes.with_kl, sums = with_kl + count * passes.sums_an_edge;
    name_edges(op.noise, first, count);
    begin_pass(sums);
    add_up<WHOLE>(op, passes, part, coef, family.first, child, count);
    double *totals = gathered().totals[pass % 2], *drift = clustered ? &gathered().drift : scratch.drifts + part.row * partition.parts + part.index;
    fold_sums(with_kl && child > 0, sums, [&](int k) {
      if (k < with_kl) return drift;
      return clustered ? totals + k - with_kl : scratch.partials + (first * passes.sums_an_edge + k - with_kl) * partition.parts + part.index;
    });
    if (!clustered) continue;
    cluster_arrive();
    cluster_wait();
#pragma unroll 1
    for (int c = warp(); c < count; c += warps()) {
      const double total_drift = with_kl ? cluster_total(gathered().drift, partition.parts) : 0.0;
      const auto total = [&](int k) { return cluster_total(totals[c * passes.sums_an_edge + k], partition.parts); };
      const EdgeScore score = score_sums(op, part.row, first + c, passes, total_drift, total);
      if (lane() != 0) continue;
      slopes[child + c] = {score.push, score.pull};
      if (part.index == 0) write_score(op, first + c, score, scratch.losses);
    }
  }
  if (!clustered) return;
  cluster_arrive();  // this block reads no more of the others' totals
  __syncthreads();
  if (op.grad_loss != nullptr) write_gradients<WHOLE>(op, passes, part, coef, family, slopes);
  cluster_wait();
}

// One block a row, one warp an edge.
static __global__ void __launch_bounds__(FINISHING_THREADS) grpo_score_kernel(
    const __grid_constant__ GRPOLoss op, int64_t parts, const __grid_constant__ GRPOPasses passes, const __grid_constant__ GRPOScratch scratch) {
  const int64_t row = blockIdx.x, end = first_child(op.children, row + 1);
  for (int64_t edge = first_child(op.children, row) + warp(); edge < end; edge += warps()) {
    const double drift = passes.with_kl ? partials_total(scratch.drifts + row * parts, parts) : 0.0;
    const auto total = [&](int k) { return partials_total(scratch.partials + (edge * passes.sums_an_edge + k) * parts, parts); };
    const EdgeScore score = score_sums(op, row, edge, passes, drift, total);
    if (lane() != 0) continue;
    scratch.slopes[edge] = {score.push, score.pull};
    write_score(op, edge, score, scratch.losses);
  }
}

template <bool WHOLE>
__global__ void __launch_bounds__(THREADS, blocks_per_sm(WHOLE)) grpo_gradient_kernel(
    const __grid_constant__ GRPOLoss op, const __grid_constant__ Partition partition, const __grid_constant__ GRPOPasses passes,
    const __grid_constant__ GRPOScratch scratch) {
  const Part part = part_of(partition);
  const Family family = family_of(op.children, op.states.rows, op.edges, part.row);
  GRPOPasses nothing_kept = passes;
  nothing_kept.kept = 0;
  write_gradients<WHOLE>(op, nothing_kept, part, mean_coefficients(op.states, part.row), family, scratch.slopes + family.first);
}

// The sum over all edges, in one block.
static __global__ void __launch_bounds__(THREADS) grpo_total_kernel(const float* losses, int64_t edges, float* loss) {
  double* sums = reinterpret_cast<double*>(shared_memory());  // [warps]
  double sum = 0.0;
  for (int64_t edge = threadIdx.x; edge < edges; edge += threads()) sum += losses[edge];
  sum = warp_sum(sum);
  if (lane() == 0) sums[warp()] = sum;
  __syncthreads();
  if (warp() > 0) return;
  sum = warp_sum(lane() < warps() ? sums[lane()] : 0.0);
  if (lane() == 0) *loss = static_cast<float>(sum);
}


// ---- launch ----

struct GRPOPlan {
  bool whole;
  Partition partition;
  GRPOPasses passes;
  Launch launch;
  bool clustered;

  int64_t partials(const GRPOLoss& op) const { return clustered ? 0 : op.edges * passes.sums_an_edge * partition.parts; }
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

inline GRPOPlan plan_grpo_loss(const GRPOLoss& op) {
  const bool by_offsets = op.children.offsets != nullptr, with_kl = op.v_ref.data != nullptr;
  const int64_t rows = op.states.rows > 0 ? op.states.rows : 1;
  GRPOPlan plan = {};
  plan.whole = whole(op.states, op.x_next, op.noise.given, op.v_ref, op.grad_v, op.grad_v_uncond);
  plan.partition = partition_of(op.states.elements);
  plan.passes.part_chunks = static_cast<int>(plan.partition.part_elements / WIDTH);
  plan.passes.with_kl = with_kl;
  plan.passes.sums_an_edge = op.guard && op.old_logp != nullptr ? 3 : 1;
  const int64_t most = MOST_SUMS / plan.passes.sums_an_edge, children = by_offsets ? op.edges : op.children.fanout;
  plan.passes.edges_a_pass = static_cast<int>(children < 1 ? 1 : children < most ? children : most);
  plan.launch = {op.states.rows * plan.partition.parts, plan.partition.threads};
  const size_t sums = gathered_bytes(with_kl + plan.passes.edges_a_pass * plan.passes.sums_an_edge, plan.partition.threads);
  plan.launch.shared_bytes = sums;
  // Rows have different numbers of children under offsets: room for the average, and what does not fit is read again.
  const int64_t wanted = op.grad_loss == nullptr ? 0 : with_kl + (by_offsets ? divide_up(op.edges, rows) : op.children.fanout);
  const size_t slot = plan.partition.part_elements * sizeof(float), head = sums + MOST_SLOPES * sizeof(Slope), room = most_shared_bytes();
  const int64_t fitting = room > head && slot > 0 ? static_cast<int64_t>((room - head) / slot) : 0;
  const auto kernel = plan.whole ? grpo_loss_kernel<true> : grpo_loss_kernel<false>;
  for (const int64_t kept : {wanted < fitting ? wanted : fitting, int64_t{0}}) {
    Launch clustered = plan.launch;
    clustered.cluster = static_cast<int>(plan.partition.parts);
    clustered.shared_bytes = head + kept * slot;
    if (plan.partition.parts > MOST_PARTS || !fits(kernel, clustered)) continue;
    plan.launch = clustered;
    plan.passes.kept = static_cast<int>(kept);
    plan.clustered = true;
    break;
  }
  return plan;
}

inline cudaError_t launch_grpo_loss(const GRPOLoss& op, const GRPOPlan& plan, void* memory, cudaStream_t stream) {
  const GRPOScratch scratch = plan.scratch(op, memory);
  const Launch a_row_each = {op.states.rows, FINISHING_THREADS}, once = {1, THREADS, 1, THREADS / WARP * sizeof(double)};
  cudaError_t error = launch(plan.whole ? grpo_loss_kernel<true> : grpo_loss_kernel<false>, plan.launch, stream, op, plan.partition, plan.passes, scratch);
  if (error == cudaSuccess && !plan.clustered) {
    error = launch(grpo_score_kernel, a_row_each, stream, op, plan.partition.parts, plan.passes, scratch);
    if (error == cudaSuccess && op.grad_loss != nullptr) {
      Launch gradient = {plan.launch.blocks, plan.launch.threads};
      error = launch(plan.whole ? grpo_gradient_kernel<true> : grpo_gradient_kernel<false>, gradient, stream, op, plan.partition, plan.passes, scratch);
    }
  }
  if (error != cudaSuccess) return error;
  return launch(grpo_total_kernel, once, stream, scratch.losses, op.edges, op.loss);
}

}  // namespace flowgrove::cuda
