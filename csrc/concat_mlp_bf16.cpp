// concat_mlp's large products on the CPU in bfloat16: tasks of a panel of 64 columns and some of the rows,
// shared out to threads. No sum depends on who computes it.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <utility>
#include <vector>

#include "bf16_product.h"
#include "concat_mlp.h"

namespace mtfast::concat_mlp {
namespace {

using namespace simd;

constexpr int64_t kTaskRows = 256;
constexpr int64_t kTaskInner = 384;         // rows of weight1's gradient in a task
constexpr int64_t kDepth = 512;             // pairs that a panel for weight1's gradient has at most
constexpr int64_t kBlock = 32 * kTileRows;  // rows whose addresses are listed at a time

int64_t ceil_div(int64_t x, int64_t by) { return (x + by - 1) / by; }

MTFAST_INLINE const bf16* row_of(const Source& from, int64_t i) {
  if (from.rows != nullptr)
    i = from.wide_rows ? static_cast<const int64_t*>(from.rows)[i]
                       : static_cast<const int32_t*>(from.rows)[i];
  return static_cast<const bf16*>(from.data) + i * from.pitch;
}

// A worker's scratch. It holds the panel packed for the task before, which the next task often needs too.
struct Packed {
  Pairs* panel;
  int64_t which = -1;

  // Whether panel i must be packed now.
  bool turns_to(int64_t i) { return std::exchange(which, i) != i; }
};

struct Rows {
  int64_t begin, end;

  // The i-th of `parts` about equal parts.
  Rows part(int64_t i, int64_t parts) const {
    return {begin + (end - begin) * i / parts, begin + (end - begin) * (i + 1) / parts};
  }
};

struct Hidden {
  template <Isa isa>
  MTFAST_INLINE void run(int64_t panel, const Rows& task, Packed* packed, const Layer& layer, const Source& u,
                         const Source& v, int64_t hidden, const Source& weight1, const bf16* bias1,
                         int64_t begin, bf16* z) {
    const int64_t inner = layer.inner, pairs = hidden / 2, column = panel * kPanel;
    const int64_t columns = std::min<int64_t>(kPanel, inner - column);
    if (packed->turns_to(panel))
      pack_rows(packed->panel, row_of(weight1, column), weight1.pitch, columns, 2 * pairs);
    alignas(64) float bias[kPanel] = {};
    for (int64_t j = 0; j < columns; j += kLanes) pack(bias + j, load(bias1 + column + j, columns - j));
    for (int64_t row = task.begin; row < task.end; row += kBlock) {
      const int64_t rows = std::min(kBlock, task.end - row);
      const bf16 *from_u[kBlock], *from_v[kBlock];
      for (int64_t i = 0; i < rows; ++i) {
        from_u[i] = row_of(u, row + i);
        from_v[i] = row_of(v, row + i);
      }
      PanelProduct product;
      product.rows = rows, product.columns = columns;
      product.a[0] = from_u, product.a[1] = from_v, product.parts = 2;
      product.pairs = pairs, product.b = packed->panel, product.start = bias;
      product.to = z + (row - begin) * inner + column, product.to_pitch = inner;
      multiply(product);
    }
  }
};

// The panel of 64 columns of rows begin .. end of a matrix that the product sums over the rows of.
MTFAST_INLINE void interleave_rows(Pairs* panel, const Source& from, int64_t begin, int64_t end,
                                   int64_t column, int64_t columns) {
  for (int64_t row = begin; row < end; row += 2) {
    const bf16* even = row_of(from, row) + column;
    const bf16* odd = row + 1 < end ? row_of(from, row + 1) + column : nullptr;
    interleave(panel[(row - begin) / 2], even, odd, columns);
  }
}

struct InputGradient {
  template <Isa isa>
  MTFAST_INLINE void run(int64_t panel, const Rows& task, Packed* packed, const Layer& layer, const bf16* dz,
                         const Source& weight1, int64_t hidden, bf16* du, bf16* dv) {
    const int64_t inner = layer.inner, panels = ceil_div(hidden, kPanel), column = panel % panels * kPanel;
    const bool to_u = du != nullptr && panel < panels;
    const int64_t columns = std::min<int64_t>(kPanel, hidden - column);
    if (packed->turns_to(panel))
      interleave_rows(packed->panel, weight1, 0, inner, column + (to_u ? 0 : hidden), columns);
    alignas(64) const float zeros[kPanel] = {};
    for (int64_t row = task.begin; row < task.end; row += kBlock) {
      const int64_t rows = std::min(kBlock, task.end - row);
      const bf16* from[kBlock];
      for (int64_t i = 0; i < rows; ++i) from[i] = dz + (row + i) * inner;
      PanelProduct product;
      product.rows = rows, product.columns = columns;
      product.a[0] = from, product.pairs = inner / 2;
      product.b = packed->panel, product.start = zeros;
      product.to = (to_u ? du : dv) + row * hidden + column, product.to_pitch = hidden;
      multiply(product);
    }
  }
};

// Of each two rows of dz, the elements of a column side by side.
struct PairRows {
  template <Isa isa>
  MTFAST_INLINE void run(int64_t, const Rows& task, Packed* packed, const Layer& layer, bf16* dz,
                         int64_t rows) {
    const int64_t inner = layer.inner;
    for (int64_t k = task.begin; k < task.end; ++k) {
      bf16 *even = dz + 2 * k * inner, *odd = 2 * k + 1 < rows ? even + inner : nullptr;
      for (int64_t column = 0; column < inner; column += kPanel)
        interleave(packed->panel[column / kPanel], even + column, odd == nullptr ? odd : odd + column,
                   std::min<int64_t>(kPanel, inner - column));
      std::memcpy(even, packed->panel, static_cast<size_t>(2 * inner) * sizeof(bf16));
    }
  }
};

struct Weight1Gradient {
  template <Isa isa>
  MTFAST_INLINE void run(int64_t panel, const Rows& task, Packed* packed, const Layer& layer, const bf16* dz,
                         const Source& u, const Source& v, int64_t hidden, int64_t begin, int64_t end,
                         bf16* dweight1) {
    const int64_t inner = layer.inner, panels = ceil_div(hidden, kPanel), column = panel % panels * kPanel;
    const int64_t columns = std::min<int64_t>(kPanel, hidden - column);
    auto* sums = reinterpret_cast<float*>(packed->panel + kDepth);
    alignas(64) const float zeros[kPanel] = {};
    bf16* to = dweight1 + (panel < panels ? 0 : hidden) + column;
    for (int64_t row = begin; row < end || row == begin; row += 2 * kDepth) {  // an empty sum is one too
      const int64_t past = std::min(end, row + 2 * kDepth), deep = (row - begin) / (2 * kDepth);
      if (packed->turns_to(panel + 2 * panels * deep))
        interleave_rows(packed->panel, panel < panels ? u : v, row, past, column, columns);
      for (int64_t i = task.begin; i < task.end; i += kBlock) {
        const int64_t rows = std::min(kBlock, task.end - i);
        const bf16* column_of_dz[kBlock];
        for (int64_t r = 0; r < rows; ++r) column_of_dz[r] = dz + (row - begin) * inner + 2 * (i + r);
        float* at = sums + (i - task.begin) * kPanel;
        PanelProduct product;
        product.rows = rows, product.columns = columns;
        product.a[0] = column_of_dz, product.step = 2 * inner, product.pairs = ceil_div(past - row, 2);
        product.b = packed->panel;
        product.to = to + i * 2 * hidden, product.to_pitch = 2 * hidden;
        if (row > begin)
          product.start = at, product.start_pitch = kPanel;
        else if (begin == 0)
          product.start = zeros;
        if (past < end) product.sums = at;
        multiply(product);
      }
    }
  }
};

// Tasks that a worker takes from the front of its own range, and then of the others'.
struct alignas(64) Range {
  std::atomic<int64_t> next;
  int64_t past;
};

// Runs the kernel on every panel and every task_rows of the rows.
template <class Kernel, class... Arguments>
void share_out(Kernel kernel, const CpuScratch& scratch, int64_t panels, const Rows& rows, int64_t task_rows,
               const Arguments&... arguments) {
  const int64_t parts = ceil_div(rows.end - rows.begin, task_rows), tasks = panels * parts;
  const int64_t workers = std::min(scratch.workers, tasks);
  std::vector<Range> ranges(workers);
  for (int64_t w = 0; w < workers; ++w) {
    ranges[w].next = tasks * w / workers;
    ranges[w].past = tasks * (w + 1) / workers;
  }
  torch::stable::parallel_for(0, workers, 1, [&](int64_t first, int64_t past) {
    for (int64_t worker = first; worker < past; ++worker) {
      Packed packed{reinterpret_cast<Pairs*>(static_cast<char*>(scratch.data) + worker * scratch.bytes)};
      for (int64_t i = 0; i < workers; ++i) {
        Range& range = ranges[(worker + i) % workers];
        for (int64_t task; (task = range.next.fetch_add(1)) < range.past;)
          call_best(kernel, task / parts, rows.part(task % parts, parts), &packed, arguments...);
      }
    }
  });
}

}  // namespace

bool cpu_multiplies(const Layer& layer, int64_t hidden) {
  return has_bf16_product() && layer.dtype == Dtype::kBFloat16 && hidden % 2 == 0 && layer.inner % 2 == 0;
}

int64_t cpu_scratch_bytes(const Layer& layer, int64_t hidden) {
  const int64_t sums = cpu_backward_rows(layer.batch) > 2 * kDepth ? kTaskInner * kPanel * sizeof(float) : 0;
  return std::max(std::max(hidden, layer.inner / 2) * static_cast<int64_t>(sizeof(Pairs)),
                  kDepth * static_cast<int64_t>(sizeof(Pairs)) + sums);
}

void cpu_hidden(const Layer& layer, const CpuScratch& scratch, const Source& u, const Source& v,
                int64_t hidden, const Source& weight1, const void* bias1, int64_t begin, int64_t end,
                void* z) {
  share_out(Hidden{}, scratch, ceil_div(layer.inner, kPanel), Rows{begin, end}, kTaskRows, layer, u, v,
            hidden, weight1, static_cast<const bf16*>(bias1), begin, static_cast<bf16*>(z));
}

void cpu_input_gradients(const Layer& layer, const CpuScratch& scratch, const void* dz, int64_t rows,
                         const Source& weight1, int64_t hidden, void* du, void* dv) {
  const int64_t sides = (du != nullptr) + (dv != nullptr);
  share_out(InputGradient{}, scratch, sides * ceil_div(hidden, kPanel), Rows{0, rows}, kTaskRows, layer,
            static_cast<const bf16*>(dz), weight1, hidden, static_cast<bf16*>(du), static_cast<bf16*>(dv));
}

void cpu_weight1_gradient(const Layer& layer, const CpuScratch& scratch, void* dz, const Source& u,
                          const Source& v, int64_t hidden, int64_t begin, int64_t end, void* dweight1) {
  if (layer.inner == 0) return;
  auto* rows_of_dz = static_cast<bf16*>(dz);
  share_out(PairRows{}, scratch, 1, Rows{0, ceil_div(end - begin, 2)}, kTaskRows / 2, layer, rows_of_dz,
            end - begin);
  share_out(Weight1Gradient{}, scratch, 2 * ceil_div(hidden, kPanel), Rows{0, layer.inner}, kTaskInner, layer,
            static_cast<const bf16*>(rows_of_dz), u, v, hidden, begin, end, static_cast<bf16*>(dweight1));
}

}  // namespace mtfast::concat_mlp
