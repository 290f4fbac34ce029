// Matrix products on all threads. Those in float32 use oneDNN's microkernels if PyTorch exports them.
#pragma once

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>

#include <algorithm>
#include <memory>

#include "transpose.h"

// PyTorch defines this macro if it exports the microkernels. oneDNN has those in float32 for AVX2 and AVX-512.
#if defined(CPUBLAS_BRGEMM_F32F32F32)
#define SPATIAL_MAMBA_TILE_PRODUCTS 1
#if defined(__AVX2__)
#define SPATIAL_MAMBA_FLOAT32_PRODUCTS 1
#endif
#endif

namespace spatial_mamba {

constexpr int64_t kRows = 64;     // of a block of a left factor, at most
constexpr int64_t kColumns = 64;  // of a block of a right factor

// Number of tokens to process at a time, so that their activations stay in the cache.
inline int64_t tile_size(int64_t tokens) { return std::min(tokens, int64_t{512} * at::get_num_threads()); }

// Calls visit(first, count) for a multiple of 8 rows and for the rest: each number of rows needs code of its own.
template <typename Visit>
void for_generated_sizes(int64_t rows, Visit&& visit) {
  const int64_t rest = rows % 8;
  if (rest < rows) visit(0, rows - rest);
  if (rest > 0) visit(rows - rest, rest);
}

#if defined(SPATIAL_MAMBA_FLOAT32_PRODUCTS)

// Whether microkernels multiply a and b: in float32, if rows or columns are contiguous. For few rows, copying b would
// not pay off: fewer than 256 tokens, or 64 outputs in the gradient of a weight, where a is a transpose.
inline bool use_microkernels(const at::Tensor& a, const at::Tensor& b) {
  const auto has_unit_stride = [](const at::Tensor& x) { return x.stride(0) == 1 || x.stride(1) == 1; };
  const bool few_rows = a.size(0) < (a.stride(0) == 1 ? 64 : 256);
  return a.scalar_type() == at::kFloat && at::globalContext().userEnabledMkldnn() && !few_rows && b.numel() > 0 &&
         has_unit_stride(a) && has_unit_stride(b);
}

// A matrix in float32 with contiguous rows or columns.
struct Factor {
  explicit Factor(const at::Tensor& x)
      : data(x.const_data_ptr<float>()), row_stride(x.stride(0)), column_stride(x.stride(1)) {}

  const float* at(int64_t row, int64_t column) const { return data + row * row_stride + column * column_stride; }

  // Copies a block to contiguous rows, `stride` apart.
  void copy(int64_t row, int64_t column, int64_t rows, int64_t columns, float* to, int64_t stride) const {
    const float* from = at(row, column);
    if (column_stride != 1) return transpose(from, column_stride, columns, rows, to, stride);
    for (int64_t i = 0; i < rows; ++i) std::copy_n(from + i * row_stride, columns, to + i * stride);
  }

  const float* data;
  int64_t row_stride, column_stride;
};

// See `product`. Each thread copies the blocks of b that it multiplies, and those of a if its rows are not contiguous.
class MicrokernelProduct {
 public:
  MicrokernelProduct(const at::Tensor& a, const at::Tensor& b, const at::Tensor& out, const at::Tensor& start)
      : left_(a),
        right_(b),
        rows_(out.size(0)),
        columns_(out.size(1)),
        depth_(a.size(1)),
        copy_left_(left_.column_stride != 1 || left_.row_stride < depth_),
        stride_(std::max(out.stride(0), columns_)),
        accumulate_(start.defined()),
        bias_(start.defined() && start.dim() == 1 ? start.const_data_ptr<float>() : nullptr),
        out_(out.mutable_data_ptr<float>()) {
    // Panels of equal width and blocks of equal height, for the same work on every thread.
    const int64_t panels = at::divup(columns_, kPanel);
    width_ = at::divup(at::divup(columns_, panels), kColumns) * kColumns;
    const int64_t fewest = std::max(at::divup(rows_, kRows), at::divup(at::get_num_threads(), panels));
    height_ = at::divup(rows_, 8 * fewest) * 8;
  }

  void run() const {
    const int64_t blocks = at::divup(rows_, height_);
    at::parallel_for(0, at::divup(columns_, width_) * blocks, 1, [&](int64_t begin, int64_t end) {
      const std::unique_ptr<float[]> left(copy_left_ ? new float[height_ * kLeftStride] : nullptr);
      const std::unique_ptr<float[]> right(new float[width_ * std::min(depth_, kDepth)]);
      while (begin < end) {
        const int64_t panel = begin / blocks, before = panel * blocks, next = std::min(end, before + blocks);
        multiply(panel * width_, (begin - before) * height_, (next - before) * height_, left.get(), right.get());
        begin = next;
      }
      at::native::cpublas::brgemm_release();
    });
  }

 private:
  // The blocks of the factors stay in the cache.
  static constexpr int64_t kPanel = 4 * kColumns;      // columns of b to work on at a time, at most
  static constexpr int64_t kDepth = 256;               // products summed per call, at most
  static constexpr int64_t kLeftStride = kDepth + 16;  // rows 1024 bytes apart would compete for a few cache lines

  // The number of products to sum next. Each needs code of its own, so it is a multiple of 32 or a smaller power of 2.
  static int64_t next_depth(int64_t rest) {
    if (rest >= 32) return std::min(rest / 32 * 32, kDepth);
    int64_t depth = 16;
    while (depth > rest) depth /= 2;
    return depth;
  }

  // Rows begin to end of the panel of columns from `panel` on, with memory for blocks of the factors.
  void multiply(int64_t panel, int64_t begin, int64_t end, float* left, float* right) const {
    const int64_t width = std::min(width_, columns_ - panel);
    for (int64_t first = 0, depth; first < depth_; first += depth) {
      depth = next_depth(depth_ - first);
      for_tiles(width, kColumns, [&](int64_t column, int64_t count) {
        right_.copy(first, panel + column, depth, count, right + column * depth, kColumns);
      });
      for_tiles(std::min(end, rows_) - begin, height_, [&](int64_t offset, int64_t rows) {
        const int64_t row = begin + offset, stride = copy_left_ ? kLeftStride : left_.row_stride;
        const float* from = copy_left_ ? left : left_.at(row, first);
        if (copy_left_) left_.copy(row, first, rows, depth, left, stride);
        for_tiles(width, kColumns, [&](int64_t column, int64_t count) {
          float* to = out_ + row * stride_ + panel + column;
          if (bias_ && first == 0) {
            for (int64_t i = 0; i < rows; ++i) std::copy_n(bias_ + panel + column, count, to + i * stride_);
          }
          for_generated_sizes(rows, [&](int64_t i, int64_t n) {
            at::native::cpublas::brgemm(n, count, depth, stride, kColumns, stride_, accumulate_ || first > 0,
                                        from + i * stride, right + column * depth, to + i * stride_, false);
          });
        });
      });
    }
  }

  Factor left_, right_;
  int64_t rows_, columns_, depth_;
  bool copy_left_;
  int64_t stride_;  // of the rows of the result
  bool accumulate_;
  const float* bias_;
  float* out_;
  int64_t width_, height_;  // of a panel and of a block of rows
};

#endif

// out = a @ b + start, where start is undefined (0), a row, or `out` itself. Rows of `out` must be contiguous.
inline void product(const at::Tensor& a, const at::Tensor& b, const at::Tensor& out, const at::Tensor& start = {}) {
#if defined(SPATIAL_MAMBA_FLOAT32_PRODUCTS)
  if (use_microkernels(a, b)) return MicrokernelProduct(a, b, out, start).run();
#endif
  at::Tensor result = out;
  if (start.defined()) {
    at::addmm_out(result, start, a, b);
  } else {
    at::mm_out(result, a, b);
  }
}

}  // namespace spatial_mamba
