// One instruction set's pooling. Compiled once for each, with BATCHNORM_ISA as its name.

#include "pooling.h"

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

constexpr std::int64_t BAND = 4096;  // elements of a plane that are taken at once: y in the cache

// Some rows of a plane: rows 2k and 2k + 1 are in the same band, and both are there but for the last
// one of an odd height.
struct Band {
  std::int64_t start;          // the first element, in x
  std::int64_t pooled;         // in p
  std::int64_t length, pairs;  // elements, and pairs of rows
};

inline std::int64_t rows_of_a_band(const PooledJob& job) {
  const std::int64_t rows = BAND / job.width / 2 * 2;
  return rows < 2 ? 2 : rows;
}

template <class Body>
inline void for_bands(const PooledJob& job, std::int64_t plane, const Body& body) {
  const std::int64_t half = job.width / 2, most = rows_of_a_band(job);
  for (std::int64_t row = 0; row < job.height; row += most) {
    const std::int64_t rows = job.height - row < most ? job.height - row : most;
    body(Band{plane * job.plane + row * job.width, (plane * (job.height / 2) + row / 2) * half,
              rows * job.width, rows / 2});
  }
}

// body(first, last, thread) for the planes, n · C + c, shared by the threads.
template <class Body> inline void over_planes(const PooledJob& job, const Body& body) {
  struct State {
    const PooledJob& job;
    const Body& body;
  } state{job, body};
  parallel(job.threads, [](void* argument, int index, int count) {
    const State& s = *static_cast<State*>(argument);
    const std::int64_t planes = s.job.batch * s.job.channels;
    s.body(planes * index / count, planes * (index + 1) / count, index);
  }, &state);
}

// What a band is computed in. Rows are read and written in whole vectors: what is behind a row's end is
// garbage, or the next row's, which is written later.
struct Buffer {
  Scratch scratch;
  float* plane;          // y or dy
  std::int32_t* places;  // of the maxima

  explicit Buffer(const PooledJob& job)
      : Buffer(rows_of_a_band(job) * job.width + 2 * LANES<float>) {}

 private:
  explicit Buffer(std::int64_t size)
      : scratch(Scratch::bytes<float>(size) + Scratch::bytes<std::int32_t>(size)),
        plane(scratch.take<float>(size)),
        places(scratch.take<std::int32_t>(size)) {}
};

template <Activation ACTIVATION, bool MAXIMUM> struct Pooling {
  using R = Run<float, ACTIVATION, false>;
  using V = Vector<float>;
  static constexpr int L = LANES<float>;

  static void normalize(const PooledJob& job) {
    over_planes(job, [&](std::int64_t first, std::int64_t last, int) {
      const Buffer buffer(job);
      for (std::int64_t plane = first; plane < last; ++plane) {
        const Affine<float> affine = affine_of<float>(job, plane % job.channels);
        for_bands(job, plane, [&](const Band& band) { pool(job, band, affine, buffer); });
      }
    });
  }

  static void pool(const PooledJob& job, const Band& band, const Affine<float>& affine,
                   const Buffer& buffer) {
    const float* x = static_cast<const float*>(job.x) + band.start;
    const V high = splat(affine.high), scale = splat(affine.scale), shift = splat(affine.shift);
    write_run(buffer.plane, 0, band.pairs * 2 * job.width, false, true, [&](std::int64_t i, int lanes) {
      return R::forward(take(x + i, lanes), high, scale, shift, V{});
    });
    const std::int64_t half = job.width / 2;
    float* p = static_cast<float*>(job.y) + band.pooled;
    for (std::int64_t k = 0; k < band.pairs; ++k) {
      const float* above = buffer.plane + 2 * k * job.width;
      for_columns<L>(half, [&](std::int64_t j, int lanes) {
        const float *a = above + 2 * j, *b = a + job.width;
        const V found = MAXIMUM ? maximum(a, b, buffer.places + k * half + j) : mean(a, b);
        put(p + k * half + j, found, lanes);
      });
    }
    if constexpr (MAXIMUM)
      for (std::int64_t i = 0; i < band.pairs * half; ++i)
        job.winner[band.pooled + i] = static_cast<unsigned char>(buffer.places[i]);
  }

  // Of L windows.
  static V mean(const float* a, const float* b) {
    float means[L];
    for (int j = 0; j < L; ++j)
      means[j] = (a[2 * j] + a[2 * j + 1] + b[2 * j] + b[2 * j + 1]) * 0.25f;
    return load(means);
  }

  // The first of equals, and the last NaN, as in torch.
  static V maximum(const float* a, const float* b, std::int32_t* places) {
    float maxima[L];
    for (int j = 0; j < L; ++j) {
      float best = a[2 * j];
      std::int32_t place = 0;
      const auto meet = [&](float value, std::int32_t here) {
        const bool wins = (value > best) | (value != value);
        best = wins ? value : best;
        place = wins ? here : place;
      };
      meet(a[2 * j + 1], 1);
      meet(b[2 * j], 2);
      meet(b[2 * j + 1], 3);
      maxima[j] = best;
      places[j] = place;
    }
    return load(maxima);
  }

  static void reduce_gradient(const PooledJob& job) {
    const std::int64_t C = job.channels;
    Scratch all(Scratch::bytes<Sums>(C * job.threads));
    Sums* sums = all.take<Sums>(C * job.threads);
    for (std::int64_t i = 0; i < C * job.threads; ++i) sums[i] = Sums{};
    over_planes(job, [&](std::int64_t first, std::int64_t last, int index) {
      const Buffer buffer(job);
      for (std::int64_t plane = first; plane < last; ++plane) {
        const std::int64_t c = plane % C;
        const Affine<float> affine = affine_of<float>(job, c);
        for_bands(job, plane, [&](const Band& band) {
          spread(job, band, buffer);
          sums[C * index + c].add(reduce(job, band, affine, buffer.plane));
        });
      }
    });
    Job written = job;  // g is there now
    written.dy = job.gradient;
    for (std::int64_t c = 0; c < C; ++c) {
      Sums found;
      for (int k = 0; k < job.threads; ++k) found.add(sums[C * k + c]);
      if (!finite(found.dot))
        found = Run<float, Activation::none, false>::sums_in_double(written, {0, C, 0, job.batch}, c);
      finish_sums(job, c, found, static_cast<double>(static_cast<float>(job.mean[c])));
    }
  }

  // dp over the windows, 0 where there is none.
  static void spread(const PooledJob& job, const Band& band, const Buffer& buffer) {
    const std::int64_t half = job.width / 2;
    if constexpr (MAXIMUM)
      for (std::int64_t i = 0; i < band.pairs * half; ++i)
        buffer.places[i] = job.winner[band.pooled + i];
    for (std::int64_t row = 0; row < 2 * band.pairs; ++row) {
      float* to = buffer.plane + row * job.width;
      const std::int64_t window = row / 2 * half;
      const std::int32_t leftmost = row % 2 ? 2 : 0;  // place of this row
      const float* dp = static_cast<const float*>(job.dy) + band.pooled + window;
      for_columns<L>(half, [&](std::int64_t j, int lanes) {
        const V values = take(dp + j, lanes);
        V left = values * 0.25f, right = left;
        if constexpr (MAXIMUM) {
          Mask<float> places;
          __builtin_memcpy(&places, buffer.places + window + j, sizeof(places));
          left = select<float>(places == leftmost, values, V{});
          right = select<float>(places == leftmost + 1, values, V{});
        }
        interleave(left, right, to + 2 * j);
      });
      if (job.width % 2) to[job.width - 1] = 0;
    }
    for (std::int64_t i = band.pairs * 2 * job.width; i < band.length; ++i) buffer.plane[i] = 0;
  }

  static void interleave(V left, V right, float* to) {
    float even[L], odd[L];
    store(even, left);
    store(odd, right);
    for (int j = 0; j < L; ++j) {
      to[2 * j] = even[j];
      to[2 * j + 1] = odd[j];
    }
  }

  // Σ g and Σ g·(x − high); g is written down.
  static Sums reduce(const PooledJob& job, const Band& band, const Affine<float>& affine,
                     const float* dy) {
    const float* x = static_cast<const float*>(job.x) + band.start;
    float* gradient = static_cast<float*>(job.gradient) + band.start;
    const V high = splat(affine.high), scale = splat(affine.scale), shift = splat(affine.shift);
    V sum{}, dot{};
    const auto add = [&](std::int64_t i, int lanes) {
      const V centred = take(x + i, lanes) - high;
      V y{};
      if constexpr (R::READS_EXTRA) y = R::forward(take(x + i, lanes), high, scale, shift, V{});
      // behind the last lane dy is 0, and g is; or NaN where z overflows, and the sums are made anew
      const V g = R::gradient(take(dy + i, lanes), centred, scale, shift, y);
      put(gradient + i, g, lanes);
      sum += g;
      dot = fma<float>(g, centred, dot);
    };
    for_columns<L>(band.length, add);
    return {sum_of<float>(sum), sum_of<float>(dot)};
  }
};

template <Activation ACTIVATION> PoolingKernels kernels_for(Pool pool) {
  using Average = Pooling<ACTIVATION, false>;
  using Maximum = Pooling<ACTIVATION, true>;
  if (pool == Pool::maximum) return {Maximum::normalize, Maximum::reduce_gradient};
  return {Average::normalize, Average::reduce_gradient};
}

PoolingKernels kernels_of(const PooledJob& job) {
  using K = Activation;
  switch (job.activation) {
    case K::relu: return kernels_for<K::relu>(job.pool);
    case K::leaky_relu: return kernels_for<K::leaky_relu>(job.pool);
    case K::sigmoid: return kernels_for<K::sigmoid>(job.pool);
    case K::tanh: return kernels_for<K::tanh>(job.pool);
    case K::silu: return kernels_for<K::silu>(job.pool);
    case K::gelu: return kernels_for<K::gelu>(job.pool);
    case K::hardswish: return kernels_for<K::hardswish>(job.pool);
    case K::none: break;
  }
  return kernels_for<K::none>(job.pool);
}

void normalize(const PooledJob& job) { kernels_of(job).normalize(job); }
void reduce_gradient(const PooledJob& job) { kernels_of(job).reduce_gradient(job); }

}  // namespace

namespace pooling {
extern const PoolingKernels BATCHNORM_ISA;
const PoolingKernels BATCHNORM_ISA = {normalize, reduce_gradient};
}  // namespace pooling

}  // namespace batchnorm
