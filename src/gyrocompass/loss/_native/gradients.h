// The pass back: each logit once more, turned into its gradient dz, and multiplied into the gradients of the factors.
//
// The vocabulary is cut into ranges of some hundred tokens. Of each range, first dz is made for all tokens, in T, in
// both orders of its axes; then every product of the range is made, dh in blocks of tokens, dw in strips of columns:
//
//     dh [R, S] += dz [R, range] w [range, S]          dw [M, S] = dz^T [M, N] h [N, S]
//
// dh is added up over ranges in float32; a row of dw is finished within its range and written once.
// Logits may have been kept by the forward pass; then there are several passes, each over some of the tokens, and
// gradients of the right factors and the bias are added to what the last one left: float32 ones where they are, bf16
// ones as whole numbers of 16 bits times a factor for each strip of a row, until the last pass rounds them.
//
// Shape legend: N tokens, V vocabulary; a block is R tokens, a strip is S columns of a factor, M rows of a range.

#pragma once

#include <ATen/ops/zeros.h>

#include "logits.h"

namespace gyrocompass {

// dz = e^x (a + b x + c e^x) + d, by token; picks apart.
struct Slopes {
  std::vector<float> top, a, b, c, d;
  const float* pick;
};

struct Needs {
  bool left, right;
};

// Gradients that tokens before these have added to: of the right factors, what their whole numbers are times, and of the
// bias.
struct SoFar {
  std::vector<Tensor> right, unit;
  Tensor bias;
};

template <typename T>
class GradientsPass {
 public:
  GradientsPass(const Logits<T>& logits, const Picks& picks, const Slopes& slopes, const std::vector<Needs>& needs,
                bool needs_bias, const std::optional<SoFar>& so_far, bool last)
      : logits_(logits),
        picks_(picks),
        slopes_(slopes),
        cut_(logits.cut),
        needs_bias_(needs_bias),
        adds_(so_far.has_value()),
        last_(last) {
    range_tiles_ = std::max<int64_t>(1, kRangeBytes / (cut_.padded_tokens() * 2 * sizeof(T)) / cut_.tile_size);
    range_tiles_ = std::min(range_tiles_, parts(std::min(kRangeRows, cut_.vocabulary), cut_.tile_size));
    range_size_ = range_tiles_ * cut_.tile_size;
    const auto narrow = at::TensorOptions().dtype(c10::CppTypeToScalarType<T>::value);
    const auto wide = narrow.dtype(at::kFloat);
    for (size_t i = 0; i < needs.size(); ++i) {
      products_.emplace_back(logits.factors[i], needs[i], *this, narrow, wide);
      if (so_far) products_.back().dright = so_far->right[i], products_.back().unit = so_far->unit[i];
    }
    for (const auto& product : products_) any_left_ |= product.needs.left, any_right_ |= product.needs.right;
    // A little more than needed between rows, so that they do not share places in the cache.
    across_stride_ = range_size_ + 2 * kLanes;
    down_stride_ = cut_.padded_tokens() + 64 / static_cast<int64_t>(sizeof(T));
    if (any_left_) across_.emplace(cut_.padded_tokens() * across_stride_);
    if (any_right_ && !(kWide && logits.keeps())) down_.emplace(range_size_ * down_stride_);
    if (needs_bias) {
      dbias_ = so_far ? so_far->bias : at::empty({cut_.vocabulary}, wide);
      block_dbias_ = at::empty({cut_.n_blocks, range_size_}, wide);
    }
  }

  // Gradients of left and right factors, then those of a low-rank addition, then of the bias; then what those of the
  // right factors are times. Empty if not needed.
  std::vector<Tensor> run() {
    for (int64_t first = 0; first < cut_.n_tiles; first += range_tiles_) {
      const Range range = range_from(first);
      make_dz(range);
      make_products(range);
      if (needs_bias_) add_up_bias(range);
    }
    std::vector<Tensor> out;
    for (auto& product : products_) out.push_back(product.finished_left()), out.push_back(product.dright);
    out.resize(4);
    out.push_back(dbias_);
    for (const auto& product : products_) out.push_back(product.unit);
    out.resize(7);
    for (auto& tensor : out) {
      if (!tensor.defined()) tensor = at::empty({0});
    }
    return out;
  }

 private:
  // In float32, logits and their gradients can lie in the same place, and sums in that of the answer.
  static constexpr bool kWide = std::is_same_v<T, float>;
  // dz of a range in both orders takes at most so much, and its rows are at most so many.
  static constexpr int64_t kRangeBytes = 8 << 20, kRangeRows = 2048;
  // How much of the products is done at once: of dh, tokens and columns; of dw, rows, columns and tokens deep.
  static constexpr int64_t kFewestLeftTokens = 128, kLeftTokens = 1024 / sizeof(T), kLeftStrip = 1280 / sizeof(T);
  static constexpr int64_t kRightRows = 512, kRightStrip = 256, kRightTokens = 2048 / sizeof(T);

  // Some tiles of the vocabulary; `depth` is their size in whole groups.
  struct Range {
    int64_t first_tile, end_tile, first, rows, depth;
  };

  // A factor pair's gradients on their way.
  struct Product {
    const Factors<T>& factors;
    Needs needs;
    Tensor dleft;  // [padded N, width] float32
    Tensor dright;  // [V, width]
    Tensor unit;  // [V, strips] float32: dright is whole numbers times these while there are more passes to come
    std::optional<Scratch<T>> packed_right;  // of the range: by strip, [range / g, S, g]
    int64_t left_strip, right_strip;  // columns of a strip
    int64_t tokens;

    Product(const Factors<T>& factors, Needs needs, const GradientsPass& pass, at::TensorOptions narrow,
            at::TensorOptions wide)
        : factors(factors),
          needs(needs),
          left_strip(part_size(factors.width, kLeftStrip, kLanes)),
          right_strip(part_size(factors.width, kRightStrip, kLanes)),
          tokens(pass.cut_.tokens) {
      if (needs.left) {
        dleft = at::zeros({pass.cut_.padded_tokens(), factors.width}, wide);
        packed_right.emplace(round_up(factors.width, left_strip) * pass.range_size_);
      }
      if (needs.right && !pass.adds_) {
        dright = at::empty({pass.cut_.vocabulary, factors.width}, narrow);
        if (!kWide && !pass.last_) unit = at::empty({pass.cut_.vocabulary, parts(factors.width, right_strip)}, wide);
      }
    }

    Tensor finished_left() const {
      if (!needs.left) return dleft;
      return dleft.narrow(0, 0, tokens).to(c10::CppTypeToScalarType<T>::value);
    }
  };

  // A product to be made, of one pair: some rows and columns of dleft, or of the range's part of dright.
  struct Task {
    const Product* product;
    bool left;
    int64_t row, rows, column, columns;
  };

  Range range_from(int64_t first_tile) const {
    const int64_t end_tile = std::min(first_tile + range_tiles_, cut_.n_tiles), first = first_tile * cut_.tile_size;
    const int64_t rows = std::min(end_tile * cut_.tile_size, cut_.vocabulary) - first;
    return {first_tile, end_tile, first, rows, round_up(rows, kGroup<T>)};
  }

  // dz of all tokens over a range, and the range's rows of the right factors packed. A thread takes a block with some
  // of the tiles: all of them, unless there are fewer blocks than threads have use for.
  void make_dz(const Range& range) {
    std::vector<std::pair<const Product*, int64_t>> strips;  // and their first columns
    for (const auto& product : products_) {
      if (!product.needs.left) continue;
      for (int64_t i = 0; i < product.factors.width; i += product.left_strip) strips.emplace_back(&product, i);
    }
    const int64_t n_tiles = range.end_tile - range.first_tile, n_strips = strips.size();
    const int64_t items = n_tiles * cut_.n_blocks;
    share(n_strips + items, [&](const auto& next) {
      const Scratch<float> z(logits_.tile_floats()), bias(cut_.tile_size * kLanes);
      for (int64_t item = next(); item < n_strips + items; item = next()) {
        if (item < n_strips) {
          pack_strip(*strips[item].first, strips[item].second, range);
        } else {
          const int64_t block = (item - n_strips) / n_tiles, tile = range.first_tile + (item - n_strips) % n_tiles;
          make_tile(range, tile, block, z.get(), bias.get());
        }
      }
      release<T>();
    });
  }

  void pack_strip(const Product& product, int64_t column, const Range& range) {
    const auto& factors = product.factors;
    pack_rows(factors.right + range.first * factors.right_stride + column, factors.right_stride, range.rows, range.depth,
              std::min(product.left_strip, factors.width - column), product.packed_right->get() + column * range_size_);
  }

  // Where dz^T of a range is, in T, and how far its rows are apart.
  std::pair<T*, int64_t> down(const Range& range) const {
    if constexpr (kWide) {
      if (logits_.keeps()) {
        const Place kept = logits_.place(range.first_tile, 0, nullptr);
        return {kept.data, kept.stride};
      }
    }
    return {down_->get(), down_stride_};
  }

  // Where a tile is made: where it is kept, or wanted, or else in memory for one.
  Place place(const Range& range, int64_t tile, int64_t block, float* one_tile) const {
    if constexpr (kWide) {
      if (any_right_) {
        const auto [data, stride] = down(range);
        return {data + (tile - range.first_tile) * cut_.tile_size * stride + block * cut_.block_size, stride};
      }
    }
    return logits_.place(tile, block, one_tile);
  }

  void make_tile(const Range& range, int64_t tile, int64_t block, float* one_tile, float* bias) {
    const Place z = place(range, tile, block, one_tile);
    if (!logits_.keeps()) logits_.products(tile, block, z);
    auto picks = picks_.in(tile, block);
    std::fill(bias, bias + cut_.tile_size * kLanes, 0.0f);
    for (int64_t lane = 0; lane < cut_.block_size; lane += kLanes) {
      const int64_t token = block * cut_.block_size + lane;
      const Column column = logits_.column(z, tile, lane);
      if (!logits_.keeps()) {
        logits_.finish(column, tile);
        logits_.apply_floor(column, token);
      }
      const int64_t* begin = picks.begin;
      while (picks.begin < picks.end && picks_.row(*picks.begin) < token + kLanes) ++picks.begin;
      make_column(column, token, tile, begin, picks.begin);
      if (needs_bias_) {
        for (int64_t k = 0; k < column.size; ++k) {
          _mm512_store_ps(bias + k * kLanes, _mm512_load_ps(bias + k * kLanes) + column[k]);
        }
      }
    }
    const int64_t first_k = (tile - range.first_tile) * cut_.tile_size, first_token = block * cut_.block_size;
    if (any_right_ && !kWide) keep_down(z, tile, first_k, first_token);
    if (any_left_) keep_across(z, tile, first_k, first_token);
    if (needs_bias_) {
      float* out = block_dbias_.template data_ptr<float>() + block * range_size_ + first_k;
      for (int64_t k = 0; k < cut_.tile_rows(tile); ++k) {
        out[k] = _mm512_reduce_add_ps(_mm512_load_ps(bias + k * kLanes));
      }
    }
  }

  // Logits become their gradients.
  void make_column(const Column& column, int64_t token, int64_t tile, const int64_t* pick, const int64_t* end) {
    const auto by_token = [token](const std::vector<float>& values) { return _mm512_loadu_ps(values.data() + token); };
    const Lanes top = by_token(slopes_.top), a = by_token(slopes_.a), b = by_token(slopes_.b);
    const Lanes c = by_token(slopes_.c), d = by_token(slopes_.d);
    std::vector<std::pair<float*, float>> added;
    for (; pick < end; ++pick) {
      float* z = column.data + (picks_.token(*pick) - tile * cut_.tile_size) * column.stride + picks_.row(*pick) - token;
      if (*z != kMinusInfinity) added.emplace_back(z, slopes_.pick[*pick] * bend(*z));
    }
    for (int64_t k = 0; k < column.size; ++k) {
      const Lanes z = column[k];
      const Lanes x = larger(all(kLowestX), z - top);
      const Lanes e = exponential(x);
      Lanes dz = fma(e, fma(b, x, fma(c, e, a)), d);
      if (logits_.rule.cap > 0) dz = dz * logits_.rule.slope(z);
      column.set(k, _mm512_maskz_mov_ps(is_finite_logit(z), dz));
    }
    for (const auto& [z, more] : added) *z += more;
  }

  float bend(float z) const {
    return logits_.rule.cap > 0 ? _mm512_cvtss_f32(logits_.rule.slope(all(z))) : 1.0f;
  }

  // A tile of gradients goes where the products want it, in T: with a row for each token of the vocabulary ...
  void keep_down(const Place& z, int64_t tile, int64_t first_k, int64_t first_token) {
    for (int64_t k = 0; k < cut_.tile_rows(tile); ++k) {
      T* out = down_->get() + (first_k + k) * down_stride_ + first_token;
      const float* row = z.data + k * z.stride;
      for (int64_t lane = 0; lane < cut_.block_size; lane += kLanes) store(out + lane, _mm512_load_ps(row + lane));
    }
  }

  // ... and with a row for each token.
  void keep_across(const Place& z, int64_t tile, int64_t first_k, int64_t first_token) {
    for (int64_t lane = 0; lane < cut_.block_size; lane += kLanes) {
      const Column column = logits_.column(z, tile, lane);
      T* out = across_->get() + (first_token + lane) * across_stride_ + first_k;
      for (int64_t k = 0; k < column.size; k += kLanes) {
        Words block[kLanes];
        for (int64_t i = 0; i < kLanes; ++i) block[i] = _mm512_castps_si512(column[k + i]);
        transpose(block);
        for (int64_t i = 0; i < kLanes; ++i) store(out + i * across_stride_ + k, _mm512_castsi512_ps(block[i]));
      }
    }
  }

  void make_products(const Range& range) {
    std::vector<Task> tasks;
    for (const auto& product : products_) add_tasks(product, range, tasks);
    const auto n = static_cast<int64_t>(tasks.size());
    share(n, [&](const auto& next) {
      const Scratch<float> sum(kWide ? 1 : kRightRows * kRightStrip);
      const Scratch<T> packed(std::min(cut_.padded_tokens(), kRightTokens) * kRightStrip);
      for (int64_t i = next(); i < n; i = next()) {
        if (tasks[i].left) {
          make_left(tasks[i], range);
        } else {
          make_right(tasks[i], range, sum.get(), packed.get());
        }
      }
      release<T>();
    });
  }

  void add_tasks(const Product& product, const Range& range, std::vector<Task>& tasks) const {
    const auto cut = [&](bool left, int64_t rows, int64_t row_step, int64_t column_step) {
      for (int64_t row = 0; row < rows; row += row_step) {
        for (int64_t column = 0; column < product.factors.width; column += column_step) {
          tasks.push_back({&product, left, row, std::min(row_step, rows - row), column,
                           std::min(column_step, product.factors.width - column)});
        }
      }
    };
    // The longer ones first, and a few of them even of few tokens, so that no thread waits long for the last.
    const int64_t left_step = std::clamp(round_up(cut_.padded_tokens() / 4, kLanes), kFewestLeftTokens, kLeftTokens);
    if (product.needs.left) cut(true, cut_.padded_tokens(), left_step, product.left_strip);
    if (product.needs.right) cut(false, range.rows, kRightRows, product.right_strip);
  }

  void make_left(const Task& task, const Range& range) {
    const int64_t width = task.product->factors.width;
    float* out = task.product->dleft.template data_ptr<float>() + task.row * width + task.column;
    multiply(task.rows, task.columns, range.depth, across_->get() + task.row * across_stride_, across_stride_,
             task.product->packed_right->get() + task.column * range_size_, out, width, true);
  }

  void make_right(const Task& task, const Range& range, float* sum, T* packed) {
    const auto& factors = task.product->factors;
    const int64_t columns = task.columns, padded = cut_.padded_tokens();
    const int64_t step = part_size(padded, kRightTokens, 2 * kLanes);
    T* out = task.product->dright.template data_ptr<T>() + (range.first + task.row) * factors.width + task.column;
    const auto [dz, stride] = down(range);
    int64_t sum_stride = columns;
    if constexpr (kWide) sum = out, sum_stride = factors.width;
    for (int64_t token = 0; token < padded; token += step) {
      const int64_t depth = std::min(step, padded - token);
      pack_rows(factors.left + token * factors.left_stride + task.column, factors.left_stride,
                std::clamp<int64_t>(cut_.tokens - token, 0, depth), depth, columns, packed);
      multiply(task.rows, columns, depth, dz + task.row * stride + token, stride, packed, sum, sum_stride,
               (kWide && adds_) || token > 0);
    }
    if constexpr (!kWide) {
      const Tensor& unit = task.product->unit;
      const int64_t strips = parts(factors.width, task.product->right_strip);
      float* units = unit.defined() && unit.numel() > 0
                         ? unit.data_ptr<float>() + (range.first + task.row) * strips + task.column / task.product->right_strip
                         : nullptr;
      for (int64_t row = 0; row < task.rows; ++row) {
        const int64_t at = row * factors.width;
        if (units != nullptr && adds_) add_row(out + at, columns, units[row * strips], sum + row * columns);
        if (units == nullptr || last_) {
          store_row(sum + row * columns, columns, out + at);
        } else {
          units[row * strips] = carry_row(sum + row * columns, columns, out + at);
        }
      }
    }
  }

  void add_up_bias(const Range& range) {
    float* out = dbias_.template data_ptr<float>() + range.first;
    const float* blocks = block_dbias_.template const_data_ptr<float>();
    for (int64_t k = 0; k < range.rows; ++k) {
      if (!adds_) out[k] = 0;
      for (int64_t block = 0; block < cut_.n_blocks; ++block) out[k] += blocks[block * range_size_ + k];
    }
  }

  const Logits<T>& logits_;
  const Picks& picks_;
  const Slopes& slopes_;
  const Cut& cut_;
  bool needs_bias_, adds_, last_, any_left_ = false, any_right_ = false;
  int64_t range_tiles_, range_size_, across_stride_, down_stride_;
  std::vector<Product> products_;
  std::optional<Scratch<T>> across_, down_;  // dz of a range in T: [padded N, range] and [range, padded N]
  Tensor dbias_, block_dbias_;
};

}  // namespace gyrocompass
