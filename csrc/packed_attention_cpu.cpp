// Packed attention on the CPU: tasks of one sequence and one head, shared out among threads as they become
// free. A task's result does not depend on who computes it, so neither does the whole.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "packed_attention.h"

// Said by GCC 12 of its own AVX-512 intrinsics, and of vector arguments of functions that are all inlined.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wpsabi"

namespace mtfast {
namespace {

struct Bf16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

[[maybe_unused]] float half_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = (h >> 10) & 31, fraction = h & 1023;
  float magnitude;
  if (exponent == 31) {
    const uint32_t bits = 0x7F800000u | fraction << 13;
    std::memcpy(&magnitude, &bits, 4);
  } else if (exponent == 0) {
    magnitude = float(fraction) * 5.9604644775390625e-8f;  // 2^-24
  } else {
    const uint32_t bits = (exponent + 112) << 23 | fraction << 13;
    std::memcpy(&magnitude, &bits, 4);
  }
  return sign ? -magnitude : magnitude;
}

[[maybe_unused]] uint16_t float_to_half(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint16_t sign = (bits >> 16) & 0x8000;
  bits &= 0x7FFFFFFFu;
  if (bits > 0x7F800000u) return sign | 0x7E00;
  if (bits >= 0x477FF000u) return sign | 0x7C00;  // rounds past the largest half
  if (bits < 0x38800000u) {                       // subnormal: let the adder round at 2^-24
    float magnitude;
    std::memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    std::memcpy(&bits, &magnitude, 4);
    return sign | uint16_t(bits - 0x3F000000u);
  }
  return sign | uint16_t((bits - 0x38000000u + 0xFFFu + ((bits >> 13) & 1)) >> 13);
}

namespace portable {
#define MTFAST_VECTOR_BYTES 32
#define MTFAST_AVX 0
#include "packed_attention_cpu_kernels.h"
#undef MTFAST_VECTOR_BYTES
#undef MTFAST_AVX
}  // namespace portable

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi,bmi2")
namespace avx2 {
#define MTFAST_VECTOR_BYTES 32
#define MTFAST_AVX 2
#include "packed_attention_cpu_kernels.h"
#undef MTFAST_VECTOR_BYTES
#undef MTFAST_AVX
}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
namespace avx512 {
#define MTFAST_VECTOR_BYTES 64
#define MTFAST_AVX 512
#include "packed_attention_cpu_kernels.h"
#undef MTFAST_VECTOR_BYTES
#undef MTFAST_AVX
}  // namespace avx512
#pragma GCC pop_options
#endif

struct Kernels {
  const char* name;
  decltype(&portable::forward) forward;
  decltype(&portable::backward) backward;
};

const Kernels& kernels() {
  static const Kernels chosen = [] {
#if defined(__x86_64__)
    const char* cap = std::getenv("MTFAST_CPU");  // "avx2" or "portable": do not use more than that
    const bool any = cap == nullptr || *cap == 0;
    if (any && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
      return Kernels{"avx512", avx512::forward, avx512::backward};
    if ((any || !std::strcmp(cap, "avx2")) && __builtin_cpu_supports("avx2") &&
        __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi2"))
      return Kernels{"avx2", avx2::forward, avx2::backward};
#endif
    return Kernels{"portable", portable::forward, portable::backward};
  }();
  return chosen;
}

// Scratch that lives as long as its thread, so that a step does not pay for fresh pages.
char* scratch(int64_t bytes) {
  thread_local std::unique_ptr<char, void (*)(void*)> buffer{nullptr, std::free};
  thread_local int64_t size = 0;
  if (size < bytes) {
    size = (bytes + 4095) / 4096 * 4096;
    buffer.reset(static_cast<char*>(std::aligned_alloc(64, size)));
    if (!buffer) {
      size = 0;
      throw std::bad_alloc();
    }
  }
  return buffer.get();
}

template <class Args, class Kernel>
void run(const Args& args, bool cls, bool is_backward, Kernel kernel, int64_t slots, ParallelSlots parallel) {
  const AttentionShape& shape = args.shape;
  int64_t longest = 0;
  for (int64_t s = 0; s < shape.sequences; ++s)
    longest = std::max<int64_t>(longest, shape.cu_seqlens[s + 1] - shape.cu_seqlens[s]);
  struct Context {
    const Args& args;
    bool cls;
    Kernel kernel;
    int64_t tasks, chunk, bytes;
    std::atomic<int64_t> next{0};
  } context{args,   cls,
            kernel, shape.sequences * shape.heads,
            1,      portable::scratch_bytes(longest, shape.head_dim, is_backward)};
  if (context.tasks == 0) return;
  context.chunk = context.tasks > 256 * slots ? 8 : 1;
  auto body = [](int64_t, void* opaque) {
    Context& c = *static_cast<Context*>(opaque);
    char* mine = scratch(c.bytes);
    const int64_t heads = c.args.shape.heads;
    for (int64_t t; (t = c.next.fetch_add(c.chunk, std::memory_order_relaxed)) < c.tasks;)
      for (int64_t end = std::min(t + c.chunk, c.tasks); t < end; ++t)
        c.kernel(c.args, c.cls, t / heads, t % heads, mine);
  };
  parallel(std::min(slots, context.tasks), body, &context);
}

}  // namespace

void packed_attention_forward_cpu(const AttentionForward& args, bool cls, int64_t slots,
                                  ParallelSlots parallel) {
  run(args, cls, false, kernels().forward, slots, parallel);
}

void packed_attention_backward_cpu(const AttentionBackward& args, bool cls, int64_t slots,
                                   ParallelSlots parallel) {
  run(args, cls, true, kernels().backward, slots, parallel);
}

const char* packed_attention_cpu_instructions() { return kernels().name; }

}  // namespace mtfast
