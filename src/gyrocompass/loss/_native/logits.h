// Logits by tile: sixteen tokens side by side in a vector, vocabulary downwards.
//
// A tile holds z^T, [K vocabulary, R tokens]: rows of the head are the left factor as they lie in memory, the
// hidden states (packed once) the right one. With a token per lane, every statistic is a loop down a column of
// vectors with its sums in registers, and no operation across lanes. Tokens that are not allowed hold -inf.
//
// Shape legend: N tokens, D width, V vocabulary; a tile is K vocabulary by R tokens, a block is R tokens.

#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <array>
#include <optional>
#include <vector>

#include "matrix.h"

namespace gyrocompass {

using at::Tensor;

constexpr int64_t kTileVocabulary = 256;
// A block's packed hidden states take at most so much: they stay in the cache while rows of the head pass by.
constexpr int64_t kBlockBytes = 512 << 10, kMostTokens = 256, kFewestTokens = 64;

inline int64_t tokens_of_width(int64_t bytes) { return std::clamp(kBlockBytes / bytes, kFewestTokens, kMostTokens); }

// z = cap * tanh(y * inner) if there is a cap, else y * inner.
struct Rule {
  float inner;
  float cap;  // softcap / temperature; 0 for none

  Rule(double softcap, double scale, double temperature)
      : inner(static_cast<float>(softcap > 0 ? scale / softcap : scale / temperature)),
        cap(static_cast<float>(softcap > 0 ? softcap / temperature : 0.0)) {}

  bool changes_nothing() const { return cap == 0 && inner == 1; }

  Lanes operator()(Lanes y) const { return cap > 0 ? all(cap) * hyperbolic_tangent(y * all(inner)) : y * all(inner); }

  // What tanh's slope multiplies gradients by, from z itself.
  Lanes slope(Lanes z) const { return all(1.0f) - (z / all(cap)) * (z / all(cap)); }
};

// How N tokens are cut into blocks of R and V tokens of vocabulary into tiles of K.
struct Cut {
  int64_t tokens, vocabulary;
  int64_t block_size, n_blocks;
  int64_t tile_size, n_tiles;

  Cut(int64_t n, int64_t v, int64_t width_bytes)
      : tokens(n),
        vocabulary(v),
        block_size(part_size(n, tokens_of_width(width_bytes), n > kLanes ? 2 * kLanes : kLanes)),
        n_blocks(parts(n, block_size)),
        tile_size(part_size(v, kTileVocabulary, kLanes)),
        n_tiles(parts(v, tile_size)) {}

  int64_t padded_tokens() const { return n_blocks * block_size; }
  int64_t tile_rows(int64_t tile) const { return std::min(tile_size, vocabulary - tile * tile_size); }
  int64_t block_rows(int64_t block) const { return std::min(block_size, tokens - block * block_size); }
};

// One product that logits are a sum of: hidden states and head, or the factors of a low-rank addition.
template <typename T>
struct Factors {
  const T* left;  // [N, width]
  const T* right;  // [V, width]
  int64_t left_stride, right_stride, width;
  Scratch<T> packed;  // of left: by block, [width / g, R, g]

  Factors(const Tensor& left_tensor, const Tensor& right_tensor, const Cut& cut)
      : left(left_tensor.const_data_ptr<T>()),
        right(right_tensor.const_data_ptr<T>()),
        left_stride(left_tensor.stride(0)),
        right_stride(right_tensor.stride(0)),
        width(left_tensor.size(1)),
        packed(cut.padded_tokens() * width) {
    share(cut.n_blocks, [&](const auto& next) {
      for (int64_t block = next(); block < cut.n_blocks; block = next()) {
        const int64_t first = block * cut.block_size;
        pack_transposed(left + first * left_stride, left_stride, cut.block_rows(block), width,
                        packed.get() + first * width, cut.block_size);
      }
    });
  }

  const T* block(int64_t first_token) const { return packed.get() + first_token * width; }
};

// Logits wanted one by one, ordered by the tile they fall in and then by token.
class Picks {
 public:
  Picks(const Tensor& row_tensor, const Tensor& token_tensor, const Cut& cut)
      : rows_(row_tensor.const_data_ptr<int64_t>()),
        tokens_(token_tensor.const_data_ptr<int64_t>()),
        n_blocks_(cut.n_blocks),
        ends_(cut.n_tiles * cut.n_blocks + 1) {
    const int64_t n = row_tensor.numel();
    const auto tile_of = [&](int64_t i) {
      return tokens_[i] / cut.tile_size * n_blocks_ + rows_[i] / cut.block_size;
    };
    for (int64_t i = 0; i < n; ++i) {
      if (tokens_[i] >= 0) ++ends_[tile_of(i) + 1];
    }
    for (size_t tile = 1; tile < ends_.size(); ++tile) ends_[tile] += ends_[tile - 1];
    order_.resize(ends_.back());
    std::vector<int64_t> at(ends_);
    for (int64_t i = 0; i < n; ++i) {
      if (tokens_[i] >= 0) order_[at[tile_of(i)]++] = i;
    }
  }

  // Which of the picks, from `from`, fall into a tile.
  struct Range {
    const int64_t *begin, *end;
  };
  Range in(int64_t tile, int64_t block) const {
    const int64_t* ends = ends_.data() + tile * n_blocks_ + block;
    return {order_.data() + ends[0], order_.data() + ends[1]};
  }
  int64_t row(int64_t pick) const { return rows_[pick]; }
  int64_t token(int64_t pick) const { return tokens_[pick]; }

 private:
  const int64_t *rows_, *tokens_;
  int64_t n_blocks_;
  std::vector<int64_t> ends_, order_;
};

// Where the logits of a tile are: a row of tokens for each token of the vocabulary, so many floats apart.
struct Place {
  float* data;
  int64_t stride;
};

// Sixteen tokens of a tile: a vector for each token of the vocabulary, a multiple of sixteen of them.
struct Column {
  float* data;
  int64_t stride, size;

  Lanes operator[](int64_t k) const { return _mm512_load_ps(data + k * stride); }
  void set(int64_t k, Lanes z) const { _mm512_store_ps(data + k * stride, z); }
};

// Everything that [N, V] of logits are made of.
template <typename T>
class Logits {
 public:
  Logits(const Tensor& h, const Tensor& w, const std::optional<Tensor>& bias, const std::optional<Tensor>& a,
         const std::optional<Tensor>& b, const std::optional<Tensor>& floor, Rule rule, const std::optional<Tensor>& kept)
      : cut(h.size(0), w.size(0), h.size(1) * sizeof(T)), rule(rule), bias_(bias ? bias->const_data_ptr<float>() : nullptr) {
    factors.emplace_back(h, w, cut);
    if (a) factors.emplace_back(*a, *b, cut);
    if (floor) floor_ = padded(*floor, cut, kMinusInfinity);
    if (kept) {
      TORCH_CHECK(kept->numel() >= kept_floats(cut), "too little room for the logits to be kept");
      kept_ = kept->data_ptr<float>();
    }
  }

  // How many floats logits need that are kept from one pass to the next.
  static int64_t kept_floats(const Cut& cut) { return cut.n_tiles * cut.tile_size * kept_stride(cut); }

  // A number per token, with a value for those that fill the last block.
  static std::vector<float> padded(const Tensor& tensor, const Cut& cut, float fill) {
    std::vector<float> out(cut.padded_tokens(), fill);
    std::copy_n(tensor.const_data_ptr<float>(), cut.tokens, out.begin());
    return out;
  }

  bool keeps() const { return kept_ != nullptr; }

  // Where a tile is: among the kept logits if there are any, else in memory for one tile.
  Place place(int64_t tile, int64_t block, float* one_tile) const {
    if (!keeps()) return {one_tile, round_up(cut.block_size, 2 * kLanes) + kLanes};
    const int64_t stride = kept_stride(cut);
    return {kept_ + tile * cut.tile_size * stride + block * cut.block_size, stride};
  }
  int64_t tile_floats() const { return cut.tile_size * (round_up(cut.block_size, 2 * kLanes) + kLanes); }

  // The products of a tile; what fills it up to a multiple of sixteen is not allowed.
  void products(int64_t tile, int64_t block, const Place& z) const {
    const int64_t rows = cut.tile_rows(tile);
    for (const auto& factor : factors) {
      const T* right = factor.right + tile * cut.tile_size * factor.right_stride;
      multiply(rows, cut.block_size, factor.width, right, factor.right_stride, factor.block(block * cut.block_size),
               z.data, z.stride, &factor != &factors.front());
    }
    for (int64_t k = rows; k < round_up(rows, kLanes); ++k) {
      std::fill_n(z.data + k * z.stride, cut.block_size, kMinusInfinity);
    }
  }

  Column column(const Place& z, int64_t tile, int64_t lane) const {
    return {z.data + lane, z.stride, round_up(cut.tile_rows(tile), kLanes)};
  }

  // Products become logits; -inf where the bias is.
  void finish(const Column& column, int64_t tile) const {
    if (!bias_ && rule.changes_nothing()) return;
    const float* bias = bias_ ? bias_ + tile * cut.tile_size : nullptr;
    for (int64_t k = 0; k < cut.tile_rows(tile); ++k) {
      const float added = bias ? bias[k] : 0.0f;
      column.set(k, added == kMinusInfinity ? all(added) : rule(column[k] + all(added)));
    }
  }

  // Logits below their token's floor become -inf.
  void apply_floor(const Column& column, int64_t token) const {
    if (floor_.empty()) return;
    const Lanes floor = _mm512_loadu_ps(floor_.data() + token);
    for (int64_t k = 0; k < column.size; ++k) {
      const Lanes z = column[k];
      column.set(k, choose(_mm512_cmp_ps_mask(z, floor, _CMP_LT_OQ), all(kMinusInfinity), z));
    }
  }

  Cut cut;
  Rule rule;
  std::vector<Factors<T>> factors;

 private:
  // An odd number of cache lines, so that a column has its own place in the cache.
  static int64_t kept_stride(const Cut& cut) { return cut.padded_tokens() + kLanes; }

  const float* bias_;
  std::vector<float> floor_;
  float* kept_ = nullptr;
};

}  // namespace gyrocompass
