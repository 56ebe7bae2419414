// The clipped GRPO loss of every edge and its gradient. The blocks of a cluster compute the parts of a row, one or
// several each, and keep what the gradient needs in shared memory while the sums meet, so that each input is read once;
// what does not fit there is read again. Rows of too many parts, and GPUs without clusters, read everything twice:
// sums, then scores, then gradients.
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
  int part_chunks, block_chunks;   // of one part and of all that a block computes
  int kept;  // chunks in shared memory, of v − v_ref and of each edge in turn, per 8 elements that a block computes
};

// Device memory, for the parts and edges that do not meet in shared memory.
struct GRPOScratch {
  double *partials, *drifts;  // [E, sums_an_edge, parts] and [B, parts]; no partials: a cluster adds up the parts
  Slope* slopes;              // [E]
  float* losses;              // [E]
};

// ---- what is kept between sums and gradient: each thread reads back only what it wrote ----

DEVICE Slope* shared_slopes(const GRPOPasses& passes) {
  return reinterpret_cast<Slope*>(
      thread_sums() + (passes.with_kl + passes.edges_a_pass * passes.sums_an_edge) * threads());
}

// The halves of a chunk lie apart, so that a warp's accesses meet every bank once.
DEVICE float4* kept_chunk(const GRPOPasses& passes, int slot, const Part& part, int start) {
  const int number = part.turn * passes.part_chunks + start / WIDTH;
  return reinterpret_cast<float4*>(shared_slopes(passes) + MOST_SLOPES) + 2 * slot * passes.block_chunks + number;
}

DEVICE void keep(const Octet& octet, const GRPOPasses& passes, int slot, const Part& part, int start) {
  float4* to = kept_chunk(passes, slot, part, start);
  to[0] = make_float4(octet.at[0], octet.at[1], octet.at[2], octet.at[3]);
  to[passes.block_chunks] = make_float4(octet.at[4], octet.at[5], octet.at[6], octet.at[7]);
}

DEVICE Octet kept(const GRPOPasses& passes, int slot, const Part& part, int start) {
  const float4* from = kept_chunk(passes, slot, part, start);
  const float4 low = from[0], high = from[passes.block_chunks];
  return {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
}

// ---- sums ----

template <bool WHOLE>
DEVICE Octet drift_chunk(const GRPOLoss& op, const Octet& velocity, int64_t row, Chunk<WHOLE> chunk) {
  return residual(velocity, widen(read(op.v_ref, row, chunk), op.v_ref.kind));
}

// Adds up the elements of `count` children of a row, the first of which is its child number `child`.
template <typename L, bool GUARD>
DEVICE void add_up(
    const GRPOLoss& op, const GRPOPasses& passes, const Part& part, const MeanCoefficients& coef, int64_t first_edge,
    int child, int count) {
  const int first_slot = child < passes.kept ? passes.with_kl + child : passes.kept;
  Octet mean;
  const auto on_chunk = [&](auto chunk, int start, const Loaded& loaded) {
    mean = mean_chunk(op.states, coef, part.row, chunk, loaded);
    if (!passes.with_kl || child > 0) return;
    const Octet drift = drift_chunk(op, loaded.velocity, part.row, chunk);
    add_to_sum(0, drift, drift);
    if (passes.kept > 0) keep(drift, passes, 0, part, start);
  };
  const auto on_edge = [&](auto chunk, int start, int c, const Octet& x_next) {
    const int sum = passes.with_kl + c * passes.sums_an_edge;
    const bool room = first_slot + c < passes.kept;
    const Octet r = residual(x_next, mean);
    add_to_sum(sum, r, r);
    if constexpr (!GUARD) {
      if (room) keep(r, passes, first_slot + c, part, start);
    } else {
      const Octet z = noise_chunk(op.noise, gathered().noise[c], first_edge + child + c, chunk);
      if (room) keep(z, passes, first_slot + c, part, start);
      if (passes.sums_an_edge == 1) return;
      add_to_sum(sum + 1, z, z);
      add_to_sum(sum + 2, z, r);
    }
  };
  walk<L, true>(op.states, part, op.x_next, first_edge + child, count, on_chunk, on_edge, Nothing{});
}

// total(k) is sum k of the edge over all parts, in every lane of the warp that calls this.
template <typename Total>
DEVICE EdgeScore score_sums(
    const GRPOLoss& op, int64_t row, int64_t edge, const GRPOPasses& passes, double drift, Total total) {
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

// Of the first `children` of a row, which were all kept.
DEVICE void accumulate_kept(
    Octet& gradient, const GRPOPasses& passes, const Slope* slopes, int64_t children, const Part& part, int start) {
#pragma unroll 1
  for (int child = 0; child < children; ++child) {
    accumulate(gradient, slopes[child].push, kept(passes, passes.with_kl + child, part, start));
  }
}

template <typename L, bool GUARD>
DEVICE void write_gradients(
    const GRPOLoss& op, const GRPOPasses& passes, const Part& part, const MeanCoefficients& coef, const Family& family,
    const Slope* slopes) {
  float pull = 0.0f;
#pragma unroll 1
  for (int64_t child = 0; child < family.count; ++child) pull = add(pull, slopes[child].pull);
  const int64_t room = passes.kept > passes.with_kl ? passes.kept - passes.with_kl : 0;
  const int64_t there = room < family.count ? room : family.count;
  const bool with_kl = passes.with_kl && family.count > 0;  // without children nothing was kept
  const bool drift_again = with_kl && passes.kept == 0;
  if (there == family.count && !drift_again) {
#pragma unroll 1
    for (int start = first_start(); start < part.count; start += stride()) {
      Octet gradient = {};
      if (with_kl) accumulate(gradient, pull, kept(passes, 0, part, start));
      accumulate_kept(gradient, passes, slopes, there, part, start);
      write_gradient(gradient, op.states, op.grad_v, op.grad_v_uncond, part.row, chunk_of<L::WHOLE>(part, start));
    }
    return;
  }
  Octet mean, gradient;
  const auto on_chunk = [&](auto chunk, int start, const Loaded& loaded) {
    gradient = {};
    if (with_kl) {
      const Octet& velocity = loaded.velocity;
      accumulate(
          gradient, pull,
          drift_again ? drift_chunk(op, velocity, part.row, chunk) : kept(passes, 0, part, start));
    }
    accumulate_kept(gradient, passes, slopes, there, part, start);
    if constexpr (!GUARD) mean = mean_chunk(op.states, coef, part.row, chunk, loaded);
  };
  const auto on_edge = [&](auto chunk, int, int c, const Octet& x_next) {
    const int64_t child = there + c;
    if constexpr (GUARD) {
      const bool named = op.noise.key.data != nullptr;
      const EdgeNoise name = named ? edge_noise(op.noise.key, family.first + child) : EdgeNoise{};
      accumulate(gradient, slopes[child].push, noise_chunk(op.noise, name, family.first + child, chunk));
    } else {
      accumulate(gradient, slopes[child].push, residual(x_next, mean));
    }
  };
  const auto after = [&](auto chunk, int) {
    write_gradient(gradient, op.states, op.grad_v, op.grad_v_uncond, part.row, chunk);
  };
  walk<L, !GUARD>(
      op.states, part, op.x_next, family.first + there, static_cast<int>(family.count - there), on_chunk, on_edge,
      after);
}

// ---- kernels ----

template <typename L, bool GUARD>
__global__ void __launch_bounds__(THREADS, GUARD ? 2 : BLOCKS_PER_SM<L>) grpo_loss_kernel(
    const __grid_constant__ GRPOLoss op, const __grid_constant__ Partition partition,
    const __grid_constant__ GRPOPasses passes, const __grid_constant__ GRPOScratch scratch) {
  const bool clustered = scratch.partials == nullptr;
  begin_cluster(clustered);
  let_next_launch_begin();
  const Share share = share_of(partition);
  const Family family = family_of(op.children, op.states.rows, op.edges, share.row);
  const MeanCoefficients coef = mean_coefficients(op.states, share.row);
  // Then every block of a row writes the same there.
  Slope* slopes = family.count <= MOST_SLOPES ? shared_slopes(passes) : scratch.slopes + family.first;
  const int with_kl = passes.with_kl;
  int pass = 0;
  for (int child = 0; child < family.count; child += passes.edges_a_pass, ++pass) {
    const int count = static_cast<int>(
        family.count - child < passes.edges_a_pass ? family.count - child : passes.edges_a_pass);
    const int64_t first = family.first + child;
    const int first_sum = with_kl && child > 0, sums = with_kl + count * passes.sums_an_edge;
    if constexpr (GUARD) name_edges(op.noise, first, count);
    auto& parts = gathered().parts[pass % 2];
#pragma unroll 1
    for (int index = share.first; index < share.end; ++index) {
      const Part part = part_of(partition, share, index);
      begin_pass(sums);
      add_up<L, GUARD>(op, passes, part, coef, family.first, child, count);
      if (clustered && pass == 0 && part.turn == 0) cluster_wait();
      fold_sums(first_sum, sums, [&](int k, double total) {
        if (clustered) {
          double* to = k < with_kl ? gathered().drifts : parts[k - with_kl];
          if (lane() < partition.blocks) *of_block(to + part.index, lane()) = total;
        } else if (lane() == 0) {
          double* to = k < with_kl ? scratch.drifts + share.row * partition.parts
                                   : scratch.partials + (first * passes.sums_an_edge + k - with_kl) * partition.parts;
          to[part.index] = total;
        }
      });
    }
    if (!clustered) continue;
    cluster_arrive();
    cluster_wait();
#pragma unroll 1
    for (int c = warp(); c < count; c += warps()) {
      const double drift = with_kl ? shared_total(gathered().drifts, partition.parts) : 0.0;
      const auto total = [&](int k) { return shared_total(parts[c * passes.sums_an_edge + k], partition.parts); };
      const EdgeScore score = score_sums(op, share.row, first + c, passes, drift, total);
      if (lane() != 0) continue;
      slopes[child + c] = {score.push, score.pull};
      if (share.rank == 0) write_score(op, first + c, score, scratch.losses);
    }
  }
  if (!clustered) return;
  end_cluster(clustered, pass);
  __syncthreads();
  if (op.grad_loss == nullptr) return;
#pragma unroll 1
  for (int index = share.first; index < share.end; ++index) {
    write_gradients<L, GUARD>(op, passes, part_of(partition, share, index), coef, family, slopes);
  }
}

// One block a row, one warp an edge.
static __global__ void __launch_bounds__(FINISHING_THREADS) grpo_score_kernel(
    const __grid_constant__ GRPOLoss op, int64_t parts, const __grid_constant__ GRPOPasses passes,
    const __grid_constant__ GRPOScratch scratch) {
  const int64_t row = blockIdx.x, end = first_child(op.children, row + 1);
  for (int64_t edge = first_child(op.children, row) + warp(); edge < end; edge += warps()) {
    const double drift = passes.with_kl ? partials_total(scratch.drifts + row * parts, parts) : 0.0;
    const auto total = [&](int k) {
      return partials_total(scratch.partials + (edge * passes.sums_an_edge + k) * parts, parts);
    };
    const EdgeScore score = score_sums(op, row, edge, passes, drift, total);
    if (lane() != 0) continue;
    scratch.slopes[edge] = {score.push, score.pull};
    write_score(op, edge, score, scratch.losses);
  }
}

template <typename L, bool GUARD>
__global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM<L>) grpo_gradient_kernel(
    const __grid_constant__ GRPOLoss op, const __grid_constant__ Partition partition,
    const __grid_constant__ GRPOPasses passes, const __grid_constant__ GRPOScratch scratch) {
  const Part part = part_of(partition);
  const Family family = family_of(op.children, op.states.rows, op.edges, part.row);
  GRPOPasses nothing_kept = passes;
  nothing_kept.kept = 0;
  write_gradients<L, GUARD>(
      op, nothing_kept, part, mean_coefficients(op.states, part.row), family, scratch.slopes + family.first);
}

// The sum over all edges, in one block.
static __global__ void __launch_bounds__(THREADS) grpo_total_kernel(const float* losses, int64_t edges, float* loss) {
  double* sums = reinterpret_cast<double*>(shared_memory());  // [warps]
  wait_for_launch_before();
  double sum = 0.0;
  for (int64_t edge = threadIdx.x; edge < edges; edge += threads()) sum += losses[edge];
  sum = warp_sum(sum);
  if (lane() == 0) sums[warp()] = sum;
  __syncthreads();
  if (warp() > 0) return;
  sum = warp_sum(lane() < warps() ? sums[lane()] : 0.0);
  if (lane() == 0) *loss = static_cast<float>(sum);
}

}  // namespace flowgrove::cuda
