// Sixteen float32 numbers at a time: the elementary functions that logits need, on AVX-512.
//
// exp, tanh and log are made from the usual reduction to a small interval and a polynomial fitted to it
// (relative error of the fit below 4e-9, of the result about one unit in the last place). They are written
// here because log-probabilities must be within 5e-6 of float64 after sums of 1e5 terms.

#pragma once

#include <immintrin.h>

#include <cfloat>
#include <cmath>
#include <cstdint>

namespace gyrocompass {

using Lanes = __m512;
using Words = __m512i;
using Mask = __mmask16;

constexpr int64_t kLanes = 16;
constexpr float kMinusInfinity = -INFINITY;
// exp of it is 0, and it can be multiplied by 0: what stands for x = -inf.
constexpr float kLowestX = -200.0f;

inline Lanes all(float value) { return _mm512_set1_ps(value); }
inline Words all_words(uint32_t value) { return _mm512_set1_epi32(static_cast<int>(value)); }
// Where one of the two is NaN, the answer is the second: give what may be NaN second, and it is not lost.
inline Lanes larger(Lanes a, Lanes b) { return _mm512_max_ps(a, b); }
inline Lanes smaller(Lanes a, Lanes b) { return _mm512_min_ps(a, b); }
inline Lanes fma(Lanes a, Lanes b, Lanes c) { return _mm512_fmadd_ps(a, b, c); }
inline Lanes choose(Mask mask, Lanes yes, Lanes no) { return _mm512_mask_blend_ps(mask, no, yes); }
inline Mask is_finite_logit(Lanes z) { return _mm512_cmp_ps_mask(z, all(kMinusInfinity), _CMP_NEQ_UQ); }
inline Mask is_above(Lanes a, Lanes b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }

// While it lives, numbers below the normal ones count as 0 in this thread: they would be slow and change no sum.
class FlushTinyNumbers {
 public:
  FlushTinyNumbers() : before_(_mm_getcsr()) { _mm_setcsr(before_ | _MM_FLUSH_ZERO_ON | 0x0040); }
  ~FlushTinyNumbers() { _mm_setcsr(before_); }
  FlushTinyNumbers(const FlushTinyNumbers&) = delete;

 private:
  unsigned before_;
};

// x = n log 2 + r with |r| <= log(2) / 2: exp(x) = 2^n exp(r), and exp(r) is 1 + r + r^2 (a polynomial).
struct Reduced {
  Lanes n, r;
};

inline Reduced reduce_exponent(Lanes x) {
  // Adding 1.5 * 2^23 rounds to a whole number. log 2 as one float32 makes r wrong by n * 2e-9: where that is
  // something, exp(x) is nothing.
  const Lanes shift = all(12582912.0f);
  const Lanes n = fma(x, all(1.44269504f), shift) - shift;
  return {n, fma(n, all(-0.693147182f), x)};
}

// (exp(r) - 1 - r) / r^2
inline Lanes exponential_rest(Lanes r) {
  Lanes p = fma(all(1.381453988e-3f), r, all(8.368745127e-3f));
  p = fma(p, r, all(4.166839079e-2f));
  p = fma(p, r, all(1.666652040e-1f));
  return fma(p, r, all(4.999999343e-1f));
}

// exp(x) for x >= kLowestX; NaN for NaN.
inline Lanes exponential(Lanes x) {
  const Reduced part = reduce_exponent(x);
  const Lanes rest = fma(exponential_rest(part.r), part.r, all(1.0f));
  return _mm512_scalef_ps(fma(rest, part.r, all(1.0f)), part.n);
}

// tanh(x) = E / (E + 2), where E = exp(2x) - 1 = 2^n (exp(r) - 1) + (2^n - 1) is exact for small x too.
inline Lanes hyperbolic_tangent(Lanes x) {
  const Reduced part = reduce_exponent(smaller(all(40.0f), larger(all(-40.0f), x + x)));
  const Lanes power = _mm512_scalef_ps(all(1.0f), part.n);
  const Lanes tail = fma(part.r * part.r, exponential_rest(part.r), part.r);
  const Lanes e = fma(power, tail, power - all(1.0f));
  return e / (e + all(2.0f));
}

// log(x) for x > 0: x = 2^n m, and log m = 2 atanh((m - 1) / (m + 1)).
inline Lanes logarithm(Lanes x) {
  Lanes m = _mm512_getmant_ps(x, _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_zero);
  const Lanes n = _mm512_getexp_ps(x / m);
  const Lanes s = (m - all(1.0f)) / (m + all(1.0f));
  const Lanes t = s * s;
  Lanes p = fma(all(2.358356912e-1f), t, all(2.853723831e-1f));
  p = fma(p, t, all(4.000033622e-1f));
  p = fma(p, t, all(6.666666564e-1f));
  return fma(n, all(0.693147181f), fma(s * t, p, s + s));
}

// The 32-bit finaliser of MurmurHash3, as `_noise.py` has it.
inline Words mixed(Words bits) {
  bits = _mm512_xor_si512(bits, _mm512_srli_epi32(bits, 16));
  bits = _mm512_mullo_epi32(bits, all_words(0x85EBCA6Bu));
  bits = _mm512_xor_si512(bits, _mm512_srli_epi32(bits, 13));
  bits = _mm512_mullo_epi32(bits, all_words(0xC2B2AE35u));
  return _mm512_xor_si512(bits, _mm512_srli_epi32(bits, 16));
}

// The noise of `_noise.py` for one token and sixteen seeds: -log(-log(1 - u)).
inline Lanes gumbel(uint32_t token, Words seed_low, Words seed_high) {
  const Words hashed = mixed(_mm512_xor_si512(all_words(token * 0x9E3779B9u), seed_low));
  const Words bits = mixed(_mm512_xor_si512(hashed, seed_high));
  const Lanes u = (_mm512_cvtepu32_ps(bits) + all(0.5f)) * all(0x1p-32f);
  // log(1 - u) = log(v) u / (1 - v), where v is 1 - u rounded: the rounding cancels.
  const Lanes v = larger(all(1.0f) - u, all(0x1p-33f));
  const Lanes taken = all(1.0f) - v;
  const Mask tiny = _mm512_cmp_ps_mask(taken, all(0.0f), _CMP_EQ_OQ);
  const Lanes minus_log = choose(tiny, u, all(0.0f) - logarithm(v) * u / choose(tiny, all(1.0f), taken));
  return all(0.0f) - logarithm(minus_log);
}

// Sixteen rows of sixteen 32-bit words, transposed.
inline void transpose(Words rows[kLanes]) {
  Words half[kLanes];
  for (int i = 0; i < 16; i += 4) {
    const Words a = _mm512_unpacklo_epi32(rows[i], rows[i + 1]), b = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    const Words c = _mm512_unpacklo_epi32(rows[i + 2], rows[i + 3]);
    const Words d = _mm512_unpackhi_epi32(rows[i + 2], rows[i + 3]);
    half[i] = _mm512_unpacklo_epi64(a, c), half[i + 1] = _mm512_unpackhi_epi64(a, c);
    half[i + 2] = _mm512_unpacklo_epi64(b, d), half[i + 3] = _mm512_unpackhi_epi64(b, d);
  }
  for (int i = 0; i < 4; ++i) {
    const Words a = _mm512_shuffle_i32x4(half[i], half[i + 4], 0x88);
    const Words b = _mm512_shuffle_i32x4(half[i], half[i + 4], 0xdd);
    const Words c = _mm512_shuffle_i32x4(half[i + 8], half[i + 12], 0x88);
    const Words d = _mm512_shuffle_i32x4(half[i + 8], half[i + 12], 0xdd);
    rows[i] = _mm512_shuffle_i32x4(a, c, 0x88), rows[i + 8] = _mm512_shuffle_i32x4(a, c, 0xdd);
    rows[i + 4] = _mm512_shuffle_i32x4(b, d, 0x88), rows[i + 12] = _mm512_shuffle_i32x4(b, d, 0xdd);
  }
}

// Sixteen float32 rounded to bf16, nearest even.
inline __m256i to_bf16(Lanes x) {
#ifdef __AVX512BF16__
  return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x));
#else
  const Words bits = _mm512_castps_si512(x);
  const Words odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const Words rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
  const Mask is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, is_nan, bits), 16));
#endif
}

}  // namespace gyrocompass
