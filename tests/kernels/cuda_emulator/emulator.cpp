// The scheduler behind cuda_runtime.h: fibers of one block, run in a random order from one meeting point to the next.
#undef _FORTIFY_SOURCE  // refuses the long jumps from stack to stack

#include <csetjmp>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include <ucontext.h>

#include "cuda_pipeline_primitives.h"
#include "cuda_runtime.h"

namespace {

constexpr size_t kSharedBytes = 227 * 1024, kSharedBytesWithoutAsking = 48 * 1024;
constexpr int kMultiprocessors = 2;
constexpr size_t kStackBytes = 64 * 1024, kArgumentBytes = 4096;
constexpr unsigned kWarp = 32, kMostThreads = 1024;
constexpr unsigned char kCanary = 0xA5;

}  // namespace

// NaN to the end of the block's own share, canaries behind it.
alignas(16) float shared_memory[kSharedBytes / sizeof(float) + 1024];

namespace {

enum class State { ready, at_barrier, at_exchange, done };

struct Copy {
  void* target;
  const void* source;
  size_t bytes;
};

// Entered once through its context; then jumps, which unlike swapcontext need no system call.
struct Fiber {
  ucontext_t context;
  jmp_buf resumption;
  bool entered;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  dim3 index;
  State state;
  const char* file;
  int line;
  uint32_t bits[2];  // of even and of odd exchanges: lanes are never two exchanges apart
  unsigned exchanges;
  std::vector<Copy> copies;  // that have not happened
};

jmp_buf scheduler;
std::vector<Fiber> fibers;
size_t current;
const std::function<void()>* body;
std::mt19937 random_order(0);
std::map<const void*, size_t> shared_bytes_asked;

[[noreturn]] void fail(const std::string& message) {
  std::fprintf(stderr, "CUDA emulator, block (%u, %u, %u): %s\n", blockIdx.x, blockIdx.y, blockIdx.z, message.c_str());
  std::abort();
}

std::string place(const Fiber& fiber) {
  const std::string thread = "thread (" + std::to_string(fiber.index.x) + ", " + std::to_string(fiber.index.y) + ") ";
  if (fiber.state == State::done) return thread + "has ended";
  return thread + "waits at " + fiber.file + ":" + std::to_string(fiber.line);
}

void enter() {
  (*body)();
  if (!fibers[current].copies.empty()) fail("a thread did not wait for its copies");
  fibers[current].state = State::done;
  _longjmp(scheduler, 1);
}

void wait(State state, const char* file, int line) {
  Fiber& own = fibers[current];
  own.state = state;
  own.file = file;
  own.line = line;
  if (_setjmp(own.resumption) == 0) _longjmp(scheduler, 1);
}

void resume(size_t fiber) {
  Fiber& next = fibers[fiber];
  current = fiber;
  threadIdx = next.index;
  if (_setjmp(scheduler) != 0) return;
  if (next.entered) _longjmp(next.resumption, 1);
  next.entered = true;
  setcontext(&next.context);
}

// Let the fibers from `first` to `last` go on if they all wait at one place; false if none waits in this way.
bool release(size_t first, size_t last, State waiting) {
  size_t representative = first;
  while (representative < last && fibers[representative].state != waiting) ++representative;
  if (representative == last) return false;
  const Fiber& one = fibers[representative];
  for (size_t i = first; i < last; ++i) {
    if (fibers[i].state != waiting || fibers[i].line != one.line || fibers[i].file != one.file) {
      fail("divergence: " + place(one) + ", but " + place(fibers[i]));
    }
  }
  for (size_t i = first; i < last; ++i) fibers[i].state = State::ready;
  return true;
}

bool release_warps() {
  bool any = false;
  for (size_t first = 0; first < fibers.size(); first += kWarp) {
    any |= release(first, std::min(first + kWarp, fibers.size()), State::at_exchange);
  }
  return any;
}

void run_block(size_t shared_bytes) {
  auto* memory = reinterpret_cast<unsigned char*>(shared_memory);
  std::memset(memory, 0xFF, shared_bytes);
  std::memset(memory + shared_bytes, kCanary, sizeof shared_memory - shared_bytes);
  for (Fiber& fiber : fibers) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    fiber.entered = false;
    fiber.exchanges = 0;
    fiber.copies.clear();
    fiber.state = State::ready;
    makecontext(&fiber.context, enter, 0);
  }
  std::vector<size_t> order(fibers.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  do {
    std::shuffle(order.begin(), order.end(), random_order);
    for (const size_t i : order) {
      if (fibers[i].state == State::ready) resume(i);
    }
  } while (release_warps() || release(0, fibers.size(), State::at_barrier));
  for (size_t i = shared_bytes; i < sizeof shared_memory; ++i) {
    if (memory[i] != kCanary) fail("shared memory was written behind its end");
  }
}

}  // namespace

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    default:
      return "invalid configuration argument";
  }
}

cudaError_t cudaGetLastError() { return cudaSuccess; }

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? kMultiprocessors : static_cast<int>(kSharedBytes);
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
  if (static_cast<size_t>(value) > kSharedBytes) return cudaErrorInvalidValue;
  shared_bytes_asked[kernel] = value;
  return cudaSuccess;
}

namespace cuda_emulator {

cudaError_t run(const cudaLaunchConfig_t& config, const void* kernel, size_t argument_bytes,
                const std::function<void()>& thread) {
  const dim3 &grid = config.gridDim, &block = config.blockDim;
  const size_t threads = static_cast<size_t>(block.x) * block.y * block.z;
  const size_t shared_limit = std::max(kSharedBytesWithoutAsking, shared_bytes_asked[kernel]);
  if (threads == 0 || threads > kMostThreads || grid.x == 0 || grid.x > INT32_MAX || grid.y == 0 || grid.y > 65535 ||
      grid.z == 0 || grid.z > 65535) {
    return cudaErrorInvalidConfiguration;
  }
  if (config.dynamicSmemBytes > shared_limit || argument_bytes > kArgumentBytes) return cudaErrorInvalidValue;

  gridDim = grid;
  blockDim = block;
  body = &thread;
  fibers.resize(threads);
  for (size_t i = 0; i < threads; ++i) {
    const auto x = static_cast<unsigned>(i);
    fibers[i].index = dim3(x % block.x, x / block.x % block.y, x / block.x / block.y);
  }
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = dim3(x, y, z);
        run_block(config.dynamicSmemBytes);
      }
    }
  }
  return cudaSuccess;
}

void wait_for_block(const char* file, int line) { wait(State::at_barrier, file, line); }

uint32_t exchange(uint32_t bits, int source, const char* file, int line) {
  const size_t own = current, partner = own / kWarp * kWarp + source;
  if (partner >= fibers.size()) fail("a shuffle reads a lane that does not exist");
  const unsigned parity = fibers[own].exchanges++ % 2;
  fibers[own].bits[parity] = bits;
  wait(State::at_exchange, file, line);
  return fibers[partner].bits[parity];
}

int lane() { return static_cast<int>(current % kWarp); }

void copy_later(void* target, const void* source, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(target) % bytes || reinterpret_cast<uintptr_t>(source) % bytes) {
    fail("an asynchronous copy is not aligned");
  }
  std::memset(target, 0xFF, bytes);
  fibers[current].copies.push_back({target, source, bytes});
}

void finish_copies() {
  for (const Copy& copy : fibers[current].copies) std::memcpy(copy.target, copy.source, copy.bytes);
  fibers[current].copies.clear();
}

}  // namespace cuda_emulator
