// Philox 4x32-7 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011): the counter-based
// generator behind every random decision, the same code for CUDA and for the CPU. Includes nothing of CUDA.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define MTFAST_HOST_DEVICE __host__ __device__ __forceinline__
#define MTFAST_UNROLL _Pragma("unroll")
// Where all of it would hold more than the registers can.
#define MTFAST_NO_UNROLL _Pragma("unroll 1")
#elif defined(MTFAST_CUDA_ON_CPU)  // compiled anew for each test run: as little code as will do
#define MTFAST_HOST_DEVICE inline __attribute__((always_inline))
#define MTFAST_UNROLL
#define MTFAST_NO_UNROLL
namespace cuda_on_cpu {
void note_philox();  // the tests count the calls
}
#define MTFAST_NOTE_PHILOX() cuda_on_cpu::note_philox()
#else
#define MTFAST_HOST_DEVICE inline __attribute__((always_inline))
#define MTFAST_UNROLL _Pragma("GCC unroll 16")
#define MTFAST_NO_UNROLL
#endif
#ifndef MTFAST_NOTE_PHILOX
#define MTFAST_NOTE_PHILOX()
#endif

namespace mtfast {

// What a number is drawn for: the last word of the counter, so that no two uses share a draw.
enum class Purpose : uint32_t {
  kMaskChoose = 1,
  kMaskReplace = 2,
  kConcatMlpDropout = 3,
  kAttentionDropout = 4,
  kDropoutAddLayerNorm = 5,
};

constexpr int kPhiloxRounds = 7;  // the fewest that pass BigCrush, says the paper

struct Philox4 {
  uint32_t word[4];

  // word[i % 4], without an index that would send the words to memory.
  MTFAST_HOST_DEVICE uint32_t at(int64_t i) const {
    const uint32_t low = i & 1 ? word[1] : word[0], high = i & 1 ? word[3] : word[2];
    return i & 2 ? high : low;
  }
};

// All 64 bits of the product, in one instruction.
MTFAST_HOST_DEVICE uint64_t multiply_wide(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  uint64_t product;
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
  return product;
#else
  return uint64_t{a} * b;
#endif
}

MTFAST_HOST_DEVICE Philox4 philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint64_t seed) {
  MTFAST_NOTE_PHILOX();
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  MTFAST_UNROLL
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t p0 = multiply_wide(0xD2511F53u, c0), p1 = multiply_wide(0xCD9E8D57u, c2);
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// The four draws of elements 4 * group to 4 * group + 3.
MTFAST_HOST_DEVICE Philox4 draw4(uint64_t seed, Purpose purpose, uint64_t group) {
  return philox(static_cast<uint32_t>(group), static_cast<uint32_t>(group >> 32), 0,
                static_cast<uint32_t>(purpose), seed);
}

// Dropout compares 16-bit draws with this; probabilities are resolved to 1/65536, at most 65535/65536.
inline uint32_t dropout_threshold(double dropout_p) {
  const uint32_t threshold = static_cast<uint32_t>(dropout_p * 65536 + 0.5);
  return threshold < 65536 ? threshold : 65535;
}

}  // namespace mtfast
