// Packed attention of one query a sequence: a warp takes a sequence and a head. A row is spread over kDim / 4
// (float) or kDim / 8 lanes, 16 bytes each, so that a warp reads several keys at once; each group of lanes
// has its own running softmax, and they are put together in the end.
#include "packed_attention.cuh"

namespace mtfast::attention {
namespace {

template <class T, int kDim>
struct Cls {
  static constexpr int kEach = 16 / sizeof(T), kLanes = kDim / kEach, kKeys = 32 / kLanes;

  int head, sequence, begin, length;
  int key0, column;  // this lane's first key and first column
  bool any;

  __device__ Cls(const AttentionShape& shape) {
    const int task = static_cast<int>(blockIdx.x) * kWarps + warp_index(),
              heads = static_cast<int>(shape.heads);
    sequence = task / heads;
    head = task % heads;
    any = sequence < shape.sequences;
    begin = length = 0;
    if (any) {
      begin = shape.cu_seqlens[sequence];
      const int end = shape.cu_seqlens[sequence + 1];
      length = begin >= 0 && end <= shape.total ? max(end - begin, 0) : 0;
    }
    key0 = lane_index() / kLanes;
    column = lane_index() % kLanes * kEach;
  }

  __device__ __forceinline__ void read(float (&to)[kEach], const AttentionTensor& x, int64_t row) const {
    const uint4 bits =
        *reinterpret_cast<const uint4*>(head_of<const T>(x, head) + row * x.row_stride + column);
    unpack16<T>(bits, to);
  }
  __device__ __forceinline__ void write(const AttentionTensor& x, int64_t row, const float (&from)[kEach],
                                        float factor) const {
    T* to = head_of<T>(x, head) + row * x.row_stride + column;
    uint32_t words[4];
    MTFAST_UNROLL
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(T) == 2)
        words[i] = pair_bits<T>(from[2 * i] * factor, from[2 * i + 1] * factor);
      else
        words[i] = __float_as_uint(from[i] * factor);
    }
    ptx::store_16(to, words);
  }
  // over the lanes that share a key
  __device__ __forceinline__ static float dot(const float (&a)[kEach], const float (&b)[kEach]) {
    float sum = 0.0f;
    MTFAST_UNROLL
    for (int i = 0; i < kEach; ++i) sum += a[i] * b[i];
    return warp_sum<kLanes>(sum);
  }
  // over the groups of lanes, in the same columns
  __device__ __forceinline__ static float across(float x) {
    MTFAST_UNROLL
    for (int step = kLanes; step < 32; step *= 2) x += __shfl_xor_sync(kAllLanes, x, step);
    return x;
  }
  __device__ __forceinline__ bool kept(const Dropout& dropout, int key) const {
    return dropout.threshold == 0 || (dropout.group(begin, key / 8) >> (key % 8) & 1);
  }
};

template <class T, int kDim>
__global__ void __launch_bounds__(kThreads) cls_forward_kernel(AttentionForward args) {
  using C = Cls<T, kDim>;
  const AttentionShape& shape = args.shape;
  const C c(shape);
  if (!c.any) return;
  const Dropout dropout(shape, c.head);
  const float scale = log2_scale(shape);
  float q[C::kEach], out[C::kEach];
  c.read(q, args.q, c.sequence);
  MTFAST_UNROLL
  for (int i = 0; i < C::kEach; ++i) out[i] = 0.0f;
  float most = kLowest, weight = 0.0f;
  for (int from = 0; from < c.length; from += C::kKeys) {
    const int key = from + c.key0;
    const bool exists = key < c.length;
    float k[C::kEach], v[C::kEach];
    c.read(k, args.k, c.begin + (exists ? key : 0));
    c.read(v, args.v, c.begin + (exists ? key : 0));
    const float score = __fmul_rn(C::dot(q, k), scale);  // by all lanes, also those without a key
    const float x = exists ? score : minus_infinity();
    const float top = fmaxf(most, x), shrink = ptx::exp2_approx(most - top);
    const float p = exists ? ptx::exp2_approx(x - top) : 0.0f;
    most = top;
    weight = weight * shrink + p;
    const float kept = c.kept(dropout, key) ? p : 0.0f;
    MTFAST_UNROLL
    for (int i = 0; i < C::kEach; ++i) out[i] = out[i] * shrink + kept * v[i];
  }
  float top = most;
  MTFAST_UNROLL
  for (int step = C::kLanes; step < 32; step *= 2) top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, step));
  const float shrink = ptx::exp2_approx(most - top);
  weight = C::across(weight * shrink);
  MTFAST_UNROLL
  for (int i = 0; i < C::kEach; ++i) out[i] = C::across(out[i] * shrink);
  if (c.key0 == 0) c.write(args.out, c.sequence, out, c.length ? dropout.scale / weight : 0.0f);
  if (lane_index() == 0)
    Statistics::store(args.stats, c.head * shape.sequences + c.sequence, c.length ? top : minus_infinity(),
                      weight);
}

template <class T, int kDim>
__global__ void __launch_bounds__(kThreads) cls_backward_kernel(AttentionBackward args) {
  using C = Cls<T, kDim>;
  const AttentionShape& shape = args.shape;
  const C c(shape);
  if (!c.any) return;
  const Dropout dropout(shape, c.head);
  const float scale = static_cast<float>(shape.softmax_scale);
  const float scale_2 = log2_scale(shape);
  float q[C::kEach], dout[C::kEach], dq[C::kEach];
  c.read(q, args.q, c.sequence);
  c.read(dout, args.dout, c.sequence);
  MTFAST_UNROLL
  for (int i = 0; i < C::kEach; ++i) dq[i] = 0.0f;
  const Statistics softmax(args.stats, c.head * shape.sequences + c.sequence);
  // Twice through the keys: first for delta, since out is rounded.
  float delta = 0.0f;
  for (int from = 0; from < c.length; from += C::kKeys) {
    const int key = from + c.key0;
    const bool exists = key < c.length;
    float k[C::kEach], v[C::kEach];
    c.read(k, args.k, c.begin + (exists ? key : 0));
    c.read(v, args.v, c.begin + (exists ? key : 0));
    const float x = C::dot(q, k), dx = C::dot(dout, v);
    const float p = exists ? softmax.weight(x, scale_2) : 0.0f;
    delta += c.kept(dropout, key) ? p * dx * dropout.scale : 0.0f;
  }
  delta = C::across(delta);
  for (int from = 0; from < c.length; from += C::kKeys) {
    const int key = from + c.key0;
    const bool exists = key < c.length;
    float k[C::kEach], v[C::kEach];
    c.read(k, args.k, c.begin + (exists ? key : 0));
    c.read(v, args.v, c.begin + (exists ? key : 0));
    const float x = C::dot(q, k), dx = C::dot(dout, v);
    const float p = exists ? softmax.weight(x, scale_2) : 0.0f;
    const float kept = c.kept(dropout, key) ? dropout.scale : 0.0f;
    const float ds = p * (dx * kept - delta) * scale;
    MTFAST_UNROLL
    for (int i = 0; i < C::kEach; ++i) dq[i] += ds * k[i];
    if (exists) {
      c.write(args.dk, c.begin + key, q, ds);
      c.write(args.dv, c.begin + key, dout, p * kept);
    }
  }
  MTFAST_UNROLL
  for (int i = 0; i < C::kEach; ++i) dq[i] = C::across(dq[i]);
  if (c.key0 == 0) c.write(args.dq, c.sequence, dq, 1.0f);
}

dim3 grid(const AttentionShape& shape) {
  return dim3(static_cast<unsigned>((shape.sequences * shape.heads + kWarps - 1) / kWarps));
}

}  // namespace
}  // namespace mtfast::attention

extern "C" int mtfast_packed_attention_cls_forward(const mtfast::AttentionForward* args, void* stream) {
  using namespace mtfast::attention;
  if (args->shape.sequences == 0 || args->shape.heads == 0) return 0;
  return dispatch(args->shape, [&](auto element, auto dim) {
    return MTFAST_LAUNCH(grid(args->shape), dim3(kThreads), 0, stream,
                         (cls_forward_kernel<decltype(element), dim.value>), *args);
  });
}

extern "C" int mtfast_packed_attention_cls_backward(const mtfast::AttentionBackward* args, void* stream) {
  using namespace mtfast::attention;
  if (args->shape.sequences == 0 || args->shape.heads == 0) return 0;
  return dispatch(args->shape, [&](auto element, auto dim) {
    return MTFAST_LAUNCH(grid(args->shape), dim3(kThreads), 0, stream,
                         (cls_backward_kernel<decltype(element), dim.value>), *args);
  });
}
