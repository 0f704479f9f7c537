// Planes, (N, C, S) contiguous: a channel is N runs of S elements, C · S apart.
//
// Included inside an anonymous namespace, behind tiles.h. A few channels at a time are summed,
// then normalized from their end, where the cache still holds them: memory is read once, in runs of
// `RUN` elements where that many fit. A channel that does not fit is shared by the threads.

constexpr std::int64_t CACHED = 900 * 1024;  // bytes of a channel that stay in the cache
constexpr std::int64_t GROUP_BYTES = 1024 * 1024;
constexpr std::int64_t RUN = 8192;     // elements that a group of planes has side by side
constexpr int GROUP = 64;              // channels in a group, at most

// A piece of a plane of S elements: [from, from + length) of sample n.
template <class Body>
inline void for_pieces(const Job& job, std::int64_t n, std::int64_t c, Body body) {
  const std::int64_t start = (n * job.channels + c) * job.plane;
  for (std::int64_t s = 0; s < job.plane; s += CHUNK)
    body(start + s, job.plane - s < CHUNK ? job.plane - s : CHUNK);
}

// Where memory will be read soon. The hardware looks ahead within a page, and not across the gap
// between a sample's channels and the next one's.
struct Ahead {
  std::int64_t end;  // of this sample's part
  std::int64_t gap;  // from there to the next sample's

  Ahead(const Job& job, const Part& part, std::int64_t n)
      : end((n * job.channels + part.last) * job.plane),
        gap(n + 1 < part.end ? (job.channels - (part.last - part.first)) * job.plane : 0) {}

  template <class T> void ask_for(const T* base, std::int64_t at) const {
    constexpr std::int64_t line = 64 / static_cast<std::int64_t>(sizeof(T));
    at += AHEAD / static_cast<std::int64_t>(sizeof(T));
    const T* from = base + (at < end ? at : at + gap);
    for (std::int64_t i = 0; i < 4 * LANES<ComputedIn<T>>; i += line) __builtin_prefetch(from + i);
  }
};

template <class T> struct PlaneMoments {
  using A = ComputedIn<T>;
  using V = Vector<A>;
  static constexpr int L = LANES<A>;

  const T* x;
  A shift[GROUP];
  V sum[GROUP], squares[GROUP];

  // Four accumulators hide the latency of the additions.
  void add(std::int64_t start, std::int64_t length, int k, const Ahead& ahead) {
    const T* from = x + start;
    const V s = splat<A>(shift[k]);
    V a0 = sum[k], q0 = squares[k], a1{}, q1{}, a2{}, q2{}, a3{}, q3{};
    std::int64_t i = 0;
    for (; i + 4 * L <= length; i += 4 * L) {
      ahead.ask_for(x, start + i);
      const V d0 = load(from + i) - s, d1 = load(from + i + L) - s;
      const V d2 = load(from + i + 2 * L) - s, d3 = load(from + i + 3 * L) - s;
      a0 += d0; a1 += d1; a2 += d2; a3 += d3;
      q0 = fma<A>(d0, d0, q0); q1 = fma<A>(d1, d1, q1);
      q2 = fma<A>(d2, d2, q2); q3 = fma<A>(d3, d3, q3);
    }
    for (; i + L <= length; i += L) {
      const V d = load(from + i) - s;
      a1 += d;
      q1 = fma<A>(d, d, q1);
    }
    if (i < length) {
      const int rest = static_cast<int>(length - i);
      const V d = first<A>(load(from + i, rest) - s, rest);
      a2 += d;
      q2 = fma<A>(d, d, q2);
    }
    sum[k] = (a0 + a1) + (a2 + a3);
    squares[k] = (q0 + q1) + (q2 + q3);
  }

  void flush(int k, std::int64_t count, Moments& moments) {
    if (count == 0) return;
    moments.merge_sums(static_cast<double>(count), static_cast<double>(shift[k]),
                       sum_of<A>(sum[k]), sum_of<A>(squares[k]));
    sum[k] = squares[k] = V{};
    if (finite(moments.mean())) shift[k] = static_cast<A>(moments.mean());
  }

  // The mean of the channel's first elements.
  A opening(const Job& job, std::int64_t n, std::int64_t c, std::int64_t end) {
    double total = 0;
    std::int64_t count = 0;
    for (; n < end && count < OPENING; ++n) {
      const T* from = x + (n * job.channels + c) * job.plane;
      const std::int64_t length = job.plane < OPENING ? job.plane : OPENING;
      V sums{};
      std::int64_t i = 0;
      for (; i + L <= length; i += L) sums += load(from + i);
      if (i < length) sums += load(from + i, static_cast<int>(length - i));
      total += sum_of<A>(sums);
      count += length;
    }
    const double mean = total / static_cast<double>(count);
    return finite(mean) ? static_cast<A>(mean) : A(0);
  }

  void run(const Job& job, const Part& part, Moments* moments) {
    const int channels = static_cast<int>(part.last - part.first);
    for (int k = 0; k < channels; ++k) {
      shift[k] = opening(job, part.begin, part.first + k, part.end);
      sum[k] = squares[k] = V{};
      moments[k] = Moments{};
    }
    std::int64_t held = 0;  // elements of each channel that wait in the sums
    for (std::int64_t n = part.begin; n < part.end; ++n) {
      if (held + job.plane > CHUNK) {
        for (int k = 0; k < channels; ++k) flush(k, held, moments[k]);
        held = 0;
      }
      const Ahead ahead(job, part, n);
      for (int k = 0; k < channels; ++k)
        for_pieces(job, n, part.first + k, [&](std::int64_t from, std::int64_t length) {
          add(from, length, k, ahead);
          if (job.plane > CHUNK) flush(k, length, moments[k]);
        });
      if (job.plane <= CHUNK) held += job.plane;
    }
    for (int k = 0; k < channels; ++k) flush(k, held, moments[k]);
    for (int k = 0; k < channels; ++k)
      if (!finite(moments[k].squares)) moments[k] = moments_in_double<T>(job, part, part.first + k);
  }
};

template <class T, Activation ACTIVATION, bool RESIDUAL> struct Planes : Run<T, ACTIVATION, RESIDUAL> {
  using Base = Run<T, ACTIVATION, RESIDUAL>;
  using typename Base::A;
  using typename Base::V;
  using Base::L;
  using Base::KEEPS;
  using Base::READS_EXTRA;

  static void moments(const Job& job, const Part& part, Moments* moments) {
    PlaneMoments<T> sums;
    sums.x = static_cast<const T*>(job.x);
    sums.run(job, part, moments);
  }

  static void normalize(const Job& job, const Part& part) {
    Affine<A> affine[GROUP];
    for (std::int64_t c = part.first; c < part.last; ++c)
      affine[c - part.first] = affine_of<A>(job, c);
    for (std::int64_t n = part.end; n-- > part.begin;)
      for (std::int64_t c = part.first; c < part.last; ++c)
        normalize_run(job, (n * job.channels + c) * job.plane, job.plane, affine[c - part.first]);
  }

  // IN_ORDER: the next run lies behind this one, and no cache holds it yet.
  template <bool IN_ORDER = false>
  static void normalize_run(const Job& job, std::int64_t start, std::int64_t length,
                            const Affine<A>& affine) {
    const T* x = static_cast<const T*>(job.x);
    const V high = splat<A>(affine.high), scale = splat<A>(affine.scale),
            shift = splat<A>(affine.shift);
    write_run(static_cast<T*>(job.y), start, length, job.past_caches, true,
              [&](std::int64_t i, int lanes) {
                if constexpr (IN_ORDER)
                  __builtin_prefetch(x + i + AHEAD / static_cast<std::int64_t>(sizeof(T)));
                V r{};
                if constexpr (RESIDUAL) r = take(static_cast<const T*>(job.extra) + i, lanes);
                return Base::forward(take(x + i, lanes), high, scale, shift, r);
              });
  }

  // Σ g and Σ g·(x − high).
  static void reduce(const Job& job, const Part& part, Sums* sums) {
    const int channels = static_cast<int>(part.last - part.first);
    Affine<A> affine[GROUP];
    V sum[GROUP], dot[GROUP];
    for (int k = 0; k < channels; ++k) {
      affine[k] = affine_of<A>(job, part.first + k);
      sum[k] = dot[k] = V{};
      sums[k] = Sums{};
    }
    const auto flush = [&](int k) {
      sums[k].sum += sum_of<A>(sum[k]);
      sums[k].dot += sum_of<A>(dot[k]);
      sum[k] = dot[k] = V{};
    };
    std::int64_t held = 0;
    for (std::int64_t n = part.begin; n < part.end; ++n) {
      const Ahead ahead(job, part, n);
      for (int k = 0; k < channels; ++k)
        for_pieces(job, n, part.first + k, [&](std::int64_t from, std::int64_t length) {
          reduce_run(job, from, length, affine[k], ahead, sum[k], dot[k]);
          if (job.plane > CHUNK) flush(k);
        });
      held += job.plane;
      if (held + job.plane > CHUNK) {
        for (int k = 0; k < channels; ++k) flush(k);
        held = 0;
      }
    }
    for (int k = 0; k < channels; ++k) flush(k);
    for (int k = 0; k < channels; ++k)
      if (!finite(sums[k].dot)) sums[k] = Base::sums_in_double(job, part, part.first + k);
  }

  static void reduce_run(const Job& job, std::int64_t start, std::int64_t length,
                         const Affine<A>& affine, const Ahead& ahead, V& sum, V& dot) {
    const T* x = static_cast<const T*>(job.x);
    const T* dy = static_cast<const T*>(job.dy);
    const T* extra = static_cast<const T*>(job.extra);
    const V high = splat<A>(affine.high), scale = splat<A>(affine.scale),
            shift = splat<A>(affine.shift);
    const auto add = [&](std::int64_t i, int lanes, V& s, V& d) {
      V other{};
      if constexpr (READS_EXTRA) other = take(extra + i, lanes);
      V centred = take(x + i, lanes) - high;
      V g = Base::gradient(take(dy + i, lanes), centred, scale, shift, other);
      if constexpr (KEEPS) put(static_cast<T*>(job.gradient) + i, g, lanes);
      if (lanes < L) {
        g = first<A>(g, lanes);
        centred = first<A>(centred, lanes);
      }
      s += g;
      d = fma<A>(g, centred, d);
    };
    V s0 = sum, d0 = dot, s1{}, d1{}, s2{}, d2{}, s3{}, d3{};
    std::int64_t i = start;
    const std::int64_t end = start + length;
    for (; i + 4 * L <= end; i += 4 * L) {
      ahead.ask_for(x, i);
      ahead.ask_for(dy, i);
      if constexpr (READS_EXTRA) ahead.ask_for(extra, i);
      add(i, L, s0, d0);
      add(i + L, L, s1, d1);
      add(i + 2 * L, L, s2, d2);
      add(i + 3 * L, L, s3, d3);
    }
    for (; i + L <= end; i += L) add(i, L, s1, d1);
    if (i < end) add(i, static_cast<int>(end - i), s2, d2);
    sum = (s0 + s1) + (s2 + s3);
    dot = (d0 + d1) + (d2 + d3);
  }

  static void input_gradient(const Job& job, const Part& part) {
    Affine<A> affine[GROUP];
    Slope<A> slope[GROUP];
    for (std::int64_t c = part.first; c < part.last; ++c) {
      affine[c - part.first] = affine_of<A>(job, c);
      slope[c - part.first] = slope_of<A>(job, c);
    }
    for (std::int64_t n = part.end; n-- > part.begin;)
      for (std::int64_t c = part.first; c < part.last; ++c)
        input_gradient_run(job, (n * job.channels + c) * job.plane, job.plane,
                           affine[c - part.first], slope[c - part.first]);
  }

  static void input_gradient_run(const Job& job, std::int64_t start, std::int64_t length,
                                 const Affine<A>& affine, const Slope<A>& slope) {
    const T* x = static_cast<const T*>(job.x);
    const T* dy = static_cast<const T*>(KEEPS ? job.gradient : job.dy);
    const T* extra = static_cast<const T*>(job.extra);
    const V high = splat<A>(affine.high), scale = splat<A>(affine.scale),
            shift = splat<A>(affine.shift), steep = splat<A>(slope.slope),
            offset = splat<A>(slope.offset);
    write_run(static_cast<T*>(job.dx), start, length, job.past_caches, dy != job.dx,
              [&](std::int64_t i, int lanes) {
                const V centred = take(x + i, lanes) - high;
                V g = take(dy + i, lanes), other{};
                if constexpr (READS_EXTRA && !KEEPS) other = take(extra + i, lanes);
                if constexpr (!KEEPS) g = Base::gradient(g, centred, scale, shift, other);
                return input_gradient_of<A>(g, centred, scale, steep, offset);
              });
  }
};
