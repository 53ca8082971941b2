// What the tensor-core and copy instructions of PTX do, lane by lane, from the tables of the PTX manual.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

#include "../block.h"
#include "../copies.h"

namespace simt {

inline float bf16_to_float(uint16_t bits) { return std::bit_cast<float>(uint32_t{bits} << 16); }
inline uint16_t float_to_bf16(float x) {  // to the nearest, ties to even
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if (x != x) return 0x7FFF;
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}
inline float half_to_float(uint16_t bits) { return static_cast<float>(std::bit_cast<_Float16>(bits)); }
inline uint16_t float_to_half(float x) { return std::bit_cast<uint16_t>(static_cast<_Float16>(x)); }

struct MmaOperands {
  uint32_t a[4], b[2];
  float c[4];
};

// d = a b + c for a [16][16], b [16][8]: sums in double, rounded once, since the order of the sums is not
// told. Lane l has rows l/4 and l/4 + 8 of a and c, columns 2(l%4) and the next; b's column l/4.
template <float (*to_float)(uint16_t)>
void finish_mma(Meeting& m) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const auto& in = m.of<MmaOperands>(lane);
    const int group = lane / 4, pair = lane % 4 * 2;
    for (int half = 0; half < 2; ++half) {
      for (int i = 0; i < 4; ++i)
        a[group + i % 2 * 8][pair + i / 2 * 8 + half] = to_float(in.a[i] >> 16 * half & 0xFFFF);
      for (int i = 0; i < 2; ++i) b[pair + i * 8 + half][group] = to_float(in.b[i] >> 16 * half & 0xFFFF);
    }
  }
  for (int lane = 0; lane < kWarpSize; ++lane)
    for (int i = 0; i < 4; ++i) {
      auto& c = m.of<MmaOperands>(lane).c[i];
      const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
      double sum = c;
      for (int k = 0; k < 16; ++k) sum += static_cast<double>(a[row][k]) * b[k][column];
      c = static_cast<float>(sum);
    }
}

template <float (*to_float)(uint16_t)>
void mma(const char* what, float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  MmaOperands in;
  std::memcpy(in.a, a, sizeof a);
  std::memcpy(in.b, b, sizeof b);
  std::memcpy(in.c, c, sizeof c);
  Meeting& m = arrive(what, 0xFFFFFFFF, &in, sizeof in, finish_mma<to_float>);
  std::memcpy(c, m.of<MmaOperands>(lane_id()).c, sizeof c);
  leave(m);
}

inline void check_aligned(const char* what, const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % 16) fail("%s: address %p is not aligned to 16 bytes", what, p);
}

// Four matrices [8][8] of 16 bits; lane 8i + r names row r of matrix i.
inline void load_matrices(const char* what, uint32_t (&out)[4], const void* row, bool is_transposed) {
  check_aligned(what, row);
  struct Row {
    uint16_t x[8];
  } mine;
  std::memcpy(&mine, row, sizeof mine);
  Meeting& m = arrive(what, 0xFFFFFFFF, &mine, sizeof mine);
  const int group = lane_id() / 4, pair = lane_id() % 4 * 2;
  for (int i = 0; i < 4; ++i) {
    const auto at = [&](int r, int c) { return uint32_t{m.of<Row>(8 * i + r).x[c]}; };
    out[i] = is_transposed ? at(pair, group) | at(pair + 1, group) << 16
                           : at(group, pair) | at(group, pair + 1) << 16;
  }
  leave(m);
}

inline void copy_async(void* to, const void* from, int bytes) {
  check_aligned("cp.async", to);
  if (bytes) check_aligned("cp.async", from);
  copies().start(to, from, bytes);
}

}  // namespace simt
