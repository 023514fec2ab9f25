// The race detector: for every byte, who touched it last and when. Kernels are compiled with
// -fsanitize=thread and linked with the callbacks below in place of its runtime, so each of their loads and
// stores comes by here.
//
// Two accesses to a byte, one of them a write, are ordered when they are one thread's, or have a
// __syncthreads between them in one block, or a __syncwarp between them in one warp. Blocks of a launch are
// never ordered.
#include <dlfcn.h>

#include <array>
#include <cstdio>
#include <memory>
#include <set>
#include <string>
#include <unordered_map>
#include <utility>

#include "machine.h"

namespace cuda_on_cpu {
namespace {

struct Access {
  uint32_t block = 0, interval = 0, warp_interval = 0;
  int thread = -1;
  void* caller = nullptr;
};

struct Byte {
  Access write, read;
  bool write_was_atomic = false;
  bool read_by_warps = false;    // in read's interval, by more than one warp
  bool read_by_threads = false;  // in read's interval and warp interval, by more than one thread
};

constexpr uintptr_t kPageBytes = 256;
using Page = std::array<Byte, kPageBytes>;
std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;
std::set<std::pair<void*, void*>> reported;

Page& page_of(uintptr_t number) {
  auto& page = pages[number];
  if (!page) page = std::make_unique<Page>();
  return *page;
}

std::string place(void* caller) {
  if (!caller) return "ldmatrix";
  Dl_info info;
  char text[300];
  if (dladdr(caller, &info) && info.dli_fname)
    std::snprintf(text, sizeof text, "%s+0x%zx", info.dli_fname,
                  static_cast<size_t>(static_cast<char*>(caller) - static_cast<char*>(info.dli_fbase) - 1));
  else
    std::snprintf(text, sizeof text, "%p", caller);
  return text;
}

void report(const char* what, const void* address, const Access& now, const Access& before) {
  if (!reported.emplace(now.caller, before.caller).second || reported.size() > 1) return;
  const auto* a = static_cast<const unsigned char*>(address);
  const bool shared = a >= block.shared && a < block.shared + block.shared_bytes;
  char where[64];
  if (shared)
    std::snprintf(where, sizeof where, "shared memory + %td", a - block.shared);
  else
    std::snprintf(where, sizeof where, "global memory %p", address);
  fail("race: %s at %s: thread %d at {%s}, thread %d%s at {%s}", what, where, now.thread,
       place(now.caller).c_str(), before.thread, before.block != now.block ? " of another block" : "",
       place(before.caller).c_str());
}

}  // namespace

void races_begin_launch() {
  pages.clear();
  reported.clear();
}

int races_found() { return static_cast<int>(reported.size()); }

void note_access(const void* address, size_t bytes, bool write, bool atomic, void* caller) {
  if (!config.races || !current || on_fiber_stack(address)) return;
  const int warp = current->warp;
  const Access now{block.number, block.interval, block.warp_interval[warp], current->index, caller};
  const auto* begin = static_cast<const unsigned char*>(address);
  Page* page = nullptr;
  for (const unsigned char* a = begin; a < begin + bytes; ++a) {
    const bool shared = block.shared && a >= block.shared && a < block.shared + block.shared_bytes;
    const auto at = reinterpret_cast<uintptr_t>(a);
    if (!page || at % kPageBytes == 0) page = &page_of(at / kPageBytes);
    Byte& byte = (*page)[at % kPageBytes];
    // Shared memory of an earlier block may have been at the same address.
    const auto foreign = [&](const Access& x) {
      return x.thread < 0 || x.block < block.first_of_launch || (shared && x.block != now.block);
    };
    const auto unordered = [&](const Access& x, bool other_threads, bool other_warps) {
      if (foreign(x)) return false;
      if (x.block != now.block) return true;
      if (x.interval != now.interval) return false;
      if (other_warps) return true;
      if (x.thread / 32 == warp && x.warp_interval != now.warp_interval) return false;
      return other_threads || x.thread != now.thread;
    };
    if (!(atomic && byte.write_was_atomic) && unordered(byte.write, false, false))
      report(write ? "write after a write" : "read after a write", a, now, byte.write);
    else if (write && unordered(byte.read, byte.read_by_threads, byte.read_by_warps))
      report("write after a read", a, now, byte.read);
    if (write) {
      byte.write = now;
      byte.write_was_atomic = atomic;
      continue;
    }
    const Access& last = byte.read;
    if (last.block != now.block || last.interval != now.interval) {
      byte.read_by_warps = byte.read_by_threads = false;
    } else if (last.thread / 32 != warp) {
      byte.read_by_warps = true;
    } else if (last.warp_interval != now.warp_interval) {
      byte.read_by_threads = false;
    } else if (last.thread != now.thread) {
      byte.read_by_threads = true;
    }
    byte.read = now;
  }
}

void note_atomic(const void* address, size_t bytes, void* caller) {
  count_access(address, bytes, true, true);
  note_access(address, bytes, true, true, caller);
}

static void touch(const void* address, size_t bytes, bool write, void* caller) {
  count_access(address, bytes, write, false);
  note_access(address, bytes, write, false, caller);
}

}  // namespace cuda_on_cpu

// What kernels compiled with -fsanitize=thread call.
#define CALLBACK(name, bytes, write) \
  extern "C" void __tsan_##name(void* p) { cuda_on_cpu::touch(p, bytes, write, __builtin_return_address(0)); }
#define CALLBACKS(bytes)                        \
  CALLBACK(read##bytes, bytes, false)           \
  CALLBACK(write##bytes, bytes, true)           \
  CALLBACK(unaligned_read##bytes, bytes, false) \
  CALLBACK(unaligned_write##bytes, bytes, true) \
  CALLBACK(volatile_read##bytes, bytes, false)  \
  CALLBACK(volatile_write##bytes, bytes, true)
CALLBACKS(1)
CALLBACKS(2)
CALLBACKS(4)
CALLBACKS(8)
CALLBACKS(16)
extern "C" void __tsan_read_range(void* p, size_t bytes) {
  cuda_on_cpu::touch(p, bytes, false, __builtin_return_address(0));
}
extern "C" void __tsan_write_range(void* p, size_t bytes) {
  cuda_on_cpu::touch(p, bytes, true, __builtin_return_address(0));
}
extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
extern "C" void __tsan_vptr_update(void**, void*) {}
extern "C" void __tsan_vptr_read(void**) {}
