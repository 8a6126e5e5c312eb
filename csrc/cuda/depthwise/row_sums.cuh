// The second stage of sums: rows of partials, one of each CTA of the first stage or more, added up column by column.
//
// What it waits for is the latency of its loads: a column's rows are shared out over a CTA's threads, and each has
// several of them on their way. Every sum is made in an order that the number of rows alone decides.
#pragma once

#include "../launch.cuh"

namespace xsep::cuda {

inline constexpr int kSumColumns = 32;  // of a CTA, so that its rows are read in whole sectors
inline constexpr int kSumShares = 16;   // of a column's rows, a thread each
inline constexpr int kSumThreads = kSumColumns * kSumShares;
inline constexpr int kSumLoads = 8;  // rows of a thread that are on their way at a time
static_assert(kSumThreads <= 1024, "one CTA");

inline LaunchShape row_sums_launch(int64_t columns) {
  return {dim3(static_cast<unsigned>((columns + kSumColumns - 1) / kSumColumns)), kSumThreads,
          shared_bytes_of(kSumThreads * static_cast<int>(sizeof(double)))};
}

// The column that a thread adds to.
__device__ __forceinline__ int64_t column_of_thread() {
  return static_cast<int64_t>(blockIdx.x) * kSumColumns + static_cast<int>(threadIdx.x) % kSumColumns;
}

// Hands the total of the thread's column of partials [rows, columns] to store(total), once; not of a column that is not
// wanted, which is not read either. All threads of the CTA.
template <class Store>
__device__ __forceinline__ void sum_rows(const float* partials, int rows, int64_t columns, bool wanted, Store store) {
  const int thread = static_cast<int>(threadIdx.x), share = thread / kSumColumns;
  SharedArena arena;
  const SharedBuffer<double> scratch = arena.take<double>(kSumThreads);
  double total = 0.0;
  if (wanted) {
    const float* column = partials + column_of_thread();
    int row = share;
    for (; row < rows - (kSumLoads - 1) * kSumShares; row += kSumLoads * kSumShares) {
      float part[kSumLoads];
#pragma unroll
      for (int i = 0; i < kSumLoads; ++i) part[i] = column[(row + i * kSumShares) * columns];
#pragma unroll
      for (int i = 0; i < kSumLoads; ++i) total += static_cast<double>(part[i]);
    }
#pragma unroll 4
    for (; row < rows; row += kSumShares) total += static_cast<double>(column[row * columns]);
  }
  scratch[thread] = total;
  __syncthreads();
  if (share != 0 || !wanted) return;
  for (int i = 1; i < kSumShares; ++i) total += scratch[i * kSumColumns + thread];
  store(static_cast<float>(total));
}

}  // namespace xsep::cuda
