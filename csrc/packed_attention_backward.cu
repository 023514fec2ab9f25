// Packed attention on tensor cores, backward, for 16-bit elements. With P = softmax(S), D the dropout factors
// and delta = rowsum(dout * out):
//   dv = (P D)^T dout,  dP = (dout v^T) D,  dS = P (dP - delta),  dq = scale dS k,  dk = scale dS^T q.
// Every gradient is written once, by one warp: no atomics.
//
// Floor: q, k, v, out and dout are read and three gradients written once, 8 * 2 * head_dim bytes a token and
// head, and the statistics; products are 10 * length * head_dim FLOP. Sequences whose q, k, v and dout and
// whose weights are in shared memory together (up to 128 tokens) reach it: scores are computed once, and P D
// and dS go through shared memory from the queries' products to the keys'. One warp alone takes a sequence
// and head of up to 32 tokens, a block of 4 or 8 warps a longer one. Longer ones go twice, first by queries,
// which leave delta behind, then by keys: 14 products' FLOP instead of 10, and dropout's draws twice, are the
// price of results that do not depend on who comes first.
#include "packed_attention_two_pass.cuh"

namespace mtfast::attention {
namespace {

constexpr int kShortTokens = 32;

// A sequence of at most kTokens tokens; there is memory for `rows` of them, a multiple of 16.
template <class T, int kDim, int kTokens, int kWarps>
struct OnePass {
  static constexpr int kRowBytes = Tile<T, kDim>::kRowBytes, kWeightBytes = Tile<T, kTokens>::kRowBytes;
  static constexpr size_t bytes(int rows) {
    return static_cast<size_t>(4 * rows + 16 * kWarps) * kRowBytes + 2 * rows * kWeightBytes;
  }

  Tile<T, kDim> q, k, v, dout, scratch;
  Tile<T, kTokens> pd, ds;

  __device__ __forceinline__ OnePass(unsigned char* memory, int rows)
      : q(memory),
        k(memory + rows * kRowBytes),
        v(memory + 2 * rows * kRowBytes),
        dout(memory + 3 * rows * kRowBytes),
        scratch(memory + (4 * rows + 16 * warp_index()) * kRowBytes),
        pd(memory + (4 * rows + 16 * kWarps) * kRowBytes),
        ds(memory + (4 * rows + 16 * kWarps) * kRowBytes + rows * kWeightBytes) {}

  __device__ __forceinline__ static void sync() {
    if constexpr (kWarps == 1)
      __syncwarp();
    else
      __syncthreads();
  }

  __device__ __forceinline__ void run(const AttentionBackward& args, const Sequence& sequence,
                                      int head) const {
    const int begin = sequence.begin, length = sequence.length, first = 16 * warp_index();
    const int padded = (length + 15) / 16 * 16;
    copy_rows<32 * kWarps>(q, HeadRows<T>(args.q, head), begin, padded, length);
    copy_rows<32 * kWarps>(k, HeadRows<T>(args.k, head), begin, padded, length);
    copy_rows<32 * kWarps>(dout, HeadRows<T>(args.dout, head), begin, padded, length);
    copy_rows<32 * kWarps>(v, HeadRows<T>(args.v, head), begin, padded, length);
    ptx::cp_async_commit();
    const Dropout dropout(args.shape, head);
    const float scale = log2_scale(args.shape), factor = static_cast<float>(args.shape.softmax_scale);
    ptx::cp_async_wait<0>();
    sync();
    MTFAST_NO_UNROLL
    for (int row = first; row < length; row += 16 * kWarps) {
      Queries<T, kDim> queries;
      read_frags<T, kDim>(queries.q, q, row);
      read_frags<T, kDim>(queries.dout, dout, row);
      queries.prepare(args, head, begin + row, length - row);
      MTFAST_NO_UNROLL
      for (int key = 0; key < length; key += 16) {
        Frag weights, ds_frag;
        queries.attend(weights, ds_frag, k, v, key, length, 0, scale, dropout,
                       begin + row + (lane_index() >> 2));
        write_frag(pd, row, key, weights);
        write_frag(ds, row, key, ds_frag);
      }
      queries.store(args, head, begin + row, length - row, scratch);
    }
    sync();
    MTFAST_NO_UNROLL
    for (int key = first; key < length; key += 16 * kWarps) {
      Accumulators<kDim> dk = {}, dv = {};
      MTFAST_NO_UNROLL
      for (int row = 0; row < length; row += 16) {
        Frag transposed;
        read_transposed(transposed, pd, row, key);
        add_product<T, kDim>(dv, transposed, dout, row);
        read_transposed(transposed, ds, row, key);
        add_product<T, kDim>(dk, transposed, q, row);
      }
      store_rows<T, kDim>({args.dk, head}, begin + key, length - key, dk, {factor, factor}, scratch);
      store_rows<T, kDim>({args.dv, head}, begin + key, length - key, dv, {1.0f, 1.0f}, scratch);
    }
    sync();
  }
};

template <class T, int kDim>
__global__ void __launch_bounds__(32) backward_short_kernel(AttentionBackward args) {
  const Sequence sequence(args.shape, blockIdx.z * gridDim.y + blockIdx.y);
  ptx::let_next_begin();
  if (is_last_block()) ptx::wait_for_previous();
  if (sequence.length == 0 || sequence.length > kShortTokens) return;
  OnePass<T, kDim, kShortTokens, 1>(shared_memory<unsigned char>(), kShortTokens)
      .run(args, sequence, static_cast<int>(blockIdx.x));
}

template <class T, int kDim, int kTokens, int kWarps>
__global__ void __launch_bounds__(32 * kWarps) backward_middle_kernel(AttentionBackward args, WorkClass of) {
  unsigned char* memory = shared_memory<unsigned char>();
  const WorkList<kWarps> work(memory);
  OnePass<T, kDim, kTokens, kWarps> pass(memory + WorkList<kWarps>::kBytes, of.resident);
  work.run(args.shape, of, [&](const Sequence& sequence, int head, int) { pass.run(args, sequence, head); });
}

template <class T, int kDim, int kTokens, int kWarps>
int launch_middle(const AttentionBackward& args, int beyond, int64_t upto, bool beside, void* stream) {
  const auto kernel = backward_middle_kernel<T, kDim, kTokens, kWarps>;
  const int longest = static_cast<int>(upto), rows = (longest + 15) / 16 * 16;
  const size_t bytes = WorkList<kWarps>::kBytes + OnePass<T, kDim, kTokens, kWarps>::bytes(rows);
  if (const int error = allow_shared_memory(kernel, bytes)) return error;
  const WorkClass of{beyond, longest, 1, longest, rows};
  return MTFAST_LAUNCH_BESIDE(beside, work_grid(args.shape, of), dim3(32 * kWarps), bytes, stream, kernel,
                              args, of);
}

// Whether a block may have the memory for 128 tokens in one pass: a matter of the GPU, not of the batch, so
// that no sequence's result depends on the others. With head_dim 128 none has it.
template <class T, int kDim>
bool one_pass_fits() {
  const size_t bytes = WorkList<8>::kBytes + OnePass<T, kDim, 128, 8>::bytes(128);
  return allow_shared_memory(backward_middle_kernel<T, kDim, 128, 8>, bytes) == 0;
}

template <class T>
int launch(const AttentionBackward& args, float* delta, void* stream) {
  return by_head_dim<128>(args.shape, [&](auto dim) {
    constexpr int kDim = dim.value, kMiddleWarps = kDim == 128 ? 2 : 4;
    constexpr size_t kBytes = OnePass<T, kDim, kShortTokens, 1>::bytes(kShortTokens);
    const int64_t longest = args.shape.max_seqlen;
    const auto kernel = backward_short_kernel<T, kDim>;
    if (const int error = allow_shared_memory(kernel, kBytes)) return error;
    bool fits = false;
    if constexpr (kDim < 128) fits = longest > 64 && one_pass_fits<T, kDim>();
    int error = 0;
    if (longest > (fits ? 128 : 64)) error = launch_two_passes<T, kDim>(args, fits ? 128 : 64, delta, stream);
    if constexpr (kDim < 128) {
      if (error == 0 && fits)
        error =
            launch_middle<T, kDim, 128, 8>(args, 64, std::min<int64_t>(longest, 128), longest > 128, stream);
    }
    if (error == 0 && longest > kShortTokens)
      error = launch_middle<T, kDim, 64, kMiddleWarps>(args, kShortTokens, std::min<int64_t>(longest, 64),
                                                       longest > 64, stream);
    if (error != 0) return error;
    return MTFAST_LAUNCH_BESIDE(longest > kShortTokens, short_grid(args.shape), dim3(32), kBytes, stream,
                                kernel, args);
  });
}

}  // namespace
}  // namespace mtfast::attention

extern "C" int mtfast_packed_attention_backward(const mtfast::AttentionBackward* args, float* delta,
                                                void* stream) {
  using namespace mtfast;
  if (args->shape.sequences == 0 || args->shape.heads == 0) return 0;
  if (args->shape.dtype == Dtype::kBFloat16) return attention::launch<__nv_bfloat16>(*args, delta, stream);
  if (args->shape.dtype == Dtype::kFloat16) return attention::launch<__half>(*args, delta, stream);
  return static_cast<int>(cudaErrorInvalidValue);
}
