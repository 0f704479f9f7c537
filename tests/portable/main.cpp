// The kernels of one instruction set, without Python: against the equations of kernels.h in double.
//
// Every dtype, layout and way of cutting the work, every activation, with and without a residual.
// Prints a line for each failure and how much was compared; the exit status is 1 where anything failed.

#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "kernels.h"

namespace batchnorm {
extern const Kernels baseline;
}

namespace {

using namespace batchnorm;
using Values = std::vector<double>;
using Sums = std::vector<long double>;  // which must not err by what is looked for

constexpr double EPS = 1e-5;
const char* const DTYPES[] = {"float32", "float64", "bfloat16", "float16"};
const char* const ACTIVATIONS[] = {"none", "relu", "leaky_relu", "sigmoid",
                                   "tanh", "silu", "gelu", "hardswish"};

#if defined(__aarch64__)
using Half = __fp16;
#else
using Half = _Float16;
#endif

// How the storage types are written down here: by the compiler's own conversions.
struct Format {
  std::size_t bytes;
  double roundoff;     // of storage
  double accumulator;  // of what is computed
};
const Format FORMATS[] = {{4, 0x1p-24, 0x1p-24}, {8, 0x1p-53, 0x1p-53},
                          {2, 0x1p-8, 0x1p-24}, {2, 0x1p-11, 0x1p-24}};

void put(char* to, Dtype dtype, double value) {
  const float single = static_cast<float>(value);
  const Half half = static_cast<Half>(single);
  std::uint32_t bits;
  std::memcpy(&bits, &single, 4);
  const auto upper = static_cast<std::uint16_t>(bits >> 16);  // exact for the values below
  switch (dtype) {
    case Dtype::float32: std::memcpy(to, &single, 4); break;
    case Dtype::float64: std::memcpy(to, &value, 8); break;
    case Dtype::bfloat16: std::memcpy(to, &upper, 2); break;
    case Dtype::float16: std::memcpy(to, &half, 2); break;
  }
}

double get(const char* from, Dtype dtype) {
  float single;
  double value;
  Half half;
  std::uint16_t upper;
  switch (dtype) {
    case Dtype::float32: std::memcpy(&single, from, 4); return static_cast<double>(single);
    case Dtype::float64: std::memcpy(&value, from, 8); return value;
    case Dtype::float16: std::memcpy(&half, from, 2); return static_cast<double>(half);
    case Dtype::bfloat16: break;
  }
  std::memcpy(&upper, from, 2);
  const std::uint32_t bits = static_cast<std::uint32_t>(upper) << 16;
  std::memcpy(&single, &bits, 4);
  return static_cast<double>(single);
}

std::vector<char> stored(const Values& values, Dtype dtype) {
  const std::size_t bytes = FORMATS[static_cast<int>(dtype)].bytes;
  std::vector<char> to(values.size() * bytes);
  for (std::size_t i = 0; i < values.size(); ++i) put(&to[i * bytes], dtype, values[i]);
  return to;
}

// Multiples of 1/16 from −4 to 4: every format holds them exactly.
Values random_values(std::size_t count, std::uint64_t& state) {
  Values values(count);
  for (double& value : values) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    value = static_cast<double>(state >> 57) / 16 - 4;
  }
  return values;
}

double activate(Activation kind, double z) {
  switch (kind) {
    case Activation::none: return z;
    case Activation::relu: return z > 0 ? z : 0;
    case Activation::leaky_relu: return z > 0 ? z : 0.01 * z;
    case Activation::sigmoid: return 1 / (1 + std::exp(-z));
    case Activation::tanh: return std::tanh(z);
    case Activation::silu: return z / (1 + std::exp(-z));
    case Activation::gelu: return z * std::erfc(-z / std::sqrt(2.0)) / 2;
    case Activation::hardswish: return z * std::fmin(std::fmax(z + 3, 0), 6) / 6;
  }
  return 0;
}

double derivative(Activation kind, double z) {
  const double s = 1 / (1 + std::exp(-z));
  switch (kind) {
    case Activation::none: return 1;
    case Activation::relu: return z > 0;
    case Activation::leaky_relu: return z > 0 ? 1 : 0.01;
    case Activation::sigmoid: return s * (1 - s);
    case Activation::tanh: return 1 - std::tanh(z) * std::tanh(z);
    case Activation::silu: return s * (1 + z * (1 - s));
    case Activation::gelu:
      return std::erfc(-z / std::sqrt(2.0)) / 2 +
             z * std::exp(-z * z / 2) / std::sqrt(2 * std::acos(-1.0));
    case Activation::hardswish: return z < -3 ? 0 : z > 3 ? 1 : z / 3 + 0.5;
  }
  return 0;
}

struct Case {
  Dtype dtype;
  Activation activation;
  bool residual, rows;
  std::int64_t batch, channels, plane;

  std::size_t size() const { return static_cast<std::size_t>(batch * channels * plane); }
  std::size_t channel(std::size_t i) const {
    return i / static_cast<std::size_t>(plane) % static_cast<std::size_t>(channels);
  }
  double count() const { return static_cast<double>(batch * plane); }
  std::string name() const {
    return std::string(DTYPES[static_cast<int>(dtype)]) + " " +
           ACTIVATIONS[static_cast<int>(activation)] + (residual ? " behind a residual" : "") +
           (rows ? ", rows " : ", planes ") + std::to_string(batch) + "x" +
           std::to_string(channels) + "x" + std::to_string(plane);
  }
};

int compared = 0, failed = 0;

// Rounded once to the storage, and some roundoffs of the accumulator: log2 of the count for a sum, and
// a few dozen for an exponential and what is around it.
void compare(const Case& c, const char* what, const Values& found, const Values& exact,
             double roundoff) {
  double largest = 1, error = 0;
  for (std::size_t i = 0; i < exact.size(); ++i) {
    largest = std::fmax(largest, std::fabs(exact[i]));
    const double off = std::fabs(found[i] - exact[i]);
    if (!(off <= error)) error = off;  // NaN, too
  }
  const double units = 40 + std::log2(c.count());
  const double allowed =
      largest * (roundoff + units * FORMATS[static_cast<int>(c.dtype)].accumulator);
  ++compared;
  if (error <= allowed) return;
  ++failed;
  std::printf("%s, %s: error %.3g, allowed %.3g\n", c.name().c_str(), what, error, allowed);
}

Values loaded(const std::vector<char>& from, Dtype dtype) {
  const std::size_t bytes = FORMATS[static_cast<int>(dtype)].bytes;
  Values values(from.size() / bytes);
  for (std::size_t i = 0; i < values.size(); ++i) values[i] = get(&from[i * bytes], dtype);
  return values;
}

void check(const Case& c, std::uint64_t& state) {
  const std::size_t size = c.size(), C = static_cast<std::size_t>(c.channels);
  const Values x = random_values(size, state), dy = random_values(size, state);
  const Values residual = c.residual ? random_values(size, state) : Values(size);
  Values weight = random_values(C, state), bias = random_values(C, state);

  // the definition, in two passes
  Sums mean(C), var(C), sum(C), dot(C);
  Values z(size), y(size), g(size), dx(size);
  for (std::size_t i = 0; i < size; ++i) mean[c.channel(i)] += x[i] / c.count();
  for (std::size_t i = 0; i < size; ++i)
    var[c.channel(i)] += (x[i] - mean[c.channel(i)]) * (x[i] - mean[c.channel(i)]) / c.count();
  for (std::size_t i = 0; i < size; ++i) {
    const std::size_t k = c.channel(i);
    const long double centred = x[i] - mean[k];
    z[i] = static_cast<double>(centred / std::sqrt(var[k] + EPS) * weight[k] + bias[k] +
                               residual[i]);
    y[i] = activate(c.activation, z[i]);
  }

  const std::vector<char> x_stored = stored(x, c.dtype), dy_stored = stored(dy, c.dtype),
                          residual_stored = stored(residual, c.dtype);
  std::vector<char> y_found(x_stored.size()), dx_found(x_stored.size()), kept(x_stored.size());
  Values statistics(3 * C), sums(2 * C);
  Job job{};
  job.dtype = c.dtype;
  job.activation = c.activation;
  job.residual = c.residual;
  job.rows = c.rows;
  job.training = true;
  job.batch = c.batch;
  job.channels = c.channels;
  job.plane = c.plane;
  job.threads = 1;
  job.eps = EPS;
  job.x = x_stored.data();
  job.dy = dy_stored.data();
  job.extra = residual_stored.data();
  job.y = y_found.data();
  job.dx = dx_found.data();
  job.gradient = kept.data();
  job.mean = statistics.data();
  job.var = job.mean + C;
  job.invstd = job.var + C;
  job.weight = weight.data();
  job.bias = bias.data();
  job.sum = sums.data();
  job.dot = job.sum + C;
  baseline.forward(job);
  const Format& format = FORMATS[static_cast<int>(c.dtype)];
  compare(c, "mean", Values(job.mean, job.mean + C), Values(mean.begin(), mean.end()), 0);
  compare(c, "var", Values(job.var, job.var + C), Values(var.begin(), var.end()), 0);
  compare(c, "y", loaded(y_found, c.dtype), y, format.roundoff);

  // the gradient: where it is computed from y, of y as it was stored
  const bool from_y = source_of(c.activation, c.residual) == Source::y;
  if (from_y) job.extra = y_found.data();
  for (std::size_t i = 0; i < size; ++i) {
    g[i] = dy[i] * derivative(c.activation, z[i]);
    sum[c.channel(i)] += g[i];
    dot[c.channel(i)] += g[i] * (x[i] - mean[c.channel(i)]);
  }
  for (std::size_t i = 0; i < size; ++i) {
    const std::size_t k = c.channel(i);
    const long double invstd = 1 / std::sqrt(var[k] + EPS);
    dx[i] = static_cast<double>(weight[k] * invstd *
                                (g[i] - sum[k] / c.count() -
                                 (x[i] - mean[k]) * invstd * invstd * dot[k] / c.count()));
  }
  baseline.backward(job);
  // a half's y or g was rounded before: twice its roundoff at the largest dy and weight / std
  const double rounded = from_y || keeps_gradient(c.activation, c.residual) ? 16 : 1;
  compare(c, "dx", loaded(dx_found, c.dtype), dx, rounded * format.roundoff);
  const double each = rounded == 1 ? 0 : format.roundoff;
  Values per_value(job.dot, job.dot + C), exact(dot.begin(), dot.end());
  for (std::size_t k = 0; k < C; ++k) {
    per_value[k] /= c.count();
    exact[k] /= c.count();
  }
  compare(c, "sum of g (x - mean)", per_value, exact, 4 * each);
}

}  // namespace

int main() {
  std::uint64_t state = 1;
  struct {
    bool rows;
    std::int64_t batch, channels, plane;
  } const shapes[] = {
      {false, 3, 5, 49},     // planes in tiles
      {false, 16, 37, 9},
      {false, 2, 3, 4160},   // planes in chunks
      {false, 1, 2, 20000},
      {true, 33, 17, 1},     // rows: several as one, and a rest
      {true, 700, 6, 1},
      {true, 64, 520, 1},
  };
  for (int dtype = 0; dtype < 4; ++dtype)
    for (int activation = 0; activation < 8; ++activation)
      for (const bool residual : {false, true})
        for (const auto& s : shapes)
          check({static_cast<Dtype>(dtype), static_cast<Activation>(activation), residual, s.rows,
                 s.batch, s.channels, s.plane}, state);
  std::printf("%d results compared, %d wrong\n", compared, failed);
  return failed > 0;
}
