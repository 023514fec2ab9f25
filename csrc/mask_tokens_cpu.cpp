// mask_tokens on the CPU. Dense work (draws, copies, flags) runs over all tokens and is vectorised by the
// compiler; what is done to chosen tokens runs over lists of them.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <type_traits>
#include <vector>

#include "mask_tokens.h"

// One build serves every x86-64 machine: the dense loops are compiled three times and picked when loaded.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__)
#define MTFAST_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define MTFAST_CLONES
#endif

namespace mtfast::mask_tokens {
namespace {

constexpr int64_t kBlock = 1024;         // tokens whose scratch arrays stay in the first-level cache
constexpr int64_t kGrain = 16 * kBlock;  // tokens below which a second thread costs more than it does

// out[4 * g + w] is word w of group first_group + g.
MTFAST_CLONES void draw_groups(uint64_t seed, Purpose purpose, uint64_t first_group, int64_t groups,
                               uint32_t* __restrict out) {
  for (int64_t g = 0; g < groups; ++g) {
    const Philox4 draw = draw4(seed, purpose, first_group + static_cast<uint64_t>(g));
    for (int w = 0; w < 4; ++w) out[4 * g + w] = draw.word[w];
  }
}

MTFAST_CLONES void draw_each(uint64_t seed, Purpose purpose, const int64_t* __restrict positions, int64_t n,
                             uint32_t* __restrict out) {
  for (int64_t i = 0; i < n; ++i) {
    const Philox4 draw = draw4(seed, purpose, static_cast<uint64_t>(positions[i] >> 2));
    const uint32_t word = positions[i] & 3;
    const uint32_t low = word & 1 ? draw.word[1] : draw.word[0],
                   high = word & 1 ? draw.word[3] : draw.word[2];
    out[i] = word & 2 ? high : low;
  }
}

MTFAST_CLONES bool consecutive(const int64_t* __restrict positions, int64_t n) {
  uint64_t differs = 0;
  for (int64_t i = 0; i < n; ++i)  // in unsigned arithmetic, which wraps
    differs |= (static_cast<uint64_t>(positions[i]) - static_cast<uint64_t>(i)) ^
               static_cast<uint64_t>(positions[0]);
  return differs == 0;
}

// The draws of n tokens; returns where they are in `space`, which holds n + 8.
const uint32_t* choice_draws(const Batch& batch, uint64_t seed, int64_t first, int64_t n, uint32_t* space) {
  const int64_t* positions = batch.positions ? batch.positions + first : nullptr;
  if (positions && !consecutive(positions, n)) {
    draw_each(seed, Purpose::kMaskChoose, positions, n, space);
    return space;
  }
  const int64_t start = positions ? positions[0] : first;
  const int64_t offset = start & 3;
  draw_groups(seed, Purpose::kMaskChoose, static_cast<uint64_t>(start >> 2), (offset + n + 3) / 4, space);
  return space + offset;
}

// Copies the ids, labels them all -100 and says whether they are all in the vocabulary.
template <class Id>
MTFAST_HOST_DEVICE bool copy_all(const Id* __restrict ids, Id* __restrict output, Id* __restrict labels,
                                 int64_t n, uint64_t vocab_size) {
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
MTFAST_CLONES bool copy(const int32_t* ids, int32_t* output, int32_t* labels, int64_t n,
                        uint64_t vocab_size) {
  return copy_all(ids, output, labels, n, vocab_size);
}
MTFAST_CLONES bool copy(const int64_t* ids, int64_t* output, int64_t* labels, int64_t n,
                        uint64_t vocab_size) {
  return copy_all(ids, output, labels, n, vocab_size);
}

// flags[i] = 1 where the token is not special; returns how many.
template <class Id>
MTFAST_HOST_DEVICE int64_t flag_ordinary(const SpecialIds& special, const Id* __restrict ids, int64_t n,
                                         uint8_t* __restrict flags) {
  for (int64_t i = 0; i < n; ++i) flags[i] = 1;
  for (int r = 0; r < special.count; ++r) {
    const Id begin = special.begin[r], end = special.end[r];
    for (int64_t i = 0; i < n; ++i) flags[i] &= static_cast<uint8_t>((ids[i] < begin) | (ids[i] >= end));
  }
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) count += flags[i];
  return count;
}
MTFAST_CLONES int64_t flag(const SpecialIds& special, const int32_t* ids, int64_t n, uint8_t* flags) {
  return flag_ordinary(special, ids, n, flags);
}
MTFAST_CLONES int64_t flag(const SpecialIds& special, const int64_t* ids, int64_t n, uint8_t* flags) {
  return flag_ordinary(special, ids, n, flags);
}

template <class Id>
class Masking {
 public:
  Masking(const Batch& batch, const Options& options, bool exact, Id* output, Id* labels)
      : batch_(batch),
        options_(options),
        exact_(exact),
        ids_(static_cast<const Id*>(batch.input_ids)),
        output_(output),
        labels_(labels) {}

  int64_t run(const ParallelFor& parallel_for) {
    if (!exact_ && !batch_.subword) {  // every token for itself
      const int64_t blocks = (batch_.total + kBlock - 1) / kBlock;
      parallel_for(blocks, kGrain / kBlock, [this](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b)
          bernoulli_block(b * kBlock, std::min(batch_.total, (b + 1) * kBlock));
      });
    } else {
      const int64_t grain = std::max<int64_t>(1, kGrain * batch_.sequences / batch_.total);
      parallel_for(batch_.sequences, grain, [this](int64_t begin, int64_t end) {
        Scratch scratch;
        for (int64_t s = begin; s < end; ++s) {
          const bool packed = batch_.cu_seqlens;
          sequence(packed ? batch_.cu_seqlens[s] : s * batch_.row_length,
                   packed ? batch_.cu_seqlens[s + 1] : (s + 1) * batch_.row_length, scratch);
        }
      });
    }
    return outside_;
  }

 private:
  struct Scratch {
    std::vector<uint32_t> draws;
    std::vector<uint8_t> candidate, starts;
    std::vector<int32_t> chosen;
    std::vector<uint64_t> keys;
  };

  bool copy_range(int64_t begin, int64_t end) {
    if (copy(ids_ + begin, output_ + begin, labels_ + begin, end - begin, options_.vocab_size)) return true;
    const auto outside = [this](Id id) { return id < 0 || id >= options_.vocab_size; };
    outside_ = std::find_if(ids_ + begin, ids_ + end, outside) - ids_;
    return false;
  }

  void bernoulli_block(int64_t begin, int64_t end) {
    if (!copy_range(begin, end)) return;
    const int64_t n = end - begin;
    uint32_t space[kBlock + 8];
    int32_t chosen[kBlock + 1];
    const uint32_t* draws = choice_draws(batch_, options_.seed, begin, n, space);
    int64_t count = 0;
    for (int64_t i = 0; i < n; ++i) {
      chosen[count] = static_cast<int32_t>(i);
      count += draws[i] < options_.choose_below;
    }
    int64_t kept = 0;
    for (int64_t c = 0; c < count; ++c) {
      chosen[kept] = chosen[c];
      kept += !options_.special.contains(ids_[begin + chosen[c]]);
    }
    replace(begin, chosen, kept);
  }

  void sequence(int64_t begin, int64_t end, Scratch& scratch) {
    const int64_t n = end - begin;
    if (n == 0 || !copy_range(begin, end)) return;
    scratch.draws.resize(n + 8);
    scratch.candidate.resize(n);
    scratch.chosen.resize(n + 1);
    const uint32_t* draws = choice_draws(batch_, options_.seed, begin, n, scratch.draws.data());
    uint8_t* candidate = scratch.candidate.data();
    int64_t candidates = flag(options_.special, ids_ + begin, n, candidate);
    if (batch_.subword) {  // candidates become the first pieces of words
      scratch.starts.assign(n, 0);
      candidates = 0;
      for (int64_t i = 0; i < n; ++i) {
        const bool goes_on = i > 0 && candidate[i - 1] && batch_.subword[ids_[begin + i]];
        candidates += scratch.starts[i] = candidate[i] && !goes_on;
      }
    }
    const uint8_t* starts = batch_.subword ? scratch.starts.data() : candidate;
    int32_t* chosen = scratch.chosen.data();
    int64_t count;
    if (exact_) {
      count =
          smallest(draws, starts, n, exact_count(options_.mlm_probability, candidates), candidates, scratch);
    } else {
      count = 0;
      for (int64_t i = 0; i < n; ++i) {
        chosen[count] = static_cast<int32_t>(i);
        count += starts[i] && draws[i] < options_.choose_below;
      }
    }
    if (batch_.subword) count = whole_words(candidate, starts, n, count, scratch);
    replace(begin, chosen, count);
  }

  // Lists in scratch.chosen the `wanted` candidates with the smallest draws, ties by their order.
  int64_t smallest(const uint32_t* draws, const uint8_t* starts, int64_t n, int64_t wanted,
                   int64_t candidates, Scratch& scratch) {
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
        count += starts[i] & (draws[i] < below);
      }
    }
    if (wanted < count) std::nth_element(keys, keys + wanted, keys + count);
    for (int64_t c = 0; c < wanted; ++c) scratch.chosen[c] = static_cast<int32_t>(keys[c]);
    return wanted;
  }

  // Adds to the chosen first pieces the rest of their words.
  int64_t whole_words(const uint8_t* candidate, const uint8_t* starts, int64_t n, int64_t count,
                      Scratch& scratch) {
    const int64_t words = count;
    for (int64_t c = 0; c < words; ++c)
      for (int64_t i = scratch.chosen[c] + 1; i < n && candidate[i] && !starts[i]; ++i)
        scratch.chosen[count++] = static_cast<int32_t>(i);
    return count;
  }

  void replace(int64_t begin, const int32_t* chosen, int64_t count) {
    int64_t positions[kBlock];
    uint32_t draws[kBlock];
    for (int64_t done = 0; done < count; done += kBlock) {
      const int64_t n = std::min(kBlock, count - done);
      for (int64_t c = 0; c < n; ++c) {
        const int64_t token = begin + chosen[done + c];
        positions[c] = batch_.positions ? batch_.positions[token] : token;
      }
      draw_each(options_.seed, Purpose::kMaskReplace, positions, n, draws);
      for (int64_t c = 0; c < n; ++c) {
        const int64_t token = begin + chosen[done + c];
        labels_[token] = ids_[token];
        output_[token] = static_cast<Id>(replacement(options_, draws[c], ids_[token]));
      }
    }
  }

  const Batch& batch_;
  const Options& options_;
  const bool exact_;
  const Id* const ids_;
  Id* const output_;
  Id* const labels_;
  std::atomic<int64_t> outside_{-1};
};

}  // namespace

int64_t mask_tokens_cpu(const Batch& batch, const Options& options, bool wide, bool exact, void* output_ids,
                        void* labels, const ParallelFor& parallel_for) {
  if (wide)
    return Masking<int64_t>(batch, options, exact, static_cast<int64_t*>(output_ids),
                            static_cast<int64_t*>(labels))
        .run(parallel_for);
  return Masking<int32_t>(batch, options, exact, static_cast<int32_t*>(output_ids),
                          static_cast<int32_t*>(labels))
      .run(parallel_for);
}

}  // namespace mtfast::mask_tokens
