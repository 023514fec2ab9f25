// The draws of dropout_add_layer_norm's rows on the CPU. See dropout_add_layer_norm.h for which they are.
#pragma once
#include <vector>

#include "simd_isa.h"

namespace mtfast::dropout_add_layer_norm {

using namespace simd;

typedef uint64_t u64x4 __attribute__((vector_size(32)));
typedef uint64_t u64x2 __attribute__((vector_size(16)));

// Of the counters (call, row, 0, purpose) the rounds change one word at a time at first: the words that do
// not depend on the row yet are computed once for all rows, and those that do not depend on the call once for
// a row. There are four rounds and a half left for each call of each row.
class RowDraws {
  static constexpr int kCalls = 8, kTerms = 4;  // calls at a time, and what is kept of each
  static constexpr uint64_t kTimes0 = 0xD2511F53u, kTimes1 = 0xCD9E8D57u, kLow = 0xffffffffu;

  uint32_t key0_, key1_;
  std::vector<uint64_t> terms_;  // [calls / kCalls, kTerms, kCalls]

  MTFAST_HOST_DEVICE uint64_t key0(int round) const { return key0_ + round * 0x9E3779B9u; }
  MTFAST_HOST_DEVICE uint64_t key1(int round) const { return key1_ + round * 0xBB67AE85u; }

 public:
  static constexpr int kColumns = 8 * kCalls;  // whose draws are made at a time

  // For no columns: none.
  RowDraws(uint64_t seed, int64_t columns)
      : key0_(static_cast<uint32_t>(seed)),
        key1_(static_cast<uint32_t>(seed >> 32)),
        terms_((columns + kColumns - 1) / kColumns * kTerms * kCalls) {
    for (size_t call = 0; call < terms_.size() / kTerms; ++call) {
      const uint64_t first = kTimes0 * call;
      const uint64_t second =
          kTimes1 * (first >> 32 ^ static_cast<uint32_t>(Purpose::kDropoutAddLayerNorm) ^ key1(0));
      const uint64_t third = kTimes0 * (second >> 32 ^ key0(1));
      // Calls 0 to 3 are in the even lanes, 4 to 7 in the odd ones.
      uint64_t* const to = &terms_[call / kCalls * kTerms * kCalls + call % 4 * 2 + call % kCalls / 4];
      to[0 * kCalls] = first ^ key1(1);
      to[1 * kCalls] = second ^ key0(2);
      to[2 * kCalls] = third >> 32 ^ key1(2);
      to[3 * kCalls] = third;
    }
  }

  // The draws of a row's columns, up to a whole number of kColumns.
  template <Isa isa>
  MTFAST_INLINE void draw(const RowDraws& from, int64_t row, uint16_t* to) {
    using V = std::conditional_t<is_avx512(isa), u64x8, std::conditional_t<isa == Isa::kAvx2, u64x4, u64x2>>;
    constexpr int kLanesOfV = sizeof(V) / sizeof(uint64_t);
    uint64_t key0[kPhiloxRounds], key1[kPhiloxRounds];  // which no store can change
#pragma GCC unroll 8
    for (int round = 0; round < kPhiloxRounds; ++round)
      key0[round] = from.key0(round), key1[round] = from.key1(round);
    const uint64_t of_row = kTimes0 * (static_cast<uint32_t>(row) ^ key0[0]);
    const uint64_t* const end = from.terms_.data() + from.terms_.size();
    for (const uint64_t* term = from.terms_.data(); term != end; term += kTerms * kCalls, to += kColumns)
      for (int lane = 0; lane < kCalls; lane += kLanesOfV) {
        // Words are in the lower halves of lanes; what is in the upper ones does not matter.
        const uint64_t* const of = term + lane;
        V at_1 = times<isa>(kTimes1, lanes<V>(of) ^ of_row >> 32), at_0;
        V c0 = at_1 >> 32 ^ lanes<V>(of + kCalls), c1 = at_1;
        V c2 = lanes<V>(of + 2 * kCalls) ^ (of_row & kLow), c3 = lanes<V>(of + 3 * kCalls);
#pragma GCC unroll 4
        for (int round = 3; round < kPhiloxRounds - 1; ++round) {
          at_0 = times<isa>(kTimes0, c0);
          at_1 = times<isa>(kTimes1, c2);
          c0 = at_1 >> 32 ^ c1 ^ key0[round];
          c2 = at_0 >> 32 ^ c3 ^ key1[round];
          c1 = at_1;
          c3 = at_0;
        }
        // The last round: two words in each lane. A call's are in two vectors, of which pairs of lanes change
        // places.
        at_0 = times<isa>(kTimes0, c0);
        at_1 = times<isa>(kTimes1, c2);
        const V low = (at_1 >> 32 | at_1 << 32) ^ ((c1 ^ key0[kPhiloxRounds - 1]) & kLow);
        const V high = (at_0 >> 32 | at_0 << 32) ^ ((c3 ^ key1[kPhiloxRounds - 1]) & kLow);
        V even, odd;
#pragma GCC unroll 8
        for (int i = 0; i < kLanesOfV; ++i) {
          even[i] = i % 2 * kLanesOfV + i / 2 * 2;
          odd[i] = even[i] + 1;
        }
        const V calls[2] = {__builtin_shuffle(low, high, even), __builtin_shuffle(low, high, odd)};
        std::memcpy(to + lane * 4, &calls[0], sizeof(V));
        std::memcpy(to + lane * 4 + kColumns / 2, &calls[1], sizeof(V));
      }
  }

 private:
  template <class V>
  MTFAST_INLINE V lanes(const uint64_t* p) {
    V x;
    std::memcpy(&x, p, sizeof x);
    return x;
  }

  // All bits of the product with the lower halves: the instruction that compilers do not find.
  template <Isa isa, class V>
  MTFAST_INLINE V times(uint64_t multiplier, V x) {
#if defined(__x86_64__) && defined(__GNUC__)
    if constexpr (isa == Isa::kGeneric)
      asm("pmuludq %1, %0" : "+x"(x) : "x"(V{} + multiplier));
    else
      asm("vpmuludq %1, %0, %0" : "+v"(x) : "v"(V{} + multiplier));
    return x;
#else
    return (x & kLow) * multiplier;
#endif
  }
};

}  // namespace mtfast::dropout_add_layer_norm
