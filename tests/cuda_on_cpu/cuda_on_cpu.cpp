// The machine: fibers, barriers, warps meeting for collectives, background copies. x86-64.
#include <pthread.h>
#include <sys/mman.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "machine.h"
#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace cuda_on_cpu {

Thread* current = nullptr;
Block block;

namespace {

constexpr size_t kStackBytes = 256 * 1024;

enum class State { kReady, kAtBarrier, kInCollective, kDone };

struct Copy {
  void* shared;
  const void* global;
  int bytes;
  void* caller;
};

struct Fiber : Thread {
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  State state = State::kReady;
  const char* file = "";
  int line = 0;
  const void* path = nullptr;  // to the collective
  Collective what{};
  Operands* operands = nullptr;
  std::vector<Copy> uncommitted;
  std::deque<std::vector<Copy>> groups;
};

// Lanes of a warp that wait for the rest of their mask.
struct Meeting {
  unsigned mask, arrived;
};

std::vector<std::unique_ptr<Fiber>> fibers;  // kept from launch to launch, with their stacks
Fiber scheduler;                             // the CPU thread that called launch()
Fiber* running = &scheduler;
int threads = 0, alive = 0;
std::deque<int> ready;
std::vector<Meeting> meetings[32];
uint32_t exited[32];  // lanes of each warp
uint32_t priority[32];
const std::function<void()>* kernel_body = nullptr;
std::mt19937 random_bits;
std::string error;

extern "C" void cuda_on_cpu_switch(void** save, void* load);
asm(R"(
.pushsection .text
.globl cuda_on_cpu_switch
.hidden cuda_on_cpu_switch
.type cuda_on_cpu_switch,@function
cuda_on_cpu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuda_on_cpu_switch, .-cuda_on_cpu_switch
.popsection
)");

void switch_to(Fiber* to) {
  Fiber* from = running;
  running = to;
  current = to;
#if defined(__SANITIZE_ADDRESS__)
  static void* scheduler_stack = nullptr;
  static size_t scheduler_bytes = 0;
  if (!scheduler_stack) {
    pthread_attr_t attributes;
    pthread_getattr_np(pthread_self(), &attributes);
    pthread_attr_getstack(&attributes, &scheduler_stack, &scheduler_bytes);
    pthread_attr_destroy(&attributes);
  }
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, to == &scheduler ? scheduler_stack : to->stack,
                                 to == &scheduler ? scheduler_bytes : kStackBytes);
  cuda_on_cpu_switch(&from->stack_pointer, to->stack_pointer);
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#else
  cuda_on_cpu_switch(&from->stack_pointer, to->stack_pointer);
#endif
}

void make_ready(int* begin, int* end) {
  if (config.order == Order::kReverse) std::reverse(begin, end);
  if (config.order == Order::kRandom) std::shuffle(begin, end, random_bits);
  for (const int* i = begin; i != end; ++i) {
    fibers[*i]->state = State::kReady;
    ready.push_back(*i);
  }
}

bool same_place(const char* file, int line, const Fiber& f) {
  return f.line == line && (f.file == file || std::strcmp(f.file, file) == 0);
}

// Opens the barrier when every thread that still runs stands at it.
bool open_barrier() {
  std::vector<int> waiting;
  for (int i = 0; i < threads; ++i)
    if (fibers[i]->state == State::kAtBarrier) waiting.push_back(i);
  if (waiting.empty() || static_cast<int>(waiting.size()) != alive) return false;
  const Fiber& first = *fibers[waiting[0]];
  for (const int i : waiting)
    if (!same_place(first.file, first.line, *fibers[i])) {
      fail("divergent barrier: thread %d waits at %s:%d, thread %d at %s:%d", first.index, first.file,
           first.line, i, fibers[i]->file, fibers[i]->line);
      return false;
    }
  if (alive != threads) {
    fail("divergent barrier: %s:%d is reached by %d of %d threads, the others have exited", first.file,
         first.line, alive, threads);
    return false;
  }
  ++block.interval;
  count(Cost::kBarriers);
  make_ready(waiting.data(), waiting.data() + waiting.size());
  return true;
}

void report_deadlock() {
  std::string text = "deadlock:";
  const Fiber* told = nullptr;
  for (int i = 0; i < threads; ++i) {
    const Fiber& f = *fibers[i];
    if (f.state == State::kDone || (told && told->line == f.line && told->state == f.state)) continue;
    text += " thread " + std::to_string(i) + " waits in " +
            (f.state == State::kAtBarrier ? "__syncthreads" : "a warp collective") + " at " + f.file + ":" +
            std::to_string(f.line) + ";";
    told = &f;
  }
  fail("%s", text.c_str());
}

// Gives the CPU to the next fiber that can run, or to the scheduler when the block is over. Returns when the
// caller runs again.
void yield() {
  for (;;) {
    if (!error.empty() || alive == 0) return switch_to(&scheduler);
    if (ready.empty()) {
      if (!open_barrier() && error.empty()) report_deadlock();
      continue;
    }
    if (config.order == Order::kWarpPriority) {  // one warp runs as far ahead as it can
      const auto next = std::max_element(ready.begin(), ready.end(),
                                         [](int a, int b) { return priority[a / 32] < priority[b / 32]; });
      std::rotate(ready.begin(), next, next + 1);
    }
    Fiber* fiber = fibers[ready.front()].get();
    ready.pop_front();
    if (fiber != running) switch_to(fiber);
    return;
  }
}

void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
  (*kernel_body)();
  copy_async_commit();
  copy_async_wait(0);
  running->state = State::kDone;
  exited[running->warp] |= 1u << running->lane;
  --alive;
  yield();
  std::abort();  // a finished fiber is never resumed
}

void prepare(Fiber& f, int index, dim3 block_dim, uint3 block_index, dim3 grid_dim) {
  if (!f.stack) {
    void* memory = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) std::abort();
    f.stack = static_cast<char*>(memory);
  }
#if defined(__SANITIZE_ADDRESS__)
  ASAN_UNPOISON_MEMORY_REGION(f.stack, kStackBytes);  // an earlier block's frames were left, not unwound
#endif
  f.index = index;
  f.lane = index % 32;
  f.warp = index / 32;
  const unsigned i = static_cast<unsigned>(index);
  f.thread = make_uint3(i % block_dim.x, i / block_dim.x % block_dim.y, i / block_dim.x / block_dim.y);
  f.block = block_index;
  f.block_dim = block_dim;
  f.grid_dim = grid_dim;
  f.uncommitted.clear();
  f.groups.clear();
  // Frames of different lanes lie in different lines of the cache.
  const size_t apart = 64 + static_cast<size_t>(f.lane) * 128;
  void** top = reinterpret_cast<void**>(f.stack + kStackBytes - apart);
  *--top = nullptr;  // where fiber_main would return to
  *--top = reinterpret_cast<void*>(&fiber_main);
  for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
  f.stack_pointer = top;
}

void run_block(dim3 block_dim, uint3 block_index, dim3 grid_dim) {
  const size_t rounded = (block.shared_bytes + 1023) / 1024 * 1024;
  block.shared = rounded ? static_cast<unsigned char*>(std::aligned_alloc(1024, rounded)) : nullptr;
  if (rounded) std::memset(block.shared, 0xff, rounded);  // not-a-number in every floating format
#if defined(__SANITIZE_ADDRESS__)
  if (rounded) ASAN_POISON_MEMORY_REGION(block.shared + block.shared_bytes, rounded - block.shared_bytes);
#endif
  ++block.number;
  ++block.interval;
  alive = threads;
  ready.clear();
  std::vector<int> all(threads);
  for (int i = 0; i < threads; ++i) {
    prepare(*fibers[i], i, block_dim, block_index, grid_dim);
    all[i] = i;
  }
  for (int w = 0; w < 32; ++w) {
    meetings[w].clear();
    exited[w] = 0;
    priority[w] = random_bits();
  }
  make_ready(all.data(), all.data() + threads);
  yield();
#if defined(__SANITIZE_ADDRESS__)
  if (rounded) ASAN_UNPOISON_MEMORY_REGION(block.shared, rounded);
#endif
  std::free(block.shared);
  block.shared = nullptr;
}

void land(const Copy& copy) {
  note_access(copy.shared, 16, true, false, copy.caller);
  if (copy.bytes) note_access(copy.global, static_cast<size_t>(copy.bytes), false, false, copy.caller);
  if (copy.bytes) std::memcpy(copy.shared, copy.global, static_cast<size_t>(copy.bytes));
  std::memset(static_cast<char*>(copy.shared) + copy.bytes, 0, static_cast<size_t>(16 - copy.bytes));
}

}  // namespace

void fail(const char* format, ...) {
  char text[1024];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  if (error.empty()) error = text;
}

bool on_fiber_stack(const void* address) {
  const char* a = static_cast<const char*>(address);
  return running != &scheduler && a >= running->stack && a < running->stack + kStackBytes;
}

unsigned char* shared_memory() { return block.shared; }

void sync_threads(const char* file, int line) {
  running->state = State::kAtBarrier;
  running->file = file;
  running->line = line;
  yield();
}

void collective(Collective what, unsigned mask, Operands& operands, const char* file, int line) {
  Fiber* const self = running;
  self->what = what;
  self->operands = &operands;
  self->file = file;
  self->line = line;
  self->path = call_path();
  count_visit(self->path);
  self->state = State::kInCollective;
  const int first = self->warp * 32;
  const unsigned present = first + 32 <= threads ? ~0u : (1u << (threads - first)) - 1;
  const bool whole_warp = what >= Collective::kMatrix;
  if (!(mask >> self->lane & 1)) {
    fail("%s:%d: lane %d is not in the mask %08x of its own collective", file, line, self->lane, mask);
    return yield();
  }
  if (whole_warp && present != ~0u) {
    fail("%s:%d: an operation of a whole warp in a warp of %d threads", file, line, threads - first);
    return yield();
  }
  mask &= present;
  auto& open = meetings[self->warp];
  auto meeting = std::find_if(open.begin(), open.end(), [=](const Meeting& m) { return m.mask == mask; });
  if (meeting == open.end()) meeting = open.insert(open.end(), Meeting{mask, 0});
  meeting->arrived |= 1u << self->lane;
  if (meeting->arrived != mask) {
    if (const unsigned gone = mask & exited[self->warp])
      fail("%s:%d: a warp collective names lane %d, which has exited", file, line, __builtin_ctz(gone));
    return yield();
  }
  open.erase(meeting);
  Operands* lane[32] = {};
  Thread* thread[32] = {};
  int released[32], count_released = 0;
  for (int l = 0; l < 32; ++l) {
    if (!(mask >> l & 1)) continue;
    Fiber* f = fibers[first + l].get();
    if (f->what != what || !same_place(file, line, *f))
      fail("divergent warp collective: lane %d is at %s:%d, lane %d at %s:%d", self->lane, file, line, l,
           f->file, f->line);
    else if (f->path != self->path)
      fail("divergent warp collective at %s:%d: lanes %d and %d came there on two branches", file, line,
           self->lane, l);
    lane[l] = f->operands;
    thread[l] = f;
    released[count_released++] = first + l;
  }
  if (error.empty()) act(what, lane, thread);
  count_collective(what);
  make_ready(released, released + count_released);
  yield();
}

void refuse_shared(const void* address, const char* what) {
  const auto* byte = static_cast<const unsigned char*>(address);
  if (byte < block.shared || byte >= block.shared + block.shared_bytes) return;
  fail("%s is in shared memory", what);
  yield();
}

void copy_async(void* shared, const void* global, int bytes, void* caller) {
  if (bytes < 0 || bytes > 16) {
    fail("cp.async: asked for %d of 16 bytes", bytes);
    return yield();
  }
  if (reinterpret_cast<uintptr_t>(shared) % 16 || (bytes && reinterpret_cast<uintptr_t>(global) % 16)) {
    fail("cp.async: an address is not aligned to 16 bytes");
    return yield();
  }
  if (bytes) refuse_shared(global, "cp.async: the source");
  if (config.costs) count_visit(call_path());
  count(Cost::kCopied, bytes);
  const Copy copy{shared, global, bytes, caller};
  if (!config.late_copies) return land(copy);
  note_access(shared, 16, true, false, caller);  // it may land at any time from here on
  running->uncommitted.push_back(copy);
}

void copy_async_commit() {
  running->groups.push_back(std::move(running->uncommitted));
  running->uncommitted.clear();
}

void copy_async_wait(int pending) {
  while (static_cast<int>(running->groups.size()) > pending) {
    for (const Copy& copy : running->groups.front()) land(copy);
    running->groups.pop_front();
  }
}

int launch(dim3 grid, dim3 block_dim, size_t shared_bytes, const Kernel& kernel,
           const std::function<void()>& body) {
  error.clear();
  if (!may_launch(grid, block_dim, shared_bytes, kernel.address)) {
    error = std::string(kernel.name) + ": " + error;
    return cudaErrorInvalidConfiguration;
  }
  threads = static_cast<int>(block_dim.x * block_dim.y * block_dim.z);
  kernel_body = &body;
  random_bits.seed(config.seed);
  while (static_cast<int>(fibers.size()) < threads) fibers.push_back(std::make_unique<Fiber>());
  block.shared_bytes = shared_bytes;
  block.first_of_launch = block.number + 1;
  races_begin_launch();
  costs_begin_launch(kernel.address, int64_t{grid.x} * grid.y * grid.z, body);
  for (unsigned z = 0; z < grid.z && error.empty(); ++z)
    for (unsigned y = 0; y < grid.y && error.empty(); ++y)
      for (unsigned x = 0; x < grid.x && error.empty(); ++x) run_block(block_dim, make_uint3(x, y, z), grid);
  current = nullptr;
  if (error.empty() && races_found() == 0) return 0;
  error = std::string(kernel.name) + ": " + error;
  return cudaErrorLaunchFailure;
}

}  // namespace cuda_on_cpu

extern "C" const char* cuda_on_cpu_error() { return cuda_on_cpu::error.c_str(); }
