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

// runtime.cpp: whether a kernel may be launched so; fails where it may not.
bool may_launch(dim3 grid, dim3 block, size_t shared_bytes, const void* kernel);

void races_begin_launch();
int races_found();

// warp.cpp: acts for all lanes that are not null.
void act(Collective what, Operands* const (&lane)[32], Thread* const (&thread)[32]);

}  // namespace cuda_on_cpu

extern "C" const char* cuda_on_cpu_error();  // of the last launch
