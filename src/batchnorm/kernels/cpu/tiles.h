// Rows of columns: how channels_last and inputs without spatial axes lie in memory, and small planes.
//
// Included inside an anonymous namespace, behind statistics.h. A tile is a block of memory whose rows
// are alike: the same column belongs to the same channel in all of them. Rows are streamed four at a
// time, with a sum and the channel's numbers for every column in the first-level cache.

constexpr std::int64_t WIDE = 2048;       // elements of a row that is made of several, at most
constexpr std::int64_t BROAD = 256;       // at least
constexpr std::int64_t FLOAT_ROWS = 512;  // that are summed in float, between two merges
constexpr std::int64_t STEP = 131072;     // elements of a block of the second sweep
constexpr std::int64_t AHEAD = 4096;      // bytes from what is read to what is asked for
constexpr int TOGETHER = 4;               // short rows that are taken at once
constexpr std::int64_t SHORT = 512;       // elements of one: longer ones compete for the cache's places

struct Tile {
  std::int64_t start;     // the first row's first element
  std::int64_t rows;
  std::int64_t stride;    // from a row to the next
  std::int64_t rest;      // elements behind the last row, fewer than a row's
  std::int64_t channels;
  std::int64_t plane;     // columns of a channel, side by side
  std::int64_t repeats;   // of the channels in a row
  bool short_rows;        // several are taken at once

  // Elements from what is read to what is asked for: some cache lines on, or the next row's part.
  template <class T> std::int64_t ahead() const {
    return plane == 1 ? AHEAD / static_cast<std::int64_t>(sizeof(T)) : stride;
  }
  std::int64_t width() const { return channels * plane * repeats; }
  // elements of a channel
  std::int64_t count() const { return rows * plane * repeats + rest / channels; }
};

// (R, C), rows [from, to): where C is no multiple of a vector, several rows are taken as one, so that
// hardly anything needs a mask.
template <class A> inline Tile tile_of_rows(const Job& job, std::int64_t from, std::int64_t to) {
  const std::int64_t C = job.channels;
  std::int64_t repeats = 1;
  while (repeats < LANES<A> && repeats * C % LANES<A> != 0) repeats *= 2;
  while (repeats * C < BROAD) repeats *= 2;  // a sum is met again only when it is done
  while (repeats > 1 && (repeats * C > WIDE || repeats > job.batch)) repeats /= 2;
  return {from * C, (to - from) / repeats, repeats * C, (to - from) % repeats * C, C, 1, repeats,
          repeats * C <= SHORT && !job.past_caches};
}

// Memory for the numbers of each column, its own or somebody's.
class Scratch {
 public:
  explicit Scratch(std::int64_t bytes)
      : memory_(static_cast<char*>(__builtin_malloc(static_cast<unsigned long>(bytes) + 64))),
        own_(true) {
    if (memory_ == nullptr) __builtin_trap();
    used_ = -reinterpret_cast<std::intptr_t>(memory_) & 63;
  }
  explicit Scratch(char* memory) : memory_(memory), own_(false) {}
  ~Scratch() {
    if (own_) __builtin_free(memory_);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  template <class U> U* take(std::int64_t count) {
    U* found = reinterpret_cast<U*>(memory_ + used_);
    used_ += bytes<U>(count);
    return found;
  }

  // Each array begins at another place of a page: a processor that compares only an address's last 12
  // bits takes a load from the one to wait for a store to the other.
  template <class U> static std::int64_t bytes(std::int64_t count) {
    return (count * static_cast<std::int64_t>(sizeof(U)) + 4095) / 4096 * 4096 + 11 * 64;
  }

 private:
  char* memory_;
  bool own_;
  std::int64_t used_ = 0;
};

// Rows [from, to) in memory order: body(start, width, count), where count rows are taken at once.
template <class Body>
inline void for_rows(const Tile& t, std::int64_t from, std::int64_t to, const Body& body) {
  using Four = std::integral_constant<int, TOGETHER>;
  using One = std::integral_constant<int, 1>;
  std::int64_t row = from;
  if (t.short_rows)
    for (; row + TOGETHER <= to; row += TOGETHER)
      body(t.start + row * t.stride, t.width(), Four{});
  for (; row < to; ++row) body(t.start + row * t.stride, t.width(), One{});
}

// From the end, which the cache still holds, in blocks of memory order, which the hardware's
// prefetcher likes.
template <class Body> inline void for_rows_back(const Tile& t, const Body& body) {
  if (t.rest > 0) body(t.start + t.rows * t.stride, t.rest, std::integral_constant<int, 1>{});
  const std::int64_t step = (STEP / t.width() + TOGETHER) / TOGETHER * TOGETHER;
  for (std::int64_t end = t.rows; end > 0; end -= step)
    for_rows(t, end > step ? end - step : 0, end, body);
}

// body(column, lanes) for the columns [0, width) in vectors; fewer than L lanes at the end.
template <int L, class Body> inline void for_columns(std::int64_t width, const Body& body) {
  std::int64_t j = 0;
  for (; j + L <= width; j += L) body(j, L);
  if (j < width) body(j, static_cast<int>(width - j));
}

// A value a column: what the elements of a channel meet.
template <class A> struct Tables {
  A *high, *scale, *shift, *slope, *offset;

  static std::int64_t bytes(std::int64_t width) {
    return 5 * Scratch::bytes<A>(width + LANES<A>);
  }

  Tables(std::int64_t width, Scratch& scratch) {
    A** const all[] = {&high, &scale, &shift, &slope, &offset};
    for (A** each : all) *each = scratch.take<A>(width + LANES<A>);
  }

  // Of the channels from `first` on.
  void fill(const Job& job, std::int64_t first, const Tile& t, bool slopes) {
    for (std::int64_t c = 0; c < t.channels; ++c) {
      const Affine<A> affine = affine_of<A>(job, first + c);
      const Slope<A> s = slopes ? slope_of<A>(job, first + c) : Slope<A>{};
      for (std::int64_t j = c * t.plane; j < (c + 1) * t.plane; ++j) {
        high[j] = affine.high;
        scale[j] = affine.scale;
        shift[j] = affine.shift;
        if (slopes) {
          slope[j] = s.slope;
          offset[j] = s.offset;
        }
      }
    }
    A* const all[] = {high, scale, shift, slope, offset};
    for (A* each : all) {
      if (!slopes && (each == slope || each == offset)) continue;
      for (std::int64_t j = t.channels * t.plane; j < t.width(); ++j)
        each[j] = each[j - t.channels * t.plane];
      for (std::int64_t j = t.width(); j < t.width() + LANES<A>; ++j) each[j] = 0;
    }
  }
};

// The columns' sums of a tile, and what they come to for its channels.
template <class A> struct ColumnSums {
  A *first, *second;       // a column, in float
  double *sums, *dots;     // a channel

  static std::int64_t bytes(const Tile& t) {
    return 2 * Scratch::bytes<A>(t.width() + LANES<A>) + 2 * Scratch::bytes<double>(t.channels);
  }

  ColumnSums(const Tile& t, Scratch& scratch)
      : first(scratch.take<A>(t.width() + LANES<A>)), second(scratch.take<A>(t.width() + LANES<A>)),
        sums(scratch.take<double>(t.channels)), dots(scratch.take<double>(t.channels)) {
    for (std::int64_t j = 0; j < t.width() + LANES<A>; ++j) first[j] = second[j] = 0;
    for (std::int64_t c = 0; c < t.channels; ++c) sums[c] = dots[c] = 0;
  }

  // The columns' sums are added to the channels', and start anew.
  void flush(const Tile& t) {
    std::int64_t j = 0;
    for (std::int64_t k = 0; k < t.repeats; ++k)
      for (std::int64_t c = 0; c < t.channels; ++c, j += t.plane) {
        sums[c] += total(first + j, t.plane);
        dots[c] += total(second + j, t.plane);
      }
    for (j = 0; j < t.width(); ++j) first[j] = second[j] = 0;
  }

  static double total(const A* from, std::int64_t length) {
    if (length == 1) return static_cast<double>(*from);
    Vector<A> sum{};
    for_columns<LANES<A>>(length, [&](std::int64_t i, int lanes) { sum += take(from + i, lanes); });
    return sum_of<A>(sum);
  }
};

template <class A> inline Vector<A> table(const A* from) {
  return *reinterpret_cast<const typename Of<A>::Unaligned*>(from);
}
template <class A> inline void set(A* to, Vector<A> value) {
  *reinterpret_cast<typename Of<A>::Unaligned*>(to) = value;
}

// The moments of a tile's channels.
template <class T> struct TileMoments {
  using A = ComputedIn<T>;
  using V = Vector<A>;
  static constexpr int L = LANES<A>;

  const T* x;
  A* shift;  // a column, the same for all columns of a channel
  ColumnSums<A> sums;

  static std::int64_t bytes(const Tile& t) {
    return Scratch::bytes<A>(t.width() + L) + ColumnSums<A>::bytes(t);
  }

  TileMoments(const Job& job, const Tile& t, Scratch& scratch)
      : x(static_cast<const T*>(job.x)), shift(scratch.take<A>(t.width() + L)), sums(t, scratch) {}

  void run(const Tile& t, Moments* moments) {
    for (std::int64_t c = 0; c < t.channels; ++c) moments[c] = Moments{};
    if (t.count() == 0) return;
    open(t);
    const auto add = [&](std::int64_t start, std::int64_t width, auto count) {
      add_rows<count>(x + start, t.stride, t.ahead<T>(), shift, sums.first, sums.second, width);
    };
    for (std::int64_t row = 0; row < t.rows; row += FLOAT_ROWS) {
      const std::int64_t end = row + FLOAT_ROWS < t.rows ? row + FLOAT_ROWS : t.rows;
      for_rows(t, row, end, add);
      flush(t, (end - row) * t.plane * t.repeats, moments);
    }
    if (t.rest > 0) {
      add(t.start + t.rows * t.stride, t.rest, std::integral_constant<int, 1>{});
      flush(t, t.rest / t.channels, moments);
    }
  }

  template <int COUNT>
  static void add_rows(const T* __restrict from, std::int64_t stride, std::int64_t ahead,
                       const A* __restrict shift, A* __restrict sum, A* __restrict squares,
                       std::int64_t width) {
    for_columns<L>(width, [=](std::int64_t j, int lanes) {
      const V s = table(shift + j);
      V total{}, square = table(squares + j);
      for (int k = 0; k < COUNT; ++k) {
        const T* at = from + k * stride + j;
        __builtin_prefetch(at + ahead);
        V d = take(at, lanes) - s;
        if (lanes < L) d = first<A>(d, lanes);
        total += d;
        square = fma<A>(d, d, square);
      }
      set(sum + j, table(sum + j) + total);
      set(squares + j, square);
    });
  }

  // The shift is the mean of the first rows.
  void open(const Tile& t) {
    const std::int64_t rows = t.rows < 4 ? t.rows : t.rows < 64 ? 4 : 16 / t.repeats + 1;
    const std::int64_t width = t.rows == 0 ? t.rest : t.width();
    for (std::int64_t j = 0; j < t.width() + L; ++j) shift[j] = 0;
    for (std::int64_t row = 0; row < (rows > 1 ? rows : 1); ++row)
      for_columns<L>(width, [&](std::int64_t j, int lanes) {
        const V value = take(x + t.start + row * t.stride + j, lanes);
        set(sums.first + j, table(sums.first + j) + (lanes < L ? first<A>(value, lanes) : value));
      });
    sums.flush(t);
    const double count = static_cast<double>((rows > 1 ? rows : 1) * width / t.channels);
    for (std::int64_t c = 0; c < t.channels; ++c) {
      set_shift(t, c, sums.sums[c] / count);
      sums.sums[c] = 0;
    }
    repeat_shifts(t);
  }

  void set_shift(const Tile& t, std::int64_t c, double mean) {
    const A value = finite(mean) ? static_cast<A>(mean) : A(0);
    for (std::int64_t j = c * t.plane; j < (c + 1) * t.plane; ++j) shift[j] = value;
  }

  void repeat_shifts(const Tile& t) {
    const std::int64_t period = t.channels * t.plane;
    for (std::int64_t j = period; j < t.width(); ++j) shift[j] = shift[j - period];
  }

  void flush(const Tile& t, std::int64_t count, Moments* moments) {
    if (count == 0) return;
    sums.flush(t);
    for (std::int64_t c = 0; c < t.channels; ++c) {
      moments[c].merge_sums(static_cast<double>(count), static_cast<double>(shift[c * t.plane]),
                            sums.sums[c], sums.dots[c]);
      sums.sums[c] = sums.dots[c] = 0;
      set_shift(t, c, moments[c].mean());
    }
    repeat_shifts(t);
  }
};

template <class T, Activation ACTIVATION, bool RESIDUAL> struct Tiles : Run<T, ACTIVATION, RESIDUAL> {
  using Base = Run<T, ACTIVATION, RESIDUAL>;
  using typename Base::A;
  using typename Base::V;
  using Base::L;
  using Base::KEEPS;
  using Base::READS_EXTRA;

  // Whether every vector of the tile's rows lies where `store_past_caches` wants it.
  static bool past_caches(const Job& job, const Tile& t, const void* to) {
    constexpr std::int64_t bytes = L * static_cast<std::int64_t>(sizeof(T));
    const auto first = reinterpret_cast<std::uintptr_t>(static_cast<const T*>(to) + t.start);
    return job.past_caches && first % bytes == 0 &&
           t.stride * static_cast<std::int64_t>(sizeof(T)) % bytes == 0;
  }

  static void write(T* to, V value, int lanes, bool beyond) {
    if (lanes < L) store(to, value, lanes);
    else if (beyond) store_past_caches(to, value);
    else store(to, value);
  }

  static void normalize(const Job& job, const Tile& t, const Tables<A>& tables) {
    const T* x = static_cast<const T*>(job.x);
    const T* residual = static_cast<const T*>(job.extra);
    T* y = static_cast<T*>(job.y);
    const bool beyond = past_caches(job, t, y);
    for_rows_back(t, [&](std::int64_t start, std::int64_t width, auto count) {
      normalize_rows<count>(x + start, residual + (RESIDUAL ? start : 0), y + start, t.stride,
                            tables, width, beyond);
    });
  }

  template <int COUNT>
  static void normalize_rows(const T* __restrict x, const T* __restrict residual, T* __restrict y,
                             std::int64_t stride, const Tables<A> tables, std::int64_t width,
                             bool beyond) {
    for_columns<L>(width, [=](std::int64_t j, int lanes) {
      const V high = table(tables.high + j), scale = table(tables.scale + j),
              shift = table(tables.shift + j);
      for (int k = 0; k < COUNT; ++k) {
        const std::int64_t i = k * stride + j;
        V r{};
        if constexpr (RESIDUAL) r = take(residual + i, lanes);
        write(y + i, Base::forward(take(x + i, lanes), high, scale, shift, r), lanes, beyond);
      }
    });
  }

  // What the backward pass reads and writes, from one element on.
  struct Streams {
    const T *x, *dy, *extra;
    T *gradient, *dx;

    Streams(const Job& job, std::int64_t start)
        : x(static_cast<const T*>(job.x) + start), dy(static_cast<const T*>(job.dy) + start),
          extra(static_cast<const T*>(job.extra) + (READS_EXTRA ? start : 0)),
          gradient(static_cast<T*>(job.gradient) + (KEEPS ? start : 0)),
          dx(static_cast<T*>(job.dx) + start) {}

    V gradient_at(std::int64_t i, int lanes, V scale, V shift, V centred) const {
      V other{};
      if constexpr (READS_EXTRA) other = take(extra + i, lanes);
      return Base::gradient(take(dy + i, lanes), centred, scale, shift, other);
    }
  };

  // Σ g and Σ g·(x − high) of the tile's channels, into sums.
  static void reduce(const Job& job, const Tile& t, const Tables<A>& tables, ColumnSums<A>& sums) {
    const auto add = [&](std::int64_t start, std::int64_t width, auto count) {
      reduce_rows<count>(Streams(job, start), t.stride, t.ahead<T>(), tables, sums.first,
                         sums.second, width);
    };
    for (std::int64_t row = 0; row < t.rows; row += FLOAT_ROWS) {
      for_rows(t, row, row + FLOAT_ROWS < t.rows ? row + FLOAT_ROWS : t.rows, add);
      sums.flush(t);
    }
    if (t.rest > 0) {
      add(t.start + t.rows * t.stride, t.rest, std::integral_constant<int, 1>{});
      sums.flush(t);
    }
  }

  template <int COUNT>
  static void reduce_rows(const Streams s, std::int64_t stride, std::int64_t ahead,
                          const Tables<A> tables, A* __restrict sums, A* __restrict dots, std::int64_t width) {
    for_columns<L>(width, [=](std::int64_t j, int lanes) {
      const V high = table(tables.high + j), scale = table(tables.scale + j),
              shift = table(tables.shift + j);
      V sum{}, dot = table(dots + j);
      for (int k = 0; k < COUNT; ++k) {
        const std::int64_t i = k * stride + j;
        __builtin_prefetch(s.x + i + ahead);
        __builtin_prefetch(s.dy + i + ahead);
        V centred = take(s.x + i, lanes) - high;
        V g = s.gradient_at(i, lanes, scale, shift, centred);
        if constexpr (KEEPS) put(s.gradient + i, g, lanes);
        if (lanes < L) {
          g = first<A>(g, lanes);
          centred = first<A>(centred, lanes);
        }
        sum += g;
        dot = fma<A>(g, centred, dot);
      }
      set(sums + j, table(sums + j) + sum);
      set(dots + j, dot);
    });
  }

  static void input_gradient(const Job& job, const Tile& t, const Tables<A>& tables) {
    const bool beyond = past_caches(job, t, job.dx);
    for_rows_back(t, [&](std::int64_t start, std::int64_t width, auto count) {
      input_gradient_rows<count>(Streams(job, start), t.stride, tables, width, beyond);
    });
  }

  template <int COUNT>
  static void input_gradient_rows(const Streams s, std::int64_t stride, const Tables<A> tables,
                                  std::int64_t width, bool beyond) {
    for_columns<L>(width, [=](std::int64_t j, int lanes) {
      const V high = table(tables.high + j), scale = table(tables.scale + j),
              shift = table(tables.shift + j), slope = table(tables.slope + j),
              offset = table(tables.offset + j);
      for (int k = 0; k < COUNT; ++k) {
        const std::int64_t i = k * stride + j;
        const V centred = take(s.x + i, lanes) - high;
        V g;
        if constexpr (KEEPS) g = take(s.gradient + i, lanes);
        else g = s.gradient_at(i, lanes, scale, shift, centred);
        write(s.dx + i, input_gradient_of<A>(g, centred, scale, slope, offset), lanes, beyond);
      }
    });
  }
};
