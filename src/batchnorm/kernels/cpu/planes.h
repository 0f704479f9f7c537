// (N, C, S) contiguous: a channel is N runs of S elements, C · S apart.
//
// Included inside an anonymous namespace, behind statistics.h. A channel that fits the second-level
// cache is read from memory once: summed, then normalized from its end, where the cache still holds
// it. Small planes are taken a few channels at a time, so that memory is read in runs of a kilobyte
// or more. A channel that does not fit is shared by the threads.

constexpr std::int64_t CACHED = 900 * 1024;  // bytes of a channel that stay in the cache
constexpr std::int64_t GROUP_BYTES = 512 * 1024;
constexpr std::int64_t RUN = 1024;  // elements that a group of small planes has side by side
constexpr int GROUP = 64;           // channels in a group, at most

// Channels [first, last), of the samples [begin, end).
struct Part {
  std::int64_t first, last, begin, end;
};

// A piece of a plane of S elements: [from, from + length) of sample n.
template <class Body>
inline void for_pieces(const Job& job, std::int64_t n, std::int64_t c, Body body) {
  const std::int64_t start = (n * job.channels + c) * job.plane;
  for (std::int64_t s = 0; s < job.plane; s += CHUNK)
    body(start + s, job.plane - s < CHUNK ? job.plane - s : CHUNK);
}

// Asks for a small plane of the next sample: the hardware looks ahead within a page, not across the
// gap to the same channels of the next sample.
template <class T> inline void ask_for(const T* plane, std::int64_t length) {
  constexpr std::int64_t line = 64 / static_cast<std::int64_t>(sizeof(T));
  if (length > 16 * line) return;
  for (std::int64_t i = 0; i < length; i += line) __builtin_prefetch(plane + i);
}

template <class T> struct PlaneMoments {
  using A = ComputedIn<T>;
  using V = Vector<A>;
  static constexpr int L = LANES<A>;

  const T* x;
  A shift[GROUP];
  V sum[GROUP], squares[GROUP];

  // Four accumulators hide the latency of the additions.
  void add(const T* from, std::int64_t length, int k) {
    const V s = splat<A>(shift[k]);
    V a0 = sum[k], q0 = squares[k], a1{}, q1{}, a2{}, q2{}, a3{}, q3{};
    std::int64_t i = 0;
    for (; i + 4 * L <= length; i += 4 * L) {
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
    if (finite(moments.mean)) shift[k] = static_cast<A>(moments.mean);
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
      const std::int64_t next = n + 1 < part.end ? job.channels * job.plane : 0;
      for (int k = 0; k < channels; ++k)
        for_pieces(job, n, part.first + k, [&](std::int64_t from, std::int64_t length) {
          ask_for(x + from + next, length);
          add(x + from, length, k);
          if (job.plane > CHUNK) flush(k, length, moments[k]);
        });
      if (job.plane <= CHUNK) held += job.plane;
    }
    for (int k = 0; k < channels; ++k) flush(k, held, moments[k]);
    for (int k = 0; k < channels; ++k)
      if (!finite(moments[k].squares)) again(job, part, k, moments[k]);
  }

  // Squares beyond float's range, infinities and NaN: slowly, in double.
  void again(const Job& job, const Part& part, int k, Moments& moments) {
    double total = 0, squares_about_mean = 0;
    const double count =
        static_cast<double>(part.end - part.begin) * static_cast<double>(job.plane);
    for_elements(job, part, k, [&](double value) { total += value; });
    const double mean = total / count;
    for_elements(job, part, k, [&](double value) {
      squares_about_mean += (value - mean) * (value - mean);
    });
    moments = Moments{count, mean, squares_about_mean};
  }

  template <class Body> void for_elements(const Job& job, const Part& part, int k, Body body) {
    for (std::int64_t n = part.begin; n < part.end; ++n) {
      const T* from = x + (n * job.channels + part.first + k) * job.plane;
      for (std::int64_t i = 0; i < job.plane; ++i) body(static_cast<double>(load(from + i, 1)[0]));
    }
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
    const T* x = static_cast<const T*>(job.x);
    const T* residual = static_cast<const T*>(job.extra);
    T* y = static_cast<T*>(job.y);
    Affine<A> affine[GROUP];
    for (std::int64_t c = part.first; c < part.last; ++c)
      affine[c - part.first] = affine_of<A>(job, c);
    for (std::int64_t n = part.end; n-- > part.begin;)
      for (std::int64_t c = part.first; c < part.last; ++c)
        normalize_run(x, residual, y, (n * job.channels + c) * job.plane, job.plane,
                      affine[c - part.first]);
  }

  static void normalize_run(const T* x, const T* residual, T* y, std::int64_t start,
                            std::int64_t length, const Affine<A>& affine) {
    const V high = splat<A>(affine.high), scale = splat<A>(affine.scale),
            shift = splat<A>(affine.shift);
    std::int64_t i = start;
    const std::int64_t end = start + length;
    V r{};
    for (; i + L <= end; i += L) {
      if constexpr (RESIDUAL) r = load(residual + i);
      store(y + i, Base::forward(load(x + i), high, scale, shift, r));
    }
    if (i < end) {
      const int rest = static_cast<int>(end - i);
      if constexpr (RESIDUAL) r = load(residual + i, rest);
      store(y + i, Base::forward(load(x + i, rest), high, scale, shift, r), rest);
    }
  }

  // Σ g and Σ g·(x − high).
  static void reduce(const Job& job, const Part& part, Sums* sums) {
    const T* x = static_cast<const T*>(job.x);
    const T* dy = static_cast<const T*>(job.dy);
    const T* extra = static_cast<const T*>(job.extra);
    T* kept = static_cast<T*>(job.gradient);
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
      const std::int64_t next = n + 1 < part.end ? job.channels * job.plane : 0;
      for (int k = 0; k < channels; ++k)
        for_pieces(job, n, part.first + k, [&](std::int64_t from, std::int64_t length) {
          ask_for(x + from + next, length);
          ask_for(dy + from + next, length);
          if constexpr (READS_EXTRA) ask_for(extra + from + next, length);
          reduce_run(x, dy, extra, kept, from, length, affine[k], sum[k], dot[k]);
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
      if (!finite(sums[k].dot)) reduce_again(job, part, k, affine[k], sums[k]);
  }

  static void reduce_run(const T* x, const T* dy, const T* extra, T* kept, std::int64_t start,
                         std::int64_t length, const Affine<A>& affine, V& sum, V& dot) {
    const V high = splat<A>(affine.high), scale = splat<A>(affine.scale),
            shift = splat<A>(affine.shift);
    V s0 = sum, d0 = dot, s1{}, d1{};
    std::int64_t i = start;
    const std::int64_t end = start + length;
    const auto gradient = [&](std::int64_t at, V& centred) {
      V other{};
      if constexpr (READS_EXTRA) other = load(extra + at);
      centred = load(x + at) - high;
      const V g = Base::gradient(load(dy + at), centred, scale, shift, other);
      if constexpr (KEEPS) store(kept + at, g);
      return g;
    };
    V centred;
    for (; i + 2 * L <= end; i += 2 * L) {
      const V g0 = gradient(i, centred);
      s0 += g0;
      d0 = fma<A>(g0, centred, d0);
      const V g1 = gradient(i + L, centred);
      s1 += g1;
      d1 = fma<A>(g1, centred, d1);
    }
    for (; i + L <= end; i += L) {
      const V g = gradient(i, centred);
      s1 += g;
      d1 = fma<A>(g, centred, d1);
    }
    if (i < end) {
      const int rest = static_cast<int>(end - i);
      V other{};
      if constexpr (READS_EXTRA) other = load(extra + i, rest);
      centred = first<A>(load(x + i, rest) - high, rest);
      const V g = first<A>(
          Base::gradient(load(dy + i, rest), centred, scale, shift, other), rest);
      if constexpr (KEEPS) store(kept + i, g, rest);
      s0 += g;
      d0 = fma<A>(g, centred, d0);
    }
    sum = s0 + s1;
    dot = d0 + d1;
  }

  // Products beyond float's range, infinities and NaN: slowly, in double.
  static void reduce_again(const Job& job, const Part& part, int k, const Affine<A>& affine,
                           Sums& sums) {
    sums = Sums{};
    for (std::int64_t n = part.begin; n < part.end; ++n)
      for (std::int64_t i = 0; i < job.plane; ++i) {
        const std::int64_t at = (n * job.channels + part.first + k) * job.plane + i;
        V other{};
        if constexpr (READS_EXTRA) other = load(static_cast<const T*>(job.extra) + at, 1);
        const V centred = load(static_cast<const T*>(job.x) + at, 1) - splat<A>(affine.high);
        const double g = static_cast<double>(
            Base::gradient(load(static_cast<const T*>(job.dy) + at, 1), centred,
                           splat<A>(affine.scale), splat<A>(affine.shift), other)[0]);
        sums.sum += g;
        sums.dot += g * static_cast<double>(centred[0]);
      }
  }

  static void input_gradient(const Job& job, const Part& part) {
    const T* x = static_cast<const T*>(job.x);
    const T* dy = static_cast<const T*>(KEEPS ? job.gradient : job.dy);
    const T* extra = static_cast<const T*>(job.extra);
    T* dx = static_cast<T*>(job.dx);
    Affine<A> affine[GROUP];
    Slope<A> slope[GROUP];
    for (std::int64_t c = part.first; c < part.last; ++c) {
      affine[c - part.first] = affine_of<A>(job, c);
      slope[c - part.first] = slope_of<A>(job, c);
    }
    for (std::int64_t n = part.end; n-- > part.begin;)
      for (std::int64_t c = part.first; c < part.last; ++c)
        input_gradient_run(x, dy, extra, dx, (n * job.channels + c) * job.plane, job.plane,
                           affine[c - part.first], slope[c - part.first]);
  }

  static void input_gradient_run(const T* x, const T* dy, const T* extra, T* dx,
                                 std::int64_t start, std::int64_t length,
                                 const Affine<A>& affine, const Slope<A>& slope) {
    const V high = splat<A>(affine.high), scale = splat<A>(affine.scale),
            shift = splat<A>(affine.shift), steep = splat<A>(slope.slope),
            offset = splat<A>(slope.offset);
    const auto gradient = [&](V dy_here, V centred, V other) {
      if constexpr (!KEEPS) dy_here = Base::gradient(dy_here, centred, scale, shift, other);
      return fma<A>(dy_here, scale, fma<A>(centred, steep, offset));
    };
    std::int64_t i = start;
    const std::int64_t end = start + length;
    V other{};
    for (; i + L <= end; i += L) {
      if constexpr (READS_EXTRA && !KEEPS) other = load(extra + i);
      store(dx + i, gradient(load(dy + i), load(x + i) - high, other));
    }
    if (i < end) {
      const int rest = static_cast<int>(end - i);
      if constexpr (READS_EXTRA && !KEEPS) other = load(extra + i, rest);
      store(dx + i, gradient(load(dy + i, rest), load(x + i, rest) - high, other), rest);
    }
  }
};

// How the work is cut: a few channels at a time, or one channel for all threads.
struct Cut {
  std::int64_t group;  // channels
  bool shared;
  int threads;
};

inline Cut cut_of(const Job& job, std::int64_t element_bytes, int streams) {
  const std::int64_t bytes = job.batch * job.plane * element_bytes * streams;
  int threads = job.threads;
  if (bytes > 2 * CACHED || (job.channels < threads && bytes > 64 * 1024 && job.batch > 1)) {
    if (threads > job.batch) threads = static_cast<int>(job.batch);
    if (threads > 1) return {1, true, threads};
    threads = job.threads;
  }
  std::int64_t group = (RUN + job.plane - 1) / job.plane;
  const std::int64_t fitting = GROUP_BYTES / (bytes > 0 ? bytes : 1);
  const std::int64_t fair = (job.channels + 4 * threads - 1) / (4 * threads);
  if (group > fitting) group = fitting;
  if (threads > 1 && group > fair) group = fair;
  if (group > GROUP) group = GROUP;
  return {group < 1 ? 1 : group, false, threads};
}

// Body(part) for every group of channels, by whichever thread is free: a channel's numbers do not
// depend on who computes them.
template <class Body> inline void over_channels(const Job& job, const Cut& cut, const Body& body) {
  struct State {
    const Job& job;
    const Cut& cut;
    const Body& body;
    std::int64_t next;
  } state{job, cut, body, 0};
  parallel(cut.threads, [](void* argument, int, int) {
    State& s = *static_cast<State*>(argument);
    for (;;) {
      const std::int64_t first = __atomic_fetch_add(&s.next, s.cut.group, __ATOMIC_RELAXED);
      if (first >= s.job.channels) return;
      const std::int64_t last = first + s.cut.group;
      s.body(Part{first, last < s.job.channels ? last : s.job.channels, 0, s.job.batch});
    }
  }, &state);
}

// Body(part, thread) for the samples of one channel, shared by the threads.
template <class Body>
inline void over_samples(const Job& job, std::int64_t c, int threads, const Body& body) {
  struct State {
    const Job& job;
    std::int64_t c;
    const Body& body;
  } state{job, c, body};
  parallel(threads, [](void* argument, int index, int count) {
    const State& s = *static_cast<State*>(argument);
    s.body(Part{s.c, s.c + 1, s.job.batch * index / count, s.job.batch * (index + 1) / count}, index);
  }, &state);
}

constexpr int MOST_THREADS = 256;

template <class T, Activation ACTIVATION, bool RESIDUAL>
void forward_planes(const Job& job, bool sum, bool write) {
  using P = Planes<T, ACTIVATION, RESIDUAL>;
  const Cut cut = cut_of(job, sizeof(T), 1);
  if (cut.shared && sum) {
    for (std::int64_t c = 0; c < job.channels; ++c) {
      Moments parts[MOST_THREADS], whole;
      over_samples(job, c, cut.threads, [&](const Part& part, int index) {
        P::moments(job, part, &parts[index]);
      });
      for (int index = 0; index < cut.threads; ++index)
        whole.merge(parts[index].count, parts[index].mean, parts[index].squares);
      finish_moments(job, c, whole);
      if (write)
        over_samples(job, c, cut.threads, [&](const Part& part, int) { P::normalize(job, part); });
    }
    return;
  }
  over_channels(job, cut, [&](const Part& part) {
    if (sum) {
      Moments moments[GROUP];
      P::moments(job, part, moments);
      for (std::int64_t c = part.first; c < part.last; ++c)
        finish_moments(job, c, moments[c - part.first]);
    }
    if (write) P::normalize(job, part);
  });
}

template <class T, Activation ACTIVATION, bool RESIDUAL>
void backward_planes(const Job& job, bool sum, bool write) {
  using P = Planes<T, ACTIVATION, RESIDUAL>;
  using A = typename P::A;
  const Cut cut = cut_of(job, sizeof(T), P::READS_EXTRA ? 3 : 2);
  const auto high = [&](std::int64_t c) {
    return static_cast<double>(static_cast<A>(job.mean[c]));
  };
  if (cut.shared) {
    for (std::int64_t c = 0; c < job.channels; ++c) {
      if (sum) {
        Sums parts[MOST_THREADS], whole;
        over_samples(job, c, cut.threads, [&](const Part& part, int index) {
          P::reduce(job, part, &parts[index]);
        });
        for (int index = 0; index < cut.threads; ++index) {
          whole.sum += parts[index].sum;
          whole.dot += parts[index].dot;
        }
        finish_sums(job, c, whole, high(c));
      }
      if (write)
        over_samples(job, c, cut.threads,
                     [&](const Part& part, int) { P::input_gradient(job, part); });
    }
    return;
  }
  over_channels(job, cut, [&](const Part& part) {
    if (sum) {
      Sums sums[GROUP];
      P::reduce(job, part, sums);
      for (std::int64_t c = part.first; c < part.last; ++c)
        finish_sums(job, c, sums[c - part.first], high(c));
    }
    if (write) P::input_gradient(job, part);
  });
}
