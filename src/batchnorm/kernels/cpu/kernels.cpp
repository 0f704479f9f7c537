// One instruction set's kernels. Compiled once for each, with BATCHNORM_ISA as its name.

#include "kernels.h"

#include <type_traits>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "threads.h"

namespace batchnorm {
namespace {

#include "simd.h"
#include "activations.h"
#include "statistics.h"
#include "tiles.h"
#include "planes.h"
#include "passes.h"

// Calls body with the storage type, the activation and whether there is a residual, as constants.
template <class T, bool RESIDUAL, class Body>
void with_activation(const Job& job, const Body& body) {
  using K = Activation;
  switch (job.activation) {
    case K::none: return body.template run<T, K::none, RESIDUAL>(job);
    case K::relu: return body.template run<T, K::relu, RESIDUAL>(job);
    case K::leaky_relu: return body.template run<T, K::leaky_relu, RESIDUAL>(job);
    case K::sigmoid: return body.template run<T, K::sigmoid, RESIDUAL>(job);
    case K::tanh: return body.template run<T, K::tanh, RESIDUAL>(job);
    case K::silu: return body.template run<T, K::silu, RESIDUAL>(job);
    case K::gelu: return body.template run<T, K::gelu, RESIDUAL>(job);
    case K::hardswish: return body.template run<T, K::hardswish, RESIDUAL>(job);
  }
}

template <class T, class Body> void with_residual(const Job& job, const Body& body) {
  if (job.residual) with_activation<T, true>(job, body);
  else with_activation<T, false>(job, body);
}

template <class Body> void dispatch(const Job& job, const Body& body) {
#if defined(__AVX512BF16__)  // the others' kernels are avx512's
  with_residual<bfloat16>(job, body);
#else
  switch (job.dtype) {
    case Dtype::float32: return with_residual<float>(job, body);
    case Dtype::float64: return with_residual<double>(job, body);
    case Dtype::bfloat16: return with_residual<bfloat16>(job, body);
    case Dtype::float16: return with_residual<float16>(job, body);
  }
#endif
}

struct ForwardPass {
  bool sum, write;
  template <class T, Activation ACTIVATION, bool RESIDUAL> void run(const Job& job) const {
    using Pass = Forward<T, ACTIVATION, RESIDUAL>;
    (job.rows ? Pass::rows : Pass::planes)(job, sum, write);
  }
};

struct BackwardPass {
  bool sum, write;
  template <class T, Activation ACTIVATION, bool RESIDUAL> void run(const Job& job) const {
    using Pass = Backward<T, ACTIVATION, RESIDUAL>;
    (job.rows ? Pass::rows : Pass::planes)(job, sum, write);
  }
};

void moments(const Job& job) { dispatch(job, ForwardPass{true, false}); }
void normalize(const Job& job) { dispatch(job, ForwardPass{false, true}); }
void forward(const Job& job) { dispatch(job, ForwardPass{true, true}); }
void reduce_gradient(const Job& job) { dispatch(job, BackwardPass{true, false}); }
void input_gradient(const Job& job) { dispatch(job, BackwardPass{false, true}); }
void backward(const Job& job) { dispatch(job, BackwardPass{true, true}); }

}  // namespace

extern const Kernels BATCHNORM_ISA;
const Kernels BATCHNORM_ISA = {moments,         normalize,      forward,
                               reduce_gradient, input_gradient, backward};

}  // namespace batchnorm
