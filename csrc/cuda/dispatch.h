// Rows across ranks: what an all-to-all sends, and where the rows lie that it brings.
//
// P ranks have E / P experts each, in order, so rows in expert order are in the order of ranks too.  A rank's
// rows lie in a segment of `capacity` rows of the buffer, which lets all segments be exchanged without any
// count on the host; with capacity 0 segments follow each other without a gap.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace sigma::cuda {

// Send buffer row place_of_slot[s] = x[s / k] for each slot s; -1 where its segment is full, and `dropped`
// counts these.  The results come back in the same places: combine them by place_of_slot (rows.h).
struct Pack {
  int64_t R, row_bytes;
  int E, ranks, k;
  int64_t capacity;
  const char* x;
  int64_t ldx_bytes;
  const int32_t *offsets, *row_map;  // of the routing
  char* out;                         // contiguous rows
  int32_t* place_of_slot;            // [R]
  int32_t* rank_counts;              // [ranks], rows sent
  int32_t* dropped;                  // [1]
};
cudaError_t pack(const Pack& p, cudaStream_t stream);

// On the other side: rows in the order of this rank's experts, then of the ranks they come from.
// place_of_row[r] is the row of the receive buffer that belongs at r, for gathering rows and for scattering
// results (CopyRows, GroupedGemm); -1 beyond the last.  What a segment dropped is dropped here by the same
// rule.
struct PlanReceive {
  int ranks, experts;  // experts of this rank
  int64_t capacity, rows;
  const int32_t* counts;  // [ranks, experts], rows that each rank has for each expert
  int32_t* offsets;       // [experts + 1]
  int32_t* place_of_row;  // [rows], at least as many as may come
};
cudaError_t plan_receive(const PlanReceive& p, cudaStream_t stream);

}  // namespace sigma::cuda
