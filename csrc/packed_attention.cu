// Packed attention on tensor cores, forward, for 16-bit elements.
//
// Floor: q, k and v are read and out and the statistics written once, (4 * 2 * head_dim + 8) bytes a token
// and head; products are 4 * length * head_dim FLOP, which the bytes outweigh up to lengths of about 400 on
// an H100. Sequences of up to 32 tokens are a copy with a little arithmetic inside: a warp takes one sequence
// and head, alone, with no barrier but its own, so that many of them on a multiprocessor keep loads under
// way. Longer ones are bound by issue, of dropout's integer arithmetic before all: a block holds keys and
// values of a whole sequence in shared memory, so that each is read once, and its warps take 16 queries at a
// time; 4 warps up to 128 tokens, where many blocks are what fills a multiprocessor, and 16 beyond; in a
// small batch, whose items have 128 queries, 8, with few enough keys at a time for two blocks on a
// multiprocessor.
#include "packed_attention_blocks.cuh"

namespace mtfast::attention {
namespace {

constexpr int kShortTokens = 32;

// 16 queries' softmax so far, in powers of two; of rows g and g + 8.
template <class T, int kDim>
struct OnlineSoftmax {
  Accumulators<kDim> out = {};
  float row_max[2] = {kLowest, kLowest}, row_sum[2] = {};

  // With rows [from, to) of the tiles, whose row 0 is row `place` of the sequence.
  __device__ __forceinline__ void attend(const RowFrags<kDim>& q, const Tile<T, kDim>& k,
                                         const Tile<T, kDim>& v, int from, int to, int place, float scale,
                                         const Dropout& dropout, int draw_row) {
    int key = from;
    MTFAST_NO_UNROLL
    for (; key + 16 < to; key += 32) step<2>(q, k, v, key, to, place, scale, dropout, draw_row);
    if (key < to) step<1>(q, k, v, key, to, place, scale, dropout, draw_row);
  }

  // With kTiles times 16 keys from row `key` of the tiles on, of which those before `to` exist.
  template <int kTiles>
  __device__ __forceinline__ void step(const RowFrags<kDim>& q, const Tile<T, kDim>& k,
                                       const Tile<T, kDim>& v, int key, int to, int place, float scale,
                                       const Dropout& dropout, int draw_row) {
    const int t = lane_index() & 3;
    Scores x[kTiles];
    float top[2] = {row_max[0], row_max[1]};
    MTFAST_UNROLL
    for (int i = 0; i < kTiles; ++i) multiply<T, kDim>(x[i], q, k, key + 16 * i);
    MTFAST_UNROLL
    for (int i = 0; i < kTiles; ++i) {
      for_each_held([&](int n, int j) { x[i][n][j] = __fmul_rn(x[i][n][j], scale); });
    }
    if (key + 16 * kTiles > to) {
      constexpr int kLast = kTiles - 1;
      MTFAST_UNROLL
      for (int n = 0; n < 2; ++n) {  // not for_each_held, with which sm_80 runs out of registers
        MTFAST_UNROLL
        for (int j = 0; j < 4; ++j) {
          const bool exists = key + 16 * kLast + 8 * n + 2 * t + (j & 1) < to;
          x[kLast][n][j] = exists ? x[kLast][n][j] : minus_infinity();
        }
      }
    }
    MTFAST_UNROLL
    for (int i = 0; i < kTiles; ++i) {
      for_each_held([&](int n, int j) { top[j >> 1] = fmaxf(top[j >> 1], x[i][n][j]); });
    }
    raise_max(top, place + key == 0);
    MTFAST_UNROLL
    for (int i = 0; i < kTiles; ++i) {
      Philox4 draws = {};
      if (dropout.any()) draws = dropout.draws(draw_row, place + key + 16 * i, t);
      for_each_held([&](int n, int j) {
        const float weight = ptx::exp2_approx(x[i][n][j] - row_max[j >> 1]);
        row_sum[j >> 1] += weight;
        x[i][n][j] = dropout.keeps(draws.word[2 * n + j / 2], j % 2) ? weight : 0.0f;
      });
      Frag weights;
      to_frag<T>(weights, x[i][0], x[i][1]);
      add_product<T, kDim>(out, weights, v, key + 16 * i);
    }
  }

  // To `top`, over the lanes of a row; what there is so far, if it is not the first, is scaled down.
  __device__ __forceinline__ void raise_max(float (&top)[2], bool is_first) {
    MTFAST_UNROLL
    for (int r = 0; r < 2; ++r) {
      top[r] = fmaxf(top[r], __shfl_xor_sync(kAllLanes, top[r], 1));
      top[r] = fmaxf(top[r], __shfl_xor_sync(kAllLanes, top[r], 2));
    }
    if (!is_first && __any_sync(kAllLanes, top[0] > row_max[0] || top[1] > row_max[1])) {
      float factor[2];
      MTFAST_UNROLL
      for (int r = 0; r < 2; ++r) {
        factor[r] = ptx::exp2_approx(row_max[r] - top[r]);
        row_sum[r] *= factor[r];
      }
      scale_rows<kDim>(out, factor);
    }
    row_max[0] = top[0];
    row_max[1] = top[1];
  }

  // Of rows from `first` on, of which `count` exist.
  __device__ __forceinline__ void store(const AttentionForward& args, const HeadRows<T>& to, int head,
                                        int first, int count, const Tile<T, kDim>& scratch) {
    const int g = lane_index() >> 2, t = lane_index() & 3;
    float factor[2];
    MTFAST_UNROLL
    for (int r = 0; r < 2; ++r) {
      row_sum[r] = warp_sum<4>(row_sum[r]);
      factor[r] = __fdividef(keep_scale(args.shape), row_sum[r]);
      if (t == 0 && g + 8 * r < count) {
        Statistics::store(args.stats, head * args.shape.total + first + g + 8 * r, row_max[r], row_sum[r]);
      }
    }
    store_rows<T, kDim>(to, first, count, out, factor, scratch);
  }
};

template <class T, int kDim>
__global__ void __launch_bounds__(32, kDim == 128 ? 8 : 16) forward_short_kernel(AttentionForward args) {
  constexpr int kRows = kShortTokens * Tile<T, kDim>::kRowBytes;
  const int head = static_cast<int>(blockIdx.x);
  const Sequence sequence(args.shape, blockIdx.z * gridDim.y + blockIdx.y);
  const int begin = sequence.begin, length = sequence.length, padded = (length + 15) / 16 * 16;
  ptx::let_next_begin();
  if (is_last_block()) ptx::wait_for_previous();
  if (length == 0 || length > kShortTokens) return;
  unsigned char* memory = shared_memory<unsigned char>();
  const Tile<T, kDim> k(memory), v(memory + kRows), scratch(memory + 2 * kRows);
  copy_rows<32>(k, HeadRows<T>(args.k, head), begin, padded, length);
  copy_rows<32>(v, HeadRows<T>(args.v, head), begin, padded, length);
  ptx::cp_async_commit();
  const HeadRows<T> queries(args.q, head);
  RowFrags<kDim> q;
  read_frags<T, kDim>(q, queries, begin, length);
  const Dropout dropout(args.shape, head);
  const float scale = log2_scale(args.shape);
  ptx::cp_async_wait<0>();
  __syncwarp();
  MTFAST_NO_UNROLL
  for (int row = 0; row < length; row += 16) {
    OnlineSoftmax<T, kDim> softmax;
    softmax.attend(q, k, v, 0, length, 0, scale, dropout, begin + row + (lane_index() >> 2));
    if (row + 16 < length) read_frags<T, kDim>(q, queries, begin + row + 16, length - row - 16);
    softmax.store(args, {args.out, head}, head, begin + row, length - row, scratch);
  }
}

template <class T, int kDim, int kWarps>
__global__ void __launch_bounds__(32 * kWarps, (kDim == 128 ? 8 : 16) / kWarps)
    forward_long_kernel(AttentionForward args, WorkClass of) {
  const LongBlock<T, kDim, kWarps> block(shared_memory<unsigned char>(), of.resident);
  const float scale = log2_scale(args.shape);
  block.run(args.shape, of, [&](const Sequence& sequence, int head, int row, bool is_active, bool fresh) {
    const int begin = sequence.begin, length = sequence.length;
    const Dropout dropout(args.shape, head);
    RowFrags<kDim> q;
    if (is_active) read_frags<T, kDim>(q, {args.q, head}, begin + row, length - row);
    OnlineSoftmax<T, kDim> softmax;
    block.other.run(
        {args.k, head}, {args.v, head}, sequence, fresh, [](int, int) {},
        [&](int from, int to, int place) {
          if (!is_active) return;
          softmax.attend(q, block.other.a, block.other.b, from, to, place, scale, dropout,
                         begin + row + (lane_index() >> 2));
        });
    if (is_active) softmax.store(args, {args.out, head}, head, begin + row, length - row, block.scratch);
  });
}

template <class T>
int launch(const AttentionForward& args, void* stream) {
  return by_head_dim<128>(args.shape, [&](auto dim) {
    constexpr int kDim = dim.value;
    constexpr size_t kBytes = (2 * kShortTokens + 16) * Tile<T, kDim>::kRowBytes;
    const int64_t longest = args.shape.max_seqlen;
    const auto kernel = forward_short_kernel<T, kDim>;
    const auto launch_class = [&](auto warps, int beyond, int64_t upto, int64_t most, bool beside) {
      using Block = LongBlock<T, kDim, warps.value>;
      return launch_long<Block>(args, beyond, upto, most, beside, stream, 0,
                                forward_long_kernel<T, kDim, warps.value>);
    };
    int error = 0;
    if (longest > 128) {
      if (rows_of_item(args.shape) == 128)
        error = launch_class(std::integral_constant<int, 8>{}, 128, longest, 256, false);
      else
        error = launch_class(std::integral_constant<int, kDim == 128 ? 8 : 16>{}, 128, longest, kMostResident,
                             false);
    }
    if (error == 0 && longest > kShortTokens)
      error = launch_class(std::integral_constant<int, 4>{}, kShortTokens, std::min<int64_t>(longest, 128),
                           kMostResident, longest > 128);
    if (error != 0) return error;
    return MTFAST_LAUNCH_BESIDE(longest > kShortTokens, short_grid(args.shape), dim3(32), kBytes, stream,
                                kernel, args);
  });
}

}  // namespace
}  // namespace mtfast::attention

extern "C" int mtfast_packed_attention_forward(const mtfast::AttentionForward* args, void* stream) {
  using namespace mtfast;
  if (args->shape.sequences == 0 || args->shape.heads == 0) return 0;
  if (args->shape.dtype == Dtype::kBFloat16) return attention::launch<__nv_bfloat16>(*args, stream);
  if (args->shape.dtype == Dtype::kFloat16) return attention::launch<__half>(*args, stream);
  return static_cast<int>(cudaErrorInvalidValue);
}
