// The vector layer: one source, compiled once per instruction set with its own SK_NS and SK_LANES.
// A GCC vector of 4, 8 or 16 floats, which the compiler lowers to whatever the target has.
//
// No std:: here or in any file of this folder: the linker keeps one copy of an inline function, and if that
// copy were the AVX-512 one, an older processor would die of SIGILL.
#pragma once

#include <stdint.h>
#include <string.h>

#include "kernels.h"
#if defined(__AVX__)
#include <immintrin.h>
#endif

namespace sigma::SK_NS {

constexpr int kLanes = SK_LANES;
typedef float Vec __attribute__((vector_size(4 * SK_LANES)));
typedef int32_t IVec __attribute__((vector_size(4 * SK_LANES)));
typedef uint32_t UVec __attribute__((vector_size(4 * SK_LANES)));
typedef uint16_t HalfVec __attribute__((vector_size(2 * SK_LANES)));
typedef float UnalignedVec __attribute__((vector_size(4 * SK_LANES), aligned(4), may_alias));
typedef float AlignedVec __attribute__((vector_size(4 * SK_LANES), may_alias));
typedef uint16_t AlignedHalfVec __attribute__((vector_size(2 * SK_LANES), may_alias));

#if defined(SK_CALLS)  // under sanitizers: a copy of their checks in each kernel takes minutes to compile
#define SK_INLINE inline
#define SK_STEP
#else
#define SK_INLINE inline __attribute__((always_inline))
#define SK_STEP __attribute__((always_inline))
#endif

SK_INLINE Vec load(const float* p) { return *reinterpret_cast<const UnalignedVec*>(p); }
SK_INLINE void store(float* p, Vec v) { *reinterpret_cast<UnalignedVec*>(p) = v; }
SK_INLINE Vec broadcast(float x) { return x - Vec{}; }

// The first n lanes, the rest zero; reads nothing past them.  0 < n <= kLanes.
SK_INLINE Vec load_partial(const float* p, int64_t n) {
#if defined(__AVX512F__) && SK_LANES == 16
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p);
#else
  Vec v{};
  memcpy(&v, p, static_cast<size_t>(n) * sizeof(float));
  return v;
#endif
}

SK_INLINE void store_partial(float* p, Vec v, int64_t n) {
#if defined(__AVX512F__) && SK_LANES == 16
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), v);
#else
  memcpy(p, &v, static_cast<size_t>(n) * sizeof(float));
#endif
}

// Past the caches, for results that are written once and not read again soon, where a vector is a whole cache
// line: p is aligned to it.  In halves of lines it made the weight gradient 1.5x slower than plain stores
// (AVX2, Zen 3).
SK_INLINE void store_streaming(float* p, Vec v) {
#if defined(__AVX512F__) && SK_LANES == 16
  _mm512_stream_ps(p, v);
#elif SK_LANES == 16  // aligned, as the instruction wants it: UBSan looks at each half
  *reinterpret_cast<AlignedVec*>(p) = v;
#else
  store(p, v);
#endif
}

// GCC 12 makes conversions between vectors of 2 and 4 bytes from halves of them: five instructions for one.
SK_INLINE UVec extended(HalfVec h) {
#if defined(__AVX512F__) && SK_LANES == 16
  __m256i half;
  memcpy(&half, &h, sizeof(half));
  return reinterpret_cast<UVec>(_mm512_cvtepu16_epi32(half));
#elif defined(__AVX2__) && SK_LANES == 8
  __m128i half;
  memcpy(&half, &h, sizeof(half));
  return reinterpret_cast<UVec>(_mm256_cvtepu16_epi32(half));
#else
  return __builtin_convertvector(h, UVec);
#endif
}

// The lower halves; the upper ones are zero.
SK_INLINE HalfVec truncated(UVec v) {
  HalfVec h;
#if defined(__AVX512F__) && SK_LANES == 16
  const __m256i half = _mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(v));
  memcpy(&h, &half, sizeof(h));
#elif defined(__AVX2__) && SK_LANES == 8
  const __m256i bits = reinterpret_cast<__m256i>(v);
  const __m128i half = _mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
  memcpy(&h, &half, sizeof(h));
#else
  h = __builtin_convertvector(v, HalfVec);
#endif
  return h;
}

SK_INLINE Vec widen(HalfVec h) {
  const UVec bits = extended(h) << 16;
  Vec v;
  memcpy(&v, &bits, sizeof(v));
  return v;
}

// To the nearest bf16, ties to even; NaN to the quiet NaN.
SK_INLINE HalfVec narrow(Vec v) {
  UVec bits;
  memcpy(&bits, &v, sizeof(bits));
  const UVec rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  return truncated(v == v ? rounded : UVec{} + 0x7FC0);
}

// The same in one instruction where there is one, which takes denormals for zero, as bf16 products do.
SK_INLINE HalfVec narrow_sum(Vec v) {
#if defined(__AVX512BF16__) && SK_LANES == 16
  const __m256bh rounded = _mm512_cvtneps_pbh(v);
  HalfVec h;
  memcpy(&h, &rounded, sizeof(h));
  return h;
#else
  return narrow(v);
#endif
}

// Pairs of bf16, in vectors of their own type.
struct PairVec {
  UVec bits;
};

SK_INLINE PairVec load_pairs(const void* p) {
  PairVec v;
  memcpy(&v, p, sizeof(v));
  return v;
}
// The first n of 2 kLanes bf16, the rest zero.
SK_INLINE PairVec load_pairs_partial(const Bf16* p, int64_t n) {
  PairVec v{};
  memcpy(&v, p, static_cast<size_t>(n) * sizeof(Bf16));
  return v;
}
SK_INLINE PairVec load(const Pair* p) { return load_pairs(p); }
SK_INLINE PairVec load_partial(const Pair* p, int64_t n) {
  PairVec v{};
  memcpy(&v, p, static_cast<size_t>(n) * sizeof(Pair));
  return v;
}
SK_INLINE void store(Pair* p, PairVec v) { memcpy(p, &v, sizeof(v)); }
SK_INLINE void store_partial(Pair* p, PairVec v, int64_t n) {
  memcpy(p, &v, static_cast<size_t>(n) * sizeof(Pair));
}
SK_INLINE PairVec broadcast(Pair p) { return {UVec{} + p.bits}; }

// The i-th bf16 of each as one pair.
SK_INLINE PairVec interleave(HalfVec even, HalfVec odd) { return {extended(even) | (extended(odd) << 16)}; }

SK_INLINE Vec multiply_add(Vec a, Vec b, Vec sum) { return sum + a * b; }
SK_INLINE Vec multiply_add(PairVec a, PairVec b, Vec sum) {
#if defined(__AVX512BF16__) && SK_LANES == 16
  __m512bh x, y;
  memcpy(&x, &a, sizeof(x));
  memcpy(&y, &b, sizeof(y));
  return _mm512_dpbf16_ps(sum, x, y);
#else
  const auto as_float = [](UVec bits) SK_STEP {
    Vec v;
    memcpy(&v, &bits, sizeof(v));
    return v;
  };
  sum += as_float(a.bits << 16) * as_float(b.bits << 16);
  return sum + as_float(a.bits & 0xFFFF0000u) * as_float(b.bits & 0xFFFF0000u);
#endif
}

SK_INLINE HalfVec load_bits(const Bf16* p) {
  HalfVec h;
  memcpy(&h, p, sizeof(h));
  return h;
}
SK_INLINE HalfVec load_bits_partial(const Bf16* p, int64_t n) {
  HalfVec h{};
  memcpy(&h, p, static_cast<size_t>(n) * sizeof(Bf16));
  return h;
}
SK_INLINE Vec load(const Bf16* p) { return widen(load_bits(p)); }
SK_INLINE void store(Bf16* p, Vec v) {
  const HalfVec h = narrow(v);
  memcpy(p, &h, sizeof(h));
}
SK_INLINE Vec load_partial(const Bf16* p, int64_t n) { return widen(load_bits_partial(p, n)); }
SK_INLINE void store_partial(Bf16* p, Vec v, int64_t n) {
  const HalfVec h = narrow(v);
  memcpy(p, &h, static_cast<size_t>(n) * sizeof(Bf16));
}
SK_INLINE void store_sum(float* p, Vec v) { store(p, v); }
SK_INLINE void store_sum(Bf16* p, Vec v) {
  const HalfVec h = narrow_sum(v);
  memcpy(p, &h, sizeof(h));
}
SK_INLINE void stream_half(void* p, HalfVec h) {
#if defined(__AVX512F__) && SK_LANES == 16
  __m256i bits;
  memcpy(&bits, &h, sizeof(bits));
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), bits);
#elif defined(__AVX__) && SK_LANES == 8
  __m128i bits;
  memcpy(&bits, &h, sizeof(bits));
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), bits);
#elif SK_LANES == 16
  *reinterpret_cast<AlignedHalfVec*>(p) = h;
#else
  memcpy(p, &h, sizeof(h));
#endif
}
SK_INLINE void store_streaming(Bf16* p, Vec v) { stream_half(p, narrow_sum(v)); }

// IEEE half precision.  Without an instruction for it: exponent and mantissa are moved into place as if they
// were a float's, and a multiplication by 2^112 sets the exponent right, for denormals too.
SK_INLINE Vec widen_half(HalfVec h) {
#if defined(__AVX512F__) && SK_LANES == 16
  __m256i bits;
  memcpy(&bits, &h, sizeof(bits));
  return _mm512_cvtph_ps(bits);
#elif defined(__F16C__) && SK_LANES == 8
  __m128i bits;
  memcpy(&bits, &h, sizeof(bits));
  return _mm256_cvtph_ps(bits);
#else
  const UVec half = extended(h), magnitude = (half & 0x7FFF) << 13;
  Vec v;
  memcpy(&v, &magnitude, sizeof(v));
  v = v * 0x1p112f;
  UVec bits;
  memcpy(&bits, &v, sizeof(bits));
  bits = magnitude >= 0x0F800000 ? (magnitude & 0x007FFFFF) | 0x7F800000 : bits;  // infinity and NaN
  bits |= (half & 0x8000) << 16;
  memcpy(&v, &bits, sizeof(v));
  return v;
#endif
}

// To the nearest half, ties to even: for what stays normal by adding half a unit to the bits, for what
// becomes denormal by adding 0.5, whose last bit is the unit of a denormal half.
SK_INLINE HalfVec narrow_half(Vec v) {
  HalfVec h;
#if defined(__AVX512F__) && SK_LANES == 16
  const __m256i bits = _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  memcpy(&h, &bits, sizeof(h));
#elif defined(__F16C__) && SK_LANES == 8
  const __m128i bits = _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  memcpy(&h, &bits, sizeof(h));
#else
  UVec bits;
  memcpy(&bits, &v, sizeof(bits));
  const UVec sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7FFFFFFF;
  Vec small;
  memcpy(&small, &magnitude, sizeof(small));
  small = small + 0.5f;
  UVec denormal;
  memcpy(&denormal, &small, sizeof(denormal));
  denormal -= 0x3F000000;
  const UVec normal = (magnitude - (112u << 23) + 0xFFF + ((magnitude >> 13) & 1)) >> 13;
  UVec half = magnitude < (113u << 23) ? denormal : normal;
  half = magnitude >= (143u << 23) ? UVec{} + 0x7C00 : half;
  half = magnitude > 0x7F800000 ? UVec{} + 0x7E00 : half;
  h = truncated(half | sign);
#endif
  return h;
}

SK_INLINE Vec load(const F16* p) {
  HalfVec h;
  memcpy(&h, p, sizeof(h));
  return widen_half(h);
}
SK_INLINE Vec load_partial(const F16* p, int64_t n) {
  HalfVec h{};
  memcpy(&h, p, static_cast<size_t>(n) * sizeof(F16));
  return widen_half(h);
}
SK_INLINE void store(F16* p, Vec v) {
  const HalfVec h = narrow_half(v);
  memcpy(p, &h, sizeof(h));
}
SK_INLINE void store_partial(F16* p, Vec v, int64_t n) {
  const HalfVec h = narrow_half(v);
  memcpy(p, &h, static_cast<size_t>(n) * sizeof(F16));
}
SK_INLINE void store_sum(F16* p, Vec v) { store(p, v); }
SK_INLINE void store_streaming(F16* p, Vec v) { stream_half(p, narrow_half(v)); }

typedef int8_t ByteVec __attribute__((vector_size(SK_LANES)));

// GCC 12 makes the conversion of the vectors an element at a time: 5x the instructions of the whole kernel.
SK_INLINE Vec widen(ByteVec b) {
#if defined(__AVX512F__) && SK_LANES == 16
  __m128i bits;
  memcpy(&bits, &b, sizeof(bits));
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bits));
#elif defined(__AVX2__) && SK_LANES == 8
  __m128i bits = _mm_setzero_si128();
  memcpy(&bits, &b, sizeof(b));
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bits));
#else
  return __builtin_convertvector(__builtin_convertvector(b, IVec), Vec);
#endif
}
SK_INLINE Vec load(const Int8* p) {
  ByteVec b;
  memcpy(&b, p, sizeof(b));
  return widen(b);
}
SK_INLINE Vec load_partial(const Int8* p, int64_t n) {
  ByteVec b{};
  memcpy(&b, p, static_cast<size_t>(n));
  return widen(b);
}

SK_INLINE float add_lanes(Vec v) {  // pairwise, so the order does not depend on how the compiler lowers it
  float lane[SK_LANES];
  memcpy(lane, &v, sizeof(lane));
#pragma GCC unroll 16
  for (int half = SK_LANES / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
  return lane[0];
}

// out[i] = the sum of v[i]'s lanes.  Four at once share their shuffles: a third of the work of four
// add_lanes.
SK_INLINE void add_lanes4(const Vec* v, float* out) {
#if defined(__AVX512F__) && SK_LANES == 16
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
  const __m512 abcd = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xEE));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
#elif defined(__AVX__) && SK_LANES == 8
  const __m256 ab = _mm256_add_ps(_mm256_unpacklo_ps(v[0], v[1]), _mm256_unpackhi_ps(v[0], v[1]));
  const __m256 cd = _mm256_add_ps(_mm256_unpacklo_ps(v[2], v[3]), _mm256_unpackhi_ps(v[2], v[3]));
  const __m256 abcd = _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xEE));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1)));
#else
  for (int i = 0; i < 4; ++i) out[i] = add_lanes(v[i]);
#endif
}

// Lane i of the result is lane from[i] of v.
template <class V>
SK_INLINE V shuffled(V v, IVec from) {
#if defined(__clang__)
  V out;
  for (int i = 0; i < kLanes; ++i) out[i] = v[from[i]];
  return out;
#else
  return __builtin_shuffle(v, from);
#endif
}

// Lane i of the result is lane i + by of v, cyclically.
template <class V>
SK_INLINE V turned(V v, int by) {
  static constexpr int32_t lanes[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  IVec from;
  memcpy(&from, lanes, sizeof(from));
  return shuffled(v, (from + by) & (kLanes - 1));
}

SK_INLINE float max_lane(Vec v) {
#pragma GCC unroll 4
  for (int half = kLanes / 2; half > 0; half /= 2) {
    const Vec other = turned(v, half);
    v = other > v ? other : v;
  }
  return v[0];
}

// Bit i: whether lane i is true, which is -1.
SK_INLINE uint32_t true_lanes(IVec is) {
#if defined(__AVX512DQ__) && SK_LANES == 16
  return _mm512_movepi32_mask(reinterpret_cast<__m512i>(is));
#elif defined(__AVX__) && SK_LANES == 8
  return static_cast<uint32_t>(_mm256_movemask_ps(reinterpret_cast<__m256>(is)));
#else
  uint32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= static_cast<uint32_t>(is[i] & 1) << i;
  return bits;
#endif
}

// e^x to 2 ulp for x in [-87.3, 88.3], clamped outside; NaN stays NaN.
// x = n ln 2 + r, |r| <= ln 2 / 2; e^r by its Taylor polynomial of degree 7 (remainder 2^-27 at the ends).
SK_INLINE Vec exp(Vec x) {
  x = x > 88.3f ? broadcast(88.3f) : x;
  x = x < -87.3f ? broadcast(-87.3f) : x;
  const Vec shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const Vec n = shifted - 12582912.0f;
  const Vec r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  Vec p = broadcast(1.0f / 5040.0f);
  p = p * r + 1.0f / 720.0f;
  p = p * r + 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  IVec bits;
  memcpy(&bits, &shifted, sizeof(bits));
  bits = (bits + (127 - 0x4B400000)) << 23;  // 0x4B400000 are the bits of 1.5 * 2^23
  Vec power;
  memcpy(&power, &bits, sizeof(power));
  return p * power;
}

SK_INLINE Vec sigmoid(Vec x) { return 1.0f / (1.0f + exp(-x)); }

}  // namespace sigma::SK_NS
