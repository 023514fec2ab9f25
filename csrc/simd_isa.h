// One source for every x86-64 machine: a kernel is written once, as `template <Isa isa> static void run(...)`
// of a struct, compiled for each instruction set, and chosen when it is called.
#pragma once
#include <cstdlib>
#include <cstring>
#include <string_view>
#include <type_traits>

#include "device/philox.cuh"
#include "simd.h"

namespace mtfast::simd {

enum class Isa { kGeneric, kAvx2, kAvx512, kAvx512Bf16 };
constexpr bool is_avx512(Isa isa) { return isa == Isa::kAvx512 || isa == Isa::kAvx512Bf16; }

// On<isa>::call(Kernel{}, arguments...) runs Kernel::run<isa>, compiled for that instruction set. Everything
// that `run` calls must be MTFAST_INLINE (or MTFAST_INLINE_LAMBDA); arguments must be no vectors.
template <Isa isa>
struct On {
  template <class Kernel, class... Arguments>
  static void call(Kernel, const Arguments&... arguments) {
    Kernel::template run<isa>(arguments...);
  }
};

#if defined(__x86_64__) && defined(__GNUC__)
template <>
struct On<Isa::kAvx2> {
  template <class Kernel, class... Arguments>
  __attribute__((target("arch=x86-64-v3"))) static void call(Kernel, const Arguments&... arguments) {
    Kernel::template run<Isa::kAvx2>(arguments...);
  }
};
template <>
struct On<Isa::kAvx512> {
  template <class Kernel, class... Arguments>
  __attribute__((target("arch=x86-64-v4,prefer-vector-width=512"))) static void call(
      Kernel, const Arguments&... arguments) {
    Kernel::template run<Isa::kAvx512>(arguments...);
  }
};
template <>
struct On<Isa::kAvx512Bf16> {
  template <class Kernel, class... Arguments>
  __attribute__((target("arch=x86-64-v4,avx512bf16,prefer-vector-width=512"))) static void call(
      Kernel, const Arguments&... arguments) {
    Kernel::template run<Isa::kAvx512Bf16>(arguments...);
  }
};
#endif

// The widest set of this machine; the environment's MTFAST_CPU=avx512 (without bfloat16), avx2 or generic
// asks for less.
inline Isa best_isa() {
  static const Isa best = [] {
#if defined(__x86_64__) && defined(__GNUC__)
    const char* const asked = std::getenv("MTFAST_CPU");
    const std::string_view most = asked != nullptr ? asked : "";
    if (most == "generic") return Isa::kGeneric;
    if (most != "avx2" && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
      return __builtin_cpu_supports("avx512bf16") && most != "avx512" ? Isa::kAvx512Bf16 : Isa::kAvx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
        __builtin_cpu_supports("bmi2"))
      return Isa::kAvx2;
#endif
    return Isa::kGeneric;
  }();
  return best;
}

// Whether there is the dot product instruction of AVX-512 BF16, for functions marked MTFAST_BF16.
inline bool has_bf16_dot() { return best_isa() == Isa::kAvx512Bf16; }
#define MTFAST_BF16 __attribute__((target("arch=x86-64-v4,avx512bf16,prefer-vector-width=512")))

// Whether Kernel::kStoresBf16 is true: only then is it compiled for kAvx512Bf16, which is kAvx512 for others.
template <class Kernel, class = void>
constexpr bool kStoresBf16 = false;
#if defined(__x86_64__) && defined(__GNUC__)
template <class Kernel>
constexpr bool kStoresBf16<Kernel, std::void_t<decltype(Kernel::kStoresBf16)>> = Kernel::kStoresBf16;

// `low` and then `high`, rounded to nearest, ties to even; denormals become 0. For kAvx512Bf16.
MTFAST_INLINE u16x32 to_bf16(f32x16 low, f32x16 high) {
  u16x32 to;
  asm("vcvtne2ps2bf16 %2, %1, %0" : "=v"(to) : "v"(high), "v"(low));
  return to;
}
#endif

template <class Kernel, class... Arguments>
void call_best(Kernel kernel, const Arguments&... arguments) {
  switch (best_isa()) {
    case Isa::kAvx512Bf16:
      if constexpr (kStoresBf16<Kernel>) return On<Isa::kAvx512Bf16>::call(kernel, arguments...);
      [[fallthrough]];
    case Isa::kAvx512:
      return On<Isa::kAvx512>::call(kernel, arguments...);
    case Isa::kAvx2:
      return On<Isa::kAvx2>::call(kernel, arguments...);
    case Isa::kGeneric:
      return On<Isa::kGeneric>::call(kernel, arguments...);
  }
}

// High and low words of multiplier * c, written so that compilers find each set's instruction for it.
template <Isa isa>
MTFAST_INLINE void multiply(uint64_t multiplier, u32x16 c, u32x16& high, u32x16& low) {
  if constexpr (is_avx512(isa)) {
    const u64x8 even = (reinterpret_cast<u64x8>(c) & 0xffffffffu) * multiplier;
    const u64x8 odd = (reinterpret_cast<u64x8>(c) >> 32) * multiplier;
    high = reinterpret_cast<u32x16>((even >> 32) | (odd & 0xffffffff00000000u));
    low = reinterpret_cast<u32x16>((even & 0xffffffffu) | (odd << 32));
  } else {
    const u64x16 product = __builtin_convertvector(c, u64x16) * multiplier;
    high = __builtin_convertvector(product >> 32, u32x16);
    low = __builtin_convertvector(product, u32x16);
  }
}

// Sixteen Philox calls at once: counters (c0, c1, c2, purpose) by lane become the four words of each.
template <Isa isa>
MTFAST_INLINE void philox16(uint64_t seed, u32x16 c0, u32x16 c1, uint32_t c2_all, Purpose purpose,
                            u32x16 (&words)[4]) {
  u32x16 c2 = u32x16{} + c2_all, c3 = u32x16{} + static_cast<uint32_t>(purpose);
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    u32x16 high0, low0, high1, low1;
    multiply<isa>(0xD2511F53u, c0, high0, low0);
    multiply<isa>(0xCD9E8D57u, c2, high1, low1);
    c0 = high1 ^ c1 ^ k0;
    c2 = high0 ^ c3 ^ k1;
    c1 = low1;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  words[0] = c0;
  words[1] = c1;
  words[2] = c2;
  words[3] = c3;
}

struct Less {
  template <class A>
  MTFAST_INLINE auto of(A a, A b) {
    return a < b;
  }
};
struct LessEqual {
  template <class A>
  MTFAST_INLINE auto of(A a, A b) {
    return a <= b;
  }
};

// a < b (or a <= b) ? yes : no, by lanes. By parts as wide as the set's registers: of all sixteen, GCC makes
// scalar code where they are wider.
template <Isa isa, class Comparison, class A, class V>
MTFAST_INLINE V select(A a, A b, V yes, V no) {
  if constexpr (!is_avx512(isa) && sizeof(V) == sizeof(A)) {
    constexpr int kBytes = isa == Isa::kAvx2 ? 32 : 16, kParts = sizeof(V) / kBytes;
    typedef std::decay_t<decltype(A{}[0])> PartA __attribute__((vector_size(kBytes)));
    typedef std::decay_t<decltype(V{}[0])> PartV __attribute__((vector_size(kBytes)));
    PartA x[kParts], y[kParts];
    PartV of_yes[kParts], of_no[kParts];
    std::memcpy(x, &a, sizeof a);
    std::memcpy(y, &b, sizeof b);
    std::memcpy(of_yes, &yes, sizeof yes);
    std::memcpy(of_no, &no, sizeof no);
    for (int i = 0; i < kParts; ++i) of_yes[i] = Comparison::of(x[i], y[i]) ? of_yes[i] : of_no[i];
    std::memcpy(&yes, of_yes, sizeof yes);
    return yes;
  } else if constexpr (sizeof(V) == sizeof(A)) {
    return Comparison::of(a, b) ? yes : no;
  } else {
    return __builtin_convertvector(Comparison::of(a, b), i64x16) ? yes : no;
  }
}

}  // namespace mtfast::simd
