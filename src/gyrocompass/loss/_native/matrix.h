// Small dense products through ATen's brgemm, and the layouts that it wants.
//
// A product C [m, n] += A [m, k] B [k, n] takes A as it lies in memory. B has its rows in groups of g that stand
// side by side, [k / g, n, g]: g = 2 for bf16 (what the matrix unit multiplies at once), g = 1 for float32.

#pragma once

#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Exception.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <type_traits>

#include "lanes.h"

namespace gyrocompass {

using at::BFloat16;

template <typename T>
constexpr int64_t kGroup = std::is_same_v<T, float> ? 1 : 2;

// At most so deep is one call. For float32, its part of B then stays in the first-level cache, and sums are more exact.
template <typename T>
constexpr int64_t kDepth = std::is_same_v<T, float> ? 128 : 2048;

inline int64_t parts(int64_t total, int64_t part) { return (total + part - 1) / part; }
inline int64_t round_up(int64_t value, int64_t unit) { return parts(value, unit) * unit; }

// The size of equal parts of at most `most`, in whole units.
inline int64_t part_size(int64_t total, int64_t most, int64_t unit) {
  return round_up(parts(total, parts(total, most)), unit);
}

// Memory of n elements, aligned to cache lines, not initialised. Large pieces ask for huge pages: rows of dz lie far
// apart, and with small pages each would need an address of its own.
template <typename T>
class Scratch {
 public:
  explicit Scratch(int64_t n) {
    const int64_t bytes = n * sizeof(T) + 64;
    const int64_t unit = bytes >= 2 * kHugePage ? kHugePage : 64;
    data_.reset(static_cast<T*>(std::aligned_alloc(unit, round_up(bytes, unit))));
    TORCH_CHECK(data_ != nullptr, "out of memory: ", bytes, " bytes");
    if (unit == kHugePage) madvise(data_.get(), round_up(bytes, unit), MADV_HUGEPAGE);
  }
  T* get() const { return data_.get(); }

 private:
  static constexpr int64_t kHugePage = 2 << 20;
  struct Free {
    void operator()(T* data) const { std::free(data); }
  };
  std::unique_ptr<T, Free> data_;
};

// Give the items 0 ... n - 1 to whichever thread is free: `work(next)` runs once per thread and asks `next()`
// until it answers n or more. An item's result must not depend on who computes it.
template <typename Work>
void share(int64_t n, const Work& work) {
  std::atomic<int64_t> counter{0};
  const auto next = [&counter] { return counter.fetch_add(1, std::memory_order_relaxed); };
  const int64_t threads = std::min<int64_t>(n, at::get_num_threads());
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    const FlushTinyNumbers guard;
    work(next);
  });
}

// C = A B, or C += A B if `add`.
template <typename T>
void multiply(int64_t m, int64_t n, int64_t k, const T* a, int64_t lda, const T* b, float* c, int64_t ldc, bool add) {
  const int64_t depth = part_size(k, kDepth<T>, 32);
  for (int64_t at = 0; at < k; at += depth) {
    at::native::cpublas::brgemm(m, n, std::min(depth, k - at), lda, n, ldc, add || at > 0, a + at, b + at * n, c,
                                kGroup<T> == 2);
  }
}

template <typename T>
void release() {
  at::native::cpublas::brgemm_release(kGroup<T> == 2);
}

// The first n lanes, or all sixteen.
inline Mask first_of(int64_t n) { return static_cast<Mask>((1u << std::min(kLanes, n)) - 1); }

// Groups of `width / g` words become rows: left [rows, width] to B = left^T, [width / g, n, g] with n >= rows.
template <typename T>
void pack_transposed(const T* left, int64_t stride, int64_t rows, int64_t width, T* out, int64_t n) {
  const int64_t words = width / kGroup<T>;
  auto* to = reinterpret_cast<uint32_t*>(out);
  for (int64_t row = 0; row < n; row += kLanes) {
    for (int64_t word = 0; word < words; word += kLanes) {
      const Mask inside = first_of(words - word);
      Words block[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) {
        const auto* from = reinterpret_cast<const uint32_t*>(left + (row + i) * stride) + word;
        block[i] = row + i < rows ? _mm512_maskz_loadu_epi32(inside, from) : _mm512_setzero_si512();
      }
      transpose(block);
      for (int64_t i = 0; i < std::min(kLanes, words - word); ++i) {
        _mm512_storeu_si512(to + (word + i) * n + row, block[i]);
      }
    }
  }
}

// Parts of rows far apart are not foreseen by the processor: ask for them some rows before they are read.
constexpr int64_t kRowsAhead = 16;

template <typename T>
void fetch_rows(const T* from, int64_t stride, int64_t first, int64_t end, int64_t n) {
  for (int64_t row = first; row < end; ++row) {
    for (int64_t i = 0; i < n; i += 64 / static_cast<int64_t>(sizeof(T))) {
      _mm_prefetch(reinterpret_cast<const char*>(from + row * stride + i), _MM_HINT_T0);
    }
  }
}

// Rows [rows, n] with a stride become B, [depth / g, n, g]; rows from `rows` to `depth` are 0.
inline void pack_rows(const float* from, int64_t stride, int64_t rows, int64_t depth, int64_t n, float* out) {
  for (int64_t row = 0; row < rows; ++row) std::memcpy(out + row * n, from + row * stride, n * sizeof(float));
  std::memset(out + rows * n, 0, (depth - rows) * n * sizeof(float));
}

inline void pack_rows(const BFloat16* from, int64_t stride, int64_t rows, int64_t depth, int64_t n, BFloat16* out) {
  const auto* words = reinterpret_cast<const uint16_t*>(from);
  auto* pairs = reinterpret_cast<uint32_t*>(out);
  for (int64_t row = 0; row < depth; row += 2) {
    fetch_rows(from, stride, row + kRowsAhead, std::min(row + kRowsAhead + 2, rows), n);
    for (int64_t column = 0; column < n; column += kLanes) {
      const Mask inside = first_of(n - column);
      const auto load = [&](int64_t at) {
        const Mask there = at < rows ? inside : Mask{0};
        return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, words + at * stride + column));
      };
      const Words pair = _mm512_or_si512(load(row), _mm512_slli_epi32(load(row + 1), 16));
      _mm512_mask_storeu_epi32(pairs + row / 2 * n + column, inside, pair);
    }
  }
}

// One vector of sixteen, rounded to T where that is narrower.
inline void store(float* to, Lanes x) { _mm512_storeu_ps(to, x); }
inline void store(BFloat16* to, Lanes x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), to_bf16(x)); }

// The first n of a vector.
inline void store(float* to, Lanes x, Mask first) { _mm512_mask_storeu_ps(to, first, x); }
inline void store(BFloat16* to, Lanes x, Mask first) { _mm256_mask_storeu_epi16(to, first, to_bf16(x)); }

// A row of n sums, rounded to T.
template <typename T>
void store_row(const float* from, int64_t n, T* to) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const Mask first = first_of(n - i);
    store(to + i, _mm512_maskz_loadu_ps(first, from + i), first);
  }
}

// A row of n sums as whole numbers of 16 bits; what they are times. Not finite where one of the sums is not.
inline float carry_row(const float* from, int64_t n, BFloat16* to) {
  Lanes top = all(0.0f), product = all(0.0f);
  for (int64_t i = 0; i < n; i += kLanes) {
    const Lanes sum = _mm512_maskz_loadu_ps(first_of(n - i), from + i);
    top = larger(top, _mm512_abs_ps(sum));
    product = fma(sum, all(0.0f), product);  // 0, or NaN
  }
  const float most = _mm512_reduce_max_ps(top), unit = most / 32767.0f + _mm512_reduce_add_ps(product);
  const Lanes inverse = all(most > 0 ? 32767.0f / most : 0.0f);
  auto* words = reinterpret_cast<uint16_t*>(to);
  for (int64_t i = 0; i < n; i += kLanes) {
    const Mask first = first_of(n - i);
    const Words whole = _mm512_cvtps_epi32(_mm512_maskz_loadu_ps(first, from + i) * inverse);
    _mm256_mask_storeu_epi16(words + i, first, _mm512_cvtepi32_epi16(whole));
  }
  return unit;
}

// Adds a row that was carried.
inline void add_row(const BFloat16* from, int64_t n, float unit, float* to) {
  const auto* words = reinterpret_cast<const uint16_t*>(from);
  for (int64_t i = 0; i < n; i += kLanes) {
    const Mask first = first_of(n - i);
    const Words whole = _mm512_cvtepi16_epi32(_mm256_maskz_loadu_epi16(first, words + i));
    store(to + i, fma(_mm512_cvtepi32_ps(whole), all(unit), _mm512_maskz_loadu_ps(first, to + i)), first);
  }
}

}  // namespace gyrocompass
