// Matrix products of PyTorch, and the size of tiles for them.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>

#include <algorithm>

namespace spatial_mamba {

// Number of tokens to process at a time, so that their activations stay in the cache.
inline int64_t tile_size(int64_t tokens) { return std::min(tokens, int64_t{1024} * at::get_num_threads()); }

// out = a @ b + start, where start is undefined (0), a row, or `out` itself.
inline void product(const at::Tensor& a, const at::Tensor& b, const at::Tensor& out, const at::Tensor& start = {}) {
  at::Tensor result = out;
  if (start.defined()) {
    at::addmm_out(result, start, a, b);
  } else {
    at::mm_out(result, a, b);
  }
}

}  // namespace spatial_mamba
