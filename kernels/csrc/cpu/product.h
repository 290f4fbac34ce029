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
  const bool few_rows = a.size(0) < (a.stride(0) == 1 ? 64 : 256);
  return a.scalar_type() == at::kFloat && at::globalContext().userEnabledMkldnn() && !few_rows && b.numel() > 0 &&
         (a.stride(0) == 1 || (a.stride(1) == 1 && a.stride(0) >= a.size(1))) &&
         (b.stride(0) == 1 || b.stride(1) == 1);
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
        stride_(std::max(out.stride(0), columns_)),
        accumulate_(start.defined()),
        bias_(start.defined() && start.dim() == 1 ? start.const_data_ptr<float>() : nullptr),
        out_(out.mutable_data_ptr<float>()) {}

  void run() const {
    // Panels of equal width and blocks of equal height, for the same work on every thread.
    const int64_t panels = (columns_ + kPanel - 1) / kPanel, threads = at::get_num_threads();
    const int64_t width = ((columns_ + panels - 1) / panels + kColumns - 1) / kColumns * kColumns;
    const int64_t fewest = std::max((rows_ + kRows - 1) / kRows, (threads + panels - 1) / panels), unit = 8 * fewest;
    const int64_t height = (rows_ + unit - 1) / unit * 8, blocks = (rows_ + height - 1) / height;
    at::parallel_for(0, panels * blocks, 1, [&](int64_t begin, int64_t end) {
      const std::unique_ptr<float[]> right(new float[kPanel * std::min(depth_, kDepth)]);
      const std::unique_ptr<float[]> left(left_.column_stride == 1 ? nullptr : new float[height * kLeftStride]);
      while (begin < end) {
        const int64_t panel = begin / blocks, next = std::min(end, (panel + 1) * blocks), before = panel * blocks;
        multiply(panel * width, width, (begin - before) * height, (next - before) * height, height, left.get(),
                 right.get());
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

  // One panel of columns and blocks of rows.
  void multiply(int64_t panel, int64_t width, int64_t begin, int64_t end, int64_t height, float* left,
                float* right) const {
    width = std::min(width, columns_ - panel);
    // Each depth needs code of its own, so depths are multiples of 32 or smaller powers of 2.
    for (int64_t first = 0, depth = kDepth; first < depth_; first += depth) {
      if (depth > depth_ - first) depth = std::max<int64_t>((depth_ - first) / 32 * 32, 16);
      while (depth > depth_ - first) depth /= 2;
      for_tiles(width, kColumns, [&](int64_t column, int64_t count) {
        right_.copy(first, panel + column, depth, count, right + column * depth, kColumns);
      });
      for_tiles(std::min(end, rows_) - begin, height, [&](int64_t offset, int64_t rows) {
        const int64_t row = begin + offset;
        if (left) left_.copy(row, first, rows, depth, left, kLeftStride);
        for_tiles(width, kColumns, [&](int64_t column, int64_t count) {
          float* to = out_ + row * stride_ + panel + column;
          if (bias_ && first == 0) {
            for (int64_t i = 0; i < rows; ++i) std::copy_n(bias_ + panel + column, count, to + i * stride_);
          }
          const float* from = left ? left : left_.at(row, first);
          const int64_t stride = left ? kLeftStride : left_.row_stride;
          for_generated_sizes(rows, [&](int64_t i, int64_t n) {
            at::native::cpublas::brgemm(n, count, depth, stride, kColumns, stride_, accumulate_ || first > 0,
                                        from + i * stride, right + column * depth, to + i * stride_, false);
          });
        });
      });
    }
  }

  Factor left_, right_;
  int64_t rows_, columns_, depth_, stride_;
  bool accumulate_;
  const float* bias_;
  float* out_;
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
