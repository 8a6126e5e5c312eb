// The operators xsep::cpu_chain_bn_finalize and xsep::cpu_chain_bn_backward_finalize.
#include <torch/library.h>

#include "chain_batchnorm.h"
#include "glue.h"

namespace xsep::cpu {
namespace {

/// A vector [c] of any floating type, or nothing, as floats.
class Floats {
 public:
  Floats(const OptionalTensor& t, int64_t c, const char* name) {
    if (!t) return;
    TORCH_CHECK(t->is_cpu() && t->dim() == 1 && t->size(0) == c, name, " must be [", c, "] on the CPU, but is ",
                t->sizes(), " on ", t->device());
    held_ = t->to(at::kFloat).contiguous();
  }
  /// Null where there is nothing.
  const float* data() const { return held_.defined() ? held_.const_data_ptr<float>() : nullptr; }

 private:
  Tensor held_;
};

/// running += weight * (now * scale - running), in place, whatever its type.
void move_running(const OptionalTensor& running, const Tensor& now, double scale, double weight) {
  if (!running) return;
  TORCH_CHECK(running->is_cpu() && running->dim() == 1 && running->size(0) == now.size(0),
              "running statistics must be ", now.sizes(), " on the CPU, but are ", running->sizes(), " on ",
              running->device());
  Tensor moved = running->to(at::kFloat).contiguous();
  move_towards(moved.mutable_data_ptr<float>(), now.const_data_ptr<double>(), scale, weight, now.size(0));
  if (!moved.is_same(*running)) running->copy_(moved);
}

/// The batches seen before and this one, counted in place.
int64_t counted(const Tensor& batches) {
  TORCH_CHECK(batches.is_cpu() && batches.dim() == 0 && batches.scalar_type() == at::kLong,
              "batches must be one int64 on the CPU, but is ", batches.sizes(), " ", batches.scalar_type(), " on ",
              batches.device());
  return ++*batches.mutable_data_ptr<int64_t>();
}

/// (vec [2, C], the mean twice [2, C], invstd [C], pixels []). Counts the batch, and moves the running statistics by
/// momentum, or by one over the batches.
std::tuple<Tensor, Tensor, Tensor, Tensor> bn_finalize(const Tensor& partials, const Tensor& counts,
                                                       const OptionalTensor& gamma, const OptionalTensor& beta,
                                                       const OptionalTensor& running_mean,
                                                       const OptionalTensor& running_var, const OptionalTensor& batches,
                                                       std::optional<double> momentum, double eps) {
  check_input(partials, at::kFloat, 3, "partials");
  check_input(counts, at::kInt, 1, "counts");
  const int64_t tiles = counts.size(0), c = partials.size(2);
  TORCH_CHECK(partials.size(0) == tiles && partials.size(1) == 3, "partials must be [", tiles, ", 3, C], but is ",
              partials.sizes());
  const Floats scales(gamma, c, "gamma"), shifts(beta, c, "beta");
  const Tensor dense_partials = partials.contiguous(), dense_counts = counts.contiguous();
  const auto doubles = at::TensorOptions().dtype(at::kDouble);
  Tensor exact_mean = at::empty({c}, doubles), deviations = at::empty({c}, doubles), count = at::empty({}, doubles);
  const Moments moments{c,
                        tiles,
                        dense_partials.const_data_ptr<float>(),
                        dense_counts.const_data_ptr<int32_t>(),
                        exact_mean.mutable_data_ptr<double>(),
                        deviations.mutable_data_ptr<double>()};
  merge_tiles(moments);
  const double pixels = static_cast<double>(moments.pixels());
  *count.mutable_data_ptr<double>() = pixels;

  const int64_t seen = batches ? counted(*batches) : 1;
  const double weight = momentum.value_or(1 / static_cast<double>(seen));
  move_running(running_mean, exact_mean, 1, weight);
  move_running(running_var, deviations, 1 / std::max(pixels - 1, 1.0), weight);
  Tensor vec = at::empty({2, c}, partials.options()), centres = at::empty({2, c}, partials.options()),
         invstd = at::empty({c}, partials.options());
  float* const scale = vec.mutable_data_ptr<float>();
  float* const mean = centres.mutable_data_ptr<float>();
  normalise(moments, {scales.data(), shifts.data(), eps, scale, scale + c, mean, invstd.mutable_data_ptr<float>()});
  std::copy_n(mean, c, mean + c);
  return {vec, centres, invstd, count};
}

/// (coef [3, C], dgamma [C], dbeta [C])
std::tuple<Tensor, Tensor, Tensor> bn_backward_finalize(const Tensor& sums, const Tensor& mean, const Tensor& invstd,
                                                        const OptionalTensor& gamma, const Tensor& count, bool batch) {
  check_input(sums, at::kFloat, 2, "sums");
  check_input(count, at::kDouble, 0, "count");
  const int64_t c = sums.size(1);
  TORCH_CHECK(sums.size(0) == 2, "sums must be [2, C], but is ", sums.sizes());
  const Floats means(mean, c, "mean"), invstds(invstd, c, "invstd"), scales(gamma, c, "gamma");
  const Tensor dense = sums.contiguous();
  Tensor coef = at::empty({3, c}, sums.options()), dgamma = at::empty({c}, sums.options()),
         dbeta = at::empty({c}, sums.options());
  normalisation_gradient({c, dense.const_data_ptr<float>(), means.data(), invstds.data(), scales.data(),
                          *count.const_data_ptr<double>(), batch, coef.mutable_data_ptr<float>(),
                          dgamma.mutable_data_ptr<float>(), dbeta.mutable_data_ptr<float>()});
  return {coef, dgamma, dbeta};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(xsep, m) {
  m.def(
      "cpu_chain_bn_finalize(Tensor partials, Tensor counts, Tensor? gamma, Tensor? beta, Tensor(a!)? running_mean, "
      "Tensor(b!)? running_var, Tensor(c!)? batches, float? momentum, float eps) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "cpu_chain_bn_backward_finalize(Tensor sums, Tensor mean, Tensor invstd, Tensor? gamma, Tensor count, "
      "bool batch) -> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(xsep, CPU, m) {
  m.impl("cpu_chain_bn_finalize", &bn_finalize);
  m.impl("cpu_chain_bn_backward_finalize", &bn_backward_finalize);
}

}  // namespace xsep::cpu
