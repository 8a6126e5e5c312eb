// BatchNorm's vectors in double: from the statistics of tiles, and from the sums of a gradient.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace xsep::cpu {

/// Statistics of tiles, merged: the mean of all pixels, and the sum of the squared deviations from it.
struct Moments {
  int64_t channels, tiles;
  const float* partials;  // [tiles, 3, c]: K, S, Q
  const int32_t* counts;  // [tiles]; a tile may be empty
  double* mean;           // [c]
  double* deviations;     // [c]

  int64_t pixels() const {
    int64_t sum = 0;
    for (int64_t i = 0; i < tiles; ++i) sum += counts[i];
    return sum;
  }
};

/// Tile by tile, in their order; its channels are next to each other.
inline void merge_tiles(const Moments& m) {
  const int64_t c = m.channels;
  const double pixels = static_cast<double>(m.pixels());
  std::fill(m.mean, m.mean + c, 0.0);
  std::fill(m.deviations, m.deviations + c, 0.0);
  for (int64_t tile = 0; tile < m.tiles; ++tile) {
    const float* k = m.partials + tile * 3 * c;
    const float* s = k + c;
    const double n = m.counts[tile];
    for (int64_t i = 0; i < c; ++i) m.mean[i] += n * k[i] + s[i];
  }
  for (int64_t i = 0; i < c; ++i) m.mean[i] /= pixels;
  for (int64_t tile = 0; tile < m.tiles; ++tile) {
    const float* k = m.partials + tile * 3 * c;
    const float* s = k + c;
    const float* q = s + c;
    const double n = m.counts[tile], share = 1 / std::max(n, 1.0);
    for (int64_t i = 0; i < c; ++i) {
      const double sum = s[i], off = k[i] + sum * share - m.mean[i];
      m.deviations[i] += q[i] - sum * sum * share + n * off * off;
    }
  }
}

/// BatchNorm's vectors as they are stored.
struct Normalisation {
  const float* gamma;  // [c], may be null
  const float* beta;   // [c], may be null
  double eps;
  float* scale;   // [c]
  float* shift;   // [c]: from the scale as it was rounded
  float* mean;    // [c]
  float* invstd;  // [c]
};

inline void normalise(const Moments& m, const Normalisation& to) {
  const double pixels = static_cast<double>(m.pixels());
  for (int64_t i = 0; i < m.channels; ++i) {
    const double invstd = 1 / std::sqrt(m.deviations[i] / pixels + to.eps);
    to.scale[i] = static_cast<float>(to.gamma ? to.gamma[i] * invstd : invstd);
    const double shift = -m.mean[i] * to.scale[i];
    to.shift[i] = static_cast<float>(to.beta ? shift + to.beta[i] : shift);
    to.mean[i] = static_cast<float>(m.mean[i]);
    to.invstd[i] = static_cast<float>(invstd);
  }
}

/// running [c] goes by `weight` towards what is now.
inline void move_towards(float* running, const double* now, double scale, double weight, int64_t channels) {
  for (int64_t i = 0; i < channels; ++i) {
    running[i] = static_cast<float>(running[i] + weight * (now[i] * scale - running[i]));
  }
}

/// From the sums of du and du * (r - mean) to dr = a * du + b * r + d and the gradients of gamma and beta.
struct NormalisationGradient {
  int64_t channels;
  const float* sums;    // [2, c]
  const float* mean;    // [c]
  const float* invstd;  // [c]
  const float* gamma;   // [c], may be null
  double pixels;
  bool batch;     // mean and variance were the batch's own; fixed ones have no gradient
  float* coef;    // [3, c]
  float* dgamma;  // [c]
  float* dbeta;   // [c]
};

inline void normalisation_gradient(const NormalisationGradient& p) {
  const int64_t c = p.channels;
  for (int64_t i = 0; i < c; ++i) {
    const double s1 = p.sums[i], s2 = p.sums[c + i], invstd = p.invstd[i];
    const double a = p.gamma ? p.gamma[i] * invstd : invstd;
    const double c0 = p.batch ? s1 / p.pixels : 0, c1 = p.batch ? invstd * invstd * s2 / p.pixels : 0;
    p.coef[i] = static_cast<float>(a);
    p.coef[c + i] = static_cast<float>(-a * c1);
    p.coef[2 * c + i] = static_cast<float>(a * (c1 * p.mean[i] - c0));
    p.dgamma[i] = static_cast<float>(invstd * s2);
    p.dbeta[i] = p.sums[i];
  }
}

}  // namespace xsep::cpu
