// Rows into the order of their experts, by counting.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace sigma::cuda {

constexpr int kMaxGroups = 6144;  // experts: a count of each and its first row lie in shared memory

// The slots 0..R are cut into `count` chunks of `slots` each, one block's work.
struct Chunks {
  int64_t slots;
  int count;
};
// Whole tokens of k slots, `at_least` tokens a chunk.
Chunks chunks_of(int64_t T, int k, int64_t at_least);

// counts [E], offsets [E+1] and row_map [R] from the expert of each slot, all int32.  Rows of an expert keep
// the order of their slots, whatever the grid.  Indices must lie in 0..E-1.
struct GroupByExpert {
  int64_t R;
  int E;
  const int32_t* indices;
  int32_t *counts, *offsets, *row_map;
  int32_t* workspace;  // group_workspace(R, E) bytes
};
int64_t group_workspace(int64_t R, int E);
cudaError_t group_by_expert(const GroupByExpert& g, cudaStream_t stream);

// The same where the workspace already holds the counts by (expert, chunk).
cudaError_t finish_groups(const GroupByExpert& g, Chunks chunks, cudaStream_t stream);

}  // namespace sigma::cuda
