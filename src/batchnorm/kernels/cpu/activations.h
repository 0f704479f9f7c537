// The activations that are fused behind the normalization, and their derivatives.
//
// Included inside an anonymous namespace, behind simd.h. z is what the normalization gives (with the
// residual added), y = activation(z).

constexpr double LEAKY_SLOPE = 0.01;

// What e^x is beyond the exponents of a type: z · sigmoid(z) meets it with the largest z. Comparisons
// are false for NaN, which stays.
template <class A> inline Vector<A> beyond_exponents(Vector<A> found, Vector<A> x, A least, A most) {
  found = select<A>(x > most, splat<A>(static_cast<A>(__builtin_inf())), found);
  return select<A>(x < least, Vector<A>{}, found);
}

// e^x by 2^n · e^r, |r| ≤ ln 2 / 2, with a polynomial of least largest error; 1 ulp or so.
inline Vector<float> exp_of(Vector<float> given) {
  Vector<float> x = select<float>(given > 88.3f, splat(88.3f), given);
  x = select<float>(x < -87.0f, splat(-87.0f), x);
  const Vector<float> magic = splat(0x1.8p23f);
  const Vector<float> shifted = fma<float>(x, splat(1.44269504f), magic);
  const Vector<float> n = shifted - magic;
  Vector<float> r = fma<float>(n, splat(-0x1.62e4p-1f), x);  // ln 2, its high bits
  r = fma<float>(n, splat(-0x1.7f7d1cp-20f), r);             // and its low ones
  Vector<float> p = splat(1.9875691500e-4f);
  p = fma<float>(p, r, splat(1.3981999507e-3f));
  p = fma<float>(p, r, splat(8.3334519073e-3f));
  p = fma<float>(p, r, splat(4.1665795894e-2f));
  p = fma<float>(p, r, splat(1.6666665459e-1f));
  p = fma<float>(p, r, splat(5.0000001201e-1f));
  p = fma<float>(p, r * r, r) + 1.0f;
  const Words scale = (bits_as<Words>(shifted) << 23) + 0x3f800000;
  return beyond_exponents<float>(p * bits_as<Vector<float>>(scale), given, -87.3f, 88.7f);
}

// The same in double, in its parts: e^x = 2^n · (1 + fraction). Taylor's series to r^13, of which
// less than 4e-18 is left.
struct Exponential {
  Vector<double> power, fraction;
};

inline Exponential parts_of_exp(Vector<double> x) {
  x = select<double>(x > 709.0, splat(709.0), x);  // the comparison is false for NaN, which stays
  x = select<double>(x < -708.0, splat(-708.0), x);
  const Vector<double> magic = splat(0x1.8p52);
  const Vector<double> shifted = fma<double>(x, splat(1.4426950408889634), magic);
  const Vector<double> n = shifted - magic;
  Vector<double> r = fma<double>(n, splat(-0x1.62e42feep-1), x);  // ln 2, its high bits
  r = fma<double>(n, splat(-0x1.a39ef35793c76p-33), r);           // and its low ones
  Vector<double> p = splat(1.0 / 6227020800);
  p = fma<double>(p, r, splat(1.0 / 479001600));
  p = fma<double>(p, r, splat(1.0 / 39916800));
  p = fma<double>(p, r, splat(1.0 / 3628800));
  p = fma<double>(p, r, splat(1.0 / 362880));
  p = fma<double>(p, r, splat(1.0 / 40320));
  p = fma<double>(p, r, splat(1.0 / 5040));
  p = fma<double>(p, r, splat(1.0 / 720));
  p = fma<double>(p, r, splat(1.0 / 120));
  p = fma<double>(p, r, splat(1.0 / 24));
  p = fma<double>(p, r, splat(1.0 / 6));
  p = fma<double>(p, r, splat(0.5));
  const LongWords power = (bits_as<LongWords>(shifted) << 52) + 0x3ff0000000000000;
  return {bits_as<Vector<double>>(power), fma<double>(p, r * r, r)};
}

inline Vector<double> exp_of(Vector<double> x) {
  const Exponential e = parts_of_exp(x);
  const Vector<double> found = fma<double>(e.power, e.fraction, e.power);
  return beyond_exponents<double>(found, x, -708.0, 709.7);
}

template <class A> inline Vector<A> sigmoid_of(Vector<A> z) { return A(1) / (A(1) + exp_of(-z)); }

inline Vector<float> tanh_of(Vector<float> z) {
  const Vector<float> size = select<float>(z < 0.0f, -z, z), square = z * z;
  Vector<float> p = splat(-5.70498872745e-3f);  // near 0, where 1 − 2 / (e^2z + 1) would cancel
  p = fma<float>(p, square, splat(2.06390887954e-2f));
  p = fma<float>(p, square, splat(-5.37397155531e-2f));
  p = fma<float>(p, square, splat(1.33314422036e-1f));
  p = fma<float>(p, square, splat(-3.33332819422e-1f));
  const Vector<float> small = fma<float>(p * square, z, z);
  const Vector<float> large = 1.0f - 2.0f / (exp_of(size + size) + 1.0f);
  return select<float>(size < 0.625f, small, select<float>(z < 0.0f, -large, large));
}

// By e^2|z| − 1, whose parts do not cancel near 0.
inline Vector<double> tanh_of(Vector<double> z) {
  Vector<double> size = select<double>(z < 0.0, -z, z);
  size = select<double>(size > 20.0, splat(20.0), size);  // where it is 1 to the last digit
  const Exponential e = parts_of_exp(size + size);
  const Vector<double> less_1 = fma<double>(e.power, e.fraction, e.power - 1.0);
  const Vector<double> found = less_1 / (less_1 + 2.0);
  return select<double>(z < 0.0, -found, found);
}

// Φ(z), the normal distribution's: ½ erfc(−z / √2), in float by the Chebyshev fit of erfc(t) e^(t²) in
// 1 / (1 + t/2), whose relative error is below 1.2e-7 everywhere.
inline Vector<float> normal_cdf(Vector<float> z) {
  const Vector<float> t = select<float>(z < 0.0f, -z, z) * 0.707106781f;
  const Vector<float> u = 1.0f / fma<float>(t, splat(0.5f), splat(1.0f));
  Vector<float> p = splat(0.17087277f);
  p = fma<float>(p, u, splat(-0.82215223f));
  p = fma<float>(p, u, splat(1.48851587f));
  p = fma<float>(p, u, splat(-1.13520398f));
  p = fma<float>(p, u, splat(0.27886807f));
  p = fma<float>(p, u, splat(-0.18628806f));
  p = fma<float>(p, u, splat(0.09678418f));
  p = fma<float>(p, u, splat(0.37409196f));
  p = fma<float>(p, u, splat(1.00002368f));
  p = fma<float>(p, u, splat(-1.26551223f));
  const Vector<float> tail = 0.5f * u * exp_of(fma<float>(-t, t, p));
  return select<float>(z < 0.0f, tail, 1.0f - tail);
}

// The same fit for double: ln(erfc(t) e^(t²) / u) in Chebyshev polynomials of 2u − 1, u = 1 / (1 + t/2),
// computed with 40 digits; what is left out is below 3e-17. Summed by Clenshaw's recurrence.
inline Vector<double> normal_cdf(Vector<double> z) {
  constexpr double FIT[] = {
      -1.3026537197817094,      0.6419697923564902,      0.019476473204185836,
      -0.009561514786808632,    -0.0009465953444820369,  0.00036683949785276145,
      4.252332480690777e-05,    -2.0278578112534242e-05, -1.6242900046470256e-06,
      1.3036558355805232e-06,   1.5626441722066145e-08,  -8.523809591492654e-08,
      6.529054439098852e-09,    5.059343495551468e-09,   -9.91364156493032e-10,
      -2.2736512229318435e-10,  9.646791102015574e-11,   2.394038083038972e-12,
      -6.8860275264977414e-12,  8.944879273095768e-13,   3.1309213993351316e-13,
      -1.1270822361266923e-13,  3.8109052436877673e-16,  7.106097614822002e-15,
      -1.5230282026439669e-15,  -9.457494463827634e-17,  1.2102371803783959e-16};
  constexpr int DEGREE = sizeof(FIT) / sizeof(FIT[0]) - 1;
  const Vector<double> t = select<double>(z < 0.0, -z, z) * 0.70710678118654752;
  const Vector<double> u = 1.0 / fma<double>(t, splat(0.5), splat(1.0));
  const Vector<double> s = u + u - 1.0;
  Vector<double> next{}, after{};
  for (int k = DEGREE; k > 0; --k) {
    const Vector<double> here = fma<double>(s + s, next, FIT[k] - after);
    after = next;
    next = here;
  }
  const Vector<double> p = fma<double>(s, next, 0.5 * FIT[0] - after);
  const Vector<double> tail = 0.5 * u * exp_of(fma<double>(-t, t, p));
  return select<double>(z < 0.0, tail, 1.0 - tail);
}

template <class A, Activation ACTIVATION> inline Vector<A> activate(Vector<A> z) {
  if constexpr (ACTIVATION == Activation::relu) return select<A>(z < A(0), Vector<A>{}, z);
  if constexpr (ACTIVATION == Activation::leaky_relu)
    return select<A>(z < A(0), z * A(LEAKY_SLOPE), z);
  if constexpr (ACTIVATION == Activation::sigmoid) return sigmoid_of<A>(z);
  if constexpr (ACTIVATION == Activation::tanh) return tanh_of(z);
  if constexpr (ACTIVATION == Activation::silu) return z * sigmoid_of<A>(z);
  if constexpr (ACTIVATION == Activation::gelu) return z * normal_cdf(z);
  if constexpr (ACTIVATION == Activation::hardswish) {
    Vector<A> gate = z + A(3);
    gate = select<A>(gate < A(0), Vector<A>{}, gate);
    gate = select<A>(gate > A(6), splat<A>(6), gate);
    return z * gate / A(6);
  }
  return z;
}

// dy · activation′, from y where it is a function of y, else from z.
template <class A, Activation ACTIVATION>
inline Vector<A> gradient_of(Vector<A> dy, Vector<A> z_or_y) {
  const Vector<A> v = z_or_y;
  if constexpr (ACTIVATION == Activation::relu)
    return select<A>(v <= A(0), Vector<A>{}, loaded(dy));
  if constexpr (ACTIVATION == Activation::leaky_relu)
    return select<A>(v > A(0), dy, dy * A(LEAKY_SLOPE));
  if constexpr (ACTIVATION == Activation::sigmoid) return dy * v * (A(1) - v);
  if constexpr (ACTIVATION == Activation::tanh) return dy * (A(1) - v * v);
  if constexpr (ACTIVATION == Activation::silu) {
    const Vector<A> s = sigmoid_of<A>(v);
    return dy * s * (A(1) + v * (A(1) - s));
  }
  if constexpr (ACTIVATION == Activation::gelu) {
    const Vector<A> density = A(0.3989422804014327) * exp_of(A(-0.5) * v * v);
    return dy * (normal_cdf(v) + v * density);
  }
  if constexpr (ACTIVATION == Activation::hardswish) {
    const Vector<A> inside = dy * (v / A(3) + A(0.5));
    return select<A>(v < A(-3), Vector<A>{}, select<A>(v > A(3), dy, inside));
  }
  return dy;
}
