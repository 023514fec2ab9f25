// How blocks share out the sequences that are too long for one warp, and hold one side of them in shared
// memory.
#pragma once
#include <algorithm>

#include "packed_attention_fragment.cuh"

namespace mtfast::attention {

// The classes of sequences are launched from the longest on, each beside the one before: the few long ones do
// not fill the machine, and take as long as all short ones.
__device__ __forceinline__ bool is_last_block() {
  return blockIdx.x + 1 == gridDim.x && blockIdx.y + 1 == gridDim.y && blockIdx.z + 1 == gridDim.z;
}

// The sequences of more than `beyond` and at most `upto` tokens. Each is for each head `parts` items, of
// `group` rows; shared memory has room for `resident` rows of the other side.
struct WorkClass {
  int beyond, upto, parts, group, resident;
};

// Few sequences of a batch may be so long, so a grid with a block for each sequence would be blocks with
// nothing to do, most of all. Instead every block looks through cu_seqlens, finds the same list, and takes
// every gridDim.x-th item of it.
template <int kWarps>
struct WorkList {
  static constexpr int kBatch = 16, kScanned = 32 * kBatch;  // of a lane and of a warp at a time: sequences
  static constexpr size_t kBytes = kWarps * (kScanned * sizeof(uint16_t) + 16);

  int* counts;      // of each warp's part of the list
  uint16_t* found;  // places among the sequences scanned; kScanned a warp

  __device__ __forceinline__ explicit WorkList(unsigned char* memory)
      : counts(reinterpret_cast<int*>(memory)), found(reinterpret_cast<uint16_t*>(memory + 16 * kWarps)) {}

  // Calls body(sequence, head, part) for this block's items, by all of its threads.
  template <class Body>
  __device__ __forceinline__ void run(const AttentionShape& shape, const WorkClass& of, Body body) const {
    const int sequences = static_cast<int>(shape.sequences), heads = static_cast<int>(shape.heads);
    const int each = heads * of.parts, grid = static_cast<int>(gridDim.x);
    ptx::let_next_begin();
    int next = static_cast<int>(blockIdx.x);
    for (int first = 0; first < sequences; first += kWarps * kScanned) {
      scan(shape, of, first + warp_index() * kScanned);
      __syncthreads();
      for (int warp = 0; warp < kWarps; ++warp) {
        const int items = counts[warp] * each;
        for (; next < items; next += grid) {
          const int place = found[warp * kScanned + next / each];
          const Sequence sequence(shape, static_cast<unsigned>(first + warp * kScanned + place));
          body(sequence, next % each / of.parts, next % of.parts);
        }
        next -= items;
      }
      __syncthreads();
    }
    if (is_last_block()) ptx::wait_for_previous();
  }

 private:
  __device__ __forceinline__ void scan(const AttentionShape& shape, const WorkClass& of, int first) const {
    const int lane = lane_index(), warp = warp_index();
    int count = 0;
    if (first < shape.sequences) {
      int length[kBatch];
      MTFAST_UNROLL
      for (int i = 0; i < kBatch; ++i) {
        length[i] = Sequence(shape, static_cast<unsigned>(first + 32 * i + lane)).length;
      }
      MTFAST_UNROLL
      for (int i = 0; i < kBatch; ++i) {
        const bool pred = length[i] > of.beyond && length[i] <= of.upto;
        const unsigned ballot = __ballot_sync(kAllLanes, pred);
        const int before = __popc(ballot & ((1u << lane) - 1));
        if (pred) found[warp * kScanned + count + before] = static_cast<uint16_t>(32 * i + lane);
        count += __popc(ballot);
      }
    }
    if (lane == 0) counts[warp] = count;
  }
};

// Blocks for short sequences: one for each and head, heads along x.
inline dim3 short_grid(const AttentionShape& shape) {
  const int64_t across = std::min<int64_t>(shape.sequences, 65535);
  return dim3(static_cast<unsigned>(shape.heads), static_cast<unsigned>(across),
              static_cast<unsigned>((shape.sequences + across - 1) / across));
}

// Blocks for a class of sequences: one for each item there can be, as long as they are not many to an SM.
inline dim3 work_grid(const AttentionShape& shape, const WorkClass& of) {
  const int64_t most = std::min(shape.sequences, shape.total / (of.beyond + 1));
  return dim3(
      static_cast<unsigned>(std::max<int64_t>(1, std::min<int64_t>(most * shape.heads * of.parts, 528))));
}

// Two tensors' rows of a sequence in shared memory, in parts that land one after the other.
template <int kThreads, class T, int kDim>
struct Resident {
  static constexpr int kParts = 4;

  Tile<T, kDim> a, b;
  int rows;  // at a time

  __device__ __forceinline__ Resident(unsigned char* memory, int rows)
      : a(memory), b(memory + rows * Tile<T, kDim>::kRowBytes), rows(rows) {}

  // In the background: rows of both from `first` on, of which `count` exist.
  __device__ __forceinline__ void copy(const HeadRows<T>& from_a, const HeadRows<T>& from_b, int first,
                                       int count) const {
    const int part_rows = rows / kParts;
    for (int row = 0; row < rows; row += part_rows) {
      const int padded = min(part_rows, (count - row + 15) / 16 * 16);
      const Tile<T, kDim> to_a(a.at(row, 0)), to_b(b.at(row, 0));
      copy_rows<kThreads>(to_a, from_a, first + row, padded, count - row);
      copy_rows<kThreads>(to_b, from_b, first + row, padded, count - row);
      ptx::cp_async_commit();
    }
  }
  // Until parts up to this one have landed, for the whole block.
  __device__ __forceinline__ static void wait(int part) {
    static_assert(kParts == 4);
    if (part == 0)
      ptx::cp_async_wait<3>();
    else if (part == 1)
      ptx::cp_async_wait<2>();
    else if (part == 2)
      ptx::cp_async_wait<1>();
    else
      ptx::cp_async_wait<0>();
    __syncthreads();
  }
  // Calls body(from, to, place) for rows [from, to) of the tiles, whose row 0 is row `place` of the sequence,
  // until all of its `length` rows had their turn; prepare(place, count) beside each copy. The rows are
  // copied when they are not there: `fresh`, or not all fit at a time.
  template <class Prepare, class Body>
  __device__ __forceinline__ void run(const HeadRows<T>& from_a, const HeadRows<T>& from_b,
                                      const Sequence& sequence, bool fresh, Prepare prepare,
                                      Body body) const {
    const int begin = sequence.begin, length = sequence.length, part_rows = rows / kParts;
    fresh |= length > rows;
    for (int place = 0; place < length; place += rows) {
      const int count = min(rows, length - place);
      if (fresh) {
        __syncthreads();
        copy(from_a, from_b, begin + place, length - place);
        prepare(place, count);
      }
      for (int part = 0; part * part_rows < count; ++part) {
        if (fresh) wait(part);
        body(part * part_rows, min((part + 1) * part_rows, count), place);
      }
    }
  }
};

// What the kernels for long sequences have around their products: each warp takes 16 rows of one side at a
// time and goes through the other side, which is in shared memory.
template <class T, int kDim, int kWarps>
struct LongBlock {
  static constexpr int kRowBytes = Tile<T, kDim>::kRowBytes, kThreads = 32 * kWarps;
  // `extra` for each row of the other side.
  static size_t bytes(int resident, size_t extra) {
    return WorkList<kWarps>::kBytes + static_cast<size_t>(16 * kWarps + 2 * resident) * kRowBytes +
           resident * extra;
  }

  WorkList<kWarps> work;
  Tile<T, kDim> scratch;  // 16 rows of this warp
  Resident<kThreads, T, kDim> other;
  unsigned char* extra;

  __device__ __forceinline__ LongBlock(unsigned char* memory, int resident)
      : work(memory),
        scratch(memory + WorkList<kWarps>::kBytes + 16 * warp_index() * kRowBytes),
        other(memory + WorkList<kWarps>::kBytes + 16 * kWarps * kRowBytes, resident),
        extra(memory + WorkList<kWarps>::kBytes + (16 * kWarps + 2 * resident) * kRowBytes) {}

  // Calls body(sequence, head, row, is_active, fresh), by all threads: this warp's are 16 rows from `row` of
  // the sequence on, if it is active; `fresh` says that shared memory has nothing of this sequence.
  template <class Body>
  __device__ __forceinline__ void run(const AttentionShape& shape, const WorkClass& of, Body body) const {
    work.run(shape, of, [&](const Sequence& sequence, int head, int part) {
      const int first = part * of.group, last = min(first + of.group, sequence.length);
      for (int base = first; base < last; base += 16 * kWarps) {
        const int row = base + 16 * warp_index();
        body(sequence, head, row, row < last, base == first);
      }
    });
  }
};

constexpr int64_t kMostResident = 1024;

// Rows of an item; fewer where there are few items: two an SM.
inline int rows_of_item(const AttentionShape& shape) {
  int rows = 512;
  while (rows > 128 && shape.total / rows * shape.heads < 264) rows /= 2;
  return rows;
}

// Launches such a kernel with as many resident rows as it may have shared memory for, up to `most` and to the
// longest sequence. 0 or a cudaError_t. Resident are a multiple of 128 rows, so that the 32 rows which may be
// worked on together are the same whatever is in the batch; or 64, where a GPU has no memory for more.
template <class Block, class Args, class... More>
int launch_long(const Args& args, int beyond, int64_t upto, int64_t most, bool beside, void* stream,
                size_t extra, void (*kernel)(Args, WorkClass, More...), More... more) {
  const AttentionShape& shape = args.shape;
  const int group = rows_of_item(shape);
  int resident = static_cast<int>(std::min(upto, most) + 127) / 128 * 128;
  while (const int error = allow_shared_memory(kernel, Block::bytes(resident, extra))) {
    if (resident <= 64) return error;
    resident = resident > 128 ? resident / 2 / 128 * 128 : 64;
  }
  const WorkClass of{beyond, static_cast<int>(upto), static_cast<int>((upto + group - 1) / group), group,
                     resident};
  return MTFAST_LAUNCH_BESIDE(beside, work_grid(shape, of), dim3(Block::kThreads),
                              Block::bytes(resident, extra), stream, kernel, args, of, more...);
}

}  // namespace mtfast::attention
