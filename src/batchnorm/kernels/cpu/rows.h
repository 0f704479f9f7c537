// (R, C) contiguous: channels_last, and inputs without spatial axes.
//
// Included inside an anonymous namespace, behind planes.h. Rows are streamed in memory order, four at
// a time, with a sum for every column in the first-level cache. Rows that are no multiple of a vector
// are taken several as one wide row, so that hardly anything needs a mask.

constexpr std::int64_t WIDE = 2048;      // elements of a wide row, at most
constexpr std::int64_t WIDE_ROWS = 512;  // that are summed in float, between two merges
constexpr std::int64_t STEP = 131072;    // elements of a block of the second sweep
constexpr int TOGETHER = 4;              // rows of the first one

struct Widths {
  std::int64_t rows;    // in a wide row
  std::int64_t width;   // elements
};

template <class A> inline Widths widths_of(std::int64_t channels) {
  std::int64_t rows = 1;
  while (rows < LANES<A> && rows * channels % LANES<A> != 0) rows *= 2;
  while (rows > 1 && rows * channels > WIDE) rows /= 2;
  return {rows, rows * channels};
}

// Memory for the numbers of each column, freed when the call ends.
class Scratch {
 public:
  explicit Scratch(std::int64_t bytes)
      : memory_(static_cast<char*>(__builtin_malloc(static_cast<unsigned long>(bytes) + 64))) {
    if (memory_ == nullptr) __builtin_trap();
  }
  ~Scratch() { __builtin_free(memory_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  template <class U> U* take(std::int64_t count) {
    used_ = (used_ + 63) / 64 * 64;
    U* found = reinterpret_cast<U*>(memory_ + used_);
    used_ += count * static_cast<std::int64_t>(sizeof(U));
    return found;
  }

 private:
  char* memory_;
  std::int64_t used_ = 0;
};

// Body(from, to, thread) for the threads' shares of the rows.
template <class Body> inline void over_rows(const Job& job, int threads, const Body& body) {
  struct State {
    const Job& job;
    const Body& body;
  } state{job, body};
  parallel(threads, [](void* argument, int index, int count) {
    const State& s = *static_cast<State*>(argument);
    s.body(s.job.batch * index / count, s.job.batch * (index + 1) / count, index);
  }, &state);
}

// Wide rows in memory order: four at a time, then single ones, then the rows that make no wide one.
template <class Four, class One>
inline void for_rows(std::int64_t from, std::int64_t to, std::int64_t channels, const Widths& wide,
                     const Four& four, const One& one) {
  const std::int64_t start = from * channels, wides = (to - from) / wide.rows;
  const std::int64_t fours = wides / TOGETHER;
  const std::int64_t rest = ((to - from) - wides * wide.rows) * channels;
  for (std::int64_t i = 0; i < fours; ++i) four(start + i * TOGETHER * wide.width);
  for (std::int64_t i = fours * TOGETHER; i < wides; ++i) one(start + i * wide.width, wide.width);
  if (rest > 0) one(start + wides * wide.width, rest);
}

// From the end, which the cache still holds, in blocks of memory order, which the hardware's
// prefetcher likes.
template <class One>
inline void for_rows_back(std::int64_t from, std::int64_t to, std::int64_t channels,
                          const Widths& wide, const One& one) {
  const std::int64_t start = from * channels, wides = (to - from) / wide.rows;
  const std::int64_t rest = ((to - from) - wides * wide.rows) * channels;
  if (rest > 0) one(start + wides * wide.width, rest);
  const std::int64_t step = STEP / wide.width + 1;
  for (std::int64_t end = wides; end > 0; end -= step)
    for (std::int64_t i = end > step ? end - step : 0; i < end; ++i)
      one(start + i * wide.width, wide.width);
}

template <class A> struct RowTables {  // a value a column
  const A *high, *scale, *shift, *slope, *offset;
};

template <class T, Activation ACTIVATION, bool RESIDUAL> struct Rows : Run<T, ACTIVATION, RESIDUAL> {
  using Base = Run<T, ACTIVATION, RESIDUAL>;
  using typename Base::A;
  using typename Base::V;
  using Base::L;
  using Base::KEEPS;
  using Base::READS_EXTRA;

  // Columns [0, width) of rows `stride` apart, in vectors: body(column, rest), rest < L at the end.
  template <class Body> static void columns(std::int64_t width, const Body& body) {
    std::int64_t j = 0;
    for (; j + L <= width; j += L) body(j, L);
    if (j < width) body(j, static_cast<int>(width - j));
  }

  static V get(const T* from, int lanes) { return lanes == L ? load(from) : load(from, lanes); }
  static void put(T* to, V value, int lanes) {
    if (lanes == L) store(to, value);
    else store(to, value, lanes);
  }
  static V table(const A* from) { return *reinterpret_cast<const typename Of<A>::Unaligned*>(from); }
  static void set(A* to, V value) { *reinterpret_cast<typename Of<A>::Unaligned*>(to) = value; }

  struct Sum {
    double count = 0;
    double *mean, *squares;  // (C,)
    A *shift, *sum, *about;  // a column; shift is the same for all rows of a wide one
  };

  static void moments(const Job& job, std::int64_t from, std::int64_t to, const Widths& wide,
                      Sum& s) {
    const T* x = static_cast<const T*>(job.x);
    const std::int64_t C = job.channels;
    for (std::int64_t c = 0; c < C; ++c) s.mean[c] = s.squares[c] = 0;
    if (from == to) return;
    open(x, from, to, job, wide, s);
    const std::int64_t rows = WIDE_ROWS * wide.rows;
    for (std::int64_t r = from; r < to; r += rows) {
      const std::int64_t end = r + rows < to ? r + rows : to;
      for_rows(
          r, end, C, wide,
          [&](std::int64_t start) {
            columns(wide.width, [&](std::int64_t j, int lanes) {
              const V shift = table(s.shift + j);
              const T* at = x + start + j;
              V d0 = get(at, lanes) - shift, d1 = get(at + wide.width, lanes) - shift;
              V d2 = get(at + 2 * wide.width, lanes) - shift;
              V d3 = get(at + 3 * wide.width, lanes) - shift;
              set(s.sum + j, table(s.sum + j) + ((d0 + d1) + (d2 + d3)));
              V q = fma<A>(d0, d0, table(s.about + j));
              V q2 = fma<A>(d2, d2, d3 * d3);
              set(s.about + j, fma<A>(d1, d1, q) + q2);
            });
          },
          [&](std::int64_t start, std::int64_t width) {
            columns(width, [&](std::int64_t j, int lanes) {
              const V d = first<A>(get(x + start + j, lanes) - table(s.shift + j), lanes);
              set(s.sum + j, table(s.sum + j) + d);
              set(s.about + j, fma<A>(d, d, table(s.about + j)));
            });
          });
      flush(C, wide, static_cast<double>(end - r), s);
    }
  }

  // The shift is the mean of the first rows.
  static void open(const T* x, std::int64_t from, std::int64_t to, const Job& job,
                   const Widths& wide, Sum& s) {
    const std::int64_t C = job.channels;
    const std::int64_t rows = to - from < 256 ? (to - from + 15) / 16 : 16;
    for (std::int64_t j = 0; j < wide.width + L; ++j) s.shift[j] = s.sum[j] = s.about[j] = 0;
    for (std::int64_t r = from; r < from + rows; ++r)
      columns(C, [&](std::int64_t j, int lanes) {
        set(s.sum + j, table(s.sum + j) + first<A>(get(x + r * C + j, lanes), lanes));
      });
    for (std::int64_t c = 0; c < C; ++c) {
      const A mean = s.sum[c] / static_cast<A>(rows);
      s.shift[c] = mean - mean == 0 ? mean : A(0);
    }
    for (std::int64_t j = C; j < wide.width; ++j) s.shift[j] = s.shift[j - C];
    for (std::int64_t j = 0; j < wide.width + L; ++j) s.sum[j] = 0;
  }

  // Chan's merge, channel by channel; see Moments.
  static void flush(std::int64_t C, const Widths& wide, double rows, Sum& s) {
    for (std::int64_t k = 1; k < wide.rows; ++k)
      for (std::int64_t c = 0; c < C; ++c) {
        s.sum[c] += s.sum[k * C + c];
        s.about[c] += s.about[k * C + c];
      }
    const double total = s.count + rows, share = rows / total, weight = s.count * share;
    const double inverse = 1 / rows;
    for (std::int64_t c = 0; c < C; ++c) {
      const double sum = static_cast<double>(s.sum[c]), step = sum * inverse;
      double excess = static_cast<double>(s.about[c]) - sum * step;
      excess = excess < 0 ? 0 : excess;
      const double delta = static_cast<double>(s.shift[c]) + step - s.mean[c];
      s.mean[c] += delta * share;
      s.squares[c] += excess + delta * delta * weight;
      const A mean = static_cast<A>(s.mean[c]);
      s.shift[c] = mean - mean == 0 ? mean : A(0);
    }
    for (std::int64_t j = C; j < wide.width; ++j) s.shift[j] = s.shift[j - C];
    for (std::int64_t j = 0; j < wide.width; ++j) s.sum[j] = s.about[j] = 0;
    s.count = total;
  }

  static void normalize(const Job& job, std::int64_t from, std::int64_t to, const Widths& wide,
                        const RowTables<A>& t) {
    const T* x = static_cast<const T*>(job.x);
    const T* residual = static_cast<const T*>(job.extra);
    T* y = static_cast<T*>(job.y);
    const auto one = [&](std::int64_t at, int lanes, V high, V scale, V shift) {
      V r{};
      if constexpr (RESIDUAL) r = get(residual + at, lanes);
      put(y + at, Base::forward(get(x + at, lanes), high, scale, shift, r), lanes);
    };
    for_rows_back(from, to, job.channels, wide, [&](std::int64_t start, std::int64_t width) {
      columns(width, [&](std::int64_t j, int lanes) {
        one(start + j, lanes, table(t.high + j), table(t.scale + j), table(t.shift + j));
      });
    });
  }

  static V gradient_at(const Job& job, std::int64_t at, int lanes, V scale, V shift, V centred) {
    V other{};
    if constexpr (READS_EXTRA) other = get(static_cast<const T*>(job.extra) + at, lanes);
    return Base::gradient(get(static_cast<const T*>(job.dy) + at, lanes), centred, scale, shift,
                          other);
  }

  struct Gradients {
    double *sum, *dot;      // (C,)
    A *sum_part, *dot_part; // a column
  };

  static void reduce(const Job& job, std::int64_t from, std::int64_t to, const Widths& wide,
                     const RowTables<A>& t, Gradients& s) {
    const T* x = static_cast<const T*>(job.x);
    T* kept = static_cast<T*>(job.gradient);
    const std::int64_t C = job.channels;
    for (std::int64_t c = 0; c < C; ++c) s.sum[c] = s.dot[c] = 0;
    for (std::int64_t j = 0; j < wide.width + L; ++j) s.sum_part[j] = s.dot_part[j] = 0;
    const std::int64_t rows = WIDE_ROWS * wide.rows;
    const auto one = [&](std::int64_t at, int lanes, V high, V scale, V shift, V& sum, V& dot) {
      V centred = get(x + at, lanes) - high;
      V g = gradient_at(job, at, lanes, scale, shift, centred);
      if constexpr (KEEPS) put(kept + at, g, lanes);
      if (lanes < L) {
        g = first<A>(g, lanes);
        centred = first<A>(centred, lanes);
      }
      sum += g;
      dot = fma<A>(g, centred, dot);
    };
    for (std::int64_t r = from; r < to; r += rows) {
      const std::int64_t end = r + rows < to ? r + rows : to;
      for_rows(
          r, end, C, wide,
          [&](std::int64_t start) {
            columns(wide.width, [&](std::int64_t j, int lanes) {
              const V high = table(t.high + j), scale = table(t.scale + j),
                      shift = table(t.shift + j);
              V s0 = table(s.sum_part + j), d0 = table(s.dot_part + j), s1{}, d1{};
              const std::int64_t at = start + j;
              one(at, lanes, high, scale, shift, s0, d0);
              one(at + wide.width, lanes, high, scale, shift, s1, d1);
              one(at + 2 * wide.width, lanes, high, scale, shift, s0, d0);
              one(at + 3 * wide.width, lanes, high, scale, shift, s1, d1);
              set(s.sum_part + j, s0 + s1);
              set(s.dot_part + j, d0 + d1);
            });
          },
          [&](std::int64_t start, std::int64_t width) {
            columns(width, [&](std::int64_t j, int lanes) {
              V sum = table(s.sum_part + j), dot = table(s.dot_part + j);
              one(start + j, lanes, table(t.high + j), table(t.scale + j), table(t.shift + j), sum,
                  dot);
              set(s.sum_part + j, sum);
              set(s.dot_part + j, dot);
            });
          });
      for (std::int64_t k = 0; k < wide.rows; ++k)
        for (std::int64_t c = 0; c < C; ++c) {
          s.sum[c] += static_cast<double>(s.sum_part[k * C + c]);
          s.dot[c] += static_cast<double>(s.dot_part[k * C + c]);
        }
      for (std::int64_t j = 0; j < wide.width; ++j) s.sum_part[j] = s.dot_part[j] = 0;
    }
  }

  // A column alone, in double: products beyond float's range, infinities and NaN.
  static Sums column_sums(const Job& job, std::int64_t c) {
    const Affine<A> affine = affine_of<A>(job, c);
    Sums sums;
    for (std::int64_t r = 0; r < job.batch; ++r) {
      const std::int64_t at = r * job.channels + c;
      const V centred = load(static_cast<const T*>(job.x) + at, 1) - splat<A>(affine.high);
      const double g = static_cast<double>(
          gradient_at(job, at, 1, splat<A>(affine.scale), splat<A>(affine.shift), centred)[0]);
      sums.sum += g;
      sums.dot += g * static_cast<double>(centred[0]);
    }
    return sums;
  }

  static void input_gradient(const Job& job, std::int64_t from, std::int64_t to,
                             const Widths& wide, const RowTables<A>& t) {
    const T* x = static_cast<const T*>(job.x);
    T* dx = static_cast<T*>(job.dx);
    const auto one = [&](std::int64_t at, int lanes, std::int64_t j) {
      const V scale = table(t.scale + j), centred = get(x + at, lanes) - table(t.high + j);
      V g;
      if constexpr (KEEPS) g = get(static_cast<const T*>(job.gradient) + at, lanes);
      else g = gradient_at(job, at, lanes, scale, table(t.shift + j), centred);
      put(dx + at, fma<A>(g, scale, fma<A>(centred, table(t.slope + j), table(t.offset + j))),
          lanes);
    };
    for_rows_back(from, to, job.channels, wide, [&](std::int64_t start, std::int64_t width) {
      columns(width, [&](std::int64_t j, int lanes) { one(start + j, lanes, j); });
    });
  }
};

template <class T, class R>
inline RowTables<typename R::A> tables_of(const Job& job, const Widths& wide, bool slopes,
                                          Scratch& scratch) {
  using A = typename R::A;
  A* table[5];
  for (A*& each : table) each = scratch.take<A>(wide.width + R::L);
  for (std::int64_t c = 0; c < job.channels; ++c) {
    const Affine<A> affine = affine_of<A>(job, c);
    table[0][c] = affine.high;
    table[1][c] = affine.scale;
    table[2][c] = affine.shift;
    if (slopes) {
      const Slope<A> slope = slope_of<A>(job, c);
      table[3][c] = slope.slope;
      table[4][c] = slope.offset;
    }
  }
  for (int k = 0; k < (slopes ? 5 : 3); ++k) {
    for (std::int64_t j = job.channels; j < wide.width; ++j)
      table[k][j] = table[k][j - job.channels];
    for (std::int64_t j = wide.width; j < wide.width + R::L; ++j) table[k][j] = 0;
  }
  return {table[0], table[1], table[2], table[3], table[4]};
}

// A column alone, in double: squares beyond float's range, infinities and NaN.
template <class T> inline void column_again(const Job& job, std::int64_t c) {
  const T* x = static_cast<const T*>(job.x) + c;
  const double count = static_cast<double>(job.batch);
  double total = 0, squares = 0;
  for (std::int64_t r = 0; r < job.batch; ++r)
    total += static_cast<double>(load(x + r * job.channels, 1)[0]);
  const double mean = total / count;
  for (std::int64_t r = 0; r < job.batch; ++r) {
    const double away = static_cast<double>(load(x + r * job.channels, 1)[0]) - mean;
    squares += away * away;
  }
  finish_moments(job, c, Moments{count, mean, squares});
}

template <class T, Activation ACTIVATION, bool RESIDUAL>
void forward_rows(const Job& job, bool sum, bool write) {
  using R = Rows<T, ACTIVATION, RESIDUAL>;
  using A = typename R::A;
  const Widths wide = widths_of<A>(job.channels);
  const std::int64_t C = job.channels, column = wide.width + R::L;
  int threads = job.threads;
  if (threads > MOST_THREADS) threads = MOST_THREADS;
  if (sum) {
    using M = Rows<T, Activation::none, false>;  // one for all activations
    const std::int64_t each = 2 * (C * 8 + 64) + 3 * (column * static_cast<std::int64_t>(sizeof(A)) + 64);
    Scratch scratch(each * threads);
    typename M::Sum parts[MOST_THREADS];
    for (int k = 0; k < threads; ++k) {
      parts[k].mean = scratch.take<double>(C);
      parts[k].squares = scratch.take<double>(C);
      parts[k].shift = scratch.take<A>(column);
      parts[k].sum = scratch.take<A>(column);
      parts[k].about = scratch.take<A>(column);
    }
    over_rows(job, threads, [&](std::int64_t from, std::int64_t to, int index) {
      M::moments(job, from, to, wide, parts[index]);
    });
    for (std::int64_t c = 0; c < C; ++c) {
      Moments whole;
      for (int k = 0; k < threads; ++k)
        if (parts[k].count > 0) whole.merge(parts[k].count, parts[k].mean[c], parts[k].squares[c]);
      if (finite(whole.squares)) finish_moments(job, c, whole);
      else column_again<T>(job, c);
    }
  }
  if (!write) return;
  Scratch scratch(5 * (column * static_cast<std::int64_t>(sizeof(A)) + 64));
  const RowTables<A> tables = tables_of<T, R>(job, wide, false, scratch);
  over_rows(job, threads, [&](std::int64_t from, std::int64_t to, int) {
    R::normalize(job, from, to, wide, tables);
  });
}

template <class T, Activation ACTIVATION, bool RESIDUAL>
void backward_rows(const Job& job, bool sum, bool write) {
  using R = Rows<T, ACTIVATION, RESIDUAL>;
  using A = typename R::A;
  const Widths wide = widths_of<A>(job.channels);
  const std::int64_t C = job.channels, column = wide.width + R::L;
  const std::int64_t column_bytes = column * static_cast<std::int64_t>(sizeof(A)) + 64;
  int threads = job.threads;
  if (threads > MOST_THREADS) threads = MOST_THREADS;
  if (sum) {
    Scratch scratch(5 * column_bytes + threads * (2 * (C * 8 + 64) + 2 * column_bytes));
    const RowTables<A> tables = tables_of<T, R>(job, wide, false, scratch);
    typename R::Gradients parts[MOST_THREADS];
    for (int k = 0; k < threads; ++k) {
      parts[k].sum = scratch.take<double>(C);
      parts[k].dot = scratch.take<double>(C);
      parts[k].sum_part = scratch.take<A>(column);
      parts[k].dot_part = scratch.take<A>(column);
      for (std::int64_t c = 0; c < C; ++c) parts[k].sum[c] = parts[k].dot[c] = 0;
    }
    over_rows(job, threads, [&](std::int64_t from, std::int64_t to, int index) {
      R::reduce(job, from, to, wide, tables, parts[index]);
    });
    for (std::int64_t c = 0; c < C; ++c) {
      Sums whole;
      for (int k = 0; k < threads; ++k) {
        whole.sum += parts[k].sum[c];
        whole.dot += parts[k].dot[c];
      }
      const double high = static_cast<double>(static_cast<A>(job.mean[c]));
      if (!finite(whole.dot)) whole = R::column_sums(job, c);
      finish_sums(job, c, whole, high);
    }
  }
  if (!write) return;
  Scratch scratch(5 * column_bytes);
  const RowTables<A> tables = tables_of<T, R>(job, wide, true, scratch);
  over_rows(job, threads, [&](std::int64_t from, std::int64_t to, int) {
    R::input_gradient(job, from, to, wide, tables);
  });
}
