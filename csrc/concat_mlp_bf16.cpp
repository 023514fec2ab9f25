// concat_mlp's large products on the CPU in bfloat16: tasks of a panel of 64 columns and some of the rows,
// shared out to threads. No sum depends on who computes it.
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

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
constexpr int64_t kTaskInner = 384;  // rows of weight1's gradient in a task
constexpr int64_t kDepth = 512;      // pairs that a panel for weight1's gradient has at most

int64_t ceil_div(int64_t x, int64_t by) { return (x + by - 1) / by; }

const bf16* row_of(const Source& from, int64_t i) {
  if (from.rows != nullptr)
    i = from.wide_rows ? static_cast<const int64_t*>(from.rows)[i]
                       : static_cast<const int32_t*>(from.rows)[i];
  return static_cast<const bf16*>(from.data) + i * from.pitch;
}

// Packs the panel of 64 columns of rows begin .. end of a matrix that the product sums over the rows of.
void interleave_rows(Pairs* panel, const Source& from, int64_t begin, int64_t end, int64_t column,
                     int64_t columns) {
  for (int64_t row = begin; row < end; row += 2)
    interleave(panel++, row_of(from, row) + column, row + 1 < end ? row_of(from, row + 1) + column : nullptr,
               columns);
}

// A worker's scratch. It holds the panel packed for the task before, which the next task often needs too.
struct Packed {
  Pairs* panel;
  int64_t which = -1;

  // Whether panel i must be packed now.
  bool turns_to(int64_t i) { return std::exchange(which, i) != i; }
};

// A panel, and some rows of those that it is multiplied by.
struct Task {
  int64_t panel, begin, end;
};

// Tasks that a worker takes from the front of its own range, and then of the others'.
struct alignas(64) Range {
  std::atomic<int64_t> next;
  int64_t past;
};

// Calls run(task, packed) for every panel and every task_rows of the rows, or somewhat fewer. packed.panel
// has room for as many pairs.
template <class Run>
void share_out(int64_t panels, int64_t rows, int64_t task_rows, int64_t pairs, const Run& run) {
  const int64_t parts = ceil_div(rows, task_rows), tasks = panels * parts;
  const int64_t workers = std::min<int64_t>(torch::stable::get_num_threads(), tasks);
  const auto scratch = torch::stable::empty({workers * pairs * static_cast<int64_t>(sizeof(Pairs))},
                                            torch::headeronly::ScalarType::Byte);  // on 64 bytes
  auto* panels_of_workers = static_cast<Pairs*>(scratch.mutable_data_ptr());
  std::vector<Range> ranges(workers);
  for (int64_t w = 0; w < workers; ++w) {
    ranges[w].next = tasks * w / workers;
    ranges[w].past = tasks * (w + 1) / workers;
  }
  torch::stable::parallel_for(0, workers, 1, [&](int64_t first, int64_t past) {
    for (int64_t worker = first; worker < past; ++worker) {
      Packed packed{panels_of_workers + worker * pairs};
      for (int64_t i = 0; i < workers; ++i) {
        Range& range = ranges[(worker + i) % workers];
        for (int64_t task; (task = range.next.fetch_add(1)) < range.past;) {
          const int64_t part = task % parts;
          run(Task{task / parts, rows * part / parts, rows * (part + 1) / parts}, packed);
        }
      }
    }
  });
}

constexpr float kZeros[kPanel] = {};

}  // namespace

bool cpu_multiplies(const Layer& layer) {
  return has_bf16_product() && layer.dtype == Dtype::kBFloat16 && layer.hidden % 2 == 0 &&
         layer.inner % 2 == 0;
}

void cpu_hidden(const Inputs& in, int64_t begin, int64_t end, void* z) {
  const int64_t hidden = in.layer.hidden, inner = in.layer.inner;
  const auto *weight1 = static_cast<const bf16*>(in.weight1), *bias1 = static_cast<const bf16*>(in.bias1);
  const auto run = [&](const Task& task, Packed& packed) {
    const int64_t column = task.panel * kPanel, columns = std::min<int64_t>(kPanel, inner - column);
    if (packed.turns_to(task.panel))
      pack_rows(packed.panel, weight1 + column * 2 * hidden, 2 * hidden, columns, hidden);
    float bias[kPanel] = {};
    for (int64_t j = 0; j < columns; j += kLanes) pack(bias + j, load(bias1 + column + j, columns - j));
    const bf16 *from_u[kTaskRows], *from_v[kTaskRows];
    for (int64_t row = task.begin; row < task.end; ++row) {
      from_u[row - task.begin] = row_of(in.u, begin + row);
      from_v[row - task.begin] = row_of(in.v, begin + row);
    }
    PanelProduct product;
    product.rows = task.end - task.begin, product.columns = columns;
    product.a[0] = from_u, product.a[1] = from_v, product.parts = 2;
    product.pairs = hidden / 2, product.b = packed.panel, product.start = bias;
    product.to = static_cast<bf16*>(z) + task.begin * inner + column, product.to_pitch = inner;
    multiply(product);
  };
  share_out(ceil_div(inner, kPanel), end - begin, kTaskRows, hidden, run);
}

void cpu_input_gradients(const Inputs& in, const void* dz, int64_t begin, int64_t end, void* du, void* dv) {
  const int64_t hidden = in.layer.hidden, inner = in.layer.inner, panels = ceil_div(hidden, kPanel);
  const Source weight1{in.weight1, 2 * hidden, inner, nullptr, 0};
  const auto run = [&](const Task& task, Packed& packed) {
    const bool to_u = du != nullptr && task.panel < panels;
    const int64_t column = task.panel % panels * kPanel, columns = std::min<int64_t>(kPanel, hidden - column);
    if (packed.turns_to(task.panel))
      interleave_rows(packed.panel, weight1, 0, inner, column + (to_u ? 0 : hidden), columns);
    const bf16* from[kTaskRows];
    for (int64_t row = task.begin; row < task.end; ++row)
      from[row - task.begin] = static_cast<const bf16*>(dz) + row * inner;
    PanelProduct product;
    product.rows = task.end - task.begin, product.columns = columns;
    product.a[0] = from, product.pairs = inner / 2;
    product.b = packed.panel, product.start = kZeros;
    product.to = static_cast<bf16*>(to_u ? du : dv) + (begin + task.begin) * hidden + column;
    product.to_pitch = hidden;
    multiply(product);
  };
  const int64_t sides = (du != nullptr) + (dv != nullptr);
  share_out(sides * panels, end - begin, kTaskRows, inner / 2, run);
}

void cpu_weight1_gradient(const Inputs& in, void* dz, int64_t begin, int64_t end, void* dweight1) {
  const int64_t hidden = in.layer.hidden, inner = in.layer.inner, panels = ceil_div(hidden, kPanel);
  if (inner == 0) return;
  auto* rows_of_dz = static_cast<bf16*>(dz);
  // Of each two rows of dz, the elements of a column side by side.
  share_out(1, ceil_div(end - begin, 2), kTaskRows / 2, ceil_div(inner, kPanel),
            [&](const Task& task, Packed& packed) {
              for (int64_t k = task.begin; k < task.end; ++k) {
                bf16 *even = rows_of_dz + 2 * k * inner,
                     *odd = begin + 2 * k + 1 < end ? even + inner : nullptr;
                interleave(packed.panel, even, odd, inner);
                std::memcpy(even, packed.panel, static_cast<size_t>(2 * inner) * sizeof(bf16));
              }
            });
  const auto run = [&](const Task& task, Packed& packed) {
    const bool of_u = task.panel < panels;
    const int64_t column = task.panel % panels * kPanel, columns = std::min<int64_t>(kPanel, hidden - column);
    auto* sums = reinterpret_cast<float*>(packed.panel + kDepth);
    for (int64_t row = begin; row < end || row == begin; row += 2 * kDepth) {  // an empty sum is one too
      const int64_t past = std::min(end, row + 2 * kDepth), deep = (row - begin) / (2 * kDepth);
      if (packed.turns_to(task.panel + 2 * panels * deep))
        interleave_rows(packed.panel, of_u ? in.u : in.v, row, past, column, columns);
      const bf16* column_of_dz[kTaskInner];
      for (int64_t i = task.begin; i < task.end; ++i)
        column_of_dz[i - task.begin] = rows_of_dz + (row - begin) * inner + 2 * i;
      PanelProduct product;
      product.rows = task.end - task.begin, product.columns = columns;
      product.a[0] = column_of_dz, product.step = 2 * inner, product.pairs = ceil_div(past - row, 2);
      product.b = packed.panel;
      product.to = static_cast<bf16*>(dweight1) + task.begin * 2 * hidden + (of_u ? 0 : hidden) + column;
      product.to_pitch = 2 * hidden;
      if (row > begin)
        product.start = sums, product.start_pitch = kPanel;
      else if (begin == 0)
        product.start = kZeros;
      if (past < end) product.sums = sums;
      multiply(product);
    }
  };
  static_assert(sizeof(Pairs) == kPanel * sizeof(float), "a row of sums is as large as a row of pairs");
  share_out(2 * panels, inner, kTaskInner, kDepth + (end - begin > 2 * kDepth ? kTaskInner : 0), run);
}

}  // namespace mtfast::concat_mlp
