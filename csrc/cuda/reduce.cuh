// Sums over the elements of an edge: fp32 in a thread (at most 32 elements), double across threads and
// parts, in an order that D alone fixes.
//
// A block adds up its part. The parts of a row are added by the blocks of a cluster, each of which writes its own into
// the shared memory of those that need it; or, where a row has too many parts or the GPU no clusters, by a second
// kernel that finds them in device memory ("partials"). The additions are the same, so the bits are.
#pragma once

#include "cuda/noise.cuh"
#include "cuda/states.cuh"

namespace flowgrove::cuda {

constexpr int MOST_SUMS = 12;  // that a block gathers in one pass over its elements; edges beyond take further passes

// The head of a block's shared memory. What its threads have added up follows: float [sums][threads].
struct alignas(16) Gathered {
  // What each part added up; two, because a pass may be written while one is still read.
  double parts[2][MOST_SUMS][MOST_PARTS];
  double drifts[MOST_PARTS];                       // grpo_loss: Σ (v − v_ref)² of each part
  double of_warps[MOST_SUMS + 1][THREADS / WARP];  // what each warp added up
  EdgeNoise noise[MOST_SUMS];
};

DEVICE Gathered& gathered() {
  return *reinterpret_cast<Gathered*>(shared_memory());
}

DEVICE float* thread_sums() {
  return reinterpret_cast<float*>(&gathered() + 1);
}

// ---- in a thread ----

// Before begin_pass: checks what names the noise of edges first … first + count − 1
// and puts it where all threads find it.
DEVICE void name_edges(const Noise& noise, int64_t first, int count) {
  if (noise.key.data == nullptr) return;
  for (int c = threadIdx.x; c < count; c += threads()) {
    require_words<require>(noise.key, first + c, noise.root_rho > 0.0f);
    gathered().noise[c] = edge_noise(noise.key, first + c);
  }
}

// The barrier ends the pass before: its sums have been read, its names are no longer needed.
DEVICE void begin_pass(int sums) {
  __syncthreads();
#pragma unroll 1
  for (int k = 0; k < sums; ++k) thread_sums()[k * threads() + threadIdx.x] = 0.0f;
}

DEVICE void add_to_sum(int k, const Octet& a, const Octet& b) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < WIDTH; ++i) sum = flowgrove::fma(a.at[i], b.at[i], sum);
  float& own = thread_sums()[k * threads() + threadIdx.x];
  own = add(own, sum);
}

// ---- across threads ----

// Adds up sums first … end − 1 of all threads, and calls to(k, total) in every lane of some warp.
template <typename To>
DEVICE void fold_sums(int first, int end, To to) {
#pragma unroll 1
  for (int k = first; k < end; ++k) {
    const double sum = warp_sum(thread_sums()[k * threads() + threadIdx.x]);
    if (lane() == 0) gathered().of_warps[k][warp()] = sum;
  }
  __syncthreads();
#pragma unroll 1
  for (int k = first + warp(); k < end; k += warps()) {
    to(k, warp_sum(lane() < warps() ? gathered().of_warps[k][lane()] : 0.0));
  }
}

// ---- across parts: one warp a sum; get(part) finds what a part added up ----

template <typename Get>
DEVICE double over_parts(int64_t parts, Get get) {
  double sum = 0.0;
#pragma unroll 1
  for (int64_t part = lane(); part < parts; part += WARP) sum += get(part);
  return warp_sum(sum);
}

DEVICE double shared_total(const double* parts_of_sum, int64_t parts) {
  return over_parts(parts, [&](int64_t part) { return parts_of_sum[part]; });
}

DEVICE double partials_total(const double* partials, int64_t parts) {
  return over_parts(parts, [&](int64_t part) { return partials[part]; });
}

// ---- logp of the edges of a row ----

// A cluster meets once per pass, and once before the first: no block may write into another that has not begun. Between
// begin_cluster and the wait in the first pass a block works on its own.
DEVICE void begin_cluster(bool clustered) {
  if (clustered) cluster_arrive_first();
}

DEVICE void end_cluster(bool clustered, int passes) {
  if (clustered && passes == 0) cluster_wait();
}

// Ends a part of a pass of flow_step or flow_logprob: its elements of edges first … first + count − 1
// have been added to sums 0 … count − 1.
DEVICE void note_squares(
    const Partition& partition, const Part& part, int64_t first, int count, int pass, double* partials) {
  if (partials != nullptr) {
    fold_sums(0, count, [&](int k, double total) {
      if (lane() == 0) partials[(first + k) * partition.parts + part.index] = total;
    });
    return;
  }
  if (pass == 0 && part.turn == 0) cluster_wait();
  fold_sums(0, count, [&](int k, double total) {
    if (lane() == 0) *of_block(&gathered().parts[pass % 2][k][part.index], 0) = total;
  });
}

// Ends a pass, all of whose parts have been noted.
DEVICE void finish_squares(
    const Partition& partition, const Share& share, int64_t first, int count, int pass, double* partials,
    const float* log_norm, const float* precision, float* logp) {
  if (partials != nullptr) return;
  cluster_arrive();
  cluster_wait();
  if (share.rank != 0) return;
#pragma unroll 1
  for (int k = warp(); k < count; k += warps()) {
    const double total = shared_total(gathered().parts[pass % 2][k], partition.parts);
    if (lane() == 0) {
      logp[first + k] = log_probability(log_norm[share.row], precision[share.row], mean_of(total, partition.elements));
    }
  }
}

constexpr int FINISHING_THREADS = 128;

// logp from partials: one block a row, one warp an edge.
static __global__ void __launch_bounds__(FINISHING_THREADS)
logp_kernel(
    Children children, int64_t parts, int64_t elements, const double* partials, const float* log_norm,
    const float* precision, float* logp) {
  const int64_t row = blockIdx.x, end = first_child(children, row + 1);
  for (int64_t edge = first_child(children, row) + warp(); edge < end; edge += warps()) {
    const double total = partials_total(partials + edge * parts, parts);
    if (lane() == 0) logp[edge] = log_probability(log_norm[row], precision[row], mean_of(total, elements));
  }
}

}  // namespace flowgrove::cuda
