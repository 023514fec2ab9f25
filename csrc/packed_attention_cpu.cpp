// Packed attention on the CPU: tasks of one sequence and one head, shared out among threads as they become
// free. A task's result does not depend on who computes it, so neither does the whole. Here a task widens its
// rows to float scratch, transposes keys (and, backward, values) on the way, and goes through the queries in
// blocks; those of bfloat16 are elsewhere where the processor multiplies it, packed_attention_bf16.cpp, and
// head_dim is a multiple of 32.
#include "packed_attention_cpu.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>
#include <new>

#include "packed_attention_bf16.h"

namespace mtfast {
namespace attention {
namespace {

constexpr int64_t kBlockRows = 64;

// A task's scratch; L tokens, blocks of R of them. Rows beyond the sequence hold zeros.
template <class C>
struct Buffers {
  C *q, *k, *kt, *v, *vt, *dout, *p, *dp, *out, *dk, *dv;
  uint16_t* draws;

  Buffers(Arena& arena, int64_t length, int64_t D, bool backward) {
    const int64_t L = (length + kLanes - 1) / kLanes * kLanes, R = std::min(L, kBlockRows);
    q = arena.take<C>(R * D);
    k = arena.take<C>(L * D);
    kt = arena.take<C>(L * D);
    v = arena.take<C>(L * D);
    p = arena.take<C>(R * L);
    out = arena.take<C>(R * D);
    draws = arena.take<uint16_t>(R * L);
    if (!backward) return;
    vt = arena.take<C>(L * D);
    dout = arena.take<C>(R * D);
    dp = arena.take<C>(R * L);
    dk = arena.take<C>(L * D);
    dv = arena.take<C>(L * D);
  }
};

// Which lanes of a row's last vector exist.
template <class C>
MTFAST_INLINE Mask<C> last_lanes(const Extent& at) {
  Vec<C> place;
  for (int i = 0; i < kLanes; ++i) place[i] = static_cast<C>(i);
  return place < static_cast<C>(at.length - (at.lanes - kLanes));
}

// The largest of a row of scores; what lies behind the last becomes minus infinity.
template <class C>
MTFAST_INLINE C largest(C* row, int64_t lanes, Mask<C> last) {
  C* end = row + lanes - kLanes;
  pack(end, last ? unpack(end) : Vec<C>{} - static_cast<C>(INFINITY));
  Vec<C> top = unpack(end);
  for (C* x = row; x < end; x += kLanes) top = unpack(x) > top ? unpack(x) : top;
  return maximum(top);
}

template <class T, class C>
struct Forward {
  template <Isa isa>
  MTFAST_INLINE void run(const AttentionForward& args, int64_t sequence, int64_t head, char* scratch) {
    const AttentionShape& shape = args.shape;
    const int64_t D = shape.head_dim;
    const Extent at(shape, sequence);
    if (at.length <= 0) return;
    Arena arena{scratch};
    Buffers<C> b(arena, at.length, D, false);
    gather<T, C>(b.k, args.k, at.begin, at.length, at.lanes, head, D, C{1});
    transpose(b.kt, at.lanes, b.k, at.lanes, D);
    gather<T, C>(b.v, args.v, at.begin, at.length, at.tiles, head, D, C{1});
    C* stats = statistics_of<C>(args.stats, head * shape.total + at.begin);
    const Mask<C> last = last_lanes<C>(at);
    for (int64_t r = 0; r < at.length; r += kBlockRows) {
      const int64_t rows = std::min(at.length - r, kBlockRows), M = round_up(rows, 4);
      gather<T, C>(b.q, args.q, at.begin + r, rows, M, head, D, static_cast<C>(shape.softmax_scale * kLog2E));
      multiply<isa>(M, at.lanes, D, b.q, D, b.kt, at.lanes, b.p, at.lanes);
      int64_t pitch = 0;
      if (shape.threshold) pitch = draw<isa>(b.draws, *shape.seed, head, at.begin, r, rows, at.length);
      for (int64_t i = 0; i < rows; ++i)
        softmax(b.p + i * at.lanes, at.lanes, last, b.draws + i * pitch, shape, stats + 2 * (r + i));
      multiply<isa>(M, D, at.length, b.p, at.lanes, b.v, D, b.out, D);
      scatter<T, C>(args.out, b.out, at.begin + r, rows, head, D, C{1});
    }
  }

  // Of a row of scores in powers of two, in place and dropped out.
  MTFAST_INLINE void softmax(C* row, int64_t lanes, Mask<C> last, const uint16_t* draws,
                             const AttentionShape& shape, C* stats) {
    const C row_max = largest(row, lanes, last);
    C* end = row + lanes - kLanes;
    Vec<C> total = {};
    for (C* x = row; x < end; x += kLanes) {
      const Vec<C> weight = exp2(unpack(x) - row_max);
      total += weight;
      pack(x, weight);
    }
    const Vec<C> weight = last ? exp2(unpack(end) - row_max) : Vec<C>{};
    pack(end, weight);
    const C row_sum = sum(total + weight);
    const Vec<C> factor = Vec<C>{} + keep_scale<C>(shape) / row_sum;
    for (int64_t j = 0; j < lanes; j += kLanes)
      pack(row + j, unpack(row + j) * keep_factor<Vec<C>, Mask<C>>(draws + j, shape.threshold, factor));
    stats[0] = row_max;
    stats[1] = row_sum;
  }
};

template <class T, class C>
struct Backward {
  template <Isa isa>
  MTFAST_INLINE void run(const AttentionBackward& args, int64_t sequence, int64_t head, char* scratch) {
    const AttentionShape& shape = args.shape;
    const int64_t D = shape.head_dim;
    const Extent at(shape, sequence);
    if (at.length <= 0) return;
    Arena arena{scratch};
    Buffers<C> b(arena, at.length, D, true);
    gather<T, C>(b.k, args.k, at.begin, at.length, at.lanes, head, D, C{1});
    transpose(b.kt, at.lanes, b.k, at.lanes, D);
    gather<T, C>(b.v, args.v, at.begin, at.length, at.lanes, head, D, C{1});
    transpose(b.vt, at.lanes, b.v, at.lanes, D);
    const Mask<C> last = last_lanes<C>(at);
    for (int64_t r = 0; r < at.length; r += kBlockRows) {
      const int64_t rows = std::min(at.length - r, kBlockRows), M = round_up(rows, 4);
      gather<T, C>(b.q, args.q, at.begin + r, rows, M, head, D, static_cast<C>(shape.softmax_scale * kLog2E));
      gather<T, C>(b.dout, args.dout, at.begin + r, rows, M, head, D, C{1});
      multiply<isa>(M, at.lanes, D, b.q, D, b.kt, at.lanes, b.p, at.lanes);
      multiply<isa>(M, at.lanes, D, b.dout, D, b.vt, at.lanes, b.dp, at.lanes);
      int64_t pitch = 0;
      if (shape.threshold) pitch = draw<isa>(b.draws, *shape.seed, head, at.begin, r, rows, at.length);
      for (int64_t i = 0; i < rows; ++i)
        differentiate(b.p + i * at.lanes, b.dp + i * at.lanes, at.lanes, last, b.draws + i * pitch, shape);
      multiply<isa, true>(at.tiles, D, rows, b.p, at.lanes, b.dout, D, b.dv, D, r > 0);
      multiply<isa, true>(at.tiles, D, rows, b.dp, at.lanes, b.q, D, b.dk, D, r > 0);
      multiply<isa>(M, D, at.length, b.dp, at.lanes, b.k, D, b.out, D);
      scatter<T, C>(args.dq, b.out, at.begin + r, rows, head, D, static_cast<C>(shape.softmax_scale));
    }
    scatter<T, C>(args.dk, b.dk, at.begin, at.length, head, D, static_cast<C>(kLn2));  // q carried log2(e)
    scatter<T, C>(args.dv, b.dv, at.begin, at.length, head, D, C{1});
  }

  // Of a row: scores become the weights that were used, their gradient that of the scores. The softmax is
  // taken anew, since a log-sum-exp of large scores is rounded by more than the weights can bear.
  MTFAST_INLINE void differentiate(C* p, C* dp, int64_t lanes, Mask<C> last, const uint16_t* draws,
                                   const AttentionShape& shape) {
    const Vec<C> scale = Vec<C>{} + keep_scale<C>(shape);
    const C row_max = largest(p, lanes, last);
    Vec<C> dot = {}, total = {};
    for (int64_t j = 0; j < lanes; j += kLanes) {
      Vec<C> x = exp2(unpack(p + j) - row_max), dx = unpack(dp + j);
      if (j == lanes - kLanes) x = last ? x : Vec<C>{};
      total += x;
      dx *= keep_factor<Vec<C>, Mask<C>>(draws + j, shape.threshold, scale);
      dot += x * dx;
      pack(p + j, x);
      pack(dp + j, dx);
    }
    const C factor = C{1} / sum(total), delta = sum(dot) * factor;
    for (int64_t j = 0; j < lanes; j += kLanes) {
      const Vec<C> x = unpack(p + j) * factor;
      pack(dp + j, x * (unpack(dp + j) - delta));
      pack(p + j, x * keep_factor<Vec<C>, Mask<C>>(draws + j, shape.threshold, scale));
    }
  }
};

// ---- one query a sequence ----

// to[j] = y and row j of the sequence multiplied, 0 behind the last.
template <class T, class C>
MTFAST_INLINE void products(C* to, const AttentionTensor& x, const Extent& at, int64_t head, const C* y,
                            int64_t D) {
  for (int64_t j = 0; j < at.length; ++j) {
    const T* row = row_of<const T>(x, at.begin + j, head);
    Vec<C> total = {};
    for (int64_t d = 0; d < D; d += kLanes) total += unpack(row + d) * unpack(y + d);
    to[j] = sum(total);
  }
  for (int64_t j = at.length; j < at.lanes; ++j) to[j] = C{0};
}

// to = the sum of the sequence's rows by their weights.
template <class T, class C>
MTFAST_INLINE void weighted_sum(C* to, const AttentionTensor& x, const Extent& at, int64_t head,
                                const C* weights, int64_t D) {
  for (int64_t d = 0; d < D; d += kLanes) pack(to + d, Vec<C>{});
  for (int64_t j = 0; j < at.length; ++j) {
    const T* row = row_of<const T>(x, at.begin + j, head);
    const C weight = weights[j];
    for (int64_t d = 0; d < D; d += kLanes) pack(to + d, unpack(to + d) + unpack(row + d) * weight);
  }
}

template <class T, class C>
struct ForwardCls {
  template <Isa isa>
  MTFAST_INLINE void run(const AttentionForward& args, int64_t sequence, int64_t head, char* scratch) {
    const AttentionShape& shape = args.shape;
    const int64_t D = shape.head_dim;
    const Extent at(shape, sequence);
    Arena arena{scratch};
    Buffers<C> b(arena, at.length, D, false);
    C* stats = statistics_of<C>(args.stats, head * shape.sequences + sequence);
    stats[0] = -static_cast<C>(INFINITY);
    stats[1] = 0;
    if (at.length > 0) {
      gather<T, C>(b.q, args.q, sequence, 1, 1, head, D, static_cast<C>(shape.softmax_scale * kLog2E));
      products<T>(b.p, args.k, at, head, b.q, D);
      if (shape.threshold) draw<isa>(b.draws, *shape.seed, head, at.begin, 0, 1, at.length);
      Forward<T, C>::softmax(b.p, at.lanes, last_lanes<C>(at), b.draws, shape, stats);
    }
    weighted_sum<T>(b.out, args.v, at, head, b.p, D);
    scatter<T, C>(args.out, b.out, sequence, 1, head, D, C{1});
  }
};

template <class T, class C>
struct BackwardCls {
  template <Isa isa>
  MTFAST_INLINE void run(const AttentionBackward& args, int64_t sequence, int64_t head, char* scratch) {
    const AttentionShape& shape = args.shape;
    const int64_t D = shape.head_dim;
    const Extent at(shape, sequence);
    Arena arena{scratch};
    Buffers<C> b(arena, at.length, D, true);
    if (at.length > 0) {
      gather<T, C>(b.q, args.q, sequence, 1, 1, head, D, static_cast<C>(shape.softmax_scale * kLog2E));
      gather<T, C>(b.dout, args.dout, sequence, 1, 1, head, D, C{1});
      products<T>(b.p, args.k, at, head, b.q, D);
      products<T>(b.dp, args.v, at, head, b.dout, D);
      if (shape.threshold) draw<isa>(b.draws, *shape.seed, head, at.begin, 0, 1, at.length);
      Backward<T, C>::differentiate(b.p, b.dp, at.lanes, last_lanes<C>(at), b.draws, shape);
    }
    for (int64_t j = 0; j < at.length; ++j) {
      scatter<T, C>(args.dk, b.q, at.begin + j, 1, head, D, b.dp[j] * static_cast<C>(kLn2));
      scatter<T, C>(args.dv, b.dout, at.begin + j, 1, head, D, b.p[j]);
    }
    weighted_sum<T>(b.out, args.k, at, head, b.dp, D);
    scatter<T, C>(args.dq, b.out, sequence, 1, head, D, static_cast<C>(shape.softmax_scale));
  }
};

// ---- tasks and threads ----

// Scratch that lives as long as its thread, so that a step does not pay for fresh pages.
char* scratch(int64_t bytes) {
  thread_local std::unique_ptr<char, void (*)(void*)> buffer{nullptr, std::free};
  thread_local int64_t size = 0;
  if (size < bytes) {
    size = (bytes + 4095) / 4096 * 4096;
    buffer.reset(static_cast<char*>(std::aligned_alloc(64, size)));
    if (!buffer) {
      size = 0;
      throw std::bad_alloc();
    }
  }
  return buffer.get();
}

int64_t longest(const AttentionShape& shape) {
  int64_t most = 0;
  for (int64_t s = 0; s < shape.sequences; ++s)
    most = std::max<int64_t>(most, shape.cu_seqlens[s + 1] - shape.cu_seqlens[s]);
  return most;
}

template <class Args>
using Task = void (*)(const Args& args, int64_t sequence, int64_t head, char* scratch);

// Runs the task on every sequence and head, with so many bytes of scratch.
template <class Args>
void run(const Args& args, Task<Args> task, int64_t bytes, int64_t slots, ParallelSlots parallel) {
  struct Context {
    const Args& args;
    Task<Args> task;
    int64_t tasks, chunk, bytes;
    std::atomic<int64_t> next{0};
  } context{args, task, args.shape.sequences * args.shape.heads, 1, bytes};
  if (context.tasks == 0) return;
  context.chunk = context.tasks > 256 * slots ? 8 : 1;
  const auto body = [](int64_t, void* opaque) {
    Context& c = *static_cast<Context*>(opaque);
    char* mine = scratch(c.bytes);
    const int64_t heads = c.args.shape.heads;
    for (int64_t t; (t = c.next.fetch_add(c.chunk, std::memory_order_relaxed)) < c.tasks;)
      for (int64_t end = std::min(t + c.chunk, c.tasks); t < end; ++t)
        c.task(c.args, t / heads, t % heads, mine);
  };
  parallel(std::min(slots, context.tasks), body, &context);
}

// Runs the kernel, in arithmetic of C, on the widest instruction set.
template <class Kernel, class C, class Args>
void run_kernel(const Args& args, bool is_backward, int64_t slots, ParallelSlots parallel) {
  Arena measure{nullptr};
  Buffers<C>(measure, longest(args.shape), args.shape.head_dim, is_backward);
  const Task<Args> task = [](const Args& all, int64_t sequence, int64_t head, char* mine) {
    call_best(Kernel{}, all, sequence, head, mine);
  };
  run(args, task, measure.used, slots, parallel);
}

template <template <class, class> class All, template <class, class> class Cls, class Args>
void run_by_dtype(const Args& args, bool cls, Task<Args> bf16_task, bool is_backward, int64_t slots,
                  ParallelSlots parallel) {
  const AttentionShape& shape = args.shape;
  const auto with = [&](auto element, auto scalar) {
    using T = decltype(element);
    using C = decltype(scalar);
    cls ? run_kernel<Cls<T, C>, C>(args, is_backward, slots, parallel)
        : run_kernel<All<T, C>, C>(args, is_backward, slots, parallel);
  };
  switch (shape.dtype) {
    case Dtype::kBFloat16:
      if (cls || !has_bf16_dot() || shape.head_dim % 32 != 0) return with(bf16{}, float{});
      return run(args, bf16_task, scratch_of_bf16(longest(shape), shape.head_dim, is_backward), slots,
                 parallel);
    case Dtype::kFloat16:
      return with(f16{}, float{});
    case Dtype::kFloat32:
      return with(float{}, float{});
    case Dtype::kFloat64:
      return with(double{}, double{});
  }
}

}  // namespace
}  // namespace attention

void packed_attention_forward_cpu(const AttentionForward& args, bool cls, int64_t slots,
                                  ParallelSlots parallel) {
  attention::run_by_dtype<attention::Forward, attention::ForwardCls>(args, cls, attention::forward_bf16,
                                                                     false, slots, parallel);
}

void packed_attention_backward_cpu(const AttentionBackward& args, bool cls, int64_t slots,
                                   ParallelSlots parallel) {
  attention::run_by_dtype<attention::Backward, attention::BackwardCls>(args, cls, attention::backward_bf16,
                                                                       true, slots, parallel);
}

}  // namespace mtfast
