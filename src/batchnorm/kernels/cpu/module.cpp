// The binding: addresses and sizes in, one call a pass. The caller has checked the tensors and holds
// them; sizes are checked here before any address is used.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"
#include "memory.h"
#include "pooling.h"
#include "threads.h"

namespace nb = nanobind;

namespace batchnorm {

#if defined(BATCHNORM_X86)
extern const Kernels avx512, avx2;
#endif
#if defined(BATCHNORM_BF16)
extern const Kernels avx512bf16;  // of bfloat16 alone
#endif
extern const Kernels baseline;

namespace pooling {
#if defined(BATCHNORM_X86)
extern const PoolingKernels avx512, avx2;
#endif
extern const PoolingKernels baseline;
}  // namespace pooling

namespace {

struct Choice {
  const char* name;
  const Kernels *kernels, *of_bfloat16;
  const PoolingKernels* pooling;
};

// The widest instruction set that the processor has, or the one that BATCHNORM_ISA names.
Choice choose() {
  const char* wanted = std::getenv("BATCHNORM_ISA");
  const auto may = [&](const char* name) {
    return wanted == nullptr || *wanted == 0 || std::strcmp(wanted, name) == 0;
  };
#if defined(BATCHNORM_X86)
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                        __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                          __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#if defined(BATCHNORM_BF16)
  if (has_avx512 && __builtin_cpu_supports("avx512bf16") && may("avx512"))
    return {"avx512", &avx512, &avx512bf16, &pooling::avx512};
#endif
  if (has_avx512 && may("avx512")) return {"avx512", &avx512, &avx512, &pooling::avx512};
  if (has_avx2 && may("avx2")) return {"avx2", &avx2, &avx2, &pooling::avx2};
#endif
  if (may("baseline")) return {"baseline", &baseline, &baseline, &pooling::baseline};
  throw std::runtime_error(std::string("BATCHNORM_ISA=") + wanted +
                           ", which this processor or this build does not have; there are avx512, "
                           "avx2 and baseline");
}

const Choice& chosen() {
  static const Choice choice = choose();
  return choice;
}

const Kernels& kernels_of(const Job& job) {
  return *(job.dtype == Dtype::bfloat16 ? chosen().of_bfloat16 : chosen().kernels);
}

using Address = std::uintptr_t;

template <class T> T* at(Address address) { return reinterpret_cast<T*>(address); }

float from_bfloat16(std::uint16_t bits) {
  const std::uint32_t wide = static_cast<std::uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

std::uint16_t to_bfloat16(float value) {
  if (std::isnan(value)) return 0x7fc0;
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return static_cast<std::uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

float from_float16(std::uint16_t bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  const float size = exponent == 31 ? (mantissa ? std::numeric_limits<float>::quiet_NaN()
                                                : std::numeric_limits<float>::infinity())
                     : exponent     ? std::ldexp(static_cast<float>(1024 + mantissa), exponent - 25)
                                    : std::ldexp(static_cast<float>(mantissa), -24);
  return bits & 0x8000 ? -size : size;
}

std::uint16_t to_float16(float value) {
  const std::uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const float size = std::fabs(value);
  if (std::isnan(value)) return 0x7e00;
  if (size >= 65520) return static_cast<std::uint16_t>(sign | 0x7c00);
  int exponent = 0;
  std::frexp(size, &exponent);  // size = m · 2^exponent, m in [.5, 1)
  const int unit = size < 0x1p-14f ? -24 : exponent - 11;  // weight of the last bit
  const auto count = static_cast<int>(std::nearbyint(std::ldexp(size, -unit)));
  // a carry into the next power of two is a carry into the exponent
  const int biased = size < 0x1p-14f ? count : ((exponent + 13) << 10) + count;
  return static_cast<std::uint16_t>(sign | biased);
}

// Per-channel values of any dtype, as double.
double read(Address from, Dtype dtype, std::int64_t c) {
  switch (dtype) {
    case Dtype::float32: return static_cast<double>(at<float>(from)[c]);
    case Dtype::float64: return at<double>(from)[c];
    case Dtype::bfloat16: return static_cast<double>(from_bfloat16(at<std::uint16_t>(from)[c]));
    case Dtype::float16: return static_cast<double>(from_float16(at<std::uint16_t>(from)[c]));
  }
  return 0;
}

void write(Address to, Dtype dtype, std::int64_t c, double value) {
  switch (dtype) {
    case Dtype::float32: at<float>(to)[c] = static_cast<float>(value); break;
    case Dtype::float64: at<double>(to)[c] = value; break;
    case Dtype::bfloat16: at<std::uint16_t>(to)[c] = to_bfloat16(static_cast<float>(value)); break;
    case Dtype::float16: at<std::uint16_t>(to)[c] = to_float16(static_cast<float>(value)); break;
  }
}

constexpr std::int64_t bytes_of(Dtype dtype) {
  return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2;
}

// What the calls have in common.
struct Sizes {
  int dtype;
  bool rows;
  std::int64_t batch, channels, plane;
  int threads;
};

constexpr std::int64_t LARGE = std::int64_t{32} << 20;  // bytes that no cache keeps for who reads next
constexpr std::int64_t SERIAL = 16384;  // elements that one thread does sooner than two

Job job_of(const Sizes& sizes, int activation, bool residual) {
  if (sizes.dtype < 0 || sizes.dtype > 3 || activation < 0 || activation > 7)
    throw std::invalid_argument("a dtype or an activation that is not known");
  if (sizes.batch < 1 || sizes.channels < 1 || sizes.plane < 1 || (sizes.rows && sizes.plane != 1))
    throw std::invalid_argument("sizes must be positive, and rows have no plane");
  std::int64_t elements = 0, bytes = 0;
  if (__builtin_mul_overflow(sizes.batch, sizes.channels, &elements) ||
      __builtin_mul_overflow(elements, sizes.plane, &elements) ||
      __builtin_mul_overflow(elements, std::int64_t{8}, &bytes))
    throw std::invalid_argument("sizes beyond 64 bits");
  Job job{};
  job.dtype = static_cast<Dtype>(sizes.dtype);
  job.activation = static_cast<Activation>(activation);
  job.residual = residual;
  job.rows = sizes.rows;
  job.batch = sizes.batch;
  job.channels = sizes.channels;
  job.plane = sizes.plane;
  job.past_caches = elements * bytes_of(job.dtype) >= LARGE;
  const std::int64_t useful = elements / SERIAL;
  job.threads = static_cast<int>(useful < sizes.threads ? useful : sizes.threads);
  if (job.threads < 1) job.threads = 1;
  if (job.threads > 256) job.threads = 256;
  return job;
}

void wanted(bool there, const char* name) {
  if (!there) throw std::invalid_argument(std::string("no address of ") + name);
}

// What the job, whose addresses are set, is with a pooling behind it; `width` of the plane.
PooledJob pooled(const Job& job, int pool, std::int64_t width, Address winner) {
  if (pool < 1 || pool > 2) throw std::invalid_argument("a pooling that is not known");
  if (job.dtype != Dtype::float32 || job.rows || job.residual)
    throw std::invalid_argument("a pooling is of float planes without a residual");
  if (width < 2 || job.plane % width != 0 || job.plane / width < 2)
    throw std::invalid_argument("a plane that is smaller than the window, or no multiple of its width");
  wanted(winner || pool == 1, "where the maxima stand");
  PooledJob made{};
  static_cast<Job&>(made) = job;
  made.pool = static_cast<Pool>(pool);
  made.width = width;
  made.height = job.plane / width;
  made.winner = at<unsigned char>(winner);
  return made;
}

// weight and bias, 1 and 0 where there are none.
struct Parameters {
  std::vector<double> weight, bias;

  Parameters(std::int64_t channels, Address weights, Address biases, Dtype dtype)
      : weight(static_cast<std::size_t>(channels), 1.0), bias(static_cast<std::size_t>(channels)) {
    for (std::int64_t c = 0; c < channels; ++c) {
      if (weights) weight[static_cast<std::size_t>(c)] = read(weights, dtype, c);
      if (biases) bias[static_cast<std::size_t>(c)] = read(biases, dtype, c);
    }
  }
};

Dtype known(int dtype) {
  if (dtype < 0 || dtype > 3) throw std::invalid_argument("a dtype that is not known");
  return static_cast<Dtype>(dtype);
}

// y, and mean, var, invstd of (3, C) doubles where an address is given; running statistics that are
// moved, or used. With a pooling y is the pooled one.
void forward(int dtype, bool rows, std::int64_t batch, std::int64_t channels, std::int64_t plane,
             int threads, Address x, Address residual, Address y, Address weight, Address bias,
             int parameters_dtype, Address running_mean, Address running_var, int running_dtype,
             Address statistics, bool training, double momentum, double eps, int activation,
             int pool, std::int64_t width, Address winner) {
  Job job = job_of({dtype, rows, batch, channels, plane, threads}, activation, residual != 0);
  wanted(x && y, "x or y");
  wanted(training || (running_mean && running_var), "the running statistics");
  const Dtype running = known(running_dtype);
  const Parameters parameters(channels, weight, bias, known(parameters_dtype));
  job.training = training;
  job.eps = eps;
  job.x = at<void>(x);
  job.y = at<void>(y);
  job.extra = at<void>(residual);
  std::vector<double> unwanted(statistics ? 0 : static_cast<std::size_t>(3 * channels));
  job.mean = statistics ? at<double>(statistics) : unwanted.data();
  job.var = job.mean + channels;
  job.invstd = job.var + channels;
  job.weight = parameters.weight.data();
  job.bias = parameters.bias.data();
  if (!training) {
    for (std::int64_t c = 0; c < channels; ++c) {
      job.mean[c] = read(running_mean, running, c);
      job.var[c] = read(running_var, running, c);
      job.invstd[c] = 1 / std::sqrt(job.var[c] + eps);
    }
    if (pool) chosen().pooling->normalize(pooled(job, pool, width, winner));
    else kernels_of(job).normalize(job);
    return;
  }
  if (pool) {
    const PooledJob behind = pooled(job, pool, width, winner);
    kernels_of(job).moments(job);
    chosen().pooling->normalize(behind);
  } else {
    kernels_of(job).forward(job);
  }
  const double count = static_cast<double>(batch) * static_cast<double>(plane);
  for (std::int64_t c = 0; c < channels; ++c) {
    // momentum weighs the new batch, as in torch
    if (running_mean)
      write(running_mean, running, c,
            (1 - momentum) * read(running_mean, running, c) + momentum * job.mean[c]);
    if (running_var)
      write(running_var, running, c,
            (1 - momentum) * read(running_var, running, c) +
                momentum * (job.var[c] * (count / (count - 1))));
  }
}

// dx, dweight, dbias and the residual's gradient, each where an address is given. With a pooling dy is
// the pooled one's, and there is no `extra`.
void backward(int dtype, bool rows, std::int64_t batch, std::int64_t channels, std::int64_t plane,
              int threads, Address x, Address dy, Address extra, Address dx, Address gradient,
              Address weight, Address bias, int parameters_dtype, Address dweight, Address dbias,
              Address statistics, bool training, int activation, bool residual, int pool,
              std::int64_t width, Address winner) {
  Job job = job_of({dtype, rows, batch, channels, plane, threads}, activation, residual);
  wanted(x && dy && statistics, "x, dy or statistics");
  wanted(extra || pool || source_of(job.activation, residual) == Source::x, "y or the residual");
  wanted(gradient || !pool, "the place for the gradient");
  wanted(gradient || !keeps_gradient(job.activation, residual), "the place for the gradient");
  const Dtype dtype_of_parameters = known(parameters_dtype);
  const Parameters parameters(channels, weight, bias, dtype_of_parameters);
  std::vector<double> sums(static_cast<std::size_t>(2 * channels));
  job.training = training;
  job.x = at<void>(x);
  job.dy = at<void>(dy);
  job.extra = at<void>(extra);
  job.dx = at<void>(dx);
  job.gradient = at<void>(gradient);
  job.mean = at<double>(statistics);
  job.var = job.mean + channels;
  job.invstd = job.var + channels;
  job.weight = parameters.weight.data();
  job.bias = parameters.bias.data();
  job.sum = sums.data();
  job.dot = job.sum + channels;
  const Kernels& kernels = kernels_of(job);
  const bool sums_wanted = training || dweight || dbias || keeps_gradient(job.activation, residual);
  if (pool) {
    const PooledJob behind = pooled(job, pool, width, winner);
    chosen().pooling->reduce_gradient(behind);
    job.dy = job.gradient;
    job.activation = Activation::none;
    if (dx) kernels.input_gradient(job);
  } else if (!sums_wanted) kernels.input_gradient(job);
  else if (dx) kernels.backward(job);
  else kernels.reduce_gradient(job);
  for (std::int64_t c = 0; c < channels; ++c) {
    if (dweight) write(dweight, dtype_of_parameters, c, job.dot[c] * job.invstd[c]);
    if (dbias) write(dbias, dtype_of_parameters, c, job.sum[c]);
  }
}

// mean and var (biased) of (3, C) doubles; the third row is left to the caller.
void moments(int dtype, bool rows, std::int64_t batch, std::int64_t channels, std::int64_t plane,
             int threads, Address x, Address statistics) {
  Job job = job_of({dtype, rows, batch, channels, plane, threads}, 0, false);
  wanted(x && statistics, "x or statistics");
  job.training = true;
  job.x = at<void>(x);
  job.mean = at<double>(statistics);
  job.var = job.mean + channels;
  job.invstd = job.var + channels;
  kernels_of(job).moments(job);
}

// Whether in every channel of float values |mean| ≤ near · √var, and their sum of squares is a float with
// room to spare, as torch wants it; not where either is not finite.
bool near_zero(bool rows, std::int64_t batch, std::int64_t channels, std::int64_t plane, Address x,
               double near) {
  std::vector<double> statistics(static_cast<std::size_t>(channels < 1 ? 0 : 3 * channels));
  moments(static_cast<int>(Dtype::float32), rows, batch, channels, plane, 1, x,
          reinterpret_cast<Address>(statistics.data()));
  const double *const mean = statistics.data(), *const var = mean + channels;
  const double count = static_cast<double>(batch) * static_cast<double>(plane);
  const double most = std::numeric_limits<float>::max() / (2 * (1 + near * near) * count);
  for (std::int64_t c = 0; c < channels; ++c)
    if (!(mean[c] * mean[c] <= near * near * var[c] && var[c] <= most)) return false;
  return true;
}

// dx from sums that somebody has added up: over more than x holds, scaled to its count of values.
void input_gradient(int dtype, bool rows, std::int64_t batch, std::int64_t channels,
                    std::int64_t plane, int threads, Address x, Address dy, Address dx,
                    Address weight, int weight_dtype, Address statistics, Address sums) {
  Job job = job_of({dtype, rows, batch, channels, plane, threads}, 0, false);
  wanted(x && dy && dx && statistics && sums, "x, dy, dx, statistics or sums");
  const Parameters parameters(channels, weight, 0, known(weight_dtype));
  job.training = true;
  job.x = at<void>(x);
  job.dy = at<void>(dy);
  job.dx = at<void>(dx);
  job.mean = at<double>(statistics);
  job.var = job.mean + channels;
  job.invstd = job.var + channels;
  job.weight = parameters.weight.data();
  job.bias = parameters.bias.data();
  job.sum = at<double>(sums);
  job.dot = job.sum + channels;
  kernels_of(job).input_gradient(job);
}

// A tensor on a block, as DLPack hands it over. The block is given back when the storage ends: with
// the last tensor, view or saved variable on it, in whichever thread that is, with the GIL or without.
struct Exported {
  struct Managed {
    nb::dlpack::dltensor tensor;
    void* context;
    void (*end)(Managed*);
  } managed;
  Block block;
  std::vector<std::int64_t> sizes, strides;

  static void end(Managed* managed) {
    Exported* const self = static_cast<Exported*>(managed->context);
    give_back(self->block);
    delete self;
  }
};

// A capsule for torch.from_dlpack, or None where there is no memory to be had this way.
nb::object empty(int dtype, std::vector<std::int64_t> sizes, std::vector<std::int64_t> strides) {
  if (sizes.size() != strides.size()) throw std::invalid_argument("as many strides as sizes");
  const std::int64_t item = bytes_of(known(dtype));
  std::int64_t elements = 1;
  for (std::size_t axis = 0; axis < sizes.size(); ++axis) {
    std::int64_t reach = 0;
    if (sizes[axis] < 1 || strides[axis] < 0)
      throw std::invalid_argument("sizes must be positive, and no stride negative");
    if (__builtin_mul_overflow(sizes[axis] - 1, strides[axis], &reach) ||
        __builtin_add_overflow(elements, reach, &elements))
      throw std::invalid_argument("sizes beyond 64 bits");
  }
  if (elements > std::numeric_limits<std::int64_t>::max() / 16)
    throw std::invalid_argument("sizes beyond 64 bits");
  const Block block = take(static_cast<std::size_t>(elements * item));
  if (!block.data) return nb::none();
  auto* const out = new Exported{{}, block, std::move(sizes), std::move(strides)};
  constexpr std::uint8_t FLOAT = 2, BFLOAT = 4;  // DLPack's codes
  nb::dlpack::dltensor& tensor = out->managed.tensor;
  tensor.data = block.data;
  tensor.device = {nb::device::cpu::value, 0};
  tensor.ndim = static_cast<std::int32_t>(out->sizes.size());
  tensor.dtype = {static_cast<Dtype>(dtype) == Dtype::bfloat16 ? BFLOAT : FLOAT,
                  static_cast<std::uint8_t>(8 * item), 1};
  tensor.shape = out->sizes.data();
  tensor.strides = out->strides.data();
  out->managed.context = out;
  out->managed.end = Exported::end;
  PyObject* const capsule = PyCapsule_New(&out->managed, "dltensor", [](PyObject* unused) {
    // who takes the tensor renames the capsule
    if (!PyCapsule_IsValid(unused, "dltensor")) return;
    auto* const managed =
        static_cast<Exported::Managed*>(PyCapsule_GetPointer(unused, "dltensor"));
    managed->end(managed);
  });
  if (!capsule) {
    Exported::end(&out->managed);
    nb::raise_python_error();
  }
  return nb::steal(capsule);
}

}  // namespace
}  // namespace batchnorm

NB_MODULE(_cpu, m) {
  m.doc() = "Batch normalization for processors; see kernels.h for the equations.";
  using Released = nb::call_guard<nb::gil_scoped_release>;
  m.def("forward", &batchnorm::forward, Released());
  m.def("backward", &batchnorm::backward, Released());
  m.def("moments", &batchnorm::moments, Released());
  m.def("near_zero", &batchnorm::near_zero, Released());
  m.def("input_gradient", &batchnorm::input_gradient, Released());
  m.def("isa", [] { return std::string(batchnorm::chosen().name); });
  m.def("has_pool", &batchnorm::has_pool);
  m.def("empty", &batchnorm::empty);
  m.def("keep_at_most", &batchnorm::keep_at_most);
  m.def("most_kept", &batchnorm::most_kept);
  m.def("kept", &batchnorm::kept);
}
