// Matrix products on all threads. Those in float32 use oneDNN's microkernels if PyTorch exports them.
#pragma once

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>

#include <algorithm>

#include "transpose.h"

// PyTorch defines this macro if it exports the microkernels.
#if defined(CPUBLAS_BRGEMM_F32F32F32)
#define SPATIAL_MAMBA_TILE_PRODUCTS 1
#endif

namespace spatial_mamba {

constexpr int64_t kBlock = 64;   // rows and columns of a block of the result
constexpr int64_t kDepth = 512;  // products summed per call at most, so that both factors stay in the cache

// Number of tokens to process at a time, so that their activations stay in the cache.
inline int64_t tile_size(int64_t tokens) { return std::min(tokens, int64_t{512} * at::get_num_threads()); }

// Calls visit(first, count) for a multiple of 8 rows and for the rest: each number of rows needs code of its own.
template <typename Visit>
void for_generated_sizes(int64_t rows, Visit&& visit) {
  const int64_t rest = rows % 8;
  if (rest < rows) visit(0, rows - rest);
  if (rest > 0) visit(rows - rest, rest);
}

// Copies x, in float32 with contiguous rows or columns, so that its rows are contiguous, at this stride.
inline at::Tensor with_contiguous_rows(const at::Tensor& x, int64_t stride) {
  const int64_t rows = x.size(0), columns = x.size(1);
  const at::Tensor out = at::empty({rows, stride}, x.options());
  const float* from = x.const_data_ptr<float>();
  float* to = out.mutable_data_ptr<float>();
  if (x.stride(1) == 1) {
    at::parallel_for(0, rows, 16, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) std::copy_n(from + row * x.stride(0), columns, to + row * stride);
    });
  } else {
    constexpr int64_t kLine = 16;  // elements of a cache line
    at::parallel_for(0, (columns + kLine - 1) / kLine, 1, [&](int64_t begin, int64_t end) {
      const int64_t first = begin * kLine, count = std::min(end * kLine, columns) - first;
      transpose(from + first * x.stride(1), x.stride(1), count, rows, to + first, stride);
    });
  }
  return out.narrow(1, 0, columns);
}

// x with contiguous rows whose stride is not a multiple of 4096 bytes: such rows compete for a few lines of the cache.
// The stride of a copy is one of a few, since each needs code of its own.
inline at::Tensor as_factor(const at::Tensor& x) {
  if (x.stride(1) == 1 && x.stride(0) >= x.size(1) && x.stride(0) % 1024 != 0) return x;
  int64_t stride = kBlock;
  while (stride < x.size(1)) stride *= 2;
  return with_contiguous_rows(x, stride + 16);
}

// Whether microkernels multiply a and b: in float32 on processors for which oneDNN has them, if rows or columns are
// contiguous. For few rows, transposing b would not pay off.
inline bool use_microkernels(const at::Tensor& a, const at::Tensor& b) {
#if defined(SPATIAL_MAMBA_TILE_PRODUCTS) && defined(__AVX2__)
  const auto has_unit_stride = [](const at::Tensor& x) { return x.stride(0) == 1 || x.stride(1) == 1; };
  return a.scalar_type() == at::kFloat && at::globalContext().userEnabledMkldnn() && has_unit_stride(a) &&
         has_unit_stride(b) && a.size(1) > 0 && a.size(0) >= (b.stride(1) == 1 ? 8 : 256);
#else
  return false;
#endif
}

// b in the layout that products with `a` read: prepare it once for several of them.
inline at::Tensor prepared(const at::Tensor& a, const at::Tensor& b) {
  return use_microkernels(a, b) ? as_factor(b) : b;
}

// out = a @ b + start, where start is undefined (0), a row, or `out` itself. Rows of `out` must be contiguous.
inline void product(const at::Tensor& a, const at::Tensor& b, const at::Tensor& out, const at::Tensor& start = {}) {
  if (!use_microkernels(a, b)) {
    at::Tensor result = out;
    if (start.defined()) {
      at::addmm_out(result, start, a, b);
    } else {
      at::mm_out(result, a, b);
    }
    return;
  }
#if defined(SPATIAL_MAMBA_TILE_PRODUCTS)
  const int64_t rows = out.size(0), columns = out.size(1), depth = a.size(1);
  const at::Tensor left = a.stride(1) == 1 && a.stride(0) >= depth ? a : as_factor(a), right = as_factor(b);
  // Blocks of equal height, for the same work on every thread.
  const int64_t fewest = (rows + kBlock - 1) / kBlock, unit = 8 * fewest, height = (rows + unit - 1) / unit * 8;
  const int64_t row_blocks = (rows + height - 1) / height, column_blocks = (columns + kBlock - 1) / kBlock;
  const float *from = left.const_data_ptr<float>(), *factor = right.const_data_ptr<float>();
  const float* bias = start.defined() && start.dim() == 1 ? start.const_data_ptr<float>() : nullptr;
  float* to = out.mutable_data_ptr<float>();
  const int64_t left_stride = left.stride(0), right_stride = right.stride(0), stride = std::max(out.stride(0), columns);
  at::parallel_for(0, row_blocks * column_blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t row = block / column_blocks * height, column = block % column_blocks * kBlock;
      const int64_t block_rows = std::min(height, rows - row), block_columns = std::min(kBlock, columns - column);
      float* result = to + row * stride + column;
      if (bias) {
        for (int64_t i = 0; i < block_rows; ++i) std::copy_n(bias + column, block_columns, result + i * stride);
      }
      // Each depth needs code of its own, too, so depths are powers of 2.
      for (int64_t first = 0, count = kDepth; first < depth; first += count) {
        while (count > depth - first) count /= 2;
        const auto multiply = [&](int64_t i, int64_t n) {
          at::native::cpublas::brgemm(n, block_columns, count, left_stride, right_stride, stride,
                                      start.defined() || first > 0, from + (row + i) * left_stride + first,
                                      factor + first * right_stride + column, result + i * stride, false);
        };
        for_generated_sizes(block_rows, multiply);
      }
    }
    at::native::cpublas::brgemm_release();
  });
#endif
}

// The gradient of a linear layer's weight (outputs, inputs), summed over tiles of tokens.
class WeightGradient {
 public:
  WeightGradient(int64_t outputs, int64_t inputs, int64_t tokens, const at::TensorOptions& options)
      // Transposes whichever is smaller: the output gradients, or the inputs and the result.
      : flipped_(tokens * outputs > tokens * inputs + outputs * inputs),
        sum_(at::empty(flipped_ ? at::IntArrayRef{inputs, outputs} : at::IntArrayRef{outputs, inputs}, options)) {
    if (tokens == 0) sum_.zero_();
  }

  // Like tile_size, but in half precision there is one tile, because sums over tiles would be rounded after each.
  static int64_t tile_size(const at::Tensor& x) {
    return x.element_size() == 2 ? x.size(0) : spatial_mamba::tile_size(x.size(0));
  }

  // grad_out: (tokens, outputs); x: (tokens, inputs).
  void add(const at::Tensor& grad_out, const at::Tensor& x) {
    product(flipped_ ? x.t() : grad_out.t(), flipped_ ? grad_out : x, sum_, started_ ? sum_ : at::Tensor());
    started_ = true;
  }
  at::Tensor result() const {
    if (!flipped_) return sum_;
    if (sum_.scalar_type() != at::kFloat) return sum_.t().contiguous();
    return with_contiguous_rows(sum_.t(), sum_.size(0));  // faster
  }

 private:
  bool flipped_, started_ = false;
  at::Tensor sum_;
};

}  // namespace spatial_mamba
