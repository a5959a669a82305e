// The native CPU backend's operators: the two passes of `_question.py`'s contract over bf16 or float32 logits.
//
// `sums` answers partial sums by part of the vocabulary; `gradients` answers the gradients of the factors and the bias,
// in the order dh, dw, da, db, dbias, and what dw and db are times. With `kept`, `sums` leaves the logits there and
// `gradients` takes them from there; with `so_far` (dw, db, dbias, what they are times), it adds to gradients, and rounds
// them if it is the `last` to do so. Tensors come checked and contiguous along their last axis from `__init__.py`; bias and what
// is by token are float32.

#include <torch/library.h>

#include "gradients.h"
#include "sums.h"

namespace gyrocompass {
namespace {

using MaybeTensor = std::optional<Tensor>;

// The tensors and numbers that logits are made of, in the order of the operators' arguments.
struct Given {
  Tensor h, w;
  MaybeTensor bias, a, b, floor;
  Rule rule;
  MaybeTensor kept;

  template <typename T>
  Logits<T> logits() const {
    return Logits<T>(h, w, bias, a, b, floor, rule, kept);
  }
};

// Calls `work` with a zero of h's type.
template <typename Work>
auto by_dtype(const Given& given, const Work& work) {
  if (given.h.scalar_type() == at::kBFloat16) return work(BFloat16());
  TORCH_CHECK(given.h.scalar_type() == at::kFloat, "hidden states are neither bf16 nor float32");
  return work(float());
}

std::vector<uint32_t> half_of_seeds(const MaybeTensor& seed, const Cut& cut, int shift) {
  if (!seed) return {};
  std::vector<uint32_t> out(cut.padded_tokens());
  const auto* seeds = seed->const_data_ptr<int64_t>();
  for (int64_t i = 0; i < cut.tokens; ++i) out[i] = static_cast<uint32_t>(static_cast<uint64_t>(seeds[i]) >> shift);
  return out;
}

std::vector<Tensor> sums(const Tensor& h, const Tensor& w, const MaybeTensor& bias, const MaybeTensor& a,
                         const MaybeTensor& b, const MaybeTensor& floor, double softcap, double scale,
                         double temperature, const MaybeTensor& kept, const Tensor& pick_row,
                         const Tensor& pick_token, bool mean_logit,
                         const MaybeTensor& threshold, int64_t top, const MaybeTensor& seed, int64_t first_token) {
  const Given given{h, w, bias, a, b, floor, Rule(softcap, scale, temperature), kept};
  return by_dtype(given, [&](auto zero) -> std::vector<Tensor> {
    const auto logits = given.logits<decltype(zero)>();
    const Cut& cut = logits.cut;
    Asks asks{mean_logit, {}, half_of_seeds(seed, cut, 0), half_of_seeds(seed, cut, 32), first_token, top};
    if (threshold) asks.threshold = logits.padded(*threshold, cut, 0.0f);
    const Picks picks(pick_row, pick_token, cut);
    const PartialSums out = SumsPass(logits, picks, asks, pick_row.numel()).run();
    return {out.numbers, out.wholes, out.picks, out.top_value, out.top_token};
  });
}

std::vector<Tensor> gradients(const Tensor& h, const Tensor& w, const MaybeTensor& bias, const MaybeTensor& a,
                              const MaybeTensor& b, const MaybeTensor& floor, double softcap, double scale,
                              double temperature, const MaybeTensor& kept, const Tensor& pick_row,
                              const Tensor& pick_token, const std::vector<Tensor>& so_far, const Tensor& top,
                              const Tensor& slope_a, const MaybeTensor& slope_b, const MaybeTensor& slope_c,
                              const MaybeTensor& slope_d, const Tensor& slope_pick, bool needs_h, bool needs_w,
                              bool needs_bias, bool needs_low_rank, bool last) {
  const Given given{h, w, bias, a, b, floor, Rule(softcap, scale, temperature), kept};
  return by_dtype(given, [&](auto zero) {
    const auto logits = given.logits<decltype(zero)>();
    const Cut& cut = logits.cut;
    const auto by_token = [&](const MaybeTensor& slope) {
      return slope ? logits.padded(*slope, cut, 0.0f) : std::vector<float>(cut.padded_tokens(), 0.0f);
    };
    // Tokens that fill the last block have logits far below their top: no gradient.
    const Slopes slopes{logits.padded(top, cut, FLT_MAX), by_token(slope_a), by_token(slope_b),
                        by_token(slope_c),                by_token(slope_d), slope_pick.const_data_ptr<float>()};
    std::vector<Needs> needs{{needs_h, needs_w}};
    if (a) needs.push_back({needs_low_rank, needs_low_rank});
    std::optional<SoFar> before;
    if (!so_far.empty()) before = SoFar{{so_far[0], so_far[1]}, {so_far[3], so_far[4]}, so_far[2]};
    const Picks picks(pick_row, pick_token, cut);
    return GradientsPass(logits, picks, slopes, needs, needs_bias, before, last).run();
  });
}

int64_t kept_floats(int64_t tokens, int64_t vocabulary, int64_t width, int64_t element_bytes) {
  return Logits<float>::kept_floats(Cut(tokens, vocabulary, width * element_bytes));
}

// Whether a small product comes out right: brgemm is there, and takes these layouts on this processor.
template <typename T>
bool multiplies() {
  alignas(64) T a[2 * 4], b[4 * 16];
  alignas(64) float c[2 * 16];
  for (int i = 0; i < 8; ++i) a[i] = static_cast<T>(static_cast<float>(i));
  for (int i = 0; i < 64; ++i) b[i] = static_cast<T>(1.0f);
  multiply<T>(2, 16, 4, a, 4, b, c, 16, false);
  release<T>();
  return c[0] == 6.0f && c[31] == 22.0f;
}

bool works(bool bf16) { return bf16 ? multiplies<BFloat16>() : multiplies<float>(); }

}  // namespace

TORCH_LIBRARY(gyrocompass_native, library) {
  library.def("sums", &sums);
  library.def("gradients", &gradients);
  library.def("kept_floats", &kept_floats);
  library.def("works", &works);
}

}  // namespace gyrocompass
