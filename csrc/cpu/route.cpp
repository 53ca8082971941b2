// Routing and counting.
//
// The tokens are cut into one piece a thread.  Each piece is counted while it is routed; a prefix sum over
// (expert, piece) then says where each piece writes, and one more pass over the indices scatters the slots.
// No sort, and the row order is that of the slots whatever the number of pieces. Bound: one read of the
// logits, two of the indices.
//
// Sums over tokens are taken by blocks of tokens, which no number of threads cuts differently, and then added
// in order.
#include "route.h"

#include <algorithm>
#include <vector>

#include "dispatch.h"
#include "rows.h"

namespace sigma::cpu {
namespace {

constexpr int64_t kTokenBlock = 64;  // no thread is started for fewer

int pieces_of(int64_t T, int threads) {
  return static_cast<int>(std::clamp<int64_t>(T / kTokenBlock, 1, threads));
}

// Where piece p begins: at a whole block.
int64_t first_token(int64_t T, int pieces, int p) {
  return std::min(T, piece(ceil_div(T, kTokenBlock), pieces, p) * kTokenBlock);
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
    const int64_t end = first_token(R / per_token, pieces, p + 1) * per_token;
    for (int64_t s = first_token(R / per_token, pieces, p) * per_token; s < end; ++s)
      row_map[row[indices[s]]++] = static_cast<int32_t>(s);
  }
}

// The sums of each block of tokens, then of all blocks in their order.
class BlockSums {
 public:
  BlockSums(const Route& r, int pieces) : r_(r) {
    if (!r.probabilities) return;
    const int64_t blocks = ceil_div(r.T, kTokenBlock);
    probabilities_.resize(blocks * r.E, 0.0f);
    square_.resize(blocks, 0.0);
    q_.resize(pieces * r.E);
  }

  RouteSums of(int64_t t, int p) {
    if (!r_.probabilities) return {};
    return {.is_softmax = r_.sums_softmax,
            .probabilities = &probabilities_[t / kTokenBlock * r_.E],
            .q = &q_[p * r_.E]};
  }

  void add_square(int64_t t, float x) {
    if (r_.probabilities) square_[t / kTokenBlock] += double{x} * x;
  }

  void finish() {
    if (!r_.probabilities) return;
    std::vector<double> total(r_.E, 0.0);
    for (size_t i = 0; i < probabilities_.size(); i += r_.E)
      for (int64_t e = 0; e < r_.E; ++e) total[e] += probabilities_[i + e];
    std::copy(total.begin(), total.end(), r_.probabilities);
    double square = 0.0;
    for (const double x : square_) square += x;
    *r_.square = static_cast<float>(square);
  }

 private:
  const Route& r_;
  std::vector<float> probabilities_, q_;  // each part written by the thread that has the block, or the piece
  std::vector<double> square_;
};

}  // namespace

void route(const Route& r) {
  const Kernels& isa = kernels();
  const int pieces = pieces_of(r.T, r.threads);
  std::vector<int32_t> first(pieces * r.E, 0);
  std::vector<float> scratch(r.bias ? pieces * r.E : 0);
  BlockSums sums(r, pieces);
#pragma omp parallel for num_threads(pieces) if (pieces > 1)
  for (int p = 0; p < pieces; ++p) {
    int32_t* count = &first[p * r.E];
    for (int64_t t = first_token(r.T, pieces, p); t < first_token(r.T, pieces, p + 1); ++t) {
      int32_t* indices = r.indices + t * r.k;
      const float log_of_sum = isa.route_row({.logits = r.logits + t * r.ld,
                                              .bias = r.bias,
                                              .E = r.E,
                                              .k = r.k,
                                              .is_softmax = r.is_softmax,
                                              .is_normalized = r.is_normalized,
                                              .p = r.bias ? &scratch[p * r.E] : nullptr,
                                              .indices = indices,
                                              .weights = r.weights + t * r.k,
                                              .sums = sums.of(t, p)});
      sums.add_square(t, log_of_sum);
      for (int j = 0; j < r.k; ++j) ++count[indices[j]];
    }
  }
  sums.finish();
  scan(first, pieces, r.E, r.counts, r.offsets);
  scatter(first, r.indices, r.T * r.k, r.E, pieces, r.k, r.row_map);
}

void route_backward(const RouteBackward& r) {
  const Kernels& isa = kernels();
  const int pieces = pieces_of(r.T, r.threads);
  std::vector<float> scratch(r.grad_probabilities ? pieces * r.E : 0);
  const float grad_square = r.grad_square ? *r.grad_square : 0.0f;
#pragma omp parallel for num_threads(pieces) if (pieces > 1)
  for (int p = 0; p < pieces; ++p)
    for (int64_t t = first_token(r.T, pieces, p); t < first_token(r.T, pieces, p + 1); ++t)
      isa.route_row_backward({.logits = r.logits + t * r.ld,
                              .E = r.E,
                              .k = r.k,
                              .is_softmax = r.is_softmax,
                              .is_normalized = r.is_normalized,
                              .indices = r.indices + t * r.k,
                              .grad_weights = r.grad_weights + t * r.k,
                              .grad_logits = r.grad_logits + t * r.E,
                              .sums_softmax = r.sums_softmax,
                              .grad_probabilities = r.grad_probabilities,
                              .grad_square = grad_square,
                              .q = r.grad_probabilities ? &scratch[p * r.E] : nullptr});
}

template <class Index>
int64_t group_by_expert(const Index* indices, int64_t R, int64_t E, int32_t* counts, int32_t* offsets,
                        int32_t* row_map, int threads) {
  const int pieces = pieces_of(R, threads);
  std::vector<int32_t> first(pieces * E, 0);
  std::vector<int64_t> wrong(pieces, -1);
#pragma omp parallel for num_threads(pieces) if (pieces > 1)
  for (int p = 0; p < pieces; ++p)
    for (int64_t s = first_token(R, pieces, p); s < first_token(R, pieces, p + 1); ++s) {
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

int64_t wrong_row(const int32_t* row_map, int64_t R, int64_t slots) {
  std::vector<uint8_t> has_row(slots, 0);
  for (int64_t r = 0; r < R; ++r) {
    const int64_t s = row_map[r];
    if (s < 0 || s >= slots || has_row[s]) return r;
    has_row[s] = 1;
  }
  return -1;
}

}  // namespace sigma::cpu
