// mask_tokens in CUDA.
//
// Floor: every id is read once, an id and a label are written: 24 bytes a token of int64, 12 of int32, and 8
// more for each look at the positions where they are given. A Philox call, some 50 instructions, serves four
// tokens; with the draws of the replacements and the tests for special ids that is about 100 instructions a
// token for "bernoulli" and 140 for "exact", of the 175 that an H200 issues while it moves 24 bytes: bounded
// by memory, but not by much. Out of reach: int32, whose bytes are half and whose instructions are not;
// positions that share no Philox calls; a few sequences, which take as long as one warp's chain of
// instructions.
//
// A warp's tile is 128 tokens, four a lane: one Philox call a lane, and loads and stores of 16 bytes in which
// neighbouring lanes are neighbours. "bernoulli" has two tiles of each warp under way. "exact" gives a warp
// the sequences of up to four tiles, so that nothing waits for a barrier, and the whole block a longer one;
// four warps a block, since more would need more than 48 KiB for their tiles.
#include "mask_tokens.cuh"

namespace mtfast::mask_tokens {
namespace {

constexpr int kBernoulliThreads = 256;
constexpr int kBernoulliTiles = 2;
constexpr int kExactWarps = 4, kExactThreads = 32 * kExactWarps;
constexpr int kCachedTiles = 4;

template <class Id, bool kWords>
__global__ void __launch_bounds__(kBernoulliThreads, 5) bernoulli(const Masking<Id> masking) {
  const uint32_t total = static_cast<uint32_t>(masking.batch.total);
  const uint32_t warp = (blockIdx.x * kBernoulliThreads + threadIdx.x) / 32;
  const uint64_t choose_below = masking.options.choose_below;
  const uint64_t cutoff = choose_below >> 32 ? kEverything : choose_below << 32;
  Tile<Id> tile[kBernoulliTiles];
  Id id[kBernoulliTiles][kTokens];
  MTFAST_UNROLL
  for (int n = 0; n < kBernoulliTiles; ++n) {
    tile[n].first = (warp * kBernoulliTiles + n) * kTile;
    masking.load_ids(tile[n], id[n]);
  }
  const uint64_t seed = masking.seed();
  MTFAST_UNROLL
  for (int n = 0; n < kBernoulliTiles; ++n) {
    bool pred[kTokens];
    uint32_t draw[kTokens];
    masking.ordinary(id[n], pred);
    if (!kWords) masking.draws(seed, Purpose::kMaskChoose, tile[n], pred, draw);
    MTFAST_UNROLL
    for (int t = 0; t < kTokens; ++t) {
      const uint32_t i = tile[n].token(t);
      if (kWords)
        pred[t] = pred[t] && masking.word_chosen(seed, i, masking.sequence_begin(i), cutoff);
      else
        pred[t] &= key(draw[t], i) < cutoff;
    }
    masking.write(seed, tile[n], 0, total, id[n], pred);
  }
}

// What the warps of "exact" keep of their first tiles. Every thread reads and writes its own part alone.
template <class Id>
struct Shared {
  Vector<Id> ids[kCachedTiles][Tile<Id>::kVectors][kExactThreads];
  Vector<uint32_t> draws[kCachedTiles][kExactThreads];
  uint32_t sum[kExactWarps];
};

// A sequence and the warps that have its tiles in turn: one warp, or all of the block.
template <class Id, bool kWords>
struct Sequence {
  const Masking<Id>& masking;
  uint64_t seed;
  Shared<Id>* shared;
  uint32_t begin, end;
  uint32_t warps, warp;
  uint32_t candidates;  // of the cached tiles, a bit a token

  __device__ __forceinline__ Tile<Id> tile(int n) const {
    return {(begin & ~3u) + kTile * (n * warps + warp)};
  }

  __device__ __forceinline__ void ids_of(int n, Id (&id)[kTokens]) const {
    if (n < kCachedTiles) {
      MTFAST_UNROLL
      for (int v = 0; v < Tile<Id>::kVectors; ++v) {
        memcpy(&id[v * Tile<Id>::kWide], &shared->ids[n][v][threadIdx.x], sizeof(Vector<Id>));
      }
    } else {
      masking.load_ids(tile(n), id);
    }
  }

  // Which tokens are candidates, and their draws.
  __device__ __forceinline__ void make(int n, bool (&pred)[kTokens], uint32_t (&draw)[kTokens]) const {
    Id id[kTokens];
    ids_of(n, id);
    masking.ordinary(id, pred);
    MTFAST_UNROLL
    for (int t = 0; t < kTokens; ++t) {
      const uint32_t i = tile(n).token(t);
      pred[t] &= i >= begin && i < end;
      if (kWords) pred[t] = pred[t] && !masking.goes_on(i, begin);
    }
    masking.draws(seed, Purpose::kMaskChoose, tile(n), pred, draw);
  }

  __device__ __forceinline__ void recall(int n, bool (&pred)[kTokens], uint32_t (&draw)[kTokens]) const {
    if (n >= kCachedTiles) return make(n, pred, draw);
    memcpy(draw, &shared->draws[n][threadIdx.x], sizeof draw);
    MTFAST_UNROLL
    for (int t = 0; t < kTokens; ++t) pred[t] = candidates >> (n * kTokens + t) & 1;
  }

  __device__ __forceinline__ void fill_cache() {
    // What is beyond the sequence is not read: of short ones that would be most of a tile.
    constexpr uint32_t kWide = Tile<Id>::kWide;
    const bool copied =
        masking.aligned && (end + kWide - 1) / kWide * kWide <= static_cast<uint32_t>(masking.batch.total);
    MTFAST_UNROLL
    for (int n = 0; n < kCachedTiles; ++n) {
      if (tile(n).first >= end) break;
      if (copied) {
        MTFAST_UNROLL
        for (int v = 0; v < Tile<Id>::kVectors; ++v) {
          const uint32_t first = tile(n).vector(v);
          if (first < end) ptx::cp_async_16(&shared->ids[n][v][threadIdx.x], masking.ids() + first);
        }
      } else {
        Id id[kTokens];
        masking.load_ids(tile(n), id);
        MTFAST_UNROLL
        for (int v = 0; v < Tile<Id>::kVectors; ++v)
          memcpy(&shared->ids[n][v][threadIdx.x], &id[v * Tile<Id>::kWide], sizeof(Vector<Id>));
      }
    }
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    candidates = 0;
#pragma unroll 1
    for (int n = 0; n < kCachedTiles && tile(n).first < end; ++n) {
      bool pred[kTokens];
      uint32_t draw[kTokens];
      make(n, pred, draw);
      memcpy(&shared->draws[n][threadIdx.x], draw, sizeof draw);
      MTFAST_UNROLL
      for (int t = 0; t < kTokens; ++t) candidates |= uint32_t{pred[t]} << (n * kTokens + t);
    }
  }

  // How many candidates' keys are below the cutoff.
  __device__ __forceinline__ uint32_t count(uint64_t cutoff) const {
    uint32_t sum = 0;
    MTFAST_UNROLL
    for (int n = 0; n < kCachedTiles; ++n)
      if (tile(n).first < end) sum += count_of(n, cutoff);
#pragma unroll 1
    for (int n = kCachedTiles; tile(n).first < end; ++n) sum += count_of(n, cutoff);
    sum = warp_sum(sum);
    if (warps == 1) return sum;
    if (threadIdx.x % 32 == 0) shared->sum[warp] = sum;
    __syncthreads();
    sum = 0;
    MTFAST_UNROLL
    for (int w = 0; w < kExactWarps; ++w) sum += shared->sum[w];
    __syncthreads();
    return sum;
  }
  __device__ __forceinline__ uint32_t count_of(int n, uint64_t cutoff) const {
    bool pred[kTokens];
    uint32_t draw[kTokens], sum = 0;
    recall(n, pred, draw);
    MTFAST_UNROLL
    for (int t = 0; t < kTokens; ++t) sum += pred[t] && key(draw[t], tile(n).token(t)) < cutoff;
    return sum;
  }

  // A cutoff below which as many keys are as are to be chosen. Draws are uniform, so that a few guesses find
  // one: where it would be if the keys between the two bounds lay evenly. Every fourth guess is the middle,
  // for draws that are not.
  __device__ __forceinline__ uint64_t find_cutoff() const {
    uint64_t low = 0, high = kEverything;
    uint32_t below_low = 0, below_high = count(high);
    const uint32_t wanted = static_cast<uint32_t>(exact_count(masking.options.mlm_probability, below_high));
#pragma unroll 1
    for (int guess = 1; below_high != wanted; ++guess) {
      const uint64_t span = high - low;
      const float share = __fdividef(static_cast<float>(wanted - below_low) + 0.5f,
                                     static_cast<float>(below_high - below_low + 1));
      const uint64_t step = guess % 4 ? static_cast<uint64_t>(static_cast<float>(span) * share) : span / 2;
      const uint64_t pivot = low + max(uint64_t{1}, min(step, span - 1));
      const uint32_t below = count(pivot);
      if (below < wanted) {
        low = pivot;
        below_low = below;
      } else {
        high = pivot;
        below_high = below;
      }
    }
    return high;
  }

  __device__ __forceinline__ void mask() {
    fill_cache();
    const uint64_t cutoff = find_cutoff();
#pragma unroll 1
    for (int n = 0; tile(n).first < end; ++n) {
      Id id[kTokens];
      bool pred[kTokens];
      uint32_t draw[kTokens];
      ids_of(n, id);
      if (kWords)
        masking.ordinary(id, pred);
      else
        recall(n, pred, draw);
      MTFAST_UNROLL
      for (int t = 0; t < kTokens; ++t) {
        const uint32_t i = tile(n).token(t);
        if (kWords)
          pred[t] = pred[t] && i >= begin && i < end && masking.word_chosen(seed, i, begin, cutoff);
        else
          pred[t] &= key(draw[t], i) < cutoff;
      }
      masking.write(seed, tile(n), begin, end, id, pred);
    }
  }
};

// Each block has `each` sequences.
template <class Id, bool kWords>
__global__ void __launch_bounds__(kExactThreads, kWords ? 6 : 8) exact(const Masking<Id> masking, int each) {
  const Batch& batch = masking.batch;
  const uint64_t seed = masking.seed();
  const uint32_t warp = threadIdx.x / 32;
  if (blockIdx.x == 0) {
    // Of tokens before the first sequence and after the last one there should be none.
    masking.keep(0, masking.bound(0));
    masking.keep(masking.bound(batch.sequences), static_cast<uint32_t>(batch.total));
    __syncthreads();
  }
  for (int n = 0; n < each; ++n) {
    const int64_t s = int64_t{blockIdx.x} * each + n;
    if (s >= batch.sequences) return;
    const uint32_t begin = masking.bound(s), end = masking.bound(s + 1);
    if (begin >= end) continue;
    const bool fits = end - (begin & ~3u) <= kCachedTiles * kTile;
    if (fits && n != static_cast<int>(warp)) continue;
    Sequence<Id, kWords> sequence{
        masking, seed, shared_memory<Shared<Id>>(), begin, end, fits ? 1u : kExactWarps, fits ? 0 : warp, 0};
    sequence.mask();
  }
}

template <class Id, bool kWords>
int launch(const Batch& batch, const Options& options, bool is_exact, void* output, void* labels,
           void* stream) {
  const bool aligned = on_16_bytes(batch.input_ids) && on_16_bytes(output) && on_16_bytes(labels);
  const Masking<Id> masking{batch, options, static_cast<Id*>(output), static_cast<Id*>(labels), aligned};
  if (is_exact) {
    // Without a sync the longest packed sequence is unknown; where they are long, each is to have a block.
    const int64_t sequences = batch.sequences > 0 ? batch.sequences : 1;
    const int each = batch.total / sequences > kCachedTiles * kTile ? 1 : kExactWarps;
    const dim3 grid(static_cast<unsigned>((sequences + each - 1) / each));
    return MTFAST_LAUNCH(grid, kExactThreads, sizeof(Shared<Id>), stream, (exact<Id, kWords>), masking, each);
  }
  const int64_t each = kBernoulliTiles * kTokens * kBernoulliThreads;
  const dim3 grid(static_cast<unsigned>((batch.total + each - 1) / each));
  return MTFAST_LAUNCH(grid, kBernoulliThreads, 0, stream, (bernoulli<Id, kWords>), masking);
}

}  // namespace
}  // namespace mtfast::mask_tokens

extern "C" int mtfast_mask_tokens(const mtfast::mask_tokens::Batch* batch,
                                  const mtfast::mask_tokens::Options* options, int id_bytes, int exact,
                                  void* output_ids, void* labels, void* stream) {
  using namespace mtfast::mask_tokens;
  if (batch->total == 0) return 0;
  const bool words = batch->subword;
  const auto run = id_bytes == 8 ? (words ? launch<int64_t, true> : launch<int64_t, false>)
                                 : (words ? launch<int32_t, true> : launch<int32_t, false>);
  return run(*batch, *options, exact != 0, output_ids, labels, stream);
}
