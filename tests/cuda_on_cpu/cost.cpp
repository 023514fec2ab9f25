// The cost counter: what launches ask of a GPU, by operation, whatever the emulation's own speed. It is told
// of loads and stores as the race detector is.
#include <array>
#include <memory>
#include <vector>

#include "machine.h"

extern "C" const char __ehdr_start[] __attribute__((visibility("hidden")));  // of the kernels' library
extern "C" const char _end[] __attribute__((visibility("hidden")));

namespace cuda_on_cpu {
namespace {

struct Launch {
  int64_t kernel;  // where it is in the library
  int64_t blocks;
  int64_t count[static_cast<int>(Cost::kCount)];
};

std::vector<Launch> launches;
const std::function<void()>* kernel_body = nullptr;  // which each fiber reads to call the kernel

// A place in a kernel's code, and how often each thread of a block was there.
struct Site {
  const void* path = nullptr;
  uint32_t block = 0;  // the running block's number, else visits are another's
  std::array<uint32_t, 1024> visits;
};

constexpr size_t kMostSites = 1 << 15;
std::vector<std::unique_ptr<Site>> sites(2 * kMostSites);  // by hash of the path
size_t known_sites = 0;

uint64_t mixed(uint64_t x) {
  x = (x ^ x >> 32) * 0x9E3779B97F4A7C15u;
  return x ^ x >> 29;
}

Site& site_of(const void* path) {
  for (size_t at = mixed(reinterpret_cast<uintptr_t>(path));; ++at) {
    auto& site = sites[at % sites.size()];
    if (site && site->path == path) return *site;
    if (site) continue;
    if (++known_sites > kMostSites) std::abort();
    site = std::make_unique<Site>();
    site->path = path;
    return *site;
  }
}

// What the block's warps have asked for so far, as hashes of 64 bits; slots of earlier blocks are free.
struct Requests {
  struct Slot {
    uint64_t key = 0;
    uint32_t block = 0;
  };
  std::vector<Slot> slots = std::vector<Slot>(1 << 12);
  size_t used = 0;
  uint32_t block_number = 0;

  bool insert(uint64_t key) {
    if (block_number != block.number) used = 0;
    block_number = block.number;
    if (2 * used >= slots.size()) {
      std::vector<Slot> old(2 * slots.size());
      old.swap(slots);
      used = 0;
      for (const Slot& slot : old)
        if (slot.block == block.number) insert(slot.key);
    }
    for (size_t at = key;; ++at) {
      Slot& slot = slots[at % slots.size()];
      if (slot.block != block.number) {
        slot = {key, block.number};
        ++used;
        return true;
      }
      if (slot.key == key) return false;
    }
  }
} requests;

bool within(const void* address, const void* begin, size_t bytes) {
  return reinterpret_cast<uintptr_t>(address) - reinterpret_cast<uintptr_t>(begin) < bytes;
}

// Neither the block's memory nor a kernel's parameters, constants and indices, for which a GPU has registers.
bool is_global(const void* address) {
  return !within(address, block.shared, block.shared ? block.shared_bytes : 0) &&
         !within(address, current, sizeof(Thread)) && !within(address, kernel_body, sizeof *kernel_body) &&
         !within(address, __ehdr_start, static_cast<size_t>(_end - __ehdr_start));
}

}  // namespace

const void* call_path() {
  struct Frame {
    const Frame* caller;
    uintptr_t return_address;
  };
  uint64_t path = 0;
  for (auto* f = static_cast<const Frame*>(__builtin_frame_address(0)); f; f = f->caller)
    path = (path ^ f->return_address) * 0x9E3779B97F4A7C15u;
  return reinterpret_cast<const void*>(path);
}

void costs_begin_launch(const void* kernel, int64_t blocks, const std::function<void()>& body) {
  kernel_body = &body;
  if (config.costs) launches.push_back({static_cast<const char*>(kernel) - __ehdr_start, blocks, {}});
}

void count(Cost what, int64_t amount) {
  if (config.costs) launches.back().count[static_cast<int>(what)] += amount;
}

uint32_t count_visit(const void* path) {
  if (!config.costs) return 0;
  Site& site = site_of(path);
  if (site.block != block.number) {
    site.block = block.number;
    site.visits.fill(0);
  }
  const uint32_t before = site.visits[current->index]++;
  int64_t& longest = launches.back().count[static_cast<int>(Cost::kLongestLoop)];
  longest = std::max(longest, int64_t{before} + 1);
  return before;
}

void count_access(const void* address, size_t bytes, bool write, bool atomic) {
  if (!config.costs || !current || on_fiber_stack(address)) return;
  if (!is_global(address)) {
    if (block.shared && within(address, block.shared, block.shared_bytes)) count_visit(call_path());
    return;
  }
  const void* path = call_path();
  const uint64_t before = count_visit(path);
  if (!atomic) {
    uint64_t key = mixed(reinterpret_cast<uintptr_t>(address));
    key = mixed(key + reinterpret_cast<uintptr_t>(path));
    if (!requests.insert(mixed(key + (before << 5 | static_cast<uint64_t>(current->warp))))) return;
  }
  if (write) count(Cost::kWritten, static_cast<int64_t>(bytes));
  if (!write || atomic) count(Cost::kRead, static_cast<int64_t>(bytes));
}

void count_collective(Collective what) {
  switch (what) {
    case Collective::kSync:
      return count(Cost::kWarpBarriers);
    case Collective::kBallot:
      return count(Cost::kVotes);
    case Collective::kShuffle:
      return count(Cost::kShuffles);
    case Collective::kMatrix:
    case Collective::kMatrixTransposed:
      return count(Cost::kLdmatrix);
    case Collective::kMmaBf16:
    case Collective::kMmaFp16:
      return count(Cost::kMma);
  }
}

void note_philox() {
  if (!config.costs || !current) return;
  count(Cost::kPhilox);
  count_visit(call_path());
}

}  // namespace cuda_on_cpu

using namespace cuda_on_cpu;

extern "C" {
// Whether launches are counted from here on; those before are forgotten.
void cuda_on_cpu_begin_costs(int costs) {
  config.costs = costs != 0;
  launches.clear();
}
// The launches counted since, `size` of them.
const void* cuda_on_cpu_costs(int64_t* size) {
  *size = static_cast<int64_t>(launches.size());
  return launches.data();
}
}
