// concat_mlp on CUDA: the rows that the product reads, u's and v's side by side, for torch's library.
//
// Floor: every byte is read and written once, 12.6 MB at batch 2048 and 768 columns in 16 bits, 2.6 us at
// 4.8 TB/s, less what the caches hold. A warp copies a row of one side and has up to four times 512 bytes
// under way.
#include "concat_mlp_device.cuh"

namespace mtfast::concat_mlp {
namespace {

constexpr int kWarps = 8, kAtOnce = 4;

// Element: of the operands' size. All bits set are NaN in each of their formats.
template <class Element>
__global__ void __launch_bounds__(kWarps * 32)
    gather_kernel(int64_t batch, const Source u, const Source v, int64_t hidden, Element* __restrict__ both,
                  bool aligned) {
  constexpr int kSize = Vector<Element>::kSize;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kWarps + (threadIdx.x >> 5);  // u's row, v's, u's, ..
  if (i >= 2 * batch) return;
  const int lane = threadIdx.x & 31;
  const bool right = i & 1;
  const int64_t row = right ? source_row(v, i / 2, batch) : source_row(u, i / 2, batch);
  const auto* from = static_cast<const Element*>(right ? v.data : u.data) + row * (right ? v.pitch : u.pitch);
  Element* to = both + i * hidden;
  if (!aligned) {
    for (int64_t column = lane; column < hidden; column += 32)
      to[column] = row < 0 ? static_cast<Element>(-1) : from[column];
    return;
  }
  for (int64_t first = lane * kSize; first < hidden; first += kAtOnce * 32 * kSize) {
    Vector<Element> vectors[kAtOnce];
    MTFAST_UNROLL
    for (int k = 0; k < kAtOnce; ++k) {
      memset(&vectors[k], 0xff, sizeof vectors[k]);
      const int64_t column = first + k * 32 * kSize;
      if (row >= 0 && column < hidden) vectors[k] = load(from + column);
    }
    MTFAST_UNROLL
    for (int k = 0; k < kAtOnce; ++k) {
      const int64_t column = first + k * 32 * kSize;
      if (column < hidden) store(to + column, vectors[k]);
    }
  }
}

template <class Element>
int launch_gather(const Inputs& in, void* both, void* stream) {
  constexpr int kSize = Vector<Element>::kSize;
  const bool aligned = in.layer.hidden % kSize == 0 && in.u.pitch % kSize == 0 && in.v.pitch % kSize == 0 &&
                       on_16_bytes(in.u.data) && on_16_bytes(in.v.data) && on_16_bytes(both);
  return MTFAST_LAUNCH(dim3(blocks(2 * in.layer.batch, kWarps)), dim3(kWarps * 32), 0, stream,
                       gather_kernel<Element>, in.layer.batch, in.u, in.v, in.layer.hidden,
                       static_cast<Element*>(both), aligned);
}

}  // namespace

int mtfast_concat_mlp_gather(const Inputs* in, void* both, void* stream) {
  const auto launch = in->layer.dtype == Dtype::kFloat32 ? launch_gather<uint32_t> : launch_gather<uint16_t>;
  return launch(*in, both, stream);
}

}  // namespace mtfast::concat_mlp
