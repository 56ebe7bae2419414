// A GPU of one cluster: its threads are fibers that run until they have to wait.
#include "emulator.h"

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include <torch/csrc/stable/c/shim.h>

dim3 threadIdx, blockIdx, blockDim;

namespace emulated {

constexpr int WARP = 32;
constexpr size_t STACK = 64 * 1024;

// All of `size` threads meet here; then generation grows.
struct Barrier {
  int size = 0, arrived = 0;
  uint64_t generation = 0;

  uint64_t arrive() {
    const uint64_t mine = generation;
    if (++arrived == size) {
      arrived = 0;
      ++generation;
    }
    return mine;
  }
};

struct Warp {
  Barrier barrier;
  double values[2][WARP];  // of two shuffles in a row: a thread may begin the second while others still read the first
};

struct Block {
  Barrier barrier;
  std::unique_ptr<char[]> shared;
  std::vector<Warp> warps;
  unsigned running;  // threads that have not left
};

struct Fiber {
  unsigned thread, block_index;
  Block* block;
  jmp_buf here;
  uint64_t cluster_generation;
  const Barrier* waits_for = nullptr;
  uint64_t waits_beyond = 0;
  bool started = false, finished = false;

  bool ready() const { return !finished && (waits_for == nullptr || waits_for->generation > waits_beyond); }
};

struct Device {
  int major, shared_bytes, most_cluster, multiprocessors;
  bool operator==(const Device&) const = default;
};

// In turn; block after block at random, each warp as far as it can; all at random.
enum Order { FAIR, GREEDY, SHUFFLED };

static std::vector<Device> devices = {{9, 232448, 16, 132}};
static int current_device = 0;
static Order order = FAIR;
static int64_t launches = 0;
static std::map<std::pair<const void*, int>, int> attributes[2];

static std::vector<Block> blocks;
static Barrier cluster;
static size_t shared_bytes = 0;
static Fiber* self = nullptr;
static jmp_buf scheduler;
static const std::function<void()>* program = nullptr;
static std::string last_line;
static int64_t lines = 0;         // printed in all launches
static bool broken = false;       // a rule of the emulator, unlike a trap, ends the launch at once
static int compiled_for = 90;      // the compute capability, times ten, that kernels say they were compiled for
static int until_unanswered = 0;  // questions to the runtime up to the one that fails; 0: none does
static cudaError_t last_error = cudaSuccess;
static thread_local std::string failure;  // of the last launch from this thread of the program; launches take turns

// ---- what a thread sees ----

static void wait(const Barrier& barrier, uint64_t generation) {
  if (barrier.generation > generation) return;
  self->waits_for = &barrier;
  self->waits_beyond = generation;
  if (_setjmp(self->here) == 0) _longjmp(scheduler, 1);
  self->waits_for = nullptr;
}

char* shared_memory() {
  return self->block->shared.get();
}

double shuffle_xor(double value, int mask) {
  Warp& warp = self->block->warps[threadIdx.x / WARP];
  const int lane = static_cast<int>(threadIdx.x % WARP);
  double* values = warp.values[warp.barrier.generation % 2];
  values[lane] = value;
  wait(warp.barrier, warp.barrier.arrive());
  return values[lane ^ mask];
}

void block_barrier() {
  wait(self->block->barrier, self->block->barrier.arrive());
}

void cluster_arrive() {
  self->cluster_generation = cluster.arrive();
}

void cluster_wait() {
  wait(cluster, self->cluster_generation);
}

void* of_block(void* own, unsigned rank) {
  require(rank < blocks.size(), "shared memory of a block outside the cluster");
  return blocks[rank].shared.get() + (static_cast<char*>(own) - shared_memory());
}

void print(const char* line) {
  last_line = line;
  ++lines;
}

// Other threads do not stop at once: they may go on until they wait, and print and trap themselves.
void trap() {
  failure = last_line.empty() ? "a trap without a line" : last_line;
  self->finished = true;
  _longjmp(scheduler, 1);
}

void require(bool fine, const char* message) {
  if (fine) return;
  failure = message;
  broken = true;
  _longjmp(scheduler, 1);
}

// ---- running a cluster ----

static void forget_shared_memory(Block& block) {
  memset(block.shared.get(), 0xFF, shared_bytes);
}

static void enter() {
  (*program)();
  self->finished = true;
  if (--self->block->running == 0) forget_shared_memory(*self->block);
  _longjmp(scheduler, 1);
}

static char* stacks(size_t count) {
  static char* memory = nullptr;
  static size_t room = 0;
  if (count > room) {
    if (memory != nullptr) munmap(memory, room * STACK);
    memory = static_cast<char*>(
        mmap(nullptr, count * STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    room = count;
  }
  return memory;
}

static void resume(Fiber& fiber, char* stack) {
  self = &fiber;
  threadIdx.x = fiber.thread;
  blockIdx.x = fiber.block_index;
  if (_setjmp(scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.here, 1);
  fiber.started = true;
  ucontext_t start;
  getcontext(&start);
  start.uc_stack.ss_sp = stack;
  start.uc_stack.ss_size = STACK;
  start.uc_link = nullptr;
  makecontext(&start, enter, 0);
  setcontext(&start);
}

static void run_cluster(unsigned first_block, unsigned count, unsigned threads) {
  blockDim.x = threads;
  blocks.clear();
  blocks.resize(count);
  cluster = {static_cast<int>(count * threads)};
  std::vector<Fiber> fibers(count * threads);
  for (unsigned b = 0; b < count; ++b) {
    blocks[b].barrier.size = static_cast<int>(threads);
    blocks[b].shared = std::make_unique_for_overwrite<char[]>(shared_bytes);
    forget_shared_memory(blocks[b]);
    blocks[b].running = threads;
    blocks[b].warps.resize((threads + WARP - 1) / WARP);
    for (unsigned t = 0; t < threads; ++t) {
      Fiber& fiber = fibers[b * threads + t];
      fiber.block = &blocks[b];
      fiber.thread = t;
      fiber.block_index = first_block + b;
      ++blocks[b].warps[t / WARP].barrier.size;
    }
  }
  char* memory = stacks(fibers.size());
  std::vector<size_t> turns(fibers.size());
  std::iota(turns.begin(), turns.end(), 0);
  std::vector<unsigned> block_turns(count);
  std::iota(block_turns.begin(), block_turns.end(), 0);
  // Runs those of turns[first … end − 1] that can go on, once each.
  const auto run = [&](size_t first, size_t end) {
    bool moved = false;
    for (size_t i = first; i < end && !broken; ++i) {
      if (!fibers[turns[i]].ready()) continue;
      resume(fibers[turns[i]], memory + turns[i] * STACK);
      moved = true;
    }
    return moved && failure.empty();
  };
  static std::mt19937 random(0);
  for (bool moved = true; moved;) {
    if (order == SHUFFLED) std::shuffle(turns.begin(), turns.end(), random);
    if (order != GREEDY) {
      moved = run(0, turns.size());
      continue;
    }
    moved = false;
    std::shuffle(block_turns.begin(), block_turns.end(), random);
    for (const unsigned b : block_turns) {
      for (bool more = true; more;) {
        more = false;
        for (unsigned t = b * threads + threads; t > b * threads; t -= WARP) {
          while (run(t - WARP, t)) more = true;
        }
        moved |= more;
      }
    }
  }
  if (!failure.empty()) return;
  const bool stuck = std::any_of(fibers.begin(), fibers.end(), [](const Fiber& fiber) { return !fiber.finished; });
  if (stuck) failure = "deadlock: a thread waits for one that has left";
}

static int allowed(cudaFuncAttribute attribute, const void* kernel, int otherwise) {
  const auto found = attributes[attribute].find({kernel, current_device});
  return found == attributes[attribute].end() ? otherwise : found->second;
}

static unsigned cluster_size(const cudaLaunchConfig_t& config) {
  const bool clusters = config.numAttrs > 0 && config.attrs[0].id == cudaLaunchAttributeClusterDimension;
  return clusters ? config.attrs[0].val.clusterDim.x : 1;
}

static bool can_launch(const cudaLaunchConfig_t& config, const void* kernel) {
  const Device& device = devices[current_device];
  const unsigned size = cluster_size(config), threads = config.blockDim.x;
  const bool clusters_fit = size == 1 || (device.major >= 9 && size <= static_cast<unsigned>(device.most_cluster));
  const bool allowed_size = size <= 8 || allowed(cudaFuncAttributeNonPortableClusterSizeAllowed, kernel, 0) != 0;
  const size_t most = static_cast<size_t>(allowed(cudaFuncAttributeMaxDynamicSharedMemorySize, kernel, 48 * 1024));
  return clusters_fit && allowed_size && config.gridDim.x > 0 && config.gridDim.x % size == 0 && threads > 0 &&
         threads <= 1024 && threads % WARP == 0 && config.dynamicSmemBytes <= most;
}

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, const std::function<void()>& thread) {
  if (!can_launch(config, kernel)) {
    failure = "a launch that the device cannot run";
    return cudaErrorInvalidConfiguration;
  }
  static std::mutex turn;
  const std::lock_guard<std::mutex> lock(turn);
  ++launches;
  program = &thread;
  shared_bytes = config.dynamicSmemBytes;
  failure.clear();
  broken = false;
  last_line.clear();
  const unsigned size = cluster_size(config);
  for (unsigned block = 0; block < config.gridDim.x && failure.empty(); block += size) {
    run_cluster(block, size, config.blockDim.x);
  }
  return failure.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}

}  // namespace emulated

// ---- the runtime ----

static bool unanswered() {
  if (emulated::until_unanswered == 0 || --emulated::until_unanswered > 0) return false;
  emulated::last_error = cudaErrorNotReady;
  return true;
}

cudaError_t cudaGetDevice(int* device) {
  if (unanswered()) return cudaErrorNotReady;
  *device = emulated::current_device;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (unanswered()) return cudaErrorNotReady;
  const emulated::Device& found = emulated::devices[device];
  *value = attribute == cudaDevAttrComputeCapabilityMajor ? found.major
           : attribute == cudaDevAttrMultiProcessorCount  ? found.multiprocessors
                                                          : found.shared_bytes;
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (unanswered()) return cudaErrorNotReady;
  const emulated::Device& device = emulated::devices[emulated::current_device];
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize && value > device.shared_bytes) {
    return cudaErrorInvalidValue;
  }
  emulated::attributes[attribute][{kernel, emulated::current_device}] = value;
  return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  if (unanswered()) return cudaErrorNotReady;
  attributes->ptxVersion = emulated::compiled_for;
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void* kernel, const cudaLaunchConfig_t* config) {
  if (unanswered()) return cudaErrorNotReady;
  *clusters = emulated::can_launch(*config, kernel) ? 1 : 0;
  return cudaSuccess;
}

cudaError_t cudaGetLastError() {
  return std::exchange(emulated::last_error, cudaSuccess);
}

// ---- what the tests steer: see test_cuda_emulated.py ----

extern "C" void emulated_use_device(int major, int shared_bytes, int most_cluster, int multiprocessors) {
  const emulated::Device wanted = {major, shared_bytes, most_cluster, multiprocessors};
  const auto found = std::find(emulated::devices.begin(), emulated::devices.end(), wanted);
  emulated::current_device = static_cast<int>(found - emulated::devices.begin());
  if (found == emulated::devices.end()) emulated::devices.push_back(wanted);
}

// The compute capability, times ten, that kernels say they were compiled for.
extern "C" void emulated_compile_for(int capability) {
  emulated::compiled_for = capability;
}

extern "C" void emulated_use_order(int order) {
  emulated::order = static_cast<emulated::Order>(order);
}

extern "C" int64_t emulated_launches() {
  return emulated::launches;
}

extern "C" int64_t emulated_lines() {
  return emulated::lines;
}

// The question after `which` − 1 others is not answered; 0: all are.
extern "C" void emulated_leave_unanswered(int which) {
  emulated::until_unanswered = which;
}

extern "C" int emulated_last_error() {
  return emulated::last_error;
}

// ---- what torch exports only where it was built for CUDA, or does otherwise on a CPU ----

extern "C" {

AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}

AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  *guard = nullptr;
  return 0;
}

AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) {
  return 0;
}

AOTITorchError torch_c10_cuda_check_msg(int32_t error, const char*, const char*, uint32_t, bool, char** message) {
  *message = error == cudaSuccess ? nullptr : strdup(emulated::failure.c_str());
  return 0;
}

void torch_c10_cuda_free_error_msg(char* message) {
  free(message);
}
}
