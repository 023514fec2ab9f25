// mask_tokens: what the C++ binding, the CPU implementation and the CUDA kernels share. No torch types.
#pragma once
#include <cstdint>
#include <functional>

#include "device/philox.cuh"

namespace mtfast::mask_tokens {

constexpr int kMaxRuns = 64;

// The special ids as sorted, disjoint runs [begin, end): vocabularies keep them together. Passed to the
// kernels by value.
struct SpecialIds {
  int32_t count = 0;
  int32_t total = 0;  // ids in all runs
  int32_t begin[kMaxRuns], end[kMaxRuns];

  // Not unrolled, since that would be most of a kernel's code.
  MTFAST_HOST_DEVICE bool contains(int64_t id) const {
    bool found = false;
    MTFAST_NO_UNROLL
    for (int r = 0; r < count; ++r) found |= id >= begin[r] && id < end[r];
    return found;
  }
  // The index-th id (from 0) that is not special.
  MTFAST_HOST_DEVICE int64_t ordinary(int64_t index) const {
    for (int r = 0; r < count && index >= begin[r]; ++r) index += end[r] - begin[r];
    return index;
  }
};

struct Options {
  SpecialIds special;
  int64_t vocab_size;
  int64_t mask_token_id;
  uint64_t seed;
  const int64_t* seed_tensor;  // or null: where the CUDA kernels find the seed, in place of `seed`
  double mlm_probability;
  uint64_t choose_below;  // a draw of 32 bits is compared with these: 2^32 means always
  uint64_t mask_below;    // a replacement draw below it gives [MASK],
  uint64_t random_below;  // one below this a random ordinary token, any other leaves the token
  uint64_t random_scale;  // ordinary ids << random_shift over the draws that give a random token: a division
  int32_t random_shift;   // by multiplying, as exact as 63 bits allow
};

struct Batch {
  const void* input_ids;      // int32 or int64
  const int64_t* positions;   // or null: the flat index
  const int32_t* cu_seqlens;  // or null: every sequence has row_length tokens
  const bool* subword;        // or null: [vocab_size], marks continuation pieces
  int64_t total, sequences, row_length;
};

// How many of a sequence's candidates "exact" chooses: max(1, floor(p * candidates + 1/2)), or 0 of none. The
// product is rounded before the sum, as Python and NumPy do, so that the host knows the number.
MTFAST_HOST_DEVICE int64_t exact_count(double p, int64_t candidates) {
  if (candidates == 0) return 0;
#if defined(__CUDA_ARCH__)
  const double product = __dmul_rn(p, static_cast<double>(candidates));
#else
  volatile double product = p * static_cast<double>(candidates);
#endif
  const int64_t count = static_cast<int64_t>(product + 0.5);
  return count < 1 ? 1 : count;
}

// What a chosen token becomes, by its replacement draw.
MTFAST_HOST_DEVICE int64_t replacement(const Options& options, uint32_t draw, int64_t id) {
  if (draw < options.mask_below) return options.mask_token_id;
  if (draw >= options.random_below) return id;
  // What the draw has left is uniform; scale it to the ordinary ids.
  const uint64_t left = draw - options.mask_below;
  return options.special.ordinary(static_cast<int64_t>(left * options.random_scale >> options.random_shift));
}

using Body = std::function<void(int64_t begin, int64_t end)>;
using ParallelFor = std::function<void(int64_t count, int64_t grain, const Body& body)>;

// Returns the index of a token outside the vocabulary, or -1 when there is none.
int64_t mask_tokens_cpu(const Batch& batch, const Options& options, bool wide, bool exact, void* output_ids,
                        void* labels, const ParallelFor& parallel_for);

}  // namespace mtfast::mask_tokens

// Launch functions: 0 or a cudaError_t. labels and output_ids have input_ids' dtype; id_bytes is 4 or 8.
extern "C" int mtfast_mask_tokens(const mtfast::mask_tokens::Batch* batch,
                                  const mtfast::mask_tokens::Options* options, int id_bytes, int exact,
                                  void* output_ids, void* labels, void* stream);
