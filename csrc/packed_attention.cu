// Packed attention, forward.
#include "packed_attention.cuh"

namespace mtfast::attention {
namespace {

// A strip's softmax so far: of rows g and g + 8, in powers of two.
template <int kDim>
struct Softmax {
  Result16<kDim> out;
  float most[2] = {kLowest, kLowest};
  float weight[2] = {0.0f, 0.0f};

  // scores of 16 keys, of which `keys` exist
  template <class T>
  __device__ __forceinline__ void add(Piece16& x, int keys, float scale, const Dropout& dropout, int row,
                                      int column, const Tile<T, kDim>& v, int v_row, float* scratch) {
    const int t = lane_index() & 3;
    float top[2] = {most[0], most[1]};
    MTFAST_UNROLL
    for (int n = 0; n < 2; ++n) MTFAST_UNROLL
    for (int j = 0; j < 4; ++j) {
      x[n][j] = 8 * n + 2 * t + (j & 1) < keys ? __fmul_rn(x[n][j], scale) : minus_infinity();
      top[j >> 1] = fmaxf(top[j >> 1], x[n][j]);
    }
    MTFAST_UNROLL
    for (int r = 0; r < 2; ++r) {
      top[r] = fmaxf(top[r], __shfl_xor_sync(kAllLanes, top[r], 1));
      top[r] = fmaxf(top[r], __shfl_xor_sync(kAllLanes, top[r], 2));
    }
    if (__any_sync(kAllLanes, top[0] > most[0] || top[1] > most[1])) {
      const float upper = ptx::exp2_approx(most[0] - top[0]), lower = ptx::exp2_approx(most[1] - top[1]);
      out.scale(upper, lower);
      weight[0] *= upper;
      weight[1] *= lower;
      most[0] = top[0];
      most[1] = top[1];
    }
    MTFAST_UNROLL
    for (int n = 0; n < 2; ++n) MTFAST_UNROLL
    for (int j = 0; j < 4; ++j) {
      x[n][j] = ptx::exp2_approx(x[n][j] - most[j >> 1]);
      weight[j >> 1] += x[n][j];
    }
    if (dropout.threshold) {
      const uint32_t kept = dropout.kept(row, column);
      MTFAST_UNROLL
      for (int n = 0; n < 2; ++n) MTFAST_UNROLL
      for (int j = 0; j < 4; ++j) x[n][j] = kept >> (4 * n + j) & 1 ? x[n][j] : 0.0f;
    }
    add_product<T, kDim>(out, x, v, v_row, scratch);
  }
};

// Blocks on an SM at a time: as many as their registers allow without a spill, since loads are what they wait
// for.
template <int kDim, bool kShortOnly>
constexpr int blocks_together() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  return kDim == 32 ? 5 : kDim == 64 ? (kShortOnly ? 5 : 4) : (kShortOnly ? 4 : 3);
#else
  return kDim == 32 ? 4 : kDim == 64 && kShortOnly ? 4 : 3;
#endif
}

template <class T, int kDim, bool kShortOnly>
__global__ void __launch_bounds__(kThreads, (blocks_together<kDim, kShortOnly>()))
    forward_kernel(AttentionForward args) {
  unsigned char* shared = shared_memory<unsigned char>();
  using L = Launch<T, kDim>;
  const Tile<T, kDim> q{reinterpret_cast<T*>(shared)}, k{reinterpret_cast<T*>(shared + L::kTile)},
      v{reinterpret_cast<T*>(shared + 2 * L::kTile)};
  Plan& plan = *reinterpret_cast<Plan*>(shared + 3 * L::kTile);
  float* scratch =
      reinterpret_cast<float*>(shared + 3 * L::kTile + L::kPlan) + warp_index() * kScratchPerWarp;
  const AttentionShape& shape = args.shape;
  const int heads = static_cast<int>(shape.heads), head = static_cast<int>(blockIdx.x) % heads;
  const int window = static_cast<int>(blockIdx.x) / heads * L::kWindow;
  const int sequences = static_cast<int>(shape.sequences), total = static_cast<int>(shape.total);
  const float scale = log2_scale(shape);
  const Dropout dropout(shape, head);
  const int warp = warp_index(), g = lane_index() >> 2, t = lane_index() & 3;

  int cursor = warp == 0 ? max(lower_bound(shape.cu_seqlens, sequences, window) - 1, 0) : 0;
  for (;;) {
    if (warp == 0)
      make_plan<L::kPiece, Tile<T, kDim>::kMaxRows, kShortOnly>(plan, shape.cu_seqlens, sequences, total,
                                                                window, cursor);
    __syncthreads();
    if (plan.strips == 0) return;
    cursor = plan.next;
    const bool is_long = !kShortOnly && uniform(plan.is_long);
    const int strips = uniform(plan.strips);
    if (is_long)
      load_strips<T, kDim>({{q, args.q, head}}, plan);
    else
      load_strips<T, kDim>({{q, args.q, head}, {k, args.k, head}, {v, args.v, head}}, plan);
    wait_for_loads();
    // A long piece has one strip, or none, for each warp, and all warps go through its keys together.
    for (int i = warp; i < strips || (is_long && i < kWarps); i += kWarps) {
      const bool mine = i < strips;
      const Strip strip = plan.strip[mine ? i : 0];
      const int length = uniform(strip.length);
      Rows16<T, kDim> rows(q, mine ? 16 * i : 0);
      Softmax<kDim> softmax;
      for (int from = 0; from < (is_long ? length : 1); from += L::kPiece) {
        if (is_long) {
          if (from > 0) __syncthreads();
          load_piece<T, kDim>({{k, args.k, head}, {v, args.v, head}}, strip, from);
          wait_for_loads();
        }
        const int keys = min(length - from, L::kPiece);
        MTFAST_NO_UNROLL
        for (int key = 0; key < keys && mine; key += 16) {
          Piece16 x;
          rows.times(x, k, strip.first + key);
          softmax.template add<T>(x, keys - key, scale, dropout, strip.begin + strip.offset, from + key, v,
                                  strip.first + key, scratch);
        }
      }
      MTFAST_UNROLL
      for (int r = 0; r < 2; ++r) {
        softmax.weight[r] += __shfl_xor_sync(kAllLanes, softmax.weight[r], 1);
        softmax.weight[r] += __shfl_xor_sync(kAllLanes, softmax.weight[r], 2);
        const int place = strip.offset + g + 8 * r;
        if (mine && t == 0 && place < strip.length)
          Statistics::store(args.stats, head * shape.total + strip.begin + place, softmax.most[r],
                            softmax.weight[r]);
      }
      if (mine)
        store_strip<T, kDim>(args.out, head, strip, softmax.out, dropout.scale / softmax.weight[0],
                             dropout.scale / softmax.weight[1]);
    }
    __syncthreads();
  }
}

}  // namespace
}  // namespace mtfast::attention

extern "C" int mtfast_packed_attention_forward(const mtfast::AttentionForward* args, void* stream) {
  using namespace mtfast;
  using namespace mtfast::attention;
  if (args->shape.total == 0 || args->shape.heads == 0) return 0;
  return dispatch(args->shape, [&](auto element, auto dim) {
    using L = Launch<decltype(element), dim.value>;
    const size_t bytes = 3 * L::kTile + L::kPlan + L::kScratch;
    const auto launch = [&](auto kernel) {
      if (const int error = allow_shared_memory(kernel, bytes)) return error;
      return MTFAST_LAUNCH(L::grid(args->shape), dim3(kThreads), bytes, stream, kernel, *args);
    };
    return args->shape.max_seqlen <= L::kPiece ? launch(forward_kernel<decltype(element), dim.value, true>)
                                               : launch(forward_kernel<decltype(element), dim.value, false>);
  });
}
