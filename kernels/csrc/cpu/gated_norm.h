// LayerNorm of a token times the SiLU of its gate.
#pragma once

#include <cstdint>

#include "moments.h"
#include "tokens.h"
#include "vec.h"

namespace spatial_mamba {

// For the tokens from first to last of y (tokens, dim) and out.
template <typename io, typename yio>
void normalise_and_gate(int64_t first, int64_t last, int64_t dim, const yio* y, const Tokens<const io>& gate,
                        const Compute<io>* weight, const Compute<io>* bias, Compute<io> eps, io* out) {
  using T = Compute<io>;
  const auto channels_of = [&](int64_t token) { return y + token * dim; };
  for_moments<T>(first, last, dim, eps, channels_of, [&](int64_t token, const Moments<T>& found) {
    const yio* values = y + token * dim;
    const io* gates = gate[token];
    io* to = out + token * dim;
    for_channels<T>(dim, [&](auto n, int64_t channel, int lanes) {
      Vec<T> g[n], open[n];
      each<n>([&](int k) { g[k] = load(gates + channel + k * kLanes<T>, lanes); });
      each<n>([&](int k) { prefetch(gates + 8 * gate.stride + channel + k * kLanes<T>); });
      logistic<T, n>(g, open);
      each<n>([&](int k) {
        const int64_t at = channel + k * kLanes<T>;
        const Vec<T> normal = (load(values + at, lanes) - found.mean) * found.rstd;
        store(to + at, (normal * load(weight + at, lanes) + load(bias + at, lanes)) * (g[k] * open[k]), lanes);
      });
    });
  });
}

}  // namespace spatial_mamba
