// The forward pass: per token, sums of exponentials over the vocabulary and the other statistics.
//
// The vocabulary is cut into parts, a fixed number of them whatever the threads, and each part answers sums of its
// own relative to its own largest logit (`_partial.py` adds the parts up). So the numbers do not depend on the number of
// threads. Within a part, a tile's sums start from 0 and are added to the part's: rounding errors stay those of a few
// hundred additions.

#pragma once

#include "logits.h"

namespace gyrocompass {

// The statistics of each token in a part, as rows of floats ...
enum Number { kTop, kExp, kExpX, kExpSq, kZ, kDrawnKey, kNumbers };
// ... and of whole numbers.
enum Whole { kCount, kAbove, kDrawn, kWholes };

struct Asks {
  bool mean_logit;
  std::vector<float> threshold;  // by token; empty if not asked
  std::vector<uint32_t> seed_low, seed_high;  // by token; empty if not asked
  int64_t first_token;
  int64_t top;
};

// What is known about sixteen tokens in one part of the vocabulary: pointers to rows of the answer.
struct Tally {
  float* numbers;  // [kNumbers, stride]
  int32_t* wholes;  // [kWholes, stride]
  int64_t stride;

  Lanes get(Number which) const { return _mm512_loadu_ps(numbers + which * stride); }
  void set(Number which, Lanes x) const { _mm512_storeu_ps(numbers + which * stride, x); }
  Words get(Whole which) const { return _mm512_loadu_si512(wholes + which * stride); }
  void set(Whole which, Words x) const { _mm512_storeu_si512(wholes + which * stride, x); }
};

inline Lanes largest(const Column& column) {
  Lanes top[4] = {all(-FLT_MAX), all(-FLT_MAX), all(-FLT_MAX), all(-FLT_MAX)};
  for (int64_t k = 0; k < column.size; k += 4) {
    for (int64_t i = 0; i < 4; ++i) top[i] = larger(top[i], column[k + i]);
  }
  return larger(larger(top[0], top[1]), larger(top[2], top[3]));
}

// sum e^x, sum e^x x and sum e^2x with x = z - top. Of a NaN, `top` may know nothing, but its e^x does: no sum loses it.
inline void add_exponentials(const Column& column, const Tally& tally) {
  const Lanes old_top = tally.get(kTop);
  const Lanes top = larger(old_top, largest(column));
  Lanes exp = all(0.0f), exp_x = all(0.0f), exp_sq = all(0.0f);
  for (int64_t k = 0; k < column.size; ++k) {
    const Lanes x = larger(all(kLowestX), column[k] - top);
    const Lanes e = exponential(x);
    exp = exp + e;
    exp_x = fma(e, x, exp_x);
    exp_sq = fma(e, e, exp_sq);
  }
  // The part's sums so far, relative to the new largest logit.
  const Lanes change = larger(all(kLowestX), old_top - top);
  const Lanes factor = exponential(change);
  const Lanes old_exp = tally.get(kExp);
  tally.set(kExpX, exp_x + factor * fma(change, old_exp, tally.get(kExpX)));
  tally.set(kExpSq, exp_sq + factor * factor * tally.get(kExpSq));
  tally.set(kExp, fma(factor, old_exp, exp));
  tally.set(kTop, top);
}

inline void add_mean(const Column& column, const Tally& tally) {
  Lanes sum = all(0.0f);
  Words count = tally.get(kCount);
  for (int64_t k = 0; k < column.size; ++k) {
    const Mask allowed = is_finite_logit(column[k]);
    sum = _mm512_mask_add_ps(sum, allowed, sum, column[k]);
    count = _mm512_mask_add_epi32(count, allowed, count, _mm512_set1_epi32(1));
  }
  tally.set(kZ, tally.get(kZ) + sum);
  tally.set(kCount, count);
}

inline void add_above(const Column& column, const float* threshold, const Tally& tally) {
  const Lanes edge = _mm512_loadu_ps(threshold);
  Words count = tally.get(kAbove);
  for (int64_t k = 0; k < column.size; ++k) {
    count = _mm512_mask_add_epi32(count, is_above(column[k], edge), count, _mm512_set1_epi32(1));
  }
  tally.set(kAbove, count);
}

// The largest z + noise so far, and its token.
inline void add_draw(const Column& column, const Asks& asks, int64_t token, int64_t first_k, const Tally& tally) {
  const Words low = _mm512_loadu_si512(asks.seed_low.data() + token);
  const Words high = _mm512_loadu_si512(asks.seed_high.data() + token);
  Lanes best = tally.get(kDrawnKey);
  Words drawn = tally.get(kDrawn);
  for (int64_t k = 0; k < column.size; ++k) {
    const auto id = static_cast<uint32_t>(asks.first_token + first_k + k);
    const Lanes key = column[k] + gumbel(id, low, high);
    const Mask better = is_above(key, best);
    best = choose(better, key, best);
    drawn = _mm512_mask_mov_epi32(drawn, better, _mm512_set1_epi32(static_cast<int>(first_k + k)));
  }
  tally.set(kDrawnKey, best);
  tally.set(kDrawn, drawn);
}

// The largest logits of each token, descending; of equal ones the first.
struct TopList {
  float* value;  // [tokens, top]
  int64_t* token;
  int64_t top;

  void insert(int64_t row, float z, int64_t k) const {
    float* values = value + row * top;
    int64_t* tokens = token + row * top;
    int64_t at = top - 1;
    for (; at > 0 && values[at - 1] < z; --at) values[at] = values[at - 1], tokens[at] = tokens[at - 1];
    values[at] = z, tokens[at] = k;
  }

  void add(const Column& column, int64_t token_row, int64_t lanes, int64_t first_k) const {
    alignas(64) float last[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) last[i] = i < lanes ? value[(token_row + i) * top + top - 1] : INFINITY;
    for (int64_t k = 0; k < column.size; ++k) {
      for (unsigned better = is_above(column[k], _mm512_load_ps(last)); better != 0; better &= better - 1) {
        const int i = __builtin_ctz(better);
        insert(token_row + i, column.data[k * column.stride + i], first_k + k);
        last[i] = value[(token_row + i) * top + top - 1];
      }
    }
  }
};

struct PartialSums {
  Tensor numbers;  // [parts, kNumbers, padded N]
  Tensor wholes;  // [parts, kWholes, padded N]
  Tensor picks;  // [P]
  Tensor top_value, top_token;  // [parts, N, top]
};

template <typename T>
class SumsPass {
 public:
  SumsPass(const Logits<T>& logits, const Picks& picks, const Asks& asks, int64_t n_picks)
      : logits_(logits), picks_(picks), asks_(asks), cut_(logits.cut) {
    n_parts_ = std::min<int64_t>(cut_.n_tiles, asks.top > 0 ? kPartsWithTop : kParts);
    const auto number = at::TensorOptions().dtype(at::kFloat);
    const int64_t n = cut_.padded_tokens();
    out_.numbers = at::empty({n_parts_, kNumbers, n}, number).zero_();
    out_.numbers.select(1, kTop).fill_(-FLT_MAX);
    out_.numbers.select(1, kDrawnKey).fill_(kMinusInfinity);
    out_.wholes = at::empty({n_parts_, kWholes, n}, number.dtype(at::kInt)).zero_();
    out_.picks = at::empty({n_picks}, number).zero_();
    out_.top_value = at::empty({n_parts_, cut_.tokens, asks.top}, number).fill_(kMinusInfinity);
    out_.top_token = at::empty({n_parts_, cut_.tokens, asks.top}, number.dtype(at::kLong)).zero_();
  }

  // Threads take pieces: a part of the vocabulary for some of the blocks.
  PartialSums run() {
    const int64_t wanted = parts(kPiecesPerThread * at::get_num_threads(), n_parts_);
    const int64_t blocks_each = parts(cut_.n_blocks, std::min(cut_.n_blocks, wanted));
    const int64_t groups = parts(cut_.n_blocks, blocks_each);
    share(n_parts_ * groups, [&](const auto& next) {
      const Scratch<float> z(logits_.tile_floats());
      for (int64_t piece = next(); piece < n_parts_ * groups; piece = next()) {
        const int64_t first = piece % groups * blocks_each;
        run_piece(piece / groups, first, std::min(first + blocks_each, cut_.n_blocks), z.get());
      }
      release<T>();
    });
    return out_;
  }

 private:
  static constexpr int64_t kParts = 32, kPartsWithTop = 8, kPiecesPerThread = 4;
  // Tiles of the head that stay in the cache while block after block passes over them.
  static constexpr int64_t kTilesAtOnce = 4;

  void run_piece(int64_t part, int64_t first_block, int64_t last_block, float* z) {
    const int64_t end = cut_.n_tiles * (part + 1) / n_parts_;
    for (int64_t tile = cut_.n_tiles * part / n_parts_; tile < end; tile += kTilesAtOnce) {
      for (int64_t block = first_block; block < last_block; ++block) {
        for (int64_t one = tile; one < std::min(tile + kTilesAtOnce, end); ++one) add_tile(part, one, block, z);
      }
    }
  }

  void add_tile(int64_t part, int64_t tile, int64_t block, float* one_tile) {
    const Place z = logits_.place(tile, block, one_tile);
    logits_.products(tile, block, z);
    auto range = picks_.in(tile, block);
    for (int64_t lane = 0; lane < cut_.block_rows(block); lane += kLanes) {
      const int64_t token = block * cut_.block_size + lane;
      const Column column = logits_.column(z, tile, lane);
      logits_.finish(column, tile);
      float* picked = out_.picks.template data_ptr<float>();
      for (; range.begin < range.end && picks_.row(*range.begin) < token + kLanes; ++range.begin) {
        const int64_t k = picks_.token(*range.begin) - tile * cut_.tile_size;
        picked[*range.begin] = column.data[k * column.stride + picks_.row(*range.begin) - token];
      }
      logits_.apply_floor(column, token);
      add_column(part, tile, token, column);
    }
  }

  void add_column(int64_t part, int64_t tile, int64_t token, const Column& column) {
    const int64_t n = cut_.padded_tokens(), first_k = tile * cut_.tile_size;
    const Tally tally{out_.numbers.template data_ptr<float>() + part * kNumbers * n + token,
                      out_.wholes.template data_ptr<int32_t>() + part * kWholes * n + token, n};
    add_exponentials(column, tally);
    if (asks_.mean_logit) add_mean(column, tally);
    if (!asks_.threshold.empty()) add_above(column, asks_.threshold.data() + token, tally);
    if (!asks_.seed_low.empty()) add_draw(column, asks_, token, first_k, tally);
    if (asks_.top > 0) {
      const int64_t before = part * cut_.tokens * asks_.top;
      const TopList list{out_.top_value.template data_ptr<float>() + before,
                         out_.top_token.template data_ptr<int64_t>() + before, asks_.top};
      list.add(column, token, std::min(kLanes, cut_.tokens - token), first_k);
    }
  }

  const Logits<T>& logits_;
  const Picks& picks_;
  const Asks& asks_;
  const Cut& cut_;
  int64_t n_parts_;
  PartialSums out_;
};

}  // namespace gyrocompass
