// The passes: how the work is cut for the threads, and in which order it is done.
//
// Included inside an anonymous namespace, behind planes.h and tiles.h.

constexpr int MOST_THREADS = 256;
constexpr std::int64_t TILED = 128;         // elements of the largest plane that is taken as columns
constexpr std::int64_t ALIGNED = 16;        // channels, a multiple of which begins at a cache line
constexpr std::int64_t COLUMNS = 2048;      // of a tile
constexpr std::int64_t TILED_SAMPLES = 8;   // fewer do not repay the tables

// A few channels at a time, or one channel for all threads.
struct Cut {
  std::int64_t group;  // channels
  bool shared, tiled;
  int threads;
};

// `streams`: tensors of the input's size that are read.
inline Cut cut_of(const Job& job, std::int64_t element_bytes, int streams) {
  const std::int64_t bytes = job.batch * job.plane * element_bytes * streams;
  int threads = job.threads;
  if (bytes > 2 * CACHED || (job.channels < threads && bytes > 64 * 1024 && job.batch > 1)) {
    if (threads > job.batch) threads = static_cast<int>(job.batch);
    if (threads > 1) return {1, true, false, threads};
    threads = job.threads;
  }
  const bool tiled = job.plane <= TILED && job.batch >= TILED_SAMPLES;
  const std::int64_t run = tiled ? COLUMNS : RUN;
  std::int64_t group = (run + job.plane - 1) / job.plane;
  const std::int64_t fitting = GROUP_BYTES / (bytes > 0 ? bytes : 1);
  const std::int64_t fair = (job.channels + 4 * threads - 1) / (4 * threads);
  if (group > fitting) group = fitting;
  if (threads > 1 && group > fair) group = fair;
  if (group > GROUP && !tiled) group = GROUP;
  if (tiled && group > ALIGNED) group -= group % ALIGNED;
  return {group < 1 ? 1 : group, false, tiled, threads};
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
      if (first >= s.job.channels) return finish_stores();
      const std::int64_t last = first + s.cut.group;
      s.body(Part{first, last < s.job.channels ? last : s.job.channels, 0, s.job.batch});
    }
  }, &state);
}

// Body(part, thread) for the samples, shared by the threads.
template <class Body>
inline void over_samples(const Job& job, std::int64_t first, std::int64_t last, int threads,
                         const Body& body) {
  struct State {
    std::int64_t first, last, batch;
    const Body& body;
  } state{first, last, job.batch, body};
  parallel(threads, [](void* argument, int index, int count) {
    const State& s = *static_cast<State*>(argument);
    s.body(Part{s.first, s.last, s.batch * index / count, s.batch * (index + 1) / count}, index);
    finish_stores();
  }, &state);
}

// Where nothing is summed, the threads share the samples, and memory is walked in its order.
template <class Body>
inline void over_samples_by_groups(const Job& job, const Cut& cut, const Body& body) {
  over_samples(job, 0, job.channels, cut.threads, [&](const Part& part, int) {
    const std::int64_t most = cut.tiled ? (COLUMNS + job.plane - 1) / job.plane : GROUP;
    for (std::int64_t first = 0; first < job.channels; first += most) {
      const std::int64_t last = first + most < job.channels ? first + most : job.channels;
      body(Part{first, last, part.begin, part.end});
    }
  });
}

// The columns of a few small planes.
inline Tile tile_of_planes(const Job& job, const Part& part) {
  return {(part.begin * job.channels + part.first) * job.plane,
          part.end - part.begin,
          job.channels * job.plane,
          0,
          part.last - part.first,
          job.plane,
          1,
          true};
}

template <class T, Activation ACTIVATION, bool RESIDUAL> struct Forward {
  using P = Planes<T, ACTIVATION, RESIDUAL>;
  using A = typename P::A;
  static constexpr bool EXPONENTIAL =
      ACTIVATION == Activation::sigmoid || ACTIVATION == Activation::tanh ||
      ACTIVATION == Activation::silu || ACTIVATION == Activation::gelu;

  static void shared(const Job& job, const Cut& cut, bool write) {
    for (std::int64_t c = 0; c < job.channels; ++c) {
      Moments parts[MOST_THREADS], whole;
      over_samples(job, c, c + 1, cut.threads, [&](const Part& part, int index) {
        P::moments(job, part, &parts[index]);
      });
      for (int index = 0; index < cut.threads; ++index) whole.merge(parts[index]);
      finish_moments(job, c, whole);
      if (write)
        over_samples(job, c, c + 1, cut.threads,
                     [&](const Part& part, int) { P::normalize(job, part); });
    }
  }

  static void tiled(const Job& job, const Part& part, bool sum, bool write) {
    const Tile t = tile_of_planes(job, part);
    Scratch scratch(TileMoments<T>::bytes(t) + Tables<A>::bytes(t.width()) +
                    Scratch::bytes<Moments>(t.channels));
    if (sum) {
      Moments* moments = scratch.take<Moments>(t.channels);
      TileMoments<T>(job, t, scratch).run(t, moments);
      for (std::int64_t c = part.first; c < part.last; ++c) {
        Moments& found = moments[c - part.first];
        if (!finite(found.squares)) found = moments_in_double<T>(job, part, c);
        finish_moments(job, c, found);
      }
    }
    if (!write) return;
    Tables<A> tables(t.width(), scratch);
    tables.fill(job, part.first, t, false);
    Tiles<T, ACTIVATION, RESIDUAL>::normalize(job, t, tables);
  }

  // Where nothing is summed, x is read once: in the order of memory, as the hardware expects it.
  static void in_order(const Job& job, const Cut& cut) {
    Scratch scratch(Scratch::bytes<Affine<A>>(job.channels));
    Affine<A>* affine = scratch.take<Affine<A>>(job.channels);
    for (std::int64_t c = 0; c < job.channels; ++c) affine[c] = affine_of<A>(job, c);
    over_samples(job, 0, job.channels, cut.threads, [&](const Part& part, int) {
      for (std::int64_t n = part.begin; n < part.end; ++n)
        for (std::int64_t c = 0; c < job.channels; ++c)
          P::template normalize_run<true>(job, (n * job.channels + c) * job.plane, job.plane,
                                          affine[c]);
    });
  }

  static void planes(const Job& job, bool sum, bool write) {
    const Cut cut = cut_of(job, sizeof(T), 1);
    if (cut.shared && sum) return shared(job, cut, write);
    // vectors that overlap at a plane's ends compute some values twice, which an exponential makes dear
    const bool columns = cut.tiled && (EXPONENTIAL || job.plane < 2 * LANES<A>);
    if (!sum && !columns && job.batch >= cut.threads) return in_order(job, cut);
    const auto group = [&](const Part& part) {
      if (cut.tiled) return tiled(job, part, sum, write);
      if (sum) {
        Moments moments[GROUP];
        P::moments(job, part, moments);
        for (std::int64_t c = part.first; c < part.last; ++c)
          finish_moments(job, c, moments[c - part.first]);
      }
      if (write) P::normalize(job, part);
    };
    if (!sum && job.batch >= cut.threads) over_samples_by_groups(job, cut, group);
    else over_channels(job, cut, group);
  }

  static void rows(const Job& job, bool sum, bool write) {
    if (sum) moments_of_rows(job);
    if (!write) return;
    const Tile whole = tile_of_rows<A>(job, 0, job.batch);
    Scratch scratch(Tables<A>::bytes(whole.width()));
    Tables<A> tables(whole.width(), scratch);
    tables.fill(job, 0, whole, false);
    over_samples(job, 0, job.channels, job.threads, [&](const Part& part, int) {
      Tiles<T, ACTIVATION, RESIDUAL>::normalize(job, tile_of_rows<A>(job, part.begin, part.end),
                                                tables);
    });
  }

  static void moments_of_rows(const Job& job) {
    const Tile whole = tile_of_rows<A>(job, 0, job.batch);
    const std::int64_t C = job.channels, each = TileMoments<T>::bytes(whole);
    Scratch scratch(Scratch::bytes<Moments>(C * job.threads) +
                    job.threads * Scratch::bytes<char>(each));
    Moments* parts = scratch.take<Moments>(C * job.threads);
    for (std::int64_t i = 0; i < C * job.threads; ++i) parts[i] = Moments{};
    char* places[MOST_THREADS];
    for (int k = 0; k < job.threads; ++k) places[k] = scratch.take<char>(each);
    over_samples(job, 0, C, job.threads, [&](const Part& part, int index) {
      Scratch own(places[index]);
      const Tile t = tile_of_rows<A>(job, part.begin, part.end);
      TileMoments<T>(job, t, own).run(t, parts + C * index);
    });
    for (std::int64_t c = 0; c < C; ++c) {
      Moments found;
      for (int k = 0; k < job.threads; ++k) found.merge(parts[C * k + c]);
      if (!finite(found.squares)) found = moments_in_double<T>(job, {0, C, 0, job.batch}, c);
      finish_moments(job, c, found);
    }
  }
};

template <class T, Activation ACTIVATION, bool RESIDUAL> struct Backward {
  using P = Planes<T, ACTIVATION, RESIDUAL>;
  using A = typename P::A;
  using R = Tiles<T, ACTIVATION, RESIDUAL>;

  static void finish(const Job& job, std::int64_t c, const Sums& sums) {
    finish_sums(job, c, sums, static_cast<double>(static_cast<A>(job.mean[c])));
  }

  static void shared(const Job& job, const Cut& cut, bool write) {
    for (std::int64_t c = 0; c < job.channels; ++c) {
      Sums parts[MOST_THREADS], whole;
      over_samples(job, c, c + 1, cut.threads, [&](const Part& part, int index) {
        P::reduce(job, part, &parts[index]);
      });
      for (int index = 0; index < cut.threads; ++index) whole.add(parts[index]);
      finish(job, c, whole);
      if (write)
        over_samples(job, c, c + 1, cut.threads,
                     [&](const Part& part, int) { P::input_gradient(job, part); });
    }
  }

  static void tiled(const Job& job, const Part& part, bool sum, bool write) {
    const Tile t = tile_of_planes(job, part);
    Scratch scratch(Tables<A>::bytes(t.width()) + ColumnSums<A>::bytes(t));
    Tables<A> tables(t.width(), scratch);
    if (sum) {
      tables.fill(job, part.first, t, false);
      ColumnSums<A> sums(t, scratch);
      R::reduce(job, t, tables, sums);
      for (std::int64_t c = part.first; c < part.last; ++c) {
        Sums found{sums.sums[c - part.first], sums.dots[c - part.first]};
        if (!finite(found.dot)) found = P::sums_in_double(job, part, c);
        finish(job, c, found);
      }
    }
    if (!write) return;
    tables.fill(job, part.first, t, true);
    R::input_gradient(job, t, tables);
  }

  static void planes(const Job& job, bool sum, bool write) {
    const Cut cut = cut_of(job, sizeof(T), P::READS_EXTRA ? 3 : 2);
    if (cut.shared && sum) return shared(job, cut, write);
    const auto group = [&](const Part& part) {
      if (cut.tiled) return tiled(job, part, sum, write);
      if (sum) {
        Sums sums[GROUP];
        P::reduce(job, part, sums);
        for (std::int64_t c = part.first; c < part.last; ++c) finish(job, c, sums[c - part.first]);
      }
      if (write) P::input_gradient(job, part);
    };
    if (!sum && job.batch >= cut.threads) over_samples_by_groups(job, cut, group);
    else over_channels(job, cut, group);
  }

  static void rows(const Job& job, bool sum, bool write) {
    const Tile whole = tile_of_rows<A>(job, 0, job.batch);
    Scratch scratch(Tables<A>::bytes(whole.width()));
    Tables<A> tables(whole.width(), scratch);
    if (sum) {
      tables.fill(job, 0, whole, false);
      sums_of_rows(job, whole, tables);
    }
    if (!write) return;
    tables.fill(job, 0, whole, true);
    over_samples(job, 0, job.channels, job.threads, [&](const Part& part, int) {
      R::input_gradient(job, tile_of_rows<A>(job, part.begin, part.end), tables);
    });
  }

  static void sums_of_rows(const Job& job, const Tile& whole, const Tables<A>& tables) {
    const std::int64_t C = job.channels, each = ColumnSums<A>::bytes(whole);
    Scratch scratch(job.threads * Scratch::bytes<char>(each) +
                    2 * Scratch::bytes<double>(C * job.threads));
    double* sums = scratch.take<double>(C * job.threads);
    double* dots = scratch.take<double>(C * job.threads);
    for (std::int64_t i = 0; i < C * job.threads; ++i) sums[i] = dots[i] = 0;
    char* places[MOST_THREADS];
    for (int k = 0; k < job.threads; ++k) places[k] = scratch.take<char>(each);
    over_samples(job, 0, C, job.threads, [&](const Part& part, int index) {
      Scratch own(places[index]);
      const Tile t = tile_of_rows<A>(job, part.begin, part.end);
      ColumnSums<A> found(t, own);
      R::reduce(job, t, tables, found);
      for (std::int64_t c = 0; c < C; ++c) {
        sums[C * index + c] = found.sums[c];
        dots[C * index + c] = found.dots[c];
      }
    });
    for (std::int64_t c = 0; c < C; ++c) {
      Sums found;
      for (int k = 0; k < job.threads; ++k) found.add({sums[C * k + c], dots[C * k + c]});
      if (!finite(found.dot)) found = P::sums_in_double(job, {0, C, 0, job.batch}, c);
      finish(job, c, found);
    }
  }
};
