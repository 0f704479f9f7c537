// What the native kernels do, whatever instruction set they are compiled for.
//
//   training     mean = Σ x / M,  var = Σ (x − mean)² / M,  invstd = 1 / √(var + eps)
//   forward      y = activation((x − mean) · invstd · weight + bias + residual)
//   backward     g = dy · activation′,  dweight = Σ g·(x − mean) · invstd,  dbias = Σ g,
//                dx = weight · invstd · (g − Σ g / M − (x − mean) · invstd² · Σ g·(x − mean) / M)
//
// Statistics, sums and per-channel numbers are double; what touches every element is float (double
// for double). Two memory layouts: planes, (N, C, S) contiguous, and rows, (R, C) contiguous: what
// channels_last and 2-D inputs are.
#pragma once

#include <cstdint>

namespace batchnorm {

enum class Dtype : int { float32, float64, bfloat16, float16 };
enum class Activation : int { none, relu, leaky_relu, sigmoid, tanh, silu, gelu, hardswish };

struct Job {
  Dtype dtype;
  Activation activation;
  bool residual;              // a residual was added before the activation
  bool rows;                  // (batch, channels); else (batch, channels, plane)
  bool training;              // the statistics are the batch's
  bool past_caches;           // what is written is larger than any cache
  std::int64_t batch, channels, plane;
  int threads;
  double eps;

  // as large as the input; what a verb does not need is null
  const void *x, *dy;
  const void *extra;          // forward: the residual; backward: y or the residual, see `Source`
  void *y, *dx;
  void *gradient;             // backward: where g is kept, if it is

  // one per channel
  double *mean, *var, *invstd;
  const double *weight, *bias;
  double *sum, *dot;          // Σ g and Σ g·(x − mean)
};

// What one instruction set offers.
struct Kernels {
  void (*moments)(const Job&);          // x -> mean, var
  void (*normalize)(const Job&);        // x, mean, invstd, weight, bias, extra -> y
  void (*forward)(const Job&);          // both, a channel at a time where it fits the cache
  void (*reduce_gradient)(const Job&);  // x, dy, extra, mean, invstd, weight, bias -> sum, dot, gradient
  void (*input_gradient)(const Job&);   // and sum, dot -> dx
  void (*backward)(const Job&);         // both
};

// What the backward pass reads beside x and dy.
enum class Source : int { x, y, residual };

constexpr Source source_of(Activation activation, bool residual) {
  return activation == Activation::sigmoid || activation == Activation::tanh ? Source::y
         : !residual || activation == Activation::none                       ? Source::x
         : activation == Activation::relu || activation == Activation::leaky_relu
             ? Source::y
             : Source::residual;
}

// Whether g is written down on the way: where the residual's gradient is another tensor than dy,
// and where g costs an exponential that the second pass had better not take again.
constexpr bool keeps_gradient(Activation activation, bool residual) {
  return activation == Activation::silu || activation == Activation::gelu ||
         (residual && activation != Activation::none);
}

}  // namespace batchnorm
