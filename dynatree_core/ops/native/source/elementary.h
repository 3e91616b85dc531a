/* exp, tanh, erf and the activations, sixteen at a time: one polynomial for every element, so that a result never depends
 * on where in a row it stands. Coefficients are those of Cephes (S. L. Moshier), for single precision. */
#pragma once

#include "simd.h"

inlined f16x polynomial(f16x x, const float *coefficients, int count) { /* highest power first */
  f16x y = all16(coefficients[0]);
  for (int i = 1; i < count; i++) y = fma16(y, x, all16(coefficients[i]));
  return y;
}

/* Within two units in the last place; 0 below -87.3, and no more than about 2.4e38. */
inlined f16x exp16(f16x x) {
  static const float P[] = {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f,
                            4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
  f16x given = x, turns, y;
  EACH {
    floats high = 88.3762626f - (floats){0}, low = -88.0f - (floats){0};
    x.of[part] = choose((ints)(x.of[part] > high), high, x.of[part]);
    x.of[part] = choose((ints)(x.of[part] < low), low, x.of[part]);
    turns.of[part] = (x.of[part] * 1.44269504088896341f + 12582912.0f) - 12582912.0f; /* rounds to a whole number */
  }
  x = fma16(turns, all16(-0.693359375f), x);
  x = fma16(turns, all16(2.12194440e-4f), x);
  y = polynomial(x, P, 6);
  y = add16(fma16(y, mul16(x, x), x), all16(1.0f));
  EACH {
    ints power = (__builtin_convertvector(turns.of[part], ints) + 127) << 23; /* 2 to that power */
    y.of[part] = y.of[part] * (floats)power;
    y.of[part] = choose((ints)(given.of[part] < -87.3f), (floats){0}, y.of[part]);
  }
  return y;
}

inlined f16x tanh16(f16x x) {
  static const float P[] = {-5.70498872745e-3f, 2.06390887954e-2f, -5.37397155531e-2f, 1.33314422036e-1f,
                            -3.33332819422e-1f};
  f16x size, square = mul16(x, x), near, far;
  near = fma16(mul16(polynomial(square, P, 5), square), x, x);
  EACH size.of[part] = (floats)((ints)x.of[part] & 0x7fffffff);
  far = div16(all16(2.0f), add16(exp16(add16(size, size)), all16(1.0f)));
  EACH {
    floats grown = (floats)((ints)(1.0f - far.of[part]) | ((ints)x.of[part] & (int32_t)0x80000000));
    x.of[part] = choose((ints)(size.of[part] < 0.625f), near.of[part], grown);
  }
  return x;
}

inlined f16x erf16(f16x x) {
  static const float T[] = {7.853861353153693e-5f, -8.010193625184903e-4f, 5.188327685732524e-3f, -2.685381193529856e-2f,
                            1.128358514861418e-1f, -3.761262582423300e-1f, 1.128379165726710e+0f};
  static const float P[] = {2.326819970068386e-2f, -1.387039388740657e-1f, 3.687424674597105e-1f,
                            -5.824733027278666e-1f, 6.210004621745983e-1f, -4.944515323274145e-1f,
                            3.404879937665872e-1f, -2.741127028184656e-1f, 5.638259427386472e-1f};
  static const float R[] = {-1.047766399936249e+1f, 1.297719955372516e+1f, -7.495518717768503e+0f, 2.921019019210786e+0f,
                            -1.015265279202700e+0f, 4.218463358204948e-1f, -2.820767439740514e-1f, 5.641895067754075e-1f};
  f16x size, square = mul16(x, x), near = mul16(x, polynomial(square, T, 7)), inverse, middle, far, rest;
  EACH size.of[part] = (floats)((ints)x.of[part] & 0x7fffffff);
  inverse = div16(all16(1.0f), size);
  square = mul16(inverse, inverse);
  middle = polynomial(square, P, 9);
  far = polynomial(square, R, 8);
  rest = mul16(exp16(sub16(all16(0.0f), mul16(x, x))), inverse);
  EACH {
    floats beyond = 1.0f - rest.of[part] * choose((ints)(size.of[part] < 2.0f), middle.of[part], far.of[part]);
    beyond = (floats)((ints)beyond | ((ints)x.of[part] & (int32_t)0x80000000));
    /* beyond 4 it is 1, and no number stays none */
    x.of[part] = choose((ints)(size.of[part] >= 1.0f), beyond, near.of[part]);
  }
  return x;
}

enum { SILU, GELU, GELU_TANH, QUICK_GELU, RELU, RELU2, CLIPPED_SWIGLU };

inlined f16x sigmoid_times(f16x x, float slope) { /* x / (1 + exp(-slope * x)) */
  f16x rest = exp16(mul16(all16(-slope), x));
  return div16(x, add16(all16(1.0f), rest));
}

inlined f16x activate16(int64_t activation, f16x x) {
  const f16x half = all16(0.5f), one = all16(1.0f);
  switch (activation) {
    case SILU: return sigmoid_times(x, 1.0f);
    case QUICK_GELU: return sigmoid_times(x, 1.702f);
    case GELU: return mul16(mul16(half, x), add16(one, erf16(mul16(x, all16(0.70710678118654752f)))));
    case GELU_TANH: {
      f16x cube = mul16(mul16(x, x), x);
      f16x inner = mul16(all16(0.79788456080286536f), add16(x, mul16(all16(0.044715f), cube)));
      return mul16(mul16(half, x), add16(one, tanh16(inner)));
    }
    default: {
      f16x y;
      EACH y.of[part] = choose((ints)(x.of[part] < 0.0f), (floats){0}, x.of[part]);
      return activation == RELU2 ? mul16(y, y) : y;
    }
  }
}

inlined f16x gated16(int64_t activation, f16x gate, f16x up) {
  if (activation != CLIPPED_SWIGLU) return mul16(activate16(activation, gate), up);
  const floats most = 7.0f - (floats){0}, least = -most;
  EACH {
    gate.of[part] = choose((ints)(gate.of[part] > most), most, gate.of[part]);
    up.of[part] = choose((ints)(up.of[part] > most), most, up.of[part]);
    up.of[part] = choose((ints)(up.of[part] < least), least, up.of[part]);
  }
  return mul16(add16(up, all16(1.0f)), sigmoid_times(gate, 1.702f));
}
