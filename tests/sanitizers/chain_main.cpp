// The training chain's passes on buffers of exactly the size they say they need: once in order, once by several threads
// at the same time. For the address, undefined-behaviour and thread sanitizers.
#include <cstdio>
#include <functional>
#include <thread>
#include <vector>

#include "cpu/chain_apply.h"
#include "cpu/chain_batchnorm.h"
#include "cpu/chain_gradients.h"
#include "cpu/chain_sums.h"

namespace {

using namespace xsep;
using namespace xsep::cpu;

template <class T>
std::vector<T> values(int64_t count) {
  std::vector<T> v;
  for (int64_t i = 0; i < count; ++i) v.push_back(from_float<T>(static_cast<float>(i * 37 % 101) / 50 - 1));
  return v;
}

/// f of parts of [0, count), each on a thread of its own.
void in_parts(int64_t count, int parts, const std::function<void(Range)>& f) {
  std::vector<std::thread> pool;
  for (int64_t i = 0; i < parts; ++i) pool.emplace_back([=, &f] { f({count * i / parts, count * (i + 1) / parts}); });
  for (std::thread& t : pool) t.join();
}

/// What all passes write for an image [2, h, w, c].
template <class T>
std::vector<float> run(int64_t c, int64_t h, int64_t w, int threads) {
  const PoolShape pool{2, c, h, w, ceil_div(h, 2), ceil_div(w, 2), h % 2, w % 2};
  const int64_t pixels = 2 * h * w, pooled = 2 * pool.p * pool.q, c_pad = table_row(c);
  const std::vector<T> x = values<T>(pixels * c), g = values<T>(pooled * c);
  const std::vector<float> scale = values<float>(c_pad), shift = values<float>(c_pad), rows = values<float>(3 * c);
  const ChannelAffine vec{scale.data(), shift.data(), Activation::kIdentity, 0};
  const ChannelAffine load{scale.data(), shift.data(), Activation::kSilu, 0};
  std::vector<T> y(x.size()), dr(x.size()), dx = x, t(g.size()), chosen(g.size());
  std::vector<uint8_t> taps(g.size());

  const ChainApply apply{c, x.data(), load, x.data(), y.data()};
  in_parts(pixels, threads, [&](Range some) { chain_apply<T>(apply, some); });
  const PoolAdd pool_add{pool, x.data(), g.data(), vec, vec, t.data(), taps.data(), chosen.data()};
  in_parts(pooled, threads, [&](Range some) {
    for (int64_t i = some.begin; i < some.end; ++i) pool_add_pixel<T>(pool_add, i);
  });
  const RawGradient raw{c, g.data(), taps.data(), pool, x.data(), rows.data(), dr.data()};
  in_parts(pixels, threads, [&](Range some) { raw_gradient<T>(raw, some); });
  const InputGradient input{c, h, w, dx.data(), g.data(), true, x.data(), load};
  in_parts(pixels, threads, [&](Range some) { input_gradient<T>(input, some); });

  std::vector<float> partials(static_cast<size_t>(3 * c));
  tile_statistics(x.data(), pixels, c, partials.data());
  const void* operand = x.data();
  const GradientSums sums{c, 1, &operand, rows.data()};
  std::vector<double> total(static_cast<size_t>(2 * c)), mean(static_cast<size_t>(c)), deviations(mean.size());
  add_gradient_sums(sums, dx.data(), 0, pixels, total.data());
  const auto count = static_cast<int32_t>(pixels);
  merge_tiles({c, 1, partials.data(), &count, mean.data(), deviations.data()});

  std::vector<float> all(total.begin(), total.end());
  all.insert(all.end(), deviations.begin(), deviations.end());
  for (const auto* image : {&y, &dr, &dx, &t, &chosen}) {
    for (const T& v : *image) all.push_back(to_float(v));
  }
  all.insert(all.end(), taps.begin(), taps.end());
  return all;
}

/// Where scale * x + shift is a rounding error, whether ReLU's value and its gradient are of one mind.
int kinks() {
  constexpr int64_t kChannels = 64, kPixels = 8;
  const std::vector<float> scale = values<float>(table_row(kChannels)), ones(kPixels * kChannels, 1.0f);
  std::vector<float> x = values<float>(kPixels * kChannels), shift(scale.size()), y(x.size()), dx = ones;
  for (size_t i = 0; i < x.size(); ++i) x[i] = 0.1f + 0.7f * x[i];
  for (size_t c = 0; c < kChannels; ++c) {
    shift[c] = -(scale[c] * x[3 * kChannels + c]);
    asm volatile("" : : "m"(shift[c]));  // rounded
  }
  const ChannelAffine load{scale.data(), shift.data(), Activation::kRelu, 0};
  chain_apply<float>({kChannels, x.data(), load, nullptr, y.data()}, {0, kPixels});
  input_gradient<float>({kChannels, kPixels, 1, dx.data(), nullptr, false, x.data(), load}, {0, kPixels});
  int wrong = 0;
  for (size_t i = 0; i < x.size(); ++i) wrong += (y[i] > 0) != (dx[i] != 0) && scale[i % kChannels] != 0;
  return wrong;
}

}  // namespace

int main() {
  int wrong = kinks();
  for (const int64_t c : {1, 13, 64, 150}) {
    for (const int64_t w : {1, 6}) {
      wrong += run<float>(c, 5, w, 1) != run<float>(c, 5, w, 4);
      wrong += run<BFloat16>(c, 4, w, 1) != run<BFloat16>(c, 4, w, 4);
      wrong += run<Half>(c, 3, w, 1) != run<Half>(c, 3, w, 4);
    }
  }
  std::printf("passes %s\n", wrong ? "WRONG" : "right");
  return wrong;
}
