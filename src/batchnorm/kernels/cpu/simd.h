// Vectors of the compiler's own, as wide as the instruction set: one source for all of them.
//
// Included inside an anonymous namespace by every instruction set's own translation unit. Nothing of
// the standard library is called here: the linker keeps one copy of an inline function, and it might
// be the one with AVX-512 in it.

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64;
#elif defined(__AVX__)
constexpr int VECTOR_BYTES = 32;
#else
constexpr int VECTOR_BYTES = 16;
#endif

template <class A> struct Of;
template <> struct Of<float> {
  static constexpr int lanes = VECTOR_BYTES / 4;
  typedef float Vector __attribute__((vector_size(VECTOR_BYTES)));
  typedef float Unaligned __attribute__((vector_size(VECTOR_BYTES), aligned(4), may_alias));
  typedef std::int32_t Mask __attribute__((vector_size(VECTOR_BYTES)));
};
template <> struct Of<double> {
  static constexpr int lanes = VECTOR_BYTES / 8;
  typedef double Vector __attribute__((vector_size(VECTOR_BYTES)));
  typedef double Unaligned __attribute__((vector_size(VECTOR_BYTES), aligned(8), may_alias));
  typedef std::int64_t Mask __attribute__((vector_size(VECTOR_BYTES)));
};
template <class A> using Vector = typename Of<A>::Vector;
template <class A> using Mask = typename Of<A>::Mask;
template <class A> constexpr int LANES = Of<A>::lanes;

// Storage types, and what they are computed in.
struct bfloat16 { std::uint16_t bits; };
struct float16 { std::uint16_t bits; };
template <class T> struct Computed { using type = T; };
template <> struct Computed<bfloat16> { using type = float; };
template <> struct Computed<float16> { using type = float; };
template <class T> using ComputedIn = typename Computed<T>::type;

typedef std::uint32_t Words __attribute__((vector_size(VECTOR_BYTES)));
typedef std::uint64_t LongWords __attribute__((vector_size(VECTOR_BYTES)));
typedef std::uint16_t Halves __attribute__((vector_size(VECTOR_BYTES / 2)));
typedef std::uint16_t HalvesUnaligned
    __attribute__((vector_size(VECTOR_BYTES / 2), aligned(2), may_alias));

template <class V, class W> inline V bits_as(W from) {
  static_assert(sizeof(V) == sizeof(W), "same size");
  V to;
  __builtin_memcpy(&to, &from, sizeof(V));
  return to;
}

template <class A> inline Vector<A> splat(A value) { return Vector<A>{} + value; }

template <class A> inline Vector<A> select(Mask<A> mask, Vector<A> yes, Vector<A> no) {
  return mask ? yes : no;
}

// Fused where the hardware is, so that forward and backward see the same bits.
template <class A> inline Vector<A> fma(Vector<A> a, Vector<A> b, Vector<A> c) { return a * b + c; }

inline Vector<float> widen(bfloat16, Halves halves) {
  return bits_as<Vector<float>>(__builtin_convertvector(halves, Words) << 16);
}
#if defined(__AVX512BF16__)
inline Halves narrow(bfloat16, Vector<float> value) {  // as below, but what is below 2^-126 becomes 0
  return bits_as<Halves>(_mm512_cvtneps_pbh(bits_as<__m512>(value)));
}
#else
inline Halves narrow(bfloat16, Vector<float> value) {  // to the nearest, ties to even
  const Words bits = bits_as<Words>(value);
  const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Words quiet = (bits >> 16) | 0x40;  // rounding would turn some NaN into infinity
  return __builtin_convertvector(value == value ? rounded : quiet, Halves);
}
#endif

#if defined(__AVX512F__)
inline Vector<float> widen(float16, Halves halves) {
  return bits_as<Vector<float>>(_mm512_maskz_cvtph_ps(0xffff, bits_as<__m256i>(halves)));
}
inline Halves narrow(float16, Vector<float> value) {
  return bits_as<Halves>(
      _mm512_maskz_cvtps_ph(0xffff, bits_as<__m512>(value), _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__F16C__)
inline Vector<float> widen(float16, Halves halves) {
  return bits_as<Vector<float>>(_mm256_cvtph_ps(bits_as<__m128i>(halves)));
}
inline Halves narrow(float16, Vector<float> value) {
  return bits_as<Halves>(_mm256_cvtps_ph(bits_as<__m256>(value), _MM_FROUND_TO_NEAREST_INT));
}
#else
inline Vector<float> widen(float16, Halves halves) {
  const Words words = __builtin_convertvector(halves, Words);
  const Words sign = (words & 0x8000) << 16, magnitude = (words & 0x7fff) << 13;
  // 2^112 moves the exponent from half's bias to float's, and denormals with it
  const Words scaled = bits_as<Words>(bits_as<Vector<float>>(magnitude) * 0x1p112f);
  const Words special = magnitude | 0x7f800000;  // infinity and NaN
  return bits_as<Vector<float>>(sign | (magnitude >= 0x0f800000 ? special : scaled));
}
inline Halves narrow(float16, Vector<float> value) {
  const Words bits = bits_as<Words>(value);
  const Words sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  const Words normal = ((magnitude + 0xfff + ((magnitude >> 13) & 1)) >> 13) - (112u << 10);
  // a half's denormals count in 2^-24, which is the last bit of a float from 0.5 to 1
  const Vector<float> half_up = bits_as<Vector<float>>(magnitude) + 0.5f;
  const Words denormal = bits_as<Words>(half_up) - bits_as<Words>(splat<float>(0.5f));
  Words half = magnitude < 0x38800000 ? denormal : normal;
  half = magnitude >= 0x47800000 ? Words{} + 0x7c00 : half;
  half = magnitude > 0x7f800000 ? Words{} + 0x7e00 : half;
  return __builtin_convertvector(sign | half, Halves);
}
#endif

template <class T> inline Vector<ComputedIn<T>> load(const T* from) {
  if constexpr (sizeof(T) == 2) {
    return widen(T{}, Halves(*reinterpret_cast<const HalvesUnaligned*>(from)));
  } else {
    return *reinterpret_cast<const typename Of<T>::Unaligned*>(from);
  }
}

template <class T> inline void store(T* to, Vector<ComputedIn<T>> value) {
  if constexpr (sizeof(T) == 2) {
    *reinterpret_cast<HalvesUnaligned*>(to) = narrow(T{}, value);
  } else {
    *reinterpret_cast<typename Of<T>::Unaligned*>(to) = value;
  }
}

// value, in a register. The compiler would else make one masked load of `condition ? load : 0`, which
// cannot start before the condition is known.
template <class V> inline V loaded(V value) {
#if defined(__AVX512F__)
  asm("" : "+v"(value));
#endif
  return value;
}

// The first `count` lanes; the others are 0.
template <class T> inline Vector<ComputedIn<T>> load(const T* from, int count) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    return bits_as<Vector<float>>(_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), from));
  if constexpr (sizeof(T) == 2) {
    const auto mask = static_cast<__mmask16>((1u << count) - 1);
    return widen(T{}, bits_as<Halves>(_mm256_maskz_loadu_epi16(mask, from)));
  }
#endif
  T lanes[LANES<ComputedIn<T>>] = {};
  for (int lane = 0; lane < count; ++lane) lanes[lane] = from[lane];
  return load<T>(lanes);
}

// All lanes, or the first ones.
template <class T> inline Vector<ComputedIn<T>> take(const T* from, int lanes) {
  return lanes == LANES<ComputedIn<T>> ? load(from) : load(from, lanes);
}

template <class T> inline void store(T* to, Vector<ComputedIn<T>> value, int count) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    _mm512_mask_storeu_ps(to, static_cast<__mmask16>((1u << count) - 1), bits_as<__m512>(value));
    return;
  }
  if constexpr (sizeof(T) == 2) {
    const auto mask = static_cast<__mmask16>((1u << count) - 1);
    _mm256_mask_storeu_epi16(to, mask, bits_as<__m256i>(narrow(T{}, value)));
    return;
  }
#endif
  T lanes[LANES<ComputedIn<T>>];
  store<T>(lanes, value);
  for (int lane = 0; lane < count; ++lane) to[lane] = lanes[lane];
}

template <class T> inline void put(T* to, Vector<ComputedIn<T>> value, int lanes) {
  if (lanes == LANES<ComputedIn<T>>) store(to, value);
  else store(to, value, lanes);
}

// Past the caches: what is larger than they are would only push out what they hold, and a store would
// first read the line that it overwrites. The address is a multiple of the vector's size.
template <class T> inline void store_past_caches(T* to, Vector<ComputedIn<T>> value) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 2)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to), bits_as<__m256i>(narrow(T{}, value)));
  else
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to), bits_as<__m512i>(value));
#elif defined(__AVX__)
  if constexpr (sizeof(T) == 2)
    _mm_stream_si128(reinterpret_cast<__m128i*>(to), bits_as<__m128i>(narrow(T{}, value)));
  else
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to), bits_as<__m256i>(value));
#elif defined(__SSE2__)
  if constexpr (sizeof(T) == 2) store(to, value);
  else _mm_stream_si128(reinterpret_cast<__m128i*>(to), bits_as<__m128i>(value));
#else
  store(to, value);
#endif
}

// Such stores are seen by other threads after this.
inline void finish_stores() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// value(i, lanes) to `to + i`, for `length` elements from `start`, in vectors; lanes < L at the ends. Where
// a value may be computed `twice`, since no input is written over, whole vectors overlap there, and those
// between them lie in one cache line each: sooner than masked stores and such as cross a line.
template <class T, class Value>
inline void write_run(T* to, std::int64_t start, std::int64_t length, bool past_caches, bool twice,
                      const Value& value) {
  constexpr int L = LANES<ComputedIn<T>>;
  constexpr std::int64_t bytes = L * static_cast<std::int64_t>(sizeof(T));
  std::int64_t i = start;
  const std::int64_t end = start + length;
  twice = twice && length >= L;
  if (past_caches || twice) {
    const auto beyond = static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(to + i) % bytes);
    std::int64_t head = beyond == 0 ? 0 : (bytes - beyond) / static_cast<std::int64_t>(sizeof(T));
    if (head > length) head = length;
    if (head > 0) {
      if (twice) store(to + i, value(i, L));
      else store(to + i, value(i, static_cast<int>(head)), static_cast<int>(head));
      i += head;
    }
  }
  if (past_caches) {
    for (; i + L <= end; i += L) store_past_caches(to + i, value(i, L));
  } else {
    for (; i + 2 * L <= end; i += 2 * L) {
      const auto a = value(i, L), b = value(i + L, L);
      store(to + i, a);
      store(to + i + L, b);
    }
    if (i + L <= end) {
      store(to + i, value(i, L));
      i += L;
    }
  }
  if (i == end) return;
  if (twice) store(to + end - L, value(end - L, L));
  else store(to + i, value(i, static_cast<int>(end - i)), static_cast<int>(end - i));
}

// value in the first `count` lanes, 0 in the others.
template <class A> inline Vector<A> first(Vector<A> value, int count) {
  using Lane = std::conditional_t<sizeof(A) == 4, std::int32_t, std::int64_t>;
  alignas(64) static constexpr Lane PLACES[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const Mask<A> places = *reinterpret_cast<const Mask<A>*>(PLACES);
  return select<A>(places < count, value, Vector<A>{});
}

template <class A> inline double sum_of(Vector<A> value) {
  double total[4] = {};
  for (int lane = 0; lane < LANES<A>; ++lane) total[lane % 4] += static_cast<double>(value[lane]);
  return (total[0] + total[1]) + (total[2] + total[3]);
}
