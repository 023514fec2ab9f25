// What the parts of the emulation share: the running block, its fibers, and how an error is told.
#pragma once
#include "cuda_on_cpu.h"

namespace cuda_on_cpu {

enum class Order { kForward, kReverse, kRandom, kWarpPriority };

struct Config {
  Order order = Order::kForward;
  unsigned seed = 0;
  bool late_copies = true;  // cp.async lands when it is waited for, or at once
  bool races = false;
  size_t shared_limit = 227 * 1024;  // bytes that a block may ask for
  bool costs = false;
};
extern Config config;

// What the race detector needs to know of time and place.
struct Block {
  unsigned char* shared = nullptr;
  size_t shared_bytes = 0;
  uint32_t number = 0;  // counts blocks over all launches
  uint32_t first_of_launch = 0;
  uint32_t interval = 0;       // counts __syncthreads over all blocks
  uint32_t warp_interval[32];  // counts __syncwarp
};
extern Block block;

void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));
bool on_fiber_stack(const void* address);  // of the running thread
// Stands for the place in the kernel that the running thread is at, by the calls that led there: one function
// called from two places is two. Everything is compiled with frame pointers for it.
const void* call_path();

// runtime.cpp: whether a kernel may be launched so; fails where it may not.
bool may_launch(dim3 grid, dim3 block, size_t shared_bytes, const void* kernel);

void races_begin_launch();
int races_found();

// What is counted of each launch, in the order of costs.py's COUNTERS. Bytes are those of global memory.
enum class Cost {
  kRead,
  kWritten,
  kCopied,  // by cp.async
  kMma,     // this and the next three: once for each warp
  kLdmatrix,
  kShuffles,
  kVotes,
  kPhilox,        // for each thread
  kBarriers,      // __syncthreads, once for each block
  kWarpBarriers,  // __syncwarp, once for each warp
  kLongestLoop,
  kCount
};

// cost.cpp; all of it does nothing where costs are not counted.
void costs_begin_launch(const void* kernel, int64_t blocks, const std::function<void()>& body);
void count(Cost what, int64_t amount = 1);
void count_collective(Collective what);
// That the running thread is where it is in the code; returns how often it was there before. The most
// visits of one thread to one place stand for its longest serial loop: no branch needs to be seen for that.
// Places are loads and stores of global or shared memory, collectives, copies and Philox calls, so that a
// loop of arithmetic alone goes unseen, and nested loops count as their product.
uint32_t count_visit(const void* path);
// Bytes that several lanes of a warp ask for at one place, each of them for the n-th time, are moved once:
// that is one instruction of the warp, and a broadcast. What a lane asks for again counts again.
void count_access(const void* address, size_t bytes, bool write, bool atomic);

// warp.cpp: acts for all lanes that are not null.
void act(Collective what, Operands* const (&lane)[32], Thread* const (&thread)[32]);

}  // namespace cuda_on_cpu

extern "C" const char* cuda_on_cpu_error();  // of the last launch
