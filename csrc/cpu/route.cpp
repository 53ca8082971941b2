// Routing and counting.
//
// The tokens are cut into one piece a thread.  Each piece is counted while it is routed; a prefix sum over
// (expert, piece) then says where each piece writes, and one more pass over the indices scatters the slots.
// No sort, and the row order is that of the slots whatever the number of pieces. Bound: one read of the
// logits, two of the indices.
#include "route.h"

#include <algorithm>
#include <vector>

#include "dispatch.h"
#include "rows.h"

namespace sigma::cpu {
namespace {

constexpr int64_t kTokensPerThread = 64;

int pieces_of(int64_t T, int threads) {
  return static_cast<int>(std::clamp<int64_t>(T / kTokensPerThread, 1, threads));
}

// Turns counts by (piece, expert) into the first row of each.
void scan(std::vector<int32_t>& first, int pieces, int64_t E, int32_t* counts, int32_t* offsets) {
  int32_t row = 0;
  for (int64_t e = 0; e < E; ++e) {
    offsets[e] = row;
    for (int p = 0; p < pieces; ++p) {
      const int32_t count = first[p * E + e];
      first[p * E + e] = row;
      row += count;
    }
    counts[e] = row - offsets[e];
  }
  offsets[E] = row;
}

template <class Index>
void scatter(std::vector<int32_t>& first, const Index* indices, int64_t R, int64_t E, int pieces,
             int64_t per_token, int32_t* row_map) {
#pragma omp parallel for num_threads(pieces) if (pieces > 1)
  for (int p = 0; p < pieces; ++p) {
    int32_t* row = &first[p * E];
    const int64_t end = piece(R / per_token, pieces, p + 1) * per_token;
    for (int64_t s = piece(R / per_token, pieces, p) * per_token; s < end; ++s)
      row_map[row[indices[s]]++] = static_cast<int32_t>(s);
  }
}

}  // namespace

void route(const Route& r) {
  const Kernels& isa = kernels();
  const int pieces = pieces_of(r.T, r.threads);
  std::vector<int32_t> first(pieces * r.E, 0);
  std::vector<float> scratch(r.bias ? pieces * r.E : 0);
#pragma omp parallel for num_threads(pieces) if (pieces > 1)
  for (int p = 0; p < pieces; ++p) {
    int32_t* count = &first[p * r.E];
    for (int64_t t = piece(r.T, pieces, p); t < piece(r.T, pieces, p + 1); ++t) {
      int32_t* indices = r.indices + t * r.k;
      isa.route_row({.logits = r.logits + t * r.ld,
                     .bias = r.bias,
                     .E = r.E,
                     .k = r.k,
                     .is_softmax = r.is_softmax,
                     .is_normalized = r.is_normalized,
                     .p = r.bias ? &scratch[p * r.E] : nullptr,
                     .indices = indices,
                     .weights = r.weights + t * r.k});
      for (int j = 0; j < r.k; ++j) ++count[indices[j]];
    }
  }
  scan(first, pieces, r.E, r.counts, r.offsets);
  scatter(first, r.indices, r.T * r.k, r.E, pieces, r.k, r.row_map);
}

void route_backward(const RouteBackward& r) {
  const Kernels& isa = kernels();
#pragma omp parallel for schedule(static) num_threads(r.threads) if (r.T >= kTokensPerThread)
  for (int64_t t = 0; t < r.T; ++t)
    isa.route_row_backward({.logits = r.logits + t * r.ld,
                            .E = r.E,
                            .k = r.k,
                            .is_softmax = r.is_softmax,
                            .is_normalized = r.is_normalized,
                            .indices = r.indices + t * r.k,
                            .grad_weights = r.grad_weights + t * r.k,
                            .grad_logits = r.grad_logits + t * r.E});
}

template <class Index>
int64_t group_by_expert(const Index* indices, int64_t R, int64_t E, int32_t* counts, int32_t* offsets,
                        int32_t* row_map, int threads) {
  const int pieces = pieces_of(R, threads);
  std::vector<int32_t> first(pieces * E, 0);
  std::vector<int64_t> wrong(pieces, -1);
#pragma omp parallel for num_threads(pieces) if (pieces > 1)
  for (int p = 0; p < pieces; ++p)
    for (int64_t s = piece(R, pieces, p); s < piece(R, pieces, p + 1); ++s) {
      if (indices[s] < 0 || indices[s] >= E) {
        wrong[p] = s;
        break;
      }
      ++first[p * E + indices[s]];
    }
  for (const int64_t s : wrong)
    if (s >= 0) return s;
  scan(first, pieces, E, counts, offsets);
  scatter(first, indices, R, E, pieces, 1, row_map);
  return -1;
}

template int64_t group_by_expert(const int32_t*, int64_t, int64_t, int32_t*, int32_t*, int32_t*, int);
template int64_t group_by_expert(const int64_t*, int64_t, int64_t, int32_t*, int32_t*, int32_t*, int);

bool rises(const int32_t* offsets, int64_t E, int64_t R) {
  return offsets[0] == 0 && offsets[E] == R && std::is_sorted(offsets, offsets + E + 1);
}

int64_t wrong_row(const int32_t* row_map, int64_t R) {
  std::vector<uint8_t> has_row(R, 0);
  for (int64_t r = 0; r < R; ++r) {
    const int64_t s = row_map[r];
    if (s < 0 || s >= R || has_row[s]) return r;
    has_row[s] = 1;
  }
  return -1;
}

}  // namespace sigma::cpu
