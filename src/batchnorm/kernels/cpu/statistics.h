// Sums that keep their digits: chunks in vectors, merged in double.
//
// Included inside an anonymous namespace, behind simd.h.

constexpr std::int64_t CHUNK = 8192;   // elements of a channel that are summed in float
constexpr std::int64_t OPENING = 256;  // whose mean is the first shift

// Mean and Σ (x − mean)² of what was seen, as Chan, Golub & LeVeque (1983) merge them. A chunk is
// summed about a shift near its mean: the elements behind the shift are part of the data, so that
// (shift − mean)² per element is never more than a small multiple of the variance. The mean is kept as
// its distance from the first shift: what a double keeps of a mean of 1e6 is 1e-10, and the squares
// would err by the product of that and the distance of two chunks' means.
struct Moments {
  double count = 0, origin = 0, away = 0, squares = 0;

  double mean() const { return origin + away; }

  void merge(const Moments& other) {
    if (other.count == 0) return;
    if (count == 0) origin = other.origin;
    const double total = count + other.count;
    const double delta = (other.origin - origin) + (other.away - away);
    away += delta * (other.count / total);
    squares += other.squares + delta * delta * (count * other.count / total);
    count = total;
  }

  // Σ (x − shift) and Σ (x − shift)² of a chunk.
  void merge_sums(double chunk_count, double shift, double sum, double about_shift) {
    const double excess = about_shift - sum * (sum / chunk_count);
    merge({chunk_count, shift, sum / chunk_count, excess < 0 ? 0 : excess});
  }
};

inline bool finite(double value) { return value - value == 0; }

// The numbers of one channel that every element meets. The mean is split in two, since what float
// keeps of a mean of 1e6 is worth 0.06: y = (x − high) · scale + shift.
template <class A> struct Affine {
  A high, scale, shift;
};

template <class A> inline Affine<A> affine_of(const Job& job, std::int64_t c) {
  const double mean = job.mean[c];
  const A high = static_cast<A>(mean);
  const double scale = job.weight[c] * job.invstd[c];
  const double low = finite(mean) ? mean - static_cast<double>(high) : 0;
  return {high, static_cast<A>(scale), static_cast<A>(job.bias[c] - low * scale)};
}

// dx = g · scale + (x − high) · slope + offset.
template <class A> struct Slope {
  A scale, slope, offset;
};

template <class A> inline Slope<A> slope_of(const Job& job, std::int64_t c) {
  const double scale = job.weight[c] * job.invstd[c];
  if (!job.training) return {static_cast<A>(scale), 0, 0};
  const double count = static_cast<double>(job.batch) * static_cast<double>(job.plane);
  const double slope = -scale * job.invstd[c] * job.invstd[c] * job.dot[c] / count;
  const double low = job.mean[c] - static_cast<double>(static_cast<A>(job.mean[c]));
  const double offset = -scale * job.sum[c] / count - slope * low;
  return {static_cast<A>(scale), static_cast<A>(slope), static_cast<A>(offset)};
}

// In evaluation the slope is 0, and an x that is not finite has no part in its gradient.
template <class A>
inline Vector<A> input_gradient_of(Vector<A> g, Vector<A> centred, Vector<A> scale, Vector<A> slope,
                                   Vector<A> offset) {
  const Vector<A> rest = select<A>(slope == A(0), offset, fma<A>(centred, slope, offset));
  return fma<A>(g, scale, rest);
}

inline void finish_moments(const Job& job, std::int64_t c, const Moments& moments) {
  job.mean[c] = moments.mean();
  job.var[c] = moments.squares / moments.count;
  job.invstd[c] = 1 / __builtin_sqrt(job.var[c] + job.eps);
}

// Σ g and Σ g·(x − high), as float sums of chunks.
struct Sums {
  double sum = 0, dot = 0;

  void add(const Sums& other) {
    sum += other.sum;
    dot += other.dot;
  }
};

inline void finish_sums(const Job& job, std::int64_t c, const Sums& sums, double high) {
  job.sum[c] = sums.sum;
  job.dot[c] = sums.dot - (job.mean[c] - high) * sums.sum;
}

// Channels [first, last), of the samples [begin, end).
struct Part {
  std::int64_t first, last, begin, end;
};

// body(i) for the elements of a part's channel; rows are planes of one element.
template <class Body>
inline void for_elements(const Job& job, const Part& part, std::int64_t c, const Body& body) {
  for (std::int64_t n = part.begin; n < part.end; ++n)
    for (std::int64_t s = 0; s < job.plane; ++s) body((n * job.channels + c) * job.plane + s);
}

// Squares beyond float's range, infinities and NaN: slowly.
template <class T>
inline Moments moments_in_double(const Job& job, const Part& part, std::int64_t c) {
  const T* x = static_cast<const T*>(job.x);
  const double count = static_cast<double>(part.end - part.begin) * static_cast<double>(job.plane);
  double total = 0, squares = 0;
  for_elements(job, part, c, [&](std::int64_t i) {
    total += static_cast<double>(load(x + i, 1)[0]);
  });
  const double mean = total / count;
  for_elements(job, part, c, [&](std::int64_t i) {
    const double away = static_cast<double>(load(x + i, 1)[0]) - mean;
    squares += away * away;
  });
  return {count, mean, 0, squares};
}

// One storage type, one activation, with a residual or not: what is done to a run of elements of one
// channel.
template <class T, Activation ACTIVATION, bool RESIDUAL> struct Run {
  using A = ComputedIn<T>;
  using V = Vector<A>;
  static constexpr int L = LANES<A>;
  static constexpr Source SOURCE = source_of(ACTIVATION, RESIDUAL);
  static constexpr bool KEEPS = keeps_gradient(ACTIVATION, RESIDUAL);
  static constexpr bool READS_EXTRA = SOURCE != Source::x;

  static V forward(V x, V high, V scale, V shift, V residual) {
    V z = fma<A>(x - high, scale, shift);
    if constexpr (RESIDUAL) z += residual;
    return activate<A, ACTIVATION>(z);
  }

  // `centred` is x − high; `extra` what SOURCE says.
  static V gradient(V dy, V centred, V scale, V shift, V extra) {
    if constexpr (ACTIVATION == Activation::none) return dy;
    if constexpr (SOURCE == Source::y) return gradient_of<A, ACTIVATION>(dy, extra);
    V z = fma<A>(centred, scale, shift);
    if constexpr (SOURCE == Source::residual) z += extra;
    return gradient_of<A, ACTIVATION>(dy, z);
  }

  // Products beyond float's range, infinities and NaN: slowly.
  static Sums sums_in_double(const Job& job, const Part& part, std::int64_t c) {
    const Affine<A> affine = affine_of<A>(job, c);
    Sums sums;
    for_elements(job, part, c, [&](std::int64_t i) {
      V other{};
      if constexpr (READS_EXTRA) other = load(static_cast<const T*>(job.extra) + i, 1);
      const V centred = load(static_cast<const T*>(job.x) + i, 1) - splat<A>(affine.high);
      const double g = static_cast<double>(
          gradient(load(static_cast<const T*>(job.dy) + i, 1), centred, splat<A>(affine.scale),
                   splat<A>(affine.shift), other)[0]);
      sums.sum += g;
      sums.dot += g * static_cast<double>(centred[0]);
    });
    return sums;
  }
};
