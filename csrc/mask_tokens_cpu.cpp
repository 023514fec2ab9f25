// mask_tokens on the CPU. Dense work (draws, copies, flags) runs over all tokens and is vectorised by the
// compiler; what is done to chosen tokens runs over lists of them.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <type_traits>
#include <vector>

#include "mask_tokens.h"
#include "simd_isa.h"

namespace mtfast::mask_tokens {
namespace {

constexpr int64_t kBlock = 1024;         // tokens whose scratch arrays stay in the first-level cache
constexpr int64_t kGrain = 16 * kBlock;  // tokens below which a second thread costs more than it does

// What a token of a sequence is. Candidates begin words where those are chosen, which others continue.
enum Kind : uint8_t { kSpecial = 0, kCandidate = 1, kContinues = 2 };

struct Scratch {
  std::vector<uint32_t> draws;
  std::vector<uint8_t> kind;
  std::vector<int32_t> chosen;
  std::vector<uint64_t> keys;
};

MTFAST_INLINE void draw_each(uint64_t seed, Purpose purpose, const int64_t* __restrict positions, int64_t n,
                             uint32_t* __restrict out) {
  for (int64_t i = 0; i < n; ++i) {
    const Philox4 draw = draw4(seed, purpose, static_cast<uint64_t>(positions[i] >> 2));
    out[i] = draw.at(static_cast<int32_t>(positions[i]));  // SSE2 compares no lanes of 64 bits
  }
}

MTFAST_INLINE bool consecutive(const int64_t* __restrict positions, int64_t n) {
  uint64_t differs = 0;
  for (int64_t i = 0; i < n; ++i)  // in unsigned arithmetic, which wraps
    differs |= (static_cast<uint64_t>(positions[i]) - static_cast<uint64_t>(i)) ^
               static_cast<uint64_t>(positions[0]);
  return differs == 0;
}

// Copies the ids, labels them all -100 and says whether they are all in the vocabulary.
template <class Id>
MTFAST_INLINE bool copy(const Id* __restrict ids, Id* __restrict output, Id* __restrict labels, int64_t n,
                        int64_t vocab_size) {
  using Unsigned = std::make_unsigned_t<Id>;
  const Unsigned bound = static_cast<Unsigned>(vocab_size);
  Id outside = 0;
  for (int64_t i = 0; i < n; ++i) {
    output[i] = ids[i];
    labels[i] = -100;
    outside |= static_cast<Unsigned>(ids[i]) >= bound;
  }
  return !outside;
}

// Makes candidates of all tokens that are not special; returns how many.
template <class Id>
MTFAST_INLINE int64_t find_candidates(const SpecialIds& special, const Id* __restrict ids, int64_t n,
                                      uint8_t* __restrict kind) {
  for (int64_t i = 0; i < n; ++i) kind[i] = kCandidate;
  using Unsigned = std::make_unsigned_t<Id>;
  for (int r = 0; r < special.count; ++r) {
    const Unsigned begin = special.begin[r], length = special.end[r] - special.begin[r];
    for (int64_t i = 0; i < n; ++i) kind[i] &= static_cast<Unsigned>(ids[i]) - begin >= length;
  }
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) count += kind[i];
  return count;
}

template <class Id>
struct Masking {
  const Batch& batch;
  const Options& options;
  const bool exact;
  const Id* const ids;
  Id* const output;
  Id* const labels;
  std::atomic<int64_t>* outside;

  MTFAST_HOST_DEVICE void mask(int64_t begin, int64_t end, Scratch& scratch) const {
    const int64_t n = end - begin;
    if (n == 0) return;
    if (!copy(ids + begin, output + begin, labels + begin, n, options.vocab_size)) {
      const auto is_outside = [this](Id id) { return id < 0 || id >= options.vocab_size; };
      *outside = std::find_if(ids + begin, ids + end, is_outside) - ids;
    } else if (exact || batch.subword) {
      mask_sequence(begin, n, scratch);
    } else {
      mask_block(begin, n);
    }
  }

  // Of at most kBlock tokens, each for itself.
  MTFAST_HOST_DEVICE void mask_block(int64_t begin, int64_t n) const {
    uint32_t space[kBlock + 8];
    int32_t chosen[kBlock + 1];
    const uint32_t* draws = choice_draws(begin, n, space);
    const auto ordinary = [&](int32_t i) { return !options.special.contains(ids[begin + i]); };
    replace(begin, chosen, bernoulli(draws, n, chosen, ordinary));
  }

  MTFAST_HOST_DEVICE void mask_sequence(int64_t begin, int64_t n, Scratch& scratch) const {
    scratch.draws.resize(n + 8);
    scratch.kind.resize(n);
    scratch.chosen.resize(n + 1);
    const uint32_t* draws = choice_draws(begin, n, scratch.draws.data());
    uint8_t* kind = scratch.kind.data();
    int64_t candidates = find_candidates(options.special, ids + begin, n, kind);
    if (batch.subword) {
      for (int64_t i = 1; i < n; ++i) {
        if (kind[i] && kind[i - 1] && batch.subword[ids[begin + i]]) {
          kind[i] = kContinues;
          --candidates;
        }
      }
    }
    int32_t* chosen = scratch.chosen.data();
    int64_t count;
    if (exact)
      count = smallest(draws, kind, n, candidates, scratch);
    else
      count = bernoulli(draws, n, chosen, [=](int32_t i) { return kind[i] == kCandidate; });
    if (batch.subword) {  // the rest of the chosen words
      const int64_t words = count;
      for (int64_t w = 0; w < words; ++w)
        for (int32_t i = chosen[w] + 1; i < n && kind[i] == kContinues; ++i) chosen[count++] = i;
    }
    replace(begin, chosen, count);
  }

  // The draws of n tokens; returns where they are in `space`, which holds n + 8.
  MTFAST_HOST_DEVICE const uint32_t* choice_draws(int64_t begin, int64_t n, uint32_t* space) const {
    const int64_t* positions = batch.positions ? batch.positions + begin : nullptr;
    if (positions && !consecutive(positions, n)) {
      draw_each(options.seed, Purpose::kMaskChoose, positions, n, space);
      return space;
    }
    const int64_t start = positions ? positions[0] : begin, offset = start & 3;
    for (int64_t g = 0; 4 * g < offset + n; ++g) {
      const Philox4 draw = draw4(options.seed, Purpose::kMaskChoose, static_cast<uint64_t>((start >> 2) + g));
      for (int w = 0; w < 4; ++w) space[4 * g + w] = draw.word[w];
    }
    return space + offset;
  }

  // Lists the candidates that their draws choose. Few draws do: only those tokens are looked at.
  template <class IsCandidate>
  MTFAST_HOST_DEVICE int64_t bernoulli(const uint32_t* draws, int64_t n, int32_t* chosen,
                                       const IsCandidate& is_candidate) const {
    int64_t drawn = 0, count = 0;
    for (int64_t i = 0; i < n; ++i) {
      chosen[drawn] = static_cast<int32_t>(i);
      drawn += draws[i] < options.choose_below;
    }
    for (int64_t d = 0; d < drawn; ++d) {
      chosen[count] = chosen[d];
      count += is_candidate(chosen[d]);
    }
    return count;
  }

  // Lists in scratch.chosen the candidates with the smallest draws, ties by their order.
  MTFAST_HOST_DEVICE int64_t smallest(const uint32_t* draws, const uint8_t* kind, int64_t n,
                                      int64_t candidates, Scratch& scratch) const {
    const int64_t wanted = exact_count(options.mlm_probability, candidates);
    if (wanted == 0) return 0;
    // Few draws are worth a look: almost always enough of them are below p plus four standard deviations.
    const double p = static_cast<double>(wanted) / static_cast<double>(candidates);
    const double bound = p + 4 * std::sqrt(p * (1 - p) / static_cast<double>(candidates));
    scratch.keys.resize(n + 1);
    uint64_t* keys = scratch.keys.data();
    int64_t count = 0;
    for (uint64_t below = bound < 1 ? static_cast<uint64_t>(bound * 4294967296.0) : uint64_t{1} << 32;
         count < wanted; below = uint64_t{1} << 32) {
      count = 0;
      for (int64_t i = 0; i < n; ++i) {
        keys[count] = uint64_t{draws[i]} << 32 | static_cast<uint64_t>(i);
        count += (kind[i] & kCandidate) & (draws[i] < below);
      }
    }
    if (wanted < count) std::nth_element(keys, keys + wanted, keys + count);
    for (int64_t c = 0; c < wanted; ++c) scratch.chosen[c] = static_cast<int32_t>(keys[c]);
    return wanted;
  }

  MTFAST_HOST_DEVICE void replace(int64_t begin, const int32_t* chosen, int64_t count) const {
    int64_t positions[kBlock];
    uint32_t draws[kBlock];
    for (int64_t done = 0; done < count; done += kBlock) {
      const int64_t n = std::min(kBlock, count - done);
      for (int64_t c = 0; c < n; ++c) {
        const int64_t token = begin + chosen[done + c];
        positions[c] = batch.positions ? batch.positions[token] : token;
      }
      draw_each(options.seed, Purpose::kMaskReplace, positions, n, draws);
      for (int64_t c = 0; c < n; ++c) {
        const int64_t token = begin + chosen[done + c];
        labels[token] = ids[token];
        output[token] = static_cast<Id>(replacement(options, draws[c], ids[token]));
      }
    }
  }
};

// For simd::call_best: all of Masking is inlined here, once for each instruction set.
template <class Id>
struct MaskSequences {
  template <simd::Isa isa>
  MTFAST_INLINE void run(Masking<Id> masking, int64_t first, int64_t last) {
    const Batch& batch = masking.batch;
    Scratch scratch;
    for (int64_t s = first; s < last; ++s) {
      const bool packed = batch.cu_seqlens;
      masking.mask(packed ? batch.cu_seqlens[s] : s * batch.row_length,
                   packed ? batch.cu_seqlens[s + 1] : std::min(batch.total, (s + 1) * batch.row_length),
                   scratch);
    }
  }
};

template <class Id>
int64_t mask_all(Batch batch, const Options& options, bool exact, void* output_ids, void* labels,
                 const ParallelFor& parallel_for) {
  if (!exact && !batch.subword) {  // every token for itself: any blocks of them will do
    batch.cu_seqlens = nullptr;
    batch.sequences = (batch.total + kBlock - 1) / kBlock;
    batch.row_length = kBlock;
  }
  std::atomic<int64_t> outside{-1};
  const Id* ids = static_cast<const Id*>(batch.input_ids);
  Id *output = static_cast<Id*>(output_ids), *label = static_cast<Id*>(labels);
  const Masking<Id> masking{batch, options, exact, ids, output, label, &outside};
  const int64_t grain = std::max<int64_t>(1, kGrain * batch.sequences / batch.total);
  parallel_for(batch.sequences, grain, [&masking](int64_t begin, int64_t end) {
    simd::call_best(MaskSequences<Id>{}, masking, begin, end);
  });
  return outside;
}

}  // namespace

int64_t mask_tokens_cpu(const Batch& batch, const Options& options, bool wide, bool exact, void* output_ids,
                        void* labels, const ParallelFor& parallel_for) {
  const auto run = wide ? mask_all<int64_t> : mask_all<int32_t>;
  return run(batch, options, exact, output_ids, labels, parallel_for);
}

}  // namespace mtfast::mask_tokens
