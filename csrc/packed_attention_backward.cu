// Packed attention, backward. With P = softmax(S), D the dropout factors and delta = rowsum(dout * out):
//   dv = (P D)^T dout,  dP = (dout v^T) D,  dS = P (dP - delta),  dq = scale dS k,  dk = scale dS^T q.
// Query strips give dq, key strips dk and dv, each from recomputed scores and each written once: no atomics.
// Where all sequences are short one block does both on the tiles it holds; else queries come first and leave
// delta behind.
#include "packed_attention.cuh"

namespace mtfast::attention {
namespace {

enum class Part { kBoth, kQueries, kKeys };

template <class T, int kDim>
struct Backward {
  using L = Launch<T, kDim>;
  static constexpr int kRows = Tile<T, kDim>::kMaxRows, kPiece = L::kPiece;
  static constexpr size_t kStatistics = kRows * (sizeof(Statistics) + 4);
  static constexpr size_t kBytes = 5 * L::kTile + kStatistics + L::kPlan + L::kScratch;

  const AttentionBackward& args;
  Tile<T, kDim> q, k, v, dout, out;
  Statistics* softmax;  // of the tile's queries, and their delta
  float* delta;
  float* global_delta;
  Plan& plan;
  float* scratch;
  int head;
  Dropout dropout;
  float scale;

  __device__ Backward(const AttentionBackward& args, float* global_delta, unsigned char* shared, int head)
      : args(args),
        q{reinterpret_cast<T*>(shared)},
        k{reinterpret_cast<T*>(shared + L::kTile)},
        v{reinterpret_cast<T*>(shared + 2 * L::kTile)},
        dout{reinterpret_cast<T*>(shared + 3 * L::kTile)},
        out{reinterpret_cast<T*>(shared + 4 * L::kTile)},
        softmax(reinterpret_cast<Statistics*>(shared + 5 * L::kTile)),
        delta(reinterpret_cast<float*>(softmax + kRows)),
        global_delta(global_delta),
        plan(*reinterpret_cast<Plan*>(delta + kRows)),
        scratch(reinterpret_cast<float*>(shared + 5 * L::kTile + kStatistics + L::kPlan) +
                warp_index() * kScratchPerWarp),
        head(head),
        dropout(args.shape, head),
        scale(log2_scale(args.shape)) {}

  __device__ __forceinline__ int64_t row_number(const Strip& strip, int place) const {
    return head * args.shape.total + strip.begin + place;
  }

  // What the plan's strips need: of a long piece its own side, of short sequences both.
  template <Part kPart>
  __device__ __forceinline__ void load(bool is_long) const {
    const Source<T, kDim> from_q(q, args.q, head), from_k(k, args.k, head), from_v(v, args.v, head),
        from_dout(dout, args.dout, head), from_out(out, args.out, head);
    if (is_long && kPart == Part::kQueries)
      load_strips<T, kDim>({from_q, from_dout, from_out}, plan);
    else if (is_long)
      load_strips<T, kDim>({from_k, from_v}, plan);
    else if (kPart == Part::kKeys)
      load_strips<T, kDim>({from_q, from_k, from_v, from_dout}, plan);
    else
      load_strips<T, kDim>({from_q, from_k, from_v, from_dout, from_out}, plan);
  }

  // dq of the strip in rows [16 * i, 16 * i + 16) of the tile.
  __device__ inline void query_strip(int i, bool mine, bool is_long) {
    const Strip strip = plan.strip[mine ? i : 0];
    const int length = uniform(strip.length);
    const int first_row = mine ? 16 * i : 0, g = lane_index() >> 2, t = lane_index() & 3;
    Rows16<T, kDim> queries(q, first_row), gradients(dout, first_row);
    Result16<kDim> dq;
    // delta by the product that gives dP: where one weight is 1 and the rest 0 they are the same bits.
    float row_delta[2];
    Piece16 with_out;
    gradients.times(with_out, out, first_row);
    diagonal(row_delta, with_out);
    Statistics row_softmax[2];
    MTFAST_UNROLL
    for (int r = 0; r < 2; ++r) {
      const int place = strip.offset + g + 8 * r;
      const bool inside = place < strip.length;
      if (inside) row_softmax[r] = Statistics(args.stats, row_number(strip, place));
      if (mine && t == 0) {
        softmax[first_row + g + 8 * r] = row_softmax[r];
        delta[first_row + g + 8 * r] = row_delta[r];
        if (inside && global_delta) global_delta[row_number(strip, place)] = row_delta[r];
      }
    }
    for (int from = 0; from < (is_long ? length : 1); from += kPiece) {
      if (is_long) {
        if (from > 0) __syncthreads();
        load_piece<T, kDim>({{k, args.k, head}, {v, args.v, head}}, strip, from);
        wait_for_loads();
      }
      const int keys = min(length - from, kPiece);
      MTFAST_NO_UNROLL
      for (int key = 0; key < keys && mine; key += 16) {
        Piece16 x, dx;
        queries.times(x, k, strip.first + key);
        gradients.times(dx, v, strip.first + key);
        const uint32_t kept =
            dropout.threshold ? dropout.kept(strip.begin + strip.offset, from + key) : 0xffu;
        MTFAST_UNROLL
        for (int n = 0; n < 2; ++n) MTFAST_UNROLL
        for (int j = 0; j < 4; ++j) {
          const bool exists = key + 8 * n + 2 * t + (j & 1) < keys;
          const float p = exists ? row_softmax[j >> 1].weight(x[n][j], scale) : 0.0f;
          const float dp = kept >> (4 * n + j) & 1 ? dx[n][j] * dropout.scale : 0.0f;
          x[n][j] = p * (dp - row_delta[j >> 1]);
        }
        add_product<T, kDim>(dq, x, k, strip.first + key, scratch);
      }
    }
    const float factor = static_cast<float>(args.shape.softmax_scale);
    if (mine) store_strip<T, kDim>(args.dq, head, strip, dq, factor, factor);
  }

  // dk and dv of the strip in rows [16 * i, 16 * i + 16) of the tile.
  __device__ inline void key_strip(int i, bool mine, bool is_long) {
    const Strip strip = plan.strip[mine ? i : 0];
    const int length = uniform(strip.length);
    const int first_row = mine ? 16 * i : 0, t = lane_index() & 3;
    Rows16<T, kDim> keys(k, first_row);
    Rows16<T, kDim, kDim <= 32> values(v, first_row);  // beside two results registers are short
    Result16<kDim> dk, dv;
    for (int from = 0; from < (is_long ? length : 1); from += kPiece) {
      if (is_long) {
        if (from > 0) __syncthreads();
        load_piece<T, kDim>({{q, args.q, head}, {dout, args.dout, head}}, strip, from);
        for (int row = threadIdx.x; row < kPiece; row += kThreads) read_statistics(strip, row, from + row);
        wait_for_loads();
      }
      const int queries = min(length - from, kPiece);
      MTFAST_NO_UNROLL
      for (int query = 0; query < queries && mine; query += 16) {
        const int row = strip.first + query;
        Piece16 x, dx;
        keys.times(x, q, row);
        values.times(dx, dout, row);
        const uint32_t kept =
            dropout.threshold ? dropout.kept_transposed(strip.begin + from + query, strip.offset) : 0xffu;
        MTFAST_UNROLL
        for (int n = 0; n < 2; ++n) MTFAST_UNROLL
        for (int j = 0; j < 4; ++j) {
          const int column = row + 8 * n + 2 * t + (j & 1);
          const float p = softmax[column].weight(x[n][j], scale);
          const bool keep = kept >> (4 * n + j) & 1;
          const float dp = keep ? dx[n][j] * dropout.scale : 0.0f;
          x[n][j] = keep ? p * dropout.scale : 0.0f;
          dx[n][j] = p * (dp - delta[column]);
        }
        add_product<T, kDim>(dv, x, dout, row, scratch);
        add_product<T, kDim>(dk, dx, q, row, scratch);
      }
    }
    const float factor = static_cast<float>(args.shape.softmax_scale);
    if (mine) {
      store_strip<T, kDim>(args.dk, head, strip, dk, factor, factor);
      store_strip<T, kDim>(args.dv, head, strip, dv, 1.0f, 1.0f);
    }
  }

  // Statistics and delta of tile row `row`, the strip's sequence's query `place`; zeros where there is none.
  __device__ __forceinline__ void read_statistics(const Strip& strip, int row, int place) {
    const bool inside = place < strip.length;
    const int64_t number = row_number(strip, inside ? place : 0);
    softmax[row] = inside ? Statistics(args.stats, number) : Statistics();
    delta[row] = inside ? global_delta[number] : 0.0f;
  }
};

// Blocks on an SM at a time: as many as their registers allow without a spill.
template <int kDim>
constexpr int blocks_together() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  return kDim == 32 ? 4 : kDim == 64 ? 3 : 2;
#else
  return kDim == 32 ? 3 : 2;
#endif
}

template <class T, int kDim, Part kPart>
__global__ void __launch_bounds__(kThreads, blocks_together<kDim>())
    backward_kernel(AttentionBackward args, float* global_delta) {
  const AttentionShape& shape = args.shape;
  const int heads = static_cast<int>(shape.heads), head = static_cast<int>(blockIdx.x) % heads;
  const int window = static_cast<int>(blockIdx.x) / heads * Launch<T, kDim>::kWindow;
  const int sequences = static_cast<int>(shape.sequences), total = static_cast<int>(shape.total);
  Backward<T, kDim> b(args, global_delta, shared_memory<unsigned char>(), head);
  const int warp = warp_index();
  int cursor = warp == 0 ? max(lower_bound(shape.cu_seqlens, sequences, window) - 1, 0) : 0;
  for (;;) {
    if (warp == 0)
      make_plan<Tile<T, kDim>::kPiece, Tile<T, kDim>::kMaxRows, kPart == Part::kBoth>(
          b.plan, shape.cu_seqlens, sequences, total, window, cursor);
    __syncthreads();
    if (b.plan.strips == 0) return;
    cursor = b.plan.next;
    const bool is_long = kPart != Part::kBoth && uniform(b.plan.is_long);
    const int strips = uniform(b.plan.strips);
    b.template load<kPart>(is_long);
    if (kPart == Part::kKeys && !is_long)
      for (int row = threadIdx.x; row < 16 * b.plan.strips; row += kThreads)
        b.read_statistics(b.plan.strip[row / 16], row, b.plan.strip[row / 16].offset + row % 16);
    wait_for_loads();
    // A long piece has one strip, or none, for each warp, and all warps go through the other side together.
    const int upto = is_long ? kWarps : strips;
    if constexpr (kPart != Part::kKeys) {
      MTFAST_NO_UNROLL
      for (int i = warp; i < upto; i += kWarps) b.query_strip(i, i < strips, is_long);
    }
    if (kPart == Part::kBoth) __syncthreads();
    if constexpr (kPart != Part::kQueries) {
      MTFAST_NO_UNROLL
      for (int i = warp; i < upto; i += kWarps) b.key_strip(i, i < strips, is_long);
    }
    __syncthreads();
  }
}

}  // namespace
}  // namespace mtfast::attention

extern "C" int mtfast_packed_attention_backward(const mtfast::AttentionBackward* args, float* delta,
                                                void* stream) {
  using namespace mtfast;
  using namespace mtfast::attention;
  if (args->shape.total == 0 || args->shape.heads == 0) return 0;
  return dispatch(args->shape, [&](auto element, auto dim) {
    using T = decltype(element);
    constexpr int kDim = dim.value;
    constexpr size_t kBytes = Backward<T, kDim>::kBytes;
    constexpr int kPiece = Launch<T, kDim>::kPiece;
    const auto launch = [&](auto kernel, float* global_delta) {
      if (const int error = allow_shared_memory(kernel, kBytes)) return error;
      return MTFAST_LAUNCH((Launch<T, kDim>::grid(args->shape)), dim3(kThreads), kBytes, stream, kernel,
                           *args, global_delta);
    };
    if (args->shape.max_seqlen <= kPiece) return launch(backward_kernel<T, kDim, Part::kBoth>, nullptr);
    if (const int error = launch(backward_kernel<T, kDim, Part::kQueries>, delta)) return error;
    return launch(backward_kernel<T, kDim, Part::kKeys>, delta);
  });
}
