// mask_tokens in CUDA: "bernoulli" is one pass, four tokens a thread, so that one Philox call serves four
// draws; "exact" gives each sequence a block, which finds the largest draw it chooses by radix selection.
#include "device/reduce.cuh"
#include "device/runtime.cuh"
#include "mask_tokens.h"

namespace mtfast::mask_tokens {
namespace {

constexpr int kBernoulliThreads = 256;
constexpr int kExactThreads = 128;
constexpr int kBins = 256;  // one radix digit
constexpr int64_t kMostCachedDraws = 8192;

__device__ __forceinline__ uint32_t pick(const Philox4& draw, int64_t position) {
  const uint32_t low = position & 1 ? draw.word[1] : draw.word[0];
  const uint32_t high = position & 1 ? draw.word[3] : draw.word[2];
  return position & 2 ? high : low;
}

// Draws of one purpose; neighbouring positions share a Philox call.
class Draws {
 public:
  __device__ __forceinline__ Draws(uint64_t seed, Purpose purpose) : seed_(seed), purpose_(purpose) {}

  __device__ __forceinline__ uint32_t operator()(int64_t position) {
    const int64_t group = position >> 2;
    if (!valid_ || group != group_) {
      draw_ = draw4(seed_, purpose_, static_cast<uint64_t>(group));
      group_ = group;
      valid_ = true;
    }
    return pick(draw_, position);
  }

 private:
  uint64_t seed_;
  Purpose purpose_;
  bool valid_ = false;
  int64_t group_ = 0;
  Philox4 draw_;
};

template <class Id>
struct Tokens {
  const Batch& batch;
  const Options& options;

  __device__ __forceinline__ int64_t id(int64_t i) const {
    return static_cast<const Id*>(batch.input_ids)[i];
  }
  __device__ __forceinline__ int64_t position(int64_t i) const {
    return batch.positions ? batch.positions[i] : i;
  }
  __device__ __forceinline__ bool ordinary(int64_t id) const {
    return id >= 0 && id < options.vocab_size && !options.special.contains(id);
  }
  // Whether ordinary token i continues the word of the token before it; `begin` is its sequence's first
  // token.
  __device__ __forceinline__ bool goes_on(int64_t i, int64_t begin) const {
    return i > begin && batch.subword[id(i)] && ordinary(id(i - 1));
  }
  __device__ __forceinline__ int64_t word_start(int64_t i, int64_t begin) const {
    while (goes_on(i, begin)) --i;
    return i;
  }
  // Where sequence s begins or, for s = sequences, the last one ends. Offsets are moved into the batch: then
  // whatever they are, sequences cover all tokens from the first bound to the last one.
  __device__ __forceinline__ int64_t bound(int64_t s) const {
    if (!batch.cu_seqlens) return s * batch.row_length;
    const int64_t at = batch.cu_seqlens[s];
    return at < 0 ? 0 : at < batch.total ? at : batch.total;
  }
  // Where the sequence of token i begins; i itself where offsets say that it begins later.
  __device__ __forceinline__ int64_t sequence_begin(int64_t i) const {
    if (!batch.cu_seqlens) return i - static_cast<uint32_t>(i) % static_cast<uint32_t>(batch.row_length);
    int32_t low = 0,
            high = static_cast<int32_t>(batch.sequences);  // the last sequence that begins at or before i
    while (high - low > 1) {
      const int32_t middle = low + (high - low) / 2;
      (batch.cu_seqlens[middle] <= i ? low : high) = middle;
    }
    const int64_t begin = bound(low);
    return begin < i ? begin : i;
  }
};

template <class T>
struct alignas(16) Four {
  T value[4];
};

// kPositions: positions are looked up token by token, as whole words need even where they are the flat index.
template <class Id, bool kPositions, bool kWords>
__global__ void __launch_bounds__(kBernoulliThreads, 4)
    bernoulli(Batch batch, Options options, Id* output, Id* labels, bool aligned) {
  const int64_t first = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * 4;
  if (first >= batch.total) return;
  const Tokens<Id> tokens{batch, options};
  const bool whole = aligned && first + 4 <= batch.total;
  Four<Id> id, label;
  Four<int64_t> position;
  if (whole) {
    id = *reinterpret_cast<const Four<Id>*>(static_cast<const Id*>(batch.input_ids) + first);
    if (kPositions && batch.positions)
      position = *reinterpret_cast<const Four<int64_t>*>(batch.positions + first);
    else if (kPositions)
      position = {first, first + 1, first + 2, first + 3};
  } else {
    MTFAST_UNROLL
    for (int t = 0; t < 4; ++t) {
      const int64_t i = first + t < batch.total ? first + t : first;
      id.value[t] = static_cast<Id>(tokens.id(i));
      if (kPositions) position.value[t] = tokens.position(i);
    }
  }
  Philox4 choose, replace;
  if (!kPositions) choose = draw4(options.seed, Purpose::kMaskChoose, static_cast<uint64_t>(first >> 2));
  Draws choose_by_position(options.seed, Purpose::kMaskChoose);
  Draws replace_by_position(options.seed, Purpose::kMaskReplace);
  bool chosen[4], any = false;
  MTFAST_UNROLL
  for (int t = 0; t < 4; ++t) {
    chosen[t] = first + t < batch.total && tokens.ordinary(id.value[t]);
    if (kWords) {
      if (chosen[t]) {
        const int64_t start = tokens.word_start(first + t, tokens.sequence_begin(first + t));
        chosen[t] = choose_by_position(tokens.position(start)) < options.choose_below;
      }
    } else {
      const uint32_t draw = kPositions ? choose_by_position(position.value[t]) : choose.word[t];
      chosen[t] &= draw < options.choose_below;
    }
    any |= chosen[t];
    label.value[t] = chosen[t] ? id.value[t] : static_cast<Id>(-100);
  }
  if (any) {
    if (!kPositions) replace = draw4(options.seed, Purpose::kMaskReplace, static_cast<uint64_t>(first >> 2));
    MTFAST_UNROLL
    for (int t = 0; t < 4; ++t) {
      if (!chosen[t]) continue;
      const uint32_t draw = kPositions ? replace_by_position(position.value[t]) : replace.word[t];
      id.value[t] = static_cast<Id>(replacement(options, draw, id.value[t]));
    }
  }
  if (whole) {
    *reinterpret_cast<Four<Id>*>(output + first) = id;
    *reinterpret_cast<Four<Id>*>(labels + first) = label;
  } else {
    MTFAST_UNROLL
    for (int t = 0; t < 4; ++t) {
      if (first + t >= batch.total) break;
      output[first + t] = id.value[t];
      labels[first + t] = label.value[t];
    }
  }
}

// Shared memory of the "exact" kernel; the first `cached` draws of the sequence follow it.
struct Selection {
  uint32_t bins[kBins];
  uint32_t candidates;
  uint32_t digit;      // the bin in which the selected draw is,
  uint32_t remaining;  // and which of it, counted from 1
};

// One warp: the bin that holds the `remaining`-th smallest, and which of that bin it is.
__device__ __forceinline__ void find_bin(Selection* selection) {
  const int lane = static_cast<int>(threadIdx.x);
  constexpr int kEach = kBins / 32;
  const uint32_t remaining = selection->remaining;
  uint32_t sum = 0;
  for (int b = 0; b < kEach; ++b) sum += selection->bins[lane * kEach + b];
  uint32_t before = warp_inclusive_sum(sum) - sum;
  __syncwarp();
  if (before >= remaining || before + sum < remaining) return;
  for (int b = lane * kEach;; ++b) {
    const uint32_t here = selection->bins[b];
    if (before + here >= remaining) {
      selection->digit = static_cast<uint32_t>(b);
      selection->remaining = remaining - before;
      return;
    }
    before += here;
  }
}

template <class Id, bool kWords>
__global__ void __launch_bounds__(kExactThreads, 8)
    exact(Batch batch, Options options, Id* output, Id* labels, int cached) {
  Selection* selection = shared_memory<Selection>();
  uint32_t* cache = reinterpret_cast<uint32_t*>(selection + 1);
  const Tokens<Id> tokens{batch, options};
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t sequence = blockIdx.x;
  // Tokens before the first sequence and after the last one, of which there should be none, stay as they are.
  const auto pass = [&](int64_t first, int64_t past) {
    for (int64_t i = first + thread; i < past; i += kExactThreads) {
      output[i] = static_cast<Id>(tokens.id(i));
      labels[i] = static_cast<Id>(-100);
    }
  };
  if (sequence == 0) pass(0, tokens.bound(0));
  if (sequence + 1 >= batch.sequences) pass(tokens.bound(batch.sequences), batch.total);
  if (sequence >= batch.sequences) return;
  const int64_t begin = tokens.bound(sequence), end = tokens.bound(sequence + 1);
  if (begin >= end) return;
  Draws choose(options.seed, Purpose::kMaskChoose);
  Draws replace(options.seed, Purpose::kMaskReplace);
  const auto draw_of = [&](int64_t i) {
    return i - begin < cached ? cache[i - begin] : choose(tokens.position(i));
  };
  const auto candidate = [&](int64_t i) {
    return tokens.ordinary(tokens.id(i)) && !(kWords && tokens.goes_on(i, begin));
  };
  // Every thread takes four neighbours at a time: with default positions they share a Philox call.
  const auto for_tokens = [&](auto f) {
    for (int64_t group = (begin >> 2) + thread; 4 * group < end; group += kExactThreads)
      for (int64_t i = 4 * group; i < 4 * group + 4; ++i)
        if (i >= begin && i < end) f(i);
  };

  if (thread == 0) selection->candidates = 0;
  __syncthreads();
  uint32_t count = 0;
  for_tokens([&](int64_t i) {
    if (i - begin < cached) cache[i - begin] = choose(tokens.position(i));
    count += candidate(i);
  });
  count = warp_sum(count);
  if (thread % 32 == 0) atomicAdd(&selection->candidates, count);
  __syncthreads();
  if (thread == 0)
    selection->remaining = static_cast<uint32_t>(exact_count(options.mlm_probability, selection->candidates));

  // The digits of the largest chosen draw, from the highest on; afterwards `remaining` of the draws equal to
  // it are chosen, the first ones.
  uint32_t cutoff = 0;
  const bool none = selection->candidates == 0;
  for (int shift = 24; shift >= 0 && !none; shift -= 8) {
    for (int b = thread; b < kBins; b += kExactThreads) selection->bins[b] = 0;
    __syncthreads();
    for_tokens([&](int64_t i) {
      if (!candidate(i)) return;
      const uint32_t draw = draw_of(i);
      if ((uint64_t{draw} >> (shift + 8)) == (uint64_t{cutoff} >> (shift + 8)))
        atomicAdd(&selection->bins[draw >> shift & (kBins - 1)], 1u);
    });
    __syncthreads();
    if (thread < 32) find_bin(selection);
    __syncthreads();
    cutoff |= selection->digit << shift;
  }
  const auto chosen = [&](int64_t i) {  // for a candidate
    const uint32_t draw = draw_of(i);
    if (draw != cutoff) return draw < cutoff;
    uint32_t before = 0;
    for (int64_t j = begin; j < i; ++j) before += candidate(j) && draw_of(j) == cutoff;
    return before < selection->remaining;
  };
  for_tokens([&](int64_t i) {
    const int64_t id = tokens.id(i);
    const bool is_chosen = !none && tokens.ordinary(id) && chosen(kWords ? tokens.word_start(i, begin) : i);
    labels[i] = is_chosen ? static_cast<Id>(id) : static_cast<Id>(-100);
    output[i] = is_chosen ? static_cast<Id>(replacement(options, replace(tokens.position(i)), id))
                          : static_cast<Id>(id);
  });
}

bool aligned_to_16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

template <class Id>
int launch(const Batch& batch, const Options& options, bool is_exact, Id* output, Id* labels, void* stream) {
  if (is_exact) {
    // Without a sync the longest packed sequence is unknown: draws beyond the cache are made again when
    // needed.
    const int64_t sequences = batch.sequences > 0 ? batch.sequences : 1;
    const int64_t longest = batch.cu_seqlens ? 4 * (batch.total / sequences + 1) : batch.row_length;
    const int64_t cached = longest < kMostCachedDraws ? longest : kMostCachedDraws;
    const size_t bytes = sizeof(Selection) + static_cast<size_t>(cached) * sizeof(uint32_t);
    const dim3 grid(static_cast<unsigned>(sequences));
    if (batch.subword)
      return MTFAST_LAUNCH(grid, dim3(kExactThreads), bytes, stream, (exact<Id, true>), batch, options,
                           output, labels, static_cast<int>(cached));
    return MTFAST_LAUNCH(grid, dim3(kExactThreads), bytes, stream, (exact<Id, false>), batch, options, output,
                         labels, static_cast<int>(cached));
  }
  const bool aligned = aligned_to_16(batch.input_ids) && aligned_to_16(batch.positions) &&
                       aligned_to_16(output) && aligned_to_16(labels);
  const int64_t each = 4 * kBernoulliThreads;
  const dim3 grid(static_cast<unsigned>((batch.total + each - 1) / each)), threads(kBernoulliThreads);
  if (batch.subword)
    return MTFAST_LAUNCH(grid, threads, 0, stream, (bernoulli<Id, true, true>), batch, options, output,
                         labels, aligned);
  if (batch.positions)
    return MTFAST_LAUNCH(grid, threads, 0, stream, (bernoulli<Id, true, false>), batch, options, output,
                         labels, aligned);
  return MTFAST_LAUNCH(grid, threads, 0, stream, (bernoulli<Id, false, false>), batch, options, output,
                       labels, aligned);
}

}  // namespace
}  // namespace mtfast::mask_tokens

extern "C" int mtfast_mask_tokens(const mtfast::mask_tokens::Batch* batch,
                                  const mtfast::mask_tokens::Options* options, int id_bytes, int exact,
                                  void* output_ids, void* labels, void* stream) {
  using namespace mtfast::mask_tokens;
  if (batch->total == 0) return 0;
  if (id_bytes == 8)
    return launch(*batch, *options, exact != 0, static_cast<int64_t*>(output_ids),
                  static_cast<int64_t*>(labels), stream);
  return launch(*batch, *options, exact != 0, static_cast<int32_t*>(output_ids),
                static_cast<int32_t*>(labels), stream);
}
