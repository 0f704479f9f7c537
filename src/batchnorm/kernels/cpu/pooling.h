// A pooling of 2×2 windows with stride 2 behind the normalization and the activation.
//
//   forward      p = the mean or the maximum of each window of y, y as in kernels.h
//   backward     dy = dp / 4 in all of the window, or dp where its maximum stood; g, sum and dot as there
//
// Of float planes, without a residual. The last row of an odd height and the last column of an odd
// width are in no window: the statistics see them, their dy is 0. y is nowhere but in a buffer that
// the first-level cache holds.
#pragma once

#include "kernels.h"

namespace batchnorm {

enum class Pool : int { none, average, maximum };

struct PooledJob : Job {          // y and dy are the pooled ones
  Pool pool;
  std::int64_t height, width;     // of the plane
  unsigned char* winner;          // where in the window the maximum stood: 0 to 3, row by row
};

struct PoolingKernels {
  void (*normalize)(const PooledJob&);        // x, mean, invstd, weight, bias -> y, winner
  void (*reduce_gradient)(const PooledJob&);  // x, dy, winner and these -> sum, dot, gradient
};

}  // namespace batchnorm
